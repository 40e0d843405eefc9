//! The rows: what there is to measure, and what was measured.

use serde::Serialize;

use super::measure::Measured;

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
    /// The same at a tenth of what the hop can do, measured in the same run.
    Hop10,
    /// At a half of it.
    Hop50,
    /// At four fifths of it.
    Hop80,
    /// Memory and processor time at rest.
    Idle,
    /// Memory by the number of idle routes, and under a push.
    Memory,
    /// From the start of the process to ready.
    Start,
    /// A table of 1,000 routes is swapped under load.
    Swap,
    /// A large table is applied to a simulated mesh of many sidecars.
    MeshScale,
    /// Duplicates after three `kill -9`.
    Kill,
    /// Publishing over HTTP with TLS; its floor is the same in clear.
    TlsHttp,
    /// Publishing on one gRPC stream with TLS; its floor is the same in clear.
    TlsStream,
    /// A push over HTTP with a span of every record; its floor is the same without.
    TraceHttp,
}

impl Kind {
    /// Whether it is of the design's table of speeds, and measured in rounds beside a floor.
    pub fn is_of_table(self) -> bool {
        use Kind::{Hop, PublishHttp, PublishStream, PublishUnary, PushHttp, PushStream};
        matches!(self, PushHttp | PushStream | PublishHttp | PublishUnary | PublishStream | Hop)
    }

    /// Its name on the command line.
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or_else(String::new, |value| value.get_name().to_owned())
    }
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
    /// Sidecars of the simulated mesh.
    pub sidecars: usize,
    /// Routes of the table that is applied to it.
    pub routes: usize,
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
    pub(super) fn new(kind: Kind, broker: &'static str) -> Self {
        Self { kind, broker, mesh: Vec::new(), floors: Vec::new(), figures: Vec::new(), failed: None }
    }

    pub(super) fn floor(&mut self, name: &'static str, run: Measured) {
        match self.floors.iter_mut().find(|floor| floor.name == name) {
            Some(floor) => floor.runs.push(run),
            None => self.floors.push(Floor { name, runs: vec![run] }),
        }
    }

    pub(super) fn figure(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
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
