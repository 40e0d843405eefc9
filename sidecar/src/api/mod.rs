//! The listeners. Floor 5.

pub mod listen;
