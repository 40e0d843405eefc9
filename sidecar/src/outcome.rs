//! What a delivery carries to a handler, what the handler says, and how a record ends. Floor 0: pure types.
//!
//! Invariant: a failed delivery is data ([`Outcome`]), never an `Err`, above the module `deliver`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_routing::{HeaderSource, Route};

use crate::record::{Header, Position, Record, each_header};

/// One attempt to hand a record to a handler.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Identifies the delivery within its route, for as long as this process runs; never reused.
    pub id: u64,
    /// The route under which it is delivered; a table that is swapped meanwhile does not change it.
    pub route: Arc<Route>,
    /// The record.
    pub record: Arc<Record>,
    /// Where it is stored.
    pub position: Position,
    /// The attempt, from 1. Deliveries that found no service are not counted.
    pub attempt: u32,
    /// How many routes the record's ancestors went through.
    pub hops: u32,
    /// The record's identity over copies.
    pub mesh_id: Bytes,
    /// The `traceparent` for the handler: a child of this delivery's span. Empty: none.
    pub traceparent: Bytes,
}

/// A wish of a service that a record is not tried again where it is: it goes on to the next retry topic, or has its end.
pub const NOT_HERE: Duration = Duration::MAX;

/// What became of a delivery.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// An answer with a status, good or bad; `ignore_status`, `cases`, `to` and the table of statuses decide what it means.
    Reply(Reply),
    /// Done, nothing is forwarded.
    Ignore,
    /// Counts an attempt; try again after the backoff, or after `after` if that is longer.
    Retry {
        /// Why, for logs and the dead letter's detail.
        reason: String,
        /// The service's own wish (`Retry-After`, gRPC pushback); perhaps [`NOT_HERE`].
        after: Option<Duration>,
    },
    /// Dead letter at once.
    Reject {
        /// Why; the dead letter's detail.
        reason: String,
    },
    /// No service was there: refused, unresolvable, reset before the request was written, 503. Counts no attempt.
    NoService {
        /// Why; names the address.
        reason: String,
        /// How long it will be, if somebody says so.
        after: Option<Duration>,
    },
}

/// An answer of a handler.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The status, as in HTTP.
    pub status: u16,
    /// The records of the answer, in order. Empty: an empty answer.
    pub records: Vec<ReplyRecord>,
    /// The answer's body as the handler sent it, for `when`; `None` if it is empty.
    pub body: Option<Bytes>,
    /// How long the service wants to be left alone, if its status turns out to be a failure (`Retry-After`).
    pub retry_after: Option<Duration>,
}

/// One record of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReplyRecord {
    /// The key; `None` keeps the source's.
    pub key: Option<Bytes>,
    /// The value; `None` publishes a null value.
    pub value: Option<Bytes>,
    /// The media type; `None` keeps the source's.
    pub content_type: Option<Bytes>,
    /// Further headers; one overrides the source's of the same name.
    pub headers: Vec<Header>,
}

/// As expressions see an answer's headers.
impl HeaderSource for ReplyRecord {
    fn get(&self, name: &str) -> Option<&[u8]> {
        self.headers.iter().rev().find(|header| header.name == *name).and_then(|header| header.value.as_deref())
    }

    fn for_each(&self, each: &mut dyn FnMut(&str, &[u8])) {
        each_header(&self.headers, each);
    }
}

/// The answer to a delivery, on its way back to the route's loop.
#[derive(Debug)]
pub struct Answer {
    /// The delivery's id.
    pub id: u64,
    /// What became of it.
    pub outcome: Outcome,
}

/// A record's end on a route. There is no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Disposition {
    /// Its replies are acknowledged in the declared topics.
    Forwarded,
    /// By status or by an empty answer: nothing was forwarded.
    Ignored,
    /// The route forwards nothing.
    Void,
    /// The filter did not admit it; the service was not called.
    Filtered,
    /// In the dead-letter topic.
    DeadLettered,
    /// The broker deleted it before it was read.
    Expired,
}

impl Disposition {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Forwarded, Self::Ignored, Self::Void, Self::Filtered, Self::DeadLettered, Self::Expired];

    /// The word in metrics, status and traces.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Ignored => "ignored",
            Self::Void => "void",
            Self::Filtered => "filtered",
            Self::DeadLettered => "dead_lettered",
            Self::Expired => "expired",
        }
    }
}

/// A delivery of `in/0/<offset>` on a route `work` to `out`, with these further fields.
#[cfg(test)]
pub(crate) fn test_delivery(fields: &str, offset: i64) -> Delivery {
    let comma = if fields.is_empty() { "" } else { ", " };
    let text = format!(
        "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: test }}\nspec:\n  routes:\n  - {{ name: work, service: worker, from: [in], handler: /work, to: [out]{comma}{fields} }}\n"
    );
    let table = mesh_routing::parse("test.yaml", &text).and_then(|table| mesh_routing::compile(&table)).unwrap();
    let position = Position { partition: crate::record::TopicPartition::new("in", 0), offset };
    Delivery {
        id: 0,
        route: table.routes[0].clone(),
        record: Arc::default(),
        mesh_id: crate::record::mesh_id(&Record::default(), &position),
        position,
        attempt: 1,
        hops: 0,
        traceparent: Bytes::new(),
    }
}
