//! Reads topics for an operator: up to their present ends, or what is appended for as long as somebody listens.
//!
//! Invariant: reading changes nothing: there is no group, and nothing is committed.
//! Invariant: what is in memory is bounded, however long a topic is and however slow the listener: he holds the reading back.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use mesh_proto::v1::{self, tail_request::From};
use mesh_routing::Route;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    Control,
    range::{Range, RangeReader},
    replay::{filter, view},
    reset::OperationError,
};
use crate::{
    broker::{Admin, BrokerError, ConsumerConfig, Event, StartOffset},
    record::{Batch, Position, Record, TopicPartition},
};

/// About how many bytes of records one message has.
const MESSAGE_BYTES: usize = 256 << 10;
/// How much is fetched ahead, in bytes.
const BUFFER: usize = 4 << 20;
/// How often it is told how far it is, while nothing is found.
const TOLD: Duration = Duration::from_secs(1);
/// How often topics that are followed are looked at for new partitions.
const LOOKED: Duration = Duration::from_secs(30);
/// After how many records others get their turn: a filter costs time.
const TURN: u64 = 256;

/// A partition, and where its reading begins.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Start {
    partition: TopicPartition,
    from: i64,
    low: i64,
    end: i64,
}

impl Start {
    fn message(&self) -> v1::TailedPartition {
        v1::TailedPartition {
            topic: self.partition.topic.to_string(),
            partition: self.partition.partition,
            from: self.from,
            end: self.end,
            low: self.low,
        }
    }
}

impl Control {
    /// Reads topics: to the end that they have now, or on and on. Ends when nobody listens any more.
    ///
    /// # Errors
    /// If the request is wrong, there is no such topic, or the broker fails. With `follow` a broker that is away is waited for, and told.
    pub async fn tail(&self, request: v1::TailRequest, out: mpsc::Sender<v1::TailResponse>) -> Result<(), OperationError> {
        let chosen = match request.filter.as_str() {
            "" => None,
            text => Some(filter(text.to_owned()).await?),
        };
        let admin = self.0.broker.admin();
        let starts = starts(&*admin, &request).await?;
        let left = if request.limit == 0 { u64::MAX } else { request.limit };
        let mut teller = Teller { filter: chosen, out, progress: v1::TailProgress::default(), left, told: Instant::now() };
        if !teller.say(Vec::new(), starts.iter().map(Start::message).collect()).await {
            return Ok(());
        }
        if request.follow {
            self.follow(&request, starts, &mut teller).await?;
        } else {
            let ranges = starts.into_iter().filter(|start| start.from < start.end);
            let ranges = ranges.map(|Start { partition, from, end, .. }| Range { partition, from, until: end }).collect();
            let mut reader = RangeReader::open(&*self.0.broker, ranges)?;
            while let Some(batch) = reader.next().await? {
                if !teller.take(batch).await {
                    break;
                }
            }
            reader.close().await;
        }
        teller.progress.finished = true;
        // Whoever listened may be gone.
        let _ = teller.say(Vec::new(), Vec::new()).await;
        Ok(())
    }

    async fn follow(&self, request: &v1::TailRequest, starts: Vec<Start>, teller: &mut Teller) -> Result<(), OperationError> {
        let mut known: BTreeSet<TopicPartition> = starts.iter().map(|start| start.partition.clone()).collect();
        let mut consumer = self.0.broker.consumer(ConsumerConfig::reader(Vec::new(), StartOffset::Earliest, BUFFER))?;
        consumer.assign(starts.into_iter().map(|start| (start.partition, start.from)).collect());
        let mut looks = interval(LOOKED);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick is now.
        looks.tick().await;
        loop {
            let event = tokio::select! {
                event = consumer.next() => Some(event),
                _ = looks.tick() => None,
            };
            let goes_on = match event {
                Some(Event::Records(batch)) => teller.take(batch).await,
                Some(Event::Expired { from, to, .. }) => {
                    teller.progress.expired += u64::try_from(to - from).unwrap_or(0);
                    teller.say(Vec::new(), Vec::new()).await
                }
                Some(Event::Trouble(error)) => teller.trouble(error.detail).await,
                Some(Event::Recovered) => teller.trouble(String::new()).await,
                Some(Event::Assigned(_) | Event::Revoking(_)) => true,
                None => match added(&*self.0.broker.admin(), request, &known).await {
                    Ok(added) if added.is_empty() => true,
                    Ok(added) => {
                        known.extend(added.iter().map(|start| start.partition.clone()));
                        consumer.assign(added.iter().map(|start| (start.partition.clone(), start.from)).collect());
                        teller.say(Vec::new(), added.iter().map(Start::message).collect()).await
                    }
                    // The consumer says so itself, and goes on by itself.
                    Err(error) => {
                        tracing::debug!(%error, "topics that are followed were not looked at for new partitions");
                        true
                    }
                },
            };
            if !goes_on {
                break;
            }
        }
        consumer.close().await;
        Ok(())
    }
}

/// Tells records, and how far it is.
struct Teller {
    filter: Option<Arc<Route>>,
    out: mpsc::Sender<v1::TailResponse>,
    progress: v1::TailProgress,
    /// How many may still be sent.
    left: u64,
    told: Instant,
}

impl Teller {
    /// Sends those of a batch that are wanted; whether it goes on.
    async fn take(&mut self, batch: Batch) -> bool {
        let (mut records, mut bytes) = (Vec::new(), 0);
        for (offset, record) in batch.records {
            self.progress.read += 1;
            if self.progress.read.is_multiple_of(TURN) {
                tokio::task::yield_now().await;
            }
            let position = Position { partition: batch.partition.clone(), offset };
            match self.filter.as_ref().map_or(Ok(true), |filter| filter.admits(&view(&record, &position))) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    self.progress.failed += 1;
                    if self.progress.failure.is_empty() {
                        self.progress.failure = format!("{position}: {error}");
                    }
                    continue;
                }
            }
            bytes += record.size();
            records.push(message(record, &position));
            self.progress.sent += 1;
            self.left -= 1;
            if self.left == 0 {
                let _ = self.say(records, Vec::new()).await;
                return false;
            }
            if bytes >= MESSAGE_BYTES {
                bytes = 0;
                if !self.say(std::mem::take(&mut records), Vec::new()).await {
                    return false;
                }
            }
        }
        if records.is_empty() && self.told.elapsed() < TOLD { true } else { self.say(records, Vec::new()).await }
    }

    async fn trouble(&mut self, trouble: String) -> bool {
        self.progress.trouble = trouble;
        self.say(Vec::new(), Vec::new()).await
    }

    /// Whether somebody listens.
    async fn say(&mut self, records: Vec<v1::TailedRecord>, partitions: Vec<v1::TailedPartition>) -> bool {
        self.told = Instant::now();
        let message = v1::TailResponse { records, progress: Some(self.progress.clone()), partitions };
        self.out.send(message).await.is_ok()
    }
}

/// A record with all its headers.
fn message(record: Record, position: &Position) -> v1::TailedRecord {
    let headers = record.headers.into_iter().map(|header| v1::Header { name: header.name.to_string(), value: header.value });
    let record = v1::Record {
        key: record.key,
        value: record.value,
        headers: headers.collect(),
        timestamp_ms: record.timestamp_ms,
        ..v1::Record::default()
    };
    v1::TailedRecord { position: Some(crate::deliver::grpc::position(position)), record: Some(record) }
}

/// Where the reading of each partition begins.
async fn starts(admin: &dyn Admin, request: &v1::TailRequest) -> Result<Vec<Start>, OperationError> {
    if request.topics.is_empty() {
        return Err(OperationError::Invalid("`topics` is empty: name a topic".to_owned()));
    }
    let existing = admin.topics().await?;
    // Each once, however often it is named.
    let topics: BTreeSet<&str> = request.topics.iter().map(String::as_str).collect();
    let mut all = Vec::new();
    for topic in topics {
        let count = existing.get(topic).copied().ok_or_else(|| OperationError::Invalid(no_topic(topic, &existing)))?;
        if let Some(wrong) = request.partitions.iter().find(|partition| !(0..count).contains(partition)) {
            return Err(OperationError::Invalid(format!("topic {topic} has partitions 0 to {}, there is no partition {wrong}", count - 1)));
        }
        let name: Arc<str> = topic.into();
        let wanted = |number: &i32| request.partitions.is_empty() || request.partitions.contains(number);
        let partitions: Vec<TopicPartition> =
            (0..count).filter(wanted).map(|partition| TopicPartition { topic: name.clone(), partition }).collect();
        let at = match request.from {
            Some(From::TimeMs(time)) => admin.offsets_at(topic, time).await?,
            _ => Vec::new(),
        };
        let marks = admin.all_watermarks(partitions.clone()).await?;
        for (partition, (low, end)) in partitions.into_iter().zip(marks) {
            let at = usize::try_from(partition.partition).ok().and_then(|index| at.get(index)).copied();
            all.push(Start { partition, from: begin(request, at, low, end), low, end });
        }
    }
    Ok(all)
}

/// Where a partition with these watermarks begins; `at` is the offset of the time that was asked for.
fn begin(request: &v1::TailRequest, at: Option<i64>, low: i64, end: i64) -> i64 {
    match request.from {
        None if request.follow => end,
        None | Some(From::Earliest(_)) => low,
        Some(From::Latest(_)) => end,
        Some(From::Offset(offset)) if offset < 0 => end.saturating_add(offset).max(low),
        Some(From::Offset(offset)) => offset.max(low),
        Some(From::TimeMs(_)) => at.unwrap_or(end).clamp(low, end),
    }
}

/// Partitions that were added to followed topics; all of what they have is new.
async fn added(admin: &dyn Admin, request: &v1::TailRequest, known: &BTreeSet<TopicPartition>) -> Result<Vec<Start>, BrokerError> {
    if !request.partitions.is_empty() {
        return Ok(Vec::new());
    }
    let existing = admin.topics().await?;
    let mut added = Vec::new();
    for topic in &request.topics {
        let name: Arc<str> = topic.as_str().into();
        let partitions = (0..existing.get(topic).copied().unwrap_or(0)).map(|number| TopicPartition::new(name.clone(), number));
        let new: Vec<TopicPartition> = partitions.filter(|partition| !known.contains(partition)).collect();
        if !new.is_empty() {
            let marks = admin.all_watermarks(new.clone()).await?;
            added.extend(new.into_iter().zip(marks).map(|(partition, (low, end))| Start { partition, from: low, low, end }));
        }
    }
    Ok(added)
}

/// That there is no such topic, with the name that may have been meant.
pub(super) fn no_topic(topic: &str, existing: &BTreeMap<String, i32>) -> String {
    let names: Vec<&str> = existing.keys().map(String::as_str).filter(|name| !name.starts_with("__")).collect();
    match mesh_routing::nearest(topic, &names) {
        Some(near) => format!("there is no topic {topic}: did you mean {near}?"),
        None => format!("there is no topic {topic}: `mesh-ctl topics list` shows those that there are"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_partition_begins() {
        let begin = |from, follow| begin(&v1::TailRequest { from, follow, ..v1::TailRequest::default() }, Some(7), 5, 20);
        assert_eq!((begin(None, false), begin(None, true)), (5, 20));
        assert_eq!((begin(Some(From::Earliest(true)), true), begin(Some(From::Latest(true)), false)), (5, 20));
        assert_eq!((begin(Some(From::Offset(9)), false), begin(Some(From::Offset(1)), false)), (9, 5));
        assert_eq!(begin(Some(From::Offset(30)), true), 30, "one that is beyond the end waits for it");
        assert_eq!((begin(Some(From::Offset(-3)), false), begin(Some(From::Offset(-100)), false)), (17, 5));
        assert_eq!(begin(Some(From::TimeMs(1)), false), 7);
    }
}
