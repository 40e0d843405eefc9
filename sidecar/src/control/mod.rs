//! The control plane: learns, verifies, caches and swaps routing tables, and reports the state of the mesh. Floor 4.
//!
//! The table lives in the broker, in `__mesh.control`; see the module `log` for who wins when two propose at once.
//!
//! ```text
//! __mesh.control ──▶ reader ──▶ log ──▶ adopter ──▶ table (a watch that routes follow) ──▶ copy on disk
//!        ▲                       │
//!        └── apply ◀─────────────┘          __mesh.status ◀──▶ status: what each instance says of itself
//!                                          __mesh.commands ◀──▶ commands: what only the owner of a partition can do
//! ```
//!
//! Invariant: a sidecar is ready once it has read the log to its end, or runs its copy on disk, or a pinned file.
//! Invariant: whatever is wrong with a new table, the last good one stays in force, and status says why.
//! Invariant: once keys are trusted (`control.trusted_keys`), no table is taken that none of them signed, but a pinned one.
//! Invariant: nothing here needs the broker at start; what is waited for is visible in status.

mod adopt;
mod apply;
mod cache;
mod commands;
mod doctor;
mod drain;
mod history;
mod insight;
mod lag;
mod letters;
mod log;
mod marks;
mod originals;
mod owners;
mod pause;
mod range;
mod read;
mod redrive;
mod redriven;
mod release;
mod replay;
mod report;
mod reset;
mod rollout;
mod snapshot;
mod state;
mod tail;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod topic_changes;
mod topic_list;
mod topics;
mod trust;

use std::{path::PathBuf, sync::Arc, time::Duration};

use mesh_proto::v1;
use mesh_routing::Faults;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    adopt::Pinned,
    state::{Shared, Taken},
};
pub use self::{
    apply::{Applied, ApplyError, ApplyOptions, CanaryOptions, Checked},
    reset::OperationError,
    topics::RouteBacklog,
    trust::TrustError,
};
use crate::{
    broker::Broker,
    command::Commands,
    config::Config,
    pause::PauseWatch,
    status::Board,
    table::{TableOrigin, TableWatch},
};

/// How long a start waits for the broker before it takes the copy on disk.
const CACHE_AFTER: Duration = Duration::from_secs(2);

/// Why the control plane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The file that pins the table cannot be read.
    #[error("the pinned table {path} cannot be read: {error}; correct `table.file`, or remove it to take the table from the mesh", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file that pins the table has faults: all of them, one a line.
    #[error("the pinned table {path} has faults:\n{faults}", path = path.display())]
    Faults {
        /// The file.
        path: PathBuf,
        /// The faults.
        faults: Faults,
    },
    /// The file pins the table of another mesh.
    #[error("the pinned table {path} is of mesh {found:?}, and this sidecar belongs to mesh {expected:?}", path = path.display())]
    Mesh {
        /// The file.
        path: PathBuf,
        /// The mesh in the file.
        found: String,
        /// The mesh in the config.
        expected: String,
    },
    /// The table cannot be packed.
    #[error("the pinned table {path} cannot be packed: {error}", path = path.display())]
    Pack {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: String,
    },
    /// A task failed.
    #[error("the pinned table could not be compiled: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Whether the file that pins the table, if there is one, can be used.
///
/// # Errors
/// What is wrong with it.
pub async fn check_pinned(config: &Config) -> Result<(), StartError> {
    match &config.table {
        Some(path) => Pinned::load(path, &config.mesh).await.map(drop),
        None => Ok(()),
    }
}

/// The control plane of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Control(Arc<Shared>);

/// Owns the tasks of the control plane.
#[derive(Debug)]
pub struct ControlHandle {
    control: Control,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Control {
    /// Starts the control plane. Returns at once, but for a pinned table, which is read and compiled first.
    ///
    /// `commands` reaches the routes of this process. `shutdown` ends its tasks; [`ControlHandle::close`] awaits them.
    ///
    /// # Errors
    /// Only for a pinned table that cannot be used. A broker that is away is waited for.
    pub async fn start(
        broker: Arc<dyn Broker>,
        config: Arc<Config>,
        board: Board,
        commands: Commands,
        shutdown: CancellationToken,
    ) -> Result<ControlHandle, StartError> {
        let pinned = match &config.table {
            Some(path) => Some(Pinned::load(path, &config.mesh).await?),
            None => None,
        };
        let shared = Arc::new(Shared::new(broker, config, board, commands));
        pause::load(&shared).await;
        let stop = shutdown.child_token();
        let tasks = TaskTracker::new();
        tasks.spawn(read::run(shared.clone(), stop.clone()));
        match pinned {
            Some(pinned) => tasks.spawn(adopt::run_pinned(shared.clone(), pinned, stop.clone())),
            None => tasks.spawn(adopt::run(shared.clone(), stop.clone())),
        };
        tasks.spawn(pause::keep(shared.clone(), stop.clone()));
        tasks.spawn(rollout::watch(shared.clone(), stop.clone()));
        tasks.spawn(report::read(shared.clone(), stop.clone()));
        tasks.spawn(commands::run(shared.clone(), stop.clone()));
        tasks.spawn(report::publish(shared.clone(), stop.clone()));
        tasks.close();
        Ok(ControlHandle { control: Self(shared), tasks, stop })
    }

    /// The table in force here.
    pub fn table(&self) -> TableWatch {
        self.0.table.subscribe()
    }

    /// The routes that are paused.
    pub fn paused(&self) -> PauseWatch {
        self.0.pauses.subscribe()
    }

    /// Whether a table, or the knowledge that there is none, is there: `None` when ready, else what is waited for.
    pub fn waiting(&self) -> Option<String> {
        if *self.0.ready.borrow() {
            return None;
        }
        let reasons = self.0.waiting_reasons();
        Some(if reasons.is_empty() { "the routing table is being read from the mesh".into() } else { reasons.join("; ") })
    }

    /// Becomes `true` once, when the control plane is ready; see [`Control::waiting`].
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.0.ready.subscribe()
    }

    /// Why the newest table of the mesh is refused here; `None` if it is not.
    pub fn refused(&self) -> Option<String> {
        self.0.local.borrow().refused.clone()
    }

    /// The name of this instance: the configured one, or `<service>-<random>`.
    pub fn instance(&self) -> &str {
        &self.0.instance
    }

    /// The state of the mesh as far as this sidecar knows: this instance as it is now, the others as they reported last.
    pub fn status(&self) -> v1::GetStatusResponse {
        report::mesh(&self.0)
    }

    /// The same, for somebody who asks again and again: all instances report more often for a while.
    pub async fn watched_status(&self) -> v1::GetStatusResponse {
        commands::watch(&self.0).await;
        report::mesh(&self.0)
    }

    /// A table: the one in force here, or that of a generation. `None` if there is none.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub async fn get_table(&self, generation: Option<u64>) -> Result<Option<v1::GetTableResponse>, String> {
        let here = self
            .0
            .local
            .borrow()
            .table
            .clone()
            .filter(|here| generation.is_none_or(|wanted| wanted > 0 && here.snapshot.generation == wanted));
        let winner = generation.and_then(|wanted| self.0.log(|log| log.winner(wanted).cloned()).map(|winner| (wanted, winner)));
        let config = self.0.config.clone();
        let read = move || match (here, winner) {
            (Some(here), _) => here.response().map(Some),
            (None, Some((generation, winner))) => {
                let snapshot = Arc::new(snapshot::Snapshot::read(&winner, &config.mesh, generation)?);
                let mut response = Taken { snapshot: snapshot.clone(), origin: TableOrigin::Mesh }.response()?;
                // One that is not trusted can be read, and says so.
                if let (Some(entry), Err(error)) = (&mut response.entry, snapshot.verify(&config.control.trusted_keys)) {
                    entry.refused = error.to_string();
                }
                Ok(Some(response))
            }
            (None, None) => Ok(None),
        };
        let read = tokio::task::spawn_blocking(read).await.map_err(|error| error.to_string())?;
        read.map_err(|error: snapshot::SnapshotError| error.to_string())
    }
}

impl ControlHandle {
    /// The operations.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The table in force here.
    pub fn table(&self) -> TableWatch {
        self.control.table()
    }

    /// The routes that are paused.
    pub fn paused(&self) -> PauseWatch {
        self.control.paused()
    }

    /// Becomes `true` once, when the control plane is ready.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.control.ready()
    }

    /// Ends all tasks: this instance's status is taken back from the mesh, within 2 s. Call it before the broker is closed.
    pub async fn close(self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }
}

impl Drop for ControlHandle {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
