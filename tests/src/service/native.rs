//! The light service in this process.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use axum::{
    Router,
    body::Body,
    extract::{Query, Request, State},
    response::Response,
    routing::{get, put},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::scenario::{Call, Entry, Rule, Scenario};

/// The state of a native service.
#[derive(Debug)]
pub(super) struct Native {
    books: Mutex<Books>,
    grown: Notify,
}

#[derive(Debug, Default)]
struct Books {
    scenario: Scenario,
    entries: Vec<Entry>,
    calls: HashMap<String, u64>,
    of_record: HashMap<(String, String), u64>,
}

impl Native {
    /// Its paths: the administration, and everything else is a handler.
    pub(super) fn router(scenario: Scenario) -> Router {
        Router::new()
            .route("/ledger", get(ledger_page).delete(ledger_reset))
            .route("/ledger/wait", get(ledger_wait))
            .route("/scenario", put(scenario_set))
            .fallback(handle)
            .with_state(Arc::new(Self::new(scenario)))
    }

    fn new(scenario: Scenario) -> Self {
        Self { books: Mutex::new(Books { scenario, ..Books::default() }), grown: Notify::new() }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receive(&self, path: &str, headers: &HashMap<String, String>, body: &[u8]) -> Rule {
        let text = |name: &str| headers.get(name).cloned().unwrap_or_default();
        let mut books = self.books();
        let books = &mut *books;
        let mut entry = Entry {
            n: books.entries.len() as u64,
            path: path.to_owned(),
            id: text("mesh-id"),
            route: text("mesh-route"),
            topic: text("mesh-topic"),
            partition: text("mesh-partition").parse().unwrap_or(-1),
            offset: text("mesh-offset").parse().unwrap_or(-1),
            attempt: text("mesh-attempt").parse().unwrap_or(0),
            hops: text("mesh-hops").parse().unwrap_or(-1),
            key: headers.get("mesh-key").map(|key| percent_decode(key)),
            time_ms: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
            body: None,
            headers: HashMap::new(),
        };
        let calls = books.calls.entry(path.to_owned()).or_default();
        let of_record = books.of_record.entry((path.to_owned(), entry.id.clone())).or_default();
        let call = Call { entry: &entry, body, calls: *calls, of_record: *of_record };
        let rules = books.scenario.paths.get(path);
        let rule = rules.and_then(|rules| rules.iter().find(|rule| rule.condition.holds(&call))).cloned().unwrap_or_default();
        *calls += 1;
        *of_record += 1;
        if books.scenario.bodies {
            entry.body = Some(BASE64_STANDARD.encode(body));
        }
        if books.scenario.headers {
            entry.headers.clone_from(headers);
        }
        books.entries.push(entry);
        self.grown.notify_waiters();
        rule
    }
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn json_answer(value: &Value) -> Response {
    Response::new(Body::from(value.to_string()))
}

fn number(query: &HashMap<String, String>, name: &str, default: f64) -> f64 {
    query.get(name).and_then(|text| text.parse().ok()).unwrap_or(default)
}

async fn ledger_page(State(state): State<Arc<Native>>, Query(query): Query<HashMap<String, String>>) -> Response {
    let (start, size) = (number(&query, "start", 0.0) as usize, number(&query, "size", 5000.0) as usize);
    let books = state.books();
    let page: Vec<&Entry> = books.entries.iter().skip(start).take(size).collect();
    json_answer(&json!({ "total": books.entries.len(), "entries": page }))
}

async fn ledger_reset(State(state): State<Arc<Native>>) -> Response {
    let mut books = state.books();
    *books = Books { scenario: std::mem::take(&mut books.scenario), ..Books::default() };
    json_answer(&json!({}))
}

async fn ledger_wait(State(state): State<Arc<Native>>, Query(query): Query<HashMap<String, String>>) -> Response {
    let total = number(&query, "total", 0.0) as usize;
    let end = tokio::time::Instant::now() + Duration::from_secs_f64(number(&query, "timeout", 0.0));
    loop {
        // Registered before the look, so that no growth is missed.
        let grown = state.grown.notified();
        let got = state.books().entries.len();
        if got >= total || tokio::time::timeout_at(end, grown).await.is_err() {
            return json_answer(&json!({ "total": got }));
        }
    }
}

async fn scenario_set(State(state): State<Arc<Native>>, axum::Json(scenario): axum::Json<Scenario>) -> Response {
    state.books().scenario = scenario;
    json_answer(&json!({}))
}

async fn handle(State(state): State<Arc<Native>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, 64 << 20).await else {
        return answer(400, Body::from("no body"));
    };
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let headers: HashMap<String, String> = head.headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect();
    let rule = state.receive(head.uri.path(), &headers, &body);
    if rule.delay_ms > 0 {
        tokio::time::sleep(Duration::from_millis(rule.delay_ms)).await;
    }
    if rule.hang {
        std::future::pending::<()>().await;
    }
    if rule.close {
        // A body that fails before its first byte makes the server break the connection.
        let broken = futures_util::stream::once(async { Err::<Bytes, _>(std::io::Error::other("broken by the scenario")) });
        return Response::new(Body::from_stream(broken));
    }
    let bytes = make_body(&rule.body, &body);
    let mut response = answer(rule.status, Body::from(bytes.clone()));
    let content_type = rule.content_type.clone().or_else(|| headers.get("content-type").cloned());
    if !bytes.is_empty()
        && let Some(value) = content_type.and_then(|value| value.parse().ok())
    {
        response.headers_mut().insert("content-type", value);
    }
    let plain = rule.headers.iter().map(|(name, value)| (name, value.clone().into_bytes()));
    let raw = rule.raw_headers.iter().map(|(name, value)| (name, BASE64_STANDARD.decode(value).unwrap_or_default()));
    for (name, value) in plain.chain(raw) {
        if let (Ok(name), Ok(value)) = (http::HeaderName::try_from(name), http::HeaderValue::from_bytes(&value)) {
            response.headers_mut().append(name, value);
        }
    }
    response
}

fn answer(status: u16, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or_default();
    response
}

fn make_body(spec: &Value, body: &Bytes) -> Bytes {
    let object = || serde_json::from_slice::<Value>(body).unwrap_or_else(|_| json!({}));
    if spec == "none" {
        Bytes::new()
    } else if let Some(text) = spec["text"].as_str() {
        Bytes::from(text.to_owned())
    } else if let Some(encoded) = spec["base64"].as_str() {
        BASE64_STANDARD.decode(encoded).unwrap_or_default().into()
    } else if let Some(size) = spec["size"].as_u64() {
        vec![b'x'; size as usize].into()
    } else if let Some(value) = spec.get("json") {
        value.to_string().into()
    } else if let Some(fields) = spec["add"].as_object() {
        let mut value = object();
        for (name, field) in fields {
            value[name] = field.clone();
        }
        value.to_string().into()
    } else if let Some(field) = spec["increment"].as_str() {
        let mut value = object();
        value[field] = json!(value[field].as_i64().unwrap_or(0) + 1);
        value.to_string().into()
    } else {
        body.clone()
    }
}
