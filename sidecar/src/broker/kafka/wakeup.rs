//! Wakes a thread that waits, from any thread and from async code.

use std::{sync::Arc, task::Wake, time::Duration};

use super::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A lock without poisoning: no state behind it is left half-changed by a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A flag with a condition. A wake before the wait is not lost.
#[derive(Debug, Default)]
pub(super) struct Wakeup {
    flag: Mutex<bool>,
    condition: Condvar,
}

impl Wakeup {
    /// Ends the wait that runs, or the next one.
    pub(super) fn set(&self) {
        let mut flag = lock(&self.flag);
        if !*flag {
            *flag = true;
            self.condition.notify_one();
        }
    }

    /// Waits for [`Wakeup::set`], at most this long, and clears it.
    pub(super) fn wait(&self, timeout: Duration) {
        let flag = lock(&self.flag);
        let (mut flag, _) = self.condition.wait_timeout_while(flag, timeout, |flag| !*flag).unwrap_or_else(PoisonError::into_inner);
        *flag = false;
    }
}

impl Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        self.set();
    }
}
