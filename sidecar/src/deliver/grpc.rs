//! Deliveries and outcomes as `mesh.v1` messages. Shared by the gRPC leaves here and by the API's `Subscribe`.

use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use mesh_proto::v1::{self, handler_client::HandlerClient};
use mesh_routing::Route;
use tonic::{Code, Status, transport::Channel};

use crate::{
    outcome::{Delivery, NOT_HERE, Outcome, Reply, ReplyRecord},
    record::{Header, Position, Record, header},
};

/// A client that takes and sends messages of up to `limit` bytes of payload.
pub(crate) fn client(channel: Channel, limit: usize) -> HandlerClient<Channel> {
    // Room for the names and numbers beside the payload, and for several records in one message.
    let limit = limit.saturating_mul(4).saturating_add(64 * 1024);
    HandlerClient::new(channel).max_decoding_message_size(limit).max_encoding_message_size(usize::MAX)
}

/// Deliveries of one route as a message.
pub fn message(route: &Route, deliveries: &[Delivery]) -> v1::Delivery {
    v1::Delivery {
        route: route.name.to_string(),
        handler: route.handler.as_deref().unwrap_or_default().to_owned(),
        records: deliveries.iter().map(delivered).collect(),
    }
}

fn delivered(delivery: &Delivery) -> v1::DeliveredRecord {
    let text = |name| delivery.record.header_str(name).unwrap_or_default().to_owned();
    v1::DeliveredRecord {
        delivery_id: delivery.id,
        record: Some(record(&delivery.record, Some(&delivery.mesh_id), delivery.route.content_type.as_deref())),
        position: Some(position(&delivery.position)),
        attempt: delivery.attempt,
        hops: delivery.hops,
        traceparent: String::from_utf8_lossy(&delivery.traceparent).into_owned(),
        tracestate: text(header::TRACESTATE),
        baggage: text(header::BAGGAGE),
    }
}

/// A position as a message.
pub fn position(position: &Position) -> v1::Position {
    v1::Position { topic: position.partition.topic.to_string(), partition: position.partition.partition, offset: position.offset }
}

/// A record as a message: the mesh's own headers become fields. `mesh_id` stands in for a record that carries none.
pub fn record(record: &Record, mesh_id: Option<&Bytes>, content_type: Option<&str>) -> v1::Record {
    let text = |name| record.header_str(name);
    v1::Record {
        key: record.key.clone(),
        value: record.value.clone(),
        headers: record
            .headers
            .iter()
            .filter(|header| !is_own(&header.name))
            .map(|header| v1::Header { name: header.name.to_string(), value: header.value.clone() })
            .collect(),
        content_type: text(header::CONTENT_TYPE).or(content_type).unwrap_or_default().to_owned(),
        mesh_id: match (text(header::MESH_ID), mesh_id) {
            (Some(id), _) => id.to_owned(),
            (None, Some(id)) => String::from_utf8_lossy(id).into_owned(),
            (None, None) => String::new(),
        },
        timestamp_ms: record.timestamp_ms,
    }
}

/// Headers that the mesh itself keeps, and that a message carries as fields.
fn is_own(name: &str) -> bool {
    matches!(name, header::CONTENT_TYPE | header::TRACEPARENT | header::TRACESTATE | header::BAGGAGE)
        || (name.starts_with(header::MESH_PREFIX) && !name.starts_with(header::DLQ_PREFIX))
}

/// What a handler said about one record.
pub fn outcome(outcome: v1::Outcome) -> Outcome {
    use v1::outcome::Outcome as Said;
    match outcome.outcome {
        Some(Said::Reply(reply)) => self::reply(reply),
        Some(Said::Ignore(_)) => Outcome::Ignore,
        Some(Said::Retry(retry)) => {
            Outcome::Retry { reason: retry.reason, after: (retry.after_ms > 0).then(|| Duration::from_millis(retry.after_ms)) }
        }
        Some(Said::Reject(reject)) => Outcome::Reject { reason: reject.reason },
        None => Outcome::Retry { reason: "the handler's outcome is empty: set reply, ignore, retry or reject".to_owned(), after: None },
    }
}

fn reply(reply: v1::Reply) -> Outcome {
    let status = if reply.status == 0 { 200 } else { reply.status };
    let Ok(status @ 100..=599) = u16::try_from(status) else {
        return Outcome::Reject { reason: format!("the reply's status {status} is none: use 100 to 599") };
    };
    // `when` looks at the first record's value, as it looks at an HTTP answer's body.
    let body = reply.records.first().and_then(|record| record.value.clone());
    let records = reply.records.into_iter().map(reply_record).collect();
    Outcome::Reply(Reply { status, records, body, retry_after: None })
}

fn reply_record(record: v1::Record) -> ReplyRecord {
    ReplyRecord {
        key: record.key,
        value: record.value,
        content_type: (!record.content_type.is_empty()).then(|| record.content_type.into()),
        headers: record
            .headers
            .into_iter()
            .filter(|header| !is_own(&header.name))
            .map(|header| Header { name: ByteString::from(header.name), value: header.value })
            .collect(),
    }
}

/// What a failed call means (design §6).
pub(crate) fn failure(status: &Status) -> Outcome {
    let reason = format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        Code::Unavailable => Outcome::NoService { reason, after: pushback(status).filter(|after| *after != NOT_HERE) },
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange | Code::DataLoss | Code::PermissionDenied => {
            Outcome::Reject { reason }
        }
        _ => Outcome::Retry { reason, after: pushback(status) },
    }
}

/// gRPC's pushback, `grpc-retry-pushback-ms`: a wait; a negative one, or one that is no number, asks for no retry.
fn pushback(status: &Status) -> Option<Duration> {
    let value = status.metadata().get("grpc-retry-pushback-ms")?;
    let wait = value.to_str().ok().and_then(|value| value.trim().parse().ok());
    Some(wait.map_or(NOT_HERE, Duration::from_millis))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pushback_is_a_wait_or_asks_for_no_retry() {
        let said = |code, value: &str| {
            let mut status = Status::new(code, "busy");
            status.metadata_mut().insert("grpc-retry-pushback-ms", value.parse().unwrap());
            match failure(&status) {
                Outcome::Retry { after, .. } | Outcome::NoService { after, .. } => after,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(said(Code::ResourceExhausted, "1500"), Some(Duration::from_millis(1500)));
        assert_eq!((said(Code::Aborted, "-1"), said(Code::Aborted, "soon")), (Some(NOT_HERE), Some(NOT_HERE)));
        assert_eq!((said(Code::Unavailable, "1500"), said(Code::Unavailable, "-1")), (Some(Duration::from_millis(1500)), None));
    }
}
