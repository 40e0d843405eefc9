//! Dead letters and replays, by `mesh-ctl`: found, sent back once, deleted; ranges copied to where they are wanted.

use std::{collections::BTreeMap, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    broker::Broker,
    on_both,
    process::Output,
    service::{Condition, Rule, Scenario, Service},
    sidecar::{Sidecar, disposition},
    stage::Stage,
};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);
const ROUTES: &str = "
    defaults: { dead_letter: %work.dlq }
    topics: { %in: { partitions: 2 } }
    routes:
    - { name: work, service: work, from: [%in], handler: /work, to: void, retry: { attempts: 1 }, breaker: { failures: 100000 } }
    - { name: other, service: work, from: [%in], handler: /other, to: void, dead_letter: %other.dlq }
    ";

fn with(field: &str, value: impl Into<Value>) -> Condition {
    Condition { field_equals: Some((field.into(), value.into())), ..Condition::default() }
}

fn lines(output: &Output) -> Result<Vec<Value>> {
    output.stdout.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

async fn publish(sidecar: &Sidecar, stage: &Stage, numbers: std::ops::Range<i64>) -> Result<()> {
    for number in numbers {
        let body = json!({ "n": number, "bad": number % 3 }).to_string();
        sidecar.publish(&stage.topic("in"), Some(&format!("k{}", number % 7)), "application/json", body).await?;
    }
    Ok(())
}

/// How often each number was delivered to a path.
async fn delivered(service: &Service, path: &str) -> Result<BTreeMap<i64, usize>> {
    let mut found = BTreeMap::new();
    for entry in service.ledger_of(path).await? {
        *found.entry(entry.json()["n"].as_i64().unwrap_or(-1)).or_default() += 1;
    }
    Ok(found)
}

on_both!(dead_letters_are_listed_shown_and_sent_back_once, letters);

async fn letters(stage: Stage) -> Result<()> {
    let broken = [Rule::status(400).text("no such price").when(with("bad", 0)), Rule::status(500).when(with("bad", 1)), Rule::echo()];
    let mut service = Service::native(Scenario::new().on("/work", broken)).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(ROUTES).await?;
    sidecar.wait_running(&["work", "other"]).await?;
    publish(&sidecar, &stage, 0..60).await?;
    sidecar
        .wait_status("40 dead letters", MINUTE, |status| {
            disposition(status, "work", "dead_lettered") == 40 && disposition(status, "other", "void") == 60
        })
        .await?;

    let listed = sidecar.ctl(&["dlq", "list", "-o", "json"]).await?.json()?;
    let work = listed.as_array().into_iter().flatten().find(|one| one["route"] == "work").context("work")?.clone();
    ensure!(work["letters"] == 40 && work["reasons"] == json!({ "attempts": 20, "status": 20 }) && work["redriven"] == 0, "{listed}");
    ensure!(listed.as_array().is_some_and(|all| all.iter().any(|one| one["route"] == "other" && one["letters"] == 0)), "{listed}");
    ensure!(sidecar.ctl(&["dlq", "list", "work"]).await?.success()?.contains("attempts 20, status 20"));

    let shown = lines(&sidecar.ctl(&["dlq", "show", "work", "--reason", "status", "--limit", "0", "-o", "json"]).await?)?;
    ensure!(shown.len() == 20, "{}", shown.len());
    let one = &shown[0];
    ensure!(one["detail"].as_str().is_some_and(|detail| detail.contains("400")) && one["attempts"] == 1, "{one}");
    ensure!(
        one["origin"]["topic"] == json!(stage.topic("in")) && one["value"].as_str().is_some_and(|value| value.contains("\"bad\":0")),
        "{one}"
    );
    let place = format!("{}/{}", one["place"]["partition"], one["place"]["offset"]);
    let found = lines(&sidecar.ctl(&["dlq", "show", "work", "--place", &place, "-o", "json"]).await?)?;
    ensure!(found == [one.clone()], "{found:?}");
    let of_key = lines(&sidecar.ctl(&["dlq", "show", "work", "--key", "k3", "--limit", "0", "-o", "json"]).await?)?;
    ensure!(!of_key.is_empty() && of_key.iter().all(|letter| letter["key"] == "k3"), "{of_key:?}");
    ensure!(lines(&sidecar.ctl(&["dlq", "show", "work", "--until", "1h", "-o", "json"]).await?)?.is_empty());
    let text = sidecar.ctl(&["dlq", "show", "work", "--limit", "1"]).await?.success()?;
    ensure!(text.contains("reason") && text.contains("origin") && text.contains(&stage.topic("in")), "{text}");

    // The service is mended.
    service.set(Scenario::new()).await?;
    service.reset().await?;
    let preview = sidecar.ctl(&["dlq", "redrive", "work", "--reason", "status", "-o", "json"]).await?.json()?;
    ensure!(
        preview["redriven"] == 20 && preview["executed"] == false && preview["samples"].as_array().is_some_and(|s| s.len() == 5),
        "{preview}"
    );
    ensure!(service.total().await? == 0, "a preview sent something");
    let said = sidecar.ctl(&["dlq", "redrive", "work", "--place", &place, "--execute", "-o", "json"]).await?.json()?;
    ensure!(said["redriven"] == 1 && said["executed"] == true, "{said}");
    // A limit counts what is sent: the same command again goes on with the next.
    for (sent, already) in [(12, 1), (7, 13)] {
        let limited = ["dlq", "redrive", "work", "--reason", "status", "--limit", "12", "--execute", "-o", "json"];
        let said = sidecar.ctl(&limited).await?.json()?;
        ensure!(said["redriven"] == sent && said["already"] == already, "{said}");
    }
    service.wait(20, MINUTE).await?;
    let again = sidecar.ctl(&["dlq", "redrive", "work", "--reason", "status", "--execute", "-o", "json"]).await?.json()?;
    ensure!(again["redriven"] == 0 && again["already"] == 20, "{again}");
    sidecar.wait_status("the other route passes them over", MINUTE, |status| disposition(status, "other", "filtered") == 20).await?;
    ensure!(service.total().await? == 20, "{} deliveries: each letter goes to its route, once", service.total().await?);
    let delivered = delivered(&service, "/work").await?;
    ensure!(delivered.len() == 20 && delivered.iter().all(|(n, times)| n % 3 == 0 && *times == 1), "{delivered:?}");
    // What told of its death is gone, its identity is not.
    let id = one["mesh_id"].as_str().context("an id")?;
    let ledger = service.ledger_of("/work").await?;
    let entry = ledger.iter().find(|entry| entry.id == id).with_context(|| format!("{id} was not delivered under its id"))?;
    ensure!(entry.header("mesh-dlq-reason").is_none() && entry.header("mesh-header-mesh-dlq-reason").is_none(), "{entry:?}");

    // The rest to every route, at a rate.
    let begin = std::time::Instant::now();
    let said = sidecar.ctl(&["dlq", "redrive", "work", "--every-route", "--rate", "10", "--execute", "-o", "json"]).await?.json()?;
    ensure!(said["redriven"] == 20 && said["already"] == 20, "{said}");
    ensure!(begin.elapsed() >= Duration::from_millis(1900), "20 letters at 10 a second took {:?}", begin.elapsed());
    service.wait(60, MINUTE).await?;
    let listed = sidecar.ctl(&["dlq", "list", "work", "-o", "json"]).await?.json()?;
    ensure!(listed[0]["redriven"] == 40, "{listed}");

    let purge = sidecar.ctl(&["dlq", "purge", "work", "--all"]).await?.success()?;
    ensure!(purge.contains("preview"), "{purge}");
    ensure!(sidecar.ctl(&["dlq", "list", "work", "-o", "json"]).await?.json()?[0]["letters"] == 40);
    ensure!(sidecar.ctl(&["dlq", "purge", "work"]).await?.status == Some(2), "what is to go has to be said");
    sidecar.ctl(&["dlq", "purge", "work", "--all", "--execute"]).await?.success()?;
    ensure!(sidecar.ctl(&["dlq", "list", "work", "-o", "json"]).await?.json()?[0]["letters"] == 0);
    ensure!(sidecar.ctl(&["dlq", "show", "wrok"]).await?.status == Some(2));
    sidecar.finish().await
}

/// A time in between, as flags take it: later than what was stored, and earlier than what will be.
async fn now() -> Result<String> {
    // Times of records and of flags are whole milliseconds, which no event tells.
    tokio::time::sleep(Duration::from_millis(5)).await;
    let time = humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string();
    tokio::time::sleep(Duration::from_millis(5)).await;
    Ok(time)
}

on_both!(parts_of_the_letters_are_chosen_by_time_key_and_place, parts);

async fn parts(stage: Stage) -> Result<()> {
    let failing = || [Rule::status(400)];
    let mut service = Service::native(Scenario::new().on("/work", failing()).on("/other", failing())).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    // Both write into one topic.
    sidecar.apply(&ROUTES.replace("%other.dlq", "%work.dlq")).await?;
    sidecar.wait_running(&["work", "other"]).await?;
    let dead = |count| move |status: &_| ["work", "other"].iter().all(|route| disposition(status, route, "dead_lettered") == count);
    publish(&sidecar, &stage, 0..14).await?;
    sidecar.wait_status("28 dead letters", MINUTE, dead(14)).await?;
    let between = now().await?;
    publish(&sidecar, &stage, 14..20).await?;
    sidecar.wait_status("40 dead letters", MINUTE, dead(20)).await?;

    // By time and key, of this route alone.
    let numbers = async |arguments: &[&str]| -> Result<Vec<i64>> {
        let shown = sidecar.ctl(&[&["dlq", "show", "work", "--limit", "0", "-o", "json"], arguments].concat()).await?;
        let of = |letter: &Value| {
            ensure!(letter["route"] == "work", "{letter}");
            let value: Value = serde_json::from_str(letter["value"].as_str().context("a value")?)?;
            value["n"].as_i64().context("n")
        };
        let mut numbers = lines(&shown)?.iter().map(of).collect::<Result<Vec<_>>>()?;
        numbers.sort_unstable();
        Ok(numbers)
    };
    let late: Vec<i64> = (14..20).collect();
    ensure!(numbers(&["--since", &between]).await? == late);
    ensure!(numbers(&["--since", "1h", "--until", &between, "--key", "k3"]).await? == [3, 10]);

    service.set(Scenario::new()).await?;
    service.reset().await?;
    let redrive = async |arguments: &[&str]| -> Result<Value> {
        sidecar.ctl(&[&["dlq", "redrive", "work", "--execute", "-o", "json"], arguments].concat()).await?.ends(0)?.json()
    };
    let said = redrive(&["--until", &between, "--key", "k3"]).await?;
    ensure!(said["matched"] == 2 && said["redriven"] == 2, "{said}");
    let said = redrive(&["--since", &between]).await?;
    ensure!(said["matched"] == 6 && said["redriven"] == 6, "{said}");
    service.wait(8, MINUTE).await?;
    sidecar.wait_status("the other route passes them over", MINUTE, |status| disposition(status, "other", "filtered") == 8).await?;
    let sent: Vec<i64> = delivered(&service, "/work").await?.into_keys().collect();
    ensure!(sent == [&[3, 10], &late[..]].concat() && service.total().await? == 8, "{sent:?}");

    // Deleted: what lies there of both, and only if that is said. Where the partitions begin tells what is left.
    let purge = async |arguments: &[&str]| sidecar.ctl(&[&["dlq", "purge", "work", "-o", "json"], arguments].concat()).await;
    let preview = purge(&["--until", &between]).await?.ends(0)?.json()?;
    ensure!(preview["offsets"] == 28 && preview["shared_with"] == json!(["other"]) && preview["executed"] == false, "{preview}");
    let refused = purge(&["--until", &between, "--execute"]).await?;
    ensure!(refused.status == Some(1) && refused.stderr.contains("holds the dead letters of other too"), "{refused:?}");
    ensure!(refused.stderr.contains("--shared") && purge(&["--all"]).await?.json()?["offsets"] == 40, "{refused:?}");
    let said = purge(&["--until", &between, "--shared", "--execute"]).await?.ends(0)?.json()?;
    let left = purge(&["--all"]).await?.ends(0)?.json()?;
    ensure!(said["offsets"] == 28 && said["executed"] == true && left["offsets"] == 12, "{said}: {left}");

    // Of one partition, below a place: the last of those that are left in both.
    let mut partitions = left["partitions"].as_array().context("partitions")?.clone();
    ensure!(partitions.len() == 2, "the late ones lie in both: {left}");
    let last = partitions[1]["until"].as_i64().context("its end")? - 1;
    let below = format!("{}/{last}", partitions[1]["partition"]);
    let said = purge(&["--before", &below, "--shared", "--execute"]).await?.ends(0)?.json()?;
    ensure!(said["partitions"].as_array().is_some_and(|all| all.len() == 1 && all[0]["until"] == last), "{said}");
    ensure!(said["partitions"][0]["from"].as_i64() < Some(last), "there was nothing to delete: {said}");
    partitions[1]["from"] = json!(last);
    ensure!(purge(&["--all"]).await?.json()?["partitions"] == json!(partitions), "{partitions:?}");
    sidecar.finish().await
}

on_both!(a_redrive_that_is_cut_goes_on_and_sends_nothing_twice, cut);

async fn cut(stage: Stage) -> Result<()> {
    let mut service = Service::native(Scenario::new().on("/work", [Rule::status(400)])).await?;
    let mut sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(ROUTES).await?;
    sidecar.wait_running(&["work", "other"]).await?;
    publish(&sidecar, &stage, 0..120).await?;
    sidecar.wait_status("120 dead letters", MINUTE, |status| disposition(status, "work", "dead_lettered") == 120).await?;
    service.set(Scenario::new()).await?;
    service.reset().await?;
    // The command is killed, then the sidecar that carries one out.
    for round in 1..=2 {
        let mut running = sidecar.ctl_start(&["dlq", "redrive", "work", "--rate", "20", "--execute"], Stdio::null())?;
        service.wait(service.total().await? + 5, MINUTE).await?;
        if round == 1 {
            running.kill().await?;
        } else {
            sidecar.kill9().await?;
            running.wait().await?;
            sidecar.start().await?;
            sidecar.wait_running(&["work", "other"]).await?;
        }
    }
    let said = sidecar.ctl(&["dlq", "redrive", "work", "--execute", "-o", "json"]).await?.json()?;
    let (redriven, already) = (said["redriven"].as_u64().unwrap_or(0), said["already"].as_u64().unwrap_or(0));
    ensure!(redriven + already == 120 && already >= 10 && redriven > 0, "{said}");
    // The copies are counted in the topic itself: the crash may have delivered one again.
    let found = stage.read(&sidecar, None, &stage.topic("in"), 240).await?;
    let mut ids: BTreeMap<String, usize> = BTreeMap::new();
    for found in &found {
        *ids.entry(found.header("mesh-id").context("an id")?).or_default() += 1;
    }
    ensure!(ids.len() == 120 && ids.values().all(|times| *times == 2), "each record and one copy of it: {ids:?}");
    sidecar.finish().await
}

on_both!(of_a_letter_that_was_cut_the_whole_record_is_sent_back, whole);

async fn whole(stage: Stage) -> Result<()> {
    const SIZES: [usize; 3] = [10, 1_500, 2_500];
    let mut service = Service::native(Scenario::new().on("/work", [Rule::status(400)])).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    // It takes less than the others.
    let letters = stage.topic("work.dlq");
    sidecar.ctl(&["topics", "create", &letters, "--partitions", "2", "--config", "max.message.bytes=1200"]).await?.success()?;
    sidecar.apply(ROUTES).await?;
    sidecar.wait_running(&["work", "other"]).await?;
    for (done, size) in (1..).zip(SIZES) {
        let body = json!({ "n": size, "text": "x".repeat(size) }).to_string();
        sidecar.publish(&stage.topic("in"), Some(&format!("k{size}")), "application/json", body).await?;
        // One after the other: a broker that refuses one of a batch refuses all.
        sidecar.wait_status("a dead letter", MINUTE, |status| disposition(status, "work", "dead_lettered") == done).await?;
    }
    let shown = lines(&sidecar.ctl(&["dlq", "show", "work", "-o", "json"]).await?)?;
    let cut: Vec<&Value> = shown.iter().filter(|letter| letter["cut"] == "value").collect();
    ensure!(cut.len() == 2 && cut.iter().all(|letter| letter["value"].is_null()) && shown.len() == 3, "{shown:?}");
    ensure!(shown.iter().filter(|letter| letter["cut"].is_null()).count() == 1, "{shown:?}");
    let text = sidecar.ctl(&["dlq", "show", "work"]).await?.success()?;
    ensure!(text.matches("  cut     its value was left out").count() == 2, "{text}");
    let preview = sidecar.ctl(&["dlq", "redrive", "work"]).await?.success()?;
    ensure!(preview.contains("2 letters cut: of each the record itself would go"), "{preview}");
    ensure!(preview.matches("its value was left out; the record goes as it lies at ").count() == 2, "{preview}");

    service.set(Scenario::new()).await?;
    service.reset().await?;
    let said = sidecar.ctl(&["dlq", "redrive", "work", "--execute", "-o", "json"]).await?.json()?;
    ensure!(said["redriven"] == 3 && said["refused"] == 0 && said["cut"] == 2, "{said}");
    service.wait(3, MINUTE).await?;
    for entry in service.ledger_of("/work").await? {
        let value = entry.json();
        let size = usize::try_from(value["n"].as_u64().context("n")?)?;
        ensure!(SIZES.contains(&size) && value["text"] == json!("x".repeat(size)), "{value}");
    }
    sidecar.finish().await
}

on_both!(a_range_is_replayed_into_a_topic_or_to_one_route, replay);

async fn replay(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            defaults: { dead_letter: %dlq }
            topics: { %in: { partitions: 2 }, %copy: { partitions: 3 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: void }
            - { name: other, service: work, from: [%in], handler: /other, to: void }
            ",
        )
        .await?;
    sidecar.wait_running(&["work", "other"]).await?;
    publish(&sidecar, &stage, 0..40).await?;
    service.wait(80, MINUTE).await?;
    let (from, to) = (stage.topic("in"), stage.topic("copy"));
    let run = async |arguments: &[&str]| -> Result<Value> {
        sidecar.ctl(&[&["replay", "--from", &from, "-o", "json"], arguments].concat()).await?.json()
    };
    let said = run(&["--to", &to]).await?;
    ensure!(said["copied"] == 40 && said["executed"] == false, "{said}");
    let said = run(&["--to", &to, "--filter", "record.json.bad == 1", "--execute"]).await?;
    ensure!(said["copied"] == 13 && said["filtered"] == 27, "{said}");
    let copies = stage.read(&sidecar, None, &to, 13).await?;
    let sources = stage.read(&sidecar, None, &from, 40).await?;
    ensure!(copies.len() == 13, "{}", copies.len());
    for copy in &copies {
        let id = copy.header("mesh-id").context("an id")?;
        let source = sources.iter().find(|source| source.header("mesh-id").as_ref() == Some(&id)).context("its source")?;
        ensure!(source.value == copy.value && source.key == copy.key, "{copy:?}");
        ensure!(copy.header("content-type") == source.header("content-type"), "{copy:?}");
    }
    // A range of time, at a rate.
    let between = now().await?;
    publish(&sidecar, &stage, 40..50).await?;
    service.wait(100, MINUTE).await?;
    let said = run(&["--to", &to, "--until", &between]).await?;
    ensure!(said["copied"] == 40, "{said}");
    let begin = std::time::Instant::now();
    let said = run(&["--to", &to, "--since", &between, "--rate", "5", "--execute"]).await?;
    ensure!(said["copied"] == 10 && begin.elapsed() >= Duration::from_millis(1_800), "{said} in {:?}", begin.elapsed());
    let mut copied: Vec<_> = stage.read(&sidecar, None, &to, 23).await?.iter().filter_map(|copy| copy.json()["n"].as_i64()).collect();
    copied.sort_unstable();
    ensure!(copied.len() == 23 && copied[13..] == (40..50).collect::<Vec<_>>(), "{copied:?}");
    // A range of one partition, to one route alone.
    service.reset().await?;
    let said = run(&["--partition", "0", "--from-offset", "1", "--to-offset", "3", "--route", "work", "--execute"]).await?;
    ensure!(said["copied"] == 3 && said["to"] == json!(from), "{said}");
    service.wait(3, MINUTE).await?;
    sidecar.wait_status("the other route passes them over", MINUTE, |status| disposition(status, "other", "filtered") == 3).await?;
    ensure!(delivered(&service, "/work").await?.len() == 3 && service.total().await? == 3, "copies reached another route");
    for (arguments, said) in [
        (&["--to", &*from][..], "would reach every route"),
        (&["--to", "no-such-topic"], "there is no topic no-such-topic"),
        (&["--route", "nobody"], "there is no route nobody"),
        (&["--to", &to, "--filter", "record.jsn.a == 1"], "jsn"),
        (&["--to", &to, "--partition", "9"], "there is no partition 9"),
        (&["--to", "__mesh.control"], "the mesh's own"),
    ] {
        let output = sidecar.ctl(&[&["replay", "--from", &from], arguments].concat()).await?;
        ensure!(output.status == Some(2) && output.stderr.contains(said), "{arguments:?}: {output:?}");
    }
    sidecar.finish().await
}

/// Two redrives of one route at once, through two sidecars: one wins, and nothing is sent twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_redrives_at_once_send_nothing_twice() -> Result<()> {
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let mut service = Service::native(Scenario::new().on("/work", [Rule::status(400)])).await?;
        let first = stage.sidecar("first").service("work", &service).start().await?;
        let second = stage.sidecar("second").start().await?;
        first.apply(ROUTES).await?;
        first.wait_running(&["work", "other"]).await?;
        publish(&first, &stage, 0..60).await?;
        first.wait_status("60 dead letters", MINUTE, |status| disposition(status, "work", "dead_lettered") == 60).await?;
        service.set(Scenario::new()).await?;
        let redrive = ["dlq", "redrive", "work", "--rate", "15", "--execute"];
        let (one, two) = tokio::try_join!(first.ctl(&redrive), second.ctl(&redrive))?;
        ensure!(one.status == Some(0) || two.status == Some(0), "{one:?}\n{two:?}");
        first.ctl(&["dlq", "redrive", "work", "--execute"]).await?.success()?;
        let found = stage.read(&first, None, &stage.topic("in"), 120).await?;
        ensure!(found.len() == 120, "{} records where each of 60 was to come back once", found.len());
        second.finish().await?;
        first.finish().await
    })
    .await
}
