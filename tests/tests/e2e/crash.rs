//! `kill -9` and `SIGTERM` in the middle of the work.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    broker::Broker,
    full,
    load::Load,
    on_both,
    oracle::{Oracle, deliveries, sightings},
    python::python,
    service::{Rule, Scenario, Service},
    sidecar::{Builder, Sidecar, disposition, routes_of},
    stage::Stage,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const MINUTE: Duration = Duration::from_secs(60);
const CONCURRENCY: usize = 64;
/// Records that may complete between two commits: these run back to back, about 6 ms each.
const BETWEEN_COMMITS: usize = 300;
const ROUTE: &str = "
    topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
    routes:
    - { name: work, service: work, from: [%in], handler: /work, to: [%out], concurrency: 64 }
    ";

/// `instance` set: the member comes back as the same. A build without optimisation, which starts slowly, gets a second more.
const STATIC: Duration = Duration::from_secs(if cfg!(debug_assertions) { 2 } else { 1 });
/// Without `instance`: the dead member's session must end first.
const DYNAMIC: Duration = Duration::from_secs(15);

on_both!(kill_9_three_times_with_an_instance_name_loses_nothing_and_goes_on_within_a_second, kill_with_instance);
on_both!(kill_9_three_times_without_an_instance_name_loses_nothing_and_goes_on_within_15_s, kill_without_instance);

async fn kill_with_instance(stage: Stage) -> Result<()> {
    let builder = stage.sidecar("sidecar").instance("work-0");
    kill_three_times(stage, builder, STATIC).await
}

async fn kill_without_instance(stage: Stage) -> Result<()> {
    let builder = stage.sidecar("sidecar");
    // The embedded broker's groups end with the process.
    let limit = if stage.is_kafka() { DYNAMIC } else { STATIC };
    kill_three_times(stage, builder, limit).await
}

async fn kill_three_times(stage: Stage, builder: Builder, limit: Duration) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let records = if full() { 20_000 } else { 4_000 };
    let service = stage.fastapi(&python, Scenario { headers: false, ..Scenario::new() }).await?;
    let mut sidecar = builder.service("work", &service).start().await?;
    sidecar.apply(ROUTE).await?;
    sidecar.wait_running(&["work"]).await?;

    // The load goes on over the kills, and publishes again what was not acknowledged.
    let load = Load::new(stage.topic("in"), records, 100);
    let publishing = tokio::spawn(load.stubborn(sidecar.client(), CancellationToken::new()));
    let mut kills = Vec::new();
    for kill in 1..=3 {
        service.wait((records * kill / 4) as u64, 2 * MINUTE).await?;
        sidecar.kill9().await?;
        // What lies in the service's sockets still comes.
        let before = service.wait_at_most(u64::MAX, Duration::from_millis(50)).await?;
        let restart = Instant::now();
        sidecar.spawn()?;
        service.wait(before + 1, MINUTE).await.context("the next record after the kill")?;
        kills.push(restart.elapsed());
    }
    println!("the next record flowed after {kills:.2?}");
    sidecar.wait_ready().await?;
    let (oracle, unsure) = publishing.await??;
    ensure!(oracle.len() == records, "{} of {records} records were acknowledged", oracle.len());
    sidecar.wait_done(&["work"], 2 * MINUTE).await?;

    let duplicates = 3 * (CONCURRENCY + BETWEEN_COMMITS) + unsure;
    let delivered = oracle.judge(&deliveries(&service.ledger().await?)?);
    println!("{} duplicate deliveries, {unsure} publishes repeated", delivered.duplicates);
    delivered.at_most(duplicates).context("deliveries")?;
    let found = stage.read(&sidecar, Some(&python), &stage.topic("out"), records).await?;
    let answered = oracle.judge(&sightings(&found)?);
    println!("{} duplicate answers", answered.duplicates);
    answered.at_most(duplicates).context("answers")?;
    for (number, time) in kills.iter().enumerate() {
        ensure!(*time <= limit, "the next record flowed {time:.2?} after the restart of kill {}, where {limit:?} are allowed", number + 1);
    }
    sidecar.finish().await
}

/// An acknowledgement is a promise: what the embedded broker acknowledged is there after `kill -9`, even before any consumer saw it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_publish_survives_kill_9() -> Result<()> {
    Stage::run(Broker::Embedded, async |stage| {
        let mut sidecar = stage.sidecar("sidecar").start().await?;
        let topic = stage.topic("in");
        let mut oracle = Oracle::default();
        for round in 0..3 {
            let stop = CancellationToken::new();
            let load = Load { connections: 8, ..Load::new(&topic, 100_000, 50).from(round * 100_000) };
            let publishing = tokio::spawn(load.stubborn(sidecar.client(), stop.clone()));
            tokio::time::sleep(Duration::from_millis(700)).await;
            sidecar.kill9().await?;
            stop.cancel();
            oracle.merge(publishing.await??.0);
            sidecar.start().await?;
        }
        ensure!(oracle.len() > 100, "only {} records were acknowledged", oracle.len());
        let found = stage.read(&sidecar, None, &topic, oracle.len()).await?;
        oracle.judge(&sightings(&found)?).exactly_once()?;
        sidecar.finish().await
    })
    .await
}

on_both!(sigterm_under_load_drains_so_that_a_restart_repeats_nothing, restarts);

/// Restarts in good order under load: nothing is lost, and nothing is delivered twice.
async fn restarts(stage: Stage) -> Result<()> {
    let service =
        Service::native(Scenario { headers: false, ..Scenario::new() }.on("/work", [Rule::echo().after(Duration::from_millis(20))]))
            .await?;
    let mut sidecar = stage.sidecar("sidecar").instance("work-0").service("work", &service).start().await?;
    sidecar.apply(ROUTE).await?;
    sidecar.wait_running(&["work"]).await?;
    let records = 2_000;
    let publishing = tokio::spawn(Load::new(stage.topic("in"), records, 100).stubborn(sidecar.client(), CancellationToken::new()));
    for restart in 1..=2 {
        service.wait((records * restart / 3) as u64, MINUTE).await?;
        let status = sidecar.sigterm(Duration::from_secs(20)).await?;
        ensure!(status.success(), "ended with {status} after SIGTERM");
        sidecar.start().await?;
    }
    let (oracle, unsure) = publishing.await??;
    sidecar.wait_done(&["work"], MINUTE).await?;
    // A kept connection may be closed in the moment in which it is used again: once for each connection and restart, and no more.
    ensure!(unsure <= 8, "{unsure} publishes were cut off: the API must answer what it took");
    oracle.judge(&deliveries(&service.ledger().await?)?).at_most(unsure).context("deliveries")?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), records).await?;
    oracle.judge(&sightings(&found)?).at_most(unsure).context("answers")?;
    sidecar.finish().await
}

on_both!(a_drain_under_its_deadline_leaves_what_hangs_uncommitted_and_dead_letters_nothing, hanging_drain);

async fn hanging_drain(stage: Stage) -> Result<()> {
    let mut service = Service::native(Scenario::new().on("/work", [Rule::echo().hang()])).await?;
    let mut sidecar =
        stage.sidecar("sidecar").instance("work-0").service("work", &service).env("MESH_LIMITS_DRAIN_TIMEOUT", "2s").start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 1 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: void, timeout: 60s, retry: { attempts: 1 } }
            ",
        )
        .await?;
    sidecar.publish(&stage.topic("in"), Some("k"), "application/json", json!({ "k": "k", "n": 0 }).to_string()).await?;
    service.wait(1, MINUTE).await?;
    let begin = Instant::now();
    sidecar.sigterm(Duration::from_secs(15)).await?;
    ensure!(begin.elapsed() < Duration::from_secs(10), "the drain took {:?} where its deadline is 2 s", begin.elapsed());
    service.set(Scenario::new()).await?;
    sidecar.start().await?;
    service.wait(2, MINUTE).await?;
    sidecar.wait_status("done", MINUTE, |status| disposition(status, "work", "void") == 1).await?;
    let status = sidecar.status().await?;
    ensure!(disposition(&status, "work", "dead_lettered") == 0, "{status:#?}");
    sidecar.finish().await
}

/// A second sidecar of the service `work` comes and the first one goes, while records are published and answered. Gives the second, the one
/// that published, what was acknowledged, and how many publishes are in doubt.
pub(crate) async fn hand_over_under_load(stage: &Stage, service: &Service, route: &str) -> Result<(Sidecar, Sidecar, Oracle, usize)> {
    let mut first = stage.sidecar("first").service("work", service).start().await?;
    let mut second = stage.sidecar("second").service("work", service).prepare().await?;
    let publisher = stage.sidecar("publisher").start().await?;
    publisher.apply(route).await?;
    first.wait_running(&["work"]).await?;
    // The load lasts as long as all of it.
    let stop = CancellationToken::new();
    let load = Load { connections: 8, ..Load::new(stage.topic("in"), 1_000_000, 100) };
    let publishing = tokio::spawn(load.stubborn(publisher.client(), stop.clone()));
    service.wait(500, MINUTE).await?;
    second.start().await?;
    second
        .wait_status("both work", MINUTE, |status| {
            routes_of(status).filter(|route| route.route == "work" && route.partitions > 0).count() == 2
        })
        .await?;
    service.wait(service.total().await? + 500, MINUTE).await?;
    first.sigterm(MINUTE).await?;
    second
        .wait_status("the second has all", MINUTE, |status| routes_of(status).any(|route| route.route == "work" && route.partitions == 4))
        .await?;
    service.wait(service.total().await? + 500, MINUTE).await?;
    stop.cancel();
    let (oracle, unsure) = publishing.await??;
    Ok((second, publisher, oracle, unsure))
}

/// Partitions are handed over drained and committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalance_under_load_loses_and_repeats_nothing() -> Result<()> {
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let service =
            Service::native(Scenario { headers: false, ..Scenario::new() }.on("/work", [Rule::echo().after(Duration::from_millis(10))]))
                .await?;
        let (second, publisher, oracle, unsure) = hand_over_under_load(&stage, &service, ROUTE).await?;
        ensure!(unsure == 0, "{unsure} publishes failed, where the publisher's sidecar was left alone");
        let found = stage.read(&publisher, None, &stage.topic("out"), oracle.len()).await?;
        oracle.judge(&sightings(&found)?).exactly_once().context("answers")?;
        oracle.judge(&deliveries(&service.ledger().await?)?).exactly_once().context("deliveries")?;
        second.finish().await?;
        publisher.finish().await
    })
    .await
}
