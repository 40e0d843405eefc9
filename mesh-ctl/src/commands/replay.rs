//! `mesh-ctl replay`: copies a range of a topic into another, or to one route. A preview, unless told otherwise.

use mesh_proto::v1;
use serde_json::json;

use super::{Context, dlq::next};
use crate::{
    client,
    flags::{Form, Replay},
    moment::Moment,
    output::{Code, Failure, count},
};

pub(super) async fn run(context: &Context, flags: &Replay) -> Result<Code, Failure> {
    for (name, time) in [("--since", &flags.since), ("--until", &flags.until)] {
        if let Some(time) = time {
            context.note(&format!("{name}: {time}"));
        }
    }
    let mut client = client::connect(&context.admin).await?;
    let message = v1::ReplayRequest {
        topic: flags.from.clone(),
        partitions: flags.partitions.clone(),
        from_offset: flags.from_offset,
        until_offset: flags.to_offset.map(|last| last.saturating_add(1)),
        since_ms: flags.since.as_ref().map(Moment::millis),
        until_ms: flags.until.as_ref().map(Moment::millis),
        to_topic: flags.to.clone().unwrap_or_default(),
        to_route: flags.route.clone().unwrap_or_default(),
        filter: flags.filter.clone().unwrap_or_default(),
        rate: flags.rate.unwrap_or(0),
        execute: flags.execute,
    };
    let mut stream = client.replay(message).await.map_err(|status| client::refused(&status))?.into_inner();
    let mut last = v1::ReplayProgress::default();
    let mut begun = false;
    while let Some(progress) = next(&mut stream, begun).await.inspect_err(|_| context.progress_over())? {
        if !progress.finished {
            context.progress_line(&format!("{} of {} offsets read, {} copied", progress.read, progress.in_range, progress.copied));
        }
        (last, begun) = (progress, flags.execute);
    }
    context.progress_over();
    let v1::ReplayProgress { to, in_range, read, copied, filtered, failed, failure, executed, finished } = last;
    if !finished {
        return Err(Failure::Said {
            code: Code::Unknown,
            message: format!("the sidecar ended after {copied} copies"),
            hint: "what was copied stays: --from-offset goes on from there".to_owned(),
        });
    }
    if let Some(form @ (Form::Json | Form::Yaml)) = context.form {
        let said = json!({
            "to": to, "in_range": in_range, "read": read, "copied": copied, "filtered": filtered, "failed": failed, "failure": failure,
            "executed": executed,
        });
        context.print_document(form, &said)?;
    } else {
        let would = if executed { "" } else { "would be " };
        let mut out =
            format!("{} read, {copied} {would}copied into {to}, {filtered} filtered out, {failed} not judged\n", count(read, "record"));
        if !failure.is_empty() {
            out += &format!("the filter failed on {failure}\n");
        }
        if !executed {
            out += "preview: nothing is copied; --execute does it\n";
        }
        context.print(&out)?;
    }
    Ok(Code::Done)
}
