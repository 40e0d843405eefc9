//! What comes from the broker: assignments, records, and their way into watermark and lanes.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_routing::OnGap;
use tokio::time::Instant;

use super::{
    outbox::What,
    park::Role,
    route::{Job, RouteLoop, Slot},
};
use crate::{
    broker::{Assigned, Event},
    judge::{self, Intake},
    mutation::{self, Mutation},
    outcome::{Delivery, Disposition},
    parking::Meeting,
    record::{Batch, Position, Record, TopicPartition, hops, mesh_id},
    watermark::{Entered, Watermark},
};

/// How long the status tells of records that were deleted before they were processed.
const GAP_TOLD: Duration = Duration::from_secs(3600);

impl RouteLoop {
    pub(super) fn on_event(&mut self, event: Event) {
        match event {
            Event::Records(batch) => self.on_batch(batch),
            Event::Assigned(partitions) => self.on_assigned(partitions),
            Event::Revoking(revoking) => self.on_revoking(revoking),
            Event::Expired { partition, from, to } => self.on_expired(&partition, from, to),
            Event::Trouble(error) => {
                tracing::warn!(route = %self.route.name, %error, "waiting for the broker");
                self.broker_trouble = Some(error);
                self.post_now();
            }
            Event::Recovered => {
                tracing::info!(route = %self.route.name, "the broker is back");
                self.broker_trouble = None;
                self.post_now();
            }
        }
    }

    fn on_assigned(&mut self, partitions: Vec<Assigned>) {
        self.epoch += 1;
        self.joined = true;
        let names: Vec<String> = partitions.iter().map(|assigned| assigned.partition.to_string()).collect();
        tracing::info!(route = %self.route.name, partitions = names.join(" "), "partitions assigned");
        for Assigned { partition, position, metadata } in partitions {
            let watermark = Watermark::restore(self.epoch, position, if mutation::is(Mutation::ForgetMap) { "" } else { &metadata });
            let slot = Slot::new(partition.clone(), watermark, Role::Source(Box::default()));
            let index = self.put_slot(partition, slot);
            self.begin(index);
        }
        self.parts.metrics.rebalances.inc();
        self.lag_due = Instant::now();
        self.lag_measured_ms = 0;
        self.post_now();
        if self.draining.is_some() {
            self.hold_all();
        }
    }

    fn on_batch(&mut self, mut batch: Batch) {
        if mutation::is(Mutation::SwapRecords)
            && let [(_, one), (_, other), ..] = &mut batch.records[..]
        {
            std::mem::swap(one, other);
        }
        let Some(&index) = self.by_partition.get(&batch.partition) else { return };
        let slot = &self.slots[index as usize];
        if !slot.owned || slot.revoking || self.draining.is_some() {
            // It stays uncommitted: whoever owns the partition next reads it again.
            return;
        }
        if slot.watermark.incomplete() == 0 {
            self.slots[index as usize].moved = Instant::now();
        }
        for (offset, record) in batch.records {
            self.take(index, offset, record);
        }
        self.pass_gate(index);
        self.hold_or_release(index);
    }

    /// Takes a record in: its offset enters the watermark, and it gets its lane, or its end.
    fn take(&mut self, index: u32, offset: i64, record: Record) {
        let slot = &mut self.slots[index as usize];
        if slot.watermark.enter(offset, record.timestamp_ms.unwrap_or_default(), record.size()) != Entered::New {
            // Read before, or complete as the last commit says: whoever completed it has counted it.
            return;
        }
        let epoch = slot.watermark.epoch();
        let hops = hops(&record);
        let refused = match judge::intake(&self.route, &record, &slot.partition, offset, hops) {
            Intake::Deliver => None,
            // A copy for another route: redriven, or replayed.
            Intake::OtherRoute => {
                self.complete(index, epoch, offset, Disposition::Filtered, "other_route");
                return;
            }
            Intake::Filtered => {
                self.complete(index, epoch, offset, Disposition::Filtered, "");
                return;
            }
            Intake::DeadLetter { reason, detail } => Some((reason, detail)),
        };
        let position = Position { partition: slot.partition.clone(), offset };
        let delivery = Delivery {
            id: 0,
            mesh_id: mesh_id(&record, &position),
            route: self.route.clone(),
            record: Arc::new(record),
            position,
            attempt: 1,
            hops,
            traceparent: Bytes::new(),
        };
        let key = self.key_of(&delivery.record, offset);
        let job = Job::new(index, epoch, offset, key, delivery);
        if let Some((reason, detail)) = refused {
            // The service was never called.
            let job = Job { delivery: Delivery { attempt: 0, ..job.delivery }, ..job };
            return self.publish(job, What::DeadLetter { reason, detail }, None);
        }
        let parking = self.slots[index as usize].source().map(|source| &source.parking);
        let parking = parking.filter(|parking| !parking.is_empty() && !mutation::is(Mutation::ForgetParked));
        match parking.map_or(Meeting::Free, |parking| parking.meets(key, offset)) {
            Meeting::Free => {
                let forgets = mutation::is(Mutation::ForgetLane) && offset % 3 == 0;
                let lane = self.lane_of(index, key).filter(|_| !forgets);
                self.lanes.push(lane, job);
            }
            Meeting::Behind => self.park(job, None),
            // A crash came between its way to there and the commit here.
            Meeting::Known => drop(self.complete_offset(index, epoch, offset)),
        }
    }

    fn on_expired(&mut self, partition: &TopicPartition, from: i64, to: i64) {
        let Some(&index) = self.by_partition.get(partition) else { return };
        let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.owned && !slot.revoking) else { return };
        if to <= from {
            return;
        }
        slot.gap = Some((from, to));
        if self.route.on_gap == OnGap::Stop {
            slot.held = true;
            let partition = slot.partition.clone();
            self.consumer.hold(&partition);
            tracing::error!(
                route = %self.route.name, %partition, from, to, records = to - from,
                "the broker deleted records before they were processed: the partition stands still until the route is reset, or its on_gap changed"
            );
            self.post_now();
        }
        self.pass_gap(index);
    }

    /// Counts what the broker deleted, and goes on behind it, unless the route says that the partition stands still.
    pub(super) fn pass_gap(&mut self, index: u32) {
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        let Some((from, to)) = slot.gap.filter(|_| self.route.on_gap == OnGap::Earliest) else { return };
        slot.gap = None;
        slot.watermark.skip_to(to);
        let (partition, expired) = (slot.partition.clone(), to.saturating_sub(from).max(0).unsigned_abs());
        tracing::error!(route = %self.route.name, %partition, from, to, expired, "the broker deleted records before they were processed");
        self.count(Disposition::Expired, "", expired);
        self.pass_gate(index);
        let last = to.saturating_sub(1);
        let told = format!("the broker deleted {expired} records of {partition} before they were processed: offsets {from} to {last}");
        self.passed_gap = Some((Instant::now() + GAP_TOLD, told));
        self.post_now();
    }
}
