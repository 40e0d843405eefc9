//! What the tasks of the control plane share.
//!
//! Invariant: one writer each: `read` writes the log and `progress`, `adopt` writes `local` and `table`, `report` writes `peers`.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak, atomic::AtomicI64},
};

use mesh_proto::v1;
use mesh_routing::{CompiledTable, channel::Member};
use tokio::{
    sync::{Notify, Semaphore, watch},
    task::spawn_blocking,
};
use tokio_util::sync::CancellationToken;

use super::{
    commands::Waiting,
    history,
    log::Log,
    report::Peers,
    reset::OperationError,
    rollout::{Count, Rollout},
    snapshot::{Snapshot, SnapshotError},
};
pub(super) use crate::record::now_ms;
use crate::{
    broker::Broker,
    command::Commands,
    config::Config,
    pause::Pauses,
    status::Board,
    table::{ActiveTable, TableOrigin},
};

/// How many may read topics at once for a plan, an explanation or a trace; others wait.
const READINGS: usize = 2;

/// How far the control topic was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// The offset after the last one that was read.
    pub(super) next_offset: i64,
    /// The newest generation.
    pub(super) head: u64,
    /// Whether that is a canary that was aborted.
    pub(super) over: bool,
    /// Whether the end was reached once.
    pub(super) caught_up: bool,
}

/// What this instance made of the log.
#[derive(Clone, Debug, Default)]
pub(super) struct Local {
    /// The table in force here.
    pub(super) table: Option<Arc<Taken>>,
    /// The newest generation that was judged: adopted, refused, or left to those that it chooses.
    pub(super) judged: u64,
    /// Whether that was a canary that was aborted.
    pub(super) judged_over: bool,
    /// The generation that this instance ought to run.
    pub(super) target: u64,
    /// Why that one is refused; `None` if it is not.
    pub(super) refused: Option<String>,
    /// The digests of generations that some instance ought to run, as far as their records were read here.
    pub(super) digests: BTreeMap<u64, String>,
    /// The newest generation, if it is a canary and its record can be read.
    pub(super) rollout: Option<Arc<Rollout>>,
}

impl Local {
    pub(super) fn generation(&self) -> u64 {
        self.table.as_ref().map_or(0, |table| table.snapshot.generation)
    }
}

/// A table that was taken into force.
#[derive(Debug)]
pub(super) struct Taken {
    /// The table; of one that the config pins without a place in the mesh's history.
    pub(super) snapshot: Arc<Snapshot>,
    /// Where it came from.
    pub(super) origin: TableOrigin,
}

impl Taken {
    /// The same in the API's words. CPU-heavy for large tables.
    ///
    /// # Errors
    /// If the table is not what its envelope says.
    pub(super) fn response(&self) -> Result<v1::GetTableResponse, SnapshotError> {
        let Self { snapshot, origin } = self;
        Ok(v1::GetTableResponse {
            generation: snapshot.generation,
            digest: snapshot.digest.clone(),
            json: snapshot.table()?,
            applied_ms: snapshot.applied_ms,
            origin: origin_of(*origin).into(),
            entry: (*origin != TableOrigin::Pinned).then(|| history::entry(snapshot, String::new())),
        })
    }
}

/// What the tasks share.
pub(super) struct Shared {
    pub(super) broker: Arc<dyn Broker>,
    pub(super) config: Arc<Config>,
    pub(super) board: Board,
    /// This instance's name.
    pub(super) instance: String,
    /// The services that it serves.
    pub(super) services: Vec<String>,
    /// Its labels.
    pub(super) labels: HashMap<String, String>,
    /// When it began, in milliseconds since 1970-01-01 UTC.
    pub(super) started_ms: i64,
    /// Until when somebody watches the state of the mesh, in milliseconds since 1970-01-01 UTC.
    pub(super) watched_until_ms: AtomicI64,
    /// When this instance told the others so, in the same way.
    pub(super) watch_told_ms: AtomicI64,
    /// Until when somebody may look at the state of the mesh again, in milliseconds since 1970-01-01 UTC.
    pub(super) looked_until_ms: AtomicI64,
    /// That somebody looks.
    pub(super) looked: Notify,
    /// Cancelled when somebody asks this process to drain.
    pub(super) drain: CancellationToken,
    log: Mutex<Log>,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) local: watch::Sender<Local>,
    pub(super) table: watch::Sender<Option<Arc<ActiveTable>>>,
    /// The routes that are paused.
    pub(super) pauses: watch::Sender<Arc<Pauses>>,
    pub(super) ready: watch::Sender<bool>,
    /// What is waited for, by subject.
    waiting: Mutex<BTreeMap<&'static str, String>>,
    pub(super) peers: Mutex<Peers>,
    /// Dead letters since the newest canary was taken.
    pub(super) canary: Mutex<Count>,
    /// To the routes of this process.
    pub(super) commands: Commands,
    /// To other instances, until they answer.
    pub(super) waiting_commands: Waiting,
    /// The whole of the table in force, as long as somebody looks at it.
    whole: Mutex<Weak<CompiledTable>>,
    /// Who compiles that; the others wait for it.
    compiling: Semaphore,
    /// One apply at a time here; what others do is settled by the log.
    pub(super) applying: Semaphore,
    /// Those who read topics for a plan, an explanation or a trace: some at once, since each keeps some MiB.
    pub(super) reading: Semaphore,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("instance", &self.instance).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(broker: Arc<dyn Broker>, config: Arc<Config>, board: Board, commands: Commands) -> Self {
        let instance = config.instance.clone().unwrap_or_else(|| {
            let service = config.services.first().map_or("sidecar", |service| &*service.name);
            let random = uuid::Uuid::new_v4().simple().to_string();
            format!("{service}-{}", random.get(..8).unwrap_or_default())
        });
        Self {
            log: Mutex::new(Log::new(&config.mesh)),
            services: config.services.iter().map(|service| service.name.to_string()).collect(),
            labels: config.labels.clone().into_iter().collect(),
            broker,
            config,
            board,
            instance,
            started_ms: now_ms(),
            watched_until_ms: AtomicI64::new(0),
            watch_told_ms: AtomicI64::new(0),
            looked_until_ms: AtomicI64::new(0),
            looked: Notify::new(),
            drain: CancellationToken::new(),
            progress: watch::Sender::default(),
            local: watch::Sender::default(),
            table: watch::Sender::default(),
            pauses: watch::Sender::default(),
            ready: watch::Sender::default(),
            waiting: Mutex::default(),
            peers: Mutex::default(),
            canary: Mutex::default(),
            commands,
            waiting_commands: Waiting::default(),
            whole: Mutex::default(),
            compiling: Semaphore::new(1),
            applying: Semaphore::new(1),
            reading: Semaphore::new(READINGS),
        }
    }

    /// This instance, as a canary's selector looks at it.
    pub(super) fn member(&self) -> Member<'_> {
        Member { instance: &self.instance, services: &self.services, labels: &self.labels }
    }

    /// Uses the log, shortly.
    pub(super) fn log<T>(&self, use_it: impl FnOnce(&mut Log) -> T) -> T {
        use_it(&mut self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The table in force, with the routes of all services: compiled when somebody asks, and kept as long as somebody holds it. Cancel-safe.
    ///
    /// # Errors
    /// If it has routes of other services that this version cannot read.
    pub(super) async fn whole(&self) -> Result<Option<Arc<CompiledTable>>, OperationError> {
        let _one = self.compiling.acquire().await.map_err(|error| OperationError::Refused(error.to_string()))?;
        let Some(active) = self.table.borrow().clone() else { return Ok(None) };
        if active.compiled.is_whole() {
            return Ok(Some(active.compiled.clone()));
        }
        let known = self.whole.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(known) = known.filter(|known| known.digest == active.compiled.digest) {
            return Ok(Some(known));
        }
        // Of the same table, or of one that came this moment: either was in force while it was asked for.
        let Some(table) = self.local.borrow().table.clone() else { return Ok(None) };
        let read = move || {
            let Snapshot { generation, digest, .. } = &*table.snapshot;
            let text = table.snapshot.table().map_err(|error| format!("the table in force cannot be read: {error}"))?;
            mesh_routing::load_stored(&format!("generation {generation}"), &text, digest)
                .map_err(|faults| format!("the table in force has routes of other services that this version cannot read:\n{faults}"))
        };
        let whole = spawn_blocking(read).await.map_err(|error| error.to_string()).flatten().map_err(OperationError::Refused)?;
        let whole = Arc::new(whole);
        *self.whole.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&whole);
        Ok(Some(whole))
    }

    /// Says what is waited for; `None` when it is over. Logs changes.
    pub(super) fn wait_for(&self, subject: &'static str, reason: Option<String>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match reason {
            Some(reason) if waiting.get(subject) == Some(&reason) => {}
            Some(reason) => {
                tracing::warn!(subject, reason, "the control plane waits");
                waiting.insert(subject, reason);
            }
            None => {
                if waiting.remove(subject).is_some() {
                    tracing::info!(subject, "the control plane goes on");
                }
            }
        }
    }

    /// Whether this is waited for.
    pub(super) fn waits_for(&self, subject: &'static str) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).contains_key(subject)
    }

    /// What is waited for, in words.
    pub(super) fn waiting_reasons(&self) -> Vec<String> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reasons: Vec<String> = waiting.values().cloned().collect();
        drop(waiting);
        if let Err(error) = self.broker.health() {
            let reason = format!("broker: {error}");
            if !reasons.iter().any(|known| known.contains(&error.detail)) {
                reasons.insert(0, reason);
            }
        }
        reasons
    }
}

/// An origin in the API's words.
pub(super) fn origin_of(origin: TableOrigin) -> v1::TableOrigin {
    match origin {
        TableOrigin::Mesh => v1::TableOrigin::Mesh,
        TableOrigin::Cache => v1::TableOrigin::Cache,
        TableOrigin::Pinned => v1::TableOrigin::Pinned,
    }
}

/// Pauses between tries: doubling, bounded.
#[derive(Debug)]
pub(super) struct Backoff(std::time::Duration);

impl Backoff {
    const FIRST: std::time::Duration = std::time::Duration::from_millis(100);
    const LONGEST: std::time::Duration = std::time::Duration::from_secs(5);

    pub(super) fn new() -> Self {
        Self(Self::FIRST)
    }

    /// Waits, and waits longer the next time. Cancel-safe.
    pub(super) async fn pause(&mut self) {
        let pause = self.0;
        self.0 = (pause * 2).min(Self::LONGEST);
        tokio::time::sleep(pause).await;
    }
}
