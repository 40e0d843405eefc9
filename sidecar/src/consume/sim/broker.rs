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
        Acks, Admin, Broker, BrokerError, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, Outgoing, ProduceError,
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
        Ok(Box::new(RoughConsumer {
            world: self.world.clone(),
            life: self.life.clone(),
            broker: self.inner.clone(),
            config,
            inner: None,
            rejoin: Instant::now(),
            cursors: BTreeMap::new(),
            held: BTreeSet::new(),
            fetched: VecDeque::new(),
            barrier: Arc::default(),
            trouble: false,
        }))
    }

    fn admin(&self) -> Arc<dyn Admin> {
        self.inner.admin()
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
                        let results = self.store(&sending.records);
                        self.answer(sending, results, faults.latency_ms);
                    }
                }
            }
        }
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
                if result.is_ok() {
                    world.judge(|ledger| ledger.acknowledged(record));
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
                self.world.judge(|ledger| ledger.stored(record, position));
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
}

impl RoughConsumer {
    /// What can be said without waiting.
    fn ready(&mut self) -> Option<Event> {
        if self.life.is_evicted() {
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
        let (answered, answer) = oneshot::channel();
        let (world, life, barrier, given) = (self.world.clone(), self.life.clone(), self.barrier.clone(), partitions.clone());
        tokio::spawn(async move {
            let patience = Duration::from_millis(world.plan.revoke_timeout_ms);
            let commits: Vec<Commit> = tokio::time::timeout(patience, answer).await.ok().and_then(Result::ok).unwrap_or_default();
            life.moves().await;
            world.note(|| format!("{life} ends with {}", commits.iter().map(shown).collect::<Vec<_>>().join(" ")));
            world.judge(|ledger| ledger.committing(&life, &commits));
            let fails = world.goes_wrong(world.plan.commit.last);
            drop(done.send(if fails { Vec::new() } else { commits }));
            world.judge(|ledger| ledger.given_away(&life, &given));
            barrier.store(false, Ordering::Relaxed);
            world.changed();
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
                self.world.judge(|ledger| ledger.assigned(&self.life, &assigned));
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

fn names(partitions: &[TopicPartition]) -> String {
    partitions.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn shown(commit: &Commit) -> String {
    format!("{}@{} {}", commit.partition, commit.offset, commit.metadata)
}

impl Consumer for RoughConsumer {
    fn next(&mut self) -> BoxFuture<'_, Event> {
        Box::pin(async move {
            let world = self.world.clone();
            loop {
                let mut changed = std::pin::pin!(world.change.notified());
                changed.as_mut().enable();
                if let Some(event) = self.ready() {
                    return event;
                }
                if self.inner.is_none() {
                    tokio::time::sleep_until(self.rejoin).await;
                    self.join();
                }
                let Some(inner) = &mut self.inner else { continue };
                let outage = self.trouble;
                let event = tokio::select! {
                    biased;
                    () = changed => continue,
                    event = inner.next(), if !outage => event,
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
        if let Some(inner) = &mut self.inner {
            inner.assign(partitions);
        }
    }

    fn unassign(&mut self, partitions: &[TopicPartition]) {
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
        match &self.inner {
            Some(inner) if !self.life.is_evicted() => inner.transact(records, offsets),
            _ => Box::pin(async { Err(TransactionError::Fenced(BrokerError::new(BrokerErrorKind::Fenced, "simulated: no member"))) }),
        }
    }

    fn close(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        let inner = self.inner.take();
        self.world.note(|| format!("{} leaves", self.life));
        Box::pin(async move {
            if let Some(inner) = inner {
                inner.close().await;
            }
        })
    }
}

impl Drop for RoughConsumer {
    fn drop(&mut self) {
        let Some(inner) = self.inner.take() else { return };
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
