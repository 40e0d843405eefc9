//! `mesh.v1.Mesh`: publishing over gRPC; and health and reflection.

use std::{pin::Pin, sync::Arc};

use bytes::Bytes;
use futures_util::{Stream, future::BoxFuture, stream};
use http::HeaderMap;
use mesh_proto::v1::{self, mesh_server};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::{Request, Response, Status, Streaming, service::Routes};

use super::{
    Api, batch, fields, paths,
    problem::ApiError,
    produce::{draft, result},
    subscribe,
};
use crate::publish::{Caller, Pending, Published, TraceHeaders};

/// Requests of a publish stream that wait for their acknowledgements at once.
const AHEAD_REQUESTS: usize = 1024;
/// And the bytes of their records.
const AHEAD_BYTES: usize = 32 * 1024 * 1024;
/// Results that are grouped into one answer at most.
const GROUP_RECORDS: usize = 2048;

const SERVICE: &str = "mesh.v1.Mesh";

/// The services of the API port.
pub(super) fn routes(api: &Api) -> (Routes, tonic_health::server::HealthReporter) {
    let largest = batch::batch_bytes(api);
    let mesh =
        mesh_server::MeshServer::new(Mesh { api: api.clone() }).max_decoding_message_size(largest).max_encoding_message_size(usize::MAX);
    let reporter = tonic_health::server::HealthReporter::new();
    let health =
        tonic_health::pb::health_server::HealthServer::new(tonic_health::server::HealthService::from_health_reporter(reporter.clone()));
    let mut routes = Routes::new(mesh).add_service(health);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(mesh_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(SERVICE)
            .with_service_name("grpc.health.v1.Health")
    };
    match reflection().build_v1() {
        Ok(service) => routes = routes.add_service(service),
        Err(error) => tracing::error!(%error, "no gRPC reflection v1: the embedded descriptors cannot be read"),
    }
    match reflection().build_v1alpha() {
        Ok(service) => routes = routes.add_service(service),
        Err(error) => tracing::error!(%error, "no gRPC reflection v1alpha: the embedded descriptors cannot be read"),
    }
    (routes.prepare(), reporter)
}

/// Says that the API serves.
pub(super) async fn begin_health(reporter: &tonic_health::server::HealthReporter) {
    reporter.set_service_status(SERVICE, tonic_health::ServingStatus::Serving).await;
}

/// Says that it serves no more, and ends the streams of those who watch, which would hold the drain.
pub(super) async fn end_health(mut reporter: tonic_health::server::HealthReporter) {
    for service in ["", SERVICE] {
        reporter.set_service_status(service, tonic_health::ServingStatus::NotServing).await;
        reporter.clear_service_status(service).await;
    }
}

pub(super) struct Mesh {
    pub(super) api: Api,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl mesh_server::Mesh for Mesh {
    async fn publish(&self, request: Request<v1::PublishRequest>) -> Result<Response<v1::PublishResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let headers = metadata.into_headers();
        publish(&self.api, &headers, request).await.map(Response::new).map_err(|error| error.status())
    }

    type PublishStreamStream = Answers<v1::PublishStreamResponse>;

    async fn publish_stream(
        &self,
        request: Request<Streaming<v1::PublishStreamRequest>>,
    ) -> Result<Response<Self::PublishStreamStream>, Status> {
        let (metadata, _, requests) = request.into_parts();
        let headers = metadata.into_headers();
        let caller = paths::caller(&self.api, &headers).map_err(|error| error.status())?;
        let (sender, receiver) = mpsc::channel(AHEAD_REQUESTS);
        let reader = Reader {
            api: self.api.clone(),
            caller,
            trace: fields::trace(&headers),
            ahead: Arc::new(Semaphore::new(AHEAD_BYTES)),
            topic: None,
        };
        self.api.inner.tasks.spawn(reader.run(requests, sender));
        Ok(Response::new(Box::pin(answers(receiver))))
    }

    type SubscribeStream = Answers<v1::SubscribeResponse>;

    async fn subscribe(&self, request: Request<Streaming<v1::SubscribeRequest>>) -> Result<Response<Self::SubscribeStream>, Status> {
        let (metadata, _, requests) = request.into_parts();
        let headers = metadata.into_headers();
        let caller = paths::caller(&self.api, &headers).map_err(|error| error.status())?;
        Ok(Response::new(Box::pin(subscribe::start(&self.api, caller, requests))))
    }
}

async fn publish(api: &Api, headers: &HeaderMap, request: v1::PublishRequest) -> Result<v1::PublishResponse, ApiError> {
    let caller = paths::caller(api, headers)?;
    let topic = api.inner.publisher.topic(caller, &request.topic).await?;
    let drafts: Vec<_> = request.records.into_iter().map(draft).collect();
    let published = api.inner.publisher.publish(&topic, drafts, &fields::trace(headers)).await;
    if let [Published { result: Err(error), .. }] = &*published {
        return Err(error.clone().into());
    }
    Ok(v1::PublishResponse { results: published.into_iter().map(result).collect() })
}

/// A request of a publish stream that is on its way.
struct Ahead {
    sequence: u64,
    work: Work,
    _bytes: Option<OwnedSemaphorePermit>,
}

enum Work {
    Sent(Pending),
    /// The request's topic is refused, and so are its records.
    Refused(ApiError, usize),
}

impl Ahead {
    async fn resolve(self) -> v1::PublishStreamResult {
        let results = match self.work {
            Work::Sent(pending) => pending.wait().await.into_iter().map(result).collect(),
            Work::Refused(error, records) => {
                let problem = v1::publish_result::Result::Problem(error.proto());
                vec![v1::PublishResult { result: Some(problem), mesh_id: String::new() }; records]
            }
        };
        v1::PublishStreamResult { sequence: self.sequence, results }
    }
}

/// Reads a publish stream and enqueues its records, as far ahead of the acknowledgements as the bounds allow.
struct Reader {
    api: Api,
    caller: Caller,
    trace: TraceHeaders,
    ahead: Arc<Semaphore>,
    topic: Option<String>,
}

impl Reader {
    async fn run(mut self, mut requests: Streaming<v1::PublishStreamRequest>, sender: mpsc::Sender<Result<Ahead, Status>>) {
        loop {
            let next = tokio::select! {
                biased;
                () = sender.closed() => return,
                next = requests.message() => next,
                () = self.api.inner.closing.cancelled() => Err(ApiError::Draining.status()),
            };
            let item = match next {
                Ok(Some(request)) => Ok(self.take(request).await),
                Ok(None) => return,
                Err(status) => Err(status),
            };
            let over = item.is_err();
            // The answers' side is gone when the caller is: what was sent stays sent.
            if sender.send(item).await.is_err() || over {
                return;
            }
        }
    }

    async fn take(&mut self, request: v1::PublishStreamRequest) -> Ahead {
        let v1::PublishStreamRequest { sequence, topic, records } = request;
        if !topic.is_empty() {
            self.topic = Some(topic);
        }
        let refused = |error: ApiError, records: usize| Ahead { sequence, work: Work::Refused(error, records), _bytes: None };
        let Some(name) = &self.topic else {
            return refused(ApiError::Protocol("the first request of a publish stream must name its topic"), records.len());
        };
        let topic = match self.api.inner.publisher.topic(self.caller, name).await {
            Ok(topic) => topic,
            Err(error) => return refused(error.into(), records.len()),
        };
        let bytes: usize =
            records.iter().map(|record| 64 + record.key.as_ref().map_or(0, Bytes::len) + record.value.as_ref().map_or(0, Bytes::len)).sum();
        let permits = u32::try_from(bytes.min(AHEAD_BYTES)).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        let permit = self.ahead.clone().acquire_many_owned(permits).await.ok();
        let pending = self.api.inner.publisher.enqueue(&topic, records.into_iter().map(draft).collect(), &self.trace);
        Ahead { sequence, work: Work::Sent(pending), _bytes: permit }
    }
}

/// The answers to a publish stream: in order, and grouped with those that are ready at the same time.
fn answers(receiver: mpsc::Receiver<Result<Ahead, Status>>) -> impl Stream<Item = Result<v1::PublishStreamResponse, Status>> + Send {
    struct State {
        receiver: mpsc::Receiver<Result<Ahead, Status>>,
        front: Option<BoxFuture<'static, v1::PublishStreamResult>>,
        end: Option<Status>,
        over: bool,
    }
    let state = State { receiver, front: None, end: None, over: false };
    stream::unfold(state, |mut state| async move {
        if state.over {
            return None;
        }
        if let Some(status) = state.end.take() {
            state.over = true;
            return Some((Err(status), state));
        }
        let front = match state.front.take() {
            Some(front) => front,
            None => match state.receiver.recv().await? {
                Ok(ahead) => Box::pin(ahead.resolve()),
                Err(status) => {
                    state.over = true;
                    return Some((Err(status), state));
                }
            },
        };
        let mut results = vec![front.await];
        let mut records: usize = results.iter().map(|result| result.results.len()).sum();
        while records < GROUP_RECORDS {
            match state.receiver.try_recv() {
                Ok(Ok(ahead)) => {
                    let mut next: BoxFuture<'static, _> = Box::pin(ahead.resolve());
                    match futures_util::poll!(&mut next) {
                        std::task::Poll::Ready(result) => {
                            records += result.results.len().max(1);
                            results.push(result);
                        }
                        std::task::Poll::Pending => {
                            state.front = Some(next);
                            break;
                        }
                    }
                }
                Ok(Err(status)) => {
                    state.end = Some(status);
                    break;
                }
                Err(_) => break,
            }
        }
        Some((Ok(v1::PublishStreamResponse { results }), state))
    })
}
