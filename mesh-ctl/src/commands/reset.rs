//! `mesh-ctl reset`: lets a route read its sources from elsewhere. A dry run, unless told otherwise.

use std::{fmt::Write as _, path::Path};

use mesh_proto::v1::{self, PartitionOffset, PartitionOffsets, reset_request::To};
use serde::Serialize;

use super::Context;
use crate::{
    client,
    flags::{Form, Offsets, Reset, ResetTo},
    output::{Code, Columns, Failure, Style, count},
};

/// What `-o json` and `-o yaml` print.
#[derive(Debug, Serialize)]
struct Said {
    route: String,
    group: String,
    executed: bool,
    /// The time that was taken, with `--to-datetime`.
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<String>,
    partitions: Vec<Partition>,
}

#[derive(Debug, Serialize)]
struct Partition {
    topic: String,
    partition: i32,
    from: Option<i64>,
    to: i64,
    low: i64,
    high: i64,
    again: u64,
    skipped: u64,
    refused: String,
    done_by: String,
    failed: String,
    unclear: bool,
}

impl From<v1::PartitionReset> for Partition {
    fn from(reset: v1::PartitionReset) -> Self {
        let v1::PartitionReset { topic, partition, from, to, low, high, again, skipped, refused, done_by, failed, unclear } = reset;
        Self { topic, partition, from, to, low, high, again, skipped, refused, done_by, failed, unclear }
    }
}

pub(super) async fn run(context: &Context, flags: &Reset) -> Result<Code, Failure> {
    let (to, time) = target(&flags.to)?;
    let mut client = client::connect(&context.admin).await?;
    let message = v1::ResetRequest {
        route: flags.route.clone(),
        to: Some(to),
        topics: flags.topics.clone(),
        partitions: flags.partitions.clone(),
        execute: flags.execute && flags.backup.is_none(),
        // 0 would be the usual time.
        wait_ms: u64::try_from(flags.timeout.as_millis()).unwrap_or(u64::MAX).max(1),
    };
    let mut response = ask(&mut client, message.clone(), flags).await?;
    if let Some(path) = &flags.backup {
        // Written before anything is changed.
        backup(path, &response)?;
        context.note(&format!("the committed offsets are in {}: `--from-file` takes them back", path.display()));
        if flags.execute {
            response = ask(&mut client, v1::ResetRequest { execute: true, ..message }, flags).await?;
        }
    }
    let said = Said {
        route: response.route,
        group: response.group,
        executed: response.executed,
        time,
        partitions: response.partitions.into_iter().map(Partition::from).collect(),
    };
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &said)?,
        None | Some(Form::Table) => context.print(&text(context, &said))?,
    }
    end(&said, flags)
}

async fn ask(client: &mut client::Client, message: v1::ResetRequest, flags: &Reset) -> Result<v1::ResetResponse, Failure> {
    let request = client::request(message, flags.timeout + client::ASK);
    Ok(client.reset(request).await.map_err(|status| client::refused(&status))?.into_inner())
}

/// The target in the API's words, and the time that was taken.
fn target(to: &ResetTo) -> Result<(To, Option<String>), Failure> {
    let to = match to {
        ResetTo { to_datetime: Some(moment), .. } => return Ok((To::TimeMs(moment.millis()), Some(moment.to_string()))),
        ResetTo { shift_by: Some(by), .. } => To::ShiftBy(*by),
        ResetTo { to_offset: Some(Offsets::All(offset)), .. } => To::Offset(*offset),
        ResetTo { to_offset: Some(Offsets::Each(offsets)), .. } => To::Offsets(PartitionOffsets { offsets: offsets.clone() }),
        ResetTo { from_file: Some(source), .. } => {
            To::Offsets(PartitionOffsets { offsets: read_offsets(&source.name(), &source.read()?)? })
        }
        ResetTo { to_latest: true, .. } => To::Latest(true),
        ResetTo { .. } => To::Earliest(true),
    };
    Ok((to, None))
}

/// Reads lines of `topic,partition,offset`, as `--backup` and Kafka's own tools write them.
fn read_offsets(name: &str, text: &str) -> Result<Vec<PartitionOffset>, Failure> {
    let mut offsets = Vec::new();
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let cells: Vec<&str> = line.split(',').map(|cell| cell.trim().trim_matches('"')).collect();
        let read = match cells[..] {
            [topic, partition, offset] => {
                partition.parse().ok().zip(offset.parse().ok()).map(|(partition, offset)| (topic, partition, offset))
            }
            _ => None,
        };
        let (topic, partition, offset) =
            read.ok_or_else(|| Failure::new(format!("{name}:{number}: `{line}` is not TOPIC,PARTITION,OFFSET"), "one partition a line"))?;
        offsets.push(PartitionOffset { topic: topic.to_owned(), partition, offset });
    }
    if offsets.is_empty() {
        return Err(Failure::new(format!("{name} names no partition"), "one a line: TOPIC,PARTITION,OFFSET"));
    }
    Ok(offsets)
}

fn backup(path: &Path, response: &v1::ResetResponse) -> Result<(), Failure> {
    let mut text = format!("# group {}: topic,partition,committed offset\n", response.group);
    for reset in &response.partitions {
        if let Some(from) = reset.from {
            // Writing into a string cannot fail.
            let _ = writeln!(text, "{},{},{from}", reset.topic, reset.partition);
        }
    }
    std::fs::write(path, text)
        .map_err(|error| Failure::new(format!("{} cannot be written: {error}: nothing was reset", path.display()), ""))
}

fn text(context: &Context, said: &Said) -> String {
    let mut out = String::new();
    if !context.quiet {
        let what = if said.executed { "reset" } else { "dry run, nothing is changed" };
        out += &format!("route {}, group {}: {what}\n", said.route, said.group);
        if let Some(time) = &said.time {
            out += &format!("time {time}\n");
        }
        out.push('\n');
    }
    let mut columns = Columns::new(&["TOPIC", "PARTITION", "FROM", "TO", "OLDEST", "END", "AGAIN", "SKIPPED", "NOTE"]);
    for one in &said.partitions {
        let (note, style) = match one {
            Partition { refused, .. } if !refused.is_empty() => (format!("REFUSED: {refused}"), Style::Bad),
            Partition { failed, unclear: true, .. } => (format!("UNCLEAR: {failed}"), Style::Bad),
            Partition { failed, .. } if !failed.is_empty() => (format!("FAILED: {failed}"), Style::Bad),
            Partition { done_by, .. } if !done_by.is_empty() => (format!("done by {done_by}"), Style::Good),
            _ => (String::new(), Style::Plain),
        };
        let plain = |text: String| (text, Style::Plain);
        columns.row(vec![
            plain(one.topic.clone()),
            plain(one.partition.to_string()),
            plain(one.from.map_or_else(|| "-".to_owned(), |from| from.to_string())),
            plain(one.to.to_string()),
            plain(one.low.to_string()),
            plain(one.high.to_string()),
            plain(one.again.to_string()),
            plain(one.skipped.to_string()),
            (note, style),
        ]);
    }
    out += &columns.render(context.colours);
    if !context.quiet {
        // Where it failed nothing is known to come again, or to be skipped.
        let sum = |of: fn(&Partition) -> u64| said.partitions.iter().filter(|one| one.failed.is_empty()).map(of).sum();
        let (again, skipped) = (count(sum(|one| one.again), "record"), count(sum(|one| one.skipped), "record"));
        let would = if said.executed { "" } else { "would be " };
        out += &format!("\n{again} {would}delivered again, {skipped} {would}skipped\n");
    }
    out
}

fn end(said: &Said, flags: &Reset) -> Result<Code, Failure> {
    let counted = |of: fn(&Partition) -> bool| said.partitions.iter().filter(|one| of(one)).count() as u64;
    let (refused, failed, unclear) =
        (counted(|one| !one.refused.is_empty()), counted(|one| !one.failed.is_empty()), counted(|one| one.unclear));
    let failure = |code, message: String, hint: &str| Err(Failure::Said { code, message, hint: hint.to_owned() });
    if refused > 0 {
        let message = format!("{} refused: {}", count(refused, "partition"), first(said, |one| &one.refused));
        return failure(Code::No, message, "nothing was reset; --partition and --topic choose others");
    }
    if unclear > 0 {
        let message = format!("{} not known to be reset: {}", count(unclear, "partition"), first(said, |one| &one.failed));
        return failure(Code::Unknown, message, "the same command without --execute shows the committed offsets");
    }
    if failed > 0 {
        let message = format!("{} not reset: {}", count(failed, "partition"), first(said, |one| &one.failed));
        return failure(Code::No, message, "the others are; the same command may be given again, --timeout gives more time");
    }
    if !said.executed && flags.execute {
        return failure(Code::Error, "the sidecar did not carry it out, and does not say why".to_owned(), "");
    }
    Ok(Code::Done)
}

/// The first reason, with its partition.
fn first(said: &Said, reason: fn(&Partition) -> &String) -> String {
    let found = said.partitions.iter().find(|one| !reason(one).is_empty());
    found.map(|one| format!("{}/{}: {}", one.topic, one.partition, reason(one))).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_offsets() {
        let offsets = read_offsets("f", "# group x\n\"orders\",0,17\norders, 1, 23\n\n").ok().unwrap();
        assert_eq!(offsets.len(), 2);
        assert_eq!((offsets[1].topic.as_str(), offsets[1].partition, offsets[1].offset), ("orders", 1, 23));
        for wrong in ["", "# nothing\n", "orders,1", "orders,x,1", "orders,1,2,3"] {
            assert!(read_offsets("f", wrong).is_err(), "{wrong}");
        }
    }
}
