//! `mesh-ctl apply`: applies a routing table to the whole mesh, and waits for it if told so.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use mesh_proto::v1;

use super::{Context, fault};
use crate::{
    client::{self, Client},
    flags::{Apply, Form},
    output::{Code, Failure, Style, count},
    view,
};

/// How often the state is asked for.
const LOOK: Duration = Duration::from_millis(300);

pub(super) async fn run(context: &Context, flags: &Apply) -> Result<Code, Failure> {
    let text = flags.file.read()?;
    let mut client = client::connect(&context.admin).await?;
    let message = v1::ApplyRequest {
        table: Some(v1::TableSource { file: flags.file.name(), text }),
        expected_generation: flags.expect_generation,
        dry_run: flags.dry_run,
    };
    let response = client.apply(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let applied = view::Applied::new(response.into_inner(), flags.dry_run);
    let refused = !applied.faults.is_empty();

    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &applied)?,
        None | Some(Form::Table) if refused => {
            for found in &applied.faults {
                context.say(&fault(found, "error", Style::Bad, context.error_colours));
            }
        }
        None | Some(Form::Table) => {
            context.warn(&applied.warnings);
            context.print(&said(context, &applied))?;
        }
    }
    if refused {
        return Err(Failure::Said {
            code: Code::No,
            message: format!(
                "{} has {}: nothing was applied, and the last good table stays in force",
                flags.file.name(),
                count(applied.faults.len() as u64, "fault")
            ),
            hint: String::new(),
        });
    }
    if flags.wait {
        wait(context, &mut client, applied.generation, flags.timeout).await?;
    }
    Ok(Code::Done)
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
    out + &match (applied.dry_run, applied.changed) {
        (true, _) if applied.changes.is_empty() => format!("dry run: generation {generation} is this table already ({digest})\n"),
        (true, _) => format!("dry run: nothing was applied, generation {generation} stays in force\n"),
        (false, true) => format!("applied generation {generation} ({digest})\n"),
        (false, false) => format!("unchanged: generation {generation} is this table already ({digest})\n"),
    }
}

/// What an instance's state means for the waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// It runs the table.
    There,
    /// It does not yet.
    Pending,
    /// It refuses it.
    Refused,
    /// It takes no part: lost or pinned.
    Apart,
}

fn stand(instance: &v1::InstanceStatus, generation: u64) -> Stand {
    match instance.state() {
        v1::InstanceState::Lost | v1::InstanceState::Pinned => Stand::Apart,
        v1::InstanceState::Nacked if instance.refused_generation >= generation => Stand::Refused,
        v1::InstanceState::Synced if instance.generation >= generation => Stand::There,
        _ => Stand::Pending,
    }
}

/// Waits until all live instances run the generation.
async fn wait(context: &Context, client: &mut Client, generation: u64, limit: Duration) -> Result<(), Failure> {
    let begin = Instant::now();
    loop {
        let request = client::request(v1::GetStatusRequest {}, client::ASK);
        let status = match client.get_status(request).await {
            Ok(status) => status.into_inner(),
            // The table is applied, whatever happens to this sidecar: it may come back.
            Err(status) if begin.elapsed() < limit => {
                progress(context, &format!("the sidecar does not answer: {}", status.message()));
                tokio::time::sleep(LOOK).await;
                continue;
            }
            Err(status) => {
                progress(context, "");
                return Err(Failure::Said {
                    code: Code::Unknown,
                    message: format!("generation {generation} is applied, but the sidecar does not tell who runs it: {}", status.message()),
                    hint: "ask another sidecar: `mesh-ctl status --admin URL`".into(),
                });
            }
        };
        let of = |wanted: Stand| status.instances.iter().filter(move |instance| stand(instance, generation) == wanted);
        let (there, pending) = (of(Stand::There).count(), of(Stand::Pending).count());
        progress(context, &format!("{there} of {} run generation {generation}", count((there + pending) as u64, "instance")));

        let refused: Vec<_> = of(Stand::Refused).map(|instance| format!("{}: {}", instance.instance, instance.error)).collect();
        if !refused.is_empty() {
            progress(context, "");
            return Err(Failure::Said {
                code: Code::No,
                message: format!(
                    "{} refused generation {generation} and run the last good table:\n  {}",
                    count(refused.len() as u64, "instance"),
                    refused.join("\n  ")
                ),
                hint: "correct the table, or update the sidecars, and apply again".into(),
            });
        }
        if pending == 0 {
            progress(context, "");
            for apart in of(Stand::Apart) {
                let state = apart.state().as_str_name().trim_start_matches("INSTANCE_STATE_");
                context.note(&format!("instance {} was not waited for: {state}", apart.instance));
            }
            context.note(&format!("{} run generation {generation}", count(there as u64, "instance")));
            return Ok(());
        }
        if begin.elapsed() >= limit {
            progress(context, "");
            let names: Vec<_> = of(Stand::Pending).map(|instance| instance.instance.as_str()).collect();
            return Err(Failure::Said {
                code: Code::Unknown,
                message: format!(
                    "generation {generation} is applied, but after {} these do not run it yet: {}",
                    humantime::format_duration(limit),
                    names.join(", ")
                ),
                hint: "`mesh-ctl status` tells what they wait for".into(),
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Replaces the line of progress; an empty one takes it away.
fn progress(context: &Context, text: &str) {
    if context.progress {
        let mut err = std::io::stderr().lock();
        drop(write!(err, "\r\x1b[K{text}").and_then(|()| err.flush()));
    }
}
