//! What librdkafka calls while a consumer is polled: errors, log lines, rebalances. Nothing is handled here, only noted; the session
//! handles it between polls.
//!
//! A static member that joins again after its session has ended is given another member id, and its partitions are others' by then. When it learns
//! that from the answer to a JoinGroup, librdkafka (2.12) keeps them all the same, joins with the new id, and lets them be given back in good order
//! later: until then the group takes offsets for them. (A dynamic member is told to ask for an id first, and loses them by that.) All that says so
//! is a line of its log.
//!
//! So is whether a request to join is at the coordinator: one to leave waits behind it there, and librdkafka gives it up after 5 s.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::KafkaError,
    topic_partition_list::TopicPartitionList,
    types::{RDKafkaErrorCode as Code, RDKafkaRespErr},
};

use super::super::{health::Health, wakeup::lock};

/// A rebalance that waits for its answer.
#[derive(Debug)]
pub(super) enum Rebalance {
    /// Partitions are given.
    Assign(TopicPartitionList),
    /// Partitions are taken.
    Revoke {
        /// Which.
        list: TopicPartitionList,
        /// They are another member's already.
        lost: bool,
    },
}

/// The context of a consumer.
pub(super) struct Context {
    pub(super) health: Arc<Health>,
    rebalances: Mutex<VecDeque<Rebalance>>,
    /// Errors of the group or of topics.
    errors: Mutex<Vec<(Code, String)>>,
    served: AtomicU64,
    closing: AtomicBool,
    /// The group gave this member another id: it was none any more in between.
    replaced: AtomicBool,
    /// A request is at the group's coordinator that is answered only when all members are there.
    joining: AtomicBool,
}

/// Whether a line of the log says that a member id takes the place of another one.
fn is_replaced(facility: &str, text: &str) -> bool {
    let ids = || text.split_once("updating member id \"")?.1.split_once("\" -> \"");
    facility == "MEMBERID" && ids().is_some_and(|(before, _)| !before.is_empty() && before != "(not-set)")
}

/// Whether a line of the log says that this member waits for the others of its group, or that it does no longer.
fn is_joining(facility: &str, text: &str) -> Option<bool> {
    let (_, state) = text.split_once(" changed join state ").filter(|_| facility == "CGRPJOINSTATE")?.1.split_once(" -> ")?;
    Some(state.starts_with("wait-join ") || state.starts_with("wait-sync "))
}

impl Context {
    pub(super) fn new(health: Arc<Health>) -> Self {
        Self {
            health,
            rebalances: Mutex::default(),
            errors: Mutex::default(),
            served: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            replaced: AtomicBool::new(false),
            joining: AtomicBool::new(false),
        }
    }

    /// Grows with everything that was served: a poll that returns nothing and serves nothing found the queue empty.
    pub(super) fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    fn count(&self) {
        self.served.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the group gave this member another id since the last call.
    pub(super) fn take_replaced(&self) -> bool {
        self.replaced.swap(false, Ordering::AcqRel)
    }

    /// Whether this member waits for the others of its group.
    pub(super) fn is_joining(&self) -> bool {
        self.joining.load(Ordering::Acquire)
    }

    /// The next rebalance that waits.
    pub(super) fn take_rebalance(&self) -> Option<Rebalance> {
        lock(&self.rebalances).pop_front()
    }

    /// Whether a rebalance waits.
    pub(super) fn rebalance_waits(&self) -> bool {
        !lock(&self.rebalances).is_empty()
    }

    /// The errors since the last call.
    pub(super) fn take_errors(&self) -> Vec<(Code, String)> {
        std::mem::take(&mut *lock(&self.errors))
    }

    /// From now on a revocation is answered at once: nobody listens any more, and the drop waits for it.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        self.count();
        if is_replaced(facility, text) {
            self.replaced.store(true, Ordering::Release);
        }
        if let Some(joining) = is_joining(facility, text) {
            self.joining.store(joining, Ordering::Release);
        }
        self.health.log(level, facility, text);
    }

    fn stats_raw(&self, _: &[u8]) {
        self.count();
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.count();
        let Some(code) = error.rdkafka_error_code() else { return };
        self.health.report(code, reason);
        let mut errors = lock(&self.errors);
        if errors.len() < 100 {
            errors.push((code, reason.to_owned()));
        }
    }
}

impl ConsumerContext for Context {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, error: RDKafkaRespErr, list: &mut TopicPartitionList) {
        self.count();
        let assign = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if self.closing.load(Ordering::Acquire) {
            if !assign && let Err(error) = consumer.incremental_unassign(list) {
                tracing::debug!(%error, "kafka: unassign at close");
            }
            return;
        }
        let rebalance = if assign {
            Rebalance::Assign(list.clone())
        } else {
            Rebalance::Revoke { list: list.clone(), lost: consumer.assignment_lost() }
        };
        lock(&self.rebalances).push_back(rebalance);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_id_that_takes_the_place_of_another_is_seen() {
        let line = |before: &str, after: &str| format!("[thrd:main]: Group \"g\": updating member id \"{before}\" -> \"{after}\"");
        assert!(is_replaced("MEMBERID", &line("a-1", "")) && is_replaced("MEMBERID", &line("a-1", "a-2")));
        assert!(!is_replaced("MEMBERID", &line("", "a-1")) && !is_replaced("MEMBERID", &line("(not-set)", "a-1")));
        assert!(!is_replaced("JOIN", &line("a-1", "")) && !is_replaced("MEMBERID", "something else"));
    }

    #[test]
    fn a_member_that_waits_for_the_others_is_seen() {
        let line = |before: &str, after: &str| format!("[thrd:main]: Group \"g\" changed join state {before} -> {after} (state up)");
        for (before, after, joining) in [
            ("init", "wait-join", true),
            ("wait-join", "wait-metadata", false),
            ("wait-metadata", "wait-sync", true),
            ("wait-sync", "wait-assign-call", false),
            ("wait-join", "init", false),
        ] {
            assert_eq!(is_joining("CGRPJOINSTATE", &line(before, after)), Some(joining), "{before} -> {after}");
        }
        assert_eq!(is_joining("CGRPSTATE", &line("init", "wait-join")), None);
        assert_eq!(is_joining("CGRPJOINSTATE", "something else"), None);
    }
}
