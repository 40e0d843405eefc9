//! `mesh-ctl diff`: what applying a routing table would change.

use mesh_routing::ChangeKind;

use super::{Context, in_force};
use crate::{
    flags::{Diff, Form},
    output::{Code, Failure, Style, count},
};

pub(super) async fn run(context: &Context, flags: &Diff) -> Result<Code, Failure> {
    let table = flags.file.table(context)?;
    let (mut old, generation) = in_force(context).await?;
    if generation == 0 && old.routes.is_empty() && old.mesh.is_empty() {
        // There is no table yet: the name of the mesh is no change.
        old.mesh.clone_from(&table.mesh);
    }
    let changes = mesh_routing::diff(&old, &table);
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
            context.note(&match changes.len() {
                0 => format!("no difference from generation {generation}"),
                many => format!("{} from generation {generation}", count(many as u64, "difference")),
            });
        }
    }
    Ok(if changes.is_empty() { Code::Done } else { Code::No })
}
