//! Memory, and processor time at rest.
//!
//! Invariant: idle routes read topics of their own, in which nothing is, each with a group of its own.

use std::{fmt::Write as _, time::Duration};

use anyhow::Result;

use super::{
    ground::{Bench, Filling, ROUTE, SERVICE},
    measure::{self, mib},
    role,
    rows::{Kind, Row},
};
use crate::{process::Process, sidecar::Sidecar, stage::Stage};

/// So many idle routes are looked at.
const ROUTES: [usize; 3] = [1, 10, 50];

/// How long a sidecar rests before it is looked at.
const REST: Duration = Duration::from_secs(5);

/// A sidecar whose routes have nothing to do.
struct Resting {
    sidecar: Sidecar,
    topics: Vec<String>,
    _service: Process,
    _stage: Stage,
}

impl Resting {
    async fn start(bench: &Bench, routes: usize) -> Result<Self> {
        let stage = Stage::new(bench.broker.clone())?;
        let (service, port) = role::serve(stage.folder(), &["service-http", "echo"]).await?;
        let mut topics = vec![stage.topic("to")];
        let mut table = String::from("routes:\n");
        for number in 0..routes {
            let from = stage.topic(&format!("from{number}"));
            let to = &topics[0];
            writeln!(table, "- {{ name: {ROUTE}{number}, service: {SERVICE}, from: [{from}], handler: /push, to: [{to}] }}")?;
            topics.push(from);
        }
        for topic in &topics {
            bench.create(topic).await?;
        }
        let builder = bench.sidecar(&stage, "sidecar").app(SERVICE, &format!("http://127.0.0.1:{port}"));
        let sidecar = builder.pinned(&table).start().await?;
        let names: Vec<String> = (0..routes).map(|number| format!("{ROUTE}{number}")).collect();
        sidecar.wait_running(&names.iter().map(String::as_str).collect::<Vec<_>>()).await?;
        tokio::time::sleep(REST).await;
        Ok(Self { sidecar, topics, _service: service, _stage: stage })
    }

    async fn end(self, bench: &Bench) -> Result<()> {
        self.sidecar.finish().await?;
        bench.delete(&self.topics.iter().map(String::as_str).collect::<Vec<_>>()).await
    }
}

impl Bench {
    /// One route at rest.
    pub(super) async fn idle(&self, row: &mut Row) -> Result<()> {
        let mut resting = Resting::start(self, 1).await?;
        let id = resting.sidecar.process()?.id();
        let before = measure::cpu_time(id)?;
        row.figure("resident after 5 s", mib(measure::resident_bytes(id)?), "MiB");
        row.figure("peak", mib(measure::peak_bytes(id)?), "MiB");
        tokio::time::sleep(2 * REST).await;
        let used = measure::cpu_time(id)?.saturating_sub(before);
        row.figure("processor at rest", used.as_secs_f64() / (2 * REST).as_secs_f64() * 100.0, "% of a core");
        resting.end(self).await
    }

    /// By the number of idle routes, and under a push.
    pub(super) async fn memory(&self, row: &mut Row) -> Result<()> {
        let mut resident = Vec::new();
        for routes in ROUTES {
            let mut resting = Resting::start(self, routes).await?;
            let id = resting.sidecar.process()?.id();
            let now = mib(measure::resident_bytes(id)?);
            row.figure(format!("{routes} idle: resident (VmRSS)"), now, "MiB");
            row.figure(format!("{routes} idle: peak (VmHWM)"), mib(measure::peak_bytes(id)?), "MiB");
            row.figure(format!("{routes} idle"), measure::threads(id)? as f64, "threads");
            resident.push((routes, now));
            resting.end(self).await?;
        }
        for pair in resident.windows(2) {
            let ((few, before), (many, after)) = (pair[0], pair[1]);
            let each = (after - before) * 1024.0 / (many - few) as f64;
            row.figure(format!("each further idle route, {few} to {many}"), each, "KiB");
        }
        let stage = Stage::new(self.broker.clone())?;
        let source = stage.topic("source");
        self.fill(&stage, &source, Filling::of(self.effort.records)).await?;
        let service = role::serve(stage.folder(), &["service-http", "echo"]).await?;
        let pushed = self.push_round(Kind::PushHttp, &stage, 0, service).await?;
        for (name, of) in [("resident (VmRSS)", &pushed.resident_mib), ("peak (VmHWM)", &pushed.peak_mib)] {
            row.figure(
                format!("after a push of {} records: {name}", self.effort.records),
                of.get("sidecar").copied().unwrap_or(0.0),
                "MiB",
            );
        }
        self.delete(&[&source]).await
    }
}
