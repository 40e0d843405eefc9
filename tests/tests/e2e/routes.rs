//! What a route can say: where answers go, what is passed over, in which order.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    broker::Broker,
    load::Load,
    mesh::Found,
    on_both,
    oracle::{deliveries, sightings},
    python::python,
    service::{Condition, Rule, Scenario, Service},
    sidecar::disposition,
    stage::Stage,
};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);

fn with(field: &str, value: impl Into<Value>) -> Condition {
    Condition { field_equals: Some((field.into(), value.into())), ..Condition::default() }
}

fn field(found: &[Found], name: &str) -> Vec<i64> {
    let mut all: Vec<i64> = found.iter().filter_map(|found| found.json()[name].as_i64()).collect();
    all.sort_unstable();
    all
}

on_both!(answers_go_where_cases_statuses_and_filters_say, cases);

async fn cases(stage: Stage) -> Result<()> {
    let rules = [
        Rule::status(202).when(with("n", 1)),
        Rule::status(409).when(with("n", 2)),
        Rule::echo().extend(json!({ "total": 5000.0 })).when(with("n", 3)),
        Rule::status(204).empty().when(with("n", 4)),
        Rule::status(304).empty().when(with("n", 5)),
        Rule::echo().empty().when(with("n", 6)),
        Rule::status(210).when(with("n", 7)),
        Rule::echo().empty().header("mesh-tombstone", "true").when(with("n", 8)),
        Rule::echo().extend(json!({ "total": 1.0 })),
    ];
    let service = Service::native(Scenario::new().on("/work", rules)).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).service("other", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 4 } }
            routes:
            - name: work
              service: work
              from: [%in]
              handler: /work
              to: [%out, %copy]
              ignore_status: [204, 205, 304, 210]
              filter: 'record.json.n != 0'
              cases:
              - { status: 202, to: [%review] }
              - { status: 409, to: void }
              - { when: 'reply.json.total > 1000.0', to: [%fraud, %out] }
            - { name: second, service: other, from: [%in], handler: /second, to: void }
            ",
        )
        .await?;
    sidecar.wait_running(&["work", "second"]).await?;
    for number in 0..=9 {
        sidecar.publish(&stage.topic("in"), Some(&format!("k{number}")), "application/json", json!({ "n": number }).to_string()).await?;
    }
    let wanted: BTreeMap<&str, u64> = [("filtered", 1), ("void", 1), ("ignored", 4), ("forwarded", 4)].into();
    sidecar
        .wait_status("all ended", MINUTE, |status| {
            wanted.iter().all(|(how, count)| disposition(status, "work", how) == *count) && disposition(status, "second", "void") == 10
        })
        .await?;
    ensure!(service.ledger_of("/work").await?.len() == 9, "a filtered record is not delivered");
    ensure!(service.ledger_of("/second").await?.len() == 10, "each route gets every record");

    let read = async |name: &str, count: usize| stage.read(&sidecar, None, &stage.topic(name), count).await;
    ensure!(field(&read("review", 1).await?, "n") == [1]);
    ensure!(field(&read("fraud", 1).await?, "n") == [3]);
    let out = read("out", 3).await?;
    ensure!(field(&out, "n") == [3, 9], "{out:?}");
    let tombstones: Vec<String> = out.iter().filter(|found| found.value.is_none()).map(Found::key_text).collect();
    ensure!(tombstones == ["k8"], "{out:?}");
    ensure!(field(&read("copy", 2).await?, "n") == [9]);
    sidecar.finish().await
}

on_both!(an_answer_sets_key_headers_and_several_records_and_never_a_topic, answers);

async fn answers(stage: Stage) -> Result<()> {
    let several = json!({ "records": [{ "key": "x", "value": { "json": { "part": 1 } } }, { "value": { "text": "part 2" }, "headers": [{ "name": "h", "value": "2" }] }] });
    let rules = [
        Rule::echo()
            .text("one")
            .header("mesh-key", "new%20key")
            .header("mesh-header-own", "1")
            .header("mesh-header-colour", "blue")
            .content_type("text/plain")
            .when(with("n", 1)),
        Rule::echo().text(&several.to_string()).content_type("application/vnd.mesh.records+json").when(with("n", 2)),
        Rule::echo().header("mesh-topic", "elsewhere").when(with("n", 3)),
    ];
    let service = Service::native(Scenario::new().on("/work", rules)).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 1 }, %out: { partitions: 1 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out] }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    let path = format!("/v1/topics/{}/records", stage.topic("in"));
    for number in 1..=3 {
        let headers = [("content-type", "application/json"), ("mesh-key", "key"), ("mesh-header-colour", "red"), ("mesh-header-size", "9")];
        sidecar.http().post(&path, &headers, json!({ "n": number }).to_string()).await?.expect(200)?;
    }
    sidecar.wait_done(&["work"], MINUTE).await?;
    let out = stage.read(&sidecar, None, &stage.topic("out"), 4).await?;
    let [one, two, three, four] = out.as_slice() else { anyhow::bail!("four records are due: {out:?}") };
    ensure!(one.text() == "one" && one.key_text() == "new key", "{one:?}");
    ensure!(one.header("own").as_deref() == Some("1") && one.header("colour").as_deref() == Some("blue"), "{one:?}");
    ensure!(one.header("size").as_deref() == Some("9") && one.header("content-type").as_deref() == Some("text/plain"), "{one:?}");
    ensure!(one.headers.iter().filter(|header| header.0 == "colour").count() == 1, "an answer's header replaces the source's: {one:?}");
    ensure!(two.json() == json!({ "part": 1 }) && two.key_text() == "x", "{two:?}");
    ensure!(three.text() == "part 2" && three.key_text() == "key" && three.header("h").as_deref() == Some("2"), "{three:?}");
    ensure!(two.header("mesh-id") != three.header("mesh-id"), "two records of one answer have ids of their own");
    ensure!(four.json()["n"] == 3 && four.header("content-type").as_deref() == Some("application/json"), "{four:?}");
    sidecar.finish().await
}

on_both!(a_loop_that_never_ends_by_itself_ends_at_max_hops, max_hops);

async fn max_hops(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 1 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%in], max_hops: 5, dead_letter: %dead }
            ",
        )
        .await?;
    sidecar.publish(&stage.topic("in"), None, "text/plain", "round and round").await?;
    sidecar.wait_status("ended", MINUTE, |status| disposition(status, "work", "dead_lettered") == 1).await?;
    let dead = stage.read(&sidecar, None, &stage.topic("dead"), 1).await?;
    ensure!(dead.first().and_then(|dead| dead.header("mesh-dlq-reason")).is_some_and(|reason| reason.contains("hops")), "{dead:?}");
    ensure!(service.total().await? <= 6, "{} calls", service.total().await?);
    sidecar.finish().await
}

/// With `order: key` keys run beside each other, and one key one at a time; `partition` runs one at a time; `none` any.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ordering_and_concurrency_are_as_declared() -> Result<()> {
    Stage::run(Broker::Embedded, async |stage| {
        let slow = || [Rule::echo().after(Duration::from_millis(50))];
        let scenario = Scenario { headers: false, ..Scenario::new() };
        let service = Service::native(scenario.on("/key", slow()).on("/partition", slow()).on("/none", slow())).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        sidecar
            .apply(
                "
                topics: { %in: { partitions: 1 } }
                routes:
                - { name: by-key, service: work, from: [%in], handler: /key, to: [%key], order: key, concurrency: 8 }
                - { name: by-partition, service: work, from: [%in], handler: /partition, to: [%partition], order: partition, concurrency: 8 }
                - { name: by-none, service: work, from: [%in], handler: /none, to: void, order: none, concurrency: 8 }
                ",
            )
            .await?;
        sidecar.wait_running(&["by-key", "by-partition", "by-none"]).await?;
        let oracle = Load::new(stage.topic("in"), 40, 4).http(&sidecar).await?;
        sidecar.wait_done(&["by-key", "by-partition", "by-none"], MINUTE).await?;
        for path in ["/key", "/partition"] {
            oracle.judge(&deliveries(&service.ledger_of(path).await?)?).exactly_once().context(path)?;
        }
        for topic in ["key", "partition"] {
            let found = stage.read(&sidecar, None, &stage.topic(topic), 40).await?;
            let unplaced: Vec<_> = sightings(&found)?.into_iter().map(|one| mesh_tests::oracle::Sighting { place: String::new(), ..one }).collect();
            oracle.judge(&unplaced).exactly_once().context(topic)?;
        }
        let gaps = |entries: &[mesh_tests::service::Entry]| {
            entries.windows(2).map(|pair| pair[1].time_ms.saturating_sub(pair[0].time_ms)).collect::<Vec<u64>>()
        };
        let partition = service.ledger_of("/partition").await?;
        ensure!(gaps(&partition).iter().all(|gap| *gap >= 45), "two at once with `order: partition`: {:?}", gaps(&partition));
        let offsets: Vec<i64> = partition.iter().map(|entry| entry.offset).collect();
        ensure!(offsets.is_sorted(), "{offsets:?}");
        // 40 records of 50 ms: one at a time would take 2 s, four keys at once 500 ms, eight at once 250 ms.
        let span = |entries: &[mesh_tests::service::Entry]| match entries {
            [first, .., last] => last.time_ms.saturating_sub(first.time_ms),
            _ => 0,
        };
        let (key, none) = (service.ledger_of("/key").await?, service.ledger_of("/none").await?);
        ensure!(none.len() == 40 && key.len() == 40);
        ensure!(span(&key) < 1_500 && span(&none) < 1_500, "keys took {} ms, none took {} ms", span(&key), span(&none));
        for key_name in ["k0", "k1", "k2", "k3"] {
            let own: Vec<_> = key.iter().filter(|entry| entry.key.as_deref() == Some(key_name)).cloned().collect();
            ensure!(gaps(&own).iter().all(|gap| *gap >= 45), "two of one key at once: {:?}", gaps(&own));
        }
        sidecar.finish().await
    })
    .await
}

on_both!(a_delivery_carries_what_the_design_names, request);

async fn request(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 1 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /a/b, to: void, content_type: text/csv }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let headers = [
        ("content-type", "application/x-thing"),
        ("mesh-key", "schl%C3%BCssel%20%25"),
        ("mesh-id", "id-1"),
        ("mesh-header-Colour", "red"),
        ("traceparent", traceparent),
        ("tracestate", "vendor=1"),
        ("baggage", "user=7"),
    ];
    let path = format!("/v1/topics/{}/records", stage.topic("in"));
    let stored = sidecar.http().post(&path, &headers, vec![0, 159, 146, 150]).await?.expect(200)?.json()?;
    ensure!(stored["topic"] == stage.topic("in") && stored["partition"] == 0 && stored["offset"] == 0, "{stored}");
    service.wait(1, MINUTE).await?;
    let ledger = service.ledger().await?;
    let entry = ledger.first().context("a call")?;
    ensure!(entry.bytes() == [0, 159, 146, 150], "{entry:?}");
    ensure!(entry.path == "/a/b" && entry.route == "work" && entry.topic == stage.topic("in"), "{entry:?}");
    ensure!((entry.partition, entry.offset, entry.attempt, entry.hops) == (0, 0, 1, 0), "{entry:?}");
    ensure!(entry.id == "id-1" && entry.key.as_deref() == Some("schlüssel %"), "{entry:?}");
    ensure!(entry.header("mesh-timestamp").is_some_and(|time| time.parse::<u64>().is_ok()), "{entry:?}");
    ensure!(entry.header("content-type") == Some("application/x-thing"), "{entry:?}");
    ensure!(entry.header("mesh-header-colour") == Some("red"), "{entry:?}");
    ensure!(
        entry.header("traceparent").is_some_and(|own| own.contains("4bf92f3577b34da6a3ce929d0e0e4736")),
        "the trace goes on: {entry:?}"
    );
    ensure!(entry.header("tracestate") == Some("vendor=1") && entry.header("baggage") == Some("user=7"), "{entry:?}");
    // A record that names no type gets the route's.
    let record = mesh_proto::v1::Record { value: Some("1;2".into()), ..Default::default() };
    mesh_tests::mesh::publish(sidecar.mesh().await?, &stage.topic("in"), vec![record]).await?;
    service.wait(2, MINUTE).await?;
    ensure!(service.ledger().await?.iter().any(|entry| entry.header("content-type") == Some("text/csv")));
    sidecar.finish().await
}

on_both!(a_group_begins_where_its_route_says, starts);

async fn starts(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    let topics = "topics: { %in: { partitions: 2 } }";
    sidecar.apply(&format!("{{ {topics}, routes: [] }}")).await?;
    let topic = stage.topic("in");
    let give = async |text: &str| sidecar.publish(&topic, None, "text/plain", text.to_owned()).await;
    for text in ["old 1", "old 2"] {
        give(text).await?;
    }
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 2 } }
            routes:
            - { name: earliest, service: work, from: [%in], handler: /earliest, to: void, start: earliest }
            - { name: default, service: work, from: [%in], handler: /default, to: void }
            - { name: latest, service: work, from: [%in], handler: /latest, to: void, start: latest }
            - { name: applied, service: work, from: [%in], handler: /applied, to: void, start: applied }
            - { name: long-ago, service: work, from: [%in], handler: /long-ago, to: void, start: 2001-02-03T04:05:06Z }
            ",
        )
        .await?;
    let all = ["earliest", "default", "latest", "applied", "long-ago"];
    sidecar.wait_running(&all).await?;
    give("new").await?;
    sidecar
        .wait_status("all read", MINUTE, |status| {
            all.iter().zip([3, 3, 1, 1, 3]).all(|(route, count)| disposition(status, route, "void") == count)
        })
        .await?;
    for route in ["latest", "applied"] {
        let texts: Vec<String> = service.ledger_of(&format!("/{route}")).await?.iter().map(mesh_tests::service::Entry::text).collect();
        ensure!(texts == ["new"], "{route}: {texts:?}");
    }
    sidecar.finish().await
}

/// What the broker deleted before it was read is `expired`: counted, and reading goes on behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_that_the_broker_deleted_are_counted_as_expired() -> Result<()> {
    let (Some(python), Some(broker)) = (python().await?, Broker::kafka().await?) else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let mut sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        sidecar
            .apply("{ topics: { %in: { partitions: 1 } }, routes: [{ name: work, service: work, from: [%in], handler: /work, to: void }] }")
            .await?;
        let topic = stage.topic("in");
        for number in 0..2 {
            sidecar.publish(&topic, None, "text/plain", number.to_string()).await?;
        }
        sidecar.wait_status("two read", MINUTE, |status| disposition(status, "work", "void") == 2).await?;
        sidecar.sigterm(MINUTE).await?;
        let lines: String = (2..10).map(|number| format!("{}\n", json!({ "value": number.to_string() }))).collect();
        stage.kafka_client(&python, &topic, &["produce"], lines).await?;
        stage.kafka_client(&python, &topic, &["delete", "--before", "6"], String::new()).await?;
        sidecar.start().await?;
        sidecar
            .wait_status("the rest read", MINUTE, |status| {
                disposition(status, "work", "void") == 4 && disposition(status, "work", "expired") == 4
            })
            .await?;
        let offsets: Vec<i64> = service.ledger().await?.iter().map(|entry| entry.offset).collect();
        ensure!(offsets == [0, 1, 6, 7, 8, 9], "{offsets:?}");
        sidecar.finish().await
    })
    .await
}
