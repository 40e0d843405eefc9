//! Publishes the records of the services: checks them, gives them identity and trace, and waits for the broker. Floor 4.
//!
//! Invariant: a record that is reported as published was acknowledged by the broker.
//! Invariant: the order of [`Publisher::enqueue`] calls is the order in a partition.
//! Invariant: nothing is sent to a topic that is not known to exist, since that would create it, or time out.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use mesh_routing::Schema;
use prometheus_client::metrics::gauge::Gauge;
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    broker::{Acks, Broker, Outgoing, ProduceErrorKind, Producer},
    config::{Config, ServiceConfig},
    record::{Header, Position, Record, header},
    table::TableWatch,
    telemetry::{
        metrics::{Metrics, TopicMetrics},
        trace::{Span, SpanKind, SpanValue, TraceContext, Tracer},
    },
};

mod error;
mod id;
mod topic;

pub use crate::record::Draft;
pub use error::PublishError;
pub use topic::check_name;

/// How many topics are remembered; beyond, the memory begins anew.
const TOPICS: usize = 10_000;
/// How many callers ask the broker for a topic at once.
const LEARNERS: usize = 16;
/// The longest `mesh-id`, in bytes.
const LONGEST_ID: usize = 256;
/// The longest name of a header, in bytes.
const LONGEST_NAME: usize = 1024;

/// Publishes records. Cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    inner: Arc<Inner>,
}

struct Inner {
    broker: Arc<dyn Broker>,
    producer: Arc<dyn Producer>,
    config: Arc<Config>,
    tracer: Tracer,
    metrics: Metrics,
    ids: id::Ids,
    topics: RwLock<HashMap<Arc<str>, Topic>>,
    learners: Semaphore,
    /// The table in force, whose schemas guard the topics.
    table: Option<TableWatch>,
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").field("broker", &self.inner.broker.system()).finish_non_exhaustive()
    }
}

/// Who publishes or subscribes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The service at this place of [`Config::services`].
    Service(usize),
    /// One of several services that did not say which.
    Anonymous,
    /// Whoever may use the admin port: no allow-list counts.
    Operator,
}

/// What a caller wants of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To publish to it: `services[].publish` decides.
    Publish,
    /// To read it: `services[].subscribe` decides.
    Subscribe,
}

/// Checks the allow-list of the caller.
///
/// # Errors
/// [`PublishError::Forbidden`], and [`PublishError::Unnamed`] for an anonymous caller where there are lists.
pub fn check_allowed(services: &[ServiceConfig], caller: Caller, topic: &str, to: Use) -> Result<(), PublishError> {
    let list = |service: &'_ ServiceConfig| match to {
        Use::Publish => service.publish.is_some(),
        Use::Subscribe => service.subscribe.is_some(),
    };
    let service = match caller {
        Caller::Service(index) => services.get(index).ok_or(PublishError::Unnamed)?,
        Caller::Anonymous if services.iter().any(list) => return Err(PublishError::Unnamed),
        Caller::Anonymous | Caller::Operator => return Ok(()),
    };
    let (allowed, verb, list) = match to {
        Use::Publish => (&service.publish, "publish to", "publish"),
        Use::Subscribe => (&service.subscribe, "subscribe to", "subscribe"),
    };
    match allowed {
        Some(allowed) if !allowed.iter().any(|name| name == topic) => {
            Err(PublishError::Forbidden { service: service.name.clone(), topic: topic.to_owned(), verb, list })
        }
        _ => Ok(()),
    }
}

/// A topic that was checked, that the caller may publish to, and that is known to exist. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Topic {
    inner: Arc<TopicInner>,
}

#[derive(Debug)]
struct TopicInner {
    name: Arc<str>,
    metrics: TopicMetrics,
}

impl Topic {
    /// The topic's name.
    pub fn name(&self) -> &Arc<str> {
        &self.inner.name
    }
}

/// The trace context of a request, as it came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceHeaders {
    /// W3C `traceparent`.
    pub traceparent: Option<Bytes>,
    /// W3C `tracestate`.
    pub tracestate: Option<Bytes>,
    /// W3C `baggage`.
    pub baggage: Option<Bytes>,
}

/// What became of a record.
#[derive(Clone, Debug)]
pub struct Published {
    /// The record's identity; empty if it was refused before it had one.
    pub mesh_id: Bytes,
    /// Where it is stored, or why it is not known to be.
    pub result: Result<Position, PublishError>,
}

impl Publisher {
    /// A publisher on the broker's shared producer.
    pub fn new(broker: Arc<dyn Broker>, config: Arc<Config>, tracer: Tracer, metrics: Metrics) -> Self {
        Self::make(broker, config, tracer, metrics, None)
    }

    /// The same, guarded by the schemas of the table in force.
    pub fn guarded(broker: Arc<dyn Broker>, config: Arc<Config>, tracer: Tracer, metrics: Metrics, table: TableWatch) -> Self {
        Self::make(broker, config, tracer, metrics, Some(table))
    }

    fn make(broker: Arc<dyn Broker>, config: Arc<Config>, tracer: Tracer, metrics: Metrics, table: Option<TableWatch>) -> Self {
        let producer = broker.producer();
        Self {
            inner: Arc::new(Inner {
                broker,
                producer,
                config,
                tracer,
                metrics,
                ids: id::Ids::new(),
                topics: RwLock::default(),
                learners: Semaphore::new(LEARNERS),
                table,
            }),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &Arc<Config> {
        &self.inner.config
    }

    /// Waits until the topic is known to exist, up to `limits.publish_timeout`. Cancel-safe.
    ///
    /// # Errors
    /// [`PublishError::UnknownTopic`], and what keeps the broker from saying.
    pub async fn exists(&self, name: &str) -> Result<(), PublishError> {
        match self.inner.producer.known_partitions(name) {
            Some(_) => Ok(()),
            None => self.learn(name).await,
        }
    }

    /// Checks that the caller may publish to the topic and that it exists. Waits only for a topic that is not known yet, up to
    /// `limits.publish_timeout`. Cancel-safe.
    ///
    /// # Errors
    /// Every [`PublishError`] that concerns no single record. They are counted here.
    pub async fn topic(&self, caller: Caller, name: &str) -> Result<Topic, PublishError> {
        let found = self.find_topic(caller, name).await;
        if let Err(error) = &found {
            self.count_refused(None, error.code(), 1);
        }
        found
    }

    async fn find_topic(&self, caller: Caller, name: &str) -> Result<Topic, PublishError> {
        let inner = &self.inner;
        let known = inner.topics.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        if known.is_none() {
            check_name(name)?;
        }
        check_allowed(&inner.config.services, caller, name, Use::Publish)?;
        inner.broker.health().map_err(|error| PublishError::Unavailable { detail: error.detail })?;
        if inner.producer.known_partitions(name).is_none() {
            self.learn(name).await?;
        }
        Ok(known.unwrap_or_else(|| self.remember(name)))
    }

    async fn learn(&self, name: &str) -> Result<(), PublishError> {
        let inner = &self.inner;
        let deadline = Instant::now() + inner.config.limits.publish_timeout;
        let late = || PublishError::Unavailable { detail: format!("no answer whether the topic `{name}` exists") };
        let asked = tokio::time::timeout_at(deadline, async {
            let _slot = inner.learners.acquire().await.map_err(|_| late())?;
            // Another caller may have learned it meanwhile.
            if inner.producer.known_partitions(name).is_some() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match inner.producer.learn_topic(name, left).await {
                Ok(_) => Ok(()),
                // Nothing was sent, so nothing is possibly stored.
                Err(error) if error.kind == ProduceErrorKind::TimedOut => Err(PublishError::Unavailable { detail: error.detail }),
                Err(error) => Err(PublishError::from_broker(error, &Arc::from(name), inner.config.limits.publish_timeout)),
            }
        });
        asked.await.unwrap_or_else(|_| Err(late()))
    }

    fn remember(&self, name: &str) -> Topic {
        let name: Arc<str> = Arc::from(name);
        let topic = Topic { inner: Arc::new(TopicInner { metrics: self.inner.metrics.topic(&name), name }) };
        let mut topics = self.inner.topics.write().unwrap_or_else(PoisonError::into_inner);
        if topics.len() >= TOPICS {
            topics.clear();
        }
        topics.entry(topic.inner.name.clone()).or_insert(topic).clone()
    }

    /// Sends records, in order: they are enqueued when this returns. Those that are refused here do not keep the others back.
    pub fn enqueue(&self, topic: &Topic, drafts: Vec<Draft>, trace: &TraceHeaders) -> Pending {
        let inner = &self.inner;
        let now = Instant::now();
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let mut slots = Vec::with_capacity(drafts.len());
        let mut records = Vec::with_capacity(drafts.len());
        let mut spans = Vec::new();
        let schema = self.schema(topic);
        for draft in drafts {
            match self.prepare(topic, draft, schema.as_ref(), trace, now_ms) {
                Ok((record, mesh_id, span)) => {
                    spans.extend(span);
                    slots.push(Slot { mesh_id, bytes: payload(&record), refused: None });
                    records.push(Outgoing { topic: topic.inner.name.clone(), partition: None, record });
                }
                Err(error) => slots.push(Slot { mesh_id: Bytes::new(), bytes: 0, refused: Some(error) }),
            }
        }
        let sent = InFlight::new(inner.metrics.process().publish_in_flight.clone());
        let acks = (!records.is_empty()).then(|| inner.producer.send(records));
        Pending { publisher: self.clone(), topic: topic.clone(), slots, acks, spans, begun: now, sent }
    }

    /// The topic's schema in the table in force.
    fn schema(&self, topic: &Topic) -> Option<Schema> {
        let active = self.inner.table.as_ref()?.borrow();
        active.as_ref()?.compiled.schema(&topic.inner.name).cloned()
    }

    /// Sends one batch and waits for it: [`Publisher::enqueue`] and [`Pending::wait`].
    pub async fn publish(&self, topic: &Topic, drafts: Vec<Draft>, trace: &TraceHeaders) -> Vec<Published> {
        self.enqueue(topic, drafts, trace).wait().await
    }

    /// Counts records of a request that were refused before they came here, by the code of the problem.
    pub fn count_refused(&self, topic: Option<&Topic>, code: &'static str, records: u64) {
        match topic {
            Some(topic) => topic.inner.metrics.failed(code, records),
            // A topic that is not known to exist is no label: callers could make up any number of them.
            None => self.inner.metrics.topic(&Arc::from("")).failed(code, records),
        }
    }

    fn prepare(
        &self,
        topic: &Topic,
        draft: Draft,
        schema: Option<&Schema>,
        trace: &TraceHeaders,
        now_ms: u64,
    ) -> Result<(Record, Bytes, Option<Span>), PublishError> {
        let Draft { mut record, mut mesh_id, mut content_type } = draft;
        if record.timestamp_ms.is_some_and(|time| time < 0) {
            return Err(PublishError::InvalidField { field: "timestamp", reason: "is before 1970" });
        }
        let limit = self.inner.config.limits.record_bytes;
        if let (Some(schema), Some(value)) = (schema, &record.value)
            // What is too large is refused for that, below, before any work is spent on it.
            && value.len() <= limit
            && let Err(mismatch) = schema.check(value)
        {
            return Err(PublishError::Schema { topic: topic.inner.name.clone(), mismatch });
        }
        let (mut own, mut has_own) = (TraceHeaders::default(), false);
        let given = std::mem::take(&mut record.headers);
        let mut headers = Vec::with_capacity(given.len() + 4);
        // The mesh's own come first; their places are filled below.
        for field in given {
            match &*field.name {
                header::TRACEPARENT => (own.traceparent, has_own) = (field.value, true),
                header::TRACESTATE => own.tracestate = field.value,
                header::BAGGAGE => own.baggage = field.value,
                header::CONTENT_TYPE => content_type = field.value,
                header::MESH_ID => mesh_id = field.value,
                name => {
                    check_header(name)?;
                    headers.push(field);
                }
            }
        }
        let mesh_id = match mesh_id {
            None => self.inner.ids.next(now_ms),
            Some(id) => check_id(id)?,
        };
        // A record's own context replaces the request's as a whole: a state without its parent means nothing.
        if !has_own {
            own.traceparent.clone_from(&trace.traceparent);
            if own.tracestate.is_none() {
                own.tracestate.clone_from(&trace.tracestate);
            }
        }
        let baggage = own.baggage.take().or_else(|| trace.baggage.clone());
        let (traceparent, tracestate, span) = self.trace(topic, &record, &mesh_id, own);
        headers.push(Header::new(header::MESH_ID, mesh_id.clone()));
        let extra = [
            (header::CONTENT_TYPE, content_type),
            (header::TRACEPARENT, traceparent),
            (header::TRACESTATE, tracestate),
            (header::BAGGAGE, baggage),
        ];
        for (name, value) in extra {
            if let Some(value) = value {
                headers.push(Header::new(name, value));
            }
        }
        record.headers = headers;
        let size = payload(&record) + header_bytes(&record);
        if size > limit {
            let detail = format!("the record has {size} bytes with its headers; `limits.record_size` allows {limit}");
            return Err(PublishError::TooLarge { detail });
        }
        Ok((record, mesh_id, span))
    }

    /// The record's trace headers, and its `send` span if spans are made.
    fn trace(&self, topic: &Topic, record: &Record, mesh_id: &Bytes, given: TraceHeaders) -> (Option<Bytes>, Option<Bytes>, Option<Span>) {
        let parent = match &given.traceparent {
            None => None,
            Some(text) => {
                let parent = TraceContext::parse(text, given.tracestate.as_ref());
                if parent.is_none() {
                    self.inner.metrics.process().malformed_traceparents.inc();
                }
                parent
            }
        };
        if !self.inner.tracer.enabled() {
            return match parent {
                Some(_) => (given.traceparent, given.tracestate, None),
                None => (None, None, None),
            };
        }
        let name = topic.name();
        let mut span = self.inner.tracer.start(SpanKind::Producer, || format!("send {name}"), parent.as_ref());
        span.set("messaging.system", || SpanValue::Text(self.inner.broker.system().to_owned()));
        span.set("messaging.operation.type", || SpanValue::Text("send".to_owned()));
        span.set("messaging.operation.name", || SpanValue::Text("send".to_owned()));
        span.set("messaging.destination.name", || SpanValue::Text(name.to_string()));
        span.set("messaging.message.id", || SpanValue::Text(String::from_utf8_lossy(mesh_id).into_owned()));
        span.set("messaging.message.body.size", || SpanValue::Int(record.value.as_ref().map_or(0, |value| value.len() as i64)));
        let (traceparent, tracestate) = match span.context() {
            Some(context) => (Some(context.traceparent()), context.state.clone()),
            None => (None, None),
        };
        (traceparent, tracestate, Some(span))
    }
}

/// Records that were enqueued. Dropping it does not take them back.
#[must_use = "a record is published when its acknowledgement came"]
pub struct Pending {
    publisher: Publisher,
    topic: Topic,
    slots: Vec<Slot>,
    acks: Option<Acks>,
    spans: Vec<Span>,
    begun: Instant,
    sent: InFlight,
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").field("topic", &self.topic.name()).field("records", &self.slots.len()).finish_non_exhaustive()
    }
}

struct Slot {
    mesh_id: Bytes,
    bytes: usize,
    refused: Option<PublishError>,
}

impl Pending {
    /// How many records it has.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether it has no records.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Waits for the acknowledgements until `limits.publish_timeout` after the enqueueing. One result a record, in order.
    pub async fn wait(self) -> Vec<Published> {
        let Self { publisher, topic, slots, acks, mut spans, begun, sent } = self;
        let timeout = publisher.inner.config.limits.publish_timeout;
        let answered = match acks {
            None => Some(Vec::new()),
            Some(acks) => tokio::time::timeout_at(begun + timeout, acks).await.ok(),
        };
        drop(sent);
        let late = || PublishError::TimedOut {
            topic: topic.inner.name.clone(),
            after: timeout,
            reason: publisher.inner.broker.trouble_of(&topic.inner.name).map(|error| error.detail),
        };
        let in_time = answered.is_some();
        let mut answered = answered.into_iter().flatten();
        let (mut stored, mut stored_bytes, mut sent) = (0, 0, 0);
        let mut results = Vec::with_capacity(slots.len());
        for slot in slots {
            let result = match slot.refused {
                Some(error) => Err(error),
                None => {
                    let result = match answered.next() {
                        Some(Ok(position)) => Ok(position),
                        Some(Err(error)) => Err(PublishError::from_broker(error, &topic.inner.name, timeout)),
                        None if in_time => Err(PublishError::Broken { detail: "the producer gave no result for the record".to_owned() }),
                        None => Err(late()),
                    };
                    if let Some(span) = spans.get_mut(sent) {
                        finish_span(span, &result);
                    }
                    sent += 1;
                    result
                }
            };
            match &result {
                Ok(_) => {
                    stored += 1;
                    stored_bytes += slot.bytes as u64;
                }
                Err(error) => topic.inner.metrics.failed(error.code(), 1),
            }
            results.push(Published { mesh_id: slot.mesh_id, result });
        }
        if stored > 0 {
            topic.inner.metrics.acknowledged.inc_by(stored);
            topic.inner.metrics.bytes.inc_by(stored_bytes);
            publisher.inner.metrics.process().publish_duration.observe(begun.elapsed());
        }
        results
    }
}

fn finish_span(span: &mut Span, result: &Result<Position, PublishError>) {
    match result {
        Ok(position) => {
            span.set("messaging.destination.partition.id", || SpanValue::Text(position.partition.partition.to_string()));
            span.set("messaging.kafka.offset", || SpanValue::Int(position.offset));
        }
        Err(error) => span.fail(error.code(), || error.to_string()),
    }
}

/// Counts a batch as in flight until it is dropped, whatever becomes of its future.
struct InFlight(Gauge);

impl InFlight {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn check_header(name: &str) -> Result<(), PublishError> {
    let invalid = |reason| Err(PublishError::InvalidHeader { name: crate::record::clip(name), reason });
    if name.is_empty() {
        return invalid("has no name");
    }
    if name.len() > LONGEST_NAME {
        return invalid("has a name of more than 1,024 bytes");
    }
    let prefix = header::MESH_PREFIX.as_bytes();
    if name.as_bytes().get(..prefix.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(prefix)) {
        return invalid("begins with `mesh-`: such headers are set by the mesh alone");
    }
    Ok(())
}

fn check_id(id: Bytes) -> Result<Bytes, PublishError> {
    let invalid = |reason| Err(PublishError::InvalidField { field: "mesh-id", reason });
    if id.is_empty() || id.len() > LONGEST_ID {
        return invalid("must have 1 to 256 bytes");
    }
    match std::str::from_utf8(&id) {
        Ok(text) if !text.chars().any(char::is_control) => Ok(id),
        Ok(_) => invalid("has a control character"),
        Err(_) => invalid("is not UTF-8"),
    }
}

fn payload(record: &Record) -> usize {
    record.key.as_ref().map_or(0, Bytes::len) + record.value.as_ref().map_or(0, Bytes::len)
}

fn header_bytes(record: &Record) -> usize {
    record.headers.iter().map(|field| field.name.len() + field.value.as_ref().map_or(0, Bytes::len)).sum()
}
