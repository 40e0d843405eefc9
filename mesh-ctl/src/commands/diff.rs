//! `mesh-ctl diff`: what differs between two tables: files, generations, the one in force.

use mesh_proto::v1;
use mesh_routing::{ChangeKind, Table};

use super::{Context, in_force};
use crate::{
    client,
    flags::{Diff, Form, Side, Source},
    output::{Code, Failure, Style, count},
};

pub(super) async fn run(context: &Context, flags: &Diff) -> Result<Code, Failure> {
    let from = flags.from.clone().or_else(|| flags.generation.map(Side::Generation)).unwrap_or(Side::Live);
    let to = flags.to.clone().or_else(|| flags.file.clone().map(Side::File)).unwrap_or(Side::Live);
    if from == Side::File(Source::Stdin) && from == to {
        return Err(Failure::new("stdin cannot be both sides", "name a file for one of them"));
    }
    let (new, new_name) = side(context, &to).await?;
    let (mut old, old_name) = side(context, &from).await?;
    if old_name == NOTHING && old.mesh.is_empty() {
        // There is no table yet: the name of the mesh is no change.
        old.mesh.clone_from(&new.mesh);
    }
    let changes = mesh_routing::diff(&old, &new);
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &changes)?,
        None | Some(Form::Table) => {
            for change in &changes {
                let style = match change.kind {
                    ChangeKind::Added => Style::Good,
                    ChangeKind::Removed => Style::Bad,
                    ChangeKind::Changed => Style::Warn,
                };
                context.print(&format!("{}\n", style.paint(context.colours, change)))?;
            }
            let found = match changes.len() {
                0 => "no difference".to_owned(),
                many => count(many as u64, "difference"),
            };
            context.note(&match &to {
                Side::File(_) => format!("{found} from {old_name}"),
                Side::Live | Side::Generation(_) => format!("{found} from {old_name} to {new_name}"),
            });
        }
    }
    Ok(if changes.is_empty() { Code::Done } else { Code::No })
}

/// What a mesh without a table is called.
const NOTHING: &str = "generation 0";

/// A side's table, and what it is called.
async fn side(context: &Context, side: &Side) -> Result<(Table, String), Failure> {
    match side {
        Side::File(source) => Ok((source.table(context)?, source.name())),
        Side::Live => {
            let (table, generation) = in_force(context).await?;
            Ok((table, format!("generation {generation}")))
        }
        Side::Generation(generation) => {
            let mut client = client::connect(&context.admin).await?;
            let request = client::request(v1::GetTableRequest { generation: Some(*generation) }, client::ASK);
            let response = client.get_table(request).await.map_err(|status| client::refused(&status))?.into_inner();
            let name = format!("generation {generation}");
            let table = mesh_routing::parse(&name, &response.json).map_err(|faults| {
                Failure::new(
                    format!("{name} cannot be read by this version of mesh-ctl: {faults}"),
                    format!("`mesh-ctl get --generation {generation} -o json` prints it as it is"),
                )
            })?;
            Ok((table, name))
        }
    }
}
