//! `mesh-ctl dlq`: dead letters, listed, shown, sent back, deleted.

use std::{collections::BTreeMap, fmt::Write as _};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use mesh_proto::v1;
use serde::Serialize;
use serde_json::{Value, json};
use tonic::Streaming;

use super::Context;
use crate::{
    client,
    flags::{Dlq, DlqList, DlqPurge, DlqRedrive, DlqShow, Form, Letters},
    output::{Code, Columns, Failure, Style, count},
    view,
};

pub(super) async fn run(context: &Context, command: &Dlq) -> Result<Code, Failure> {
    match command {
        Dlq::List(flags) => list(context, flags).await,
        Dlq::Show(flags) => show(context, flags).await,
        Dlq::Redrive(flags) => redrive(context, flags).await,
        Dlq::Purge(flags) => purge(context, flags).await,
    }
}

impl Letters {
    fn filter(&self) -> v1::LetterFilter {
        v1::LetterFilter {
            reasons: self.reasons.clone(),
            key: self.key.clone().map(Into::into),
            since_ms: self.since.as_ref().map(crate::moment::Moment::millis),
            until_ms: self.until.as_ref().map(crate::moment::Moment::millis),
            places: self.places.iter().map(|place| place.0.clone()).collect(),
        }
    }

    /// The times that were taken, in words.
    fn note(&self, context: &Context) {
        for (name, time) in [("--since", &self.since), ("--until", &self.until)] {
            if let Some(time) = time {
                context.note(&format!("{name}: {time}"));
            }
        }
    }
}

#[derive(Debug, Serialize)]
struct Counted {
    route: String,
    topic: String,
    letters: u64,
    redriven: u64,
    reasons: BTreeMap<String, u64>,
    oldest_ms: Option<i64>,
    newest_ms: Option<i64>,
}

async fn list(context: &Context, flags: &DlqList) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let message = v1::ListDeadLettersRequest { route: flags.route.clone().unwrap_or_default() };
    let response = client.list_dead_letters(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let v1::ListDeadLettersResponse { counts, complete } = response.into_inner();
    let counted: Vec<Counted> = counts
        .into_iter()
        .map(|found| Counted {
            route: found.route,
            topic: found.topic,
            letters: found.letters,
            redriven: found.redriven,
            reasons: found.reasons.into_iter().collect(),
            oldest_ms: (found.letters > 0).then_some(found.oldest_ms),
            newest_ms: (found.letters > 0).then_some(found.newest_ms),
        })
        .collect();
    if let Some(form @ (Form::Json | Form::Yaml)) = context.form {
        context.print_document(form, &counted)?;
    } else {
        let mut columns = Columns::new(&["ROUTE", "TOPIC", "LETTERS", "REDRIVEN", "OLDEST", "NEWEST", "REASONS"]);
        for one in &counted {
            let plain = |text: String| (text, Style::Plain);
            let reasons: Vec<String> = one.reasons.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
            let time = |time: Option<i64>| time.map_or_else(|| "-".to_owned(), view::time);
            let style = if one.letters > one.redriven { Style::Warn } else { Style::Plain };
            columns.row(vec![
                plain(one.route.clone()),
                plain(one.topic.clone()),
                (one.letters.to_string(), style),
                plain(one.redriven.to_string()),
                plain(time(one.oldest_ms)),
                plain(time(one.newest_ms)),
                plain(reasons.join(", ")),
            ]);
        }
        context.print(&columns.render(context.colours))?;
    }
    if !complete {
        context.note("there are more: only the first million was counted");
    }
    Ok(Code::Done)
}

/// Text, or base64 under another name.
pub(super) fn put(to: &mut serde_json::Map<String, Value>, name: &str, bytes: Option<&[u8]>) {
    match bytes.map(std::str::from_utf8) {
        None => drop(to.insert(name.to_owned(), Value::Null)),
        Some(Ok(text)) => drop(to.insert(name.to_owned(), json!(text))),
        Some(Err(_)) => drop(to.insert(format!("{name}_base64"), json!(BASE64_STANDARD.encode(bytes.unwrap_or_default())))),
    }
}

fn document(letter: &v1::DeadLetter) -> Value {
    let record = letter.record.clone().unwrap_or_default();
    let place = letter.position.clone().unwrap_or_default();
    let mut out = serde_json::Map::new();
    out.insert("place".to_owned(), json!({ "topic": place.topic, "partition": place.partition, "offset": place.offset }));
    for (name, value) in [
        ("writer", json!(letter.writer)),
        ("route", json!(letter.route)),
        ("reason", json!(letter.reason)),
        ("detail", json!(letter.detail)),
        ("attempts", json!(letter.attempts)),
        ("time_ms", json!(letter.time_ms)),
        ("redriven", json!(letter.redriven)),
        ("cut", json!(Some(&letter.cut).filter(|cut| !cut.is_empty()))),
        (
            "origin",
            json!({ "topic": letter.topic, "partition": letter.partition, "offset": letter.offset, "timestamp_ms": letter.timestamp_ms }),
        ),
        ("mesh_id", json!(record.mesh_id)),
        ("content_type", json!(record.content_type)),
    ] {
        out.insert(name.to_owned(), value);
    }
    put(&mut out, "key", record.key.as_deref());
    put(&mut out, "value", record.value.as_deref());
    let headers = record.headers.iter().map(|header| {
        let mut one = serde_json::Map::new();
        one.insert("name".to_owned(), json!(header.name));
        put(&mut one, "value", header.value.as_deref());
        Value::Object(one)
    });
    out.insert("headers".to_owned(), headers.collect());
    Value::Object(out)
}

fn text(letter: &v1::DeadLetter) -> String {
    let record = letter.record.clone().unwrap_or_default();
    let place = letter.position.clone().unwrap_or_default();
    let number = |number: Option<i64>| number.map_or_else(|| "?".to_owned(), |number| number.to_string());
    let mut out = String::new();
    let redriven = if letter.redriven { ", redriven already" } else { "" };
    // Writing into a string cannot fail.
    let _ = writeln!(out, "{}/{}  {}{redriven}", place.partition, place.offset, view::time(letter.time_ms));
    let attempts = if letter.attempts > 0 { format!(" after {}", count(letter.attempts.into(), "attempt")) } else { String::new() };
    let _ = writeln!(out, "  reason  {}{attempts}: {}", shown(letter.reason.as_bytes()), shown(letter.detail.as_bytes()));
    let _ = writeln!(out, "  origin  {}/{}/{}", letter.topic, number(letter.partition.map(i64::from)), number(letter.offset));
    if !letter.cut.is_empty() {
        let left_out = if letter.cut == "value" { "its value" } else { "all of it" };
        let _ = writeln!(out, "  cut     {left_out} was left out, too large for this topic: the record lies at its origin");
    }
    let _ = writeln!(out, "  id      {}", shown(record.mesh_id.as_bytes()));
    let _ = writeln!(out, "  key     {}", record.key.as_deref().map_or_else(|| "-".to_owned(), shown));
    let _ = writeln!(out, "  value   {}", record.value.as_deref().map_or_else(|| "-".to_owned(), shown));
    out
}

/// Bytes for a terminal: one line, not long, and nothing that drives it.
pub(super) fn shown(bytes: &[u8]) -> String {
    const MOST: usize = 200;
    let Ok(text) = std::str::from_utf8(bytes) else {
        return format!("({} of binary data; -o json shows them)", count(bytes.len() as u64, "byte"));
    };
    let clean: String = text.chars().take(MOST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().count() > MOST { format!("{clean}… ({})", count(bytes.len() as u64, "byte")) } else { clean }
}

async fn show(context: &Context, flags: &DlqShow) -> Result<Code, Failure> {
    flags.letters.note(context);
    let mut client = client::connect(&context.admin).await?;
    let message = v1::ReadDeadLettersRequest { route: flags.route.clone(), filter: Some(flags.letters.filter()), limit: flags.limit };
    let mut letters = client.read_dead_letters(message).await.map_err(|status| client::refused(&status))?.into_inner();
    let mut found = 0;
    while let Some(letter) = next(&mut letters, false).await? {
        found += 1;
        match context.form {
            Some(Form::Json) => context.print(&format!("{}\n", document(&letter)))?,
            Some(Form::Yaml) => {
                context.print("---\n")?;
                context.print_document(Form::Yaml, &document(&letter))?;
            }
            None | Some(Form::Table) => context.print(&text(&letter))?,
        }
    }
    context.note(&format!("{} shown", count(found, "letter")));
    Ok(Code::Done)
}

/// The next message of a stream; Ctrl-C ends it. `begun`: something may have been changed by now.
pub(super) async fn next<T>(stream: &mut Streaming<T>, begun: bool) -> Result<Option<T>, Failure> {
    const STAYS: &str = "what was done stays; a redrive goes on where it was when it is given again";
    tokio::select! {
        message = stream.message() => message.map_err(|status| client::cut(&status, begun, STAYS)),
        _ = tokio::signal::ctrl_c() => {
            Err(Failure::Said { code: Code::Unknown, message: "stopped".to_owned(), hint: STAYS.to_owned() })
        }
    }
}

async fn redrive(context: &Context, flags: &DlqRedrive) -> Result<Code, Failure> {
    flags.letters.note(context);
    let mut client = client::connect(&context.admin).await?;
    let message = v1::RedriveRequest {
        route: flags.route.clone(),
        filter: Some(flags.letters.filter()),
        every_route: flags.every_route,
        rate: flags.rate.unwrap_or(0),
        limit: flags.limit,
        execute: flags.execute,
    };
    let mut stream = client.redrive(message).await.map_err(|status| client::refused(&status))?.into_inner();
    let mut last = v1::RedriveProgress::default();
    let mut begun = false;
    while let Some(progress) = next(&mut stream, begun).await.inspect_err(|_| context.progress_over())? {
        if !progress.finished {
            context.progress_line(&format!("{} of {} redriven", progress.redriven, progress.matched));
        }
        (last, begun) = (progress, flags.execute);
    }
    context.progress_over();
    let v1::RedriveProgress { topic, matched, redriven, already, refused, refusals, samples, executed, finished, cut, cuts } = last;
    if !finished {
        return Err(Failure::Said {
            code: Code::Unknown,
            message: format!("the sidecar ended after {redriven} of {matched} letters"),
            hint: "give the command again: nothing is sent twice".to_owned(),
        });
    }
    if let Some(form @ (Form::Json | Form::Yaml)) = context.form {
        let samples: Vec<Value> = samples.iter().map(document).collect();
        let said = json!({
            "topic": topic, "matched": matched, "redriven": redriven, "already": already, "refused": refused, "refusals": refusals,
            "executed": executed, "samples": samples, "cut": cut, "cuts": cuts,
        });
        context.print_document(form, &said)?;
    } else {
        let would = if executed { "" } else { "would be " };
        let to = if flags.every_route { "every route of their topic" } else { &flags.route };
        let mut out = format!(
            "{topic}: {} meant, {redriven} {would}sent back to {to}, {already} sent back before, {refused} refused\n",
            count(matched, "letter")
        );
        if !executed {
            samples.iter().for_each(|letter| out += &text(letter));
            out += "preview: nothing is sent; --execute does it\n";
        }
        if cut > 0 {
            let verb = if executed { "went" } else { "would go" };
            out += &format!("{} cut: of each the record itself {verb}, from where it came from\n", count(cut, "letter"));
        }
        cuts.iter().for_each(|cut| out += &format!("cut: {}\n", shown(cut.as_bytes())));
        refusals.iter().for_each(|refusal| out += &format!("refused: {}\n", shown(refusal.as_bytes())));
        context.print(&out)?;
    }
    if refused > 0 { Ok(Code::No) } else { Ok(Code::Done) }
}

async fn purge(context: &Context, flags: &DlqPurge) -> Result<Code, Failure> {
    if let Some(time) = &flags.until {
        context.note(&format!("--until: {time}"));
    }
    let mut client = client::connect(&context.admin).await?;
    let message = v1::PurgeDeadLettersRequest {
        route: flags.route.clone(),
        until_ms: flags.until.as_ref().map(crate::moment::Moment::millis),
        before: flags.before.iter().map(|place| place.0.clone()).collect(),
        shared: flags.shared,
        execute: flags.execute,
    };
    let response = client.purge_dead_letters(client::request(message, client::APPLY)).await.map_err(|status| client::refused(&status))?;
    let v1::PurgeDeadLettersResponse { topic, partitions, shared_with, executed } = response.into_inner();
    let total: i64 = partitions.iter().map(|one| one.until - one.from).sum();
    if let Some(form @ (Form::Json | Form::Yaml)) = context.form {
        let each: Vec<Value> =
            partitions.iter().map(|one| json!({ "partition": one.partition, "from": one.from, "until": one.until })).collect();
        let said = json!({ "topic": topic, "partitions": each, "offsets": total, "shared_with": shared_with, "executed": executed });
        context.print_document(form, &said)?;
        return Ok(Code::Done);
    }
    let mut columns = Columns::new(&["TOPIC", "PARTITION", "FROM", "UNTIL"]);
    for one in &partitions {
        let cells = [topic.clone(), one.partition.to_string(), one.from.to_string(), one.until.to_string()];
        columns.row(cells.into_iter().map(|cell| (cell, Style::Plain)).collect());
    }
    let mut out = columns.render(context.colours);
    if !shared_with.is_empty() {
        out += &format!("the dead letters of {} lie there too\n", shared_with.join(", "));
    }
    out += &match executed {
        true => format!("{total} offsets are deleted\n"),
        false => format!("preview: {total} offsets would be deleted, for good; --execute does it\n"),
    };
    context.print(&out)?;
    Ok(Code::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_data_is_base64() {
        let mut map = serde_json::Map::new();
        put(&mut map, "value", Some(b"\xff"));
        put(&mut map, "key", None);
        assert_eq!(Value::Object(map), json!({ "value_base64": "/w==", "key": null }));
        assert_eq!(shown(b"a\x1b[2J"), "a [2J");
    }
}
