//! Counts the instructions of a process of this program: by the processor's counters (`perf`) where there are any, else by callgrind.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};

use super::work::Work;
use crate::process::{Output, run};

/// How long a counted run may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// A tool that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counter {
    /// `perf stat -e instructions:u`: virtual machines often have no such counter.
    Perf,
    /// `valgrind --tool=callgrind`.
    Callgrind,
}

impl Counter {
    /// Callgrind if it is there, else `perf` if it can count here. Callgrind comes first since its count does not depend on the processor.
    pub(super) async fn probe() -> Option<Self> {
        for counter in [Self::Callgrind, Self::Perf] {
            let mut command = counter.command();
            command.arg("true");
            // A tool that is not there is no fault.
            if let Ok(output) = run(command, Vec::new(), DEADLINE).await
                && counter.read(&output).is_ok()
            {
                return Some(counter);
            }
        }
        None
    }

    /// The instructions of one record of the work: those of a longer run without those of a shorter one, so that start and end do not count.
    pub(super) async fn per_record(self, work: Work) -> Result<f64> {
        let few = self.count(work, work.records()).await?;
        let many = self.count(work, 2 * work.records()).await?;
        let more = many.checked_sub(few).with_context(|| format!("{} of {few} and {many} instructions", work.name()))?;
        Ok(more as f64 / work.records() as f64)
    }

    async fn count(self, work: Work, records: u64) -> Result<u64> {
        let mut command = self.command();
        command.arg(std::env::current_exe()?).args(["role", "work", work.name(), &records.to_string()]);
        let output = run(command, Vec::new(), DEADLINE).await?;
        self.read(&output).with_context(|| format!("{} of {records} records: {}", work.name(), output.stderr))
    }

    fn command(self) -> Command {
        match self {
            Self::Perf => {
                let mut command = Command::new("perf");
                command.args(["stat", "-x,", "-e", "instructions:u", "--"]);
                command
            }
            Self::Callgrind => {
                let mut command = Command::new("valgrind");
                command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
                command
            }
        }
    }

    fn read(self, output: &Output) -> Result<u64> {
        anyhow::ensure!(output.status == Some(0), "{} ended with {:?}", output.name, output.status);
        let count = match self {
            // 123456,,instructions:u,…
            Self::Perf => output.stderr.lines().find_map(|line| line.contains("instructions").then(|| line.split(',').next())?),
            // ==7== Collected : 123456
            Self::Callgrind => output.stderr.lines().find_map(|line| line.split_once("Collected : ")).map(|(_, count)| count),
        };
        Ok(count.context("no count")?.trim().parse()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(stderr: &str) -> Output {
        Output { name: "tool".into(), status: Some(0), stdout: String::new(), stderr: stderr.into() }
    }

    #[test]
    fn counts_are_read() {
        let callgrind = said("==7== Callgrind\n==7== \n==7== Events    : Ir\n==7== Collected : 183442\n");
        assert_eq!(Counter::Callgrind.read(&callgrind).unwrap(), 183_442);
        assert_eq!(Counter::Perf.read(&said("183442,,instructions:u,901,100.00,,\n")).unwrap(), 183_442);
    }

    #[test]
    fn a_machine_without_counters_has_no_count() {
        assert!(Counter::Perf.read(&said("<not supported>,,instructions:u,0,100.00,,\n")).is_err());
    }
}
