//! `guarantee: exactly_once`: what a route publishes and the offsets of its sources are one transaction.
//!
//! Lane and slot are free at the outcome, as everywhere; publications gather in the outbox in lane order, and leave in parcels, one
//! transaction at a time. Records that publish nothing complete at once, and their offsets go along.
//!
//! Invariant: a transaction's offsets, and the map of completed ones with them, cover the records of stored transactions and of this one, and
//! no other record that publishes something.
//! Invariant: while a transaction is under way no other commit is, and the last commits of a revoke are left out: it may store newer ones.

use std::collections::HashMap;

use futures_util::FutureExt as _;
use tokio::time::Instant;

use super::{
    outbox::{End, Parcel},
    route::RouteLoop,
};
use crate::{
    broker::TransactionError,
    mutation::{self, Mutation},
    watermark::Snapshot,
};

/// What a transaction came to.
pub(super) struct Transacted {
    parcel: Parcel,
    /// For each partition's slot and epoch what went along.
    commits: Vec<(u32, u64, Snapshot)>,
    began: Instant,
    result: Result<(), TransactionError>,
}

impl RouteLoop {
    /// Starts the next transaction if one is due and nothing is under way; if nothing is to be published, a plain commit.
    pub(super) fn start_transaction(&mut self, now: Instant) {
        self.outbox.note_waiting(now);
        if self.transaction.is_some() || self.commit.is_some() {
            return;
        }
        if !self.outbox.parcel_due(now, self.revoke.is_some() || self.draining.is_some()) {
            if self.may_commit() {
                self.start_commit(now);
            }
            return;
        }
        let slots = &self.slots;
        let ours = |slot: u32, epoch: u64| slots.get(slot as usize).is_some_and(|slot| slot.owned && slot.watermark.epoch() == epoch);
        let (mut parcel, dropped) = self.outbox.gather(ours);
        self.parts.metrics.late_acknowledgements.inc_by(dropped);
        self.mark(parcel.places(), true);
        let mut commits = self.settled();
        let full: HashMap<u32, i64> =
            commits.iter().filter(|(_, _, snapshot)| snapshot.unrecorded > 0).map(|(index, _, snapshot)| (*index, snapshot.end)).collect();
        if !full.is_empty() {
            // What the map has no room for would be done again after a crash: it waits until the watermark has come nearer.
            let deferred = self.outbox.defer(&mut parcel, |slot, offset| full.get(&slot).is_none_or(|end| offset < *end));
            self.mark(deferred.into_iter(), false);
            commits = self.settled();
        }
        if parcel.len() == 0 {
            return self.start_commit(now);
        }
        let records = self.outbox.pack(&mut parcel);
        parcel.contexts().for_each(|context| self.keep_context(Some(context.clone())));
        let mut span = self.commit_span();
        let offsets = if mutation::is(Mutation::ForgetOffsets) { Vec::new() } else { self.as_commits(&commits) };
        let transaction = self.consumer.transact(records, offsets);
        self.transaction = Some(
            transaction
                .map(move |result| {
                    if let (Err(error), Some(span)) = (&result, &mut span) {
                        span.fail("transaction", || error.to_string());
                    }
                    drop(span);
                    Transacted { parcel, commits, began: now, result }
                })
                .boxed(),
        );
    }

    /// Whether a plain commit has its turn: with transactions, only when nothing is to be published with it.
    pub(super) fn may_commit(&self) -> bool {
        !self.transactional || self.outbox.len() == 0 || self.outbox.trouble().is_some()
    }

    /// Marks records as settled by the transaction under way, or not any more.
    fn mark(&mut self, places: impl Iterator<Item = (u32, u64, i64)>, settling: bool) {
        for (index, epoch, offset) in places {
            if let Some(slot) = self.slots.get_mut(index as usize) {
                slot.watermark.settle(epoch, offset, settling);
            }
        }
    }

    /// What has to be committed with what settles. Also of partitions that are being revoked: they are ours until that is answered.
    fn settled(&self) -> Vec<(u32, u64, Snapshot)> {
        let snapshots = self.owned().map(|(index, slot)| (index, slot, slot.watermark.snapshot_settled()));
        let due = snapshots.filter(|(_, slot, snapshot)| snapshot.offset > slot.committed || snapshot.completed > slot.recorded);
        due.map(|(index, slot, snapshot)| (index, slot.watermark.epoch(), snapshot)).collect()
    }

    pub(super) fn on_transacted(&mut self, done: Transacted) {
        self.transaction = None;
        let Transacted { parcel, commits, began, result } = done;
        self.mark(parcel.places(), false);
        match result {
            Ok(()) => {
                self.note_committed(began, commits);
                for mut done in self.outbox.stored(parcel) {
                    done.context = None;
                    let current = self.slots.get(done.slot as usize).is_some_and(|slot| slot.watermark.epoch() == done.epoch);
                    if current {
                        self.on_published(done);
                    } else if let End::Ended(disposition, reason) = done.end {
                        // The partition went in the meantime, with its offset: nobody does the record again, or counts it.
                        self.count(disposition, reason, 1);
                    }
                }
            }
            Err(error) => {
                self.parts.metrics.commit_failures.inc();
                tracing::warn!(route = %self.route.name, publications = parcel.len(), %error, "a transaction was not stored: the answers are sent again");
                self.outbox.taken_back(parcel, &error);
            }
        }
    }

    /// At the end of a drain: waits for the transaction under way.
    pub(super) async fn finish_transaction(&mut self, end: Instant) {
        let Some(transaction) = &mut self.transaction else { return };
        match tokio::time::timeout_at(end, transaction).await {
            Ok(done) => self.on_transacted(done),
            Err(_) => tracing::warn!(route = %self.route.name, "a transaction had no end yet when the drain was over"),
        }
    }
}
