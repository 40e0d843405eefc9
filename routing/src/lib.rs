//! The routing table (in work on its own branch).
/// Placeholder.
#[derive(Debug)]
pub struct CompiledTable {}
