//! What a run found, for people and as JSON.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use serde::Serialize;

use super::{
    check::{Verdict, Violation},
    faults::Moment,
    lines::Line,
    plan::Step,
    watch::Usage,
};

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

/// What was found of a line.
#[derive(Clone, Debug, Serialize)]
pub struct LineReport {
    /// The line.
    pub line: Line,
    /// What was found.
    pub verdict: Verdict,
    /// Publishes of which nobody knew.
    pub unsure: usize,
    /// The longest time in which a partition with work stood still, and when it began.
    pub longest_stall: Option<(Duration, Duration)>,
}

/// A run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The broker.
    pub broker: String,
    /// How long the load went on.
    pub length: Duration,
    /// Faults as planned.
    pub plan: Vec<Step>,
    /// Faults as they came.
    pub timeline: Vec<Moment>,
    /// What was found of each line.
    pub lines: Vec<LineReport>,
    /// Rebalances.
    pub rebalances: Vec<Rebalance>,
    /// How long it took after the load until everything was done.
    pub drained: Duration,
    /// The sidecars.
    pub usage: BTreeMap<String, Usage>,
    /// What failed that is of no single line.
    pub violations: Vec<Violation>,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.failed().next().is_none()
    }

    /// What failed, with the line's name.
    pub fn failed(&self) -> impl Iterator<Item = (&'static str, &Violation)> {
        let of_lines = self.lines.iter().flat_map(|one| one.verdict.violations.iter().map(|violation| (one.line.name, violation)));
        of_lines.chain(self.violations.iter().map(|violation| ("all", violation)))
    }

    /// How many records were acknowledged, over all lines.
    pub fn acknowledged(&self) -> usize {
        self.lines.iter().map(|one| one.verdict.acknowledged).sum()
    }

    /// As text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "seed {}, {}, {:.0} s", self.seed, self.broker, self.length.as_secs_f64())?;
        writeln!(text, "\ntimeline")?;
        for moment in &self.timeline {
            writeln!(text, "{:>8.1} s  {}", moment.at.as_secs_f64(), moment.what)?;
        }
        writeln!(text)?;
        for one in &self.lines {
            writeln!(text, "{}: {}", one.line.name, one.line.text())?;
        }
        let count = |text: &mut String, name: &str, of: &dyn Fn(&LineReport) -> usize| {
            write!(text, "{name:<34}")?;
            self.lines.iter().try_for_each(|one| write!(text, " {:>11}", of(one)))?;
            writeln!(text, " {:>9}", self.lines.iter().map(of).sum::<usize>())
        };
        write!(text, "\n{:<34}", "")?;
        self.lines.iter().try_for_each(|one| write!(text, " {:>11}", one.line.name))?;
        writeln!(text, " {:>9}", "all")?;
        count(text, "acknowledged", &|one| one.verdict.acknowledged)?;
        count(text, "stored in A", &|one| one.verdict.stored)?;
        count(text, "publishes in doubt", &|one| one.unsure)?;
        count(text, "processed", &|one| one.verdict.processed)?;
        count(text, "forwarded", &|one| one.verdict.forwarded)?;
        count(text, "ignored", &|one| one.verdict.ignored)?;
        count(text, "dead-lettered", &|one| one.verdict.dead_lettered)?;
        count(text, "of these out of attempts", &|one| one.verdict.exhausted)?;
        count(text, "put into retry topics", &|one| one.verdict.retried)?;
        count(text, "put into park topics", &|one| one.verdict.parked)?;
        count(text, "delivered again", &|one| one.verdict.delivered_again)?;
        count(text, "duplicates in B and dead letters", &|one| one.verdict.duplicates)?;
        count(text, "lost", &|one| one.verdict.lost)?;
        count(text, "reordered", &|one| one.verdict.reordered)?;
        count(text, "commits compared", &|one| one.verdict.samples)?;
        write!(text, "{:<34}", "longest stall of a partition, s")?;
        for one in &self.lines {
            write!(text, " {:>11.1}", one.longest_stall.map_or(0.0, |(length, _)| length.as_secs_f64()))?;
        }
        let longest = self.lines.iter().filter_map(|one| one.longest_stall).max();
        writeln!(text, " {:>9.1}", longest.map_or(0.0, |(length, _)| length.as_secs_f64()))?;
        if let Some((_, from)) = longest {
            writeln!(text, "{:<34} {:>8.1}", "the longest began at, s", from.as_secs_f64())?;
        }
        writeln!(text, "{:<34} {:>8.1}", "done after the load's end, s", self.drained.as_secs_f64())?;
        if !self.rebalances.is_empty() {
            writeln!(text, "\nstall per rebalance")?;
            for one in &self.rebalances {
                writeln!(text, "{:>8.1} s  {:>6.2} s  {}", one.at.as_secs_f64(), one.stall.as_secs_f64(), one.what)?;
            }
        }
        writeln!(text, "\nsidecar  starts  peak memory  peak descriptors  usual ones in the two halves of each process")?;
        for (name, usage) in &self.usage {
            let mb = usage.peak_bytes as f64 / 1e6;
            let halves: Vec<String> = usage.halves.iter().map(|(first, second)| format!("{first} {second}")).collect();
            writeln!(text, "{name:<7}  {:>6}  {mb:>8.1} MB  {:>16}  {}", usage.starts, usage.peak_descriptors, halves.join(", "))?;
        }
        if self.is_clean() {
            return writeln!(text, "\nno violation");
        }
        for (line, violation) in self.failed() {
            writeln!(text, "\nVIOLATION of check {} by {line}: {} ({} times)", violation.check, violation.what, violation.count)?;
            for offender in &violation.offenders {
                writeln!(text, "    {offender}")?;
            }
        }
        writeln!(text, "\nthe same faults again: --seed {}", self.seed)
    }
}
