//! The conformance suite on a real Kafka.

use std::{collections::BTreeMap, sync::Arc};

use mesh_sidecar::broker::{
    Broker,
    kafka::{KafkaBroker, KafkaOptions},
};
use mesh_tests::{conformance::run_all, kafka::kafka};

#[tokio::test(flavor = "multi_thread")]
async fn conforms() {
    let Some(kafka) = kafka().await else { return };
    let make = move || {
        let keys = BTreeMap::from([("bootstrap.servers".to_owned(), kafka.bootstrap().to_owned())]);
        Box::pin(async move { Ok(KafkaBroker::open(keys, KafkaOptions::default())? as Arc<dyn Broker>) }) as _
    };
    run_all(&make).await.expect("conformance");
}
