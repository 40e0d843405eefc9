//! Many records through the whole of it: 100,000 of 1 KiB with `MESH_FULL=1`, 10,000 otherwise.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{full, load::Load, on_both, oracle::sightings, python::python, service::Scenario, sidecar::disposition, stage::Stage};
use serde_json::Value;

on_both!(records_of_1_kib_with_1000_keys_over_4_partitions_are_each_answered_exactly_once_in_order_per_key, volume);

/// In through HTTP and gRPC, pushed to a foreign service; each reply is in the declared topic exactly once, in order per key, as a client
/// that is not the mesh's own reads it.
async fn volume(stage: Stage) -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    let records = if full() { 100_000 } else { 10_000 };
    let service = stage.fastapi(&python, Scenario::light()).await?;
    let sidecar = stage.sidecar("sidecar").service("work", &service).log("warn").start().await?;
    sidecar
        .apply(
            "
            topics: { %in: { partitions: 4 }, %out: { partitions: 4 } }
            routes:
            - { name: work, service: work, from: [%in], handler: /work, to: [%out] }
            ",
        )
        .await?;
    sidecar.wait_running(&["work"]).await?;
    let begin = Instant::now();
    let load = Load { size: 1024, connections: 16, ..Load::new(stage.topic("in"), records, 1000) };
    let oracle = load.http_and_grpc(&sidecar).await?;
    let published = begin.elapsed();
    let count = records as u64;
    sidecar.wait_status("all forwarded", Duration::from_secs(600), |status| disposition(status, "work", "forwarded") >= count).await?;
    println!("{records} records: published in {published:.1?}, all done in {:.1?}", begin.elapsed());
    ensure!(service.total().await? == count, "{} calls for {count} records", service.total().await?);

    let topic = stage.topic("out");
    if stage.is_kafka() {
        for library in ["kafka-python", "confluent"] {
            let said = stage.kafka_client(&python, &topic, &["consume", "--mode", "summary", "--library", library], String::new()).await?;
            let said: Value = serde_json::from_str(&said)?;
            let number = |field: &str| said[field].as_u64().with_context(|| format!("{field} in {said}"));
            ensure!(number("count")? == count && number("distinct")? == count && number("distinct_numbers")? == count, "{said}");
            ensure!(number("duplicates")? == 0 && number("disorder")? == 0 && number("without_id")? == 0, "{said}");
            ensure!(number("keys")? == 1000, "{said}");
        }
    } else {
        let found = stage.read(&sidecar, Some(&python), &topic, records).await?;
        oracle.judge(&sightings(&found)?).exactly_once()?;
    }
    let status = sidecar.status().await?;
    ensure!(disposition(&status, "work", "forwarded") == count && disposition(&status, "work", "dead_lettered") == 0, "{status:#?}");
    sidecar.finish().await
}
