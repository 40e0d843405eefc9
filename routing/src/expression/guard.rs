//! Bounds an expression before the parser sees it. The parser recurses, and panics or overflows
//! its stack on deep sources, so depth is counted here, over tokens, without recursion.
//!
//! Invariant: a source that passes has at most [`MAX_DEPTH`] open brackets, [`MAX_OPERATORS`]
//! operators and [`MAX_CHAIN`] members in a row.

use super::Refusal;

/// The longest source, in bytes.
pub(super) const MAX_BYTES: usize = 1024;
const MAX_DEPTH: usize = 10;
const MAX_OPERATORS: usize = 100;
const MAX_ARITHMETIC: usize = 32;
const MAX_CHAIN: usize = 24;
const MAX_UNARY: usize = 4;
const MAX_TERNARIES: usize = 4;

/// Refuses a source that is too long, too deep or too wide.
pub(super) fn check(text: &str) -> Result<(), Refusal> {
    let simpler = "split it over several cases or routes, or compute it in the service";
    if text.len() > MAX_BYTES {
        let message = format!("the expression has {} bytes, more than {MAX_BYTES}", text.len());
        return Err(Refusal::new(message, simpler));
    }
    if text.trim().is_empty() {
        return Err(Refusal::new("the expression is empty", "remove the field"));
    }
    let mut scan = Scan::default();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = token(rest, first)?;
        let (word, tail) = rest.split_at(length);
        scan.take(word, simpler)?;
        rest = tail;
    }
    match scan.open.pop() {
        Some((bracket, _)) => Err(Refusal::new(format!("`{bracket}` is not closed"), "")),
        None => Ok(()),
    }
}

#[derive(Default)]
struct Scan {
    /// Open brackets, each with the length of the chain before it.
    open: Vec<(char, usize)>,
    operators: usize,
    arithmetic: usize,
    ternaries: usize,
    chain: usize,
    unary: usize,
    /// Whether the last token ends a value, so that `-` after it is binary.
    after_value: bool,
}

impl Scan {
    fn take(&mut self, word: &str, simpler: &str) -> Result<(), Refusal> {
        let refuse = |what: &str, most: usize| Err(Refusal::new(format!("more than {most} {what}"), simpler));
        match word {
            _ if word.trim().is_empty() => {}
            "(" | "[" | "{" => {
                self.open.push((word.chars().next().unwrap_or('('), self.chain + 1));
                (self.chain, self.unary, self.after_value) = (0, 0, false);
                if self.open.len() > MAX_DEPTH {
                    return refuse("brackets inside each other", MAX_DEPTH);
                }
            }
            ")" | "]" | "}" => {
                let wanted = match word {
                    ")" => '(',
                    "]" => '[',
                    _ => '{',
                };
                match self.open.pop() {
                    Some((open, chain)) if open == wanted => self.chain = chain,
                    _ => return Err(Refusal::new(format!("`{word}` closes nothing"), "")),
                }
                (self.unary, self.after_value) = (0, true);
            }
            "." => {
                self.chain += 1;
                self.after_value = false;
            }
            "!" => self.unary += 1,
            "-" if !self.after_value => self.unary += 1,
            "," | ":" => (self.chain, self.unary, self.after_value) = (0, 0, false),
            "&&" | "||" | "==" | "!=" | "<" | "<=" | ">" | ">=" | "+" | "-" | "*" | "/" | "%" | "in" | "?" => {
                self.operators += 1;
                self.arithmetic += usize::from(matches!(word, "+" | "-" | "*" | "/" | "%"));
                self.ternaries += usize::from(word == "?");
                (self.chain, self.unary, self.after_value) = (0, 0, false);
            }
            _ => (self.unary, self.after_value) = (0, true),
        }
        if self.chain > MAX_CHAIN {
            return refuse("members in a row", MAX_CHAIN);
        }
        if self.unary > MAX_UNARY {
            return refuse("signs in a row", MAX_UNARY);
        }
        if self.operators > MAX_OPERATORS {
            return refuse("operators", MAX_OPERATORS);
        }
        if self.arithmetic > MAX_ARITHMETIC {
            return refuse("arithmetic operators", MAX_ARITHMETIC);
        }
        if self.ternaries > MAX_TERNARIES {
            return refuse("conditions (`? :`)", MAX_TERNARIES);
        }
        Ok(())
    }
}

/// The length of the token that `rest` begins with.
fn token(rest: &str, first: char) -> Result<usize, Refusal> {
    let bytes = rest.as_bytes();
    let two = rest.get(..2).unwrap_or_default();
    if two == "//" {
        return Err(Refusal::new("a comment", "comment in the table, not in the expression"));
    }
    if matches!(two, "&&" | "||" | "==" | "!=" | "<=" | ">=") {
        return Ok(2);
    }
    if matches!(first, '\'' | '"') {
        return string(rest, false);
    }
    if first.is_ascii_alphabetic() || first == '_' {
        let length = bytes.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_').count();
        let prefix = &rest[..length];
        let quoted = matches!(bytes.get(length), Some(b'\'' | b'"'));
        let prefix = prefix.to_ascii_lowercase();
        match prefix.as_str() {
            "r" | "b" | "br" if quoted => return string(&rest[length..], prefix != "b").map(|n| n + length),
            _ if quoted => return Err(Refusal::new(format!("`{prefix}` stands before a text"), "a text begins with ', \", r', b' or br'")),
            _ => {}
        }
        return Ok(length);
    }
    if first.is_ascii_digit() {
        let mut length = 0;
        while let Some(byte) = bytes.get(length) {
            let exponent = matches!(byte, b'+' | b'-') && length > 0 && matches!(bytes[length - 1], b'e' | b'E') && !rest.starts_with("0x");
            let dot = *byte == b'.' && bytes.get(length + 1).is_some_and(u8::is_ascii_digit);
            if !(byte.is_ascii_alphanumeric() || exponent || dot) {
                break;
            }
            length += 1;
        }
        return Ok(length);
    }
    if matches!(first, ' ' | '\t' | '\n' | '\r') || "()[]{}.,:?+-*/%<>!".contains(first) {
        return Ok(1);
    }
    let shown = first.escape_default();
    Err(Refusal::new(format!("the character `{shown}` has no meaning in CEL"), ""))
}

/// The length of a string literal, quotes included.
fn string(rest: &str, raw: bool) -> Result<usize, Refusal> {
    let quote = &rest[..1];
    let triple = quote.repeat(3);
    let end = if rest.starts_with(&triple) { triple.as_str() } else { quote };
    let mut at = end.len();
    while at < rest.len() {
        let tail = &rest[at..];
        if tail.starts_with(end) {
            return Ok(at + end.len());
        }
        let char = tail.chars().next().unwrap_or('\0');
        if char == '\\' && !raw {
            at += escape(tail)?;
        } else if matches!(char, '\n' | '\r') && end.len() == 1 {
            break;
        } else {
            at += char.len_utf8();
        }
    }
    Err(Refusal::new("a string is not closed", ""))
}

/// The length of an escape. The lexer would skip what it does not know and read the rest of the
/// text as code, so unknown ones are refused here.
fn escape(tail: &str) -> Result<usize, Refusal> {
    let bytes = tail.as_bytes();
    let digits = |from: usize, count: usize, base: u32| {
        let digits = bytes.get(from..from + count);
        digits.is_some_and(|digits| digits.iter().all(|b| char::from(*b).is_digit(base)))
    };
    let length = match bytes.get(1) {
        Some(b'\\' | b'\'' | b'"' | b'`' | b'?' | b'a' | b'b' | b'f' | b'n' | b'r' | b't' | b'v') => 2,
        Some(b'x' | b'X') if digits(2, 2, 16) => 4,
        Some(b'u') if digits(2, 4, 16) => 6,
        Some(b'U') if digits(2, 8, 16) => 10,
        Some(b'0'..=b'3') if digits(1, 3, 8) => 4,
        _ => {
            let shown: String = tail.chars().take(2).collect();
            let hint = "write the backslash twice, or put r before the text: r'\\d+'";
            return Err(Refusal::new(format!("`{shown}` is no escape"), hint));
        }
    };
    Ok(length)
}
