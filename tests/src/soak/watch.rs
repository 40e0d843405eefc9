//! Memory and descriptors of the sidecars, sampled from `/proc`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::bench::measure::{peak_bytes, resident_bytes};

/// What was seen of one sidecar, over all its processes.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Usage {
    /// How many processes it had.
    pub starts: usize,
    /// The peak of resident memory, in bytes.
    pub peak_bytes: u64,
    /// The most descriptors.
    pub peak_descriptors: usize,
    /// The most descriptors in the first half of the last process's samples, and in the second: a leak grows.
    pub halves: (usize, usize),
}

#[derive(Debug, Default)]
struct One {
    process: i32,
    usage: Usage,
    /// Descriptors of the present process, a sample each.
    samples: Vec<usize>,
}

/// The sidecars that are watched. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Watched(Arc<Mutex<BTreeMap<String, One>>>);

impl Watched {
    /// A sidecar's new process.
    pub fn add(&self, name: &str, process: i32) {
        let mut all = self.all();
        let one = all.entry(name.to_owned()).or_default();
        one.process = process;
        one.usage.starts += 1;
        one.samples.clear();
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, One>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sample(&self) {
        for one in self.all().values_mut() {
            let process = one.process;
            // One that is gone just now has nothing to show.
            let Ok(resident) = resident_bytes(process) else { continue };
            one.usage.peak_bytes = one.usage.peak_bytes.max(resident).max(peak_bytes(process).unwrap_or(0));
            let Ok(folder) = std::fs::read_dir(format!("/proc/{process}/fd")) else { continue };
            let descriptors = folder.count();
            one.usage.peak_descriptors = one.usage.peak_descriptors.max(descriptors);
            one.samples.push(descriptors);
        }
    }

    /// Samples until it is stopped.
    pub async fn run(self, stop: CancellationToken) {
        let mut every = tokio::time::interval(Duration::from_millis(500));
        while stop.run_until_cancelled(every.tick()).await.is_some() {
            self.sample();
        }
    }

    /// What was seen, by name.
    pub fn usage(&self) -> BTreeMap<String, Usage> {
        let with_halves = |one: &One| {
            let (first, second) = one.samples.split_at(one.samples.len() / 2);
            let most = |samples: &[usize]| samples.iter().copied().max().unwrap_or(0);
            Usage { halves: (most(first), most(second)), ..one.usage.clone() }
        };
        self.all().iter().map(|(name, one)| (name.clone(), with_halves(one))).collect()
    }
}
