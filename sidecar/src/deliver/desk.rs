//! Desks: where a service fetches deliveries itself (`deliver: stream` and `deliver: pull`).
//!
//! A route's loop puts deliveries on its desk; the API takes them and brings the answers.
//!
//! Invariant: a delivery that was taken is answered once: by its taker, or when its lease (the route's timeout) ends, as an attempt.
//! Invariant: a delivery that lies on the desk untaken costs no attempt and waits without end.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_routing::Route;
use tokio::{
    sync::{Notify, mpsc},
    time::{Duration, Instant},
};

use crate::outcome::{Answer, Delivery, Outcome};

/// The desks of all routes of this process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Desks(Arc<Mutex<HashMap<Arc<str>, Arc<Desk>>>>);

impl Desks {
    /// The desk of a route that runs here with `deliver: stream` or `pull`.
    pub fn get(&self, route: &str) -> Option<Arc<Desk>> {
        lock(&self.0).get(route).cloned()
    }

    /// Opens the desk of a route, in place of one of its name. `answers` must hold as many answers as deliveries are ever out.
    pub(crate) fn open(&self, route: Arc<Route>, answers: mpsc::Sender<Answer>) -> Arc<Desk> {
        let name = route.name.clone();
        let desk = Arc::new(Desk { route, answers, state: Mutex::default(), arrived: Notify::new(), leased: Notify::new() });
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

/// The desk of one route.
#[derive(Debug)]
pub struct Desk {
    route: Arc<Route>,
    answers: mpsc::Sender<Answer>,
    state: Mutex<State>,
    /// A delivery was put on the desk, or the desk closed.
    arrived: Notify,
    /// A delivery was taken: there is a new deadline.
    leased: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Delivery>,
    /// What was taken, with the end of its lease.
    taken: HashMap<u64, Instant>,
    /// The same by time; may hold ids that are answered already. All leases are equally long but for a table swap, so the order is by time.
    leases: VecDeque<(Instant, u64)>,
    attached: usize,
    last_taken: Option<Instant>,
    closed: bool,
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

    /// Takes up to `max` deliveries, and waits up to `wait` for the first one. Empty if none came. `None`: the route is gone or drains.
    /// Cancel-safe: nothing is taken by a future that is dropped before it is ready.
    pub async fn take(&self, max: usize, wait: Duration) -> Option<Vec<Delivery>> {
        let deadline = Instant::now() + wait;
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            match self.try_take(max) {
                Some(taken) if taken.is_empty() => {}
                ready => return ready,
            }
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                return self.try_take(max);
            }
        }
    }

    fn try_take(&self, max: usize) -> Option<Vec<Delivery>> {
        let mut state = lock(&self.state);
        if state.closed {
            return None;
        }
        let now = Instant::now();
        state.last_taken = Some(now);
        let count = max.min(state.waiting.len());
        let taken: Vec<Delivery> = state.waiting.drain(..count).collect();
        for delivery in &taken {
            let until = now + delivery.route.timeout;
            state.taken.insert(delivery.id, until);
            state.leases.push_back((until, delivery.id));
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

    /// Answers deliveries. One `false` for each that is not known (any more): its lease ended, or it never was.
    pub fn answer(&self, answers: Vec<Answer>) -> Vec<bool> {
        let mut state = lock(&self.state);
        answers.into_iter().map(|answer| state.taken.remove(&answer.id).is_some() && self.answers.try_send(answer).is_ok()).collect()
    }

    /// The taker went away without answering: these are delivered again, and count an attempt.
    pub fn abandon(&self, ids: Vec<u64>) {
        let reason = || "the subscriber went away without an answer".to_owned();
        self.answer(ids.into_iter().map(|id| Answer { id, outcome: Outcome::Retry { reason: reason(), after: None } }).collect());
    }

    /// Puts deliveries on the desk.
    pub(crate) fn put(&self, deliveries: impl IntoIterator<Item = Delivery>) {
        lock(&self.state).waiting.extend(deliveries);
        self.arrived.notify_one();
    }

    /// Takes back what nobody took.
    pub(crate) fn withdraw(&self) -> Vec<u64> {
        lock(&self.state).waiting.drain(..).map(|delivery| delivery.id).collect()
    }

    /// Ends leases when their time is over, for ever. Cancel-safe.
    pub(crate) async fn end_leases(&self) {
        loop {
            let next = {
                let mut state = lock(&self.state);
                let now = Instant::now();
                while let Some(&(until, id)) = state.leases.front() {
                    // An id that is leased again, after a retry, has a later entry of its own.
                    let current = state.taken.get(&id) == Some(&until);
                    if current && until > now {
                        break;
                    }
                    state.leases.pop_front();
                    if current {
                        state.taken.remove(&id);
                        let reason = format!("no answer within {:?}", self.route.timeout);
                        // There is room for every delivery; a loop that is gone needs no answer.
                        let _ = self.answers.try_send(Answer { id, outcome: Outcome::Retry { reason, after: None } });
                    }
                }
                state.leases.front().map(|(until, _)| *until)
            };
            match next {
                Some(until) => tokio::time::sleep_until(until).await,
                None => self.leased.notified().await,
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
