//! Reads the control topic from its beginning, for as long as the process runs.
//!
//! Invariant: "caught up" is said once, after everything that was there when the reading began was read.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{
    log::Meaning,
    state::{Backoff, Shared},
    topics::{self, CONTROL_TOPIC},
};
use crate::{
    broker::{BrokerError, Consumer, ConsumerConfig, Event, StartOffset},
    record::TopicPartition,
};

/// The subject of what the reader waits for.
const SUBJECT: &str = "control topic";
/// How much is fetched ahead, in bytes: a few of the largest snapshots.
const BUFFER: usize = 4 << 20;
/// How long no record comes until the end is looked for again.
const QUIET: Duration = Duration::from_secs(3);

/// Reads until the token is cancelled.
pub(super) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let Some((mut consumer, bounds)) = stop.run_until_cancelled(begin(&shared)).await else { return };
    stop.run_until_cancelled(follow(&shared, &mut *consumer, bounds)).await;
    consumer.close().await;
}

/// Waits for the broker, and begins to read. Gives the offsets that there are, too.
async fn begin(shared: &Shared) -> (Box<dyn Consumer>, (i64, i64)) {
    let mut backoff = Backoff::new();
    loop {
        match try_to_begin(shared).await {
            Ok(begun) => {
                shared.wait_for(SUBJECT, None);
                return begun;
            }
            Err(error) => shared.wait_for(SUBJECT, Some(format!("{CONTROL_TOPIC} cannot be read: {error}"))),
        }
        backoff.pause().await;
    }
}

async fn try_to_begin(shared: &Shared) -> Result<(Box<dyn Consumer>, (i64, i64)), BrokerError> {
    let admin = shared.broker.admin();
    topics::ensure_own(&*admin).await?;
    let bounds = admin.watermarks(&TopicPartition::new(CONTROL_TOPIC, 0)).await?;
    let config = ConsumerConfig::reader(vec![CONTROL_TOPIC.into()], StartOffset::Earliest, BUFFER);
    Ok((shared.broker.consumer(config)?, bounds))
}

/// Takes the events of a consumer, without end.
async fn follow(shared: &Shared, consumer: &mut dyn Consumer, (low, mut end): (i64, i64)) {
    let partition = TopicPartition::new(CONTROL_TOPIC, 0);
    if low == end {
        shared.log(|log| log.passed(end));
    }
    let mut quiet_at = None;
    loop {
        publish(shared, end);
        let caught_up = shared.progress.borrow().caught_up;
        let event = if caught_up {
            consumer.next().await
        } else {
            match tokio::time::timeout(QUIET, consumer.next()).await {
                Ok(event) => event,
                // Compaction can remove the very last records: then nothing more comes, and the end is where it is quiet.
                Err(_) => {
                    let position = shared.log(|log| log.next_offset());
                    match shared.broker.admin().watermarks(&partition).await {
                        Ok((_, high)) if quiet_at == Some((position, high)) => shared.log(|log| log.passed(high)),
                        Ok((_, high)) => {
                            end = high;
                            quiet_at = Some((position, high));
                        }
                        Err(error) => {
                            quiet_at = None;
                            shared.wait_for(SUBJECT, Some(format!("the end of {CONTROL_TOPIC} is not known: {error}")));
                        }
                    }
                    continue;
                }
            }
        };
        match event {
            Event::Records(batch) => {
                for (offset, record) in &batch.records {
                    take(shared, *offset, record);
                }
                shared.wait_for(SUBJECT, None);
            }
            Event::Expired { to, .. } => shared.log(|log| log.passed(to)),
            Event::Trouble(error) => {
                quiet_at = None;
                shared.wait_for(SUBJECT, Some(format!("{CONTROL_TOPIC}: {error}")));
            }
            Event::Recovered => shared.wait_for(SUBJECT, None),
            // Without a group there is nothing to give back.
            Event::Assigned(_) | Event::Revoking(_) => {}
        }
    }
}

fn take(shared: &Shared, offset: i64, record: &crate::record::Record) {
    match shared.log(|log| log.push(offset, record.key.as_ref(), record.value.as_ref())) {
        Meaning::Head(generation) => tracing::debug!(generation, offset, "a new generation of the routing table"),
        Meaning::Beaten(generation) => tracing::debug!(generation, offset, "a proposal came too late for its generation"),
        Meaning::DeletedHead => tracing::warn!(
            offset,
            "somebody deleted the record of the routing table in force from {CONTROL_TOPIC}: apply it again, or sidecars that start will not find it"
        ),
        Meaning::Pause(route) => tracing::debug!(route, offset, "a route is paused, or resumed"),
        Meaning::Abort(generation) => tracing::info!(generation, offset, "the rollout of a canary is aborted"),
        Meaning::LateAbort(generation) => tracing::debug!(generation, offset, "the end of a canary that is not open counts for nothing"),
        Meaning::Deleted | Meaning::Foreign => {}
    }
}

fn publish(shared: &Shared, end: i64) {
    let (next_offset, head, over, pauses) =
        shared.log(|log| (log.next_offset(), log.head(), log.aborted(log.head()).is_some(), log.pauses()));
    if shared.progress.borrow().caught_up || next_offset >= end {
        // Before "caught up" is said: with a table come its pauses. Until then those on disk count.
        shared.pauses.send_if_modified(|known| std::mem::replace(known, pauses.clone()) != pauses);
    }
    shared.progress.send_if_modified(|progress| {
        let caught_up = progress.caught_up || next_offset >= end;
        let new = super::state::Progress { next_offset, head, over, caught_up };
        std::mem::replace(progress, new) != new
    });
}
