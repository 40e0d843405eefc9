//! Canaries by `mesh-ctl`: chosen by label and service, followed, promoted, aborted by hand and by themselves.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::InstanceState;
use mesh_tests::{
    on_both,
    service::{Rule, Scenario, Service},
    sidecar::Sidecar,
    stage::Stage,
};
use serde_json::Value;

const MINUTE: Duration = Duration::from_secs(60);

fn table(handler: &str, to: &str) -> String {
    format!(
        "
        topics: {{ %in: {{ partitions: 2 }}, %out: {{ partitions: 2 }}, %new: {{ partitions: 2 }} }}
        routes:
        - {{ name: work, service: work, from: [%in], handler: {handler}, to: [{to}] }}
        "
    )
}

async fn rollout(sidecar: &Sidecar) -> Result<Value> {
    let output = sidecar.ctl(&["rollout", "status", "-o", "json"]).await?.ends(0)?;
    serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))
}

/// Waits for a state of the rollout.
async fn until(sidecar: &Sidecar, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
    let looked = tokio::time::timeout(MINUTE, async {
        loop {
            let rollout = rollout(sidecar).await?;
            if holds(&rollout) {
                return anyhow::Ok(rollout);
            }
            // Another process has no event to await.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    looked.await.with_context(|| format!("{what} does not come"))?
}

on_both!(a_canary_is_followed_promoted_and_aborted, followed);

async fn followed(stage: Stage) -> Result<()> {
    let scenario = Scenario::new().on("/bad", [Rule::status(422).text("no")]);
    let service = Service::native(scenario).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).env("MESH_LABELS", "{zone: west}").start().await?;
    let file = |name: &str, handler: &str, to: &str| -> Result<String> {
        let file = stage.file(name, &stage.table(&table(handler, to)))?;
        file.to_str().map(str::to_owned).context("a path")
    };
    let (one, two, bad) = (file("one.yaml", "/work", "%out")?, file("two.yaml", "/work", "%new")?, file("bad.yaml", "/bad", "%out")?);
    ensure!(sidecar.ctl(&["rollout", "status"]).await?.ends(0)?.stdout.starts_with("no rollout"));
    sidecar.ctl(&["rollout", "promote"]).await?.ends(1)?;
    sidecar.ctl(&["apply", "-f", &one, "--wait"]).await?.ends(0)?;
    sidecar.wait_running(&["work"]).await?;

    // For somebody else: nothing happens here.
    let other = sidecar.ctl(&["apply", "-f", &two, "--canary", "label.zone=east"]).await?.ends(0)?;
    ensure!(
        other.stderr.contains("no instance is chosen by label.zone=east") && other.stdout.contains("applied generation 2, a canary for"),
        "{other:?}"
    );
    ensure!(sidecar.status().await?.instances[0].generation == 1);
    let refused = sidecar.ctl(&["apply", "-f", &two]).await?.ends(1)?;
    ensure!(refused.stderr.contains("generation 2 is being rolled out to canary label.zone=east"), "{refused:?}");
    sidecar.ctl(&["rollout", "abort", "--generation", "7"]).await?.ends(1)?;
    sidecar.ctl(&["rollout", "abort", "--reason", "nobody is there", "--wait"]).await?.ends(0)?;
    let shown = sidecar.ctl(&["rollout", "status"]).await?.ends(0)?;
    ensure!(shown.stdout.contains("ABORTED; all run generation 1") && shown.stdout.contains("nobody is there"), "{shown:?}");

    // One that makes dead letters ends by itself.
    let canary = ["--canary", "service=work,label.zone=west", "--max-dead-letters", "1", "--wait"];
    sidecar.ctl(&[&["apply", "-f", &bad][..], &canary].concat()).await?.ends(0)?;
    let open = rollout(&sidecar).await?;
    ensure!(open["state"] == "OPEN" && open["rollout"]["selector"] == "service=work label.zone=west", "{open:#}");
    ensure!(open["instances"][0]["generation"] == 3 && open["rollout"]["stable_generation"] == 1, "{open:#}");
    let status = sidecar.ctl(&["status"]).await?.ends(0)?;
    ensure!(status.stdout.contains("generation 1, and generation 3, a canary, for service=work label.zone=west"), "{status:?}");
    for key in ["a", "b"] {
        sidecar.publish(&stage.topic("in"), Some(key), "application/json", "{}").await?;
    }
    let over = until(&sidecar, "the end", |rollout| rollout["state"] == "ABORTED").await?;
    let ended = over["rollout"]["aborted"].as_str().unwrap_or_default();
    ensure!(ended.contains("dead letters since its instances took it: 2 (1 allowed)"), "{over:#}");
    sidecar
        .wait_status("generation 1", MINUTE, |status| {
            status.instances[0].generation == 1 && status.instances[0].state() == InstanceState::Synced
        })
        .await?;
    sidecar.wait_running(&["work"]).await?;
    sidecar.publish(&stage.topic("in"), Some("c"), "application/json", "{}").await?;
    ensure!(stage.read(&sidecar, None, &stage.topic("out"), 1).await?.len() == 1, "records flow by the old table");
    let promoted = sidecar.ctl(&["rollout", "promote"]).await?.ends(1)?;
    ensure!(promoted.stderr.contains("no rollout is open: generation 3 was aborted"), "{promoted:?}");

    // One that is good, signed or not, is promoted.
    sidecar.ctl(&["apply", "-f", &two, "--canary", "percent=99,instance=nobody"]).await?.ends(0)?;
    sidecar.ctl(&["rollout", "promote", "--generation", "3"]).await?.ends(3)?;
    let promoted = sidecar.ctl(&["rollout", "promote", "-m", "it is good", "--wait"]).await?.ends(0)?;
    ensure!(promoted.stdout.contains("applied generation 5, the canary of generation 4, for all"), "{promoted:?}");
    sidecar.wait_running(&["work"]).await?;
    sidecar.publish(&stage.topic("in"), Some("d"), "application/json", "{}").await?;
    ensure!(stage.read(&sidecar, None, &stage.topic("new"), 1).await?.len() == 1, "records flow by the new table");
    let history = sidecar.ctl(&["history"]).await?.ends(0)?;
    ensure!(history.stdout.contains("promotes 4") && history.stdout.matches("ABORTED").count() == 2, "{history:?}");
    ensure!(history.stderr.contains("generation 2 was aborted by ") && history.stderr.contains(": nobody is there"), "{history:?}");
    for wrong in [&["--canary", "zone=west"][..], &["--canary", "percent=100"], &["--max-dead-letters", "1"]] {
        sidecar.ctl(&[&["apply", "-f", &one][..], wrong].concat()).await?.ends(2)?;
    }
    sidecar.finish().await
}
