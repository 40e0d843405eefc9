//! Check 8: the work goes on, and memory and descriptors stay within their bounds.

use std::{collections::BTreeMap, time::Duration};

use super::{check::Violation, watch::Usage};

/// What check 8 allows.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The longest time in which a partition with work may stand still.
    pub stall: Duration,
    /// The most memory of a sidecar, in bytes.
    pub memory: u64,
}

/// What goes beyond.
pub fn broken(bounds: &Bounds, stall: Option<Duration>, usage: &BTreeMap<String, Usage>) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut add = |what: &str, offenders: Vec<String>| {
        if !offenders.is_empty() {
            violations.push(Violation { check: 8, what: what.to_owned(), count: offenders.len(), offenders });
        }
    };
    let stood = stall.filter(|stall| *stall > bounds.stall).map(|stall| format!("{stall:.1?} where {:?} are allowed", bounds.stall));
    add("a partition with work stood still", stood.into_iter().collect());
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let heavy = usage.iter().filter(|(_, usage)| usage.peak_bytes > bounds.memory);
    let heavy = heavy.map(|(name, usage)| format!("{name}: {:.1} MB where {:.1} are allowed", mb(usage.peak_bytes), mb(bounds.memory)));
    add("a sidecar took too much memory", heavy.collect());
    let processes = usage.iter().flat_map(|(name, usage)| usage.halves.iter().map(move |halves| (name, halves)));
    let leaking = processes.filter(|(_, (first, second))| *second > first + first / 2 + 32);
    add("descriptors grow", leaking.map(|(name, (first, second))| format!("{name}: from {first} to {second}")).collect());
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { stall: Duration::from_secs(60), memory: 80_000_000 };

    fn usage(peak_bytes: u64, halves: &[(usize, usize)]) -> BTreeMap<String, Usage> {
        BTreeMap::from([("s0".to_owned(), Usage { starts: 1, peak_bytes, peak_descriptors: 200, halves: halves.to_vec() })])
    }

    fn fails(stall: u64, usage: &BTreeMap<String, Usage>) -> Vec<String> {
        broken(&BOUNDS, Some(Duration::from_secs(stall)), usage).into_iter().map(|violation| violation.what).collect()
    }

    #[test]
    fn check_8_what_is_within_its_bounds_passes() {
        assert!(fails(60, &usage(80_000_000, &[(100, 140)])).is_empty());
        assert!(broken(&BOUNDS, None, &usage(0, &[])).is_empty());
    }

    #[test]
    fn check_8_a_partition_that_stands_still() {
        assert_eq!(fails(61, &usage(1, &[(1, 1)])), ["a partition with work stood still"]);
    }

    #[test]
    fn check_8_memory_beyond_the_bound() {
        assert_eq!(fails(1, &usage(80_000_001, &[(1, 1)])), ["a sidecar took too much memory"]);
    }

    #[test]
    fn check_8_descriptors_that_grow() {
        assert!(fails(1, &usage(1, &[(100, 182), (300, 300)])).is_empty());
        for halves in [[(100, 183), (100, 100)], [(100, 100), (100, 183)]] {
            assert_eq!(fails(1, &usage(1, &halves)), ["descriptors grow"]);
        }
    }
}
