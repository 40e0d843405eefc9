//! Looking after sidecars that run: drained, found ill, watched.

use std::{
    pin::pin,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_proto::v1::{DiagnoseRequest, InstanceState, InstanceStatus, RouteState, Severity, TableOrigin, control_client::ControlClient};
use mesh_tests::{
    broker::Broker,
    on_both,
    python::{Python, python},
    service::{Rule, Scenario, Service},
    sidecar::{Sidecar, routes_of},
    stage::Stage,
};
use prost::Message as _;
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);
const ROUTE: &str = "
    topics: { %in: { partitions: 4 } }
    routes:
    - { name: work, service: work, from: [%in], handler: /work, to: void, concurrency: 4 }
    ";

async fn publish(sidecar: &Sidecar, topic: &str, count: usize) -> Result<()> {
    for number in 0..count {
        let key = format!("k{number}");
        sidecar.publish(topic, Some(&key), "application/json", json!({ "k": key, "n": 0 }).to_string()).await?;
    }
    Ok(())
}

on_both!(a_sidecar_drains_and_another_takes_over, drained);

async fn drained(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new().on("/work", [Rule::echo().after(Duration::from_millis(50))])).await?;
    let first = stage.sidecar("first").service("work", &service).start().await?;
    first.apply(ROUTE).await?;
    first.wait_running(&["work"]).await?;
    let unknown = first.ctl(&["drain", "nobody", "--execute"]).await?;
    ensure!(unknown.status == Some(2) && unknown.stderr.contains("there is no instance nobody"), "{unknown:?}");
    let mut expected = 0;
    let mut last = first;
    if stage.is_kafka() {
        let second = stage.sidecar("second").service("work", &service).start().await?;
        let both = |status: &mesh_proto::v1::GetStatusResponse| routes_of(status).filter(|route| route.partitions == 2).count() == 2;
        second.wait_status("both have partitions", MINUTE, both).await?;
        let (here, there) = (last.status().await?.instance, second.status().await?.instance);
        let preview = second.ctl(&["drain", &here, "-o", "json"]).await?.json()?;
        ensure!(preview["executed"] == false && preview["routes"][0]["others"] == json!([there]), "{preview}");
        expected = 80;
        publish(&second, &stage.topic("in"), expected).await?;
        // Another one, under load, by the mesh: what is at the service is finished, and nothing comes twice.
        let said = second.ctl(&["drain", &here, "--execute", "-o", "json"]).await?;
        ensure!(said.status == Some(0), "{said:?}");
        let said = said.json()?;
        ensure!(said["executed"] == true && said["ended"] == true && said["instance"] == json!(here), "{said}");
        ensure!(last.process()?.wait(MINUTE).await?.success());
        second.wait_done(&["work"], MINUTE).await?;
        ensure!(service.total().await? == expected as u64, "{} deliveries of {expected} records", service.total().await?);
        let gone = second.ctl(&["drain", &here]).await?;
        ensure!(gone.status == Some(2) && gone.stderr.contains("there is no instance"), "{gone:?}");
        last = second;
    }
    let preview = last.ctl(&["drain"]).await?;
    ensure!(
        preview.status == Some(0) && preview.stdout.contains("nobody") && preview.stderr.contains("no other instance runs work"),
        "{preview:?}"
    );
    publish(&last, &stage.topic("in"), 8).await?;
    service.wait(expected as u64 + 1, MINUTE).await?;
    let said = last.ctl(&["drain", "--execute"]).await?;
    ensure!(said.status == Some(0) && said.stdout.contains("has drained and ended"), "{said:?}");
    ensure!(last.process()?.wait(MINUTE).await?.success());
    let nobody = last.ctl(&["drain"]).await?;
    ensure!(nobody.status == Some(2) && nobody.stderr.contains("no sidecar answers"), "{nobody:?}");
    Ok(())
}

on_both!(the_doctor_names_what_is_wrong_with_its_fix, diagnosed);

/// The findings of a check that deserve something.
pub(crate) fn findings<'a>(said: &'a Value, check: &'a str) -> impl Iterator<Item = &'a Value> {
    said["findings"].as_array().into_iter().flatten().filter(move |finding| finding["check"] == check && finding["severity"] != "ok")
}

/// Expects a finding: its check and severity, and parts of its subject, of what it says, and of its fix.
pub(crate) fn has(said: &Value, [check, severity, subject, what, fix]: [&str; 5]) -> Result<()> {
    let found = findings(said, check).any(|finding| {
        let has = |field: &str, part: &str| finding[field].as_str().is_some_and(|text| text.contains(part));
        finding["severity"] == severity && has("subject", subject) && has("what", what) && has("fix", fix)
    });
    ensure!(found, "no {severity} {check} of {subject} with {what:?} and {fix:?}: {said:#}");
    Ok(())
}

async fn diagnosed(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new().on("/bad", [Rule::status(400)])).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).app("away", "http://127.0.0.1:9").start().await?;
    let before = sidecar.ctl(&["doctor", "-o", "json"]).await?;
    ensure!(before.status == Some(0), "{before:?}");
    ensure!(findings(&before.json()?, "table").count() == 1, "there is no table: {before:?}");

    sidecar.ctl(&["topics", "create", &stage.topic("few"), "--partitions", "1"]).await?.success()?;
    let spec = "
        topics: { %in: { partitions: 2 }, %few: { partitions: 3 } }
        routes:
        - { name: bad, service: work, from: [%in], handler: /bad, to: void }
        - { name: waits, service: away, from: [%in], handler: /x, to: void }
        - { name: paused, service: work, from: [%few], handler: /paused, to: void }
        - { name: unserved, service: nowhere, from: [%few], handler: /x, to: [%gone] }
        ";
    sidecar.apply(spec).await?;
    sidecar.ctl(&["pause", "paused", "--reason", "for a test", "--wait"]).await?.success()?;
    publish(&sidecar, &stage.topic("in"), 3).await?;
    service.wait(3, MINUTE).await?;
    sidecar.ctl(&["topics", "delete", &stage.topic("gone"), "--force", "--execute"]).await?.success()?;
    sidecar
        .wait_status("it waits, and what died is counted", MINUTE, |status| {
            let waits = routes_of(status).any(|route| route.route == "waits" && route.state() == RouteState::WaitingForService);
            waits && routes_of(status).any(|route| route.route == "bad" && route.dispositions.get("dead_lettered") == Some(&3))
        })
        .await?;
    let output = sidecar.ctl(&["doctor", "-o", "json"]).await?;
    ensure!(output.status == Some(1), "{output:?}");
    let said = output.json()?;
    let has = |check: &str, severity: &str, subject: &str, what: &str, fix: &str| has(&said, [check, severity, subject, what, fix]);
    has("routes", "error", "waits", "WAITING_FOR_SERVICE", "start service away")?;
    has("routes", "error", "unserved", "no live instance serves service nowhere", "name: nowhere")?;
    has("routes", "warning", "paused", "for a test", "mesh-ctl resume paused")?;
    has("topics", "error", &stage.topic("gone"), "do not exist", "mesh-ctl topics create")?;
    has("topics", "warning", &stage.topic("few"), "has 1 partitions, and 3 are due", "--partitions 3")?;
    has("dead-letters", "warning", "bad", "3 dead letters", "dlq redrive bad")?;
    for check in ["brokers", "clocks", "own-topics", "instances", "authorization"] {
        ensure!(findings(&said, check).count() == 0, "{check} is well: {said:#}");
    }
    let told = |check: &str| said["findings"].as_array().into_iter().flatten().any(|finding| finding["check"] == check);
    ensure!(told("authorization") == stage.is_kafka(), "the embedded broker refuses nothing: {said:#}");
    let text = sidecar.ctl(&["doctor"]).await?;
    ensure!(
        text.status == Some(1) && text.stdout.contains("ERROR    routes") && text.stdout.contains("fix: start service away"),
        "{text:?}"
    );

    // A broker that is away is a finding, and nothing hangs.
    if stage.is_kafka() {
        let mut lonely = stage.sidecar("lonely").broker(json!({ "kafka": { "bootstrap.servers": "127.0.0.1:9" } })).prepare().await?;
        lonely.spawn()?;
        lonely.wait_probe("/livez", 200, MINUTE).await?;
        let output = lonely.ctl(&["doctor", "-o", "json"]).await?;
        let said = output.json()?;
        ensure!(output.status == Some(1) && findings(&said, "brokers").any(|finding| finding["severity"] == "error"), "{output:?}");
        lonely.kill9().await?;
    }
    sidecar.finish().await
}

/// What another instance reports that runs another table, by another clock: told with what mends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_names_drift_and_clocks_that_are_apart() -> Result<()> {
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let service = Service::native(Scenario::light()).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        sidecar.apply(ROUTE).await?;
        sidecar.wait_running(&["work"]).await?;
        // No instance drifts by itself: this is what one would report whose control topic was made anew.
        let now = || anyhow::Ok(i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_millis())?);
        let report = InstanceStatus {
            instance: "drifter".into(),
            generation: 7,
            digest: "sha256:7".into(),
            origin: TableOrigin::Mesh.into(),
            version: "0.0.1".into(),
            reported_ms: now()? - 60_000,
            ..InstanceStatus::default()
        };
        let value = zstd::bulk::compress(&report.encode_to_vec(), 3)?;
        stage.append("__mesh.status", &format!("{}/drifter", stage.mesh()), value).await?;
        sidecar.wait_status("it is heard", MINUTE, |status| status.instances.iter().any(|one| one.state() == InstanceState::Drift)).await?;
        let output = sidecar.ctl(&["doctor", "-o", "json"]).await?.ends(1)?;
        let said = output.json()?;
        has(&said, ["instances", "error", "drifter", "it runs another table under generation 7", "apply the table again"])?;
        has(&said, ["clocks", "warning", "drifter", "s behind this sidecar's", "synchronise the clocks"])?;
        has(&said, ["instances", "warning", "", "different versions: 0.0.1 (drifter)", "end the update"])?;
        ensure!(sidecar.ctl(&["status"]).await?.success()?.contains("DRIFT"));

        // The clock of whoever asks, too; that of mesh-ctl here is this machine's.
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", sidecar.admin_address()))?;
        let mut control = ControlClient::new(endpoint.connect().await?);
        let findings = control.diagnose(DiagnoseRequest { now_ms: now()? + 60_000 }).await?.into_inner().findings;
        let ahead = findings.iter().find(|finding| finding.check == "clocks" && finding.subject == "mesh-ctl").context("a finding")?;
        ensure!(ahead.what.contains("s ahead of this sidecar's") && ahead.severity() == Severity::Warning, "{ahead:?}");
        sidecar.finish().await
    })
    .await
}

/// One of three brokers is killed: nothing hangs, and the doctor says which it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_names_the_broker_of_a_cluster_that_is_away() -> Result<()> {
    let Some(cluster) = mesh_tests::kafka::cluster(3).await else { return Ok(()) };
    Stage::run(Broker::Kafka(cluster.bootstrap()), async |stage| {
        let service = Service::native(Scenario::light()).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        sidecar.apply(&ROUTE.replace("partitions: 4", "partitions: 3, replication: 3")).await?;
        sidecar.wait_running(&["work"]).await?;
        cluster.wait_in_sync(MINUTE).await?;
        let sick =
            async || anyhow::Ok(findings(&sidecar.ctl(&["doctor", "-o", "json"]).await?.json()?, "topics").cloned().collect::<Vec<_>>());
        let well = sick().await?;
        ensure!(well.iter().all(|finding| !finding["what"].as_str().unwrap_or_default().contains("not in sync")), "{well:#?}");

        cluster.stop(1, true).await?;
        let end = tokio::time::Instant::now() + MINUTE;
        let topic = stage.topic("in");
        let found = loop {
            // The other brokers notice when its session ends; nothing tells from outside.
            let found = sick().await?;
            let names = |finding: &Value| {
                let text = |field: &str| finding[field].as_str().unwrap_or_default();
                text("subject").contains(&topic) && text("what").contains("not in sync, on broker ")
            };
            if let Some(finding) = found.iter().find(|finding| names(finding)) {
                break finding.clone();
            }
            ensure!(tokio::time::Instant::now() < end, "the broker is not missed: {found:#?}");
        };
        ensure!(found["severity"] == "warning" && found["fix"].as_str().is_some_and(|fix| fix.contains("bring it back")), "{found:#}");
        publish(&sidecar, &topic, 5).await?;
        service.wait(5, MINUTE).await?;
        sidecar.finish().await
    })
    .await
}

on_both!(rates_stand_at_the_edges_and_in_top, rates);

/// Publishes for as long as other work takes.
async fn under_load<T>(sidecar: &Sidecar, topic: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut work = pin!(work);
    for number in 0_u64.. {
        let key = format!("k{}", number % 40);
        let publishing = sidecar.publish(topic, Some(&key), "application/json", "{}");
        tokio::select! {
            done = &mut work => return done,
            stored = publishing => drop(stored?),
        }
    }
    bail!("the numbers are used up")
}

fn route<'a>(said: &'a Value, name: &str) -> Result<&'a Value> {
    let found = said["routes"].as_array().into_iter().flatten().find(|route| route["route"] == name);
    found.with_context(|| format!("no route {name}: {said:#}"))
}

async fn rates(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::light()).await?;
    let mut sidecars = vec![stage.sidecar("first").service("work", &service).start().await?];
    if stage.is_kafka() {
        sidecars.push(stage.sidecar("second").service("work", &service).start().await?);
        // Asked is one that runs no route: what the others do it hears of.
        sidecars.push(stage.sidecar("asked").start().await?);
    }
    let asked = sidecars.pop().context("a sidecar")?;
    asked
        .apply("{ topics: { %in: { partitions: 4 } }, routes: [{ name: work, service: work, from: [%in], handler: /work, to: [%out] }] }")
        .await?;
    asked.wait_running(&["work"]).await?;
    let topic = stage.topic("in");

    let live = ["graph", "--live", "--interval", "3s"];
    let output = under_load(&asked, &topic, asked.ctl(&[&live[..], &["-o", "json"]].concat())).await?;
    let said = output.json()?;
    let work = route(&said, "work")?;
    ensure!(work["rates"]["forwarded"].as_f64().is_some_and(|rate| rate > 1.0), "{said:#}");
    ensure!(
        work["rate"] == work["rates"]["forwarded"] && work["from"] == json!([topic]) && work["to"] == json!([stage.topic("out")]),
        "{said:#}"
    );
    let drawn = asked.ctl(&["graph", "--live", "--interval", "500ms"]).await?.success()?;
    ensure!(drawn.contains(&format!("to   {}  [", stage.topic("out"))), "all instances have reported: {drawn}");

    // One that is started again in between counts from its start: no rate is negative.
    let mut first = if stage.is_kafka() { Some(sidecars.remove(0)) } else { None };
    let looking = asked.ctl(&["top", "-n", "4", "--interval", "1s", "-o", "json"]);
    let again = async {
        if let Some(first) = &mut first {
            first.kill9().await?;
            first.start().await?;
        }
        anyhow::Ok(())
    };
    let output = under_load(&asked, &topic, async {
        let (looked, restarted) = tokio::join!(looking, again);
        restarted?;
        looked
    });
    let output = output.await?;
    let looks: Vec<Value> =
        output.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>().with_context(|| format!("{output:?}"))?;
    ensure!(output.status == Some(0) && looks.len() == 4, "{output:?}");
    let mut busy = 0;
    for look in &looks {
        let work = route(look, "work")?;
        let rate = work["rate"].as_f64();
        ensure!(rate.is_none_or(|rate| rate >= 0.0), "{look:#}");
        ensure!(work["rates"].as_object().into_iter().flatten().all(|(_, rate)| rate.as_f64().is_some_and(|rate| rate >= 0.0)), "{look:#}");
        busy += usize::from(rate.is_some_and(|rate| rate > 1.0));
    }
    ensure!(busy > 0, "nothing flowed: {looks:#?}");
    let table = asked.ctl(&["top", "--once", "--interval", "500ms"]).await?.success()?;
    ensure!(table.contains("ROUTE") && table.contains("work") && table.contains("INSTANCE") && !table.contains('\x1b'), "{table}");
    Ok(())
}

/// What `mesh-ctl` does on a terminal, as `terminal.py` tells; `flags` are its flags.
async fn on_a_terminal(python: &Python, sidecar: &Sidecar, flags: &[&str], command: &[&str]) -> Result<Value> {
    let program = mesh_tests::sidecar::binaries().await?.join("mesh-ctl");
    let admin = format!("http://{}", sidecar.admin_address());
    let arguments = [flags, &["--", program.to_str().context("a path")?, "--admin", &admin], command].concat();
    Ok(serde_json::from_str(&python.run("terminal.py", &arguments, Vec::new(), MINUTE).await?.success()?)?)
}

on_both!(top_gives_the_terminal_back, full_screen);

/// The full screen: keys are obeyed, nothing is wider or higher than the terminal, and the terminal is given back as it was.
async fn full_screen(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let service = Service::native(Scenario::light()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(ROUTE).await?;
    sidecar.wait_running(&["work"]).await?;
    for (end, columns, lines) in [("q", "80", "24"), ("SIGTERM", "20", "6")] {
        let flags = ["--columns", columns, "--lines", lines, "--keys", "sjp", "--end", end];
        let said = on_a_terminal(&python, &sidecar, &flags, &["top", "--interval", "500ms"]).await?;
        ensure!(said["status"] == 0 && said["restored"] == true && said["left"] == true, "{end:?}: {said:#}");
        let rows: Vec<&str> = said["screen"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let (columns, lines): (usize, usize) = (columns.parse()?, lines.parse()?);
        ensure!(rows.len() <= lines && rows.iter().all(|row| row.chars().count() <= columns), "{said:#}");
        ensure!(rows.iter().any(|row| row.starts_with("work")), "{said:#}");
        // `s` sorts by what comes next, and `p` holds it.
        ensure!(columns < 80 || rows.last().is_some_and(|foot| foot.contains("s sort (name)") && foot.ends_with("held")), "{said:#}");
    }
    sidecar.finish().await
}

on_both!(a_terminal_shows_colours_unless_they_are_not_wanted, coloured);

/// Colours are there on a terminal, unless they are not wanted; a look takes the place of the last one all the same.
async fn coloured(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let service = Service::native(Scenario::light()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(ROUTE).await?;
    sidecar.wait_running(&["work"]).await?;
    for (flags, colours) in [(&["--whole", "--colours"][..], true), (&["--whole"], false)] {
        let said = on_a_terminal(&python, &sidecar, flags, &["status", "--watch", "500ms", "--count", "2"]).await?;
        let output = said["output"].as_str().context("its output")?;
        ensure!(said["status"] == 0 && output.matches("\x1b[H\x1b[2J").count() == 2, "{said:#}");
        ensure!(output.contains("\x1b[1mROUTE\x1b[0m") == colours && output.contains("\x1b[32mRUNNING\x1b[0m") == colours, "{said:#}");
        ensure!(output.replace("\x1b[H\x1b[2J", "").contains('\x1b') == colours, "{said:#}");
    }
    sidecar.finish().await
}

on_both!(routes_are_drawn_and_instances_watched, drawn);

async fn drawn(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::light()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 2 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out], cases: [{ status: 202, to: void }] }
            - { name: next, service: work, from: [%out], handler: /next, to: void, filter: 'record.json.n > 1' }
            ",
        )
        .await?;
    sidecar.wait_running(&["work", "next"]).await?;
    let mesh = stage.mesh();
    let draw = async |format: &str| -> Result<String> {
        // Mesh and topics have names that were drawn.
        let drawn = sidecar.ctl(&["graph", "--format", format]).await?.success()?;
        Ok(drawn.replace(&format!("{mesh}."), "").replace(mesh, "MESH"))
    };
    let text = "\
mesh MESH

work (work)
  from in
  to   out
  to   void  [202]
  dead dlq

next (work)
  from out
  if   record.json.n > 1
  to   void
  dead dlq
";
    let mermaid = r#"flowchart LR
  t0[("dlq")]
  t1[("in")]
  t2[("out")]
  t3[("void")]
  r0["work (work)"]
  t1 --> r0
  r0 --> t2
  r0 -->|"202"| t3
  r0 -.-> t0
  r1["next (work)"]
  t2 --> r1
  r1 --> t3
  r1 -.-> t0
"#;
    let dot = r#"digraph "MESH" {
  rankdir=LR;
  "route work" [shape=box, label="work\nwork"];
  "in" -> "route work";
  "route work" -> "out";
  "route work" -> "void" [label="202"];
  "route work" -> "dlq" [style=dashed];
  "route next" [shape=box, label="next\nwork"];
  "out" -> "route next";
  "route next" -> "void";
  "route next" -> "dlq" [style=dashed];
}
"#;
    for (format, expected) in [("text", text), ("mermaid", mermaid), ("dot", dot)] {
        let drawn = draw(format).await?;
        ensure!(drawn == expected, "{format}:\n{drawn}");
    }

    // Looked at twice: each look is a line, of a later moment.
    let output = sidecar.ctl(&["status", "--watch", "1s", "--count", "2", "-o", "json"]).await?.success()?;
    let looks: Vec<Value> = output.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(looks.len() == 2, "{output}");
    for look in &looks {
        let instance = &look["instances"][0];
        ensure!(look["mesh"] == json!(mesh) && look["generation"] == 1 && look["unserved"] == json!([]), "{look:#}");
        ensure!(instance["state"] == "SYNCED" && instance["routes"].as_array().map(Vec::len) == Some(2), "{look:#}");
    }
    let reported = |look: &Value| look["instances"][0]["reported"].as_str().map(str::to_owned);
    ensure!(reported(&looks[0]) < reported(&looks[1]), "{looks:#?}");
    sidecar.finish().await
}
