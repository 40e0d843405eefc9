//! The sidecar's own configuration: what is local to one process. Floor 1.
//!
//! A file (YAML or JSON), then the environment (`MESH_…`). Raw text becomes [`Config`] at the edge, with all faults at once; nothing behind it
//! checks again.
//!
//! Invariant: what [`print()`] prints, [`load`] reads, secrets aside.
//! Invariant: no secret is printed, nor named in a fault.

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh_routing::sign::PublicKey;

mod fault;
mod listeners;
mod print;
mod read;
mod source;
mod values;

pub use fault::{ConfigErrors, Fault, Place};
pub use print::print;

/// Reads the configuration: the file, if there is one, and over it the variables `MESH_…` of the environment. Variables that are empty, and
/// those with other names, are passed over.
///
/// # Errors
/// All faults, each with its place, value and hint.
pub fn load(path: Option<&Path>, env: impl Iterator<Item = (String, String)>) -> Result<Config, ConfigErrors> {
    let Some(path) = path else { return read::read(None, env) };
    let file = path.display().to_string();
    match fs::read_to_string(path) {
        Ok(text) => read::read(Some((&file, &text)), env),
        Err(error) => Err(ConfigErrors {
            faults: vec![Fault {
                place: Place::File { file, line: 0, column: 0 },
                field: String::new(),
                value: None,
                problem: format!("cannot be read: {error}"),
                hint: "give the path of a readable file".into(),
            }],
        }),
    }
}

/// The variables `MESH_…` of this process's environment, for [`load`]. What is not UTF-8 is replaced, so that it shows up as a fault.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    env::vars_os().map(move |(name, value)| (text(name), text(value))).filter(|(name, _)| name.starts_with(source::PREFIX))
}

/// The validated configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The mesh's name.
    pub mesh: Arc<str>,
    /// The services that this sidecar serves; never empty.
    pub services: Vec<ServiceConfig>,
    /// The instance's stable name; set means static membership.
    pub instance: Option<String>,
    /// What it is chosen by, for a canary.
    pub labels: BTreeMap<String, String>,
    /// The folder of the table cache.
    pub state: PathBuf,
    /// The broker.
    pub broker: BrokerConfig,
    /// A file that pins the table; without it the table comes from the mesh.
    pub table: Option<PathBuf>,
    /// Where it listens.
    pub listen: Listen,
    /// Which listeners speak TLS.
    pub tls: ListenTls,
    /// What tables are taken, and who may use the admin listener.
    pub control: ControlConfig,
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
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// `http://host:port`: HTTP/1.1. The whole of it, with its scheme, and with a port only if one was given.
    Http(String),
    /// `h2c://host:port`: HTTP/2 with prior knowledge. With its scheme, as above.
    H2c(String),
    /// `grpc://host:port`: `mesh.v1.Handler`. With its scheme, as above.
    Grpc(String),
    /// `unix:/path`: HTTP/1.1 on a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for AppAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(address) | Self::H2c(address) | Self::Grpc(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Which broker.
#[derive(Clone, PartialEq, Eq)]
pub enum BrokerConfig {
    /// The embedded broker, with its data in this folder.
    Embedded {
        /// The folder.
        path: PathBuf,
    },
    /// Kafka; the keys are librdkafka's, as they are.
    Kafka(BTreeMap<String, String>),
}

impl fmt::Debug for BrokerConfig {
    /// Secrets are redacted here too: a configuration ends up in logs easily.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded { path } => f.debug_struct("Embedded").field("path", path).finish(),
            Self::Kafka(settings) => f.debug_tuple("Kafka").field(&print::redacted(settings)).finish(),
        }
    }
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

/// Which listeners speak TLS; the others speak in clear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListenTls {
    /// Of `listen.api`.
    pub api: Option<TlsFiles>,
    /// Of `listen.admin`.
    pub admin: Option<TlsFiles>,
}

/// The PEM files of a listener's TLS. They are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, and those between it and its authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities of clients: with them, a client without a certificate of theirs is refused (mTLS).
    pub client_ca: Option<PathBuf>,
}

/// What tables are taken, and who may use the admin listener: everybody who reaches it, without tokens and certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlConfig {
    /// A table must be signed by one of these; empty: none needs a signature. A pinned table is a local file, and needs none.
    pub trusted_keys: Vec<PublicKey>,
    /// By token.
    pub tokens: Vec<AdminToken>,
    /// By a client's certificate.
    pub certificates: Vec<AdminCertificate>,
}

/// Who shows this token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminToken {
    /// The name in the audit record.
    pub name: String,
    /// The file that holds it; each line is a token that is valid.
    pub file: PathBuf,
    /// What it allows.
    pub role: Role,
}

/// Who has this certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminCertificate {
    /// A DNS name or a URI of its subjectAltName, or `sha256:` and its fingerprint; in lower case.
    pub name: String,
    /// What it allows.
    pub role: Role,
}

/// What somebody may do at the admin listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// To look.
    Read,
    /// To change something, too.
    Write,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
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

impl Default for Limits {
    fn default() -> Self {
        Self {
            record_bytes: 1 << 20,
            publish_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(25),
            buffer_bytes: 4 << 20,
        }
    }
}

#[cfg(test)]
mod tests;
