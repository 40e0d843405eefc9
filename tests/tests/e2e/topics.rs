//! Topics and records by `mesh-ctl`: made, written, read, followed, copied, altered, deleted; and how far groups are behind.

use std::{collections::BTreeMap, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::RouteState;
use mesh_tests::{
    on_both,
    process::Output,
    service::{Rule, Scenario, Service},
    sidecar::Sidecar,
    stage::Stage,
};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

const MINUTE: Duration = Duration::from_secs(60);

fn lines(output: &str) -> Result<Vec<Value>> {
    output.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// A refusal: its exit code, and a word of what it says.
fn refused(output: &Output, code: i32, said: &str) -> Result<()> {
    ensure!(output.status == Some(code) && output.stderr.contains(said), "{code} and {said:?} is due: {output:?}");
    Ok(())
}

/// Everything that a topic has.
async fn tailed(sidecar: &Sidecar, topic: &str, more: &[&str]) -> Result<Vec<Value>> {
    lines(&sidecar.ctl(&[&["tail", topic, "-o", "json"], more].concat()).await?.success()?)
}

on_both!(records_are_produced_tailed_and_copied_to_the_byte, produced);

async fn produced(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").start().await?;
    let (topic, copy) = (stage.topic("in"), stage.topic("copy"));
    for topic in [&topic, &copy] {
        let said = sidecar.ctl(&["topics", "create", topic, "--partitions", "2", "-o", "json"]).await?.ends(0)?.json()?;
        ensure!(said == json!({ "topic": topic, "partitions": 2, "created": true }), "{said}");
    }
    let produce =
        async |arguments: &[&str], input: &[u8]| sidecar.ctl_with(&[&["produce", &topic], arguments].concat(), input.to_vec()).await;
    let json = ["--content-type", "application/json"];
    let said = produce(&[&["--key", "k1", "--value", "{\"n\": 1}", "--header", "source=web"], &json[..]].concat(), b"").await?.success()?;
    ensure!(said.starts_with(&format!("stored {topic}/")), "{said}");
    let said = produce(&["--key", "k2", "--tombstone", "-o", "json"], b"").await?.ends(0)?.json()?;
    ensure!(said["stored"] == 1 && said["topic"] == json!(topic) && said["mesh_id"].is_string(), "{said}");
    produce(&["--header", "content-type=application/octet-stream"], b"\xff\x00\nbin").await?.success()?;
    produce(&["--id", "given"], "{\n \"pretty\": true }\n".as_bytes()).await?.success()?;
    let many: String = (0..700).map(|number| format!("{{\"n\":{number}}}\n{}", if number % 7 == 0 { "\n" } else { "" })).collect();
    let said = produce(&[&["--lines"], &json[..]].concat(), many.as_bytes()).await?.success()?;
    ensure!(said.trim() == "700 records stored", "{said}");

    let all = tailed(&sidecar, &topic, &[]).await?;
    ensure!(all.len() == 704, "{}", all.len());
    let one = |key: &str| all.iter().find(|record| record["key"]["text"] == key).with_context(|| key.to_owned());
    let first = one("k1")?;
    ensure!(first["value"] == json!({ "json": { "n": 1 } }) && first["content_type"] == "application/json", "{first}");
    ensure!(first["headers"] == json!([{ "name": "source", "value": { "text": "web" } }]) && first["mesh_id"].is_string(), "{first}");
    ensure!(one("k2")?["value"].is_null(), "{}", one("k2")?);
    ensure!(all.iter().any(|record| record["value"]["base64"] == "/wAKYmlu"), "the bytes of the binary one");
    let given = all.iter().find(|record| record["mesh_id"] == "given").context("the one with an id")?;
    ensure!(given["value"]["text"] == "{\n \"pretty\": true }\n", "JSON that a line cannot hold as it is: {given}");

    // What was read is published elsewhere, and is the same.
    let text = sidecar.ctl(&["tail", &topic, "-o", "json"]).await?.success()?;
    let said = sidecar.ctl_with(&["produce", &copy, "--json"], text.into_bytes()).await?.success()?;
    ensure!(said.trim() == "704 records stored", "{said}");
    let copies = tailed(&sidecar, &copy, &[]).await?;
    let by_id = |records: &[Value]| -> Result<BTreeMap<String, Value>> {
        let part = |record: &Value| -> Result<(String, Value)> {
            let mut record = record.as_object().context("an object")?.clone();
            ["topic", "partition", "offset"].iter().for_each(|name| drop(record.remove(*name)));
            Ok((record["mesh_id"].as_str().context("an id")?.to_owned(), Value::Object(record)))
        };
        records.iter().map(part).collect()
    };
    ensure!(by_id(&all)? == by_id(&copies)?, "a copy differs");
    ensure!(copies.iter().all(|record| record["topic"] == json!(copy)), "the command's topic counts");

    // Parts of it.
    let odd = tailed(&sidecar, &topic, &["--filter", "'source' in record.headers"]).await?;
    ensure!(odd.len() == 1 && odd[0] == *first, "{odd:?}");
    ensure!(tailed(&sidecar, &topic, &["--limit", "5"]).await?.len() == 5);
    ensure!(tailed(&sidecar, &topic, &["--from", "latest"]).await?.is_empty());
    ensure!(tailed(&sidecar, &topic, &["--from", "-1h"]).await?.len() == 704);
    ensure!(tailed(&sidecar, &topic, &["--from", "-3", "--partition", "1"]).await?.len() == 3);
    let place = |record: &Value| (record["partition"].as_i64(), record["offset"].as_i64());
    let zero: Vec<_> = tailed(&sidecar, &topic, &["--partition", "0", "--from", "2", "--limit", "3"]).await?.iter().map(place).collect();
    ensure!(zero == [(Some(0), Some(2)), (Some(0), Some(3)), (Some(0), Some(4))], "{zero:?}");
    let both = sidecar.ctl(&["tail", &topic, &copy, "--limit", "1408"]).await?.success()?;
    ensure!(both.lines().count() == 1408 && both.lines().any(|line| line.starts_with(&format!("{copy}/"))), "a line for each record");
    let table = sidecar.ctl(&["tail", &topic, "--filter", "'source' in record.headers"]).await?;
    ensure!(table.stdout.trim_end().ends_with("k1  {\"n\":1}") && table.stderr.contains("1 record, 703 filtered out"), "{table:?}");

    // What is refused.
    let bad = "{\"value\":1}\nno json\n\n{\"value\":2,\"headers\":{\"mesh-hops\":\"1\"}}\n{\"key\":\"x\"}\n{\"value\":3}\n";
    let output = produce(&["--json", "-o", "json"], bad.as_bytes()).await?;
    let said: Value = serde_json::from_str(&output.stdout)?;
    let numbers: Vec<_> = said["faults"].as_array().into_iter().flatten().filter_map(|fault| fault["line"].as_u64()).collect();
    let sorted: std::collections::BTreeSet<u64> = numbers.iter().copied().collect();
    ensure!(output.status == Some(1) && said["stored"] == 2 && said["refused"] == 3 && sorted == [2, 4, 5].into(), "{output:?}");
    ensure!(
        ["line 2: refused", "line 4: refused: invalid-header", "line 5: refused"].iter().all(|said| output.stderr.contains(said)),
        "{output:?}"
    );
    for (topic, said) in
        [("void", "`void` is no topic"), ("__mesh.control", "internal"), ("a/b", "a character other than"), ("", "is empty")]
    {
        refused(&sidecar.ctl(&["produce", topic, "--value", "x"]).await?, 1, said)?;
    }
    refused(&produce(&["--value", "x", "--header", "mesh-hops=1"], b"").await?, 1, "invalid-header")?;
    ensure!(produce(&["--value", "x", "--lines"], b"").await?.status == Some(2), "one of them");
    let near = stage.topic("inn");
    if stage.is_kafka() {
        refused(&sidecar.ctl_with(&["produce", &near, "--lines"], many.into_bytes()).await?, 1, "topics create")?;
    }
    refused(&sidecar.ctl(&["tail", &near]).await?, 2, &format!("did you mean {topic}?"))?;
    refused(&sidecar.ctl(&["tail", &topic, "--filter", "record.jsn.a == 1"]).await?, 2, "jsn")?;
    refused(&sidecar.ctl(&["tail", &topic, "--partition", "9"]).await?, 2, "there is no partition 9")?;
    ensure!(sidecar.log_text().contains("an operator published records"), "it is not in the log");
    sidecar.finish().await
}

on_both!(a_topic_is_followed_until_the_client_goes, followed);

async fn followed(stage: Stage) -> Result<()> {
    let mut sidecar = stage.sidecar("sidecar").start().await?;
    let topic = stage.topic("in");
    sidecar.ctl(&["topics", "create", &topic, "--partitions", "1"]).await?.success()?;
    sidecar.ctl(&["produce", &topic, "--value", "before"]).await?.success()?;
    let readers = readers(&mut sidecar)?;
    let mut running = sidecar.ctl_start(&["tail", &topic, "-f", "--from", "0", "-o", "json"], Stdio::piped())?;
    let mut out = BufReader::new(running.stdout.take().context("its output")?).lines();
    let mut next = async || -> Result<Value> {
        let line = tokio::time::timeout(MINUTE, out.next_line()).await?.map_err(anyhow::Error::from)?.context("a line")?;
        Ok(serde_json::from_str(&line)?)
    };
    ensure!(next().await?["value"]["text"] == "before");
    for value in ["one", "two"] {
        sidecar.ctl(&["produce", &topic, "--value", value]).await?.success()?;
        ensure!(next().await?["value"]["text"] == value);
    }
    running.kill().await?;
    // A consumer of Kafka's has a thread: it ends with the client.
    let begin = std::time::Instant::now();
    while self::readers(&mut sidecar)? > readers {
        ensure!(begin.elapsed() < MINUTE, "the sidecar reads on for a client that is gone");
        // A process has no event for the end of a thread.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // One that ends by itself, and one that a sidecar's end ends.
    let limited = sidecar.ctl(&["tail", &topic, "-f", "--from", "earliest", "--limit", "3", "-q", "-o", "json"]).await?;
    ensure!(lines(&limited.success()?)?.len() == 3);
    let mut running = sidecar.ctl_start(&["tail", &topic, "-f", "--from", "0", "-o", "json"], Stdio::piped())?;
    let mut out = BufReader::new(running.stdout.take().context("its output")?).lines();
    tokio::time::timeout(MINUTE, out.next_line()).await??.context("a line")?;
    let begin = std::time::Instant::now();
    sidecar.finish().await?;
    ensure!(begin.elapsed() < Duration::from_secs(9), "a client that follows held the shutdown up for {:?}", begin.elapsed());
    ensure!(running.wait().await?.code() == Some(4), "it did not end by itself");
    Ok(())
}

/// How many readers without a group run on Kafka; 0 on the embedded broker, whose consumers have no threads.
fn readers(sidecar: &mut Sidecar) -> Result<usize> {
    let tasks = format!("/proc/{}/task", sidecar.process()?.id());
    let names = std::fs::read_dir(tasks)?.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    Ok(names.filter(|name| name.trim() == "kafka-reader").count())
}

on_both!(topics_are_listed_described_altered_and_deleted, managed);

async fn managed(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    let (input, output, free) = (stage.topic("in"), stage.topic("out"), stage.topic("free"));
    sidecar
        .apply(
            "
            defaults: { dead_letter: %dlq }
            topics: { %in: { partitions: 2 }, %out: { partitions: 1 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out], retry: { topics: [1h] } }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    sidecar
        .ctl(&["topics", "create", &free, "--partitions", "3", "--retention", "2h", "--config", "max.message.bytes=2000000"])
        .await?
        .success()?;
    refused(&sidecar.ctl(&["topics", "create", &free]).await?, 1, "exists, with 3 partitions")?;
    refused(&sidecar.ctl(&["topics", "create", "__mine"]).await?, 1, "names that begin with `__`")?;
    refused(&sidecar.ctl(&["topics", "create", "void"]).await?, 2, "no topic")?;
    refused(&sidecar.ctl(&["topics", "create", &stage.topic("odd"), "--config", "cleanup.policy=shred"]).await?, 1, "")?;
    sidecar.ctl_with(&["produce", &free, "--lines"], b"a\nb\nc\n".to_vec()).await?.success()?;
    sidecar.ctl(&["produce", &input, "--key", "k", "--value", "x"]).await?.success()?;
    service.wait(1, MINUTE).await?;

    let listed = sidecar.ctl(&["topics", "list", "-o", "json"]).await?.ends(0)?.json()?;
    let of = |topic: &str| listed.as_array().into_iter().flatten().find(|one| one["topic"] == topic).cloned().unwrap_or_default();
    ensure!(of(&input)["uses"] == json!([{ "route": "work", "role": "from" }]) && of(&input)["partitions"] == 2, "{}", of(&input));
    ensure!(of(&output)["uses"] == json!([{ "route": "work", "role": "to" }]), "{}", of(&output));
    ensure!(of(&stage.topic("dlq"))["uses"] == json!([{ "route": "work", "role": "dlq" }]), "{listed}");
    let retry = format!("work.{input}.retry-1");
    ensure!(of(&retry)["uses"] == json!([{ "route": "work", "role": "retry" }]), "{listed}");
    ensure!(of(&free)["records"] == 3 && of(&free)["replication"] == 1 && of(&free)["uses"] == json!([]), "{}", of(&free));
    ensure!(of(&free)["bytes"].is_u64() != stage.is_kafka(), "{}", of(&free));
    ensure!(of("__mesh.control").is_null());
    ensure!(sidecar.ctl(&["topics", "list", "--all"]).await?.success()?.contains("__mesh.control"));

    let described = sidecar.ctl(&["topics", "describe", &free, &input, "-o", "json"]).await?.ends(0)?.json()?;
    let one = &described[0];
    ensure!(one["config"]["retention.ms"] == "7200000" && one["config"]["max.message.bytes"] == "2000000", "{one}");
    let partitions = one["partition_details"].as_array().context("partitions")?;
    let latest: i64 = partitions.iter().filter_map(|one| one["latest"].as_i64()).sum();
    ensure!(partitions.len() == 3 && latest == 3 && partitions.iter().all(|one| one["leader"].is_i64()), "{one}");
    refused(&sidecar.ctl(&["topics", "describe", &stage.topic("fre")]).await?, 2, &format!("did you mean {free}?"))?;

    // More partitions: of what follows, too.
    let output_of = sidecar.ctl(&["topics", "alter", &input, "--partitions", "4"]).await?;
    ensure!(
        output_of.status == Some(0) && output_of.stdout.contains("partitions: 2 → 4") && output_of.stderr.contains("keys move"),
        "{output_of:?}"
    );
    let described = sidecar.ctl(&["topics", "describe", &retry, &input, "-o", "json"]).await?.ends(0)?.json()?;
    ensure!(described[0]["partitions"] == 4 && described[1]["partitions"] == 4, "{described}");
    ensure!(described[1]["warnings"][0].as_str().is_some_and(|warning| warning.contains("declares 2")), "{described}");
    refused(&sidecar.ctl(&["topics", "alter", &input, "--partitions", "3"]).await?, 1, "never taken away")?;
    let said = sidecar
        .ctl(&["topics", "alter", &free, "--retention", "1h", "--unset", "max.message.bytes", "-o", "json"])
        .await?
        .ends(0)?
        .json()?;
    ensure!(said["changes"].as_array().is_some_and(|changes| changes.len() == 2), "{said}");
    let described = sidecar.ctl(&["topics", "describe", &free, "-o", "json"]).await?.ends(0)?.json()?;
    ensure!(described[0]["config"] == json!({ "retention.ms": "3600000" }), "{described}");
    ensure!(sidecar.ctl(&["topics", "alter", &free, "--retention", "1h"]).await?.success()?.contains("unchanged"));
    ensure!(sidecar.ctl(&["topics", "alter", &free]).await?.status == Some(2), "something has to change");

    // Deleted: what nobody uses, after a preview.
    let preview = sidecar.ctl(&["topics", "delete", &free]).await?;
    ensure!(preview.stdout.contains("preview") && tailed(&sidecar, &free, &[]).await?.len() == 3, "{preview:?}");
    refused(&sidecar.ctl(&["topics", "delete", &output, "--execute"]).await?, 1, "work (to)")?;
    refused(&sidecar.ctl(&["topics", "delete", "__mesh.control", "--execute", "--force"]).await?, 1, "names that begin with `__`")?;
    ensure!(sidecar.ctl(&["topics", "delete", &free, "--execute"]).await?.success()?.contains("1 topic deleted"));
    refused(&sidecar.ctl(&["tail", &free]).await?, 2, "there is no topic")?;
    refused(&sidecar.ctl(&["topics", "delete", &free, "--execute"]).await?, 2, "there is no topic")?;
    // Made again, it is empty.
    sidecar.ctl(&["topics", "create", &free, "--partitions", "1"]).await?.success()?;
    ensure!(tailed(&sidecar, &free, &[]).await?.is_empty());
    // A route whose topic is deleted waits for it, and reads the one that is made again from its beginning.
    sidecar.ctl(&["topics", "delete", &input, "--execute", "--force"]).await?.success()?;
    sidecar
        .wait_status("the route waits for its topic", MINUTE, |status| {
            status.instances.iter().flat_map(|instance| &instance.routes).any(|route| route.state() == RouteState::WaitingForTopic)
        })
        .await?;
    sidecar.ctl(&["topics", "create", &input, "--partitions", "2"]).await?.success()?;
    sidecar.ctl(&["produce", &input, "--key", "k", "--value", "again"]).await?.success()?;
    service.wait(2, MINUTE).await?;
    sidecar.finish().await
}

on_both!(the_lag_of_routes_and_groups_is_told_and_judged, lag);

async fn lag(stage: Stage) -> Result<()> {
    let mut service = Service::native(Scenario::new().on("/work", [Rule::status(503)])).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 2 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: void, breaker: { failures: 2, open: 200ms } }
            - { name: other, service: work, from: [%in], handler: /other, to: void }
            ",
        )
        .await?;
    sidecar.wait_running(&["work", "other"]).await?;
    let topic = stage.topic("in");
    let many: String = (0..40).map(|number| format!("{{\"n\":{number}}}\n")).collect();
    sidecar.ctl_with(&["produce", &topic, "--lines"], many.into_bytes()).await?.success()?;
    let group = format!("{}.work", stage.mesh());
    let of = |said: &Value, route: &str| said["groups"].as_array().into_iter().flatten().find(|one| one["route"] == route).cloned();

    let said = sidecar.ctl(&["lag", "work", "-o", "json"]).await?.ends(0)?.json()?;
    let one = of(&said, "work").context("the route")?;
    ensure!(one["group"] == json!(group) && one["lag_records"] == 40 && one["state"] == "LAG", "{said}");
    ensure!(
        one["members"].as_u64().is_some_and(|members| members >= 1) && one["lag_seconds"].as_f64().is_some_and(|age| age > 0.0),
        "{said}"
    );
    ensure!(one["partitions"].as_array().is_some_and(|all| all.len() == 2) && said["left_out"] == "", "{said}");
    let table = sidecar.ctl(&["lag", "work"]).await?.success()?;
    ensure!(table.starts_with("GROUP") && table.contains("total: 40 records behind"), "{table}");

    // It has members, and commits nothing.
    let looks = lines(&sidecar.ctl(&["lag", "work", "--watch", "500ms", "--count", "3", "-o", "json"]).await?.success()?)?;
    let states: Vec<_> = looks.iter().filter_map(|look| of(look, "work")).map(|one| one["state"].clone()).collect();
    ensure!(states == ["LAG", "LAG", "STALL"], "{states:?}");

    // The same as a group, beside one that nobody is a member of.
    let all = sidecar.ctl(&["lag", "--all-groups", "-o", "json"]).await?.ends(0)?.json()?;
    ensure!(of(&all, "work").is_some() && of(&all, "other").is_some(), "{all}");
    let named = sidecar.ctl(&["lag", "--group", &group, "-o", "json"]).await?.ends(0)?.json()?;
    ensure!(named["groups"][0]["lag_records"] == 40 && named["groups"].as_array().is_some_and(|all| all.len() == 1), "{named}");
    refused(&sidecar.ctl(&["lag", "wrok"]).await?, 2, "there is no route wrok")?;
    refused(&sidecar.ctl(&["lag", "--group", &format!("{}.wrok", stage.mesh())]).await?, 2, &format!("did you mean {group}?"))?;

    service.set(Scenario::new()).await?;
    let begin = std::time::Instant::now();
    loop {
        let said = sidecar.ctl(&["lag", "-o", "json"]).await?.ends(0)?.json()?;
        let left: Vec<_> = ["work", "other"].iter().filter_map(|route| of(&said, route)).map(|one| one["lag_records"].clone()).collect();
        if left == [0, 0] {
            ensure!(of(&said, "work").is_some_and(|one| one["state"] == "OK" && one["lag_seconds"] == 0.0), "{said}");
            break;
        }
        ensure!(begin.elapsed() < MINUTE, "the lag does not fall: {said}");
    }
    sidecar.finish().await
}
