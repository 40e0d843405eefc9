//! The service that is called: HTTP/1.1, in this process so that its ledger outlives its death, which is that of its sockets. It has a handler for each line.
//!
//! Invariant: what it does with a record follows from its line, its name and the fault that holds; the ledger has both its start and its end.
//! Invariant: of a batch, records of one key are worked on one after the other, up to the first that fails; those behind it are not begun. Without an
//! order all are worked on at once.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

use super::{
    ledger::{Answer, Ledger, Place},
    lines::{Line, Order},
    payload::{Name, Payload, Treatment},
};
use crate::ports::Port;

/// What the service does besides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mood {
    /// Nothing.
    Well,
    /// It takes requests and answers none.
    Hangs,
    /// Most answers are 500 to 504.
    Storms,
    /// Every answer takes a second longer.
    Slow,
}

/// The service. Ends when it is dropped.
#[derive(Debug)]
pub struct Service {
    port: Port,
    inside: Arc<Inside>,
    serving: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Inside {
    /// By the path of the handler.
    lines: Vec<(Line, Arc<Ledger>)>,
    run: String,
    mood: AtomicU8,
}

impl Service {
    /// A service of this run; it listens after [`Service::up`].
    ///
    /// # Errors
    /// If there is no port.
    pub fn new(run: &str, lines: Vec<(Line, Arc<Ledger>)>) -> Result<Self> {
        let inside = Arc::new(Inside { lines, run: run.to_owned(), mood: AtomicU8::new(Mood::Well as u8) });
        Ok(Self { port: Port::take()?, inside, serving: Mutex::default() })
    }

    /// Its address as a sidecar's configuration names it.
    pub fn url(&self) -> String {
        format!("http://{}", self.port.address())
    }

    /// Listens.
    ///
    /// # Errors
    /// If it cannot.
    pub async fn up(&self) -> Result<()> {
        let listener = TcpListener::bind(self.port.address()).await.context("the service's port")?;
        let inside = self.inside.clone();
        let task = tokio::spawn(async move {
            // Dropped with the task: every connection breaks.
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((stream, _)) = accepted else { continue };
                        let inside = inside.clone();
                        connections.spawn(async move {
                            let serve = service_fn(move |request| answer(inside.clone(), request));
                            // A client that goes away is no error of the service.
                            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), serve).await;
                        });
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        *self.serving.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        Ok(())
    }

    /// Dies: its connections break, new ones are refused.
    pub async fn down(&self) {
        let task = self.serving.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            task.abort();
            // Its end is the abort.
            let _ = task.await;
        }
    }

    /// What it does from now on.
    pub fn mood(&self, mood: Mood) {
        self.inside.mood.store(mood as u8, Ordering::Relaxed);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(task) = self.serving.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

/// A delivery in the ledger; one that is dropped before its end was left by its caller.
struct Entered {
    ledger: Arc<Ledger>,
    place: Place,
    name: Name,
    uuid: uuid::Uuid,
    attempt: u32,
    ended: bool,
}

impl Entered {
    fn begin(ledger: &Arc<Ledger>, place: Place, name: Name, uuid: uuid::Uuid, attempt: u32) -> Self {
        ledger.start(place, name, uuid, attempt);
        Self { ledger: ledger.clone(), place, name, uuid, attempt, ended: false }
    }

    fn end(mut self, answer: Answer) {
        self.ended = true;
        self.ledger.end(self.place, self.name, self.uuid, self.attempt, answer);
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if !self.ended {
            self.ledger.end(self.place, self.name, self.uuid, self.attempt, Answer::Gone);
        }
    }
}

fn header<T: std::str::FromStr>(headers: &HeaderMap, name: &str) -> Option<T> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

fn status(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
}

async fn answer(inside: Arc<Inside>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await else { return Ok(status(StatusCode::BAD_REQUEST, "no body")) };
    let body = body.to_bytes();
    let line = inside.lines.iter().find(|(line, _)| head.uri.path().strip_prefix('/') == Some(line.name));
    let Some((line, ledger)) = line else { return Ok(status(StatusCode::NOT_FOUND, "no such handler")) };
    Ok(match line.batch {
        Some(_) => inside.batch(line, ledger, &body).await,
        None => inside.single(line, ledger, &head.headers, body).await,
    })
}

/// A record of a batch, as far as it matters.
#[derive(Deserialize)]
struct Item<'b> {
    id: String,
    attempt: u32,
    partition: i32,
    offset: i64,
    key: Text,
    #[serde(borrow)]
    value: Json<'b>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
}

#[derive(Deserialize)]
struct Json<'b> {
    #[serde(borrow)]
    json: &'b RawValue,
}

#[derive(Deserialize)]
struct Batch<'b> {
    #[serde(borrow)]
    records: Vec<Item<'b>>,
}

impl Inside {
    /// A record as it came, if it is one of this run.
    fn read(&self, value: &[u8], key: &str) -> Result<(Name, uuid::Uuid)> {
        let payload = Payload::parse(value)?;
        anyhow::ensure!(payload.run == self.run, "of the run {}", payload.run);
        anyhow::ensure!(key == payload.key, "the key {key} with the value of {}", payload.key);
        Ok((payload.name()?, payload.uuid))
    }

    async fn single(&self, line: &Line, ledger: &Arc<Ledger>, headers: &HeaderMap, body: Bytes) -> Response<Full<Bytes>> {
        let place = header(headers, "mesh-partition").zip(header(headers, "mesh-offset"));
        let read = || {
            let (name, uuid) = self.read(&body, &header::<String>(headers, "mesh-key").context("no mesh-key")?)?;
            let (partition, offset) = place.context("no mesh-partition or mesh-offset")?;
            anyhow::Ok((name, uuid, Place { partition, offset }))
        };
        let (name, uuid, place) = match read() {
            Ok(known) => known,
            Err(error) => {
                ledger.damaged(format!("{place:?}: {error:#}: {}", String::from_utf8_lossy(&body)));
                return status(StatusCode::BAD_REQUEST, "damaged");
            }
        };
        let attempt = header(headers, "mesh-attempt").unwrap_or(1);
        let entered = Entered::begin(ledger, place, name, uuid, attempt);
        self.dwell().await;
        match self.work(line, entered).await {
            StatusCode::OK => {
                let mut response = status(StatusCode::OK, body);
                response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
                response
            }
            StatusCode::NO_CONTENT => status(StatusCode::NO_CONTENT, Bytes::new()),
            code => status(code, "not now, or never"),
        }
    }

    async fn batch(&self, line: &Line, ledger: &Arc<Ledger>, body: &Bytes) -> Response<Full<Bytes>> {
        let batch: Batch<'_> = match serde_json::from_slice(body) {
            Ok(batch) => batch,
            Err(error) => {
                ledger.damaged(format!("a batch: {error}: {}", String::from_utf8_lossy(body)));
                return status(StatusCode::BAD_REQUEST, "damaged");
            }
        };
        self.dwell().await;
        let mut lanes: BTreeMap<&str, Vec<&Item<'_>>> = BTreeMap::new();
        for item in &batch.records {
            lanes.entry(if line.order == Order::None { &item.id } else { &item.key.text }).or_default().push(item);
        }
        let outcomes = join_all(lanes.values().map(|items| self.of_lane(line, ledger, items))).await.concat();
        let mut response = status(StatusCode::MULTI_STATUS, format!("{{\"outcomes\":[{}]}}", outcomes.join(",")));
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
        response
    }

    /// The outcomes of a batch's records that go one after the other.
    async fn of_lane(&self, line: &Line, ledger: &Arc<Ledger>, items: &[&Item<'_>]) -> Vec<String> {
        let mut outcomes = Vec::with_capacity(items.len());
        for item in items {
            let (id, value) = (&item.id, item.value.json.get());
            let place = Place { partition: item.partition, offset: item.offset };
            let (name, uuid) = match self.read(value.as_bytes(), &item.key.text) {
                Ok(known) => known,
                Err(error) => {
                    ledger.damaged(format!("{place}: {error:#}: {value}"));
                    outcomes.push(format!("{{\"id\":\"{id}\",\"status\":400}}"));
                    continue;
                }
            };
            match self.work(line, Entered::begin(ledger, place, name, uuid, item.attempt)).await {
                StatusCode::OK => outcomes.push(format!("{{\"id\":\"{id}\",\"value\":{{\"json\":{value}}}}}")),
                code => {
                    outcomes.push(format!("{{\"id\":\"{id}\",\"status\":{}}}", code.as_u16()));
                    if code.is_server_error() {
                        break;
                    }
                }
            }
        }
        outcomes
    }

    /// What holds up a whole call.
    async fn dwell(&self) {
        if self.mood.load(Ordering::Relaxed) == Mood::Slow as u8 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Works on a record, enters its end, and says which status it has.
    async fn work(&self, line: &Line, entered: Entered) -> StatusCode {
        let Entered { name, uuid, attempt, .. } = entered;
        let (mood, treatment) = (self.mood.load(Ordering::Relaxed), line.treatment(name));
        let delay = Duration::from_millis(name.delay_ms());
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if mood == Mood::Hangs as u8 {
            // Until the caller gives up, or the service dies.
            std::future::pending::<()>().await;
        }
        let storm = mood == Mood::Storms as u8 && uuid.as_u128().wrapping_add(u128::from(attempt)) % 8 != 0;
        if storm || matches!(treatment, Treatment::Fails(first) if attempt <= first) {
            entered.end(Answer::Fail);
            // 503 means that no service is there, and counts no attempt.
            let codes =
                [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];
            return codes[if storm { name.seq as usize % codes.len() } else { 0 }];
        }
        match treatment {
            Treatment::Poison => {
                entered.end(Answer::Reject);
                StatusCode::BAD_REQUEST
            }
            Treatment::Ignore => {
                entered.end(Answer::Ignore);
                StatusCode::NO_CONTENT
            }
            Treatment::Reply | Treatment::Fails(_) | Treatment::Slips => {
                entered.end(Answer::Reply);
                StatusCode::OK
            }
        }
    }
}
