//! `mesh-sidecar demo`: a small mesh at work, with nothing to install.
//!
//! Five services, one sidecar, the embedded broker in a temporary folder, and the routing table of `deploy/example/routes.yaml`, which shows a
//! chain, a fan-out, an `if`, a `for` and a `void`. Every hop is printed as it happens.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_routing::CompiledTable;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{App, remote};
use crate::{
    config::{AppAddress, BrokerConfig, Config, ControlConfig, Limits, Listen, ListenTls, LogFormat, ServiceConfig, TelemetryConfig},
    control::ApplyOptions,
    outcome::Disposition,
    telemetry::logs,
};

mod screen;
mod services;

use screen::Screen;
use services::Hop;

const TABLE: &str = include_str!("../../../../deploy/example/routes.yaml");

/// The same as a picture; a test holds its names against the table.
const PICTURE: &str = "
  orders ─▶ pricing ─┬─▶ priced-orders ─┬─▶ fraud ────▶ reviews            if: 204 forwards nothing
                     │                  └─▶ shipping ─▶ parcels ─▶ packing  for: ↻ onto parcels, until 204
                     └─▶ audit ─────────────▶ archive                      void: counted, forwarded nowhere
";

/// How long the flow may take before the demo says that something is wrong.
const PATIENCE: Duration = Duration::from_secs(20);

/// The orders that go in: what the services make of them follows from their numbers.
const ORDERS: [(&str, &str, u64, u64); 3] = [("order-1", "tea", 2, 40), ("order-2", "piano", 1, 5_000), ("order-3", "cup", 3, 25)];

/// The demo's flags.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// End when the flow is complete: exit code 0, or 1 with the reason.
    #[arg(long)]
    once: bool,
    /// The API's port; the admin and probe ports are the next two. 0 takes any free ones.
    #[arg(long, default_value_t = 4500)]
    port: u16,
    /// Keep the embedded broker's data in this folder, instead of a temporary one.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Send traces to this OTLP collector (gRPC).
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
}

/// Runs the demo.
pub async fn run(args: Args) -> ExitCode {
    let began = Instant::now();
    let screen = Screen::new();
    let temporary = std::env::temp_dir().join(format!("mesh-demo-{}", std::process::id()));
    let folder = args.data.clone().unwrap_or_else(|| temporary.clone());
    let result = show(&args, &screen, folder, began).await;
    if args.data.is_none()
        && let Err(error) = std::fs::remove_dir_all(&temporary)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        screen.line(&format!("  {} cannot be removed: {error}", temporary.display()));
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            screen.line(&format!("  the demo failed: {reason}"));
            ExitCode::FAILURE
        }
    }
}

async fn show(args: &Args, screen: &Screen, folder: PathBuf, began: Instant) -> Result<(), String> {
    let telemetry = TelemetryConfig { otlp: args.otlp.clone(), log: "warn".to_owned(), log_format: LogFormat::Pretty };
    // Somebody who embeds the demo may have set up logs before.
    let _ = logs::init(&telemetry);
    let (sender, mut hops) = mpsc::channel(64);
    let (mut services, addresses) = services::start(sender).await.map_err(|error| format!("the services cannot start: {error}"))?;
    let app = App::start(config(args, folder, telemetry, addresses)).await.map_err(|error| match &error {
        super::StartError::Io(_) => format!("{error}; or take other ports: --port 0"),
        _ => error.to_string(),
    })?;
    let applied = app.control().apply("deploy/example/routes.yaml", TABLE, ApplyOptions::default()).await;
    applied.map_err(|error| format!("the routing table is refused: {error}"))?;
    let table = app.control().table().borrow().as_ref().map(|table| table.compiled.clone()).ok_or("no table is in force")?;

    screen.line("");
    screen.line(&screen.bold("  A mesh of five services, one routing table, one process"));
    screen.line(PICTURE);
    let listen = app.listen();
    screen.line(&format!(
        "  ready in {:.0} ms: api {} · admin {} · probe {}",
        began.elapsed().as_secs_f64() * 1e3,
        listen.api,
        listen.admin,
        listen.probe
    ));
    screen.line("");

    let shutdown = CancellationToken::new();
    let board = app.board().clone();
    let before = ends(&board);
    let mut running = tokio::spawn(app.run(shutdown.clone()));
    let mut ended = None;
    let flow = flow(screen, listen, &table, &board, &before, &mut hops).await;
    if flow.is_ok() && !args.once {
        invite(screen, listen);
        // Until Ctrl-C, or until somebody drains it.
        tokio::select! {
            () = stay(screen, &table, &mut hops) => {}
            result = &mut running => ended = Some(result),
        }
    }
    shutdown.cancel();
    // What is still on its way is answered while the routes drain.
    let printing = tokio::spawn(async move { while hops.recv().await.is_some() {} });
    let ended = match ended {
        Some(ended) => ended,
        None => running.await,
    };
    ended.map_err(|error| format!("the sidecar failed: {error}"))?;
    services.shutdown().await;
    printing.abort();
    flow
}

fn config(args: &Args, folder: PathBuf, telemetry: TelemetryConfig, services: Vec<(&'static str, String)>) -> Config {
    let port = if args.once { 0 } else { args.port };
    let at = |offset: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, if port == 0 { 0 } else { port.saturating_add(offset) }));
    Config {
        mesh: "demo".into(),
        services: services
            .into_iter()
            .map(|(name, app)| ServiceConfig {
                name: name.into(),
                app: Some(AppAddress::Http(app)),
                publish: None,
                subscribe: None,
                token_file: None,
            })
            .collect(),
        instance: None,
        labels: BTreeMap::new(),
        state: folder.join("state"),
        broker: BrokerConfig::Embedded { path: folder.join("data") },
        table: None,
        listen: Listen { api: at(0), admin: at(1), probe: at(2) },
        tls: ListenTls::default(),
        control: ControlConfig::default(),
        telemetry,
        limits: Limits::default(),
    }
}

/// Publishes the orders, and prints each hop until all records have their end.
async fn flow(
    screen: &Screen,
    listen: Listen,
    table: &Arc<CompiledTable>,
    board: &crate::status::Board,
    before: &Ends,
    hops: &mut mpsc::Receiver<Hop>,
) -> Result<(), String> {
    let began = Instant::now();
    let publish = async {
        for (key, item, quantity, price) in ORDERS {
            let body = serde_json::json!({ "item": item, "quantity": quantity, "price": price }).to_string();
            let at = remote::publish(listen.api, "orders", key, body).await?;
            screen.published(began.elapsed(), key, &format!("{quantity} × {item} for {price}"), &at);
        }
        Ok::<(), String>(())
    };
    let watch = async {
        // The board tells counts, and no events: it is looked at often enough for a person.
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            tokio::select! {
                Some(hop) = hops.recv() => screen.hop(hop.at - began, &hop, table),
                _ = ticks.tick() => {
                    let missing = missing(before, &ends(board));
                    if missing.is_empty() {
                        return Ok(());
                    }
                    if began.elapsed() > PATIENCE {
                        return Err(format!("after {PATIENCE:?} these ends are still missing: {}", missing.join(", ")));
                    }
                }
            }
        }
    };
    tokio::try_join!(publish, watch)?;
    while let Ok(hop) = hops.try_recv() {
        screen.hop(hop.at - began, &hop, table);
    }
    screen.line("");
    screen.line(&screen.bold("  Every record has its end, counted by route:"));
    for (route, ends) in ends(board) {
        let counts: Vec<String> = ends.iter().map(|(end, count)| format!("{count} {}", end.as_str())).collect();
        screen.line(&format!("    {route:<8} {}", counts.join(", ")));
    }
    Ok(())
}

type Ends = BTreeMap<Arc<str>, BTreeMap<Disposition, u64>>;

fn ends(board: &crate::status::Board) -> Ends {
    board.routes().into_iter().map(|route| (route.route, route.dispositions)).collect()
}

/// How many records of each route must have which end, by what the services do.
fn expected() -> [(&'static str, Disposition, u64); 6] {
    let orders = ORDERS.len() as u64;
    let reviews = ORDERS.iter().filter(|(_, _, quantity, price)| quantity * price > 1_000).count() as u64;
    let rounds = ORDERS.iter().map(|(_, _, quantity, _)| quantity).sum();
    [
        ("price", Disposition::Forwarded, orders),
        ("check", Disposition::Forwarded, reviews),
        ("check", Disposition::Ignored, orders - reviews),
        ("pack", Disposition::Forwarded, rounds),
        ("pack", Disposition::Ignored, orders),
        ("archive", Disposition::Void, orders),
    ]
}

fn missing(before: &Ends, now: &Ends) -> Vec<String> {
    let count = |ends: &Ends, route: &str, end| ends.get(route).and_then(|ends| ends.get(&end)).copied().unwrap_or(0);
    expected()
        .into_iter()
        .filter_map(|(route, end, wanted)| {
            let ended = count(now, route, end) - count(before, route, end);
            (ended < wanted).then(|| format!("{route} {} {ended} of {wanted}", end.as_str()))
        })
        .collect()
}

fn invite(screen: &Screen, listen: Listen) {
    let Listen { api, admin, probe } = listen;
    screen.line("");
    screen.line(&screen.bold("  It stays up. Try, in another terminal:"));
    for (what, command) in [
        (
            "publish an order and watch it here",
            format!(
                "curl -H 'content-type: application/json' -H 'mesh-key: order-4' -d '{{\"item\":\"drum\",\"quantity\":2,\"price\":700}}' http://{api}/v1/topics/orders/records"
            ),
        ),
        ("read a topic, as it grows", format!("curl -N 'http://{api}/v1/topics/reviews/records?from=earliest'")),
        ("see the routes", format!("cargo run --release -p mesh-ctl -- --admin http://{admin} status")),
        (
            "rewire the mesh while it runs",
            format!("cargo run --release -p mesh-ctl -- --admin http://{admin} apply -f deploy/example/routes.yaml"),
        ),
        ("count every end", format!("curl -s http://{probe}/metrics | grep mesh_dispositions")),
    ] {
        screen.line(&format!("  {}", screen.faint(&format!("# {what}"))));
        screen.line(&format!("  {command}"));
    }
    screen.line("");
    screen.line("  Ctrl-C ends it.");
    screen.line("");
}

/// Prints hops until Ctrl-C or SIGTERM.
async fn stay(screen: &Screen, table: &Arc<CompiledTable>, hops: &mut mpsc::Receiver<Hop>) {
    use tokio::signal::unix::{SignalKind, signal};
    let began = Instant::now();
    let mut terminate = signal(SignalKind::terminate()).ok();
    loop {
        tokio::select! {
            Some(hop) = hops.recv() => screen.hop(hop.at - began, &hop, table),
            _ = tokio::signal::ctrl_c() => return,
            () = async { match &mut terminate { Some(signal) => { signal.recv().await; } None => std::future::pending().await } } => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every service and topic of the table is in the picture, and no other.
    #[test]
    fn the_picture_shows_the_table() {
        let table = mesh_routing::compile(&mesh_routing::parse("routes.yaml", TABLE).unwrap()).unwrap();
        let services = table.routes.iter().map(|route| route.service.to_string());
        let topics = table.topic_names().iter().filter(|topic| topic.dead_letter_of.is_empty()).map(|topic| topic.name.to_string());
        let wanted: BTreeSet<String> = services.chain(topics).collect();
        let drawn = PICTURE
            .lines()
            .map(|line| line.split("  if:").next().unwrap().split("  for:").next().unwrap().split("  void:").next().unwrap());
        let words = drawn.flat_map(|line| line.split(|c: char| !c.is_ascii_alphabetic() && c != '-')).filter(|word| !word.is_empty());
        assert_eq!(words.map(str::to_owned).collect::<BTreeSet<_>>(), wanted);
    }
}
