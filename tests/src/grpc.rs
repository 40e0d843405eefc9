//! Services that speak gRPC: a `mesh.v1.Handler`, and one that attaches to a route.
//!
//! Invariant: what such a service does with a record is a plain function, so that a test reads as what the service says.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures_util::{Stream, StreamExt as _};
use mesh_proto::v1::{
    self, Attach, Credit, DeliveredRecord, Delivery, Ignore, Outcome, Outcomes, Record, Reject, Reply, Retry, SubscribeRequest,
    handler_server::{Handler, HandlerServer},
    outcome, subscribe_request, subscribe_response,
};
use serde_json::Value;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::{
    mesh::{Found, found, subscribe},
    sidecar::Sidecar,
};

/// What a service says to a record.
pub type Answers = Arc<dyn Fn(&DeliveredRecord) -> outcome::Outcome + Send + Sync>;

/// The record's JSON with further fields, as an answer.
pub fn reply_with(delivered: &DeliveredRecord, fields: &Value) -> outcome::Outcome {
    let value = delivered.record.as_ref().and_then(|record| record.value.clone()).unwrap_or_default();
    let mut value: Value = serde_json::from_slice(&value).unwrap_or_default();
    if let (Some(value), Some(fields)) = (value.as_object_mut(), fields.as_object()) {
        value.extend(fields.clone());
    }
    reply(200, value.to_string())
}

/// An answer of one record.
pub fn reply(status: u32, value: impl Into<bytes::Bytes>) -> outcome::Outcome {
    outcome::Outcome::Reply(Reply { status, records: vec![Record { value: Some(value.into()), ..Record::default() }] })
}

/// Done, nothing is forwarded.
pub fn ignore() -> outcome::Outcome {
    outcome::Outcome::Ignore(Ignore::default())
}

/// Try again.
pub fn retry(reason: &str) -> outcome::Outcome {
    outcome::Outcome::Retry(Retry { reason: reason.to_owned(), after_ms: 0 })
}

/// To the dead letters.
pub fn reject(reason: &str) -> outcome::Outcome {
    outcome::Outcome::Reject(Reject { reason: reason.to_owned() })
}

/// A running `mesh.v1.Handler`.
#[derive(Debug)]
pub struct GrpcService {
    address: SocketAddr,
    books: Arc<Books>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Books {
    seen: Mutex<Vec<Found>>,
    count: watch::Sender<u64>,
    streams: AtomicU64,
    calls: AtomicU64,
}

#[derive(Clone)]
struct Serve {
    answers: Answers,
    streaming: bool,
    books: Arc<Books>,
}

impl GrpcService {
    /// Listens. Without `streaming`, `HandleStream` is answered UNIMPLEMENTED and the sidecar must fall back to `Handle`.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(streaming: bool, answers: impl Fn(&DeliveredRecord) -> outcome::Outcome + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let books = Arc::new(Books {
            seen: Mutex::default(),
            count: watch::Sender::new(0),
            streams: AtomicU64::default(),
            calls: AtomicU64::default(),
        });
        let service = Serve { answers: Arc::new(answers), streaming, books: books.clone() };
        let task = tokio::spawn(async move {
            let server = Server::builder().add_service(HandlerServer::new(service));
            if let Err(error) = server.serve_with_incoming(TcpListenerStream::new(listener)).await {
                eprintln!("the gRPC service ended: {error}");
            }
        });
        Ok(Self { address, books, task })
    }

    /// Its address as a sidecar's configuration names it.
    pub fn url(&self) -> String {
        format!("grpc://{}", self.address)
    }

    /// The records that it was given.
    pub fn seen(&self) -> Vec<Found> {
        self.books.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many streams were opened, and how many unary calls came.
    pub fn calls(&self) -> (u64, u64) {
        (self.books.streams.load(Ordering::Relaxed), self.books.calls.load(Ordering::Relaxed))
    }

    /// Waits until it was given this many records.
    ///
    /// # Errors
    /// If they do not come in time.
    pub async fn wait(&self, total: u64, deadline: Duration) -> Result<()> {
        let mut count = self.books.count.subscribe();
        let reached = count.wait_for(|count| *count >= total);
        tokio::time::timeout(deadline, reached).await.with_context(|| format!("{total} deliveries in {deadline:?}"))??;
        Ok(())
    }
}

impl Drop for GrpcService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Serve {
    fn answer(&self, delivery: Delivery) -> Outcomes {
        let mut outcomes = Vec::with_capacity(delivery.records.len());
        for delivered in delivery.records {
            outcomes.push(Outcome { delivery_id: delivered.delivery_id, outcome: Some((self.answers)(&delivered)) });
            self.books.seen.lock().unwrap_or_else(PoisonError::into_inner).push(found(delivered));
        }
        self.books.count.send_modify(|count| *count += outcomes.len() as u64);
        Outcomes { outcomes }
    }
}

#[tonic::async_trait]
impl Handler for Serve {
    async fn handle(&self, request: Request<Delivery>) -> Result<Response<Outcomes>, Status> {
        self.books.calls.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(self.answer(request.into_inner())))
    }

    type HandleStreamStream = Pin<Box<dyn Stream<Item = Result<Outcomes, Status>> + Send>>;

    async fn handle_stream(&self, request: Request<Streaming<Delivery>>) -> Result<Response<Self::HandleStreamStream>, Status> {
        if !self.streaming {
            return Err(Status::unimplemented("this service has no HandleStream"));
        }
        self.books.streams.fetch_add(1, Ordering::Relaxed);
        let server = self.clone();
        let answers = request.into_inner().map(move |delivery| delivery.map(|delivery| server.answer(delivery)));
        Ok(Response::new(Box::pin(answers)))
    }
}

/// A service that attaches to a route of `deliver: stream`, and answers until it is dropped.
#[derive(Debug)]
pub struct Attached {
    books: watch::Receiver<Vec<Found>>,
    task: JoinHandle<Result<()>>,
}

impl Attached {
    /// Attaches, with a number of credits that is kept: each answered record gives one back.
    ///
    /// # Errors
    /// If the sidecar refuses.
    pub async fn start(
        sidecar: &Sidecar,
        route: &str,
        credits: u32,
        answers: impl Fn(&DeliveredRecord) -> outcome::Outcome + Send + Sync + 'static,
    ) -> Result<Self> {
        let first = subscribe_request::Request::Attach(Attach { route: route.to_owned(), credits });
        let (requests, mut responses) = subscribe(&mut sidecar.mesh().await?, first).await?;
        let attached = responses.message().await?.context("the stream ended")?;
        anyhow::ensure!(matches!(attached.response, Some(subscribe_response::Response::Attached(_))), "first came {attached:?}");
        let (writer, books) = watch::channel(Vec::new());
        let task = tokio::spawn(async move {
            while let Some(response) = responses.message().await? {
                let Some(subscribe_response::Response::Delivery(delivery)) = response.response else { continue };
                let records = u32::try_from(delivery.records.len())?;
                let outcomes: Vec<v1::Outcome> = delivery
                    .records
                    .iter()
                    .map(|delivered| Outcome { delivery_id: delivered.delivery_id, outcome: Some(answers(delivered)) })
                    .collect();
                writer.send_modify(|seen| seen.extend(delivery.records.into_iter().map(found)));
                let outcomes = subscribe_request::Request::Outcomes(Outcomes { outcomes });
                requests.send(SubscribeRequest { request: Some(outcomes) }).await?;
                let credit = subscribe_request::Request::Credit(Credit { records });
                requests.send(SubscribeRequest { request: Some(credit) }).await?;
            }
            Ok(())
        });
        Ok(Self { books, task })
    }

    /// The records that it was given.
    pub fn seen(&self) -> Vec<Found> {
        self.books.borrow().clone()
    }

    /// Waits until it was given this many records.
    ///
    /// # Errors
    /// If they do not come in time.
    pub async fn wait(&self, total: usize, deadline: Duration) -> Result<()> {
        let mut books = self.books.clone();
        let reached = books.wait_for(|seen| seen.len() >= total);
        tokio::time::timeout(deadline, reached).await.with_context(|| format!("{total} deliveries in {deadline:?}"))??;
        Ok(())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.task.abort();
    }
}
