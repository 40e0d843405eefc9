//! Support of the suites and benches: real processes, brokers, services of foreign frameworks, and the judge over what they did.
//!
//! Invariant: what a test starts ends with the test. Every process lives in a group of its own that is killed when its handle is dropped,
//! and a watchdog kills what is left if the test run itself is killed.
//! Invariant: what cannot be had (Java, Python) is skipped with a line `SKIPPED: …`, and is a failure with `CI=true`.

pub mod bench;
pub mod broker;
pub mod certificates;
pub mod conformance;
pub mod grpc;
pub mod http;
pub mod kafka;
pub mod load;
pub mod mesh;
pub mod newer;
pub mod oracle;
pub mod otlp;
pub mod ports;
pub mod process;
pub mod proxy;
pub mod python;
pub mod service;
pub mod sidecar;
pub mod soak;
pub mod stage;

/// The folder of the workspace.
pub fn workspace() -> &'static std::path::Path {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(std::path::Path::new("."))
}

/// Whether the suites run in their full length: `MESH_FULL=1`. Without it they take a short form that fits a CI run.
pub fn full() -> bool {
    std::env::var("MESH_FULL").is_ok_and(|value| value == "1")
}

/// Says that something is skipped, on a line of its own.
///
/// # Errors
/// With `CI=true`, where nothing may be skipped.
pub fn skip(what: &str) -> anyhow::Result<()> {
    eprintln!("\nSKIPPED: {what}");
    anyhow::ensure!(!std::env::var("CI").is_ok_and(|value| value == "true"), "SKIPPED: {what}, which is a failure with CI=true");
    Ok(())
}
