//! Canaries by `mesh-ctl`: chosen by label and service, followed, promoted, aborted by hand and by themselves.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::{GetStatusResponse, InstanceState, RouteState};
use mesh_tests::{
    on_both, on_kafka,
    service::{Entry, Rule, Scenario, Service},
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
pub(crate) async fn until(sidecar: &Sidecar, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
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
    sidecar.ctl(&["rollout", "abort", "--generation", "7"]).await?.ends(3)?;
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

/// One in the east, two in the west.
const ZONES: [&str; 3] = ["east", "west", "west"];
/// Records of a wave: enough that each partition gets some.
const WAVE: usize = 48;

/// Three sidecars of one service, each with a process of it.
struct Zones {
    stage: Stage,
    services: Vec<Service>,
    sidecars: Vec<Sidecar>,
}

impl Zones {
    async fn start(stage: &Stage) -> Result<Self> {
        let (mut services, mut sidecars) = (Vec::new(), Vec::new());
        for (number, zone) in ZONES.into_iter().enumerate() {
            let service = Service::native(Scenario::new()).await?;
            let name = format!("{zone}{number}");
            let sidecar = stage.sidecar(&name).instance(&name).service("work", &service);
            let mut sidecar = sidecar.env("MESH_LABELS", &format!("{{zone: {zone}}}")).prepare().await?;
            sidecar.spawn()?;
            services.push(service);
            sidecars.push(sidecar);
        }
        for sidecar in &mut sidecars {
            sidecar.wait_ready().await?;
        }
        Ok(Self { stage: stage.clone(), services, sidecars })
    }

    /// Waits until these run these generations, each with partitions of its own.
    async fn run(&self, generations: [u64; 3]) -> Result<()> {
        let as_told = |status: &GetStatusResponse| {
            let of = |number: usize| {
                let name = format!("{}-{}{number}", self.stage.mesh(), ZONES[number]);
                let one = status.instances.iter().find(|one| one.instance == name);
                one.is_some_and(|one| {
                    let route = one.routes.iter().find(|route| route.route == "work");
                    let runs = route.is_some_and(|route| route.state() == RouteState::Running && route.partitions > 0);
                    one.state() == InstanceState::Synced && one.generation == generations[number] && runs
                })
            };
            (0..ZONES.len()).all(of)
        };
        self.sidecars[0].wait_status(&format!("{generations:?}"), MINUTE, as_told).await?;
        Ok(())
    }

    async fn publish(&self, records: usize) -> Result<()> {
        for service in &self.services {
            service.reset().await?;
        }
        for n in 0..records {
            self.sidecars[0].publish(&self.stage.topic("in"), Some(&format!("k{n}")), "application/json", "{}").await?;
        }
        Ok(())
    }

    /// What each service was given since the last wave began, once it is this much together.
    async fn given(&self, records: usize) -> Result<Vec<Vec<Entry>>> {
        let given = async {
            loop {
                let mut ledgers = Vec::new();
                for service in &self.services {
                    ledgers.push(service.ledger().await?);
                }
                if ledgers.iter().map(Vec::len).sum::<usize>() >= records {
                    return anyhow::Ok(ledgers);
                }
                // Three processes have no event in common.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(MINUTE, given).await.context("the deliveries of a wave")?
    }

    /// Kills one once the broker has it that all is done, so that whoever comes after it repeats nothing.
    async fn kill9(&mut self, number: usize) -> Result<()> {
        let committed = async {
            loop {
                let said = self.sidecars[0].ctl(&["lag", "work", "-o", "json"]).await?.ends(0)?.json()?;
                if said["groups"][0]["lag_records"] == 0 {
                    return anyhow::Ok(());
                }
            }
        };
        tokio::time::timeout(MINUTE, committed).await.context("the commit")??;
        self.sidecars[number].kill9().await
    }

    /// Publishes a wave, and checks that each sidecar, with at least one record, called the handler of the table that it ought to run. How many
    /// records went by each.
    async fn wave(&self, handlers: [&str; 3]) -> Result<Vec<usize>> {
        self.publish(WAVE).await?;
        let given = self.given(WAVE).await?;
        for (number, (ledger, handler)) in given.iter().zip(handlers).enumerate() {
            ensure!(!ledger.is_empty(), "sidecar {number} had no record");
            ensure!(ledger.iter().all(|entry| entry.path == handler), "sidecar {number} did not call {handler}: {ledger:#?}");
        }
        ensure!(given.iter().map(Vec::len).sum::<usize>() == WAVE, "nothing is delivered twice");
        Ok(given.iter().map(Vec::len).collect())
    }
}

on_kafka!(a_canary_over_three_processes_is_ended_by_one_that_was_not_asked, three_zones);

async fn three_zones(stage: Stage) -> Result<()> {
    let mut zones = Zones::start(&stage).await?;
    let file = |name: &str, handler: &str, to: &str| -> Result<String> {
        let text = table(handler, to).replace("partitions: 2", "partitions: 6");
        stage.file(name, &stage.table(&text))?.to_str().map(str::to_owned).context("a path")
    };
    let (old, new) = (file("old.yaml", "/old", "%out")?, file("new.yaml", "/new", "%new")?);
    zones.sidecars[0].ctl(&["apply", "-f", &old, "--wait"]).await?.ends(0)?;
    zones.run([1, 1, 1]).await?;
    let mut out: usize = zones.wave(["/old"; 3]).await?.iter().sum();

    // The chosen run the new table, the other one the old table; also after one of them was killed.
    let canary = ["--canary", "label.zone=west", "--max-dead-letters", "1", "--wait"];
    zones.sidecars[0].ctl(&[&["apply", "-f", &new][..], &canary].concat()).await?.ends(0)?;
    zones.run([1, 2, 2]).await?;
    let mut moved = 0;
    for killed in [false, true] {
        if killed {
            zones.kill9(2).await?;
            zones.sidecars[2].start().await?;
            zones.run([1, 2, 2]).await?;
        }
        let went = zones.wave(["/old", "/new", "/new"]).await?;
        (out, moved) = (out + went[0], moved + went[1] + went[2]);
    }
    for (topic, due) in [("out", out), ("new", moved)] {
        let found = stage.read(&zones.sidecars[0], None, &stage.topic(topic), due).await?;
        ensure!(found.len() == due, "{topic} has {} records, {due} are due", found.len());
    }

    // Dead letters at one of them while the other is away; the one that is asked has none, and no part in it.
    zones.kill9(1).await?;
    zones.services[2].set(Scenario::new().on("/new", [Rule::status(422).text("no")])).await?;
    zones.publish(WAVE).await?;
    let over = until(&zones.sidecars[0], "the end", |rollout| rollout["state"] == "ABORTED").await?;
    let ended = over["rollout"]["aborted"].as_str().unwrap_or_default();
    let by = format!("aborted by instance {}-west2 at ", stage.mesh());
    ensure!(ended.starts_with(&by) && ended.contains("dead letters since its instances took it: "), "{over:#}");
    // It had the canary on its disk, and comes back to what all run. Then one more that is killed after the end.
    zones.sidecars[1].start().await?;
    zones.run([1, 1, 1]).await?;
    let given = zones.given(WAVE).await?;
    ensure!(given[0].iter().chain(&given[1]).all(|entry| entry.path == "/old"), "{given:#?}");
    let dead = given[2].iter().filter(|entry| entry.path == "/new").count();
    ensure!(dead > 1, "{given:#?}");
    out += given.iter().map(Vec::len).sum::<usize>() - dead;
    zones.kill9(2).await?;
    zones.sidecars[2].start().await?;
    zones.run([1, 1, 1]).await?;
    out += zones.wave(["/old"; 3]).await?.iter().sum::<usize>();
    for (topic, due) in [("out", out), ("new", moved), ("dlq", dead)] {
        let found = stage.read(&zones.sidecars[0], None, &stage.topic(topic), due).await?;
        ensure!(found.len() == due, "{topic} has {} records, {due} are due", found.len());
    }
    for sidecar in zones.sidecars {
        sidecar.finish().await?;
    }
    Ok(())
}
