//! `POST /v1/routes/{route}/outcomes`: what a service that polls says to its deliveries, as `{"outcomes":[…]}` or an outcome a line.
//!
//! Invariant: every outcome of the request has one result, in order, and a bad one keeps no other back.
//! Invariant: outcomes reach the route's loop in the order of the request, so replies of one lane leave in that order.

use axum::body::Body;
use bytes::Bytes;
use http::{Response, StatusCode, header, request::Parts};
use hyper::body::Incoming;

use super::{Api, batch, paths, problem::ApiError, pull};
use crate::{
    deliver::{
        desk::Heard,
        forms::{self, Said},
    },
    json,
    outcome::Answer,
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
        let read = forms::split_outcomes(&body).map_err(|why| ApiError::Json(format!("the body is {why}")))?;
        for (index, raw) in read.into_iter().enumerate() {
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

fn read_outcome(text: &str, buffer: &Bytes) -> Result<Answer, String> {
    let Said { id, outcome, bare } = forms::read_outcome(text, buffer)?;
    if bare {
        return Err("says nothing: needs one of `reply`, `ignore`, `retry` and `reject`, or `status`, `value` or `records`".to_owned());
    }
    Ok(Answer { id, outcome: outcome? })
}
