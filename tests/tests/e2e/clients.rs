//! Clients that come back, that go for good, and that read slowly.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{on_both, process::run, python::python, sidecar::disposition, stage::Stage};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

on_both!(an_event_source_that_loses_its_connection_goes_on_in_every_partition, resume);

async fn resume(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let sidecar = stage.sidecar("sidecar").start().await?;
    sidecar.apply("{ topics: { %t: { partitions: 4 } }, routes: [] }").await?;
    let topic = stage.topic("t");
    let path = format!("/v1/topics/{topic}/records");
    let records: Vec<Value> = (0..200).map(|n| json!({ "key": format!("k{}", n % 17), "value": { "n": n } })).collect();
    let batch = [("content-type", "application/vnd.mesh.records+json")];
    sidecar.http().post(&path, &batch, json!({ "records": records }).to_string()).await?.expect(200)?;
    let url = format!("http://{}{path}?from=earliest", sidecar.api_address());
    let said = python.run("sse_client.py", &[&url, "200", "13"], Vec::new(), MINUTE).await?.success()?;
    let mut seen: Vec<i64> = Vec::new();
    let mut last = [-1; 17];
    for line in said.lines() {
        let n = serde_json::from_str::<Value>(line)?["value"]["json"]["n"].as_i64().context("n")?;
        let key = usize::try_from(n % 17)?;
        ensure!(n > last[key], "{n} came after {} of its key", last[key]);
        last[key] = n;
        seen.push(n);
    }
    seen.sort_unstable();
    ensure!(seen == (0..200).collect::<Vec<i64>>(), "missing, or twice: {seen:?}");
    sidecar.finish().await
}

on_both!(lines_are_answered_one_by_one_while_more_come, lines);

async fn lines(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let sidecar = stage.sidecar("sidecar").start().await?;
    sidecar.apply("{ topics: { %t: { partitions: 1 } }, routes: [] }").await?;
    let topic = stage.topic("t");
    let url = format!("http://{}/v1/topics/{topic}/records", sidecar.api_address());
    let said = python.run("lines_client.py", &[&url, "100"], Vec::new(), MINUTE).await?.success()?;
    let answers: Vec<Value> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(answers.len() == 100, "{} answers", answers.len());
    for (index, answer) in answers.iter().enumerate() {
        let (line, status) = (index + 1, if index % 10 == 9 { 400 } else { 200 });
        ensure!(answer["line"] == line && answer["status"] == status, "{answer}");
        ensure!(status == 400 || answer["offset"] == index - index / 10, "{answer}");
    }
    // curl, with a body of a known length and as a stream.
    let file = stage.file("lines.ndjson", &"{\"value\":1}\n".repeat(1_000))?;
    for how in [["--data-binary", "@-"], ["-T", "-"]] {
        let mut command = Command::new("curl");
        command.args(["-sS", "-X", "POST", "-H", "content-type: application/x-ndjson", how[0], how[1], &url]);
        let said = run(command, std::fs::read(&file)?, MINUTE).await?.success()?;
        ensure!(said.lines().filter(|line| line.contains("\"status\":200")).count() == 1_000, "{how:?}: {said:.300}");
    }
    let found = stage.read(&sidecar, None, &topic, 2_090).await?;
    let numbers: Vec<i64> = found.iter().filter_map(|found| found.json()["n"].as_i64()).collect();
    ensure!(numbers == (0..100).filter(|n| n % 10 != 9).collect::<Vec<i64>>(), "{numbers:?}");
    sidecar.finish().await
}

on_both!(a_puller_that_vanishes_loses_its_lease_and_the_order_of_its_key_stays, lease);

async fn lease(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").client("work").start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 1 }, %out: { partitions: 1 } }
            routes:
            - { name: work, service: work, from: [%in], deliver: pull, to: [%out], timeout: 1s, retry: { attempts: 9, initial: 10ms } }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    for number in 0..3 {
        sidecar.publish(&stage.topic("in"), Some("same"), "text/plain", format!("v{number}")).await?;
    }
    let take = async || -> Result<Value> {
        let taken = sidecar.http().get("/v1/routes/work/records?max=10&wait=20s").await?.expect(200)?.json()?;
        let records = taken["records"].as_array().context("records")?;
        ensure!(records.len() == 1, "of one key one record at a time: {taken}");
        Ok(records[0].clone())
    };
    let answer = async |taken: &Value| {
        let value = taken["value"]["text"].clone();
        let records = json!([{ "value": value }, { "value": format!("{} again", value.as_str().unwrap_or_default()) }]);
        let outcome = json!({ "id": taken["id"], "reply": { "records": records } });
        let lines = [("content-type", "application/x-ndjson")];
        sidecar.http().post("/v1/routes/work/outcomes", &lines, format!("{outcome}\n")).await
    };
    let lost = take().await?;
    ensure!(lost["lease_ms"] == 1000 && lost["attempt"] == 1 && lost["offset"] == 0, "{lost}");
    let found = take().await?;
    ensure!(found["attempt"] == 2 && found["offset"] == 0 && found["id"] != lost["id"] && found["mesh_id"] == lost["mesh_id"], "{found}");
    // The first comes back with its answer, too late, while somebody else is at it.
    let late = answer(&lost).await?.expect(207)?.json()?;
    ensure!(late["results"][0]["status"] == 410 && late["results"][0]["problem"]["code"] == "lease-ended", "{late}");
    answer(&found).await?.expect(200)?;
    for offset in 1..3 {
        let taken = take().await?;
        ensure!(taken["offset"] == offset && taken["attempt"] == 1, "{taken}");
        answer(&taken).await?.expect(200)?;
    }
    sidecar.wait_status("all ended", MINUTE, |status| disposition(status, "work", "forwarded") == 3).await?;
    let out = stage.read(&sidecar, None, &stage.topic("out"), 6).await?;
    let texts: Vec<String> = out.iter().map(mesh_tests::mesh::Found::text).collect();
    ensure!(texts == ["v0", "v0 again", "v1", "v1 again", "v2", "v2 again"], "{texts:?}");
    let metrics = sidecar.probes().get("/metrics").await?.expect(200)?.text();
    for name in ["mesh_expired_leases_total", "mesh_late_outcomes_total"] {
        ensure!(metrics.lines().any(|line| line.starts_with(name) && line.ends_with(" 1")), "{name} is not 1:\n{metrics}");
    }
    sidecar.finish().await
}

on_both!(a_slow_reader_of_events_holds_back_only_itself_and_one_that_leaves_leaves_nothing, slow);

async fn slow(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").start().await?;
    sidecar.apply("{ topics: { %t: { partitions: 1 } }, routes: [] }").await?;
    let topic = stage.topic("t");
    let path = format!("/v1/topics/{topic}/records?from=earliest");
    let threads = async || -> Result<u64> { Ok(sidecar.metric("process_threads").await? as u64) };
    sidecar.publish(&topic, None, "text/plain", "first").await?;
    let before = threads().await?;
    // Ten who read nothing of a topic that is larger than any buffer on the way.
    let mut slow = Vec::new();
    for _ in 0..10 {
        slow.push(sidecar.http().open(&path, "text/event-stream").await?);
    }
    let large = "x".repeat(100_000);
    for _ in 0..100 {
        sidecar.publish(&topic, None, "text/plain", large.clone()).await?;
    }
    let mut quick = sidecar.http().open(&path, "text/event-stream").await?;
    for offset in 0..101 {
        ensure!(quick.next_json(SOON).await?["offset"] == offset);
    }
    drop((slow, quick));
    let begun = std::time::Instant::now();
    // On Kafka each reader has threads of its own. A probe at a time is all that is asked meanwhile.
    while threads().await? > before + 3 {
        ensure!(begun.elapsed() < SOON, "{} threads where {before} were before", threads().await?);
    }
    sidecar.finish().await
}
