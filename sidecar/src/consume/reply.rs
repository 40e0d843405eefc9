//! The records that a route publishes: replies, and dead letters. Pure.
//!
//! Invariant: the same source record, route and answer give the same records, with the same `mesh-id`s: a reply that is published twice after
//! a crash can be recognised.

use std::{fmt::Write as _, sync::Arc};

use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use mesh_routing::ForwardHeaders;
use uuid::Uuid;

use crate::{
    broker::Outgoing,
    judge::Reason,
    outcome::{Delivery, Reply, ReplyRecord},
    record::{Header, ID_NAMESPACE, Record, header, shorten},
    telemetry::trace::TraceContext,
};

/// The longest detail of a dead letter, in bytes.
const DETAIL: usize = 1024;

/// The identity of a reply: follows from its source's, the route and the index within the answer.
fn reply_id(source: &[u8], route: &str, index: usize) -> Bytes {
    let mut name = Vec::with_capacity(source.len() + route.len() + 8);
    name.extend_from_slice(source);
    name.push(0);
    name.extend_from_slice(route.as_bytes());
    name.extend_from_slice(&(index as u64).to_be_bytes());
    hyphenated(Uuid::new_v5(&ID_NAMESPACE, &name))
}

fn hyphenated(id: Uuid) -> Bytes {
    let mut buffer = [0; uuid::fmt::Hyphenated::LENGTH];
    Bytes::copy_from_slice(id.hyphenated().encode_lower(&mut buffer).as_bytes())
}

/// The records of an answer for all topics: for each record, each topic in order. `context` gives the trace context of each.
pub(crate) fn replies(
    delivery: &Delivery,
    topics: &[Arc<str>],
    reply: &Reply,
    mut context: impl FnMut(&Arc<str>) -> Option<TraceContext>,
) -> Vec<Outgoing> {
    let mut outgoing = Vec::with_capacity(reply.records.len() * topics.len());
    for (index, answer) in reply.records.iter().enumerate() {
        let id = reply_id(&delivery.mesh_id, &delivery.route.name, index);
        for topic in topics {
            let record = reply_record(delivery, answer, index, id.clone(), context(topic));
            outgoing.push(Outgoing { topic: topic.clone(), partition: None, record });
        }
    }
    outgoing
}

fn reply_record(delivery: &Delivery, answer: &ReplyRecord, index: usize, id: Bytes, context: Option<TraceContext>) -> Record {
    let source = &delivery.record;
    let mut headers = Vec::with_capacity(source.headers.len() + answer.headers.len() + 4);
    for own in &source.headers {
        let kept = match &delivery.route.forward_headers {
            ForwardHeaders::All => true,
            ForwardHeaders::None => false,
            ForwardHeaders::Only(names) => names.iter().any(|name| **name == *own.name),
        };
        if kept && !is_managed(&own.name) && !answer.headers.iter().any(|header| header.name == own.name) {
            headers.push(own.clone());
        }
    }
    headers.extend(answer.headers.iter().filter(|header| !is_managed(&header.name)).cloned());
    headers.push(Header::new(header::MESH_ID, id));
    let (hops, cause) = hops_and_cause(delivery, index);
    headers.push(Header::new(header::MESH_HOPS, hops));
    headers.push(Header::new(header::MESH_CAUSE, cause));
    if let Some(content_type) = answer.content_type.as_ref().or_else(|| source.header(header::CONTENT_TYPE)) {
        headers.push(Header::new(header::CONTENT_TYPE, content_type.clone()));
    }
    if let Some(context) = context {
        headers.push(Header::new(header::TRACEPARENT, context.traceparent()));
        if let Some(state) = &context.state {
            headers.push(Header::new(header::TRACESTATE, state.clone()));
        }
    }
    if let Some(baggage) = source.header(header::BAGGAGE) {
        headers.push(Header::new(header::BAGGAGE, baggage.clone()));
    }
    Record { key: answer.key.clone().or_else(|| source.key.clone()), value: answer.value.clone(), headers, timestamp_ms: None }
}

/// `mesh-hops` and `mesh-cause`, in one buffer.
fn hops_and_cause(delivery: &Delivery, index: usize) -> (Bytes, Bytes) {
    let mut buffer = BytesMut::with_capacity(96);
    // Writing into a buffer cannot fail.
    let _ = write!(buffer, "{}", delivery.hops.saturating_add(1));
    let hops = buffer.split().freeze();
    let _ = write!(buffer, "{} {} {index}", delivery.route.name, delivery.position);
    (hops, buffer.freeze())
}

/// Headers that the mesh writes itself; neither a source's nor an answer's is taken over.
fn is_managed(name: &str) -> bool {
    name.starts_with(header::MESH_PREFIX)
        || matches!(name, header::CONTENT_TYPE | header::TRACEPARENT | header::TRACESTATE | header::BAGGAGE)
}

/// What is left out of a dead letter that the broker would refuse: with the headers of its end a record may be larger than the broker takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Nothing.
    #[default]
    Nothing,
    /// The value.
    Value,
    /// Value, key and the record's own headers.
    Record,
}

impl Cut {
    /// What to leave out next.
    pub(crate) fn more(self) -> Option<Self> {
        match self {
            Self::Nothing => Some(Self::Value),
            Self::Value => Some(Self::Record),
            Self::Record => None,
        }
    }

    /// The word in `mesh-dlq-cut`.
    fn as_str(self) -> Option<&'static str> {
        match self {
            Self::Nothing => None,
            Self::Value => Some("value"),
            Self::Record => Some("record"),
        }
    }
}

/// The dead letter of a record: key, value and headers as they were, and why it ended here.
pub(crate) fn dead_letter(delivery: &Delivery, reason: Reason, detail: &str, now_ms: i64, cut: Cut) -> Outgoing {
    let source = &delivery.record;
    let own = source.headers.iter().filter(|header| !header.name.starts_with(header::DLQ_PREFIX));
    let mut headers: Vec<Header> = own.filter(|header| cut != Cut::Record || header.name == header::MESH_ID).cloned().collect();
    if source.header(header::MESH_ID).is_none() {
        headers.push(Header::new(header::MESH_ID, delivery.mesh_id.clone()));
    }
    let position = &delivery.position;
    let mut add =
        |name: &'static str, value: String| headers.push(Header { name: ByteString::from_static(name), value: Some(value.into()) });
    add("mesh-dlq-route", delivery.route.name.to_string());
    add("mesh-dlq-reason", reason.as_str().to_owned());
    add("mesh-dlq-detail", shorten(detail, DETAIL));
    add("mesh-dlq-attempts", delivery.attempt.to_string());
    add("mesh-dlq-topic", position.partition.topic.to_string());
    add("mesh-dlq-partition", position.partition.partition.to_string());
    add("mesh-dlq-offset", position.offset.to_string());
    if let Some(timestamp) = source.timestamp_ms {
        add("mesh-dlq-timestamp", timestamp.to_string());
    }
    add("mesh-dlq-time", now_ms.to_string());
    if let Some(word) = cut.as_str() {
        add("mesh-dlq-cut", word.to_owned());
    }
    let key = source.key.clone().filter(|_| cut != Cut::Record);
    let value = source.value.clone().filter(|_| cut == Cut::Nothing);
    let record = Record { key, value, headers, timestamp_ms: None };
    Outgoing { topic: delivery.route.dead_letter.clone(), partition: None, record }
}
