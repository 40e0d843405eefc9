//! Cases of a single consumer: where it begins, what it reads, what it commits.

use super::*;

pub(super) async fn starts(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "start", 1).await?;
    let partition = TopicPartition::new(topic.clone(), 0);
    let base = now_ms() - 3_600_000;
    for index in 0..10 {
        let record = Record { timestamp_ms: Some(base + index * 1000), ..record(None, "v") };
        produce(&broker, vec![to(&topic, 0, record)]).await?;
    }
    let each = |number, offset| StartOffset::Each(Arc::new([(TopicPartition::new(topic.clone(), number), offset)].into()));
    for (start, should) in [
        (StartOffset::Earliest, 0),
        (StartOffset::Latest, 10),
        (StartOffset::At(base + 3500), 4),
        (StartOffset::At(now_ms() + 1), 10),
        (each(0, 6), 6),
        (each(0, 10), 10),
        // Beyond the end, and a partition that is not named: all of it is new.
        (each(0, 11), 0),
        (each(1, 3), 0),
    ] {
        let group = fresh("start");
        let reader = Reader::start(&broker, config(Some(&group), &[&topic], start.clone()), 1).await?;
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

pub(super) async fn a_topic_that_comes_later(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn a_reader_without_a_group(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn a_reader_of_chosen_partitions(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "chosen", 3).await?;
    produce(&broker, (0..30).map(|index| to(&topic, index % 3, record(None, &(index / 3).to_string()))).collect()).await?;
    let mut reader = Reader { consumer: broker.consumer(config(None, &[], StartOffset::Earliest))?, assigned: Vec::new() };
    let name = |number| TopicPartition::new(topic.clone(), number);
    let offsets = |read: &[(Position, Record)], number: i32| -> Vec<i64> {
        read.iter().filter(|(position, _)| position.partition.partition == number).map(|(position, _)| position.offset).collect()
    };
    reader.consumer.assign(vec![(name(0), 4), (name(1), 8)]);
    let read = reader.read(8).await?;
    ensure!(offsets(&read, 0) == [4, 5, 6, 7, 8, 9] && offsets(&read, 1) == [8, 9], "{:?}", read.iter().map(|r| &r.0).collect::<Vec<_>>());
    // Anew, from another place, while the others go on; an end is no end.
    reader.consumer.assign(vec![(name(0), 9), (name(2), 10)]);
    produce(&broker, (0..3).map(|number| to(&topic, number, record(None, "new"))).collect()).await?;
    let read = reader.read(4).await?;
    ensure!(offsets(&read, 0) == [9, 10] && offsets(&read, 1) == [10] && offsets(&read, 2) == [10]);
    // No more of one; back and forth between polls.
    reader.consumer.unassign(&[name(0), name(1)]);
    reader.consumer.assign(vec![(name(1), 0)]);
    reader.consumer.unassign(&[name(1)]);
    reader.consumer.assign(vec![(name(1), 9)]);
    produce(&broker, (0..3).map(|number| to(&topic, number, record(None, "newer"))).collect()).await?;
    let read = reader.read(4).await?;
    ensure!(offsets(&read, 0).is_empty() && offsets(&read, 1) == [9, 10, 11] && offsets(&read, 2) == [11]);
    // Held ones stay held until they are assigned anew.
    reader.consumer.hold(&name(2));
    reader.consumer.assign(vec![(name(2), 0)]);
    ensure!(offsets(&reader.read(12).await?, 2).len() == 12);
    ensure!(reader.assigned.is_empty(), "an assignment was told that the reader chose itself");
    reader.close().await
}

pub(super) async fn next_may_be_dropped(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn hold_and_release(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn commits_are_seen(broker: Arc<dyn Broker>) -> Result<()> {
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

/// A consumer that turns while records are on their way: nothing of the old place comes after the call, nothing of the new one is missing.
pub(super) async fn seeks_go_back_and_forth(broker: Arc<dyn Broker>) -> Result<()> {
    const COUNT: i64 = 3000;
    let topic = topic(&broker, "seek", 2).await?;
    let group = fresh("seek");
    let value = "v".repeat(300);
    produce(&broker, (0..2 * COUNT).map(|index| to(&topic, (index % 2) as i32, record(None, &value))).collect()).await?;
    let mut reader = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 2).await?;
    let (turned, other) = (TopicPartition::new(topic.clone(), 0), TopicPartition::new(topic.clone(), 1));
    let (mut next, mut next_of_other) = (0, 0);
    for target in [0, COUNT - 10, 5, COUNT / 2, 1, 2] {
        // In the middle of the reading, and held for a while. The other partition may be at its end by now, and with it nothing is due.
        for _ in 0..3 {
            if next < COUNT || next_of_other < COUNT {
                follow(&mut reader, &turned, &mut next, &mut next_of_other).await?;
            }
        }
        reader.consumer.hold(&turned);
        reader.consumer.seek(&turned, target);
        reader.consumer.release(&turned);
        next = target;
    }
    while next < COUNT || next_of_other < COUNT {
        follow(&mut reader, &turned, &mut next, &mut next_of_other).await?;
    }
    // From the end, where nothing is fetched; and to the end.
    reader.consumer.seek(&turned, COUNT - 1);
    reader.consumer.seek(&TopicPartition::new(fresh("none"), 0), 0);
    let (position, _) = reader.read(1).await?.remove(0);
    ensure!(position.partition == turned && position.offset == COUNT - 1, "{position}");
    reader.consumer.seek(&turned, 0);
    reader.consumer.seek(&turned, COUNT);
    produce(&broker, vec![to(&topic, 0, record(None, "new")), to(&topic, 1, record(None, "new"))]).await?;
    let mut read: Vec<_> = reader.read(2).await?.into_iter().map(|(position, _)| position).collect();
    read.sort_by_key(|position| position.partition.partition);
    ensure!(read[0].offset == COUNT && read[1].partition == other && read[1].offset == COUNT, "{read:?}");
    // Turning commits nothing.
    let committed = within("committed offsets", broker.admin().committed(&group, vec![turned])).await??;
    ensure!(committed.first().and_then(Option::as_ref).is_none_or(|commit| commit.offset == 0), "{committed:?}");
    reader.close().await
}

/// Reads a batch, and checks that it follows what came before.
async fn follow(reader: &mut Reader, turned: &TopicPartition, next: &mut i64, next_of_other: &mut i64) -> Result<()> {
    let due = || format!("{turned} is due at {next}, the other partition at {next_of_other}");
    let Event::Records(batch) = reader.event("records").await.with_context(due)? else { return Ok(()) };
    let should = if batch.partition == *turned { next } else { next_of_other };
    for (offset, _) in batch.records {
        ensure!(offset == *should, "{}/{offset} comes where {should} is due", batch.partition);
        *should += 1;
    }
    Ok(())
}

pub(super) async fn only_an_empty_group_is_committed_for(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "for", 1).await?;
    let partition = TopicPartition::new(topic.clone(), 0);
    let group = fresh("for");
    produce(&broker, (0..10).map(|_| to(&topic, 0, record(None, "v"))).collect()).await?;
    let at = |offset| vec![Commit { partition: partition.clone(), offset, metadata: String::new() }];
    within("commit", broker.admin().commit_for(&group, at(4))).await?.context("a group that nobody knows")?;
    let reader = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 1).await?;
    ensure!(reader.position(&partition) == Some(4), "{:?}", reader.assigned);
    let refused = within("commit", broker.admin().commit_for(&group, at(1))).await?;
    ensure!(refused.as_ref().is_err_and(|error| error.kind == BrokerErrorKind::Fenced), "a group with a member: {refused:?}");
    within("commit", reader.consumer.commit(at(6))).await??;
    reader.close().await?;
    let committed = within("committed offsets", broker.admin().committed(&group, vec![partition.clone()])).await??;
    ensure!(committed.first().and_then(Option::as_ref).map(|commit| commit.offset) == Some(6), "{committed:?}");
    // The member is gone when the broker says so, a moment later.
    within("commit for the empty group", async {
        while let Err(error) = broker.admin().commit_for(&group, at(2)).await {
            ensure!(error.kind == BrokerErrorKind::Fenced, "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    })
    .await??;
    let reader = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 1).await?;
    ensure!(reader.position(&partition) == Some(2), "{:?}", reader.assigned);
    reader.close().await
}

pub(super) async fn a_group_resumes_after_reopening(broker: Arc<dyn Broker>, make: Make<'_>) -> Result<()> {
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
