//! What is known of each record of A: what topics hold, and what the books say.

use std::collections::HashMap;

use uuid::Uuid;

use super::{Evidence, Facts, GAP_IN_A, Left, NOT_IN_A, Source, place_of};
use crate::{
    mesh::Found,
    soak::{
        ledger::{Ack, Answer, Books, Place, What},
        load::traced,
        payload::Payload,
    },
};

impl Facts<'_> {
    pub(super) fn enter_events(&mut self) {
        for (index, event) in self.books.events.iter().enumerate() {
            if let What::End(answer) = event.what
                && answer.is_final()
            {
                self.finals.entry(event.place).or_default().push((index, answer));
            }
        }
        for damaged in &self.books.damaged {
            self.faults.add(1, "the service was given something damaged", || damaged.clone());
        }
    }

    pub(super) fn enter_a(&mut self, evidence: &Evidence<'_>) {
        let mut seen: HashMap<Uuid, Place> = HashMap::new();
        // The numbers of each key's first sightings.
        let mut next: HashMap<u32, u32> = HashMap::new();
        for found in &evidence.contents.a {
            let place = place_of(found);
            let parsed = Payload::parse(found.value.as_deref().unwrap_or_default()).and_then(|payload| Ok((payload.name()?, payload)));
            let (name, payload) = match parsed {
                Ok(parsed) => parsed,
                Err(error) => {
                    self.faults.add(1, "a record of A is damaged", || format!("{place}: {error:#}"));
                    continue;
                }
            };
            if payload.run != evidence.run || found.key_text() != name.key_text() {
                self.faults.add(1, "a record of A is of another run or key", || format!("{place}: {}", found.text()));
                continue;
            }
            if evidence.books.refused.contains(&payload.uuid) {
                self.faults.add(7, "an attempt that was refused for good is in A", || format!("{name} {} at {place}", payload.uuid));
            }
            if let Some(first) = seen.insert(payload.uuid, place) {
                self.faults.add(5, "one attempt to publish is in A twice", || format!("{name} {} at {first} and {place}", payload.uuid));
            }
            let due = next.entry(name.key).or_default();
            if name.seq > *due {
                let due = *due;
                self.faults.add(1, GAP_IN_A, || format!("k{}#{due} before {name} at {place}", name.key));
            }
            *due = (*due).max(name.seq + 1);
            self.a.insert(place, Source { name, uuid: payload.uuid });
        }
    }

    pub(super) fn acknowledged(&mut self, evidence: &Evidence<'_>) {
        let values: HashMap<Place, &Found> = evidence.contents.a.iter().map(|found| (place_of(found), found)).collect();
        let by_uuid: HashMap<Uuid, Place> = self.a.iter().map(|(place, source)| (source.uuid, *place)).collect();
        for ack in &evidence.books.acks {
            let said = ack.place;
            // Without an offset it may be anywhere in its partition.
            let found = by_uuid.get(&ack.uuid).filter(|place| said.offset < 0 && place.partition == said.partition);
            let ack = Ack { place: found.copied().unwrap_or(said), ..*ack };
            let made = Payload::new(evidence.run, ack.producer, ack.name, ack.uuid).bytes();
            let equal = values.get(&ack.place).is_some_and(|found| found.value.as_deref() == Some(&*made));
            if !equal {
                let there =
                    values.get(&ack.place).map_or_else(|| "nothing is there".to_owned(), |found| format!("there is {}", found.text()));
                let (name, place, at) = (ack.name, ack.place, ack.at.as_secs_f64());
                self.broken.push(place);
                self.faults.add(1, NOT_IN_A, || format!("{name} {} acknowledged at {at:.3} s at {place}: {there}", ack.uuid));
            }
        }
    }

    /// The source that a header `mesh-cause` names: route, topic/partition/offset, index.
    pub(super) fn cause(found: &Found, route: &str) -> Option<Place> {
        let cause = found.header("mesh-cause")?;
        let mut words = cause.split(' ');
        let (of, position, index) = (words.next()?, words.next()?, words.next()?);
        let mut parts = position.rsplit('/');
        let (offset, partition) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        (of == route && index == "0").then_some(Place { partition, offset })
    }

    pub(super) fn enter_b(&mut self, evidence: &Evidence<'_>) {
        for found in &evidence.contents.b {
            let at = place_of(found);
            let source = Self::cause(found, evidence.line.name);
            let Some((place, known)) = source.and_then(|place| Some((place, self.a.get(&place)?))) else {
                let cause = found.header("mesh-cause");
                self.faults.add(6, "a record of B has no cause in A", || format!("{at}: mesh-cause {cause:?}: {}", found.text()));
                continue;
            };
            let payload = Payload::parse(found.value.as_deref().unwrap_or_default());
            if !payload.is_ok_and(|payload| payload.uuid == known.uuid) || found.key_text() != known.name.key_text() {
                let name = known.name;
                self.faults.add(6, "a reply is not what the service said", || format!("{name} of {place} at {at}: {}", found.text()));
            } else if found.header("traceparent").and_then(|header| traced(&header)) != Some(known.uuid) {
                let (name, header) = (known.name, found.header("traceparent"));
                self.faults.add(6, "a reply is not of its record's trace", || format!("{name} of {place} at {at}: {header:?}"));
            }
            if !self.finals.get(&place).is_some_and(|ends| ends.iter().any(|end| end.1 == Answer::Reply)) {
                let history = self.history(place);
                self.faults.add(6, "a reply that the service never gave", || format!("at {at}: {history}"));
            }
            let mesh_id = found.header("mesh-id").unwrap_or_default();
            let left = self.b.entry(place).or_insert_with(|| Left { first: at, mesh_id: mesh_id.clone(), count: 0 });
            left.count += 1;
            if left.mesh_id != mesh_id {
                let first = left.first;
                self.faults.add(5, "a duplicate has another mesh-id", || format!("{place}: at {first} and {at}"));
            }
        }
    }

    pub(super) fn enter_dead(&mut self, evidence: &Evidence<'_>) {
        for found in &evidence.contents.dead {
            let at = place_of(found);
            let number = |name: &str| found.header(name).and_then(|value| value.parse::<i64>().ok());
            let place = number("mesh-dlq-partition")
                .zip(number("mesh-dlq-offset"))
                .map(|(partition, offset)| Place { partition: partition as i32, offset })
                .filter(|place| self.a.contains_key(place));
            let Some(place) = place else {
                self.faults.add(6, "a dead letter has no origin in A", || format!("{at}: {}", found.text()));
                continue;
            };
            let known = self.a.get(&place).map(|source| source.uuid);
            if Payload::parse(found.value.as_deref().unwrap_or_default()).ok().map(|payload| payload.uuid) != known {
                self.faults.add(6, "a dead letter is not its record", || format!("{place} at {at}: {}", found.text()));
            }
            let reason = found.header("mesh-dlq-reason").unwrap_or_default();
            let mesh_id = found.header("mesh-id").unwrap_or_default();
            let (left, _) = self.dead.entry(place).or_insert_with(|| (Left { first: at, mesh_id, count: 0 }, reason));
            left.count += 1;
        }
    }

    /// What is known of a record: for whoever has to find out what went wrong.
    pub(super) fn history(&self, place: Place) -> String {
        let name = self.a.get(&place).map_or_else(|| "not in A".to_owned(), |source| format!("{} {}", source.name, source.uuid));
        let mut text = format!("{name} at A {place}");
        if let Some(ack) = self.books.acks.iter().find(|ack| ack.place == place) {
            text += &format!("; acknowledged at {:.3} s", ack.at.as_secs_f64());
        }
        for event in self.books.events.iter().filter(|event| event.place == place).take(12) {
            text += &format!("; {:?} at {:.3} s", event.what, event.at.as_secs_f64());
        }
        text += &self.aside.history(place);
        if let Some(left) = self.b.get(&place) {
            text += &format!("; in B at {} ({} times)", left.first, left.count);
        }
        if let Some((left, reason)) = self.dead.get(&place) {
            text += &format!("; dead letter at {} ({reason})", left.first);
        }
        text
    }
}

pub(super) fn self_history(books: &Books, place: Place) -> String {
    let events: Vec<String> =
        books.events.iter().filter(|event| event.place == place).take(4).map(|event| format!("{} {:?}", event.name, event.what)).collect();
    format!("{place}: {}", events.join(", "))
}
