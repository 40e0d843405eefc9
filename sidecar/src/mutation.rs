//! Faults that tests build in on purpose: a verifier that cannot fail is worth nothing. Floor 0.
//!
//! Invariant: outside of tests no fault is ever built in, and asking costs nothing.

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
}

/// Whether this fault is built in.
#[cfg(not(test))]
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
    pub(crate) const ALL: [Mutation; 12] = [
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
    ];
}
