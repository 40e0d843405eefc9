//! Where reading begins.
//!
//! Invariant: in a group, a start that was resolved is committed before the first fetch, so that a restart begins at the same place.

use std::{collections::HashSet, sync::Arc, time::Duration};

use rdkafka::{
    consumer::{CommitMode, Consumer as _},
    topic_partition_list::TopicPartitionList,
};

use super::{super::admin, super::error::broker_error, Client, commit_list};
use crate::{
    broker::{Assigned, BrokerError, Commit, StartOffset},
    record::TopicPartition,
};

/// What decides where reading begins.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    /// The group whose commits count.
    pub(super) group: Option<String>,
    /// Where there is none.
    pub(super) start: StartOffset,
    /// Topics that appeared while they were waited for: all their records are new.
    pub(super) appeared: HashSet<Arc<str>>,
}

/// The positions of partitions: the committed ones, and the resolved and now committed starts of the others. Blocks.
pub(super) fn positions(
    client: &Client,
    rule: &Rule,
    partitions: &[TopicPartition],
    timeout: Duration,
) -> Result<Vec<Assigned>, BrokerError> {
    if partitions.is_empty() {
        return Ok(Vec::new());
    }
    let committed = match &rule.group {
        Some(group) => admin::committed(client, partitions, timeout)
            .map_err(|error| broker_error(format!("committed offsets of group `{group}`"), &error))?,
        None => vec![None; partitions.len()],
    };
    let fresh: Vec<TopicPartition> =
        partitions.iter().zip(&committed).filter(|(_, commit)| commit.is_none()).map(|(partition, _)| partition.clone()).collect();
    let starts = resolve(client, rule, &fresh, timeout)?;
    commit(client, rule, &starts)?;
    let mut starts = starts.into_iter();
    Ok(partitions
        .iter()
        .zip(committed)
        .map(|(partition, commit)| match commit {
            Some(commit) => Assigned { partition: partition.clone(), position: commit.offset, metadata: commit.metadata },
            None => {
                let position = starts.next().map_or(0, |start| start.offset);
                Assigned { partition: partition.clone(), position, metadata: String::new() }
            }
        })
        .collect())
}

/// The starts of partitions by the rule, whatever is committed. Blocks.
pub(super) fn resolve(client: &Client, rule: &Rule, partitions: &[TopicPartition], timeout: Duration) -> Result<Vec<Commit>, BrokerError> {
    if partitions.is_empty() {
        return Ok(Vec::new());
    }
    let offsets = match &rule.start {
        StartOffset::At(time) => admin::at_time(client, partitions, *time, timeout)?,
        start => admin::watermarks(client, partitions, timeout)?
            .into_iter()
            .zip(partitions)
            .map(|((low, high), partition)| match start {
                StartOffset::Each(starts) => StartOffset::of_each(starts, partition, low, high),
                StartOffset::Latest if !rule.appeared.contains(&partition.topic) => high,
                _ => low,
            })
            .collect(),
    };
    Ok(partitions
        .iter()
        .zip(offsets)
        .map(|(partition, offset)| Commit { partition: partition.clone(), offset, metadata: String::new() })
        .collect())
}

/// Commits starts, if there is a group to remember them. Blocks.
pub(super) fn commit(client: &Client, rule: &Rule, starts: &[Commit]) -> Result<(), BrokerError> {
    let Some(group) = &rule.group else { return Ok(()) };
    if starts.is_empty() {
        return Ok(());
    }
    let list: TopicPartitionList = commit_list(starts)?;
    client.commit(&list, CommitMode::Sync).map_err(|error| broker_error(format!("commit of the start of group `{group}`"), &error))
}
