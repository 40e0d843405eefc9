//! A record as part of a flow: what it says of its making, and what the routes that read it do with it.
//!
//! Invariant: what the records do not tell is not guessed: then the disposition is `done`, and the note says why.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mesh_proto::v1::{self, FlowKind, FlowProgress};
use mesh_routing::{CompiledTable, Destinations, Route};

use super::super::{letters::Letter, reset::OperationError};
use crate::{
    broker::{Admin, Commit},
    completed,
    deliver::grpc,
    judge::{self, Intake},
    record::{Cause, Position, Record, TopicPartition, header, hops, mesh_id, shorten},
    telemetry::trace::TraceContext,
    tiers::{self, Kind},
};

/// How many groups the broker is asked about at once.
const QUESTIONS: usize = 16;
/// What is told of a key, an id or a text, in bytes.
const LONGEST: usize = 1_024;

/// A position from its message.
pub(super) fn position(at: &v1::Position) -> Position {
    Position { partition: TopicPartition::new(at.topic.as_str(), at.partition), offset: at.offset }
}

/// The trace that a record belongs to.
pub(super) fn trace_of(record: &Record) -> Option<TraceContext> {
    TraceContext::parse(record.header(header::TRACEPARENT)?, None)
}

/// Where the record lies of which this one was made; `None` if it was published.
pub(super) fn source_of(record: &Record, at: &Position) -> Option<Position> {
    made(record, at).source.as_ref().map(position)
}

/// The route and the kind of a retry or park topic, given the source of one of its records.
fn side(topic: &str, source: &str) -> Option<(String, Kind)> {
    let (rest, _) = topic.rsplit_once('.')?;
    let route = rest.strip_suffix(source)?.strip_suffix('.')?;
    Some((route.to_owned(), tiers::kind(route, source, topic)?))
}

/// What a record says of its making: the fields of a [`v1::FlowRecord`] that follow from that.
fn made(record: &Record, at: &Position) -> v1::FlowRecord {
    let letter = Letter::read(record);
    if !letter.writer.is_empty() {
        let source = letter.partition.zip(letter.offset).filter(|_| !letter.topic.is_empty());
        return v1::FlowRecord {
            kind: FlowKind::DeadLetter.into(),
            route: letter.route,
            source: source.map(|(partition, offset)| v1::Position { topic: letter.topic, partition, offset }),
            attempts: letter.attempts,
            reason: letter.reason,
            detail: letter.detail,
            ..v1::FlowRecord::default()
        };
    }
    if record.header(header::MESH_ORIGIN).is_some() {
        let stored = tiers::read(record.clone(), at);
        if let Some((route, kind)) = side(&at.partition.topic, &stored.origin.partition.topic) {
            return v1::FlowRecord {
                kind: if kind == Kind::Park { FlowKind::Parked } else { FlowKind::Retry }.into(),
                route,
                source: Some(grpc::position(&stored.origin)),
                attempts: stored.attempts,
                detail: record.header_str(header::MESH_PARKED).unwrap_or_default().to_owned(),
                due_ms: stored.due_ms.unwrap_or_default(),
                ..v1::FlowRecord::default()
            };
        }
    }
    // A copy of a copy names both: the newer stands last.
    let copied = record.headers.iter().rev().find_map(|copied| {
        let kind = match &*copied.name {
            header::MESH_REDRIVEN => FlowKind::Redriven,
            header::MESH_REPLAYED => FlowKind::Replayed,
            _ => return None,
        };
        let source = Position::parse(std::str::from_utf8(copied.value.as_deref()?).ok()?)?;
        Some(v1::FlowRecord { kind: kind.into(), source: Some(grpc::position(&source)), ..v1::FlowRecord::default() })
    });
    if let Some(copied) = copied {
        return copied;
    }
    match Cause::of(record) {
        Some(cause) => v1::FlowRecord {
            kind: FlowKind::Reply.into(),
            route: cause.route,
            source: Some(grpc::position(&cause.source)),
            index: cause.index,
            ..v1::FlowRecord::default()
        },
        None => v1::FlowRecord { kind: FlowKind::Published.into(), ..v1::FlowRecord::default() },
    }
}

/// A copy of the beginning of a key.
pub(super) fn short(key: &[u8]) -> Bytes {
    Bytes::copy_from_slice(key.get(..LONGEST).unwrap_or(key))
}

/// A record of a flow, without what the routes do with it. It holds no memory of the record, and no more of its texts than is told of it.
fn flow_record(record: &Record, at: &Position) -> v1::FlowRecord {
    let made = made(record, at);
    v1::FlowRecord {
        position: Some(grpc::position(at)),
        timestamp_ms: record.timestamp_ms.unwrap_or_default(),
        mesh_id: shorten(&String::from_utf8_lossy(&mesh_id(record, at)), LONGEST),
        trace_id: trace_of(record).map(|context| context.trace_id_text()).unwrap_or_default(),
        hops: hops(record),
        key: record.key.as_deref().map(short),
        route: shorten(&made.route, LONGEST),
        reason: shorten(&made.reason, LONGEST),
        detail: shorten(&made.detail, LONGEST),
        ..made
    }
}

/// What becomes of a record on a route before its service is called, in a word, and why.
fn verdict(route: &Route, record: &Record, at: &Position) -> (&'static str, String) {
    let filter = route.filter.as_ref().map(|filter| filter.source());
    match judge::intake(route, record, &at.partition, at.offset, hops(record)) {
        Intake::Deliver => ("delivered", filter.map_or_else(|| "no filter".to_owned(), |filter| format!("filter `{filter}` is true"))),
        Intake::Filtered => ("filtered", format!("filter `{}` is false", filter.unwrap_or_default())),
        Intake::OtherRoute => {
            let only = record.header_str(header::MESH_ONLY_ROUTE).unwrap_or_default();
            ("other_route", format!("{} is {only}", header::MESH_ONLY_ROUTE))
        }
        Intake::DeadLetter { reason, detail } => ("dead_letter", format!("{}: {detail}", reason.as_str())),
    }
}

/// How far a group is with an offset.
fn progress(commit: Option<&Commit>, offset: i64) -> FlowProgress {
    let Some(commit) = commit else { return FlowProgress::Pending };
    if offset < commit.offset {
        return FlowProgress::Done;
    }
    let done = completed::decode(commit.offset, &commit.metadata).unwrap_or_default();
    match done.last() {
        _ if done.iter().any(|range| range.contains(&offset)) => FlowProgress::Done,
        Some(last) if last.start > offset => FlowProgress::Waiting,
        _ => FlowProgress::Pending,
    }
}

/// A record of a flow, and what its routes do with it before the call.
pub(super) struct Node {
    pub(super) at: Position,
    pub(super) flow: v1::FlowRecord,
    verdicts: Vec<(Arc<Route>, &'static str, String)>,
}

impl Node {
    /// A record with what the routes of a table do with it. `None` as a table: what they do is not asked.
    pub(super) fn new(record: &Record, at: &Position, table: Option<&CompiledTable>) -> Self {
        let routes = table.map_or(&[][..], |table| table.routes_from(&at.partition.topic));
        let verdicts = routes.iter().map(|route| {
            let (word, detail) = verdict(route, record, at);
            (route.clone(), word, detail)
        });
        Self { at: at.clone(), flow: flow_record(record, at), verdicts: verdicts.collect() }
    }

    fn is_aside(&self) -> bool {
        matches!(self.flow.kind(), FlowKind::Retry | FlowKind::Parked)
    }
}

/// Adds to records of a flow how far their routes are with them, and what became of them, as far as all of them together tell.
pub(super) async fn annotate(admin: &dyn Admin, table: &CompiledTable, nodes: &mut [Node]) -> Result<(), OperationError> {
    let mut asked: BTreeMap<Arc<str>, BTreeSet<TopicPartition>> = BTreeMap::new();
    for node in nodes.iter() {
        for (route, ..) in &node.verdicts {
            asked.entry(route.group.clone()).or_default().insert(node.at.partition.clone());
        }
        if let Some(route) = table.route(&node.flow.route).filter(|_| node.is_aside()) {
            asked.entry(route.group.clone()).or_default().insert(node.at.partition.clone());
        }
    }
    let answers = stream::iter(asked).map(|(group, partitions)| async move {
        let partitions: Vec<TopicPartition> = partitions.into_iter().collect();
        let committed = admin.committed(&group, partitions).await?;
        Ok::<_, OperationError>((group, committed))
    });
    let mut commits: HashMap<(Arc<str>, TopicPartition), Commit> = HashMap::new();
    let answers: Vec<(Arc<str>, Vec<Option<Commit>>)> = answers.buffered(QUESTIONS).try_collect().await?;
    for (group, committed) in answers {
        commits.extend(committed.into_iter().flatten().map(|commit| ((group.clone(), commit.partition.clone()), commit)));
    }
    tell(table, nodes, &commits);
    Ok(())
}

fn tell(table: &CompiledTable, nodes: &mut [Node], commits: &HashMap<(Arc<str>, TopicPartition), Commit>) {
    let commit = |route: &Route, at: &Position| commits.get(&(route.group.clone(), at.partition.clone()));
    for node in nodes.iter_mut().filter(|node| node.is_aside()) {
        if let Some(route) = table.route(&node.flow.route) {
            node.flow.progress = progress(commit(route, &node.at), node.at.offset).into();
        }
    }
    let mut made_of: HashMap<Position, Vec<v1::FlowRecord>> = HashMap::new();
    for node in nodes.iter() {
        if let Some(source) = &node.flow.source {
            made_of.entry(position(source)).or_default().push(node.flow.clone());
        }
    }
    for node in nodes.iter_mut() {
        let made = made_of.get(&node.at).map_or(&[][..], Vec::as_slice);
        let Node { at, flow, verdicts } = node;
        flow.routes = verdicts
            .drain(..)
            .map(|(route, verdict, detail)| {
                let commit = commit(&route, at);
                let progress = progress(commit, at.offset);
                let of: Vec<&v1::FlowRecord> = made.iter().filter(|made| *made.route == *route.name).collect();
                let (disposition, note) = disposition(&route, verdict, progress, &of);
                v1::FlowRoute {
                    route: route.name.to_string(),
                    service: route.service.to_string(),
                    group: route.group.to_string(),
                    verdict: verdict.to_owned(),
                    detail,
                    progress: progress.into(),
                    committed: commit.map(|commit| commit.offset),
                    disposition: disposition.to_owned(),
                    note,
                    ..v1::FlowRoute::default()
                }
            })
            .collect();
    }
}

fn place(flow: &v1::FlowRecord) -> String {
    flow.position.as_ref().map(|at| position(at).to_string()).unwrap_or_default()
}

fn attempts(number: u32) -> String {
    if number == 1 { "1 attempt".to_owned() } else { format!("{number} attempts") }
}

/// What became of a record on a route, in a word and in words; `made` is what the route made of it, as far as that was found.
fn disposition(route: &Route, verdict: &str, progress: FlowProgress, made: &[&v1::FlowRecord]) -> (&'static str, String) {
    let of = |kind: FlowKind| made.iter().filter(move |made| made.kind() == kind);
    let replies: Vec<String> = of(FlowKind::Reply).map(|reply| place(reply)).collect();
    if let Some(letter) = of(FlowKind::DeadLetter).next_back() {
        let also = if replies.is_empty() { String::new() } else { format!("; a reply lies in {} too", replies.join(", ")) };
        let (reason, tried) = (&letter.reason, attempts(letter.attempts));
        let note = format!("dead letter {}: {reason} after {tried}: {}{also}", place(letter), letter.detail);
        return ("dead_lettered", note);
    }
    let waits = |made: &&&v1::FlowRecord| made.progress() != FlowProgress::Done;
    if let Some(parked) = of(FlowKind::Parked).rfind(waits) {
        let why = match parked.detail.as_str() {
            "" => "waits for its turn, behind an earlier record of its key".to_owned(),
            detail => format!("waits to be released, after {}: {detail}", attempts(parked.attempts)),
        };
        return ("parked", format!("{}: {why}", place(parked)));
    }
    if let Some(retry) = of(FlowKind::Retry).rfind(waits) {
        return ("retrying", format!("{}: waits for its next attempt, after {}", place(retry), attempts(retry.attempts)));
    }
    if !replies.is_empty() {
        return ("forwarded", format!("to {}", replies.join(", ")));
    }
    let filtered = match verdict {
        "filtered" => Some(("filtered", "not admitted by the filter")),
        "other_route" => Some(("other_route", "passed over: a copy for another route")),
        _ => None,
    };
    match (progress, filtered) {
        (FlowProgress::Done, Some((word, note))) => (word, note.to_owned()),
        (FlowProgress::Done, None) if route.to == Destinations::Void && route.cases.is_empty() => {
            ("void", "done; the route forwards nothing".to_owned())
        }
        (FlowProgress::Done, None) => (
            "done",
            "done; no reply found: it was ignored, its reply lies beyond what was read, or a start or a reset skipped it: the records do not tell"
                .to_owned(),
        ),
        (_, Some((_, note))) => ("pending", format!("not done yet: {note}, once it is read")),
        (FlowProgress::Waiting, None) => ("waiting", "at the service, or waiting for its turn or its next attempt".to_owned()),
        (_, None) => ("pending", "not done yet".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Header;

    fn record(headers: &[(&'static str, &str)]) -> Record {
        let headers = headers.iter().map(|(name, value)| Header::new(name, (*value).to_owned())).collect();
        Record { headers, timestamp_ms: Some(7), ..Record::default() }
    }

    fn at(text: &str) -> Position {
        Position::parse(text).unwrap()
    }

    /// The kind, the route and the source of a record.
    fn said(headers: &[(&'static str, &str)], place: &str) -> (FlowKind, String, String) {
        let made = made(&record(headers), &at(place));
        let source = made.source.as_ref().map(|source| position(source).to_string()).unwrap_or_default();
        (made.kind(), made.route, source)
    }

    #[test]
    fn a_record_says_what_it_was_made_of() {
        let cause = ("mesh-cause", "price orders/0/3 1");
        let owned = |kind, route: &str, source: &str| (kind, route.to_owned(), source.to_owned());
        assert_eq!(said(&[], "orders/0/1"), owned(FlowKind::Published, "", ""));
        assert_eq!(said(&[cause], "priced/0/1"), owned(FlowKind::Reply, "price", "orders/0/3"));
        let origin = ("mesh-origin", "priced/2/9 1700");
        assert_eq!(said(&[cause, origin], "audit.priced.retry-2/2/5"), owned(FlowKind::Retry, "audit", "priced/2/9"));
        assert_eq!(said(&[cause, origin], "audit.priced.park/2/5"), owned(FlowKind::Parked, "audit", "priced/2/9"));
        assert_eq!(said(&[cause, origin], "elsewhere/2/5"), owned(FlowKind::Reply, "price", "orders/0/3"), "no retry topic");
        let letter = [
            cause,
            ("mesh-dlq-reason", "status"),
            ("mesh-dlq-route", "audit"),
            ("mesh-dlq-topic", "priced"),
            ("mesh-dlq-partition", "2"),
            ("mesh-dlq-offset", "9"),
        ];
        assert_eq!(said(&letter, "audit.dlq/0/0"), owned(FlowKind::DeadLetter, "audit", "priced/2/9"));
        assert_eq!(said(&letter[..3], "audit.dlq/0/0"), owned(FlowKind::DeadLetter, "audit", ""), "it does not say where from");
        let (redriven, replayed) = (("mesh-redriven", "audit.dlq/0/0"), ("mesh-replayed", "priced/2/9"));
        assert_eq!(said(&[cause, replayed, redriven], "priced/2/11"), owned(FlowKind::Redriven, "", "audit.dlq/0/0"));
        assert_eq!(said(&[cause, redriven, replayed], "priced/2/11"), owned(FlowKind::Replayed, "", "priced/2/9"));
    }

    #[test]
    fn how_far_a_group_is() {
        let commit = |offset, ranges: &[std::ops::Range<i64>]| Commit {
            partition: TopicPartition::new("orders", 0),
            offset,
            metadata: completed::encode(offset, ranges).text,
        };
        assert_eq!(progress(None, 5), FlowProgress::Pending);
        assert_eq!(progress(Some(&commit(5, &[])), 4), FlowProgress::Done);
        assert_eq!(progress(Some(&commit(5, &[])), 5), FlowProgress::Pending);
        let with_map = commit(5, &[7..9, 12..13]);
        for (offset, wanted) in [
            (5, FlowProgress::Waiting),
            (8, FlowProgress::Done),
            (9, FlowProgress::Waiting),
            (12, FlowProgress::Done),
            (13, FlowProgress::Pending),
        ] {
            assert_eq!(progress(Some(&with_map), offset), wanted, "{offset}");
        }
        // Metadata of somebody else tells nothing.
        assert_eq!(progress(Some(&Commit { metadata: "x".to_owned(), ..with_map }), 8), FlowProgress::Pending);
    }

    #[test]
    fn what_became_of_a_record_is_told_as_far_as_records_tell() {
        let route = crate::outcome::test_delivery("", 0).route;
        let made = |kind: FlowKind, progress: FlowProgress, detail: &str| v1::FlowRecord {
            position: Some(grpc::position(&at("out/0/4"))),
            kind: kind.into(),
            progress: progress.into(),
            detail: detail.to_owned(),
            route: "work".to_owned(),
            ..v1::FlowRecord::default()
        };
        let reply = made(FlowKind::Reply, FlowProgress::Unspecified, "");
        let letter = made(FlowKind::DeadLetter, FlowProgress::Unspecified, "boom");
        let (waits, over) = (made(FlowKind::Retry, FlowProgress::Pending, ""), made(FlowKind::Retry, FlowProgress::Done, ""));
        let parked = made(FlowKind::Parked, FlowProgress::Pending, "500");
        let word = |verdict: &str, progress, made: &[&v1::FlowRecord]| {
            let (word, note) = disposition(&route, verdict, progress, made);
            assert!(!note.is_empty());
            word
        };
        let done = FlowProgress::Done;
        assert_eq!(word("delivered", done, &[&reply]), "forwarded");
        assert_eq!(word("delivered", done, &[&over, &reply]), "forwarded");
        assert_eq!(word("delivered", done, &[&waits]), "retrying");
        assert_eq!(word("delivered", done, &[&over, &parked]), "parked");
        assert_eq!(word("delivered", done, &[&over, &letter, &reply]), "dead_lettered");
        assert_eq!(word("delivered", done, &[]), "done");
        assert_eq!(word("filtered", done, &[]), "filtered");
        assert_eq!(word("other_route", done, &[]), "other_route");
        assert_eq!(word("filtered", FlowProgress::Pending, &[]), "pending");
        assert_eq!(word("delivered", FlowProgress::Waiting, &[]), "waiting");
        assert_eq!(word("delivered", FlowProgress::Pending, &[]), "pending");
    }

    #[test]
    fn records_of_a_flow_are_told_together() {
        let text = "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: { mesh: m }\nspec:\n  routes:\n  \
            - { name: price, service: s, from: [orders], handler: /p, to: [priced], filter: 'record.size == 0', retry: { topics: [1m] } }\n  \
            - { name: audit, service: s, from: [orders], handler: /a, to: void }\n";
        let table = mesh_routing::parse("t", text).and_then(|table| mesh_routing::compile(&table)).unwrap();
        let source = Node::new(&record(&[]), &at("orders/0/3"), Some(&table));
        let copy = Node::new(&record(&[("mesh-origin", "orders/0/3 7"), ("mesh-attempt", "2")]), &at("price.orders.retry-1/0/0"), None);
        let commit = |group: &str, topic: &str, offset| {
            let partition = TopicPartition::new(topic, 0);
            ((Arc::from(group), partition.clone()), Commit { partition, offset, metadata: String::new() })
        };
        let mut nodes = [source, copy];
        let commits = [commit("m.price", "orders", 4), commit("m.audit", "orders", 4)].into();
        tell(&table, &mut nodes, &commits);
        let said = |nodes: &[Node; 2]| nodes[0].flow.routes.iter().map(|route| route.disposition.clone()).collect::<Vec<_>>();
        assert_eq!(said(&nodes), ["retrying", "void"]);
        let [price, _] = &nodes[0].flow.routes[..] else { panic!() };
        assert_eq!((&*price.verdict, &*price.detail, price.committed), ("delivered", "filter `record.size == 0` is true", Some(4)));
        // The copy is done too, and left nothing.
        let mut nodes = [Node::new(&record(&[]), &at("orders/0/3"), Some(&table)), {
            let [_, copy] = nodes;
            copy
        }];
        let done = commits.into_iter().chain([commit("m.price", "price.orders.retry-1", 1)]).collect();
        tell(&table, &mut nodes, &done);
        assert_eq!(said(&nodes), ["done", "void"]);
    }
}
