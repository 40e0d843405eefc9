//! The conformance suite on the embedded broker.

#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

use std::sync::Arc;

use mesh_sidecar::broker::{
    Broker,
    embedded::{EmbeddedBroker, EmbeddedConfig},
};
use mesh_tests::conformance::{run_all, run_cases};

#[tokio::test(flavor = "multi_thread")]
async fn conforms() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_owned();
    let make = move || {
        let path = path.clone();
        Box::pin(async move { Ok(EmbeddedBroker::open(EmbeddedConfig::new(path))? as Arc<dyn Broker>) }) as _
    };
    run_all(&make).await.expect("conformance");
}

/// Without threads, and with every record read from the store instead of the hot tail.
#[tokio::test]
async fn conforms_in_memory() {
    let config = EmbeddedConfig { tail_bytes: 0, ..EmbeddedConfig::new("") };
    let broker: Arc<dyn Broker> = EmbeddedBroker::in_memory(config).expect("opens");
    let failures = run_cases(&broker).await;
    assert!(failures.is_empty(), "{failures:#?}");
}

/// The same from disk, so that hot and cold reads alternate.
#[tokio::test(flavor = "multi_thread")]
async fn conforms_without_a_hot_tail() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = EmbeddedConfig { tail_bytes: 2000, ..EmbeddedConfig::new(folder.path()) };
    let broker: Arc<dyn Broker> = EmbeddedBroker::open(config).expect("opens");
    let failures = run_cases(&broker).await;
    assert!(failures.is_empty(), "{failures:#?}");
}
