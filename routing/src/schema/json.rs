//! A JSON Schema, compiled: a flat list of nodes that name each other by number, so that a recursive schema is no recursive structure.
//!
//! Drafts 4 to 2020-12 as far as they agree, which is nearly all of them. What is not supported is refused, not ignored: references to other
//! documents, `$dynamicRef`, `unevaluated…`. `format` and the `content…` keywords are annotations, as in 2020-12.
//!
//! Invariant: no node leads back to itself without going into the value.

use std::collections::HashMap;

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Number, Value};

use super::clip;
use crate::expression::Refusal;

/// The most nodes of a schema.
const MAX_NODES: usize = 5_000;
/// The most patterns of a schema.
const MAX_PATTERNS: usize = 200;
/// The most bytes of a compiled pattern, and of what it remembers while it runs.
const PATTERN_BYTES: usize = 256 << 10;

/// A compiled schema; node 0 is its root.
pub(super) struct Schema {
    pub(super) nodes: Vec<Node>,
}

pub(super) enum Node {
    /// `true` or `false`.
    Always(bool),
    Keywords(Box<Keywords>),
}

/// The types of JSON, as bits.
pub(super) mod types {
    pub(crate) const NAMES: [(&str, u8); 7] =
        [("null", 1), ("boolean", 2), ("object", 4), ("array", 8), ("string", 16), ("number", 32), ("integer", 64)];
}

/// What a node asks for, besides what its numbers of further nodes ask for. Absent keywords ask for nothing.
#[derive(Default)]
pub(super) struct Keywords {
    pub(super) types: Option<u8>,
    pub(super) enumeration: Option<Vec<Value>>,
    pub(super) constant: Option<Value>,

    pub(super) multiple_of: Option<Number>,
    pub(super) maximum: Option<Number>,
    pub(super) exclusive_maximum: Option<Number>,
    pub(super) minimum: Option<Number>,
    pub(super) exclusive_minimum: Option<Number>,

    pub(super) max_length: Option<u64>,
    pub(super) min_length: Option<u64>,
    pub(super) pattern: Option<Regex>,

    pub(super) prefix: Vec<usize>,
    pub(super) items: Option<usize>,
    pub(super) contains: Option<usize>,
    pub(super) max_contains: Option<u64>,
    pub(super) min_contains: Option<u64>,
    pub(super) max_items: Option<u64>,
    pub(super) min_items: Option<u64>,
    pub(super) unique: bool,

    pub(super) properties: HashMap<String, usize>,
    pub(super) patterns: Vec<(Regex, usize)>,
    pub(super) additional: Option<usize>,
    pub(super) names: Option<usize>,
    pub(super) required: Vec<String>,
    pub(super) max_properties: Option<u64>,
    pub(super) min_properties: Option<u64>,
    pub(super) dependent_required: Vec<(String, Vec<String>)>,
    pub(super) dependent_schemas: Vec<(String, usize)>,

    pub(super) all_of: Vec<usize>,
    pub(super) any_of: Vec<usize>,
    pub(super) one_of: Vec<usize>,
    pub(super) not: Option<usize>,
    pub(super) condition: Option<(usize, Option<usize>, Option<usize>)>,
    pub(super) reference: Option<usize>,
}

impl Keywords {
    /// The nodes that look at the same place of the value.
    fn in_place(&self) -> impl Iterator<Item = usize> {
        let lists = self.all_of.iter().chain(&self.any_of).chain(&self.one_of).copied();
        let condition = self.condition.into_iter().flat_map(|(if_, then, else_)| [Some(if_), then, else_]).flatten();
        lists.chain(self.not).chain(condition).chain(self.reference).chain(self.dependent_schemas.iter().map(|(_, node)| *node))
    }
}

type Result<T> = std::result::Result<T, Refusal>;

fn refuse<T>(place: &str, message: impl std::fmt::Display, hint: &str) -> Result<T> {
    let place = if place.is_empty() { String::new() } else { format!(" at {place}") };
    Err(Refusal { message: format!("the schema{place}: {message}"), hint: hint.to_owned() })
}

/// Compiles a schema.
pub(super) fn compile(root: &Value) -> Result<Schema> {
    let mut compiler =
        Compiler { root, base: "", old: false, places: HashMap::new(), queue: Vec::new(), patterns: 0, anchors: HashMap::new() };
    compiler.head()?;
    compiler.node("")?;
    let mut nodes: Vec<Option<Node>> = Vec::new();
    while let Some((number, place)) = compiler.queue.pop() {
        let value = root.pointer(&place);
        let Some(value) = value else { return refuse(&place, "there is nothing", "") };
        let node = compiler.compile(value, &place)?;
        if nodes.len() <= number {
            nodes.resize_with(number + 1, || None);
        }
        nodes[number] = Some(node);
    }
    let nodes: Vec<Node> = nodes.into_iter().map(|node| node.unwrap_or(Node::Always(true))).collect();
    let schema = Schema { nodes };
    if let Some(number) = schema.endless() {
        let place = compiler.places.iter().find(|(_, other)| **other == number).map_or("", |(place, _)| place);
        return refuse(place, "it refers to itself without going into the value, so no check would end", "break the loop of `$ref`s");
    }
    Ok(schema)
}

impl Schema {
    /// A node that leads back to itself at the same place of the value.
    fn endless(&self) -> Option<usize> {
        #[derive(Clone, Copy, PartialEq)]
        enum Color {
            White,
            Grey,
            Black,
        }
        let mut colors = vec![Color::White; self.nodes.len()];
        for start in 0..self.nodes.len() {
            // What is still to be entered (`false`) and to be left (`true`).
            let mut stack = vec![(start, false)];
            while let Some((number, leave)) = stack.pop() {
                if leave {
                    colors[number] = Color::Black;
                    continue;
                }
                match colors[number] {
                    Color::Black => continue,
                    Color::Grey => return Some(number),
                    Color::White => {}
                }
                colors[number] = Color::Grey;
                stack.push((number, true));
                if let Node::Keywords(keywords) = &self.nodes[number] {
                    for next in keywords.in_place() {
                        match colors[next] {
                            Color::Grey => return Some(next),
                            Color::White => stack.push((next, false)),
                            Color::Black => {}
                        }
                    }
                }
            }
        }
        None
    }
}

struct Compiler<'v> {
    root: &'v Value,
    /// The root's `$id`.
    base: &'v str,
    /// Before 2019-09 a `$ref` stands alone.
    old: bool,
    /// Numbers of nodes by their JSON pointers.
    places: HashMap<String, usize>,
    /// Nodes to be compiled.
    queue: Vec<(usize, String)>,
    patterns: usize,
    anchors: HashMap<String, String>,
}

impl<'v> Compiler<'v> {
    /// What the root says of the schema as a whole.
    fn head(&mut self) -> Result<()> {
        let Value::Object(root) = self.root else { return Ok(()) };
        if let Some(dialect) = root.get("$schema") {
            let text = dialect.as_str().unwrap_or_default().trim_end_matches('#');
            let known = |name: &str| {
                text.strip_suffix(name).is_some_and(|host| matches!(host, "http://json-schema.org/" | "https://json-schema.org/"))
            };
            self.old = ["draft-04/schema", "draft-06/schema", "draft-07/schema", "schema"].into_iter().any(known);
            if !self.old && !["draft/2019-09/schema", "draft/2020-12/schema"].into_iter().any(known) {
                let message = format!("`$schema` is `{}`, which is not known here", clip(text));
                return refuse("", message, "use https://json-schema.org/draft/2020-12/schema, or leave it out");
            }
        }
        self.base = root.get("$id").or_else(|| root.get("id")).and_then(Value::as_str).unwrap_or_default().trim_end_matches('#');
        Ok(())
    }

    /// The number of the node at this place.
    fn node(&mut self, place: &str) -> Result<usize> {
        if let Some(number) = self.places.get(place) {
            return Ok(*number);
        }
        let number = self.places.len();
        if number >= MAX_NODES {
            return refuse(place, format!("it has more than {MAX_NODES} parts"), "describe less, or in parts that are used several times");
        }
        self.places.insert(place.to_owned(), number);
        self.queue.push((number, place.to_owned()));
        Ok(number)
    }

    fn child(&mut self, place: &str, keys: &[&str]) -> Result<usize> {
        let mut place = place.to_owned();
        for key in keys {
            super::push(&mut place, key);
        }
        self.node(&place)
    }

    fn pattern(&mut self, text: &str, place: &str) -> Result<Regex> {
        self.patterns += 1;
        if self.patterns > MAX_PATTERNS {
            return refuse(place, format!("there are more than {MAX_PATTERNS} patterns"), "");
        }
        let built = RegexBuilder::new(text).size_limit(PATTERN_BYTES).dfa_size_limit(PATTERN_BYTES).build();
        built.or_else(|error| {
            let why = error.to_string();
            let why = why.lines().last().unwrap_or_default().trim_start_matches("error: ");
            let hint = "patterns run in linear time here: no look-around, no back references, no huge repetitions";
            refuse(place, format!("the pattern `{}` is refused: {why}", clip(text)), hint)
        })
    }

    /// The place that a `$ref` names.
    fn target(&mut self, reference: &str, place: &str) -> Result<String> {
        let fragment = match reference.split_once('#') {
            Some((document, fragment)) if document.is_empty() || document == self.base => fragment,
            None if !self.base.is_empty() && reference == self.base => "",
            _ => {
                let hint = "a table carries all of its schemas: put what is referred to under `$defs`, and refer to `#/$defs/…`";
                return refuse(place, format!("`$ref` is `{}`, another document", clip(reference)), hint);
            }
        };
        let decoded = percent_decode(fragment);
        if decoded.is_empty() {
            return Ok(String::new());
        }
        let found = if decoded.starts_with('/') {
            self.root.pointer(&decoded).is_some().then_some(decoded)
        } else {
            if self.anchors.is_empty() {
                anchors(self.root, &mut self.anchors);
            }
            self.anchors.get(&decoded).cloned()
        };
        found.map_or_else(|| refuse(place, format!("`$ref` is `{}`, which is not there", clip(reference)), "check the spelling"), Ok)
    }

    fn compile(&mut self, value: &'v Value, place: &str) -> Result<Node> {
        let object = match value {
            Value::Bool(always) => return Ok(Node::Always(*always)),
            Value::Object(object) => object,
            _ => return refuse(place, "expected an object, or `true` or `false`", "a schema is an object of keywords"),
        };
        if !place.is_empty() && object.get("$id").is_some_and(|id| id.as_str().is_some_and(|id| !id.starts_with('#'))) {
            return refuse(place, "an `$id` within a schema is not supported", "leave it out, and refer by `#/…`");
        }
        for keyword in ["$dynamicRef", "$recursiveRef", "unevaluatedProperties", "unevaluatedItems"] {
            if object.contains_key(keyword) {
                return refuse(place, format!("`{keyword}` is not supported"), "say it by `additionalProperties`, `items` or `$ref`");
            }
        }
        let mut out = Keywords::default();
        if let Some(reference) = object.get("$ref") {
            let Some(text) = reference.as_str() else { return refuse(place, "`$ref` must be a string", "") };
            let target = self.target(text, place)?;
            out.reference = Some(self.node(&target)?);
            if self.old {
                return Ok(Node::Keywords(Box::new(out)));
            }
        }
        for (keyword, value) in object {
            self.keyword(&mut out, object, keyword, value, place)?;
        }
        Ok(Node::Keywords(Box::new(out)))
    }

    fn keyword(&mut self, out: &mut Keywords, object: &Map<String, Value>, keyword: &str, value: &'v Value, place: &str) -> Result<()> {
        let wrong = |wanted: &str| refuse(place, format!("`{keyword}` must be {wanted}"), "");
        match keyword {
            "type" => out.types = Some(self.types(value, place)?),
            "enum" => match value {
                Value::Array(list) if !list.is_empty() => out.enumeration = Some(list.clone()),
                _ => return wrong("a list with at least one value"),
            },
            "const" => out.constant = Some(value.clone()),
            "multipleOf" => match value {
                Value::Number(number) if number.as_f64().is_some_and(|number| number > 0.0) => out.multiple_of = Some(number.clone()),
                _ => return wrong("a number above 0"),
            },
            "maximum" | "minimum" => {
                let Value::Number(number) = value else { return wrong("a number") };
                // Draft 4 says by a truth value beside it whether the bound itself is excluded.
                let (exclusive, inclusive, excluded) = match keyword {
                    "maximum" => ("exclusiveMaximum", &mut out.maximum, &mut out.exclusive_maximum),
                    _ => ("exclusiveMinimum", &mut out.minimum, &mut out.exclusive_minimum),
                };
                let place = if object.get(exclusive) == Some(&Value::Bool(true)) { excluded } else { inclusive };
                *place = Some(number.clone());
            }
            "exclusiveMaximum" | "exclusiveMinimum" => match value {
                Value::Number(number) if keyword == "exclusiveMaximum" => out.exclusive_maximum = Some(number.clone()),
                Value::Number(number) => out.exclusive_minimum = Some(number.clone()),
                Value::Bool(_) => {}
                _ => return wrong("a number"),
            },
            "maxLength" | "minLength" | "maxItems" | "minItems" | "maxContains" | "minContains" | "maxProperties" | "minProperties" => {
                let whole =
                    value.as_u64().or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && *n >= 0.0 && *n < 1e15).map(|n| n as u64));
                let Some(whole) = whole else { return wrong("a whole number, 0 or more") };
                *match keyword {
                    "maxLength" => &mut out.max_length,
                    "minLength" => &mut out.min_length,
                    "maxItems" => &mut out.max_items,
                    "minItems" => &mut out.min_items,
                    "maxContains" => &mut out.max_contains,
                    "minContains" => &mut out.min_contains,
                    "maxProperties" => &mut out.max_properties,
                    _ => &mut out.min_properties,
                } = Some(whole);
            }
            "pattern" => match value.as_str() {
                Some(text) => out.pattern = Some(self.pattern(text, place)?),
                None => return wrong("a string"),
            },
            "prefixItems" => out.prefix = self.list(value, place, keyword)?,
            "items" if value.is_array() => {
                out.prefix = self.list(value, place, keyword)?;
                if object.contains_key("additionalItems") {
                    out.items = Some(self.child(place, &["additionalItems"])?);
                }
            }
            "items" => out.items = Some(self.child(place, &[keyword])?),
            "contains" => out.contains = Some(self.child(place, &[keyword])?),
            "uniqueItems" => match value {
                Value::Bool(unique) => out.unique = *unique,
                _ => return wrong("`true` or `false`"),
            },
            "properties" => out.properties = self.map(value, place, keyword)?.into_iter().collect(),
            "patternProperties" => {
                for (pattern, node) in self.map(value, place, keyword)? {
                    out.patterns.push((self.pattern(&pattern, place)?, node));
                }
            }
            "additionalProperties" => out.additional = Some(self.child(place, &[keyword])?),
            "propertyNames" => out.names = Some(self.child(place, &[keyword])?),
            // In draft 3 `required` is a truth value of the property itself; as a truth value it is refused.
            "required" => out.required = strings(value).map_or_else(|| wrong("a list of strings").map(|()| Vec::new()), Ok)?,
            "dependentRequired" | "dependentSchemas" | "dependencies" => {
                let Value::Object(entries) = value else { return wrong("an object") };
                for (name, needs) in entries {
                    match strings(needs) {
                        Some(needs) if keyword != "dependentSchemas" => out.dependent_required.push((name.clone(), needs)),
                        None if keyword != "dependentRequired" => {
                            out.dependent_schemas.push((name.clone(), self.child(place, &[keyword, name])?));
                        }
                        _ => {
                            return wrong(if keyword == "dependentSchemas" {
                                "an object of schemas"
                            } else {
                                "an object of lists of strings"
                            });
                        }
                    }
                }
            }
            "allOf" => out.all_of = self.list(value, place, keyword)?,
            "anyOf" => out.any_of = self.list(value, place, keyword)?,
            "oneOf" => out.one_of = self.list(value, place, keyword)?,
            "not" => out.not = Some(self.child(place, &[keyword])?),
            "if" => {
                let mut branch = |key| object.contains_key(key).then(|| self.child(place, &[key])).transpose();
                let (then, else_) = (branch("then")?, branch("else")?);
                out.condition = Some((self.child(place, &[keyword])?, then, else_));
            }
            // Everything else says nothing that a value could miss.
            _ => {}
        }
        Ok(())
    }

    fn types(&self, value: &Value, place: &str) -> Result<u8> {
        let one =
            |value: &Value| value.as_str().and_then(|name| types::NAMES.iter().find(|(known, _)| *known == name)).map(|(_, bit)| *bit);
        let bits = match value {
            Value::Array(list) if !list.is_empty() => list.iter().try_fold(0, |bits, value| Some(bits | one(value)?)),
            value => one(value),
        };
        let hint = "null, boolean, object, array, string, number, integer";
        bits.map_or_else(|| refuse(place, format!("`type` is {}, which is no type", clip(&value.to_string())), hint), Ok)
    }

    fn list(&mut self, value: &Value, place: &str, keyword: &str) -> Result<Vec<usize>> {
        match value {
            Value::Array(list) if !list.is_empty() => {
                (0..list.len()).map(|index| self.child(place, &[keyword, &index.to_string()])).collect()
            }
            _ => refuse(place, format!("`{keyword}` must be a list with at least one schema"), ""),
        }
    }

    fn map(&mut self, value: &Value, place: &str, keyword: &str) -> Result<Vec<(String, usize)>> {
        match value {
            Value::Object(map) => map.keys().map(|name| Ok((name.clone(), self.child(place, &[keyword, name])?))).collect(),
            _ => refuse(place, format!("`{keyword}` must be an object of schemas"), ""),
        }
    }
}

fn strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|value| value.as_str().map(str::to_owned)).collect()
}

/// All anchors of a document, by name.
fn anchors(root: &Value, into: &mut HashMap<String, String>) {
    let mut left = vec![(root, String::new())];
    while let Some((value, place)) = left.pop() {
        let mut child = |value, key: &str| {
            let mut place = place.clone();
            super::push(&mut place, key);
            left.push((value, place));
        };
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| child(value, key)),
            Value::Array(list) => list.iter().enumerate().for_each(|(index, value)| child(value, &index.to_string())),
            _ => {}
        }
        if let Value::Object(map) = value {
            let named = map.get("$anchor").and_then(Value::as_str);
            let old = map.get("$id").and_then(Value::as_str).and_then(|id| id.strip_prefix('#'));
            if let Some(name) = named.or(old) {
                into.insert(name.to_owned(), place);
            }
        }
    }
}

fn percent_decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| *byte == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(decoded) => {
                out.push(decoded);
                rest = &after[2..];
            }
            None => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
