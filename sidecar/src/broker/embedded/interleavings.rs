//! What the threads of the embedded broker share with consumers, under schedules that shuttle chooses: the same sources (`log`, `inbox`,
//! `queue`), built of locks and atomics that shuttle can interrupt anywhere.
//!
//! Shuttle's condition variable never times out, so a wake-up that is lost is a deadlock here, and found.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use shuttle::{check_random, future::block_on, thread};
use tokio::sync::oneshot;

use self::{
    inbox::Inbox,
    log::{Found, Partition, Row},
    queue::{Job, NotQueued, Queue, Taken},
};
use super::{group, names};
use crate::{
    broker::Outgoing,
    record::{Record, TopicPartition},
};

#[path = "inbox.rs"]
#[allow(dead_code, clippy::duplicate_mod)]
mod inbox;
#[path = "log.rs"]
#[allow(dead_code, clippy::duplicate_mod)]
mod log;
#[path = "queue.rs"]
#[allow(dead_code, clippy::duplicate_mod)]
mod queue;

mod sync {
    pub(super) use std::sync::PoisonError;

    pub(super) use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, atomic::AtomicBool};
}

const SCHEDULES: usize = 2_000;

fn row(offset: i64) -> Row {
    Row { base: offset, end: offset + 1, data: bytes::Bytes::new() }
}

/// A reader as `EmbeddedConsumer::step` is one. `look_late` is the fault: it says that it looks after it looked.
async fn read(inbox: Arc<Inbox>, until: i64, look_late: bool) {
    let mut next = 0;
    while next < until {
        while let Some(subscription) = inbox.pop_ready() {
            if !look_late {
                subscription.looking();
            }
            let found = subscription.partition.find(next, 512, 1 << 20);
            if look_late {
                subscription.looking();
            }
            match found {
                Found::Hot(rows) => {
                    next = rows.last().expect("at least one").end;
                    subscription.ready();
                }
                Found::Expired(low) => {
                    next = low;
                    subscription.ready();
                }
                Found::Cold(end) => {
                    next = end;
                    subscription.ready();
                }
                Found::Nothing => {}
            }
        }
        if next < until {
            inbox.wait().await;
        }
    }
}

fn appends(look_late: bool) {
    let partition = Arc::new(Partition::new(1, TopicPartition::new("t", 0), 0, 0, 0));
    let inbox = Arc::new(Inbox::default());
    let subscription = partition.subscribe(&inbox);
    let writer = thread::spawn({
        let partition = partition.clone();
        move || {
            for offset in 0..3 {
                partition.publish(std::iter::once(row(offset)), 0);
            }
            partition.evict(0);
        }
    });
    let keeper = thread::spawn(move || partition.raise_low(1));
    block_on(read(inbox, 3, look_late));
    writer.join().expect("the writer ends");
    keeper.join().expect("the keeper ends");
    drop(subscription);
}

#[test]
fn no_append_is_missed_by_a_reader_that_is_about_to_wait() {
    check_random(|| appends(false), SCHEDULES);
}

#[test]
fn a_reader_that_says_too_late_that_it_looks_misses_one() {
    let found = catch_unwind(AssertUnwindSafe(|| check_random(|| appends(true), SCHEDULES)));
    assert!(found.is_err(), "the schedules are too few to find it");
}

fn job(number: u8) -> (Job, oneshot::Receiver<queue::Results>) {
    let (reply, answer) = oneshot::channel();
    let record = Record { value: Some(vec![number].into()), ..Record::default() };
    (Job::Append { records: vec![Outgoing { topic: "t".into(), partition: None, record }], bytes: 1, reply }, answer)
}

/// Two publishers and a writer, and a close in the middle: every job that was taken is done, in order, and the writer ends.
#[test]
fn every_job_that_is_queued_reaches_the_writer_before_it_ends() {
    check_random(
        || {
            let queue = Arc::new(Queue::new(1 << 20));
            let publishers: Vec<_> = (0..2u8)
                .map(|publisher| {
                    let queue = queue.clone();
                    thread::spawn(move || {
                        let pushed: Vec<bool> =
                            (0..3).map(|number| queue.push(job(publisher * 10 + number).0) != Err(NotQueued::Closed)).collect();
                        pushed.into_iter().filter(|pushed| *pushed).count()
                    })
                })
                .collect();
            let closer = thread::spawn({
                let queue = queue.clone();
                move || queue.close()
            });
            let mut done: Vec<u8> = Vec::new();
            loop {
                match queue.take(Duration::from_secs(3_600), 2) {
                    Taken::Jobs(jobs) => done.extend(jobs.into_iter().map(|job| match job {
                        Job::Append { records, .. } => records[0].record.value.as_ref().map_or(0, |value| value[0]),
                        _ => 255,
                    })),
                    Taken::Idle => {}
                    Taken::Closed => break,
                }
            }
            let taken: usize = publishers.into_iter().map(|publisher| publisher.join().expect("a publisher ends")).sum();
            closer.join().expect("the closer ends");
            assert_eq!(done.len(), taken);
            for publisher in 0..2 {
                let own: Vec<u8> = done.iter().copied().filter(|number| number / 10 == publisher).collect();
                assert!(own.is_sorted(), "{done:?}");
            }
        },
        SCHEDULES,
    );
}
