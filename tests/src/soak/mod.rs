//! The verifier: a mesh under load, faults drawn from a seed, and a checker outside of it that knows what was promised.
//!
//! Producers publish through sidecars, several routes ([`lines`]) run beside each other (A → service → B each); what was acknowledged, what the service was given and what it answered stands in
//! [`ledger`]; what lies in A, B and the dead-letter topic, and what was committed, is read past the sidecars by [`ground`]; [`check`] compares.
//!
//! Invariant: the checker believes nothing that a sidecar says about itself: ledgers and topics decide.
//! Invariant: the faults and their times follow from the seed alone; what the machine makes of them does not.
//! Invariant: a checker that cannot fail is worth nothing: each check has a unit test in which it does, and each mutation of the sidecar is caught.

pub mod bounds;
pub mod check;
pub mod disk;
pub mod faults;
pub mod fleet;
pub mod ground;
pub mod ledger;
pub mod lines;
pub mod load;
pub mod payload;
pub mod plan;
pub mod report;
pub mod run;
pub mod service;
pub mod watch;
