//! What is counted about publishing. Labels are topics that exist and stable codes, never keys, ids or what a caller made up.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// The metrics of publishing. Cheap to clone; all clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) records: Family<TopicLabel, Counter>,
    pub(super) bytes: Family<TopicLabel, Counter>,
    pub(super) failures: Family<FailureLabels, Counter>,
    pub(super) malformed_traceparents: Counter,
    pub(super) in_flight: Gauge,
    pub(super) duration: Histogram,
}

/// A topic that exists.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct TopicLabel {
    /// Its name.
    pub topic: String,
}

/// Where and why a publish failed.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct FailureLabels {
    /// The topic; empty if it is not known to exist.
    pub topic: String,
    /// The problem's code.
    pub code: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            records: Family::default(),
            bytes: Family::default(),
            failures: Family::default(),
            malformed_traceparents: Counter::default(),
            in_flight: Gauge::default(),
            // 250 µs to about 8 s.
            duration: Histogram::new(exponential_buckets(0.000_25, 2.0, 16)),
        }
    }
}

impl Metrics {
    /// Puts the metrics into a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("mesh_published_records", "Records acknowledged by the broker, by topic", self.records.clone());
        registry.register_with_unit(
            "mesh_published",
            "Keys and values acknowledged by the broker, by topic",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register("mesh_publish_failures", "Records not published, or not known to be, by topic and code", self.failures.clone());
        registry.register(
            "mesh_publish_malformed_traceparents",
            "Records published with a malformed traceparent, which was ignored",
            self.malformed_traceparents.clone(),
        );
        registry.register("mesh_publish_in_flight", "Records sent and not acknowledged yet", self.in_flight.clone());
        registry.register_with_unit(
            "mesh_publish_duration",
            "Time from a publish to the acknowledgement of its records, by batch",
            Unit::Seconds,
            self.duration.clone(),
        );
    }
}
