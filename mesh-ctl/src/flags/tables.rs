//! The flags of what changes and compares tables: `apply`, `rollback`, `rollout`, `diff`, `history`, `keys`.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use mesh_routing::channel::Selector;

use super::Source;

/// `apply`.
#[derive(Debug, Args)]
#[command(after_help = APPLY_HELP)]
pub(crate) struct Apply {
    /// The file; `-` is stdin.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Source,
    #[command(flatten)]
    pub(crate) how: How,
    /// Only these instances run it, until it is promoted or aborted (`rollout`): of services, of instances, with labels, a share of them. What is
    /// given of different kinds must all fit.
    #[arg(long, value_name = "SELECTOR", help_heading = "Canary")]
    pub(crate) canary: Option<Selector>,
    /// Abort the canary when its instances have more dead letters than this, together, since they took it.
    #[arg(long, value_name = "N", default_value = "0", requires = "canary", help_heading = "Canary")]
    pub(crate) max_dead_letters: u64,
    /// Abort the canary when more instances than this refuse it.
    #[arg(long, value_name = "N", default_value = "0", requires = "canary", help_heading = "Canary")]
    pub(crate) max_refusals: u64,
}

const APPLY_HELP: &str = "\
Examples:
  mesh-ctl apply -f routes.yaml --dry-run
  mesh-ctl apply -f routes.yaml --message 'prices are rounded' --wait
  mesh-ctl apply -f routes.yaml --canary service=pricing,percent=10 --max-dead-letters 5 --wait
  mesh-ctl apply -f routes.yaml --canary label.zone=a,label.stage=early
  mesh-ctl apply -f routes.yaml --canary instance=pricing-0,instance=pricing-1";

/// `rollout`.
#[derive(Debug, Subcommand)]
pub(crate) enum Rollout {
    /// Show the canary: who runs it, what it counts, how it ended.
    Status(RolloutStatus),
    /// Apply the canary's table to all, as a new generation.
    Promote(RolloutPromote),
    /// End the canary: its instances go back to what the others run.
    Abort(RolloutAbort),
}

/// `rollout status`.
#[derive(Debug, Args)]
pub(crate) struct RolloutStatus {
    /// Show it again and again, every 2 s or as often as given.
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "2s", value_parser = super::interval)]
    pub(crate) watch: Option<Duration>,
    /// End after so many looks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "watch")]
    pub(crate) count: Option<u64>,
}

/// `rollout promote`.
#[derive(Debug, Args)]
pub(crate) struct RolloutPromote {
    /// Only if this generation is the canary.
    #[arg(long, value_name = "N")]
    pub(crate) generation: Option<u64>,
    #[command(flatten)]
    pub(crate) how: How,
}

/// `rollout abort`.
#[derive(Debug, Args)]
pub(crate) struct RolloutAbort {
    /// Only if this generation is the canary.
    #[arg(long, value_name = "N")]
    pub(crate) generation: Option<u64>,
    /// Why, for those who look at `rollout status` and `history`.
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Wait until no live instance runs it any more.
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long that may take.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = super::patience, requires = "wait")]
    pub(crate) timeout: Duration,
}

/// `rollback`.
#[derive(Debug, Args)]
#[command(after_help = ROLLBACK_HELP)]
pub(crate) struct Rollback {
    /// The generation whose content comes back; `history` lists what there is.
    #[arg(value_name = "N")]
    pub(crate) generation: u64,
    #[command(flatten)]
    pub(crate) how: How,
}

const ROLLBACK_HELP: &str = "\
Generations only grow: the old content is applied as a new generation, with everything that `apply` checks. It
is applied only if nobody else applied meanwhile.

  mesh-ctl rollback 41 --dry-run
  mesh-ctl rollback 41 --message 'prices were rounded' --wait";

/// How a table is applied.
#[derive(Debug, Args)]
pub(crate) struct How {
    /// Check everything, against the mesh too, and apply nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Apply only if this generation is in force (`get` and `status` tell it).
    #[arg(long, value_name = "N")]
    pub(crate) expect_generation: Option<u64>,
    /// Why, for `history`; at most 1000 characters.
    #[arg(short, long, value_name = "TEXT", value_parser = message)]
    pub(crate) message: Option<String>,
    /// Sign the table with this private key (`keys generate`). Sidecars with `control.trusted_keys` take no other.
    #[arg(long, value_name = "FILE", env = "MESH_SIGN_KEY")]
    pub(crate) sign_key: Option<PathBuf>,
    /// Wait until all live instances run the table. Fails, with the reasons, when one refuses it.
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = super::patience, requires = "wait")]
    pub(crate) timeout: Duration,
}

/// What the sidecar keeps of a message; more would be cut there.
fn message(text: &str) -> Result<String, String> {
    match text.chars().count() {
        0..=1_000 => Ok(text.to_owned()),
        many => Err(format!("it has {many} characters; use at most 1000")),
    }
}

/// `diff`.
#[derive(Debug, Args)]
#[command(after_help = DIFF_HELP)]
pub(crate) struct Diff {
    /// To this file; `-` is stdin. Alone: what applying it would change.
    #[arg(short, long, value_name = "FILE", conflicts_with = "to", required_unless_present_any = ["generation", "from", "to"])]
    pub(crate) file: Option<Source>,
    /// From this generation; as `--from N`.
    #[arg(long, value_name = "N", conflicts_with = "from")]
    pub(crate) generation: Option<u64>,
    /// From this: a generation, a file, or `live`, which is the table in force and the default.
    #[arg(long, value_name = "N|FILE|live")]
    pub(crate) from: Option<Side>,
    /// To this; as --from.
    #[arg(long, value_name = "N|FILE|live")]
    pub(crate) to: Option<Side>,
}

const DIFF_HELP: &str = "\
Examples:
  mesh-ctl diff -f routes.yaml                 what applying it would change
  mesh-ctl diff --generation 41                what changed since generation 41
  mesh-ctl diff --from 41 --to 42              what generation 42 changed
  mesh-ctl diff --from 41 --to routes.yaml
  mesh-ctl diff --from old.yaml --to new.yaml  needs no sidecar";

/// One side of a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The table in force.
    Live,
    /// A generation of the history.
    Generation(u64),
    /// A file.
    File(Source),
}

impl From<OsString> for Side {
    fn from(value: OsString) -> Self {
        match value.to_str() {
            Some("live") => Self::Live,
            Some(text) => text.parse().map_or_else(|_| Self::File(value.into()), Self::Generation),
            None => Self::File(value.into()),
        }
    }
}

/// `history`.
#[derive(Debug, Args)]
pub(crate) struct History {
    /// At most so many generations, the newest first; 0: all that the mesh keeps.
    #[arg(long, value_name = "N", default_value = "0")]
    pub(crate) limit: u32,
}

/// `keys`.
#[derive(Debug, Subcommand)]
pub(crate) enum Keys {
    /// Make a key that signs routing tables. The private key goes to a file, the public key is printed: it belongs into
    /// `control.trusted_keys` of every sidecar.
    Generate(KeysGenerate),
    /// Show the id and the public key of a private key.
    Show(KeysShow),
}

/// `keys generate`.
#[derive(Debug, Args)]
pub(crate) struct KeysGenerate {
    /// The file of the private key; it must not exist yet.
    #[arg(long, value_name = "FILE", default_value = "mesh.key")]
    pub(crate) out: PathBuf,
}

/// `keys show`.
#[derive(Debug, Args)]
pub(crate) struct KeysShow {
    /// The file of the private key.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides() {
        let side = |text: &str| Side::from(OsString::from(text));
        assert_eq!((side("live"), side("41"), side("-")), (Side::Live, Side::Generation(41), Side::File(Source::Stdin)));
        for file in ["./41", "41.yaml", "-1", "live.yaml"] {
            assert_eq!(side(file), Side::File(Source::File(file.into())));
        }
    }

    #[test]
    fn messages_are_bounded() {
        assert_eq!(message(&"ä".repeat(1_000)), Ok("ä".repeat(1_000)));
        assert!(message(&"ä".repeat(1_001)).unwrap_err().contains("1001"));
    }
}
