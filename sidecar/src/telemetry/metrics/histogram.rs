//! Histograms of durations and of sizes for hot paths.
//!
//! Invariant: observing takes no lock: two atomic additions. (The library's histogram locks a mutex for each observation.)
//! Invariant: a scrape may see an observation's bucket before its sum; both are monotonic.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::{MetricType, TypedMetric},
};

/// The buckets' upper bounds, in microseconds: from a call on the same machine to a handler that takes its time.
const BOUNDS: [u32; 18] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000,
    30_000_000, 60_000_000,
];

/// Durations, in seconds, in buckets from 100 µs to 60 s. Cheap to clone; clones are the same histogram.
#[derive(Clone, Default)]
pub struct Durations(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// One for each bound, and one for what is longer.
    counts: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
}

impl Durations {
    /// Counts a duration.
    pub fn observe(&self, duration: Duration) {
        let bucket = BOUNDS.partition_point(|bound| Duration::from_micros(u64::from(*bound)) < duration);
        if let Some(count) = self.0.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.0.nanos.fetch_add(u64::try_from(duration.as_nanos()).unwrap_or(0), Ordering::Relaxed);
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.0.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

impl fmt::Debug for Durations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Durations").field("count", &self.count()).finish_non_exhaustive()
    }
}

impl TypedMetric for Durations {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Durations {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let bounds = BOUNDS.iter().map(|micros| f64::from(*micros) / 1e6).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(self.0.counts.iter().map(|count| count.load(Ordering::Relaxed))).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = Duration::from_nanos(self.0.nanos.load(Ordering::Relaxed)).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// The buckets' upper bounds of [`Sizes`].
const SIZES: [u32; 13] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000];

/// Numbers of records, in buckets from 1 to 10,000. Cheap to clone; clones are the same histogram.
#[derive(Clone, Debug, Default)]
pub struct Sizes(Arc<SizesInner>);

#[derive(Debug, Default)]
struct SizesInner {
    counts: [AtomicU64; SIZES.len() + 1],
    sum: AtomicU64,
}

impl Sizes {
    /// Counts a number of records.
    pub fn observe(&self, records: usize) {
        let bucket = SIZES.partition_point(|bound| (*bound as usize) < records);
        if let Some(count) = self.0.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.0.sum.fetch_add(records as u64, Ordering::Relaxed);
    }
}

impl TypedMetric for Sizes {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Sizes {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let bounds = SIZES.iter().map(|bound| f64::from(*bound)).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(self.0.counts.iter().map(|count| count.load(Ordering::Relaxed))).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(self.0.sum.load(Ordering::Relaxed) as f64, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}
