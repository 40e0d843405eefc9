//! What went wrong in other systems that push Kafka's records to services, each as a test named after it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    broker::Broker,
    service::{Scenario, Service},
    sidecar::disposition,
    stage::Stage,
};
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer},
    topic_partition_list::{Offset, TopicPartitionList},
};

const MINUTE: Duration = Duration::from_secs(60);
const TABLE: &str =
    "{ topics: { %in: { partitions: 1 } }, routes: [{ name: work, service: work, from: [%in], handler: /work, to: void }] }";

/// A topic that is written in transactions holds their markers, and records of transactions that were aborted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_markers_leave_no_offset_stuck_and_aborted_records_are_never_delivered() -> Result<()> {
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        sidecar.apply(TABLE).await?;
        let (bootstrap, topic) = (stage.broker().bootstrap().context("Kafka")?.to_owned(), stage.topic("in"));
        tokio::task::spawn_blocking(move || write_in_transactions(&bootstrap, &topic)).await??;
        sidecar.wait_status("the committed ones", MINUTE, |status| disposition(status, "work", "void") == 30).await?;
        // The newest offset is a marker's: nothing is left behind all the same.
        sidecar.wait_done(&["work"], MINUTE).await?;
        let texts: Vec<String> = service.ledger().await?.iter().map(mesh_tests::service::Entry::text).collect();
        ensure!(texts.iter().all(|text| text.starts_with("good")) && texts.len() == 30, "{texts:?}");
        sidecar.finish().await
    })
    .await
}

fn write_in_transactions(bootstrap: &str, topic: &str) -> Result<()> {
    let producer: ThreadedProducer<DefaultProducerContext> =
        ClientConfig::new().set("bootstrap.servers", bootstrap).set("transactional.id", format!("{topic}.writer")).create()?;
    producer.init_transactions(MINUTE)?;
    for number in 0..10 {
        for (word, count) in [("good", 3), ("bad", 2)] {
            producer.begin_transaction()?;
            for part in 0..count {
                let text = format!("{word} {number} {part}");
                producer.send(BaseRecord::to(topic).key("k").payload(&text)).map_err(|(error, _)| error)?;
            }
            producer.flush(MINUTE)?;
            match word {
                "good" => producer.commit_transaction(MINUTE)?,
                _ => producer.abort_transaction(MINUTE)?,
            }
        }
    }
    Ok(())
}

/// Another program has committed for the group, with metadata of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_that_another_program_committed_is_ignored() -> Result<()> {
    let Some(broker) = Broker::kafka().await? else { return Ok(()) };
    Stage::run(broker, async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let mut sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        sidecar.apply(TABLE).await?;
        // One that ends while it joins leaves a member behind, and only a group without members takes a stranger's commit.
        sidecar.wait_running(&["work"]).await?;
        let topic = stage.topic("in");
        for metadata in ["bMTA5Mw==", "NoMetadata", "mesh1:", "\u{1f600} {\"offset\": 3}"] {
            sidecar.sigterm(MINUTE).await?;
            let (bootstrap, group) = (stage.broker().bootstrap().context("Kafka")?.to_owned(), format!("{}.work", stage.mesh()));
            let committed = topic.clone();
            tokio::task::spawn_blocking(move || commit(&bootstrap, &group, &committed, metadata)).await??;
            sidecar.start().await?;
            let before = service.total().await?;
            for number in 0..3 {
                sidecar.publish(&topic, None, "text/plain", number.to_string()).await?;
            }
            service.wait(before + 3, MINUTE).await.with_context(|| format!("with the metadata {metadata:?}"))?;
            sidecar.wait_done(&["work"], MINUTE).await?;
        }
        sidecar.finish().await
    })
    .await
}

/// Commits where the group stands, or at the beginning.
fn commit(bootstrap: &str, group: &str, topic: &str, metadata: &str) -> Result<()> {
    let client: BaseConsumer = ClientConfig::new().set("bootstrap.servers", bootstrap).set("group.id", group).create()?;
    let mut asked = TopicPartitionList::new();
    asked.add_partition(topic, 0);
    let stands = client.committed_offsets(asked, MINUTE)?;
    let offset = match stands.elements().first().map(|element| element.offset()) {
        Some(Offset::Offset(offset)) => offset,
        _ => 0,
    };
    let mut list = TopicPartitionList::new();
    let mut element = list.add_partition(topic, 0);
    element.set_offset(Offset::Offset(offset))?;
    element.set_metadata(metadata);
    client.commit(&list, CommitMode::Sync)?;
    Ok(())
}
