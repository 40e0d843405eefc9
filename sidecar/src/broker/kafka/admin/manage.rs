//! Topics described, altered and deleted; groups listed.
//!
//! Invariant: a change of settings leaves those alone that it does not name. Kafka's call replaces all of a topic's, so they are read first:
//! who alters the same topic at the same moment by another tool may be overwritten.

use std::collections::BTreeMap;

use rdkafka::admin::{AlterConfig, ConfigSource, NewPartitions, OwnedResourceSpecifier, ResourceSpecifier};

use super::*;
use crate::broker::PartitionInfo;

/// How many topics are asked for their settings with one request.
const DESCRIBED_AT_ONCE: usize = 100;
/// How many partitions are asked for their ends with one request: librdkafka looks each of them up among all the others.
const ENDS_AT_ONCE: usize = 100;

impl Asker {
    /// Runs calls of an admin client of their own: it has a thread, and its drop waits for it.
    async fn administer<T: Send + 'static>(
        &self,
        what: &'static str,
        call: impl AsyncFnOnce(&AdminClient<Reporter>) -> Result<T, BrokerError> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let _slot = self.slots.acquire().await;
        let (config, health) = (self.settings.admin(None), self.health.clone());
        let runtime = tokio::runtime::Handle::current();
        let done = tokio::task::spawn_blocking(move || {
            let admin = AdminClient::from_config_and_context(&config, Reporter(health)).map_err(|error| broker_error(what, &error))?;
            runtime.block_on(call(&admin))
        });
        done.await.unwrap_or_else(|error| Err(BrokerError::new(BrokerErrorKind::Other, format!("{what}: {error}"))))
    }

    pub(super) async fn describe(&self, topics: Vec<String>, settings: bool) -> Result<Vec<TopicInfo>, BrokerError> {
        for topic in &topics {
            check_name(topic)?;
        }
        let mut found = self
            .ask(move |client| {
                let one = if let [one] = &topics[..] { Some(one.as_str()) } else { None };
                let metadata = client.fetch_metadata(one, TIMEOUT).map_err(|error| broker_error("describe topics", &error))?;
                let mut all: BTreeMap<&str, TopicInfo> = BTreeMap::new();
                for topic in metadata.topics().iter().filter(|topic| !topic.partitions().is_empty()) {
                    let mut partitions: Vec<_> = topic.partitions().iter().collect();
                    partitions.sort_by_key(|partition| partition.id());
                    let partitions = partitions.into_iter().map(|partition| PartitionInfo {
                        leader: Some(partition.leader()).filter(|leader| *leader >= 0),
                        replicas: partition.replicas().to_vec(),
                        in_sync: partition.isr().to_vec(),
                    });
                    let info = TopicInfo { name: topic.name().to_owned(), partitions: partitions.collect(), ..TopicInfo::default() };
                    all.insert(topic.name(), info);
                }
                Ok(topics.iter().filter_map(|topic| all.remove(topic.as_str())).collect::<Vec<_>>())
            })
            .await?;
        if settings {
            let names: Vec<String> = found.iter().map(|topic| topic.name.clone()).collect();
            let mut configs = self.administer("describe topics", async move |admin| settings_of(admin, &names).await).await?;
            for topic in &mut found {
                let settings = configs.remove(&topic.name).unwrap_or_default();
                (topic.config, topic.min_in_sync) = (settings.own, settings.min_in_sync);
            }
        }
        Ok(found)
    }

    pub(super) async fn alter(&self, topic: String, change: TopicChange) -> Result<(), BrokerError> {
        check_name(&topic)?;
        let (name, wanted) = (topic.clone(), change.partitions);
        self.administer("alter topic", async move |admin| alter(admin, &name, change).await).await?;
        self.topics.forget(&topic);
        let until = Instant::now() + VISIBLE;
        while let Some(wanted) = wanted {
            // Whoever is asked learns of it a moment later.
            let count = self.partitions(topic.clone(), TIMEOUT).await?;
            if count.is_some_and(|count| count >= wanted) || Instant::now() > until {
                break;
            }
            tokio::time::sleep(AGAIN).await;
        }
        Ok(())
    }

    pub(super) async fn delete_whole(&self, topics: Vec<String>) -> Result<(), BrokerError> {
        if topics.is_empty() {
            return Ok(());
        }
        for topic in &topics {
            check_name(topic)?;
        }
        let names = topics.clone();
        let deleted = self.administer("delete topics", async move |admin| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let results = admin.delete_topics(&names, &options()).await.map_err(|error| broker_error("delete topics", &error))?;
            all_done("delete topic", results)
        });
        let deleted = deleted.await;
        topics.iter().for_each(|topic| self.topics.forget(topic));
        deleted?;
        let until = Instant::now() + VISIBLE;
        for topic in topics {
            while self.partitions(topic.clone(), TIMEOUT).await?.is_some() && Instant::now() < until {
                tokio::time::sleep(AGAIN).await;
            }
        }
        Ok(())
    }
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(TIMEOUT)).operation_timeout(Some(TIMEOUT))
}

/// The first failure, if there is one.
fn all_done(what: &str, results: Vec<Result<String, (String, Code)>>) -> Result<(), BrokerError> {
    for result in results {
        match result {
            Ok(topic) => tracing::info!(topic, what, "kafka: done"),
            Err((topic, code)) => return Err(code_error(format!("{what} `{topic}`"), code)),
        }
    }
    Ok(())
}

/// The settings of a topic.
#[derive(Default)]
struct TopicSettings {
    /// Those that are its own, and not the broker's.
    own: BTreeMap<String, String>,
    min_in_sync: Option<u32>,
}

/// The settings of topics.
async fn settings_of(admin: &AdminClient<Reporter>, topics: &[String]) -> Result<BTreeMap<String, TopicSettings>, BrokerError> {
    let mut found = BTreeMap::new();
    for part in topics.chunks(DESCRIBED_AT_ONCE) {
        let asked: Vec<ResourceSpecifier<'_>> = part.iter().map(|topic| ResourceSpecifier::Topic(topic)).collect();
        let answers = admin.describe_configs(&asked, &options()).await.map_err(|error| broker_error("settings of topics", &error))?;
        for answer in answers {
            let resource = answer.map_err(|code| code_error("settings of topics", code))?;
            let OwnedResourceSpecifier::Topic(topic) = resource.specifier else { continue };
            // The binding does not tell why. A topic always has settings: the broker's.
            if resource.entries.is_empty() {
                let detail =
                    format!("the broker does not tell the settings of topic `{topic}`: grant the principal DESCRIBE_CONFIGS on it");
                return Err(BrokerError::new(BrokerErrorKind::Unauthorized, detail));
            }
            let min_in_sync = resource.entries.iter().find(|entry| entry.name == "min.insync.replicas");
            let min_in_sync = min_in_sync.and_then(|entry| entry.value.as_ref()?.parse().ok());
            let own = resource.entries.into_iter().filter(|entry| entry.source == ConfigSource::DynamicTopic);
            let own = own.filter_map(|entry| Some((entry.name, entry.value?))).collect();
            found.insert(topic, TopicSettings { own, min_in_sync });
        }
    }
    Ok(found)
}

async fn alter(admin: &AdminClient<Reporter>, topic: &str, change: TopicChange) -> Result<(), BrokerError> {
    let TopicChange { partitions, set, unset } = change;
    if !set.is_empty() || !unset.is_empty() {
        let what = || format!("settings of topic `{topic}`");
        check_settings(admin, topic, &set).await?;
        // Without them all of its other settings would be taken away.
        let settings = settings_of(admin, &[topic.to_owned()]).await?.remove(topic);
        let missing = || BrokerError::new(BrokerErrorKind::Other, format!("{}: the broker did not tell them: nothing was changed", what()));
        let mut settings = settings.ok_or_else(missing)?.own;
        settings.extend(set.clone());
        settings.retain(|name, _| !unset.contains(name));
        let whole = AlterConfig::new(ResourceSpecifier::Topic(topic));
        let whole = settings.iter().fold(whole, |whole, (name, value)| whole.set(name, value));
        let results = admin.alter_configs([&whole], &options()).await.map_err(|error| broker_error(what(), &error))?;
        for result in results {
            result.map_err(|(_, code)| code_error(what(), code))?;
        }
        wait_taken(admin, topic, &set, &unset).await?;
    }
    if let Some(count) = partitions {
        let new = NewPartitions::new(topic, usize::try_from(count).unwrap_or(0));
        let results = admin.create_partitions([&new], &options()).await.map_err(|error| broker_error("more partitions", &error))?;
        all_done("more partitions for topic", results)?;
    }
    Ok(())
}

/// Asks whether a topic could have these settings: by a topic that is not created. The binding (0.39) keeps to itself what the broker says to a change.
async fn check_settings(admin: &AdminClient<Reporter>, topic: &str, set: &BTreeMap<String, String>) -> Result<(), BrokerError> {
    let name = format!("mesh-check-{}", uuid::Uuid::new_v4().simple());
    let new = KafkaTopic::new(&name, 1, TopicReplication::Fixed(-1));
    let new = set.iter().fold(new, |new, (key, value)| new.set(key, value));
    let results = admin.create_topics([&new], &options().validate_only(true)).await;
    // Who may not create topics may alter them all the same.
    let refused = results.unwrap_or_default().into_iter().filter_map(Result::err).map(|(_, code)| code);
    let wrong = refused.into_iter().find(|code| matches!(code, Code::InvalidConfig | Code::PolicyViolation | Code::InvalidRequest));
    wrong.map_or(Ok(()), |code| {
        let set: Vec<String> = set.iter().map(|(name, value)| format!("{name}={value}")).collect();
        Err(BrokerError::new(BrokerErrorKind::Config, format!("topic `{topic}` cannot have {}: {code}", set.join(", "))))
    })
}

/// Waits until the broker tells the settings as they are to be: a refusal is not told otherwise.
async fn wait_taken(
    admin: &AdminClient<Reporter>,
    topic: &str,
    set: &BTreeMap<String, String>,
    unset: &[String],
) -> Result<(), BrokerError> {
    let until = Instant::now() + VISIBLE;
    loop {
        let now = settings_of(admin, &[topic.to_owned()]).await?.remove(topic).unwrap_or_default().own;
        if set.iter().all(|(name, value)| now.get(name) == Some(value)) && !unset.iter().any(|name| now.contains_key(name)) {
            return Ok(());
        }
        if Instant::now() > until {
            let detail = format!(
                "topic `{topic}` has other settings {VISIBLE:?} after the change: the broker refused it, or somebody else changed them"
            );
            return Err(BrokerError::new(BrokerErrorKind::Other, detail));
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// The watermarks of partitions, with two requests a broker.
pub(super) fn all_watermarks(client: &BaseConsumer<Reporter>, partitions: &[TopicPartition]) -> Result<Vec<(i64, i64)>, BrokerError> {
    let (lows, highs) = (positions(client, partitions, Offset::Beginning)?, positions(client, partitions, Offset::End)?);
    // The end was asked for later: it is never below the beginning.
    lows.into_iter().zip(highs).map(|(low, high)| Ok((low?, high?))).collect()
}

/// The ends of partitions, with one request a broker for each hundred.
pub(super) fn ends(client: &BaseConsumer<Reporter>, partitions: &[TopicPartition]) -> Vec<Result<i64, BrokerError>> {
    let of = |part: &[TopicPartition]| positions(client, part, Offset::End).unwrap_or_else(|error| vec![Err(error); part.len()]);
    partitions.chunks(ENDS_AT_ONCE).flat_map(of).collect()
}

/// The offsets at the beginning or the end of partitions.
fn positions(
    client: &BaseConsumer<Reporter>,
    partitions: &[TopicPartition],
    logical: Offset,
) -> Result<Vec<Result<i64, BrokerError>>, BrokerError> {
    let asked: Vec<_> = partitions.iter().map(|partition| (partition.clone(), logical)).collect();
    let number = |(partition, offset): (&TopicPartition, Result<Offset, BrokerError>)| match offset? {
        Offset::Offset(offset) if offset >= 0 => Ok(offset),
        other => Err(BrokerError::new(BrokerErrorKind::Other, format!("watermarks of {partition}: the broker said {other:?}"))),
    };
    Ok(partitions.iter().zip(list_offsets(client, &asked, TIMEOUT)?).map(number).collect())
}

/// The brokers, as the cluster tells clients to reach them.
pub(super) fn brokers(client: &BaseConsumer<Reporter>) -> Result<Vec<BrokerNode>, BrokerError> {
    // One topic keeps the answer small: the brokers are in any.
    let metadata = client.fetch_metadata(Some("__consumer_offsets"), TIMEOUT).map_err(|error| broker_error("list of brokers", &error))?;
    let node = |broker: &rdkafka::metadata::MetadataBroker| BrokerNode {
        id: broker.id(),
        host: broker.host().to_owned(),
        port: u16::try_from(broker.port()).unwrap_or(0),
    };
    let mut brokers: Vec<BrokerNode> = metadata.brokers().iter().map(node).collect();
    brokers.sort_by_key(|broker| broker.id);
    Ok(brokers)
}

/// The groups that the brokers know.
pub(super) fn groups(client: &BaseConsumer<Reporter>) -> Result<Vec<GroupInfo>, BrokerError> {
    let list = client.fetch_group_list(None, TIMEOUT).map_err(|error| broker_error("list of groups", &error))?;
    let of = |group: &rdkafka::groups::GroupInfo| {
        // The binding panics on a name that is not UTF-8.
        let name = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| group.name().to_owned())).ok()?;
        Some(GroupInfo { name, members: group.members().len() })
    };
    let mut groups: Vec<GroupInfo> = list.groups().iter().filter_map(of).collect();
    groups.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(groups)
}
