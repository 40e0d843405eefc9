//! What routes would do with records, and did: foretold of a table that is not applied (`plan`), and told of records that exist (`explain`,
//! `trace`). From the records alone, with no tracing backend; only of a record that is under way its owner is asked (`explain`).
//!
//! Invariant: nothing is delivered, committed or written.
//! Invariant: every reading is bounded, in offsets, bytes and time, and what was left out for that is said.
//! Invariant: the rules are those of the data path: [`crate::judge`] and `mesh_routing` decide, here as there.

mod explain;
mod flow;
mod goes;
mod plan;
mod scan;
mod trace;

use tokio::sync::SemaphorePermit;

use super::{Control, reset::OperationError};

impl Control {
    /// Waits until there is room to read topics. Cancel-safe.
    async fn room(&self) -> Result<SemaphorePermit<'_>, OperationError> {
        self.0.reading.acquire().await.map_err(|error| OperationError::Refused(error.to_string()))
    }
}
