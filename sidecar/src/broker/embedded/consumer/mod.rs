//! A consumer: a member of a group, or a reader by itself.
//!
//! It pulls: a partition that has something new queues itself in the inbox, once; `next` takes it out, reads a batch from the hot tail, and
//! queues it again behind the others. What is not in the tail is asked of the reader's thread, within the consumer's bound.
//!
//! Invariant: all state changes in [`EmbeddedConsumer::step`], which does not wait: dropping `next` loses nothing.
//! Invariant: between [`Event::Revoking`] and the end of its hand-over no other event is given out.
//! Invariant: a held partition keeps nothing in memory; it is read again when it is released.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{sync::oneshot, time::Instant};

use super::{
    Shared,
    group::{Group, GroupEvent, Handover, Losing},
    inbox::{Gain, Inbox, Notice, Resolved},
    log::{Partition, Row, Subscription},
    queue::{Job, NotQueued, Transaction},
};
use crate::{
    broker::{
        Assigned, BrokerError, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, Outgoing, Revoking, StartOffset, TransactionError,
    },
    record::TopicPartition,
};

mod read;

/// How long after a failure it is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Debug)]
pub(super) struct EmbeddedConsumer {
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    id: u64,
    group: Option<Arc<Group>>,
    topics: BTreeSet<Arc<str>>,
    start: StartOffset,
    buffer_bytes: usize,
    identity: Option<String>,
    cursors: HashMap<TopicPartition, Cursor>,
    /// Chosen partitions that do not exist yet, with their positions.
    absent: HashMap<TopicPartition, i64>,
    held: HashSet<TopicPartition>,
    /// Gained, but their positions are not known yet; not announced.
    resolving: HashMap<TopicPartition, u64>,
    /// The hand-over that was announced by `Revoking`; until it is over nothing is given out.
    revoking: Option<u64>,
    /// Hand-overs that are not announced yet.
    losing: VecDeque<Losing>,
    /// Events that wait to be given out.
    out: VecDeque<Event>,
    /// Bytes fetched, or asked for, from the store.
    fetched: usize,
    /// Partitions that wait for room to fetch.
    starved: Vec<Arc<Subscription>>,
    storage_trouble: Option<BrokerError>,
    missing: Option<BrokerError>,
    /// The detail of the trouble that was reported.
    reported: Option<String>,
    retry: Option<Retry>,
}

#[derive(Debug)]
struct Cursor {
    subscription: Arc<Subscription>,
    epoch: u64,
    next: i64,
    rows: VecDeque<Row>,
    /// What `rows` and a fetch under way count in `fetched`.
    charged: usize,
    fetching: bool,
    /// It waits for room or for a retry, in `starved` or `retry`, once.
    parked: bool,
}

/// What is tried again, and when.
#[derive(Debug)]
struct Retry {
    at: Instant,
    gains: Vec<Gain>,
    partitions: Vec<Arc<Subscription>>,
}

impl EmbeddedConsumer {
    pub(super) fn new(shared: Arc<Shared>, config: ConsumerConfig) -> Self {
        let inbox = Arc::new(Inbox::default());
        let topics: BTreeSet<_> = config.topics.into_iter().collect();
        let id = shared.next_id();
        let group = match &config.group {
            Some(group) => Some(shared.groups.join(group, id, topics.clone(), inbox.clone())),
            None => {
                shared.add_loner(&inbox);
                None
            }
        };
        inbox.assignment_changed();
        if let Some(identity) = &config.transactional_id {
            shared.identities.take(identity, id);
        }
        Self {
            shared,
            inbox,
            id,
            group,
            topics,
            start: config.start,
            buffer_bytes: config.buffer_bytes,
            identity: config.transactional_id,
            cursors: HashMap::new(),
            absent: HashMap::new(),
            held: HashSet::new(),
            resolving: HashMap::new(),
            revoking: None,
            losing: VecDeque::new(),
            out: VecDeque::new(),
            fetched: 0,
            starved: Vec::new(),
            storage_trouble: None,
            missing: None,
            reported: None,
            retry: None,
        }
    }

    /// Does what can be done without waiting; the next event, if there is one.
    fn step(&mut self) -> Option<Event> {
        if self.retry.as_ref().is_some_and(|retry| retry.at <= Instant::now()) {
            self.retry_now();
        }
        while let Some(notice) = self.inbox.pop() {
            self.notice(notice);
        }
        if self.inbox.take_assignment_changed() {
            self.assignment_changed();
        }
        if self.revoking.is_some() {
            return None;
        }
        if let Some(event) = self.out.pop_front() {
            return Some(event);
        }
        while let Some(losing) = self.losing.pop_front() {
            if let Some(event) = self.announce(losing) {
                return Some(event);
            }
        }
        while let Some(subscription) = self.inbox.pop_ready() {
            if let Some(event) = self.read(subscription) {
                return Some(event);
            }
        }
        self.out.pop_front()
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Resolved(Ok(resolved)) => {
                self.trouble_over();
                self.assigned(resolved);
            }
            Notice::Resolved(Err((error, gains))) => {
                self.storage_trouble = Some(error);
                self.report();
                self.retry_later(gains, None);
            }
            Notice::Fetched { subscription, until, rows } => self.fetched(subscription, until, rows),
        }
    }

    /// The group, or the set of topics, changed.
    fn assignment_changed(&mut self) {
        let missing: Vec<_> = self.topics.iter().filter(|topic| self.shared.catalog.get(topic).is_none()).map(|t| &**t).collect();
        self.missing = (!missing.is_empty()).then(|| {
            let detail = format!("waiting for topics that do not exist yet: {}; publish to them or create them", missing.join(", "));
            BrokerError::new(BrokerErrorKind::UnknownTopic, detail)
        });
        self.report();
        match &self.group {
            Some(group) => {
                let group = group.clone();
                group.rebalance(&self.shared);
                while let Some(event) = group.pop(self.id) {
                    self.group_event(event);
                }
            }
            None => {
                self.drop_deleted();
                let topics: Vec<_> = self.topics.iter().filter_map(|topic| self.shared.catalog.get(topic)).collect();
                let partitions = topics.iter().flat_map(|topic| &topic.partitions);
                let new = partitions.filter(|p| !self.cursors.contains_key(&p.name) && !self.resolving.contains_key(&p.name));
                let gains = new.map(|partition| Gain { partition: partition.clone(), epoch: 0 }).collect();
                self.resolve(gains);
                let absent = std::mem::take(&mut self.absent);
                self.choose(absent);
            }
        }
    }

    /// Reads partitions of deleted topics no more. A chosen one is read again, from the beginning, if its topic is made again.
    fn drop_deleted(&mut self) {
        let exists = |cursor: &Cursor| {
            let partition = &cursor.subscription.partition;
            self.shared.catalog.partition(&partition.name).is_some_and(|found| found.id == partition.id)
        };
        let gone: Vec<TopicPartition> = self.cursors.iter().filter(|(_, cursor)| !exists(cursor)).map(|(name, _)| name.clone()).collect();
        for name in gone {
            if let Some(cursor) = self.cursors.remove(&name) {
                self.uncharge(cursor.charged);
            }
            if self.topics.is_empty() {
                self.absent.insert(name, 0);
            }
        }
    }

    /// Begins to read chosen partitions, those that exist.
    fn choose(&mut self, partitions: impl IntoIterator<Item = (TopicPartition, i64)>) {
        for (name, position) in partitions {
            match self.shared.catalog.partition(&name) {
                Some(partition) => self.begin(&partition, 0, position),
                None => drop(self.absent.insert(name, position)),
            }
        }
    }

    fn begin(&mut self, partition: &Arc<Partition>, epoch: u64, position: i64) {
        self.held.remove(&partition.name);
        let subscription = partition.subscribe(&self.inbox);
        let cursor = Cursor { subscription, epoch, next: position, rows: VecDeque::new(), charged: 0, fetching: false, parked: false };
        self.cursors.insert(partition.name.clone(), cursor);
    }

    fn group_event(&mut self, event: GroupEvent) {
        match event {
            GroupEvent::Gained(gains) => self.resolve(gains),
            GroupEvent::Losing(losing) => self.losing.push_back(losing),
            GroupEvent::HandedOver(id, partitions) => {
                if self.revoking == Some(id) {
                    self.revoking = None;
                }
                // One that was not even announced is over already: it is announced as lost, and forgotten then.
                if !self.losing.iter().any(|losing| losing.id == id) {
                    partitions.iter().for_each(|handover| self.forget(handover));
                }
            }
        }
    }

    /// Begins to give partitions away; nothing is to be said of those that were not assigned yet.
    fn announce(&mut self, losing: Losing) -> Option<Event> {
        let Losing { id, partitions, done } = losing;
        let (announced, unannounced): (Vec<_>, Vec<_>) = partitions.into_iter().partition(|handover| self.has(handover));
        for handover in unannounced {
            if self.resolving.get(&handover.partition) == Some(&handover.epoch) {
                self.resolving.remove(&handover.partition);
            }
        }
        if announced.is_empty() {
            // Dropping `done` ends the hand-over: nothing of these was ever read.
            return None;
        }
        let group = self.group.clone()?;
        let lost = !announced.iter().any(|handover| group.owns(self.id, &handover.partition, handover.epoch));
        if lost {
            announced.iter().for_each(|handover| self.forget(handover));
        } else {
            self.revoking = Some(id);
        }
        let partitions = announced.into_iter().map(|handover| handover.partition).collect();
        Some(Event::Revoking(Revoking { partitions, lost, done }))
    }

    fn has(&self, handover: &Handover) -> bool {
        self.cursors.get(&handover.partition).is_some_and(|cursor| cursor.epoch == handover.epoch)
    }

    /// Asks for the start positions.
    fn resolve(&mut self, gains: Vec<Gain>) {
        if gains.is_empty() {
            return;
        }
        for gain in &gains {
            self.resolving.insert(gain.partition.name.clone(), gain.epoch);
        }
        let job = Job::Resolve { group: self.group.clone(), gains: gains.clone(), start: self.start.clone(), inbox: self.inbox.clone() };
        if self.shared.submit(job).is_err() {
            self.storage_trouble = Some(closed());
            self.report();
            self.retry_later(gains, None);
        }
    }

    fn assigned(&mut self, resolved: Vec<Resolved>) {
        let (mut assigned, mut replaced) = (Vec::with_capacity(resolved.len()), Vec::new());
        for Resolved { gain: Gain { partition, epoch }, position, metadata } in resolved {
            // It was taken away in the meantime, unannounced.
            if self.resolving.get(&partition.name) != Some(&epoch) {
                continue;
            }
            self.resolving.remove(&partition.name);
            // Its topic was deleted and made again, and the old one's loss was not announced yet.
            if let Some(old) = self.cursors.remove(&partition.name) {
                self.uncharge(old.charged);
                replaced.push(partition.name.clone());
            }
            self.begin(&partition, epoch, position);
            assigned.push(Assigned { partition: partition.name.clone(), position, metadata });
        }
        if !replaced.is_empty() {
            let (done, _) = oneshot::channel();
            self.out.push_back(Event::Revoking(Revoking { partitions: replaced, lost: true, done }));
        }
        if !assigned.is_empty() {
            self.out.push_back(Event::Assigned(assigned));
        }
    }

    /// Forgets a partition that was handed over, unless it came back in the meantime.
    fn forget(&mut self, handover: &Handover) {
        if self.has(handover)
            && let Some(cursor) = self.cursors.remove(&handover.partition)
        {
            self.held.remove(&handover.partition);
            self.uncharge(cursor.charged);
        }
    }

    fn trouble_over(&mut self) {
        if self.retry.is_none() && self.storage_trouble.take().is_some() {
            self.report();
        }
    }

    /// Reports trouble when it begins or changes, and when it is over.
    fn report(&mut self) {
        let trouble = self.storage_trouble.as_ref().or(self.missing.as_ref());
        let detail = trouble.map(|error| error.detail.clone());
        if detail != self.reported {
            self.out.push_back(trouble.cloned().map_or(Event::Recovered, Event::Trouble));
            self.reported = detail;
        }
    }

    fn retry_later(&mut self, gains: Vec<Gain>, partition: Option<Arc<Subscription>>) {
        let retry = self.retry.get_or_insert_with(|| Retry { at: Instant::now() + RETRY, gains: Vec::new(), partitions: Vec::new() });
        retry.gains.extend(gains);
        if let Some(subscription) = partition {
            if let Some(cursor) = self.cursors.get_mut(&subscription.partition.name) {
                cursor.parked = true;
            }
            retry.partitions.push(subscription);
        }
    }

    fn retry_now(&mut self) {
        let Some(Retry { gains, partitions, .. }) = self.retry.take() else { return };
        self.unpark(partitions);
        // Those that were taken away in the meantime are not wanted any more.
        self.resolve(gains.into_iter().filter(|gain| self.resolving.get(&gain.partition.name) == Some(&gain.epoch)).collect());
    }

    /// Offsets with the epochs since when their partitions are ours.
    fn with_epochs(&self, offsets: Vec<Commit>) -> Vec<(Option<u64>, Commit)> {
        let epoch = |commit: &Commit| match self.cursors.get(&commit.partition) {
            Some(cursor) => Some(cursor.epoch),
            // Of a subscribed topic but not assigned: epoch 0 was never given, so it is refused.
            None => self.topics.contains(&commit.partition.topic).then_some(0),
        };
        offsets.into_iter().map(|commit| (epoch(&commit), commit)).collect()
    }

    fn leave(&mut self) {
        if let Some(group) = self.group.take() {
            self.shared.groups.leave(&group, self.id);
        }
        if let Some(identity) = self.identity.take() {
            self.shared.identities.give_up(&identity, self.id);
        }
        self.cursors.clear();
        self.inbox.clear();
    }
}

fn closed() -> BrokerError {
    BrokerError::new(BrokerErrorKind::Unreachable, "the embedded broker is closed or overloaded")
}

impl Consumer for EmbeddedConsumer {
    fn next(&mut self) -> BoxFuture<'_, Event> {
        Box::pin(async move {
            loop {
                if let Some(event) = self.step() {
                    return event;
                }
                match self.retry.as_ref().map(|retry| retry.at) {
                    // Both only wait; what was pushed stays in the inbox.
                    Some(at) => drop(tokio::time::timeout_at(at, self.inbox.wait()).await),
                    None => self.inbox.wait().await,
                }
            }
        })
    }

    fn hold(&mut self, partition: &TopicPartition) {
        let Some(cursor) = self.cursors.get_mut(partition) else { return };
        self.held.insert(partition.clone());
        cursor.rows.clear();
        self.settle(partition);
    }

    fn release(&mut self, partition: &TopicPartition) {
        if self.held.remove(partition)
            && let Some(cursor) = self.cursors.get(partition)
        {
            cursor.subscription.ready();
        }
    }

    fn assign(&mut self, partitions: Vec<(TopicPartition, i64)>) {
        if self.group.is_none() && self.topics.is_empty() {
            let names: Vec<_> = partitions.iter().map(|(name, _)| name.clone()).collect();
            self.unassign(&names);
            self.choose(partitions);
        }
    }

    fn unassign(&mut self, partitions: &[TopicPartition]) {
        if self.group.is_some() || !self.topics.is_empty() {
            return;
        }
        for name in partitions {
            self.absent.remove(name);
            self.held.remove(name);
            self.out.retain(|event| !matches!(event, Event::Expired { partition, .. } if partition == name));
            if let Some(cursor) = self.cursors.remove(name) {
                self.uncharge(cursor.charged);
            }
        }
    }

    fn seek(&mut self, partition: &TopicPartition, offset: i64) {
        let Some(cursor) = self.cursors.get_mut(partition) else { return };
        // A fetch under way belongs to the old subscription, and is forgotten with it.
        cursor.subscription = cursor.subscription.partition.subscribe(&self.inbox);
        cursor.next = offset;
        cursor.rows.clear();
        cursor.fetching = false;
        cursor.parked = false;
        let charged = std::mem::take(&mut cursor.charged);
        self.uncharge(charged);
    }

    fn commit(&self, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), BrokerError>> {
        let Some(group) = self.group.clone() else {
            let detail = "a consumer without a group has no offsets to commit; name a group";
            return Box::pin(std::future::ready(Err(BrokerError::new(BrokerErrorKind::Config, detail))));
        };
        if offsets.is_empty() {
            return Box::pin(std::future::ready(Ok(())));
        }
        let offsets = self.with_epochs(offsets);
        let (shared, id) = (self.shared.clone(), self.id);
        let committed = shared.commit(group, id, offsets);
        Box::pin(committed)
    }

    fn transact(&self, records: Vec<Outgoing>, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), TransactionError>> {
        let refused = |detail| {
            let error = TransactionError::Aborted(BrokerError::new(BrokerErrorKind::Config, detail));
            Box::pin(std::future::ready(Err(error)))
        };
        let (Some(group), Some(identity)) = (self.group.clone(), self.identity.clone()) else {
            return refused("a consumer without a group and a `transactional_id` makes no transactions");
        };
        let bytes = records.iter().map(|outgoing| outgoing.record.size()).sum();
        let (reply, answer) = oneshot::channel();
        let transaction = Transaction { group, member: self.id, identity, records, offsets: self.with_epochs(offsets) };
        match self.shared.submit(Job::Transact { transaction, bytes, reply }) {
            Ok(()) => Box::pin(async move { answer.await.unwrap_or_else(|_| Err(TransactionError::Lost(closed()))) }),
            Err(NotQueued::Full) => refused("embedded broker: too many bytes of records wait for the disk already"),
            Err(NotQueued::Closed) => Box::pin(std::future::ready(Err(TransactionError::Aborted(closed())))),
        }
    }

    fn close(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        self.leave();
        Box::pin(std::future::ready(()))
    }
}

impl Drop for EmbeddedConsumer {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Shared {
    /// Commits in the order of the calls: the job is submitted before this returns.
    pub(super) fn commit(
        &self,
        group: Arc<Group>,
        member: u64,
        offsets: Vec<(Option<u64>, Commit)>,
    ) -> impl Future<Output = Result<(), BrokerError>> + Send + 'static {
        let (reply, answer) = oneshot::channel();
        let submitted = self.submit(Job::Commit { group, member, offsets, reply });
        async move {
            if submitted.is_err() {
                return Err(closed());
            }
            answer.await.unwrap_or_else(|_| Err(closed()))
        }
    }
}
