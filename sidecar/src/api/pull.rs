//! Routes with `deliver: pull`: `GET /v1/routes/{route}/records` takes deliveries, `POST /v1/routes/{route}/outcomes` answers them.
//!
//! Invariant: deliveries whose answer never reached the connection are given back at once; those that did are leased.

use std::{
    borrow::Cow,
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{Response, StatusCode, header, request::Parts};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Api, batch, follow, follow::Form, paths, problem::ApiError};
use crate::{
    deliver::desk::{Attachment, Desk},
    json::{self, ReadError},
    outcome::{Answer, Delivery, Outcome, Reply, ReplyRecord},
    publish::{Caller, Draft},
};

/// The most records of one answer.
const MOST: usize = 1000;
/// How long a pull waits for its first record, unless it says.
const WAIT: Duration = Duration::from_secs(5);
/// How long it may.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// The desk of a route that the caller may act on.
pub(super) fn desk(api: &Api, caller: Caller, route: &str, pull: bool) -> Result<Arc<Desk>, ApiError> {
    let (wants, other) = if pull { ("pull", "stream") } else { ("stream", "pull") };
    let callers = &api.inner.callers;
    let desk = api.inner.desks.get(route).ok_or_else(|| match api.inner.draining.is_cancelled() {
        true => ApiError::Draining,
        false => ApiError::UnknownRoute { route: crate::record::clip(route), mode: wants },
    })?;
    if !callers.is(caller, desk.service()) {
        let caller = callers.name(caller).map_or_else(String::new, |name| name.to_string());
        return Err(ApiError::ForeignRoute { route: route.to_owned(), owner: desk.service().to_string(), caller });
    }
    if desk.is_pull() != pull {
        return Err(ApiError::WrongMode { route: route.to_owned(), has: other, wants });
    }
    Ok(desk)
}

/// Takes deliveries.
pub(super) async fn take(api: &Api, route: &str, parts: &Parts) -> Result<Response<Body>, ApiError> {
    let caller = paths::caller(api, &parts.headers)?;
    let form = Form::of(&parts.headers, Form::Json, &[Form::Json, Form::Lines, Form::Events])?;
    let desk = desk(api, caller, route, true)?;
    let (mut most, mut wait) = (desk.concurrency().clamp(1, MOST), WAIT);
    for (name, value) in follow::query(parts, &["max", "wait"])? {
        match name {
            "max" => match value.parse() {
                Ok(max @ 1..=MOST) => most = max,
                _ => return Err(ApiError::Query { name, reason: format!("must be a number from 1 to {MOST}") }),
            },
            _ => {
                wait = duration(&value)
                    .ok_or_else(|| ApiError::Query { name, reason: "must be a duration such as 10s or 500ms".to_owned() })?
            }
        }
    }
    if form != Form::Json {
        let pulling = Pulling { attached: desk.attach(), desk, form, most, draining: api.inner.draining.clone(), began: false };
        return Ok(follow::streaming(
            form,
            stream::unfold(Some(pulling), |pulling| async {
                let mut pulling = pulling?;
                match pulling.frame().await {
                    Some(frame) => Some((Ok(frame), Some(pulling))),
                    None => pulling.form.farewell().map(|frame| (Ok(frame), None)),
                }
            }),
        ));
    }
    let taken = desk.take(most, wait.min(LONGEST_WAIT)).await.ok_or(ApiError::Draining)?;
    let ids = taken.iter().map(|delivery| delivery.id).collect();
    let mut out = b"{\"records\":[".to_vec();
    for (index, delivery) in taken.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write(form, &mut out, delivery);
    }
    out.extend_from_slice(b"]}");
    let mut response = Response::new(Body::new(Leased { body: Some(out.into()), desk, ids }));
    response.headers_mut().insert(header::CONTENT_TYPE, paths::JSON);
    response.headers_mut().insert(header::CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
    Ok(response)
}

/// `10s`, `500ms`, or milliseconds as a bare number.
fn duration(text: &str) -> Option<Duration> {
    match text.parse::<u64>() {
        Ok(ms) => Some(Duration::from_millis(ms)),
        Err(_) => humantime::parse_duration(text).ok(),
    }
}

fn write(form: Form, out: &mut Vec<u8>, delivery: &Delivery) {
    form.write(out, &delivery.position, &delivery.record, |out| {
        // A string, since JSON's numbers end at 2^53 in many languages.
        json::put(out, format_args!("\"id\":\"{}\",\"attempt\":{},\"hops\":{},", delivery.id, delivery.attempt, delivery.hops));
        if !delivery.traceparent.is_empty() {
            out.extend_from_slice(b"\"traceparent\":");
            json::write_string(out, &String::from_utf8_lossy(&delivery.traceparent));
            out.push(b',');
        }
    });
}

/// A body of deliveries; dropped before the connection took it, it gives them back.
struct Leased {
    body: Option<Bytes>,
    desk: Arc<Desk>,
    ids: Vec<u64>,
}

impl http_body::Body for Leased {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.ids.clear();
        Poll::Ready(self.body.take().map(|body| Ok(Frame::data(body))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.body.as_ref().map_or(0, |body| body.len() as u64))
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            self.desk.abandon(std::mem::take(&mut self.ids));
        }
    }
}

/// A stream of deliveries over HTTP. What is on its way when the client leaves comes again when its lease ends.
struct Pulling {
    desk: Arc<Desk>,
    #[expect(dead_code, reason = "held for its drop")]
    attached: Attachment,
    form: Form,
    most: usize,
    draining: CancellationToken,
    began: bool,
}

impl Pulling {
    async fn frame(&mut self) -> Option<Bytes> {
        if !self.began {
            self.began = true;
            if self.form == Form::Events {
                return Some(Bytes::from_static(b": attached\n\n"));
            }
        }
        let alive = Instant::now() + follow::KEEP_ALIVE;
        loop {
            let wait = alive.saturating_duration_since(Instant::now());
            let taken = tokio::select! {
                biased;
                () = self.draining.cancelled() => return None,
                taken = self.desk.take(self.most, wait) => taken?,
            };
            if !taken.is_empty() {
                let mut out = Vec::with_capacity(4096);
                for delivery in &taken {
                    write(self.form, &mut out, delivery);
                }
                return Some(out.into());
            }
            if Instant::now() >= alive {
                match self.form {
                    Form::Events => return Some(Bytes::from_static(b": keep-alive\n\n")),
                    // Nothing may stand between lines but lines.
                    _ => return self.wait_longer().await,
                }
            }
        }
    }

    /// Waits for lines without a limit.
    async fn wait_longer(&self) -> Option<Bytes> {
        loop {
            let taken = tokio::select! {
                biased;
                () = self.draining.cancelled() => return None,
                taken = self.desk.take(self.most, LONGEST_WAIT) => taken?,
            };
            if !taken.is_empty() {
                let mut out = Vec::with_capacity(4096);
                for delivery in &taken {
                    write(self.form, &mut out, delivery);
                }
                return Some(out.into());
            }
        }
    }
}

/// Answers deliveries.
pub(super) async fn answer(api: &Api, route: &str, parts: &Parts, body: &mut Incoming) -> Result<Response<Body>, ApiError> {
    let caller = paths::caller(api, &parts.headers)?;
    let desk = desk(api, caller, route, true)?;
    let body = paths::read_body(body, batch::batch_bytes(api)).await?;
    if body.is_empty() {
        return Err(ApiError::NoBody);
    }
    let read: OutcomesIn<'_> = serde_json::from_slice(&body).map_err(|error| {
        ApiError::Json(format!("the body is not JSON of the form {{\"outcomes\":[{{\"id\":…,\"reply\":{{…}}}}]}}: {error}"))
    })?;
    let (mut entries, mut answers) = (Vec::with_capacity(read.outcomes.len()), Vec::with_capacity(read.outcomes.len()));
    for (index, raw) in read.outcomes.into_iter().enumerate() {
        entries.push(match read_outcome(raw, &body) {
            Ok(answer) => {
                let id = answer.id;
                answers.push(answer);
                Ok(id)
            }
            Err(why) => Err(ApiError::Form(format!("outcome {index}: {why}"))),
        });
    }
    let mut known = desk.answer(answers).into_iter();
    let mut all = true;
    let mut out = b"{\"results\":[".to_vec();
    for (index, entry) in entries.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        let failed = match entry {
            Ok(id) if known.next().unwrap_or_default() => {
                json::put(&mut out, format_args!("{{\"id\":\"{id}\",\"status\":200}}"));
                continue;
            }
            Ok(id) => {
                json::put(&mut out, format_args!("{{\"id\":\"{id}\","));
                ApiError::UnknownDelivery(id)
            }
            Err(error) => {
                out.push(b'{');
                error
            }
        };
        all = false;
        json::put(&mut out, format_args!("\"status\":{},\"problem\":", failed.row().status.as_u16()));
        out.extend_from_slice(&failed.json(None));
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
    let mut response = paths::json_response(out);
    if !all {
        *response.status_mut() = StatusCode::MULTI_STATUS;
    }
    Ok(response)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OutcomesIn<'a> {
    #[serde(borrow)]
    outcomes: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OutcomeIn<'a> {
    id: Id<'a>,
    #[serde(borrow, default)]
    reply: Option<ReplyIn<'a>>,
    #[serde(default)]
    ignore: Option<IgnoreIn>,
    #[serde(default)]
    retry: Option<RetryIn>,
    #[serde(default)]
    reject: Option<RejectIn>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Id<'a> {
    Number(u64),
    Text(#[serde(borrow)] Cow<'a, str>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReplyIn<'a> {
    #[serde(default)]
    status: Option<u16>,
    #[serde(borrow, default)]
    records: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct IgnoreIn {
    #[serde(default, rename = "reason")]
    _reason: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RetryIn {
    #[serde(default)]
    reason: String,
    #[serde(default)]
    after_ms: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RejectIn {
    #[serde(default)]
    reason: String,
}

fn read_outcome(raw: &RawValue, buffer: &Bytes) -> Result<Answer, String> {
    let read: OutcomeIn<'_> = serde_json::from_str(raw.get()).map_err(|error| error.to_string())?;
    let id = match read.id {
        Id::Number(id) => id,
        Id::Text(text) => text.parse().map_err(|_| format!("the field `id` is `{}`, which no delivery has", crate::record::clip(&text)))?,
    };
    let outcome = match (read.reply, read.ignore, read.retry, read.reject) {
        (Some(reply), None, None, None) => read_reply(reply, buffer)?,
        (None, Some(_), None, None) => Outcome::Ignore,
        (None, None, Some(retry), None) => {
            Outcome::Retry { reason: retry.reason, after: (retry.after_ms > 0).then(|| Duration::from_millis(retry.after_ms)) }
        }
        (None, None, None, Some(reject)) => Outcome::Reject { reason: reject.reason },
        _ => return Err("needs exactly one of `reply`, `ignore`, `retry` and `reject`".to_owned()),
    };
    Ok(Answer { id, outcome })
}

fn read_reply(reply: ReplyIn<'_>, buffer: &Bytes) -> Result<Outcome, String> {
    let status = match reply.status {
        None => 200,
        Some(status @ 100..=599) => status,
        Some(status) => return Err(format!("the field `reply.status` is {status}; use 100 to 599")),
    };
    let mut records = Vec::with_capacity(reply.records.len());
    for (index, raw) in reply.records.into_iter().enumerate() {
        let Draft { record, content_type, .. } = json::read_record(raw.get(), buffer).map_err(|error| match error {
            ReadError::Form(why) | ReadError::Syntax { why, .. } => format!("the field `reply.records[{index}]`: {why}"),
        })?;
        records.push(ReplyRecord { key: record.key, value: record.value, content_type, headers: record.headers });
    }
    // `when` looks at the first record's value, as it looks at an HTTP answer's body.
    let body = records.first().and_then(|record| record.value.clone());
    Ok(Outcome::Reply(Reply { status, records, body, retry_after: None }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Answer, String> {
        let buffer = Bytes::copy_from_slice(text.as_bytes());
        let raw: &RawValue = serde_json::from_slice(&buffer).unwrap();
        read_outcome(raw, &buffer)
    }

    #[test]
    fn outcomes_are_read() {
        let reply = read(r#"{"id":"7","reply":{"status":202,"records":[{"key":"k","value":{"a":1},"content_type":"x/y"}]}}"#).unwrap();
        let Outcome::Reply(Reply { status: 202, records, body, .. }) = reply.outcome else { panic!() };
        assert_eq!((reply.id, &records[0].key.as_deref(), &body.as_deref()), (7, &Some(&b"k"[..]), &Some(&br#"{"a":1}"#[..])));
        assert_eq!(records[0].content_type.as_deref(), Some(&b"x/y"[..]));
        assert!(matches!(read(r#"{"id":7,"reply":{}}"#).unwrap().outcome, Outcome::Reply(Reply { status: 200, body: None, .. })));
        assert_eq!(read(r#"{"id":7,"ignore":{"reason":"x"}}"#).unwrap().outcome, Outcome::Ignore);
        let retry = Outcome::Retry { reason: "busy".to_owned(), after: Some(Duration::from_millis(5)) };
        assert_eq!(read(r#"{"id":7,"retry":{"reason":"busy","after_ms":5}}"#).unwrap().outcome, retry);
        assert_eq!(read(r#"{"id":7,"reject":{}}"#).unwrap().outcome, Outcome::Reject { reason: String::new() });
        for bad in [
            r#"{"id":7}"#,
            r#"{"id":7,"ignore":{},"retry":{}}"#,
            r#"{"id":"x","ignore":{}}"#,
            r#"{"id":-1,"ignore":{}}"#,
            r#"{"ignore":{}}"#,
            r#"{"id":7,"reply":{"status":700}}"#,
            r#"{"id":7,"reply":{"records":[{}]}}"#,
            r#"{"id":7,"reply":{"to":"elsewhere"}}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn waits_are_durations() {
        assert_eq!(duration("250"), Some(Duration::from_millis(250)));
        assert_eq!(duration("10s"), Some(Duration::from_secs(10)));
        assert_eq!(duration("soon"), None);
    }
}
