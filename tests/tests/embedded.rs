//! What only the embedded broker promises: durability over `kill -9`, one owner of the folder, life after a full disk, retention,
//! compaction, and its bounds.

#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use mesh_sidecar::{
    broker::{
        Broker, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, NewTopic, Outgoing, ProduceErrorKind, StartOffset,
        embedded::{Clock, EmbeddedBroker, EmbeddedConfig},
    },
    record::{Position, Record, TopicPartition},
};

const PATIENCE: Duration = Duration::from_secs(30);
/// Set in the process that is killed: its folder.
const VICTIM: &str = "MESH_TEST_VICTIM_FOLDER";

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("no {what} within {} s", PATIENCE.as_secs()),
    }
}

fn out(topic: &str, partition: i32, key: Option<&str>, value: Vec<u8>) -> Outgoing {
    let key = key.map(|key| Bytes::copy_from_slice(key.as_bytes()));
    let record = Record { key, value: Some(Bytes::from(value)), ..Record::default() };
    Outgoing { topic: topic.into(), partition: Some(partition), record }
}

fn reader(broker: &EmbeddedBroker, topic: &str) -> Box<dyn Consumer> {
    let config = ConsumerConfig::reader(vec![topic.into()], StartOffset::Earliest, 1 << 20);
    broker.consumer(config).expect("a consumer")
}

/// Reads until the offset before `end` of partition 0 was read.
async fn read_to(consumer: &mut Box<dyn Consumer>, end: i64) -> (Vec<(i64, Record)>, Vec<(i64, i64)>) {
    let (mut records, mut expired) = (Vec::new(), Vec::new());
    loop {
        match within("record", consumer.next()).await {
            Event::Records(batch) if batch.partition.partition == 0 => {
                records.extend(batch.records);
                if records.last().is_some_and(|(offset, _)| offset + 1 >= end) {
                    return (records, expired);
                }
            }
            Event::Expired { from, to, .. } => expired.push((from, to)),
            _ => {}
        }
    }
}

async fn create(broker: &EmbeddedBroker, name: &str, config: &[(&str, &str)]) {
    let config = config.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let topic = NewTopic { name: name.to_owned(), partitions: Some(1), replication: None, config };
    broker.admin().create_topics(vec![topic]).await.expect("creates");
}

/// A clock that a test moves.
fn hand_clock() -> (Arc<AtomicI64>, Clock) {
    let now = Arc::new(AtomicI64::new(1_700_000_000_000));
    let clock = now.clone();
    (now, Arc::new(move || clock.load(Ordering::Relaxed)))
}

/// Not a test of its own: the process that `kill_9_loses_nothing_acknowledged` kills. It prints every acknowledged offset.
#[tokio::test(flavor = "multi_thread")]
async fn victim() {
    let Ok(folder) = std::env::var(VICTIM) else { return };
    let broker = EmbeddedBroker::open(EmbeddedConfig::new(folder)).expect("opens");
    let producer = broker.producer();
    let topics = vec!["t".into()];
    let group = Some("g".to_owned());
    let config =
        ConsumerConfig { group, topics, instance: None, start: StartOffset::Earliest, buffer_bytes: 1 << 20, transactional_id: None };
    producer.learn_topic("t", PATIENCE).await.expect("exists");
    let mut consumer = broker.consumer(config).expect("a consumer");
    tokio::spawn(async move {
        loop {
            if let Event::Records(batch) = consumer.next().await {
                let offset = batch.records.last().map_or(0, |(offset, _)| offset + 1);
                let commit = Commit { partition: batch.partition.clone(), offset, metadata: String::new() };
                consumer.commit(vec![commit]).await.expect("commits");
                println!("\ncommit {} {offset}", batch.partition.partition);
            }
        }
    });
    loop {
        let acks: Vec<_> =
            (0..16).map(|index| producer.send((0..4).map(|partition| out("t", partition, None, vec![index; 700])).collect())).collect();
        for ack in acks {
            for ack in ack.await {
                let position = ack.expect("acknowledged");
                println!("\nack {} {}", position.partition.partition, position.offset);
            }
        }
        std::io::stdout().flush().expect("prints");
    }
}

/// The highest acknowledged and the highest committed offset, by partition.
type Promised = (BTreeMap<i32, i64>, BTreeMap<i32, i64>);

/// Runs the victim until it printed `lines` acknowledgements, and kills it.
fn run_victim(folder: &Path, lines: usize) -> Promised {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "victim", "--nocapture"])
        .env(VICTIM, folder)
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut promised = Promised::default();
    let mut count = 0;
    for line in BufReader::new(child.stdout.take().expect("piped")).lines() {
        // The last line may be cut by the kill.
        let Ok(line) = line else { break };
        let words: Vec<_> = line.split(' ').collect();
        let [what @ ("ack" | "commit"), partition, offset] = words[..] else { continue };
        let (Ok(partition), Ok(offset)) = (partition.parse::<i32>(), offset.parse::<i64>()) else { continue };
        let highest = if what == "ack" { &mut promised.0 } else { &mut promised.1 };
        let highest = highest.entry(partition).or_insert(offset);
        *highest = offset.max(*highest);
        count += usize::from(what == "ack");
        if count == lines {
            child.kill().expect("kill -9");
        }
    }
    child.wait().expect("ends");
    assert!(count >= lines, "the victim ended by itself after {count} acknowledgements");
    promised
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_loses_nothing_acknowledged() {
    let folder = tempfile::tempdir().expect("a folder");
    for round in 1..=3 {
        let path = folder.path().to_owned();
        let (acknowledged, committed) = tokio::task::spawn_blocking(move || run_victim(&path, 3000)).await.expect("runs");
        let opening = std::time::Instant::now();
        let broker = EmbeddedBroker::open(EmbeddedConfig::new(folder.path())).expect("opens after kill -9");
        let took = opening.elapsed();
        assert!(took < Duration::from_secs(2), "opening took {took:?}");
        let admin = broker.admin();
        let mut total = 0;
        for (partition, offset) in acknowledged {
            let partition = TopicPartition::new("t", partition);
            let (low, high) = admin.watermarks(&partition).await.expect("watermarks");
            assert!(low == 0 && high > offset, "round {round}: {partition} ends at {high}, but {offset} was acknowledged");
            total += high;
            let stored =
                admin.committed("g", vec![partition.clone()]).await.expect("committed").remove(0).map_or(0, |commit| commit.offset);
            let promised = committed.get(&partition.partition).copied().unwrap_or(0);
            assert!((promised..=high).contains(&stored), "round {round}: {partition} has commit {stored}, {promised} was acknowledged");
        }
        let mut consumer = reader(&broker, "t");
        let mut next = BTreeMap::new();
        while next.values().sum::<i64>() < total {
            if let Event::Records(batch) = within("record", consumer.next()).await {
                for (offset, record) in batch.records {
                    let next = next.entry(batch.partition.partition).or_insert(0);
                    assert_eq!(offset, *next, "round {round}: a gap in {}", batch.partition);
                    assert_eq!(record.value.expect("a value").len(), 700);
                    *next += 1;
                }
            }
        }
        consumer.close().await;
        broker.close(PATIENCE).await.expect("closes");
    }
}

#[tokio::test]
async fn the_folder_has_one_owner() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = EmbeddedBroker::open(EmbeddedConfig::new(folder.path())).expect("opens");
    let error = EmbeddedBroker::open(EmbeddedConfig::new(folder.path())).expect_err("refused");
    assert_eq!(error.kind, BrokerErrorKind::Config);
    assert!(error.detail.contains(&folder.path().display().to_string()), "{error}");
    drop(first);
    EmbeddedBroker::open(EmbeddedConfig::new(folder.path())).expect("opens again");
}

#[tokio::test]
async fn a_folder_that_cannot_be_is_named() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let error = EmbeddedBroker::open(EmbeddedConfig::new(file.path().join("below"))).expect_err("refused");
    assert_eq!(error.kind, BrokerErrorKind::Storage);
    assert!(error.detail.contains("below"), "{error}");
}

#[tokio::test]
async fn after_close_everything_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    let broker = EmbeddedBroker::open(EmbeddedConfig::new(folder.path())).expect("opens");
    let (producer, admin) = (broker.producer(), broker.admin());
    let last = producer.send(vec![out("t", 0, None, vec![1])]);
    broker.close(PATIENCE).await.expect("closes");
    assert!(within("last acknowledgement", last).await[0].is_ok(), "what was sent before the close is written");
    let after = within("answer", producer.send(vec![out("t", 0, None, vec![1])])).await;
    assert_eq!(after[0].as_ref().map_err(|error| error.kind), Err(ProduceErrorKind::Unavailable));
    assert!(within("answer", admin.create_topics(vec![NewTopic { name: "x".into(), ..NewTopic::default() }])).await.is_err());
    assert!(within("answer", admin.committed("g", vec![TopicPartition::new("t", 0)])).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_and_recovers() {
    let folder = tempfile::tempdir().expect("a folder");
    let (now, clock) = hand_clock();
    let config = EmbeddedConfig { max_store_bytes: Some(4 << 20), clock, ..EmbeddedConfig::new(folder.path()) };
    let broker = EmbeddedBroker::open(config).expect("opens");
    create(&broker, "t", &[("retention.ms", "60000")]).await;
    let producer = broker.producer();
    let mut stored = 0;
    let refused = loop {
        assert!(stored < 100, "the limit was never met");
        match within("answer", producer.send(vec![out("t", 0, None, vec![7; 100_000])])).await.remove(0) {
            Ok(position) => {
                assert_eq!(position.offset, stored);
                stored += 1;
            }
            Err(error) => break error,
        }
    };
    assert_eq!(refused.kind, ProduceErrorKind::Unavailable);
    assert!(refused.detail.contains("full") && refused.detail.contains("mesh.db"), "{refused}");
    let health = broker.health().expect_err("unhealthy");
    assert_eq!(health.kind, BrokerErrorKind::Storage);
    // Every record of a batch fails, and nothing of it is seen.
    let failed = within("answer", producer.send((0..10).map(|_| out("t", 0, None, vec![8; 100_000])).collect())).await;
    assert!(failed.len() == 10 && failed.iter().all(Result::is_err));
    assert_eq!(broker.admin().watermarks(&TopicPartition::new("t", 0)).await.expect("known"), (0, stored));
    // What is stored can be read.
    let mut consumer = reader(&broker, "t");
    let (records, _) = read_to(&mut consumer, stored).await;
    assert_eq!(records.len() as i64, stored);
    // Retention makes room, and the broker goes on by itself.
    now.fetch_add(120_000, Ordering::Relaxed);
    within("recovery", async {
        while broker.health().is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let position = within("answer", producer.send(vec![out("t", 0, None, vec![9; 100_000])])).await.remove(0).expect("stored again");
    assert_eq!(position.offset, stored);
    let (records, _) = read_to(&mut consumer, stored + 1).await;
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].1.value.as_ref().map(|value| value[0]), Some(9));
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_is_reported_as_expired() {
    let folder = tempfile::tempdir().expect("a folder");
    let (now, clock) = hand_clock();
    let config = EmbeddedConfig { clock, housekeeping: Duration::from_millis(20), ..EmbeddedConfig::new(folder.path()) };
    let broker = EmbeddedBroker::open(config.clone()).expect("opens");
    create(&broker, "t", &[("retention.ms", "60000")]).await;
    create(&broker, "kept", &[("retention.ms", "-1")]).await;
    let producer = broker.producer();
    let partition = TopicPartition::new("t", 0);
    for _ in 0..300 {
        producer.send(vec![out("t", 0, None, vec![1; 100]), out("kept", 0, None, vec![1; 100])]).await.remove(0).expect("stored");
    }
    let mut early = reader(&broker, "t");
    while !matches!(within("assignment", early.next()).await, Event::Assigned(_)) {}
    early.hold(&partition);
    now.fetch_add(50_000, Ordering::Relaxed);
    producer.send((0..5).map(|_| out("t", 0, None, vec![2; 100])).collect()).await.remove(0).expect("stored");
    now.fetch_add(20_000, Ordering::Relaxed);
    within("retention", async {
        while broker.admin().watermarks(&partition).await.expect("known") != (300, 305) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    early.release(&partition);
    let (records, expired) = read_to(&mut early, 305).await;
    assert_eq!((records.len(), expired), (5, vec![(0, 300)]));
    // All of it goes, and the offsets go on.
    now.fetch_add(100_000, Ordering::Relaxed);
    within("retention", async {
        while broker.admin().watermarks(&partition).await.expect("known") != (305, 305) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    early.close().await;
    broker.close(PATIENCE).await.expect("closes");
    let broker = EmbeddedBroker::open(config).expect("opens again");
    assert_eq!(broker.admin().watermarks(&partition).await.expect("known"), (305, 305));
    assert_eq!(broker.admin().watermarks(&TopicPartition::new("kept", 0)).await.expect("known"), (0, 300));
    let position = broker.producer().send(vec![out("t", 0, None, vec![3])]).await.remove(0).expect("stored");
    assert_eq!(position.offset, 305);
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_keeps_the_last_record_of_a_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let (now, clock) = hand_clock();
    let config = EmbeddedConfig { clock, housekeeping: Duration::from_millis(20), tail_bytes: 0, ..EmbeddedConfig::new(folder.path()) };
    let broker = EmbeddedBroker::open(config).expect("opens");
    create(&broker, "t", &[("cleanup.policy", "compact"), ("delete.retention.ms", "1000")]).await;
    let producer = broker.producer();
    let refused = producer.send(vec![out("t", 0, None, vec![1])]).await.remove(0).expect_err("needs a key");
    assert_eq!(refused.kind, ProduceErrorKind::Refused);
    for round in 0..100u8 {
        let keys = ["a", "b", "c", "gone"].map(|key| out("t", 0, Some(key), vec![round])).into();
        producer.send(keys).await.remove(0).expect("stored");
    }
    let mut tombstone = out("t", 0, Some("gone"), Vec::new());
    tombstone.record.value = None;
    producer.send(vec![out("t", 0, Some("last"), vec![1]), tombstone]).await.remove(0).expect("stored");
    now.fetch_add(10_000, Ordering::Relaxed);
    let expected = [("a", 396), ("b", 397), ("c", 398), ("last", 400)];
    within("compaction", async {
        loop {
            let mut consumer = reader(&broker, "t");
            let (records, expired) = read_to(&mut consumer, 401).await;
            consumer.close().await;
            assert!(expired.is_empty());
            let left: Vec<_> = records.iter().map(|(offset, record)| (record.key.clone().expect("a key"), *offset)).collect();
            if left == expected.map(|(key, offset)| (Bytes::from(key), offset)) {
                return;
            }
            // Keeps the writer going, since compaction begins anew only when enough was appended.
            now.fetch_add(1000, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let partition = TopicPartition::new("t", 0);
    assert_eq!(broker.admin().watermarks(&partition).await.expect("known"), (0, 402));
    for (from, found) in [(0, true), (400, true), (401, false), (402, false)] {
        let position = Position { partition: partition.clone(), offset: from };
        let answers = broker.admin().readable(vec![position]).await;
        assert!(matches!(answers[..], [Ok(answer)] if answer == found), "from {from}: {answers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_bounded() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = EmbeddedConfig { queue_bytes: 1 << 20, ..EmbeddedConfig::new(folder.path()) };
    let broker = EmbeddedBroker::open(config).expect("opens");
    let producer = broker.producer();
    let acks: Vec<_> = (0..400).map(|_| producer.send(vec![out("t", 0, None, vec![1; 500_000])])).collect();
    let mut next = 0;
    let mut refused = 0;
    for ack in acks {
        match within("answer", ack).await.remove(0) {
            Ok(position) => {
                assert_eq!(position.offset, next);
                next += 1;
            }
            Err(error) => {
                assert_eq!(error.kind, ProduceErrorKind::QueueFull, "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0 && next > 0, "{next} stored, {refused} refused");
    let position = within("answer", producer.send(vec![out("t", 0, None, vec![1])])).await.remove(0).expect("room again");
    assert_eq!(position.offset, next);
}

#[tokio::test]
async fn a_large_log_is_read_from_disk_within_the_buffer() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = || EmbeddedBroker::open(EmbeddedConfig::new(folder.path())).expect("opens");
    let broker = open();
    for _ in 0..20 {
        let records = (0..4000).map(|index| out("t", index % 4, None, vec![1; 300])).collect();
        assert!(broker.producer().send(records).await.iter().all(Result::is_ok));
    }
    broker.close(PATIENCE).await.expect("closes");
    drop(broker);
    let broker = open();
    let config = ConsumerConfig::reader(vec!["t".into()], StartOffset::Earliest, 100_000);
    let mut consumer = broker.consumer(config).expect("a consumer");
    let mut next: BTreeMap<i32, i64> = BTreeMap::new();
    while next.values().sum::<i64>() < 80_000 {
        if let Event::Records(batch) = within("record", consumer.next()).await {
            assert!(batch.records.len() <= 512, "{} records at once", batch.records.len());
            let next = next.entry(batch.partition.partition).or_insert(0);
            for (offset, _) in batch.records {
                assert_eq!(offset, *next);
                *next += 1;
            }
        }
    }
    assert_eq!(next, BTreeMap::from([(0, 20_000), (1, 20_000), (2, 20_000), (3, 20_000)]));
}
