//! `mesh-ctl release` where others own the partitions than the sidecar that is asked: they do it, and whoever owns them next does it in their place.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::{GetStatusResponse, RouteState};
use mesh_tests::{
    load::Load,
    on_kafka,
    oracle::{Oracle, sightings},
    service::{Condition, Rule, Scenario, Service},
    sidecar::{Builder, Sidecar, routes_of},
    stage::Stage,
};
use rustix::process::Signal;
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);
const PARTITIONS: u32 = 4;
const PARK: &str = "
    topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
    routes:
    - { name: work, service: work, from: [%in], handler: /work, to: [%out], breaker: { failures: 10000 },
        retry: { attempts: 2, initial: 20ms, topics: [100ms] }, on_exhausted: park }
    ";
/// Beside it one whose partitions stand still in place of that.
const STOP: &str = "
    - { name: still, service: work, from: [%still], handler: /work, to: [%moved], breaker: { failures: 10000 },
        retry: { attempts: 2, initial: 20ms }, on_exhausted: stop }
    ";

/// Fails the first record of each key, whenever it comes.
fn poison() -> Scenario {
    let condition = Condition { field_equals: Some(("n".to_owned(), json!(0))), ..Condition::default() };
    Scenario::new().on("/work", [Rule::status(500).when(condition), Rule::echo()])
}

/// A sidecar of the service that the group misses soon once it is gone.
fn worker(stage: &Stage, name: &str, service: &Service) -> Result<Builder> {
    let bootstrap = stage.broker().bootstrap().context("Kafka")?;
    let broker = json!({ "kafka": { "bootstrap.servers": bootstrap, "session.timeout.ms": "8000" } });
    Ok(stage.sidecar(name).instance(name).service("work", service).broker(broker))
}

/// Whether two instances share the partitions of a route.
fn shared(status: &GetStatusResponse, route: &str) -> bool {
    routes_of(status).filter(|found| found.route == route && found.partitions == PARTITIONS / 2).count() == 2
}

/// Whether so many records wait to be released, and so many lie in park topics, over all instances.
fn waits(exhausted: u64, parked: u64) -> impl Fn(&GetStatusResponse) -> bool {
    move |status| {
        let routes = routes_of(status).filter(|route| route.route == "work");
        let sum = routes.fold((0, 0), |sum, route| (sum.0 + route.exhausted_records, sum.1 + route.parked_records));
        sum == (exhausted, parked)
    }
}

/// A release that reaches every partition: how many records it released.
async fn release(asked: &Sidecar, route: &str, more: &[&str]) -> Result<u64> {
    let said = asked.ctl(&[&["release", route, "-o", "json"], more].concat()).await?.ends(0)?.json()?;
    ensure!(said["missing"] == json!([]), "{said}");
    said["released"].as_u64().context("released")
}

/// How often the first record of each key was delivered, by the partition that it lies in.
async fn attempts(service: &Service) -> Result<BTreeMap<(i32, String), u64>> {
    let mut attempts = BTreeMap::new();
    for entry in service.ledger_of("/work").await?.iter().filter(|entry| entry.json()["n"] == 0) {
        *attempts.entry((entry.partition, entry.key.clone().context("a key")?)).or_default() += 1;
    }
    Ok(attempts)
}

/// Checks that each record came out once, in the order of its key.
async fn all_went(stage: &Stage, asked: &Sidecar, to: &str, oracle: &Oracle) -> Result<()> {
    let found = stage.read(asked, None, &stage.topic(to), oracle.len()).await?;
    oracle.judge(&sightings(&found)?).exactly_once()
}

on_kafka!(a_release_reaches_the_owners_through_a_sidecar_that_owns_nothing, remote);

async fn remote(stage: Stage) -> Result<()> {
    let mut service = Service::native(poison()).await?;
    let first = worker(&stage, "first", &service)?.start().await?;
    let second = worker(&stage, "second", &service)?.start().await?;
    let asked = stage.sidecar("asked").start().await?;
    asked.apply(&format!("{}{}", PARK.trim_end(), STOP).replace("topics: {", "topics: { %still: { partitions: 4 },")).await?;
    let both = |status: &GetStatusResponse| shared(status, "work") && shared(status, "still");
    asked.wait_status("both own partitions", MINUTE, both).await?;

    // First of keys that are parked.
    let oracle = Load::new(stage.topic("in"), 24, 12).http(&asked).await?;
    asked.wait_status("all keys are parked", MINUTE, waits(12, 24)).await?;
    let partitions: BTreeSet<i32> = attempts(&service).await?.into_keys().map(|(partition, _)| partition).collect();
    ensure!(partitions.len() > 2, "both own some of {partitions:?}");
    ensure!(release(&asked, "work", &["--key", "nobody"]).await? == 0);
    service.set(Scenario::new()).await?;
    ensure!(release(&asked, "work", &["--key", "k3"]).await? == 1);
    asked.wait_status("one key went on", MINUTE, waits(11, 22)).await?;
    ensure!(release(&asked, "work", &[]).await? == 11);
    asked.wait_status("nothing waits", MINUTE, waits(0, 0)).await?;
    all_went(&stage, &asked, "out", &oracle).await?;
    for owner in [&first, &second] {
        ensure!(owner.log_text().matches("a command: release").count() >= 3, "it was not asked over the mesh");
    }

    // Then of partitions that stand still: the keys lie in the same ones.
    service.set(poison()).await?;
    let oracle = Load::new(stage.topic("still"), 24, 12).http(&asked).await?;
    let stopped = |status: &GetStatusResponse| {
        let stopped = routes_of(status).filter(|route| route.state() == RouteState::Stopped);
        stopped.map(|route| route.reason.matches("stands still").count()).sum::<usize>() == partitions.len()
    };
    asked.wait_status("they stand still", MINUTE, stopped).await?;
    service.set(Scenario::new()).await?;
    ensure!(release(&asked, "still", &[]).await? == partitions.len() as u64);
    all_went(&stage, &asked, "moved", &oracle).await?;
    for sidecar in [first, second, asked] {
        sidecar.finish().await?;
    }
    Ok(())
}

on_kafka!(a_silent_owner_of_parked_records_is_named_and_the_next_one_releases_them, silent);

async fn silent(stage: Stage) -> Result<()> {
    let mut service = Service::native(poison()).await?;
    let first = worker(&stage, "first", &service)?.start().await?;
    let mut second = worker(&stage, "second", &service)?.start().await?;
    first.apply(PARK).await?;
    first.wait_status("both own partitions", MINUTE, |status| shared(status, "work")).await?;
    let oracle = Load::new(stage.topic("in"), 24, 12).http(&first).await?;
    first.wait_status("all keys are parked", MINUTE, waits(12, 24)).await?;
    let before = attempts(&service).await?;

    // While one owner is silent the other one does what it is told, once: what fails again meanwhile waits for the next release.
    second.process()?.signal(Signal::STOP)?;
    let said = first.ctl(&["release", "work", "-o", "json", "--timeout", "2s"]).await?.ends(4)?;
    let (told, name) = (said.json()?, format!("{}-second", stage.mesh()));
    ensure!(told["reason"].as_str().is_some_and(|reason| reason.contains(&name)), "{told}");
    let missing: Vec<&str> = told["missing"].as_array().context("missing")?.iter().filter_map(Value::as_str).collect();
    ensure!(missing.len() == 2, "{told}");
    let reached = |partition: i32| !missing.contains(&format!("{}/{partition}", stage.topic("in")).as_str());
    let due = before.keys().filter(|(partition, _)| reached(*partition)).count() as u64;
    ensure!(due > 0 && due < 12 && told["released"] == due, "{due} keys are parked there: {told}");
    let twice: BTreeMap<_, _> = before.iter().map(|(at, count)| (at.clone(), count * if reached(at.0) { 2 } else { 1 })).collect();
    service.wait(twice.values().sum(), MINUTE).await?;
    let after = attempts(&service).await?;
    ensure!(after == twice, "{after:?} in place of {twice:?}");

    // It never comes back: its partitions go to the other one while that is asked.
    service.set(Scenario::new()).await?;
    let log = || first.log_text().matches("records released").count();
    let before = log();
    let killed = async {
        let begun = async {
            while log() == before {
                // Another process has no event to await.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(MINUTE, begun).await.context("the release begins")?;
        second.kill9().await
    };
    let released = async {
        let released = release(&first, "work", &["--timeout", "50s"]).await?;
        ensure!(released == 12, "{released} of 12 were released");
        Ok(())
    };
    tokio::try_join!(released, killed)?;
    // The report of the one that was killed stays for a while.
    first
        .wait_status("nothing waits", MINUTE, |status| {
            routes_of(status).any(|route| route.partitions == PARTITIONS && route.exhausted_records == 0 && route.parked_records == 0)
        })
        .await?;
    all_went(&stage, &first, "out", &oracle).await?;
    first.finish().await
}

on_kafka!(a_release_in_the_middle_of_a_rebalance_reaches_the_new_owner, moving);

/// Each key has a release of its own, and partitions move meanwhile.
async fn moving(stage: Stage) -> Result<()> {
    const KEYS: usize = 40;
    let mut service = Service::native(poison()).await?;
    let first = worker(&stage, "first", &service)?.start().await?;
    let mut second = worker(&stage, "second", &service)?.prepare().await?;
    let asked = stage.sidecar("asked").start().await?;
    asked.apply(PARK).await?;
    first.wait_running(&["work"]).await?;
    let oracle = Load::new(stage.topic("in"), 2 * KEYS, KEYS).http(&asked).await?;
    asked.wait_status("all keys are parked", MINUTE, waits(KEYS as u64, 2 * KEYS as u64)).await?;
    service.set(Scenario::new()).await?;
    second.spawn()?;
    let mut released = 0;
    for key in 0..KEYS {
        if key == KEYS / 4 {
            // From here on it joins the group.
            second.wait_ready().await?;
        }
        released += release(&asked, "work", &["--key", &format!("k{key}")]).await?;
    }
    ensure!(second.log_text().contains("a command: release"), "it joined too late: this test proves nothing");
    asked.wait_status("both own partitions", MINUTE, |status| shared(status, "work")).await?;
    ensure!(released == KEYS as u64, "{released} of {KEYS} were released");
    asked.wait_status("nothing waits", MINUTE, waits(0, 0)).await?;
    all_went(&stage, &asked, "out", &oracle).await?;
    for sidecar in [first, second, asked] {
        sidecar.finish().await?;
    }
    Ok(())
}

on_kafka!(what_is_said_to_be_released_is_so_after_a_kill_9, killed);

/// The owner is killed as soon as it has answered, long before all is processed.
async fn killed(stage: Stage) -> Result<()> {
    const KEYS: usize = 200;
    let mut service = Service::native(poison()).await?;
    let mut owner = worker(&stage, "owner", &service)?.start().await?;
    let asked = stage.sidecar("asked").start().await?;
    asked.apply(PARK).await?;
    owner.wait_running(&["work"]).await?;
    let oracle = Load::new(stage.topic("in"), 2 * KEYS, KEYS).http(&asked).await?;
    asked.wait_status("all keys are parked", MINUTE, waits(KEYS as u64, 2 * KEYS as u64)).await?;
    service.set(Scenario::new().on("/work", [Rule::echo().after(Duration::from_millis(200))])).await?;
    ensure!(release(&asked, "work", &[]).await? == KEYS as u64);
    owner.kill9().await?;
    service.set(Scenario::new()).await?;
    owner.start().await?;
    owner.wait_status("nothing waits", MINUTE, |status| waits(0, 0)(status) && routes_of(status).any(|route| route.partitions > 0)).await?;
    let found = stage.read(&asked, None, &stage.topic("out"), oracle.len()).await?;
    oracle.judge(&sightings(&found)?).at_most(oracle.len())?;
    owner.finish().await?;
    asked.finish().await
}
