//! Topics created, altered and deleted, as an operator asks.
//!
//! Invariant: what begins with `__` is not touched: it is the broker's or the mesh's own.
//! Invariant: a topic that a route of the table in force uses is not deleted, unless that is known and said.
//! Invariant: a route's retry and park topics have the partitions of their source: they grow with it, and before it.

use std::collections::BTreeMap;

use mesh_proto::v1;

use super::{
    Control,
    reset::OperationError,
    tail::no_topic,
    topic_list::{Uses, summaries},
};
use crate::broker::{NewTopic, TopicChange};

/// The most topics that are deleted with one request.
const DELETED: usize = 1_000;

impl Control {
    /// Creates a topic.
    ///
    /// # Errors
    /// If it exists, or the broker does not take it.
    pub async fn create_topic(&self, request: v1::CreateTopicRequest) -> Result<v1::CreateTopicResponse, OperationError> {
        let v1::CreateTopicRequest { topic, partitions, replication, config } = request;
        check(&topic)?;
        if partitions < 0 || replication < 0 {
            return Err(OperationError::Invalid(format!(
                "{partitions} partitions and {replication} replicas: 0 takes the broker's default"
            )));
        }
        let admin = self.0.broker.admin();
        if let Some(count) = admin.topics().await?.get(&topic) {
            return Err(OperationError::Refused(format!(
                "topic {topic} exists, with {count} partitions: `topics alter` changes one that exists"
            )));
        }
        let new = NewTopic {
            name: topic.clone(),
            partitions: Some(partitions).filter(|count| *count > 0),
            replication: Some(replication).filter(|count| *count > 0),
            config: config.into_iter().collect(),
        };
        admin.create_topics(vec![new]).await?;
        let partitions = admin.topics().await?.get(&topic).copied().unwrap_or(0);
        tracing::info!(topic, partitions, "a topic was created, as an operator asked");
        Ok(v1::CreateTopicResponse { partitions })
    }

    /// Gives a topic more partitions, or other settings.
    ///
    /// # Errors
    /// If there is no such topic, it would have fewer partitions, or the broker does not take it.
    pub async fn alter_topic(&self, request: v1::AlterTopicRequest) -> Result<v1::AlterTopicResponse, OperationError> {
        let v1::AlterTopicRequest { topic, partitions, config, unset } = request;
        check(&topic)?;
        let admin = self.0.broker.admin();
        let existing = admin.topics().await?;
        let before = existing.get(&topic).copied().ok_or_else(|| OperationError::Invalid(no_topic(&topic, &existing)))?;
        if partitions != 0 && partitions < before {
            return Err(OperationError::Refused(format!(
                "topic {topic} has {before} partitions and cannot have {partitions}: partitions are never taken away; create another topic \
                 and copy into it with `replay`"
            )));
        }
        if let Some(name) = unset.iter().find(|name| config.contains_key(*name)) {
            return Err(OperationError::Invalid(format!("{name} is set and unset at once")));
        }
        let described = admin.describe_topics(vec![topic.clone()], true).await?;
        let settings = described.into_iter().next().map(|topic| topic.config).unwrap_or_default();
        let set: BTreeMap<String, String> = config.into_iter().filter(|(name, value)| settings.get(name) != Some(value)).collect();
        let unset: Vec<String> = unset.into_iter().filter(|name| settings.contains_key(name)).collect();
        let grown = Some(partitions).filter(|count| *count > before);
        let mut changes = changed(&settings, &set, &unset);
        let mut warnings = Vec::new();
        if let Some(grown) = grown {
            for (follower, count) in self.followers(&topic, &existing, grown).await? {
                admin.alter_topic(&follower, TopicChange { partitions: Some(grown), ..TopicChange::default() }).await?;
                changes.push(format!("{follower}: partitions: {count} → {grown}, since it follows {topic}"));
            }
            changes.insert(0, format!("partitions: {before} → {grown}"));
            warnings.push(format!(
                "keys move: a key that was written to one of the {before} partitions may now be written to another, and its later records may \
                 overtake the earlier ones that are not processed yet. What is there stays where it is"
            ));
        }
        if !changes.is_empty() {
            let by = TopicChange { partitions: grown, set, unset };
            admin.alter_topic(&topic, by).await?;
            tracing::warn!(topic, changes = changes.join("; "), "a topic was altered, as an operator asked");
        }
        Ok(v1::AlterTopicResponse { changes, warnings })
    }

    /// Retry and park topics that have fewer partitions than their source is to have, with their counts.
    async fn followers(&self, source: &str, existing: &BTreeMap<String, i32>, wanted: i32) -> Result<Vec<(String, i32)>, OperationError> {
        let Some(table) = self.0.whole().await? else { return Ok(Vec::new()) };
        let followers = table.topics.iter().filter(|topic| topic.follows.as_deref() == Some(source));
        let counted = followers.filter_map(|topic| Some((topic.name.to_string(), *existing.get(&*topic.name)?)));
        Ok(counted.filter(|(_, count)| *count < wanted).collect())
    }

    /// Deletes topics, for good; or says what is in them.
    ///
    /// # Errors
    /// If one does not exist, or a route uses it and the request does not say that this is known.
    pub async fn delete_topics(&self, request: v1::DeleteTopicsRequest) -> Result<v1::DeleteTopicsResponse, OperationError> {
        let v1::DeleteTopicsRequest { mut topics, force, execute } = request;
        topics.sort();
        topics.dedup();
        if topics.is_empty() || topics.len() > DELETED {
            return Err(OperationError::Invalid(format!("`topics` names {} topics: name 1 to {DELETED}", topics.len())));
        }
        let admin = self.0.broker.admin();
        let existing = admin.topics().await?;
        for topic in &topics {
            check(topic)?;
            if !existing.contains_key(topic) {
                return Err(OperationError::Invalid(no_topic(topic, &existing)));
            }
        }
        let uses = self.topic_uses().await?;
        let found = admin.describe_topics(topics.clone(), false).await?;
        let (summaries, _) = summaries(&*admin, &found, &uses).await;
        if execute {
            if !force {
                refuse_used(&topics, &uses)?;
            }
            tracing::warn!(topics = topics.join(", "), force, "topics are deleted, as an operator asked");
            admin.delete_topics(topics).await?;
        }
        Ok(v1::DeleteTopicsResponse { topics: summaries, executed: execute })
    }
}

/// Refuses what is no operator's to change.
fn check(topic: &str) -> Result<(), OperationError> {
    match topic {
        "" => Err(OperationError::Invalid("the topic's name is empty".to_owned())),
        "void" => Err(OperationError::Invalid("`void` is a word of the routing table and no topic: take another name".to_owned())),
        topic if topic.starts_with("__") => Err(OperationError::Refused(format!(
            "topic {topic} is the broker's or the mesh's own: names that begin with `__` are not created, altered or deleted here"
        ))),
        _ => Ok(()),
    }
}

fn refuse_used(topics: &[String], uses: &Uses) -> Result<(), OperationError> {
    let used: Vec<String> = topics
        .iter()
        .filter_map(|topic| {
            let by: Vec<String> = uses.get(topic)?.iter().map(|used| format!("{} ({})", used.route, used.role)).collect();
            Some(format!("{topic} by {}", by.join(", ")))
        })
        .collect();
    if used.is_empty() {
        return Ok(());
    }
    let detail = format!(
        "routes of the table in force use {}: apply a table without them first, or say that it is known (--force)",
        used.join("; ")
    );
    Err(OperationError::Refused(detail))
}

/// The changes of settings, one a line.
fn changed(before: &BTreeMap<String, String>, set: &BTreeMap<String, String>, unset: &[String]) -> Vec<String> {
    let was = |name: &str| before.get(name).map_or("the broker's default", String::as_str);
    let set = set.iter().map(|(name, value)| format!("{name}: {} → {value}", was(name)));
    let unset = unset.iter().map(|name| format!("{name}: {} → the broker's default", was(name)));
    set.chain(unset).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_an_operators_is_refused() {
        assert!(matches!(check("__mesh.control"), Err(OperationError::Refused(_))));
        assert!(matches!((check("void"), check("")), (Err(OperationError::Invalid(_)), Err(OperationError::Invalid(_)))));
        assert!(check("orders").is_ok());
    }

    #[test]
    fn a_topic_in_use_is_named_with_its_routes() {
        let used = |route: &str, role: &str| v1::TopicUse { route: route.into(), role: role.into() };
        let uses = Uses::from([("orders".into(), vec![used("price", "from"), used("intake", "to")])]);
        let error = refuse_used(&["free".into(), "orders".into()], &uses).unwrap_err().to_string();
        assert!(error.contains("orders by price (from), intake (to)") && error.contains("--force") && !error.contains("free"), "{error}");
        assert!(refuse_used(&["free".into()], &uses).is_ok());
    }

    #[test]
    fn changes_say_from_what_to_what() {
        let before = BTreeMap::from([("retention.ms".to_owned(), "1".to_owned())]);
        let set = BTreeMap::from([("retention.ms".to_owned(), "2".to_owned()), ("cleanup.policy".to_owned(), "compact".to_owned())]);
        let said = changed(&before, &set, &["retention.ms".to_owned()]);
        assert_eq!(
            said,
            ["cleanup.policy: the broker's default → compact", "retention.ms: 1 → 2", "retention.ms: 1 → the broker's default"]
        );
    }
}
