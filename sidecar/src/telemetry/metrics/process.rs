//! What the process uses, by the names that other exporters use: read when it is asked for.

use std::{fmt, fs, time::SystemTime};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::gauge::ConstGauge,
    registry::Unit,
};

/// Memory, descriptors and threads. What the system does not tell is left out.
#[derive(Debug)]
pub(super) struct Process {
    started: SystemTime,
}

impl Process {
    pub(super) fn new() -> Self {
        Self { started: SystemTime::now() }
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut gauge = |name: &str, help: &str, unit: Option<&Unit>, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
        };
        if let Ok(started) = self.started.duration_since(SystemTime::UNIX_EPOCH) {
            gauge("process_start_time", "When the process began, since 1970-01-01 UTC.", Some(&Unit::Seconds), started.as_secs_f64())?;
        }
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<f64>().ok()
        };
        if let Some(kib) = field("VmRSS:") {
            gauge("process_resident_memory", "Memory in use.", Some(&Unit::Bytes), kib * 1024.0)?;
        }
        if let Some(threads) = field("Threads:") {
            gauge("process_threads", "Threads of the process.", None, threads)?;
        }
        if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
            let open = u32::try_from(descriptors.count()).unwrap_or(u32::MAX);
            gauge("process_open_fds", "Open descriptors.", None, f64::from(open))?;
        }
        Ok(())
    }
}
