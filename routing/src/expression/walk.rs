//! Checks the syntax tree of an expression, and replaces references by slots.
//!
//! Invariant: after the walk every free name in the tree is a slot (`@0`, `@1`, …) or the name of
//! a type, and every call is on the list of [`FUNCTIONS`].

use std::sync::Arc;

use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedExpr, LiteralValue, operators as op};
use regex::{Regex, RegexBuilder};

use super::json::Paths;
use super::{Refusal, Roots};
use crate::node::join;
use crate::value::nearest;

/// The deepest syntax tree. Evaluation recurses, on a thread with an ordinary stack: a level takes
/// up to 40 KiB without optimisation.
const MAX_DEPTH: usize = 20;
const MAX_SLOTS: usize = 64;
const MAX_JOINS: usize = 4;
const MAX_REGEX_BYTES: usize = 256 << 10;

/// Allowed functions: the name, and how many arguments it has, a target included.
const FUNCTIONS: [(&str, usize); 23] = [
    ("size", 1),
    ("contains", 2),
    ("startsWith", 2),
    ("endsWith", 2),
    ("matches", 2),
    ("int", 1),
    ("uint", 1),
    ("double", 1),
    ("string", 1),
    ("bool", 1),
    ("bytes", 1),
    ("dyn", 1),
    ("type", 1),
    ("timestamp", 1),
    ("duration", 1),
    ("getFullYear", 1),
    ("getMonth", 1),
    ("getDayOfMonth", 1),
    ("getDayOfWeek", 1),
    ("getHours", 1),
    ("getMinutes", 1),
    ("getSeconds", 1),
    ("getMilliseconds", 1),
];
const OPERATORS: [&str; 19] = [
    op::CONDITIONAL,
    op::LOGICAL_AND,
    op::LOGICAL_OR,
    op::LOGICAL_NOT,
    op::SUBSTRACT,
    op::ADD,
    op::MULTIPLY,
    op::DIVIDE,
    op::MODULO,
    op::EQUALS,
    op::NOT_EQUALS,
    op::GREATER_EQUALS,
    op::LESS_EQUALS,
    op::GREATER,
    op::LESS,
    op::NEGATE,
    op::INDEX,
    op::IN,
    op::NOT_STRICTLY_FALSE,
];
const TYPES: [&str; 10] = ["bool", "int", "uint", "double", "string", "bytes", "list", "map", "null_type", "type"];
const RECORD_FIELDS: [&str; 9] = ["topic", "partition", "offset", "timestamp", "key", "text", "json", "headers", "size"];
const REPLY_FIELDS: [&str; 5] = ["status", "text", "json", "headers", "size"];

/// The record or the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Record,
    Reply,
}

/// What a slot stands for.
#[derive(Debug, Clone)]
pub(super) enum Slot {
    Topic,
    Partition,
    Offset,
    Timestamp,
    Key,
    Status,
    Text(Side),
    Size(Side),
    Headers(Side),
    Header(Side, String),
    /// A member of the JSON value, by the number of its cell.
    Json(Side, usize),
    /// Whether there is a key, a value or body, a header, a member of the JSON value.
    HasKey,
    HasValue(Side),
    HasHeader(Side, String),
    HasJson(Side, usize),
    Regex(Arc<Regex>),
}

/// An expression, ready to be evaluated.
pub(super) struct Program {
    pub(super) source: Arc<str>,
    pub(super) tree: IdedExpr,
    /// The slots, each with the text that it was written as.
    pub(super) slots: Vec<(String, Slot)>,
    /// The JSON paths of the record and of the reply, and how many cells they fill.
    pub(super) json: [(Paths, usize); 2],
}

/// Checks a tree and makes it a program.
pub(super) fn walk(source: &str, tree: IdedExpr, roots: Roots) -> Result<Program, Refusal> {
    let mut walk = Walk { roots, slots: Vec::new(), json: Default::default(), scope: Vec::new(), in_body: false, joins: 0 };
    let mut tree = tree;
    if never_a_truth_value(&tree.expr) {
        let hint = "compare it, as in `record.size > 0`";
        return Err(Refusal::new("the result is never true or false", hint));
    }
    walk.expr(&mut tree, 0)?;
    Ok(Program { source: Arc::from(source), tree, slots: walk.slots, json: walk.json })
}

fn never_a_truth_value(expr: &Expr) -> bool {
    match expr {
        Expr::Literal(literal) => !matches!(literal, LiteralValue::Boolean(_)),
        Expr::List(_) | Expr::Map(_) => true,
        Expr::Call(call) => {
            is_number(expr) || matches!(call.func_name.as_str(), op::ADD | "string" | "bytes" | "type" | "timestamp" | "duration")
        }
        _ => false,
    }
}

/// Whether an expression can only be a number (or a duration): it cannot grow.
fn is_number(expr: &Expr) -> bool {
    match expr {
        Expr::Literal(literal) => matches!(literal, LiteralValue::Int(_) | LiteralValue::UInt(_) | LiteralValue::Double(_)),
        Expr::Call(call) => {
            let name = call.func_name.as_str();
            let numeric = [op::SUBSTRACT, op::MULTIPLY, op::DIVIDE, op::MODULO, op::NEGATE, "size", "int", "uint", "double"];
            numeric.contains(&name) || (name == op::ADD && call.args.iter().any(|arg| is_number(&arg.expr)))
        }
        _ => false,
    }
}

struct Walk {
    roots: Roots,
    slots: Vec<(String, Slot)>,
    json: [(Paths, usize); 2],
    /// Names that macros bind.
    scope: Vec<String>,
    /// Within the body of a macro.
    in_body: bool,
    /// How many `+` may join texts or lists.
    joins: usize,
}

fn refuse<T>(message: impl Into<String>, hint: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(message, hint))
}

impl Walk {
    fn expr(&mut self, node: &mut IdedExpr, depth: usize) -> Result<(), Refusal> {
        if depth > MAX_DEPTH {
            return refuse(format!("nested more than {MAX_DEPTH} deep"), "simplify it");
        }
        if let Some((side, path, test)) = self.reference(&node.expr) {
            let slot = self.slot(side, &path, test)?;
            node.expr = Expr::Ident(format!("@{slot}"));
            return Ok(());
        }
        if let Expr::Call(call) = &node.expr
            && call.func_name == op::IN
            && let [IdedExpr { expr: Expr::Literal(LiteralValue::String(name)), .. }, of] = call.args.as_slice()
            && let Some((side, path, false)) = self.reference(&of.expr)
            && path == ["headers"]
        {
            // `"x" in record.headers` asks for one header: no map of all is needed.
            let path = ["headers".to_owned(), name.inner().to_owned()];
            let slot = self.slot(side, &path, true)?;
            node.expr = Expr::Ident(format!("@{slot}"));
            return Ok(());
        }
        let depth = depth + 1;
        match &mut node.expr {
            Expr::Literal(_) => Ok(()),
            Expr::Ident(name) => self.ident(name),
            Expr::Select(select) => self.expr(&mut select.operand, depth),
            Expr::Call(call) => self.call(call, depth),
            Expr::List(list) => {
                for element in &mut list.elements {
                    self.element(element, depth)?;
                }
                Ok(())
            }
            Expr::Map(map) => {
                for entry in &mut map.entries {
                    let EntryExpr::MapEntry(entry) = &mut entry.expr else {
                        return refuse("a message cannot be built here", "");
                    };
                    self.element(&mut entry.key, depth)?;
                    self.element(&mut entry.value, depth)?;
                }
                Ok(())
            }
            Expr::Comprehension(comprehension) => self.comprehension(comprehension, depth),
            Expr::Struct(_) | Expr::Unspecified => refuse("a message cannot be built here", ""),
        }
    }

    /// `record.a.b`, `record["a"].b`, `has(record.a)`: the side, the path below it, and whether
    /// it is a test.
    fn reference(&self, expr: &Expr) -> Option<(Side, Vec<String>, bool)> {
        let mut path = Vec::new();
        let mut at = expr;
        let mut test = false;
        loop {
            match at {
                Expr::Ident(name) if !self.scope.contains(name) => {
                    let side = match name.as_str() {
                        "record" => Side::Record,
                        "reply" => Side::Reply,
                        _ => return None,
                    };
                    path.reverse();
                    return Some((side, path, test));
                }
                Expr::Select(select) if !select.test || path.is_empty() => {
                    test |= select.test;
                    path.push(select.field.clone());
                    at = &select.operand.expr;
                }
                Expr::Call(call) if call.func_name == op::INDEX => match call.args.as_slice() {
                    [operand, IdedExpr { expr: Expr::Literal(LiteralValue::String(key)), .. }] => {
                        path.push(key.inner().to_owned());
                        at = &operand.expr;
                    }
                    _ => return None,
                },
                _ => return None,
            }
        }
    }

    fn ident(&mut self, name: &str) -> Result<(), Refusal> {
        if self.scope.iter().any(|bound| bound == name) || TYPES.contains(&name) {
            return Ok(());
        }
        let known = ["record", "reply"];
        let hint = match nearest(name, &known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "an expression sees `record`, and in a case `reply`".to_owned(),
        };
        refuse(format!("`{name}` is not known"), hint)
    }

    fn slot(&mut self, side: Side, path: &[String], test: bool) -> Result<usize, Refusal> {
        let (root, fields): (_, &[&str]) = match side {
            Side::Record => ("record", &RECORD_FIELDS),
            Side::Reply => ("reply", &REPLY_FIELDS),
        };
        if side == Side::Reply && self.roots == Roots::Record {
            let hint = "a filter is asked before the service; use `when` in a case";
            return refuse("a filter cannot see `reply`", hint);
        }
        let Some((field, rest)) = path.split_first() else {
            let hint = format!("name a field: {}", fields.join(", "));
            return refuse(format!("`{root}` alone is no value"), hint);
        };
        if !fields.contains(&field.as_str()) {
            let hint = match nearest(field, fields) {
                Some(near) => format!("did you mean `{root}.{near}`?"),
                None => format!("fields: {}", fields.join(", ")),
            };
            return refuse(format!("`{root}.{field}` is not known"), hint);
        }
        let text = path.iter().fold(root.to_owned(), |text, key| join(&text, key));
        let shown = if test { format!("has({text})") } else { text.clone() };
        if let Some(known) = self.slots.iter().position(|(name, _)| *name == shown) {
            return Ok(known);
        }
        let flat = format!("`{root}.{field}` has no fields");
        let slot = match (field.as_str(), rest, test) {
            ("json", [], true) | ("text", [], true) => Slot::HasValue(side),
            ("json", rest, test) => {
                let (paths, count) = &mut self.json[side as usize];
                paths.add(rest, *count, test);
                *count += 1;
                let cell = *count - 1;
                if test { Slot::HasJson(side, cell) } else { Slot::Json(side, cell) }
            }
            ("headers", [], false) => Slot::Headers(side),
            ("headers", [name], false) => Slot::Header(side, name.clone()),
            ("headers", [name], true) => Slot::HasHeader(side, name.clone()),
            ("key", [], true) => Slot::HasKey,
            (_, [], true) => {
                return refuse(format!("`{text}` is always there"), "remove the has()");
            }
            ("topic", [], _) => Slot::Topic,
            ("partition", [], _) => Slot::Partition,
            ("offset", [], _) => Slot::Offset,
            ("timestamp", [], _) => Slot::Timestamp,
            ("key", [], _) => Slot::Key,
            ("status", [], _) => Slot::Status,
            ("text", [], _) => Slot::Text(side),
            ("size", [], _) => Slot::Size(side),
            ("text", ..) => return refuse(flat, format!("use `{root}.json`")),
            _ => return refuse(flat, ""),
        };
        self.add(shown, slot)
    }

    fn add(&mut self, name: String, slot: Slot) -> Result<usize, Refusal> {
        if self.slots.len() >= MAX_SLOTS {
            return refuse(format!("more than {MAX_SLOTS} different references"), "simplify it");
        }
        self.slots.push((name, slot));
        Ok(self.slots.len() - 1)
    }

    fn call(&mut self, call: &mut CallExpr, depth: usize) -> Result<(), Refusal> {
        let name = call.func_name.as_str();
        let count = call.args.len() + usize::from(call.target.is_some());
        if !OPERATORS.contains(&name) {
            let known = FUNCTIONS.iter().find(|(known, _)| *known == name);
            let Some((_, wanted)) = known else {
                let names: Vec<&str> = FUNCTIONS.iter().map(|(name, _)| *name).collect();
                let hint = match nearest(name, &names) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("functions: {}", names.join(", ")),
                };
                return refuse(format!("`{name}` is no function here"), hint);
            };
            if *wanted != count {
                return refuse(format!("`{name}` takes {wanted} arguments here, not {count}"), "");
            }
        }
        if name == op::ADD && self.in_body && !call.args.iter().any(|arg| is_number(&arg.expr)) {
            let hint = "only numbers are added inside a macro: one side must be a number";
            return refuse("`+` inside a macro may join texts or lists", hint);
        }
        if name == op::ADD && !call.args.iter().any(|arg| is_number(&arg.expr)) {
            self.joins += 1;
            if self.joins > MAX_JOINS {
                return refuse(format!("more than {MAX_JOINS} `+` that may join texts or lists"), "compare the parts");
            }
        }
        if name == "matches" {
            self.regex(call)?;
        }
        if let Some(target) = &mut call.target {
            self.expr(target, depth)?;
        }
        for arg in &mut call.args {
            if !matches!(&arg.expr, Expr::Ident(name) if name.starts_with('@')) {
                self.expr(arg, depth)?;
            }
        }
        Ok(())
    }

    /// `x.matches("…")` becomes a call with the compiled expression.
    fn regex(&mut self, call: &mut CallExpr) -> Result<(), Refusal> {
        let pattern = match call.args.last().map(|arg| &arg.expr) {
            Some(Expr::Literal(LiteralValue::String(text))) => text.inner().to_owned(),
            _ => {
                let hint = "write the pattern as a text, as in matches(\"^a\")";
                return refuse("a regular expression must be literal", hint);
            }
        };
        let compiled = RegexBuilder::new(&pattern).size_limit(MAX_REGEX_BYTES).dfa_size_limit(MAX_REGEX_BYTES).nest_limit(16).build();
        let regex = match compiled {
            Ok(regex) => Arc::new(regex),
            Err(regex::Error::CompiledTooBig(_)) => {
                return refuse("the regular expression is too large", "lower its repetitions");
            }
            Err(error) => {
                let text = error.to_string();
                let last = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
                return refuse(format!("not a regular expression: {last}"), "");
            }
        };
        let slot = self.add(format!("matches({pattern:?})"), Slot::Regex(regex))?;
        call.func_name = super::eval::MATCHES.to_owned();
        if let Some(target) = call.target.take() {
            call.args.insert(0, *target);
        }
        if let Some(last) = call.args.last_mut() {
            last.expr = Expr::Ident(format!("@{slot}"));
        }
        Ok(())
    }

    fn element(&mut self, element: &mut IdedExpr, depth: usize) -> Result<(), Refusal> {
        let negative = |expr: &Expr| matches!(expr, Expr::Call(call) if call.func_name == op::NEGATE);
        if self.in_body && !matches!(element.expr, Expr::Literal(_)) && !negative(&element.expr) {
            let hint = "inside a macro a list holds literal values only";
            return refuse("a list or map is built inside a macro", hint);
        }
        self.expr(element, depth)
    }

    fn comprehension(&mut self, loop_: &mut ComprehensionExpr, depth: usize) -> Result<(), Refusal> {
        if self.in_body {
            let hint = "has one macro (all, exists, map, filter) inside another";
            return refuse("macros are one deep", hint);
        }
        if let Expr::Comprehension(inner) = &loop_.iter_range.expr
            && !is_filter(inner)
        {
            return refuse("a macro runs over the result of `map`", "only `filter` may come before");
        }
        self.expr(&mut loop_.iter_range, depth)?;
        let names = [Some(&loop_.iter_var), loop_.iter_var2.as_ref(), Some(&loop_.accu_var)];
        for name in names.into_iter().flatten() {
            if matches!(name.as_str(), "record" | "reply") {
                let hint = "choose another name for the element";
                return refuse(format!("`{name}` is taken"), hint);
            }
            self.scope.push(name.clone());
        }
        self.in_body = true;
        let builds_list = matches!(loop_.accu_init.expr, Expr::List(_));
        let done = if builds_list {
            self.append_step(&mut loop_.loop_step, depth)
        } else {
            self.expr(&mut loop_.loop_cond, depth)
                .and_then(|()| self.expr(&mut loop_.loop_step, depth))
                .and_then(|()| self.expr(&mut loop_.result, depth))
        };
        self.in_body = false;
        self.scope.clear();
        done
    }

    /// The step that `map` and `filter` are made of: `list + [value]`, or that under a condition.
    fn append_step(&mut self, step: &mut IdedExpr, depth: usize) -> Result<(), Refusal> {
        if let Expr::Call(call) = &mut step.expr {
            match (call.func_name.as_str(), call.args.as_mut_slice()) {
                (op::CONDITIONAL, [condition, then, _]) => {
                    self.expr(condition, depth)?;
                    return self.append_step(then, depth);
                }
                (op::ADD, [_, IdedExpr { expr: Expr::List(list), .. }]) => {
                    for element in &mut list.elements {
                        self.expr(element, depth)?;
                    }
                    return Ok(());
                }
                _ => {}
            }
        }
        refuse("this macro is not supported", "use all, exists, exists_one, map or filter")
    }
}

/// Whether a comprehension is a `filter`: it keeps its elements as they are.
fn is_filter(loop_: &ComprehensionExpr) -> bool {
    let Expr::Call(step) = &loop_.loop_step.expr else {
        return false;
    };
    let [_, IdedExpr { expr: Expr::Call(then), .. }, _] = step.args.as_slice() else {
        return false;
    };
    let [_, IdedExpr { expr: Expr::List(list), .. }] = then.args.as_slice() else {
        return false;
    };
    let [IdedExpr { expr: Expr::Ident(name), .. }] = list.elements.as_slice() else {
        return false;
    };
    *name == loop_.iter_var
}
