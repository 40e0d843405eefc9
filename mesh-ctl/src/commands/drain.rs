//! `mesh-ctl drain`: lets a sidecar finish what it does, and ends it. A preview, unless told otherwise.
//!
//! Invariant: it has ended when its admin port answers no more, if that is the one that is asked; else when its report was taken back, when it is
//! lost, or when another process reports under its name.

use std::time::{Duration, Instant};

use mesh_proto::v1::{self, InstanceState};
use serde::Serialize;

use super::Context;
use crate::{
    client::{self, Client},
    flags::{Drain, Form},
    output::{Code, Columns, Failure, Style, age, count},
};

/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(200);
/// How long such a look may take.
const LOOK_TIME: Duration = Duration::from_secs(5);

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Default, Serialize)]
struct Said {
    instance: String,
    executed: bool,
    /// Whether it has ended; absent: that was not waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<bool>,
    /// Deliveries that were at its services when it began.
    in_flight: u64,
    routes: Vec<Route>,
}

/// A route of the instance, as it was before.
#[derive(Debug, Serialize)]
struct Route {
    route: String,
    service: String,
    partitions: u32,
    lag_records: u64,
    in_flight: u64,
    /// Other live instances that run it.
    others: Vec<String>,
}

pub(super) async fn run(context: &Context, flags: &Drain) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let mesh = client::status(&mut client, false).await?;
    let name = flags.instance.clone().unwrap_or_else(|| mesh.instance.clone());
    let mut said = preview(&mesh, &name)?;
    if !flags.execute {
        return say(context, &said).map(|()| Code::Done);
    }
    let before = Before { own: name == mesh.instance, started_ms: started(&mesh, &name), name };
    let begin = Instant::now();
    let wait_ms = if flags.no_wait { 0 } else { u64::try_from(flags.wait.as_millis()).unwrap_or(u64::MAX).max(1) };
    let message = v1::DrainRequest { instance: before.name.clone(), wait_ms };
    let deadline = if flags.no_wait { client::APPLY } else { flags.wait + client::ASK };
    let answer = client.drain(client::request(message, deadline)).await.map_err(|status| client::refused(&status))?.into_inner();
    (said.executed, said.in_flight) = (true, answer.in_flight);
    if !flags.no_wait {
        said.ended = Some(wait(context, client, &before, begin, flags.wait).await);
    }
    say(context, &said)?;
    if said.ended == Some(false) {
        let message = format!("{} has not ended within {}: it goes on draining", before.name, age(flags.wait));
        let hint = "`mesh-ctl status` tells what it waits for; its log names a service that does not answer".to_owned();
        return Err(Failure::Said { code: Code::Unknown, message, hint });
    }
    if said.ended.is_some() {
        context.note(&format!("ended after {:.1}s", begin.elapsed().as_secs_f64()));
    }
    Ok(Code::Done)
}

/// What it does, and who takes over.
fn preview(mesh: &v1::GetStatusResponse, name: &str) -> Result<Said, Failure> {
    let Some(instance) = mesh.instances.iter().find(|instance| instance.instance == name) else {
        let known: Vec<&str> = mesh.instances.iter().map(|instance| instance.instance.as_str()).collect();
        return Err(match name {
            "" => Failure::new("the sidecar does not tell its name: it is of another version", "name the instance: see `mesh-ctl status`"),
            _ => Failure::new(format!("there is no instance {name} in mesh {}", mesh.mesh), format!("there are: {}", known.join(", "))),
        });
    };
    let others = |route: &str| {
        let live = mesh.instances.iter().filter(|other| other.instance != name && other.state() != InstanceState::Lost);
        live.filter(|other| other.routes.iter().any(|one| one.route == route)).map(|other| other.instance.clone()).collect()
    };
    let route = |route: &v1::RouteStatus| Route {
        route: route.route.clone(),
        service: route.service.clone(),
        partitions: route.partitions,
        lag_records: route.lag_records,
        in_flight: route.in_flight,
        others: others(&route.route),
    };
    let routes: Vec<Route> = instance.routes.iter().map(route).collect();
    Ok(Said { instance: name.to_owned(), in_flight: routes.iter().map(|route| route.in_flight).sum(), routes, ..Said::default() })
}

/// The instance before it was asked.
#[derive(Debug)]
struct Before {
    name: String,
    /// Whether it is the one that is asked.
    own: bool,
    started_ms: i64,
}

fn started(mesh: &v1::GetStatusResponse, name: &str) -> i64 {
    mesh.instances.iter().find(|instance| instance.instance == name).map_or(0, |instance| instance.started_ms)
}

impl Before {
    /// What it still does, or `None` if it has ended.
    fn remains<'a>(&self, mesh: &'a v1::GetStatusResponse) -> Option<&'a v1::InstanceStatus> {
        let found = mesh.instances.iter().find(|instance| instance.instance == self.name)?;
        (found.state() != InstanceState::Lost && found.started_ms == self.started_ms).then_some(found)
    }
}

/// Waits until it has ended; whether it has.
async fn wait(context: &Context, mut client: Client, before: &Before, begin: Instant, wait: Duration) -> bool {
    let mut unanswered = 0;
    let ended = loop {
        let look = client::request(v1::GetStatusRequest { watch: false }, LOOK_TIME);
        let trouble = match client.get_status(look).await {
            Ok(mesh) => match before.remains(mesh.get_ref()) {
                None => break true,
                Some(found) => {
                    unanswered = 0;
                    let at_services: u64 = found.routes.iter().map(|route| route.in_flight).sum();
                    let routes = count(found.routes.len() as u64, "route");
                    format!("{routes}, {at_services} at services")
                }
            },
            // Its connection may be closed before it has ended: whether somebody listens there tells.
            Err(error) => match client::connect(&context.admin).await {
                Ok(again) => {
                    (client, unanswered) = (again, 0);
                    error.message().to_owned()
                }
                Err(_) => {
                    unanswered += 1;
                    // One that is only slow answers the next time.
                    if before.own && unanswered > 1 {
                        break true;
                    }
                    format!("{} does not answer", context.admin)
                }
            },
        };
        if begin.elapsed() >= wait {
            break false;
        }
        context.progress_line(&format!("{} drains: {trouble}, {}", before.name, age(begin.elapsed())));
        tokio::time::sleep(LOOK).await;
    };
    context.progress_over();
    ended
}

fn say(context: &Context, said: &Said) -> Result<(), Failure> {
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, said)?,
        None | Some(Form::Table) => context.print(&text(said, context.colours, context.quiet))?,
    }
    let alone: Vec<&str> = said.routes.iter().filter(|one| one.others.is_empty()).map(|one| one.route.as_str()).collect();
    if !alone.is_empty() {
        let warning = Style::Warn.paint(context.error_colours, "warning:");
        let (routes, verb) = (alone.join(", "), if said.executed { "wait" } else { "would wait" });
        context.note(&format!("{warning} no other instance runs {routes}: their records {verb} until one does"));
    }
    Ok(())
}

fn text(said: &Said, colours: bool, quiet: bool) -> String {
    let at_services = match said.in_flight {
        1 => "1 delivery".to_owned(),
        many => format!("{many} deliveries"),
    };
    let mut out = String::new();
    if said.executed {
        out += &match said.ended {
            Some(true) => format!("instance {} has drained and ended\n", said.instance),
            Some(false) | None => format!("instance {} drains: {at_services} at its services when it began\n", said.instance),
        };
        return out;
    }
    out += &format!("instance {}: {at_services} at its services\n", said.instance);
    if !said.routes.is_empty() {
        let mut columns = Columns::new(&["ROUTE", "SERVICE", "PARTITIONS", "LAG", "IN FLIGHT", "TAKEN OVER BY"]);
        for one in &said.routes {
            let plain = |text: String| (text, Style::Plain);
            let over = match one.others.is_empty() {
                true => ("nobody".to_owned(), Style::Warn),
                false => plain(one.others.join(", ")),
            };
            columns.row(vec![
                plain(one.route.clone()),
                plain(one.service.clone()),
                plain(one.partitions.to_string()),
                plain(one.lag_records.to_string()),
                plain(one.in_flight.to_string()),
                over,
            ]);
        }
        out += &columns.render(colours);
    }
    if !quiet {
        out += "preview: nothing is drained; --execute does it\n";
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh() -> v1::GetStatusResponse {
        let route = |route: &str, in_flight| v1::RouteStatus {
            route: route.into(),
            service: "pricing".into(),
            partitions: 2,
            lag_records: 5,
            in_flight,
            ..v1::RouteStatus::default()
        };
        let instance = |name: &str, state: InstanceState, routes| v1::InstanceStatus {
            instance: name.into(),
            state: state.into(),
            started_ms: 7,
            routes,
            ..v1::InstanceStatus::default()
        };
        let instances = vec![
            instance("a", InstanceState::Synced, vec![route("audit", 0), route("price", 1)]),
            instance("b", InstanceState::Synced, vec![route("price", 0)]),
            instance("c", InstanceState::Lost, vec![route("audit", 0)]),
        ];
        v1::GetStatusResponse { mesh: "shop".into(), instance: "a".into(), instances, ..v1::GetStatusResponse::default() }
    }

    #[test]
    fn who_takes_over_is_shown() {
        let said = preview(&mesh(), "a").ok().unwrap();
        assert_eq!(
            text(&said, false, false),
            "instance a: 1 delivery at its services\n\
             ROUTE  SERVICE  PARTITIONS  LAG  IN FLIGHT  TAKEN OVER BY\n\
             audit  pricing  2           5    0          nobody\n\
             price  pricing  2           5    1          b\n\
             preview: nothing is drained; --execute does it\n"
        );
        let said = Said { executed: true, ended: Some(true), ..said };
        assert_eq!(text(&said, false, false), "instance a has drained and ended\n");
        assert!(preview(&mesh(), "d").is_err() && preview(&mesh(), "").is_err());
    }

    #[test]
    fn it_has_ended_when_it_is_gone_lost_or_another() {
        let before = Before { name: "b".into(), own: false, started_ms: 7 };
        assert!(before.remains(&mesh()).is_some());
        assert!(Before { started_ms: 6, ..before }.remains(&mesh()).is_none(), "another process has the name");
        for name in ["c", "d"] {
            assert!(Before { name: name.into(), own: false, started_ms: 7 }.remains(&mesh()).is_none(), "{name}");
        }
    }
}
