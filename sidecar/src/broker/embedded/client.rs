//! The producer and the administration.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tokio::sync::oneshot;

use super::{
    Shared,
    log::{Partition, Topic},
    queue::{Job, NotQueued},
    store::Store,
};
use crate::{
    broker::{
        Acks, Admin, BrokerError, BrokerErrorKind, Commit, GroupInfo, NewTopic, Outgoing, PartitionInfo, ProduceError, ProduceErrorKind,
        Producer, TopicChange, TopicInfo,
    },
    record::{Position, TopicPartition},
};

/// See [`Producer`].
#[derive(Debug)]
pub(super) struct EmbeddedProducer(pub(super) Arc<Shared>);

impl Producer for EmbeddedProducer {
    fn send(&self, records: Vec<Outgoing>) -> Acks {
        let count = records.len();
        if count == 0 {
            return Box::pin(std::future::ready(Vec::new()));
        }
        let all = |kind, detail: String| vec![Err(ProduceError { kind, detail }); count];
        let bytes = records.iter().map(|outgoing| outgoing.record.size()).sum();
        let (reply, answer) = oneshot::channel();
        match self.0.submit(Job::Append { records, bytes, reply }) {
            Ok(()) => Box::pin(async move {
                answer.await.unwrap_or_else(|_| {
                    let detail = "the embedded broker stopped before it acknowledged the record".to_owned();
                    vec![Err(ProduceError { kind: ProduceErrorKind::Fatal, detail }); count]
                })
            }),
            Err(NotQueued::Full) => {
                let limit = self.0.config.queue_bytes;
                let detail = format!("embedded broker: {limit} bytes of records wait for the disk already; wait for acknowledgements");
                Box::pin(std::future::ready(all(ProduceErrorKind::QueueFull, detail)))
            }
            Err(NotQueued::Closed) => {
                Box::pin(std::future::ready(all(ProduceErrorKind::Unavailable, "the embedded broker is closed".to_owned())))
            }
        }
    }

    fn known_partitions(&self, topic: &str) -> Option<i32> {
        self.0.catalog.get(topic).map(|topic| topic.count())
    }

    fn learn_topic(&self, topic: &str, deadline: Duration) -> BoxFuture<'_, Result<i32, ProduceError>> {
        if let Some(topic) = self.0.catalog.get(topic) {
            return Box::pin(std::future::ready(Ok(topic.count())));
        }
        let topic = topic.to_owned();
        Box::pin(async move {
            let create = self.0.create_topics(vec![NewTopic { name: topic.clone(), ..NewTopic::default() }]);
            let error = |kind, detail| ProduceError { kind, detail };
            match tokio::time::timeout(deadline, create).await {
                Ok(Ok(counts)) => counts
                    .get(&topic)
                    .copied()
                    .ok_or_else(|| error(ProduceErrorKind::UnknownTopic, format!("topic '{topic}' was not created"))),
                Ok(Err(failure)) if failure.kind == BrokerErrorKind::Config => Err(error(ProduceErrorKind::UnknownTopic, failure.detail)),
                Ok(Err(failure)) => Err(error(ProduceErrorKind::Unavailable, failure.detail)),
                Err(_) => Err(error(
                    ProduceErrorKind::TimedOut,
                    format!("topic '{topic}' was not created within {} ms; the disk may be slow", deadline.as_millis()),
                )),
            }
        })
    }
}

/// See [`Admin`].
#[derive(Debug)]
pub(super) struct EmbeddedAdmin(pub(super) Arc<Shared>);

fn unknown(what: impl std::fmt::Display) -> BrokerError {
    BrokerError::new(BrokerErrorKind::UnknownTopic, format!("embedded broker: there is no {what}; create the topic or publish to it"))
}

/// Waits for the writer's answer.
async fn done(submitted: Result<(), NotQueued>, answer: oneshot::Receiver<Result<(), BrokerError>>) -> Result<(), BrokerError> {
    let closed = || BrokerError::new(BrokerErrorKind::Unreachable, "the embedded broker is closed");
    submitted.map_err(|_| closed())?;
    answer.await.unwrap_or_else(|_| Err(closed()))
}

impl EmbeddedAdmin {
    /// Runs a read on the reader's thread.
    async fn read<T: Send + 'static>(
        &self,
        what: &'static str,
        read: impl FnOnce(&Store) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let (reply, answer) = oneshot::channel();
        let run = Box::new(move |store: &Store| {
            // Nobody may wait any more.
            drop(reply.send(read(store).map_err(|error| store.failed(what, &error))));
        });
        if self.0.read(run).is_err() {
            let detail = "embedded broker: it is closed, or too many reads wait already; try again";
            return Err(BrokerError::new(BrokerErrorKind::Unreachable, detail));
        }
        answer.await.unwrap_or_else(|_| Err(BrokerError::new(BrokerErrorKind::Unreachable, "the embedded broker is closed")))
    }
}

impl Admin for EmbeddedAdmin {
    fn topics(&self) -> BoxFuture<'_, Result<Arc<BTreeMap<String, i32>>, BrokerError>> {
        Box::pin(std::future::ready(Ok(self.0.catalog.counts())))
    }

    fn create_topics(&self, topics: Vec<NewTopic>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async move { self.0.create_topics(topics).await.map(drop) })
    }

    fn watermarks(&self, partition: &TopicPartition) -> BoxFuture<'_, Result<(i64, i64), BrokerError>> {
        let found = self.0.catalog.partition(partition).map(|partition| partition.watermarks());
        Box::pin(std::future::ready(found.ok_or_else(|| unknown(format!("partition {partition}")))))
    }

    fn readable(&self, from: Vec<Position>) -> BoxFuture<'_, Vec<Result<bool, BrokerError>>> {
        Box::pin(async move {
            let mut answers = Vec::with_capacity(from.len());
            for Position { partition, offset } in from {
                answers.push(match self.0.catalog.partition(&partition) {
                    Some(found) => {
                        let (low, high) = found.watermarks();
                        self.read("look for records in", move |store| store.any_from(found.id, offset.max(low), high)).await
                    }
                    None => Err(unknown(format!("partition {partition}"))),
                });
            }
            answers
        })
    }

    fn offsets_at(&self, topic: &str, timestamp_ms: i64) -> BoxFuture<'_, Result<Vec<i64>, BrokerError>> {
        let Some(topic) = self.0.catalog.get(topic) else {
            let error = unknown(format!("topic '{topic}'"));
            return Box::pin(std::future::ready(Err(error)));
        };
        let at = move |store: &Store| {
            let of = |partition: &Arc<Partition>| {
                let (low, high) = partition.watermarks();
                store.offset_at(partition.id, low, high, timestamp_ms)
            };
            topic.partitions.iter().map(of).collect()
        };
        Box::pin(self.read("search by time in", at))
    }

    fn committed(&self, group: &str, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Result<Vec<Option<Commit>>, BrokerError>> {
        let group = group.to_owned();
        let partitions: Vec<_> = partitions.into_iter().map(|name| (self.0.catalog.partition(&name).map(|p| p.id), name)).collect();
        let offsets = move |store: &Store| {
            let of = |(id, partition): (Option<i64>, TopicPartition)| {
                let Some(id) = id else { return Ok(None) };
                let found = store.offset(&group, id)?;
                Ok(found.map(|(offset, metadata)| Commit { partition, offset, metadata }))
            };
            partitions.into_iter().map(of).collect()
        };
        Box::pin(self.read("read offsets of a group from", offsets))
    }

    fn commit_for(&self, group: &str, offsets: Vec<Commit>) -> BoxFuture<'_, Result<(), BrokerError>> {
        let (reply, answer) = oneshot::channel();
        let submitted = self.0.submit(Job::CommitFor { group: group.to_owned(), offsets, reply });
        Box::pin(done(submitted, answer))
    }

    fn delete_records(&self, below: Vec<(TopicPartition, i64)>) -> BoxFuture<'_, Result<(), BrokerError>> {
        let (reply, answer) = oneshot::channel();
        let submitted = self.0.submit(Job::DeleteRecords { below, reply });
        Box::pin(done(submitted, answer))
    }

    fn describe_topics(&self, topics: Vec<String>, _settings: bool) -> BoxFuture<'_, Result<Vec<TopicInfo>, BrokerError>> {
        let found: Vec<_> = topics.iter().filter_map(|name| self.0.catalog.get(name)).collect();
        let describe = move |store: &Store| {
            let of = |topic: &Arc<Topic>| {
                let bytes = topic.partitions.iter().map(|partition| store.bytes(partition.id)).sum::<rusqlite::Result<u64>>()?;
                // It is its only broker.
                let partition = || PartitionInfo { leader: Some(0), replicas: vec![0], in_sync: vec![0] };
                Ok(TopicInfo {
                    name: topic.name.to_string(),
                    partitions: topic.partitions.iter().map(|_| partition()).collect(),
                    config: topic.config.clone(),
                    bytes: Some(bytes),
                    min_in_sync: None,
                })
            };
            found.iter().map(of).collect()
        };
        Box::pin(self.read("describe topics of", describe))
    }

    fn alter_topic(&self, topic: &str, change: TopicChange) -> BoxFuture<'_, Result<(), BrokerError>> {
        let (reply, answer) = oneshot::channel();
        let submitted = self.0.submit(Job::AlterTopic { topic: topic.to_owned(), change, reply });
        Box::pin(done(submitted, answer))
    }

    fn delete_topics(&self, topics: Vec<String>) -> BoxFuture<'_, Result<(), BrokerError>> {
        let (reply, answer) = oneshot::channel();
        let submitted = self.0.submit(Job::DeleteTopics { topics, reply });
        Box::pin(done(submitted, answer))
    }

    fn groups(&self) -> BoxFuture<'_, Result<Vec<GroupInfo>, BrokerError>> {
        let mut groups: BTreeMap<String, usize> = self.0.groups.members().into_iter().collect();
        Box::pin(async move {
            for name in self.read("read the groups of", Store::groups).await? {
                groups.entry(name).or_insert(0);
            }
            Ok(groups.into_iter().map(|(name, members)| GroupInfo { name, members }).collect())
        })
    }
}
