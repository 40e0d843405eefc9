//! Deliveries and outcomes in JSON, the same where they are pulled and where a batch is pushed.
//!
//! An outcome says one of `reply`, `ignore`, `retry` and `reject`, or it stands for an HTTP answer: `status`, and the fields of a record or
//! `records`. What a delivery told (`topic`, `offset`, …) may stand in it, so that a service can answer with the entry that it got, changed.
//!
//! Invariant: an outcome that cannot be read costs its own record an attempt, and no other.

use std::{borrow::Cow, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_json::value::RawValue;

use crate::{
    json::{self, ReadError},
    outcome::{Delivery, Outcome, Reply, ReplyRecord},
    record::{Draft, Record, clip},
};

/// Appends what a delivery has beside its record: members of an object, each with a comma behind it.
pub(crate) fn write_delivery(out: &mut Vec<u8>, delivery: &Delivery) {
    // A string, since JSON's numbers end at 2^53 in many languages.
    json::put(out, format_args!("\"id\":\"{}\",\"attempt\":{},\"hops\":{},", delivery.id, delivery.attempt, delivery.hops));
    if !delivery.traceparent.is_empty() {
        out.extend_from_slice(b"\"traceparent\":");
        json::write_string(out, &String::from_utf8_lossy(&delivery.traceparent));
        out.push(b',');
    }
}

/// The outcomes of a body `{"outcomes":[…]}`, not read yet.
///
/// # Errors
/// What is wrong, for people.
pub(crate) fn split_outcomes(body: &[u8]) -> Result<Vec<&RawValue>, String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outcomes<'a> {
        #[serde(borrow)]
        outcomes: Vec<&'a RawValue>,
    }
    let read: Result<Outcomes<'_>, _> = serde_json::from_slice(body);
    read.map(|read| read.outcomes)
        .map_err(|error| format!("not JSON of the form {{\"outcomes\":[{{\"id\":…,\"status\":…,\"value\":…}}]}}: {error}"))
}

/// What was said to one delivery.
#[derive(Debug)]
pub(crate) struct Said {
    /// The delivery.
    pub(crate) id: u64,
    /// The outcome, or why it cannot be read.
    pub(crate) outcome: Result<Outcome, String>,
    /// It says nothing but whose it is: an empty 200, where that is enough.
    pub(crate) bare: bool,
}

/// Reads an outcome. `buffer` holds `text`: values are slices of it where they can be.
///
/// # Errors
/// If it does not say which delivery it is about; what is wrong, for people.
pub(crate) fn read_outcome(text: &str, buffer: &Bytes) -> Result<Said, String> {
    match serde_json::from_str::<OutcomeIn<'_>>(text) {
        Ok(read) => {
            let id = read.id.number()?;
            let bare = !read.is_answer() && read.reply.is_none() && read.ignore.is_none() && read.retry.is_none() && read.reject.is_none();
            Ok(Said { id, outcome: outcome(read, buffer), bare })
        }
        Err(error) => {
            let only: OnlyId<'_> = serde_json::from_str(text).map_err(|_| error.to_string())?;
            Ok(Said { id: only.id.number()?, outcome: Err(error.to_string()), bare: false })
        }
    }
}

#[derive(Deserialize)]
struct OnlyId<'a> {
    #[serde(borrow)]
    id: Id<'a>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OutcomeIn<'a> {
    #[serde(borrow)]
    id: Id<'a>,
    #[serde(borrow, default)]
    reply: Option<ReplyIn<'a>>,
    #[serde(default)]
    ignore: Option<IgnoreIn>,
    #[serde(default)]
    retry: Option<RetryIn>,
    #[serde(default)]
    reject: Option<RejectIn>,
    #[serde(default)]
    status: Option<u16>,
    #[serde(borrow, default)]
    records: Option<Vec<&'a RawValue>>,
    #[serde(borrow, default)]
    key: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    value: Option<&'a RawValue>,
    #[serde(borrow, default)]
    headers: Option<&'a RawValue>,
    #[serde(borrow, default)]
    content_type: Option<Cow<'a, str>>,
    #[serde(default)]
    retry_after: Option<f64>,
    #[serde(default, rename = "topic")]
    _topic: IgnoredAny,
    #[serde(default, rename = "partition")]
    _partition: IgnoredAny,
    #[serde(default, rename = "offset")]
    _offset: IgnoredAny,
    #[serde(default, rename = "timestamp")]
    _timestamp: IgnoredAny,
    #[serde(default, rename = "mesh_id")]
    _mesh_id: IgnoredAny,
    #[serde(default, rename = "mesh")]
    _mesh: IgnoredAny,
    #[serde(default, rename = "hops")]
    _hops: IgnoredAny,
    #[serde(default, rename = "attempt")]
    _attempt: IgnoredAny,
    #[serde(default, rename = "lease_ms")]
    _lease: IgnoredAny,
    #[serde(default, rename = "traceparent")]
    _traceparent: IgnoredAny,
}

impl OutcomeIn<'_> {
    /// Whether it says something that only an answer has.
    fn is_answer(&self) -> bool {
        self.status.is_some() || self.records.is_some() || self.value.is_some() || self.retry_after.is_some()
    }
}

/// Tells `null` from an absent field.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Id<'a> {
    Number(u64),
    Text(#[serde(borrow)] Cow<'a, str>),
}

impl Id<'_> {
    fn number(&self) -> Result<u64, String> {
        match self {
            Id::Number(id) => Ok(*id),
            Id::Text(text) => text.parse().map_err(|_| format!("the field `id` is `{}`, which no delivery has", clip(text))),
        }
    }
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

fn outcome(read: OutcomeIn<'_>, buffer: &Bytes) -> Result<Outcome, String> {
    match (&read.reply, &read.ignore, &read.retry, &read.reject) {
        (None, None, None, None) => return answer(read, buffer),
        _ if read.is_answer() => {}
        (Some(_), None, None, None) | (None, Some(_), None, None) | (None, None, Some(_), None) | (None, None, None, Some(_)) => {
            return said(read, buffer);
        }
        _ => {}
    }
    Err("says more than one of `reply`, `ignore`, `retry`, `reject`, and `status`, `value` and `records`".to_owned())
}

fn said(read: OutcomeIn<'_>, buffer: &Bytes) -> Result<Outcome, String> {
    if let Some(reply) = read.reply {
        let records = records(&reply.records, buffer).map_err(|why| format!("the field `reply.{why}"))?;
        return self::reply(reply.status, "reply.status", records, None);
    }
    Ok(match (read.retry, read.reject) {
        (Some(retry), _) => {
            Outcome::Retry { reason: retry.reason, after: (retry.after_ms > 0).then(|| Duration::from_millis(retry.after_ms)) }
        }
        (None, Some(reject)) => Outcome::Reject { reason: reject.reason },
        (None, None) => Outcome::Ignore,
    })
}

/// The outcome that stands for an HTTP answer.
fn answer(read: OutcomeIn<'_>, buffer: &Bytes) -> Result<Outcome, String> {
    let records = match (read.records, read.value) {
        (Some(_), Some(_)) => return Err("has `value` and `records`; say one of them".to_owned()),
        (Some(list), None) => records(&list, buffer).map_err(|why| format!("the field `{why}"))?,
        (None, Some(value)) => {
            let record = json::read_parts(read.key, value, read.headers, buffer)?;
            vec![reply_record(record, read.content_type.map(|text| Bytes::from(text.into_owned())))]
        }
        (None, None) => Vec::new(),
    };
    let retry_after = match read.retry_after.map(Duration::try_from_secs_f64) {
        None => None,
        Some(Ok(wish)) => Some(wish),
        Some(Err(_)) => return Err("the field `retry_after` is no number of seconds".to_owned()),
    };
    reply(read.status, "status", records, retry_after)
}

fn records(list: &[&RawValue], buffer: &Bytes) -> Result<Vec<ReplyRecord>, String> {
    let read = |(index, raw): (usize, &&RawValue)| match json::read_record(raw.get(), buffer) {
        Ok(Draft { record, content_type, .. }) => Ok(reply_record(record, content_type)),
        Err(ReadError::Form(why) | ReadError::Syntax { why, .. }) => Err(format!("records[{index}]`: {why}")),
    };
    list.iter().enumerate().map(read).collect()
}

fn reply_record(record: Record, content_type: Option<Bytes>) -> ReplyRecord {
    ReplyRecord { key: record.key, value: record.value, content_type, headers: record.headers }
}

fn reply(status: Option<u16>, field: &str, records: Vec<ReplyRecord>, retry_after: Option<Duration>) -> Result<Outcome, String> {
    let status = match status {
        None => 200,
        Some(status @ 100..=599) => status,
        Some(status) => return Err(format!("the field `{field}` is {status}; use 100 to 599")),
    };
    // `when` looks at the first record's value, as it looks at an HTTP answer's body.
    let body = records.first().and_then(|record| record.value.clone());
    Ok(Outcome::Reply(Reply { status, records, body, retry_after }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Header;

    fn said(text: &str) -> Result<Said, String> {
        let buffer = Bytes::copy_from_slice(text.as_bytes());
        read_outcome(std::str::from_utf8(&buffer).unwrap(), &buffer)
    }

    fn read(text: &str) -> Result<(u64, Outcome), String> {
        said(text).and_then(|said| said.outcome.map(|outcome| (said.id, outcome)))
    }

    #[test]
    fn outcomes_are_read() {
        let (id, reply) =
            read(r#"{"id":"7","reply":{"status":202,"records":[{"key":"k","value":{"a":1},"content_type":"x/y"}]}}"#).unwrap();
        let Outcome::Reply(Reply { status: 202, records, body, .. }) = reply else { panic!() };
        assert_eq!((id, &records[0].key.as_deref(), &body.as_deref()), (7, &Some(&b"k"[..]), &Some(&br#"{"a":1}"#[..])));
        assert_eq!(records[0].content_type.as_deref(), Some(&b"x/y"[..]));
        assert!(matches!(read(r#"{"id":7,"reply":{}}"#).unwrap().1, Outcome::Reply(Reply { status: 200, body: None, .. })));
        assert_eq!(read(r#"{"id":7,"ignore":{"reason":"x"}}"#).unwrap().1, Outcome::Ignore);
        let retry = Outcome::Retry { reason: "busy".to_owned(), after: Some(Duration::from_millis(5)) };
        assert_eq!(read(r#"{"id":7,"retry":{"reason":"busy","after_ms":5}}"#).unwrap().1, retry);
        assert_eq!(read(r#"{"id":7,"reject":{}}"#).unwrap().1, Outcome::Reject { reason: String::new() });
        for bad in [
            r#"{"id":7,"ignore":{},"retry":{}}"#,
            r#"{"id":7,"ignore":{},"status":200}"#,
            r#"{"id":7,"value":1,"records":[]}"#,
            r#"{"id":7,"retry_after":-1}"#,
            r#"{"id":7,"rply":{}}"#,
            r#"{"id":"x","ignore":{}}"#,
            r#"{"id":-1,"ignore":{}}"#,
            r#"{"ignore":{}}"#,
            r#"{"id":7,"status":700}"#,
            r#"{"id":7,"reply":{"status":700}}"#,
            r#"{"id":7,"reply":{"records":[{}]}}"#,
            r#"{"id":7,"reply":{"to":"elsewhere"}}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        // One that cannot be read still says whose it is.
        let odd = said(r#"{"id":"7","status":"fine"}"#).unwrap();
        assert!(odd.id == 7 && odd.outcome.is_err());
    }

    #[test]
    fn an_outcome_may_stand_for_an_http_answer() {
        let reply = |text: &str| match read(text).unwrap().1 {
            Outcome::Reply(reply) => reply,
            other => panic!("{other:?}"),
        };
        let one = reply(
            r#"{"id":1,"topic":"t","partition":0,"offset":3,"attempt":1,"hops":0,"mesh":{},"mesh_id":"x","timestamp":1,"status":201,
                "key":{"text":"k"},"value":{"json":{"a":1}},"headers":[{"name":"h","value":"1"}],"content_type":"application/json"}"#,
        );
        let record = ReplyRecord {
            key: Some("k".into()),
            value: Some(r#"{"a":1}"#.into()),
            content_type: Some("application/json".into()),
            headers: vec![Header::new("h", "1")],
        };
        assert_eq!((one.status, one.body, one.records), (201, record.value.clone(), vec![record]));
        assert!(reply(r#"{"id":1}"#).records.is_empty(), "an empty 200");
        assert_eq!(reply(r#"{"id":1,"value":null}"#).records, [ReplyRecord::default()], "a null value");
        assert_eq!(reply(r#"{"id":1,"records":[{"value":1},{"value":2}]}"#).records.len(), 2);
        let busy = reply(r#"{"id":1,"status":429,"retry_after":1.5}"#);
        assert_eq!((busy.status, busy.retry_after), (429, Some(Duration::from_millis(1500))));
    }
}
