//! Cases of transactions: records and offsets together, aborts, fences.

use super::*;

/// A member of a group that makes transactions.
fn transactional(group: &str, id: &str, topic: &Arc<str>) -> ConsumerConfig {
    ConsumerConfig { transactional_id: Some(id.to_owned()), ..config(Some(group), &[topic], StartOffset::Earliest) }
}

fn at(topic: &Arc<str>, partition: i32, offset: i64, metadata: &str) -> Commit {
    Commit { partition: TopicPartition::new(topic.clone(), partition), offset, metadata: metadata.to_owned() }
}

fn transact(
    reader: &Reader,
    records: Vec<Outgoing>,
    offsets: Vec<Commit>,
) -> impl Future<Output = Result<Result<(), TransactionError>>> + Send + 'static {
    let transaction = reader.consumer.transact(records, offsets);
    async move { within("end of a transaction", transaction).await }
}

/// What a reader of its own sees of the topic, up to a record `end` that is published now.
async fn seen(broker: &Arc<dyn Broker>, topic: &Arc<str>) -> Result<Vec<String>> {
    produce(broker, vec![to(topic, 0, record(None, "end"))]).await?;
    let mut reader = Reader::start(broker, config(None, &[topic], StartOffset::Earliest), 1).await?;
    let mut values = Vec::new();
    while values.last().is_none_or(|last| last != "end") {
        if let Event::Records(batch) = reader.event("record").await? {
            values.extend(batch.records.iter().map(|(_, record)| value(record)));
        }
    }
    reader.close().await?;
    values.pop();
    Ok(values)
}

async fn committed(broker: &Arc<dyn Broker>, group: &str, topic: &Arc<str>, partition: i32) -> Result<Option<Commit>> {
    let asked = vec![TopicPartition::new(topic.clone(), partition)];
    Ok(within("committed offsets", broker.admin().committed(group, asked)).await??.remove(0))
}

pub(super) async fn records_and_offsets_are_stored_together(broker: Arc<dyn Broker>) -> Result<()> {
    let (source, sink) = (topic(&broker, "txn-in", 2).await?, topic(&broker, "txn-out", 1).await?);
    let group = fresh("txn");
    produce(&broker, (0..20).map(|index| to(&source, index % 2, record(None, "v"))).collect()).await?;
    let mut reader = Reader::start(&broker, transactional(&group, &group, &source), 2).await?;
    reader.read(20).await?;
    let mut should = Vec::new();
    for round in 1..=5 {
        let values: Vec<String> = (0..100).map(|index| format!("{round}-{index}")).collect();
        let records = values.iter().map(|value| to(&sink, 0, record(Some("k"), value))).collect();
        transact(&reader, records, vec![at(&source, 0, round, "map"), at(&source, 1, round + 1, "")]).await??;
        should.extend(values);
        ensure!(committed(&broker, &group, &source, 0).await? == Some(at(&source, 0, round, "map")));
        ensure!(committed(&broker, &group, &source, 1).await? == Some(at(&source, 1, round + 1, "")));
    }
    // Offsets alone, and a plain commit in between.
    transact(&reader, Vec::new(), vec![at(&source, 0, 7, "")]).await??;
    within("commit", reader.consumer.commit(vec![at(&source, 0, 8, "")])).await??;
    transact(&reader, vec![to(&sink, 0, record(None, "last"))], vec![at(&source, 0, 9, "")]).await??;
    should.push("last".to_owned());
    ensure!(committed(&broker, &group, &source, 0).await? == Some(at(&source, 0, 9, "")));
    let seen = seen(&broker, &sink).await?;
    ensure!(seen == should, "{} records instead of {}: {seen:?}", seen.len(), should.len());
    reader.close().await
}

pub(super) async fn an_aborted_transaction_leaves_nothing(broker: Arc<dyn Broker>) -> Result<()> {
    let (source, sink) = (topic(&broker, "abort-in", 1).await?, topic(&broker, "abort-out", 1).await?);
    let group = fresh("abort");
    let reader = Reader::start(&broker, transactional(&group, &group, &source), 1).await?;
    transact(&reader, vec![to(&sink, 0, record(None, "before"))], vec![at(&source, 0, 1, "")]).await??;
    let large = "x".repeat(8 << 20);
    let records = ["a", &large, "b", &large].map(|value| to(&sink, 0, record(None, value)));
    match transact(&reader, records.to_vec(), vec![at(&source, 0, 2, "")]).await? {
        Err(TransactionError::Refused(refused)) => {
            let found: Vec<_> = refused.iter().map(|(index, error)| (*index, error.kind)).collect();
            ensure!(found == [(1, ProduceErrorKind::TooLarge), (3, ProduceErrorKind::TooLarge)], "{found:?}");
        }
        other => bail!("a transaction with two records that are too large: {other:?}"),
    }
    ensure!(committed(&broker, &group, &source, 0).await? == Some(at(&source, 0, 1, "")));
    // The next one is none the worse for it.
    transact(&reader, vec![to(&sink, 0, record(None, "after"))], vec![at(&source, 0, 3, "")]).await??;
    let seen = seen(&broker, &sink).await?;
    ensure!(seen == ["before", "after"], "{seen:?}");
    ensure!(committed(&broker, &group, &source, 0).await? == Some(at(&source, 0, 3, "")));
    reader.close().await
}

/// The topic takes less than the client lets pass: a broker that refuses a batch as a whole must not have the others believed refused.
pub(super) async fn a_refused_record_is_found(broker: Arc<dyn Broker>) -> Result<()> {
    let source = topic(&broker, "small-in", 1).await?;
    let sink: Arc<str> = fresh("small-out").into();
    let limit = BTreeMap::from([("max.message.bytes".to_owned(), "2000".to_owned())]);
    let new = NewTopic { name: sink.to_string(), partitions: Some(1), replication: Some(1), config: limit };
    within("answer to create_topics", broker.admin().create_topics(vec![new])).await??;
    let group = fresh("small");
    let reader = Reader::start(&broker, transactional(&group, &group, &source), 1).await?;
    let large = "x".repeat(5_000);
    let mut left: Vec<String> = ["a", "b", "c", &large, "d", "e"].map(str::to_owned).to_vec();
    let (mut size, mut refused, mut aborted) = (left.len(), 0, 0);
    while !left.is_empty() {
        let records = left.iter().take(size).map(|value| to(&sink, 0, record(None, value))).collect();
        match transact(&reader, records, vec![at(&source, 0, 1, "")]).await? {
            Ok(()) => drop(left.drain(..size.min(left.len()))),
            Err(TransactionError::Split(_)) if size > 1 => size = size.div_ceil(2),
            Err(TransactionError::Refused(found)) => {
                ensure!(found.len() == 1 && found[0].1.kind == ProduceErrorKind::TooLarge, "{found:?}");
                ensure!(left.remove(found[0].0) == large, "a record that fits was refused");
                refused += 1;
            }
            // The client may still be clearing up.
            Err(TransactionError::Aborted(error)) if aborted < 20 => {
                println!("aborted: {error}");
                aborted += 1;
            }
            other => bail!("{size} of {} records: {other:?}", left.len()),
        }
    }
    ensure!(refused == 1);
    let seen = seen(&broker, &sink).await?;
    ensure!(seen == ["a", "b", "c", "d", "e"], "{seen:?}");
    reader.close().await
}

pub(super) async fn whoever_takes_the_identity_fences_the_holder(broker: Arc<dyn Broker>) -> Result<()> {
    let (source, sink) = (topic(&broker, "fence-in", 1).await?, topic(&broker, "fence-out", 1).await?);
    let (group, other, id) = (fresh("fence"), fresh("fence-other"), fresh("identity"));
    let old = Reader::start(&broker, transactional(&group, &id, &source), 1).await?;
    transact(&old, vec![to(&sink, 0, record(None, "old"))], vec![at(&source, 0, 1, "")]).await??;
    let new = Reader::start(&broker, transactional(&other, &id, &source), 1).await?;
    transact(&new, vec![to(&sink, 0, record(None, "new"))], vec![at(&source, 0, 1, "")]).await??;
    match transact(&old, vec![to(&sink, 0, record(None, "late"))], vec![at(&source, 0, 2, "")]).await? {
        Err(TransactionError::Fenced(error) | TransactionError::Lost(error)) => {
            ensure!(error.kind == BrokerErrorKind::Fenced, "{error:?}");
        }
        late => bail!("the transaction of a fenced holder: {late:?}"),
    }
    old.close().await?;
    ensure!(committed(&broker, &group, &source, 0).await? == Some(at(&source, 0, 1, "")));
    let seen = seen(&broker, &sink).await?;
    ensure!(seen == ["old", "new"], "{seen:?}");
    new.close().await
}

pub(super) async fn an_offset_of_anothers_partition_is_refused(broker: Arc<dyn Broker>) -> Result<()> {
    let (source, sink) = (topic(&broker, "theirs-in", 2).await?, topic(&broker, "theirs-out", 1).await?);
    let group = fresh("theirs");
    let mut first = Reader::start(&broker, transactional(&group, &fresh("first"), &source), 2).await?;
    let mut second = Reader { consumer: broker.consumer(transactional(&group, &fresh("second"), &source))?, assigned: Vec::new() };
    while second.assigned.is_empty() {
        tokio::select! {
            event = first.event("revocation") => if let Event::Revoking(revoking) = event? {
                drop(revoking.done.send(Vec::new()));
            },
            event = second.event("assignment") => drop(event?),
        }
    }
    // Both are members, and both show current metadata.
    let theirs = second.assigned[0].partition.partition;
    match transact(&first, vec![to(&sink, 0, record(None, "stolen"))], vec![at(&source, theirs, 5, "")]).await? {
        Err(TransactionError::Fenced(_)) => {}
        other => bail!("an offset of another member's partition: {other:?}"),
    }
    transact(&second, vec![to(&sink, 0, record(None, "own"))], vec![at(&source, theirs, 6, "")]).await??;
    ensure!(committed(&broker, &group, &source, theirs).await? == Some(at(&source, theirs, 6, "")));
    // The group has rebalanced since the first one joined, and its own partition is still its own.
    transact(&first, vec![to(&sink, 0, record(None, "kept"))], vec![at(&source, 1 - theirs, 7, "")]).await??;
    let seen = seen(&broker, &sink).await?;
    ensure!(seen == ["own", "kept"], "{seen:?}");
    first.close().await?;
    second.close().await
}
