//! Text to a tree of located nodes. JSON and YAML have positions both; plain JSON, as tables travel, takes a short way (`json`).
//!
//! Invariant: the tree is bounded (bytes, nodes, depth) whatever the text, and nothing is expanded:
//! anchors, aliases, tags and further documents are refused.

mod json;

use std::borrow::Cow;
use std::collections::HashSet;

use granit_parser::{Event, Marker, Parser, ScalarStyle, Span};

use crate::fault::{Fault, code};

/// The longest text of a table, in bytes.
pub(crate) const MAX_BYTES: usize = 8 << 20;
const MAX_NODES: usize = 1_000_000;
/// A JSON Schema within a table is nested; nothing else comes near.
const MAX_DEPTH: usize = 64;
/// Up to so many keys of a map are compared one by one.
const FEW: usize = 24;

/// A value with its place.
#[derive(Debug, PartialEq)]
pub(crate) struct Node<'t> {
    pub(crate) at: Place,
    pub(crate) value: Value<'t>,
}

/// Line and column, both counted from 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Place {
    pub(crate) line: u32,
    pub(crate) column: u32,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Value<'t> {
    /// A scalar; `plain` when it was written without quotes, so that it may be a number, a truth
    /// value or null.
    Scalar {
        text: Cow<'t, str>,
        plain: bool,
    },
    List(Vec<Node<'t>>),
    /// The entries in their order; no key occurs twice.
    Map(Vec<Entry<'t>>),
}

#[derive(Debug, PartialEq)]
pub(crate) struct Entry<'t> {
    pub(crate) key: Cow<'t, str>,
    pub(crate) at: Place,
    pub(crate) node: Node<'t>,
}

impl<'t> Node<'t> {
    /// The entry of a map.
    pub(crate) fn entry(&self, key: &str) -> Option<&Entry<'t>> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }

    /// The place of the field at `path` (as in [`Fault::field`]), or of its nearest parent.
    pub(crate) fn locate(&self, path: &str) -> Place {
        let mut node = self;
        let mut at = self.at;
        for step in steps(path) {
            match step {
                Step::Key(key) => match node.entry(&key) {
                    Some(entry) => (node, at) = (&entry.node, entry.at),
                    None => break,
                },
                Step::Index(index) => match &node.value {
                    Value::List(items) if index < items.len() => {
                        node = &items[index];
                        at = node.at;
                    }
                    _ => break,
                },
            }
        }
        at
    }
}

/// A step of a field's path.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

/// `base.key`, with the key quoted when it is no plain word.
pub(crate) fn join(base: &str, key: &str) -> String {
    let word = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    match (word, base.is_empty()) {
        (true, true) => key.to_owned(),
        (true, false) => format!("{base}.{key}"),
        (false, _) => format!("{base}[{key:?}]"),
    }
}

/// Where a node is, from the root: put into words only when there is something to say of it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Path<'p> {
    Root,
    Key(&'p Path<'p>, &'p str),
    Item(&'p Path<'p>, usize),
}

impl Path<'_> {
    pub(crate) fn key<'p>(&'p self, key: &'p str) -> Path<'p> {
        Path::Key(self, key)
    }

    pub(crate) fn item(&self, index: usize) -> Path<'_> {
        Path::Item(self, index)
    }

    /// As in [`Fault::field`].
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Root => String::new(),
            Self::Key(base, key) => join(&base.text(), key),
            Self::Item(base, index) => format!("{}[{index}]", base.text()),
        }
    }
}

/// The steps of a path that [`join`] made.
fn steps(path: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(tail) = rest.strip_prefix("[\"") {
            let Some(end) = tail.find("\"]") else { break };
            steps.push(Step::Key(tail[..end].to_owned()));
            rest = &tail[end + 2..];
        } else if let Some(tail) = rest.strip_prefix('[') {
            let Some(end) = tail.find(']') else { break };
            let Ok(index) = tail[..end].parse() else {
                break;
            };
            steps.push(Step::Index(index));
            rest = &tail[end + 1..];
        } else {
            let tail = rest.strip_prefix('.').unwrap_or(rest);
            let end = tail.find(['.', '[']).unwrap_or(tail.len());
            steps.push(Step::Key(tail[..end].to_owned()));
            rest = &tail[end..];
            if end == 0 {
                break;
            }
        }
    }
    steps
}

/// A list or map that is still open.
enum Open<'t> {
    List(Place, Vec<Node<'t>>),
    /// `seen` has all keys once there are more than a [`FEW`].
    Map {
        at: Place,
        entries: Vec<Entry<'t>>,
        seen: HashSet<Cow<'t, str>>,
        key: Option<(Cow<'t, str>, Place)>,
    },
}

impl Open<'_> {
    fn map(at: Place) -> Self {
        Self::Map { at, entries: Vec::new(), seen: HashSet::new(), key: None }
    }
}

/// Reads the one document of a text. Duplicate keys are reported and the first is kept, so that
/// reading goes on; `None` when there is no tree.
pub(crate) fn load<'t>(text: &'t str, faults: &mut Vec<Fault>) -> Option<Node<'t>> {
    if text.len() > MAX_BYTES {
        faults.push(Fault::new(
            code::LIMIT,
            "",
            format!("the table has {} bytes, more than {MAX_BYTES}", text.len()),
            "split the mesh, or use spec.defaults for what is common",
        ));
        return None;
    }
    let before = faults.len();
    let mut loader = Loader::new(faults);
    match json::read(text, &mut loader) {
        json::Read::Whole => return loader.root,
        json::Read::Stopped => return None,
        json::Read::NotJson => faults.truncate(before),
    }
    read_yaml(text, faults)
}

fn read_yaml<'t>(text: &'t str, faults: &mut Vec<Fault>) -> Option<Node<'t>> {
    let options = granit_parser::options! {
        emit_comments: false,
        flow_nesting_limit: 2 * MAX_DEPTH,
        block_nesting_limit: 2 * MAX_DEPTH,
    };
    let mut loader = Loader::new(faults);
    for next in Parser::new_from_str_with_options(text, options) {
        let stop = match next {
            Ok((event, span)) => loader.event(event, &span),
            Err(error) => {
                let hint = if text.contains('\t') { "YAML is indented with spaces, not with tabs" } else { "" };
                let place = place(*error.marker());
                loader.fault(code::SYNTAX, place, error.info(), hint);
                false
            }
        };
        if !stop {
            return None;
        }
    }
    if loader.root.is_none() && loader.faults.is_empty() {
        let start = Place { line: 1, column: 1 };
        let hint = "a table begins with `apiVersion: mesh/v1`";
        loader.fault(code::SYNTAX, start, "the table is empty", hint);
    }
    loader.root
}

fn place(marker: Marker) -> Place {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Place { line: number(marker.line()), column: number(marker.col()).saturating_add(1) }
}

struct Loader<'f, 't> {
    faults: &'f mut Vec<Fault>,
    open: Vec<Open<'t>>,
    root: Option<Node<'t>>,
    nodes: usize,
    documents: usize,
}

impl<'f, 't> Loader<'f, 't> {
    fn new(faults: &'f mut Vec<Fault>) -> Self {
        Self { faults, open: Vec::new(), root: None, nodes: 0, documents: 0 }
    }

    fn fault(&mut self, code: &'static str, at: Place, message: impl Into<String>, hint: &str) {
        let mut fault = Fault::new(code, self.path(), message, hint);
        (fault.line, fault.column) = (at.line, at.column);
        self.faults.push(fault);
    }

    /// The path of the node that is being read.
    fn path(&self) -> String {
        let step = |path: String, open: &Open<'_>| match open {
            Open::List(_, items) => format!("{path}[{}]", items.len()),
            Open::Map { key: None, .. } => path,
            Open::Map { key: Some((key, _)), .. } => join(&path, key),
        };
        self.open.iter().fold(String::new(), step)
    }

    /// Takes one event; false when reading cannot go on.
    fn event(&mut self, event: Event<'t>, span: &Span) -> bool {
        let at = place(span.start);
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    let hint = "a table is one document; remove the second `---`";
                    self.fault(code::UNSUPPORTED, at, "there is a second document", hint);
                    return false;
                }
                true
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) | Event::Anchor(..) => self.no_anchors(at),
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain;
                self.plainly(at, anchor, tag.is_some()) && self.scalar(at, text, plain)
            }
            Event::SequenceStart(_, anchor, tag) => self.plainly(at, anchor, tag.is_some()) && self.push(at, Open::List(at, Vec::new())),
            Event::MappingStart(_, anchor, tag) => self.plainly(at, anchor, tag.is_some()) && self.push(at, Open::map(at)),
            Event::SequenceEnd | Event::MappingEnd => self.pop(),
            _ => true,
        }
    }

    /// Ends the list or map that was opened last.
    fn pop(&mut self) -> bool {
        match self.open.pop() {
            Some(Open::List(at, items)) => self.add(Node { at, value: Value::List(items) }),
            Some(Open::Map { at, entries, .. }) => self.add(Node { at, value: Value::Map(entries) }),
            None => true,
        }
    }

    fn no_anchors(&mut self, at: Place) -> bool {
        let hint = "write the value out, or put what is common into spec.defaults";
        let message = "a table uses no anchors and aliases";
        self.fault(code::UNSUPPORTED, at, message, hint);
        false
    }

    fn plainly(&mut self, at: Place, anchor: usize, tagged: bool) -> bool {
        if anchor != 0 {
            return self.no_anchors(at);
        }
        if tagged {
            let hint = "remove the `!…` before the value";
            self.fault(code::UNSUPPORTED, at, "a table uses no tags", hint);
        }
        !tagged
    }

    fn push(&mut self, at: Place, open: Open<'t>) -> bool {
        if let Some(Open::Map { key: None, .. }) = self.open.last() {
            self.fault(code::SYNTAX, at, "a key must be a word", "write `key: value`");
            return false;
        }
        if self.open.len() >= MAX_DEPTH {
            let message = format!("nested more than {MAX_DEPTH} deep");
            self.fault(code::LIMIT, at, message, "a table is never that deep");
            return false;
        }
        self.open.push(open);
        true
    }

    fn scalar(&mut self, at: Place, text: Cow<'t, str>, plain: bool) -> bool {
        if let Some(Open::Map { key, .. }) = self.open.last_mut()
            && key.is_none()
        {
            *key = Some((text, at));
            return true;
        }
        let value = Value::Scalar { text, plain };
        self.add(Node { at, value })
    }

    fn add(&mut self, node: Node<'t>) -> bool {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            let message = format!("the table has more than {MAX_NODES} values");
            self.fault(code::LIMIT, node.at, message, "split the mesh");
            return false;
        }
        let mut twice = None;
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map { entries, seen, key, .. }) => {
                if let Some((key, at)) = key.take() {
                    if entries.len() == FEW {
                        seen.extend(entries.iter().map(|entry| entry.key.clone()));
                    }
                    let new = match entries.len() < FEW {
                        true => entries.iter().all(|entry| entry.key != key),
                        false => seen.insert(key.clone()),
                    };
                    if new {
                        entries.push(Entry { key, at, node });
                    } else {
                        twice = Some((key, at));
                    }
                }
            }
        }
        if let Some((key, at)) = twice {
            let path = join(&self.path(), &key);
            let message = format!("the key `{key}` occurs twice");
            self.fault(code::DUPLICATE, at, message, "remove one of the two");
            if let Some(fault) = self.faults.last_mut() {
                fault.field = path;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(text: &str) -> Vec<&'static str> {
        let mut faults = Vec::new();
        load(text, &mut faults);
        faults.iter().map(|fault| fault.code).collect()
    }

    #[test]
    fn paths_are_taken_apart() {
        let path = join("spec.topics", "a.b") + ".x[3]";
        assert_eq!(path, "spec.topics[\"a.b\"].x[3]");
        let keys = |words: &[&str]| words.iter().map(|w| Step::Key((*w).into())).collect::<Vec<_>>();
        let mut expected = keys(&["spec", "topics", "a.b", "x"]);
        expected.push(Step::Index(3));
        assert_eq!(steps(&path), expected);
        for odd in ["[", "[\"", "..", "a..b", "[x]", "]"] {
            let _ = steps(odd);
        }
    }

    #[test]
    fn hostile_documents_are_refused() {
        assert_eq!(codes(""), ["syntax"]);
        assert_eq!(codes("# nothing\n"), ["syntax"]);
        assert_eq!(codes("a: 1\n---\nb: 2\n"), ["unsupported"]);
        assert_eq!(codes("a: &x [1]\nb: *x\n"), ["unsupported"]);
        assert_eq!(codes("a: !!str 1\n"), ["unsupported"]);
        assert_eq!(codes("[a]: 1\n"), ["syntax"]);
        assert_eq!(codes("{a: 1, a: 2, b: 3, b: 4}"), ["duplicate", "duplicate"]);
        assert_eq!(codes(&"[".repeat(17)).len(), 1);
        assert_eq!(codes(&"[".repeat(100_000)).len(), 1);
        assert_eq!(codes(&"- ".repeat(100_000)).len(), 1);
        assert_eq!(codes(&" ".repeat(MAX_BYTES + 1)), ["limit"]);
        let many = |keys: usize, more: &str| {
            let keys: Vec<String> = (0..keys).map(|key| format!("\"{key}\":1")).collect();
            codes(&format!("{{{}{more}}}", keys.join(",")))
        };
        for keys in [FEW - 1, FEW, FEW + 1, 3 * FEW] {
            assert!(many(keys, "").is_empty(), "{keys}");
            for more in [",\"0\":2", ",\"1\":2", ",\"7\":2"] {
                assert_eq!(many(keys, more), ["duplicate"], "{keys} {more}");
            }
        }
    }

    #[test]
    fn json_has_places_too() {
        let mut faults = Vec::new();
        let node = load("{\"spec\":\n {\"routes\": [1,\n  {\"x\": 2}]}}", &mut faults).unwrap();
        assert!(faults.is_empty());
        let at = node.locate("spec.routes[1].x");
        assert_eq!((at.line, at.column), (3, 4));
        let at = node.locate("spec.routes[1].missing.deeper");
        assert_eq!((at.line, at.column), (3, 3));
    }
}
