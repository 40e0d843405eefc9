//! An OTLP collector in the test's own process: a gRPC server that keeps the spans it gets.
//!
//! Invariant: the server ends with its [`OtlpReceiver`].

use std::{collections::BTreeMap, io, net::SocketAddr, time::Duration};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::Span,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

/// A span as the collector got it.
#[derive(Clone, Debug)]
pub struct ReceivedSpan {
    /// The attributes of the process that made it: `service.name` and others.
    pub resource: BTreeMap<String, String>,
    /// The span.
    pub span: Span,
}

impl ReceivedSpan {
    /// The trace, in hexadecimal, as in a `traceparent`.
    pub fn trace_id(&self) -> String {
        hex(&self.span.trace_id)
    }

    /// The span, in hexadecimal.
    pub fn span_id(&self) -> String {
        hex(&self.span.span_id)
    }

    /// The parent, in hexadecimal; empty for a root.
    pub fn parent_id(&self) -> String {
        hex(&self.span.parent_span_id)
    }

    /// An attribute as text.
    pub fn attribute(&self, key: &str) -> Option<String> {
        self.span.attributes.iter().find(|attribute| attribute.key == key).map(text)
    }
}

/// The collector.
#[derive(Debug)]
pub struct OtlpReceiver {
    spans: watch::Receiver<Vec<ReceivedSpan>>,
    server: JoinHandle<()>,
}

impl OtlpReceiver {
    /// Starts a collector on a free loopback port.
    ///
    /// # Errors
    /// There is no port.
    pub async fn start() -> io::Result<(SocketAddr, Self)> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let (keep, spans) = watch::channel(Vec::new());
        let service = TraceServiceServer::new(Collector { keep });
        let serving = Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move {
            if let Err(error) = serving.await {
                eprintln!("the OTLP receiver ended: {error}");
            }
        });
        Ok((address, Self { spans, server }))
    }

    /// The spans so far, in the order in which they came.
    pub fn spans(&self) -> Vec<ReceivedSpan> {
        self.spans.borrow().clone()
    }

    /// Waits until the spans fulfil a condition, and returns them; after `limit` the spans so far are the error.
    ///
    /// # Errors
    /// The spans did not come in time.
    pub async fn wait_for(
        &self,
        limit: Duration,
        condition: impl Fn(&[ReceivedSpan]) -> bool,
    ) -> Result<Vec<ReceivedSpan>, Vec<ReceivedSpan>> {
        let mut spans = self.spans.clone();
        match timeout(limit, spans.wait_for(|spans| condition(spans))).await {
            Ok(Ok(spans)) => Ok(spans.clone()),
            Ok(Err(_)) | Err(_) => Err(self.spans()),
        }
    }
}

impl Drop for OtlpReceiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Collector {
    keep: watch::Sender<Vec<ReceivedSpan>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut received = Vec::new();
        for of_resource in request.into_inner().resource_spans {
            let attributes = of_resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let resource: BTreeMap<String, String> = attributes.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect();
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            received.extend(spans.map(|span| ReceivedSpan { resource: resource.clone(), span }));
        }
        self.keep.send_modify(|spans| spans.extend(received));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn text(attribute: &KeyValue) -> String {
    match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(yes)) => yes.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use mesh_sidecar::telemetry::{
        metrics::Metrics,
        trace::{Identity, SpanKind, SpanValue, TraceContext, Tracer},
    };
    use tokio::time::Instant;

    use super::*;

    #[tokio::test]
    async fn spans_arrive_at_a_collector() {
        let (address, receiver) = OtlpReceiver::start().await.unwrap();
        let identity = Identity { mesh: "shop".into(), services: vec!["pricing".into()], instance: "pricing-0".into() };
        let dropped = Metrics::new().process().dropped_spans.clone();
        let tracer = Tracer::otlp(&format!("http://{address}"), &identity, dropped.clone()).unwrap();
        let parent = TraceContext::parse(b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", None).unwrap();
        let mut process = tracer.start(SpanKind::Consumer, || "process orders".into(), Some(&parent));
        process.set("messaging.kafka.offset", || SpanValue::Int(7));
        process.link(&parent);
        process.fail("timeout", || "no answer".into());
        let send = tracer.start(SpanKind::Producer, || "send priced-orders".into(), process.context());
        drop(send);
        drop(process);

        let spans = receiver.wait_for(Duration::from_secs(10), |spans| spans.len() == 2).await.unwrap();
        let (send, process) = (&spans[0], &spans[1]);
        assert_eq!((send.trace_id().as_str(), send.parent_id()), ("4bf92f3577b34da6a3ce929d0e0e4736", process.span_id()));
        assert_eq!(process.parent_id(), "00f067aa0ba902b7");
        assert_eq!((process.span.name.as_str(), process.span.kind), ("process orders", 5));
        assert_eq!((process.attribute("messaging.kafka.offset").as_deref(), process.span.links.len()), (Some("7"), 1));
        assert_eq!(process.span.status.as_ref().map(|status| (status.code, status.message.as_str())), Some((2, "no answer")));
        assert_eq!(process.resource["service.name"], "pricing");
        assert_eq!(
            (process.resource["service.namespace"].as_str(), process.resource["service.instance.id"].as_str()),
            ("shop", "pricing-0")
        );

        for _ in 0..5000 {
            drop(tracer.start(SpanKind::Client, || "commit".into(), None));
        }
        tracer.shutdown(Instant::now() + Duration::from_secs(10)).await;
        assert_eq!((receiver.spans().len(), dropped.get()), (5002, 0));
    }

    #[tokio::test]
    async fn a_collector_that_is_away_costs_spans_and_nothing_else() {
        let (address, receiver) = OtlpReceiver::start().await.unwrap();
        drop(receiver);
        let dropped = Metrics::new().process().dropped_spans.clone();
        let tracer = Tracer::otlp(&format!("http://{address}"), &Identity::default(), dropped.clone()).unwrap();
        drop(tracer.start(SpanKind::Client, || "commit".into(), None));
        let begin = Instant::now();
        tracer.shutdown(begin + Duration::from_secs(1)).await;
        assert!(begin.elapsed() < Duration::from_secs(3));
        assert_eq!(dropped.get(), 1);
    }
}
