//! What is still open, and what must hold in the end.

use std::collections::{BTreeMap, BTreeSet};

use mesh_routing::Order;

use super::super::{
    sides::{Waiting, is_done},
    world::Life,
};
use super::{Checked, End, Ledger, Publication, Source, What, lane_key};
use crate::{outcome::Disposition, record::TopicPartition};

impl Ledger {
    /// What is not complete yet, in words; `None` if everything is.
    pub(in crate::consume::sim) fn open(&self) -> Option<String> {
        for (partition, records) in &self.sources {
            for (offset, source) in records.iter().enumerate() {
                if !self.complete(partition, offset as i64, source) && !self.stays_parked(partition, offset as i64, source) {
                    return Some(format!("{partition}/{offset} has no end: {source:?}"));
                }
            }
        }
        None
    }

    /// Whether a record waits for somebody, or for one that does, and the plan leaves it there.
    fn stays_parked(&self, partition: &TopicPartition, offset: i64, source: &Source) -> bool {
        let kept = |offset: i64| self.sides.waiting(&self.commits_made, partition, offset).any(|waiting| waiting.kept && waiting.sure);
        let mut before = self.sources[partition].iter().enumerate().take(offset as usize);
        let behind = || {
            self.waits_elsewhere(&self.commits_made, partition, offset)
                && before.any(|(earlier, other)| self.plan.same_lane(lane_key(source), lane_key(other)) && kept(earlier as i64))
        };
        self.plan.leaves_parked && (kept(offset) || { behind }())
    }

    /// What lies in a retry or park topic and should not, in words.
    pub(in crate::consume::sim) fn left_over(&self) -> Option<String> {
        let waits = |(partition, offset, waiting): &(&TopicPartition, i64, &Waiting)| {
            let parked =
                || self.source(&waiting.of, waiting.origin).is_some_and(|source| self.stays_parked(&waiting.of, waiting.origin, source));
            let looked_at = || self.is_looked_at(&self.commits_made, &waiting.of, partition);
            !waiting.stale && !is_done(&self.commits_made, partition, *offset) && looked_at() && !parked()
        };
        let (partition, offset, waiting) = self.sides.all().find(waits)?;
        Some(format!("{partition}/{offset} is left over: {waiting:?}"))
    }

    /// How many records should have been counted as ended, where nothing goes wrong.
    pub(in crate::consume::sim) fn ended(&self) -> u64 {
        let all = self
            .sources
            .iter()
            .flat_map(|(partition, records)| records.iter().enumerate().map(move |(offset, source)| (partition, offset, source)));
        all.filter(|(partition, offset, source)| !source.hidden && !self.stays_parked(partition, *offset as i64, source)).count() as u64
    }

    /// Where a group must stand at the end.
    pub(in crate::consume::sim) fn expected(&self) -> BTreeMap<TopicPartition, i64> {
        let of = |(partition, records): (&TopicPartition, &Vec<Source>)| {
            let last = records.iter().rposition(|source| !source.hidden).map_or(0, |last| last as i64 + 1);
            (partition.clone(), last.max(self.lows.get(partition).copied().unwrap_or(0)))
        };
        self.sources.iter().map(of).collect()
    }

    /// What must hold of the whole, at the end.
    pub(in crate::consume::sim) fn close(&self) -> Checked {
        for (partition, log) in &self.logs {
            self.in_order(partition, log)?;
        }
        let produce = &self.plan.produce;
        // What fails in a retry topic may be tried twice, by two owners.
        if produce.fatal + produce.timed_out == 0 {
            for (publication, stored) in &self.stored {
                let source = self.source(&publication.of, publication.offset);
                let answers = source.map_or(0, |source| source.ends.len() as u32);
                let untouched = source.is_some_and(|source| self.untouched(source).is_some());
                if *stored > answers.max(1) && !untouched {
                    return Err(format!("{publication:?} is stored {stored} times for {answers} answers"));
                }
            }
        }
        Ok(())
    }

    /// Replies and letters of a lane are in order, by their first copies. Those without a key go to any partition, so they have none;
    /// nobody waits for what expired.
    fn in_order(&self, place: &TopicPartition, log: &[Publication]) -> Checked {
        let mut seen = BTreeSet::new();
        let mut last: BTreeMap<(&TopicPartition, Option<u64>), &Publication> = BTreeMap::new();
        // A reply that the broker refused becomes a letter later.
        for publication in log.iter().filter(|p| p.what != What::Letter("reply".to_owned())) {
            let Some(source) = self.source(&publication.of, publication.offset) else { continue };
            let order = self.plan.routes[0].order;
            let dead = source.ends.iter().any(|end| matches!(end, End::Dead(_)));
            let two_ends = dead && source.ends.iter().any(|end| !matches!(end, End::Dead(_)));
            let unordered =
                order == Order::None || source.planned.key.is_none() || source.expired || self.untouched(source).is_some() || two_ends;
            if unordered || !seen.insert(publication) {
                continue;
            }
            let key = if order == Order::Key { lane_key(source) } else { None };
            if let Some(before) = last.insert((&publication.of, key), publication)
                && (before.offset, &before.what) > (publication.offset, &publication.what)
            {
                return Err(format!("in {place}, {before:?} is before {publication:?}"));
            }
        }
        Ok(())
    }

    /// How many records ended how, where nothing goes wrong.
    pub(in crate::consume::sim) fn dispositions(&self) -> BTreeMap<Disposition, u64> {
        let mut counts = BTreeMap::new();
        for source in self.sources.values().flatten().filter(|source| !source.hidden) {
            let disposition = match (self.untouched(source), source.ends.first()) {
                (Some(None), _) => Disposition::Filtered,
                (Some(Some(_)), _) | (None, Some(End::Dead(_) | End::Forward { big: true, .. })) => Disposition::DeadLettered,
                (None, Some(End::Forward { .. })) => Disposition::Forwarded,
                (None, Some(End::Void)) => Disposition::Void,
                (None, Some(End::Ignored)) => Disposition::Ignored,
                (None, None) => continue,
            };
            *counts.entry(disposition).or_default() += 1;
        }
        counts
    }

    /// Whether a life waits for its service, or may do so.
    pub(in crate::consume::sim) fn waits(&self, life: &Life) -> bool {
        let trust = self.owners.get(&(life.process, life.number)).and_then(|owner| owner.trust.as_ref());
        trust.is_some_and(|trust| trust.unsure || trust.breaker.is_open())
    }

    /// Whether it is known for sure which failures counted.
    pub(in crate::consume::sim) fn is_sure(&self) -> bool {
        self.owners.values().filter_map(|owner| owner.trust.as_ref()).all(|trust| !trust.unsure) && !self.retried && !self.discarded
    }

    /// How many answers the service of a life gave, those that are out left aside.
    pub(in crate::consume::sim) fn answers(&self, life: &Life) -> u64 {
        self.owners.get(&(life.process, life.number)).map_or(0, |owner| owner.deliveries - owner.out.len() as u64)
    }
}
