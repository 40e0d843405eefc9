//! Asking the instances that may own partitions of a route, until what is wanted is done or the time for it is over.
//!
//! Who owns what may change at any moment, so everybody who reports the route is asked, and asked again a while after an answer.
//!
//! Invariant: an instance that was asked is not asked again before it has answered.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until};

use super::{report, state::Shared};

/// How long owners may take where the request does not say.
const WAIT: Duration = Duration::from_secs(30);
/// The longest that they may take.
const LONGEST: Duration = Duration::from_secs(10 * 60);
/// How often it is looked who may own a partition.
const LOOK: Duration = Duration::from_millis(250);

/// The owners of a route's partitions, of whom something is asked; `F` is the asking of one.
pub(super) struct Owners<'a, F> {
    shared: &'a Shared,
    route: &'a str,
    wait: Duration,
    deadline: Instant,
    asked: FuturesUnordered<F>,
    /// Who was asked and has not answered.
    silent: BTreeSet<String>,
    /// Who has answered, and is asked again at the time.
    idle: BTreeMap<String, Instant>,
    look: Instant,
}

impl<'a, F, A> Owners<'a, F>
where
    F: Future<Output = (String, A)>,
{
    /// Nobody is asked yet. `wait_ms` is how long it may take at most, 0 the usual time.
    pub(super) fn new(shared: &'a Arc<Shared>, route: &'a str, wait_ms: u64) -> Self {
        let wait = if wait_ms == 0 { WAIT } else { Duration::from_millis(wait_ms).min(LONGEST) };
        let now = Instant::now();
        let (asked, silent, idle) = Default::default();
        Self { shared, route, wait, deadline: now + wait, asked, silent, idle, look: now }
    }

    /// How long it may take.
    pub(super) fn wait(&self) -> Duration {
        self.wait
    }

    /// Whether there is time left.
    pub(super) fn in_time(&self) -> bool {
        Instant::now() < self.deadline
    }

    /// Asks those who may own something and are to be asked now; `at` is told whom, and until when. False: there is nobody who could be.
    pub(super) fn ask(&mut self, mut at: impl FnMut(&str, Instant) -> F) -> bool {
        let now = Instant::now();
        if now >= self.look {
            self.look = now + LOOK;
        }
        self.idle.retain(|_, again| now < *again);
        let owners = report::instances_of(self.shared, self.route);
        let somebody = !owners.is_empty() || !self.silent.is_empty();
        for owner in owners.into_iter().filter(|owner| !self.idle.contains_key(owner)) {
            if self.silent.insert(owner.clone()) {
                self.asked.push(at(&owner, self.deadline));
            }
        }
        somebody
    }

    /// The next answer; `None` when it is time to look again who is to be asked. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<(String, A)> {
        tokio::select! {
            Some((owner, answer)) = self.asked.next(), if !self.asked.is_empty() => {
                self.silent.remove(&owner);
                self.idle.insert(owner.clone(), Instant::now() + LOOK);
                Some((owner, answer))
            }
            () = sleep_until(self.look.min(self.deadline)) => None,
        }
    }

    /// Who was asked and has not answered, in words; `None` if all have. `trouble` is what else went wrong, or empty.
    pub(super) fn silence(&self, trouble: &str) -> Option<String> {
        let names: Vec<&str> = self.silent.iter().map(String::as_str).collect();
        let trouble = besides(trouble);
        let wait = self.wait.as_secs_f64();
        let said = || format!("no answer within {wait} s from instance {}{trouble}: is it alive? See `mesh-ctl status`", names.join(", "));
        (!names.is_empty()).then(said)
    }
}

/// What else went wrong, in brackets, or nothing.
pub(super) fn besides(trouble: &str) -> String {
    if trouble.is_empty() { String::new() } else { format!(" ({trouble})") }
}
