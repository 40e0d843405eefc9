//! Retry and park topics: what survives a `kill -9` and an outage, and what order is kept.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::GetStatusResponse;
use mesh_tests::{
    load::Load,
    on_both,
    oracle::{deliveries, sightings},
    service::{Condition, Rule, Scenario, Service},
    sidecar::{disposition, routes_of},
    stage::Stage,
};

const MINUTE: Duration = Duration::from_secs(60);

on_both!(attempts_go_on_after_a_kill_9_and_a_key_keeps_its_order_meanwhile, attempts_survive);
on_both!(sidecars_that_die_and_join_while_all_keys_wait_lose_nothing_and_keep_order, rebalanced);
on_both!(a_storm_of_500s_drains_nothing_into_the_dlq, storm);
on_both!(a_parked_key_that_is_released_goes_on_in_order, released);
on_both!(a_parked_key_waits_over_a_restart_and_goes_on_when_the_table_says_so, parked);

/// The records of a key, by what its value says, in the order in which the service got them: attempts of each.
async fn of_key(service: &Service, key: &str) -> Result<Vec<(i64, u32)>> {
    let ledger = service.ledger().await?;
    let own = ledger.iter().filter(|entry| entry.key.as_deref() == Some(key));
    own.map(|entry| Ok((entry.json()["n"].as_i64().context("a number")?, entry.attempt))).collect()
}

async fn attempts_survive(stage: Stage) -> Result<()> {
    let failing = Condition { key: Some("k3".to_owned()), attempt_below: Some(4), ..Condition::default() };
    let service = Service::native(Scenario::new().on("/work", [Rule::status(500).when(failing), Rule::echo()])).await?;
    let mut sidecar = stage.sidecar("sidecar").instance("work-0").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out],
                retry: { attempts: 2, initial: 20ms, topics: [2s, 3s] } }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    let load = Load::new(stage.topic("in"), 60, 20);
    let oracle = load.http(&sidecar).await?;
    // All but the later records of the key: two attempts in place of its first one, and one each of the others.
    service.wait(57 + 2, MINUTE).await.context("other keys go on")?;
    for kill in 0..3 {
        sidecar.kill9().await?;
        sidecar.start().await?;
        sidecar.wait_running(&["work"]).await?;
        println!("kill {kill}: {:?}", of_key(&service, "k3").await?);
        tokio::time::sleep(Duration::from_millis(2_500)).await;
    }
    sidecar.wait_done(&["work"], 2 * MINUTE).await?;
    sidecar
        .wait_status("nothing waits", MINUTE, |status| routes_of(status).all(|route| route.waiting_keys == 0 && route.parked_records == 0))
        .await?;
    let seen = of_key(&service, "k3").await?;
    println!("{seen:?}");
    let mut firsts = seen.iter().map(|(number, _)| *number).collect::<Vec<_>>();
    firsts.dedup();
    let mut numbers = BTreeSet::new();
    firsts.retain(|number| numbers.insert(*number));
    ensure!(firsts.is_sorted() && firsts.len() == 3, "the key's records were first delivered as {firsts:?}");
    for number in numbers {
        let attempts: Vec<u32> = seen.iter().filter(|(of, _)| *of == number).map(|(_, attempt)| *attempt).collect();
        ensure!(attempts.last() == Some(&4), "{number}: {attempts:?}");
        let beyond = attempts.iter().position(|attempt| *attempt > 2).unwrap_or_default();
        ensure!(attempts[beyond..].is_sorted(), "the attempts of {number} went back: {attempts:?}");
    }
    let found = stage.read(&sidecar, None, &stage.topic("out"), 60).await?;
    oracle.judge(&sightings(&found)?).at_most(60)?;
    oracle.judge(&deliveries(&service.ledger().await?)?).at_most(200)?;
    sidecar.finish().await
}

async fn storm(stage: Stage) -> Result<()> {
    let mut service = Service::native(Scenario::new().on("/work", [Rule::status(500)])).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out], breaker: { failures: 20, open: 500ms },
                retry: { attempts: 3, initial: 20ms, topics: [200ms, 500ms] } }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    let oracle = Load::new(stage.topic("in"), 1_000, 100).http(&sidecar).await?;
    let outage = Duration::from_secs(if mesh_tests::full() { 120 } else { 12 });
    // The storm lasts: nothing to wait for but the time.
    tokio::time::sleep(outage).await;
    let status = sidecar.status().await?;
    ensure!(disposition(&status, "work", "dead_lettered") == 0, "{status:?}");
    let route = routes_of(&status).next().context("the route")?;
    ensure!(route.reason.contains("keeps failing") || route.reason.contains("more often"), "{route:?}");
    service.set(Scenario::new().on("/work", [Rule::echo()])).await?;
    sidecar.wait_done(&["work"], MINUTE).await?;
    sidecar.wait_status("all are forwarded", MINUTE, |status| disposition(status, "work", "forwarded") == 1_000).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), 1_000).await?;
    oracle.judge(&sightings(&found)?).at_most(0)?;
    sidecar.finish().await
}

async fn parked(stage: Stage) -> Result<()> {
    const TABLE: &str = "
            topics: { %in: { partitions: 2 }, %out: { partitions: 2 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out], retry: { attempts: 2, initial: 20ms }, on_exhausted: park }
            ";
    let poison = Condition { key: Some("k3".to_owned()), field_below: Some(("n".to_owned(), 1)), ..Condition::default() };
    let mut service = Service::native(Scenario::new().on("/work", [Rule::status(500).when(poison), Rule::echo()])).await?;
    let mut sidecar = stage.sidecar("sidecar").instance("work-0").service("work", &service).start().await?;
    sidecar.apply(TABLE).await?;
    sidecar.wait_running(&["work"]).await?;
    let oracle = Load::new(stage.topic("in"), 50, 10).http(&sidecar).await?;
    let waits = |status: &GetStatusResponse| {
        routes_of(status).next().is_some_and(|route| route.parked_records == 5 && route.exhausted_records == 1 && route.waiting_keys == 1)
    };
    sidecar.wait_status("a key is parked", MINUTE, waits).await?;
    sidecar.kill9().await?;
    sidecar.start().await?;
    sidecar.wait_status("it is parked still", MINUTE, waits).await?;
    ensure!(of_key(&service, "k3").await?.iter().all(|(number, _)| *number == 0), "a later record of the key was delivered");
    // The service is repaired, and the table parks no more.
    service.set(Scenario::new().on("/work", [Rule::echo()])).await?;
    sidecar.apply(&TABLE.replace(", on_exhausted: park", "")).await?;
    sidecar
        .wait_status("nothing waits", MINUTE, |status| {
            routes_of(status).all(|route| route.parked_records == 0 && route.waiting_keys == 0 && route.partitions == 2)
        })
        .await?;
    sidecar.wait_done(&["work"], MINUTE).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), 50).await?;
    let verdict = oracle.judge(&sightings(&found)?);
    verdict.at_most(50)?;
    let by_key: BTreeMap<String, usize> = found.iter().fold(BTreeMap::new(), |mut sum, found| {
        *sum.entry(found.key_text()).or_default() += 1;
        sum
    });
    ensure!(by_key.len() == 10, "{by_key:?}");
    sidecar.finish().await
}

/// With exactly-once: what is parked and released is stored once, too.
async fn released(stage: Stage) -> Result<()> {
    let poison = Condition { field_below: Some(("n".to_owned(), 1)), ..Condition::default() };
    let mut service = Service::native(Scenario::new().on("/work", [Rule::status(500).when(poison), Rule::echo()])).await?;
    let mut sidecar = stage.sidecar("sidecar").instance("work-0").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 2 }, %out: { partitions: 2 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out], guarantee: exactly_once,
                retry: { attempts: 2, initial: 20ms, topics: [100ms] }, on_exhausted: park }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    // The first of each of 3 keys is poison: all 3 keys are parked.
    let oracle = Load::new(stage.topic("in"), 12, 3).http(&sidecar).await?;
    let waits = |exhausted: u64, parked: u64| {
        move |status: &GetStatusResponse| {
            routes_of(status).next().is_some_and(|route| (route.exhausted_records, route.parked_records) == (exhausted, parked))
        }
    };
    sidecar.wait_status("the keys are parked", MINUTE, waits(3, 12)).await?;
    sidecar.kill9().await?;
    sidecar.start().await?;
    sidecar.wait_status("they are parked still", MINUTE, waits(3, 12)).await?;
    service.set(Scenario::new().on("/work", [Rule::echo()])).await?;
    let said = sidecar.ctl(&["release", "work", "--key", "k1"]).await?;
    ensure!(said.status == Some(0) && said.stdout.contains("1 record released"), "{said:?}");
    sidecar.wait_status("one key went on", MINUTE, waits(2, 8)).await?;
    let said = sidecar.ctl(&["release", "work", "--discard", "-o", "json"]).await?;
    ensure!(said.stdout.contains("\"released\": 2"), "{said:?}");
    sidecar.wait_status("nothing waits", MINUTE, waits(0, 0)).await?;
    sidecar.wait_done(&["work"], MINUTE).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), 10).await?;
    ensure!(found.len() == 10, "{} replies, and 2 dead letters", found.len());
    for key in ["k0", "k1", "k2"] {
        let seen = of_key(&service, key).await?;
        ensure!(seen.is_sorted_by_key(|(number, _)| *number), "{key}: {seen:?}");
    }
    // Of those that were not discarded each is found once.
    drop(oracle);
    sidecar.finish().await
}

/// The first record of each key waits in retry topics, and the others behind it, while sidecars join, die and come back.
async fn rebalanced(stage: Stage) -> Result<()> {
    let failing = Condition { field_below: Some(("n".to_owned(), 1)), attempt_below: Some(4), ..Condition::default() };
    let service = Service::native(Scenario::new().on("/work", [Rule::status(500).when(failing), Rule::echo()])).await?;
    let mut one = stage.sidecar("one").service("work", &service).start().await?;
    one.apply(
        "
        topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
        routes:
        - { name: work, service: work, from: [%in], handler: /work, to: [%out], breaker: { failures: 1000 },
            retry: { attempts: 2, initial: 20ms, topics: [3s, 4s] } }
        ",
    )
    .await?;
    one.wait_running(&["work"]).await?;
    let oracle = Load::new(stage.topic("in"), 400, 20).http(&one).await?;
    // Two attempts of the first record of each key: all of them wait now.
    service.wait(40, MINUTE).await?;
    // An embedded broker serves one process.
    let mut other = None;
    if stage.is_kafka() {
        let joined = stage.sidecar("other").service("work", &service).start().await?;
        joined.wait_running(&["work"]).await?;
        other = Some(joined);
    }
    one.kill9().await?;
    one.start().await?;
    if let Some(other) = &mut other {
        // While the group settles again, the second tiers fill.
        service.wait(60, MINUTE).await?;
        other.kill9().await?;
    }
    let settled = |status: &GetStatusResponse| {
        routes_of(status)
            .any(|route| route.partitions == 4 && route.waiting_keys == 0 && route.parked_records == 0 && route.next_retry_ms == 0)
    };
    one.wait_done(&["work"], 2 * MINUTE).await?;
    one.wait_status("nothing waits", 2 * MINUTE, settled).await?;
    one.wait_done(&["work"], 2 * MINUTE).await?;
    let found = stage.read(&one, None, &stage.topic("out"), 400).await?;
    oracle.judge(&sightings(&found)?).at_most(400)?;
    oracle.judge(&deliveries(&service.ledger().await?)?).at_most(1_000)?;
    for key in 0..20 {
        let key = format!("k{key}");
        let seen = of_key(&service, &key).await?;
        let firsts: Vec<u32> = seen.iter().filter(|(number, _)| *number == 0).map(|(_, attempt)| *attempt).collect();
        ensure!(firsts.contains(&4), "{key}: {firsts:?}");
        let beyond = firsts.iter().position(|attempt| *attempt > 2).unwrap_or_default();
        ensure!(firsts[beyond..].is_sorted(), "the attempts of {key} went back: {firsts:?}");
        // Of the others none is delivered before the first has had its last word.
        let last = seen.iter().position(|entry| *entry == (0, 4)).context("the last attempt")?;
        ensure!(seen[..last].iter().all(|(number, _)| *number == 0), "{key}: {seen:?}");
    }
    one.finish().await
}
