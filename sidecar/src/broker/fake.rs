//! A broker in memory, for the tests of the floors above.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};

use super::*;
use crate::{
    config::*,
    record::{Position, Record, TopicPartition},
};

/// What the fake does with records.
#[derive(Clone, Debug)]
pub(crate) enum Mode {
    Store,
    /// Never answers.
    Silent,
    Fail(ProduceErrorKind),
    /// Fails for this topic alone.
    FailTopic(ProduceErrorKind, &'static str),
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) mode: Mode,
    /// How many batches were sent.
    pub(crate) sends: usize,
    pub(crate) health: Option<String>,
    /// The topics that are known, with their records.
    pub(crate) topics: BTreeMap<String, Vec<Record>>,
    /// Topics that exist and have to be learned first.
    pub(crate) unlearned: Vec<String>,
    /// What `learn_topic` answers for others.
    pub(crate) learn: ProduceErrorKind,
    /// The end of every partition.
    pub(crate) high: i64,
    /// Whether there is a record at any offset, or later.
    pub(crate) readable: bool,
    /// How many commits fail from now on, as in a rebalance, and how.
    pub(crate) refused_commits: (usize, BrokerErrorKind),
    /// Commits are not answered any more.
    pub(crate) silent_commits: bool,
    /// The consumers that were made.
    pub(crate) consumers: Vec<FakeHandle>,
}

/// A broker in memory.
#[derive(Clone, Debug)]
pub(crate) struct Fake(pub(crate) Arc<Mutex<State>>);

/// The test's side of a consumer.
#[derive(Clone, Debug)]
pub(crate) struct FakeHandle {
    pub(crate) config: ConsumerConfig,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) commits: watch::Receiver<Vec<Commit>>,
    pub(crate) held: watch::Receiver<Vec<TopicPartition>>,
    /// Its sender is gone once the consumer is closed.
    pub(crate) closed: watch::Receiver<bool>,
}

impl Fake {
    pub(crate) fn new(topics: &[&str]) -> Self {
        Self(Arc::new(Mutex::new(State {
            mode: Mode::Store,
            sends: 0,
            health: None,
            topics: topics.iter().map(|name| ((*name).to_owned(), Vec::new())).collect(),
            unlearned: Vec::new(),
            learn: ProduceErrorKind::UnknownTopic,
            high: 0,
            readable: true,
            refused_commits: (0, BrokerErrorKind::Other),
            silent_commits: false,
            consumers: Vec::new(),
        })))
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.0.lock().unwrap().mode = mode;
    }

    pub(crate) fn records(&self, topic: &str) -> Vec<Record> {
        self.0.lock().unwrap().topics[topic].clone()
    }
}

pub(crate) fn config(services: &[&str]) -> Config {
    let address = "127.0.0.1:0".parse().unwrap();
    Config {
        mesh: "m".into(),
        services: services
            .iter()
            .map(|name| ServiceConfig { name: (*name).into(), app: None, publish: None, subscribe: None, token_file: None })
            .collect(),
        instance: None,
        labels: BTreeMap::new(),
        state: "state".into(),
        broker: BrokerConfig::Kafka(BTreeMap::new()),
        table: None,
        control: ControlConfig::default(),
        listen: Listen { api: address, admin: address, probe: address },
        tls: ListenTls::default(),
        telemetry: TelemetryConfig { otlp: None, log: "info".into(), log_format: LogFormat::Pretty },
        limits: Limits {
            record_bytes: 1024 * 1024,
            publish_timeout: Duration::from_millis(300),
            drain_timeout: Duration::from_secs(5),
            buffer_bytes: 1024 * 1024,
        },
    }
}

impl Broker for Fake {
    fn system(&self) -> &'static str {
        "fake"
    }

    fn producer(&self) -> Arc<dyn Producer> {
        Arc::new(self.clone())
    }

    fn consumer(&self, config: ConsumerConfig) -> Result<Box<dyn Consumer>, BrokerError> {
        let (events, receiver) = mpsc::channel(16);
        let (committing, commits) = watch::channel(Vec::new());
        let (holding, held) = watch::channel(Vec::new());
        let (open, closed) = watch::channel(false);
        self.0.lock().unwrap().consumers.push(FakeHandle { config, events, commits, held, closed });
        Ok(Box::new(FakeConsumer { broker: self.clone(), receiver, committing, holding, open }))
    }

    fn admin(&self) -> Arc<dyn Admin> {
        Arc::new(self.clone())
    }

    fn health(&self) -> Result<(), BrokerError> {
        match &self.0.lock().unwrap().health {
            None => Ok(()),
            Some(why) => Err(BrokerError::new(BrokerErrorKind::Unreachable, why.clone())),
        }
    }

    fn close(&self, _deadline: Duration) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Producer for Fake {
    fn send(&self, records: Vec<Outgoing>) -> Acks {
        let mut state = self.0.lock().unwrap();
        state.sends += 1;
        match state.mode.clone() {
            Mode::Silent => Box::pin(std::future::pending()),
            Mode::Fail(kind) => {
                let failed = records.iter().map(|_| Err(ProduceError { kind, detail: format!("{kind:?}") })).collect();
                Box::pin(async { failed })
            }
            mode => {
                let stored = records.into_iter().map(|outgoing| {
                    if let Mode::FailTopic(kind, topic) = mode
                        && *outgoing.topic == *topic
                    {
                        return Err(ProduceError { kind, detail: format!("{kind:?}") });
                    }
                    let log = state.topics.get_mut(&*outgoing.topic).expect("an unknown topic was sent to");
                    log.push(outgoing.record);
                    Ok(Position { partition: TopicPartition::new(outgoing.topic, 0), offset: log.len() as i64 - 1 })
                });
                let stored = stored.collect();
                Box::pin(async { stored })
            }
        }
    }

    fn known_partitions(&self, topic: &str) -> Option<i32> {
        self.0.lock().unwrap().topics.get(topic).map(|_| 1)
    }

    fn learn_topic(&self, topic: &str, _deadline: Duration) -> BoxFuture<'_, Result<i32, ProduceError>> {
        let mut state = self.0.lock().unwrap();
        let known = state.unlearned.iter().any(|name| name == topic);
        let answer = match known {
            true => {
                state.topics.insert(topic.to_owned(), Vec::new());
                Ok(1)
            }
            false => Err(ProduceError { kind: state.learn, detail: "no such topic".to_owned() }),
        };
        Box::pin(async { answer })
    }
}

struct FakeConsumer {
    broker: Fake,
    receiver: mpsc::Receiver<Event>,
    committing: watch::Sender<Vec<Commit>>,
    holding: watch::Sender<Vec<TopicPartition>>,
    open: watch::Sender<bool>,
}

impl Consumer for FakeConsumer {
    fn next(&mut self) -> BoxFuture<'_, Event> {
        Box::pin(async {
            match self.receiver.recv().await {
                Some(event) => event,
                None => std::future::pending().await,
            }
        })
    }

    fn hold(&mut self, partition: &TopicPartition) {
        self.holding.send_modify(|held| held.push(partition.clone()));
    }

    fn release(&mut self, partition: &TopicPartition) {
        self.holding.send_modify(|held| held.retain(|other| other != partition));
    }

    fn assign(&mut self, _partitions: Vec<(TopicPartition, i64)>) {}

    fn unassign(&mut self, _partitions: &[TopicPartition]) {}

    fn seek(&mut self, _partition: &TopicPartition, _offset: i64) {}

    fn commit(&self, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), BrokerError>> {
        let mut state = self.broker.0.lock().unwrap();
        if state.silent_commits {
            return Box::pin(std::future::pending());
        }
        let (refused, kind) = state.refused_commits;
        if let Some(left) = refused.checked_sub(1) {
            state.refused_commits.0 = left;
            return Box::pin(async move { Err(BrokerError::new(kind, "the group takes no commits now")) });
        }
        self.committing.send_modify(|commits| commits.extend(offsets));
        Box::pin(async { Ok(()) })
    }

    fn transact(&self, records: Vec<Outgoing>, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), TransactionError>> {
        let mode = self.broker.0.lock().unwrap().mode.clone();
        let refused = |kind, topic: &str| {
            let refused = records.iter().enumerate().filter(|(_, outgoing)| *outgoing.topic == *topic);
            let error = |index| (index, ProduceError { kind, detail: format!("{kind:?}") });
            refused.map(|(index, _)| error(index)).collect::<Vec<_>>()
        };
        let error = match mode {
            Mode::Silent => return Box::pin(std::future::pending()),
            Mode::Fail(kind) => Some(TransactionError::Aborted(BrokerError::new(BrokerErrorKind::Other, format!("{kind:?}")))),
            Mode::FailTopic(kind, topic) => Some(refused(kind, topic)).filter(|refused| !refused.is_empty()).map(TransactionError::Refused),
            Mode::Store => None,
        };
        if let Some(error) = error {
            return Box::pin(async { Err(error) });
        }
        drop(self.broker.send(records));
        self.committing.send_modify(|commits| commits.extend(offsets));
        Box::pin(async { Ok(()) })
    }

    fn close(self: Box<Self>) -> BoxFuture<'static, ()> {
        self.open.send_replace(true);
        Box::pin(async {})
    }
}

impl Admin for Fake {
    fn topics(&self) -> BoxFuture<'_, Result<Arc<BTreeMap<String, i32>>, BrokerError>> {
        let topics = self.0.lock().unwrap().topics.keys().map(|name| (name.clone(), 1)).collect();
        Box::pin(async { Ok(Arc::new(topics)) })
    }

    fn create_topics(&self, _topics: Vec<NewTopic>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async { Ok(()) })
    }

    fn watermarks(&self, _partition: &TopicPartition) -> BoxFuture<'_, Result<(i64, i64), BrokerError>> {
        Box::pin(async { Ok((0, self.0.lock().unwrap().high)) })
    }

    fn readable(&self, from: Vec<Position>) -> BoxFuture<'_, Vec<Result<bool, BrokerError>>> {
        Box::pin(async move { from.iter().map(|_| Ok(self.0.lock().unwrap().readable)).collect() })
    }

    fn offsets_at(&self, _topic: &str, _timestamp_ms: i64) -> BoxFuture<'_, Result<Vec<i64>, BrokerError>> {
        Box::pin(async { Ok(vec![0]) })
    }

    fn committed(&self, _group: &str, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Result<Vec<Option<Commit>>, BrokerError>> {
        Box::pin(async move { Ok(partitions.iter().map(|_| None).collect()) })
    }

    fn commit_for(&self, _group: &str, _offsets: Vec<Commit>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async { Ok(()) })
    }

    fn delete_records(&self, _below: Vec<(TopicPartition, i64)>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async { Ok(()) })
    }
}
