//! What listeners serve. Floor 5.

pub mod admin;
