//! Reads ranges of offsets, each to its end, without a group.
//!
//! Invariant: it ends: what is appended after the ranges were taken is not read, and an end that only markers or gaps lead to is found by silence.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::reset::OperationError;
use crate::{
    broker::{Admin, Broker, BrokerError, BrokerErrorKind, Consumer, ConsumerConfig, Event, StartOffset},
    record::{Batch, TopicPartition},
};

/// How long nothing comes until the rest of the ranges is taken for gaps: compaction and the markers of transactions leave some.
const QUIET: Duration = Duration::from_secs(2);
/// How long trouble of the broker is waited for.
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
    left: BTreeMap<TopicPartition, Range>,
    trouble: Option<BrokerError>,
}

impl RangeReader {
    pub(super) fn open(broker: &dyn Broker, ranges: Vec<Range>) -> Result<Self, BrokerError> {
        let mut consumer = broker.consumer(ConsumerConfig::reader(Vec::new(), StartOffset::Earliest, BUFFER))?;
        consumer.assign(ranges.iter().map(|range| (range.partition.clone(), range.from)).collect());
        let left = ranges.into_iter().map(|range| (range.partition.clone(), range)).collect();
        Ok(Self { consumer, left, trouble: None })
    }

    /// The next records, those of one partition in their order; `None` at the end of all ranges.
    pub(super) async fn next(&mut self) -> Result<Option<Batch>, BrokerError> {
        loop {
            if self.left.is_empty() {
                return Ok(None);
            }
            let wait = if self.trouble.is_some() { PATIENCE } else { QUIET };
            let Ok(event) = timeout(wait, self.consumer.next()).await else {
                return self.trouble.take().map_or(Ok(None), Err);
            };
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

    pub(super) async fn close(self) {
        self.consumer.close().await;
    }
}
