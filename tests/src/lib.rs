//! Support, suites and benches of the event mesh.

pub mod conformance;
pub mod kafka;
