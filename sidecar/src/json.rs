//! The one form of a record in JSON, for what is published in batches, for answers of several records, and for what is read: what was read
//! can be published as it is. Floor 0.
//!
//! ```json
//! {"topic":"t","partition":0,"offset":7,"timestamp":1760000000000,"key":{"text":"k"},"value":{"json":{"a":1}},
//!  "content_type":"application/json","mesh_id":"…","headers":[{"name":"n","value":{"text":"v"}}],"mesh":{"mesh-hops":"1"}}
//! ```
//! Bytes are `{"text":…}`, `{"json":…}` or `{"base64":…}`. When publishing, a plain string is its text, any other plain JSON is itself,
//! and `null` is a null. Where a record is stored (`topic`, `partition`, `offset`) and what the mesh knows of it (`mesh`, `hops`,
//! `attempt`, `id`) is told and never taken.
//!
//! Invariant: JSON is kept as it was written; nothing is parsed into numbers and written anew.
//! Invariant: no record is too odd to be read: what is not text is base64.

use std::{borrow::Cow, io::Write};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use bytestring::ByteString;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::record::{Draft, Header, Position, Record, header};

/// Reads one record. `buffer` holds `text`: values are slices of it where they can be.
///
/// # Errors
/// What is wrong; names the field.
pub(crate) fn read_record(text: &str, buffer: &Bytes) -> Result<Draft, ReadError> {
    let read: RecordIn<'_> = serde_json::from_str(text).map_err(|error| ReadError::new(&error))?;
    draft(read, buffer).map_err(ReadError::Form)
}

fn draft(read: RecordIn<'_>, buffer: &Bytes) -> Result<Draft, String> {
    let value = read.value.ok_or("the field `value` is missing; a null value is written as `null`")?;
    let record = Record { timestamp_ms: read.timestamp, ..read_parts(read.key, value, read.headers, buffer)? };
    Ok(Draft { record, mesh_id: read.mesh_id.map(owned), content_type: read.content_type.map(owned) })
}

/// Reads the fields `key`, `value` and `headers` of a record.
///
/// # Errors
/// What is wrong, for people; names the field.
pub(crate) fn read_parts(key: Option<&RawValue>, value: &RawValue, headers: Option<&RawValue>, buffer: &Bytes) -> Result<Record, String> {
    Ok(Record {
        key: key.map(|key| datum(key, buffer)).transpose().map_err(|why| format!("the field `key`: {why}"))?.flatten(),
        value: datum(value, buffer).map_err(|why| format!("the field `value`: {why}"))?,
        headers: headers.map(|headers| read_headers(headers, buffer)).transpose()?.unwrap_or_default(),
        timestamp_ms: None,
    })
}

/// Why a text is no record.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// It is not JSON.
    Syntax {
        /// Where, from 1.
        column: usize,
        /// What is wrong, for people.
        why: String,
    },
    /// It is JSON, and no record.
    Form(String),
}

impl ReadError {
    fn new(error: &serde_json::Error) -> Self {
        match error.classify() {
            serde_json::error::Category::Data => Self::Form(plain(error)),
            _ => Self::Syntax { column: error.column(), why: plain(error) },
        }
    }
}

/// Checks that a text is JSON.
///
/// # Errors
/// [`ReadError::Syntax`].
pub(crate) fn check(text: &str) -> Result<(), ReadError> {
    serde_json::from_str::<IgnoredAny>(text).map(drop).map_err(|error| ReadError::new(&error))
}

/// Reads headers: `[{"name":…,"value":…}]` in order, or `["name",value]` in order, or `{"name":value}`. A value may also stand as `"base64":…` or `"text":…` beside the name.
///
/// # Errors
/// What is wrong, for people.
pub(crate) fn read_headers(raw: &RawValue, buffer: &Bytes) -> Result<Vec<Header>, String> {
    let wrong = |error: serde_json::Error| {
        format!("the field `headers` must be a list of {{\"name\":…,\"value\":…}} or an object: {}", plain(&error))
    };
    let text = raw.get();
    let make = |name: Cow<'_, str>, value: Result<Option<Bytes>, String>| match value {
        Ok(value) => Ok(Header { name: ByteString::from(name.into_owned()), value }),
        Err(why) => Err(format!("the header `{name}`: {why}")),
    };
    if text.starts_with('{') {
        let map: Pairs<'_> = serde_json::from_str(text).map_err(wrong)?;
        return map.0.into_iter().map(|(name, value)| make(name, datum(value, buffer))).collect();
    }
    let list: Vec<&RawValue> = serde_json::from_str(text).map_err(wrong)?;
    let read = list.into_iter().map(|element| {
        if element.get().starts_with('[') {
            let (Text(name), value) = serde_json::from_str::<(Text<'_>, &RawValue)>(element.get()).map_err(wrong)?;
            return make(name, datum(value, buffer));
        }
        let field: HeaderIn<'_> = serde_json::from_str(element.get()).map_err(wrong)?;
        let value = match (field.value, field.text, field.base64) {
            (Some(value), None, None) => datum(value, buffer),
            (None, Some(text), None) => Ok(Some(owned(text))),
            (None, None, Some(text)) => decode(&text).map(Some),
            (None, None, None) => Err("has no `value`; a null is written as `null`".to_owned()),
            _ => Err("has its value twice".to_owned()),
        };
        make(field.name, value)
    });
    read.collect()
}

/// The bytes that a JSON value stands for; `None` for `null`.
fn datum(raw: &RawValue, buffer: &Bytes) -> Result<Option<Bytes>, String> {
    let text = raw.get();
    match text.as_bytes().first() {
        Some(b'n') => Ok(None),
        Some(b'"') => string(text).map(Some),
        Some(b'{') => match serde_json::from_str::<Explicit<'_>>(text) {
            Ok(Explicit { text: Some(raw), json: None, base64: None }) => match raw.get().starts_with('"') {
                true => string(raw.get()).map(Some),
                false => Err("`text` must be a string; to publish an object of this form, wrap it in {\"json\":…}".to_owned()),
            },
            Ok(Explicit { text: None, json: Some(raw), base64: None }) => Ok(Some(share(buffer, raw.get()))),
            Ok(Explicit { text: None, json: None, base64: Some(raw) }) => {
                let text: Cow<'_, str> = serde_json::from_str::<Text<'_>>(raw.get()).map_err(|_| "`base64` must be a string".to_owned())?.0;
                decode(&text).map(Some)
            }
            // Any other object is a value like any other.
            _ => Ok(Some(share(buffer, text))),
        },
        _ => Ok(Some(share(buffer, text))),
    }
}

fn string(json: &str) -> Result<Bytes, String> {
    serde_json::from_str::<Text<'_>>(json).map(|text| owned(text.0)).map_err(|error| plain(&error))
}

/// Standard base64, with or without padding.
pub(crate) fn decode(text: &str) -> Result<Bytes, String> {
    base64::engine::general_purpose::STANDARD_NO_PAD
        .decode(text.trim_end_matches('='))
        .map(Bytes::from)
        .map_err(|error| format!("is not base64: {error}"))
}

fn owned(text: Cow<'_, str>) -> Bytes {
    Bytes::from(text.into_owned())
}

/// A slice of the buffer if the text lies within it, else a copy.
fn share(buffer: &Bytes, part: &str) -> Bytes {
    let (whole, begin) = (buffer.as_ptr() as usize, part.as_ptr() as usize);
    match begin.checked_sub(whole) {
        Some(at) if at + part.len() <= buffer.len() => buffer.slice(at..at + part.len()),
        _ => Bytes::copy_from_slice(part.as_bytes()),
    }
}

/// The error without its place, which the caller knows better.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordIn<'a> {
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
    #[serde(default, rename = "topic")]
    _topic: IgnoredAny,
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
    #[serde(borrow, alias = "key")]
    name: Cow<'a, str>,
    #[serde(borrow, default, deserialize_with = "present")]
    value: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    base64: Option<Cow<'a, str>>,
}

/// A string, borrowed where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

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
                while let Some((name, value)) = map.next_entry::<Text<'de>, &'de RawValue>()? {
                    pairs.push((name.0, value));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Splits a body `{"records":[…]}` into its records.
///
/// # Errors
/// What is wrong, for people; names line, column and the index of the record.
pub(crate) fn split_batch(body: &[u8], limit: usize) -> Result<Vec<&RawValue>, BatchError> {
    let seen = std::cell::Cell::new(0);
    let mut reader = serde_json::Deserializer::from_slice(body);
    let records = Envelope { seen: &seen, limit }.read(&mut reader).and_then(|records| reader.end().map(|()| records));
    match records {
        Err(_) if seen.get() > limit => Err(BatchError::TooMany),
        Err(error) => {
            let place = format!("line {}, column {}", error.line(), error.column());
            Err(BatchError::Json(format!(
                "the body is not JSON of the form {{\"records\":[…]}}: {} ({place}, record {})",
                plain(&error),
                seen.get()
            )))
        }
        Ok(None) => Err(BatchError::Json("the body has no field `records`".to_owned())),
        Ok(Some(records)) => Ok(records),
    }
}

/// Why a batch cannot be split.
#[derive(Debug)]
pub(crate) enum BatchError {
    /// It is not JSON, or not of the form.
    Json(String),
    /// It has more records than the limit.
    TooMany,
}

#[derive(Clone, Copy)]
struct Envelope<'c> {
    seen: &'c std::cell::Cell<usize>,
    limit: usize,
}

impl<'c> Envelope<'c> {
    fn read<'de>(
        self,
        reader: &mut serde_json::Deserializer<serde_json::de::SliceRead<'de>>,
    ) -> Result<Option<Vec<&'de RawValue>>, serde_json::Error> {
        reader.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Envelope<'_> {
    type Value = Option<Vec<&'de RawValue>>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut records = None;
        while let Some(name) = map.next_key::<Text<'de>>()? {
            if name.0 != "records" {
                return Err(serde::de::Error::custom(format_args!("unknown field `{}`, expected `records`", crate::record::clip(&name.0))));
            }
            if records.is_some() {
                return Err(serde::de::Error::custom("`records` stands twice"));
            }
            records = Some(map.next_value_seed(List(self))?);
        }
        Ok(records)
    }
}

struct List<'c>(Envelope<'c>);

impl<'de> serde::de::DeserializeSeed<'de> for List<'_> {
    type Value = Vec<&'de RawValue>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List<'_> {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut records = Vec::new();
        while let Some(record) = list.next_element::<&'de RawValue>()? {
            records.push(record);
            self.0.seen.set(records.len());
            if records.len() > self.0.limit {
                return Err(serde::de::Error::custom("too many records"));
            }
        }
        Ok(records)
    }
}

/// Appends a record, without a line break anywhere: the members of an object, without its braces, so that the caller can add its own.
pub(crate) fn write_members(out: &mut Vec<u8>, position: &Position, record: &Record) {
    out.extend_from_slice(b"\"topic\":");
    write_string(out, &position.partition.topic);
    put(out, format_args!(",\"partition\":{},\"offset\":{}", position.partition.partition, position.offset));
    if let Some(time) = record.timestamp_ms {
        put(out, format_args!(",\"timestamp\":{time}"));
    }
    out.extend_from_slice(b",\"key\":");
    write_bytes(out, record.key.as_ref(), false);
    out.extend_from_slice(b",\"value\":");
    write_bytes(out, record.value.as_ref(), true);
    for (name, member) in [(header::CONTENT_TYPE, ",\"content_type\":"), (header::MESH_ID, ",\"mesh_id\":")] {
        if let Some(text) = record.header_str(name) {
            out.extend_from_slice(member.as_bytes());
            write_string(out, text);
        }
    }
    let own = |field: &Header| field.name.starts_with(header::MESH_PREFIX);
    let told_above = |field: &Header| *field.name == *header::CONTENT_TYPE && record.header_str(header::CONTENT_TYPE).is_some();
    out.extend_from_slice(b",\"headers\":[");
    let mut first = true;
    for field in record.headers.iter().filter(|field| !own(field) && !told_above(field)) {
        out.extend_from_slice(if first { b"{\"name\":" } else { b",{\"name\":" });
        first = false;
        write_string(out, &field.name);
        out.extend_from_slice(b",\"value\":");
        write_bytes(out, field.value.as_ref(), false);
        out.push(b'}');
    }
    out.push(b']');
    // The mesh's own headers are told apart, since a publisher cannot set them.
    let mut first = true;
    for field in record.headers.iter().filter(|field| own(field) && *field.name != *header::MESH_ID) {
        out.extend_from_slice(if first { b",\"mesh\":{" } else { b"," });
        first = false;
        write_string(out, &field.name);
        out.push(b':');
        match &field.value {
            Some(value) => write_string(out, &String::from_utf8_lossy(value)),
            None => out.extend_from_slice(b"null"),
        }
    }
    if !first {
        out.push(b'}');
    }
}

fn write_bytes(out: &mut Vec<u8>, bytes: Option<&Bytes>, may_be_json: bool) {
    let Some(bytes) = bytes else {
        out.extend_from_slice(b"null");
        return;
    };
    match std::str::from_utf8(bytes) {
        Ok(text) if may_be_json && check(text).is_ok() => {
            out.extend_from_slice(b"{\"json\":");
            // Line breaks in JSON stand between tokens only, where a space means the same.
            out.extend(text.bytes().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { byte }));
        }
        Ok(text) => {
            out.extend_from_slice(b"{\"text\":");
            write_string(out, text);
        }
        Err(_) => {
            out.extend_from_slice(b"{\"base64\":\"");
            out.extend_from_slice(STANDARD.encode(bytes).as_bytes());
            out.push(b'"');
        }
    }
    out.push(b'}');
}

/// Appends a JSON string.
pub(crate) fn write_string(out: &mut Vec<u8>, text: &str) {
    if text.bytes().all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\') {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
    } else {
        // Writing a string into memory cannot fail.
        out.extend_from_slice(serde_json::Value::from(text).to_string().as_bytes());
    }
}

/// Appends formatted text.
pub(crate) fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing into memory cannot fail.
    _ = out.write_fmt(text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::TopicPartition;

    fn read(text: &str) -> Result<Draft, String> {
        let buffer = Bytes::copy_from_slice(text.as_bytes());
        read_record(std::str::from_utf8(&buffer).unwrap(), &buffer).map_err(|error| format!("{error:?}"))
    }

    fn bytes(text: &str) -> Option<Bytes> {
        Some(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn values_have_plain_and_explicit_forms() {
        for (json, value) in [
            (r#""hi""#, bytes("hi")),
            (r#""a\n\u00e9""#, bytes("a\né")),
            ("null", None),
            ("1.50", bytes("1.50")),
            ("true", bytes("true")),
            (r#"[1, 2]"#, bytes("[1, 2]")),
            (r#"{"a": 1}"#, bytes(r#"{"a": 1}"#)),
            (r#"{"text":"hi"}"#, bytes("hi")),
            (r#"{"json":"hi"}"#, bytes(r#""hi""#)),
            (r#"{"json":null}"#, bytes("null")),
            (r#"{"json":{"text":1}}"#, bytes(r#"{"text":1}"#)),
            (r#"{"base64":"AP8="}"#, Some(Bytes::from_static(&[0, 255]))),
            (r#"{"base64":"AP8"}"#, Some(Bytes::from_static(&[0, 255]))),
            (r#"{"text":"a","b":1}"#, bytes(r#"{"text":"a","b":1}"#)),
            ("{}", bytes("{}")),
        ] {
            assert_eq!(read(&format!(r#"{{"key":{json},"value":{json}}}"#)).unwrap().record.value, value, "{json}");
        }
        assert_eq!(read(r#"{"value":1}"#).unwrap().record.key, None);
        assert!(read(r#"{"key":1}"#).unwrap_err().contains("`value` is missing"));
        assert!(read(r#"{"value":1,"vlaue":2}"#).unwrap_err().contains("vlaue"));
        assert!(read(r#"{"value":{"text":5}}"#).unwrap_err().contains("`value`"));
        assert!(read(r#"{"value":{"base64":"%"}}"#).unwrap_err().contains("base64"));
        assert!(read("[1]").is_err());
    }

    #[test]
    fn headers_are_a_list_or_an_object() {
        let list =
            read(r#"{"value":1,"headers":[{"name":"A","value":"x"},{"key":"A","value":null},{"name":"b","base64":"AA=="},["c",{"base64":"AA"}]]}"#).unwrap();
        let names: Vec<_> = list.record.headers.iter().map(|field| (&*field.name, field.value.clone())).collect();
        assert_eq!(names, [("A", bytes("x")), ("A", None), ("b", Some(Bytes::from_static(&[0]))), ("c", Some(Bytes::from_static(&[0])))]);
        let object = read(r#"{"value":1,"headers":{"z":"1","a":2}}"#).unwrap();
        let names: Vec<_> = object.record.headers.iter().map(|field| (&*field.name, field.value.clone())).collect();
        assert_eq!(names, [("z", bytes("1")), ("a", bytes("2"))]);
        assert!(read(r#"{"value":1,"headers":[{"name":"a"}]}"#).unwrap_err().contains("`a`"));
        assert!(read(r#"{"value":1,"headers":7}"#).unwrap_err().contains("headers"));
    }

    #[test]
    fn what_is_read_can_be_published() {
        let record = Record {
            key: Some(Bytes::from_static(&[255])),
            value: bytes("{\"a\":\r\n 1.0}"),
            headers: vec![
                Header::new("mesh-id", "id-1"),
                Header::new("mesh-hops", "2"),
                Header::new("content-type", "application/json"),
                Header::new("x", "y\"z"),
                Header { name: ByteString::from_static("null"), value: None },
                Header::new("bin", &[0xc3, 0x28][..]),
            ],
            timestamp_ms: Some(5),
        };
        let position = Position { partition: TopicPartition::new("t", 3), offset: 9 };
        let mut out = b"{".to_vec();
        write_members(&mut out, &position, &record);
        out.push(b'}');
        let text = String::from_utf8(out).unwrap();
        assert!(!text.contains(['\n', '\r']));
        assert_eq!(
            text,
            concat!(
                r#"{"topic":"t","partition":3,"offset":9,"timestamp":5,"key":{"base64":"/w=="},"value":{"json":{"a":   1.0}},"#,
                r#""content_type":"application/json","mesh_id":"id-1","headers":[{"name":"x","value":{"text":"y\"z"}},"#,
                r#"{"name":"null","value":null},{"name":"bin","value":{"base64":"wyg="}}],"mesh":{"mesh-hops":"2"}}"#
            )
        );
        let back = read(&text).unwrap();
        assert_eq!(back.record.key, record.key);
        assert_eq!(back.record.value, bytes("{\"a\":   1.0}"));
        assert_eq!(back.record.headers, record.headers[3..]);
        assert_eq!((back.mesh_id, back.content_type, back.record.timestamp_ms), (bytes("id-1"), bytes("application/json"), Some(5)));
    }

    #[test]
    fn broken_batches_name_line_column_and_index() {
        let body = b"{\"records\":[\n {\"value\":1},\n {\"value\":]}";
        let Err(BatchError::Json(why)) = split_batch(body, 10) else { panic!() };
        assert!(why.contains("line 3, column 11") && why.contains("record 1"), "{why}");
        for bad in ["", "[]", "{}", "{\"records\":[]}x", "{\"records\":{}}", "{\"record\":[]}"] {
            assert!(matches!(split_batch(bad.as_bytes(), 10), Err(BatchError::Json(_))), "{bad}");
        }
        assert_eq!(split_batch(b"{\"records\":[1, 2]}", 2).unwrap().len(), 2);
        assert!(matches!(split_batch(b"{\"records\":[1, 2, 3]}", 2), Err(BatchError::TooMany)));
    }
}
