//! A consumer: one OS thread that polls librdkafka, and a handle for the async side.
//!
//! The thread puts events and batches into a [`queue::Queue`] and never blocks on it; the handle takes them out. librdkafka says nothing of
//! asynchronous commits through this binding (its event interface has no reply for them), so commits are synchronous, on a blocking
//! thread, while polling goes on.
//!
//! Invariant: a commit of a partition that was revoked is refused here: the broker would accept it from any live member.
//! Invariant: when the final commits of a revocation are made, no earlier commit or transaction of this consumer is under way.
//! Invariant: a transaction shows the group metadata of the assignment or rebalance in which its partitions were last known to be ours.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use futures_util::future::BoxFuture;
use rdkafka::{
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerGroupMetadata},
    topic_partition_list::{Offset, TopicPartitionList},
};
use tokio::sync::{Notify, oneshot};

use self::{context::Context, queue::Queue, session::Session};
use super::{
    error::broker_error,
    health::Health,
    settings::Settings,
    transaction::{Job, Transactor},
    wakeup::{Wakeup, lock},
};
use crate::{
    broker::{BrokerError, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, Outgoing, TransactionError},
    record::TopicPartition,
};

mod arena;
mod context;
mod queue;
mod session;
mod start;
#[cfg(test)]
mod tests;

/// The most characters in a commit's metadata, counted as Java does.
const METADATA: usize = 4096;

type Client = BaseConsumer<Context>;

/// What the thread and the handle share.
struct Shared {
    queue: Mutex<Queue>,
    ready: Notify,
    wakeup: Arc<Wakeup>,
    /// The client, for commits. The session holds the other reference.
    client: Mutex<Option<Arc<Client>>>,
    config: ConsumerConfig,
    topics: HashSet<Arc<str>>,
    /// For transactions, if the consumer makes any.
    transactor: Option<Transactor>,
    /// The group metadata to which a transaction is bound: captured by the session with each rebalance, and gone with lost partitions.
    metadata: Mutex<Option<Arc<ConsumerGroupMetadata>>>,
    /// The broker refused it: the session is to capture it again.
    stale_metadata: AtomicBool,
}

impl Shared {
    /// Puts an event in front of all records.
    fn event(&self, event: Event) {
        lock(&self.queue).event(event);
        self.ready.notify_one();
    }

    /// Whether it reads what it is told, partition by partition.
    fn chooses(&self) -> bool {
        self.config.group.is_none() && self.topics.is_empty()
    }

    fn closing(&self) -> bool {
        lock(&self.queue).closing
    }

    /// Opens a commit: refused if a partition is no longer ours; otherwise a revocation waits until the guard is dropped.
    fn begin_commit(self: &Arc<Self>, offsets: &[Commit], transaction: bool) -> Result<Committing, BrokerError> {
        let mut queue = lock(&self.queue);
        // A member may commit partitions of topics that it reads by other means (retry topics); of its own topics only what it owns.
        if let Some(gone) = offsets.iter().find(|commit| self.topics.contains(&commit.partition.topic) && !queue.owns(&commit.partition)) {
            let detail = format!("commit of {} at {}: the partition was given to another member", gone.partition, gone.offset);
            return Err(BrokerError::new(BrokerErrorKind::Fenced, detail));
        }
        // Ours, but perhaps ours again: whoever asks does not know yet that it was somebody else's in between. The same may be so of what belongs
        // to ours beside the group.
        let beside = offsets.iter().any(|commit| !self.topics.contains(&commit.partition.topic));
        if (transaction || beside) && queue.assignment_untold() {
            let detail = "commit: the assignment changed just now, and that was not read yet";
            return Err(BrokerError::new(BrokerErrorKind::Fenced, detail));
        }
        queue.committing += 1;
        Ok(Committing(self.clone()))
    }

    /// Checks a transaction and hands it to the producer's thread.
    fn begin_transaction(
        self: &Arc<Self>,
        records: Vec<Outgoing>,
        offsets: &[Commit],
        reply: oneshot::Sender<Result<(), TransactionError>>,
    ) -> Result<(), TransactionError> {
        let Some(transactor) = &self.transactor else {
            let detail = "a consumer without a `transactional_id` makes no transactions";
            return Err(TransactionError::Aborted(BrokerError::new(BrokerErrorKind::Config, detail)));
        };
        let list = commit_list(offsets).map_err(TransactionError::Aborted)?;
        let guard = self.begin_commit(offsets, true).map_err(TransactionError::Fenced)?;
        let metadata = lock(&self.metadata).clone().ok_or_else(|| {
            let detail = "transaction: this consumer has no partitions now, as far as the group is concerned";
            TransactionError::Fenced(BrokerError::new(BrokerErrorKind::Fenced, detail))
        })?;
        transactor.submit(Job { records, offsets: list, metadata, guard: Box::new(guard), reply });
        Ok(())
    }
}

/// A commit or a transaction that is under way.
struct Committing(Arc<Shared>);

impl Drop for Committing {
    fn drop(&mut self) {
        let mut queue = lock(&self.0.queue);
        queue.committing -= 1;
        if queue.committing == 0 {
            self.0.wakeup.set();
        }
    }
}

/// The handle.
pub(super) struct KafkaConsumer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    _counted: Arc<()>,
}

impl KafkaConsumer {
    /// Each consumer holds `counted`, and so does their broker.
    pub(super) fn open(settings: &Settings, config: ConsumerConfig, health: Arc<Health>, counted: &Arc<()>) -> Result<Self, BrokerError> {
        if config.topics.is_empty() && config.group.is_some() {
            return Err(BrokerError::new(BrokerErrorKind::Config, "a consumer of a group needs at least one topic"));
        }
        for topic in &config.topics {
            super::admin::check_name(topic)?;
        }
        if config.group.as_ref().is_some_and(String::is_empty) {
            return Err(BrokerError::new(BrokerErrorKind::Config, "a consumer group's name is empty"));
        }
        let kafka = settings.consumer(&config, Arc::strong_count(counted).saturating_sub(1));
        let wakeup: Arc<Wakeup> = Arc::default();
        let transactor = match &config.transactional_id {
            Some(_) if config.group.is_none() => {
                return Err(BrokerError::new(BrokerErrorKind::Config, "a consumer without a group makes no transactions"));
            }
            Some(id) => Some(Transactor::open(settings, id, health.clone(), wakeup.clone())?),
            None => None,
        };
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            ready: Notify::new(),
            wakeup,
            client: Mutex::default(),
            topics: config.topics.iter().cloned().collect(),
            config,
            transactor,
            metadata: Mutex::default(),
            stale_metadata: AtomicBool::new(false),
        });
        // A setting that librdkafka refuses is found here, before there is a thread.
        let mut session = Session::new(kafka, shared.clone(), health)?;
        let name = format!("kafka-{}", shared.config.group.as_deref().unwrap_or("reader"));
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || session.run())
            .map_err(|error| BrokerError::new(BrokerErrorKind::Other, format!("kafka: no thread for a consumer: {error}")))?;
        Ok(Self { shared, thread: Some(thread), _counted: counted.clone() })
    }

    fn begin_close(&self) {
        lock(&self.shared.queue).closing = true;
        self.shared.wakeup.set();
    }
}

impl Drop for KafkaConsumer {
    fn drop(&mut self) {
        // The thread ends by itself; waiting for it could block an async worker.
        self.begin_close();
    }
}

impl Consumer for KafkaConsumer {
    fn next(&mut self) -> BoxFuture<'_, Event> {
        Box::pin(async move {
            loop {
                // A notification between the look and the wait is kept as a permit.
                let popped = lock(&self.shared.queue).pop();
                if let Some(popped) = popped {
                    if popped.resume {
                        self.shared.wakeup.set();
                    }
                    return popped.event;
                }
                self.shared.ready.notified().await;
            }
        })
    }

    fn hold(&mut self, partition: &TopicPartition) {
        lock(&self.shared.queue).hold(partition, true);
    }

    fn release(&mut self, partition: &TopicPartition) {
        lock(&self.shared.queue).hold(partition, false);
        self.shared.ready.notify_one();
    }

    fn assign(&mut self, partitions: Vec<(TopicPartition, i64)>) {
        if self.shared.chooses() {
            lock(&self.shared.queue).choose(partitions);
            self.shared.wakeup.set();
        }
    }

    fn unassign(&mut self, partitions: &[TopicPartition]) {
        if self.shared.chooses() {
            lock(&self.shared.queue).unchoose(partitions);
            self.shared.wakeup.set();
        }
    }

    fn seek(&mut self, partition: &TopicPartition, offset: i64) {
        if lock(&self.shared.queue).seek(partition, offset) {
            self.shared.wakeup.set();
        }
    }

    fn commit(&self, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), BrokerError>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            if offsets.is_empty() {
                return Ok(());
            }
            let list = commit_list(&offsets)?;
            let Some(group) = shared.config.group.clone() else {
                return Err(BrokerError::new(BrokerErrorKind::Config, "a consumer without a group keeps no offsets"));
            };
            let committed = tokio::task::spawn_blocking(move || {
                let guard = shared.begin_commit(&offsets, false)?;
                let client = lock(&shared.client).clone();
                let result = match &client {
                    Some(client) => {
                        client.commit(&list, CommitMode::Sync).map_err(|error| broker_error(format!("commit of group `{group}`"), &error))
                    }
                    None => Err(BrokerError::new(BrokerErrorKind::Fenced, format!("commit of group `{group}`: the consumer is rejoining"))),
                };
                drop(client);
                drop(guard);
                result
            });
            committed
                .await
                .unwrap_or_else(|error| Err(BrokerError::new(BrokerErrorKind::Other, format!("kafka: a commit was cut short: {error}"))))
        })
    }

    fn transact(&self, records: Vec<Outgoing>, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), TransactionError>> {
        let (reply, answer) = oneshot::channel();
        let begun = self.shared.begin_transaction(records, &offsets, reply);
        let shared = self.shared.clone();
        Box::pin(async move {
            begun?;
            let result = answer.await.unwrap_or_else(|_| {
                let detail = "kafka: the consumer was closed in the middle of a transaction";
                Err(TransactionError::Lost(BrokerError::new(BrokerErrorKind::Other, detail)))
            });
            if let Err(TransactionError::Aborted(error)) = &result
                && error.kind == BrokerErrorKind::Fenced
            {
                shared.stale_metadata.store(true, Ordering::Release);
                shared.wakeup.set();
            }
            result
        })
    }

    fn close(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        self.begin_close();
        let thread = self.thread.take();
        let shared = self.shared.clone();
        Box::pin(async move {
            let join = move || {
                let session = thread.is_none_or(|thread| thread.join().is_ok());
                let transactor = shared.transactor.as_ref().and_then(Transactor::stop);
                session & transactor.is_none_or(|thread| thread.join().is_ok())
            };
            let joined = tokio::task::spawn_blocking(join).await;
            if !matches!(joined, Ok(true)) {
                tracing::error!("kafka: a consumer's thread did not end well");
            }
        })
    }
}

/// Offsets in librdkafka's form.
pub(super) fn commit_list(offsets: &[Commit]) -> Result<TopicPartitionList, BrokerError> {
    let mut list = TopicPartitionList::with_capacity(offsets.len());
    for commit in offsets {
        let what = || format!("commit of {} at {}", commit.partition, commit.offset);
        let length = commit.metadata.encode_utf16().count();
        if length > METADATA {
            let detail = format!("{}: {length} characters of metadata, {METADATA} are allowed", what());
            return Err(BrokerError::new(BrokerErrorKind::Config, detail));
        }
        if commit.offset < 0 {
            return Err(BrokerError::new(BrokerErrorKind::Config, format!("{}: the offset is negative", what())));
        }
        let mut element = list.add_partition(&commit.partition.topic, commit.partition.partition);
        element.set_offset(Offset::Offset(commit.offset)).map_err(|error| broker_error(what(), &error))?;
        if !commit.metadata.is_empty() {
            element.set_metadata(&commit.metadata);
        }
    }
    Ok(list)
}
