//! The schema guard, on every way to publish.

use mesh_proto::v1::{PublishRequest, PublishStreamRequest, publish_result::Result as Outcome};
use tonic::Code;

use super::*;
use crate::table::{ActiveTable, TableOrigin};

const ORDERS: &str = "/v1/topics/orders/records";

fn active(schema: &str) -> Option<Arc<ActiveTable>> {
    let text = format!(
        "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: m }}\nspec:\n  topics: {{ orders: {schema} }}\n  routes: []\n"
    );
    let compiled = mesh_routing::parse("t", &text).and_then(|table| mesh_routing::compile(&table)).unwrap();
    Some(Arc::new(ActiveTable { generation: 1, applied_ms: 0, origin: TableOrigin::Mesh, compiled: Arc::new(compiled) }))
}

const SCHEMA: &str =
    "{ schema: { json: { type: object, required: [id], properties: { lines: { items: { properties: { n: { minimum: 1 } } } } } } } }";
const GOOD: &str = r#"{"id":1,"lines":[{"n":1}]}"#;
const BAD: &str = r#"{"id":1,"lines":[{"n":1},{"n":0}]}"#;

#[tokio::test]
async fn a_value_that_does_not_match_is_refused_with_its_place_on_every_way() {
    let (table, world) = World::guarded(active(SCHEMA)).await;
    let refused = world.post(ORDERS, &[], BAD).await;
    let problem = refused.problem(422, "schema-mismatch");
    assert_eq!((&problem["path"], &problem["persisted"], &problem["retryable"]), (&"/lines/1/n".into(), &"no".into(), &false.into()));
    assert!(problem["detail"].as_str().unwrap().contains("/lines/1/n is 0, less than the minimum 1"), "{problem}");
    for text in ["hello", "[]", "{}", "{\"id\"", "\u{0}"] {
        assert_eq!(world.post(ORDERS, &[("content-type", "text/plain")], text).await.problem(422, "schema-mismatch")["path"], "", "{text}");
    }
    assert_eq!(world.post(ORDERS, &[], GOOD).await.status, 200);
    assert_eq!(world.post(ORDERS, &[("mesh-tombstone", "true"), ("mesh-key", "k")], "").await.status, 200, "a tombstone passes");

    let batch = [("content-type", "application/vnd.mesh.records+json")];
    let answer = world.post(ORDERS, &batch, format!(r#"{{"records":[{{"value":{GOOD}}},{{"value":{BAD}}},{{"value":null}}]}}"#)).await;
    let statuses: Vec<_> = answer.json["results"].as_array().unwrap().iter().map(|result| result["status"].as_i64().unwrap()).collect();
    assert_eq!((answer.status.as_u16(), statuses), (207, vec![200, 422, 200]));
    assert_eq!(answer.json["results"][1]["problem"]["path"], "/lines/1/n");

    let lines = [("content-type", "application/x-ndjson")];
    let answer = world.post(&format!("{ORDERS}?form=value"), &lines, format!("{BAD}\n{GOOD}\n")).await;
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    assert!(text.starts_with("{\"line\":1,\"status\":422,") && text.contains("{\"line\":2,\"status\":200,"), "{text}");
    assert_eq!(world.fake.records("orders").len(), 5);

    let record = |value: &'static str| v1::Record { value: Some(Bytes::from_static(value.as_bytes())), ..v1::Record::default() };
    let mut client = world.client().await;
    let request = |records| PublishRequest { topic: "orders".to_owned(), records };
    let status = client.publish(request(vec![record(BAD)])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("/lines/1/n"), "{}", status.message());
    let results = client.publish(request(vec![record(GOOD), record(BAD)])).await.unwrap().into_inner().results;
    assert!(matches!(results[0].result, Some(Outcome::Position(_))));
    assert!(
        matches!(&results[1].result, Some(Outcome::Problem(problem)) if problem.code == "schema-mismatch" && problem.path == "/lines/1/n"),
        "{results:?}"
    );
    let stream =
        tokio_stream::once(PublishStreamRequest { sequence: 7, topic: "orders".to_owned(), records: vec![record(BAD), record(GOOD)] });
    let mut answers = client.publish_stream(stream).await.unwrap().into_inner();
    let results = answers.message().await.unwrap().unwrap().results.remove(0).results;
    assert!(
        matches!(&results[0].result, Some(Outcome::Problem(problem)) if problem.code == "schema-mismatch" && problem.path == "/lines/1/n"),
        "{results:?}"
    );
    assert!(matches!(results[1].result, Some(Outcome::Position(_))));
    assert_eq!(world.fake.records("orders").len(), 7);
    assert!(world.counts("mesh_published_records_total", "schema-mismatch"));

    // A table without the schema, and one with another: at once.
    table.send_replace(active("{}"));
    assert_eq!(world.post(ORDERS, &[], "hello").await.status, 200);
    table.send_replace(active("{ schema: { json: false } }"));
    world.post(ORDERS, &[], GOOD).await.problem(422, "schema-mismatch");
    // Beyond the limit, it is that which is told.
    world
        .post(ORDERS, &batch, format!(r#"{{"records":[{{"value":"{}"}}]}}"#, "x".repeat(1024 * 1024 + 1)))
        .await
        .problem(413, "record-too-large");
}
