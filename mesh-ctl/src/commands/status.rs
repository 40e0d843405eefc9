//! `mesh-ctl status`: every instance and every route, with the age of what is said.

use std::time::Duration;

use super::{Context, looks::Looks};
use crate::{
    client::{self, Client},
    flags::Status,
    output::{Code, Columns, Failure, Style, age},
    view,
};

pub(super) async fn run(context: &Context, flags: &Status) -> Result<Code, Failure> {
    let looks = Looks { every: flags.watch, count: flags.count };
    let look = async |client: &mut Client| {
        let response = client::status(client, flags.watch.is_some()).await?;
        // What is in force tells what nobody serves. Without a table, or with one that this version cannot read, that is not told.
        let table = client::table(client).await?;
        Ok::<_, Failure>(view::Mesh::new(response, table.as_ref()))
    };
    let show = |mesh: &view::Mesh, again| looks.print(context, again, mesh, || text(context, mesh));
    looks.run(context, look, show).await
}

fn text(context: &Context, mesh: &view::Mesh) -> String {
    let plain = |text: &str| (text.to_owned(), Style::Plain);
    let mut out = String::new();
    if !context.quiet {
        let generation = match mesh.generation {
            // The asked sidecar has not read the mesh's table: it runs a copy, a file, or nothing.
            0 if mesh.instances.iter().any(|instance| instance.generation > 0) => "its table is not known there yet".to_owned(),
            0 => "no table applied yet".to_owned(),
            generation => match &mesh.rollout {
                None => format!("generation {generation}"),
                Some(rollout) if rollout.aborted.is_some() => {
                    format!("generation {} (generation {generation}, a canary, was aborted)", rollout.stable_generation)
                }
                Some(rollout) => {
                    format!("generation {}, and generation {generation}, a canary, for {}", rollout.stable_generation, rollout.selector)
                }
            },
        };
        out += &format!("mesh {}, {generation}, as seen from {}\n\n", mesh.mesh, context.admin);
    }

    let mut instances = Columns::new(&["INSTANCE", "STATE", "GENERATION", "SERVICES", "VERSION", "AGE", "NOTE"]);
    for instance in &mesh.instances {
        let style = match instance.state {
            "SYNCED" | "PINNED" => Style::Good,
            "NACKED" | "DRIFT" | "LOST" => Style::Bad,
            _ => Style::Warn,
        };
        let refused =
            (!instance.error.is_empty()).then(|| format!("refused generation {}: {}", instance.refused_generation, instance.error));
        let notes: Vec<&str> = refused.iter().chain(&instance.waiting).map(String::as_str).collect();
        instances.row(vec![
            plain(&instance.instance),
            (instance.state.to_owned(), style),
            plain(&instance.generation.to_string()),
            plain(&instance.services.join(",")),
            plain(&instance.version),
            plain(&seconds(instance.age_seconds)),
            plain(&notes.join("; ")),
        ]);
    }
    out += &instances.render(context.colours);

    let mut routes = Columns::new(&["ROUTE", "SERVICE", "INSTANCE", "STATE", "PARTITIONS", "LAG", "BEHIND", "IN FLIGHT", "AGE", "REASON"]);
    let mut all: Vec<_> = mesh.instances.iter().flat_map(|at| at.routes.iter().map(move |route| (route, at))).collect();
    all.sort_by(|(a, at_a), (b, at_b)| (&a.route, &at_a.instance).cmp(&(&b.route, &at_b.instance)));
    for (route, instance) in &all {
        let style = match route.state {
            "RUNNING" => Style::Good,
            "WAITING_FOR_SERVICE" | "WAITING_FOR_BROKER" | "WAITING_FOR_TOPIC" | "STOPPED" => Style::Bad,
            _ => Style::Warn,
        };
        let reason = match route.reason.as_str() {
            "" => String::new(),
            reason if route.waiting_seconds >= 1.0 => format!("{reason} (for {})", seconds(route.waiting_seconds)),
            reason => reason.to_owned(),
        };
        routes.row(vec![
            plain(&route.route),
            plain(&route.service),
            plain(&instance.instance),
            (route.state.to_owned(), style),
            plain(&route.partitions.to_string()),
            plain(&route.lag_records.to_string()),
            plain(&seconds(route.lag_seconds)),
            plain(&route.in_flight.to_string()),
            plain(&seconds(instance.age_seconds)),
            plain(&reason),
        ]);
    }
    for unserved in &mesh.unserved {
        let dash = || plain("-");
        let reason = format!("no live instance serves service {}", unserved.service);
        let state = ("NO_INSTANCE".to_owned(), Style::Bad);
        let (route, service) = (plain(&unserved.route), plain(&unserved.service));
        routes.row(vec![route, service, dash(), state, dash(), dash(), dash(), dash(), dash(), plain(&reason)]);
    }
    if all.is_empty() && mesh.unserved.is_empty() { out } else { out + "\n" + &routes.render(context.colours) }
}

fn seconds(seconds: f64) -> String {
    age(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}
