//! Dead letters: what they say of themselves, which there are, which were sent back.
//!
//! Letters of others are read too: Spring's (`kafka_dlt-*`) and Kafka Connect's (`__connect.errors.*`).
//!
//! Invariant: reading changes nothing.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use mesh_proto::v1;
use mesh_routing::Route;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    Control,
    range::{Limits, RangeReader, ranges},
    redriven::Marks,
    reset::{OperationError, route_of},
};
use crate::{
    deliver::grpc,
    record::{ID_NAMESPACE, Position, Record, TopicPartition, header},
};

/// Letters that are counted for a list, over all topics.
const COUNTED: u64 = 1_000_000;

/// What a dead letter says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Letter {
    /// Who wrote it: `mesh`, `spring`, `connect`, or nobody that is known.
    pub(super) writer: &'static str,
    pub(super) route: String,
    pub(super) reason: String,
    pub(super) detail: String,
    pub(super) attempts: u32,
    /// Where its record lay.
    pub(super) topic: String,
    pub(super) partition: Option<i32>,
    pub(super) offset: Option<i64>,
    pub(super) timestamp_ms: Option<i64>,
    /// When it was written.
    pub(super) time_ms: i64,
    /// What was left out of it, in the word of `mesh-dlq-cut`; empty if nothing was.
    pub(super) cut: String,
}

impl Letter {
    pub(super) fn read(record: &Record) -> Self {
        let text = |name: &str| record.header_str(name).unwrap_or_default().to_owned();
        let time_ms = record.timestamp_ms.unwrap_or_default();
        if record.header("mesh-dlq-reason").is_some() {
            let number = |name: &str| record.header_str(name).and_then(|number| number.parse::<i64>().ok());
            return Self {
                writer: "mesh",
                route: text("mesh-dlq-route"),
                reason: text("mesh-dlq-reason"),
                detail: text("mesh-dlq-detail"),
                attempts: number("mesh-dlq-attempts").and_then(|number| number.try_into().ok()).unwrap_or_default(),
                topic: text("mesh-dlq-topic"),
                partition: number("mesh-dlq-partition").and_then(|number| number.try_into().ok()),
                offset: number("mesh-dlq-offset"),
                timestamp_ms: number("mesh-dlq-timestamp"),
                time_ms: number("mesh-dlq-time").unwrap_or(time_ms),
                cut: text("mesh-dlq-cut"),
            };
        }
        if record.header("kafka_dlt-original-topic").is_some() {
            // Numbers are big-endian there.
            let int = |name: &str| record.header(name).and_then(|value| Some(i32::from_be_bytes((**value).try_into().ok()?)));
            let long = |name: &str| record.header(name).and_then(|value| Some(i64::from_be_bytes((**value).try_into().ok()?)));
            return Self {
                writer: "spring",
                route: text("kafka_dlt-original-consumer-group"),
                reason: text("kafka_dlt-exception-fqcn"),
                detail: text("kafka_dlt-exception-message"),
                attempts: 0,
                topic: text("kafka_dlt-original-topic"),
                partition: int("kafka_dlt-original-partition"),
                offset: long("kafka_dlt-original-offset"),
                timestamp_ms: long("kafka_dlt-original-timestamp"),
                time_ms,
                cut: String::new(),
            };
        }
        if record.headers.iter().any(|header| header.name.starts_with("__connect.errors.")) {
            return Self {
                writer: "connect",
                route: text("__connect.errors.connector.name"),
                reason: text("__connect.errors.exception.class.name"),
                detail: text("__connect.errors.exception.message"),
                attempts: 0,
                topic: text("__connect.errors.topic"),
                partition: record.header_str("__connect.errors.partition").and_then(|number| number.parse().ok()),
                offset: record.header_str("__connect.errors.offset").and_then(|number| number.parse().ok()),
                timestamp_ms: None,
                time_ms,
                cut: String::new(),
            };
        }
        Self { time_ms, ..Self::default() }
    }

    /// Whether it is a letter of this route. One of another writer belongs to whoever names its topic.
    fn is_of(&self, route: &Route) -> bool {
        self.writer != "mesh" || *self.route == *route.name
    }

    /// What tells the letter from any other that lies, or ever lay, at its offset of a topic of that name.
    pub(super) fn identity(&self, record: &Record) -> u64 {
        let id = record.header(header::MESH_ID).map(|id| &**id).unwrap_or_default();
        let origin = format!("{}/{:?}/{:?} {} ", self.topic, self.partition, self.offset, self.time_ms);
        Uuid::new_v5(&ID_NAMESPACE, &[origin.as_bytes(), id].concat()).as_u64_pair().0
    }

    pub(super) fn message(&self, record: &Record, position: &Position, redriven: bool) -> v1::DeadLetter {
        let letter = self.clone();
        v1::DeadLetter {
            record: Some(grpc::record(record, None, None)),
            position: Some(grpc::position(position)),
            writer: letter.writer.to_owned(),
            route: letter.route,
            reason: letter.reason,
            detail: letter.detail,
            attempts: letter.attempts,
            topic: letter.topic,
            partition: letter.partition,
            offset: letter.offset,
            timestamp_ms: letter.timestamp_ms,
            time_ms: letter.time_ms,
            redriven,
            cut: letter.cut,
        }
    }
}

/// Which letters are meant.
pub(super) struct Chosen {
    reasons: HashSet<String>,
    key: Option<bytes::Bytes>,
    since_ms: Option<i64>,
    until_ms: Option<i64>,
    places: BTreeSet<(i32, i64)>,
}

impl Chosen {
    pub(super) fn new(filter: Option<v1::LetterFilter>) -> Self {
        let v1::LetterFilter { reasons, key, since_ms, until_ms, places } = filter.unwrap_or_default();
        let places = places.into_iter().map(|place| (place.partition, place.offset)).collect();
        Self { reasons: reasons.into_iter().collect(), key, since_ms, until_ms, places }
    }

    /// What has to be read for them.
    pub(super) fn limits(&self) -> Limits {
        let partitions: BTreeSet<i32> = self.places.iter().map(|(partition, _)| *partition).collect();
        let offsets = || self.places.iter().map(|(_, offset)| *offset);
        Limits {
            partitions: partitions.into_iter().collect(),
            from_offset: offsets().min(),
            until_offset: offsets().max().map(|offset| offset.saturating_add(1)),
            since_ms: self.since_ms,
            // Letters need not lie in the order of their times.
            until_ms: None,
        }
    }

    pub(super) fn has(&self, route: &Route, letter: &Letter, record: &Record, partition: i32, offset: i64) -> bool {
        letter.is_of(route)
            && (self.reasons.is_empty() || self.reasons.contains(&letter.reason))
            && self.key.as_ref().is_none_or(|key| record.key.as_ref() == Some(key))
            && self.since_ms.is_none_or(|since| letter.time_ms >= since)
            && self.until_ms.is_none_or(|until| letter.time_ms < until)
            && (self.places.is_empty() || self.places.contains(&(partition, offset)))
    }
}

impl Control {
    /// The dead-letter topics of routes, with what lies in them.
    ///
    /// # Errors
    /// If there is no such route, or the broker does not answer.
    pub async fn list_dead_letters(&self, route: &str) -> Result<v1::ListDeadLettersResponse, OperationError> {
        let routes = if route.is_empty() { self.routes().await? } else { vec![self.route(route).await?] };
        let admin = self.0.broker.admin();
        let existing = admin.topics().await?;
        let topics: BTreeSet<&str> = routes.iter().map(|route| &*route.dead_letter).collect();
        let mut counted: BTreeMap<(String, String), v1::DeadLetterCount> = BTreeMap::new();
        let (mut left, mut complete) = (COUNTED, true);
        for topic in topics.iter().filter(|topic| existing.contains_key(**topic)) {
            let marks = Marks::read(&self.0, topic).await?;
            let mut reader = RangeReader::open(&*self.0.broker, ranges(&*admin, topic, &Limits::default()).await?)?;
            while let Some(batch) = reader.next().await? {
                if left == 0 {
                    complete = false;
                    break;
                }
                left = left.saturating_sub(batch.records.len() as u64);
                for (offset, record) in &batch.records {
                    let letter = Letter::read(record);
                    let name = if letter.writer == "mesh" { letter.route.clone() } else { format!("({})", letter.writer) };
                    let count = counted.entry(((*topic).to_owned(), name.clone())).or_insert_with(|| v1::DeadLetterCount {
                        route: name,
                        topic: (*topic).to_owned(),
                        oldest_ms: i64::MAX,
                        ..v1::DeadLetterCount::default()
                    });
                    count.letters += 1;
                    count.redriven += u64::from(marks.has(batch.partition.partition, *offset, letter.identity(record)));
                    count.oldest_ms = count.oldest_ms.min(letter.time_ms);
                    count.newest_ms = count.newest_ms.max(letter.time_ms);
                    *count.reasons.entry(letter.reason).or_default() += 1;
                }
            }
            reader.close().await;
        }
        // A route without letters is told too; letters of others in a shared topic only where all are asked for.
        let mut counts: Vec<v1::DeadLetterCount> =
            counted.into_values().filter(|count| route.is_empty() || count.route == *route || count.route.starts_with('(')).collect();
        for route in &routes {
            if !counts.iter().any(|count| count.route == *route.name) {
                let (name, topic) = (route.name.to_string(), route.dead_letter.to_string());
                counts.push(v1::DeadLetterCount { route: name, topic, ..v1::DeadLetterCount::default() });
            }
        }
        counts.sort_by(|a, b| (&a.route, &a.topic).cmp(&(&b.route, &b.topic)));
        Ok(v1::ListDeadLettersResponse { counts, complete })
    }

    /// Reads a route's dead letters, the oldest of each partition first. Ends early when nobody listens any more.
    ///
    /// # Errors
    /// If there is no such route, or the broker does not answer.
    pub async fn read_dead_letters(
        &self,
        request: v1::ReadDeadLettersRequest,
        out: mpsc::Sender<v1::DeadLetter>,
    ) -> Result<(), OperationError> {
        let route = self.route(&request.route).await?;
        let chosen = Chosen::new(request.filter);
        let marks = Marks::read(&self.0, &route.dead_letter).await?;
        let ranges = ranges(&*self.0.broker.admin(), &route.dead_letter, &chosen.limits()).await?;
        let mut reader = RangeReader::open(&*self.0.broker, ranges)?;
        let mut left = if request.limit == 0 { u64::MAX } else { request.limit };
        'all: while let Some(batch) = reader.next().await? {
            let partition = batch.partition.partition;
            for (offset, record) in batch.records {
                let letter = Letter::read(&record);
                if !chosen.has(&route, &letter, &record, partition, offset) {
                    continue;
                }
                let position = Position { partition: batch.partition.clone(), offset };
                let message = letter.message(&record, &position, marks.has(partition, offset, letter.identity(&record)));
                left -= 1;
                if out.send(message).await.is_err() || left == 0 {
                    break 'all;
                }
            }
        }
        reader.close().await;
        Ok(())
    }

    /// Deletes dead letters up to a time or offsets, for good; or says how many would be deleted.
    ///
    /// # Errors
    /// If the topic is another route's too and the request does not say that this is known, or the broker refuses.
    pub async fn purge_dead_letters(&self, request: v1::PurgeDeadLettersRequest) -> Result<v1::PurgeDeadLettersResponse, OperationError> {
        let table = self.whole().await?;
        let route = route_of(&table, &request.route)?;
        let topic = &*route.dead_letter;
        let shared: Vec<String> = table
            .routes
            .iter()
            .filter(|other| *other.dead_letter == *topic && other.name != route.name)
            .map(|other| other.name.to_string())
            .collect();
        let limits = Limits { until_ms: request.until_ms, ..Limits::default() };
        let admin = self.0.broker.admin();
        let mut found = ranges(&*admin, topic, &limits).await?;
        if !request.before.is_empty() {
            found.retain_mut(|range| match request.before.iter().find(|place| place.partition == range.partition.partition) {
                Some(place) => {
                    range.until = range.until.min(place.offset);
                    range.from < range.until
                }
                None => false,
            });
        }
        let partitions =
            found.iter().map(|range| v1::PurgedPartition { partition: range.partition.partition, from: range.from, until: range.until });
        let mut response = v1::PurgeDeadLettersResponse {
            topic: topic.to_owned(),
            partitions: partitions.collect(),
            shared_with: shared.clone(),
            executed: false,
        };
        if request.execute {
            if !shared.is_empty() && !request.shared {
                let detail =
                    format!("topic {topic} holds the dead letters of {} too: say that they may go as well (--shared)", shared.join(", "));
                return Err(OperationError::Refused(detail));
            }
            let below: Vec<(TopicPartition, i64)> = found.into_iter().map(|range| (range.partition, range.until)).collect();
            tracing::warn!(route = %route.name, topic, partitions = below.len(), "dead letters are deleted, as an operator asked");
            admin.delete_records(below).await?;
            response.executed = true;
        }
        Ok(response)
    }
}

/// What a copy of a dead letter, or of any record, must not take along: what the mesh noted on its way there.
pub(super) fn is_left_behind(name: &str) -> bool {
    name.starts_with(header::DLQ_PREFIX)
        || name.starts_with("kafka_dlt-")
        || name.starts_with("__connect.errors.")
        || matches!(name, header::MESH_ATTEMPT | header::MESH_ONLY_ROUTE | "mesh-retry-at" | "mesh-origin" | "mesh-parked")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use bytestring::ByteString;

    use super::*;
    use crate::record::Header;

    fn record(headers: &[(&'static str, &'static [u8])]) -> Record {
        let headers =
            headers.iter().map(|(name, value)| Header { name: ByteString::from_static(name), value: Some(Bytes::from_static(value)) });
        Record { headers: headers.collect(), timestamp_ms: Some(9), ..Record::default() }
    }

    #[test]
    fn letters_of_others_are_read() {
        let spring = record(&[
            ("kafka_dlt-original-topic", b"orders"),
            ("kafka_dlt-original-partition", &[0, 0, 0, 3]),
            ("kafka_dlt-original-offset", &[0, 0, 0, 0, 0, 0, 1, 0]),
            ("kafka_dlt-exception-fqcn", b"java.lang.IllegalStateException"),
            ("kafka_dlt-exception-message", b"no"),
        ]);
        let letter = Letter::read(&spring);
        assert_eq!((letter.writer, &*letter.topic, letter.partition, letter.offset), ("spring", "orders", Some(3), Some(256)));
        assert_eq!((&*letter.reason, &*letter.detail, letter.time_ms), ("java.lang.IllegalStateException", "no", 9));
        let connect = record(&[
            ("__connect.errors.topic", b"orders"),
            ("__connect.errors.partition", b"1"),
            ("__connect.errors.offset", b"7"),
            ("__connect.errors.exception.class.name", b"DataException"),
            ("__connect.errors.exception.message", b"bad"),
        ]);
        let letter = Letter::read(&connect);
        assert_eq!((letter.writer, letter.partition, letter.offset, &*letter.reason), ("connect", Some(1), Some(7), "DataException"));
        // What is cut or no number says nothing, and breaks nothing.
        let odd = record(&[("kafka_dlt-original-topic", b"orders"), ("kafka_dlt-original-partition", b"3")]);
        assert_eq!(Letter::read(&odd).partition, None);
        assert_eq!(Letter::read(&record(&[])), Letter { time_ms: 9, ..Letter::default() });
    }

    #[test]
    fn letters_at_one_offset_of_topics_of_one_name_are_told_apart() {
        let letter = |id: &'static [u8], time: &'static [u8]| {
            record(&[("mesh-id", id), ("mesh-dlq-reason", b"status"), ("mesh-dlq-topic", b"in"), ("mesh-dlq-time", time)])
        };
        let identity = |record: &Record| Letter::read(record).identity(record);
        let one = letter(b"a", b"1");
        assert_eq!(identity(&one), identity(&letter(b"a", b"1")));
        assert_ne!(identity(&one), identity(&letter(b"b", b"1")));
        assert_ne!(identity(&one), identity(&letter(b"a", b"2")));
        // One of another writer has its time alone.
        assert_ne!(identity(&record(&[])), identity(&Record { timestamp_ms: Some(8), ..record(&[]) }));
    }

    #[test]
    fn what_the_way_there_left_does_not_go_along() {
        for name in ["mesh-dlq-reason", "mesh-attempt", "mesh-only-route", "kafka_dlt-original-topic", "__connect.errors.topic"] {
            assert!(is_left_behind(name), "{name}");
        }
        for name in ["mesh-id", "mesh-hops", "mesh-cause", "content-type", "traceparent", "mine"] {
            assert!(!is_left_behind(name), "{name}");
        }
    }
}
