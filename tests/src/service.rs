//! Services that are called by a sidecar: of foreign frameworks in Python, and light ones in this process. A [`Scenario`] says what they
//! answer, and each keeps a ledger of what it was given.
//!
//! Invariant: every HTTP service answers the same administration (`/ledger`, `/ledger/wait`, `/scenario`), whatever it is made of.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use axum::{
    Router,
    body::Body,
    extract::{Query, Request, State},
    response::Response,
    routing::{get, put},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::Method;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::Notify,
    task::JoinHandle,
};

use crate::{http::Http, ports::Port, process::Process, python::Python};

/// What a service answers, path by path; the JSON that `tests/python/scenario.py` describes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Scenario {
    /// The rules of each path; the first that fits decides, and without one the request's body comes back with 200.
    pub paths: HashMap<String, Vec<Rule>>,
    /// Keep the headers of each delivery in the ledger.
    pub headers: bool,
    /// Keep the body of each delivery in the ledger.
    pub bodies: bool,
}

impl Scenario {
    /// A scenario that keeps bodies and headers.
    pub fn new() -> Self {
        Self { paths: HashMap::new(), headers: true, bodies: true }
    }

    /// A scenario for many records: the ledger keeps neither bodies nor headers.
    pub fn light() -> Self {
        Self::default()
    }

    /// With the rules of a path.
    #[must_use]
    pub fn on(mut self, path: &str, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.paths.insert(path.to_owned(), rules.into_iter().collect());
        self
    }
}

/// A condition and an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Rule {
    #[serde(rename = "if", skip_serializing_if = "Condition::is_empty")]
    condition: Condition,
    status: u16,
    body: Value,
    delay_ms: u64,
    hang: bool,
    close: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<String>,
    headers: Vec<(String, String)>,
    raw_headers: Vec<(String, String)>,
}

impl Default for Rule {
    fn default() -> Self {
        Self::status(200)
    }
}

impl Rule {
    /// Answers this status, with the request's body.
    pub fn status(status: u16) -> Self {
        Self {
            condition: Condition::default(),
            status,
            body: json!("echo"),
            delay_ms: 0,
            hang: false,
            close: false,
            content_type: None,
            headers: Vec::new(),
            raw_headers: Vec::new(),
        }
    }

    /// Answers 200 with the request's body.
    pub fn echo() -> Self {
        Self::status(200)
    }

    /// With an empty body.
    #[must_use]
    pub fn empty(self) -> Self {
        self.with(json!("none"))
    }

    /// With this text as body.
    #[must_use]
    pub fn text(self, text: &str) -> Self {
        self.with(json!({ "text": text }))
    }

    /// With these bytes as body.
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        self.with(json!({ "base64": BASE64_STANDARD.encode(bytes) }))
    }

    /// With the request's JSON and these further fields as body.
    #[must_use]
    pub fn extend(self, fields: Value) -> Self {
        self.with(json!({ "add": fields }))
    }

    /// With the request's JSON, one of its fields grown by one, as body.
    #[must_use]
    pub fn increment(self, field: &str) -> Self {
        self.with(json!({ "increment": field }))
    }

    /// With a body of this many bytes.
    #[must_use]
    pub fn size(self, bytes: usize) -> Self {
        self.with(json!({ "size": bytes }))
    }

    fn with(mut self, body: Value) -> Self {
        self.body = body;
        self
    }

    /// With a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With a header of any bytes.
    #[must_use]
    pub fn raw_header(mut self, name: &str, value: &[u8]) -> Self {
        self.raw_headers.push((name.to_owned(), BASE64_STANDARD.encode(value)));
        self
    }

    /// With this content type.
    #[must_use]
    pub fn content_type(mut self, name: &str) -> Self {
        self.content_type = Some(name.to_owned());
        self
    }

    /// After this time.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay_ms = delay.as_millis() as u64;
        self
    }

    /// Never answers.
    #[must_use]
    pub fn hang(mut self) -> Self {
        self.hang = true;
        self
    }

    /// Breaks the connection after the request was read.
    #[must_use]
    pub fn close(mut self) -> Self {
        self.close = true;
        self
    }

    /// Only under a condition.
    #[must_use]
    pub fn when(mut self, condition: Condition) -> Self {
        self.condition = condition;
        self
    }
}

/// When a rule applies: all that are set must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Condition {
    /// Whether the body is JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<bool>,
    /// The attempt is below this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt_below: Option<u32>,
    /// Fewer calls than this came to the path before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls_below: Option<u64>,
    /// Fewer deliveries than this of the same `mesh-id` came to the path before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls_of_record_below: Option<u64>,
    /// The key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// A numeric field of the JSON body is below this; an absent one counts as 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field_below: Option<(String, i64)>,
    /// A field of the JSON body is this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field_equals: Option<(String, Value)>,
}

impl Condition {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn holds(&self, call: &Call<'_>) -> bool {
        let json = || serde_json::from_slice::<Value>(call.body).ok();
        self.json.is_none_or(|wanted| json().is_some() == wanted)
            && self.attempt_below.is_none_or(|bound| call.entry.attempt < bound)
            && self.calls_below.is_none_or(|bound| call.calls < bound)
            && self.calls_of_record_below.is_none_or(|bound| call.of_record < bound)
            && self.key.as_ref().is_none_or(|key| call.entry.key.as_ref() == Some(key))
            && self
                .field_below
                .as_ref()
                .is_none_or(|(field, bound)| json().is_some_and(|value| value.is_object() && value[field].as_i64().unwrap_or(0) < *bound))
            && self.field_equals.as_ref().is_none_or(|(field, wanted)| json().is_some_and(|value| value[field] == *wanted))
    }
}

struct Call<'a> {
    entry: &'a Entry,
    body: &'a [u8],
    calls: u64,
    of_record: u64,
}

/// One delivery that a service was given.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// Its number in the ledger, from 0.
    pub n: u64,
    /// The handler's path.
    pub path: String,
    /// `mesh-id`.
    pub id: String,
    /// `mesh-route`.
    pub route: String,
    /// `mesh-topic`.
    pub topic: String,
    /// `mesh-partition`, −1 if it was absent.
    pub partition: i32,
    /// `mesh-offset`, −1 if it was absent.
    pub offset: i64,
    /// `mesh-attempt`, 0 if it was absent.
    pub attempt: u32,
    /// `mesh-hops`, −1 if it was absent.
    pub hops: i64,
    /// `mesh-key`, decoded.
    pub key: Option<String>,
    /// When it came, in milliseconds since 1970-01-01 UTC.
    pub time_ms: u64,
    /// The body, base64, if bodies are kept.
    pub body: Option<String>,
    /// The headers by lower-case name, if headers are kept.
    pub headers: HashMap<String, String>,
}

impl Entry {
    /// The body, if it was kept.
    pub fn bytes(&self) -> Vec<u8> {
        self.body.as_ref().and_then(|body| BASE64_STANDARD.decode(body).ok()).unwrap_or_default()
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes()).unwrap_or_default()
    }

    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// A running HTTP service.
#[derive(Debug)]
pub struct Service {
    address: SocketAddr,
    http: Http,
    runs: Runs,
    _port: Option<Port>,
}

#[derive(Debug)]
enum Runs {
    Python(Box<Foreign>),
    Native(JoinHandle<()>),
}

#[derive(Debug)]
struct Foreign {
    python: Python,
    script: &'static str,
    process: Option<Process>,
    scenario: Scenario,
    log: PathBuf,
}

impl Drop for Runs {
    fn drop(&mut self) {
        if let Self::Native(task) = self {
            task.abort();
        }
    }
}

impl Service {
    /// A service of a foreign framework: `service.py` (FastAPI on uvicorn) or `flask_service.py` (Flask on waitress), with its log in `folder`.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn python(python: &Python, script: &'static str, folder: &Path, scenario: Scenario) -> Result<Self> {
        let port = Port::take()?;
        let address = port.address();
        let log = folder.join(format!("{script}-{}.log", port.number()));
        let runs = Runs::Python(Box::new(Foreign { python: python.clone(), script, process: None, scenario, log }));
        let mut service = Self { address, http: Http::new(address), runs, _port: Some(port) };
        service.start().await?;
        Ok(service)
    }

    /// A light service in this process; HTTP/1.1, and HTTP/2 with prior knowledge.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn native(scenario: Scenario) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Arc::new(Native::new(scenario));
        let router = Router::new()
            .route("/ledger", get(ledger_page).delete(ledger_reset))
            .route("/ledger/wait", get(ledger_wait))
            .route("/scenario", put(scenario_set))
            .fallback(handle)
            .with_state(state);
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the service ended: {error}");
            }
        });
        Ok(Self { address, http: Http::new(address), runs: Runs::Native(task), _port: None })
    }

    /// Its address as a sidecar's configuration names it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The same for HTTP/2 with prior knowledge.
    pub fn h2c_url(&self) -> String {
        format!("h2c://{}", self.address)
    }

    /// Starts it again after [`Service::kill`], at the same address, with an empty ledger.
    ///
    /// # Errors
    /// If it does not start, or runs in this process.
    pub async fn start(&mut self) -> Result<()> {
        let Runs::Python(foreign) = &mut self.runs else { anyhow::bail!("a native service cannot be started again") };
        let Foreign { python, script, process, scenario, log } = &mut **foreign;
        let mut command = python.command(script);
        command.args(["--port", &self.address.port().to_string(), "--scenario", &serde_json::to_string(scenario)?]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut started = Process::start(*script, command, log)?;
        started.ready_port(Duration::from_secs(60)).await?;
        *process = Some(started);
        Ok(())
    }

    /// `kill -9`: connections to it are refused from now on.
    ///
    /// # Errors
    /// If it does not run, or runs in this process.
    pub async fn kill(&mut self) -> Result<()> {
        self.process()?.kill9().await
    }

    /// Stops (`SIGSTOP`) or continues it: while it is stopped, connections are accepted and nothing is answered.
    ///
    /// # Errors
    /// If it does not run, or runs in this process.
    pub fn freeze(&mut self, frozen: bool) -> Result<()> {
        self.process()?.signal(if frozen { Signal::STOP } else { Signal::CONT })
    }

    fn process(&mut self) -> Result<&mut Process> {
        match &mut self.runs {
            Runs::Python(foreign) => foreign.process.as_mut().context("the service is not started"),
            Runs::Native(_) => anyhow::bail!("the service is no process"),
        }
    }

    /// Changes what it answers from now on.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn set(&mut self, scenario: Scenario) -> Result<()> {
        let body = serde_json::to_vec(&scenario)?;
        self.http.send(Method::PUT, "/scenario", &[("content-type", "application/json")], body.into()).await?.expect(200)?;
        if let Runs::Python(foreign) = &mut self.runs {
            foreign.scenario = scenario;
        }
        Ok(())
    }

    /// Empties the ledger.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn reset(&self) -> Result<()> {
        self.http.send(Method::DELETE, "/ledger", &[], Bytes::new()).await?.expect(200)?;
        Ok(())
    }

    /// The whole ledger.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn ledger(&self) -> Result<Vec<Entry>> {
        #[derive(Deserialize)]
        struct Page {
            total: usize,
            entries: Vec<Entry>,
        }
        let mut all = Vec::new();
        loop {
            let answer = self.http.get(&format!("/ledger?start={}&size=5000", all.len())).await?.expect(200)?;
            let page: Page = serde_json::from_slice(&answer.body)?;
            let empty = page.entries.is_empty();
            all.extend(page.entries);
            if empty || all.len() >= page.total {
                return Ok(all);
            }
        }
    }

    /// The deliveries to one path.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn ledger_of(&self, path: &str) -> Result<Vec<Entry>> {
        Ok(self.ledger().await?.into_iter().filter(|entry| entry.path == path).collect())
    }

    /// How many deliveries it got.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn total(&self) -> Result<u64> {
        self.wait_at_most(0, Duration::ZERO).await
    }

    /// Waits until it got this many deliveries.
    ///
    /// # Errors
    /// If they do not come in time.
    pub async fn wait(&self, total: u64, deadline: Duration) -> Result<u64> {
        let got = self.wait_at_most(total, deadline).await?;
        ensure!(got >= total, "the service got {got} of {total} deliveries in {deadline:?}");
        Ok(got)
    }

    /// Waits until it got this many deliveries or the time is over, and says how many it got.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn wait_at_most(&self, total: u64, time: Duration) -> Result<u64> {
        let end = Instant::now() + time;
        loop {
            // In steps, so that no proxy or client deadline cuts a long wait.
            let left = end.saturating_duration_since(Instant::now()).min(Duration::from_secs(20)).as_secs_f64();
            let answer = self.http.get(&format!("/ledger/wait?total={total}&timeout={left:.3}")).await?.expect(200)?;
            let got = answer.json()?["total"].as_u64().context("a total")?;
            if got >= total || Instant::now() >= end {
                return Ok(got);
            }
        }
    }
}

/// The state of a native service.
#[derive(Debug)]
struct Native {
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

/// A listener that speaks raw bytes, for what no framework would say.
#[derive(Debug)]
pub struct RawService {
    address: SocketAddr,
    calls: tokio::sync::watch::Receiver<u64>,
    task: JoinHandle<()>,
}

/// What a [`RawService`] does with a connection.
#[derive(Clone, Debug)]
pub enum Raw {
    /// Resets it before anything is read.
    Reset,
    /// Reads a request and resets it.
    ReadAndReset,
    /// Answers every request with these bytes, as they are.
    Say(Vec<u8>),
}

impl RawService {
    /// Listens. The connection of number n is treated by `plan[n]`, later ones by the last entry; an empty plan resets all.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(plan: Vec<Raw>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (count, calls) = tokio::sync::watch::channel(0);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let number = usize::try_from(*count.borrow()).unwrap_or(usize::MAX);
                let act = plan.get(number).or(plan.last()).cloned().unwrap_or(Raw::Reset);
                count.send_modify(|count| *count += 1);
                connections.spawn(async move {
                    // A broken connection is what this service is for.
                    let _ = talk(stream, act).await;
                });
            }
        });
        Ok(Self { address, calls, task })
    }

    /// Its address as a sidecar's configuration names it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Waits until it got this many connections.
    ///
    /// # Errors
    /// If they do not come in time.
    pub async fn wait(&self, connections: u64, deadline: Duration) -> Result<()> {
        let mut calls = self.calls.clone();
        let reached = calls.wait_for(|count| *count >= connections);
        tokio::time::timeout(deadline, reached).await.context("connections")??;
        Ok(())
    }
}

impl Drop for RawService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn talk(mut stream: tokio::net::TcpStream, act: Raw) -> Result<()> {
    match act {
        // Zero linger: the close sends RST.
        Raw::Reset => stream.set_zero_linger()?,
        Raw::ReadAndReset => {
            read_request(&mut stream).await?;
            stream.set_zero_linger()?;
        }
        Raw::Say(bytes) => loop {
            read_request(&mut stream).await?;
            stream.write_all(&bytes).await?;
        },
    }
    Ok(())
}

/// Reads one HTTP/1.1 request with a `content-length`, or none and no body.
async fn read_request(stream: &mut tokio::net::TcpStream) -> Result<()> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length:")).map_or(0, |text| text.trim().parse().unwrap_or(0));
            if bytes.len() >= end + 4 + length {
                return Ok(());
            }
        }
        ensure!(stream.read_buf(&mut bytes).await? > 0, "the connection ended");
    }
}
