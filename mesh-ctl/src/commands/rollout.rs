//! `mesh-ctl rollout`: a table that some instances run before all do.
//!
//! Invariant: what is promoted is the table of the canary that was open when the command began, or nothing.

use mesh_proto::v1;
use serde::Serialize;

use super::{
    Context, keys,
    looks::{self, Looks},
    propose::{self, Proposal, whoami},
    rollback,
};
use crate::{
    client::{self, Client},
    flags::{Form, Rollout, RolloutAbort, RolloutPromote, RolloutStatus},
    output::{Code, Columns, Failure, Style, count},
    view,
};

pub(super) async fn run(context: &Context, command: &Rollout) -> Result<Code, Failure> {
    match command {
        Rollout::Status(flags) => status(context, flags).await,
        Rollout::Promote(flags) => promote(context, flags).await,
        Rollout::Abort(flags) => abort(context, flags).await,
    }
}

/// What `rollout status` prints.
#[derive(Debug, Serialize)]
struct Shown {
    mesh: String,
    /// `NONE`, `OPEN` or `ABORTED`.
    state: &'static str,
    rollout: Option<view::Rollout>,
    /// Those that run it, or ought to.
    instances: Vec<Member>,
}

#[derive(Debug, Serialize)]
struct Member {
    instance: String,
    state: &'static str,
    generation: u64,
    dead_letters: u64,
    error: String,
}

impl Shown {
    fn new(response: v1::GetStatusResponse) -> Self {
        let mesh = view::Mesh::new(response, None);
        let canary = mesh.rollout.as_ref().map_or(u64::MAX, |rollout| rollout.generation);
        let of = |instance: &view::Instance| {
            instance.target_generation == canary || instance.generation == canary || instance.refused_generation == canary
        };
        let members = mesh.instances.into_iter().filter(of).map(|instance| Member {
            instance: instance.instance,
            state: instance.state,
            generation: instance.generation,
            dead_letters: instance.canary_dead_letters,
            error: instance.error,
        });
        let instances = members.collect();
        let state = mesh.rollout.as_ref().map_or("NONE", |rollout| rollout.state);
        Self { mesh: mesh.mesh, state, rollout: mesh.rollout, instances }
    }
}

async fn status(context: &Context, flags: &RolloutStatus) -> Result<Code, Failure> {
    let looks = Looks { every: flags.watch, count: flags.count };
    let look = async |client: &mut Client| Ok::<_, Failure>(Shown::new(client::status(client, flags.watch.is_some()).await?));
    let show = |shown: &Shown, again| looks.print(context, again, shown, || text(context.colours, shown));
    looks.run(context, look, show).await
}

fn text(colours: bool, shown: &Shown) -> String {
    let Some(rollout) = &shown.rollout else {
        return "no rollout: the newest table is meant for all\n".to_owned();
    };
    let style = if rollout.aborted.is_some() { Style::Bad } else { Style::Good };
    let view::Rollout { generation, stable_generation, selector, .. } = rollout;
    let others = if rollout.aborted.is_some() { "all run" } else { "the others run" };
    let mut out =
        format!("generation {generation}, a canary: {}; {others} generation {stable_generation}\n", style.paint(colours, rollout.state));
    let clean = |text: &str| -> String { text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect() };
    let mut line = |name: &str, value: &str| out += &format!("  {name:<13} {}\n", clean(value));
    line("for", selector);
    line("applied", &format!("{} by {}", rollout.applied, rollout.applied_by));
    if !rollout.message.is_empty() {
        line("message", &rollout.message);
    }
    line("dead letters", &format!("{}, of at most {}", rollout.dead_letters, rollout.max_dead_letters));
    line("refusals", &format!("{}, of at most {}", rollout.refusals, rollout.max_refusals));
    if let Some(aborted) = &rollout.aborted {
        line("ended", aborted);
    }
    if shown.instances.is_empty() {
        return out;
    }
    let plain = |text: &str| (text.to_owned(), Style::Plain);
    let mut columns = Columns::new(&["INSTANCE", "STATE", "GENERATION", "DEAD LETTERS", "NOTE"]);
    for member in &shown.instances {
        let style = match member.state {
            "SYNCED" => Style::Good,
            "NACKED" | "DRIFT" | "LOST" => Style::Bad,
            _ => Style::Warn,
        };
        columns.row(vec![
            plain(&member.instance),
            (member.state.to_owned(), style),
            plain(&member.generation.to_string()),
            plain(&member.dead_letters.to_string()),
            plain(&member.error),
        ]);
    }
    out + "\n" + &columns.render(colours)
}

/// The canary that is open.
fn open(status: v1::GetStatusResponse, wanted: Option<u64>) -> Result<(u64, Vec<v1::InstanceStatus>), Failure> {
    let said = |code, message: String| Failure::Said { code, message, hint: "`mesh-ctl rollout status` tells what there is".to_owned() };
    let Some(rollout) = status.rollout else { return Err(said(Code::No, "no rollout is open".to_owned())) };
    let aborted = rollout.entry.map(|entry| entry.aborted).unwrap_or_default();
    if !aborted.is_empty() {
        return Err(said(Code::No, format!("no rollout is open: generation {} was {aborted}", rollout.generation)));
    }
    match wanted.filter(|wanted| *wanted != rollout.generation) {
        Some(wanted) => Err(said(Code::Conflict, format!("generation {wanted} is not the canary: generation {} is", rollout.generation))),
        None => Ok((rollout.generation, status.instances)),
    }
}

async fn promote(context: &Context, flags: &RolloutPromote) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let (generation, instances) = open(client::status(&mut client, false).await?, flags.generation)?;
    let behind = instances.iter().filter(|one| one.target_generation == generation && one.state() != v1::InstanceState::Synced).count();
    if behind > 0 {
        context.note(&format!("not run yet by {} of the canary", count(behind as u64, "instance")));
    }
    let request = client::request(v1::GetTableRequest { generation: Some(generation) }, client::ASK);
    let table = client.get_table(request).await.map_err(|status| client::refused(&status))?.into_inner();
    if let Some(file) = &flags.how.sign_key {
        rollback::note_unknown(context, &keys::read(context, file)?.public(), &table);
    }
    let expected = Some(flags.how.expect_generation.unwrap_or(generation));
    let name = format!("generation {generation}");
    let proposal = Proposal { expected, promotes: Some(generation), ..Proposal::new(name, table.json, &flags.how) };
    propose::run(context, &mut client, proposal).await
}

/// What `rollout abort` prints.
#[derive(Debug, Serialize)]
struct Aborted {
    generation: u64,
    stable_generation: u64,
    /// With `--wait`: the instances that still run it; absent, too, if that could not be learnt.
    #[serde(skip_serializing_if = "Option::is_none")]
    running: Option<Vec<String>>,
}

async fn abort(context: &Context, flags: &RolloutAbort) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let message = v1::AbortRolloutRequest {
        generation: flags.generation.unwrap_or(0),
        reason: flags.reason.clone().unwrap_or_default(),
        by: whoami(),
    };
    let answer = client.abort_rollout(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let v1::AbortRolloutResponse { generation, stable_generation } = answer.into_inner();
    let mut aborted = Aborted { generation, stable_generation, running: None };
    let mut unknown = None;
    if flags.wait {
        let left = |mesh: &v1::GetStatusResponse| {
            let running = mesh.instances.iter().filter(|one| one.generation == generation && one.state() != v1::InstanceState::Lost);
            running.map(|one| one.instance.clone()).collect()
        };
        match looks::until_nobody(context, &mut client, flags.timeout, left).await {
            Ok(left) => aborted.running = Some(left),
            Err(failure) => unknown = Some(failure),
        }
    }
    let left = aborted.running.as_ref().filter(|left| !left.is_empty());
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &aborted)?,
        None | Some(Form::Table) => {
            let mut out = format!("aborted: generation {generation} is over, all go back to generation {stable_generation}\n");
            if let Some(left) = left {
                out += &format!("still running it: {}: see `mesh-ctl status`\n", left.join(", "));
            }
            context.print(&out)?;
        }
    }
    if let Some(failure) = unknown {
        // It is over, whatever is known of the others.
        let message = format!("generation {generation} is aborted, but it is not known who still runs it: {}", failure.message());
        return Err(failure.with(Code::Unknown, message));
    }
    Ok(if left.is_some() { Code::Unknown } else { Code::Done })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(aborted: &str) -> v1::GetStatusResponse {
        let instance = |name: &str, state: v1::InstanceState, generation, target_generation| v1::InstanceStatus {
            instance: name.to_owned(),
            state: state.into(),
            generation,
            target_generation,
            ..v1::InstanceStatus::default()
        };
        let refusing =
            v1::InstanceStatus { refused_generation: 8, error: "too new".to_owned(), ..instance("b", v1::InstanceState::Nacked, 7, 8) };
        let entry = v1::Generation {
            generation: 8,
            applied_ms: 1_700_000_000_000,
            applied_by: "ann@desk".to_owned(),
            aborted: aborted.to_owned(),
            ..v1::Generation::default()
        };
        let canary = v1::Canary { selector: "service=pricing percent=10".to_owned(), max_dead_letters: 5, max_refusals: 0 };
        let rollout =
            v1::Rollout { generation: 8, stable_generation: 7, canary: Some(canary), dead_letters: 2, refusals: 1, entry: Some(entry) };
        let one = v1::InstanceStatus { canary_dead_letters: 2, ..instance("a", v1::InstanceState::Synced, 8, 8) };
        let instances = vec![one, refusing, instance("c", v1::InstanceState::Synced, 7, 7)];
        v1::GetStatusResponse { mesh: "shop".to_owned(), generation: 8, instances, instance: "a".to_owned(), rollout: Some(rollout) }
    }

    #[test]
    fn what_is_shown() {
        let expected = "\
generation 8, a canary: OPEN; the others run generation 7
  for           service=pricing percent=10
  applied       2023-11-14T22:13:20Z by ann@desk
  dead letters  2, of at most 5
  refusals      1, of at most 0

INSTANCE  STATE   GENERATION  DEAD LETTERS  NOTE
a         SYNCED  8           2
b         NACKED  7           0             too new
";
        assert_eq!(text(false, &Shown::new(response(""))), expected);
        let over = text(false, &Shown::new(response("aborted by ann: no")));
        assert!(over.contains("ABORTED; all run generation 7\n") && over.contains("  ended         aborted by ann: no\n"), "{over}");
        let none = Shown::new(v1::GetStatusResponse { rollout: None, ..response("") });
        assert_eq!((none.state, none.instances.len()), ("NONE", 0));
        assert!(text(false, &none).starts_with("no rollout"));
    }

    #[test]
    fn only_an_open_one_is_promoted() {
        assert_eq!(open(response(""), None).unwrap().0, 8);
        assert_eq!(open(response(""), Some(7)).unwrap_err().code(), Code::Conflict);
        assert_eq!(open(response("aborted"), None).unwrap_err().code(), Code::No);
        assert_eq!(open(v1::GetStatusResponse::default(), None).unwrap_err().code(), Code::No);
    }
}
