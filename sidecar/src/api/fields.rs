//! What a publish request says in its HTTP headers.

use bytes::Bytes;
use bytestring::ByteString;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use percent_encoding::percent_decode;
use serde_json::value::RawValue;

use super::problem::ApiError;
use crate::{
    json,
    publish::TraceHeaders,
    record::{Header, percent_decoded},
};

/// The header that names the calling service.
pub(super) const MESH_SERVICE: &str = "mesh-service";

/// The headers of a publish request.
#[derive(Debug, Default)]
pub(super) struct Fields {
    pub(super) key: Option<Bytes>,
    pub(super) mesh_id: Option<Bytes>,
    pub(super) timestamp_ms: Option<i64>,
    pub(super) tombstone: bool,
    pub(super) headers: Vec<Header>,
}

impl Fields {
    /// Reads them.
    ///
    /// # Errors
    /// [`ApiError::Header`], naming the first header that cannot be taken.
    pub(super) fn read(map: &HeaderMap) -> Result<Self, ApiError> {
        let mut fields = Self::default();
        let mut listed = Vec::new();
        for (name, value) in map {
            let Some(own) = name.as_str().strip_prefix("mesh-") else { continue };
            if let Some(inner) = own.strip_prefix("header-") {
                let value = Bytes::copy_from_slice(text(name, value)?.as_bytes());
                fields.headers.push(Header { name: ByteString::from(inner), value: Some(value) });
                continue;
            }
            match own {
                "service" => {}
                "key" => {
                    let Some(key) = percent_decoded(text(name, value)?.as_bytes()) else {
                        return Err(wrong(name, "is not percent-encoded: write a `%` that begins no code as `%25`"));
                    };
                    if std::str::from_utf8(&key).is_err() {
                        return Err(wrong(name, "is not UTF-8 once decoded; send such a key in `mesh-key-base64`"));
                    }
                    set(&mut fields.key, name, key)?;
                }
                "key-base64" => {
                    let key = json::decode(text(name, value)?).map_err(|_| wrong(name, "is not base64"))?;
                    set(&mut fields.key, name, key)?;
                }
                "id" => set(&mut fields.mesh_id, name, Bytes::copy_from_slice(text(name, value)?.as_bytes()))?,
                "timestamp" => {
                    let time = text(name, value)?.parse().map_err(|_| wrong(name, "is not a number of milliseconds since 1970"))?;
                    fields.timestamp_ms = Some(time);
                }
                "tombstone" => {
                    fields.tombstone = match text(name, value)? {
                        "true" => true,
                        "false" => false,
                        _ => return Err(wrong(name, "must be `true` or `false`")),
                    }
                }
                "headers" => listed.extend(list(name, text(name, value)?)?),
                _ => return Err(wrong(name, "begins with `mesh-` and is none that a publisher may set")),
            }
        }
        // What stands in the list wins: it is the faithful form of the same header.
        fields.headers.retain(|plain| !listed.iter().any(|faithful: &Header| faithful.name.eq_ignore_ascii_case(&plain.name)));
        fields.headers.append(&mut listed);
        Ok(fields)
    }
}

/// `mesh-headers`: a percent-encoded JSON list.
fn list(name: &HeaderName, value: &str) -> Result<Vec<Header>, ApiError> {
    let decoded = percent_decode(value.as_bytes()).decode_utf8().map_err(|_| wrong(name, "is not UTF-8 once decoded"))?;
    let buffer = Bytes::copy_from_slice(decoded.as_bytes());
    let raw: &RawValue =
        serde_json::from_slice(&buffer).map_err(|_| wrong(name, "is not a percent-encoded JSON list of {\"name\":…,\"value\":…}"))?;
    json::read_headers(raw, &buffer).map_err(|_| wrong(name, "is not a percent-encoded JSON list of {\"name\":…,\"value\":…}"))
}

/// The trace context of a request.
pub(super) fn trace(map: &HeaderMap) -> TraceHeaders {
    let get = |name| map.get(name).map(|value: &HeaderValue| Bytes::copy_from_slice(value.as_bytes()));
    let traceparent = get("traceparent");
    // Most requests have none of the three.
    TraceHeaders { tracestate: traceparent.as_ref().and_then(|_| get("tracestate")), traceparent, baggage: get("baggage") }
}

/// A header's value as text.
///
/// # Errors
/// [`ApiError::Header`] if it is not UTF-8.
pub(super) fn text<'a>(name: &HeaderName, value: &'a HeaderValue) -> Result<&'a str, ApiError> {
    std::str::from_utf8(value.as_bytes())
        .map_err(|_| wrong(name, "is not UTF-8; send binary values in `mesh-headers` or `mesh-key-base64`"))
}

/// An optional header as text.
///
/// # Errors
/// [`ApiError::Header`] if it is not UTF-8.
pub(super) fn optional<'a>(map: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, ApiError> {
    match map.get(name) {
        None => Ok(None),
        Some(value) => text(&HeaderName::from_static(name), value).map(Some),
    }
}

/// The content of `authorization`.
pub(super) fn authorization(map: &HeaderMap) -> Option<&[u8]> {
    map.get(header::AUTHORIZATION).map(HeaderValue::as_bytes)
}

fn set(place: &mut Option<Bytes>, name: &HeaderName, value: Bytes) -> Result<(), ApiError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(wrong(name, "stands beside another that says the same")),
    }
}

fn wrong(name: &HeaderName, reason: &'static str) -> ApiError {
    ApiError::Header { name: name.as_str().to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&'static str, &[u8])]) -> Result<Fields, ApiError> {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_bytes(value).unwrap());
        }
        Fields::read(&map)
    }

    #[test]
    fn headers_become_fields() {
        let fields = read(&[
            ("mesh-key", b"a%20b%C3%A9"),
            ("mesh-id", b"i-1"),
            ("mesh-service", b"x"),
            ("mesh-timestamp", b"12"),
            ("mesh-header-x", "ü".as_bytes()),
            ("mesh-header-up", b"lossy"),
            ("mesh-headers", b"%5B%7B%22name%22:%22Up%22,%22value%22:null%7D,{\"name\":\"b\",\"base64\":\"AA==\"}]"),
            ("user-agent", b"\xff"),
        ])
        .unwrap();
        assert_eq!(fields.key.as_deref(), Some("a bé".as_bytes()));
        assert_eq!(fields.mesh_id.as_deref(), Some(&b"i-1"[..]));
        assert_eq!(fields.timestamp_ms, Some(12));
        let names: Vec<_> = fields.headers.iter().map(|field| (&*field.name, field.value.as_deref())).collect();
        assert_eq!(names, [("x", Some("ü".as_bytes())), ("Up", None), ("b", Some(&[0][..]))]);
        assert_eq!(read(&[("mesh-key-base64", b"/w==")]).unwrap().key.as_deref(), Some(&[255][..]));
        assert!(read(&[("mesh-tombstone", b"true")]).unwrap().tombstone);
    }

    #[test]
    fn what_cannot_be_taken_is_named() {
        for (name, value) in [
            ("mesh-key", &b"\xff"[..]),
            ("mesh-key", b"%ff"),
            ("mesh-key", b"%zz"),
            ("mesh-key", b"100%"),
            ("mesh-key", b"a%4"),
            ("mesh-key-base64", b"%"),
            ("mesh-header-x", b"\xff"),
            ("mesh-id", b"\xff"),
            ("mesh-hops", b"1"),
            ("mesh-tombstone", b"yes"),
            ("mesh-timestamp", b"now"),
            ("mesh-headers", b"[1]"),
            ("mesh-headers", b"{"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert!(matches!(&error, ApiError::Header { name: named, .. } if named == name), "{error}");
        }
        assert!(read(&[("mesh-key", b"a"), ("mesh-key-base64", b"AA==")]).is_err());
    }
}
