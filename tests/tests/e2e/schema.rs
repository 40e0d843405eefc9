//! The schema guard: what a topic declares holds for what is published and for what services answer.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use mesh_tests::{
    on_both,
    python::python,
    service::{Condition, Rule, Scenario, Service},
    sidecar::disposition,
    stage::Stage,
};
use prost::Message as _;
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);

/// The topics, without and with the schema of `in`.
fn table(guard: &str) -> String {
    format!(
        "
        topics:
          %in: {{ partitions: 1{guard} }}
          %out: {{ partitions: 1, schema: {{ json: {{ type: object, properties: {{ n: {{ maximum: 10 }} }} }} }} }}
          %copy: {{ partitions: 1 }}
        routes:
        - {{ name: work, service: work, from: [%in], handler: /work, to: [%copy, %out] }}
        "
    )
}

const GUARD: &str = ", schema: { json: { type: object, required: [n], properties: { n: { type: integer } } } }";

fn with(field: &str, value: impl Into<Value>) -> Condition {
    Condition { field_equals: Some((field.into(), value.into())), ..Condition::default() }
}

on_both!(a_schema_guards_what_is_published_and_what_is_answered, guard);

async fn guard(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new().on(
        "/work",
        [Rule::echo().extend(json!({ "n": 11 })).when(with("n", 3)), Rule::echo().text("no JSON").when(with("n", 4)), Rule::echo()],
    ))
    .await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(&table("")).await?;
    sidecar.wait_running(&["work"]).await?;
    let topic = stage.topic("in");
    // From a time without the schema, and as a foreign client may write at any time: no JSON. It keeps nobody up.
    sidecar.publish(&topic, None, "text/plain", "no JSON").await?;
    sidecar.apply(&table(GUARD)).await?;
    let path = format!("/v1/topics/{topic}/records");
    let refused = sidecar.http().post_json(&path, &json!({ "n": "1" })).await?.problem(422, "schema-mismatch")?;
    ensure!(refused["path"] == "/n" && refused["persisted"] == "no", "{refused}");
    for n in 1..6 {
        sidecar.http().post_json(&path, &json!({ "n": n })).await?.expect(200)?;
    }
    sidecar
        .wait_status("all ended", MINUTE, |status| {
            disposition(status, "work", "forwarded") + disposition(status, "work", "dead_lettered") == 6
        })
        .await?;
    let dead = stage.read(&sidecar, None, &stage.topic("dlq"), 3).await?;
    let mut reasons: Vec<(String, String)> = dead
        .iter()
        .map(|dead| (dead.header("mesh-dlq-reason").unwrap_or_default(), dead.header("mesh-dlq-detail").unwrap_or_default()))
        .filter(|(reason, _)| reason == "schema")
        .collect();
    reasons.sort();
    // The first record may be the service's to refuse, or, echoed, the schema's: either way it is a dead letter.
    ensure!(reasons.iter().any(|(_, detail)| detail.contains("/n is 11, more than the maximum 10")), "{dead:?}");
    ensure!(reasons.iter().filter(|(_, detail)| detail.contains("is not JSON")).count() >= 1, "{dead:?}");
    // Nothing of an answer that one of its topics does not take is published anywhere.
    for name in ["out", "copy"] {
        let found = stage.read(&sidecar, None, &stage.topic(name), 3).await?;
        let numbers: Vec<Value> = found.iter().map(|found| found.json()["n"].clone()).collect();
        ensure!(numbers == [json!(1), json!(2), json!(5)], "{name}: {numbers:?}");
    }
    sidecar.finish().await
}

on_both!(a_protobuf_message_guards_a_topic, protobuf);

async fn protobuf(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").start().await?;
    let descriptor = BASE64_STANDARD.encode(mesh_proto::FILE_DESCRIPTOR_SET);
    let schema = format!("schema: {{ protobuf: {{ descriptor: '{descriptor}', message: mesh.v1.Record }} }}");
    sidecar.apply(&format!("{{ topics: {{ %t: {{ partitions: 1, {schema} }} }}, routes: [] }}")).await?;
    let topic = stage.topic("t");
    let path = format!("/v1/topics/{topic}/records");
    let kind = [("content-type", "application/x-protobuf")];
    let record = mesh_proto::v1::Record { key: Some("k".into()), mesh_id: "id".to_owned(), ..mesh_proto::v1::Record::default() };
    sidecar.http().post(&path, &kind, record.encode_to_vec()).await?.expect(200)?;
    let refused = sidecar.http().post_json(&path, &json!({ "key": "k" })).await?.problem(422, "schema-mismatch")?;
    ensure!(refused["path"] == "", "{refused}");
    let position = mesh_proto::v1::Position { topic: "t".to_owned(), ..mesh_proto::v1::Position::default() };
    // Another message: its fields have other types.
    let other = mesh_proto::v1::DeliveredRecord { delivery_id: 5, position: Some(position), ..mesh_proto::v1::DeliveredRecord::default() };
    let refused = sidecar.http().post(&path, &kind, other.encode_to_vec()).await?.problem(422, "schema-mismatch")?;
    ensure!(refused["path"].as_str().is_some_and(|path| path.starts_with('/')), "{refused}");
    let found = stage.read(&sidecar, None, &topic, 1).await?;
    ensure!(found.first().context("a record")?.value == Some(record.encode_to_vec()));
    sidecar.finish().await
}

/// Python's jsonschema is asked the same of generated values.
#[tokio::test]
async fn python_s_jsonschema_says_the_same() -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let said = python.run("schema_cases.py", &[], Vec::new(), MINUTE).await?.success()?;
    let cases: Vec<Value> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(cases.len() > 1_000, "{} cases", cases.len());
    for case in &cases {
        let text = json!({
            "apiVersion": "mesh/v1", "kind": "RoutingTable", "metadata": { "mesh": "m" },
            "spec": { "topics": { "t": { "schema": { "json": case["schema"] } } }, "routes": [] }
        });
        let table = mesh_routing::parse("case", &text.to_string()).with_context(|| case.to_string())?;
        let compiled = mesh_routing::compile(&table)?;
        let schema = compiled.schema("t").context("the schema")?;
        for (value, valid) in case["values"].as_array().context("values")?.iter().zip(case["valid"].as_array().context("valid")?) {
            let found = schema.check(value.to_string().as_bytes());
            ensure!(found.is_ok() == *valid, "{}\n{value}: {found:?}, and jsonschema says {valid}", case["schema"]);
        }
    }
    Ok(())
}
