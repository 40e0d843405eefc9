//! A simulation of routes: the real loop, watermark, lanes, retries, rebalance and commit, on the embedded broker in memory, with a paused
//! clock. One seed decides everything: the records, the route, what the service says, who dies when, and what the broker does.
//!
//! | file | what |
//! |---|---|
//! | `plan` | what is decided beforehand |
//! | `broker` | the broker as one process sees it: latency, outages, lost acknowledgements, sessions that end |
//! | `service` | what is called |
//! | `ledger` | the model: what must hold, from what crosses the seams |
//! | `sides` | its part about retry and park topics |
//! | `world` | what they share |
//!
//! Invariant: same seed, same log of events. Nothing here, and nothing that runs here, asks the system for time, chance or a thread.
//!
//! `cargo test -p mesh-sidecar --lib simulation` runs seeds, thousands with `CI` set; `MESH_SIM_SEED=17` runs one, and prints what happened;
//! `MESH_SIM_SEEDS=50000` so many, from `MESH_SIM_FROM` on.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use mesh_routing::Route;
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use self::{
    broker::{Rough, beside, committed},
    chance::Chance,
    plan::{Fault, Plan, Planned},
    world::{Life, World},
};
use super::{
    in_place,
    route::{Parts, RouteLoop},
};
use crate::{
    broker::{
        Broker as _, NewTopic, Outgoing,
        embedded::{EmbeddedBroker, EmbeddedConfig},
    },
    command::{self, Commands},
    parking::Release,
    record::{Header, Record, TopicPartition, simulated},
    status::Board,
    telemetry::{metrics::Metrics, trace::Tracer},
};

mod broker;
mod chance;
mod ledger;
mod plan;
mod service;
mod sides;
mod tests;
mod world;

const GROUP: &str = "sim.work";

/// What a run came to.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) log: Vec<String>,
    /// What does not hold, if anything.
    pub(super) broken: Option<String>,
    pub(super) deliveries: u64,
    pub(super) commits: u64,
    /// The simulated time, in milliseconds.
    pub(super) took_ms: u64,
}

/// One run.
pub(super) fn simulate(seed: u64, keep_log: bool) -> Run {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        simulated::start(Some(Instant::now()));
        let world = World::new(Plan::draw(seed), keep_log);
        let broken = Stage::set(&world).run().await.err();
        let state = world.state();
        let (deliveries, commits) = (state.ledger.deliveries, state.ledger.commits);
        drop(state);
        let took_ms = world.start.elapsed().as_millis() as u64;
        simulated::start(None);
        Run { log: world.take_log(), broken, deliveries, commits, took_ms }
    })
}

/// A process that runs, or that ends by itself.
struct Actor {
    life: Arc<Life>,
    broker: Arc<Rough>,
    stop: CancellationToken,
    route: watch::Sender<Arc<Route>>,
    task: JoinHandle<()>,
    board: Board,
    metrics: Metrics,
    commands: Commands,
}

struct Stage {
    world: Arc<World>,
    broker: Arc<EmbeddedBroker>,
    running: BTreeMap<usize, Actor>,
    ending: Vec<Actor>,
    lives: usize,
    route: Arc<Route>,
}

impl Stage {
    fn set(world: &Arc<World>) -> Self {
        let plan = &world.plan;
        let config = EmbeddedConfig {
            default_retention: None,
            max_record_bytes: service::RECORD_BYTES,
            revoke_timeout: Duration::from_millis(plan.revoke_timeout_ms),
            housekeeping: Duration::from_secs(86_400),
            ..EmbeddedConfig::new("")
        };
        let broker = EmbeddedBroker::in_memory(config).expect("a broker in memory");
        let sources = plan.sources.iter().map(|name| (name.to_string(), plan.partitions));
        let others = ["out", "copy", "review", "work.dlq"].into_iter().map(|name| (name.to_owned(), 2));
        let beside = plan.sources.iter().flat_map(|source| plan.beside(source)).map(|name| (name, plan.partitions));
        let topics =
            sources.chain(others).chain(beside).map(|(name, count)| NewTopic { name, partitions: Some(count), ..NewTopic::default() });
        broker.admin().create_topics(topics.collect()).now_or_never().expect("in memory it answers at once").expect("topics");
        let route = plan.routes[0].clone();
        Self { world: world.clone(), broker, running: BTreeMap::new(), ending: Vec::new(), lives: 0, route }
    }

    /// Everything, to the end.
    async fn run(mut self) -> Result<(), String> {
        let world = self.world.clone();
        let plan = &world.plan;
        world.note(|| format!("{:?} {:?} {:?} gaps {}", plan.produce, plan.commit, plan.service, plan.gaps));
        for route in &plan.routes {
            let (to, spec) = (&route.to, &route.retry);
            world.note(|| format!("{:?} {to:?} {spec:?} {:?} concurrency {}", route.order, route.timeout, route.concurrency));
            let (topics, batch, guarantee) = (&route.retry_topics, route.batch, route.guarantee);
            world.note(|| format!("{topics:?} {:?} {batch:?} {guarantee:?}", route.on_exhausted));
        }
        let (mut records, mut faults) = (plan.records.iter().peekable(), plan.faults.iter().peekable());
        if plan.is_calm() {
            self.start(0);
        }
        loop {
            let next = records.peek().map(|record| record.at_ms).into_iter().chain(faults.peek().map(|(at, _)| *at)).min();
            let Some(next) = next else { break };
            tokio::time::sleep_until(world.start + Duration::from_millis(next)).await;
            while let Some(record) = records.next_if(|record| record.at_ms <= next) {
                self.publish(record);
            }
            while let Some((_, fault)) = faults.next_if(|(at, _)| *at <= next) {
                self.fault(fault).await;
            }
            if let Some(broken) = world.broken() {
                return Err(broken);
            }
        }
        self.calm_down().await;
        self.settle().await?;
        self.end().await
    }

    fn publish(&self, planned: &Planned) {
        let mut headers = Vec::new();
        if planned.hops > 0 {
            headers.push(Header::new("mesh-hops", planned.hops.to_string()));
        }
        let key = planned.key.map(|key| format!("k{key}").into());
        let record = Record { key, value: Some(planned.value.clone().into()), headers, timestamp_ms: None };
        let topic = self.world.plan.sources[planned.source].clone();
        let sent = self.broker.producer().send(vec![Outgoing { topic, partition: None, record }]).now_or_never();
        let position = sent.expect("in memory it answers at once").remove(0).expect("it is stored");
        // Whoever is woken by it runs later.
        let mut state = self.world.state();
        state.ledger.published(planned, &position);
        let hidden = !state.ledger.exists(&position.partition, position.offset);
        drop(state);
        let said = || (1..=4).map(|attempt| format!("{:?}", service::says(&self.world.plan, planned.number, attempt))).collect::<Vec<_>>();
        let gap = if hidden { ", which is a gap" } else { "" };
        self.world.note(|| format!("{position} of {:?}{gap}: {}", planned.key, said().join(", ")));
    }

    async fn fault(&mut self, fault: &Fault) {
        self.world.note(|| format!("-- {fault:?}"));
        match *fault {
            Fault::Start { process } => self.start(process),
            Fault::Crash { process } => {
                if let Some(actor) = self.running.remove(&process) {
                    actor.life.dead.store(true, Ordering::Relaxed);
                    actor.task.abort();
                    let _ = actor.task.await;
                    actor.broker.end();
                    self.world.state().ledger.gone(&actor.life);
                }
            }
            Fault::Stop { process } => {
                if let Some(actor) = self.running.remove(&process) {
                    self.stop(actor);
                }
            }
            Fault::Freeze { process } => self.each(process, |actor| actor.life.freeze(true)),
            Fault::Thaw { process } => self.each(process, |actor| actor.life.freeze(false)),
            Fault::Evict { process } => {
                if let Some(actor) = self.running.get(&process) {
                    let member = actor.life.member.load(Ordering::Relaxed);
                    self.broker.evict(GROUP, member);
                    actor.life.evict();
                }
            }
            Fault::Outage { on } => self.world.state().outage = on,
            Fault::Away { process, on } => self.each(process, |actor| actor.life.away.store(on, Ordering::Relaxed)),
            Fault::Swap { route } => {
                self.route = self.world.plan.routes[route].clone();
                for process in self.running.keys().copied().collect::<Vec<_>>() {
                    self.swap(process);
                }
            }
            Fault::Release { key, how } => self.release(key.map(|key| Some(format!("k{key}").into())), how),
            Fault::Delete { source, partition, percent } => self.delete(source, partition, percent),
        }
        self.world.changed();
    }

    fn stop(&mut self, actor: Actor) {
        actor.life.ending.store(true, Ordering::Relaxed);
        actor.stop.cancel();
        self.ending.push(actor);
    }

    /// A process takes the route of the table in force.
    fn swap(&mut self, process: usize) {
        let Some(actor) = self.running.get(&process) else { return };
        let in_place = in_place(&actor.route.borrow(), &self.route);
        if in_place {
            actor.route.send_replace(self.route.clone());
        } else if let Some(actor) = self.running.remove(&process) {
            self.stop(actor);
            self.start(process);
        }
    }

    /// Tells all processes to release what waits.
    fn release(&self, key: Option<Option<Bytes>>, how: Release) {
        self.world.state().ledger.released(how);
        for actor in self.running.values() {
            let (commands, key) = (actor.commands.clone(), key.clone());
            tokio::spawn(async move { commands.release("work", key, how, Vec::new()).await });
        }
    }

    /// Does something to all that runs of a process.
    fn each(&self, process: usize, what: impl FnMut(&Actor)) {
        self.running.values().chain(&self.ending).filter(|actor| actor.life.process == process).for_each(what);
    }

    fn delete(&self, source: usize, partition: i32, percent: u64) {
        let partition = TopicPartition::new(self.world.plan.sources[source].clone(), partition);
        let mut state = self.world.state();
        let low = state.lows.get(&partition).copied().unwrap_or(0);
        let high = state.ledger.high(&partition);
        let low = low.max(high * percent as i64 / 100);
        state.lows.insert(partition.clone(), low);
        state.ledger.deleted(&partition, low);
        drop(state);
        self.world.note(|| format!("{partition} begins at {low} now"));
    }

    fn start(&mut self, process: usize) {
        if self.running.contains_key(&process) {
            return;
        }
        self.lives += 1;
        let life = Life::new(process, self.lives);
        let leaf = service::service(&self.world, &life);
        let broker = Rough::new(&self.world, &life, &self.broker);
        let (route, changes) = watch::channel(self.route.clone());
        let (board, metrics, stop) = (Board::default(), Metrics::new(), CancellationToken::new());
        let (commands, commanded) = command::channel();
        let name = if self.world.plan.named { process } else { self.lives };
        let parts = Parts {
            broker: broker.clone(),
            leaf,
            metrics: metrics.route(&self.route.name, &self.route.service),
            tracer: Tracer::disabled(),
            board: board.clone(),
            route: changes,
            applied_ms: 0,
            commands: commanded,
            paused: crate::pause::never(),
            instance: None,
            transactional_id: format!("sim/{name}"),
            buffer_bytes: 1 << 20,
            drain_timeout: Duration::from_secs(5),
            stop: stop.clone(),
            seed: Chance::of(self.world.plan.seed, 7_000 + self.lives as u64).next(),
        };
        self.world.note(|| format!("{life} starts"));
        let route_loop = RouteLoop::new(parts).expect("a loop");
        let task = tokio::spawn(life.clone().live(route_loop.run()));
        self.running.insert(process, Actor { life, broker, stop, route, task, board, metrics, commands });
    }

    /// All faults are over.
    async fn calm_down(&mut self) {
        self.world.note(|| "-- all faults are over".to_owned());
        {
            let mut state = self.world.state();
            (state.outage, state.over) = (false, true);
        }
        for actor in self.running.values().chain(&self.ending) {
            actor.life.freeze(false);
            actor.life.away.store(false, Ordering::Relaxed);
        }
        if self.running.is_empty() {
            self.start(0);
        }
        self.world.changed();
    }

    /// Waits until everything is complete and committed.
    async fn settle(&self) -> Result<(), String> {
        let patience = Duration::from_millis(self.world.plan.patience_ms());
        let deadline = Instant::now() + patience;
        let (mut rounds, releases) = (0u64, self.world.plan.releases() && !self.world.plan.leaves_parked);
        loop {
            rounds += 1;
            if releases && rounds.is_multiple_of(10) {
                let how = if rounds == 10 { Release::Retry } else { Release::Discard };
                self.release(None, how);
            }
            if let Some(broken) = self.world.broken() {
                return Err(broken);
            }
            let mut open = self.world.state().ledger.open();
            if open.is_none() {
                open = self.uncommitted();
            }
            let Some(open) = open else { return Ok(()) };
            if Instant::now() >= deadline {
                let status: Vec<_> = self.running.values().flat_map(|actor| actor.board.routes()).collect();
                return Err(format!("after {patience:?} without a fault: {open}; {status:?}"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn uncommitted(&self) -> Option<String> {
        let expected = self.world.state().ledger.expected();
        let beside = expected.keys().flat_map(|partition| beside(&self.world, partition)).collect();
        let beside = committed(&self.broker, beside);
        self.world.judge(|ledger| ledger.known(beside));
        if let Some(left) = self.world.state().ledger.left_over() {
            return Some(left);
        }
        let partitions = expected.keys().cloned().collect();
        let admin = self.broker.admin();
        let committed = admin.committed(GROUP, partitions).now_or_never().expect("in memory it answers at once").expect("offsets");
        expected.iter().zip(committed).find_map(|((partition, expected), commit)| {
            let offset = commit.map_or(0, |commit| commit.offset);
            (offset != *expected).then(|| format!("{partition} is committed at {offset} instead of {expected}"))
        })
    }

    /// Everybody drains; then the sums must be right.
    async fn end(mut self) -> Result<(), String> {
        self.world.note(|| "-- the end".to_owned());
        let calm = self.world.plan.is_calm();
        self.ending.extend(std::mem::take(&mut self.running).into_values());
        for actor in std::mem::take(&mut self.ending) {
            actor.stop.cancel();
            let life = &actor.life;
            match tokio::time::timeout(Duration::from_secs(30), actor.task).await {
                Err(_) => return Err(format!("{life} does not end")),
                Ok(Err(error)) => return Err(format!("{life} failed: {error}")),
                Ok(Ok(())) => {}
            }
            actor.broker.end();
            let metrics = actor.metrics.route(&self.route.name, &self.route.service);
            let answers = self.world.state().ledger.answers(life);
            let told = metrics.delivery_duration.count();
            if told > answers {
                return Err(format!("{life} counts {told} deliveries, the service {answers} answers"));
            }
            if calm {
                let status = actor.board.routes().remove(0);
                let model = self.world.state().ledger.dispositions();
                let known = self.world.state().ledger.is_sure();
                let (sum, ended) = (status.dispositions.values().sum::<u64>(), self.world.state().ledger.ended());
                if sum != ended {
                    return Err(format!("{life} counts {sum} records as ended instead of {ended}: {status:?}"));
                }
                if (status.dispositions != model && known) || told != answers || metrics.in_flight.get() != 0 {
                    return Err(format!("{life} counts {status:?}, {told} deliveries; the model {model:?}, {answers}"));
                }
            }
        }
        if let Some(broken) = self.world.broken() {
            return Err(broken);
        }
        self.world.state().ledger.close()
    }
}

/// Runs seeds on all threads, until so many do not hold; those, by number.
fn search(from: u64, count: u64, enough: usize, run: impl Fn(u64) -> Run + Sync) -> (BTreeMap<u64, Run>, Totals) {
    let next = AtomicU64::new(from);
    let all: Mutex<(BTreeMap<u64, Run>, Totals)> = Mutex::default();
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count || all.lock().expect("no panic").0.len() >= enough {
                        return;
                    }
                    let run = run(seed);
                    let (found, totals) = &mut *all.lock().expect("no panic");
                    totals.seeds += 1;
                    totals.deliveries += run.deliveries;
                    totals.commits += run.commits;
                    totals.hours += run.took_ms as f64 / 3_600_000.0;
                    if run.broken.is_some() {
                        found.insert(seed, run);
                    }
                }
            });
        }
    });
    all.into_inner().expect("no panic")
}

/// What was run.
#[derive(Debug, Default)]
pub(super) struct Totals {
    seeds: u64,
    deliveries: u64,
    commits: u64,
    hours: f64,
}
