//! Tables in the control log that a sidecar cannot compile, as a newer version would write them: refused with the reason, and the last good one serves.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::{GetStatusResponse, InstanceState};
use mesh_tests::{
    broker::Broker,
    load::Load,
    oracle::deliveries,
    service::{Rule, Scenario, Service},
    sidecar::Sidecar,
    stage::Stage,
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::operate::{findings, has};

const MINUTE: Duration = Duration::from_secs(60);

/// The routes, each at a sidecar of its own.
const ROUTES: [&str; 2] = ["work", "other"];

/// Waits until each sidecar, which knows its own state at once, runs its route.
async fn running(sidecars: &[Sidecar]) -> Result<()> {
    for (sidecar, route) in sidecars.iter().zip(ROUTES) {
        sidecar.wait_running(&[route]).await?;
    }
    Ok(())
}

/// A table in which two sidecars process all that comes, with something more in the route of the first.
fn table(to: &str, more: &str) -> String {
    format!(
        "
        topics: {{ %in: {{ partitions: 4 }}, %out: {{ partitions: 4 }}, %new: {{ partitions: 4 }} }}
        routes:
        - {{ name: work, service: work, from: [%in], handler: /work, to: [{to}]{more} }}
        - {{ name: other, service: other, from: [%in], handler: /other, to: [{to}] }}
        "
    )
}

/// Appends a table to the control log, packed as a sidecar packs it, whatever is in it.
async fn append(stage: &Stage, generation: u64, table: String) -> Result<()> {
    let hash: String = Sha256::digest(&table).iter().map(|byte| format!("{byte:02x}")).collect();
    let applied_ms = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_millis() as i64;
    let envelope = json!({
        "schema": 1,
        "mesh": stage.mesh(),
        "channel": "stable",
        "generation": generation,
        "digest": format!("sha256:{hash}"),
        "applied_ms": applied_ms,
        "writer": "newer-0",
        "signature": null,
        "about": { "by": "ann@desk", "source": "newer.yaml", "message": "", "mood": "a field of a newer version" },
        "table": table,
    });
    let value = zstd::bulk::compress(&serde_json::to_vec(&envelope)?, 3)?;
    let key = format!("{}/{generation}/{}", stage.mesh(), uuid::Uuid::new_v4().simple());
    stage.append("__mesh.control", &key, value).await
}

/// Waits until both sidecars refuse a generation, run an older one, and say why.
async fn refused(sidecar: &Sidecar, refused: u64, runs: u64, reason: &[&str]) -> Result<()> {
    let nacked = |status: &GetStatusResponse| {
        let of = |one: &&mesh_proto::v1::InstanceStatus| {
            one.state() == InstanceState::Nacked
                && (one.generation, one.refused_generation) == (runs, refused)
                && reason.iter().all(|part| one.error.contains(part))
        };
        status.instances.len() == 2 && status.instances.iter().filter(of).count() == 2
    };
    sidecar.wait_status(&format!("two that refuse generation {refused} for {reason:?}"), MINUTE, nacked).await?;
    Ok(())
}

/// Why a sidecar refuses a generation, by its history.
async fn told(sidecar: &Sidecar, generation: u64) -> Result<String> {
    let history = sidecar.ctl(&["history", "-o", "json"]).await?.ends(0)?.json()?;
    let entries = history["generations"].as_array().context("generations")?;
    let entry = entries.iter().find(|entry| entry["generation"] == generation).context("the generation")?;
    ensure!(entry["source"] == "newer.yaml" && entry["in_force"] == false, "{entry:#}");
    Ok(entry["refused"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_cannot_be_compiled_is_refused_by_all_and_the_last_good_one_serves() -> Result<()> {
    match Broker::kafka().await? {
        Some(broker) => Stage::run(broker, not_compiled).await,
        None => Ok(()),
    }
}

async fn not_compiled(stage: Stage) -> Result<()> {
    let slow = || [Rule::echo().after(Duration::from_millis(5))];
    let scenario = Scenario { headers: false, ..Scenario::new() };
    let service = Service::native(scenario.clone().on("/work", slow())).await?;
    let other = Service::native(scenario.on("/other", slow())).await?;
    let mut sidecars = Vec::new();
    for (name, service) in [("work", &service), ("other", &other)] {
        sidecars.push(stage.sidecar(name).instance(name).service(name, service).start().await?);
    }
    let good = stage.file("good.yaml", &stage.table(&table("%out", "")))?;
    sidecars[0].ctl(&["apply", "-f", good.to_str().context("a path")?, "--wait"]).await?.ends(0)?;
    running(&sidecars).await?;

    // Under load: a field that this version does not know, then an expression.
    let records = 2_000;
    let load = Load { connections: 4, ..Load::new(stage.topic("in"), records, 50) };
    let field = ["spec.routes[0].colour: unknown field `colour`", "known here: "];
    let expression = ["spec.routes[0].filter: ", "record.jsn", "did you mean `record.json`?"];
    let newer = async {
        service.wait(100, MINUTE).await?;
        append(&stage, 2, stage.table(&table("%new", ", colour: red"))).await?;
        refused(&sidecars[1], 2, 1, &field).await?;
        for sidecar in &sidecars {
            let told = told(sidecar, 2).await?;
            ensure!(field.iter().all(|part| told.contains(part)), "{told}");
        }
        append(&stage, 3, stage.table(&table("%new", ", filter: 'record.jsn.n > 1'"))).await?;
        refused(&sidecars[0], 3, 1, &expression).await?;
        for sidecar in &sidecars {
            let told = told(sidecar, 3).await?;
            ensure!(expression.iter().all(|part| told.contains(part)), "{told}");
            let shown = sidecar.ctl(&["status"]).await?.ends(0)?;
            ensure!(shown.stdout.contains("NACKED") && shown.stdout.contains("did you mean `record.json`?"), "{shown:?}");
            ensure!(sidecar.metric("mesh_table_refused").await? >= 1.0);
            // Whoever is asked names both, and what mends it.
            let said = sidecar.ctl(&["doctor", "-o", "json"]).await?.ends(1)?.json()?;
            for name in ROUTES {
                has(
                    &said,
                    ["instances", "error", name, "it refuses generation 3 and runs 1: ", "apply a table that it can run, or update it"],
                )?;
            }
        }
        anyhow::Ok(())
    };
    let (oracle, ()) = tokio::try_join!(load.http(&sidecars[0]), newer)?;
    for (sidecar, route) in sidecars.iter().zip(ROUTES) {
        sidecar.wait_done(&[route], MINUTE).await?;
    }
    for service in [&service, &other] {
        oracle.judge(&deliveries(&service.ledger().await?)?).exactly_once().context("deliveries")?;
    }
    ensure!(stage.read(&sidecars[0], None, &stage.topic("out"), 2 * records).await?.len() == 2 * records);
    ensure!(stage.read(&sidecars[0], None, &stage.topic("new"), 0).await?.is_empty(), "a table that is refused delivers");

    // Who starts now reads the log from its beginning, and comes to the same.
    sidecars[1].kill9().await?;
    sidecars[1].start().await?;
    refused(&sidecars[1], 3, 1, &expression).await?;
    sidecars[1].wait_running(&["other"]).await?;
    sidecars[1].publish(&stage.topic("in"), Some("last"), "application/json", "{}").await?;
    stage.read(&sidecars[1], None, &stage.topic("out"), 2 * records + 2).await?;

    // A good one heals it: it follows what was refused, and is compared with what is in force.
    let healed = stage.file("healed.yaml", &stage.table(&table("%out, %new", "")))?;
    let said = sidecars[1].ctl(&["apply", "-f", healed.to_str().context("a path")?, "--wait", "-o", "json"]).await?.ends(0)?.json()?;
    ensure!(said["generation"] == 4, "{said:#}");
    let changes: Vec<&str> = said["changes"].as_array().context("changes")?.iter().filter_map(Value::as_str).collect();
    ensure!(changes.len() == 2 && changes.iter().all(|change| change.starts_with("~ routes.")), "{changes:?}");
    let synced = |status: &GetStatusResponse| {
        let of = |one: &&mesh_proto::v1::InstanceStatus| {
            one.state() == InstanceState::Synced && one.generation == 4 && one.refused_generation == 0 && one.error.is_empty()
        };
        status.instances.len() == 2 && status.instances.iter().filter(of).count() == 2
    };
    sidecars[0].wait_status("generation 4 everywhere", MINUTE, synced).await?;
    for sidecar in &sidecars {
        ensure!(sidecar.metric("mesh_table_refused").await? < 1.0);
        let said = sidecar.ctl(&["doctor", "-o", "json"]).await?.json()?;
        ensure!(findings(&said, "instances").count() == 0, "{said:#}");
    }
    running(&sidecars).await?;
    sidecars[0].publish(&stage.topic("in"), Some("new"), "application/json", "{}").await?;
    stage.read(&sidecars[0], None, &stage.topic("new"), 2).await?;
    for sidecar in sidecars {
        sidecar.finish().await?;
    }
    Ok(())
}
