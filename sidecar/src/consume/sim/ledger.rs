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
    service::{Said, reply_value},
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
    outcome::{Delivery, Disposition},
    parking::Release,
    record::{Position, TopicPartition, now_ms},
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

    /// The service is called.
    pub(super) fn delivered(&mut self, life: &Life, delivery: &Delivery, call: u64) -> Checked {
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
        // Whoever stood still while another one got the partition goes on with the copies that it read, though they are committed by now.
        let late = self.is_superseded(life, partition);
        let copies = || self.sides.copies(partition, offset);
        let read = || copies().filter(|(place, _)| late || !is_done(&self.commits_made, &place.partition, place.offset));
        let (anew, waits) = (self.begins_anew(source), read().next().is_some());
        let twice = self.plan.routes[0].order == Order::None && copies().next().is_some();
        let owner = self.owners.get(&(life.process, life.number)).ok_or_else(|| format!("{what} without an assignment"))?;
        let with = |offset: i64| owner.out.values().any(|out| out.call == call && out.partition == *partition && out.offset == offset);
        if first {
            let before = records.iter().enumerate().take(offset as usize).skip(low as usize);
            for (earlier, other) in before.filter(|(_, other)| self.plan.same_lane(key, lane_key(other))) {
                let open = other.ends.is_empty() && !other.hidden && !other.expired && self.untouched(other).is_none();
                if open && !with(earlier as i64) {
                    return Err(format!("{what} for the first time, before {earlier} of its lane has its end"));
                }
            }
        }
        let same = |out: &Out| {
            let other = records.get(out.offset as usize).and_then(lane_key);
            out.partition == *partition && self.plan.same_lane(key, other) && (out.call != call || (out.offset >= offset && !waits))
        };
        if let Some(other) = owner.out.values().find(|out| same(out)) {
            return Err(format!("{what} while {} of its lane is at the service", other.offset));
        }
        let holding = owner.has.get(partition).ok_or_else(|| format!("{what}, but does not have the partition"))?;
        // A copy in a retry or park topic may be one too many: whoever wrote it did not learn that it was stored.
        if !waits && !twice && (offset < holding.position || offset < holding.committed || holding.complete.contains(&offset)) {
            return Err(format!("{what}, which is committed as complete ({holding:?})"));
        }
        if !waits && !twice && holding.ended.contains(&offset) {
            return Err(format!("{what}, which has its end already"));
        }
        let attempt = holding.failed.get(&offset).copied().unwrap_or(0) + 1;
        let unsure = owner.trust.as_ref().is_some_and(|trust| trust.unsure);
        let written = || read().map(|(_, waiting)| waiting.attempts + 1);
        // Without an order a record may run from two places at once, after a crash.
        let unordered = twice;
        let made = owner.failures.get(&(partition.clone(), offset)).into_iter().flatten().map(|failure| failure.0 + 1);
        let most = written().chain([attempt]).chain(made.filter(|_| twice)).max().unwrap_or(attempt);
        let lower = unsure || unordered || anew;
        if attempt != delivery.attempt && !written().any(|next| next == delivery.attempt) && !(lower && delivery.attempt <= most) {
            return Err(format!("{what} as attempt {} instead of {attempt}", delivery.attempt));
        }
        let counted = holding.counted.get(&offset).copied().unwrap_or(0);
        // What a former owner put there late begins where that one stood.
        let stale = || read().any(|(_, copy)| copy.stale && copy.attempts + 1 == delivery.attempt);
        if delivery.attempt <= counted && !anew && !stale() {
            return Err(format!("{what} as attempt {}, but {counted} attempts were written down", delivery.attempt));
        }
        if delivery.attempt > self.plan.attempts().1 {
            return Err(format!("{what} as attempt {}", delivery.attempt));
        }
        let due =
            self.sides.copies(partition, offset).filter(|(_, copy)| copy.attempts + 1 == delivery.attempt).filter_map(|(_, c)| c.due_ms);
        if let Some(due) = due.min().filter(|due| *due > now_ms() && self.plan.is_calm()) {
            return Err(format!("{what} {} ms too early", due - now_ms()));
        }
        if delivery.record.value.as_deref() != Some(source.planned.value.as_bytes()) {
            return Err(format!("{what} with another value: {:?}", delivery.record.value));
        }
        let at_once = |route: &Arc<Route>| route.concurrency * route.batch.map_or(1, |batch| batch.max);
        let most = self.plan.routes.iter().map(at_once).max().unwrap_or(0);
        if owner.out.len() >= most {
            return Err(format!("{what}: more than {most} are at the service"));
        }
        let assignment = holding.assignment;
        let owner = self.owner(life);
        owner.deliveries += 1;
        owner.out.insert(delivery.id, Out { partition: partition.clone(), offset, assignment, call });
        if let Some(source) = self.sources.get_mut(partition).and_then(|records| records.get_mut(offset as usize)) {
            source.deliveries += 1;
        }
        Ok(())
    }

    /// The service says something.
    pub(super) fn answered(&mut self, life: &Life, delivery: &Delivery, said: &Said) -> Checked {
        let (partition, offset) = (&delivery.position.partition, delivery.position.offset);
        let mut end = end(&delivery.route, self.plan.in_play(), delivery.attempt, said);
        let trust = Trust::new(&self.plan);
        let used_up = said.fails() && delivery.attempt >= self.plan.attempts().0;
        let lane = match self.plan.routes[0].order {
            Order::Key => Some(self.source(partition, offset).and_then(lane_key)),
            Order::Partition => Some(None),
            Order::None => None,
        };
        let gives_up = said.fails()
            && (delivery.attempt >= delivery.route.retry.attempts
                || said.wish().zip(delivery.route.retry_topics.first()).is_some_and(|(wish, first)| wish >= *first));
        let owner = self.owner(life);
        let Some(Out { assignment, call, .. }) = owner.out.remove(&delivery.id) else {
            return Err(format!("{life} is answered {partition}/{offset}, which is not at the service"));
        };
        let lane = lane.map(|key| (call, partition.clone(), key));
        let before = lane.as_ref().and_then(|lane| owner.behind.get(lane)).copied();
        if before == Some(true) {
            // One before it in its lane failed in the same call.
            return Ok(());
        }
        if said.fails() {
            let wish = said.wish().map_or(0, |wish| wish.as_millis() as i64);
            owner.failures.entry((partition.clone(), offset)).or_default().push((delivery.attempt, now_ms(), wish));
        }
        let trust = owner.trust.get_or_insert(trust);
        let holding = owner.has.get_mut(partition).filter(|holding| holding.assignment == assignment);
        let exhausted = end == Some(End::Dead("attempts"));
        let spends = gives_up && (holding.is_some() || owner.leaving.contains(partition));
        let counts = trust.counts(said, owner.first.entry((assignment, offset)).or_default(), spends);
        let unsure = trust.unsure;
        if !counts && !unsure && exhausted {
            end = None;
        }
        if counts && gives_up && !unsure {
            // It comes back as another one.
            owner.first.remove(&(assignment, offset));
        }
        let holding = owner.has.get_mut(partition).filter(|holding| holding.assignment == assignment);
        if let Some(lane) = lane {
            match end {
                None => drop(owner.behind.insert(lane, true)),
                Some(_) if exhausted && unsure => drop(owner.behind.insert(lane, false)),
                Some(_) => {}
            }
        }
        if let Some(holding) = holding {
            match (&end, said) {
                (Some(_), _) if exhausted && unsure => drop(holding.failed.insert(offset, delivery.attempt)),
                (Some(_), _) if before == Some(false) => {}
                (Some(_), _) => drop(holding.ended.insert(offset)),
                (None, Said::Away) => {}
                (None, _) if !counts && !unsure => {}
                (None, _) => drop(holding.failed.insert(offset, delivery.attempt)),
            }
        }
        if let Some(source) = self.sources.get_mut(partition).and_then(|records| records.get_mut(offset as usize)) {
            source.exhausted |= used_up;
        }
        if let (Some(end), Some(source)) = (end, self.sources.get_mut(partition).and_then(|records| records.get_mut(offset as usize))) {
            source.ends.push(end);
        }
        Ok(())
    }

    /// A record is stored.
    pub(super) fn stored(&mut self, life: &Life, outgoing: &Outgoing, position: &Position) -> Checked {
        let publication = publication(outgoing)?;
        if let What::Aside(_) = publication.what {
            return self.put_aside(life, outgoing, position);
        }
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
                    || (reason == "attempts" && source.exhausted && self.discarded)
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
            What::Aside(_) => return Err(format!("{publication:?} is no reply and no letter")),
        };
        let key = source.planned.key.map(|key| format!("k{key}"));
        if outgoing.record.value.as_deref() != Some(expected.as_bytes())
            || outgoing.record.key.as_deref() != key.as_deref().map(str::as_bytes)
        {
            return Err(format!("{publication:?} is stored with another value or key: {:?}", outgoing.record));
        }
        if self.plan.once
            && let Some((before, _)) =
                self.stored.iter().find(|(p, _)| p.of == publication.of && p.offset == publication.offset && p.ends(&publication))
        {
            return Err(format!("{publication:?} is stored though {before:?} is"));
        }
        *self.stored.entry(publication.clone()).or_default() += 1;
        self.logs.entry(position.partition.clone()).or_default().push(publication);
        Ok(())
    }

    /// A record is stored in a retry or park topic.
    fn put_aside(&mut self, life: &Life, outgoing: &Outgoing, position: &Position) -> Checked {
        let Some(mut waiting) = Sides::parse(outgoing)? else { return Ok(()) };
        let what = format!("{life} puts {}/{} into {position} after {} attempts", waiting.of, waiting.origin, waiting.attempts);
        let source = self.source(&waiting.of, waiting.origin).ok_or_else(|| format!("{what}, which was never published"))?;
        let key = source.planned.key.map(|key| format!("k{key}"));
        let record = &outgoing.record;
        if record.value.as_deref() != Some(source.planned.value.as_bytes()) || record.key.as_deref() != key.as_deref().map(str::as_bytes) {
            return Err(format!("{what} with another value or key: {record:?}"));
        }
        let own = self.plan.beside(&waiting.of.topic).contains(&position.partition.topic.to_string());
        if !own || position.partition.partition != waiting.of.partition || source.hidden || self.untouched(source).is_some() {
            return Err(format!("{what}, where it does not belong"));
        }
        if waiting.kept && !source.exhausted {
            return Err(format!("{what} for good"));
        }
        let anew = self.begins_anew(source) && waiting.attempts == 0;
        let owner = self.owners.get(&(life.process, life.number));
        let failures: Vec<_> =
            owner.and_then(|owner| owner.failures.get(&(waiting.of.clone(), waiting.origin))).into_iter().flatten().collect();
        let behind = waiting.due_ms.is_none() && !waiting.kept && waiting.attempts == 0;
        let known: BTreeSet<u32> =
            self.sides.copies(&waiting.of, waiting.origin).map(|(_, copy)| copy.attempts).filter(|n| *n > 0).collect();
        if !anew && !behind && !failures.iter().any(|failure| failure.0 == waiting.attempts) && !known.contains(&waiting.attempts) {
            return Err(format!("{what}, which were not made: {failures:?}"));
        }
        let earliest = failures.iter().filter(|failure| failure.0 == waiting.attempts).map(|(_, at, wish)| at + wish).min();
        if let Some(due) = waiting.due_ms
            && earliest.is_some_and(|earliest| due + 1 < earliest)
        {
            return Err(format!("{what}, due at {due}, before the service wished: {earliest:?}"));
        }
        let me = (life.process, life.number);
        let owners: Vec<_> = self.owners.iter().filter(|(_, owner)| owner.has.contains_key(&waiting.of)).map(|(who, _)| *who).collect();
        waiting.stale = life.is_evicted() || owners != [me];
        self.sides.put(position, waiting)
    }

    pub(super) fn acknowledged(&mut self, outgoing: &Outgoing, position: &Position) -> Checked {
        let publication = publication(outgoing)?;
        match publication.what {
            What::Aside(_) => self.sides.is_sure(&position.partition, position.offset),
            _ => drop(self.acknowledged.insert(publication)),
        }
        Ok(())
    }

    /// Where the next record of a topic's partition will be. Of a reply only its key is known: that stands for its partition.
    pub(super) fn place(&self, outgoing: &Outgoing) -> Position {
        match outgoing.partition {
            Some(number) => {
                let partition = TopicPartition::new(outgoing.topic.clone(), number);
                let offset = self.sides.end(&partition);
                Position { partition, offset }
            }
            None => {
                let key = outgoing.record.key.as_deref().map_or(0, |key| key.iter().fold(1, |sum, byte| sum * 31 + i32::from(*byte)));
                Position { partition: TopicPartition::new(outgoing.topic.clone(), key), offset: 0 }
            }
        }
    }

    /// A transaction is stored: its records and offsets at once.
    pub(super) fn transacted(&mut self, life: &Life, records: &[Outgoing], offsets: &[Commit]) -> Checked {
        let mut origins = BTreeSet::new();
        for outgoing in records {
            let place = self.place(outgoing);
            self.stored(life, outgoing, &place)?;
            self.acknowledged(outgoing, &place)?;
            let publication = publication(outgoing)?;
            origins.insert((publication.of, publication.offset));
        }
        self.committing(life, offsets)?;
        self.committed(life, offsets)?;
        for (of, origin) in origins {
            let ended = self.stored.keys().any(|publication| publication.of == of && publication.offset == origin);
            let places = usize::from(!is_done(&self.commits_made, &of, origin))
                + self.sides.waiting(&self.commits_made, &of, origin).count()
                + usize::from(ended);
            if places != 1 {
                return Err(format!("{life}: after a transaction {of}/{origin} is in {places} places"));
            }
        }
        Ok(())
    }

    /// A commit is about to be made.
    pub(super) fn committing(&mut self, life: &Life, commits: &[Commit]) -> Checked {
        let mut after = self.commits_made.clone();
        for commit in commits {
            after.insert(commit.partition.clone(), (commit.offset, above(commit)));
        }
        for commit in commits {
            self.commits += 1;
            let partition = &commit.partition;
            let what = format!("{life} commits {partition} at {}", commit.offset);
            let source = self.source_of(partition);
            let owner = self.owner(life);
            if !owner.has.contains_key(&source) && !owner.leaving.contains(&source) {
                return Err(format!("{what}, which it does not have"));
            }
            if source != *partition {
                // What was copied behind its back is not known to who stood still: its commit is to be refused, see `committed`.
                if !self.is_superseded(life, &source) {
                    self.committing_beside(&what, commit, &after)?;
                }
                continue;
            }
            if commit.offset > self.high(partition) {
                return Err(format!("{what}, beyond the end"));
            }
            let checked = self.checked.get(partition).copied().unwrap_or(0);
            let records = &self.sources[partition];
            for offset in checked..commit.offset {
                if !self.complete(partition, offset, &records[offset as usize]) && !self.waits_elsewhere(&after, partition, offset) {
                    return Err(format!("{what}, but {offset} is not complete: {:?}", records[offset as usize]));
                }
            }
            for offset in above(commit) {
                let complete = records.get(offset as usize).is_some_and(|source| self.complete(partition, offset, source));
                if !complete && !self.waits_elsewhere(&after, partition, offset) {
                    return Err(format!("{what} and records {offset}, which is not complete: {:?}", records.get(offset as usize)));
                }
            }
            self.checked.insert(partition.clone(), checked.max(commit.offset));
        }
        Ok(())
    }

    /// Of a retry or park topic: what is done there has its end, or waits elsewhere.
    fn committing_beside(&self, what: &str, commit: &Commit, after: &Commits) -> Checked {
        let partition = &commit.partition;
        if commit.offset > self.sides.end(partition) {
            return Err(format!("{what}, beyond the end"));
        }
        let from = self.commits_made.get(partition).map_or(0, |made| made.0);
        for offset in (from..commit.offset).chain(above(commit)) {
            let Some(waiting) = self.sides.get(partition, offset) else { return Err(format!("{what} and {offset}, which is not there")) };
            let (of, origin) = (&waiting.of, waiting.origin);
            let complete = self.source(of, origin).is_some_and(|source| self.complete(of, origin, source));
            if !complete && is_done(after, of, origin) && !self.waits_elsewhere(after, of, origin) {
                return Err(format!("{what}, but {offset} has no end, and is nowhere else: {waiting:?}"));
            }
        }
        Ok(())
    }

    /// A commit was made.
    pub(super) fn committed(&mut self, life: &Life, commits: &[Commit]) -> Checked {
        for commit in commits {
            let source = self.source_of(&commit.partition);
            // One that hears late of an assignment that is over already leaves soon.
            let has = |who| self.owners.get(who).is_some_and(|owner| owner.has.contains_key(&source));
            if source != commit.partition && self.is_superseded(life, &source) && self.newest.get(&source).is_some_and(has) {
                return Err(format!("{life} commits {} at {}, which another one has by now", commit.partition, commit.offset));
            }
            self.known(vec![commit.clone()]).map_err(|wrong| format!("{life}: {wrong}"))?;
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
                if !self.complete(partition, offset as i64, source) && !self.stays_parked(partition, offset as i64, source) {
                    return Some(format!("{partition}/{offset} has no end: {source:?}"));
                }
            }
        }
        None
    }

    /// Whether a record waits for somebody, or for one that does, and the plan leaves it there.
    fn stays_parked(&self, partition: &TopicPartition, offset: i64, source: &Source) -> bool {
        let kept = |offset: i64| self.sides.waiting(&self.commits_made, partition, offset).any(|waiting| waiting.kept && waiting.sure);
        let mut before = self.sources[partition].iter().enumerate().take(offset as usize);
        let behind = || {
            self.waits_elsewhere(&self.commits_made, partition, offset)
                && before.any(|(earlier, other)| self.plan.same_lane(lane_key(source), lane_key(other)) && kept(earlier as i64))
        };
        self.plan.leaves_parked && (kept(offset) || { behind }())
    }

    /// What lies in a retry or park topic and should not, in words.
    pub(super) fn left_over(&self) -> Option<String> {
        let waits = |(partition, offset, waiting): &(&TopicPartition, i64, &Waiting)| {
            let parked =
                || self.source(&waiting.of, waiting.origin).is_some_and(|source| self.stays_parked(&waiting.of, waiting.origin, source));
            let looked_at = || self.is_looked_at(&self.commits_made, &waiting.of, partition);
            !waiting.stale && !is_done(&self.commits_made, partition, *offset) && looked_at() && !parked()
        };
        let (partition, offset, waiting) = self.sides.all().find(waits)?;
        Some(format!("{partition}/{offset} is left over: {waiting:?}"))
    }

    /// How many records should have been counted as ended, where nothing goes wrong.
    pub(super) fn ended(&self) -> u64 {
        let all = self
            .sources
            .iter()
            .flat_map(|(partition, records)| records.iter().enumerate().map(move |(offset, source)| (partition, offset, source)));
        all.filter(|(partition, offset, source)| !source.hidden && !self.stays_parked(partition, *offset as i64, source)).count() as u64
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
        // What fails in a retry topic may be tried twice, by two owners.
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
            let dead = source.ends.iter().any(|end| matches!(end, End::Dead(_)));
            let two_ends = dead && source.ends.iter().any(|end| !matches!(end, End::Dead(_)));
            let unordered =
                order == Order::None || source.planned.key.is_none() || source.expired || self.untouched(source).is_some() || two_ends;
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
        self.owners.values().filter_map(|owner| owner.trust.as_ref()).all(|trust| !trust.unsure) && !self.retried && !self.discarded
    }

    /// How many answers the service of a life gave, those that are out left aside.
    pub(super) fn answers(&self, life: &Life) -> u64 {
        self.owners.get(&(life.process, life.number)).map_or(0, |owner| owner.deliveries - owner.out.len() as u64)
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
