//! The embedded broker: one process, durable, for a laptop, a demo, a test, an edge box. It speaks no network protocol.
//!
//! | file | what |
//! |---|---|
//! | `log` | topics, partitions, watermarks and hot tails in memory |
//! | `queue`, `writer` | the one thread that writes: group commit, then wake and acknowledge |
//! | `reader` | the thread that reads what is not in memory |
//! | `store`, `codec`, `checkpoint` | SQLite, the encoding of a row, the write-ahead log |
//! | `group`, `assignor` | consumer groups within the process |
//! | `consumer`, `inbox`, `client` | the consumer, the producer, the administration |
//! | `housekeeping` | retention, compaction, free pages |
//!
//! Invariant: what is acknowledged is on disk, after fsync; `kill -9` loses none of it.
//! Invariant: one process owns the folder.
//! Invariant: memory is bounded by the queue, the tails and the consumers' buffers, however long the log is.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    checkpoint::Checkpoints,
    client::{EmbeddedAdmin, EmbeddedProducer},
    consumer::EmbeddedConsumer,
    group::{Groups, Identities},
    inbox::Inbox,
    log::{Catalog, lock},
    queue::{Job, NotQueued, Queue},
    reader::{Read, Reads},
    store::{Store, StoreOptions},
    writer::Writer,
};
use super::{Admin, Broker, BrokerError, BrokerErrorKind, Consumer, ConsumerConfig, NewTopic, Producer, sync};

mod assignor;
mod checkpoint;
mod client;
mod codec;
mod consumer;
mod group;
mod housekeeping;
mod inbox;
#[cfg(test)]
mod interleavings;
mod log;
mod names;
mod partitioner;
mod queue;
mod reader;
mod store;
mod writer;

/// Tells the time: milliseconds since 1970-01-01 UTC.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// How the broker runs.
#[derive(Clone)]
pub struct EmbeddedConfig {
    /// The folder of the data; created if absent. Belongs to one process at a time.
    pub path: PathBuf,
    /// Partitions of a topic that is created without a count; 4.
    pub default_partitions: i32,
    /// Retention of topics that say nothing, counted from the append; `None` keeps everything; 7 days.
    pub default_retention: Option<Duration>,
    /// The largest record: key, value and headers, in bytes; 1 MiB, as in Kafka.
    pub max_record_bytes: usize,
    /// Records that wait for the disk, in bytes; 32 MiB. Beyond that a send is refused with `QueueFull`.
    pub queue_bytes: usize,
    /// The newest records that are kept in memory for readers, over all topics, in bytes; 8 MiB.
    pub tail_bytes: usize,
    /// The largest size of the store's file in bytes; `None` is bounded by the disk alone.
    pub max_store_bytes: Option<u64>,
    /// How long a member may take to give up partitions; 5 s.
    pub revoke_timeout: Duration,
    /// How often retention and compaction look for work; 30 s.
    pub housekeeping: Duration,
    /// The clock for timestamps and retention; the system's.
    pub clock: Clock,
}

impl EmbeddedConfig {
    /// The defaults, with the data in this folder.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            default_partitions: 4,
            default_retention: Some(Duration::from_secs(7 * 86_400)),
            max_record_bytes: 1_048_588,
            queue_bytes: 32 << 20,
            tail_bytes: 8 << 20,
            max_store_bytes: None,
            revoke_timeout: Duration::from_secs(5),
            housekeeping: Duration::from_secs(30),
            clock: Arc::new(crate::record::now_ms),
        }
    }

    fn retention_ms(&self) -> Option<i64> {
        self.default_retention.map(|retention| i64::try_from(retention.as_millis()).unwrap_or(i64::MAX))
    }

    fn store_options(&self) -> StoreOptions {
        StoreOptions { max_bytes: self.max_store_bytes, default_retention_ms: self.retention_ms() }
    }
}

impl fmt::Debug for EmbeddedConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedConfig").field("path", &self.path).finish_non_exhaustive()
    }
}

/// What all parts of a broker share.
#[derive(Debug)]
struct Shared {
    config: EmbeddedConfig,
    catalog: Catalog,
    queue: Queue,
    reads: Reads,
    checkpoints: Checkpoints,
    groups: Groups,
    loners: Mutex<Vec<Weak<Inbox>>>,
    identities: Identities,
    failing: AtomicBool,
    failure: Mutex<Option<BrokerError>>,
    ids: AtomicU64,
    tasks: TaskTracker,
    closing: CancellationToken,
    /// The writer, where it has no thread: jobs and reads run on the caller's.
    inline: Option<Mutex<Option<Writer>>>,
}

impl Shared {
    fn new(config: EmbeddedConfig, inline: bool) -> Self {
        Self {
            queue: Queue::new(config.queue_bytes),
            config,
            catalog: Catalog::default(),
            reads: Reads::default(),
            checkpoints: Checkpoints::default(),
            groups: Groups::default(),
            loners: Mutex::default(),
            identities: Identities::default(),
            failing: AtomicBool::new(false),
            failure: Mutex::default(),
            ids: AtomicU64::new(1),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            inline: inline.then(Mutex::default),
        }
    }

    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    fn submit(&self, job: Job) -> Result<(), NotQueued> {
        self.queue.push(job)?;
        if let Some(writer) = &self.inline
            && let Some(writer) = &mut *lock(writer)
        {
            writer.run_queued();
        }
        Ok(())
    }

    fn read(&self, read: Read) -> Result<(), Read> {
        let Some(writer) = &self.inline else { return self.reads.push(read) };
        match &*lock(writer) {
            Some(writer) => {
                read(&writer.store);
                Ok(())
            }
            None => Err(read),
        }
    }

    async fn create_topics(&self, topics: Vec<NewTopic>) -> Result<BTreeMap<String, i32>, BrokerError> {
        let closed = || BrokerError::new(BrokerErrorKind::Unreachable, "the embedded broker is closed");
        let (reply, answer) = oneshot::channel();
        self.submit(Job::CreateTopics { topics, reply }).map_err(|_| closed())?;
        answer.await.unwrap_or_else(|_| Err(closed()))
    }

    fn add_loner(&self, inbox: &Arc<Inbox>) {
        let mut loners = lock(&self.loners);
        loners.retain(|loner| loner.strong_count() > 0);
        loners.push(Arc::downgrade(inbox));
    }

    /// A topic was created, altered or deleted.
    fn topic_changed(&self, topic: &str) {
        self.groups.topic_changed(topic);
        let loners: Vec<_> = lock(&self.loners).iter().filter_map(Weak::upgrade).collect();
        loners.iter().for_each(|inbox| inbox.assignment_changed());
    }

    fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    fn failed(&self, error: &BrokerError) {
        let before = lock(&self.failure).replace(error.clone());
        self.failing.store(true, Ordering::Relaxed);
        if before.is_none_or(|before| before.detail != error.detail) {
            tracing::error!(%error, "the store of the embedded broker fails; records are refused until it recovers");
        }
    }

    fn recovered(&self) {
        self.failing.store(false, Ordering::Relaxed);
        if lock(&self.failure).take().is_some() {
            tracing::info!("the store of the embedded broker works again");
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct EmbeddedBroker {
    shared: Arc<Shared>,
    threads: Mutex<Option<Threads>>,
}

/// What ends with the broker. The lock is given up last.
#[derive(Debug)]
struct Threads {
    writer: JoinHandle<Result<(), BrokerError>>,
    reader: JoinHandle<()>,
    checkpoints: JoinHandle<()>,
    _lock: File,
}

impl EmbeddedBroker {
    /// Opens the folder, and creates it if need be. Blocks for a few milliseconds.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Config`] if another process has the folder, or the file was written by a later version;
    /// [`BrokerErrorKind::Storage`] for faults of the disk.
    pub fn open(config: EmbeddedConfig) -> Result<Arc<Self>, BrokerError> {
        check(&config)?;
        let lock_file = own(&config.path)?;
        let options = config.store_options();
        let store = Store::open(Some(&config.path), options)?;
        let reader = Store::open_reader(&config.path)?;
        let checkpoints = Store::open_reader(&config.path)?;
        let shared = Arc::new(Shared::new(config, false));
        for topic in store.load(options)? {
            shared.catalog.insert(Arc::new(topic));
        }
        let (reading, moving) = (shared.clone(), shared.clone());
        let reader = spawn(&shared, "embedded-read", move || reading.reads.run(&reader))?;
        let checkpoints = spawn(&shared, "embedded-log", move || moving.checkpoints.run(&checkpoints))?;
        let mut writer = Writer::new(shared.clone(), store);
        writer.take_up()?;
        let abandon = Abandon(shared.clone());
        let writer = spawn(&shared, "embedded-write", move || {
            let _abandon = abandon;
            writer.run()
        })?;
        let threads = Threads { writer, reader, checkpoints, _lock: lock_file };
        Ok(Arc::new(Self { shared, threads: Mutex::new(Some(threads)) }))
    }

    /// A broker in memory, with the same semantics and without threads: everything happens on the caller's, so that a test with a paused
    /// clock and a seed is deterministic.
    ///
    /// # Errors
    /// As [`EmbeddedBroker::open`]; the path is not used.
    pub fn in_memory(config: EmbeddedConfig) -> Result<Arc<Self>, BrokerError> {
        check(&config)?;
        let store = Store::open(None, config.store_options())?;
        let shared = Arc::new(Shared::new(config, true));
        if let Some(inline) = &shared.inline {
            *lock(inline) = Some(Writer::new(shared.clone(), store));
        }
        Ok(Arc::new(Self { shared, threads: Mutex::new(None) }))
    }

    /// Ends the threads: what is queued is written, the log is moved into the file. Blocks.
    fn stop(shared: &Shared, threads: Option<Threads>) -> Result<(), BrokerError> {
        shared.closing.cancel();
        shared.tasks.close();
        shared.queue.close();
        shared.reads.close();
        shared.checkpoints.close();
        if let Some(inline) = &shared.inline {
            // The writer holds the shared part, so it must go for both to be freed.
            let writer = lock(inline).take();
            drop(writer);
        }
        let Some(Threads { writer, reader, checkpoints, _lock }) = threads else { return Ok(()) };
        let died = |name| BrokerError::new(BrokerErrorKind::Other, format!("embedded broker: the thread '{name}' panicked"));
        reader.join().map_err(|_| died("embedded-read"))?;
        checkpoints.join().map_err(|_| died("embedded-log"))?;
        writer.join().unwrap_or_else(|_| Err(died("embedded-write")))
    }
}

#[cfg(test)]
impl EmbeddedBroker {
    /// The member that joined a group last.
    pub(crate) fn newest_member(&self, group: &str) -> u64 {
        self.shared.groups.newest_member(group).unwrap_or_default()
    }

    /// Puts a member out of its group, as a broker does with one whose session is over. It is not told.
    pub(crate) fn evict(&self, group: &str, member: u64) {
        self.shared.groups.evict(group, member);
    }
}

impl Drop for EmbeddedBroker {
    fn drop(&mut self) {
        let threads = lock(&self.threads).take();
        if let Err(error) = Self::stop(&self.shared, threads) {
            tracing::error!(%error, "the embedded broker did not close well");
        }
    }
}

/// Answers those that wait when the writer ends, also if it panics.
struct Abandon(Arc<Shared>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.queue.abandon();
    }
}

/// Starts a thread; if that fails, those that run already end.
fn spawn<T: Send + 'static>(shared: &Shared, name: &str, run: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>, BrokerError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|error| {
        shared.reads.close();
        shared.checkpoints.close();
        let detail = format!("embedded broker: cannot start the thread {name}: {error}; raise the process's limit");
        BrokerError::new(BrokerErrorKind::Other, detail)
    })
}

/// Checks what no run could work with.
fn check(config: &EmbeddedConfig) -> Result<(), BrokerError> {
    names::check_partitions("the default", config.default_partitions).map_err(|detail| BrokerError::new(BrokerErrorKind::Config, detail))
}

/// Creates the folder and takes its lock, which ends with the process at the latest.
fn own(folder: &Path) -> Result<File, BrokerError> {
    let name = folder.display();
    let storage = |what: &str, error: &std::io::Error| {
        BrokerError::new(BrokerErrorKind::Storage, format!("embedded broker: cannot {what} {name}: {error}; check `broker.embedded.path`"))
    };
    std::fs::create_dir_all(folder).map_err(|error| storage("create the folder", &error))?;
    let file = File::options().create(true).truncate(false).write(true).open(folder.join("lock"));
    let file = file.map_err(|error| storage("open the lock file in", &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(BrokerError::new(
            BrokerErrorKind::Config,
            format!("embedded broker: the folder {name} is in use by another process; stop it, or set another `broker.embedded.path`"),
        )),
        Err(TryLockError::Error(error)) => Err(storage("lock the folder", &error)),
    }
}

impl Broker for EmbeddedBroker {
    fn system(&self) -> &'static str {
        "embedded"
    }

    fn producer(&self) -> Arc<dyn Producer> {
        Arc::new(EmbeddedProducer(self.shared.clone()))
    }

    /// Static membership is not needed within a process, so `instance` has no effect.
    fn consumer(&self, config: ConsumerConfig) -> Result<Box<dyn Consumer>, BrokerError> {
        for topic in &config.topics {
            names::check_topic(topic).map_err(|detail| BrokerError::new(BrokerErrorKind::Config, detail))?;
        }
        if config.group.as_deref() == Some("") {
            return Err(BrokerError::new(BrokerErrorKind::Config, "the consumer group's name is empty; name it, or use no group"));
        }
        Ok(Box::new(EmbeddedConsumer::new(self.shared.clone(), config)))
    }

    fn admin(&self) -> Arc<dyn Admin> {
        Arc::new(EmbeddedAdmin(self.shared.clone()))
    }

    fn health(&self) -> Result<(), BrokerError> {
        if !self.shared.is_failing() {
            return Ok(());
        }
        lock(&self.shared.failure).clone().map_or(Ok(()), Err)
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, Result<(), BrokerError>> {
        let threads = lock(&self.threads).take();
        let shared = self.shared.clone();
        Box::pin(async move {
            let stopped = tokio::task::spawn_blocking(move || Self::stop(&shared, threads));
            match tokio::time::timeout(deadline, stopped).await {
                Ok(Ok(result)) => result,
                Ok(Err(error)) => Err(BrokerError::new(BrokerErrorKind::Other, format!("embedded broker: closing failed: {error}"))),
                Err(_) => Err(BrokerError::new(
                    BrokerErrorKind::Storage,
                    format!("embedded broker: not closed within {} ms; nothing acknowledged is lost", deadline.as_millis()),
                )),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        broker::{Commit, Event, Outgoing, StartOffset},
        record::{Record, TopicPartition},
    };

    fn config(topic: &str) -> ConsumerConfig {
        let (group, topics) = (Some("g".to_owned()), vec![topic.into()]);
        ConsumerConfig { group, topics, instance: None, start: StartOffset::Earliest, buffer_bytes: 1 << 20, transactional_id: None }
    }

    async fn records(consumer: &mut Box<dyn Consumer>) -> (TopicPartition, usize) {
        loop {
            if let Event::Records(batch) = consumer.next().await {
                return (batch.partition, batch.records.len());
            }
        }
    }

    /// What it commits beside its subscription, as of retry topics, may belong to the partition that it lost.
    #[tokio::test(start_paused = true)]
    async fn who_does_not_know_yet_that_it_lost_a_partition_commits_nothing() {
        let broker = EmbeddedBroker::in_memory(EmbeddedConfig { default_partitions: 2, ..EmbeddedConfig::new("") }).expect("opens");
        let record = || Record { value: Some(Bytes::from_static(b"v")), ..Record::default() };
        let out = |topic: &str, partition| Outgoing { topic: topic.into(), partition: Some(partition), record: record() };
        let acks = broker.producer().send(vec![out("t", 0), out("t", 1), out("beside", 0)]).await;
        assert!(acks.iter().all(Result::is_ok));
        let mut silent = broker.consumer(config("t")).expect("a consumer");
        assert_eq!(records(&mut silent).await.1 + records(&mut silent).await.1, 2);
        let beside = || vec![Commit { partition: TopicPartition::new("beside", 0), offset: 1, metadata: String::new() }];
        assert!(silent.commit(beside()).await.is_ok());
        let mut other = broker.consumer(config("t")).expect("a consumer");
        assert_eq!(records(&mut other).await.1, 1);
        assert_eq!(silent.commit(beside()).await.map_err(|error| error.kind), Err(BrokerErrorKind::Fenced));
        let Event::Revoking(revoking) = silent.next().await else { panic!("it is told") };
        assert!(revoking.lost);
        assert_eq!(silent.commit(beside()).await.map_err(|error| error.kind), Err(BrokerErrorKind::Fenced), "told, but not given up");
        drop(revoking);
        while silent.commit(beside()).await.is_err() {
            tokio::task::yield_now().await;
        }
    }

    /// Nothing runs on another thread, so a paused clock moves only when everybody waits for it: here, for the silent member's time.
    #[tokio::test(start_paused = true)]
    async fn in_memory_keeps_to_a_paused_clock() {
        let started = tokio::time::Instant::now();
        let config_of_broker = EmbeddedConfig { default_partitions: 2, ..EmbeddedConfig::new("") };
        let timeout = config_of_broker.revoke_timeout;
        let broker = EmbeddedBroker::in_memory(config_of_broker).expect("opens");
        let out = |partition| Outgoing {
            topic: "t".into(),
            partition: Some(partition),
            record: Record { value: Some(Bytes::from_static(b"v")), ..Record::default() },
        };
        let acks = broker.producer().send((0..100).map(|index| out(index % 2)).collect()).await;
        assert!(acks.iter().all(Result::is_ok));
        let mut silent = broker.consumer(config("t")).expect("a consumer");
        assert_eq!(records(&mut silent).await.1 + records(&mut silent).await.1, 100);
        let mut other = broker.consumer(config("t")).expect("a consumer");
        assert_eq!(started.elapsed(), Duration::ZERO);
        let (partition, count) = records(&mut other).await;
        assert_eq!(count, 50);
        assert_eq!(started.elapsed().as_secs(), timeout.as_secs());
        let late = silent.commit(vec![Commit { partition, offset: 50, metadata: String::new() }]).await;
        assert_eq!(late.map_err(|error| error.kind), Err(BrokerErrorKind::Fenced));
        // The silent member learns of it when it looks.
        match silent.next().await {
            Event::Revoking(revoking) => assert!(revoking.lost),
            other => panic!("{other:?}"),
        }
        other.close().await;
        silent.close().await;
        broker.close(Duration::from_secs(1)).await.expect("closes");
    }

    fn out(value: &'static str) -> Outgoing {
        let record = Record { value: Some(Bytes::from_static(value.as_bytes())), ..Record::default() };
        Outgoing { topic: "t".into(), partition: Some(0), record }
    }

    /// What is read of a topic under whoever's feet it is deleted and made again: nothing of the old one is left to anybody, and nothing of the new
    /// one is passed over.
    #[tokio::test(start_paused = true)]
    async fn a_topic_that_is_made_again_is_another() {
        let broker = EmbeddedBroker::in_memory(EmbeddedConfig { default_partitions: 1, ..EmbeddedConfig::new("") }).expect("opens");
        let (producer, admin) = (broker.producer(), broker.admin());
        assert!(producer.send(vec![out("a"), out("b")]).await.iter().all(Result::is_ok));
        let mut member = broker.consumer(config("t")).expect("a consumer");
        assert_eq!(records(&mut member).await.1, 2);
        let partition = TopicPartition::new("t", 0);
        let commit = || vec![Commit { partition: partition.clone(), offset: 2, metadata: String::new() }];
        assert!(member.commit(commit()).await.is_ok());
        let mut chosen = broker.consumer(ConsumerConfig::reader(Vec::new(), StartOffset::Earliest, 1 << 20)).expect("a consumer");
        chosen.assign(vec![(partition.clone(), 0)]);
        assert_eq!(records(&mut chosen).await.1, 2);
        let mut reader = broker.consumer(ConsumerConfig::reader(vec!["t".into()], StartOffset::Earliest, 1 << 20)).expect("a consumer");
        assert_eq!(records(&mut reader).await.1, 2);

        admin.delete_topics(vec!["t".to_owned()]).await.expect("deletes");
        assert!(admin.topics().await.expect("topics").is_empty());
        assert!(member.commit(commit()).await.is_err(), "for a topic that is gone");
        assert!(producer.send(vec![out("new")]).await.iter().all(Result::is_ok));
        let mut lost = false;
        loop {
            match member.next().await {
                Event::Revoking(revoking) => lost = revoking.lost,
                Event::Records(batch) => {
                    assert_eq!(
                        (batch.records.len(), batch.records[0].0, &batch.records[0].1.value),
                        (1, 0, &Some(Bytes::from_static(b"new")))
                    );
                    break;
                }
                _ => {}
            }
        }
        assert!(lost, "it is told before");
        assert_eq!(admin.committed("g", vec![partition.clone()]).await.expect("offsets")[0].as_ref().map(|commit| commit.offset), Some(0));
        assert_eq!((records(&mut chosen).await.1, records(&mut reader).await.1), (1, 1));
        // The rows of the old one go piece by piece.
        for _ in 0..8 {
            assert!(producer.send(vec![out("more")]).await.iter().all(Result::is_ok));
        }
        let inline = broker.shared.inline.as_ref().expect("no thread");
        let left: u64 = {
            let writer = lock(inline);
            let store = &writer.as_ref().expect("open").store;
            let doomed = store.doomed().expect("reads");
            doomed.iter().flat_map(|doomed| &doomed.partitions).map(|partition| store.bytes(*partition).expect("reads")).sum()
        };
        assert_eq!(left, 0);
        assert_eq!(admin.watermarks(&partition).await.expect("watermarks"), (0, 9));
    }

    #[tokio::test]
    async fn a_deletion_is_finished_after_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        let broker = EmbeddedBroker::open(EmbeddedConfig::new(folder.path())).expect("opens");
        assert!(broker.producer().send(vec![out("a")]).await.iter().all(Result::is_ok));
        broker.admin().delete_topics(vec!["t".to_owned()]).await.expect("deletes");
        broker.close(Duration::from_secs(10)).await.expect("closes");
        drop(broker);
        let broker = EmbeddedBroker::open(EmbeddedConfig::new(folder.path())).expect("opens again");
        assert!(broker.admin().topics().await.expect("topics").is_empty());
        assert!(broker.producer().send(vec![out("b")]).await.iter().all(Result::is_ok));
        assert_eq!(broker.admin().watermarks(&TopicPartition::new("t", 0)).await.expect("watermarks"), (0, 1));
        let mut member = broker.consumer(config("t")).expect("a consumer");
        assert_eq!(records(&mut member).await.1, 1);
        member.close().await;
        broker.close(Duration::from_secs(10)).await.expect("closes");
    }

    /// Partitions that are added are given out, and what is there stays.
    #[tokio::test(start_paused = true)]
    async fn a_topic_gets_more_partitions_under_its_readers() {
        let broker = EmbeddedBroker::in_memory(EmbeddedConfig { default_partitions: 1, ..EmbeddedConfig::new("") }).expect("opens");
        assert!(broker.producer().send(vec![out("a")]).await.iter().all(Result::is_ok));
        let mut member = broker.consumer(config("t")).expect("a consumer");
        assert_eq!(records(&mut member).await.1, 1);
        let change = crate::broker::TopicChange { partitions: Some(3), ..Default::default() };
        broker.admin().alter_topic("t", change).await.expect("alters");
        assert!(broker.producer().send(vec![Outgoing { partition: Some(2), ..out("b") }]).await.iter().all(Result::is_ok));
        assert_eq!(records(&mut member).await, (TopicPartition::new("t", 2), 1));
        assert_eq!(broker.admin().topics().await.expect("topics").get("t"), Some(&3));
    }
}
