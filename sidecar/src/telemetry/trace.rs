//! W3C trace context and spans.

use bytes::Bytes;

/// A W3C trace context, as it travels in headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The span that is the parent of what follows.
    pub span_id: [u8; 8],
    /// The flags; bit 0 is `sampled`.
    pub flags: u8,
    /// The `tracestate`, as it came.
    pub state: Option<Bytes>,
}

impl TraceContext {
    /// Reads a `traceparent`; `None` if it is malformed (then a new trace begins, as W3C says).
    pub fn parse(_traceparent: &[u8], _tracestate: Option<&Bytes>) -> Option<Self> {
        None
    }

    /// The `traceparent` that names this context: 55 characters.
    pub fn traceparent(&self) -> Bytes {
        Bytes::new()
    }
}

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

/// Makes spans. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Tracer {}

impl Tracer {
    /// A tracer that makes no spans, and passes contexts on.
    pub fn disabled() -> Self {
        Self {}
    }

    /// Whether spans are made.
    pub fn enabled(&self) -> bool {
        false
    }

    /// Starts a span as the child of `parent`, or as the root of a new trace. With tracing off the span only carries the parent on.
    pub fn start(&self, _kind: SpanKind, _name: impl FnOnce() -> String, parent: Option<&TraceContext>) -> Span {
        Span { context: parent.cloned() }
    }
}

/// A span that has started. It ends when it is dropped.
#[derive(Debug)]
pub struct Span {
    context: Option<TraceContext>,
}

impl Span {
    /// The context that children of this span name as their parent; with tracing off, the parent's own, if there was one.
    pub fn context(&self) -> Option<&TraceContext> {
        self.context.as_ref()
    }

    /// Whether the span is recorded: attributes are worth making.
    pub fn recording(&self) -> bool {
        false
    }

    /// Sets an attribute. The closure runs only if the span is recorded.
    pub fn set(&mut self, _key: &'static str, _value: impl FnOnce() -> SpanValue) {}

    /// Links the span to another.
    pub fn link(&mut self, _other: &TraceContext) {}

    /// Marks the span as failed, with `error.type` and a description.
    pub fn fail(&mut self, _error_type: &'static str, _description: impl FnOnce() -> String) {}
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum SpanValue {
    /// Text.
    Text(String),
    /// A number.
    Int(i64),
}
