//! `mesh-ctl graph`: draws the routes, of a file or of the mesh; with `--live` with what flows through them.

use std::time::{Duration, Instant};

use mesh_routing::{AllNotes, CaseSpec, Notes, RouteFields, RouteSpec, Table, To, dead_letter};
use serde::Serialize;

use super::{Context, in_force};
use crate::{
    client,
    flags::{Form, Graph, GraphFormat},
    output::{Code, Failure, age},
    rates::{AGAIN, Flow, PATIENCE, Rates, flows, rate, short},
};

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said<R> {
    mesh: String,
    /// 0: it is a file's table.
    generation: u64,
    /// With `--live`.
    #[serde(skip_serializing_if = "Option::is_none")]
    interval_seconds: Option<f64>,
    routes: Vec<R>,
}

/// A route with its edges, and what flows through them.
#[derive(Debug, Serialize)]
struct Live {
    #[serde(flatten)]
    flow: Flow,
    #[serde(flatten)]
    edges: Edges,
}

/// A route with its edges.
#[derive(Debug, Serialize)]
struct Named {
    route: String,
    service: String,
    #[serde(flatten)]
    edges: Edges,
}

/// Where a route's records come from, and where its answers go.
#[derive(Debug, Default, Serialize)]
struct Edges {
    from: Vec<String>,
    /// Which of them it takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    filter: Option<String>,
    /// All destinations, those of the cases among them.
    to: Vec<String>,
    /// The first one that fits tells where an answer goes.
    cases: Vec<Case>,
    /// Where an answer goes that fits none.
    otherwise: Vec<String>,
    dead_letter: String,
}

#[derive(Debug, Serialize)]
struct Case {
    status: Option<u16>,
    when: Option<String>,
    to: Vec<String>,
}

pub(super) async fn run(context: &Context, flags: &Graph) -> Result<Code, Failure> {
    let (table, generation) = match &flags.file {
        Some(source) => (source.table(context)?, 0),
        None => in_force(context).await?,
    };
    let flows = if flags.live { watch(context, flags, &table).await? } else { Vec::new() };
    if let Some(form @ (Form::Json | Form::Yaml)) = context.form {
        let mesh = table.mesh.clone();
        match flags.live {
            true => {
                let routes = flows.into_iter().map(|flow| Live { edges: edges_of(&table, &flow.route), flow }).collect();
                let interval_seconds = Some(flags.interval.as_secs_f64());
                context.print_document(form, &Said { mesh, generation, interval_seconds, routes })?;
            }
            false => context.print_document(form, &Said { mesh, generation, interval_seconds: None, routes: named(&table) })?,
        }
        return Ok(Code::Done);
    }
    let format = match flags.format {
        GraphFormat::Text => mesh_routing::GraphFormat::Text,
        GraphFormat::Mermaid => mesh_routing::GraphFormat::Mermaid,
        GraphFormat::Dot => mesh_routing::GraphFormat::Dot,
    };
    let notes: AllNotes = flows.iter().map(|flow| (flow.route.clone(), notes(flow))).collect();
    context.print(&format!("{}\n", mesh_routing::graph_with(&table, format, &notes).trim_end()))?;
    Ok(Code::Done)
}

/// Looks twice.
async fn watch(context: &Context, flags: &Graph, table: &Table) -> Result<Vec<Flow>, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let mut rates = Rates::default();
    rates.take(&client::status(&mut client, true).await?);
    context.progress_line(&format!("watching for {} …", age(flags.interval)));
    tokio::time::sleep(flags.interval).await;
    let until = Instant::now() + PATIENCE;
    let mesh = loop {
        let mesh = client::status(&mut client, true).await?;
        rates.take(&mesh);
        if !rates.lack(&mesh) || Instant::now() >= until {
            break mesh;
        }
        tokio::time::sleep(AGAIN).await;
    };
    context.progress_over();
    Ok(flows(&mesh, Some(table), &rates))
}

/// What stands at the edges of a route.
fn notes(flow: &Flow) -> Notes {
    let word =
        |end: &str, name: &str| flow.rate_of(end).filter(|found| *found > 0.0).map(|found| format!("{name} {}/s", rate(Some(found))));
    let mut route = Vec::new();
    if flow.state != "RUNNING" {
        route.push(flow.state.to_owned());
    }
    if flow.breaker_open {
        route.push("breaker open".to_owned());
    }
    if flow.in_flight > 0 {
        route.push(format!("{} in flight", flow.in_flight));
    }
    route.extend(
        [("ignored", "ignored"), ("filtered", "filtered"), ("expired", "expired")].iter().filter_map(|(end, name)| word(end, name)),
    );
    let mut from = vec![format!("{}/s", rate(flow.rate))];
    if flow.lag_records > 0 {
        let seconds = Duration::try_from_secs_f64(flow.lag_seconds).unwrap_or_default();
        from.push(format!("lag {}, {}", short(flow.lag_records), age(seconds)));
    }
    if flow.parked_records > 0 {
        from.push(format!("parked {}", short(flow.parked_records)));
    }
    let out = |end: &str| flow.rate_of(end).map_or_else(String::new, |found| format!("{}/s", rate(Some(found))));
    let dead = match flow.ended("dead_lettered") {
        0 => out("dead_lettered"),
        letters => format!("{}/s, {} in all", rate(flow.rate_of("dead_lettered")), short(letters)),
    };
    Notes { route: route.join(", "), from: from.join(", "), to: out("forwarded"), void: out("void"), dead }
}

/// The routes of a table, in its order.
fn named(table: &Table) -> Vec<Named> {
    let named = |route: &RouteSpec| {
        let fields = table.resolved(route);
        Named { route: route.name.clone(), service: fields.service.clone().unwrap_or_default(), edges: edges(&route.name, fields) }
    };
    table.routes.iter().map(named).collect()
}

/// The edges of the route with this name; none if the table has no such route.
fn edges_of(table: &Table, name: &str) -> Edges {
    let route = table.routes.iter().find(|route| route.name == name);
    route.map(|route| edges(name, table.resolved(route))).unwrap_or_default()
}

/// The edges of a route with these fields, defaults folded in.
fn edges(name: &str, fields: RouteFields) -> Edges {
    let topics = |to: &To| match to {
        To::Topics(topics) => topics.clone(),
        To::Void => vec!["void".to_owned()],
    };
    let case = |case: &CaseSpec| Case { status: case.status, when: case.when.clone(), to: topics(&case.to) };
    let otherwise: Vec<String> = fields.to.as_ref().map(topics).unwrap_or_default();
    let cases: Vec<Case> = fields.cases.iter().flatten().map(case).collect();
    let mut to: Vec<String> = Vec::new();
    for topic in otherwise.iter().chain(cases.iter().flat_map(|case| &case.to)) {
        if !to.contains(topic) {
            to.push(topic.clone());
        }
    }
    let dead_letter = dead_letter(name, &fields).into_owned();
    Edges { from: fields.from.unwrap_or_default(), filter: fields.filter, to, cases, otherwise, dead_letter }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rates::tests::{mesh, report};

    const TABLE: &str = "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: { mesh: shop }\nspec:\n  routes:\n  \
                         - { name: mail, service: mailer, from: [a, b], handler: /m, to: void }\n  \
                         - { name: price, service: pricing, from: [orders], handler: /p, to: [priced], cases: [{ status: 202, to: [manual, priced] }] }\n";

    #[test]
    fn rates_stand_at_the_edges() {
        let table = mesh_routing::parse("t", TABLE).unwrap();
        let mut rates = Rates::default();
        rates.take(&mesh(vec![report("a", 1, 100, 1_000, 0)]));
        let now = mesh(vec![report("a", 1, 110, 1_120, 5)]);
        rates.take(&now);
        let found = flows(&now, Some(&table), &rates);
        let all: AllNotes = found.iter().map(|flow| (flow.route.clone(), notes(flow))).collect();
        let draw = |format| mesh_routing::graph_with(&table, format, &all);
        assert_eq!(
            draw(mesh_routing::GraphFormat::Text),
            "mesh shop\n\n\
             mail (mailer)  [NO_INSTANCE]\n  from a  [in all -/s]\n  from b  [in all -/s]\n  to   void\n  dead mail.dlq\n\n\
             price (pricing)  [1 in flight]\n  from orders  [12.5/s, lag 40, 3s]\n  to   priced  [in all 12.0/s]\n  \
             to   manual  [202: in all 12.0/s]\n  to   priced  [202: in all 12.0/s]\n  dead price.dlq  [0.5/s, 5 in all]\n"
        );
        let dot = draw(mesh_routing::GraphFormat::Dot);
        assert!(dot.contains("\"orders\" -> \"route price\" [label=\"12.5/s, lag 40, 3s\"];"), "{dot}");
        assert!(dot.contains("\"route price\" -> \"price.dlq\" [style=dashed, label=\"0.5/s, 5 in all\"];"), "{dot}");
        let mermaid = draw(mesh_routing::GraphFormat::Mermaid);
        assert!(mermaid.contains("-->|\"12.5/s, lag 40, 3s\"| r1") && mermaid.contains("r0[\"mail (mailer): NO_INSTANCE\"]"), "{mermaid}");
        let json = serde_json::to_value(Live { edges: edges_of(&table, "price"), flow: found[1].clone() }).unwrap();
        assert_eq!((&json["to"], &json["rates"]["dead_lettered"]), (&serde_json::json!(["priced", "manual"]), &0.5.into()));
        assert_eq!((&json["otherwise"], &json["dead_letter"]), (&serde_json::json!(["priced"]), &"price.dlq".into()));
    }
}
