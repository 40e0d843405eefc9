//! `mesh-ctl history`: the generations that the mesh keeps.

use mesh_proto::v1;

use super::Context;
use crate::{
    client,
    flags::{Form, History},
    output::{Code, Columns, Failure, Style},
    view,
};

/// How much of a digest tells generations apart.
const DIGEST: usize = "sha256:".len() + 12;

pub(super) async fn run(context: &Context, flags: &History) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let request = client::request(v1::GetHistoryRequest { limit: flags.limit }, client::APPLY);
    let response = client.get_history(request).await.map_err(|status| client::refused(&status))?.into_inner();
    let history = view::History::new(response);
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &history)?,
        None | Some(Form::Table) => {
            context.print(&text(context, &history))?;
            for generation in &history.generations {
                if let Some(aborted) = &generation.aborted {
                    context.note(&format!("generation {} was {aborted}", generation.generation));
                }
            }
            for generation in history.generations.iter().filter(|generation| !generation.refused.is_empty()) {
                context.note(&format!("generation {} is refused by this sidecar: {}", generation.generation, generation.refused));
            }
        }
    }
    Ok(Code::Done)
}

fn text(context: &Context, history: &view::History) -> String {
    let plain = |text: &str| (text.to_owned(), Style::Plain);
    let mut columns =
        Columns::new(&["GENERATION", "STATE", "APPLIED", "BY", "FROM", "THROUGH", "ROUTES", "SIGNED BY", "DIGEST", "MESSAGE"]);
    for generation in &history.generations {
        let state = match generation {
            _ if !generation.refused.is_empty() => ("REFUSED".to_owned(), Style::Bad),
            _ if generation.aborted.is_some() => ("ABORTED".to_owned(), Style::Bad),
            _ if generation.canary.is_some() && generation.generation == history.generation => ("CANARY".to_owned(), Style::Warn),
            _ if generation.in_force => ("IN FORCE".to_owned(), Style::Good),
            _ => plain("-"),
        };
        let from = match (generation.rollback_to, generation.promotes) {
            (Some(old), _) => format!("rollback to {old}"),
            (None, Some(canary)) => format!("promotes {canary}"),
            (None, None) => generation.source.clone(),
        };
        let routes = match &generation.routes {
            Some(view::RouteCounts { added, changed, removed }) => format!("+{added} ~{changed} -{removed}"),
            None => "-".to_owned(),
        };
        let applied = if generation.digest.is_empty() { "-" } else { generation.applied.as_str() };
        columns.row(vec![
            plain(&generation.generation.to_string()),
            state,
            plain(applied),
            plain(or_dash(&generation.applied_by)),
            plain(or_dash(&from)),
            plain(or_dash(&generation.instance)),
            plain(&routes),
            plain(generation.signed_by.as_deref().unwrap_or("-")),
            plain(or_dash(generation.digest.get(..DIGEST).unwrap_or(&generation.digest))),
            plain(&generation.message),
        ]);
    }
    let mut out = String::new();
    if !context.quiet {
        let (mesh, generation) = (&history.mesh, history.generation);
        out += &match generation {
            0 => format!("mesh {mesh}, no table applied yet\n"),
            _ => format!("mesh {mesh}, generation {generation}, as seen from {}\n\n", context.admin),
        };
    }
    if history.generations.is_empty() { out } else { out + &columns.render(context.colours) }
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}
