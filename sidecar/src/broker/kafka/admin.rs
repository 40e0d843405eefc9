//! Questions to the broker, and topics.
//!
//! librdkafka's calls block, so they run on blocking threads. One client without a group serves everything that needs none; a question
//! about a group's offsets takes a client of its own that never joins.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic as KafkaTopic, TopicReplication},
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    error::KafkaError,
    message::Message as _,
    metadata::Metadata,
    topic_partition_list::{Offset, TopicPartitionList},
    types::RDKafkaErrorCode as Code,
};
use tokio::sync::Semaphore;

use super::{
    error::{broker_error, code_error},
    health::{Health, Leaderless, Reporter},
    producer::Topics,
    settings::Settings,
    together::{Gather, Together},
};
use crate::{
    broker::{Admin, BrokerError, BrokerErrorKind, BrokerNode, Commit, GroupInfo, NewTopic, TopicChange, TopicInfo},
    record::{Position, TopicPartition},
};

mod manage;

/// How long a question may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a topic may take from its creation until the brokers know it.
const VISIBLE: Duration = Duration::from_secs(10);
/// After how long a topic that is unknown is asked for again.
pub(super) const AGAIN: Duration = Duration::from_millis(50);
/// How many questions run at a time.
const AT_ONCE: usize = 4;
/// How long who asks for the ends of partitions waits for others, to ask with them.
const GATHER: Duration = Duration::from_millis(100);

/// Asks the broker.
pub(super) struct Asker {
    client: Arc<BaseConsumer<Reporter>>,
    settings: Settings,
    health: Arc<Health>,
    topics: Arc<Topics>,
    slots: Semaphore,
    /// All routes of a table ask for all topics at once, and where there are many it is a large answer.
    listed: Together<Listed>,
    /// Every route asks for those of its partitions, all the time.
    ends: Gather<TopicPartition, Result<i64, BrokerError>>,
}

type Listed = Result<Arc<BTreeMap<String, i32>>, BrokerError>;

impl std::fmt::Debug for Asker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asker").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Asker {
    pub(super) fn open(settings: Settings, health: Arc<Health>, topics: Arc<Topics>) -> Result<Self, BrokerError> {
        let client = BaseConsumer::from_config_and_context(&settings.admin(None), Reporter(health.clone()))
            .map_err(|error| broker_error("kafka", &error))?;
        Ok(Self {
            client: Arc::new(client),
            settings,
            health,
            topics,
            slots: Semaphore::new(AT_ONCE),
            listed: Together::default(),
            ends: Gather::default(),
        })
    }

    /// Runs a blocking question.
    async fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&BaseConsumer<Reporter>) -> Result<T, BrokerError> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let _slot = self.slots.acquire().await;
        let client = self.client.clone();
        tokio::task::spawn_blocking(move || call(&client))
            .await
            .unwrap_or_else(|error| Err(BrokerError::new(BrokerErrorKind::Other, format!("kafka: the question was not finished: {error}"))))
    }

    /// A topic's partition count, or `None` if the broker answered that there is none.
    pub(super) async fn partitions(&self, topic: String, deadline: Duration) -> Result<Option<i32>, BrokerError> {
        check_name(&topic)?;
        let until = Instant::now() + deadline;
        let answer = tokio::time::timeout(
            deadline,
            self.ask(move |client| partition_count(client, &topic, until.saturating_duration_since(Instant::now()))),
        );
        answer.await.unwrap_or_else(|_| {
            let detail = format!("Kafka {} did not say within {deadline:?} whether the topic exists", self.health.bootstrap());
            Err(BrokerError::new(BrokerErrorKind::Unreachable, detail))
        })
    }

    async fn list(&self) -> Listed {
        let result = self.ask(|client| {
            let metadata = client.fetch_metadata(None, TIMEOUT).map_err(|error| broker_error("list of topics", &error))?;
            Ok(Arc::new(topics_of(&metadata)))
        });
        let result = result.await;
        for (topic, partitions) in result.iter().flat_map(|topics| topics.iter()) {
            self.topics.put(topic, *partitions);
        }
        result
    }

    async fn create(&self, topics: Vec<NewTopic>) -> Result<(), BrokerError> {
        let _slot = self.slots.acquire().await;
        let (config, health) = (self.settings.admin(None), self.health.clone());
        let runtime = tokio::runtime::Handle::current();
        // The client has a thread of its own, and its drop waits for it.
        let created = tokio::task::spawn_blocking(move || {
            let admin =
                AdminClient::from_config_and_context(&config, Reporter(health)).map_err(|error| broker_error("create topics", &error))?;
            runtime.block_on(create(&admin, &topics))
        });
        created.await.unwrap_or_else(|error| Err(BrokerError::new(BrokerErrorKind::Other, format!("create topics: {error}"))))
    }

    /// Deletes records, by a client of its own.
    async fn delete(&self, below: Vec<(TopicPartition, i64)>) -> Result<(), BrokerError> {
        let _slot = self.slots.acquire().await;
        let (config, health) = (self.settings.admin(None), self.health.clone());
        let runtime = tokio::runtime::Handle::current();
        let deleted = tokio::task::spawn_blocking(move || {
            let what = |partition: &TopicPartition| format!("delete records of {partition}");
            let mut list = TopicPartitionList::with_capacity(below.len());
            for (partition, offset) in &below {
                list.add_partition_offset(&partition.topic, partition.partition, Offset::Offset(*offset))
                    .map_err(|error| broker_error(what(partition), &error))?;
            }
            let admin =
                AdminClient::from_config_and_context(&config, Reporter(health)).map_err(|error| broker_error("delete records", &error))?;
            let options = AdminOptions::new().request_timeout(Some(TIMEOUT)).operation_timeout(Some(TIMEOUT));
            let answer = runtime.block_on(admin.delete_records(&list, &options)).map_err(|error| broker_error("delete records", &error))?;
            for (partition, _) in &below {
                let element = answer.find_partition(&partition.topic, partition.partition);
                let element = element.ok_or_else(|| BrokerError::new(BrokerErrorKind::Other, format!("{}: no answer", what(partition))))?;
                element.error().map_err(|error| broker_error(what(partition), &error))?;
            }
            Ok(())
        });
        deleted.await.unwrap_or_else(|error| Err(BrokerError::new(BrokerErrorKind::Other, format!("delete records: {error}"))))
    }

    /// Waits until topics that the controller created are known to the broker that is asked: it learns of them a moment later.
    async fn wait_visible(&self, topics: Vec<String>) -> Result<(), BrokerError> {
        let until = Instant::now() + VISIBLE;
        for topic in topics {
            loop {
                if let Some(count) = self.partitions(topic.clone(), TIMEOUT).await? {
                    self.topics.put(&topic, count);
                    break;
                }
                if Instant::now() > until {
                    let detail = format!("topic `{topic}` was created, but is not visible after {VISIBLE:?}: try again");
                    return Err(BrokerError::new(BrokerErrorKind::Other, detail));
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
        Ok(())
    }

    /// Serves log lines and errors of the shared client. Called now and then by the keeper.
    pub(super) fn serve(&self) {
        for _ in 0..1000 {
            if self.client.poll(Duration::ZERO).is_none() {
                break;
            }
        }
    }

    /// Asks whether the broker is there. Blocks, at most a few seconds.
    pub(super) fn probe(&self) {
        let wait = Duration::from_secs(2);
        let broker = self.health.trouble().and_then(|trouble| trouble.broker);
        let leaders = self.health.wants_leaders();
        let metadata = match self.client.fetch_metadata(if leaders { None } else { Some("__consumer_offsets") }, wait) {
            Ok(metadata) => metadata,
            Err(error) => {
                let what = format!("Kafka {} does not answer", self.health.bootstrap());
                return self.health.unanswered(broker_error(what, &error));
            }
        };
        if leaders {
            self.health.set_leaderless(leaderless(&metadata));
        }
        if let Some(broker) = broker {
            // The broker answers if it answers for one of its partitions; one that leads nothing is not needed.
            let led = metadata.topics().iter().find_map(|topic| {
                let partition = topic.partitions().iter().find(|partition| partition.leader() == broker)?;
                Some((topic.name().to_owned(), partition.id()))
            });
            if led.is_some_and(|(topic, partition)| self.client.fetch_watermarks(&topic, partition, wait).is_err()) {
                return;
            }
        }
        self.health.recovered();
    }
}

/// Kafka's rule for a topic's name. librdkafka trusts its callers with it.
pub(super) fn check_name(topic: &str) -> Result<(), BrokerError> {
    let fits = !topic.is_empty()
        && topic.len() <= 249
        && !matches!(topic, "." | "..")
        && topic.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    if fits {
        return Ok(());
    }
    let shown: String = topic.chars().take(100).collect();
    let detail = format!("`{shown}` cannot be a topic: a name has 1 to 249 of the characters a-z, A-Z, 0-9, `.`, `_` and `-`");
    Err(BrokerError::new(BrokerErrorKind::Config, detail))
}

/// A topic's partition count; `None` if there is no such topic.
pub(super) fn partition_count<C: rdkafka::consumer::ConsumerContext>(
    client: &BaseConsumer<C>,
    topic: &str,
    timeout: Duration,
) -> Result<Option<i32>, BrokerError> {
    let what = || format!("topic `{topic}`");
    let metadata = client.fetch_metadata(Some(topic), timeout).map_err(|error| broker_error(what(), &error))?;
    let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else { return Ok(None) };
    match found.error().map(Code::from) {
        None | Some(Code::LeaderNotAvailable) if !found.partitions().is_empty() => Ok(Some(count(found.partitions().len()))),
        None | Some(Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownTopicId) => Ok(None),
        Some(code) => Err(code_error(what(), code)),
    }
}

fn count(partitions: usize) -> i32 {
    i32::try_from(partitions).unwrap_or(i32::MAX)
}

/// The offsets for logical positions or times (`Offset::Offset(ms)`), in one request a broker; for each partition by itself why there is none.
pub(super) fn list_offsets<C: rdkafka::consumer::ConsumerContext>(
    client: &BaseConsumer<C>,
    asked: &[(TopicPartition, Offset)],
    timeout: Duration,
) -> Result<Vec<Result<Offset, BrokerError>>, BrokerError> {
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    let what = || format!("offsets of {} and {} more partitions", asked[0].0, asked.len() - 1);
    let mut list = TopicPartitionList::with_capacity(asked.len());
    for (partition, offset) in asked {
        list.add_partition_offset(&partition.topic, partition.partition, *offset).map_err(|error| broker_error(what(), &error))?;
    }
    let answer = client.offsets_for_times(list, timeout).map_err(|error| broker_error(what(), &error))?;
    let of = |(partition, _): &(TopicPartition, Offset)| {
        let element = answer
            .find_partition(&partition.topic, partition.partition)
            .ok_or_else(|| BrokerError::new(BrokerErrorKind::Other, format!("{partition}: no answer")))?;
        element.error().map_err(|error| broker_error(partition, &error))?;
        Ok(element.offset())
    };
    Ok(asked.iter().map(of).collect())
}

/// The low and the high watermark of each partition.
pub(super) fn watermarks<C: rdkafka::consumer::ConsumerContext>(
    client: &BaseConsumer<C>,
    partitions: &[TopicPartition],
    timeout: Duration,
) -> Result<Vec<(i64, i64)>, BrokerError> {
    let until = Instant::now() + timeout;
    partitions
        .iter()
        .map(|partition| {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            client
                .fetch_watermarks(&partition.topic, partition.partition, left)
                .map_err(|error| broker_error(format!("watermarks of {partition}"), &error))
        })
        .collect()
}

/// A commit's metadata as text. Foreign commits may hold anything, and the binding panics on what is not UTF-8.
pub(super) fn metadata_of(element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>) -> String {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| element.metadata().to_owned())).unwrap_or_default()
}

/// The partitions that nobody leads.
fn leaderless(metadata: &Metadata) -> Vec<Leaderless> {
    let partitions = metadata.topics().iter().flat_map(|topic| topic.partitions().iter().map(move |partition| (topic.name(), partition)));
    let mut found: Vec<Leaderless> = partitions
        .filter(|(_, partition)| partition.leader() < 0)
        .map(|(topic, partition)| Leaderless {
            partition: TopicPartition::new(topic, partition.id()),
            replicas: partition.replicas().to_vec(),
        })
        .collect();
    found.sort_by(|one, other| one.partition.cmp(&other.partition));
    found
}

fn topics_of(metadata: &Metadata) -> BTreeMap<String, i32> {
    metadata
        .topics()
        .iter()
        .filter(|topic| topic.error().is_none_or(|error| Code::from(error) == Code::LeaderNotAvailable) && !topic.partitions().is_empty())
        .map(|topic| (topic.name().to_owned(), count(topic.partitions().len())))
        .collect()
}

impl Admin for Asker {
    fn topics(&self) -> BoxFuture<'_, Result<Arc<BTreeMap<String, i32>>, BrokerError>> {
        Box::pin(self.listed.ask(|| self.list()))
    }

    fn create_topics(&self, topics: Vec<NewTopic>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async move {
            if topics.is_empty() {
                return Ok(());
            }
            for topic in &topics {
                check_name(&topic.name)?;
            }
            let names: Vec<String> = topics.iter().map(|topic| topic.name.clone()).collect();
            self.create(topics).await?;
            self.wait_visible(names).await
        })
    }

    fn watermarks(&self, partition: &TopicPartition) -> BoxFuture<'_, Result<(i64, i64), BrokerError>> {
        let partition = partition.clone();
        Box::pin(async move {
            check_name(&partition.topic)?;
            let found = self.ask(move |client| watermarks(client, &[partition], TIMEOUT)).await;
            if found.as_ref().is_err_and(|error| error.kind == BrokerErrorKind::Unreachable) {
                self.health.look_for_leaders();
            }
            found?.first().copied().ok_or_else(|| BrokerError::new(BrokerErrorKind::Other, "watermarks: no answer"))
        })
    }

    fn readable(&self, from: Vec<Position>) -> BoxFuture<'_, Vec<Result<bool, BrokerError>>> {
        Box::pin(async move {
            let count = from.len();
            let _slot = self.slots.acquire().await;
            let (mut config, health) = (self.settings.admin(Some("mesh-reader")), self.health.clone());
            config.set("enable.partition.eof", "true").set("fetch.wait.max.ms", "50").set("queued.min.messages", "1");
            let asked = tokio::task::spawn_blocking(move || readable(&config, health, &from)).await;
            let asked = asked
                .unwrap_or_else(|error| Err(BrokerError::new(BrokerErrorKind::Other, format!("the question was not finished: {error}"))));
            asked.unwrap_or_else(|error| vec![Err(error); count])
        })
    }

    fn offsets_at(&self, topic: &str, timestamp_ms: i64) -> BoxFuture<'_, Result<Vec<i64>, BrokerError>> {
        let topic = topic.to_owned();
        Box::pin(async move {
            check_name(&topic)?;
            self.ask(move |client| {
                let partitions = partition_count(client, &topic, TIMEOUT)?
                    .ok_or_else(|| BrokerError::new(BrokerErrorKind::UnknownTopic, format!("there is no topic `{topic}`")))?;
                let topic: Arc<str> = topic.into();
                let partitions: Vec<_> = (0..partitions).map(|partition| TopicPartition { topic: topic.clone(), partition }).collect();
                at_time(client, &partitions, timestamp_ms, TIMEOUT)
            })
            .await
        })
    }

    fn committed(&self, group: &str, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Result<Vec<Option<Commit>>, BrokerError>> {
        let group = group.to_owned();
        Box::pin(async move {
            if partitions.is_empty() {
                return Ok(Vec::new());
            }
            for partition in &partitions {
                check_name(&partition.topic)?;
            }
            let _slot = self.slots.acquire().await;
            let (config, health) = (self.settings.admin(Some(&group)), self.health.clone());
            let asked = tokio::task::spawn_blocking(move || {
                let what = format!("committed offsets of group `{group}`");
                let client: BaseConsumer<Reporter> =
                    BaseConsumer::from_config_and_context(&config, Reporter(health)).map_err(|error| broker_error(&what, &error))?;
                committed(&client, &partitions, TIMEOUT).map_err(|error| broker_error(what, &error))
            });
            asked.await.unwrap_or_else(|error| Err(BrokerError::new(BrokerErrorKind::Other, format!("committed offsets: {error}"))))
        })
    }

    fn commit_for(&self, group: &str, offsets: Vec<Commit>) -> BoxFuture<'_, Result<(), BrokerError>> {
        let group = group.to_owned();
        Box::pin(async move {
            if offsets.is_empty() {
                return Ok(());
            }
            let list = super::consumer::commit_list(&offsets)?;
            let _slot = self.slots.acquire().await;
            let (config, health) = (self.settings.admin(Some(&group)), self.health.clone());
            let committed = tokio::task::spawn_blocking(move || {
                let what = format!("commit for group `{group}`");
                let client: BaseConsumer<Reporter> =
                    BaseConsumer::from_config_and_context(&config, Reporter(health)).map_err(|error| broker_error(&what, &error))?;
                client.commit(&list, CommitMode::Sync).map_err(|error| match error {
                    // The coordinator takes offsets from who is no member only while the group has none.
                    KafkaError::ConsumerCommit(
                        Code::UnknownMemberId | Code::IllegalGeneration | Code::RebalanceInProgress | Code::StaleMemberEpoch,
                    ) => BrokerError::new(BrokerErrorKind::Fenced, format!("{what}: it has members, and those alone may commit for it")),
                    error => broker_error(what, &error),
                })
            });
            committed.await.unwrap_or_else(|error| Err(BrokerError::new(BrokerErrorKind::Other, format!("commit: {error}"))))
        })
    }

    fn delete_records(&self, below: Vec<(TopicPartition, i64)>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(async move {
            if below.is_empty() {
                return Ok(());
            }
            for (partition, _) in &below {
                check_name(&partition.topic)?;
            }
            // Kafka refuses an offset below the low watermark.
            let partitions: Vec<TopicPartition> = below.iter().map(|(partition, _)| partition.clone()).collect();
            let marks = self.ask(move |client| watermarks(client, &partitions, TIMEOUT)).await?;
            let below = below.into_iter().zip(marks).filter(|((_, offset), (low, _))| offset > low).map(|(one, _)| one).collect::<Vec<_>>();
            if below.is_empty() { Ok(()) } else { self.delete(below).await }
        })
    }

    fn all_watermarks(&self, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Result<Vec<(i64, i64)>, BrokerError>> {
        Box::pin(async move {
            for partition in &partitions {
                check_name(&partition.topic)?;
            }
            self.ask(move |client| manage::all_watermarks(client, &partitions)).await
        })
    }

    fn ends(&self, partitions: Vec<TopicPartition>) -> BoxFuture<'_, Vec<Result<i64, BrokerError>>> {
        Box::pin(async move {
            let question = async |all: Vec<TopicPartition>| {
                let asked = all.clone();
                let answers = self.ask(move |client| Ok(manage::ends(client, &asked))).await;
                let answers = answers.unwrap_or_else(|error| vec![Err(error); all.len()]);
                if answers.iter().any(|answer| answer.as_ref().is_err_and(|error| error.kind == BrokerErrorKind::Unreachable)) {
                    self.health.look_for_leaders();
                }
                all.into_iter().zip(answers).collect()
            };
            self.ends.ask(&partitions, GATHER, question).await
        })
    }

    fn describe_topics(&self, topics: Vec<String>, settings: bool) -> BoxFuture<'_, Result<Vec<TopicInfo>, BrokerError>> {
        Box::pin(self.describe(topics, settings))
    }

    fn alter_topic(&self, topic: &str, change: TopicChange) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(self.alter(topic.to_owned(), change))
    }

    fn delete_topics(&self, topics: Vec<String>) -> BoxFuture<'_, Result<(), BrokerError>> {
        Box::pin(self.delete_whole(topics))
    }

    fn brokers(&self) -> BoxFuture<'_, Result<Vec<BrokerNode>, BrokerError>> {
        Box::pin(self.ask(manage::brokers))
    }

    fn groups(&self) -> BoxFuture<'_, Result<Vec<GroupInfo>, BrokerError>> {
        Box::pin(self.ask(manage::groups))
    }
}

/// Reads each partition until there is a record, or the end.
fn readable(config: &ClientConfig, health: Arc<Health>, from: &[Position]) -> Result<Vec<Result<bool, BrokerError>>, BrokerError> {
    const WHAT: &str = "looking for further records";
    from.iter().try_for_each(|position| check_name(&position.partition.topic))?;
    let client: BaseConsumer<Reporter> =
        BaseConsumer::from_config_and_context(config, Reporter(health)).map_err(|error| broker_error(WHAT, &error))?;
    let until = Instant::now() + TIMEOUT;
    // A leader that is new may not know yet how far its records are committed, and shows readers an earlier end. The question for the end is
    // refused meanwhile, unlike a fetch: so what a fetch says counts only of a leader that has answered the question before.
    let before = leaders(&client, from).map_err(|error| broker_error(WHAT, &error))?;
    let mut answers: Vec<Option<Result<bool, BrokerError>>> = Vec::with_capacity(from.len());
    for position in from {
        answers.push(match watermarks(&client, std::slice::from_ref(&position.partition), TIMEOUT) {
            Ok(marks) if marks.first().is_some_and(|(_, high)| position.offset >= *high) => Some(Ok(false)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        });
    }
    let mut left: Vec<usize> = (0..from.len()).filter(|index| answers[*index].is_none()).collect();
    while !left.is_empty() && Instant::now() < until {
        // The end of a partition is told by its number alone: no two of a number are read at once.
        let mut reading: BTreeMap<i32, usize> = BTreeMap::new();
        left.retain(|index| {
            let later = reading.contains_key(&from[*index].partition.partition);
            if !later {
                reading.insert(from[*index].partition.partition, *index);
            }
            later
        });
        let mut list = TopicPartitionList::with_capacity(reading.len());
        for index in reading.values() {
            let Position { partition, offset } = &from[*index];
            list.add_partition_offset(&partition.topic, partition.partition, Offset::Offset(*offset))
                .map_err(|error| broker_error(WHAT, &error))?;
        }
        client.assign(&list).map_err(|error| broker_error(WHAT, &error))?;
        while !reading.is_empty() && Instant::now() < until {
            let (number, found) = match client.poll(until.saturating_duration_since(Instant::now())) {
                Some(Ok(message)) => (message.partition(), true),
                Some(Err(KafkaError::PartitionEOF(number))) => (number, false),
                // Connections come and go: it is tried until the time is over.
                Some(Err(error)) => {
                    tracing::debug!("kafka: {WHAT}: {error}");
                    continue;
                }
                None => continue,
            };
            if let Some(index) = reading.remove(&number) {
                answers[index] = Some(Ok(found));
            }
        }
    }
    let after = leaders(&client, from).map_err(|error| broker_error(WHAT, &error))?;
    let unclear = |position: &Position, why: &str| {
        let detail = format!("{} from {}: {why}", position.partition, position.offset);
        Err(BrokerError::new(BrokerErrorKind::Unreachable, detail))
    };
    let moved = |position: &Position| before.get(&position.partition).is_none_or(|leader| after.get(&position.partition) != Some(leader));
    let answer = |(position, answer): (&Position, Option<_>)| match answer {
        Some(Ok(false)) if moved(position) => unclear(position, "its leader changed meanwhile"),
        Some(answer) => answer,
        None => unclear(position, &format!("nothing was read within {TIMEOUT:?}")),
    };
    Ok(from.iter().zip(answers).map(answer).collect())
}

/// The brokers that lead partitions; one that nobody leads is left out.
fn leaders<C: rdkafka::consumer::ConsumerContext>(
    client: &BaseConsumer<C>,
    positions: &[Position],
) -> Result<BTreeMap<TopicPartition, i32>, KafkaError> {
    let topics: BTreeSet<&Arc<str>> = positions.iter().map(|position| &position.partition.topic).collect();
    let mut leaders = BTreeMap::new();
    for name in topics {
        let metadata = client.fetch_metadata(Some(name), TIMEOUT)?;
        let partitions = metadata.topics().iter().filter(|topic| *topic.name() == **name).flat_map(|topic| topic.partitions());
        leaders.extend(
            partitions
                .filter(|partition| partition.leader() >= 0)
                .map(|partition| (TopicPartition { topic: name.clone(), partition: partition.id() }, partition.leader())),
        );
    }
    Ok(leaders)
}

/// The first offset of each partition that is not older; the high watermark where there is none.
pub(super) fn at_time<C: rdkafka::consumer::ConsumerContext>(
    client: &BaseConsumer<C>,
    partitions: &[TopicPartition],
    timestamp_ms: i64,
    timeout: Duration,
) -> Result<Vec<i64>, BrokerError> {
    // Negative values are logical offsets to Kafka; no record is older than the epoch.
    let asked: Vec<_> = partitions.iter().map(|partition| (partition.clone(), Offset::Offset(timestamp_ms.max(0)))).collect();
    let found = list_offsets(client, &asked, timeout)?;
    partitions
        .iter()
        .zip(found)
        .map(|(partition, offset)| match offset? {
            Offset::Offset(offset) if offset >= 0 => Ok(offset),
            _ => Ok(watermarks(client, std::slice::from_ref(partition), timeout)?.first().map_or(0, |(_, high)| *high)),
        })
        .collect()
}

/// The committed offsets of the client's group, in the order of the partitions.
pub(super) fn committed<C: rdkafka::consumer::ConsumerContext>(
    client: &BaseConsumer<C>,
    partitions: &[TopicPartition],
    timeout: Duration,
) -> Result<Vec<Option<Commit>>, KafkaError> {
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for partition in partitions {
        list.add_partition(&partition.topic, partition.partition);
    }
    let answer = client.committed_offsets(list, timeout)?;
    partitions
        .iter()
        .map(|partition| {
            let Some(element) = answer.find_partition(&partition.topic, partition.partition) else { return Ok(None) };
            element.error()?;
            match element.offset() {
                Offset::Offset(offset) if offset >= 0 => {
                    Ok(Some(Commit { partition: partition.clone(), offset, metadata: metadata_of(&element) }))
                }
                _ => Ok(None),
            }
        })
        .collect()
}

async fn create(admin: &AdminClient<Reporter>, topics: &[NewTopic]) -> Result<(), BrokerError> {
    let new: Vec<KafkaTopic<'_>> = topics
        .iter()
        .map(|topic| {
            let replication = TopicReplication::Fixed(topic.replication.unwrap_or(-1));
            let new = KafkaTopic::new(&topic.name, topic.partitions.unwrap_or(-1), replication);
            topic.config.iter().fold(new, |new, (key, value)| new.set(key, value))
        })
        .collect();
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT)).operation_timeout(Some(TIMEOUT));
    let results = admin.create_topics(&new, &options).await.map_err(|error| broker_error("create topics", &error))?;
    for result in results {
        match result {
            Ok(topic) => tracing::info!(topic, "kafka: topic created"),
            Err((_, Code::TopicAlreadyExists)) => {}
            Err((topic, code)) => return Err(code_error(format!("create topic `{topic}`"), code)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "A.b_c-9", &"x".repeat(249)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "ä", "a b", "a\0", &"x".repeat(250)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
