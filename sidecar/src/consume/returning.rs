//! Records that come back from a route's retry and park topics.
//!
//! Invariant: a record in a retry topic runs when it is due, one in a park topic when its turn has come ([`crate::parking`]).
//! Invariant: of a partition of either, a bounded number of records and bytes is in memory; beyond that its reading is held.

use std::{hash::BuildHasher as _, sync::Arc, time::Duration};

use mesh_routing::Order;
use tokio::time::Instant;

use super::{
    park::{AGAIN, LONGEST, Role, Stage, Waiting},
    route::{Job, RouteLoop, Slot},
    scan::Sweep,
};
use crate::{
    broker::Event,
    lanes::Lane,
    mutation::{self, Mutation},
    outcome::{Delivery, Disposition},
    parking::{Found, FoundRetry, Release},
    record::{Batch, Position, Record, hops, now_ms},
    tiers::{self, Kind, Stored, Why},
    watermark::Entered,
};

/// Records of a partition of a retry topic, or of a park topic, that are in memory at most.
const LOADED: usize = 2_048;

impl RouteLoop {
    /// The key by which records wait for each other.
    pub(super) fn key_of(&self, record: &Record, origin: i64) -> u64 {
        match self.route.order {
            Order::None => origin.cast_unsigned(),
            Order::Partition => 0,
            Order::Key => self.hasher.hash_one(&record.key),
        }
    }

    pub(super) fn lane_of(&self, of: u32, key: u64) -> Option<Lane> {
        (self.route.order != Order::None).then_some(Lane { slot: of, key })
    }

    pub(super) fn on_side_event(&mut self, event: Event) {
        match event {
            Event::Records(batch) => self.on_side_batch(batch),
            Event::Expired { partition, from, to } => {
                let Some(&index) = self.by_partition.get(&partition) else { return };
                let expired = to.saturating_sub(from).max(0).unsigned_abs();
                tracing::error!(route = %self.route.name, %partition, from, to, expired, "the broker deleted records that waited for their next attempt");
                self.count(Disposition::Expired, "", expired);
                let slot = &mut self.slots[index as usize];
                slot.watermark.skip_to(to);
                if let Role::Side(side) = &mut slot.role {
                    side.cursor = side.cursor.max(to);
                    let (of, kind) = (side.of, side.kind);
                    let Some(source) = self.slots.get_mut(of as usize).and_then(Slot::source_mut) else { return };
                    match kind {
                        Kind::Park => {
                            for offset in source.parking.lost(to) {
                                self.complete_aside(index, offset);
                            }
                        }
                        // Which records were there shows when the topic is read to its end.
                        Kind::Retry(tier) if source.parking.suspect(tier) => self.begin_sweep(index),
                        Kind::Retry(_) => {}
                    }
                    self.scanned(of);
                }
            }
            Event::Trouble(error) => {
                tracing::warn!(route = %self.route.name, %error, "waiting for the broker to read retry topics");
                self.sides.trouble = Some(error.to_string());
                self.post_now();
            }
            Event::Recovered => {
                self.sides.trouble = None;
                self.post_now();
            }
            Event::Assigned(_) | Event::Revoking(_) => {}
        }
    }

    fn on_side_batch(&mut self, batch: Batch) {
        let Some(&index) = self.by_partition.get(&batch.partition) else { return };
        let slot = &mut self.slots[index as usize];
        if !slot.owned || slot.revoking || self.draining.is_some() {
            return;
        }
        let Some(side) = slot.side_mut().filter(|side| side.reading) else { return };
        side.quiet = Instant::now();
        let (of, kind) = (side.of, side.kind);
        let scanning = self.slots[of as usize].source().is_none_or(|source| source.stage != Stage::Ready);
        for (offset, record) in batch.records {
            let Some(side) = self.slots[index as usize].side_mut() else { return };
            side.cursor = side.cursor.max(offset + 1);
            match kind {
                Kind::Retry(_) if scanning => self.index_retry(index, of, offset, record),
                Kind::Retry(_) => self.take_retry(index, of, offset, record),
                Kind::Park => self.take_parked(index, of, offset, record),
            }
        }
        if scanning || self.slots[index as usize].side().is_some_and(|side| side.sweep != Sweep::No) {
            self.scanned(of);
        }
        self.hold_or_release(index);
        self.pump_park(of);
        self.hold_or_release(of);
    }

    fn read_stored(&self, index: u32, offset: i64, record: Record) -> (Stored, u64) {
        let place = Position { partition: self.slots[index as usize].partition.clone(), offset };
        let stored = tiers::read(record, &place);
        let key = self.key_of(&stored.record, stored.origin.offset);
        (stored, key)
    }

    fn job(&self, index: u32, of: u32, offset: i64, stored: Stored, key: u64) -> Job {
        let source = &self.slots[of as usize].partition;
        let partition = if stored.origin.partition == *source { source.clone() } else { stored.origin.partition };
        let delivery = Delivery {
            id: 0,
            mesh_id: stored.mesh_id,
            route: self.route.clone(),
            hops: hops(&stored.record),
            record: Arc::new(stored.record),
            position: Position { partition, offset: stored.origin.offset },
            attempt: stored.attempts.saturating_add(1),
            traceparent: bytes::Bytes::new(),
        };
        Job::new(index, self.slots[index as usize].watermark.epoch(), offset, key, delivery)
    }

    /// Which of its route's retry topics a slot is of; 0: none.
    pub(super) fn tier_of(&self, index: u32) -> usize {
        match self.slots.get(index as usize).and_then(Slot::side).map(|side| side.kind) {
            Some(Kind::Retry(tier)) => tier,
            Some(Kind::Park) | None => 0,
        }
    }

    /// Notes that a record lies in a retry topic, before anything runs.
    fn index_retry(&mut self, index: u32, of: u32, offset: i64, record: Record) {
        if self.slots[index as usize].watermark.was_completed(offset) {
            return;
        }
        let (stored, key) = self.read_stored(index, offset, record);
        let tier = self.tier_of(index);
        let complete = self.parking(of).and_then(|parking| parking.index_retry(key, stored.origin.offset, stored.attempts, tier));
        if let (Some(offset), Some(park)) = (complete, self.side_of(of, Kind::Park)) {
            self.complete_aside(park, offset);
        }
    }

    fn take_retry(&mut self, index: u32, of: u32, offset: i64, record: Record) {
        let slot = &mut self.slots[index as usize];
        if slot.watermark.enter(offset, record.timestamp_ms.unwrap_or_default(), record.size()) != Entered::New {
            return;
        }
        let (stored, key) = self.read_stored(index, offset, record);
        let tier = self.tier_of(index);
        let Some(parking) = self.parking(of) else { return };
        match parking.found_retry(key, stored.origin.offset, stored.attempts, tier) {
            FoundRetry::Duplicate => return self.complete_aside(index, offset),
            FoundRetry::Replace => self.withdraw_copy(of, stored.origin.offset),
            FoundRetry::Take => {}
        }
        let wait = stored.due_ms.unwrap_or(0).saturating_sub(now_ms());
        let wait = Duration::from_millis(u64::try_from(wait).unwrap_or(0)).min(LONGEST);
        let wait = if mutation::is(Mutation::RunEarly) { Duration::ZERO } else { wait };
        let waiting = Waiting { lane: self.lane_of(of, key), job: self.job(index, of, offset, stored, key) };
        self.sides.sequence += 1;
        self.sides.delayed.insert((Instant::now() + wait, self.sides.sequence), waiting);
    }

    /// Drops an older copy of a record that waits for its time: it is complete.
    fn withdraw_copy(&mut self, of: u32, origin: i64) {
        let older = self
            .sides
            .delayed
            .iter()
            .find(|(_, waiting)| waiting.job.delivery.position.offset == origin && self.source_of(waiting.job.slot) == of);
        if let Some(at) = older.map(|(at, _)| *at)
            && let Some(waiting) = self.sides.delayed.remove(&at)
        {
            self.complete_aside(waiting.job.slot, waiting.job.offset);
            self.hold_or_release(waiting.job.slot);
        }
    }

    fn take_parked(&mut self, index: u32, of: u32, offset: i64, record: Record) {
        let slot = &mut self.slots[index as usize];
        // What stays parked is not in memory: it weighs nothing before it is loaded.
        let size = record.size();
        if slot.watermark.enter(offset, record.timestamp_ms.unwrap_or_default(), 0) == Entered::Complete {
            if let Some(parking) = self.parking(of) {
                parking.passed(offset);
            }
            return;
        }
        let (stored, key) = self.read_stored(index, offset, record);
        let origin = stored.origin.offset;
        let Some(slot) = self.slots.get_mut(of as usize) else { return };
        let next = slot.watermark.next();
        let Some(source) = slot.source_mut() else { return };
        // Once ready, of a record that was not read from the source yet: whoever put it there is, or was until now, another owner. What that one did with
        // the records before it is not known here before they were read, too.
        let anothers = source.stage == Stage::Ready && origin >= next;
        if anothers {
            source.gate_most = source.gate_most.max(origin + 1);
            source.parking.set_waiting();
        }
        if anothers || source.stage != Stage::Ready {
            source.gate = source.gate.max(origin + 1);
        }
        let loaded = source.parking.sizes().loaded;
        let room = loaded < LOADED && self.slots[index as usize].watermark.bytes() <= self.flow.limit();
        let Some(parking) = self.parking(of) else { return };
        let found = parking.found(key, origin, offset, stored.attempts, stored.exhausted, room);
        if matches!(found, Found::Load | Found::Released(_)) {
            self.slots[index as usize].watermark.weigh(offset, size);
        }
        match found {
            Found::Stays => {}
            Found::Duplicate => self.complete_aside(index, offset),
            Found::Instead(other) => self.complete_aside(index, other),
            Found::Load => {
                let job = self.job(index, of, offset, stored, key);
                self.lanes.push(self.lane_of(of, key), job);
            }
            Found::Released(release) => {
                let attempts = stored.attempts;
                let mut job = self.job(index, of, offset, stored, key);
                match release {
                    Release::Retry => {
                        job.delivery.attempt = 1;
                        match self.side_of(of, Kind::Retry(1)) {
                            // So it stays released, whatever happens to this process.
                            Some(tier) => self.put_aside(tier, job, 0, Why::Retry { due_ms: now_ms() }, None),
                            None => drop(self.lanes.push(self.lane_of(of, key), job)),
                        }
                    }
                    Release::Discard => {
                        job.delivery.attempt = attempts;
                        self.dead_letter(job, "discarded by an operator".to_owned(), None);
                    }
                }
            }
        }
    }

    /// An offset of a retry or park topic is complete, and no record ended by that.
    fn complete_aside(&mut self, index: u32, offset: i64) {
        if let Some(slot) = self.slots.get_mut(index as usize) {
            let epoch = slot.watermark.epoch();
            slot.watermark.complete(epoch, offset);
            self.recount(index);
        }
    }

    /// Reads the park topic again from the record whose turn it is.
    pub(super) fn pump_park(&mut self, of: u32) {
        let Some(park) = self.side_of(of, Kind::Park) else { return };
        let Some(source) = self.slots[of as usize].source() else { return };
        let slot = &self.slots[park as usize];
        let Some(side) = slot.side() else { return };
        let (sizes, scanned, Some(wanted)) = (source.parking.sizes(), source.parking.scanned(), source.parking.wanted()) else { return };
        let room = sizes.loaded <= LOADED / 2 && slot.watermark.bytes() <= self.flow.limit() / 2;
        if slot.owned && !slot.revoking && self.draining.is_none() && room && wanted < side.cursor && (slot.held || side.cursor >= scanned)
        {
            self.read_from(park, wanted);
        }
    }

    /// A record is complete: what waited for it may run.
    pub(super) fn settle(&mut self, index: u32, key: u64, origin: i64) {
        let of = self.source_of(index);
        let Some(parking) = self.parking(of).filter(|parking| !parking.is_empty()) else { return };
        parking.finished(key, origin);
        self.pump_park(of);
        self.hold_or_release(of);
    }

    /// Whether a slot of a retry or park topic has as much in memory as it may, in parts: 1 is full, 2 is half.
    pub(super) fn side_over(&self, index: u32, bytes: usize, part: usize) -> bool {
        let slot = &self.slots[index as usize];
        match slot.side().map(|side| (side.kind, side.of)) {
            Some((Kind::Retry(_), of)) => {
                // What is only looked through is not kept.
                let ready = self.slots[of as usize].source().is_some_and(|source| source.stage == Stage::Ready);
                ready && (slot.watermark.incomplete() * part > LOADED || slot.watermark.bytes() * part > bytes)
            }
            Some((Kind::Park, of)) => {
                let loaded = self.slots[of as usize].source().map_or(0, |source| source.parking.sizes().loaded);
                loaded * part > LOADED || slot.watermark.bytes() * part > bytes
            }
            None => false,
        }
    }

    pub(super) fn hold_side(&mut self, index: u32, held: bool) {
        let slot = &mut self.slots[index as usize];
        if slot.held == held {
            return;
        }
        slot.held = held;
        if !held && slot.side().is_some_and(|side| side.sweep != Sweep::No) {
            self.sides.again.get_or_insert(Instant::now() + AGAIN);
        }
        let partition = self.slots[index as usize].partition.clone();
        if let Some(reader) = &mut self.sides.reader {
            if held { reader.hold(&partition) } else { reader.release(&partition) }
        }
    }
}
