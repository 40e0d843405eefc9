//! A service that takes batches: what it says to each is a plain function.

use std::{
    collections::HashMap,
    future::{Future, ready},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::HeaderMap,
    response::Response,
};
use futures_util::{FutureExt as _, future::BoxFuture};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

/// One call that it got.
#[derive(Clone, Debug)]
pub struct BatchCall {
    /// Its number, from 0.
    pub number: usize,
    /// When it came.
    pub at: Instant,
    /// The request's headers.
    pub headers: HashMap<String, String>,
    /// The entries of `records`.
    pub records: Vec<Value>,
}

/// The value of an entry, which is JSON.
pub fn value(entry: &Value) -> &Value {
    &entry["value"]["json"]
}

/// An answer.
#[derive(Clone, Debug)]
pub struct BatchAnswer {
    /// The status.
    pub status: u16,
    /// The content type.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
    /// How long it takes.
    pub delay: Duration,
}

impl BatchAnswer {
    /// These outcomes, as JSON.
    pub fn outcomes(outcomes: impl IntoIterator<Item = Value>) -> Self {
        let body = json!({ "outcomes": outcomes.into_iter().collect::<Vec<_>>() }).to_string();
        Self { status: 207, content_type: "application/json", body, delay: Duration::ZERO }
    }

    /// A status with this text for the whole batch.
    pub fn whole(status: u16, body: &str) -> Self {
        Self { status, content_type: "text/plain", body: body.to_owned(), delay: Duration::ZERO }
    }

    /// Each entry's own value, as an answer.
    pub fn echo(call: &BatchCall) -> Self {
        Self::outcomes(call.records.iter().map(|entry| json!({ "id": entry["id"], "value": entry["value"] })))
    }

    /// After this time.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }
}

type Answers = dyn Fn(&BatchCall) -> BoxFuture<'static, BatchAnswer> + Send + Sync;

struct Books {
    calls: watch::Sender<Vec<BatchCall>>,
    answers: Box<Answers>,
}

/// A running service; HTTP/1.1, and HTTP/2 with prior knowledge.
#[derive(Debug)]
pub struct BatchService {
    address: SocketAddr,
    calls: watch::Receiver<Vec<BatchCall>>,
    task: JoinHandle<()>,
}

impl BatchService {
    /// Listens.
    ///
    /// # Errors
    /// If it cannot.
    pub async fn start(answers: impl Fn(&BatchCall) -> BatchAnswer + Send + Sync + 'static) -> Result<Self> {
        Self::start_with(move |call| ready(answers(call))).await
    }

    /// The same, with answers that take their time.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start_with<F>(answers: impl Fn(&BatchCall) -> F + Send + Sync + 'static) -> Result<Self>
    where
        F: Future<Output = BatchAnswer> + Send + 'static,
    {
        let answers = move |call: &BatchCall| answers(call).boxed();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (sender, calls) = watch::channel(Vec::new());
        let router = Router::new().fallback(handle).with_state(Arc::new(Books { calls: sender, answers: Box::new(answers) }));
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the service ended: {error}");
            }
        });
        Ok(Self { address, calls, task })
    }

    /// Its address as a sidecar's configuration names it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The same for HTTP/2 with prior knowledge.
    pub fn h2c_url(&self) -> String {
        format!("h2c://{}", self.address)
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<BatchCall> {
        self.calls.borrow().clone()
    }

    /// Waits for so many calls.
    ///
    /// # Errors
    /// If they do not come in time.
    pub async fn wait(&self, calls: usize, deadline: Duration) -> Result<()> {
        let mut watch = self.calls.clone();
        tokio::time::timeout(deadline, watch.wait_for(|all| all.len() >= calls)).await.context("calls")??;
        Ok(())
    }
}

impl Drop for BatchService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn handle(State(books): State<Arc<Books>>, headers: HeaderMap, body: Bytes) -> Response {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let mut read: Value = serde_json::from_slice(&body).unwrap_or_default();
    let records = read["records"].as_array_mut().map(std::mem::take).unwrap_or_default();
    let headers = headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect();
    let mut call = BatchCall { number: 0, at: Instant::now(), headers, records };
    books.calls.send_modify(|calls| {
        call.number = calls.len();
        calls.push(call.clone());
    });
    let answer = (books.answers)(&call).await;
    tokio::time::sleep(answer.delay).await;
    let mut response = Response::new(Body::from(answer.body));
    *response.status_mut() = http::StatusCode::from_u16(answer.status).unwrap_or_default();
    response.headers_mut().insert("content-type", http::HeaderValue::from_static(answer.content_type));
    response
}
