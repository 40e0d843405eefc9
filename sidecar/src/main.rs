//! The binary `mesh-sidecar`.

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use mesh_sidecar::{
    app::{App, demo},
    config,
    telemetry::logs,
};
use tokio_util::sync::CancellationToken;

/// The event mesh sidecar: produce, subscribe and be called, next to one service.
#[derive(Parser)]
#[command(version, about, after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the sidecar until SIGTERM or Ctrl-C, then drains.
    Run {
        /// The configuration file (YAML or JSON). Every field is also MESH_… in the environment, which wins.
        #[arg(long, short, env = "MESH_CONFIG", value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Shows a small mesh at work, on the embedded broker, with its services built in.
    Demo(demo::Args),
    /// Looks at the configuration without running.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Asks a running sidecar to stop delivering, finish what is in flight, and end; returns when it has (for a preStop hook).
    Drain {
        /// Its admin port.
        #[arg(long, env = "MESH_ADMIN", default_value = "http://127.0.0.1:4501", value_name = "URL")]
        admin: String,
        /// The file with the token that it asks for.
        #[arg(long, env = "MESH_TOKEN_FILE", value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// PEM file with the authorities of its certificate; the system's without it.
        #[arg(long, env = "MESH_CA", value_name = "FILE")]
        ca: Option<PathBuf>,
        /// PEM file with the certificate to show.
        #[arg(long, env = "MESH_CLIENT_CERT", value_name = "FILE", requires = "client_key")]
        client_cert: Option<PathBuf>,
        /// PEM file with the key of --client-cert.
        #[arg(long, env = "MESH_CLIENT_KEY", value_name = "FILE", requires = "client_cert")]
        client_key: Option<PathBuf>,
        /// How long to wait, in seconds.
        #[arg(long, default_value_t = 60)]
        timeout: u64,
    },
    /// Asks a running sidecar whether it is ready: exits 0 or 1.
    Healthcheck {
        /// Its configuration file, which names its probe port.
        #[arg(long, short, env = "MESH_CONFIG", value_name = "FILE", conflicts_with = "probe")]
        config: Option<PathBuf>,
        /// Its probe port.
        #[arg(long, env = "MESH_LISTEN_PROBE", default_value = "127.0.0.1:4502", value_name = "HOST:PORT")]
        probe: String,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Checks the configuration: all faults at once.
    Check {
        /// The configuration file.
        #[arg(long, short, env = "MESH_CONFIG", value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Prints the effective configuration, secrets redacted.
    Print {
        /// The configuration file.
        #[arg(long, short, env = "MESH_CONFIG", value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

const FAILED: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    mesh_sidecar::app::memory::bound_arenas();
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, &format!("the runtime cannot start: {error}")),
    };
    let code = runtime.block_on(async {
        match args.command {
            Command::Run { config } => run(config).await,
            Command::Demo(args) => demo::run(args).await,
            Command::Config { command: ConfigCommand::Check { config } } => match load(config) {
                Ok(config) => match mesh_sidecar::app::check(&config).await {
                    Ok(()) => print("the configuration is good\n"),
                    Err(error) => fail(USAGE, &error.to_string()),
                },
                Err(code) => code,
            },
            Command::Config { command: ConfigCommand::Print { config } } => match load(config) {
                Ok(config) => print(&config::print(&config)),
                Err(code) => code,
            },
            Command::Drain { admin, token_file, ca, client_cert, client_key, timeout } => {
                let admin = mesh_proto::admin::AdminAddress { url: admin, token_file, ca, identity: client_cert.zip(client_key) };
                match mesh_sidecar::app::remote::drain(&admin, std::time::Duration::from_secs(timeout)).await {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(error) => fail(FAILED, &error),
                }
            }
            Command::Healthcheck { config, probe } => healthcheck(config, probe).await,
        }
    });
    // What is left hangs on somebody else, a broker that is away for instance; everything of ours was awaited.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    code
}

fn load(path: Option<PathBuf>) -> Result<config::Config, ExitCode> {
    config::load(path.as_deref(), config::environment()).map_err(|faults| fail(USAGE, &faults.to_string()))
}

async fn healthcheck(config: Option<PathBuf>, probe: String) -> ExitCode {
    let probe = match config {
        None => probe,
        Some(path) => match load(Some(path)) {
            Ok(config) => config.listen.probe.to_string(),
            Err(code) => return code,
        },
    };
    match mesh_sidecar::app::remote::ready(&probe).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(FAILED, &error),
    }
}

async fn run(path: Option<PathBuf>) -> ExitCode {
    let config = match load(path) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if let Err(error) = logs::init(&config.telemetry) {
        return fail(USAGE, &error.to_string());
    }
    raise_descriptor_limit();
    let shutdown = CancellationToken::new();
    let signals = match Signals::new() {
        Ok(signals) => tokio::spawn(signals.wait(shutdown.clone())),
        Err(error) => return fail(FAILED, &format!("signals cannot be received: {error}")),
    };
    let app = match App::start(config).await {
        Ok(app) => app,
        Err(error) => return fail(FAILED, &error.to_string()),
    };
    app.run(shutdown).await;
    signals.abort();
    ExitCode::SUCCESS
}

/// Signals that come together are one: a supervisor may send it to the process and to its group.
const TOGETHER: std::time::Duration = std::time::Duration::from_millis(300);

/// SIGTERM and Ctrl-C begin the drain; a second one ends the process at once.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(mut self, shutdown: CancellationToken) {
        self.next().await;
        shutdown.cancel();
        let first = std::time::Instant::now();
        while first.elapsed() < TOGETHER {
            self.next().await;
        }
        tracing::warn!("second signal: ending without a drain");
        std::process::exit(130);
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Each Kafka client holds several descriptors, each connection one.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(FAILED),
    }
}

fn fail(code: u8, message: &str) -> ExitCode {
    // A standard error that is closed leaves only the exit code.
    let _ = writeln!(std::io::stderr().lock(), "mesh-sidecar: {message}");
    ExitCode::from(code)
}
