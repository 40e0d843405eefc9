//! Where one record is at the owner of its partition: what the records alone do not tell (`mesh-ctl explain`).
//!
//! Invariant: looking changes nothing.

use std::cmp::Reverse;

use tokio::time::Instant;

use super::route::{Job, RouteLoop};
use crate::{
    command::{Held, RecordStage},
    record::Position,
};

impl RouteLoop {
    /// How far a record of a source is; `None` if its partition is not ours. Costs as much as there are records in memory.
    pub(super) fn look_up(&self, at: &Position, now: Instant) -> Option<Held> {
        let slot = self.by_partition.get(&at.partition).and_then(|index| self.slots.get(*index as usize))?;
        let source = slot.source().filter(|_| slot.owned && !slot.revoking)?;
        // One whose partition was given away in between may be at the service still, beside the one that counts.
        let epoch = |job: &Job| self.slots.get(job.slot as usize).map(|slot| slot.watermark.epoch());
        let is_it = |job: &Job| job.delivery.position == *at && epoch(job) == Some(job.epoch);
        let told = |stage, job: &Job| {
            // The number of an attempt that is yet to come is not one of an attempt that was.
            let to_come = u32::from(!matches!(stage, RecordStage::AtService(_)));
            (stage, job.delivery.attempt.saturating_sub(to_come), job.failure.clone())
        };
        let delayed = || self.sides.delayed.iter().find(|(_, waiting)| is_it(&waiting.job));
        let kept = || source.stopped.as_ref().and_then(|stopped| Some((stopped, stopped.aside.iter().position(is_it)?)));
        let (stage, attempts, failure) = if let Some((id, job)) = self.lanes.find(is_it) {
            let due = self.backoffs.iter().find(|Reverse((_, waits))| *waits == id).map(|Reverse((due, _))| *due);
            match (job.out, due) {
                (Some(since), _) => told(RecordStage::AtService(now.saturating_duration_since(since)), job),
                (None, Some(due)) => told(RecordStage::BackingOff(due.saturating_duration_since(now)), job),
                (None, None) => told(RecordStage::Waiting, job),
            }
        } else if let Some(((due, _), waiting)) = delayed() {
            told(RecordStage::BackingOff(due.saturating_duration_since(now)), &waiting.job)
        } else if let Some((stopped, place)) = kept() {
            // The first stopped the partition; the others were to run after it.
            match (place, &stopped.aside[place]) {
                (0, job) => (RecordStage::Exhausted, job.delivery.attempt, stopped.detail.clone()),
                (_, job) => told(RecordStage::Waiting, job),
            }
        } else {
            let stage = match at.offset {
                offset if slot.watermark.is_complete(offset) => RecordStage::Complete,
                offset if offset >= slot.watermark.next() => RecordStage::Unread,
                _ => RecordStage::Publishing,
            };
            (stage, 0, String::new())
        };
        Some(Held { stage, attempts, failure, waits_for: self.state().1 })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        consume::tests::{Mesh, broker},
        outcome::{Answer, Delivery, Outcome},
        record::TopicPartition,
    };

    const ROUTE: &str = "  - { name: work, service: worker, deliver: stream, from: [in], to: void, on_exhausted: stop,
        retry: { attempts: 2, initial: 1h, max: 1h }, breaker: { failures: 1000, open: 1s } }";

    /// A record from its reading to its end, as its owner tells of it.
    #[tokio::test(start_paused = true)]
    async fn a_record_is_followed_through_its_route() {
        let mesh = Mesh::on(broker(), ROUTE);
        mesh.publish("in", ["0", "1"].map(|value| ("k".to_owned(), value.to_owned()))).await;
        let desk = mesh.desk("work").await;
        let take = async || -> Delivery {
            loop {
                if let Some(delivery) = desk.take(8, Duration::from_secs(1)).await.unwrap().pop() {
                    return delivery;
                }
            }
        };
        let first = take().await;
        let at = |offset| Position { offset, ..first.position.clone() };
        let look = async |offset| mesh.ask.look_up("work", at(offset)).await.unwrap();
        // Until an answer was heard.
        let after = async |stage: fn(RecordStage) -> bool| loop {
            let held = look(0).await;
            if stage(held.stage) {
                return held;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        tokio::time::sleep(Duration::from_secs(3)).await;
        let held = look(0).await;
        assert!(matches!(held.stage, RecordStage::AtService(time) if time >= Duration::from_secs(3)), "{held:?}");
        assert_eq!((held.attempts, &*held.failure, &*held.waits_for), (1, "", ""));
        assert_eq!((look(1).await.stage, look(1).await.attempts), (RecordStage::Waiting, 0), "behind the first of its key");
        assert_eq!(look(2).await.stage, RecordStage::Unread);
        let elsewhere = Position { partition: TopicPartition::new("out", 0), offset: 0 };
        assert_eq!(mesh.ask.look_up("work", elsewhere).await, None);
        assert_eq!(mesh.ask.look_up("nobody", at(0)).await, None);

        let failed = |id| vec![Answer { id, outcome: Outcome::Retry { reason: "not yet".to_owned(), after: None } }];
        desk.answer(failed(first.id));
        let held = after(|stage| matches!(stage, RecordStage::BackingOff(_))).await;
        assert!(matches!(held.stage, RecordStage::BackingOff(due) if due > Duration::from_secs(1_000)), "{held:?}");
        assert_eq!((held.attempts, &*held.failure), (1, "not yet"));
        let again = take().await;
        let held = look(0).await;
        assert!(matches!(held.stage, RecordStage::AtService(_)) && held.attempts == 2 && held.failure == "not yet", "{held:?}");
        desk.answer(failed(again.id));
        let held = after(|stage| stage == RecordStage::Exhausted).await;
        assert!(held.attempts == 2 && held.failure.contains("not yet") && !held.waits_for.is_empty(), "{held:?}");

        assert_eq!(mesh.ask.release("work", None, crate::parking::Release::Retry, Vec::new()).await.records, 1);
        for offset in 0..2 {
            let delivery = take().await;
            assert_eq!(delivery.position.offset, offset);
            desk.answer(vec![Answer { id: delivery.id, outcome: Outcome::Ignore }]);
        }
        mesh.ended("work", 2).await;
        assert_eq!((look(0).await.stage, look(1).await.stage), (RecordStage::Complete, RecordStage::Complete));
        mesh.end().await;
    }
}
