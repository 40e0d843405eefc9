//! When reports of others are heard.

use prost::Message as _;
use tokio::time::Instant;

use super::*;
use crate::control::{
    report::{mesh, rest},
    topics::STATUS_TOPIC,
};

/// Reports as many instances give them.
fn report(broker: &Memory, instances: std::ops::Range<usize>) {
    for number in instances {
        let instance = format!("other-{number}");
        let reported_ms = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap();
        let status = v1::InstanceStatus { instance: instance.clone(), reported_ms, ..v1::InstanceStatus::default() };
        let value = zstd::bulk::compress(&status.encode_to_vec(), 1).unwrap();
        broker.append(STATUS_TOPIC, 0, &format!("shop/{instance}"), Some(&value));
    }
}

#[tokio::test(start_paused = true)]
async fn in_a_large_mesh_reports_gather_until_somebody_looks() {
    const OTHERS: usize = 80;
    let broker = Memory::new(true);
    let a = start(&broker, "a").await;
    a.ready().await;
    let shared = a.control().0.clone();
    let rested = async || {
        let begin = Instant::now();
        rest(&shared).await;
        begin.elapsed()
    };
    assert_eq!(rested().await, Duration::ZERO, "a small mesh hears as they come");
    report(&broker, 0..OTHERS);
    timeout(SOON, async {
        while shared.peers.lock().unwrap().len() < OTHERS {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    let alone = rested().await;
    assert!(alone >= Duration::from_millis(OTHERS as u64) && alone < Duration::from_millis(200), "{alone:?}");
    let look = async {
        tokio::task::yield_now().await;
        assert_eq!(mesh(&shared).instances.len(), OTHERS + 1);
    };
    assert_eq!(tokio::join!(rested(), look).0, Duration::ZERO, "who looks ends it");
    assert_eq!(rested().await, Duration::ZERO, "and may look again");

    // What comes meanwhile is there soon after a look.
    report(&broker, OTHERS..OTHERS + 5);
    a.status("all that reported", |status| status.instances.len() == OTHERS + 6).await;
}
