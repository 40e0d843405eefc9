//! `mesh-ctl reset`: routes that are read from elsewhere, while they run and while they do not.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    broker::Broker,
    load::Load,
    on_both,
    oracle::deliveries,
    process::Output,
    python::python,
    service::{Entry, Rule, Scenario, Service},
    sidecar::{Sidecar, routes_of},
    stage::Stage,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const MINUTE: Duration = Duration::from_secs(60);
const ROUTE: &str = "
    topics: { %in: { partitions: 4 } }
    routes:
    - { name: work, service: work, from: [%in], handler: /work, to: void, concurrency: 8 }
    ";

/// Publishes records, and counts them by partition.
async fn publish(sidecar: &Sidecar, topic: &str, count: usize) -> Result<BTreeMap<i64, i64>> {
    let mut counts = BTreeMap::new();
    for number in 0..count {
        let body = json!({ "k": format!("k{}", number % 40), "n": number / 40 }).to_string();
        let at = sidecar.publish(topic, Some(&format!("k{}", number % 40)), "application/json", body).await?;
        *counts.entry(at["partition"].as_i64().context("partition")?).or_default() += 1;
    }
    Ok(counts)
}

fn place(entry: &Entry) -> (i64, i64) {
    (entry.partition.into(), entry.offset)
}

async fn reset(sidecar: &Sidecar, arguments: &[&str]) -> Result<Output> {
    sidecar.ctl(&[&["reset", "work"], arguments].concat()).await
}

fn sum(said: &Value, field: &str) -> u64 {
    said["partitions"].as_array().into_iter().flatten().filter_map(|partition| partition[field].as_u64()).sum()
}

/// The committed offsets, as `mesh-ctl` shows them.
async fn committed(sidecar: &Sidecar) -> Result<Vec<i64>> {
    let said = reset(sidecar, &["--to-earliest", "-o", "json"]).await?.json()?;
    Ok(said["partitions"].as_array().into_iter().flatten().map(|one| one["from"].as_i64().unwrap_or(-1)).collect())
}

/// Waits until everything is committed. What other instances report of their lag comes every half minute only.
async fn settled(sidecar: &Sidecar) -> Result<()> {
    let end = Instant::now() + MINUTE;
    loop {
        let said = reset(sidecar, &["--to-latest", "-o", "json"]).await?.json()?;
        let mut partitions = said["partitions"].as_array().into_iter().flatten();
        if partitions.all(|one| one["from"] == one["high"]) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "not all is committed: {said}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The places that are delivered when a reset is carried out, and nothing but them.
async fn delivered_again(service: &Service, sidecar: &Sidecar, arguments: &[&str]) -> Result<(Output, Vec<(i64, i64)>)> {
    let before = service.total().await?;
    let dry = reset(sidecar, &[arguments, &["-o", "json"]].concat()).await?.json()?;
    ensure!(dry["executed"] == json!(false), "{dry}");
    ensure!(service.total().await? == before, "a dry run delivered something");
    let said = reset(sidecar, &[arguments, &["--execute"]].concat()).await?;
    said.clone().success()?;
    service.wait(before + sum(&dry, "again"), MINUTE).await?;
    settled(sidecar).await?;
    let ledger = service.ledger_of("/work").await?;
    let mut places: Vec<_> = ledger.iter().skip(usize::try_from(before)?).map(place).collect();
    places.sort_unstable();
    Ok((said, places))
}

on_both!(a_reset_delivers_again_what_was_asked_for_and_nothing_else, forms);

async fn forms(stage: Stage) -> Result<()> {
    let mut service = Service::native(Scenario::new()).await?;
    let mut sidecars = vec![stage.sidecar("first").service("work", &service).start().await?];
    if stage.is_kafka() {
        sidecars.push(stage.sidecar("second").service("work", &service).start().await?);
        // Asked is one that owns nothing: the owners are reached through it.
        sidecars.push(stage.sidecar("asked").start().await?);
    }
    let asked = sidecars.last().context("a sidecar")?;
    asked.apply(ROUTE).await?;
    asked
        .wait_status("all have partitions", MINUTE, |status| {
            routes_of(status).filter(|route| route.route == "work").map(|route| route.partitions).sum::<u32>() == 4
        })
        .await?;
    let topic = stage.topic("in");
    let counts = publish(asked, &topic, 200).await?;
    let high = |partition: i64| counts.get(&partition).copied().unwrap_or(0);
    service.wait(200, MINUTE).await?;
    settled(asked).await?;
    let before = committed(asked).await?;
    ensure!(before == (0..4).map(high).collect::<Vec<_>>(), "{before:?} {counts:?}");

    let target = format!("0={}", high(0) - 3);
    let (_, places) = delivered_again(&service, asked, &["--to-offset", &target]).await?;
    ensure!(places == [(0, high(0) - 3), (0, high(0) - 2), (0, high(0) - 1)], "{places:?}");
    let (_, places) = delivered_again(&service, asked, &["--shift-by", "-2", "--partition", "1"]).await?;
    ensure!(places == [(1, high(1) - 2), (1, high(1) - 1)], "{places:?}");
    let (_, places) = delivered_again(&service, asked, &["--to-earliest", "--partition", "2", "--topic", &topic]).await?;
    ensure!(places == (0..high(2)).map(|offset| (2, offset)).collect::<Vec<_>>(), "{places:?}");
    let (_, places) = delivered_again(&service, asked, &["--to-offset", "1"]).await?;
    ensure!(places.len() as i64 == 196 && places.iter().all(|(_, offset)| *offset > 0), "one offset for all partitions: {places:?}");

    // By time, to the record: those from here on. Without a zone it is UTC, and it says so.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let now = std::time::SystemTime::now();
    let without_zone = humantime::format_rfc3339_millis(now).to_string();
    let without_zone = without_zone.trim_end_matches('Z');
    publish(asked, &topic, 10).await?;
    service.wait(service.total().await?, MINUTE).await?;
    settled(asked).await?;
    let (said, places) = delivered_again(&service, asked, &["--to-datetime", without_zone]).await?;
    ensure!(places.len() == 10 && places.iter().all(|(partition, offset)| *offset >= high(*partition)), "{places:?}");
    ensure!(said.stdout.contains("no zone was named"), "{}", said.stdout);

    // Back to a copy of the offsets.
    let backup = stage.folder().join("before.csv");
    let backup = backup.to_str().context("a path")?;
    let (_, _) = delivered_again(&service, asked, &["--shift-by", "-1", "--backup", backup]).await?;
    let (_, places) = delivered_again(&service, asked, &["--from-file", backup]).await?;
    ensure!(places.is_empty(), "the file holds where it was: {places:?}");

    // What waits for a service that is away is skipped.
    let ended = committed(asked).await?;
    service.set(Scenario::new().on("/work", [Rule::status(503)])).await?;
    publish(asked, &topic, 20).await?;
    service.wait(service.total().await? + 1, MINUTE).await?;
    reset(asked, &["--to-latest", "--execute"]).await?.success()?;
    let skipped = committed(asked).await?;
    ensure!(skipped.iter().sum::<i64>() - ended.iter().sum::<i64>() == 20, "{ended:?} became {skipped:?}");
    service.set(Scenario::new()).await?;
    service.reset().await?;
    publish(asked, &topic, 1).await?;
    settled(asked).await?;
    let of = |offsets: &[i64], partition: i64| usize::try_from(partition).ok().and_then(|index| offsets.get(index).copied()).unwrap_or(0);
    let places: Vec<_> = service.ledger_of("/work").await?.iter().map(place).collect();
    let wrong = places.iter().filter(|(partition, offset)| (of(&ended, *partition)..of(&skipped, *partition)).contains(offset)).count();
    ensure!(wrong == 0, "{wrong} skipped records were delivered");
    ensure!(places.iter().filter(|(partition, offset)| *offset >= of(&skipped, *partition)).count() == 1, "{places:?}");

    // A foreign client sees the same offsets.
    if stage.is_kafka()
        && let Some(python) = python().await?
    {
        reset(asked, &["--to-offset", "2=5", "--execute"]).await?.success()?;
        settled(asked).await?;
        let should = committed(asked).await?;
        let group = format!("{}.work", stage.mesh());
        let found: Value =
            serde_json::from_str(&stage.kafka_client(&python, &topic, &["committed", "--group", &group], String::new()).await?)?;
        for (partition, offset) in should.iter().enumerate() {
            ensure!(found[partition.to_string()] == json!(offset), "{found} instead of {should:?}");
        }
    }
    refusals(asked).await?;
    for sidecar in sidecars {
        sidecar.finish().await?;
    }
    Ok(())
}

/// What is unsafe is refused by name, and nothing at all is changed.
async fn refusals(asked: &Sidecar) -> Result<()> {
    let before = committed(asked).await?;
    for (arguments, code, said) in [
        (&["--to-offset", "0=1,1=999999", "--execute"][..], 1, "the range is 0 to"),
        (&["--to-offset", "0=1,9=1", "--execute"], 2, "/9 is no partition"),
        (&["--to-offset", "0=1,0=2", "--execute"], 2, "named twice"),
        (&["--to-earliest", "--topic", "other", "--execute"], 2, "is no source of route work"),
        (&["--to-earliest", "--to-latest"], 2, "cannot be used with"),
        (&["--execute"], 2, "--to-earliest"),
        (&["--to-datetime", "yesterday"], 2, "none means UTC"),
        (&["--from-file", "/nowhere", "--execute"], 2, "/nowhere cannot be read"),
    ] {
        let output = reset(asked, arguments).await?;
        ensure!(output.status == Some(code) && output.stderr.contains(said), "{arguments:?}: {output:?}");
    }
    let unknown = asked.ctl(&["reset", "wrok", "--to-earliest"]).await?;
    ensure!(unknown.status == Some(2) && unknown.stderr.contains("it has: work"), "{unknown:?}");
    ensure!(committed(asked).await? == before, "a refused reset changed something");
    Ok(())
}

on_both!(a_route_that_nobody_runs_is_reset_while_its_group_is_empty, nobody_runs);

async fn nobody_runs(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let asked = stage.sidecar("asked").start().await?;
    asked.apply(ROUTE).await?;
    let counts = publish(&asked, &stage.topic("in"), 60).await?;
    let shift = reset(&asked, &["--shift-by", "-1", "--execute"]).await?;
    ensure!(shift.status == Some(1) && shift.stderr.contains("nothing is committed there yet"), "{shift:?}");
    let said = reset(&asked, &["--to-offset", "3", "--execute"]).await?.success()?;
    ensure!(said.matches("done by client-").count() == 4, "{said}");
    asked.finish().await?;
    let worker = stage.sidecar("worker").service("work", &service).start().await?;
    worker.wait_running(&["work"]).await?;
    let due = counts.values().sum::<i64>() - 12;
    service.wait(u64::try_from(due)?, MINUTE).await?;
    settled(&worker).await?;
    let ledger = service.ledger_of("/work").await?;
    let places: Vec<_> = ledger.iter().map(place).collect();
    ensure!(places.len() as i64 == due && places.iter().all(|(_, offset)| *offset >= 3), "{places:?}");
    worker.finish().await
}

/// Partitions move while they are reset, and records keep coming: nothing is lost, and every reset is carried out by somebody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_in_the_middle_of_a_rebalance_reaches_the_new_owner() -> Result<()> {
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let slow = Scenario { headers: false, ..Scenario::new() }.on("/work", [Rule::echo().after(Duration::from_millis(5))]);
        let service = Service::native(slow).await?;
        let mut first = stage.sidecar("first").service("work", &service).start().await?;
        let mut second = stage.sidecar("second").service("work", &service).prepare().await?;
        let asked = stage.sidecar("asked").start().await?;
        asked.apply(ROUTE).await?;
        first.wait_running(&["work"]).await?;
        let stop = CancellationToken::new();
        let publishing = tokio::spawn(Load::new(stage.topic("in"), 1_000_000, 100).stubborn(asked.client(), stop.clone()));
        service.wait(300, MINUTE).await?;
        let resets = async {
            for _ in 0..6 {
                let said = reset(&asked, &["--shift-by", "-5", "--execute"]).await?;
                ensure!(said.stdout.matches("done by").count() == 4, "{said:?}");
                said.success()?;
            }
            Ok(())
        };
        let moves = async {
            second.start().await?;
            second.wait_running(&["work"]).await?;
            first.sigterm(MINUTE).await?;
            Ok(())
        };
        tokio::try_join!(resets, moves)?;
        reset(&asked, &["--shift-by", "-5", "--execute"]).await?.success()?;
        stop.cancel();
        let (oracle, unsure) = publishing.await??;
        ensure!(unsure == 0, "{unsure} publishes failed");
        settled(&asked).await?;
        let verdict = oracle.judge(&deliveries(&service.ledger().await?)?);
        ensure!(verdict.lost.is_empty(), "lost: {:?}", verdict.lost);
        second.finish().await?;
        asked.finish().await
    })
    .await
}

/// An owner that stands still is named; once the group has moved on, its partitions are reset by their new owner, and the one that wakes up
/// late does nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_owner_is_named_in_the_timeout() -> Result<()> {
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let first = stage.sidecar("first").service("work", &service).start().await?;
        first.apply(ROUTE).await?;
        let mut second = stage.sidecar("second").instance("silent").service("work", &service).start().await?;
        let both = |status: &mesh_proto::v1::GetStatusResponse| {
            routes_of(status).filter(|route| route.route == "work" && route.partitions == 2).count() == 2
        };
        first.wait_status("both own partitions", MINUTE, both).await?;
        publish(&first, &stage.topic("in"), 80).await?;
        service.wait(80, MINUTE).await?;
        settled(&first).await?;
        let silent = format!("{}-silent", stage.mesh());
        second.process()?.signal(Signal::STOP)?;
        let said = reset(&first, &["--shift-by", "-1", "--execute", "--timeout", "3s"]).await?;
        ensure!(said.status == Some(4) && said.stderr.contains(&silent), "{said:?}");
        ensure!(said.stdout.matches("done by").count() == 2 && said.stdout.matches("UNCLEAR").count() == 2, "{said:?}");
        let said = reset(&first, &["--to-earliest", "--execute", "--timeout", "50s"]).await?;
        ensure!(said.status == Some(0) && said.stdout.matches("done by").count() == 4, "{said:?}");
        service.wait(80 + 2 + 80, MINUTE).await?;
        second.process()?.signal(Signal::CONT)?;
        first.wait_status("both own partitions again", MINUTE, both).await?;
        settled(&first).await?;
        let late = service.wait_at_most(80 + 2 + 80, Duration::from_millis(500)).await?;
        ensure!(late <= 162, "{late} deliveries: a command that came too late was obeyed");
        second.finish().await?;
        first.finish().await
    })
    .await
}
