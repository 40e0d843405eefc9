//! The control plane over a real Kafka: two instances, rivals, a restart, an absent broker.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics on purpose")]

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_proto::v1::InstanceState;
use mesh_sidecar::{
    broker::{
        Broker,
        kafka::{KafkaBroker, KafkaOptions},
    },
    config::{BrokerConfig, Config, ControlConfig, Limits, Listen, ListenTls, LogFormat, ServiceConfig, TelemetryConfig},
    control::{ApplyError, ApplyOptions, Control, ControlHandle},
    status::Board,
    table::TableOrigin,
};
use mesh_tests::kafka::own_kafka;
use tokio_util::sync::CancellationToken;

fn table(to: &str) -> String {
    format!(
        "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: shop }}\nspec:\n  topics: {{ orders: {{ partitions: 3 }} }}\n  routes:\n  - {{ name: price, service: pricing, from: [orders], handler: /price, to: [{to}] }}\n"
    )
}

async fn start(bootstrap: &str, name: &str, folder: &Path) -> (ControlHandle, Arc<KafkaBroker>) {
    let address = ([127, 0, 0, 1], 0).into();
    let keys = BTreeMap::from([("bootstrap.servers".to_owned(), bootstrap.to_owned())]);
    let config = Config {
        mesh: "shop".into(),
        services: vec![ServiceConfig { name: "pricing".into(), app: None, publish: None, subscribe: None, token_file: None }],
        instance: Some(name.to_owned()),
        labels: BTreeMap::new(),
        state: folder.join(name),
        broker: BrokerConfig::Kafka(keys.clone()),
        table: None,
        listen: Listen { api: address, admin: address, probe: address },
        tls: ListenTls::default(),
        control: ControlConfig::default(),
        telemetry: TelemetryConfig { otlp: None, log: String::new(), log_format: LogFormat::Json },
        limits: Limits {
            record_bytes: 1 << 20,
            publish_timeout: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(5),
            buffer_bytes: 1 << 20,
        },
    };
    let broker = KafkaBroker::open(keys, KafkaOptions::default()).unwrap();
    let handle =
        Control::start(broker.clone(), Arc::new(config), Board::default(), mesh_sidecar::command::channel().0, CancellationToken::new())
            .await
            .unwrap();
    (handle, broker)
}

async fn generation(handle: &ControlHandle, generation: u64) {
    let mut table = handle.table();
    let wait = table.wait_for(|t| t.as_ref().is_some_and(|t| t.generation >= generation && t.origin == TableOrigin::Mesh));
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("in time").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_plane_over_kafka() {
    let Some(kafka) = own_kafka().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let (a, ba) = start(kafka.bootstrap(), "a", folder.path()).await;
    let (b, bb) = start(kafka.bootstrap(), "b", folder.path()).await;
    a.ready().wait_for(|ready| *ready).await.unwrap();
    b.ready().wait_for(|ready| *ready).await.unwrap();
    let options = ApplyOptions::default();
    a.control().apply("t", &table("priced"), options.clone()).await.unwrap();
    generation(&b, 1).await;
    let mut lost = 0;
    for round in 0..20 {
        let (x, y) = (table(&format!("l{round}")), table(&format!("r{round}")));
        let (x, y) = tokio::join!(a.control().apply("t", &x, options.clone()), b.control().apply("t", &y, options.clone()));
        for result in [&x, &y] {
            match result {
                Ok(_) => {}
                Err(ApplyError::Lost { .. }) => lost += 1,
                Err(e) => panic!("{e}"),
            }
        }
        let newest = x.iter().chain(&y).map(|applied| applied.generation).max().unwrap();
        generation(&a, newest).await;
        generation(&b, newest).await;
        let digest = |handle: &ControlHandle| handle.table().borrow().as_ref().unwrap().compiled.digest.clone();
        assert_eq!(digest(&a), digest(&b));
    }
    assert!(lost > 0, "the rivals never met: this test proves nothing");
    let begin = Instant::now();
    loop {
        let status = a.control().status();
        if status.instances.len() == 2 && status.instances.iter().all(|i| i.state() == InstanceState::Synced) {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "{status:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let newest = a.table().borrow().as_ref().unwrap().generation;
    b.close().await;
    bb.close(Duration::from_secs(5)).await.unwrap();
    a.close().await;
    ba.close(Duration::from_secs(5)).await.unwrap();

    // Without the broker: the copy.
    let (c, bc) = start("127.0.0.1:1", "a", folder.path()).await;
    c.ready().wait_for(|ready| *ready).await.unwrap();
    let status = c.control().status();
    assert_eq!(status.instances[0].state(), InstanceState::Cached);
    assert!(!status.instances[0].waiting.is_empty());
    let error = c.control().apply("t", &table("x"), options).await.unwrap_err();
    assert!(matches!(error, ApplyError::NotReady(_)), "{error}");
    c.close().await;
    drop(bc);

    let (d, bd) = start(kafka.bootstrap(), "d", folder.path()).await;
    generation(&d, newest).await;
    assert_eq!(d.control().status().instances.len(), 1);
    d.close().await;
    bd.close(Duration::from_secs(5)).await.unwrap();
}
