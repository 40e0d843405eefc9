//! What a real broker does at its own moment, from one that does it when it is told to.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use rdkafka::{
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};

use crate::{
    broker::{
        Broker as _, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, StartOffset,
        kafka::{KafkaBroker, KafkaOptions},
    },
    record::TopicPartition,
};

/// The partitions of the next assignment (`true`) or loss, as the consumer tells of it.
async fn news(consumer: &mut Box<dyn Consumer>) -> (bool, Vec<TopicPartition>) {
    let told = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            match consumer.next().await {
                Event::Assigned(assigned) => return (true, assigned.into_iter().map(|one| one.partition).collect()),
                Event::Revoking(revoking) => {
                    assert!(revoking.lost, "given back in good order, as if it were a member still");
                    return (false, revoking.partitions);
                }
                _ => {}
            }
        }
    });
    told.await.expect("news of the assignment")
}

/// librdkafka keeps its partitions then, joins with a new member id, and gives them back in good order later: see [`super::context`].
#[tokio::test(flavor = "multi_thread")]
async fn a_static_member_that_learns_while_joining_that_it_is_none_loses_its_partitions() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("t", 1, 1).unwrap();
    let keys = [("bootstrap.servers", cluster.bootstrap_servers()), ("session.timeout.ms", "6000".to_owned())];
    let keys: BTreeMap<String, String> = keys.map(|(key, value)| (key.to_owned(), value)).into();
    let broker = KafkaBroker::open(keys, KafkaOptions::default()).unwrap();
    let config = ConsumerConfig {
        group: Some("g".to_owned()),
        topics: vec![Arc::from("t")],
        instance: Some("a".to_owned()),
        start: StartOffset::Earliest,
        buffer_bytes: 1 << 20,
        transactional_id: None,
    };
    let mut consumer = broker.consumer(config).unwrap();
    let ours = vec![TopicPartition::new("t", 0)];
    let commit = |offset| vec![Commit { partition: ours[0].clone(), offset, metadata: String::new() }];
    assert_eq!(news(&mut consumer).await, (true, ours.clone()));
    consumer.commit(commit(0)).await.unwrap();
    // It has to join again, and the group does not know it any more.
    cluster.request_errors(RDKafkaApiKey::JoinGroup, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID]);
    cluster.request_errors(RDKafkaApiKey::Heartbeat, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS]);
    assert_eq!(news(&mut consumer).await, (false, ours.clone()));
    let late = consumer.commit(commit(0)).await.unwrap_err();
    assert_eq!(late.kind, BrokerErrorKind::Fenced, "{late}");
    assert_eq!(news(&mut consumer).await, (true, ours.clone()));
    consumer.commit(commit(0)).await.unwrap();
    consumer.close().await;
    broker.close(Duration::from_secs(5)).await.unwrap();
}
