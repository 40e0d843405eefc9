//! `mesh-ctl release`: lets records go on whose attempts are used up.

use mesh_proto::v1;
use serde::Serialize;

use super::Context;
use crate::{
    client,
    flags::{Form, Release},
    output::{Code, Failure, Style, count},
};

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said {
    route: String,
    released: u64,
    discarded: bool,
    missing: Vec<String>,
    reason: String,
}

pub(super) async fn run(context: &Context, flags: &Release) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let message = v1::ReleaseRequest {
        route: flags.route.clone(),
        one_key: flags.no_key || flags.key.is_some(),
        key: flags.key.clone().map(Into::into),
        discard: flags.discard,
        // 0 would be the usual time.
        wait_ms: u64::try_from(flags.timeout.as_millis()).unwrap_or(u64::MAX).max(1),
    };
    let request = client::request(message, flags.timeout + client::ASK);
    let answer = client.release(request).await.map_err(|status| client::refused(&status))?.into_inner();
    let v1::ReleaseResponse { released, missing, reason } = answer;
    let said = Said { route: flags.route.clone(), released, discarded: flags.discard, missing, reason };
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &said)?,
        None | Some(Form::Table) => context.print(&text(context, &said))?,
    }
    Ok(if said.missing.is_empty() { Code::Done } else { Code::Unknown })
}

fn text(context: &Context, said: &Said) -> String {
    let what = if said.discarded { "sent to the dead letters" } else { "released, to be tried again" };
    let mut out = format!("route {}: {} {what}\n", said.route, count(said.released, "record"));
    if !said.missing.is_empty() {
        let missing = Style::Bad.paint(context.colours, "not reached:");
        out += &format!("{missing} {}: {}\n", said.missing.join(" "), said.reason);
    }
    out
}
