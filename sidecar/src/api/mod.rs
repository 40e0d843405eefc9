//! The listeners. Floor 5.

pub mod admin;
pub mod probe;
