//! Flags of the commands that look after running sidecars.

use std::time::Duration;

use clap::Args;

use crate::picture::Sort;

/// `drain`.
#[derive(Debug, Args)]
#[command(after_help = DRAIN_HELP)]
pub(crate) struct Drain {
    /// The instance, as `status` names it; without it, the one that is asked.
    pub(crate) instance: Option<String>,
    /// Do it. Without this, it is only shown what it does, and who takes over.
    #[arg(long)]
    pub(crate) execute: bool,
    /// How long to wait until it has ended.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = super::patience)]
    pub(crate) wait: Duration,
    /// Return as soon as it drains.
    #[arg(long, conflicts_with = "wait")]
    pub(crate) no_wait: bool,
}

const DRAIN_HELP: &str = "\
A sidecar that drains delivers nothing more, waits for what is at its services, commits, gives its partitions
away, and ends. Its services can publish to the last. What did not finish is delivered again elsewhere, never
dead-lettered. Whoever started the process may start it again.

Exit code 4: it was asked, and had not ended in time, or did not answer; it goes on draining.

  mesh-ctl drain
  mesh-ctl drain pricing-1 --execute --wait 2m";

/// `top`.
#[derive(Debug, Args)]
#[command(after_help = TOP_HELP)]
pub(crate) struct Top {
    /// How often the mesh is looked at.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = super::interval)]
    pub(crate) interval: Duration,
    /// Print one table and end.
    #[arg(long, conflicts_with = "count")]
    pub(crate) once: bool,
    /// Print so many tables, one after the other, and end.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// By what routes are sorted.
    #[arg(long, value_name = "BY", value_enum, default_value_t = Sort::Trouble)]
    pub(crate) sort: Sort,
}

const TOP_HELP: &str = "\
The full screen on a terminal; tables one after the other if stdout or stdin is none, with --once and with -n.
`-o json` prints one JSON object a line.

Keys: q quits; the arrows, j, k, page up and down, g and G move; s sorts by something else; p holds the picture.

  mesh-ctl top
  mesh-ctl top --sort lag --interval 5s
  mesh-ctl top --once -o json";
