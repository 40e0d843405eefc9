//! Support for the suites and benches of the event mesh.

pub mod kafka;
