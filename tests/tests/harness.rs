//! The support itself: a suite is worth what its tools are.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    broker::Broker,
    http::Http,
    ports::Port,
    process::{Process, run},
    python::python,
    service::{Condition, Raw, RawService, Rule, Scenario, Service},
    stage::Stage,
};
use serde_json::json;

/// A scenario that uses every part which all three services share.
fn scenario() -> Scenario {
    let first = Condition { calls_of_record_below: Some(1), ..Condition::default() };
    let more = Condition { field_below: Some(("round".into(), 3)), ..Condition::default() };
    let plain = Condition { json: Some(false), ..Condition::default() };
    Scenario::new()
        .on("/retry", [Rule::status(429).empty().header("retry-after", "1").when(first)])
        .on(
            "/round",
            [Rule::status(400).text("no JSON").when(plain), Rule::echo().increment("round").when(more), Rule::status(208).text("end")],
        )
        .on("/add", [Rule::echo().extend(json!({ "by": "b" })).header("mesh-key", "other").after(Duration::from_millis(20))])
        .on("/bytes", [Rule::status(201).bytes(&[0, 255, 1]).raw_header("x-bad", &[0xff, 0xfe]).content_type("application/octet-stream")])
}

async fn behaves(service: &mut Service) -> Result<()> {
    let address = service.url().trim_start_matches("http://").parse()?;
    let http = Http::new(address);
    let id = [
        ("mesh-id", "i1"),
        ("mesh-topic", "t"),
        ("mesh-partition", "2"),
        ("mesh-offset", "7"),
        ("mesh-key", "a%20b"),
        ("mesh-attempt", "1"),
    ];

    let answer = http.post("/retry", &id, "x").await?.expect(429)?;
    ensure!(answer.headers["retry-after"] == "1" && answer.body.is_empty());
    let answer = http.post("/retry", &id, "x").await?.expect(200)?;
    ensure!(answer.body == "x");
    ensure!(http.post("/round", &[], "hello").await?.expect(400)?.body == "no JSON");
    ensure!(http.post("/round", &[], r#"{"round":2}"#).await?.expect(200)?.json()? == json!({ "round": 3 }));
    ensure!(http.post("/round", &[], r#"{"round":3}"#).await?.expect(208)?.body == "end");
    let answer = http.post("/add", &[("content-type", "application/json")], r#"{"a":1}"#).await?.expect(200)?;
    ensure!(answer.json()? == json!({ "a": 1, "by": "b" }) && answer.headers["mesh-key"] == "other");
    ensure!(answer.headers["content-type"].to_str()?.starts_with("application/json"));
    let answer = http.post("/bytes", &[], "x").await?.expect(201)?;
    ensure!(answer.body.as_ref() == [0, 255, 1] && answer.headers["x-bad"].as_bytes() == [0xff, 0xfe]);

    ensure!(service.wait(7, Duration::from_secs(5)).await? == 7);
    let ledger = service.ledger().await?;
    let first = ledger.first().context("an entry")?;
    ensure!((first.id.as_str(), first.partition, first.offset, first.attempt) == ("i1", 2, 7, 1), "{first:?}");
    ensure!(first.key.as_deref() == Some("a b") && first.topic == "t" && first.text() == "x" && first.hops == -1, "{first:?}");
    ensure!(first.header("mesh-key") == Some("a%20b"), "{first:?}");
    ensure!(service.ledger_of("/round").await?.len() == 3);
    ensure!(service.wait_at_most(8, Duration::from_millis(100)).await? == 7);

    let waiting = service.wait(8, Duration::from_secs(5));
    let (waited, sent) = tokio::join!(waiting, http.post("/new", &[], "x"));
    waited?;
    sent?.expect(200)?;
    service.set(Scenario::light().on("/new", [Rule::status(500)])).await?;
    http.post("/new", &[], "x").await?.expect(500)?;
    ensure!(service.ledger().await?.last().is_some_and(|entry| entry.body.is_none() && entry.headers.is_empty()));
    service.reset().await?;
    ensure!(service.total().await? == 0);
    Ok(())
}

#[tokio::test]
async fn a_native_service_behaves_as_told() -> Result<()> {
    let mut service = Service::native(scenario()).await?;
    behaves(&mut service).await?;
    let http = Http::new(service.url().trim_start_matches("http://").parse()?);
    let answer = http.send_h2c(http::Method::POST, "/x", &[], "over h2c".into()).await?.expect(200)?;
    ensure!(answer.body == "over h2c");
    Ok(())
}

#[tokio::test]
async fn foreign_services_behave_as_told() -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let stage = Stage::new(Broker::Embedded)?;
    let mut flask = stage.flask(&python, scenario()).await?;
    behaves(&mut flask).await?;
    let mut service = stage.fastapi(&python, scenario()).await?;
    behaves(&mut service).await?;

    // What only this one can do.
    service.set(Scenario::new().on("/close", [Rule::echo().close()]).on("/hang", [Rule::echo().hang()])).await?;
    let http = Http::new(service.url().trim_start_matches("http://").parse()?);
    ensure!(http.post("/close", &[], "x").await.is_err());
    let hang = http::Request::post("/hang").body(http_body_util::Full::default())?;
    ensure!(http.call(hang, Duration::from_millis(300)).await.is_err());
    service.kill().await?;
    ensure!(http.get("/ledger").await.is_err());
    service.start().await?;
    ensure!(service.total().await? == 0);
    service.freeze(true)?;
    let frozen = http::Request::get("/ledger").body(http_body_util::Full::default())?;
    ensure!(http.call(frozen, Duration::from_millis(300)).await.is_err());
    service.freeze(false)?;
    http.get("/ledger").await?.expect(200)?;
    Ok(())
}

#[tokio::test]
async fn a_raw_service_breaks_connections_and_speaks_any_bytes() -> Result<()> {
    let said = b"HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\nabc".to_vec();
    let raw = RawService::start(vec![Raw::Reset, Raw::ReadAndReset, Raw::Say(said)]).await?;
    let http = Http::new(raw.url().trim_start_matches("http://").parse()?);
    ensure!(http.post("/", &[], "x").await.is_err());
    ensure!(http.post("/", &[], "x").await.is_err());
    http.post("/", &[], "x").await?.expect(204)?;
    raw.wait(3, Duration::from_secs(5)).await
}

#[tokio::test]
async fn a_process_is_measured_and_ends_with_its_handle() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("log");
    let start = |script: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        Process::start("a shell", command, &log)
    };
    let mut child = start("echo READY 4711; echo trouble >&2; read line")?;
    ensure!(child.ready_port(Duration::from_secs(5)).await? == 4711);
    ensure!(child.resident_bytes()? > 100_000 && child.cpu_time()? < Duration::from_secs(1));
    ensure!(child.log_tail().contains("trouble"));
    child.kill9().await?;

    let mut child = start("sleep 1000 & exit 0")?;
    let left = child.wait(Duration::from_secs(5)).await;
    ensure!(left.is_err_and(|error| error.to_string().contains("left a process behind")));

    let child = start("sleep 1000 & read line")?;
    let group = rustix::process::Pid::from_raw(child.id()).context("pid")?;
    drop(child);
    let gone = async {
        while rustix::process::test_kill_process_group(group).is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), gone).await?;

    let mut cat = Command::new("cat");
    cat.arg("-");
    ensure!(run(cat, b"through".to_vec(), Duration::from_secs(5)).await?.success()? == "through");
    let mut slow = Command::new("sleep");
    slow.arg("1000");
    ensure!(run(slow, Vec::new(), Duration::from_millis(100)).await.is_err());
    Ok(())
}

#[test]
fn ports_are_not_given_twice() -> Result<()> {
    let ports = (0..50).map(|_| Port::take()).collect::<Result<Vec<_>>>()?;
    let numbers: std::collections::BTreeSet<u16> = ports.iter().map(Port::number).collect();
    ensure!(numbers.len() == 50);
    Ok(())
}

#[tokio::test]
async fn foreign_kafka_clients_write_and_read() -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    let stage = Stage::new(broker)?;
    let bootstrap = stage.broker().bootstrap().context("Kafka")?;
    let topic = stage.topic("numbers");
    let minute = Duration::from_secs(60);
    let client = async |arguments: &[&str], input: String| {
        let arguments = [arguments, &["--bootstrap", bootstrap, "--topic", &topic]].concat();
        python.run("kafka_client.py", &arguments, input.into_bytes(), minute).await?.success()
    };
    client(&["create", "--partitions", "4"], String::new()).await?;
    for (round, library) in ["kafka-python", "confluent"].into_iter().enumerate() {
        let lines: String = (0..200)
            .map(|i| {
                let (key, number) = (i % 10, round * 20 + i / 10);
                let id = format!("{key}-{number}");
                format!(
                    "{}\n",
                    json!({ "key": format!("k{key}"), "value": json!({ "n": number }).to_string(), "headers": [["mesh-id", id]] })
                )
            })
            .collect();
        let said: serde_json::Value = serde_json::from_str(&client(&["produce", "--library", library], lines).await?)?;
        ensure!(said["produced"] == 200, "{said}");
    }
    for library in ["kafka-python", "confluent"] {
        let said = client(&["consume", "--library", library, "--mode", "summary"], String::new()).await?;
        let said: serde_json::Value = serde_json::from_str(&said)?;
        let wanted = json!({ "count": 400, "distinct": 400, "distinct_numbers": 400, "duplicates": 0, "without_id": 0, "keys": 10, "disorder": 0, "examples": [] });
        ensure!(said == wanted, "{library}: {said}");
        let records = client(&["consume", "--library", library], String::new()).await?;
        ensure!(records.lines().count() == 400);
    }
    // The judge must be able to fail: an older number, and a repeated id.
    let older = json!({ "key": "k1", "value": "{\"n\":3}", "headers": [["mesh-id", "new"]] });
    let again = json!({ "key": "k2", "value": "{\"n\":0}", "headers": [["mesh-id", "2-0"]] });
    client(&["produce"], format!("{older}\n{again}\n")).await?;
    let said: serde_json::Value = serde_json::from_str(&client(&["consume", "--mode", "summary"], String::new()).await?)?;
    ensure!(said["disorder"] == 1 && said["duplicates"] == 1, "{said}");
    Ok(())
}
