//! The broker conformance suite: what every [`Broker`] must do, checked behind the traits only.
//!
//! [`run_all`] runs all cases, one after the other, with topics and groups of fresh names, so that it can run against a broker that is in
//! use. A wait that lasts longer than [`PATIENCE`] is a failure that says what was waited for.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use bytestring::ByteString;
use futures_util::future::BoxFuture;
use mesh_sidecar::{
    broker::{
        Assigned, Broker, BrokerErrorKind, Commit, Consumer, ConsumerConfig, Event, NewTopic, Outgoing, ProduceErrorKind, StartOffset,
        TopicChange, TransactionError,
    },
    record::{Header, Position, Record, TopicPartition},
};
use tokio::sync::{Notify, oneshot};

mod consume;
mod log;
mod members;
mod transactions;

/// How long an expected event may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Opens the broker under test. Called again, after the one before was closed, it must show the same data.
pub type Make<'a> = &'a (dyn Fn() -> BoxFuture<'static, Result<Arc<dyn Broker>>> + Send + Sync);

type Case = fn(Arc<dyn Broker>) -> BoxFuture<'static, Result<()>>;

macro_rules! cases {
    ($($module:ident :: $name:ident),* $(,)?) => {
        [$((stringify!($name), (|broker| Box::pin($module::$name(broker))) as Case)),*]
    };
}

/// Runs all cases, and closes the broker.
///
/// # Errors
/// Names every case that failed, and why.
pub async fn run_all(make: Make<'_>) -> Result<()> {
    let broker = make().await.context("opening the broker")?;
    let mut failures = run_cases(&broker).await;
    println!("conformance: a_group_resumes_after_reopening");
    if let Err(error) = consume::a_group_resumes_after_reopening(broker, make).await {
        failures.push(format!("a_group_resumes_after_reopening: {error:#}"));
    }
    ensure!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// Runs all cases that need no second opening; the failures, by case.
pub async fn run_cases(broker: &Arc<dyn Broker>) -> Vec<String> {
    let cases = cases![
        log::acknowledged_in_order,
        log::any_shape_of_record,
        log::keys_go_where_kafka_puts_them,
        log::unknown_topics,
        log::topics_are_created_once,
        log::watermarks_follow,
        log::offsets_by_time,
        log::sizes,
        consume::starts,
        consume::a_topic_that_comes_later,
        consume::a_reader_without_a_group,
        consume::a_reader_of_chosen_partitions,
        members::commits_of_other_topics_go_with_a_hand_over,
        consume::next_may_be_dropped,
        consume::hold_and_release,
        consume::commits_are_seen,
        consume::seeks_go_back_and_forth,
        consume::only_an_empty_group_is_committed_for,
        log::deleted_records_are_gone,
        log::topics_are_described_and_altered,
        log::a_deleted_topic_leaves_nothing,
        members::members_share_and_hand_over,
        members::a_late_commit_is_fenced,
        members::a_silent_member_loses_its_partitions,
        transactions::records_and_offsets_are_stored_together,
        transactions::an_aborted_transaction_leaves_nothing,
        transactions::a_refused_record_is_found,
        transactions::whoever_takes_the_identity_fences_the_holder,
        transactions::an_offset_of_anothers_partition_is_refused,
    ];
    let mut failures = Vec::new();
    for (name, case) in cases {
        println!("conformance: {name}");
        if let Err(error) = case(broker.clone()).await {
            failures.push(format!("{name}: {error:#}"));
        }
    }
    failures
}

/// Awaits, but not for ever.
async fn within<T>(what: &str, future: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(PATIENCE, future).await.map_err(|_| anyhow!("no {what} within {} s", PATIENCE.as_secs()))
}

fn fresh(name: &str) -> String {
    format!("conformance-{name}-{}", uuid::Uuid::new_v4().simple())
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

async fn topic(broker: &Arc<dyn Broker>, name: &str, partitions: i32) -> Result<Arc<str>> {
    let name = fresh(name);
    let new = NewTopic { name: name.clone(), partitions: Some(partitions), replication: Some(1), ..NewTopic::default() };
    within("answer to create_topics", broker.admin().create_topics(vec![new])).await??;
    let known = within("answer to learn_topic", broker.producer().learn_topic(&name, PATIENCE)).await?;
    ensure!(known.as_ref().ok() == Some(&partitions), "learn_topic after create_topics: {known:?}");
    Ok(name.into())
}

fn record(key: Option<&str>, value: &str) -> Record {
    let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    Record { key: key.map(bytes), value: Some(bytes(value)), headers: Vec::new(), timestamp_ms: None }
}

fn to(topic: &Arc<str>, partition: impl Into<Option<i32>>, record: Record) -> Outgoing {
    Outgoing { topic: topic.clone(), partition: partition.into(), record }
}

async fn produce(broker: &Arc<dyn Broker>, records: Vec<Outgoing>) -> Result<Vec<Position>> {
    let acks = within("acknowledgement", broker.producer().send(records)).await?;
    acks.into_iter().map(|ack| ack.map_err(anyhow::Error::from)).collect()
}

fn config(group: Option<&str>, topics: &[&Arc<str>], start: StartOffset) -> ConsumerConfig {
    let topics = topics.iter().map(|topic| (*topic).clone()).collect();
    ConsumerConfig { group: group.map(str::to_owned), topics, instance: None, start, buffer_bytes: 1 << 20, transactional_id: None }
}

/// A consumer with what it was assigned.
struct Reader {
    consumer: Box<dyn Consumer>,
    assigned: Vec<Assigned>,
}

impl Reader {
    /// Begins to read, and waits until `partitions` partitions are assigned.
    async fn start(broker: &Arc<dyn Broker>, config: ConsumerConfig, partitions: usize) -> Result<Self> {
        let mut reader = Self { consumer: broker.consumer(config)?, assigned: Vec::new() };
        while reader.assigned.len() < partitions {
            if let Event::Records(batch) = reader.event("assignment").await? {
                bail!("records of {} before all partitions were assigned, in a group of one", batch.partition);
            }
        }
        Ok(reader)
    }

    /// The next event that is not trouble; keeps the books of the assignment.
    async fn event(&mut self, what: &str) -> Result<Event> {
        loop {
            let event = within(what, self.consumer.next()).await?;
            match &event {
                Event::Assigned(assigned) => self.assigned.extend(assigned.iter().cloned()),
                Event::Revoking(revoking) => self.assigned.retain(|one| !revoking.partitions.contains(&one.partition)),
                Event::Trouble(_) | Event::Recovered => continue,
                Event::Records(_) | Event::Expired { .. } => {}
            }
            return Ok(event);
        }
    }

    /// Reads this many records.
    async fn read(&mut self, count: usize) -> Result<Vec<(Position, Record)>> {
        let mut records = Vec::new();
        while records.len() < count {
            match self.event(&format!("record {} of {count}", records.len() + 1)).await? {
                Event::Records(batch) => {
                    for (offset, record) in batch.records {
                        records.push((Position { partition: batch.partition.clone(), offset }, record));
                    }
                }
                Event::Assigned(_) => {}
                other => bail!("unexpected {other:?}"),
            }
        }
        ensure!(records.len() == count, "{} records instead of {count}", records.len());
        Ok(records)
    }

    fn position(&self, partition: &TopicPartition) -> Option<i64> {
        self.assigned.iter().find(|one| one.partition == *partition).map(|one| one.position)
    }

    async fn close(self) -> Result<()> {
        within("end of close", self.consumer.close()).await
    }
}

fn value(record: &Record) -> String {
    String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned()
}
