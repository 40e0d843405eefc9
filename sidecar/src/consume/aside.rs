//! How records leave their lane for a retry or park topic, or stand still: what becomes of a record whose attempts are used up.
//!
//! Invariant: whatever leaves the head of a lane for a retry or park topic takes with it what waits behind it: to where it waits durably.
//! Invariant: each record that is given up costs credit; without credit nothing is given up, and the route waits.

use std::{cmp::Reverse, hash::BuildHasher as _, time::Duration};

use bytes::Bytes;
use mesh_routing::{OnExhausted, Order};
use tokio::{sync::oneshot, time::Instant};

use super::{
    command::{Moving, Releasing},
    outbox::{Publication, What},
    park::{AGAIN, LONGEST, Role, Stage, Stopped, Waiting},
    route::{Behind, Job, RouteLoop, Slot, parent},
};
use crate::{
    command::Released,
    deliver::breaker::Allowance,
    judge::Reason,
    lanes::JobId,
    mutation::{self, Mutation},
    parking::{Meeting, Release, Sizes},
    record::{TopicPartition, now_ms},
    telemetry::trace::TraceContext,
    tiers::{Kind, Why},
};

impl RouteLoop {
    /// A record's attempts in place are used up, or its service wants to be left alone for long: it goes on to the next retry topic, or has
    /// its end. Without credit it waits, and so does the route.
    pub(super) fn give_up(&mut self, id: JobId, reason: String, after: Option<Duration>, context: Option<TraceContext>, now: Instant) {
        let Some(job) = self.lanes.get(id) else { return };
        let (of, attempt) = (self.source_of(job.slot), job.delivery.attempt);
        let leaving = self.draining.is_some() || self.slots[of as usize].revoking;
        if !self.budget.spend() {
            if leaving {
                self.drop_failed(id);
            } else {
                self.trip(now, &reason);
                self.wait_for_service(id, now);
            }
            return;
        }
        let tier = match attempt.checked_sub(self.route.retry.attempts) {
            Some(visited) => visited as usize,
            // Asked to wait for longer than the first pause: the longest one that is not longer.
            None => self.route.retry_topics.iter().rposition(|pause| *pause <= after.unwrap_or_default()).unwrap_or(0),
        };
        if let Some(pause) = self.route.retry_topics.get(tier).copied() {
            let pause = pause.max(after.unwrap_or_default()).min(LONGEST);
            self.hand_over(id, tier + 1, pause, attempt, context, now);
            return;
        }
        match self.route.on_exhausted {
            OnExhausted::DeadLetter => {
                if let Some(job) = self.lanes.finish(id) {
                    self.dead_letter(job, reason, context);
                }
            }
            OnExhausted::Park => match self.side_of(of, Kind::Park) {
                Some(park) => {
                    tracing::warn!(route = %self.route.name, attempt, reason, "a record's attempts are used up: it is parked, with its key, until it is released");
                    self.move_aside(id, park, attempt, Why::Exhausted { reason }, context);
                }
                None => self.wait_for_side(id, of, now),
            },
            OnExhausted::Stop if leaving => self.drop_failed(id),
            OnExhausted::Stop => self.stop_partition(id, of, &reason),
        }
    }

    /// Whether the service asks for a pause that is better spent in a retry topic.
    pub(super) fn asks_for_long(&self, after: Option<Duration>) -> bool {
        after.zip(self.route.retry_topics.first()).is_some_and(|(after, first)| after >= *first)
    }

    /// Hands a record over to a retry topic, after so many attempts. Says whether it is on its way.
    pub(super) fn hand_over(
        &mut self,
        id: JobId,
        tier: usize,
        pause: Duration,
        attempts: u32,
        context: Option<TraceContext>,
        now: Instant,
    ) {
        let Some(job) = self.lanes.get(id) else { return };
        let of = self.source_of(job.slot);
        let Some(side) = self.side_of(of, Kind::Retry(tier)) else { return self.wait_for_side(id, of, now) };
        let pause = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX);
        let attempts = attempts.saturating_sub(u32::from(mutation::is(Mutation::ForgetTier)));
        self.move_aside(id, side, attempts, Why::Retry { due_ms: now_ms().saturating_add(pause) }, context);
    }

    /// A retry or park topic does not exist, or has too few partitions: the record waits, and it is looked for again.
    fn wait_for_side(&mut self, id: JobId, of: u32, now: Instant) {
        if self.draining.is_some() || self.slots[of as usize].revoking {
            // Whoever reads it next tries again.
            return self.drop_failed(id);
        }
        let partition = &self.slots[of as usize].partition;
        let detail = format!(
            "the retry and park topics {}.{}.… do not all exist with at least {} partitions: apply the table again, or create them",
            self.route.name,
            partition.topic,
            partition.partition + 1
        );
        if self.sides.trouble.as_ref() != Some(&detail) {
            tracing::warn!(route = %self.route.name, "{detail}");
            self.sides.trouble = Some(detail);
            self.post_now();
        }
        self.sides.wanted.insert(of);
        self.sides.again.get_or_insert(now + AGAIN);
        self.backoffs.push(Reverse((now + 2 * AGAIN, id)));
    }

    /// Whether attempts of a record of this slot go on from a retry topic, if its partition is given away.
    pub(super) fn survives(&self, index: u32) -> bool {
        !self.route.retry_topics.is_empty() && self.side_of(self.source_of(index), Kind::Retry(1)).is_some()
    }

    /// Puts the head of a lane into another topic, and what waits behind it to where it waits durably.
    fn move_aside(&mut self, id: JobId, side: u32, attempts: u32, why: Why, context: Option<TraceContext>) {
        self.mark_behind(id, Behind::Aside);
        let behind = self.lanes.take_behind(id);
        if let Some(job) = self.lanes.finish(id) {
            self.put_aside(side, job, attempts, why, context);
        }
        behind.into_iter().for_each(|job| self.follow_aside(job));
    }

    /// A record that was behind one that left its lane goes to where it waits for that one.
    pub(super) fn follow_aside(&mut self, mut job: Job) {
        // Wherever it goes, it comes back as one that nothing happened before.
        job.behind = Behind::Nothing;
        let slot = &self.slots[job.slot as usize];
        let leaving = self.draining.is_some() || slot.revoking;
        if slot.watermark.epoch() != job.epoch || !slot.owned || leaving {
            // Whoever reads it next does so.
            return;
        }
        let attempts = job.delivery.attempt.saturating_sub(1);
        match slot.side().map(|side| (side.kind, side.of)) {
            None => {
                // Where the partition stands still it waits in memory, unless what it follows lies in a retry topic and comes back later.
                let origin = job.delivery.position.offset;
                let source =
                    self.slots[job.slot as usize].source_mut().filter(|source| source.parking.meets(job.key, origin) == Meeting::Free);
                match source.and_then(|source| source.stopped.as_mut()) {
                    Some(stopped) => stopped.aside.push(job),
                    None => self.park(job, None),
                }
            }
            Some((Kind::Park, of)) => {
                let (key, origin, offset) = (job.key, job.delivery.position.offset, job.offset);
                if let Some(parking) = self.parking(of) {
                    parking.unload(key, origin, offset, attempts);
                }
                self.slots[job.slot as usize].watermark.weigh(offset, 0);
                self.hold_or_release(job.slot);
            }
            Some((Kind::Retry(_), of)) => {
                // Another copy of the record, or of one before it: in its time again.
                self.sides.sequence += 1;
                let waiting = Waiting { lane: self.lane_of(of, job.key), job };
                self.sides.delayed.insert((Instant::now(), self.sides.sequence), waiting);
            }
        }
    }

    /// A record of a source waits in the park topic for what lies before it.
    pub(super) fn park(&mut self, job: Job, context: Option<TraceContext>) {
        let attempts = job.delivery.attempt.saturating_sub(1);
        match self.side_of(job.slot, Kind::Park) {
            Some(park) => self.put_aside(park, job, attempts, Why::Behind, context),
            // The table lost it: it stays incomplete, as if it had not been read.
            None => tracing::error!(route = %self.route.name, "a record has to wait, and there is no park topic"),
        }
    }

    pub(super) fn put_aside(&mut self, side: u32, job: Job, attempts: u32, why: Why, context: Option<TraceContext>) {
        let (of, ordered) = (self.source_of(job.slot), self.ordered());
        let origin = job.delivery.position.offset;
        let tier = self.tier_of(side);
        if let Some(parking) = self.parking(of) {
            match &why {
                Why::Retry { .. } if ordered => parking.hand_over(job.key, origin, attempts, tier),
                Why::Retry { .. } => parking.finished(job.key, origin),
                Why::Behind | Why::Exhausted { .. } => parking.park(job.key, origin),
            }
        }
        let counter = if matches!(why, Why::Retry { .. }) { &self.parts.metrics.retried } else { &self.parts.metrics.parked };
        counter.inc();
        self.ensure_reading(side);
        let topic = self.slots[side as usize].partition.topic.clone();
        if mutation::is(Mutation::HandOverEarly) {
            self.complete_offset(job.slot, job.epoch, job.offset);
        }
        self.publish(job, What::Aside { topic, attempts, why }, context);
    }

    pub(super) fn dead_letter(&mut self, job: Job, detail: String, context: Option<TraceContext>) {
        self.publish(job, What::DeadLetter { reason: Reason::Attempts, detail }, context);
    }

    /// Gives a record to the outbox: it completes where it is when that is acknowledged.
    pub(super) fn publish(&mut self, job: Job, what: What, context: Option<TraceContext>) {
        let context = context.or_else(|| parent(&job.delivery.record));
        let Job { slot, epoch, offset, key, delivery, .. } = job;
        let lane = self.lane_of(self.source_of(slot), key);
        self.slot_busy(slot, epoch, 1);
        self.outbox.put(Publication { slot, epoch, lane, offset, key, delivery, what, context });
    }

    /// The service fails: the record waits, and its attempt is not counted. Others are tried before it.
    pub(super) fn wait_for_service(&mut self, id: JobId, now: Instant) {
        let until = match self.breaker.allowance(now) {
            Allowance::Wait(until) => until,
            Allowance::Free | Allowance::Probe => now,
        };
        self.backoffs.push(Reverse((until + Duration::from_millis(10 + id.get() % 40), id)));
    }

    // What stands still.

    fn stop_partition(&mut self, id: JobId, of: u32, reason: &str) {
        self.mark_behind(id, Behind::Aside);
        let Some(job) = self.lanes.finish(id) else { return };
        let position = &job.delivery.position;
        let detail = format!("{} stands still: {position} failed {} times: {reason}", position.partition, job.delivery.attempt);
        tracing::error!(route = %self.route.name, "{detail}; release or discard the record, or change the table");
        if let Some(source) = self.slots[of as usize].source_mut() {
            let stopped = source.stopped.get_or_insert_with(|| Stopped { detail, aside: Vec::new() });
            stopped.aside.push(job);
        }
        self.hold_or_release(of);
        self.post_now();
    }

    /// Puts a job that is ready aside, if its partition stands still.
    pub(super) fn stands_still(&mut self, id: JobId) -> bool {
        let Some(slot) = self.lanes.get(id).map(|job| job.slot) else { return false };
        let of = self.source_of(slot);
        if self.slots.get(of as usize).and_then(Slot::source).is_none_or(|source| source.stopped.is_none()) {
            return false;
        }
        self.mark_behind(id, Behind::Aside);
        let job = self.lanes.finish(id);
        if let Some(stopped) = self.slots[of as usize].source_mut().and_then(|source| source.stopped.as_mut()) {
            stopped.aside.extend(job);
        }
        true
    }

    /// Lets a partition go on that stands still: with the record that stopped it, from its first attempt on, or without it.
    pub(super) fn resume(&mut self, of: u32, how: Release) {
        let Some(stopped) = self.slots[of as usize].source_mut().and_then(|source| source.stopped.take()) else { return };
        tracing::info!(route = %self.route.name, partition = %self.slots[of as usize].partition, "the partition goes on");
        for (number, mut job) in stopped.aside.into_iter().enumerate() {
            job.behind = Behind::Nothing;
            match how {
                Release::Discard if number == 0 => {
                    self.dead_letter(job, "discarded by an operator".to_owned(), None);
                    continue;
                }
                Release::Retry if number == 0 => job.delivery.attempt = 1,
                _ => {}
            }
            let lane = self.lane_of(of, job.key);
            self.lanes.push(lane, job);
        }
        self.hold_or_release(of);
        self.post_now();
    }

    /// The table changed: what stands still is tried again.
    pub(super) fn resume_all(&mut self) {
        (0..self.slots.len() as u32).for_each(|of| self.resume(of, Release::Retry));
    }

    /// Releases records whose attempts are used up (`on_exhausted: park` and `stop`), of one key or of all, on the partitions owned here of which
    /// it is known what lies elsewhere; on `only` those of them, if there are some. Answered is what stays released, so not before it is stored where
    /// it goes.
    pub(super) fn release(
        &mut self,
        key: Option<&Option<Bytes>>,
        how: Release,
        only: &[TopicPartition],
        answer: oneshot::Sender<Released>,
    ) {
        let (mut released, mut moving) = (Released::default(), Vec::new());
        for of in 0..self.slots.len() as u32 {
            let wanted = match (key, self.route.order) {
                (Some(key), Order::Key) => Some(self.hasher.hash_one(key)),
                // There the whole partition waits, or each record for itself.
                _ => None,
            };
            let Some(slot) = self.slots.get_mut(of as usize).filter(|slot| slot.owned && !slot.revoking) else { continue };
            let Role::Source(source) = &mut slot.role else { continue };
            let meant = only.is_empty() || only.contains(&slot.partition);
            if !meant || source.stage != Stage::Ready {
                continue;
            }
            let (partition, epoch) = (slot.partition.clone(), slot.watermark.epoch());
            let parked = source.parking.release(wanted, how);
            let first = source.stopped.as_ref().and_then(|stopped| stopped.aside.first());
            if first.is_some_and(|job| wanted.is_none_or(|wanted| wanted == job.key)) {
                released.records += 1;
                self.resume(of, how);
            }
            // Without a retry topic there is nowhere to go: they run, and are parked again where that is cut.
            if parked.is_empty() || (how == Release::Retry && self.side_of(of, Kind::Retry(1)).is_none()) {
                released.records += parked.len() as u64;
                released.partitions.push(partition);
            } else {
                moving.push(Moving { of, epoch, parked, due: None });
            }
            self.pump_park(of);
        }
        let records = released.records + moving.iter().map(|moving| moving.parked.len() as u64).sum::<u64>();
        tracing::info!(route = %self.route.name, records, ?how, "records released");
        self.post_now();
        self.releasing.push(Releasing { moving, released, answer });
    }

    /// Why partitions stand still, if some do.
    pub(super) fn standing_still(&self) -> Option<String> {
        let stopped = self.slots.iter().filter_map(|slot| slot.source()?.stopped.as_ref());
        let details: Vec<&str> = stopped.map(|stopped| stopped.detail.as_str()).collect();
        (!details.is_empty()).then(|| details.join("; "))
    }

    /// What waits for somebody, in words.
    pub(super) fn exhausted(&self) -> Option<String> {
        let (Sizes { kept, parked, .. }, ..) = self.waiting_elsewhere();
        let behind = parked.saturating_sub(kept);
        let name = &self.route.name;
        (kept > 0).then(|| format!("{kept} records wait to be released, {behind} behind them: mesh-ctl release {name}"))
    }

    /// How much waits elsewhere, of how many keys, and when the next is due.
    pub(super) fn waiting_elsewhere(&self) -> (Sizes, usize, Option<Duration>) {
        let (mut sum, mut keys) = (Sizes::default(), 0);
        for source in self.slots.iter().filter(|slot| slot.owned).filter_map(Slot::source) {
            let Sizes { tracked, parked, kept, loaded } = source.parking.sizes();
            sum = Sizes { tracked: sum.tracked + tracked, parked: sum.parked + parked, kept: sum.kept + kept, loaded: sum.loaded + loaded };
            keys += source.parking.keys();
        }
        let due = self.sides.delayed.first_key_value().map(|((due, _), _)| due.saturating_duration_since(Instant::now()));
        (sum, keys, due)
    }
}
