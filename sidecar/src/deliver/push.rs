//! Calls the service: a pool of workers, each with one call at a time and, for HTTP/1.1, a connection of its own.
//!
//! A worker drives its connection itself, so a call costs no hand-over between tasks but the one that brings the delivery.
//!
//! Invariant: a worker is idle or has one delivery; it answers it once, whatever happens.
//! Invariant: redirects are never followed, and no proxy variable is read.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Uri};
use hyper::client::conn::http2;
use mesh_proto::v1::handler_client::HandlerClient;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};

use super::{
    connect::{self, Http1, Target, drive, read_body},
    grpc,
    http::{self as http_form, Uris},
};
use crate::{
    config::AppAddress,
    outcome::{Answer, Delivery, Outcome},
};

/// How a service is called, one delivery a call.
#[derive(Clone)]
enum Protocol {
    Http1 { target: Target, host: HeaderValue },
    H2c { target: Target, base: String, shared: Arc<tokio::sync::Mutex<Option<http2::SendRequest<http_body_util::Full<Bytes>>>>> },
    Grpc { client: HandlerClient<Channel> },
}

/// The workers of one route.
pub(crate) struct PushPool {
    protocol: Protocol,
    limit: usize,
    answers: mpsc::Sender<Answer>,
    workers: Vec<mpsc::Sender<Delivery>>,
    idle: Arc<Mutex<Vec<usize>>>,
    tasks: TaskTracker,
}

impl PushPool {
    /// A pool for a service. `limit` is the largest answer that is taken, in bytes; `answers` must hold as many answers as deliveries are
    /// ever out.
    ///
    /// # Errors
    /// If the address cannot be an address.
    pub(crate) fn new(app: &AppAddress, limit: usize, answers: mpsc::Sender<Answer>, tasks: TaskTracker) -> Result<Self, String> {
        let protocol = match app {
            AppAddress::Http(authority) => Protocol::Http1 { target: Target::Tcp(with_port(authority)), host: host(authority)? },
            AppAddress::Unix(path) => Protocol::Http1 { target: Target::Unix(path.clone()), host: HeaderValue::from_static("localhost") },
            AppAddress::H2c(authority) => Protocol::H2c {
                target: Target::Tcp(with_port(authority)),
                base: format!("http://{}", strip(authority)),
                shared: Arc::default(),
            },
            AppAddress::Grpc(authority) => Protocol::Grpc { client: grpc::client(channel(authority)?, limit) },
        };
        Ok(Self { protocol, limit, answers, workers: Vec::new(), idle: Arc::default(), tasks })
    }

    /// Hands a delivery to an idle worker, or to a new one.
    pub(crate) fn dispatch(&mut self, delivery: Delivery) {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let index = idle.unwrap_or_else(|| self.hire());
        if let Some(worker) = self.workers.get(index)
            && let Err(refused) = worker.try_send(delivery)
        {
            // A worker ends only with the pool; were one gone, the delivery still has to be answered.
            let (mpsc::error::TrySendError::Full(delivery) | mpsc::error::TrySendError::Closed(delivery)) = refused;
            let outcome = Outcome::NoService { reason: "the worker of this delivery is gone".to_owned() };
            let _ = self.answers.try_send(Answer { id: delivery.id, outcome });
        }
    }

    fn hire(&mut self) -> usize {
        let index = self.workers.len();
        let (sender, deliveries) = mpsc::channel(1);
        self.workers.push(sender);
        let worker = Worker { index, idle: self.idle.clone(), answers: self.answers.clone(), limit: self.limit, deliveries };
        match self.protocol.clone() {
            Protocol::Http1 { target, host } => self.tasks.spawn(worker.http1(target, host)),
            Protocol::H2c { target, base, shared } => self.tasks.spawn(worker.h2c(target, base, shared, self.tasks.clone())),
            Protocol::Grpc { client } => self.tasks.spawn(worker.grpc(client)),
        };
        index
    }
}

struct Worker {
    index: usize,
    idle: Arc<Mutex<Vec<usize>>>,
    answers: mpsc::Sender<Answer>,
    limit: usize,
    deliveries: mpsc::Receiver<Delivery>,
}

impl Worker {
    /// `false` once nobody listens any more.
    fn answer(&self, id: u64, outcome: Outcome) -> bool {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        self.answers.try_send(Answer { id, outcome }).is_ok()
    }

    async fn http1(mut self, target: Target, host: HeaderValue) {
        let mut uris = Uris::new(String::new());
        let mut connection: Option<Http1> = None;
        loop {
            let delivery = tokio::select! {
                biased;
                delivery = self.deliveries.recv() => delivery,
                // An idle connection that the service closes is dropped before it is used.
                () = closed(&mut connection), if connection.is_some() => { connection = None; continue }
            };
            let Some(delivery) = delivery else { return };
            let uri = uris.get(delivery.route.handler.as_deref().unwrap_or("/"));
            let timeout = delivery.route.timeout;
            let call = call_http1(&mut connection, &target, &host, uri, &delivery, self.limit);
            let outcome = match tokio::time::timeout(timeout, call).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    // The answer may still come on this connection: it is not used again.
                    connection = None;
                    no_answer(&target, timeout)
                }
            };
            if !self.answer(delivery.id, outcome) {
                return;
            }
        }
    }

    async fn h2c(
        mut self,
        target: Target,
        base: String,
        shared: Arc<tokio::sync::Mutex<Option<http2::SendRequest<http_body_util::Full<Bytes>>>>>,
        tasks: TaskTracker,
    ) {
        let mut uris = Uris::new(base);
        while let Some(delivery) = self.deliveries.recv().await {
            let uri = uris.get(delivery.route.handler.as_deref().unwrap_or("/"));
            let timeout = delivery.route.timeout;
            let call = async {
                let mut sender = match h2c_sender(&shared, &target, &tasks).await {
                    Ok(sender) => sender,
                    Err(error) => return Outcome::NoService { reason: format!("{target}: {error}") },
                };
                if let Err(error) = sender.ready().await {
                    return Outcome::NoService { reason: format!("{target}: {error}") };
                }
                match sender.try_send_request(http_form::request(&delivery, uri, None)).await {
                    Ok(response) => answered(response, &target, self.limit).await,
                    Err(mut error) => match error.take_message() {
                        Some(_) => Outcome::NoService { reason: format!("{target}: {}", error.error()) },
                        None => broken(&target, error.error()),
                    },
                }
            };
            let outcome = tokio::time::timeout(timeout, call).await.unwrap_or_else(|_| no_answer(&target, timeout));
            if !self.answer(delivery.id, outcome) {
                return;
            }
        }
    }

    async fn grpc(mut self, mut client: HandlerClient<Channel>) {
        while let Some(delivery) = self.deliveries.recv().await {
            let (id, timeout) = (delivery.id, delivery.route.timeout);
            let call = client.handle(grpc::message(&delivery.route.clone(), std::slice::from_ref(&delivery)));
            let outcome = match tokio::time::timeout(timeout, call).await {
                Ok(Ok(outcomes)) => match outcomes.into_inner().outcomes.into_iter().find(|outcome| outcome.delivery_id == id) {
                    Some(outcome) => grpc::outcome(outcome),
                    None => Outcome::Retry { reason: "the handler's answer does not name the delivery".to_owned(), after: None },
                },
                Ok(Err(status)) => grpc::failure(&status),
                Err(_) => Outcome::Retry { reason: format!("no answer within {timeout:?}"), after: None },
            };
            if !self.answer(id, outcome) {
                return;
            }
        }
    }
}

async fn closed(connection: &mut Option<Http1>) {
    match connection {
        Some(connection) => connection.closed().await,
        None => std::future::pending().await,
    }
}

async fn h2c_sender(
    shared: &tokio::sync::Mutex<Option<http2::SendRequest<http_body_util::Full<Bytes>>>>,
    target: &Target,
    tasks: &TaskTracker,
) -> Result<http2::SendRequest<http_body_util::Full<Bytes>>, String> {
    // The lock is held while connecting, on purpose: one connection is made, not one a worker.
    let mut shared = shared.lock().await;
    match &*shared {
        Some(sender) if !sender.is_closed() => Ok(sender.clone()),
        _ => {
            *shared = None;
            Ok(shared.insert(connect::http2(target, tasks).await?).clone())
        }
    }
}

async fn call_http1(
    connection: &mut Option<Http1>,
    target: &Target,
    host: &HeaderValue,
    uri: Uri,
    delivery: &Delivery,
    limit: usize,
) -> Outcome {
    let mut request = http_form::request(delivery, uri, Some(host));
    // Twice at most: a connection that was kept alive may turn out closed before anything was written.
    for _ in 0..2 {
        let reused = connection.as_mut().is_some_and(Http1::usable);
        if !reused {
            *connection = match Http1::connect(target).await {
                Ok(connection) => Some(connection),
                Err(error) => return Outcome::NoService { reason: format!("{target}: {error}") },
            };
        }
        let Some(used) = connection.as_mut() else { break };
        let (sender, driven) = used.parts();
        let sent = drive(driven, sender.try_send_request(request)).await;
        match sent {
            Ok(response) => {
                let outcome = drive(driven, answered(response, target, limit)).await;
                if driven.is_none() {
                    *connection = None;
                }
                return outcome;
            }
            Err(mut error) => {
                *connection = None;
                match error.take_message() {
                    Some(unsent) if reused => request = unsent,
                    Some(_) => return Outcome::NoService { reason: format!("{target}: {}", error.error()) },
                    None => return broken(target, error.error()),
                }
            }
        }
    }
    Outcome::NoService { reason: format!("{target}: the connection closes before a request is written") }
}

async fn answered(response: http::Response<hyper::body::Incoming>, target: &Target, limit: usize) -> Outcome {
    let (head, body) = response.into_parts();
    match read_body(body, limit).await {
        Ok(Some(body)) => http_form::outcome(head.status, &head.headers, body),
        Ok(None) => Outcome::Reject { reason: format!("the answer ({}) is longer than {limit} bytes", head.status.as_u16()) },
        Err(error) => broken(target, &error),
    }
}

fn broken(target: &Target, error: &hyper::Error) -> Outcome {
    use std::error::Error as _;
    let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    Outcome::Retry { reason: format!("{target}: the connection broke after the request was written: {error}{cause}"), after: None }
}

fn no_answer(target: &Target, timeout: Duration) -> Outcome {
    Outcome::Retry { reason: format!("{target}: no answer within {timeout:?}"), after: None }
}

fn strip(address: &str) -> &str {
    address.split_once("://").map_or(address, |(_, rest)| rest).trim_end_matches('/')
}

fn with_port(address: &str) -> String {
    let authority = strip(address);
    let has_port = authority.rsplit_once(':').is_some_and(|(host, port)| !host.ends_with(':') && port.parse::<u16>().is_ok());
    if has_port { authority.to_owned() } else { format!("{authority}:80") }
}

fn host(address: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(strip(address)).map_err(|error| format!("{address}: {error}"))
}

/// A channel that connects when it is first used, and again when it broke.
pub(crate) fn channel(address: &str) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{}", with_port(address))).map_err(|error| format!("{address}: {error}"))?;
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .connect_lazy())
}
