//! A table, compiled: defaults folded in, expressions compiled, indexed by topic, name and
//! service.
//!
//! Invariant: a compiled table has no faults, and looking a route up costs nothing for the routes
//! that do not match.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::check::{Checked, check};
use crate::expression::{Expression, ExpressionError};
use crate::fault::Faults;
use crate::record::{RecordView, ReplyView};
use crate::schema::{Mismatch, Schema};
use crate::table::{
    ConcurrencySpec, Deliver, ForwardSpec, Guarantee, OnExhausted, OnGap, Order, RetrySpec, RouteFields, Start, Table, To, TopicSpec, group,
};

/// A table, ready to be asked.
#[derive(Debug)]
pub struct CompiledTable {
    /// The name of the mesh.
    pub mesh: Arc<str>,
    /// The digest of the table, as [`Table::digest`].
    pub digest: Arc<str>,
    /// All topics that the table declares, and those of its routes, sorted by name.
    pub topics: Vec<Topic>,
    /// The routes, in the order of the table; of a part (see [`load_part`](crate::load_part)), its own.
    pub routes: Vec<Arc<Route>>,
    schemas: HashMap<Arc<str>, Schema>,
    by_name: HashMap<Arc<str>, usize>,
    by_topic: HashMap<Arc<str>, Vec<Arc<Route>>>,
    by_service: HashMap<Arc<str>, Vec<Arc<Route>>>,
    /// Whose the consumer groups are, of all routes, if some were left out.
    pub(crate) elsewhere: Option<Groups>,
}

/// The routes of consumer groups, read when somebody asks.
type Groups = LazyLock<HashMap<Box<str>, Box<str>>, Box<dyn FnOnce() -> HashMap<Box<str>, Box<str>> + Send>>;

/// A topic that a table names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// The name.
    pub name: Arc<str>,
    /// What the table declares; all absent when it declares nothing.
    pub spec: TopicSpec,
    /// Whether the table declares it under `topics`.
    pub declared: bool,
    /// For a dead letter topic: the source topics of its routes. Where `spec` names no count, it
    /// gets the largest partition count among them.
    pub dead_letter_of: Vec<Arc<str>>,
    /// For a retry or park topic of a route: the source topic. It has the same partition count.
    pub follows: Option<Arc<str>>,
    /// For a retry topic: how long records wait in it, as the table has it now. A park topic has none.
    pub pause: Option<Duration>,
}

/// A route, ready to run.
///
/// Two routes are equal when they behave the same, so that a swap of tables can leave the running one alone.
#[derive(Debug, PartialEq)]
pub struct Route {
    /// The name, unique in the table.
    pub name: Arc<str>,
    /// The service that it belongs to.
    pub service: Arc<str>,
    /// The source topics.
    pub from: Vec<Arc<str>>,
    /// How a record reaches the service.
    pub deliver: Deliver,
    /// The path at the service; only for [`Deliver::Push`].
    pub handler: Option<String>,
    /// Where a good answer goes when no case matches.
    pub to: Destinations,
    /// Answers that go elsewhere; the first that matches counts.
    pub cases: Vec<Case>,
    /// Which records are delivered; all when absent.
    pub filter: Option<Expression>,
    /// Statuses of answers that forward nothing, sorted.
    pub ignore_status: Vec<u16>,
    /// Where a group with no offset yet begins.
    pub start: Start,
    /// The consumer group.
    pub group: Arc<str>,
    /// What is kept in order.
    pub order: Order,
    /// The content type of a record that names none.
    pub content_type: Option<Arc<str>>,
    /// How many calls may be at the service at once, at most.
    pub concurrency: usize,
    /// The least that is found by measuring, up to `concurrency`; fixed when absent.
    pub adaptive: Option<usize>,
    /// How long one delivery may take.
    pub timeout: Duration,
    /// How failed deliveries are repeated.
    pub retry: Retry,
    /// After the attempts in place: how long a record waits in each retry topic before a further one.
    pub retry_topics: Vec<Duration>,
    /// What becomes of a record whose attempts are used up.
    pub on_exhausted: OnExhausted,
    /// The topic of what cannot be processed.
    pub dead_letter: Arc<str>,
    /// When to stop calling a service that fails.
    pub breaker: Breaker,
    /// Which of the source's headers its replies carry.
    pub forward_headers: ForwardHeaders,
    /// What happens when the broker deleted records before they were processed.
    pub on_gap: OnGap,
    /// Whether a delivery carries many records; one when absent.
    pub batch: Option<Batch>,
    /// What is promised of a record.
    pub guarantee: Guarantee,
    /// The most hops a record may have made; 0 is no limit.
    pub max_hops: u32,
    /// The schemas of its destinations that have one.
    schemas: Vec<(Arc<str>, Schema)>,
}

impl Route {
    /// Every topic that an answer may go to; one may come several times.
    fn destinations(&self) -> impl Iterator<Item = &Arc<str>> {
        let all = std::iter::once(&self.to).chain(self.cases.iter().map(|case| &case.to));
        all.flat_map(|destinations| match destinations {
            Destinations::Void => [].iter(),
            Destinations::Topics(topics) => topics.iter(),
        })
    }

    /// Every topic that the route reads or writes; one may come several times.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<str>> {
        self.from.iter().chain(self.destinations()).chain(std::iter::once(&self.dead_letter))
    }

    /// Checks the values of an answer against the schemas of the topics that it goes to. A null value passes. Costs nothing for topics
    /// without a schema.
    ///
    /// # Errors
    /// The first fault, with the topic and the number of the value, from 0.
    pub fn check_values<'v>(
        &self,
        topics: &[Arc<str>],
        values: impl Iterator<Item = Option<&'v [u8]>> + Clone,
    ) -> Result<(), (Arc<str>, usize, Mismatch)> {
        for (topic, schema) in self.schemas.iter().filter(|(topic, _)| topics.contains(topic)) {
            for (index, value) in values.clone().enumerate() {
                if let Some(Err(mismatch)) = value.map(|value| schema.check(value)) {
                    return Err((topic.clone(), index, mismatch));
                }
            }
        }
        Ok(())
    }
}

/// Where an answer goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destinations {
    /// Nowhere.
    Void,
    /// To these topics.
    Topics(Arc<[Arc<str>]>),
}

/// An answer that goes elsewhere.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// The status it must have; any when absent.
    pub status: Option<u16>,
    /// What must hold of record and reply; nothing when absent.
    pub when: Option<Expression>,
    /// Where it goes.
    pub to: Destinations,
}

/// How failed deliveries are repeated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retry {
    /// How many attempts there are, the first included; at least 1.
    pub attempts: u32,
    /// The first pause.
    pub initial: Duration,
    /// The longest pause.
    pub max: Duration,
    /// By how much each pause is longer than the one before; at least 1.
    pub multiplier: f64,
}

impl Retry {
    /// The pause after the given number of failed attempts (1 is the first), without jitter.
    pub fn pause(&self, failed: u32) -> Duration {
        let exponent = i32::try_from(failed.saturating_sub(1)).unwrap_or(i32::MAX);
        let seconds = self.initial.as_secs_f64() * self.multiplier.powi(exponent);
        Duration::try_from_secs_f64(seconds).map_or(self.max, |pause| pause.min(self.max))
    }
}

/// When to stop calling a service that fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breaker {
    /// How many failures in a row open it.
    pub failures: u32,
    /// How long it stays open.
    pub open: Duration,
}

/// How many records a delivery carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// At most so many; at least 1.
    pub max: usize,
    /// How long an incomplete batch waits for more.
    pub wait: Duration,
}

/// Which of the source's headers its replies carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForwardHeaders {
    /// All of the source's own headers.
    All,
    /// None of them.
    None,
    /// Those of these names.
    Only(Vec<Arc<str>>),
}

/// What an answer means for a route.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decision<'a> {
    /// Its status says: forward nothing.
    Ignored,
    /// `to` says where it goes.
    Forward(&'a Destinations),
    /// A case says where it goes, be it empty or not.
    Case(&'a Destinations),
    /// Its status is neither good nor named by a case.
    NotAccepted,
}

impl Route {
    /// Whether a record is delivered at all; true when there is no filter.
    ///
    /// # Errors
    ///
    /// When the filter fails on this record.
    pub fn admits(&self, record: &RecordView<'_>) -> Result<bool, ExpressionError> {
        match &self.filter {
            Some(filter) => filter.evaluate(record, None),
            None => Ok(true),
        }
    }

    /// How many retry topics the route has for each source: those of its pauses, and one for what is released from a park topic.
    pub fn tiers(&self) -> usize {
        tiers(&self.retry_topics, self.on_exhausted == OnExhausted::Park)
    }

    /// The retry topic of a source, from 1.
    pub fn retry_topic(&self, source: &str, tier: usize) -> String {
        retry_topic(&self.name, source, tier)
    }

    /// The park topic of a source: what waits in order behind a record in a retry topic, and what `on_exhausted: park` keeps.
    pub fn park_topic(&self, source: &str) -> String {
        park_topic(&self.name, source)
    }

    /// What an answer means: `ignore_status` first, then the first case that matches, then `to`
    /// for a 2xx.
    ///
    /// A case that neither names a status nor asks for `reply.status` is about good answers (2xx):
    /// an error page is never forwarded by accident, and never fails an expression.
    ///
    /// # Errors
    ///
    /// When a `when` that has to be asked fails on this record or this reply.
    pub fn decide(&self, record: &RecordView<'_>, reply: &ReplyView<'_>) -> Result<Decision<'_>, ExpressionError> {
        if self.ignore_status.binary_search(&reply.status).is_ok() {
            return Ok(Decision::Ignored);
        }
        let good = (200..300).contains(&reply.status);
        for case in &self.cases {
            let asked = match (case.status, &case.when) {
                (Some(status), _) => status == reply.status,
                (None, Some(when)) => good || when.asks_for_status(),
                (None, None) => good,
            };
            if !asked {
                continue;
            }
            let matches = match &case.when {
                // An empty answer is no fault of the record: it has not what is asked for.
                Some(when) if reply.body.is_none() && when.asks_for_body() => false,
                Some(when) => when.evaluate(record, Some(reply))?,
                None => true,
            };
            if matches {
                return Ok(Decision::Case(&case.to));
            }
        }
        Ok(if good { Decision::Forward(&self.to) } else { Decision::NotAccepted })
    }

    /// Where an answer with a body that is accepted may go, before there is one: as [`Route::decide`] would say, as far as the record alone tells.
    ///
    /// # Errors
    ///
    /// When a `when` that is asked of every good answer fails on this record.
    pub fn foresee(&self, record: &RecordView<'_>) -> Result<Foreseen<'_>, ExpressionError> {
        let mut foreseen = Foreseen { destinations: Vec::new(), by_reply: false };
        for case in &self.cases {
            let holds = match &case.when {
                Some(when) if when.asks_for_reply() => None,
                Some(when) => match when.evaluate(record, None) {
                    Ok(false) => continue,
                    Ok(true) => Some(true),
                    // Asked only of answers with the case's status.
                    Err(_) if case.status.is_some() => None,
                    Err(error) => return Err(error),
                },
                None => Some(true),
            };
            foreseen.add(&case.to);
            match (case.status, holds) {
                (None, Some(_)) => return Ok(foreseen),
                _ => foreseen.by_reply = true,
            }
        }
        foreseen.add(&self.to);
        Ok(foreseen)
    }
}

/// Where an answer may go, before there is one.
#[derive(Debug, Clone, PartialEq)]
pub struct Foreseen<'a> {
    /// Where, each once, in the order in which they are asked.
    pub destinations: Vec<&'a Destinations>,
    /// Whether the answer itself is asked which of them it is.
    pub by_reply: bool,
}

impl<'a> Foreseen<'a> {
    fn add(&mut self, destinations: &'a Destinations) {
        if !self.destinations.contains(&destinations) {
            self.destinations.push(destinations);
        }
    }
}

impl CompiledTable {
    /// The route of a name.
    pub fn route(&self, name: &str) -> Option<&Arc<Route>> {
        self.routes.get(*self.by_name.get(name)?)
    }

    /// The routes that read a topic.
    pub fn routes_from(&self, topic: &str) -> &[Arc<Route>] {
        self.by_topic.get(topic).map_or(&[], Vec::as_slice)
    }

    /// The routes of a service.
    pub fn routes_of(&self, service: &str) -> &[Arc<Route>] {
        self.by_service.get(service).map_or(&[], Vec::as_slice)
    }

    /// Whether all routes of the table are here.
    pub fn is_whole(&self) -> bool {
        self.elsewhere.is_none()
    }

    /// The name of the route that has a consumer group, be it here or left out. Of a part it reads the names of all routes when it is asked for the
    /// first time: some milliseconds for ten thousand.
    pub fn route_of_group(&self, group: &str) -> Option<&str> {
        let here = self.routes.iter().find(|route| *route.group == *group).map(|route| &*route.name);
        here.or_else(|| self.elsewhere.as_ref()?.get(group).map(|name| &**name))
    }

    /// All topics that the table names, sorted by name: declared ones, sources, destinations, and
    /// dead letter topics.
    pub fn topic_names(&self) -> &[Topic] {
        &self.topics
    }

    /// The schema of a topic, if it has one.
    pub fn schema(&self, topic: &str) -> Option<&Schema> {
        // Most tables have none.
        if self.schemas.is_empty() { None } else { self.schemas.get(topic) }
    }

    /// A topic by its name.
    pub fn topic(&self, name: &str) -> Option<&Topic> {
        let found = self.topics.binary_search_by(|topic| topic.name.as_ref().cmp(name));
        self.topics.get(found.ok()?)
    }
}

/// Compiles a table.
///
/// # Errors
///
/// All its faults, without places; a table that [`parse`](crate::parse) returned has none.
pub fn compile(table: &Table) -> Result<CompiledTable, Faults> {
    let mut checked = check(table);
    let faults = std::mem::take(&mut checked.faults);
    if faults.is_empty() { Ok(compile_checked(table, checked, table.digest())) } else { Err(Faults(faults)) }
}

/// Compiles a table that has no faults, and whose digest is known.
pub(crate) fn compile_checked(table: &Table, checked: Checked, digest: String) -> CompiledTable {
    let Checked { expressions, schemas, fields: resolved, .. } = checked;
    let mut names = Names::default();
    let mut out = CompiledTable {
        mesh: Arc::from(table.mesh.as_str()),
        digest: Arc::from(digest),
        topics: Vec::new(),
        routes: Vec::with_capacity(table.routes.len()),
        schemas: schemas.into_iter().map(|(name, schema)| (names.get(&name), schema)).collect(),
        by_name: HashMap::with_capacity(table.routes.len()),
        by_topic: HashMap::new(),
        by_service: HashMap::new(),
        elsewhere: None,
    };
    for (i, (spec, fields)) in table.routes.iter().zip(resolved).enumerate() {
        // An expression of the route itself, or of the defaults when it has none.
        let place = |own: bool, field: &str| match own {
            true => format!("spec.routes[{i}].{field}"),
            false => format!("spec.defaults.{field}"),
        };
        let own_cases = spec.fields.cases.is_some();
        let filter = fields.filter.as_ref().and_then(|_| expressions.get(&place(spec.fields.filter.is_some(), "filter")));
        let cases = fields.cases.iter().flatten().enumerate().map(|(c, case)| Case {
            status: case.status,
            when: case.when.as_ref().and_then(|_| expressions.get(&place(own_cases, &format!("cases[{c}].when"))).cloned()),
            to: names.destinations(&case.to),
        });
        let cases = cases.collect();
        let mut route = route(&table.mesh, &spec.name, &fields, filter.cloned(), cases, &mut names);
        if !out.schemas.is_empty() {
            let topics: BTreeSet<&Arc<str>> = route.destinations().collect();
            route.schemas =
                topics.into_iter().filter_map(|topic| out.schemas.get_key_value(topic)).map(|(t, s)| (t.clone(), s.clone())).collect();
        }
        let route = Arc::new(route);
        out.by_name.insert(Arc::clone(&route.name), i);
        for topic in &route.from {
            out.by_topic.entry(Arc::clone(topic)).or_default().push(Arc::clone(&route));
        }
        let service = Arc::clone(&route.service);
        out.by_service.entry(service).or_default().push(Arc::clone(&route));
        out.routes.push(route);
    }
    out.topics = topics(table, &out.routes, &mut names);
    out
}

fn route(mesh: &str, name: &str, fields: &RouteFields, filter: Option<Expression>, cases: Vec<Case>, names: &mut Names) -> Route {
    let breaker = fields.breaker.clone().unwrap_or_default();
    let ignored = |set: &BTreeSet<u16>| set.iter().copied().collect();
    let from = fields.from.as_deref().unwrap_or_default();
    let (adaptive, concurrency) = concurrency(fields.concurrency);
    Route {
        name: Arc::from(name),
        service: names.get(fields.service.as_deref().unwrap_or_default()),
        from: from.iter().map(|topic| names.get(topic)).collect(),
        deliver: fields.deliver.unwrap_or(Deliver::Push),
        handler: fields.handler.clone(),
        to: names.destinations(fields.to.as_ref().unwrap_or(&To::Void)),
        cases,
        filter,
        ignore_status: fields.ignore_status.as_ref().map_or_else(|| vec![204, 205, 304], ignored),
        start: fields.start.unwrap_or(Start::Earliest),
        group: Arc::from(group(mesh, name, fields.group.as_deref())),
        order: fields.order.unwrap_or(Order::Key),
        content_type: fields.content_type.as_deref().map(Arc::from),
        concurrency,
        adaptive,
        timeout: fields.timeout.unwrap_or(Duration::from_secs(10)),
        retry: retry(fields),
        retry_topics: retry_topics(fields).0.to_vec(),
        on_exhausted: fields.on_exhausted.unwrap_or(OnExhausted::DeadLetter),
        dead_letter: names.get(&dead_letter(name, fields)),
        breaker: Breaker { failures: breaker.failures.unwrap_or(20), open: breaker.open.unwrap_or(Duration::from_secs(10)) },
        forward_headers: match &fields.forward_headers {
            None | Some(ForwardSpec::All) => ForwardHeaders::All,
            Some(ForwardSpec::None) => ForwardHeaders::None,
            Some(ForwardSpec::Only(list)) => ForwardHeaders::Only(list.iter().map(|name| names.get(name)).collect()),
        },
        on_gap: fields.on_gap.unwrap_or(OnGap::Earliest),
        batch: fields.batch.as_ref().map(|batch| Batch {
            max: batch.max.map_or(100, |n| usize::try_from(n).unwrap_or(usize::MAX)),
            wait: batch.wait.unwrap_or(Duration::from_millis(5)),
        }),
        guarantee: fields.guarantee.unwrap_or(Guarantee::AtLeastOnce),
        max_hops: fields.max_hops.unwrap_or(1000),
        schemas: Vec::new(),
    }
}

/// The least concurrency if it is adaptive, and the largest.
pub(crate) fn concurrency(spec: Option<ConcurrencySpec>) -> (Option<usize>, usize) {
    let calls = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    match spec {
        None => (None, 64),
        Some(ConcurrencySpec::Fixed(n)) => (None, calls(n)),
        // A default never contradicts what is written: it gives way.
        Some(ConcurrencySpec::Adaptive { min, max }) => {
            let least = min.map_or(1, calls);
            (Some(least), max.map_or(least.max(1000), calls))
        }
    }
}

/// The retries of a route, defaults filled in.
pub(crate) fn retry(fields: &RouteFields) -> Retry {
    let none = RetrySpec::default();
    let retry = fields.retry.as_ref().unwrap_or(&none);
    // A default never contradicts what is written: it gives way.
    let initial = match (retry.initial, retry.max) {
        (Some(initial), _) => initial,
        (None, Some(max)) => max.min(Duration::from_millis(100)),
        (None, None) => Duration::from_millis(100),
    };
    Retry {
        attempts: retry.attempts.unwrap_or(10),
        initial,
        max: retry.max.unwrap_or(initial.max(Duration::from_secs(30))),
        multiplier: retry.multiplier.unwrap_or(2.0),
    }
}

/// The pauses of a route's retry topics, and whether what is exhausted is parked.
pub(crate) fn retry_topics(fields: &RouteFields) -> (&[Duration], bool) {
    let pauses = fields.retry.as_ref().and_then(|retry| retry.topics.as_deref()).unwrap_or_default();
    (pauses, fields.on_exhausted == Some(OnExhausted::Park))
}

pub(crate) fn tiers(pauses: &[Duration], park: bool) -> usize {
    pauses.len().max(usize::from(park))
}

pub(crate) fn retry_topic(route: &str, source: &str, tier: usize) -> String {
    format!("{route}.{source}.retry-{tier}")
}

pub(crate) fn park_topic(route: &str, source: &str) -> String {
    format!("{route}.{source}.park")
}

/// The dead letter topic of a route.
pub fn dead_letter<'f>(name: &str, fields: &'f RouteFields) -> Cow<'f, str> {
    fields.dead_letter.as_deref().map_or_else(|| Cow::Owned(format!("{name}.dlq")), Cow::Borrowed)
}

/// One copy of each name.
#[derive(Default)]
struct Names(HashSet<Arc<str>>);

impl Names {
    fn get(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.0.get(name) {
            return Arc::clone(known);
        }
        let name: Arc<str> = Arc::from(name);
        self.0.insert(Arc::clone(&name));
        name
    }

    fn destinations(&mut self, to: &To) -> Destinations {
        match to {
            To::Void => Destinations::Void,
            To::Topics(topics) => Destinations::Topics(topics.iter().map(|topic| self.get(topic)).collect()),
        }
    }
}

fn topics(table: &Table, routes: &[Arc<Route>], names: &mut Names) -> Vec<Topic> {
    let mut all: HashMap<Arc<str>, BTreeSet<Arc<str>>> = HashMap::with_capacity(routes.len());
    for name in table.topics.keys() {
        all.entry(names.get(name)).or_default();
    }
    for route in routes {
        let to = std::iter::once(&route.to).chain(route.cases.iter().map(|case| &case.to));
        for destinations in to {
            if let Destinations::Topics(topics) = destinations {
                for topic in topics.iter() {
                    all.entry(Arc::clone(topic)).or_default();
                }
            }
        }
        for topic in &route.from {
            all.entry(Arc::clone(topic)).or_default();
        }
        let sources = all.entry(Arc::clone(&route.dead_letter)).or_default();
        sources.extend(route.from.iter().cloned());
    }
    let mut topics: Vec<Topic> = all
        .into_iter()
        .map(|(name, sources)| Topic {
            spec: table.topics.get(name.as_ref()).cloned().unwrap_or_default(),
            declared: table.topics.contains_key(name.as_ref()),
            dead_letter_of: sources.into_iter().collect(),
            follows: None,
            pause: None,
            name,
        })
        .collect();
    for route in routes {
        for source in route.from.iter().collect::<BTreeSet<_>>() {
            let follower = |name: String, pause| Topic {
                name: Arc::from(name),
                spec: TopicSpec { partitions: None, schema: None, ..table.topics.get(source.as_ref()).cloned().unwrap_or_default() },
                declared: false,
                dead_letter_of: Vec::new(),
                follows: Some(Arc::clone(source)),
                pause,
            };
            let tiers = route.tiers();
            for tier in 1..=tiers {
                let pause = route.retry_topics.get(tier - 1).copied().unwrap_or_default();
                topics.push(follower(route.retry_topic(source, tier), Some(pause)));
            }
            if tiers > 0 {
                topics.push(follower(route.park_topic(source), None));
            }
        }
    }
    topics.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    topics
}
