//! What a group does with a partition, judged by the last looks at it: Burrow's rules.
//!
//! Burrow sees each commit with its time. A look sees what is committed now, and whether the group has members: so a group that commits nothing is told
//! to have stopped if nobody is there, and to stall if somebody is.
//!
//! Invariant: no threshold: a lag is judged by how it changes, not by how large it is.

use std::collections::VecDeque;

/// How many looks it takes to judge that something did not change.
const LEAST: usize = 3;

/// A look at a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// What the group committed: the next offset that it reads.
    pub(crate) committed: Option<i64>,
    /// How many offsets it has to read.
    pub(crate) lag: u64,
    /// Whether the group has members; not known: it is taken to have some.
    pub(crate) members: bool,
}

/// What a group does with a partition. The later ones are worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    /// It read everything at some time, or its lag falls.
    Ok,
    /// It has something to read, and too few looks were taken to say more.
    Lag,
    /// It commits, and its lag did not fall from any look to the next.
    Warn,
    /// It has members and a lag, and commits nothing.
    Stall,
    /// It has a lag and no members, and commits nothing.
    Stop,
    /// What it committed went back.
    Rewind,
}

impl State {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Lag => "LAG",
            Self::Warn => "WARN",
            Self::Stall => "STALL",
            Self::Stop => "STOP",
            Self::Rewind => "REWIND",
        }
    }
}

/// Judges a partition by looks at it, the oldest first.
pub(crate) fn judge(samples: &VecDeque<Sample>) -> State {
    let Some(last) = samples.back() else { return State::Ok };
    // Who has read everything now is in no trouble, whatever was.
    if last.lag == 0 {
        return State::Ok;
    }
    if samples.len() < 2 {
        return State::Lag;
    }
    let pairs = || samples.iter().zip(samples.iter().skip(1));
    if pairs().any(|(one, next)| matches!((one.committed, next.committed), (Some(one), Some(next)) if next < one)) {
        return State::Rewind;
    }
    if samples.iter().any(|sample| sample.lag == 0) {
        return State::Ok;
    }
    if samples.len() < LEAST {
        return State::Lag;
    }
    let stands = pairs().all(|(one, next)| one.committed == next.committed);
    // An offset that stands still while records are deleted below it has a lag that falls, and is read by nobody all the same.
    match (stands, samples.iter().any(|sample| sample.members)) {
        (true, false) => State::Stop,
        (true, true) => State::Stall,
        (false, _) if pairs().all(|(one, next)| next.lag >= one.lag) => State::Warn,
        (false, _) => State::Ok,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(samples: &[(i64, u64, bool)]) -> State {
        let sample = |(committed, lag, members): &(i64, u64, bool)| Sample {
            committed: Some(*committed).filter(|committed| *committed >= 0),
            lag: *lag,
            members: *members,
        };
        judge(&samples.iter().map(sample).collect())
    }

    #[test]
    fn one_look_tells_only_whether_there_is_a_lag() {
        assert_eq!((judged(&[]), judged(&[(5, 0, true)]), judged(&[(5, 9, true)])), (State::Ok, State::Ok, State::Lag));
        assert_eq!(judged(&[(5, 9, true), (5, 9, true)]), State::Lag, "two are too few to say that it stands still");
    }

    #[test]
    fn who_reads_everything_now_or_did_is_fine() {
        assert_eq!(judged(&[(1, 9, true), (1, 9, true), (10, 0, true)]), State::Ok);
        assert_eq!(judged(&[(1, 9, true), (10, 0, true), (10, 1, true), (10, 2, true)]), State::Ok);
        assert_eq!(judged(&[(9, 1, true), (1, 9, true), (10, 0, true)]), State::Ok, "also after a rewind");
    }

    #[test]
    fn a_lag_that_falls_once_is_fine_and_one_that_never_does_is_not() {
        assert_eq!(judged(&[(1, 9, true), (2, 8, true), (3, 8, true)]), State::Ok);
        assert_eq!(judged(&[(1, 9, true), (2, 9, true), (3, 12, true)]), State::Warn);
        assert_eq!(judged(&[(1, 9, true), (2, 10, true), (3, 9, true)]), State::Ok);
    }

    #[test]
    fn who_commits_nothing_stalls_or_is_gone() {
        assert_eq!(judged(&[(1, 9, true), (1, 9, true), (1, 12, true)]), State::Stall);
        assert_eq!(judged(&[(1, 9, false), (1, 9, false), (1, 12, false)]), State::Stop);
        assert_eq!(judged(&[(-1, 9, false), (-1, 9, false), (-1, 9, false)]), State::Stop, "who never committed, too");
        assert_eq!(judged(&[(1, 9, true), (1, 9, false), (1, 9, false)]), State::Stall, "who was there within the window");
        assert_eq!(judged(&[(1, 9, true), (1, 5, true), (1, 5, true)]), State::Stall, "records went by retention alone");
    }

    #[test]
    fn an_offset_that_goes_back_is_told() {
        assert_eq!(judged(&[(5, 5, true), (2, 8, true)]), State::Rewind);
        assert_eq!(judged(&[(5, 5, true), (2, 8, true), (3, 7, true)]), State::Rewind, "for as long as it is in the window");
        assert_eq!(judged(&[(10, 0, true), (0, 10, true)]), State::Rewind, "of who had read everything, too");
        assert_eq!(judged(&[(-1, 5, true), (2, 3, true), (3, 2, true)]), State::Ok, "the first commit is none");
    }

    #[test]
    fn worse_is_later() {
        let mut states = [State::Rewind, State::Ok, State::Stop, State::Warn, State::Lag, State::Stall];
        states.sort();
        assert_eq!(states.map(State::word), ["OK", "LAG", "WARN", "STALL", "STOP", "REWIND"]);
    }
}
