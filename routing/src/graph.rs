//! The table as a graph: topics and routes, and the loops they make.
//!
//! Invariant: the same table gives the same text; nothing recurses, so a long chain is no danger.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt::Write;

use crate::compile::dead_letter;
use crate::fault::{Fault, code};
use crate::table::{RouteFields, Table, To};

/// How a graph is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GraphFormat {
    /// Lines for a terminal.
    Text,
    /// A Mermaid flowchart.
    Mermaid,
    /// A Graphviz digraph.
    Dot,
}

/// A route as an edge of the graph.
struct Edge<'a> {
    name: &'a str,
    fields: RouteFields,
}

impl Edge<'_> {
    fn from(&self) -> &[String] {
        self.fields.from.as_deref().unwrap_or_default()
    }

    /// Destinations, each with what leads there: nothing for `to`, else the case.
    fn to(&self) -> Vec<(&str, String)> {
        let mut out = Vec::new();
        let mut push = |to, why: &str| match to {
            &To::Void => out.push(("void", why.to_owned())),
            To::Topics(topics) => {
                out.extend(topics.iter().map(|topic| (topic.as_str(), why.to_owned())));
            }
        };
        if let Some(to) = &self.fields.to {
            push(to, "");
        }
        for case in self.fields.cases.iter().flatten() {
            let mut why = case.status.map_or_else(String::new, |status| status.to_string());
            if let Some(when) = &case.when {
                let gap = if why.is_empty() { "" } else { " " };
                let _ = write!(why, "{gap}when {when}");
            }
            push(&case.to, &why);
        }
        out
    }

    fn targets(&self) -> BTreeSet<&str> {
        let all = self.to().into_iter().map(|(topic, _)| topic);
        all.filter(|topic| *topic != "void").collect()
    }
}

fn edges(table: &Table) -> Vec<Edge<'_>> {
    let mut out = Vec::with_capacity(table.routes.len());
    for route in &table.routes {
        let fields = table.resolved(route);
        let name = route.name.as_str();
        out.push(Edge { name, fields });
    }
    out
}

/// The loops of a table: for each, the names of the routes that take part, from the first by name
/// on, in the order in which a record can meet them. A route onto its own source is a loop of one.
pub fn loops(table: &Table) -> Vec<Vec<String>> {
    let edges = edges(table);
    let mut readers: HashMap<&str, Vec<usize>> = HashMap::new();
    for (i, edge) in edges.iter().enumerate() {
        for topic in edge.from() {
            readers.entry(topic).or_default().push(i);
        }
    }
    // From topic to topic: the routes that lead on from each.
    let mut number: HashMap<&str, usize> = HashMap::new();
    let mut topics: Vec<&str> = Vec::new();
    let mut intern = |topic| {
        *number.entry(topic).or_insert_with(|| {
            topics.push(topic);
            topics.len() - 1
        })
    };
    // Nodes are topics and routes: a route with m sources and n targets has m + n edges.
    let mut links: Vec<(usize, usize)> = Vec::new();
    let mut next: Vec<Vec<usize>> = Vec::new();
    for (i, edge) in edges.iter().enumerate() {
        links.extend(edge.from().iter().map(|topic| (2 * intern(topic), 2 * i + 1)));
        links.extend(edge.targets().into_iter().map(|topic| (2 * i + 1, 2 * intern(topic))));
    }
    let size = links.iter().map(|(a, b)| a.max(b) + 1).max().unwrap_or(0);
    next.resize(size, Vec::new());
    for (a, b) in links {
        next[a].push(b);
    }
    let component = components(&next);
    let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for i in 0..edges.len() {
        if let Some(c) = component.get(2 * i + 1) {
            members.entry(*c).or_default().push(i);
        }
    }
    let mut out = Vec::new();
    for (c, mut routes) in members {
        let inside = |node: &usize| component[*node] == c;
        let turns = routes.iter().any(|i| next[2 * i + 1].iter().any(inside));
        if turns {
            routes.sort_by_key(|i| edges[*i].name);
            out.push(walk(&edges, &readers, &routes));
        }
    }
    out.sort();
    out
}

/// The routes of a loop in the order in which a record meets them, breadth first from the first.
fn walk(edges: &[Edge<'_>], readers: &HashMap<&str, Vec<usize>>, routes: &[usize]) -> Vec<String> {
    let inside: BTreeSet<usize> = routes.iter().copied().collect();
    let mut seen = BTreeSet::new();
    let mut queue: VecDeque<usize> = routes.first().copied().into_iter().collect();
    let mut out = Vec::new();
    while let Some(i) = queue.pop_front() {
        if !seen.insert(i) {
            continue;
        }
        out.push(edges[i].name.to_owned());
        let mut ahead: Vec<usize> = edges[i]
            .targets()
            .iter()
            .flat_map(|topic| readers.get(topic).into_iter().flatten().copied())
            .filter(|j| inside.contains(j) && !seen.contains(j))
            .collect();
        ahead.sort_by_key(|j| edges[*j].name);
        queue.extend(ahead);
    }
    out
}

/// The strongly connected component of each node, by Tarjan's algorithm with a stack of its own.
fn components(next: &[Vec<usize>]) -> Vec<usize> {
    const NONE: usize = usize::MAX;
    let mut index = vec![NONE; next.len()];
    let mut low = vec![0; next.len()];
    let mut component = vec![NONE; next.len()];
    let (mut counter, mut found) = (0, 0);
    let mut path = Vec::new();
    for root in 0..next.len() {
        if index[root] != NONE {
            continue;
        }
        let mut work = vec![(root, 0)];
        while let Some((node, child)) = work.pop() {
            if child == 0 {
                (index[node], low[node]) = (counter, counter);
                counter += 1;
                path.push(node);
            } else {
                let before = next[node][child - 1];
                if component[before] == NONE {
                    low[node] = low[node].min(low[before]);
                }
            }
            if let Some(&ahead) = next[node].get(child) {
                work.push((node, child + 1));
                if index[ahead] == NONE {
                    work.push((ahead, 0));
                }
                continue;
            }
            if low[node] == index[node] {
                while let Some(last) = path.pop() {
                    component[last] = found;
                    if last == node {
                        break;
                    }
                }
                found += 1;
            }
        }
    }
    component
}

impl Table {
    /// What is allowed but may surprise: loops over several routes, and cases that no answer can
    /// reach.
    pub fn warnings(&self) -> Vec<Fault> {
        let mut out = Vec::new();
        for names in loops(self).into_iter().filter(|names| names.len() > 1) {
            let shown: Vec<&str> = names.iter().take(10).map(String::as_str).collect();
            let more = if names.len() > 10 { " → …" } else { "" };
            let message = format!("a loop: {}{more} → {}", shown.join(" → "), names[0]);
            let first = self.routes.iter().position(|route| route.name == names[0]);
            let field = format!("spec.routes[{}].to", first.unwrap_or(0));
            let hint = "make sure that some answer ends it: an ignored status, a case or a filter";
            out.push(Fault::new(code::LOOP, field, message, hint));
        }
        for (i, route) in self.routes.iter().enumerate() {
            let fields = self.resolved(route);
            let usual = BTreeSet::from([204, 205, 304]);
            let ignored = fields.ignore_status.as_ref().unwrap_or(&usual);
            for (c, case) in fields.cases.iter().flatten().enumerate() {
                if case.status.is_some_and(|status| ignored.contains(&status)) {
                    let field = format!("spec.routes[{i}].cases[{c}].status");
                    let message = "no answer reaches this case: its status is ignored";
                    let hint = "take the status out of ignore_status";
                    out.push(Fault::new(code::CONFLICT, field, message, hint));
                }
            }
        }
        out
    }
}

/// What is known of a route that runs, in words for its edges. An empty word is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notes {
    /// For the route itself.
    pub route: String,
    /// For what comes in; where there are several sources, for all of them together.
    pub from: String,
    /// For what goes to topics; where there are several ways out, for all of them together.
    pub to: String,
    /// For what is answered and goes nowhere.
    pub void: String,
    /// For dead letters.
    pub dead: String,
}

/// The notes of routes, by name.
pub type AllNotes = HashMap<String, Notes>;

/// The table as a graph: sources, routes with their services, destinations, dead letters, loops.
pub fn graph(table: &Table, format: GraphFormat) -> String {
    graph_with(table, format, &AllNotes::new())
}

/// The same, with notes on its edges.
pub fn graph_with(table: &Table, format: GraphFormat, notes: &AllNotes) -> String {
    let edges = edges(table);
    let loops = loops(table);
    match format {
        GraphFormat::Text => text(table, &edges, &loops, notes),
        GraphFormat::Mermaid => mermaid(&edges, &loops, notes),
        GraphFormat::Dot => dot(table, &edges, &loops, notes),
    }
}

/// The notes of a route on each of its edges.
struct Noted<'a> {
    notes: Option<&'a Notes>,
    /// Whether there are several sources, and several ways out: a note on one of them is about all.
    sources: bool,
    targets: bool,
}

impl<'a> Noted<'a> {
    fn new(edge: &Edge<'_>, notes: &'a AllNotes) -> Self {
        // An answer goes one of these ways, to all topics of it.
        let ways = edge.fields.to.iter().chain(edge.fields.cases.iter().flatten().map(|case| &case.to));
        let ways = ways.filter(|way| matches!(way, To::Topics(_))).count();
        Self { notes: notes.get(edge.name), sources: edge.from().len() > 1, targets: ways > 1 }
    }

    fn route(&self) -> &str {
        self.notes.map_or("", |notes| &notes.route)
    }

    fn from(&self) -> String {
        self.notes.map_or_else(String::new, |notes| together(&notes.from, self.sources))
    }

    /// Of the edge to a topic, or to `void`, with what leads there.
    fn to(&self, topic: &str, why: &str) -> String {
        let note = self.notes.map_or_else(String::new, |notes| match topic {
            "void" => notes.void.clone(),
            _ => together(&notes.to, self.targets),
        });
        let gap = if why.is_empty() || note.is_empty() { "" } else { ": " };
        format!("{why}{gap}{note}")
    }

    fn dead(&self) -> &str {
        self.notes.map_or("", |notes| &notes.dead)
    }
}

/// A note that is about several edges.
fn together(note: &str, several: bool) -> String {
    if several && !note.is_empty() { format!("in all {note}") } else { note.to_owned() }
}

fn service<'a>(edge: &'a Edge<'_>) -> &'a str {
    edge.fields.service.as_deref().unwrap_or("?")
}

// Writing to a `String` cannot fail, so the results of `write!` are dropped below.

fn text(table: &Table, edges: &[Edge<'_>], loops: &[Vec<String>], notes: &AllNotes) -> String {
    let bracketed = |note: &str| if note.is_empty() { String::new() } else { format!("  [{note}]") };
    let mut out = format!("mesh {}\n", table.mesh);
    for edge in edges {
        let noted = Noted::new(edge, notes);
        let _ = writeln!(out, "\n{} ({}){}", edge.name, service(edge), bracketed(noted.route()));
        for topic in edge.from() {
            let _ = writeln!(out, "  from {topic}{}", bracketed(&noted.from()));
        }
        if let Some(filter) = &edge.fields.filter {
            let _ = writeln!(out, "  if   {filter}");
        }
        for (topic, why) in edge.to() {
            let _ = writeln!(out, "  to   {topic}{}", bracketed(&noted.to(topic, &why)));
        }
        let _ = writeln!(out, "  dead {}{}", dead_letter(edge.name, &edge.fields), bracketed(noted.dead()));
    }
    for names in loops {
        let _ = writeln!(out, "\nloop: {} → {}", names.join(" → "), names[0]);
    }
    out
}

fn in_loop(loops: &[Vec<String>]) -> BTreeSet<&str> {
    loops.iter().flatten().map(String::as_str).collect()
}

fn mermaid(edges: &[Edge<'_>], loops: &[Vec<String>], notes: &AllNotes) -> String {
    let labelled = |note: &str| if note.is_empty() { String::new() } else { format!("|{}|", quoted(note)) };
    let mut out = String::from("flowchart LR\n");
    let mut topics: BTreeMap<String, usize> = BTreeMap::new();
    for edge in edges {
        let to = edge.to();
        let named = edge.from().iter().cloned().chain(to.iter().map(|(topic, _)| (*topic).to_owned()));
        for topic in named.chain([dead_letter(edge.name, &edge.fields).into_owned()]) {
            topics.insert(topic, 0);
        }
    }
    for (i, (topic, number)) in topics.iter_mut().enumerate() {
        *number = i;
        let _ = writeln!(out, "  t{i}[({})]", quoted(topic));
    }
    let turning = in_loop(loops);
    for (i, edge) in edges.iter().enumerate() {
        let noted = Noted::new(edge, notes);
        let gap = if noted.route().is_empty() { "" } else { ": " };
        let label = quoted(&format!("{} ({}){gap}{}", edge.name, service(edge), noted.route()));
        let _ = writeln!(out, "  r{i}[{label}]");
        for topic in edge.from() {
            let _ = writeln!(out, "  t{} -->{} r{i}", topics[topic], labelled(&noted.from()));
        }
        for (topic, why) in edge.to() {
            let _ = writeln!(out, "  r{i} -->{} t{}", labelled(&noted.to(topic, &why)), topics[topic]);
        }
        let dead = topics[&*dead_letter(edge.name, &edge.fields)];
        let _ = writeln!(out, "  r{i} -.->{} t{dead}", labelled(noted.dead()));
        if turning.contains(edge.name) {
            let _ = writeln!(out, "  style r{i} stroke-width:3px");
        }
    }
    out
}

/// A Mermaid label: quotes and markup as entities.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("#quot;"),
            '#' => out.push_str("#35;"),
            '<' => out.push_str("#lt;"),
            '>' => out.push_str("#gt;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out + "\""
}

fn dot(table: &Table, edges: &[Edge<'_>], loops: &[Vec<String>], notes: &AllNotes) -> String {
    let plain = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace(['\n', '\r'], " ");
    let mut out = format!("digraph \"{}\" {{\n  rankdir=LR;\n", plain(&table.mesh));
    let turning = in_loop(loops);
    for edge in edges {
        let name = plain(edge.name);
        let width = if turning.contains(edge.name) { ", penwidth=3" } else { "" };
        let noted = Noted::new(edge, notes);
        let labelled = |note: &str| if note.is_empty() { String::new() } else { format!(" [label=\"{}\"]", plain(note)) };
        let line = if noted.route().is_empty() { "" } else { "\\n" };
        let label = format!("{name}\\n{}{line}{}", plain(service(edge)), plain(noted.route()));
        let _ = writeln!(out, "  \"route {name}\" [shape=box, label=\"{label}\"{width}];");
        for topic in edge.from() {
            let _ = writeln!(out, "  \"{}\" -> \"route {name}\"{};", plain(topic), labelled(&noted.from()));
        }
        for (topic, why) in edge.to() {
            let _ = writeln!(out, "  \"route {name}\" -> \"{}\"{};", plain(topic), labelled(&noted.to(topic, &why)));
        }
        let dead = plain(&dead_letter(edge.name, &edge.fields));
        let label = if noted.dead().is_empty() { String::new() } else { format!(", label=\"{}\"", plain(noted.dead())) };
        let _ = writeln!(out, "  \"route {name}\" -> \"{dead}\" [style=dashed{label}];");
    }
    out + "}\n"
}
