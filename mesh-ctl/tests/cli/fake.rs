//! A sidecar that answers as it is told, and the binary, run against it.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
};

use mesh_proto::v1::{self, control_server::ControlServer};
use tokio::{io::AsyncWriteExt as _, net::TcpListener, process::Command};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

/// A sidecar that answers what it is told to, and remembers what it was asked.
#[derive(Clone, Default)]
pub(crate) struct Script(pub(crate) Arc<Mutex<State>>);

#[derive(Default)]
pub(crate) struct State {
    pub(crate) table: Option<v1::GetTableResponse>,
    pub(crate) apply: Option<Result<v1::ApplyResponse, Status>>,
    /// Answered one after the other; the last one stays.
    pub(crate) status: Vec<v1::GetStatusResponse>,
    pub(crate) applied: Vec<v1::ApplyRequest>,
    pub(crate) history: v1::GetHistoryResponse,
    pub(crate) reset: Option<Result<v1::ResetResponse, Status>>,
    pub(crate) resets: Vec<v1::ResetRequest>,
    pub(crate) plan: Vec<v1::PlanProgress>,
    pub(crate) planned: Vec<v1::PlanRequest>,
    pub(crate) explained: Option<v1::ExplainResponse>,
    pub(crate) traced: Vec<v1::TraceRequest>,
    pub(crate) flow: v1::TraceResponse,
    pub(crate) drained: Vec<v1::DrainRequest>,
    pub(crate) findings: v1::DiagnoseResponse,
    /// Which of the next questions for the status are answered by an error.
    pub(crate) fails: VecDeque<bool>,
    /// Whether those who asked for the status were going to ask again.
    pub(crate) watched: Vec<bool>,
    pub(crate) pause: Option<v1::PauseResponse>,
    pub(crate) abort: Option<v1::AbortRolloutResponse>,
    pub(crate) released: Vec<v1::ReleaseRequest>,
    pub(crate) counts: Option<v1::ListDeadLettersResponse>,
    pub(crate) letters: Option<Vec<v1::DeadLetter>>,
    pub(crate) purge: Option<v1::PurgeDeadLettersResponse>,
    pub(crate) redrive: Option<Vec<Result<v1::RedriveProgress, Status>>>,
    pub(crate) replay: Option<Vec<Result<v1::ReplayProgress, Status>>>,
    pub(crate) lag: Option<v1::GetLagResponse>,
}

pub(crate) fn no_route() -> Status {
    Status::not_found("there is no such route")
}

#[tonic::async_trait]
impl v1::control_server::Control for Script {
    async fn validate(&self, request: Request<v1::ValidateRequest>) -> Result<Response<v1::ValidateResponse>, Status> {
        let text = request.into_inner().table.unwrap_or_default().text;
        let digest = mesh_routing::parse("t", &text).map(|table| table.digest()).unwrap_or_default();
        Ok(Response::new(v1::ValidateResponse { digest, ..v1::ValidateResponse::default() }))
    }

    async fn get_history(&self, request: Request<v1::GetHistoryRequest>) -> Result<Response<v1::GetHistoryResponse>, Status> {
        let mut history = self.0.lock().unwrap().history.clone();
        let limit = request.into_inner().limit as usize;
        history.generations.truncate(if limit == 0 { usize::MAX } else { limit });
        Ok(Response::new(history))
    }

    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let mut state = self.0.lock().unwrap();
        state.applied.push(request.into_inner());
        state.apply.clone().unwrap().map(Response::new)
    }

    async fn get_table(&self, _: Request<v1::GetTableRequest>) -> Result<Response<v1::GetTableResponse>, Status> {
        let table = self.0.lock().unwrap().table.clone();
        table.map(Response::new).ok_or_else(|| Status::not_found("this mesh has no routing table yet"))
    }

    async fn get_status(&self, request: Request<v1::GetStatusRequest>) -> Result<Response<v1::GetStatusResponse>, Status> {
        let mut state = self.0.lock().unwrap();
        state.watched.push(request.into_inner().watch);
        if state.fails.pop_front() == Some(true) {
            return Err(Status::unavailable("it starts"));
        }
        let next = if state.status.len() > 1 { state.status.remove(0) } else { state.status[0].clone() };
        Ok(Response::new(next))
    }

    async fn reset(&self, request: Request<v1::ResetRequest>) -> Result<Response<v1::ResetResponse>, Status> {
        let mut state = self.0.lock().unwrap();
        state.resets.push(request.into_inner());
        state.reset.clone().unwrap().map(Response::new)
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        let request = request.into_inner();
        self.0.lock().unwrap().released.push(request.clone());
        let missing = if request.discard { vec!["orders/1".to_owned()] } else { Vec::new() };
        let reason = if request.discard { "nobody answers".to_owned() } else { String::new() };
        Ok(Response::new(v1::ReleaseResponse { released: if request.one_key { 1 } else { 2 }, missing, reason }))
    }

    async fn pause(&self, _: Request<v1::PauseRequest>) -> Result<Response<v1::PauseResponse>, Status> {
        self.0.lock().unwrap().pause.map(Response::new).ok_or_else(no_route)
    }

    async fn abort_rollout(&self, request: Request<v1::AbortRolloutRequest>) -> Result<Response<v1::AbortRolloutResponse>, Status> {
        let (wanted, state) = (request.into_inner().generation, self.0.lock().unwrap());
        let open = state.status.first().and_then(|status| status.rollout.as_ref()).map_or(0, |rollout| rollout.generation);
        if wanted > 0 && open > 0 && wanted != open {
            return Err(Status::aborted(format!("generation {wanted} is not the canary: generation {open} is")));
        }
        state.abort.map(Response::new).ok_or_else(|| Status::failed_precondition("it cannot be ended"))
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        Err(Status::not_found("there is no such route"))
    }

    async fn list_dead_letters(&self, _: Request<v1::ListDeadLettersRequest>) -> Result<Response<v1::ListDeadLettersResponse>, Status> {
        self.0.lock().unwrap().counts.clone().map(Response::new).ok_or_else(no_route)
    }

    async fn purge_dead_letters(
        &self,
        request: Request<v1::PurgeDeadLettersRequest>,
    ) -> Result<Response<v1::PurgeDeadLettersResponse>, Status> {
        let answer = self.0.lock().unwrap().purge.clone().ok_or_else(no_route)?;
        Ok(Response::new(v1::PurgeDeadLettersResponse { executed: request.into_inner().execute, ..answer }))
    }

    type ReadDeadLettersStream = tokio_stream::Iter<std::vec::IntoIter<Result<v1::DeadLetter, Status>>>;

    async fn read_dead_letters(&self, _: Request<v1::ReadDeadLettersRequest>) -> Result<Response<Self::ReadDeadLettersStream>, Status> {
        let letters = self.0.lock().unwrap().letters.clone().ok_or_else(no_route)?;
        Ok(Response::new(tokio_stream::iter(letters.into_iter().map(Ok).collect::<Vec<_>>())))
    }

    type RedriveStream = tokio_stream::Iter<std::vec::IntoIter<Result<v1::RedriveProgress, Status>>>;

    async fn redrive(&self, _: Request<v1::RedriveRequest>) -> Result<Response<Self::RedriveStream>, Status> {
        self.0.lock().unwrap().redrive.clone().map(|told| Response::new(tokio_stream::iter(told))).ok_or_else(no_route)
    }

    type ReplayStream = tokio_stream::Iter<std::vec::IntoIter<Result<v1::ReplayProgress, Status>>>;

    async fn replay(&self, _: Request<v1::ReplayRequest>) -> Result<Response<Self::ReplayStream>, Status> {
        self.0.lock().unwrap().replay.clone().map(|told| Response::new(tokio_stream::iter(told))).ok_or_else(no_route)
    }

    type PlanStream = tokio_stream::Iter<std::vec::IntoIter<Result<v1::PlanProgress, Status>>>;

    async fn plan(&self, request: Request<v1::PlanRequest>) -> Result<Response<Self::PlanStream>, Status> {
        let mut state = self.0.lock().unwrap();
        state.planned.push(request.into_inner());
        let said: Vec<_> = state.plan.iter().cloned().map(Ok).collect();
        Ok(Response::new(tokio_stream::iter(said)))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        let state = self.0.lock().unwrap();
        let at = request.into_inner().position.unwrap();
        state.explained.clone().map(Response::new).ok_or_else(|| Status::invalid_argument(format!("there is no topic {}", at.topic)))
    }

    async fn trace(&self, request: Request<v1::TraceRequest>) -> Result<Response<v1::TraceResponse>, Status> {
        let mut state = self.0.lock().unwrap();
        state.traced.push(request.into_inner());
        Ok(Response::new(state.flow.clone()))
    }

    type TailStream = Pin<Box<dyn Stream<Item = Result<v1::TailResponse, Status>> + Send>>;

    /// Two records, and then the end, or a sidecar that goes. Of the topic `quiet` nothing comes any more.
    async fn tail(&self, request: Request<v1::TailRequest>) -> Result<Response<Self::TailStream>, Status> {
        let record = |offset, value: &str| v1::TailedRecord {
            position: Some(v1::Position { topic: "orders".into(), partition: 0, offset }),
            record: Some(v1::Record {
                value: Some(value.to_owned().into()),
                timestamp_ms: Some(1_795_255_200_000),
                ..v1::Record::default()
            }),
        };
        let progress = |finished| Some(v1::TailProgress { read: 3, sent: 2, finished, ..v1::TailProgress::default() });
        let records = vec![record(5, "{ \"n\": 1 }"), record(6, "text")];
        let partitions = vec![v1::TailedPartition { topic: "orders".into(), partition: 0, from: 5, end: 7, low: 5 }];
        let first = v1::TailResponse { records, progress: progress(false), partitions };
        let request = request.into_inner();
        if request.topics == ["quiet"] {
            return Ok(Response::new(Box::pin(tokio_stream::once(Ok(first)).chain(tokio_stream::pending()))));
        }
        let end = match request.follow {
            true => Err(Status::unknown("the sidecar shuts down")),
            false => Ok(v1::TailResponse { progress: progress(true), ..v1::TailResponse::default() }),
        };
        Ok(Response::new(Box::pin(tokio_stream::iter(vec![Ok(first), end]))))
    }

    type ProduceStream = tokio_stream::wrappers::ReceiverStream<Result<v1::ProduceResponse, Status>>;

    /// Stores what says so, and goes at the word.
    async fn produce(&self, request: Request<tonic::Streaming<v1::ProduceRequest>>) -> Result<Response<Self::ProduceStream>, Status> {
        let (answers, receiver) = tokio::sync::mpsc::channel(4);
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                let mut results = Vec::new();
                for v1::ProducedRecord { number, topic, record } in request.records {
                    let value = record.unwrap_or_default().value.unwrap_or_default();
                    let result = match &value[..] {
                        b"go" => return answers.send(Err(Status::unavailable("gone"))).await,
                        b"maybe" => v1::publish_result::Result::Problem(v1::Problem {
                            code: "publish-timeout".into(),
                            detail: "no answer".into(),
                            persisted: v1::Persisted::Possibly.into(),
                            ..v1::Problem::default()
                        }),
                        _ => v1::publish_result::Result::Position(v1::Position { topic, partition: 1, offset: 7 }),
                    };
                    let result = v1::PublishResult { result: Some(result), mesh_id: "id".into() };
                    results.push(v1::ProducedResult { number, result: Some(result) });
                }
                answers.send(Ok(v1::ProduceResponse { results })).await?;
            }
            Ok(())
        });
        Ok(Response::new(tokio_stream::wrappers::ReceiverStream::new(receiver)))
    }

    async fn list_topics(&self, _: Request<v1::ListTopicsRequest>) -> Result<Response<v1::ListTopicsResponse>, Status> {
        let uses = vec![v1::TopicUse { route: "price".into(), role: "from".into() }];
        let orders = v1::TopicSummary { name: "orders".into(), partitions: 12, replication: 3, records: Some(48_211), bytes: None, uses };
        let other = v1::TopicSummary { name: "other".into(), partitions: 1, bytes: Some(2048), ..v1::TopicSummary::default() };
        Ok(Response::new(v1::ListTopicsResponse { topics: vec![orders, other], uncounted: 1 }))
    }

    async fn describe_topics(&self, _: Request<v1::DescribeTopicsRequest>) -> Result<Response<v1::DescribeTopicsResponse>, Status> {
        Err(Status::invalid_argument("there is no topic order: did you mean orders?"))
    }

    async fn create_topic(&self, request: Request<v1::CreateTopicRequest>) -> Result<Response<v1::CreateTopicResponse>, Status> {
        match request.into_inner() {
            asked if asked.topic == "orders" => Err(Status::failed_precondition("topic orders exists, with 12 partitions")),
            asked => Ok(Response::new(v1::CreateTopicResponse { partitions: asked.partitions.max(1) })),
        }
    }

    async fn alter_topic(&self, _: Request<v1::AlterTopicRequest>) -> Result<Response<v1::AlterTopicResponse>, Status> {
        let changes = vec!["partitions: 12 → 24".to_owned()];
        Ok(Response::new(v1::AlterTopicResponse { changes, warnings: vec!["keys move".to_owned()] }))
    }

    async fn delete_topics(&self, request: Request<v1::DeleteTopicsRequest>) -> Result<Response<v1::DeleteTopicsResponse>, Status> {
        let request = request.into_inner();
        let topic = |name| v1::TopicSummary { name, partitions: 1, ..v1::TopicSummary::default() };
        let topics = request.topics.into_iter().map(topic).collect();
        Ok(Response::new(v1::DeleteTopicsResponse { topics, executed: request.execute }))
    }

    async fn get_lag(&self, _: Request<v1::GetLagRequest>) -> Result<Response<v1::GetLagResponse>, Status> {
        self.0.lock().unwrap().lag.clone().map(Response::new).ok_or_else(no_route)
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let mut state = self.0.lock().unwrap();
        state.drained.push(request.into_inner());
        match state.drained.last().unwrap().instance.as_str() {
            "silent" => Err(Status::unknown("no answer within 1 s from instance silent: is it alive?")),
            instance => Ok(Response::new(v1::DrainResponse { in_flight: 2, instance: instance.to_owned() })),
        }
    }

    async fn diagnose(&self, request: Request<v1::DiagnoseRequest>) -> Result<Response<v1::DiagnoseResponse>, Status> {
        assert!(request.into_inner().now_ms > 1_700_000_000_000, "the clock of whoever asks is compared");
        Ok(Response::new(self.0.lock().unwrap().findings.clone()))
    }
}

impl Script {
    pub(crate) fn set(&self, change: impl FnOnce(&mut State)) -> &Self {
        change(&mut self.0.lock().unwrap());
        self
    }
}

pub(crate) struct Bench {
    pub(crate) script: Script,
    pub(crate) address: SocketAddr,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) server: tokio::task::JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Bench {
    pub(crate) async fn new() -> Self {
        let script = Script::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = ControlServer::new(script.clone());
        let server = tokio::spawn(async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { script, address, folder: tempfile::tempdir().unwrap(), server }
    }

    pub(crate) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs in the folder of the files, against the script.
    pub(crate) async fn run(&self, arguments: &[&str]) -> Said {
        self.run_with(arguments, &format!("http://{}", self.address), "").await
    }

    pub(crate) async fn run_with(&self, arguments: &[&str], admin: &str, stdin: &str) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-ctl"));
        command.args(arguments).current_dir(self.folder.path()).env("MESH_ADMIN", admin).kill_on_drop(true);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        // A command that does not read stdin may be gone already.
        let _ = pipe.write_all(stdin.as_bytes()).await;
        drop(pipe);
        Said::from(child.wait_with_output().await.unwrap())
    }
}

#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let said = Self { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) };
        assert!(!said.out.contains('\x1b') && !said.err.contains('\x1b'), "no colours and no progress but on a terminal: {said:?}");
        said
    }
}

impl Said {
    /// Checks the exit code.
    #[track_caller]
    pub(crate) fn ends(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}:\n{}", self.out))
    }
}

/// Both outputs, to the letter, and the exit code.
#[track_caller]
pub(crate) fn exactly(said: &Said, code: i32, out: &str, err: &str) {
    assert_eq!((said.code, &*said.out, &*said.err), (code, out, err));
}

pub(crate) fn in_force(text: &str, generation: u64) -> v1::GetTableResponse {
    let table = mesh_routing::parse("t", text).unwrap();
    v1::GetTableResponse {
        generation,
        digest: table.digest(),
        json: table.to_json(),
        applied_ms: 1_700_000_000_000,
        origin: v1::TableOrigin::Mesh.into(),
        entry: None,
    }
}

pub(crate) fn instance(name: &str, state: v1::InstanceState, generation: u64) -> v1::InstanceStatus {
    v1::InstanceStatus {
        instance: name.to_owned(),
        services: vec!["pricing".to_owned()],
        state: state.into(),
        generation,
        digest: "sha256:1".to_owned(),
        version: "0.1.0".to_owned(),
        reported_ms: 1_700_000_100_000,
        origin: v1::TableOrigin::Mesh.into(),
        ..v1::InstanceStatus::default()
    }
}

pub(crate) fn mesh(generation: u64, instances: Vec<v1::InstanceStatus>) -> v1::GetStatusResponse {
    v1::GetStatusResponse { mesh: "shop".to_owned(), generation, instances, ..v1::GetStatusResponse::default() }
}
