//! The broker seam: what the mesh needs of a broker, and nothing more. Floor 2.
//!
//! Two implementations: [`kafka`] (rdkafka) and [`embedded`] (one process, durable). One conformance suite runs on both
//! (`tests/src/conformance`).
//!
//! Calls are per batch, so a boxed future is no cost.
//!
//! Invariant: a broker that is away is waited for. An implementation reports it ([`Event::Trouble`]) and recovers by itself.
//! Invariant: `Producer::send` enqueues before it returns, so that the order of calls is the order in a partition.
//! Invariant: readers see records of a transaction only once it is committed, and never those of one that was aborted.
//! Invariant: nothing above this module names an implementation, `app` aside.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tokio::sync::oneshot;

use crate::record::{Batch, Position, Record, TopicPartition};

pub mod embedded;
#[cfg(test)]
pub(crate) mod fake;
pub mod kafka;
mod sync;

/// A broker: the way to its three parts.
pub trait Broker: Send + Sync + 'static {
    /// The name for `messaging.system` and messages: `kafka` or `embedded`.
    fn system(&self) -> &'static str;

    /// The shared producer.
    fn producer(&self) -> Arc<dyn Producer>;

    /// A new consumer. It joins its group, or begins to read, at once and in the background: a broker that is away is no error here.
    ///
    /// # Errors
    /// Only for a configuration that can never work.
    fn consumer(&self, config: ConsumerConfig) -> Result<Box<dyn Consumer>, BrokerError>;

    /// Administration.
    fn admin(&self) -> Arc<dyn Admin>;

    /// Whether the broker can be reached now, as far as known, and if not, why. Cheap: for readiness and status.
    fn health(&self) -> Result<(), BrokerError>;

    /// What is known to keep records of this topic from being written or read while others are. Cheap, as [`Broker::health`].
    fn trouble_of(&self, _topic: &str) -> Option<BrokerError> {
        None
    }

    /// Flushes what was sent and closes. Called once, after all consumers are closed.
    fn close(&self, deadline: Duration) -> BoxFuture<'_, Result<(), BrokerError>>;
}

/// Results of a batch, in the order of its records.
pub type Acks = BoxFuture<'static, Vec<Result<Position, ProduceError>>>;

/// Appends records, durably and in order.
pub trait Producer: Send + Sync + 'static {
    /// Enqueues a batch, in order, before it returns. The future resolves when each record is acknowledged or has failed; dropping it
    /// does not take records back. Within a partition, records are stored in the order of the calls.
    /// The partition is chosen by the key as Kafka's `murmur2_random` does, where [`Outgoing::partition`] names none.
    ///
    /// An acknowledgement means: on all in-sync replicas (Kafka), on disk after fsync (embedded). Waits for a broker that is away: the
    /// caller puts the deadline.
    fn send(&self, records: Vec<Outgoing>) -> Acks;

    /// The topic's partition count if it is known to exist, from a cache and without waiting.
    fn known_partitions(&self, topic: &str) -> Option<i32>;

    /// Asks the broker for the topic, within the deadline, and remembers it. The embedded broker creates it, with 4 partitions.
    ///
    /// # Errors
    /// [`ProduceErrorKind::UnknownTopic`] if the broker answered that there is none.
    fn learn_topic(&self, topic: &str, deadline: Duration) -> BoxFuture<'_, Result<i32, ProduceError>>;
}

/// A record on its way to a topic.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition; `None` lets the partitioner choose.
    pub partition: Option<i32>,
    /// The record.
    pub record: Record,
}

/// Why a record was not acknowledged.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{detail}")]
pub struct ProduceError {
    /// The kind, for the mapping to statuses and for decisions.
    pub kind: ProduceErrorKind,
    /// What happened, for people; names topic and broker.
    pub detail: String,
}

/// The kinds of [`ProduceError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProduceErrorKind {
    /// There is no such topic. Not stored.
    UnknownTopic,
    /// There is no such partition. Not stored.
    UnknownPartition,
    /// Larger than the broker takes. Not stored.
    TooLarge,
    /// The broker forbids it. Not stored.
    Unauthorized,
    /// The broker refuses the record itself (a policy, a null key in a compacted topic). Not stored.
    Refused,
    /// The local queue is full: slow down. Not stored.
    QueueFull,
    /// The broker is away. Not stored.
    Unavailable,
    /// No acknowledgement came. Possibly stored.
    TimedOut,
    /// The producer failed for good and is being rebuilt. Possibly stored.
    Fatal,
}

/// What a consumer reads.
#[derive(Clone, Debug)]
pub struct ConsumerConfig {
    /// The consumer group; `None` reads all partitions by itself, from `start`, and keeps no offsets.
    pub group: Option<String>,
    /// The topics. One that does not exist yet is waited for. None at all, without a group: it reads what [`Consumer::assign`] names.
    pub topics: Vec<Arc<str>>,
    /// Static membership: the name that is kept over restarts.
    pub instance: Option<String>,
    /// Where a partition without a committed offset begins. Resolved, and committed, before the first fetch.
    pub start: StartOffset,
    /// How many bytes are fetched ahead at most.
    pub buffer_bytes: usize,
    /// The identity of its transactions ([`Consumer::transact`]); `None`: it makes none. Whoever begins with an identity ends what an earlier
    /// holder left unfinished, and fences it.
    pub transactional_id: Option<String>,
}

impl ConsumerConfig {
    /// Of a reader without a group: all partitions of the topics, from `start`.
    pub fn reader(topics: Vec<Arc<str>>, start: StartOffset, buffer_bytes: usize) -> Self {
        Self { group: None, topics, instance: None, start, buffer_bytes, transactional_id: None }
    }
}

/// Where a partition without a committed offset begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartOffset {
    /// At the oldest record.
    Earliest,
    /// After the newest record.
    Latest,
    /// At the first record that is not older than this, in milliseconds since 1970-01-01 UTC.
    At(i64),
    /// At these offsets. A partition that is not named, or whose offset is beyond its end, begins at its oldest record: all of it is new.
    Each(Arc<BTreeMap<TopicPartition, i64>>),
}

impl StartOffset {
    /// Where a partition of [`StartOffset::Each`] begins, given its watermarks.
    pub(crate) fn of_each(starts: &BTreeMap<TopicPartition, i64>, partition: &TopicPartition, low: i64, high: i64) -> i64 {
        starts.get(partition).copied().filter(|offset| (0..=high).contains(offset)).unwrap_or(low)
    }
}

/// Reads records: as a member of a group, or by itself.
pub trait Consumer: Send + 'static {
    /// The next event. Cancel-safe: an event is never lost.
    fn next(&mut self) -> BoxFuture<'_, Event>;

    /// Stops [`Event::Records`] of a partition until [`Consumer::release`]; what is fetched stays in its bounded buffer. Membership goes on.
    fn hold(&mut self, partition: &TopicPartition);

    /// Undoes [`Consumer::hold`].
    fn release(&mut self, partition: &TopicPartition);

    /// Lets a consumer without group and topics read these partitions too, each from its offset. Nothing is told of it: the records follow.
    /// A partition that it reads already is read anew from there. The partition must exist; the offset need not exist any more
    /// ([`Event::Expired`]), and one beyond the end waits for records. Ignored by other consumers.
    fn assign(&mut self, partitions: Vec<(TopicPartition, i64)>);

    /// Undoes [`Consumer::assign`]: when it returns, no record of these partitions comes any more.
    fn unassign(&mut self, partitions: &[TopicPartition]);

    /// Goes on reading an assigned partition at this offset: what was fetched and not given out is dropped, and no record of another position
    /// comes after this call. Commits nothing, and leaves a hold as it is. A partition that is not assigned is left alone.
    fn seek(&mut self, partition: &TopicPartition, offset: i64);

    /// Commits, synchronously at the broker. A member may commit partitions of topics that its group does not read; of its own only what it
    /// owns. The future is `'static` so that it can run beside `next`; one at a time.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Fenced`] if the partition belongs to somebody else by now; others may be tried again.
    fn commit(&self, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), BrokerError>>;

    /// One whole transaction: the records are stored and the offsets committed, or neither. A reader sees none of the records before all of
    /// it is stored. Begins when it is called; one at a time, and none beside a [`Consumer::commit`]. While it runs, a partition of it is not
    /// given away. Dropping the future does not take it back.
    ///
    /// # Errors
    /// See [`TransactionError`]: but for [`TransactionError::Lost`], nothing of it is stored.
    fn transact(&self, records: Vec<Outgoing>, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), TransactionError>>;

    /// Leaves the group and frees everything. What was not committed is not. For a static member the membership stays until its timeout.
    fn close(self: Box<Self>) -> BoxFuture<'static, ()>;
}

/// What happens to a consumer.
#[derive(Debug)]
pub enum Event {
    /// Partitions were added. Their records follow after this event.
    Assigned(Vec<Assigned>),
    /// Partitions are about to be taken away; nothing of any partition comes until [`Revoking::done`] is answered or dropped, or its
    /// time is over.
    Revoking(Revoking),
    /// Records of one partition.
    Records(Batch),
    /// The broker deleted offsets `from..to` before they were read; reading goes on at `to`.
    Expired {
        /// The partition.
        partition: TopicPartition,
        /// The first missing offset.
        from: i64,
        /// The first offset that exists.
        to: i64,
    },
    /// Something is wrong and is being waited for; reported when it begins and when it changes.
    Trouble(BrokerError),
    /// What was wrong is over.
    Recovered,
}

/// A partition that was added.
#[derive(Clone, Debug)]
pub struct Assigned {
    /// The partition.
    pub partition: TopicPartition,
    /// The offset where reading begins: the committed one, or the resolved start.
    pub position: i64,
    /// The metadata of the commit, as stored; may be foreign. Empty if there is none.
    pub metadata: String,
}

/// Partitions that are about to be taken away.
#[derive(Debug)]
pub struct Revoking {
    /// The partitions.
    pub partitions: Vec<TopicPartition>,
    /// They are gone already: nothing can be committed for them.
    pub lost: bool,
    /// Answered with the last commits, which are made synchronously before the partitions are given away.
    pub done: oneshot::Sender<Vec<Commit>>,
}

/// An offset to commit: the next one to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The partition.
    pub partition: TopicPartition,
    /// The watermark: the lowest offset that is not complete.
    pub offset: i64,
    /// The commit's metadata; at most 4,096 characters.
    pub metadata: String,
}

/// Why a transaction was not stored.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TransactionError {
    /// It was taken back, through no fault of its records; it may be done again.
    #[error("the transaction was aborted: {0}")]
    Aborted(BrokerError),
    /// The broker refuses these of its records for good, by index; the others may be sent again without them.
    #[error("the transaction was aborted: {} of its records are refused: {}", .0.len(), .0.first().map_or("", |(_, error)| &error.detail))]
    Refused(Vec<(usize, ProduceError)>),
    /// The broker refuses some of its records for good and does not tell which: to be done again in smaller ones.
    #[error("the transaction was aborted: some of its records are refused: {0}")]
    Split(ProduceError),
    /// A partition belongs to somebody else by now.
    #[error("the transaction was not begun: {0}")]
    Fenced(BrokerError),
    /// Its end is not known. The consumer reports its partitions as lost and assigns them again at what is committed.
    #[error("the end of a transaction is not known: {0}")]
    Lost(BrokerError),
}

/// Topics, watermarks, groups.
pub trait Admin: Send + Sync + 'static {
    /// All topics with their partition counts: as of a moment after the call.
    fn topics(&self) -> BoxFuture<'_, Result<Arc<BTreeMap<String, i32>>, BrokerError>>;

    /// Creates topics that do not exist; one that exists is left as it is and is no error.
    fn create_topics(&self, topics: Vec<NewTopic>) -> BoxFuture<'_, Result<(), BrokerError>>;

    /// The lowest offset that exists, and the one after the newest.
    fn watermarks(&self, partition: &TopicPartition) -> BoxFuture<'_, Result<(i64, i64), BrokerError>>;

    /// For each partition, whether a consumer that begins at the offset finds a record there or later. Where transactions were written, the newest
    /// offsets of a log may be their markers, and no records; compaction leaves gaps. Where every offset is a record's, the answers may always be
    /// `true`.
    fn readable(&self, from: Vec<Position>) -> BoxFuture<'_, Vec<Result<bool, BrokerError>>> {
        Box::pin(std::future::ready(from.iter().map(|_| Ok(true)).collect()))
    }

    /// For each partition of the topic, the first offset whose record is not older; the high watermark if there is none.
    fn offsets_at(&self, topic: &str, timestamp_ms: i64) -> BoxFuture<'_, Result<Vec<i64>, BrokerError>>;

    /// The committed offsets of a group, `None` where there is none.
    fn committed(&self, group: &str, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Result<Vec<Option<Commit>>, BrokerError>>;

    /// Commits offsets for a group that has no members.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Fenced`] if it has members: those alone may commit for it.
    fn commit_for(&self, group: &str, offsets: Vec<Commit>) -> BoxFuture<'_, Result<(), BrokerError>>;

    /// Deletes the records below these offsets, for good; they become the low watermarks. An offset at or below the low watermark deletes nothing.
    ///
    /// # Errors
    /// If an offset is above the high watermark, or the topic's policy forbids it (Kafka: without `delete` in `cleanup.policy`).
    fn delete_records(&self, below: Vec<(TopicPartition, i64)>) -> BoxFuture<'_, Result<(), BrokerError>>;

    /// [`Admin::watermarks`] of many partitions, in their order.
    fn all_watermarks(&self, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Result<Vec<(i64, i64)>, BrokerError>> {
        Box::pin(async move {
            let mut found = Vec::with_capacity(partitions.len());
            for partition in &partitions {
                found.push(self.watermarks(partition).await?);
            }
            Ok(found)
        })
    }

    /// The high watermarks of partitions, in their order, each or why it is not told. For what is asked for all the time by many: who asks may wait a
    /// moment for others, so that the broker is asked once for all of them.
    fn ends(&self, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Vec<Result<i64, BrokerError>>> {
        Box::pin(async move {
            let mut found = Vec::with_capacity(partitions.len());
            for partition in &partitions {
                found.push(self.watermarks(partition).await.map(|(_, high)| high));
            }
            found
        })
    }

    /// These topics as they are now, in their order; those that do not exist are left out. Their settings only with `settings`.
    fn describe_topics(&self, topics: Vec<String>, settings: bool) -> BoxFuture<'_, Result<Vec<TopicInfo>, BrokerError>> {
        let _ = (topics, settings);
        Box::pin(std::future::ready(Err(not_here("describe topics"))))
    }

    /// Changes a topic: its settings first, then its partitions.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Config`] for what can never be, [`BrokerErrorKind::UnknownTopic`] if there is no such topic.
    fn alter_topic(&self, topic: &str, change: TopicChange) -> BoxFuture<'_, Result<(), BrokerError>> {
        let _ = (topic, change);
        Box::pin(std::future::ready(Err(not_here("alter a topic"))))
    }

    /// Deletes topics with everything in them, and what groups committed there. When it returns they are gone.
    ///
    /// # Errors
    /// [`BrokerErrorKind::UnknownTopic`] if there is no such topic. Those before it are deleted then.
    fn delete_topics(&self, topics: Vec<String>) -> BoxFuture<'_, Result<(), BrokerError>> {
        let _ = topics;
        Box::pin(std::future::ready(Err(not_here("delete topics"))))
    }

    /// The brokers of the cluster, at the addresses that they tell clients. None at all: the broker is in this process.
    fn brokers(&self) -> BoxFuture<'_, Result<Vec<BrokerNode>, BrokerError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// The consumer groups that the broker knows.
    fn groups(&self) -> BoxFuture<'_, Result<Vec<GroupInfo>, BrokerError>> {
        Box::pin(std::future::ready(Err(not_here("list groups"))))
    }
}

fn not_here(what: &str) -> BrokerError {
    BrokerError::new(BrokerErrorKind::Config, format!("this broker cannot {what}"))
}

/// A topic, as the broker describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopicInfo {
    /// The name.
    pub name: String,
    /// The partitions, by their numbers.
    pub partitions: Vec<PartitionInfo>,
    /// The settings that are not the broker's defaults, by Kafka's names.
    pub config: BTreeMap<String, String>,
    /// What its records occupy, in bytes; `None` where the broker does not say.
    pub bytes: Option<u64>,
    /// How many replicas must be in sync for a record to be taken, be it the topic's own setting or the brokers'. `None` where that is not told,
    /// and without settings.
    pub min_in_sync: Option<u32>,
}

/// A broker of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerNode {
    /// Its number.
    pub id: i32,
    /// The host at which it tells clients to reach it.
    pub host: String,
    /// The port there.
    pub port: u16,
}

/// A partition, as the broker describes it. Brokers are told by their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionInfo {
    /// Who leads it; `None`: nobody.
    pub leader: Option<i32>,
    /// Who has a replica.
    pub replicas: Vec<i32>,
    /// Whose replica is in sync.
    pub in_sync: Vec<i32>,
}

/// What is to become different about a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopicChange {
    /// The partition count; `None` leaves it. It never falls.
    pub partitions: Option<i32>,
    /// Settings by Kafka's names. The others stay.
    pub set: BTreeMap<String, String>,
    /// Settings that go back to the broker's defaults.
    pub unset: Vec<String>,
}

/// A consumer group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupInfo {
    /// The name.
    pub name: String,
    /// How many members it has.
    pub members: usize,
}

/// A topic to create.
#[derive(Clone, Debug, Default)]
pub struct NewTopic {
    /// The name.
    pub name: String,
    /// Partitions; `None` takes the broker's default (4 in the embedded broker).
    pub partitions: Option<i32>,
    /// Replicas; `None` takes the broker's default. The embedded broker has one, whatever is said.
    pub replication: Option<i32>,
    /// Further settings by Kafka's names (`retention.ms`, `cleanup.policy`).
    pub config: BTreeMap<String, String>,
}

/// Why the broker could not do something, or is waited for.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{detail}")]
pub struct BrokerError {
    /// The kind.
    pub kind: BrokerErrorKind,
    /// What happened, for people; names broker, topic or group, and what to do where it is known.
    pub detail: String,
}

impl BrokerError {
    /// An error of a kind.
    pub fn new(kind: BrokerErrorKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }
}

/// The kinds of [`BrokerError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokerErrorKind {
    /// The broker cannot be reached.
    Unreachable,
    /// The topic does not exist (yet).
    UnknownTopic,
    /// The broker forbids it.
    Unauthorized,
    /// Another member owns the partition, or the group moved on.
    Fenced,
    /// The configuration can never work.
    Config,
    /// The disk is full, or another fault of the store.
    Storage,
    /// Anything else that may pass.
    Other,
}
