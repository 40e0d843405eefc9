//! What routes would do, and did: `mesh-ctl plan`, `explain` and `trace`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::{
    on_both,
    service::{Condition, Rule, Scenario, Service},
    sidecar::{Sidecar, disposition},
    stage::Stage,
};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn with(field: &str, value: impl Into<Value>) -> Condition {
    Condition { field_equals: Some((field.into(), value.into())), ..Condition::default() }
}

/// The member of a list whose field is this.
fn of<'v>(list: &'v Value, field: &str, value: &str) -> Result<&'v Value> {
    list.as_array().into_iter().flatten().find(|one| one[field] == value).with_context(|| format!("no {field} {value} in {list:#}"))
}

/// What the group of `price` has committed, once it is all of so many records: a commit comes a moment after the disposition.
async fn committed(sidecar: &Sidecar, records: i64) -> Result<Value> {
    let end = Instant::now() + MINUTE;
    loop {
        let said = sidecar.ctl(&["reset", "price", "--to-earliest", "-o", "json"]).await?.json()?;
        let sum: i64 = said["partitions"].as_array().into_iter().flatten().filter_map(|partition| partition["from"].as_i64()).sum();
        if sum == records {
            return Ok(said);
        }
        ensure!(Instant::now() < end, "{records} records are not committed: {said:#}");
    }
}

on_both!(a_table_is_planned_on_the_records_that_are_there, plan);

async fn plan(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new().on("/price", [Rule::status(400).when(with("bad", 0)), Rule::echo()])).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    let table = "
        defaults: { dead_letter: %dlq }
        topics: { %orders: { partitions: 2 }, %priced: { partitions: 2 }, %big: { partitions: 2 } }
        routes:
        - { name: price, service: work, from: [%orders], handler: /price, to: [%priced] }
        - { name: audit, service: work, from: [%orders], handler: /audit, to: void }
        ";
    sidecar.apply(table).await?;
    sidecar.wait_running(&["price", "audit"]).await?;
    for number in 0..40 {
        let body = json!({ "n": number, "bad": number % 4 }).to_string();
        sidecar.publish(&stage.topic("orders"), Some(&format!("k{}", number % 20)), "application/json", body).await?;
    }
    sidecar
        .wait_status("all are done", MINUTE, |status| {
            disposition(status, "price", "forwarded") == 30
                && disposition(status, "price", "dead_lettered") == 10
                && disposition(status, "audit", "void") == 40
        })
        .await?;
    let (calls, committed) = (service.total().await?, committed(&sidecar, 40).await?);
    let file = |name: &str, spec: &str| anyhow::Ok(stage.file(name, &stage.table(spec))?.to_string_lossy().into_owned());

    let same = sidecar.ctl(&["plan", "-f", &file("same.yaml", table)?, "--last", "10m", "-o", "json"]).await?;
    ensure!(same.status == Some(0) && same.json()?["changes"] == false, "{same:?}");
    ensure!(of(&same.json()?["routes"], "route", "price")?["after"]["read"] == 40, "{same:?}");

    let other = file(
        "other.yaml",
        "
        defaults: { dead_letter: %dlq }
        topics: { %orders: { partitions: 2 }, %priced: { partitions: 2 }, %big: { partitions: 2 } }
        routes:
        - { name: price, service: work, from: [%orders], handler: /price, to: [%priced], filter: 'record.json.n < 20',
            cases: [{ when: 'reply.json.n > 10', to: [%big] }] }
        - { name: more, service: work, from: [%orders], handler: /more, to: [%priced], filter: 'record.json.absent == 1' }
        ",
    )?;
    let planned = sidecar.ctl(&["plan", "-f", &other, "--last", "10m", "-o", "json"]).await?;
    ensure!(planned.status == Some(1), "{planned:?}");
    let said = planned.json()?;
    let price = of(&said["routes"], "route", "price")?;
    ensure!(price["change"] == "changed" && price["after"]["read"] == 40 && price["after"]["filtered"] == 20, "{price:#}");
    // 11 to 19 but for the three that have no reply go elsewhere, as their stored replies tell: 11, 13, 14, 15, 17, 18, 19.
    ensure!(price["changed_by"] == json!({ "newly_filtered": 20, "other_destination": 7 }), "{price:#}");
    ensure!(price["undecided"] == 5 && price["by_stored_reply"] == 15, "{price:#}");
    let (priced, big) = (stage.topic("priced"), stage.topic("big"));
    ensure!(price["before"]["destinations"] == json!({ &priced: 40 }), "{price:#}");
    let choice = format!("by reply: {big} | {priced}");
    ensure!(price["after"]["destinations"] == json!({ &priced: 8, &big: 7, choice: 5 }), "{price:#}");
    ensure!(price["samples"].as_array().is_some_and(|samples| samples.len() == 5), "{price:#}");
    let more = of(&said["routes"], "route", "more")?;
    ensure!(more["change"] == "added" && more["after"]["dead_letters"] == json!({ "expression": 40 }), "{more:#}");
    ensure!(more["changed_by"] == json!({ "newly_dead_lettered": 40 }), "{more:#}");
    ensure!(more["samples"][0]["after"].as_str().is_some_and(|after| after.contains("there is no such field")), "{more:#}");
    let audit = of(&said["routes"], "route", "audit")?;
    ensure!(audit["change"] == "removed" && audit["changed_by"] == json!({ "no_longer_delivered": 40 }), "{audit:#}");
    let text = sidecar.ctl(&["plan", "-f", &other, "--samples", "1"]).await?;
    ensure!(text.status == Some(1) && text.stdout.contains("20 newly filtered") && text.stdout.contains("40 → 20"), "{text:?}");

    // By number, by route, by a time that is to come.
    let said = sidecar.ctl(&["plan", "-f", &other, "--records", "3", "--route", "more", "-o", "json"]).await?.json()?;
    ensure!(said["routes"].as_array().is_some_and(|routes| routes.len() == 1), "{said:#}");
    ensure!(of(&said["routes"], "route", "more")?["after"]["read"] == 6, "{said:#}");
    let none = sidecar.ctl(&["plan", "-f", &other, "--from", "2199-01-01", "--route", "price", "-o", "json"]).await?;
    ensure!(none.status == Some(0) && none.json()?["routes"][0]["after"]["read"] == 0, "{none:?}");
    let schema = table.replace("%orders: { partitions: 2 }", "%orders: { partitions: 2, schema: { json: { required: [total] } } }");
    let said = sidecar.ctl(&["plan", "-f", &file("schema.yaml", &schema)?, "-o", "json"]).await?;
    ensure!(said.status == Some(1) && said.json()?["schemas"][0]["mismatched"] == 40, "{said:?}");

    for (name, text, code, words) in [
        ("bad.yaml", stage.table("routes: [{ name: price, service: work, from: [%orders], hendler: /x, to: void }]"), 1, "unknown_field"),
        ("foreign.yaml", stage.table(table).replace(stage.mesh(), "elsewhere"), 1, "metadata.mesh"),
    ] {
        let path = stage.file(name, &text)?;
        let output = sidecar.ctl(&["plan", "-f", path.to_str().context("a path")?]).await?;
        ensure!(output.status == Some(code) && output.stderr.contains(words), "{output:?}");
    }
    let nobody = sidecar.ctl(&["plan", "-f", &other, "--route", "nobody"]).await?;
    ensure!(nobody.status == Some(2) && nobody.stderr.contains("neither table has a route nobody"), "{nobody:?}");

    // Nothing was delivered, committed or written.
    ensure!(service.total().await? == calls, "a plan called the service");
    let after = self::committed(&sidecar, 40).await?;
    ensure!(after == committed, "{after:#}\n{committed:#}");
    ensure!(sidecar.ctl(&["get", "-o", "json"]).await?.json()?.to_string().contains("audit"), "the table in force is another one");
    sidecar.finish().await
}

on_both!(a_record_is_explained_and_its_flow_is_followed, explain);

/// Asks until a route has had its end: a commit comes a moment after the disposition.
async fn explained(sidecar: &Sidecar, place: &str, route: &str, wanted: &str) -> Result<Value> {
    let end = Instant::now() + MINUTE;
    loop {
        let output = sidecar.ctl(&["explain", place, "-o", "json"]).await?;
        ensure!(output.status == Some(0), "{output:?}");
        let said = output.json()?;
        if of(&said["record"]["routes"], "route", route)?["disposition"] == wanted {
            return Ok(said);
        }
        if Instant::now() > end {
            bail!("{route} is not {wanted}: {said:#}");
        }
    }
}

fn place(record: &Value) -> String {
    format!("{}/{}/{}", record["topic"].as_str().unwrap_or_default(), record["partition"], record["offset"])
}

on_both!(a_record_under_way_is_explained_by_the_owner_of_its_partition, under_way);

async fn under_way(stage: Stage) -> Result<()> {
    let slow = [Rule::status(500).text("not yet").when(with("n", 1)), Rule::echo().after(MINUTE)];
    let service = Service::native(Scenario::new().on("/work", slow)).await?;
    let mut sidecar = stage.sidecar("owner").service("work", &service).start().await?;
    // Who is asked runs none of it, where a mesh can have two.
    let other = match stage.is_kafka() {
        true => Some(stage.sidecar("asked").service("other", &service).start().await?),
        false => None,
    };
    let asked = other.as_ref().unwrap_or(&sidecar);
    let instances = 1 + usize::from(other.is_some());
    let table = "
        topics: { %in: { partitions: 2 } }
        routes:
        - { name: work, service: work, from: [%in], handler: /work, to: [%out], timeout: 5m, retry: { attempts: 9, initial: 10m, max: 10m } }
        ";
    asked.apply(table).await?;
    asked
        .wait_status("it runs", MINUTE, |status| {
            status.instances.len() == instances && status.instances.iter().flat_map(|one| &one.routes).any(|route| route.partitions == 2)
        })
        .await?;
    let publish = async |number: i64| -> Result<String> {
        let path = format!("/v1/topics/{}/records", stage.topic("in"));
        let headers = [("content-type", "application/json"), ("mesh-key", if number == 1 { "failing" } else { "slow" })];
        Ok(place(&sidecar.http().post(&path, &headers, json!({ "n": number }).to_string()).await?.expect(200)?.json()?))
    };
    let (failing, slow, behind) = (publish(1).await?, publish(2).await?, publish(3).await?);
    service.wait(2, MINUTE).await?;
    for (place, disposition, attempts, words) in [
        (&failing, "retrying", 1, "the service answered 500: not yet"),
        (&slow, "at_service", 1, "it has been at the service for "),
        (&behind, "waiting", 0, "it waits for its turn"),
    ] {
        let said = explained(asked, place, "work", disposition).await?;
        let route = of(&said["record"]["routes"], "route", "work")?;
        let note = route["note"].as_str().unwrap_or_default();
        let instance = route["instance"].as_str().context("who says so")?;
        ensure!(note.contains(words) && note.starts_with(&format!("at instance {instance}: ")), "{route:#}");
        ensure!(route["attempts"] == attempts, "{route:#}");
    }
    let text = asked.ctl(&["explain", &failing]).await?.success()?;
    ensure!(text.contains("retrying") && text.contains("its next attempt is due in"), "{text}");
    if let Some(other) = other {
        other.finish().await?;
    }
    // It would wait for the service.
    sidecar.kill9().await
}

async fn explain(stage: Stage) -> Result<()> {
    let rules = [Rule::status(400).text("no such price").when(with("n", 0)), Rule::echo()];
    let store = [Rule::status(500).when(with("n", 7)), Rule::echo()];
    let mut service = Service::native(Scenario::new().on("/price", rules).on("/store", store.clone())).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            defaults: { dead_letter: %dlq }
            topics: { %orders: { partitions: 2 }, %priced: { partitions: 2 }, %stored: { partitions: 2 } }
            routes:
            - { name: price, service: work, from: [%orders], handler: /price, to: [%priced] }
            - { name: audit, service: work, from: [%orders], handler: /audit, to: void }
            - { name: seven, service: work, from: [%orders], handler: /seven, to: [%stored], filter: 'record.json.n == 70' }
            - { name: store, service: work, from: [%priced], handler: /store, to: [%stored], retry: { attempts: 1, topics: [1h] } }
            ",
        )
        .await?;
    sidecar.wait_running(&["price", "audit", "seven", "store"]).await?;
    let publish = async |number: i64, headers: &[(&str, &str)]| -> Result<String> {
        let path = format!("/v1/topics/{}/records", stage.topic("orders"));
        // Each has a key of its own: one that waits keeps the later records of its key.
        let key = format!("k{number}");
        let headers = [&[("content-type", "application/json"), ("mesh-key", &*key)], headers].concat();
        let answer = sidecar.http().post(&path, &headers, json!({ "n": number }).to_string()).await?.expect(200)?.json()?;
        Ok(place(&answer))
    };
    let traceparent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let good = publish(1, &[("traceparent", &traceparent), ("mesh-id", "the-good-one")]).await?;
    let bad = publish(0, &[("mesh-id", "the-bad-one")]).await?;
    let seven = publish(7, &[("mesh-id", "the-seventh")]).await?;

    // Forwarded, void, filtered.
    let said = explained(&sidecar, &good, "price", "forwarded").await?;
    let (orders, priced, stored) = (stage.topic("orders"), stage.topic("priced"), stage.topic("stored"));
    ensure!(said["record"]["trace_id"] == TRACE && said["record"]["mesh_id"] == "the-good-one", "{said:#}");
    ensure!(said["value"] == r#"{"n":1}"# && said["record"]["kind"] == "published", "{said:#}");
    let reply = of(&said["record"]["made"], "kind", "reply")?;
    ensure!(reply["topic"] == json!(priced) && reply["route"] == "price" && reply["hops"] == 1 && reply["index"] == 0, "{reply:#}");
    let reply = place(reply);
    let said = explained(&sidecar, &good, "audit", "void").await?;
    ensure!(of(&said["record"]["routes"], "route", "audit")?["progress"] == "done", "{said:#}");
    let said = explained(&sidecar, &good, "seven", "filtered").await?;
    let filter = of(&said["record"]["routes"], "route", "seven")?;
    ensure!(
        filter["detail"].as_str().is_some_and(|detail| detail.contains("record.json.n == 70") && detail.ends_with("is false")),
        "{filter:#}"
    );
    let said = explained(&sidecar, &reply, "store", "forwarded").await?;
    ensure!(said["record"]["source"] == json!(good) && said["record"]["made"][0]["topic"] == json!(stored), "{said:#}");
    let text = sidecar.ctl(&["explain", &good]).await?.success()?;
    ensure!(text.contains("route price") && text.contains("forwarded") && text.contains(&reply), "{text}");

    // Dead-lettered.
    let said = explained(&sidecar, &bad, "price", "dead_lettered").await?;
    let letter = of(&said["record"]["made"], "kind", "dead_letter")?;
    ensure!(letter["topic"] == json!(stage.topic("dlq")) && letter["reason"] == "status", "{letter:#}");
    ensure!(letter["detail"].as_str().is_some_and(|detail| detail.contains("no such price")), "{letter:#}");
    let letter = place(letter);

    // Waiting in a retry topic.
    let of_seven = explained(&sidecar, &seven, "price", "forwarded").await?;
    let waiting = place(of(&of_seven["record"]["made"], "kind", "reply")?);
    let said = explained(&sidecar, &waiting, "store", "retrying").await?;
    let copy = of(&said["record"]["made"], "kind", "retry")?;
    ensure!(copy["topic"] == json!(format!("store.{priced}.retry-1")) && copy["attempts"] == 1 && copy["progress"] != "done", "{copy:#}");
    ensure!(copy["due"].is_string(), "{copy:#}");

    // The flow, by its trace and by the id of any of its records.
    let reply_id = said["record"]["mesh_id"].as_str().context("an id")?.to_owned();
    let flow = async |id: &str| -> Result<Value> {
        let output = sidecar.ctl(&["trace", id, "-o", "json"]).await?;
        ensure!(output.status == Some(0), "{output:?}");
        output.json()
    };
    for id in [TRACE, "the-good-one"] {
        let said = flow(id).await?;
        let root = &said["flow"][0];
        ensure!(said["records"] == 3 && place(root) == good && root["trace_id"] == TRACE, "{id}: {said:#}");
        ensure!(place(&root["made"][0]) == reply && root["made"][0]["route"] == "price", "{id}: {said:#}");
        ensure!(root["made"][0]["made"][0]["topic"] == json!(stored) && root["made"][0]["made"][0]["hops"] == 2, "{id}: {said:#}");
    }
    let said = flow(&reply_id).await?;
    ensure!(said["records"] == 3 && place(&said["flow"][0]) == seven, "{said:#}");
    ensure!(said["flow"][0]["made"][0]["made"][0]["kind"] == "retry", "{said:#}");
    let text = sidecar.ctl(&["trace", &reply_id]).await?.success()?;
    ensure!(text.starts_with(&seven) && text.contains("└─ ") && text.contains("retry of store"), "{text}");

    // A letter that is sent back, and passed over by the others.
    service.set(Scenario::new().on("/store", store)).await?;
    sidecar.ctl(&["dlq", "redrive", "price", "--execute"]).await?.success()?;
    sidecar.wait_status("it is forwarded", MINUTE, |status| disposition(status, "price", "forwarded") == 3).await?;
    sidecar.wait_status("and on", MINUTE, |status| disposition(status, "store", "forwarded") == 2).await?;
    let said = flow("the-bad-one").await?;
    let root = &said["flow"][0];
    ensure!(place(root) == bad && place(&root["made"][0]) == letter && root["made"][0]["kind"] == "dead_letter", "{said:#}");
    let copy = &root["made"][0]["made"][0];
    ensure!(copy["kind"] == "redriven" && copy["topic"] == json!(orders) && copy["made"][0]["topic"] == json!(priced), "{said:#}");
    let said = explained(&sidecar, &place(copy), "audit", "other_route").await?;
    ensure!(of(&said["record"]["routes"], "route", "audit")?["detail"] == "mesh-only-route is price", "{said:#}");
    let said = sidecar.ctl(&["explain", &letter, "-o", "json"]).await?.json()?;
    ensure!(said["record"]["source"] == json!(bad) && said["record"]["routes"] == json!([]), "{said:#}");
    ensure!(said["record"]["made"][0]["kind"] == "redriven", "{said:#}");

    for (arguments, code, words) in [
        (&["explain", "nope/0/0"][..], 2, "there is no topic nope"),
        (&["explain", &format!("{orders}/9/0")], 2, "partitions 0 to 1"),
        (&["explain", &format!("{orders}/0/99999")], 2, "there is no record"),
        (&["explain", "orders"], 2, "TOPIC/PARTITION/OFFSET"),
        (&["trace", "nobody"], 1, "no such record"),
        (&["trace", "the-good-one", "--from", "2199-01-01"], 1, "no such record"),
    ] {
        let output = sidecar.ctl(arguments).await?;
        ensure!(output.status == Some(code) && output.stderr.contains(words), "{arguments:?}: {output:?}");
    }
    sidecar.finish().await
}
