//! What a service answers, and what it remembers of a delivery.

use std::{collections::HashMap, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What a service answers, path by path; the JSON that `tests/python/scenario.py` describes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Scenario {
    /// The rules of each path; the first that fits decides, and without one the request's body comes back with 200.
    pub paths: HashMap<String, Vec<Rule>>,
    /// Keep the headers of each delivery in the ledger.
    pub headers: bool,
    /// Keep the body of each delivery in the ledger.
    pub bodies: bool,
}

impl Scenario {
    /// A scenario that keeps bodies and headers.
    pub fn new() -> Self {
        Self { paths: HashMap::new(), headers: true, bodies: true }
    }

    /// A scenario for many records: the ledger keeps neither bodies nor headers.
    pub fn light() -> Self {
        Self::default()
    }

    /// With the rules of a path.
    #[must_use]
    pub fn on(mut self, path: &str, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.paths.insert(path.to_owned(), rules.into_iter().collect());
        self
    }
}

/// A condition and an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Rule {
    #[serde(rename = "if", skip_serializing_if = "Condition::is_empty")]
    pub(super) condition: Condition,
    pub(super) status: u16,
    pub(super) body: Value,
    pub(super) delay_ms: u64,
    pub(super) hang: bool,
    pub(super) close: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content_type: Option<String>,
    pub(super) headers: Vec<(String, String)>,
    pub(super) raw_headers: Vec<(String, String)>,
}

impl Default for Rule {
    fn default() -> Self {
        Self::status(200)
    }
}

impl Rule {
    /// Answers this status, with the request's body.
    pub fn status(status: u16) -> Self {
        Self {
            condition: Condition::default(),
            status,
            body: json!("echo"),
            delay_ms: 0,
            hang: false,
            close: false,
            content_type: None,
            headers: Vec::new(),
            raw_headers: Vec::new(),
        }
    }

    /// Answers 200 with the request's body.
    pub fn echo() -> Self {
        Self::status(200)
    }

    /// With an empty body.
    #[must_use]
    pub fn empty(self) -> Self {
        self.with(json!("none"))
    }

    /// With this text as body.
    #[must_use]
    pub fn text(self, text: &str) -> Self {
        self.with(json!({ "text": text }))
    }

    /// With these bytes as body.
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        self.with(json!({ "base64": BASE64_STANDARD.encode(bytes) }))
    }

    /// With the request's JSON and these further fields as body.
    #[must_use]
    pub fn extend(self, fields: Value) -> Self {
        self.with(json!({ "add": fields }))
    }

    /// With the request's JSON, one of its fields grown by one, as body.
    #[must_use]
    pub fn increment(self, field: &str) -> Self {
        self.with(json!({ "increment": field }))
    }

    /// With a body of this many bytes.
    #[must_use]
    pub fn size(self, bytes: usize) -> Self {
        self.with(json!({ "size": bytes }))
    }

    fn with(mut self, body: Value) -> Self {
        self.body = body;
        self
    }

    /// With a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With a header of any bytes.
    #[must_use]
    pub fn raw_header(mut self, name: &str, value: &[u8]) -> Self {
        self.raw_headers.push((name.to_owned(), BASE64_STANDARD.encode(value)));
        self
    }

    /// With this content type.
    #[must_use]
    pub fn content_type(mut self, name: &str) -> Self {
        self.content_type = Some(name.to_owned());
        self
    }

    /// After this time.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay_ms = delay.as_millis() as u64;
        self
    }

    /// Never answers.
    #[must_use]
    pub fn hang(mut self) -> Self {
        self.hang = true;
        self
    }

    /// Breaks the connection after the request was read.
    #[must_use]
    pub fn close(mut self) -> Self {
        self.close = true;
        self
    }

    /// Only under a condition.
    #[must_use]
    pub fn when(mut self, condition: Condition) -> Self {
        self.condition = condition;
        self
    }
}

/// When a rule applies: all that are set must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Condition {
    /// Whether the body is JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<bool>,
    /// The attempt is below this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt_below: Option<u32>,
    /// Fewer calls than this came to the path before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls_below: Option<u64>,
    /// Fewer deliveries than this of the same `mesh-id` came to the path before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls_of_record_below: Option<u64>,
    /// The key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// A numeric field of the JSON body is below this; an absent one counts as 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field_below: Option<(String, i64)>,
    /// A field of the JSON body is this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field_equals: Option<(String, Value)>,
}

impl Condition {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn holds(&self, call: &Call<'_>) -> bool {
        let json = || serde_json::from_slice::<Value>(call.body).ok();
        self.json.is_none_or(|wanted| json().is_some() == wanted)
            && self.attempt_below.is_none_or(|bound| call.entry.attempt < bound)
            && self.calls_below.is_none_or(|bound| call.calls < bound)
            && self.calls_of_record_below.is_none_or(|bound| call.of_record < bound)
            && self.key.as_ref().is_none_or(|key| call.entry.key.as_ref() == Some(key))
            && self
                .field_below
                .as_ref()
                .is_none_or(|(field, bound)| json().is_some_and(|value| value.is_object() && value[field].as_i64().unwrap_or(0) < *bound))
            && self.field_equals.as_ref().is_none_or(|(field, wanted)| json().is_some_and(|value| value[field] == *wanted))
    }
}

pub(super) struct Call<'a> {
    pub(super) entry: &'a Entry,
    pub(super) body: &'a [u8],
    pub(super) calls: u64,
    pub(super) of_record: u64,
}

/// One delivery that a service was given.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// Its number in the ledger, from 0.
    pub n: u64,
    /// The handler's path.
    pub path: String,
    /// `mesh-id`.
    pub id: String,
    /// `mesh-route`.
    pub route: String,
    /// `mesh-topic`.
    pub topic: String,
    /// `mesh-partition`, −1 if it was absent.
    pub partition: i32,
    /// `mesh-offset`, −1 if it was absent.
    pub offset: i64,
    /// `mesh-attempt`, 0 if it was absent.
    pub attempt: u32,
    /// `mesh-hops`, −1 if it was absent.
    pub hops: i64,
    /// `mesh-key`, decoded.
    pub key: Option<String>,
    /// When it came, in milliseconds since 1970-01-01 UTC.
    pub time_ms: u64,
    /// The body, base64, if bodies are kept.
    pub body: Option<String>,
    /// The headers by lower-case name, if headers are kept.
    pub headers: HashMap<String, String>,
}

impl Entry {
    /// The body, if it was kept.
    pub fn bytes(&self) -> Vec<u8> {
        self.body.as_ref().and_then(|body| BASE64_STANDARD.decode(body).ok()).unwrap_or_default()
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes()).unwrap_or_default()
    }

    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}
