//! How many calls of a service may be out at the same time, found by measuring (`concurrency: adaptive`). Pure: the clock is handed in.
//!
//! TCP Vegas for calls (Brakmo and Peterson, 1995, as Netflix's concurrency-limits has it): as long as a service works on all calls at once,
//! an answer takes as long as it does alone; beyond that calls queue up, and by Little's law `limit × (1 − alone / now)` of them wait. The limit
//! grows while hardly any wait, and shrinks when many do. How long an answer takes alone is a mean, not a minimum, since services are noisy,
//! and it is measured anew from time to time with a smaller limit, as BBR does (Cardwell and others, 2016): a service that became slower
//! or faster for good is believed.
//!
//! Invariant: the limit stays within its bounds.
//! Invariant: a route that has little to deliver does not change its limit: only one that is reached is judged.

use std::time::Duration;

use tokio::time::Instant;

/// Answers that make a measurement: their mean is then within about 10 % even where single answers differ as exponential ones do.
const ANSWERS: usize = 100;
/// A measurement takes so many times as long as the slowest answer: only answers of calls that began within it count, and were it shorter, slow
/// ones would be left out.
const SLOWEST: u32 = 2;
/// A measurement of slow answers ends after this time, with at least [`FEW`] of them.
const LONG: Duration = Duration::from_secs(2);
const FEW: usize = 50;
/// The share of calls that may wait at the service before the limit stops growing, and before it shrinks.
const WAIT_LITTLE: f64 = 0.1;
const WAIT_MUCH: f64 = 0.25;
/// The share of failed calls from which the limit shrinks, and to what.
const FAILED: f64 = 0.1;
const AFTER_FAILURES: f64 = 0.8;
/// After so many measurements the time of an answer alone is measured anew.
const FRESH: u32 = 150;
/// An answer that takes so much less time with half the limit had waited.
const FALLS: f64 = 0.88;
/// An answer that takes so much less time than it takes alone, or a limit that shrank so much, is a reason to measure it before that.
const FASTER: f64 = 0.75;
const SHRUNK: f64 = 0.6;
/// How often it is halved at most.
const HALVED: u32 = 2;
/// Where it begins.
const START: f64 = 4.0;

/// See the module.
#[derive(Debug)]
pub struct Limit {
    min: f64,
    max: f64,
    limit: f64,
    /// How long an answer takes alone, in seconds.
    alone: Option<f64>,
    phase: Phase,
    measured: Measured,
    /// When the measurement began. Answers of calls that began before are not judged: they saw another limit.
    since: Option<Instant>,
    /// The slowest answer of this measurement, and of the one before.
    slowest: (Duration, Duration),
    /// Measurements since `alone` was measured, and the limit at that time.
    age: u32,
    proven: f64,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Measures how long an answer takes alone: the limit is halved until that makes no difference.
    Probe { before: Option<f64>, back: f64, halved: u32 },
    /// Grows by half, until calls wait for the first time.
    Start,
    /// Stays where few calls wait.
    Steady,
}

#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    answers: usize,
    failed: usize,
    seconds: f64,
    /// The most calls that were out.
    out: usize,
}

impl Limit {
    /// A limit from `min` to `max`.
    pub fn new(min: usize, max: usize) -> Self {
        let mut limit = Self {
            min: 1.0,
            max: 1.0,
            limit: START,
            alone: None,
            phase: Phase::Probe { before: None, back: START, halved: 0 },
            measured: Measured::default(),
            since: None,
            slowest: (Duration::ZERO, Duration::ZERO),
            age: 0,
            proven: START,
        };
        limit.configure(min, max);
        limit
    }

    /// Takes other bounds, of a new table.
    pub fn configure(&mut self, min: usize, max: usize) {
        self.min = min.max(1) as f64;
        self.max = (max as f64).max(self.min);
        self.limit = self.limit.clamp(self.min, self.max);
    }

    /// How many calls may be out.
    pub fn get(&self) -> usize {
        self.limit.round() as usize
    }

    /// Takes note of an answer: when its call began, how many calls were out then, and whether it failed as those of an overloaded service
    /// do.
    pub fn answered(&mut self, began: Instant, now: Instant, out: usize, failed: bool) {
        let (since, took) = (*self.since.get_or_insert(began), now.saturating_duration_since(began));
        self.slowest.0 = self.slowest.0.max(took);
        if began < since {
            return;
        }
        let m = &mut self.measured;
        m.answers += 1;
        m.failed += usize::from(failed);
        m.seconds += took.as_secs_f64();
        m.out = m.out.max(out);
        let passed = now.saturating_duration_since(since);
        let enough = m.answers >= ANSWERS.max(2 * self.limit as usize) && passed >= self.slowest.0.max(self.slowest.1) * SLOWEST;
        if enough || (m.answers >= FEW && passed >= LONG) {
            self.slowest = (Duration::ZERO, self.slowest.0);
            let measured = std::mem::take(m);
            self.since = Some(now);
            self.judge(measured);
        }
    }

    fn judge(&mut self, m: Measured) {
        let mean = (m.seconds / m.answers as f64).max(1e-9);
        if m.failed as f64 >= FAILED * m.answers as f64 {
            self.set(self.limit * AFTER_FAILURES);
            self.phase = Phase::Steady;
            return;
        }
        // With less to do than it may, the limit is not what decides.
        let reached = 2 * m.out >= self.get();
        self.age += 1;
        match self.phase {
            Phase::Probe { before, back, halved } => {
                let falls = before.is_none_or(|before| mean < FALLS * before);
                if falls && self.limit > self.min && reached && halved < HALVED {
                    self.phase = Phase::Probe { before: Some(mean), back, halved: halved + 1 };
                    self.set((self.limit / 2.0).floor());
                } else {
                    // The last two hardly differ: both are of answers that did not wait.
                    let first = self.alone.is_none();
                    self.alone = Some(before.filter(|_| !falls).map_or(mean, |before| (mean + before) / 2.0));
                    self.phase = if first { Phase::Start } else { Phase::Steady };
                    (self.age, self.proven) = (0, back);
                    self.set(back);
                }
            }
            Phase::Start | Phase::Steady if !reached => {}
            Phase::Start | Phase::Steady => {
                let alone = self.alone.unwrap_or(mean);
                // What cannot be, or is a surprise, is a reason to doubt the time of an answer alone.
                if mean < FASTER * alone || self.limit < SHRUNK * self.proven || self.age >= FRESH {
                    self.phase = Phase::Probe { before: Some(mean), back: self.limit, halved: 1 };
                    self.set((self.limit / 2.0).floor());
                    return;
                }
                let waiting = 1.0 - alone / mean;
                if waiting > WAIT_MUCH {
                    self.phase = Phase::Steady;
                    // As many as are worked on, and a few more; half of the way there, since a measurement may err.
                    let worked_on = self.limit * alone / mean;
                    self.set((self.limit + worked_on * (1.0 + WAIT_LITTLE)) / 2.0);
                } else if waiting < WAIT_LITTLE {
                    let step = match self.phase {
                        Phase::Start => 0.5,
                        _ if waiting < WAIT_LITTLE / 2.0 => 0.25,
                        _ => 0.1,
                    };
                    self.set(self.limit + (self.limit * step).max(1.0));
                } else {
                    self.phase = Phase::Steady;
                }
            }
        }
    }

    fn set(&mut self, limit: f64) {
        self.limit = limit.clamp(self.min, self.max);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cmp::Reverse,
        collections::{BinaryHeap, VecDeque},
    };

    use super::*;

    /// A service with `workers` that each take a random time, called with as many calls as the limit allows.
    struct Service {
        workers: usize,
        /// The mean time of a call that does not wait, in seconds.
        mean: f64,
        /// A random time of mean 1, by a number from 0 to 1.
        time: fn(f64) -> f64,
        /// Calls that take longer fail.
        timeout: f64,
        seed: u64,
        zero: Instant,
        /// In nanoseconds.
        now: u64,
        /// When each call that is worked on ends, and when it began.
        ends: BinaryHeap<Reverse<(u64, u64)>>,
        queue: VecDeque<u64>,
    }

    /// What a run came to.
    struct Run {
        /// As a share of what the service can do.
        throughput: f64,
        /// The mean limit.
        limit: f64,
    }

    impl Service {
        fn new(workers: usize, mean: f64, seed: u64) -> Self {
            let exponential = |u: f64| -(1.0 - u).ln();
            let (ends, queue) = (BinaryHeap::new(), VecDeque::new());
            Self { workers, mean, time: exponential, timeout: f64::MAX, seed, zero: Instant::now(), now: 0, ends, queue }
        }

        /// SplitMix64.
        fn random(&mut self) -> f64 {
            self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = self.seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        }

        /// Answers so many calls.
        fn run(&mut self, limit: &mut Limit, answers: usize) -> Run {
            let (began, mut sum) = (self.now, 0.0);
            for _ in 0..answers {
                while self.ends.len() + self.queue.len() < limit.get() {
                    self.queue.push_back(self.now);
                }
                while self.ends.len() < self.workers
                    && let Some(began) = self.queue.pop_front()
                {
                    let random = self.random();
                    let end = self.now + (self.mean * (self.time)(random) * 1e9) as u64;
                    self.ends.push(Reverse((end, began)));
                }
                let out = self.ends.len() + self.queue.len();
                let Some(Reverse((end, began))) = self.ends.pop() else { break };
                self.now = end;
                let at = |nanos| self.zero + Duration::from_nanos(nanos);
                limit.answered(at(began), at(end), out, (end - began) as f64 / 1e9 > self.timeout);
                sum += limit.get() as f64;
            }
            let seconds = (self.now - began) as f64 / 1e9;
            let answers = answers as f64;
            Run { throughput: answers / seconds * self.mean / self.workers as f64, limit: sum / answers }
        }
    }

    #[test]
    fn it_settles_near_the_knee_of_a_service() {
        for mean in [0.0005, 0.02, 0.5] {
            for workers in [1, 4, 32, 100] {
                for seed in 0..3 {
                    let mut limit = Limit::new(1, 1000);
                    let mut service = Service::new(workers, mean, seed);
                    service.run(&mut limit, 10_000 + 400 * workers);
                    let run = service.run(&mut limit, 10_000);
                    let per_worker = run.limit / workers as f64;
                    assert!(run.throughput > 0.65, "{mean} s, {workers} workers, seed {seed}: {:.2} of the throughput", run.throughput);
                    assert!((0.6..2.2).contains(&per_worker), "{mean} s, {workers} workers, seed {seed}: a limit of {:.1}", run.limit);
                }
            }
        }
    }

    #[test]
    fn it_does_not_collapse_where_answers_differ_much() {
        // One in ten takes 20 times as long; and all take equally long.
        for time in [(|u| if u < 0.1 { 6.9 } else { 0.345 }) as fn(f64) -> f64, |_| 1.0] {
            for workers in [4, 32] {
                for seed in 0..4 {
                    let mut limit = Limit::new(1, 1000);
                    let mut service = Service { time, ..Service::new(workers, 0.01, seed) };
                    service.run(&mut limit, 20_000);
                    let run = service.run(&mut limit, 20_000);
                    assert!(
                        run.throughput > 0.5,
                        "{workers} workers, seed {seed}: {:.2} of the throughput at {:.1}",
                        run.throughput,
                        run.limit
                    );
                    assert!(run.limit < 4.0 * workers as f64, "{workers} workers, seed {seed}: a limit of {:.1}", run.limit);
                }
            }
        }
    }

    #[test]
    fn it_follows_a_service_that_changes_and_recovers() {
        for seed in 0..3 {
            let mut limit = Limit::new(1, 1000);
            let mut service = Service::new(64, 0.01, seed);
            service.run(&mut limit, 20_000);
            for (workers, mean) in [(8, 0.01), (64, 0.01), (2, 0.01), (100, 0.01), (100, 0.1), (100, 0.001)] {
                (service.workers, service.mean) = (workers, mean);
                service.run(&mut limit, 50_000);
                let run = service.run(&mut limit, 10_000);
                let per_worker = run.limit / workers as f64;
                assert!(
                    run.throughput > 0.45 && (0.4..2.2).contains(&per_worker),
                    "seed {seed}, {workers} workers of {mean} s: {:.2} at {:.1}",
                    run.throughput,
                    run.limit
                );
            }
        }
    }

    #[test]
    fn calls_that_fail_lower_it_and_it_comes_back() {
        let mut limit = Limit::new(2, 1000);
        let mut service = Service::new(50, 0.01, 7);
        service.run(&mut limit, 20_000);
        let before = limit.get();
        service.timeout = 0.0;
        service.run(&mut limit, 10_000);
        assert!(limit.get() < before / 2, "{before}, and {} when all fail", limit.get());
        service.run(&mut limit, 20_000);
        assert_eq!(limit.get(), 2, "never below its least");
        service.timeout = f64::MAX;
        service.run(&mut limit, 50_000);
        assert!(limit.get() > 40, "{} when none does", limit.get());
    }

    #[test]
    fn a_route_with_little_to_do_keeps_its_limit() {
        let (mut limit, mut now) = (Limit::new(1, 1000), Instant::now());
        let mut settled = None;
        for call in 0..10_000 {
            let began = now;
            now += Duration::from_millis(5);
            limit.answered(began, now, 1, false);
            if call == 1_000 {
                settled = Some(limit.get());
            }
        }
        assert_eq!(Some(limit.get()), settled);
    }
}
