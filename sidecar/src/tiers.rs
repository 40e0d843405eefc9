//! Records in a route's retry and park topics: how they are written down there, and read again. Floor 0.
//!
//! Invariant: key, value and headers come back as they were, with the record's identity, its place in the source, its timestamp and the
//! attempts that were made.

use bytes::Bytes;

use crate::{
    outcome::Delivery,
    record::{Header, Position, Record, header, mesh_id, shorten},
};

/// The longest reason that is written down, in bytes.
const REASON: usize = 1024;

/// A topic of a route beside one of its sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A retry topic, from 1.
    Retry(usize),
    /// The park topic.
    Park,
}

/// What kind of topic a name is, for a route and one of its sources; `None` if it is none of theirs.
pub(crate) fn kind(route: &str, source: &str, topic: &str) -> Option<Kind> {
    let own = topic.strip_prefix(route)?.strip_prefix('.')?.strip_prefix(source)?.strip_prefix('.')?;
    if own == "park" {
        return Some(Kind::Park);
    }
    let number = own.strip_prefix("retry-")?;
    let tier = number.parse().ok().filter(|tier: &usize| *tier > 0 && number == tier.to_string())?;
    Some(Kind::Retry(tier))
}

/// Why a record is written down.
#[derive(Debug)]
pub(crate) enum Why {
    /// It is to be tried again at this time, in milliseconds since 1970-01-01 UTC.
    Retry { due_ms: i64 },
    /// It waits for its turn.
    Behind,
    /// Its attempts are used up: it waits for somebody.
    Exhausted { reason: String },
}

/// A record for a retry or park topic, after so many attempts. It belongs into the partition of its source's number.
pub(crate) fn write(delivery: &Delivery, attempts: u32, why: &Why) -> Record {
    let source = &delivery.record;
    let ours = [header::MESH_ATTEMPT, header::MESH_RETRY_AT, header::MESH_ORIGIN, header::MESH_PARKED];
    let mut headers: Vec<Header> = source.headers.iter().filter(|header| !ours.contains(&&*header.name)).cloned().collect();
    if source.header(header::MESH_ID).is_none_or(Bytes::is_empty) {
        headers.push(Header::new(header::MESH_ID, delivery.mesh_id.clone()));
    }
    let position = &delivery.position;
    let origin = match source.timestamp_ms {
        Some(timestamp) => format!("{position} {timestamp}"),
        None => position.to_string(),
    };
    headers.push(Header::new(header::MESH_ORIGIN, origin));
    headers.push(Header::new(header::MESH_ATTEMPT, attempts.to_string()));
    match why {
        Why::Retry { due_ms } => headers.push(Header::new(header::MESH_RETRY_AT, due_ms.to_string())),
        Why::Behind => {}
        Why::Exhausted { reason } => headers.push(Header::new(header::MESH_PARKED, shorten(reason, REASON))),
    }
    // A time of its own: retention counts from when it was written down.
    Record { key: source.key.clone(), value: source.value.clone(), headers, timestamp_ms: None }
}

/// A record as it was in its source.
#[derive(Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) record: Record,
    pub(crate) mesh_id: Bytes,
    pub(crate) origin: Position,
    /// How many attempts were made.
    pub(crate) attempts: u32,
    /// When it is due, in milliseconds since 1970-01-01 UTC.
    pub(crate) due_ms: Option<i64>,
    /// Its attempts are used up.
    pub(crate) exhausted: bool,
}

/// Reads a record from a retry or park topic. One that the mesh did not write is its own origin, and due at once.
pub(crate) fn read(mut record: Record, place: &Position) -> Stored {
    let number = |name| record.header_str(name).and_then(|text| text.parse::<i64>().ok());
    let attempts = number(header::MESH_ATTEMPT).and_then(|attempts| u32::try_from(attempts).ok()).unwrap_or(0);
    let due_ms = number(header::MESH_RETRY_AT);
    let exhausted = record.header(header::MESH_PARKED).is_some();
    let origin = record.header_str(header::MESH_ORIGIN).and_then(origin);
    let (origin, timestamp_ms) = origin.unwrap_or_else(|| (place.clone(), record.timestamp_ms));
    let ours = [header::MESH_ATTEMPT, header::MESH_RETRY_AT, header::MESH_ORIGIN, header::MESH_PARKED];
    record.headers.retain(|header| !ours.contains(&&*header.name));
    record.timestamp_ms = timestamp_ms;
    Stored { mesh_id: mesh_id(&record, &origin), record, origin, attempts, due_ms, exhausted }
}

fn origin(text: &str) -> Option<(Position, Option<i64>)> {
    let (position, timestamp) = match text.split_once(' ') {
        Some((position, timestamp)) => (position, Some(timestamp.parse().ok()?)),
        None => (text, None),
    };
    Some((Position::parse(position)?, timestamp))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{outcome::test_delivery, record::TopicPartition};

    #[test]
    fn a_record_comes_back_as_it_was() {
        let mut delivery = test_delivery("", 42);
        let own = Record {
            key: Some("k".into()),
            value: None,
            headers: vec![Header::new("a", "1"), Header::new("mesh-id", "id"), Header::new("a", "2")],
            timestamp_ms: Some(1_700_000_000_000),
        };
        delivery.record = Arc::new(own.clone());
        let written = write(&delivery, 3, &Why::Retry { due_ms: 99 });
        assert_eq!(written.timestamp_ms, None);
        let place = Position { partition: TopicPartition::new("work.in.retry-1", 0), offset: 7 };
        let stored = read(written, &place);
        let wanted = Stored {
            record: own,
            mesh_id: "id".into(),
            origin: delivery.position.clone(),
            attempts: 3,
            due_ms: Some(99),
            exhausted: false,
        };
        assert_eq!(stored, wanted);
        // And again, from there to the park topic.
        delivery.record = Arc::new(stored.record);
        let written = write(&delivery, 4, &Why::Exhausted { reason: "x".repeat(2000) });
        let again = read(written, &place);
        assert_eq!((again.attempts, again.due_ms, again.exhausted), (4, None, true));
        assert_eq!((&again.record, again.origin), (&wanted.record, wanted.origin));
    }

    #[test]
    fn what_the_mesh_did_not_write_is_its_own_origin() {
        let place = Position { partition: TopicPartition::new("work.in.retry-1", 3), offset: 7 };
        for origin in ["", "in", "in/x/3", "in/0/4 z"] {
            let record =
                Record { headers: vec![Header::new("mesh-origin", origin), Header::new("mesh-attempt", "-1")], ..Record::default() };
            let stored = read(record, &place);
            assert_eq!((stored.origin, stored.attempts, stored.due_ms), (place.clone(), 0, None), "{origin}");
        }
    }

    #[test]
    fn the_topics_of_a_route_are_known_by_name() {
        assert_eq!(kind("a", "b.c", "a.b.c.park"), Some(Kind::Park));
        assert_eq!(kind("a", "b", "a.b.retry-12"), Some(Kind::Retry(12)));
        for other in ["a.b", "a.b.", "a.b.retry-", "a.b.retry-0", "a.b.retry-01", "a.b.retry-1.park", "x.a.b.park", "a.bpark", "ab.park"] {
            assert_eq!(kind("a", "b", other), None, "{other}");
        }
    }
}
