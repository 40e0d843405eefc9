//! The binary as its users meet it: output, exit codes, hints. The sidecar at the other end is a script.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test panics on purpose")]

use std::{
    collections::VecDeque,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use mesh_proto::{
    admin::{AdminAddress, KeepAlive},
    v1::{self, control_server::ControlServer},
};
use mesh_sidecar::api::listen;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    process::Command,
};
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

const TABLE: &str = "\
apiVersion: mesh/v1
kind: RoutingTable
metadata: { mesh: shop }
spec:
  routes:
  - { name: price, service: pricing, from: [orders], handler: /price, to: [priced] }
";

const FAULTY: &str = "\
apiVersion: mesh/v1
kind: RoutingTable
metadata: { mesh: shop }
spec:
  routes:
  - { name: price, servise: pricing, from: [orders], handler: /price, to: [priced] }
  - { name: price, service: pricing, from: [__own], handler: /price }
";

/// A sidecar that answers what it is told to, and remembers what it was asked.
#[derive(Clone, Default)]
struct Script(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    table: Option<v1::GetTableResponse>,
    apply: Option<Result<v1::ApplyResponse, Status>>,
    /// Answered one after the other; the last one stays.
    status: Vec<v1::GetStatusResponse>,
    applied: Vec<v1::ApplyRequest>,
    history: v1::GetHistoryResponse,
    reset: Option<Result<v1::ResetResponse, Status>>,
    resets: Vec<v1::ResetRequest>,
    plan: Vec<v1::PlanProgress>,
    planned: Vec<v1::PlanRequest>,
    explained: Option<v1::ExplainResponse>,
    traced: Vec<v1::TraceRequest>,
    flow: v1::TraceResponse,
    drained: Vec<v1::DrainRequest>,
    findings: v1::DiagnoseResponse,
    /// Which of the next questions for the status are answered by an error.
    fails: VecDeque<bool>,
    /// Whether those who asked for the status were going to ask again.
    watched: Vec<bool>,
    pause: Option<v1::PauseResponse>,
    abort: Option<v1::AbortRolloutResponse>,
    released: Vec<v1::ReleaseRequest>,
    counts: Option<v1::ListDeadLettersResponse>,
    letters: Option<Vec<v1::DeadLetter>>,
    purge: Option<v1::PurgeDeadLettersResponse>,
    redrive: Option<Vec<Result<v1::RedriveProgress, Status>>>,
    replay: Option<Vec<Result<v1::ReplayProgress, Status>>>,
    lag: Option<v1::GetLagResponse>,
}

fn no_route() -> Status {
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

    async fn abort_rollout(&self, _: Request<v1::AbortRolloutRequest>) -> Result<Response<v1::AbortRolloutResponse>, Status> {
        self.0.lock().unwrap().abort.map(Response::new).ok_or_else(|| Status::failed_precondition("that one is not being rolled out"))
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

    async fn create_topic(&self, _: Request<v1::CreateTopicRequest>) -> Result<Response<v1::CreateTopicResponse>, Status> {
        Err(Status::failed_precondition("topic orders exists, with 12 partitions"))
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
    fn set(&self, change: impl FnOnce(&mut State)) -> &Self {
        change(&mut self.0.lock().unwrap());
        self
    }
}

struct Bench {
    script: Script,
    address: SocketAddr,
    folder: tempfile::TempDir,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Bench {
    async fn new() -> Self {
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

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs in the folder of the files, against the script.
    async fn run(&self, arguments: &[&str]) -> Said {
        self.run_with(arguments, &format!("http://{}", self.address), "").await
    }

    async fn run_with(&self, arguments: &[&str], admin: &str, stdin: &str) -> Said {
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
struct Said {
    code: i32,
    out: String,
    err: String,
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
    fn ends(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }

    #[track_caller]
    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}:\n{}", self.out))
    }
}

fn in_force(text: &str, generation: u64) -> v1::GetTableResponse {
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

fn instance(name: &str, state: v1::InstanceState, generation: u64) -> v1::InstanceStatus {
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

fn mesh(generation: u64, instances: Vec<v1::InstanceStatus>) -> v1::GetStatusResponse {
    v1::GetStatusResponse { mesh: "shop".to_owned(), generation, instances, ..v1::GetStatusResponse::default() }
}

#[tokio::test]
async fn validate_needs_no_sidecar_and_reports_everything() {
    let bench = Bench::new().await;
    bench.file("good.yaml", TABLE);
    bench.file("bad.yaml", FAULTY);
    let nobody = "http://127.0.0.1:1";
    let said = bench.run_with(&["validate", "-f", "good.yaml"], nobody, "").await.ends(0);
    assert!(said.out.starts_with("good.yaml: valid, 1 route, sha256:"), "{}", said.out);

    let said = bench.run_with(&["validate", "-f", "good.yaml", "bad.yaml"], nobody, "").await.ends(1);
    let faults: Vec<_> = said.out.lines().filter(|line| line.starts_with("bad.yaml:")).collect();
    assert!(faults.len() >= 4, "three faults and a verdict at least: {}", said.out);
    assert!(faults.iter().any(|line| line.starts_with("bad.yaml:6:") && line.contains("error[unknown_field]")), "{}", said.out);
    assert!(said.out.contains("\n  hint: "), "{}", said.out);
    assert!(faults.last().unwrap().contains("not valid, "), "{}", said.out);

    let said = bench.run_with(&["validate", "-q", "-f", "-"], nobody, TABLE).await.ends(0);
    assert_eq!(said.out, "");
    let said = bench.run_with(&["validate", "-f", "-", "-o", "json"], nobody, FAULTY).await.ends(1);
    let json = said.json();
    assert_eq!((&json[0]["file"], &json[0]["valid"]), (&"<stdin>".into(), &false.into()));
    assert!(json[0]["faults"][0]["line"].as_u64().unwrap() > 0);

    let said = bench.run_with(&["validate", "-f", "absent.yaml"], nobody, "").await.ends(2);
    assert!(said.err.contains("absent.yaml cannot be read"), "{}", said.err);
    bench.run(&["validate"]).await.ends(2);
}

#[tokio::test]
async fn apply_says_what_it_did() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let response = v1::ApplyResponse {
        generation: 8,
        digest: "sha256:8".to_owned(),
        changed: true,
        changes: vec!["+ routes.price: {}".to_owned(), "~ defaults.timeout: \"1s\" → \"2s\"".to_owned()],
        new_routes: vec![v1::RouteBacklog { route: "price".to_owned(), records: 1_203 }],
        warnings: vec![v1::Fault {
            file: "routes.yaml".to_owned(),
            message: "a loop".to_owned(),
            code: "loop".to_owned(),
            ..v1::Fault::default()
        }],
        ..v1::ApplyResponse::default()
    };
    bench.script.set(|state| state.apply = Some(Ok(response.clone())));
    let said = bench.run(&["apply", "-f", "routes.yaml", "--expect-generation", "7"]).await.ends(0);
    assert_eq!(
        said.out,
        "+ routes.price: {}\n~ defaults.timeout: \"1s\" → \"2s\"\nroute price begins with 1203 existing records\n\
         applied generation 8 (sha256:8)\n"
    );
    assert_eq!(said.err, "routes.yaml: warning[loop]: a loop\n");
    let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
    assert_eq!((asked.expected_generation, asked.dry_run), (Some(7), false));
    let table = asked.table.unwrap();
    assert_eq!((&*table.file, &*table.text), ("routes.yaml", TABLE));

    let said = bench.run(&["-q", "apply", "-f", "routes.yaml"]).await.ends(0);
    assert_eq!((&*said.out, &*said.err), ("applied generation 8 (sha256:8)\n", ""));
    let json = bench.run(&["apply", "-f", "routes.yaml", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["generation"], &json["new_routes"][0]["records"]), (&8.into(), &1_203.into()));

    bench.script.set(|state| state.apply = Some(Ok(v1::ApplyResponse { changed: false, ..response.clone() })));
    let said = bench.run(&["apply", "-f", "routes.yaml", "--dry-run"]).await.ends(0);
    assert!(said.out.contains("would begin") && said.out.contains("dry run: nothing was applied"), "{}", said.out);
    bench.script.set(|state| {
        state.apply = Some(Ok(v1::ApplyResponse { changes: Vec::new(), new_routes: Vec::new(), ..state.apply.clone().unwrap().unwrap() }));
    });
    let said = bench.run(&["apply", "-f", "routes.yaml"]).await.ends(0);
    assert_eq!(said.out, "unchanged: generation 8 is this table already (sha256:8)\n");
}

#[tokio::test]
async fn apply_refused() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let fault = v1::Fault {
        file: "routes.yaml".to_owned(),
        line: 6,
        column: 5,
        field: "spec.routes[0].to".to_owned(),
        message: "is missing".to_owned(),
        hint: "name topics, or `void`".to_owned(),
        code: "missing".to_owned(),
    };
    bench.script.set(|state| state.apply = Some(Ok(v1::ApplyResponse { faults: vec![fault], ..v1::ApplyResponse::default() })));
    let said = bench.run(&["apply", "-f", "routes.yaml", "--wait"]).await.ends(1);
    assert_eq!(said.out, "");
    assert_eq!(
        said.err,
        "routes.yaml:6:5: error[missing]: spec.routes[0].to: is missing\n  hint: name topics, or `void`\n\
         error: routes.yaml has 1 fault: nothing was applied, and the last good table stays in force\n"
    );
    let said = bench.run(&["apply", "-f", "routes.yaml", "-o", "json"]).await.ends(1);
    assert_eq!(said.json()["faults"][0]["line"], 6);

    for (status, code) in [
        (Status::aborted("generation 8 was applied by instance b at the same time"), 3),
        (Status::failed_precondition("this sidecar runs the table that its config pins"), 1),
        (Status::unavailable("the broker is away"), 2),
        (Status::unknown("it is not known whether generation 8 was applied"), 4),
    ] {
        let message = status.message().to_owned();
        bench.script.set(|state| state.apply = Some(Err(status)));
        let said = bench.run(&["apply", "-f", "routes.yaml"]).await.ends(code);
        assert!(said.err.starts_with(&format!("error: {message}")), "{}", said.err);
    }
}

#[tokio::test]
async fn apply_waits_for_the_mesh() {
    use v1::InstanceState::{Lost, Nacked, Pending, Pinned, Synced};
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let applied = v1::ApplyResponse { generation: 8, digest: "sha256:8".to_owned(), changed: true, ..v1::ApplyResponse::default() };
    let others = || [instance("gone", Lost, 3), instance("own", Pinned, 0)];
    let with = |instances: Vec<v1::InstanceStatus>| mesh(8, instances.into_iter().chain(others()).collect());
    bench.script.set(|state| {
        state.apply = Some(Ok(applied));
        state.status = vec![
            with(vec![instance("a", Synced, 8), instance("b", Pending, 7)]),
            // An old refusal is no refusal of this one.
            with(vec![instance("a", Synced, 8), v1::InstanceStatus { refused_generation: 7, ..instance("b", Nacked, 6) }]),
            with(vec![instance("a", Synced, 8), instance("b", Synced, 8)]),
        ];
    });
    let said = bench.run(&["apply", "-f", "routes.yaml", "--wait"]).await.ends(0);
    assert!(said.err.contains("2 instances run generation 8"), "{}", said.err);
    let told: Vec<_> = said.err.lines().take(7).collect();
    let expected =
        ["SYNCED   1 of 2: a", "PENDING  1 of 2: b", "LOST     1: gone", "PINNED   1: own", "SYNCED   2 of 2: a, b", "PENDING  0"];
    assert_eq!(told[..6], expected, "a line for each state, when it changes");
    assert!(said.err.contains("gone was not waited for: LOST") && said.err.contains("own was not waited for: PINNED"), "{}", said.err);
    assert_eq!(bench.script.0.lock().unwrap().status.len(), 1, "it looked until all were there");

    let nacked = v1::InstanceStatus { error: "schema 9".to_owned(), refused_generation: 8, ..instance("b", Nacked, 7) };
    bench.script.set(|state| state.status = vec![with(vec![instance("a", Synced, 8), nacked])]);
    let said = bench.run(&["apply", "-f", "routes.yaml", "--wait"]).await.ends(1);
    assert!(said.err.contains("1 instance refused generation 8") && said.err.contains("b: schema 9"), "{}", said.err);

    bench.script.set(|state| state.status = vec![with(vec![instance("a", Synced, 8), instance("b", Pending, 7)])]);
    let said = bench.run(&["apply", "-f", "routes.yaml", "--wait", "--timeout", "0s"]).await.ends(4);
    assert!(said.err.contains("do not run it yet: b"), "{}", said.err);
    bench.run(&["apply", "-f", "routes.yaml", "--wait", "--dry-run"]).await.ends(2);
}

#[tokio::test]
async fn get_gives_what_apply_takes() {
    let bench = Bench::new().await;
    let said = bench.run(&["get"]).await.ends(2);
    assert!(said.err.contains("no routing table yet"), "{}", said.err);

    bench.script.set(|state| state.table = Some(in_force(TABLE, 7)));
    let said = bench.run(&["get"]).await.ends(0);
    assert!(said.out.starts_with("# generation 7, applied 2023-11-14T22:13:20Z, sha256:"), "{}", said.out);
    for form in ["yaml", "json"] {
        let said = bench.run(&["get", "-o", form]).await.ends(0);
        let again = mesh_routing::parse("again", &said.out).unwrap();
        assert_eq!(again.digest(), in_force(TABLE, 7).digest);
    }
    let said = bench.run(&["get", "-q", "-o", "table"]).await.ends(0);
    assert_eq!(said.out, "ROUTE  SERVICE  FROM    TO\nprice  pricing  orders  priced\n");
}

#[tokio::test]
async fn diff_tells_by_its_exit_code() {
    let bench = Bench::new().await;
    bench.script.set(|state| state.table = Some(in_force(TABLE, 7)));
    bench.file("same.yaml", &TABLE.replace("{ name: price,", "{   name: price,"));
    bench.file("other.yaml", &TABLE.replace("[priced]", "void"));
    bench.file("bad.yaml", FAULTY);
    let said = bench.run(&["diff", "-f", "same.yaml"]).await.ends(0);
    assert_eq!((&*said.out, &*said.err), ("", "no difference from generation 7\n"));
    let said = bench.run(&["diff", "-f", "other.yaml"]).await.ends(1);
    assert_eq!(said.out, "~ routes.price.to: [\"priced\"] → \"void\"\n");
    let json = bench.run(&["diff", "-f", "other.yaml", "-o", "json"]).await.ends(1).json();
    assert_eq!((&json[0]["path"], &json[0]["new"]), (&"routes.price.to".into(), &"void".into()));
    let said = bench.run(&["diff", "--from", "same.yaml", "--to", "other.yaml"]).await.ends(1);
    assert_eq!((&*said.out, &*said.err), ("~ routes.price.to: [\"priced\"] → \"void\"\n", "1 difference from same.yaml\n"));
    let said = bench.run(&["diff", "--generation", "7"]).await.ends(0);
    assert_eq!((&*said.out, &*said.err), ("", "no difference from generation 7 to generation 7\n"));
    for wrong in [&["diff"][..], &["diff", "-f", "same.yaml", "--to", "3"], &["diff", "--generation", "3", "--from", "4"]] {
        bench.run(wrong).await.ends(2);
    }
    let said = bench.run(&["diff", "-f", "bad.yaml"]).await.ends(2);
    assert!(said.err.contains("bad.yaml:6:") && said.err.contains("error: bad.yaml has "), "{}", said.err);

    bench.script.set(|state| state.table = None);
    let said = bench.run(&["diff", "-f", "same.yaml"]).await.ends(1);
    assert!(said.out.starts_with("+ routes.price: ") && said.out.lines().count() == 1, "{}", said.out);
}

#[tokio::test]
async fn history_tells_who_when_and_why() {
    let bench = Bench::new().await;
    bench.script.set(|state| state.history = v1::GetHistoryResponse { mesh: "shop".to_owned(), ..v1::GetHistoryResponse::default() });
    assert_eq!(bench.run(&["history"]).await.ends(0).out, "mesh shop, no table applied yet\n");

    let entry = |generation: u64| v1::Generation {
        generation,
        digest: format!("sha256:{:064}", generation),
        applied_ms: 1_700_000_000_000,
        applied_by: "ann@desk".to_owned(),
        source: "routes.yaml".to_owned(),
        instance: "a".to_owned(),
        routes: Some(v1::RouteCounts { added: 3, changed: 2, removed: 1 }),
        ..v1::Generation::default()
    };
    let signature = Some(v1::TableSignature { key_id: "0a1b2c3d4e5f6071".to_owned(), ed25519: vec![0; 64].into() });
    let generations = vec![
        v1::Generation { refused: "it is not signed".to_owned(), ..entry(9) },
        v1::Generation { rollback_to: 6, signature, message: "too\nmuch".to_owned(), ..entry(8) },
        v1::Generation { generation: 7, refused: "garbage".to_owned(), ..v1::Generation::default() },
        v1::Generation { routes: None, applied_by: String::new(), source: String::new(), ..entry(6) },
    ];
    bench.script.set(|state| state.history = v1::GetHistoryResponse { mesh: "shop".to_owned(), generation: 9, in_force: 8, generations });
    let said = bench.run(&["history"]).await.ends(0);
    let expected = format!(
        "mesh shop, generation 9, as seen from http://{}\n
GENERATION  STATE     APPLIED               BY        FROM           THROUGH  ROUTES    SIGNED BY         DIGEST               MESSAGE
9           REFUSED   2023-11-14T22:13:20Z  ann@desk  routes.yaml    a        +3 ~2 -1  -                 sha256:000000000000
8           IN FORCE  2023-11-14T22:13:20Z  ann@desk  rollback to 6  a        +3 ~2 -1  0a1b2c3d4e5f6071  sha256:000000000000  too much
7           REFUSED   -                     -         -              -        -         -                 -
6           -         2023-11-14T22:13:20Z  -         -              a        -         -                 sha256:000000000000
",
        bench.address
    );
    assert_eq!(said.out, expected);
    assert_eq!(said.err, "generation 9 is refused by this sidecar: it is not signed\ngeneration 7 is refused by this sidecar: garbage\n");
    let json = bench.run(&["history", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["generations"][1]["rollback_to"], &json["generations"][1]["in_force"]), (&6.into(), &true.into()));
    assert_eq!(json["generations"][0]["routes"], serde_json::json!({ "added": 3, "changed": 2, "removed": 1 }));
    assert_eq!(bench.run(&["-q", "history", "--limit", "1"]).await.ends(0).out.lines().count(), 2);
}

#[tokio::test]
async fn a_table_is_signed_for_the_generation_that_it_becomes() {
    use mesh_routing::sign::{PublicKey, STABLE, Signed};
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    bench.file("bad.yaml", FAULTY);
    let made = bench.run(&["keys", "generate", "--out", "mesh.key", "-o", "json"]).await.ends(0).json();
    let key: PublicKey = made["public_key"].as_str().unwrap().parse().unwrap();
    assert_eq!(bench.run(&["-q", "keys", "show", "mesh.key"]).await.ends(0).out, format!("{key}\n"));
    let said = bench.run(&["keys", "generate"]).await.ends(2);
    assert!(said.err.contains("mesh.key") && said.err.contains("must not get lost"), "{}", said.err);
    let said = bench.run(&["keys", "generate", "--out", "other.key"]).await.ends(0);
    assert!(said.out.starts_with("key id       ") && said.out.ends_with("private key  other.key\n"), "{}", said.out);
    let private = std::fs::read_to_string(bench.folder.path().join("other.key")).unwrap();
    assert!(!said.out.contains(private.lines().last().unwrap()), "a private key is never printed");

    let response = v1::ApplyResponse { generation: 8, changed: true, ..v1::ApplyResponse::default() };
    let table = mesh_routing::parse("t", TABLE).unwrap();
    let digest = table.digest();
    bench.script.set(|state| {
        state.history = v1::GetHistoryResponse { generation: 7, ..v1::GetHistoryResponse::default() };
        state.apply = Some(Ok(response));
        state.table = Some(in_force(TABLE, 5));
    });
    for (arguments, base, old) in [
        (&["apply", "-f", "routes.yaml", "--sign-key", "mesh.key", "-m", "why"][..], 7, 0),
        (&["apply", "-f", "routes.yaml", "--sign-key", "mesh.key", "--expect-generation", "3"], 3, 0),
        (&["rollback", "5", "--sign-key", "mesh.key"], 7, 5),
    ] {
        let said = bench.run(arguments).await.ends(0);
        let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
        let signature = asked.signature.unwrap();
        let place = Signed { mesh: "shop", channel: STABLE, generation: base + 1, digest: &digest };
        assert!(signature.key_id == key.id() && key.verifies(&place, &signature.ed25519), "{arguments:?}");
        assert_eq!((asked.expected_generation, asked.rollback_to), (Some(base), old), "what is signed for {base} builds on it alone");
        assert_eq!(asked.message, if arguments.contains(&"why") { "why" } else { "" });
        assert_eq!(said.err.contains("generation 5 was not signed by this key"), old > 0, "{}", said.err);
    }
    // Without a key nothing is signed, and a rollback still builds on what it saw.
    bench.run(&["rollback", "5"]).await.ends(0);
    let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
    assert_eq!((asked.signature, asked.expected_generation), (None, Some(7)));

    let said = bench.run(&["apply", "-f", "bad.yaml", "--sign-key", "mesh.key"]).await.ends(1);
    assert!(said.err.contains("bad.yaml:6:") && said.err.contains("nothing was applied"), "{}", said.err);
    for (file, why) in [("routes.yaml", "is no private key"), ("absent.key", "cannot be read")] {
        let said = bench.run(&["apply", "-f", "routes.yaml", "--sign-key", file]).await.ends(2);
        assert!(said.err.contains(why), "{}", said.err);
    }
    assert!(bench.script.0.lock().unwrap().applied.is_empty(), "nothing of these was proposed");
}

#[tokio::test]
async fn a_canary_is_signed_for_those_that_it_chooses_and_promoted_as_it_is() {
    use mesh_routing::sign::{PublicKey, Signed};
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let made = bench.run(&["keys", "generate", "--out", "mesh.key", "-o", "json"]).await.ends(0).json();
    let key: PublicKey = made["public_key"].as_str().unwrap().parse().unwrap();
    let digest = mesh_routing::parse("t", TABLE).unwrap().digest();
    let rollout = v1::Rollout { generation: 7, stable_generation: 6, ..v1::Rollout::default() };
    bench.script.set(|state| {
        state.history = v1::GetHistoryResponse { generation: 7, ..v1::GetHistoryResponse::default() };
        state.apply = Some(Ok(v1::ApplyResponse { generation: 8, changed: true, ..v1::ApplyResponse::default() }));
        state.table = Some(in_force(TABLE, 7));
        state.status = vec![v1::GetStatusResponse { rollout: Some(rollout), ..mesh(7, Vec::new()) }];
    });
    let canary = ["--canary", "percent=10,service=pricing", "--max-dead-letters", "5", "--max-refusals", "1"];
    let said = bench.run(&[&["apply", "-f", "routes.yaml", "--sign-key", "mesh.key"][..], &canary].concat()).await.ends(0);
    assert!(said.out.contains("applied generation 8, a canary for service=pricing percent=10"), "{}", said.out);
    let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
    let told = asked.canary.unwrap();
    assert_eq!((&*told.selector, told.max_dead_letters, told.max_refusals), ("service=pricing percent=10", 5, 1));
    let place = Signed { mesh: "shop", channel: "canary service=pricing percent=10", generation: 8, digest: &digest };
    assert!(key.verifies(&place, &asked.signature.unwrap().ed25519));

    let said = bench.run(&["rollout", "promote", "--sign-key", "mesh.key"]).await.ends(0);
    assert!(said.out.contains("applied generation 8, the canary of generation 7, for all"), "{}", said.out);
    let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
    assert_eq!((asked.promotes, asked.expected_generation, asked.canary), (7, Some(7), None));
    let place = Signed { mesh: "shop", channel: "stable", generation: 8, digest: &digest };
    assert!(key.verifies(&place, &asked.signature.unwrap().ed25519));
    bench.run(&["rollout", "promote", "--generation", "6"]).await.ends(3);
    bench.run(&["rollout", "abort"]).await.ends(1);
    let said = bench.run(&["rollout", "abort", "--generation", "6"]).await.ends(3);
    assert!(said.err.contains("generation 6 is not the canary: generation 7 is"), "{said:?}");
    bench.run(&["rollout", "abort", "--generation", "7"]).await.ends(1);
    let said = bench.run(&["apply", "-f", "routes.yaml", "--canary", "zone=a"]).await.ends(2);
    assert!(said.err.contains("which is none of service=NAME"), "{}", said.err);
}

#[tokio::test]
async fn status_names_what_is_waited_for() {
    use v1::InstanceState::{Nacked, Synced};
    let bench = Bench::new().await;
    let waiting = v1::RouteStatus {
        route: "price".to_owned(),
        service: "pricing".to_owned(),
        state: v1::RouteState::WaitingForService.into(),
        reason: "service pricing at http://127.0.0.1:8080: connection refused".to_owned(),
        partitions: 4,
        lag_records: 1_203,
        lag_seconds: 41.7,
        waiting_since_ms: 1_700_000_100_000 - 125_000,
        ..v1::RouteStatus::default()
    };
    let a = v1::InstanceStatus { routes: vec![waiting], ..instance("a", Synced, 8) };
    let b = v1::InstanceStatus {
        error: "schema 9".to_owned(),
        refused_generation: 8,
        waiting: vec!["broker: away".to_owned()],
        reported_ms: 1_700_000_100_000 - 12_000,
        ..instance("b", Nacked, 7)
    };
    bench.script.set(|state| state.status = vec![mesh(8, vec![a, b])]);
    let said = bench.run(&["status"]).await.ends(0);
    let expected = format!(
        "mesh shop, generation 8, as seen from http://{}\n
INSTANCE  STATE   GENERATION  SERVICES  VERSION  AGE  NOTE
a         SYNCED  8           pricing   0.1.0    0s
b         NACKED  7           pricing   0.1.0    12s  refused generation 8: schema 9; broker: away

ROUTE  SERVICE  INSTANCE  STATE                PARTITIONS  LAG   BEHIND  IN FLIGHT  AGE  REASON
price  pricing  a         WAITING_FOR_SERVICE  4           1203  41s     0          0s   service pricing at http://127.0.0.1:8080: connection refused (for 2m 5s)
",
        bench.address
    );
    assert_eq!(said.out, expected);
    let json = bench.run(&["status", "-o", "json"]).await.ends(0).json();
    assert_eq!(json["instances"][0]["routes"][0]["state"], "WAITING_FOR_SERVICE");
    assert_eq!((&json["instances"][1]["state"], &json["instances"][1]["age_seconds"]), (&"NACKED".into(), &12.0.into()));
    let said = bench.run(&["-o", "yaml", "status"]).await.ends(0);
    assert!(said.out.contains("generation: 8\n"), "{}", said.out);

    // A service without any instance is named, too.
    let more = format!("{TABLE}  - {{ name: bill, service: billing, from: [priced], handler: /b, to: void }}\n");
    bench.script.set(|state| state.table = Some(in_force(&more, 8)));
    let said = bench.run(&["status"]).await.ends(0);
    let row: Vec<_> = said.out.lines().filter(|line| line.contains("NO_INSTANCE")).collect();
    assert!(row.len() == 1 && row[0].starts_with("bill ") && row[0].ends_with("no live instance serves service billing"), "{}", said.out);
    let json = bench.run(&["status", "-o", "json"]).await.ends(0).json();
    assert_eq!(json["unserved"], serde_json::json!([{ "route": "bill", "service": "billing" }]));
}

#[tokio::test]
async fn graph_of_a_file_and_of_the_mesh() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let file = bench.run_with(&["graph", "-f", "routes.yaml"], "http://127.0.0.1:1", "").await.ends(0);
    assert!(file.out.contains("orders") && file.out.contains("price"), "{}", file.out);
    bench.script.set(|state| state.table = Some(in_force(TABLE, 7)));
    assert_eq!(bench.run(&["graph"]).await.ends(0).out, file.out);
    let mermaid = bench.run(&["graph", "--format", "mermaid"]).await.ends(0);
    assert!(mermaid.out.contains("flowchart") || mermaid.out.contains("graph "), "{}", mermaid.out);
    let dot = bench.run(&["graph", "--format", "dot"]).await.ends(0);
    assert!(dot.out.contains("digraph"), "{}", dot.out);

    // As data: the edges, of the mesh and of a file.
    bench.file(
        "cases.yaml",
        &TABLE.replace("to: [priced] }", "to: [priced], cases: [{ status: 202, when: 'true', to: void }], filter: 'true' }"),
    );
    let json = bench.run(&["graph", "-o", "json"]).await.ends(0).json();
    let plain = serde_json::json!({
        "route": "price", "service": "pricing", "from": ["orders"], "to": ["priced"], "cases": [], "otherwise": ["priced"],
        "dead_letter": "price.dlq",
    });
    assert_eq!(json, serde_json::json!({ "mesh": "shop", "generation": 7, "routes": [plain] }));
    let said = bench.run_with(&["graph", "-f", "cases.yaml", "-o", "yaml"], "http://127.0.0.1:1", "").await.ends(0);
    assert_eq!(
        said.out,
        "mesh: shop\ngeneration: 0\nroutes:\n- route: price\n  service: pricing\n  from:\n  - orders\n  filter: \"true\"\n  to:\n  - priced\n  - void\n  \
         cases:\n  - status: 202\n    when: \"true\"\n    to:\n    - void\n  otherwise:\n  - priced\n  dead_letter: price.dlq\n"
    );
}

#[tokio::test]
async fn an_absent_sidecar_and_wrong_flags_come_with_hints() {
    let bench = Bench::new().await;
    let said = bench.run_with(&["status"], "http://127.0.0.1:1", "").await.ends(2);
    assert!(said.err.starts_with("error: no sidecar answers at http://127.0.0.1:1: Connection refused"), "{}", said.err);
    assert!(said.err.contains("hint: ") && said.err.contains("MESH_ADMIN") && said.err.contains("listen.admin"), "{}", said.err);

    let said = bench.run(&["--admin", "ftp://x:1", "status"]).await.ends(2);
    assert!(said.err.contains("http://HOST:PORT"), "{}", said.err);
    // The flag is stronger than the environment, and needs no scheme.
    bench.script.set(|state| state.status = vec![mesh(0, vec![instance("a", v1::InstanceState::Synced, 0)])]);
    let said = bench.run_with(&["status", "--admin", &bench.address.to_string()], "http://127.0.0.1:1", "").await.ends(0);
    assert!(said.out.contains("no table applied yet"), "{}", said.out);
    bench.script.set(|state| state.status = vec![mesh(0, vec![instance("a", v1::InstanceState::Cached, 3)])]);
    let said = bench.run(&["status"]).await.ends(0);
    assert!(said.out.contains("its table is not known there yet"), "{}", said.out);

    let said = bench.run(&["--help"]).await.ends(0);
    assert!(said.out.contains("Exit codes:") && said.out.contains("MESH_ADMIN"), "{}", said.out);
}

#[tokio::test]
async fn release_says_how_many_and_who_was_not_reached() {
    let bench = Bench::new().await;
    let said = bench.run(&["release", "price", "--key", "k"]).await.ends(0);
    assert_eq!(said.out, "route price: 1 record released, to be tried again\n");
    let said = bench.run(&["release", "price", "--discard"]).await.ends(4);
    assert_eq!(said.out, "route price: 2 records sent to the dead letters\nnot reached: orders/1: nobody answers\n");
    let json = bench.run(&["release", "price", "--no-key", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["released"], &json["discarded"]), (&1.into(), &false.into()));
    // No time is little time, and not the usual one.
    bench.run(&["release", "price", "--timeout", "0s"]).await.ends(0);
    let waits: Vec<u64> = bench.script.0.lock().unwrap().released.iter().map(|asked| asked.wait_ms).collect();
    assert_eq!(waits, [30_000, 30_000, 30_000, 1]);
}

#[tokio::test]
async fn times_that_no_clock_knows_are_wrong_usage() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    for wrong in [
        &["reset", "price", "--to-earliest", "--timeout", "20000y"][..],
        &["release", "price", "--timeout", "500000000000y"],
        &["pause", "price", "--wait", "--timeout", "2d"],
        &["apply", "-f", "routes.yaml", "--wait", "--timeout", "20000y"],
        &["rollout", "abort", "--wait", "--timeout", "20000y"],
        &["drain", "--execute", "--wait", "20000y"],
        &["top", "--interval", "20000y"],
        &["graph", "--live", "--interval", "2d"],
        &["status", "--watch", "20000y"],
    ] {
        let said = bench.run(wrong).await.ends(2);
        assert!(said.err.contains("is too long: use 24h or less"), "{wrong:?}: {said:?}");
    }
    for wrong in [&["status", "--watch", "0s"][..], &["rollout", "status", "--watch", "0s"], &["lag", "--watch", "499ms"]] {
        let said = bench.run(wrong).await.ends(2);
        assert!(said.err.contains("is too short: use 500ms or more"), "{wrong:?}: {said:?}");
    }
}

#[tokio::test]
async fn each_look_is_a_document_and_trouble_ends_no_watch() {
    let bench = Bench::new().await;
    let lag = v1::GetLagResponse { now_ms: 1, ..v1::GetLagResponse::default() };
    bench.script.set(|state| {
        state.status = vec![mesh(8, vec![instance("a", v1::InstanceState::Synced, 8)])];
        state.lag = Some(lag);
    });
    for command in [&["status"][..], &["rollout", "status"], &["lag"]] {
        let run = async |more: &[&str]| bench.run(&[command, &["--watch", "500ms"], more].concat()).await;
        let said = run(&["--count", "2", "-o", "json"]).await.ends(0);
        let looks: Vec<serde_json::Value> = said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(looks.len() == 2 && looks[0] == looks[1], "{said:?}");
        let said = run(&["--count", "1", "-o", "yaml"]).await.ends(0);
        assert!(said.out.starts_with("---\n"), "{said:?}");
        // Without --watch it is one document for people and programs, as ever.
        bench.run(&[command, &["-o", "json"]].concat()).await.ends(0).json();
    }
    let said = bench.run(&["rollout", "status", "--watch", "500ms", "--count", "2"]).await.ends(0);
    let none = "no rollout: the newest table is meant for all\n";
    assert_eq!(said.out, format!("{none}\n{none}"));
    bench.run(&["status", "--count", "2"]).await.ends(2);

    // The second look fails, and so does the third, once more: that is said once.
    let fails = |fails: &[bool]| {
        bench.script.set(|state| state.fails = fails.iter().copied().collect());
    };
    fails(&[false, true, true, true, true]);
    let said = bench.run(&["status", "--watch", "500ms", "--count", "4", "-o", "json"]).await.ends(0);
    assert_eq!((said.out.lines().count(), &*said.err), (2, "the mesh cannot be looked at now: it starts\n"));
    // In trouble at the end, or from the beginning, it is an error.
    fails(&[false, true, true]);
    let said = bench.run(&["status", "--watch", "500ms", "--count", "2", "-o", "json"]).await.ends(2);
    assert!(said.out.lines().count() == 1 && said.err.starts_with("error: it starts"), "{said:?}");
    fails(&[true]);
    bench.run(&["status", "--watch"]).await.ends(2);
    assert!(bench.script.0.lock().unwrap().watched.iter().any(|watched| *watched), "instances are told that they are watched");
}

#[tokio::test]
async fn what_was_changed_is_told_also_if_the_wait_for_it_fails() {
    use v1::RouteState::{Paused, Running};
    let bench = Bench::new().await;
    let route = |state: v1::RouteState, in_flight| v1::RouteStatus {
        route: "price".into(),
        state: state.into(),
        in_flight,
        ..v1::RouteStatus::default()
    };
    let with = |state, in_flight| {
        mesh(8, vec![v1::InstanceStatus { routes: vec![route(state, in_flight)], ..instance("b", v1::InstanceState::Synced, 8) }])
    };
    bench.script.set(|state| {
        state.pause = Some(v1::PauseResponse { changed: true });
        state.abort = Some(v1::AbortRolloutResponse { generation: 8, stable_generation: 7 });
        state.status = vec![with(Running, 2), with(Paused, 2), with(Paused, 0)];
        state.fails = [true, true, false].into();
    });
    let said = bench.run(&["pause", "price", "--wait"]).await.ends(0);
    assert_eq!((&*said.out, &*said.err), ("route price is paused\n", "the sidecar does not answer: it starts\n"));
    assert!(bench.script.0.lock().unwrap().watched.iter().all(|watched| *watched), "less in flight is reported to who watches only");

    let fails = |fails: usize| {
        bench.script.set(|state| state.fails = vec![true; fails].into());
    };
    fails(1);
    let said = bench.run(&["pause", "price", "--wait", "--timeout", "0s", "-o", "json"]).await.ends(4);
    assert_eq!(said.json(), serde_json::json!({ "route": "price", "paused": true, "changed": true }));
    assert!(said.err.starts_with("error: route price is paused, but it is not known who still delivers: it starts\nhint: "), "{said:?}");
    bench.script.set(|state| state.status = vec![with(Paused, 1)]);
    let said = bench.run(&["pause", "price", "--wait", "--timeout", "0s"]).await.ends(4);
    assert_eq!(said.out, "route price is paused\nstill delivering: b: see `mesh-ctl status`\n");

    fails(1);
    let said = bench.run(&["rollout", "abort", "--wait", "--timeout", "0s"]).await.ends(4);
    assert_eq!(said.out, "aborted: generation 8 is over, all go back to generation 7\n");
    assert!(said.err.contains("generation 8 is aborted, but it is not known who still runs it: it starts"), "{said:?}");
    fails(2);
    bench.script.set(|state| state.status = vec![with(Running, 0), mesh(8, vec![instance("b", v1::InstanceState::Pending, 7)])]);
    let said = bench.run(&["rollout", "abort", "--wait", "-o", "json"]).await.ends(0);
    assert_eq!(said.json(), serde_json::json!({ "generation": 8, "stable_generation": 7, "running": [] }));
}

/// A way to an address that says nothing any more at the word, and closes nothing.
async fn tunnel(to: SocketAddr, silent: CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(to).await.unwrap();
        drop(silent.run_until_cancelled(tokio::io::copy_bidirectional(&mut near, &mut far)).await);
        std::future::pending::<()>().await;
    });
    address
}

#[tokio::test]
async fn a_stream_ends_when_its_sidecar_falls_silent_and_not_before() {
    // Over the listener of a real sidecar: it must not take pings amiss.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = tonic::service::Routes::new(ControlServer::new(Script::default())).into_axum_router();
    let (stop, silent) = (CancellationToken::new(), CancellationToken::new());
    let options = listen::Options::new("admin").drain(Duration::ZERO);
    let server = tokio::spawn(listen::serve_router(listener, router, options, stop.clone()));
    let admin = AdminAddress::new(format!("http://{}", tunnel(address, silent.clone()).await));
    let alive = KeepAlive { interval: Duration::from_millis(20), timeout: Duration::from_millis(300) };
    let mut client = admin.connect_with(alive).await.unwrap();
    let request = v1::TailRequest { topics: vec!["quiet".into()], follow: true, ..v1::TailRequest::default() };
    let mut stream = client.tail(request).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().records.len(), 2);
    // Many pings, and more than their answers may take.
    let quiet = tokio::time::timeout(Duration::from_secs(1), stream.message()).await;
    assert!(quiet.is_err(), "whoever is only quiet is not gone: {quiet:?}");
    silent.cancel();
    let status = tokio::time::timeout(Duration::from_secs(10), stream.message()).await.expect("it hangs").unwrap_err();
    assert!(std::error::Error::source(&status).is_some(), "it was noticed here: {status:?}");
    stop.cancel();
    assert_eq!(server.await.unwrap(), 1, "its end of the connection is there until the drain is over");
}

#[tokio::test]
async fn reset_says_what_it_would_do_and_what_it_did() {
    let bench = Bench::new().await;
    let partition = |number, from, to, again, skipped| v1::PartitionReset {
        topic: "orders".to_owned(),
        partition: number,
        from,
        to,
        high: 20,
        again,
        skipped,
        ..v1::PartitionReset::default()
    };
    let planned = v1::ResetResponse {
        route: "price".to_owned(),
        group: "shop.price".to_owned(),
        partitions: vec![partition(0, Some(12), 2, 10, 0), partition(1, None, 2, 0, 0)],
        executed: false,
    };
    bench.script.set(|state| state.reset = Some(Ok(planned.clone())));
    let said = bench.run(&["reset", "price", "--to-datetime", "2026-11-21 10:00"]).await.ends(0);
    assert_eq!(
        said.out,
        "route price, group shop.price: dry run, nothing is changed\ntime 2026-11-21T10:00:00Z (UTC, since no zone was named)\n\n\
         TOPIC   PARTITION  FROM  TO  OLDEST  END  AGAIN  SKIPPED  NOTE\norders  0          12    2   0       20   10     0\n\
         orders  1          -     2   0       20   0      0\n\n10 records would be delivered again, 0 records would be skipped\n"
    );
    let asked = bench.script.0.lock().unwrap().resets.pop().unwrap();
    assert_eq!((asked.to, asked.execute, asked.wait_ms), (Some(v1::reset_request::To::TimeMs(1_795_255_200_000)), false, 30_000));
    let json = bench.run(&["reset", "price", "--to-earliest", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["partitions"][0]["again"], &json["partitions"][1]["from"]), (&10.into(), &serde_json::Value::Null));

    // Nothing is reset before the copy of the offsets is written.
    bench.run(&["reset", "price", "--shift-by", "-5", "--backup", "/nowhere/file", "--execute"]).await.ends(2);
    assert!(bench.script.0.lock().unwrap().resets.drain(..).all(|asked| !asked.execute));

    for (change, code, said) in [
        (v1::PartitionReset { refused: "the range is 0 to 20".to_owned(), ..v1::PartitionReset::default() }, 1, "the range is 0 to 20"),
        (
            v1::PartitionReset { failed: "no answer from b".to_owned(), unclear: true, ..v1::PartitionReset::default() },
            4,
            "no answer from b",
        ),
        (v1::PartitionReset { failed: "busy".to_owned(), ..v1::PartitionReset::default() }, 1, "busy"),
    ] {
        let response = v1::ResetResponse { partitions: vec![change], executed: true, ..planned.clone() };
        bench.script.set(|state| state.reset = Some(Ok(response)));
        let output = bench.run(&["reset", "price", "--to-offset", "0=1,1=2", "--execute"]).await.ends(code);
        assert!(output.err.contains(said), "{}", output.err);
    }
    let asked = bench.script.0.lock().unwrap().resets.pop().unwrap();
    assert!(asked.execute && matches!(asked.to, Some(v1::reset_request::To::Offsets(offsets)) if offsets.offsets.len() == 2));
}

#[tokio::test]
async fn plan_tells_by_its_code_whether_anything_would_change() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let route = |change: v1::RouteChange, changed| v1::RoutePlan {
        route: "price".to_owned(),
        change: change.into(),
        changed,
        ..Default::default()
    };
    let planned = |route| {
        let result = v1::PlanResult { generation: 3, routes: vec![route], ..Default::default() };
        vec![
            v1::PlanProgress { read: 1, in_range: 2, ..Default::default() },
            v1::PlanProgress { finished: true, result: Some(result), ..Default::default() },
        ]
    };
    bench.script.set(|state| state.plan = planned(route(v1::RouteChange::Changed, 0)));
    let said = bench.run(&["plan", "-f", "routes.yaml", "--records", "7", "--route", "price"]).await.ends(0);
    assert!(said.out.contains("beside generation 3") && said.err.is_empty(), "{said:?}");
    let asked = bench.script.0.lock().unwrap().planned.pop().unwrap();
    assert_eq!((asked.last_records, asked.since_ms, &*asked.route, asked.samples), (7, None, "price", 5));
    assert_eq!(asked.table.unwrap().file, "routes.yaml");
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64;
    bench.run(&["plan", "-f", "routes.yaml"]).await.ends(0);
    let since = bench.script.0.lock().unwrap().planned.pop().unwrap().since_ms.unwrap();
    assert!((before - 600_000 - since).abs() < 60_000, "ten minutes, where nothing is said");

    bench.script.set(|state| state.plan = planned(route(v1::RouteChange::Changed, 1)));
    let json = bench.run(&["plan", "-f", "routes.yaml", "-o", "json"]).await.ends(1).json();
    assert_eq!((&json["changes"], &json["routes"][0]["change"], &json["generation"]), (&true.into(), &"changed".into(), &3.into()));
    bench.script.set(|state| state.plan = planned(route(v1::RouteChange::Removed, 0)));
    bench.run(&["plan", "-f", "routes.yaml"]).await.ends(1);

    let fault = v1::Fault {
        file: "routes.yaml".to_owned(),
        line: 6,
        column: 5,
        message: "no".to_owned(),
        code: "value".to_owned(),
        ..Default::default()
    };
    bench.script.set(|state| state.plan = vec![v1::PlanProgress { finished: true, faults: vec![fault], ..Default::default() }]);
    let said = bench.run(&["plan", "-f", "routes.yaml"]).await.ends(1);
    assert!(
        said.out.is_empty() && said.err.contains("routes.yaml:6:5: error[value]: no") && said.err.contains("nothing was read"),
        "{said:?}"
    );
    // A sidecar that goes away has not planned.
    bench.script.set(|state| state.plan = Vec::new());
    bench.run(&["plan", "-f", "routes.yaml"]).await.ends(2);
    bench.run(&["plan", "-f", "routes.yaml", "--last", "1h", "--records", "3"]).await.ends(2);
    bench.run(&["plan", "-f", "absent.yaml"]).await.ends(2);
}

#[tokio::test]
async fn explain_and_trace_show_what_was_found() {
    let bench = Bench::new().await;
    let said = bench.run(&["explain", "nope/0/1"]).await.ends(2);
    assert!(said.err.contains("there is no topic nope"), "{said:?}");
    bench.run(&["explain", "orders/1"]).await.ends(2);
    let at = |topic: &str, offset| Some(v1::Position { topic: topic.to_owned(), partition: 1, offset });
    let flow =
        v1::FlowRecord { position: at("orders", 5), mesh_id: "a".to_owned(), kind: v1::FlowKind::Published.into(), ..Default::default() };
    let reply = v1::FlowRecord {
        position: at("priced", 2),
        source: at("orders", 5),
        kind: v1::FlowKind::Reply.into(),
        route: "price".to_owned(),
        ..Default::default()
    };
    let explained = v1::ExplainResponse { flow: Some(flow.clone()), found: vec![reply.clone()], ..Default::default() };
    bench.script.set(|state| state.explained = Some(explained));
    let said = bench.run(&["explain", "orders/1/5"]).await.ends(0);
    assert!(said.out.starts_with("orders/1/5  published") && said.out.contains("priced/1/2  reply of price"), "{said:?}");
    let json = bench.run(&["explain", "orders/1/5", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["record"]["mesh_id"], &json["record"]["made"][0]["route"]), (&"a".into(), &"price".into()));

    let said = bench.run(&["trace", "a"]).await.ends(1);
    assert!(said.out.is_empty() && said.err.contains("no such record"), "{said:?}");
    bench.script.set(|state| state.flow = v1::TraceResponse { records: vec![flow, reply], ..Default::default() });
    let said = bench.run(&["trace", "a", "--last", "2h"]).await.ends(0);
    assert!(said.out.starts_with("orders/1/5  published") && said.out.contains("\n└─ priced/1/2  reply of price"), "{said:?}");
    let json = bench.run(&["trace", "a", "--from", "2026-11-21", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["records"], &json["flow"][0]["made"][0]["topic"]), (&2.into(), &"priced".into()));
    let asked: Vec<i64> = bench.script.0.lock().unwrap().traced.iter().map(|asked| asked.since_ms).collect();
    assert!(asked[1] < asked[0] && asked[2] == 1_795_219_200_000, "{asked:?}");
    bench.run(&["trace"]).await.ends(2);
}

#[tokio::test]
async fn records_are_lines_and_a_cut_is_told() {
    let bench = Bench::new().await;
    let said = bench.run(&["tail", "orders", "--from", "3"]).await.ends(0);
    assert_eq!(said.out, "0/5  2026-11-21T10:00:00.000Z  -  {\"n\":1}\n0/6  2026-11-21T10:00:00.000Z  -  text\n");
    assert!(
        said.err.contains("offset 3 does not exist any more: it begins at 5") && said.err.contains("2 records, 1 filtered out"),
        "{said:?}"
    );
    let said = bench.run(&["tail", "orders", "-o", "json", "-q"]).await.ends(0);
    assert_eq!(
        said.out.lines().next().unwrap(),
        "{\"topic\":\"orders\",\"partition\":0,\"offset\":5,\"timestamp\":1795255200000,\"key\":null,\"value\":{\"json\":{ \"n\": 1 }},\"headers\":[]}"
    );
    assert_eq!(said.err, "");
    let said = bench.run(&["tail", "orders", "-f", "-o", "yaml"]).await.ends(4);
    assert!(said.out.contains("---\n") && said.err.contains("the sidecar shuts down: 2 records printed"), "{said:?}");
    for wrong in [&["tail"][..], &["tail", "a", "--from", "soon"], &["tail", "a", "--limit", "0"], &["tail", "a", "--partition", "-1"]] {
        bench.run(wrong).await.ends(2);
    }
}

#[tokio::test]
async fn what_became_of_published_records_is_told() {
    let bench = Bench::new().await;
    let admin = format!("http://{}", bench.address);
    let said = bench.run(&["produce", "orders", "--value", "x"]).await.ends(0);
    assert_eq!(said.out, "stored orders/1/7  id\n");
    let said = bench.run_with(&["produce", "orders"], &admin, "all of it").await.ends(0);
    assert_eq!(said.out, "stored orders/1/7  id\n");
    let said = bench.run_with(&["produce", "orders", "--lines"], &admin, "a\n\nmaybe\nb\n").await.ends(4);
    assert_eq!(
        (&*said.out, said.err.trim()),
        ("2 records stored, 1 not known to be stored\n", "line 3: not known to be stored: publish-timeout: no answer")
    );
    let said = bench.run_with(&["produce", "--json"], &admin, "{\"topic\":\"a\",\"value\":1}\n{\"value\":2}\n").await.ends(1);
    assert!(
        said.out == "1 record stored, 1 refused\n" && said.err.contains("line 2: refused: bad-record: it names no `topic`"),
        "{said:?}"
    );
    let said = bench.run_with(&["produce", "orders", "--lines"], &admin, "a\ngo\n").await.ends(4);
    assert!(said.err.contains("gone") && said.err.contains("whether they are stored"), "{said:?}");
    let said = bench.run_with(&["produce", "orders", "--lines", "-o", "json"], &admin, "").await.ends(0);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&said.out).unwrap()["stored"], 0);
    for wrong in [
        &["produce", "--value", "x"][..],
        &["produce", "a", "--value", "x", "--tombstone"],
        &["produce", "a", "--value", "x", "--header", "x"],
    ] {
        bench.run(wrong).await.ends(2);
    }
}

#[tokio::test]
async fn topics_are_columns_and_what_is_refused_has_its_code() {
    let bench = Bench::new().await;
    let said = bench.run(&["topics", "list"]).await.ends(0);
    assert_eq!(
        said.out,
        "TOPIC   PARTITIONS  REPLICATION  RECORDS  SIZE     USED BY\norders  12          3            48211    -        price from\n\
         other   1           0            -        2.0 KiB\n"
    );
    assert!(said.err.contains("1 topic"), "{said:?}");
    let said = bench.run(&["topics", "describe", "order"]).await.ends(2);
    assert!(said.err.contains("did you mean orders?"), "{said:?}");
    bench.run(&["topics", "create", "orders"]).await.ends(1);
    let said = bench.run(&["topics", "alter", "orders", "--partitions", "24"]).await.ends(0);
    assert_eq!((&*said.out, said.err.trim()), ("~ orders: partitions: 12 → 24\n", "warning: keys move"));
    bench.run(&["topics", "alter", "orders"]).await.ends(2);
    let said = bench.run(&["topics", "delete", "a", "b"]).await.ends(0);
    assert!(said.out.ends_with("preview: nothing is deleted; --execute does it, for good\n"), "{said:?}");
    let said = bench.run(&["topics", "delete", "a", "b", "--execute"]).await.ends(0);
    assert!(said.out.ends_with("2 topics deleted\n"), "{said:?}");
    bench.run(&["lag", "nobody"]).await.ends(2);
    bench.run(&["lag", "--count", "3"]).await.ends(2);
}

#[tokio::test]
async fn shells_and_man_know_every_command() {
    let bench = Bench::new().await;
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let said = bench.run(&["completion", shell]).await.ends(0);
        assert!(["tail", "produce", "redrive", "describe"].iter().all(|command| said.out.contains(command)), "{shell}");
    }
    bench.run(&["completion", "dos"]).await.ends(2);
    bench.run(&["man", "pages/man1"]).await.ends(0);
    for page in ["mesh-ctl.1", "mesh-ctl-tail.1", "mesh-ctl-topics-alter.1"] {
        let text = std::fs::read_to_string(bench.folder.path().join("pages/man1").join(page)).unwrap();
        assert!(text.contains(".TH"), "{page}");
    }
}

#[tokio::test]
async fn a_drain_is_shown_then_done_and_waited_for() {
    let bench = Bench::new().await;
    let route = |partitions| v1::RouteStatus {
        route: "price".into(),
        service: "pricing".into(),
        state: v1::RouteState::Running.into(),
        partitions,
        ..v1::RouteStatus::default()
    };
    let with = |name: &str| v1::InstanceStatus { routes: vec![route(2)], ..instance(name, v1::InstanceState::Synced, 1) };
    let status = |names: &[&str]| v1::GetStatusResponse { instance: "a".into(), ..mesh(1, names.iter().map(|name| with(name)).collect()) };
    bench.script.set(|state| state.status = vec![status(&["a", "b", "silent"])]);

    let said = bench.run(&["drain", "b"]).await.ends(0);
    assert_eq!(
        said.out,
        "instance b: 0 deliveries at its services\nROUTE  SERVICE  PARTITIONS  LAG  IN FLIGHT  TAKEN OVER BY\n\
         price  pricing  2           0    0          a, silent\npreview: nothing is drained; --execute does it\n"
    );
    assert!(bench.script.0.lock().unwrap().drained.is_empty(), "a preview asks for nothing");
    let said = bench.run(&["drain", "c", "--execute"]).await.ends(2);
    assert!(said.err.contains("there is no instance c in mesh shop") && said.err.contains("there are: a, b, silent"), "{said:?}");
    bench.run(&["drain", "silent", "--execute"]).await.ends(4);
    bench.run(&["drain", "b", "--no-wait", "--wait", "1s"]).await.ends(2);

    // It is done when it has left the list; until then it drains.
    bench.script.set(|state| state.status = vec![status(&["a", "b"]), status(&["a", "b"]), status(&["a"])]);
    let said = bench.run(&["drain", "b", "--execute", "-o", "json"]).await.ends(0).json();
    assert_eq!((&said["executed"], &said["ended"], &said["in_flight"]), (&true.into(), &true.into(), &2.into()));
    assert_eq!(said["routes"][0]["others"], serde_json::json!(["a"]));
    bench.script.set(|state| state.status = vec![status(&["a", "b"])]);
    let said = bench.run(&["drain", "b", "--execute", "--wait", "300ms"]).await.ends(4);
    assert!(said.err.contains("b has not ended within"), "{said:?}");
    let said = bench.run(&["drain", "--execute", "--no-wait"]).await.ends(0);
    assert_eq!(said.out, "instance a drains: 2 deliveries at its services when it began\n");
    assert_eq!(bench.script.0.lock().unwrap().drained.last().unwrap().instance, "a", "without a name it is the one that answers");
}

#[tokio::test]
async fn the_doctor_ends_with_one_when_something_does_not_work() {
    let bench = Bench::new().await;
    let finding = |severity: v1::Severity| v1::Finding {
        severity: severity.into(),
        check: "routes".into(),
        subject: "price".into(),
        what: "it waits".into(),
        fix: "start it".into(),
    };
    let findings = |all: &[v1::Severity]| v1::DiagnoseResponse {
        mesh: "shop".into(),
        instance: "a".into(),
        findings: all.iter().map(|severity| finding(*severity)).collect(),
    };
    bench.script.set(|state| state.findings = findings(&[v1::Severity::Warning, v1::Severity::Ok]));
    let said = bench.run(&["doctor"]).await.ends(0);
    assert!(said.out.ends_with("\n0 errors, 1 warning\n") && said.err.is_empty(), "{said:?}");
    bench.script.set(|state| state.findings = findings(&[v1::Severity::Error]));
    let said = bench.run(&["doctor", "-o", "json"]).await.ends(1).json();
    assert_eq!(
        (&said["errors"], &said["findings"][0]["severity"], &said["findings"][0]["fix"]),
        (&1.into(), &"error".into(), &"start it".into())
    );
    assert_eq!(bench.run(&["-q", "doctor"]).await.ends(1).out.lines().count(), 2);
}

#[tokio::test]
async fn dead_letters_are_counted_shown_sent_back_and_deleted() {
    let bench = Bench::new().await;
    for wrong in [&["dlq", "list"][..], &["dlq", "show", "price"], &["dlq", "redrive", "price"], &["dlq", "purge", "price", "--all"]] {
        let said = bench.run(wrong).await.ends(2);
        assert!(said.err.contains("there is no such route"), "{said:?}");
    }
    let count = |route: &str, letters, redriven| v1::DeadLetterCount {
        route: route.into(),
        topic: format!("{route}.dlq"),
        letters,
        redriven,
        reasons: if letters > 0 { [("status".to_owned(), 1), ("attempts".to_owned(), letters - 1)].into() } else { Default::default() },
        oldest_ms: 1_795_255_201_000,
        newest_ms: 1_795_255_452_000,
    };
    let letter = v1::DeadLetter {
        record: Some(v1::Record {
            key: Some("order-1".into()),
            value: Some("{\"n\":1}".into()),
            headers: vec![v1::Header { name: "source".into(), value: Some("web".into()) }],
            content_type: "application/json".into(),
            mesh_id: "id-1".into(),
            ..v1::Record::default()
        }),
        position: Some(v1::Position { topic: "price.dlq".into(), partition: 3, offset: 1042 }),
        writer: "price".into(),
        route: "price".into(),
        reason: "attempts".into(),
        detail: "503:\nbusy".into(),
        attempts: 10,
        topic: "orders".into(),
        partition: Some(3),
        offset: Some(7),
        timestamp_ms: Some(1_795_255_200_000),
        time_ms: 1_795_255_201_000,
        redriven: false,
        cut: String::new(),
    };
    let binary = v1::DeadLetter {
        record: Some(v1::Record { value: Some(vec![0xff, 0].into()), ..v1::Record::default() }),
        position: Some(v1::Position { topic: "price.dlq".into(), partition: 0, offset: 1 }),
        attempts: 0,
        partition: None,
        offset: None,
        redriven: true,
        ..letter.clone()
    };
    bench.script.set(|state| {
        state.counts = Some(v1::ListDeadLettersResponse { counts: vec![count("mail", 0, 0), count("price", 40, 2)], complete: false });
        state.letters = Some(vec![letter.clone(), binary]);
    });

    let said = bench.run(&["dlq", "list"]).await.ends(0);
    assert_eq!(
        said.out,
        "ROUTE  TOPIC      LETTERS  REDRIVEN  OLDEST                NEWEST                REASONS\n\
         mail   mail.dlq   0        0         -                     -\n\
         price  price.dlq  40       2         2026-11-21T10:00:01Z  2026-11-21T10:04:12Z  attempts 39, status 1\n"
    );
    assert_eq!(said.err, "there are more: only the first million was counted\n");
    let json = bench.run(&["dlq", "list", "-o", "json"]).await.ends(0).json();
    let price = serde_json::json!({
        "route": "price", "topic": "price.dlq", "letters": 40, "redriven": 2, "reasons": { "attempts": 39, "status": 1 },
        "oldest_ms": 1_795_255_201_000_i64, "newest_ms": 1_795_255_452_000_i64,
    });
    assert_eq!((&json[1], &json[0]["oldest_ms"]), (&price, &serde_json::Value::Null));

    let shown = "3/1042  2026-11-21T10:00:01Z\n  reason  attempts after 10 attempts: 503: busy\n  origin  orders/3/7\n  id      id-1\n  \
                          key     order-1\n  value   {\"n\":1}\n";
    let said = bench.run(&["dlq", "show", "price"]).await.ends(0);
    assert_eq!(
        said.out,
        format!(
            "{shown}0/1  2026-11-21T10:00:01Z, redriven already\n  reason  attempts: 503: busy\n  origin  orders/?/?\n  id      \n  \
             key     -\n  value   (2 bytes of binary data; -o json shows them)\n"
        )
    );
    assert_eq!(said.err, "2 letters shown\n");
    let said = bench.run(&["dlq", "show", "price", "-o", "json"]).await.ends(0);
    let lines: Vec<serde_json::Value> = said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let first = serde_json::json!({
        "place": { "topic": "price.dlq", "partition": 3, "offset": 1042 },
        "writer": "price", "route": "price", "reason": "attempts", "detail": "503:\nbusy", "attempts": 10, "time_ms": 1_795_255_201_000_i64,
        "redriven": false, "cut": null,
        "origin": { "topic": "orders", "partition": 3, "offset": 7, "timestamp_ms": 1_795_255_200_000_i64 },
        "mesh_id": "id-1", "content_type": "application/json", "key": "order-1", "value": "{\"n\":1}",
        "headers": [{ "name": "source", "value": "web" }],
    });
    assert_eq!((lines.len(), &lines[0], &lines[1]["value_base64"]), (2, &first, &"/wA=".into()));

    let progress = v1::RedriveProgress {
        topic: "price.dlq".into(),
        matched: 3,
        redriven: 1,
        already: 1,
        refused: 0,
        samples: vec![letter],
        finished: true,
        ..v1::RedriveProgress::default()
    };
    bench.script.set(|state| state.redrive = Some(vec![Ok(progress.clone())]));
    let said = bench.run(&["dlq", "redrive", "price"]).await.ends(0);
    assert_eq!(
        said.out,
        format!(
            "price.dlq: 3 letters meant, 1 would be sent back to price, 1 sent back before, 0 refused\n{shown}\
             preview: nothing is sent; --execute does it\n"
        )
    );
    let done = v1::RedriveProgress {
        executed: true,
        refused: 1,
        refusals: vec!["0/1: its topic is gone".into()],
        samples: Vec::new(),
        ..progress.clone()
    };
    let going = v1::RedriveProgress { finished: false, ..done.clone() };
    bench.script.set(|state| state.redrive = Some(vec![Ok(going.clone()), Ok(done)]));
    let said = bench.run(&["dlq", "redrive", "price", "--every-route", "--execute"]).await.ends(1);
    assert_eq!(
        said.out,
        "price.dlq: 3 letters meant, 1 sent back to every route of their topic, 1 sent back before, 1 refused\nrefused: 0/1: its topic is gone\n"
    );
    let json = bench.run(&["dlq", "redrive", "price", "--execute", "-o", "json"]).await.ends(1).json();
    let expected = serde_json::json!({
        "topic": "price.dlq", "matched": 3, "redriven": 1, "already": 1, "refused": 1, "refusals": ["0/1: its topic is gone"],
        "executed": true, "samples": [], "cut": 0, "cuts": [],
    });
    assert_eq!(json, expected);
    // What was not begun is an error, of what was begun not all is known.
    let away = || Err(Status::unavailable("the broker is away"));
    for (told, arguments, code) in [
        (vec![away()], &["--execute"][..], 2),
        (vec![Ok(going.clone()), away()], &["--execute"], 4),
        (vec![Ok(going.clone()), away()], &[], 2),
        (vec![Ok(going)], &["--execute"], 4),
    ] {
        bench.script.set(|state| state.redrive = Some(told));
        let said = bench.run(&[&["dlq", "redrive", "price"], arguments].concat()).await.ends(code);
        assert!(said.out.is_empty() && said.err.starts_with("error: the "), "{said:?}");
    }

    let partitions =
        vec![v1::PurgedPartition { partition: 0, from: 2, until: 12 }, v1::PurgedPartition { partition: 3, from: 0, until: 5 }];
    let purged = v1::PurgeDeadLettersResponse { topic: "price.dlq".into(), partitions, shared_with: vec!["mail".into()], executed: false };
    bench.script.set(|state| state.purge = Some(purged));
    let table = "TOPIC      PARTITION  FROM  UNTIL\nprice.dlq  0          2     12\nprice.dlq  3          0     5\n\
                 the dead letters of mail lie there too\n";
    let said = bench.run(&["dlq", "purge", "price", "--all"]).await.ends(0);
    assert_eq!(said.out, format!("{table}preview: 15 offsets would be deleted, for good; --execute does it\n"));
    let said = bench.run(&["dlq", "purge", "price", "--all", "--shared", "--execute"]).await.ends(0);
    assert_eq!(said.out, format!("{table}15 offsets are deleted\n"));
    let json = bench.run(&["dlq", "purge", "price", "--all", "-o", "json"]).await.ends(0).json();
    let expected = serde_json::json!({
        "topic": "price.dlq", "partitions": [{ "partition": 0, "from": 2, "until": 12 }, { "partition": 3, "from": 0, "until": 5 }],
        "offsets": 15, "shared_with": ["mail"], "executed": false,
    });
    assert_eq!(json, expected);
}

#[tokio::test]
async fn a_replay_is_counted_then_done() {
    let bench = Bench::new().await;
    let replay = ["replay", "--from", "orders", "--to", "orders-test"];
    bench.run(&replay).await.ends(2);
    let progress = v1::ReplayProgress {
        to: "orders-test".into(),
        in_range: 12,
        read: 10,
        copied: 6,
        filtered: 3,
        failed: 1,
        failure: "orders/0/4: no such key".into(),
        executed: false,
        finished: true,
    };
    bench.script.set(|state| state.replay = Some(vec![Ok(progress.clone())]));
    let said = bench.run(&replay).await.ends(0);
    assert_eq!(
        said.out,
        "10 records read, 6 would be copied into orders-test, 3 filtered out, 1 not judged\nthe filter failed on orders/0/4: no such key\n\
         preview: nothing is copied; --execute does it\n"
    );
    let json = bench.run(&[&replay[..], &["-o", "json"]].concat()).await.ends(0).json();
    let expected = serde_json::json!({
        "to": "orders-test", "in_range": 12, "read": 10, "copied": 6, "filtered": 3, "failed": 1, "failure": "orders/0/4: no such key",
        "executed": false,
    });
    assert_eq!(json, expected);

    let execute = [&replay[..], &["--execute"]].concat();
    let going = v1::ReplayProgress { finished: false, executed: true, ..progress.clone() };
    let done = v1::ReplayProgress { failed: 0, failure: String::new(), finished: true, ..going.clone() };
    bench.script.set(|state| state.replay = Some(vec![Ok(going.clone()), Ok(done)]));
    assert_eq!(bench.run(&execute).await.ends(0).out, "10 records read, 6 copied into orders-test, 3 filtered out, 0 not judged\n");
    let away = || Err(Status::unavailable("the broker is away"));
    for (told, code, why) in [
        (vec![away()], 2, "the broker is away"),
        (vec![Ok(going.clone()), away()], 4, "the broker is away"),
        (vec![Ok(going)], 4, "the sidecar ended after 6 copies"),
    ] {
        bench.script.set(|state| state.replay = Some(told));
        let said = bench.run(&execute).await.ends(code);
        assert!(said.out.is_empty() && said.err.starts_with(&format!("error: {why}")), "{said:?}");
    }
}
