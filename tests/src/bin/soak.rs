//! The verifier: `cargo run --release -p mesh-tests --bin soak -- --seed 1 --minutes 15 --broker kafka`. See RELIABILITY.md.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum, builder::PossibleValuesParser};
use mesh_tests::{
    broker::Broker,
    kafka::cluster::Cluster,
    soak::{
        lines::{Guarantee, Line},
        plan::Fault,
        run::{MUTATIONS, Options, run},
    },
};

/// Runs a mesh under load and faults, and checks that it keeps what it promises.
#[derive(Parser)]
#[command(after_help = "Exit codes: 0 every promise was kept, 1 a promise was broken or the run failed, 2 wrong usage.")]
struct Args {
    /// The seed of the faults: the same seed gives the same faults at the same times. A random one without it.
    #[arg(long)]
    seed: Option<u64>,
    /// How long the load goes on.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Which broker.
    #[arg(long, value_enum, default_value = "kafka")]
    broker: Kind,
    /// Brokers of the run's own, behind proxies; 0: the Kafka of KAFKA_BOOTSTRAP as it is, to which nothing is done.
    #[arg(long, default_value_t = 3)]
    brokers: usize,
    /// A fault that is built into the sidecars: the run must notice it. (`forget_epoch` shows in the simulation only.)
    #[arg(long, value_parser = PossibleValuesParser::new(MUTATIONS))]
    mutation: Option<String>,
    /// Only the routes that promise this; those of both kinds without it.
    #[arg(long, value_enum)]
    guarantee: Option<Guarantee>,
    /// Only these routes.
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(Line::ALL.map(|line| line.name)))]
    routes: Option<Vec<String>>,
    /// Which faults; all that the broker knows without it. `none`: nothing goes wrong.
    #[arg(long, value_delimiter = ',', value_parser = fault)]
    faults: Option<Vec<Option<Fault>>>,
    /// Sidecars that share the routes. Kafka only.
    #[arg(long, default_value_t = 3)]
    sidecars: usize,
    /// How many sidecars the fault `scale` goes up to.
    #[arg(long, default_value_t = 8)]
    scale_to: usize,
    /// Records a second, over all routes.
    #[arg(long, default_value_t = 400.0)]
    rate: f64,
    /// Keys, over all routes.
    #[arg(long, default_value_t = 120)]
    keys: u32,
    /// The form of the output.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Kafka,
    Embedded,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn fault(text: &str) -> Result<Option<Fault>, String> {
    if text == "none" { Ok(None) } else { Fault::from_str(text, true).map(Some) }
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u128() as u64 % 1_000_000);
    let length = Duration::from_secs_f64(args.minutes * 60.0);
    let options = match args.broker {
        Kind::Embedded => Options::new(Broker::Embedded, seed, length),
        Kind::Kafka if args.brokers == 0 => Options::new(Broker::kafka().await?.context("no Kafka")?, seed, length),
        Kind::Kafka => Options::on(Cluster::start(args.brokers).await?, seed, length),
    };
    let mut options = Options {
        mutation: args.mutation,
        sidecars: args.sidecars,
        scale_to: args.scale_to,
        rate: args.rate,
        keys: args.keys.max(1),
        loud: true,
        ..options
    };
    if let Some(faults) = args.faults {
        options.faults = faults.into_iter().flatten().collect();
    }
    options.lines.retain(|line| {
        args.guarantee.is_none_or(|guarantee| line.guarantee == guarantee)
            && args.routes.as_ref().is_none_or(|routes| routes.iter().any(|route| route == line.name))
    });
    eprintln!("seed {seed}");
    let report = run(options).await?;
    match args.output {
        Output::Table => println!("{}", report.text()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
