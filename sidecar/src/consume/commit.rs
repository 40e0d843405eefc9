//! How records end, and how that is committed: completion, commits back to back, revokes, and the drain.

use std::{cmp::Reverse, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::{Instant, timeout_at};

use super::{
    outbox::{Done, End},
    route::{CommitResult, Revoke, RouteLoop, Slot},
};
use crate::{
    broker::{BrokerErrorKind, Commit, Revoking},
    mutation::{self, Mutation},
    outcome::Disposition,
    telemetry::trace::{Span, SpanKind, TraceContext},
    watermark::{Completion, Snapshot},
};

/// How long a revoke waits for what is at the service. The consumer's own deadline is longer.
const REVOKE: Duration = Duration::from_millis(1_800);
/// The pause before a commit that failed is tried again.
const COMMIT_PAUSE: Duration = Duration::from_millis(200);
/// What of a drain's time is kept for its end, at most: the last commit, and leaving the group.
const LEAVING: Duration = Duration::from_secs(5);
/// How long the end waits for what is being committed.
const LAST: Duration = Duration::from_secs(3);
/// How many spans a commit is linked to at most.
const COMMIT_LINKS: usize = 16;

impl RouteLoop {
    pub(super) fn on_published(&mut self, done: Done) {
        self.slot_busy(done.slot, done.epoch, -1);
        self.keep_context(done.context);
        let settled = match done.end {
            End::Ended(disposition, reason) => self.complete(done.slot, done.epoch, done.offset, disposition, reason),
            End::Aside => {
                if self.complete_offset(done.slot, done.epoch, done.offset)
                    && let of = self.source_of(done.slot)
                    && let Some(parking) = self.parking(of)
                {
                    parking.stored(done.key, done.origin);
                }
                false
            }
        };
        if settled {
            self.settle(done.slot, done.key, done.origin);
        }
    }

    /// A record has its disposition. Says whether its partition is still ours.
    pub(super) fn complete(&mut self, index: u32, epoch: u64, offset: i64, disposition: Disposition, reason: &'static str) -> bool {
        let ours = self.complete_offset(index, epoch, offset);
        if ours {
            self.count(disposition, reason, 1);
        }
        ours
    }

    /// An offset is complete. Says whether its partition is still ours.
    pub(super) fn complete_offset(&mut self, index: u32, epoch: u64, offset: i64) -> bool {
        let Some(slot) = self.slots.get_mut(index as usize) else { return false };
        let epoch = if mutation::is(Mutation::ForgetEpoch) { slot.watermark.epoch() } else { epoch };
        match slot.watermark.complete(epoch, offset) {
            Completion::Stale => {
                // Its partition was given away meanwhile: the offset is not ours to complete.
                self.parts.metrics.late_acknowledgements.inc();
                return false;
            }
            Completion::Advanced => slot.moved = Instant::now(),
            Completion::Above => {}
        }
        self.hold_or_release(index);
        true
    }

    pub(super) fn count(&mut self, disposition: Disposition, reason: &'static str, records: u64) {
        self.parts.metrics.ended(disposition, reason, records);
        *self.dispositions.entry(disposition).or_default() += records;
    }

    /// Keeps a record's trace context for the link from its commit.
    pub(super) fn keep_context(&mut self, context: Option<TraceContext>) {
        if let Some(context) = context
            && self.parts.tracer.enabled()
            && self.commit_contexts.len() < COMMIT_LINKS
        {
            self.commit_contexts.push(context);
        }
    }

    /// What has to be committed of these partitions.
    pub(super) fn commits(&self, slots: impl Iterator<Item = u32>) -> Vec<(u32, u64, Snapshot)> {
        let slots = slots.filter_map(|index| Some((index, self.slots.get(index as usize)?)));
        let due = slots.filter(|(_, slot)| slot.is_uncommitted());
        let snapshot = |slot: &Slot| match mutation::is(Mutation::CommitNewest) {
            true => Snapshot { offset: slot.watermark.next(), metadata: String::new(), ..slot.watermark.snapshot() },
            false => slot.watermark.snapshot(),
        };
        due.map(|(index, slot)| (index, slot.watermark.epoch(), snapshot(slot))).collect()
    }

    /// The same for the broker.
    pub(super) fn as_commits(&self, snapshots: &[(u32, u64, Snapshot)]) -> Vec<Commit> {
        let commits = snapshots.iter().filter_map(|(index, _, snapshot)| {
            let partition = self.slots.get(*index as usize)?.partition.clone();
            Some(Commit { partition, offset: snapshot.offset, metadata: snapshot.metadata.clone() })
        });
        commits.collect()
    }

    /// Starts the next commit, if there is something to commit and none is under way.
    pub(super) fn start_commit(&mut self, now: Instant) {
        if self.commit.is_some() || self.commit_again.is_some_and(|again| now < again) {
            return;
        }
        self.commit_again = None;
        let due = self.commits(self.slots.iter().enumerate().filter(|(_, s)| s.owned && !s.revoking).map(|(index, _)| index as u32));
        if due.is_empty() {
            return;
        }
        let mut span = self.commit_span();
        let commit = self.consumer.commit(self.as_commits(&due));
        self.commit = Some(
            commit
                .map(move |result| {
                    if let (Err(error), Some(span)) = (&result, &mut span) {
                        span.fail("commit", || error.to_string());
                    }
                    drop(span);
                    CommitResult { commits: due, resets: Vec::new(), began: now, result }
                })
                .boxed(),
        );
    }

    /// The span of a commit, linked to those of the records.
    pub(super) fn commit_span(&mut self) -> Option<Span> {
        let contexts = std::mem::take(&mut self.commit_contexts);
        let parent = contexts.first()?;
        let mut span = self.parts.tracer.start(SpanKind::Client, || format!("commit {}", self.route.group), Some(parent));
        contexts.iter().for_each(|context| span.link(context));
        let system = self.parts.broker.system();
        span.set("messaging.system", || system.into());
        span.set("messaging.operation.type", || "settle".into());
        span.set("messaging.operation.name", || "commit".into());
        span.set("messaging.consumer.group.name", || self.route.group.clone().into());
        span.set("mesh.route", || self.route.name.clone().into());
        Some(span)
    }

    /// Notes what a commit, or a transaction, stored.
    pub(super) fn note_committed(&mut self, began: Instant, commits: Vec<(u32, u64, Snapshot)>) {
        self.parts.metrics.commits.inc();
        self.parts.metrics.commit_duration.observe(began.elapsed());
        for (index, epoch, snapshot) in commits {
            if let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.watermark.epoch() == epoch) {
                slot.committed = slot.committed.max(snapshot.offset);
                slot.recorded = snapshot.completed;
                slot.unrecorded = snapshot.unrecorded;
            }
        }
    }

    pub(super) fn on_committed(&mut self, done: CommitResult) {
        self.commit = None;
        if !done.resets.is_empty() {
            return self.on_reset(done.resets, &done.result);
        }
        self.commit_failed = done.result.as_ref().err().map(|error| error.kind);
        match done.result {
            Ok(()) => self.note_committed(done.began, done.commits),
            Err(error) => {
                self.parts.metrics.commit_failures.inc();
                match error.kind {
                    // What it was about is another member's, or the group settles anew: no news in a rebalance.
                    BrokerErrorKind::Fenced => tracing::debug!(route = %self.route.name, %error, "a commit is void: partitions move"),
                    _ => {
                        tracing::warn!(route = %self.route.name, %error, "a commit failed: the offsets are committed again with the next one")
                    }
                }
                self.commit_again = Some(Instant::now() + COMMIT_PAUSE);
            }
        }
    }

    pub(super) fn on_revoking(&mut self, revoking: Revoking) {
        // One that is not answered yet has been given up by the consumer (this process stood still): what it was about is gone.
        if let Some(deadline) = self.revoke.as_ref().map(|revoke| revoke.deadline) {
            self.answer_revoke(deadline);
        }
        let mut slots: Vec<u32> = revoking.partitions.iter().filter_map(|partition| self.by_partition.get(partition).copied()).collect();
        let sides = self.sides_of(&slots);
        slots.extend(sides);
        let names: Vec<String> = revoking.partitions.iter().map(ToString::to_string).collect();
        tracing::info!(route = %self.route.name, partitions = names.join(" "), lost = revoking.lost, "partitions revoked");
        for index in &slots {
            if let Some(slot) = self.slots.get_mut(*index as usize) {
                slot.revoking = true;
            }
        }
        // Whether the next assignment brings any of them back is not known: until then "nothing is behind" would be a guess.
        self.joined &= !revoking.lost || self.owned().any(|(_, slot)| !slot.revoking);
        self.abandon_waiting(!revoking.lost);
        let deadline = Instant::now() + if revoking.lost { Duration::ZERO } else { REVOKE };
        self.revoke = Some(Revoke { slots, deadline, revoking });
        self.parts.metrics.rebalances.inc();
    }

    /// Drops what waits of partitions that are given away: whoever owns them next reads it again. What was tried before, and `survives`, goes on
    /// from a retry topic, if there is one, with the attempts that were made.
    pub(super) fn abandon_waiting(&mut self, survives: bool) {
        if mutation::is(Mutation::KeepWaiting) {
            return;
        }
        for id in self.parts.leaf.withdraw() {
            self.withdraw(id);
        }
        self.give_back(0);
        let slots = &self.slots;
        let draining = self.draining.is_some();
        let given_away = |slot: u32| draining || slots.get(slot as usize).is_none_or(|slot| slot.revoking);
        self.lanes.clear(|job| given_away(job.slot));
        // A record that waits for its next attempt counts as handed out to the lanes.
        let (given_away, kept) = std::mem::take(&mut self.backoffs)
            .into_iter()
            .filter(|waiting| self.lanes.get(waiting.0.1).is_some())
            .partition::<Vec<_>, _>(|waiting| self.lanes.get(waiting.0.1).is_some_and(|job| given_away(job.slot)));
        self.backoffs = kept.into();
        let now = Instant::now();
        for Reverse((due, id)) in given_away {
            match self.lanes.get(id).map(|job| (job.slot, job.delivery.attempt)) {
                Some((slot, attempt)) if survives && attempt > 1 && self.survives(slot) => {
                    self.hand_over(id, 1, due.saturating_duration_since(now), attempt - 1, None, now);
                }
                _ => self.drop_failed(id),
            }
        }
        // What was withdrawn or became ready behind a dropped record may belong to them, too.
        let slots = &self.slots;
        self.lanes.clear(|job| draining || slots.get(job.slot as usize).is_none_or(|slot| slot.revoking));
        let given: Vec<bool> = self.slots.iter().map(|slot| slot.owned && (draining || slot.revoking)).collect();
        self.abandon_sides(|slot| given.get(slot as usize).copied().unwrap_or(false));
    }

    /// Gives partitions away once nothing of them is at the service or on its way to the broker, or when the time is over.
    pub(super) fn answer_revoke(&mut self, now: Instant) {
        let Some(revoke) = &self.revoke else { return };
        let busy: usize = revoke.slots.iter().filter_map(|index| self.slots.get(*index as usize)).map(|slot| slot.busy).sum();
        // A commit under way may hold older offsets of these partitions: it must not come after the last one.
        if now < revoke.deadline && (busy > 0 || self.commit.is_some() || self.transaction.is_some()) {
            return;
        }
        let Some(revoke) = self.revoke.take() else { return };
        let commits = match revoke.revoking.lost {
            true => Vec::new(),
            // It may still be stored, with newer offsets than these.
            false if self.transaction.is_some() => Vec::new(),
            false => self.as_commits(&self.commits(revoke.slots.iter().copied())),
        };
        if busy > 0 {
            tracing::info!(route = %self.route.name, busy, "partitions given away before all answers came: those records are delivered again");
        }
        for index in &revoke.slots {
            self.epoch += 1;
            let epoch = self.epoch;
            if let Some(slot) = self.slots.get_mut(*index as usize) {
                slot.give_away(epoch);
            }
            self.recount(*index);
        }
        if revoke.revoking.done.send(commits).is_err() {
            tracing::debug!(route = %self.route.name, "the consumer did not wait for the last commit");
        }
        self.post_now();
    }

    /// Begins the drain: nothing more is delivered, what is out is waited for.
    pub(super) fn drain(&mut self) {
        tracing::info!(route = %self.route.name, out = self.out, "draining");
        // With all that comes after it a drain takes no longer than it may: whoever stops this process may kill it right after that.
        let whole = self.parts.drain_timeout;
        self.draining = Some(Instant::now() + whole - LEAVING.min(whole / 4));
        self.commit_failed = None;
        self.hold_all();
        self.abandon_waiting(true);
        self.post_now();
    }

    /// Whether the drain is over: all answers are there and committed, or the time is over.
    pub(super) fn drained(&self, now: Instant) -> bool {
        self.draining.is_some_and(|deadline| now >= deadline || (self.out == 0 && self.outbox.len() == 0 && !self.awaits_commit()))
    }

    /// Whether there is something to commit, and hope: a group in a rebalance takes no commits, and one whose coordinator is away, and both do again
    /// when that is over.
    fn awaits_commit(&self) -> bool {
        let passes = matches!(self.commit_failed, None | Some(BrokerErrorKind::Other | BrokerErrorKind::Unreachable));
        passes && self.slots.iter().any(|slot| slot.owned && !slot.revoking && slot.is_uncommitted())
    }

    /// Commits what is complete, and leaves the group.
    pub(super) async fn leave(mut self) {
        let end = Instant::now() + LAST;
        let mut free = true;
        if let Some(commit) = self.commit.take() {
            match timeout_at(end, commit).await {
                Ok(done) => self.on_committed(done),
                Err(_) => free = false,
            }
        }
        self.finish_transaction(end).await;
        // What ended since the last status is counted, too.
        self.post(Instant::now());
        self.serve_commands(Instant::now());
        self.answer_revoke(Instant::now() + REVOKE);
        let owned: Vec<u32> = self.owned().map(|(index, _)| index).collect();
        let last = self.as_commits(&self.commits(owned.into_iter()));
        if !last.is_empty() && self.transaction.is_none() {
            // One at a time: behind one that is not answered there is none.
            let made = if free { timeout_at(end, self.consumer.commit(last)).await.ok() } else { None };
            match made {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    tracing::warn!(route = %self.route.name, %error, "the last commit failed: what it held is delivered again")
                }
                None => {
                    tracing::warn!(route = %self.route.name, "the last commit was not answered in time: what it held may be delivered again")
                }
            }
        }
        if self.out > 0 || self.outbox.len() > 0 {
            let (out, unacknowledged) = (self.out, self.outbox.len());
            tracing::warn!(route = %self.route.name, out, unacknowledged, "drained before all answers came: those records are delivered again");
        }
        let Self { mut sides, consumer, .. } = self;
        tokio::join!(sides.close(), consumer.close());
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        collections::{BTreeSet, HashMap},
        sync::Arc,
    };

    use mesh_routing::Route;
    use tokio::sync::{mpsc, oneshot, watch};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        broker::{Assigned, Commit, Event, fake::Fake},
        consume::{route::Parts, test_delivery},
        deliver::Leaf,
        outcome::{Answer, Delivery, Outcome},
        record::{Batch, Record, TopicPartition},
        status::{Board, RouteState},
        telemetry::{
            metrics::{Metrics, RouteMetrics},
            trace::Tracer,
        },
    };

    /// A route's loop on a fake consumer, with partitions 0 to 2 assigned.
    pub(in crate::consume) struct Fixture {
        board: Board,
        metrics: RouteMetrics,
        events: mpsc::Sender<Event>,
        /// What the service is called with, and its answers.
        called: mpsc::Receiver<Delivery>,
        answers: mpsc::Sender<Answer>,
        stop: CancellationToken,
        running: tokio::task::JoinHandle<()>,
        _kept: Box<dyn Send>,
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            self.running.abort();
        }
    }

    pub(in crate::consume) fn partition(number: i32) -> TopicPartition {
        TopicPartition::new("in", number)
    }

    fn assigned(numbers: std::ops::Range<i32>) -> Event {
        Event::Assigned(numbers.map(|number| Assigned { partition: partition(number), position: 0, metadata: String::new() }).collect())
    }

    fn revoking(numbers: std::ops::Range<i32>, lost: bool) -> (Event, oneshot::Receiver<Vec<Commit>>) {
        let (done, answer) = oneshot::channel();
        (Event::Revoking(Revoking { partitions: numbers.map(partition).collect(), lost, done }), answer)
    }

    async fn fixture() -> Fixture {
        fixture_on(&Fake::new(&["in"]), "").await
    }

    /// The same, of a route with these further fields.
    pub(in crate::consume) async fn fixture_on(fake: &Fake, fields: &str) -> Fixture {
        fixture_with(fake, fields, assigned(0..3)).await
    }

    /// What a loop needs, with the sender of its route, on which it depends.
    pub(in crate::consume) fn parts_on(fake: &Fake, fields: &str, leaf: Leaf) -> (Parts, watch::Sender<Arc<Route>>) {
        let route: Arc<Route> = test_delivery(fields, 0).route;
        let (change, changes) = watch::channel(route.clone());
        let parts = Parts {
            broker: Arc::new(fake.clone()),
            leaf,
            metrics: Metrics::new().route(&route.name, &route.service),
            tracer: Tracer::disabled(),
            board: Board::default(),
            route: changes,
            applied_ms: 0,
            commands: crate::command::channel().1,
            paused: crate::pause::never(),
            instance: None,
            transactional_id: "test".to_owned(),
            buffer_bytes: 1 << 20,
            drain_timeout: Duration::from_secs(5),
            stop: CancellationToken::new(),
            seed: 1,
        };
        (parts, change)
    }

    async fn fixture_with(fake: &Fake, fields: &str, assigned: Event) -> Fixture {
        let (calls, called) = mpsc::channel(16);
        let (leaf, answers) = Leaf::played(move |batch| batch.into_iter().for_each(|delivery| calls.try_send(delivery).unwrap()));
        let (parts, change) = parts_on(fake, fields, leaf);
        let (board, metrics, stop) = (parts.board.clone(), parts.metrics.clone(), parts.stop.clone());
        let running = tokio::spawn(RouteLoop::new(parts).unwrap().run());
        let events = fake.0.lock().unwrap().consumers.last().unwrap().events.clone();
        events.send(assigned).await.unwrap();
        Fixture { board, metrics, events, called, answers, stop, running, _kept: Box::new(change) }
    }

    /// After a standstill the consumer has given up one revocation and announces the next: the first one's partitions are gone, too.
    #[tokio::test(start_paused = true)]
    async fn a_revocation_that_nobody_waits_for_any_more_is_over() {
        let Fixture { board, events, .. } = &fixture().await;
        // At the service, for ever: the first revocation waits for it.
        events.send(Event::Records(Batch { partition: partition(0), records: vec![(0, Record::default())] })).await.unwrap();
        let ((first, answer), (second, _dropped)) = (revoking(0..1, false), revoking(1..2, true));
        events.send(first).await.unwrap();
        events.send(second).await.unwrap();
        assert_eq!(answer.await.unwrap(), []);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(board.routes()[0].partitions, 1, "only the third is left");
    }

    /// While the group is in a rebalance, or its coordinator moves, it takes no commits: a drain that left then would have everything since then
    /// delivered again.
    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_until_the_group_takes_commits_again() {
        for kind in [BrokerErrorKind::Other, BrokerErrorKind::Unreachable] {
            drained_while_commits_fail(kind).await;
        }
    }

    async fn drained_while_commits_fail(kind: BrokerErrorKind) {
        let fake = Fake::new(&["in"]);
        let mut fixture = fixture_on(&fake, "").await;
        fake.0.lock().unwrap().refused_commits = (5, kind);
        fixture.events.send(Event::Records(Batch { partition: partition(0), records: vec![(0, Record::default())] })).await.unwrap();
        let delivery = fixture.called.recv().await.unwrap();
        fixture.stop.cancel();
        fixture.answers.send(Answer { id: delivery.id, outcome: Outcome::Ignore }).await.unwrap();
        let mut commits = fake.0.lock().unwrap().consumers[0].commits.clone();
        let committed = tokio::time::timeout(Duration::from_secs(60), &mut fixture.running).await;
        committed.expect("the drain ends").unwrap();
        let last = commits.borrow_and_update().last().map(|commit| (commit.partition.clone(), commit.offset));
        assert_eq!((last, fake.0.lock().unwrap().refused_commits), (Some((partition(0), 1)), (0, kind)));
    }

    /// Whoever stops a sidecar kills it when the drain's time is over: a broker that is silent does not keep it longer.
    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_in_its_time_though_the_broker_does_not_answer() {
        let fake = Fake::new(&["in"]);
        let mut fixture = fixture_on(&fake, "").await;
        fake.0.lock().unwrap().silent_commits = true;
        fixture.events.send(Event::Records(Batch { partition: partition(0), records: vec![(0, Record::default())] })).await.unwrap();
        let delivery = fixture.called.recv().await.unwrap();
        let begin = Instant::now();
        fixture.stop.cancel();
        fixture.answers.send(Answer { id: delivery.id, outcome: Outcome::Ignore }).await.unwrap();
        tokio::time::timeout(Duration::from_secs(60), &mut fixture.running).await.expect("the drain ends").unwrap();
        let took = begin.elapsed();
        // Of 5 s a quarter is kept for the end, which waits for 3 s at most.
        assert!((Duration::from_secs(3)..Duration::from_secs(7)).contains(&took), "{took:?}");
    }

    /// What is told to come again after a crash is what comes again: what was done and no commit recorded, what is at the service, and what
    /// failed and waits for its next attempt. Not what a commit recorded above the watermark, and not what was never delivered.
    #[tokio::test(start_paused = true)]
    async fn what_would_be_delivered_again_is_what_comes_again_after_a_crash() {
        const FIELDS: &str = "order: none, concurrency: 8, retry: { attempts: 9, initial: 1h, max: 1h }";
        const DONE: [i64; 4] = [0, 2, 3, 6];
        const DONE_SINCE: [i64; 3] = [1, 5, 8];
        const FAILED: i64 = 7;
        let records = || Event::Records(Batch { partition: partition(0), records: (0..30).map(|n| (n, Record::default())).collect() });
        let fake = Fake::new(&["in"]);
        let mut fixture = fixture_on(&fake, FIELDS).await;
        let mut commits = fake.0.lock().unwrap().consumers[0].commits.clone();
        fixture.events.send(records()).await.unwrap();
        let mut at_service = HashMap::new();
        for answered in [&DONE[..], &DONE_SINCE, &[FAILED]] {
            while at_service.len() < 8 {
                let delivery = fixture.called.recv().await.unwrap();
                at_service.insert(delivery.position.offset, delivery.id);
            }
            for offset in answered {
                let outcome = match *offset {
                    FAILED => Outcome::Retry { reason: "not yet".to_owned(), after: None },
                    _ => Outcome::Ignore,
                };
                fixture.answers.send(Answer { id: at_service.remove(offset).unwrap(), outcome }).await.unwrap();
            }
            if *answered == DONE {
                // Recorded: 0 by the offset, the others by the map of what is complete above it.
                let recorded = |commits: &Vec<Commit>| commits.last().is_some_and(|last| last.offset == 1 && !last.metadata.is_empty());
                commits.wait_for(recorded).await.unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
                fake.0.lock().unwrap().refused_commits = (usize::MAX, BrokerErrorKind::Other);
            }
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
        while let Ok(delivery) = fixture.called.try_recv() {
            at_service.insert(delivery.position.offset, delivery.id);
        }
        assert_eq!(at_service.len(), 8);
        let told = fixture.metrics.replay_records.get();
        let delivered: BTreeSet<i64> = at_service.keys().copied().chain(DONE).chain(DONE_SINCE).chain([FAILED]).collect();
        assert_eq!((told, delivered.len()), ((DONE_SINCE.len() + 1 + at_service.len()) as u64, 16));
        // A crash: the next one begins at the last commit.
        fixture.running.abort();
        let Commit { partition, offset, metadata } = commits.borrow().last().unwrap().clone();
        let next = Event::Assigned(vec![Assigned { partition, position: offset, metadata }]);
        let mut fixture = fixture_with(&fake, "order: none, concurrency: 16", next).await;
        fake.0.lock().unwrap().refused_commits.0 = 0;
        fixture.events.send(records()).await.unwrap();
        let mut again = BTreeSet::new();
        for _ in 0..30 - DONE.len() {
            let delivery = fixture.called.recv().await.unwrap();
            again.extend(Some(delivery.position.offset).filter(|offset| delivered.contains(offset)));
            fixture.answers.send(Answer { id: delivery.id, outcome: Outcome::Ignore }).await.unwrap();
        }
        assert!(again.is_disjoint(&DONE.into()), "{again:?}");
        assert_eq!(again.len() as u64, told, "{again:?}");
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(fixture.metrics.replay_records.get(), 0, "all of it is recorded");
    }

    /// A route whose session ended does not say that it runs and has nothing to do.
    #[tokio::test(start_paused = true)]
    async fn a_route_that_lost_its_partitions_joins_again() {
        let Fixture { board, events, .. } = &fixture().await;
        let state = async || {
            tokio::time::sleep(Duration::from_secs(1)).await;
            board.routes()[0].state
        };
        let one = revoking(0..1, true);
        events.send(one.0).await.unwrap();
        assert_eq!(state().await, RouteState::Running, "it has two left");
        let others = revoking(1..3, true);
        events.send(others.0).await.unwrap();
        assert_eq!(state().await, RouteState::Joining);
        events.send(assigned(0..1)).await.unwrap();
        assert_eq!(state().await, RouteState::Running);
        let handed_over = revoking(0..1, false);
        events.send(handed_over.0).await.unwrap();
        assert_eq!(state().await, RouteState::Running, "what it had is another's now");
    }
}
