//! The watermark of a partition: the lowest offset that is not complete, and so the only one that may be committed. Floor 0.
//!
//! After Parallel Consumer's `PartitionState`: only offsets that were read are entered, so gaps (compaction, transaction markers) cost
//! nothing; the commit is the lowest incomplete offset, else the one after the last that was read.
//!
//! Invariant: the watermark never passes an offset that is entered and not complete.
//! Invariant: an acknowledgement of another epoch changes nothing.
//! Entering and completing cost O(1) amortised, the search for an offset O(log in flight).

use std::collections::VecDeque;

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
}

#[derive(Debug)]
struct Entry {
    offset: i64,
    timestamp_ms: i64,
    bytes: u32,
    complete: bool,
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
        Self { epoch, entries: VecDeque::new(), next: position, incomplete: 0, bytes: 0 }
    }

    /// The assignment's epoch; every acknowledgement carries it.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Enters an offset that was read. Offsets below the reading position are refused with `false`: they were read before.
    pub fn enter(&mut self, offset: i64, timestamp_ms: i64, bytes: usize) -> bool {
        if offset < self.next {
            return false;
        }
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.entries.push_back(Entry { offset, timestamp_ms, bytes, complete: false });
        self.next = offset + 1;
        self.incomplete += 1;
        self.bytes += bytes as usize;
        true
    }

    /// Reading goes on at `next`: what lies between does not exist (any more).
    pub fn skip_to(&mut self, next: i64) {
        self.next = self.next.max(next);
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
        self.incomplete -= 1;
        self.bytes -= entry.bytes as usize;
        if index > 0 {
            return Completion::Above;
        }
        while self.entries.front().is_some_and(|entry| entry.complete) {
            self.entries.pop_front();
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
        assert!(watermark.enter(10, 0, 5));
        assert_eq!(watermark.complete(1, 10), Completion::Stale);
        assert_eq!(watermark.offset(), 10);
        assert_eq!(watermark.complete(2, 10), Completion::Advanced);
        assert_eq!(watermark.complete(2, 10), Completion::Stale, "twice");
        assert_eq!(watermark.offset(), 11);
    }

    #[test]
    fn gaps_are_passed_and_never_waited_for() {
        let mut watermark = Watermark::new(0, 0);
        assert!(watermark.enter(3, 0, 1));
        assert!(watermark.enter(1_000_000, 0, 1));
        assert_eq!(watermark.offset(), 3);
        assert_eq!(watermark.complete(0, 1_000_000), Completion::Above);
        assert_eq!(watermark.complete(0, 3), Completion::Advanced);
        assert_eq!(watermark.offset(), 1_000_001);
        watermark.skip_to(2_000_000);
        assert_eq!(watermark.offset(), 2_000_000);
        assert!(!watermark.enter(1_999_999, 0, 1), "read before");
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
                    prop_assert!(watermark.enter(offset, 0, 3));
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
    }
}
