//! What retry and park topics add to the checks.
//!
//! - 2: in the end nothing waits there; a dead letter whose attempts are used up went through all retry topics.
//! - 3: of a key no record starts before earlier ones that wait there are done; none starts before its pause is over.
//! - 4: what is committed in the source, or there, is complete or lies further on.
//! - 5: no attempt beyond those that are declared; without a fault each once, and each record once in a retry topic.
//! - 6: what lies there is a record of A as it was; an attempt after those in place was written down there.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, UNIX_EPOCH},
};

use super::{Evidence, Facts, Place, Sample, place_of};
use crate::soak::{
    ledger::What,
    lines::Line,
    load::traced,
    payload::{Payload, Treatment},
};

/// How far two readings of one clock may be apart.
const SLACK: Duration = Duration::from_millis(100);

/// A record in a retry or park topic.
#[derive(Clone, Copy, Debug)]
struct Copy {
    /// Which topic.
    side: usize,
    at: Place,
    /// How many attempts were made.
    attempts: u32,
    /// When it is due, since the epoch.
    due: Option<Duration>,
}

/// What lies in retry and park topics.
#[derive(Debug, Default)]
pub(super) struct Aside {
    /// By place in A.
    copies: HashMap<Place, Vec<Copy>>,
    /// By place in each topic, the place in A.
    origins: Vec<HashMap<Place, Place>>,
}

impl Aside {
    /// How many topics there are.
    pub(super) fn len(&self) -> usize {
        self.origins.len()
    }

    /// Where in A a record of one of them is from.
    pub(super) fn origin(&self, side: usize, at: Place) -> Option<Place> {
        self.origins.get(side)?.get(&at).copied()
    }

    /// How many records lie in retry topics, and in the park topic.
    pub(super) fn counts(&self, line: Line) -> (usize, usize) {
        let (retry, park) = self.origins.split_at(line.pauses.len().min(self.len()));
        let count = |topics: &[HashMap<Place, Place>]| topics.iter().map(HashMap::len).sum();
        (count(retry), count(park))
    }

    /// Whether a record of A lay there at a moment, where it was not committed.
    pub(super) fn waits(&self, place: Place, sample: &Sample) -> bool {
        self.of(place).iter().any(|copy| {
            let of = |offsets: &BTreeMap<i32, i64>| offsets.get(&copy.at.partition).copied().unwrap_or(0);
            sample.sides.get(copy.side).is_some_and(|side| (of(&side.committed)..of(&side.ends)).contains(&copy.at.offset))
        })
    }

    /// What is known of a record.
    pub(super) fn history(&self, place: Place) -> String {
        let text = |copy: &Copy| format!("; in topic {} beside the source at {} after {} attempts", copy.side + 1, copy.at, copy.attempts);
        self.of(place).iter().map(text).collect()
    }

    fn of(&self, place: Place) -> &[Copy] {
        self.copies.get(&place).map_or(&[], Vec::as_slice)
    }
}

impl Facts<'_> {
    pub(super) fn enter_aside(&mut self, evidence: &Evidence<'_>) {
        self.aside.origins = vec![HashMap::new(); evidence.contents.sides.len()];
        for (side, found) in evidence.contents.sides.iter().enumerate().flat_map(|(side, all)| all.iter().map(move |found| (side, found))) {
            let at = place_of(found);
            // `topic/partition/offset timestamp`
            let header = found.header("mesh-origin").unwrap_or_default();
            let mut words = header.split(' ').next().unwrap_or_default().rsplit('/');
            let (offset, partition) = (words.next().and_then(|word| word.parse().ok()), words.next().and_then(|word| word.parse().ok()));
            let place = partition.zip(offset).map(|(partition, offset)| Place { partition, offset });
            let Some((place, known)) = place.and_then(|place| Some((place, self.a.get(&place)?))) else {
                self.faults
                    .add(6, "a record of a retry or park topic has no origin in A", || format!("{at}: {header:?}: {}", found.text()));
                continue;
            };
            let payload = Payload::parse(found.value.as_deref().unwrap_or_default());
            let own = payload.is_ok_and(|payload| payload.uuid == known.uuid) && found.key_text() == known.name.key_text();
            let id = found.header("mesh-id") == Some(known.uuid.to_string());
            let trace = found.header("traceparent").and_then(|header| traced(&header)) == Some(known.uuid);
            let attempts = found.header("mesh-attempt").and_then(|attempts| attempts.parse().ok());
            let due = found.header("mesh-retry-at").and_then(|due| due.parse().ok()).map(Duration::from_millis);
            let Some(attempts) = attempts.filter(|_| own && id && trace && place.partition == at.partition) else {
                let name = known.name;
                let headers =
                    || found.headers.iter().map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value))).collect::<Vec<_>>();
                self.faults.add(6, "a record of a retry or park topic is not as it was in A", || {
                    format!("{name} of {place} at {at} of topic {}: {} {:?}", side + 1, found.text(), headers())
                });
                continue;
            };
            self.aside.origins[side].insert(at, place);
            self.aside.copies.entry(place).or_default().push(Copy { side, at, attempts, due });
        }
    }

    /// For records whose attempts are used up: the attempt with which they count as done.
    ///
    /// Of a call that breaks with the service, the service may know nothing: so of those that went through retry topics under faults it is the last attempt but one.
    pub(super) fn enough(&self, evidence: &Evidence<'_>) -> HashMap<Place, u32> {
        let line = evidence.line;
        let enough = if line.pauses.is_empty() { 1 } else { line.last_attempt() - u32::from(evidence.faults) };
        self.dead.iter().filter(|(_, (_, reason))| reason == "attempts").map(|(place, _)| (*place, enough)).collect()
    }

    /// The attempts that the service saw are those that the route declares, and go on over retry topics.
    pub(super) fn attempts(&mut self, evidence: &Evidence<'_>) {
        let line = evidence.line;
        let began = evidence.began.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut seen: HashMap<Place, Vec<u32>> = HashMap::new();
        let mut odd = Vec::new();
        for event in &self.books.events {
            let What::Start(attempt) = event.what else { continue };
            if !self.a.contains_key(&event.place) {
                continue;
            }
            seen.entry(event.place).or_default().push(attempt);
            if attempt > line.last_attempt() {
                odd.push((5, "an attempt beyond the last that the route declares", event.place));
            } else if attempt > line.attempts {
                let mut written = self.aside.of(event.place).iter().filter(|copy| copy.attempts + 1 == attempt).peekable();
                if written.peek().is_none() {
                    odd.push((6, "an attempt after those in place that no retry topic knows of", event.place));
                } else if !written.any(|copy| copy.due.is_none_or(|due| due <= began + event.at + SLACK)) {
                    odd.push((3, "a record was started before its pause was over", event.place));
                }
            }
        }
        if !evidence.faults && line.batch.is_none() {
            for (place, source) in &self.a {
                let last = match line.treatment(source.name) {
                    Treatment::Fails(first) => line.last_attempt().min(first + 1),
                    _ => 1,
                };
                if seen.get(place).is_some_and(|seen| !seen.iter().copied().eq(1..=last)) {
                    odd.push((5, "other attempts than those that are declared, though nothing was wrong", *place));
                }
            }
        }
        for (place, copies) in &self.aside.copies {
            let retries = || copies.iter().filter(|copy| copy.side < line.pauses.len());
            let again =
                retries().any(|one| retries().any(|other| one.at < other.at && one.side == other.side && one.attempts == other.attempts));
            if again && !evidence.faults {
                odd.push((5, "a record was put into a retry topic twice", *place));
            }
        }
        for (place, (_, reason)) in &self.dead {
            let passed =
                |tier: usize| self.aside.of(*place).iter().any(|copy| copy.side == tier && copy.attempts == line.attempts + tier as u32);
            if reason == "attempts" && !(0..line.pauses.len()).all(passed) {
                odd.push((2, "a record was given up that was not in every retry topic", *place));
            }
        }
        for (check, what, place) in odd {
            let history = self.history(place);
            self.faults.add(check, what, || history);
        }
    }

    /// In the end nothing is left in retry and park topics.
    pub(super) fn nothing_waits(&mut self, evidence: &Evidence<'_>) {
        let Some(sample) = evidence.samples.last() else { return };
        let left: Vec<Place> = self.aside.copies.keys().copied().filter(|place| self.aside.waits(*place, sample)).collect();
        for place in left {
            self.broken.push(place);
            let history = self.history(place);
            self.faults.add(2, "a record waits in a retry or park topic in the end", || history);
        }
    }
}

#[cfg(test)]
mod tests;
