//! The routes of this process: which run, by the table in force. Floor 4.
//!
//! Each route is one task (`route`); the [`Supervisor`] owns them all. When the table changes, a route that did not change is not touched; one
//! whose consumer can stay as it is takes the change in place; one whose group, sources or order changed is drained and started anew.
//!
//! Invariant: two loops never run with one consumer group in this process, so that a swap reorders nothing.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::Duration,
};

use mesh_routing::{Deliver, Route};
use tokio::time::Instant;
use tokio::{
    sync::{mpsc, watch},
    task::{Id, JoinError, JoinSet},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    broker::Broker,
    command::{self as commands, Command},
    config::Config,
    deliver::{Leaf, desk::Desks},
    pause::PauseWatch,
    status::{Board, RouteState, RouteStatus},
    table::{ActiveTable, TableWatch},
    telemetry::{metrics::Metrics, trace::Tracer},
};

mod aside;
mod batch;
mod command;
mod commit;
mod dispatch;
mod flow;
mod intake;
mod look_up;
mod outbox;
mod park;
mod reply;
mod report;
#[cfg(test)]
mod retry_tests;
mod returning;
mod route;
mod scan;
#[cfg(test)]
mod sim;
pub mod subscription;
#[cfg(test)]
mod tests;
mod transaction;

use route::{Parts, RouteLoop};

#[cfg(test)]
use crate::outcome::test_delivery;

/// The pause before a route that could not start, or that failed, is started again.
const RESTART: Duration = Duration::from_secs(1);
/// How long a loop runs at least before a new table starts it anew: so its consumer has joined its group. For one that leaves while it joins the others
/// wait until its session is over, and of tables that follow each other closely only the last one counts.
const SETTLE: Duration = Duration::from_secs(5);

/// What routes need.
#[derive(Clone)]
pub struct Context {
    /// The configuration.
    pub config: Arc<Config>,
    /// The broker.
    pub broker: Arc<dyn Broker>,
    /// Where routes post their state.
    pub board: Board,
    /// The desks of routes whose service fetches.
    pub desks: Desks,
    /// Metrics.
    pub metrics: Metrics,
    /// Traces.
    pub tracer: Tracer,
    /// The routes that are paused.
    pub paused: PauseWatch,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// Runs the routes of the table in force.
#[derive(Debug)]
pub struct Supervisor {
    context: Context,
    table: TableWatch,
    commands: mpsc::Receiver<Command>,
    wanted: BTreeMap<Arc<str>, Arc<Route>>,
    applied_ms: i64,
    running: HashMap<Arc<str>, Running>,
    tasks: JoinSet<()>,
    names: HashMap<Id, Arc<str>>,
    /// When routes are looked at again: those that could not start, that failed, or that just began.
    restarts: HashMap<Arc<str>, Instant>,
    /// Why routes cannot start, as it was logged.
    complaints: HashMap<Arc<str>, String>,
    /// The tasks of the leaves.
    leaves: TaskTracker,
    /// The configured instance, or a name for this run: what transactions are named after.
    identity: String,
}

#[derive(Debug)]
struct Running {
    route: Arc<Route>,
    change: watch::Sender<Arc<Route>>,
    commands: mpsc::Sender<Command>,
    stop: CancellationToken,
    stopping: bool,
    started: Instant,
    task: Id,
}

impl Supervisor {
    /// A supervisor of nothing yet.
    pub fn new(context: Context, table: TableWatch, commands: mpsc::Receiver<Command>) -> Self {
        // Without an instance nobody can take the transactions of a process that died: they end by their timeout.
        let identity = context.config.instance.clone().unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
        Self {
            context,
            identity,
            table,
            commands,
            wanted: BTreeMap::new(),
            applied_ms: 0,
            running: HashMap::new(),
            tasks: JoinSet::new(),
            names: HashMap::new(),
            restarts: HashMap::new(),
            complaints: HashMap::new(),
            leaves: TaskTracker::new(),
        }
    }

    /// Runs until `stop`, then drains every route. Not cancel-safe: a dropped supervisor drops its routes without a drain.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let table = self.table.borrow_and_update().clone();
            if let Some(table) = table {
                self.take(&table);
            }
            let restart = self.restarts.values().min().copied();
            tokio::select! {
                changed = self.table.changed() => if changed.is_err() { break },
                Some(command) = self.commands.recv() => self.command(command),
                Some(ended) = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => self.ended(ended),
                () = sleep_until(restart) => self.restart(Instant::now()),
                () = stop.cancelled() => break,
            }
        }
        // From here on nobody is obeyed: whoever asks learns it.
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            command.not_owner();
        }
        self.running.values().for_each(|running| running.stop.cancel());
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a route failed while it drained");
            }
        }
        // A call that hangs beyond the drain's deadline ends with the runtime: nobody waits for its answer any more.
        self.leaves.close();
        if tokio::time::timeout(RESTART, self.leaves.wait()).await.is_err() {
            tracing::warn!(calls = self.leaves.len(), "calls of services were still open at the end of the drain");
        }
    }

    /// Hands a command to its route. One that does not run owns nothing; and a route that has not taken its last commands yet is asked again
    /// later.
    fn command(&mut self, command: Command) {
        let handed = match self.running.get(&command.route).filter(|running| !running.stopping) {
            Some(running) => running.commands.try_send(command).map_err(mpsc::error::TrySendError::into_inner),
            None => Err(command),
        };
        if let Err(command) = handed {
            command.not_owner();
        }
    }

    /// Takes a table: what is wanted, and what has to be done for it.
    fn take(&mut self, table: &Arc<ActiveTable>) {
        self.applied_ms = table.applied_ms;
        let config = &self.context.config;
        self.wanted = config
            .services
            .iter()
            .flat_map(|service| table.compiled.routes_of(&service.name))
            .map(|route| (route.name.clone(), route.clone()))
            .collect();
        let mut names: Vec<Arc<str>> = self.wanted.keys().chain(self.running.keys()).chain(self.restarts.keys()).cloned().collect();
        names.sort_unstable();
        names.dedup();
        // The new is subscribed before the old is dropped.
        names.sort_by_key(|name| self.running.contains_key(name));
        names.into_iter().for_each(|name| self.reconcile(&name));
    }

    /// Brings one route from what runs to what is wanted.
    fn reconcile(&mut self, name: &Arc<str>) {
        let wanted = self.wanted.get(name).cloned();
        match (wanted, self.running.get_mut(name)) {
            (None, None) => {
                self.restarts.remove(name);
                self.gone(name);
            }
            (Some(route), None) if !self.restarts.contains_key(name) => self.start(route),
            // Its end brings us back here.
            (_, Some(running)) if running.stopping => {}
            (Some(route), Some(running)) if *running.route == *route => {}
            (Some(route), Some(running)) if in_place(&running.route, &route) => {
                running.route = route.clone();
                running.change.send_replace(route);
            }
            (Some(route), Some(running)) if running.route.group != route.group => {
                running.stop.cancel();
                self.start(route);
            }
            (Some(_), Some(running)) if running.started.elapsed() < SETTLE => {
                self.restarts.insert(name.clone(), running.started + SETTLE);
            }
            (_, Some(running)) => {
                running.stopping = true;
                running.stop.cancel();
            }
            (Some(_), None) => {}
        }
    }

    fn start(&mut self, route: Arc<Route>) {
        let (change, changes) = watch::channel(route.clone());
        let (commands, ordered) = mpsc::channel(commands::ROOM);
        let stop = CancellationToken::new();
        match self.make(&route, changes, ordered, stop.clone()) {
            Ok(made) => {
                let name = route.name.clone();
                self.complaints.remove(&name);
                tracing::info!(route = %name, service = %route.service, group = %route.group, "route starts");
                let task = self.tasks.spawn(made.run()).id();
                self.names.insert(task, name.clone());
                self.running.insert(name, Running { route, change, commands, stop, stopping: false, started: Instant::now(), task });
            }
            Err(reason) => {
                if self.complaints.insert(route.name.clone(), reason.clone()).is_none_or(|before| before != reason) {
                    tracing::error!(route = %route.name, service = %route.service, reason, "the route cannot start: trying again");
                }
                self.context.board.post(RouteStatus {
                    route: route.name.clone(),
                    service: route.service.clone(),
                    state: RouteState::WaitingForService,
                    reason,
                    ..RouteStatus::default()
                });
                self.restarts.insert(route.name.clone(), Instant::now() + RESTART);
            }
        }
    }

    fn make(
        &self,
        route: &Arc<Route>,
        changes: watch::Receiver<Arc<Route>>,
        commands: mpsc::Receiver<Command>,
        stop: CancellationToken,
    ) -> Result<RouteLoop, String> {
        let context = &self.context;
        let metrics = context.metrics.route(&route.name, &route.service);
        let leaf = match route.deliver {
            Deliver::Push => {
                let service = context.config.service(&route.service);
                let app = service.and_then(|service| service.app.as_ref()).ok_or_else(|| {
                    let service = &route.service;
                    format!("service {service} has no `app` in this sidecar's config: set services[].app, such as http://127.0.0.1:8080")
                })?;
                Leaf::push(app, context.config.limits.record_bytes, metrics.unknown_outcomes.clone(), &self.leaves)?
            }
            Deliver::Stream | Deliver::Pull => Leaf::desk(&context.desks, route.clone(), &metrics),
        };
        let parts = Parts {
            broker: context.broker.clone(),
            leaf,
            metrics,
            tracer: context.tracer.clone(),
            board: context.board.clone(),
            route: changes,
            commands,
            paused: context.paused.clone(),
            applied_ms: self.applied_ms,
            instance: context.config.instance.clone(),
            transactional_id: format!("{}/{}/{}", context.config.mesh, route.name, self.identity),
            buffer_bytes: context.config.limits.buffer_bytes,
            drain_timeout: context.config.limits.drain_timeout,
            stop,
            seed: RandomState::new().hash_one(0u8),
        };
        RouteLoop::new(parts).map_err(|error| error.to_string())
    }

    fn ended(&mut self, ended: Result<(Id, ()), JoinError>) {
        let id = match &ended {
            Ok((id, ())) => *id,
            Err(error) => error.id(),
        };
        let Some(name) = self.names.remove(&id) else { return };
        if let Err(error) = &ended {
            tracing::error!(route = %name, %error, "the route failed: it is started again");
            self.restarts.insert(name.clone(), Instant::now() + RESTART);
        }
        // A loop that was replaced by one with another group is not the one that runs under this name.
        if self.running.get(&name).is_some_and(|running| running.task == id) {
            self.running.remove(&name);
            self.reconcile(&name);
        }
    }

    fn restart(&mut self, now: Instant) {
        let due: Vec<Arc<str>> = self.restarts.iter().filter(|(_, at)| **at <= now).map(|(name, _)| name.clone()).collect();
        for name in due {
            self.restarts.remove(&name);
            self.reconcile(&name);
        }
    }

    fn gone(&mut self, name: &str) {
        self.complaints.remove(name);
        self.context.board.remove(name);
        self.context.metrics.remove_route(name);
    }
}

/// Whether a loop can take the change as it runs: its consumer, its lanes and its leaf stay as they are.
fn in_place(old: &Route, new: &Route) -> bool {
    old.group == new.group
        && old.from == new.from
        && old.service == new.service
        && old.deliver == new.deliver
        && old.order == new.order
        && old.guarantee == new.guarantee
        && old.tiers() == new.tiers()
        && old.on_exhausted == new.on_exhausted
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
