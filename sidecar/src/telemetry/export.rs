//! The way of finished spans to the collector: a bounded queue and one task that sends batches.
//!
//! The batch processor of the OpenTelemetry SDK keeps the number of dropped spans to itself and flushes by blocking a thread, hence this one;
//! the exporter behind it is the SDK's.
//!
//! Invariant: the queue is bounded; a span that finds no room, or whose batch fails, is counted in `dropped`.
//! Invariant: failures are logged at most once a minute.
//! Invariant: the task ends when the tracer is shut down or its last owner is gone; [`Exporter`] keeps its handle.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use opentelemetry::KeyValue;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{
    Resource,
    resource::EnvResourceDetector,
    trace::{SpanData, SpanExporter},
};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

/// Spans that wait for the exporter: about 8 MB.
const QUEUE: usize = 8192;
/// Spans sent at once: with 500 bytes each, well below the 4 MiB that a gRPC server takes by default.
const BATCH: usize = 2048;
/// How long a span waits at most, while the collector keeps up.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long one batch may take, with its retries.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often failures are logged at most.
const QUIET: Duration = Duration::from_secs(60);

/// Who makes the spans: the resource's attributes.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// The mesh: `service.namespace`.
    pub mesh: String,
    /// The services that the sidecar serves. `service.name` is the service's if there is one, else `mesh-sidecar`, as in other meshes: a
    /// sidecar's spans are its service's.
    pub services: Vec<String>,
    /// The instance: `service.instance.id`.
    pub instance: String,
}

impl Identity {
    fn resource(&self) -> Resource {
        let name = match self.services.as_slice() {
            [one] => one.clone(),
            _ => "mesh-sidecar".to_owned(),
        };
        Resource::builder_empty()
            .with_detector(Box::new(EnvResourceDetector::new()))
            .with_service_name(name)
            .with_attributes([
                KeyValue::new("service.namespace", self.mesh.clone()),
                KeyValue::new("service.instance.id", self.instance.clone()),
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("mesh.services", self.services.join(",")),
                KeyValue::new("telemetry.sdk.language", "rust"),
            ])
            .build()
    }
}

/// Why spans cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The address can never work.
    #[error(
        "telemetry.otlp: {endpoint:?} is no address of a collector: {cause}; give http://host:port of its OTLP/gRPC port, as in http://127.0.0.1:4317"
    )]
    Endpoint {
        /// The address.
        endpoint: String,
        /// Why.
        cause: String,
    },
}

/// Takes finished spans.
#[derive(Debug)]
pub(super) struct Exporter {
    queue: mpsc::Sender<Box<SpanData>>,
    shared: Arc<Shared>,
    /// When it must have ended; `None` while it runs.
    stop: watch::Sender<Option<Instant>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

/// What the spans' ends and the task share.
#[derive(Debug)]
struct Shared {
    /// Wakes the task before its time: a batch is full.
    full: Notify,
    /// Whether it was woken already.
    woken: AtomicBool,
    /// Spans that found no room, since the task looked last.
    overflow: AtomicU64,
    dropped: Counter,
}

impl Exporter {
    /// Exports to a collector.
    pub(super) fn otlp(endpoint: &str, identity: &Identity, dropped: Counter) -> Result<Self, TraceError> {
        let mut exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(TIMEOUT)
            .build()
            .map_err(|cause| TraceError::Endpoint { endpoint: endpoint.to_owned(), cause: cause.to_string() })?;
        exporter.set_resource(&identity.resource());
        Ok(Self::start(exporter, QUEUE, dropped))
    }

    fn start<E: SpanExporter + 'static>(exporter: E, room: usize, dropped: Counter) -> Self {
        let (queue, spans) = mpsc::channel(room);
        let (stop, stopped) = watch::channel(None);
        let shared = Arc::new(Shared { full: Notify::new(), woken: AtomicBool::new(false), overflow: AtomicU64::new(0), dropped });
        let pump = Pump { exporter, spans, stopped, shared: shared.clone(), reported: None };
        Self { queue, shared, stop, task: Mutex::new(Some(tokio::spawn(pump.run()))) }
    }

    /// Takes a span; never waits.
    pub(super) fn take(&self, span: Box<SpanData>) {
        if self.queue.try_send(span).is_err() {
            self.shared.dropped.inc();
            self.shared.overflow.fetch_add(1, Ordering::Relaxed);
        }
        // A wake-up a span would cost more than the span.
        if self.queue.max_capacity() - self.queue.capacity() >= BATCH.min(self.queue.max_capacity() / 2)
            && !self.shared.woken.swap(true, Ordering::AcqRel)
        {
            self.shared.full.notify_one();
        }
    }

    /// Flushes and ends, until the deadline.
    pub(super) async fn shutdown(&self, deadline: Instant) {
        self.stop.send_replace(Some(deadline));
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the exporter of spans ended badly");
        }
    }
}

/// The task.
struct Pump<E> {
    exporter: E,
    spans: mpsc::Receiver<Box<SpanData>>,
    stopped: watch::Receiver<Option<Instant>>,
    shared: Arc<Shared>,
    /// When a failure was logged last.
    reported: Option<Instant>,
}

impl<E: SpanExporter> Pump<E> {
    async fn run(mut self) {
        loop {
            tokio::select! {
                () = sleep(INTERVAL) => {}
                () = self.shared.full.notified() => {}
                // Asked to stop, or the last owner is gone.
                _ = self.stopped.wait_for(Option::is_some) => break,
            }
            self.shared.woken.store(false, Ordering::Release);
            while self.stopped.borrow().is_none() && self.export().await {}
        }
        self.spans.close();
        while self.export().await {}
        if let Err(error) = self.exporter.shutdown() {
            tracing::debug!(%error, "the exporter of spans did not close");
        }
    }

    /// Sends one batch. `false` if there is nothing more to send now.
    async fn export(&mut self) -> bool {
        if self.shared.overflow.swap(0, Ordering::Relaxed) > 0 {
            self.report("the queue was full: the collector, or this machine, is too slow");
        }
        let mut batch = Vec::new();
        while batch.len() < BATCH
            && let Ok(span) = self.spans.try_recv()
        {
            batch.push(*span);
        }
        let count = batch.len();
        if count == 0 {
            return false;
        }
        let result = tokio::select! {
            biased;
            () = expired(&mut self.stopped) => Err("the time for shutdown is over".to_owned()),
            result = timeout(2 * TIMEOUT, self.exporter.export(batch)) => match result {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {:?}", 2 * TIMEOUT)),
            },
        };
        if let Err(error) = result {
            let lost = u64::try_from(count).unwrap_or(u64::MAX);
            self.shared.dropped.inc_by(lost);
            self.report(&error);
        }
        count == BATCH
    }

    /// Logs a failure, at most once a minute.
    fn report(&mut self, error: &str) {
        if self.reported.is_some_and(|last| last.elapsed() < QUIET) {
            return;
        }
        self.reported = Some(Instant::now());
        tracing::warn!(error, dropped_in_all = self.shared.dropped.get(), "spans were dropped; told at most once a minute");
    }
}

/// Resolves when the time for shutdown is over. Never, if nobody shuts down: the last owner is gone, and the queue drains.
async fn expired(stopped: &mut watch::Receiver<Option<Instant>>) {
    let deadline = match stopped.wait_for(Option::is_some).await {
        Ok(deadline) => *deadline,
        Err(_) => None,
    };
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::future::{pending, ready};

    use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};

    use super::*;
    use crate::telemetry::trace::{SpanKind, Tracer};

    /// An exporter that keeps its spans, fails, or hangs.
    #[derive(Clone, Debug, Default)]
    pub(in crate::telemetry) struct Collected {
        spans: Arc<Mutex<Vec<SpanData>>>,
        fails: bool,
        hangs: bool,
    }

    impl Collected {
        pub(in crate::telemetry) fn spans(&self) -> Vec<SpanData> {
            self.spans.lock().unwrap().clone()
        }
    }

    impl SpanExporter for Collected {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            if self.hangs {
                pending::<()>().await;
            }
            if self.fails {
                return ready(Err(OTelSdkError::InternalFailure("refused".into()))).await;
            }
            self.spans.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    /// An exporter that keeps its spans.
    pub(in crate::telemetry) fn collecting(room: usize) -> (Exporter, Collected) {
        let collected = Collected::default();
        (Exporter::start(collected.clone(), room, Counter::default()), collected)
    }

    fn tracer(collected: &Collected, room: usize) -> (Tracer, Counter) {
        let dropped = Counter::default();
        (Tracer::recording(Exporter::start(collected.clone(), room, dropped.clone())), dropped)
    }

    fn spans(tracer: &Tracer, count: usize) {
        for _ in 0..count {
            drop(tracer.start(SpanKind::Producer, || "send a".into(), None));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn sends_without_being_asked_and_ends_with_its_last_owner() {
        let collected = Collected::default();
        let (tracer, dropped) = tracer(&collected, 100);
        spans(&tracer, 3);
        sleep(2 * INTERVAL).await;
        assert_eq!(collected.spans().len(), 3);
        spans(&tracer, 2);
        drop(tracer);
        while Arc::strong_count(&collected.spans) > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!((collected.spans().len(), dropped.get()), (5, 0));
    }

    #[tokio::test]
    async fn a_full_queue_drops_and_counts() {
        let collected = Collected::default();
        let (tracer, dropped) = tracer(&collected, 4);
        spans(&tracer, 10);
        tracer.shutdown(Instant::now() + TIMEOUT).await;
        assert_eq!((collected.spans().len(), dropped.get()), (4, 6));
        spans(&tracer, 1);
        assert_eq!(dropped.get(), 7, "a span after the end is counted");
    }

    #[tokio::test]
    async fn a_failed_batch_is_counted() {
        let collected = Collected { fails: true, ..Collected::default() };
        let (tracer, dropped) = tracer(&collected, 10_000);
        spans(&tracer, 5_000);
        tracer.shutdown(Instant::now() + TIMEOUT).await;
        assert_eq!(dropped.get(), 5_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hanging_collector_does_not_outlast_the_deadline() {
        let collected = Collected { hangs: true, ..Collected::default() };
        let (tracer, dropped) = tracer(&collected, 10_000);
        spans(&tracer, 5_000);
        let begin = Instant::now();
        tracer.shutdown(begin + Duration::from_secs(2)).await;
        assert!(begin.elapsed() < Duration::from_millis(2_100), "{:?}", begin.elapsed());
        assert_eq!(dropped.get(), 5_000);
    }

    /// Counts warnings.
    #[derive(Clone, Default)]
    struct Warnings(Arc<AtomicU64>);

    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Warnings {
        fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
            if *event.metadata().level() == tracing::Level::WARN && event.metadata().target().starts_with("mesh_sidecar") {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_logged_once_a_minute() {
        use tracing_subscriber::layer::SubscriberExt;
        let warnings = Warnings::default();
        let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
        let collected = Collected { fails: true, ..Collected::default() };
        let (tracer, dropped) = tracer(&collected, 4);
        for _ in 0..150 {
            spans(&tracer, 9);
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!((warnings.0.load(Ordering::Relaxed), dropped.get()), (3, 150 * 9));
    }

    #[tokio::test]
    async fn an_address_that_cannot_work_is_refused() {
        for bad in ["https://127.0.0.1:4317", "not an address", "http://"] {
            let error = Tracer::otlp(bad, &Identity::default(), Counter::default()).unwrap_err();
            assert!(error.to_string().contains(bad), "{error}");
        }
    }
}
