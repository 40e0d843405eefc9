//! Cases of topics, records and positions.

use super::*;

pub(super) async fn acknowledged_in_order(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn any_shape_of_record(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn keys_go_where_kafka_puts_them(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn unknown_topics(broker: Arc<dyn Broker>) -> Result<()> {
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
    let (empty, filled) = (TopicPartition::new(existing.clone(), 0), TopicPartition::new(existing, 1));
    let answer = within("answer to ends", broker.admin().ends(vec![empty, missing, filled])).await?;
    let ends: Vec<_> = answer.iter().map(|end| end.as_ref().map_err(|error| error.kind)).collect();
    ensure!(ends == [Ok(&0), Err(BrokerErrorKind::UnknownTopic), Ok(&1)], "ends, of a missing topic among them: {answer:?}");
    Ok(())
}

pub(super) async fn topics_are_created_once(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn watermarks_follow(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn offsets_by_time(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn sizes(broker: Arc<dyn Broker>) -> Result<()> {
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

/// Records below an offset are deleted, in the middle of a stored batch too; a reader from the start begins behind them.
pub(super) async fn deleted_records_are_gone(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "deleted", 2).await?;
    let partition = TopicPartition::new(topic.clone(), 0);
    produce(&broker, (0..20).map(|index| to(&topic, 0, record(None, &index.to_string()))).collect()).await?;
    within("deletion", broker.admin().delete_records(vec![(partition.clone(), 7)])).await??;
    ensure!(within("watermarks", broker.admin().watermarks(&partition)).await?? == (7, 20));
    within("deletion", broker.admin().delete_records(vec![(partition.clone(), 3)])).await?.context("below the low watermark")?;
    let mut reader = Reader::start(&broker, config(None, &[&topic], StartOffset::Earliest), 2).await?;
    let read: Vec<_> = reader.read(13).await?.into_iter().map(|(position, record)| (position.offset, value(&record))).collect();
    ensure!(read[0] == (7, "7".to_owned()) && read[12].0 == 19, "{read:?}");
    reader.close().await?;
    let beyond = within("deletion", broker.admin().delete_records(vec![(partition.clone(), 21)])).await?;
    ensure!(beyond.is_err(), "beyond the end");
    within("deletion", broker.admin().delete_records(vec![(partition.clone(), 20)])).await??;
    ensure!(within("watermarks", broker.admin().watermarks(&partition)).await?? == (20, 20));
    ensure!(
        within("deletion", broker.admin().delete_records(vec![(TopicPartition::new(topic, 9), 0)])).await?.is_err(),
        "no such partition"
    );
    let position = produce(&broker, vec![to(&partition.topic, 0, record(None, "new"))]).await?.remove(0);
    ensure!(position.offset == 20, "{position}");
    Ok(())
}

/// A topic gets partitions and settings, never loses what was not named, and tells of it. A group that reads it gets the new partitions.
pub(super) async fn topics_are_described_and_altered(broker: Arc<dyn Broker>) -> Result<()> {
    let name = topic(&broker, "altered", 2).await?;
    let admin = broker.admin();
    let described = async |settings| {
        let found = within("description", admin.describe_topics(vec![fresh("none"), name.to_string()], settings)).await??;
        ensure!(found.len() == 1 && *found[0].name == *name, "one exists of two: {found:?}");
        found.into_iter().next().context("the topic")
    };
    let before = described(true).await?;
    ensure!(
        before.partitions.len() == 2 && before.partitions.iter().all(|one| one.leader.is_some() && !one.replicas.is_empty()),
        "{before:?}"
    );
    let setting = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
    let altered = |change| within("alteration", admin.alter_topic(&name, change));
    altered(TopicChange { set: setting("retention.ms", "3600000"), ..TopicChange::default() }).await??;
    altered(TopicChange { partitions: Some(4), set: setting("max.message.bytes", "2000000"), ..TopicChange::default() }).await??;
    let after = described(true).await?;
    ensure!(after.partitions.len() == 4, "{after:?}");
    ensure!(after.config.get("retention.ms").map(String::as_str) == Some("3600000"), "{after:?}");
    ensure!(after.config.get("max.message.bytes").map(String::as_str) == Some("2000000"), "{after:?}");
    altered(TopicChange { unset: vec!["retention.ms".to_owned()], ..TopicChange::default() }).await??;
    let last = described(true).await?;
    ensure!(!last.config.contains_key("retention.ms") && last.config.contains_key("max.message.bytes"), "{last:?}");
    let fewer = altered(TopicChange { partitions: Some(3), ..TopicChange::default() }).await?;
    ensure!(fewer.as_ref().is_err_and(|error| error.kind == BrokerErrorKind::Config), "fewer partitions: {fewer:?}");
    let wrong = altered(TopicChange { set: setting("retention.ms", "soon"), ..TopicChange::default() }).await?;
    ensure!(wrong.as_ref().is_err_and(|error| error.kind == BrokerErrorKind::Config), "a value that is none: {wrong:?}");
    // All of its partitions are written and read.
    ensure!(within("answer to learn_topic", broker.producer().learn_topic(&name, PATIENCE)).await?.is_ok_and(|count| count == 4));
    let partitions: Vec<_> = (0..4).map(|number| TopicPartition::new(name.clone(), number)).collect();
    ensure!(within("watermarks", admin.all_watermarks(partitions)).await?? == [(0, 0); 4], "the new partitions are empty");
    Ok(())
}

/// What is made again under the name of a deleted topic is another topic: no record, no offset of a group is left.
pub(super) async fn a_deleted_topic_leaves_nothing(broker: Arc<dyn Broker>) -> Result<()> {
    let (name, kept) = (topic(&broker, "gone", 2).await?, topic(&broker, "kept", 1).await?);
    let admin = broker.admin();
    produce(&broker, (0..10).map(|index| to(&name, index % 2, record(None, "old"))).collect()).await?;
    produce(&broker, vec![to(&kept, 0, record(None, "kept"))]).await?;
    let partition = TopicPartition::new(name.clone(), 0);
    let group = fresh("group");
    let commit = Commit { partition: partition.clone(), offset: 3, metadata: String::new() };
    within("commit", admin.commit_for(&group, vec![commit])).await??;
    let groups = within("groups", admin.groups()).await??;
    ensure!(groups.iter().any(|known| known.name == group && known.members == 0), "{groups:?}");
    let missing = within("deletion", admin.delete_topics(vec![fresh("none")])).await?;
    ensure!(missing.as_ref().is_err_and(|error| error.kind == BrokerErrorKind::UnknownTopic), "{missing:?}");
    within("deletion", admin.delete_topics(vec![name.to_string()])).await??;
    let topics = within("answer to topics", admin.topics()).await??;
    ensure!(!topics.contains_key(&*name) && topics.contains_key(&*kept), "{topics:?}");
    let new = NewTopic { name: name.to_string(), partitions: Some(1), replication: Some(1), ..NewTopic::default() };
    within("answer to create_topics", admin.create_topics(vec![new])).await??;
    ensure!(within("answer to learn_topic", broker.producer().learn_topic(&name, PATIENCE)).await?.is_ok_and(|count| count == 1));
    ensure!(within("watermarks", admin.watermarks(&partition)).await?? == (0, 0), "it begins anew");
    let committed = within("committed", admin.committed(&group, vec![partition.clone()])).await??;
    ensure!(committed == [None], "{committed:?}");
    produce(&broker, vec![to(&name, 0, record(None, "new"))]).await?;
    let mut reader = Reader::start(&broker, config(None, &[&name], StartOffset::Earliest), 1).await?;
    let read = reader.read(1).await?;
    ensure!(read[0].0.offset == 0 && value(&read[0].1) == "new", "{read:?}");
    reader.close().await
}
