//! `mesh-ctl get`: prints a routing table so that it can be edited and applied again.

use mesh_proto::v1;
use mesh_routing::To;

use super::Context;
use crate::{
    client,
    flags::{Form, Get},
    output::{Code, Columns, Failure, Style},
    view,
};

pub(super) async fn run(context: &Context, flags: &Get) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let request = client::request(v1::GetTableRequest { generation: flags.generation }, client::ASK);
    let response = client.get_table(request).await.map_err(|status| client::refused(&status))?.into_inner();
    let parsed = mesh_routing::parse("the table in force", &response.json);
    // A newer table than this version can read is still printed as it is.
    let raw = || {
        serde_json::from_str::<serde_json::Value>(&response.json)
            .map_err(|error| Failure::new(format!("the sidecar's answer is not JSON: {error}"), ""))
    };
    match context.form {
        Some(Form::Json) => context.print_document(Form::Json, &raw()?)?,
        None | Some(Form::Yaml) => {
            if !context.quiet {
                context.print(&format!("# {}\n", place(&response)))?;
            }
            match &parsed {
                Ok(table) => context.print(&format!("{}\n", table.to_yaml().trim_end()))?,
                Err(_) => context.print_document(Form::Yaml, &raw()?)?,
            }
        }
        Some(Form::Table) => {
            let table = parsed.map_err(|faults| {
                Failure::new(format!("this version of mesh-ctl cannot read the table: {faults}"), "`-o json` prints it as it is")
            })?;
            let mut columns = Columns::new(&["ROUTE", "SERVICE", "FROM", "TO"]);
            for route in &table.routes {
                let fields = table.resolved(route);
                let to = match fields.to {
                    Some(To::Topics(topics)) => topics.join(","),
                    Some(To::Void) => "void".to_owned(),
                    None => String::new(),
                };
                let cells = [route.name.clone(), fields.service.unwrap_or_default(), fields.from.unwrap_or_default().join(","), to];
                columns.row(cells.into_iter().map(|cell| (cell, Style::Plain)).collect());
            }
            if !context.quiet {
                context.print(&format!("{}\n\n", place(&response)))?;
            }
            context.print(&columns.render(context.colours))?;
        }
    }
    Ok(Code::Done)
}

/// Where the table stands in history, in words.
fn place(response: &v1::GetTableResponse) -> String {
    let (generation, digest) = (response.generation, &response.digest);
    match response.origin() {
        v1::TableOrigin::Pinned => format!("pinned by the sidecar's config, {digest}"),
        v1::TableOrigin::Cache => format!("generation {generation}, from the copy on disk: the mesh may have a newer one, {digest}"),
        v1::TableOrigin::Mesh | v1::TableOrigin::Unspecified => {
            let entry = response.entry.clone().unwrap_or_default();
            let by = if entry.applied_by.is_empty() { String::new() } else { format!(" by {}", entry.applied_by) };
            let signed = entry.signature.map(|signature| format!(", signed by key {}", signature.key_id)).unwrap_or_default();
            let said = format!("generation {generation}, applied {}{by}{signed}, {digest}", view::time(response.applied_ms));
            // It stands in a comment of YAML: one line, whatever somebody wrote about himself.
            said.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
        }
    }
}
