//! Faults: what is wrong with a table, where, and what to do about it.
//!
//! Invariant: a fault names a field by its path, and carries a stable code, so that a program
//! can act on it and a person can find it.

use std::fmt;

use serde::Serialize;

/// Stable codes of faults and warnings.
pub mod code {
    /// The text is not YAML or JSON.
    pub const SYNTAX: &str = "syntax";
    /// The text, or a part of it, is beyond a limit.
    pub const LIMIT: &str = "limit";
    /// A feature of YAML that a table does not use: anchors, aliases, tags, several documents.
    pub const UNSUPPORTED: &str = "unsupported";
    /// A field that the table does not know.
    pub const UNKNOWN_FIELD: &str = "unknown_field";
    /// The same key, name or topic twice.
    pub const DUPLICATE: &str = "duplicate";
    /// A value of the wrong type.
    pub const TYPE: &str = "type";
    /// A required field is missing.
    pub const MISSING: &str = "missing";
    /// A value that is not allowed.
    pub const VALUE: &str = "value";
    /// A name that the broker would refuse.
    pub const NAME: &str = "name";
    /// Two fields, or two routes, that contradict each other.
    pub const CONFLICT: &str = "conflict";
    /// A CEL expression that is refused.
    pub const EXPRESSION: &str = "expression";
    /// A schema of a topic that is refused.
    pub const SCHEMA: &str = "schema";
    /// A route onto its own source that can never end.
    pub const ENDLESS: &str = "endless";
    /// A warning: a loop over several routes.
    pub const LOOP: &str = "loop";
}

/// One thing that is wrong with a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The name of the source, as it was given to [`parse`](crate::parse); empty when the table
    /// was not read from a text.
    pub file: String,
    /// The line, counted from 1; 0 when unknown.
    pub line: u32,
    /// The column in characters, counted from 1; 0 when unknown.
    pub column: u32,
    /// The path of the field, such as `spec.routes[2].to`; empty for the text as a whole.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it; empty when the message says it all.
    pub hint: String,
    /// A stable code, one of [`code`].
    pub code: &'static str,
}

impl Fault {
    /// A fault at a field, with no place in a text yet.
    pub(crate) fn new(code: &'static str, field: impl Into<String>, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { file: String::new(), line: 0, column: 0, field: field.into(), message: message.into(), hint: hint.into(), code }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.file.is_empty() {
            write!(f, "{}:", self.file)?;
        }
        if self.line > 0 {
            write!(f, "{}:{}:", self.line, self.column)?;
        }
        if !self.file.is_empty() || self.line > 0 {
            f.write_str(" ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}

/// All faults of a table, in the order of the text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Faults(pub Vec<Fault>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}
