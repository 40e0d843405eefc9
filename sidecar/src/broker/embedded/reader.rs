//! The reader: an OS thread with its own connection, for what is not in the hot tails, and for administration.
//!
//! Invariant: no tokio worker reads the disk.
//! Invariant: waiting reads are bounded; beyond that a read is refused, and its caller tries again.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Condvar, Mutex, PoisonError},
};

use super::{log::lock, store::Store};

/// The most reads that wait.
const LIMIT: usize = 16_384;

/// A read.
pub(super) type Read = Box<dyn FnOnce(&Store) + Send>;

/// The queue of reads.
#[derive(Default)]
pub(super) struct Reads {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    reads: VecDeque<Read>,
    closed: bool,
}

impl fmt::Debug for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reads").field("waiting", &lock(&self.state).reads.len()).finish()
    }
}

impl Reads {
    /// Enqueues a read; gives it back if the reader is closed or overloaded.
    pub(super) fn push(&self, read: Read) -> Result<(), Read> {
        let mut state = lock(&self.state);
        if state.closed || state.reads.len() >= LIMIT {
            return Err(read);
        }
        state.reads.push_back(read);
        self.wake.notify_one();
        Ok(())
    }

    /// Takes no more reads; those that wait are dropped.
    pub(super) fn close(&self) {
        let waiting = {
            let mut state = lock(&self.state);
            state.closed = true;
            std::mem::take(&mut state.reads)
        };
        drop(waiting);
        self.wake.notify_all();
    }

    /// The thread's loop: runs reads until the queue is closed.
    pub(super) fn run(&self, store: &Store) {
        loop {
            let read = {
                let mut state = self
                    .wake
                    .wait_while(lock(&self.state), |state| state.reads.is_empty() && !state.closed)
                    .unwrap_or_else(PoisonError::into_inner);
                match state.reads.pop_front() {
                    Some(read) => read,
                    None => return,
                }
            };
            read(store);
        }
    }
}
