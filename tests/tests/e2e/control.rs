//! The control plane: tables that are applied, refused, swapped and kept, through `mesh-ctl` alone.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::{GetStatusResponse, InstanceState, RouteState, RouteStatus};
use mesh_tests::{
    broker::Broker,
    load::Load,
    on_both,
    oracle::{deliveries, sightings},
    service::{Rule, Scenario, Service},
    sidecar::disposition,
    stage::Stage,
};
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);

fn table(to: &str) -> String {
    format!(
        "
        topics: {{ %in: {{ partitions: 4 }}, %out: {{ partitions: 4 }} }}
        routes:
        - {{ name: work, service: work, from: [%in], handler: /work, to: [{to}] }}
        "
    )
}

fn synced(status: &GetStatusResponse, instances: usize, generation: u64) -> bool {
    let at = status.instances.iter().filter(|one| one.state() == InstanceState::Synced && one.generation == generation);
    status.generation == generation && at.count() == instances
}

on_both!(a_pause_holds_over_restarts_and_new_tables_until_the_route_is_resumed, pause_and_resume);

async fn pause_and_resume(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let mut sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(&table("%out")).await?;
    sidecar.wait_running(&["work"]).await?;
    let said = sidecar.ctl(&["pause", "work", "--reason", "a migration", "--wait"]).await?.success()?;
    ensure!(said == "route work is paused\n", "{said}");
    let again = sidecar.ctl(&["pause", "work", "--wait", "-o", "json"]).await?.success()?;
    let again: Value = serde_json::from_str(&again)?;
    ensure!(again == json!({ "route": "work", "paused": true, "changed": false, "delivering": [] }), "{again}");
    let unknown = sidecar.ctl(&["pause", "wrok"]).await?;
    ensure!(
        unknown.status == Some(2) && unknown.stderr.contains("there is no route wrok") && unknown.stderr.contains("work"),
        "{unknown:?}"
    );

    sidecar.publish(&stage.topic("in"), Some("k"), "application/json", "{}").await?;
    sidecar.kill9().await?;
    sidecar.start().await?;
    sidecar.apply(&table("%out, %copy")).await?;
    let paused = |status: &GetStatusResponse| {
        mesh_tests::sidecar::routes_of(status)
            .any(|route| route.state() == RouteState::Paused && route.partitions > 0 && route.lag_records == 1)
    };
    let status = sidecar.wait_status("paused, with a record that waits", MINUTE, paused).await?;
    let reason = mesh_tests::sidecar::routes_of(&status).map(|route| route.reason.clone()).collect::<Vec<_>>().join(" ");
    ensure!(reason.contains("paused") && reason.contains("`mesh-ctl resume work`"), "{reason}");
    ensure!(service.total().await? == 0, "a paused route delivers");
    ensure!(sidecar.ctl(&["resume", "work"]).await?.success()? == "route work goes on\n");
    sidecar.wait_done(&["work"], MINUTE).await?;
    ensure!(service.total().await? == 1);
    ensure!(sidecar.ctl(&["resume", "work"]).await?.success()? == "route work was not paused\n");
    sidecar.finish().await
}

/// `pause --wait` ends soon after the last answer, also if that is another instance's: it does not wait for that one's next report.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_for_a_pause_ends_with_the_last_delivery_of_all() -> Result<()> {
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let slow = Rule::echo().after(Duration::from_secs(4));
        let service = Service::native(Scenario::new().on("/work", [slow])).await?;
        let asked = stage.sidecar("asked").service("work", &service).start().await?;
        let other = stage.sidecar("other").service("work", &service).start().await?;
        asked.apply(&table("%out")).await?;
        let own = |status: &GetStatusResponse, is: fn(&RouteStatus) -> bool| {
            let own = status.instances.iter().filter(|one| one.instance == status.instance);
            own.flat_map(|one| &one.routes).any(is)
        };
        for sidecar in [&asked, &other] {
            sidecar.wait_status("half of the partitions", MINUTE, |status| own(status, |route| route.partitions == 2)).await?;
        }
        for number in 0..16 {
            asked.publish(&stage.topic("in"), Some(&format!("k{number}")), "application/json", "{}").await?;
        }
        for sidecar in [&asked, &other] {
            sidecar.wait_status("at the service", MINUTE, |status| own(status, |route| route.in_flight > 0)).await?;
        }
        let begin = Instant::now();
        let said = asked.ctl(&["pause", "work", "--wait", "-o", "json"]).await?.ends(0)?.json()?;
        ensure!(said == json!({ "route": "work", "paused": true, "changed": true, "delivering": [] }), "{said}");
        ensure!(begin.elapsed() < Duration::from_secs(15), "it waited for {:?}", begin.elapsed());
        for sidecar in [asked, other] {
            ensure!(!own(&sidecar.status().await?, |route| route.in_flight > 0), "something is at the service");
            sidecar.finish().await?;
        }
        Ok(())
    })
    .await
}

on_both!(a_table_applied_at_one_sidecar_reaches_all_and_survives_restarts, apply_and_restart);

async fn apply_and_restart(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let mut sidecars = stage.sidecars(&[("work", &service), ("other", &service)]).await?;
    let count = sidecars.len();
    let first = sidecars.first().context("a sidecar")?;
    let last = sidecars.last().context("a sidecar")?;
    first.apply(&table("%out")).await?;
    last.wait_status("generation 1 everywhere", MINUTE, |status| synced(status, count, 1)).await?;
    last.apply(&table("%out, %copy")).await?;
    first.wait_status("generation 2 everywhere", MINUTE, |status| synced(status, count, 2)).await?;
    // The same table again changes nothing.
    first.apply(&table("%out, %copy")).await?;
    let status = first.status().await?;
    ensure!(synced(&status, count, 2), "{status:#?}");
    let got = first.ctl(&["get", "-o", "json"]).await?.success()?;
    ensure!(got.contains(&stage.topic("copy")), "{got}");

    for sidecar in &mut sidecars {
        sidecar.kill9().await?;
    }
    for sidecar in &mut sidecars {
        sidecar.start().await?;
    }
    let first = sidecars.first().context("a sidecar")?;
    first.wait_running(&["work"]).await?;
    let again = first.ctl(&["get", "-o", "json"]).await?.success()?;
    ensure!(again == got, "before: {got}\nafter: {again}");
    first.publish(&stage.topic("in"), Some("a"), "application/json", "{}").await?;
    ensure!(stage.read(first, None, &stage.topic("copy"), 1).await?.len() == 1);
    for sidecar in sidecars {
        sidecar.finish().await?;
    }
    Ok(())
}

on_both!(a_table_that_is_refused_leaves_the_last_good_one_and_says_why, refused);

async fn refused(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario::new()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(&table("%out")).await?;
    sidecar.wait_running(&["work"]).await?;
    let bad = stage.table(
        "
        routes:
        - { name: work, service: work, from: [%in], handler: /work }
        - { name: work, service: work, from: [%in], handler: /work, to: [void, %out], colour: red }
        - { name: third, service: work, from: [__secret], handler: /work, to: [%out], filter: 'record.jsn.a == 1' }
        ",
    );
    for command in ["validate", "apply"] {
        let said = sidecar.ctl_table(command, &bad).await?;
        ensure!(said.status.is_some_and(|status| status != 0), "{command} took it: {}", said.stdout);
        let text = said.stdout + &said.stderr;
        for part in ["to", "colour", "void", "__secret", "filter"] {
            ensure!(text.contains(part), "{command} does not name `{part}`: all faults are reported at once\n{text}");
        }
    }
    let status = sidecar.status().await?;
    ensure!(status.generation == 1, "{status:#?}");
    sidecar.publish(&stage.topic("in"), Some("a"), "application/json", "{}").await?;
    sidecar.wait_status("work goes on", MINUTE, |status| disposition(status, "work", "forwarded") == 1).await?;
    // Another mesh's table is none of this one's.
    let foreign = stage.table(&table("%out")).replace(&format!("mesh: {}", stage.mesh()), "mesh: other");
    ensure!(sidecar.ctl_table("apply", &foreign).await?.status != Some(0));
    sidecar.finish().await
}

on_both!(tables_are_swapped_under_load_with_nothing_lost_repeated_or_reordered, swaps);

async fn swaps(stage: Stage) -> Result<()> {
    let slow = [Rule::echo().after(Duration::from_millis(5))];
    let service = Service::native(Scenario { headers: false, ..Scenario::new() }.on("/work", slow)).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(&table("%out")).await?;
    sidecar.wait_running(&["work"]).await?;
    let records = 3_000;
    let load = Load { connections: 8, ..Load::new(stage.topic("in"), records, 100) };
    let apply = async {
        for swap in 1..=4 {
            service.wait((records * swap / 6) as u64, MINUTE).await?;
            sidecar.apply(&table(if swap % 2 == 1 { "%out, %copy" } else { "%out" })).await?;
        }
        Ok(())
    };
    let (oracle, ()) = tokio::try_join!(load.http(&sidecar), apply)?;
    sidecar.wait_done(&["work"], MINUTE).await?;
    oracle.judge(&deliveries(&service.ledger().await?)?).exactly_once().context("deliveries")?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), records).await?;
    oracle.judge(&sightings(&found)?).exactly_once().context("answers")?;
    let copies = stage.read(&sidecar, None, &stage.topic("copy"), 1).await?;
    ensure!(copies.len() < records, "the second table was in force all the time");
    sidecar.finish().await
}

on_both!(a_route_that_is_taken_away_and_given_back_goes_on_where_it_was, taken_away);

async fn taken_away(stage: Stage) -> Result<()> {
    let service = Service::native(Scenario { headers: false, ..Scenario::new() }).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
    sidecar.apply(&table("%out")).await?;
    sidecar.wait_running(&["work"]).await?;
    let mut oracle = Load::new(stage.topic("in"), 100, 10).http(&sidecar).await?;
    sidecar.wait_status("done", MINUTE, |status| disposition(status, "work", "forwarded") == 100).await?;
    sidecar.apply("routes: []").await?;
    sidecar
        .wait_status("no route", MINUTE, |status| status.generation == 2 && status.instances.iter().all(|one| one.routes.is_empty()))
        .await?;
    oracle.merge(Load::new(stage.topic("in"), 100, 10).from(10).http(&sidecar).await?);
    sidecar.apply(&table("%out")).await?;
    let found = stage.read(&sidecar, None, &stage.topic("out"), 200).await?;
    oracle.judge(&sightings(&found)?).exactly_once()?;
    sidecar.finish().await
}

#[tokio::test]
async fn a_pinned_table_is_in_force_and_apply_is_refused() -> Result<()> {
    Stage::run(Broker::Embedded, async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).pinned(&table("%out")).start().await?;
        sidecar.wait_running(&["work"]).await?;
        let status = sidecar.status().await?;
        ensure!(status.instances.iter().all(|one| one.state() == InstanceState::Pinned), "{status:#?}");
        let said = sidecar.ctl_table("apply", &stage.table(&table("%copy"))).await?;
        ensure!(said.status.is_some_and(|status| status != 0), "{}", said.stdout);
        sidecar.publish(&stage.topic("in"), None, "text/plain", "x").await?;
        ensure!(stage.read(&sidecar, None, &stage.topic("out"), 1).await?.len() == 1);
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn mesh_ctl_tells_by_its_exit_code() -> Result<()> {
    Stage::run(Broker::Embedded, async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        let (one, two) = (stage.table(&table("%out")), stage.table(&table("%copy")));
        sidecar.ctl_table("validate", &one).await?.success()?;
        sidecar.ctl_table("apply", &one).await?.success()?;
        ensure!(sidecar.ctl_table("diff", &one).await?.status == Some(0), "the same table");
        let differs = sidecar.ctl_table("diff", &two).await?;
        ensure!(differs.status == Some(1) && differs.stdout.contains("work"), "{differs:?}");
        ensure!(sidecar.ctl_table("diff", "no table").await?.status == Some(2));
        let text = sidecar.ctl(&["graph"]).await?.success()?;
        ensure!(text.contains("work") && text.contains(&stage.topic("in")), "{text}");
        for (format, mark) in [("mermaid", "-->"), ("dot", "digraph")] {
            let text = sidecar.ctl(&["graph", "--format", format]).await?.success()?;
            ensure!(text.contains(mark) && text.contains("work"), "{format}: {text}");
        }
        for format in ["json", "yaml"] {
            let shown = sidecar.ctl(&["status", "-o", format]).await?.success()?;
            ensure!(shown.contains("work"), "{format}: {shown}");
        }
        let shown = sidecar.ctl(&["status", "-o", "json"]).await?.success()?;
        ensure!(serde_json::from_str::<Value>(&shown)?["generation"] == json!(1), "{shown}");
        let nobody = sidecar.ctl(&["--admin", "http://127.0.0.1:1", "status"]).await?;
        ensure!(nobody.status.is_some_and(|status| status != 0) && nobody.stderr.contains("127.0.0.1:1"), "{nobody:?}");
        ensure!(sidecar.ctl(&["no-such-command"]).await?.status == Some(2));
        sidecar.finish().await
    })
    .await
}
