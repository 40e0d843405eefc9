//! The polling thread of a consumer.
//!
//! It drains librdkafka's queue, sleeps until librdkafka or the async side wakes it, and handles rebalances between polls. What blocks
//! (offsets, watermarks, commits of a rebalance) runs beside it while it goes on polling.
//!
//! Invariant: rebalances are handled one after the other, each answered with `incremental_assign` or `incremental_unassign`.
//! Invariant: a message of a partition that is not registered here is dropped: its assignment was never told, or is over.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    future::Future as _,
    pin::Pin,
    sync::{Arc, mpsc},
    task::{Context as TaskContext, Poll, Waker},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    error::KafkaError,
    message::{BorrowedMessage, Message},
    topic_partition_list::{Offset, TopicPartitionList},
    types::RDKafkaErrorCode as Code,
};
use tokio::sync::oneshot;

use super::{
    super::{admin, error::broker_error, health::Health, wakeup::lock},
    Client, Shared,
    arena::{Arena, Raw},
    commit_list,
    context::{Context, Rebalance},
    queue::{BATCH_BYTES, BATCH_RECORDS},
    start::{self, Rule},
};
use crate::{
    broker::{Assigned, BrokerError, BrokerErrorKind, Commit, Event, Revoking},
    record::{Record, TopicPartition},
};

/// How long a revocation waits for its last commits.
const REVOKE: Duration = Duration::from_secs(2);
/// How long the commits of a rebalance may take.
const COMMIT: Duration = Duration::from_secs(5);
/// How long a question to the broker may take.
const ASK: Duration = Duration::from_secs(10);
/// How often the thread looks after itself when nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// How often a reader without a group looks for new partitions.
const PARTITIONS: Duration = Duration::from_secs(5);
/// How long a consumer that was fenced waits before it joins again.
const REJOIN: Duration = Duration::from_secs(5);
/// How long an error of access is believed when it is not repeated.
const ACCESS: Duration = Duration::from_secs(90);

/// What can be wrong with a consumer, in the order of telling.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    Fenced,
    Broker,
    Access,
    Start,
    Topic(Arc<str>),
}

/// A partition that is read.
struct Local {
    partition: TopicPartition,
    /// The offset after the last message.
    next: i64,
    raw: Vec<Raw>,
}

/// The thread's state.
pub(super) struct Session {
    shared: Arc<Shared>,
    health: Arc<Health>,
    kafka: ClientConfig,
    client: Option<Arc<Client>>,
    locals: Vec<Local>,
    index: HashMap<Arc<str>, HashMap<i32, usize>>,
    /// The partition of the last message: messages come in runs.
    last: usize,
    arena: Arena,
    troubles: BTreeMap<Cause, BrokerError>,
    told: Option<BrokerError>,
    health_seen: u64,
    access_until: Instant,
    missing: BTreeSet<Arc<str>>,
    appeared: HashSet<Arc<str>>,
    check_topics: bool,
    next_tick: Instant,
    next_partitions: Instant,
    /// A partition asked for an offset that does not exist.
    out_of_range: bool,
    fatal: Option<BrokerError>,
}

impl Session {
    pub(super) fn new(kafka: ClientConfig, shared: Arc<Shared>, health: Arc<Health>) -> Result<Self, BrokerError> {
        let now = Instant::now();
        let mut session = Self {
            shared,
            health,
            kafka,
            client: None,
            locals: Vec::new(),
            index: HashMap::new(),
            last: 0,
            arena: Arena::default(),
            troubles: BTreeMap::new(),
            told: None,
            health_seen: 0,
            access_until: now,
            missing: BTreeSet::new(),
            appeared: HashSet::new(),
            check_topics: true,
            next_tick: now,
            next_partitions: now,
            out_of_range: false,
            fatal: None,
        };
        session.connect()?;
        Ok(session)
    }

    fn connect(&mut self) -> Result<(), BrokerError> {
        let context = Context::new(self.health.clone());
        let mut client: Client =
            BaseConsumer::from_config_and_context(&self.kafka, context).map_err(|error| broker_error(self.name(), &error))?;
        let wakeup = self.shared.wakeup.clone();
        client.set_nonempty_callback(move || wakeup.set());
        let client = Arc::new(client);
        *lock(&self.shared.client) = Some(client.clone());
        self.client = Some(client);
        Ok(())
    }

    fn name(&self) -> String {
        match &self.shared.config.group {
            Some(group) => format!("consumer group `{group}`"),
            None => "reader".to_owned(),
        }
    }

    fn grouped(&self) -> bool {
        self.shared.config.group.is_some()
    }

    /// The thread's body: until the consumer is closed.
    pub(super) fn run(&mut self) {
        while !self.shared.closing() {
            let Some(client) = self.client.clone() else {
                if let Err(error) = self.connect() {
                    tracing::error!("kafka: {error}");
                    self.shared.wakeup.wait(REJOIN);
                }
                continue;
            };
            self.subscribe(&client);
            self.work(&client);
            drop(client);
            if let Some(error) = self.fatal.take() {
                tracing::error!("kafka: {error}; joining again in {REJOIN:?}");
                self.lose(self.locals.iter().map(|local| local.partition.clone()).collect());
                self.trouble(Cause::Fenced, Some(error));
                self.disconnect();
                let until = Instant::now() + REJOIN;
                while !self.shared.closing() && Instant::now() < until {
                    self.shared.wakeup.wait(until.saturating_duration_since(Instant::now()));
                }
            }
        }
        self.disconnect();
    }

    fn subscribe(&mut self, client: &Arc<Client>) {
        self.check_topics = true;
        if self.grouped() {
            let topics: Vec<&str> = self.shared.config.topics.iter().map(|topic| &**topic).collect();
            if let Err(error) = client.subscribe(&topics) {
                self.fatal = Some(broker_error(format!("{}: subscribe", self.name()), &error));
            }
        }
    }

    fn work(&mut self, client: &Arc<Client>) {
        while !self.shared.closing() && self.fatal.is_none() {
            let more = self.pump(client);
            while let Some(rebalance) = client.context().take_rebalance() {
                match rebalance {
                    Rebalance::Assign(list) => self.assign(client, &list),
                    Rebalance::Revoke { list, lost } => self.revoke(client, &list, lost),
                }
            }
            if std::mem::take(&mut self.out_of_range) {
                self.find_range(client);
            }
            if Instant::now() >= self.next_tick {
                self.tick(client);
                self.next_tick = Instant::now() + TICK;
            }
            if !more && !client.context().rebalance_waits() && !self.out_of_range {
                self.shared.wakeup.wait(self.next_tick.saturating_duration_since(Instant::now()));
            }
        }
    }

    /// Drains librdkafka's queue, up to a round's size. Says whether there may be more.
    fn pump(&mut self, client: &Arc<Client>) -> bool {
        let resume = lock(&self.shared.queue).take_resume();
        if !resume.is_empty()
            && let Err(error) = client.resume(&plain_list(&resume))
        {
            tracing::warn!(%error, "kafka: resume failed");
        }
        let context = client.context();
        let mut more = true;
        let mut count = 0;
        while count < 4 * BATCH_RECORDS && self.arena.len() < BATCH_BYTES {
            let served = context.served();
            match client.poll(Duration::ZERO) {
                Some(Ok(message)) => {
                    self.take(&message);
                    count += 1;
                }
                Some(Err(KafkaError::MessageConsumptionFatal(code))) => {
                    let text = client.client().fatal_error().map_or_else(|| code.to_string(), |(_, text)| text);
                    self.fatal = Some(BrokerError::new(
                        BrokerErrorKind::Fenced,
                        format!("{}: {text}: is another sidecar running with the same `instance`?", self.name()),
                    ));
                    break;
                }
                // Noted by the context.
                Some(Err(_)) => {}
                None if context.served() == served => {
                    more = false;
                    break;
                }
                None if context.rebalance_waits() => break,
                None => {}
            }
        }
        self.flush(client);
        for (code, reason) in context.take_errors() {
            self.client_error(code, &reason);
        }
        more
    }

    fn client_error(&mut self, code: Code, reason: &str) {
        match code {
            Code::AutoOffsetReset => self.out_of_range = true,
            Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition | Code::UnknownTopicId => self.check_topics = true,
            Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed | Code::InconsistentGroupProtocol => {
                self.access_until = Instant::now() + ACCESS;
                let error = super::super::error::code_error(format!("{}: {reason}", self.name()), code);
                self.trouble(Cause::Access, Some(error));
            }
            Code::Fatal => {
                self.fatal.get_or_insert_with(|| {
                    BrokerError::new(
                        BrokerErrorKind::Fenced,
                        format!("{}: {reason}", self.shared.config.group.as_deref().unwrap_or("reader")),
                    )
                });
            }
            _ => {}
        }
    }

    /// Copies a message to its partition's round.
    fn take(&mut self, message: &BorrowedMessage<'_>) {
        let (topic, partition) = (message.topic(), message.partition());
        let fits =
            self.locals.get(self.last).is_some_and(|local| local.partition.partition == partition && *local.partition.topic == *topic);
        if !fits {
            match self.index.get(topic).and_then(|partitions| partitions.get(&partition)) {
                Some(found) => self.last = *found,
                None => return tracing::debug!(topic, partition, "kafka: a message of a partition that is not ours"),
            }
        }
        let raw = self.arena.add(message);
        if let Some(local) = self.locals.get_mut(self.last) {
            if raw.offset >= local.next {
                local.next = raw.offset + 1;
                local.raw.push(raw);
            }
        }
    }

    /// Hands the round to the async side.
    fn flush(&mut self, client: &Arc<Client>) {
        if self.locals.iter().all(|local| local.raw.is_empty()) {
            return;
        }
        let frozen = self.arena.freeze();
        let mut rounds: Vec<(TopicPartition, Vec<(i64, Record)>, usize)> = Vec::new();
        for local in &mut self.locals {
            let mut raws = local.raw.drain(..).peekable();
            while raws.peek().is_some() {
                let records: Vec<(i64, Record)> = raws.by_ref().take(BATCH_RECORDS).map(|raw| (raw.offset, frozen.record(&raw))).collect();
                let bytes = records.iter().map(|(_, record)| record.size()).sum();
                rounds.push((local.partition.clone(), records, bytes));
            }
        }
        let mut pause = Vec::new();
        {
            let mut queue = lock(&self.shared.queue);
            for (partition, records, bytes) in rounds {
                if queue.records(&partition, records, bytes) {
                    pause.push(partition);
                }
            }
        }
        self.shared.ready.notify_one();
        if !pause.is_empty()
            && let Err(error) = client.pause(&plain_list(&pause))
        {
            tracing::warn!(%error, "kafka: pause failed");
        }
    }

    /// Runs a blocking call beside the polling. `None` if it took too long or the consumer is being closed; the call then ends by its own
    /// timeout.
    fn beside<T: Send + 'static>(
        &mut self,
        client: &Arc<Client>,
        timeout: Duration,
        call: impl FnOnce(&Client) -> T + Send + 'static,
    ) -> Option<T> {
        let (done, answer) = mpsc::sync_channel(1);
        let (used, wakeup) = (client.clone(), self.shared.wakeup.clone());
        let thread = std::thread::Builder::new().name("kafka-ask".to_owned()).spawn(move || {
            let result = call(&used);
            drop(used);
            // Nobody may be waiting any more.
            drop(done.send(result));
            wakeup.set();
        });
        if let Err(error) = thread {
            tracing::error!(%error, "kafka: no thread for a question to the broker");
            return None;
        }
        let mut result = None;
        self.poll_until(client, timeout, |_| match answer.try_recv() {
            Ok(value) => {
                result = Some(value);
                true
            }
            Err(mpsc::TryRecvError::Empty) => false,
            Err(mpsc::TryRecvError::Disconnected) => true,
        });
        result
    }

    /// Goes on polling until something is true, the time is over, or the consumer is being closed.
    fn poll_until(&mut self, client: &Arc<Client>, timeout: Duration, mut done: impl FnMut(&mut Self) -> bool) {
        let until = Instant::now() + timeout;
        while !done(self) && !self.shared.closing() {
            let now = Instant::now();
            if now >= until {
                return;
            }
            if !self.pump(client) {
                self.shared.wakeup.wait((until - now).min(TICK));
            }
        }
    }

    fn rule(&self) -> Rule {
        Rule { group: self.shared.config.group.clone(), start: self.shared.config.start, appeared: self.appeared.clone() }
    }

    /// The positions of new partitions. `None` if it is no use any more: closing, or the next rebalance waits.
    fn positions(&mut self, client: &Arc<Client>, partitions: &[TopicPartition]) -> Option<Vec<Assigned>> {
        loop {
            if self.shared.closing() || client.context().rebalance_waits() || self.fatal.is_some() {
                return None;
            }
            let (rule, wanted) = (self.rule(), partitions.to_vec());
            match self.beside(client, ASK + COMMIT, move |client| start::positions(client, &rule, &wanted, ASK)) {
                Some(Ok(assigned)) => {
                    self.trouble(Cause::Start, None);
                    return Some(assigned);
                }
                Some(Err(error)) => {
                    tracing::debug!("kafka: {}: where to begin: {error}", self.name());
                    if error.kind != BrokerErrorKind::Fenced {
                        self.trouble(Cause::Start, Some(error));
                    }
                }
                None => {}
            }
            self.tell_health();
            self.poll_until(client, Duration::from_millis(500), |session| session.fatal.is_some());
        }
    }

    fn assign(&mut self, client: &Arc<Client>, list: &TopicPartitionList) {
        let partitions = self.partitions_of(list);
        match self.positions(client, &partitions) {
            Some(assigned) => self.begin(client, assigned),
            // librdkafka waits for an answer; these partitions are revoked next, and what they bring until then is dropped.
            None => self.log_failed("assign", client.incremental_assign(&plain_list(&partitions))),
        }
    }

    /// Registers partitions, tells of them, and lets them be fetched.
    fn begin(&mut self, client: &Arc<Client>, assigned: Vec<Assigned>) {
        let mut list = TopicPartitionList::with_capacity(assigned.len());
        for one in &assigned {
            let mut element = list.add_partition(&one.partition.topic, one.partition.partition);
            if let Err(error) = element.set_offset(Offset::Offset(one.position)) {
                tracing::error!(partition = %one.partition, position = one.position, %error, "kafka: an offset that cannot be read from");
            }
            self.locals.push(Local { partition: one.partition.clone(), next: one.position, raw: Vec::new() });
        }
        self.reindex();
        {
            let mut queue = lock(&self.shared.queue);
            for one in &assigned {
                queue.add(one.partition.clone());
            }
            self.set_high(&mut queue);
            if !assigned.is_empty() {
                queue.event(Event::Assigned(assigned));
            }
        }
        self.shared.ready.notify_one();
        self.trouble(Cause::Access, None);
        self.trouble(Cause::Fenced, None);
        self.log_failed("assign", client.incremental_assign(&list));
    }

    fn set_high(&self, queue: &mut super::Queue) {
        queue.set_high((self.shared.config.buffer_bytes / 2 / queue.len().max(1)).max(32 * 1024));
    }

    fn log_failed(&self, what: &str, result: Result<(), KafkaError>) {
        if let Err(error) = result {
            tracing::warn!("kafka: {}: {what}: {error}", self.name());
        }
    }

    fn reindex(&mut self) {
        self.index.clear();
        self.last = 0;
        for (number, local) in self.locals.iter().enumerate() {
            self.index.entry(local.partition.topic.clone()).or_default().insert(local.partition.partition, number);
        }
    }

    fn forget(&mut self, partitions: &[TopicPartition]) {
        self.locals.retain(|local| !partitions.contains(&local.partition));
        self.reindex();
    }

    fn revoke(&mut self, client: &Arc<Client>, list: &TopicPartitionList, lost: bool) {
        let mut partitions = self.partitions_of(list);
        partitions.retain(|partition| self.locals.iter().any(|local| local.partition == *partition));
        if lost {
            self.lose(partitions);
        } else if !partitions.is_empty() {
            self.give_away(client, &partitions);
        }
        self.log_failed("unassign", client.incremental_unassign(list));
        lock(&self.shared.queue).set_barrier(false);
        self.shared.ready.notify_one();
    }

    /// Partitions that are gone already.
    fn lose(&mut self, partitions: Vec<TopicPartition>) {
        if partitions.is_empty() {
            return;
        }
        self.forget(&partitions);
        {
            let mut queue = lock(&self.shared.queue);
            for partition in &partitions {
                queue.remove(partition);
            }
            self.set_high(&mut queue);
            queue.event(Event::Revoking(Revoking { partitions, lost: true, done: oneshot::channel().0 }));
        }
        self.shared.ready.notify_one();
    }

    /// Partitions that are ours until we unassign them: asks for the last commits and makes them.
    fn give_away(&mut self, client: &Arc<Client>, partitions: &[TopicPartition]) {
        let (done, mut answer) = oneshot::channel();
        self.forget(partitions);
        {
            let mut queue = lock(&self.shared.queue);
            for partition in partitions {
                queue.leaving(partition);
            }
            queue.set_barrier(true);
            queue.event(Event::Revoking(Revoking { partitions: partitions.to_vec(), lost: false, done }));
        }
        self.shared.ready.notify_one();

        let waker = Waker::from(self.shared.wakeup.clone());
        let mut commits = Vec::new();
        self.poll_until(client, REVOKE, |_| match Pin::new(&mut answer).poll(&mut TaskContext::from_waker(&waker)) {
            Poll::Ready(answered) => {
                commits = answered.unwrap_or_default();
                true
            }
            Poll::Pending => false,
        });
        drop(answer);
        {
            let mut queue = lock(&self.shared.queue);
            queue.revocation_over();
            for partition in partitions {
                queue.remove(partition);
            }
            self.set_high(&mut queue);
        }
        // A commit that is under way must not arrive after the last one.
        self.poll_until(client, COMMIT, |session| lock(&session.shared.queue).committing == 0);
        commits.retain(|commit| {
            partitions.contains(&commit.partition)
                || lock(&self.shared.queue).owns(&commit.partition)
                || !self.shared.topics.contains(&commit.partition.topic)
        });
        self.last_commits(client, &commits);
    }

    fn last_commits(&mut self, client: &Arc<Client>, commits: &[Commit]) {
        if commits.is_empty() {
            return;
        }
        for attempt in 1..=2 {
            let list = match commit_list(commits) {
                Ok(list) => list,
                Err(error) => return tracing::error!("kafka: {}: last commits: {error}", self.name()),
            };
            match self.beside(client, COMMIT, move |client| client.commit(&list, CommitMode::Sync)) {
                Some(Ok(())) => return,
                Some(Err(KafkaError::ConsumerCommit(Code::IllegalGeneration))) if attempt == 1 => {}
                Some(Err(error)) => {
                    return tracing::warn!(
                        "kafka: {}: the last commits before a rebalance failed, so records repeat: {error}",
                        self.name()
                    );
                }
                None => {
                    return tracing::warn!(
                        "kafka: {}: the last commits before a rebalance took too long, so records may repeat",
                        self.name()
                    );
                }
            }
        }
    }

    /// Finds the partitions whose next offset does not exist, and goes on where records do.
    fn find_range(&mut self, client: &Arc<Client>) {
        let asked: Vec<(TopicPartition, i64)> = self.locals.iter().map(|local| (local.partition.clone(), local.next)).collect();
        let partitions: Vec<TopicPartition> = asked.iter().map(|(partition, _)| partition.clone()).collect();
        if partitions.is_empty() {
            return;
        }
        let Some(Ok(marks)) = self.beside(client, ASK + COMMIT, move |client| admin::watermarks(client, &partitions, ASK)) else {
            // The broker is away just now.
            self.tell_health();
            self.poll_until(client, Duration::from_millis(500), |session| session.fatal.is_some());
            self.out_of_range = true;
            return;
        };
        let mut found = false;
        for ((partition, next), (low, high)) in asked.iter().zip(&marks) {
            if !self.locals.iter().any(|local| local.partition == *partition) {
                continue;
            }
            if next < low {
                found = true;
                tracing::warn!(%partition, from = next, to = low, "kafka: records were deleted before they were read");
                lock(&self.shared.queue).expired(partition, *next, *low);
                self.shared.ready.notify_one();
                self.restart(client, partition, *low);
            } else if next > high {
                found = true;
                self.beyond(client, partition, *next, *high);
            }
        }
        if !found {
            // It exists by now; but its fetching has stopped, and librdkafka does not say whose.
            for (partition, next) in &asked {
                self.restart(client, partition, *next);
            }
        }
    }

    /// Begins to fetch a partition at an offset. A seek does not start a partition that stopped on an error.
    fn restart(&mut self, client: &Arc<Client>, partition: &TopicPartition, offset: i64) {
        let Some(local) = self.locals.iter_mut().find(|local| local.partition == *partition) else { return };
        local.next = offset;
        let one = std::slice::from_ref(partition);
        self.log_failed("restart", client.incremental_unassign(&plain_list(one)));
        let mut list = TopicPartitionList::with_capacity(1);
        let added = list.add_partition_offset(&partition.topic, partition.partition, Offset::Offset(offset));
        self.log_failed("restart", added.and_then(|()| client.incremental_assign(&list)));
        if lock(&self.shared.queue).paused(partition) {
            self.log_failed("restart", client.pause(&plain_list(one)));
        }
    }

    /// The position is behind the partition's end: the topic was made anew, or its log cut. Begins as a new group would, and visibly:
    /// the partition is lost and assigned again.
    fn beyond(&mut self, client: &Arc<Client>, partition: &TopicPartition, next: i64, high: i64) {
        tracing::error!(%partition, position = next, end = high, "kafka: the position is beyond the end: the topic was made anew or cut");
        let detail = format!(
            "{partition}: the position {next} is beyond the end {high}: the topic was deleted and made anew, or its log was cut; reading begins \
             again by the route's `start`"
        );
        self.trouble(Cause::Start, Some(BrokerError::new(BrokerErrorKind::Other, detail)));
        self.log_failed("restart", client.incremental_unassign(&plain_list(std::slice::from_ref(partition))));
        self.lose(vec![partition.clone()]);
        let (rule, wanted) = (self.rule(), vec![partition.clone()]);
        let resolved = self.beside(client, ASK + COMMIT, move |client| {
            let starts = start::resolve(client, &rule, &wanted, ASK)?;
            start::commit(client, &rule, &starts)?;
            Ok::<_, BrokerError>(starts)
        });
        let assigned = match resolved {
            Some(Ok(starts)) => starts
                .into_iter()
                .map(|start| Assigned { partition: start.partition, position: start.offset, metadata: String::new() })
                .collect(),
            // What is committed is still wrong, so this is found again, once the broker answers.
            _ => vec![Assigned { partition: partition.clone(), position: next, metadata: String::new() }],
        };
        self.begin(client, assigned);
        self.trouble(Cause::Start, None);
    }

    fn tick(&mut self, client: &Arc<Client>) {
        self.tell_health();
        if self.troubles.contains_key(&Cause::Access) && Instant::now() > self.access_until {
            self.trouble(Cause::Access, None);
        }
        if self.troubles.contains_key(&Cause::Broker) {
            return;
        }
        let look = self.check_topics || !self.missing.is_empty() || (!self.grouped() && Instant::now() >= self.next_partitions);
        if look {
            self.next_partitions = Instant::now() + PARTITIONS;
            self.look_at_topics(client);
        }
    }

    /// Looks which topics exist; a reader without a group takes their new partitions.
    fn look_at_topics(&mut self, client: &Arc<Client>) {
        let all = self.check_topics || !self.grouped();
        let topics: Vec<Arc<str>> = if all { self.shared.config.topics.clone() } else { self.missing.iter().cloned().collect() };
        let asked = topics.clone();
        let counts = self.beside(client, ASK, move |client| {
            asked.iter().map(|topic| admin::partition_count(client, topic, Duration::from_secs(5))).collect::<Result<Vec<_>, _>>()
        });
        let counts = match counts {
            Some(Ok(counts)) => counts,
            Some(Err(error)) => {
                if error.kind == BrokerErrorKind::Unauthorized {
                    self.access_until = Instant::now() + ACCESS;
                    self.trouble(Cause::Access, Some(error));
                }
                return;
            }
            None => return,
        };
        self.check_topics = false;
        let mut again = false;
        for (topic, count) in topics.iter().zip(&counts) {
            if count.is_some() {
                if self.missing.remove(topic) {
                    again = true;
                    self.appeared.insert(topic.clone());
                    self.trouble(Cause::Topic(topic.clone()), None);
                }
            } else if self.missing.insert(topic.clone()) {
                let detail = format!(
                    "topic `{topic}` does not exist at Kafka {}: it is waited for; create it, or correct the name",
                    self.health.bootstrap()
                );
                self.trouble(Cause::Topic(topic.clone()), Some(BrokerError::new(BrokerErrorKind::UnknownTopic, detail)));
            }
        }
        if !self.grouped() {
            self.take_new_partitions(client, &topics, &counts);
        } else if again {
            // librdkafka would look for it within its metadata interval only.
            self.subscribe(client);
            self.check_topics = false;
        }
    }

    fn take_new_partitions(&mut self, client: &Arc<Client>, topics: &[Arc<str>], counts: &[Option<i32>]) {
        let mut new = Vec::new();
        for (topic, count) in topics.iter().zip(counts) {
            let known = self.index.get(topic);
            new.extend(
                (0..count.unwrap_or(0))
                    .filter(|number| known.is_none_or(|known| !known.contains_key(number)))
                    .map(|number| TopicPartition { topic: topic.clone(), partition: number }),
            );
        }
        if new.is_empty() {
            return;
        }
        if let Some(assigned) = self.positions(client, &new) {
            self.begin(client, assigned);
            // Partitions that a topic gets from now on are new, and so are their records.
            self.appeared.extend(topics.iter().zip(counts).filter(|(_, count)| count.is_some()).map(|(topic, _)| topic.clone()));
        }
    }

    fn tell_health(&mut self) {
        let version = self.health.version();
        if version != self.health_seen {
            self.health_seen = version;
            let trouble = self.health.trouble().map(|trouble| trouble.error);
            self.trouble(Cause::Broker, trouble);
        }
    }

    /// Notes what is wrong or no longer wrong, and tells it if that is news.
    fn trouble(&mut self, cause: Cause, error: Option<BrokerError>) {
        match error {
            Some(error) => self.troubles.insert(cause, error),
            None => self.troubles.remove(&cause),
        };
        let now = self.troubles.values().next();
        let same = match (&self.told, now) {
            (None, None) => true,
            (Some(told), Some(now)) => told.kind == now.kind && told.detail == now.detail,
            _ => false,
        };
        if !same {
            self.told = now.cloned();
            self.shared.event(self.told.clone().map_or(Event::Recovered, Event::Trouble));
        }
    }

    fn partitions_of(&self, list: &TopicPartitionList) -> Vec<TopicPartition> {
        list.elements()
            .iter()
            .map(|element| {
                let topic = self.shared.topics.get(element.topic()).cloned().unwrap_or_else(|| element.topic().into());
                TopicPartition { topic, partition: element.partition() }
            })
            .collect()
    }

    /// Lets the client go, on this thread.
    fn disconnect(&mut self) {
        let Some(mut client) = self.client.take() else { return };
        *lock(&self.shared.client) = None;
        client.context().close();
        while let Some(rebalance) = client.context().take_rebalance() {
            if let Rebalance::Revoke { list, .. } = rebalance {
                self.log_failed("unassign", client.incremental_unassign(&list));
            }
        }
        // With partitions still assigned, the drop would wait for an answer to their revocation.
        match client.assignment() {
            Ok(assignment) if assignment.count() > 0 => self.log_failed("unassign", client.incremental_unassign(&assignment)),
            _ => {}
        }
        self.locals.clear();
        self.reindex();
        let until = Instant::now() + ASK;
        loop {
            match Arc::try_unwrap(client) {
                Ok(client) => return drop(client),
                // A commit or a question still runs; it ends by its own timeout, and then drops the client on its thread, no async worker.
                Err(_) if Instant::now() > until => return,
                Err(shared) => client = shared,
            }
            drop(client.poll(Duration::from_millis(20)));
        }
    }
}

fn plain_list(partitions: &[TopicPartition]) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for partition in partitions {
        list.add_partition(&partition.topic, partition.partition);
    }
    list
}
