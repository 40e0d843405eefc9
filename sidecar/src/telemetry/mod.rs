//! Logs, metrics and traces. Floor 1.
//!
//! Invariant: nothing per record above `debug`; no label carries a key, an offset or an id.
//! Invariant: with telemetry off, a span costs a copy of its parent's context and nothing else.

mod context;
mod export;
pub mod health;
pub mod logs;
pub mod metrics;
pub mod trace;
