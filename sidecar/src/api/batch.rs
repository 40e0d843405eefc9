//! Publishing many records with one HTTP request: a JSON batch, or lines.
//!
//! Invariant: every record of the request has one result, in order, and a bad one keeps no other back.
//! Invariant: of lines, no more than a few chunks are in memory, whatever the body's length.

use std::collections::VecDeque;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{Response, StatusCode};
use hyper::body::Incoming;

use super::{
    Api,
    fields::Fields,
    paths::{self, Form},
    problem::ApiError,
};
use crate::{
    json::{self, BatchError, ReadError},
    publish::{Draft, Pending, Published, Topic, TraceHeaders},
    record::Position,
};

/// The most records of one request.
const MOST_RECORDS: usize = 100_000;
/// Records of one chunk of lines.
const CHUNK_RECORDS: usize = 500;
/// Chunks that wait for their acknowledgements at once.
const CHUNKS: usize = 8;

/// What became of a record of a request.
struct Done {
    mesh_id: Bytes,
    result: Result<Position, ApiError>,
}

/// A chunk of a request on its way: its records, and the faults of those that are none, by their place in it.
struct Chunk {
    pending: Pending,
    faults: Vec<(usize, ApiError)>,
}

/// Publishes the records of a body.
pub(super) async fn publish(
    api: &Api,
    topic: &Topic,
    fields: Fields,
    trace: &TraceHeaders,
    form: Form,
    body: &mut Incoming,
) -> Result<Response<Body>, ApiError> {
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
    let mut run =
        Run { api, topic, trace, fields, drafts: Vec::new(), faults: Vec::new(), chunks: VecDeque::new(), done: Vec::new(), taken: 0 };
    match form {
        Form::Lines | Form::ValueLines => run.lines(body, form == Form::ValueLines).await,
        _ => run.whole(body, form == Form::ValueArray).await?,
    }
    run.finish().await
}

struct Run<'a> {
    api: &'a Api,
    topic: &'a Topic,
    trace: &'a TraceHeaders,
    /// The defaults for every record.
    fields: Fields,
    drafts: Vec<Draft>,
    faults: Vec<(usize, ApiError)>,
    chunks: VecDeque<Chunk>,
    done: Vec<Done>,
    /// Records taken so far.
    taken: usize,
}

impl Run<'_> {
    fn take(&mut self, read: Result<Draft, ApiError>) {
        self.taken += 1;
        match read {
            Ok(mut draft) => {
                if draft.record.key.is_none() {
                    draft.record.key.clone_from(&self.fields.key);
                }
                if draft.record.timestamp_ms.is_none() {
                    draft.record.timestamp_ms = self.fields.timestamp_ms;
                }
                for default in &self.fields.headers {
                    if !draft.record.headers.iter().any(|given| given.name == default.name) {
                        draft.record.headers.push(default.clone());
                    }
                }
                self.drafts.push(draft);
            }
            Err(error) => self.faults.push((self.drafts.len() + self.faults.len(), error)),
        }
    }

    /// Sends what was taken, and waits for earlier chunks if there are too many.
    async fn send(&mut self) {
        if self.drafts.is_empty() && self.faults.is_empty() {
            return;
        }
        let pending = self.api.inner.publisher.enqueue(self.topic, std::mem::take(&mut self.drafts), self.trace);
        self.chunks.push_back(Chunk { pending, faults: std::mem::take(&mut self.faults) });
        while self.chunks.len() > CHUNKS {
            self.collect().await;
        }
    }

    /// Waits for the oldest chunk.
    async fn collect(&mut self) {
        let Some(chunk) = self.chunks.pop_front() else { return };
        let mut published = chunk
            .pending
            .wait()
            .await
            .into_iter()
            .map(|Published { mesh_id, result }| Done { mesh_id, result: result.map_err(Into::into) });
        let begin = self.done.len();
        for (place, error) in chunk.faults {
            let between = begin + place - self.done.len();
            self.done.extend(published.by_ref().take(between));
            self.api.inner.publisher.count_refused(Some(self.topic), error.row().code, 1);
            self.done.push(Done { mesh_id: Bytes::new(), result: Err(error) });
        }
        self.done.extend(published);
    }

    /// A body that is one JSON document. Nothing of it is published if it is not.
    async fn whole(&mut self, body: &mut Incoming, values: bool) -> Result<(), ApiError> {
        let limit = batch_bytes(self.api);
        let body = paths::read_body(body, limit).await?;
        if body.is_empty() {
            return Err(ApiError::NoBody);
        }
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
                let value = Bytes::copy_from_slice(element.get().as_bytes());
                self.take(Ok(value_draft(value)));
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
                self.take(read);
            }
        }
        self.send().await;
        Ok(())
    }

    /// A body of lines. They are published as they come; what breaks the body off becomes the last result.
    async fn lines(&mut self, body: &mut Incoming, values: bool) {
        // JSON may be larger than what it stands for: base64, escapes, headers.
        let longest = 2 * self.api.inner.publisher.config().limits.record_bytes + 64 * 1024;
        let (mut kept, mut line) = (BytesMut::new(), 0);
        loop {
            let data = match paths::next_data(body).await {
                Ok(data) => data,
                Err(error) => return self.take(Err(error)),
            };
            let last = data.is_none();
            let searched = kept.len();
            kept.extend_from_slice(&data.unwrap_or_default());
            let end =
                if last { Some(kept.len()) } else { kept[searched..].iter().rposition(|byte| *byte == b'\n').map(|at| searched + at + 1) };
            if let Some(end) = end {
                let ready = kept.split_to(end).freeze();
                for text in ready.split(|byte| *byte == b'\n') {
                    line += 1;
                    let text = text.trim_ascii();
                    if text.is_empty() {
                        continue;
                    }
                    if self.taken == MOST_RECORDS {
                        return self.take(Err(ApiError::TooMany { limit: MOST_RECORDS }));
                    }
                    let read = read_line(text, &ready, line, values);
                    self.take(read);
                    if self.drafts.len() >= CHUNK_RECORDS {
                        self.send().await;
                    }
                }
                // The text after the last line break begins the next line.
                line -= usize::from(!last);
                self.send().await;
            }
            if last {
                return;
            }
            if kept.len() > longest {
                return self.take(Err(ApiError::BodyTooLarge { limit: longest }));
            }
        }
    }

    async fn finish(mut self) -> Result<Response<Body>, ApiError> {
        self.send().await;
        while !self.chunks.is_empty() {
            self.collect().await;
        }
        let statuses = || self.done.iter().map(|done| done.result.as_ref().map_or_else(|error| error.row().status, |_| StatusCode::OK));
        let mut out = Vec::with_capacity(16 + self.done.len() * 128);
        write_results(&mut out, &self.done, self.trace);
        let first = statuses().next().unwrap_or(StatusCode::OK);
        let uniform = statuses().all(|status| status == first);
        if let Some(Done { result: Err(error), .. }) = self.done.first()
            && uniform
        {
            return Ok(error.response_with(self.trace.traceparent.as_ref(), Some(&out)));
        }
        let mut body = b"{\"results\":".to_vec();
        body.append(&mut out);
        body.push(b'}');
        let mut response = paths::json_response(body);
        if !uniform {
            *response.status_mut() = StatusCode::MULTI_STATUS;
        }
        Ok(response)
    }
}

fn write_results(out: &mut Vec<u8>, done: &[Done], trace: &TraceHeaders) {
    out.push(b'[');
    for (index, done) in done.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        match &done.result {
            Ok(position) => {
                out.extend_from_slice(b"{\"status\":200,");
                paths::write_position(out, position, &done.mesh_id);
            }
            Err(error) => {
                json::put(out, format_args!("{{\"status\":{},\"problem\":", error.row().status.as_u16()));
                out.extend_from_slice(&error.json(trace.traceparent.as_ref()));
            }
        }
        out.push(b'}');
    }
    out.push(b']');
}

fn read_line(text: &[u8], buffer: &Bytes, line: usize, values: bool) -> Result<Draft, ApiError> {
    let text = std::str::from_utf8(text).map_err(|_| ApiError::Json(format!("line {line} is not UTF-8")))?;
    let named = |error| match error {
        ReadError::Syntax { column, why } => ApiError::Json(format!("line {line}, column {column}: {why}")),
        ReadError::Form(why) => ApiError::Form(format!("line {line}: {why}")),
    };
    if values {
        json::check(text).map_err(named)?;
        return Ok(value_draft(Bytes::copy_from_slice(text.as_bytes())));
    }
    json::read_record(text, buffer).map_err(named)
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
