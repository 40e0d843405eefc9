//! The life of a sidecar: starts, swaps of its table, crashes.
//!
//! Invariant: a pause is the longest gap between two calls at the service, as the service saw it; it is shown beside the longest gap in
//! spans of the same length in which nothing happened, since a shared machine pauses by itself.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use mesh_proto::v1::{ApplyRequest, TableSource, control_client::ControlClient};
use tokio::time::Instant;

use super::{
    ground::{Bench, Count, Filling, ROUTE, SERVICE},
    kafka, measure, role,
    rows::Row,
    service::Gaps,
};
use crate::{http::Http, sidecar::Sidecar, stage::Stage};

/// Routes of the table that is swapped.
const ROUTES: usize = 1_000;
/// Of these, routes of the measured sidecar itself, which take the change in place; the others are other services'.
const OWN: usize = 10;
/// Calls that are out at once while tables are swapped: few, so that the route is never without one, and the cores are not full.
const CALLS: u32 = 4;
/// The least span in which gaps are looked for, and how much of it follows the acceptance at least.
const SPAN: Duration = Duration::from_millis(300);
const AFTER: Duration = Duration::from_millis(100);

impl Bench {
    /// From the start of the process until `/readyz` says yes: with a table that is pinned, and with one that the mesh has.
    pub(super) async fn start(&self, row: &mut Row) -> Result<()> {
        let starts = if self.effort.rounds == 1 { 10 } else { 10 * self.effort.rounds };
        let spec = format!("routes:\n- {{ name: {ROUTE}, service: {SERVICE}, from: [%a], handler: /push, to: [%b] }}\n");
        for pinned in [true, false] {
            let stage = Stage::new(self.broker.clone())?;
            let (_service, port) = role::serve(stage.folder(), &["service-http", "echo"]).await?;
            let builder = self.sidecar(&stage, "sidecar").app(SERVICE, &format!("http://127.0.0.1:{port}"));
            let mut sidecar = if pinned { builder.pinned(&spec) } else { builder }.start().await?;
            if !pinned {
                sidecar.apply(&spec).await?;
            }
            sidecar.wait_running(&[ROUTE]).await?;
            let mut took = Vec::with_capacity(starts);
            for _ in 0..starts {
                ensure!(sidecar.sigterm(Duration::from_secs(30)).await?.success(), "the sidecar did not end well");
                let begin = Instant::now();
                sidecar.spawn()?;
                until_ready(&mut sidecar).await?;
                took.push(begin.elapsed().as_secs_f64() * 1e3);
            }
            sidecar.finish().await?;
            took.sort_by(f64::total_cmp);
            let table = if pinned { "table pinned" } else { "table from the mesh" };
            row.figure(format!("{table}: p50 of {starts} starts"), measure::median(&took), "ms");
            row.figure(format!("{table}: fastest"), took.first().copied().unwrap_or(0.0), "ms");
            row.figure(format!("{table}: slowest"), took.last().copied().unwrap_or(0.0), "ms");
            self.delete(&[&stage.topic("a"), &stage.topic("b"), &stage.topic("dlq")]).await?;
        }
        Ok(())
    }

    /// A table of 1,000 routes is swapped again and again: how long until it is in force, and what an unchanged route feels.
    pub(super) async fn swap(&self, row: &mut Row) -> Result<()> {
        let swaps = if self.effort.rounds == 1 { 10 } else { 30 };
        let stage = Stage::new(self.broker.clone())?;
        let source = stage.topic("source");
        // More than the route can process meanwhile; a backlog that runs out is noticed.
        self.fill(&stage, &source, Filling::of(self.effort.records * 4)).await?;
        let (service, port) = role::serve(stage.folder(), &["service-http", "gaps"]).await?;
        let gaps = Http::new(([127, 0, 0, 1], port).into());
        let builder = self.sidecar(&stage, "sidecar").app(SERVICE, &format!("http://127.0.0.1:{port}"));
        let sidecar = builder.start().await?;
        // On Kafka another sidecar of the mesh is asked, so that distribution counts; the embedded broker has only one.
        let other = match &self.kafka {
            Some(_) => Some(self.sidecar(&stage, "other").client("other").start().await?),
            None => None,
        };
        let asked = other.as_ref().unwrap_or(&sidecar);
        let mut control = ControlClient::connect(format!("http://{}", asked.admin_address())).await?.max_decoding_message_size(64 << 20);
        let mut apply = async |version: usize| {
            let source = TableSource { file: "swap.yaml".into(), text: stage.table(&swapped(version)) };
            let begin = Instant::now();
            let answer = control.apply(ApplyRequest { table: Some(source), ..ApplyRequest::default() }).await?.into_inner();
            ensure!(answer.faults.is_empty() && answer.changed, "not applied: {:?}", answer.faults);
            anyhow::Ok((begin, Instant::now(), answer.generation))
        };
        apply(0).await?;
        sidecar.wait_running(&[ROUTE]).await?;
        let gap = async || -> Result<Gaps> { Ok(serde_json::from_slice(&gaps.get("/gaps").await?.expect(200)?.body)?) };
        let (mut accepted, mut in_force, mut still, mut swapping) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        gap().await?;
        for number in 0..swaps {
            let (begin, answered, _) = apply(2 * number + 1).await?;
            tokio::time::sleep_until((begin + SPAN).max(answered + AFTER)).await;
            let busy = gap().await?;
            // The longer one looks, the longer gaps one finds.
            tokio::time::sleep(begin.elapsed()).await;
            let quiet = gap().await?;
            ensure!(quiet.calls > 0 && busy.calls > 0, "the backlog ran out after {number} swaps: raise --records");
            still.push(quiet.longest_ms);
            swapping.push(busy.longest_ms);
            // Asking for the generation costs the sidecar something, so the gaps of this one do not count.
            let (begin, answered, generation) = apply(2 * number + 2).await?;
            until_generation(&sidecar, generation).await?;
            accepted.push(answered.duration_since(begin).as_secs_f64() * 1e3);
            in_force.push(answered.elapsed().as_secs_f64() * 1e3);
            gap().await?;
        }
        for (name, values) in [
            ("`apply` asked → accepted", &accepted),
            ("accepted → in force", &in_force),
            ("longest gap around a swap", &swapping),
            ("longest gap in as long a time without", &still),
        ] {
            row.figure(format!("{name}: p50 of {swaps}"), measure::median(values), "ms");
            row.figure(format!("{name}: worst"), values.iter().copied().fold(0.0, f64::max), "ms");
        }
        row.figure("longest gap: around a swap − without, of the p50", measure::median(&swapping) - measure::median(&still), "ms");
        drop(service);
        sidecar.finish().await?;
        if let Some(other) = other {
            other.finish().await?;
        }
        self.delete(&[&source, &stage.topic("idle"), &stage.topic("dlq")]).await
    }

    pub(super) async fn kill(&self, row: &mut Row) -> Result<()> {
        const RECORDS: u64 = 20_000;
        let Some((handle, topics)) = &self.kafka else { bail!("measured on Kafka alone") };
        let stage = Stage::new(self.broker.clone())?;
        let [source, target] = ["source", "target"].map(|name| stage.topic(name));
        self.fill(&stage, &source, Filling::of(RECORDS)).await?;
        topics.create(&target, kafka::PARTITIONS).await?;
        let (_service, port) = role::serve(stage.folder(), &["service-http", "echo"]).await?;
        let table = format!("routes:\n- {{ name: {ROUTE}, service: {SERVICE}, from: [{source}], handler: /push, to: [{target}] }}\n");
        let builder = self.sidecar(&stage, "sidecar").app(SERVICE, &format!("http://127.0.0.1:{port}")).instance("bench").pinned(&table);
        let mut sidecar = builder.start().await?;
        let count = Count::Topic(topics.clone(), target.clone(), kafka::PARTITIONS);
        for part in 1..=3 {
            count.reach(RECORDS * part / 4).await?;
            sidecar.kill9().await?;
            let (before, killed) = (count.now().await?, Instant::now());
            sidecar.spawn()?;
            count.reach(before + 1).await?;
            row.figure(format!("next reply after kill {part}"), killed.elapsed().as_secs_f64() * 1e3, "ms");
        }
        count.reach(RECORDS).await?;
        sidecar.wait_ready().await?;
        sidecar.wait_done(&[ROUTE], Duration::from_secs(60)).await?;
        sidecar.finish().await?;
        let (bootstrap, topic) = (handle.bootstrap().to_owned(), target.clone());
        let numbers = tokio::task::spawn_blocking(move || kafka::numbers(&bootstrap, &topic)).await??;
        let duplicates: u64 = numbers.values().map(|times| times - 1).sum();
        row.figure("missing", (RECORDS - numbers.len() as u64) as f64, "records");
        row.figure("duplicates", duplicates as f64, "records");
        topics.delete(&[&source, &target]).await
    }
}

/// Waits until a sidecar that was spawned says that it is ready; asks every millisecond.
async fn until_ready(sidecar: &mut Sidecar) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        // Nobody listens at first.
        if sidecar.probes().get("/readyz").await.is_ok_and(|answer| answer.status == 200) {
            return Ok(());
        }
        let process = sidecar.process()?;
        ensure!(process.exited().is_none() && Instant::now() < end, "not ready\n{}", process.log_tail());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Waits until a generation is in force at a sidecar; asks every millisecond.
async fn until_generation(sidecar: &Sidecar, generation: u64) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if sidecar.metric("mesh_table_generation").await? >= generation as f64 {
            return Ok(());
        }
        ensure!(Instant::now() < end, "generation {generation} is not in force after 30 s");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A table of many routes, in which every version changes all but the one under load.
fn swapped(version: usize) -> String {
    let mut spec = format!(
        "routes:\n- {{ name: {ROUTE}, service: {SERVICE}, from: [%source], handler: /push, to: void, order: none, concurrency: {CALLS} }}\n"
    );
    for number in 1..ROUTES {
        let service = if number < OWN { SERVICE } else { "elsewhere" };
        let timeout = 1_000 + version;
        spec +=
            &format!("- {{ name: idle-{number}, service: {service}, from: [%idle], handler: /idle, to: void, timeout: {timeout}ms }}\n");
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swap_changes_every_route_but_the_one_under_load() {
        let (first, second) = (swapped(1), swapped(2));
        let lines = || first.lines().zip(second.lines());
        assert_eq!(first.lines().count(), ROUTES + 1);
        assert_eq!(lines().filter(|(first, second)| first == second).count(), 2);
        assert_eq!(lines().filter(|(line, _)| line.contains(&format!("service: {SERVICE},"))).count(), OWN);
    }
}
