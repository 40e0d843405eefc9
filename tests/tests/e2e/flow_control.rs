//! What a slow service costs: its own route, and no memory. How many calls a service can do at once. Records that are gone.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::RouteState;
use mesh_tests::{
    full,
    load::Load,
    on_both, on_kafka,
    oracle::sightings,
    service::{BatchAnswer, BatchService, Rule, Scenario, Service},
    sidecar::{disposition, routes_of},
    stage::Stage,
};
use rdkafka::{ClientConfig, Offset, TopicPartitionList, admin::AdminClient, client::DefaultClientContext};

const MINUTE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// A series of a route, whose service has its name.
fn of_route(name: &str, route: &str) -> String {
    format!("{name}{{route=\"{route}\",service=\"{route}\"}}")
}

on_both!(a_service_that_hangs_slows_only_its_own_route_and_its_backlog_costs_no_memory, hanging);

/// Two routes of one sidecar read one topic; the service of one of them never answers.
async fn hanging(stage: Stage) -> Result<()> {
    // Each round is a multiple of what a route may hold in memory (16 MiB), so that a backlog that stayed there would show.
    let (records, rounds) = if full() { (1_000_000, 10) } else { (20_000, 4) };
    let size = if full() { 100 } else { 2_000 };
    let stuck = Service::native(Scenario::light().on("/stuck", [Rule::echo().hang()])).await?;
    let quick = Service::native(Scenario::light().on("/quick", [Rule::status(204).empty()])).await?;
    let mut sidecar = stage.sidecar("sidecar").service("stuck", &stuck).service("quick", &quick).log("warn").start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 4 } }
            routes:
            - { name: stuck, service: stuck, from: [%in], handler: /stuck, to: void, timeout: 1h }
            - { name: quick, service: quick, from: [%in], handler: /quick, to: void, batch: { max: 500 } }
            ",
        )
        .await?;
    sidecar.wait_running(&["stuck", "quick"]).await?;
    let mut resident = Vec::new();
    for round in 0..=rounds {
        let load = Load { size, ..Load::new(stage.topic("in"), records, 1_000) }.from(round * records);
        load.grpc(sidecar.mesh().await?).await?;
        let all = ((round + 1) * records) as u64;
        let done = |status: &_| disposition(status, "quick", "ignored") >= all;
        sidecar.wait_status("the other route is done", 10 * MINUTE, done).await?;
        resident.push(sidecar.process()?.resident_bytes()? / MIB);
        ensure!(sidecar.metric(&of_route("mesh_queue_bytes", "stuck")).await? < 24.0 * MIB as f64, "the route holds more than it may");
    }
    let status = sidecar.status().await?;
    let of = |name: &str| routes_of(&status).find(|route| route.route == name).cloned().context("the route");
    ensure!(of("stuck")?.in_flight == 64 && of("stuck")?.dispositions.is_empty(), "{status:#?}");
    println!("{} records wait; resident after each {records}: {resident:?} MiB", (rounds + 1) * records);
    // The first rounds fill what may be filled, the embedded broker's memory of the newest records too.
    let (first, last) = (resident[2], resident[resident.len() - 1]);
    ensure!(last <= first + 20, "memory grows with the backlog: {resident:?} MiB");
    sidecar.kill9().await
}

on_both!(an_adaptive_route_finds_what_its_service_can_do, adaptive);

/// A service that works on six calls at a time.
async fn adaptive(stage: Stage) -> Result<()> {
    let workers = std::sync::Arc::new(tokio::sync::Semaphore::new(6));
    let service = BatchService::start_with(move |_| {
        let workers = workers.clone();
        async move {
            let _one = workers.acquire().await;
            tokio::time::sleep(Duration::from_millis(4)).await;
            BatchAnswer::whole(204, "")
        }
    })
    .await?;
    let sidecar = stage.sidecar("sidecar").app("work", &service.url()).log("warn").start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 2 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: void, order: none, concurrency: adaptive }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    let load = Load::new(stage.topic("in"), 8_000, 500);
    load.grpc(sidecar.mesh().await?).await?;
    let mut limits = Vec::new();
    sidecar.wait_status("most are done", MINUTE, |status| disposition(status, "work", "ignored") >= 5_000).await?;
    while disposition(&sidecar.status().await?, "work", "ignored") < 8_000 {
        limits.push(sidecar.metric(&of_route("mesh_concurrency_limit", "work")).await?);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mean = limits.iter().sum::<f64>() / limits.len() as f64;
    ensure!((3.0..20.0).contains(&mean), "a service of six workers got {mean:.1} calls at once: {limits:?}");
    sidecar.finish().await
}

/// Deletes the records of a topic's only partition below an offset.
async fn delete_before(bootstrap: &str, topic: &str, offset: i64) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new().set("bootstrap.servers", bootstrap).create()?;
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, 0, Offset::Offset(offset))?;
    let deleted = admin.delete_records(&list, &rdkafka::admin::AdminOptions::new()).await?;
    for element in deleted.elements() {
        element.error()?;
    }
    Ok(())
}

on_kafka!(records_that_kafka_deleted_unread_stop_a_partition_or_are_counted_by_range, gap);

async fn gap(stage: Stage) -> Result<()> {
    let bootstrap = stage.broker().bootstrap().context("Kafka")?.to_owned();
    let service = Service::native(Scenario::light()).await?;
    let mut sidecar = stage.sidecar("sidecar").service("work", &service).service("halt", &service).start().await?;
    let table = |on_gap: &str| {
        format!(
            "
            topics: {{ %in: {{ partitions: 1 }} }}
            routes:
            - {{ name: work, service: work, from: [%in], handler: /work, to: void }}
            - {{ name: halt, service: halt, from: [%in], handler: /halt, to: void, on_gap: {on_gap} }}
            "
        )
    };
    sidecar.apply(&table("stop")).await?;
    sidecar.wait_running(&["work", "halt"]).await?;
    let load = Load::new(stage.topic("in"), 10, 5);
    load.http(&sidecar).await?;
    sidecar.wait_done(&["work", "halt"], MINUTE).await?;
    // While nobody reads, 20 further records come, of which the broker deletes 15.
    let publisher = stage.sidecar("publisher").client("publisher").start().await?;
    sidecar.sigterm(MINUTE).await?;
    Load::new(stage.topic("in"), 20, 5).from(2).http(&publisher).await?;
    let topic = stage.topic("in");
    delete_before(&bootstrap, &topic, 25).await?;
    sidecar.start().await?;
    let stopped = |status: &_| {
        let of = |name: &str| routes_of(status).find(|route| route.route == name);
        of("halt").is_some_and(|route| route.state() == RouteState::Stopped && route.reason.contains("offsets 10 to 24"))
            && of("work").is_some_and(|route| route.state() == RouteState::Running && route.reason.contains("deleted 15 records"))
            && disposition(status, "work", "expired") == 15
            && disposition(status, "work", "void") == 5
    };
    sidecar.wait_status("one route stands still, the other goes on", MINUTE, stopped).await?;
    let text = sidecar.probes().get("/metrics").await?.expect(200)?.text();
    for line in [
        "mesh_route_state{route=\"halt\",service=\"halt\",state=\"stopped\"} 1",
        "mesh_dispositions_total{route=\"work\",service=\"work\",disposition=\"expired\",reason=\"\"} 15",
    ] {
        ensure!(text.contains(line), "no {line} in\n{text}");
    }
    let status = sidecar.status().await?;
    ensure!(disposition(&status, "halt", "void") + disposition(&status, "halt", "expired") == 0, "{status:#?}");
    sidecar.apply(&table("earliest")).await?;
    let on = |status: &_| disposition(status, "halt", "expired") == 15 && disposition(status, "halt", "void") == 5;
    sidecar.wait_status("it goes on", MINUTE, on).await?;
    publisher.finish().await?;
    sidecar.finish().await
}

on_kafka!(the_newer_group_protocol_shares_and_hands_over_under_load, newer_protocol);

/// `group.protocol: consumer` (KIP-848): a second sidecar comes and goes under load.
async fn newer_protocol(stage: Stage) -> Result<()> {
    let bootstrap = stage.broker().bootstrap().context("Kafka")?.to_owned();
    let service = Service::native(Scenario::light()).await?;
    let make = |name: &str| {
        // What only the older protocol knows is dropped.
        let kafka = serde_json::json!({ "bootstrap.servers": bootstrap, "group.protocol": "consumer", "session.timeout.ms": "9000" });
        stage.sidecar(name).service("work", &service).broker(serde_json::json!({ "kafka": kafka }))
    };
    let first = make("first").start().await?;
    first
        .apply(
            "
            topics: { %in: { partitions: 8 }, %out: { partitions: 8 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out] }
            ",
        )
        .await?;
    first.wait_running(&["work"]).await?;
    let load = Load::new(stage.topic("in"), 6_000, 40);
    let publishing = tokio::spawn(load.stubborn(first.client(), tokio_util::sync::CancellationToken::new()));
    let second = make("second").start().await?;
    let began = Instant::now();
    second.wait_running(&["work"]).await?;
    let half = |status: &mesh_proto::v1::GetStatusResponse| {
        let counts: Vec<u32> = routes_of(status).filter(|route| route.route == "work").map(|route| route.partitions).collect();
        counts.len() == 2 && counts.iter().all(|count| *count == 4)
    };
    second.wait_status("each owns half of the partitions", MINUTE, half).await?;
    println!("shared after {:.1?}", began.elapsed());
    second.finish().await?;
    let (oracle, _) = publishing.await??;
    first.wait_done(&["work"], MINUTE).await?;
    let found = stage.read(&first, None, &stage.topic("out"), oracle.len()).await?;
    oracle.judge(&sightings(&found)?).at_most(0)?;
    first.finish().await
}
