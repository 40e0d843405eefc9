//! A broker in memory for the tests of the control plane: single-partition semantics, groupless readers, a switch for "away".

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::{
    broker::{
        Acks, Admin, Broker, BrokerError, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, NewTopic, Outgoing, ProduceError,
        ProduceErrorKind, Producer, TransactionError,
    },
    record::{Batch, Position, Record, TopicPartition},
};

/// The broker. Clones are the same broker.
#[derive(Clone, Debug)]
pub(crate) struct Memory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    topics: Mutex<BTreeMap<String, Vec<Vec<Record>>>>,
    created: Mutex<Vec<NewTopic>>,
    /// Changes with each append, and says whether the broker is there.
    state: watch::Sender<(u64, bool)>,
    creation: watch::Sender<Creation>,
}

/// Whether the creation of topics is held back, and how many wait for it.
#[derive(Debug, Default)]
struct Creation {
    held: bool,
    waiting: usize,
}

impl Memory {
    pub(crate) fn new(there: bool) -> Self {
        let state = watch::Sender::new((0, there));
        Self(Arc::new(Inner { topics: Mutex::default(), created: Mutex::default(), state, creation: watch::Sender::default() }))
    }

    /// From now on who creates topics waits, or does not any more.
    pub(crate) fn hold_creation(&self, held: bool) {
        self.0.creation.send_modify(|creation| creation.held = held);
    }

    /// Waits until somebody waits for the creation of topics.
    pub(crate) async fn creation_waits(&self) {
        self.0.creation.subscribe().wait_for(|creation| creation.waiting > 0).await.unwrap();
    }

    pub(crate) fn set_there(&self, there: bool) {
        self.0.state.send_modify(|state| state.1 = there);
    }

    fn topics(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Vec<Record>>>> {
        self.0.topics.lock().unwrap()
    }

    /// Creates a topic by hand.
    pub(crate) fn create(&self, name: &str, partitions: usize) {
        self.topics().entry(name.to_owned()).or_insert_with(|| vec![Vec::new(); partitions]);
    }

    /// Deletes a topic.
    pub(crate) fn delete(&self, name: &str) {
        self.topics().remove(name);
        self.0.state.send_modify(|state| state.0 += 1);
    }

    /// Appends a record by hand.
    pub(crate) fn append(&self, topic: &str, partition: usize, key: &str, value: Option<&[u8]>) -> i64 {
        let record = Record { key: Some(key.to_owned().into()), value: value.map(bytes::Bytes::copy_from_slice), ..Record::default() };
        self.put(topic, partition, record)
    }

    fn put(&self, topic: &str, partition: usize, record: Record) -> i64 {
        let mut topics = self.topics();
        let records = &mut topics.get_mut(topic).unwrap()[partition];
        records.push(record);
        let offset = records.len() as i64 - 1;
        drop(topics);
        self.0.state.send_modify(|state| state.0 += 1);
        offset
    }

    /// The records of a partition.
    pub(crate) fn records(&self, topic: &str) -> Vec<Record> {
        self.topics().get(topic).map(|partitions| partitions.concat()).unwrap_or_default()
    }

    /// What was created through [`Admin`], in order.
    pub(crate) fn created(&self) -> Vec<NewTopic> {
        self.0.created.lock().unwrap().clone()
    }

    fn check(&self) -> Result<(), BrokerError> {
        if self.0.state.borrow().1 { Ok(()) } else { Err(BrokerError::new(BrokerErrorKind::Unreachable, "memory:1 refuses connections")) }
    }
}

impl Broker for Memory {
    fn system(&self) -> &'static str {
        "memory"
    }

    fn producer(&self) -> Arc<dyn Producer> {
        Arc::new(self.clone())
    }

    fn consumer(&self, config: ConsumerConfig) -> Result<Box<dyn Consumer>, BrokerError> {
        assert!(config.group.is_none(), "the control plane reads without a group");
        let topic = config.topics[0].clone();
        Ok(Box::new(Reader { broker: self.clone(), state: self.0.state.subscribe(), topic, next: BTreeMap::new(), away: false }))
    }

    fn admin(&self) -> Arc<dyn Admin> {
        Arc::new(self.clone())
    }

    fn health(&self) -> Result<(), BrokerError> {
        self.check()
    }

    fn close(&self, _: Duration) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Producer for Memory {
    fn send(&self, records: Vec<Outgoing>) -> Acks {
        let results: Vec<_> = records
            .into_iter()
            .map(|out| {
                self.check().map_err(|error| ProduceError { kind: ProduceErrorKind::Unavailable, detail: error.detail })?;
                let partition = out.partition.unwrap_or(0);
                let offset = self.put(&out.topic, partition as usize, out.record);
                Ok(Position { partition: TopicPartition::new(out.topic, partition), offset })
            })
            .collect();
        Box::pin(async move { results })
    }

    fn known_partitions(&self, topic: &str) -> Option<i32> {
        self.topics().get(topic).map(|partitions| partitions.len() as i32)
    }

    fn learn_topic(&self, topic: &str, _: Duration) -> BoxFuture<'_, Result<i32, ProduceError>> {
        let known = self.known_partitions(topic);
        let detail = format!("no topic {topic}");
        Box::pin(async move { known.ok_or(ProduceError { kind: ProduceErrorKind::UnknownTopic, detail }) })
    }
}

impl Admin for Memory {
    fn topics(&self) -> BoxFuture<'_, Result<Arc<BTreeMap<String, i32>>, BrokerError>> {
        Box::pin(async {
            self.check()?;
            let topics = Memory::topics(self).iter().map(|(name, partitions)| (name.clone(), partitions.len() as i32)).collect();
            Ok(Arc::new(topics))
        })
    }

    fn create_topics(&self, topics: Vec<NewTopic>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async move {
            self.0.creation.send_modify(|creation| creation.waiting += 1);
            self.0.creation.subscribe().wait_for(|creation| !creation.held).await.unwrap();
            self.0.creation.send_modify(|creation| creation.waiting -= 1);
            self.check()?;
            for topic in topics {
                self.create(&topic.name, topic.partitions.unwrap_or(4) as usize);
                self.0.created.lock().unwrap().push(topic);
            }
            Ok(())
        })
    }

    fn watermarks(&self, partition: &TopicPartition) -> BoxFuture<'_, Result<(i64, i64), BrokerError>> {
        let partition = partition.clone();
        Box::pin(async move {
            self.check()?;
            let topics = Memory::topics(self);
            let records = topics.get(&*partition.topic).and_then(|partitions| partitions.get(partition.partition as usize));
            records
                .map(|records| (0, records.len() as i64))
                .ok_or_else(|| BrokerError::new(BrokerErrorKind::UnknownTopic, format!("no partition {partition}")))
        })
    }

    fn offsets_at(&self, _: &str, _: i64) -> BoxFuture<'_, Result<Vec<i64>, BrokerError>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn committed(&self, group: &str, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Result<Vec<Option<Commit>>, BrokerError>> {
        // A group of this name was at 1 everywhere.
        let known = group == "shop.known";
        let commit = move |partition| known.then(|| Commit { partition, offset: 1, metadata: String::new() });
        Box::pin(async move { Ok(partitions.into_iter().map(commit).collect()) })
    }

    fn commit_for(&self, _: &str, _: Vec<Commit>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async { Ok(()) })
    }

    fn delete_records(&self, _: Vec<(TopicPartition, i64)>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async { Ok(()) })
    }
}

struct Reader {
    broker: Memory,
    state: watch::Receiver<(u64, bool)>,
    topic: Arc<str>,
    next: BTreeMap<usize, usize>,
    away: bool,
}

impl Consumer for Reader {
    fn next(&mut self) -> BoxFuture<'_, Event> {
        Box::pin(async {
            loop {
                let there = self.state.borrow_and_update().1;
                if there == self.away {
                    self.away = !there;
                    return match self.broker.check() {
                        Ok(()) => Event::Recovered,
                        Err(error) => Event::Trouble(error),
                    };
                }
                if there {
                    let topics = self.broker.topics();
                    if !topics.contains_key(&*self.topic) {
                        self.next.clear();
                    }
                    for (partition, records) in topics.get(&*self.topic).into_iter().flatten().enumerate() {
                        let next = self.next.entry(partition).or_default();
                        if *next < records.len() {
                            let from = std::mem::replace(next, records.len());
                            let records = records.iter().enumerate().skip(from).map(|(offset, record)| (offset as i64, record.clone()));
                            let partition = TopicPartition::new(self.topic.clone(), partition as i32);
                            return Event::Records(Batch { partition, records: records.collect() });
                        }
                    }
                }
                self.state.changed().await.unwrap();
            }
        })
    }

    fn hold(&mut self, _: &TopicPartition) {}

    fn release(&mut self, _: &TopicPartition) {}

    fn assign(&mut self, _: Vec<(TopicPartition, i64)>) {}

    fn unassign(&mut self, _: &[TopicPartition]) {}

    fn seek(&mut self, _: &TopicPartition, _: i64) {}

    fn commit(&self, _: Vec<Commit>) -> BoxFuture<'static, Result<(), BrokerError>> {
        unreachable!("the control plane commits nothing")
    }

    fn transact(&self, _: Vec<Outgoing>, _: Vec<Commit>) -> BoxFuture<'static, Result<(), TransactionError>> {
        unreachable!("the control plane makes no transactions")
    }

    fn close(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }
}
