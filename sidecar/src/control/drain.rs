//! Draining: of this process, or of another instance of the mesh through `__mesh.commands`.
//!
//! Invariant: an instance answers before it begins, so whoever asked knows that it was heard.

use std::time::Duration;

use mesh_proto::v1;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Control, commands::drain_at, report, reset::OperationError, state::Shared};

/// How long another instance may take to answer where the request does not say.
const WAIT: Duration = Duration::from_secs(30);
/// The longest that it may take.
const LONGEST: Duration = Duration::from_secs(10 * 60);
/// How often it is looked whether it went without an answer.
const LOOK: Duration = Duration::from_millis(250);

/// Deliveries of this process that are at services.
pub(super) fn in_flight(shared: &Shared) -> u64 {
    shared.board.routes().iter().map(|route| route.in_flight).sum()
}

impl Control {
    /// Cancelled when somebody asks this process to drain: `app` obeys.
    pub fn drain_asked(&self) -> &CancellationToken {
        &self.0.drain
    }

    /// Drains an instance, this one or another one. Returns when it has heard of it. Dropping the future gives up; an instance that was asked may
    /// drain until the request's time is over.
    ///
    /// # Errors
    /// If there is no such instance, or it is lost, refuses, or is silent.
    pub async fn drain(&self, request: v1::DrainRequest) -> Result<v1::DrainResponse, OperationError> {
        let shared = &self.0;
        let instance = if request.instance.is_empty() { shared.instance.clone() } else { request.instance };
        if instance == shared.instance {
            let in_flight = in_flight(shared);
            tracing::info!(in_flight, "a drain was asked for");
            shared.drain.cancel();
            return Ok(v1::DrainResponse { in_flight, instance });
        }
        match report::liveness(shared, &instance) {
            Some(Ok(())) => {}
            Some(Err(silent)) => {
                let seconds = silent.as_secs();
                return Err(OperationError::Refused(format!(
                    "instance {instance} has not reported for {seconds} s: it is lost, and would not hear of it; end its process where it runs"
                )));
            }
            None => {
                return Err(OperationError::Invalid(format!("there is no instance {instance} in this mesh: `mesh-ctl status` lists them")));
            }
        }
        let wait = if request.wait_ms == 0 { WAIT } else { Duration::from_millis(request.wait_ms).min(LONGEST) };
        let until = Instant::now() + wait;
        tokio::select! {
            answer = drain_at(shared, &instance, until) => {
                let answer = answer.map_err(OperationError::Refused)?;
                Ok(v1::DrainResponse { in_flight: answer.in_flight, instance })
            }
            () = gone(shared, &instance) => Ok(v1::DrainResponse { in_flight: 0, instance }),
            () = tokio::time::sleep_until(until) => {
                let wait = wait.as_secs_f64();
                let said = format!("no answer within {wait} s from instance {instance}: is it alive? See `mesh-ctl status`");
                Err(OperationError::Unclear(said))
            }
        }
    }
}

/// Waits until an instance took its report back: it ends, whether its answer came or not.
async fn gone(shared: &Shared, instance: &str) {
    while report::liveness(shared, instance).is_some() {
        tokio::time::sleep(LOOK).await;
    }
}
