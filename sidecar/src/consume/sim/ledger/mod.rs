//! The model of a simulation: what was published, what the service said, what is stored and committed, and what must hold of all that.
//!
//! It knows the promises, not the loop: it sees what crosses the seams (deliveries, answers, publications, commits, assignments) and
//! compares it with what the design says.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_routing::{Destinations, OnExhausted, Order, Route};

use tokio::time::Instant;

use super::{
    chance::Chance,
    plan::{Plan, Planned, most_attempts},
    service::Said,
    sides::{Commits, Sides, Waiting, is_done},
    world::Life,
};
use crate::{
    broker::{Assigned, Commit, Outgoing},
    completed,
    deliver::{
        breaker::{Breaker, Verdict},
        budget::{Blame, Budget},
    },
    parking::Release,
    record::{Position, TopicPartition},
};

mod calls;
mod close;
mod commits;
mod stored;

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
    /// Into a retry or park topic, after so many attempts.
    Aside(u32),
}

#[derive(Debug)]
struct Source {
    planned: Planned,
    /// It does not exist (any more), as after compaction.
    hidden: bool,
    expired: bool,
    deliveries: u32,
    ends: Vec<End>,
    /// All its attempts were made: it may wait for somebody.
    exhausted: bool,
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
    /// The last attempt that failed and counted.
    failed: BTreeMap<i64, u32>,
    /// Attempts that were counted when this began, as is written in a retry or park topic.
    counted: BTreeMap<i64, u32>,
    ended: BTreeSet<i64>,
    /// The last record of each lane that was delivered.
    reached: BTreeMap<Option<u64>, i64>,
    assignment: u64,
}

/// An attempt that failed: its number, when, and what the service wished, in milliseconds.
type Failure = (u32, i64, i64);

#[derive(Debug, Default)]
struct Owner {
    has: BTreeMap<TopicPartition, Holding>,
    /// Given away, but the last commit is to come.
    leaving: BTreeSet<TopicPartition>,
    /// At the service.
    out: BTreeMap<u64, Out>,
    /// Lanes of calls of which one record has no end (`true`), or perhaps has none: what is behind it in the call.
    behind: BTreeMap<(u64, TopicPartition, Option<u64>), bool>,
    /// Attempts that failed.
    failures: BTreeMap<(TopicPartition, i64), Vec<Failure>>,
    deliveries: u64,
    assignments: u64,
    trust: Option<Trust>,
    /// When a record of an assignment failed first, as the loop counts: also after the partition went, while the record is at the service.
    first: BTreeMap<(u64, i64), Option<u64>>,
}

/// A record at the service.
#[derive(Clone, Debug)]
struct Out {
    partition: TopicPartition,
    offset: i64,
    assignment: u64,
    call: u64,
}

/// What a loop thinks of its service: which failures count.
#[derive(Debug)]
struct Trust {
    breaker: Breaker,
    budget: Budget,
    blame: Blame,
    /// From here on it is not known for sure.
    unsure: bool,
    /// What a good answer earns.
    earns: u32,
}

/// Credit that may have been spent without being seen.
const UNSURE: u32 = 5;

impl Trust {
    fn new(plan: &Plan) -> Self {
        let breaker = &plan.routes[0].breaker;
        // Of a batch its best answer counts; what somebody let go on has a past that is not known.
        let released = plan.in_play().iter().any(|route| route.on_exhausted == OnExhausted::Stop);
        let unsure = plan.swaps() || plan.has_batches() || released;
        Self {
            breaker: Breaker::new(breaker.failures, breaker.open),
            budget: Budget::new(breaker.failures),
            blame: Blame::default(),
            unsure,
            earns: 1 + plan.routes[0].tiers() as u32,
        }
    }

    /// Takes note of an answer; says whether it counts as an attempt, should it be a failure. `spends`: its record would be
    /// given up, to a retry topic or to its end.
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
            self.budget.earn(self.earns);
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
    /// Commits that were made, with what the last of them recorded as complete above it.
    commits_made: Commits,
    sides: Sides,
    /// Which life got a partition last.
    newest: BTreeMap<TopicPartition, (usize, usize)>,
    /// Somebody released records to be tried again; to the dead letters.
    retried: bool,
    discarded: bool,
    /// When they did so last.
    discarded_ms: Option<i64>,
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
    if let Some(waiting) = Sides::parse(outgoing)? {
        let what = What::Aside(waiting.attempts);
        return Ok(Publication { of: waiting.of, offset: waiting.origin, topic, what });
    }
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

/// What an answer to this attempt means, under routes of which any may be the one that gives it up. `None`: it is tried again.
fn end(route: &Route, in_play: &[Arc<Route>], attempt: u32, said: &Said) -> Option<End> {
    let dead = |route: &Arc<Route>| route.on_exhausted == OnExhausted::DeadLetter && attempt >= most_attempts(route);
    let again = || in_play.iter().any(dead).then_some(End::Dead("attempts"));
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
            commits_made: Commits::new(),
            sides: Sides::default(),
            newest: BTreeMap::new(),
            retried: false,
            discarded: false,
            discarded_ms: None,
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
        records.push(Source { planned: planned.clone(), hidden, expired: false, deliveries: 0, ends: Vec::new(), exhausted: false });
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
            let committed = self.commits_made.get(&one.partition).map_or(0, |made| made.0);
            if one.position < committed {
                return Err(format!("{life} begins {} at {}, but {committed} was committed", one.partition, one.position));
            }
            let ranges = completed::decode(one.position, &one.metadata).unwrap_or_default();
            let recorded: BTreeSet<i64> = ranges.into_iter().flatten().collect();
            let known =
                self.commits_made.get(&one.partition).into_iter().flat_map(|made| &made.1).filter(|offset| **offset >= one.position);
            if let Some(offset) = known.clone().find(|offset| !recorded.contains(offset)) {
                return Err(format!(
                    "{life} begins {}, and {offset}, which was recorded as complete, is not recorded any more",
                    one.partition
                ));
            }
            self.commits_made.insert(one.partition.clone(), (one.position, recorded.clone()));
            let counted = self.counted(&one.partition);
            self.newest.insert(one.partition.clone(), (life.process, life.number));
            let owner = self.owner(life);
            owner.assignments += 1;
            let assignment = owner.assignments;
            owner.leaving.remove(&one.partition);
            let holding =
                Holding { position: one.position, committed: one.position, complete: recorded, counted, assignment, ..Holding::default() };
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

    /// A life has left its group, or is over: it has nothing any more.
    pub(super) fn gone(&mut self, life: &Life) {
        self.owner(life).has.clear();
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

    /// What is written in retry and park topics of the attempts at records of a partition. Without an order it is read later.
    fn counted(&self, partition: &TopicPartition) -> BTreeMap<i64, u32> {
        if self.plan.routes[0].order == Order::None {
            return BTreeMap::new();
        }
        let most = |origin| self.found(&self.commits_made, partition, origin).map(|waiting| waiting.attempts).max();
        self.sides.origins(partition).filter_map(|origin| Some((origin, most(origin)?))).collect()
    }

    /// What waits of a record where its next owner finds it.
    fn found(&self, commits: &Commits, of: &TopicPartition, origin: i64) -> impl Iterator<Item = &Waiting> {
        let copies = self.sides.copies(of, origin).filter(|(place, waiting)| {
            waiting.sure && !is_done(commits, &place.partition, place.offset) && self.is_looked_at(commits, of, &place.partition)
        });
        copies.map(|(_, waiting)| waiting)
    }

    /// Whether each owner of a source partition looks into one of a retry or park topic: every route has the topic, or the group committed
    /// it. A topic that the table lost before its first commit is not known to be the route's: but then no offset was committed of what went
    /// there either, so the records are read again from their source.
    fn is_looked_at(&self, commits: &Commits, of: &TopicPartition, place: &TopicPartition) -> bool {
        let fewest = self.plan.in_play().iter().map(|route| route.tiers()).min().unwrap_or(0);
        let route = &self.plan.routes[0];
        let has =
            || (1..=fewest).any(|tier| route.retry_topic(&of.topic, tier) == *place.topic) || route.park_topic(&of.topic) == *place.topic;
        commits.contains_key(place) || (fewest > 0 && has())
    }

    /// Whether somebody else got a partition after this life, which may not know that yet.
    fn is_superseded(&self, life: &Life, partition: &TopicPartition) -> bool {
        self.newest.get(partition).is_some_and(|newest| *newest != (life.process, life.number))
    }

    /// What a group committed of retry and park topics, as the broker has it.
    pub(super) fn known(&mut self, commits: Vec<Commit>) -> Checked {
        for commit in commits {
            let before = self.commits_made.get(&commit.partition).map_or(0, |made| made.0);
            if commit.offset < before {
                return Err(format!("{} is committed at {}, back from {before}", commit.partition, commit.offset));
            }
            self.commits_made.insert(commit.partition.clone(), (commit.offset, above(&commit)));
        }
        Ok(())
    }

    /// Records of a retry or park topic were read.
    pub(super) fn read(&mut self, partition: &TopicPartition, offsets: impl Iterator<Item = i64>) {
        offsets.for_each(|offset| self.sides.is_sure(partition, offset));
    }

    /// Somebody releases what waits.
    pub(super) fn released(&mut self, how: Release) {
        self.retried |= how == Release::Retry;
        if how == Release::Discard {
            self.discarded = true;
            self.discarded_ms = Some(crate::record::now_ms());
            // That is their end, if they wait.
            for source in self.sources.values_mut().flatten().filter(|source| source.exhausted && source.ends.is_empty()) {
                source.ends.push(End::Dead("attempts"));
            }
        }
    }

    /// Whether a record may be tried from its first attempt on again: a table lets what stands still go on, also with the route that was there.
    fn begins_anew(&self, source: &Source) -> bool {
        source.exhausted && (self.retried || self.plan.swaps())
    }

    fn waits_elsewhere(&self, commits: &Commits, of: &TopicPartition, origin: i64) -> bool {
        self.found(commits, of, origin).next().is_some()
    }

    /// The partition of a source to which one of a retry or park topic belongs; itself, for one of a source.
    fn source_of(&self, partition: &TopicPartition) -> TopicPartition {
        let name = partition.topic.strip_prefix("work.").and_then(|rest| rest.split('.').next()).unwrap_or(&partition.topic);
        TopicPartition::new(name, partition.partition)
    }
}

/// What a commit records as complete above its offset.
fn above(commit: &Commit) -> BTreeSet<i64> {
    completed::decode(commit.offset, &commit.metadata).unwrap_or_default().into_iter().flatten().collect()
}

impl Publication {
    /// Whether two of one record cannot both be, if each record ends once: the same one, or a reply and a letter.
    fn ends(&self, other: &Self) -> bool {
        let letter = |what: &What| matches!(what, What::Letter(_));
        self == other || letter(&self.what) || letter(&other.what)
    }
}
