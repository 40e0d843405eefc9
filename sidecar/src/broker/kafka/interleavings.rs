//! How a polling thread is woken, under schedules that shuttle chooses. Its condition variable never times out: a wake-up that is lost is a
//! deadlock here.

use std::{sync::Arc, time::Duration};

use shuttle::{check_random, thread};

use self::{
    sync::Mutex,
    wakeup::{Wakeup, lock},
};

#[path = "wakeup.rs"]
#[allow(clippy::duplicate_mod)]
mod wakeup;

mod sync {
    pub(super) use std::sync::PoisonError;

    pub(super) use shuttle::sync::{Condvar, Mutex, MutexGuard};
}

#[test]
fn a_thread_that_is_about_to_wait_misses_no_wake_up() {
    check_random(
        || {
            let (work, wakeup) = (Arc::new(Mutex::new(0)), Arc::new(Wakeup::default()));
            let wakers: Vec<_> = (0..3)
                .map(|_| {
                    let (work, wakeup) = (work.clone(), wakeup.clone());
                    thread::spawn(move || {
                        *lock(&work) += 1;
                        wakeup.set();
                    })
                })
                .collect();
            while *lock(&work) < 3 {
                wakeup.wait(Duration::from_secs(3_600));
            }
            wakers.into_iter().for_each(|waker| waker.join().expect("a waker ends"));
        },
        2_000,
    );
}
