//! The routing table as it is written: what is there and nothing else.
//!
//! Invariant: printing a table and reading it back gives an equal table. Defaults are kept apart
//! and are folded into a route by [`Table::resolved`] only.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use crate::part::Parts;
use crate::value::{print_duration, print_time};

/// The `apiVersion` of a table.
pub const API_VERSION: &str = "mesh/v1";
/// The `kind` of a table.
pub const KIND: &str = "RoutingTable";

/// All routes of a mesh.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// The name of the mesh.
    pub mesh: String,
    /// Declared topics, by name.
    pub topics: BTreeMap<String, TopicSpec>,
    /// Fields that every route has unless it says otherwise.
    pub defaults: RouteFields,
    /// The routes, in the order of the text.
    pub routes: Vec<RouteSpec>,
}

/// What a table declares of a topic; absent fields are the broker's to choose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TopicSpec {
    /// The number of partitions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions: Option<u32>,
    /// The number of replicas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication: Option<u16>,
    /// How long records are kept.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "duration")]
    pub retention: Option<Duration>,
    /// What the values of its records must look like.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schema: Option<SchemaSpec>,
}

/// What values must look like. A table carries all of its schemas, since it travels to every sidecar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SchemaSpec {
    /// A JSON Schema.
    Json(serde_json::Value),
    /// A protobuf message.
    Protobuf {
        /// A `FileDescriptorSet` with all imports, as base64.
        descriptor: String,
        /// The full name of the message, such as `shop.Order`.
        message: String,
    },
}

impl SchemaSpec {
    /// The word for its kind, as it is written.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Json(_) => "json",
            Self::Protobuf { .. } => "protobuf",
        }
    }
}

/// A route: its name, and its fields as written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RouteSpec {
    /// The name, unique in the table.
    pub name: String,
    /// The other fields.
    #[serde(flatten)]
    pub fields: RouteFields,
}

/// The fields of a route; `None` where the text is silent.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RouteFields {
    /// The service that the route belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The source topics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<Vec<String>>,
    /// How a record reaches the service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deliver: Option<Deliver>,
    /// The path at the service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handler: Option<String>,
    /// Where answers go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<To>,
    /// Answers that go elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cases: Option<Vec<CaseSpec>>,
    /// A CEL expression; records for which it is false are not delivered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Statuses of answers that forward nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignore_status: Option<BTreeSet<u16>>,
    /// Where a group with no offset yet begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// The consumer group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// What is kept in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// The content type of a record that names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// How many records may be at the service at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<ConcurrencySpec>,
    /// How long one delivery may take.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "duration")]
    pub timeout: Option<Duration>,
    /// How failed deliveries are repeated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetrySpec>,
    /// What becomes of a record whose attempts are used up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_exhausted: Option<OnExhausted>,
    /// The topic of what cannot be processed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<String>,
    /// When to stop calling a service that fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breaker: Option<BreakerSpec>,
    /// Which of the source's headers its replies carry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forward_headers: Option<ForwardSpec>,
    /// What is promised of a record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guarantee: Option<Guarantee>,
    /// What happens when the broker deleted records before they were processed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_gap: Option<OnGap>,
    /// Whether a delivery carries many records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<BatchSpec>,
    /// The most hops a record may have made; 0 is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_hops: Option<u32>,
}

/// How a record reaches the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Deliver {
    /// The sidecar calls the handler.
    Push,
    /// The service attaches with a stream.
    Stream,
    /// The service polls.
    Pull,
}

/// What is kept in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// The records of a key; those without a key are one lane of their partition.
    Key,
    /// The records of a partition.
    Partition,
    /// Nothing.
    None,
}

/// What becomes of a record whose attempts are used up, those by retry topics included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnExhausted {
    /// It goes to the dead letter topic.
    DeadLetter,
    /// It waits in the park topic, with the later records of its key behind it, until somebody releases it.
    Park,
    /// Its partition stops until somebody releases it, or the table changes.
    Stop,
}

/// What is promised of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guarantee {
    /// It is processed, perhaps more than once.
    AtLeastOnce,
    /// What comes of it is stored once: its replies and its offset are one transaction. The service may still be called more than once.
    ExactlyOnce,
}

/// What happens when the broker deleted records before they were processed. They are counted as expired in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnGap {
    /// The partition goes on at the earliest record that there is.
    Earliest,
    /// The partition stands still until somebody decides.
    Stop,
}

/// Where a group with no offset yet begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Start {
    /// At the oldest record.
    Earliest,
    /// At the next record.
    Latest,
    /// At the time when the table was applied.
    Applied,
    /// At a time, in milliseconds since 1970-01-01 UTC.
    At(i64),
}

impl Serialize for Start {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Earliest => to.serialize_str("earliest"),
            Self::Latest => to.serialize_str("latest"),
            Self::Applied => to.serialize_str("applied"),
            Self::At(millis) => to.serialize_str(&print_time(*millis)),
        }
    }
}

/// Destinations as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    /// Nowhere: the answer is awaited and counted.
    Void,
    /// Topics.
    Topics(Vec<String>),
}

impl Serialize for To {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Void => to.serialize_str("void"),
            Self::Topics(topics) => topics.serialize(to),
        }
    }
}

/// One case as written: at least one of `status` and `when`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CaseSpec {
    /// The status of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// A CEL expression over `record` and `reply`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// Where such answers go.
    pub to: To,
}

/// Retries as written; each field is defaulted on its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RetrySpec {
    /// How many attempts there are, the first included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// The first pause.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "duration")]
    pub initial: Option<Duration>,
    /// The longest pause.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "duration")]
    pub max: Option<Duration>,
    /// By how much each pause is longer than the one before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multiplier: Option<f64>,
    /// After the attempts in place: how long a record waits in each retry topic before a further one.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "durations")]
    pub topics: Option<Vec<Duration>>,
}

/// The breaker as written; each field is defaulted on its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BreakerSpec {
    /// How many failures in a row open it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failures: Option<u32>,
    /// How long it stays open.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "duration")]
    pub open: Option<Duration>,
}

/// Concurrency as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConcurrencySpec {
    /// So many calls.
    Fixed(u32),
    /// As many as the service can do, found by measuring; each bound is defaulted on its own.
    Adaptive {
        /// At least so many.
        min: Option<u32>,
        /// At most so many.
        max: Option<u32>,
    },
}

impl Serialize for ConcurrencySpec {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Bounds {
            #[serde(skip_serializing_if = "Option::is_none")]
            min: Option<u32>,
            #[serde(skip_serializing_if = "Option::is_none")]
            max: Option<u32>,
        }
        match *self {
            Self::Fixed(calls) => to.serialize_u32(calls),
            Self::Adaptive { min: None, max: None } => to.serialize_str("adaptive"),
            Self::Adaptive { min, max } => {
                let mut map = to.serialize_map(Some(1))?;
                map.serialize_entry("adaptive", &Bounds { min, max })?;
                map.end()
            }
        }
    }
}

/// Batches as written; each field is defaulted on its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BatchSpec {
    /// How many records a delivery carries at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
    /// How long an incomplete one waits for more.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "duration")]
    pub wait: Option<Duration>,
}

/// Forwarded headers as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForwardSpec {
    /// All of the source's own headers.
    All,
    /// None of them.
    None,
    /// Those of these names.
    Only(Vec<String>),
}

impl Serialize for ForwardSpec {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => to.serialize_str("all"),
            Self::None => to.serialize_str("none"),
            Self::Only(names) => names.serialize(to),
        }
    }
}

fn duration<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => to.serialize_str(&print_duration(*value)),
        None => to.serialize_none(),
    }
}

fn durations<S: Serializer>(values: &Option<Vec<Duration>>, to: S) -> Result<S::Ok, S::Error> {
    let printed: Option<Vec<String>> = values.as_ref().map(|values| values.iter().copied().map(print_duration).collect());
    printed.serialize(to)
}

impl Serialize for Table {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Metadata<'a> {
            mesh: &'a str,
        }
        #[derive(Serialize)]
        struct Spec<'a> {
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            topics: &'a BTreeMap<String, TopicSpec>,
            #[serde(skip_serializing_if = "Option::is_none")]
            defaults: Option<&'a RouteFields>,
            routes: &'a [RouteSpec],
        }
        let mut map = to.serialize_map(Some(4))?;
        map.serialize_entry("apiVersion", API_VERSION)?;
        map.serialize_entry("kind", KIND)?;
        map.serialize_entry("metadata", &Metadata { mesh: &self.mesh })?;
        let spec = Spec {
            topics: &self.topics,
            defaults: (self.defaults != RouteFields::default()).then_some(&self.defaults),
            routes: &self.routes,
        };
        map.serialize_entry("spec", &spec)?;
        map.end()
    }
}

/// The consumer group of a route of a mesh: the one that it, or the defaults, name, or its own.
pub(crate) fn group<'t>(mesh: &str, route: &str, named: Option<&'t str>) -> Cow<'t, str> {
    named.map_or_else(|| Cow::Owned(format!("{mesh}.{route}")), Cow::Borrowed)
}

impl Table {
    /// The canonical form: JSON on one line, fields in a fixed order, absent fields left out,
    /// durations and times normalised. Equal tables, and only they, have equal forms.
    pub fn to_json(&self) -> String {
        // Strings, numbers and maps with string keys always serialize.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The table as YAML, for people.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).unwrap_or_default()
    }

    /// The canonical form in parts.
    pub fn parts(&self) -> Parts {
        let json = self.to_json();
        // A route without a service is a fault of any table that is checked.
        Parts::split(&json).unwrap_or_else(|| Parts { declared: json, ..Parts::default() })
    }

    /// `sha256:<hex>` over the canonical form, [part by part](Parts): it does not depend on formatting, on the order of
    /// keys, or on YAML or JSON.
    pub fn digest(&self) -> String {
        self.parts().digest()
    }

    /// The consumer group of a route.
    pub fn group_of<'t>(&'t self, route: &'t RouteSpec) -> Cow<'t, str> {
        let named = route.fields.group.as_deref().or(self.defaults.group.as_deref());
        group(&self.mesh, &route.name, named)
    }

    /// The fields of a route with the table's defaults folded in. What neither names stays `None`.
    pub fn resolved(&self, route: &RouteSpec) -> RouteFields {
        let (own, base) = (route.fields.clone(), &self.defaults);
        RouteFields {
            service: own.service.or_else(|| base.service.clone()),
            from: own.from.or_else(|| base.from.clone()),
            deliver: own.deliver.or(base.deliver),
            handler: own.handler.or_else(|| base.handler.clone()),
            to: own.to.or_else(|| base.to.clone()),
            cases: own.cases.or_else(|| base.cases.clone()),
            filter: own.filter.or_else(|| base.filter.clone()),
            ignore_status: own.ignore_status.or_else(|| base.ignore_status.clone()),
            start: own.start.or(base.start),
            group: own.group.or_else(|| base.group.clone()),
            order: own.order.or(base.order),
            content_type: own.content_type.or_else(|| base.content_type.clone()),
            concurrency: own.concurrency.or(base.concurrency),
            timeout: own.timeout.or(base.timeout),
            retry: merge(own.retry, base.retry.as_ref(), |own, base| RetrySpec {
                attempts: own.attempts.or(base.attempts),
                initial: own.initial.or(base.initial),
                max: own.max.or(base.max),
                multiplier: own.multiplier.or(base.multiplier),
                topics: own.topics.or_else(|| base.topics.clone()),
            }),
            on_exhausted: own.on_exhausted.or(base.on_exhausted),
            dead_letter: own.dead_letter.or_else(|| base.dead_letter.clone()),
            breaker: merge(own.breaker, base.breaker.as_ref(), |own, base| BreakerSpec {
                failures: own.failures.or(base.failures),
                open: own.open.or(base.open),
            }),
            forward_headers: own.forward_headers.or_else(|| base.forward_headers.clone()),
            guarantee: own.guarantee.or(base.guarantee),
            on_gap: own.on_gap.or(base.on_gap),
            batch: merge(own.batch, base.batch.as_ref(), |own, base| BatchSpec { max: own.max.or(base.max), wait: own.wait.or(base.wait) }),
            max_hops: own.max_hops.or(base.max_hops),
        }
    }
}

fn merge<T: Clone>(own: Option<T>, base: Option<&T>, both: impl Fn(T, &T) -> T) -> Option<T> {
    match (own, base) {
        (Some(own), Some(base)) => Some(both(own, base)),
        (own, base) => own.or_else(|| base.cloned()),
    }
}
