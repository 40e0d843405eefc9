//! Evaluates a program over a record and its reply.
//!
//! Invariant: a slot is filled only when the evaluation reaches it; the JSON text is read at most
//! once; and looking slots up again and again, as in the body of a macro, is bounded by [`FUEL`].

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};

use cel::common::types::{CelBool, CelBytes, CelInt, CelMap, CelMapKey, CelNull, CelString, CelTimestamp, DYN_TYPE, Type};
use cel::common::value::{CowVal, StaticVal, Val};
use cel::context::VariableResolver;
use cel::{Context, Env, ExecutionError, Value};
use regex::Regex;

use super::json::{Cell, scan, text_size};
use super::walk::{Program, Side, Slot};
use crate::record::{HeaderSource, RecordView, ReplyView};

/// The function that `matches` becomes: its second argument is a compiled expression.
pub(super) const MATCHES: &str = "@matches";

/// How much an evaluation may look up, in units of about one JSON value or 16 bytes; two more for
/// every byte of the record and the reply.
const FUEL: i64 = 4 << 20;

/// The one environment of all expressions.
pub(super) fn environment() -> &'static Arc<Env> {
    static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| {
        let mut env = Env::stdlib().with_optional_support(false);
        // Cannot fail: no other function has this name. If it did, `matches` would be unknown.
        let _ = env.add_overload(MATCHES, "regex_matches", vec![DYN_TYPE, DYN_TYPE], matches);
        Arc::new(env)
    });
    &ENVIRONMENT
}

fn matches<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let text = args.first().and_then(|arg| arg.downcast_ref::<CelString<'_>>());
    let regex = args.get(1).and_then(|arg| arg.downcast_ref::<Pattern>());
    match (text, regex) {
        (Some(text), Some(regex)) => {
            let found = regex.0.is_match(text.inner());
            Ok(CowVal::owned(CelBool::from(found)))
        }
        _ => Err(ExecutionError::function_error("matches", "the value is no text")),
    }
}

static PATTERN: Type = Type::new_unspecified_type("mesh.pattern");

/// A compiled regular expression as a CEL value.
#[derive(Debug, Clone)]
struct Pattern(Arc<Regex>);

impl Val for Pattern {
    fn get_type(&self) -> &Type {
        &PATTERN
    }

    fn cel_type() -> &'static Type {
        &PATTERN
    }

    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v> {
        Box::new(self.clone())
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

impl StaticVal for Pattern {}

/// Evaluates a program; the error says what went wrong.
pub(super) fn evaluate(program: &Program, record: &RecordView<'_>, reply: Option<&ReplyView<'_>>) -> Result<bool, String> {
    let bytes = |body: Option<&[u8]>| body.map_or(0, |body| i64::try_from(body.len()).unwrap_or(0));
    let bytes = bytes(record.value).saturating_add(bytes(reply.and_then(|reply| reply.body)));
    let slots = Slots {
        program,
        record,
        reply,
        json: [OnceLock::new(), OnceLock::new()],
        fuel: AtomicI64::new(bytes.saturating_mul(2).saturating_add(FUEL)),
    };
    let mut context = Context::with_env(Arc::clone(environment()));
    context.set_variable_resolver(&slots);
    match Value::resolve_val(&program.tree, &context) {
        Ok(value) => match value.downcast_ref::<CelBool>() {
            Some(truth) => Ok(*truth.inner()),
            None => Err(format!("the result is a {}, neither true nor false", value.get_type().name())),
        },
        Err(error) => Err(slots.explain(&error)),
    }
}

struct Slots<'a> {
    program: &'a Program,
    record: &'a RecordView<'a>,
    reply: Option<&'a ReplyView<'a>>,
    json: [OnceLock<Result<Vec<Cell>, String>>; 2],
    fuel: AtomicI64,
}

impl VariableResolver for Slots<'_> {
    fn resolve<'b>(&'b self, name: &str) -> Option<CowVal<'b, 'b>> {
        let number: usize = name.strip_prefix('@')?.parse().ok()?;
        let (_, slot) = self.program.slots.get(number)?;
        self.fill(slot).ok()
    }
}

impl<'a> Slots<'a> {
    fn fill<'b>(&'b self, slot: &'b Slot) -> Result<CowVal<'b, 'b>, String> {
        let record = self.record;
        self.burn(1)?;
        Ok(match slot {
            Slot::Topic => CowVal::owned(CelString::from(record.topic)),
            Slot::Partition => CowVal::owned(CelInt::from(i64::from(record.partition))),
            Slot::Offset => CowVal::owned(CelInt::from(record.offset)),
            Slot::Timestamp => {
                let time = chrono::DateTime::from_timestamp_millis(record.timestamp_ms).ok_or("the time is out of range")?;
                CowVal::owned(CelTimestamp::from(time.fixed_offset()))
            }
            Slot::Status => {
                let status = self.reply.map_or(0, |reply| reply.status);
                CowVal::owned(CelInt::from(i64::from(status)))
            }
            Slot::Key => match record.key {
                Some(key) => self.text_or_bytes(key)?,
                None => CowVal::owned(CelNull),
            },
            Slot::Text(side) => match self.body(*side) {
                None => CowVal::owned(CelNull),
                Some(bytes) => {
                    self.burn(text_size(bytes.len()))?;
                    let text = std::str::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned())?;
                    CowVal::owned(CelString::from(text))
                }
            },
            Slot::Size(side) => {
                let size = self.body(*side).map_or(0, <[u8]>::len);
                CowVal::owned(CelInt::from(i64::try_from(size).unwrap_or(i64::MAX)))
            }
            Slot::Headers(side) => self.headers(*side)?,
            Slot::Header(side, name) => match self.header_source(*side).and_then(|h| h.get(name)) {
                Some(value) => self.text_or_bytes(value)?,
                None => return Err("there is no such header".into()),
            },
            Slot::HasHeader(side, name) => truth(self.header_source(*side).and_then(|h| h.get(name)).is_some()),
            Slot::HasKey => truth(record.key.is_some()),
            Slot::HasValue(side) => truth(self.body(*side).is_some()),
            Slot::HasJson(side, cell) => truth(!matches!(self.cell(*side, *cell)?, Cell::Absent)),
            Slot::Json(side, cell) => match self.cell(*side, *cell)? {
                Cell::Value(value, size) => {
                    self.burn(*size)?;
                    CowVal::Borrowed(&**value)
                }
                _ => return Err("there is no such field".into()),
            },
            Slot::Regex(regex) => CowVal::owned(Pattern(Arc::clone(regex))),
        })
    }

    fn burn(&self, units: i64) -> Result<(), String> {
        if self.fuel.fetch_sub(units, Ordering::Relaxed) < units {
            return Err("the evaluation takes too long on this record".into());
        }
        Ok(())
    }

    fn body(&self, side: Side) -> Option<&'a [u8]> {
        match side {
            Side::Record => self.record.value,
            Side::Reply => self.reply.and_then(|reply| reply.body),
        }
    }

    fn header_source(&self, side: Side) -> Option<&'a dyn HeaderSource> {
        match side {
            Side::Record => Some(self.record.headers),
            Side::Reply => self.reply.map(|reply| reply.headers),
        }
    }

    fn headers(&self, side: Side) -> Result<CowVal<'_, '_>, String> {
        let mut map: HashMap<CelMapKey<'static>, Box<dyn Val>> = HashMap::new();
        let mut size = 0;
        if let Some(source) = self.header_source(side) {
            source.for_each(&mut |name, value| {
                size += 1 + text_size(name.len() + value.len());
                let value: Box<dyn Val> = match std::str::from_utf8(value) {
                    Ok(text) => Box::new(CelString::from(text.to_owned())),
                    Err(_) => Box::new(CelBytes::from(value.to_vec())),
                };
                map.insert(CelMapKey::from(name.to_owned()), value);
            });
        }
        self.burn(size)?;
        Ok(CowVal::owned(CelMap::from(map)))
    }

    fn text_or_bytes<'b>(&self, bytes: &'b [u8]) -> Result<CowVal<'b, 'b>, String> {
        self.burn(text_size(bytes.len()))?;
        Ok(match std::str::from_utf8(bytes) {
            Ok(text) => CowVal::owned(CelString::from(text)),
            Err(_) => CowVal::owned(CelBytes::from(bytes.to_vec())),
        })
    }

    fn cell(&self, side: Side, cell: usize) -> Result<&Cell, String> {
        let cells = self.json[side as usize].get_or_init(|| {
            let (paths, count) = &self.program.json[side as usize];
            let bytes = self.body(side).unwrap_or_default();
            if bytes.is_empty() {
                return Err("it is empty, so it is not JSON".into());
            }
            scan(bytes, paths, *count).map_err(|error| format!("it is not JSON: {error}"))
        });
        match cells {
            Ok(cells) => Ok(&cells[cell]),
            Err(message) => Err(message.clone()),
        }
    }

    /// What an error means, in words of the expression.
    fn explain(&self, error: &ExecutionError) -> String {
        if let ExecutionError::UndeclaredReference(name) = error
            && let Some(number) = name.strip_prefix('@')
            && let Ok(number) = number.parse::<usize>()
            && let Some((text, slot)) = self.program.slots.get(number)
            && let Err(message) = self.fill(slot)
        {
            return format!("{text}: {message}");
        }
        let mut text = error.to_string();
        if text.len() > 200 {
            let end = (0..=200).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
            text.truncate(end);
            text.push('…');
        }
        text
    }
}

fn truth<'b>(value: bool) -> CowVal<'b, 'b> {
    CowVal::owned(CelBool::from(value))
}
