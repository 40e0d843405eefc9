//! Many records in one call: the request, and what is said to each of them.
//!
//! Invariant: every record of a batch comes back with one outcome: its own, or that of the whole call; without any it is an attempt of that
//! record alone.
//! Invariant: an outcome that names no record of the batch, or one that was named before, changes nothing and is counted.

use std::collections::HashMap;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::Full;
use prometheus_client::metrics::counter::Counter;
use serde_json::value::RawValue;

use super::{
    forms::{self, Said},
    http as http_form,
};
use crate::{
    json,
    outcome::{Delivery, Outcome},
};

const DELIVERIES: HeaderValue = HeaderValue::from_static("application/vnd.mesh.deliveries+json");
const ACCEPTED: HeaderValue = HeaderValue::from_static("application/json, application/x-ndjson");
const MESH_ROUTE: HeaderName = HeaderName::from_static("mesh-route");
const MESH_RECORDS: HeaderName = HeaderName::from_static("mesh-records");

/// How many times a batch's answer may be as long as that of one record.
pub(super) const ANSWER: usize = 4;

/// The request for a batch of one route.
pub(super) fn request(batch: &[Delivery], uri: Uri, host: Option<&HeaderValue>) -> Request<Full<Bytes>> {
    let size: usize = batch.iter().map(|delivery| 192 + delivery.record.size()).sum();
    let mut body = Vec::with_capacity(size);
    body.push(b'{');
    let route = batch.first().map(|delivery| &delivery.route.name);
    if let Some(route) = route {
        body.extend_from_slice(b"\"route\":");
        json::write_string(&mut body, route);
        body.push(b',');
    }
    body.extend_from_slice(b"\"records\":[");
    for (index, delivery) in batch.iter().enumerate() {
        body.extend_from_slice(if index > 0 { b",{" } else { b"{" });
        forms::write_delivery(&mut body, delivery);
        json::write_members(&mut body, &delivery.position, &delivery.record);
        body.push(b'}');
    }
    body.extend_from_slice(b"]}");
    let mut request = Request::new(Full::new(Bytes::from(body)));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    if let Some(host) = host {
        headers.insert(header::HOST, host.clone());
    }
    headers.insert(header::CONTENT_TYPE, DELIVERIES);
    headers.insert(header::ACCEPT, ACCEPTED);
    // Names of routes are checked: they are valid header values.
    if let Some(Ok(route)) = route.map(|route| HeaderValue::from_str(route)) {
        headers.insert(MESH_ROUTE, route);
    }
    headers.insert(MESH_RECORDS, HeaderValue::from(batch.len()));
    request
}

/// What an answer over HTTP says to each record, in the order of the batch.
pub(super) fn outcomes(batch: &[Delivery], status: StatusCode, headers: &HeaderMap, body: Bytes, unknown: &Counter) -> Vec<Outcome> {
    if !status.is_success() || body.is_empty() {
        return vec![http_form::outcome(status, headers, body); batch.len()];
    }
    let entries = match split(headers, &body) {
        Ok(entries) => entries,
        Err(why) => {
            let reason = format!("the answer ({}) to a batch cannot be read: it is {why}", status.as_u16());
            return vec![Outcome::Retry { reason, after: None }; batch.len()];
        }
    };
    let mut gathering = Gathering::new(batch);
    for entry in entries {
        let known = match forms::read_outcome(entry.get(), &body) {
            Ok(Said { id, outcome, .. }) => {
                let broken = |why| Outcome::Retry { reason: format!("the outcome of this record cannot be read: {why}"), after: None };
                gathering.take(id, outcome.unwrap_or_else(broken))
            }
            Err(_) => false,
        };
        if !known {
            unknown.inc();
        }
    }
    gathering.finish(missing)
}

/// The outcomes of an answer, not read yet.
fn split<'b>(headers: &HeaderMap, body: &'b Bytes) -> Result<Vec<&'b RawValue>, String> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !matches!(content_type.split(';').next().unwrap_or_default().trim(), "application/x-ndjson" | "application/ndjson") {
        return forms::split_outcomes(body);
    }
    let text = std::str::from_utf8(body).map_err(|error| format!("no text: {error}"))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(index, line)| serde_json::from_str(line).map_err(|error| format!("not JSON in line {}: {error}", index + 1))).collect()
}

/// The outcome of a record that an answer does not name.
pub(super) fn missing() -> Outcome {
    Outcome::Retry { reason: "the handler's answer does not name this record".to_owned(), after: None }
}

/// The outcomes of one batch, as they come.
#[derive(Debug)]
pub(super) struct Gathering {
    /// The ids, in the order of the batch.
    ids: Vec<u64>,
    places: HashMap<u64, usize>,
    outcomes: Vec<Option<Outcome>>,
    left: usize,
}

impl Gathering {
    pub(super) fn new(batch: &[Delivery]) -> Self {
        Self {
            ids: batch.iter().map(|delivery| delivery.id).collect(),
            places: batch.iter().enumerate().map(|(place, delivery)| (delivery.id, place)).collect(),
            outcomes: vec![None; batch.len()],
            left: batch.len(),
        }
    }

    /// Takes an outcome; `false` if it is about no record of the batch, or about one that has its outcome.
    pub(super) fn take(&mut self, id: u64, outcome: Outcome) -> bool {
        match self.places.get(&id).and_then(|place| self.outcomes.get_mut(*place)) {
            Some(place @ None) => {
                *place = Some(outcome);
                self.left -= 1;
                true
            }
            _ => false,
        }
    }

    /// Whether every record has its outcome.
    pub(super) fn is_complete(&self) -> bool {
        self.left == 0
    }

    /// The ids, in the order of the batch.
    pub(super) fn ids(&self) -> &[u64] {
        &self.ids
    }

    /// The outcomes, in the order of the batch.
    pub(super) fn finish(self, missing: impl Fn() -> Outcome) -> Vec<Outcome> {
        self.outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(&missing)).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use http_body_util::BodyExt as _;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        outcome::Reply,
        record::{Header, Position, Record, TopicPartition},
    };

    /// Deliveries of one route.
    pub(in crate::deliver) fn batch(count: u64) -> Vec<Delivery> {
        let text = "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: { mesh: test }\nspec:\n  routes:\n  - { name: work, service: worker, from: [in], handler: /work, to: [out], batch: { max: 10 } }\n";
        let table = mesh_routing::parse("test.yaml", text).and_then(|table| mesh_routing::compile(&table)).unwrap();
        let delivery = |id| Delivery {
            id,
            route: table.routes[0].clone(),
            record: Arc::new(Record {
                key: Some("k".into()),
                value: Some(format!("{{\"n\":{id}}}").into()),
                headers: vec![Header::new("content-type", "application/json")],
                timestamp_ms: Some(5),
            }),
            position: Position { partition: TopicPartition::new("in", 0), offset: id as i64 },
            attempt: 1,
            hops: 0,
            mesh_id: "x".into(),
            traceparent: Bytes::new(),
        };
        (1..=count).map(delivery).collect()
    }

    fn answer(status: u16, content_type: &'static str, body: impl Into<Bytes>) -> (Vec<Outcome>, u64) {
        let (unknown, mut headers) = (Counter::default(), HeaderMap::new());
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("7"));
        (outcomes(&batch(3), StatusCode::from_u16(status).unwrap(), &headers, body.into(), &unknown), unknown.get())
    }

    fn word(outcome: &Outcome) -> String {
        match outcome {
            Outcome::Reply(reply) => format!("{} {}", reply.status, String::from_utf8_lossy(reply.body.as_deref().unwrap_or_default())),
            Outcome::Retry { reason, .. } => format!("retry: {reason}"),
            other => format!("{other:?}"),
        }
    }

    fn words(answer: &(Vec<Outcome>, u64)) -> Vec<String> {
        answer.0.iter().map(word).collect()
    }

    #[tokio::test]
    async fn the_request_carries_all_records_in_order() {
        let request = request(&batch(3), Uri::from_static("/work"), None);
        assert_eq!(request.headers()["content-type"], "application/vnd.mesh.deliveries+json");
        assert_eq!(
            (&request.headers()["mesh-route"], &request.headers()["mesh-records"]),
            (&"work".parse().unwrap(), &"3".parse().unwrap())
        );
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["route"], "work");
        let record = &body["records"][1];
        assert_eq!((&record["id"], &record["offset"], &record["value"]), (&json!("2"), &json!(2), &json!({ "json": { "n": 2 } })));
    }

    #[test]
    fn each_record_has_the_outcome_that_names_it() {
        let body = json!({ "outcomes": [
            { "id": "3", "value": "three" }, { "id": 1, "status": 409, "value": "one" }, { "id": "3", "status": 500 }, { "id": "99" }, { "value": 1 },
        ] });
        let said = answer(207, "application/json", body.to_string());
        assert_eq!(words(&said), ["409 one", "retry: the handler's answer does not name this record", "200 three"]);
        assert_eq!(said.1, 3, "a repeated one, an unknown one, and one of nobody");
        let lines = "{\"id\":1}\n\n{\"id\":2,\"retry\":{\"reason\":\"busy\"}}\n{\"id\":\"3\",\"status\":\"x\"}\n";
        let said = answer(200, "application/x-ndjson; charset=utf-8", lines);
        assert_eq!(words(&said)[..2], ["200 ", "retry: busy"]);
        assert!(words(&said)[2].starts_with("retry: the outcome of this record cannot be read: "), "{said:?}");
    }

    #[test]
    fn what_is_said_to_the_whole_batch_is_said_to_each() {
        let wish = Some(std::time::Duration::from_secs(7));
        let (said, _) = answer(429, "text/plain", "slow down");
        assert!(
            said.len() == 3
                && said.iter().all(|one| matches!(one, Outcome::Reply(Reply { status: 429, retry_after, .. }) if *retry_after == wish))
        );
        assert_eq!(words(&answer(503, "text/plain", "later")), ["503 later"; 3]);
        assert_eq!(words(&answer(204, "text/plain", "")), ["204 "; 3]);
        assert_eq!(words(&answer(200, "text/plain", "")), ["200 "; 3]);
        for broken in ["ok", "{\"outcomes\":7}", "{\"records\":[]}", "[]"] {
            let said = words(&answer(200, "application/json", broken));
            assert!(
                said.len() == 3 && said.iter().all(|one| one.starts_with("retry: the answer (200) to a batch cannot be read")),
                "{said:?}"
            );
        }
    }
}
