//! The routing table of a mesh: parse, validate, compile, match, graph, diff, digest and sign.
//!
//! ```
//! let text = r#"
//! apiVersion: mesh/v1
//! kind: RoutingTable
//! metadata: { mesh: shop }
//! spec:
//!   routes:
//!   - { name: price, service: pricing, from: [orders], handler: /price, to: [priced] }
//! "#;
//! let table = mesh_routing::parse("routes.yaml", text)?;
//! let compiled = mesh_routing::compile(&table)?;
//! assert_eq!(&*compiled.routes_from("orders")[0].group, "shop.price");
//! # Ok::<(), mesh_routing::Faults>(())
//! ```
//!
//! [`load`] is both. Text becomes located nodes (`node`), nodes become a [`Table`] (`read`), a table is checked
//! (`check`) and compiled (`compile`) to what a sidecar runs. All faults of a table are found at
//! once, each with its place, its field and a hint.
//!
//! Invariant: this crate does no I/O, is not async and reads no clock. The one thread it starts
//! lends its stack to the compiler of expressions.
//! Invariant: no text, record or reply makes it panic or run without bound.

pub mod channel;
mod check;
mod compile;
mod diff;
mod expression;
pub mod fault;
mod graph;
mod node;
mod part;
mod read;
mod record;
mod schema;
pub mod sign;
mod table;
mod value;

use std::sync::LazyLock;

use check::Checked;

pub use compile::{
    Batch, Breaker, Case, CompiledTable, Decision, Destinations, Foreseen, ForwardHeaders, Retry, Route, Topic, compile, dead_letter,
};
pub use diff::{Change, ChangeKind, RouteCounts, count_routes, diff};
pub use expression::{Expression, ExpressionError};
pub use fault::{Fault, Faults};
pub use graph::{AllNotes, GraphFormat, Notes, graph, graph_with, loops};
pub use part::{Parts, digest_of, part_digest, part_of, text_digest};
pub use record::{HeaderSource, NoHeaders, RecordView, ReplyView};
pub use schema::{Mismatch, Schema};
pub use table::{
    API_VERSION, BatchSpec, BreakerSpec, CaseSpec, ConcurrencySpec, Deliver, ForwardSpec, Guarantee, KIND, OnExhausted, OnGap, Order,
    RetrySpec, RouteFields, RouteSpec, SchemaSpec, Start, Table, To, TopicSpec,
};
pub use value::nearest;

/// The most faults that are reported at once.
const MAX_FAULTS: usize = 1_000;

/// Reads a table from YAML or JSON, and checks it. `source_name` is what faults call the text,
/// such as the name of its file.
///
/// # Errors
///
/// All faults of the text: of its syntax, its fields, its types and its meaning, in the order of
/// the text. Above a thousand, the rest is left out.
pub fn parse(source_name: &str, text: &str) -> Result<Table, Faults> {
    read_text(source_name, text).map(|(table, ..)| table)
}

/// Reads a table, checks it and compiles it: what [`parse`] and [`compile()`] do one after the other, with one check in place of two.
///
/// # Errors
///
/// As [`parse`].
pub fn load(source_name: &str, text: &str) -> Result<(Table, CompiledTable), Faults> {
    load_with_parts(source_name, text).map(|(table, compiled, _)| (table, compiled))
}

/// As [`load`], with the [`Table::parts`], which its digest needs anyway.
///
/// # Errors
///
/// As [`parse`].
pub fn load_with_parts(source_name: &str, text: &str) -> Result<(Table, CompiledTable, Parts), Faults> {
    let (table, checked, _) = read_text(source_name, text)?;
    let parts = table.parts();
    let compiled = compile::compile_checked(&table, checked, parts.digest());
    Ok((table, compiled, parts))
}

/// Compiles a text that was stored with its digest: the one that [`Table::digest`] gives if the text is what [`Table::to_json`] gave. Whoever
/// stored it says so; the caller has checked that the digest is that of the text.
///
/// # Errors
///
/// As [`parse`].
pub fn load_stored(source_name: &str, text: &str, digest: &str) -> Result<CompiledTable, Faults> {
    let (table, checked, _) = read_text(source_name, text)?;
    Ok(compile::compile_checked(&table, checked, digest.to_owned()))
}

/// Gives all parts of a table, if they can be had; called at most once.
pub type AllParts = Box<dyn FnOnce() -> Option<Parts> + Send>;

/// As [`load_stored`], of some of its parts, without the routes of services that `serves` denies: neither read nor checked, they cost next to nothing.
/// `more` says that there are other parts. What the table declares of topics is there, and [`CompiledTable::route_of_group`] asks `all` for the groups
/// of the others when it has to.
///
/// # Errors
///
/// As [`parse`], of what is not left out, with the places in the whole.
pub fn load_part(
    source_name: &str,
    digest: &str,
    parts: &Parts,
    more: bool,
    serves: impl Fn(&str) -> bool,
    all: AllParts,
) -> Result<CompiledTable, Faults> {
    let Some((text, left_out)) = parts.own(serves) else {
        let message = "these are no parts of the table that this version understands";
        return Err(finish(source_name, vec![Fault::new(fault::code::UNSUPPORTED, "", message, "update this sidecar")]));
    };
    match load_stored(source_name, &text, digest) {
        Ok(mut compiled) if more || left_out => {
            let mesh = compiled.mesh.clone();
            let groups = move || all().map(|parts| parts.groups(&mesh)).unwrap_or_default();
            compiled.elsewhere = Some(LazyLock::new(Box::new(groups)));
            Ok(compiled)
        }
        Ok(compiled) => Ok(compiled),
        Err(faults) => match all().and_then(|parts| parts.join()) {
            Some(whole) => load_stored(source_name, &whole, digest),
            None => Err(faults),
        },
    }
}

/// As [`parse`], with the [warnings](Table::warnings) of the table, each at its place in the text.
///
/// # Errors
///
/// As [`parse`].
pub fn parse_with_warnings(source_name: &str, text: &str) -> Result<(Table, Vec<Fault>), Faults> {
    let (table, _, root) = read_text(source_name, text)?;
    let mut warnings = table.warnings();
    for warning in &mut warnings {
        locate(&root, warning);
    }
    Ok((table, finish(source_name, warnings).0))
}

fn read_text<'t>(source_name: &str, text: &'t str) -> Result<(Table, Checked, node::Node<'t>), Faults> {
    let mut faults = Vec::new();
    let Some(root) = node::load(text, &mut faults) else {
        return Err(finish(source_name, faults));
    };
    let loaded = faults.len();
    let table = read::read(&root, &mut faults);
    let mut checked = check::check(&table);
    let found = std::mem::take(&mut checked.faults);
    // What could not be read is missing for the checks: one fault is enough.
    let unread = faults.iter().skip(loaded);
    let known: Vec<String> = unread.map(|fault| fault.field.clone()).collect();
    let known = Reported::new(&known);
    for mut fault in found {
        if !known.explains(&fault) {
            locate(&root, &mut fault);
            faults.push(fault);
        }
    }
    if faults.is_empty() { Ok((table, checked, root)) } else { Err(finish(source_name, faults)) }
}

fn locate(root: &node::Node<'_>, fault: &mut Fault) {
    let at = root.locate(&fault.field);
    (fault.line, fault.column) = (at.line, at.column);
}

fn finish(source_name: &str, mut faults: Vec<Fault>) -> Faults {
    faults.sort_by_key(|fault| (fault.line, fault.column));
    let more = faults.len().saturating_sub(MAX_FAULTS);
    faults.truncate(MAX_FAULTS);
    if more > 0 {
        let message = format!("there are {more} more faults");
        faults.push(Fault::new(fault::code::LIMIT, "", message, "correct these first"));
    }
    for fault in &mut faults {
        source_name.clone_into(&mut fault.file);
    }
    Faults(faults)
}

/// The fields that reading has reported, and all their parents.
struct Reported<'a> {
    exact: std::collections::HashSet<&'a str>,
    parents: std::collections::HashSet<&'a str>,
}

impl<'a> Reported<'a> {
    fn new(fields: &'a [String]) -> Self {
        let exact = fields.iter().map(String::as_str).collect();
        let ends = |field: &'a str| field.char_indices().filter(|(_, c)| matches!(c, '.' | '['));
        let parents = fields.iter().flat_map(|field| ends(field).map(move |(end, _)| &field[..end])).collect();
        Self { exact, parents }
    }

    /// Whether a fault of the checks only follows from one of reading.
    fn explains(&self, fault: &Fault) -> bool {
        let field = fault.field.as_str();
        let below = || {
            let mut ends = field.char_indices().filter(|(_, c)| matches!(c, '.' | '['));
            ends.any(|(end, _)| self.exact.contains(&field[..end]))
        };
        let whole = self.exact.contains("");
        whole || self.exact.contains(field) || self.parents.contains(field) || below()
    }
}

#[cfg(test)]
mod tests;
