//! Several brokers of one cluster (replication 3, `min.insync.replicas` 2 where there are three), each behind a proxy of its own.
//!
//! Invariant: clients of [`Cluster::bootstrap`] reach a broker through its proxy alone; brokers among themselves, and clients of
//! [`Cluster::direct`], past it.

use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Signal, test_kill_process};

use super::{NUMBER, Node, class_path, fetch, root};
use crate::{
    ports::Port,
    proxy::{Network, Proxy},
};

/// A cluster. It ends with its handle.
#[derive(Debug)]
pub struct Cluster {
    brokers: Vec<Broker>,
}

#[derive(Debug)]
struct Broker {
    node: Arc<Node>,
    proxy: Proxy,
    /// Where clients go.
    proxied: Port,
    /// Where brokers go.
    internal: Port,
    _more: [Port; 2],
}

impl Cluster {
    /// Starts so many brokers and waits until all answer.
    ///
    /// # Errors
    /// If there is no Kafka to be had, or one does not answer in time.
    pub async fn start(count: usize) -> Result<Self> {
        tokio::task::spawn_blocking(fetch).await??;
        let mut ports = Vec::with_capacity(count);
        for _ in 0..count {
            ports.push([Port::take()?, Port::take()?, Port::take()?, Port::take()?]);
        }
        let voters: Vec<String> =
            ports.iter().enumerate().map(|(index, ports)| format!("{}@127.0.0.1:{}", index + 1, ports[3].number())).collect();
        let voters = voters.join(",");
        let mut brokers = Vec::with_capacity(count);
        for (index, [proxied, client, internal, controller]) in ports.into_iter().enumerate() {
            let dir = root().join(format!("node-{}-{}", std::process::id(), NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed)));
            if dir.exists() {
                std::fs::remove_dir_all(&dir)?;
            }
            std::fs::create_dir_all(&dir)?;
            // From here on its drop removes the folder.
            let node = Node { dir: dir.canonicalize()?, process: Mutex::default(), heap: "320m" };
            let properties = properties(&node, index + 1, count, &voters, [&proxied, &client, &internal, &controller]);
            std::fs::write(node.dir.join("server.properties"), properties)?;
            let proxy = Proxy::start(proxied.address(), client.address()).await?;
            brokers.push(Broker { node: Arc::new(node), proxy, proxied, internal, _more: [client, controller] });
        }
        let cluster = Self { brokers };
        let nodes: Vec<Arc<Node>> = cluster.brokers.iter().map(|broker| broker.node.clone()).collect();
        tokio::task::spawn_blocking(move || {
            // All at once: each is a Java of its own.
            let formats: Vec<Child> = nodes.iter().map(|node| format(node)).collect::<Result<_>>()?;
            for format in formats {
                let output = format.wait_with_output()?;
                ensure!(output.status.success(), "StorageTool format: {}", String::from_utf8_lossy(&output.stderr));
            }
            for node in &nodes {
                *node.process() = Some(node.spawn()?);
            }
            anyhow::Ok(())
        })
        .await??;
        for index in 0..cluster.len() {
            cluster.wait(index).await?;
        }
        Ok(cluster)
    }

    /// The addresses for clients of the mesh: the proxies.
    pub fn bootstrap(&self) -> String {
        addresses(self.brokers.iter().map(|broker| broker.proxied.address()))
    }

    /// The addresses past the proxies.
    pub fn direct(&self) -> String {
        addresses(self.brokers.iter().map(|broker| broker.internal.address()))
    }

    /// How many brokers there are.
    pub fn len(&self) -> usize {
        self.brokers.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.brokers.is_empty()
    }

    fn broker(&self, index: usize) -> &Broker {
        &self.brokers[index % self.brokers.len()]
    }

    /// The network of a broker, by number modulo how many there are.
    pub fn proxy(&self, index: usize) -> &Proxy {
        &self.broker(index).proxy
    }

    /// Sets the network of all brokers.
    pub fn set_all(&self, network: Network) {
        self.brokers.iter().for_each(|broker| broker.proxy.set(network));
    }

    /// Kills a broker (SIGKILL), or ends it in good order (SIGTERM). Its data stays.
    ///
    /// # Errors
    /// If it does not run, or does not end within 30 s.
    pub async fn stop(&self, index: usize, kill: bool) -> Result<()> {
        let node = self.broker(index).node.clone();
        if !kill {
            node.signal(Signal::TERM)?;
            let end = tokio::time::Instant::now() + Duration::from_secs(30);
            while node.process().as_ref().is_some_and(|process| runs(process.pid)) && tokio::time::Instant::now() < end {
                // It is a child of its watchdog, not of this process.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        tokio::task::spawn_blocking(move || node.stop(true)).await?
    }

    /// Starts a broker again and waits until it answers.
    ///
    /// # Errors
    /// If it does not.
    pub async fn start_again(&self, index: usize) -> Result<()> {
        let node = &self.broker(index).node;
        let process = node.spawn()?;
        *node.process() = Some(process);
        self.wait(index).await
    }

    /// Freezes a broker (SIGSTOP), or lets it go on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn freeze(&self, index: usize, frozen: bool) -> Result<()> {
        self.broker(index).node.signal(if frozen { Signal::STOP } else { Signal::CONT })
    }

    /// Waits until every replica of every partition is in sync; brokers that take longer are left to it.
    ///
    /// # Errors
    /// If there is no client to be had.
    pub async fn wait_in_sync(&self, deadline: Duration) -> Result<()> {
        let bootstrap = self.direct();
        let wait = move || {
            let mut config = rdkafka::ClientConfig::new();
            config.set("bootstrap.servers", bootstrap).set("log_level", "0");
            let client: rdkafka::consumer::BaseConsumer = config.create()?;
            let end = Instant::now() + deadline;
            let in_sync = || {
                let metadata = rdkafka::consumer::Consumer::fetch_metadata(&client, None, Duration::from_secs(2)).ok()?;
                let mut partitions = metadata.topics().iter().flat_map(rdkafka::metadata::MetadataTopic::partitions);
                Some(partitions.all(|partition| partition.isr().len() == partition.replicas().len()))
            };
            while in_sync() != Some(true) && Instant::now() < end {
                // Nothing tells from outside when a replica has caught up. Serves the client's events, and lets a moment pass.
                drop(client.poll(Duration::from_millis(200)));
            }
            anyhow::Ok(())
        };
        tokio::task::spawn_blocking(wait).await?
    }

    async fn wait(&self, index: usize) -> Result<()> {
        let broker = self.broker(index);
        let (node, address) = (broker.node.clone(), broker.internal.address().to_string());
        tokio::task::spawn_blocking(move || node.wait_ready(&address)).await?
    }
}

/// Whether a process runs: one that has ended and was not waited for does not.
fn runs(pid: rustix::process::Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    test_kill_process(pid).is_ok() && !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

fn addresses(all: impl Iterator<Item = SocketAddr>) -> String {
    all.map(|address| address.to_string()).collect::<Vec<_>>().join(",")
}

fn format(node: &Node) -> Result<Child> {
    Command::new("java")
        .args(["-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp"])
        .arg(class_path())
        .args(["kafka.tools.StorageTool", "format", "-t", "MkU3OEVBNTcwNTJENDM2Qk", "-c"])
        .arg(node.dir.join("server.properties"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("java")
}

fn properties(node: &Node, id: usize, count: usize, voters: &str, ports: [&Port; 4]) -> String {
    let [proxied, client, internal, controller] = ports.map(Port::number);
    let replicas = count.min(3);
    let insync = replicas.saturating_sub(1).max(1);
    format!(
        "process.roles=broker,controller
node.id={id}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{client},INTERNAL://127.0.0.1:{internal},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{proxied},INTERNAL://127.0.0.1:{internal}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=INTERNAL
log.dirs={}
auto.create.topics.enable=false
num.partitions=4
default.replication.factor={replicas}
min.insync.replicas={insync}
offsets.topic.replication.factor={replicas}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={insync}
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={insync}
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
broker.session.timeout.ms=5000
broker.heartbeat.interval.ms=1000
controlled.shutdown.retry.backoff.ms=500
num.network.threads=2
num.io.threads=4
log.cleaner.dedupe.buffer.size=4194304
",
        node.dir.join("data").display()
    )
}
