//! Cost curves: one thing is varied over some powers of ten, and everything else stays as the rows have it.
//!
//! Invariant: a point is measured for at most some seconds, from the first reply on, with processes of its own; so a slow point costs no
//! more time than a fast one.
//! Invariant: a point that fails is shown as such, and the others are measured all the same.

mod report;

use std::{fmt::Write as _, time::Duration};

use anyhow::{Result, ensure};
use serde::Serialize;

use super::{
    ground::{Bench, Count, Filling, ROUTE, SERVICE, flow_for},
    kafka,
    measure::{self, Measured, mib},
    role,
};
use crate::{
    process::Process,
    sidecar::{Builder, routes_of},
    stage::Stage,
};

pub use report::{json, markdown, write};

/// What is varied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Curve {
    /// The size of the value, 100 B to 1 MB.
    Size,
    /// Partitions of source and destination, 1 to 64.
    Partitions,
    /// Routes of the sidecar, 1 to 1,000, of which all but one read other topics, in which nothing is.
    Routes,
    /// Keys in the backlog, 1 to 1,000,000.
    Keys,
    /// The route's concurrency, 1 to 512.
    Concurrency,
    /// How long the handler takes, 0 to 100 ms.
    Latency,
    /// Records that wait when the sidecar starts, 10,000 to 10,000,000.
    Backlog,
    /// Subscriptions of one topic without a group, 1 to 200: each gets every record.
    Subscribers,
}

impl Curve {
    /// Where it is measured; the short form leaves out what is between, and the largest of what takes long.
    pub fn points(self, full: bool) -> &'static [u64] {
        match (self, full) {
            (Self::Size, false) => &[100, 1_000, 10_000, 100_000, 1_000_000],
            (Self::Size, true) => &[100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000],
            (Self::Partitions, false) => &[1, 4, 16, 64],
            (Self::Partitions, true) => &[1, 2, 4, 8, 16, 32, 64],
            (Self::Routes, false) => &[1, 10, 100],
            (Self::Routes, true) => &[1, 10, 30, 100, 300, 1_000],
            (Self::Keys, false) => &[1, 10, 100, 1_000, 10_000],
            (Self::Keys, true) => &[1, 10, 100, 1_000, 10_000, 100_000, 1_000_000],
            (Self::Concurrency, false) => &[1, 4, 16, 64, 256, 512],
            (Self::Concurrency, true) => &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
            (Self::Latency, false) => &[0, 1, 10, 100],
            (Self::Latency, true) => &[0, 1, 2, 5, 10, 20, 50, 100],
            (Self::Backlog, false) => &[10_000, 100_000, 1_000_000],
            (Self::Backlog, true) => &[10_000, 100_000, 1_000_000, 10_000_000],
            (Self::Subscribers, false) => &[1, 10, 50, 200],
            (Self::Subscribers, true) => &[1, 2, 5, 10, 20, 50, 100, 200],
        }
    }

    /// What the rate should be where the service is what limits it; `None` elsewhere.
    fn ideal(self, x: u64) -> Option<f64> {
        (self == Self::Latency && x > 0).then(|| f64::from(CONCURRENCY) * 1e3 / x as f64)
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    /// All points, instead of some.
    pub full: bool,
    /// The most seconds of a point.
    pub seconds: f64,
    /// Records of a backlog, where it is not what is varied.
    pub records: u64,
}

/// A curve on one broker.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// Which.
    pub curve: Curve,
    /// `kafka` or `embedded`.
    pub broker: &'static str,
    /// From the least to the most.
    pub points: Vec<Point>,
}

/// One point of it.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// Where.
    pub x: u64,
    /// What was measured; nothing if it failed.
    pub measured: Option<Measured>,
    /// The sidecar's resident memory before there was anything to do, in MiB, where that is looked at.
    pub rest_mib: Option<f64>,
    /// What the rate should be, where that is known.
    pub ideal: Option<f64>,
    /// Why it was not measured.
    pub failed: Option<String>,
}

/// The concurrency, where it is not what is varied.
const CONCURRENCY: u32 = 64;
/// The most bytes of a backlog of which nothing but the size is varied.
const VOLUME: u64 = 128 << 20;
/// Topics that idle routes share.
const IDLE_TOPICS: usize = 50;
/// How long idle routes rest before memory is looked at.
const REST: Duration = Duration::from_secs(2);
/// How long many idle routes may take until each owns its partitions.
const SETTLE: Duration = Duration::from_secs(300);

/// What a point pushes.
#[derive(Clone, Copy, Debug)]
struct Work<'a> {
    source: &'a str,
    records: u64,
    partitions: i32,
    concurrency: u32,
    /// Milliseconds of the handler.
    delay: u64,
    /// Whether the measured route is there from the start on; else it comes when the others rest.
    alone: bool,
    /// Routes beside the measured one.
    idle: usize,
    seconds: f64,
}

impl Bench {
    /// Measures a curve.
    pub async fn curve(&self, curve: Curve, length: Length) -> Measurement {
        let mut points = Vec::new();
        // The backlog is one topic that grows, the points share it where nothing of it is varied.
        let shared = match self.prepare(curve, length).await {
            Ok(shared) => shared,
            Err(error) => return Measurement { curve, broker: self.name(), points: vec![Point::failed(curve, 0, &error)] },
        };
        for x in curve.points(length.full) {
            let point = match self.point(curve, *x, length, &shared, points.last()).await {
                Ok((measured, rest_mib)) => Point { x: *x, measured: Some(measured), rest_mib, ideal: curve.ideal(*x), failed: None },
                Err(error) => Point::failed(curve, *x, &error),
            };
            eprintln!("{curve:?} {x}: {}", point.summary());
            points.push(point);
        }
        if let Err(error) = self.delete(&[&shared.topic("source")]).await {
            eprintln!("the source stays: {error:#}");
        }
        Measurement { curve, broker: self.name(), points }
    }

    /// A stage, with a backlog where all points share it.
    async fn prepare(&self, curve: Curve, length: Length) -> Result<Stage> {
        let stage = Stage::new(self.broker.clone())?;
        if matches!(curve, Curve::Routes | Curve::Concurrency | Curve::Latency | Curve::Subscribers) {
            self.fill(&stage, &stage.topic("source"), Filling::of(length.records)).await?;
        }
        Ok(stage)
    }

    async fn point(&self, curve: Curve, x: u64, length: Length, shared: &Stage, before: Option<&Point>) -> Result<(Measured, Option<f64>)> {
        let source = shared.topic("source");
        let base = Work {
            source: &source,
            records: length.records,
            partitions: kafka::PARTITIONS,
            concurrency: CONCURRENCY,
            delay: 0,
            alone: true,
            idle: 0,
            seconds: length.seconds,
        };
        let usual = Filling::of(length.records);
        match curve {
            Curve::Size => {
                let size = usize::try_from(x)?;
                let records = length.records.min(VOLUME / x).max(50);
                self.pushed_alone(Filling { size, records, ..usual }, base).await
            }
            Curve::Keys => {
                // Every key has to occur.
                let records = length.records.max(x);
                self.pushed_alone(Filling { keys: x, records, ..usual }, base).await
            }
            Curve::Partitions => {
                let partitions = i32::try_from(x)?;
                self.pushed_alone(Filling { partitions, ..usual }, Work { partitions, ..base }).await
            }
            Curve::Backlog => {
                let first = before.map_or(0, |point| point.x);
                let more = Filling { first, records: x - first, size: 100, ..usual };
                if first == 0 {
                    self.create(&source).await?;
                }
                self.append(shared, &source, more).await?;
                self.pushed(shared, Work { records: x, ..base }).await
            }
            Curve::Concurrency => self.pushed(shared, Work { concurrency: u32::try_from(x)?, ..base }).await,
            Curve::Latency => self.pushed(shared, Work { delay: x, ..base }).await,
            Curve::Routes => self.pushed(shared, Work { alone: false, idle: usize::try_from(x)? - 1, ..base }).await,
            Curve::Subscribers => Ok((self.subscribed(shared, x, base).await?, None)),
        }
    }

    /// A backlog of its own.
    async fn pushed_alone(&self, filling: Filling, work: Work<'_>) -> Result<(Measured, Option<f64>)> {
        let stage = Stage::new(self.broker.clone())?;
        let source = stage.topic("source");
        self.fill(&stage, &source, filling).await?;
        let pushed = self.pushed(&stage, Work { source: &source, records: filling.records, ..work }).await;
        self.delete(&[&source]).await?;
        pushed
    }

    /// The backlog through a route to an HTTP service that echoes, and on to a topic.
    async fn pushed(&self, stage: &Stage, work: Work<'_>) -> Result<(Measured, Option<f64>)> {
        let name = uuid::Uuid::new_v4().simple().to_string();
        let target = stage.topic(&format!("target-{}", &name[..8]));
        self.create_with(&target, work.partitions).await?;
        let delay = work.delay.to_string();
        let (service, port) = role::serve(stage.folder(), &["service-http", "echo", "--delay", &delay]).await?;
        let builder = self.sidecar(stage, &format!("sidecar-{}", &name[..8])).app(SERVICE, &format!("http://127.0.0.1:{port}"));
        let measured = self.pushed_to(stage, builder, &service, &target, work).await;
        self.delete(&[&target]).await?;
        measured
    }

    async fn pushed_to(
        &self,
        stage: &Stage,
        builder: Builder,
        service: &Process,
        target: &str,
        work: Work<'_>,
    ) -> Result<(Measured, Option<f64>)> {
        let Work { source, records, partitions, concurrency, idle, seconds, .. } = work;
        let topics = format!("topics: {{ {target}: {{ partitions: {partitions} }} }}\n");
        let mut others = String::new();
        for number in 0..idle {
            let topic = stage.topic(&format!("idle{}", number % IDLE_TOPICS));
            writeln!(others, "- {{ name: idle-{number}, service: {SERVICE}, from: [{topic}], handler: /idle, to: void }}")?;
        }
        let route = format!(
            "- {{ name: {ROUTE}, service: {SERVICE}, from: [{source}], handler: /push, to: [{target}], group: {target}, concurrency: {concurrency} }}\n"
        );
        let table = format!("{topics}routes:\n{route}{others}");
        let (mut sidecar, rest) = if work.alone {
            (builder.pinned(&table).start().await?, None)
        } else {
            // The idle routes settle first: joining their groups is no cost of a record.
            let mut sidecar = builder.start().await?;
            let before = if idle == 0 { "routes: []\n".to_owned() } else { format!("routes:\n{others}") };
            sidecar.apply(&before).await?;
            let settled = |status: &_| routes_of(status).filter(|route| route.partitions > 0).count() >= idle;
            sidecar.wait_status("all idle routes own partitions", SETTLE, settled).await?;
            tokio::time::sleep(REST).await;
            let rest = mib(measure::resident_bytes(sidecar.process()?.id())?);
            sidecar.apply(&table).await?;
            (sidecar, Some(rest))
        };
        let watch = self.watch().with("sidecar", sidecar.process()?.id()).with("service", service.id());
        let count = match &self.kafka {
            Some((_, topics)) => Count::Topic(topics.clone(), target.to_owned(), partitions),
            None => Count::Forwarded(&sidecar),
        };
        let measured = flow_for(count, records, seconds, watch).await?;
        sidecar.finish().await?;
        Ok((measured, rest))
    }

    /// The backlog to each of so many subscriptions, again and again.
    async fn subscribed(&self, stage: &Stage, subscribers: u64, work: Work<'_>) -> Result<Measured> {
        let name = format!("sidecar-{subscribers}");
        let mut sidecar = self.sidecar(stage, &name).client(SERVICE).pinned("routes: []").start().await?;
        let watch = self.watch().with("sidecar", sidecar.process()?.id());
        let url = format!("http://{}", sidecar.api_address());
        let arguments = ["load-subscribe", &url, work.source, &subscribers.to_string(), &work.records.to_string()];
        let warmup = 1.0 + subscribers as f64 / 50.0;
        let measured = role::measure(&arguments, warmup, work.seconds, &watch).await?;
        ensure!(measured.records > 0, "nothing came within {} s", work.seconds);
        sidecar.finish().await?;
        Ok(measured)
    }
}

impl Point {
    fn failed(curve: Curve, x: u64, error: &anyhow::Error) -> Self {
        Self { x, measured: None, rest_mib: None, ideal: curve.ideal(x), failed: Some(format!("{error:#}")) }
    }

    fn summary(&self) -> String {
        match (&self.measured, &self.failed) {
            (Some(measured), _) => {
                format!("{:.0} records/s, {:.1} µs", measured.rate(), measured.cpu_us.get("sidecar").copied().unwrap_or(0.0))
            }
            (None, failed) => format!("not measured: {}", failed.as_deref().unwrap_or_default()),
        }
    }
}
