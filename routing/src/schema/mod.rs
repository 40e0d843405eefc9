//! The schema guard: what a record's value must look like in a topic. JSON Schema, or a protobuf message. Pure.
//!
//! A table reaches every sidecar, so a schema is guarded like an expression: it refers to nothing outside of itself, its size is bounded, its
//! patterns run in linear time, and a check ends within a number of steps that follows from the value's size.
//!
//! Invariant: no schema and no value makes compiling or checking panic, overflow the stack or run without bound.
//! Invariant: a check names the place of the first fault as a JSON pointer.

mod check;
mod json;
mod protobuf;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use crate::expression::Refusal;
use crate::table::SchemaSpec;

/// The most bytes of one schema, as compact JSON or as base64.
pub(crate) const MAX_BYTES: usize = 128 << 10;
/// The most bytes of all schemas of a table: it travels as one record.
pub(crate) const MAX_TOTAL: usize = 512 << 10;

/// A schema, ready to check values. Cheap to clone.
#[derive(Clone)]
pub struct Schema {
    spec: SchemaSpec,
    kind: Arc<Kind>,
}

enum Kind {
    Json(json::Schema),
    Protobuf(protobuf::Message),
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Schema").field("kind", &self.spec.kind()).finish_non_exhaustive()
    }
}

/// Two schemas are equal when they are written alike.
impl PartialEq for Schema {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.kind, &other.kind) || self.spec == other.spec
    }
}

/// Why a value does not match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Where, as a JSON pointer (RFC 6901); empty for the value as a whole. For protobuf it has the names of fields.
    pub path: String,
    /// What is wrong there, for people.
    pub reason: String,
}

impl Mismatch {
    fn whole(reason: impl Into<String>) -> Self {
        Self { path: String::new(), reason: reason.into() }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.as_str() {
            "" => write!(f, "the value {}", self.reason),
            path => write!(f, "{path} {}", self.reason),
        }
    }
}

impl std::error::Error for Mismatch {}

impl Schema {
    /// Compiles a schema.
    pub(crate) fn compile(spec: &SchemaSpec) -> Result<Self, Refusal> {
        let kind = match spec {
            SchemaSpec::Json(schema) => Kind::Json(json::compile(schema)?),
            SchemaSpec::Protobuf { descriptor, message } => Kind::Protobuf(protobuf::compile(descriptor, message)?),
        };
        Ok(Self { spec: spec.clone(), kind: Arc::new(kind) })
    }

    /// Checks a value. A null value (a tombstone) is for the caller to let pass.
    ///
    /// # Errors
    /// The first fault. A value that is no JSON, or no protobuf, is one.
    pub fn check(&self, value: &[u8]) -> Result<(), Mismatch> {
        match &*self.kind {
            Kind::Json(schema) => check::check(schema, value),
            Kind::Protobuf(message) => protobuf::check(message, value),
        }
    }
}

/// Appends a segment to a JSON pointer.
fn push(path: &mut String, segment: &str) {
    path.push('/');
    for c in segment.chars() {
        match c {
            '~' => path.push_str("~0"),
            '/' => path.push_str("~1"),
            c => path.push(c),
        }
    }
}

/// Shortens what a message quotes.
fn clip(text: &str) -> String {
    const MOST: usize = 60;
    match text.char_indices().nth(MOST) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}…", &text[..at]),
    }
}
