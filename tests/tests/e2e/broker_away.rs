//! A broker that goes away for 30 s and returns.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::RouteState;
use mesh_tests::{
    broker::Broker,
    kafka::{cluster, own_kafka, own_kafka_with},
    load::Load,
    oracle::{deliveries, sightings},
    ports::Port,
    proxy::Proxy,
    service::{Scenario, Service},
    sidecar::{disposition, routes_of},
    stage::Stage,
};

use crate::operate::{findings, has};

const MINUTE: Duration = Duration::from_secs(60);
const AWAY: Duration = Duration::from_secs(30);

/// It is waited for, visibly; nothing crashes, nothing is lost or skipped, and publishing is refused as something to try again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_goes_away_for_30_s_is_waited_for_and_nothing_is_lost() -> Result<()> {
    // Not the shared one: the others go on with that.
    let Some(kafka) = own_kafka().await else { return Ok(()) };
    Stage::run(Broker::Kafka(kafka.bootstrap().to_owned()), async |stage| {
        let service = Service::native(Scenario { headers: false, ..Scenario::new() }).await?;
        let mut sidecar = stage.sidecar("sidecar").service("work", &service).env("MESH_LIMITS_PUBLISH_TIMEOUT", "2s").start().await?;
        sidecar
            .apply(
                "
                topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
                routes:
                - { name: work, service: work, from: [%in], handler: /work, to: [%out] }
                ",
            )
            .await?;
        sidecar.wait_running(&["work"]).await?;
        let mut oracle = Load::new(stage.topic("in"), 500, 20).http(&sidecar).await?;
        sidecar.wait_status("done", MINUTE, |status| disposition(status, "work", "forwarded") == 500).await?;

        // Away in the middle of the work.
        let going = Load::new(stage.topic("in"), 2_000, 20).from(25).stubborn(sidecar.client(), tokio_util::sync::CancellationToken::new());
        let going = tokio::spawn(going);
        service.wait(800, MINUTE).await?;
        let kafka_stop = kafka.clone();
        tokio::task::spawn_blocking(move || kafka_stop.stop()).await??;
        let away = Instant::now();

        let answer = sidecar.client().post(&format!("/v1/topics/{}/records", stage.topic("in")), &[("mesh-key", "never")], "x").await?;
        ensure!(matches!(answer.status.as_u16(), 503 | 504), "{} {}", answer.status, answer.text());
        let problem = answer.json()?;
        ensure!(problem["retryable"] == true && ["no", "possibly"].iter().any(|word| problem["persisted"] == *word), "{problem}");
        sidecar.probes().get("/livez").await?.expect(200)?;
        sidecar
            .wait_status("waiting for the broker", MINUTE, |status| {
                status.instances.iter().any(|one| !one.waiting.is_empty())
                    || routes_of(status).any(|route| route.state() == RouteState::WaitingForBroker)
            })
            .await?;
        let shown = sidecar.ctl(&["status"]).await?.success()?;
        ensure!(shown.to_lowercase().contains("broker"), "mesh-ctl status does not say what is waited for:\n{shown}");
        sidecar.wait_probe("/readyz", 503, MINUTE).await?;

        // One that starts meanwhile begins with its copy of the table, and does not die.
        tokio::time::sleep(AWAY.saturating_sub(away.elapsed())).await;
        ensure!(sidecar.process()?.exited().is_none(), "it ended while the broker was away");
        let kafka_start = kafka.clone();
        tokio::task::spawn_blocking(move || kafka_start.start()).await??;
        sidecar.wait_ready().await?;

        let (more, unsure) = tokio::time::timeout(3 * MINUTE, going).await.context("the load")???;
        oracle.merge(more);
        ensure!(oracle.len() == 2_500, "{} of 2,500 records were acknowledged", oracle.len());
        // The one that was refused as `possibly` may be there: it states no identity and is left out.
        sidecar.wait_status("all forwarded", 2 * MINUTE, |status| disposition(status, "work", "forwarded") >= 2_500).await?;
        sidecar.wait_done(&["work"], MINUTE).await?;
        let mut found = stage.read(&sidecar, None, &stage.topic("out"), 2_500).await?;
        found.retain(|found| found.key_text() != "never");
        let answered = oracle.judge(&sightings(&found)?);
        println!("{} duplicate answers, {unsure} publishes repeated", answered.duplicates);
        // Nothing was killed: what repeats is what the publisher repeated, and what was at the service when its partition was lost.
        answered.at_most(unsure + 64 + 300)?;
        let mut ledger = service.ledger().await?;
        ledger.retain(|entry| entry.key.as_deref() != Some("never"));
        oracle.judge(&deliveries(&ledger)?).at_most(unsure + 64 + 300)?;
        let status = sidecar.status().await?;
        ensure!(disposition(&status, "work", "dead_lettered") == 0 && disposition(&status, "work", "expired") == 0, "{status:#?}");
        sidecar.finish().await
    })
    .await?;
    drop(kafka);
    Ok(())
}

/// A sidecar whose broker is down starts with its copy of the table, says what it waits for, and works once the broker is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_starts_without_its_broker_begins_with_its_copy_of_the_table() -> Result<()> {
    let Some(kafka) = own_kafka().await else { return Ok(()) };
    Stage::run(Broker::Kafka(kafka.bootstrap().to_owned()), async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let mut sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        sidecar
            .apply("{ topics: { %in: { partitions: 1 } }, routes: [{ name: work, service: work, from: [%in], handler: /work, to: void }] }")
            .await?;
        sidecar.wait_running(&["work"]).await?;
        sidecar.publish(&stage.topic("in"), None, "text/plain", "before").await?;
        service.wait(1, MINUTE).await?;
        sidecar.sigterm(MINUTE).await?;
        let stopped = kafka.clone();
        tokio::task::spawn_blocking(move || stopped.stop()).await??;

        sidecar.spawn()?;
        sidecar.wait_probe("/livez", 200, MINUTE).await?;
        let waiting = sidecar
            .wait_status("waiting for the broker with its copy of the table", MINUTE, |status| {
                status.instances.iter().any(|one| !one.waiting.is_empty() && one.generation == 1)
            })
            .await?;
        let got = sidecar.ctl(&["get", "-o", "json"]).await?.success()?;
        ensure!(got.contains("work"), "{got}");
        ensure!(waiting.instances.iter().any(|one| one.generation == 1), "{waiting:#?}");

        let started = kafka.clone();
        tokio::task::spawn_blocking(move || started.start()).await??;
        sidecar.wait_ready().await?;
        sidecar.publish(&stage.topic("in"), None, "text/plain", "after").await?;
        service.wait(2, MINUTE).await?;
        let texts: Vec<String> = service.ledger().await?.iter().map(mesh_tests::service::Entry::text).collect();
        ensure!(texts == ["before", "after"], "{texts:?}");
        sidecar.finish().await
    })
    .await?;
    drop(kafka);
    Ok(())
}

/// Partitions of which no replica is up (LEADER_NOT_AVAILABLE) are named and waited for; what the other brokers hold goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_without_a_leader_is_named_and_waited_for_while_others_go_on() -> Result<()> {
    let Some(cluster) = cluster(3).await else { return Ok(()) };
    Stage::run(Broker::Kafka(cluster.bootstrap()), async |stage| {
        let service = Service::native(Scenario { headers: false, ..Scenario::new() }).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).env("MESH_LIMITS_PUBLISH_TIMEOUT", "2s").start().await?;
        sidecar
            .apply(
                "
                topics:
                  %in: { partitions: 6, replication: 1 }
                  %out: { partitions: 6, replication: 3 }
                  %safe: { partitions: 3, replication: 3 }
                routes:
                - { name: work, service: work, from: [%in], handler: /work, to: [%out] }
                - { name: other, service: work, from: [%safe], handler: /other, to: void }
                ",
            )
            .await?;
        sidecar.wait_running(&["work", "other"]).await?;
        let mut oracle = Load::new(stage.topic("in"), 300, 30).http(&sidecar).await?;
        sidecar.wait_status("done", MINUTE, |status| disposition(status, "work", "forwarded") == 300).await?;

        cluster.stop(2, true).await?;
        let named = |text: &str| text.contains("LEADER_NOT_AVAILABLE") && text.contains(&stage.topic("in")) && text.contains("broker 3");
        let of = |status: &mesh_proto::v1::GetStatusResponse, name: &str| routes_of(status).find(|route| route.route == name).cloned();
        sidecar
            .wait_status("the partitions are named", 2 * MINUTE, |status| {
                of(status, "work").is_some_and(|route| route.state() == RouteState::WaitingForBroker && named(&route.reason))
                    && of(status, "other").is_some_and(|route| route.state() == RouteState::Running)
            })
            .await?;
        // Others are written and processed as before; a record for a partition that is away is refused as something to try again.
        let other = |status: &mesh_proto::v1::GetStatusResponse| disposition(status, "other", "void");
        sidecar.publish(&stage.topic("safe"), None, "text/plain", "meanwhile").await?;
        sidecar.wait_status("the other route goes on", MINUTE, |status| other(status) == 1).await?;
        let mut refused = Vec::new();
        for key in 0..12 {
            let key = format!("late-{key}");
            let answer = sidecar.client().post(&format!("/v1/topics/{}/records", stage.topic("in")), &[("mesh-key", &key)], "x").await?;
            if answer.status.as_u16() != 200 {
                ensure!(answer.status == 504 && answer.json()?["retryable"] == true, "{} {}", answer.status, answer.text());
                refused.push(answer.text());
            }
        }
        ensure!((1..12).contains(&refused.len()) && refused.iter().all(|text| named(text)), "{refused:?}");

        let going = Load::new(stage.topic("in"), 600, 30).from(10).stubborn(sidecar.client(), tokio_util::sync::CancellationToken::new());
        let going = tokio::spawn(going);
        cluster.start_again(2).await?;
        let (more, unsure) = tokio::time::timeout(3 * MINUTE, going).await.context("the load")???;
        oracle.merge(more);
        sidecar
            .wait_status("it runs again", MINUTE, |status| of(status, "work").is_some_and(|route| route.state() == RouteState::Running))
            .await?;
        sidecar.wait_done(&["work"], 2 * MINUTE).await?;
        let mut found = stage.read(&sidecar, None, &stage.topic("out"), oracle.len()).await?;
        found.retain(|found| !found.key_text().starts_with("late-"));
        oracle.judge(&sightings(&found)?).at_most(unsure + 64 + 300)?;
        sidecar.finish().await
    })
    .await
}

/// A broker that advertises an address that does not lead to it is named, and once it does, everything goes on by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_advertised_address_that_leads_nowhere_is_named_and_waited_for() -> Result<()> {
    let port = Port::take()?;
    let properties = format!("advertised.listeners=PLAINTEXT://{}\n", port.address());
    let Some(kafka) = own_kafka_with(properties).await else { return Ok(()) };
    let target = kafka.bootstrap().parse()?;
    Stage::run(Broker::Kafka(kafka.bootstrap().to_owned()), async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let mut sidecar = stage.sidecar("sidecar").service("work", &service).env("MESH_LIMITS_PUBLISH_TIMEOUT", "2s").prepare().await?;
        sidecar.spawn()?;
        sidecar.wait_probe("/livez", 200, MINUTE).await?;
        let address = port.address().to_string();
        let named = |text: &str| text.contains("advertised.listeners") && text.contains(&address);
        sidecar
            .wait_status("the address is named", MINUTE, |status| {
                status.instances.iter().any(|one| one.waiting.iter().any(|text| named(text)))
            })
            .await?;
        let answer = sidecar.client().post(&format!("/v1/topics/{}/records", stage.topic("in")), &[], "x").await?;
        // The address to begin with still answers now and then, and then says truly that there is no such topic.
        ensure!(answer.status == 404 || (answer.status == 503 && named(&answer.text())), "{} {}", answer.status, answer.text());

        // The doctor, too, and says what to correct.
        let said = sidecar.ctl(&["doctor", "-o", "json"]).await?.ends(1)?.json()?;
        let what = format!("it is advertised as {address}, and does not answer there");
        has(&said, ["brokers", "error", "broker 1", &what, "`advertised.listeners` names an address that cannot be reached from here"])?;

        let proxy = Proxy::start(port.address(), target).await?;
        sidecar.wait_ready().await?;
        let said = sidecar.ctl(&["doctor", "-o", "json"]).await?.json()?;
        ensure!(findings(&said, "brokers").count() == 0, "{said:#}");
        sidecar
            .apply("{ topics: { %in: { partitions: 1 } }, routes: [{ name: work, service: work, from: [%in], handler: /work, to: void }] }")
            .await?;
        sidecar.publish(&stage.topic("in"), None, "text/plain", "after").await?;
        service.wait(1, MINUTE).await?;
        sidecar.finish().await?;
        drop(proxy);
        Ok(())
    })
    .await?;
    drop(kafka);
    Ok(())
}
