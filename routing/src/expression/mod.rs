//! CEL expressions of a table, guarded: a table reaches every sidecar, so no expression may take
//! one down or run without bound.
//!
//! The way of an expression: [`guard`] bounds the source before the parser sees it; the parser
//! runs on a thread with a large stack; [`walk`] checks the syntax tree and replaces every
//! reference to `record` and `reply` by a numbered slot; [`eval`] fills the slots on demand.
//!
//! Invariant: what compiles evaluates in time and memory linear in the size of the record.

mod eval;
mod guard;
mod json;
mod walk;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use crate::record::{RecordView, ReplyView};

/// The stack of the compiling thread. The parser takes about 40 KiB for a level of nesting.
const STACK: usize = 64 << 20;

/// How long the different expressions of a table may be together. A byte takes up to 10 µs.
const MAX_TOTAL_BYTES: usize = 1 << 20;

/// What an expression may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Roots {
    /// A `filter`: the record only.
    Record,
    /// A `when`: the record and the reply.
    RecordAndReply,
}

/// An expression to compile, and the path of its field.
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
    pub(crate) roots: Roots,
}

/// Why an expression is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) message: String,
    pub(crate) hint: String,
}

impl Refusal {
    fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }
}

/// A compiled CEL expression over a record, and over its reply. Cheap to clone; two are equal
/// when their sources are.
///
/// It sees `record.topic`, `.partition`, `.offset`, `.timestamp`, `.key` (text, or bytes when it
/// is not UTF-8, or null), `.text`, `.json`, `.headers` and `.size` (bytes of the value), and in a
/// case `reply.status`, `.text`, `.json`, `.headers` and `.size`. `has(record.json.a.b)` is false
/// when any part of the path is missing.
#[derive(Clone)]
pub struct Expression(Arc<walk::Program>);

impl Expression {
    /// The source, as it was written.
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// Whether it asks for `reply.status`, so that it means failures too.
    pub fn asks_for_status(&self) -> bool {
        self.0.slots.iter().any(|(_, slot)| matches!(slot, walk::Slot::Status))
    }

    /// Whether it asks for the reply's headers.
    pub fn asks_for_reply_headers(&self) -> bool {
        use walk::{Side::Reply, Slot};
        self.0.slots.iter().any(|(_, slot)| matches!(slot, Slot::Headers(Reply) | Slot::Header(Reply, _) | Slot::HasHeader(Reply, _)))
    }

    /// Whether it asks for anything of the reply; one that does not follows from the record alone.
    pub fn asks_for_reply(&self) -> bool {
        use walk::{Side::Reply, Slot};
        let body = |slot: &Slot| matches!(slot, Slot::Size(Reply) | Slot::HasValue(Reply) | Slot::HasJson(Reply, _));
        self.asks_for_status() || self.asks_for_body() || self.asks_for_reply_headers() || self.0.slots.iter().any(|(_, slot)| body(slot))
    }

    /// Whether it asks for what only an answer with a body has.
    pub(crate) fn asks_for_body(&self) -> bool {
        use walk::{Side::Reply, Slot};
        self.0.slots.iter().any(|(_, slot)| matches!(slot, Slot::Json(Reply, _) | Slot::Text(Reply)))
    }

    /// Evaluates the expression.
    ///
    /// # Errors
    ///
    /// When the record has not what the expression asks for (it is not JSON, a field is missing,
    /// a type does not fit), or when the result is neither true nor false.
    pub fn evaluate(&self, record: &RecordView<'_>, reply: Option<&ReplyView<'_>>) -> Result<bool, ExpressionError> {
        eval::evaluate(&self.0, record, reply).map_err(|message| ExpressionError { expression: self.0.source.clone(), message })
    }
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.0.source == other.0.source
    }
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Expression").field(&self.source()).finish()
    }
}

/// An expression that failed on a record. The record is at fault or the expression is; trying
/// again does not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{expression}`: {message}")]
pub struct ExpressionError {
    /// The source of the expression.
    pub expression: Arc<str>,
    /// What went wrong; it names fields, and holds no more of the record than a short value.
    pub message: String,
}

/// What has been compiled, by source.
type Known = HashMap<(String, Roots), Expression>;

/// The expressions of the last table that was compiled. A table is compiled when it is read and
/// again when it is put to use, and the next table mostly has the same ones.
static LAST: Mutex<Option<Arc<Known>>> = Mutex::new(None);

/// Compiles expressions, on one thread with a large stack. Equal sources are compiled once.
pub(crate) fn compile_all(sources: Vec<Source>) -> Vec<(String, Result<Expression, Refusal>)> {
    if sources.is_empty() {
        return Vec::new();
    }
    let paths: Vec<String> = sources.iter().map(|source| source.path.clone()).collect();
    let thread = std::thread::Builder::new().name("cel-compile".into()).stack_size(STACK).spawn(move || compile_here(sources));
    let done = thread.ok().and_then(|thread| thread.join().ok());
    done.unwrap_or_else(|| {
        let refusal = Refusal::new("the expression could not be compiled", "simplify it");
        paths.into_iter().map(|path| (path, Err(refusal.clone()))).collect()
    })
}

fn compile_here(sources: Vec<Source>) -> Vec<(String, Result<Expression, Refusal>)> {
    // Shared, since two tables may be compiled at once.
    let before = LAST.lock().ok().and_then(|last| last.clone()).unwrap_or_default();
    let mut known = Known::new();
    let mut bytes = 0;
    let mut out = Vec::with_capacity(sources.len());
    for source in sources {
        let key = (source.text, source.roots);
        if let Some(expression) = known.get(&key) {
            out.push((source.path, Ok(expression.clone())));
            continue;
        }
        bytes += key.0.len();
        let result = match before.get(&key) {
            _ if bytes > MAX_TOTAL_BYTES => {
                let message = format!("the expressions of the table have more than {MAX_TOTAL_BYTES} bytes together");
                Err(Refusal::new(message, "use the same ones in several routes, or split the mesh"))
            }
            Some(expression) => Ok(expression.clone()),
            None => compile(&key.0, key.1),
        };
        if let Ok(expression) = &result {
            known.insert(key, expression.clone());
        }
        out.push((source.path, result));
    }
    if let Ok(mut last) = LAST.lock() {
        *last = Some(Arc::new(known));
    }
    out
}

fn compile(text: &str, roots: Roots) -> Result<Expression, Refusal> {
    guard::check(text)?;
    let parsed = eval::environment().compile(text).map_err(|errors| {
        let first = errors.errors.first();
        let message = first.map_or_else(String::new, |e| e.msg.clone());
        let column = first.map_or(0, |e| e.pos.1);
        let message = format!("not CEL: {message} (at character {column} of the expression)");
        Refusal::new(message, "see cel.dev for the language")
    })?;
    let program = walk::walk(text, parsed.expression().clone(), roots)?;
    Ok(Expression(Arc::new(program)))
}

#[cfg(test)]
mod tests;
