//! A mesh of five sidecars through its first day, by `mesh-ctl` alone: what docs/first-day.md tells.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    broker::Broker,
    full,
    load::Load,
    oracle::{Oracle, sightings},
    python::{Python, python},
    service::{Condition, Rule, Scenario, Service},
    sidecar::{Mesh, disposition},
    stage::Stage,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const MINUTE: Duration = Duration::from_secs(60);

const ONE: &str = "
    topics: { %orders: { partitions: 4 }, %priced: { partitions: 4 }, %checked: { partitions: 4 }, %parcels: { partitions: 4 } }
    routes:
    - { name: price, service: pricing, from: [%orders], handler: /price, to: [%priced] }
    - { name: check, service: fraud, from: [%priced], handler: /check, to: [%checked] }
    - { name: ship, service: shipping, from: [%checked], handler: /ship, to: [%parcels] }
    ";
/// With a step more, behind the first one.
const TWO: &str = "
    topics: { %orders: { partitions: 4 }, %raw: { partitions: 4 }, %priced: { partitions: 4 }, %checked: { partitions: 4 }, %parcels: { partitions: 4 } }
    routes:
    - { name: price, service: pricing, from: [%orders], handler: /price, to: [%raw] }
    - { name: discount, service: discounts, from: [%raw], handler: /discount, to: [%priced] }
    - { name: check, service: fraud, from: [%priced], handler: /check, to: [%checked] }
    - { name: ship, service: shipping, from: [%checked], handler: /ship, to: [%parcels] }
    ";

/// Publishes so many records a second until it is told to stop.
async fn paced(mesh: Mesh, topic: &str, rate: usize, stop: &CancellationToken) -> Result<Oracle> {
    let (mut oracle, mut ticks) = (Oracle::default(), tokio::time::interval(Duration::from_millis(100)));
    for number in 0.. {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            _ = ticks.tick() => oracle.merge(Load::new(topic, rate / 10, rate / 10).from(number).grpc(mesh.clone()).await?),
        }
    }
    Ok(oracle)
}

/// Wired, changed under load, changed back, a poison record found and sent again, a route reset by time: nothing lost, repeated or reordered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_is_changed_under_load_and_mended() -> Result<()> {
    let (Some(broker), Some(python)) = (Broker::kafka().await?, python().await?) else { return Ok(()) };
    Stage::run(broker, |stage| first_day(stage, python)).await
}

async fn first_day(stage: Stage, python: Python) -> Result<()> {
    let rate = if full() { 2_000 } else { 200 };
    let poisoned = Condition { field_equals: Some(("k".into(), json!("poison"))), ..Condition::default() };
    let careless = Scenario::light().on("/check", [Rule::status(400).text("no such order").when(poisoned), Rule::echo()]);
    let (pricing, mut fraud, shipping) =
        (Service::native(Scenario::light()).await?, Service::native(careless).await?, Service::native(Scenario::light()).await?);
    let mut sidecars = Vec::new();
    for (name, service) in
        [("pricing", &pricing), ("pricing", &pricing), ("fraud", &fraud), ("shipping", &shipping), ("shipping", &shipping)]
    {
        let mut builder = stage.sidecar(&format!("{name}-{}", sidecars.len())).service(name, service);
        if name == "fraud" {
            builder = builder.service("discounts", service);
        }
        sidecars.push(builder.start().await?);
    }
    let asked = sidecars.last().context("a sidecar")?;
    let ctl = async |arguments: &[&str]| asked.ctl(arguments).await?.success();
    let file = |name: &str, spec: &str| anyhow::Ok(stage.file(name, &stage.table(spec))?.to_string_lossy().into_owned());
    let (one, two) = (file("one.yaml", ONE)?, file("two.yaml", TWO)?);
    ctl(&["apply", "-f", &one, "--wait"]).await?;
    asked.wait_running(&["price", "check", "ship"]).await?;

    let (stop, some) = (CancellationToken::new(), rate as u64);
    let mut poison_at = SystemTime::UNIX_EPOCH;
    let work = async {
        let shipped =
            async |count: u64| asked.wait_status("shipped", MINUTE, |status| disposition(status, "ship", "forwarded") >= count).await;
        shipped(some).await?;
        ctl(&["apply", "-f", &two, "--wait"]).await?;
        asked.wait_status("the new step works", MINUTE, |status| disposition(status, "discount", "forwarded") >= some).await?;
        // Taken out again: when nothing is on its way through it, so that nothing overtakes what is.
        ctl(&["pause", "price", "--reason", "the new step goes", "--wait"]).await?;
        asked.wait_done(&["discount"], MINUTE).await?;
        ctl(&["rollback", "1", "--wait"]).await?;
        ctl(&["resume", "price"]).await?;
        let before = disposition(&asked.status().await?, "ship", "forwarded");
        shipped(before + some).await?;

        poison_at = SystemTime::now();
        asked.publish(&stage.topic("orders"), Some("poison"), "application/json", json!({ "k": "poison", "n": 0 }).to_string()).await?;
        asked.wait_status("the poison is set aside", MINUTE, |status| disposition(status, "check", "dead_lettered") == 1).await?;
        let listed = ctl(&["dlq", "list", "check"]).await?;
        ensure!(listed.contains("status 1"), "{listed}");
        let shown = ctl(&["dlq", "show", "check"]).await?;
        ensure!(shown.contains("poison") && shown.contains("400") && shown.contains("no such order"), "{shown}");
        fraud.set(Scenario::light()).await?;
        ctl(&["dlq", "redrive", "check", "--execute"]).await?;
        stop.cancel();
        anyhow::Ok(())
    };
    let orders = stage.topic("orders");
    let (mut oracle, ()) = tokio::try_join!(paced(asked.mesh().await?, &orders, rate, &stop), work)?;
    oracle.acknowledge("poison", 0);
    asked.wait_status("all is shipped", 2 * MINUTE, |status| disposition(status, "ship", "forwarded") >= oracle.len() as u64).await?;
    asked.wait_done(&["price", "check", "ship"], MINUTE).await?;
    let found = stage.read(asked, Some(&python), &stage.topic("parcels"), oracle.len()).await?;
    oracle.judge(&sightings(&found)?).exactly_once().context("parcels")?;

    let when = humantime::format_rfc3339_millis(poison_at).to_string();
    let dry = asked.ctl(&["reset", "ship", "--to-datetime", &when, "-o", "json"]).await?.json()?;
    let again: u64 = dry["partitions"].as_array().into_iter().flatten().filter_map(|partition| partition["again"].as_u64()).sum();
    ensure!(again > 0, "{dry:#}");
    let before = shipping.total().await?;
    ctl(&["reset", "ship", "--to-datetime", &when, "--execute"]).await?;
    shipping.wait(before + again, MINUTE).await?;
    asked.wait_done(&["ship"], MINUTE).await?;
    let begin = Instant::now();
    loop {
        let lag = asked.ctl(&["lag", "-o", "json"]).await?.json()?;
        let left: Vec<_> = lag["groups"].as_array().into_iter().flatten().map(|route| route["lag_records"].as_u64()).collect();
        if left == [Some(0); 3] {
            break;
        }
        ensure!(begin.elapsed() < MINUTE, "the lag does not fall: {lag:#}");
    }
    for sidecar in sidecars {
        sidecar.finish().await?;
    }
    Ok(())
}
