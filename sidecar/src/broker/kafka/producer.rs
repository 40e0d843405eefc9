//! The shared idempotent producer.
//!
//! `send` hands each record to librdkafka before it returns; one thread serves the delivery reports. A batch has one shared state, and
//! wakes its future once, when its last record is answered.
//!
//! Invariant: records are never sent a second time from here. A fatal error fails what was sent and begins with a new producer.
//! Invariant: when the queue is full, the rest of the batch fails too, so that no record overtakes another.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use futures_util::future::BoxFuture;
use rdkafka::{
    ClientContext,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    error::KafkaError,
    message::{Header as KafkaHeader, Message, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext},
    util::IntoOpaque,
};
use tokio::sync::oneshot;

use super::{
    admin::{AGAIN, Asker},
    error::produce_error,
    health::Health,
    settings::Settings,
    wakeup::lock,
};
use crate::{
    broker::{Acks, BrokerError, BrokerErrorKind, Outgoing, ProduceError, ProduceErrorKind, Producer},
    record::{Header, Position, TopicPartition},
};

/// How long the polling thread waits for delivery reports before it looks whether it should end.
const POLL: Duration = Duration::from_millis(250);
/// How long a topic's partition count is believed.
const TOPIC_AGE: Duration = Duration::from_secs(300);

type AckResult = Result<Position, ProduceError>;
type Client = BaseProducer<Context>;

/// The producer behind the trait.
#[derive(Debug)]
pub(super) struct KafkaProducer {
    shared: Arc<Shared>,
    asker: Arc<Asker>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    /// `None` once it is closed.
    client: ArcSwapOption<Client>,
    settings: Settings,
    health: Arc<Health>,
    topics: Arc<Topics>,
    stop: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// The topics that are known to exist.
#[derive(Debug, Default)]
pub(super) struct Topics(RwLock<HashMap<Arc<str>, (i32, Instant)>>);

impl Topics {
    /// The partition count, if the topic was seen not long ago.
    pub(super) fn get(&self, topic: &str) -> Option<i32> {
        self.last_seen(topic).filter(|(_, seen)| seen.elapsed() < TOPIC_AGE).map(|(count, _)| count)
    }

    fn last_seen(&self, topic: &str) -> Option<(i32, Instant)> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(topic).copied()
    }

    /// The topic exists, with this many partitions.
    pub(super) fn put(&self, topic: &str, partitions: i32) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(topic.into(), (partitions, Instant::now()));
    }

    /// The topic does not exist any more.
    pub(super) fn forget(&self, topic: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(topic);
    }
}

/// The state of a batch that was sent.
struct BatchState {
    slots: Vec<Slot>,
    waiting: usize,
    done: Option<oneshot::Sender<Vec<AckResult>>>,
}

enum Slot {
    Waiting(Arc<str>),
    Done(AckResult),
}

impl BatchState {
    fn finish(&mut self) {
        if let Some(done) = self.done.take() {
            let results = std::mem::take(&mut self.slots).into_iter().map(|slot| match slot {
                Slot::Done(result) => result,
                Slot::Waiting(topic) => Err(gone(&topic)),
            });
            // The caller may have dropped the future: nobody wants to know.
            drop(done.send(results.collect()));
        }
    }
}

impl Drop for BatchState {
    fn drop(&mut self) {
        self.finish();
    }
}

fn gone(topic: &str) -> ProduceError {
    ProduceError {
        kind: ProduceErrorKind::Fatal,
        detail: format!("topic `{topic}`: the producer was closed before the acknowledgement came"),
    }
}

fn closed(topic: &str) -> ProduceError {
    ProduceError {
        kind: ProduceErrorKind::Unavailable,
        detail: format!("topic `{topic}`: the producer is closed: this sidecar is shutting down"),
    }
}

/// What librdkafka carries along with a record.
pub(super) struct Ticket {
    batch: Arc<Mutex<BatchState>>,
    index: usize,
}

/// The offset of a record that is stored, when the broker does not tell where.
const UNKNOWN_OFFSET: i64 = -1;

/// The context of a producer: delivery reports and errors.
struct Context {
    health: Arc<Health>,
    topics: Arc<Topics>,
    /// An error came. Its code does not say whether it is fatal; the client does.
    failed: AtomicBool,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        self.health.log(level, facility, text);
    }

    fn stats_raw(&self, _: &[u8]) {}

    fn error(&self, error: KafkaError, reason: &str) {
        self.failed.store(true, Ordering::Release);
        if let Some(code) = error.rdkafka_error_code() {
            self.health.report(code, reason);
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Ticket>;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: Box<Ticket>) {
        let mut batch = lock(&ticket.batch);
        let Some(slot) = batch.slots.get_mut(ticket.index) else { return };
        let Slot::Waiting(topic) = slot else { return };
        let answer = match result {
            Ok(message) => Ok(Position {
                partition: TopicPartition { topic: topic.clone(), partition: message.partition() },
                // A request that was sent again since its answer was lost, and had been stored, is acknowledged as such: where, nobody says.
                offset: message.offset().max(UNKNOWN_OFFSET),
            }),
            Err((error, _)) => {
                let error = produce_error(topic, self.health.bootstrap(), error);
                if error.kind == ProduceErrorKind::UnknownTopic {
                    self.topics.forget(topic);
                }
                Err(error)
            }
        };
        *slot = Slot::Done(answer);
        batch.waiting -= 1;
        if batch.waiting == 0 {
            batch.finish();
        }
    }
}

impl KafkaProducer {
    pub(super) fn open(settings: Settings, health: Arc<Health>, asker: Arc<Asker>, topics: Arc<Topics>) -> Result<Self, BrokerError> {
        let client = create(&settings, &health, &topics)?;
        let shared =
            Arc::new(Shared { client: ArcSwapOption::from_pointee(client), settings, health, topics, stop: AtomicBool::new(false) });
        let thread = std::thread::Builder::new()
            .name("kafka-producer".to_owned())
            .spawn({
                let shared = shared.clone();
                move || shared.serve()
            })
            .map_err(|error| BrokerError::new(BrokerErrorKind::Other, format!("kafka: no thread for the producer: {error}")))?;
        Ok(Self { shared, asker, thread: Mutex::new(Some(thread)) })
    }

    /// Waits for what was sent, then stops the thread. Blocks.
    pub(super) fn close(&self, deadline: Duration) -> Result<(), BrokerError> {
        let Some(client) = self.shared.client.load_full() else { return Ok(()) };
        let flushed = client.flush(deadline);
        let left = client.in_flight_count();
        drop(client);
        self.shared.stop.store(true, Ordering::Release);
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("kafka: the producer's thread panicked");
        }
        flushed.map_err(|error| {
            let detail = format!("kafka: {left} records had no acknowledgement within {deadline:?} of closing and may be lost: {error}");
            BrokerError::new(BrokerErrorKind::Unreachable, detail)
        })
    }
}

impl Drop for KafkaProducer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
    }
}

fn create(settings: &Settings, health: &Arc<Health>, topics: &Arc<Topics>) -> Result<Client, BrokerError> {
    let context = Context { health: health.clone(), topics: topics.clone(), failed: AtomicBool::new(false) };
    BaseProducer::from_config_and_context(&settings.producer(), context)
        .map_err(|error| super::error::broker_error("kafka: producer", &error))
}

impl Shared {
    /// The polling thread.
    fn serve(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let Some(client) = self.client.load_full() else { break };
            client.poll(POLL);
            if client.context().failed.swap(false, Ordering::AcqRel)
                && let Some((code, reason)) = client.client().fatal_error()
            {
                tracing::error!(%code, reason, "kafka: the producer failed for good and is rebuilt");
                self.rebuild(client);
            }
        }
        if let Some(client) = self.client.swap(None) {
            retire(client);
        }
    }

    /// Puts a new producer in the place of one that failed for good. What the old one still holds fails there.
    fn rebuild(&self, old: Arc<Client>) {
        match create(&self.settings, &self.health, &self.topics) {
            Ok(client) => {
                self.client.store(Some(Arc::new(client)));
                retire(old);
            }
            Err(error) => {
                // The old producer refuses every record, so nothing is lost by waiting.
                tracing::error!("kafka: the producer could not be rebuilt, trying again: {error}");
                old.context().failed.store(true, Ordering::Release);
                old.poll(Duration::from_secs(1));
            }
        }
    }
}

/// Drops a producer here, on a thread that may block, once no `send` holds it any more.
fn retire(mut client: Arc<Client>) {
    for _ in 0..100 {
        client.poll(Duration::from_millis(50));
        match Arc::try_unwrap(client) {
            Ok(client) => return drop(client),
            Err(shared) => client = shared,
        }
    }
}

impl Producer for KafkaProducer {
    fn send(&self, records: Vec<Outgoing>) -> Acks {
        if records.is_empty() {
            return Box::pin(std::future::ready(Vec::new()));
        }
        let (done, answer) = oneshot::channel();
        let slots = records.iter().map(|record| Slot::Waiting(record.topic.clone())).collect();
        let batch = Arc::new(Mutex::new(BatchState { slots, waiting: records.len(), done: Some(done) }));
        let client = self.shared.client.load();
        let bootstrap = self.shared.health.bootstrap();
        let mut full: Option<ProduceError> = None;
        for (index, outgoing) in records.iter().enumerate() {
            let result = match &full {
                Some(error) => Err(error.clone()),
                None => match client.as_deref() {
                    Some(client) => enqueue(client, outgoing, Ticket { batch: batch.clone(), index }, bootstrap),
                    None => Err(closed(&outgoing.topic)),
                },
            };
            if let Err(error) = result {
                if error.kind == ProduceErrorKind::QueueFull {
                    full.get_or_insert_with(|| error.clone());
                }
                let mut batch = lock(&batch);
                batch.slots[index] = Slot::Done(Err(error));
                batch.waiting -= 1;
                if batch.waiting == 0 {
                    batch.finish();
                }
            }
        }
        drop(batch);
        // The state answers even when it is dropped.
        Box::pin(async move { answer.await.unwrap_or_default() })
    }

    fn known_partitions(&self, topic: &str) -> Option<i32> {
        self.shared.topics.get(topic)
    }

    fn learn_topic(&self, topic: &str, deadline: Duration) -> BoxFuture<'_, Result<i32, ProduceError>> {
        let topic = topic.to_owned();
        Box::pin(async move {
            let last = self.shared.topics.last_seen(&topic).map(|(count, _)| count);
            let mut asked = self.asker.partitions(topic.clone(), deadline).await;
            if matches!(asked, Ok(None)) {
                // A topic that was created just now is not known to every broker at once.
                tokio::time::sleep(AGAIN).await;
                asked = self.asker.partitions(topic.clone(), deadline).await;
            }
            match (asked, last) {
                (Ok(Some(count)), _) => {
                    self.shared.topics.put(&topic, count);
                    Ok(count)
                }
                (Ok(None), _) => {
                    self.shared.topics.forget(&topic);
                    let detail = format!("there is no topic `{topic}` in Kafka {}", self.shared.health.bootstrap());
                    Err(ProduceError { kind: ProduceErrorKind::UnknownTopic, detail })
                }
                // The broker is away: what was true is believed.
                (Err(error), Some(count)) if error.kind == BrokerErrorKind::Unreachable => Ok(count),
                (Err(error), _) => {
                    let kind = match error.kind {
                        BrokerErrorKind::Unauthorized => ProduceErrorKind::Unauthorized,
                        BrokerErrorKind::Config => ProduceErrorKind::UnknownTopic,
                        _ => ProduceErrorKind::Unavailable,
                    };
                    Err(ProduceError { kind, detail: error.detail })
                }
            }
        })
    }
}

/// Hands a record to librdkafka, which copies it.
fn enqueue(client: &Client, outgoing: &Outgoing, ticket: Ticket, bootstrap: &str) -> Result<(), ProduceError> {
    let base = base_record(outgoing, Box::new(ticket))?;
    client.send(base).map_err(|(error, _)| produce_error(&outgoing.topic, bootstrap, &error))
}

/// A record in librdkafka's form.
pub(super) fn base_record<T: IntoOpaque>(outgoing: &Outgoing, ticket: T) -> Result<BaseRecord<'_, [u8], [u8], T>, ProduceError> {
    let record = &outgoing.record;
    let refused = |detail: String| ProduceError { kind: ProduceErrorKind::Refused, detail };
    if record.headers.iter().any(|header| header.name.contains('\0')) {
        return Err(refused(format!(
            "topic `{}`: a header's name contains a NUL character, which Kafka's clients cannot read",
            outgoing.topic
        )));
    }
    if outgoing.partition.is_some_and(|partition| partition < 0) {
        let detail = format!("topic `{}`: partition {} is negative", outgoing.topic, outgoing.partition.unwrap_or_default());
        return Err(ProduceError { kind: ProduceErrorKind::UnknownPartition, detail });
    }
    let mut base = BaseRecord::<'_, [u8], [u8], T>::with_opaque_to(&outgoing.topic, ticket);
    base.partition = outgoing.partition;
    base.key = record.key.as_deref();
    base.payload = record.value.as_deref();
    base.timestamp = record.timestamp_ms;
    if !record.headers.is_empty() {
        base.headers = Some(headers(&record.headers));
    }
    Ok(base)
}

fn headers(headers: &[Header]) -> OwnedHeaders {
    headers.iter().fold(OwnedHeaders::new_with_capacity(headers.len()), |all, header| {
        all.insert(KafkaHeader { key: &header.name, value: header.value.as_deref() })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rdkafka::{
        mocking::MockCluster,
        types::{RDKafkaApiKey, RDKafkaRespErr},
    };

    use super::*;
    use crate::{
        broker::{
            Broker as _,
            kafka::{KafkaBroker, KafkaOptions},
        },
        record::Record,
    };

    fn one(topic: &Arc<str>) -> Vec<Outgoing> {
        vec![Outgoing { topic: topic.clone(), partition: Some(0), record: Record { value: Some("v".into()), ..Record::default() } }]
    }

    /// What the old producer held may be stored: nobody but its caller, who hears of it, may send it again.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_producer_that_is_rebuilt_sends_nothing_of_the_old_one_again() {
        for code in
            [RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER, RDKafkaRespErr::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED]
        {
            let cluster = MockCluster::new(1).unwrap();
            cluster.create_topic("t", 1, 1).unwrap();
            let keys = BTreeMap::from([("bootstrap.servers".to_owned(), cluster.bootstrap_servers())]);
            let broker = KafkaBroker::open(keys, KafkaOptions::default()).unwrap();
            let (producer, topic): (_, Arc<str>) = (broker.producer(), "t".into());
            assert_eq!(producer.send(one(&topic)).await.remove(0).unwrap().offset, 0);
            cluster.request_errors(RDKafkaApiKey::Produce, &[code]);
            // Some of these are under way when it fails, and some wait behind them.
            let sent: Vec<_> = (0..50).map(|_| producer.send(one(&topic))).collect();
            let mut stored = 1;
            for acks in sent {
                match acks.await.remove(0) {
                    Ok(position) => {
                        assert_eq!(position.offset, stored, "{code:?}");
                        stored += 1;
                    }
                    Err(error) => assert_ne!(error.kind, ProduceErrorKind::TimedOut, "{code:?}: {error}"),
                }
            }
            let next = tokio::time::timeout(Duration::from_secs(20), async {
                loop {
                    if let Ok(position) = producer.send(one(&topic)).await.remove(0) {
                        return position.offset;
                    }
                }
            });
            assert_eq!(next.await.unwrap(), stored, "{code:?}: a record that was answered with a failure was sent again");
            broker.close(Duration::from_secs(5)).await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_fatal_error_fails_what_was_sent_and_a_new_producer_goes_on() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("t", 1, 1).unwrap();
        let keys = BTreeMap::from([("bootstrap.servers".to_owned(), cluster.bootstrap_servers())]);
        let broker = KafkaBroker::open(keys, KafkaOptions::default()).unwrap();
        let (producer, topic): (_, Arc<str>) = (broker.producer(), "t".into());
        assert!(producer.send(one(&topic)).await[0].is_ok());
        let first = Arc::downgrade(&broker.producer.shared.client.load_full().unwrap());
        cluster.request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER]);
        let error = producer.send(one(&topic)).await.remove(0).unwrap_err();
        assert_eq!(error.kind, ProduceErrorKind::Fatal, "{error}");
        // Until the new producer stands, the old one refuses.
        let recovered = tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                match producer.send(one(&topic)).await.remove(0) {
                    Ok(position) => return position,
                    Err(error) => assert_eq!(error.kind, ProduceErrorKind::Fatal, "{error}"),
                }
            }
        });
        assert!(recovered.await.is_ok());
        let second = broker.producer.shared.client.load_full().unwrap();
        assert!(!std::ptr::eq(first.as_ptr(), Arc::as_ptr(&second)), "there is a new producer");
        drop(second);
        broker.close(Duration::from_secs(5)).await.unwrap();
        let error = producer.send(one(&topic)).await.remove(0).unwrap_err();
        assert_eq!(error.kind, ProduceErrorKind::Unavailable, "{error}");
    }
}
