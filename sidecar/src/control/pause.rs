//! Routes that are paused: asking for it, and a copy on disk, for a start without the broker.
//!
//! Invariant: a pause is stored in the mesh before it is answered, and lasts over restarts and new tables until the route is resumed.
//! Invariant: a route whose pause is known on disk delivers nothing before the mesh's log was read.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Control,
    apply::possibly_stored,
    cache,
    log::pause_key,
    reset::OperationError,
    state::{Shared, now_ms},
    topics::CONTROL_TOPIC,
};
use crate::{
    broker::Outgoing,
    pause::{Pause, Pauses},
    record::Record,
};

/// How long the broker may take.
const BROKER: Duration = Duration::from_secs(15);
/// How long until what was stored is read back.
const READ_BACK: Duration = Duration::from_secs(15);
/// Pause before the disk is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// The longest reason and name, in bytes.
const TEXT: usize = 500;

/// Takes the pauses on disk over, until the mesh's are known.
pub(super) async fn load(shared: &Shared) {
    let state = shared.config.state.clone();
    match spawn_blocking(move || cache::load_pauses(&state)).await {
        Ok(Ok(pauses)) => drop(shared.pauses.send_replace(Arc::new(pauses))),
        Ok(Err(reason)) => tracing::warn!(reason, "the copy of the pauses on disk is refused: a start without the broker knows of none"),
        Err(error) => tracing::error!(%error, "the copy of the pauses on disk was not read"),
    }
}

/// Keeps the copy on disk, until the token is cancelled.
pub(super) async fn keep(shared: Arc<Shared>, stop: CancellationToken) {
    let mut pauses = shared.pauses.subscribe();
    let mut stored = pauses.borrow_and_update().clone();
    loop {
        let changed = async { pauses.wait_for(|pauses| **pauses != *stored).await.map(|pauses| pauses.clone()) };
        let Some(Ok(now)) = stop.run_until_cancelled(changed).await else { return };
        let (state, content) = (shared.config.state.clone(), now.clone());
        // Not cancelled: a stop waits for the milliseconds that the disk takes.
        let failed = match spawn_blocking(move || cache::store_pauses(&state, &content)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        match &failed {
            None => stored = now,
            Some(_) if stop.run_until_cancelled(sleep(AGAIN)).await.is_none() => return,
            Some(_) => {}
        }
        shared.wait_for("pauses copy", failed.map(|error| format!("the copy of the pauses cannot be written: {error}")));
    }
}

impl Control {
    /// Pauses a route in the whole mesh. `false` if it was paused before.
    ///
    /// # Errors
    /// If there is no such route, or the broker fails; says when it is not known whether it is paused.
    pub async fn pause(&self, route: &str, by: &str, reason: &str) -> Result<bool, OperationError> {
        let route = self.route(route)?.name.to_string();
        for (field, text) in [("reason", reason), ("by", by)] {
            if text.len() > TEXT || text.contains(char::is_control) {
                return Err(OperationError::Invalid(format!("{field}: give one line of at most {TEXT} bytes")));
            }
        }
        let pause = Pause { by: by.to_owned(), since_ms: now_ms(), reason: reason.to_owned() };
        let value = serde_json::to_vec(&pause).map_err(|error| OperationError::Refused(error.to_string()))?;
        let before = self.say(&route, Some(value.into())).await?;
        Ok(!before.contains_key(&route))
    }

    /// Lets a route go on. `false` if it was not paused.
    ///
    /// # Errors
    /// As [`Control::pause`]. A route that is paused and in no table any more can be resumed.
    pub async fn resume(&self, route: &str) -> Result<bool, OperationError> {
        if !self.0.pauses.borrow().contains_key(route) {
            self.route(route)?;
        }
        let before = self.say(route, None).await?;
        Ok(before.contains_key(route))
    }

    /// Writes a route's record, and waits until it was read here. What was paused before is returned.
    async fn say(&self, route: &str, value: Option<Bytes>) -> Result<Arc<Pauses>, OperationError> {
        let wanted = value.is_some();
        let producer = self.0.broker.producer();
        let refused = |error: &dyn std::fmt::Display| OperationError::Refused(format!("{CONTROL_TOPIC} takes no record: {error}"));
        producer.learn_topic(CONTROL_TOPIC, BROKER).await.map_err(|error| refused(&error))?;
        let before = self.0.pauses.borrow().clone();
        let key = pause_key(&self.0.config.mesh, route);
        let record = Record { key: Some(key.into()), value, headers: Vec::new(), timestamp_ms: None };
        let unclear =
            |detail: &str| OperationError::Unclear(format!("it is not known whether that was stored: {detail}; give the command again"));
        let sending = producer.send(vec![Outgoing { topic: CONTROL_TOPIC.into(), partition: Some(0), record }]);
        let stored =
            timeout(BROKER, sending).await.map_err(|_| unclear(&format!("no answer of the broker within {} s", BROKER.as_secs())))?;
        let position = match stored.into_iter().next() {
            Some(Ok(position)) => position,
            Some(Err(error)) if possibly_stored(error.kind) => return Err(unclear(&error.to_string())),
            Some(Err(error)) => return Err(refused(&error)),
            None => return Err(unclear("the broker said nothing")),
        };
        let mut progress = self.0.progress.subscribe();
        let read = timeout(READ_BACK, progress.wait_for(|progress| progress.caught_up && progress.next_offset > position.offset)).await;
        if !read.is_ok_and(|read| read.is_ok()) {
            let detail = if wanted { "paused" } else { "resumed" };
            return Err(OperationError::Unclear(format!(
                "that {route} is {detail} is stored, and was not read back within {} s: {}",
                READ_BACK.as_secs(),
                self.0.waiting_reasons().join("; ")
            )));
        }
        Ok(before)
    }
}
