//! Reads topics without a route: for a service that subscribes by itself.
//!
//! One task per subscription owns the consumer. It polls it without pause, so that a reader who is slow loses no membership; what the
//! reader has not taken is held back at the consumer.
//!
//! Invariant: memory is bounded: a few batches on the way to the reader, one batch a partition beside them, and the consumer's own buffer.
//! Invariant: what is committed was handed over ([`Subscription::handed`]) under the assignment that it was read under.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use crate::{
    broker::{Assigned, Broker, BrokerError, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, Revoking},
    record::{Batch, TopicPartition},
};

/// Batches on the way to the reader.
const AHEAD: usize = 2;
/// How long the last commit may take.
const LAST_COMMIT: Duration = Duration::from_secs(5);
/// How long a commit that failed is left alone.
const COMMIT_PAUSE: Duration = Duration::from_secs(1);

/// A running subscription. Dropping it ends it: the last commit is made and the group is left in the background.
#[derive(Debug)]
pub struct Subscription {
    batches: mpsc::Receiver<Received>,
    shared: Arc<Shared>,
    assigned: watch::Receiver<u64>,
    _end: DropGuard,
}

/// A batch with the assignment that it was read under.
#[derive(Clone, Debug)]
pub struct Received {
    /// The assignment, for [`Subscription::handed`].
    pub epoch: u64,
    /// The records.
    pub batch: Batch,
}

/// A subscription is over.
#[derive(Clone, Copy, Debug)]
pub struct Ended;

/// Tells a subscription what its reader has dealt with. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handed(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    partitions: Mutex<HashMap<TopicPartition, Partition>>,
    moved: Notify,
}

#[derive(Debug)]
struct Partition {
    epoch: u64,
    /// Where reading began.
    start: i64,
    /// The next offset that the reader has not dealt with.
    handed: i64,
    committed: i64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<TopicPartition, Partition>> {
        self.partitions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What should be committed, of these partitions or of all.
    fn due(&self, only: Option<&[TopicPartition]>) -> Vec<Commit> {
        let partitions = self.lock();
        let due = partitions.iter().filter(|(name, state)| state.handed > state.committed && only.is_none_or(|only| only.contains(name)));
        due.map(|(name, state)| Commit { partition: name.clone(), offset: state.handed, metadata: String::new() }).collect()
    }
}

impl Subscription {
    /// Begins to read, under the tracker. A broker that is away is waited for.
    ///
    /// # Errors
    /// Only for a configuration that can never work.
    pub fn open(broker: &Arc<dyn Broker>, config: ConsumerConfig, tasks: &TaskTracker) -> Result<Self, BrokerError> {
        let grouped = config.group.is_some();
        let name = config.group.clone().unwrap_or_default();
        let consumer = broker.consumer(config)?;
        let (sender, batches) = mpsc::channel(AHEAD);
        let shared = Arc::new(Shared::default());
        let end = CancellationToken::new();
        let (tell, assigned) = watch::channel(0);
        let driver = Driver { name, grouped, shared: shared.clone(), waiting: VecDeque::new(), commit: None, epoch: 0, tell };
        tasks.spawn(driver.run(consumer, sender, end.clone()));
        Ok(Self { batches, shared, assigned, _end: end.drop_guard() })
    }

    /// The next batch; `None` once the subscription ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<Received> {
        self.batches.recv().await
    }

    /// The partitions that are read now: each with its assignment and the offset where reading began. Every partition of a batch that
    /// [`Subscription::next`] gave is among them, unless it was given away since.
    pub fn starts(&mut self) -> Vec<(TopicPartition, u64, i64)> {
        self.assigned.mark_unchanged();
        self.shared.lock().iter().map(|(name, state)| (name.clone(), state.epoch, state.start)).collect()
    }

    /// The next batch, or `None` when partitions were added since [`Subscription::starts`]. Cancel-safe.
    ///
    /// # Errors
    /// Once the subscription ended.
    pub async fn next_or_moved(&mut self) -> Result<Option<Received>, Ended> {
        tokio::select! {
            biased;
            Ok(()) = self.assigned.changed() => {
                self.assigned.mark_changed();
                Ok(None)
            }
            received = self.batches.recv() => received.map(Some).ok_or(Ended),
        }
    }

    /// The way to tell what was dealt with.
    pub fn handed(&self) -> Handed {
        Handed(self.shared.clone())
    }
}

impl Handed {
    /// All records of the partition before `next` were dealt with: they may be committed. Ignored if the partition was given away since.
    pub fn up_to(&self, partition: &TopicPartition, epoch: u64, next: i64) {
        if let Some(state) = self.0.lock().get_mut(partition)
            && state.epoch == epoch
            && state.handed < next
        {
            state.handed = next;
        } else {
            return;
        }
        self.0.moved.notify_one();
    }
}

struct Driver {
    name: String,
    grouped: bool,
    shared: Arc<Shared>,
    /// Batches for which there was no room; their partitions are held.
    waiting: VecDeque<Received>,
    commit: Option<Committing>,
    epoch: u64,
    /// Says that partitions were added.
    tell: watch::Sender<u64>,
}

/// A commit on its way.
struct Committing {
    offsets: Vec<Commit>,
    done: BoxFuture<'static, Result<(), BrokerError>>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Driver {
    async fn run(mut self, mut consumer: Box<dyn Consumer>, sender: mpsc::Sender<Received>, end: CancellationToken) {
        loop {
            let idle = self.grouped && self.commit.is_none();
            tokio::select! {
                () = end.cancelled() => break,
                event = consumer.next() => self.event(event, &mut *consumer, &sender).await,
                result = committed(&mut self.commit) => self.finish_commit(result),
                () = self.shared.moved.notified(), if idle => {
                    let offsets = self.shared.due(None);
                    if !offsets.is_empty() {
                        self.commit = Some(Committing { done: consumer.commit(offsets.clone()), offsets });
                    }
                }
                room = sender.reserve(), if !self.waiting.is_empty() => match (room, self.waiting.pop_front()) {
                    (Ok(room), Some(received)) => {
                        let partition = received.batch.partition.clone();
                        room.send(received);
                        if !self.waiting.iter().any(|other| other.batch.partition == partition) {
                            consumer.release(&partition);
                        }
                    }
                    // The reader is gone; the guard has ended us, or is about to.
                    _ => break,
                },
            }
        }
        self.last_commit(&mut *consumer).await;
        consumer.close().await;
    }

    async fn event(&mut self, event: Event, consumer: &mut dyn Consumer, sender: &mpsc::Sender<Received>) {
        match event {
            Event::Assigned(added) => self.assigned(added),
            Event::Revoking(revoking) => self.revoking(revoking).await,
            Event::Records(batch) => {
                let Some(epoch) = self.shared.lock().get(&batch.partition).map(|state| state.epoch) else { return };
                let received = Received { epoch, batch };
                // Behind a batch that waits, everything of its partition waits.
                let room = if self.waiting.is_empty() { sender.try_reserve().ok() } else { None };
                match room {
                    Some(room) => room.send(received),
                    None => {
                        consumer.hold(&received.batch.partition);
                        self.waiting.push_back(received);
                    }
                }
            }
            Event::Expired { partition, from, to } => {
                let name = &self.name;
                tracing::warn!(group = name, %partition, from, to, "the broker deleted records before this subscription read them");
            }
            Event::Trouble(error) => tracing::warn!(group = self.name, %error, "a subscription waits"),
            Event::Recovered => tracing::info!(group = self.name, "a subscription goes on"),
        }
    }

    fn assigned(&mut self, added: Vec<Assigned>) {
        let mut partitions = self.shared.lock();
        for Assigned { partition, position, .. } in added {
            self.epoch += 1;
            partitions.insert(partition, Partition { epoch: self.epoch, start: position, handed: position, committed: position });
        }
        drop(partitions);
        self.tell.send_replace(self.epoch);
    }

    async fn revoking(&mut self, revoking: Revoking) {
        let Revoking { partitions, lost, done } = revoking;
        // An older commit must not arrive after the last one.
        if let Some(committing) = self.commit.take() {
            match tokio::time::timeout(COMMIT_PAUSE, committing.done).await {
                Ok(result) => self.note(&committing.offsets, result),
                Err(_) => tracing::debug!(group = self.name, "a commit had no answer before a partition was given away"),
            }
        }
        let last = if lost || !self.grouped { Vec::new() } else { self.shared.due(Some(&partitions)) };
        {
            let mut known = self.shared.lock();
            for partition in &partitions {
                known.remove(partition);
            }
        }
        self.waiting.retain(|received| !partitions.contains(&received.batch.partition));
        if done.send(last).is_err() {
            tracing::debug!(group = self.name, "partitions were given away before their last commit");
        }
    }

    fn finish_commit(&mut self, (offsets, result): (Vec<Commit>, Result<(), BrokerError>)) {
        let failed = result.is_err();
        self.note(&offsets, result);
        if failed {
            // Tried again after a pause, which counts as the commit's own time.
            let pause = Box::pin(async {
                tokio::time::sleep(COMMIT_PAUSE).await;
                Ok(())
            });
            self.commit = Some(Committing { offsets: Vec::new(), done: pause });
        }
        self.shared.moved.notify_one();
    }

    fn note(&self, offsets: &[Commit], result: Result<(), BrokerError>) {
        match result {
            Ok(()) => {
                let mut partitions = self.shared.lock();
                for commit in offsets {
                    if let Some(state) = partitions.get_mut(&commit.partition) {
                        state.committed = state.committed.max(commit.offset);
                    }
                }
            }
            Err(error) if error.kind == BrokerErrorKind::Fenced => {
                tracing::debug!(group = self.name, %error, "a commit came too late");
            }
            Err(error) => tracing::warn!(group = self.name, %error, "a commit failed"),
        }
    }

    async fn last_commit(&mut self, consumer: &mut dyn Consumer) {
        if !self.grouped {
            return;
        }
        if let Some(Committing { offsets, done }) = self.commit.take() {
            let result = tokio::time::timeout(LAST_COMMIT, done).await.ok();
            self.note_last(&offsets, result);
        }
        let offsets = self.shared.due(None);
        if !offsets.is_empty() {
            let done = consumer.commit(offsets.clone());
            let result = tokio::time::timeout(LAST_COMMIT, done).await.ok();
            self.note_last(&offsets, result);
        }
    }

    fn note_last(&self, offsets: &[Commit], result: Option<Result<(), BrokerError>>) {
        match result {
            Some(result) => self.note(offsets, result),
            None => tracing::warn!(group = self.name, "the last commit of a subscription had no answer; its last records come again"),
        }
    }
}

/// The result of the commit on its way; never, without one. Cancel-safe: the commit stays where it is.
async fn committed(commit: &mut Option<Committing>) -> (Vec<Commit>, Result<(), BrokerError>) {
    let result = match commit {
        Some(committing) => (&mut committing.done).await,
        None => std::future::pending().await,
    };
    (commit.take().map(|committing| committing.offsets).unwrap_or_default(), result)
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::{
        broker::{
            StartOffset,
            fake::{Fake, FakeHandle},
        },
        record::Record,
    };

    fn open(group: Option<&str>) -> (Subscription, FakeHandle, TaskTracker) {
        let fake = Fake::new(&["t"]);
        let broker: Arc<dyn Broker> = Arc::new(fake.clone());
        let (group, topics) = (group.map(str::to_owned), vec!["t".into()]);
        let config =
            ConsumerConfig { group, topics, instance: None, start: StartOffset::Earliest, buffer_bytes: 1024, transactional_id: None };
        let tasks = TaskTracker::new();
        let subscription = Subscription::open(&broker, config, &tasks).unwrap();
        tasks.close();
        let handle = fake.0.lock().unwrap().consumers[0].clone();
        (subscription, handle, tasks)
    }

    fn partition(number: i32) -> TopicPartition {
        TopicPartition::new("t", number)
    }

    fn assigned(number: i32, position: i64) -> Event {
        Event::Assigned(vec![Assigned { partition: partition(number), position, metadata: String::new() }])
    }

    fn records(number: i32, offsets: std::ops::Range<i64>) -> Event {
        Event::Records(Batch { partition: partition(number), records: offsets.map(|offset| (offset, Record::default())).collect() })
    }

    #[tokio::test]
    async fn what_was_handed_over_is_committed_and_the_consumer_closed() {
        let (mut subscription, mut consumer, tasks) = open(Some("g"));
        consumer.events.send(assigned(0, 5)).await.unwrap();
        consumer.events.send(records(0, 5..8)).await.unwrap();
        let received = subscription.next().await.unwrap();
        assert_eq!(received.batch.records.len(), 3);
        subscription.handed().up_to(&partition(0), received.epoch, 7);
        let commits = consumer.commits.wait_for(|commits| !commits.is_empty()).await.unwrap().clone();
        assert_eq!((commits.len(), commits[0].offset), (1, 7));
        subscription.handed().up_to(&partition(0), received.epoch, 8);
        drop(subscription);
        consumer.closed.wait_for(|closed| *closed).await.unwrap();
        assert_eq!(consumer.commits.borrow().last().unwrap().offset, 8);
        tasks.wait().await;
    }

    #[tokio::test]
    async fn a_slow_reader_holds_the_partition_and_nothing_grows() {
        let (mut subscription, mut consumer, _tasks) = open(None);
        consumer.events.send(assigned(0, 0)).await.unwrap();
        for number in 0..4 {
            consumer.events.send(records(0, number..number + 1)).await.unwrap();
        }
        consumer.held.wait_for(|held| held.len() == 2).await.unwrap();
        for number in 0..4 {
            assert_eq!(subscription.next().await.unwrap().batch.records[0].0, number);
        }
        consumer.held.wait_for(Vec::is_empty).await.unwrap();
    }

    #[tokio::test]
    async fn a_partition_that_is_given_away_takes_its_last_commit_along() {
        let (mut subscription, mut consumer, _tasks) = open(Some("g"));
        consumer.events.send(assigned(0, 0)).await.unwrap();
        consumer.events.send(records(0, 0..4)).await.unwrap();
        let received = subscription.next().await.unwrap();
        // Held back until the revocation asks for it.
        let handed = subscription.handed();
        handed.up_to(&partition(0), received.epoch, 3);
        let (done, answer) = oneshot::channel();
        consumer.events.send(Event::Revoking(Revoking { partitions: vec![partition(0)], lost: false, done })).await.unwrap();
        let last = answer.await.unwrap();
        let background = consumer.commits.borrow().clone();
        assert_eq!(last.iter().chain(&background).map(|commit| commit.offset).max(), Some(3));
        // Too late, and of an older assignment.
        handed.up_to(&partition(0), received.epoch, 4);
        consumer.events.send(assigned(0, 3)).await.unwrap();
        consumer.events.send(records(0, 3..4)).await.unwrap();
        let again = subscription.next().await.unwrap();
        handed.up_to(&partition(0), received.epoch, 4);
        assert!(again.epoch > received.epoch);
        handed.up_to(&partition(0), again.epoch, 4);
        consumer.commits.wait_for(|commits| commits.last().is_some_and(|commit| commit.offset == 4)).await.unwrap();
    }
}
