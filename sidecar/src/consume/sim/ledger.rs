//! The model of a simulation: what was published, what the service said, what is stored and committed, and what must hold of all that.
//!
//! It knows the promises, not the loop: it sees what crosses the seams (deliveries, answers, publications, commits, assignments) and
//! compares it with what the design says.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_routing::{Destinations, Order, Route};

use tokio::time::Instant;

use super::{
    chance::Chance,
    plan::{Fault, Plan, Planned},
    service::{Said, reply_value},
    world::Life,
};
use crate::{
    broker::{Assigned, Commit, Outgoing},
    completed,
    deliver::{
        breaker::{Breaker, Verdict},
        budget::{Blame, Budget},
    },
    outcome::{Delivery, Disposition},
    record::{Position, TopicPartition},
};

type Checked = Result<(), String>;

/// How a record ends, by what its service said.
#[derive(Clone, Debug, PartialEq)]
enum End {
    Forward { topics: Vec<Arc<str>>, count: usize, big: bool },
    Void,
    Ignored,
    Dead(&'static str),
}

/// What is published of a record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Publication {
    of: TopicPartition,
    offset: i64,
    topic: String,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Reply(usize),
    Letter(String),
}

#[derive(Debug)]
struct Source {
    planned: Planned,
    /// It does not exist (any more), as after compaction.
    hidden: bool,
    expired: bool,
    deliveries: u32,
    ends: Vec<End>,
}

/// What one life has of one partition.
#[derive(Debug, Default)]
struct Holding {
    /// Nothing below was to be read.
    position: i64,
    /// What this life committed since.
    committed: i64,
    /// Complete above the position, as the commit said.
    complete: BTreeSet<i64>,
    failed: BTreeMap<i64, u32>,
    ended: BTreeSet<i64>,
    assignment: u64,
}

#[derive(Debug, Default)]
struct Owner {
    has: BTreeMap<TopicPartition, Holding>,
    /// Given away, but the last commit is to come.
    leaving: BTreeSet<TopicPartition>,
    /// At the service, with the assignment.
    out: BTreeMap<u64, (TopicPartition, i64, u64)>,
    deliveries: u64,
    assignments: u64,
    trust: Option<Trust>,
    /// When a record of an assignment failed first, as the loop counts: also after the partition went, while the record is at the service.
    first: BTreeMap<(u64, i64), Option<u64>>,
}

/// What a loop thinks of its service: which failures count.
#[derive(Debug)]
struct Trust {
    breaker: Breaker,
    budget: Budget,
    blame: Blame,
    /// From here on it is not known for sure.
    unsure: bool,
}

/// Credit that may have been spent without being seen.
const UNSURE: u32 = 5;

impl Trust {
    fn new(plan: &Plan) -> Self {
        let breaker = &plan.routes[0].breaker;
        let unsure = plan.faults.iter().any(|(_, fault)| matches!(fault, Fault::Swap { .. }));
        Self {
            breaker: Breaker::new(breaker.failures, breaker.open),
            budget: Budget::new(breaker.failures),
            blame: Blame::default(),
            unsure,
        }
    }

    /// Takes note of an answer; says whether it counts as an attempt, should it be a failure. `spends`: it would be the last one.
    fn counts(&mut self, said: &Said, first: &mut Option<u64>, spends: bool) -> bool {
        let note = match said {
            Said::Away => Verdict::Away,
            said if said.fails() => Verdict::Failed,
            _ => Verdict::Good,
        };
        let its_own = note == Verdict::Failed && self.blame.is_the_records(first);
        let counts = its_own || !self.breaker.is_open();
        if note == Verdict::Good {
            self.blame.good();
            self.budget.earn(1);
        }
        // The clock decides whether it is the probe's answer, and the loop may stand still in between.
        self.unsure |= note == Verdict::Failed && self.breaker.is_away();
        if !its_own {
            self.breaker.note(note, Instant::now());
        }
        if spends && note == Verdict::Failed && counts {
            self.unsure |= self.budget.credit() <= UNSURE;
            self.budget.spend();
        }
        counts
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ledger {
    plan: Plan,
    sources: BTreeMap<TopicPartition, Vec<Source>>,
    owners: BTreeMap<(usize, usize), Owner>,
    stored: BTreeMap<Publication, u32>,
    acknowledged: BTreeSet<Publication>,
    /// By destination partition, in order.
    logs: BTreeMap<TopicPartition, Vec<Publication>>,
    /// Commits that were made.
    committed: BTreeMap<TopicPartition, i64>,
    /// What the last of them recorded as complete above it.
    recorded: BTreeMap<TopicPartition, BTreeSet<i64>>,
    /// Below, everything was found complete.
    checked: BTreeMap<TopicPartition, i64>,
    lows: BTreeMap<TopicPartition, i64>,
    /// Failures of sending that may store a record more often than it was answered.
    pub(super) deliveries: u64,
    pub(super) commits: u64,
}

fn lane_key(source: &Source) -> Option<u64> {
    source.planned.key
}

/// What an outgoing record is, in the log.
pub(super) fn name(outgoing: &Outgoing) -> String {
    publication(outgoing).map_or_else(|wrong| wrong, |p| format!("{}/{} {:?}", p.of, p.offset, p.what))
}

/// What a record that the loop sends is about.
fn publication(outgoing: &Outgoing) -> Result<Publication, String> {
    let record = &outgoing.record;
    let topic = outgoing.topic.to_string();
    let header = |name: &str| record.header_str(name).ok_or_else(|| format!("a record for {topic} without the header {name}"));
    let number = |text: &str| text.parse::<i64>().map_err(|_| format!("`{text}` is no number"));
    if let Ok(reason) = header("mesh-dlq-reason") {
        let partition = number(header("mesh-dlq-partition")?)? as i32;
        let of = TopicPartition::new(header("mesh-dlq-topic")?, partition);
        let (offset, what) = (number(header("mesh-dlq-offset")?)?, What::Letter(reason.to_owned()));
        return Ok(Publication { of, offset, topic, what });
    }
    let cause = header("mesh-cause")?;
    let words: Vec<&str> = cause.split([' ', '/']).collect();
    let [_, source, partition, offset, index] = words[..] else { return Err(format!("the cause `{cause}`")) };
    let of = TopicPartition::new(source, number(partition)? as i32);
    Ok(Publication { of, offset: number(offset)?, topic, what: What::Reply(number(index)? as usize) })
}

/// What an answer to this attempt means. `None`: it is tried again.
fn end(route: &Route, attempt: u32, said: &Said) -> Option<End> {
    let again = || (attempt >= route.retry.attempts).then_some(End::Dead("attempts"));
    let forward = |topics: &Destinations, count, big| match topics {
        Destinations::Void => End::Void,
        Destinations::Topics(_) if count == 0 => End::Ignored,
        Destinations::Topics(topics) => End::Forward { topics: topics.to_vec(), count, big },
    };
    match *said {
        Said::Reply { status: 204, .. } | Said::Ignore => Some(End::Ignored),
        Said::Reply { status: 202, count, big } => Some(forward(&route.cases[0].to, count, big)),
        Said::Reply { status: 200, count, big } => Some(forward(&route.to, count, big)),
        Said::Away => None,
        _ if said.fails() => again(),
        _ => Some(End::Dead("status")),
    }
}

impl Ledger {
    pub(super) fn new(plan: &Plan) -> Self {
        let mut sources = BTreeMap::new();
        for topic in &plan.sources {
            for partition in 0..plan.partitions {
                sources.insert(TopicPartition::new(topic.clone(), partition), Vec::new());
            }
        }
        Self {
            plan: plan.clone(),
            sources,
            owners: BTreeMap::new(),
            stored: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            logs: BTreeMap::new(),
            committed: BTreeMap::new(),
            recorded: BTreeMap::new(),
            checked: BTreeMap::new(),
            lows: BTreeMap::new(),
            deliveries: 0,
            commits: 0,
        }
    }

    /// A record is in a source.
    pub(super) fn published(&mut self, planned: &Planned, position: &Position) {
        let records = self.sources.entry(position.partition.clone()).or_default();
        assert_eq!(records.len() as i64, position.offset, "the source of a simulation has no gaps of its own");
        let place = position.offset as u64 * 64 + position.partition.partition as u64;
        let hidden = Chance::of(self.plan.seed ^ 0x6a9, place).once_in(self.plan.gaps);
        records.push(Source { planned: planned.clone(), hidden, expired: false, deliveries: 0, ends: Vec::new() });
    }

    pub(super) fn exists(&self, partition: &TopicPartition, offset: i64) -> bool {
        self.source(partition, offset).is_some_and(|source| !source.hidden)
    }

    pub(super) fn number(&self, position: &Position) -> Option<u64> {
        self.source(&position.partition, position.offset).map(|source| source.planned.number)
    }

    /// The offset after the newest record.
    pub(super) fn high(&self, partition: &TopicPartition) -> i64 {
        self.sources.get(partition).map_or(0, |records| records.len() as i64)
    }

    fn source(&self, partition: &TopicPartition, offset: i64) -> Option<&Source> {
        self.sources.get(partition)?.get(usize::try_from(offset).ok()?)
    }

    /// The end that a record has without its service: filtered (no letter), or a letter with this reason.
    fn untouched(&self, source: &Source) -> Option<Option<&'static str>> {
        let filtered = self.plan.routes[0].filter.is_some();
        match source.planned.value.as_str() {
            "not json" if filtered => Some(Some("expression")),
            value if filtered && value.contains("\"go\":false") => Some(None),
            _ if source.planned.hops >= self.plan.routes[0].max_hops => Some(Some("hops")),
            _ => None,
        }
    }

    /// Whether a record has its end, with everything that this publishes acknowledged.
    fn complete(&self, partition: &TopicPartition, offset: i64, source: &Source) -> bool {
        let acknowledged = |topic: &str, what: What| {
            self.acknowledged.contains(&Publication { of: partition.clone(), offset, topic: topic.to_owned(), what })
        };
        let letter = |reason: &str| acknowledged(&self.plan.routes[0].dead_letter, What::Letter(reason.to_owned()));
        if source.hidden || source.expired {
            return true;
        }
        if let Some(untouched) = self.untouched(source) {
            return untouched.is_none_or(letter);
        }
        source.ends.iter().any(|end| match end {
            End::Forward { big: true, .. } => letter("reply"),
            End::Forward { topics, count, .. } => {
                topics.iter().all(|topic| (0..*count).all(|index| acknowledged(topic, What::Reply(index))))
            }
            End::Void | End::Ignored => true,
            End::Dead(reason) => letter(reason),
        })
    }

    fn owner(&mut self, life: &Life) -> &mut Owner {
        self.owners.entry((life.process, life.number)).or_default()
    }

    pub(super) fn assigned(&mut self, life: &Life, assigned: &[Assigned]) -> Checked {
        for one in assigned {
            let committed = self.committed.get(&one.partition).copied().unwrap_or(0);
            if one.position < committed {
                return Err(format!("{life} begins {} at {}, but {committed} was committed", one.partition, one.position));
            }
            let ranges = completed::decode(one.position, &one.metadata).unwrap_or_default();
            let recorded: BTreeSet<i64> = ranges.into_iter().flatten().collect();
            let known = self.recorded.get(&one.partition).into_iter().flatten().filter(|offset| **offset >= one.position);
            if let Some(offset) = known.clone().find(|offset| !recorded.contains(offset)) {
                return Err(format!(
                    "{life} begins {}, and {offset}, which was recorded as complete, is not recorded any more",
                    one.partition
                ));
            }
            let owner = self.owner(life);
            owner.assignments += 1;
            let assignment = owner.assignments;
            owner.leaving.remove(&one.partition);
            let holding = Holding { position: one.position, committed: one.position, complete: recorded, assignment, ..Holding::default() };
            owner.has.insert(one.partition.clone(), holding);
        }
        Ok(())
    }

    pub(super) fn revoked(&mut self, life: &Life, partitions: &[TopicPartition], lost: bool) -> Checked {
        let owner = self.owner(life);
        for partition in partitions {
            owner.has.remove(partition).ok_or_else(|| format!("{life} gives {partition} away, which it does not have"))?;
            if !lost {
                owner.leaving.insert(partition.clone());
            }
        }
        Ok(())
    }

    /// The last commits of a revocation were heard.
    pub(super) fn given_away(&mut self, life: &Life, partitions: &[TopicPartition]) -> Checked {
        let owner = self.owner(life);
        owner.leaving.retain(|partition| !partitions.contains(partition));
        Ok(())
    }

    pub(super) fn deleted(&mut self, partition: &TopicPartition, low: i64) {
        self.lows.insert(partition.clone(), low);
    }

    pub(super) fn expired(&mut self, _life: &Life, partition: &TopicPartition, from: i64, to: i64) -> Checked {
        for source in self.sources.get_mut(partition).into_iter().flatten().take(to as usize).skip(from as usize) {
            source.expired = true;
        }
        Ok(())
    }

    /// The service is called.
    pub(super) fn delivered(&mut self, life: &Life, delivery: &Delivery) -> Checked {
        self.deliveries += 1;
        let (partition, offset) = (&delivery.position.partition, delivery.position.offset);
        let what = format!("{life} delivers {partition}/{offset}");
        let source = self.source(partition, offset).ok_or_else(|| format!("{what}, which was never published"))?;
        if source.hidden || self.untouched(source).is_some() {
            return Err(format!("{what}, which is not to be delivered"));
        }
        let (key, first) = (lane_key(source), source.deliveries == 0);
        let records = &self.sources[partition];
        let low = self.lows.get(partition).copied().unwrap_or(0);
        if first {
            let before = records.iter().enumerate().take(offset as usize).skip(low as usize);
            for (earlier, other) in before.filter(|(_, other)| self.plan.same_lane(key, lane_key(other))) {
                let open = other.ends.is_empty() && !other.hidden && !other.expired && self.untouched(other).is_none();
                if open {
                    return Err(format!("{what} for the first time, before {earlier} of its lane has its end"));
                }
            }
        }
        let same = |out: &(TopicPartition, i64, u64)| {
            let other = records.get(out.1 as usize).and_then(lane_key);
            out.0 == *partition && self.plan.same_lane(key, other)
        };
        let owner = self.owners.get(&(life.process, life.number)).ok_or_else(|| format!("{what} without an assignment"))?;
        if let Some((_, other, _)) = owner.out.values().find(|out| same(out)) {
            return Err(format!("{what} while {other} of its lane is at the service"));
        }
        let holding = owner.has.get(partition).ok_or_else(|| format!("{what}, but does not have the partition"))?;
        if offset < holding.position || offset < holding.committed || holding.complete.contains(&offset) {
            return Err(format!("{what}, which is committed as complete ({holding:?})"));
        }
        if holding.ended.contains(&offset) {
            return Err(format!("{what}, which has its end already"));
        }
        let attempt = holding.failed.get(&offset).copied().unwrap_or(0) + 1;
        let unsure = owner.trust.as_ref().is_some_and(|trust| trust.unsure);
        if attempt != delivery.attempt && !(unsure && delivery.attempt < attempt) {
            return Err(format!("{what} as attempt {} instead of {attempt}", delivery.attempt));
        }
        if delivery.record.value.as_deref() != Some(source.planned.value.as_bytes()) {
            return Err(format!("{what} with another value: {:?}", delivery.record.value));
        }
        let most = self.plan.routes.iter().map(|route| route.concurrency).max().unwrap_or(0);
        if owner.out.len() >= most {
            return Err(format!("{what}: more than {most} are at the service"));
        }
        let assignment = holding.assignment;
        let owner = self.owner(life);
        owner.deliveries += 1;
        owner.out.insert(delivery.id, (partition.clone(), offset, assignment));
        if let Some(source) = self.sources.get_mut(partition).and_then(|records| records.get_mut(offset as usize)) {
            source.deliveries += 1;
        }
        Ok(())
    }

    /// The service says something.
    pub(super) fn answered(&mut self, life: &Life, delivery: &Delivery, said: &Said) -> Checked {
        let (partition, offset) = (&delivery.position.partition, delivery.position.offset);
        let mut end = end(&delivery.route, delivery.attempt, said);
        let trust = Trust::new(&self.plan);
        let owner = self.owner(life);
        let Some((_, _, assignment)) = owner.out.remove(&delivery.id) else {
            return Err(format!("{life} is answered {partition}/{offset}, which is not at the service"));
        };
        let trust = owner.trust.get_or_insert(trust);
        let holding = owner.has.get_mut(partition).filter(|holding| holding.assignment == assignment);
        let exhausted = end == Some(End::Dead("attempts"));
        let spends = exhausted && (holding.is_some() || owner.leaving.contains(partition));
        let counts = trust.counts(said, owner.first.entry((assignment, offset)).or_default(), spends);
        let unsure = trust.unsure;
        if !counts && !unsure && exhausted {
            end = None;
        }
        if let Some(holding) = holding {
            match (&end, said) {
                (Some(_), _) if exhausted && unsure => {}
                (Some(_), _) => drop(holding.ended.insert(offset)),
                (None, Said::Away) => {}
                (None, _) if !counts && !unsure => {}
                (None, _) => *holding.failed.entry(offset).or_default() += 1,
            }
        }
        if let (Some(end), Some(source)) = (end, self.sources.get_mut(partition).and_then(|records| records.get_mut(offset as usize))) {
            source.ends.push(end);
        }
        Ok(())
    }

    /// A record is stored.
    pub(super) fn stored(&mut self, outgoing: &Outgoing, position: &Position) -> Checked {
        let publication = publication(outgoing)?;
        let source = self.source(&publication.of, publication.offset).ok_or_else(|| format!("{publication:?} of nothing"))?;
        let number = source.planned.number;
        let expected = match &publication.what {
            What::Reply(index) => {
                let found = source.ends.iter().find_map(|end| match end {
                    End::Forward { topics, count, big } if index < count && topics.iter().any(|topic| **topic == *publication.topic) => {
                        Some(*big)
                    }
                    _ => None,
                });
                let big = found.ok_or_else(|| format!("{publication:?} is stored, but no answer says so: {:?}", source.ends))?;
                reply_value(number, *index, big)
            }
            What::Letter(reason) => {
                let meant = self.untouched(source).flatten() == Some(reason)
                    || source.ends.iter().any(|end| match end {
                        End::Dead(dead) => dead == reason,
                        End::Forward { big, .. } => *big && reason == "reply",
                        _ => false,
                    });
                if !meant || *publication.topic != *self.plan.routes[0].dead_letter {
                    return Err(format!("{publication:?} is stored, but nothing says so: {:?}", source.ends));
                }
                source.planned.value.clone()
            }
        };
        let key = source.planned.key.map(|key| format!("k{key}"));
        if outgoing.record.value.as_deref() != Some(expected.as_bytes())
            || outgoing.record.key.as_deref() != key.as_deref().map(str::as_bytes)
        {
            return Err(format!("{publication:?} is stored with another value or key: {:?}", outgoing.record));
        }
        *self.stored.entry(publication.clone()).or_default() += 1;
        self.logs.entry(position.partition.clone()).or_default().push(publication);
        Ok(())
    }

    pub(super) fn acknowledged(&mut self, outgoing: &Outgoing) -> Checked {
        self.acknowledged.insert(publication(outgoing)?);
        Ok(())
    }

    /// A commit is about to be made.
    pub(super) fn committing(&mut self, life: &Life, commits: &[Commit]) -> Checked {
        for commit in commits {
            self.commits += 1;
            let partition = &commit.partition;
            let what = format!("{life} commits {partition} at {}", commit.offset);
            let owner = self.owner(life);
            if !owner.has.contains_key(partition) && !owner.leaving.contains(partition) {
                return Err(format!("{what}, which it does not have"));
            }
            if commit.offset > self.high(partition) {
                return Err(format!("{what}, beyond the end"));
            }
            let checked = self.checked.get(partition).copied().unwrap_or(0);
            let records = &self.sources[partition];
            for offset in checked..commit.offset {
                if !self.complete(partition, offset, &records[offset as usize]) {
                    return Err(format!("{what}, but {offset} is not complete: {:?}", records[offset as usize]));
                }
            }
            for offset in completed::decode(commit.offset, &commit.metadata).unwrap_or_default().into_iter().flatten() {
                if !records.get(offset as usize).is_some_and(|source| self.complete(partition, offset, source)) {
                    return Err(format!("{what} and records {offset}, which is not complete: {:?}", records.get(offset as usize)));
                }
            }
            self.checked.insert(partition.clone(), checked.max(commit.offset));
        }
        Ok(())
    }

    /// A commit was made.
    pub(super) fn committed(&mut self, life: &Life, commits: &[Commit]) -> Checked {
        for commit in commits {
            let before = self.committed.entry(commit.partition.clone()).or_default();
            if commit.offset < *before {
                return Err(format!("{life} commits {} at {}, back from {before}", commit.partition, commit.offset));
            }
            *before = commit.offset;
            let ranges = completed::decode(commit.offset, &commit.metadata).unwrap_or_default();
            self.recorded.insert(commit.partition.clone(), ranges.into_iter().flatten().collect());
            if let Some(holding) = self.owner(life).has.get_mut(&commit.partition) {
                holding.committed = commit.offset;
            }
        }
        Ok(())
    }

    /// What is not complete yet, in words; `None` if everything is.
    pub(super) fn open(&self) -> Option<String> {
        for (partition, records) in &self.sources {
            for (offset, source) in records.iter().enumerate() {
                if !self.complete(partition, offset as i64, source) {
                    return Some(format!("{partition}/{offset} has no end: {source:?}"));
                }
            }
        }
        None
    }

    /// Where a group must stand at the end.
    pub(super) fn expected(&self) -> BTreeMap<TopicPartition, i64> {
        let of = |(partition, records): (&TopicPartition, &Vec<Source>)| {
            let last = records.iter().rposition(|source| !source.hidden).map_or(0, |last| last as i64 + 1);
            (partition.clone(), last.max(self.lows.get(partition).copied().unwrap_or(0)))
        };
        self.sources.iter().map(of).collect()
    }

    /// What must hold of the whole, at the end.
    pub(super) fn close(&self) -> Checked {
        for (partition, log) in &self.logs {
            self.in_order(partition, log)?;
        }
        let produce = &self.plan.produce;
        if produce.fatal + produce.timed_out == 0 {
            for (publication, stored) in &self.stored {
                let source = self.source(&publication.of, publication.offset);
                let answers = source.map_or(0, |source| source.ends.len() as u32);
                let untouched = source.is_some_and(|source| self.untouched(source).is_some());
                if *stored > answers.max(1) && !untouched {
                    return Err(format!("{publication:?} is stored {stored} times for {answers} answers"));
                }
            }
        }
        Ok(())
    }

    /// Replies and letters of a lane are in order, by their first copies. Those without a key go to any partition, so they have none;
    /// nobody waits for what expired.
    fn in_order(&self, place: &TopicPartition, log: &[Publication]) -> Checked {
        let mut seen = BTreeSet::new();
        let mut last: BTreeMap<(&TopicPartition, Option<u64>), &Publication> = BTreeMap::new();
        // A reply that the broker refused becomes a letter later.
        for publication in log.iter().filter(|p| p.what != What::Letter("reply".to_owned())) {
            let Some(source) = self.source(&publication.of, publication.offset) else { continue };
            let order = self.plan.routes[0].order;
            let unordered = order == Order::None || source.planned.key.is_none() || source.expired || self.untouched(source).is_some();
            if unordered || !seen.insert(publication) {
                continue;
            }
            let key = if order == Order::Key { lane_key(source) } else { None };
            if let Some(before) = last.insert((&publication.of, key), publication)
                && (before.offset, &before.what) > (publication.offset, &publication.what)
            {
                return Err(format!("in {place}, {before:?} is before {publication:?}"));
            }
        }
        Ok(())
    }

    /// How many records ended how, where nothing goes wrong.
    pub(super) fn dispositions(&self) -> BTreeMap<Disposition, u64> {
        let mut counts = BTreeMap::new();
        for source in self.sources.values().flatten().filter(|source| !source.hidden) {
            let disposition = match (self.untouched(source), source.ends.first()) {
                (Some(None), _) => Disposition::Filtered,
                (Some(Some(_)), _) | (None, Some(End::Dead(_) | End::Forward { big: true, .. })) => Disposition::DeadLettered,
                (None, Some(End::Forward { .. })) => Disposition::Forwarded,
                (None, Some(End::Void)) => Disposition::Void,
                (None, Some(End::Ignored)) => Disposition::Ignored,
                (None, None) => continue,
            };
            *counts.entry(disposition).or_default() += 1;
        }
        counts
    }

    /// Whether a life waits for its service, or may do so.
    pub(super) fn waits(&self, life: &Life) -> bool {
        let trust = self.owners.get(&(life.process, life.number)).and_then(|owner| owner.trust.as_ref());
        trust.is_some_and(|trust| trust.unsure || trust.breaker.is_open())
    }

    /// Whether it is known for sure which failures counted.
    pub(super) fn is_sure(&self) -> bool {
        self.owners.values().filter_map(|owner| owner.trust.as_ref()).all(|trust| !trust.unsure)
    }

    /// How many answers the service of a life gave, those that are out left aside.
    pub(super) fn answers(&self, life: &Life) -> u64 {
        self.owners.get(&(life.process, life.number)).map_or(0, |owner| owner.deliveries - owner.out.len() as u64)
    }
}
