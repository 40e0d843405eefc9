//! Proposes a table to the mesh, signed if there is a key: what `apply`, `rollback` and `rollout promote` have in common.
//!
//! Invariant: what is signed is what this program read itself, and the sidecar reads the same: a signature is never made for a digest
//! that somebody else computed.

use mesh_proto::v1;
use mesh_routing::{
    channel::{Channel, Selector},
    sign::{Signed, SigningKey},
};

use super::{Context, fault, keys, wait};
use crate::{
    client::{self, Client},
    flags::{Form, How},
    output::{Code, Failure, Style, count},
    view,
};

/// A table on its way to the mesh.
pub(super) struct Proposal<'a> {
    /// What its text is called.
    pub(super) name: String,
    /// The text.
    pub(super) text: String,
    /// The generation that must be in force; `None`: whichever is.
    pub(super) expected: Option<u64>,
    /// The generation whose content it is, in a rollback.
    pub(super) rollback_to: Option<u64>,
    /// Who runs it before all do.
    pub(super) canary: Option<Canary>,
    /// The canary that it is, for all.
    pub(super) promotes: Option<u64>,
    /// How it is applied.
    pub(super) how: &'a How,
}

/// Who runs a table before all do, and when that is aborted.
pub(super) struct Canary {
    pub(super) selector: Selector,
    pub(super) max_dead_letters: u64,
    pub(super) max_refusals: u64,
}

impl<'a> Proposal<'a> {
    /// A table for all, whatever is in force.
    pub(super) fn new(name: String, text: String, how: &'a How) -> Self {
        Self { name, text, expected: None, rollback_to: None, canary: None, promotes: None, how }
    }
}

/// Proposes a table, says what came of it, and waits for the mesh if told so.
pub(super) async fn run(context: &Context, client: &mut Client, proposal: Proposal<'_>) -> Result<Code, Failure> {
    let how = proposal.how;
    let (expected, signature) = match &how.sign_key {
        None => (proposal.expected, None),
        Some(file) => {
            let key = keys::read(context, file)?;
            match sign(client, &proposal, &key).await? {
                Ok((base, signature)) => (Some(base), Some(signature)),
                Err(faults) => {
                    let applied = view::Applied { faults, ..view::Applied::new(v1::ApplyResponse::default(), how.dry_run) };
                    return conclude(context, &proposal, &applied);
                }
            }
        }
    };
    let signed_by = signature.as_ref().map(|signature| signature.key_id.clone());
    let message = v1::ApplyRequest {
        table: Some(v1::TableSource { file: proposal.name.clone(), text: proposal.text.clone() }),
        expected_generation: expected,
        dry_run: how.dry_run,
        signature,
        applied_by: whoami(),
        message: how.message.clone().unwrap_or_default(),
        rollback_to: proposal.rollback_to.unwrap_or(0),
        canary: proposal.canary.as_ref().map(|canary| v1::Canary {
            selector: canary.selector.to_string(),
            max_dead_letters: canary.max_dead_letters,
            max_refusals: canary.max_refusals,
        }),
        promotes: proposal.promotes.unwrap_or(0),
    };
    let response = client.apply(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let applied = view::Applied {
        signed_by,
        rollback_to: proposal.rollback_to,
        canary: proposal.canary.as_ref().map(|canary| canary.selector.to_string()),
        promotes: proposal.promotes,
        ..view::Applied::new(response.into_inner(), how.dry_run)
    };
    let code = conclude(context, &proposal, &applied)?;
    if how.wait {
        wait::run(context, client, applied.generation, how.timeout).await?;
    }
    Ok(code)
}

/// Signs the table as the generation after the one that it builds on, and tells which that is; or the table's faults.
async fn sign(
    client: &mut Client,
    proposal: &Proposal<'_>,
    key: &SigningKey,
) -> Result<Result<(u64, v1::TableSignature), Vec<view::Fault>>, Failure> {
    let table = match mesh_routing::parse(&proposal.name, &proposal.text) {
        Ok(table) => table,
        Err(faults) => return Ok(Err(faults.0.into_iter().map(view::Fault::from).collect())),
    };
    let digest = table.digest();
    let source = v1::TableSource { file: proposal.name.clone(), text: proposal.text.clone() };
    let request = client::request(v1::ValidateRequest { table: Some(source) }, client::ASK);
    let checked = client.validate(request).await.map_err(|status| client::refused(&status))?.into_inner();
    if !checked.faults.is_empty() {
        return Ok(Err(checked.faults.into_iter().map(view::Fault::from).collect()));
    }
    if checked.digest != digest {
        return Err(Failure::new(
            format!("this sidecar reads {} as {}, and mesh-ctl as {digest}: nothing was signed", proposal.name, checked.digest),
            "use a mesh-ctl of the sidecar's version",
        ));
    }
    let request = client::request(v1::GetHistoryRequest { limit: 1 }, client::ASK);
    let newest = client.get_history(request).await.map_err(|status| client::refused(&status))?.into_inner().generation;
    let base = proposal.expected.unwrap_or(newest);
    let channel = proposal.canary.as_ref().map_or(Channel::Stable, |canary| Channel::Canary(canary.selector.clone())).to_string();
    let signed = Signed { mesh: &table.mesh, channel: &channel, generation: base.saturating_add(1), digest: &digest };
    Ok(Ok((base, v1::TableSignature { key_id: key.public().id().to_owned(), ed25519: key.sign(&signed).into() })))
}

/// Says what came of it.
fn conclude(context: &Context, proposal: &Proposal<'_>, applied: &view::Applied) -> Result<Code, Failure> {
    let refused = !applied.faults.is_empty();
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, applied)?,
        None | Some(Form::Table) if refused => {
            for found in &applied.faults {
                context.say(&fault(found, "error", Style::Bad, context.error_colours));
            }
        }
        None | Some(Form::Table) => {
            context.warn(&applied.warnings);
            context.print(&said(context, applied))?;
        }
    }
    if !refused {
        return Ok(Code::Done);
    }
    let faults = count(applied.faults.len() as u64, "fault");
    Err(Failure::Said {
        code: Code::No,
        message: format!("{} has {faults}: nothing was applied, and the last good table stays in force", proposal.name),
        hint: String::new(),
    })
}

/// What was done, in words.
fn said(context: &Context, applied: &view::Applied) -> String {
    let mut out = String::new();
    if !context.quiet {
        for change in &applied.changes {
            let style = match change.chars().next() {
                Some('+') => Style::Good,
                Some('-') => Style::Bad,
                _ => Style::Warn,
            };
            out += &format!("{}\n", style.paint(context.colours, change));
        }
        let verb = if applied.dry_run { "would begin" } else { "begins" };
        for new in &applied.new_routes {
            out += &format!("route {} {verb} with {}\n", new.route, count(new.records, "existing record"));
        }
    }
    let view::Applied { generation, digest, .. } = applied;
    let content = match (applied.rollback_to, applied.promotes, &applied.canary) {
        (Some(old), ..) => format!(", the content of generation {old}"),
        (None, Some(canary), _) => format!(", the canary of generation {canary}, for all"),
        (None, None, Some(selector)) => format!(", a canary for {selector}"),
        (None, None, None) => String::new(),
    };
    out + &match (applied.dry_run, applied.changed) {
        (true, _) if applied.changes.is_empty() => format!("dry run: generation {generation} is this table already ({digest})\n"),
        (true, _) => format!("dry run: nothing was applied, generation {generation} stays in force\n"),
        (false, true) => format!("applied generation {generation}{content} ({digest})\n"),
        (false, false) => format!("unchanged: generation {generation} is this table already ({digest})\n"),
    }
}

/// The user of this process by the system's own files: the name, or the number where it has none.
fn system_user() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let id = status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.to_owned();
    let names = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = names.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == id && !name.is_empty()).then(|| name.to_owned())
    });
    Some(name.unwrap_or_else(|| format!("uid-{id}")))
}

/// Who runs this, for the history: `user@host`, as far as it is known.
pub(super) fn whoami() -> String {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let file = |path: &str| Some(std::fs::read_to_string(path).ok()?.trim().to_owned()).filter(|name| !name.is_empty());
    // A container often has none of these.
    let user = variable("USER").or_else(|| variable("LOGNAME")).or_else(|| variable("USERNAME")).or_else(system_user);
    let host = variable("HOSTNAME").or_else(|| file("/proc/sys/kernel/hostname")).or_else(|| file("/etc/hostname"));
    match (user, host) {
        (Some(user), Some(host)) => format!("{user}@{host}"),
        (user, host) => user.or_else(|| host.map(|host| format!("@{host}"))).unwrap_or_default(),
    }
}
