//! Reads ranges of offsets, each to its end, without a group.
//!
//! Invariant: it ends: what is appended after the ranges were taken is not read, and where only markers or gaps are left the broker is asked.
//! Invariant: it never ends early: a broker that is slow is waited for, and then it is an error.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use bytestring::ByteString;
use tokio::time::{Instant, timeout};

use super::reset::OperationError;
use crate::{
    broker::{Admin, Broker, BrokerError, BrokerErrorKind, Consumer, ConsumerConfig, Event, StartOffset},
    record::{Batch, Header, Position, Record, TopicPartition},
};

/// How long nothing comes until the broker is asked whether there is more: compaction and the markers of transactions leave gaps. A client of its own asks, so
/// each time that it was in vain the next pause is twice as long, up to the longest.
const QUIET: Duration = Duration::from_millis(200);
const LONGEST_QUIET: Duration = Duration::from_secs(2);
/// How long a broker that is in trouble, or sends nothing of what it has, is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much is fetched ahead, in bytes.
const BUFFER: usize = 4 << 20;

/// Offsets of a partition, the end not among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) partition: TopicPartition,
    pub(super) from: i64,
    pub(super) until: i64,
}

/// What limits a reading of a topic.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits {
    /// Only these partitions. Empty: all.
    pub(super) partitions: Vec<i32>,
    pub(super) from_offset: Option<i64>,
    pub(super) until_offset: Option<i64>,
    /// In milliseconds since 1970-01-01 UTC.
    pub(super) since_ms: Option<i64>,
    pub(super) until_ms: Option<i64>,
}

/// The ranges of a topic that exist now, within limits. Those that are empty are left out.
pub(super) async fn ranges(admin: &dyn Admin, topic: &str, limits: &Limits) -> Result<Vec<Range>, OperationError> {
    let count = admin.topics().await?.get(topic).copied();
    let count = count.ok_or_else(|| BrokerError::new(BrokerErrorKind::UnknownTopic, format!("there is no topic {topic}")))?;
    if let Some(wrong) = limits.partitions.iter().find(|partition| !(0..count).contains(partition)) {
        return Err(OperationError::Invalid(format!("topic {topic} has partitions 0 to {}, there is no partition {wrong}", count - 1)));
    }
    let since = match limits.since_ms {
        Some(time) => Some(admin.offsets_at(topic, time).await?),
        None => None,
    };
    let until = match limits.until_ms {
        Some(time) => Some(admin.offsets_at(topic, time).await?),
        None => None,
    };
    let name: Arc<str> = topic.into();
    let mut ranges = Vec::new();
    for (index, number) in (0..count).enumerate().filter(|(_, number)| limits.partitions.is_empty() || limits.partitions.contains(number)) {
        let partition = TopicPartition { topic: name.clone(), partition: number };
        let (low, high) = admin.watermarks(&partition).await?;
        let of = |offsets: &Option<Vec<i64>>| offsets.as_ref().and_then(|offsets| offsets.get(index).copied());
        let from = [Some(low), of(&since), limits.from_offset].into_iter().flatten().max().unwrap_or(low);
        let until = [Some(high), of(&until), limits.until_offset].into_iter().flatten().min().unwrap_or(high);
        if from < until {
            ranges.push(Range { partition, from, until });
        }
    }
    Ok(ranges)
}

/// Reads ranges.
pub(super) struct RangeReader {
    consumer: Box<dyn Consumer>,
    admin: Arc<dyn Admin>,
    left: BTreeMap<TopicPartition, Range>,
    trouble: Option<BrokerError>,
}

impl RangeReader {
    pub(super) fn open(broker: &dyn Broker, ranges: Vec<Range>) -> Result<Self, BrokerError> {
        let mut consumer = broker.consumer(ConsumerConfig::reader(Vec::new(), StartOffset::Earliest, BUFFER))?;
        consumer.assign(ranges.iter().map(|range| (range.partition.clone(), range.from)).collect());
        let left = ranges.into_iter().map(|range| (range.partition.clone(), range)).collect();
        Ok(Self { consumer, admin: broker.admin(), left, trouble: None })
    }

    /// The next records, those of one partition in their order; `None` at the end of all ranges.
    pub(super) async fn next(&mut self) -> Result<Option<Batch>, BrokerError> {
        let (mut until, mut quiet) = (Instant::now() + PATIENCE, QUIET);
        loop {
            if self.left.is_empty() {
                return Ok(None);
            }
            let Ok(event) = timeout(quiet, self.consumer.next()).await else {
                quiet = LONGEST_QUIET.min(quiet * 2);
                self.end_at_gaps().await;
                if Instant::now() < until {
                    continue;
                }
                let Some(range) = self.left.values().next() else { return Ok(None) };
                return Err(self.trouble.take().unwrap_or_else(|| {
                    let detail = format!("{} from offset {}: the broker sent nothing for {PATIENCE:?}", range.partition, range.from);
                    BrokerError::new(BrokerErrorKind::Unreachable, detail)
                }));
            };
            // Trouble that changes, or that comes and goes, is no progress.
            if matches!(event, Event::Records(_) | Event::Expired { .. }) {
                (until, quiet) = (Instant::now() + PATIENCE, QUIET);
            }
            match event {
                Event::Records(mut batch) => {
                    let Some(range) = self.left.get_mut(&batch.partition) else { continue };
                    if let Some((last, _)) = batch.records.last() {
                        range.from = last + 1;
                    }
                    let until = range.until;
                    if range.from >= until {
                        self.left.remove(&batch.partition);
                        self.consumer.unassign(std::slice::from_ref(&batch.partition));
                    }
                    batch.records.retain(|(offset, _)| *offset < until);
                    if !batch.records.is_empty() {
                        return Ok(Some(batch));
                    }
                }
                Event::Expired { partition, to, .. } => {
                    if self.left.get(&partition).is_some_and(|range| to >= range.until) {
                        self.left.remove(&partition);
                    }
                }
                Event::Trouble(error) => self.trouble = Some(error),
                Event::Recovered => self.trouble = None,
                Event::Assigned(_) | Event::Revoking(_) => {}
            }
        }
    }

    /// Ends ranges in which no record is left. A broker that does not say so is asked again later.
    async fn end_at_gaps(&mut self) {
        if self.trouble.is_some() {
            return;
        }
        let asked: Vec<Position> =
            self.left.values().map(|range| Position { partition: range.partition.clone(), offset: range.from }).collect();
        let mut ended = Vec::new();
        for (position, readable) in asked.iter().zip(self.admin.readable(asked.clone()).await) {
            match readable {
                Ok(true) => {}
                Ok(false) => ended.push(position.partition.clone()),
                Err(error) => tracing::debug!(partition = %position.partition, %error, "not known whether there are more records"),
            }
        }
        self.consumer.unassign(&ended);
        self.left.retain(|partition, _| !ended.contains(partition));
    }

    /// Reads a range besides, anew if it was read before.
    pub(super) fn add(&mut self, range: Range) {
        self.consumer.assign(vec![(range.partition.clone(), range.from)]);
        self.left.insert(range.partition.clone(), range);
    }

    pub(super) async fn close(self) {
        self.consumer.close().await;
    }
}

/// A copy of a record that holds nothing but itself: records of a batch share the memory of all of it.
pub(super) fn owned(record: &Record) -> Record {
    let copy = |bytes: &Option<Bytes>| bytes.as_ref().map(|bytes| Bytes::copy_from_slice(bytes));
    let header = |header: &Header| Header { name: ByteString::from(header.name.to_string()), value: copy(&header.value) };
    Record {
        key: copy(&record.key),
        value: copy(&record.value),
        headers: record.headers.iter().map(header).collect(),
        timestamp_ms: record.timestamp_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::fake::Fake;

    fn of(number: i32, offset: i64) -> Event {
        Event::Records(Batch { partition: TopicPartition::new("in", number), records: vec![(offset, Record::default())] })
    }

    fn reader(fake: &Fake) -> RangeReader {
        let range = |number| Range { partition: TopicPartition::new("in", number), from: 0, until: 3 };
        RangeReader::open(fake, (0..2).map(range).collect()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_broker_that_is_slow_does_not_cut_a_range_short() {
        let fake = Fake::new(&["in"]);
        let mut reader = reader(&fake);
        let events = fake.0.lock().unwrap().consumers[0].events.clone();
        let sent = tokio::spawn(async move {
            for offset in 0..3 {
                tokio::time::sleep(PATIENCE - LONGEST_QUIET * 2).await;
                events.send(of(0, offset)).await.unwrap();
            }
            // What came later is not of the range; the other partition's is a gap but for its last.
            events.send(of(0, 3)).await.unwrap();
            events.send(of(1, 2)).await.unwrap();
            events
        });
        let mut found = Vec::new();
        while let Some(batch) = reader.next().await.unwrap() {
            found.extend(batch.records.iter().map(|(offset, _)| (batch.partition.partition, *offset)));
        }
        assert_eq!(found, [(0, 0), (0, 1), (0, 2), (1, 2)]);
        drop(sent.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_broker_that_says_nothing_is_an_error_and_a_gap_is_an_end() {
        let fake = Fake::new(&["in"]);
        let mut silent = reader(&fake);
        let error = silent.next().await.unwrap_err().to_string();
        assert!(error.contains("in/0 from offset 0") && error.contains("30s"), "{error}");
        let fake = Fake::new(&["in"]);
        fake.0.lock().unwrap().readable = false;
        assert!(reader(&fake).next().await.unwrap().is_none());
    }
}
