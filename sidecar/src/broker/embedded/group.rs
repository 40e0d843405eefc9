//! Consumer groups within the process: members, generations, cooperative rebalancing, the hand-over of partitions.
//!
//! A change marks the group; the next member that polls rebalances it. What moves is taken away by a *hand-over*: the old member hears
//! [`Event::Revoking`](crate::broker::Event::Revoking), answers with its last commits, they are made durable, and only then the partition
//! is free for the next member. A member that does not answer in time loses the partition anyway.
//!
//! Invariant: a partition has one owner at a time, and each ownership has its own epoch: the generation in which it began.
//! Invariant: the writer asks [`Group::may_commit`] in the order of its writes, and a new owner's start position is read by the writer after
//! the ownership changed: a commit is either seen by the next owner, or refused.
//! Invariant: a member that lost a partition because it did not answer commits nothing at all before it has heard of that, as in Kafka, where
//! it is thrown out: what it commits beside its subscription (retry topics) may belong to the partition that it lost.
//! Invariant: no job is submitted to the writer while a group is locked.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use super::{
    Shared,
    assignor::{Subscriptions, assign},
    inbox::{Gain, Inbox},
    log::{Catalog, lock},
};
use crate::{broker::Commit, record::TopicPartition};

/// A partition on its way from one member to another, with the epoch in which the old one got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Handover {
    pub(super) partition: TopicPartition,
    pub(super) epoch: u64,
}

/// What a member hears of its group, in order.
#[derive(Debug)]
pub(super) enum GroupEvent {
    Gained(Vec<Gain>),
    Losing(Losing),
    /// The hand-over of this number is over.
    HandedOver(u64, Vec<Handover>),
}

/// A hand-over, for the member that gives.
#[derive(Debug)]
pub(super) struct Losing {
    pub(super) id: u64,
    pub(super) partitions: Vec<Handover>,
    pub(super) done: oneshot::Sender<Vec<Commit>>,
}

/// A group. Lives as long as a member or a commit holds it.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) name: Arc<str>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    generation: u64,
    handovers: u64,
    stale: bool,
    members: BTreeMap<u64, Member>,
    owners: BTreeMap<TopicPartition, Owner>,
}

#[derive(Debug)]
struct Member {
    topics: BTreeSet<Arc<str>>,
    inbox: Arc<Inbox>,
    events: VecDeque<GroupEvent>,
    /// Hand-overs that it did not answer in time, and has not given up since.
    unanswered: usize,
}

#[derive(Clone, Copy, Debug)]
struct Owner {
    member: u64,
    epoch: u64,
    leaving: bool,
    /// The partition's number in the store: a topic that is deleted and made again has others.
    partition: i64,
}

impl State {
    fn changed(&mut self) {
        self.stale = true;
        for member in self.members.values() {
            member.inbox.assignment_changed();
        }
    }

    fn managed(&self, topic: &str) -> bool {
        self.members.values().any(|member| member.topics.contains(topic))
    }
}

/// A hand-over to be carried out: the partitions, and where the answer arrives.
struct Begun {
    id: u64,
    member: u64,
    partitions: Vec<Handover>,
    answer: oneshot::Receiver<Vec<Commit>>,
}

impl Group {
    fn new(name: &str) -> Self {
        Self { name: name.into(), state: Mutex::new(State::default()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A topic was created, altered or deleted.
    pub(super) fn topic_changed(&self, topic: &str) {
        let mut state = self.state();
        if state.managed(topic) {
            state.changed();
        }
    }

    /// What the member should hear next.
    pub(super) fn pop(&self, member: u64) -> Option<GroupEvent> {
        self.state().members.get_mut(&member)?.events.pop_front()
    }

    /// Whether the member still owns the partition since this epoch.
    pub(super) fn owns(&self, member: u64, partition: &TopicPartition, epoch: u64) -> bool {
        self.state().owners.get(partition).is_some_and(|owner| owner.member == member && owner.epoch == epoch)
    }

    /// Whether the member may commit: it owns the partition since this epoch, or (`None`) the group does not manage the topic and the
    /// member is still one. So a route commits its retry topics, which are no subscription, through its group.
    pub(super) fn may_commit(&self, member: u64, partition: &TopicPartition, epoch: Option<u64>) -> bool {
        let state = self.state();
        if state.members.get(&member).is_some_and(|member| member.unanswered > 0) {
            return false;
        }
        match (state.owners.get(partition), epoch) {
            (Some(owner), Some(epoch)) => owner.member == member && owner.epoch == epoch,
            (None, None) => state.members.contains_key(&member) && !state.managed(&partition.topic),
            _ => false,
        }
    }

    /// Rebalances if something changed since the last time. Called by any member, within the runtime.
    pub(super) fn rebalance(self: &Arc<Self>, shared: &Arc<Shared>) {
        let begun = {
            let mut state = self.state();
            if !std::mem::take(&mut state.stale) {
                return;
            }
            state.rebalance(&shared.catalog)
        };
        for handover in begun {
            let deadline = Instant::now() + shared.config.revoke_timeout;
            shared.tasks.spawn(hand_over(self.clone(), shared.clone(), handover, deadline));
        }
    }

    /// A member gave up what it lost unanswered.
    fn given_up(&self, member: u64) {
        if let Some(member) = self.state().members.get_mut(&member) {
            member.unanswered = member.unanswered.saturating_sub(1);
        }
    }

    /// Ends a hand-over, answered or not: the partitions are free.
    fn release(&self, id: u64, member: u64, partitions: Vec<Handover>, answered: bool) {
        let mut state = self.state();
        if let Some(member) = state.members.get_mut(&member).filter(|_| !answered) {
            member.unanswered += 1;
        }
        for Handover { partition, epoch } in &partitions {
            if state.owners.get(partition).is_some_and(|owner| owner.member == member && owner.epoch == *epoch) {
                state.owners.remove(partition);
            }
        }
        if let Some(member) = state.members.get_mut(&member) {
            member.events.push_back(GroupEvent::HandedOver(id, partitions));
        }
        state.changed();
    }
}

impl State {
    /// Takes partitions of deleted topics away from their owners. They are lost: nothing of them can be committed, least of all for a topic that
    /// was made again under the name.
    fn drop_deleted(&mut self, is_deleted: impl Fn(&TopicPartition, &Owner) -> bool) {
        let mut lost: BTreeMap<u64, Vec<Handover>> = BTreeMap::new();
        self.owners.retain(|name, owner| {
            let deleted = is_deleted(name, owner);
            if deleted {
                lost.entry(owner.member).or_default().push(Handover { partition: name.clone(), epoch: owner.epoch });
            }
            !deleted
        });
        for (member, partitions) in lost {
            self.handovers += 1;
            let id = self.handovers;
            if let Some(member) = self.members.get_mut(&member) {
                // Nobody waits for the answer.
                let (done, _) = oneshot::channel();
                member.events.push_back(GroupEvent::Losing(Losing { id, partitions, done }));
                member.inbox.assignment_changed();
            }
        }
    }

    fn rebalance(&mut self, catalog: &Catalog) -> Vec<Begun> {
        let subscriptions: Subscriptions = self.members.iter().map(|(id, member)| (*id, member.topics.clone())).collect();
        let topics: BTreeSet<&Arc<str>> = subscriptions.values().flatten().collect();
        let existing: BTreeMap<TopicPartition, _> = topics
            .into_iter()
            .filter_map(|topic| catalog.get(topic))
            .flat_map(|topic| topic.partitions.clone())
            .map(|partition| (partition.name.clone(), partition))
            .collect();
        self.drop_deleted(|name, owner| existing.get(name).is_none_or(|partition| partition.id != owner.partition));
        let owners = self.owners.iter().filter(|(_, owner)| !owner.leaving).map(|(name, owner)| (name.clone(), owner.member)).collect();
        let target = assign(&subscriptions, &existing.keys().cloned().collect(), &owners);
        let (mut gains, mut losses): (BTreeMap<u64, Vec<Gain>>, BTreeMap<u64, Vec<Handover>>) = Default::default();
        let epoch = self.generation + 1;
        for (name, partition) in existing {
            let wanted = target.get(&name).copied();
            match (self.owners.get_mut(&name), wanted) {
                (Some(owner), wanted) if !owner.leaving && wanted != Some(owner.member) => {
                    owner.leaving = true;
                    losses.entry(owner.member).or_default().push(Handover { partition: name, epoch: owner.epoch });
                }
                (None, Some(member)) => {
                    self.owners.insert(name, Owner { member, epoch, leaving: false, partition: partition.id });
                    gains.entry(member).or_default().push(Gain { partition, epoch });
                }
                _ => {}
            }
        }
        if !gains.is_empty() || !losses.is_empty() {
            self.generation = epoch;
        }
        let mut begun = Vec::new();
        for (member, partitions) in losses {
            let (done, answer) = oneshot::channel();
            self.handovers += 1;
            let id = self.handovers;
            if let Some(member) = self.members.get_mut(&member) {
                member.events.push_back(GroupEvent::Losing(Losing { id, partitions: partitions.clone(), done }));
                member.inbox.assignment_changed();
            }
            begun.push(Begun { id, member, partitions, answer });
        }
        for (id, gained) in gains {
            if let Some(member) = self.members.get_mut(&id) {
                member.events.push_back(GroupEvent::Gained(gained));
                member.inbox.assignment_changed();
            }
        }
        begun
    }
}

/// Waits for the old member's answer, makes its commits durable, and frees the partitions.
async fn hand_over(group: Arc<Group>, shared: Arc<Shared>, begun: Begun, deadline: Instant) {
    let Begun { id, member, partitions, mut answer } = begun;
    let answered = tokio::select! {
        answered = tokio::time::timeout_at(deadline, &mut answer) => answered,
        () = shared.closing.cancelled() => return,
    };
    let in_time = answered.is_ok();
    match answered {
        Ok(Ok(commits)) if !commits.is_empty() => {
            let epochs: HashMap<_, _> = partitions.iter().map(|handover| (&handover.partition, handover.epoch)).collect();
            // Of the group's own topics, a partition that is not handed over has no business here: epoch 0 was never given, so the writer
            // refuses it.
            let epoch = |commit: &Commit| match epochs.get(&commit.partition) {
                Some(epoch) => Some(*epoch),
                None => group.state().managed(&commit.partition.topic).then_some(0),
            };
            let offsets = commits.into_iter().map(|commit| (epoch(&commit), commit)).collect();
            let committed = tokio::time::timeout_at(deadline + Duration::from_secs(1), shared.commit(group.clone(), member, offsets));
            match committed.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(group = &*group.name, %error, "the last commits of revoked partitions failed"),
                Err(_) => tracing::warn!(group = &*group.name, "the last commits of revoked partitions took too long"),
            }
        }
        // Answered without commits, or the event was dropped: there is nothing to commit.
        Ok(_) => {}
        Err(_) => tracing::warn!(
            group = &*group.name,
            partitions = partitions.len(),
            "a member did not give up its partitions in time; they move, and its commits are refused from now on"
        ),
    }
    group.release(id, member, partitions, in_time);
    if !in_time {
        // What it would commit now is void. Its answer says that it knows; what it committed before that is refused first.
        tokio::select! {
            _ = answer => {}
            () = shared.closing.cancelled() => return,
        }
        if let Err(error) = shared.commit(group.clone(), member, Vec::new()).await {
            tracing::debug!(group = &*group.name, %error, "nothing is committed any more");
        }
        group.given_up(member);
    }
}

/// All groups with members.
#[derive(Debug, Default)]
pub(super) struct Groups(Mutex<HashMap<String, Arc<Group>>>);

impl Groups {
    /// Whether a group has members.
    pub(super) fn exists(&self, group: &str) -> bool {
        lock(&self.0).contains_key(group)
    }

    /// Adds a member.
    pub(super) fn join(&self, group: &str, member: u64, topics: BTreeSet<Arc<str>>, inbox: Arc<Inbox>) -> Arc<Group> {
        let mut groups = lock(&self.0);
        let group = groups.entry(group.to_owned()).or_insert_with(|| Arc::new(Group::new(group))).clone();
        let mut state = group.state();
        state.members.insert(member, Member { topics, inbox, events: VecDeque::new(), unanswered: 0 });
        state.changed();
        drop(state);
        group
    }

    /// Removes a member; its partitions are free at once.
    pub(super) fn leave(&self, group: &Group, member: u64) {
        let mut groups = lock(&self.0);
        let mut state = group.state();
        if state.members.remove(&member).is_none() {
            return;
        }
        state.owners.retain(|_, owner| owner.member != member);
        state.changed();
        if state.members.is_empty() {
            groups.remove(&*group.name);
        }
    }

    #[cfg(test)]
    pub(super) fn newest_member(&self, group: &str) -> Option<u64> {
        lock(&self.0).get(group)?.state().members.keys().next_back().copied()
    }

    #[cfg(test)]
    pub(super) fn evict(&self, group: &str, member: u64) {
        let group = lock(&self.0).get(group).cloned();
        if let Some(group) = group {
            self.leave(&group, member);
        }
    }

    /// A topic was created, altered or deleted.
    pub(super) fn topic_changed(&self, topic: &str) {
        let groups: Vec<_> = lock(&self.0).values().cloned().collect();
        for group in groups {
            group.topic_changed(topic);
        }
    }

    /// The groups that have members, with their numbers.
    pub(super) fn members(&self) -> Vec<(String, usize)> {
        lock(&self.0).values().map(|group| (group.name.to_string(), group.state().members.len())).collect()
    }
}

/// Who holds which identity of transactions.
#[derive(Debug, Default)]
pub(super) struct Identities(Mutex<HashMap<String, u64>>);

impl Identities {
    /// The member takes the identity; whoever held it is fenced.
    pub(super) fn take(&self, identity: &str, member: u64) {
        lock(&self.0).insert(identity.to_owned(), member);
    }

    /// Whether the member still holds the identity.
    pub(super) fn holds(&self, identity: &str, member: u64) -> bool {
        lock(&self.0).get(identity) == Some(&member)
    }

    /// The member gives the identity up, if it still holds it.
    pub(super) fn give_up(&self, identity: &str, member: u64) {
        let mut holders = lock(&self.0);
        if holders.get(identity) == Some(&member) {
            holders.remove(identity);
        }
    }
}
