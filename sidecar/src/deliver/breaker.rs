//! The breaker of a route: when its service may be called. Pure: the clock is handed in.
//!
//! Open means wait: nothing is dropped, no offset advances, no attempt is counted. Two causes open it: consecutive failures (an attempt
//! each, as the table of statuses says), and a service that is not there, which is probed with a short backoff.
//!
//! Invariant: while it is open, at most one delivery is out as a probe.

use std::time::Duration;

use tokio::time::Instant;

/// A service that is not there is probed at least this often, so that the first record flows soon after it is back.
const LONGEST_PROBE: Duration = Duration::from_secs(1);
const FIRST_PROBE: Duration = Duration::from_millis(50);
/// So many answers in a row that nobody is there open it: one alone may be about its record.
const AWAY: u32 = 3;

/// See the module.
#[derive(Debug)]
pub struct Breaker {
    state: State,
    /// Consecutive failures that open it; 0 never does.
    failures: u32,
    open: Duration,
}

#[derive(Debug)]
enum State {
    Closed {
        failed: u32,
        away: u32,
    },
    /// Failures: closed again after the first probe that succeeds.
    Open {
        until: Instant,
    },
    /// No service there.
    Away {
        backoff: Duration,
        until: Instant,
    },
}

/// What may be delivered now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowance {
    /// As much as there is room for.
    Free,
    /// One delivery, if none is out.
    Probe,
    /// Nothing before this time.
    Wait(Instant),
}

/// How a delivery went, for the breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The service works, whatever it said.
    Good,
    /// It failed: an attempt is counted.
    Failed,
    /// It was not there: no attempt is counted.
    Away,
}

/// What an answer changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// It opened: the route waits.
    Opened,
    /// It closed: the route goes on.
    Closed,
}

impl Breaker {
    /// A closed breaker that opens after `failures` consecutive ones, for `open`.
    pub fn new(failures: u32, open: Duration) -> Self {
        Self { state: State::Closed { failed: 0, away: 0 }, failures, open }
    }

    /// Takes other bounds, of a new table.
    pub fn configure(&mut self, failures: u32, open: Duration) {
        (self.failures, self.open) = (failures, open);
    }

    /// Whether it is open.
    pub fn is_open(&self) -> bool {
        !matches!(self.state, State::Closed { .. })
    }

    /// Whether it is open since nobody is there.
    pub fn is_away(&self) -> bool {
        matches!(self.state, State::Away { .. })
    }

    /// Opens it, whatever was before: the route waits, and tries one delivery after that.
    pub fn trip(&mut self, now: Instant) -> Change {
        let was_open = self.is_open();
        if !was_open {
            self.state = State::Open { until: now + self.open };
        }
        if was_open { Change::None } else { Change::Opened }
    }

    /// Nobody is there, and whoever says so says until when: there is no probe before that.
    pub fn rest(&mut self, until: Instant) {
        if let State::Away { until: known, .. } = &mut self.state {
            *known = until.max(*known);
        }
    }

    /// What may be delivered now.
    pub fn allowance(&self, now: Instant) -> Allowance {
        match self.state {
            State::Closed { .. } => Allowance::Free,
            State::Open { until } | State::Away { until, .. } if now < until => Allowance::Wait(until),
            State::Open { .. } | State::Away { .. } => Allowance::Probe,
        }
    }

    /// Takes note of how a delivery went.
    pub fn note(&mut self, verdict: Verdict, now: Instant) -> Change {
        let was_open = self.is_open();
        self.state = match (verdict, &self.state) {
            (Verdict::Good, _) => State::Closed { failed: 0, away: 0 },
            (Verdict::Failed, State::Closed { failed, .. }) if self.failures == 0 || failed + 1 < self.failures => {
                State::Closed { failed: failed.saturating_add(1), away: 0 }
            }
            (Verdict::Away, State::Closed { failed, away }) if away + 1 < AWAY => State::Closed { failed: *failed, away: away + 1 },
            // Deliveries that were out when it opened fail late: they do not put the probe off.
            (Verdict::Failed | Verdict::Away, State::Open { until }) if now < *until => State::Open { until: *until },
            (Verdict::Failed | Verdict::Away, State::Away { backoff, until }) if now < *until => {
                State::Away { backoff: *backoff, until: *until }
            }
            // Somebody is there again; whether it works is another question.
            (Verdict::Failed, State::Away { .. }) if self.failures != 1 => State::Closed { failed: 1, away: 0 },
            (Verdict::Failed, _) => State::Open { until: now + self.open },
            (Verdict::Away, State::Away { backoff, .. }) => {
                let backoff = (*backoff * 2).min(LONGEST_PROBE);
                State::Away { backoff, until: now + backoff }
            }
            (Verdict::Away, _) => State::Away { backoff: FIRST_PROBE, until: now + FIRST_PROBE },
        };
        match (was_open, self.is_open()) {
            (false, true) => Change::Opened,
            (true, false) => Change::Closed,
            _ => Change::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_in_a_row_open_it_and_one_success_closes_it() {
        let start = Instant::now();
        let mut breaker = Breaker::new(3, Duration::from_secs(10));
        assert_eq!(breaker.note(Verdict::Failed, start), Change::None);
        assert_eq!(breaker.note(Verdict::Good, start), Change::None);
        assert_eq!(breaker.note(Verdict::Failed, start), Change::None);
        assert_eq!(breaker.note(Verdict::Failed, start), Change::None);
        assert_eq!(breaker.note(Verdict::Failed, start), Change::Opened);
        assert_eq!(breaker.allowance(start), Allowance::Wait(start + Duration::from_secs(10)));
        // One that was out already does not put the probe off.
        breaker.note(Verdict::Failed, start + Duration::from_secs(9));
        let later = start + Duration::from_secs(10);
        assert_eq!(breaker.allowance(later), Allowance::Probe);
        assert_eq!(breaker.note(Verdict::Failed, later), Change::None);
        assert_eq!(breaker.allowance(later), Allowance::Wait(later + Duration::from_secs(10)));
        assert_eq!(breaker.note(Verdict::Good, later), Change::Closed);
        assert_eq!(breaker.allowance(later), Allowance::Free);
    }

    #[test]
    fn one_record_that_finds_nobody_does_not_open_it() {
        let now = Instant::now();
        let mut breaker = Breaker::new(3, Duration::from_secs(10));
        for _ in 0..100 {
            assert_eq!(breaker.note(Verdict::Away, now), Change::None);
            assert_eq!(breaker.note(Verdict::Good, now), Change::None);
        }
    }

    #[test]
    fn a_service_that_is_away_is_probed_at_least_every_second() {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(3, Duration::from_secs(10));
        for _ in 1..AWAY {
            assert_eq!(breaker.note(Verdict::Away, now), Change::None);
        }
        assert_eq!(breaker.note(Verdict::Away, now), Change::Opened);
        for _ in 0..20 {
            let Allowance::Wait(until) = breaker.allowance(now) else { panic!("it waits") };
            assert!(until - now <= LONGEST_PROBE);
            now = until;
            assert_eq!(breaker.allowance(now), Allowance::Probe);
            assert_eq!(breaker.note(Verdict::Away, now), Change::None);
        }
        assert_eq!(breaker.note(Verdict::Good, now), Change::Closed);
    }

    #[test]
    fn a_service_that_says_how_long_it_is_away_is_left_alone_until_then() {
        let start = Instant::now();
        let mut breaker = Breaker::new(3, Duration::from_secs(10));
        breaker.rest(start + Duration::from_secs(60));
        assert_eq!(breaker.allowance(start), Allowance::Free, "one record's wish is its own");
        for _ in 0..AWAY {
            breaker.note(Verdict::Away, start);
        }
        breaker.rest(start + Duration::from_secs(60));
        breaker.rest(start);
        assert_eq!(breaker.allowance(start + Duration::from_secs(59)), Allowance::Wait(start + Duration::from_secs(60)));
        assert_eq!(breaker.note(Verdict::Good, start), Change::Closed);
    }

    #[test]
    fn a_probe_that_fails_says_that_somebody_is_there_again() {
        let start = Instant::now();
        let mut breaker = Breaker::new(3, Duration::from_secs(10));
        for _ in 0..AWAY {
            breaker.note(Verdict::Away, start);
        }
        assert_eq!(breaker.note(Verdict::Failed, start), Change::None, "it was out when the breaker opened");
        assert_eq!(breaker.note(Verdict::Failed, start + Duration::from_secs(1)), Change::Closed);
        assert_eq!(breaker.note(Verdict::Failed, start + Duration::from_secs(1)), Change::None);
        assert_eq!(breaker.note(Verdict::Failed, start + Duration::from_secs(1)), Change::Opened);
    }
}
