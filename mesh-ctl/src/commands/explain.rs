//! `mesh-ctl explain`: what each route did, or would do, with one record, and what became of it.

use mesh_proto::v1;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    Context,
    dlq::{put, shown},
    plan::{Scanned, left_out},
    trace::{PATIENCE, Record},
};
use crate::{
    client,
    flags::{Explain, Form},
    output::{Code, Failure, Style, count},
    view,
};

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said {
    record: Record,
    content_type: String,
    /// `value`, or `value_base64`.
    #[serde(flatten)]
    value: Map<String, Value>,
    headers: Vec<Value>,
    /// More was made of it than is told.
    more: bool,
    /// From when what was made of it was looked for.
    since: String,
    scanned: Vec<Scanned>,
}

pub(super) async fn run(context: &Context, flags: &Explain) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let message = v1::ExplainRequest { position: Some(flags.record.0.clone()) };
    let response = client.explain(client::request(message, PATIENCE)).await.map_err(|status| client::refused(&status))?.into_inner();
    let said = Said::new(response);
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &said)?,
        None | Some(Form::Table) => context.print(&text_of(&said, context.quiet, context.colours))?,
    }
    Ok(Code::Done)
}

impl Said {
    fn new(response: v1::ExplainResponse) -> Self {
        let v1::ExplainResponse { record, flow, found, scanned, since_ms, more } = response;
        let stored = record.unwrap_or_default();
        let mut record = Record::from(flow.unwrap_or_default());
        record.made = found.into_iter().map(Record::from).collect();
        let mut value = Map::new();
        put(&mut value, "value", stored.value.as_deref());
        let headers = stored.headers.iter().map(|header| {
            let mut one = Map::new();
            one.insert("name".to_owned(), Value::from(header.name.as_str()));
            put(&mut one, "value", header.value.as_deref());
            Value::Object(one)
        });
        Self {
            record,
            content_type: stored.content_type,
            headers: headers.collect(),
            value,
            more,
            since: view::time(since_ms),
            scanned: scanned.into_iter().map(Scanned::from).collect(),
        }
    }
}

fn text_of(said: &Said, quiet: bool, colours: bool) -> String {
    let record = &said.record;
    let mut out = format!("{}\n", record.line(colours));
    let mut field = |name: &str, value: &str| out += &format!("  {name:<7} {}\n", shown(value.as_bytes()));
    field("id", record.mesh_id());
    field("trace", record.trace_id().unwrap_or("-"));
    if let Some(source) = record.source() {
        field("of", source);
    }
    let text = |name: &str| said.value.get(name).and_then(Value::as_str);
    match (text("value"), text("value_base64")) {
        (Some(value), _) => field("value", value),
        (None, Some(value)) => field("value", &format!("base64 {value}")),
        (None, None) => field("value", "-"),
    }
    if record.routes.is_empty() {
        out += "\nno route of the table in force reads its topic\n";
    }
    for route in &record.routes {
        let style = match route.disposition.as_str() {
            "dead_lettered" => Style::Bad,
            "forwarded" | "void" | "filtered" | "other_route" => Style::Good,
            _ => Style::Warn,
        };
        let word = style.paint(colours, route.disposition.replace('_', " "));
        let name = Style::Bold.paint(colours, shown(route.route.as_bytes()));
        out += &format!("\nroute {name} (service {}, group {}): {word}\n", shown(route.service.as_bytes()), shown(route.group.as_bytes()));
        out += &format!("  match   {}: {}\n", route.verdict.replace('_', " "), shown(route.detail.as_bytes()));
        let committed =
            route.committed.map_or_else(|| "the group has committed nothing yet".to_owned(), |at| format!("the group has committed {at}"));
        out += &format!("  group   {}, {committed}\n", route.progress.unwrap_or("not known"));
        out += &format!("  end     {}\n", shown(route.note.as_bytes()));
        for made in record.made.iter().filter(|made| made.is_of(&route.route)) {
            out += &format!("  made    {}\n", made.line(colours));
        }
    }
    let others: Vec<&Record> = record.made.iter().filter(|made| !record.routes.iter().any(|route| made.is_of(&route.route))).collect();
    if !others.is_empty() {
        out += "\nmade of it by others:\n";
        others.iter().for_each(|made| out += &format!("  {}\n", made.line(colours)));
    }
    if said.more {
        out += &format!("\nmore was made of it than these {}\n", said.record.made.len());
    }
    if !quiet && !said.scanned.is_empty() {
        let read: u64 = said.scanned.iter().map(Scanned::records).sum();
        let topics = count(said.scanned.len() as u64, "topic");
        out += &format!("\nlooked for what was made of it among {} of {topics} since {}\n", count(read, "record"), said.since);
    }
    out + &left_out(&said.scanned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_told_with_its_routes_and_what_was_made_of_it() {
        let at = |topic: &str, offset| Some(v1::Position { topic: topic.into(), partition: 0, offset });
        let route = |route: &str, disposition: &str, progress: v1::FlowProgress| v1::FlowRoute {
            route: route.into(),
            service: "s".into(),
            group: format!("shop.{route}"),
            verdict: "delivered".into(),
            detail: "no filter".into(),
            progress: progress.into(),
            committed: Some(6),
            disposition: disposition.into(),
            note: "to priced/0/2".into(),
            ..v1::FlowRoute::default()
        };
        let flow = v1::FlowRecord {
            position: at("orders", 5),
            timestamp_ms: 1_700_000_000_000,
            kind: v1::FlowKind::Published.into(),
            mesh_id: "a".into(),
            routes: vec![route("price", "forwarded", v1::FlowProgress::Done)],
            ..v1::FlowRecord::default()
        };
        let reply = |route: &str, offset| v1::FlowRecord {
            position: at("priced", offset),
            source: at("orders", 5),
            kind: v1::FlowKind::Reply.into(),
            route: route.into(),
            hops: 1,
            timestamp_ms: 1_700_000_001_000,
            ..v1::FlowRecord::default()
        };
        let response = v1::ExplainResponse {
            record: Some(v1::Record { value: Some(b"{\"n\":1}"[..].into()), ..v1::Record::default() }),
            flow: Some(flow),
            found: vec![reply("price", 2), reply("gone", 3)],
            scanned: vec![v1::Scanned { topic: "priced".into(), partitions: 1, records: 4, ..v1::Scanned::default() }],
            since_ms: 1_700_000_000_000,
            more: false,
        };
        let said = Said::new(response);
        let text = "\
orders/0/5  published  2023-11-14T22:13:20Z  hop 0
  id      a
  trace   -
  value   {\"n\":1}

route price (service s, group shop.price): forwarded
  match   delivered: no filter
  group   done, the group has committed 6
  end     to priced/0/2
  made    priced/0/2  reply of price  2023-11-14T22:13:21Z  hop 1

made of it by others:
  priced/0/3  reply of gone  2023-11-14T22:13:21Z  hop 1

looked for what was made of it among 4 records of 1 topic since 2023-11-14T22:13:20Z
";
        assert_eq!(text_of(&said, false, false), text);
        let json = serde_json::to_value(&said).unwrap();
        assert_eq!((&json["value"], &json["record"]["made"][0]["source"]), (&Value::from("{\"n\":1}"), &Value::from("orders/0/5")));
    }
}
