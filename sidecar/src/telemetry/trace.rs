//! Spans of the mesh: `send`, `process`, `commit`, by OpenTelemetry's messaging conventions.
//!
//! The span is built here and handed, finished, to the exporter's queue: the tracer of the OpenTelemetry SDK would cost a
//! thread-local context, two copies and a lookup for what is three ids and a list of attributes.
//!
//! Invariant: with tracing off a span costs a copy of its parent's context, and no closure is called.
//! Invariant: ending a span never waits: if the exporter's queue is full the span is dropped and counted.
//! Invariant: sampling follows the parent; a new trace is recorded.

use std::{sync::Arc, time::SystemTime};

use opentelemetry::{
    InstrumentationScope, KeyValue, SpanId, TraceFlags, TraceId, Value,
    trace::{self as otel, Link, SpanContext, Status, TraceState},
};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SpanData, SpanEvents, SpanLinks};
use tokio::time::Instant;

pub use super::context::TraceContext;
use super::export::Exporter;
pub use super::export::{Identity, TraceError};

/// The attributes that a span has room for without growing.
const ROOM: usize = 12;
/// The links and attributes that a span keeps; further ones are counted as dropped.
const LIMIT: usize = 128;

/// The kinds of spans that the mesh makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Publishes a record: `send`.
    Producer,
    /// Processes a record: `process`.
    Consumer,
    /// Calls the broker or the service: `commit`.
    Client,
}

impl From<SpanKind> for otel::SpanKind {
    fn from(kind: SpanKind) -> Self {
        match kind {
            SpanKind::Producer => Self::Producer,
            SpanKind::Consumer => Self::Consumer,
            SpanKind::Client => Self::Client,
        }
    }
}

/// Makes spans. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Tracer {
    recorder: Option<Arc<Recorder>>,
}

/// What makes and takes the spans that are recorded.
#[derive(Debug)]
struct Recorder {
    ids: RandomIdGenerator,
    scope: InstrumentationScope,
    exporter: Exporter,
}

impl Tracer {
    /// A tracer that makes no spans, and passes contexts on.
    pub fn disabled() -> Self {
        Self { recorder: None }
    }

    /// A tracer that sends its spans to an OTLP collector (gRPC, `http://host:port`), in batches and in the background; a collector that is
    /// away costs spans, and nothing else. `dropped` counts the spans that were lost. Must be called within a runtime.
    ///
    /// # Errors
    /// An address that can never work.
    pub fn otlp(endpoint: &str, identity: &Identity, dropped: prometheus_client::metrics::counter::Counter) -> Result<Self, TraceError> {
        Ok(Self::recording(Exporter::otlp(endpoint, identity, dropped)?))
    }

    pub(super) fn recording(exporter: Exporter) -> Self {
        let scope = InstrumentationScope::builder("mesh-sidecar").with_version(env!("CARGO_PKG_VERSION")).build();
        Self { recorder: Some(Arc::new(Recorder { ids: RandomIdGenerator::default(), scope, exporter })) }
    }

    /// Whether spans are made.
    pub fn enabled(&self) -> bool {
        self.recorder.is_some()
    }

    /// Starts a span as the child of `parent`, or as the root of a new trace. With tracing off the span only carries the parent on.
    pub fn start(&self, kind: SpanKind, name: impl FnOnce() -> String, parent: Option<&TraceContext>) -> Span {
        match &self.recorder {
            Some(recorder) => recorder.start(kind, name, parent, SystemTime::now()),
            None => Span { context: parent.cloned(), recording: None },
        }
    }

    /// As [`Tracer::start`], for a span that began earlier.
    pub fn start_at(&self, kind: SpanKind, name: impl FnOnce() -> String, parent: Option<&TraceContext>, start: SystemTime) -> Span {
        match &self.recorder {
            Some(recorder) => recorder.start(kind, name, parent, start),
            None => Span { context: parent.cloned(), recording: None },
        }
    }

    /// Sends what is in the queue and ends the exporter, until the deadline; what is left then is dropped and counted, as are spans that end
    /// later. Called once, at the end of shutdown. Returns at once with tracing off.
    pub async fn shutdown(&self, deadline: Instant) {
        if let Some(recorder) = &self.recorder {
            recorder.exporter.shutdown(deadline).await;
        }
    }
}

impl Recorder {
    fn start(self: &Arc<Self>, kind: SpanKind, name: impl FnOnce() -> String, parent: Option<&TraceContext>, start: SystemTime) -> Span {
        if let Some(parent) = parent.filter(|parent| !parent.sampled()) {
            // Whoever began the trace decided that nobody records it; a span id that nobody records would help nobody.
            return Span { context: Some(parent.clone()), recording: None };
        }
        let span_id = self.ids.new_span_id();
        let (trace_id, flags, state) = match parent {
            Some(parent) => (TraceId::from_bytes(parent.trace_id), parent.flags, parent.state.clone()),
            None => (self.ids.new_trace_id(), TraceFlags::SAMPLED.to_u8(), None),
        };
        let context = TraceContext { trace_id: trace_id.to_bytes(), span_id: span_id.to_bytes(), flags, state };
        let data = SpanData {
            span_context: SpanContext::NONE,
            parent_span_id: parent.map_or(SpanId::INVALID, |parent| SpanId::from_bytes(parent.span_id)),
            // Only a record's context comes from elsewhere as a rule; the other kinds are children of spans of this process.
            parent_span_is_remote: kind == SpanKind::Consumer && parent.is_some(),
            span_kind: kind.into(),
            name: name().into(),
            start_time: start,
            end_time: start,
            attributes: Vec::with_capacity(ROOM),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: self.scope.clone(),
        };
        Span { context: Some(context), recording: Some(Recording { recorder: self.clone(), data: Box::new(data) }) }
    }
}

/// A span that has started. It ends when it is dropped.
#[derive(Debug)]
pub struct Span {
    context: Option<TraceContext>,
    recording: Option<Recording>,
}

#[derive(Debug)]
struct Recording {
    recorder: Arc<Recorder>,
    data: Box<SpanData>,
}

impl Span {
    /// The context that children of this span name as their parent; with tracing off, or in a trace that is not sampled, the parent's own,
    /// if there was one.
    pub fn context(&self) -> Option<&TraceContext> {
        self.context.as_ref()
    }

    /// Whether the span is recorded: attributes are worth making.
    pub fn recording(&self) -> bool {
        self.recording.is_some()
    }

    /// Sets an attribute. The closure runs only if the span is recorded.
    pub fn set(&mut self, key: &'static str, value: impl FnOnce() -> SpanValue) {
        if let Some(Recording { data, .. }) = &mut self.recording {
            if data.attributes.len() < LIMIT {
                data.attributes.push(KeyValue::new(key, Value::from(value())));
            } else {
                data.dropped_attributes_count += 1;
            }
        }
    }

    /// Links the span to another.
    pub fn link(&mut self, other: &TraceContext) {
        if let Some(Recording { data, .. }) = &mut self.recording {
            if data.links.len() < LIMIT {
                data.links.links.push(Link::with_context(span_context(other, true)));
            } else {
                data.links.dropped_count += 1;
            }
        }
    }

    /// Marks the span as failed, with `error.type` and a description.
    pub fn fail(&mut self, error_type: &'static str, description: impl FnOnce() -> String) {
        if let Some(Recording { data, .. }) = &mut self.recording {
            data.status = Status::error(description());
            data.attributes.retain(|attribute| attribute.key.as_str() != "error.type");
            data.attributes.push(KeyValue::new("error.type", error_type));
        }
    }

    /// Ends the span at a time of the past.
    pub fn end_at(mut self, end: SystemTime) {
        self.finish(|| end);
    }

    fn finish(&mut self, end: impl FnOnce() -> SystemTime) {
        if let (Some(context), Some(Recording { recorder, mut data })) = (&self.context, self.recording.take()) {
            data.span_context = span_context(context, false);
            // A clock that was set back must not make a span that ends before it began.
            data.end_time = end().max(data.start_time);
            recorder.exporter.take(data);
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        self.finish(SystemTime::now);
    }
}

/// The context in the SDK's form.
fn span_context(context: &TraceContext, remote: bool) -> SpanContext {
    let state = context.state.as_ref().and_then(|state| std::str::from_utf8(state).ok());
    SpanContext::new(
        TraceId::from_bytes(context.trace_id),
        SpanId::from_bytes(context.span_id),
        TraceFlags::new(context.flags),
        remote,
        state.and_then(|state| state.parse().ok()).unwrap_or(TraceState::NONE),
    )
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum SpanValue {
    /// Text.
    Text(String),
    /// A number.
    Int(i64),
    /// Text that is shared: a topic, a route. Costs no copy.
    Shared(Arc<str>),
    /// A word of the program. Costs no copy.
    Word(&'static str),
    /// Yes or no.
    Bool(bool),
}

impl From<&'static str> for SpanValue {
    fn from(word: &'static str) -> Self {
        Self::Word(word)
    }
}

impl From<Arc<str>> for SpanValue {
    fn from(text: Arc<str>) -> Self {
        Self::Shared(text)
    }
}

impl From<String> for SpanValue {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for SpanValue {
    fn from(number: i64) -> Self {
        Self::Int(number)
    }
}

impl From<SpanValue> for Value {
    fn from(value: SpanValue) -> Self {
        match value {
            SpanValue::Text(text) => Self::from(text),
            SpanValue::Int(number) => Self::I64(number),
            SpanValue::Shared(text) => Self::from(text),
            SpanValue::Word(word) => Self::from(word),
            SpanValue::Bool(yes) => Self::Bool(yes),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::telemetry::export::tests::{Collected, collecting};

    const PARENT: &[u8] = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const UNSAMPLED: &[u8] = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

    fn parent() -> TraceContext {
        TraceContext::parse(PARENT, Some(&"a=1".into())).unwrap()
    }

    async fn finish(tracer: &Tracer, collected: &Collected) -> Vec<SpanData> {
        tracer.shutdown(Instant::now() + Duration::from_secs(5)).await;
        collected.spans()
    }

    #[test]
    fn disabled_passes_the_parent_on_and_calls_nothing() {
        let tracer = Tracer::disabled();
        let never = || -> SpanValue { panic!("called") };
        let mut span = tracer.start(SpanKind::Consumer, || panic!("called"), Some(&parent()));
        span.set("a", never);
        span.link(&parent());
        span.fail("x", || panic!("called"));
        assert!(!span.recording());
        assert_eq!(span.context(), Some(&parent()));
        assert_eq!(tracer.start(SpanKind::Consumer, || panic!("called"), None).context(), None);
    }

    #[tokio::test]
    async fn a_child_continues_its_parents_trace() {
        let (exporter, collected) = collecting(16);
        let tracer = Tracer::recording(exporter);
        let start = SystemTime::now() - Duration::from_secs(60);
        let mut span = tracer.start_at(SpanKind::Consumer, || "process orders".into(), Some(&parent()), start);
        let context = span.context().unwrap().clone();
        assert_eq!(context.trace_id, parent().trace_id);
        assert_ne!(context.span_id, parent().span_id);
        assert_eq!(context.state.as_deref(), Some(&b"a=1"[..]));
        span.set("messaging.system", || SpanValue::Word("kafka"));
        span.set("messaging.kafka.offset", || SpanValue::Int(7));
        span.link(&parent());
        span.fail("timeout", || "no answer within 5s".into());
        span.end_at(start + Duration::from_secs(1));

        let [data] = finish(&tracer, &collected).await.try_into().unwrap();
        assert_eq!(data.name, "process orders");
        assert_eq!(data.span_context.span_id().to_bytes(), context.span_id);
        assert_eq!(data.span_context.trace_state().header(), "a=1");
        assert_eq!(data.parent_span_id.to_bytes(), parent().span_id);
        assert_eq!(data.end_time.duration_since(data.start_time).unwrap(), Duration::from_secs(1));
        assert_eq!(data.status, Status::error("no answer within 5s"));
        assert_eq!(data.links[0].span_context.span_id().to_bytes(), parent().span_id);
        assert_eq!(
            data.attributes,
            [
                KeyValue::new("messaging.system", "kafka"),
                KeyValue::new("messaging.kafka.offset", 7),
                KeyValue::new("error.type", "timeout")
            ]
        );
    }

    #[tokio::test]
    async fn a_root_begins_a_sampled_trace_and_an_unsampled_parent_is_left_alone() {
        let (exporter, collected) = collecting(16);
        let tracer = Tracer::recording(exporter);
        let root = tracer.start(SpanKind::Producer, || "send a".into(), None);
        assert!(root.context().unwrap().sampled());
        drop(root);
        let unsampled = TraceContext::parse(UNSAMPLED, None).unwrap();
        let span = tracer.start(SpanKind::Producer, || panic!("called"), Some(&unsampled));
        assert_eq!(span.context(), Some(&unsampled));
        drop(span);
        let [data] = finish(&tracer, &collected).await.try_into().unwrap();
        assert_eq!((data.parent_span_id, data.name.as_ref()), (SpanId::INVALID, "send a"));
    }

    #[tokio::test]
    async fn keeps_a_bounded_number_of_attributes_and_links() {
        let (exporter, collected) = collecting(16);
        let tracer = Tracer::recording(exporter);
        let mut span = tracer.start(SpanKind::Client, || "commit".into(), None);
        for n in 0..200 {
            span.set("n", || SpanValue::Int(n));
            span.link(&parent());
        }
        drop(span);
        let [data] = finish(&tracer, &collected).await.try_into().unwrap();
        assert_eq!((data.attributes.len(), data.dropped_attributes_count), (LIMIT, 72));
        assert_eq!((data.links.len(), data.links.dropped_count), (LIMIT, 72));
    }

    /// Prints what a span costs; asserts nothing, since test builds are not optimized.
    #[tokio::test]
    async fn cost_of_a_span() {
        const ROUNDS: u32 = 20_000;
        let topic: Arc<str> = "orders".into();
        let (exporter, _collected) = collecting(ROUNDS as usize);
        for (what, tracer) in [("disabled", Tracer::disabled()), ("recording", Tracer::recording(exporter))] {
            let begin = std::time::Instant::now();
            for n in 0..ROUNDS {
                let mut span = tracer.start(SpanKind::Consumer, || "process orders".to_owned(), Some(&parent_without_state()));
                span.set("messaging.system", || SpanValue::Word("kafka"));
                span.set("messaging.operation.name", || SpanValue::Word("process"));
                span.set("messaging.destination.name", || SpanValue::Shared(topic.clone()));
                span.set("messaging.kafka.offset", || SpanValue::Int(n.into()));
                std::hint::black_box(span.context().map(TraceContext::traceparent));
            }
            println!("{what}: {:?} a span", begin.elapsed() / ROUNDS);
        }
    }

    fn parent_without_state() -> TraceContext {
        TraceContext { trace_id: [1; 16], span_id: [2; 8], flags: 1, state: None }
    }
}
