//! `mesh-ctl pause` and `mesh-ctl resume`: a route delivers nothing for a while.

use std::collections::HashMap;

use mesh_proto::v1;
use serde::Serialize;

use super::{Context, looks, propose::whoami};
use crate::{
    client,
    flags::{Form, Pause, Resume},
    output::{Code, Failure},
};

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said {
    route: String,
    paused: bool,
    /// Whether it was otherwise before.
    changed: bool,
    /// With `--wait`: the instances that still deliver; absent, too, if that could not be learnt.
    #[serde(skip_serializing_if = "Option::is_none")]
    delivering: Option<Vec<String>>,
}

pub(super) async fn pause(context: &Context, flags: &Pause) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let message = v1::PauseRequest { route: flags.route.clone(), reason: flags.reason.clone().unwrap_or_default(), by: whoami() };
    let answer = client.pause(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?.into_inner();
    let mut said = Said { route: flags.route.clone(), paused: true, changed: answer.changed, delivering: None };
    if !flags.wait {
        return say(context, &said).map(|()| Code::Done);
    }
    let mut first = None;
    let left = |mesh: &v1::GetStatusResponse| {
        let first = first.get_or_insert_with(|| reported(mesh));
        delivering(mesh, &flags.route, first)
    };
    let mut unknown = None;
    match looks::until_nobody(context, &mut client, flags.timeout, left).await {
        Ok(left) => said.delivering = Some(left),
        Err(failure) => unknown = Some(failure),
    }
    say(context, &said)?;
    if let Some(failure) = unknown {
        // It is paused, whatever is known of the others.
        let message = format!("route {} is paused, but it is not known who still delivers: {}", said.route, failure.message());
        return Err(failure.with(Code::Unknown, message));
    }
    Ok(if said.delivering.is_some_and(|left| !left.is_empty()) { Code::Unknown } else { Code::Done })
}

pub(super) async fn resume(context: &Context, flags: &Resume) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let request = client::request(v1::ResumeRequest { route: flags.route.clone() }, client::APPLY);
    let answer = client.resume(request).await.map_err(|status| client::refused(&status))?.into_inner();
    say(context, &Said { route: flags.route.clone(), paused: false, changed: answer.changed, delivering: None })?;
    Ok(Code::Done)
}

/// When each instance reported last, in milliseconds.
fn reported(mesh: &v1::GetStatusResponse) -> HashMap<String, i64> {
    mesh.instances.iter().map(|instance| (instance.instance.clone(), instance.reported_ms)).collect()
}

/// The instances that may still deliver records of a route. One that is lost delivers nothing that could be committed. `first` is when they had
/// reported at the first look after the pause.
fn delivering(mesh: &v1::GetStatusResponse, route: &str, first: &HashMap<String, i64>) -> Vec<String> {
    let live = mesh.instances.iter().filter(|instance| instance.state() != v1::InstanceState::Lost);
    let delivers = |instance: &&v1::InstanceStatus| {
        let since = first.get(&instance.instance).is_none_or(|first| instance.reported_ms > *first);
        instance.routes.iter().any(|of| of.route == route && (of.in_flight > 0 || may_begin(of.state(), since)))
    };
    live.filter(delivers).map(|instance| instance.instance.clone()).collect()
}

/// Whether a route may begin another delivery. `since`: that state was reported after the pause.
fn may_begin(state: v1::RouteState, since: bool) -> bool {
    use v1::RouteState as State;
    match state {
        // What drains only finishes what is out.
        State::Paused | State::Draining => false,
        // A pause does not show behind these. Whoever still reports has read of it: both lie with the broker.
        State::WaitingForBroker | State::WaitingForTopic => !since,
        // These end with the pause, so it has not come there yet.
        State::Running | State::Joining | State::WaitingForService | State::Stopped | State::Unspecified => true,
    }
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
        use v1::RouteState as State;
        let instance = |name: &str, state: v1::RouteState, in_flight, reported_ms| v1::InstanceStatus {
            instance: name.into(),
            state: v1::InstanceState::Synced.into(),
            reported_ms,
            routes: vec![v1::RouteStatus { route: "work".into(), state: state.into(), in_flight, ..v1::RouteStatus::default() }],
            ..v1::InstanceStatus::default()
        };
        let lost = v1::InstanceStatus { state: v1::InstanceState::Lost.into(), ..instance("lost", State::Running, 1, 5) };
        let instances = vec![
            instance("paused", State::Paused, 0, 5),
            instance("finishing", State::Paused, 3, 5),
            instance("running", State::Running, 0, 5),
            instance("joining", State::Joining, 0, 5),
            instance("unserved", State::WaitingForService, 0, 5),
            instance("drained", State::Draining, 0, 5),
            instance("draining", State::Draining, 1, 5),
            instance("troubled", State::WaitingForBroker, 0, 5),
            instance("troubled, busy", State::WaitingForTopic, 1, 5),
            lost,
        ];
        let mesh = |reported_ms: i64| {
            let instances = instances.iter().cloned().map(|one| v1::InstanceStatus { reported_ms, ..one }).collect();
            v1::GetStatusResponse { instances, ..v1::GetStatusResponse::default() }
        };
        let first = reported(&mesh(5));
        let mut expected = vec!["finishing", "running", "joining", "unserved", "draining", "troubled", "troubled, busy"];
        assert_eq!(delivering(&mesh(5), "work", &first), expected, "what is in trouble was so before the pause");
        expected.retain(|name| *name != "troubled");
        assert_eq!(delivering(&mesh(6), "work", &first), expected);
        assert!(delivering(&mesh(6), "other", &first).is_empty());
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
