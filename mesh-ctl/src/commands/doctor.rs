//! `mesh-ctl doctor`: what is wrong with the mesh, and how to mend it. The sidecar looks.

use std::time::{SystemTime, UNIX_EPOCH};

use mesh_proto::v1::{self, Severity};
use serde::Serialize;

use super::Context;
use crate::{
    client,
    flags::Form,
    output::{Code, Failure, Style, count},
};

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said {
    mesh: String,
    /// The instance that looked.
    instance: String,
    errors: u64,
    warnings: u64,
    findings: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct Finding {
    severity: &'static str,
    check: String,
    subject: String,
    what: String,
    fix: String,
}

impl From<v1::DiagnoseResponse> for Said {
    fn from(response: v1::DiagnoseResponse) -> Self {
        let finding = |finding: v1::Finding| Finding {
            severity: word(finding.severity()),
            check: finding.check,
            subject: finding.subject,
            what: finding.what,
            fix: finding.fix,
        };
        let findings: Vec<Finding> = response.findings.into_iter().map(finding).collect();
        let counted = |severity| findings.iter().filter(|finding| finding.severity == severity).count() as u64;
        Self { errors: counted("error"), warnings: counted("warning"), mesh: response.mesh, instance: response.instance, findings }
    }
}

fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Ok => "ok",
        // What a later version says deserves a look.
        Severity::Warning | Severity::Unspecified => "warning",
        Severity::Error => "error",
    }
}

pub(super) async fn run(context: &Context) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    context.progress_line("looking at brokers, topics, clocks, instances and routes …");
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|since| i64::try_from(since.as_millis()).ok()).unwrap_or(0);
    let response = client.diagnose(client::request(v1::DiagnoseRequest { now_ms }, client::APPLY)).await;
    context.progress_over();
    let said = Said::from(response.map_err(|status| client::refused(&status))?.into_inner());
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &said)?,
        None | Some(Form::Table) => context.print(&text(&said, context.colours, context.quiet))?,
    }
    Ok(if said.errors > 0 { Code::No } else { Code::Done })
}

/// Everything, the worst last: there the eye is. With `quiet` only what deserves something.
fn text(said: &Said, colours: bool, quiet: bool) -> String {
    // What others say may contain anything: a finding is a few lines, and drives no terminal.
    let clean = |text: &str| text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    let mut out = if quiet { String::new() } else { format!("mesh {}, as seen by {}\n\n", clean(&said.mesh), clean(&said.instance)) };
    for (severity, head, style) in [("ok", "OK", Style::Good), ("warning", "WARNING", Style::Warn), ("error", "ERROR", Style::Bad)] {
        for finding in said.findings.iter().filter(|finding| finding.severity == severity && !(quiet && severity == "ok")) {
            let pad = " ".repeat(9 - head.len());
            let subject = if finding.subject.is_empty() { String::new() } else { format!("{}: ", clean(&finding.subject)) };
            let check = format!("{:<13}", finding.check);
            out += &format!("{}{pad}{}  {subject}{}\n", style.paint(colours, head), clean(&check), clean(&finding.what));
            if !finding.fix.is_empty() {
                out += &format!("{}fix: {}\n", " ".repeat(24), clean(&finding.fix));
            }
        }
    }
    if !quiet {
        out += &format!("\n{}, {}\n", count(said.errors, "error"), count(said.warnings, "warning"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_comes_last_with_its_fix() {
        let finding = |severity: Severity, check: &str, subject: &str, what: &str, fix: &str| v1::Finding {
            severity: severity.into(),
            check: check.into(),
            subject: subject.into(),
            what: what.into(),
            fix: fix.into(),
        };
        let findings = vec![
            finding(Severity::Error, "routes", "price", "WAITING_FOR_SERVICE:\nrefused", "start it"),
            finding(Severity::Ok, "brokers", "", "1 broker answers", ""),
            finding(Severity::Warning, "clocks", "mesh-ctl", "4.0 s behind", "synchronise"),
        ];
        let said = Said::from(v1::DiagnoseResponse { mesh: "shop".into(), instance: "a".into(), findings });
        assert_eq!(
            text(&said, false, false),
            "mesh shop, as seen by a\n\n\
             OK       brokers        1 broker answers\n\
             WARNING  clocks         mesh-ctl: 4.0 s behind\n                        fix: synchronise\n\
             ERROR    routes         price: WAITING_FOR_SERVICE: refused\n                        fix: start it\n\n\
             1 error, 1 warning\n"
        );
        assert!(!text(&said, false, true).contains("OK"), "{}", text(&said, false, true));
        assert_eq!((said.errors, said.warnings, said.findings[0].severity), (1, 1, "error"));
    }
}
