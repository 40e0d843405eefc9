//! Kafka past the sidecar: topics, the backlog, and the floors, all with librdkafka under the settings that the sidecar gives it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rdkafka::{
    ClientConfig, ClientContext, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    config::FromClientConfigAndContext as _,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    error::KafkaError,
    producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext},
    types::RDKafkaErrorCode,
};

use super::{
    ground::Filling,
    load::{self, KEYS, Span},
    measure::{Latency, Measured, histogram},
    service,
};

/// How many partitions a topic has, where nothing else is said.
pub const PARTITIONS: i32 = 4;

const TIMEOUT: Duration = Duration::from_secs(20);

fn client(bootstrap: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", bootstrap).set("allow.auto.create.topics", "false").set("log_level", "3");
    config
}

fn producer_config(bootstrap: &str) -> ClientConfig {
    let mut config = client(bootstrap);
    config
        .set("linger.ms", "0")
        .set("message.timeout.ms", "0")
        .set("partitioner", "murmur2_random")
        .set("queue.buffering.max.kbytes", "32768")
        // What a topic takes unless it is told otherwise, with the batch's own bytes.
        .set("message.max.bytes", "1048000")
        .set("queue.buffering.max.messages", "500000")
        .set("enable.idempotence", "true")
        .set("acks", "all");
    config
}

fn consumer_config(bootstrap: &str, group: &str) -> ClientConfig {
    let mut config = client(bootstrap);
    config
        .set("group.id", group)
        .set("fetch.wait.max.ms", "50")
        .set("fetch.queue.backoff.ms", "10")
        .set("queued.max.messages.kbytes", "8192")
        .set("queued.min.messages", "100000")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error");
    config
}

/// Makes topics, and deletes them.
pub struct Topics {
    admin: AdminClient<DefaultClientContext>,
    client: BaseConsumer,
}

impl std::fmt::Debug for Topics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Topics").finish_non_exhaustive()
    }
}

impl Topics {
    /// A client of these brokers.
    ///
    /// # Errors
    /// If librdkafka refuses.
    pub fn new(bootstrap: &str) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { admin: client(bootstrap).create()?, client: client(bootstrap).create()? }))
    }

    /// Makes a topic, and waits until it has its leaders.
    ///
    /// # Errors
    /// If Kafka refuses.
    pub async fn create(self: &Arc<Self>, topic: &str, partitions: i32) -> Result<()> {
        let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
        for result in self.admin.create_topics([&new], &AdminOptions::new().operation_timeout(Some(TIMEOUT))).await? {
            result.map_err(|(topic, code)| anyhow::anyhow!("topic {topic}: {code}"))?;
        }
        let (topics, topic) = (self.clone(), topic.to_owned());
        tokio::task::spawn_blocking(move || topics.count(&topic, partitions)).await??;
        Ok(())
    }

    /// Deletes topics.
    ///
    /// # Errors
    /// If Kafka does not answer.
    pub async fn delete(&self, topics: &[&str]) -> Result<()> {
        self.admin.delete_topics(topics, &AdminOptions::new()).await?;
        Ok(())
    }

    /// How many records a topic of so many partitions ever got. Blocks.
    ///
    /// # Errors
    /// If Kafka does not answer.
    pub fn count(&self, topic: &str, partitions: i32) -> Result<u64> {
        let mut count = 0;
        for partition in 0..partitions {
            count += u64::try_from(self.high(topic, partition)?)?;
        }
        Ok(count)
    }

    /// The high watermark. Other topics come and go: for a moment the client may not know this one.
    fn high(&self, topic: &str, partition: i32) -> Result<i64> {
        let end = Instant::now() + TIMEOUT;
        loop {
            match self.client.fetch_watermarks(topic, partition, TIMEOUT) {
                Ok((_, high)) => return Ok(high),
                Err(error) if Instant::now() > end => return Err(error).with_context(|| format!("{topic}/{partition}")),
                Err(_) => {
                    // Asking by name brings a topic that was made a moment ago into the client's cache.
                    drop(self.client.fetch_metadata(Some(topic), TIMEOUT));
                    thread::park_timeout(Duration::from_millis(20));
                }
            }
        }
    }
}

/// Counts acknowledgements.
#[derive(Clone, Default)]
struct Acknowledged(Arc<AtomicU64>, Arc<AtomicU64>);

impl ClientContext for Acknowledged {}

impl ProducerContext for Acknowledged {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        match result {
            Ok(_) => self.0.fetch_add(1, Ordering::Relaxed),
            Err(_) => self.1.fetch_add(1, Ordering::Relaxed),
        };
    }
}

/// A producer with a thread that serves its reports.
struct Sender {
    producer: Arc<BaseProducer<Acknowledged>>,
    acknowledged: Acknowledged,
    stop: Arc<AtomicBool>,
    poller: Option<thread::JoinHandle<()>>,
}

impl Sender {
    fn new(bootstrap: &str) -> Result<Self> {
        let acknowledged = Acknowledged::default();
        let producer = Arc::new(BaseProducer::from_config_and_context(&producer_config(bootstrap), acknowledged.clone())?);
        let stop = Arc::new(AtomicBool::new(false));
        let poller = thread::spawn({
            let (producer, stop) = (producer.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    producer.poll(Duration::from_millis(100));
                }
            }
        });
        Ok(Self { producer, acknowledged, stop, poller: Some(poller) })
    }

    fn send(&self, topic: &str, key: Option<&[u8]>, value: &[u8]) -> Result<()> {
        let mut record = BaseRecord::<'_, [u8], [u8]>::to(topic).payload(value);
        record.key = key;
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), refused)) => {
                    record = refused;
                    // Woken by nobody: the queue empties by itself.
                    thread::park_timeout(Duration::from_millis(1));
                }
                Err((error, _)) => return Err(error.into()),
            }
        }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.0.load(Ordering::Relaxed)
    }

    /// Waits for what is under way; says how many records were acknowledged.
    fn flush(&self) -> Result<u64> {
        self.producer.flush(Duration::from_secs(60))?;
        let failed = self.acknowledged.1.load(Ordering::Relaxed);
        ensure!(failed == 0, "{failed} records failed");
        Ok(self.acknowledged())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(poller) = self.poller.take() {
            drop(poller.join());
        }
    }
}

/// Fills a topic: record i has the key `i mod keys`, and its number in the first 8 bytes of its value.
///
/// # Errors
/// If Kafka refuses a record.
pub fn fill(bootstrap: &str, topic: &str, filling: Filling) -> Result<()> {
    let sender = Sender::new(bootstrap)?;
    let mut value = vec![b'x'; filling.size];
    for number in filling.first..filling.first + filling.records {
        value[..8].copy_from_slice(&number.to_be_bytes());
        sender.send(topic, Some(load::key(number, filling.keys).as_bytes()), &value)?;
    }
    let stored = sender.flush()?;
    ensure!(stored == filling.records, "{stored} of {} records were acknowledged", filling.records);
    Ok(())
}

/// librdkafka alone, as fast as it goes.
///
/// # Errors
/// If Kafka refuses a record.
pub fn produce(bootstrap: &str, topic: &str, span: Span) -> Result<Measured> {
    let sender = Sender::new(bootstrap)?;
    let keys: Vec<String> = (0..KEYS).map(|number| load::key(number, KEYS)).collect();
    let value = service::value();
    let begin = Instant::now();
    let mut running = None;
    for number in 0.. {
        if number % 64 == 0 {
            let passed = begin.elapsed();
            match running.take() {
                None if passed >= span.warmup => running = Some(span.watch.clone().begin(sender.acknowledged())?),
                Some(running) if passed >= span.warmup + span.time => {
                    let measured = running.end(sender.acknowledged())?;
                    sender.flush()?;
                    return Ok(measured);
                }
                other => running = other,
            }
        }
        sender.send(topic, Some(keys[number % keys.len()].as_bytes()), &value)?;
    }
    bail!("the load ended before it was measured")
}

/// Consume and produce without a service, until it is killed: what a mesh costs before it does anything. Commits every 100 ms.
///
/// # Errors
/// If Kafka refuses.
pub fn pipe(bootstrap: &str, from: &str, to: &str) -> Result<()> {
    let consumer: BaseConsumer = consumer_config(bootstrap, &format!("{to}.pipe")).create()?;
    let mut from_start = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        from_start.add_partition_offset(from, partition, Offset::Beginning)?;
    }
    consumer.assign(&from_start)?;
    let sender = Sender::new(bootstrap)?;
    println!("READY 0");
    let mut next = HashMap::new();
    let mut committed = Instant::now();
    loop {
        if let Some(message) = consumer.poll(Duration::from_millis(100)) {
            let message = message?;
            sender.send(to, message.key(), message.payload().unwrap_or_default())?;
            next.insert(message.partition(), message.offset() + 1);
        }
        if committed.elapsed() > Duration::from_millis(100) && !next.is_empty() {
            let mut offsets = TopicPartitionList::new();
            for (partition, offset) in next.drain() {
                offsets.add_partition_offset(from, partition, Offset::Offset(offset))?;
            }
            consumer.commit(&offsets, CommitMode::Async)?;
            committed = Instant::now();
        }
    }
}

/// A consumer of a topic from its present end on.
fn from_now_on(bootstrap: &str, topic: &str) -> Result<BaseConsumer> {
    let consumer: BaseConsumer = consumer_config(bootstrap, &format!("{topic}.hop")).create()?;
    let topics = Topics::new(bootstrap)?;
    let mut from_end = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        let end = topics.high(topic, partition)?;
        from_end.add_partition_offset(topic, partition, Offset::Offset(end))?;
    }
    consumer.assign(&from_end)?;
    Ok(consumer)
}

/// The next number that comes back, if one does within 100 ms.
fn next_number(consumer: &BaseConsumer) -> Result<Option<u64>> {
    let Some(message) = consumer.poll(Duration::from_millis(100)) else { return Ok(None) };
    let message = message?;
    let number = message.payload().and_then(|value| value.first_chunk::<8>()).context("a value")?;
    Ok(Some(u64::from_be_bytes(*number)))
}

/// What can go into `to` and come back from `from` in a second: with so many records under way, as fast as they come back.
///
/// # Errors
/// If the records do not come back.
pub fn capacity(bootstrap: &str, to: &str, from: &str, window: u64, span: &Span) -> Result<Measured> {
    let consumer = from_now_on(bootstrap, from)?;
    let sender = Sender::new(bootstrap)?;
    let mut value = service::value().to_vec();
    let (mut sent, mut seen, mut last) = (0, 0, Instant::now());
    let (begin, mut running) = (Instant::now(), None);
    loop {
        while sent < seen + window {
            value[..8].copy_from_slice(&sent.to_be_bytes());
            sender.send(to, Some(load::key(sent, KEYS).as_bytes()), &value)?;
            sent += 1;
        }
        match next_number(&consumer)? {
            Some(_) => (seen, last) = (seen + 1, Instant::now()),
            None => ensure!(last.elapsed() < Duration::from_secs(15), "{} of {sent} records did not come back", sent - seen),
        }
        let passed = begin.elapsed();
        match running.take() {
            None if passed >= span.warmup => running = Some(span.watch.clone().begin(seen)?),
            Some(running) if passed >= span.warmup + span.time => return running.end(seen),
            other => running = other,
        }
    }
}

/// Latency from a record's intended time of sending into `to` until it is read from `from`, at a fixed rate that waits for nobody. With one
/// topic for both it is Kafka's own.
///
/// # Errors
/// If a record does not come back.
pub fn hop(bootstrap: &str, to: &str, from: &str, rate: f64, span: &Span) -> Result<Measured> {
    let consumer = from_now_on(bootstrap, from)?;
    let sender = Sender::new(bootstrap)?;
    let count = ((span.warmup + span.time).as_secs_f64() * rate).ceil() as u64;
    let skipped = (span.warmup.as_secs_f64() * rate).ceil() as u64;
    let interval = Duration::from_secs_f64(1.0 / rate);
    let begin = Instant::now() + Duration::from_millis(500);
    let running = span.watch.clone().begin(0)?;
    let topic = to.to_owned();
    let sending = thread::spawn(move || {
        let mut value = service::value().to_vec();
        for number in 0..count {
            let intended = begin + interval.mul_f64(number as f64);
            while let Some(early) = intended.checked_duration_since(Instant::now()) {
                thread::park_timeout(early);
            }
            value[..8].copy_from_slice(&number.to_be_bytes());
            sender.send(&topic, Some(load::key(number, KEYS).as_bytes()), &value)?;
        }
        sender.flush()
    });
    let mut histogram = histogram()?;
    let (mut seen, mut last) = (0, Instant::now());
    while seen < count {
        let Some(number) = next_number(&consumer)? else {
            ensure!(last.elapsed() < Duration::from_secs(15), "{} of {count} records did not come back", count - seen);
            continue;
        };
        last = Instant::now();
        seen += 1;
        if number >= skipped {
            let intended = begin + interval.mul_f64(number as f64);
            histogram.saturating_record(u64::try_from(last.duration_since(intended).as_nanos())?);
        }
    }
    let mut measured = running.end(seen)?;
    sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    measured.latency = Some(Latency::of(&histogram));
    Ok(measured)
}

/// How often each number occurs in a topic: `(records, numbers)`. Reads it to its present end.
///
/// # Errors
/// If Kafka does not answer.
pub fn numbers(bootstrap: &str, topic: &str) -> Result<HashMap<u64, u64>> {
    let consumer: BaseConsumer = consumer_config(bootstrap, &format!("{topic}.numbers")).create()?;
    let (mut start, mut left) = (TopicPartitionList::new(), 0);
    for partition in 0..PARTITIONS {
        left += consumer.fetch_watermarks(topic, partition, TIMEOUT)?.1;
        start.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&start)?;
    let mut numbers = HashMap::new();
    while left > 0 {
        let message = consumer.poll(TIMEOUT).context("the topic's end does not come")??;
        let number = message.payload().and_then(|value| value.first_chunk::<8>()).context("a value")?;
        *numbers.entry(u64::from_be_bytes(*number)).or_default() += 1;
        left -= 1;
    }
    Ok(numbers)
}
