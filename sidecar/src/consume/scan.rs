//! How retry and park topics are looked through: once before their source runs, and again where a broker deleted records of them.
//!
//! Invariant: a topic counts as looked through when it was read up to where it ended, or the broker says that nothing readable is left: silence is no end.
//! Invariant: a record that was deleted from a retry topic is waited for until that topic was read up to where it ended after the deletion, and no longer.

use std::{collections::BTreeSet, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::Instant;

use super::{
    park::{AGAIN, Looked, Stage},
    route::{RouteLoop, Slot},
};
use crate::{
    broker::BrokerError,
    mutation::{self, Mutation},
    parking::Sizes,
    record::{Position, TopicPartition},
    tiers::Kind,
};

/// A partition's end may be no record, but a mark of a transaction: of one that brought nothing for so long it is asked whether there is more.
pub(super) const QUIET: Duration = Duration::from_millis(300);

/// Whether records were deleted from a retry topic that may be waited for: which, is known when it was read up to where it ended after that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sweep {
    #[default]
    No,
    /// Its end is to be asked for.
    Wanted,
    Asked,
    /// It is read up to `until`.
    Reading,
}

impl RouteLoop {
    /// Looks through what the retry and park topics of a source hold, if there is anything.
    pub(super) fn begin_scan(&mut self, of: u32) {
        let ordered = self.ordered();
        for index in self.sides_of(&[of]) {
            let Some(side) = self.slots[index as usize].side() else { continue };
            // Without an order nothing waits for a record in a retry topic.
            let looks = (ordered || side.kind == Kind::Park) && !mutation::is(Mutation::ForgetScan);
            if side.cursor < side.until && looks {
                self.read_from(index, side.cursor);
            }
        }
        if let Some(source) = self.slots[of as usize].source_mut() {
            source.stage = Stage::Scanning;
        }
        self.scanned(of);
    }

    /// Lets a source run once its retry and park topics were looked through.
    pub(super) fn scanned(&mut self, of: u32) {
        let Some(source) = self.slots.get(of as usize).and_then(Slot::source) else { return };
        match source.stage {
            Stage::Looking => return,
            Stage::Scanning => {}
            Stage::Ready => return self.sweep(of),
        }
        let sides = source.sides.clone();
        let unfinished = |index: &u32| {
            let side = self.slots.get(*index as usize).and_then(Slot::side);
            side.is_some_and(|side| side.reading && side.cursor < side.until)
        };
        if sides.iter().any(unfinished) {
            // What other sources wait for is asked for in the same breath.
            let scanning = |slot: &&Slot| slot.owned && slot.source().is_some_and(|source| source.stage == Stage::Scanning);
            let all = self.slots.iter().filter(scanning).filter_map(Slot::source).flat_map(|source| source.sides.iter());
            let left: Vec<u32> = all.copied().filter(unfinished).collect();
            return self.ask_for_ends(&left, Instant::now());
        }
        let ordered = self.ordered();
        for index in sides {
            let slot = &self.slots[index as usize];
            let Some(side) = slot.side().filter(|side| matches!(side.kind, Kind::Retry(_))) else { continue };
            // They were looked through only: now they are read.
            let from = slot.watermark.next();
            if side.reading || (!ordered && from < side.until) {
                self.read_from(index, from);
            }
        }
        if let Some(source) = self.slots[of as usize].source_mut() {
            source.stage = Stage::Ready;
            let Sizes { tracked, kept, .. } = source.parking.sizes();
            if tracked > 0 {
                let partition = &self.slots[of as usize].partition;
                tracing::info!(route = %self.route.name, %partition, records = tracked, exhausted = kept, "records wait in retry and park topics");
            }
        }
        self.pass_gate(of);
        self.hold_or_release(of);
        self.post_now();
    }

    /// Records were deleted from a retry topic, of which some may be waited for.
    pub(super) fn begin_sweep(&mut self, index: u32) {
        if let Some(side) = self.slots.get_mut(index as usize).and_then(Slot::side_mut) {
            side.sweep = Sweep::Wanted;
            let of = side.of;
            self.sides.wanted.insert(of);
        }
    }

    pub(super) fn turn_sweep(&mut self, index: u32, from: Sweep, to: Sweep) -> bool {
        let side = self.slots.get_mut(index as usize).and_then(Slot::side_mut).filter(|side| side.sweep == from);
        side.map(|side| side.sweep = to).is_some()
    }

    /// Waits no longer for records that were deleted from retry topics, where these were read so far.
    fn sweep(&mut self, of: u32) {
        let mut left = Vec::new();
        for index in self.sides_of(&[of]) {
            let slot = &mut self.slots[index as usize];
            let held = slot.held;
            let Some(side) = slot.side_mut().filter(|side| side.sweep == Sweep::Reading) else { continue };
            if side.cursor < side.until {
                left.extend((!held).then_some(index));
                continue;
            }
            side.sweep = Sweep::No;
            if let Kind::Retry(tier) = side.kind
                && let Some(parking) = self.parking(of)
            {
                parking.sweep(tier);
            }
            self.pump_park(of);
            self.hold_or_release(of);
        }
        if !left.is_empty() {
            self.ask_for_ends(&left, Instant::now());
        }
    }

    /// Asks whether there is anything left of sides that brought nothing for a while; until that is known they are waited for.
    fn ask_for_ends(&mut self, left: &[u32], now: Instant) {
        let side_of = |index: &u32| self.slots.get(*index as usize).and_then(|slot| Some((slot, slot.side()?)));
        let quiet: Vec<(u32, u64, i64, TopicPartition)> = left
            .iter()
            .filter_map(|index| Some((*index, side_of(index)?)))
            .filter(|(_, (_, side))| side.quiet + QUIET <= now)
            .map(|(index, (slot, side))| (index, slot.watermark.epoch(), side.cursor, slot.partition.clone()))
            .collect();
        let again = left.iter().filter_map(side_of).map(|(_, side)| (side.quiet + QUIET).max(now + AGAIN)).min();
        self.sides.again = self.sides.again.into_iter().chain(again).min();
        // A broker in trouble tells when that is over, by what it sends.
        if quiet.is_empty() || self.sides.looking.is_some() || self.sides.trouble.is_some() {
            return;
        }
        let admin = self.parts.broker.admin();
        let looking = async move {
            let asked = quiet.iter().map(|(_, _, offset, partition)| Position { partition: partition.clone(), offset: *offset }).collect();
            let answers = admin.readable(asked).await;
            Looked::Ends(quiet.into_iter().zip(answers).map(|((index, epoch, cursor, _), answer)| (index, epoch, cursor, answer)).collect())
        };
        self.sides.looking = Some(looking.boxed());
    }

    pub(super) fn on_ends(&mut self, ends: Vec<(u32, u64, i64, Result<bool, BrokerError>)>, now: Instant) {
        let mut sources = BTreeSet::new();
        for (index, epoch, cursor, readable) in ends {
            let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.watermark.epoch() == epoch) else { continue };
            let Some(side) = slot.side_mut().filter(|side| side.cursor == cursor) else { continue };
            match readable {
                Ok(false) => side.until = cursor,
                // It comes.
                Ok(true) => side.quiet = now,
                Err(error) => {
                    side.quiet = now;
                    tracing::debug!(route = %self.route.name, %error, "not known whether a retry topic has more");
                }
            }
            sources.insert(side.of);
        }
        sources.into_iter().for_each(|of| self.scanned(of));
    }
}
