//! `mesh-ctl plan`: what a routing table would do with the last records of its sources, beside the one in force.

use std::{collections::BTreeMap, time::Duration};

use mesh_proto::v1::{self, RouteChange};
use serde::Serialize;

use super::{
    Context,
    dlq::{next, shown},
    fault,
};
use crate::{
    client,
    flags::{Form, Plan},
    moment::Moment,
    output::{Code, Columns, Failure, Style, count},
    view,
};

/// Where nothing is said: the records of so long.
const LAST: Duration = Duration::from_secs(600);

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said {
    generation: u64,
    digest: String,
    /// Whether anything would change, or may.
    changes: bool,
    since: Option<String>,
    routes: Vec<RouteSaid>,
    schemas: Vec<SchemaSaid>,
    sources: Vec<Scanned>,
    replies: Vec<Scanned>,
    faults: Vec<view::Fault>,
}

#[derive(Debug, Serialize)]
struct RouteSaid {
    route: String,
    change: &'static str,
    before: Counts,
    after: Counts,
    changed: u64,
    changed_by: BTreeMap<String, u64>,
    undecided: u64,
    undecided_why: String,
    by_stored_reply: u64,
    samples: Vec<Sample>,
}

#[derive(Debug, Default, Serialize)]
struct Counts {
    read: u64,
    delivered: u64,
    filtered: u64,
    other_route: u64,
    dead_letters: BTreeMap<String, u64>,
    destinations: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
struct Sample {
    topic: String,
    partition: i32,
    offset: i64,
    key: Option<String>,
    key_base64: Option<String>,
    change: String,
    before: String,
    after: String,
}

#[derive(Debug, Serialize)]
struct SchemaSaid {
    topic: String,
    checked: u64,
    mismatched: u64,
    first: String,
}

/// What was read of a topic.
#[derive(Debug, Serialize)]
pub(super) struct Scanned {
    topic: String,
    partitions: u32,
    records: u64,
    left_out: u64,
    left_out_offsets: String,
}

impl Scanned {
    pub(super) fn records(&self) -> u64 {
        self.records
    }
}

impl From<v1::Scanned> for Scanned {
    fn from(scanned: v1::Scanned) -> Self {
        let v1::Scanned { topic, partitions, records, left_out, which } = scanned;
        Self { topic, partitions, records, left_out, left_out_offsets: which }
    }
}

impl From<v1::PlanCounts> for Counts {
    fn from(counts: v1::PlanCounts) -> Self {
        let v1::PlanCounts { read, delivered, filtered, other_route, dead_letters, destinations } = counts;
        let (dead_letters, destinations) = (dead_letters.into_iter().collect(), destinations.into_iter().collect());
        Self { read, delivered, filtered, other_route, dead_letters, destinations }
    }
}

impl Counts {
    fn dead(&self) -> u64 {
        self.dead_letters.values().sum()
    }
}

/// A key as text, or as base64.
pub(super) fn key_of(key: Option<&[u8]>) -> (Option<String>, Option<String>) {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    match key.map(|key| std::str::from_utf8(key).map_err(|_| BASE64_STANDARD.encode(key))) {
        None => (None, None),
        Some(Ok(text)) => (Some(text.to_owned()), None),
        Some(Err(base64)) => (None, Some(base64)),
    }
}

impl From<v1::PlanSample> for Sample {
    fn from(sample: v1::PlanSample) -> Self {
        let v1::PlanSample { position, key, change, before, after } = sample;
        let v1::Position { topic, partition, offset } = position.unwrap_or_default();
        let (key, key_base64) = key_of(key.as_deref());
        Self { topic, partition, offset, key, key_base64, change, before, after }
    }
}

impl From<v1::RoutePlan> for RouteSaid {
    fn from(plan: v1::RoutePlan) -> Self {
        let change = match plan.change() {
            RouteChange::Unspecified => "unknown",
            RouteChange::Same => "same",
            RouteChange::Changed => "changed",
            RouteChange::Added => "added",
            RouteChange::Removed => "removed",
        };
        Self {
            change,
            route: plan.route,
            before: plan.before.unwrap_or_default().into(),
            after: plan.after.unwrap_or_default().into(),
            changed: plan.changed,
            changed_by: plan.changes.into_iter().collect(),
            undecided: plan.undecided,
            undecided_why: plan.undecided_why,
            by_stored_reply: plan.by_stored_reply,
            samples: plan.samples.into_iter().map(Sample::from).collect(),
        }
    }
}

impl RouteSaid {
    /// Whether records end otherwise on it, or may.
    fn changes(&self) -> bool {
        self.changed > 0 || self.undecided > 0 || matches!(self.change, "added" | "removed")
    }
}

impl Said {
    fn new(result: v1::PlanResult, faults: Vec<v1::Fault>) -> Self {
        let v1::PlanResult { generation, digest, routes, sources, replies, schemas, since_ms } = result;
        let routes: Vec<RouteSaid> = routes.into_iter().map(RouteSaid::from).collect();
        let schema =
            |plan: v1::SchemaPlan| SchemaSaid { topic: plan.topic, checked: plan.checked, mismatched: plan.mismatched, first: plan.first };
        let schemas: Vec<SchemaSaid> = schemas.into_iter().map(schema).collect();
        Self {
            generation,
            digest,
            changes: routes.iter().any(RouteSaid::changes) || schemas.iter().any(|schema| schema.mismatched > 0),
            since: since_ms.map(view::time),
            routes,
            schemas,
            sources: sources.into_iter().map(Scanned::from).collect(),
            replies: replies.into_iter().map(Scanned::from).collect(),
            faults: faults.into_iter().map(view::Fault::from).collect(),
        }
    }
}

pub(super) async fn run(context: &Context, flags: &Plan) -> Result<Code, Failure> {
    let text = flags.file.read()?;
    if let Some(from) = &flags.from {
        context.note(&format!("--from: {from}"));
    }
    let since_ms = match (&flags.from, flags.records) {
        (Some(from), _) => Some(from.millis()),
        (None, Some(_)) => None,
        (None, None) => Some(Moment::ago(flags.last.unwrap_or(LAST)).millis()),
    };
    let mut client = client::connect(&context.admin).await?;
    let message = v1::PlanRequest {
        table: Some(v1::TableSource { file: flags.file.name(), text }),
        since_ms,
        last_records: flags.records.unwrap_or_default(),
        route: flags.route.clone().unwrap_or_default(),
        samples: flags.samples,
    };
    let mut stream = client.plan(message).await.map_err(|status| client::refused(&status))?.into_inner();
    let mut last = v1::PlanProgress::default();
    while let Some(progress) = next(&mut stream, false).await.inspect_err(|_| context.progress_over())? {
        if !progress.finished {
            context.progress_line(&format!("{} of {} offsets read", progress.read, progress.in_range));
        }
        last = progress;
    }
    context.progress_over();
    if !last.finished {
        return Err(Failure::new("the sidecar ended before the plan was complete", "give the command again: nothing was changed"));
    }
    let said = Said::new(last.result.unwrap_or_default(), last.faults);
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &said)?,
        None | Some(Form::Table) => {
            for found in &said.faults {
                context.say(&fault(found, "error", Style::Bad, context.error_colours));
            }
            if said.faults.is_empty() {
                context.print(&text_of(&said, context.quiet, context.colours))?;
            }
        }
    }
    if !said.faults.is_empty() {
        let message = format!("the table has {}: nothing was read", count(said.faults.len() as u64, "fault"));
        return Err(Failure::Said { code: Code::No, message, hint: String::new() });
    }
    Ok(if said.changes { Code::No } else { Code::Done })
}

/// A number, with the one before where that was another.
fn moved(before: u64, after: u64) -> (String, Style) {
    if before == after { (after.to_string(), Style::Plain) } else { (format!("{before} → {after}"), Style::Warn) }
}

fn text_of(said: &Said, quiet: bool, colours: bool) -> String {
    let plain = |text: &str| (text.to_owned(), Style::Plain);
    let mut out = String::new();
    if !quiet {
        let records: u64 = said.sources.iter().map(|source| source.records).sum();
        let since = said.since.as_ref().map_or_else(String::new, |since| format!(" since {since}"));
        let topics = count(said.sources.len() as u64, "topic");
        out += &format!("beside generation {}: {} of {topics}{since}\n\n", said.generation, count(records, "record"));
    }
    let mut columns =
        Columns::new(&["ROUTE", "TABLE", "READ", "DELIVERED", "FILTERED", "DEAD LETTERS", "CHANGED", "UNDECIDED", "ANSWERS GO TO"]);
    for route in &said.routes {
        let (before, after) = (&route.before, &route.after);
        let going = if route.change == "removed" { &before.destinations } else { &after.destinations };
        let going: Vec<String> = going.iter().map(|(to, count)| format!("{to} ({count})")).collect();
        let style = if route.changes() { Style::Warn } else { Style::Good };
        columns.row(vec![
            plain(&route.route),
            (route.change.to_owned(), style),
            moved(before.read, after.read),
            moved(before.delivered, after.delivered),
            moved(before.filtered + before.other_route, after.filtered + after.other_route),
            moved(before.dead(), after.dead()),
            (route.changed.to_string(), if route.changed > 0 { Style::Warn } else { Style::Plain }),
            (route.undecided.to_string(), if route.undecided > 0 { Style::Warn } else { Style::Plain }),
            plain(&going.join(", ")),
        ]);
    }
    out += &columns.render(colours);
    for route in said.routes.iter().filter(|route| route.changed > 0 || route.undecided > 0 || route.by_stored_reply > 0) {
        let mut what: Vec<String> = route.changed_by.iter().map(|(word, count)| format!("{count} {}", word.replace('_', " "))).collect();
        if route.undecided > 0 {
            what.push(format!("{} undecided ({})", route.undecided, shown(route.undecided_why.as_bytes())));
        }
        if route.by_stored_reply > 0 {
            what.push(format!("{} decided by stored replies", route.by_stored_reply));
        }
        out += &format!("\n{}: {}\n", Style::Bold.paint(colours, &route.route), what.join(", "));
        for sample in &route.samples {
            let key = match (&sample.key, &sample.key_base64) {
                (Some(key), _) => format!("  key {}", shown(key.as_bytes())),
                (None, Some(key)) => format!("  key base64 {}", shown(key.as_bytes())),
                (None, None) => String::new(),
            };
            let place = format!("{}/{}/{}", sample.topic, sample.partition, sample.offset);
            let (before, after) = (shown(sample.before.as_bytes()), shown(sample.after.as_bytes()));
            out += &format!("  {place}{key}  {}: {before} → {after}\n", sample.change.replace('_', " "));
        }
    }
    for schema in said.schemas.iter().filter(|schema| schema.mismatched > 0) {
        let (topic, first) = (&schema.topic, shown(schema.first.as_bytes()));
        out += &format!(
            "\n{topic}: {} of {} do not match its proposed schema; they stay and are delivered, and such would not be published: {first}\n",
            schema.mismatched,
            count(schema.checked, "record")
        );
    }
    out + &left_out(&said.sources) + &left_out(&said.replies)
}

/// What a bound kept from being read.
pub(super) fn left_out(scanned: &[Scanned]) -> String {
    let cut = scanned.iter().filter(|topic| topic.left_out > 0);
    let line = |topic: &Scanned| {
        let Scanned { topic, left_out, left_out_offsets, records, .. } = topic;
        format!("\n{topic}: {} were read, {left_out} offsets were not ({left_out_offsets})\n", count(*records, "record"))
    };
    cut.map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> v1::PlanResult {
        let counts = |read, delivered, filtered, to: &str| v1::PlanCounts {
            read,
            delivered,
            filtered,
            destinations: [(to.to_owned(), delivered)].into(),
            ..v1::PlanCounts::default()
        };
        let position = Some(v1::Position { topic: "orders".into(), partition: 0, offset: 17 });
        let sample = v1::PlanSample {
            position,
            key: Some("k3\u{1b}".into()),
            change: "newly_filtered".into(),
            before: "delivered, to priced".into(),
            after: "filtered".into(),
        };
        let route = |route: &str, change: RouteChange, before, after| v1::RoutePlan {
            route: route.into(),
            change: change.into(),
            before: Some(before),
            after: Some(after),
            ..v1::RoutePlan::default()
        };
        let price = v1::RoutePlan {
            changed: 40,
            changes: [("newly_filtered".to_owned(), 40)].into(),
            undecided: 2,
            undecided_why: "no stored reply was found: 2".into(),
            samples: vec![sample],
            ..route("price", RouteChange::Changed, counts(120, 120, 0, "priced"), counts(120, 80, 40, "priced"))
        };
        let same = route("audit", RouteChange::Same, counts(120, 120, 0, "void"), counts(120, 120, 0, "void"));
        let orders = v1::Scanned { topic: "orders".into(), partitions: 4, records: 120, left_out: 7, which: "0: 0 to 6".into() };
        v1::PlanResult { generation: 4, routes: vec![price, same], sources: vec![orders], ..v1::PlanResult::default() }
    }

    #[test]
    fn a_plan_is_a_table_and_what_changes() {
        let said = Said::new(result(), Vec::new());
        assert!(said.changes);
        let text = "\
beside generation 4: 120 records of 1 topic

ROUTE  TABLE    READ  DELIVERED  FILTERED  DEAD LETTERS  CHANGED  UNDECIDED  ANSWERS GO TO
price  changed  120   120 → 80   0 → 40    0             40       2          priced (80)
audit  same     120   120        0         0             0        0          void (120)

price: 40 newly filtered, 2 undecided (no stored reply was found: 2)
  orders/0/17  key k3   newly filtered: delivered, to priced → filtered

orders: 120 records were read, 7 offsets were not (0: 0 to 6)
";
        assert_eq!(text_of(&said, false, false), text);
        assert!(!text_of(&said, true, false).contains("beside generation"));
        let mut same = result();
        same.routes.remove(0);
        assert!(!Said::new(same, Vec::new()).changes);
    }
}
