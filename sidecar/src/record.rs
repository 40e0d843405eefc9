//! Records and the places where they are stored, in Kafka's sense. Floor 0: pure types.
//!
//! Invariant: keys, values and headers are slices of shared buffers; cloning a record copies no payload.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use bytestring::ByteString;
use mesh_routing::HeaderSource;

/// The names of the headers that the mesh itself writes into records.
pub mod header {
    /// A record's identity over copies.
    pub const MESH_ID: &str = "mesh-id";
    /// How many routes the record's ancestors went through, decimal.
    pub const MESH_HOPS: &str = "mesh-hops";
    /// The route, `topic/partition/offset` and index of a reply's source: `route topic/partition/offset index`.
    pub const MESH_CAUSE: &str = "mesh-cause";
    /// In retry and park topics: how many attempts were made, decimal.
    pub const MESH_ATTEMPT: &str = "mesh-attempt";
    /// The only route that takes the record; the others that read its topic pass it over. On copies that were redriven or replayed to a route.
    pub const MESH_ONLY_ROUTE: &str = "mesh-only-route";
    /// On the copy of a dead letter: where the letter lies, `topic/partition/offset`.
    pub const MESH_REDRIVEN: &str = "mesh-redriven";
    /// On a replayed copy: where its record lies, `topic/partition/offset`.
    pub const MESH_REPLAYED: &str = "mesh-replayed";
    /// In retry topics: when the next attempt is due, in milliseconds since 1970-01-01 UTC, decimal.
    pub const MESH_RETRY_AT: &str = "mesh-retry-at";
    /// In retry and park topics: where the record came from, and its timestamp there: `topic/partition/offset timestamp`.
    pub const MESH_ORIGIN: &str = "mesh-origin";
    /// In park topics: why a record waits for somebody to release it; one that only waits for its turn has none.
    pub const MESH_PARKED: &str = "mesh-parked";
    /// The media type of the value.
    pub const CONTENT_TYPE: &str = "content-type";
    /// W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
    /// W3C trace state.
    pub const TRACESTATE: &str = "tracestate";
    /// W3C baggage.
    pub const BAGGAGE: &str = "baggage";
    /// What the names of a dead letter's own headers begin with.
    pub const DLQ_PREFIX: &str = "mesh-dlq-";
    /// What the names of all headers of the mesh begin with; a publisher may set none of them.
    pub const MESH_PREFIX: &str = "mesh-";
}

/// One header. Names may repeat within a record, and their order is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The name; case is kept.
    pub name: ByteString,
    /// The value; `None` is Kafka's null.
    pub value: Option<Bytes>,
}

impl Header {
    /// A header of a static name.
    pub fn new(name: &'static str, value: impl Into<Bytes>) -> Self {
        Self { name: ByteString::from_static(name), value: Some(value.into()) }
    }
}

/// A record: what is published, delivered and forwarded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The key: chooses partition and lane.
    pub key: Option<Bytes>,
    /// The value; `None` is a tombstone.
    pub value: Option<Bytes>,
    /// The headers, in order.
    pub headers: Vec<Header>,
    /// Milliseconds since 1970-01-01 UTC; `None` lets the broker take the present.
    pub timestamp_ms: Option<i64>,
}

impl Record {
    /// The value of the last header of this name (Kafka's rule for repeated names), if it has one.
    pub fn header(&self, name: &str) -> Option<&Bytes> {
        self.headers.iter().rev().find(|header| header.name == *name).and_then(|header| header.value.as_ref())
    }

    /// The same as text; `None` if it is absent or not UTF-8.
    pub fn header_str(&self, name: &str) -> Option<&str> {
        self.header(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// The bytes that the record holds in memory, for flow control: payload plus a fixed share for its bookkeeping.
    pub fn size(&self) -> usize {
        const BOOKKEEPING: usize = 128;
        BOOKKEEPING
            + self.key.as_ref().map_or(0, Bytes::len)
            + self.value.as_ref().map_or(0, Bytes::len)
            + self.headers.iter().map(|h| h.name.len() + h.value.as_ref().map_or(0, Bytes::len) + 32).sum::<usize>()
    }
}

/// As expressions see a record's headers.
impl HeaderSource for Record {
    fn get(&self, name: &str) -> Option<&[u8]> {
        self.header(name).map(|value| &**value)
    }

    fn for_each(&self, each: &mut dyn FnMut(&str, &[u8])) {
        each_header(&self.headers, each);
    }
}

/// A record as its publisher, or an answer, gave it.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    /// Key, value, time, and headers. The headers `content-type`, `traceparent`, `tracestate` and `baggage` may stand among them and win
    /// over the fields below.
    pub record: Record,
    /// The identity; `None` makes one.
    pub mesh_id: Option<Bytes>,
    /// The media type.
    pub content_type: Option<Bytes>,
}

/// Calls `each` with every header, in order; a null value is empty.
pub(crate) fn each_header(headers: &[Header], each: &mut dyn FnMut(&str, &[u8])) {
    for header in headers {
        each(&header.name, header.value.as_deref().unwrap_or_default());
    }
}

/// Shortens what a caller sent, for messages.
pub(crate) fn clip(text: &str) -> String {
    const MOST: usize = 64;
    match text.char_indices().nth(MOST) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}…", &text[..at]),
    }
}

/// The bytes that a percent-encoded text stands for; `None` where a `%` begins no code, since the text is not encoded then, and what it means a
/// guess: `100%` may be a key, and so may `50%41`.
pub(crate) fn percent_decoded(text: &[u8]) -> Option<Bytes> {
    let ends = |rest: &[u8]| rest.iter().take(2).filter(|digit| digit.is_ascii_hexdigit()).count() == 2;
    let whole = text.split(|byte| *byte == b'%').skip(1).all(ends);
    whole.then(|| percent_encoding::percent_decode(text).collect::<Vec<u8>>().into())
}

/// The present, in milliseconds since 1970-01-01 UTC: the unit of every timestamp here.
pub(crate) fn now_ms() -> i64 {
    #[cfg(test)]
    if let Some(simulated) = simulated::now_ms() {
        return simulated;
    }
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The time of a simulation: what its paused clock says, in place of the system's.
#[cfg(test)]
pub(crate) mod simulated {
    use std::cell::Cell;

    use tokio::time::Instant;

    thread_local!(static START: Cell<Option<Instant>> = const { Cell::new(None) });

    /// Time starts now on this thread, at 2026-01-01; `None` gives the system's back.
    pub(crate) fn start(at: Option<Instant>) {
        START.set(at);
    }

    pub(super) fn now_ms() -> Option<i64> {
        START.get().map(|start| 1_767_225_600_000 + i64::try_from(start.elapsed().as_millis()).unwrap_or(i64::MAX))
    }
}

/// The namespace of derived ids.
pub(crate) const ID_NAMESPACE: uuid::Uuid = uuid::Uuid::from_u128(0x6d65_7368_2d69_6400_8000_6d65_7368_0001);

/// The `mesh-id` of a record that carries none: it follows from its place.
pub(crate) fn derived_id(position: &Position) -> Bytes {
    let mut buffer = [0; uuid::fmt::Hyphenated::LENGTH];
    let id = uuid::Uuid::new_v5(&ID_NAMESPACE, position.to_string().as_bytes());
    Bytes::copy_from_slice(id.hyphenated().encode_lower(&mut buffer).as_bytes())
}

/// A record's identity: the one it carries, or, for one that was published past the mesh, one that follows from its place.
pub(crate) fn mesh_id(record: &Record, position: &Position) -> Bytes {
    match record.header(header::MESH_ID) {
        Some(id) if !id.is_empty() => id.clone(),
        _ => derived_id(position),
    }
}

/// How many routes a record went through, from its header.
pub(crate) fn hops(record: &Record) -> u32 {
    record.header_str(header::MESH_HOPS).and_then(|hops| hops.parse().ok()).unwrap_or(0)
}

/// What a reply was made of, as its `mesh-cause` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cause {
    /// The route.
    pub(crate) route: String,
    /// The record that it processed.
    pub(crate) source: Position,
    /// The index of the reply within the answer, from 0.
    pub(crate) index: u32,
}

impl Cause {
    /// The cause of a record; `None` if it is no reply.
    pub(crate) fn of(record: &Record) -> Option<Self> {
        let (rest, index) = record.header_str(header::MESH_CAUSE)?.rsplit_once(' ')?;
        let (route, source) = rest.rsplit_once(' ')?;
        Some(Self { route: route.to_owned(), source: Position::parse(source)?, index: index.parse().ok()? })
    }
}

/// The beginning of a text, of at most so many bytes.
pub(crate) fn shorten(text: &str, most: usize) -> String {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// A partition of a topic.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicPartition {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition's number, from 0.
    pub partition: i32,
}

impl TopicPartition {
    /// A partition of a topic.
    pub fn new(topic: impl Into<Arc<str>>, partition: i32) -> Self {
        Self { topic: topic.into(), partition }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

/// Where a record is stored.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    /// The partition.
    pub partition: TopicPartition,
    /// The offset within it, from 0; -1 of a record that was stored while the broker did not tell where.
    pub offset: i64,
}

impl Position {
    /// Reads `topic/partition/offset`, as it is displayed.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (rest, offset) = text.rsplit_once('/')?;
        let (topic, partition) = rest.rsplit_once('/')?;
        Some(Self { partition: TopicPartition::new(topic, partition.parse().ok()?), offset: offset.parse().ok()? })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.partition, self.offset)
    }
}

/// Consecutive records of one partition, as fetched. Offsets grow, and may have gaps (compaction, transaction markers).
#[derive(Clone, Debug)]
pub struct Batch {
    /// The partition.
    pub partition: TopicPartition,
    /// The records with their offsets, ascending. May be empty, if only gaps were passed.
    pub records: Vec<(i64, Record)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_read_as_it_is_written() {
        let of = |text: &'static str| Cause::of(&Record { headers: vec![Header::new(header::MESH_CAUSE, text)], ..Record::default() });
        let cause = of("price orders.v1/3/17 2").unwrap();
        assert_eq!((&*cause.route, cause.source.to_string().as_str(), cause.index), ("price", "orders.v1/3/17", 2));
        for wrong in ["", "price", "price orders/3 2", "price orders/3/17", "price orders/3/17 x", "orders/3/17 2"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
        assert_eq!(Cause::of(&Record::default()), None);
    }
}
