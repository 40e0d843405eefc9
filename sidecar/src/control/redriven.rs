//! Which dead letters were sent back: their marks in `__mesh.redriven`.
//!
//! A record for each transaction, under `<mesh>/<topic>/<partition>/<id>`, with the offsets of the letters; its header [`LETTERS`] says which letters
//! they were, in the same order, since a topic that was deleted and made anew has other letters at these offsets.
//!
//! Invariant: a mark that does not say which letter it was counts for whatever lies at its offset: nothing is sent twice.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;

use super::{
    range::{Limits, RangeReader, ranges},
    reset::OperationError,
    state::Shared,
    topics::REDRIVEN_TOPIC,
};
use crate::{
    broker::Outgoing,
    record::{Header, Position, Record, TopicPartition},
};

/// The header of a mark with the identities of its letters, hexadecimal.
const LETTERS: &str = "letters";

/// Which letters of a topic were sent back.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Marks(HashSet<(i32, i64, Option<u64>)>);

impl Marks {
    /// Reads the marks of a dead-letter topic.
    pub(super) async fn read(shared: &Shared, topic: &str) -> Result<Self, OperationError> {
        let prefix = format!("{}/{topic}/", shared.config.mesh);
        let mut marks = Self::default();
        let mut reader = RangeReader::open(&*shared.broker, ranges(&*shared.broker.admin(), REDRIVEN_TOPIC, &Limits::default()).await?)?;
        while let Some(batch) = reader.next().await? {
            batch.records.iter().for_each(|(_, record)| marks.add(&prefix, record));
        }
        reader.close().await;
        Ok(marks)
    }

    fn add(&mut self, prefix: &str, record: &Record) {
        let text = |bytes: Option<&Bytes>| bytes.and_then(|bytes| std::str::from_utf8(bytes).ok().map(str::to_owned));
        let partition = text(record.key.as_ref()).and_then(|key| key.strip_prefix(prefix)?.split('/').next()?.parse().ok());
        let (Some(partition), Some(offsets)) = (partition, text(record.value.as_ref())) else { return };
        let letters = record.header_str(LETTERS).unwrap_or_default();
        let mut letters = letters.split(',').map(|letter| u64::from_str_radix(letter, 16).ok());
        for offset in offsets.split(',') {
            let letter = letters.next().flatten();
            self.0.extend(offset.parse().ok().map(|offset| (partition, offset, letter)));
        }
    }

    /// Whether the letter of this identity, which lies there, was sent back.
    pub(super) fn has(&self, partition: i32, offset: i64, letter: u64) -> bool {
        [None, Some(letter)].into_iter().any(|letter| self.0.contains(&(partition, offset, letter)))
    }
}

/// The records that mark letters, each with its identity, as sent back: one for each partition.
pub(super) fn marks<'a>(mesh: &str, letters: impl Iterator<Item = (&'a Position, u64)>) -> Vec<Outgoing> {
    let mut by_partition: BTreeMap<&TopicPartition, (Vec<String>, Vec<String>)> = BTreeMap::new();
    for (position, letter) in letters {
        let (offsets, identities) = by_partition.entry(&position.partition).or_default();
        offsets.push(position.offset.to_string());
        identities.push(format!("{letter:x}"));
    }
    let mark = |(partition, (offsets, identities)): (&TopicPartition, (Vec<String>, Vec<String>))| {
        let key = format!("{mesh}/{}/{}/{}", partition.topic, partition.partition, uuid::Uuid::new_v4().simple());
        let headers = vec![Header::new(LETTERS, identities.join(","))];
        let record = Record { key: Some(key.into()), value: Some(offsets.join(",").into()), headers, timestamp_ms: None };
        Outgoing { topic: REDRIVEN_TOPIC.into(), partition: Some(0), record }
    };
    by_partition.into_iter().map(mark).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(partition: i32, offset: i64) -> Position {
        Position { partition: TopicPartition::new("work.dlq", partition), offset }
    }

    fn read(records: &[Record]) -> Marks {
        let mut marks = Marks::default();
        records.iter().for_each(|record| marks.add("shop/work.dlq/", record));
        marks
    }

    #[test]
    fn a_mark_is_of_one_letter() {
        let letters = [(at(0, 3), 7), (at(1, 3), 8), (at(0, 4), u64::MAX)];
        let written = marks("shop", letters.iter().map(|(position, letter)| (position, *letter)));
        assert_eq!(written.len(), 2, "one for each partition");
        let marks = read(&written.into_iter().map(|mark| mark.record).collect::<Vec<_>>());
        assert!(letters.iter().all(|(position, letter)| marks.has(position.partition.partition, position.offset, *letter)));
        assert!(!marks.has(0, 3, 8) && !marks.has(0, 5, 7) && !marks.has(2, 3, 7));
    }

    #[test]
    fn a_mark_that_does_not_say_which_letter_counts_for_any() {
        let mark =
            |key: &str, headers| Record { key: Some(key.to_owned().into()), value: Some("3,4,x".into()), headers, timestamp_ms: None };
        let marks = read(&[
            mark("shop/work.dlq/0/a", Vec::new()),
            mark("shop/work.dlq.other/1/a", Vec::new()),
            mark("other/work.dlq/1/a", Vec::new()),
        ]);
        assert!(marks.has(0, 3, 1) && marks.has(0, 4, 2) && !marks.has(0, 5, 1) && !marks.has(1, 3, 1));
        let short = read(&[mark("shop/work.dlq/0/a", vec![Header::new(LETTERS, "7")])]);
        assert!(short.has(0, 3, 7) && !short.has(0, 3, 8) && short.has(0, 4, 8));
    }
}
