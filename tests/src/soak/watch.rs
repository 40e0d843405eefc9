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
    /// The usual number of descriptors (the median of the samples) in the first half of a process's life, and in the second, for each process that
    /// lived long enough, in order: a leak grows.
    pub halves: Vec<(usize, usize)>,
}

/// How many samples a process has at least that is judged: 40 s. Then its start is less than half of its first half, so the median does not see it.
const ENOUGH: usize = 80;

/// The halves of a process's life, if it was long enough. Medians, since the broker's faults and rebalances swing: connections break and are made
/// again, partitions go and come back.
fn halves(samples: &[usize]) -> Option<(usize, usize)> {
    let usual = |samples: &[usize]| {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        sorted[sorted.len() / 2]
    };
    let (first, second) = samples.split_at(samples.len() / 2);
    (samples.len() >= ENOUGH).then(|| (usual(first), usual(second)))
}

#[derive(Debug, Default)]
struct One {
    process: i32,
    usage: Usage,
    /// Descriptors of the present process, a sample each.
    samples: Vec<usize>,
}

impl One {
    fn saw(&mut self, descriptors: usize) {
        self.usage.peak_descriptors = self.usage.peak_descriptors.max(descriptors);
        self.samples.push(descriptors);
    }
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
        let ended = std::mem::take(&mut one.samples);
        one.usage.halves.extend(halves(&ended));
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
            one.saw(descriptors);
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
        let told = |one: &One| {
            let mut usage = one.usage.clone();
            usage.halves.extend(halves(&one.samples));
            usage
        };
        self.all().iter().map(|(name, one)| (name.clone(), told(one))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::bounds::{Bounds, broken},
        *,
    };

    /// What check 8 says of a sidecar whose processes had these descriptors.
    fn violations(processes: &[Vec<usize>]) -> Vec<String> {
        let watched = Watched::default();
        for samples in processes {
            watched.add("s0", 1);
            watched.all().values_mut().for_each(|one| samples.iter().for_each(|descriptors| one.saw(*descriptors)));
        }
        let bounds = Bounds { stall: Duration::ZERO, memory: u64::MAX };
        broken(&bounds, None, &watched.usage()).into_iter().flat_map(|violation| violation.offenders).collect()
    }

    /// 60 s: a process starts, and then has so many, and what is added to that.
    fn life(usual: usize, added: impl Fn(usize) -> usize) -> Vec<usize> {
        (0..120).map(|at| (10 * at).min(usual) + added(at)).collect()
    }

    #[test]
    fn check_8_a_leak_is_found_in_whichever_process_it_was() {
        let (sound, leaking) = (life(200, |_| 0), life(200, |at| 4 * at));
        assert!(violations(&[sound.clone(), sound.clone()]).is_empty());
        for processes in [vec![leaking.clone()], vec![leaking.clone(), sound.clone()], vec![sound.clone(), leaking, sound.clone()]] {
            assert_eq!(violations(&processes), ["s0: from 320 to 560"]);
        }
    }

    #[test]
    fn check_8_a_swing_is_no_leak() {
        // A rebalance late in its life brings the partitions of all others, for 12 s; a broker is away for 12 s early in it.
        assert!(violations(&[life(200, |at| if (70..94).contains(&at) { 400 } else { 0 })]).is_empty());
        assert!(violations(&[(0..120).map(|at| if (20..44).contains(&at) { 40 } else { 200 }).collect()]).is_empty());
        // It had its partitions from the start, or for a while of its first half only.
        assert!(violations(&[life(400, |_| 0), life(200, |at| if at < 40 { 400 } else { 0 })]).is_empty());
    }

    #[test]
    fn check_8_a_process_that_only_starts_is_not_judged() {
        let short = |length| (0..length).map(|at| 10 * at).collect::<Vec<usize>>();
        assert!(violations(&[short(ENOUGH - 1), short(3), Vec::new()]).is_empty());
        assert_eq!(violations(&[short(ENOUGH), short(3)]).len(), 1);
    }
}
