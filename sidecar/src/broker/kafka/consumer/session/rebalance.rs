//! Partitions that come and go, and those whose offsets do not exist.

use std::{
    collections::BTreeMap,
    future::Future as _,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll, Waker},
    time::Duration,
};

use rdkafka::{
    consumer::{CommitMode, Consumer as _},
    error::KafkaError,
    topic_partition_list::{Offset, TopicPartitionList},
    types::RDKafkaErrorCode as Code,
};
use tokio::sync::oneshot;

use super::{
    super::{
        super::{admin, wakeup::lock},
        Client, commit_list,
        queue::Queue,
        start::{self, Rule},
    },
    ASK, COMMIT, Cause, Local, Session, plain_list,
};
use crate::{
    broker::{Assigned, BrokerError, BrokerErrorKind, Commit, Event, Revoking},
    record::TopicPartition,
};

/// How long a revocation waits for its last commits.
const REVOKE: Duration = Duration::from_secs(2);

impl Session {
    fn rule(&self) -> Rule {
        Rule { group: self.shared.config.group.clone(), start: self.shared.config.start.clone(), appeared: self.appeared.clone() }
    }

    /// The positions of new partitions. `None` if it is no use any more: closing, or the next rebalance waits.
    pub(super) fn positions(&mut self, client: &Arc<Client>, partitions: &[TopicPartition]) -> Option<Vec<Assigned>> {
        loop {
            if self.shared.closing() || client.context().rebalance_waits() || self.fatal.is_some() {
                return None;
            }
            let (rule, wanted) = (self.rule(), partitions.to_vec());
            match self.beside(client, ASK + COMMIT, move |client| start::positions(client, &rule, &wanted, ASK)) {
                Some(Ok(assigned)) => {
                    self.trouble(Cause::Start, None);
                    return Some(assigned);
                }
                Some(Err(error)) => {
                    tracing::debug!("kafka: {}: where to begin: {error}", self.name());
                    if error.kind != BrokerErrorKind::Fenced {
                        self.trouble(Cause::Start, Some(error));
                    }
                }
                None => {}
            }
            self.tell_health();
            self.poll_until(client, Duration::from_millis(500), |session| session.fatal.is_some());
        }
    }

    pub(super) fn assign(&mut self, client: &Arc<Client>, list: &TopicPartitionList) {
        self.capture_metadata(client);
        let partitions = self.partitions_of(list);
        let positions = if self.starting_over { None } else { self.positions(client, &partitions) };
        match positions {
            Some(assigned) => self.begin(client, assigned),
            // librdkafka waits for an answer; these partitions are revoked next, and what they bring until then is dropped.
            None => {
                self.abandoned = true;
                self.log_failed("assign", client.incremental_assign(&plain_list(&partitions)));
            }
        }
    }

    /// Begins with partitions whose assignment was answered before it could be told, should they be ours still.
    pub(super) fn adopt(&mut self, client: &Arc<Client>) {
        let Ok(list) = client.assignment() else { return };
        let mut orphans = self.partitions_of(&list);
        orphans.retain(|partition| !self.locals.iter().any(|local| local.partition == *partition));
        if !orphans.is_empty() {
            let orphans = plain_list(&orphans);
            self.log_failed("unassign", client.incremental_unassign(&orphans));
            self.assign(client, &orphans);
        }
    }

    /// Registers partitions, tells of them, and lets them be fetched.
    pub(super) fn begin(&mut self, client: &Arc<Client>, assigned: Vec<Assigned>) {
        let mut list = TopicPartitionList::with_capacity(assigned.len());
        for one in &assigned {
            let mut element = list.add_partition(&one.partition.topic, one.partition.partition);
            if let Err(error) = element.set_offset(Offset::Offset(one.position)) {
                tracing::error!(partition = %one.partition, position = one.position, %error, "kafka: an offset that cannot be read from");
            }
            self.locals.push(Local { partition: one.partition.clone(), next: one.position, raw: Vec::new() });
        }
        self.reindex();
        {
            let mut queue = lock(&self.shared.queue);
            for one in assigned.iter().filter(|one| !queue.chosen_anew(&one.partition)).map(|one| one.partition.clone()).collect::<Vec<_>>()
            {
                queue.add(one);
            }
            self.set_high(&mut queue);
            // Whoever chose the partitions knows them.
            if !assigned.is_empty() && !self.shared.chooses() {
                queue.event(Event::Assigned(assigned));
            }
        }
        self.shared.ready.notify_one();
        self.trouble(Cause::Access, None);
        self.trouble(Cause::Fenced, None);
        self.log_failed("assign", client.incremental_assign(&list));
    }

    /// Does what the async side chose to read, and not to read any more.
    pub(super) fn take_choices(&mut self, client: &Arc<Client>) {
        let choices = lock(&self.shared.queue).take_choices();
        if choices.is_empty() {
            return;
        }
        let known = |session: &Self, partition: &TopicPartition| session.locals.iter().any(|local| local.partition == *partition);
        let mut gone: Vec<TopicPartition> = Vec::new();
        let mut chosen: BTreeMap<TopicPartition, i64> = BTreeMap::new();
        for (partition, position) in choices {
            if known(self, &partition) && !gone.contains(&partition) {
                gone.push(partition.clone());
            }
            match position {
                Some(position) => chosen.insert(partition, position),
                None => chosen.remove(&partition),
            };
        }
        if !gone.is_empty() {
            self.forget(&gone);
            self.log_failed("unassign", client.incremental_unassign(&plain_list(&gone)));
        }
        if chosen.is_empty() {
            return;
        }
        let assigned: Vec<Assigned> =
            chosen.into_iter().map(|(partition, position)| Assigned { partition, position, metadata: String::new() }).collect();
        let list = plain_list(&assigned.iter().map(|one| one.partition.clone()).collect::<Vec<_>>());
        self.begin(client, assigned);
        // One that was full when it was read before may be paused still.
        self.log_failed("resume", client.resume(&list));
    }

    fn set_high(&self, queue: &mut Queue) {
        queue.set_high((self.shared.config.buffer_bytes / 2 / queue.len().max(1)).max(32 * 1024));
    }

    pub(super) fn revoke(&mut self, client: &Arc<Client>, list: &TopicPartitionList, lost: bool) {
        let mut partitions = self.partitions_of(list);
        partitions.retain(|partition| self.locals.iter().any(|local| local.partition == *partition));
        if lost {
            *lock(&self.shared.metadata) = None;
            self.lose(partitions);
        } else if !partitions.is_empty() {
            self.give_away(client, &partitions);
        }
        self.log_failed("unassign", client.incremental_unassign(list));
        lock(&self.shared.queue).set_barrier(false);
        self.shared.ready.notify_one();
    }

    /// Partitions that are gone already.
    pub(super) fn lose(&mut self, partitions: Vec<TopicPartition>) {
        if partitions.is_empty() {
            return;
        }
        self.forget(&partitions);
        {
            let mut queue = lock(&self.shared.queue);
            for partition in &partitions {
                queue.remove(partition);
            }
            self.set_high(&mut queue);
            queue.event(Event::Revoking(Revoking { partitions, lost: true, done: oneshot::channel().0 }));
        }
        self.shared.ready.notify_one();
    }

    /// Partitions that are ours until we unassign them: asks for the last commits and makes them.
    fn give_away(&mut self, client: &Arc<Client>, partitions: &[TopicPartition]) {
        self.capture_metadata(client);
        let (done, mut answer) = oneshot::channel();
        self.forget(partitions);
        {
            let mut queue = lock(&self.shared.queue);
            for partition in partitions {
                queue.leaving(partition);
            }
            queue.set_barrier(true);
            queue.event(Event::Revoking(Revoking { partitions: partitions.to_vec(), lost: false, done }));
        }
        self.shared.ready.notify_one();

        let waker = Waker::from(self.shared.wakeup.clone());
        let mut commits = Vec::new();
        self.poll_until(client, REVOKE, |_| match Pin::new(&mut answer).poll(&mut TaskContext::from_waker(&waker)) {
            Poll::Ready(answered) => {
                commits = answered.unwrap_or_default();
                true
            }
            Poll::Pending => false,
        });
        drop(answer);
        {
            let mut queue = lock(&self.shared.queue);
            queue.revocation_over();
            for partition in partitions {
                queue.remove(partition);
            }
            self.set_high(&mut queue);
        }
        // A commit that is under way must not arrive after the last one.
        self.poll_until(client, COMMIT, |session| lock(&session.shared.queue).committing == 0);
        if self.shared.transactor.is_some() && lock(&self.shared.queue).committing > 0 {
            // It may still be stored, with newer offsets than these.
            return tracing::warn!("kafka: {}: a transaction goes on while its partitions are given away", self.name());
        }
        commits.retain(|commit| {
            partitions.contains(&commit.partition)
                || lock(&self.shared.queue).owns(&commit.partition)
                || !self.shared.topics.contains(&commit.partition.topic)
        });
        self.last_commits(client, &commits);
    }

    fn last_commits(&mut self, client: &Arc<Client>, commits: &[Commit]) {
        if commits.is_empty() {
            return;
        }
        for attempt in 1..=2 {
            let list = match commit_list(commits) {
                Ok(list) => list,
                Err(error) => return tracing::error!("kafka: {}: last commits: {error}", self.name()),
            };
            match self.beside(client, COMMIT, move |client| client.commit(&list, CommitMode::Sync)) {
                Some(Ok(())) => return,
                Some(Err(KafkaError::ConsumerCommit(Code::IllegalGeneration))) if attempt == 1 => {}
                Some(Err(error)) => {
                    return tracing::warn!(
                        "kafka: {}: the last commits before a rebalance failed, so records repeat: {error}",
                        self.name()
                    );
                }
                None => {
                    return tracing::warn!(
                        "kafka: {}: the last commits before a rebalance took too long, so records may repeat",
                        self.name()
                    );
                }
            }
        }
    }

    /// Finds the partitions whose next offset does not exist, and goes on where records do.
    pub(super) fn find_range(&mut self, client: &Arc<Client>) {
        let asked: Vec<(TopicPartition, i64)> = self.locals.iter().map(|local| (local.partition.clone(), local.next)).collect();
        let partitions: Vec<TopicPartition> = asked.iter().map(|(partition, _)| partition.clone()).collect();
        if partitions.is_empty() {
            return;
        }
        let Some(Ok(marks)) = self.beside(client, ASK + COMMIT, move |client| admin::watermarks(client, &partitions, ASK)) else {
            // The broker is away just now.
            self.tell_health();
            self.poll_until(client, Duration::from_millis(500), |session| session.fatal.is_some());
            self.out_of_range = true;
            return;
        };
        let mut found = false;
        for ((partition, next), (low, high)) in asked.iter().zip(&marks) {
            if !self.locals.iter().any(|local| local.partition == *partition) {
                continue;
            }
            if next < low {
                found = true;
                tracing::warn!(%partition, from = next, to = low, "kafka: records were deleted before they were read");
                lock(&self.shared.queue).expired(partition, *next, *low);
                self.shared.ready.notify_one();
                self.restart(client, partition, *low);
            } else if next > high {
                found = true;
                self.beyond(client, partition, *next, *high);
            }
        }
        if !found {
            // It exists by now; but its fetching has stopped, and librdkafka does not say whose.
            for (partition, next) in &asked {
                self.restart(client, partition, *next);
            }
        }
    }

    /// Reads a partition from elsewhere, as the async side asked.
    pub(super) fn seek(&mut self, client: &Arc<Client>, partition: &TopicPartition, offset: i64) {
        let Some(local) = self.locals.iter_mut().find(|local| local.partition == *partition) else { return };
        local.raw.clear();
        let one = plain_list(std::slice::from_ref(partition));
        // Stopping the fetcher is what makes librdkafka drop what it fetched ahead, before the call returns.
        self.restart(client, partition, offset);
        if lock(&self.shared.queue).sought(partition) {
            self.log_failed("resume", client.resume(&one));
        }
    }

    /// Begins to fetch a partition at an offset. A seek does not start a partition that stopped on an error.
    fn restart(&mut self, client: &Arc<Client>, partition: &TopicPartition, offset: i64) {
        let Some(local) = self.locals.iter_mut().find(|local| local.partition == *partition) else { return };
        local.next = offset;
        let one = std::slice::from_ref(partition);
        self.log_failed("restart", client.incremental_unassign(&plain_list(one)));
        let mut list = TopicPartitionList::with_capacity(1);
        let added = list.add_partition_offset(&partition.topic, partition.partition, Offset::Offset(offset));
        self.log_failed("restart", added.and_then(|()| client.incremental_assign(&list)));
        if lock(&self.shared.queue).paused(partition) {
            self.log_failed("restart", client.pause(&plain_list(one)));
        }
    }

    /// The position is behind the partition's end: the topic was made anew, or its log cut. Begins as a new group would, and visibly:
    /// the partition is lost and assigned again.
    fn beyond(&mut self, client: &Arc<Client>, partition: &TopicPartition, next: i64, high: i64) {
        if self.shared.chooses() {
            // Its reader says where to begin: it is asked again after a while, should records come.
            tracing::error!(%partition, position = next, end = high, "kafka: the position is beyond the end: waiting for records there");
            self.poll_until(client, Duration::from_millis(500), |session| session.fatal.is_some());
            return self.restart(client, partition, next);
        }
        tracing::error!(%partition, position = next, end = high, "kafka: the position is beyond the end: the topic was made anew or cut");
        let detail = format!(
            "{partition}: the position {next} is beyond the end {high}: the topic was deleted and made anew, or its log was cut; reading begins \
             again by the route's `start`"
        );
        self.trouble(Cause::Start, Some(BrokerError::new(BrokerErrorKind::Other, detail)));
        self.log_failed("restart", client.incremental_unassign(&plain_list(std::slice::from_ref(partition))));
        self.lose(vec![partition.clone()]);
        let (rule, wanted) = (self.rule(), vec![partition.clone()]);
        let resolved = self.beside(client, ASK + COMMIT, move |client| {
            let starts = start::resolve(client, &rule, &wanted, ASK)?;
            start::commit(client, &rule, &starts)?;
            Ok::<_, BrokerError>(starts)
        });
        let assigned = match resolved {
            Some(Ok(starts)) => starts
                .into_iter()
                .map(|start| Assigned { partition: start.partition, position: start.offset, metadata: String::new() })
                .collect(),
            // What is committed is still wrong, so this is found again, once the broker answers.
            _ => vec![Assigned { partition: partition.clone(), position: next, metadata: String::new() }],
        };
        self.begin(client, assigned);
        self.trouble(Cause::Start, None);
    }
}
