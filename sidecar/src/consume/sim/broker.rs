//! The broker as one process of a simulation sees it: the embedded one in memory, behind a network and a client that fail.
//!
//! What a real broker or client does, this does too: an acknowledgement that is lost, a producer that fails for good with all that it had, a
//! session that ends unnoticed, a queue that is full. Never what none of them does: records of a partition keep their order, an
//! acknowledged record is stored, a commit that was made stays.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::Instant,
};

use super::world::{Life, World};
use crate::{
    broker::{
        Acks, Admin, Broker, BrokerError, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, NewTopic, Outgoing, ProduceError,
        ProduceErrorKind, Producer, Revoking, TransactionError, embedded::EmbeddedBroker,
    },
    record::{Batch, Position, Record, TopicPartition},
};

/// See the module.
pub(super) struct Rough {
    world: Arc<World>,
    life: Arc<Life>,
    inner: Arc<EmbeddedBroker>,
    producer: Arc<RoughProducer>,
    pump: Mutex<Option<JoinHandle<()>>>,
}

impl Rough {
    pub(super) fn new(world: &Arc<World>, life: &Arc<Life>, inner: &Arc<EmbeddedBroker>) -> Arc<Self> {
        let producer = Arc::new(RoughProducer {
            world: world.clone(),
            inner: inner.clone(),
            life: life.clone(),
            queue: Mutex::default(),
            arrived: Notify::new(),
        });
        let pump = tokio::spawn(life.clone().live(producer.clone().pump()));
        Arc::new(Self { world: world.clone(), life: life.clone(), inner: inner.clone(), producer, pump: Mutex::new(Some(pump)) })
    }

    /// The process is gone. Of what it sent, the first so many batches were on the wire already.
    pub(super) fn end(&self) {
        if let Some(pump) = self.pump.lock().expect("one thread").take() {
            pump.abort();
        }
        let queued = std::mem::take(&mut *self.producer.queue.lock().expect("one thread"));
        let on_the_wire = self.world.draw(|chance| chance.below(queued.len() as u64 + 1)) as usize;
        for sending in queued.into_iter().take(on_the_wire) {
            drop(self.producer.store(&sending.records));
        }
    }
}

impl Broker for Rough {
    fn system(&self) -> &'static str {
        "rough"
    }

    fn producer(&self) -> Arc<dyn Producer> {
        self.producer.clone()
    }

    fn consumer(&self, config: ConsumerConfig) -> Result<Box<dyn Consumer>, BrokerError> {
        // A reader has no session, and so nothing to join.
        let inner = if config.group.is_none() { Some(self.inner.consumer(config.clone())?) } else { None };
        Ok(Box::new(RoughConsumer {
            world: self.world.clone(),
            life: self.life.clone(),
            broker: self.inner.clone(),
            config,
            inner,
            rejoin: Instant::now(),
            cursors: BTreeMap::new(),
            held: BTreeSet::new(),
            fetched: VecDeque::new(),
            barrier: Arc::default(),
            trouble: false,
            deaf: None,
            turns: (Instant::now(), 0),
        }))
    }

    fn admin(&self) -> Arc<dyn Admin> {
        Arc::new(RoughAdmin { world: self.world.clone(), inner: self.inner.admin() })
    }

    fn health(&self) -> Result<(), BrokerError> {
        Ok(())
    }

    fn close(&self, _deadline: Duration) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async { Ok(()) })
    }
}

type Results = Vec<Result<Position, ProduceError>>;

struct Sending {
    records: Vec<Outgoing>,
    /// How many of them the queue did not take.
    refused: usize,
    reply: oneshot::Sender<Results>,
}

struct RoughProducer {
    world: Arc<World>,
    life: Arc<Life>,
    inner: Arc<EmbeddedBroker>,
    queue: Mutex<VecDeque<Sending>>,
    arrived: Notify,
}

fn failed(kind: ProduceErrorKind) -> Result<Position, ProduceError> {
    Err(ProduceError { kind, detail: format!("simulated: {kind:?}") })
}

impl RoughProducer {
    fn take(&self) -> Option<Sending> {
        self.queue.lock().expect("one thread").pop_front()
    }

    /// Sends what is queued, batch after batch.
    async fn pump(self: Arc<Self>) {
        let faults = self.world.plan.produce;
        loop {
            if self.queue.lock().expect("one thread").is_empty() {
                self.arrived.notified().await;
                continue;
            }
            self.world.dawdle(faults.latency_ms).await;
            self.world.reachable().await;
            let broken = [
                (ProduceErrorKind::Fatal, faults.fatal),
                (ProduceErrorKind::Unavailable, faults.unavailable),
                (ProduceErrorKind::TimedOut, faults.timed_out),
            ];
            match broken.into_iter().find(|(_, times)| self.world.goes_wrong(*times)) {
                Some((kind, _)) => self.fail_all(kind),
                None => {
                    if let Some(sending) = self.take() {
                        let results = match self.late_topic(&sending.records) {
                            Some(topic) => self.store_apart(&sending.records, &topic).await,
                            None => self.store(&sending.records),
                        };
                        self.answer(sending, results, faults.latency_ms);
                    }
                }
            }
        }
    }

    /// A topic of a batch of several, whose leader answers late.
    fn late_topic(&self, records: &[Outgoing]) -> Option<Arc<str>> {
        let first = records.first()?;
        let several = records.iter().any(|record| record.topic != first.topic);
        let late = several && self.world.goes_wrong(self.world.plan.produce.apart);
        late.then(|| records[self.world.draw(|chance| chance.below(records.len() as u64)) as usize].topic.clone())
    }

    /// Stores a batch, but for one topic, which follows a while later. A process that dies meanwhile has stored a part.
    async fn store_apart(&self, records: &[Outgoing], late: &Arc<str>) -> Results {
        self.world.note(|| format!("{} {late} is stored later", self.life));
        let (later, now): (Vec<_>, Vec<_>) = records.iter().cloned().partition(|record| record.topic == *late);
        let mut now = self.store(&now).into_iter();
        self.world.dawdle(3_000).await;
        self.world.reachable().await;
        let mut later = self.store(&later).into_iter();
        records.iter().filter_map(|record| if record.topic == *late { later.next() } else { now.next() }).collect()
    }

    /// The producer fails with everything that it has: the first so many are stored all the same, where the broker may have got them.
    fn fail_all(&self, kind: ProduceErrorKind) {
        let queued = std::mem::take(&mut *self.queue.lock().expect("one thread"));
        let total: usize = queued.iter().map(|sending| sending.records.len()).sum();
        let mut stored = match kind {
            ProduceErrorKind::Unavailable => 0,
            _ => self.world.draw(|chance| chance.below(total as u64 + 1)) as usize,
        };
        self.world.note(|| format!("{} sending fails with {kind:?} for {total} records; {stored} are stored", self.life));
        for sending in queued {
            let now = stored.min(sending.records.len());
            stored -= now;
            drop(self.store(&sending.records[..now]));
            let results = sending.records.iter().map(|_| failed(kind)).collect();
            self.answer(sending, results, 0);
        }
    }

    /// Answers, after a while.
    fn answer(&self, sending: Sending, mut results: Results, latency_ms: u64) {
        let world = self.world.clone();
        results.extend((0..sending.refused).map(|_| failed(ProduceErrorKind::QueueFull)));
        tokio::spawn(async move {
            world.dawdle(latency_ms).await;
            for (record, result) in sending.records.iter().zip(&results) {
                if let Ok(position) = result {
                    world.judge(|ledger| ledger.acknowledged(record, position));
                }
            }
            drop(sending.reply.send(results));
        });
    }

    fn store(&self, records: &[Outgoing]) -> Results {
        if records.is_empty() {
            return Vec::new();
        }
        let results = self.inner.producer().send(records.to_vec()).now_or_never().expect("in memory it answers at once");
        for (record, result) in records.iter().zip(&results) {
            if let Ok(position) = result {
                self.world.note(|| format!("{} stores {} of {}", self.life, position, super::ledger::name(record)));
                self.world.judge(|ledger| ledger.stored(&self.life, record, position));
            }
        }
        results
    }
}

impl Producer for RoughProducer {
    fn send(&self, mut records: Vec<Outgoing>) -> Acks {
        let (reply, answer) = oneshot::channel();
        let room = match self.world.goes_wrong(self.world.plan.produce.full) {
            true => self.world.draw(|chance| chance.below(records.len() as u64)) as usize,
            false => records.len(),
        };
        let refused = records.len() - room;
        records.truncate(room);
        if refused > 0 {
            self.world.note(|| format!("{} queue full: {room} are taken, {refused} are not", self.life));
        }
        self.queue.lock().expect("one thread").push_back(Sending { records, refused, reply });
        self.arrived.notify_one();
        Box::pin(async move { answer.await.unwrap_or_default() })
    }

    fn known_partitions(&self, topic: &str) -> Option<i32> {
        self.inner.producer().known_partitions(topic)
    }

    fn learn_topic(&self, topic: &str, _deadline: Duration) -> BoxFuture<'_, Result<i32, ProduceError>> {
        let count =
            self.known_partitions(topic).ok_or_else(|| ProduceError { kind: ProduceErrorKind::UnknownTopic, detail: topic.to_owned() });
        Box::pin(async move { count })
    }
}

struct RoughConsumer {
    world: Arc<World>,
    life: Arc<Life>,
    broker: Arc<EmbeddedBroker>,
    config: ConsumerConfig,
    /// The member of the group; `None` before it (re)joins.
    inner: Option<Box<dyn Consumer>>,
    rejoin: Instant,
    /// The partitions that the loop has, and the next offset that it gets of each.
    cursors: BTreeMap<TopicPartition, i64>,
    held: BTreeSet<TopicPartition>,
    /// What came and was not given out.
    fetched: VecDeque<(TopicPartition, Vec<(i64, Record)>)>,
    /// A revocation is not answered yet.
    barrier: Arc<AtomicBool>,
    trouble: bool,
    /// Until when it does not hear that its session is over.
    deaf: Option<Instant>,
    /// When it was last asked for an event, and how often since the clock moved.
    turns: (Instant, u32),
}

/// How often a loop may look for something to do without that any time passes.
const TURNS: u32 = 200_000;

impl RoughConsumer {
    /// A loop that never waits stops the clock of a simulation, and wastes a processor anywhere else.
    fn calm(&mut self) {
        let now = Instant::now();
        self.turns = if self.turns.0 == now { (now, self.turns.1 + 1) } else { (now, 0) };
        if self.turns.1 > TURNS {
            self.world.judge(|_| Err(format!("{} is busy and does nothing", self.life)));
            panic!("{} is busy and does nothing", self.life);
        }
    }

    /// What can be said without waiting.
    fn ready(&mut self) -> Option<Event> {
        if self.is_out() && !self.is_deaf() {
            self.deaf = None;
            return self.lose();
        }
        let outage = self.world.state().outage;
        if outage != self.trouble {
            self.trouble = outage;
            let error = BrokerError::new(BrokerErrorKind::Unreachable, "simulated: the broker cannot be reached");
            return Some(if outage { Event::Trouble(error) } else { Event::Recovered });
        }
        if self.barrier.load(Ordering::Relaxed) || outage {
            return None;
        }
        self.expired().or_else(|| self.part())
    }

    /// Whether the session is over.
    fn is_out(&self) -> bool {
        self.life.is_evicted() && self.config.group.is_some()
    }

    /// Whether it has not heard of that yet. It goes on with what it has, and what it reads beside the group comes as ever.
    fn is_deaf(&mut self) -> bool {
        let world = &self.world;
        let until = *self.deaf.get_or_insert_with(|| {
            let most = if world.draw(|chance| chance.once_in(2)) { 5_000 } else { 0 };
            Instant::now() + Duration::from_millis(world.draw(|chance| chance.below(most + 1)))
        });
        Instant::now() < until
    }

    /// The session is over: everything is lost.
    fn lose(&mut self) -> Option<Event> {
        self.life.rejoins();
        self.inner = None;
        self.rejoin = Instant::now() + Duration::from_millis(self.world.draw(|chance| chance.below(2_000)));
        self.fetched.clear();
        self.held.clear();
        self.barrier = Arc::default();
        let partitions: Vec<TopicPartition> = std::mem::take(&mut self.cursors).into_keys().collect();
        (!partitions.is_empty()).then(|| self.revoking(partitions, true, oneshot::channel().0))
    }

    fn revoking(&mut self, partitions: Vec<TopicPartition>, lost: bool, done: oneshot::Sender<Vec<Commit>>) -> Event {
        for partition in &partitions {
            self.cursors.remove(partition);
            self.held.remove(partition);
        }
        self.fetched.retain(|(partition, _)| !partitions.contains(partition));
        self.world.note(|| format!("{} gives away {}{}", self.life, names(&partitions), if lost { ", which are lost" } else { "" }));
        self.world.judge(|ledger| ledger.revoked(&self.life, &partitions, lost));
        if lost {
            return Event::Revoking(Revoking { partitions, lost, done });
        }
        self.barrier = Arc::new(AtomicBool::new(true));
        let (answered, mut answer) = oneshot::channel();
        let (world, life, barrier, given) = (self.world.clone(), self.life.clone(), self.barrier.clone(), partitions.clone());
        tokio::spawn(async move {
            let patience = Duration::from_millis(world.plan.revoke_timeout_ms);
            let heard = tokio::time::timeout(patience, &mut answer).await;
            let in_time = heard.is_ok();
            let commits: Vec<Commit> = heard.ok().and_then(Result::ok).unwrap_or_default();
            life.moves().await;
            world.note(|| format!("{life} ends with {}", commits.iter().map(shown).collect::<Vec<_>>().join(" ")));
            world.judge(|ledger| ledger.committing(&life, &commits));
            let fails = world.goes_wrong(world.plan.commit.last);
            // The broker does not wait any longer, but the loop still thinks that it has them.
            let late = if in_time {
                drop(done.send(if fails { Vec::new() } else { commits }));
                None
            } else {
                Some(done)
            };
            world.judge(|ledger| ledger.given_away(&life, &given));
            barrier.store(false, Ordering::Relaxed);
            world.changed();
            if let Some(done) = late {
                drop(answer.await);
                drop(done);
            }
        });
        Event::Revoking(Revoking { partitions, lost, done: answered })
    }

    /// What the broker deleted before it was read.
    fn expired(&mut self) -> Option<Event> {
        let lows = self.world.state().lows.clone();
        for (partition, low) in lows {
            let Some(next) = self.cursors.get_mut(&partition).filter(|next| **next < low) else { continue };
            let from = std::mem::replace(next, low);
            for (of, records) in &mut self.fetched {
                if *of == partition {
                    records.retain(|(offset, _)| *offset >= low);
                }
            }
            self.world.note(|| format!("{} hears that {partition} {from}..{low} expired", self.life));
            self.world.judge(|ledger| ledger.expired(&self.life, &partition, from, low));
            return Some(Event::Expired { partition, from, to: low });
        }
        None
    }

    /// The next part of what came.
    fn part(&mut self) -> Option<Event> {
        let index = self.fetched.iter().position(|(partition, _)| !self.held.contains(partition))?;
        let most = self.world.draw(|chance| chance.between(1, self.world.plan.part)) as usize;
        let (partition, records) = &mut self.fetched[index];
        let partition = partition.clone();
        let rest = records.split_off(most.min(records.len()));
        let records = std::mem::replace(records, rest);
        if self.fetched[index].1.is_empty() {
            self.fetched.remove(index);
        }
        if let (Some((last, _)), Some(next)) = (records.last(), self.cursors.get_mut(&partition)) {
            *next = last + 1;
        }
        Some(Event::Records(Batch { partition, records }))
    }

    /// What the group's member said.
    fn heard(&mut self, event: Event) -> Option<Event> {
        match event {
            Event::Records(batch) if self.config.group.is_none() => {
                let offsets = batch.records.iter().map(|(offset, _)| *offset);
                self.world.state().ledger.read(&batch.partition, offsets);
                self.fetched.push_back((batch.partition, batch.records));
                None
            }
            Event::Records(batch) => {
                let (ledger, next) = (&self.world.state().ledger, self.cursors.get(&batch.partition).copied().unwrap_or(i64::MAX));
                // What expired in the meantime was told already.
                let there = |offset: i64| offset >= next && ledger.exists(&batch.partition, offset);
                let records: Vec<_> = batch.records.into_iter().filter(|(offset, _)| there(*offset)).collect();
                self.fetched.push_back((batch.partition, records));
                None
            }
            Event::Assigned(assigned) => {
                for one in &assigned {
                    self.cursors.insert(one.partition.clone(), one.position);
                }
                let list = assigned.iter().map(|one| format!("{} at {} {}", one.partition, one.position, one.metadata));
                self.world.note(|| format!("{} gets {}", self.life, list.collect::<Vec<_>>().join(", ")));
                let sides = assigned.iter().flat_map(|one| beside(&self.world, &one.partition)).collect();
                let sides = committed(&self.broker, sides);
                self.world.judge(|ledger| ledger.known(sides).and_then(|()| ledger.assigned(&self.life, &assigned)));
                Some(Event::Assigned(assigned))
            }
            Event::Revoking(Revoking { partitions, lost, done }) => Some(self.revoking(partitions, lost, done)),
            other => Some(other),
        }
    }

    fn join(&mut self) {
        let group = self.config.group.clone().unwrap_or_default();
        match self.broker.consumer(self.config.clone()) {
            Ok(inner) => {
                self.inner = Some(inner);
                self.life.member.store(self.broker.newest_member(&group), Ordering::Relaxed);
                self.world.note(|| format!("{} joins", self.life));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// The partitions of retry and park topics that belong to one of a source.
pub(super) fn beside(world: &World, source: &TopicPartition) -> Vec<TopicPartition> {
    let topics = world.plan.beside(&source.topic).into_iter();
    topics.map(|topic| TopicPartition::new(topic, source.partition)).collect()
}

/// What the group committed of partitions, as the broker has it.
pub(super) fn committed(broker: &Arc<EmbeddedBroker>, partitions: Vec<TopicPartition>) -> Vec<Commit> {
    let found = broker.admin().committed(super::GROUP, partitions).now_or_never().expect("in memory it answers at once");
    found.expect("offsets").into_iter().flatten().collect()
}

fn names(partitions: &[TopicPartition]) -> String {
    partitions.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn shown(commit: &Commit) -> String {
    format!("{}@{} {}", commit.partition, commit.offset, commit.metadata)
}

/// Topics and offsets, with the same network before them.
struct RoughAdmin {
    world: Arc<World>,
    inner: Arc<dyn Admin>,
}

impl RoughAdmin {
    /// Waits for what was asked, or fails.
    async fn rough<T>(&self, asked: BoxFuture<'_, Result<T, BrokerError>>) -> Result<T, BrokerError> {
        let faults = self.world.plan.commit;
        self.world.dawdle(faults.latency_ms).await;
        if self.world.state().outage || self.world.goes_wrong(faults.refused) {
            return Err(BrokerError::new(BrokerErrorKind::Unreachable, "simulated: the broker cannot be reached"));
        }
        asked.await
    }
}

impl Admin for RoughAdmin {
    fn topics(&self) -> BoxFuture<'_, Result<Arc<BTreeMap<String, i32>>, BrokerError>> {
        Box::pin(self.rough(self.inner.topics()))
    }

    fn create_topics(&self, topics: Vec<NewTopic>) -> BoxFuture<'_, Result<(), BrokerError>> {
        self.inner.create_topics(topics)
    }

    fn watermarks(&self, partition: &TopicPartition) -> BoxFuture<'_, Result<(i64, i64), BrokerError>> {
        self.inner.watermarks(partition)
    }

    fn readable(&self, from: Vec<Position>) -> BoxFuture<'_, Vec<Result<bool, BrokerError>>> {
        Box::pin(async move {
            let mut found = Vec::with_capacity(from.len());
            for position in from {
                let asked = async { self.inner.readable(vec![position]).await.pop().unwrap_or(Ok(true)) };
                found.push(self.rough(asked.boxed()).await);
            }
            found
        })
    }

    fn offsets_at(&self, topic: &str, timestamp_ms: i64) -> BoxFuture<'_, Result<Vec<i64>, BrokerError>> {
        self.inner.offsets_at(topic, timestamp_ms)
    }

    fn committed(&self, group: &str, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Result<Vec<Option<Commit>>, BrokerError>> {
        self.inner.committed(group, partitions)
    }

    fn commit_for(&self, group: &str, offsets: Vec<Commit>) -> BoxFuture<'_, Result<(), BrokerError>> {
        self.inner.commit_for(group, offsets)
    }

    fn delete_records(&self, below: Vec<(TopicPartition, i64)>) -> BoxFuture<'_, Result<(), BrokerError>> {
        self.inner.delete_records(below)
    }
}

impl Consumer for RoughConsumer {
    fn next(&mut self) -> BoxFuture<'_, Event> {
        Box::pin(async move {
            let world = self.world.clone();
            self.calm();
            loop {
                let mut changed = std::pin::pin!(world.change.notified());
                changed.as_mut().enable();
                if let Some(event) = self.ready() {
                    return event;
                }
                if self.inner.is_none() {
                    if self.life.ending.load(Ordering::Relaxed) {
                        // It would take the identity of the one that runs by now.
                        std::future::pending::<()>().await;
                    }
                    tokio::time::sleep_until(self.rejoin).await;
                    self.join();
                }
                let deaf = self.deaf.filter(|_| self.is_out());
                let Some(inner) = &mut self.inner else { continue };
                let outage = self.trouble;
                let event = tokio::select! {
                    biased;
                    () = changed => continue,
                    () = tokio::time::sleep_until(deaf.unwrap_or_else(Instant::now)), if deaf.is_some() => continue,
                    event = inner.next(), if !outage && deaf.is_none() => event,
                };
                if let Some(event) = self.heard(event) {
                    return event;
                }
            }
        })
    }

    fn hold(&mut self, partition: &TopicPartition) {
        self.held.insert(partition.clone());
    }

    fn release(&mut self, partition: &TopicPartition) {
        self.held.remove(partition);
    }

    fn seek(&mut self, partition: &TopicPartition, offset: i64) {
        if let Some(inner) = &mut self.inner {
            inner.seek(partition, offset);
        }
    }

    fn assign(&mut self, partitions: Vec<(TopicPartition, i64)>) {
        for (partition, offset) in &partitions {
            self.world.note(|| format!("{} reads {partition} from {offset}", self.life));
            self.held.remove(partition);
            self.fetched.retain(|(of, _)| of != partition);
        }
        if let Some(inner) = &mut self.inner {
            inner.assign(partitions);
        }
    }

    fn unassign(&mut self, partitions: &[TopicPartition]) {
        self.fetched.retain(|(of, _)| !partitions.contains(of));
        if let Some(inner) = &mut self.inner {
            inner.unassign(partitions);
        }
    }

    fn commit(&self, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), BrokerError>> {
        let (world, life, faults) = (self.world.clone(), self.life.clone(), self.world.plan.commit);
        world.note(|| format!("{life} commits {}", offsets.iter().map(shown).collect::<Vec<_>>().join(" ")));
        world.judge(|ledger| ledger.committing(&life, &offsets));
        let error = |kind| Err(BrokerError::new(kind, format!("simulated: {kind:?}")));
        let outage = world.state().outage;
        let result = match &self.inner {
            _ if outage || world.goes_wrong(faults.refused) => error(BrokerErrorKind::Unreachable),
            Some(inner) if !self.life.is_evicted() => {
                let made = inner.commit(offsets.clone()).now_or_never().expect("in memory it answers at once");
                if made.is_ok() {
                    world.judge(|ledger| ledger.committed(&life, &offsets));
                }
                if world.goes_wrong(faults.unheard) { made.and_then(|()| error(BrokerErrorKind::Other)) } else { made }
            }
            _ => error(BrokerErrorKind::Fenced),
        };
        world.note(|| format!("{life} commit: {result:?}"));
        Box::pin(async move {
            world.dawdle(faults.latency_ms).await;
            result
        })
    }

    fn transact(&self, records: Vec<Outgoing>, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), TransactionError>> {
        let (world, life, faults) = (self.world.clone(), self.life.clone(), self.world.plan.produce);
        world.note(|| format!("{life} transacts {} with {}", records.len(), offsets.iter().map(shown).collect::<Vec<_>>().join(" ")));
        let outage = world.state().outage;
        let (aborts, lost) = (world.goes_wrong(faults.unavailable), world.goes_wrong(faults.fatal));
        // Of one whose end is not known, either may be.
        let unmade = aborts || outage || (lost && world.draw(|chance| chance.once_in(2)));
        let result = match &self.inner {
            Some(inner) if !self.life.is_evicted() && !unmade => {
                let result = inner.transact(records.clone(), offsets.clone()).now_or_never().expect("in memory it answers at once");
                if result.is_ok() {
                    let stored: Vec<_> = records.iter().map(super::ledger::name).collect();
                    world.note(|| format!("{life} stores {}", stored.join(", ")));
                    world.judge(|ledger| ledger.transacted(&life, &records, &offsets));
                }
                result
            }
            Some(_) if unmade => Err(TransactionError::Aborted(BrokerError::new(BrokerErrorKind::Unreachable, "simulated: aborted"))),
            _ => Err(TransactionError::Fenced(BrokerError::new(BrokerErrorKind::Fenced, "simulated: no member"))),
        };
        let (broker, group) = (self.broker.clone(), self.config.group.clone().unwrap_or_default());
        Box::pin(async move {
            world.dawdle(faults.latency_ms).await;
            world.note(|| format!("{life} transaction: {result:?}{}", if lost { ", which is not heard" } else { "" }));
            if !lost {
                return result;
            }
            broker.evict(&group, life.member.load(Ordering::Relaxed));
            life.evict();
            world.changed();
            Err(TransactionError::Lost(BrokerError::new(BrokerErrorKind::Unreachable, "simulated: its end is not known")))
        })
    }

    fn close(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        let inner = self.inner.take();
        if self.config.group.is_some() {
            self.world.note(|| format!("{} leaves", self.life));
            self.world.state().ledger.gone(&self.life);
        }
        Box::pin(async move {
            if let Some(inner) = inner {
                inner.close().await;
            }
        })
    }
}

impl Drop for RoughConsumer {
    fn drop(&mut self) {
        let Some(inner) = self.inner.take().filter(|_| self.config.group.is_some()) else { return };
        // It died: the group learns of it when its session ends.
        let world = self.world.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                world.dawdle(10_000).await;
                drop(inner);
            });
        }
    }
}
