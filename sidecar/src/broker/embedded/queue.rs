//! The way to the writer: a bounded queue of jobs.
//!
//! Invariant: jobs run in the order in which they were submitted.
//! Invariant: the records that wait are bounded by bytes; other jobs are bounded by who submits them, one at a time each.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::sync::oneshot;

use super::{
    group::Group,
    inbox::{Gain, Inbox},
    log::lock,
    sync::{Condvar, Mutex, PoisonError},
};
use crate::{
    broker::{BrokerError, Commit, NewTopic, Outgoing, ProduceError, StartOffset, TopicChange, TransactionError},
    record::{Position, TopicPartition},
};

/// The results of a batch, in the order of its records.
pub(super) type Results = Vec<Result<Position, ProduceError>>;

/// What the writer does.
#[derive(Debug)]
pub(super) enum Job {
    Append {
        records: Vec<Outgoing>,
        bytes: usize,
        reply: oneshot::Sender<Results>,
    },
    Commit {
        group: Arc<Group>,
        member: u64,
        offsets: Vec<(Option<u64>, Commit)>,
        reply: oneshot::Sender<Result<(), BrokerError>>,
    },
    Transact {
        transaction: Transaction,
        bytes: usize,
        reply: oneshot::Sender<Result<(), TransactionError>>,
    },
    Resolve {
        group: Option<Arc<Group>>,
        gains: Vec<Gain>,
        start: StartOffset,
        inbox: Arc<Inbox>,
    },
    /// Offsets of a group without members.
    CommitFor {
        group: String,
        offsets: Vec<Commit>,
        reply: oneshot::Sender<Result<(), BrokerError>>,
    },
    DeleteRecords {
        below: Vec<(TopicPartition, i64)>,
        reply: oneshot::Sender<Result<(), BrokerError>>,
    },
    CreateTopics {
        topics: Vec<NewTopic>,
        reply: oneshot::Sender<Result<BTreeMap<String, i32>, BrokerError>>,
    },
    AlterTopic {
        topic: String,
        change: TopicChange,
        reply: oneshot::Sender<Result<(), BrokerError>>,
    },
    DeleteTopics {
        topics: Vec<String>,
        reply: oneshot::Sender<Result<(), BrokerError>>,
    },
}

/// Records and offsets that are stored together.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) group: Arc<Group>,
    pub(super) member: u64,
    /// The identity that the member must still hold.
    pub(super) identity: String,
    pub(super) records: Vec<Outgoing>,
    pub(super) offsets: Vec<(Option<u64>, Commit)>,
}

impl Job {
    fn bytes(&self) -> usize {
        match self {
            Self::Append { bytes, .. } | Self::Transact { bytes, .. } => *bytes,
            _ => 0,
        }
    }
}

/// Why a job was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotQueued {
    Full,
    Closed,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    limit: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    bytes: usize,
    closed: bool,
    asleep: bool,
}

/// What the writer finds.
#[derive(Debug)]
pub(super) enum Taken {
    /// Jobs, in order.
    Jobs(Vec<Job>),
    /// Nothing came within the time.
    Idle,
    /// Closed, and everything is done.
    Closed,
}

impl Queue {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), wake: Condvar::new() }
    }

    /// Enqueues a job. A batch is taken if the queue is empty, whatever its size.
    pub(super) fn push(&self, job: Job) -> Result<(), NotQueued> {
        let mut state = lock(&self.state);
        if state.closed {
            return Err(NotQueued::Closed);
        }
        let bytes = job.bytes();
        if bytes > 0 && state.bytes > 0 && state.bytes + bytes > self.limit {
            return Err(NotQueued::Full);
        }
        state.bytes += bytes;
        state.jobs.push_back(job);
        if state.asleep {
            state.asleep = false;
            self.wake.notify_one();
        }
        Ok(())
    }

    /// Takes what is queued, up to about `max_bytes` of records; waits for the first job up to `wait`.
    pub(super) fn take(&self, wait: Duration, max_bytes: usize) -> Taken {
        let mut state = lock(&self.state);
        if state.jobs.is_empty() && !state.closed && !wait.is_zero() {
            state.asleep = true;
            let waited = self.wake.wait_timeout_while(state, wait, |state| state.jobs.is_empty() && !state.closed);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.asleep = false;
        }
        if state.jobs.is_empty() {
            return if state.closed { Taken::Closed } else { Taken::Idle };
        }
        let (mut taken, mut bytes) = (Vec::with_capacity(state.jobs.len().min(1024)), 0);
        while let Some(job) = state.jobs.pop_front() {
            bytes += job.bytes();
            taken.push(job);
            if bytes >= max_bytes {
                break;
            }
        }
        state.bytes = state.bytes.saturating_sub(bytes);
        Taken::Jobs(taken)
    }

    /// Takes no more jobs, and drops those that wait: whoever submitted them learns it from its dropped reply.
    pub(super) fn abandon(&self) {
        let waiting = {
            let mut state = lock(&self.state);
            state.closed = true;
            std::mem::take(&mut state.jobs)
        };
        drop(waiting);
    }

    /// Takes no more jobs; those that wait are done.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.wake.notify_all();
    }
}
