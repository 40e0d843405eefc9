//! Whether the process is started, ready and alive: what the probes answer. Written by whoever knows, read by the probe listener.
//!
//! Invariant: being alive depends on heartbeats of this process alone, never on the broker or the service: a restart would not bring them back.
//! Invariant: what has started stays started.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// What must hold for the sidecar to be ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// The start is over: a table is loaded, the producer is there and the listeners are open.
    Started,
    /// A routing table is in force.
    Table,
    /// The broker can be reached.
    Broker,
    /// The sidecar does not drain.
    Serving,
}

impl Condition {
    /// The word in the probe's answer.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Table => "table",
            Self::Broker => "broker",
            Self::Serving => "serving",
        }
    }
}

/// Something that is missing.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Missing {
    /// The condition, or `heartbeat` for a part of the process that stands still.
    pub condition: &'static str,
    /// Why it does not hold, for people.
    pub reason: String,
}

/// The state that the probes tell. Cheap to clone; clones are the same state.
#[derive(Clone, Debug)]
pub struct Health(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What does not hold, and why.
    missing: BTreeMap<Condition, String>,
    beats: BTreeMap<u64, Watched>,
    next: u64,
}

#[derive(Debug)]
struct Watched {
    name: String,
    limit: Duration,
    /// Milliseconds since the health's begin.
    last: Arc<AtomicU64>,
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl Health {
    /// At the start: alive, not started, with neither table nor broker.
    pub fn new() -> Self {
        let missing = [
            (Condition::Started, "the sidecar starts"),
            (Condition::Table, "no routing table was loaded yet"),
            (Condition::Broker, "the broker was not reached yet"),
        ];
        let missing = missing.into_iter().map(|(condition, reason)| (condition, reason.to_owned())).collect();
        Self(Arc::new(Inner { began: Instant::now(), state: Mutex::new(State { missing, beats: BTreeMap::new(), next: 0 }) }))
    }

    /// Says that a condition holds, or why it does not. Not per record: takes a lock.
    pub fn set(&self, condition: Condition, state: Result<(), String>) {
        let mut guard = self.lock();
        match state {
            Ok(()) => {
                guard.missing.remove(&condition);
            }
            // What has started stays started: the start-up probe is over for good.
            Err(_) if condition == Condition::Started && !guard.missing.contains_key(&condition) => {}
            Err(reason) => {
                guard.missing.insert(condition, reason);
            }
        }
    }

    /// Watches a part of the process that must come by at least once within `limit`, until the heartbeat is dropped. `name` is for people.
    pub fn watch(&self, name: impl Into<String>, limit: Duration) -> Heartbeat {
        let last = Arc::new(AtomicU64::new(self.now_ms()));
        let mut guard = self.lock();
        let id = guard.next;
        guard.next += 1;
        guard.beats.insert(id, Watched { name: name.into(), limit, last: last.clone() });
        drop(guard);
        Heartbeat { id, health: self.clone(), last }
    }

    /// What keeps the sidecar from having started; empty once it has.
    pub fn not_started(&self) -> Vec<Missing> {
        self.missing(|condition| condition == Condition::Started)
    }

    /// What keeps the sidecar from being ready; empty if it is.
    pub fn not_ready(&self) -> Vec<Missing> {
        self.missing(|_| true)
    }

    /// The parts of the process that stand still; empty if it is alive.
    pub fn not_alive(&self) -> Vec<Missing> {
        let now = self.now_ms();
        let still = |watched: &Watched| {
            let age = Duration::from_millis(now.saturating_sub(watched.last.load(Ordering::Relaxed)));
            let reason = || format!("{} did not come by for {} s; the limit is {} s", watched.name, age.as_secs(), watched.limit.as_secs());
            (age > watched.limit).then(|| Missing { condition: "heartbeat", reason: reason() })
        };
        self.lock().beats.values().filter_map(still).collect()
    }

    fn missing(&self, which: impl Fn(Condition) -> bool) -> Vec<Missing> {
        let guard = self.lock();
        let missing = guard.missing.iter().filter(|(condition, _)| which(**condition));
        missing.map(|(condition, reason)| Missing { condition: condition.as_str(), reason: reason.clone() }).collect()
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The heartbeat of a part of the process. It is no longer watched when this is dropped.
#[derive(Debug)]
pub struct Heartbeat {
    id: u64,
    health: Health,
    last: Arc<AtomicU64>,
}

impl Heartbeat {
    /// Says that the part is alive. Costs a look at the clock and a store.
    pub fn beat(&self) {
        self.last.store(self.health.now_ms(), Ordering::Relaxed);
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.health.lock().beats.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(missing: Vec<Missing>) -> Vec<&'static str> {
        missing.into_iter().map(|missing| missing.condition).collect()
    }

    #[test]
    fn is_ready_when_nothing_is_missing() {
        let health = Health::new();
        assert_eq!(words(health.not_ready()), ["started", "table", "broker"]);
        assert_eq!(words(health.not_started()), ["started"]);
        for condition in [Condition::Started, Condition::Table, Condition::Broker] {
            health.set(condition, Ok(()));
        }
        assert!(health.not_ready().is_empty() && health.not_started().is_empty());
        health.set(Condition::Broker, Err("127.0.0.1:9092 refuses".into()));
        health.set(Condition::Serving, Err("drains".into()));
        health.set(Condition::Started, Err("again?".into()));
        assert_eq!(words(health.not_ready()), ["broker", "serving"]);
        assert!(health.not_started().is_empty(), "what has started stays started");
    }

    #[tokio::test(start_paused = true)]
    async fn is_alive_while_all_hearts_beat() {
        let health = Health::new();
        let one = health.watch("the loop of price", Duration::from_secs(10));
        let other = health.watch("the runtime", Duration::from_secs(30));
        tokio::time::advance(Duration::from_secs(9)).await;
        one.beat();
        tokio::time::advance(Duration::from_secs(9)).await;
        assert_eq!(health.not_alive(), []);
        tokio::time::advance(Duration::from_secs(9)).await;
        let [missing] = health.not_alive().try_into().unwrap();
        assert_eq!(missing.reason, "the loop of price did not come by for 18 s; the limit is 10 s");
        drop(one);
        assert_eq!(health.not_alive(), []);
        drop(other);
        tokio::time::advance(Duration::from_secs(99)).await;
        assert_eq!(health.not_alive(), []);
    }
}
