//! Records as JSON, a line each: what `tail -o json` prints and `produce --json` takes. It is the form of the sidecar's HTTP API, so what one
//! wrote the other reads.
//!
//! Invariant: what was written and is read again has the same key, value, headers, time and identity, to the byte. JSON is kept as it was written,
//! and where that would not come back the same, it is told as text.

use std::borrow::Cow;

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD},
};
use mesh_proto::v1;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;

const CONTENT_TYPE: &str = "content-type";
const MESH_ID: &str = "mesh-id";
const MESH_PREFIX: &str = "mesh-";

/// What bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decoded<'a> {
    /// JSON.
    Json(&'a str),
    /// Text.
    Text(&'a str),
    /// Anything else.
    Binary,
}

/// What a value is, by its content type, and by itself where that does not tell.
pub(crate) fn decode<'a>(content_type: Option<&str>, bytes: &'a [u8]) -> Decoded<'a> {
    let essence = content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if is_binary(&essence) {
        return Decoded::Binary;
    }
    match std::str::from_utf8(bytes) {
        Err(_) => Decoded::Binary,
        Ok(text) if !essence.starts_with("text/") && is_json(text) => Decoded::Json(text),
        Ok(text) => Decoded::Text(text),
    }
}

fn is_binary(essence: &str) -> bool {
    const TYPES: [&str; 12] = [
        "application/octet-stream",
        "application/protobuf",
        "application/x-protobuf",
        "application/vnd.google.protobuf",
        "application/avro",
        "application/x-avro",
        "application/cbor",
        "application/msgpack",
        "application/x-msgpack",
        "application/zip",
        "application/gzip",
        "application/pdf",
    ];
    TYPES.contains(&essence)
        || essence.starts_with("application/grpc")
        || ["image/", "audio/", "video/", "font/"].iter().any(|kind| essence.starts_with(kind) && !essence.ends_with("+xml"))
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// The last header of a name, as text.
pub(crate) fn header<'a>(record: &'a v1::Record, name: &str) -> Option<&'a str> {
    let value = record.headers.iter().rev().find(|header| header.name == name)?.value.as_deref()?;
    std::str::from_utf8(value).ok()
}

/// The media type of a record's value.
pub(crate) fn content_type(record: &v1::Record) -> Option<&str> {
    header(record, CONTENT_TYPE)
}

/// A record as a JSON object on one line, without a line break.
pub(crate) fn write(position: &v1::Position, record: &v1::Record) -> String {
    let mut out = format!("{{\"topic\":{},\"partition\":{},\"offset\":{}", quote(&position.topic), position.partition, position.offset);
    if let Some(time) = record.timestamp_ms {
        out += &format!(",\"timestamp\":{time}");
    }
    out += ",\"key\":";
    // A key is looked for as text, whatever it looks like.
    put(&mut out, record.key.as_deref(), Some("text/plain"));
    out += ",\"value\":";
    put(&mut out, record.value.as_deref(), content_type(record));
    for (name, member) in [(CONTENT_TYPE, "content_type"), (MESH_ID, "mesh_id")] {
        if let Some(text) = header(record, name) {
            out += &format!(",\"{member}\":{}", quote(text));
        }
    }
    let is_own = |header: &v1::Header| header.name.starts_with(MESH_PREFIX);
    let told_above = |header: &v1::Header| header.name == CONTENT_TYPE && content_type(record).is_some();
    let headers = record.headers.iter().filter(|header| !is_own(header) && !told_above(header)).map(|header| {
        let mut one = format!("{{\"name\":{},\"value\":", quote(&header.name));
        put(&mut one, header.value.as_deref(), Some("text/plain"));
        one + "}"
    });
    out += &format!(",\"headers\":[{}]", headers.collect::<Vec<_>>().join(","));
    let own = record.headers.iter().filter(|header| is_own(header) && header.name != MESH_ID).map(|header| {
        let value = header.value.as_deref().map_or_else(|| "null".to_owned(), |value| quote(&String::from_utf8_lossy(value)));
        format!("{}:{value}", quote(&header.name))
    });
    let own: Vec<String> = own.collect();
    if !own.is_empty() {
        out += &format!(",\"mesh\":{{{}}}", own.join(","));
    }
    out + "}"
}

fn put(out: &mut String, bytes: Option<&[u8]>, content_type: Option<&str>) {
    let Some(bytes) = bytes else {
        out.push_str("null");
        return;
    };
    *out += &match decode(content_type, bytes) {
        // A reader takes what is around JSON for nothing, and a line break for the end of the record.
        Decoded::Json(text) if text.trim_ascii().len() == text.len() && !text.contains(['\n', '\r']) => format!("{{\"json\":{text}}}"),
        Decoded::Json(text) | Decoded::Text(text) => format!("{{\"text\":{}}}", quote(text)),
        Decoded::Binary => format!("{{\"base64\":\"{}\"}}", BASE64_STANDARD.encode(bytes)),
    };
}

fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Reads a record, with the topic that it names.
///
/// # Errors
/// What is wrong, for people.
pub(crate) fn read(line: &str) -> Result<(Option<String>, v1::Record), String> {
    let read: RecordIn<'_> = serde_json::from_str(line).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => plain(&error),
        _ => format!("column {}: not JSON: {}", error.column(), plain(&error)),
    })?;
    let value = read.value.ok_or("the field `value` is missing; a null is written as `null`")?;
    let field = |name: &'static str| move |why: String| format!("the field `{name}`: {why}");
    let record = v1::Record {
        key: read.key.map(bytes).transpose().map_err(field("key"))?.flatten().map(Into::into),
        value: bytes(value).map_err(field("value"))?.map(Into::into),
        headers: read.headers.map(headers).transpose().map_err(field("headers"))?.unwrap_or_default(),
        content_type: read.content_type.map(Cow::into_owned).unwrap_or_default(),
        mesh_id: read.mesh_id.map(Cow::into_owned).unwrap_or_default(),
        timestamp_ms: read.timestamp,
    };
    Ok((read.topic.map(Cow::into_owned), record))
}

/// The bytes that JSON stands for; none for `null`.
fn bytes(raw: &RawValue) -> Result<Option<Vec<u8>>, String> {
    let text = raw.get();
    let string = |text: &str| serde_json::from_str::<String>(text).map_err(|error| plain(&error));
    match text.as_bytes().first() {
        Some(b'n') => Ok(None),
        Some(b'"') => string(text).map(|text| Some(text.into_bytes())),
        Some(b'{') => match serde_json::from_str::<Explicit<'_>>(text) {
            Ok(Explicit { text: Some(raw), json: None, base64: None }) => {
                let text =
                    string(raw.get()).map_err(|_| "`text` must be a string; an object of this form is written as {\"json\":…}".to_owned());
                text.map(|text| Some(text.into_bytes()))
            }
            Ok(Explicit { text: None, json: Some(raw), base64: None }) => Ok(Some(raw.get().as_bytes().to_vec())),
            Ok(Explicit { text: None, json: None, base64: Some(raw) }) => {
                let text = string(raw.get()).map_err(|_| "`base64` must be a string".to_owned())?;
                let decoded = BASE64_STANDARD_NO_PAD.decode(text.trim_end_matches('='));
                decoded.map(Some).map_err(|error| format!("is not base64: {error}"))
            }
            // Any other object is a value like any other.
            _ => Ok(Some(text.as_bytes().to_vec())),
        },
        _ => Ok(Some(text.as_bytes().to_vec())),
    }
}

/// Headers: a list of `{"name":…,"value":…}`, or an object.
fn headers(raw: &RawValue) -> Result<Vec<v1::Header>, String> {
    let wrong = |error: serde_json::Error| format!("must be a list of {{\"name\":…,\"value\":…}} or an object: {}", plain(&error));
    let pairs: Vec<(Cow<'_, str>, &RawValue)> = if raw.get().starts_with('{') {
        serde_json::from_str::<Pairs<'_>>(raw.get()).map_err(wrong)?.0
    } else {
        let list: Vec<HeaderIn<'_>> = serde_json::from_str(raw.get()).map_err(wrong)?;
        list.into_iter().map(|header| (header.name, header.value)).collect()
    };
    let read = pairs.into_iter().map(|(name, value)| {
        let value = bytes(value).map_err(|why| format!("`{name}`: {why}"))?;
        Ok(v1::Header { name: name.into_owned(), value: value.map(Into::into) })
    });
    read.collect()
}

/// The error without its place.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rfind(" at line ").map_or_else(|| text.clone(), |at| text[..at].to_owned())
}

/// What a line may have. What tells where the record was, and what the mesh knows of it, is passed over.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordIn<'a> {
    #[serde(borrow, default)]
    topic: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    key: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    value: Option<&'a RawValue>,
    #[serde(borrow, default)]
    headers: Option<&'a RawValue>,
    #[serde(borrow, default)]
    content_type: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    mesh_id: Option<Cow<'a, str>>,
    #[serde(default)]
    timestamp: Option<i64>,
    #[serde(default, rename = "partition")]
    _partition: IgnoredAny,
    #[serde(default, rename = "offset")]
    _offset: IgnoredAny,
    #[serde(default, rename = "mesh")]
    _mesh: IgnoredAny,
    #[serde(default, rename = "hops")]
    _hops: IgnoredAny,
    #[serde(default, rename = "attempt")]
    _attempt: IgnoredAny,
    #[serde(default, rename = "id")]
    _id: IgnoredAny,
    #[serde(default, rename = "lease_ms")]
    _lease: IgnoredAny,
    #[serde(default, rename = "traceparent")]
    _traceparent: IgnoredAny,
}

/// Tells `null` from an absent field.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Explicit<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    text: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    json: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    base64: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderIn<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    value: &'a RawValue,
}

/// An object with its members in order.
struct Pairs<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Pairs<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Pairs<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some((name, value)) = map.next_entry::<Cow<'de, str>, &'de RawValue>()? {
                    pairs.push((name, value));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// JSON without the spaces between its tokens.
pub(crate) fn compact(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let (mut inside, mut escaped) = (false, false);
    for c in json.chars() {
        if inside {
            inside = escaped || c != '"';
            escaped = !escaped && c == '\\';
        } else if c.is_ascii_whitespace() {
            continue;
        } else {
            inside = c == '"';
        }
        out.push(c);
    }
    out
}

/// JSON over several lines, its members in their order and its numbers as they are.
pub(crate) fn pretty(json: &str) -> String {
    let mut out = String::with_capacity(json.len() * 2);
    let (mut depth, mut inside, mut escaped) = (0_usize, false, false);
    let compact = compact(json);
    let mut characters = compact.chars().peekable();
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.push_str(&"  ".repeat(depth));
    };
    while let Some(c) = characters.next() {
        if inside {
            inside = escaped || c != '"';
            escaped = !escaped && c == '\\';
            out.push(c);
            continue;
        }
        match c {
            '{' | '[' => {
                out.push(c);
                if let Some(end) = characters.next_if(|next| matches!(next, '}' | ']')) {
                    out.push(end);
                } else {
                    depth += 1;
                    line(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            '"' => {
                inside = true;
                out.push(c);
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(value: Option<&[u8]>, headers: &[(&str, Option<&[u8]>)]) -> v1::Record {
        let headers =
            headers.iter().map(|(name, value)| v1::Header { name: (*name).to_owned(), value: value.map(|value| value.to_vec().into()) });
        v1::Record {
            key: Some(b"k\"1".to_vec().into()),
            value: value.map(|value| value.to_vec().into()),
            headers: headers.collect(),
            timestamp_ms: Some(9),
            ..v1::Record::default()
        }
    }

    fn place() -> v1::Position {
        v1::Position { topic: "t".into(), partition: 2, offset: 7 }
    }

    #[test]
    fn a_line_has_a_stable_form() {
        let headers: &[(&str, Option<&[u8]>)] = &[
            ("content-type", Some(b"application/json")),
            ("mesh-id", Some(b"id-1")),
            ("source", Some(b"web")),
            ("none", None),
            ("mesh-hops", Some(b"1")),
        ];
        assert_eq!(
            write(&place(), &record(Some(b"{\"n\": 1.0}"), headers)),
            "{\"topic\":\"t\",\"partition\":2,\"offset\":7,\"timestamp\":9,\"key\":{\"text\":\"k\\\"1\"},\"value\":{\"json\":{\"n\": 1.0}},\
             \"content_type\":\"application/json\",\"mesh_id\":\"id-1\",\
             \"headers\":[{\"name\":\"source\",\"value\":{\"text\":\"web\"}},{\"name\":\"none\",\"value\":null}],\"mesh\":{\"mesh-hops\":\"1\"}}"
        );
    }

    #[test]
    fn what_was_written_is_read_to_the_byte() {
        let values: [Option<&[u8]>; 14] = [
            None,
            Some(b""),
            Some(b"null"),
            Some(b"plain"),
            Some(b"\"quoted\""),
            Some(b" {\"a\":1}"),
            Some(b"{\n  \"a\": [1, 2.50, 1e400]\n}"),
            Some(b"{\"text\":\"x\"}"),
            Some(b"{\"base64\":7}"),
            Some(b"{\"a\":1,\"a\":2}"),
            Some(b"123456789012345678901234567890"),
            Some(b"\xff\x00\xfe"),
            Some("a\u{2028}b\u{0}\r\n".as_bytes()),
            Some("{\"ü\":\"\\u00fc\\\\\"}".as_bytes()),
        ];
        for content_type in [None, Some("application/json"), Some("text/plain; charset=utf-8"), Some("application/octet-stream")] {
            for value in values {
                let mut headers: Vec<(&str, Option<&[u8]>)> =
                    vec![("a", Some(&b"\xff"[..])), ("a", Some(&b"{\"json\":1}"[..])), ("b", None), ("c", Some(&b""[..]))];
                headers.extend(content_type.map(|kind| (CONTENT_TYPE, Some(kind.as_bytes()))));
                headers.push((MESH_ID, Some(&b"id"[..])));
                let record = record(value, &headers);
                let line = write(&place(), &record);
                assert!(!line.contains(['\n', '\r']), "{line}");
                let (topic, read) = read(&line).unwrap_or_else(|why| panic!("{why}: {line}"));
                assert_eq!(topic.as_deref(), Some("t"));
                assert_eq!((&read.key, &read.value, read.timestamp_ms), (&record.key, &record.value, Some(9)), "{line}");
                assert_eq!((read.mesh_id.as_str(), read.content_type.as_str()), ("id", content_type.unwrap_or_default()));
                let own: Vec<_> =
                    record.headers.iter().filter(|header| !matches!(&*header.name, CONTENT_TYPE | MESH_ID)).cloned().collect();
                assert_eq!(read.headers, own, "{line}");
            }
        }
    }

    #[test]
    fn plain_forms_are_taken_and_faults_are_named() {
        let value = |line: &str| read(line).map(|(_, record)| record.value.map(|value| String::from_utf8_lossy(&value).into_owned()));
        assert_eq!(value("{\"value\":\"x\"}"), Ok(Some("x".into())));
        assert_eq!(value("{\"value\":{\"a\": 1}}"), Ok(Some("{\"a\": 1}".into())));
        assert_eq!(value("{\"value\":null}"), Ok(None));
        assert_eq!(read("{\"value\":1,\"headers\":{\"a\":\"b\"}}").unwrap().1.headers[0].name, "a");
        for (line, said) in [
            ("", "column 0"),
            ("{\"value\":1", "column 10"),
            ("{\"key\":\"a\"}", "`value` is missing"),
            ("{\"value\":1,\"valeu\":2}", "valeu"),
            ("{\"value\":{\"base64\":\"%\"}}", "not base64"),
            ("{\"value\":1,\"headers\":3}", "the field `headers`"),
            ("[1]", "expected"),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }

    #[test]
    fn values_are_told_by_their_type() {
        assert_eq!(decode(None, b"1"), Decoded::Json("1"));
        assert_eq!(decode(Some("text/plain"), b"1"), Decoded::Text("1"));
        assert_eq!(decode(Some("application/json"), b"{"), Decoded::Text("{"));
        assert_eq!(decode(Some("image/png"), b"1"), Decoded::Binary);
        assert_eq!(decode(Some("image/svg+xml"), b"<a/>"), Decoded::Text("<a/>"));
        assert_eq!(decode(Some("Application/Octet-Stream; a=b"), b"1"), Decoded::Binary);
        assert_eq!(decode(None, b"\xff"), Decoded::Binary);
    }

    #[test]
    fn json_is_laid_out_and_nothing_else_changes() {
        let json = "{ \"b\" : [1.50, {}, [ ], \"a, \\\" {b}\"],\n\"a\":null }";
        assert_eq!(compact(json), "{\"b\":[1.50,{},[],\"a, \\\" {b}\"],\"a\":null}");
        assert_eq!(pretty(json), "{\n  \"b\": [\n    1.50,\n    {},\n    [],\n    \"a, \\\" {b}\"\n  ],\n  \"a\": null\n}");
    }
}
