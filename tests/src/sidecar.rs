//! A real sidecar process, and `mesh-ctl`.
//!
//! Invariant: the binaries are built from the present sources, once per test process, in the profile that the tests have; with
//! `MESH_BIN_DIR` they are taken from there as they are.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_proto::v1::{
    GetStatusRequest, GetStatusResponse, InstanceState, RouteState, RouteStatus, control_client::ControlClient, mesh_client::MeshClient,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::{
    broker::Broker,
    http::Http,
    ports::Port,
    process::{Output, Process, run},
    service::Service,
    stage::Stage,
};

/// How long a sidecar may take until it is ready; generous, since suites share two cores with a broker.
const READY: Duration = Duration::from_secs(60);

/// The folder of the binaries `mesh-sidecar` and `mesh-ctl`, built if need be.
///
/// # Errors
/// If they do not build.
pub async fn binaries() -> Result<&'static Path> {
    static FOLDER: OnceCell<PathBuf> = OnceCell::const_new();
    FOLDER.get_or_try_init(build).await.map(PathBuf::as_path)
}

async fn build() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("MESH_BIN_DIR") {
        return Ok(folder.into());
    }
    // target/<profile>/deps/<test>
    let test = std::env::current_exe()?;
    let folder = test.parent().filter(|folder| folder.ends_with("deps")).and_then(Path::parent).or(test.parent());
    let folder = folder.context("the folder of the test")?.to_owned();
    cargo(&folder, &["-p", "mesh-sidecar", "-p", "mesh-ctl", "--bins"]).await?;
    Ok(folder)
}

/// The sidecar that can be told to break its promises (`MESH_MUTATION`), built if need be.
///
/// # Errors
/// If it does not build.
async fn mutant() -> Result<&'static Path> {
    static BINARY: OnceCell<PathBuf> = OnceCell::const_new();
    let build = async || {
        let test = std::env::current_exe()?;
        let folder = test.parent().filter(|folder| folder.ends_with("deps")).and_then(Path::parent).or(test.parent());
        let folder = folder.context("the folder of the test")?.to_owned();
        cargo(&folder, &["-p", "mesh-sidecar", "--bin", "mesh-sidecar-mutant", "--features", "mutations"]).await?;
        anyhow::Ok(folder.join("mesh-sidecar-mutant"))
    };
    BINARY.get_or_try_init(build).await.map(PathBuf::as_path)
}

/// Builds with Cargo into a folder `target/<profile>`; other test processes wait.
async fn cargo(folder: &Path, what: &[&str]) -> Result<()> {
    let profile = folder.file_name().and_then(|name| name.to_str()).context("the profile")?;
    let profile = if profile == "debug" { "dev" } else { profile };
    let lock = File::create(folder.join(".mesh-tests-build"))?;
    let _held = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock)).await??;
    let begin = Instant::now();
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::workspace()).args(["build", "--quiet", "--profile", profile]).args(what);
    run(command, Vec::new(), Duration::from_secs(1800)).await?.success().context("the binaries do not build")?;
    eprintln!("built: {} ({:.1?})", what.join(" "), begin.elapsed());
    Ok(())
}

/// What a sidecar is configured with.
#[derive(Debug)]
pub struct Builder {
    stage: Stage,
    name: String,
    services: Vec<Value>,
    instance: Option<String>,
    table: Option<String>,
    otlp: Option<String>,
    broker: Option<Value>,
    log: String,
    environment: Vec<(String, String)>,
    mutation: Option<String>,
}

impl Builder {
    pub(crate) fn new(stage: Stage, name: &str) -> Self {
        Self {
            stage,
            name: name.to_owned(),
            services: Vec::new(),
            instance: None,
            table: None,
            otlp: None,
            broker: None,
            log: std::env::var("MESH_TEST_LOG").unwrap_or_else(|_| "info".to_owned()),
            environment: Vec::new(),
            mutation: None,
        }
    }

    /// A fault that is built in: for tests of what must notice it.
    #[must_use]
    pub fn mutation(mut self, name: &str) -> Self {
        self.mutation = Some(name.to_owned());
        self
    }

    /// Serves a service over HTTP/1.1.
    #[must_use]
    pub fn service(self, name: &str, service: &Service) -> Self {
        self.app(name, &service.url())
    }

    /// Serves a service at this address.
    #[must_use]
    pub fn app(mut self, name: &str, app: &str) -> Self {
        self.services.push(json!({ "name": name, "app": app }));
        self
    }

    /// Serves a service that is never called: it publishes, attaches or polls.
    #[must_use]
    pub fn client(mut self, name: &str) -> Self {
        self.services.push(json!({ "name": name }));
        self
    }

    /// Serves a service with any configuration.
    #[must_use]
    pub fn service_config(mut self, config: Value) -> Self {
        self.services.push(config);
        self
    }

    /// Names the instance: static membership.
    #[must_use]
    pub fn instance(mut self, name: &str) -> Self {
        self.instance = Some(format!("{}-{name}", self.stage.mesh()));
        self
    }

    /// Pins a table; see [`Stage::table`] for its form.
    #[must_use]
    pub fn pinned(mut self, spec: &str) -> Self {
        self.table = Some(self.stage.table(spec));
        self
    }

    /// Sends spans to this collector.
    #[must_use]
    pub fn otlp(mut self, address: SocketAddr) -> Self {
        self.otlp = Some(format!("http://{address}"));
        self
    }

    /// Another broker than the stage's, as the configuration has it.
    #[must_use]
    pub fn broker(mut self, broker: Value) -> Self {
        self.broker = Some(broker);
        self
    }

    /// The log's filter.
    #[must_use]
    pub fn log(mut self, filter: &str) -> Self {
        self.log = filter.to_owned();
        self
    }

    /// A variable of the environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// If it does not get ready in time.
    pub async fn start(self) -> Result<Sidecar> {
        let mut sidecar = self.prepare().await?;
        sidecar.start().await?;
        Ok(sidecar)
    }

    /// Writes its configuration and starts nothing yet.
    ///
    /// # Errors
    /// If the configuration cannot be written.
    pub async fn prepare(self) -> Result<Sidecar> {
        let binaries = binaries().await?;
        let program = match &self.mutation {
            Some(_) => mutant().await?.to_owned(),
            None => binaries.join("mesh-sidecar"),
        };
        let mut environment = self.environment;
        environment.extend(self.mutation.map(|mutation| ("MESH_MUTATION".to_owned(), mutation)));
        let (api, admin, probe) = (Port::take()?, Port::take()?, Port::take()?);
        let folder = self.stage.folder();
        let broker = match (&self.broker, self.stage.broker()) {
            (Some(broker), _) => broker.clone(),
            (None, Broker::Embedded) => json!({ "embedded": { "path": folder.join("data") } }),
            (None, Broker::Kafka(bootstrap)) => json!({ "kafka": { "bootstrap.servers": bootstrap } }),
        };
        let services = if self.services.is_empty() { vec![json!({ "name": "client" })] } else { self.services };
        let caller = services[0]["name"].as_str().context("a service has no name")?.to_owned();
        let mut config = json!({
            "apiVersion": "mesh/v1",
            "kind": "Sidecar",
            "mesh": self.stage.mesh(),
            "services": services,
            "state": folder.join(format!("{}-state", self.name)),
            "broker": broker,
            "listen": { "api": api.address(), "admin": admin.address(), "probe": probe.address() },
            "telemetry": { "log": self.log },
        });
        if let Some(instance) = &self.instance {
            config["instance"] = json!(instance);
        }
        if let Some(table) = &self.table {
            config["table"] = json!({ "file": self.stage.file(&format!("{}-table.yaml", self.name), table)? });
        }
        if let Some(otlp) = &self.otlp {
            config["telemetry"]["otlp"] = json!(otlp);
        }
        // JSON is YAML.
        let file = self.stage.file(&format!("{}.yaml", self.name), &serde_json::to_string_pretty(&config)?)?;
        Ok(Sidecar {
            http: Http::new(api.address()).always("mesh-service", &caller),
            caller,
            probes: Http::new(probe.address()),
            log: folder.join(format!("{}.log", self.name)),
            stage: self.stage,
            name: self.name,
            binaries,
            program,
            file,
            environment,
            api,
            admin,
            probe,
            process: None,
            started_ms: 0,
            channel: OnceCell::new(),
        })
    }
}

/// A sidecar: its configuration, and its process if it runs.
#[derive(Debug)]
pub struct Sidecar {
    stage: Stage,
    name: String,
    binaries: &'static Path,
    program: PathBuf,
    file: PathBuf,
    log: PathBuf,
    environment: Vec<(String, String)>,
    api: Port,
    admin: Port,
    probe: Port,
    caller: String,
    http: Http,
    probes: Http,
    process: Option<Process>,
    started_ms: i64,
    channel: OnceCell<Channel>,
}

impl Sidecar {
    /// Starts the process, and waits until it is ready.
    ///
    /// # Errors
    /// If it does not get ready in time, or ends.
    pub async fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_ready().await
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// If it is not in time, or ends.
    pub async fn wait_ready(&mut self) -> Result<()> {
        self.wait_probe("/readyz", 200, READY).await
    }

    /// Starts the process and waits for nothing.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&mut self) -> Result<()> {
        let mut command = Command::new(&self.program);
        command.arg("run").arg("--config").arg(&self.file).stdin(Stdio::null());
        command.stdout(Stdio::from(File::options().create(true).append(true).open(&self.log)?));
        for variable in std::env::vars_os().map(|variable| variable.0).filter(|name| name.to_string_lossy().starts_with("MESH_")) {
            command.env_remove(variable);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.started_ms = i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_millis())?;
        self.process = Some(Process::start(format!("sidecar {}", self.name), command, &self.log)?);
        Ok(())
    }

    /// Its process.
    ///
    /// # Errors
    /// If it does not run.
    pub fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().with_context(|| format!("sidecar {} does not run", self.name))
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    /// If it ended by itself before.
    pub async fn kill9(&mut self) -> Result<()> {
        self.process()?.kill9().await?;
        self.process = None;
        Ok(())
    }

    /// `SIGTERM`, and waits for its end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub async fn sigterm(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let process = self.process()?;
        process.signal(Signal::TERM)?;
        let status = process.wait(deadline).await?;
        self.process = None;
        Ok(status)
    }

    /// `SIGTERM`, and expects a clean end within 30 s: for the end of a test.
    ///
    /// # Errors
    /// If it does not end, or not with 0.
    pub async fn finish(mut self) -> Result<()> {
        let status = self.sigterm(Duration::from_secs(30)).await?;
        ensure!(status.success(), "sidecar {} ended with {status} after SIGTERM", self.name);
        Ok(())
    }

    /// Waits until a probe answers with this status.
    ///
    /// # Errors
    /// If it does not in time, or the process ends.
    pub async fn wait_probe(&mut self, path: &str, status: u16, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let mut last = String::from("no answer");
        loop {
            let process = self.process()?;
            if let Some(status) = process.exited() {
                bail!("ended with {status}\n{}", process.log_tail());
            }
            match self.probes.get(path).await {
                Ok(answer) if answer.status == status => return Ok(()),
                Ok(answer) => last = format!("{}: {}", answer.status, answer.text()),
                Err(error) => last = format!("{error:#} (before: {last:.200})"),
            }
            if Instant::now() > end {
                bail!("{path} is not {status} after {deadline:?}: {last}\n{}", self.process()?.log_tail());
            }
            // An external process has no event to await.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The HTTP API.
    pub fn http(&self) -> &Http {
        &self.http
    }

    /// The value of a series of `/metrics`: its name, with its labels if it has some, as they are written there.
    ///
    /// # Errors
    /// If nobody answers, or there is no such series.
    pub async fn metric(&self, series: &str) -> Result<f64> {
        let text = self.probes.get("/metrics").await?.expect(200)?.text();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("no {series} in\n{text}"))?.trim().parse()?)
    }

    /// The probe listener.
    pub fn probes(&self) -> &Http {
        &self.probes
    }

    /// The API's address.
    pub fn api_address(&self) -> SocketAddr {
        self.api.address()
    }

    /// The admin's address.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.address()
    }

    /// The probes' address.
    pub fn probe_address(&self) -> SocketAddr {
        self.probe.address()
    }

    /// The file of its configuration.
    pub fn config_file(&self) -> &Path {
        &self.file
    }

    /// Everything that it logged.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// An HTTP client of the API of its own, with connections of its own, in the name of the first service.
    pub fn client(&self) -> Http {
        self.client_as(&self.caller)
    }

    /// The same in the name of another service: with several in one sidecar, a caller names itself.
    pub fn client_as(&self, service: &str) -> Http {
        Http::new(self.api_address()).always("mesh-service", service)
    }

    /// A gRPC client of the API, in the name of the first service; reconnects by itself.
    ///
    /// # Errors
    /// If the address is none.
    pub async fn mesh(&self) -> Result<Mesh> {
        self.mesh_as(&self.caller).await
    }

    /// The same in the name of another service.
    ///
    /// # Errors
    /// If the name fits into no header.
    pub async fn mesh_as(&self, service: &str) -> Result<Mesh> {
        let connect = async || anyhow::Ok(Endpoint::from_shared(format!("http://{}", self.api_address()))?.connect_lazy());
        mesh_client(self.channel.get_or_try_init(connect).await?.clone(), service)
    }

    /// The state of the mesh, by the admin API, without what instances reported that are gone: those that are lost, and what was reported
    /// before this sidecar's last start.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn status(&self) -> Result<GetStatusResponse> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.admin_address()))?;
        let mut status = ControlClient::new(endpoint.connect().await?).get_status(GetStatusRequest::default()).await?.into_inner();
        status.instances.retain(|instance| instance.state() != InstanceState::Lost && instance.reported_ms >= self.started_ms);
        Ok(status)
    }

    /// Waits until the state of the mesh fulfils a condition.
    ///
    /// # Errors
    /// If it does not in time; with the last state.
    pub async fn wait_status(
        &self,
        what: &str,
        deadline: Duration,
        condition: impl Fn(&GetStatusResponse) -> bool,
    ) -> Result<GetStatusResponse> {
        let end = Instant::now() + deadline;
        loop {
            let status = self.status().await;
            match status {
                Ok(status) if condition(&status) => return Ok(status),
                other if Instant::now() > end => bail!("not {what} after {deadline:?}: {other:#?}"),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Waits until every one of these routes runs and owns partitions.
    ///
    /// # Errors
    /// If they do not in time.
    pub async fn wait_running(&self, routes: &[&str]) -> Result<()> {
        let what = format!("running: {routes:?}");
        self.wait_status(&what, READY, |status| {
            routes.iter().all(|route| {
                let mut found = routes_of(status).filter(|found| found.route == *route).peekable();
                found.peek().is_some() && found.any(|found| found.state() == RouteState::Running && found.partitions > 0)
            })
        })
        .await?;
        Ok(())
    }

    /// Waits until these routes have nothing left to do.
    ///
    /// # Errors
    /// If they have after the deadline.
    pub async fn wait_done(&self, routes: &[&str], deadline: Duration) -> Result<()> {
        let what = format!("done: {routes:?}");
        // A lag that was measured before counts what was there before; one of a route that has lost its partitions counts nothing.
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis() as i64;
        self.wait_status(&what, deadline, |status| {
            routes.iter().all(|route| {
                let mut of_route = routes_of(status).filter(|found| found.route == *route).peekable();
                of_route.peek().is_some()
                    && of_route.all(|found| {
                        let here = !matches!(found.state(), RouteState::Joining | RouteState::WaitingForBroker);
                        here && found.lag_records == 0 && found.in_flight == 0 && found.lag_measured_ms > since
                    })
            })
        })
        .await?;
        Ok(())
    }

    /// Runs `mesh-ctl` against this sidecar.
    ///
    /// # Errors
    /// If it cannot be started. A status other than 0 is no error.
    pub async fn ctl(&self, arguments: &[&str]) -> Result<Output> {
        self.ctl_with(arguments, Vec::new()).await
    }

    /// Runs `mesh-ctl` against this sidecar, with this on its stdin.
    ///
    /// # Errors
    /// If it cannot be started, or does not end.
    pub async fn ctl_with(&self, arguments: &[&str], input: Vec<u8>) -> Result<Output> {
        run(self.ctl_command(arguments), input, Duration::from_secs(60)).await
    }

    /// Runs `mesh-ctl` against this sidecar, with these variables in its environment.
    ///
    /// # Errors
    /// If it cannot be started, or does not end.
    pub async fn ctl_env(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Result<Output> {
        let mut command = self.ctl_command(arguments);
        command.envs(environment.iter().copied());
        run(command, Vec::new(), Duration::from_secs(60)).await
    }

    fn ctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.binaries.join("mesh-ctl"));
        command.args(arguments).env("MESH_ADMIN", format!("http://{}", self.admin_address()));
        command
    }

    /// Starts `mesh-ctl` against this sidecar, and does not wait for it. It ends with the test at the latest.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn ctl_start(&self, arguments: &[&str], stdout: Stdio) -> Result<tokio::process::Child> {
        let mut command = tokio::process::Command::new(self.binaries.join("mesh-ctl"));
        command.args(arguments).env("MESH_ADMIN", format!("http://{}", self.admin_address()));
        Ok(command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::null()).kill_on_drop(true).spawn()?)
    }

    /// Applies a table by `mesh-ctl apply`; see [`Stage::table`] for its form. What it printed is returned.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn apply(&self, spec: &str) -> Result<String> {
        self.ctl_table("apply", &self.stage.table(spec)).await?.success()
    }

    /// Runs a command of `mesh-ctl` on a table's text.
    ///
    /// # Errors
    /// If it cannot be started.
    pub async fn ctl_table(&self, command: &str, table: &str) -> Result<Output> {
        let name = format!("{}-{}.yaml", self.name, uuid::Uuid::new_v4().simple());
        let file = self.stage.file(&name, table)?;
        self.ctl(&[command, "-f", file.to_str().context("a path")?]).await
    }

    /// Publishes one record by HTTP, and returns where it is stored.
    ///
    /// # Errors
    /// If it is not stored.
    pub async fn publish(&self, topic: &str, key: Option<&str>, content_type: &str, body: impl Into<bytes::Bytes>) -> Result<Value> {
        let mut headers = vec![("content-type", content_type)];
        headers.extend(key.map(|key| ("mesh-key", key)));
        self.http.post(&format!("/v1/topics/{topic}/records"), &headers, body).await?.expect(200)?.json()
    }
}

/// A gRPC client of the API.
pub type Mesh = MeshClient<InterceptedService<Channel, Caller>>;

/// A gRPC client of an API, in the name of a service.
///
/// # Errors
/// If the name fits into no header.
pub fn mesh_client(channel: Channel, service: &str) -> Result<Mesh> {
    let client = MeshClient::with_interceptor(channel, Caller(service.parse()?));
    Ok(client.max_decoding_message_size(64 << 20).max_encoding_message_size(64 << 20))
}

/// Names the calling service in each call.
#[derive(Clone, Debug)]
pub struct Caller(MetadataValue<Ascii>);

impl Interceptor for Caller {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        request.metadata_mut().insert("mesh-service", self.0.clone());
        Ok(request)
    }
}

/// All routes of all instances.
pub fn routes_of(status: &GetStatusResponse) -> impl Iterator<Item = &RouteStatus> {
    status.instances.iter().flat_map(|instance| &instance.routes)
}

/// How many records of a route ended in a disposition, over all instances.
pub fn disposition(status: &GetStatusResponse, route: &str, disposition: &str) -> u64 {
    routes_of(status).filter(|found| found.route == route).filter_map(|found| found.dispositions.get(disposition)).sum()
}
