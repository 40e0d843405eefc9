//! The history of tables by `mesh-ctl`: listed, compared, rolled back, signed, refused; and fifty writers who race for it.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::future::{join_all, try_join_all};
use mesh_proto::v1::{GetStatusResponse, InstanceState, TableOrigin};
use mesh_tests::{
    broker::Broker,
    kafka::own_kafka_with,
    on_both,
    service::{Scenario, Service},
    sidecar::Sidecar,
    stage::Stage,
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);

fn table(to: &str, hops: u32) -> String {
    format!(
        "
        topics: {{ %in: {{ partitions: 2 }}, %out: {{ partitions: 2 }} }}
        routes:
        - {{ name: work, service: work, from: [%in], handler: /work, to: [{to}], max_hops: {hops} }}
        "
    )
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path")
}

async fn history(sidecar: &Sidecar) -> Result<Vec<Value>> {
    let history = sidecar.ctl(&["history", "-o", "json"]).await?.ends(0)?.json()?;
    Ok(history["generations"].as_array().context("generations")?.clone())
}

fn in_force(status: &GetStatusResponse, generation: u64) -> bool {
    status.instances.iter().all(|one| one.state() == InstanceState::Synced && one.generation == generation)
}

on_both!(tables_are_listed_compared_and_rolled_back, rolled_back);

async fn rolled_back(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    ensure!(sidecar.ctl(&["history"]).await?.success()?.contains("no table applied yet"));
    let one = stage.file("one.yaml", &stage.table(&table("%out", 101)))?;
    let more = "- { name: more, service: work, from: [%in], handler: /more, to: void }";
    let two = stage.file("two.yaml", &stage.table(&format!("{}{more}\n        ", table("%out, %copy", 101))))?;
    let (one, two) = (text(&one)?, text(&two)?);
    sidecar.ctl(&["apply", "-f", one, "-m", "the first", "--wait"]).await?.success()?;
    let waited = sidecar.ctl(&["apply", "-f", two, "--wait"]).await?.ends(0)?;
    ensure!(waited.stderr.contains("SYNCED   1 of 1: ") && waited.stderr.contains("1 instance runs generation 2"), "{waited:?}");

    let found = history(&sidecar).await?;
    ensure!(found.len() == 2 && found[0]["generation"] == 2 && found[0]["in_force"] == true && found[1]["in_force"] == false, "{found:#?}");
    ensure!(found[0]["routes"] == json!({ "added": 1, "changed": 1, "removed": 0 }), "{found:#?}");
    ensure!(found[1]["routes"] == json!({ "added": 1, "changed": 0, "removed": 0 }) && found[1]["message"] == "the first", "{found:#?}");
    ensure!(found[1]["source"] == one && found[1]["digest"].as_str().is_some_and(|digest| digest.starts_with("sha256:")), "{found:#?}");
    ensure!(found.iter().all(|one| one["applied_by"].as_str().is_some_and(|by| !by.is_empty()) && one["refused"] == ""), "{found:#?}");

    let differs = sidecar.ctl(&["diff", "--from", "1", "--to", "2"]).await?.ends(1)?;
    ensure!(differs.stdout.contains("+ routes.more: ") && differs.stdout.contains("~ routes.work.to: "), "{differs:?}");
    let back = sidecar.ctl(&["diff", "--from", "live", "--to", "1"]).await?.ends(1)?;
    ensure!(back.stdout.contains("- routes.more: ") && back.stderr.contains("from generation 2 to generation 1"), "{back:?}");
    sidecar.ctl(&["diff", "--generation", "2"]).await?.ends(0)?;
    sidecar.ctl(&["diff", "--generation", "1", "-f", one]).await?.ends(0)?;
    sidecar.ctl(&["diff", "--from", one, "--to", two, "--admin", "http://127.0.0.1:1"]).await?.ends(1)?;
    let none = sidecar.ctl(&["diff", "--from", "7", "--to", "live"]).await?.ends(2)?;
    ensure!(none.stderr.contains("generation 7"), "{none:?}");

    let dry = sidecar.ctl(&["rollback", "1", "--dry-run"]).await?.ends(0)?;
    ensure!(dry.stdout.contains("- routes.more: ") && dry.stdout.contains("generation 2 stays in force"), "{dry:?}");
    let stale = sidecar.ctl(&["rollback", "1", "--expect-generation", "1"]).await?.ends(3)?;
    ensure!(stale.stderr.contains("two.yaml") && stale.stderr.contains("+ routes.more: "), "who won, and what changed: {stale:?}");
    let none = sidecar.ctl(&["rollback", "9"]).await?.ends(2)?;
    ensure!(none.stderr.contains("generation 9") && none.stderr.contains("mesh-ctl history"), "{none:?}");
    ensure!(history(&sidecar).await?.len() == 2, "nothing was applied");
    let said = sidecar.ctl(&["rollback", "1", "-m", "too much", "--wait"]).await?.ends(0)?;
    ensure!(said.stdout.contains("applied generation 3, the content of generation 1"), "{said:?}");
    sidecar.wait_status("generation 3", MINUTE, |status| in_force(status, 3)).await?;
    sidecar.ctl(&["diff", "--from", "1", "--to", "3"]).await?.ends(0)?;
    let found = history(&sidecar).await?;
    ensure!(found[0]["rollback_to"] == 1 && found[0]["message"] == "too much" && found[0]["digest"] == found[2]["digest"], "{found:#?}");
    let shown = sidecar.ctl(&["history", "--limit", "1"]).await?.success()?;
    ensure!(
        shown.contains("rollback to 1") && shown.contains("IN FORCE") && shown.contains("+0 ~1 -1") && !shown.contains("two.yaml"),
        "{shown}"
    );
    sidecar.wait_running(&["work"]).await?;
    sidecar.publish(&stage.topic("in"), Some("a"), "application/json", "{}").await?;
    ensure!(stage.read(&sidecar, None, &stage.topic("out"), 1).await?.len() == 1, "records flow by the old table");
    // Again: it is in force already.
    let again = sidecar.ctl(&["rollback", "1"]).await?.ends(0)?;
    ensure!(again.stdout.starts_with("unchanged: generation 3"), "{again:?}");
    sidecar.finish().await
}

on_both!(once_a_key_is_trusted_only_signed_tables_are_taken, signed);

async fn signed(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let begin = async |trusted: &[&str]| {
        let sidecar = stage.sidecar("sidecar").service("work", &service);
        if trusted.is_empty() { sidecar.start().await } else { sidecar.env("MESH_CONTROL_TRUSTED_KEYS", &trusted.join(",")).start().await }
    };
    let sidecar = begin(&[]).await?;
    let mut keys = Vec::new();
    for name in ["old.key", "new.key"] {
        let file = stage.folder().join(name);
        let made = sidecar.ctl(&["keys", "generate", "--out", text(&file)?, "-o", "json"]).await?.ends(0)?.json()?;
        ensure!(std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file)?.permissions()) & 0o777 == 0o600);
        let shown = sidecar.ctl(&["keys", "show", text(&file)?, "-o", "json"]).await?.json()?;
        ensure!(shown == made, "{shown} {made}");
        let value = |name: &str| made[name].as_str().map(str::to_owned).context("a key");
        keys.push((text(&file)?.to_owned(), value("key_id")?, value("public_key")?));
    }
    let [(old, old_id, old_public), (new, new_id, new_public)] = keys.as_slice() else { bail!("two keys") };
    let twice = sidecar.ctl(&["keys", "generate", "--out", old]).await?.ends(2)?;
    ensure!(twice.stderr.contains("exists"), "{twice:?}");

    // Before a key is trusted: signed or not.
    let one = stage.file("one.yaml", &stage.table(&table("%out", 101)))?;
    let two = stage.file("two.yaml", &stage.table(&table("%out", 102)))?;
    let (one, two) = (text(&one)?, text(&two)?);
    sidecar.ctl(&["apply", "-f", one]).await?.success()?;
    let anew = sidecar.ctl(&["apply", "-f", one, "--sign-key", old]).await?.success()?;
    ensure!(anew.contains("applied generation 2") && anew.contains(&format!("signed by nobody → key {old_id}")), "{anew}");
    sidecar.finish().await?;

    // From now on.
    let sidecar = begin(&[old_public.as_str()]).await?;
    sidecar.wait_status("generation 2", MINUTE, |status| in_force(status, 2)).await?;
    let unsigned = sidecar.ctl(&["apply", "-f", two]).await?.ends(1)?;
    ensure!(unsigned.stderr.contains("it is not signed") && unsigned.stderr.contains(old_id), "{unsigned:?}");
    let dry = sidecar.ctl(&["apply", "-f", two, "--dry-run"]).await?.ends(0)?;
    ensure!(dry.stderr.contains("it would be refused: it is not signed"), "{dry:?}");
    let foreign = sidecar.ctl(&["apply", "-f", two, "--sign-key", new]).await?.ends(1)?;
    ensure!(foreign.stderr.contains(&format!("it is signed by key {new_id}")), "{foreign:?}");
    let unread = sidecar.ctl(&["apply", "-f", two, "--sign-key", two]).await?.ends(2)?;
    ensure!(unread.stderr.contains("is no private key"), "{unread:?}");
    let stale = sidecar.ctl(&["apply", "-f", two, "--sign-key", old, "--expect-generation", "1"]).await?.ends(3)?;
    ensure!(stale.stderr.contains("generation 2 is"), "{stale:?}");
    sidecar.ctl(&["apply", "-f", two, "--sign-key", old, "--wait"]).await?.success()?;
    sidecar.ctl(&["rollback", "1"]).await?.ends(1)?;
    let back = sidecar.ctl(&["rollback", "1", "--sign-key", old]).await?.ends(0)?;
    ensure!(back.stdout.contains("applied generation 4") && back.stderr.contains("generation 1 was not signed by this key"), "{back:?}");
    let back = sidecar.ctl(&["rollback", "3", "--sign-key", old]).await?.ends(0)?;
    ensure!(back.stdout.contains("applied generation 5") && !back.stderr.contains("not signed"), "{back:?}");
    let found = history(&sidecar).await?;
    ensure!(found[0]["signed_by"] == **old_id && found[4]["signed_by"] == Value::Null, "{found:#?}");
    ensure!(found[4]["refused"].as_str().is_some_and(|reason| reason.contains("not signed")) && found[3]["refused"] == "", "{found:#?}");

    if stage.is_kafka() {
        // What comes by the log is not trusted either: here through a sidecar that trusts everybody.
        let careless = stage.sidecar("careless").service("other", &service).start().await?;
        let refused = careless.ctl(&["apply", "-f", one, "--wait"]).await?.ends(1)?;
        ensure!(refused.stderr.contains("1 instance refused generation 6") && refused.stderr.contains("it is not signed"), "{refused:?}");
        ensure!(refused.stderr.contains("NACKED   1 of 2: "), "{refused:?}");
        let status = sidecar.status().await?;
        let mine = status.instances.iter().find(|one| one.state() == InstanceState::Nacked).context("NACKED")?;
        ensure!(mine.generation == 5 && mine.refused_generation == 6 && mine.error.contains("it is not signed"), "{mine:#?}");
        let refused = async {
            while sidecar.metric("mesh_table_refused").await? < 1.0 {
                // Another process has no event to await.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(MINUTE, refused).await.context("mesh_table_refused")??;
        careless.finish().await?;
        // The next good one heals it.
        sidecar.ctl(&["apply", "-f", two, "--sign-key", old, "--wait"]).await?.success()?;
    }
    sidecar.finish().await?;

    // Rotation: both are good, the table is signed anew, the old one goes.
    let sidecar = begin(&[old_public.as_str(), new_public.as_str()]).await?;
    let got = stage.file("got.yaml", &sidecar.ctl(&["get"]).await?.success()?)?;
    let anew = sidecar.ctl(&["apply", "-f", text(&got)?, "--sign-key", new]).await?.success()?;
    ensure!(anew.contains(&format!("signed by key {old_id} → key {new_id}")), "{anew}");
    sidecar.finish().await?;
    let sidecar = begin(&[new_public.as_str()]).await?;
    sidecar.wait_running(&["work"]).await?;
    let status = sidecar.status().await?;
    ensure!(in_force(&status, status.generation) && status.generation >= 6, "{status:#?}");
    let gone = sidecar.ctl(&["apply", "-f", one, "--sign-key", old]).await?.ends(1)?;
    ensure!(gone.stderr.contains(&format!("it is signed by key {old_id}")), "{gone:?}");
    sidecar.finish().await
}

/// The envelope of a copy on disk, and its routes: a frame for each.
fn opened(copy: &[u8]) -> Result<(Value, String)> {
    let length = zstd::zstd_safe::find_frame_compressed_size(copy).map_err(|_| anyhow::anyhow!("no frame"))?;
    let (envelope, routes) = copy.split_at_checked(length).context("a frame")?;
    Ok((serde_json::from_slice(&zstd::decode_all(envelope)?)?, String::from_utf8(zstd::decode_all(routes)?)?))
}

fn packed(envelope: &Value, routes: &str) -> Result<Vec<u8>> {
    let frame = |content: &[u8]| zstd::bulk::compress(content, 3);
    Ok([frame(&serde_json::to_vec(envelope)?)?, frame(routes.as_bytes())?].concat())
}

/// The copies on disk of a sidecar whose broker is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_on_disk_that_is_not_good_is_refused_with_its_reason() -> Result<()> {
    Stage::run(Broker::Embedded, async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        let key = stage.folder().join("mesh.key");
        let made = sidecar.ctl(&["keys", "generate", "--out", text(&key)?, "-o", "json"]).await?.ends(0)?.json()?;
        let public = made["public_key"].as_str().context("a key")?;
        for hops in [101, 102] {
            let file = stage.file("table.yaml", &stage.table(&table("%out", hops)))?;
            sidecar.ctl(&["apply", "-f", text(&file)?, "--sign-key", text(&key)?, "--wait"]).await?.success()?;
        }
        sidecar.finish().await?;
        let state = stage.folder().join("sidecar-state");
        let (good, old) = (std::fs::read(state.join("table.zst"))?, std::fs::read(state.join("table.previous.zst"))?);

        // Without its broker, and with these copies on the disk.
        let start = async |name: &str, copies: [&[u8]; 2], trusted: Option<&str>| {
            let folder = stage.folder().join(format!("{name}-state"));
            std::fs::create_dir_all(&folder)?;
            std::fs::write(folder.join("table.zst"), copies[0])?;
            std::fs::write(folder.join("table.previous.zst"), copies[1])?;
            let nowhere = json!({ "kafka": { "bootstrap.servers": "127.0.0.1:1" } });
            let sidecar = stage.sidecar(name).service("work", &service).broker(nowhere);
            let sidecar = match trusted {
                Some(key) => sidecar.env("MESH_CONTROL_TRUSTED_KEYS", key),
                None => sidecar,
            };
            let mut sidecar = sidecar.prepare().await?;
            sidecar.spawn()?;
            anyhow::Ok(sidecar)
        };
        let cached = |generation: u64| {
            move |status: &GetStatusResponse| {
                let mine = &status.instances[0];
                mine.generation == generation && mine.origin() == TableOrigin::Cache && mine.state() == InstanceState::Cached
            }
        };
        let (envelope, routes) = opened(&good)?;
        let with = |field: &str, value: Value| {
            let mut changed = envelope.clone();
            changed[field] = value;
            packed(&changed, &routes)
        };
        let mut forged = envelope["signature"].clone();
        forged["ed25519"] = json!("A".repeat(86) + "==");
        let cases = [
            ("garbage", vec![0; 100], "cannot be unpacked"),
            ("truncated", good[..good.len() / 2].to_vec(), "cannot be unpacked"),
            ("shortened", good[..good.len() - 3].to_vec(), "cannot be unpacked"),
            ("declared", with("declared", json!("{}"))?, "says digest"),
            ("route", packed(&envelope, &routes.replace("work", "walk"))?, "is not what its envelope says"),
            ("schema", with("schema", json!(3))?, "has schema 3, and this version reads schema 1 and 2 only"),
            ("signature", with("signature", forged)?, "does not fit"),
            ("unsigned", with("signature", Value::Null)?, "it is not signed"),
            ("generation", with("generation", json!(3))?, "does not fit"),
            ("mesh", with("mesh", json!("other"))?, "says mesh"),
        ];
        let check = async |what: &str, content: &[u8], reason: &str| {
            let mut sidecar = start(what, [content, &old], Some(public)).await?;
            let status = sidecar.wait_status(what, MINUTE, cached(1)).await.with_context(|| format!("{what}: the last good copy runs"))?;
            let waiting = status.instances[0].waiting.join("\n");
            ensure!(waiting.contains("table.zst: ") && waiting.contains(reason), "{what}: {waiting}");
            ensure!(waiting.contains("generation 1, the copy before it, takes its place"), "{what}: {waiting}");
            sidecar.kill9().await
        };
        try_join_all(cases.iter().map(|(what, content, reason)| check(what, content, reason))).await?;

        let mut sidecar = start("good", [&good, &old], Some(public)).await?;
        let status = sidecar.wait_status("CACHED", MINUTE, cached(2)).await?;
        ensure!(!status.instances[0].waiting.join("").contains("table.zst"), "{status:#?}");
        sidecar.kill9().await?;
        // Neither is good: nothing runs, and it says so.
        let mut sidecar = start("neither", [&good[..9], &old[..old.len() - 2]], None).await?;
        let refused = |status: &GetStatusResponse| status.instances[0].waiting.iter().any(|reason| reason.contains("there is no table"));
        let status = sidecar.wait_status("both refused", MINUTE, refused).await?;
        ensure!(status.instances[0].generation == 0, "{status:#?}");
        let shown = sidecar.ctl(&["status"]).await?.success()?;
        ensure!(shown.contains("table.zst: ") && shown.contains("table.previous.zst: "), "{shown}");
        sidecar.kill9().await
    })
    .await
}

/// Fifty writers through five sidecars: of each generation exactly one wins, whoever reads it, and whenever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_racing_writers_exactly_one_wins_each_generation() -> Result<()> {
    // Old generations are to be compacted away within the test.
    let properties = "log.roll.ms=1000\nlog.cleaner.backoff.ms=200\nlog.cleaner.min.cleanable.ratio=0.001\nlog.cleaner.delete.retention.ms=0\n\
                      log.cleaner.dedupe.buffer.size=4194304\nlog.cleaner.threads=1\n";
    let Some(kafka) = own_kafka_with(properties.to_owned()).await else { return Ok(()) };
    Stage::run(Broker::Kafka(kafka.bootstrap().to_owned()), race).await
}

const WRITERS: usize = 50;

async fn race(stage: Stage) -> Result<()> {
    let mut sidecars = Vec::new();
    for number in 0..5 {
        let mut sidecar = stage.sidecar(&format!("sidecar{number}")).prepare().await?;
        sidecar.spawn()?;
        sidecars.push(sidecar);
    }
    for sidecar in &mut sidecars {
        sidecar.wait_ready().await?;
    }
    let file = |name: &str, hops: u32| stage.file(name, &stage.table(&table("%out", hops)));
    let first = file("first.yaml", 1)?;
    sidecars[0].ctl(&["apply", "-f", text(&first)?, "--wait"]).await?.success()?;
    let files: Vec<_> = (0..WRITERS).map(|n| file(&format!("w{n}.yaml"), 100 + n as u32)).collect::<Result<_>>()?;

    // All build on generation 1: one wins.
    let apply = |n: usize| {
        let (sidecar, file) = (&sidecars[n % sidecars.len()], &files[n]);
        async move { sidecar.ctl(&["apply", "-f", text(file)?, "--expect-generation", "1"]).await }
    };
    let mut winner = None;
    let mut losers = Vec::new();
    for (n, said) in join_all((0..WRITERS).map(apply)).await.into_iter().enumerate() {
        let said = said?;
        match said.status {
            Some(0) => ensure!(winner.replace(n).is_none(), "two winners of generation 2: {said:?}"),
            Some(3) => losers.push(said),
            _ => bail!("neither won nor lost: {said:?}"),
        }
    }
    let winner = winner.context("nobody won")?;
    for said in &losers {
        let (by, change) = (format!("w{winner}.yaml"), format!("~ routes.work.max_hops: 1 → {}", 100 + winner));
        ensure!(said.stderr.contains(&by) && said.stderr.contains(&change), "who won ({winner}), and what changed: {said:?}");
    }

    // Whatever is in force: each writer tries until its table was in force. Another sidecar starts in the middle.
    let write = |n: usize| {
        let (sidecar, file) = (&sidecars[n % sidecars.len()], &files[n]);
        async move {
            let mut conflicts = 0;
            loop {
                let said = sidecar.ctl(&["apply", "-f", text(file)?, "-o", "json"]).await?;
                match said.status {
                    Some(0) => {
                        let applied = said.json()?;
                        return anyhow::Ok((
                            applied["generation"].as_u64().context("a generation")?,
                            n,
                            applied["changed"] == true,
                            conflicts,
                        ));
                    }
                    Some(3) => conflicts += 1,
                    _ => bail!("{said:?}"),
                }
            }
        }
    };
    let mut middle = stage.sidecar("middle").prepare().await?;
    let start = async {
        middle.spawn()?;
        middle.wait_ready().await
    };
    let (written, ()) = tokio::try_join!(try_join_all((0..WRITERS).map(write)), start)?;
    let conflicts: usize = written.iter().map(|(.., conflicts)| conflicts).sum();
    ensure!(conflicts > 0, "the writers never met: this test proves nothing");
    let mut claimed: BTreeMap<u64, usize> = BTreeMap::from([(2, winner)]);
    for (generation, n, changed, _) in written {
        // The winner of before may have found its table in force still.
        if changed {
            ensure!(claimed.insert(generation, n).is_none(), "two winners of generation {generation}");
        }
    }
    let newest = *claimed.keys().next_back().context("generations")?;
    ensure!(claimed.keys().copied().eq(2..=newest) && newest >= WRITERS as u64, "{claimed:?}");
    for sidecar in sidecars.iter().chain([&middle]) {
        for entry in history(sidecar).await? {
            let generation = entry["generation"].as_u64().context("a generation")?;
            let source = entry["source"].as_str().context("a source")?;
            let expected = claimed.get(&generation).map_or_else(|| "first.yaml".to_owned(), |n| format!("w{n}.yaml"));
            ensure!(source.ends_with(&expected), "generation {generation} is said to be {expected}, and is {source}");
        }
    }

    // Old generations are deleted, and compacted away; then one comes that never saw them.
    let mut newest = newest;
    let mut round = 0;
    loop {
        let last = file("last.yaml", 1_000 + round)?;
        sidecars[1].ctl(&["apply", "-f", text(&last)?]).await?.success()?;
        newest += 1;
        let kept = generations_in_the_topic(&stage).await?;
        if !kept.contains_key(&1) && !kept.contains_key(&2) {
            ensure!(kept.keys().next_back() == Some(&newest), "{kept:?}");
            break;
        }
        round += 1;
        ensure!(round < 40, "nothing is compacted away: {kept:?}");
        // Another process has no event to await: a segment is closed a second after it began.
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    // One is down during three applies, and comes back to the last.
    let mut down = sidecars.pop().context("a sidecar")?;
    down.sigterm(MINUTE).await?;
    for round in 0..3 {
        let last = file("last.yaml", 2_000 + round)?;
        sidecars[2].ctl(&["apply", "-f", text(&last)?]).await?.success()?;
    }
    newest += 3;
    down.start().await?;
    sidecars.push(down);
    let late = stage.sidecar("late").start().await?;
    let everywhere = |status: &GetStatusResponse| status.instances.len() == 7 && in_force(status, newest);
    let status = sidecars[0].wait_status("the last table everywhere", MINUTE, everywhere).await?;
    let digest = &status.instances[0].digest;
    ensure!(!digest.is_empty() && status.instances.iter().all(|one| one.digest == *digest), "{status:#?}");
    let here = late.ctl(&["get", "-o", "json"]).await?.json()?;
    for sidecar in sidecars.iter().chain([&middle]) {
        ensure!(sidecar.ctl(&["get", "-o", "json"]).await?.json()? == here);
    }
    let oldest = history(&late).await?.last().and_then(|entry| entry["generation"].as_u64()).context("the oldest generation")?;
    ensure!(oldest > 2 && newest - oldest <= 51, "{oldest} to {newest}");
    for sidecar in sidecars.into_iter().chain([middle, late]) {
        sidecar.finish().await?;
    }
    Ok(())
}

/// How many tables each generation of this mesh has in the control topic, as any client reads it: tombstones aside.
async fn generations_in_the_topic(stage: &Stage) -> Result<BTreeMap<u64, usize>> {
    const TOPIC: &str = "__mesh.control";
    const WAIT: Duration = Duration::from_secs(10);
    let bootstrap = stage.broker().bootstrap().context("Kafka")?.to_owned();
    let prefix = format!("{}/", stage.mesh());
    let read = move || {
        let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", bootstrap).set("group.id", "none").create()?;
        let mut from = TopicPartitionList::new();
        from.add_partition_offset(TOPIC, 0, Offset::Beginning)?;
        consumer.assign(&from)?;
        let (_, end) = consumer.fetch_watermarks(TOPIC, 0, WAIT)?;
        let mut found = BTreeMap::new();
        loop {
            let message = consumer.poll(WAIT).context("the log ends with the record in force")??;
            let key = String::from_utf8_lossy(message.key().unwrap_or_default()).into_owned();
            let generation = key.strip_prefix(&prefix).and_then(|rest| rest.split('/').next()?.parse::<u64>().ok());
            if message.payload().is_some() {
                *found.entry(generation.unwrap_or(0)).or_default() += 1;
            }
            if message.offset() + 1 >= end {
                return anyhow::Ok(found);
            }
        }
    };
    tokio::task::spawn_blocking(read).await?
}
