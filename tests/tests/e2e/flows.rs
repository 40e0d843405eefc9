//! The flows that the mesh is for, on both brokers, with services of foreign frameworks.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::RouteState;
use mesh_tests::{
    full,
    load::Load,
    on_both,
    oracle::{deliveries, sightings},
    python::python,
    service::{Condition, Rule, Scenario},
    sidecar::{disposition, routes_of},
    stage::Stage,
};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);

on_both!(flow_a_a_chain_with_a_second_subscriber_and_a_void_end_gets_a_new_step_under_load_with_nothing_lost, flow_a);

/// `initialTopicedMsg` → consumer1 → `topicedMsg1` → consumer2 → `topicedMsg2` → consumer3 → `topicedMsg3`; `audit` reads `topicedMsg1`
/// too, and `end` is void. Under load, `check` is put between consumer2 and consumer3 by `mesh-ctl apply` alone.
async fn flow_a(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let step = |name: &str| vec![Rule::echo().extend(json!({ name: true }))];
    let chain = Scenario { headers: false, ..Scenario::new() };
    let chain =
        chain.on("/consumer1", step("one")).on("/consumer2", step("two")).on("/consumer3", step("three")).on("/check", step("checked"));
    let chain = stage.fastapi(&python, chain).await?;
    let side = stage.flask(&python, Scenario { headers: false, ..Scenario::new() }).await?;
    let services =
        [("consumer1", &chain), ("consumer2", &chain), ("consumer3", &chain), ("check", &chain), ("audit", &side), ("end", &side)];
    let sidecars = stage.sidecars(&services).await?;
    let sidecar = sidecars.first().context("a sidecar")?;

    let table = |consumer2: &str, more: &str| {
        format!(
            "
            topics:
              %initialTopicedMsg: {{ partitions: 4 }}
              %topicedMsg1: {{ partitions: 4 }}
              %topicedMsg2: {{ partitions: 4 }}
              %topicedMsg3: {{ partitions: 4 }}
            routes:
            - {{ name: consumer1, service: consumer1, from: [%initialTopicedMsg], handler: /consumer1, to: [%topicedMsg1] }}
            - {{ name: consumer2, service: consumer2, from: [%topicedMsg1], handler: /consumer2, to: [{consumer2}] }}
            - {{ name: consumer3, service: consumer3, from: [%topicedMsg2], handler: /consumer3, to: [%topicedMsg3] }}
            - {{ name: audit, service: audit, from: [%topicedMsg1], handler: /audit, to: [%audited] }}
            - {{ name: end, service: end, from: [%topicedMsg3], handler: /end, to: void }}
            {more}
            "
        )
    };
    sidecar.apply(&table("%topicedMsg2", "")).await?;
    sidecar.wait_running(&["consumer1", "consumer2", "consumer3", "audit", "end"]).await?;

    let records = if full() { 20_000 } else { 1_500 };
    let load = Load::new(stage.topic("initialTopicedMsg"), records, 30);
    let insert = async {
        // Some records are through the whole chain, and some are at each place of it.
        chain.wait(records as u64 / 2, MINUTE).await?;
        let check = "- { name: check, service: check, from: [%between], handler: /check, to: [%topicedMsg2] }";
        sidecar.apply(&table("%between", check)).await?;
        sidecar.wait_running(&["check"]).await
    };
    let (oracle, ()) = tokio::try_join!(load.http(sidecar), insert)?;
    // Some more, so that the new step is certain to have work.
    let mut all = oracle;
    all.merge(Load::new(&load.topic, 100, 10).from(100_000).http(sidecar).await?);

    let count = all.len() as u64;
    sidecar
        .wait_status("through the chain", if full() { 10 * MINUTE } else { 2 * MINUTE }, |status| {
            disposition(status, "end", "void") >= count && disposition(status, "audit", "forwarded") >= count
        })
        .await?;
    let found = stage.read(sidecar, Some(&python), &stage.topic("topicedMsg3"), all.len()).await?;
    all.judge(&sightings(&found)?).exactly_once().context("topicedMsg3")?;
    for found in &found {
        let value = found.json();
        ensure!(["one", "two", "three"].iter().all(|step| value[step] == true), "a step is missing: {value}");
    }
    let checked = found.iter().filter(|found| found.json()["checked"] == true).count();
    ensure!(checked > 0 && checked < found.len(), "the new step saw {checked} of {}", found.len());
    let audited = stage.read(sidecar, Some(&python), &stage.topic("audited"), all.len()).await?;
    all.judge(&sightings(&audited)?).exactly_once().context("audited")?;
    let ended = side.ledger_of("/end").await?;
    all.judge(&deliveries(&ended)?).exactly_once().context("the void consumer")?;
    for sidecar in sidecars {
        sidecar.finish().await?;
    }
    Ok(())
}

on_both!(flow_b_a_route_onto_its_own_topic_runs_exactly_as_many_rounds_as_the_service_says, flow_b);

/// A `for`: the destination is the source; an ignored status that carries a body ends it.
async fn flow_b(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let more = Condition { field_below: Some(("round".into(), 100)), ..Condition::default() };
    let rules = [Rule::echo().increment("round").when(more), Rule::status(208).text("the last round, which goes nowhere")];
    let service = stage.fastapi(&python, Scenario::new().on("/round", rules)).await?;
    let sidecar = stage.sidecar("sidecar").service("rounds", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %rounds: { partitions: 2 } }
            routes:
            - { name: rounds, service: rounds, from: [%rounds], handler: /round, to: [%rounds], ignore_status: [204, 208] }
            ",
        )
        .await?;
    let topic = stage.topic("rounds");
    let keys = ["a", "b", "c"];
    for key in keys {
        sidecar.publish(&topic, Some(key), "application/json", json!({ "loop": key, "round": 0 }).to_string()).await?;
    }
    // 100 answers with a further round each, and the one that ends it.
    service.wait(3 * 101, MINUTE).await?;
    sidecar.wait_done(&["rounds"], MINUTE).await?;
    let ledger = service.ledger().await?;
    ensure!(ledger.len() == 3 * 101, "{} calls", ledger.len());
    for key in keys {
        let rounds: Vec<(i64, i64)> = ledger
            .iter()
            .filter(|entry| entry.json()["loop"] == key)
            .map(|entry| (entry.json()["round"].as_i64().unwrap_or(-1), entry.hops))
            .collect();
        let wanted: Vec<(i64, i64)> = (0..=100).map(|round| (round, round)).collect();
        ensure!(rounds == wanted, "the rounds and hops of {key}: {rounds:?}");
    }
    let status = sidecar.status().await?;
    ensure!(disposition(&status, "rounds", "forwarded") == 300 && disposition(&status, "rounds", "ignored") == 3, "{status:#?}");
    ensure!(stage.read(&sidecar, Some(&python), &topic, 303).await?.len() == 303);
    sidecar.finish().await
}

on_both!(flow_c_a_stopped_service_is_waited_for_by_name_while_the_others_go_on, flow_c);

/// A publishes; B, then C, then E work behind each other, D beside them. D is stopped.
async fn flow_c(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let outage = if full() { Duration::from_secs(120) } else { Duration::from_secs(20) };
    let chain = stage.fastapi(&python, Scenario { headers: false, ..Scenario::new() }).await?;
    let mut d = stage.flask(&python, Scenario { headers: false, ..Scenario::new() }).await?;
    let sidecars = stage.sidecars(&[("a", &chain), ("b", &chain), ("c", &chain), ("service-d", &d), ("e", &chain)]).await?;
    let sidecar = sidecars.first().context("a sidecar")?;
    sidecar
        .apply(
            "
            topics: { %a: { partitions: 4 }, %b: { partitions: 4 }, %c: { partitions: 4 } }
            routes:
            - { name: route-b, service: b, from: [%a], handler: /b, to: [%b] }
            - { name: route-c, service: c, from: [%b], handler: /c, to: [%c] }
            - { name: route-e, service: e, from: [%c], handler: /e, to: void }
            - { name: route-d, service: service-d, from: [%a], handler: /d, to: void, dead_letter: %d.dlq, retry: { attempts: 2, initial: 10ms } }
            ",
        )
        .await?;
    sidecar.wait_running(&["route-b", "route-c", "route-e", "route-d"]).await?;
    d.kill().await?;
    let stopped = std::time::Instant::now();

    let load = Load::new(stage.topic("a"), 237, 20);
    let oracle = load.http(sidecar).await?;
    let through = sidecar.wait_status("B, C and E done beside D", MINUTE, |status| disposition(status, "route-e", "void") >= 237).await?;
    ensure!(disposition(&through, "route-d", "void") == 0);
    sidecar
        .wait_status("D named", MINUTE, |status| {
            routes_of(status).any(|route| {
                route.route == "route-d"
                    && route.state() == RouteState::WaitingForService
                    && route.reason.contains("service-d")
                    && route.waiting_since_ms > 0
            })
        })
        .await?;
    sidecar
        .wait_status("D 237 records behind", MINUTE, |status| {
            routes_of(status).filter(|route| route.route == "route-d").map(|route| route.lag_records).sum::<u64>() == 237
        })
        .await?;
    let shown = sidecar.ctl(&["status"]).await?.success()?;
    ensure!(shown.contains("service-d") && shown.contains("237"), "mesh-ctl status does not name D and how far behind it is:\n{shown}");
    let top: Value = serde_json::from_str(&sidecar.ctl(&["top", "--once", "-o", "json"]).await?.success()?)?;
    let is_open =
        |route: &str| top["routes"].as_array().into_iter().flatten().find(|flow| flow["route"] == route)?["breaker_open"].as_bool();
    ensure!((is_open("route-d"), is_open("route-e")) == (Some(true), Some(false)), "{top}");
    let metrics = {
        let mut text = String::new();
        for sidecar in &sidecars {
            text.push_str(&sidecar.probes().get("/metrics").await?.expect(200)?.text());
        }
        text
    };
    ensure!(metrics.contains("route-d"), "the metrics do not name the route");
    ensure!(sidecars.iter().any(|sidecar| sidecar.log_text().contains("service-d")), "no log names the service");

    // The outage lasts: attempts, had they been counted, would have been used up long before.
    tokio::time::sleep(outage.saturating_sub(stopped.elapsed())).await;
    let status = sidecar.status().await?;
    ensure!(disposition(&status, "route-d", "dead_lettered") == 0, "{status:#?}");
    d.start().await?;
    sidecar.wait_status("D done", MINUTE, |status| disposition(status, "route-d", "void") >= 237).await?;
    let ledger = d.ledger().await?;
    oracle.judge(&deliveries(&ledger)?).exactly_once().context("D")?;
    ensure!(ledger.iter().all(|entry| entry.attempt == 1), "the outage counted attempts");
    let status = sidecar.status().await?;
    ensure!(disposition(&status, "route-d", "dead_lettered") == 0, "{status:#?}");
    oracle.judge(&deliveries(&chain.ledger_of("/e").await?)?).exactly_once().context("E")?;
    for sidecar in sidecars {
        sidecar.finish().await?;
    }
    Ok(())
}

on_both!(flow_d_plain_text_is_answered_400_and_dead_lettered_and_john_is_processed, flow_d);

/// `exam-topic`, key `key`: `hello` and then John, written before the group exists, by kafka-python where the broker is Kafka.
async fn flow_d(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let plain = Condition { json: Some(false), ..Condition::default() };
    let rules = [Rule::status(400).text("this is no JSON").when(plain), Rule::echo().extend(json!({ "passed": true }))];
    let service = stage.fastapi(&python, Scenario::new().on("/exam", rules)).await?;
    let sidecar = stage.sidecar("sidecar").service("exam", &service).start().await?;
    let (topic, john) = (stage.topic("exam-topic"), r#"{"name":"John","age":30}"#);
    if stage.is_kafka() {
        stage.kafka_client(&python, &topic, &["create", "--partitions", "4"], String::new()).await?;
        let lines = format!("{}\n{}\n", json!({ "key": "key", "value": "hello" }), json!({ "key": "key", "value": john }));
        stage.kafka_client(&python, &topic, &["produce", "--library", "kafka-python"], lines).await?;
    } else {
        sidecar.publish(&topic, Some("key"), "text/plain", "hello").await?;
        sidecar.publish(&topic, Some("key"), "application/json", john).await?;
    }
    let said = sidecar
        .apply(
            "
            routes:
            - { name: exam, service: exam, from: [%exam-topic], start: earliest, handler: /exam, to: [%graded], dead_letter: %exam.dlq }
            ",
        )
        .await?;
    ensure!(said.contains('2'), "apply says how many existing records the new route begins with:\n{said}");
    service.wait(2, MINUTE).await?;
    sidecar
        .wait_status("both done", MINUTE, |status| {
            disposition(status, "exam", "forwarded") == 1 && disposition(status, "exam", "dead_lettered") == 1
        })
        .await?;
    let ledger = service.ledger().await?;
    let texts: Vec<String> = ledger.iter().map(mesh_tests::service::Entry::text).collect();
    ensure!(texts == ["hello", john], "pushed in order: {texts:?}");
    ensure!(ledger.iter().all(|entry| entry.key.as_deref() == Some("key") && entry.attempt == 1 && !entry.id.is_empty()), "{ledger:?}");

    let dead = stage.read(&sidecar, Some(&python), &stage.topic("exam.dlq"), 1).await?;
    let [dead] = dead.as_slice() else { anyhow::bail!("one dead letter is due: {dead:?}") };
    ensure!(dead.text() == "hello" && dead.key_text() == "key", "{dead:?}");
    let header = |name: &str| dead.header(&format!("mesh-dlq-{name}")).unwrap_or_default();
    ensure!(header("reason") == "status" && header("route") == "exam" && header("detail").contains("400"), "{dead:?}");
    ensure!(header("topic") == topic && header("offset") == "0" && header("attempts") == "1", "{dead:?}");
    ensure!(!header("partition").is_empty() && !header("timestamp").is_empty() && !header("time").is_empty(), "{dead:?}");

    let graded = stage.read(&sidecar, Some(&python), &stage.topic("graded"), 1).await?;
    let [graded] = graded.as_slice() else { anyhow::bail!("one answer is due: {graded:?}") };
    ensure!(graded.json() == json!({ "name": "John", "age": 30, "passed": true }) && graded.key_text() == "key", "{graded:?}");
    ensure!(graded.header("mesh-hops").as_deref() == Some("1"), "{graded:?}");
    if stage.is_kafka() {
        ensure!(graded.header("mesh-cause").is_some_and(|cause| cause.starts_with(&format!("exam {topic}/"))), "{graded:?}");
        ensure!(graded.header("mesh-id").is_some_and(|id| !id.is_empty()), "{graded:?}");
    }
    sidecar.finish().await
}
