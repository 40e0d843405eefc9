//! The services that are called: lean, each a process of its own, so that their cost is not the sidecar's.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use mesh_proto::v1::{
    self, handler_server, mesh_client::MeshClient, mesh_server, outcome, publish_result, subscribe_request, subscribe_response,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Status, Streaming};

/// The size of every value, in bytes.
pub const VALUE: usize = 1024;

async fn listen() -> Result<TcpListener> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("READY {}", listener.local_addr()?.port());
    Ok(listener)
}

/// What an HTTP service answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Answer {
    /// The body that it was sent: a handler.
    Echo,
    /// What the sidecar's API answers to a publish: the floor of publishing.
    Position,
    /// As `echo`; and remembers the longest time between two calls, which `GET /gaps` tells and forgets.
    Gaps,
}

/// What `GET /gaps` tells, since it was asked last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gaps {
    /// Calls.
    pub calls: u64,
    /// The longest time from one call to the next, in milliseconds.
    pub longest_ms: f64,
}

/// The calls since it was asked last, and when the last one came.
#[derive(Debug, Default)]
struct Calls(Mutex<(Gaps, Option<Instant>)>);

impl Calls {
    fn called(&self, now: Instant) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let gap = seen.1.map_or(0.0, |last| now.duration_since(last).as_secs_f64() * 1e3);
        *seen = (Gaps { calls: seen.0.calls + 1, longest_ms: seen.0.longest_ms.max(gap) }, Some(now));
    }

    fn take(&self, now: Instant) -> Gaps {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A call that is awaited still is a gap, too.
        let open = seen.1.map_or(0.0, |last| now.duration_since(last).as_secs_f64() * 1e3);
        let mut gaps = std::mem::take(&mut seen.0);
        gaps.longest_ms = gaps.longest_ms.max(open);
        gaps
    }
}

/// An HTTP/1.1 service with bare hyper, until it is killed. It answers after `delay`, which Tokio rounds up to the next millisecond.
///
/// # Errors
/// If it cannot listen.
pub async fn http(answer: Answer, delay: Duration) -> Result<()> {
    http_on(listen().await?, answer, delay).await
}

/// The same on a listener that is there.
///
/// # Errors
/// If it cannot accept.
pub async fn http_on(listener: TcpListener, answer: Answer, delay: Duration) -> Result<()> {
    const POSITION: &[u8] =
        br#"{"topic":"m0123456789.bench","partition":1,"offset":123456,"mesh_id":"0198c0de-0000-7000-8000-000000000000"}"#;
    const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
    const JSON: HeaderValue = HeaderValue::from_static("application/json");
    let calls = Arc::new(Calls::default());
    let reply = move |calls: Arc<Calls>, request: Request<Incoming>| async move {
        let asked = answer == Answer::Gaps && request.uri().path() == "/gaps";
        let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let (body, kind) = match answer {
            Answer::Gaps if asked => (serde_json::to_vec(&calls.take(Instant::now())).unwrap_or_default().into(), JSON),
            Answer::Gaps => {
                calls.called(Instant::now());
                (body, OCTETS)
            }
            Answer::Echo => (body, OCTETS),
            Answer::Position => (Bytes::from_static(POSITION), JSON),
        };
        let mut response = Response::new(Full::new(body));
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        Ok::<_, Infallible>(response)
    };
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let calls = calls.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| reply(calls.clone(), request));
            // A peer that goes away is no fault.
            drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
        });
    }
}

/// A tonic service until it is killed: the handler `Handle` and `HandleStream`, and, as the floor of publishing, `Publish` and
/// `PublishStream` which only answer.
///
/// # Errors
/// If it cannot listen.
pub async fn grpc() -> Result<()> {
    let listener = TcpListenerStream::new(listen().await?).map(|stream| {
        let stream = stream?;
        stream.set_nodelay(true)?;
        Ok::<_, std::io::Error>(stream)
    });
    tonic::transport::Server::builder()
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .add_service(handler_server::HandlerServer::new(Echo).max_decoding_message_size(64 << 20))
        .add_service(mesh_server::MeshServer::new(Echo).max_decoding_message_size(64 << 20))
        .serve_with_incoming(listener)
        .await?;
    Ok(())
}

/// An OTLP collector that forgets what it gets.
///
/// # Errors
/// If it cannot listen.
pub async fn collector() -> Result<()> {
    let listener = TcpListenerStream::new(listen().await?);
    tonic::transport::Server::builder().add_service(TraceServiceServer::new(Forget)).serve_with_incoming(listener).await?;
    Ok(())
}

struct Forget;

#[tonic::async_trait]
impl TraceService for Forget {
    async fn export(&self, _: tonic::Request<ExportTraceServiceRequest>) -> Result<tonic::Response<ExportTraceServiceResponse>, Status> {
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

struct Echo;

/// Each record's value, as its reply.
fn outcomes(delivery: v1::Delivery) -> v1::Outcomes {
    let reply = |delivered: v1::DeliveredRecord| {
        let record = v1::Record { value: delivered.record.and_then(|record| record.value), ..v1::Record::default() };
        let reply = v1::Reply { status: 0, records: vec![record] };
        v1::Outcome { delivery_id: delivered.delivery_id, outcome: Some(outcome::Outcome::Reply(reply)) }
    };
    v1::Outcomes { outcomes: delivery.records.into_iter().map(reply).collect() }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl handler_server::Handler for Echo {
    async fn handle(&self, request: tonic::Request<v1::Delivery>) -> Result<tonic::Response<v1::Outcomes>, Status> {
        Ok(tonic::Response::new(outcomes(request.into_inner())))
    }

    type HandleStreamStream = Answers<v1::Outcomes>;

    async fn handle_stream(
        &self,
        request: tonic::Request<Streaming<v1::Delivery>>,
    ) -> Result<tonic::Response<Self::HandleStreamStream>, Status> {
        Ok(tonic::Response::new(Box::pin(request.into_inner().map(|delivery| delivery.map(outcomes)))))
    }
}

fn results(records: usize) -> Vec<v1::PublishResult> {
    let position = || v1::Position { topic: "m0123456789.bench".into(), partition: 1, offset: 123_456 };
    let result = || v1::PublishResult {
        result: Some(publish_result::Result::Position(position())),
        mesh_id: "0198c0de-0000-7000-8000-000000000000".into(),
    };
    std::iter::repeat_with(result).take(records).collect()
}

#[tonic::async_trait]
impl mesh_server::Mesh for Echo {
    async fn publish(&self, request: tonic::Request<v1::PublishRequest>) -> Result<tonic::Response<v1::PublishResponse>, Status> {
        Ok(tonic::Response::new(v1::PublishResponse { results: results(request.into_inner().records.len()) }))
    }

    type PublishStreamStream = Answers<v1::PublishStreamResponse>;

    async fn publish_stream(
        &self,
        request: tonic::Request<Streaming<v1::PublishStreamRequest>>,
    ) -> Result<tonic::Response<Self::PublishStreamStream>, Status> {
        let answer = |request: v1::PublishStreamRequest| v1::PublishStreamResponse {
            results: vec![v1::PublishStreamResult { sequence: request.sequence, results: results(request.records.len()) }],
        };
        Ok(tonic::Response::new(Box::pin(request.into_inner().map(move |request| request.map(answer)))))
    }

    type SubscribeStream = Answers<v1::SubscribeResponse>;

    async fn subscribe(
        &self,
        _: tonic::Request<Streaming<v1::SubscribeRequest>>,
    ) -> Result<tonic::Response<Self::SubscribeStream>, Status> {
        Err(Status::unimplemented("the floor of publishing alone"))
    }
}

/// A service that attaches to a route (`Subscribe`) and echoes, until the stream ends or it is killed.
///
/// # Errors
/// If the sidecar refuses, or the stream breaks.
pub async fn subscriber(sidecar: String, route: String, credits: u32) -> Result<()> {
    let mut client = MeshClient::connect(sidecar).await?.max_decoding_message_size(64 << 20).max_encoding_message_size(usize::MAX);
    let (requests, outgoing) = mpsc::channel(1024);
    let request = |request| v1::SubscribeRequest { request: Some(request) };
    requests.send(request(subscribe_request::Request::Attach(v1::Attach { route, credits }))).await?;
    let mut responses = client.subscribe(ReceiverStream::new(outgoing)).await?.into_inner();
    println!("READY 0");
    while let Some(response) = responses.message().await? {
        if let subscribe_response::Response::Delivery(delivery) = response.response.context("a response")? {
            let records = u32::try_from(delivery.records.len())?;
            requests.send(request(subscribe_request::Request::Outcomes(outcomes(delivery)))).await?;
            requests.send(request(subscribe_request::Request::Credit(v1::Credit { records }))).await?;
        }
    }
    Ok(())
}

/// The value of every record that is not a timestamp's: printable, so that it compresses to nothing in nobody's way.
pub fn value() -> Arc<[u8]> {
    vec![b'x'; VALUE].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_told_once_and_one_that_is_open_counts() {
        let (calls, begin) = (Calls::default(), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        assert_eq!(calls.take(at(5)), Gaps::default());
        calls.called(at(10));
        calls.called(at(17));
        assert_eq!(calls.take(at(18)), Gaps { calls: 2, longest_ms: 7.0 });
        assert_eq!(calls.take(at(20)), Gaps { calls: 0, longest_ms: 3.0 });
    }
}
