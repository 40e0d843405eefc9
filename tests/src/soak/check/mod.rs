//! The nine checks. Pure: books and topics in, a verdict out.
//!
//! 1. An acknowledged record is in A at its acknowledged offset, byte for byte.
//! 2. Every record of A has its disposition: its reply is in B, the service ignored it, or it is a dead letter.
//! 3. Of a key, no record starts before all earlier ones are done; replies of a key are in B in the order of A.
//! 4. What is committed was complete, at every moment, and a commit never goes back.
//! 5. Duplicates are counted, carry the id of the first, and there are none without a fault, nor ever with `exactly_once`.
//! 6. A reply names its cause and belongs to its trace; nothing is in B that the service did not say.
//! 7. What was refused for good never appears.
//! 8. The work goes on during and after a fault; memory and descriptors stay flat.
//! 9. Table swaps lose nothing: all of the above holds over them.
//!
//! What retry topics add to them is in `aside`.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, SystemTime},
};

use serde::Serialize;
use uuid::Uuid;

use super::{
    ground::{Contents, Sample},
    ledger::{Answer, Books, Place},
    lines::{Guarantee, Line},
    payload::{Name, Treatment},
};
use crate::mesh::Found;
use aside::Aside;

mod aside;
mod facts;
mod order;

/// How many offenders of a check are shown.
const SHOWN: usize = 10;

/// What is checked.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The run's name.
    pub run: &'a str,
    /// The route, and what it promises.
    pub line: Line,
    /// What happened outside of the sidecars.
    pub books: &'a Books,
    /// When the books' times begin.
    pub began: SystemTime,
    /// The records of all topics, as a `read_committed` reader sees them.
    pub contents: &'a Contents,
    /// What was committed, over time.
    pub samples: &'a [Sample],
    /// From when to when tables were swapped.
    pub swaps: &'a [(Duration, Duration)],
    /// Whether anything went wrong on purpose.
    pub faults: bool,
}

/// A check that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Its number.
    pub check: u8,
    /// What is wrong.
    pub what: String,
    /// How many times.
    pub count: usize,
    /// Some of them: the ids, and where they were last seen.
    pub offenders: Vec<String>,
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verdict {
    /// Records that were acknowledged to producers.
    pub acknowledged: usize,
    /// Records in A, those of attempts that nobody saw acknowledged included.
    pub stored: usize,
    /// Records of A that the service answered for good.
    pub processed: usize,
    /// Records of A with a reply in B.
    pub forwarded: usize,
    /// Records of A that the service ignored.
    pub ignored: usize,
    /// Records of A that are dead letters.
    pub dead_lettered: usize,
    /// Of these, those whose attempts failed.
    pub exhausted: usize,
    /// Records in retry topics: each time that one was put there.
    pub retried: usize,
    /// Records in the park topic, likewise.
    pub parked: usize,
    /// Replies and dead letters beyond the first of their record.
    pub duplicates: usize,
    /// Deliveries that were answered for good after another was.
    pub delivered_again: usize,
    /// Records without a disposition, and acknowledged ones that are not in A.
    pub lost: usize,
    /// Times that a key's order was broken, at the service or in B.
    pub reordered: usize,
    /// How many times commits were compared.
    pub samples: usize,
    /// What failed.
    pub violations: Vec<Violation>,
}

/// Collects offenders by what is wrong.
#[derive(Default)]
struct Faults(BTreeMap<(u8, &'static str), (usize, Vec<String>)>);

impl Faults {
    fn add(&mut self, check: u8, what: &'static str, offender: impl FnOnce() -> String) {
        let (count, shown) = self.0.entry((check, what)).or_default();
        *count += 1;
        if shown.len() < SHOWN {
            shown.push(offender());
        }
    }

    fn count(&self, what: &[&str]) -> usize {
        self.0.iter().filter(|((_, name), _)| what.contains(name)).map(|(_, (count, _))| count).sum()
    }
}

/// A record of A.
struct Source {
    name: Name,
    uuid: Uuid,
}

/// What goes one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Lane {
    Key(u32),
    Partition(i32),
}

/// A record that left the route.
struct Left {
    /// Where the first one is.
    first: Place,
    mesh_id: String,
    count: usize,
}

/// Everything by its place in A.
struct Facts<'a> {
    books: &'a Books,
    a: BTreeMap<Place, Source>,
    b: HashMap<Place, Left>,
    dead: HashMap<Place, (Left, String)>,
    aside: Aside,
    finals: HashMap<Place, Vec<(usize, Answer)>>,
    faults: Faults,
    /// Records of which a promise was broken, for check 9.
    broken: Vec<Place>,
}

fn place_of(found: &Found) -> Place {
    Place { partition: found.partition, offset: found.offset }
}

/// Checks everything but check 8, which is about time and memory.
pub fn check(evidence: &Evidence<'_>) -> Verdict {
    let mut facts = Facts {
        books: evidence.books,
        a: BTreeMap::new(),
        b: HashMap::new(),
        dead: HashMap::new(),
        aside: Aside::default(),
        finals: HashMap::new(),
        faults: Faults::default(),
        broken: Vec::new(),
    };
    facts.enter_events();
    facts.enter_a(evidence);
    facts.enter_b(evidence);
    facts.enter_dead(evidence);
    facts.enter_aside(evidence);
    let mut verdict = facts.dispositions(evidence);
    facts.acknowledged(evidence);
    facts.attempts(evidence);
    facts.nothing_waits(evidence);
    facts.order_at_the_service(evidence);
    facts.order_in_b(evidence);
    facts.commits(evidence);
    facts.duplicates(evidence, &verdict);
    facts.swaps(evidence);
    verdict.lost = facts.faults.count(&[LOST, NOT_IN_A, GAP_IN_A]);
    verdict.reordered = facts.faults.count(&[STARTED_EARLY, REPLIES_DISORDERED]);
    let violation = |((check, what), (count, offenders)): ((u8, &'static str), _)| Violation { check, what: what.into(), count, offenders };
    verdict.violations = facts.faults.0.into_iter().map(violation).collect();
    verdict
}

const NOT_IN_A: &str = "acknowledged and not in A where it was acknowledged";
const GAP_IN_A: &str = "a number of a key is missing in A";
const LOST: &str = "a record of A has no disposition";
const STARTED_EARLY: &str = "a record was started before an earlier one of its key was done";
const REPLIES_DISORDERED: &str = "replies of a key are in B out of order";

impl Facts<'_> {
    fn dispositions(&mut self, evidence: &Evidence<'_>) -> Verdict {
        let mut verdict = Verdict { acknowledged: self.books.acks.len(), stored: self.a.len(), ..Verdict::default() };
        verdict.samples = evidence.samples.len();
        (verdict.retried, verdict.parked) = self.aside.counts(evidence.line);
        verdict.processed = self.a.keys().filter(|place| self.finals.contains_key(place)).count();
        verdict.delivered_again = self.finals.values().map(|ends| ends.len() - 1).sum();
        let mut lost = Vec::new();
        let mut odd = Vec::new();
        for (place, source) in &self.a {
            let ended = |answer| self.finals.get(place).is_some_and(|ends| ends.iter().any(|end| end.1 == answer));
            let treatment = evidence.line.treatment(source.name);
            let hopeless = matches!(treatment, Treatment::Fails(first) if first >= evidence.line.last_attempt());
            let dead = self.dead.get(place).map(|(_, reason)| reason.as_str());
            if dead.is_some() {
                verdict.dead_lettered += 1;
            }
            if dead == Some("attempts") {
                verdict.exhausted += 1;
                if !evidence.faults && !hopeless {
                    odd.push((*place, "a record ran out of attempts though nothing was wrong"));
                }
                continue;
            }
            let fine = match treatment {
                Treatment::Fails(_) if hopeless => false,
                Treatment::Reply | Treatment::Fails(_) | Treatment::Slips => {
                    let fine = self.b.contains_key(place);
                    verdict.forwarded += usize::from(fine);
                    fine
                }
                Treatment::Ignore => {
                    let fine = ended(Answer::Ignore);
                    verdict.ignored += usize::from(fine);
                    fine
                }
                Treatment::Poison => dead == Some("status"),
            };
            if !fine {
                lost.push(*place);
            } else if dead.is_some_and(|_| treatment != Treatment::Poison) {
                odd.push((*place, "a dead letter that should have been forwarded or ignored"));
            }
        }
        for place in lost {
            self.broken.push(place);
            let history = self.history(place);
            self.faults.add(2, LOST, || history);
        }
        for (place, what) in odd {
            let history = self.history(place);
            self.faults.add(2, what, || history);
        }
        verdict.duplicates = self.b.values().map(|left| left.count - 1).sum::<usize>()
            + self.dead.values().map(|(left, _)| left.count - 1).sum::<usize>()
            + self.dead.keys().filter(|place| self.b.contains_key(place)).count();
        verdict
    }

    fn commits(&mut self, evidence: &Evidence<'_>) {
        let mut early = Vec::new();
        let passed = self.passed(evidence.samples, |sample| &sample.committed, "A");
        // Offsets without a record are the broker's own: markers of transactions.
        early.extend(passed.into_iter().filter(|(place, ..)| self.a.contains_key(place)));
        for side in 0..self.aside.len() {
            let passed = self.passed(evidence.samples, |sample| &sample.sides[side].committed, "a retry or park topic");
            early.extend(passed.into_iter().filter_map(|(at, committed, sample)| Some((self.aside.origin(side, at)?, committed, sample))));
        }
        early.retain(|(place, _, sample)| !self.was_safe(*place, sample));
        for (place, committed, sample) in early {
            let (history, at) = (self.history(place), sample.at.as_secs_f64());
            self.faults
                .add(4, "an offset was committed that was not complete", || format!("committed {committed} at {at:.3} s: {history}"));
        }
    }

    /// The offsets that the commits of a topic passed; which commit, and when that was seen first.
    fn passed<'s>(
        &mut self,
        samples: &'s [Sample],
        committed: impl Fn(&Sample) -> &BTreeMap<i32, i64>,
        topic: &str,
    ) -> Vec<(Place, i64, &'s Sample)> {
        let mut checked: BTreeMap<i32, i64> = BTreeMap::new();
        let mut passed = Vec::new();
        for sample in samples {
            for (partition, committed) in committed(sample) {
                let from = checked.insert(*partition, *committed).unwrap_or(0);
                if *committed < from {
                    let (at, committed) = (sample.at.as_secs_f64(), *committed);
                    self.faults.add(4, "a commit went back", || {
                        format!("partition {partition} of {topic}: from {from} to {committed} at {at:.3} s")
                    });
                    // What it passed was checked already.
                    checked.insert(*partition, from);
                    continue;
                }
                passed.extend((from..*committed).map(|offset| (Place { partition: *partition, offset }, *committed, sample)));
            }
        }
        passed
    }

    /// Whether a record whose offset is committed was complete, or lay in a retry or park topic where it was not.
    fn was_safe(&self, place: Place, sample: &Sample) -> bool {
        let below = |left: &Left, ends: &BTreeMap<i32, i64>| ends.get(&left.first.partition).is_some_and(|end| left.first.offset < *end);
        self.b.get(&place).is_some_and(|left| below(left, &sample.b))
            || self.dead.get(&place).is_some_and(|(left, _)| below(left, &sample.dead))
            || self
                .finals
                .get(&place)
                .is_some_and(|ends| ends.iter().any(|(index, answer)| *answer == Answer::Ignore && *index < sample.events))
            || self.aside.waits(place, sample)
    }

    fn duplicates(&mut self, evidence: &Evidence<'_>, verdict: &Verdict) {
        let of = |facts: &Self| {
            let places = facts.a.keys().copied();
            let count =
                |place: &Place| facts.b.get(place).map_or(0, |left| left.count) + facts.dead.get(place).map_or(0, |(left, _)| left.count);
            places.filter(|place| count(place) > 1).map(|place| facts.history(place)).collect::<Vec<_>>()
        };
        if evidence.line.guarantee == Guarantee::ExactlyOnce && verdict.duplicates > 0 {
            for history in of(self) {
                self.faults.add(5, "a read_committed reader sees a reply twice", || history);
            }
        }
        if !evidence.faults && (verdict.duplicates > 0 || verdict.delivered_again > 0) {
            let (duplicates, again) = (verdict.duplicates, verdict.delivered_again);
            self.faults.add(5, "duplicates though nothing was wrong", || format!("{duplicates} in topics, {again} deliveries"));
        }
    }
}

impl Facts<'_> {
    /// Check 9: of what was published while tables were swapped, nothing is lost or out of order.
    fn swaps(&mut self, evidence: &Evidence<'_>) {
        let published: HashMap<Place, Duration> = self.books.acks.iter().map(|ack| (ack.place, ack.at)).collect();
        for place in std::mem::take(&mut self.broken) {
            let Some(at) = published.get(&place) else { continue };
            if evidence.swaps.iter().any(|(from, to)| (*from..=*to).contains(at)) {
                let history = self.history(place);
                self.faults.add(9, "a promise was broken while tables were swapped", || history);
            }
        }
    }
}

#[cfg(test)]
mod tests;
