//! `mesh-ctl validate`: checks routing tables, without a sidecar.

use super::{Context, fault};
use crate::{
    flags::{Form, Validate},
    output::{Code, Failure, Style, count},
    view,
};

pub(super) fn run(context: &Context, flags: &Validate) -> Result<Code, Failure> {
    let mut results = Vec::new();
    for source in &flags.files {
        results.push(check(&source.name(), &source.read()?));
    }
    let all_valid = results.iter().all(|result| result.valid);
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &results)?,
        None | Some(Form::Table) => {
            for result in &results {
                context.print(&text(context, result))?;
            }
        }
    }
    Ok(if all_valid { Code::Done } else { Code::No })
}

fn check(name: &str, text: &str) -> view::Validated {
    let (valid, routes, digest, faults, warnings) = match mesh_routing::load(name, text) {
        Ok((table, compiled)) => (true, table.routes.len(), compiled.digest.to_string(), Vec::new(), table.warnings()),
        Err(faults) => (false, 0, String::new(), faults.0, Vec::new()),
    };
    let in_file = |mut fault: mesh_routing::Fault| {
        name.clone_into(&mut fault.file);
        view::Fault::from(fault)
    };
    view::Validated {
        file: name.to_owned(),
        valid,
        routes,
        digest,
        faults: faults.into_iter().map(in_file).collect(),
        warnings: warnings.into_iter().map(in_file).collect(),
    }
}

fn text(context: &Context, result: &view::Validated) -> String {
    let mut out = String::new();
    for found in &result.faults {
        out += &format!("{}\n", fault(found, "error", Style::Bad, context.colours));
    }
    if context.quiet {
        return out;
    }
    for found in &result.warnings {
        out += &format!("{}\n", fault(found, "warning", Style::Warn, context.colours));
    }
    let (style, verdict) = if result.valid { (Style::Good, "valid") } else { (Style::Bad, "not valid") };
    let verdict = style.paint(context.colours, verdict);
    let mut said = match result.valid {
        true => format!("{verdict}, {}", count(result.routes as u64, "route")),
        false => format!("{verdict}, {}", count(result.faults.len() as u64, "fault")),
    };
    if !result.warnings.is_empty() {
        said += &format!(", {}", count(result.warnings.len() as u64, "warning"));
    }
    if result.valid {
        said += &format!(", {}", result.digest);
    }
    out + &format!("{}: {said}\n", result.file)
}
