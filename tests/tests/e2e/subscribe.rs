//! Services that attach, poll or are called over gRPC and h2c, and readers of topics.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::Record;
use mesh_tests::{
    broker::Broker,
    grpc::{Attached, GrpcService, ignore, reject, reply, reply_with, retry},
    load::Load,
    mesh::{json_record, publish},
    on_both,
    oracle::sightings,
    process::Process,
    python::python,
    service::{Rule, Scenario, Service},
    sidecar::disposition,
    stage::Stage,
};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);
/// No UTF-8.
const BINARY: [u8; 4] = [0, 255, 254, 10];

/// Four records: text, JSON, bytes that are no text, and a tombstone.
async fn mixed(sidecar: &mesh_tests::sidecar::Sidecar, topic: &str) -> Result<()> {
    let record = |value: Option<Vec<u8>>| Record { key: Some("k".into()), value: value.map(Into::into), ..Record::default() };
    let values = [Some(b"text".to_vec()), Some(br#"{"a":1}"#.to_vec()), Some(BINARY.to_vec()), None];
    publish(sidecar.mesh().await?, topic, values.map(record).into()).await?;
    Ok(())
}

fn is_mixed(values: &[Value]) -> bool {
    values == [json!({ "text": "text" }), json!({ "json": { "a": 1 } }), json!({ "base64": "AP/+Cg==" }), Value::Null]
}

on_both!(a_topic_is_read_as_sse_and_ndjson_and_bytes_break_nothing, read_topic);

async fn read_topic(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").start().await?;
    sidecar.apply("{ topics: { %t: { partitions: 1 } }, routes: [] }").await?;
    let topic = stage.topic("t");
    mixed(&sidecar, &topic).await?;
    let path = format!("/v1/topics/{topic}/records?from=earliest");
    for accept in ["text/event-stream", "application/x-ndjson"] {
        let mut lines = sidecar.http().open(&path, accept).await?;
        ensure!(lines.status == 200, "{accept}: {}", lines.status);
        let kind = lines.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        ensure!(kind.starts_with(accept), "{accept} is answered with {kind}");
        let mut values = Vec::new();
        for offset in 0..4 {
            let record = lines.next_json(SOON).await?;
            ensure!(
                record["offset"] == offset && record["topic"] == topic && record["key"] == json!({ "text": "k" }),
                "{accept}: {record}"
            );
            values.push(record["value"].clone());
        }
        ensure!(is_mixed(&values), "{accept}: {values:?}");
        // Live: what is published now comes.
        sidecar.publish(&topic, None, "text/plain", accept).await?;
        loop {
            let record = lines.next_json(SOON).await?;
            if record["value"] == json!({ "text": accept }) {
                break;
            }
        }
    }
    let refused = sidecar.http().get("/v1/topics/__mesh.control/records?from=earliest").await?;
    refused.problem(403, "forbidden-topic")?;
    sidecar.finish().await
}

on_both!(a_group_goes_on_where_it_was, read_group);

async fn read_group(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").start().await?;
    sidecar.apply("{ topics: { %t: { partitions: 1 } }, routes: [] }").await?;
    let topic = stage.topic("t");
    for number in 0..3 {
        sidecar.publish(&topic, None, "text/plain", number.to_string()).await?;
    }
    let path = format!("/v1/topics/{topic}/records?group={}.readers&from=earliest", stage.mesh());
    let mut lines = sidecar.http().open(&path, "application/x-ndjson").await?;
    for offset in 0..3 {
        ensure!(lines.next_json(SOON).await?["offset"] == offset);
    }
    // Read, but perhaps not committed yet: the rest of the group's story must not go back by more than what was in flight.
    drop(lines);
    sidecar.publish(&topic, None, "text/plain", "3").await?;
    let mut lines = sidecar.http().open(&path, "application/x-ndjson").await?;
    loop {
        let record = lines.next_json(SOON).await?;
        if record["offset"] == 3 {
            break;
        }
    }
    sidecar.finish().await
}

#[tokio::test]
async fn a_foreign_sse_client_reads_a_topic() -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    Stage::run(Broker::Embedded, async |stage| {
        let sidecar = stage.sidecar("sidecar").start().await?;
        let topic = stage.topic("t");
        mixed(&sidecar, &topic).await?;
        let url = format!("http://{}/v1/topics/{topic}/records?from=earliest", sidecar.api_address());
        let said = python.run("sse_client.py", &[&url, "4"], Vec::new(), MINUTE).await?.success()?;
        let mut values = Vec::new();
        for line in said.lines() {
            values.push(serde_json::from_str::<Value>(line)?["value"].clone());
        }
        ensure!(is_mixed(&values), "{values:?}");
        sidecar.finish().await
    })
    .await
}

on_both!(a_pulling_service_polls_and_answers, pull);

async fn pull(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").client("work").start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 1 }, %out: { partitions: 1 } }
            routes:
            - { name: work, service: work, from: [%in], deliver: pull, to: [%out], timeout: 5s, order: none, dead_letter: %dead }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    // Nothing there: a long poll ends empty when its time is over.
    let empty = sidecar.http().get("/v1/routes/work/records?max=10&wait=200ms").await?.expect(200)?.json()?;
    ensure!(empty["records"] == json!([]), "{empty}");

    let waiting = sidecar.http().get("/v1/routes/work/records?max=1&wait=20s");
    let topic = stage.topic("in");
    let (first, published) = tokio::join!(waiting, mixed(&sidecar, &topic));
    published?;
    let mut records = first?.expect(200)?.json()?["records"].as_array().context("records")?.clone();
    ensure!(records.len() == 1, "{records:?}");
    while records.len() < 4 {
        let more = sidecar.http().get("/v1/routes/work/records?max=10&wait=5s").await?.expect(200)?.json()?;
        let more = more["records"].as_array().context("records")?.clone();
        ensure!(!more.is_empty(), "only {} records came", records.len());
        records.extend(more);
    }
    let values: Vec<Value> = records.iter().map(|record| record["value"].clone()).collect();
    ensure!(is_mixed(&values), "{values:?}");
    ensure!(records.iter().all(|record| record["attempt"] == 1 && record["hops"] == 0), "{records:?}");

    let id = |at: usize| records[at]["id"].clone();
    let outcomes = json!({ "outcomes": [
        { "id": id(0), "reply": { "records": [{ "value": "answered" }] } },
        { "id": id(1), "ignore": {} },
        { "id": id(2), "reply": { "records": [{ "key": "k2", "value": { "base64": "AP/+Cg==" } }] } },
        { "id": id(3), "reject": { "reason": "no use for it" } },
    ]});
    let answer = sidecar.http().post_json("/v1/routes/work/outcomes", &outcomes).await?;
    answer.expect(200)?;
    sidecar
        .wait_status("all ended", MINUTE, |status| {
            disposition(status, "work", "forwarded") == 2
                && disposition(status, "work", "ignored") == 1
                && disposition(status, "work", "dead_lettered") == 1
        })
        .await?;
    let out = stage.read(&sidecar, None, &stage.topic("out"), 2).await?;
    let mut values: Vec<Vec<u8>> = out.iter().filter_map(|found| found.value.clone()).collect();
    values.sort();
    ensure!(values == [BINARY.to_vec(), b"answered".to_vec()], "{out:?}");
    let dead = stage.read(&sidecar, None, &stage.topic("dead"), 1).await?;
    ensure!(
        dead.first().and_then(|dead| dead.header("mesh-dlq-detail")).is_some_and(|detail| detail.contains("no use for it")),
        "{dead:?}"
    );

    // SSE and NDJSON of the same route.
    for accept in ["text/event-stream", "application/x-ndjson"] {
        let mut lines = sidecar.http().open("/v1/routes/work/records", accept).await?;
        sidecar.publish(&stage.topic("in"), None, "text/plain", accept).await?;
        let record = lines.next_json(SOON).await?;
        ensure!(record["value"] == json!({ "text": accept }), "{record}");
        let outcome = json!({ "outcomes": [{ "id": record["id"], "ignore": {} }] });
        let answer = sidecar.http().post_json("/v1/routes/work/outcomes", &outcome).await?;
        answer.expect(200)?;
    }
    sidecar.wait_status("all ended", MINUTE, |status| disposition(status, "work", "ignored") == 3).await?;
    sidecar.finish().await
}

const TABLE: &str = "
    topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
    routes:
    - { name: work, service: work, from: [%in], handler: /work, to: [%out], dead_letter: %dead, retry: { attempts: 3, initial: 10ms } }
    ";

on_both!(a_grpc_handler_with_a_stream_is_served_in_order_per_key, handle_stream);
on_both!(a_grpc_handler_without_a_stream_is_called_with_handle, handle);

async fn handle_stream(stage: Stage) -> Result<()> {
    grpc_handler(stage, true).await
}

async fn handle(stage: Stage) -> Result<()> {
    grpc_handler(stage, false).await
}

async fn grpc_handler(stage: Stage, streaming: bool) -> Result<()> {
    let service = GrpcService::start(streaming, |delivered| reply_with(delivered, &json!({ "by": "grpc" }))).await?;
    let sidecar = stage.sidecar("sidecar").app("work", &service.url()).start().await?;
    sidecar.apply(TABLE).await?;
    sidecar.wait_running(&["work"]).await?;
    let records = 1_000;
    let oracle = Load::new(stage.topic("in"), records, 20).http_and_grpc(&sidecar).await?;
    sidecar.wait_status("forwarded", MINUTE, |status| disposition(status, "work", "forwarded") == records as u64).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), records).await?;
    oracle.judge(&sightings(&found)?).exactly_once()?;
    ensure!(found.iter().all(|found| found.json()["by"] == "grpc" && found.header("mesh-hops").as_deref() == Some("1")));
    let seen = service.seen();
    oracle.judge(&sightings(&seen)?).exactly_once().context("deliveries")?;
    let (streams, calls) = service.calls();
    ensure!(if streaming { streams >= 1 && calls == 0 } else { streams == 0 && calls > 0 }, "{streams} streams, {calls} calls");
    sidecar.finish().await
}

/// All outcomes, over a stream: the same as their statuses over HTTP.
#[tokio::test]
async fn grpc_outcomes_mean_what_the_design_says() -> Result<()> {
    Stage::run(Broker::Embedded, async |stage| {
        let service = GrpcService::start(true, |delivered| {
            let record = delivered.record.clone().unwrap_or_default();
            match record.key.as_deref() {
                Some(b"ignore") => ignore(),
                Some(b"reject") => reject("never"),
                Some(b"retry") if delivered.attempt < 3 => retry("not yet"),
                Some(b"always") => retry("not ever"),
                Some(b"ignored-status") => reply(204, "goes nowhere"),
                Some(b"bad-status") => reply(418, "a teapot"),
                _ => reply(0, "fine"),
            }
        })
        .await?;
        let sidecar = stage.sidecar("sidecar").app("work", &service.url()).start().await?;
        sidecar.apply(TABLE).await?;
        sidecar.wait_running(&["work"]).await?;
        let keys = ["ignore", "reject", "retry", "always", "ignored-status", "bad-status", "other"];
        let records = keys.map(|key| json_record(key, &json!({ "key": key })));
        publish(sidecar.mesh().await?, &stage.topic("in"), records.into()).await?;
        sidecar
            .wait_status("all ended", MINUTE, |status| {
                disposition(status, "work", "forwarded") == 2
                    && disposition(status, "work", "ignored") == 2
                    && disposition(status, "work", "dead_lettered") == 3
            })
            .await?;
        let dead = stage.read(&sidecar, None, &stage.topic("dead"), 3).await?;
        let mut reasons: Vec<(String, String)> =
            dead.iter().map(|dead| (dead.key_text(), dead.header("mesh-dlq-reason").unwrap_or_default())).collect();
        reasons.sort();
        let wanted = [("always", "attempts"), ("bad-status", "status"), ("reject", "status")];
        ensure!(reasons.iter().map(|(key, reason)| (key.as_str(), reason.as_str())).eq(wanted), "{reasons:?}");
        sidecar.finish().await
    })
    .await
}

on_both!(an_attached_service_is_served_within_its_credits_and_waited_for_while_it_is_away, attach);

async fn attach(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").client("publisher").client("work").start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
            routes:
            - { name: work, service: work, from: [%in], deliver: stream, to: [%out] }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await.or_else(|error| {
        // A route whose service is not attached may stand as waiting for it.
        eprintln!("{error:#.200}");
        anyhow::Ok(())
    })?;
    let records = 300;
    let oracle = Load::new(stage.topic("in"), records, 20).http(&sidecar).await?;
    let by = |name: &'static str| move |delivered: &mesh_proto::v1::DeliveredRecord| reply_with(delivered, &json!({ "by": name }));
    let first = Attached::start(sidecar.mesh_as("work").await?, "work", 5, by("first")).await?;
    first.wait(50, MINUTE).await?;
    drop(first);
    // Away: what it did not answer is kept for the next one.
    let second = Attached::start(sidecar.mesh_as("work").await?, "work", 0, by("second")).await?;
    sidecar.wait_status("forwarded", MINUTE, |status| disposition(status, "work", "forwarded") == records as u64).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), records).await?;
    oracle.judge(&sightings(&found)?).exactly_once()?;
    ensure!(["first", "second"].iter().all(|name| found.iter().any(|found| found.json()["by"] == *name)));
    let status = sidecar.status().await?;
    ensure!(disposition(&status, "work", "dead_lettered") == 0, "{status:#?}");
    drop(second);
    let foreign = Attached::start(sidecar.mesh_as("publisher").await?, "work", 1, by("nobody")).await;
    ensure!(foreign.is_err(), "a service attaches to its own routes only");
    sidecar.finish().await
}

on_both!(a_python_client_generated_from_the_proto_files_publishes_and_attaches, foreign_grpc);

async fn foreign_grpc(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let sidecar = stage.sidecar("sidecar").client("work").start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
            routes:
            - { name: work, service: work, from: [%in], deliver: stream, to: [%out] }
            ",
        )
        .await?;
    let folder = mesh_tests::workspace().join("proto/proto").display().to_string();
    let address = sidecar.api_address().to_string();
    let mut command = python.command("grpc_client.py");
    command.args([&folder, &address, "attach", "work", "500"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut attached = Process::start("grpc_client.py", command, &stage.folder().join("grpc_client.log"))?;
    attached.ready_port(MINUTE).await?;
    let topic = stage.topic("in");
    let arguments = [folder.as_str(), address.as_str(), "publish-stream", topic.as_str(), "500", "20", "300"];
    let said: Value = serde_json::from_str(&python.run("grpc_client.py", &arguments, Vec::new(), MINUTE).await?.success()?)?;
    ensure!(said == json!({ "acknowledged": 500, "failed": [] }), "{said}");
    sidecar.wait_status("forwarded", MINUTE, |status| disposition(status, "work", "forwarded") == 500).await?;
    ensure!(attached.wait(SOON).await?.success(), "{}", attached.log_tail());
    let mut oracle = mesh_tests::oracle::Oracle::default();
    (0..500).for_each(|index| oracle.acknowledge(&format!("k{}", index % 20), index / 20));
    let found = stage.read(&sidecar, None, &stage.topic("out"), 500).await?;
    oracle.judge(&sightings(&found)?).exactly_once()?;
    ensure!(found.iter().all(|found| found.json()["by"] == "python"));
    sidecar.finish().await
}

on_both!(a_service_that_speaks_http_2_without_tls_is_called, h2c);

async fn h2c(stage: Stage) -> Result<()> {
    let service =
        Service::native(Scenario { headers: false, ..Scenario::new() }.on("/work", [Rule::echo().extend(json!({ "by": "h2c" }))])).await?;
    let sidecar = stage.sidecar("sidecar").app("work", &service.h2c_url()).start().await?;
    sidecar.apply(TABLE).await?;
    sidecar.wait_running(&["work"]).await?;
    let records = 1_000;
    let oracle = Load::new(stage.topic("in"), records, 20).http(&sidecar).await?;
    sidecar.wait_status("forwarded", MINUTE, |status| disposition(status, "work", "forwarded") == records as u64).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), records).await?;
    oracle.judge(&sightings(&found)?).exactly_once()?;
    ensure!(found.iter().all(|found| found.json()["by"] == "h2c"));
    sidecar.finish().await
}
