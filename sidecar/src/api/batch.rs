//! Publishing many records with one HTTP request as one JSON document: a batch, or an array of values. What it shares with lines is here, too.
//!
//! Invariant: every record of the request has one result, in order, and a bad one keeps no other back.

use axum::body::Body;
use bytes::Bytes;
use http::{Response, StatusCode};
use hyper::body::Incoming;

use super::{Api, fields::Fields, paths, problem::ApiError};
use crate::{
    json::{self, BatchError, ReadError},
    publish::{Draft, Pending, Published, Topic, TraceHeaders},
    record::Position,
};

/// The most records of one request.
pub(super) const MOST_RECORDS: usize = 100_000;
/// What became of a record of a request.
pub(super) struct Done {
    mesh_id: Bytes,
    result: Result<Position, ApiError>,
}

impl Done {
    pub(super) fn status(&self) -> StatusCode {
        self.result.as_ref().map_or_else(|error| error.row().status, |_| StatusCode::OK)
    }

    /// Appends the members of its JSON object.
    pub(super) fn write_members(&self, out: &mut Vec<u8>, trace: &TraceHeaders) {
        match &self.result {
            Ok(position) => {
                out.extend_from_slice(b"\"status\":200,");
                paths::write_position(out, position, &self.mesh_id);
            }
            Err(error) => {
                json::put(out, format_args!("\"status\":{},\"problem\":", error.row().status.as_u16()));
                out.extend_from_slice(&error.json(trace.traceparent.as_ref()));
            }
        }
    }
}

/// Records of a request that are gathered to be sent together, and the faults of those that are none, by their place.
#[derive(Default)]
pub(super) struct Gather {
    drafts: Vec<Draft>,
    faults: Vec<(usize, ApiError)>,
}

impl Gather {
    /// Takes a record, or why it is none. `fields` has the defaults for every record of the request.
    pub(super) fn take(&mut self, read: Result<Draft, ApiError>, fields: &Fields) {
        match read {
            Ok(mut draft) => {
                if draft.record.key.is_none() {
                    draft.record.key.clone_from(&fields.key);
                }
                if draft.record.timestamp_ms.is_none() {
                    draft.record.timestamp_ms = fields.timestamp_ms;
                }
                for default in &fields.headers {
                    if !draft.record.headers.iter().any(|given| given.name == default.name) {
                        draft.record.headers.push(default.clone());
                    }
                }
                self.drafts.push(draft);
            }
            Err(error) => self.faults.push((self.drafts.len() + self.faults.len(), error)),
        }
    }

    /// Enqueues the records, and counts the faults.
    pub(super) fn send(self, api: &Api, topic: &Topic, trace: &TraceHeaders) -> Chunk {
        for (_, error) in &self.faults {
            api.inner.publisher.count_refused(Some(topic), error.row().code, 1);
        }
        Chunk { pending: api.inner.publisher.enqueue(topic, self.drafts, trace), faults: self.faults }
    }
}

/// Gathered records on their way to the broker.
pub(super) struct Chunk {
    pending: Pending,
    faults: Vec<(usize, ApiError)>,
}

impl Chunk {
    /// What became of everything that was gathered, in order.
    pub(super) async fn resolve(self) -> Vec<Done> {
        let published = self.pending.wait().await.into_iter();
        let mut published = published.map(|Published { mesh_id, result }| Done { mesh_id, result: result.map_err(Into::into) });
        let mut done = Vec::with_capacity(published.len() + self.faults.len());
        for (place, error) in self.faults {
            let between = place - done.len();
            done.extend(published.by_ref().take(between));
            done.push(Done { mesh_id: Bytes::new(), result: Err(error) });
        }
        done.extend(published);
        done
    }
}

/// Checks what a request of several records may not say for all of them.
pub(super) fn check(fields: &Fields) -> Result<(), ApiError> {
    if fields.mesh_id.is_some() {
        return Err(ApiError::Header {
            name: "mesh-id".to_owned(),
            reason: "names one record, and this request has several: give each its `mesh_id`",
        });
    }
    if fields.tombstone {
        return Err(ApiError::Header {
            name: "mesh-tombstone".to_owned(),
            reason: "is for one record; in a batch, write `\"value\":null`",
        });
    }
    Ok(())
}

/// Publishes the records of a document. Nothing of it is published if it is no JSON.
pub(super) async fn publish(
    api: &Api,
    topic: &Topic,
    fields: &Fields,
    trace: &TraceHeaders,
    values: bool,
    body: &mut Incoming,
) -> Result<Response<Body>, ApiError> {
    let body = paths::read_body(body, batch_bytes(api)).await?;
    if body.is_empty() {
        return Err(ApiError::NoBody);
    }
    let mut gather = Gather::default();
    if values {
        let text = std::str::from_utf8(&body).map_err(|_| ApiError::Json("the body is not UTF-8".to_owned()))?;
        let bad = |error: serde_json::Error| ApiError::Json(format!("the body is not JSON: {error}"));
        let elements: Vec<&serde_json::value::RawValue> = match text.trim_start().starts_with('[') {
            true => serde_json::from_str(text).map_err(bad)?,
            false => vec![serde_json::from_str(text).map_err(bad)?],
        };
        if elements.len() > MOST_RECORDS {
            return Err(ApiError::TooMany { limit: MOST_RECORDS });
        }
        for element in elements {
            gather.take(Ok(value_draft(Bytes::copy_from_slice(element.get().as_bytes()))), fields);
        }
    } else {
        let records = json::split_batch(&body, MOST_RECORDS).map_err(|error| match error {
            BatchError::Json(why) => ApiError::Json(why),
            BatchError::TooMany => ApiError::TooMany { limit: MOST_RECORDS },
        })?;
        for (index, record) in records.into_iter().enumerate() {
            let read = json::read_record(record.get(), &body).map_err(|error| match error {
                ReadError::Form(why) | ReadError::Syntax { why, .. } => ApiError::Form(format!("record {index}: {why}")),
            });
            gather.take(read, fields);
        }
    }
    Ok(document(gather.send(api, topic, trace).resolve().await, trace))
}

/// The answer as one document: a problem if all records share its status, else the results, with 207 if they differ.
pub(super) fn document(done: Vec<Done>, trace: &TraceHeaders) -> Response<Body> {
    let mut out = Vec::with_capacity(16 + done.len() * 128);
    out.push(b'[');
    for (index, done) in done.iter().enumerate() {
        out.extend_from_slice(if index > 0 { b",{" } else { b"{" });
        done.write_members(&mut out, trace);
        out.push(b'}');
    }
    out.push(b']');
    let first = done.first().map_or(StatusCode::OK, Done::status);
    let uniform = done.iter().all(|done| done.status() == first);
    if let Some(Done { result: Err(error), .. }) = done.first()
        && uniform
    {
        return error.response_with(trace.traceparent.as_ref(), Some(&out));
    }
    let mut body = b"{\"results\":".to_vec();
    body.append(&mut out);
    body.push(b'}');
    let mut response = paths::json_response(body);
    if !uniform {
        *response.status_mut() = StatusCode::MULTI_STATUS;
    }
    response
}

/// Reads a line that is a record, or a value.
pub(super) fn read_line(line: &Bytes, number: usize, values: bool) -> Result<Draft, ApiError> {
    let text = std::str::from_utf8(line).map_err(|_| ApiError::Json(format!("line {number} is not UTF-8")))?;
    let named = |error| match error {
        ReadError::Syntax { column, why } => ApiError::Json(format!("line {number}, column {column}: {why}")),
        ReadError::Form(why) => ApiError::Form(format!("line {number}: {why}")),
    };
    if values {
        json::check(text).map_err(named)?;
        return Ok(value_draft(Bytes::copy_from_slice(line)));
    }
    json::read_record(text, line).map_err(named)
}

fn value_draft(value: Bytes) -> Draft {
    let mut draft = Draft { content_type: Some(Bytes::from_static(b"application/json")), ..Draft::default() };
    draft.record.value = Some(value);
    draft
}

/// The largest body of several records, in bytes.
pub(super) fn batch_bytes(api: &Api) -> usize {
    api.inner.publisher.config().limits.record_bytes.saturating_mul(4).max(4 * 1024 * 1024)
}
