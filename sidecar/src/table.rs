//! The routing table in force. Floor 0.

use std::sync::Arc;

use mesh_routing::CompiledTable;

/// A compiled table with its place in the mesh's history.
#[derive(Debug)]
pub struct ActiveTable {
    /// The generation; 0 for a pinned table.
    pub generation: u64,
    /// When it was applied, in milliseconds since 1970-01-01 UTC: where `start: applied` begins.
    pub applied_ms: i64,
    /// Where it came from.
    pub origin: TableOrigin,
    /// The table; of one that the mesh gave, the part that this sidecar runs: see [`mesh_routing::load_part`].
    pub compiled: Arc<CompiledTable>,
}

/// Where a table came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableOrigin {
    /// From the mesh's control topic.
    Mesh,
    /// From the copy on disk.
    Cache,
    /// From the file that the config pins.
    Pinned,
}

/// The table in force, or `None` before there is one. One writer (`control`), any number of readers.
pub type TableWatch = tokio::sync::watch::Receiver<Option<Arc<ActiveTable>>>;
