//! What is stored: replies, dead letters, and what goes aside.

use std::collections::BTreeSet;

use super::super::{
    service::reply_value,
    sides::{Sides, is_done},
    world::Life,
};
use super::{Checked, End, Ledger, What, publication};
use crate::{
    broker::{Commit, Outgoing},
    record::{Position, TopicPartition},
};

impl Ledger {
    /// A record is stored.
    pub(in crate::consume::sim) fn stored(&mut self, life: &Life, outgoing: &Outgoing, position: &Position) -> Checked {
        let publication = publication(outgoing)?;
        if let What::Aside(_) = publication.what {
            return self.put_aside(life, outgoing, position);
        }
        let source = self.source(&publication.of, publication.offset).ok_or_else(|| format!("{publication:?} of nothing"))?;
        let number = source.planned.number;
        let expected = match &publication.what {
            What::Reply(index) => {
                let found = source.ends.iter().find_map(|end| match end {
                    End::Forward { topics, count, big } if index < count && topics.iter().any(|topic| **topic == *publication.topic) => {
                        Some(*big)
                    }
                    _ => None,
                });
                let big = found.ok_or_else(|| format!("{publication:?} is stored, but no answer says so: {:?}", source.ends))?;
                reply_value(number, *index, big)
            }
            What::Letter(reason) => {
                let meant = self.untouched(source).flatten() == Some(reason)
                    || (reason == "attempts" && source.exhausted && self.discarded)
                    || source.ends.iter().any(|end| match end {
                        End::Dead(dead) => dead == reason,
                        End::Forward { big, .. } => *big && reason == "reply",
                        _ => false,
                    });
                if !meant || *publication.topic != *self.plan.routes[0].dead_letter {
                    return Err(format!("{publication:?} is stored, but nothing says so: {:?}", source.ends));
                }
                source.planned.value.clone()
            }
            What::Aside(_) => return Err(format!("{publication:?} is no reply and no letter")),
        };
        let key = source.planned.key.map(|key| format!("k{key}"));
        if outgoing.record.value.as_deref() != Some(expected.as_bytes())
            || outgoing.record.key.as_deref() != key.as_deref().map(str::as_bytes)
        {
            return Err(format!("{publication:?} is stored with another value or key: {:?}", outgoing.record));
        }
        if self.plan.once
            && let Some((before, _)) =
                self.stored.iter().find(|(p, _)| p.of == publication.of && p.offset == publication.offset && p.ends(&publication))
        {
            return Err(format!("{publication:?} is stored though {before:?} is"));
        }
        *self.stored.entry(publication.clone()).or_default() += 1;
        self.logs.entry(position.partition.clone()).or_default().push(publication);
        Ok(())
    }

    /// A record is stored in a retry or park topic.
    fn put_aside(&mut self, life: &Life, outgoing: &Outgoing, position: &Position) -> Checked {
        let Some(mut waiting) = Sides::parse(outgoing)? else { return Ok(()) };
        let what = format!("{life} puts {}/{} into {position} after {} attempts", waiting.of, waiting.origin, waiting.attempts);
        let source = self.source(&waiting.of, waiting.origin).ok_or_else(|| format!("{what}, which was never published"))?;
        let key = source.planned.key.map(|key| format!("k{key}"));
        let record = &outgoing.record;
        if record.value.as_deref() != Some(source.planned.value.as_bytes()) || record.key.as_deref() != key.as_deref().map(str::as_bytes) {
            return Err(format!("{what} with another value or key: {record:?}"));
        }
        let own = self.plan.beside(&waiting.of.topic).contains(&position.partition.topic.to_string());
        if !own || position.partition.partition != waiting.of.partition || source.hidden || self.untouched(source).is_some() {
            return Err(format!("{what}, where it does not belong"));
        }
        if waiting.kept && !source.exhausted {
            return Err(format!("{what} for good"));
        }
        let anew = self.begins_anew(source) && waiting.attempts == 0;
        let owner = self.owners.get(&(life.process, life.number));
        let failures: Vec<_> =
            owner.and_then(|owner| owner.failures.get(&(waiting.of.clone(), waiting.origin))).into_iter().flatten().collect();
        let behind = waiting.due_ms.is_none() && !waiting.kept && waiting.attempts == 0;
        let known: BTreeSet<u32> =
            self.sides.copies(&waiting.of, waiting.origin).map(|(_, copy)| copy.attempts).filter(|n| *n > 0).collect();
        if !anew && !behind && !failures.iter().any(|failure| failure.0 == waiting.attempts) && !known.contains(&waiting.attempts) {
            return Err(format!("{what}, which were not made: {failures:?}"));
        }
        let earliest = failures.iter().filter(|failure| failure.0 == waiting.attempts).map(|(_, at, wish)| at + wish).min();
        if let Some(due) = waiting.due_ms
            && earliest.is_some_and(|earliest| due + 1 < earliest)
        {
            return Err(format!("{what}, due at {due}, before the service wished: {earliest:?}"));
        }
        let me = (life.process, life.number);
        let owners: Vec<_> = self.owners.iter().filter(|(_, owner)| owner.has.contains_key(&waiting.of)).map(|(who, _)| *who).collect();
        waiting.stale = life.is_evicted() || owners != [me];
        self.sides.put(position, waiting)
    }

    pub(in crate::consume::sim) fn acknowledged(&mut self, outgoing: &Outgoing, position: &Position) -> Checked {
        let publication = publication(outgoing)?;
        match publication.what {
            What::Aside(_) => self.sides.is_sure(&position.partition, position.offset),
            _ => drop(self.acknowledged.insert(publication)),
        }
        Ok(())
    }

    /// Where the next record of a topic's partition will be. Of a reply only its key is known: that stands for its partition.
    pub(in crate::consume::sim) fn place(&self, outgoing: &Outgoing) -> Position {
        match outgoing.partition {
            Some(number) => {
                let partition = TopicPartition::new(outgoing.topic.clone(), number);
                let offset = self.sides.end(&partition);
                Position { partition, offset }
            }
            None => {
                let key = outgoing.record.key.as_deref().map_or(0, |key| key.iter().fold(1, |sum, byte| sum * 31 + i32::from(*byte)));
                Position { partition: TopicPartition::new(outgoing.topic.clone(), key), offset: 0 }
            }
        }
    }

    /// A transaction is stored: its records and offsets at once.
    pub(in crate::consume::sim) fn transacted(&mut self, life: &Life, records: &[Outgoing], offsets: &[Commit]) -> Checked {
        let mut origins = BTreeSet::new();
        for outgoing in records {
            let place = self.place(outgoing);
            self.stored(life, outgoing, &place)?;
            self.acknowledged(outgoing, &place)?;
            let publication = publication(outgoing)?;
            origins.insert((publication.of, publication.offset));
        }
        self.committing(life, offsets)?;
        self.committed(life, offsets)?;
        for (of, origin) in origins {
            let ended = self.stored.keys().any(|publication| publication.of == of && publication.offset == origin);
            let places = usize::from(!is_done(&self.commits_made, &of, origin))
                + self.sides.waiting(&self.commits_made, &of, origin).count()
                + usize::from(ended);
            if places != 1 {
                return Err(format!("{life}: after a transaction {of}/{origin} is in {places} places"));
            }
        }
        Ok(())
    }
}
