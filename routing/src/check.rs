//! What must hold of a table beyond its shape.
//!
//! Invariant: a table without faults here compiles; every fault is found in one pass.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use crate::expression::{Expression, Roots, Source, compile_all};
use crate::fault::{Fault, code};
use crate::node::Path;
use crate::schema::{self, Schema};
use crate::table::{ConcurrencySpec, Deliver, ForwardSpec, RouteFields, SchemaSpec, Table, To, group};
use crate::value::{LONGEST, name_fault, topic_fault};

const DAY: Duration = Duration::from_secs(86_400);
const MAX_CONCURRENCY: u32 = 10_000;
const MAX_BATCH: u32 = 10_000;
const MAX_ROUTES: usize = 100_000;
/// Each is a topic per source, and read by each owner of a partition.
const MAX_RETRY_TOPICS: usize = 8;
const MAX_TARGETS: usize = 1_000;

/// What a check comes to.
pub(crate) struct Checked {
    /// Everything that is wrong with the table.
    pub(crate) faults: Vec<Fault>,
    /// Its compiled expressions: those of route `r` are under `spec.routes[r].filter` and
    /// `spec.routes[r].cases[c].when`, those of the defaults under `spec.defaults…`.
    pub(crate) expressions: HashMap<String, Expression>,
    /// Its compiled schemas, by topic.
    pub(crate) schemas: BTreeMap<String, Schema>,
    /// The fields of its routes, defaults folded in.
    pub(crate) fields: Vec<RouteFields>,
}

/// Checks a table, and compiles what has to be compiled for that.
pub(crate) fn check(table: &Table) -> Checked {
    let mut check = Check { faults: Vec::new(), sources: Vec::new(), schemas: BTreeMap::new() };
    let fields: Vec<RouteFields> = table.routes.iter().map(|route| table.resolved(route)).collect();
    check.table(table, &fields);
    check.schemas(table, &fields);
    let Check { mut faults, sources, schemas } = check;
    let mut expressions = HashMap::with_capacity(sources.len());
    for (path, compiled) in compile_all(sources) {
        match compiled {
            Ok(expression) => {
                expressions.insert(path, expression);
            }
            Err(refusal) => {
                faults.push(Fault::new(code::EXPRESSION, path, refusal.message, refusal.hint));
            }
        }
    }
    Checked { faults, expressions, schemas, fields }
}

struct Check {
    faults: Vec<Fault>,
    sources: Vec<Source>,
    schemas: BTreeMap<String, Schema>,
}

impl Check {
    fn fault(&mut self, code: &'static str, path: &Path<'_>, message: impl Into<String>, hint: &str) {
        self.faults.push(Fault::new(code, path.text(), message, hint));
    }

    fn table(&mut self, table: &Table, resolved: &[RouteFields]) {
        if let Some(fault) = name_fault(&table.mesh) {
            self.fault(code::NAME, &Path::Root.key("metadata").key("mesh"), fault, "a mesh is named like `shop`");
        }
        let spec = Path::Root.key("spec");
        let (topics, routes) = (spec.key("topics"), spec.key("routes"));
        if table.routes.len() > MAX_ROUTES {
            let message = format!("more than {MAX_ROUTES} routes");
            self.fault(code::LIMIT, &routes, message, "split the mesh");
        }
        for (name, topic) in &table.topics {
            let path = topics.key(name);
            self.topic_name(&path, name);
            if topic.partitions.is_some_and(|n| n == 0 || n > 100_000) {
                self.fault(code::VALUE, &path.key("partitions"), "partitions go from 1 to 100000", "");
            }
            if topic.replication.is_some_and(|n| n == 0 || n > 32_767) {
                self.fault(code::VALUE, &path.key("replication"), "replication goes from 1 to 32767", "");
            }
            if let Some(retention) = topic.retention {
                self.between(&path.key("retention"), retention, Duration::from_secs(1), LONGEST);
            }
        }
        self.fields(&spec.key("defaults"), &table.defaults);
        let mut own: HashMap<String, usize> = HashMap::new();
        // Who has no retry topics has none that somebody could name.
        let named = if resolved.iter().any(has_own_topics) { named_topics(table, resolved) } else { HashSet::new() };
        let mut names: HashMap<&str, usize> = HashMap::with_capacity(table.routes.len());
        let mut groups: HashMap<Cow<'_, str>, usize> = HashMap::with_capacity(table.routes.len());
        for (i, (route, fields)) in table.routes.iter().zip(resolved).enumerate() {
            let path = routes.item(i);
            let name = path.key("name");
            if let Some(fault) = name_fault(&route.name) {
                self.fault(code::NAME, &name, fault, "a route is named like `price-orders`");
            } else if let Some(first) = names.insert(&route.name, i) {
                let message = format!("`{}` is also the name of spec.routes[{first}]", route.name);
                self.fault(code::DUPLICATE, &name, message, "names are unique in a table");
            }
            self.fields(&path, &route.fields);
            self.route(&path, &route.name, fields);
            if has_own_topics(fields) {
                self.own_topics(&path, &route.name, fields, &named, &mut own, i);
            }
            let group = group(&table.mesh, &route.name, fields.group.as_deref());
            if let Some(first) = groups.insert(group.clone(), i)
                && table.routes[first].name != route.name
            {
                let message = format!("the group `{group}` is also that of spec.routes[{first}]");
                let hint = "two routes with one group would take records from each other";
                self.fault(code::CONFLICT, &path.key("group"), message, hint);
            }
        }
    }

    /// The schemas of topics. They are bounded one by one and together.
    fn schemas(&mut self, table: &Table, resolved: &[RouteFields]) {
        let spec = Path::Root.key("spec");
        let (topics, routes) = (spec.key("topics"), spec.key("routes"));
        let mut total = 0;
        for (name, schema) in table.topics.iter().filter_map(|(name, topic)| Some((name, topic.schema.as_ref()?))) {
            let path = topics.key(name);
            let path = path.key("schema");
            let bytes = match schema {
                SchemaSpec::Json(value) => value.to_string().len(),
                SchemaSpec::Protobuf { descriptor, .. } => descriptor.len(),
            };
            total += bytes;
            if bytes > schema::MAX_BYTES {
                let message = format!("the schema has {bytes} bytes, more than {}", schema::MAX_BYTES);
                self.fault(code::LIMIT, &path, message, "leave out descriptions and examples, or what this topic does not need");
                continue;
            }
            if total > schema::MAX_TOTAL {
                let message = format!("all schemas up to here have {total} bytes, more than {}", schema::MAX_TOTAL);
                self.fault(code::LIMIT, &path, message, "a table travels as one record: use fewer or smaller schemas");
                return;
            }
            match Schema::compile(schema) {
                Ok(schema) => drop(self.schemas.insert(name.clone(), schema)),
                Err(refusal) => self.fault(code::SCHEMA, &path, refusal.message, &refusal.hint),
            }
        }
        if total == 0 {
            return;
        }
        for (i, (route, fields)) in table.routes.iter().zip(resolved).enumerate() {
            let dead_letter = crate::compile::dead_letter(&route.name, fields);
            if table.topics.get(&*dead_letter).is_some_and(|topic| topic.schema.is_some()) {
                let message = format!("`{dead_letter}` gets dead letters, and has a schema");
                let hint = "a topic of dead letters takes any record: leave its schema out, or name another topic";
                self.fault(code::CONFLICT, &routes.item(i).key("dead_letter"), message, hint);
            }
        }
    }

    /// Values as they are written, of a route or of the defaults.
    fn fields(&mut self, path: &Path<'_>, fields: &RouteFields) {
        let at = |field: &'static str| path.key(field);
        if let Some(fault) = fields.service.as_deref().and_then(name_fault) {
            self.fault(code::NAME, &at("service"), fault, "a service is named like `pricing`");
        }
        if let Some(from) = &fields.from {
            self.topics(&at("from"), from, "a route needs a source");
        }
        if let Some(to) = &fields.to {
            self.to(&at("to"), to);
        }
        if let Some(handler) = &fields.handler {
            self.handler(&at("handler"), handler);
        }
        if let Some(filter) = &fields.filter {
            self.source(&at("filter"), filter, Roots::Record);
        }
        for (i, case) in fields.cases.iter().flatten().enumerate() {
            let cases = at("cases");
            let path = cases.item(i);
            if case.status.is_none() && case.when.is_none() {
                let hint = "name a `status`, a `when`, or both";
                self.fault(code::MISSING, &path, "a case matches nothing", hint);
            }
            if let Some(status) = case.status {
                self.status(&path.key("status"), status);
            }
            if let Some(when) = &case.when {
                self.source(&path.key("when"), when, Roots::RecordAndReply);
            }
            self.to(&path.key("to"), &case.to);
        }
        for status in fields.ignore_status.iter().flatten() {
            self.status(&at("ignore_status"), *status);
        }
        if let Some(group) = &fields.group
            && (group.is_empty() || group.len() > 249 || group.chars().any(|c| c.is_control() || c.is_whitespace()))
        {
            let message = "a group has 1 to 249 characters and no spaces";
            self.fault(code::NAME, &at("group"), message, "");
        }
        if let Some(text) = &fields.content_type
            && (!text.contains('/') || !text.bytes().all(|b| (b' '..=b'~').contains(&b)))
        {
            let message = format!("`{text}` is no content type");
            self.fault(code::VALUE, &at("content_type"), message, "write one like application/json");
        }
        let bounds = match fields.concurrency {
            None => [None, None],
            Some(ConcurrencySpec::Fixed(calls)) => [Some(calls), None],
            Some(ConcurrencySpec::Adaptive { min, max }) => [min, max],
        };
        if bounds.into_iter().flatten().any(|n| n == 0 || n > MAX_CONCURRENCY) {
            let message = format!("concurrency goes from 1 to {MAX_CONCURRENCY}");
            self.fault(code::VALUE, &at("concurrency"), message, "");
        } else if matches!(fields.concurrency, Some(ConcurrencySpec::Adaptive { .. })) {
            let (min, max) = crate::compile::concurrency(fields.concurrency);
            if min.is_some_and(|min| min > max) {
                self.fault(code::CONFLICT, &at("concurrency"), "`min` is above `max`", "lower min, or raise max");
            }
        }
        if let Some(timeout) = fields.timeout {
            self.between(&at("timeout"), timeout, Duration::from_millis(1), DAY);
        }
        if let Some(topic) = &fields.dead_letter {
            self.topic_name(&at("dead_letter"), topic);
        }
        self.retry_and_breaker(path, fields);
        if let Some(batch) = &fields.batch {
            let path = at("batch");
            if batch.max.is_some_and(|n| n == 0 || n > MAX_BATCH) {
                let message = format!("a batch has 1 to {MAX_BATCH} records");
                self.fault(code::VALUE, &path.key("max"), message, "");
            }
            if let Some(wait) = batch.wait {
                self.between(&path.key("wait"), wait, Duration::ZERO, Duration::from_secs(60));
            }
        }
        if let Some(ForwardSpec::Only(names)) = &fields.forward_headers {
            let mut seen = HashSet::new();
            for (i, name) in names.iter().enumerate() {
                let list = at("forward_headers");
                let path = list.item(i);
                if name.is_empty() {
                    self.fault(code::NAME, &path, "a header name is empty", "");
                } else if !seen.insert(name) {
                    let message = format!("`{name}` occurs twice");
                    self.fault(code::DUPLICATE, &path, message, "remove one of the two");
                }
            }
        }
    }

    fn retry_and_breaker(&mut self, path: &Path<'_>, fields: &RouteFields) {
        if let Some(retry) = &fields.retry {
            let path = path.key("retry");
            if retry.attempts == Some(0) {
                let hint = "the first delivery is an attempt: 1 means no retry";
                self.fault(code::VALUE, &path.key("attempts"), "attempts are at least 1", hint);
            }
            if let Some(initial) = retry.initial {
                self.between(&path.key("initial"), initial, Duration::from_millis(1), DAY);
            }
            if let Some(max) = retry.max {
                self.between(&path.key("max"), max, Duration::from_millis(1), DAY);
            }
            let topics = retry.topics.as_deref().unwrap_or_default();
            if topics.len() > MAX_RETRY_TOPICS {
                let message = format!("more than {MAX_RETRY_TOPICS} retry topics");
                self.fault(code::LIMIT, &path.key("topics"), message, "fewer, with longer pauses");
            }
            for (i, pause) in topics.iter().enumerate() {
                self.between(&path.key("topics").item(i), *pause, Duration::from_millis(1), 30 * DAY);
            }
            if retry.multiplier.is_some_and(|m| !(1.0..=1000.0).contains(&m)) {
                let hint = "1 keeps the pause as it is";
                let message = "the multiplier goes from 1 to 1000";
                self.fault(code::VALUE, &path.key("multiplier"), message, hint);
            }
        }
        if let Some(breaker) = &fields.breaker {
            let path = path.key("breaker");
            if breaker.failures == Some(0) {
                self.fault(code::VALUE, &path.key("failures"), "failures are at least 1", "");
            }
            if let Some(open) = breaker.open {
                self.between(&path.key("open"), open, Duration::from_millis(1), DAY);
            }
        }
    }

    /// What must hold of a route as a whole, defaults folded in.
    fn route(&mut self, path: &Path<'_>, name: &str, fields: &RouteFields) {
        let at = |field: &'static str| path.key(field);
        if fields.service.is_none() {
            let hint = "name the service that gets the records";
            self.fault(code::MISSING, &at("service"), "`service` is missing", hint);
        }
        if fields.from.is_none() {
            let hint = "name the source topics, such as [orders]";
            self.fault(code::MISSING, &at("from"), "`from` is missing", hint);
        }
        if fields.to.is_none() {
            let hint = "name the destination topics, or `void` to forward nothing";
            self.fault(code::MISSING, &at("to"), "`to` is missing", hint);
        }
        let deliver = fields.deliver.unwrap_or(Deliver::Push);
        match (deliver, &fields.handler) {
            (Deliver::Push, None) => {
                let hint = "name the path at the service, such as /price";
                self.fault(code::MISSING, &at("handler"), "`handler` is missing", hint);
            }
            (Deliver::Stream | Deliver::Pull, Some(_)) => {
                let hint = "remove it, or write `deliver: push`";
                let message = "only a push route has a handler";
                self.fault(code::CONFLICT, &at("handler"), message, hint);
            }
            _ => {}
        }
        if matches!(fields.concurrency, Some(ConcurrencySpec::Adaptive { .. })) && deliver != Deliver::Push {
            let message = "only a push route finds its concurrency by measuring";
            let hint = "write a number: a service that fetches takes as much as it can do";
            self.fault(code::CONFLICT, &at("concurrency"), message, hint);
        }
        if fields.batch.is_some() && deliver != Deliver::Push {
            let message = "only a push route has batches";
            let hint = "remove it: a service that fetches says itself how many records it takes (`max` of a pull, credits of a stream)";
            self.fault(code::CONFLICT, &at("batch"), message, hint);
        }
        let retry = crate::compile::retry(fields);
        if retry.max < retry.initial {
            let message = "`retry.max` is shorter than `retry.initial`";
            self.fault(code::CONFLICT, &at("retry"), message, "raise max, or lower initial");
        }
        let from = fields.from.as_deref().unwrap_or_default();
        let dead_letter = crate::compile::dead_letter(name, fields);
        if fields.dead_letter.is_none() && name_fault(name).is_none() && topic_fault(&dead_letter).is_some() {
            let message = format!("`{dead_letter}` is no topic name");
            self.fault(code::NAME, &at("dead_letter"), message, "name a dead_letter topic");
        }
        if from.iter().any(|topic| *topic == dead_letter) {
            let message = format!("the dead letter topic `{dead_letter}` is a source of this route");
            let hint = "its failures would come back for ever; name another topic";
            self.fault(code::CONFLICT, &at("dead_letter"), message, hint);
        }
        self.endless(path, from, fields);
    }

    /// The retry and park topics of a route: topic names, and nobody else's.
    fn own_topics(
        &mut self,
        path: &Path<'_>,
        name: &str,
        fields: &RouteFields,
        named: &HashSet<Cow<'_, str>>,
        own: &mut HashMap<String, usize>,
        index: usize,
    ) {
        let path = path.key("retry");
        let (pauses, park) = crate::compile::retry_topics(fields);
        for source in fields.from.iter().flatten().collect::<BTreeSet<_>>() {
            let tiers = crate::compile::tiers(pauses, park);
            let topics = (1..=tiers).map(|tier| crate::compile::retry_topic(name, source, tier));
            let park = (tiers > 0).then(|| crate::compile::park_topic(name, source));
            for topic in topics.chain(park) {
                if topic_fault(&topic).is_some() {
                    if topic_fault(source).is_none() && name_fault(name).is_none() {
                        let message = format!("the retry topic `{topic}` is no topic name");
                        self.fault(code::NAME, &path, message, "shorten the name of the route or of the source");
                        return;
                    }
                } else if named.contains(topic.as_str()) {
                    let message = format!("the table names `{topic}`, which is a retry topic of this route");
                    self.fault(
                        code::CONFLICT,
                        &path,
                        message,
                        "rename the route or the topic: what lies in a retry topic is the route's alone",
                    );
                } else if let Some(first) = own.insert(topic.clone(), index)
                    && first != index
                {
                    let message = format!("`{topic}` is also a retry topic of spec.routes[{first}]");
                    self.fault(code::CONFLICT, &path, message, "rename one of the two routes");
                }
            }
        }
    }

    /// A route onto its own source ends only if something can stop an answer from going round.
    fn endless(&mut self, path: &Path<'_>, from: &[String], fields: &RouteFields) {
        let goes_round = |to: &To| match to {
            To::Void => false,
            To::Topics(topics) => topics.iter().any(|topic| from.contains(topic)),
        };
        let never_ignored = fields.ignore_status.as_ref().is_some_and(|s| s.is_empty());
        let no_way_out = fields.cases.as_ref().is_none_or(Vec::is_empty) && fields.filter.is_none();
        if fields.to.as_ref().is_some_and(goes_round) && never_ignored && no_way_out {
            let message = "the route feeds its own source and no answer can end it";
            let hint = "leave ignore_status at its default, or add a case or a filter";
            self.fault(code::ENDLESS, &path.key("to"), message, hint);
        }
    }

    // Values.

    fn source(&mut self, path: &Path<'_>, text: &str, roots: Roots) {
        let (path, text) = (path.text(), text.to_owned());
        self.sources.push(Source { path, text, roots });
    }

    fn status(&mut self, path: &Path<'_>, status: u16) {
        if !(100..=599).contains(&status) {
            let message = format!("{status} is no status");
            self.fault(code::VALUE, path, message, "a status goes from 100 to 599");
        }
    }

    fn between(&mut self, path: &Path<'_>, value: Duration, least: Duration, most: Duration) {
        use crate::value::print_duration as print;
        if value < least || value > most {
            let message = format!("{} is not between {} and {}", print(value), print(least), print(most));
            self.fault(code::VALUE, path, message, "");
        }
    }

    fn handler(&mut self, path: &Path<'_>, handler: &str) {
        let hint = "write a path such as /price; the address is in the sidecar's own configuration";
        if handler.contains("://") || handler.starts_with("//") || !handler.starts_with('/') {
            let message = format!("`{handler}` is not a path");
            self.fault(code::VALUE, path, message, hint);
        } else if handler.len() > 1024 || !handler.bytes().all(is_path_byte) {
            let message = "a handler is a path of up to 1024 characters that a URL may have";
            self.fault(code::VALUE, path, message, "percent-encode other characters; no `#`");
        }
    }

    fn to(&mut self, path: &Path<'_>, to: &To) {
        if let To::Topics(topics) = to {
            self.topics(path, topics, "write `void` to forward nothing");
        }
    }

    fn topics(&mut self, path: &Path<'_>, topics: &[String], when_empty: &str) {
        if topics.is_empty() {
            self.fault(code::VALUE, path, "the list of topics is empty", when_empty);
        }
        if topics.len() > MAX_TARGETS {
            let message = format!("more than {MAX_TARGETS} topics");
            self.fault(code::LIMIT, path, message, "");
        }
        let mut seen = HashSet::new();
        for (i, topic) in topics.iter().enumerate() {
            let path = path.item(i);
            self.topic_name(&path, topic);
            if topics.len() > 1 && !seen.insert(topic) {
                let message = format!("`{topic}` occurs twice");
                self.fault(code::DUPLICATE, &path, message, "remove one of the two");
            }
        }
    }

    fn topic_name(&mut self, path: &Path<'_>, name: &str) {
        if name == "void" {
            let hint = "`void` stands alone, as `to: void`; it is no topic";
            self.fault(code::NAME, path, "`void` is not a topic", hint);
        } else if let Some(fault) = topic_fault(name) {
            let short: String = name.chars().take(60).collect();
            self.fault(code::NAME, path, fault, &format!("found `{short}`"));
        } else if name.starts_with("__") {
            let message = format!("`{name}` begins with `__`");
            self.fault(code::NAME, path, message, "such topics belong to the broker and the mesh");
        }
    }
}

/// Whether a route has retry or park topics.
fn has_own_topics(fields: &RouteFields) -> bool {
    let (pauses, park) = crate::compile::retry_topics(fields);
    crate::compile::tiers(pauses, park) > 0
}

/// All topics that a table names, dead letter topics included.
fn named_topics<'t>(table: &'t Table, resolved: &'t [RouteFields]) -> HashSet<Cow<'t, str>> {
    let mut named: HashSet<Cow<'t, str>> = table.topics.keys().map(|name| name.as_str().into()).collect();
    for (route, fields) in table.routes.iter().zip(resolved) {
        named.insert(crate::compile::dead_letter(&route.name, fields));
        named.extend(fields.from.iter().flatten().map(|topic| topic.as_str().into()));
        let cases = fields.cases.iter().flatten().map(|case| &case.to);
        for to in fields.to.iter().chain(cases) {
            if let To::Topics(topics) = to {
                named.extend(topics.iter().map(|topic| topic.as_str().into()));
            }
        }
    }
    named
}

fn is_path_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@%/?".contains(&byte)
}
