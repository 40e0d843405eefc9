//! The processes that a bench consists of: this same program, told what to be.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use serde::de::DeserializeOwned;

use super::{
    guard::work::Work,
    kafka, load,
    measure::{Measured, Watch},
    open_loop, scale,
    service::{self, Answer},
};
use crate::process::{Process, run};

/// What a process of the bench is.
#[derive(Clone, Debug, Subcommand)]
pub enum Role {
    /// An HTTP/1.1 service.
    ServiceHttp {
        /// What it answers.
        #[arg(value_enum)]
        answer: Answer,
        /// How many milliseconds it takes.
        #[arg(long, default_value_t = 0)]
        delay: u64,
        /// How many threads it has.
        #[arg(long, default_value_t = 1)]
        threads: usize,
    },
    /// A gRPC service.
    ServiceGrpc {
        /// How many threads it has.
        #[arg(long, default_value_t = 1)]
        threads: usize,
    },
    /// A service that attaches to a route.
    Subscriber {
        /// The sidecar's API.
        url: String,
        /// The route.
        route: String,
        /// The credits.
        credits: u32,
    },
    /// Publishes over HTTP/1.1.
    LoadHttp {
        /// The API, or its floor.
        address: SocketAddr,
        /// The path.
        path: String,
        /// Connections.
        connections: usize,
        /// With TLS, and this authority.
        #[arg(long)]
        ca: Option<PathBuf>,
        /// When and whom it measures.
        #[command(flatten)]
        span: SpanArgs,
    },
    /// Takes spans, and forgets them.
    Collector,
    /// Calls an HTTP service as the sidecar does.
    LoadHop {
        /// The service.
        address: SocketAddr,
        /// Connections.
        connections: usize,
        /// When and whom it measures.
        #[command(flatten)]
        span: SpanArgs,
    },
    /// Publishes by unary gRPC calls.
    LoadUnary {
        /// The API, or its floor.
        url: String,
        /// The topic.
        topic: String,
        /// Calls at once.
        calls: usize,
        /// When and whom it measures.
        #[command(flatten)]
        span: SpanArgs,
    },
    /// Publishes on a gRPC stream.
    LoadStream {
        /// The API, or its floor.
        url: String,
        /// The topic.
        topic: String,
        /// Requests under way.
        window: usize,
        /// Records a request.
        batch: u64,
        /// With TLS, and this authority.
        #[arg(long)]
        ca: Option<PathBuf>,
        /// When and whom it measures.
        #[command(flatten)]
        span: SpanArgs,
    },
    /// Calls `HandleStream` as the sidecar does.
    LoadHandle {
        /// The service.
        url: String,
        /// Deliveries under way.
        window: usize,
        /// Records a delivery.
        batch: u64,
        /// When and whom it measures.
        #[command(flatten)]
        span: SpanArgs,
    },
    /// Subscribes to a topic.
    LoadSubscribe {
        /// The API.
        url: String,
        /// The topic.
        topic: String,
        /// Subscriptions.
        count: u64,
        /// Records in the topic.
        records: u64,
        /// When and whom it measures.
        #[command(flatten)]
        span: SpanArgs,
    },
    /// Simulates a mesh, and measures how a table spreads in it.
    MeshScale {
        /// Sidecars; 0: what reading a table takes.
        sidecars: usize,
        /// Services of the table.
        services: usize,
        /// Routes.
        routes: usize,
        /// Kafka; without it an embedded broker.
        #[arg(long)]
        bootstrap: Option<String>,
    },
    /// Does a fixed piece of work, and measures nothing.
    Work {
        /// Which.
        #[arg(value_enum)]
        work: Work,
        /// Records.
        records: u64,
    },
    /// Produces by librdkafka.
    Produce {
        /// Kafka.
        bootstrap: String,
        /// The topic.
        topic: String,
        /// When and whom it measures.
        #[command(flatten)]
        span: SpanArgs,
    },
    /// Consumes and produces without a service.
    Pipe {
        /// Kafka.
        bootstrap: String,
        /// The source.
        from: String,
        /// The destination.
        to: String,
    },
    /// What can go from one topic to another in a second.
    Capacity {
        /// Kafka, or the API as `http://…`.
        at: String,
        /// Where records go in.
        to: String,
        /// Where they come out.
        from: String,
        /// Records under way.
        window: u64,
        /// When and whom it measures.
        #[command(flatten)]
        span: SpanArgs,
    },
    /// Latency from one topic to another.
    Hop {
        /// Kafka, or the API as `http://…`.
        at: String,
        /// Where records go in.
        to: String,
        /// Where they come out.
        from: String,
        /// Records a second.
        rate: f64,
        /// When and whom it measures.
        #[command(flatten)]
        span: SpanArgs,
    },
}

/// When and whom a role measures.
#[derive(Clone, Debug, Args)]
pub struct SpanArgs {
    /// Seconds before it measures.
    #[arg(long)]
    warmup: f64,
    /// Seconds that it measures.
    #[arg(long)]
    time: f64,
    /// `name=process id`.
    #[arg(long)]
    watch: Vec<String>,
}

impl SpanArgs {
    fn span(&self) -> Result<load::Span> {
        let own = i32::try_from(std::process::id())?;
        let watch = Watch::parse(&self.watch)?.with("load", own);
        Ok(load::Span { warmup: Duration::from_secs_f64(self.warmup), time: Duration::from_secs_f64(self.time), watch })
    }
}

impl Role {
    /// Plays the role to its end.
    ///
    /// # Errors
    /// If it fails.
    pub fn play(self) -> Result<()> {
        let measured = match self {
            Self::ServiceHttp { answer, delay, threads } => {
                return runtime(threads)?.block_on(service::http(answer, Duration::from_millis(delay)));
            }
            Self::ServiceGrpc { threads } => return runtime(threads)?.block_on(service::grpc()),
            Self::Subscriber { url, route, credits } => return runtime(1)?.block_on(service::subscriber(url, route, credits)),
            Self::Work { work, records } => return runtime(1)?.block_on(work.run(records)),
            Self::Pipe { bootstrap, from, to } => return kafka::pipe(&bootstrap, &from, &to),
            Self::MeshScale { sidecars, services, routes, bootstrap } => {
                return scale::play(sidecars, services, routes, bootstrap.as_deref());
            }
            Self::Collector => return runtime(1)?.block_on(service::collector()),
            Self::LoadHttp { address, path, connections, ca, span } => {
                runtime(1)?.block_on(load::http(address, path, connections, ca, span.span()?))
            }
            Self::LoadHop { address, connections, span } => runtime(1)?.block_on(load::hop(address, connections, span.span()?)),
            Self::LoadUnary { url, topic, calls, span } => runtime(1)?.block_on(load::unary(url, topic, calls, span.span()?)),
            Self::LoadStream { url, topic, window, batch, ca, span } => {
                runtime(1)?.block_on(load::publish_stream(url, topic, (window, batch), ca, span.span()?))
            }
            Self::LoadHandle { url, window, batch, span } => runtime(1)?.block_on(load::handle_stream(url, window, batch, span.span()?)),
            Self::LoadSubscribe { url, topic, count, records, span } => {
                runtime(1)?.block_on(load::subscribers(url, topic, count, records, span.span()?))
            }
            Self::Produce { bootstrap, topic, span } => kafka::produce(&bootstrap, &topic, span.span()?),
            Self::Capacity { at, to, from, window, span } if is_mesh(&at) => {
                runtime(1)?.block_on(open_loop::capacity(&at, &to, &from, window, span.span()?))
            }
            Self::Capacity { at, to, from, window, span } => kafka::capacity(&at, &to, &from, window, &span.span()?),
            Self::Hop { at, to, from, rate, span } if is_mesh(&at) => {
                runtime(1)?.block_on(open_loop::hop(&at, &to, &from, rate, span.span()?))
            }
            Self::Hop { at, to, from, rate, span } => kafka::hop(&at, &to, &from, rate, &span.span()?),
        }?;
        println!("{}", serde_json::to_string(&measured)?);
        Ok(())
    }
}

fn is_mesh(at: &str) -> bool {
    at.starts_with("http://")
}

fn runtime(threads: usize) -> Result<tokio::runtime::Runtime> {
    let mut builder = match threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    Ok(builder.worker_threads(threads).enable_all().build()?)
}

fn command(arguments: &[String]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("role").args(arguments);
    Ok(command)
}

/// Starts a role that serves until it is dropped; says on which port.
///
/// # Errors
/// If it does not get ready.
pub async fn serve(folder: &Path, arguments: &[&str]) -> Result<(Process, u16)> {
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    let mut command = command(&arguments)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let name = arguments.first().context("a role")?.clone();
    let mut process = Process::start(&name, command, &folder.join(format!("{name}.log")))?;
    let port = process.ready_port(Duration::from_secs(30)).await?;
    Ok((process, port))
}

/// Runs a role that measures.
///
/// # Errors
/// If it fails.
pub async fn measure(arguments: &[&str], warmup: f64, time: f64, watch: &Watch) -> Result<Measured> {
    let mut arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    arguments.extend([format!("--warmup={warmup}"), format!("--time={time}")]);
    arguments.extend(watch.arguments());
    result(&arguments, Duration::from_secs_f64(warmup + time + 120.0)).await
}

/// Runs a role that prints its result as JSON, in its last line.
///
/// # Errors
/// If it fails, or takes longer.
pub async fn answer<T: DeserializeOwned>(arguments: &[&str], deadline: Duration) -> Result<T> {
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    result(&arguments, deadline).await
}

async fn result<T: DeserializeOwned>(arguments: &[String], deadline: Duration) -> Result<T> {
    let output = run(command(arguments)?, Vec::new(), deadline).await?.success()?;
    let line = output.lines().last().context("no result")?;
    serde_json::from_str(line).with_context(|| format!("a result: {line}"))
}
