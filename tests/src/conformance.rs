//! The broker conformance suite: what every [`Broker`] must do, checked behind the traits only.
//!
//! [`run_all`] runs all cases, one after the other, with topics and groups of fresh names, so that it can run against a broker that is in
//! use. A wait that lasts longer than [`PATIENCE`] is a failure that says what was waited for.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use bytestring::ByteString;
use futures_util::future::BoxFuture;
use mesh_sidecar::{
    broker::{
        Assigned, Broker, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, NewTopic, Outgoing, ProduceErrorKind, StartOffset,
    },
    record::{Header, Position, Record, TopicPartition},
};
use tokio::sync::{Notify, oneshot};

/// How long an expected event may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Opens the broker under test. Called again, after the one before was closed, it must show the same data.
pub type Make<'a> = &'a (dyn Fn() -> BoxFuture<'static, Result<Arc<dyn Broker>>> + Send + Sync);

type Case = fn(Arc<dyn Broker>) -> BoxFuture<'static, Result<()>>;

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        [$((stringify!($name), (|broker| Box::pin($name(broker))) as Case)),*]
    };
}

/// Runs all cases, and closes the broker.
///
/// # Errors
/// Names every case that failed, and why.
pub async fn run_all(make: Make<'_>) -> Result<()> {
    let broker = make().await.context("opening the broker")?;
    let mut failures = run_cases(&broker).await;
    println!("conformance: a_group_resumes_after_reopening");
    if let Err(error) = a_group_resumes_after_reopening(broker, make).await {
        failures.push(format!("a_group_resumes_after_reopening: {error:#}"));
    }
    ensure!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// Runs all cases that need no second opening; the failures, by case.
pub async fn run_cases(broker: &Arc<dyn Broker>) -> Vec<String> {
    let cases = cases![
        acknowledged_in_order,
        any_shape_of_record,
        keys_go_where_kafka_puts_them,
        unknown_topics,
        topics_are_created_once,
        watermarks_follow,
        offsets_by_time,
        sizes,
        starts,
        a_topic_that_comes_later,
        a_reader_without_a_group,
        next_may_be_dropped,
        hold_and_release,
        commits_are_seen,
        members_share_and_hand_over,
        a_late_commit_is_fenced,
        a_silent_member_loses_its_partitions,
    ];
    let mut failures = Vec::new();
    for (name, case) in cases {
        println!("conformance: {name}");
        if let Err(error) = case(broker.clone()).await {
            failures.push(format!("{name}: {error:#}"));
        }
    }
    failures
}

/// Awaits, but not for ever.
async fn within<T>(what: &str, future: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(PATIENCE, future).await.map_err(|_| anyhow!("no {what} within {} s", PATIENCE.as_secs()))
}

fn fresh(name: &str) -> String {
    format!("conformance-{name}-{}", uuid::Uuid::new_v4().simple())
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

async fn topic(broker: &Arc<dyn Broker>, name: &str, partitions: i32) -> Result<Arc<str>> {
    let name = fresh(name);
    let new = NewTopic { name: name.clone(), partitions: Some(partitions), replication: Some(1), ..NewTopic::default() };
    within("answer to create_topics", broker.admin().create_topics(vec![new])).await??;
    let known = within("answer to learn_topic", broker.producer().learn_topic(&name, PATIENCE)).await?;
    ensure!(known.as_ref().ok() == Some(&partitions), "learn_topic after create_topics: {known:?}");
    Ok(name.into())
}

fn record(key: Option<&str>, value: &str) -> Record {
    let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    Record { key: key.map(bytes), value: Some(bytes(value)), headers: Vec::new(), timestamp_ms: None }
}

fn to(topic: &Arc<str>, partition: impl Into<Option<i32>>, record: Record) -> Outgoing {
    Outgoing { topic: topic.clone(), partition: partition.into(), record }
}

async fn produce(broker: &Arc<dyn Broker>, records: Vec<Outgoing>) -> Result<Vec<Position>> {
    let acks = within("acknowledgement", broker.producer().send(records)).await?;
    acks.into_iter().map(|ack| ack.map_err(anyhow::Error::from)).collect()
}

fn config(group: Option<&str>, topics: &[&Arc<str>], start: StartOffset) -> ConsumerConfig {
    let topics = topics.iter().map(|topic| (*topic).clone()).collect();
    ConsumerConfig { group: group.map(str::to_owned), topics, instance: None, start, buffer_bytes: 1 << 20 }
}

/// A consumer with what it was assigned.
struct Reader {
    consumer: Box<dyn Consumer>,
    assigned: Vec<Assigned>,
}

impl Reader {
    /// Begins to read, and waits until `partitions` partitions are assigned.
    async fn start(broker: &Arc<dyn Broker>, config: ConsumerConfig, partitions: usize) -> Result<Self> {
        let mut reader = Self { consumer: broker.consumer(config)?, assigned: Vec::new() };
        while reader.assigned.len() < partitions {
            if let Event::Records(batch) = reader.event("assignment").await? {
                bail!("records of {} before all partitions were assigned, in a group of one", batch.partition);
            }
        }
        Ok(reader)
    }

    /// The next event that is not trouble; keeps the books of the assignment.
    async fn event(&mut self, what: &str) -> Result<Event> {
        loop {
            let event = within(what, self.consumer.next()).await?;
            match &event {
                Event::Assigned(assigned) => self.assigned.extend(assigned.iter().cloned()),
                Event::Revoking(revoking) => self.assigned.retain(|one| !revoking.partitions.contains(&one.partition)),
                Event::Trouble(_) | Event::Recovered => continue,
                Event::Records(_) | Event::Expired { .. } => {}
            }
            return Ok(event);
        }
    }

    /// Reads this many records.
    async fn read(&mut self, count: usize) -> Result<Vec<(Position, Record)>> {
        let mut records = Vec::new();
        while records.len() < count {
            match self.event(&format!("record {} of {count}", records.len() + 1)).await? {
                Event::Records(batch) => {
                    for (offset, record) in batch.records {
                        records.push((Position { partition: batch.partition.clone(), offset }, record));
                    }
                }
                Event::Assigned(_) => {}
                other => bail!("unexpected {other:?}"),
            }
        }
        ensure!(records.len() == count, "{} records instead of {count}", records.len());
        Ok(records)
    }

    fn position(&self, partition: &TopicPartition) -> Option<i64> {
        self.assigned.iter().find(|one| one.partition == *partition).map(|one| one.position)
    }

    async fn close(self) -> Result<()> {
        within("end of close", self.consumer.close()).await
    }
}

fn value(record: &Record) -> String {
    String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned()
}

async fn acknowledged_in_order(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "order", 3).await?;
    let producer = broker.producer();
    // Many calls under way at once; the acknowledgements are awaited afterwards.
    let mut acks = Vec::new();
    let mut sent = Vec::new();
    for call in 0..150 {
        let records: Vec<_> = (0..1 + call % 7).map(|index| (index % 3, format!("{call}.{index}"))).collect();
        acks.push(producer.send(records.iter().map(|(partition, text)| to(&topic, *partition, record(None, text))).collect()));
        sent.push(records);
    }
    let mut expected: BTreeMap<i32, Vec<String>> = BTreeMap::new();
    for (acks, sent) in acks.into_iter().zip(sent) {
        let acks = within("acknowledgement", acks).await?;
        ensure!(acks.len() == sent.len(), "{} acknowledgements for {} records", acks.len(), sent.len());
        for (ack, (partition, text)) in acks.into_iter().zip(sent) {
            let texts = expected.entry(partition).or_default();
            let should = Position { partition: TopicPartition::new(topic.clone(), partition), offset: texts.len() as i64 };
            ensure!(ack.as_ref().ok() == Some(&should), "record {text} acknowledged as {ack:?} instead of {should}");
            texts.push(text);
        }
    }
    let total = expected.values().map(Vec::len).sum();
    let mut reader = Reader::start(&broker, config(None, &[&topic], StartOffset::Earliest), 3).await?;
    let mut found: BTreeMap<i32, Vec<String>> = BTreeMap::new();
    for (position, record) in reader.read(total).await? {
        let texts = found.entry(position.partition.partition).or_default();
        ensure!(position.offset == texts.len() as i64, "{position} after {} records", texts.len());
        texts.push(value(&record));
    }
    ensure!(found == expected, "records are not read in the order in which they were sent");
    reader.close().await
}

async fn any_shape_of_record(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "shape", 1).await?;
    let header = |name: &'static str, value: Option<&'static [u8]>| Header {
        name: ByteString::from_static(name),
        value: value.map(Bytes::from_static),
    };
    let at = now_ms() - 60_000;
    let binary: Vec<u8> = (0..=255).collect();
    let all = vec![
        Record { key: None, value: Some(Bytes::from_static(b"no key")), headers: Vec::new(), timestamp_ms: Some(at) },
        Record { key: Some(Bytes::from_static(b"tombstone")), value: None, headers: Vec::new(), timestamp_ms: Some(at + 1) },
        Record { key: Some(Bytes::new()), value: Some(Bytes::new()), headers: Vec::new(), timestamp_ms: Some(at - 1) },
        Record { key: None, value: None, headers: vec![header("only", Some(b"header"))], timestamp_ms: Some(at) },
        Record {
            key: Some(Bytes::from(binary.clone())),
            value: Some(Bytes::from(binary)),
            headers: vec![
                header("twice", Some(b"first")),
                header("null", None),
                header("twice", Some(b"second")),
                header("Empty", Some(b"")),
                header("binary", Some(&[0, 255, 10, 13])),
                header("grün", Some("ü".as_bytes())),
            ],
            timestamp_ms: Some(at + 2),
        },
    ];
    produce(&broker, all.iter().map(|record| to(&topic, 0, record.clone())).collect()).await?;
    let mut reader = Reader::start(&broker, config(None, &[&topic], StartOffset::Earliest), 1).await?;
    let read: Vec<_> = reader.read(all.len()).await?.into_iter().map(|(_, record)| record).collect();
    for (read, sent) in read.iter().zip(&all) {
        ensure!(read == sent, "sent {sent:?}, read {read:?}");
    }
    let before = now_ms();
    produce(&broker, vec![to(&topic, 0, record(None, "no timestamp"))]).await?;
    let stamped = reader.read(1).await?.remove(0).1.timestamp_ms.context("a record is read without a timestamp")?;
    ensure!((before - 1000..=now_ms() + 1000).contains(&stamped), "timestamp {stamped} is not the present, {before}");
    reader.close().await
}

async fn keys_go_where_kafka_puts_them(broker: Arc<dyn Broker>) -> Result<()> {
    const PARTITIONS: i32 = 12;
    let topic = topic(&broker, "partitioner", PARTITIONS).await?;
    // The murmur2 hashes of Kafka's own test of its Java client.
    let vectors: [(&str, i32); 6] = [
        ("21", -973_932_308),
        ("foobar", -790_332_482),
        ("a-little-bit-long-string", -985_981_536),
        ("a-little-bit-longer-string", -1_486_304_829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
        ("abc", 479_470_107),
    ];
    let acks = produce(&broker, vectors.iter().map(|(key, _)| to(&topic, None, record(Some(key), "v"))).collect()).await?;
    for ((key, hash), ack) in vectors.iter().zip(acks) {
        let should = (hash & 0x7fff_ffff) % PARTITIONS;
        ensure!(ack.partition.partition == should, "key {key:?} went to partition {}, Kafka says {should}", ack.partition.partition);
    }
    let keyless = (0..10).map(|_| to(&topic, None, record(None, "v"))).collect();
    for ack in produce(&broker, keyless).await? {
        ensure!((0..PARTITIONS).contains(&ack.partition.partition), "{ack}");
    }
    Ok(())
}

async fn unknown_topics(broker: Arc<dyn Broker>) -> Result<()> {
    let producer = broker.producer();
    let name = fresh("unknown");
    ensure!(producer.known_partitions(&name).is_none(), "a topic that never was is known");
    match within("answer to learn_topic", producer.learn_topic(&name, PATIENCE)).await? {
        // A broker that creates topics.
        Ok(partitions) => {
            let topics = within("answer to topics", broker.admin().topics()).await??;
            ensure!(
                topics.get(&name) == Some(&partitions),
                "learn_topic says {partitions} partitions, topics says {:?}",
                topics.get(&name)
            );
            ensure!(producer.known_partitions(&name) == Some(partitions), "a learned topic is not known");
        }
        Err(error) => ensure!(error.kind == ProduceErrorKind::UnknownTopic, "learn_topic of an unknown topic: {error:?}"),
    }
    let existing = topic(&broker, "unknown-partition", 2).await?;
    let acks =
        within("acknowledgement", producer.send(vec![to(&existing, 7, record(None, "v")), to(&existing, 1, record(None, "v"))])).await?;
    let kinds: Vec<_> = acks.iter().map(|ack| ack.as_ref().map_err(|error| error.kind).map(|position| position.offset)).collect();
    ensure!(kinds == [Err(ProduceErrorKind::UnknownPartition), Ok(0)], "partition 7 of 2, then 1 of 2: {acks:?}");
    let missing = TopicPartition::new(fresh("missing"), 0);
    let answer = within("answer to watermarks", broker.admin().watermarks(&missing)).await?;
    ensure!(answer.as_ref().is_err_and(|error| error.kind == BrokerErrorKind::UnknownTopic), "watermarks of a missing topic: {answer:?}");
    Ok(())
}

async fn topics_are_created_once(broker: Arc<dyn Broker>) -> Result<()> {
    let existing = topic(&broker, "create", 3).await?;
    let other = fresh("create-other");
    let config = BTreeMap::from([("retention.ms".to_owned(), "3600000".to_owned())]);
    let again = vec![
        NewTopic { name: existing.to_string(), partitions: Some(5), replication: Some(1), config: BTreeMap::new() },
        NewTopic { name: other.clone(), partitions: Some(2), replication: Some(1), config },
    ];
    within("answer to create_topics", broker.admin().create_topics(again))
        .await?
        .context("creating one that exists and one that does not")?;
    ensure!(within("answer to learn_topic", broker.producer().learn_topic(&other, PATIENCE)).await?.is_ok_and(|count| count == 2));
    let topics = within("answer to topics", broker.admin().topics()).await??;
    ensure!(topics.get(&*existing) == Some(&3), "the topic that existed has {:?} partitions now", topics.get(&*existing));
    ensure!(topics.get(&other) == Some(&2), "the new topic has {:?} partitions", topics.get(&other));
    Ok(())
}

async fn watermarks_follow(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "watermarks", 2).await?;
    let partition = TopicPartition::new(topic.clone(), 0);
    let admin = broker.admin();
    ensure!(within("watermarks", admin.watermarks(&partition)).await?? == (0, 0));
    produce(&broker, (0..5).map(|_| to(&topic, 0, record(None, "v"))).collect()).await?;
    let found = within("watermarks", admin.watermarks(&partition)).await??;
    ensure!(found == (0, 5), "watermarks {found:?} after 5 records");
    ensure!(within("watermarks", admin.watermarks(&TopicPartition::new(topic, 1))).await?? == (0, 0));
    Ok(())
}

async fn offsets_by_time(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "time", 2).await?;
    let base = now_ms() - 3_600_000;
    for index in 0..40 {
        let record = Record { timestamp_ms: Some(base + index * 1000), ..record(None, "v") };
        produce(&broker, vec![to(&topic, 0, record)]).await?;
    }
    let admin = broker.admin();
    for (at, should) in [(base - 1, 0), (base, 0), (base + 1, 1), (base + 17_000, 17), (base + 38_001, 39), (base + 39_001, 40)] {
        let found = within("offsets by time", admin.offsets_at(&topic, at)).await??;
        ensure!(found == [should, 0], "offsets at +{} ms are {found:?} instead of [{should}, 0]", at - base);
    }
    Ok(())
}

async fn sizes(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "size", 1).await?;
    let sized = |bytes: usize| to(&topic, 0, Record { value: Some(Bytes::from(vec![b'x'; bytes])), ..Record::default() });
    let acks = within("acknowledgement", broker.producer().send(vec![sized(10), sized(5 << 20), sized(900 << 10), sized(20)])).await?;
    let kinds: Vec<_> = acks.iter().map(|ack| ack.as_ref().map_err(|error| error.kind).map(|position| position.offset)).collect();
    ensure!(kinds == [Ok(0), Err(ProduceErrorKind::TooLarge), Ok(1), Ok(2)], "{kinds:?}");
    let mut reader = Reader::start(&broker, config(None, &[&topic], StartOffset::Earliest), 1).await?;
    let lengths: Vec<_> = reader.read(3).await?.iter().map(|(_, record)| record.value.as_ref().map_or(0, Bytes::len)).collect();
    ensure!(lengths == [10, 900 << 10, 20], "{lengths:?}");
    reader.close().await
}

async fn starts(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "start", 1).await?;
    let partition = TopicPartition::new(topic.clone(), 0);
    let base = now_ms() - 3_600_000;
    for index in 0..10 {
        let record = Record { timestamp_ms: Some(base + index * 1000), ..record(None, "v") };
        produce(&broker, vec![to(&topic, 0, record)]).await?;
    }
    for (start, should) in
        [(StartOffset::Earliest, 0), (StartOffset::Latest, 10), (StartOffset::At(base + 3500), 4), (StartOffset::At(now_ms() + 1), 10)]
    {
        let group = fresh("start");
        let reader = Reader::start(&broker, config(Some(&group), &[&topic], start), 1).await?;
        ensure!(reader.position(&partition) == Some(should), "{start:?} begins at {:?} instead of {should}", reader.position(&partition));
        let committed = within("committed offsets", broker.admin().committed(&group, vec![partition.clone()])).await??;
        let offset = committed.first().and_then(Option::as_ref).map(|commit| commit.offset);
        ensure!(offset == Some(should), "{start:?} is assigned at {should}, but {offset:?} is committed");
        reader.close().await?;
        // The start counts once: the group has an offset now.
        let reader = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 1).await?;
        ensure!(reader.position(&partition) == Some(should), "{start:?}, joined again, begins at {:?}", reader.position(&partition));
        reader.close().await?;
    }
    Ok(())
}

async fn a_topic_that_comes_later(broker: Arc<dyn Broker>) -> Result<()> {
    let present = topic(&broker, "present", 1).await?;
    let later: Arc<str> = fresh("later").into();
    let group = fresh("later");
    let mut reader = Reader::start(&broker, config(Some(&group), &[&present, &later], StartOffset::Earliest), 1).await?;
    produce(&broker, vec![to(&present, 0, record(None, "present"))]).await?;
    ensure!(value(&reader.read(1).await?[0].1) == "present");
    let new = NewTopic { name: later.to_string(), partitions: Some(1), replication: Some(1), ..NewTopic::default() };
    within("answer to create_topics", broker.admin().create_topics(vec![new])).await??;
    within("answer to learn_topic", broker.producer().learn_topic(&later, PATIENCE)).await??;
    produce(&broker, vec![to(&later, 0, record(None, "later"))]).await?;
    // The change may take the kept partition away and give it back.
    loop {
        match reader.event("record of the new topic").await? {
            Event::Records(batch) if batch.partition.topic == later => break,
            Event::Records(batch) => bail!("{} is read again", batch.partition),
            Event::Revoking(revoking) => {
                let commits =
                    revoking.partitions.iter().map(|partition| Commit { partition: partition.clone(), offset: 1, metadata: String::new() });
                // Too late is no failure here.
                drop(revoking.done.send(commits.collect()));
            }
            _ => {}
        }
    }
    reader.close().await
}

async fn a_reader_without_a_group(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "alone", 2).await?;
    produce(&broker, (0..6).map(|index| to(&topic, index % 2, record(None, "old"))).collect()).await?;
    let mut all = Reader::start(&broker, config(None, &[&topic], StartOffset::Earliest), 2).await?;
    let mut other = Reader::start(&broker, config(None, &[&topic], StartOffset::Earliest), 2).await?;
    let mut new = Reader::start(&broker, config(None, &[&topic], StartOffset::Latest), 2).await?;
    ensure!(new.assigned.iter().all(|one| one.position == 3), "{:?}", new.assigned);
    all.read(6).await?;
    other.read(6).await?;
    produce(&broker, vec![to(&topic, 1, record(None, "new"))]).await?;
    for reader in [&mut all, &mut other, &mut new] {
        let (position, record) = reader.read(1).await?.remove(0);
        ensure!(position.offset == 3 && value(&record) == "new", "{position}");
    }
    let commit = Commit { partition: TopicPartition::new(topic, 0), offset: 1, metadata: String::new() };
    ensure!(within("answer to commit", all.consumer.commit(vec![commit])).await?.is_err(), "a commit without a group succeeded");
    for reader in [all, other, new] {
        reader.close().await?;
    }
    Ok(())
}

async fn next_may_be_dropped(broker: Arc<dyn Broker>) -> Result<()> {
    const COUNT: usize = 2000;
    let topic = topic(&broker, "dropped", 1).await?;
    let group = fresh("dropped");
    let mut reader = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 1).await?;
    let (producer, target) = (broker.clone(), topic.clone());
    let producing = tokio::spawn(async move {
        for index in 0..COUNT {
            produce(&producer, vec![to(&target, 0, record(None, &index.to_string()))]).await?;
        }
        Ok::<_, anyhow::Error>(())
    });
    let mut seen = 0;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while seen < COUNT {
        ensure!(tokio::time::Instant::now() < deadline, "{seen} of {COUNT} records");
        let event = tokio::select! {
            biased;
            event = reader.consumer.next() => event,
            () = tokio::time::sleep(Duration::from_micros(50)) => continue,
        };
        if let Event::Records(batch) = event {
            for (offset, record) in batch.records {
                ensure!(offset == seen as i64 && value(&record) == seen.to_string(), "offset {offset} follows {seen} records");
                seen += 1;
            }
        }
    }
    producing.await??;
    reader.close().await
}

async fn hold_and_release(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "hold", 2).await?;
    let group = fresh("hold");
    let mut reader = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 2).await?;
    let held = TopicPartition::new(topic.clone(), 0);
    reader.consumer.hold(&held);
    for round in 0..3 {
        produce(&broker, (0..200).map(|index| to(&topic, index % 2, record(None, "v"))).collect()).await?;
        let read = reader.read(100).await?;
        ensure!(read.iter().all(|(position, _)| position.partition != held), "round {round}: records of a held partition");
    }
    reader.consumer.release(&held);
    let read = reader.read(300).await?;
    for (should, (position, _)) in (0..).zip(&read) {
        ensure!(position.partition == held && position.offset == should, "{position} instead of {held}/{should}");
    }
    reader.close().await
}

async fn commits_are_seen(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "commit", 2).await?;
    let retries = self::topic(&broker, "commit-retries", 1).await?;
    let group = fresh("commit");
    produce(&broker, (0..20).map(|index| to(&topic, index % 2, record(None, "v"))).collect()).await?;
    let reader = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 2).await?;
    let commit = |topic: &Arc<str>, partition, offset, metadata: &str| Commit {
        partition: TopicPartition::new(topic.clone(), partition),
        offset,
        metadata: metadata.to_owned(),
    };
    let metadata = "m".repeat(4096);
    within("commit", reader.consumer.commit(vec![commit(&topic, 0, 4, "first")])).await??;
    within("commit", reader.consumer.commit(vec![commit(&topic, 0, 7, &metadata), commit(&topic, 1, 2, "")])).await??;
    // A member also keeps the offsets of topics that its group does not subscribe: its retry topics.
    within("commit", reader.consumer.commit(vec![commit(&retries, 0, 3, "retries")])).await?.context("a topic beside the subscription")?;
    let asked = vec![
        TopicPartition::new(topic.clone(), 1),
        TopicPartition::new(topic.clone(), 0),
        TopicPartition::new(retries.clone(), 0),
        TopicPartition::new(fresh("none"), 0),
    ];
    let found = within("committed offsets", broker.admin().committed(&group, asked)).await??;
    let should = [Some(commit(&topic, 1, 2, "")), Some(commit(&topic, 0, 7, &metadata)), Some(commit(&retries, 0, 3, "retries")), None];
    ensure!(found == should, "{found:?}");
    let none = within("committed offsets", broker.admin().committed(&fresh("nobody"), vec![TopicPartition::new(topic, 0)])).await??;
    ensure!(none == [None], "{none:?}");
    reader.close().await
}

/// What the members of a group saw.
#[derive(Debug, Default)]
struct Seen {
    by_record: Mutex<BTreeMap<(i32, i64), Vec<usize>>>,
    owned: Mutex<BTreeMap<usize, BTreeSet<i32>>>,
    changed: Notify,
}

impl Seen {
    async fn until(&self, what: &str, mut reached: impl FnMut(&Self) -> bool) -> Result<()> {
        within(what, async {
            loop {
                let changed = self.changed.notified();
                if reached(self) {
                    return;
                }
                changed.await;
            }
        })
        .await
    }

    fn records(&self) -> usize {
        self.by_record.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn shares(&self) -> Vec<usize> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner).values().map(BTreeSet::len).collect()
    }
}

/// A member that commits on revoke, and when it leaves.
struct Member {
    leave: oneshot::Sender<()>,
    done: tokio::task::JoinHandle<Result<()>>,
}

impl Member {
    fn join(broker: &Arc<dyn Broker>, config: ConsumerConfig, name: usize, seen: &Arc<Seen>) -> Result<Self> {
        let consumer = broker.consumer(config)?;
        let (leave, left) = oneshot::channel();
        Ok(Self { leave, done: tokio::spawn(take_part(consumer, name, seen.clone(), left)) })
    }

    async fn leave(self) -> Result<()> {
        // A member that failed has ended already; its result says why.
        let _ = self.leave.send(());
        within("end of a member", self.done).await??
    }
}

async fn take_part(mut consumer: Box<dyn Consumer>, name: usize, seen: Arc<Seen>, mut left: oneshot::Receiver<()>) -> Result<()> {
    let mut next: BTreeMap<TopicPartition, i64> = BTreeMap::new();
    let commits = |next: &BTreeMap<TopicPartition, i64>| {
        next.iter().map(|(partition, offset)| Commit { partition: partition.clone(), offset: *offset, metadata: String::new() }).collect()
    };
    loop {
        let event = tokio::select! {
            event = consumer.next() => event,
            _ = &mut left => break,
        };
        match event {
            Event::Assigned(assigned) => {
                for one in assigned {
                    ensure!(next.insert(one.partition.clone(), one.position).is_none(), "{} is assigned twice", one.partition);
                }
            }
            Event::Revoking(revoking) => {
                ensure!(!revoking.lost, "{:?} were lost", revoking.partitions);
                let mut revoked = BTreeMap::new();
                for partition in &revoking.partitions {
                    let offset = next.remove(partition).with_context(|| format!("{partition} is revoked but was not assigned"))?;
                    revoked.insert(partition.clone(), offset);
                }
                drop(revoking.done.send(commits(&revoked)));
            }
            Event::Records(batch) => {
                let expected =
                    next.get_mut(&batch.partition).with_context(|| format!("records of {}, which is not assigned", batch.partition))?;
                let mut by_record = seen.by_record.lock().unwrap_or_else(PoisonError::into_inner);
                for (offset, _) in &batch.records {
                    ensure!(offset == expected, "{}: offset {offset} instead of {expected}", batch.partition);
                    *expected += 1;
                    by_record.entry((batch.partition.partition, *offset)).or_default().push(name);
                }
            }
            Event::Expired { partition, from, to } => bail!("{partition}: {from} to {to} expired"),
            Event::Trouble(_) | Event::Recovered => {}
        }
        let owned = next.keys().map(|partition| partition.partition).collect();
        seen.owned.lock().unwrap_or_else(PoisonError::into_inner).insert(name, owned);
        seen.changed.notify_waiters();
    }
    within("last commit of a member", consumer.commit(commits(&next))).await??;
    seen.owned.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
    within("end of close", consumer.close()).await
}

async fn members_share_and_hand_over(broker: Arc<dyn Broker>) -> Result<()> {
    const PARTITIONS: i32 = 6;
    let topic = topic(&broker, "members", PARTITIONS).await?;
    let group = fresh("members");
    let seen = Arc::new(Seen::default());
    let join = |name| Member::join(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), name, &seen);
    let (stop, mut stopped) = oneshot::channel::<()>();
    let (producer, target) = (broker.clone(), topic.clone());
    let producing = tokio::spawn(async move {
        let mut sent = 0;
        while stopped.try_recv() == Err(oneshot::error::TryRecvError::Empty) {
            let batch = (0..12).map(|index| to(&target, index % PARTITIONS, record(None, "v"))).collect();
            sent += produce(&producer, batch).await?.len();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok::<_, anyhow::Error>(sent)
    });
    let more = |by: usize| {
        let (seen, target) = (seen.clone(), seen.records() + by);
        async move { seen.until("progress of the group", |seen| seen.records() >= target).await }
    };
    let shares = |should: &'static [usize]| {
        let seen = seen.clone();
        async move { seen.until(&format!("assignment {should:?}"), |seen| seen.shares() == should).await }
    };
    let first = join(1)?;
    shares(&[6]).await?;
    more(120).await?;
    let second = join(2)?;
    shares(&[3, 3]).await?;
    more(120).await?;
    let third = join(3)?;
    shares(&[2, 2, 2]).await?;
    more(120).await?;
    first.leave().await?;
    shares(&[3, 3]).await?;
    more(120).await?;
    second.leave().await?;
    shares(&[6]).await?;
    more(120).await?;
    drop(stop);
    let sent = producing.await??;
    seen.until("last records", |seen| seen.records() >= sent).await?;
    third.leave().await?;
    let by_record = seen.by_record.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(by_record.len() == sent, "{} records seen of {sent}", by_record.len());
    for ((partition, offset), members) in &*by_record {
        ensure!(members.len() == 1, "record {partition}/{offset} was committed at every hand-over, and yet seen by {members:?}");
    }
    Ok(())
}

async fn a_late_commit_is_fenced(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "fenced", 2).await?;
    let group = fresh("fenced");
    produce(&broker, (0..20).map(|index| to(&topic, index % 2, record(None, "v"))).collect()).await?;
    let config = config(Some(&group), &[&topic], StartOffset::Earliest);
    let mut old = Reader::start(&broker, config.clone(), 2).await?;
    old.read(20).await?;
    let mut new = Reader { consumer: broker.consumer(config)?, assigned: Vec::new() };
    // Both are polled, since a member takes part in the group only then. The old one gives up without a commit.
    let mut moved = Vec::new();
    while new.assigned.is_empty() {
        tokio::select! {
            event = old.event("revocation") => if let Event::Revoking(revoking) = event? {
                moved.extend(revoking.partitions.clone());
                drop(revoking.done);
            },
            event = new.event("assignment") => drop(event?),
        }
    }
    let taken = new.assigned[0].partition.clone();
    ensure!(moved.contains(&taken), "{taken} was given away without a revocation");
    ensure!(new.assigned[0].position == 0, "the new member begins at {}", new.assigned[0].position);
    let commit = |offset| vec![Commit { partition: taken.clone(), offset, metadata: String::new() }];
    let late = within("answer to commit", old.consumer.commit(commit(10))).await?;
    ensure!(late.as_ref().is_err_and(|error| error.kind == BrokerErrorKind::Fenced), "the late commit was answered with {late:?}");
    within("commit", new.consumer.commit(commit(1))).await??;
    let found = within("committed offsets", broker.admin().committed(&group, vec![taken.clone()])).await??;
    ensure!(found == [Some(commit(1).remove(0))], "{found:?}");
    old.close().await?;
    new.close().await
}

async fn a_silent_member_loses_its_partitions(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "silent", 2).await?;
    let group = fresh("silent");
    produce(&broker, (0..20).map(|index| to(&topic, index % 2, record(None, "v"))).collect()).await?;
    let config = config(Some(&group), &[&topic], StartOffset::Earliest);
    let mut old = Reader::start(&broker, config.clone(), 2).await?;
    old.read(20).await?;
    let mut new = Reader { consumer: broker.consumer(config)?, assigned: Vec::new() };
    // The answer is kept back for good, and the partition moves all the same.
    let mut kept = Vec::new();
    while new.assigned.is_empty() {
        tokio::select! {
            event = old.event("revocation") => if let Event::Revoking(revoking) = event? {
                kept.push(revoking);
            },
            event = new.event("assignment") => drop(event?),
        }
    }
    let taken = new.assigned[0].partition.clone();
    let commit = Commit { partition: taken.clone(), offset: 10, metadata: String::new() };
    for revoking in kept {
        // Nobody listens any more, or the commits are refused.
        drop(revoking.done.send(vec![commit.clone()]));
    }
    let late = within("answer to commit", old.consumer.commit(vec![commit])).await?;
    ensure!(late.as_ref().is_err_and(|error| error.kind == BrokerErrorKind::Fenced), "the late commit was answered with {late:?}");
    let records = new.read(10).await?;
    ensure!(records.iter().all(|(position, _)| position.partition == taken), "{records:?}");
    old.close().await?;
    new.close().await
}

async fn a_group_resumes_after_reopening(broker: Arc<dyn Broker>, make: Make<'_>) -> Result<()> {
    let topic = topic(&broker, "reopen", 1).await?;
    let partition = TopicPartition::new(topic.clone(), 0);
    let group = fresh("reopen");
    produce(&broker, (0..10).map(|index| to(&topic, 0, record(None, &index.to_string()))).collect()).await?;
    let mut reader = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 1).await?;
    reader.read(10).await?;
    let commit = Commit { partition: partition.clone(), offset: 5, metadata: "AQID".to_owned() };
    within("commit", reader.consumer.commit(vec![commit])).await??;
    reader.close().await?;
    within("end of close", broker.close(PATIENCE)).await??;
    drop(broker);
    let broker = make().await.context("opening the broker again")?;
    ensure!(within("watermarks", broker.admin().watermarks(&partition)).await?? == (0, 10));
    let mut reader = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Latest), 1).await?;
    ensure!(reader.position(&partition) == Some(5), "resumes at {:?} instead of 5", reader.position(&partition));
    ensure!(reader.assigned[0].metadata == "AQID", "the metadata became {:?}", reader.assigned[0].metadata);
    let read: Vec<_> = reader.read(5).await?.iter().map(|(_, record)| value(record)).collect();
    ensure!(read == ["5", "6", "7", "8", "9"], "{read:?}");
    let position = produce(&broker, vec![to(&topic, 0, record(None, "after"))]).await?.remove(0);
    ensure!(position.offset == 10, "appended at {position} after 10 records");
    reader.close().await?;
    within("end of close", broker.close(PATIENCE)).await?.map_err(anyhow::Error::from)
}
