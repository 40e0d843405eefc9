//! The polling thread of a consumer.
//!
//! It drains librdkafka's queue, sleeps until librdkafka or the async side wakes it, and handles rebalances between polls. What blocks
//! (offsets, watermarks, commits of a rebalance) runs beside it while it goes on polling.
//!
//! Invariant: rebalances are handled one after the other, each answered with `incremental_assign` or `incremental_unassign`.
//! Invariant: a message of a partition that is not registered here is dropped: its assignment was never told, or is over.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    message::{BorrowedMessage, Message},
    topic_partition_list::TopicPartitionList,
};

use super::{
    super::{error::broker_error, health::Health, wakeup::lock},
    Client, Shared,
    arena::{Arena, Raw},
    context::{Context, Rebalance},
    queue::{BATCH_BYTES, BATCH_RECORDS},
};
use crate::{
    broker::{BrokerError, BrokerErrorKind},
    record::{Record, TopicPartition},
};

mod rebalance;
mod transactions;
mod watch;

/// How long the commits of a rebalance may take.
const COMMIT: Duration = Duration::from_secs(5);
/// How long a question to the broker may take.
const ASK: Duration = Duration::from_secs(10);
/// How often the thread looks after itself when nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// How long the thread leaves librdkafka's queue alone while the partitions have enough. Rebalances wait behind the records there, so a rest
/// that takes longer ends with a pause.
const REST: Duration = Duration::from_millis(200);
/// How long a consumer that is closed waits for the answer to its request to join. librdkafka then waits 5 s for the one to leave: together a session's
/// length, for which the group would wait for a member that left unheard.
const JOINED: Duration = Duration::from_secs(5);
/// How long a consumer that was fenced waits before it joins again.
const REJOIN: Duration = Duration::from_secs(5);

/// What can be wrong with a consumer, in the order of telling.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    Fenced,
    Broker,
    Transactions,
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
    /// An assignment was answered without being told, because the next rebalance waited.
    abandoned: bool,
    /// The producer of transactions failed for good: partitions are assigned again once it stands.
    starting_over: bool,
    fatal: Option<BrokerError>,
    /// The membership ended unseen: the partitions are others', and the client does not know.
    replaced: bool,
    /// Since when the partitions have enough.
    full_since: Option<Instant>,
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
            abandoned: false,
            starting_over: false,
            fatal: None,
            replaced: false,
            full_since: None,
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
            self.wait_for_transactions(&client);
            self.subscribe(&client);
            self.work(&client);
            drop(client);
            if std::mem::take(&mut self.replaced) {
                tracing::warn!("kafka: {}: the session had ended, and its partitions are others' by now: joining anew", self.name());
                self.lose(self.locals.iter().map(|local| local.partition.clone()).collect());
                self.disconnect();
            }
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
        self.finish_joining();
        self.disconnect();
    }

    /// Lets a request to join be answered, so that the one to leave is heard.
    fn finish_joining(&mut self) {
        let Some(client) = self.client.clone() else { return };
        let until = Instant::now() + JOINED;
        loop {
            // What is told of it comes with everything else.
            let more = self.pump(&client);
            if !client.context().is_joining() || Instant::now() >= until {
                return;
            }
            if !more {
                self.shared.wakeup.wait(until.saturating_duration_since(Instant::now()));
            }
        }
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
            let rests = self.rests(client);
            let more = !rests && self.pump(client);
            // Before a rebalance is answered, and with it the metadata of the new membership is captured.
            if client.context().take_replaced() && !self.locals.is_empty() {
                *lock(&self.shared.metadata) = None;
                self.replaced = true;
                return;
            }
            while let Some(rebalance) = client.context().take_rebalance() {
                match rebalance {
                    Rebalance::Assign(list) => self.assign(client, &list),
                    Rebalance::Revoke { list, lost } => self.revoke(client, &list, lost),
                }
            }
            self.take_choices(client);
            self.watch_transactions(client, rests);
            let seeks = lock(&self.shared.queue).take_seeks();
            for (partition, offset) in seeks {
                self.seek(client, &partition, offset);
            }
            if std::mem::take(&mut self.out_of_range) {
                self.find_range(client);
            }
            if Instant::now() >= self.next_tick {
                self.tick(client);
                self.next_tick = Instant::now() + TICK;
            }
            if !more && !client.context().rebalance_waits() && !self.out_of_range {
                let until_tick = self.next_tick.saturating_duration_since(Instant::now());
                self.shared.wakeup.wait(if rests { until_tick.min(REST) } else { until_tick });
            }
        }
    }

    /// Whether the thread leaves librdkafka's queue alone for now: the partitions have enough.
    fn rests(&mut self, client: &Arc<Client>) -> bool {
        if !lock(&self.shared.queue).rest() {
            self.full_since = None;
            return false;
        }
        if self.full_since.get_or_insert_with(Instant::now).elapsed() < REST {
            return true;
        }
        // The service is slow, or away: what is prefetched here is dropped, and the queue is free for rebalances.
        self.full_since = None;
        let full = lock(&self.shared.queue).pause_full();
        if let Err(error) = client.pause(&plain_list(&full)) {
            tracing::warn!(%error, "kafka: pause failed");
        }
        false
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
        self.flush();
        for (code, reason) in context.take_errors() {
            self.client_error(code, &reason);
        }
        more
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
        if let Some(local) = self.locals.get_mut(self.last)
            && message.offset() >= local.next
        {
            local.next = message.offset() + 1;
            local.raw.push(self.arena.add(message));
        }
    }

    /// Hands the round to the async side.
    fn flush(&mut self) {
        if self.locals.iter().all(|local| local.raw.is_empty()) {
            return;
        }
        let frozen = self.arena.freeze();
        let mut rounds = Vec::new();
        for local in &mut self.locals {
            let mut raws = local.raw.drain(..).peekable();
            while raws.peek().is_some() {
                let records: Vec<(i64, Record)> = raws.by_ref().take(BATCH_RECORDS).map(|raw| (raw.offset, frozen.record(&raw))).collect();
                let bytes = records.iter().map(|(_, record)| record.size()).sum();
                rounds.push((local.partition.clone(), records, bytes));
            }
        }
        {
            let mut queue = lock(&self.shared.queue);
            for (partition, records, bytes) in rounds {
                queue.records(&partition, records, bytes);
            }
        }
        self.shared.ready.notify_one();
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
            match rebalance {
                // librdkafka waits for the answer; all of it is given back below.
                Rebalance::Assign(list) => self.log_failed("assign", client.incremental_assign(&list)),
                Rebalance::Revoke { list, .. } => self.log_failed("unassign", client.incremental_unassign(&list)),
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
