//! `mesh.v1`: the protobuf API of the event mesh.
//!
//! The `.proto` files under `proto/` are the API reference; this crate holds the code generated from them.
//!
//! Invariant: generated code is committed, and `tests/fresh.rs` fails when it is stale, so a build needs no protoc.
//! Invariant: field numbers never change meaning. What is removed is reserved.

pub mod admin;

/// Messages, clients and servers of the package `mesh.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::disallowed_methods, rustdoc::all)]
pub mod v1 {
    include!("generated/mesh.v1.rs");
}

/// The encoded `FileDescriptorSet` of the package, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/mesh.v1.bin");
