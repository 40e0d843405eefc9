//! Check 3: the order of a lane, at the service and in B.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::super::{
    ledger::{Answer, Place, What},
    lines::{Guarantee, Order},
};
use super::{Evidence, Facts, Lane, REPLIES_DISORDERED, STARTED_EARLY, facts::self_history, place_of};

impl Facts<'_> {
    pub(super) fn order_at_the_service(&mut self, evidence: &Evidence<'_>) {
        let mut homes: HashMap<u32, Place> = HashMap::new();
        let mut lanes: HashMap<Lane, Vec<Place>> = HashMap::new();
        let mut at: HashMap<Place, (Lane, usize)> = HashMap::new();
        for (place, source) in &self.a {
            let key = source.name.key;
            let first = *homes.entry(key).or_insert(*place);
            if first.partition != place.partition {
                self.faults.add(3, "a key is in two partitions", || format!("k{key}: {first} and {place}"));
            }
            let lane = match evidence.line.order {
                Order::Key => Lane::Key(key),
                Order::Partition => Lane::Partition(place.partition),
                Order::None => continue,
            };
            let places = lanes.entry(lane).or_default();
            at.insert(*place, (lane, places.len()));
            places.push(*place);
        }
        let mut done: HashMap<Lane, usize> = HashMap::new();
        let (mut started, mut ended): (HashSet<Place>, HashSet<Place>) = Default::default();
        let enough = self.enough(evidence);
        let mut early = Vec::new();
        for event in &self.books.events {
            let Some((lane, index)) = at.get(&event.place).copied() else { continue };
            match event.what {
                What::End(answer) if answer.is_final() => drop(ended.insert(event.place)),
                What::End(_) => {}
                What::Start(attempt) => {
                    if enough.get(&event.place).is_some_and(|enough| attempt >= *enough) {
                        ended.insert(event.place);
                    }
                    if !started.insert(event.place) {
                        continue;
                    }
                    let prefix = done.entry(lane).or_default();
                    let places = &lanes[&lane];
                    while *prefix < index && ended.contains(&places[*prefix]) {
                        *prefix += 1;
                    }
                    if *prefix < index {
                        early.push((event.place, event.at, places[*prefix]));
                    }
                }
            }
        }
        for (place, when, before) in early {
            self.broken.push(place);
            let (history, when) = (self.history(before), when.as_secs_f64());
            self.faults.add(3, STARTED_EARLY, || format!("{place} at {when:.3} s, before {history}"));
        }
        let unknown: BTreeSet<Place> =
            self.books.events.iter().map(|event| event.place).filter(|place| !self.a.contains_key(place)).collect();
        for place in unknown {
            self.faults.add(6, "the service was given a record that is not in A", || self_history(self.books, place));
        }
    }

    pub(super) fn order_in_b(&mut self, evidence: &Evidence<'_>) {
        if evidence.line.order == Order::None {
            return;
        }
        // By key, the last source whose first reply was seen.
        let mut last: HashMap<u32, Place> = HashMap::new();
        let mut disordered = Vec::new();
        for found in &evidence.contents.b {
            let Some(place) = Self::cause(found, evidence.line.name) else { continue };
            let Some(source) = self.a.get(&place) else { continue };
            if self.b.get(&place).is_some_and(|left| left.first != place_of(found)) || self.was_given_up(evidence, place) {
                continue;
            }
            let before = last.insert(source.name.key, place);
            if let Some(before) = before.filter(|before| *before > place) {
                disordered.push((place, before));
            }
        }
        for (place, before) in disordered {
            self.broken.push(place);
            let (one, other) = (self.history(place), self.history(before));
            self.faults.add(3, REPLIES_DISORDERED, || format!("{one}, behind {other}"));
        }
    }

    /// Whether a record that was replied to had ended before, as a dead letter whose attempts were used up. With `at_least_once` one whose commit was
    /// lost comes again, and may end otherwise: that is a duplicate, and its place in the order is that of the dead letter.
    fn was_given_up(&self, evidence: &Evidence<'_>, place: Place) -> bool {
        let exhausted = self.dead.get(&place).is_some_and(|(_, reason)| reason == "attempts");
        if !exhausted || evidence.line.guarantee != Guarantee::AtLeastOnce {
            return false;
        }
        let mut attempt = 0;
        for event in self.books.events.iter().filter(|event| event.place == place) {
            match event.what {
                What::Start(number) => attempt = number,
                What::End(Answer::Reply) => return false,
                What::End(_) if attempt >= evidence.line.last_attempt() => return true,
                What::End(_) => {}
            }
        }
        false
    }
}
