//! Checks a value against a compiled JSON Schema.
//!
//! Invariant: a check ends: it has a number of steps that follows from the value's size, and a bound on how deep it goes.

use std::cmp::Ordering;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use serde_json::{Number, Value};

use super::json::{Keywords, Node, Schema, types};
use super::{Mismatch, clip};

/// Steps that every check has, and further ones for each byte of the value.
const STEPS: usize = 100_000;
const STEPS_A_BYTE: usize = 4;
/// How deep a check goes: places of the value, and nodes at each of them.
const DEPTH: usize = 300;

/// Why a node does not match: `None` where nobody asks.
type Fault = Option<Box<Mismatch>>;

pub(super) fn check(schema: &Schema, value: &[u8]) -> Result<(), Mismatch> {
    let parsed: Value = serde_json::from_slice(value).map_err(|error| Mismatch::whole(format!("is not JSON: {error}")))?;
    let mut run =
        Run { schema, steps: STEPS + value.len().saturating_mul(STEPS_A_BYTE), depth: 0, quiet: 0, path: String::new(), spent: false };
    match run.node(0, &parsed) {
        // Within `not`, or an alternative, running out of steps looks like a verdict.
        _ if run.spent => Err(Mismatch::whole("takes more work to check than its size allows: simplify the schema")),
        Ok(()) => Ok(()),
        Err(fault) => Err(fault.map_or_else(|| Mismatch::whole("does not match"), |fault| *fault)),
    }
}

struct Run<'s> {
    schema: &'s Schema,
    steps: usize,
    depth: usize,
    /// Above 0 nobody asks why.
    quiet: usize,
    /// Where the check is.
    path: String,
    /// The steps or the depth did not suffice.
    spent: bool,
}

impl Run<'_> {
    fn fault(&self, reason: impl FnOnce() -> String) -> Result<(), Fault> {
        Err((self.quiet == 0).then(|| Box::new(Mismatch { path: self.path.clone(), reason: reason() })))
    }

    fn spend(&mut self, steps: usize) -> Result<(), Fault> {
        match self.steps.checked_sub(steps) {
            Some(left) if !self.spent => {
                self.steps = left;
                Ok(())
            }
            _ => {
                self.spent = true;
                Err(None)
            }
        }
    }

    fn node(&mut self, number: usize, value: &Value) -> Result<(), Fault> {
        self.spend(1)?;
        if self.depth >= DEPTH {
            self.spent = true;
            return Err(None);
        }
        let schema = self.schema;
        match schema.nodes.get(number) {
            None | Some(Node::Always(true)) => Ok(()),
            Some(Node::Always(false)) => self.fault(|| "is not allowed".to_owned()),
            Some(Node::Keywords(keywords)) => {
                self.depth += 1;
                let result = self.keywords(keywords, value);
                self.depth -= 1;
                result
            }
        }
    }

    /// A node at a place below this one.
    fn below(&mut self, segment: &str, number: usize, value: &Value) -> Result<(), Fault> {
        let length = self.path.len();
        super::push(&mut self.path, segment);
        let result = self.node(number, value);
        self.path.truncate(length);
        result
    }

    fn matches(&mut self, number: usize, value: &Value) -> Result<bool, Fault> {
        self.quiet += 1;
        let result = self.node(number, value);
        self.quiet -= 1;
        if self.spent { Err(None) } else { Ok(result.is_ok()) }
    }

    fn keywords(&mut self, keywords: &Keywords, value: &Value) -> Result<(), Fault> {
        if let Some(wanted) = keywords.types
            && kinds(value) & wanted == 0
        {
            return self.fault(|| format!("is {}, not {}", show(value), names(wanted)));
        }
        if let Some(constant) = &keywords.constant
            && !self.equal(constant, value)?
        {
            return self.fault(|| format!("is {}, not {}", show(value), show(constant)));
        }
        if let Some(list) = &keywords.enumeration {
            let mut found = false;
            for one in list {
                found = found || self.equal(one, value)?;
            }
            if !found {
                return self.fault(|| format!("is {}, none of {}", show(value), clip(&Value::Array(list.clone()).to_string())));
            }
        }
        match value {
            Value::Number(number) => self.number(keywords, number)?,
            Value::String(text) => self.string(keywords, text)?,
            Value::Array(list) => self.array(keywords, list)?,
            Value::Object(map) => self.object(keywords, map, value)?,
            Value::Null | Value::Bool(_) => {}
        }
        if let Some(reference) = keywords.reference {
            self.node(reference, value)?;
        }
        for number in &keywords.all_of {
            self.node(*number, value)?;
        }
        if !keywords.any_of.is_empty() {
            let mut any = false;
            for number in &keywords.any_of {
                any = any || self.matches(*number, value)?;
            }
            if !any {
                return self.alternatives(&keywords.any_of, value);
            }
        }
        if !keywords.one_of.is_empty() {
            let mut count = 0;
            for number in &keywords.one_of {
                count += usize::from(self.matches(*number, value)?);
            }
            match count {
                0 => return self.alternatives(&keywords.one_of, value),
                1 => {}
                count => return self.fault(|| format!("matches {count} alternatives of `oneOf`, not one")),
            }
        }
        if let Some(not) = keywords.not
            && self.matches(not, value)?
        {
            return self.fault(|| "matches what `not` excludes".to_owned());
        }
        if let Some((condition, then, else_)) = keywords.condition {
            let branch = if self.matches(condition, value)? { then } else { else_ };
            if let Some(branch) = branch {
                self.node(branch, value)?;
            }
        }
        Ok(())
    }

    /// None of them matches: the only one tells why.
    fn alternatives(&mut self, numbers: &[usize], value: &Value) -> Result<(), Fault> {
        match numbers {
            [only] if self.quiet == 0 => self.node(*only, value),
            _ => self.fault(|| format!("matches none of the {} alternatives", numbers.len())),
        }
    }

    fn number(&mut self, keywords: &Keywords, value: &Number) -> Result<(), Fault> {
        let bounds: [(&Option<Number>, &[Ordering], &str); 4] = [
            (&keywords.minimum, &[Ordering::Less], "less than the minimum"),
            (&keywords.exclusive_minimum, &[Ordering::Less, Ordering::Equal], "not above"),
            (&keywords.maximum, &[Ordering::Greater], "more than the maximum"),
            (&keywords.exclusive_maximum, &[Ordering::Greater, Ordering::Equal], "not below"),
        ];
        for (bound, wrong, words) in bounds {
            if let Some(bound) = bound
                && wrong.contains(&compare(value, bound))
            {
                return self.fault(|| format!("is {value}, {words} {bound}"));
            }
        }
        if let Some(divisor) = &keywords.multiple_of
            && !is_multiple(value, divisor)
        {
            return self.fault(|| format!("is {value}, no multiple of {divisor}"));
        }
        Ok(())
    }

    fn string(&mut self, keywords: &Keywords, text: &str) -> Result<(), Fault> {
        if keywords.min_length.is_some() || keywords.max_length.is_some() {
            self.spend(text.len() / 16)?;
            let length = text.chars().count() as u64;
            if keywords.min_length.is_some_and(|least| length < least) {
                return self.fault(|| format!("has {length} characters, at least {} are due", keywords.min_length.unwrap_or_default()));
            }
            if keywords.max_length.is_some_and(|most| length > most) {
                return self.fault(|| format!("has {length} characters, at most {} are allowed", keywords.max_length.unwrap_or_default()));
            }
        }
        if let Some(pattern) = &keywords.pattern {
            self.spend(text.len() / 4)?;
            if !pattern.is_match(text) {
                return self.fault(|| format!("is {}, which does not match the pattern `{}`", show(&text.into()), clip(pattern.as_str())));
            }
        }
        Ok(())
    }

    fn array(&mut self, keywords: &Keywords, list: &[Value]) -> Result<(), Fault> {
        let length = list.len() as u64;
        if keywords.min_items.is_some_and(|least| length < least) {
            return self.fault(|| format!("has {length} items, at least {} are due", keywords.min_items.unwrap_or_default()));
        }
        if keywords.max_items.is_some_and(|most| length > most) {
            return self.fault(|| format!("has {length} items, at most {} are allowed", keywords.max_items.unwrap_or_default()));
        }
        if keywords.unique
            && let Some((first, second)) = self.repeated(list)?
        {
            return self.fault(|| format!("has the same item at {first} and {second}"));
        }
        for (index, item) in list.iter().enumerate() {
            if let Some(number) = keywords.prefix.get(index).copied().or(keywords.items) {
                self.below(&index.to_string(), number, item)?;
            }
        }
        if let Some(contains) = keywords.contains {
            let mut count = 0_u64;
            for item in list {
                count += u64::from(self.matches(contains, item)?);
            }
            let least = keywords.min_contains.unwrap_or(1);
            if count < least || keywords.max_contains.is_some_and(|most| count > most) {
                return self.fault(|| format!("has {count} items that match `contains`"));
            }
        }
        Ok(())
    }

    /// Two items that are the same.
    fn repeated(&mut self, list: &[Value]) -> Result<Option<(usize, usize)>, Fault> {
        let mut hashes = Vec::with_capacity(list.len());
        for (index, item) in list.iter().enumerate() {
            let mut hasher = DefaultHasher::new();
            self.hash(item, &mut hasher)?;
            hashes.push((hasher.finish(), index));
        }
        hashes.sort_unstable();
        for pair in hashes.windows(2) {
            if pair[0].0 == pair[1].0 && self.equal(&list[pair[0].1], &list[pair[1].1])? {
                return Ok(Some((pair[0].1, pair[1].1)));
            }
        }
        Ok(None)
    }

    fn object(&mut self, keywords: &Keywords, map: &serde_json::Map<String, Value>, whole: &Value) -> Result<(), Fault> {
        self.spend(keywords.required.len())?;
        if let Some(missing) = keywords.required.iter().find(|name| !map.contains_key(*name)) {
            return self.fault(|| format!("lacks the required field `{}`", clip(missing)));
        }
        let length = map.len() as u64;
        if keywords.min_properties.is_some_and(|least| length < least) {
            return self.fault(|| format!("has {length} fields, at least {} are due", keywords.min_properties.unwrap_or_default()));
        }
        if keywords.max_properties.is_some_and(|most| length > most) {
            return self.fault(|| format!("has {length} fields, at most {} are allowed", keywords.max_properties.unwrap_or_default()));
        }
        for (name, needs) in &keywords.dependent_required {
            self.spend(1 + needs.len())?;
            if map.contains_key(name)
                && let Some(missing) = needs.iter().find(|need| !map.contains_key(*need))
            {
                return self.fault(|| format!("has the field `{}` and lacks `{}`, which it needs", clip(name), clip(missing)));
            }
        }
        for (name, number) in &keywords.dependent_schemas {
            self.spend(1)?;
            if map.contains_key(name) {
                self.node(*number, whole)?;
            }
        }
        for (name, value) in map {
            if let Some(names) = keywords.names
                && !self.matches(names, &Value::String(name.clone()))?
            {
                return self.fault(|| format!("has the field `{}`, whose name `propertyNames` excludes", clip(name)));
            }
            let own = keywords.properties.get(name);
            let mut known = own.is_some();
            if let Some(number) = own {
                self.below(name, *number, value)?;
            }
            for (pattern, number) in &keywords.patterns {
                self.spend(1 + name.len() / 4)?;
                if pattern.is_match(name) {
                    known = true;
                    self.below(name, *number, value)?;
                }
            }
            if let (false, Some(additional)) = (known, keywords.additional) {
                if let Some(Node::Always(false)) = self.schema.nodes.get(additional) {
                    let length = self.path.len();
                    super::push(&mut self.path, name);
                    let fault = self.fault(|| "is a field that is not allowed here".to_owned());
                    self.path.truncate(length);
                    return fault;
                }
                self.below(name, additional, value)?;
            }
        }
        Ok(())
    }

    /// Whether two values are the same: 1 is 1.0.
    fn equal(&mut self, left: &Value, right: &Value) -> Result<bool, Fault> {
        self.spend(1)?;
        Ok(match (left, right) {
            (Value::Number(left), Value::Number(right)) => compare(left, right) == Ordering::Equal,
            (Value::String(left), Value::String(right)) => left == right,
            (Value::Array(left), Value::Array(right)) => {
                if left.len() != right.len() {
                    return Ok(false);
                }
                for (left, right) in left.iter().zip(right) {
                    if !self.equal(left, right)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Value::Object(left), Value::Object(right)) => {
                if left.len() != right.len() {
                    return Ok(false);
                }
                for (name, left) in left {
                    match right.get(name) {
                        Some(right) if self.equal(left, right)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (left, right) => left == right,
        })
    }

    /// Values that are equal hash alike.
    fn hash(&mut self, value: &Value, into: &mut DefaultHasher) -> Result<(), Fault> {
        self.spend(1)?;
        match value {
            Value::Null => 0.hash(into),
            Value::Bool(value) => value.hash(into),
            Value::Number(number) => number.as_f64().unwrap_or_default().to_bits().hash(into),
            Value::String(text) => text.hash(into),
            Value::Array(list) => {
                for item in list {
                    self.hash(item, into)?;
                }
            }
            Value::Object(map) => {
                for (name, value) in map {
                    name.hash(into);
                    self.hash(value, into)?;
                }
            }
        }
        Ok(())
    }
}

fn kinds(value: &Value) -> u8 {
    match value {
        Value::Null => 1,
        Value::Bool(_) => 2,
        Value::Object(_) => 4,
        Value::Array(_) => 8,
        Value::String(_) => 16,
        // 1.0 is an integer.
        Value::Number(number) if number.is_f64() => {
            if number.as_f64().is_some_and(|n| n.fract() == 0.0) {
                32 | 64
            } else {
                32
            }
        }
        Value::Number(_) => 32 | 64,
    }
}

fn names(bits: u8) -> String {
    let names: Vec<&str> = types::NAMES.iter().filter(|(_, bit)| bits & bit != 0).map(|(name, _)| *name).collect();
    names.join(" or ")
}

fn show(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        value => clip(&value.to_string()),
    }
}

fn whole(number: &Number) -> Option<i128> {
    number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from))
}

fn compare(left: &Number, right: &Number) -> Ordering {
    match (whole(left), whole(right)) {
        (Some(left), Some(right)) => left.cmp(&right),
        _ => {
            let float = |number: &Number| number.as_f64().unwrap_or_default();
            float(left).partial_cmp(&float(right)).unwrap_or(Ordering::Equal)
        }
    }
}

fn is_multiple(value: &Number, divisor: &Number) -> bool {
    if let (Some(value), Some(divisor)) = (whole(value), whole(divisor)) {
        return divisor != 0 && value % divisor == 0;
    }
    let (value, divisor) = (value.as_f64().unwrap_or_default(), divisor.as_f64().unwrap_or(1.0));
    let quotient = value / divisor;
    // 19.99 is a multiple of 0.01, though not in binary.
    quotient.is_finite() && (quotient - quotient.round()).abs() <= 1e-9 * quotient.abs().max(1.0)
}
