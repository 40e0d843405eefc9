//! Routes with `batch`: which records travel in one call, and what one of them that fails means for those behind it.
//!
//! Invariant: of one lane only one call is out. It may carry a run of the lane, whose outcomes are used in order up to the first failure: what
//! is behind a failure is delivered again behind it.
//! Invariant: a record that failed before travels as the last of its lane, so what is behind it is not handed out in vain again and again.
//! Invariant: an incomplete batch waits for more no longer than the route says, and not at all when its place comes later than that.

use mesh_routing::Batch;
use tokio::time::Instant;

use super::route::{Behind, RouteLoop};
use crate::{
    deliver::breaker::{self, Allowance},
    lanes::JobId,
};

/// Bytes of the records of one batch, at most; a single record that is larger travels alone.
const BYTES: usize = 1 << 20;

/// The batch that is being gathered.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    jobs: Vec<JobId>,
    bytes: usize,
    /// When its first record came.
    since: Option<Instant>,
    /// The next record does not fit.
    full: bool,
}

/// A call that is out, with some of its answers.
#[derive(Debug)]
pub(super) struct OutCall {
    began: Instant,
    left: usize,
    /// The best that is known of it, for the breaker, and why it is no better.
    note: Option<(breaker::Verdict, Option<String>)>,
}

impl RouteLoop {
    /// Hands out batches as long as there is room. `calls` is how many may be out.
    pub(super) fn dispatch_batches(&mut self, batch: Batch, calls: usize, now: Instant) {
        while self.draining.is_none() {
            self.gather(batch, now);
            let due = self.gathered.full || self.gathered_due(batch).is_some_and(|due| due <= now);
            let room = self.calls < calls && self.out + self.gathered.jobs.len() <= self.parts.leaf.room() && self.outbox.has_room();
            if self.gathered.jobs.is_empty() || !due || !room {
                return;
            }
            match self.breaker.allowance(now) {
                Allowance::Free => {}
                // A probe costs no more than it must.
                Allowance::Probe if self.calls == 0 => self.give_back(1),
                Allowance::Probe | Allowance::Wait(_) => return,
            }
            let jobs = std::mem::take(&mut self.gathered).jobs;
            self.lanes.end_batch();
            self.send_batch(&jobs, now);
        }
    }

    /// When the batch that is being gathered leaves though it is not full.
    pub(super) fn gathered_due(&self, batch: Batch) -> Option<Instant> {
        self.gathered.since.map(|since| since + batch.wait)
    }

    /// Whether a batch waits for its place or its time.
    pub(super) fn has_gathered(&self) -> bool {
        !self.gathered.jobs.is_empty()
    }

    fn gather(&mut self, batch: Batch, now: Instant) {
        self.gathered.full |= self.gathered.jobs.len() >= batch.max;
        while !self.gathered.full {
            let Some(id) = self.lanes.next_ready() else { return };
            if self.stands_still(id) {
                continue;
            }
            let Some(job) = self.lanes.get(id) else { continue };
            let (size, first) = (job.delivery.record.size(), job.delivery.attempt == 1);
            if !self.gathered.jobs.is_empty() && self.gathered.bytes + size > BYTES {
                self.lanes.put_back(id);
                self.gathered.full = true;
                return;
            }
            if first {
                self.lanes.follow(id);
            }
            self.gathered.since.get_or_insert(now);
            self.gathered.jobs.push(id);
            self.gathered.bytes += size;
            self.gathered.full = self.gathered.jobs.len() >= batch.max;
        }
    }

    /// Gives back what was gathered, but the first `keep` records.
    pub(super) fn give_back(&mut self, keep: usize) {
        for id in self.gathered.jobs.drain(keep.min(self.gathered.jobs.len())..) {
            self.lanes.put_back(id);
        }
        if self.gathered.jobs.is_empty() {
            self.gathered = Gathered::default();
        }
        self.lanes.end_batch();
    }

    fn send_batch(&mut self, jobs: &[JobId], now: Instant) {
        let call = jobs.first().map_or(0, |id| id.get());
        let mut batch = Vec::with_capacity(jobs.len());
        for id in jobs {
            if let Some(delivery) = self.prepare(*id, Some(call), now) {
                batch.push(delivery);
            }
        }
        if batch.is_empty() {
            return;
        }
        self.calls += 1;
        self.parts.metrics.batch_size.observe(batch.len());
        self.out_calls.insert(call, OutCall { began: now, left: batch.len(), note: None });
        self.parts.leaf.dispatch_batch(batch);
    }

    /// Takes note of one answer of a call. The last one says how the call went: it is good if any of its records was, so that one bad record
    /// does not open the breaker, and failed if none was, so that a failed call counts once.
    pub(super) fn note_call(&mut self, call: u64, note: Option<(breaker::Verdict, Option<String>)>, now: Instant) {
        let Some(out) = self.out_calls.get_mut(&call) else { return };
        out.left -= 1;
        let rank = |verdict: breaker::Verdict| match verdict {
            breaker::Verdict::Good => 2,
            breaker::Verdict::Failed => 1,
            breaker::Verdict::Away => 0,
        };
        if let Some(note) = note
            && out.note.as_ref().is_none_or(|known| rank(note.0) > rank(known.0))
        {
            out.note = Some(note);
        }
        if out.left == 0
            && let Some(out) = self.out_calls.remove(&call)
        {
            // Of a call without a note, all failures were its records' own.
            if let Some((note, _)) = &out.note {
                self.note_limit(*note, out.began, now);
            }
            self.calls -= 1;
            if let Some((note, reason)) = out.note {
                self.note_service(note, reason.as_deref(), now);
            }
        }
    }

    /// Takes back a record whose outcome is not used, since one before it in its lane failed in the same batch.
    pub(super) fn behind_failure(&mut self, id: JobId) {
        self.parts.metrics.outcomes_behind.inc();
        match self.lanes.get(id).map_or(Behind::Dropped, |job| job.behind) {
            Behind::Nothing => self.lanes.put_back(id),
            // The partition is on its way out: whoever owns it next reads the record again.
            Behind::Dropped => drop(self.lanes.finish(id)),
            Behind::Aside => {
                if let Some(job) = self.lanes.finish(id) {
                    self.follow_aside(job);
                }
            }
        }
    }

    /// Ends a record that failed while its partition is on its way out: whoever reads it next tries again. What went behind it in the same
    /// batch must not overtake it, whatever becomes of it here.
    pub(super) fn drop_failed(&mut self, id: JobId) {
        self.mark_behind(id, Behind::Dropped);
        self.lanes.finish(id);
    }

    /// Marks what is at the service behind a record.
    pub(super) fn mark_behind(&mut self, id: JobId, mark: Behind) {
        let mut behind = self.lanes.behind(id);
        while let Some(next) = behind {
            if let Some(job) = self.lanes.get_mut(next) {
                job.behind = mark;
            }
            behind = self.lanes.behind(next);
        }
    }
}
