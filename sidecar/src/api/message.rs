//! Deliveries and outcomes as `mesh.v1` messages, for `Subscribe`.

use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use mesh_proto::v1::{self, outcome::Outcome as Said};

use crate::{
    outcome::{Delivery, Outcome, Reply, ReplyRecord},
    record::{Header, Position, Record, header},
};

/// A message of deliveries.
pub(super) fn delivery(route: &str, records: Vec<v1::DeliveredRecord>) -> v1::Delivery {
    v1::Delivery { route: route.to_owned(), handler: String::new(), records }
}

/// A delivery of a route.
pub(super) fn delivered(delivery: &Delivery) -> v1::DeliveredRecord {
    let mut message = of_topic(delivery.id, &delivery.record, &delivery.position, delivery.attempt);
    message.hops = delivery.hops;
    message.traceparent = String::from_utf8_lossy(&delivery.traceparent).into_owned();
    if let Some(record) = &mut message.record
        && record.mesh_id.is_empty()
    {
        record.mesh_id = String::from_utf8_lossy(&delivery.mesh_id).into_owned();
    }
    message
}

/// A record of a topic, by itself.
pub(super) fn of_topic(id: u64, record: &Record, at: &Position, attempt: u32) -> v1::DeliveredRecord {
    let text = |name| record.header_str(name).unwrap_or_default().to_owned();
    v1::DeliveredRecord {
        delivery_id: id,
        record: Some(v1::Record {
            key: record.key.clone(),
            value: record.value.clone(),
            headers: record
                .headers
                .iter()
                .filter(|field| !is_own(&field.name))
                .map(|field| v1::Header { name: field.name.to_string(), value: field.value.clone() })
                .collect(),
            content_type: text(header::CONTENT_TYPE),
            mesh_id: text(header::MESH_ID),
            timestamp_ms: record.timestamp_ms,
        }),
        position: Some(position(at)),
        attempt,
        hops: record.header_str(header::MESH_HOPS).and_then(|hops| hops.parse().ok()).unwrap_or_default(),
        traceparent: text(header::TRACEPARENT),
        tracestate: text(header::TRACESTATE),
        baggage: text(header::BAGGAGE),
    }
}

/// Where a record is stored.
pub(super) fn position(position: &Position) -> v1::Position {
    v1::Position { topic: position.partition.topic.to_string(), partition: position.partition.partition, offset: position.offset }
}

/// The bytes of a message's record, more or less.
pub(super) fn size(message: &v1::DeliveredRecord) -> usize {
    let record = message.record.as_ref();
    let length = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
    let headers = |record: &v1::Record| record.headers.iter().map(|field| 8 + field.name.len() + length(&field.value)).sum::<usize>();
    256 + record.map_or(0, |record| length(&record.key) + length(&record.value) + headers(record))
}

/// What a subscriber said about one record.
pub(super) fn outcome(said: v1::Outcome) -> Outcome {
    match said.outcome {
        Some(Said::Reply(reply)) => self::reply(reply),
        Some(Said::Ignore(_)) => Outcome::Ignore,
        Some(Said::Retry(retry)) => {
            Outcome::Retry { reason: retry.reason, after: (retry.after_ms > 0).then(|| Duration::from_millis(retry.after_ms)) }
        }
        Some(Said::Reject(reject)) => Outcome::Reject { reason: reject.reason },
        None => Outcome::Retry { reason: "the outcome is empty: set reply, ignore, retry or reject".to_owned(), after: None },
    }
}

fn reply(reply: v1::Reply) -> Outcome {
    let status = if reply.status == 0 { 200 } else { reply.status };
    let Ok(status @ 100..=599) = u16::try_from(status) else {
        return Outcome::Reject { reason: format!("the reply's status {status} is none: use 100 to 599") };
    };
    // `when` looks at the first record's value, as it looks at an HTTP answer's body.
    let body = reply.records.first().and_then(|record| record.value.clone());
    let records = reply.records.into_iter().map(|record| ReplyRecord {
        key: record.key,
        value: record.value,
        content_type: (!record.content_type.is_empty()).then(|| record.content_type.into()),
        headers: record
            .headers
            .into_iter()
            .filter(|field| !is_own(&field.name))
            .map(|field| Header { name: ByteString::from(field.name), value: field.value })
            .collect(),
    });
    Outcome::Reply(Reply { status, records: records.collect(), body, retry_after: None })
}

/// Headers that the mesh itself keeps, and that a message carries as fields.
fn is_own(name: &str) -> bool {
    matches!(name, header::CONTENT_TYPE | header::TRACEPARENT | header::TRACESTATE | header::BAGGAGE)
        || (name.starts_with(header::MESH_PREFIX) && !name.starts_with(header::DLQ_PREFIX))
}
