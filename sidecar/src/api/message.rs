//! Records of topics as `mesh.v1` messages, for `Subscribe`. Those of routes are [`crate::deliver::grpc`]'s.

use bytes::Bytes;
use mesh_proto::v1;

use crate::{
    deliver::grpc,
    record::{Position, Record, header},
};

/// A record of a topic, by itself.
pub(super) fn of_topic(id: u64, record: &Record, at: &Position, attempt: u32) -> v1::DeliveredRecord {
    let text = |name| record.header_str(name).unwrap_or_default().to_owned();
    v1::DeliveredRecord {
        delivery_id: id,
        record: Some(grpc::record(record, None, None)),
        position: Some(grpc::position(at)),
        attempt,
        hops: record.header_str(header::MESH_HOPS).and_then(|hops| hops.parse().ok()).unwrap_or_default(),
        traceparent: text(header::TRACEPARENT),
        tracestate: text(header::TRACESTATE),
        baggage: text(header::BAGGAGE),
    }
}

/// The bytes of a message's record, more or less.
pub(super) fn size(message: &v1::DeliveredRecord) -> usize {
    let record = message.record.as_ref();
    let length = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
    let headers = |record: &v1::Record| record.headers.iter().map(|field| 8 + field.name.len() + length(&field.value)).sum::<usize>();
    256 + record.map_or(0, |record| length(&record.key) + length(&record.value) + headers(record))
}
