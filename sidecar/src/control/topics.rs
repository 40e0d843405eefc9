//! The topics that a table needs, and those that the control plane itself needs.
//!
//! Invariant: a topic that exists is never altered. One that differs from what the table declares is a warning.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use mesh_routing::{CompiledTable, Route, Start, Topic};

use crate::{
    broker::{Admin, BrokerError, BrokerErrorKind, NewTopic},
    record::TopicPartition,
};

/// Where tables are.
pub(crate) const CONTROL_TOPIC: &str = "__mesh.control";
/// Where instances report.
pub(crate) const STATUS_TOPIC: &str = "__mesh.status";

/// What instances tell each other to do.
pub(crate) const COMMANDS_TOPIC: &str = "__mesh.commands";

/// Which dead letters were sent back.
pub(crate) const REDRIVEN_TOPIC: &str = "__mesh.redriven";

/// Nothing in it ages: old generations are deleted by name.
const CONTROL_CONFIG: &[(&str, &str)] = &[("cleanup.policy", "compact")];
/// Reports come all the time, and every sidecar that starts reads them all: small segments are compacted soon, and what is a day old goes.
const STATUS_CONFIG: &[(&str, &str)] = &[
    ("cleanup.policy", "compact,delete"),
    ("retention.ms", "86400000"),
    ("segment.ms", "3600000"),
    ("segment.bytes", "16777216"),
    ("min.cleanable.dirty.ratio", "0.1"),
];

/// A command is worth nothing after some minutes.
const COMMANDS_CONFIG: &[(&str, &str)] =
    &[("cleanup.policy", "delete"), ("retention.ms", "3600000"), ("segment.ms", "3600000"), ("segment.bytes", "16777216")];
/// The control plane's own topics, with what they must be set to.
pub(crate) const OWN: [(&str, &[(&str, &str)]); 4] =
    [(CONTROL_TOPIC, CONTROL_CONFIG), (STATUS_TOPIC, STATUS_CONFIG), (COMMANDS_TOPIC, COMMANDS_CONFIG), (REDRIVEN_TOPIC, CONTROL_CONFIG)];
/// How long a retry topic keeps its records at least.
const RETRIES_KEPT: Duration = Duration::from_secs(7 * 86_400);

/// How many questions for watermarks are asked at once.
const QUESTIONS: usize = 16;
/// How many topics are created with one request: a table of thousands of routes has as many dead letter topics.
const CREATED_AT_ONCE: usize = 100;

/// A declared topic that exists with another partition count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Differs {
    /// The topic.
    pub(crate) topic: String,
    /// What the table declares.
    pub(crate) declared: i32,
    /// What there is.
    pub(crate) actual: i32,
}

/// What is to be done for a table's topics.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    /// What is missing.
    pub(crate) create: Vec<NewTopic>,
    /// What is different, and stays so.
    pub(crate) differs: Vec<Differs>,
}

/// Compares what a table needs with what there is.
pub(crate) fn plan(table: &CompiledTable, existing: &BTreeMap<String, i32>) -> Plan {
    let mut plan = Plan::default();
    let mut counts: HashMap<&str, i32> = existing.iter().map(|(name, count)| (name.as_str(), *count)).collect();
    // A dead letter, retry or park topic follows its sources: their counts have to be known first.
    let follows = |topic: &&Topic| !topic.dead_letter_of.is_empty() || topic.follows.is_some();
    let (following, other): (Vec<_>, Vec<_>) = table.topics.iter().partition(follows);
    for topic in other.into_iter().chain(following) {
        let declared = match &topic.follows {
            Some(source) => counts.get(&**source).copied(),
            None => topic.spec.partitions.and_then(|count| i32::try_from(count).ok()),
        };
        // Names are unique: one that is created now is not looked at again.
        if let Some(actual) = counts.get(&*topic.name).copied() {
            if let Some(declared) = declared.filter(|declared| *declared != actual) {
                plan.differs.push(Differs { topic: topic.name.to_string(), declared, actual });
            }
            continue;
        }
        // A source that is created with the broker's default count has none here, and its dead letters get that default too.
        let partitions = declared.or_else(|| topic.dead_letter_of.iter().filter_map(|source| counts.get(&**source)).max().copied());
        if let Some(count) = partitions {
            counts.insert(&topic.name, count);
        }
        let retention = retention(topic).map(|retention| ("retention.ms".to_owned(), retention));
        plan.create.push(NewTopic {
            name: topic.name.to_string(),
            partitions,
            replication: topic.spec.replication.map(i32::from),
            config: retention.into_iter().collect(),
        });
    }
    plan
}

/// `retention.ms` of a topic that is created. What waits for its next attempt outlives an outage of some length; what is parked waits until
/// somebody releases it, so it never ages.
fn retention(topic: &Topic) -> Option<String> {
    let millis = |retention: Duration| retention.as_millis().to_string();
    match (&topic.follows, topic.pause) {
        (None, _) => topic.spec.retention.map(millis),
        (Some(_), Some(pause)) => Some(millis(topic.spec.retention.unwrap_or_default().max(pause * 4).max(RETRIES_KEPT))),
        (Some(_), None) => Some("-1".to_owned()),
    }
}

/// Creates the topics that a table needs and that do not exist.
///
/// # Errors
/// What the broker says; [`BrokerErrorKind::Unreachable`] and the like may pass.
pub(crate) async fn ensure(admin: &dyn Admin, table: &CompiledTable) -> Result<Plan, BrokerError> {
    let existing = admin.topics().await?;
    let plan = plan(table, &existing);
    create(admin, &plan.create).await?;
    Ok(plan)
}

/// Creates topics, in portions.
///
/// # Errors
/// What the broker says. Those of earlier portions exist then.
pub(crate) async fn create(admin: &dyn Admin, topics: &[NewTopic]) -> Result<(), BrokerError> {
    for portion in topics.chunks(CREATED_AT_ONCE) {
        admin.create_topics(portion.to_vec()).await?;
    }
    Ok(())
}

/// Creates the control plane's own topics where they do not exist, and checks that the control topic has one partition.
///
/// # Errors
/// What the broker says, or [`BrokerErrorKind::Config`] if the control topic has several partitions.
pub(crate) async fn ensure_own(admin: &dyn Admin) -> Result<(), BrokerError> {
    let existing = admin.topics().await?;
    let missing: Vec<_> = OWN
        .into_iter()
        .filter(|(name, _)| !existing.contains_key(*name))
        .map(|(name, config)| NewTopic {
            name: name.to_owned(),
            partitions: Some(1),
            replication: None,
            config: config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        })
        .collect();
    create(admin, &missing).await?;
    // The order of all records decides who wins, and only a partition has an order.
    match existing.get(CONTROL_TOPIC) {
        None | Some(1) => Ok(()),
        Some(count) => Err(BrokerError::new(
            BrokerErrorKind::Config,
            format!(
                "topic {CONTROL_TOPIC} has {count} partitions and must have exactly one: \
                 delete it, and a sidecar creates it anew (cleanup.policy=compact)"
            ),
        )),
    }
}

/// How many existing records a new route begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteBacklog {
    /// The route.
    pub route: String,
    /// The records that exist and will be delivered.
    pub records: u64,
}

/// Counts what the routes whose groups are not `known` begin with. Routes whose sources do not exist yet begin with nothing.
///
/// # Errors
/// What the broker says.
pub(crate) async fn backlogs(
    admin: &dyn Admin,
    existing: &BTreeMap<String, i32>,
    known: &HashSet<String>,
    after: &CompiledTable,
) -> Result<Vec<RouteBacklog>, BrokerError> {
    let new: Vec<Arc<Route>> = after.routes.iter().filter(|route| !known.contains(&*route.group)).cloned().collect();

    // Each topic's watermarks once, however many routes read it.
    let topics: HashSet<&str> = new.iter().flat_map(|route| &route.from).map(|topic| &**topic).collect();
    let partitions: Vec<TopicPartition> = topics
        .into_iter()
        .flat_map(|topic| {
            let name: Arc<str> = topic.into();
            (0..existing.get(topic).copied().unwrap_or(0)).map(move |partition| TopicPartition::new(name.clone(), partition))
        })
        .collect();
    let mut bounds: HashMap<TopicPartition, (i64, i64)> = HashMap::new();
    let mut answers = stream::iter(partitions)
        .map(|partition| async move { admin.watermarks(&partition).await.map(|bounds| (partition, bounds)) })
        .buffer_unordered(QUESTIONS);
    while let Some(answer) = answers.next().await {
        let (partition, found) = answer?;
        bounds.insert(partition, found);
    }
    let bounds = &bounds;
    let mut counted = stream::iter(new)
        .map(|route| async move {
            let mut records: u64 = 0;
            for topic in &route.from {
                let count = existing.get(&**topic).copied().unwrap_or(0);
                let name: Arc<str> = (**topic).into();
                let partitions: Vec<_> = (0..count).map(|partition| TopicPartition::new(name.clone(), partition)).collect();
                // A group that read before goes on where it was, wherever a new one would begin.
                let committed = admin.committed(&route.group, partitions.clone()).await?;
                let at = match route.start {
                    Start::At(time) if count > 0 => admin.offsets_at(topic, time).await?,
                    _ => Vec::new(),
                };
                for (index, partition) in partitions.iter().enumerate() {
                    let (low, high) = bounds.get(partition).copied().unwrap_or((0, 0));
                    let begin = match (committed.get(index), route.start) {
                        (Some(Some(commit)), _) => commit.offset,
                        (_, Start::Earliest) => low,
                        (_, Start::Latest | Start::Applied) => high,
                        (_, Start::At(_)) => at.get(index).copied().unwrap_or(high),
                    };
                    records += u64::try_from(high - begin.clamp(low, high)).unwrap_or(0);
                }
            }
            Ok::<_, BrokerError>(RouteBacklog { route: route.name.to_string(), records })
        })
        .buffered(QUESTIONS);
    let mut backlogs = Vec::new();
    while let Some(backlog) = counted.next().await {
        backlogs.push(backlog?);
    }
    Ok(backlogs)
}

impl fmt::Display for Differs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { topic, declared, actual } = self;
        write!(f, "topic {topic} exists with {actual} partitions, the table declares {declared}: it stays as it is")
    }
}
