//! What happened outside of the sidecars: what producers had acknowledged, what the service was given and how it ended there.
//!
//! Invariant: an acknowledgement is entered after its answer was read, a start when the request was read, an end before the answer goes out: so
//! what a sidecar does in answer to an end comes after the end.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use uuid::Uuid;

use super::payload::Name;

/// A place in A: partition and offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.partition, self.offset)
    }
}

/// A publish that was acknowledged.
#[derive(Clone, Copy, Debug)]
pub struct Ack {
    /// The record.
    pub name: Name,
    /// The producer.
    pub producer: u32,
    /// The attempt.
    pub uuid: Uuid,
    /// Where it is said to be; an offset of -1: somewhere in the partition.
    pub place: Place,
    /// When, since the begin.
    pub at: Duration,
}

/// How a delivery ended at the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// 200 with a body.
    Reply,
    /// 204.
    Ignore,
    /// 400.
    Reject,
    /// 5xx: it may come again.
    Fail,
    /// The caller went away before an answer.
    Gone,
}

impl Answer {
    /// Whether the record is done once a sidecar has read this.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Reply | Self::Ignore | Self::Reject)
    }
}

/// Something that happened at the service.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// When, since the begin.
    pub at: Duration,
    /// The record's place in A.
    pub place: Place,
    /// The record.
    pub name: Name,
    /// The attempt to publish it.
    pub uuid: Uuid,
    /// What.
    pub what: What,
}

/// What happened at the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A delivery began; its number of the attempt.
    Start(u32),
    /// It ended.
    End(Answer),
}

/// A time in which a partition had work and nothing ended.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// The partition.
    pub partition: i32,
    /// From when, since the begin.
    pub from: Duration,
    /// To when.
    pub to: Duration,
}

impl Gap {
    /// How long.
    pub fn length(self) -> Duration {
        self.to.saturating_sub(self.from)
    }
}

/// Everything that was entered.
#[derive(Debug, Default)]
pub struct Books {
    /// Acknowledged publishes.
    pub acks: Vec<Ack>,
    /// Attempts that were refused for good, or never sent: they must not be in A.
    pub refused: HashSet<Uuid>,
    /// Attempts of which nobody knows.
    pub unsure: usize,
    /// What happened at the service, in order.
    pub events: Vec<Event>,
    /// Deliveries whose value was damaged, or that were none of this run's.
    pub damaged: Vec<String>,
    /// Times in which a partition had work and nothing ended, of 100 ms and more.
    pub gaps: Vec<Gap>,
    ended: HashSet<Place>,
    partitions: HashMap<i32, Work>,
}

#[derive(Debug, Default)]
struct Work {
    /// Acknowledged and not ended.
    pending: BTreeSet<i64>,
    /// Since when it has work without an end; of no meaning without work.
    since: Duration,
}

/// Gaps below are not kept.
const GAP: Duration = Duration::from_millis(100);

/// The books, shared by producers, service and checker.
#[derive(Debug)]
pub struct Ledger {
    begin: OnceLock<(Instant, SystemTime)>,
    /// An attempt of this number is the last.
    attempts: u32,
    books: Mutex<Books>,
}

impl Ledger {
    /// Empty books. `attempts` is the number of the route's last attempt: a failure of it ends a record, too.
    pub fn new(attempts: u32) -> Self {
        Self { begin: OnceLock::new(), attempts, books: Mutex::default() }
    }

    /// The books.
    pub fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The load begins: times count from here.
    pub fn begin(&self) {
        self.begin.get_or_init(|| (Instant::now(), SystemTime::now()));
    }

    /// When the load began; the epoch before it did.
    pub fn began(&self) -> SystemTime {
        self.begin.get().map_or(SystemTime::UNIX_EPOCH, |begin| begin.1)
    }

    /// The time since the begin.
    pub fn now(&self) -> Duration {
        self.begin.get().map_or(Duration::ZERO, |begin| begin.0.elapsed())
    }

    /// A publish was acknowledged.
    pub fn acknowledged(&self, name: Name, producer: u32, uuid: Uuid, place: Place) {
        let mut books = self.books();
        let at = self.now();
        books.acks.push(Ack { name, producer, uuid, place, at });
        if place.offset >= 0 && !books.ended.contains(&place) {
            let work = books.partitions.entry(place.partition).or_default();
            if work.pending.is_empty() {
                work.since = at;
            }
            work.pending.insert(place.offset);
        }
    }

    /// An attempt was refused for good: nothing of it may ever appear.
    pub fn refused(&self, uuid: Uuid) {
        self.books().refused.insert(uuid);
    }

    /// An attempt failed in a way that leaves open whether it was stored.
    pub fn unsure(&self) {
        self.books().unsure += 1;
    }

    /// A delivery began.
    pub fn start(&self, place: Place, name: Name, uuid: Uuid, attempt: u32) {
        let mut books = self.books();
        let at = self.now();
        books.events.push(Event { at, place, name, uuid, what: What::Start(attempt) });
    }

    /// A delivery ended.
    pub fn end(&self, place: Place, name: Name, uuid: Uuid, attempt: u32, answer: Answer) {
        let mut books = self.books();
        let at = self.now();
        books.events.push(Event { at, place, name, uuid, what: What::End(answer) });
        if answer.is_final() || attempt >= self.attempts {
            books.progress(place, at);
        }
    }

    /// A delivery that cannot be of this run.
    pub fn damaged(&self, detail: String) {
        self.books().damaged.push(detail);
    }

    /// How many records of A ended at the service at least once.
    pub fn ended(&self) -> usize {
        self.books().ended.len()
    }
}

impl Books {
    fn progress(&mut self, place: Place, at: Duration) {
        self.ended.insert(place);
        let work = self.partitions.entry(place.partition).or_default();
        if !work.pending.is_empty() {
            let gap = Gap { partition: place.partition, from: work.since, to: at };
            if gap.length() >= GAP {
                self.gaps.push(gap);
            }
        }
        work.since = at;
        work.pending.remove(&place.offset);
    }

    /// The longest gap that touches a span of time.
    pub fn longest_gap(&self, from: Duration, to: Duration) -> Option<Gap> {
        self.gaps.iter().filter(|gap| gap.to > from && gap.from < to).max_by_key(|gap| gap.length()).copied()
    }

    /// The ends by place, for the checker.
    pub fn has_ended(&self, place: Place) -> bool {
        self.ended.contains(&place)
    }
}
