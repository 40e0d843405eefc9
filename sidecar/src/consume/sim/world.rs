//! What all parts of a simulation share: the time, the chance, the log of events, what is wrong now, and the ledger.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::{chance::Chance, ledger::Ledger, plan::Plan};
use crate::record::TopicPartition;

/// See the module. Everything runs on one thread: the lock is never contended, and never held across an await.
///
/// Whoever waits is woken by a `Notify`, in the order of waiting; a `watch` would wake its receivers in an order of its own choice.
#[derive(Debug)]
pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) start: Instant,
    state: Mutex<State>,
    /// Something that a consumer should look at changed.
    pub(super) change: Notify,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) chance: Chance,
    pub(super) ledger: Ledger,
    pub(super) outage: bool,
    /// Nothing goes wrong any more.
    pub(super) over: bool,
    /// The lowest offset that the broker still has.
    pub(super) lows: BTreeMap<TopicPartition, i64>,
    log: Option<Vec<String>>,
    broken: Option<String>,
}

impl World {
    pub(super) fn new(plan: Plan, keep_log: bool) -> Arc<Self> {
        let state = State {
            chance: Chance::of(plan.seed, 0x11fe),
            ledger: Ledger::new(&plan),
            outage: false,
            over: false,
            lows: BTreeMap::new(),
            log: keep_log.then(Vec::new),
            broken: None,
        };
        Arc::new(Self { plan, start: Instant::now(), state: Mutex::new(state), change: Notify::new() })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("one thread")
    }

    pub(super) fn changed(&self) {
        self.change.notify_waiters();
    }

    /// Writes down what happened.
    pub(super) fn note(&self, what: impl FnOnce() -> String) {
        let at = self.start.elapsed();
        if let Some(log) = &mut self.state().log {
            log.push(format!("{:>10.3} {}", at.as_secs_f64(), what()));
        }
    }

    /// Asks the ledger; what it finds wrong is the end of the run.
    pub(super) fn judge(&self, ask: impl FnOnce(&mut Ledger) -> Result<(), String>) {
        let mut state = self.state();
        if let Err(wrong) = ask(&mut state.ledger)
            && state.broken.is_none()
        {
            state.broken = Some(wrong);
        }
    }

    pub(super) fn broken(&self) -> Option<String> {
        self.state().broken.clone()
    }

    pub(super) fn take_log(&self) -> Vec<String> {
        self.state().log.take().unwrap_or_default()
    }

    /// Whether something goes wrong now that does so once in so many times.
    pub(super) fn goes_wrong(&self, times: u64) -> bool {
        let mut state = self.state();
        !state.over && state.chance.once_in(times)
    }

    pub(super) fn draw<T>(&self, draw: impl FnOnce(&mut Chance) -> T) -> T {
        draw(&mut self.state().chance)
    }

    /// Waits up to so long, as chance has it.
    pub(super) async fn dawdle(&self, most_ms: u64) {
        let pause = self.draw(|chance| chance.below(most_ms + 1));
        if pause > 0 {
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    /// Waits until the broker can be reached.
    pub(super) async fn reachable(&self) {
        loop {
            let changed = self.change.notified();
            if !self.state().outage {
                return;
            }
            changed.await;
        }
    }
}

/// One life of a process: from its start to its end or death.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) process: usize,
    pub(super) number: usize,
    frozen: AtomicBool,
    turned: Notify,
    /// Its session at the group is over, and it does not know yet.
    evicted: AtomicBool,
    /// Its number in the group.
    pub(super) member: AtomicU64,
    pub(super) dead: AtomicBool,
    /// It drains; the next one may run already.
    pub(super) ending: AtomicBool,
    /// Its service is not there.
    pub(super) away: AtomicBool,
}

impl Life {
    pub(super) fn new(process: usize, number: usize) -> Arc<Self> {
        Arc::new(Self {
            process,
            number,
            frozen: AtomicBool::new(false),
            turned: Notify::new(),
            evicted: AtomicBool::new(false),
            member: AtomicU64::new(0),
            dead: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            away: AtomicBool::new(false),
        })
    }

    pub(super) fn freeze(&self, on: bool) {
        self.frozen.store(on, Ordering::Relaxed);
        self.turned.notify_waiters();
    }

    pub(super) fn evict(&self) {
        self.evicted.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_evicted(&self) -> bool {
        self.evicted.load(Ordering::Relaxed)
    }

    pub(super) fn rejoins(&self) {
        self.evicted.store(false, Ordering::Relaxed);
    }

    /// Waits until it stands still, or moves.
    async fn is_frozen(&self, frozen: bool) {
        loop {
            let turned = self.turned.notified();
            if self.frozen.load(Ordering::Relaxed) == frozen {
                return;
            }
            turned.await;
        }
    }

    /// Waits while it stands still.
    pub(super) async fn moves(&self) {
        self.is_frozen(false).await;
    }

    /// Runs something that stands still with the process.
    pub(super) async fn live(self: Arc<Self>, what: impl Future<Output = ()>) {
        let mut what = std::pin::pin!(what);
        loop {
            self.moves().await;
            tokio::select! {
                biased;
                () = self.is_frozen(true) => {}
                () = what.as_mut() => return,
            }
        }
    }
}

impl std::fmt::Display for Life {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "p{}.{}", self.process, self.number)
    }
}
