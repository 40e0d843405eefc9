//! Where a consumer hears from the writer, the reader and its group.
//!
//! Invariant: bounded by the consumer's partitions: a subscription is queued once, a partition has one fetch and one resolve at a time.

use std::{collections::VecDeque, sync::Arc};

use tokio::sync::Notify;

use super::{
    log::{Partition, Row, Subscription, lock},
    sync::Mutex,
};
use crate::broker::BrokerError;

/// Something that a consumer asked for is there, or something changed.
#[derive(Debug)]
pub(super) enum Notice {
    /// Start positions, as asked.
    Resolved(Result<Vec<Resolved>, (BrokerError, Vec<Gain>)>),
    /// Rows from the store, of those below `until`.
    Fetched { subscription: Arc<Subscription>, until: i64, rows: Result<Vec<Row>, BrokerError> },
}

/// A partition that the consumer gets.
#[derive(Clone, Debug)]
pub(super) struct Gain {
    pub(super) partition: Arc<Partition>,
    /// The group's generation at the assignment; commits carry it.
    pub(super) epoch: u64,
}

/// A partition with its start position.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) gain: Gain,
    pub(super) position: i64,
    pub(super) metadata: String,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    state: Mutex<State>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct State {
    assignment: bool,
    notices: VecDeque<Notice>,
    ready: VecDeque<Arc<Subscription>>,
}

impl Inbox {
    /// The group, or the set of topics, changed.
    pub(super) fn assignment_changed(&self) {
        lock(&self.state).assignment = true;
        self.notify.notify_one();
    }

    pub(super) fn push(&self, notice: Notice) {
        lock(&self.state).notices.push_back(notice);
        self.notify.notify_one();
    }

    pub(super) fn push_ready(&self, subscription: Arc<Subscription>) {
        lock(&self.state).ready.push_back(subscription);
        self.notify.notify_one();
    }

    pub(super) fn take_assignment_changed(&self) -> bool {
        std::mem::take(&mut lock(&self.state).assignment)
    }

    pub(super) fn pop(&self) -> Option<Notice> {
        lock(&self.state).notices.pop_front()
    }

    pub(super) fn pop_ready(&self) -> Option<Arc<Subscription>> {
        lock(&self.state).ready.pop_front()
    }

    /// Waits until something was pushed since the last wait. One waiter at a time. Cancel-safe.
    pub(super) async fn wait(&self) {
        self.notify.notified().await;
    }

    /// Forgets everything: the consumer is gone.
    pub(super) fn clear(&self) {
        let state = std::mem::take(&mut *lock(&self.state));
        drop(state);
    }
}
