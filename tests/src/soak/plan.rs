//! What goes wrong, and when: a pure function of the seed.
//!
//! Invariant: every fault that is asked for comes before one comes again; two that overlap are of different kinds.

use std::{fmt, time::Duration};

use clap::ValueEnum;
use serde::Serialize;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// A sidecar is killed (SIGKILL), and started again later.
    SidecarKill,
    /// A sidecar is stopped (SIGSTOP), mostly past its session, and resumed: a zombie.
    SidecarStop,
    /// A sidecar ends in good order (SIGTERM), and is started again.
    SidecarTerm,
    /// The service is gone: its connections break, new ones are refused.
    ServiceKill,
    /// The service takes requests and answers none.
    ServiceHang,
    /// The service answers most requests with 500 to 504.
    ServiceStorm,
    /// The service takes a second longer for every request.
    ServiceSlow,
    /// A broker is killed (SIGKILL), and started again.
    BrokerKill,
    /// A broker ends in good order (SIGTERM), and is started again.
    BrokerTerm,
    /// A broker is frozen (SIGSTOP): connections stay, nothing is answered.
    BrokerFreeze,
    /// All connections to the brokers are cut, three times.
    Cut,
    /// Nothing comes through to one broker, and nobody is told.
    Blackhole,
    /// The way to all brokers becomes slow: 50 ms, each way.
    Latency,
    /// The embedded broker's disk fills up: writes fail in the middle, with ENOSPC.
    DiskFull,
    /// The routing table is changed again and again.
    Swap,
    /// Sidecars are added one by one, and taken away again. Kafka only.
    Scale,
}

/// What a fault strikes. Two of one kind never overlap: of three brokers one is away at a time, whether it is dead or out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A sidecar.
    Sidecar,
    /// The service.
    Service,
    /// A broker.
    Broker,
    /// The way to all brokers.
    Network,
    /// The table.
    Table,
}

impl Kind {
    /// How many there are.
    pub const COUNT: usize = 5;
}

impl Fault {
    /// What it strikes.
    pub fn kind(self) -> Kind {
        match self {
            Self::SidecarKill | Self::SidecarStop | Self::SidecarTerm | Self::Scale => Kind::Sidecar,
            Self::ServiceKill | Self::ServiceHang | Self::ServiceStorm | Self::ServiceSlow => Kind::Service,
            Self::BrokerKill | Self::BrokerTerm | Self::BrokerFreeze | Self::Blackhole | Self::DiskFull => Kind::Broker,
            Self::Cut | Self::Latency => Kind::Network,
            Self::Swap => Kind::Table,
        }
    }

    /// Whether it can happen: on Kafka or on the embedded broker; with so many brokers of the run's own.
    pub fn is_of(self, kafka: bool, brokers: usize) -> bool {
        match self {
            Self::Scale => kafka,
            Self::DiskFull => !kafka,
            Self::BrokerKill | Self::BrokerTerm | Self::BrokerFreeze | Self::Cut | Self::Blackhole | Self::Latency => brokers > 0,
            _ => true,
        }
    }

    /// How long it lasts, in seconds: from, to.
    fn span(self, session: f64) -> (f64, f64) {
        match self {
            Self::SidecarKill | Self::ServiceKill => (0.5, 6.0),
            Self::SidecarTerm => (0.2, 2.0),
            Self::SidecarStop => (session + 2.0, session + 8.0),
            Self::ServiceHang | Self::ServiceStorm => (2.0, 8.0),
            Self::ServiceSlow | Self::Swap => (4.0, 8.0),
            Self::BrokerKill | Self::BrokerTerm | Self::BrokerFreeze | Self::Blackhole => (3.0, 10.0),
            Self::Cut => (0.5, 1.5),
            Self::Latency => (4.0, 10.0),
            Self::DiskFull => (2.0, 6.0),
            Self::Scale => (30.0, 40.0),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned()).as_str())
    }
}

/// One fault of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Step {
    /// When it begins, from the begin of the load.
    pub at: Duration,
    /// What it is.
    pub fault: Fault,
    /// Which one it strikes, modulo how many there are.
    pub target: usize,
    /// How long it lasts.
    pub lasts: Duration,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>7.1} s  {} of {} for {:.1} s", self.at.as_secs_f64(), self.fault, self.target, self.lasts.as_secs_f64())
    }
}

/// Numbers that follow from a seed (SplitMix64): the same on every machine, in every version.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// One of `0..count`; 0 of none.
    pub fn below(&mut self, count: usize) -> usize {
        (self.roll() % (count.max(1) as u64)) as usize
    }

    /// A number of a range.
    pub fn between(&mut self, from: f64, to: f64) -> f64 {
        from + (to - from) * (self.roll() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The faults of a run of this length. `session` is how long a group waits for a member that says nothing.
pub fn plan(seed: u64, faults: &[Fault], length: Duration, session: Duration) -> Vec<Step> {
    /// Before the first fault: the run without faults to compare with.
    const CALM: f64 = 3.0;
    let mut dice = Dice::new(seed);
    let (length, session) = (length.as_secs_f64(), session.as_secs_f64());
    let mut steps: Vec<Step> = Vec::new();
    let mut bag: Vec<Fault> = Vec::new();
    let mut at = CALM;
    // The end of the latest fault: what comes after may overlap it, if it is of another kind.
    let mut busy_until = 0.0f64;
    let mut too_long = 0;
    while too_long < faults.len() {
        if bag.is_empty() {
            bag = faults.to_vec();
            for end in (1..bag.len()).rev() {
                bag.swap(end, dice.below(end + 1));
            }
        }
        let Some(fault) = bag.pop() else { break };
        let (from, to) = fault.span(session);
        let lasts = dice.between(from, to);
        let target = dice.below(64);
        let overlaps = steps.last().is_some_and(|last| last.fault.kind() == fault.kind());
        let begin = if overlaps { at.max(busy_until + dice.between(1.0, 4.0)) } else { at };
        // It ends early enough that the mesh works again before the load ends.
        if begin + lasts + CALM > length {
            too_long += 1;
            continue;
        }
        too_long = 0;
        steps.push(Step { at: Duration::from_secs_f64(begin), fault, target, lasts: Duration::from_secs_f64(lasts) });
        let end = begin + lasts;
        // One in four is overlapped by the next.
        at = if dice.below(4) == 0 && busy_until <= begin { begin + lasts / 2.0 } else { end.max(busy_until) + dice.between(1.5, 6.0) };
        busy_until = busy_until.max(end);
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Fault; 14] = [
        Fault::BrokerKill,
        Fault::BrokerTerm,
        Fault::BrokerFreeze,
        Fault::Cut,
        Fault::Blackhole,
        Fault::Latency,
        Fault::SidecarKill,
        Fault::SidecarStop,
        Fault::SidecarTerm,
        Fault::ServiceKill,
        Fault::ServiceHang,
        Fault::ServiceStorm,
        Fault::Swap,
        Fault::Scale,
    ];

    fn steps(seed: u64, minutes: u64) -> Vec<Step> {
        plan(seed, &ALL, Duration::from_secs(minutes * 60), Duration::from_secs(10))
    }

    #[test]
    fn a_seed_gives_the_same_plan_and_another_another() {
        assert_eq!(steps(7, 15), steps(7, 15));
        assert_ne!(steps(7, 15), steps(8, 15));
    }

    #[test]
    fn every_fault_comes_within_a_quarter_of_an_hour() {
        for seed in 0..200 {
            let steps = steps(seed, 15);
            for fault in ALL {
                assert!(steps.iter().any(|step| step.fault == fault), "seed {seed} has no {fault}");
            }
        }
    }

    #[test]
    fn faults_of_one_kind_never_overlap_and_all_end_within_the_load() {
        for seed in 0..200 {
            let steps = steps(seed, 5);
            assert!(steps.is_sorted_by_key(|step| step.at));
            for (index, one) in steps.iter().enumerate() {
                assert!(one.at + one.lasts < Duration::from_secs(300), "seed {seed}: {one}");
                for other in &steps[index + 1..] {
                    let overlap = other.at < one.at + one.lasts;
                    assert!(!overlap || other.fault.kind() != one.fault.kind(), "seed {seed}: {one} and {other}");
                }
            }
        }
    }
}
