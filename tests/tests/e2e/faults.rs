//! What services and clients do wrong, one test each: the outcomes of the design's table, and the errors of the publish API.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use http::Method;
use http_body_util::Full;
use mesh_proto::v1::{Header, Record};
use mesh_tests::{
    broker::Broker,
    mesh::{Found, publish},
    on_both,
    service::{Condition, Entry, Raw, RawService, Rule, Scenario, Service},
    sidecar::{Sidecar, disposition, routes_of},
    stage::Stage,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const MINUTE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

async fn embedded<F: Future<Output = Result<()>>>(body: impl FnOnce(Stage) -> F) -> Result<()> {
    Stage::run(Broker::Embedded, body).await
}

/// One route from `%in` to `%out`, with three quick attempts, and these further fields.
async fn route(stage: &Stage, app: &str, fields: &str) -> Result<Sidecar> {
    let sidecar = stage.sidecar("sidecar").app("work", app).start().await?;
    let table = format!(
        "
        topics: {{ %in: {{ partitions: 1 }} }}
        routes:
        - name: work
          service: work
          from: [%in]
          handler: /work
          to: [%out]
          dead_letter: %dead
          retry: {{ attempts: 3, initial: 20ms, max: 100ms }}
          {fields}
        "
    );
    sidecar.apply(&table).await?;
    sidecar.wait_running(&["work"]).await?;
    Ok(sidecar)
}

async fn give(stage: &Stage, sidecar: &Sidecar, key: &str) -> Result<()> {
    sidecar.publish(&stage.topic("in"), Some(key), "application/json", json!({ "k": key }).to_string()).await?;
    Ok(())
}

async fn ended(sidecar: &Sidecar, how: &str, count: u64) -> Result<()> {
    let what = format!("{count} records {how}");
    sidecar.wait_status(&what, MINUTE, |status| disposition(status, "work", how) == count).await?;
    Ok(())
}

/// The one dead letter, which must carry this reason.
async fn dead(stage: &Stage, sidecar: &Sidecar, reason: &str, attempts: &str) -> Result<Found> {
    ended(sidecar, "dead_lettered", 1).await?;
    let found = stage.read(sidecar, None, &stage.topic("dead"), 1).await?;
    ensure!(found.len() == 1, "{found:?}");
    let dead = found.into_iter().next().context("a dead letter")?;
    ensure!(dead.header("mesh-dlq-reason").as_deref() == Some(reason), "{dead:?}");
    ensure!(dead.header("mesh-dlq-attempts").as_deref() == Some(attempts), "{dead:?}");
    ensure!(dead.header("mesh-dlq-route").as_deref() == Some("work") && dead.header("mesh-dlq-detail").is_some(), "{dead:?}");
    Ok(dead)
}

async fn answers(rules: impl IntoIterator<Item = Rule>) -> Result<Service> {
    Service::native(Scenario::new().on("/work", rules)).await
}

fn first(calls: u64) -> Condition {
    Condition { calls_of_record_below: Some(calls), ..Condition::default() }
}

fn attempts(ledger: &[Entry]) -> Vec<u32> {
    ledger.iter().map(|entry| entry.attempt).collect()
}

// ---- what a service does wrong ----

#[tokio::test]
async fn a_service_that_hangs_uses_up_its_attempts_while_other_keys_go_on() -> Result<()> {
    embedded(async |stage| {
        let hangs = Condition { key: Some("slow".into()), ..Condition::default() };
        let service = answers([Rule::echo().hang().when(hangs)]).await?;
        let sidecar = route(&stage, &service.url(), "timeout: 400ms").await?;
        give(&stage, &sidecar, "slow").await?;
        for _ in 0..5 {
            give(&stage, &sidecar, "quick").await?;
        }
        ended(&sidecar, "forwarded", 5).await?;
        let dead = dead(&stage, &sidecar, "attempts", "3").await?;
        ensure!(dead.key_text() == "slow", "{dead:?}");
        let slow: Vec<Entry> = service.ledger().await?.into_iter().filter(|entry| entry.key.as_deref() == Some("slow")).collect();
        ensure!(attempts(&slow) == [1, 2, 3], "{slow:?}");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn an_answer_301_is_not_followed_and_dead_lettered_at_once() -> Result<()> {
    embedded(async |stage| {
        let elsewhere = Service::native(Scenario::new()).await?;
        let service = answers([Rule::status(301).text("moved").header("location", &format!("{}/work", elsewhere.url()))]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        give(&stage, &sidecar, "a").await?;
        let dead = dead(&stage, &sidecar, "status", "1").await?;
        ensure!(dead.header("mesh-dlq-detail").is_some_and(|detail| detail.contains("301")), "{dead:?}");
        ensure!(elsewhere.total().await? == 0 && service.total().await? == 1);
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn an_answer_404_is_tried_again_and_then_dead_lettered() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::status(404).text("not deployed yet")]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        give(&stage, &sidecar, "a").await?;
        dead(&stage, &sidecar, "attempts", "3").await?;
        ensure!(attempts(&service.ledger().await?) == [1, 2, 3]);
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn an_answer_429_with_retry_after_is_tried_again_no_sooner() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::status(429).empty().header("retry-after", "2").when(first(1))]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        give(&stage, &sidecar, "a").await?;
        ended(&sidecar, "forwarded", 1).await?;
        let ledger = service.ledger().await?;
        let [one, two] = ledger.as_slice() else { anyhow::bail!("two calls are due: {ledger:?}") };
        ensure!((one.attempt, two.attempt) == (1, 2) && one.id == two.id, "{ledger:?}");
        let pause = two.time_ms - one.time_ms;
        ensure!((1_900..10_000).contains(&pause), "tried again after {pause} ms");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn an_answer_500_is_tried_again_in_order_and_counted() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::status(500).text("trouble").when(first(2))]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        let topic = stage.topic("in");
        for number in 0..3 {
            sidecar.publish(&topic, Some("same"), "application/json", json!({ "n": number }).to_string()).await?;
        }
        ended(&sidecar, "forwarded", 3).await?;
        let ledger = service.ledger().await?;
        ensure!(attempts(&ledger) == [1, 2, 3, 1, 2, 3, 1, 2, 3], "{:?}", attempts(&ledger));
        let order: Vec<i64> = ledger.iter().filter_map(|entry| entry.json()["n"].as_i64()).collect();
        ensure!(order == [0, 0, 0, 1, 1, 1, 2, 2, 2], "a retry waits in its lane: {order:?}");
        let out = stage.read(&sidecar, None, &stage.topic("out"), 3).await?;
        ensure!(out.iter().map(|found| found.json()["n"].clone()).eq([json!(0), json!(1), json!(2)]), "{out:?}");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn an_answer_503_is_no_service_there_and_counts_no_attempt() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::status(503).text("starting").when(first(8))]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        give(&stage, &sidecar, "a").await?;
        service.wait(9, MINUTE).await?;
        ended(&sidecar, "forwarded", 1).await?;
        ensure!(service.ledger().await?.iter().all(|entry| entry.attempt == 1));
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn an_answer_422_is_dead_lettered_at_once_with_key_value_and_headers() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::status(422).text("no")]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        let headers = [("content-type", "text/plain"), ("mesh-key", "k"), ("mesh-header-colour", "red"), ("mesh-id", "my-id")];
        sidecar.http().post(&format!("/v1/topics/{}/records", stage.topic("in")), &headers, "value").await?.expect(200)?;
        let dead = dead(&stage, &sidecar, "status", "1").await?;
        ensure!(dead.text() == "value" && dead.key_text() == "k", "{dead:?}");
        ensure!(dead.header("colour").as_deref() == Some("red") && dead.header("mesh-id").as_deref() == Some("my-id"), "{dead:?}");
        ensure!(dead.header("content-type").as_deref() == Some("text/plain"), "{dead:?}");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_connection_that_is_reset_before_anything_was_read_is_tried_again() -> Result<()> {
    embedded(async |stage| {
        let good = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}".to_vec();
        let service = RawService::start(vec![Raw::Reset, Raw::Reset, Raw::Say(good)]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        give(&stage, &sidecar, "a").await?;
        ended(&sidecar, "forwarded", 1).await?;
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_connection_that_is_reset_after_the_request_counts_an_attempt() -> Result<()> {
    embedded(async |stage| {
        let service = RawService::start(vec![Raw::ReadAndReset]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        give(&stage, &sidecar, "a").await?;
        dead(&stage, &sidecar, "attempts", "3").await?;
        service.wait(3, SOON).await?;
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn an_answer_that_is_no_http_counts_an_attempt() -> Result<()> {
    embedded(async |stage| {
        let service = RawService::start(vec![Raw::Say(b"220 mail.example.org ESMTP\r\n".to_vec())]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        give(&stage, &sidecar, "a").await?;
        dead(&stage, &sidecar, "attempts", "3").await?;
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_204_that_carries_a_body_all_the_same_is_ignored_and_spoils_nothing() -> Result<()> {
    embedded(async |stage| {
        let said = b"HTTP/1.1 204 No Content\r\ncontent-length: 7\r\n\r\nsurplus".to_vec();
        let service = RawService::start(vec![Raw::Say(said)]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        for _ in 0..5 {
            give(&stage, &sidecar, "a").await?;
        }
        ended(&sidecar, "ignored", 5).await?;
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_header_of_an_answer_that_is_not_utf_8_is_kept_and_breaks_nothing() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::echo().raw_header("mesh-header-odd", &[0xff, 0xfe]).raw_header("x-noise", &[0xff])]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        give(&stage, &sidecar, "a").await?;
        ended(&sidecar, "forwarded", 1).await?;
        let out = stage.read(&sidecar, None, &stage.topic("out"), 1).await?;
        let odd = out.iter().flat_map(|found| &found.headers).find(|header| header.0 == "odd");
        ensure!(odd.is_some_and(|header| header.1 == [0xff, 0xfe]), "{out:?}");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_records_odd_headers_reach_the_service_in_a_percent_encoded_list() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::echo()]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        let header = |name: &str, value: &'static [u8]| Header { name: name.into(), value: Some(value.into()) };
        let headers = vec![header("Binary", &[0xff, 0]), header("Twice", b"1"), header("Twice", b"2"), header("plain", b"text")];
        let key = Some(vec![0xfe, 0xff].into());
        let record = Record { key, value: Some("v".into()), headers, content_type: "text/plain".into(), ..Record::default() };
        publish(sidecar.mesh().await?, &stage.topic("in"), vec![record]).await?;
        ended(&sidecar, "forwarded", 1).await?;
        let ledger = service.ledger().await?;
        let entry = ledger.first().context("a call")?;
        ensure!(entry.header("mesh-header-plain") == Some("text"), "{entry:?}");
        ensure!(
            entry.header("mesh-headers").is_some_and(|list| list.contains("Binary") && list.contains("Twice") && list.contains('%')),
            "{entry:?}"
        );
        ensure!(entry.header("mesh-key").is_none() && entry.header("mesh-key-base64") == Some("/v8="), "{entry:?}");
        // By default the source's headers go on its replies, as they were.
        let out = stage.read(&sidecar, None, &stage.topic("out"), 1).await?;
        let out = out.first().context("a reply")?;
        let own: Vec<(&str, &[u8])> = out.headers.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        for wanted in [("Binary", &[0xff, 0][..]), ("Twice", b"1"), ("Twice", b"2"), ("plain", b"text")] {
            ensure!(own.contains(&wanted), "{wanted:?} is missing: {out:?}");
        }
        ensure!(out.key.as_deref() == Some(&[0xfe, 0xff]), "{out:?}");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn an_answer_beyond_the_size_limit_is_dead_lettered_at_once() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::echo().size(20 << 20)]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        give(&stage, &sidecar, "a").await?;
        dead(&stage, &sidecar, "status", "1").await?;
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn an_expression_that_fails_on_a_record_dead_letters_it() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::echo()]).await?;
        let sidecar = route(&stage, &service.url(), "filter: 'record.json.country == \"KR\"'").await?;
        let topic = stage.topic("in");
        sidecar.publish(&topic, None, "text/plain", "no JSON").await?;
        sidecar.publish(&topic, None, "application/json", r#"{"country":"DE"}"#).await?;
        sidecar.publish(&topic, None, "application/json", r#"{"country":"KR"}"#).await?;
        ended(&sidecar, "filtered", 1).await?;
        ended(&sidecar, "forwarded", 1).await?;
        let dead = dead(&stage, &sidecar, "expression", "0").await?;
        ensure!(dead.text() == "no JSON", "{dead:?}");
        ensure!(service.total().await? == 1, "a record that is not admitted is not delivered");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_service_that_is_not_there_is_waited_for_by_name() -> Result<()> {
    embedded(async |stage| {
        let port = mesh_tests::ports::Port::take()?;
        let sidecar = route(&stage, &format!("http://{}", port.address()), "").await?;
        give(&stage, &sidecar, "a").await?;
        sidecar
            .wait_status("waiting for the service", SOON, |status| {
                routes_of(status).any(|route| route.reason.contains("work") && route.reason.contains(&port.number().to_string()))
            })
            .await?;
        let shown = sidecar.ctl(&["status"]).await?.success()?;
        ensure!(shown.contains("work"), "{shown}");
        // It does not make the sidecar unready: publishing goes on.
        sidecar.probes().get("/readyz").await?.expect(200)?;
        let status = sidecar.status().await?;
        ensure!(disposition(&status, "work", "dead_lettered") == 0, "{status:#?}");
        sidecar.finish().await
    })
    .await
}

// ---- what a publisher does wrong ----

on_both!(publishing_to_a_wrong_topic_is_refused, wrong_topic);

async fn wrong_topic(stage: Stage) -> Result<()> {
    let sidecar = stage.sidecar("sidecar").start().await?;
    let post = async |topic: &str| sidecar.http().post(&format!("/v1/topics/{topic}/records"), &[], "value").await;
    let unknown = post(&stage.topic("nobody-declared-this")).await?;
    if stage.is_kafka() {
        let problem = unknown.problem(404, "unknown-topic")?;
        ensure!(problem["persisted"] == "no" && problem["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{problem}");
    } else {
        unknown.expect(200)?;
    }
    for name in ["a%2Fb", "a%20b", "..", &"x".repeat(300)] {
        post(name).await?.problem(400, "invalid-topic")?;
    }
    post("void").await?.problem(400, "invalid-topic")?;
    post("__mesh.control").await?.problem(403, "forbidden-topic")?;
    sidecar.finish().await
}

#[tokio::test]
async fn a_missing_body_is_refused() -> Result<()> {
    embedded(async |stage| {
        let sidecar = stage.sidecar("sidecar").start().await?;
        let problem = sidecar.http().post(&format!("/v1/topics/{}/records", stage.topic("t")), &[], "").await?.problem(400, "no-body")?;
        ensure!(problem["retryable"] == false && problem["persisted"] == "no", "{problem}");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_body_of_20_mb_is_refused_and_not_held_in_memory() -> Result<()> {
    embedded(async |stage| {
        let mut sidecar = stage.sidecar("sidecar").start().await?;
        let path = format!("/v1/topics/{}/records", stage.topic("t"));
        let before = sidecar.process()?.resident_bytes()?;
        for _ in 0..3 {
            let answer = sidecar.client().post(&path, &[], vec![b'x'; 20 << 20]).await;
            // The answer may come, and the connection be closed, before all of the body is written.
            match answer {
                Ok(answer) => {
                    answer.problem(413, "body-too-large")?;
                }
                Err(error) => eprintln!("the connection was closed while the body was sent: {error:#}"),
            }
        }
        // Refused by what it declares, before any of it is sent: this answer is certain to be seen.
        let mut stream = tokio::net::TcpStream::connect(sidecar.api_address()).await?;
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nmesh-service: client\r\ncontent-length: {}\r\n\r\n", 20 << 20);
        stream.write_all(head.as_bytes()).await?;
        let mut answer = [0; 12];
        tokio::time::timeout(SOON, stream.read_exact(&mut answer)).await??;
        ensure!(&answer == b"HTTP/1.1 413", "{}", String::from_utf8_lossy(&answer));
        let grown = sidecar.process()?.resident_bytes()?.saturating_sub(before);
        ensure!(grown < 40 << 20, "memory grew by {} MB", grown >> 20);
        sidecar.publish(&stage.topic("t"), None, "text/plain", "still there").await?;
        let found = stage.read(&sidecar, None, &stage.topic("t"), 1).await?;
        ensure!(found.len() == 1 && found.iter().all(|found| found.text() == "still there"), "{} records", found.len());
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_broken_json_batch_is_refused_whole_and_a_mixed_one_is_answered_per_record() -> Result<()> {
    embedded(async |stage| {
        let sidecar = stage.sidecar("sidecar").start().await?;
        let path = format!("/v1/topics/{}/records", stage.topic("t"));
        let kind = [("content-type", "application/vnd.mesh.records+json")];
        let broken = r#"{"records":[{"key":"a","value":"1"},{"key":"b","value":"#;
        let problem = sidecar.http().post(&path, &kind, broken).await?.problem(400, "bad-json")?;
        ensure!(problem["persisted"] == "no", "{problem}");

        let mixed = json!({ "records": [
            { "key": "a", "value": { "json": { "n": 1 } }, "headers": [{ "name": "h", "value": "1" }] },
            { "key": "b", "value": "2", "headers": [{ "name": "mesh-hops", "value": "7" }] },
            { "key": "c", "value": { "base64": "AP8=" } },
        ]});
        let answer = sidecar.http().post(&path, &kind, mixed.to_string()).await?.expect(207)?.json()?;
        let results = answer["results"].as_array().context("results")?;
        let statuses: Vec<&Value> = results.iter().map(|result| &result["status"]).collect();
        ensure!(statuses == [&json!(200), &json!(400), &json!(200)], "{answer}");
        ensure!(results[1]["problem"]["code"] == "invalid-header" && results[0]["offset"].is_i64(), "{answer}");

        let found = stage.read(&sidecar, None, &stage.topic("t"), 2).await?;
        let mut values: Vec<(String, Vec<u8>)> =
            found.iter().map(|found| (found.key_text(), found.value.clone().unwrap_or_default())).collect();
        values.sort();
        ensure!(values == [("a".into(), br#"{"n":1}"#.to_vec()), ("c".into(), vec![0, 255])], "{values:?}");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_malformed_traceparent_begins_a_new_trace_and_refuses_nothing() -> Result<()> {
    embedded(async |stage| {
        let service = answers([Rule::echo()]).await?;
        let sidecar = route(&stage, &service.url(), "").await?;
        let path = format!("/v1/topics/{}/records", stage.topic("in"));
        let malformed = [
            "",
            "nonsense",
            "00-zz-xx-01",
            "00-00000000000000000000000000000000-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ];
        for traceparent in malformed {
            sidecar.http().post(&path, &[("traceparent", traceparent), ("tracestate", "a=1")], "v").await?.expect(200)?;
        }
        ended(&sidecar, "forwarded", malformed.len() as u64).await?;
        for entry in service.ledger().await? {
            if let Some(traceparent) = entry.header("traceparent") {
                ensure!(!malformed.contains(&traceparent) && traceparent.len() == 55, "{traceparent:?} went on");
            }
        }
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn a_request_header_that_is_not_utf_8_is_refused_by_name_or_left_alone() -> Result<()> {
    embedded(async |stage| {
        let sidecar = stage.sidecar("sidecar").start().await?;
        let path = format!("/v1/topics/{}/records", stage.topic("t"));
        let request = |name: &str| {
            let odd = http::HeaderValue::from_bytes(&[b'a', 0xff, 0xfe])?;
            let request = http::Request::builder().method(Method::POST).uri(&path).header("host", "x").header("mesh-service", "client");
            anyhow::Ok(request.header(name, odd).body(Full::new("v".into()))?)
        };
        for name in ["mesh-header-colour", "mesh-key", "mesh-id"] {
            let problem = sidecar.http().call(request(name)?, SOON).await?.problem(400, "invalid-header")?;
            ensure!(problem["detail"].as_str().is_some_and(|detail| detail.contains(name)), "{problem}");
        }
        // Not the mesh's business.
        sidecar.http().call(request("x-anything")?, SOON).await?.expect(200)?;
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn what_is_no_http_at_all_harms_nobody() -> Result<()> {
    embedded(async |stage| {
        let sidecar = stage.sidecar("sidecar").start().await?;
        for noise in [
            &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
            b"HELLO\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense",
            b"\0\0\0\0",
        ] {
            for address in [sidecar.api_address(), sidecar.admin_address(), sidecar.probe_address()] {
                let mut stream = tokio::net::TcpStream::connect(address).await?;
                stream.write_all(noise).await?;
                stream.shutdown().await?;
                let mut answer = Vec::new();
                let begin = Instant::now();
                // However it ends, it ends.
                let read = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await;
                ensure!(read.is_ok(), "{address} kept a connection of noise for {:?}", begin.elapsed());
            }
        }
        sidecar.publish(&stage.topic("t"), None, "text/plain", "fine").await?;
        sidecar.finish().await
    })
    .await
}
