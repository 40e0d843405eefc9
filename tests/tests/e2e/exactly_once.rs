//! `guarantee: exactly_once`: a reader of committed records sees each answer once, whatever dies.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::GetStatusResponse;
use mesh_tests::{
    broker::Broker,
    full,
    kafka::own_kafka,
    load::Load,
    mesh::Found,
    on_both,
    python::{Python, python},
    service::{Condition, Rule, Scenario, Service},
    sidecar::{Sidecar, disposition, routes_of},
    stage::Stage,
};
use rustix::process::Signal;
use serde_json::json;
use tokio_util::sync::CancellationToken;

const MINUTE: Duration = Duration::from_secs(60);
const ROUTE: &str = "
    topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
    routes:
    - { name: work, service: work, from: [%in], handler: /work, to: [%out], concurrency: 64, guarantee: exactly_once }
    ";

fn echo(delay: u64) -> Scenario {
    Scenario { headers: false, ..Scenario::new() }.on("/work", [Rule::echo().after(Duration::from_millis(delay))])
}

/// How often each record is there; a publisher that was not answered publishes again, so a source may be there twice.
fn count(found: &[Found]) -> BTreeMap<(String, i64), usize> {
    let mut count = BTreeMap::new();
    for one in found {
        *count.entry((one.key_text(), one.json()["n"].as_i64().unwrap_or(-1))).or_default() += 1;
    }
    count
}

/// Every record of `in` has its answer in `out` once, and nothing else is there; the answers of a key are in the order of their sources.
async fn judge(stage: &Stage, sidecar: &Sidecar, python: Option<&Python>, at_least: usize) -> Result<()> {
    let sources = stage.read(sidecar, None, &stage.topic("in"), at_least).await?;
    let answers = stage.read_committed(sidecar, python, &stage.topic("out"), sources.len()).await?;
    let (should, is) = (count(&sources), count(&answers));
    let differs = |more: &BTreeMap<(String, i64), usize>, less: &BTreeMap<(String, i64), usize>| {
        more.iter().filter(|(record, count)| less.get(*record).is_none_or(|other| other < *count)).count()
    };
    let (twice, missing) = (differs(&is, &should), differs(&should, &is));
    println!("{} sources, {} answers: {twice} too often, {missing} missing", sources.len(), answers.len());
    ensure!(twice == 0, "{twice} of {} answers are there too often", should.len());
    ensure!(missing == 0, "{missing} of {} answers are missing", should.len());
    for key in should.keys().map(|(key, _)| key).collect::<BTreeSet<_>>() {
        let order = |found: &[Found]| {
            let mut of_key: Vec<_> = found.iter().filter(|one| one.key_text() == *key).collect();
            of_key.sort_by_key(|one| one.offset);
            of_key.iter().map(|one| one.json()["n"].clone()).collect::<Vec<_>>()
        };
        ensure!(order(&sources) == order(&answers), "the answers of key {key} are not in the order of their sources");
    }
    Ok(())
}

on_both!(kill_9_three_times_under_load_shows_each_answer_once, kill_with_instance);

async fn kill_with_instance(stage: Stage) -> Result<()> {
    kill_three_times(stage, true).await
}

/// Nobody can take the transactions of a process without a name: they end by their time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_without_an_instance_name_shows_each_answer_once() -> Result<()> {
    match Broker::kafka().await? {
        Some(broker) if full() => Stage::run(broker, |stage| kill_three_times(stage, false)).await,
        _ => Ok(()),
    }
}

async fn kill_three_times(stage: Stage, named: bool) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let records = if full() { 20_000 } else { 4_000 };
    let service = Service::native(echo(2)).await?;
    let builder = stage.sidecar("sidecar").service("work", &service);
    let mut sidecar = if named { builder.instance("work-0") } else { builder }.start().await?;
    sidecar.apply(ROUTE).await?;
    sidecar.wait_running(&["work"]).await?;
    let publishing = tokio::spawn(Load::new(stage.topic("in"), records, 100).stubborn(sidecar.client(), CancellationToken::new()));
    for kill in 1..=3 {
        service.wait((records * kill / 4) as u64, 2 * MINUTE).await?;
        sidecar.kill9().await?;
        sidecar.start().await?;
    }
    let (oracle, _) = publishing.await??;
    ensure!(oracle.len() == records, "{} of {records} records were acknowledged", oracle.len());
    sidecar.wait_done(&["work"], 2 * MINUTE).await?;
    judge(&stage, &sidecar, Some(&python), records).await?;
    sidecar.finish().await
}

/// A sidecar that stood still past its session, and wakes up with answers in hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zombie_stores_nothing_of_what_another_member_did_meanwhile() -> Result<()> {
    let (Some(broker), Some(python)) = (Broker::kafka().await?, python().await?) else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let service = Service::native(echo(5)).await?;
        let mut zombie = stage.sidecar("zombie").service("work", &service).start().await?;
        let second = stage.sidecar("second").service("work", &service).start().await?;
        let publisher = stage.sidecar("publisher").start().await?;
        publisher.apply(ROUTE).await?;
        let both =
            |status: &GetStatusResponse| routes_of(status).filter(|route| route.route == "work" && route.partitions > 0).count() == 2;
        second.wait_status("both work", MINUTE, both).await?;
        let stop = CancellationToken::new();
        let load = Load { connections: 8, ..Load::new(stage.topic("in"), 1_000_000, 100) };
        let publishing = tokio::spawn(load.stubborn(publisher.client(), stop.clone()));
        service.wait(500, MINUTE).await?;
        zombie.process()?.signal(Signal::STOP)?;
        let all = |status: &GetStatusResponse| routes_of(status).any(|route| route.route == "work" && route.partitions == 4);
        second.wait_status("the second has all", MINUTE, all).await?;
        service.wait(service.total().await? + 500, MINUTE).await?;
        zombie.process()?.signal(Signal::CONT)?;
        second.wait_status("both work again", MINUTE, both).await?;
        service.wait(service.total().await? + 500, MINUTE).await?;
        stop.cancel();
        let (oracle, _) = publishing.await??;
        zombie.wait_done(&["work"], MINUTE).await?;
        second.wait_done(&["work"], MINUTE).await?;
        judge(&stage, &publisher, Some(&python), oracle.len()).await?;
        zombie.finish().await?;
        second.finish().await?;
        publisher.finish().await
    })
    .await
}

/// A second sidecar comes, and the first one goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalance_under_load_shows_each_answer_once() -> Result<()> {
    let (Some(broker), Some(python)) = (Broker::kafka().await?, python().await?) else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let service = Service::native(echo(10)).await?;
        let (second, publisher, oracle, _) = crate::crash::hand_over_under_load(&stage, &service, ROUTE).await?;
        second.wait_done(&["work"], MINUTE).await?;
        judge(&stage, &publisher, Some(&python), oracle.len()).await?;
        second.finish().await?;
        publisher.finish().await
    })
    .await
}

on_both!(an_answer_that_the_broker_refuses_is_dead_lettered_and_the_others_are_not, refused_answer);

async fn refused_answer(stage: Stage) -> Result<()> {
    const RECORDS: usize = 300;
    // The sidecar takes it; with its headers the broker does not.
    let large = Rule::echo().size(1_048_560).when(Condition {
        key: Some("k1".to_owned()),
        field_equals: Some(("n".to_owned(), json!(2))),
        ..Condition::default()
    });
    let scenario = Scenario { headers: false, ..Scenario::new() }.on("/work", [large, Rule::echo()]);
    let service = Service::native(scenario).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(ROUTE).await?;
    sidecar.wait_running(&["work"]).await?;
    Load::new(stage.topic("in"), RECORDS, 10).http(&sidecar).await?;
    sidecar
        .wait_status("all ended", 2 * MINUTE, |status| {
            disposition(status, "work", "forwarded") + disposition(status, "work", "dead_lettered") == RECORDS as u64
        })
        .await?;
    let status = sidecar.status().await?;
    let letters = stage.read_committed(&sidecar, None, &stage.topic("dlq"), 1).await?;
    ensure!(disposition(&status, "work", "dead_lettered") == letters.len() as u64, "{} dead letters, and {status:#?}", letters.len());
    ensure!(letters.iter().all(|letter| letter.header("mesh-dlq-reason").as_deref() == Some("reply")));
    let answers = stage.read_committed(&sidecar, None, &stage.topic("out"), RECORDS - letters.len()).await?;
    ensure!(letters.len() == 1 && letters[0].json()["n"] == 2, "{} dead letters", letters.len());
    let is = count(&answers);
    ensure!(is.len() == answers.len() && answers.len() + letters.len() == RECORDS, "{} answers", answers.len());
    sidecar.finish().await
}

/// The broker dies in the middle of a transaction, and comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_dies_under_load_shows_each_answer_once() -> Result<()> {
    let (Some(kafka), Some(python)) = (own_kafka().await, python().await?) else { return Ok(()) };
    Stage::run(Broker::Kafka(kafka.bootstrap().to_owned()), async |stage| {
        let service = Service::native(echo(2)).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        sidecar.apply(ROUTE).await?;
        sidecar.wait_running(&["work"]).await?;
        let records = 3_000;
        let publishing = tokio::spawn(Load::new(stage.topic("in"), records, 100).stubborn(sidecar.client(), CancellationToken::new()));
        service.wait(1_000, MINUTE).await?;
        let broker = kafka.clone();
        tokio::task::spawn_blocking(move || broker.stop().and_then(|()| broker.start())).await??;
        let (oracle, _) = tokio::time::timeout(3 * MINUTE, publishing).await.context("the load")???;
        ensure!(oracle.len() == records);
        sidecar.wait_done(&["work"], 2 * MINUTE).await?;
        judge(&stage, &sidecar, Some(&python), records).await?;
        sidecar.finish().await
    })
    .await
}
