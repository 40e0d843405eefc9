//! `POST /v1/routes/{route}/outcomes`: what a service that polls says to its deliveries, as `{"outcomes":[…]}` or an outcome a line.
//!
//! Invariant: every outcome of the request has one result, in order, and a bad one keeps no other back.
//! Invariant: outcomes reach the route's loop in the order of the request, so replies of one lane leave in that order.

use std::{borrow::Cow, time::Duration};

use axum::body::Body;
use bytes::Bytes;
use http::{Response, StatusCode, header, request::Parts};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Api, batch, paths, problem::ApiError, pull};
use crate::{
    deliver::desk::Heard,
    json::{self, ReadError},
    outcome::{Answer, Outcome, Reply, ReplyRecord},
    publish::Draft,
};

/// Answers deliveries.
pub(super) async fn answer(api: &Api, route: &str, parts: &Parts, body: &mut Incoming) -> Result<Response<Body>, ApiError> {
    let caller = paths::caller(api, &parts.headers)?;
    let desk = pull::desk(api, caller, route, true)?;
    let body = paths::read_body(body, batch::batch_bytes(api)).await?;
    if body.is_empty() {
        return Err(ApiError::NoBody);
    }
    let (mut entries, mut answers) = (Vec::new(), Vec::new());
    let mut take = |read: Result<Answer, ApiError>| {
        entries.push(read.map(|answer| {
            let id = answer.id;
            answers.push(answer);
            id
        }));
    };
    if is_lines(parts) {
        for (index, line) in body.split(|byte| *byte == b'\n').enumerate() {
            let line = line.trim_ascii();
            if !line.is_empty() {
                let text = std::str::from_utf8(line).map_err(|_| "is not UTF-8".to_owned());
                let read = text.and_then(|text| read_outcome(text, &body));
                take(read.map_err(|why| ApiError::Form(format!("line {}: {why}", index + 1))));
            }
        }
    } else {
        let read: OutcomesIn<'_> = serde_json::from_slice(&body).map_err(|error| {
            ApiError::Json(format!("the body is not JSON of the form {{\"outcomes\":[{{\"id\":…,\"reply\":{{…}}}}]}}: {error}"))
        })?;
        for (index, raw) in read.outcomes.into_iter().enumerate() {
            take(read_outcome(raw.get(), &body).map_err(|why| ApiError::Form(format!("outcome {index}: {why}"))));
        }
    }
    let mut heard = desk.answer(answers).into_iter();
    let mut all = true;
    let mut out = b"{\"results\":[".to_vec();
    for (index, entry) in entries.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        let failed = match entry {
            Ok(id) => {
                json::put(&mut out, format_args!("{{\"id\":\"{id}\","));
                match heard.next().unwrap_or(Heard::Unknown) {
                    Heard::Taken => {
                        out.extend_from_slice(b"\"status\":200}");
                        continue;
                    }
                    Heard::Late => ApiError::LeaseEnded(id),
                    Heard::Unknown => ApiError::UnknownDelivery(id),
                }
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

/// Whether the body is an outcome a line.
fn is_lines(parts: &Parts) -> bool {
    let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    paths::is_lines(kind.split(';').next().unwrap_or_default().trim())
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

fn read_outcome(text: &str, buffer: &Bytes) -> Result<Answer, String> {
    let read: OutcomeIn<'_> = serde_json::from_str(text).map_err(|error| error.to_string())?;
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
        read_outcome(std::str::from_utf8(&buffer).unwrap(), &buffer)
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
}
