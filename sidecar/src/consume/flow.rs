//! What a partition may hold in memory of records that are read and not complete, and when its reading is held.
//!
//! As long as a route holds little, each of its partitions may hold [`SHARE`] at least, however many they are. When all of them together hold
//! half of [`BYTES`], the other half is shared evenly: who has more than that is held until it has less, or the route holds little again.
//!
//! Invariant: of a route at most [`BYTES`] are in memory, and one batch of each partition that is read: sources, retry and park topics.
//! Invariant: a partition that holds nothing is read, whatever the others hold: nothing stands still for want of room.
//! Invariant: sums run along. A record looks at its own partition alone; partitions that were held are looked at again once for each hold.

use std::collections::BTreeSet;

use super::{
    park::{Role, Stage, TRACKED},
    route::{RouteLoop, Slot},
};
use crate::tiers::Kind;

/// Records of a partition that wait or run at most; beyond, the partition is held. Many, so that a key that waits for its next attempt, with
/// its later records behind it, does not keep other keys out.
const WAITING: usize = 2_048;
/// Offsets that a partition's watermark tracks at most, complete ones above it included: one slow record does not make memory grow.
const SPAN: usize = 10_000;
/// Bytes of a route's records that are read and not complete, at most.
const BYTES: usize = 16 << 20;
/// What a partition may hold of them at least, while the route holds little.
const SHARE: usize = 256 << 10;

/// What the partitions of a route hold together.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// By slot: what of it is in the sums.
    counted: Vec<Counted>,
    bytes: usize,
    /// Partitions of sources.
    sources: usize,
    /// Partitions that are read: those, and the ones of retry and park topics.
    read: usize,
    /// The route holds much: each partition may hold an even share of what is left.
    tight: bool,
    /// Slots that may be held for that alone.
    squeezed: BTreeSet<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    bytes: usize,
    source: bool,
    read: bool,
}

impl Flow {
    /// Bytes that a partition may hold; with more its reading is held, until it has half of that.
    pub(super) fn limit(&self) -> usize {
        if self.tight { BYTES / 2 / self.read.max(1) } else { self.most() }
    }

    /// The same while the route holds little.
    fn most(&self) -> usize {
        (BYTES / self.sources.max(1)).max(SHARE)
    }

    fn count(&mut self, index: u32, slot: &Slot) {
        let index = index as usize;
        if self.counted.len() <= index {
            self.counted.resize(index + 1, Counted::default());
        }
        let now = match &slot.role {
            _ if !slot.owned => Counted::default(),
            Role::Source(_) => Counted { bytes: slot.watermark.bytes(), source: true, read: true },
            Role::Side(side) => Counted { bytes: slot.watermark.bytes(), source: false, read: side.reading },
        };
        let before = std::mem::replace(&mut self.counted[index], now);
        self.bytes = self.bytes - before.bytes + now.bytes;
        self.sources = self.sources - usize::from(before.source) + usize::from(now.source);
        self.read = self.read - usize::from(before.read) + usize::from(now.read);
        // Few partitions cannot come over the bound, each with the most that it may have.
        let much = if self.tight { BYTES / 4 } else { BYTES / 2 };
        self.tight = self.most().saturating_mul(self.read) > BYTES && self.bytes > much;
    }
}

impl RouteLoop {
    /// A slot holds more or less than before, or is no longer read.
    pub(super) fn recount(&mut self, index: u32) {
        if let Some(slot) = self.slots.get(index as usize) {
            self.flow.count(index, slot);
        }
    }

    /// Looks again at what was held since the route held much, once it holds little.
    pub(super) fn ease(&mut self) {
        if !self.flow.tight {
            std::mem::take(&mut self.flow.squeezed).into_iter().for_each(|index| self.hold_or_release(index));
        }
    }

    /// Holds the reading of a partition that has as much in memory as it may, and releases it at half of that.
    pub(super) fn hold_or_release(&mut self, index: u32) {
        self.recount(index);
        let limit = self.flow.limit();
        let Some(slot) = self.slots.get(index as usize).filter(|slot| slot.owned) else { return };
        let waits = match slot.side().map(|side| (side.kind, side.of)) {
            Some((kind, of)) => {
                self.hold_or_release_side(index, limit);
                if kind == Kind::Park {
                    self.pump_park(of);
                }
                // Of a park topic records may wait that were passed for want of room.
                kind == Kind::Park
            }
            None => {
                self.hold_or_release_source(index, limit);
                false
            }
        };
        if self.flow.tight && (waits || self.slots[index as usize].held) {
            self.flow.squeezed.insert(index);
        }
    }

    fn hold_or_release_side(&mut self, index: u32, limit: usize) {
        if self.draining.is_some() {
            return;
        }
        if self.side_over(index, limit, 1) {
            self.hold_side(index, true);
        } else if !self.side_over(index, limit, 2) {
            self.hold_side(index, false);
        }
    }

    fn hold_or_release_source(&mut self, index: u32, limit: usize) {
        let at_service = match self.route.batch {
            Some(batch) => self.route.concurrency.saturating_mul(batch.max).min(self.parts.leaf.room()),
            None => self.route.concurrency,
        };
        let waiting_limit = WAITING.max(2 * at_service);
        let (draining, gated) = (self.draining.is_some(), self.is_gated(index));
        let slot = &mut self.slots[index as usize];
        let Some(source) = slot.source().filter(|_| slot.gap.is_none()) else { return };
        let waits = draining || source.stage != Stage::Ready || source.stopped.is_some();
        // What is parked runs only behind the gate: a source that is held before it would stand still for ever.
        let tracked = if gated { 0 } else { source.parking.sizes().tracked };
        let w = &slot.watermark;
        let over = |part: usize| {
            w.incomplete() * part > waiting_limit * 2
                || w.span() * part > SPAN * 2
                || w.bytes() * part > limit * 2
                || tracked * part > TRACKED * 2
        };
        if !slot.held && (over(2) || waits) {
            slot.held = true;
            self.consumer.hold(&slot.partition);
        } else if slot.held && !over(4) && !waits {
            slot.held = false;
            self.consumer.release(&slot.partition);
        }
    }

    pub(super) fn hold_all(&mut self) {
        for slot in self.slots.iter_mut().filter(|slot| slot.owned && !slot.held && slot.source().is_some()) {
            slot.held = true;
            self.consumer.hold(&slot.partition);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::time::Instant;

    use super::*;
    use crate::{
        broker::{Assigned, Event, fake::Fake},
        consume::{
            commit::tests::{partition, parts_on},
            park::Side,
            retry_tests::Dice,
            scan::Sweep,
        },
        deliver::Leaf,
        record::{Batch, Record, TopicPartition},
        watermark::Watermark,
    };

    const SOURCES: u32 = 300;
    /// Sources that have a retry topic, too.
    const RETRYING: u32 = 150;
    const RECORDS: i64 = 200;

    /// A loop that owns many partitions, all of them ready to be read.
    fn many() -> RouteLoop {
        let (leaf, _) = Leaf::played(drop);
        let (parts, _) = parts_on(&Fake::new(&["in"]), "order: none", leaf);
        let mut route = RouteLoop::new(parts).unwrap();
        let assigned = |number| Assigned { partition: partition(number), position: 0, metadata: String::new() };
        route.on_event(Event::Assigned((0..SOURCES as i32).map(assigned).collect()));
        for of in 0..RETRYING {
            let partition = TopicPartition::new("work.in.retry-1", of as i32);
            let side = Side { of, kind: Kind::Retry(1), reading: true, cursor: 0, until: 0, quiet: Instant::now(), sweep: Sweep::No };
            let epoch = route.slots[of as usize].watermark.epoch();
            let index = route.put_slot(partition.clone(), Slot::new(partition, Watermark::new(epoch, 0), Role::Side(side)));
            route.slots[of as usize].source_mut().unwrap().sides.push(index);
        }
        for of in 0..SOURCES {
            route.slots[of as usize].source_mut().unwrap().stage = Stage::Ready;
            route.hold_or_release(of);
        }
        route
    }

    /// What a broker has, and what was read of it.
    struct Read {
        /// By slot: where reading goes on.
        next: Vec<i64>,
        /// By slot: the bytes of the largest batch so far.
        largest: Vec<usize>,
        /// What is not complete: slot and offset.
        left: Vec<(u32, i64)>,
    }

    impl Read {
        fn read(&mut self, route: &mut RouteLoop, index: u32) {
            static ZEROS: [u8; 600_000] = [0; 600_000];
            let from = self.next[index as usize];
            // Every seventh partition has large records, one in a batch.
            let (count, size) = if index.is_multiple_of(7) { (1, 60_000 * (1 + index as usize % 10)) } else { (12, 500) };
            // A record that comes back is none of those that the source still has.
            let beyond = if index < SOURCES { 0 } else { RECORDS };
            let record = |offset| (beyond + offset, Record { value: Some(Bytes::from_static(&ZEROS[..size])), ..Record::default() });
            let records: Vec<_> = (from..RECORDS.min(from + count)).map(record).collect();
            let bytes = records.iter().map(|(_, record)| record.size()).sum();
            self.largest[index as usize] = self.largest[index as usize].max(bytes);
            self.next[index as usize] += records.len() as i64;
            self.left.extend(records.iter().map(|(offset, _)| (index, *offset)));
            let slot = &route.slots[index as usize];
            let (batch, source) = (Batch { partition: slot.partition.clone(), records }, slot.source().is_some());
            if source { route.on_event(Event::Records(batch)) } else { route.on_side_event(Event::Records(batch)) }
        }

        fn complete(&mut self, route: &mut RouteLoop, pick: usize) {
            let (index, offset) = self.left.swap_remove(pick);
            let epoch = route.slots[index as usize].watermark.epoch();
            assert!(route.complete_offset(index, epoch, offset));
        }

        /// What holds after each step.
        fn check(&self, route: &RouteLoop) {
            let bytes: usize = route.slots.iter().map(|slot| slot.watermark.bytes()).sum();
            assert_eq!((route.flow.bytes, route.flow.read), (bytes, (SOURCES + RETRYING) as usize));
            assert!(bytes <= BYTES + self.largest.iter().sum::<usize>(), "{bytes} are in memory");
            for slot in route.slots.iter().filter(|slot| slot.held) {
                let held = slot.watermark.bytes();
                assert!(held > 0, "{} is held for nothing", slot.partition);
                assert!(route.flow.tight || 2 * held > route.flow.most() || slot.watermark.span() > 2_000, "{} still is", slot.partition);
            }
        }
    }

    /// However many partitions have more to read than is done: what is in memory is bounded, whoever holds little is read, and all is read.
    #[tokio::test(start_paused = true)]
    async fn hundreds_of_partitions_share_the_bytes_of_a_route_and_all_of_them_go_on() {
        for seed in 0..3 {
            let (mut dice, mut route) = (Dice(seed), many());
            let slots = route.slots.len();
            let mut read = Read { next: vec![0; slots], largest: vec![0; slots], left: Vec::new() };
            let mut most = 0;
            // For a while nothing is done, or little; then more is done than read.
            for (steps, done) in [(9_000, seed), (2_000, 40), (4_000, 3), (usize::MAX, 40)] {
                for step in 0..steps {
                    let index = dice.roll(slots as u64) as u32;
                    if !route.slots[index as usize].held && read.next[index as usize] < RECORDS {
                        read.read(&mut route, index);
                    }
                    for _ in 0..dice.roll(done + 1).min(read.left.len() as u64) {
                        let pick = dice.roll(read.left.len() as u64);
                        read.complete(&mut route, pick as usize);
                    }
                    route.ease();
                    most = route.flow.bytes.max(most);
                    if step % 64 == 0 {
                        read.check(&route);
                    }
                    if read.left.is_empty() && read.next.iter().all(|next| *next == RECORDS) {
                        break;
                    }
                }
            }
            assert_eq!((route.flow.bytes, route.flow.tight, route.flow.squeezed.len()), (0, false, 0));
            assert!(most > BYTES / 2, "the bound was never in sight: {most}");
        }
    }

    /// What others hold is no matter to a partition that holds nothing, and those that were held for the sum alone go on when that falls.
    #[tokio::test(start_paused = true)]
    async fn who_has_little_is_read_and_who_was_held_for_the_others_is_released_with_them() {
        let mut route = many();
        let slots = route.slots.len();
        let mut read = Read { next: vec![0; slots], largest: vec![0; slots], left: Vec::new() };
        // Each comes to hold less than its share, all of them together too much.
        for _ in 0..10 {
            for index in (0..slots as u32).filter(|index| index % 7 != 0) {
                if !route.slots[index as usize].held {
                    read.read(&mut route, index);
                }
            }
        }
        assert!(route.flow.tight);
        let held: Vec<u32> = (0..slots as u32).filter(|index| route.slots[*index as usize].held).collect();
        assert!(held.len() > 100 && held.iter().all(|index| route.slots[*index as usize].watermark.bytes() < SHARE / 2));
        assert!((0..slots).step_by(7).all(|index| !route.slots[index].held), "who holds nothing is read");
        // All but the first of them are done: it moved nothing, and goes on.
        let first = held[0];
        while let Some(pick) = read.left.iter().position(|(index, _)| *index != first) {
            read.complete(&mut route, pick);
        }
        assert!(!route.flow.tight && route.slots[first as usize].held);
        route.ease();
        assert!(!route.slots[first as usize].held);
        // What is given away counts no more.
        route.slots[first as usize].give_away(99);
        route.recount(first);
        assert_eq!((route.flow.bytes, route.flow.sources), (0, SOURCES as usize - 1));
    }
}
