//! `mesh-ctl trace`: a flow over its hops, from the records alone. And how records of a flow are shown, for `explain` too.

use std::{collections::HashMap, time::Duration};

use mesh_proto::v1::{self, FlowKind, FlowProgress};
use serde::Serialize;

use super::{
    Context,
    dlq::shown,
    plan::{Scanned, key_of, left_out},
};
use crate::{
    client,
    flags::{Form, Trace},
    moment::Moment,
    output::{Code, Failure, Style, count},
    view,
};

/// Where nothing is said: among the records of so long.
const LAST: Duration = Duration::from_secs(3600);
/// How long the sidecar may take: its reading is bounded.
pub(super) const PATIENCE: Duration = Duration::from_secs(240);

/// A record of a flow, as `-o json` and `-o yaml` print it.
#[derive(Debug, Serialize)]
pub(super) struct Record {
    topic: String,
    partition: i32,
    offset: i64,
    time: String,
    timestamp_ms: i64,
    kind: &'static str,
    /// The route that wrote it.
    route: Option<String>,
    /// The record that it was made of.
    source: Option<String>,
    index: Option<u32>,
    mesh_id: String,
    trace_id: Option<String>,
    hops: u32,
    key: Option<String>,
    key_base64: Option<String>,
    attempts: u32,
    reason: Option<String>,
    detail: Option<String>,
    due: Option<String>,
    progress: Option<&'static str>,
    /// What the routes that read its topic do with it.
    pub(super) routes: Vec<Route>,
    /// What was made of it.
    pub(super) made: Vec<Record>,
}

/// What a route does with a record.
#[derive(Debug, Serialize)]
pub(super) struct Route {
    pub(super) route: String,
    pub(super) service: String,
    pub(super) group: String,
    pub(super) verdict: String,
    pub(super) detail: String,
    pub(super) progress: Option<&'static str>,
    pub(super) committed: Option<i64>,
    pub(super) disposition: String,
    pub(super) note: String,
    /// Who owns its partition and says so, while it is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) instance: Option<String>,
    /// Attempts that were begun, while it is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) attempts: Option<u32>,
}

fn kind(kind: FlowKind) -> &'static str {
    match kind {
        FlowKind::Unspecified => "unknown",
        FlowKind::Published => "published",
        FlowKind::Reply => "reply",
        FlowKind::Retry => "retry",
        FlowKind::Parked => "parked",
        FlowKind::DeadLetter => "dead_letter",
        FlowKind::Redriven => "redriven",
        FlowKind::Replayed => "replayed",
    }
}

fn progress(progress: FlowProgress) -> Option<&'static str> {
    match progress {
        FlowProgress::Unspecified => None,
        FlowProgress::Done => Some("done"),
        FlowProgress::Waiting => Some("waiting"),
        FlowProgress::Pending => Some("pending"),
    }
}

fn place(at: &v1::Position) -> String {
    format!("{}/{}/{}", at.topic, at.partition, at.offset)
}

fn said(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl From<v1::FlowRecord> for Record {
    fn from(flow: v1::FlowRecord) -> Self {
        let (of_kind, of_progress) = (flow.kind(), flow.progress());
        let (key, key_base64) = key_of(flow.key.as_deref());
        let at = flow.position.unwrap_or_default();
        Self {
            topic: at.topic,
            partition: at.partition,
            offset: at.offset,
            time: view::time(flow.timestamp_ms),
            timestamp_ms: flow.timestamp_ms,
            kind: kind(of_kind),
            route: said(flow.route),
            source: flow.source.as_ref().map(place),
            index: (of_kind == FlowKind::Reply).then_some(flow.index),
            mesh_id: flow.mesh_id,
            trace_id: said(flow.trace_id),
            hops: flow.hops,
            key,
            key_base64,
            attempts: flow.attempts,
            reason: said(flow.reason),
            detail: said(flow.detail),
            due: (flow.due_ms > 0).then(|| view::time(flow.due_ms)),
            progress: progress(of_progress),
            routes: flow.routes.into_iter().map(Route::from).collect(),
            made: Vec::new(),
        }
    }
}

impl From<v1::FlowRoute> for Route {
    fn from(route: v1::FlowRoute) -> Self {
        let of_progress = route.progress();
        let v1::FlowRoute { route, service, group, verdict, detail, committed, disposition, note, instance, attempts, .. } = route;
        let (instance, attempts) = Some((instance, attempts)).filter(|(instance, _)| !instance.is_empty()).unzip();
        Self { route, service, group, verdict, detail, progress: progress(of_progress), committed, disposition, note, instance, attempts }
    }
}

impl Record {
    fn place(&self) -> String {
        format!("{}/{}/{}", self.topic, self.partition, self.offset)
    }

    pub(super) fn mesh_id(&self) -> &str {
        &self.mesh_id
    }

    pub(super) fn trace_id(&self) -> Option<&str> {
        self.trace_id.as_deref()
    }

    pub(super) fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// Whether a route wrote it.
    pub(super) fn is_of(&self, route: &str) -> bool {
        self.route.as_deref() == Some(route)
    }

    /// The record in a line: what it is, who wrote it, and what it says of itself.
    pub(super) fn line(&self, colours: bool) -> String {
        let by = self.route.as_ref().map_or_else(String::new, |route| format!(" of {}", shown(route.as_bytes())));
        let style = match self.kind {
            "dead_letter" => Style::Bad,
            "retry" | "parked" => Style::Warn,
            _ => Style::Plain,
        };
        let what = style.paint(colours, format!("{}{by}", self.kind.replace('_', " ")));
        let key = match (&self.key, &self.key_base64) {
            (Some(key), _) => format!("  key {}", shown(key.as_bytes())),
            (None, Some(key)) => format!("  key base64 {}", shown(key.as_bytes())),
            (None, None) => String::new(),
        };
        let mut more = String::new();
        if let Some(reason) = &self.reason {
            more += &format!("  {}", shown(reason.as_bytes()));
        }
        if self.attempts > 0 {
            more += &format!("  after {}", count(self.attempts.into(), "attempt"));
        }
        if let Some(detail) = &self.detail {
            more += &format!(": {}", shown(detail.as_bytes()));
        }
        match (self.progress, &self.due) {
            (Some("done"), _) => more += "  done",
            (Some(_), Some(due)) => more += &format!("  due {due}"),
            _ => {}
        }
        format!("{}  {what}  {}  hop {}{key}{more}", shown(self.place().as_bytes()), self.time, self.hops)
    }
}

/// The forest of a flow: each record under the one that it was made of. They come in an order in which that one comes first.
fn forest(records: Vec<v1::FlowRecord>) -> Vec<Record> {
    let mut records: Vec<Record> = records.into_iter().map(Record::from).collect();
    let here: HashMap<String, usize> = records.iter().enumerate().map(|(number, record)| (record.place(), number)).collect();
    let parents: Vec<Option<usize>> = records
        .iter()
        .enumerate()
        .map(|(number, record)| here.get(record.source.as_ref()?).copied().filter(|parent| *parent < number))
        .collect();
    let mut roots = Vec::new();
    // From the last on: what was made of a record is complete when it is its own turn.
    while let Some(mut record) = records.pop() {
        record.made.reverse();
        match parents.get(records.len()).copied().flatten().and_then(|parent| records.get_mut(parent)) {
            Some(parent) => parent.made.push(record),
            None => roots.push(record),
        }
    }
    roots.reverse();
    roots
}

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said {
    id: String,
    records: usize,
    /// There are more records than are told.
    more: bool,
    flow: Vec<Record>,
    traces: Vec<String>,
    since: String,
    scanned: Vec<Scanned>,
}

pub(super) async fn run(context: &Context, flags: &Trace) -> Result<Code, Failure> {
    if let Some(from) = &flags.from {
        context.note(&format!("--from: {from}"));
    }
    let since = flags.from.clone().unwrap_or_else(|| Moment::ago(flags.last.unwrap_or(LAST))).millis();
    let mut client = client::connect(&context.admin).await?;
    let message = v1::TraceRequest { id: flags.id.clone(), since_ms: since };
    let response = client.trace(client::request(message, PATIENCE)).await.map_err(|status| client::refused(&status))?.into_inner();
    let v1::TraceResponse { records, more, scanned, traces } = response;
    let scanned: Vec<Scanned> = scanned.into_iter().map(Scanned::from).collect();
    let said =
        Said { id: flags.id.clone(), records: records.len(), more, flow: forest(records), traces, since: view::time(since), scanned };
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &said)?,
        None | Some(Form::Table) => context.print(&text_of(&said, context.quiet, context.colours))?,
    }
    if said.records == 0 {
        context.note("no such record was found: --last or --from look further back");
    }
    Ok(if said.records == 0 { Code::No } else { Code::Done })
}

fn text_of(said: &Said, quiet: bool, colours: bool) -> String {
    let mut out = String::new();
    // Depth first; each with the lines that lead to its children.
    let mut open: Vec<(&Record, String, &str, &str)> = said.flow.iter().rev().map(|root| (root, String::new(), "", "")).collect();
    while let Some((record, before, own, below)) = open.pop() {
        out += &format!("{before}{own}{}\n", record.line(colours));
        let before = format!("{before}{below}");
        let mark = if record.made.is_empty() { "  " } else { "│ " };
        for route in &record.routes {
            let style = match route.disposition.as_str() {
                "dead_lettered" => Style::Bad,
                "retrying" | "parked" | "waiting" | "pending" => Style::Warn,
                _ => Style::Plain,
            };
            let word = style.paint(colours, route.disposition.replace('_', " "));
            out += &format!("{before}{mark}  {}: {word}\n", shown(route.route.as_bytes()));
        }
        if let (true, Some(source)) = (own.is_empty(), &record.source) {
            out += &format!("{before}{mark}  (made of {}, which was not found in what was read)\n", shown(source.as_bytes()));
        }
        let last = record.made.len().saturating_sub(1);
        let children = record.made.iter().enumerate().rev();
        open.extend(children.map(|(number, child)| {
            let (own, below) = if number == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            (child, before.clone(), own, below)
        }));
    }
    if said.more {
        out += &format!("\nthere are more records than these {}\n", said.records);
    }
    if !quiet && said.records > 0 {
        let read: u64 = said.scanned.iter().map(Scanned::records).sum();
        let topics = count(said.scanned.len() as u64, "topic");
        out += &format!(
            "\n{} of the flow, among {} of {topics} since {}\n",
            count(said.records as u64, "record"),
            count(read, "record"),
            said.since
        );
        for trace in said.traces.iter().filter(|trace| !trace.eq_ignore_ascii_case(&said.id)) {
            out += &format!("trace {trace}\n");
        }
    }
    out + &left_out(&said.scanned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(place: &str, source: Option<&str>, of_kind: FlowKind, route: &str) -> v1::FlowRecord {
        let position = |text: &str| {
            let parts: Vec<&str> = text.split('/').collect();
            v1::Position { topic: parts[0].into(), partition: parts[1].parse().unwrap(), offset: parts[2].parse().unwrap() }
        };
        v1::FlowRecord {
            position: Some(position(place)),
            source: source.map(position),
            kind: of_kind.into(),
            route: route.into(),
            timestamp_ms: 1_700_000_000_000,
            trace_id: "4bf9".into(),
            ..v1::FlowRecord::default()
        }
    }

    fn route(route: &str, disposition: &str) -> v1::FlowRoute {
        v1::FlowRoute { route: route.into(), disposition: disposition.into(), ..v1::FlowRoute::default() }
    }

    #[test]
    fn a_flow_is_a_tree() {
        let records = vec![
            v1::FlowRecord {
                key: Some("k1".into()),
                routes: vec![route("price", "forwarded"), route("audit", "other_route")],
                ..flow("orders/0/5", None, FlowKind::Published, "")
            },
            v1::FlowRecord {
                hops: 1,
                routes: vec![route("store", "dead_lettered")],
                ..flow("priced/1/2", Some("orders/0/5"), FlowKind::Reply, "price")
            },
            v1::FlowRecord {
                reason: "status".into(),
                detail: "400\nBad".into(),
                attempts: 1,
                ..flow("store.dlq/0/3", Some("priced/1/2"), FlowKind::DeadLetter, "store")
            },
            v1::FlowRecord { hops: 1, ..flow("audited/0/0", Some("orders/0/5"), FlowKind::Reply, "price") },
            flow("lost/0/1", Some("gone/0/0"), FlowKind::Reply, "x"),
        ];
        let scanned = vec![Scanned::from(v1::Scanned { topic: "orders".into(), partitions: 1, records: 9, ..v1::Scanned::default() })];
        let said = Said {
            id: "a".into(),
            records: records.len(),
            more: false,
            flow: forest(records),
            traces: vec!["4bf9".into()],
            since: "then".into(),
            scanned,
        };
        let text = "\
orders/0/5  published  2023-11-14T22:13:20Z  hop 0  key k1
│   price: forwarded
│   audit: other route
├─ priced/1/2  reply of price  2023-11-14T22:13:20Z  hop 1
│  │   store: dead lettered
│  └─ store.dlq/0/3  dead letter of store  2023-11-14T22:13:20Z  hop 0  status  after 1 attempt: 400 Bad
└─ audited/0/0  reply of price  2023-11-14T22:13:20Z  hop 1
lost/0/1  reply of x  2023-11-14T22:13:20Z  hop 0
    (made of gone/0/0, which was not found in what was read)

5 records of the flow, among 9 records of 1 topic since then
trace 4bf9
";
        assert_eq!(text_of(&said, false, false), text);
        let json = serde_json::to_value(&said).unwrap();
        assert_eq!(json["flow"][0]["made"][0]["made"][0]["kind"], "dead_letter");
        assert_eq!(json["flow"][0]["made"][1]["topic"], "audited");
        assert_eq!(json["flow"][1]["source"], "gone/0/0");
    }

    #[test]
    fn a_circle_of_sources_is_no_endless_tree() {
        let records = vec![flow("a/0/0", Some("b/0/0"), FlowKind::Reply, "x"), flow("b/0/0", Some("a/0/0"), FlowKind::Reply, "x")];
        let roots = forest(records);
        assert_eq!((roots.len(), roots[0].made.len()), (1, 1));
    }
}
