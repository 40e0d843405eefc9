//! The benchmarks: `cargo run --release -p mesh-tests --bin bench`. See BENCHMARKS.md.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use mesh_tests::bench::{
    curves::{self, Curve, Length},
    ground::Bench,
    guard::{self, Baseline, Guard},
    report,
    role::Role,
    rows::{Effort, Kind},
};

/// Measures the rows of the design's table of speeds, each with its floor in the same run.
#[derive(Parser)]
#[command(after_help = "Exit codes: 0 measured, 1 a row could not be measured or the guard found a figure worse, 2 wrong usage.")]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Which broker.
    #[arg(long, value_enum, default_value = "both", global = true)]
    broker: Brokers,
    /// Holds figures against the committed ones, in at most 3 minutes, and fails where one is more than 15 % worse twice.
    ///
    /// Ratios of rows to their floors: on the embedded broker, and on Kafka where it can be had (Java and Maven, or KAFKA_BOOTSTRAP; else those are named
    /// and left out). Instructions of a fixed piece of work in one thread: with valgrind, or perf where the processor's counters can be
    /// read; else they are named and left out. Needs a release build.
    #[arg(long, conflicts_with_all = ["rows", "guard_take"])]
    guard: bool,
    /// Takes the guard's figures anew, all that can be taken here, and writes them into its file.
    #[arg(long, conflicts_with = "rows")]
    guard_take: bool,
    /// The guard's file.
    #[arg(long, default_value = "tests/guard.json")]
    guard_file: PathBuf,
    /// Which rows; all without it.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<Kind>,
    /// The short form: one short round of a row, fewer and shorter points of a curve.
    #[arg(long, global = true)]
    quick: bool,
    /// All rows as BENCHMARKS.md shows them, in a quarter of an hour: five short rounds of each row of the design's table of speeds, one of the others.
    #[arg(long, conflicts_with_all = ["rows", "rounds", "quick", "guard", "guard_take"])]
    page: bool,
    /// Rounds of each row; medians of them are shown.
    #[arg(long)]
    rounds: Option<usize>,
    /// Records of a backlog that is pushed.
    #[arg(long, global = true)]
    records: Option<u64>,
    /// Seconds that a load, or at most a point of a curve, is measured.
    #[arg(long, global = true)]
    seconds: Option<f64>,
    /// Sidecars of the simulated mesh (`mesh-scale`). All are in one process: a thousand with a table of 10,000 routes need some 1.3 GiB of memory.
    #[arg(long)]
    sidecars: Option<usize>,
    /// Routes of the table that is applied to it.
    #[arg(long)]
    routes: Option<usize>,
    /// `key=value` of librdkafka in the sidecar, in place of its own setting; several are allowed.
    #[arg(long, value_parser = setting, global = true)]
    kafka: Vec<(String, String)>,
    /// `NAME=value` of the sidecar's environment, such as `MESH_LIMITS_BUFFER=64MiB`; several are allowed.
    #[arg(long, value_parser = setting, global = true)]
    env: Vec<(String, String)>,
    /// The form of the output.
    #[arg(long, value_enum, default_value = "markdown", global = true)]
    output: Output,
}

#[derive(Subcommand)]
enum Command {
    /// Is one of the processes that a bench consists of.
    #[command(hide = true)]
    Role {
        #[command(subcommand)]
        role: Role,
    },
    /// Measures cost curves: one thing is varied over powers of ten. Writes each as a table, as JSON and as a picture.
    ///
    /// A point is measured for at most `--seconds` (8, in the short form 2), from the first reply on. Memory is the sidecar's; on the embedded
    /// broker the broker is part of it. The processor time comes in steps of 10 ms.
    Curves {
        /// Which; all without it.
        #[arg(long, value_delimiter = ',')]
        only: Vec<Curve>,
        /// The folder that `<curve>-<broker>.md`, `.json` and `.svg` are written into.
        #[arg(long, default_value = "docs/curves")]
        out: PathBuf,
    },
    /// Starts Kafka and keeps it until it is interrupted: for several runs, with `KAFKA_BOOTSTRAP`.
    Kafka,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Brokers {
    Kafka,
    Embedded,
    Both,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Markdown,
    Json,
}

fn setting(text: &str) -> Result<(String, String)> {
    let (key, value) = text.split_once('=').context("give key=value")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn main() -> Result<ExitCode> {
    let mut args = Args::parse();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    match args.command.take() {
        Some(Command::Role { role }) => role.play().map(|()| ExitCode::SUCCESS),
        Some(Command::Kafka) => runtime()?.block_on(async {
            let kafka = mesh_tests::kafka::own_kafka().await.context("no Kafka")?;
            println!("KAFKA_BOOTSTRAP={}", kafka.bootstrap());
            tokio::signal::ctrl_c().await?;
            Ok(ExitCode::SUCCESS)
        }),
        Some(Command::Curves { only, out }) => runtime()?.block_on(draw(args, only, out)),
        None if args.guard || args.guard_take => runtime()?.block_on(guarded(args)),
        None => runtime()?.block_on(bench(args)),
    }
}

/// As much as the arguments say.
fn effort(args: &Args) -> Effort {
    let (rounds, records, seconds, warmup, sidecars) = match (args.page, args.quick) {
        (true, _) => (5, 80_000, 2.0, 0.7, 30),
        (false, true) => (1, 60_000, 3.0, 1.0, 20),
        (false, false) => (5, 200_000, 8.0, 2.0, 50),
    };
    Effort {
        rounds: args.rounds.unwrap_or(rounds).max(1),
        records: args.records.unwrap_or(records).max(1),
        seconds: args.seconds.unwrap_or(seconds).max(0.1),
        warmup,
        sidecars: args.sidecars.unwrap_or(sidecars).max(2),
        routes: args.routes.unwrap_or(1_000).max(1),
        kafka: args.kafka.clone(),
        env: args.env.clone(),
    }
}

/// The brokers that were asked for.
async fn benches(args: &Args, effort: Effort) -> Result<Vec<Bench>> {
    let mut benches = Vec::new();
    if args.broker != Brokers::Embedded {
        match mesh_tests::kafka::kafka().await {
            Some(handle) => {
                let bench = Bench::kafka(handle, effort.clone())?;
                bench.warm_broker().await?;
                benches.push(bench);
            }
            None => ensure!(args.broker == Brokers::Both, "no Kafka"),
        }
    }
    if args.broker != Brokers::Kafka {
        benches.push(Bench::embedded(effort));
    }
    Ok(benches)
}

async fn draw(args: Args, only: Vec<Curve>, out: PathBuf) -> Result<ExitCode> {
    let length = Length {
        full: !args.quick,
        seconds: args.seconds.unwrap_or(if args.quick { 2.0 } else { 8.0 }).max(0.1),
        records: args.records.unwrap_or(if args.quick { 50_000 } else { 400_000 }).max(1),
    };
    let kinds = if only.is_empty() { Curve::value_variants() } else { &only };
    let mut measured = Vec::new();
    for bench in benches(&args, effort(&args)).await? {
        for curve in kinds {
            let measurement = bench.curve(*curve, length).await;
            curves::write(&measurement, &out)?;
            eprintln!("{}", curves::markdown(&measurement));
            measured.push(measurement);
        }
    }
    match args.output {
        Output::Markdown => measured.iter().for_each(|measurement| println!("{}", curves::markdown(measurement))),
        Output::Json => println!("{}", curves::json(&measured)?),
    }
    let failed = measured.iter().flat_map(|measurement| &measurement.points).any(|point| point.failed.is_some());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn guarded(args: Args) -> Result<ExitCode> {
    ensure!(!cfg!(debug_assertions), "the guard's figures are those of a release build: cargo run --release");
    // Before there is a broker: a file that is not there is told at once.
    let baseline = if args.guard_take { None } else { Some(Baseline::read(&args.guard_file)?) };
    let guard = Guard::new(benches(&args, guard::effort()).await?).await;
    let Some(baseline) = baseline else {
        let cores = std::thread::available_parallelism()?;
        let (system, processor) = (std::env::consts::OS, std::env::consts::ARCH);
        let taken = format!("cargo run --release -p mesh-tests --bin bench -- --guard-take; {system}, {processor}, {cores} cores");
        guard.take(taken).await?.write(&args.guard_file)?;
        return Ok(ExitCode::SUCCESS);
    };
    let judged = guard::judge(&baseline, async |name| guard.measure(name).await);
    let found = tokio::time::timeout(guard::DEADLINE, judged).await.context("the guard took more than 3 minutes")??;
    println!("{}", guard::markdown(&found));
    Ok(if found.iter().any(guard::Found::fell) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn bench(args: Args) -> Result<ExitCode> {
    let benches = benches(&args, effort(&args)).await?;
    let kinds = if args.rows.is_empty() { Kind::value_variants() } else { &args.rows };
    let mut rows = Vec::new();
    for bench in &benches {
        let once = bench.with_rounds(1);
        for kind in kinds.iter().filter(|kind| bench.can(**kind)) {
            let bench = if args.page && !kind.is_of_table() { &once } else { bench };
            let row = bench.measure(*kind).await;
            eprintln!("{}", report::markdown(std::slice::from_ref(&row)));
            rows.push(row);
        }
    }
    match args.output {
        Output::Markdown => println!("{}", report::markdown(&rows)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&rows)?),
    }
    let failed = rows.iter().any(|row| row.failed.is_some());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;

    #[test]
    fn the_arguments_of_a_role_do_not_meet_those_of_all() {
        Args::command().debug_assert();
        let role = ["bench", "role", "mesh-scale", "2", "2", "10", "--bootstrap", "127.0.0.1:9092"];
        assert!(matches!(Args::try_parse_from(role), Ok(Args { command: Some(Command::Role { .. }), .. })));
    }
}
