//! Plain JSON to the tree, without the care that YAML needs: what travels between sidecars is JSON, and every one of them reads it.
//!
//! Invariant: what is read here gives the tree that YAML gives for the same text, places included. What is not plain JSON is left to YAML, and so
//! are the words for what is wrong with it.

use std::borrow::Cow;

use super::{Loader, Open, Place};

/// How the reading ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// The loader has the tree.
    Whole,
    /// The loader has a fault with which reading cannot go on.
    Stopped,
    /// It is no JSON map, or one that is broken somewhere.
    NotJson,
}

/// What may come next.
#[derive(Clone, Copy)]
enum Next {
    /// A value; the end of the list as well, if it has none yet.
    Value { or_end: bool },
    /// A key; the end of the map as well, if it has none yet.
    Key { or_end: bool },
    /// What stands between two values, or the end of the list or map.
    Comma,
    /// Nothing.
    End,
}

/// Reads a text, if it is a map in JSON.
pub(super) fn read<'t>(text: &'t str, loader: &mut Loader<'_, 't>) -> Read {
    if !text.trim_start().starts_with('{') {
        return Read::NotJson;
    }
    match (Scanner { text, at: 0, line: 1, line_at: 0, inner: 0 }).run(loader) {
        Some(true) => Read::Whole,
        Some(false) => Read::Stopped,
        None => Read::NotJson,
    }
}

struct Scanner<'t> {
    text: &'t str,
    /// The next byte.
    at: usize,
    /// The line, from 1.
    line: u32,
    /// Where it begins.
    line_at: usize,
    /// How many bytes since then begin no character.
    inner: usize,
}

impl<'t> Scanner<'t> {
    /// `None`: this is no JSON. False: the loader stopped.
    fn run(mut self, loader: &mut Loader<'_, 't>) -> Option<bool> {
        // Which of the open ones are maps.
        let mut open: Vec<bool> = Vec::new();
        let mut next = Next::Value { or_end: false };
        loop {
            self.space();
            let at = self.place();
            let Some(byte) = self.peek() else {
                return matches!(next, Next::End).then_some(true);
            };
            let went_on = match (next, byte) {
                (Next::Value { or_end: true }, b']') | (Next::Key { or_end: true }, b'}') => self.end(&mut open, loader),
                (Next::Comma, b']' | b'}') => {
                    if *open.last()? != (byte == b'}') {
                        return None;
                    }
                    self.end(&mut open, loader)
                }
                (Next::Comma, b',') => {
                    self.at += 1;
                    next = if *open.last()? { Next::Key { or_end: false } } else { Next::Value { or_end: false } };
                    continue;
                }
                (Next::Key { .. }, b'"') => {
                    let key = self.string()?;
                    self.space();
                    if self.peek()? != b':' {
                        return None;
                    }
                    self.at += 1;
                    next = Next::Value { or_end: false };
                    if !loader.scalar(at, key, false) {
                        return Some(false);
                    }
                    continue;
                }
                (Next::Value { .. }, b'{' | b'[') => {
                    self.at += 1;
                    let map = byte == b'{';
                    open.push(map);
                    next = if map { Next::Key { or_end: true } } else { Next::Value { or_end: true } };
                    if !loader.push(at, if map { Open::map(at) } else { Open::List(at, Vec::new()) }) {
                        return Some(false);
                    }
                    continue;
                }
                (Next::Value { .. }, b'"') => {
                    let text = self.string()?;
                    loader.scalar(at, text, false)
                }
                (Next::Value { .. }, _) => {
                    let text = self.word()?;
                    loader.scalar(at, Cow::Borrowed(text), true)
                }
                _ => return None,
            };
            if !went_on {
                return Some(false);
            }
            next = if open.is_empty() { Next::End } else { Next::Comma };
        }
    }

    /// Ends a list or a map.
    fn end(&mut self, open: &mut Vec<bool>, loader: &mut Loader<'_, 't>) -> bool {
        self.at += 1;
        open.pop();
        loader.pop()
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn place(&self) -> Place {
        let column = self.at - self.line_at - self.inner + 1;
        Place { line: self.line, column: u32::try_from(column).unwrap_or(u32::MAX) }
    }

    fn space(&mut self) {
        while let Some(byte @ (b' ' | b'\t' | b'\n' | b'\r')) = self.peek() {
            self.at += 1;
            let ends_line = byte == b'\n' || (byte == b'\r' && self.peek() != Some(b'\n'));
            if ends_line {
                self.line = self.line.saturating_add(1);
                (self.line_at, self.inner) = (self.at, 0);
            }
        }
    }

    /// A string, of which the quote comes next.
    fn string(&mut self) -> Option<Cow<'t, str>> {
        let bytes = self.text.as_bytes();
        let (mut copied, mut at) = (self.at + 1, self.at + 1);
        let mut unescaped: Option<String> = None;
        loop {
            match *bytes.get(at)? {
                b'"' => {
                    let rest = self.text.get(copied..at)?;
                    self.at = at + 1;
                    return Some(match unescaped {
                        None => Cow::Borrowed(rest),
                        Some(text) => Cow::Owned(text + rest),
                    });
                }
                b'\\' => {
                    let text = unescaped.get_or_insert_default();
                    text.push_str(self.text.get(copied..at)?);
                    let (meant, length) = escape(bytes.get(at + 1..)?)?;
                    text.push(meant);
                    at += 1 + length;
                    copied = at;
                }
                // YAML folds line breaks and refuses other control characters.
                0..0x20 => return None,
                byte => {
                    self.inner += usize::from((0x80..0xC0).contains(&byte));
                    at += 1;
                }
            }
        }
    }

    /// A number, a truth value or null.
    fn word(&mut self) -> Option<&'t str> {
        let rest = self.text.get(self.at..)?;
        let length = ["true", "false", "null"].iter().find(|word| rest.starts_with(**word)).map(|word| word.len());
        let length = length.or_else(|| number(rest.as_bytes()))?;
        self.at += length;
        rest.get(..length)
    }
}

/// The character that an escape means, and its length, behind the backslash.
fn escape(rest: &[u8]) -> Option<(char, usize)> {
    let meant = match rest.first()? {
        b'"' => '"',
        b'\\' => '\\',
        b'/' => '/',
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'u' => {
            let high = hex(rest.get(1..5)?)?;
            if !(0xD800..0xDC00).contains(&high) {
                // The second half of a pair without the first is no character.
                return Some((char::from_u32(high)?, 5));
            }
            let low = rest.get(5..7).filter(|mark| *mark == b"\\u").and_then(|_| hex(rest.get(7..11)?))?;
            let low = low.checked_sub(0xDC00).filter(|low| *low < 0x400)?;
            return Some((char::from_u32(0x10000 + ((high - 0xD800) << 10) + low)?, 11));
        }
        _ => return None,
    };
    Some((meant, 1))
}

fn hex(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |sum, digit| Some(sum * 16 + char::from(*digit).to_digit(16)?))
}

/// The length of the number that the text begins with.
fn number(text: &[u8]) -> Option<usize> {
    let digits = |from: usize| text.get(from..).map_or(0, |rest| rest.iter().take_while(|byte| byte.is_ascii_digit()).count());
    let mut at = usize::from(text.first() == Some(&b'-'));
    let whole = digits(at);
    // No zero before other digits.
    if whole == 0 || (whole > 1 && text.get(at) == Some(&b'0')) {
        return None;
    }
    at += whole;
    if text.get(at) == Some(&b'.') {
        let part = digits(at + 1);
        if part == 0 {
            return None;
        }
        at += 1 + part;
    }
    if matches!(text.get(at), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(text.get(at + 1), Some(b'+' | b'-')));
        let exponent = digits(at + 1 + sign);
        if exponent == 0 {
            return None;
        }
        at += 1 + sign + exponent;
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::{super::Node, *};
    use crate::fault::Fault;

    fn as_json<'t>(text: &'t str, faults: &mut Vec<Fault>) -> (Read, Option<Node<'t>>) {
        let mut loader = Loader::new(faults);
        let read = read(text, &mut loader);
        (read, loader.root)
    }

    /// The tree by either way, and that they agree.
    #[track_caller]
    fn both(text: &str) {
        let (mut json, mut yaml) = (Vec::new(), Vec::new());
        let (read, node) = as_json(text, &mut json);
        assert_eq!(read, Read::Whole, "{text}");
        assert_eq!(node, super::super::read_yaml(text, &mut yaml), "{text}");
        assert_eq!(json, yaml, "{text}");
    }

    #[test]
    fn gives_the_tree_that_yaml_gives() {
        both("{}");
        both(" {\"a\": [], \"b\":{} ,\"c\" : [ [ ] , {\"d\":null}]}\n\n");
        both("{\"a\":\"é€😀\",\"b\":1,\n\"é\":{\"c\":2}, \"d\":\n[1,\r\n2]}");
        both(r#"{"a":"q\"\\\/\b\f\n\r\t\u00e9A","b":"\u0041\u20ac"}"#);
        both(r#"{"a":0,"b":-1,"c":1.50,"d":1e5,"e":-0.1E-7,"f":12345678901234567890,"g":true,"h":false,"i":"true","j":"1"}"#);
        both(r#"{"twice":1,"twice":{"a":2},"twice":[3]}"#);
    }

    #[test]
    fn leaves_to_yaml_what_is_no_json() {
        for text in [
            "",
            "[]",
            "a: 1",
            "{a: 1}",
            "{'a': 1}",
            "{\"a\" 1}",
            "{\"a\": b}",
            "{\"a\": 01}",
            "{\"a\": +1}",
            "{\"a\": .5}",
            "{\"a\": 1.}",
            "{\"a\": 1e}",
            "{\"a\": 1 2}",
            "{\"a\": 1,}",
            "{\"a\": [1,]}",
            "{\"a\": [1}",
            "{\"a\": 1]",
            "{,}",
            "{\"a\"}",
            "{\"a\": }",
            "{",
            "{\"a\": [",
            "{\"a",
            "{\"a\": \"\\q\"}",
            "{\"a\": \"\\u12\"}",
            "{\"a\": \"\\ud800\"}",
            "{\"a\": \"\\ud800\\u0041\"}",
            "{\"a\": \"\\udc00\"}",
            "{\"a\": \"b\nc\"}",
            "{\"a\": 1} # why",
            "{\"a\": 1}}",
            "{} {}",
            "{\"a\": &x 1}",
            "{1: 2}",
            "{\"a\": True}",
        ] {
            let (read, _) = as_json(text, &mut Vec::new());
            assert_eq!(read, Read::NotJson, "{text}");
        }
        // A pair that makes one character.
        let (read, node) = as_json(r#"{"a":"\ud83d\ude00"}"#, &mut Vec::new());
        let text = node.and_then(|node| Some(format!("{:?}", node.entry("a")?.node.value)));
        assert_eq!((read, text.as_deref()), (Read::Whole, Some("Scalar { text: \"😀\", plain: false }")));
    }

    #[test]
    fn stops_where_the_tree_would_be_too_large() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(100), "]".repeat(100));
        let mut faults = Vec::new();
        assert_eq!(as_json(&deep, &mut faults).0, Read::Stopped);
        assert_eq!(faults.len(), 1);
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9..1e9).prop_map(Value::from),
            "[a-zé€😀\"\\\\/\n\t:#{}, -]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 5, |inner| {
            let key = "[a-z\"\\\\é:# ]{0,6}";
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(key, inner, 0..5).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn any_json_gives_the_tree_that_yaml_gives(value in value(), pretty: bool) {
            let value = serde_json::json!({ "v": value });
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            both(&text.unwrap());
        }
    }
}
