//! What lies between the polling thread and the async side: events first, then batches by partition, in turn.
//!
//! Pure: no I/O, no clock. One lock around it, taken per batch.
//!
//! Invariant: events that are not about records come before all records, so an assignment is seen before its first record.
//! Invariant: while the barrier is up (a revocation is unanswered), no record leaves.
//! Invariant: nothing ever blocks. While the partitions together have as much as their high marks, the polling thread rests and leaves the
//! records with librdkafka, whose own queue is bounded. Only when the rest takes long, those at their mark are paused until half of it is
//! drained: a pause makes librdkafka drop what it prefetched, and fetch it again.

use std::collections::{HashMap, VecDeque};

use crate::{
    broker::Event,
    record::{Batch, Record, TopicPartition},
};

/// The most records in a batch.
pub(super) const BATCH_RECORDS: usize = 512;
/// The most bytes in a batch, a larger single record aside.
pub(super) const BATCH_BYTES: usize = 256 * 1024;

/// Something of one partition, in the order of its offsets.
enum Item {
    Records { records: Vec<(i64, Record)>, bytes: usize },
    Expired { from: i64, to: i64 },
}

#[derive(Default)]
struct Buffer {
    items: VecDeque<Item>,
    bytes: usize,
    /// The async side wants nothing now.
    held: bool,
    /// The high mark was reached: the partition is paused at the broker's client.
    paused: bool,
    /// In `turn`.
    queued: bool,
    /// Being revoked: nothing is taken in, commits still are.
    leaving: bool,
    /// To be read from elsewhere: nothing is taken in until the polling thread has turned.
    seeking: bool,
}

/// The queue of a consumer.
#[derive(Default)]
pub(super) struct Queue {
    events: VecDeque<Event>,
    barrier: bool,
    buffers: HashMap<TopicPartition, Buffer>,
    turn: VecDeque<TopicPartition>,
    resume: Vec<TopicPartition>,
    /// Where partitions are to be read from, for the polling thread.
    seeks: Vec<(TopicPartition, i64)>,
    high: usize,
    /// What the async side wants to read from now on, from where, or (`None`) no more: for the polling thread, in order.
    choices: Vec<(TopicPartition, Option<i64>)>,
    /// The polling thread rests; it is to be woken when a partition has room again.
    resting: bool,
    /// How many commits run now.
    pub(super) committing: usize,
    /// The consumer is to be closed.
    pub(super) closing: bool,
}

/// What [`Queue::pop`] found.
pub(super) struct Popped {
    pub(super) event: Event,
    /// The polling thread has a partition to resume.
    pub(super) resume: bool,
}

impl Queue {
    /// Sets the high mark of a partition, in bytes.
    pub(super) fn set_high(&mut self, high: usize) {
        self.high = high;
    }

    /// The next event, if one may leave.
    pub(super) fn pop(&mut self) -> Option<Popped> {
        if let Some(event) = self.events.pop_front() {
            return Some(Popped { event, resume: false });
        }
        if self.barrier {
            return None;
        }
        while let Some(partition) = self.turn.pop_front() {
            let Some(buffer) = self.buffers.get_mut(&partition) else { continue };
            buffer.queued = false;
            if buffer.held {
                continue;
            }
            let Some(item) = buffer.items.pop_front() else { continue };
            let mut resume = false;
            if let Item::Records { bytes, .. } = &item {
                buffer.bytes = buffer.bytes.saturating_sub(*bytes);
                if buffer.paused && buffer.bytes <= self.high / 2 {
                    buffer.paused = false;
                    self.resume.push(partition.clone());
                    resume = true;
                }
            }
            if !buffer.items.is_empty() {
                buffer.queued = true;
                self.turn.push_back(partition.clone());
            }
            if self.resting && self.share_taken(2) {
                self.resting = false;
                resume = true;
            }
            let event = match item {
                Item::Records { records, .. } => Event::Records(Batch { partition, records }),
                Item::Expired { from, to } => Event::Expired { partition, from, to },
            };
            return Some(Popped { event, resume });
        }
        None
    }

    /// Whether the async side has not taken the news yet that partitions were lost or assigned.
    pub(super) fn assignment_untold(&self) -> bool {
        self.events.iter().any(|event| match event {
            Event::Assigned(_) => true,
            Event::Revoking(revoking) => revoking.lost,
            _ => false,
        })
    }

    /// An event that comes before all records.
    pub(super) fn event(&mut self, event: Event) {
        if matches!(event, Event::Trouble(_) | Event::Recovered) {
            // Only the newest state of things is news.
            self.events.retain(|event| !matches!(event, Event::Trouble(_) | Event::Recovered));
        }
        self.events.push_back(event);
    }

    /// Takes in records of a partition.
    pub(super) fn records(&mut self, partition: &TopicPartition, mut records: Vec<(i64, Record)>, bytes: usize) {
        let Some(buffer) = self.buffers.get_mut(partition).filter(|buffer| !buffer.leaving && !buffer.seeking) else { return };
        buffer.bytes += bytes;
        match buffer.items.back_mut() {
            Some(Item::Records { records: last, bytes: size })
                if last.len() + records.len() <= BATCH_RECORDS && *size + bytes <= BATCH_BYTES =>
            {
                last.append(&mut records);
                *size += bytes;
            }
            _ => buffer.items.push_back(Item::Records { records, bytes }),
        }
        self.enqueue(partition);
    }

    /// Whether the partitions that are not paused have as much as their high marks together, so that the polling thread may rest until half of
    /// it is drained.
    pub(super) fn rest(&mut self) -> bool {
        self.resting = !self.share_taken(1);
        self.resting
    }

    /// Whether less than this part of the high marks of the open partitions is left in their buffers.
    fn share_taken(&self, part: usize) -> bool {
        let open = self.buffers.values().filter(|buffer| !buffer.paused && !buffer.leaving);
        let (count, bytes) = open.fold((0, 0), |(count, bytes), buffer| (count + 1, bytes + buffer.bytes));
        count == 0 || bytes * part < count * self.high
    }

    /// Marks all partitions at their high mark as paused; gives them.
    pub(super) fn pause_full(&mut self) -> Vec<TopicPartition> {
        let high = self.high;
        self.resting = false;
        let full = self.buffers.iter_mut().filter(|(_, buffer)| !buffer.paused && !buffer.leaving && buffer.bytes >= high);
        full.map(|(partition, buffer)| {
            buffer.paused = true;
            partition.clone()
        })
        .collect()
    }

    /// Offsets of a partition were deleted unread, behind the records taken in so far.
    pub(super) fn expired(&mut self, partition: &TopicPartition, from: i64, to: i64) {
        if let Some(buffer) = self.buffers.get_mut(partition).filter(|buffer| !buffer.leaving && !buffer.seeking) {
            buffer.items.push_back(Item::Expired { from, to });
            self.enqueue(partition);
        }
    }

    fn enqueue(&mut self, partition: &TopicPartition) {
        if let Some(buffer) = self.buffers.get_mut(partition)
            && !buffer.queued
            && !buffer.held
            && !buffer.items.is_empty()
        {
            buffer.queued = true;
            self.turn.push_back(partition.clone());
        }
    }

    /// Drops what is buffered of a partition, and asks the polling thread to read it from elsewhere. Says whether there is something to do.
    pub(super) fn seek(&mut self, partition: &TopicPartition, offset: i64) -> bool {
        let Some(buffer) = self.buffers.get_mut(partition).filter(|buffer| !buffer.leaving) else { return false };
        buffer.items.clear();
        buffer.bytes = 0;
        buffer.queued = false;
        buffer.seeking = true;
        self.turn.retain(|queued| queued != partition);
        self.forget_seeks(partition);
        self.seeks.push((partition.clone(), offset));
        true
    }

    /// Where the polling thread has to turn.
    pub(super) fn take_seeks(&mut self) -> Vec<(TopicPartition, i64)> {
        std::mem::take(&mut self.seeks)
    }

    /// The polling thread has turned, unless it has to turn again: what comes from now on is of the new place. Says whether the partition was
    /// paused, which it is no more.
    pub(super) fn sought(&mut self, partition: &TopicPartition) -> bool {
        let again = self.seeks.iter().any(|(other, _)| other == partition);
        let Some(buffer) = self.buffers.get_mut(partition) else { return false };
        buffer.seeking = again;
        std::mem::take(&mut buffer.paused)
    }

    fn forget_seeks(&mut self, partition: &TopicPartition) {
        self.seeks.retain(|(other, _)| other != partition);
    }

    /// A partition is ours.
    pub(super) fn add(&mut self, partition: TopicPartition) {
        self.forget_seeks(&partition);
        self.buffers.insert(partition, Buffer::default());
    }

    /// A partition is about to go: what is buffered of it is dropped.
    pub(super) fn leaving(&mut self, partition: &TopicPartition) {
        if let Some(buffer) = self.buffers.get_mut(partition) {
            *buffer = Buffer { leaving: true, ..Buffer::default() };
        }
        self.forget_seeks(partition);
        self.turn.retain(|queued| queued != partition);
    }

    /// A partition is gone: commits of it are refused from now on.
    pub(super) fn remove(&mut self, partition: &TopicPartition) {
        self.buffers.remove(partition);
        self.turn.retain(|queued| queued != partition);
    }

    /// Partitions are to be read from these offsets. What is buffered of them is dropped.
    pub(super) fn choose(&mut self, partitions: Vec<(TopicPartition, i64)>) {
        for (partition, position) in partitions {
            self.unchoose(std::slice::from_ref(&partition));
            self.choices.push((partition, Some(position)));
        }
    }

    /// Partitions are not to be read any more: nothing of them leaves from now on.
    pub(super) fn unchoose(&mut self, partitions: &[TopicPartition]) {
        for partition in partitions {
            self.remove(partition);
            self.events.retain(|event| match event {
                Event::Assigned(assigned) => assigned.iter().all(|one| one.partition != *partition),
                Event::Revoking(revoking) => !revoking.partitions.contains(partition),
                _ => true,
            });
            // What the thread has not seen yet is over.
            self.choices.retain(|(chosen, _)| chosen != partition);
            self.choices.push((partition.clone(), None));
        }
    }

    /// What is chosen, for the polling thread.
    pub(super) fn take_choices(&mut self) -> Vec<(TopicPartition, Option<i64>)> {
        std::mem::take(&mut self.choices)
    }

    /// Whether a partition was chosen otherwise meanwhile.
    pub(super) fn chosen_anew(&self, partition: &TopicPartition) -> bool {
        self.choices.iter().any(|(chosen, _)| chosen == partition)
    }

    /// Whether a partition is ours, leaving or not.
    pub(super) fn owns(&self, partition: &TopicPartition) -> bool {
        self.buffers.contains_key(partition)
    }

    /// How many partitions are ours.
    pub(super) fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Whether a partition is paused at the client.
    pub(super) fn paused(&self, partition: &TopicPartition) -> bool {
        self.buffers.get(partition).is_some_and(|buffer| buffer.paused)
    }

    /// Stops or lets pass what is buffered of a partition.
    pub(super) fn hold(&mut self, partition: &TopicPartition, held: bool) {
        if let Some(buffer) = self.buffers.get_mut(partition) {
            buffer.held = held;
            if !held {
                self.enqueue(partition);
            }
        }
    }

    /// Raises or lowers the barrier.
    pub(super) fn set_barrier(&mut self, barrier: bool) {
        self.barrier = barrier;
    }

    /// A revocation that nobody has read yet is over: there is nothing to commit for it any more.
    pub(super) fn revocation_over(&mut self) {
        for event in &mut self.events {
            if let Event::Revoking(revoking) = event {
                revoking.lost = true;
            }
        }
    }

    /// The partitions to resume at the client.
    pub(super) fn take_resume(&mut self) -> Vec<TopicPartition> {
        let Self { resume, buffers, .. } = self;
        resume.drain(..).filter(|partition| buffers.get(partition).is_some_and(|buffer| !buffer.paused && !buffer.leaving)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::{BrokerError, BrokerErrorKind};

    fn partition(number: i32) -> TopicPartition {
        TopicPartition::new("t", number)
    }

    fn some(from: i64, count: i64) -> Vec<(i64, Record)> {
        (from..from + count).map(|offset| (offset, Record::default())).collect()
    }

    fn offsets(event: Option<Popped>) -> Vec<i64> {
        match event.map(|popped| popped.event) {
            Some(Event::Records(batch)) => batch.records.iter().map(|(offset, _)| *offset).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn partitions_take_turns_and_small_batches_merge() {
        let mut queue = Queue::default();
        queue.set_high(1_000_000);
        queue.add(partition(0));
        queue.add(partition(1));
        queue.records(&partition(0), some(0, 2), 10);
        queue.records(&partition(0), some(2, 2), 10);
        queue.records(&partition(1), some(0, 1), 10);
        queue.records(&partition(0), some(4, 511), 10);
        assert_eq!(offsets(queue.pop()), [0, 1, 2, 3]);
        assert_eq!(offsets(queue.pop()), [0]);
        assert_eq!(offsets(queue.pop()).len(), 511);
        assert!(queue.pop().is_none());
    }

    #[test]
    fn rests_when_all_have_enough_and_wakes_at_half() {
        let mut queue = Queue::default();
        queue.set_high(100);
        assert!(!queue.rest(), "with nothing to read there is nothing to rest from");
        queue.add(partition(0));
        queue.add(partition(1));
        queue.records(&partition(0), some(0, 512), 90);
        queue.records(&partition(0), some(512, 512), 60);
        assert!(!queue.rest(), "150 of 200");
        queue.records(&partition(0), some(1024, 512), 60);
        assert!(queue.rest(), "one may take the share of all");
        assert!(!queue.pop().unwrap().resume, "120 of 200 are left");
        assert!(queue.pop().unwrap().resume, "60 of 200 are left: the thread is woken");
        assert!(!queue.pop().unwrap().resume, "once");
    }

    #[test]
    fn a_long_rest_pauses_what_is_full_until_half_of_it_is_drained() {
        let mut queue = Queue::default();
        queue.set_high(100);
        queue.add(partition(0));
        queue.add(partition(1));
        queue.records(&partition(0), some(0, 512), 120);
        queue.records(&partition(0), some(512, 512), 120);
        assert!(queue.rest());
        assert_eq!(queue.pause_full(), [partition(0)]);
        assert!(!queue.rest(), "the other one is hungry");
        assert!(!queue.pop().unwrap().resume);
        assert!(queue.take_resume().is_empty());
        assert!(queue.pop().unwrap().resume);
        assert_eq!(queue.take_resume(), [partition(0)]);
        assert!(queue.take_resume().is_empty());
    }

    #[test]
    fn held_partitions_keep_what_they_have() {
        let mut queue = Queue::default();
        queue.set_high(100);
        queue.add(partition(0));
        queue.records(&partition(0), some(0, 1), 1);
        queue.hold(&partition(0), true);
        queue.records(&partition(0), some(1, 1), 1);
        assert!(queue.pop().is_none());
        queue.hold(&partition(0), false);
        queue.hold(&partition(0), false);
        assert_eq!(offsets(queue.pop()), [0, 1]);
        assert!(queue.pop().is_none());
    }

    #[test]
    fn after_a_seek_nothing_of_the_old_place_leaves() {
        let mut queue = Queue::default();
        queue.set_high(100);
        queue.add(partition(0));
        queue.records(&partition(0), some(7, 2), 10);
        assert!(queue.seek(&partition(0), 3));
        assert!(queue.pop().is_none(), "what was buffered is dropped");
        queue.records(&partition(0), some(9, 1), 10);
        assert!(queue.pop().is_none(), "what the thread still had is refused");
        assert_eq!(queue.take_seeks(), [(partition(0), 3)]);
        assert!(queue.seek(&partition(0), 5), "again, before the thread has turned");
        queue.sought(&partition(0));
        queue.records(&partition(0), some(3, 1), 10);
        assert!(queue.pop().is_none(), "of the first seek");
        assert_eq!(queue.take_seeks(), [(partition(0), 5)]);
        queue.sought(&partition(0));
        queue.records(&partition(0), some(5, 1), 10);
        assert_eq!(offsets(queue.pop()), [5]);
        assert!(queue.seek(&partition(0), 0));
        queue.leaving(&partition(0));
        assert!(queue.take_seeks().is_empty() && !queue.seek(&partition(0), 0), "it goes: who gets it begins where it was committed");
    }

    #[test]
    fn the_barrier_stops_records_but_not_events() {
        let mut queue = Queue::default();
        queue.set_high(100);
        queue.add(partition(0));
        queue.add(partition(1));
        queue.records(&partition(0), some(0, 1), 1);
        queue.records(&partition(1), some(0, 1), 1);
        queue.set_barrier(true);
        queue.leaving(&partition(1));
        queue.records(&partition(1), some(1, 1), 1);
        queue.event(Event::Trouble(BrokerError::new(BrokerErrorKind::Other, "x")));
        queue.event(Event::Recovered);
        assert!(matches!(queue.pop().unwrap().event, Event::Recovered));
        assert!(queue.pop().is_none());
        queue.remove(&partition(1));
        queue.set_barrier(false);
        assert_eq!(offsets(queue.pop()), [0]);
        assert!(queue.pop().is_none() && !queue.owns(&partition(1)));
    }

    #[test]
    fn what_expired_comes_behind_the_records_before_it() {
        let mut queue = Queue::default();
        queue.set_high(100);
        queue.add(partition(0));
        queue.records(&partition(0), some(0, 1), 1);
        queue.expired(&partition(0), 1, 5);
        queue.records(&partition(0), some(5, 1), 1);
        assert_eq!(offsets(queue.pop()), [0]);
        assert!(matches!(queue.pop().unwrap().event, Event::Expired { from: 1, to: 5, .. }));
        assert_eq!(offsets(queue.pop()), [5]);
    }
}
