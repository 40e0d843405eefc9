//! The admin listener's services: `mesh.v1.Control`, health and reflection. Floor 5.
//!
//! Invariant: this file translates, and decides nothing: what may be applied is `control`'s business.

use std::task::Poll;

use axum::Router;
use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use mesh_proto::{
    FILE_DESCRIPTOR_SET,
    v1::{self, control_server::ControlServer},
};
use mesh_routing::Fault;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::{guard::Principal, produce};
use crate::{
    broker::{BrokerError, BrokerErrorKind},
    control::{ApplyError, ApplyOptions, CanaryOptions, Control, OperationError},
    publish::Publisher,
};

/// The largest request, in bytes: a table of 10,000 routes is 3 MB.
const MAX_REQUEST: usize = 16 << 20;

/// `mesh.v1.Control` over the control plane of this process.
#[derive(Clone, Debug)]
pub struct AdminService {
    control: Control,
    publisher: Option<Publisher>,
}

impl AdminService {
    /// The service. Streams that would go on end when a drain is asked for.
    pub fn new(control: Control) -> Self {
        Self { control, publisher: None }
    }

    /// The same, that lets operators publish by this publisher.
    pub fn publishing(self, publisher: Publisher) -> Self {
        Self { publisher: Some(publisher), ..self }
    }

    /// The service, with limits that fit tables.
    pub fn into_server(self) -> ControlServer<Self> {
        ControlServer::new(self).max_decoding_message_size(MAX_REQUEST).max_encoding_message_size(4 * MAX_REQUEST)
    }
}

/// All gRPC services of the admin listener as a router, to which others can be added.
///
/// # Errors
/// Only if the descriptors of this build cannot be read.
pub async fn router(service: AdminService) -> Result<Router, tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<ControlServer<AdminService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let mut routes = tonic::service::Routes::builder();
    routes.add_service(service.into_server()).add_service(health).add_service(reflection);
    Ok(routes.routes().into_axum_router())
}

#[tonic::async_trait]
impl v1::control_server::Control for AdminService {
    async fn validate(&self, request: Request<v1::ValidateRequest>) -> Result<Response<v1::ValidateResponse>, Status> {
        let table = source(request.into_inner().table)?;
        let response = match self.control.validate(&table.file, &table.text).await {
            Ok(checked) => v1::ValidateResponse { faults: Vec::new(), warnings: faults(checked.warnings), digest: checked.digest },
            Err(ApplyError::Faults(found)) => v1::ValidateResponse { faults: faults(found.0), ..Default::default() },
            Err(error) => return Err(status(&error)),
        };
        Ok(Response::new(response))
    }

    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let by = Principal::of(&request, &request.get_ref().applied_by);
        let request = request.into_inner();
        let table = source(request.table)?;
        check_signature(request.signature.as_ref())?;
        if request.promotes > 0 && request.canary.is_some() {
            return Err(Status::invalid_argument("`promotes` and `canary` exclude each other: what is promoted is meant for all"));
        }
        let options = ApplyOptions {
            expected_generation: request.expected_generation,
            dry_run: request.dry_run,
            signature: request.signature,
            applied_by: by.clone(),
            message: request.message,
            rollback_to: Some(request.rollback_to).filter(|generation| *generation > 0),
            canary: request.canary.map(canary).transpose()?,
            promotes: Some(request.promotes).filter(|generation| *generation > 0),
        };
        let response = match self.control.apply(&table.file, &table.text, options).await {
            Ok(applied) => {
                if applied.changed {
                    tracing::info!(target: "audit", who = by, asked = "Apply", generation = applied.generation, digest = applied.digest, "a routing table was applied");
                }
                v1::ApplyResponse {
                    generation: applied.generation,
                    digest: applied.digest,
                    changed: applied.changed,
                    warnings: faults(applied.warnings),
                    new_routes: applied
                        .new_routes
                        .into_iter()
                        .map(|backlog| v1::RouteBacklog { route: backlog.route, records: backlog.records })
                        .collect(),
                    changes: applied.changes,
                    faults: Vec::new(),
                }
            }
            Err(ApplyError::Faults(found)) => v1::ApplyResponse { faults: faults(found.0), ..Default::default() },
            Err(error) => return Err(status(&error)),
        };
        Ok(Response::new(response))
    }

    async fn get_table(&self, request: Request<v1::GetTableRequest>) -> Result<Response<v1::GetTableResponse>, Status> {
        let generation = request.into_inner().generation;
        match self.control.get_table(generation).await {
            Ok(Some(table)) => Ok(Response::new(table)),
            Ok(None) => Err(Status::not_found(match (generation, self.control.waiting()) {
                (Some(generation), _) => format!("generation {generation} is not in the mesh's history (any more)"),
                (None, Some(waiting)) => format!("this sidecar has no routing table yet: {waiting}"),
                (None, None) => "this mesh has no routing table yet: `mesh-ctl apply -f FILE` gives it one".into(),
            })),
            Err(reason) => Err(Status::data_loss(format!("that generation cannot be read: {reason}"))),
        }
    }

    async fn get_history(&self, request: Request<v1::GetHistoryRequest>) -> Result<Response<v1::GetHistoryResponse>, Status> {
        self.control.history(request.into_inner().limit).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn get_status(&self, request: Request<v1::GetStatusRequest>) -> Result<Response<v1::GetStatusResponse>, Status> {
        Ok(Response::new(match request.into_inner().watch {
            true => self.control.watched_status().await,
            false => self.control.status(),
        }))
    }

    async fn diagnose(&self, request: Request<v1::DiagnoseRequest>) -> Result<Response<v1::DiagnoseResponse>, Status> {
        Ok(Response::new(self.control.diagnose(request.into_inner()).await))
    }

    async fn reset(&self, request: Request<v1::ResetRequest>) -> Result<Response<v1::ResetResponse>, Status> {
        self.control.reset(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.control.release(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    async fn list_dead_letters(
        &self,
        request: Request<v1::ListDeadLettersRequest>,
    ) -> Result<Response<v1::ListDeadLettersResponse>, Status> {
        let listed = self.control.list_dead_letters(&request.into_inner().route).await;
        listed.map(Response::new).map_err(|error| operation_status(&error))
    }

    type ReadDeadLettersStream = Streamed<v1::DeadLetter>;

    async fn read_dead_letters(
        &self,
        request: Request<v1::ReadDeadLettersRequest>,
    ) -> Result<Response<Self::ReadDeadLettersStream>, Status> {
        let (control, request) = (self.control.clone(), request.into_inner());
        Ok(Response::new(streamed(|out| async move { control.read_dead_letters(request, out).await })))
    }

    type RedriveStream = Streamed<v1::RedriveProgress>;

    async fn redrive(&self, request: Request<v1::RedriveRequest>) -> Result<Response<Self::RedriveStream>, Status> {
        let (control, request) = (self.control.clone(), request.into_inner());
        Ok(Response::new(streamed(|out| async move { control.redrive(request, out).await })))
    }

    async fn purge_dead_letters(
        &self,
        request: Request<v1::PurgeDeadLettersRequest>,
    ) -> Result<Response<v1::PurgeDeadLettersResponse>, Status> {
        self.control.purge_dead_letters(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    type ReplayStream = Streamed<v1::ReplayProgress>;

    async fn replay(&self, request: Request<v1::ReplayRequest>) -> Result<Response<Self::ReplayStream>, Status> {
        let (control, request) = (self.control.clone(), request.into_inner());
        Ok(Response::new(streamed(|out| async move { control.replay(request, out).await })))
    }

    async fn pause(&self, request: Request<v1::PauseRequest>) -> Result<Response<v1::PauseResponse>, Status> {
        let by = Principal::of(&request, &request.get_ref().by);
        let v1::PauseRequest { route, reason, .. } = request.into_inner();
        let changed = self.control.pause(&route, &by, &reason).await.map_err(|error| operation_status(&error))?;
        Ok(Response::new(v1::PauseResponse { changed }))
    }

    async fn resume(&self, request: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        let changed = self.control.resume(&request.into_inner().route).await.map_err(|error| operation_status(&error))?;
        Ok(Response::new(v1::ResumeResponse { changed }))
    }

    async fn abort_rollout(&self, request: Request<v1::AbortRolloutRequest>) -> Result<Response<v1::AbortRolloutResponse>, Status> {
        let by = Principal::of(&request, &request.get_ref().by);
        let v1::AbortRolloutRequest { generation, reason, .. } = request.into_inner();
        self.control.abort_rollout(generation, by, reason).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    type PlanStream = Streamed<v1::PlanProgress>;

    async fn plan(&self, request: Request<v1::PlanRequest>) -> Result<Response<Self::PlanStream>, Status> {
        let (control, mut request) = (self.control.clone(), request.into_inner());
        let table = source(request.table.take())?;
        match control.validate(&table.file, &table.text).await {
            Ok(_) => {}
            Err(ApplyError::Faults(found)) => {
                let refused = v1::PlanProgress { finished: true, faults: faults(found.0), ..v1::PlanProgress::default() };
                return Ok(Response::new(stream::iter([Ok(refused)]).boxed()));
            }
            Err(error) => return Err(status(&error)),
        }
        request.table = Some(table);
        Ok(Response::new(streamed(|out| async move { control.plan(request, out).await })))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        self.control.explain(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    async fn trace(&self, request: Request<v1::TraceRequest>) -> Result<Response<v1::TraceResponse>, Status> {
        self.control.trace(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    type TailStream = Streamed<v1::TailResponse>;

    async fn tail(&self, request: Request<v1::TailRequest>) -> Result<Response<Self::TailStream>, Status> {
        let (control, request) = (self.control.clone(), request.into_inner());
        let drain = control.drain_asked().clone();
        Ok(Response::new(streamed(|out| async move {
            tokio::select! {
                result = control.tail(request, out) => result,
                () = drain.cancelled() => Err(OperationError::Unclear("the sidecar shuts down".to_owned())),
            }
        })))
    }

    type ProduceStream = Streamed<v1::ProduceResponse>;

    async fn produce(&self, request: Request<Streaming<v1::ProduceRequest>>) -> Result<Response<Self::ProduceStream>, Status> {
        let publisher = self.publisher.clone().ok_or_else(|| Status::unimplemented("nothing can be published at this admin port"))?;
        let who = Principal::of(&request, "anonymous");
        Ok(Response::new(produce::answers(publisher, who, request.into_inner())))
    }

    async fn list_topics(&self, request: Request<v1::ListTopicsRequest>) -> Result<Response<v1::ListTopicsResponse>, Status> {
        self.control.list_topics(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    async fn describe_topics(&self, request: Request<v1::DescribeTopicsRequest>) -> Result<Response<v1::DescribeTopicsResponse>, Status> {
        self.control.describe_topics(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    async fn create_topic(&self, request: Request<v1::CreateTopicRequest>) -> Result<Response<v1::CreateTopicResponse>, Status> {
        self.control.create_topic(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    async fn alter_topic(&self, request: Request<v1::AlterTopicRequest>) -> Result<Response<v1::AlterTopicResponse>, Status> {
        self.control.alter_topic(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    async fn delete_topics(&self, request: Request<v1::DeleteTopicsRequest>) -> Result<Response<v1::DeleteTopicsResponse>, Status> {
        self.control.delete_topics(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    async fn get_lag(&self, request: Request<v1::GetLagRequest>) -> Result<Response<v1::GetLagResponse>, Status> {
        self.control.lag(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        self.control.drain(request.into_inner()).await.map(Response::new).map_err(|error| operation_status(&error))
    }
}

fn source(table: Option<v1::TableSource>) -> Result<v1::TableSource, Status> {
    let mut table = table
        .filter(|table| !table.text.trim().is_empty())
        .ok_or_else(|| Status::invalid_argument("`table.text` is empty: send the routing table's YAML or JSON"))?;
    if table.file.is_empty() {
        table.file = "table".into();
    }
    Ok(table)
}

/// Whether it looks like a signature; what it is worth is the control plane's business.
fn check_signature(signature: Option<&v1::TableSignature>) -> Result<(), Status> {
    let Some(v1::TableSignature { key_id, ed25519 }) = signature else { return Ok(()) };
    if key_id.is_empty() || key_id.len() > 64 || !key_id.bytes().all(|c| c.is_ascii_alphanumeric()) {
        return Err(Status::invalid_argument("`signature.key_id` is no name of a key: 1 to 64 of a-z A-Z 0-9"));
    }
    if ed25519.len() != 64 {
        return Err(Status::invalid_argument(format!("`signature.ed25519` has {} bytes, and a signature has 64", ed25519.len())));
    }
    Ok(())
}

fn canary(canary: v1::Canary) -> Result<CanaryOptions, Status> {
    let v1::Canary { selector, max_dead_letters, max_refusals } = canary;
    let selector = selector.parse().map_err(|error| Status::invalid_argument(format!("`canary.selector`: {selector:?} {error}")))?;
    Ok(CanaryOptions { selector, max_dead_letters, max_refusals })
}

fn faults(faults: Vec<Fault>) -> Vec<v1::Fault> {
    let convert = |Fault { file, line, column, field, message, hint, code }| v1::Fault {
        file,
        line,
        column,
        field,
        message,
        hint,
        code: String::from(code),
    };
    faults.into_iter().map(convert).collect()
}

/// What long work tells, as a stream.
type Streamed<T> = BoxStream<'static, Result<T, Status>>;

/// How many messages wait for a slow client.
const WAITING: usize = 16;

/// Runs work inside of the stream of what it tells: when the client goes, the stream is dropped, and the work with it.
fn streamed<T, W>(work: impl FnOnce(mpsc::Sender<T>) -> W) -> Streamed<T>
where
    T: Send + 'static,
    W: Future<Output = Result<(), OperationError>> + Send + 'static,
{
    let (out, mut items) = mpsc::channel(WAITING);
    let mut work = Some(Box::pin(work(out)));
    let mut failed = None;
    stream::poll_fn(move |cx| {
        if let Some(running) = &mut work
            && let Poll::Ready(result) = running.as_mut().poll(cx)
        {
            // Its end of the channel goes with it.
            work = None;
            failed = result.err();
        }
        items.poll_recv(cx).map(|item| match item {
            Some(item) => Some(Ok(item)),
            None => failed.take().map(|error| Err(operation_status(&error))),
        })
    })
    .boxed()
}

fn operation_status(error: &OperationError) -> Status {
    let message = error.to_string();
    match error {
        OperationError::Invalid(_) => Status::invalid_argument(message),
        OperationError::NoTable(_) => Status::unavailable(message),
        OperationError::NoRoute { .. } => Status::not_found(message),
        OperationError::Refused(_) => Status::failed_precondition(message),
        OperationError::Conflict(_) => Status::aborted(message),
        OperationError::Unclear(_) => Status::unknown(message),
        OperationError::Broker(broker) => broker_status(broker, message),
    }
}

fn broker_status(error: &BrokerError, message: String) -> Status {
    match error.kind {
        BrokerErrorKind::Unreachable => Status::unavailable(message),
        BrokerErrorKind::Unauthorized => Status::permission_denied(message),
        _ => Status::failed_precondition(message),
    }
}

fn status(error: &ApplyError) -> Status {
    let message = error.to_string();
    match error {
        ApplyError::Faults(_) => Status::invalid_argument(message),
        ApplyError::Pinned { .. } | ApplyError::Untrusted(_) | ApplyError::Open { .. } => Status::failed_precondition(message),
        // Compare-and-set failed: read, and try again.
        ApplyError::Expected { .. } | ApplyError::Lost { .. } | ApplyError::NotOpen { .. } | ApplyError::Ended { .. } => {
            Status::aborted(message)
        }
        ApplyError::NotReady(_) => Status::unavailable(message),
        ApplyError::Broker(broker) => broker_status(broker, message),
        ApplyError::Refused(_) => Status::failed_precondition(message),
        ApplyError::Unclear { .. } => Status::unknown(message),
        ApplyError::Internal(_) => Status::internal(message),
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::{
        broker::{ProduceError, ProduceErrorKind},
        control::TrustError,
    };

    #[test]
    fn errors_say_what_to_do_next() {
        let code = |error: ApplyError| {
            let status = status(&error);
            assert!(!status.message().is_empty());
            status.code()
        };
        let (winner, changes) = (String::from("b"), vec!["+ routes.a: {}".to_owned()]);
        let expected = ApplyError::Expected { expected: 1, actual: 2, winner: winner.clone(), changes: changes.clone() };
        assert!(expected.to_string().contains("generation 2 is, applied by b: ") && expected.to_string().ends_with("\n  + routes.a: {}"));
        assert_eq!(code(expected), Code::Aborted);
        assert_eq!(code(ApplyError::Lost { generation: 1, winner, changes }), Code::Aborted);
        assert_eq!(code(ApplyError::Ended { generation: 1, how: "aborted".into() }), Code::Aborted);
        assert_eq!(operation_status(&OperationError::Conflict("generation 9 was applied".into())).code(), Code::Aborted);
        assert_eq!(code(TrustError::Unsigned { trusted: "k".into() }.into()), Code::FailedPrecondition);
        assert_eq!(code(ApplyError::Pinned { path: "routes.yaml".into() }), Code::FailedPrecondition);
        assert_eq!(code(ApplyError::NotReady("away".into())), Code::Unavailable);
        assert_eq!(code(BrokerError::new(BrokerErrorKind::Unreachable, "away").into()), Code::Unavailable);
        assert_eq!(code(BrokerError::new(BrokerErrorKind::Unauthorized, "no").into()), Code::PermissionDenied);
        let refused = ProduceError { kind: ProduceErrorKind::TooLarge, detail: "2 MB".into() };
        assert_eq!(code(ApplyError::Refused(refused)), Code::FailedPrecondition);
        assert_eq!(code(ApplyError::Unclear { generation: 1, detail: "late".into() }), Code::Unknown);
    }

    #[test]
    fn what_is_no_signature_is_refused() {
        let check = |key: &str, length: usize| {
            check_signature(Some(&v1::TableSignature { key_id: key.to_owned(), ed25519: vec![0; length].into() }))
                .map_err(|status| status.code())
        };
        assert_eq!((check("0a1b", 64), check_signature(None).is_ok()), (Ok(()), true));
        for (key, length) in [("", 64), ("a b", 64), (&*"a".repeat(65), 64), ("0a1b", 63)] {
            assert_eq!(check(key, length), Err(Code::InvalidArgument), "{key} {length}");
        }
    }

    #[test]
    fn an_empty_table_is_refused_with_a_hint() {
        assert!(source(None).unwrap_err().message().contains("table.text"));
        assert!(source(Some(v1::TableSource { file: String::new(), text: " \n".into() })).is_err());
        let named = source(Some(v1::TableSource { file: String::new(), text: "x".into() })).unwrap();
        assert_eq!(named.file, "table");
    }
}
