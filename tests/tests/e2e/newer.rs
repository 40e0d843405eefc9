//! Tables in the control log that a sidecar cannot compile, as a newer version would write them: refused with the reason, and the last good one serves.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::{GetStatusResponse, InstanceState};
use mesh_tests::{
    load::Load,
    newer::{Newer, append},
    on_kafka,
    oracle::deliveries,
    service::{Rule, Scenario, Service},
    sidecar::Sidecar,
    stage::Stage,
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

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

on_kafka!(a_table_that_cannot_be_compiled_is_refused_by_all_and_the_last_good_one_serves, not_compiled);

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
        append(&stage, 2, None, &stage.table(&table("%new", ", colour: red"))).await?;
        refused(&sidecars[1], 2, 1, &field).await?;
        for sidecar in &sidecars {
            let told = told(sidecar, 2).await?;
            ensure!(field.iter().all(|part| told.contains(part)), "{told}");
        }
        append(&stage, 3, None, &stage.table(&table("%new", ", filter: 'record.jsn.n > 1'"))).await?;
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

on_kafka!(one_that_cannot_compile_its_part_is_named_and_serves_on_while_the_others_take_the_table, one_of_three);

async fn one_of_three(stage: Stage) -> Result<()> {
    const SERVICES: [&str; 3] = ["work", "other", "third"];
    let table = |to: &str, more: &str| {
        let third = format!("- {{ name: third, service: third, from: [%in], handler: /third, to: [{to}] }}");
        stage.table(&format!("{}{third}\n        ", table(to, more)))
    };
    let mut services = Vec::new();
    let mut sidecars = Vec::new();
    for name in SERVICES {
        let service = Service::native(Scenario { headers: false, ..Scenario::new() }).await?;
        let mut sidecar = stage.sidecar(name).instance(name).service(name, &service).prepare().await?;
        sidecar.spawn()?;
        sidecars.push(sidecar);
        services.push(service);
    }
    for sidecar in &mut sidecars {
        sidecar.wait_ready().await?;
    }
    let good = stage.file("good.yaml", &table("%out", ""))?;
    sidecars[1].ctl(&["apply", "-f", good.to_str().context("a path")?, "--wait"]).await?.ends(0)?;
    for (sidecar, name) in sidecars.iter().zip(SERVICES) {
        sidecar.wait_running(&[name]).await?;
    }

    // Under load, through a sidecar of a newer version: what is wrong here is the route of one of them.
    let newer = Newer::start(&stage, &sidecars[1]).await?;
    let file = stage.file("newer.yaml", &table("%out, %new", ", filter: 'record.json.n > 1'"))?;
    let reason = ["spec.routes[0].filter: ", "did you mean `record.json`?"];
    let stop = CancellationToken::new();
    let load = Load { connections: 1, ..Load::new(stage.topic("in"), 1_000_000, 50) };
    let publishing = tokio::spawn(load.stubborn(sidecars[0].client(), stop.clone()));
    services[0].wait(50, MINUTE).await?;
    let said = sidecars[1].ctl(&["apply", "-f", file.to_str().context("a path")?, "--wait", "--admin", &newer.url()]).await?.ends(1)?;
    let named = format!("1 instance refused generation 2, and the last good table stays in force there:\n  {}-work: ", stage.mesh());
    ensure!(said.stderr.contains(&named) && reason.iter().all(|part| said.stderr.contains(part)), "{said:?}");
    ensure!(said.stderr.contains("SYNCED   2 of 3: ") && said.stderr.contains("NACKED   1 of 3: "), "{said:?}");
    let status = sidecars[1].status().await?;
    ensure!(status.instances.len() == 3, "{status:#?}");
    for one in &status.instances {
        let refuses = one.instance.ends_with("-work");
        let expected = if refuses { (InstanceState::Nacked, 1, 2) } else { (InstanceState::Synced, 2, 0) };
        ensure!((one.state(), one.generation, one.refused_generation) == expected, "{one:#?}");
        ensure!(reason.iter().all(|part| one.error.contains(part) == refuses), "{one:#?}");
    }
    let served = services[0].total().await?;
    services[0].wait(served + 50, MINUTE).await.context("it serves on")?;
    stop.cancel();
    let (oracle, unsure) = publishing.await??;
    ensure!(unsure == 0, "{unsure} publishes failed");
    let due = 3 * oracle.len();
    for service in &services {
        service.wait(oracle.len() as u64, MINUTE).await?;
        oracle.judge(&deliveries(&service.ledger().await?)?).exactly_once().context("deliveries")?;
    }
    ensure!(stage.read(&sidecars[0], None, &stage.topic("out"), due).await?.len() == due);
    // One route goes by the old table, two by the new one.
    let news = stage.read(&sidecars[0], None, &stage.topic("new"), 1).await?.len();
    sidecars[0].publish(&stage.topic("in"), Some("last"), "application/json", "{}").await?;
    ensure!(stage.read(&sidecars[0], None, &stage.topic("new"), news + 2).await?.len() == news + 2);
    ensure!(stage.read(&sidecars[0], None, &stage.topic("out"), due + 3).await?.len() == due + 3);

    // A good one heals it.
    let healed = stage.file("healed.yaml", &table("%new", ""))?;
    let said = sidecars[2].ctl(&["apply", "-f", healed.to_str().context("a path")?, "--wait"]).await?.ends(0)?;
    ensure!(said.stderr.contains("3 instances run generation 3"), "{said:?}");
    for sidecar in sidecars {
        sidecar.finish().await?;
    }
    Ok(())
}
