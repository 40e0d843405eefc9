//! `mesh-ctl pause` and `mesh-ctl resume`: a route delivers nothing for a while.

use std::time::{Duration, Instant};

use mesh_proto::v1;
use serde::Serialize;

use super::{Context, propose::whoami};
use crate::{
    client::{self, Client},
    flags::{Form, Pause, Resume},
    output::{Code, Failure},
};

/// How often the state of the mesh is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said {
    route: String,
    paused: bool,
    /// Whether it was otherwise before.
    changed: bool,
    /// With `--wait`: the instances that still deliver.
    #[serde(skip_serializing_if = "Option::is_none")]
    delivering: Option<Vec<String>>,
}

pub(super) async fn pause(context: &Context, flags: &Pause) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let message = v1::PauseRequest { route: flags.route.clone(), reason: flags.reason.clone().unwrap_or_default(), by: whoami() };
    let answer = client.pause(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?.into_inner();
    let delivering = if flags.wait { Some(wait(&mut client, &flags.route, flags.timeout).await?) } else { None };
    let left = delivering.as_ref().is_some_and(|left| !left.is_empty());
    say(context, &Said { route: flags.route.clone(), paused: true, changed: answer.changed, delivering })?;
    Ok(if left { Code::Unknown } else { Code::Done })
}

pub(super) async fn resume(context: &Context, flags: &Resume) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let request = client::request(v1::ResumeRequest { route: flags.route.clone() }, client::APPLY);
    let answer = client.resume(request).await.map_err(|status| client::refused(&status))?.into_inner();
    say(context, &Said { route: flags.route.clone(), paused: false, changed: answer.changed, delivering: None })?;
    Ok(Code::Done)
}

/// Waits until nobody delivers any more; says who still does in the end.
async fn wait(client: &mut Client, route: &str, timeout: Duration) -> Result<Vec<String>, Failure> {
    let until = Instant::now() + timeout;
    loop {
        let mesh = client::status(client, false).await?;
        let left = delivering(&mesh, route);
        if left.is_empty() || Instant::now() >= until {
            return Ok(left);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The instances that may still deliver records of a route. One that is lost delivers nothing that could be committed.
fn delivering(mesh: &v1::GetStatusResponse, route: &str) -> Vec<String> {
    let delivers = |of: &v1::RouteStatus| of.route == route && (of.state() != v1::RouteState::Paused || of.in_flight > 0);
    let live = mesh.instances.iter().filter(|instance| instance.state() != v1::InstanceState::Lost);
    live.filter(|instance| instance.routes.iter().any(delivers)).map(|instance| instance.instance.clone()).collect()
}

fn say(context: &Context, said: &Said) -> Result<(), Failure> {
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, said),
        None | Some(Form::Table) => context.print(&text(said)),
    }
}

fn text(said: &Said) -> String {
    let what = match (said.paused, said.changed) {
        (true, true) => "is paused",
        (true, false) => "was paused before, and stays so",
        (false, true) => "goes on",
        (false, false) => "was not paused",
    };
    let mut out = format!("route {} {what}\n", said.route);
    if let Some(left) = said.delivering.as_ref().filter(|left| !left.is_empty()) {
        out += &format!("still delivering: {}: see `mesh-ctl status`\n", left.join(", "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_still_delivers() {
        let of = |state: v1::RouteState, in_flight| v1::RouteStatus {
            route: "work".into(),
            state: state.into(),
            in_flight,
            ..v1::RouteStatus::default()
        };
        let instance = |name: &str, state: v1::InstanceState, route| v1::InstanceStatus {
            instance: name.into(),
            state: state.into(),
            routes: vec![route],
            ..v1::InstanceStatus::default()
        };
        let synced = v1::InstanceState::Synced;
        let instances = vec![
            instance("a", synced, of(v1::RouteState::Paused, 0)),
            instance("b", synced, of(v1::RouteState::Paused, 3)),
            instance("c", synced, of(v1::RouteState::Running, 0)),
            instance("d", v1::InstanceState::Lost, of(v1::RouteState::Running, 1)),
        ];
        let mesh = v1::GetStatusResponse { instances, ..v1::GetStatusResponse::default() };
        assert_eq!(delivering(&mesh, "work"), ["b", "c"]);
        assert!(delivering(&mesh, "other").is_empty());
    }

    #[test]
    fn what_is_said() {
        let said = |paused, changed, delivering| text(&Said { route: "work".into(), paused, changed, delivering });
        assert_eq!(said(true, true, None), "route work is paused\n");
        assert_eq!(said(true, false, Some(Vec::new())), "route work was paused before, and stays so\n");
        assert_eq!(said(true, true, Some(vec!["a".into()])), "route work is paused\nstill delivering: a: see `mesh-ctl status`\n");
        assert_eq!(said(false, true, None), "route work goes on\n");
        assert_eq!(said(false, false, None), "route work was not paused\n");
    }
}
