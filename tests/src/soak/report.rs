//! What a run found, for people and as JSON.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use serde::Serialize;

use super::{check::Verdict, faults::Moment, plan::Step, watch::Usage};

/// A stall at a rebalance.
#[derive(Clone, Debug, Serialize)]
pub struct Rebalance {
    /// When, since the begin.
    pub at: Duration,
    /// What caused it.
    pub what: String,
    /// The longest time in which a partition with work stood still, until the next one.
    pub stall: Duration,
}

/// A run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The broker.
    pub broker: String,
    /// The route's guarantee.
    pub guarantee: &'static str,
    /// How long the load went on.
    pub length: Duration,
    /// Faults as planned.
    pub plan: Vec<Step>,
    /// Faults as they came.
    pub timeline: Vec<Moment>,
    /// What was found.
    pub verdict: Verdict,
    /// Publishes of which nobody knew.
    pub unsure: usize,
    /// The longest time in which a partition with work stood still, and when it began.
    pub longest_stall: Option<(Duration, Duration)>,
    /// Rebalances.
    pub rebalances: Vec<Rebalance>,
    /// How long it took after the load until everything was done.
    pub drained: Duration,
    /// The sidecars.
    pub usage: BTreeMap<String, Usage>,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.verdict.violations.is_empty()
    }

    /// As text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let v = &self.verdict;
        writeln!(text, "seed {}, {}, {}, {:.0} s", self.seed, self.broker, self.guarantee, self.length.as_secs_f64())?;
        writeln!(text, "\ntimeline")?;
        for moment in &self.timeline {
            writeln!(text, "{:>8.1} s  {}", moment.at.as_secs_f64(), moment.what)?;
        }
        let rows: [(&str, String); 14] = [
            ("acknowledged", v.acknowledged.to_string()),
            ("stored in A", v.stored.to_string()),
            ("publishes in doubt", self.unsure.to_string()),
            ("processed", v.processed.to_string()),
            ("forwarded", v.forwarded.to_string()),
            ("ignored", v.ignored.to_string()),
            ("dead-lettered (out of attempts)", format!("{} ({})", v.dead_lettered, v.exhausted)),
            ("duplicates in B and dead letters", v.duplicates.to_string()),
            ("delivered again", v.delivered_again.to_string()),
            ("lost", v.lost.to_string()),
            ("reordered", v.reordered.to_string()),
            ("commits compared", v.samples.to_string()),
            (
                "longest stall of a partition",
                self.longest_stall
                    .map_or_else(|| "none".into(), |(length, at)| format!("{:.1} s, from {:.1} s", length.as_secs_f64(), at.as_secs_f64())),
            ),
            ("done after the load's end", format!("{:.1} s", self.drained.as_secs_f64())),
        ];
        writeln!(text)?;
        for (name, value) in rows {
            writeln!(text, "{name:<34} {value:>10}")?;
        }
        if !self.rebalances.is_empty() {
            writeln!(text, "\nstall per rebalance")?;
            for one in &self.rebalances {
                writeln!(text, "{:>8.1} s  {:>6.2} s  {}", one.at.as_secs_f64(), one.stall.as_secs_f64(), one.what)?;
            }
        }
        writeln!(text, "\nsidecar  starts  peak memory  peak descriptors")?;
        for (name, usage) in &self.usage {
            let mib = usage.peak_bytes as f64 / f64::from(1 << 20);
            writeln!(text, "{name:<7}  {:>6}  {mib:>7.1} MiB  {:>16}", usage.starts, usage.peak_descriptors)?;
        }
        if self.is_clean() {
            return writeln!(text, "\nno violation");
        }
        for violation in &v.violations {
            writeln!(text, "\nVIOLATION of check {}: {} ({} times)", violation.check, violation.what, violation.count)?;
            for offender in &violation.offenders {
                writeln!(text, "    {offender}")?;
            }
        }
        writeln!(text, "\nthe same faults again: --seed {}", self.seed)
    }
}
