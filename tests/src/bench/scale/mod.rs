//! How far the control plane reaches: a table of thousands of routes applied to a mesh of up to a thousand sidecars.
//!
//! The mesh is simulated in a process of its own ([`Mesh`]): all sidecars share its cores, which each would have for itself in a real one. So beside it
//! stands a mesh of two with the same table, in which nobody waits for a core.

mod counted;
mod mesh;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

pub use self::{
    counted::Traffic,
    mesh::{Mesh, Spread, table},
};
use super::{
    ground::Bench,
    measure::{self, mib},
    role,
    rows::Row,
};

/// How often the table is changed and applied, after the first one, which creates the topics.
const APPLIES: usize = 3;
/// So many sidecars are a mesh in which nobody waits for a core.
const FEW: usize = 2;
/// How often a piece of an adoption is measured.
const PIECES: usize = 5;

/// A figure on its way from the process that measured it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Found {
    name: String,
    value: f64,
    unit: String,
}

/// The units that figures have here.
const UNITS: [&str; 6] = ["ms", "KiB", "MiB", "B", "routes", "reports"];

impl Bench {
    /// A table is applied to a mesh of many.
    pub(super) async fn mesh_scale(&self, row: &mut Row) -> Result<()> {
        let (services, routes) = (self.effort.sidecars.to_string(), self.effort.routes.to_string());
        let few = FEW.to_string();
        let meshes = if self.effort.sidecars > FEW { vec![&few, &services] } else { vec![&services] };
        // Each in a process of its own, so that its memory is its own.
        for sidecars in [vec![&"0".to_owned()], meshes].concat() {
            let mut arguments = vec!["mesh-scale", sidecars, &services, &routes];
            if let Some((handle, _)) = &self.kafka {
                arguments.extend(["--bootstrap", handle.bootstrap()]);
            }
            let found: Vec<Found> = role::answer(&arguments, Duration::from_secs(3_600)).await?;
            for Found { name, value, unit } in found {
                let unit = UNITS.into_iter().find(|known| *known == unit).with_context(|| format!("the unit {unit}"))?;
                row.figure(name, value, unit);
            }
        }
        Ok(())
    }
}

/// Measures it in this process; prints the figures. Without a sidecar it is measured what reading a table takes.
///
/// # Errors
/// If a table does not reach all.
pub(super) fn play(sidecars: usize, services: usize, routes: usize, kafka: Option<&str>) -> Result<()> {
    let cores = std::thread::available_parallelism()?.get();
    // As many compile at once as there are cores: what each needs for that is there once for each of them.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(cores).max_blocking_threads(cores).enable_all().build()?;
    let mut found = Vec::new();
    let mut figure = |name: String, value: f64, unit: &str| found.push(Found { name, value, unit: unit.to_owned() });
    match sidecars {
        0 => pieces(services, routes, &mut figure)?,
        _ => runtime.block_on(measured(sidecars, services, routes, kafka))?.tell(&mut figure),
    }
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// What the parts of reading a table take, one after the other in one thread.
fn pieces(services: usize, routes: usize, figure: &mut impl FnMut(String, f64, &str)) -> Result<()> {
    let written = table("pieces", services, routes, 0);
    let json = mesh_routing::parse("t", &written)?.to_json();
    // Behind the mark of a document it is YAML, and is read as that.
    let as_yaml = format!("---\n{json}");
    let parsed = mesh_routing::parse("t", &json)?;
    ensure!(parsed == mesh_routing::parse("t", &as_yaml)?, "read as JSON and as YAML a table differs");
    figure(format!("a table of {routes} routes: its JSON"), json.len() as f64 / 1024.0, "KiB");
    let mut take = |name: &str, piece: &dyn Fn() -> Result<(), mesh_routing::Faults>| {
        let mut took = Vec::new();
        for _ in 0..PIECES {
            let begin = Instant::now();
            piece()?;
            took.push(milliseconds(begin.elapsed()));
        }
        figure(format!("a table of {routes} routes: {name}"), measure::median(&took), "ms");
        anyhow::Ok(())
    };
    take("`parse`, written as YAML", &|| mesh_routing::parse("t", &written).map(|read| drop(black_box(read))))?;
    take("`parse`, the JSON read as YAML", &|| mesh_routing::parse("t", &as_yaml).map(|read| drop(black_box(read))))?;
    take("`parse`, the JSON", &|| mesh_routing::parse("t", &json).map(|read| drop(black_box(read))))?;
    take("`compile`", &|| mesh_routing::compile(&parsed).map(|read| drop(black_box(read))))?;
    take("`load` (both, checked once), the JSON", &|| mesh_routing::load("t", &json).map(|read| drop(black_box(read))))?;
    take("`parts`, and their digest", &|| {
        black_box(parsed.parts().digest());
        Ok(())
    })?;
    let (digest, own, mut part) = (parsed.digest(), |service: &str| service == "svc-0", parsed.parts());
    part.routes.retain(|number, _| *number == mesh_routing::part_of("svc-0"));
    take("`load_part`, one service's routes of its part", &|| {
        mesh_routing::load_part("t", &digest, &part, true, own, Box::new(|| None)).map(|read| drop(black_box(read)))
    })
}

/// What was measured of one mesh.
struct Measured {
    sidecars: usize,
    spreads: Vec<Spread>,
    /// Of the process, for each of them, until every report was read.
    cpu: Vec<Duration>,
    /// The first and the second look at the state of the mesh, at a sidecar that was never asked for it.
    looks: [Duration; 2],
    /// Resident before the sidecars, with them, and with their tables.
    resident: [u64; 3],
}

async fn measured(sidecars: usize, services: usize, routes: usize, kafka: Option<&str>) -> Result<Measured> {
    let own = i32::try_from(std::process::id())?;
    let mut mesh = Mesh::new(kafka)?;
    let before = measure::resident_bytes(own)?;
    mesh.start(sidecars).await?;
    mesh.ready().await?;
    let with_sidecars = measure::resident_bytes(own)?;
    let (mut spreads, mut cpu) = (Vec::new(), Vec::new());
    for version in 0..=APPLIES {
        let text = table(mesh.name(), services, routes, version);
        let begun = measure::cpu_time(own)?;
        let spread = mesh.apply(&text).await?;
        let digests = mesh.tables().into_iter().flatten().map(|table| table.compiled.digest.clone());
        ensure!(digests.into_iter().all(|digest| *digest == *spread.digest), "not all have the same table");
        eprintln!("{sidecars} sidecars, {routes} routes: generation {} in sync after {:?}", spread.generation, spread.synced);
        // The first creates the topics, and is nothing that is measured.
        if version > 0 {
            cpu.push(measure::cpu_time(own)?.saturating_sub(begun));
            spreads.push(spread);
        }
    }
    let with_tables = measure::resident_bytes(own)?;
    let looks = [mesh.look()?, mesh.look()?];
    mesh.end().await?;
    Ok(Measured { sidecars, spreads, cpu, looks, resident: [before, with_sidecars, with_tables] })
}

impl Measured {
    fn tell(&self, figure: &mut impl FnMut(String, f64, &str)) {
        let each = self.sidecars as f64;
        let median = |of: &dyn Fn(&Spread) -> f64| measure::median(&self.spreads.iter().map(of).collect::<Vec<_>>());
        let last = |spread: &Spread| spread.in_force.last().copied().unwrap_or_default();
        let middle = |spread: &Spread| spread.in_force.get(spread.in_force.len() / 2).copied().unwrap_or_default();
        let mut say = |name: &str, value: f64, unit: &str| figure(format!("{} sidecars: {name}", self.sidecars), value, unit);
        say("`apply` → accepted", median(&|spread| milliseconds(spread.accepted)), "ms");
        say("`apply` → in force at half of them", median(&|spread| milliseconds(middle(spread))), "ms");
        say("`apply` → in force at the last", median(&|spread| milliseconds(last(spread))), "ms");
        say("`apply` → the last SYNCED, as the asked one says", median(&|spread| milliseconds(spread.synced)), "ms");
        let cpu: Vec<f64> = self.cpu.iter().map(|cpu| milliseconds(*cpu) / each).collect();
        say("processor time of an apply, by sidecar, broker and all reports included", measure::median(&cpu), "ms");
        say("snapshot as written", median(&|spread| spread.traffic.control_written as f64 / 1024.0), "KiB");
        say("read of the control topic, by sidecar", median(&|spread| spread.traffic.control_read as f64 / 1024.0 / each), "KiB");
        say("reports written, by sidecar", median(&|spread| spread.traffic.reports_written as f64 / each), "reports");
        say("a report", median(&|spread| spread.traffic.status_written as f64 / spread.traffic.reports_written.max(1) as f64), "B");
        say("reports read, by sidecar", median(&|spread| spread.traffic.reports_read as f64 / each), "reports");
        say("read of reports, by sidecar", median(&|spread| spread.traffic.status_read as f64 / 1024.0 / each), "KiB");
        say("the state of the mesh, asked for the first time", milliseconds(self.looks[0]), "ms");
        say("the same once more", milliseconds(self.looks[1]), "ms");
        let [before, with_sidecars, with_tables] = self.resident;
        say("resident memory by sidecar, without a table", mib(with_sidecars.saturating_sub(before)) / each, "MiB");
        say("resident memory by sidecar, with its table", mib(with_tables.saturating_sub(before)) / each, "MiB");
        say("own routes that an apply leaves alone", median(&|spread| spread.untouched as f64), "routes");
        say("own routes that an apply changes", median(&|spread| spread.touched as f64), "routes");
    }
}
