//! A real Apache Kafka for tests and benches: from `KAFKA_BOOTSTRAP`, else one node (KRaft) started from its Maven artifacts.
//!
//! Invariant: no broker outlives the process that started it, however that ends: a watchdog shell holds the read end of a pipe, kills the
//! broker when the pipe closes, and removes its data.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer},
};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

pub mod cluster;

/// The version that is started.
pub const VERSION: &str = "4.1.1";

/// Tells the nodes of this process apart.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// How long a broker may take until it answers.
const START: Duration = Duration::from_secs(180);

/// Runs the broker given as `$2…` until its input ends. `keep` on the input keeps the data folder `$1`.
const WATCHDOG: &str = r#"
dir=$1; shift
"$@" >>"$dir/kafka.log" 2>&1 </dev/null &
pid=$!
echo $pid
trap '' INT TERM HUP
word=$(cat)
kill -9 $pid
wait $pid 2>/dev/null
[ "$word" = keep ] || rm -rf "$dir"
"#;

/// A Kafka cluster. Cheap to clone; the broker ends with the last clone, or with the process.
#[derive(Clone, Debug)]
pub struct KafkaHandle {
    bootstrap: String,
    /// `None` for one that somebody else runs.
    node: Option<Arc<Node>>,
}

#[derive(Debug)]
struct Node {
    dir: PathBuf,
    process: Mutex<Option<Process>>,
    /// The most that Java's heap takes.
    heap: &'static str,
}

#[derive(Debug)]
struct Process {
    watchdog: Child,
    /// The broker itself.
    pid: Pid,
}

/// The Kafka shared by the tests of this process; `None`, after a line that says so, where none can be had.
///
/// # Panics
/// With `CI=true` where none can be had: a suite that silently skips proves nothing.
pub async fn kafka() -> Option<KafkaHandle> {
    blocking(kafka_blocking).await
}

/// The same, for code that is not async.
///
/// # Panics
/// As [`kafka`].
pub fn kafka_blocking() -> Option<KafkaHandle> {
    static SHARED: OnceLock<Option<KafkaHandle>> = OnceLock::new();
    SHARED
        .get_or_init(|| match std::env::var("KAFKA_BOOTSTRAP") {
            Ok(bootstrap) => Some(KafkaHandle { bootstrap, node: None }),
            Err(_) => own_kafka_blocking(),
        })
        .clone()
}

/// A Kafka of the caller's own, which may be stopped and started. Never the one of `KAFKA_BOOTSTRAP`.
///
/// # Panics
/// As [`kafka`].
pub async fn own_kafka() -> Option<KafkaHandle> {
    own_kafka_with(String::new()).await
}

/// The same, with further lines of `server.properties`; `{port}` in them is the client's port.
///
/// # Panics
/// As [`kafka`].
pub async fn own_kafka_with(properties: String) -> Option<KafkaHandle> {
    blocking(move || own(&properties)).await
}

/// A cluster of the caller's own, each broker behind a proxy.
///
/// # Panics
/// As [`kafka`].
pub async fn cluster(count: usize) -> Option<cluster::Cluster> {
    had(cluster::Cluster::start(count).await)
}

/// Runs a start on a thread that may block; its panic is the caller's.
async fn blocking(start: impl FnOnce() -> Option<KafkaHandle> + Send + 'static) -> Option<KafkaHandle> {
    match tokio::task::spawn_blocking(start).await {
        Ok(handle) => handle,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => None,
    }
}

/// The same, for code that is not async.
///
/// # Panics
/// As [`kafka`].
pub fn own_kafka_blocking() -> Option<KafkaHandle> {
    own("")
}

fn own(properties: &str) -> Option<KafkaHandle> {
    had(start_own(properties))
}

/// What could be had; else `None` after a line that says so, or a failure where nothing may be skipped.
fn had<T>(started: anyhow::Result<T>) -> Option<T> {
    match started {
        Ok(handle) => Some(handle),
        Err(error) => {
            let strict = std::env::var("CI").is_ok_and(|value| value == "true");
            assert!(!strict, "no Kafka: {error:#}");
            eprintln!("no Kafka: {error:#}");
            println!("SKIPPED: no Kafka");
            None
        }
    }
}

impl KafkaHandle {
    /// The broker's address: `bootstrap.servers`.
    pub fn bootstrap(&self) -> &str {
        &self.bootstrap
    }

    /// The broker's process id, if it is ours and runs.
    pub fn id(&self) -> Option<i32> {
        self.node.as_deref()?.process().as_ref().map(|process| process.pid.as_raw_nonzero().get())
    }

    fn node(&self) -> anyhow::Result<&Node> {
        self.node.as_deref().context("the Kafka of KAFKA_BOOTSTRAP cannot be stopped from here")
    }

    /// Kills the broker (SIGKILL). Its data stays.
    ///
    /// # Errors
    /// If it is not ours, or does not run.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.node()?.stop(true)
    }

    /// Starts it again, on the same ports and data, and waits until it answers.
    ///
    /// # Errors
    /// If it is not ours, or does not answer in time.
    pub fn start(&self) -> anyhow::Result<()> {
        self.node()?.start(&self.bootstrap)
    }

    /// Freezes the broker (SIGSTOP): connections stay, nothing answers.
    ///
    /// # Errors
    /// If it is not ours, or does not run.
    pub fn freeze(&self) -> anyhow::Result<()> {
        self.node()?.signal(Signal::STOP)
    }

    /// Undoes [`KafkaHandle::freeze`].
    ///
    /// # Errors
    /// If it is not ours, or does not run.
    pub fn thaw(&self) -> anyhow::Result<()> {
        self.node()?.signal(Signal::CONT)
    }
}

impl Node {
    fn process(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let process = self.process();
        let process = process.as_ref().context("the broker does not run")?;
        kill_process(process.pid, signal).context("signal to the broker")
    }

    fn stop(&self, keep: bool) -> anyhow::Result<()> {
        let mut process = self.process().take().context("the broker does not run")?;
        let mut stdin = process.watchdog.stdin.take().context("the watchdog has no input")?;
        if keep {
            stdin.write_all(b"keep")?;
        }
        drop(stdin);
        process.watchdog.wait()?;
        Ok(())
    }

    fn start(&self, bootstrap: &str) -> anyhow::Result<()> {
        let mut slot = self.process();
        ensure!(slot.is_none(), "the broker runs already");
        *slot = Some(self.spawn()?);
        drop(slot);
        self.wait_ready(bootstrap)
    }

    fn spawn(&self) -> anyhow::Result<Process> {
        let mut watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "kafka-watchdog"])
            .arg(&self.dir)
            .args([
                "java",
                "-Xms128m",
                &format!("-Xmx{}", self.heap),
                "-XX:+UseSerialGC",
                "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
                "-cp",
            ])
            .arg(class_path())
            .arg("kafka.Kafka")
            .arg(self.dir.join("server.properties"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("sh")?;
        let mut line = String::new();
        BufReader::new(watchdog.stdout.take().context("the watchdog has no output")?).read_line(&mut line)?;
        let pid = line.trim().parse().ok().and_then(Pid::from_raw).with_context(|| format!("the broker's pid: {line:?}"))?;
        Ok(Process { watchdog, pid })
    }

    fn wait_ready(&self, bootstrap: &str) -> anyhow::Result<()> {
        let client: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", bootstrap)
            .set("reconnect.backoff.max.ms", "200")
            .set("log_level", "0")
            .create()?;
        let until = Instant::now() + START;
        while Instant::now() < until {
            if client.fetch_metadata(None, Duration::from_secs(2)).is_ok_and(|metadata| !metadata.brokers().is_empty()) {
                return Ok(());
            }
            if let Some(process) = self.process().as_ref()
                && test_kill_process(process.pid).is_err()
            {
                break;
            }
            // Serves the client's events, and lets a moment pass.
            drop(client.poll(Duration::from_millis(100)));
        }
        let log = fs::read_to_string(self.dir.join("kafka.log")).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(20).collect();
        bail!("Kafka at {bootstrap} did not answer; the end of its log, backwards:\n{}", tail.join("\n"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A broker that was stopped left its data.
        if self.stop(false).is_err() {
            drop(fs::remove_dir_all(&self.dir));
        }
    }
}

/// `target/kafka`.
fn root() -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    target.join("kafka")
}

fn class_path() -> String {
    root().join(VERSION).join("libs").join("*").display().to_string()
}

fn start_own(more: &str) -> anyhow::Result<KafkaHandle> {
    fetch()?;
    let [client, controller] = free_ports()?;
    let dir = root().join(format!("node-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    let dir = dir.canonicalize()?;
    // From here on its drop removes the folder.
    let node = Node { dir, process: Mutex::default(), heap: "512m" };
    let dir = &node.dir;
    let bootstrap = format!("127.0.0.1:{client}");
    fs::write(dir.join("server.properties"), properties(dir, client, controller) + &more.replace("{port}", &client.to_string()))?;
    let format = Command::new("java")
        .args(["-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp"])
        .arg(class_path())
        .args(["kafka.tools.StorageTool", "format", "-t", "MkU3OEVBNTcwNTJENDM2Qk", "-c"])
        .arg(dir.join("server.properties"))
        .output()
        .context("java")?;
    ensure!(format.status.success(), "StorageTool format: {}", String::from_utf8_lossy(&format.stderr));
    node.start(&bootstrap)?;
    Ok(KafkaHandle { bootstrap, node: Some(Arc::new(node)) })
}

fn properties(dir: &Path, client: u16, controller: u16) -> String {
    format!(
        "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{client},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{client}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs={}
auto.create.topics.enable=false
num.partitions=4
default.replication.factor=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
log.retention.check.interval.ms=1000
log.initial.task.delay.ms=500
",
        dir.join("data").display()
    )
}

/// Two free ports. Nothing keeps another process from taking them in between; the broker then fails to start, and says so.
fn free_ports() -> io::Result<[u16; 2]> {
    let listeners = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    Ok([listeners[0].local_addr()?.port(), listeners[1].local_addr()?.port()])
}

/// Removes the folders of processes that were killed before their watchdog stood.
fn sweep() {
    let Ok(entries) = fs::read_dir(root()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("node-")?.split('-').next()?.parse().ok()).and_then(Pid::from_raw);
        // What cannot be removed now is tried again by the next process.
        if pid.is_some_and(|pid| test_kill_process(pid) == Err(rustix::io::Errno::SRCH)) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

/// Brings Kafka's artifacts to `target/kafka/<version>/libs`, once; other processes wait.
fn fetch() -> anyhow::Result<()> {
    let dir = root().join(VERSION);
    fs::create_dir_all(&dir)?;
    let lock = File::create(dir.join("lock"))?;
    lock.lock()?;
    sweep();
    if dir.join("libs").is_dir() {
        return Ok(());
    }
    fs::write(
        dir.join("pom.xml"),
        format!(
            r#"<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>mesh.tests</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
  </dependencies>
</project>
"#
        ),
    )?;
    let part = dir.join("libs.part");
    if part.exists() {
        fs::remove_dir_all(&part)?;
    }
    let output = Command::new("mvn")
        .args(["-q", "-B", "dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory=libs.part", "-f"])
        .arg(dir.join("pom.xml"))
        .stdin(Stdio::null())
        .output()
        .context("mvn")?;
    let text = [output.stdout, output.stderr].concat();
    ensure!(output.status.success(), "mvn dependency:copy-dependencies: {}", String::from_utf8_lossy(&text));
    fs::rename(&part, dir.join("libs"))?;
    Ok(())
}
