//! The metrics of one route.

use std::{
    collections::HashMap,
    ops::Deref,
    sync::{Arc, Mutex},
    time::Duration,
};

use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};

use super::{Durations, Families, Labels, Level, Seconds, Sizes, lock};
use crate::{
    outcome::{Disposition, Outcome},
    status::RouteState,
};

/// What happens on a route. Cheap to clone; clones are the same handles.
#[derive(Clone, Debug)]
pub struct RouteMetrics(Arc<RouteHandles>);

/// The handles behind [`RouteMetrics`].
#[derive(Debug)]
pub struct RouteHandles {
    /// From the call of the handler to its answer.
    pub delivery_duration: Durations,
    /// How many records went with each call of a route with batches.
    pub batch_size: Sizes,
    /// Outcomes that name no record of their batch, or one that has its outcome already.
    pub unknown_outcomes: Counter,
    /// Outcomes of records whose key, or partition, has a failed record before them in the same batch.
    pub outcomes_behind: Counter,
    /// Commits that were made.
    pub commits: Counter,
    /// Commits that failed.
    pub commit_failures: Counter,
    /// How long a commit takes.
    pub commit_duration: Durations,
    /// Changes of the partitions owned here.
    pub rebalances: Counter,
    /// Answers that came after their partition was given away, and were dropped.
    pub late_acknowledgements: Counter,
    /// Leases of a service that fetches (`deliver: pull`, `stream`) that ended without an answer.
    pub expired_leases: Counter,
    /// Outcomes that such a service gave after its lease had ended.
    pub late_outcomes: Counter,
    /// Partitions owned here.
    pub partitions: Level,
    /// Records behind.
    pub lag_records: Level,
    /// Age of the oldest record that is not complete.
    pub lag_seconds: Seconds,
    /// Deliveries at the service now.
    pub in_flight: Gauge,
    /// How many calls may be at the service.
    pub concurrency_limit: Level,
    /// How long the watermark has not moved, although there is work.
    pub watermark_stall_seconds: Seconds,
    /// Bytes of records fetched and not complete.
    pub queue_bytes: Level,
    /// Records that would be delivered again if the sidecar died now: delivered, and not recorded by a commit.
    pub replay_records: Level,
    /// Records that were handed over to retry topics.
    pub retried: Counter,
    /// Records that were put into park topics.
    pub parked: Counter,
    /// Records in park topics.
    pub parked_records: Level,
    /// Those of them whose attempts are used up.
    pub exhausted_records: Level,
    /// Keys of which records wait in retry or park topics.
    pub waiting_keys: Level,
    /// How long until the next record in a retry topic is due.
    pub next_retry_seconds: Seconds,
    breaker: Level,
    deliveries: [Counter; OUTCOMES.len()],
    ends: [Counter; ENDS.len()],
    states: [Level; STATES.len()],
    labels: Labels,
    service: Arc<str>,
    dispositions: Family<Labels, Counter>,
    /// Ends that are not among [`ENDS`], until the route is gone (`None`).
    further: Mutex<Option<HashMap<(Disposition, &'static str), Counter>>>,
}

/// The state of a breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Deliveries go through.
    Closed,
    /// Deliveries wait.
    Open,
}

/// The outcomes, in the order of [`outcome_index`].
const OUTCOMES: [&str; 5] = ["reply", "ignore", "retry", "reject", "no_service"];

fn outcome_index(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Reply(_) => 0,
        Outcome::Ignore => 1,
        Outcome::Retry { .. } => 2,
        Outcome::Reject { .. } => 3,
        Outcome::NoService { .. } => 4,
    }
}

/// The ends that have a counter from the start, so that a rate over them begins at zero.
const ENDS: [(Disposition, &str); 12] = [
    (Disposition::Forwarded, ""),
    (Disposition::Ignored, "status"),
    (Disposition::Ignored, "empty"),
    (Disposition::Void, ""),
    (Disposition::Filtered, ""),
    (Disposition::Expired, ""),
    (Disposition::DeadLettered, "attempts"),
    (Disposition::DeadLettered, "status"),
    (Disposition::DeadLettered, "expression"),
    (Disposition::DeadLettered, "hops"),
    (Disposition::DeadLettered, "reply"),
    (Disposition::DeadLettered, "schema"),
];

const STATES: [(RouteState, &str); 8] = [
    (RouteState::Joining, "joining"),
    (RouteState::Running, "running"),
    (RouteState::WaitingForService, "waiting_for_service"),
    (RouteState::WaitingForBroker, "waiting_for_broker"),
    (RouteState::WaitingForTopic, "waiting_for_topic"),
    (RouteState::Stopped, "stopped"),
    (RouteState::Paused, "paused"),
    (RouteState::Draining, "draining"),
];

impl Deref for RouteMetrics {
    type Target = RouteHandles;

    fn deref(&self) -> &RouteHandles {
        &self.0
    }
}

impl RouteMetrics {
    pub(super) fn new(families: &Families, route: &Arc<str>, service: &Arc<str>) -> Self {
        let labels: Labels = vec![("route", route.clone()), ("service", service.clone())];
        let f = families;
        Self(Arc::new(RouteHandles {
            delivery_duration: f.delivery_duration.get_or_create_owned(&labels),
            batch_size: f.batch_size.get_or_create_owned(&labels),
            unknown_outcomes: f.unused_outcomes.get_or_create_owned(&with(&labels, "reason", "unknown")),
            outcomes_behind: f.unused_outcomes.get_or_create_owned(&with(&labels, "reason", "behind_failure")),
            commits: f.commits.get_or_create_owned(&with(&labels, "result", "ok")),
            commit_failures: f.commits.get_or_create_owned(&with(&labels, "result", "failed")),
            commit_duration: f.commit_duration.get_or_create_owned(&labels),
            rebalances: f.rebalances.get_or_create_owned(&labels),
            late_acknowledgements: f.late.get_or_create_owned(&labels),
            expired_leases: f.expired_leases.get_or_create_owned(&labels),
            late_outcomes: f.late_outcomes.get_or_create_owned(&labels),
            partitions: f.partitions.get_or_create_owned(&labels),
            lag_records: f.lag_records.get_or_create_owned(&labels),
            lag_seconds: f.lag_seconds.get_or_create_owned(&labels),
            in_flight: f.in_flight.get_or_create_owned(&labels),
            concurrency_limit: f.concurrency_limit.get_or_create_owned(&labels),
            watermark_stall_seconds: f.stall.get_or_create_owned(&labels),
            queue_bytes: f.queue_bytes.get_or_create_owned(&labels),
            replay_records: f.replay_records.get_or_create_owned(&labels),
            retried: f.aside.get_or_create_owned(&with(&labels, "to", "retry")),
            parked: f.aside.get_or_create_owned(&with(&labels, "to", "park")),
            parked_records: f.parked_records.get_or_create_owned(&labels),
            exhausted_records: f.exhausted_records.get_or_create_owned(&labels),
            waiting_keys: f.waiting_keys.get_or_create_owned(&labels),
            next_retry_seconds: f.next_retry.get_or_create_owned(&labels),
            breaker: f.breaker.get_or_create_owned(&labels),
            deliveries: OUTCOMES.map(|outcome| f.deliveries.get_or_create_owned(&with(&labels, "outcome", outcome))),
            ends: ENDS.map(|(disposition, reason)| f.dispositions.get_or_create_owned(&end(&labels, disposition, reason))),
            states: STATES.map(|(_, state)| f.state.get_or_create_owned(&with(&labels, "state", state))),
            labels,
            service: service.clone(),
            dispositions: f.dispositions.clone(),
            further: Mutex::new(Some(HashMap::new())),
        }))
    }

    pub(super) fn service(&self) -> &Arc<str> {
        &self.service
    }

    /// Takes everything of the route out of the families.
    pub(super) fn remove(&self, f: &Families) {
        let labels = &self.labels;
        f.delivery_duration.remove(labels);
        f.commit_duration.remove(labels);
        f.batch_size.remove(labels);
        for reason in ["unknown", "behind_failure"] {
            f.unused_outcomes.remove(&with(labels, "reason", reason));
        }
        f.rebalances.remove(labels);
        f.late.remove(labels);
        f.expired_leases.remove(labels);
        f.late_outcomes.remove(labels);
        f.partitions.remove(labels);
        f.lag_records.remove(labels);
        f.lag_seconds.remove(labels);
        f.in_flight.remove(labels);
        f.concurrency_limit.remove(labels);
        f.stall.remove(labels);
        f.queue_bytes.remove(labels);
        f.replay_records.remove(labels);
        f.parked_records.remove(labels);
        f.exhausted_records.remove(labels);
        f.waiting_keys.remove(labels);
        f.next_retry.remove(labels);
        for to in ["retry", "park"] {
            f.aside.remove(&with(labels, "to", to));
        }
        f.breaker.remove(labels);
        for result in ["ok", "failed"] {
            f.commits.remove(&with(labels, "result", result));
        }
        for outcome in OUTCOMES {
            f.deliveries.remove(&with(labels, "outcome", outcome));
        }
        for (_, state) in STATES {
            f.state.remove(&with(labels, "state", state));
        }
        let further = lock(&self.further).take().unwrap_or_default();
        for (disposition, reason) in further.into_keys().chain(ENDS) {
            f.dispositions.remove(&end(labels, disposition, reason));
        }
    }
}

impl RouteHandles {
    /// Counts a delivery's outcome, and how long it took.
    pub fn delivered(&self, outcome: &Outcome, duration: Duration) {
        if let Some(counter) = self.deliveries.get(outcome_index(outcome)) {
            counter.inc();
        }
        self.delivery_duration.observe(duration);
    }

    /// Counts records that ended. `reason` is a word of the program (`status`, `empty`, `attempts`, `expression`, `hops`, `reply`, …); empty
    /// where the disposition says it all. A pair that the route has from the start costs an addition, another one a lock.
    pub fn ended(&self, disposition: Disposition, reason: &'static str, records: u64) {
        let known = ENDS.iter().zip(&self.ends).find(|(pair, _)| **pair == (disposition, reason));
        if let Some((_, counter)) = known {
            counter.inc_by(records);
            return;
        }
        if let Some(further) = lock(&self.further).as_mut() {
            let counter = || self.dispositions.get_or_create_owned(&end(&self.labels, disposition, reason));
            further.entry((disposition, reason)).or_insert_with(counter).inc_by(records);
        }
    }

    /// Sets the state of the breaker.
    pub fn breaker(&self, state: BreakerState) {
        self.breaker.set(match state {
            BreakerState::Closed => 0,
            BreakerState::Open => 1,
        });
    }

    /// Sets the state of the route.
    pub fn state(&self, state: RouteState) {
        for ((of, _), level) in STATES.iter().zip(&self.states) {
            level.set(u64::from(*of == state));
        }
    }
}

fn with(labels: &Labels, name: &'static str, value: &str) -> Labels {
    labels.iter().cloned().chain([(name, value.into())]).collect()
}

fn end(labels: &Labels, disposition: Disposition, reason: &str) -> Labels {
    with(&with(labels, "disposition", disposition.as_str()), "reason", reason)
}
