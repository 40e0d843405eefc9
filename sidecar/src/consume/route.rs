//! A route's loop: one task that owns everything of its route, so that nothing here is locked.
//!
//! Batches come in, each offset enters its partition's watermark, the lanes decide what may run, the leaf delivers, answers are judged,
//! publications are acknowledged, offsets complete, watermarks are committed back to back.
//!
//! Invariant: an offset completes only when its record has its disposition: replies and dead letters are acknowledged before.
//! Invariant: what belongs to an assignment that ended (another epoch) changes no offset.
//! Invariant: records that are read and not complete are bounded per partition, by number and bytes, and per route, by bytes ([`super::flow`]).
//! Invariant: a paused route hands nothing to its service; everything else goes on.
//! Invariant: before a partition is given away the loop stops delivering from it and waits for what is at the service, for a bounded time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap},
    future::{Future as _, pending, poll_fn},
    hash::{BuildHasher, DefaultHasher, Hasher as _},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use futures_util::future::BoxFuture;
use mesh_routing::{Guarantee, Route, Start};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    batch::{Gathered, OutCall},
    command::{Ordered, Releasing},
    flow::Flow,
    outbox::{Done, Outbox},
    park::{Looked, Role, Sides},
    report::{Asked, End, Measured, watch_lag},
    transaction::Transacted,
};
use crate::{
    broker::{Broker, BrokerError, BrokerErrorKind, Consumer, ConsumerConfig, Event, Revoking, StartOffset},
    command::Command,
    deliver::{
        Leaf,
        breaker::{Allowance, Breaker},
        budget::{Blame, Budget},
        limit::Limit,
    },
    lanes::{JobId, Lanes},
    mutation::{self, Mutation},
    outcome::{Answer, Delivery, Disposition},
    pause::{Pause, PauseWatch},
    record::{Record, TopicPartition, header},
    status::{Board, RouteStatus},
    telemetry::{
        metrics::RouteMetrics,
        trace::{Span, TraceContext, Tracer},
    },
    watermark::{Snapshot, Watermark},
};

/// How often lag is measured.
const LAG: Duration = Duration::from_secs(2);
/// So many records that could be handed to the service, if it had room, are a backlog.
const BEHIND: usize = 64;

/// What a route's loop needs.
pub(crate) struct Parts {
    pub(crate) broker: Arc<dyn Broker>,
    pub(crate) leaf: Leaf,
    pub(crate) metrics: RouteMetrics,
    pub(crate) tracer: Tracer,
    pub(crate) board: Board,
    /// The route; a changed one that can be swapped in place comes here.
    pub(crate) route: watch::Receiver<Arc<Route>>,
    /// When the table was applied, for `start: applied`.
    pub(crate) applied_ms: i64,
    pub(crate) instance: Option<String>,
    /// The identity of the route's transactions.
    pub(crate) transactional_id: String,
    pub(crate) buffer_bytes: usize,
    pub(crate) drain_timeout: Duration,
    /// Commands to this route.
    pub(crate) commands: mpsc::Receiver<Command>,
    /// Which routes are paused.
    pub(crate) paused: PauseWatch,
    /// Cancelled to drain.
    pub(crate) stop: CancellationToken,
    /// A number that nobody outside knows: the lanes' hashes, the ids of deliveries and the order in which what is ready is looked at follow
    /// from it. With the same one, and everything else the same, a loop does the same.
    pub(crate) seed: u64,
}

/// Hashes keys for their lanes, with a secret, so that nobody can choose keys that share a lane.
#[derive(Clone, Copy, Debug)]
pub(super) struct LaneKeys(u64);

impl BuildHasher for LaneKeys {
    type Hasher = DefaultHasher;

    fn build_hasher(&self) -> DefaultHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.0);
        hasher
    }
}

/// What ended a wait.
enum Woken {
    Event(Event),
    Answers,
    Published,
    Committed(CommitResult),
    Transacted(Transacted),
    Lag(Measured),
    Side(Event),
    Looked(Looked),
    Time,
    Changed,
    Command(Command),
    Paused,
    Stop,
}

/// How many things a wait waits for.
const SOURCES: u64 = 13;

/// A record in a lane.
pub(super) struct Job {
    pub(super) slot: u32,
    pub(super) epoch: u64,
    /// Where it completes: its offset in the slot's partition.
    pub(super) offset: i64,
    /// The key's hash: what waits for it has the same.
    pub(super) key: u64,
    pub(super) delivery: Delivery,
    /// Since when it is at the service; `None` while it waits.
    pub(super) out: Option<Instant>,
    pub(super) span: Option<Span>,
    /// The call that it went with, on a route with batches.
    pub(super) call: Option<u64>,
    /// How often in a row the service said to this record that it is not there.
    pub(super) away: u32,
    pub(super) behind: Behind,
    /// When it failed first, as [`Blame`] counts.
    pub(super) failed: Option<u64>,
    /// Why its last attempt failed.
    pub(super) failure: String,
}

impl Job {
    /// One that waits.
    pub(super) fn new(slot: u32, epoch: u64, offset: i64, key: u64, delivery: Delivery) -> Self {
        Self {
            slot,
            epoch,
            offset,
            key,
            delivery,
            out: None,
            span: None,
            call: None,
            away: 0,
            behind: Behind::Nothing,
            failed: None,
            failure: String::new(),
        }
    }
}

/// What happened before a record in its lane, while it was at the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Behind {
    /// Nothing that concerns it.
    Nothing,
    /// One failed, of a partition that is on its way out: its outcome is not used, and whoever reads it next does it again.
    Dropped,
    /// One went to a retry or park topic: its outcome is not used, and it goes to where it waits for that one.
    Aside,
}

/// A partition that was ever assigned here. The slot keeps its number, so that lanes outlive an assignment.
pub(super) struct Slot {
    pub(super) partition: TopicPartition,
    pub(super) owned: bool,
    pub(super) revoking: bool,
    pub(super) watermark: Watermark,
    pub(super) committed: i64,
    /// How many offsets had been completed at the last commit, and how many of them it had no room for.
    pub(super) recorded: u64,
    pub(super) unrecorded: u64,
    /// Records at the service, or on their way to the broker.
    pub(super) busy: usize,
    pub(super) held: bool,
    /// Offsets that the broker deleted before they were processed, from and to, before which the partition stands still.
    pub(super) gap: Option<(i64, i64)>,
    /// The newest offset + 1 at the broker, as last measured.
    pub(super) high: i64,
    /// What is left up to there is no record.
    pub(super) end: Option<End>,
    /// When the watermark last moved, or there was nothing to do.
    pub(super) moved: Instant,
    /// Of a source, or of one of the route's retry and park topics.
    pub(super) role: Role,
}

/// A revoke that waits for what is at the service.
pub(super) struct Revoke {
    pub(super) slots: Vec<u32>,
    pub(super) deadline: Instant,
    pub(super) revoking: Revoking,
}

/// See the module.
pub(crate) struct RouteLoop {
    pub(super) parts: Parts,
    pub(super) route: Arc<Route>,
    pub(super) consumer: Box<dyn Consumer>,
    pub(super) slots: Vec<Slot>,
    /// What is in memory of them.
    pub(super) flow: Flow,
    pub(super) by_partition: HashMap<TopicPartition, u32>,
    pub(super) lanes: Lanes<Job>,
    pub(super) hasher: LaneKeys,
    /// Waits so far, for their order.
    waits: u64,
    /// Deliveries that are out.
    pub(super) out: usize,
    /// Calls that are out: as many, unless the route has batches.
    pub(super) calls: usize,
    pub(super) out_calls: HashMap<u64, OutCall>,
    pub(super) gathered: Gathered,
    pub(super) breaker: Breaker,
    /// With `concurrency: adaptive`.
    pub(super) limit: Option<Limit>,
    pub(super) backoffs: BinaryHeap<Reverse<(Instant, JobId)>>,
    pub(super) outbox: Outbox,
    /// How many records may be given up.
    pub(super) budget: Budget,
    pub(super) blame: Blame,
    pub(super) sides: Sides,
    /// With `guarantee: exactly_once`: the transaction under way. Then it is the outbox's only way out, and `commit` is for the time between.
    pub(super) transaction: Option<BoxFuture<'static, Transacted>>,
    pub(super) transactional: bool,
    pub(super) commit: Option<BoxFuture<'static, CommitResult>>,
    pub(super) commit_again: Option<Instant>,
    pub(super) commit_contexts: Vec<TraceContext>,
    pub(super) lag: Option<BoxFuture<'static, Measured>>,
    /// When the last measurement of all partitions began, in milliseconds since 1970-01-01 UTC; 0 if a partition was added since.
    pub(super) lag_measured_ms: i64,
    pub(super) lag_due: Instant,
    pub(super) revoke: Option<Revoke>,
    /// Commands that are not answered yet.
    pub(super) ordered: Vec<Ordered>,
    /// Releases that are not answered yet.
    pub(super) releasing: Vec<Releasing>,
    /// Set while somebody wants nothing to be delivered.
    pub(super) paused: Option<Pause>,
    /// Draining, until this time.
    pub(super) draining: Option<Instant>,
    /// Why the last commit failed; `None` if it did not.
    pub(super) commit_failed: Option<BrokerErrorKind>,
    pub(super) broker_trouble: Option<BrokerError>,
    pub(super) service_trouble: Option<String>,
    /// The last gap that was passed, and until when it is told.
    pub(super) passed_gap: Option<(Instant, String)>,
    pub(super) joined: bool,
    pub(super) dispositions: BTreeMap<Disposition, u64>,
    pub(super) posted: RouteStatus,
    pub(super) post_due: Instant,
    pub(super) epoch: u64,
}

/// What a commit came to.
pub(super) struct CommitResult {
    /// For each partition's slot and epoch what was committed.
    pub(super) commits: Vec<(u32, u64, Snapshot)>,
    /// Partitions that were reset by it: slot, epoch, offset.
    pub(super) resets: Vec<(u32, u64, i64)>,
    pub(super) began: Instant,
    pub(super) result: Result<(), BrokerError>,
}

impl RouteLoop {
    /// Makes the loop; its consumer joins at once.
    ///
    /// # Errors
    /// If the consumer's configuration can never work.
    pub(crate) fn new(parts: Parts) -> Result<Self, BrokerError> {
        let route = parts.route.borrow().clone();
        let transactional = route.guarantee == Guarantee::ExactlyOnce;
        let consumer = parts.broker.consumer(ConsumerConfig {
            group: Some(route.group.to_string()),
            topics: route.from.clone(),
            instance: parts.instance.as_ref().map(|instance| format!("{instance}.{}", route.name)),
            start: match route.start {
                Start::Earliest => StartOffset::Earliest,
                Start::Latest => StartOffset::Latest,
                Start::Applied => StartOffset::At(parts.applied_ms),
                Start::At(time) => StartOffset::At(time),
            },
            buffer_bytes: parts.buffer_bytes,
            transactional_id: transactional.then(|| parts.transactional_id.clone()),
        })?;
        let outbox = Outbox::new(parts.broker.producer(), parts.tracer.clone(), parts.broker.system());
        let hasher = LaneKeys(parts.seed);
        let now = Instant::now();
        Ok(Self {
            budget: Budget::new(route.breaker.failures),
            blame: Blame::default(),
            breaker: Breaker::new(route.breaker.failures, route.breaker.open),
            limit: route.adaptive.map(|least| Limit::new(least, route.concurrency)),
            lanes: Lanes::with_start(hasher.hash_one(0u8) as u32),
            parts,
            route,
            consumer,
            slots: Vec::new(),
            flow: Flow::default(),
            by_partition: HashMap::new(),
            hasher,
            waits: 0,
            out: 0,
            calls: 0,
            out_calls: HashMap::new(),
            gathered: Gathered::default(),
            backoffs: BinaryHeap::new(),
            outbox,
            transaction: None,
            transactional,
            sides: Sides::default(),
            commit: None,
            commit_again: None,
            commit_contexts: Vec::new(),
            lag: None,
            lag_measured_ms: 0,
            lag_due: now,
            revoke: None,
            ordered: Vec::new(),
            releasing: Vec::new(),
            paused: None,
            draining: None,
            commit_failed: None,
            broker_trouble: None,
            service_trouble: None,
            passed_gap: None,
            joined: false,
            dispositions: BTreeMap::new(),
            posted: RouteStatus::default(),
            post_due: now,
            epoch: 0,
        })
    }

    /// Runs until it is stopped and drained.
    pub(crate) async fn run(mut self) {
        let (mut answers, mut done) = (Vec::new(), Vec::new());
        self.pause();
        loop {
            let now = Instant::now();
            self.turn(now);
            if self.drained(now) {
                break;
            }
            let wake = self.wake(now);
            match self.wait(wake, &mut answers, &mut done).await {
                Woken::Event(event) => self.on_event(event),
                Woken::Answers => answers.drain(..).for_each(|answer| self.on_answer(answer)),
                Woken::Published => done.drain(..).for_each(|done| self.on_published(done)),
                Woken::Committed(result) => self.on_committed(result),
                Woken::Transacted(result) => self.on_transacted(result),
                Woken::Lag(lag) => self.on_lag(lag),
                Woken::Side(event) => self.on_side_event(event),
                Woken::Looked(looked) => self.on_looked(looked),
                Woken::Time => {}
                Woken::Changed => self.swap(),
                Woken::Command(command) => self.on_command(command),
                Woken::Paused => self.pause(),
                Woken::Stop => self.drain(),
            }
        }
        self.leave().await;
    }

    /// Waits for the next thing to do. Who is asked first changes every time, so that nothing that is always ready keeps the others waiting;
    /// it follows from the seed, where `select!` would draw it from a generator that no test can set. Cancel-safe, as its parts are.
    async fn wait(&mut self, wake: Instant, answers: &mut Vec<Answer>, done: &mut Vec<Done>) -> Woken {
        self.waits = self.waits.wrapping_add(1);
        let first = (self.parts.seed ^ self.waits).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        let draining = self.draining.is_some();
        let Parts { leaf, route, commands, paused, stop, .. } = &mut self.parts;
        let mut event = pin!(self.consumer.next());
        let mut answered = pin!(leaf.answers(answers));
        let mut published = pin!(self.outbox.acknowledged(done));
        let mut committed = pin!(maybe(&mut self.commit));
        let mut transacted = pin!(maybe(&mut self.transaction));
        let mut measured = pin!(maybe(&mut self.lag));
        let (reader, looking) = self.sides.sources();
        let mut side = pin!(Sides::next(reader));
        let mut looked = pin!(maybe(looking));
        let mut time = pin!(tokio::time::sleep_until(wake));
        let mut changed = pin!(async {
            if route.changed().await.is_err() {
                // Nobody changes it any more.
                pending::<()>().await;
            }
        });
        let mut commanded = pin!(async {
            match commands.recv().await {
                Some(command) => command,
                None => pending().await,
            }
        });
        let mut paused = pin!(async {
            if paused.changed().await.is_err() {
                // Nobody pauses any more.
                pending::<()>().await;
            }
        });
        let mut stopped = pin!(async {
            if draining {
                pending::<()>().await;
            }
            stop.cancelled().await;
        });
        poll_fn(|cx| {
            for source in 0..SOURCES {
                let ready = match (first + source) % SOURCES {
                    0 => event.as_mut().poll(cx).map(Woken::Event),
                    1 => answered.as_mut().poll(cx).map(|()| Woken::Answers),
                    2 => published.as_mut().poll(cx).map(|()| Woken::Published),
                    3 => committed.as_mut().poll(cx).map(Woken::Committed),
                    4 => transacted.as_mut().poll(cx).map(Woken::Transacted),
                    5 => measured.as_mut().poll(cx).map(Woken::Lag),
                    6 => time.as_mut().poll(cx).map(|()| Woken::Time),
                    7 => changed.as_mut().poll(cx).map(|()| Woken::Changed),
                    8 => commanded.as_mut().poll(cx).map(Woken::Command),
                    9 => side.as_mut().poll(cx).map(Woken::Side),
                    10 => looked.as_mut().poll(cx).map(Woken::Looked),
                    11 => paused.as_mut().poll(cx).map(|()| Woken::Paused),
                    _ => stopped.as_mut().poll(cx).map(|()| Woken::Stop),
                };
                if ready.is_ready() {
                    return ready;
                }
            }
            Poll::Pending
        })
        .await
    }

    /// What is done each time something happened.
    fn turn(&mut self, now: Instant) {
        while let Some(Reverse((due, id))) = self.backoffs.peek().copied()
            && due <= now
        {
            self.backoffs.pop();
            self.lanes.put_back(id);
        }
        self.turn_sides(now);
        self.ease();
        if self.paused.is_none() {
            self.dispatch(now);
        }
        if !self.transactional || mutation::is(Mutation::OutsideTransaction) {
            self.outbox.flush(now, self.is_behind());
        }
        self.serve_commands(now);
        if self.transactional {
            self.start_transaction(now);
        } else {
            self.start_commit(now);
        }
        self.answer_revoke(now);
        if self.lag.is_none() && now >= self.lag_due {
            self.lag_due = now + LAG;
            let owned = self.sources().map(|(index, slot)| Asked::new(index, slot)).collect();
            let unread = self.unread_sides(now);
            self.lag = Some(watch_lag(self.parts.broker.admin(), self.epoch, owned, unread));
        }
        if now >= self.post_due {
            self.post(now);
        }
    }

    /// Whether a backlog waits for the service, so that nobody is delayed by what answers wait, and nothing waits for the last of them.
    fn is_behind(&self) -> bool {
        self.lanes.ready() >= BEHIND && self.revoke.is_none() && self.draining.is_none()
    }

    pub(super) fn owned(&self) -> impl Iterator<Item = (u32, &Slot)> {
        self.slots.iter().enumerate().filter(|(_, slot)| slot.owned).map(|(index, slot)| (index as u32, slot))
    }

    /// Partitions of sources that are owned here.
    pub(super) fn sources(&self) -> impl Iterator<Item = (u32, &Slot)> {
        self.owned().filter(|(_, slot)| slot.source().is_some())
    }

    /// Puts a partition where it was, or at the end.
    pub(super) fn put_slot(&mut self, partition: TopicPartition, slot: Slot) -> u32 {
        let index = match self.by_partition.get(&partition) {
            Some(&index) => {
                self.slots[index as usize] = slot;
                index
            }
            None => {
                let index = self.slots.len() as u32;
                self.by_partition.insert(partition, index);
                self.slots.push(slot);
                index
            }
        };
        self.recount(index);
        index
    }

    /// When the loop has something to do though nothing happens.
    fn wake(&self, now: Instant) -> Instant {
        let mut wake = self.post_due;
        let mut at = |time: Option<Instant>| wake = time.map_or(wake, |time| wake.min(time));
        at(self.backoffs.peek().map(|Reverse((due, _))| *due));
        // What cannot begin before a commit or a transaction is over is begun when that wakes the loop; a time in the past would keep it busy.
        let free = self.commit.is_none() && self.transaction.is_none();
        match self.transactional {
            false => at(self.outbox.wake()),
            true if free => at(self.outbox.parcel_wake()),
            true => {}
        }
        at(self.sides.wake());
        at(self.commit_again.filter(|_| free && self.may_commit()));
        at(self.revoke.as_ref().map(|revoke| revoke.deadline));
        at(self.command_wake());
        at(self.draining);
        if let Allowance::Wait(until) = self.breaker.allowance(now)
            && self.paused.is_none()
            && (self.lanes.ready() > 0 || self.has_gathered())
        {
            at(Some(until));
        }
        // One that is due and did not leave waits for something else, which wakes the loop.
        if let Some(batch) = self.route.batch.filter(|_| self.paused.is_none()) {
            at(self.gathered_due(batch).filter(|due| *due > now));
        }
        wake
    }

    /// Takes the changed route of a new table. What is out keeps the route under which it was delivered.
    fn swap(&mut self) {
        self.route = self.parts.route.borrow_and_update().clone();
        self.breaker.configure(self.route.breaker.failures, self.route.breaker.open);
        match (self.route.adaptive, &mut self.limit) {
            (Some(least), Some(limit)) => limit.configure(least, self.route.concurrency),
            (least, limit) => *limit = least.map(|least| Limit::new(least, self.route.concurrency)),
        }
        self.give_back(0);
        tracing::info!(route = %self.route.name, "the route changed");
        self.resume_all();
        for index in 0..self.slots.len() as u32 {
            self.pass_gap(index);
            self.hold_or_release(index);
        }
    }

    /// Takes over whether the route is paused. What is at the service is finished.
    fn pause(&mut self) {
        let paused = self.parts.paused.borrow_and_update().get(&*self.route.name).cloned();
        if paused == self.paused {
            return;
        }
        match &paused {
            Some(pause) => {
                tracing::info!(route = %self.route.name, "the route is {pause}");
                self.give_back(0);
            }
            None => tracing::info!(route = %self.route.name, "the route is resumed"),
        }
        self.paused = paused;
        self.post_due = Instant::now();
    }

    /// Counts records of a partition that are at the service or on their way to the broker.
    pub(super) fn slot_busy(&mut self, index: u32, epoch: u64, change: isize) {
        if let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.watermark.epoch() == epoch) {
            slot.busy = slot.busy.saturating_add_signed(change);
        }
    }

    /// Takes back a delivery that nobody has begun to handle.
    pub(super) fn withdraw(&mut self, id: u64) {
        let id = JobId::from_raw(id);
        let Some(job) = self.lanes.get_mut(id) else { return };
        if job.out.take().is_some() {
            let (slot, epoch) = (job.slot, job.epoch);
            job.span = None;
            self.out -= 1;
            self.calls -= 1;
            self.parts.metrics.in_flight.dec();
            self.slot_busy(slot, epoch, -1);
            self.lanes.put_back(id);
        }
    }
}

impl Slot {
    /// A partition that is owned from now on.
    pub(super) fn new(partition: TopicPartition, watermark: Watermark, role: Role) -> Self {
        let position = watermark.offset();
        Self {
            partition,
            owned: true,
            revoking: false,
            committed: position,
            recorded: 0,
            unrecorded: 0,
            busy: 0,
            held: false,
            gap: None,
            high: position,
            end: None,
            moved: Instant::now(),
            watermark,
            role,
        }
    }

    /// Whether more is complete than was committed.
    pub(super) fn is_uncommitted(&self) -> bool {
        self.watermark.offset() > self.committed || self.watermark.completed() > self.recorded
    }

    /// The assignment ended: nothing of it changes an offset any more.
    pub(super) fn give_away(&mut self, epoch: u64) {
        self.owned = false;
        self.revoking = false;
        self.held = false;
        self.gap = None;
        self.busy = 0;
        if self.source().is_some() {
            self.role = Role::Source(Box::default());
        }
        self.watermark = Watermark::new(epoch, self.watermark.offset());
    }
}

/// The trace context that a record carries.
pub(super) fn parent(record: &Record) -> Option<TraceContext> {
    TraceContext::parse(record.header(header::TRACEPARENT)?, record.header(header::TRACESTATE))
}

/// Waits for a future that may not be there. Cancel-safe: the future stays where it is.
async fn maybe<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}
