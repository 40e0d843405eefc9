//! What a seed lays down before the run: the route, the records, the processes, and what goes wrong when.

use std::{collections::HashMap, sync::Arc, time::Duration};

use mesh_routing::{OnExhausted, Order, Route};

use super::chance::Chance;
use crate::parking::Release;

/// Everything that is decided beforehand.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// The route, and what tables swap it for in place.
    pub(super) routes: Vec<Arc<Route>>,
    pub(super) sources: Vec<Arc<str>>,
    pub(super) partitions: i32,
    /// By time, in milliseconds from the start.
    pub(super) records: Vec<Planned>,
    pub(super) processes: usize,
    pub(super) faults: Vec<(u64, Fault)>,
    /// When the last fault is over.
    pub(super) horizon_ms: u64,
    pub(super) produce: Produce,
    pub(super) commit: CommitFaults,
    pub(super) service: Service,
    /// Offsets that do not exist, once in so many, as after compaction.
    pub(super) gaps: u64,
    pub(super) revoke_timeout_ms: u64,
    /// What is fetched is handed out in parts of at most so many records.
    pub(super) part: u64,
    /// With `guarantee: exactly_once`.
    pub(super) once: bool,
    /// A process keeps its name over its lives, and so whoever starts fences the one before.
    pub(super) named: bool,
    /// What is parked at the end stays parked.
    pub(super) leaves_parked: bool,
}

/// A record of a source.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) at_ms: u64,
    pub(super) source: usize,
    pub(super) key: Option<u64>,
    pub(super) number: u64,
    pub(super) value: String,
    pub(super) hops: u32,
}

/// Something that goes wrong, or changes.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// A process dies; what it knew is gone.
    Crash {
        process: usize,
    },
    /// A process is told to stop, and drains.
    Stop {
        process: usize,
    },
    /// A process runs (again).
    Start {
        process: usize,
    },
    /// A process stands still. Its session may end meanwhile.
    Freeze {
        process: usize,
    },
    Evict {
        process: usize,
    },
    Thaw {
        process: usize,
    },
    /// The broker cannot be reached.
    Outage {
        on: bool,
    },
    /// The service of a process is not there.
    Away {
        process: usize,
        on: bool,
    },
    /// A table swaps the route: in place, or by a new start where that cannot be.
    Swap {
        route: usize,
    },
    /// Somebody releases what is parked, of one key or of all.
    Release {
        key: Option<u64>,
        how: Release,
    },
    /// The broker deletes the oldest records of a partition, up to so much of it, in percent.
    Delete {
        source: usize,
        partition: i32,
        percent: u64,
    },
}

/// How sending goes wrong: once in so many batches, 0 is never.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Produce {
    pub(super) latency_ms: u64,
    pub(super) full: u64,
    pub(super) fatal: u64,
    pub(super) unavailable: u64,
    pub(super) timed_out: u64,
    /// One topic of a batch is stored later than the others.
    pub(super) apart: u64,
}

/// How commits go wrong: once in so many, 0 is never.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CommitFaults {
    pub(super) latency_ms: u64,
    pub(super) refused: u64,
    /// It was made, and an error is told.
    pub(super) unheard: u64,
    /// Of those that end an assignment.
    pub(super) last: u64,
}

/// How the service behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Service {
    pub(super) latency_ms: u64,
    /// A record's first attempts fail once in so many records.
    pub(super) fails: u64,
    /// A delivery finds nobody, once in so many.
    pub(super) away: u64,
    /// Records that do not simply end well, once in so many.
    pub(super) odd: u64,
}

impl Plan {
    pub(super) fn draw(seed: u64) -> Self {
        let mut chance = Chance::of(seed, 0x9a11);
        let c = &mut chance;
        // One in eight has no faults at all: there the counts are known exactly.
        let calm = c.once_in(8);
        let sources: Vec<Arc<str>> = ["in", "more"].into_iter().take(c.pick(&[1, 1, 2])).map(Arc::from).collect();
        let partitions = c.between(1, 4) as i32;
        let horizon_ms = c.pick(&[2_000, 10_000, 40_000]);
        let filter = c.once_in(16);
        let tiered = c.once_in(2);
        let batched = c.once_in(4);
        let once = c.once_in(3);
        let routes = routes(c, &sources, &Shape { filter, tiered, batched, once });
        let keys = c.between(1, 10);
        let count = c.pick(&[10, 40, 40, 80, 150]);
        let mut records: Vec<Planned> = (0..count)
            .map(|number| {
                let hops = if c.once_in(40) { 3 } else { 0 };
                let value = match filter {
                    true if c.once_in(20) => "not json".to_owned(),
                    true => format!("{{\"n\":{number},\"go\":{}}}", !c.once_in(4)),
                    false => format!("{{\"n\":{number}}}"),
                };
                let at_ms = if c.once_in(3) { 0 } else { c.below(horizon_ms) };
                let key = (!c.once_in(12)).then(|| c.below(keys));
                Planned { at_ms, source: c.below(sources.len() as u64) as usize, key, number, value, hops }
            })
            .collect();
        records.sort_by_key(|record| record.at_ms);
        let processes = if calm { 1 } else { c.pick(&[1, 1, 2, 3, 4]) };
        let often = |c: &mut Chance| c.pick(&[0, 0, 3, 10, 30]);
        let mut plan = Self {
            seed,
            routes,
            sources,
            partitions,
            records,
            processes,
            faults: Vec::new(),
            horizon_ms,
            produce: Produce { latency_ms: c.pick(&[0, 2, 10, 100]), ..Produce::default() },
            commit: CommitFaults { latency_ms: c.pick(&[0, 5, 50, 500]), ..CommitFaults::default() },
            service: Service { latency_ms: c.pick(&[0, 5, 50, 500]), fails: c.pick(&[0, 2, 5, 20]), away: 0, odd: c.pick(&[0, 3, 10]) },
            gaps: c.pick(&[0, 0, 5, 20]),
            revoke_timeout_ms: c.pick(&[2_000, 5_000]),
            part: c.pick(&[1, 3, 20, 500]),
            once,
            named: c.once_in(2),
            leaves_parked: c.once_in(2),
        };
        plan.leaves_parked &= plan.routes.iter().all(|route| route.on_exhausted == OnExhausted::Park);
        if calm {
            return plan;
        }
        plan.produce.full = often(c);
        plan.produce.fatal = often(c);
        plan.produce.unavailable = often(c);
        plan.produce.timed_out = often(c);
        plan.produce.apart = often(c);
        plan.commit.refused = often(c);
        plan.commit.unheard = often(c);
        plan.commit.last = often(c);
        plan.service.away = c.pick(&[0, 0, 10, 50]);
        plan.draw_faults(c);
        plan
    }

    fn draw_faults(&mut self, c: &mut Chance) {
        let end = self.horizon_ms;
        for process in 0..self.processes {
            if process > 0 || c.once_in(8) {
                // Not there from the beginning.
                self.faults.push((c.below(end), Fault::Start { process }));
            } else {
                self.faults.push((0, Fault::Start { process }));
            }
            for _ in 0..c.pick(&[0, 1, 1, 2, 4]) {
                let at = c.below(end);
                let pause = c.pick(&[0, 50, 1_000, 12_000]);
                let fault = if c.once_in(3) { Fault::Stop { process } } else { Fault::Crash { process } };
                self.faults.push((at, fault));
                self.faults.push((at + pause, Fault::Start { process }));
            }
            for _ in 0..c.pick(&[0, 0, 1, 2]) {
                let (at, pause) = (c.below(end), c.between(10, 15_000));
                self.faults.push((at, Fault::Freeze { process }));
                if pause > 10_000 {
                    self.faults.push((at + 10_000, Fault::Evict { process }));
                }
                self.faults.push((at + pause, Fault::Thaw { process }));
            }
            if c.once_in(12) {
                // Its session ends though it runs.
                self.faults.push((c.below(end), Fault::Evict { process }));
            }
            if c.once_in(4) {
                let (at, pause) = (c.below(end), c.between(10, 5_000));
                self.faults.push((at, Fault::Away { process, on: true }));
                self.faults.push((at + pause, Fault::Away { process, on: false }));
            }
        }
        if c.once_in(3) {
            let (at, pause) = (c.below(end), c.between(10, 8_000));
            self.faults.push((at, Fault::Outage { on: true }));
            self.faults.push((at + pause, Fault::Outage { on: false }));
        }
        for _ in 0..c.pick(&[0, 0, 1, 3]) {
            self.faults.push((c.below(end), Fault::Swap { route: c.below(self.routes.len() as u64) as usize }));
        }
        for _ in 0..c.pick(&[0, 0, 0, 1, 2]) {
            let source = c.below(self.sources.len() as u64) as usize;
            let partition = c.below(self.partitions as u64) as i32;
            self.faults.push((c.below(end), Fault::Delete { source, partition, percent: c.between(1, 100) }));
        }
        if self.releases() {
            for _ in 0..c.pick(&[0, 1, 3, 6]) {
                let key = c.once_in(3).then(|| c.below(10));
                let how = if c.once_in(3) { Release::Discard } else { Release::Retry };
                self.faults.push((c.below(end), Fault::Release { key, how }));
            }
        }
        self.faults.sort_by_key(|(at, _)| *at);
    }

    /// Whether tables come, be it with the same route.
    pub(super) fn swaps(&self) -> bool {
        self.faults.iter().any(|(_, fault)| matches!(fault, Fault::Swap { .. }))
    }

    /// The routes that run at some time.
    pub(super) fn in_play(&self) -> &[Arc<Route>] {
        if self.swaps() { &self.routes } else { &self.routes[..1] }
    }

    /// Whether something may wait for somebody.
    pub(super) fn releases(&self) -> bool {
        self.routes.iter().any(|route| route.on_exhausted != OnExhausted::DeadLetter)
    }

    /// The retry and park topics of a source.
    pub(super) fn beside(&self, source: &str) -> Vec<String> {
        let tiers = self.routes.iter().map(|route| route.tiers()).max().unwrap_or(0);
        let park = (tiers > 0).then(|| self.routes[0].park_topic(source));
        (1..=tiers).map(|tier| self.routes[0].retry_topic(source, tier)).chain(park).collect()
    }

    /// The fewest and the most attempts of a record, by any route that runs.
    pub(super) fn attempts(&self) -> (u32, u32) {
        let all = self.in_play().iter().map(|route| most_attempts(route));
        (all.clone().min().unwrap_or(0), all.max().unwrap_or(0))
    }

    /// Whether records go together in one call.
    pub(super) fn has_batches(&self) -> bool {
        self.routes.iter().any(|route| route.batch.is_some())
    }

    /// Whether nothing goes wrong.
    pub(super) fn is_calm(&self) -> bool {
        self.faults.is_empty()
    }

    /// How long everything may take once all faults are over: as if every record needed all its attempts, one after the other.
    pub(super) fn patience_ms(&self) -> u64 {
        let longest = |route: &Arc<Route>| {
            let pauses = route.retry_topics.iter().sum::<Duration>().as_millis() as u64;
            u64::from(most_attempts(route)) * (route.timeout.as_millis() as u64 + 1_500 + 3 * self.produce.latency_ms) + pauses
        };
        let longest = self.routes.iter().map(longest).max().unwrap_or(0);
        // What is released is tried all over again.
        let times = if self.releases() { 3 } else { 1 };
        60_000 + self.records.len() as u64 * (times * longest + 2 * self.produce.latency_ms + 1_500)
    }

    /// How many records are in one lane with this one: what is in order.
    pub(super) fn same_lane(&self, one: Option<u64>, other: Option<u64>) -> bool {
        match self.routes[0].order {
            Order::Key => one == other,
            Order::Partition => true,
            Order::None => false,
        }
    }
}

/// How often a route tries a record that it does not release.
pub(super) fn most_attempts(route: &Route) -> u32 {
    route.retry.attempts + route.retry_topics.len() as u32
}

/// What all routes of a plan have in common.
struct Shape {
    filter: bool,
    tiered: bool,
    batched: bool,
    once: bool,
}

/// The route, and others that it may be swapped for.
fn routes(c: &mut Chance, sources: &[Arc<str>], shape: &Shape) -> Vec<Arc<Route>> {
    let order = c.pick(&["key", "key", "key", "partition", "none"]);
    let count = c.pick(&[1, 1, 1, 2]);
    (0..count).map(|_| route(c, sources, order, shape)).collect()
}

fn route(c: &mut Chance, sources: &[Arc<str>], order: &str, shape: &Shape) -> Arc<Route> {
    let to = c.pick(&["[out]", "[out]", "[out, copy]", "void"]);
    let (concurrency, attempts) = (c.pick(&[1, 3, 16]), c.pick(&[1, 2, 4]));
    let (timeout, initial) = (c.pick(&[200, 2_000]), c.pick(&[10, 100]));
    let (failures, open) = (c.pick(&[3, 20, 1_000]), c.pick(&[100, 1_000]));
    let topics = c.pick(&["", "50ms", "2s", "100ms, 1s", "1s, 300ms", "50ms, 500ms, 2s", "12s"]);
    let exhausted = c.pick(&["dead_letter", "dead_letter", "park", "park", "stop"]);
    let (topics, exhausted) = if shape.tiered { (topics, exhausted) } else { ("", "dead_letter") };
    let batch = c.pick(&["max: 2, wait: 0s", "max: 5, wait: 20ms", "max: 50, wait: 200ms"]);
    let batch = if shape.batched { format!("batch: {{ {batch} }}, ") } else { String::new() };
    let guarantee = if shape.once { "exactly_once" } else { "at_least_once" };
    let filter = if shape.filter { "filter: 'record.json.go == true', " } else { "" };
    let text = format!(
        "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: sim }}\nspec:\n  routes:\n  - {{ name: work, service: worker, from: [{}], \
         handler: /work, to: {to}, cases: [{{ status: 202, to: [review] }}], {filter}{batch}order: {order}, \
         concurrency: {concurrency}, guarantee: {guarantee}, on_exhausted: {exhausted}, timeout: {timeout}ms, \
         retry: {{ attempts: {attempts}, initial: {initial}ms, max: 1s, topics: [{topics}] }}, max_hops: 3, \
         breaker: {{ failures: {failures}, open: {open}ms }} }}\n",
        sources.join(", ")
    );
    thread_local!(static KNOWN: std::cell::RefCell<HashMap<String, Arc<Route>>> = std::cell::RefCell::default());
    KNOWN.with_borrow_mut(|known| {
        known
            .entry(text)
            .or_insert_with_key(|text| {
                let table = mesh_routing::parse("sim.yaml", text).and_then(|table| mesh_routing::compile(&table));
                table.unwrap_or_else(|faults| panic!("{text}: {faults:?}")).routes[0].clone()
            })
            .clone()
    })
}
