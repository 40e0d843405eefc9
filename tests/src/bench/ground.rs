//! What every row stands on: a broker, sidecars, topics that are filled, and the count of what came out.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tokio::{sync::OnceCell, time::Instant};

use super::{
    kafka::{self, Topics},
    load,
    measure::{Measured, Watch},
    rows::{Effort, Kind, Row},
    service,
};
use crate::{
    broker::Broker,
    kafka::KafkaHandle,
    sidecar::{Builder, Sidecar},
    stage::Stage,
};

/// How long a broker warms up, in seconds.
const WARM_BROKER: f64 = 20.0;
/// How often it is looked how much came out, at most.
const LOOK: Duration = Duration::from_millis(10);
/// It is not asked again for so many times as long as an answer takes.
const ASKING: u32 = 20;
/// The service of every route that is measured.
pub(super) const SERVICE: &str = "service";
/// The route that is measured.
pub(super) const ROUTE: &str = "bench";

/// What a topic is filled with: numbered records.
#[derive(Clone, Copy, Debug)]
pub struct Filling {
    /// The number of the first.
    pub first: u64,
    /// How many.
    pub records: u64,
    /// The bytes of each value, 8 at least.
    pub size: usize,
    /// How many keys they have in turn.
    pub keys: u64,
    /// How many partitions the topic has.
    pub partitions: i32,
}

impl Filling {
    /// So many of what every row has: 1 KiB, 1,000 keys.
    pub fn of(records: u64) -> Self {
        Self { first: 0, records, size: service::VALUE, keys: load::KEYS, partitions: kafka::PARTITIONS }
    }
}

/// Measures rows on one broker.
#[derive(Debug)]
pub struct Bench {
    pub(super) broker: Broker,
    pub(super) kafka: Option<(KafkaHandle, Arc<Topics>)>,
    pub(super) effort: Effort,
    /// What the whole hop can do, in records a second, once it was measured.
    pub(super) capacity: OnceCell<f64>,
}

impl Bench {
    /// On the embedded broker.
    pub fn embedded(effort: Effort) -> Self {
        Self { broker: Broker::Embedded, kafka: None, effort, capacity: OnceCell::new() }
    }

    /// On Kafka.
    ///
    /// # Errors
    /// If librdkafka refuses.
    pub fn kafka(handle: KafkaHandle, effort: Effort) -> Result<Self> {
        let topics = Topics::new(handle.bootstrap())?;
        Ok(Self { broker: Broker::Kafka(handle.bootstrap().to_owned()), kafka: Some((handle, topics)), effort, capacity: OnceCell::new() })
    }

    /// The same with a further variable in the sidecar's environment.
    pub(super) fn with_env(&self, name: &str, value: &str) -> Self {
        let mut effort = self.effort.clone();
        effort.env.push((name.to_owned(), value.to_owned()));
        self.with(effort)
    }

    /// The same with so many rounds of each row.
    pub fn with_rounds(&self, rounds: usize) -> Self {
        self.with(Effort { rounds, ..self.effort.clone() })
    }

    fn with(&self, effort: Effort) -> Self {
        Self { broker: self.broker.clone(), kafka: self.kafka.clone(), effort, capacity: OnceCell::new() }
    }

    /// Measures a row. One that fails says so in its place.
    pub async fn measure(&self, kind: Kind) -> Row {
        let mut row = Row::new(kind, self.name());
        let result = match kind {
            Kind::PushHttp | Kind::PushStream | Kind::Subscribe => self.push(&mut row).await,
            Kind::OnceHttp | Kind::OnceStream => self.once(&mut row).await,
            Kind::PublishHttp | Kind::PublishUnary | Kind::PublishStream => self.publish(&mut row).await,
            Kind::Hop => self.hop(&mut row, 1_000.0, 1.0).await,
            Kind::HopIdle => self.hop(&mut row, 2.0, 2.0).await,
            Kind::Hop10 => self.hop_at(&mut row, 0.1).await,
            Kind::Hop50 => self.hop_at(&mut row, 0.5).await,
            Kind::Hop80 => self.hop_at(&mut row, 0.8).await,
            Kind::Idle => self.idle(&mut row).await,
            Kind::Memory => self.memory(&mut row).await,
            Kind::Start => self.start(&mut row).await,
            Kind::Swap => self.swap(&mut row).await,
            Kind::MeshScale => self.mesh_scale(&mut row).await,
            Kind::Kill => self.kill(&mut row).await,
            Kind::TlsHttp | Kind::TlsStream => self.tls(&mut row).await,
            Kind::TraceHttp => self.traced(&mut row).await,
        };
        row.failed = result.err().map(|error| format!("{error:#}"));
        row
    }

    /// Works a Kafka that was started for this run until its JVM has compiled what is measured: in its first half minute it takes several times the
    /// processor time for a request. One that was there before is taken as it is.
    ///
    /// # Errors
    /// If the load fails.
    pub async fn warm_broker(&self) -> Result<()> {
        if self.kafka.as_ref().is_none_or(|(handle, _)| handle.id().is_none()) {
            return Ok(());
        }
        eprintln!("the broker warms up for {WARM_BROKER} s");
        let stage = Stage::new(self.broker.clone())?;
        let bench = self.with(Effort { warmup: 0.0, seconds: WARM_BROKER, ..self.effort.clone() });
        bench.publish_round(Kind::PublishHttp, &stage, "warm", None).await?;
        Ok(())
    }

    /// `kafka` or `embedded`.
    pub fn name(&self) -> &'static str {
        if self.kafka.is_some() { "kafka" } else { "embedded" }
    }

    pub(super) fn sidecar(&self, stage: &Stage, name: &str) -> Builder {
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

    /// Whether the row can be measured on this broker: the crashes need a client that is not the sidecar's.
    pub fn can(&self, kind: Kind) -> bool {
        self.kafka.is_some() || kind != Kind::Kill
    }

    pub(super) fn watch(&self) -> Watch {
        Watch::default().with("broker", self.kafka.as_ref().and_then(|(handle, _)| handle.id()))
    }

    pub(super) async fn create(&self, topic: &str) -> Result<()> {
        self.create_with(topic, kafka::PARTITIONS).await
    }

    /// Makes a topic; on the embedded broker a table or a fill does.
    pub(super) async fn create_with(&self, topic: &str, partitions: i32) -> Result<()> {
        match &self.kafka {
            Some((_, topics)) => topics.create(topic, partitions).await,
            None => Ok(()),
        }
    }

    pub(super) async fn delete(&self, topics: &[&str]) -> Result<()> {
        match &self.kafka {
            Some((_, client)) => client.delete(topics).await,
            None => Ok(()),
        }
    }

    /// Makes a topic, and fills it.
    pub(super) async fn fill(&self, stage: &Stage, topic: &str, filling: Filling) -> Result<()> {
        self.create_with(topic, filling.partitions).await?;
        self.append(stage, topic, filling).await
    }

    /// Fills a topic further. On the embedded broker no sidecar may run on the stage.
    pub(super) async fn append(&self, stage: &Stage, topic: &str, filling: Filling) -> Result<()> {
        match &self.kafka {
            Some((handle, _)) => {
                let (bootstrap, topic) = (handle.bootstrap().to_owned(), topic.to_owned());
                tokio::task::spawn_blocking(move || kafka::fill(&bootstrap, &topic, filling)).await??;
            }
            None => {
                let table = format!("topics: {{ {topic}: {{ partitions: {} }} }}\nroutes: []\n", filling.partitions);
                let sidecar = stage.sidecar("fill").client("client").pinned(&table).start().await?;
                load::fill(format!("http://{}", sidecar.api_address()), topic, filling).await?;
                sidecar.finish().await?;
            }
        }
        Ok(())
    }
}

/// How many replies there are.
pub(super) enum Count<'a> {
    /// In a topic of Kafka, with so many partitions.
    Topic(Arc<Topics>, String, i32),
    /// By the sidecar's metrics.
    Forwarded(&'a Sidecar),
}

impl Count<'_> {
    pub(super) async fn now(&self) -> Result<u64> {
        match self {
            Self::Topic(topics, topic, partitions) => {
                let (topics, topic, partitions) = (topics.clone(), topic.clone(), *partitions);
                tokio::task::spawn_blocking(move || topics.count(&topic, partitions)).await?
            }
            Self::Forwarded(sidecar) => {
                let text = sidecar.probes().get("/metrics").await?.expect(200)?.text();
                let labels = [format!("route=\"{ROUTE}\""), "disposition=\"forwarded\"".to_owned()];
                let line = text
                    .lines()
                    .find(|line| line.starts_with("mesh_dispositions_total{") && line.contains(&labels[0]) && line.contains(&labels[1]));
                Ok(line.and_then(|line| line.rsplit_once(' ')).map_or(Ok(0), |(_, count)| count.parse())?)
            }
        }
    }

    /// Waits until there are so many; says how many there are then.
    pub(super) async fn reach(&self, count: u64) -> Result<u64> {
        let (mut last, mut moved) = (0, Instant::now());
        let mut fastest = Duration::MAX;
        loop {
            let asked = Instant::now();
            let now = self.now().await?;
            fastest = fastest.min(asked.elapsed());
            if now >= count {
                return Ok(now);
            }
            if now != last {
                (last, moved) = (now, Instant::now());
            }
            ensure!(moved.elapsed() < Duration::from_secs(60), "{now} of {count} replies, and no more for a minute");
            // The metrics of a thousand routes are 8 MB: the asking must be no part of what is measured.
            tokio::time::sleep((fastest * ASKING).max(LOOK)).await;
        }
    }
}

/// Measures from the first reply to the last, or for so many seconds, if they do not suffice.
pub(super) async fn flow_for(count: Count<'_>, records: u64, seconds: f64, watch: Watch) -> Result<Measured> {
    let first = count.reach(1).await?;
    let running = watch.begin(first)?;
    let last = match tokio::time::timeout(Duration::from_secs_f64(seconds), count.reach(records)).await {
        Ok(last) => last?,
        Err(_) => count.now().await?,
    };
    ensure!(last > first, "no reply but the first {first} came in {seconds} s");
    running.end(last)
}

/// Measures from the first reply to the last.
pub(super) async fn flow(count: Count<'_>, records: u64, watch: Watch) -> Result<Measured> {
    let first = count.reach(1).await?;
    let running = watch.begin(first)?;
    let last = count.reach(records).await.context("the last reply")?;
    running.end(last)
}
