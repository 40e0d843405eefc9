//! Publishing in an operator's name, over the admin port: `mesh.v1.Control.Produce`.
//!
//! Records go the way of a service's: checked, with an identity, and answered when the broker has acknowledged them. No allow-list counts.
//!
//! Invariant: every record has one result, in order; a bad one keeps no other back.
//! Invariant: what is in memory is bounded: a few requests wait for their acknowledgements, and no further one is read meanwhile.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use bytestring::ByteString;
use futures_util::{
    FutureExt as _, Stream, StreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use mesh_proto::v1;
use tonic::Status;

use super::problem::ApiError;
use crate::{
    publish::{Caller, Draft, Pending, Published, Publisher, Topic, TraceHeaders},
    record::{Header, Record},
};

/// Requests that wait for their acknowledgements at once.
const AHEAD: usize = 8;

/// What was stored, for the log: an operator's doings leave a trace, however they end.
#[derive(Debug)]
struct Tally {
    who: String,
    stored: u64,
    refused: u64,
    topics: Vec<Arc<str>>,
}

impl Drop for Tally {
    fn drop(&mut self) {
        let topics: Vec<&str> = self.topics.iter().map(|topic| &**topic).collect();
        let (who, topics) = (&*self.who, topics.join(", "));
        tracing::info!(target: "audit", who, stored = self.stored, refused = self.refused, topics, "an operator published records");
    }
}

/// The most topics that the log names.
const NAMED: usize = 20;

/// The answers to a stream of records. Dropping it ends the reading; what was enqueued may still be stored.
pub(super) fn answers(
    publisher: Publisher,
    who: String,
    requests: impl Stream<Item = Result<v1::ProduceRequest, Status>> + Send + 'static,
) -> BoxStream<'static, Result<v1::ProduceResponse, Status>> {
    let tally = Arc::new(Mutex::new(Tally { who, stored: 0, refused: 0, topics: Vec::new() }));
    let enqueued = stream::unfold((Box::pin(requests), publisher), |(mut requests, publisher)| async move {
        let work = match requests.next().await? {
            // One request after the other, so that the records are enqueued in order.
            Ok(request) => Ok(enqueue(&publisher, request.records).await),
            Err(status) => Err(status),
        };
        Some((work, (requests, publisher)))
    });
    let answered = enqueued.map(move |work| -> BoxFuture<'static, Result<v1::ProduceResponse, Status>> {
        let tally = tally.clone();
        match work {
            Ok(parts) => async move { Ok(v1::ProduceResponse { results: resolve(parts, &tally).await }) }.boxed(),
            Err(status) => std::future::ready(Err(status)).boxed(),
        }
    });
    answered.buffered(AHEAD).boxed()
}

/// Records that were enqueued together, or why they were not.
struct Part {
    numbers: Vec<u64>,
    sent: Result<(Topic, Pending), ApiError>,
}

async fn enqueue(publisher: &Publisher, records: Vec<v1::ProducedRecord>) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut records = records.into_iter().peekable();
    while let Some(first) = records.next() {
        let name = first.topic.clone();
        let (mut numbers, mut drafts) = (vec![first.number], vec![draft(first.record.unwrap_or_default())]);
        while let Some(next) = records.next_if(|next| next.topic == name) {
            numbers.push(next.number);
            drafts.push(draft(next.record.unwrap_or_default()));
        }
        let sent = match publisher.topic(Caller::Operator, &name).await {
            Ok(topic) => {
                let pending = publisher.enqueue(&topic, drafts, &TraceHeaders::default());
                Ok((topic, pending))
            }
            Err(error) => Err(error.into()),
        };
        parts.push(Part { numbers, sent });
    }
    parts
}

async fn resolve(parts: Vec<Part>, tally: &Mutex<Tally>) -> Vec<v1::ProducedResult> {
    let mut results = Vec::new();
    for Part { numbers, sent } in parts {
        let (topic, published) = match sent {
            Ok((topic, pending)) => (topic, pending.wait().await),
            Err(error) => {
                let problem = error.proto();
                let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
                tally.refused += numbers.len() as u64;
                let refused = numbers.into_iter().map(|number| {
                    let result = v1::publish_result::Result::Problem(problem.clone());
                    v1::ProducedResult { number, result: Some(v1::PublishResult { result: Some(result), mesh_id: String::new() }) }
                });
                results.extend(refused);
                continue;
            }
        };
        let stored = published.iter().filter(|published| published.result.is_ok()).count() as u64;
        {
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            tally.stored += stored;
            tally.refused += published.len() as u64 - stored;
            if stored > 0 && tally.topics.len() < NAMED && !tally.topics.contains(topic.name()) {
                tally.topics.push(topic.name().clone());
            }
        }
        let told =
            numbers.into_iter().zip(published).map(|(number, published)| v1::ProducedResult { number, result: Some(result(published)) });
        results.extend(told);
    }
    results
}

/// A record as it came.
pub(super) fn draft(record: v1::Record) -> Draft {
    let text = |text: String| (!text.is_empty()).then(|| Bytes::from(text));
    let headers = record.headers.into_iter().map(|field| Header { name: ByteString::from(field.name), value: field.value }).collect();
    Draft {
        record: Record { key: record.key, value: record.value, headers, timestamp_ms: record.timestamp_ms },
        mesh_id: text(record.mesh_id),
        content_type: text(record.content_type),
    }
}

/// What became of a record.
pub(super) fn result(published: Published) -> v1::PublishResult {
    let result = match published.result {
        Ok(position) => v1::publish_result::Result::Position(crate::deliver::grpc::position(&position)),
        Err(error) => v1::publish_result::Result::Problem(ApiError::from(error).proto()),
    };
    v1::PublishResult { result: Some(result), mesh_id: String::from_utf8_lossy(&published.mesh_id).into_owned() }
}
