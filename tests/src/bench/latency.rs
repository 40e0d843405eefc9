//! Latency of the whole hop: topic, service, topic.
//!
//! Invariant: the load waits for nobody, and a latency counts from the time at which its record was due. The capacity alone is measured by
//! a closed loop: it is what the hop can do with the load and the reader on the same machine.

use anyhow::Result;

use super::{
    ground::{Bench, ROUTE, SERVICE},
    measure::Watch,
    role,
    rows::Row,
};
use crate::{process::Process, sidecar::Sidecar, stage::Stage};

/// Records under way while the capacity is measured: far more than the route calls at once.
const WINDOW: u64 = 4_000;

/// A route from topic to topic, and a third topic beside it.
struct Hop {
    /// Where records go in and come out: Kafka, or, on the embedded broker, the sidecar's own API.
    at: String,
    /// Source, destination, and the one of the floor.
    topics: [String; 3],
    service: Process,
    sidecar: Sidecar,
    _stage: Stage,
}

impl Hop {
    async fn new(bench: &Bench) -> Result<Self> {
        let stage = Stage::new(bench.broker.clone())?;
        let topics = ["a", "b", "direct"].map(|name| stage.topic(name));
        for topic in &topics {
            bench.create(topic).await?;
        }
        let (service, port) = role::serve(stage.folder(), &["service-http", "echo"]).await?;
        let [from, to, direct] = &topics;
        let table = format!(
            "topics: {{ {direct}: {{ partitions: 4 }} }}\nroutes:\n- {{ name: {ROUTE}, service: {SERVICE}, from: [{from}], handler: /push, to: [{to}] }}\n"
        );
        let builder = bench.sidecar(&stage, "sidecar").app(SERVICE, &format!("http://127.0.0.1:{port}"));
        let sidecar = builder.pinned(&table).start().await?;
        sidecar.wait_running(&[ROUTE]).await?;
        let api = || format!("http://{}", sidecar.api_address());
        let at = bench.kafka.as_ref().map_or_else(api, |(handle, _)| handle.bootstrap().to_owned());
        Ok(Self { at, topics, service, sidecar, _stage: stage })
    }

    fn watch(&mut self, bench: &Bench) -> Result<Watch> {
        Ok(bench.watch().with("sidecar", self.sidecar.process()?.id()).with("service", self.service.id()))
    }

    async fn end(self, bench: &Bench) -> Result<()> {
        self.sidecar.finish().await?;
        bench.delete(&self.topics.each_ref().map(String::as_str)).await
    }
}

impl Bench {
    /// At a fixed rate, `stretch` times as long as other loads.
    pub(super) async fn hop(&self, row: &mut Row, rate: f64, stretch: f64) -> Result<()> {
        let mut hop = Hop::new(self).await?;
        let (rate, warmup, seconds) = (rate.to_string(), self.effort.warmup.max(2.0), self.effort.seconds * stretch);
        for _ in 0..self.effort.rounds {
            let watch = hop.watch(self)?;
            let [from, to, direct] = &hop.topics;
            let (name, floor_watch) = match &self.kafka {
                Some(_) => ("produce → consume", self.watch()),
                None => ("publish → subscribe, the same sidecar", watch.clone()),
            };
            row.floor(name, role::measure(&["hop", &hop.at, direct, direct, &rate], warmup, seconds, &floor_watch).await?);
            row.mesh.push(role::measure(&["hop", &hop.at, from, to, &rate], warmup, seconds, &watch).await?);
        }
        hop.end(self).await
    }

    /// At a part of what the hop can do, which is measured once in a run.
    pub(super) async fn hop_at(&self, row: &mut Row, part: f64) -> Result<()> {
        let capacity = *self.capacity.get_or_try_init(|| self.hop_capacity()).await?;
        let rate = (capacity * part).round().max(1.0);
        row.figure("capacity, measured in this run", capacity, "records/s");
        row.figure("offered", rate, "records/s");
        self.hop(row, rate, 1.0).await
    }

    async fn hop_capacity(&self) -> Result<f64> {
        let mut hop = Hop::new(self).await?;
        let watch = hop.watch(self)?;
        let [from, to, _] = &hop.topics;
        let arguments = ["capacity", &hop.at, from, to, &WINDOW.to_string()];
        let measured = role::measure(&arguments, self.effort.warmup.max(2.0), self.effort.seconds, &watch).await?;
        hop.end(self).await?;
        Ok(measured.rate())
    }
}
