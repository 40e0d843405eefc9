//! The guard: holds figures that travel between machines against committed ones, and fails when one is clearly worse.
//!
//! Two kinds of figures travel. A **ratio** of a row to its floor, both measured in turn in the same rounds. And the **instructions** of a
//! fixed piece of work in one thread (`work`), where a tool that counts them is there (`count`): they hardly depend on what else runs.
//!
//! Invariant: a figure that seems worse is measured once more, and only what is worse both times counts as worse: a shared machine has moods.
//! Invariant: a figure that cannot be measured here is named, and a guard that could measure nothing fails.

mod count;
pub mod work;

use std::{collections::BTreeMap, fmt::Write as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use self::{count::Counter, work::Work};
use super::{
    ground::Bench,
    measure::median,
    rows::{Effort, Kind},
};

/// A figure may be so much worse than the committed one.
const TOLERANCE: f64 = 0.15;

/// How long all of it may take.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// The rows whose ratios are guarded, on each broker that is there.
const ROWS: [Kind; 4] = [Kind::PushHttp, Kind::PushStream, Kind::PublishHttp, Kind::PublishStream];

/// How much the guard measures of a row.
pub fn effort() -> Effort {
    Effort { rounds: 3, records: 30_000, seconds: 1.5, warmup: 0.5, sidecars: 2, routes: 10, kafka: Vec::new(), env: Vec::new() }
}

/// The committed figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// How they were taken: the command, the machine, the compiler.
    pub taken: String,
    /// By name: `instructions/<work>`, less is better; `<broker>/<row>`, the ratio to its floor, more is better.
    pub figures: BTreeMap<String, f64>,
}

impl Baseline {
    /// From a file.
    ///
    /// # Errors
    /// If it cannot be read, or holds nothing.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let baseline: Self = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
        if baseline.figures.is_empty() {
            bail!("{} has no figures: take them with --guard-take on a machine that does nothing else", file.display());
        }
        Ok(baseline)
    }

    /// Into a file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        std::fs::write(file, serde_json::to_string_pretty(self)? + "\n").with_context(|| file.display().to_string())
    }
}

/// What was found of a figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// The committed one.
    pub committed: f64,
    /// What was measured, at most twice; empty if it cannot be measured here.
    pub measured: Vec<f64>,
    /// Why it was not measured.
    pub missing: Option<String>,
}

impl Found {
    /// How much worse the best measurement is, as a part of the committed figure: 0.2 is a fifth worse, below 0 is better.
    pub fn fall(&self) -> Option<f64> {
        let fall = |measured: &f64| match lower_is_better(&self.name) {
            true => measured / self.committed - 1.0,
            false => 1.0 - measured / self.committed,
        };
        self.measured.iter().map(fall).reduce(f64::min)
    }

    /// Whether it is worse than it may be.
    pub fn fell(&self) -> bool {
        // What is no number is no good figure either.
        self.fall().is_some_and(|fall| fall.is_nan() || fall > TOLERANCE)
    }
}

fn lower_is_better(name: &str) -> bool {
    name.starts_with("instructions/")
}

/// Measures every committed figure, and once more what seems worse. `measure` gives `None` for what cannot be measured here.
///
/// # Errors
/// If nothing could be measured.
pub async fn judge(baseline: &Baseline, mut measure: impl AsyncFnMut(&str) -> Result<Option<f64>>) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (name, committed) in &baseline.figures {
        let mut found = Found { name: name.clone(), committed: *committed, measured: Vec::new(), missing: None };
        for _ in 0..2 {
            match measure(name).await {
                Ok(Some(figure)) => found.measured.push(figure),
                Ok(None) => found.missing = Some("this machine has not what it needs".into()),
                Err(error) => found.missing = Some(format!("{error:#}")),
            }
            if found.missing.is_some() || !found.fell() {
                break;
            }
        }
        eprintln!("{}", line(&found));
        all.push(found);
    }
    if all.iter().all(|found| found.measured.is_empty()) {
        bail!("nothing could be measured: {}", all.iter().map(line).collect::<Vec<_>>().join("; "));
    }
    Ok(all)
}

/// The result as Markdown.
pub fn markdown(found: &[Found]) -> String {
    let mut out = String::from("| figure | committed | measured | |\n|---|---|---|---|\n");
    for found in found {
        // Writing into a string cannot fail.
        let _ = writeln!(out, "| {} |", line(found).replace(": ", " | "));
    }
    out
}

fn line(found: &Found) -> String {
    let measured: Vec<String> = found.measured.iter().map(|figure| short(*figure)).collect();
    let word = match (found.fall(), &found.missing) {
        (None, missing) => format!("not measured ({})", missing.as_deref().unwrap_or_default().lines().next().unwrap_or_default()),
        (Some(fall), _) if found.fell() => format!("WORSE by {:.0} %", fall * 100.0),
        (Some(_), _) => "good".to_owned(),
    };
    format!("{}: {}: {}: {word}", found.name, short(found.committed), measured.join(", "))
}

fn short(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

/// Measures figures on the brokers and with the tools that are here.
#[derive(Debug)]
pub struct Guard {
    benches: Vec<Bench>,
    counter: Option<Counter>,
}

impl Guard {
    /// On these brokers, whose effort should be [`effort`].
    pub async fn new(benches: Vec<Bench>) -> Self {
        Self { benches, counter: Counter::probe().await }
    }

    /// Everything that can be guarded here, by name.
    pub fn names(&self) -> Vec<String> {
        let works = Work::ALL.iter().filter(|_| self.counter.is_some()).map(|work| format!("instructions/{}", work.name()));
        let rows = self.benches.iter().flat_map(|bench| ROWS.map(|kind| format!("{}/{}", bench.name(), kind.name())));
        works.chain(rows).collect()
    }

    /// Measures one figure; `None` if its broker or its tool is not here.
    ///
    /// # Errors
    /// If there is no such figure, or it could not be measured.
    pub async fn measure(&self, name: &str) -> Result<Option<f64>> {
        let (group, what) = name.split_once('/').with_context(|| format!("no figure: {name}"))?;
        if group == "instructions" {
            let work = *Work::ALL.iter().find(|work| work.name() == what).with_context(|| format!("no such work: {what}"))?;
            return match self.counter {
                Some(counter) => counter.per_record(work).await.map(Some),
                None => Ok(None),
            };
        }
        let kind = *ROWS.iter().find(|kind| kind.name() == what).with_context(|| format!("no guarded row: {what}"))?;
        let Some(bench) = self.benches.iter().find(|bench| bench.name() == group) else { return Ok(None) };
        let row = bench.measure(kind).await;
        if let Some(failed) = row.failed {
            bail!("{failed}");
        }
        Ok(Some(median(&row.ratios())))
    }

    /// Takes every figure that can be taken here.
    ///
    /// # Errors
    /// If one could not be measured.
    pub async fn take(&self, taken: String) -> Result<Baseline> {
        let mut figures = BTreeMap::new();
        for name in self.names() {
            let figure = self.measure(&name).await?.context("what can be measured was not")?;
            eprintln!("{name}: {}", short(figure));
            figures.insert(name, figure);
        }
        Ok(Baseline { taken, figures })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn baseline(figures: &[(&str, f64)]) -> Baseline {
        Baseline { taken: "test".into(), figures: figures.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect() }
    }

    /// Judges one figure that comes out so, time after time, and says what was found and how often it was measured.
    async fn judged(name: &str, committed: f64, figures: &[f64]) -> (Found, usize) {
        let (baseline, mut times) = (baseline(&[(name, committed)]), 0);
        let found = judge(&baseline, async |_| {
            times += 1;
            Ok(figures.get(times - 1).copied())
        });
        let found = found.await.unwrap().remove(0);
        (found, times)
    }

    #[tokio::test]
    async fn a_ratio_that_is_worse_twice_fails() {
        let (found, times) = judged("kafka/push-http", 0.50, &[0.42, 0.41]).await;
        assert!(found.fell() && times == 2, "{found:?}");
        assert!(markdown(&[found]).contains("| kafka/push-http | 0.500 | 0.420, 0.410 | WORSE by 16 % |"));
    }

    #[tokio::test]
    async fn more_instructions_fail_and_fewer_do_not() {
        let (found, _) = judged("instructions/lanes", 1_000.0, &[1_160.0, 1_160.0]).await;
        assert!(found.fell());
        let (found, times) = judged("instructions/lanes", 1_000.0, &[400.0]).await;
        assert!(!found.fell() && times == 1);
    }

    #[tokio::test]
    async fn a_figure_that_is_worse_once_is_a_mood_of_the_machine() {
        let (found, times) = judged("embedded/publish-http", 0.50, &[0.30, 0.49]).await;
        assert!(!found.fell() && times == 2);
    }

    #[tokio::test]
    async fn a_little_worse_is_not_worse_and_is_measured_once() {
        let (found, times) = judged("embedded/publish-http", 0.50, &[0.43]).await;
        assert!(!found.fell() && times == 1);
    }

    #[tokio::test]
    async fn what_is_no_number_fails() {
        let (found, _) = judged("kafka/push-http", 0.50, &[f64::NAN, f64::NAN]).await;
        assert!(found.fell());
    }

    #[tokio::test]
    async fn what_cannot_be_measured_is_named_and_nothing_at_all_fails() {
        let two = baseline(&[("instructions/lanes", 1_000.0), ("kafka/push-http", 0.5)]);
        let found = judge(&two, async |name| Ok(lower_is_better(name).then_some(1_000.0))).await.unwrap();
        assert!(!found.iter().any(Found::fell));
        assert!(markdown(&found).contains("not measured"), "{found:?}");
        let failed = judge(&two, async |_| bail!("no broker")).await.unwrap_err();
        assert!(failed.to_string().contains("no broker"), "{failed:#}");
    }

    #[test]
    fn a_file_without_figures_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        baseline(&[]).write(file.path()).unwrap();
        assert!(Baseline::read(file.path()).unwrap_err().to_string().contains("--guard-take"));
        let some = baseline(&[("kafka/push-http", 0.5)]);
        some.write(file.path()).unwrap();
        assert_eq!(Baseline::read(file.path()).unwrap(), some);
    }
}
