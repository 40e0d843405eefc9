//! A delivery as an HTTP request, and an HTTP answer as an outcome.
//!
//! Invariant: what HTTP cannot carry as it is (names with upper case, binary or repeated values) is carried in `mesh-headers` as well, so the
//! service can see every header.
//! Invariant: an answer cannot name a topic; of its headers only `mesh-key`, `mesh-tombstone` and `mesh-header-*` mean something.

use std::{collections::HashMap, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use bytestring::ByteString;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::Full;
use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, percent_encode};

use crate::{
    json::{self, BatchError, ReadError},
    outcome::{Delivery, Outcome, Reply, ReplyRecord},
    record::{Draft, Header, header as names, percent_decoded},
};

const MESH_TOPIC: HeaderName = HeaderName::from_static("mesh-topic");
const MESH_PARTITION: HeaderName = HeaderName::from_static("mesh-partition");
const MESH_OFFSET: HeaderName = HeaderName::from_static("mesh-offset");
const MESH_TIMESTAMP: HeaderName = HeaderName::from_static("mesh-timestamp");
const MESH_KEY: HeaderName = HeaderName::from_static("mesh-key");
const MESH_KEY_BASE64: HeaderName = HeaderName::from_static("mesh-key-base64");
const MESH_ROUTE: HeaderName = HeaderName::from_static("mesh-route");
const MESH_ATTEMPT: HeaderName = HeaderName::from_static("mesh-attempt");
const MESH_HOPS: HeaderName = HeaderName::from_static("mesh-hops");
const MESH_ID: HeaderName = HeaderName::from_static("mesh-id");
const MESH_HEADERS: HeaderName = HeaderName::from_static("mesh-headers");
const MESH_TOMBSTONE: HeaderName = HeaderName::from_static("mesh-tombstone");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const HEADER_PREFIX: &str = "mesh-header-";
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const IDENTITY: HeaderValue = HeaderValue::from_static("identity");

/// What a header's value does not carry as it is, as in CloudEvents' HTTP binding: controls, space, `"`, `%` itself, and all that is not ASCII.
const VALUE: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

/// The request for a delivery. `uri` is the service's address with the route's handler; `headers` is an empty map, in whose room its headers go.
pub(crate) fn request(delivery: &Delivery, method_uri: Uri, host: Option<&HeaderValue>, mut headers: HeaderMap) -> Request<Full<Bytes>> {
    let record = &delivery.record;
    headers.reserve(18 + record.headers.len());
    if let Some(host) = host {
        headers.insert(header::HOST, host.clone());
    }
    let content_type = match (record.header(names::CONTENT_TYPE), &delivery.route.content_type) {
        (Some(value), _) => HeaderValue::from_maybe_shared(value.clone()).unwrap_or(JSON),
        (None, Some(default)) => HeaderValue::from_str(default).unwrap_or(JSON),
        (None, None) => JSON,
    };
    headers.insert(header::CONTENT_TYPE, content_type);
    headers.insert(header::ACCEPT_ENCODING, IDENTITY);
    // Names of routes and topics are checked: they are valid header values.
    put(&mut headers, MESH_ROUTE, HeaderValue::from_str(&delivery.route.name));
    put(&mut headers, MESH_TOPIC, HeaderValue::from_str(&delivery.position.partition.topic));
    headers.insert(MESH_PARTITION, HeaderValue::from(delivery.position.partition.partition));
    headers.insert(MESH_OFFSET, HeaderValue::from(delivery.position.offset));
    if let Some(timestamp) = record.timestamp_ms {
        headers.insert(MESH_TIMESTAMP, HeaderValue::from(timestamp));
    }
    headers.insert(MESH_ATTEMPT, HeaderValue::from(delivery.attempt));
    headers.insert(MESH_HOPS, HeaderValue::from(delivery.hops));
    put(&mut headers, MESH_ID, HeaderValue::from_maybe_shared(delivery.mesh_id.clone()));
    match record.key.as_ref().map(|key| (key, std::str::from_utf8(key))) {
        Some((key, Ok(text))) if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte)) => {
            put(&mut headers, MESH_KEY, HeaderValue::from_maybe_shared(key.clone()));
        }
        Some((key, Ok(_))) => put(&mut headers, MESH_KEY, HeaderValue::try_from(percent_encode(key, NON_ALPHANUMERIC).to_string())),
        Some((key, Err(_))) => put(&mut headers, MESH_KEY_BASE64, HeaderValue::try_from(STANDARD.encode(key))),
        None => {}
    }
    if record.value.is_none() {
        headers.insert(MESH_TOMBSTONE, HeaderValue::from_static("true"));
    }
    if !delivery.traceparent.is_empty() {
        put(&mut headers, TRACEPARENT, HeaderValue::from_maybe_shared(delivery.traceparent.clone()));
    }
    own_headers(delivery, &mut headers);
    let mut request = Request::new(Full::new(record.value.clone().unwrap_or_default()));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = method_uri;
    *request.headers_mut() = headers;
    request
}

fn put<E>(headers: &mut HeaderMap, name: HeaderName, value: Result<HeaderValue, E>) {
    // A value that HTTP refuses is left out; the record's own headers are in `mesh-headers` all the same.
    if let Ok(value) = value {
        headers.insert(name, value);
    }
}

/// The record's own headers.
fn own_headers(delivery: &Delivery, headers: &mut HeaderMap) {
    let own = &delivery.record.headers;
    let mut not_plain: Vec<&Header> = Vec::new();
    for (index, header) in own.iter().enumerate() {
        let name: &str = &header.name;
        match name {
            names::TRACESTATE => carry(headers, TRACESTATE, header),
            names::BAGGAGE => carry(headers, BAGGAGE, header),
            names::CONTENT_TYPE | names::TRACEPARENT => {}
            _ if name.starts_with(names::MESH_PREFIX) && !name.starts_with(names::DLQ_PREFIX) => {}
            _ => {
                let repeated = own.iter().enumerate().any(|(other, h)| other != index && h.name == header.name);
                let plain = !repeated && !name.bytes().any(|byte| byte.is_ascii_uppercase()) && as_is(headers, header);
                if !plain {
                    not_plain.push(header);
                }
            }
        }
    }
    if !not_plain.is_empty() {
        for header in &not_plain {
            as_is(headers, header);
        }
        let list: Vec<serde_json::Value> = not_plain.iter().map(|header| json_pair(header)).collect();
        let text = serde_json::Value::Array(list).to_string();
        put(headers, MESH_HEADERS, HeaderValue::try_from(percent_encode(text.as_bytes(), VALUE).to_string()));
    }
}

fn carry(headers: &mut HeaderMap, name: HeaderName, header: &Header) {
    if let Some(value) = &header.value {
        put(headers, name, HeaderValue::from_maybe_shared(value.clone()));
    }
}

/// Sets `mesh-header-<name>`; `false` if HTTP cannot carry the header as it is.
fn as_is(headers: &mut HeaderMap, header: &Header) -> bool {
    let Some(value) = &header.value else { return false };
    let text = value.iter().all(|byte| (0x20..0x7f).contains(byte)) && value.first() != Some(&b' ') && value.last() != Some(&b' ');
    let name = HeaderName::try_from([HEADER_PREFIX, &header.name].concat());
    match (name, text) {
        (Ok(name), true) => match HeaderValue::from_maybe_shared(value.clone()) {
            // Of names that HTTP cannot tell apart, the first one: all are in the list.
            Ok(value) => {
                headers.entry(name).or_insert(value);
                true
            }
            Err(_) => false,
        },
        _ => false,
    }
}

/// `[name, "text" | {"base64": "…"} | null]`.
fn json_pair(header: &Header) -> serde_json::Value {
    let value = match header.value.as_ref().map(|value| (value, std::str::from_utf8(value))) {
        None => serde_json::Value::Null,
        Some((_, Ok(text))) => text.into(),
        Some((bytes, Err(_))) => serde_json::json!({ "base64": STANDARD.encode(bytes) }),
    };
    serde_json::json!([&*header.name, value])
}

/// An answer, whole.
pub(crate) fn outcome(status: StatusCode, headers: &HeaderMap, body: Bytes) -> Outcome {
    let retry_after = headers.get(header::RETRY_AFTER).and_then(|value| retry_after(value.as_bytes()));
    let body = Some(body).filter(|body| !body.is_empty());
    let records = match (several(headers), &body) {
        (Some(form), Some(body)) => coded(headers).and_then(|()| read_several(form, body)),
        // An error page is no record, whatever it says of itself.
        _ if !status.is_success() => Ok(one(headers, body.as_ref()).unwrap_or_default().into_iter().collect()),
        _ => coded(headers).and_then(|()| one(headers, body.as_ref())).map(|one| one.into_iter().collect()),
    };
    let records = match records {
        Ok(records) => records,
        Err(why) => return Outcome::Reject { reason: format!("the answer ({}) cannot be read: {why}", status.as_u16()) },
    };
    Outcome::Reply(Reply { status: status.as_u16(), records, body, retry_after })
}

/// Whether the body is what it says: records carry no content-encoding, so an encoded one would be nonsense to whoever reads it.
fn coded(headers: &HeaderMap) -> Result<(), String> {
    match headers.get(header::CONTENT_ENCODING).filter(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        None => Ok(()),
        Some(coding) => Err(format!(
            "content-encoding: {}, though the request accepts identity only",
            crate::record::clip(&String::from_utf8_lossy(coding.as_bytes()))
        )),
    }
}

/// The answer as one record; none if it is empty.
fn one(headers: &HeaderMap, body: Option<&Bytes>) -> Result<Option<ReplyRecord>, String> {
    let tombstone = headers.get(MESH_TOMBSTONE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true"));
    if body.is_none() && !tombstone {
        return Ok(None);
    }
    if body.is_some() && tombstone {
        return Err("it has a body, and `mesh-tombstone: true`, which says that it has none".to_owned());
    }
    Ok(Some(ReplyRecord {
        key: match (headers.get(MESH_KEY), headers.get(MESH_KEY_BASE64)) {
            (Some(_), Some(_)) => return Err("it has both `mesh-key` and `mesh-key-base64`".to_owned()),
            (Some(key), None) => Some(
                percent_decoded(key.as_bytes())
                    .ok_or_else(|| "`mesh-key` is not percent-encoded: a `%` that begins no code is written as `%25`".to_owned())?,
            ),
            (None, Some(key)) => Some(STANDARD.decode(key.as_bytes()).map_err(|_| "`mesh-key-base64` is not base64".to_owned())?.into()),
            (None, None) => None,
        },
        value: body.cloned(),
        content_type: headers.get(header::CONTENT_TYPE).map(|value| Bytes::copy_from_slice(value.as_bytes())),
        headers: headers
            .iter()
            .filter_map(|(name, value)| {
                let name = name.as_str().strip_prefix(HEADER_PREFIX)?;
                Some(Header { name: ByteString::from(name), value: Some(Bytes::copy_from_slice(value.as_bytes())) })
            })
            .collect(),
    }))
}

/// The forms of an answer of several records.
#[derive(Clone, Copy)]
enum Several {
    /// `{"records":[…]}`
    Batch,
    /// One record a line.
    Lines,
}

/// The most records of one answer.
const MOST_RECORDS: usize = 10_000;

fn several(headers: &HeaderMap) -> Option<Several> {
    let content_type = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    match content_type.split(';').next()?.trim() {
        "application/vnd.mesh.records+json" => Some(Several::Batch),
        "application/x-ndjson" => Some(Several::Lines),
        _ => None,
    }
}

fn read_several(form: Several, body: &Bytes) -> Result<Vec<ReplyRecord>, String> {
    let read = |index: usize, text: &str| match json::read_record(text, body) {
        Ok(Draft { record, content_type, .. }) => {
            Ok(ReplyRecord { key: record.key, value: record.value, content_type, headers: record.headers })
        }
        Err(ReadError::Form(why) | ReadError::Syntax { why, .. }) => Err(format!("record {index}: {why}")),
    };
    let records: Vec<ReplyRecord> = match form {
        Several::Batch => {
            let parts = json::split_batch(body, MOST_RECORDS).map_err(|error| match error {
                BatchError::Json(why) => why,
                BatchError::TooMany => format!("more than {MOST_RECORDS} records"),
            })?;
            parts.iter().enumerate().map(|(index, part)| read(index, part.get())).collect::<Result<_, _>>()?
        }
        Several::Lines => {
            let text = std::str::from_utf8(body).map_err(|error| error.to_string())?;
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            lines.enumerate().map(|(index, line)| read(index, line)).collect::<Result<_, _>>()?
        }
    };
    if records.len() > MOST_RECORDS {
        return Err(format!("more than {MOST_RECORDS} records"));
    }
    Ok(records)
}

/// `Retry-After`: seconds, or an HTTP date (then the time from now, by the wall clock).
fn retry_after(value: &[u8]) -> Option<Duration> {
    let text = std::str::from_utf8(value).ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(text).ok()?;
    let now = jiff::Timestamp::now();
    Duration::try_from(date.timestamp().duration_since(now)).ok()
}

/// The URIs of a service, by handler: parsed once.
#[derive(Debug)]
pub(crate) struct Uris {
    base: String,
    parsed: HashMap<String, Uri>,
}

impl Uris {
    /// `base` is empty for the origin form of HTTP/1.1.
    pub(crate) fn new(base: String) -> Self {
        Self { base, parsed: HashMap::new() }
    }

    /// The URI of a handler. A handler that is no URI was refused when the table was checked.
    pub(crate) fn get(&mut self, handler: &str) -> Uri {
        if let Some(uri) = self.parsed.get(handler) {
            return uri.clone();
        }
        let uri = Uri::try_from(format!("{}{handler}", self.base)).unwrap_or_default();
        self.parsed.insert(handler.to_owned(), uri.clone());
        uri
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    fn records(pairs: &[(&'static str, &'static str)], body: &'static str) -> Vec<ReplyRecord> {
        match outcome(StatusCode::OK, &headers(pairs), body.into()) {
            Outcome::Reply(reply) => reply.records,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_answer_may_set_key_headers_and_a_null_value() {
        let one = records(&[("mesh-key", "a%20b"), ("mesh-header-colour", "blue"), ("x-other", "1"), ("content-type", "text/plain")], "v")
            .remove(0);
        assert_eq!((one.key.as_deref(), one.value.as_deref()), (Some(&b"a b"[..]), Some(&b"v"[..])));
        assert_eq!(one.headers, [Header::new("colour", "blue")]);
        assert_eq!(one.content_type.as_deref(), Some(&b"text/plain"[..]));
        let null = records(&[("mesh-tombstone", "true"), ("mesh-key-base64", "/w==")], "").remove(0);
        assert_eq!((null.key.as_deref(), null.value), (Some(&[0xff][..]), None));
        assert!(records(&[], "").is_empty());
    }

    #[test]
    fn an_answer_that_contradicts_itself_is_refused_by_name() {
        for (pairs, body, word) in [
            (vec![("content-encoding", "gzip")], "\u{1f}", "gzip"),
            (vec![("content-encoding", "gzip"), ("content-type", "application/x-ndjson")], "\u{1f}", "gzip"),
            (vec![("mesh-key-base64", "???")], "v", "mesh-key-base64"),
            (vec![("mesh-key", "100%")], "v", "%25"),
            (vec![("mesh-key-base64", "YQ=="), ("mesh-key", "a")], "v", "both"),
            (vec![("mesh-tombstone", "true")], "v", "mesh-tombstone"),
        ] {
            let said = outcome(StatusCode::OK, &headers(&pairs), body.into());
            assert!(matches!(&said, Outcome::Reject { reason } if reason.contains(word)), "{pairs:?}: {said:?}");
            let error = outcome(StatusCode::BAD_GATEWAY, &headers(&pairs[..1]), body.into());
            let page = pairs.len() == 1;
            assert!(!page || matches!(error, Outcome::Reply(Reply { status: 502, .. })), "an error stays what it is: {error:?}");
        }
        assert_eq!(records(&[("content-encoding", "identity")], "v").len(), 1);
    }

    #[test]
    fn an_answer_may_be_several_records() {
        let batch = records(
            &[("content-type", "application/vnd.mesh.records+json")],
            r#"{"records":[{"key":"k","value":{"json":{"a":1}}},{"value":"two","headers":[["h","1"]]}]}"#,
        );
        assert_eq!(batch.len(), 2);
        assert_eq!((batch[0].key.as_deref(), batch[0].value.as_deref()), (Some(&b"k"[..]), Some(&br#"{"a":1}"#[..])));
        assert_eq!((batch[1].value.as_deref(), batch[1].headers.len()), (Some(&b"two"[..]), 1));
        let lines = records(&[("content-type", "application/x-ndjson; charset=utf-8")], "{\"value\":\"one\"}\n\n{\"value\":null}\n");
        assert_eq!((lines[0].value.as_deref(), lines[1].value.as_deref()), (Some(&b"one"[..]), None));
        let broken = outcome(StatusCode::OK, &headers(&[("content-type", "application/x-ndjson")]), "{\"value\":1}\n{".into());
        assert!(matches!(broken, Outcome::Reject { reason } if reason.contains("record 1")), "it names the record");
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(retry_after(b"7"), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(b"soon"), None);
        assert_eq!(retry_after(b"Wed, 21 Oct 2015 07:28:00 GMT"), None, "it is over");
        assert!(retry_after(b"Fri, 01 Jan 2100 00:00:00 GMT").is_some());
    }
}
