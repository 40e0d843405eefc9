//! How far consumer groups are behind: those of routes, and any other that the broker knows.
//!
//! Behind in time is the age of the first record that is still to be read: it is read for that, by a reader of its own.
//!
//! Invariant: reading changes nothing: nobody joins a group, and nothing is committed.
//! Invariant: it ends: what is not known in time is left out, and that is said.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mesh_proto::v1;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    Control,
    reset::{OperationError, route_of},
    state::now_ms,
};
use crate::{
    broker::{Admin, Broker, BrokerError, BrokerErrorKind, Commit, ConsumerConfig, Event, StartOffset},
    record::{Position, TopicPartition},
};

/// How often the ends are asked for again while topics vanish, and the pause before.
const VANISHING: usize = 10;
const PAUSE: Duration = Duration::from_millis(200);
/// The most groups that are looked at with one request.
const GROUPS: usize = 500;
/// How many groups are asked for at once.
const QUESTIONS: usize = 4;
/// How long the first records of all groups together may take to be read.
const TIMES: Duration = Duration::from_secs(10);
/// How long nothing comes until the broker is asked whether there is a record at all.
const QUIET: Duration = Duration::from_secs(1);
/// How much is fetched ahead, in bytes: one record of each partition is wanted.
const BUFFER: usize = 1 << 20;

/// A group that is looked at, and which partitions of it are told in any case.
struct Wanted {
    group: String,
    route: String,
    sources: BTreeSet<TopicPartition>,
}

/// What a group committed, by partition.
type Committed = Vec<(TopicPartition, Option<Commit>)>;

/// When the first record of partitions from an offset on was written; `None`: there is no record.
type Times = HashMap<(TopicPartition, i64), Option<i64>>;

impl Control {
    /// Tells how far groups are behind.
    ///
    /// # Errors
    /// If there is no such route or group, or the broker does not answer.
    pub async fn lag(&self, request: v1::GetLagRequest) -> Result<v1::GetLagResponse, OperationError> {
        let admin = self.0.broker.admin();
        let existing = admin.topics().await?;
        // A broker that forbids it does not keep the rest from being told.
        let known = match admin.groups().await {
            Ok(groups) => Some(groups.into_iter().map(|group| (group.name, group.members)).collect::<BTreeMap<_, _>>()),
            Err(error) if request.all_groups => return Err(error.into()),
            Err(error) => {
                tracing::debug!(%error, "the members of groups are not known");
                None
            }
        };
        let mut left_out = Vec::new();
        let mut wanted = self.wanted(&request, &existing, known.as_ref()).await?;
        if wanted.len() > GROUPS {
            left_out.push(format!("{} of {} groups: name some", wanted.len() - GROUPS, wanted.len()));
            wanted.truncate(GROUPS);
        }
        // Of a group that is no route's it is not known what it reads: where it committed, it does.
        let everything: Vec<TopicPartition> = if wanted.iter().any(|wanted| wanted.route.is_empty()) {
            let own = existing.iter().filter(|(topic, _)| !topic.starts_with("__"));
            own.flat_map(|(topic, count)| partitions_of(topic, *count)).collect()
        } else {
            Vec::new()
        };
        let asked = wanted.into_iter().map(|wanted| {
            let (admin, everything) = (&admin, &everything);
            async move {
                let partitions = if wanted.route.is_empty() { everything.clone() } else { wanted.sources.iter().cloned().collect() };
                let committed = admin.committed(&wanted.group, partitions.clone()).await?;
                Ok::<_, BrokerError>((wanted, partitions.into_iter().zip(committed).collect::<Vec<_>>()))
            }
        });
        let committed: Vec<(Wanted, Committed)> = stream::iter(asked).buffered(QUESTIONS).try_collect().await?;
        // The ends after the commits: nobody seems to be ahead of the end.
        let told =
            |wanted: &Wanted, partition: &TopicPartition, commit: &Option<Commit>| commit.is_some() || wanted.sources.contains(partition);
        let partitions: BTreeSet<TopicPartition> = committed
            .iter()
            .flat_map(|(wanted, found)| found.iter().filter(move |(partition, commit)| told(wanted, partition, commit)))
            .map(|(partition, _)| partition.clone())
            .collect();
        let (marks, unled) = marks(&*admin, partitions).await?;
        if !unled.is_empty() {
            left_out.push(format!("partitions that nobody leads: {}", unled.join(", ")));
        }
        let mut groups = Vec::with_capacity(committed.len());
        for (wanted, found) in committed {
            let found = found.iter().filter(|(partition, commit)| told(&wanted, partition, commit));
            let partitions = found.filter_map(|(partition, commit)| {
                let (low, end) = marks.get(partition).copied()?;
                let committed = commit.as_ref().map(|commit| commit.offset);
                Some(v1::PartitionLag {
                    topic: partition.topic.to_string(),
                    partition: partition.partition,
                    committed,
                    low,
                    end,
                    lag: u64::try_from(end - first_unread(committed, low)).unwrap_or(0),
                    first_unread_ms: None,
                })
            });
            let partitions: Vec<_> = partitions.collect();
            if wanted.route.is_empty() && partitions.is_empty() && request.all_groups && !request.groups.contains(&wanted.group) {
                continue;
            }
            let members = known.as_ref().map(|known| known.get(&wanted.group).copied().unwrap_or(0));
            let members = members.map(|members| u32::try_from(members).unwrap_or(u32::MAX));
            groups.push(v1::GroupLag { group: wanted.group, route: wanted.route, members, partitions });
        }
        if !tell_times(&*self.0.broker, &mut groups).await? {
            left_out.push(format!("the ages of some first records, which were not read within {} s", TIMES.as_secs()));
        }
        Ok(v1::GetLagResponse { groups, now_ms: now_ms(), left_out: left_out.join("; ") })
    }

    /// The groups that are meant.
    async fn wanted(
        &self,
        request: &v1::GetLagRequest,
        existing: &BTreeMap<String, i32>,
        known: Option<&BTreeMap<String, usize>>,
    ) -> Result<Vec<Wanted>, OperationError> {
        let nothing_named = request.routes.is_empty() && request.groups.is_empty() && !request.all_groups;
        let table = match self.whole().await {
            Ok(table) => Some(table),
            // Groups are told without a table, too.
            Err(_) if !nothing_named && request.routes.is_empty() => None,
            Err(error) => return Err(error),
        };
        if let Some(table) = &table {
            request.routes.iter().try_for_each(|name| route_of(table, name).map(drop))?;
        }
        let mut wanted = Vec::new();
        for route in table.iter().flat_map(|table| &table.routes) {
            let named = request.routes.iter().any(|name| **name == *route.name) || request.groups.iter().any(|name| **name == *route.group);
            if nothing_named || named || request.all_groups {
                let sources = route.from.iter().flat_map(|topic| partitions_of(topic, existing.get(&**topic).copied().unwrap_or(0)));
                wanted.push(Wanted { group: route.group.to_string(), route: route.name.to_string(), sources: sources.collect() });
            }
        }
        let mut others: BTreeSet<&String> = request.groups.iter().collect();
        if let Some(known) = known {
            if let Some(missing) = others.iter().find(|name| !known.contains_key(**name) && !wanted.iter().any(|of| of.group == ***name)) {
                let names: Vec<&str> = known.keys().map(String::as_str).collect();
                let near = mesh_routing::nearest(missing, &names).map(|near| format!(": did you mean {near}?"));
                return Err(OperationError::Invalid(format!(
                    "the broker knows no group {missing}{}",
                    near.unwrap_or_else(|| "; --all-groups shows those that there are".to_owned())
                )));
            }
            if request.all_groups {
                others.extend(known.keys());
            }
        }
        let others: Vec<String> = others.into_iter().filter(|name| !wanted.iter().any(|of| of.group == **name)).cloned().collect();
        wanted.extend(others.into_iter().map(|group| Wanted { group, route: String::new(), sources: BTreeSet::new() }));
        Ok(wanted)
    }
}

fn partitions_of(topic: &str, count: i32) -> impl Iterator<Item = TopicPartition> + use<> {
    let name: Arc<str> = topic.into();
    (0..count).map(move |partition| TopicPartition { topic: name.clone(), partition })
}

/// The first offset that is still to be read, of what exists.
fn first_unread(committed: Option<i64>, low: i64) -> i64 {
    committed.map_or(low, |committed| committed.max(low))
}

/// The watermarks of partitions, and the partitions that nobody leads, which have none now.
async fn marks(
    admin: &dyn Admin,
    partitions: BTreeSet<TopicPartition>,
) -> Result<(BTreeMap<TopicPartition, (i64, i64)>, Vec<String>), BrokerError> {
    let mut partitions: Vec<TopicPartition> = partitions.into_iter().collect();
    let mut again = 0;
    let error = loop {
        match admin.all_watermarks(partitions.clone()).await {
            Ok(marks) => return Ok((partitions.into_iter().zip(marks).collect(), Vec::new())),
            Err(error) if error.kind == BrokerErrorKind::Unreachable => break error,
            // Somebody deletes topics meanwhile, for which groups had committed: in what is gone nothing is behind.
            Err(error) if error.kind == BrokerErrorKind::UnknownTopic && again < VANISHING => {
                again += 1;
                sleep(PAUSE).await;
                let there = admin.topics().await?;
                partitions.retain(|partition| there.get(&*partition.topic).is_some_and(|count| partition.partition < *count));
            }
            Err(error) => return Err(error),
        }
    };
    let topics: BTreeSet<String> = partitions.iter().map(|partition| partition.topic.to_string()).collect();
    let described = admin.describe_topics(topics.into_iter().collect(), false).await?;
    let is_led = |partition: &TopicPartition| {
        let topic = described.iter().find(|topic| *topic.name == *partition.topic);
        let number = usize::try_from(partition.partition).ok();
        topic.zip(number).and_then(|(topic, number)| topic.partitions.get(number)).is_some_and(|partition| partition.leader.is_some())
    };
    let (led, unled): (Vec<_>, Vec<_>) = partitions.into_iter().partition(is_led);
    if unled.is_empty() {
        return Err(error);
    }
    let marks = admin.all_watermarks(led.clone()).await?;
    Ok((led.into_iter().zip(marks).collect(), unled.iter().map(ToString::to_string).collect()))
}

/// Finds out when the first unread records were written; whether all of them were read in time. Where there is none, but only gaps and the
/// marks of transactions, the group has read everything.
async fn tell_times(broker: &dyn Broker, groups: &mut [v1::GroupLag]) -> Result<bool, OperationError> {
    let until = Instant::now() + TIMES;
    let mut times = Times::new();
    let mut complete = true;
    for group in groups {
        let place = |lag: &v1::PartitionLag| (TopicPartition::new(lag.topic.as_str(), lag.partition), first_unread(lag.committed, lag.low));
        let missing: BTreeMap<TopicPartition, i64> =
            group.partitions.iter().filter(|lag| lag.lag > 0).map(place).filter(|place| !times.contains_key(place)).collect();
        if !missing.is_empty() {
            complete &= read_times(broker, missing, until, &mut times).await?;
        }
        for lag in group.partitions.iter_mut().filter(|lag| lag.lag > 0) {
            match times.get(&place(lag)) {
                Some(Some(time)) => lag.first_unread_ms = Some(*time),
                Some(None) => lag.lag = 0,
                None => {}
            }
        }
    }
    Ok(complete)
}

/// Reads the first records of partitions, each from its offset.
async fn read_times(
    broker: &dyn Broker,
    mut missing: BTreeMap<TopicPartition, i64>,
    until: Instant,
    times: &mut Times,
) -> Result<bool, OperationError> {
    let admin = broker.admin();
    let mut consumer = broker.consumer(ConsumerConfig::reader(Vec::new(), StartOffset::Earliest, BUFFER))?;
    consumer.assign(missing.iter().map(|(partition, offset)| (partition.clone(), *offset)).collect());
    while !missing.is_empty() && Instant::now() < until {
        match timeout_at(until.min(Instant::now() + QUIET), consumer.next()).await {
            Ok(Event::Records(batch)) => {
                if let Some((_, record)) = batch.records.first()
                    && let Some(offset) = missing.remove(&batch.partition)
                {
                    consumer.unassign(std::slice::from_ref(&batch.partition));
                    times.insert((batch.partition, offset), record.timestamp_ms);
                }
            }
            Ok(_) => {}
            Err(_) => {
                let asked = missing.iter().map(|(partition, offset)| Position { partition: partition.clone(), offset: *offset });
                let asked: Vec<Position> = asked.collect();
                let Ok(answers) = timeout_at(until, admin.readable(asked.clone())).await else { continue };
                let ends = asked.into_iter().zip(answers).filter(|(_, answer)| matches!(answer, Ok(false)));
                for (Position { partition, offset }, _) in ends {
                    missing.remove(&partition);
                    consumer.unassign(std::slice::from_ref(&partition));
                    times.insert((partition, offset), None);
                }
            }
        }
    }
    consumer.close().await;
    Ok(missing.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::fake::Fake,
        record::{Batch, Record},
    };

    fn lag(partition: i32, committed: Option<i64>, end: i64) -> v1::PartitionLag {
        let lag = u64::try_from(end - first_unread(committed, 0)).unwrap_or(0);
        v1::PartitionLag { topic: "in".into(), partition, committed, low: 0, end, lag, first_unread_ms: None }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_unread_record_is_read_and_a_gap_is_no_lag() {
        let fake = Fake::new(&["in"]);
        let mut groups =
            [v1::GroupLag { group: "g".into(), partitions: vec![lag(0, Some(3), 10), lag(1, Some(5), 5)], ..v1::GroupLag::default() }];
        let told = {
            let fake = fake.clone();
            tokio::spawn(async move {
                let events = loop {
                    if let Some(consumer) = fake.0.lock().unwrap().consumers.first() {
                        break consumer.events.clone();
                    }
                    tokio::task::yield_now().await;
                };
                let record = Record { timestamp_ms: Some(77), ..Record::default() };
                let records = vec![(4, record)];
                events.send(Event::Records(Batch { partition: TopicPartition::new("in", 0), records })).await.unwrap();
                events
            })
        };
        assert!(tell_times(&fake, &mut groups).await.unwrap());
        assert_eq!((groups[0].partitions[0].first_unread_ms, groups[0].partitions[1].first_unread_ms), (Some(77), None));
        drop(told.await.unwrap());

        let fake = Fake::new(&["in"]);
        let mut groups = [v1::GroupLag { group: "g".into(), partitions: vec![lag(0, None, 1)], ..v1::GroupLag::default() }];
        assert!(!tell_times(&fake, &mut groups).await.unwrap(), "a broker that sends nothing is not waited for without end");
        assert_eq!(groups[0].partitions[0].lag, 1);
        fake.0.lock().unwrap().readable = false;
        assert!(tell_times(&fake, &mut groups).await.unwrap());
        assert_eq!(groups[0].partitions[0].lag, 0);
    }
}
