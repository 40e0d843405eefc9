//! The benchmarks: the rows of the design's table of speeds, each with its floor in the same run.
//!
//! Invariant: sidecar, broker, service and load are processes of their own, so that the processor time of each is its own.
//! Invariant: a row and its floors alternate in every round, so that both meet the machine in the same mood; ratios are medians of the
//! rounds' own ratios.

mod cost;
pub mod curves;
pub mod ground;
pub mod guard;
pub mod kafka;
mod latency;
mod life;
pub mod load;
pub mod measure;
mod memory;
pub mod open_loop;
pub mod plot;
pub mod report;
pub mod role;
pub mod rows;
pub mod scale;
pub mod service;
mod throughput;
