//! Reads records. Floor 4.

pub mod subscription;
