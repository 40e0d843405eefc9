//! Routes that are paused: asking for it, and a copy on disk, for a start without the broker.
//!
//! Invariant: a pause is stored in the mesh before it is answered, and lasts over restarts and new tables until the route is resumed.
//! Invariant: a route whose pause is known on disk delivers nothing before the mesh's log was read.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Control, cache,
    log::pause_key,
    marks,
    reset::OperationError,
    state::{Shared, now_ms},
};
use crate::pause::{Pause, Pauses};

/// Pause before the disk is tried again.
const AGAIN: Duration = Duration::from_secs(10);

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
        let route = self.route(route).await?.name.to_string();
        marks::check("reason", reason)?;
        marks::check("by", by)?;
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
            self.route(route).await?;
        }
        let before = self.say(route, None).await?;
        Ok(before.contains_key(route))
    }

    /// Writes a route's mark. What was paused before is returned.
    async fn say(&self, route: &str, value: Option<Bytes>) -> Result<Arc<Pauses>, OperationError> {
        let before = self.0.pauses.borrow().clone();
        let what = format!("{route} is {}", if value.is_some() { "paused" } else { "resumed" });
        marks::store(&self.0, pause_key(&self.0.config.mesh, route), value, &what).await?;
        Ok(before)
    }
}
