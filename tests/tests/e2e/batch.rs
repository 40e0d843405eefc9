//! Routes with `batch`: many records in one call, answered one by one.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::RouteState;
use mesh_tests::{
    grpc::{GrpcService, reply_with, retry},
    load::Load,
    on_both,
    oracle::sightings,
    service::{BatchAnswer, BatchCall, BatchService, value},
    sidecar::{Sidecar, disposition, routes_of},
    stage::Stage,
};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);

async fn publish(sidecar: &Sidecar, topic: &str, records: impl Iterator<Item = (String, Value)>) -> Result<()> {
    let records: Vec<Value> = records.map(|(key, value)| json!({ "key": key, "value": value })).collect();
    let headers = [("content-type", "application/vnd.mesh.records+json")];
    let body = json!({ "records": records }).to_string();
    sidecar.http().post(&format!("/v1/topics/{topic}/records"), &headers, body).await?.expect(200)?;
    Ok(())
}

/// A sidecar with the service `work` at an address, and a table whose route of that name runs.
async fn wired(stage: &Stage, url: &str, table: &str) -> Result<Sidecar> {
    let sidecar = stage.sidecar("sidecar").app("work", url).start().await?;
    sidecar.apply(table).await?;
    sidecar.wait_running(&["work"]).await?;
    Ok(sidecar)
}

fn number(entry: &Value) -> i64 {
    value(entry)["n"].as_i64().unwrap_or(-1)
}

on_both!(a_batch_is_answered_per_record_and_one_that_is_not_named_is_tried_again_alone, per_record);

async fn per_record(stage: Stage) -> Result<()> {
    let service = BatchService::start(|call| {
        let said = call.records.iter().flat_map(|entry| {
            let (id, attempt) = (&entry["id"], entry["attempt"].as_u64().unwrap_or(0));
            let wanted = json!({ "n": number(entry), "done": true });
            match (number(entry), attempt) {
                (0, _) => vec![json!({ "id": id, "value": wanted }), json!({ "id": id, "status": 500 }), json!({ "id": "1", "value": 1 })],
                (1, _) => vec![json!({ "id": id, "status": 202, "value": wanted })],
                (2, _) => vec![json!({ "id": id, "status": 204 })],
                (3, _) => vec![json!({ "id": id, "status": 409, "value": wanted })],
                (4, _) => vec![json!({ "id": id, "status": 400, "value": "never" })],
                // Not named at first, not readable then.
                (5, 1) => vec![],
                (5, 2) => vec![json!({ "id": id, "status": "fine" })],
                (6, 1) => vec![json!({ "id": id, "status": 429, "retry_after": 0.3 })],
                (7, _) => {
                    vec![json!({ "id": id, "records": [{ "value": wanted, "key": "a" }, { "value": wanted, "headers": { "h": "1" } }] })]
                }
                (8, 1) => vec![json!({ "id": id, "retry": { "reason": "busy" } })],
                (9, _) => vec![json!({ "id": id, "reject": { "reason": "no" } })],
                (10, _) => vec![json!({ "id": id, "value": null })],
                (11, _) if call.number == 0 => vec![json!({ "id": id, "status": 503 })],
                // The entry as it came.
                _ => vec![entry.clone()],
            }
        });
        BatchAnswer::outcomes(said)
    })
    .await?;
    let sidecar = wired(&stage, &service.url(), &PER_RECORD.replace("WAIT", "10s")).await?;
    publish(&sidecar, &stage.topic("in"), (0..13).map(|n| (format!("k{n}"), json!({ "n": n })))).await?;
    // The first batch is full. What is tried again comes in later ones, which wait; 11 was never there and has no attempt to count.
    service.wait(1, MINUTE).await?;
    let first = service.calls().remove(0);
    ensure!(first.headers["content-type"] == "application/vnd.mesh.deliveries+json" && first.headers["mesh-records"] == "13", "{first:?}");
    ensure!(first.records.iter().map(number).eq(0..13), "in order: {first:?}");
    ensure!(first.records[3]["topic"] == stage.topic("in") && first.records[3]["offset"] == 3 && first.records[3]["key"]["text"] == "k3");
    sidecar.apply(&PER_RECORD.replace("WAIT", "20ms")).await?;
    let wanted: BTreeMap<&str, u64> = [("void", 1), ("ignored", 1), ("dead_lettered", 2), ("forwarded", 9)].into();
    sidecar
        .wait_status("all ended", MINUTE, |status| wanted.iter().all(|(how, count)| disposition(status, "work", how) == *count))
        .await
        .map_err(|error| error.context(format!("{:#?}", service.calls())))?;
    let calls = service.calls();
    let attempts = |n: i64| calls.iter().flat_map(|call| &call.records).filter(|entry| number(entry) == n).count();
    ensure!((0..13).map(attempts).collect::<Vec<_>>() == [1, 1, 1, 1, 1, 3, 2, 1, 2, 1, 1, 2, 1], "{calls:#?}");
    let away: Vec<u64> = calls
        .iter()
        .flat_map(|call| &call.records)
        .filter(|entry| number(entry) == 11)
        .filter_map(|entry| entry["attempt"].as_u64())
        .collect();
    ensure!(away == [1, 1], "503 counts no attempt: {away:?}");
    let out = stage.read(&sidecar, None, &stage.topic("out"), 9).await?;
    let of = |n: i64| out.iter().filter(|found| found.value.is_some() && found.json()["n"] == n).count();
    ensure!((0..13).map(of).collect::<Vec<_>>() == [1, 0, 0, 0, 0, 1, 1, 2, 1, 0, 0, 1, 1], "{out:#?}");
    ensure!(out.iter().filter(|found| found.value.is_none()).count() == 1, "the null value: {out:#?}");
    ensure!(stage.read(&sidecar, None, &stage.topic("review"), 1).await?.len() == 1);
    let labels = "{route=\"work\",service=\"work\"";
    ensure!(sidecar.metric(&format!("mesh_unused_outcomes_total{labels},reason=\"unknown\"}}")).await? == 2.0);
    ensure!(
        sidecar.metric(&format!("mesh_batch_records_sum{labels}}}")).await?
            == calls.iter().map(|call| call.records.len()).sum::<usize>() as f64
    );
    sidecar.finish().await
}

const PER_RECORD: &str = "
    topics: { %in: { partitions: 1 } }
    routes:
    - name: work
      service: work
      from: [%in]
      handler: /work
      to: [%out]
      batch: { max: 13, wait: WAIT }
      order: none
      retry: { attempts: 3, initial: 10ms }
      cases: [{ status: 202, to: [%review] }, { status: 409, to: void }]
    ";

on_both!(batches_keep_the_order_of_their_keys_though_some_records_fail, order_key);
on_both!(batches_keep_the_order_of_their_partition_though_some_records_fail, order_partition);
on_both!(batches_over_h2c_keep_the_order_of_their_keys_though_some_records_fail, order_h2c);

async fn order_key(stage: Stage) -> Result<()> {
    order(stage, "order: key", false).await
}

async fn order_partition(stage: Stage) -> Result<()> {
    order(stage, "order: partition", false).await
}

async fn order_h2c(stage: Stage) -> Result<()> {
    order(stage, "order: key, timeout: 2s", true).await
}

/// The service goes on within a batch behind a record that failed, and says that all is well: those answers are not used.
async fn order(stage: Stage, fields: &str, h2c: bool) -> Result<()> {
    let service = BatchService::start(|call| {
        let said = call.records.iter().map(|entry| match (number(entry) % 7, entry["attempt"].as_u64()) {
            (0, Some(1)) => json!({ "id": entry["id"], "status": 500 }),
            (1, Some(1..=2)) => json!({ "id": entry["id"], "retry": {} }),
            _ => json!({ "id": entry["id"], "value": entry["value"] }),
        });
        // In any order.
        BatchAnswer::outcomes(said.rev())
    })
    .await?;
    let url = if h2c { service.h2c_url() } else { service.url() };
    let route = format!(
        "{{ name: work, service: work, from: [%in], handler: /work, to: [%out], batch: {{ max: 50, wait: 5ms }}, concurrency: 4, retry: {{ initial: 1ms }}, breaker: {{ failures: 1000 }}, {fields} }}"
    );
    let sidecar =
        wired(&stage, &url, &format!("topics: {{ %in: {{ partitions: 2 }}, %out: {{ partitions: 2 }} }}\nroutes: [{route}]")).await?;
    let oracle = Load::new(stage.topic("in"), 1_000, 20).grpc(sidecar.mesh().await?).await?;
    sidecar.wait_done(&["work"], MINUTE).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), oracle.len()).await?;
    oracle.judge(&sightings(&found)?).exactly_once()?;
    let calls = service.calls();
    ensure!(calls.iter().all(|call| call.records.len() <= 50), "max");
    ensure!(calls.len() < 900 && calls.iter().any(|call| call.records.len() > 5), "{} calls for 1000 records are no batches", calls.len());
    // A record that failed travels as the last of its key, or partition: nothing is handed out behind it in vain more than once.
    let mut times: HashMap<(i64, i64), usize> = HashMap::new();
    for entry in calls.iter().flat_map(|call| &call.records) {
        *times.entry((entry["partition"].as_i64().context("partition")?, entry["offset"].as_i64().context("offset")?)).or_default() += 1;
    }
    ensure!(sidecar.metric("mesh_unused_outcomes_total{route=\"work\",service=\"work\",reason=\"behind_failure\"}").await? > 0.0);
    ensure!(sidecar.metric("mesh_unused_outcomes_total{route=\"work\",service=\"work\",reason=\"unknown\"}").await? == 0.0);
    sidecar.finish().await
}

on_both!(records_of_a_batch_that_fail_wait_in_retry_topics_and_their_keys_with_them, retry_topics);

/// Some records need one attempt in place and both retry topics; one never succeeds.
async fn retry_topics(stage: Stage) -> Result<()> {
    const POISON: i64 = 100_000;
    let service = BatchService::start(|call| {
        let said = call.records.iter().map(|entry| match (number(entry), number(entry) % 7, entry["attempt"].as_u64()) {
            (POISON, ..) | (_, 0, Some(1)) | (_, 1, Some(1..=2)) => json!({ "id": entry["id"], "status": 500 }),
            _ => json!({ "id": entry["id"], "value": entry["value"] }),
        });
        BatchAnswer::outcomes(said)
    })
    .await?;
    let sidecar = wired(
        &stage,
        &service.url(),
        "
            topics: { %in: { partitions: 2 }, %out: { partitions: 2 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out], batch: { max: 20, wait: 5ms },
                retry: { attempts: 1, topics: [100ms, 200ms] }, breaker: { failures: 1000 } }
            ",
    )
    .await?;
    let oracle = Load::new(stage.topic("in"), 300, 20).grpc(sidecar.mesh().await?).await?;
    sidecar.wait_status("all are forwarded", 2 * MINUTE, |status| disposition(status, "work", "forwarded") == 300).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), oracle.len()).await?;
    oracle.judge(&sightings(&found)?).exactly_once()?;
    let poisoned = [POISON, POISON + 6].map(|n| ("poison".to_owned(), json!({ "n": n })));
    publish(&sidecar, &stage.topic("in"), poisoned.into_iter()).await?;
    sidecar.wait_status("the poison's key goes on", MINUTE, |status| disposition(status, "work", "forwarded") == 301).await?;
    let status = sidecar.status().await?;
    ensure!(disposition(&status, "work", "dead_lettered") == 1, "{status:?}");
    let mut attempts: HashMap<(String, i64), Vec<u64>> = HashMap::new();
    for entry in service.calls().iter().flat_map(|call| &call.records) {
        let key = entry["key"]["text"].as_str().unwrap_or_default().to_owned();
        attempts.entry((key, number(entry))).or_default().extend(entry["attempt"].as_u64());
    }
    for ((key, n), attempts) in &attempts {
        // What went behind one that failed in its own batch is delivered again, as the same attempt.
        let mut counted = attempts.clone();
        counted.dedup();
        let wanted = match (*n, n % 7) {
            (POISON, _) | (_, 1) => 3,
            (_, 0) => 2,
            _ => 1,
        };
        ensure!(counted.into_iter().eq(1..=wanted), "{key}/{n}: {attempts:?}");
    }
    let calls = service.calls();
    ensure!(calls.iter().any(|call| call.records.len() > 5), "{} calls are no batches", calls.len());
    sidecar.finish().await
}

on_both!(a_batch_in_which_a_record_stops_its_partition_goes_on_whole_after_the_release, stopped);

async fn stopped(stage: Stage) -> Result<()> {
    let repaired = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let service = BatchService::start({
        let repaired = repaired.clone();
        move |call| {
            let said = call.records.iter().map(|entry| match number(entry) {
                1 if !repaired.load(std::sync::atomic::Ordering::Relaxed) => json!({ "id": entry["id"], "status": 500 }),
                _ => json!({ "id": entry["id"], "value": entry["value"] }),
            });
            BatchAnswer::outcomes(said)
        }
    })
    .await?;
    let sidecar = wired(
        &stage,
        &service.url(),
        "
            topics: { %in: { partitions: 1 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out], batch: { max: 6, wait: 10s },
                retry: { attempts: 1 }, on_exhausted: stop }
            ",
    )
    .await?;
    // One key, in one call: what is behind the second record was at the service with it.
    publish(&sidecar, &stage.topic("in"), (0..6).map(|n| ("k".to_owned(), json!({ "n": n })))).await?;
    sidecar
        .wait_status("the partition stands still", MINUTE, |status| routes_of(status).all(|route| route.state() == RouteState::Stopped))
        .await?;
    repaired.store(true, std::sync::atomic::Ordering::Relaxed);
    let said = sidecar.ctl(&["release", "work"]).await?;
    ensure!(said.status == Some(0) && said.stdout.contains("1 record released"), "{said:?}");
    sidecar.wait_status("all are forwarded", MINUTE, |status| disposition(status, "work", "forwarded") == 6).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), 6).await?;
    ensure!(found.iter().map(|found| found.json()["n"].as_i64()).eq((0..6).map(Some)), "{found:#?}");
    sidecar.finish().await
}

on_both!(an_answer_to_the_whole_batch_is_said_to_each_record, whole);

async fn whole(stage: Stage) -> Result<()> {
    let service = BatchService::start(|call| match call.number {
        // Three in a row, and the probe of one record, which finds nobody either.
        0..=3 => BatchAnswer::whole(503, "not yet"),
        _ => match call.records.iter().filter_map(|entry| entry["attempt"].as_u64()).min() {
            Some(1) => BatchAnswer::whole(200, "OK"),
            Some(2) => BatchAnswer::whole(500, "broken"),
            Some(3) => BatchAnswer::echo(call).after(Duration::from_secs(3)),
            _ if call.records.iter().any(|entry| number(entry) == 3) => BatchAnswer::echo(call),
            _ => BatchAnswer::whole(204, ""),
        },
    })
    .await?;
    let route = "{ name: work, service: work, from: [%in], handler: /work, to: [%out], batch: { max: 4, wait: 200ms }, timeout: 1s, retry: { initial: 1ms, multiplier: 1.0 }, breaker: { failures: 1000, open: 10ms } }";
    let sidecar = wired(&stage, &service.url(), &format!("topics: {{ %in: {{ partitions: 1 }} }}\nroutes: [{route}]")).await?;
    publish(&sidecar, &stage.topic("in"), (0..4).map(|n| (format!("k{n}"), json!({ "n": n })))).await?;
    let ended = |status: &_| disposition(status, "work", "forwarded") + disposition(status, "work", "ignored") == 4;
    sidecar.wait_status("all ended", MINUTE, ended).await.map_err(|error| error.context(format!("{:#?}", service.calls())))?;
    let calls = service.calls();
    let sizes: Vec<usize> = calls.iter().take(4).map(|call| call.records.len()).collect();
    ensure!(sizes == [4, 4, 4, 1], "one record asks whether the service is there: {calls:#?}");
    for n in 0..4 {
        let attempts: Vec<u64> = calls
            .iter()
            .flat_map(|call| &call.records)
            .filter(|entry| number(entry) == n)
            .filter_map(|entry| entry["attempt"].as_u64())
            .collect();
        let mut counted = attempts.clone();
        counted.dedup();
        // A record that went with one that had fewer attempts has some more.
        ensure!(
            counted.len() >= 4 && counted.iter().copied().eq(1..=counted.len() as u64),
            "503 counts none, a body that is no outcomes, a 500 and a timeout count one each: {attempts:?}"
        );
    }
    sidecar.finish().await
}

on_both!(an_incomplete_batch_waits_no_longer_than_its_route_says, wait);

async fn wait(stage: Stage) -> Result<()> {
    let service = BatchService::start(BatchAnswer::echo).await?;
    let route = "{ name: work, service: work, from: [%in], handler: /work, to: void, batch: { max: 3, wait: 1s } }";
    let sidecar = wired(&stage, &service.url(), &format!("topics: {{ %in: {{ partitions: 1 }} }}\nroutes: [{route}]")).await?;
    let topic = stage.topic("in");
    let began = Instant::now();
    publish(&sidecar, &topic, (0..2).map(|n| (format!("k{n}"), json!({ "n": n })))).await?;
    service.wait(1, MINUTE).await?;
    let waited = service.calls()[0].at - began;
    ensure!((Duration::from_millis(900)..Duration::from_secs(3)).contains(&waited), "an incomplete one left after {waited:?}");
    let began = Instant::now();
    publish(&sidecar, &topic, (0..7).map(|n| (format!("k{n}"), json!({ "n": n })))).await?;
    service.wait(3, MINUTE).await?;
    let calls = service.calls();
    let sizes: Vec<usize> = calls.iter().map(|call| call.records.len()).collect();
    ensure!(sizes == [2, 3, 3], "{sizes:?}");
    ensure!(calls[2].at - began < Duration::from_millis(800), "a full one waits for nothing: {:?}", calls[2].at - began);
    service.wait(4, MINUTE).await?;
    sidecar.wait_done(&["work"], MINUTE).await?;
    sidecar.finish().await
}

on_both!(a_grpc_stream_gets_batches_and_answers_them_per_record, grpc_stream);
on_both!(a_grpc_handler_without_a_stream_gets_batches_and_answers_them_per_record, grpc_unary);

async fn grpc_stream(stage: Stage) -> Result<()> {
    grpc(stage, true).await
}

async fn grpc_unary(stage: Stage) -> Result<()> {
    grpc(stage, false).await
}

async fn grpc(stage: Stage, streaming: bool) -> Result<()> {
    let failed = Mutex::new(HashMap::<String, u32>::new());
    let service = GrpcService::start(streaming, move |delivered| {
        let id = delivered.record.as_ref().map(|record| record.mesh_id.clone()).unwrap_or_default();
        let mut failed = failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let fails = delivered.position.as_ref().is_some_and(|position| position.offset % 9 == 4);
        let times = failed.entry(id).or_default();
        if fails && *times < 2 {
            *times += 1;
            return retry("not now");
        }
        reply_with(delivered, &json!({ "by": "grpc" }))
    })
    .await?;
    let route = "{ name: work, service: work, from: [%in], handler: /work, to: [%out], batch: { max: 200, wait: 20ms }, concurrency: 3, retry: { initial: 1ms }, breaker: { failures: 1000 } }";
    let sidecar =
        wired(&stage, &service.url(), &format!("topics: {{ %in: {{ partitions: 2 }}, %out: {{ partitions: 2 }} }}\nroutes: [{route}]"))
            .await?;
    let oracle = Load::new(stage.topic("in"), 1_000, 20).grpc(sidecar.mesh().await?).await?;
    sidecar.wait_done(&["work"], MINUTE).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), oracle.len()).await?;
    oracle.judge(&sightings(&found)?).exactly_once()?;
    let (streams, calls) = service.calls();
    ensure!(if streaming { (streams, calls) == (1, 0) } else { (1..600).contains(&calls) }, "{streams} streams, {calls} calls");
    ensure!(sidecar.metric("mesh_batch_records_count{route=\"work\",service=\"work\"}").await? < 600.0);
    sidecar.finish().await
}

on_both!(kill_9_with_batches_at_the_service_loses_nothing_and_keeps_the_order, kill);

async fn kill(stage: Stage) -> Result<()> {
    let service = BatchService::start(|call: &BatchCall| {
        let said = call.records.iter().map(|entry| match number(entry) % 10 == 0 && entry["attempt"] == 1 {
            true => json!({ "id": entry["id"], "status": 500 }),
            false => json!({ "id": entry["id"], "value": entry["value"] }),
        });
        BatchAnswer::outcomes(said).after(Duration::from_millis(20))
    })
    .await?;
    let mut sidecar = stage.sidecar("sidecar").instance("work-0").app("work", &service.url()).start().await?;
    let route = "{ name: work, service: work, from: [%in], handler: /work, to: [%out], batch: { max: 20, wait: 5ms }, concurrency: 4, retry: { initial: 1ms } }";
    sidecar.apply(&format!("topics: {{ %in: {{ partitions: 2 }}, %out: {{ partitions: 2 }} }}\nroutes: [{route}]")).await?;
    sidecar.wait_running(&["work"]).await?;
    let oracle = Load::new(stage.topic("in"), 2_000, 50).grpc(sidecar.mesh().await?).await?;
    for kill in 1..=2 {
        service.wait(service.calls().len() + 5 * kill, MINUTE).await?;
        sidecar.kill9().await?;
        sidecar.start().await?;
    }
    sidecar.wait_done(&["work"], MINUTE).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), oracle.len()).await?;
    // At each kill at most what was at the service, and what completed since the last commit.
    oracle.judge(&sightings(&found)?).at_most(2 * (4 * 20 + 300))?;
    sidecar.finish().await
}
