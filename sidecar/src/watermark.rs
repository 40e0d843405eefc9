//! The watermark of a partition: the lowest offset that is not complete, and so the only one that may be committed. Floor 0.
//!
//! After Parallel Consumer's `PartitionState`: only offsets that were read are entered, so gaps (compaction, transaction markers) cost
//! nothing; the commit is the lowest incomplete offset, else the one after the last that was read.
//!
//! Invariant: the watermark never passes an offset that is entered and not complete.
//! Invariant: an acknowledgement of another epoch changes nothing.
//! Invariant: an offset that a commit recorded as complete ([`Snapshot`]) stays recorded in every later commit until the watermark passes it.
//! Entering and completing cost O(1) amortised, the search for an offset O(log in flight), a snapshot O(offsets tracked).

use std::{collections::VecDeque, ops::Range};

use crate::completed;

/// Tracks one partition during one assignment.
#[derive(Debug)]
pub struct Watermark {
    epoch: u64,
    /// Entered offsets, ascending; the front one is incomplete.
    entries: VecDeque<Entry>,
    /// Where reading goes on: the watermark when nothing is in flight.
    next: i64,
    incomplete: usize,
    bytes: usize,
    /// Offsets from `next` on that an earlier assignment completed, ascending.
    restored: VecDeque<Range<i64>>,
    /// How many offsets were completed in this assignment.
    completed: u64,
}

#[derive(Debug)]
struct Entry {
    offset: i64,
    timestamp_ms: i64,
    bytes: u32,
    complete: bool,
    /// Complete once the transaction under way is stored.
    settling: bool,
}

/// What became of an offset that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// It is to be processed.
    New,
    /// It was read before.
    Again,
    /// An earlier assignment completed it, and a commit recorded that.
    Complete,
}

/// What a commit records of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The watermark.
    pub offset: i64,
    /// The completed offsets above it, as the commit's metadata.
    pub metadata: String,
    /// How many offsets had been completed in this assignment.
    pub completed: u64,
    /// How many of them it does not record, since there was no room.
    pub unrecorded: u64,
    /// Offsets from here on are not recorded; `i64::MAX` if there was room for all.
    pub end: i64,
}

/// What an acknowledgement did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The watermark moved.
    Advanced,
    /// The offset is complete; a lower one is not.
    Above,
    /// It belongs to another epoch, or is no offset in flight: dropped.
    Stale,
}

impl Watermark {
    /// Begins an assignment: everything below `position` is complete.
    pub fn new(epoch: u64, position: i64) -> Self {
        Self { epoch, entries: VecDeque::new(), next: position, incomplete: 0, bytes: 0, restored: VecDeque::new(), completed: 0 }
    }

    /// Begins an assignment at a committed offset, with the commit's metadata: what it says was completed is not done again. Metadata that is
    /// not ours says nothing.
    pub fn restore(epoch: u64, position: i64, metadata: &str) -> Self {
        let restored = completed::decode(position, metadata).unwrap_or_default().into();
        Self { restored, ..Self::new(epoch, position) }
    }

    /// The assignment's epoch; every acknowledgement carries it.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Enters an offset that was read.
    pub fn enter(&mut self, offset: i64, timestamp_ms: i64, bytes: usize) -> Entered {
        if offset < self.next {
            return Entered::Again;
        }
        self.skip_to(offset);
        let complete = self.restored.front().is_some_and(|range| range.contains(&offset));
        self.skip_to(offset + 1);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        if complete {
            // In front of all, it only moves the watermark.
            if !self.entries.is_empty() {
                self.entries.push_back(Entry { offset, timestamp_ms, bytes, complete, settling: false });
            }
            return Entered::Complete;
        }
        self.entries.push_back(Entry { offset, timestamp_ms, bytes, complete, settling: false });
        self.incomplete += 1;
        self.bytes += bytes as usize;
        Entered::New
    }

    /// What the record of an offset in flight holds in memory from now on: one that was only looked at holds nothing before it is taken in.
    pub fn weigh(&mut self, offset: i64, bytes: usize) {
        if let Ok(index) = self.entries.binary_search_by_key(&offset, |entry| entry.offset)
            && let Some(entry) = self.entries.get_mut(index).filter(|entry| !entry.complete)
        {
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            self.bytes = self.bytes - entry.bytes as usize + bytes as usize;
            entry.bytes = bytes;
        }
    }

    /// Reading goes on at `next`: what lies between does not exist (any more).
    pub fn skip_to(&mut self, next: i64) {
        self.next = self.next.max(next);
        while self.restored.front().is_some_and(|range| range.end <= self.next) {
            self.restored.pop_front();
        }
        if let Some(range) = self.restored.front_mut() {
            range.start = range.start.max(self.next);
        }
    }

    /// Whether an earlier assignment completed an offset that was not read yet, and a commit recorded that.
    pub fn was_completed(&self, offset: i64) -> bool {
        let index = self.restored.partition_point(|range| range.end <= offset);
        self.restored.get(index).is_some_and(|range| range.contains(&offset))
    }

    /// Whether an offset is complete, now or by what a commit recorded.
    pub fn is_complete(&self, offset: i64) -> bool {
        match self.entries.binary_search_by_key(&offset, |entry| entry.offset) {
            Ok(index) => self.entries.get(index).is_some_and(|entry| entry.complete),
            // What was read and is not tracked is complete, or no record.
            Err(_) => offset < self.next || self.was_completed(offset),
        }
    }

    /// What to commit now.
    pub fn snapshot(&self) -> Snapshot {
        self.record(self.completed, |entry| entry.complete)
    }

    /// What to commit together with what settles: as if it were complete.
    pub fn snapshot_settled(&self) -> Snapshot {
        let settling = self.entries.iter().filter(|entry| entry.settling && !entry.complete).count() as u64;
        self.record(self.completed + settling, |entry| entry.complete || entry.settling)
    }

    fn record(&self, completed: u64, done: impl Fn(&Entry) -> bool) -> Snapshot {
        let mut offset = self.entries.iter().find(|entry| !done(entry)).map_or(self.next, |entry| entry.offset);
        let mut ranges: Vec<Range<i64>> = Vec::new();
        let tracked = self.entries.iter().filter(|entry| entry.offset > offset && done(entry)).map(|entry| entry.offset..entry.offset + 1);
        for range in tracked.chain(self.restored.iter().cloned()) {
            match ranges.last_mut().filter(|last| last.end == range.start) {
                Some(last) => last.end = range.end,
                None => ranges.push(range),
            }
        }
        if ranges.first().is_some_and(|range| range.start == offset) {
            // Nothing is in flight, and what comes next was completed before.
            offset = ranges.remove(0).end;
        }
        let encoded = completed::encode(offset, &ranges);
        let unrecorded = self.entries.iter().rev().take_while(|entry| entry.offset >= encoded.end).filter(|entry| done(entry)).count();
        Snapshot { offset, metadata: encoded.text, completed, unrecorded: unrecorded as u64, end: encoded.end }
    }

    /// What comes of an offset is in the transaction under way: [`Watermark::snapshot_settled`] counts it as complete. Or, with `false`, not
    /// any more. An offset of another epoch, or none in flight, is left alone.
    pub fn settle(&mut self, epoch: u64, offset: i64, settling: bool) {
        if epoch == self.epoch
            && let Ok(index) = self.entries.binary_search_by_key(&offset, |entry| entry.offset)
            && let Some(entry) = self.entries.get_mut(index)
        {
            entry.settling = settling;
        }
    }

    /// Completes an offset.
    pub fn complete(&mut self, epoch: u64, offset: i64) -> Completion {
        if epoch != self.epoch {
            return Completion::Stale;
        }
        let Ok(index) = self.entries.binary_search_by_key(&offset, |entry| entry.offset) else {
            return Completion::Stale;
        };
        let Some(entry) = self.entries.get_mut(index).filter(|entry| !entry.complete) else {
            return Completion::Stale;
        };
        entry.complete = true;
        self.completed += 1;
        self.incomplete -= 1;
        self.bytes -= entry.bytes as usize;
        if index > 0 {
            return Completion::Above;
        }
        while self.entries.front().is_some_and(|entry| entry.complete) {
            self.entries.pop_front();
        }
        // Nothing is in flight, and what comes next was completed before: the watermark goes on behind that.
        if let Some(range) = self.restored.front().filter(|range| self.entries.is_empty() && range.start == self.next) {
            self.skip_to(range.end);
        }
        Completion::Advanced
    }

    /// The offset to commit: the lowest that is not complete.
    pub fn offset(&self) -> i64 {
        self.entries.front().map_or(self.next, |entry| entry.offset)
    }

    /// Where reading goes on.
    pub fn next(&self) -> i64 {
        self.next
    }

    /// How many offsets were completed in this assignment.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Records that are entered and not complete.
    pub fn incomplete(&self) -> usize {
        self.incomplete
    }

    /// Offsets that are tracked: the incomplete ones, and the complete ones above the watermark.
    pub fn span(&self) -> usize {
        self.entries.len()
    }

    /// The bytes of the incomplete records.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The timestamp of the oldest incomplete record, in milliseconds since 1970-01-01 UTC.
    pub fn oldest_timestamp_ms(&self) -> Option<i64> {
        self.entries.front().map(|entry| entry.timestamp_ms)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_late_acknowledgement_of_an_old_epoch_is_dropped() {
        let mut watermark = Watermark::new(2, 10);
        assert_eq!(watermark.enter(10, 0, 5), Entered::New);
        assert_eq!(watermark.complete(1, 10), Completion::Stale);
        assert_eq!(watermark.offset(), 10);
        assert_eq!(watermark.complete(2, 10), Completion::Advanced);
        assert_eq!(watermark.complete(2, 10), Completion::Stale, "twice");
        assert_eq!(watermark.offset(), 11);
    }

    #[test]
    fn a_record_that_is_taken_in_later_weighs_until_it_is_complete_or_let_go() {
        let mut watermark = Watermark::new(0, 0);
        for offset in 0..3 {
            watermark.enter(offset, 0, 0);
        }
        watermark.weigh(0, 100);
        watermark.weigh(1, 10);
        assert_eq!(watermark.bytes(), 110);
        watermark.weigh(0, 0);
        watermark.weigh(3, 1_000);
        assert_eq!(watermark.bytes(), 10, "let go; and what was not read weighs nothing");
        watermark.complete(0, 1);
        watermark.weigh(1, 10);
        assert_eq!((watermark.bytes(), watermark.incomplete()), (0, 2));
    }

    #[test]
    fn gaps_are_passed_and_never_waited_for() {
        let mut watermark = Watermark::new(0, 0);
        assert_eq!(watermark.enter(3, 0, 1), Entered::New);
        assert_eq!(watermark.enter(1_000_000, 0, 1), Entered::New);
        assert_eq!(watermark.offset(), 3);
        assert_eq!(watermark.complete(0, 1_000_000), Completion::Above);
        assert_eq!(watermark.complete(0, 3), Completion::Advanced);
        assert_eq!(watermark.offset(), 1_000_001);
        watermark.skip_to(2_000_000);
        assert_eq!(watermark.offset(), 2_000_000);
        assert_eq!(watermark.enter(1_999_999, 0, 1), Entered::Again);
        assert_eq!(watermark.bytes(), 0);
    }

    proptest! {
        /// Against a model: the set of incomplete offsets.
        #[test]
        fn it_is_the_lowest_incomplete_offset(steps in proptest::collection::vec((0i64..4, any::<prop::sample::Index>(), any::<bool>()), 1..200)) {
            let mut watermark = Watermark::new(7, 100);
            let (mut model, mut next) = (BTreeSet::new(), 100);
            for (gap, pick, enter) in steps {
                if enter || model.is_empty() {
                    let offset = next + gap;
                    prop_assert_eq!(watermark.enter(offset, 0, 3), Entered::New);
                    model.insert(offset);
                    next = offset + 1;
                } else {
                    let offset = *pick.get(&model.iter().copied().collect::<Vec<_>>());
                    prop_assert_ne!(watermark.complete(7, offset), Completion::Stale);
                    model.remove(&offset);
                }
                prop_assert_eq!(watermark.offset(), model.first().copied().unwrap_or(next));
                prop_assert_eq!(watermark.incomplete(), model.len());
                prop_assert_eq!(watermark.bytes(), 3 * model.len());
            }
        }

        /// What a transaction is to record, and what a commit records once all of it is complete, are the same.
        #[test]
        fn what_settles_is_recorded_as_if_it_were_complete(
            done in proptest::collection::vec(0u8..3, 1..150),
            restored in 0i64..40,
            gap in 1i64..4,
        ) {
            // Some offsets were completed by an earlier assignment, from behind what was read then.
            let from = done.len() as i64 * gap;
            let metadata = completed::encode(0, std::slice::from_ref(&(from..from + restored + 1))).text;
            let mut watermark = Watermark::restore(1, 0, &metadata);
            for index in 0..done.len() as i64 {
                prop_assert_eq!(watermark.enter(index * gap, 0, 1), Entered::New);
            }
            let offsets = |kind: u8| done.iter().enumerate().filter(move |(_, one)| **one == kind).map(|(index, _)| index as i64 * gap);
            offsets(1).for_each(|offset| {
                watermark.complete(1, offset);
            });
            let before = watermark.snapshot();
            offsets(2).for_each(|offset| watermark.settle(1, offset, true));
            prop_assert_eq!(&watermark.snapshot(), &before, "a plain commit records nothing of it");
            let settled = watermark.snapshot_settled();
            offsets(2).for_each(|offset| watermark.settle(1, offset, false));
            prop_assert_eq!(&watermark.snapshot_settled(), &before, "taken back");
            offsets(2).for_each(|offset| {
                watermark.complete(1, offset);
            });
            prop_assert_eq!(settled, watermark.snapshot());
        }

        /// Crashes and restarts, each from the last commit: nothing that a commit recorded is processed again, nothing is left out.
        #[test]
        fn nothing_that_a_commit_recorded_is_processed_again(
            steps in proptest::collection::vec((0u8..12, any::<prop::sample::Index>()), 1..400),
            gap in 1i64..3,
        ) {
            let last = 120 * gap;
            let mut watermark = Watermark::new(0, 0);
            let (mut read, mut running) = (0i64, BTreeSet::new());
            let (mut recorded, mut done) = (BTreeSet::new(), BTreeSet::new());
            let mut committed = (0i64, String::new());
            for (action, pick) in steps {
                match action {
                    0..=5 if read < last => {
                        let entered = watermark.enter(read, 0, 1);
                        prop_assert_eq!(entered != Entered::New, recorded.contains(&read), "{}", read);
                        if entered == Entered::New {
                            running.insert(read);
                        }
                        read += gap;
                    }
                    6..=8 if !running.is_empty() => {
                        let offset = *pick.get(&running.iter().copied().collect::<Vec<_>>());
                        running.remove(&offset);
                        watermark.complete(watermark.epoch(), offset);
                        done.insert(offset);
                    }
                    9..=10 => {
                        let snapshot = watermark.snapshot();
                        prop_assert_eq!(snapshot.unrecorded, 0);
                        committed = (snapshot.offset, snapshot.metadata);
                        recorded = done.clone();
                    }
                    11 => {
                        watermark = Watermark::restore(watermark.epoch() + 1, committed.0, &committed.1);
                        read = (committed.0 + gap - 1) / gap * gap;
                        prop_assert!((0..read).step_by(gap as usize).all(|offset| recorded.contains(&offset)));
                        running.clear();
                        done = recorded.clone();
                    }
                    _ => {}
                }
            }
        }
    }
}
