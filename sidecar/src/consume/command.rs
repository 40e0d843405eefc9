//! Commands to a route's loop: partitions that are to be read from elsewhere, records that are released, and those that are looked up.
//!
//! A partition that is reset stops as one that is given away: what waits is dropped, what is at the service is awaited with its replies. Then
//! the new offset is committed, synchronously and without metadata, and reading goes on there with a fresh watermark in a new epoch. What lies in
//! its retry and park topics stays there, and is looked through again first.
//!
//! Invariant: a reset whose commit failed, or that waited too long, changes nothing: reading goes on at the watermark.
//! Invariant: a partition that is given away meanwhile is not reset; its next owner has to be asked. The same goes for released records that were not
//! stored yet where they stay released.

use futures_util::FutureExt as _;
use tokio::{sync::oneshot, time::Instant};

use super::{
    park::Role,
    route::{CommitResult, RouteLoop, Slot},
};
use crate::{
    broker::{BrokerError, BrokerErrorKind, Commit},
    command::{Command, Released, Reset, Task},
    record::TopicPartition,
    tiers::Kind,
    watermark::Watermark,
};

/// A command that is not answered yet.
pub(super) struct Ordered {
    targets: Vec<Target>,
    deadline: Instant,
    answers: Vec<(TopicPartition, Reset)>,
    answer: oneshot::Sender<Vec<(TopicPartition, Reset)>>,
}

/// A release that is not answered yet.
pub(super) struct Releasing {
    /// What is on its way to where it stays released.
    pub(super) moving: Vec<Moving>,
    /// What is there.
    pub(super) released: Released,
    pub(super) answer: oneshot::Sender<Released>,
}

/// Released records of a source.
pub(super) struct Moving {
    /// The source's slot, and its epoch.
    pub(super) of: u32,
    pub(super) epoch: u64,
    /// Where they lie in the park topic.
    pub(super) parked: Vec<i64>,
    /// Once none does any more: what a commit has to record of the park topic, since what lies there counts else after a crash.
    pub(super) due: Option<u64>,
}

/// A partition that drains before it is reset.
struct Target {
    slot: u32,
    epoch: u64,
    offset: i64,
    committing: bool,
}

impl RouteLoop {
    pub(super) fn on_command(&mut self, command: Command) {
        if self.draining.is_some() {
            return command.not_owner();
        }
        let (reset, deadline, answer) = match command.task {
            Task::Reset { partitions, deadline, answer } => (partitions, deadline, answer),
            Task::Release { key, how, only, answer } => return self.release(key.as_ref(), how, &only, answer),
            Task::LookUp { at, answer } => return drop(answer.send(self.look_up(&at, Instant::now()))),
        };
        let mut ordered = Ordered { targets: Vec::with_capacity(reset.len()), deadline, answers: Vec::new(), answer };
        let mut sources = Vec::with_capacity(reset.len());
        for (partition, offset) in reset {
            let index = self.by_partition.get(&partition).copied();
            let again = index.is_some_and(|index| self.is_reset(index) || ordered.targets.iter().any(|target| target.slot == index));
            let slot = index.and_then(|index| self.slots.get_mut(index as usize)).filter(|slot| slot.owned);
            match (index, slot) {
                (_, Some(_)) if again => ordered.answers.push((partition, Reset::Failed("another reset of it is under way".to_owned()))),
                (Some(index), Some(slot)) if !slot.revoking => {
                    slot.revoking = true;
                    self.consumer.hold(&partition);
                    sources.push(index);
                    ordered.targets.push(Target { slot: index, epoch: slot.watermark.epoch(), offset, committing: false });
                }
                _ => ordered.answers.push((partition, Reset::NotOwner)),
            }
        }
        if !ordered.targets.is_empty() {
            tracing::info!(route = %self.route.name, partitions = ordered.targets.len(), "partitions drain before they are reset");
            for side in self.sides_of(&sources) {
                if let Some(slot) = self.slots.get_mut(side as usize) {
                    slot.revoking = true;
                }
            }
            self.abandon_waiting(false);
        }
        self.ordered.push(ordered);
    }

    fn is_reset(&self, index: u32) -> bool {
        self.ordered.iter().flat_map(|ordered| &ordered.targets).any(|target| target.slot == index)
    }

    /// When a reset has waited long enough.
    pub(super) fn command_wake(&self) -> Option<Instant> {
        // While a transaction is under way its end is waited for, beyond the deadline if need be: what it stores must not be done again.
        let waits = |ordered: &&Ordered| ordered.targets.iter().any(|target| !target.committing);
        self.ordered.iter().filter(waits).map(|ordered| ordered.deadline).min().filter(|_| self.transaction.is_none())
    }

    /// Commits the partitions that have drained, gives up those that take too long, and answers what is done.
    pub(super) fn serve_commands(&mut self, now: Instant) {
        self.serve_releases();
        if self.ordered.is_empty() {
            return;
        }
        let mut all = std::mem::take(&mut self.ordered);
        // What was done of retry and park topics is committed with it: they are looked through anew from there.
        let (mut due, mut beside) = (Vec::new(), Vec::new());
        for ordered in &mut all {
            let mut left = Vec::with_capacity(ordered.targets.len());
            for mut target in std::mem::take(&mut ordered.targets) {
                let sides = self.sides_of(&[target.slot]);
                let Some(slot) = self.slots.get(target.slot as usize) else { continue };
                let partition = slot.partition.clone();
                if !target.committing {
                    let asides = sides.iter().filter_map(|side| self.slots.get(*side as usize));
                    let busy = slot.busy + asides.map(|side| side.busy).sum::<usize>();
                    if !slot.owned || slot.watermark.epoch() != target.epoch || self.is_revoked(target.slot) || self.draining.is_some() {
                        ordered.answers.push((partition, Reset::NotOwner));
                        continue;
                    }
                    // A transaction under way may hold a newer offset of it.
                    if busy == 0 && self.commit.is_none() && self.transaction.is_none() {
                        target.committing = true;
                        due.push((target.slot, target.epoch, Commit { partition, offset: target.offset, metadata: String::new() }));
                        let done = self.commits(sides.into_iter());
                        beside.extend(self.as_commits(&done));
                    } else if now >= ordered.deadline && self.transaction.is_none() {
                        self.go_on(target.slot);
                        let detail = format!("{busy} of its records were still at the service, or on their way to the broker");
                        ordered.answers.push((partition, Reset::Failed(detail)));
                        continue;
                    }
                }
                left.push(target);
            }
            ordered.targets = left;
        }
        if !due.is_empty() {
            let resets = due.iter().map(|(slot, epoch, commit)| (*slot, *epoch, commit.offset)).collect();
            let commit = self.consumer.commit(due.into_iter().map(|(_, _, commit)| commit).chain(beside).collect());
            // In the place of the loop's own commit: there is one at a time, and a revoke waits for it.
            self.commit = Some(commit.map(move |result| CommitResult { commits: Vec::new(), resets, began: now, result }).boxed());
        }
        for ordered in all {
            if ordered.targets.is_empty() {
                // Whoever asked may be gone.
                drop(ordered.answer.send(ordered.answers));
            } else {
                self.ordered.push(ordered);
            }
        }
    }

    /// Answers releases whose records are where they stay released. Who does not wait any more is not answered.
    fn serve_releases(&mut self) {
        for mut releasing in std::mem::take(&mut self.releasing) {
            let Releasing { moving, released, .. } = &mut releasing;
            moving.retain_mut(|Moving { of, epoch, parked, due }| {
                let source = self.slots.get(*of as usize).filter(|slot| slot.owned && slot.watermark.epoch() == *epoch);
                let park = self.side_of(*of, Kind::Park).and_then(|park| self.slots.get(park as usize));
                let Some((source, park)) = source.zip(park) else { return false };
                while parked.last().is_some_and(|offset| park.watermark.is_complete(*offset)) {
                    parked.pop();
                    released.records += 1;
                }
                if !parked.is_empty() || park.recorded < *due.get_or_insert(park.watermark.completed()) {
                    return true;
                }
                released.partitions.push(source.partition.clone());
                false
            });
            if releasing.moving.is_empty() {
                // Whoever asked may be gone.
                drop(releasing.answer.send(releasing.released));
            } else if !releasing.answer.is_closed() {
                self.releasing.push(releasing);
            }
        }
    }

    fn is_revoked(&self, index: u32) -> bool {
        self.revoke.as_ref().is_some_and(|revoke| revoke.slots.contains(&index))
    }

    /// The commit of resets came back.
    pub(super) fn on_reset(&mut self, resets: Vec<(u32, u64, i64)>, result: &Result<(), BrokerError>) {
        for (index, epoch, offset) in resets {
            let Some(slot) = self.slots.get_mut(index as usize) else { continue };
            let (partition, ours) = (slot.partition.clone(), slot.owned && slot.watermark.epoch() == epoch);
            let from = slot.watermark.offset();
            let outcome = match result {
                Ok(()) => {
                    tracing::info!(route = %self.route.name, %partition, from, to = offset, "partition reset");
                    if ours {
                        self.epoch += 1;
                        slot.watermark = Watermark::new(self.epoch, offset);
                        slot.committed = offset;
                        slot.recorded = 0;
                        slot.unrecorded = 0;
                        self.go_on(index);
                    }
                    Reset::Done { from }
                }
                Err(error) => {
                    if ours {
                        self.go_on(index);
                    }
                    match error.kind {
                        BrokerErrorKind::Fenced => Reset::NotOwner,
                        _ => Reset::Failed(format!("the commit failed: {error}")),
                    }
                }
            };
            for ordered in &mut self.ordered {
                let before = ordered.targets.len();
                ordered.targets.retain(|target| (target.slot, target.epoch) != (index, epoch));
                if ordered.targets.len() < before {
                    ordered.answers.push((partition.clone(), outcome.clone()));
                }
            }
        }
        self.post_now();
    }

    /// Lets a partition that was stopped go on at its watermark. In a new epoch: an answer that comes late completes nothing.
    fn go_on(&mut self, index: u32) {
        if self.is_revoked(index) {
            return;
        }
        for side in self.sides_of(&[index]) {
            self.epoch += 1;
            let epoch = self.epoch;
            if let Some(slot) = self.slots.get_mut(side as usize) {
                slot.give_away(epoch);
            }
            self.recount(side);
        }
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        let (snapshot, partition) = (slot.watermark.snapshot(), slot.partition.clone());
        let (position, committed) = (snapshot.offset, slot.committed);
        self.epoch += 1;
        // Should the new position not exist either, the consumer says so again.
        let watermark = Watermark::restore(self.epoch, position, &snapshot.metadata);
        let (high, end) = (slot.high, slot.end);
        *slot = Slot { committed, high, end, ..Slot::new(partition.clone(), watermark, Role::Source(Box::default())) };
        self.recount(index);
        self.consumer.seek(&partition, position);
        if self.draining.is_none() {
            self.begin(index);
        }
    }
}
