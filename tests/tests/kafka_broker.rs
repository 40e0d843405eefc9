//! The Kafka broker of the sidecar against a real Kafka: what only Kafka does, and what it does when things go wrong.

// The helpers of tests are tests too, which clippy cannot know.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_sidecar::{
    broker::{
        Assigned, Broker, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, NewTopic, Outgoing, ProduceErrorKind, Revoking,
        StartOffset,
        kafka::{KafkaBroker, KafkaOptions},
    },
    record::{Batch, Header, Record, TopicPartition},
};
use mesh_tests::kafka::{KafkaHandle, kafka, own_kafka, own_kafka_with};
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(60);

fn open_with(kafka: &KafkaHandle, more: &[(&str, &str)]) -> Arc<KafkaBroker> {
    let mut keys = BTreeMap::from([("bootstrap.servers".to_owned(), kafka.bootstrap().to_owned())]);
    keys.extend(more.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    KafkaBroker::open(keys, KafkaOptions::default()).unwrap()
}

fn open(kafka: &KafkaHandle) -> Arc<KafkaBroker> {
    open_with(kafka, &[])
}

/// A name that no other test has.
fn unique(name: &str) -> String {
    format!("{name}-{}", uuid::Uuid::new_v4().simple())
}

async fn topic(broker: &KafkaBroker, name: &str, partitions: i32) -> Arc<str> {
    let name = unique(name);
    broker.admin().create_topics(vec![NewTopic { name: name.clone(), partitions: Some(partitions), ..NewTopic::default() }]).await.unwrap();
    broker.producer().learn_topic(&name, LONG).await.unwrap();
    name.into()
}

fn record(key: &str, value: &str) -> Record {
    Record { key: Some(Bytes::copy_from_slice(key.as_bytes())), value: Some(Bytes::copy_from_slice(value.as_bytes())), ..Record::default() }
}

fn to(topic: &Arc<str>, partition: Option<i32>, record: Record) -> Outgoing {
    Outgoing { topic: topic.clone(), partition, record }
}

/// Some time ago, in milliseconds: old enough to tell from the present, too young for the topic's retention.
fn recently() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    i64::try_from(now).unwrap() - 3_600_000
}

/// Produces numbered records to a partition and returns their offsets.
async fn produce(broker: &KafkaBroker, topic: &Arc<str>, partition: i32, numbers: std::ops::Range<usize>) -> Vec<i64> {
    let records = numbers.map(|number| to(topic, Some(partition), record(&format!("k{number}"), &number.to_string()))).collect();
    let acks = timeout(LONG, broker.producer().send(records)).await.unwrap();
    acks.into_iter().map(|ack| ack.unwrap().offset).collect()
}

fn config(group: Option<&str>, topics: &[Arc<str>]) -> ConsumerConfig {
    ConsumerConfig {
        group: group.map(str::to_owned),
        topics: topics.to_vec(),
        instance: None,
        start: StartOffset::Earliest,
        buffer_bytes: 8 * 1024 * 1024,
        transactional_id: None,
    }
}

async fn next(consumer: &mut Box<dyn Consumer>) -> Event {
    timeout(LONG, consumer.next()).await.expect("an event")
}

/// Waits for the next assignment and passes over trouble.
async fn assigned(consumer: &mut Box<dyn Consumer>) -> Vec<Assigned> {
    loop {
        match next(consumer).await {
            Event::Assigned(assigned) => return assigned,
            Event::Trouble(_) | Event::Recovered => {}
            other => panic!("{other:?} before the assignment"),
        }
    }
}

fn value(record: &Record) -> String {
    String::from_utf8(record.value.clone().unwrap().to_vec()).unwrap()
}

/// Reads this many records, whatever their partitions, and passes over trouble.
async fn read(consumer: &mut Box<dyn Consumer>, count: usize) -> Vec<(TopicPartition, i64, Record)> {
    let mut found = Vec::new();
    while found.len() < count {
        match next(consumer).await {
            Event::Records(batch) => {
                found.extend(batch.records.into_iter().map(|(offset, record)| (batch.partition.clone(), offset, record)));
            }
            Event::Assigned(_) | Event::Trouble(_) | Event::Recovered => {}
            other => panic!("{other:?} after {} of {count} records", found.len()),
        }
    }
    found
}

fn commit(topic: &Arc<str>, partition: i32, offset: i64, metadata: &str) -> Commit {
    Commit { partition: TopicPartition::new(topic.clone(), partition), offset, metadata: metadata.to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_come_back_as_they_were_sent_and_commits_are_kept() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "roundtrip", 1).await;
    let sent = Record {
        key: Some(Bytes::from_static(b"")),
        value: None,
        headers: vec![
            Header::new("mesh-id", "1"),
            Header { name: "Odd".into(), value: None },
            Header { name: "Odd".into(), value: Some(Bytes::from_static(&[0, 255])) },
        ],
        timestamp_ms: Some(recently()),
    };
    let acks = broker.producer().send(vec![to(&topic, None, sent.clone()), to(&topic, None, record("k", "v"))]).await;
    assert_eq!(acks.iter().map(|ack| ack.as_ref().unwrap().offset).collect::<Vec<_>>(), [0, 1]);

    let group = unique("group");
    let mut consumer = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    let first = assigned(&mut consumer).await;
    assert_eq!((first.len(), first[0].position, first[0].metadata.as_str()), (1, 0, ""));
    let committed = broker.admin().committed(&group, vec![TopicPartition::new(topic.clone(), 0)]).await.unwrap();
    assert_eq!(committed, [Some(commit(&topic, 0, 0, ""))], "the start is committed before the first fetch");
    let records = read(&mut consumer, 2).await;
    assert_eq!(records[0].2, sent);
    assert_eq!(value(&records[1].2), "v");
    assert!(records[1].2.timestamp_ms.is_some());
    consumer.commit(vec![commit(&topic, 0, 1, "meta-ü")]).await.unwrap();
    consumer.close().await;

    let committed = broker.admin().committed(&group, vec![TopicPartition::new(topic.clone(), 0)]).await.unwrap();
    assert_eq!(committed, [Some(commit(&topic, 0, 1, "meta-ü"))]);
    let mut consumer = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    let again = assigned(&mut consumer).await;
    assert_eq!((again[0].position, again[0].metadata.as_str()), (1, "meta-ü"));
    assert_eq!(read(&mut consumer, 1).await[0].1, 1);
    consumer.close().await;
    assert!(broker.health().is_ok());
    broker.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn order_is_kept_over_calls_and_keys_choose_as_in_java() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "order", 4).await;
    let producer = broker.producer();
    let mut pending = Vec::new();
    for round in 0..200 {
        let records = (0..20).map(|number| to(&topic, None, record(&format!("k{}", number % 7), &format!("{:05}", round * 20 + number))));
        pending.push(producer.send(records.collect()));
    }
    for acks in pending {
        assert!(timeout(LONG, acks).await.unwrap().iter().all(Result::is_ok));
    }

    let mut consumer = broker.consumer(config(None, std::slice::from_ref(&topic))).unwrap();
    let mut last: BTreeMap<Bytes, String> = BTreeMap::new();
    for (_, _, record) in read(&mut consumer, 4000).await {
        let (key, value) = (record.key.clone().unwrap(), value(&record));
        let before = last.insert(key, value.clone());
        assert!(before.as_ref().is_none_or(|before| *before < value), "{before:?} then {value}");
    }
    consumer.close().await;

    // The hashes are those of the Java client's own test of `Utils.murmur2`.
    let seven = self::topic(&broker, "murmur", 7).await;
    for (key, hash) in [
        ("21", -973_932_308),
        ("foobar", -790_332_482),
        ("a-little-bit-long-string", -985_981_536),
        ("a-little-bit-longer-string", -1_486_304_829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
    ] {
        let ack = producer.send(vec![to(&seven, None, record(key, "x"))]).await;
        assert_eq!(ack[0].as_ref().unwrap().partition.partition, (hash & 0x7fff_ffff) % 7, "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_topics_are_named_and_never_created() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let name = unique("nowhere");
    assert_eq!(broker.producer().known_partitions(&name), None);
    let error = broker.producer().learn_topic(&name, LONG).await.unwrap_err();
    assert_eq!(error.kind, ProduceErrorKind::UnknownTopic, "{error}");
    assert!(error.detail.contains(&name), "{error}");
    for bad in ["a/b", "", "x\0y", &"x".repeat(600)] {
        assert_eq!(broker.producer().learn_topic(bad, LONG).await.unwrap_err().kind, ProduceErrorKind::UnknownTopic);
    }
    // Sent all the same: an answer, not a topic.
    let acks = timeout(LONG, broker.producer().send(vec![to(&name.as_str().into(), None, record("k", "v"))])).await.unwrap();
    assert_eq!(acks[0].as_ref().unwrap_err().kind, ProduceErrorKind::UnknownTopic);
    assert!(!broker.admin().topics().await.unwrap().contains_key(&name));

    let known = topic(&broker, "known", 2).await;
    let acks = timeout(LONG, broker.producer().send(vec![to(&known, Some(9), record("k", "v")), to(&known, Some(1), record("k", "v"))]))
        .await
        .unwrap();
    assert_eq!(acks[0].as_ref().unwrap_err().kind, ProduceErrorKind::UnknownPartition);
    assert!(acks[1].is_ok());
    let large = Record { value: Some(Bytes::from(vec![0; 3 * 1024 * 1024])), ..Record::default() };
    let acks = timeout(LONG, broker.producer().send(vec![to(&known, None, large)])).await.unwrap();
    assert_eq!(acks[0].as_ref().unwrap_err().kind, ProduceErrorKind::TooLarge);
    assert_eq!(broker.admin().watermarks(&TopicPartition::new(name, 0)).await.unwrap_err().kind, BrokerErrorKind::UnknownTopic);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_fails_the_rest_of_the_batch() {
    let Some(kafka) = own_kafka().await else { return };
    let broker = open_with(&kafka, &[("queue.buffering.max.messages", "100")]);
    let topic = topic(&broker, "full", 1).await;
    kafka.freeze().unwrap();
    let sent = broker.producer().send((0..300).map(|number| to(&topic, None, record("k", &number.to_string()))).collect());
    kafka.thaw().unwrap();
    let acks = timeout(LONG, sent).await.unwrap();
    let stored = acks.iter().take_while(|ack| ack.is_ok()).count();
    assert!(stored >= 100, "{stored} stored");
    assert!(acks[stored..].iter().all(|ack| ack.as_ref().unwrap_err().kind == ProduceErrorKind::QueueFull), "nothing overtakes");
}

/// A member of a group that commits what it read when it is asked to give partitions away, and drops batches never.
struct Member {
    consumer: Box<dyn Consumer>,
    next: BTreeMap<i32, i64>,
    seen: Vec<(i32, i64)>,
    owned: Vec<i32>,
}

impl Member {
    fn new(broker: &KafkaBroker, config: ConsumerConfig) -> Self {
        Self { consumer: broker.consumer(config).unwrap(), next: BTreeMap::new(), seen: Vec::new(), owned: Vec::new() }
    }

    fn take(&mut self, batch: Batch) {
        let partition = batch.partition.partition;
        assert!(self.owned.contains(&partition), "records of {partition}, which is not owned");
        for (offset, _) in batch.records {
            self.seen.push((partition, offset));
            self.next.insert(partition, offset + 1);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Assigned(assigned) => self.owned.extend(assigned.iter().map(|one| one.partition.partition)),
            Event::Revoking(Revoking { partitions, lost, done }) => {
                assert!(!lost);
                let mut commits = Vec::new();
                for partition in partitions {
                    self.owned.retain(|owned| *owned != partition.partition);
                    if let Some(offset) = self.next.remove(&partition.partition) {
                        commits.push(Commit { partition, offset, metadata: String::new() });
                    }
                }
                done.send(commits).unwrap();
            }
            Event::Records(batch) => self.take(batch),
            Event::Trouble(_) | Event::Recovered => {}
            other @ Event::Expired { .. } => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_share_and_hand_over_without_a_duplicate() {
    let Some(kafka) = kafka().await else { return };
    share_and_hand_over(&open(&kafka)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newer_group_protocol_may_be_chosen() {
    let Some(kafka) = kafka().await else { return };
    share_and_hand_over(&open_with(&kafka, &[("group.protocol", "consumer")])).await;
}

async fn share_and_hand_over(broker: &KafkaBroker) {
    let topic = topic(broker, "share", 4).await;
    let group = unique("group");
    for partition in 0..4 {
        produce(broker, &topic, partition, 0..50).await;
    }
    let mut first = Member::new(broker, config(Some(&group), std::slice::from_ref(&topic)));
    while first.seen.len() < 200 {
        let event = next(&mut first.consumer).await;
        first.handle(event);
    }
    assert_eq!(first.owned.len(), 4);
    // Nothing is committed but the starts: the hand-over must carry the rest.
    let mut second = Member::new(broker, config(Some(&group), std::slice::from_ref(&topic)));
    while first.owned.len() + second.owned.len() != 4 || second.owned.is_empty() {
        let event = timeout(LONG, async {
            tokio::select! { event = first.consumer.next() => (true, event), event = second.consumer.next() => (false, event) }
        });
        let (of_first, event) = event.await.unwrap();
        if of_first { first.handle(event) } else { second.handle(event) }
    }
    assert_eq!(first.owned.len(), 2, "cooperative: {:?} and {:?}", first.owned, second.owned);
    for partition in 0..4 {
        produce(broker, &topic, partition, 50..60).await;
    }
    while first.seen.len() + second.seen.len() < 240 {
        let event = timeout(LONG, async {
            tokio::select! { event = first.consumer.next() => (true, event), event = second.consumer.next() => (false, event) }
        });
        let (of_first, event) = event.await.unwrap();
        if of_first { first.handle(event) } else { second.handle(event) }
    }
    // Fenced: the partition is the other's, though the broker would take it.
    let theirs = second.owned[0];
    let error = first.consumer.commit(vec![commit(&topic, theirs, 1, "")]).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Fenced, "{error}");
    // The second leaves; the first gets all, where the second's commits are.
    let commits = second.next.iter().map(|(partition, offset)| commit(&topic, *partition, *offset, "")).collect();
    second.consumer.commit(commits).await.unwrap();
    second.consumer.close().await;
    while first.owned.len() < 4 {
        let event = next(&mut first.consumer).await;
        first.handle(event);
    }
    produce(broker, &topic, theirs, 60..61).await;
    while first.seen.len() + second.seen.len() < 241 {
        let event = next(&mut first.consumer).await;
        first.handle(event);
    }
    let mut all = [first.seen, second.seen].concat();
    all.sort_unstable();
    let before = all.len();
    all.dedup();
    assert_eq!(all.len(), before, "a record was read twice");
    first.consumer.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_while_a_revocation_is_unanswered() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "barrier", 2).await;
    let group = unique("group");
    let mut first = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    assert_eq!(assigned(&mut first).await.len(), 2);
    let second = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    let revoking = loop {
        if let Event::Revoking(revoking) = next(&mut first).await {
            break revoking;
        }
    };
    for partition in 0..2 {
        produce(&broker, &topic, partition, 0..1).await;
    }
    assert!(timeout(Duration::from_millis(500), first.next()).await.is_err());
    let kept = 1 - revoking.partitions[0].partition;
    drop(revoking.done);
    assert_eq!(read(&mut first, 1).await[0].0.partition, kept);
    first.close().await;
    second.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_member_returns_to_its_partitions_at_once() {
    let Some(kafka) = kafka().await else { return };
    let broker = open_with(&kafka, &[("session.timeout.ms", "30000")]);
    let topic = topic(&broker, "static", 4).await;
    let group = unique("group");
    let member =
        |instance: &str| ConsumerConfig { instance: Some(instance.to_owned()), ..config(Some(&group), std::slice::from_ref(&topic)) };
    let mut first = Member::new(&broker, member("a"));
    let mut second = Member::new(&broker, member("b"));
    while first.owned.len() != 2 || second.owned.len() != 2 {
        let event = timeout(LONG, async {
            tokio::select! { event = first.consumer.next() => (true, event), event = second.consumer.next() => (false, event) }
        });
        let (of_first, event) = event.await.unwrap();
        if of_first { first.handle(event) } else { second.handle(event) }
    }
    first.owned.sort_unstable();
    first.consumer.close().await;
    let began = std::time::Instant::now();
    let mut again = broker.consumer(member("a")).unwrap();
    let mut returned: Vec<i32> = assigned(&mut again).await.iter().map(|one| one.partition.partition).collect();
    returned.sort_unstable();
    assert_eq!(returned, first.owned);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(timeout(Duration::from_millis(300), second.consumer.next()).await.is_err(), "the other member notices nothing");
    again.close().await;
    second.consumer.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_instance_twice_is_told_and_waited_for() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "fenced", 1).await;
    let group = unique("group");
    let member = || ConsumerConfig { instance: Some("a".to_owned()), ..config(Some(&group), std::slice::from_ref(&topic)) };
    let mut first = broker.consumer(member()).unwrap();
    assigned(&mut first).await;
    let mut second = broker.consumer(member()).unwrap();
    assigned(&mut second).await;
    let mut lost = false;
    let error = loop {
        match next(&mut first).await {
            Event::Trouble(error) => break error,
            Event::Revoking(revoking) => lost |= revoking.lost,
            _ => {}
        }
    };
    assert_eq!(error.kind, BrokerErrorKind::Fenced, "{error}");
    assert!(error.detail.contains("instance"), "{error}");
    while !lost {
        if let Event::Revoking(revoking) = next(&mut first).await {
            lost = revoking.lost;
        }
    }
    let error = first.commit(vec![commit(&topic, 0, 0, "")]).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Fenced, "{error}");
    second.close().await;
    // The other is gone: the place is taken again.
    assert_eq!(assigned(&mut first).await.len(), 1);
    first.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_and_returns_costs_nothing() {
    let Some(kafka) = own_kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "kill", 2).await;
    let group = unique("group");
    let mut consumer = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    assigned(&mut consumer).await;
    produce(&broker, &topic, 0, 0..10).await;
    assert_eq!(read(&mut consumer, 10).await.len(), 10);

    let stopped = kafka.clone();
    tokio::task::spawn_blocking(move || stopped.stop()).await.unwrap().unwrap();
    let waiting = broker.producer().send((10..20).map(|number| to(&topic, Some(0), record("k", &number.to_string()))).collect());
    let error = loop {
        if let Event::Trouble(error) = next(&mut consumer).await {
            break error;
        }
    };
    assert_eq!(error.kind, BrokerErrorKind::Unreachable, "{error}");
    assert!(error.detail.contains(kafka.bootstrap()), "{error}");
    assert_eq!(broker.health().unwrap_err().kind, BrokerErrorKind::Unreachable);
    let error = broker.admin().watermarks(&TopicPartition::new(topic.clone(), 0)).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Unreachable, "{error}");
    assert_eq!(broker.producer().learn_topic(&topic, Duration::from_millis(300)).await.unwrap(), 2, "what is known stays known");

    let started = kafka.clone();
    tokio::task::spawn_blocking(move || started.start()).await.unwrap().unwrap();
    let acks = timeout(LONG, waiting).await.unwrap();
    assert_eq!(acks.into_iter().map(|ack| ack.unwrap().offset).collect::<Vec<_>>(), (10..20).collect::<Vec<_>>());
    let (mut offsets, mut recovered) = (Vec::new(), false);
    while offsets.last() != Some(&19) || !recovered {
        match next(&mut consumer).await {
            Event::Records(batch) => offsets.extend(batch.records.iter().map(|(offset, _)| *offset)),
            Event::Recovered => recovered = true,
            // Its session may have ended meanwhile.
            Event::Revoking(revoking) => {
                offsets.clear();
                drop(revoking.done.send(Vec::new()));
            }
            Event::Assigned(_) | Event::Trouble(_) => {}
            other @ Event::Expired { .. } => panic!("{other:?}"),
        }
    }
    assert!(offsets.ends_with(&(10..20).collect::<Vec<_>>()), "{offsets:?}");
    assert!(broker.health().is_ok());
    consumer.commit(vec![commit(&topic, 0, 20, "")]).await.unwrap();
    consumer.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_was_never_there_is_waited_for() {
    let keys = BTreeMap::from([("bootstrap.servers".to_owned(), "127.0.0.1:1".to_owned())]);
    let broker = KafkaBroker::open(keys, KafkaOptions::default()).unwrap();
    let topic: Arc<str> = "somewhere".into();
    for group in [None, Some("g")] {
        let mut consumer = broker.consumer(config(group, std::slice::from_ref(&topic))).unwrap();
        match next(&mut consumer).await {
            Event::Trouble(error) => assert!(error.detail.contains("127.0.0.1:1"), "{error}"),
            other => panic!("{other:?}"),
        }
        consumer.close().await;
    }
    let error = broker.producer().learn_topic("somewhere", Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(error.kind, ProduceErrorKind::Unavailable);
    assert!(broker.health().is_err());
    let sent = broker.producer().send(vec![to(&topic, None, record("k", "v"))]);
    assert!(broker.close(Duration::from_millis(300)).await.is_err(), "what was not acknowledged is told");
    drop(sent);
}

/// Deletes a partition's records below an offset.
async fn delete_before(kafka: &KafkaHandle, topic: &str, offset: i64) {
    let admin: rdkafka::admin::AdminClient<rdkafka::client::DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", kafka.bootstrap()).create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition_offset(topic, 0, rdkafka::Offset::Offset(offset)).unwrap();
    let list = admin.delete_records(&list, &rdkafka::admin::AdminOptions::new()).await.unwrap();
    assert!(list.elements()[0].error().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_deleted_unread_is_expired_and_reading_goes_on() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "expired", 1).await;
    let group = unique("group");
    produce(&broker, &topic, 0, 0..100).await;
    let mut consumer = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    read(&mut consumer, 100).await;
    consumer.commit(vec![commit(&topic, 0, 10, "")]).await.unwrap();
    consumer.close().await;
    delete_before(&kafka, &topic, 40).await;

    let mut consumer = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    assert_eq!(assigned(&mut consumer).await[0].position, 10);
    match next(&mut consumer).await {
        Event::Expired { partition, from, to } => assert_eq!((partition.partition, from, to), (0, 10, 40)),
        other => panic!("{other:?}"),
    }
    let records = read(&mut consumer, 60).await;
    assert_eq!((records[0].1, records[59].1), (40, 99));
    consumer.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_beyond_the_end_begins_again_visibly() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "beyond", 1).await;
    let group = unique("group");
    produce(&broker, &topic, 0, 0..5).await;
    let mut consumer = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    assigned(&mut consumer).await;
    consumer.commit(vec![commit(&topic, 0, 1000, "")]).await.unwrap();
    consumer.close().await;

    let mut consumer = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    assert_eq!(assigned(&mut consumer).await[0].position, 1000);
    let (mut lost, mut position) = (false, None);
    while position.is_none() {
        match next(&mut consumer).await {
            Event::Revoking(revoking) => lost = revoking.lost,
            Event::Assigned(assigned) => position = Some(assigned[0].position),
            Event::Trouble(_) | Event::Recovered => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(lost && position == Some(0), "{lost} {position:?}");
    assert_eq!(read(&mut consumer, 5).await[4].1, 4);
    consumer.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_are_resolved_once() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "start", 1).await;
    let began = recently();
    let at = |number: i64| Record { timestamp_ms: Some(began + number * 1000), ..record("k", &number.to_string()) };
    let acks = broker.producer().send((0..10).map(|number| to(&topic, None, at(number))).collect()).await;
    assert!(acks.iter().all(Result::is_ok));
    assert_eq!(broker.admin().offsets_at(&topic, began + 4_500).await.unwrap(), [5]);
    assert_eq!(broker.admin().offsets_at(&topic, began + 100_000_000).await.unwrap(), [10]);
    for (start, expected) in [
        (StartOffset::Earliest, 0),
        (StartOffset::Latest, 10),
        (StartOffset::At(began + 4_500), 5),
        (StartOffset::At(0), 0),
        (StartOffset::At(began + 100_000_000), 10),
    ] {
        let group = unique("group");
        let with = |group: Option<&str>, start| ConsumerConfig { start, ..config(group, std::slice::from_ref(&topic)) };
        let mut consumer = broker.consumer(with(Some(&group), start.clone())).unwrap();
        assert_eq!(assigned(&mut consumer).await[0].position, expected, "{start:?}");
        consumer.close().await;
        // The rule is for a group without offsets only.
        let mut consumer = broker.consumer(with(Some(&group), StartOffset::Earliest)).unwrap();
        assert_eq!(assigned(&mut consumer).await[0].position, expected, "{start:?} once resolved");
        consumer.close().await;
        let mut reader = broker.consumer(with(None, start.clone())).unwrap();
        assert_eq!(assigned(&mut reader).await[0].position, expected, "{start:?} without a group");
        assert_eq!(reader.commit(vec![commit(&topic, 0, 1, "")]).await.unwrap_err().kind, BrokerErrorKind::Config);
        reader.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_that_do_not_exist_yet_are_waited_for() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let there = topic(&broker, "there", 1).await;
    produce(&broker, &there, 0, 0..1).await;
    for group in [None, Some(unique("group"))] {
        let later: Arc<str> = unique("later").into();
        let wanted = ConsumerConfig { start: StartOffset::Latest, ..config(group.as_deref(), &[there.clone(), later.clone()]) };
        let mut consumer = broker.consumer(wanted).unwrap();
        let (mut told, mut begun) = (false, false);
        while !told || !begun {
            match next(&mut consumer).await {
                Event::Trouble(error) if error.kind == BrokerErrorKind::UnknownTopic => {
                    assert!(error.detail.contains(&*later), "{error}");
                    told = true;
                }
                Event::Assigned(assigned) => begun = assigned[0].partition.topic == there,
                Event::Trouble(_) | Event::Recovered => {}
                other => panic!("{other:?}"),
            }
        }
        broker.admin().create_topics(vec![NewTopic { name: later.to_string(), partitions: Some(1), ..NewTopic::default() }]).await.unwrap();
        broker.producer().learn_topic(&later, LONG).await.unwrap();
        produce(&broker, &later, 0, 0..1).await;
        let (mut recovered, mut found) = (false, false);
        while !recovered || !found {
            match next(&mut consumer).await {
                Event::Recovered => recovered = true,
                Event::Records(batch) => found = batch.partition.topic == later && batch.records[0].0 == 0,
                Event::Revoking(revoking) => drop(revoking.done.send(Vec::new())),
                Event::Assigned(_) | Event::Trouble(_) => {}
                other @ Event::Expired { .. } => panic!("{other:?}"),
            }
        }
        consumer.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_stays_bounded_and_the_rest_goes_on() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "held", 2).await;
    let body = "x".repeat(10_000);
    let fill = |partition: i32| (0..1000).map(|_| to(&topic, Some(partition), record("k", &body))).collect::<Vec<_>>();
    for partition in 0..2 {
        assert!(broker.producer().send(fill(partition)).await.iter().all(Result::is_ok));
    }
    let mut consumer = broker.consumer(ConsumerConfig { buffer_bytes: 1024 * 1024, ..config(None, std::slice::from_ref(&topic)) }).unwrap();
    assigned(&mut consumer).await;
    let held = TopicPartition::new(topic.clone(), 0);
    consumer.hold(&held);
    let passed = read(&mut consumer, 1000).await;
    assert!(passed.iter().all(|(partition, _, _)| partition.partition == 1));
    consumer.release(&held);
    let records = read(&mut consumer, 1000).await;
    assert_eq!(records.iter().map(|(_, offset, _)| *offset).collect::<Vec<_>>(), (0..1000).collect::<Vec<_>>());
    consumer.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_are_created_once_with_their_settings() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let name = unique("created");
    let wanted = NewTopic {
        name: name.clone(),
        partitions: Some(3),
        replication: Some(1),
        config: BTreeMap::from([("cleanup.policy".to_owned(), "compact".to_owned())]),
    };
    let plain = NewTopic { name: unique("plain"), ..NewTopic::default() };
    broker.admin().create_topics(vec![wanted.clone(), plain.clone()]).await.unwrap();
    broker.admin().create_topics(vec![NewTopic { partitions: Some(7), ..wanted.clone() }]).await.unwrap();
    let topics = broker.admin().topics().await.unwrap();
    assert_eq!((topics.get(&name), topics.get(&plain.name)), (Some(&3), Some(&4)), "4 is the broker's default");
    assert_eq!(broker.producer().known_partitions(&name), Some(3));
    // A compacted topic refuses a record without a key.
    let keyless = Record { value: Some(Bytes::from_static(b"v")), ..Record::default() };
    let acks = timeout(LONG, broker.producer().send(vec![to(&name.as_str().into(), None, keyless)])).await.unwrap();
    assert_eq!(acks[0].as_ref().unwrap_err().kind, ProduceErrorKind::Refused, "{:?}", acks[0]);
    let wrong = NewTopic { name: unique("wrong"), config: BTreeMap::from([("no.such".to_owned(), "x".to_owned())]), ..NewTopic::default() };
    let error = broker.admin().create_topics(vec![wrong]).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Config, "{error}");
    let error = broker.admin().create_topics(vec![NewTopic { name: "a/b".to_owned(), ..NewTopic::default() }]).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Config, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_consumer_wakes_at_once_for_a_record() {
    let Some(kafka) = kafka().await else { return };
    let broker = open(&kafka);
    let topic = topic(&broker, "latency", 1).await;
    let mut consumer = broker.consumer(config(Some(&unique("group")), std::slice::from_ref(&topic))).unwrap();
    assigned(&mut consumer).await;
    produce(&broker, &topic, 0, 0..1).await;
    read(&mut consumer, 1).await;
    let mut times = Vec::new();
    for number in 1..50 {
        let began = std::time::Instant::now();
        produce(&broker, &topic, 0, number..number + 1).await;
        read(&mut consumer, 1).await;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    assert!(times[25] < Duration::from_millis(40), "median {:?}, most {:?}", times[25], times[48]);
    println!("produce to consume: median {:?}, p90 {:?}", times[25], times[44]);
    consumer.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_freezes_takes_the_partitions_and_gives_them_back() {
    let Some(kafka) = own_kafka().await else { return };
    let broker = open_with(&kafka, &[("session.timeout.ms", "2000"), ("heartbeat.interval.ms", "300")]);
    let topic = topic(&broker, "freeze", 1).await;
    let group = unique("group");
    let mut consumer = broker.consumer(config(Some(&group), std::slice::from_ref(&topic))).unwrap();
    assigned(&mut consumer).await;
    produce(&broker, &topic, 0, 0..10).await;
    read(&mut consumer, 10).await;
    consumer.commit(vec![commit(&topic, 0, 5, "")]).await.unwrap();
    kafka.freeze().unwrap();
    let revoking = loop {
        if let Event::Revoking(revoking) = next(&mut consumer).await {
            break revoking;
        }
    };
    assert!(revoking.lost, "the session is over");
    kafka.thaw().unwrap();
    let again = loop {
        match next(&mut consumer).await {
            Event::Assigned(assigned) => break assigned,
            Event::Trouble(_) | Event::Recovered => {}
            Event::Revoking(revoking) => assert!(revoking.lost),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(again[0].position, 5, "where the last commit was");
    assert_eq!(read(&mut consumer, 5).await[0].1, 5);
    consumer.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_advertised_address_that_leads_nowhere_is_named() {
    let Some(kafka) = own_kafka_with("advertised.listeners=PLAINTEXT://kafka.invalid:{port}\n".to_owned()).await else { return };
    let broker = open(&kafka);
    let mut consumer = broker.consumer(config(Some("g"), &["t".into()])).unwrap();
    let error = loop {
        match next(&mut consumer).await {
            Event::Trouble(error) if error.kind == BrokerErrorKind::Unreachable => break error,
            Event::Trouble(_) | Event::Recovered => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(error.detail.contains("kafka.invalid") && error.detail.contains("advertised.listeners"), "{error}");
    assert!(broker.health().is_err());
    consumer.close().await;
}
