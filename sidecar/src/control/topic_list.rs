//! The topics that there are, for an operator: with what is in them, and which routes use them.
//!
//! Invariant: reading changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_proto::v1;
use mesh_routing::{CompiledTable, Destinations};

use super::{Control, reset::OperationError, tail::no_topic};
use crate::{
    broker::{Admin, PartitionInfo, TopicInfo},
    record::TopicPartition,
};

/// The most partitions that are asked for their watermarks for one list.
const COUNTED_PARTITIONS: usize = 20_000;
/// The most topics that are described at once.
const DESCRIBED: usize = 100;

/// How routes use topics, by topic.
pub(super) type Uses = BTreeMap<String, Vec<v1::TopicUse>>;

/// How the routes of a table use topics. Each once: a topic to which several answers go is one destination.
pub(super) fn uses(table: &CompiledTable) -> Uses {
    let mut all: BTreeMap<String, BTreeSet<(String, &'static str)>> = BTreeMap::new();
    let mut add = |topic: &str, route: &str, role| {
        all.entry(topic.to_owned()).or_default().insert((route.to_owned(), role));
    };
    for route in &table.routes {
        for source in &route.from {
            add(source, &route.name, "from");
            let tiers = route.tiers();
            for tier in 1..=tiers {
                add(&route.retry_topic(source, tier), &route.name, "retry");
            }
            if tiers > 0 {
                add(&route.park_topic(source), &route.name, "park");
            }
        }
        for to in std::iter::once(&route.to).chain(route.cases.iter().map(|case| &case.to)) {
            if let Destinations::Topics(topics) = to {
                topics.iter().for_each(|topic| add(topic, &route.name, "to"));
            }
        }
        add(&route.dead_letter, &route.name, "dlq");
    }
    let listed = |uses: BTreeSet<(String, &'static str)>| {
        uses.into_iter().map(|(route, role)| v1::TopicUse { route, role: role.to_owned() }).collect()
    };
    all.into_iter().map(|(topic, uses)| (topic, listed(uses))).collect()
}

impl Control {
    /// How the routes of the table in force here use topics; without a table nobody does.
    ///
    /// # Errors
    /// If the table cannot be read as a whole here.
    pub(super) async fn topic_uses(&self) -> Result<Uses, OperationError> {
        Ok(self.0.whole().await?.as_deref().map(uses).unwrap_or_default())
    }

    /// Lists the topics.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn list_topics(&self, request: v1::ListTopicsRequest) -> Result<v1::ListTopicsResponse, OperationError> {
        let admin = self.0.broker.admin();
        let existing = admin.topics().await?;
        let names: Vec<String> = existing.keys().filter(|name| request.internal || !name.starts_with("__")).cloned().collect();
        let found = admin.describe_topics(names, false).await?;
        let (topics, uncounted) = summaries(&*admin, &found, &self.topic_uses().await?).await;
        Ok(v1::ListTopicsResponse { topics, uncounted })
    }

    /// Describes topics.
    ///
    /// # Errors
    /// If one does not exist, or the broker does not answer.
    pub async fn describe_topics(&self, request: v1::DescribeTopicsRequest) -> Result<v1::DescribeTopicsResponse, OperationError> {
        let names = request.topics;
        if names.is_empty() || names.len() > DESCRIBED {
            return Err(OperationError::Invalid(format!("`topics` names {} topics: name 1 to {DESCRIBED}", names.len())));
        }
        let admin = self.0.broker.admin();
        let existing = admin.topics().await?;
        if let Some(missing) = names.iter().find(|name| !existing.contains_key(*name)) {
            return Err(OperationError::Invalid(no_topic(missing, &existing)));
        }
        let found = admin.describe_topics(names, true).await?;
        let table = self.0.whole().await?;
        let uses = table.as_deref().map(uses).unwrap_or_default();
        let mut topics = Vec::with_capacity(found.len());
        for topic in found {
            let marks = marks(&*admin, std::slice::from_ref(&topic)).await;
            let summary = summary(&topic, &marks, &uses);
            let partition = |(number, partition): (i32, &PartitionInfo)| {
                let marks = marks.get(&TopicPartition::new(topic.name.as_str(), number)).copied();
                v1::PartitionDetail {
                    partition: number,
                    leader: partition.leader.unwrap_or(-1),
                    replicas: partition.replicas.clone(),
                    in_sync: partition.in_sync.clone(),
                    earliest: marks.map(|(low, _)| low),
                    latest: marks.map(|(_, high)| high),
                }
            };
            let partitions = (0..).zip(&topic.partitions).map(partition).collect();
            let declared = table.as_ref().and_then(|table| table.topic(&topic.name));
            let warnings = warnings(&topic, declared.and_then(|declared| declared.spec.partitions));
            topics.push(v1::TopicDetail { summary: Some(summary), partitions, config: topic.config.into_iter().collect(), warnings });
        }
        Ok(v1::DescribeTopicsResponse { topics })
    }
}

/// What deserves a look.
fn warnings(topic: &TopicInfo, declared: Option<u32>) -> Vec<String> {
    let mut warnings = Vec::new();
    let numbers = |wrong: fn(&PartitionInfo) -> bool| {
        let found: Vec<String> =
            topic.partitions.iter().enumerate().filter(|(_, partition)| wrong(partition)).map(|(number, _)| number.to_string()).collect();
        (!found.is_empty()).then(|| found.join(", "))
    };
    if let Some(found) = numbers(|partition| partition.leader.is_none()) {
        warnings
            .push(format!("nobody leads partition {found}: nothing can be written or read there until a broker with a replica is back"));
    }
    if let Some(found) = numbers(|partition| partition.in_sync.len() < partition.replicas.len()) {
        warnings.push(format!("replicas of partition {found} are not in sync: a broker is away, or behind"));
    }
    let count = topic.partitions.len();
    if let Some(declared) = declared.filter(|declared| usize::try_from(*declared).is_ok_and(|declared| declared != count)) {
        warnings.push(format!("the table in force declares {declared} partitions, there are {count}"));
    }
    warnings
}

/// The summaries of topics, and how many were not asked for their records.
pub(super) async fn summaries(admin: &dyn Admin, topics: &[TopicInfo], uses: &Uses) -> (Vec<v1::TopicSummary>, u64) {
    let mut partitions = 0;
    let counted = topics.iter().take_while(|topic| {
        partitions += topic.partitions.len();
        partitions <= COUNTED_PARTITIONS
    });
    let counted = counted.count();
    let marks = marks(admin, &topics[..counted]).await;
    let summaries = topics.iter().map(|topic| summary(topic, &marks, uses)).collect();
    (summaries, (topics.len() - counted) as u64)
}

/// The watermarks of partitions that have a leader. What cannot be found out is left out: a list with gaps is worth more than none.
async fn marks(admin: &dyn Admin, topics: &[TopicInfo]) -> BTreeMap<TopicPartition, (i64, i64)> {
    let mut partitions = Vec::new();
    for topic in topics {
        let name: Arc<str> = topic.name.as_str().into();
        let led = (0..).zip(&topic.partitions).filter(|(_, partition)| partition.leader.is_some());
        partitions.extend(led.map(|(number, _)| TopicPartition { topic: name.clone(), partition: number }));
    }
    match admin.all_watermarks(partitions.clone()).await {
        Ok(marks) => partitions.into_iter().zip(marks).collect(),
        Err(error) => {
            tracing::warn!(%error, "the records of topics cannot be counted");
            BTreeMap::new()
        }
    }
}

fn summary(topic: &TopicInfo, marks: &BTreeMap<TopicPartition, (i64, i64)>, uses: &Uses) -> v1::TopicSummary {
    let mut records = Some(0_u64);
    for number in 0..count(topic.partitions.len()) {
        let found = marks.get(&TopicPartition::new(topic.name.as_str(), number));
        records = records.zip(found).map(|(sum, (low, high))| sum + u64::try_from(high - low).unwrap_or(0));
    }
    v1::TopicSummary {
        name: topic.name.clone(),
        partitions: count(topic.partitions.len()),
        replication: count(topic.partitions.iter().map(|partition| partition.replicas.len()).max().unwrap_or(0)),
        records,
        bytes: topic.bytes,
        uses: uses.get(&topic.name).cloned().unwrap_or_default(),
    }
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled() -> CompiledTable {
        let text = "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: { mesh: m }\nspec:\n  routes:\n  - { name: a, service: s, from: [in], handler: /a, \
                    to: [out], cases: [{ status: 202, to: [out, other] }], retry: { topics: [1m] } }\n  - { name: b, service: s, from: [out], handler: /b, to: void }\n";
        mesh_routing::compile(&mesh_routing::parse("t", text).unwrap()).unwrap()
    }

    #[test]
    fn every_use_of_a_topic_is_told_once() {
        let uses = uses(&compiled());
        let of =
            |topic: &str| uses.get(topic).into_iter().flatten().map(|used| format!("{} {}", used.route, used.role)).collect::<Vec<_>>();
        assert_eq!(of("in"), ["a from"]);
        assert_eq!(of("out"), ["a to", "b from"]);
        assert_eq!((of("other"), of("a.dlq"), of("b.dlq")), (vec!["a to".to_owned()], vec!["a dlq".to_owned()], vec!["b dlq".to_owned()]));
        assert_eq!((of("a.in.retry-1"), of("a.in.park"), of("none").len()), (vec!["a retry".to_owned()], vec!["a park".to_owned()], 0));
    }

    #[test]
    fn what_deserves_a_look() {
        let partition = |leader, in_sync: &[i32]| PartitionInfo { leader, replicas: vec![1, 2], in_sync: in_sync.to_vec() };
        let topic =
            TopicInfo { name: "t".into(), partitions: vec![partition(Some(1), &[1, 2]), partition(None, &[2])], ..TopicInfo::default() };
        let said = warnings(&topic, Some(4));
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].contains("partition 1:") && said[1].contains("partition 1 ") && said[2].contains("declares 4"), "{said:?}");
        // Without the watermarks of all partitions the sum is not known.
        let marks = BTreeMap::from([(TopicPartition::new("t", 0), (3, 10))]);
        let told = summary(&topic, &marks, &Uses::new());
        assert_eq!((told.records, told.partitions, told.replication), (None, 2, 2));
    }
}
