//! The model's part about retry and park topics: which records were written there, and which of them still wait there.
//!
//! Invariant: what is here waits as long as the group has not committed it; the ledger knows the commits.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    broker::Outgoing,
    record::{Position, TopicPartition},
};

/// A record in a retry or park topic.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    /// Its place in the source.
    pub(super) of: TopicPartition,
    pub(super) origin: i64,
    pub(super) attempts: u32,
    /// When it is due; only in retry topics.
    pub(super) due_ms: Option<i64>,
    /// It waits for somebody to release it.
    pub(super) kept: bool,
    /// Whoever wrote it knows that it is there, or somebody read it.
    pub(super) sure: bool,
    /// It was written by somebody who did not own its partition any more: nobody may ever look at it.
    pub(super) stale: bool,
}

/// What the group committed: everything below an offset, and more above.
pub(super) type Commits = BTreeMap<TopicPartition, (i64, BTreeSet<i64>)>;

/// Whether a group is done with an offset.
pub(super) fn is_done(commits: &Commits, partition: &TopicPartition, offset: i64) -> bool {
    commits.get(partition).is_some_and(|(below, above)| offset < *below || above.contains(&offset))
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Sides {
    topics: BTreeMap<TopicPartition, Vec<Waiting>>,
    places: BTreeMap<(TopicPartition, i64), Vec<Position>>,
}

impl Sides {
    /// Reads what is on its way to a retry or park topic; `None` for everything else.
    pub(super) fn parse(outgoing: &Outgoing) -> Result<Option<Waiting>, String> {
        let record = &outgoing.record;
        let Some(text) = record.header_str("mesh-origin") else { return Ok(None) };
        let wrong = || format!("the origin `{text}` of a record for {}", outgoing.topic);
        let place = text.split(' ').next().unwrap_or_default();
        let [topic, partition, offset] = place.split('/').collect::<Vec<_>>()[..] else { return Err(wrong()) };
        let number = |text: &str| text.parse::<i64>().map_err(|_| wrong());
        let attempts = record.header_str("mesh-attempt").ok_or_else(wrong)?;
        Ok(Some(Waiting {
            of: TopicPartition::new(topic, number(partition)? as i32),
            origin: number(offset)?,
            attempts: number(attempts)? as u32,
            due_ms: record.header_str("mesh-retry-at").map(number).transpose()?,
            kept: record.header("mesh-parked").is_some(),
            sure: false,
            stale: false,
        }))
    }

    /// The offset of the next record.
    pub(super) fn end(&self, partition: &TopicPartition) -> i64 {
        self.topics.get(partition).map_or(0, |records| records.len() as i64)
    }

    pub(super) fn put(&mut self, position: &Position, waiting: Waiting) -> Result<(), String> {
        let end = self.end(&position.partition);
        if position.offset != end {
            return Err(format!("{position} is stored behind {end}"));
        }
        self.places.entry((waiting.of.clone(), waiting.origin)).or_default().push(position.clone());
        self.topics.entry(position.partition.clone()).or_default().push(waiting);
        Ok(())
    }

    pub(super) fn get(&self, partition: &TopicPartition, offset: i64) -> Option<&Waiting> {
        self.topics.get(partition)?.get(usize::try_from(offset).ok()?)
    }

    /// A record is known to be there.
    pub(super) fn is_sure(&mut self, partition: &TopicPartition, offset: i64) {
        if let Some(waiting) = self.topics.get_mut(partition).and_then(|records| records.get_mut(offset as usize)) {
            waiting.sure = true;
        }
    }

    /// All copies that were ever written of a record.
    pub(super) fn copies(&self, of: &TopicPartition, origin: i64) -> impl Iterator<Item = (&Position, &Waiting)> {
        let places = self.places.get(&(of.clone(), origin)).into_iter().flatten();
        places.filter_map(|place| Some((place, self.get(&place.partition, place.offset)?)))
    }

    /// Those of them that wait.
    pub(super) fn waiting(&self, commits: &Commits, of: &TopicPartition, origin: i64) -> impl Iterator<Item = &Waiting> {
        self.copies(of, origin).filter(|(place, _)| !is_done(commits, &place.partition, place.offset)).map(|(_, waiting)| waiting)
    }

    /// Everything.
    pub(super) fn all(&self) -> impl Iterator<Item = (&TopicPartition, i64, &Waiting)> {
        self.topics
            .iter()
            .flat_map(|(partition, records)| records.iter().enumerate().map(move |(offset, waiting)| (partition, offset as i64, waiting)))
    }

    /// The origins of which something was ever written, of one source partition.
    pub(super) fn origins<'a>(&'a self, of: &'a TopicPartition) -> impl Iterator<Item = i64> + 'a {
        let range = (of.clone(), i64::MIN)..=(of.clone(), i64::MAX);
        self.places.range(range).map(|((_, origin), _)| *origin)
    }
}
