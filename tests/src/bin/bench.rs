//! The benchmarks: `cargo run --release -p mesh-tests --bin bench`. See BENCHMARKS.md.

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use mesh_tests::bench::{
    report,
    role::Role,
    rows::{Bench, Effort, Kind},
};

/// Measures the rows of the design's table of speeds, each with its floor in the same run.
#[derive(Parser)]
#[command(after_help = "Exit codes: 0 measured, 1 a row could not be measured, 2 wrong usage.")]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Which broker.
    #[arg(long, value_enum, default_value = "both")]
    broker: Brokers,
    /// Which rows; all without it.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<Kind>,
    /// One short round.
    #[arg(long)]
    quick: bool,
    /// Rounds of each row; medians of them are shown.
    #[arg(long)]
    rounds: Option<usize>,
    /// Records of a backlog that is pushed.
    #[arg(long)]
    records: Option<u64>,
    /// Seconds that a load is measured.
    #[arg(long)]
    seconds: Option<f64>,
    /// `key=value` of librdkafka in the sidecar, in place of its own setting; several are allowed.
    #[arg(long, value_parser = setting)]
    kafka: Vec<(String, String)>,
    /// `NAME=value` of the sidecar's environment, such as `MESH_LIMITS_BUFFER=64MiB`; several are allowed.
    #[arg(long, value_parser = setting)]
    env: Vec<(String, String)>,
    /// The form of the output.
    #[arg(long, value_enum, default_value = "markdown")]
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
    let args = Args::parse();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    match args.command {
        Some(Command::Role { role }) => role.play().map(|()| ExitCode::SUCCESS),
        Some(Command::Kafka) => runtime()?.block_on(async {
            let kafka = mesh_tests::kafka::own_kafka().await.context("no Kafka")?;
            println!("KAFKA_BOOTSTRAP={}", kafka.bootstrap());
            tokio::signal::ctrl_c().await?;
            Ok(ExitCode::SUCCESS)
        }),
        None => runtime()?.block_on(bench(args)),
    }
}

async fn bench(args: Args) -> Result<ExitCode> {
    let effort = Effort {
        rounds: args.rounds.unwrap_or(if args.quick { 1 } else { 5 }).max(1),
        records: args.records.unwrap_or(if args.quick { 60_000 } else { 200_000 }).max(1),
        seconds: args.seconds.unwrap_or(if args.quick { 3.0 } else { 8.0 }).max(0.1),
        warmup: if args.quick { 1.0 } else { 2.0 },
        kafka: args.kafka,
        env: args.env,
    };
    let mut benches = Vec::new();
    if args.broker != Brokers::Embedded {
        match mesh_tests::kafka::kafka().await {
            Some(handle) => benches.push(Bench::kafka(handle, effort.clone())?),
            None => ensure!(args.broker == Brokers::Both, "no Kafka"),
        }
    }
    if args.broker != Brokers::Kafka {
        benches.push(Bench::embedded(effort));
    }
    let kinds = if args.rows.is_empty() { Kind::value_variants() } else { &args.rows };
    let mut rows = Vec::new();
    for bench in &benches {
        for kind in kinds.iter().filter(|kind| bench.can(**kind)) {
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
