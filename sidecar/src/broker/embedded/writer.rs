//! The writer: one OS thread that makes everything durable. It takes all jobs that wait, writes them in one transaction, and after the
//! commit wakes readers and acknowledges.
//!
//! Invariant: nothing is acknowledged or visible before its transaction is committed.
//! Invariant: a failed transaction fails every record in it and leaves the log as it was; the next one is tried afresh.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::sync::oneshot;

use super::{
    Shared,
    checkpoint::LogSize,
    codec::Encoder,
    group::Group,
    housekeeping::Housekeeper,
    inbox::{Gain, Inbox, Notice, Resolved},
    log::{Partition, Row, Topic},
    names,
    partitioner::partition_of,
    queue::{Job, Results, Taken, Transaction},
    store::{NewRow, Store, WriteError},
};
use crate::{
    broker::{
        BrokerError, BrokerErrorKind, Commit, NewTopic, Outgoing, ProduceError, ProduceErrorKind, StartOffset, TopicChange,
        TransactionError,
    },
    mutation::{self, Mutation},
    record::{Position, TopicPartition},
};

/// Bytes of records in one transaction, about.
const TRANSACTION_BYTES: usize = 8 << 20;
/// A row is closed at this many records …
pub(super) const ROW_RECORDS: usize = 512;
/// … or bytes.
pub(super) const ROW_BYTES: usize = 256 << 10;
/// Records without a key stay at a partition for this many bytes, or to the end of their batch.
const STICKY_BYTES: usize = 16 << 10;
/// What a store must take to count as working again, after it failed.
const PROBE_BYTES: u32 = 256 << 10;
/// What a step of housekeeping writes into the log, about.
const STEP_BYTES: usize = 1 << 20;
/// What a transaction writes into the log for each of its rows, besides the row, about.
const ROW_OVERHEAD: usize = 12 << 10;
/// How long after a failure the store is tried again without a job that asks for it.
const RETRY: Duration = Duration::from_secs(1);

/// The writer's own state.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    pub(super) store: Store,
    /// Rows of all hot tails in the order of their append, with their bytes.
    tails: VecDeque<(Arc<Partition>, i64, usize)>,
    tail_bytes: usize,
    housekeeper: Housekeeper,
    log_size: LogSize,
    sticky: i32,
}

/// What is appended to one partition in one transaction.
#[derive(Debug)]
struct Growth {
    partition: Arc<Partition>,
    base: i64,
    next: i64,
    newest_ms: i64,
    encoder: Encoder,
    rows: Vec<NewRow>,
}

impl Growth {
    fn new(partition: Arc<Partition>) -> Self {
        let (_, high) = partition.watermarks();
        let newest_ms = partition.newest_ms();
        Self { partition, base: high, next: high, newest_ms, encoder: Encoder::new(), rows: Vec::new() }
    }

    fn close_row(&mut self) {
        if self.encoder.count() > 0 {
            let row = Row { base: self.base, end: self.next, data: self.encoder.finish() };
            self.base = self.next;
            self.rows.push(NewRow { row, upto_ms: self.newest_ms });
        }
    }
}

type Committed = Result<(), BrokerError>;

/// Start positions that are asked for.
#[derive(Debug)]
struct Resolve {
    group: Option<Arc<Group>>,
    gains: Vec<Gain>,
    start: StartOffset,
    inbox: Arc<Inbox>,
}

/// Everything of one transaction.
#[derive(Debug, Default)]
struct Plan {
    growth: Vec<Growth>,
    by_partition: HashMap<i64, usize>,
    offsets: Vec<(Arc<str>, i64, i64, String)>,
    appended: Vec<(oneshot::Sender<Results>, Results)>,
    committed: Vec<(oneshot::Sender<Committed>, Committed)>,
    transacted: Vec<oneshot::Sender<Result<(), TransactionError>>>,
    resolve: Vec<Resolve>,
}

impl Plan {
    fn growth(&mut self, partition: &Arc<Partition>) -> &mut Growth {
        let index = *self.by_partition.entry(partition.id).or_insert_with(|| {
            self.growth.push(Growth::new(partition.clone()));
            self.growth.len() - 1
        });
        &mut self.growth[index]
    }

    fn high(&self, partition: &Partition) -> i64 {
        self.by_partition.get(&partition.id).map_or_else(|| partition.watermarks().1, |index| self.growth[*index].next)
    }
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, store: Store) -> Self {
        let housekeeper = Housekeeper::new(&shared.config);
        Self { shared, store, tails: VecDeque::new(), tail_bytes: 0, housekeeper, log_size: LogSize::default(), sticky: 0 }
    }

    /// The thread's loop: until the queue is closed and empty; then the checkpoint.
    pub(super) fn run(mut self) -> Result<(), BrokerError> {
        let shared = self.shared.clone();
        loop {
            let wait = if self.housekeeper.busy() {
                Duration::ZERO
            } else if shared.is_failing() {
                RETRY
            } else {
                shared.config.housekeeping
            };
            match shared.queue.take(wait, TRANSACTION_BYTES) {
                Taken::Jobs(jobs) => self.execute(jobs),
                Taken::Idle => self.idle(),
                Taken::Closed => return self.store.checkpoint(),
            }
        }
    }

    /// Runs what is queued, on the caller's thread: the mode without a thread.
    pub(super) fn run_queued(&mut self) {
        let shared = self.shared.clone();
        while let Taken::Jobs(jobs) = shared.queue.take(Duration::ZERO, TRANSACTION_BYTES) {
            self.execute(jobs);
        }
    }

    fn idle(&mut self) {
        if self.shared.is_failing() && !self.housekeeper.busy() {
            self.housekeeper.due_now();
            match self.store.probe(PROBE_BYTES) {
                Ok(()) => self.shared.recovered(),
                Err(failure) => self.shared.failed(&failure.error),
            }
        }
        self.housekeeping();
    }

    fn housekeeping(&mut self) {
        if !self.housekeeper.due((self.shared.config.clock)()) {
            return;
        }
        let now = (self.shared.config.clock)();
        if let Err(error) = self.housekeeper.step(&self.store, &self.shared.catalog, now) {
            self.shared.failed(&error);
        }
        self.log_size.grew(STEP_BYTES, &self.store, &self.shared.checkpoints);
    }

    fn execute(&mut self, jobs: Vec<Job>) {
        let now = (self.shared.config.clock)();
        let mut plan = Plan::default();
        for job in jobs {
            match job {
                Job::Append { records, reply, .. } => {
                    let results = self.plan_append(&mut plan, records, now);
                    plan.appended.push((reply, results));
                }
                Job::Commit { group, member, offsets, reply } => {
                    let result = self.plan_commit(&mut plan, &group, member, offsets);
                    plan.committed.push((reply, result));
                }
                Job::Transact { transaction, reply, .. } => match self.plan_transaction(&mut plan, transaction, now) {
                    Ok(()) => plan.transacted.push(reply),
                    // Whoever dropped its receiver does not want to know.
                    Err(error) => drop(reply.send(Err(error))),
                },
                Job::CommitFor { group, offsets, reply } => {
                    let result = self.plan_commit_for(&mut plan, &group, offsets);
                    plan.committed.push((reply, result));
                }
                // Nobody may wait any more.
                Job::DeleteRecords { below, reply } => drop(reply.send(self.delete_records(below))),
                Job::Resolve { group, gains, start, inbox } => plan.resolve.push(Resolve { group, gains, start, inbox }),
                Job::CreateTopics { topics, reply } => {
                    // Nobody may wait any more.
                    let _ = reply.send(self.create_topics(topics));
                }
                Job::AlterTopic { topic, change, reply } => drop(reply.send(self.alter_topic(&topic, change))),
                Job::DeleteTopics { topics, reply } => drop(reply.send(topics.iter().try_for_each(|topic| self.delete_topic(topic)))),
            }
        }
        for growth in &mut plan.growth {
            growth.close_row();
        }
        self.write(plan, now);
        if self.housekeeper.due(now) {
            self.housekeeping();
        }
    }

    fn write(&mut self, mut plan: Plan, now: i64) {
        if mutation::is(Mutation::AckBeforeFsync) {
            plan.appended.drain(..).for_each(|(reply, results)| drop(reply.send(results)));
        }
        let written = if plan.growth.is_empty() && plan.offsets.is_empty() && plan.resolve.is_empty() {
            Ok(Vec::new())
        } else {
            self.store.transaction(|store| {
                for growth in &plan.growth {
                    store.insert(growth.partition.id, &growth.rows, now)?;
                }
                for (group, partition, offset, metadata) in &plan.offsets {
                    store.set_offset(group, *partition, *offset, metadata)?;
                }
                let resolve = |wanted: &Resolve| {
                    let Resolve { group, gains, start, .. } = wanted;
                    gains.iter().map(|gain| resolve(store, &plan, group.as_deref(), gain, start)).collect()
                };
                plan.resolve.iter().map(resolve).collect::<rusqlite::Result<Vec<Vec<Resolved>>>>()
            })
        };
        match written {
            Ok(resolved) => {
                let wrote = !plan.growth.is_empty() || !plan.offsets.is_empty();
                let rows = plan.growth.iter().flat_map(|growth| &growth.rows);
                let logged: usize = rows.map(|new| new.row.data.len() + ROW_OVERHEAD).sum();
                let logged = logged + (plan.offsets.len() + plan.resolve.len()) * ROW_OVERHEAD;
                for growth in std::mem::take(&mut plan.growth) {
                    self.publish(growth);
                }
                for (Resolve { inbox, .. }, resolved) in plan.resolve.into_iter().zip(resolved) {
                    inbox.push(Notice::Resolved(Ok(resolved)));
                }
                // Whoever dropped its receiver does not want to know.
                plan.appended.into_iter().for_each(|(reply, results)| drop(reply.send(results)));
                plan.committed.into_iter().for_each(|(reply, result)| drop(reply.send(result)));
                plan.transacted.into_iter().for_each(|reply| drop(reply.send(Ok(()))));
                if wrote && self.shared.is_failing() {
                    self.shared.recovered();
                }
                // Last, so that nobody who was acknowledged waits for it.
                self.log_size.grew(logged, &self.store, &self.shared.checkpoints);
            }
            Err(failure) => {
                self.shared.failed(&failure.error);
                fail(plan, &failure);
            }
        }
    }

    fn publish(&mut self, growth: Growth) {
        let Growth { partition, rows, newest_ms, .. } = growth;
        for NewRow { row, .. } in &rows {
            self.tail_bytes += row.data.len();
            self.tails.push_back((partition.clone(), row.base, row.data.len()));
        }
        partition.publish(rows.into_iter().map(|new| new.row), newest_ms);
        while self.tail_bytes > self.shared.config.tail_bytes {
            let Some((partition, base, bytes)) = self.tails.pop_front() else { break };
            partition.evict(base);
            self.tail_bytes -= bytes;
        }
    }

    fn plan_append(&mut self, plan: &mut Plan, records: Vec<Outgoing>, now: i64) -> Results {
        self.sticky = self.sticky.wrapping_add(1) & i32::MAX;
        let mut stuck = 0;
        let mut results = Vec::with_capacity(records.len());
        let mut last: Option<Arc<Topic>> = None;
        for outgoing in records {
            let topic = match last.take().filter(|topic| topic.name == outgoing.topic) {
                Some(topic) => Ok(topic),
                None => self.topic(&outgoing.topic),
            };
            let topic = match topic {
                Ok(topic) => topic,
                Err(error) => {
                    results.push(Err(error));
                    continue;
                }
            };
            results.push(self.plan_record(plan, &topic, outgoing, now, &mut stuck));
            last = Some(topic);
        }
        results
    }

    fn plan_record(
        &mut self,
        plan: &mut Plan,
        topic: &Topic,
        outgoing: Outgoing,
        now: i64,
        stuck: &mut usize,
    ) -> Result<Position, ProduceError> {
        self.check_record(topic, &outgoing)?;
        let Outgoing { partition, record, .. } = outgoing;
        let size = stored_size(&record);
        let count = topic.count();
        let number = match (partition, &record.key) {
            (Some(number), _) => number,
            (None, Some(key)) => partition_of(key, count),
            (None, None) => {
                *stuck += size;
                if *stuck > STICKY_BYTES {
                    *stuck = size;
                    self.sticky = self.sticky.wrapping_add(1) & i32::MAX;
                }
                self.sticky % count.max(1)
            }
        };
        let partition = topic.partition(number).ok_or_else(|| no_partition(topic, number))?;
        let growth = plan.growth(partition);
        if growth.encoder.count() > 0 && growth.encoder.len() + size > ROW_BYTES {
            growth.close_row();
        }
        let timestamp = record.timestamp_ms.unwrap_or(now);
        growth.newest_ms = growth.newest_ms.max(timestamp);
        growth.encoder.push(&record, timestamp);
        let offset = growth.next;
        growth.next += 1;
        if growth.encoder.count() >= ROW_RECORDS {
            growth.close_row();
        }
        Ok(Position { partition: partition.name.clone(), offset })
    }

    /// Whether the topic takes the record.
    fn check_record(&self, topic: &Topic, outgoing: &Outgoing) -> Result<(), ProduceError> {
        let error = |kind, detail| Err(ProduceError { kind, detail });
        let size = stored_size(&outgoing.record);
        let limit = topic.settings.max_record.unwrap_or(self.shared.config.max_record_bytes);
        if size > limit {
            return error(
                ProduceErrorKind::TooLarge,
                format!("topic '{}': the record has {size} bytes; the embedded broker takes {limit} at most", topic.name),
            );
        }
        if topic.settings.compact && outgoing.record.key.is_none() {
            return error(
                ProduceErrorKind::Refused,
                format!("topic '{}' is compacted, so a record needs a key, and this one has none", topic.name),
            );
        }
        match outgoing.partition {
            Some(number) if topic.partition(number).is_none() => Err(no_partition(topic, number)),
            _ => Ok(()),
        }
    }

    /// Takes a transaction into the plan: all of it, or nothing.
    fn plan_transaction(&mut self, plan: &mut Plan, transaction: Transaction, now: i64) -> Result<(), TransactionError> {
        let Transaction { group, member, identity, records, offsets } = transaction;
        if !self.shared.identities.holds(&identity, member) {
            let detail = format!("transactions of '{identity}': another consumer took the identity, or this one is closed");
            return Err(TransactionError::Fenced(BrokerError::new(BrokerErrorKind::Fenced, detail)));
        }
        let mut refused = Vec::new();
        for (index, outgoing) in records.iter().enumerate() {
            match self.topic(&outgoing.topic).and_then(|topic| self.check_record(&topic, outgoing)) {
                Ok(()) => {}
                Err(error) if matches!(error.kind, ProduceErrorKind::Unavailable | ProduceErrorKind::UnknownTopic) => {
                    return Err(TransactionError::Aborted(BrokerError::new(BrokerErrorKind::Storage, error.detail)));
                }
                Err(error) => refused.push((index, error)),
            }
        }
        if !refused.is_empty() {
            return Err(TransactionError::Refused(refused));
        }
        for (epoch, commit) in &offsets {
            self.check_commit(&group, member, *epoch, commit).map_err(|error| match error.kind {
                BrokerErrorKind::Fenced => TransactionError::Fenced(error),
                _ => TransactionError::Aborted(error),
            })?;
        }
        // From here on nothing can be refused.
        let refused = self.plan_append(plan, records, now).into_iter().filter_map(Result::err).next();
        let committed = self.plan_commit(plan, &group, member, offsets);
        match (refused, committed) {
            (None, Ok(())) => {}
            (refused, committed) => {
                tracing::error!(?refused, ?committed, "a part of a transaction was refused after all of it was checked")
            }
        }
        Ok(())
    }

    /// The topic; created if it does not exist.
    fn topic(&mut self, name: &str) -> Result<Arc<Topic>, ProduceError> {
        if let Some(topic) = self.shared.catalog.get(name) {
            return Ok(topic);
        }
        self.create_topic(&NewTopic { name: name.to_owned(), ..NewTopic::default() }).map_err(|error| ProduceError {
            kind: if error.kind == BrokerErrorKind::Config { ProduceErrorKind::UnknownTopic } else { ProduceErrorKind::Unavailable },
            detail: error.detail,
        })
    }

    fn create_topics(&mut self, topics: Vec<NewTopic>) -> Result<BTreeMap<String, i32>, BrokerError> {
        let mut counts = BTreeMap::new();
        for topic in topics {
            let created = match self.shared.catalog.get(&topic.name) {
                Some(existing) => existing,
                None => self.create_topic(&topic)?,
            };
            counts.insert(topic.name, created.count());
        }
        Ok(counts)
    }

    fn create_topic(&mut self, topic: &NewTopic) -> Result<Arc<Topic>, BrokerError> {
        let config = &self.shared.config;
        let wrong = |detail| BrokerError::new(BrokerErrorKind::Config, detail);
        names::check_topic(&topic.name).map_err(wrong)?;
        let count = topic.partitions.unwrap_or(config.default_partitions);
        names::check_partitions(&topic.name, count).map_err(wrong)?;
        let settings = names::Settings::parse(&topic.name, &topic.config, config.retention_ms()).map_err(wrong)?;
        let ids = self.store.create_topic(&topic.name, count, &topic.config).inspect_err(|error| self.shared.failed(error))?;
        let name: Arc<str> = topic.name.as_str().into();
        let partition = |(id, number)| Arc::new(Partition::new(id, TopicPartition::new(name.clone(), number), 0, 0, i64::MIN));
        let partitions = ids.into_iter().zip(0..).map(partition).collect();
        let created = Arc::new(Topic { name, settings, config: topic.config.clone(), partitions });
        self.shared.catalog.insert(created.clone());
        self.shared.topic_changed(&created.name);
        Ok(created)
    }

    /// Changes a topic: whoever has it in hand keeps it as it was, and finds the new one when it looks again.
    fn alter_topic(&mut self, name: &str, change: TopicChange) -> Result<(), BrokerError> {
        let wrong = |detail| BrokerError::new(BrokerErrorKind::Config, detail);
        let topic = self.existing(name)?;
        let TopicChange { partitions, set, unset } = change;
        let mut config = topic.config.clone();
        config.extend(set);
        config.retain(|name, _| !unset.contains(name));
        let settings = names::Settings::parse(name, &config, self.shared.config.retention_ms()).map_err(wrong)?;
        let count = partitions.unwrap_or(topic.count());
        names::check_partitions(name, count).map_err(wrong)?;
        if count < topic.count() {
            return Err(wrong(format!("topic '{name}' has {} partitions; they can only become more", topic.count())));
        }
        let ids = self.store.alter_topic(name, &config, topic.count(), count).inspect_err(|error| self.shared.failed(error))?;
        let partition = |(id, number)| Arc::new(Partition::new(id, TopicPartition::new(topic.name.clone(), number), 0, 0, i64::MIN));
        let mut partitions = topic.partitions.clone();
        partitions.extend(ids.into_iter().zip(topic.count()..).map(partition));
        self.shared.catalog.insert(Arc::new(Topic { name: topic.name.clone(), settings, config, partitions }));
        self.shared.topic_changed(name);
        Ok(())
    }

    /// Deletes a topic. It is gone at once; the housekeeping removes its records, piece by piece.
    fn delete_topic(&mut self, name: &str) -> Result<(), BrokerError> {
        self.existing(name)?;
        self.store.delete_topic(name).inspect_err(|error| self.shared.failed(error))?;
        self.shared.catalog.remove(name);
        self.shared.topic_changed(name);
        self.housekeeper.doom(self.store.doomed()?);
        Ok(())
    }

    fn existing(&self, name: &str) -> Result<Arc<Topic>, BrokerError> {
        let missing = || BrokerError::new(BrokerErrorKind::UnknownTopic, format!("embedded broker: there is no topic '{name}'"));
        self.shared.catalog.get(name).ok_or_else(missing)
    }

    /// What was deleted before the last end, and is to be removed.
    pub(super) fn take_up(&mut self) -> Result<(), BrokerError> {
        self.housekeeper.doom(self.store.doomed()?);
        Ok(())
    }

    /// Takes the offsets of a group without members into the plan: all of them or none.
    fn plan_commit_for(&mut self, plan: &mut Plan, group: &str, offsets: Vec<Commit>) -> Result<(), BrokerError> {
        let refused = |kind, detail: String| Err(BrokerError::new(kind, format!("commit for group '{group}' refused: {detail}")));
        if self.shared.groups.exists(group) {
            return refused(BrokerErrorKind::Fenced, "it has members, and those alone may commit for it".to_owned());
        }
        let mut found = Vec::with_capacity(offsets.len());
        for Commit { partition, offset, metadata } in offsets {
            let Some(known) = self.shared.catalog.partition(&partition) else {
                return refused(BrokerErrorKind::UnknownTopic, format!("there is no partition {partition}"));
            };
            if offset < 0 || metadata.len() > MAX_METADATA {
                let detail = format!("offset {offset} with {} characters of metadata for {partition}", metadata.len());
                return refused(BrokerErrorKind::Config, detail);
            }
            found.push((group.into(), known.id, offset, metadata));
        }
        plan.offsets.extend(found);
        Ok(())
    }

    /// Deletes the records below offsets, in whole rows; the rest of a row is out of reach.
    fn delete_records(&mut self, below: Vec<(TopicPartition, i64)>) -> Result<(), BrokerError> {
        let mut found = Vec::with_capacity(below.len());
        for (name, offset) in below {
            let known = self.shared.catalog.partition(&name);
            let known = known.ok_or_else(|| BrokerError::new(BrokerErrorKind::UnknownTopic, format!("there is no partition {name}")))?;
            let (low, high) = known.watermarks();
            if offset > high {
                let detail = format!("records of {name} cannot be deleted below {offset}: it ends at {high}");
                return Err(BrokerError::new(BrokerErrorKind::Config, detail));
            }
            if offset > low {
                found.push((known, offset, high));
            }
        }
        for (partition, low, _) in &found {
            partition.raise_low(*low);
        }
        let deleted = self
            .store
            .transaction(|store| found.iter().try_for_each(|(partition, low, high)| store.delete_whole_below(partition.id, *low, *high)));
        deleted.map_err(|failure| failure.error).inspect_err(|error| self.shared.failed(error))
    }

    /// Takes what may be committed into the plan. The rest is refused by name; it does not hold the others up.
    fn plan_commit(&mut self, plan: &mut Plan, group: &Group, member: u64, offsets: Vec<(Option<u64>, Commit)>) -> Result<(), BrokerError> {
        let mut result = Ok(());
        for (epoch, commit) in offsets {
            match self.check_commit(group, member, epoch, &commit) {
                Ok(partition) => plan.offsets.push((group.name.clone(), partition, commit.offset, commit.metadata)),
                // Of several reasons the weightiest is reported.
                Err(error) if result.is_ok() || error.kind == BrokerErrorKind::Fenced => result = Err(error),
                Err(_) => {}
            }
        }
        result
    }

    /// Whether the member may commit this; the partition's number in the store.
    fn check_commit(&self, group: &Group, member: u64, epoch: Option<u64>, commit: &Commit) -> Result<i64, BrokerError> {
        let Commit { partition, offset, metadata } = commit;
        let (kind, detail) = match self.shared.catalog.partition(partition) {
            None => (BrokerErrorKind::UnknownTopic, format!("there is no partition {partition}")),
            Some(_) if !group.may_commit(member, partition, epoch) => {
                (BrokerErrorKind::Fenced, format!("partition {partition} belongs to another member by now, or to none"))
            }
            Some(_) if *offset < 0 => (BrokerErrorKind::Other, format!("offset {offset} of {partition} is below 0")),
            Some(_) if metadata.len() > MAX_METADATA => (
                BrokerErrorKind::Other,
                format!("the metadata for {partition} has {} characters; at most {MAX_METADATA} are allowed", metadata.len()),
            ),
            Some(known) => return Ok(known.id),
        };
        Err(BrokerError::new(kind, format!("commit of group '{}' refused: {detail}", group.name)))
    }
}

fn no_partition(topic: &Topic, number: i32) -> ProduceError {
    let detail = format!("topic '{}' has partitions 0 to {}, there is no partition {number}", topic.name, topic.count() - 1);
    ProduceError { kind: ProduceErrorKind::UnknownPartition, detail }
}

/// The most characters of a commit's metadata, as in Kafka.
const MAX_METADATA: usize = 4096;

/// Where a partition begins; stored for the group if it had no offset.
fn resolve(store: &Store, plan: &Plan, group: Option<&Group>, gain: &Gain, start: &StartOffset) -> rusqlite::Result<Resolved> {
    let id = gain.partition.id;
    let (low, _) = gain.partition.watermarks();
    let high = plan.high(&gain.partition);
    let committed = match group {
        Some(group) => store.offset(&group.name, id)?,
        None => None,
    };
    if let Some((position, metadata)) = committed {
        if position > high {
            let (partition, group) = (&gain.partition.name, group.map_or("", |group| &group.name));
            tracing::warn!(%partition, group, position, high, "the committed offset is beyond the log's end; reading begins at the end");
        }
        return Ok(Resolved { gain: gain.clone(), position: position.min(high), metadata });
    }
    let position = match start {
        StartOffset::Earliest => low,
        StartOffset::Latest => high,
        StartOffset::At(timestamp) => store.offset_at(id, low, high, *timestamp)?,
        StartOffset::Each(starts) => StartOffset::of_each(starts, &gain.partition.name, low, high),
    };
    if let Some(group) = group {
        store.set_offset(&group.name, id, position, "")?;
    }
    Ok(Resolved { gain: gain.clone(), position, metadata: String::new() })
}

fn fail(plan: Plan, failure: &WriteError) {
    let (kind, stored) =
        if failure.maybe_stored { (ProduceErrorKind::TimedOut, "possibly stored") } else { (ProduceErrorKind::Unavailable, "not stored") };
    let error = ProduceError { kind, detail: format!("{}; {stored}", failure.error.detail) };
    for (reply, results) in plan.appended {
        // What was refused on its own keeps its reason.
        drop(reply.send(results.into_iter().map(|result| result.and_then(|_| Err(error.clone()))).collect()));
    }
    for (reply, result) in plan.committed {
        drop(reply.send(result.and(Err(failure.error.clone()))));
    }
    for reply in plan.transacted {
        // Also if it may be stored: the next one overwrites it, and a crash before that finds all of it or nothing.
        drop(reply.send(Err(TransactionError::Aborted(failure.error.clone()))));
    }
    for Resolve { gains, inbox, .. } in plan.resolve {
        inbox.push(Notice::Resolved(Err((failure.error.clone(), gains))));
    }
}

/// The bytes of a record that count for the limit: key, value and headers.
fn stored_size(record: &crate::record::Record) -> usize {
    let length = |bytes: &Option<bytes::Bytes>| bytes.as_ref().map_or(0, bytes::Bytes::len);
    let headers: usize = record.headers.iter().map(|header| header.name.len() + length(&header.value) + 4).sum();
    length(&record.key) + length(&record.value) + headers + 16
}
