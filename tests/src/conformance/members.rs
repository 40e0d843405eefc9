//! Cases of several members of a group: shares, hand-overs, fences.

use super::*;

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

pub(super) async fn members_share_and_hand_over(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn a_late_commit_is_fenced(broker: Arc<dyn Broker>) -> Result<()> {
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

pub(super) async fn a_silent_member_loses_its_partitions(broker: Arc<dyn Broker>) -> Result<()> {
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

/// So a route hands over its retry topics, which its group does not read, together with their source.
pub(super) async fn commits_of_other_topics_go_with_a_hand_over(broker: Arc<dyn Broker>) -> Result<()> {
    let topic = topic(&broker, "handed", 2).await?;
    let retries = self::topic(&broker, "handed-retries", 2).await?;
    let group = fresh("handed");
    let mut first = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 2).await?;
    let second = tokio::spawn(async move {
        let second = Reader::start(&broker, config(Some(&group), &[&topic], StartOffset::Earliest), 1).await?;
        Ok::<_, anyhow::Error>((broker, group, second))
    });
    loop {
        if let Event::Revoking(revoking) = first.event("revocation").await? {
            let partitions = (0..2).map(|number| TopicPartition::new(retries.clone(), number));
            let commits = partitions.map(|partition| Commit { partition, offset: 7, metadata: "m".to_owned() });
            ensure!(revoking.done.send(commits.collect()).is_ok(), "nobody waits for the last commits");
            break;
        }
    }
    // The other one is assigned only after the hand-over.
    let joined = async {
        loop {
            first.event("nothing").await?;
        }
    };
    let (broker, group, second) = tokio::select! {
        joined = within("assignment of the second", second) => joined???,
        failed = joined => return failed,
    };
    for number in 0..2 {
        let partition = TopicPartition::new(retries.clone(), number);
        let committed = within("committed offsets", broker.admin().committed(&group, vec![partition.clone()])).await??;
        let offset = committed.first().and_then(Option::as_ref).map(|commit| commit.offset);
        ensure!(offset == Some(7), "{partition} is committed at {offset:?}");
    }
    second.close().await?;
    first.close().await
}
