//! What routes would do with records, and did: foretold of a table that is not applied (`plan`), and told of records that exist (`explain`,
//! `trace`). From the records alone: no tracing backend, and no question to the sidecars that run the routes.
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

use std::sync::Arc;

use tokio::sync::SemaphorePermit;

use super::{Control, reset::OperationError};
use crate::table::ActiveTable;

impl Control {
    /// Waits until there is room to read topics. Cancel-safe.
    async fn room(&self) -> Result<SemaphorePermit<'_>, OperationError> {
        self.0.reading.acquire().await.map_err(|error| OperationError::Refused(error.to_string()))
    }

    /// The table in force here.
    fn active(&self) -> Result<Arc<ActiveTable>, OperationError> {
        self.0.table.borrow().clone().ok_or_else(|| self.no_table())
    }
}
