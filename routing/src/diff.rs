//! What differs between two tables, by topic, route and field.
//!
//! Invariant: equal tables have no difference, and every difference names one field.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::node::join;
use crate::table::{RouteSpec, Table};

/// What happened to a part of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It has another value.
    Changed,
}

/// One difference between two tables.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// What happened.
    pub kind: ChangeKind,
    /// What it happened to: `mesh`, `topics.orders`, `defaults.timeout`, `routes.price.to`;
    /// routes by name, and `routes` itself when only their order changed.
    pub path: String,
    /// The value before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old: Option<Value>,
    /// The value after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new: Option<Value>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: &Option<Value>| value.as_ref().map_or_else(String::new, Value::to_string);
        let (path, old, new) = (&self.path, show(&self.old), show(&self.new));
        match self.kind {
            ChangeKind::Added => write!(f, "+ {path}: {new}"),
            ChangeKind::Removed => write!(f, "- {path}: {old}"),
            ChangeKind::Changed => write!(f, "~ {path}: {old} → {new}"),
        }
    }
}

/// What differs from `old` to `new`: the mesh, topics, defaults, then routes. A whole topic or
/// route that is new or gone is one change; within others each field is one.
pub fn diff(old: &Table, new: &Table) -> Vec<Change> {
    let mut out = Vec::new();
    let mesh = |table: &Table| Some(Value::from(table.mesh.as_str()));
    compare("mesh", mesh(old), mesh(new), &mut out);
    let topics = |table: &Table| table.topics.iter().map(|(name, t)| (name.clone(), json(t))).collect();
    parts("topics", topics(old), topics(new), &mut out);
    fields("defaults", &json(&old.defaults), &json(&new.defaults), &mut out);
    // Of a large table mostly little differs: what is equal is not looked at field by field.
    let routes = |table: &Table, other: &Table| {
        let other: HashMap<&str, &RouteSpec> = other.routes.iter().map(|route| (&*route.name, route)).collect();
        let differs = |route: &&RouteSpec| other.get(&*route.name).is_none_or(|same| same != route);
        table.routes.iter().filter(differs).map(|route| (route.name.clone(), json(route))).collect()
    };
    parts("routes", routes(old, new), routes(new, old), &mut out);
    let order = |table: &Table| -> Vec<String> { table.routes.iter().map(|r| r.name.clone()).collect() };
    if out.is_empty() && order(old) != order(new) {
        compare("routes", Some(order(old).into()), Some(order(new).into()), &mut out);
    }
    out
}

/// How many routes differ between two tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteCounts {
    /// Routes that are new.
    pub added: u64,
    /// Routes that do something else than before, be it by a default.
    pub changed: u64,
    /// Routes that are gone.
    pub removed: u64,
}

/// Counts the routes that differ from `old` to `new`, by name and by what they do with the defaults folded in.
pub fn count_routes(old: &Table, new: &Table) -> RouteCounts {
    let same_defaults = old.defaults == new.defaults;
    let mut before: HashMap<&str, &RouteSpec> = old.routes.iter().map(|route| (&*route.name, route)).collect();
    let mut counts = RouteCounts::default();
    for route in &new.routes {
        match before.remove(&*route.name) {
            None => counts.added += 1,
            Some(same) if same_defaults && same == route => {}
            Some(other) if old.resolved(other) != new.resolved(route) => counts.changed += 1,
            Some(_) => {}
        }
    }
    counts.removed = before.len() as u64;
    counts
}

fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

/// Compares maps of named parts.
fn parts(base: &str, mut old: BTreeMap<String, Value>, new: BTreeMap<String, Value>, out: &mut Vec<Change>) {
    let mut changes: BTreeMap<String, Vec<Change>> = BTreeMap::new();
    for (name, new) in new {
        let path = join(base, &name);
        let list = changes.entry(name.clone()).or_default();
        match old.remove(&name) {
            Some(old) => fields(&path, &old, &new, list),
            None => compare(&path, None, Some(new), list),
        }
    }
    for (name, old) in old {
        let path = join(base, &name);
        compare(&path, Some(old), None, changes.entry(name).or_default());
    }
    out.extend(changes.into_values().flatten());
}

/// Compares the fields of two maps.
fn fields(base: &str, old: &Value, new: &Value, out: &mut Vec<Change>) {
    let (Value::Object(old), Value::Object(new)) = (old, new) else {
        return;
    };
    let mut names: Vec<&String> = old.keys().chain(new.keys()).collect();
    names.sort();
    names.dedup();
    for name in names {
        let (old, new) = (old.get(name).cloned(), new.get(name).cloned());
        compare(&join(base, name), old, new, out);
    }
}

fn compare(path: &str, old: Option<Value>, new: Option<Value>, out: &mut Vec<Change>) {
    let kind = match (&old, &new) {
        (None, None) => return,
        (Some(old), Some(new)) if old == new => return,
        (None, Some(_)) => ChangeKind::Added,
        (Some(_), None) => ChangeKind::Removed,
        (Some(_), Some(_)) => ChangeKind::Changed,
    };
    out.push(Change { kind, path: path.to_owned(), old, new });
}
