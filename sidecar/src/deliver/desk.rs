//! Desks: where a service fetches deliveries itself (`deliver: stream` and `deliver: pull`).
//!
//! A route's loop puts deliveries on its desk; the API takes them and brings the answers. Whoever takes a delivery holds it on a *lease*, as
//! long as the route's timeout, under an id of its own: [`Delivery::id`] of what [`Desk::take`] gives names the lease.
//!
//! Invariant: a delivery that was taken is answered once: by its taker, or when its lease ends, as an attempt.
//! Invariant: an answer that comes after its lease ended changes nothing, also when the record is leased again: the new lease has another id.
//! Invariant: a delivery that lies on the desk untaken, or is given back, costs no attempt and waits without end.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_routing::Route;
use prometheus_client::metrics::counter::Counter;
use tokio::{
    sync::{Notify, mpsc},
    time::{Duration, Instant},
};

use crate::outcome::{Answer, Delivery, Outcome};

/// How many ended leases are remembered, to tell a late answer from one that means nothing.
const ENDED: usize = 10_000;

/// The desks of all routes of this process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Desks(Arc<Mutex<HashMap<Arc<str>, Arc<Desk>>>>);

impl Desks {
    /// The desk of a route that runs here with `deliver: stream` or `pull`.
    pub fn get(&self, route: &str) -> Option<Arc<Desk>> {
        lock(&self.0).get(route).cloned()
    }

    /// Opens the desk of a route, in place of one of its name. `answers` must hold as many answers as deliveries are ever out.
    pub(crate) fn open(&self, route: Arc<Route>, answers: mpsc::Sender<Answer>, counters: Counters) -> Arc<Desk> {
        let name = route.name.clone();
        // A random start makes an id of an earlier desk, or of an earlier run of the process, find nothing. Below 2^53, for JavaScript.
        let state = State { next_lease: RandomState::new().hash_one(0) >> 12, ..State::default() };
        let (arrived, leased) = (Notify::new(), Notify::new());
        let desk = Arc::new(Desk { route, answers, counters, state: Mutex::new(state), arrived, leased });
        lock(&self.0).insert(name, desk.clone());
        desk
    }

    /// Closes a desk: takers get nothing more, and answers to what they took are still accepted.
    pub(crate) fn close(&self, desk: &Arc<Desk>) {
        lock(&desk.state).closed = true;
        desk.arrived.notify_waiters();
        let mut desks = lock(&self.0);
        if desks.get(&desk.route.name).is_some_and(|open| Arc::ptr_eq(open, desk)) {
            desks.remove(&desk.route.name);
        }
    }
}

/// What a desk counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counters {
    /// Leases that ended without an answer.
    pub(crate) expired: Counter,
    /// Answers that came after their lease ended.
    pub(crate) late: Counter,
}

/// What became of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It is the delivery's outcome.
    Taken,
    /// Its lease ended before: the record is delivered again, or was.
    Late,
    /// No such delivery waits for an answer: it was answered, or never was.
    Unknown,
}

/// The desk of one route.
#[derive(Debug)]
pub struct Desk {
    route: Arc<Route>,
    answers: mpsc::Sender<Answer>,
    counters: Counters,
    state: Mutex<State>,
    /// A delivery was put on the desk, or the desk closed.
    arrived: Notify,
    /// A delivery was taken: there is a new deadline.
    leased: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Delivery>,
    /// What was taken, by the id of its lease.
    taken: HashMap<u64, Lease>,
    /// The same by the end of the lease.
    ends: BTreeSet<(Instant, u64)>,
    /// Leases that ended without an answer, the newest of them.
    ended: BTreeSet<u64>,
    next_lease: u64,
    next_stream: u64,
    /// How often the loop took back what lay here: what was out at that time may belong to a partition that is given away.
    withdrawals: u64,
    attached: usize,
    last_taken: Option<Instant>,
    closed: bool,
}

/// A delivery that somebody holds.
#[derive(Debug)]
struct Lease {
    until: Instant,
    /// The stream that it was sent on; 0 for none.
    stream: u64,
    /// [`State::withdrawals`] when it began.
    era: u64,
    delivery: Delivery,
}

impl State {
    fn end(&mut self, id: u64) -> Option<Lease> {
        let lease = self.taken.remove(&id)?;
        self.ends.remove(&(lease.until, id));
        Some(lease)
    }

    fn remember_ended(&mut self, id: u64) {
        self.ended.insert(id);
        if self.ended.len() > ENDED {
            self.ended.pop_first();
        }
    }
}

impl Desk {
    /// The service that owns the route.
    pub fn service(&self) -> &Arc<str> {
        &self.route.service
    }

    /// Whether it is a `pull` route (else `stream`).
    pub fn is_pull(&self) -> bool {
        matches!(self.route.deliver, mesh_routing::Deliver::Pull)
    }

    /// The route's concurrency: a sensible first credit.
    pub fn concurrency(&self) -> usize {
        self.route.concurrency
    }

    /// The consumer group.
    pub fn group(&self) -> &str {
        &self.route.group
    }

    /// Tells the desk that a subscriber is attached, until the guard is dropped: status says so.
    pub fn attach(self: &Arc<Self>) -> Attachment {
        lock(&self.state).attached += 1;
        Attachment(self.clone())
    }

    /// A number for a stream, by which what is taken on it can be told from others' ([`Desk::give_back_after`]).
    pub fn stream(&self) -> u64 {
        let mut state = lock(&self.state);
        state.next_stream += 1;
        state.next_stream
    }

    /// Takes up to `max` deliveries, and waits up to `wait` for the first one. Empty if none came. `None`: the route is gone or drains.
    /// Cancel-safe: nothing is taken by a future that is dropped before it is ready.
    pub async fn take(&self, max: usize, wait: Duration) -> Option<Vec<Delivery>> {
        self.take_on(0, max, wait).await
    }

    /// [`Desk::take`] for a stream.
    pub async fn take_on(&self, stream: u64, max: usize, wait: Duration) -> Option<Vec<Delivery>> {
        let deadline = Instant::now() + wait;
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            match self.try_take(max, stream) {
                Some(taken) if taken.is_empty() => {}
                ready => return ready,
            }
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                return self.try_take(max, stream);
            }
        }
    }

    fn try_take(&self, max: usize, stream: u64) -> Option<Vec<Delivery>> {
        let mut state = lock(&self.state);
        if state.closed {
            return None;
        }
        let (now, era) = (Instant::now(), state.withdrawals);
        state.last_taken = Some(now);
        let count = max.min(state.waiting.len());
        let mut taken = Vec::with_capacity(count);
        for _ in 0..count {
            let Some(delivery) = state.waiting.pop_front() else { break };
            let id = state.next_lease;
            state.next_lease += 1;
            let until = now + delivery.route.timeout;
            state.ends.insert((until, id));
            taken.push(Delivery { id, ..delivery.clone() });
            state.taken.insert(id, Lease { until, stream, era, delivery });
        }
        let more = !state.waiting.is_empty();
        drop(state);
        if !taken.is_empty() {
            self.leased.notify_one();
        }
        if more {
            // One notification may stand for many deliveries.
            self.arrived.notify_one();
        }
        Some(taken)
    }

    /// Answers deliveries, by the ids of their leases. One word for each, in order.
    pub fn answer(&self, answers: Vec<Answer>) -> Vec<Heard> {
        let mut state = lock(&self.state);
        let heard = answers.into_iter().map(|answer| match state.end(answer.id) {
            Some(lease) => match self.answers.try_send(Answer { id: lease.delivery.id, outcome: answer.outcome }) {
                Ok(()) => Heard::Taken,
                // The loop is gone, and the record with it to whoever reads it next.
                Err(_) => Heard::Late,
            },
            None if state.ended.contains(&answer.id) => Heard::Late,
            None => Heard::Unknown,
        });
        let heard: Vec<Heard> = heard.collect();
        self.counters.late.inc_by(heard.iter().filter(|heard| **heard == Heard::Late).count() as u64);
        heard
    }

    /// The taker went away without answering: these are delivered again, and count an attempt.
    pub fn abandon(&self, ids: Vec<u64>) {
        let reason = || "the subscriber went away without an answer".to_owned();
        self.answer(ids.into_iter().map(|id| Answer { id, outcome: Outcome::Retry { reason: reason(), after: None } }).collect());
    }

    /// These never reached their taker: they lie on the desk again, in front and in order, and no attempt is counted.
    pub fn give_back(&self, ids: &[u64]) {
        let mut state = lock(&self.state);
        let mut back: Vec<(u64, Lease)> = ids.iter().filter_map(|id| state.end(*id).map(|lease| (*id, lease))).collect();
        // The order in which they were taken is the order of their ids.
        back.sort_unstable_by_key(|(id, _)| *id);
        for (_, lease) in back.into_iter().rev() {
            if lease.era == state.withdrawals && !state.closed {
                state.waiting.push_front(lease.delivery);
            } else {
                // Its partition may be on its way to another member: the loop decides.
                let outcome = Outcome::NoService { reason: "the taker went away before it got the delivery".to_owned(), after: None };
                // There is room for every delivery; a loop that is gone needs no answer.
                let _ = self.answers.try_send(Answer { id: lease.delivery.id, outcome });
            }
        }
        drop(state);
        self.arrived.notify_one();
    }

    /// What a stream was sent after this delivery never reached its reader: as [`Desk::give_back`]. A stream or a delivery of another desk
    /// gives nothing back.
    pub fn give_back_after(&self, stream: u64, last: u64) {
        let ids: Vec<u64> = {
            let state = lock(&self.state);
            // The reader has seen an id that this desk gave, or none of it means anything here.
            if stream == 0 || stream > state.next_stream || last >= state.next_lease {
                return;
            }
            state.taken.iter().filter(|(id, lease)| lease.stream == stream && **id > last).map(|(id, _)| *id).collect()
        };
        self.give_back(&ids);
    }

    /// Puts deliveries on the desk.
    pub(crate) fn put(&self, deliveries: impl IntoIterator<Item = Delivery>) {
        lock(&self.state).waiting.extend(deliveries);
        self.arrived.notify_one();
    }

    /// Takes back what nobody took.
    pub(crate) fn withdraw(&self) -> Vec<u64> {
        let mut state = lock(&self.state);
        state.withdrawals += 1;
        state.waiting.drain(..).map(|delivery| delivery.id).collect()
    }

    /// Ends leases when their time is over, for ever. Cancel-safe.
    pub(crate) async fn end_leases(&self) {
        loop {
            let next = {
                let mut state = lock(&self.state);
                let now = Instant::now();
                while let Some(&(until, id)) = state.ends.first()
                    && until <= now
                {
                    let Some(lease) = state.end(id) else { continue };
                    state.remember_ended(id);
                    self.counters.expired.inc();
                    let reason = format!("no answer within {:?}", lease.delivery.route.timeout);
                    // There is room for every delivery; a loop that is gone needs no answer.
                    let _ = self.answers.try_send(Answer { id: lease.delivery.id, outcome: Outcome::Retry { reason, after: None } });
                }
                state.ends.first().map(|(until, _)| *until)
            };
            let leased = self.leased.notified();
            match next {
                // A lease that is taken meanwhile may end earlier: a table was swapped.
                Some(until) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(until) => {}
                        () = leased => {}
                    }
                }
                None => leased.await,
            }
        }
    }

    /// Why deliveries lie on the desk: nobody fetches them. `None` if somebody does, or there are none.
    pub(crate) fn unattended(&self) -> Option<String> {
        let state = lock(&self.state);
        let polled = state.last_taken.is_some_and(|last| last.elapsed() < self.route.timeout.max(Duration::from_secs(30)));
        if state.waiting.is_empty() || state.attached > 0 || (self.is_pull() && polled) {
            return None;
        }
        let (name, service) = (&self.route.name, &self.route.service);
        Some(match self.is_pull() {
            true => format!("service {service} does not poll route {name}"),
            false => format!("service {service} is not attached to route {name}"),
        })
    }
}

/// Keeps a subscriber on the books.
#[derive(Debug)]
pub struct Attachment(Arc<Desk>);

impl Drop for Attachment {
    fn drop(&mut self) {
        lock(&self.0.state).attached -= 1;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
