//! Located nodes to a table. Reads what it can and reports everything else.
//!
//! Invariant: a field that is wrong is reported once, and left out of the table.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::time::Duration;

use crate::fault::{Fault, code};
use crate::node::{Entry, Node, Path, Value};
use crate::table::{
    API_VERSION, BatchSpec, BreakerSpec, CaseSpec, ConcurrencySpec, Deliver, ForwardSpec, Guarantee, KIND, OnExhausted, OnGap, Order,
    RetrySpec, RouteFields, RouteSpec, SchemaSpec, Start, Table, To, TopicSpec,
};
use crate::value::{nearest, parse_duration, parse_time};

/// All fields of a route, but its name.
pub(crate) const ROUTE_FIELDS: [&str; 23] = [
    "service",
    "from",
    "deliver",
    "handler",
    "to",
    "cases",
    "filter",
    "ignore_status",
    "start",
    "group",
    "order",
    "content_type",
    "concurrency",
    "timeout",
    "retry",
    "on_exhausted",
    "dead_letter",
    "breaker",
    "forward_headers",
    "guarantee",
    "on_gap",
    "batch",
    "max_hops",
];

/// The same, with the name.
const NAMED_FIELDS: [&str; 24] = {
    let (mut all, mut at) = (["name"; 24], 0);
    while at < ROUTE_FIELDS.len() {
        all[at + 1] = ROUTE_FIELDS[at];
        at += 1;
    }
    all
};

/// Reads a table from the root node.
pub(crate) fn read(root: &Node<'_>, faults: &mut Vec<Fault>) -> Table {
    Reader { faults }.table(root)
}

struct Reader<'f> {
    faults: &'f mut Vec<Fault>,
}

/// The entries of a map, with their path.
struct Fields<'n> {
    path: Path<'n>,
    entries: &'n [Entry<'n>],
}

impl<'n> Fields<'n> {
    fn get(&self, key: &'static str) -> Option<(&Node<'n>, Path<'_>)> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        Some((&entry.node, self.path.key(key)))
    }
}

impl Reader<'_> {
    fn fault(&mut self, code: &'static str, node: &Node<'_>, path: &Path<'_>, message: String, hint: &str) {
        let mut fault = Fault::new(code, path.text(), message, hint);
        (fault.line, fault.column) = (node.at.line, node.at.column);
        self.faults.push(fault);
    }

    fn wrong_type(&mut self, node: &Node<'_>, path: &Path<'_>, wanted: &str, hint: &str) {
        let message = format!("expected {wanted}, found {}", found(node));
        self.fault(code::TYPE, node, path, message, hint);
    }

    // Shapes.

    fn map<'n>(&mut self, node: &'n Node<'_>, path: &'n Path<'_>, known: &[&str]) -> Option<Fields<'n>> {
        let fields = self.any_map(node, path)?;
        for entry in fields.entries {
            if known.contains(&&*entry.key) {
                continue;
            }
            // Beyond what is reported, no time is spent on hints.
            let cut = self.faults.len() > crate::MAX_FAULTS;
            let near = if cut { None } else { nearest(&entry.key, known) };
            let hint = match near {
                None if cut => String::new(),
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known here: {}", known.join(", ")),
            };
            let message = format!("unknown field `{}`", entry.key);
            let mut fault = Fault::new(code::UNKNOWN_FIELD, path.key(&entry.key).text(), message, hint);
            (fault.line, fault.column) = (entry.at.line, entry.at.column);
            self.faults.push(fault);
        }
        Some(fields)
    }

    fn any_map<'n>(&mut self, node: &'n Node<'_>, path: &'n Path<'_>) -> Option<Fields<'n>> {
        if let Value::Map(entries) = &node.value {
            return Some(Fields { path: *path, entries });
        }
        self.wrong_type(node, path, "a map", "write `key: value` pairs");
        None
    }

    fn list<T>(
        &mut self,
        node: &Node<'_>,
        path: &Path<'_>,
        hint: &str,
        mut item: impl FnMut(&mut Self, &Node<'_>, &Path<'_>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let Value::List(nodes) = &node.value else {
            self.wrong_type(node, path, "a list", hint);
            return None;
        };
        let mut out = Vec::with_capacity(nodes.len());
        for (i, node) in nodes.iter().enumerate() {
            out.extend(item(self, node, &path.item(i)));
        }
        Some(out)
    }

    // Scalars.

    fn string(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<String> {
        match &node.value {
            Value::Scalar { text, plain } if !*plain || is_string(text) => Some(text.clone().into_owned()),
            Value::Scalar { plain: true, text } if !is_null(text) => {
                self.wrong_type(node, path, "a string", &format!("write \"{text}\" in quotes"));
                None
            }
            _ => {
                self.wrong_type(node, path, "a string", "");
                None
            }
        }
    }

    fn number<T: FromStr>(&mut self, node: &Node<'_>, path: &Path<'_>, wanted: &str) -> Option<T> {
        if let Value::Scalar { text, plain: true } = &node.value
            && text.starts_with(|c: char| c.is_ascii_digit() || c == '-')
            && let Ok(number) = text.parse()
        {
            return Some(number);
        }
        self.wrong_type(node, path, wanted, "");
        None
    }

    fn whole<T: FromStr>(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<T> {
        self.number(node, path, "a whole number")
    }

    fn status(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<u16> {
        self.number(node, path, "a status from 100 to 599")
    }

    fn duration(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Duration> {
        let hint = "write a number with a unit: 100ms, 5s, 1h30m, 7d";
        if let Value::Scalar { text, .. } = &node.value
            && !is_null(text)
        {
            match parse_duration(text) {
                Ok(duration) => return Some(duration),
                Err(message) => self.fault(code::VALUE, node, path, message, hint),
            }
        } else {
            self.wrong_type(node, path, "a duration", hint);
        }
        None
    }

    /// One of a few words; `None` (with a fault) when it is none of them.
    fn word<T: Copy>(&mut self, node: &Node<'_>, path: &Path<'_>, words: &[(&str, T)]) -> Option<T> {
        let text = self.string(node, path)?;
        let found = words.iter().find(|(word, _)| *word == text);
        if found.is_none() {
            let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            let hint = match nearest(&text, &names) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("one of: {}", names.join(", ")),
            };
            let message = format!("`{text}` is not known here");
            self.fault(code::VALUE, node, path, message, &hint);
        }
        found.map(|(_, value)| *value)
    }

    // The table.

    fn table(&mut self, root: &Node<'_>) -> Table {
        let mut table = Table { mesh: String::new(), topics: BTreeMap::new(), defaults: RouteFields::default(), routes: Vec::new() };
        let Some(fields) = self.map(root, &Path::Root, &["apiVersion", "kind", "metadata", "spec"]) else {
            return table;
        };
        self.constant(root, &fields, "apiVersion", API_VERSION);
        self.constant(root, &fields, "kind", KIND);
        if let Some((node, path)) = self.required(root, &fields, "metadata")
            && let Some(metadata) = self.map(node, &path, &["mesh"])
            && let Some((node, path)) = self.required(node, &metadata, "mesh")
        {
            table.mesh = self.string(node, &path).unwrap_or_default();
        }
        let Some((node, path)) = self.required(root, &fields, "spec") else {
            return table;
        };
        let Some(spec) = self.map(node, &path, &["topics", "defaults", "routes"]) else {
            return table;
        };
        if let Some((node, path)) = spec.get("topics")
            && let Some(topics) = self.any_map(node, &path)
        {
            for entry in topics.entries {
                let topic = self.topic(&entry.node, &path.key(&entry.key));
                table.topics.insert(entry.key.clone().into_owned(), topic);
            }
        }
        if let Some((node, path)) = spec.get("defaults")
            && let Some(fields) = self.map(node, &path, &ROUTE_FIELDS)
        {
            table.defaults = self.route_fields(&fields);
        }
        if let Some((node, path)) = self.required(node, &spec, "routes") {
            let hint = "write `routes: [ { name: … } ]`";
            let routes = self.list(node, &path, hint, |r, node, path| r.route(node, path));
            table.routes = routes.unwrap_or_default();
        }
        table
    }

    fn required<'f>(&mut self, parent: &Node<'_>, fields: &'f Fields<'_>, key: &'static str) -> Option<(&'f Node<'f>, Path<'f>)> {
        let found = fields.get(key);
        if found.is_none() {
            self.fault(code::MISSING, parent, &fields.path.key(key), format!("`{key}` is missing"), "");
        }
        found
    }

    fn constant(&mut self, root: &Node<'_>, fields: &Fields<'_>, key: &'static str, wanted: &str) {
        if let Some((node, path)) = self.required(root, fields, key)
            && let Some(text) = self.string(node, &path)
            && text != wanted
        {
            let message = format!("`{text}` is not supported");
            self.fault(code::VALUE, node, &path, message, &format!("write `{key}: {wanted}`"));
        }
    }

    fn topic(&mut self, node: &Node<'_>, path: &Path<'_>) -> TopicSpec {
        let mut topic = TopicSpec::default();
        if let Some(fields) = self.map(node, path, &["partitions", "replication", "retention", "schema"]) {
            let get = |key| fields.get(key);
            topic.partitions = get("partitions").and_then(|(n, p)| self.whole(n, &p));
            topic.replication = get("replication").and_then(|(n, p)| self.whole(n, &p));
            topic.retention = get("retention").and_then(|(n, p)| self.duration(n, &p));
            topic.schema = get("schema").and_then(|(n, p)| self.schema(n, &p));
        }
        topic
    }

    fn schema(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<SchemaSpec> {
        const HINT: &str = "write `json: { … }` with a JSON Schema, or `protobuf: { descriptor: <base64>, message: shop.Order }`";
        let fields = self.map(node, path, &["json", "protobuf"])?;
        match (fields.get("json"), fields.get("protobuf")) {
            (Some((node, path)), None) => self.json(node, &path).map(SchemaSpec::Json),
            (None, Some((node, path))) => {
                let fields = self.map(node, &path, &["descriptor", "message"])?;
                let descriptor = self.required(node, &fields, "descriptor").and_then(|(node, path)| self.string(node, &path));
                let message = self.required(node, &fields, "message").and_then(|(node, path)| self.string(node, &path));
                Some(SchemaSpec::Protobuf { descriptor: descriptor?, message: message? })
            }
            // An unknown field is told already.
            (None, None) if !fields.entries.is_empty() => None,
            _ => {
                self.fault(code::VALUE, node, path, "a schema is either `json` or `protobuf`".to_owned(), HINT);
                None
            }
        }
    }

    /// A JSON value, written out, or as the text of a JSON document.
    fn json(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<serde_json::Value> {
        if let Value::Scalar { text, plain: false } = &node.value {
            return match serde_json::from_str(text) {
                Ok(value) => Some(value),
                Err(error) => {
                    let message = format!("the text is not JSON: {error}");
                    self.fault(code::VALUE, node, path, message, "write the schema out, or correct the text");
                    None
                }
            };
        }
        Some(json_value(node))
    }

    fn route(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<RouteSpec> {
        let Some(fields) = self.map(node, path, &NAMED_FIELDS) else {
            // Kept as an empty route, so that the numbers of the others stay right.
            return Some(RouteSpec { name: String::new(), fields: RouteFields::default() });
        };
        let name = self.required(node, &fields, "name").and_then(|(node, path)| self.string(node, &path));
        Some(RouteSpec { name: name.unwrap_or_default(), fields: self.route_fields(&fields) })
    }

    fn route_fields(&mut self, fields: &Fields<'_>) -> RouteFields {
        let get = |key| fields.get(key);
        let mut out = RouteFields {
            service: get("service").and_then(|(n, p)| self.string(n, &p)),
            from: get("from").and_then(|(n, p)| self.strings(n, &p, "a route may have several sources: write [topic]")),
            handler: get("handler").and_then(|(n, p)| self.string(n, &p)),
            to: get("to").and_then(|(n, p)| self.to(n, &p)),
            filter: get("filter").and_then(|(n, p)| self.string(n, &p)),
            ignore_status: get("ignore_status").and_then(|(n, p)| self.statuses(n, &p)),
            start: get("start").and_then(|(n, p)| self.start(n, &p)),
            group: get("group").and_then(|(n, p)| self.string(n, &p)),
            content_type: get("content_type").and_then(|(n, p)| self.string(n, &p)),
            concurrency: get("concurrency").and_then(|(n, p)| self.concurrency(n, &p)),
            timeout: get("timeout").and_then(|(n, p)| self.duration(n, &p)),
            dead_letter: get("dead_letter").and_then(|(n, p)| self.string(n, &p)),
            forward_headers: get("forward_headers").and_then(|(n, p)| self.forward(n, &p)),
            max_hops: get("max_hops").and_then(|(n, p)| self.whole(n, &p)),
            ..RouteFields::default()
        };
        let words = [("push", Deliver::Push), ("stream", Deliver::Stream), ("pull", Deliver::Pull)];
        out.deliver = get("deliver").and_then(|(n, p)| self.word(n, &p, &words));
        let words = [("key", Order::Key), ("partition", Order::Partition), ("none", Order::None)];
        out.order = get("order").and_then(|(n, p)| self.word(n, &p, &words));
        let words = [("earliest", OnGap::Earliest), ("stop", OnGap::Stop)];
        out.on_gap = get("on_gap").and_then(|(n, p)| self.word(n, &p, &words));
        let words = [("dead_letter", OnExhausted::DeadLetter), ("park", OnExhausted::Park), ("stop", OnExhausted::Stop)];
        out.on_exhausted = get("on_exhausted").and_then(|(n, p)| self.word(n, &p, &words));
        out.guarantee = get("guarantee").and_then(|(n, p)| self.guarantee(n, &p));
        if let Some((node, path)) = get("cases") {
            let hint = "write `cases: [ { status: 202, to: [topic] } ]`";
            out.cases = self.list(node, &path, hint, |r, node, path| r.case(node, path));
        }
        if let Some((node, path)) = get("retry") {
            out.retry = self.retry(node, &path);
        }
        if let Some((node, path)) = get("breaker")
            && let Some(fields) = self.map(node, &path, &["failures", "open"])
        {
            out.breaker = Some(BreakerSpec {
                failures: fields.get("failures").and_then(|(n, p)| self.whole(n, &p)),
                open: fields.get("open").and_then(|(n, p)| self.duration(n, &p)),
            });
        }
        if let Some((node, path)) = get("batch")
            && let Some(fields) = self.map(node, &path, &["max", "wait"])
        {
            out.batch = Some(BatchSpec {
                max: fields.get("max").and_then(|(n, p)| self.whole(n, &p)),
                wait: fields.get("wait").and_then(|(n, p)| self.duration(n, &p)),
            });
        }
        out
    }

    fn strings(&mut self, node: &Node<'_>, path: &Path<'_>, hint: &str) -> Option<Vec<String>> {
        self.list(node, path, hint, |r, node, path| r.string(node, path))
    }

    fn statuses(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<BTreeSet<u16>> {
        let hint = "write [204, 205, 304]";
        let list = self.list(node, path, hint, |r, node, path| r.status(node, path));
        list.map(|list| list.into_iter().collect())
    }

    fn to(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<To> {
        if let Value::Scalar { text, .. } = &node.value {
            if text == "void" {
                return Some(To::Void);
            }
            let hint = if is_null(text) { "write a list of topics, or `void`".to_owned() } else { format!("write [{text}], or `void`") };
            self.wrong_type(node, path, "a list of topics or `void`", &hint);
            return None;
        }
        let hint = "write a list of topics, or `void`";
        self.strings(node, path, hint).map(To::Topics)
    }

    fn case(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<CaseSpec> {
        let fields = self.map(node, path, &["status", "when", "to"]);
        let empty = CaseSpec { status: None, when: None, to: To::Void };
        // A broken case is kept too, so that the numbers of the others stay right.
        let Some(fields) = fields else {
            return Some(empty);
        };
        let to = self.required(node, &fields, "to");
        Some(CaseSpec {
            status: fields.get("status").and_then(|(n, p)| self.status(n, &p)),
            when: fields.get("when").and_then(|(n, p)| self.string(n, &p)),
            to: to.and_then(|(n, p)| self.to(n, &p)).unwrap_or(empty.to),
        })
    }

    fn retry(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<RetrySpec> {
        let known = ["attempts", "initial", "max", "multiplier", "topics"];
        let fields = self.map(node, path, &known)?;
        let get = |key| fields.get(key);
        Some(RetrySpec {
            attempts: get("attempts").and_then(|(n, p)| self.whole(n, &p)),
            initial: get("initial").and_then(|(n, p)| self.duration(n, &p)),
            max: get("max").and_then(|(n, p)| self.duration(n, &p)),
            multiplier: get("multiplier").and_then(|(n, p)| self.number(n, &p, "a number")),
            topics: get("topics").and_then(|(n, p)| {
                let hint = "name the pause before each further attempt, such as [10m, 1h]";
                self.list(n, &p, hint, |r, node, path| r.duration(node, path))
            }),
        })
    }

    fn concurrency(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<ConcurrencySpec> {
        if let Value::Map(_) = &node.value {
            let fields = self.map(node, path, &["adaptive"])?;
            let (node, path) = self.required(node, &fields, "adaptive")?;
            let bounds = self.map(node, &path, &["min", "max"])?;
            return Some(ConcurrencySpec::Adaptive {
                min: bounds.get("min").and_then(|(n, p)| self.whole(n, &p)),
                max: bounds.get("max").and_then(|(n, p)| self.whole(n, &p)),
            });
        }
        if matches!(&node.value, Value::Scalar { text, .. } if text == "adaptive") {
            return Some(ConcurrencySpec::Adaptive { min: None, max: None });
        }
        let wanted = "a whole number, `adaptive` or `{ adaptive: { min: …, max: … } }`";
        self.number(node, path, wanted).map(ConcurrencySpec::Fixed)
    }

    fn start(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Start> {
        let text = self.string(node, path)?;
        match text.as_str() {
            "earliest" => return Some(Start::Earliest),
            "latest" => return Some(Start::Latest),
            "applied" => return Some(Start::Applied),
            _ => {}
        }
        if let Some(millis) = parse_time(&text) {
            return Some(Start::At(millis));
        }
        let hint = match nearest(&text, &["earliest", "latest", "applied"]) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "earliest, latest, applied, or a time such as 2026-01-31T12:00:00Z".to_owned(),
        };
        let message = format!("`{text}` is no start");
        self.fault(code::VALUE, node, path, message, &hint);
        None
    }

    fn guarantee(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Guarantee> {
        self.word(node, path, &[("at_least_once", Guarantee::AtLeastOnce), ("exactly_once", Guarantee::ExactlyOnce)])
    }

    fn forward(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<ForwardSpec> {
        match &node.value {
            Value::List(_) => self.strings(node, path, "").map(ForwardSpec::Only),
            Value::Scalar { text, .. } if text == "all" => Some(ForwardSpec::All),
            Value::Scalar { text, .. } if text == "none" => Some(ForwardSpec::None),
            _ => {
                let wanted = "`all`, `none` or a list of header names";
                self.wrong_type(node, path, wanted, "");
                None
            }
        }
    }
}

fn found(node: &Node<'_>) -> String {
    match &node.value {
        Value::List(_) => "a list".into(),
        Value::Map(_) => "a map".into(),
        Value::Scalar { text, plain: true } if is_null(text) => "nothing".into(),
        Value::Scalar { text, plain } => {
            let short: String = text.chars().take(40).collect();
            let quote = if *plain { "`" } else { "\"" };
            format!("{quote}{short}{quote}")
        }
    }
}

/// A node as JSON, by YAML's core schema.
fn json_value(node: &Node<'_>) -> serde_json::Value {
    use serde_json::Value as Json;
    match &node.value {
        Value::List(nodes) => Json::Array(nodes.iter().map(json_value).collect()),
        Value::Map(entries) => {
            Json::Object(entries.iter().map(|entry| (entry.key.clone().into_owned(), json_value(&entry.node))).collect())
        }
        Value::Scalar { text, plain: false } => Json::String(text.clone().into_owned()),
        Value::Scalar { text, plain: true } => match &**text {
            text if is_null(text) => Json::Null,
            "true" | "True" | "TRUE" => Json::Bool(true),
            "false" | "False" | "FALSE" => Json::Bool(false),
            text if is_string(text) => Json::String(text.to_owned()),
            // A number as JSON has it; what YAML alone takes for one stays text.
            text => serde_json::from_str(text).map_or_else(|_| Json::String(text.to_owned()), Json::Number),
        },
    }
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// Whether a plain scalar is a string by YAML's core schema: no null, truth value or number.
fn is_string(text: &str) -> bool {
    if is_null(text) || matches!(text, "true" | "True" | "TRUE" | "false" | "False" | "FALSE") {
        return false;
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let all = |digits: &str, base| !digits.is_empty() && digits.chars().all(|c| c.is_digit(base));
    let based = digits.strip_prefix("0x").is_some_and(|hex| all(hex, 16)) || digits.strip_prefix("0o").is_some_and(|octal| all(octal, 8));
    let special = matches!(digits, ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN");
    let number = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') && digits.parse::<f64>().is_ok();
    !(based || special || number)
}
