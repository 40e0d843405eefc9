//! Faults that tests build in on purpose: a verifier that cannot fail is worth nothing. Floor 0.
//!
//! The simulation sets one for its thread. A binary with the feature `mutations`, which the verifier builds for itself and nobody ships, takes one from
//! `MESH_MUTATION`.
//!
//! Invariant: outside of tests and without the feature no fault is ever built in, and asking costs nothing.

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// A record is complete before its reply is acknowledged.
    CommitEarly,
    /// What was read is committed, whether it is complete or not.
    CommitNewest,
    /// A reply is not sent, and counts as forwarded.
    DropReply,
    /// Two replies change places.
    SwapReplies,
    /// Two records change places.
    SwapRecords,
    /// An answer of an assignment that ended counts.
    ForgetEpoch,
    /// A record does not wait for those of its lane.
    ForgetLane,
    /// A reply does not wait for those of its lane.
    Overtake,
    /// What a commit recorded above the watermark is not read.
    ForgetMap,
    /// What waits of a partition that is given away is delivered all the same.
    KeepWaiting,
    /// A failed attempt is not counted.
    ForgetAttempt,
    /// A reply that may be stored counts as stored.
    TrustTimeout,
    /// A record does not wait for one of its key that lies in a retry or park topic.
    ForgetParked,
    /// What lies in retry and park topics is not looked through at an assignment.
    ForgetScan,
    /// A record is complete before it is acknowledged in the retry or park topic that it goes to.
    HandOverEarly,
    /// A retry topic is told one attempt too few.
    ForgetTier,
    /// A record of a retry topic runs before it is due.
    RunEarly,
    /// Of what lies in retry and park topics since commits were lost, a record runs before an earlier one of its key.
    RunAhead,
    /// The outcome of a record behind a failure counts, as it came in the same batch.
    UseBehind,
    /// What is to be one transaction is sent without one.
    OutsideTransaction,
    /// The offsets of a transaction are left out.
    ForgetOffsets,
    /// The embedded broker acknowledges records before their transaction is on disk.
    AckBeforeFsync,
}

/// Whether this fault is built in.
#[cfg(all(feature = "mutations", not(test)))]
pub(crate) fn is(fault: Mutation) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<Mutation>> = std::sync::LazyLock::new(|| {
        let chosen = match std::env::var("MESH_MUTATION").as_deref() {
            Ok("commit_early") => Mutation::CommitNewest,
            Ok("drop_reply") => Mutation::DropReply,
            Ok("swap_two") => Mutation::ForgetLane,
            Ok("forget_epoch") => Mutation::ForgetEpoch,
            Ok("ack_before_fsync") => Mutation::AckBeforeFsync,
            _ => return None,
        };
        tracing::error!(?chosen, "a fault is built in: this process breaks its promises on purpose");
        Some(chosen)
    });
    *CHOSEN == Some(fault)
}

/// Whether this fault is built in.
#[cfg(not(any(feature = "mutations", test)))]
#[inline(always)]
pub(crate) const fn is(_fault: Mutation) -> bool {
    false
}

#[cfg(test)]
pub(crate) use built_in::is;

#[cfg(test)]
pub(crate) mod built_in {
    use std::cell::Cell;

    use super::Mutation;

    thread_local!(static FAULT: Cell<Option<Mutation>> = const { Cell::new(None) });

    pub(crate) fn is(fault: Mutation) -> bool {
        FAULT.get() == Some(fault)
    }

    /// Builds a fault into what runs on this thread.
    pub(crate) fn set(fault: Option<Mutation>) {
        FAULT.set(fault);
    }

    /// All of them.
    pub(crate) const ALL: [Mutation; 21] = [
        Mutation::CommitEarly,
        Mutation::CommitNewest,
        Mutation::DropReply,
        Mutation::SwapReplies,
        Mutation::SwapRecords,
        Mutation::ForgetEpoch,
        Mutation::ForgetLane,
        Mutation::Overtake,
        Mutation::ForgetMap,
        Mutation::KeepWaiting,
        Mutation::ForgetAttempt,
        Mutation::TrustTimeout,
        Mutation::ForgetParked,
        Mutation::ForgetScan,
        Mutation::HandOverEarly,
        Mutation::ForgetTier,
        Mutation::RunEarly,
        Mutation::RunAhead,
        Mutation::UseBehind,
        Mutation::OutsideTransaction,
        Mutation::ForgetOffsets,
    ];
}
