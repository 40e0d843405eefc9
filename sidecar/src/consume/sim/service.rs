//! The service of a simulation: what it says to a record follows from the seed, the record and the attempt; when it says it is chance.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{sync::mpsc, time::Instant};

use super::{
    chance::Chance,
    plan::{Plan, most_attempts},
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
    /// Tried again, after so long at least.
    Retry {
        after_ms: u64,
    },
    Reject,
    Away,
    Hang,
}

impl Said {
    /// Whether it is a failure that is tried again.
    pub(super) fn fails(&self) -> bool {
        matches!(self, Self::Reply { status: 404 | 429 | 500, .. } | Self::Retry { .. } | Self::Hang)
    }

    /// How long it wants to be left alone.
    pub(super) fn wish(&self) -> Option<Duration> {
        match self {
            Self::Reply { status: 429, .. } => Some(Duration::from_millis(300)),
            Self::Retry { after_ms } if *after_ms > 0 => Some(Duration::from_millis(*after_ms)),
            _ => None,
        }
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
    let most = u64::from(plan.attempts().1.max(3));
    let fails = if chance.once_in(plan.service.fails) { chance.between(1, most) as u32 } else { 0 };
    if attempt <= fails || last == 8 {
        return match Chance::of(plan.seed, number * 64 + u64::from(attempt.min(50))).below(5) {
            0 => status(500, 1),
            1 => status(404, 1),
            2 => status(429, 0),
            3 => {
                Said::Retry { after_ms: Chance::of(plan.seed, number * 64 + u64::from(attempt.min(50)) + 1).pick(&[0, 0, 60, 700, 2_500]) }
            }
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

/// A call that will be answered: what is said to each of its records.
type Called = (Instant, Vec<(Delivery, Said)>);

/// The service of a life: what a loop hands its deliveries to.
pub(super) fn service(world: &Arc<World>, life: &Arc<Life>) -> Leaf {
    let (calls, called) = mpsc::channel(10_000);
    let (ear, heard) = (world.clone(), life.clone());
    let mut call = 0;
    let (leaf, answers) = Leaf::played(move |batch| {
        // At the very moment of the call: what holds of deliveries is judged here.
        call += 1;
        let said: Vec<_> = batch.iter().map(|delivery| hear(&ear, &heard, delivery, call)).collect();
        let after = said.iter().map(|(_, after)| *after).max().unwrap_or_default();
        let answers = batch.into_iter().zip(said).map(|(delivery, (said, _))| (delivery, said)).collect();
        calls.try_send((Instant::now() + after, answers)).expect("the service outlives the loop");
    });
    tokio::spawn(serve(world.clone(), life.clone(), called, answers));
    leaf
}

/// Answers until the loop is gone.
async fn serve(world: Arc<World>, life: Arc<Life>, mut called: mpsc::Receiver<Called>, answers: mpsc::Sender<Answer>) {
    let mut due: BTreeMap<(Instant, u64), Vec<(Delivery, Said)>> = BTreeMap::new();
    let mut count = 0;
    loop {
        let next = due.keys().next().copied();
        tokio::select! {
            biased;
            call = called.recv() => {
                let Some((at, batch)) = call else { return };
                count += 1;
                due.insert((at, count), batch);
            }
            () = until(next) => {
                for (delivery, said) in due.pop_first().map(|(_, batch)| batch).unwrap_or_default() {
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
fn hear(world: &Arc<World>, life: &Arc<Life>, delivery: &Delivery, call: u64) -> (Said, Duration) {
    world.note(|| format!("{life} is called with {} ({})", delivery.position, delivery.attempt));
    world.judge(|ledger| ledger.delivered(life, delivery, call));
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
        said if recovered && said.fails() => match says(plan, number, most_attempts(&delivery.route)) {
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
    let wish = said.wish();
    match said {
        Said::Reply { status, count, big } => {
            let records: Vec<ReplyRecord> = (0..count)
                .map(|index| ReplyRecord { value: Some(reply_value(number, index, big).into()), ..ReplyRecord::default() })
                .collect();
            let body = records.first().and_then(|record| record.value.clone());
            Outcome::Reply(Reply { status, records, body, retry_after: wish })
        }
        Said::Ignore => Outcome::Ignore,
        Said::Retry { .. } => Outcome::Retry { reason: "not yet".to_owned(), after: wish },
        Said::Hang => Outcome::Retry { reason: "no answer".to_owned(), after: None },
        Said::Reject => Outcome::Reject { reason: "never".to_owned() },
        Said::Away => Outcome::NoService { reason: "nobody there".to_owned(), after: None },
    }
}
