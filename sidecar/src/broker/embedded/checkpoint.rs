//! Moving the write-ahead log into the file beside the writer, on a thread of its own, so that no publish waits for it.
//!
//! The log can begin anew only when nothing in it is left to move, which under load never happens beside the writer. So beyond a bound the
//! writer moves the rest itself: little, since this thread did most of it.
//!
//! Invariant: the log's size is bounded by [`LOG_BYTES`] plus what the longest checkpoint lets through.

use std::sync::{Condvar, Mutex, PoisonError};

use super::{log::lock, store::Store};

/// After this many bytes the thread moves what is there.
const STEP_BYTES: usize = 4 << 20;
/// Beyond this many bytes the writer moves the rest itself.
const LOG_BYTES: usize = 48 << 20;

/// How much the writer wrote into the log.
#[derive(Debug, Default)]
pub(super) struct LogSize {
    total: usize,
    asked_at: usize,
}

impl LogSize {
    /// The writer wrote about this much: asks the thread, or does it itself.
    pub(super) fn grew(&mut self, bytes: usize, store: &Store, checkpoints: &Checkpoints) {
        self.total += bytes;
        if self.total >= LOG_BYTES {
            match store.move_log() {
                Ok(true) => *self = Self::default(),
                // The thread is at it, or a reader needs the log: at the next transaction.
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "the log of the embedded broker cannot be moved into the file; it grows");
                    self.total = LOG_BYTES - STEP_BYTES;
                    self.asked_at = self.total;
                }
            }
        } else if self.total - self.asked_at >= STEP_BYTES {
            self.asked_at = self.total;
            checkpoints.ask();
        }
    }
}

/// The wish for a checkpoint.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    asked: bool,
    closed: bool,
}

impl Checkpoints {
    fn ask(&self) {
        lock(&self.state).asked = true;
        self.wake.notify_one();
    }

    /// Ends the thread, after what it does now.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.wake.notify_one();
    }

    /// The thread's loop.
    pub(super) fn run(&self, store: &Store) {
        loop {
            let waited = self.wake.wait_while(lock(&self.state), |state| !state.asked && !state.closed);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            if state.closed {
                return;
            }
            state.asked = false;
            drop(state);
            if let Err(error) = store.move_log() {
                tracing::warn!(%error, "a checkpoint beside the writer failed; the writer does it");
            }
        }
    }
}
