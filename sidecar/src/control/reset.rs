//! A route that is to be read from elsewhere: what that means, and having it done by the owners of its partitions.
//!
//! Invariant: a reset is planned for all partitions before one is touched, and nothing is touched if one of them is refused.
//! Invariant: targets are offsets, whatever was asked for: asking an owner again repeats nothing but the same reset.
//! Invariant: a partition is committed past its owner only while the group has no members, and the broker itself refuses it otherwise.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mesh_proto::v1::{self, reset_request::To};
use mesh_routing::{CompiledTable, Route};

use super::{
    Control,
    commands::reset_at,
    owners::{Owners, besides},
    state::Shared,
};
use crate::{
    broker::{Admin, BrokerError, BrokerErrorKind, Commit},
    command::Reset,
    record::TopicPartition,
};

/// How many questions to the broker are asked at once.
const QUESTIONS: usize = 16;

/// Why an operation was not begun, or not finished.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// There is no table here yet.
    #[error("this sidecar has no routing table yet: {0}")]
    NoTable(String),
    /// The table in force has no such route.
    #[error("there is no route {route} in the table in force; it has: {known}")]
    NoRoute {
        /// What was asked for.
        route: String,
        /// What there is.
        known: String,
    },
    /// It cannot be done as things are, or not to the end.
    #[error("{0}")]
    Refused(String),
    /// Somebody else came first.
    #[error("{0}")]
    Conflict(String),
    /// It is not known how the last step ended.
    #[error("{0}")]
    Unclear(String),
    /// The broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

impl Control {
    /// Plans a reset of a route, and carries it out if the request says so. Dropping the future gives up; owners that were asked may obey until
    /// the request's time is over.
    ///
    /// # Errors
    /// Why nothing was even planned. What happened to each partition is in the response.
    pub async fn reset(&self, request: v1::ResetRequest) -> Result<v1::ResetResponse, OperationError> {
        let route = self.route(&request.route).await?;
        let admin = self.0.broker.admin();
        let partitions = plan(&*admin, &route, &request).await?;
        let refused = partitions.iter().any(|partition| !partition.refused.is_empty());
        let mut response = v1::ResetResponse { route: route.name.to_string(), group: route.group.to_string(), partitions, executed: false };
        if request.execute && !refused {
            execute(&self.0, &route, &mut response.partitions, request.wait_ms).await;
            response.executed = true;
        }
        Ok(response)
    }

    /// The table in force here, with the routes of all services.
    pub(super) async fn whole(&self) -> Result<Arc<CompiledTable>, OperationError> {
        self.0.whole().await?.ok_or_else(|| self.no_table())
    }

    /// All routes of the table in force here.
    pub(super) async fn routes(&self) -> Result<Vec<Arc<Route>>, OperationError> {
        Ok(self.whole().await?.routes.clone())
    }

    pub(super) fn no_table(&self) -> OperationError {
        OperationError::NoTable(self.waiting().unwrap_or_else(|| "`mesh-ctl apply -f FILE` gives it one".into()))
    }

    /// A route of the table in force here. One that runs here is asked about most, and needs no other.
    pub(super) async fn route(&self, name: &str) -> Result<Arc<Route>, OperationError> {
        let own = self.0.table.borrow().as_ref().and_then(|table| table.compiled.route(name).cloned());
        match own {
            Some(own) => Ok(own),
            None => route_of(&*self.whole().await?, name),
        }
    }
}

/// A route of a table.
pub(super) fn route_of(table: &CompiledTable, name: &str) -> Result<Arc<Route>, OperationError> {
    table.route(name).cloned().ok_or_else(|| {
        let known: Vec<&str> = table.routes.iter().map(|route| &*route.name).collect();
        OperationError::NoRoute { route: name.to_owned(), known: known.join(", ") }
    })
}

/// What the broker knows of the partitions that are meant.
struct Facts {
    partition: TopicPartition,
    low: i64,
    high: i64,
    committed: Option<i64>,
    at_time: Option<i64>,
}

async fn plan(admin: &dyn Admin, route: &Route, request: &v1::ResetRequest) -> Result<Vec<v1::PartitionReset>, OperationError> {
    let to =
        request.to.as_ref().ok_or_else(|| OperationError::Invalid("`to` is missing: say where the route is to be read from".to_owned()))?;
    let facts = facts(admin, route, request, to).await?;
    let named = named(route, to)?;
    let mut plan = Vec::with_capacity(facts.len());
    for fact in &facts {
        let target = match to {
            To::Earliest(_) => Ok(fact.low),
            To::Latest(_) => Ok(fact.high),
            To::TimeMs(_) => Ok(fact.at_time.unwrap_or(fact.high)),
            To::Offset(offset) => Ok(*offset),
            To::ShiftBy(by) => match fact.committed {
                Some(committed) => Ok(committed.saturating_add(*by).clamp(fact.low, fact.high)),
                None => Err("nothing is committed there yet, so there is nothing to shift from: name an offset or a time".to_owned()),
            },
            To::Offsets(_) => match named.get(&fact.partition) {
                Some(offset) => Ok(*offset),
                None => continue,
            },
        };
        plan.push(partition_plan(fact, target));
    }
    if let Some(unknown) = named.keys().find(|partition| !facts.iter().any(|fact| fact.partition == **partition)) {
        let detail = format!(
            "{unknown} is no partition of the route's sources ({}), or --topic and --partition leave it out",
            route.from.join(", ")
        );
        return Err(OperationError::Invalid(detail));
    }
    if plan.is_empty() {
        return Err(OperationError::Invalid(format!("no partition of {} is meant: see --topic and --partition", route.from.join(", "))));
    }
    Ok(plan)
}

/// The offsets that the request names, by partition.
fn named(route: &Route, to: &To) -> Result<BTreeMap<TopicPartition, i64>, OperationError> {
    let To::Offsets(offsets) = to else { return Ok(BTreeMap::new()) };
    let mut named = BTreeMap::new();
    for v1::PartitionOffset { topic, partition, offset } in &offsets.offsets {
        let topic = match (topic.as_str(), &route.from[..]) {
            ("", [only]) => only.clone(),
            ("", _) => {
                let from = route.from.join(", ");
                return Err(OperationError::Invalid(format!(
                    "the route reads several topics ({from}): name the topic of partition {partition}"
                )));
            }
            (topic, _) => topic.into(),
        };
        let partition = TopicPartition { topic, partition: *partition };
        if let Some(other) = named.insert(partition.clone(), *offset) {
            return Err(OperationError::Invalid(format!("{partition} is named twice, with {other} and {offset}")));
        }
    }
    Ok(named)
}

fn partition_plan(fact: &Facts, target: Result<i64, String>) -> v1::PartitionReset {
    let Facts { partition, low, high, committed, .. } = fact;
    let (to, refused) = match target {
        Ok(to) if to < *low => (to, format!("offset {to} is below {low}, the oldest that exists: the range is {low} to {high}")),
        Ok(to) if to > *high => (to, format!("offset {to} is above {high}, the end: the range is {low} to {high}")),
        Ok(to) => (to, String::new()),
        Err(why) => (committed.unwrap_or(*low), why),
    };
    let moved = |from: i64, to: i64| u64::try_from(to - from).unwrap_or(0);
    // What the broker deleted is neither delivered again nor skipped.
    let from = committed.map(|from| from.max(*low));
    v1::PartitionReset {
        topic: partition.topic.to_string(),
        partition: partition.partition,
        from: *committed,
        to,
        low: *low,
        high: *high,
        again: from.map_or(0, |from| moved(to, from)),
        skipped: from.map_or(0, |from| moved(from, to)),
        refused,
        ..v1::PartitionReset::default()
    }
}

async fn facts(admin: &dyn Admin, route: &Route, request: &v1::ResetRequest, to: &To) -> Result<Vec<Facts>, OperationError> {
    for topic in &request.topics {
        if !route.from.iter().any(|source| **source == **topic) {
            let from = route.from.join(", ");
            return Err(OperationError::Invalid(format!("topic {topic} is no source of route {}: it reads {from}", route.name)));
        }
    }
    let existing = admin.topics().await?;
    let mut all = Vec::new();
    for topic in route.from.iter().filter(|topic| request.topics.is_empty() || request.topics.iter().any(|wanted| **wanted == ***topic)) {
        let count = existing.get(&**topic).copied().ok_or_else(|| {
            OperationError::Broker(BrokerError::new(BrokerErrorKind::UnknownTopic, format!("source topic {topic} does not exist")))
        })?;
        let partitions: Vec<TopicPartition> = (0..count)
            .filter(|partition| request.partitions.is_empty() || request.partitions.contains(partition))
            .map(|partition| TopicPartition { topic: topic.clone(), partition })
            .collect();
        let committed = admin.committed(&route.group, partitions.clone()).await?;
        let at_time = match to {
            To::TimeMs(time) => admin.offsets_at(topic, *time).await?,
            _ => Vec::new(),
        };
        let marks: Vec<(i64, i64)> = stream::iter(partitions.clone())
            .map(|partition| async move { admin.watermarks(&partition).await })
            .buffered(QUESTIONS)
            .try_collect()
            .await?;
        for ((partition, (low, high)), commit) in partitions.into_iter().zip(marks).zip(committed) {
            let at_time = usize::try_from(partition.partition).ok().and_then(|index| at_time.get(index)).map(|at| (*at).clamp(low, high));
            all.push(Facts { partition, low, high, committed: commit.map(|commit| commit.offset), at_time });
        }
    }
    Ok(all)
}

/// Has the planned partitions reset, and notes what became of each.
async fn execute(shared: &Arc<Shared>, route: &Arc<Route>, plan: &mut [v1::PartitionReset], wait_ms: u64) {
    let mut left: BTreeMap<TopicPartition, i64> =
        plan.iter().map(|reset| (TopicPartition::new(reset.topic.as_str(), reset.partition), reset.to)).collect();
    let mut done: HashMap<TopicPartition, (String, Reset)> = HashMap::new();
    let mut trouble = String::new();
    let mut owners = Owners::new(shared, &route.name, wait_ms);
    while !left.is_empty() && owners.in_time() {
        let partitions = || left.iter().map(|(partition, offset)| (partition.clone(), *offset)).collect();
        if !owners.ask(|owner, until| reset_at(shared, owner, &route.name, partitions(), until)) {
            match commit_for(shared, route, &left).await {
                Ok(()) => {
                    let from = |partition: &TopicPartition| (shared.instance.clone(), Reset::Done { from: left[partition] });
                    done.extend(left.keys().map(|partition| (partition.clone(), from(partition))));
                    break;
                }
                // Whoever is a member may be about to report, or about to leave.
                Err(error) => trouble = error.to_string(),
            }
        }
        match owners.next().await {
            Some((owner, Ok(resets))) => {
                for (partition, reset) in resets {
                    if reset != Reset::NotOwner && left.remove(&partition).is_some() {
                        done.insert(partition, (owner.clone(), reset));
                    }
                }
            }
            Some((_, Err(error))) => trouble = error,
            None => {}
        }
    }
    let silence = owners.silence(&trouble);
    for reset in plan {
        let partition = TopicPartition::new(reset.topic.as_str(), reset.partition);
        match done.remove(&partition) {
            Some((owner, Reset::Done { .. })) => reset.done_by = owner,
            Some((owner, Reset::Failed(reason))) => reset.failed = format!("instance {owner}: {reason}; nothing was changed"),
            Some((_, Reset::NotOwner)) | None => {
                reset.unclear = silence.is_some();
                reset.failed = silence.clone().unwrap_or_else(|| unowned(route, owners.wait(), &trouble));
            }
        }
    }
}

/// Why a partition found nobody who reset it, though all who were asked have answered.
fn unowned(route: &Route, wait: Duration, trouble: &str) -> String {
    let trouble = besides(trouble);
    let (wait, group) = (wait.as_secs_f64(), &route.group);
    format!("no instance owned it within {wait} s{trouble}: is group {group} rebalancing, or read by a client outside of the mesh?")
}

async fn commit_for(shared: &Shared, route: &Route, left: &BTreeMap<TopicPartition, i64>) -> Result<(), BrokerError> {
    let commit =
        |(partition, offset): (&TopicPartition, &i64)| Commit { partition: partition.clone(), offset: *offset, metadata: String::new() };
    shared.broker.admin().commit_for(&route.group, left.iter().map(commit).collect()).await
}
