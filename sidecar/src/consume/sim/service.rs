//! The service of a simulation: what it says to a record follows from the seed, the record and the attempt; when it says it is chance.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{sync::mpsc, time::Instant};

use super::{
    chance::Chance,
    plan::Plan,
    world::{Life, World},
};
use crate::{
    deliver::Leaf,
    outcome::{Answer, Delivery, Outcome, Reply, ReplyRecord},
};

/// What a service says to a delivery.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Said {
    /// An answer with so many records; `big` ones are more than the broker takes.
    Reply {
        status: u16,
        count: usize,
        big: bool,
    },
    Ignore,
    Retry,
    Reject,
    Away,
    Hang,
}

impl Said {
    /// Whether it is a failure that is tried again.
    pub(super) fn fails(&self) -> bool {
        matches!(self, Self::Reply { status: 404 | 429 | 500, .. } | Self::Retry | Self::Hang)
    }
}

/// The most bytes of a record that the broker takes.
pub(super) const RECORD_BYTES: usize = 2_000;

/// What is said to this attempt at a record.
pub(super) fn says(plan: &Plan, number: u64, attempt: u32) -> Said {
    let mut chance = Chance::of(plan.seed, number + 1);
    let good = Said::Reply { status: 200, count: 1, big: false };
    let status = |status, count| Said::Reply { status, count, big: false };
    let last = match chance.once_in(plan.service.odd) {
        true => chance.pick(&[0u64, 1, 2, 3, 4, 5, 6, 7, 8]),
        false => 9,
    };
    let fails = if chance.once_in(plan.service.fails) { chance.between(1, 3) as u32 } else { 0 };
    if attempt <= fails || last == 8 {
        return match Chance::of(plan.seed, number * 64 + u64::from(attempt.min(50))).below(5) {
            0 => status(500, 1),
            1 => status(404, 1),
            2 => status(429, 0),
            3 => Said::Retry,
            _ => Said::Hang,
        };
    }
    match last {
        0 => status(204, 1),
        1 => Said::Ignore,
        2 => status(200, 0),
        3 => Said::Reject,
        4 => status(400, 1),
        5 => Said::Reply { status: 200, count: 1, big: true },
        6 => status(202, 1),
        7 => status(200, 2),
        _ => good,
    }
}

/// The value of one record of an answer.
pub(super) fn reply_value(number: u64, index: usize, big: bool) -> String {
    let padding = if big { RECORD_BYTES } else { 0 };
    format!("{number}/{index}{}", "x".repeat(padding))
}

/// A delivery that will be answered.
type Called = (Instant, Delivery, Said);

/// The service of a life: what a loop hands its deliveries to.
pub(super) fn service(world: &Arc<World>, life: &Arc<Life>) -> Leaf {
    let (calls, called) = mpsc::channel(10_000);
    let (ear, heard) = (world.clone(), life.clone());
    let (leaf, answers) = Leaf::played(move |delivery| {
        // At the very moment of the call: what holds of deliveries is judged here.
        let (said, after) = hear(&ear, &heard, &delivery);
        calls.try_send((Instant::now() + after, delivery, said)).expect("the service outlives the loop");
    });
    tokio::spawn(serve(world.clone(), life.clone(), called, answers));
    leaf
}

/// Answers until the loop is gone.
async fn serve(world: Arc<World>, life: Arc<Life>, mut called: mpsc::Receiver<Called>, answers: mpsc::Sender<Answer>) {
    let mut due: BTreeMap<(Instant, u64), (Delivery, Said)> = BTreeMap::new();
    let mut count = 0;
    loop {
        let next = due.keys().next().copied();
        tokio::select! {
            biased;
            call = called.recv() => {
                let Some((at, delivery, said)) = call else { return };
                count += 1;
                due.insert((at, count), (delivery, said));
            }
            () = until(next) => {
                if let Some((_, (delivery, said))) = due.pop_first() {
                    world.note(|| format!("{life} says {said:?} to {} ({})", delivery.position, delivery.attempt));
                    world.judge(|ledger| ledger.answered(&life, &delivery, &said));
                    let outcome = outcome(&world, &delivery, said);
                    if answers.try_send(Answer { id: delivery.id, outcome }).is_err() {
                        return;
                    }
                }
            }
        }
    }
}

async fn until(next: Option<(Instant, u64)>) {
    match next {
        Some((at, _)) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What will be said, and when.
fn hear(world: &Arc<World>, life: &Arc<Life>, delivery: &Delivery) -> (Said, Duration) {
    world.note(|| format!("{life} is called with {} ({})", delivery.position, delivery.attempt));
    world.judge(|ledger| ledger.delivered(life, delivery));
    let plan = &world.plan;
    let number = world.state().ledger.number(&delivery.position).unwrap_or_default();
    let away = life.away.load(std::sync::atomic::Ordering::Relaxed);
    if away || world.goes_wrong(plan.service.away) {
        return (Said::Away, Duration::ZERO);
    }
    // Once all faults are over, a service that is waited for recovers.
    let recovered = {
        let state = world.state();
        state.over && state.ledger.waits(life)
    };
    let said = match says(plan, number, delivery.attempt) {
        said if recovered && said.fails() => match says(plan, number, delivery.route.retry.attempts) {
            // Where it may have a dead letter from before, a reply now would be behind those of later records.
            last if last.fails() => Said::Ignore,
            last => last,
        },
        said => said,
    };
    match said {
        Said::Hang => (Said::Hang, delivery.route.timeout),
        said => {
            let latency = Duration::from_millis(world.draw(|chance| chance.below(plan.service.latency_ms + 1)));
            (said, latency.min(delivery.route.timeout))
        }
    }
}

fn outcome(world: &World, delivery: &Delivery, said: Said) -> Outcome {
    let number = world.state().ledger.number(&delivery.position).unwrap_or_default();
    match said {
        Said::Reply { status, count, big } => {
            let records: Vec<ReplyRecord> = (0..count)
                .map(|index| ReplyRecord { value: Some(reply_value(number, index, big).into()), ..ReplyRecord::default() })
                .collect();
            let body = records.first().and_then(|record| record.value.clone());
            Outcome::Reply(Reply { status, records, body, retry_after: (status == 429).then_some(Duration::from_millis(300)) })
        }
        Said::Ignore => Outcome::Ignore,
        Said::Retry => Outcome::Retry { reason: "not yet".to_owned(), after: None },
        Said::Hang => Outcome::Retry { reason: "no answer".to_owned(), after: None },
        Said::Reject => Outcome::Reject { reason: "never".to_owned() },
        Said::Away => Outcome::NoService { reason: "nobody there".to_owned(), after: None },
    }
}
