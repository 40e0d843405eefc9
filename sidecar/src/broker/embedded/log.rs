//! What is in memory of topics and partitions: watermarks, the hot tail, and who waits for records.
//!
//! Invariant: only the writer changes watermarks and tails; the high watermark only after the commit that made it true.
//! Invariant: a partition's tail is contiguous and ends at its high watermark; what is below it is read from the store.
//! Invariant: locks are taken in the order group → catalog → partition → inbox, and none is held across a wait.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Weak, atomic::Ordering},
};

use bytes::Bytes;

use super::{
    inbox::Inbox,
    names::Settings,
    sync::{AtomicBool, Mutex, MutexGuard, PoisonError, RwLock},
};
use crate::record::TopicPartition;

/// Locks; a panic of another holder left nothing half done that matters here.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Stored records of one partition, encoded (see `codec`): offsets `base..end`.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) base: i64,
    pub(super) end: i64,
    pub(super) data: Bytes,
}

/// A topic.
#[derive(Debug)]
pub(super) struct Topic {
    pub(super) name: Arc<str>,
    pub(super) settings: Settings,
    /// The settings as they were given.
    pub(super) config: BTreeMap<String, String>,
    pub(super) partitions: Vec<Arc<Partition>>,
}

impl Topic {
    /// The partition count.
    pub(super) fn count(&self) -> i32 {
        i32::try_from(self.partitions.len()).unwrap_or(i32::MAX)
    }

    /// The partition of this number.
    pub(super) fn partition(&self, number: i32) -> Option<&Arc<Partition>> {
        usize::try_from(number).ok().and_then(|number| self.partitions.get(number))
    }
}

/// All topics.
#[derive(Debug, Default)]
pub(super) struct Catalog(RwLock<Topics>);

#[derive(Debug, Default)]
struct Topics {
    by_name: HashMap<Arc<str>, Arc<Topic>>,
    /// Their partition counts, once somebody asked; gone with the next change.
    counts: Option<Arc<BTreeMap<String, i32>>>,
}

impl Catalog {
    pub(super) fn get(&self, topic: &str) -> Option<Arc<Topic>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).by_name.get(topic).cloned()
    }

    /// The partition counts of all topics.
    pub(super) fn counts(&self) -> Arc<BTreeMap<String, i32>> {
        if let Some(counts) = &self.0.read().unwrap_or_else(PoisonError::into_inner).counts {
            return counts.clone();
        }
        let mut topics = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Topics { by_name, counts } = &mut *topics;
        let count = || Arc::new(by_name.values().map(|topic| (topic.name.to_string(), topic.count())).collect());
        counts.get_or_insert_with(count).clone()
    }

    pub(super) fn partition(&self, partition: &TopicPartition) -> Option<Arc<Partition>> {
        self.get(&partition.topic)?.partition(partition.partition).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Topic>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).by_name.values().cloned().collect()
    }

    pub(super) fn insert(&self, topic: Arc<Topic>) {
        let mut topics = self.0.write().unwrap_or_else(PoisonError::into_inner);
        topics.counts = None;
        topics.by_name.insert(topic.name.clone(), topic);
    }

    pub(super) fn remove(&self, topic: &str) {
        let mut topics = self.0.write().unwrap_or_else(PoisonError::into_inner);
        topics.counts = None;
        topics.by_name.remove(topic);
    }
}

/// A partition.
#[derive(Debug)]
pub(super) struct Partition {
    /// Its number in the store.
    pub(super) id: i64,
    pub(super) name: TopicPartition,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    low: i64,
    high: i64,
    newest_ms: i64,
    tail: VecDeque<Row>,
    watchers: Vec<Weak<Subscription>>,
}

/// What a reader finds.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing yet; the subscription hears of the next append.
    Nothing,
    /// The offset is gone; the first that exists is this.
    Expired(i64),
    /// Rows of the hot tail, at least one.
    Hot(Vec<Row>),
    /// In the store, below this offset.
    Cold(i64),
}

impl Partition {
    pub(super) fn new(id: i64, name: TopicPartition, low: i64, high: i64, newest_ms: i64) -> Self {
        Self { id, name, state: Mutex::new(State { low, high, newest_ms, tail: VecDeque::new(), watchers: Vec::new() }) }
    }

    /// The low and the high watermark.
    pub(super) fn watermarks(&self) -> (i64, i64) {
        let state = lock(&self.state);
        (state.low, state.high)
    }

    /// The largest timestamp so far; `i64::MIN` if there was none.
    pub(super) fn newest_ms(&self) -> i64 {
        lock(&self.state).newest_ms
    }

    /// Looks for records from `from` on; at most about `max_bytes` and `max_records`, but one row at least.
    pub(super) fn find(&self, from: i64, max_records: i64, max_bytes: usize) -> Found {
        let state = lock(&self.state);
        if from < state.low {
            return Found::Expired(state.low);
        }
        if from >= state.high {
            return Found::Nothing;
        }
        let first = state.tail.partition_point(|row| row.end <= from);
        match state.tail.get(first) {
            Some(row) if row.base <= from => {}
            Some(row) => return Found::Cold(row.base),
            None => return Found::Cold(state.high),
        }
        let (mut rows, mut records, mut bytes) = (Vec::new(), 0, 0);
        for row in state.tail.range(first..) {
            records += row.end - row.base.max(from);
            bytes += row.data.len();
            if !rows.is_empty() && (records > max_records || bytes > max_bytes) {
                break;
            }
            rows.push(row.clone());
        }
        Found::Hot(rows)
    }

    /// Makes committed rows visible, and wakes who waits.
    pub(super) fn publish(&self, rows: impl Iterator<Item = Row>, newest_ms: i64) {
        let mut state = lock(&self.state);
        for row in rows {
            state.high = row.end;
            state.tail.push_back(row);
        }
        state.newest_ms = state.newest_ms.max(newest_ms);
        state.watchers.retain(|watcher| match watcher.upgrade() {
            Some(subscription) => {
                subscription.ready();
                true
            }
            None => false,
        });
    }

    /// Drops rows of the tail up to the one with this base.
    pub(super) fn evict(&self, base: i64) {
        let mut state = lock(&self.state);
        while state.tail.front().is_some_and(|row| row.base <= base) {
            state.tail.pop_front();
        }
        if state.tail.is_empty() {
            state.tail.shrink_to(4);
        }
    }

    /// Raises the low watermark, and wakes who reads below it. Before the rows are deleted, so that no reader takes the hole for a gap.
    pub(super) fn raise_low(&self, low: i64) {
        let mut state = lock(&self.state);
        state.low = state.low.max(low);
        while state.tail.front().is_some_and(|row| row.end <= low) {
            state.tail.pop_front();
        }
        for watcher in state.watchers.iter().filter_map(Weak::upgrade) {
            watcher.ready();
        }
    }

    /// Registers a reader; it is ready at once.
    pub(super) fn subscribe(self: &Arc<Self>, inbox: &Arc<Inbox>) -> Arc<Subscription> {
        let subscription = Arc::new(Subscription { partition: self.clone(), inbox: inbox.clone(), queued: AtomicBool::new(false) });
        lock(&self.state).watchers.push(Arc::downgrade(&subscription));
        subscription.ready();
        subscription
    }
}

/// A consumer's interest in a partition, for as long as it is assigned.
#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) partition: Arc<Partition>,
    inbox: Arc<Inbox>,
    queued: AtomicBool,
}

impl Subscription {
    /// Tells the consumer to look; told once until it looks.
    pub(super) fn ready(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.inbox.push_ready(self.clone());
        }
    }

    /// The consumer looks now. Called before it reads, so that no append is missed.
    pub(super) fn looking(&self) {
        self.queued.swap(false, Ordering::AcqRel);
    }
}
