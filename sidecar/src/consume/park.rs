//! What of a route waits outside of its sources: records in retry topics until they are due, and in park topics behind them.
//!
//! The owner of partition p of a source reads p of its retry and park topics with a consumer of their own, and commits them through the route's
//! group. What they hold is found when the partition is assigned, by the topics' names: also of retry topics that the table no longer has.
//! Both are slots like any other, with a watermark, so a record that comes back runs and completes like any other, too.
//!
//! Invariant: before the first record of a source partition runs, its retry and park topics were looked through up to their ends.
//! Invariant: a record that goes to a retry or park topic is complete where it was only when it is acknowledged there.
//! Invariant: what comes into a retry or park topic is read by the owner of its partition, also what somebody else put there late.
//! Invariant: what is remembered of a partition ([`TRACKED`]), and what of it is in memory, is bounded; beyond that the source is held.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, try_join_all},
};
use mesh_routing::{OnExhausted, Order, Route};
use tokio::time::Instant;

use super::{
    route::{Job, RouteLoop, Slot},
    scan::Sweep,
};
use crate::{
    broker::{Admin, BrokerError, Consumer, ConsumerConfig, Event, StartOffset},
    lanes::Lane,
    mutation::{self, Mutation},
    parking::{Parking, Release},
    record::TopicPartition,
    tiers::{self, Kind},
    watermark::Watermark,
};

/// Records of a partition of which something is remembered at most; beyond, the source is held until they are fewer.
pub(super) const TRACKED: usize = 100_000;
/// A wish of the service, or a due time that is written in a record, beyond this is cut.
pub(super) const LONGEST: Duration = Duration::from_secs(31 * 86_400);
/// The pause before retry topics are looked for again.
pub(super) const AGAIN: Duration = Duration::from_millis(500);
/// How often it is looked whether something came into retry and park topics that are not read: what was on its way there when its partition was given
/// away may be stored after the next owner looked through them.
const LATE: Duration = Duration::from_secs(30);
/// The pause before a record is looked at again that is due, and behind another one that lies elsewhere: after a crash only.
const BEHIND: Duration = Duration::from_millis(200);

/// What a slot is for its route.
pub(super) enum Role {
    Source(Box<Source>),
    Side(Side),
}

/// A partition of a source topic.
#[derive(Default)]
pub(super) struct Source {
    pub(super) stage: Stage,
    pub(super) parking: Parking,
    /// The slots of its retry and park topics.
    pub(super) sides: Vec<u32>,
    /// Parked records run only when the source was read up to here, the end of what is parked: what is to run before them may come again.
    pub(super) gate: i64,
    /// The end of the source at the assignment: beyond it nothing comes again.
    pub(super) gate_most: i64,
    pub(super) stopped: Option<Stopped>,
}

/// How far it is known what lies elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its retry and park topics are looked for.
    #[default]
    Looking,
    /// They are looked through.
    Scanning,
    /// Its records run.
    Ready,
}

/// A partition that stands still, since the attempts of a record are used up.
pub(super) struct Stopped {
    pub(super) detail: String,
    /// The record, and what was to run after it, in order.
    pub(super) aside: Vec<Job>,
}

/// A partition of a retry or park topic.
pub(super) struct Side {
    /// The slot of its source.
    pub(super) of: u32,
    pub(super) kind: Kind,
    /// It is read; one with nothing in it is not, before something is put there.
    pub(super) reading: bool,
    /// The offset after the last record that was read.
    pub(super) cursor: i64,
    /// It is looked through up to here.
    pub(super) until: i64,
    /// Since when it brought nothing.
    pub(super) quiet: Instant,
    pub(super) sweep: Sweep,
}

/// A record that waits for its time.
pub(super) struct Waiting {
    pub(super) lane: Option<Lane>,
    pub(super) job: Job,
}

/// What the loop keeps for it.
#[derive(Default)]
pub(super) struct Sides {
    pub(super) reader: Option<Box<dyn Consumer>>,
    /// By time.
    pub(super) delayed: BTreeMap<(Instant, u64), Waiting>,
    pub(super) sequence: u64,
    pub(super) looking: Option<BoxFuture<'static, Looked>>,
    /// Sources whose retry and park topics are to be looked for.
    pub(super) wanted: BTreeSet<u32>,
    pub(super) again: Option<Instant>,
    /// When it is looked again whether something came into those that are not read.
    late: Option<Instant>,
    /// Why records cannot be handed over, or read.
    pub(super) trouble: Option<String>,
}

/// What was found of retry and park topics.
pub(super) enum Looked {
    /// Which there are, for sources and their epochs.
    Sides { asked: Vec<(u32, u64)>, result: Result<Vec<FoundSide>, BrokerError> },
    /// Whether there are records from the cursor on, for the slots of some and their epochs.
    Ends(Vec<(u32, u64, i64, Result<bool, BrokerError>)>),
}

pub(super) struct FoundSide {
    of: u32,
    kind: Kind,
    partition: TopicPartition,
    /// The committed position, with its metadata; `None` in a group that never committed it.
    committed: Option<(i64, String)>,
    low: i64,
    high: i64,
    source_high: i64,
}

/// Looks for the retry and park topics of partitions, and for what the group committed of them.
async fn look(admin: Arc<dyn Admin>, route: Arc<Route>, asked: Vec<(u32, TopicPartition)>) -> Result<Vec<FoundSide>, BrokerError> {
    let topics = admin.topics().await?;
    let mut found = Vec::new();
    for (of, source) in asked {
        let prefix = format!("{}.{}.", route.name, source.topic);
        let own = topics.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(&prefix));
        for (name, _) in own.filter(|(_, count)| **count > source.partition) {
            if let Some(kind) = tiers::kind(&route.name, &source.topic, name) {
                found.push((of, source.clone(), kind, TopicPartition::new(name.as_str(), source.partition)));
            }
        }
    }
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let committed = admin.committed(&route.group, found.iter().map(|side| side.3.clone()).collect()).await?;
    let mut sides = Vec::with_capacity(found.len());
    for ((of, source, kind, partition), committed) in found.into_iter().zip(committed) {
        let current = match kind {
            Kind::Retry(tier) => tier <= route.tiers(),
            Kind::Park => route.tiers() > 0,
        };
        // A topic that only looks like one of this route's is not touched: the route committed what it used.
        if committed.is_none() && !current {
            continue;
        }
        let admin = &admin;
        sides.push(async move {
            let (low, high) = admin.watermarks(&partition).await?;
            let committed = committed.map(|commit| (commit.offset, commit.metadata));
            let behind = kind == Kind::Park && committed.as_ref().map_or(low, |(offset, _)| *offset) < high;
            let source_high = if behind { admin.watermarks(&source).await?.1 } else { 0 };
            Ok(FoundSide { of, kind, partition, committed, low, high, source_high })
        });
    }
    try_join_all(sides).await
}

impl Sides {
    /// When something is due.
    pub(super) fn wake(&self) -> Option<Instant> {
        let due = self.delayed.first_key_value().map(|((due, _), _)| *due);
        due.into_iter().chain(self.again).min()
    }

    /// The next event of retry and park topics. Pending for ever when none is read. Cancel-safe.
    pub(super) async fn next(reader: &mut Option<Box<dyn Consumer>>) -> Event {
        match reader {
            Some(reader) => reader.next().await,
            None => std::future::pending().await,
        }
    }

    /// The reader, and what is looked for, to wait for both at once.
    pub(super) fn sources(&mut self) -> (&mut Option<Box<dyn Consumer>>, &mut Option<BoxFuture<'static, Looked>>) {
        (&mut self.reader, &mut self.looking)
    }

    /// Ends all reading.
    pub(super) async fn close(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.close().await;
        }
    }
}

impl Slot {
    pub(super) fn source(&self) -> Option<&Source> {
        match &self.role {
            Role::Source(source) => Some(source),
            Role::Side(_) => None,
        }
    }

    pub(super) fn source_mut(&mut self) -> Option<&mut Source> {
        match &mut self.role {
            Role::Source(source) => Some(source),
            Role::Side(_) => None,
        }
    }

    pub(super) fn side(&self) -> Option<&Side> {
        match &self.role {
            Role::Source(_) => None,
            Role::Side(side) => Some(side),
        }
    }

    pub(super) fn side_mut(&mut self) -> Option<&mut Side> {
        match &mut self.role {
            Role::Source(_) => None,
            Role::Side(side) => Some(side),
        }
    }
}

impl RouteLoop {
    /// The slot of the source that a slot belongs to: itself, for one of a source.
    pub(super) fn source_of(&self, index: u32) -> u32 {
        self.slots.get(index as usize).and_then(Slot::side).map_or(index, |side| side.of)
    }

    pub(super) fn parking(&mut self, of: u32) -> Option<&mut Parking> {
        self.slots.get_mut(of as usize).and_then(Slot::source_mut).map(|source| &mut source.parking)
    }

    pub(super) fn ordered(&self) -> bool {
        self.route.order != Order::None
    }

    /// The slots of the retry and park topics of these sources.
    pub(super) fn sides_of(&self, sources: &[u32]) -> Vec<u32> {
        let sources = sources.iter().filter_map(|of| self.slots.get(*of as usize)?.source());
        sources.flat_map(|source| source.sides.iter().copied()).collect()
    }

    pub(super) fn side_of(&self, of: u32, kind: Kind) -> Option<u32> {
        let source = self.slots.get(of as usize)?.source()?;
        source.sides.iter().copied().find(|side| self.slots.get(*side as usize).and_then(Slot::side).is_some_and(|side| side.kind == kind))
    }

    // What there is.

    /// A source partition begins: nothing of it runs before it is known what lies in its retry and park topics.
    pub(super) fn begin(&mut self, of: u32) {
        let Some(slot) = self.slots.get_mut(of as usize) else { return };
        slot.held = true;
        self.consumer.hold(&slot.partition);
        self.sides.wanted.insert(of);
    }

    /// What is done each time something happened.
    pub(super) fn turn_sides(&mut self, now: Instant) {
        if self.draining.is_some() {
            return;
        }
        if self.sides.looking.is_none() && !self.sides.wanted.is_empty() && self.sides.again.is_none_or(|again| again <= now) {
            self.sides.again = None;
            let wanted = std::mem::take(&mut self.sides.wanted);
            let live = wanted.into_iter().filter_map(|of| Some((of, self.slots.get(of as usize)?)));
            let live: Vec<_> = live.filter(|(_, slot)| slot.owned && !slot.revoking && slot.source().is_some()).collect();
            let asked = live.iter().map(|(of, slot)| (*of, slot.watermark.epoch())).collect();
            let partitions: Vec<(u32, TopicPartition)> = live.into_iter().map(|(of, slot)| (of, slot.partition.clone())).collect();
            for side in self.sides_of(&partitions.iter().map(|(of, _)| *of).collect::<Vec<_>>()) {
                self.turn_sweep(side, Sweep::Wanted, Sweep::Asked);
            }
            let looking = look(self.parts.broker.admin(), self.route.clone(), partitions);
            self.sides.looking = Some(looking.map(|result| Looked::Sides { asked, result }).boxed());
        }
        while let Some(entry) = self.sides.delayed.first_entry()
            && entry.key().0 <= now
        {
            let Waiting { lane, job } = entry.remove();
            let (of, key, origin) = (self.source_of(job.slot), job.key, job.delivery.position.offset);
            let ahead = mutation::is(Mutation::RunAhead);
            if lane.is_some() && !ahead && self.parking(of).is_some_and(|parking| parking.waits(key, origin)) {
                self.sides.sequence += 1;
                self.sides.delayed.insert((now + BEHIND, self.sides.sequence), Waiting { lane, job });
                continue;
            }
            self.lanes.push(lane, job);
        }
        if self.sides.again.is_some_and(|again| again <= now) {
            self.sides.again = None;
            for of in 0..self.slots.len() as u32 {
                self.scanned(of);
            }
        }
    }

    pub(super) fn on_looked(&mut self, looked: Looked) {
        self.sides.looking = None;
        if self.draining.is_some() {
            return;
        }
        let now = Instant::now();
        let (asked, result) = match looked {
            Looked::Sides { asked, result } => (asked, result),
            Looked::Ends(ends) => return self.on_ends(ends, now),
        };
        let asked: Vec<u32> = asked
            .into_iter()
            .filter(|(of, epoch)| self.slots.get(*of as usize).is_some_and(|s| s.owned && !s.revoking && s.watermark.epoch() == *epoch))
            .map(|(of, _)| of)
            .collect();
        let found = match result {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(route = %self.route.name, %error, "looking for retry topics failed: trying again");
                self.sides.trouble = Some(format!("looking for the route's retry topics: {error}"));
                self.sides.wanted.extend(asked);
                self.sides.again = Some(now + AGAIN);
                return;
            }
        };
        self.sides.trouble = None;
        for side in found {
            if !asked.contains(&side.of) {
                continue;
            }
            match self.side_of(side.of, side.kind) {
                None => self.add_side(side, now),
                Some(index) => {
                    if self.turn_sweep(index, Sweep::Asked, Sweep::Reading)
                        && let Some(known) = self.slots[index as usize].side_mut()
                    {
                        known.until = side.high;
                    }
                }
            }
        }
        for of in asked {
            match self.slots[of as usize].source().map(|source| source.stage) {
                Some(Stage::Looking) => self.begin_scan(of),
                _ => self.scanned(of),
            }
        }
        self.post_now();
    }

    fn add_side(&mut self, found: FoundSide, now: Instant) {
        let FoundSide { of, kind, partition, committed, low, high, source_high } = found;
        let Some(source) = self.slots.get(of as usize) else { return };
        let epoch = source.watermark.epoch();
        let known = committed.is_some();
        let (position, metadata) = committed.unwrap_or((low, String::new()));
        // A topic that was made anew begins anew.
        let position = if position > high { low } else { position };
        let side = Side { of, kind, reading: false, cursor: position, until: high, quiet: now, sweep: Sweep::No };
        let slot = Slot {
            // The start of a topic that was never committed is committed: so it is found again, should the table lose it.
            committed: if known { position } else { -1 },
            ..Slot::new(partition.clone(), Watermark::restore(epoch, position, &metadata), Role::Side(side))
        };
        let index = self.put_slot(partition, slot);
        if let Some(source) = self.slots[of as usize].source_mut() {
            source.sides.push(index);
            if kind == Kind::Park {
                source.parking = Parking::new(position);
                (source.gate, source.gate_most) = (0, source_high);
            }
        }
    }

    /// Whether the source has to be read further before what is parked may run.
    pub(super) fn is_gated(&self, of: u32) -> bool {
        let Some(slot) = self.slots.get(of as usize) else { return false };
        slot.source().is_some_and(|source| slot.watermark.next() < source.gate.min(source.gate_most))
    }

    /// Lets parked records run once the source was read as far as it was before.
    pub(super) fn pass_gate(&mut self, of: u32) {
        let gated = self.is_gated(of);
        let Some(slot) = self.slots.get_mut(of as usize) else { return };
        if let Role::Source(source) = &mut slot.role
            && source.stage == Stage::Ready
            && !gated
        {
            source.gate = 0;
            source.parking.set_ready();
            if self.route.on_exhausted != OnExhausted::Park {
                // The table parks no more: what is parked is tried again, and has the end that the table says.
                source.parking.release(None, Release::Retry);
            }
            self.pump_park(of);
        }
    }

    /// Reads a partition of a retry or park topic from an offset on.
    pub(super) fn read_from(&mut self, index: u32, from: i64) {
        let slot = &mut self.slots[index as usize];
        slot.held = false;
        let partition = slot.partition.clone();
        let Some(side) = slot.side_mut() else { return };
        side.cursor = from;
        side.reading = true;
        side.quiet = Instant::now();
        self.recount(index);
        if self.sides.reader.is_none() {
            let config = ConsumerConfig::reader(Vec::new(), StartOffset::Earliest, self.parts.buffer_bytes);
            match self.parts.broker.consumer(config) {
                Ok(reader) => self.sides.reader = Some(reader),
                Err(error) => {
                    // What works for the route's own consumer works for this one.
                    tracing::error!(route = %self.route.name, %error, "no consumer for retry topics");
                    self.sides.trouble = Some(error.to_string());
                    return;
                }
            }
        }
        if let Some(reader) = &mut self.sides.reader {
            reader.assign(vec![(partition, from)]);
        }
    }

    /// Reads what is about to be put there.
    pub(super) fn ensure_reading(&mut self, index: u32) {
        let slot = &self.slots[index as usize];
        if slot.owned && !slot.revoking && self.draining.is_none() && slot.side().is_some_and(|side| !side.reading) {
            self.read_from(index, slot.watermark.next());
        }
    }

    /// The retry and park topics that are not read, if it is time to look at them again.
    pub(super) fn unread_sides(&mut self, now: Instant) -> Vec<(u32, TopicPartition)> {
        if self.sides.late.is_some_and(|late| now < late) {
            return Vec::new();
        }
        self.sides.late = Some(now + LATE);
        let unread = self.owned().filter(|(_, slot)| slot.side().is_some_and(|side| !side.reading));
        unread.map(|(index, slot)| (index, slot.partition.clone())).collect()
    }

    /// Reads what came into a retry or park topic after it was looked through.
    pub(super) fn came_late(&mut self, index: u32, high: i64) {
        let Some(slot) = self.slots.get(index as usize) else { return };
        let Some(side) = slot.side().filter(|side| side.cursor < high) else { return };
        if self.slots[side.of as usize].source().is_some_and(|source| source.stage == Stage::Ready) {
            self.ensure_reading(index);
        }
    }

    // What is given away.

    /// Forgets what waits of these slots, and reads no more of them.
    pub(super) fn abandon_sides(&mut self, given_away: impl Fn(u32) -> bool) {
        self.sides.delayed.retain(|_, waiting| !given_away(waiting.job.slot));
        let mut partitions = Vec::new();
        for index in (0..self.slots.len() as u32).filter(|index| given_away(*index)) {
            match &mut self.slots[index as usize] {
                Slot { role: Role::Side(side), partition, .. } if side.reading => {
                    side.reading = false;
                    partitions.push(partition.clone());
                }
                Slot { role: Role::Source(source), .. } => source.stopped = None,
                Slot { .. } => {}
            }
        }
        if let Some(reader) = &mut self.sides.reader {
            reader.unassign(&partitions);
        }
        if self.draining.is_some() {
            (self.sides.looking, self.sides.again) = (None, None);
            self.sides.wanted.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::fake::Fake,
        consume::{
            commit::tests::{fixture_on, partition},
            scan::QUIET,
        },
    };

    /// What comes late from a park topic is to run first: silence is no end.
    #[tokio::test(start_paused = true)]
    async fn a_broker_that_is_slow_does_not_let_a_key_overtake_what_is_parked() {
        let fake = Fake::new(&["in", "work.in.retry-1", "work.in.park"]);
        fake.0.lock().unwrap().high = 1;
        let _running = fixture_on(&fake, "retry: { topics: [10m] }").await;
        let held = fake.0.lock().unwrap().consumers[0].held.clone();
        let is_held = || held.borrow().contains(&partition(0));
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(is_held(), "there is a record, and it did not come yet");
        fake.0.lock().unwrap().readable = false;
        tokio::time::sleep(QUIET * 3).await;
        assert!(!is_held(), "only marks are left");
    }

    /// As what a former owner of the partition sent before it lost it, and the broker stored later.
    #[tokio::test(start_paused = true)]
    async fn what_comes_late_into_a_topic_that_is_not_read_is_read() {
        let fake = Fake::new(&["in", "work.in.retry-1", "work.in.park"]);
        let _running = fixture_on(&fake, "retry: { topics: [10m] }").await;
        let readers = || fake.0.lock().unwrap().consumers.len() - 1;
        tokio::time::sleep(3 * LATE).await;
        assert_eq!(readers(), 0, "there is nothing to read");
        fake.0.lock().unwrap().high = 1;
        tokio::time::sleep(2 * LATE).await;
        assert_eq!(readers(), 1);
    }
}
