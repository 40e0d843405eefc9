//! Copies fetched messages into one buffer per round, which their records then share.
//!
//! librdkafka owns a message's memory, and frees it as a whole; so each message is copied once, into an arena, and keys, values and
//! headers are slices of it.

use std::{ops::Range, panic::AssertUnwindSafe};

use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use rdkafka::message::{BorrowedMessage, Headers, Message};

use crate::record::{Header, Record, header};

/// How much is reserved at a time.
const CHUNK: usize = 64 * 1024;

/// The headers that the mesh writes: their names need no copy.
const KNOWN: [&str; 8] = [
    header::MESH_ID,
    header::TRACEPARENT,
    header::CONTENT_TYPE,
    header::MESH_HOPS,
    header::MESH_CAUSE,
    header::MESH_ATTEMPT,
    header::TRACESTATE,
    header::BAGGAGE,
];

/// Messages that were copied and are not yet records.
#[derive(Default)]
pub(super) struct Arena {
    bytes: BytesMut,
    headers: Vec<RawHeader>,
}

/// A message in the arena.
pub(super) struct Raw {
    pub(super) offset: i64,
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
    headers: Range<usize>,
    timestamp_ms: Option<i64>,
}

struct RawHeader {
    name: Name,
    value: Option<Range<usize>>,
}

enum Name {
    Known(&'static str),
    Copied(Range<usize>),
}

/// An arena that is complete: records can be cut from it.
pub(super) struct Frozen {
    bytes: Bytes,
    headers: Vec<RawHeader>,
}

impl Arena {
    /// The bytes copied so far.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    fn copy(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.bytes.len();
        if self.bytes.capacity() - start < bytes.len() {
            self.bytes.reserve(bytes.len().max(CHUNK));
        }
        self.bytes.extend_from_slice(bytes);
        start..self.bytes.len()
    }

    /// Copies a message.
    pub(super) fn add(&mut self, message: &BorrowedMessage<'_>) -> Raw {
        let key = message.key().map(|key| self.copy(key));
        let value = message.payload().map(|value| self.copy(value));
        let first = self.headers.len();
        if let Some(headers) = message.headers() {
            for index in 0..headers.count() {
                // The binding panics on a name that is not UTF-8, which Kafka forbids but does not check: such a header is left out.
                let header = std::panic::catch_unwind(AssertUnwindSafe(|| headers.try_get(index)));
                let Ok(Some(header)) = header else {
                    tracing::debug!(offset = message.offset(), index, "kafka: a header whose name is not UTF-8 is left out");
                    continue;
                };
                let name = match KNOWN.iter().find(|known| **known == header.key) {
                    Some(known) => Name::Known(known),
                    None => Name::Copied(self.copy(header.key.as_bytes())),
                };
                let value = header.value.map(|value| self.copy(value));
                self.headers.push(RawHeader { name, value });
            }
        }
        let timestamp_ms = message.timestamp().to_millis();
        Raw { offset: message.offset(), key, value, headers: first..self.headers.len(), timestamp_ms }
    }

    /// Ends the round. The arena is empty afterwards, and keeps what is left of its memory.
    pub(super) fn freeze(&mut self) -> Frozen {
        Frozen { bytes: self.bytes.split().freeze(), headers: std::mem::take(&mut self.headers) }
    }
}

impl Frozen {
    /// The record of a message of this round.
    pub(super) fn record(&self, raw: &Raw) -> Record {
        let slice = |range: &Range<usize>| self.bytes.slice(range.clone());
        let headers = self.headers[raw.headers.clone()]
            .iter()
            .map(|header| {
                let name = match &header.name {
                    Name::Known(known) => ByteString::from_static(known),
                    // It was a `str` when it was copied.
                    Name::Copied(range) => ByteString::try_from(slice(range)).unwrap_or_default(),
                };
                Header { name, value: header.value.as_ref().map(slice) }
            })
            .collect();
        Record { key: raw.key.as_ref().map(slice), value: raw.value.as_ref().map(slice), headers, timestamp_ms: raw.timestamp_ms }
    }
}
