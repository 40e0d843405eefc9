//! The service that is called: HTTP/1.1, in this process so that its ledger outlives its death, which is that of its sockets.
//!
//! Invariant: what it does with a record follows from the record's name and the fault that holds; the ledger has both its start and its end.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

use super::{
    ledger::{Answer, Ledger, Place},
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
    run: String,
    serving: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Inside {
    ledger: Arc<Ledger>,
    run: String,
    mood: AtomicU8,
}

impl Service {
    /// A service of this run; it listens after [`Service::up`].
    ///
    /// # Errors
    /// If there is no port.
    pub fn new(run: &str, ledger: Arc<Ledger>) -> Result<Self> {
        let inside = Arc::new(Inside { ledger, run: run.to_owned(), mood: AtomicU8::new(Mood::Well as u8) });
        Ok(Self { port: Port::take()?, inside, run: run.to_owned(), serving: Mutex::default() })
    }

    /// Its address as a sidecar's configuration names it.
    pub fn url(&self) -> String {
        format!("http://{}", self.port.address())
    }

    /// The run whose records it takes.
    pub fn run(&self) -> &str {
        &self.run
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
    let place = header(&head.headers, "mesh-partition").zip(header(&head.headers, "mesh-offset"));
    let read = || {
        let payload = Payload::parse(&body)?;
        anyhow::ensure!(payload.run == inside.run, "of the run {}", payload.run);
        let name = payload.name()?;
        let key: String = header(&head.headers, "mesh-key").context("no mesh-key")?;
        anyhow::ensure!(key == payload.key, "the key {key} with the value of {}", payload.key);
        let (partition, offset) = place.context("no mesh-partition or mesh-offset")?;
        anyhow::Ok((name, payload.uuid, Place { partition, offset }))
    };
    let (name, uuid, place) = match read() {
        Ok(known) => known,
        Err(error) => {
            inside.ledger.damaged(format!("{place:?}: {error:#}: {}", String::from_utf8_lossy(&body)));
            return Ok(status(StatusCode::BAD_REQUEST, "damaged"));
        }
    };
    let attempt = header(&head.headers, "mesh-attempt").unwrap_or(1);
    inside.ledger.start(place, name, uuid, attempt);
    let entered = Entered { ledger: inside.ledger.clone(), place, name, uuid, attempt, ended: false };

    let mood = inside.mood.load(Ordering::Relaxed);
    let mut delay = Duration::from_millis(name.delay_ms());
    if mood == Mood::Slow as u8 {
        delay += Duration::from_secs(1);
    }
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    if mood == Mood::Hangs as u8 {
        // Until the caller gives up, or the service dies.
        std::future::pending::<()>().await;
    }
    let storm = mood == Mood::Storms as u8 && uuid.as_u128().wrapping_add(u128::from(attempt)) % 8 != 0;
    if storm || (name.treatment() == Treatment::Flaky && attempt == 1) {
        entered.end(Answer::Fail);
        // 503 means that no service is there, and counts no attempt.
        let code =
            [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT]
                [if storm { name.seq as usize % 4 } else { 0 }];
        return Ok(status(code, "not now"));
    }
    Ok(match name.treatment() {
        Treatment::Poison => {
            entered.end(Answer::Reject);
            status(StatusCode::BAD_REQUEST, "never")
        }
        Treatment::Ignore => {
            entered.end(Answer::Ignore);
            status(StatusCode::NO_CONTENT, Bytes::new())
        }
        Treatment::Reply | Treatment::Flaky => {
            entered.end(Answer::Reply);
            let mut response = status(StatusCode::OK, body);
            response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
            response
        }
    })
}
