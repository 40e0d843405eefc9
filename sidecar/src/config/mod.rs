//! The sidecar's own configuration: what is local to one process. Floor 1.
//!
//! Raw text becomes [`Config`] at the edge, with all faults at once; nothing behind it checks again.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

/// The validated configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The mesh's name.
    pub mesh: Arc<str>,
    /// The services that this sidecar serves; never empty.
    pub services: Vec<ServiceConfig>,
    /// The instance's stable name; set means static membership.
    pub instance: Option<String>,
    /// The folder of the table cache.
    pub state: PathBuf,
    /// The broker.
    pub broker: BrokerConfig,
    /// A file that pins the table; without it the table comes from the mesh.
    pub table: Option<PathBuf>,
    /// Where it listens.
    pub listen: Listen,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
    /// Bounds.
    pub limits: Limits,
}

impl Config {
    /// The service of this name.
    pub fn service(&self, name: &str) -> Option<&ServiceConfig> {
        self.services.iter().find(|service| *service.name == *name)
    }
}

/// One service.
#[derive(Clone, Debug)]
pub struct ServiceConfig {
    /// Its name in the routing table.
    pub name: Arc<str>,
    /// Where it listens; `None` for a service that only publishes, attaches or polls.
    pub app: Option<AppAddress>,
    /// The topics that it may publish to; `None` allows every topic but those that begin with `__`.
    pub publish: Option<Vec<String>>,
    /// The topics that it may subscribe to; `None` as for `publish`.
    pub subscribe: Option<Vec<String>>,
    /// The file that holds the caller's token; `None` asks for none.
    pub token_file: Option<PathBuf>,
}

/// How a service is reached. Comes from local configuration only, never from a table, a header or a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppAddress {
    /// `http://host:port`: HTTP/1.1.
    Http(String),
    /// `h2c://host:port`: HTTP/2 with prior knowledge.
    H2c(String),
    /// `grpc://host:port`: `mesh.v1.Handler`.
    Grpc(String),
    /// `unix:/path`: HTTP/1.1 on a Unix socket.
    Unix(PathBuf),
}

/// Which broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BrokerConfig {
    /// The embedded broker, with its data in this folder.
    Embedded {
        /// The folder.
        path: PathBuf,
    },
    /// Kafka; the keys are librdkafka's, as they are.
    Kafka(BTreeMap<String, String>),
}

/// The listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// gRPC and HTTP for the service.
    pub api: SocketAddr,
    /// `mesh.v1.Control`.
    pub admin: SocketAddr,
    /// Probes and metrics.
    pub probe: SocketAddr,
}

/// Logs and traces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetryConfig {
    /// The OTLP collector (gRPC); `None` makes no spans.
    pub otlp: Option<String>,
    /// The log's filter, in `tracing_subscriber`'s syntax (`info`, `mesh_sidecar=debug`).
    pub log: String,
    /// The log's form.
    pub log_format: LogFormat,
}

/// The log's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people; coloured on a terminal.
    Pretty,
}

/// Bounds that protect the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest record that is published, and the largest answer that is taken, in bytes.
    pub record_bytes: usize,
    /// How long a publish waits for its acknowledgement.
    pub publish_timeout: Duration,
    /// How long a drain may take.
    pub drain_timeout: Duration,
    /// Records fetched ahead, per route, in bytes.
    pub buffer_bytes: usize,
}
