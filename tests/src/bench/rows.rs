//! The rows.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use tokio::time::Instant;

use super::{
    kafka::{self, Topics},
    load,
    measure::{self, Measured, Watch},
    role,
};
use crate::{
    broker::Broker,
    kafka::KafkaHandle,
    process::Process,
    sidecar::{Builder, Sidecar},
    stage::Stage,
};

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A backlog pushed over HTTP/1.1, its answers forwarded.
    PushHttp,
    /// The same over `HandleStream`.
    PushStream,
    /// The same over `Subscribe`.
    Subscribe,
    /// Pushed over HTTP/1.1 with `guarantee: exactly_once`; its floor is the same with `at_least_once`.
    OnceHttp,
    /// The same over `HandleStream`.
    OnceStream,
    /// Publishing over HTTP, 64 connections.
    PublishHttp,
    /// Publishing by unary gRPC calls, 64 at once.
    PublishUnary,
    /// Publishing on one gRPC stream.
    PublishStream,
    /// The latency of the whole hop at 1,000 records a second.
    Hop,
    /// The latency of the whole hop at 2 records a second.
    HopIdle,
    /// Memory and processor time at rest.
    Idle,
    /// Duplicates after three `kill -9`.
    Kill,
}

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Effort {
    /// Rounds of each row.
    pub rounds: usize,
    /// Records of a backlog.
    pub records: u64,
    /// Seconds of a load, after the warm-up.
    pub seconds: f64,
    /// Seconds before a load is measured.
    pub warmup: f64,
    /// Settings of librdkafka in the sidecar, in place of its own.
    pub kafka: Vec<(String, String)>,
    /// Variables of the sidecar's environment: `MESH_…` is its configuration.
    pub env: Vec<(String, String)>,
}

/// What was measured of a row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which.
    pub kind: Kind,
    /// `kafka` or `embedded`.
    pub broker: &'static str,
    /// The mesh, round by round.
    pub mesh: Vec<Measured>,
    /// The floors, round by round. The costs of several are added.
    pub floors: Vec<Floor>,
    /// What is no rate.
    pub figures: Vec<Figure>,
    /// Why it was not measured.
    pub failed: Option<String>,
}

/// A floor.
#[derive(Clone, Debug, Serialize)]
pub struct Floor {
    /// What it is.
    pub name: &'static str,
    /// Round by round.
    pub runs: Vec<Measured>,
}

/// A single figure.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What it is.
    pub name: String,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
}

impl Row {
    fn new(kind: Kind, broker: &'static str) -> Self {
        Self { kind, broker, mesh: Vec::new(), floors: Vec::new(), figures: Vec::new(), failed: None }
    }

    fn floor(&mut self, name: &'static str, run: Measured) {
        match self.floors.iter_mut().find(|floor| floor.name == name) {
            Some(floor) => floor.runs.push(run),
            None => self.floors.push(Floor { name, runs: vec![run] }),
        }
    }

    fn figure(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.figures.push(Figure { name: name.into(), value, unit });
    }

    /// The rate of the floors in a round, their costs added. `None` without a floor.
    pub fn floor_rate(&self, round: usize) -> Option<f64> {
        let cost: f64 = self.floors.iter().filter_map(|floor| floor.runs.get(round)).map(|run| 1.0 / run.rate().max(1e-9)).sum();
        (cost > 0.0).then(|| 1.0 / cost)
    }

    /// The ratio of each round: the mesh's rate to its floor's.
    pub fn ratios(&self) -> Vec<f64> {
        self.mesh.iter().enumerate().filter_map(|(round, run)| Some(run.rate() / self.floor_rate(round)?)).collect()
    }
}

const SERVICE: &str = "service";
const ROUTE: &str = "bench";
/// Deliveries that are out at once: HTTP, and gRPC, whose messages carry up to 32.
const CONCURRENCY: [u32; 2] = [64, 1024];
const CONNECTIONS: usize = 64;
/// Requests under way on a publish stream, and records in each.
const WINDOW: usize = 64;
const BATCH: u64 = 64;

/// Measures rows on one broker.
#[derive(Debug)]
pub struct Bench {
    broker: Broker,
    kafka: Option<(KafkaHandle, Arc<Topics>)>,
    effort: Effort,
}

impl Bench {
    /// On the embedded broker.
    pub fn embedded(effort: Effort) -> Self {
        Self { broker: Broker::Embedded, kafka: None, effort }
    }

    /// On Kafka.
    ///
    /// # Errors
    /// If librdkafka refuses.
    pub fn kafka(handle: KafkaHandle, effort: Effort) -> Result<Self> {
        let topics = Topics::new(handle.bootstrap())?;
        Ok(Self { broker: Broker::Kafka(handle.bootstrap().to_owned()), kafka: Some((handle, topics)), effort })
    }

    /// Measures a row. One that fails says so in its place.
    pub async fn measure(&self, kind: Kind) -> Row {
        let broker = if self.kafka.is_some() { "kafka" } else { "embedded" };
        let mut row = Row::new(kind, broker);
        let result = match kind {
            Kind::PushHttp | Kind::PushStream | Kind::Subscribe => self.push(&mut row).await,
            Kind::OnceHttp | Kind::OnceStream => self.once(&mut row).await,
            Kind::PublishHttp | Kind::PublishUnary | Kind::PublishStream => self.publish(&mut row).await,
            Kind::Hop => self.hop(&mut row, 1_000.0, 1.0).await,
            Kind::HopIdle => self.hop(&mut row, 2.0, 2.0).await,
            Kind::Idle => self.idle(&mut row).await,
            Kind::Kill => self.kill(&mut row).await,
        };
        row.failed = result.err().map(|error| format!("{error:#}"));
        row
    }

    fn sidecar(&self, stage: &Stage, name: &str) -> Builder {
        let builder = self.effort.env.iter().fold(stage.sidecar(name), |builder, (name, value)| builder.env(name, value));
        match &self.broker {
            Broker::Kafka(bootstrap) if !self.effort.kafka.is_empty() => {
                let mut settings: serde_json::Map<_, _> =
                    self.effort.kafka.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
                settings.insert("bootstrap.servers".into(), bootstrap.as_str().into());
                builder.broker(serde_json::json!({ "kafka": settings }))
            }
            _ => builder,
        }
    }

    /// Whether the row can be measured on this broker: the latency and the crashes need a client that is not the sidecar's.
    pub fn can(&self, kind: Kind) -> bool {
        self.kafka.is_some() || !matches!(kind, Kind::Hop | Kind::HopIdle | Kind::Kill)
    }

    fn watch(&self) -> Watch {
        Watch::default().with("broker", self.kafka.as_ref().and_then(|(handle, _)| handle.id()))
    }

    async fn create(&self, topic: &str) -> Result<()> {
        match &self.kafka {
            Some((_, topics)) => topics.create(topic).await,
            None => Ok(()),
        }
    }

    async fn delete(&self, topics: &[&str]) -> Result<()> {
        match &self.kafka {
            Some((_, client)) => client.delete(topics).await,
            None => Ok(()),
        }
    }

    /// Fills a topic with numbered records.
    async fn fill(&self, stage: &Stage, topic: &str, records: u64) -> Result<()> {
        self.create(topic).await?;
        match &self.kafka {
            Some((handle, _)) => {
                let (bootstrap, topic) = (handle.bootstrap().to_owned(), topic.to_owned());
                tokio::task::spawn_blocking(move || kafka::fill(&bootstrap, &topic, records)).await??;
            }
            None => {
                let sidecar = stage.sidecar("fill").client("client").pinned("routes: []").start().await?;
                load::fill(format!("http://{}", sidecar.api_address()), topic, records).await?;
                sidecar.finish().await?;
            }
        }
        Ok(())
    }

    async fn push(&self, row: &mut Row) -> Result<()> {
        let stage = Stage::new(self.broker.clone())?;
        let (source, records) = (stage.topic("source"), self.effort.records);
        self.fill(&stage, &source, records).await?;
        for round in 0..self.effort.rounds {
            let http = row.kind == Kind::PushHttp;
            let role: &[&str] = if http { &["service-http", "echo"] } else { &["service-grpc"] };
            let (service, port) = role::serve(stage.folder(), role).await?;
            let watch = Watch::default().with("service", service.id());
            let (name, run) = if http {
                let arguments = ["load-hop", &format!("127.0.0.1:{port}"), &CONNECTIONS.to_string()];
                ("bare HTTP hop", role::measure(&arguments, self.effort.warmup, self.effort.seconds, &watch).await?)
            } else {
                let arguments = ["load-handle", &format!("http://127.0.0.1:{port}"), "32", "32"];
                ("bare tonic stream", role::measure(&arguments, self.effort.warmup, self.effort.seconds, &watch).await?)
            };
            row.floor(name, run);
            if let Some((handle, topics)) = &self.kafka {
                let target = stage.topic(&format!("pipe{round}"));
                topics.create(&target).await?;
                let (pipe, _) = role::serve(stage.folder(), &["pipe", handle.bootstrap(), &source, &target]).await?;
                let count = Count::Topic(topics.clone(), target.clone());
                row.floor("consume → produce", flow(count, records, self.watch().with("load", pipe.id())).await?);
                drop(pipe);
                topics.delete(&[&target]).await?;
            }
            row.mesh.push(self.push_round(row.kind, &stage, round, (service, port)).await?);
        }
        self.delete(&[&source]).await
    }

    /// Both guarantees in turn, on one backlog.
    async fn once(&self, row: &mut Row) -> Result<()> {
        let stage = Stage::new(self.broker.clone())?;
        let source = stage.topic("source");
        self.fill(&stage, &source, self.effort.records).await?;
        let (http, plain) = match row.kind {
            Kind::OnceHttp => (true, Kind::PushHttp),
            _ => (false, Kind::PushStream),
        };
        let role: &[&str] = if http { &["service-http", "echo"] } else { &["service-grpc"] };
        for round in 0..self.effort.rounds {
            let measured = self.push_round(plain, &stage, 2 * round, role::serve(stage.folder(), role).await?).await?;
            row.floor("at_least_once", measured);
            row.mesh.push(self.push_round(row.kind, &stage, 2 * round + 1, role::serve(stage.folder(), role).await?).await?);
        }
        self.delete(&[&source]).await
    }

    async fn push_round(&self, kind: Kind, stage: &Stage, round: usize, (service, port): (Process, u16)) -> Result<Measured> {
        let name = format!("target{round}");
        let target = stage.topic(&name);
        self.create(&target).await?;
        let builder = self.sidecar(stage, &format!("sidecar{round}"));
        let (builder, deliver, concurrency) = match kind {
            Kind::PushHttp | Kind::OnceHttp => (builder.app(SERVICE, &format!("http://127.0.0.1:{port}")), "push", CONCURRENCY[0]),
            Kind::PushStream | Kind::OnceStream => (builder.app(SERVICE, &format!("grpc://127.0.0.1:{port}")), "push", CONCURRENCY[1]),
            _ => (builder.client(SERVICE), "stream", CONCURRENCY[1]),
        };
        let once = matches!(kind, Kind::OnceHttp | Kind::OnceStream);
        let guarantee = if once { "exactly_once" } else { "at_least_once" };
        let handler = if deliver == "push" { "  handler: /push\n" } else { "" };
        let table = format!(
            "topics: {{ {target}: {{ partitions: 4 }} }}\nroutes:\n- name: {ROUTE}\n  service: {SERVICE}\n  from: [%source]\n  deliver: {deliver}\n{handler}  to: [{target}]\n  group: {target}\n  concurrency: {concurrency}\n  guarantee: {guarantee}\n"
        );
        let mut sidecar = builder.pinned(&table).start().await?;
        let watch = self.watch().with("sidecar", sidecar.process()?.id());
        let (watch, _subscriber) = if kind == Kind::Subscribe {
            let url = format!("http://{}", sidecar.api_address());
            let (subscriber, _) = role::serve(stage.folder(), &["subscriber", &url, ROUTE, &concurrency.to_string()]).await?;
            (watch.with("service", subscriber.id()), Some(subscriber))
        } else {
            (watch.with("service", service.id()), None)
        };
        let count = match &self.kafka {
            // The markers of transactions have offsets too.
            Some((_, topics)) if !once => Count::Topic(topics.clone(), target.clone()),
            _ => Count::Forwarded(&sidecar),
        };
        let measured = flow(count, self.effort.records, watch).await?;
        sidecar.finish().await?;
        self.delete(&[&target]).await?;
        Ok(measured)
    }

    async fn publish(&self, row: &mut Row) -> Result<()> {
        let stage = Stage::new(self.broker.clone())?;
        let (kind, warmup, seconds) = (row.kind, self.effort.warmup, self.effort.seconds);
        for round in 0..self.effort.rounds {
            let topic = stage.topic(&format!("publish{round}"));
            self.create(&topic).await?;
            let (connections, window, batch) = (CONNECTIONS.to_string(), WINDOW.to_string(), BATCH.to_string());
            let arguments = |address: &str| -> Vec<String> {
                let url = format!("http://{address}");
                let path = format!("/v1/topics/{topic}/records");
                let arguments: [&str; 5] = match kind {
                    Kind::PublishHttp => ["load-http", address, &path, &connections, ""],
                    Kind::PublishUnary => ["load-unary", &url, &topic, &connections, ""],
                    _ => ["load-stream", &url, &topic, &window, &batch],
                };
                arguments.iter().filter(|argument| !argument.is_empty()).map(|argument| (*argument).to_owned()).collect()
            };
            let role: &[&str] = match kind {
                Kind::PublishHttp => &["service-http", "position", "--threads", "2"],
                _ => &["service-grpc", "--threads", "2"],
            };
            let librdkafka = kind == Kind::PublishStream && self.kafka.is_some();
            if !librdkafka {
                let (floor, port) = role::serve(stage.folder(), role).await?;
                let watch = Watch::default().with("service", floor.id());
                let arguments = arguments(&format!("127.0.0.1:{port}"));
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                let name = match kind {
                    Kind::PublishHttp => "bare hyper server",
                    Kind::PublishUnary => "bare tonic unary",
                    _ => "bare tonic stream",
                };
                row.floor(name, role::measure(&arguments, warmup, seconds, &watch).await?);
            }
            if let (true, Some((handle, _))) = (librdkafka, &self.kafka) {
                let arguments = ["produce", handle.bootstrap(), &topic];
                row.floor("librdkafka alone", role::measure(&arguments, warmup, seconds, &self.watch()).await?);
            }
            let table = format!("topics: {{ {topic}: {{ partitions: 4 }} }}\nroutes: []\n");
            let mut sidecar = self.sidecar(&stage, &format!("sidecar{round}")).client("client").pinned(&table).start().await?;
            let watch = self.watch().with("sidecar", sidecar.process()?.id());
            let arguments = arguments(&sidecar.api_address().to_string());
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            row.mesh.push(role::measure(&arguments, warmup, seconds, &watch).await?);
            sidecar.finish().await?;
            self.delete(&[&topic]).await?;
        }
        Ok(())
    }

    async fn hop(&self, row: &mut Row, rate: f64, stretch: f64) -> Result<()> {
        let Some((handle, topics)) = &self.kafka else { bail!("measured on Kafka alone") };
        let stage = Stage::new(self.broker.clone())?;
        let [from, to, direct] = ["a", "b", "direct"].map(|name| stage.topic(name));
        for topic in [&from, &to, &direct] {
            topics.create(topic).await?;
        }
        let (service, port) = role::serve(stage.folder(), &["service-http", "echo"]).await?;
        let table = format!("routes:\n- {{ name: {ROUTE}, service: {SERVICE}, from: [{from}], handler: /push, to: [{to}] }}\n");
        let mut sidecar = self.sidecar(&stage, "sidecar").app(SERVICE, &format!("http://127.0.0.1:{port}")).pinned(&table).start().await?;
        sidecar.wait_running(&[ROUTE]).await?;
        let (rate, warmup, seconds) = (rate.to_string(), self.effort.warmup.max(2.0), self.effort.seconds * stretch);
        for _ in 0..self.effort.rounds {
            let arguments = ["hop", handle.bootstrap(), &direct, &direct, &rate];
            row.floor("produce → consume", role::measure(&arguments, warmup, seconds, &self.watch()).await?);
            let watch = self.watch().with("sidecar", sidecar.process()?.id()).with("service", service.id());
            let arguments = ["hop", handle.bootstrap(), &from, &to, &rate];
            row.mesh.push(role::measure(&arguments, warmup, seconds, &watch).await?);
        }
        sidecar.finish().await?;
        topics.delete(&[&from, &to, &direct]).await
    }

    async fn idle(&self, row: &mut Row) -> Result<()> {
        const REST: Duration = Duration::from_secs(5);
        let stage = Stage::new(self.broker.clone())?;
        let [from, to] = ["a", "b"].map(|name| stage.topic(name));
        for topic in [&from, &to] {
            self.create(topic).await?;
        }
        let (_service, port) = role::serve(stage.folder(), &["service-http", "echo"]).await?;
        let table = format!("routes:\n- {{ name: {ROUTE}, service: {SERVICE}, from: [{from}], handler: /push, to: [{to}] }}\n");
        let mut sidecar = self.sidecar(&stage, "sidecar").app(SERVICE, &format!("http://127.0.0.1:{port}")).pinned(&table).start().await?;
        sidecar.wait_running(&[ROUTE]).await?;
        let id = sidecar.process()?.id();
        tokio::time::sleep(REST).await;
        let (before, mib) = (measure::cpu_time(id)?, f64::from(1 << 20));
        row.figure("resident after 5 s", measure::resident_bytes(id)? as f64 / mib, "MiB");
        row.figure("peak", measure::peak_bytes(id)? as f64 / mib, "MiB");
        tokio::time::sleep(2 * REST).await;
        let used = measure::cpu_time(id)?.saturating_sub(before);
        row.figure("processor at rest", used.as_secs_f64() / (2 * REST).as_secs_f64() * 100.0, "% of a core");
        sidecar.finish().await?;
        self.delete(&[&from, &to]).await
    }

    async fn kill(&self, row: &mut Row) -> Result<()> {
        const RECORDS: u64 = 20_000;
        let Some((handle, topics)) = &self.kafka else { bail!("measured on Kafka alone") };
        let stage = Stage::new(self.broker.clone())?;
        let [source, target] = ["source", "target"].map(|name| stage.topic(name));
        self.fill(&stage, &source, RECORDS).await?;
        topics.create(&target).await?;
        let (_service, port) = role::serve(stage.folder(), &["service-http", "echo"]).await?;
        let table = format!("routes:\n- {{ name: {ROUTE}, service: {SERVICE}, from: [{source}], handler: /push, to: [{target}] }}\n");
        let builder = self.sidecar(&stage, "sidecar").app(SERVICE, &format!("http://127.0.0.1:{port}")).instance("bench").pinned(&table);
        let mut sidecar = builder.start().await?;
        let count = Count::Topic(topics.clone(), target.clone());
        for part in 1..=3 {
            count.reach(RECORDS * part / 4).await?;
            sidecar.kill9().await?;
            let (before, killed) = (count.now().await?, Instant::now());
            sidecar.spawn()?;
            count.reach(before + 1).await?;
            row.figure(format!("next reply after kill {part}"), killed.elapsed().as_secs_f64() * 1e3, "ms");
        }
        count.reach(RECORDS).await?;
        sidecar.wait_ready().await?;
        sidecar.wait_done(&[ROUTE], Duration::from_secs(60)).await?;
        sidecar.finish().await?;
        let (bootstrap, topic) = (handle.bootstrap().to_owned(), target.clone());
        let numbers = tokio::task::spawn_blocking(move || kafka::numbers(&bootstrap, &topic)).await??;
        let duplicates: u64 = numbers.values().map(|times| times - 1).sum();
        row.figure("missing", (RECORDS - numbers.len() as u64) as f64, "records");
        row.figure("duplicates", duplicates as f64, "records");
        topics.delete(&[&source, &target]).await
    }
}

/// How many replies there are.
enum Count<'a> {
    /// In a topic of Kafka.
    Topic(Arc<Topics>, String),
    /// By the sidecar's metrics.
    Forwarded(&'a Sidecar),
}

impl Count<'_> {
    async fn now(&self) -> Result<u64> {
        match self {
            Self::Topic(topics, topic) => {
                let (topics, topic) = (topics.clone(), topic.clone());
                tokio::task::spawn_blocking(move || topics.count(&topic)).await?
            }
            Self::Forwarded(sidecar) => {
                let text = sidecar.probes().get("/metrics").await?.expect(200)?.text();
                let line = text.lines().find(|line| line.starts_with("mesh_dispositions_total{") && line.contains("\"forwarded\""));
                Ok(line.and_then(|line| line.rsplit_once(' ')).map_or(Ok(0), |(_, count)| count.parse())?)
            }
        }
    }

    /// Waits until there are so many; says how many there are then.
    async fn reach(&self, count: u64) -> Result<u64> {
        let mut tick = tokio::time::interval(Duration::from_millis(10));
        let (mut last, mut moved) = (0, Instant::now());
        loop {
            tick.tick().await;
            let now = self.now().await?;
            if now >= count {
                return Ok(now);
            }
            if now != last {
                (last, moved) = (now, Instant::now());
            }
            ensure!(moved.elapsed() < Duration::from_secs(60), "{now} of {count} replies, and no more for a minute");
        }
    }
}

/// Measures from the first reply to the last.
async fn flow(count: Count<'_>, records: u64, watch: Watch) -> Result<Measured> {
    let first = count.reach(1).await?;
    let running = watch.begin(first)?;
    let last = count.reach(records).await.context("the last reply")?;
    running.end(last)
}
