//! What the writer does besides writing: retention, compaction, and giving free pages back. In small steps between transactions.
//!
//! Invariant: a step is short (one chunk of one partition), so that it holds no publish up noticeably.
//! Invariant: only whole rows leave by retention, from the oldest on, and the low watermark goes ahead.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    EmbeddedConfig,
    codec::{Decoder, Encoder},
    log::{Catalog, Partition, Topic},
    store::{Doomed, Store},
};
use crate::broker::BrokerError;

/// Rows looked at, and deleted, in one step.
const CHUNK_ROWS: i64 = 128;
/// Bytes deleted, or compacted, in one step, about.
const CHUNK_BYTES: usize = 4 << 20;
/// Rows of a deleted topic removed in one step.
const PURGED_ROWS: i64 = 16;
/// Pages given back in one step.
const CHUNK_PAGES: u32 = 512;
/// A partition with more distinct keys is not compacted: the keys are held in memory.
const MAX_KEYS: usize = 1 << 20;
/// A partition is compacted when at least this many records came since the last time …
const MIN_DIRTY: i64 = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Housekeeper {
    interval_ms: i64,
    next_ms: i64,
    work: VecDeque<Work>,
    /// Of the first row of a partition, as far as known: when it was appended.
    oldest_ms: HashMap<i64, i64>,
    /// Per compacted partition: up to where, and how many records were left.
    compacted: HashMap<i64, (i64, i64)>,
    /// Deleted topics whose records are to be removed.
    doomed: Vec<Doomed>,
}

#[derive(Debug)]
enum Work {
    Retain { topic: Arc<Topic>, partition: usize },
    Scan(Box<Compaction>),
    Rewrite(Box<Compaction>),
    Purge(Doomed),
    Vacuum,
}

/// The compaction of one partition, below `end`.
#[derive(Debug)]
struct Compaction {
    partition: Arc<Partition>,
    tombstones_before_ms: i64,
    cursor: i64,
    end: i64,
    /// The last offset of each key.
    last: HashMap<Bytes, i64>,
    kept: i64,
}

impl Housekeeper {
    pub(super) fn new(config: &EmbeddedConfig) -> Self {
        let interval_ms = i64::try_from(config.housekeeping.as_millis()).unwrap_or(i64::MAX);
        Self {
            interval_ms,
            next_ms: i64::MIN,
            work: VecDeque::new(),
            oldest_ms: HashMap::new(),
            compacted: HashMap::new(),
            doomed: Vec::new(),
        }
    }

    /// Whether there is more to do at once.
    pub(super) fn busy(&self) -> bool {
        !self.work.is_empty()
    }

    /// Whether a round is due, or under way.
    pub(super) fn due(&self, now: i64) -> bool {
        self.busy() || now >= self.next_ms
    }

    /// Makes a round due.
    pub(super) fn due_now(&mut self) {
        self.next_ms = i64::MIN;
    }

    /// These topics were deleted; a round is due if there are some.
    pub(super) fn doom(&mut self, doomed: Vec<Doomed>) {
        if !doomed.is_empty() {
            self.due_now();
        }
        self.doomed = doomed;
    }

    /// One step; begins a round if one is due.
    pub(super) fn step(&mut self, store: &Store, catalog: &Catalog, now: i64) -> Result<(), BrokerError> {
        if self.work.is_empty() && now >= self.next_ms {
            self.next_ms = now.saturating_add(self.interval_ms);
            self.plan(catalog, now);
        }
        let Some(work) = self.work.pop_front() else { return Ok(()) };
        let done = match work {
            Work::Retain { topic, partition } => self.retain(store, &topic, partition, now),
            Work::Scan(compaction) => self.scan(store, compaction),
            Work::Rewrite(compaction) => self.rewrite(store, compaction),
            Work::Purge(doomed) => self.purge(store, doomed),
            Work::Vacuum => self.vacuum(store),
        };
        if done.is_err() {
            // Not again before the next round: a fault of the store would make the writer spin.
            self.work.clear();
        }
        done
    }

    fn plan(&mut self, catalog: &Catalog, now: i64) {
        for topic in catalog.all() {
            for (index, partition) in topic.partitions.iter().enumerate() {
                let (low, high) = partition.watermarks();
                if topic
                    .settings
                    .retention_ms
                    .is_some_and(|ms| low < high && self.oldest_ms.get(&partition.id).is_none_or(|oldest| *oldest < now.saturating_sub(ms)))
                {
                    self.work.push_back(Work::Retain { topic: topic.clone(), partition: index });
                }
                let (compacted, kept) = self.compacted.get(&partition.id).copied().unwrap_or((low, 0));
                if topic.settings.compact && high - compacted >= MIN_DIRTY.max(kept) {
                    self.work.push_back(Work::Scan(Box::new(Compaction {
                        partition: partition.clone(),
                        tombstones_before_ms: now.saturating_sub(topic.settings.tombstones_ms),
                        cursor: low,
                        end: high,
                        last: HashMap::new(),
                        kept: 0,
                    })));
                }
            }
        }
        self.work.extend(self.doomed.iter().cloned().map(Work::Purge));
        self.work.push_back(Work::Vacuum);
    }

    /// Removes a chunk of a deleted topic; forgets it at the end.
    fn purge(&mut self, store: &Store, mut doomed: Doomed) -> Result<(), BrokerError> {
        if let Some(partition) = doomed.partitions.last().copied() {
            if !store.purge(partition, PURGED_ROWS)? {
                doomed.partitions.pop();
                self.oldest_ms.remove(&partition);
                self.compacted.remove(&partition);
            }
            self.work.push_front(Work::Purge(doomed));
            return Ok(());
        }
        store.forget(doomed.topic)?;
        self.doomed.retain(|other| other.topic != doomed.topic);
        Ok(())
    }

    fn retain(&mut self, store: &Store, topic: &Arc<Topic>, index: usize, now: i64) -> Result<(), BrokerError> {
        let (Some(partition), Some(ms)) = (topic.partitions.get(index), topic.settings.retention_ms) else { return Ok(()) };
        let heads = store.heads(partition.id, CHUNK_ROWS).map_err(|error| store.failed("read the oldest rows of", &error))?;
        let (low, high) = partition.watermarks();
        let cutoff = now.saturating_sub(ms);
        let (mut new_low, mut bytes, mut expired, mut more) = (low, 0, false, heads.len() as i64 == CHUNK_ROWS);
        for head in &heads {
            if head.appended_ms >= cutoff {
                self.oldest_ms.insert(partition.id, head.appended_ms);
                more = false;
                break;
            }
            expired = true;
            new_low = new_low.max(head.end);
            bytes += usize::try_from(head.bytes).unwrap_or(0);
            if bytes >= CHUNK_BYTES {
                more = true;
                break;
            }
        }
        if expired {
            if !more && new_low == high {
                self.oldest_ms.remove(&partition.id);
            }
            // If the deletion fails, the rows are out of reach until a restart, and are deleted by a later round.
            partition.raise_low(new_low);
            store.transaction(|store| store.delete_below(partition.id, new_low, high)).map_err(|failure| failure.error)?;
            tracing::debug!(partition = %partition.name, from = low, to = new_low, "retention deleted records");
        }
        if more {
            self.work.push_front(Work::Retain { topic: topic.clone(), partition: index });
        }
        Ok(())
    }

    fn scan(&mut self, store: &Store, mut compaction: Box<Compaction>) -> Result<(), BrokerError> {
        let rows = store
            .read(compaction.partition.id, compaction.cursor, compaction.end, CHUNK_BYTES)
            .map_err(|error| store.failed("read for compaction from", &error))?;
        for row in &rows {
            for record in Decoder::new(row.data.clone(), row.base) {
                let Ok((offset, record)) = record else { return self.give_up(&compaction, "a row is corrupt") };
                if let Some(key) = record.key {
                    // A copy, since the slice would keep the whole row in memory.
                    match compaction.last.get_mut(&key) {
                        Some(last) => *last = offset,
                        None => drop(compaction.last.insert(Bytes::copy_from_slice(&key), offset)),
                    }
                }
            }
            compaction.cursor = row.end;
        }
        if compaction.last.len() > MAX_KEYS {
            return self.give_up(&compaction, "it has too many distinct keys");
        }
        if rows.is_empty() || compaction.cursor >= compaction.end {
            compaction.cursor = compaction.partition.watermarks().0;
            self.work.push_front(Work::Rewrite(compaction));
        } else {
            self.work.push_front(Work::Scan(compaction));
        }
        Ok(())
    }

    fn give_up(&mut self, compaction: &Compaction, reason: &str) -> Result<(), BrokerError> {
        tracing::warn!(partition = %compaction.partition.name, reason, "not compacted");
        self.compacted.insert(compaction.partition.id, (compaction.end, compaction.end));
        Ok(())
    }

    fn rewrite(&mut self, store: &Store, mut compaction: Box<Compaction>) -> Result<(), BrokerError> {
        let id = compaction.partition.id;
        let rows = store
            .read(id, compaction.cursor, compaction.end, CHUNK_BYTES)
            .map_err(|error| store.failed("read for compaction from", &error))?;
        let mut changed = Vec::new();
        for row in &rows {
            match compact_row(&mut compaction, row.data.clone(), row.base) {
                Some(Kept::All(count)) => compaction.kept += count,
                Some(Kept::Some(data, count)) => {
                    compaction.kept += count;
                    changed.push((row.base, Some(data)));
                }
                Some(Kept::Nothing) => changed.push((row.base, None)),
                None => return self.give_up(&compaction, "a row is corrupt"),
            }
            compaction.cursor = row.end;
        }
        if !changed.is_empty() {
            let (_, high) = compaction.partition.watermarks();
            let rewrite = |store: &Store| {
                changed.iter().try_for_each(|(base, data): &(i64, Option<Bytes>)| store.rewrite(id, *base, data.as_deref(), high))
            };
            store.transaction(rewrite).map_err(|failure| failure.error)?;
        }
        if rows.is_empty() || compaction.cursor >= compaction.end {
            self.compacted.insert(id, (compaction.end, compaction.kept));
        } else {
            self.work.push_front(Work::Rewrite(compaction));
        }
        Ok(())
    }

    fn vacuum(&mut self, store: &Store) -> Result<(), BrokerError> {
        if store.vacuum(CHUNK_PAGES).map_err(|error| store.failed("give free pages back from", &error))? {
            self.work.push_front(Work::Vacuum);
        }
        Ok(())
    }
}

/// What is left of a row.
enum Kept {
    All(i64),
    Some(Bytes, i64),
    Nothing,
}

/// Leaves out of a row what a later record of the same key replaces, and old tombstones. `None` if the row is corrupt.
fn compact_row(compaction: &mut Compaction, data: Bytes, base: i64) -> Option<Kept> {
    let mut encoder = Encoder::new();
    let (mut total, mut next) = (0, base);
    for record in Decoder::new(data, base) {
        let (offset, record) = record.ok()?;
        total += 1;
        let timestamp = record.timestamp_ms.unwrap_or_default();
        let replaced = record.key.as_ref().and_then(|key| compaction.last.get(key)).is_some_and(|last| *last > offset);
        let old_tombstone = record.key.is_some() && record.value.is_none() && timestamp < compaction.tombstones_before_ms;
        if !replaced && !old_tombstone {
            encoder.gap((offset - next).unsigned_abs());
            encoder.push(&record, timestamp);
            next = offset + 1;
        }
    }
    let count = i64::try_from(encoder.count()).unwrap_or(i64::MAX);
    Some(match count {
        0 => Kept::Nothing,
        _ if count == total => Kept::All(count),
        _ => Kept::Some(encoder.finish(), count),
    })
}
