//! What is measured: rates, the processor time of each process, memory, latencies.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The processes whose processor time is measured, by name.
#[derive(Clone, Debug, Default)]
pub struct Watch(Vec<(String, i32)>);

impl Watch {
    /// With a process, if it is known.
    #[must_use]
    pub fn with(mut self, name: &str, id: impl Into<Option<i32>>) -> Self {
        self.0.extend(id.into().map(|id| (name.to_owned(), id)));
        self
    }

    /// As arguments of a role.
    pub fn arguments(&self) -> Vec<String> {
        self.0.iter().map(|(name, id)| format!("--watch={name}={id}")).collect()
    }

    /// From the arguments of a role.
    ///
    /// # Errors
    /// If one is not `name=id`.
    pub fn parse(arguments: &[String]) -> Result<Self> {
        let parse = |text: &String| {
            let (name, id) = text.split_once('=').context("--watch name=id")?;
            Ok((name.to_owned(), id.parse()?))
        };
        arguments.iter().map(parse).collect::<Result<_>>().map(Self)
    }

    /// Begins to measure, at a count of records.
    ///
    /// # Errors
    /// If a process is gone.
    pub fn begin(self, records: u64) -> Result<Running> {
        let cpu = self.0.iter().map(|(_, id)| cpu_time(*id)).collect::<Result<_>>()?;
        Ok(Running { watch: self, cpu, records, begin: Instant::now() })
    }
}

/// A measurement under way.
#[derive(Debug)]
pub struct Running {
    watch: Watch,
    cpu: Vec<Duration>,
    records: u64,
    begin: Instant,
}

impl Running {
    /// Ends it, at a count of records.
    ///
    /// # Errors
    /// If a process is gone.
    pub fn end(self, records: u64) -> Result<Measured> {
        let seconds = self.begin.elapsed().as_secs_f64();
        let records = records.saturating_sub(self.records);
        let mut measured = Measured { records, seconds, ..Measured::default() };
        for ((name, id), before) in self.watch.0.into_iter().zip(self.cpu) {
            let used = cpu_time(id)?.saturating_sub(before).as_secs_f64();
            measured.cpu_us.insert(name.clone(), used * 1e6 / records.max(1) as f64);
            measured.peak_mib.insert(name.clone(), mib(peak_bytes(id)?));
            measured.resident_mib.insert(name, mib(resident_bytes(id)?));
        }
        Ok(measured)
    }
}

/// One measurement.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Records within the measured time.
    pub records: u64,
    /// The measured time.
    pub seconds: f64,
    /// Processor time, user and system, in µs a record, by process.
    pub cpu_us: BTreeMap<String, f64>,
    /// The peak of resident memory since its start, in MiB, by process.
    pub peak_mib: BTreeMap<String, f64>,
    /// The resident memory at its end, in MiB, by process.
    #[serde(default)]
    pub resident_mib: BTreeMap<String, f64>,
    /// Latencies, where they are what is measured.
    pub latency: Option<Latency>,
}

impl Measured {
    /// Records a second.
    pub fn rate(&self) -> f64 {
        self.records as f64 / self.seconds.max(1e-9)
    }
}

/// Percentiles in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    /// The median.
    pub p50: f64,
    /// 99 of 100 are below.
    pub p99: f64,
    /// 999 of 1,000 are below.
    pub p999: f64,
    /// The worst.
    pub max: f64,
}

impl Latency {
    /// From a histogram of nanoseconds.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e6;
        Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: histogram.max() as f64 / 1e6 }
    }
}

/// A histogram of nanoseconds up to a minute.
///
/// # Errors
/// Never: the bounds are good.
pub fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1_000, 60_000_000_000, 3)?)
}

/// The processor time of a process so far, user and system.
///
/// # Errors
/// If it is gone, or this is no Linux.
pub fn cpu_time(id: i32) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    let fields: Vec<&str> = text.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).context("stat").and_then(|field| Ok(field.parse::<u64>()?));
    // USER_HZ is 100 on every Linux that Rust supports.
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
}

/// The peak of the resident memory of a process.
///
/// # Errors
/// If it is gone, or this is no Linux.
pub fn peak_bytes(id: i32) -> Result<u64> {
    status(id, "VmHWM:")
}

/// The resident memory of a process.
///
/// # Errors
/// If it is gone, or this is no Linux.
pub fn resident_bytes(id: i32) -> Result<u64> {
    status(id, "VmRSS:")
}

/// How many threads a process has.
///
/// # Errors
/// If it is gone, or this is no Linux.
pub fn threads(id: i32) -> Result<u64> {
    Ok(field(id, "Threads:")?.parse()?)
}

/// Bytes as MiB.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn status(id: i32, name: &str) -> Result<u64> {
    Ok(field(id, name)?.trim_end_matches(" kB").trim().parse::<u64>()? * 1024)
}

fn field(id: i32, name: &str) -> Result<String> {
    let text = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    Ok(text.lines().find_map(|line| line.strip_prefix(name)).context("status")?.trim().to_owned())
}

/// The median of a process's time on the processor, in microseconds a record; `None` if it was not watched.
pub fn cpu_of(runs: &[Measured], process: &str) -> Option<f64> {
    let values: Vec<f64> = runs.iter().filter_map(|run| run.cpu_us.get(process)).copied().collect();
    (!values.is_empty()).then(|| median(&values))
}

/// The middle one; of an even number the mean of the two in the middle. 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}
