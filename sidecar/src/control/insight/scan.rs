//! Reads parts of topics for a question that must end, and says what was left out.
//!
//! Invariant: of what is too much every partition keeps a fair share, so that a large one does not keep the others out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mesh_proto::v1;
use tokio::time::{Instant, timeout_at};

use super::super::{
    range::{Limits, Range, RangeReader, ranges},
    reset::OperationError,
};
use crate::{
    broker::{Admin, Broker, BrokerErrorKind},
    record::{Batch, TopicPartition},
};

/// How many topics the broker is asked about at once.
const QUESTIONS: usize = 8;
/// How many gaps of a topic are named.
const NAMED: usize = 4;

/// Which end of a range is kept where all of it is too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// The oldest records.
    First,
    /// The newest records.
    Last,
}

/// What a scan reads at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    pub(super) offsets: u64,
    pub(super) bytes: usize,
    pub(super) time: Duration,
    pub(super) keep: Keep,
}

/// The ranges of topics, within limits. Topics that do not exist are left out.
pub(super) async fn wanted(admin: &dyn Admin, mut topics: BTreeSet<Arc<str>>, limits: &Limits) -> Result<Vec<Range>, OperationError> {
    let existing = admin.topics().await?;
    topics.retain(|topic| existing.contains_key(&**topic));
    let asked = stream::iter(topics).map(|topic| async move {
        match ranges(admin, &topic, limits).await {
            // It was deleted meanwhile.
            Err(OperationError::Broker(error)) if error.kind == BrokerErrorKind::UnknownTopic => Ok(Vec::new()),
            other => other,
        }
    });
    let found: Vec<Vec<Range>> = asked.buffered(QUESTIONS).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

fn size(range: &Range) -> u64 {
    range.until.saturating_sub(range.from).max(0).unsigned_abs()
}

/// Cuts ranges so that they have at most so many offsets together: each partition keeps what it has, or an equal share of what is left.
fn share(ranges: &mut [Range], most: u64, keep: Keep) {
    let mut order: Vec<usize> = (0..ranges.len()).collect();
    order.sort_by_key(|index| ranges.get(*index).map_or(0, size));
    let mut left = most;
    for (done, index) in order.iter().enumerate() {
        let fair = left / (order.len() - done) as u64;
        let Some(range) = ranges.get_mut(*index) else { continue };
        let granted = size(range).min(fair);
        left -= granted;
        let granted = i64::try_from(granted).unwrap_or(i64::MAX);
        match keep {
            Keep::First => range.until = range.from.saturating_add(granted),
            Keep::Last => range.from = range.until.saturating_sub(granted),
        }
    }
}

/// A partition that is read.
#[derive(Debug)]
struct Part {
    wanted: Range,
    from: i64,
    /// Where reading goes on.
    next: i64,
    until: i64,
}

/// A reading within bounds.
pub(super) struct Scan {
    reader: Option<RangeReader>,
    bytes_left: usize,
    until: Instant,
    parts: BTreeMap<TopicPartition, Part>,
    records: BTreeMap<Arc<str>, u64>,
}

impl Scan {
    pub(super) fn open(broker: &dyn Broker, wanted: Vec<Range>, bound: Bound) -> Result<Self, OperationError> {
        let mut granted = wanted.clone();
        share(&mut granted, bound.offsets, bound.keep);
        let part = |(wanted, granted): (Range, &Range)| {
            (wanted.partition.clone(), Part { wanted, from: granted.from, next: granted.from, until: granted.until })
        };
        let parts = wanted.into_iter().zip(&granted).map(part).collect();
        granted.retain(|range| range.from < range.until);
        let reader = if granted.is_empty() { None } else { Some(RangeReader::open(broker, granted)?) };
        Ok(Self { reader, bytes_left: bound.bytes, until: Instant::now() + bound.time, parts, records: BTreeMap::new() })
    }

    /// Offsets that are to be read.
    pub(super) fn offsets(&self) -> u64 {
        self.parts.values().map(|part| part.until.saturating_sub(part.from).max(0).unsigned_abs()).sum()
    }

    /// The next records; `None` at the end, or when a bound is reached.
    pub(super) async fn next(&mut self) -> Result<Option<Batch>, OperationError> {
        let Some(reader) = self.reader.as_mut().filter(|_| self.bytes_left > 0) else { return Ok(None) };
        let Ok(read) = timeout_at(self.until, reader.next()).await else {
            self.bytes_left = 0;
            return Ok(None);
        };
        let Some(batch) = read? else {
            self.parts.values_mut().for_each(|part| part.next = part.until);
            self.bytes_left = 0;
            return Ok(None);
        };
        if let Some((part, (last, _))) = self.parts.get_mut(&batch.partition).zip(batch.records.last()) {
            part.next = last.saturating_add(1);
        }
        self.bytes_left = self.bytes_left.saturating_sub(batch.records.iter().map(|(_, record)| record.size()).sum());
        *self.records.entry(batch.partition.topic.clone()).or_default() += batch.records.len() as u64;
        Ok(Some(batch))
    }

    /// What was read, and what was left out.
    pub(super) async fn close(self) -> Vec<v1::Scanned> {
        if let Some(reader) = self.reader {
            reader.close().await;
        }
        scanned(&self.parts, &self.records)
    }
}

fn scanned(parts: &BTreeMap<TopicPartition, Part>, records: &BTreeMap<Arc<str>, u64>) -> Vec<v1::Scanned> {
    let mut topics: BTreeMap<&Arc<str>, (v1::Scanned, Vec<String>)> = BTreeMap::new();
    for (partition, part) in parts {
        let (topic, gaps) = topics.entry(&partition.topic).or_insert_with(|| {
            let records = records.get(&partition.topic).copied().unwrap_or_default();
            (v1::Scanned { topic: partition.topic.to_string(), records, ..v1::Scanned::default() }, Vec::new())
        });
        topic.partitions += 1;
        for (from, until) in [(part.wanted.from, part.from), (part.next, part.wanted.until)] {
            if from < until {
                topic.left_out += until.saturating_sub(from).unsigned_abs();
                gaps.push(format!("{}: {from} to {}", partition.partition, until - 1));
            }
        }
    }
    let said = topics.into_values().map(|(mut topic, mut gaps)| {
        let more = gaps.len().saturating_sub(NAMED);
        gaps.truncate(NAMED);
        topic.which = gaps.join(", ");
        if more > 0 {
            topic.which += &format!(", and {more} more");
        }
        topic
    });
    said.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Record;

    fn range(topic: &str, partition: i32, from: i64, until: i64) -> Range {
        Range { partition: TopicPartition::new(topic, partition), from, until }
    }

    #[test]
    fn a_large_partition_does_not_keep_the_others_out() {
        let all = || vec![range("a", 0, 100, 1_100), range("a", 1, 0, 5), range("b", 0, 0, 200)];
        let of = |ranges: &[Range]| ranges.iter().map(|range| (range.from, range.until)).collect::<Vec<_>>();
        let mut ranges = all();
        share(&mut ranges, 10_000, Keep::Last);
        assert_eq!(ranges, all(), "all of it has room");
        let mut ranges = all();
        share(&mut ranges, 205, Keep::Last);
        assert_eq!(of(&ranges), [(1_000, 1_100), (0, 5), (100, 200)]);
        let mut ranges = all();
        share(&mut ranges, 205, Keep::First);
        assert_eq!(of(&ranges), [(100, 200), (0, 5), (0, 100)]);
        let mut ranges = all();
        share(&mut ranges, 0, Keep::Last);
        assert!(ranges.iter().all(|range| range.from == range.until));
    }

    #[test]
    fn what_was_left_out_is_said() {
        let part = |wanted: Range, from, next, until| (wanted.partition.clone(), Part { wanted, from, next, until });
        let mut parts: BTreeMap<_, _> = [part(range("a", 0, 0, 100), 40, 90, 100), part(range("a", 1, 0, 10), 0, 10, 10)].into();
        let records = [(Arc::from("a"), 60)].into();
        let said = scanned(&parts, &records);
        assert_eq!((said.len(), said[0].partitions, said[0].records, said[0].left_out), (1, 2, 60, 50));
        assert_eq!(said[0].which, "0: 0 to 39, 0: 90 to 99");
        parts.extend((2..8).map(|number| part(range("a", number, 0, 3), 0, 1, 3)));
        assert!(scanned(&parts, &records)[0].which.ends_with("3: 1 to 2, and 4 more"));
    }

    /// A range that is read to its end has nothing left out, whatever its last offsets are.
    #[tokio::test(start_paused = true)]
    async fn a_scan_ends_with_what_it_read() {
        let fake = crate::broker::fake::Fake::new(&["in"]);
        let bound = Bound { offsets: 2, bytes: 1 << 20, time: Duration::from_secs(60), keep: Keep::Last };
        let mut scan = Scan::open(&fake, vec![range("in", 0, 0, 5)], bound).unwrap();
        assert_eq!(scan.offsets(), 2);
        let events = fake.0.lock().unwrap().consumers[0].events.clone();
        let records = vec![(3, Record::default()), (4, Record::default())];
        events.send(crate::broker::Event::Records(Batch { partition: TopicPartition::new("in", 0), records })).await.unwrap();
        assert_eq!(scan.next().await.unwrap().unwrap().records.len(), 2);
        assert!(scan.next().await.unwrap().is_none());
        let said = scan.close().await;
        assert_eq!((said[0].records, said[0].left_out, &*said[0].which), (2, 3, "0: 0 to 2"));
        // One of no offsets asks the broker for nothing.
        let mut scan = Scan::open(&fake, Vec::new(), bound).unwrap();
        assert!(scan.next().await.unwrap().is_none() && scan.close().await.is_empty());
        assert_eq!(fake.0.lock().unwrap().consumers.len(), 1);
    }
}
