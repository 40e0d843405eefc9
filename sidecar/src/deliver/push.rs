//! Calls the service: a pool of workers, each with one call at a time and, for HTTP/1.1, a connection of its own.
//!
//! A worker drives its connection itself, so a call costs no hand-over between tasks but the one that brings the delivery.
//!
//! Invariant: a worker is idle or has one call, of one delivery or a batch; it answers each delivery once, in order, whatever happens.
//! Invariant: redirects are never followed, and no proxy variable is read.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Uri, response::Parts};
use http_body_util::Full;
use hyper::client::conn::http2;
use mesh_proto::v1::handler_client::HandlerClient;
use mesh_routing::Route;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};

use super::{
    Call,
    batch::{self, Gathering},
    connect::{self, Http1, Target, drive, read_body},
    grpc,
    http::{self as http_form, Uris},
};
use crate::{
    config::AppAddress,
    outcome::{Answer, Delivery, Outcome},
};

/// How a service is called.
#[derive(Clone)]
enum Protocol {
    Http1 { target: Target, host: HeaderValue },
    H2c { target: Target, base: String, shared: Arc<tokio::sync::Mutex<Option<http2::SendRequest<Full<Bytes>>>>> },
    Grpc { client: HandlerClient<Channel> },
}

/// The workers of one route.
pub(crate) struct PushPool {
    protocol: Protocol,
    limit: usize,
    answers: mpsc::Sender<Answer>,
    unknown: Counter,
    workers: Vec<mpsc::Sender<Call>>,
    idle: Arc<Mutex<Vec<usize>>>,
    tasks: TaskTracker,
}

impl PushPool {
    /// A pool for a service. `limit` is the largest answer that is taken, in bytes; `answers` must hold as many answers as deliveries are
    /// ever out; `unknown` counts outcomes that name no record of their batch.
    ///
    /// # Errors
    /// If the address cannot be an address.
    pub(super) fn new(
        app: &AppAddress,
        limit: usize,
        answers: mpsc::Sender<Answer>,
        unknown: Counter,
        tasks: TaskTracker,
    ) -> Result<Self, String> {
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
        Ok(Self { protocol, limit, answers, unknown, workers: Vec::new(), idle: Arc::default(), tasks })
    }

    /// Hands a call to an idle worker, or to a new one.
    pub(super) fn dispatch(&mut self, call: Call) {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let index = idle.unwrap_or_else(|| self.hire());
        if let Some(worker) = self.workers.get(index)
            && let Err(refused) = worker.try_send(call)
        {
            // A worker ends only with the pool; were one gone, the delivery still has to be answered.
            let (mpsc::error::TrySendError::Full(call) | mpsc::error::TrySendError::Closed(call)) = refused;
            call.answer(&self.answers, &Outcome::NoService { reason: "the worker of this delivery is gone".to_owned(), after: None });
        }
    }

    fn hire(&mut self) -> usize {
        let index = self.workers.len();
        let (sender, calls) = mpsc::channel(1);
        self.workers.push(sender);
        let (idle, answers, unknown) = (self.idle.clone(), self.answers.clone(), self.unknown.clone());
        let worker = Worker { index, idle, answers, unknown, limit: self.limit, calls };
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
    unknown: Counter,
    limit: usize,
    calls: mpsc::Receiver<Call>,
}

/// An answer over HTTP, whole; or what came instead.
type Answered = Result<(Parts, Bytes), Failed>;

/// Why there is no answer.
enum Failed {
    NoService(String),
    /// The request was written, or may have been.
    Broken(String),
    TooLong(String),
}

impl Worker {
    /// `false` once nobody listens any more.
    fn answer(&self, id: u64, outcome: Outcome) -> bool {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        self.answers.try_send(Answer { id, outcome }).is_ok()
    }

    /// The same for a batch.
    fn answer_all(&self, batch: Vec<Delivery>, outcomes: Vec<Outcome>) -> bool {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        let mut answers = batch.into_iter().zip(outcomes);
        answers.all(|(delivery, outcome)| self.answers.try_send(Answer { id: delivery.id, outcome }).is_ok())
    }

    /// Answers with what came over HTTP. The map of headers of one record's answer is left for the next request, empty: making one costs as much
    /// as filling it.
    fn answer_http(&self, call: Call, answered: Answered, room: &mut HeaderMap) -> bool {
        match (call, answered) {
            (Call::One(delivery), Ok((mut head, body))) => {
                let outcome = http_form::outcome(head.status, &head.headers, body);
                head.headers.clear();
                *room = head.headers;
                self.answer(delivery.id, outcome)
            }
            (Call::One(delivery), Err(failed)) => self.answer(
                delivery.id,
                match failed {
                    Failed::NoService(reason) => Outcome::NoService { reason, after: None },
                    Failed::Broken(reason) => Outcome::Retry { reason, after: None },
                    Failed::TooLong(reason) => Outcome::Reject { reason },
                },
            ),
            (Call::Many(batch), Ok((head, body))) => {
                let outcomes = batch::outcomes(&batch, head.status, &head.headers, body, &self.unknown);
                self.answer_all(batch, outcomes)
            }
            (Call::Many(batch), Err(failed)) => {
                let outcome = match failed {
                    Failed::NoService(reason) => Outcome::NoService { reason, after: None },
                    // No single record is to blame for an answer that is too long.
                    Failed::Broken(reason) | Failed::TooLong(reason) => Outcome::Retry { reason, after: None },
                };
                let outcomes = vec![outcome; batch.len()];
                self.answer_all(batch, outcomes)
            }
        }
    }

    /// The largest answer that is taken.
    fn limit(&self, call: &Call) -> usize {
        match call {
            Call::One(_) => self.limit,
            Call::Many(_) => self.limit.saturating_mul(batch::ANSWER),
        }
    }

    async fn http1(mut self, target: Target, host: HeaderValue) {
        let (mut uris, mut room) = (Uris::new(String::new()), HeaderMap::new());
        let mut connection: Option<Http1> = None;
        loop {
            let call = tokio::select! {
                biased;
                call = self.calls.recv() => call,
                // An idle connection that the service closes is dropped before it is used.
                () = closed(&mut connection), if connection.is_some() => { connection = None; continue }
            };
            let Some(call) = call else { return };
            let Some((route, uri)) = aim(&call, &mut uris) else { continue };
            let timeout = route.timeout;
            let request = || request(&call, uri.clone(), Some(&host), &mut room);
            let answering = call_http1(&mut connection, &target, request, self.limit(&call));
            let answered = match tokio::time::timeout(timeout, answering).await {
                Ok(answered) => answered,
                Err(_) => {
                    // The answer may still come on this connection: it is not used again.
                    connection = None;
                    Err(no_answer(&target, timeout))
                }
            };
            if !self.answer_http(call, answered, &mut room) {
                return;
            }
        }
    }

    async fn h2c(
        mut self,
        target: Target,
        base: String,
        shared: Arc<tokio::sync::Mutex<Option<http2::SendRequest<Full<Bytes>>>>>,
        tasks: TaskTracker,
    ) {
        let (mut uris, mut room) = (Uris::new(base), HeaderMap::new());
        while let Some(call) = self.calls.recv().await {
            let Some((route, uri)) = aim(&call, &mut uris) else { continue };
            let (timeout, limit) = (route.timeout, self.limit(&call));
            let answering = async {
                let mut sender =
                    h2c_sender(&shared, &target, &tasks).await.map_err(|error| Failed::NoService(format!("{target}: {error}")))?;
                sender.ready().await.map_err(|error| Failed::NoService(format!("{target}: {error}")))?;
                match sender.try_send_request(request(&call, uri, None, &mut room)).await {
                    Ok(response) => answered(response, &target, limit).await,
                    Err(mut error) => Err(match error.take_message() {
                        Some(_) => Failed::NoService(format!("{target}: {}", error.error())),
                        None => broken(&target, error.error()),
                    }),
                }
            };
            let answered = tokio::time::timeout(timeout, answering).await.unwrap_or_else(|_| Err(no_answer(&target, timeout)));
            if !self.answer_http(call, answered, &mut room) {
                return;
            }
        }
    }

    async fn grpc(mut self, mut client: HandlerClient<Channel>) {
        while let Some(call) = self.calls.recv().await {
            let batch = match call {
                Call::One(delivery) => vec![delivery],
                Call::Many(batch) => batch,
            };
            let Some(route) = batch.first().map(|delivery| delivery.route.clone()) else { continue };
            let said = match tokio::time::timeout(route.timeout, client.handle(grpc::message(&route, &batch))).await {
                Ok(Ok(outcomes)) => {
                    let mut gathering = Gathering::new(&batch);
                    for said in outcomes.into_inner().outcomes {
                        if !gathering.take(said.delivery_id, grpc::outcome(said)) {
                            self.unknown.inc();
                        }
                    }
                    gathering.finish(batch::missing)
                }
                Ok(Err(status)) => vec![grpc::failure(&status); batch.len()],
                Err(_) => {
                    let reason = format!("no answer within {:?}", route.timeout);
                    vec![Outcome::Retry { reason, after: None }; batch.len()]
                }
            };
            if !self.answer_all(batch, said) {
                return;
            }
        }
    }
}

/// A call's route, and where it goes. `None` for a batch of nothing.
fn aim<'a>(call: &'a Call, uris: &mut Uris) -> Option<(&'a Route, Uri)> {
    let route = match call {
        Call::One(delivery) => &delivery.route,
        Call::Many(batch) => &batch.first()?.route,
    };
    Some((route, uris.get(route.handler.as_deref().unwrap_or("/"))))
}

fn request(call: &Call, uri: Uri, host: Option<&HeaderValue>, room: &mut HeaderMap) -> Request<Full<Bytes>> {
    match call {
        Call::One(delivery) => http_form::request(delivery, uri, host, std::mem::take(room)),
        Call::Many(batch) => batch::request(batch, uri, host),
    }
}

async fn closed(connection: &mut Option<Http1>) {
    match connection {
        Some(connection) => connection.closed().await,
        None => std::future::pending().await,
    }
}

async fn h2c_sender(
    shared: &tokio::sync::Mutex<Option<http2::SendRequest<Full<Bytes>>>>,
    target: &Target,
    tasks: &TaskTracker,
) -> Result<http2::SendRequest<Full<Bytes>>, String> {
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

/// One call. A connection that was kept alive may turn out closed: the service gave it up as idle while the request was on its way, and most
/// likely never saw it. Then the call is made once more, on a new connection, and that one's word counts.
async fn call_http1(
    connection: &mut Option<Http1>,
    target: &Target,
    mut request: impl FnMut() -> Request<Full<Bytes>>,
    limit: usize,
) -> Answered {
    for _ in 0..2 {
        let reused = connection.as_mut().is_some_and(Http1::usable);
        if !reused {
            *connection = match Http1::connect(target).await {
                Ok(connection) => Some(connection),
                Err(error) => return Err(Failed::NoService(format!("{target}: {error}"))),
            };
        }
        let Some(used) = connection.as_mut() else { break };
        let (sender, driven) = used.parts();
        let sent = drive(driven, sender.try_send_request(request())).await;
        match sent {
            Ok(response) => {
                let answered = drive(driven, answered(response, target, limit)).await;
                if driven.is_none() {
                    *connection = None;
                }
                return answered;
            }
            Err(mut error) => {
                *connection = None;
                match error.take_message() {
                    Some(_) if reused => {}
                    None if reused && is_closed(error.error()) => {}
                    Some(_) => return Err(Failed::NoService(format!("{target}: {}", error.error()))),
                    None => return Err(broken(target, error.error())),
                }
            }
        }
    }
    Err(Failed::NoService(format!("{target}: the connection closes before a request is written")))
}

async fn answered(response: http::Response<hyper::body::Incoming>, target: &Target, limit: usize) -> Answered {
    let (head, body) = response.into_parts();
    match read_body(body, limit).await {
        Ok(Some(body)) => Ok((head, body)),
        Ok(None) => Err(Failed::TooLong(format!("the answer ({}) is longer than {limit} bytes", head.status.as_u16()))),
        Err(error) => Err(broken(target, &error)),
    }
}

/// Whether the connection ended in place of an answer.
fn is_closed(error: &hyper::Error) -> bool {
    use std::{error::Error as _, io};
    let io = error.source().and_then(|source| source.downcast_ref::<io::Error>()).map(io::Error::kind);
    error.is_closed()
        || error.is_canceled()
        || error.is_incomplete_message()
        || matches!(io, Some(io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe))
}

fn broken(target: &Target, error: &hyper::Error) -> Failed {
    use std::error::Error as _;
    let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    Failed::Broken(format!("{target}: the connection broke after the request was written: {error}{cause}"))
}

fn no_answer(target: &Target, timeout: Duration) -> Failed {
    Failed::Broken(format!("{target}: no answer within {timeout:?}"))
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

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;
    use crate::deliver::batch::tests::batch;

    /// What a service does with each request of a connection; then it closes it.
    #[derive(Clone, Copy)]
    enum Says {
        Good,
        Nothing,
    }

    /// Delivers records one after the other to a service that treats its connections so, and gives the outcomes and how many requests came.
    async fn deliver(connections: Vec<Vec<Says>>, records: u64) -> (Vec<Outcome>, usize) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = AppAddress::Http(format!("http://{}", listener.local_addr().unwrap()));
        let service = tokio::spawn(async move {
            let (mut requests, mut buffer) = (0, [0; 4096]);
            for says in connections {
                let (mut stream, _) = listener.accept().await.unwrap();
                for say in says {
                    // A request is small, and comes whole.
                    if stream.read(&mut buffer).await.unwrap() == 0 {
                        break;
                    }
                    requests += 1;
                    match say {
                        Says::Good => stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap(),
                        Says::Nothing => break,
                    }
                }
            }
            requests
        });
        let (answers, mut outcomes) = mpsc::channel(16);
        let tasks = TaskTracker::new();
        let mut pool = PushPool::new(&app, 1 << 20, answers, Counter::default(), tasks.clone()).unwrap();
        let mut found = Vec::new();
        for delivery in batch(records) {
            pool.dispatch(Call::One(delivery));
            found.push(outcomes.recv().await.unwrap().outcome);
        }
        let requests = service.await.unwrap();
        drop(pool);
        tasks.close();
        tasks.wait().await;
        (found, requests)
    }

    #[tokio::test]
    async fn a_connection_that_closes_while_it_is_used_again_counts_no_attempt() {
        use Says::{Good, Nothing};
        let (outcomes, requests) = deliver(vec![vec![Good, Nothing], vec![Good, Good]], 3).await;
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Reply(_))), "{outcomes:?}");
        assert_eq!(requests, 4);
    }

    #[tokio::test]
    async fn a_new_connection_that_closes_in_place_of_an_answer_counts_one() {
        use Says::{Good, Nothing};
        let (outcomes, requests) = deliver(vec![vec![Nothing], vec![Good, Nothing], vec![Nothing]], 3).await;
        assert!(matches!(&outcomes[..], [Outcome::Retry { .. }, Outcome::Reply(_), Outcome::Retry { .. }]), "{outcomes:?}");
        assert_eq!(requests, 4);
    }
}
