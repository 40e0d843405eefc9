//! Reads out of a JSON text only what an expression refers to, in one pass.
//!
//! Invariant: members that nobody refers to are skipped, not built.

use std::collections::HashMap;
use std::fmt;

use cel::common::types::{CelBool, CelDouble, CelInt, CelList, CelMap, CelMapKey, CelNull, CelString, CelUInt};
use cel::common::value::Val;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

/// The paths that an expression refers to, as a tree.
#[derive(Debug, Default)]
pub(super) struct Paths {
    members: HashMap<String, Paths>,
    /// The cell that gets the whole value here.
    value: Option<usize>,
    /// The cell that only learns that there is a value.
    presence: Option<usize>,
}

/// What was found at a path.
#[derive(Debug, Clone)]
pub(super) enum Cell {
    /// Nothing.
    Absent,
    /// Something; its value was not asked for.
    Present,
    /// A value, and its size in units of work.
    Value(Box<dyn Val>, i64),
}

impl Paths {
    /// Adds a path; `cell` is its number.
    pub(super) fn add(&mut self, path: &[String], cell: usize, presence: bool) {
        match path.split_first() {
            Some((first, rest)) => {
                let member = self.members.entry(first.clone()).or_default();
                member.add(rest, cell, presence);
            }
            None if presence => self.presence = Some(cell),
            None => self.value = Some(cell),
        }
    }

    fn clear(&self, cells: &mut [Cell]) {
        for cell in [self.value, self.presence].into_iter().flatten() {
            cells[cell] = Cell::Absent;
        }
        for member in self.members.values() {
            member.clear(cells);
        }
    }

    fn fill(&self, value: &Value, cells: &mut [Cell]) {
        if let Some(cell) = self.presence {
            cells[cell] = Cell::Present;
        }
        if let Some(cell) = self.value {
            let mut size = 0;
            let built = build(value, &mut size);
            cells[cell] = Cell::Value(built, size);
        }
        for (name, member) in &self.members {
            if let Some(value) = value.get(name) {
                member.fill(value, cells);
            }
        }
    }
}

/// Reads the cells of all paths.
pub(super) fn scan(bytes: &[u8], paths: &Paths, count: usize) -> Result<Vec<Cell>, serde_json::Error> {
    let mut cells = vec![Cell::Absent; count];
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let seed = Seed { paths, cells: &mut cells };
    seed.deserialize(&mut json)?;
    json.end()?;
    Ok(cells)
}

struct Seed<'a> {
    paths: &'a Paths,
    cells: &'a mut [Cell],
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        if self.paths.value.is_some() {
            let value = <Value as serde::Deserialize>::deserialize(json)?;
            self.paths.fill(&value, self.cells);
            return Ok(());
        }
        if let Some(cell) = self.paths.presence {
            self.cells[cell] = Cell::Present;
        }
        if self.paths.members.is_empty() { json.deserialize_ignored_any(IgnoredAny).map(|_| ()) } else { json.deserialize_any(self) }
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            match self.paths.members.get(key.as_ref()) {
                Some(paths) => {
                    // A key that occurs twice: the last one counts.
                    paths.clear(self.cells);
                    map.next_value_seed(Seed { paths, cells: &mut *self.cells })?;
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}

/// A CEL value of a JSON value; whole numbers become `int` (or `uint` when too large), others
/// `double`. Adds the size in units of work.
fn build(value: &Value, size: &mut i64) -> Box<dyn Val> {
    *size += 1;
    match value {
        Value::Null => Box::new(CelNull),
        Value::Bool(value) => Box::new(CelBool::from(*value)),
        Value::Number(number) => {
            if let Some(value) = number.as_i64() {
                Box::new(CelInt::from(value))
            } else if let Some(value) = number.as_u64() {
                Box::new(CelUInt::from(value))
            } else {
                Box::new(CelDouble::from(number.as_f64().unwrap_or(f64::NAN)))
            }
        }
        Value::String(text) => {
            *size += text_size(text.len());
            Box::new(CelString::from(text.clone()))
        }
        Value::Array(items) => {
            let items: Vec<Box<dyn Val>> = items.iter().map(|item| build(item, size)).collect();
            Box::new(CelList::from(items))
        }
        Value::Object(members) => {
            let members: HashMap<CelMapKey<'static>, Box<dyn Val>> =
                members.iter().map(|(key, value)| (CelMapKey::from(key.clone()), build(value, size))).collect();
            Box::new(CelMap::from(members))
        }
    }
}

/// The size of a text in units of work.
pub(super) fn text_size(bytes: usize) -> i64 {
    i64::try_from(bytes / 16).unwrap_or(i64::MAX)
}
