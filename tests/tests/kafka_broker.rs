//! The Kafka broker of the sidecar against a real Kafka: what only Kafka does, and what it does when things go wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use mesh_sidecar::{
    broker::{
        Assigned, Broker, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, NewTopic, Outgoing, ProduceErrorKind, Revoking,
        StartOffset,
        kafka::{KafkaBroker, KafkaOptions},
    },
    record::{Header, Record, TopicPartition},
};
use mesh_tests::kafka::{KafkaHandle, kafka, own_kafka};
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
        timestamp_ms: Some(1_700_000_000_123),
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
