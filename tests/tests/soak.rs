//! A minute of the verifier on each broker; and that it notices each fault that is built into a sidecar.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    broker::Broker,
    full, kafka,
    soak::{
        plan::Fault,
        report::Report,
        run::{Options, run},
    },
};

/// How long a soak of a suite goes on.
fn length() -> Duration {
    Duration::from_secs(if full() { 900 } else { 60 })
}

fn clean(report: &Report) -> Result<()> {
    println!("{}", report.text());
    ensure!(report.is_clean(), "a promise was broken");
    ensure!(report.acknowledged() > 1_000, "only {} records were acknowledged", report.acknowledged());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minute_of_faults_on_three_brokers_breaks_no_promise() -> Result<()> {
    let Some(cluster) = kafka::cluster(3).await else { return Ok(()) };
    let mut options = Options { rate: 200.0, ..Options::on(cluster, 1, length()) };
    // Eight sidecars without optimisation are too much beside three brokers and the other tests; so are seven routes.
    options.faults.retain(|fault| full() || *fault != Fault::Scale);
    options.lines.retain(|line| full() || ["work", "exact", "batch", "later"].contains(&line.name));
    clean(&run(options).await?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minute_of_faults_on_the_embedded_broker_breaks_no_promise() -> Result<()> {
    clean(&run(Options { rate: 200.0, ..Options::new(Broker::Embedded, 1, length()) }).await?)
}

/// Sidecars come one by one, and go again, under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scaling_under_load_loses_and_reorders_nothing() -> Result<()> {
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    let (length, scale_to) = if full() { (180, 8) } else { (45, 4) };
    let mut options = Options::new(broker, 2, Duration::from_secs(length));
    options.faults = vec![Fault::Scale];
    options.lines.retain(|line| full() || ["work", "exact"].contains(&line.name));
    (options.sidecars, options.scale_to, options.rate) = (1, scale_to, 200.0);
    clean(&run(options).await?)
}

/// Runs with a fault that is built in, and expects that one of these checks fails.
async fn is_noticed(mutation: &str, broker: Broker, faults: &[Fault], checks: &[u8]) -> Result<()> {
    let mut options = Options::new(broker, 3, Duration::from_secs(if faults.is_empty() { 8 } else { 30 }));
    options.faults = faults.to_vec();
    options.mutation = Some(mutation.to_owned());
    options.rate = 200.0;
    options.drain = Duration::from_secs(20);
    let report = run(options).await.with_context(|| format!("with {mutation}"))?;
    let failed: Vec<u8> = report.failed().map(|(_, violation)| violation.check).collect();
    ensure!(failed.iter().any(|check| checks.contains(check)), "{mutation} was not noticed: {failed:?} failed\n{}", report.text());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_commits_early_is_noticed() -> Result<()> {
    is_noticed("commit_early", Broker::Embedded, &[], &[4]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_drops_a_reply_is_noticed() -> Result<()> {
    is_noticed("drop_reply", Broker::Embedded, &[], &[2]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_swaps_two_records_is_noticed() -> Result<()> {
    is_noticed("swap_two", Broker::Embedded, &[Fault::ServiceSlow], &[3]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_acknowledges_before_the_disk_has_it_is_noticed() -> Result<()> {
    is_noticed("ack_before_fsync", Broker::Embedded, &[Fault::DiskFull, Fault::SidecarKill], &[1]).await
}
