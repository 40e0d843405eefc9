//! The HTTP paths, and publishing one record.

use std::{borrow::Cow, time::Duration};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, Request, Response, header, request::Parts};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;

use super::{Api, batch, fields, follow, lines::Lines, outcomes, problem::ApiError, pull};
use crate::{
    json,
    publish::{Caller, Draft, PublishError, Published, TraceHeaders},
    record::Record,
};

pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The description of all this.
const OPENAPI: &[u8] = include_bytes!("openapi.json");
/// How long a peer may pause within a body.
pub(super) const BODY_PAUSE: Duration = Duration::from_secs(30);
/// How much of a refused body is read and thrown away, so that its sender comes to read the answer.
const DISCARD_BYTES: u64 = 64 * 1024 * 1024;
/// How long that may take.
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// Answers a request that is not gRPC.
pub(super) async fn answer(api: &Api, request: Request<Incoming>) -> Response<Body> {
    let (parts, mut body) = request.into_parts();
    match route(api, &parts, &mut body).await {
        Ok(Answer::Whole(response)) => response,
        Ok(Answer::Lines(lines)) => lines.answer(&parts, body).await,
        Err(error) => {
            // A peer that waits for `100 continue` has not begun to send.
            if !body.is_end_stream() && !parts.headers.contains_key(header::EXPECT) {
                discard(&mut body).await;
            }
            error.response(fields::trace(&parts.headers).traceparent.as_ref())
        }
    }
}

/// What a request comes to.
enum Answer {
    Whole(Response<Body>),
    /// Lines to publish, which need the body for themselves.
    Lines(Box<Lines>),
}

impl From<Response<Body>> for Answer {
    fn from(response: Response<Body>) -> Self {
        Self::Whole(response)
    }
}

async fn route(api: &Api, parts: &Parts, body: &mut Incoming) -> Result<Answer, ApiError> {
    let path = parts.uri.path();
    // A page in somebody's browser could publish by a plain form; only a request that needs the page's consent first carries a token.
    if parts.headers.contains_key(header::ORIGIN) && !parts.headers.contains_key(header::AUTHORIZATION) {
        return Err(ApiError::CrossOrigin);
    }
    if let Some(topic) = between(path, "/v1/topics/", "/records") {
        return match parts.method {
            Method::POST => publish(api, topic, parts, body).await,
            Method::GET => follow::get(api, &decoded(topic), parts).await.map(Into::into),
            _ => Err(wrong_method(parts, "GET, POST")),
        };
    }
    if let Some(name) = between(path, "/v1/routes/", "/records") {
        return match parts.method {
            Method::GET => pull::take(api, &decoded(name), parts).await.map(Into::into),
            _ => Err(wrong_method(parts, "GET")),
        };
    }
    if let Some(name) = between(path, "/v1/routes/", "/outcomes") {
        return match parts.method {
            Method::POST => outcomes::answer(api, &decoded(name), parts, body).await.map(Into::into),
            _ => Err(wrong_method(parts, "POST")),
        };
    }
    if path == "/openapi.json" {
        return match parts.method {
            Method::GET | Method::HEAD => Ok(json_response(Bytes::from_static(OPENAPI)).into()),
            _ => Err(wrong_method(parts, "GET, HEAD")),
        };
    }
    Err(ApiError::UnknownPath(crate::record::clip(path)))
}

/// The one segment between the two.
fn between<'a>(path: &'a str, begin: &str, end: &str) -> Option<&'a str> {
    path.strip_prefix(begin)?.strip_suffix(end).filter(|segment| !segment.contains('/'))
}

fn wrong_method(parts: &Parts, allow: &'static str) -> ApiError {
    ApiError::Method { path: crate::record::clip(parts.uri.path()), method: parts.method.to_string(), allow }
}

/// A path's segment, decoded.
fn decoded(segment: &str) -> Cow<'_, str> {
    // What is not UTF-8 becomes a replacement character, which no topic name allows.
    if segment.contains('%') { percent_decode_str(segment).decode_utf8_lossy() } else { Cow::Borrowed(segment) }
}

/// Who calls.
pub(super) fn caller(api: &Api, headers: &HeaderMap) -> Result<Caller, ApiError> {
    api.inner.callers.identify(fields::optional(headers, fields::MESH_SERVICE)?, fields::authorization(headers))
}

async fn publish(api: &Api, topic: &str, parts: &Parts, body: &mut Incoming) -> Result<Answer, ApiError> {
    let publisher = &api.inner.publisher;
    let caller = caller(api, &parts.headers)?;
    if let Some(coding) = parts.headers.get(header::CONTENT_ENCODING)
        && coding != "identity"
    {
        return Err(ApiError::MediaType("a body with a `content-encoding` is not taken".to_owned()));
    }
    let form = media_form(parts)?;
    let read = fields::Fields::read(&parts.headers)?;
    let topic = publisher.topic(caller, &decoded(topic)).await?;
    let trace = fields::trace(&parts.headers);
    let content_type = match form {
        Form::Raw(content_type) => content_type,
        Form::Document { values } => {
            batch::check(&read)?;
            return batch::publish(api, &topic, &read, &trace, values, body).await.map(Into::into);
        }
        Form::Lines { values } => {
            batch::check(&read)?;
            return Ok(Answer::Lines(Box::new(Lines::new(api, topic, read, trace, values))));
        }
    };
    let value = if read.tombstone {
        match body.is_end_stream() || read_body(body, 0).await.is_ok_and(|body| body.is_empty()) {
            true => None,
            false => return Err(ApiError::TombstoneWithBody),
        }
    } else {
        match read_body(body, publisher.config().limits.record_bytes).await? {
            value if value.is_empty() => return Err(ApiError::NoBody),
            value => Some(value),
        }
    };
    let record = Record { key: read.key, value, headers: read.headers, timestamp_ms: read.timestamp_ms };
    let draft = Draft { record, mesh_id: read.mesh_id, content_type };
    let published = publisher.publish(&topic, vec![draft], &trace).await;
    one(published, &trace).map(Into::into)
}

/// The answer to one record.
fn one(published: Vec<Published>, trace: &TraceHeaders) -> Result<Response<Body>, ApiError> {
    let Some(Published { mesh_id, result }) = published.into_iter().next() else {
        return Err(PublishError::Broken { detail: "no result for the record".to_owned() }.into());
    };
    match result {
        Ok(position) => {
            let mut out = Vec::with_capacity(160);
            out.push(b'{');
            write_position(&mut out, &position, &mesh_id);
            out.push(b'}');
            Ok(json_response(out))
        }
        Err(error) => Ok(ApiError::from(error).response(trace.traceparent.as_ref())),
    }
}

/// Appends where a record is stored, and its identity.
pub(super) fn write_position(out: &mut Vec<u8>, position: &crate::record::Position, mesh_id: &[u8]) {
    out.extend_from_slice(b"\"topic\":");
    json::write_string(out, &position.partition.topic);
    json::put(out, format_args!(",\"partition\":{},\"offset\":{},\"mesh_id\":", position.partition.partition, position.offset));
    json::write_string(out, &String::from_utf8_lossy(mesh_id));
}

/// A 200 with JSON.
pub(super) fn json_response(body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::from(body.into()));
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
}

/// The form of a body that is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The body is the value of one record, of this media type.
    Raw(Option<Bytes>),
    /// `{"records":[…]}`, or a JSON array of values.
    Document {
        /// It is the latter.
        values: bool,
    },
    /// A record a line, or a value a line.
    Lines {
        /// It is the latter.
        values: bool,
    },
}

fn media_form(parts: &Parts) -> Result<Form, ApiError> {
    let mut values = false;
    for pair in parts.uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        match pair {
            "form=value" => values = true,
            "form=record" => values = false,
            _ => {
                return Err(ApiError::Query { name: "form", reason: "is the only parameter here, and is `record` or `value`".to_owned() });
            }
        }
    }
    let Some(value) = parts.headers.get(header::CONTENT_TYPE) else { return Ok(Form::Raw(None)) };
    let text = fields::text(&header::CONTENT_TYPE, value)?;
    let essence = text.split(';').next().unwrap_or_default().trim();
    let is = |name: &str| essence.eq_ignore_ascii_case(name);
    if is("application/vnd.mesh.records+json") {
        return Ok(Form::Document { values: false });
    }
    if is_lines(essence) {
        return Ok(Form::Lines { values });
    }
    if values && is("application/json") {
        return Ok(Form::Document { values: true });
    }
    // What curl says of any body that it is not told the type of.
    if is("application/x-www-form-urlencoded") {
        return Ok(Form::Raw(None));
    }
    let begins = |prefix: &str| essence.get(..prefix.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(prefix));
    if begins("multipart/") || begins("application/vnd.mesh.") {
        return Err(ApiError::MediaType(format!("a body of the type `{essence}` is not taken")));
    }
    match essence.split_once('/') {
        Some((kind, subtype)) if !kind.is_empty() && !subtype.is_empty() => Ok(Form::Raw(Some(Bytes::copy_from_slice(text.as_bytes())))),
        _ => Err(ApiError::MediaType(format!("`{}` is no media type", crate::record::clip(essence)))),
    }
}

/// Whether a media type says that each line is a JSON text.
pub(super) fn is_lines(essence: &str) -> bool {
    ["application/x-ndjson", "application/ndjson", "application/jsonl"].iter().any(|name| essence.eq_ignore_ascii_case(name))
}

/// Reads a body of at most `limit` bytes. Reads no further than the limit.
pub(super) async fn read_body(body: &mut Incoming, limit: usize) -> Result<Bytes, ApiError> {
    let too_large = || Err(ApiError::BodyTooLarge { limit });
    let hint = body.size_hint();
    if usize::try_from(hint.lower()).is_ok_and(|least| least > limit) {
        return too_large();
    }
    let first = match next_data(body).await? {
        None => return Ok(Bytes::new()),
        Some(first) if first.len() > limit => return too_large(),
        // The common case: one frame, and not a copy.
        Some(first) if body.is_end_stream() => return Ok(first),
        Some(first) => first,
    };
    let expected = hint.exact().and_then(|size| usize::try_from(size).ok()).unwrap_or(first.len() * 2);
    let mut whole = BytesMut::with_capacity(expected.clamp(first.len(), limit));
    whole.extend_from_slice(&first);
    while let Some(data) = next_data(body).await? {
        if whole.len() + data.len() > limit {
            return too_large();
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

/// The next piece of a body; `None` at its end.
async fn next_data(body: &mut Incoming) -> Result<Option<Bytes>, ApiError> {
    next_data_within(body, Some(BODY_PAUSE)).await
}

/// The same with another pause that the peer may make, or any. Cancel-safe.
pub(super) async fn next_data_within(body: &mut Incoming, pause: Option<Duration>) -> Result<Option<Bytes>, ApiError> {
    loop {
        let frame = match pause {
            Some(pause) => tokio::time::timeout(pause, body.frame()).await,
            None => Ok(body.frame().await),
        };
        match frame {
            Err(_) => return Err(ApiError::BodyTimeout),
            Ok(None) => return Ok(None),
            Ok(Some(Err(error))) => return Err(ApiError::BodyBroken(error.to_string())),
            Ok(Some(Ok(frame))) => {
                // Trailers say nothing here.
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

/// Reads the rest of a refused body and keeps nothing: a sender that does not read before it has sent all would see a broken connection
/// in place of the answer.
async fn discard(body: &mut Incoming) {
    let rest = async {
        let mut left = DISCARD_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let read = frame.data_ref().map_or(0, |data| data.len() as u64);
            match left.checked_sub(read) {
                Some(less) => left = less,
                None => return,
            }
        }
    };
    // What is left then is the peer's loss: the answer goes out and the connection closes.
    _ = tokio::time::timeout(DISCARD_TIME, rest).await;
}
