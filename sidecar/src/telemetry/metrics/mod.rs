//! The metrics of the whole sidecar, in Prometheus form.
//!
//! A route, and a topic that is published to, gets its handles once ([`Metrics::route`], [`Metrics::topic`]); after that an event costs an
//! atomic addition.
//!
//! Invariant: labels are bounded: route, service, topic (at most [`TOPICS`]), and words of this program. Never a key, an offset or an id.
//! Invariant: what a route exposed disappears with it ([`Metrics::remove_route`]).

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

mod histogram;
mod process;
mod route;

pub use histogram::{Durations, Sizes};
pub use route::{BreakerState, RouteHandles, RouteMetrics};

/// Topics that get a label of their own; further ones share `(other)`.
pub const TOPICS: usize = 1000;

/// The media type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A gauge of whole numbers that are never negative.
pub type Level = Gauge<u64, AtomicU64>;
/// A gauge of seconds.
pub type Seconds = Gauge<f64, AtomicU64>;

type Labels = Vec<(&'static str, Arc<str>)>;

/// All metrics. Cheap to clone; clones are the same metrics.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    process: ProcessMetrics,
    families: Families,
    registry: Registry,
    routes: Mutex<HashMap<Arc<str>, RouteMetrics>>,
    topics: Mutex<HashMap<Arc<str>, TopicMetrics>>,
}

/// The metrics of the process: there is one of each.
#[derive(Debug, Default)]
pub struct ProcessMetrics {
    /// The generation of the table in force; 0 without one, and for a pinned one.
    pub table_generation: Level,
    /// 1 while the newest routing table is refused here: a bad signature, does not compile, an older generation.
    pub table_refused: Level,
    /// 1 while the broker can be reached.
    pub broker_up: Level,
    /// Spans that were lost on their way to the collector.
    pub dropped_spans: Counter,
    /// Records whose publisher gave a malformed `traceparent`, which was ignored.
    pub malformed_traceparents: Counter,
    /// From a publish request to its acknowledgement.
    pub publish_duration: Durations,
    /// Publish requests that wait for their acknowledgement.
    pub publish_in_flight: Gauge,
}

/// What has labels. Clones are the same families.
#[derive(Clone, Debug, Default)]
struct Families {
    published: Family<Labels, Counter>,
    published_bytes: Family<Labels, Counter>,
    deliveries: Family<Labels, Counter>,
    delivery_duration: Family<Labels, Durations>,
    batch_size: Family<Labels, Sizes>,
    unused_outcomes: Family<Labels, Counter>,
    dispositions: Family<Labels, Counter>,
    commits: Family<Labels, Counter>,
    commit_duration: Family<Labels, Durations>,
    rebalances: Family<Labels, Counter>,
    late: Family<Labels, Counter>,
    expired_leases: Family<Labels, Counter>,
    late_outcomes: Family<Labels, Counter>,
    partitions: Family<Labels, Level>,
    lag_records: Family<Labels, Level>,
    lag_seconds: Family<Labels, Seconds>,
    in_flight: Family<Labels, Gauge>,
    concurrency_limit: Family<Labels, Level>,
    stall: Family<Labels, Seconds>,
    queue_bytes: Family<Labels, Level>,
    replay_records: Family<Labels, Level>,
    aside: Family<Labels, Counter>,
    parked_records: Family<Labels, Level>,
    exhausted_records: Family<Labels, Level>,
    waiting_keys: Family<Labels, Level>,
    next_retry: Family<Labels, Seconds>,
    breaker: Family<Labels, Level>,
    state: Family<Labels, Level>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics, at zero.
    pub fn new() -> Self {
        let mut inner = Inner::default();
        register(&mut inner.registry, &inner.process, &inner.families);
        Self(Arc::new(inner))
    }

    /// The metrics of the process.
    pub fn process(&self) -> &ProcessMetrics {
        &self.0.process
    }

    /// The handles of a route: the ones that it has, or new ones from zero, if it is new or its service changed.
    pub fn route(&self, route: &Arc<str>, service: &Arc<str>) -> RouteMetrics {
        let mut routes = lock(&self.0.routes);
        if let Some(known) = routes.get(route) {
            if known.service() == service {
                return known.clone();
            }
            known.remove(&self.0.families);
        }
        let handles = RouteMetrics::new(&self.0.families, route, service);
        routes.insert(route.clone(), handles.clone());
        handles
    }

    /// Stops exposing a route that is gone. Handles that are still held count on, unseen.
    pub fn remove_route(&self, route: &str) {
        let handles = lock(&self.0.routes).remove(route);
        if let Some(handles) = handles {
            handles.remove(&self.0.families);
        }
    }

    /// The handles of a topic that is published to. Ask once the topic is known to exist: each name that is asked for is kept.
    pub fn topic(&self, topic: &Arc<str>) -> TopicMetrics {
        let mut topics = lock(&self.0.topics);
        if let Some(known) = topics.get(topic) {
            return known.clone();
        }
        let label: Arc<str> = if topics.len() < TOPICS { topic.clone() } else { "(other)".into() };
        let families = &self.0.families;
        topics.entry(label.clone()).or_insert_with(|| TopicMetrics::new(families, &label)).clone()
    }

    /// All metrics as OpenMetrics text, which is Prometheus text too.
    ///
    /// # Errors
    /// A metric that cannot be written; does not happen with the metrics of this module.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(16 * 1024);
        text::encode(&mut text, &self.0.registry)?;
        Ok(text)
    }
}

/// Publishes of one topic. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TopicMetrics {
    /// Records that were acknowledged.
    pub acknowledged: Counter,
    /// The bytes of their keys and values.
    pub bytes: Counter,
    topic: Arc<str>,
    published: Family<Labels, Counter>,
}

impl TopicMetrics {
    fn new(families: &Families, topic: &Arc<str>) -> Self {
        Self {
            acknowledged: families.published.get_or_create_owned(&result_labels(topic, "acknowledged")),
            bytes: families.published_bytes.get_or_create_owned(&vec![("topic", topic.clone())]),
            topic: topic.clone(),
            published: families.published.clone(),
        }
    }

    /// Counts records that were not acknowledged; `code` is a stable word of the program, such as the error's code.
    pub fn failed(&self, code: &'static str, records: u64) {
        self.published.get_or_create_owned(&result_labels(&self.topic, code)).inc_by(records);
    }
}

fn result_labels(topic: &Arc<str>, result: &'static str) -> Labels {
    vec![("topic", topic.clone()), ("result", result.into())]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names, helps and units. The library appends the unit, and `_total` to counters.
fn register(to: &mut Registry, process: &ProcessMetrics, families: &Families) {
    let ProcessMetrics {
        table_generation,
        table_refused,
        broker_up,
        dropped_spans,
        malformed_traceparents,
        publish_duration,
        publish_in_flight,
    } = process;
    to.register("mesh_table_generation", "The generation of the table in force", table_generation.clone());
    to.register("mesh_table_refused", "1 while the newest routing table is refused here", table_refused.clone());
    to.register("mesh_broker_up", "1 while the broker can be reached", broker_up.clone());
    to.register("mesh_dropped_spans", "Spans that were lost on their way to the collector", dropped_spans.clone());
    to.register(
        "mesh_malformed_traceparents",
        "Records whose publisher gave a malformed traceparent, which was ignored",
        malformed_traceparents.clone(),
    );
    to.register_with_unit(
        "mesh_publish_duration",
        "From a publish request to its acknowledgement",
        Unit::Seconds,
        publish_duration.clone(),
    );
    to.register("mesh_publish_in_flight", "Publish requests that wait for their acknowledgement", publish_in_flight.clone());

    let f = families.clone();
    to.register("mesh_published_records", "Records that were published, by result: acknowledged, or the error's code", f.published);
    to.register_with_unit("mesh_published", "Keys and values that were acknowledged", Unit::Bytes, f.published_bytes);
    to.register("mesh_deliveries", "Deliveries to the handler, by outcome", f.deliveries);
    to.register_with_unit("mesh_delivery_duration", "From the call of the handler to its answer", Unit::Seconds, f.delivery_duration);
    to.register("mesh_batch_records", "Records of one call, on routes with batches", f.batch_size);
    to.register(
        "mesh_unused_outcomes",
        "Outcomes that changed nothing: of no record of the batch (unknown), or of one behind a failure of its key (behind_failure)",
        f.unused_outcomes,
    );
    to.register("mesh_dispositions", "Records that ended on a route, by disposition and reason", f.dispositions);
    to.register("mesh_commits", "Commits of offsets, by result", f.commits);
    to.register_with_unit("mesh_commit_duration", "How long a commit takes", Unit::Seconds, f.commit_duration);
    to.register("mesh_rebalances", "Changes of the partitions owned here", f.rebalances);
    to.register("mesh_late_acknowledgements", "Answers that came after their partition was given away, and were dropped", f.late);
    to.register(
        "mesh_expired_leases",
        "Deliveries that a fetching service took and did not answer within the route's timeout",
        f.expired_leases,
    );
    to.register(
        "mesh_late_outcomes",
        "Outcomes that a fetching service gave after its lease had ended; they changed nothing",
        f.late_outcomes,
    );
    to.register("mesh_partitions", "Partitions owned here", f.partitions);
    to.register("mesh_lag_records", "Records behind, over the partitions owned here", f.lag_records);
    to.register_with_unit("mesh_lag", "Age of the oldest record that is not complete", Unit::Seconds, f.lag_seconds);
    to.register("mesh_in_flight_deliveries", "Deliveries at the service now", f.in_flight);
    to.register(
        "mesh_concurrency_limit",
        "Calls that may be at the service: the route's concurrency, or what was measured",
        f.concurrency_limit,
    );
    to.register_with_unit("mesh_watermark_stall", "How long the watermark stands, although there is work", Unit::Seconds, f.stall);
    to.register_with_unit("mesh_queue", "Records fetched and not complete", Unit::Bytes, f.queue_bytes);
    to.register("mesh_replay_records", "Records that would be delivered again if the sidecar died now", f.replay_records);
    to.register("mesh_handed_over", "Records put into the route's retry topics, or into its park topics", f.aside);
    to.register("mesh_parked_records", "Records in the park topics of the partitions owned here", f.parked_records);
    to.register("mesh_exhausted_records", "Parked records whose attempts are used up, until somebody releases them", f.exhausted_records);
    to.register("mesh_waiting_keys", "Keys of which records wait in retry or park topics", f.waiting_keys);
    to.register_with_unit("mesh_next_retry", "How long until the next record in a retry topic is due", Unit::Seconds, f.next_retry);
    to.register("mesh_breaker_state", "The breaker: 0 closed, 1 open", f.breaker);
    to.register("mesh_route_state", "1 for the state that the route is in, 0 for the others", f.state);

    to.register("mesh_build", "The build", Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
    to.register_collector(Box::new(process::Process::new()));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        outcome::{Disposition, Outcome},
        status::RouteState,
    };

    fn line(text: &str, begin: &str) -> Option<String> {
        text.lines().find_map(|line| line.strip_prefix(begin)).map(|value| value.trim().to_owned())
    }

    #[test]
    fn counts_what_happens_on_a_route() {
        let metrics = Metrics::new();
        let route = metrics.route(&"price".into(), &"pricing".into());
        route.delivered(&Outcome::Ignore, Duration::from_millis(3));
        route.delivered(&Outcome::NoService { reason: String::new(), after: None }, Duration::from_secs(90));
        route.ended(Disposition::DeadLettered, "attempts", 2);
        route.ended(Disposition::DeadLettered, "of another kind", 5);
        route.breaker(BreakerState::Open);
        route.state(RouteState::WaitingForService);
        route.lag_seconds.set(1.5);
        route.in_flight.inc();
        route.commits.inc();
        let text = metrics.encode().unwrap();
        for (begin, value) in [
            (r#"mesh_deliveries_total{route="price",service="pricing",outcome="ignore"}"#, "1"),
            (r#"mesh_deliveries_total{route="price",service="pricing",outcome="no_service"}"#, "1"),
            (r#"mesh_deliveries_total{route="price",service="pricing",outcome="reply"}"#, "0"),
            (r#"mesh_delivery_duration_seconds_count{route="price",service="pricing"}"#, "2"),
            (r#"mesh_delivery_duration_seconds_sum{route="price",service="pricing"}"#, "90.003"),
            (r#"mesh_delivery_duration_seconds_bucket{le="0.0025",route="price",service="pricing"}"#, "0"),
            (r#"mesh_delivery_duration_seconds_bucket{le="0.005",route="price",service="pricing"}"#, "1"),
            (r#"mesh_delivery_duration_seconds_bucket{le="+Inf",route="price",service="pricing"}"#, "2"),
            (r#"mesh_dispositions_total{route="price",service="pricing",disposition="dead_lettered",reason="attempts"}"#, "2"),
            (r#"mesh_dispositions_total{route="price",service="pricing",disposition="dead_lettered",reason="of another kind"}"#, "5"),
            (r#"mesh_dispositions_total{route="price",service="pricing",disposition="forwarded",reason=""}"#, "0"),
            (r#"mesh_breaker_state{route="price",service="pricing"}"#, "1"),
            (r#"mesh_route_state{route="price",service="pricing",state="waiting_for_service"}"#, "1"),
            (r#"mesh_route_state{route="price",service="pricing",state="joining"}"#, "0"),
            (r#"mesh_lag_seconds{route="price",service="pricing"}"#, "1.5"),
            (r#"mesh_in_flight_deliveries{route="price",service="pricing"}"#, "1"),
            (r#"mesh_commits_total{route="price",service="pricing",result="ok"}"#, "1"),
        ] {
            assert_eq!(line(&text, begin).as_deref(), Some(value), "{begin}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn a_route_that_is_gone_is_not_exposed() {
        let metrics = Metrics::new();
        let fresh = metrics.encode().unwrap();
        let series = |text: &str| text.lines().filter(|line| line.contains("price")).count();
        let handles = metrics.route(&"price".into(), &"pricing".into());
        handles.ended(Disposition::DeadLettered, "of another kind", 5);
        assert!(series(&metrics.encode().unwrap()) > 0);
        metrics.remove_route("price");
        handles.ended(Disposition::DeadLettered, "of a third kind", 5);
        assert_eq!(series(&metrics.encode().unwrap()), 0, "{fresh}");
        metrics.remove_route("price");

        let handles = metrics.route(&"price".into(), &"pricing".into());
        assert_eq!(handles.commits.get(), 0, "a route that comes back begins anew");
        handles.commits.inc();
        assert_eq!(metrics.route(&"price".into(), &"pricing".into()).commits.get(), 1);
        metrics.route(&"price".into(), &"other".into());
        assert!(!metrics.encode().unwrap().contains("pricing"), "a route that moved to another service");
    }

    #[test]
    fn topics_are_bounded() {
        let metrics = Metrics::new();
        for n in 0..TOPICS + 50 {
            let topic = metrics.topic(&format!("t{n}").into());
            topic.acknowledged.inc();
            topic.bytes.inc_by(10);
            topic.failed("too_large", 1);
        }
        let text = metrics.encode().unwrap();
        assert_eq!(line(&text, r#"mesh_published_records_total{topic="t0",result="acknowledged"}"#).as_deref(), Some("1"));
        assert_eq!(line(&text, r#"mesh_published_records_total{topic="(other)",result="acknowledged"}"#).as_deref(), Some("50"));
        assert_eq!(line(&text, r#"mesh_published_bytes_total{topic="(other)"}"#).as_deref(), Some("500"));
        assert_eq!(line(&text, r#"mesh_published_records_total{topic="(other)",result="too_large"}"#).as_deref(), Some("50"));
    }

    #[test]
    fn the_process_is_described() {
        let metrics = Metrics::new();
        metrics.process().table_generation.set(7);
        metrics.process().publish_duration.observe(Duration::from_millis(1));
        let text = metrics.encode().unwrap();
        assert_eq!(line(&text, "mesh_table_generation ").as_deref(), Some("7"));
        assert_eq!(line(&text, "mesh_publish_duration_seconds_count ").as_deref(), Some("1"));
        assert!(line(&text, "mesh_build_info{version=").is_some());
        #[cfg(target_os = "linux")]
        for name in ["process_resident_memory_bytes ", "process_open_fds ", "process_threads ", "process_start_time_seconds "] {
            assert!(line(&text, name).unwrap().parse::<f64>().unwrap() > 0.0, "{name}");
        }
    }
}
