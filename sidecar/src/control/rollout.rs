//! Canaries: tables that some instances run before all do. What is known of the newest one, and how it ends before it is promoted.
//!
//! Invariant: a canary that was aborted is over for good: its instances go back to the newest generation that is meant for all, also those that were
//! away meanwhile.
//! Invariant: one that is aborted by itself is so by an instance that it chose, for what the chosen instances reported.
//! Invariant: who aborts is answered by what the log says: a promotion that came first is a conflict.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError},
    time::Duration,
};

use mesh_proto::v1;
use mesh_routing::channel::{Channel, Member};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{
    Control, history,
    log::{Abort, abort_key},
    marks, report,
    reset::OperationError,
    snapshot::{Limits, Snapshot},
    state::{Shared, now_ms},
    topics::CONTROL_TOPIC,
};
use crate::{outcome::Disposition, status::Board};

/// How often the instances of a canary look at what they report.
const LOOK: Duration = Duration::from_secs(1);
/// How many instances that refuse it a reason names.
const NAMED: usize = 5;

/// What is told of a canary.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rollout {
    /// Its entry in the history.
    pub(super) entry: v1::Generation,
    /// When it is aborted.
    limits: Limits,
}

impl Rollout {
    /// Of a snapshot that is a canary.
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        Self { entry: history::entry(snapshot, String::new()), limits: snapshot.about.limits }
    }
}

/// Dead letters of this instance since it took a canary.
#[derive(Debug, Default)]
pub(super) struct Count {
    /// The canary; 0: none was taken yet.
    generation: u64,
    dead_letters: u64,
    /// What each route had counted when it was looked at last: one that begins anew counts from 0.
    seen: HashMap<Arc<str>, u64>,
}

impl Count {
    fn begin(&mut self, generation: u64, board: &Board) {
        *self = Self { generation, dead_letters: 0, seen: dead_letters(board).collect() };
    }

    fn look(&mut self, board: &Board) {
        for (route, now) in dead_letters(board) {
            let before = self.seen.insert(route, now).unwrap_or(0);
            self.dead_letters += if now >= before { now - before } else { now };
        }
    }
}

fn dead_letters(board: &Board) -> impl Iterator<Item = (Arc<str>, u64)> {
    board.routes().into_iter().map(|status| (status.route, status.dispositions.get(&Disposition::DeadLettered).copied().unwrap_or(0)))
}

/// Begins to count dead letters: this instance takes a canary.
pub(super) fn begin(shared: &Shared, generation: u64) {
    let mut count = shared.canary.lock().unwrap_or_else(PoisonError::into_inner);
    if count.generation != generation {
        count.begin(generation, &shared.board);
    }
}

/// Dead letters since this instance took the canary of a generation; 0 if it did not.
pub(super) fn dead_letters_since(shared: &Shared, generation: u64) -> u64 {
    let running = shared.local.borrow().generation() == generation;
    let mut count = shared.canary.lock().unwrap_or_else(PoisonError::into_inner);
    if generation == 0 || (count.generation != generation && !running) {
        return 0;
    }
    if running {
        // From its copy on disk, perhaps.
        if count.generation != generation {
            count.begin(generation, &shared.board);
        }
        count.look(&shared.board);
    }
    count.dead_letters
}

/// Whether the text of a channel is meant for this instance.
pub(super) fn chosen(shared: &Shared) -> impl Fn(&str) -> bool + Send + use<> {
    let (instance, services, labels) = (shared.instance.clone(), shared.services.clone(), shared.labels.clone());
    move |channel| match channel.parse() {
        Ok(Channel::Stable) => true,
        Ok(Channel::Canary(selector)) => selector.chooses(&Member { instance: &instance, services: &services, labels: &labels }),
        Err(_) => false,
    }
}

/// The newest generation if it is a canary, with what these instances report of it.
pub(super) fn status(shared: &Shared, instances: &[v1::InstanceStatus]) -> Option<v1::Rollout> {
    let (generation, selector, stable, aborted) = shared.log(|log| {
        let head = log.winner(log.head()).filter(|head| head.is_canary())?;
        let selector = match &head.channel {
            Some(Channel::Canary(selector)) => selector.to_string(),
            Some(Channel::Stable) | None => String::new(),
        };
        Some((log.head(), selector, log.stable(), log.aborted(log.head()).cloned()))
    })?;
    let known = shared.local.borrow().rollout.clone().filter(|rollout| rollout.entry.generation == generation);
    let limits = known.as_ref().map(|rollout| rollout.limits).unwrap_or_default();
    let mut entry = known.map_or_else(|| v1::Generation { generation, ..v1::Generation::default() }, |rollout| rollout.entry.clone());
    entry.aborted = aborted.map(|abort| said(&abort)).unwrap_or_default();
    let dead_letters = instances.iter().map(|instance| instance.canary_dead_letters).sum();
    let refusals = instances.iter().filter(|instance| instance.refused_generation == generation).count() as u64;
    let canary = v1::Canary { selector, max_dead_letters: limits.dead_letters, max_refusals: limits.refusals };
    Some(v1::Rollout { generation, stable_generation: stable, canary: Some(canary), dead_letters, refusals, entry: Some(entry) })
}

/// How a canary ended, in a line.
pub(super) fn said(abort: &Abort) -> String {
    let Abort { by, at_ms, reason } = abort;
    let mut said = "aborted".to_owned();
    if !by.is_empty() {
        said += &format!(" by {by}");
    }
    if let (true, Ok(at)) = (*at_ms > 0, jiff::Timestamp::from_millisecond(*at_ms)) {
        said += &format!(" at {at:.0}");
    }
    if !reason.is_empty() {
        said += &format!(": {reason}");
    }
    history::clean(&said, 700)
}

/// Why a canary is to be aborted; `None` while it may go on.
fn exceeded(rollout: &v1::Rollout, instances: &[v1::InstanceStatus]) -> Option<String> {
    let limits = rollout.canary.as_ref()?;
    if rollout.refusals > limits.max_refusals {
        let refusing = instances.iter().filter(|instance| instance.refused_generation == rollout.generation);
        let named: Vec<String> = refusing.take(NAMED).map(|one| format!("{}: {}", one.instance, one.error)).collect();
        let more = if rollout.refusals > NAMED as u64 { "; …" } else { "" };
        return Some(format!("refused by {} ({} allowed): {}{more}", rollout.refusals, limits.max_refusals, named.join("; ")));
    }
    (rollout.dead_letters > limits.max_dead_letters)
        .then(|| format!("dead letters since its instances took it: {} ({} allowed)", rollout.dead_letters, limits.max_dead_letters))
}

/// Aborts a canary that chose this instance, when the reports say so. Until the token is cancelled.
pub(super) async fn watch(shared: Arc<Shared>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let open = shared.log(|log| log.canary().map(|(open, _)| open).filter(|open| log.target(&shared.member()) == *open));
        // What it allows stands in its snapshot, which may not have been read yet; one that cannot be read allows nothing.
        let Some(open) = open.filter(|open| shared.local.borrow().judged >= *open) else { continue };
        let mesh = report::mesh(&shared);
        let reason = mesh.rollout.filter(|rollout| rollout.generation == open).and_then(|rollout| exceeded(&rollout, &mesh.instances));
        let Some(reason) = reason else { continue };
        tracing::warn!(generation = open, reason, "the canary is aborted");
        let by = format!("instance {}", shared.instance);
        match stop.run_until_cancelled(abort(&shared, open, by, history::clean(&reason, 400))).await {
            None | Some(Ok(_)) => {}
            Some(Err(OperationError::Conflict(conflict))) => tracing::info!(generation = open, conflict, "the canary is over already"),
            Some(Err(error)) => tracing::warn!(generation = open, %error, "the canary could not be aborted: tried again"),
        }
    }
}

/// Ends a canary, unless something newer came first in the log. The answer is the generation that all run then.
pub(super) async fn abort(shared: &Shared, generation: u64, by: String, reason: String) -> Result<u64, OperationError> {
    if shared.log(|log| log.winner(generation).is_none_or(|canary| canary.offset >= log.next_offset())) {
        return Err(OperationError::Refused(format!(
            "generation {generation} cannot be aborted: {CONTROL_TOPIC} was created anew, and does not have it. Apply the table that all are to run"
        )));
    }
    let mark = serde_json::to_vec(&Abort { by, at_ms: now_ms(), reason }).map_err(|error| OperationError::Refused(error.to_string()))?;
    let key = abort_key(&shared.config.mesh, generation, &uuid::Uuid::new_v4().simple().to_string());
    marks::store(shared, key, Some(mark.into()), "the rollout is aborted").await?;
    shared.log(|log| match (log.aborted(generation), log.after(generation)) {
        (Some(_), _) => Ok(log.stable()),
        (None, Some(newer)) => Err(OperationError::Conflict(format!(
            "generation {generation} was not aborted: generation {newer} was applied meanwhile (`mesh-ctl history` tells what it is)"
        ))),
        (None, None) => Err(OperationError::Unclear(format!(
            "it is not known whether generation {generation} is over: somebody deletes records of {CONTROL_TOPIC}; give the command again"
        ))),
    })
}

impl Control {
    /// Ends the canary that is open; 0 means whichever is.
    ///
    /// # Errors
    /// If none is open, [`OperationError::Conflict`] if another one is or it was promoted meanwhile, or the broker fails; says when it is not known whether
    /// it is over.
    pub async fn abort_rollout(&self, generation: u64, by: String, reason: String) -> Result<v1::AbortRolloutResponse, OperationError> {
        marks::check("reason", &reason)?;
        marks::check("by", &by)?;
        self.catch_up().await.map_err(|error| OperationError::Refused(error.to_string()))?;
        let (open, ended) = self.0.log(|log| {
            let ended = log.aborted(if generation == 0 { log.head() } else { generation }).map(said);
            (log.canary().map(|(open, _)| open), ended)
        });
        match open {
            Some(open) if generation == 0 || generation == open => {
                let stable_generation = abort(&self.0, open, by, reason).await?;
                Ok(v1::AbortRolloutResponse { generation: open, stable_generation })
            }
            Some(open) => Err(OperationError::Conflict(format!(
                "generation {generation} is not the canary: generation {open} is (`mesh-ctl rollout status` tells what there is)"
            ))),
            None => Err(OperationError::Refused(match ended {
                Some(ended) => format!("no rollout is open: the last one was {ended}"),
                None => "no rollout is open".to_owned(),
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::RouteStatus;

    #[test]
    fn a_canary_is_exceeded_by_refusals_and_by_dead_letters() {
        let limits = v1::Canary { selector: "percent=10".into(), max_dead_letters: 2, max_refusals: 0 };
        let rollout = |dead_letters, refusals| v1::Rollout {
            generation: 7,
            canary: Some(limits.clone()),
            dead_letters,
            refusals,
            ..v1::Rollout::default()
        };
        let refusing =
            v1::InstanceStatus { instance: "a".into(), refused_generation: 7, error: "too new".into(), ..v1::InstanceStatus::default() };
        assert_eq!(exceeded(&rollout(2, 0), &[]), None);
        assert_eq!(exceeded(&rollout(3, 0), &[]).as_deref(), Some("dead letters since its instances took it: 3 (2 allowed)"));
        assert_eq!(exceeded(&rollout(0, 1), &[refusing]).as_deref(), Some("refused by 1 (0 allowed): a: too new"));
    }

    #[test]
    fn dead_letters_count_from_the_canary_on_and_over_restarts_of_routes() {
        let board = Board::default();
        let told = |route: &str, dead: u64| {
            let dispositions = [(Disposition::DeadLettered, dead)].into();
            board.post(RouteStatus { route: route.into(), dispositions, ..RouteStatus::default() });
        };
        told("a", 5);
        let mut count = Count::default();
        count.begin(7, &board);
        count.look(&board);
        assert_eq!(count.dead_letters, 0);
        told("a", 7);
        told("new", 1);
        count.look(&board);
        assert_eq!(count.dead_letters, 3);
        told("a", 1);
        count.look(&board);
        assert_eq!(count.dead_letters, 4, "it began anew");
    }

    #[test]
    fn how_it_ended_is_one_line() {
        let abort = Abort { by: "ann".into(), at_ms: 5_000, reason: "too\nslow".into() };
        assert_eq!(said(&abort), "aborted by ann at 1970-01-01T00:00:05Z: too slow");
        assert_eq!(said(&Abort::default()), "aborted");
    }
}
