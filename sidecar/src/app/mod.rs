//! The whole sidecar, assembled once from its configuration. Floor 6: the only module that knows all the others.
//!
//! `Config → App::start → App::run`: data, wiring, life. The order of the end: readiness goes, routes drain (the publish API stays up, so that a
//! service can publish to the last), the API drains, the control plane says goodbye, the broker flushes, spans are sent.
//!
//! Invariant: every task has an owner here, and is awaited.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{
        Api, admin,
        guard::Guard,
        listen::{self, Listener},
        probe,
        tls::Tls,
    },
    broker::{Broker, embedded, kafka},
    command,
    config::{BrokerConfig, Config, Listen, TlsFiles},
    consume::{self, Supervisor},
    control::{Control, ControlHandle},
    deliver::desk::Desks,
    publish::Publisher,
    status::Board,
    telemetry::{
        health::{Condition, Health},
        metrics::Metrics,
        trace::{Identity, Tracer},
    },
};

pub mod demo;
pub mod memory;
pub mod remote;

/// By how much the end of the routes may be later than `limits.drain_timeout`, for a consumer that is slow to leave; and what the broker's clients have
/// for flushing at least, after that.
const LATE: Duration = Duration::from_secs(2);

/// Why the sidecar cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The broker's configuration can never work, or its store cannot be opened.
    #[error("broker: {0}")]
    Broker(#[from] crate::broker::BrokerError),
    /// A listener, or a token file.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The pinned table.
    #[error("{0}")]
    Table(#[from] crate::control::StartError),
    /// The collector's address.
    #[error("{0}")]
    Trace(#[from] crate::telemetry::trace::TraceError),
    /// The build's own descriptors.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A sidecar that runs.
pub struct App {
    config: Arc<Config>,
    broker: Arc<dyn Broker>,
    tracer: Tracer,
    health: Health,
    board: Board,
    control: ControlHandle,
    listen: Listen,
    routes: JoinHandle<()>,
    stop_routes: CancellationToken,
    /// Requests to drain, from the admin port or from the mesh.
    drain: CancellationToken,
    listeners: Vec<JoinHandle<usize>>,
    stop_listeners: CancellationToken,
    stop_probe: CancellationToken,
    probe: JoinHandle<usize>,
    watcher: JoinHandle<()>,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("listen", &self.listen).finish_non_exhaustive()
    }
}

impl App {
    /// Wires everything and starts it. A broker or a service that is away is no error: it is waited for, visibly.
    ///
    /// # Errors
    /// What can never work: see [`StartError`].
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let config = Arc::new(config);
        let (health, board, desks, metrics) = (Health::new(), Board::default(), Desks::default(), Metrics::new());

        // The probe first: a start that takes long is visible.
        let probe_listener = listen::bind("probe", config.listen.probe).await?;
        let (api_listener, admin_listener) =
            (listen::bind("api", config.listen.api).await?, listen::bind("admin", config.listen.admin).await?);
        let listen = Listen { api: address(&api_listener)?, admin: address(&admin_listener)?, probe: address(&probe_listener)? };
        let stop_probe = CancellationToken::new();
        let probe_router = probe::router(health.clone(), metrics.clone());
        let probe = serve("probe", probe_listener, probe_router, &stop_probe);

        let tls = ListenerTls::load(&config)?;
        let guard = Arc::new(Guard::new(&config.control)?);
        if config.tls.admin.is_none() && !config.listen.admin.ip().is_loopback() {
            tracing::warn!(admin = %config.listen.admin, "tokens of the admin listener cross the network in clear: give listen.tls.admin");
        }

        let broker = open_broker(&config)?;
        let stop_control = CancellationToken::new();
        let (commands, commanded) = command::channel();
        let control = Control::start(broker.clone(), config.clone(), board.clone(), commands, stop_control).await?;
        let tracer = match &config.telemetry.otlp {
            None => Tracer::disabled(),
            Some(endpoint) => {
                let identity = Identity {
                    mesh: config.mesh.to_string(),
                    services: config.services.iter().map(|service| service.name.to_string()).collect(),
                    instance: control.control().instance().to_owned(),
                };
                Tracer::otlp(endpoint, &identity, metrics.process().dropped_spans.clone())?
            }
        };

        let stop_routes = CancellationToken::new();
        let context = consume::Context {
            config: config.clone(),
            broker: broker.clone(),
            board: board.clone(),
            desks: desks.clone(),
            metrics: metrics.clone(),
            tracer: tracer.clone(),
            paused: control.paused(),
        };
        let routes = tokio::spawn(Supervisor::new(context, control.table(), commanded).run(stop_routes.clone()));

        let (stop_listeners, drain) = (CancellationToken::new(), control.control().drain_asked().clone());
        let publisher = Publisher::guarded(broker.clone(), config.clone(), tracer.clone(), metrics.clone(), control.table());
        let admin = admin::AdminService::new(control.control().clone()).publishing(publisher.clone());
        let api = Api::new(publisher, broker.clone(), desks, control.table(), stop_routes.clone())?;
        let admin_router = admin::router(admin).await?;
        let listeners = vec![
            tokio::spawn(api.serve(Listener::new(api_listener, tls.api), stop_listeners.clone())),
            tokio::spawn(guard.serve(Listener::new(admin_listener, tls.admin), admin_router, stop_listeners.clone())),
        ];
        let watcher = tokio::spawn(watch(health.clone(), metrics, broker.clone(), control.control().clone(), stop_listeners.clone()));
        tracing::info!(api = %listen.api, admin = %listen.admin, probe = %listen.probe, broker = broker.system(), mesh = %config.mesh, "listening");
        Ok(Self {
            config,
            broker,
            tracer,
            health,
            board,
            control,
            listen,
            routes,
            stop_routes,
            drain,
            listeners,
            stop_listeners,
            stop_probe,
            probe,
            watcher,
        })
    }

    /// The addresses that were bound (a port 0 is resolved).
    pub fn listen(&self) -> Listen {
        self.listen
    }

    /// The control plane of this process.
    pub fn control(&self) -> &Control {
        self.control.control()
    }

    /// Where routes post their state.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// What the probes tell.
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Runs until `shutdown`, or until a drain is asked for, then drains and ends everything. Not cancel-safe.
    pub async fn run(self, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.drain.cancelled() => {}
        }
        // Whoever follows something at the admin port is sent away.
        self.drain.cancel();
        tracing::info!("shutting down: routes drain first, the API stays up meanwhile");
        self.health.set(Condition::Serving, Err("the sidecar drains".to_owned()));
        self.stop_routes.cancel();
        let end = Instant::now() + self.config.limits.drain_timeout;
        if tokio::time::timeout_at(end + LATE, self.routes).await.is_err() {
            let within = self.config.limits.drain_timeout;
            tracing::error!(?within, "routes did not drain in time: their records are delivered again");
        }
        self.stop_listeners.cancel();
        for listener in self.listeners {
            match listener.await {
                Ok(0) => {}
                Ok(cut) => tracing::warn!(cut, "connections were cut at the end of the drain"),
                Err(error) => tracing::error!(%error, "a listener failed"),
            }
        }
        if let Err(error) = self.watcher.await {
            tracing::error!(%error, "the health watcher failed");
        }
        self.control.close().await;
        let left = end.saturating_duration_since(Instant::now()).max(LATE);
        if let Err(error) = self.broker.close(left).await {
            tracing::error!(%error, "the broker did not close cleanly");
        }
        self.tracer.shutdown(Instant::now() + Duration::from_secs(3)).await;
        self.stop_probe.cancel();
        if let Err(error) = self.probe.await {
            tracing::error!(%error, "the probe listener failed");
        }
        tracing::info!("stopped");
    }
}

fn address(listener: &TcpListener) -> std::io::Result<SocketAddr> {
    listener.local_addr()
}

/// The TLS of the listeners.
struct ListenerTls {
    api: Option<Arc<Tls>>,
    admin: Option<Arc<Tls>>,
}

impl ListenerTls {
    fn load(config: &Config) -> std::io::Result<Self> {
        let load = |field, files: &Option<TlsFiles>| files.as_ref().map(|files| Tls::load(field, files).map(Arc::new)).transpose();
        Ok(Self { api: load("listen.tls.api", &config.tls.api)?, admin: load("listen.tls.admin", &config.tls.admin)? })
    }
}

fn serve(name: &'static str, listener: TcpListener, router: axum::Router, stop: &CancellationToken) -> JoinHandle<usize> {
    tokio::spawn(listen::serve_router(listener, router, listen::Options::new(name), stop.clone()))
}

/// What can be known of a configuration without starting: whether the broker's settings can work, and the files that it names.
///
/// # Errors
/// The first that would keep a sidecar from starting here.
pub async fn check(config: &Config) -> Result<(), StartError> {
    if let BrokerConfig::Kafka(keys) = &config.broker {
        kafka::KafkaBroker::check(keys.clone(), kafka::KafkaOptions::default())?;
    }
    crate::api::check_tokens(&config.services)?;
    Guard::new(&config.control)?;
    ListenerTls::load(config)?;
    crate::control::check_pinned(config).await?;
    Ok(())
}

fn open_broker(config: &Config) -> Result<Arc<dyn Broker>, StartError> {
    Ok(match &config.broker {
        BrokerConfig::Embedded { path } => embedded::EmbeddedBroker::open(embedded::EmbeddedConfig {
            max_record_bytes: config.limits.record_bytes,
            ..embedded::EmbeddedConfig::new(path)
        })?,
        BrokerConfig::Kafka(keys) => kafka::KafkaBroker::open(
            keys.clone(),
            kafka::KafkaOptions { record_bytes: config.limits.record_bytes, ..kafka::KafkaOptions::default() },
        )?,
    })
}

/// Keeps the probes and the gauges of the process true.
async fn watch(health: Health, metrics: Metrics, broker: Arc<dyn Broker>, control: Control, stop: CancellationToken) {
    const PERIOD: Duration = Duration::from_millis(250);
    let heartbeat = health.watch("runtime", Duration::from_secs(20));
    let mut table = control.table();
    let mut ready = control.ready();
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        heartbeat.beat();
        let broker_state = broker.health().map_err(|error| error.to_string());
        metrics.process().broker_up.set(u64::from(broker_state.is_ok()));
        health.set(Condition::Broker, broker_state);
        let generation = table.borrow_and_update().as_ref().map(|table| table.generation);
        metrics.process().table_generation.set(generation.unwrap_or_default());
        metrics.process().table_refused.set(u64::from(control.refused().is_some()));
        let settled = *ready.borrow_and_update();
        // A mesh without a table is ready: it can publish, and waits for its first `apply`.
        let state = match (settled, control.waiting()) {
            (true, _) => Ok(()),
            (false, reason) => Err(reason.unwrap_or_else(|| "the routing table is being read".to_owned())),
        };
        if state.is_ok() {
            health.set(Condition::Started, Ok(()));
        }
        health.set(Condition::Table, state);
        tokio::select! {
            _ = ticks.tick() => {}
            Ok(()) = table.changed() => {}
            Ok(()) = ready.changed() => {}
            () = stop.cancelled() => return,
        }
    }
}
