//! The board on which routes post their state, for `mesh-ctl status`, readiness and metrics. Floor 0.
//!
//! Invariant: a route posts when its state changes and at most a few times a second otherwise; never per record.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::outcome::Disposition;

/// What a route does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RouteState {
    /// It joins its consumer group.
    #[default]
    Joining,
    /// It delivers, or there is nothing to deliver.
    Running,
    /// No service is there.
    WaitingForService,
    /// The broker is not there.
    WaitingForBroker,
    /// A topic that it reads or writes does not exist.
    WaitingForTopic,
    /// A partition stands still until somebody decides: records were deleted before they were processed (`on_gap: stop`),
    /// or the attempts of one are used up (`on_exhausted: stop`).
    Stopped,
    /// Somebody paused it: it delivers nothing.
    Paused,
    /// It drains.
    Draining,
}

/// The state of a route in this process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteStatus {
    /// The route.
    pub route: Arc<str>,
    /// Its service.
    pub service: Arc<str>,
    /// What it does.
    pub state: RouteState,
    /// Why it waits; names the service, topic or broker. Empty when it runs, unless records were deleted before they were processed.
    pub reason: String,
    /// When it began to wait, in milliseconds since 1970-01-01 UTC; 0 when it runs.
    pub waiting_since_ms: i64,
    /// Partitions owned here.
    pub partitions: u32,
    /// Records behind, over the partitions owned.
    pub lag_records: u64,
    /// When the broker was asked for that, in milliseconds since 1970-01-01 UTC; 0 before the first answer for all partitions owned.
    pub lag_measured_ms: i64,
    /// Age of the oldest record that is not complete, in seconds.
    pub lag_seconds: f64,
    /// Whether its breaker is open.
    pub breaker_open: bool,
    /// Deliveries at the service now.
    pub in_flight: u64,
    /// Records that ended since the start, by disposition.
    pub dispositions: BTreeMap<Disposition, u64>,
    /// Records in the park topics of the partitions owned here.
    pub parked_records: u64,
    /// Those of them whose attempts are used up, until somebody releases them.
    pub exhausted_records: u64,
    /// Keys of which records wait in retry or park topics.
    pub waiting_keys: u64,
    /// When the next record in a retry topic is due, in milliseconds since 1970-01-01 UTC; 0 if none waits.
    pub next_retry_ms: i64,
}

/// All routes of this process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Board(Arc<Mutex<BTreeMap<Arc<str>, RouteStatus>>>);

impl Board {
    /// Posts the state of a route, in place of what it posted before.
    pub fn post(&self, status: RouteStatus) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(status.route.clone(), status);
    }

    /// Takes a route that is gone off the board.
    pub fn remove(&self, route: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(route);
    }

    /// All routes, by name.
    pub fn routes(&self) -> Vec<RouteStatus> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}
