//! Canaries that their instances refuse, and canaries under trusted keys.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::{GetStatusResponse, InstanceState, InstanceStatus};
use mesh_tests::{
    load::Load,
    newer::Newer,
    on_both, on_kafka,
    oracle::deliveries,
    service::{Scenario, Service},
    sidecar::Sidecar,
    stage::Stage,
};
use sha2::{Digest as _, Sha256};

use crate::rollout::until;

const MINUTE: Duration = Duration::from_secs(60);

fn table(handler: &str, to: &str, more: &str) -> String {
    format!(
        "
        topics: {{ %in: {{ partitions: 6 }}, %out: {{ partitions: 2 }}, %new: {{ partitions: 2 }} }}
        routes:
        - {{ name: work, service: work, from: [%in], handler: {handler}, to: [{to}]{more} }}
        "
    )
}

fn file(stage: &Stage, name: &str, spec: &str) -> Result<String> {
    stage.file(name, &stage.table(spec))?.to_str().map(str::to_owned).context("a path")
}

/// Waits until these instances run a generation, and refuse another one or none.
async fn stand(sidecar: &Sidecar, expected: &[(&str, u64, u64)]) -> Result<()> {
    let as_told = |status: &GetStatusResponse| {
        let of = |(name, generation, refused): &(&str, u64, u64)| {
            let state = if *refused > 0 { InstanceState::Nacked } else { InstanceState::Synced };
            let fits = |one: &&InstanceStatus| {
                one.instance.ends_with(&format!("-{name}"))
                    && (one.generation, one.refused_generation, one.state()) == (*generation, *refused, state)
            };
            status.instances.iter().any(|one| fits(&one))
        };
        status.instances.len() == expected.len() && expected.iter().all(of)
    };
    sidecar.wait_status(&format!("{expected:?}"), MINUTE, as_told).await?;
    Ok(())
}

on_kafka!(a_canary_that_more_instances_refuse_than_may_ends_by_itself, refused);

async fn refused(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let make = |name: &str, zone: &str| {
        stage.sidecar(name).instance(name).service("work", &service).env("MESH_LABELS", &format!("{{zone: {zone}}}"))
    };
    let east = make("east", "east").start().await?;
    let one = make("one", "west").start().await?;
    let mut two = make("two", "west").prepare().await?;
    let good = file(&stage, "good.yaml", &table("/work", "%out", ""))?;
    east.ctl(&["apply", "-f", &good, "--wait"]).await?.ends(0)?;
    for sidecar in [&east, &one] {
        sidecar.wait_running(&["work"]).await?;
    }

    // Of the two that it chooses one runs yet, and may refuse it.
    let newer = Newer::start(&stage, &east).await?;
    let wrong = file(&stage, "wrong.yaml", &table("/new", "%new", ", filter: 'record.json.n > 1'"))?;
    let canary = ["apply", "-f", &wrong, "--admin", &newer.url(), "--canary", "label.zone=west"];
    let said = east.ctl(&[&canary[..], &["--max-refusals", "1"]].concat()).await?.ends(0)?;
    ensure!(said.stdout.contains("applied generation 2, a canary for label.zone=west"), "{said:?}");
    stand(&east, &[("east", 1, 0), ("one", 1, 2)]).await?;
    let mut oracle = Load::new(stage.topic("in"), 60, 12).http(&east).await?;
    service.wait(60, MINUTE).await?;
    let looks = east.ctl(&["rollout", "status", "--watch", "1s", "--count", "3"]).await?.ends(0)?.stdout;
    ensure!(looks.matches("generation 2, a canary: OPEN; the others run generation 1").count() == 3, "{looks}");
    ensure!(looks.matches("refusals      1, of at most 1").count() == 3 && looks.contains("did you mean `record.json`?"), "{looks}");

    two.start().await?;
    let over = until(&east, "the end", |rollout| rollout["state"] == "ABORTED").await?;
    let ended = over["rollout"]["aborted"].as_str().unwrap_or_default();
    let by = |name: &str| ended.starts_with(&format!("aborted by instance {}-{name} at ", stage.mesh()));
    ensure!(by("one") || by("two"), "one that it chose ends it: {over:#}");
    ensure!(ended.contains(": refused by 2 (1 allowed): ") && ended.contains("did you mean `record.json`?"), "{over:#}");
    stand(&east, &[("east", 1, 0), ("one", 1, 0), ("two", 1, 0)]).await?;
    two.wait_running(&["work"]).await?;

    // None may refuse it, and whoever waits for it is told.
    let said = one.ctl(&[&canary[..], &["--wait"]].concat()).await?.ends(1)?;
    ensure!(said.stderr.contains("generation 3") && said.stderr.contains("did you mean `record.json`?"), "{said:?}");
    let over = until(&one, "the end", |rollout| rollout["rollout"]["generation"] == 3 && rollout["state"] == "ABORTED").await?;
    let ended = over["rollout"]["aborted"].as_str().unwrap_or_default();
    ensure!(ended.contains("(0 allowed): "), "{over:#}");
    stand(&one, &[("east", 1, 0), ("one", 1, 0), ("two", 1, 0)]).await?;

    oracle.merge(Load::new(stage.topic("in"), 60, 12).from(100).http(&two).await?);
    service.wait(120, MINUTE).await?;
    let ledger = service.ledger().await?;
    ensure!(ledger.iter().all(|entry| entry.path == "/work"), "a table that was refused delivered something");
    oracle.judge(&deliveries(&ledger)?).exactly_once()?;
    for sidecar in [east, one, two] {
        sidecar.finish().await?;
    }
    Ok(())
}

on_both!(once_a_key_is_trusted_only_signed_canaries_and_promotions_are_taken, signed);

/// Where among a hundred a selector's `percent` sees an instance.
fn share(instance: &str) -> u64 {
    let digest = Sha256::digest(instance);
    digest.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte)) % 100
}

async fn signed(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    // One that a share of the mesh chooses, and a smaller one does not.
    let mut names = (0..).map(|number| format!("work-{number}"));
    let name = names.find(|name| (1..99).contains(&share(&format!("{}-{name}", stage.mesh())))).context("a name")?;
    let instance = format!("{}-{name}", stage.mesh());
    let (fewer, enough) = (format!("percent={}", share(&instance)), format!("percent={}", share(&instance) + 1));
    let begin = async |trusted: Option<&str>| {
        let sidecar = stage.sidecar("sidecar").instance(&name).service("work", &service);
        match trusted {
            Some(key) => sidecar.env("MESH_CONTROL_TRUSTED_KEYS", key).start().await,
            None => sidecar.start().await,
        }
    };
    let (old, new) = (file(&stage, "old.yaml", &table("/old", "%out", ""))?, file(&stage, "new.yaml", &table("/new", "%new", ""))?);

    let careless = begin(None).await?;
    let mut keys = Vec::new();
    for key in ["mesh.key", "foreign.key"] {
        let path = stage.folder().join(key).to_str().context("a path")?.to_owned();
        let made = careless.ctl(&["keys", "generate", "--out", &path, "-o", "json"]).await?.ends(0)?.json()?;
        keys.push((path, made["public_key"].as_str().context("a key")?.to_owned()));
    }
    let ((key, public), (foreign, _)) = (&keys[0], &keys[1]);
    careless.ctl(&["apply", "-f", &old, "--sign-key", key, "--wait"]).await?.ends(0)?;
    careless.finish().await?;

    let sidecar = begin(Some(public)).await?;
    sidecar.wait_running(&["work"]).await?;
    let unsigned = sidecar.ctl(&["apply", "-f", &new, "--canary", &enough]).await?.ends(1)?;
    ensure!(unsigned.stderr.contains("it is not signed"), "{unsigned:?}");
    ensure!(sidecar.ctl(&["rollout", "status"]).await?.ends(0)?.stdout.starts_with("no rollout"));
    let few = sidecar.ctl(&["apply", "-f", &new, "--canary", &fewer, "--sign-key", key]).await?.ends(0)?;
    ensure!(few.stderr.contains(&format!("no instance is chosen by {fewer}")), "{few:?}");
    sidecar.ctl(&["rollout", "abort"]).await?.ends(0)?;
    // By the environment, as a pipeline has it.
    let sign = [("MESH_SIGN_KEY", key.as_str())];
    let said = sidecar.ctl_env(&["apply", "-f", &new, "--canary", &enough, "--wait"], &sign).await?.ends(0)?;
    ensure!(said.stderr.contains("1 instance runs generation 3") && !said.stderr.contains("no instance is chosen"), "{said:?}");
    sidecar.wait_running(&["work"]).await?;
    sidecar.publish(&stage.topic("in"), Some("a"), "application/json", "{}").await?;
    ensure!(stage.read(&sidecar, None, &stage.topic("new"), 1).await?.len() == 1, "records flow by the canary");

    let unsigned = sidecar.ctl(&["rollout", "promote"]).await?.ends(1)?;
    ensure!(unsigned.stderr.contains("it is not signed"), "{unsigned:?}");
    let untrusted = sidecar.ctl(&["rollout", "promote", "--sign-key", foreign]).await?.ends(1)?;
    ensure!(untrusted.stderr.contains("it is signed by key "), "{untrusted:?}");
    until(&sidecar, "it is open still", |rollout| rollout["state"] == "OPEN" && rollout["rollout"]["generation"] == 3).await?;
    let promoted = sidecar.ctl_env(&["rollout", "promote", "--wait"], &sign).await?.ends(0)?;
    ensure!(promoted.stdout.contains("applied generation 4, the canary of generation 3, for all"), "{promoted:?}");
    stand(&sidecar, &[(&name, 4, 0)]).await?;
    let history = sidecar.ctl(&["history", "-o", "json"]).await?.ends(0)?.json()?;
    let by: Vec<bool> = history["generations"].as_array().context("generations")?.iter().map(|one| one["signed_by"].is_string()).collect();
    ensure!(by == [true; 4], "{history:#}");
    sidecar.finish().await?;

    // What comes by the log is not trusted either: first a canary, then a promotion, by a sidecar that trusts everybody.
    let careless = begin(None).await?;
    careless.ctl(&["apply", "-f", &old, "--canary", &enough, "--max-refusals", "7", "--wait"]).await?.ends(0)?;
    careless.finish().await?;
    let sidecar = begin(Some(public)).await?;
    let over = until(&sidecar, "the end", |rollout| rollout["state"] == "ABORTED").await?;
    let ended = over["rollout"]["aborted"].as_str().unwrap_or_default();
    // What it allows is not signed either, and counts for nothing.
    let reason = format!(": refused by 1 (0 allowed): {instance}: it is not signed");
    ensure!(ended.starts_with(&format!("aborted by instance {instance} at ")) && ended.contains(&reason), "{over:#}");
    stand(&sidecar, &[(&name, 4, 0)]).await?;
    sidecar.ctl(&["apply", "-f", &old, "--canary", &enough, "--sign-key", key, "--wait"]).await?.ends(0)?;
    sidecar.finish().await?;
    let careless = begin(None).await?;
    careless.ctl(&["rollout", "promote", "--wait"]).await?.ends(0)?;
    careless.finish().await?;
    let sidecar = begin(Some(public)).await?;
    stand(&sidecar, &[(&name, 4, 7)]).await?;
    sidecar.wait_running(&["work"]).await?;
    sidecar.publish(&stage.topic("in"), Some("b"), "application/json", "{}").await?;
    ensure!(stage.read(&sidecar, None, &stage.topic("new"), 2).await?.len() == 2, "records flow by the last good table");
    ensure!(service.ledger_of("/old").await?.is_empty(), "what was not signed delivered something");
    sidecar.finish().await
}
