//! Hands deliveries to handlers and brings their outcomes back. Floor 3.
//!
//! Invariant: every delivery that goes in comes back as exactly one [`crate::outcome::Answer`].

pub mod desk;
