//! `mesh-ctl graph`: draws the routes, of a file or of the mesh.

use super::{Context, in_force};
use crate::{
    flags::{Graph, GraphFormat},
    output::{Code, Failure},
};

pub(super) async fn run(context: &Context, flags: &Graph) -> Result<Code, Failure> {
    let table = match &flags.file {
        Some(source) => source.table(context)?,
        None => in_force(context).await?.0,
    };
    let format = match flags.format {
        GraphFormat::Text => mesh_routing::GraphFormat::Text,
        GraphFormat::Mermaid => mesh_routing::GraphFormat::Mermaid,
        GraphFormat::Dot => mesh_routing::GraphFormat::Dot,
    };
    context.print(&format!("{}\n", mesh_routing::graph(&table, format).trim_end()))?;
    Ok(Code::Done)
}
