//! `mesh-ctl tail`: reads topics, and follows them.

use std::{collections::BTreeSet, io::IsTerminal as _};

use mesh_proto::v1::{self, tail_request::From};

use super::Context;
use crate::{
    client,
    flags::{Form, Tail, TailFrom},
    output::{Code, Failure, count},
    record::{self, Decoded},
};

/// The widest key that the others are lined up with.
const KEY: usize = 24;

pub(super) async fn run(context: &Context, flags: &Tail) -> Result<Code, Failure> {
    if let Some(TailFrom::Time(moment)) = &flags.from {
        context.note(&format!("--from: {moment}"));
    }
    let request = v1::TailRequest {
        topics: flags.topics.clone(),
        partitions: flags.partitions.clone(),
        from: flags.from.as_ref().map(|from| match from {
            TailFrom::Earliest => From::Earliest(true),
            TailFrom::Latest => From::Latest(true),
            TailFrom::Offset(offset) => From::Offset(*offset),
            TailFrom::Time(moment) => From::TimeMs(moment.millis()),
        }),
        filter: flags.filter.clone().unwrap_or_default(),
        limit: flags.limit.unwrap_or(0),
        follow: flags.follow,
    };
    let mut client = client::connect(&context.admin).await?;
    let mut stream = client.tail(request).await.map_err(|status| client::refused(&status))?.into_inner();
    let topics: BTreeSet<&String> = flags.topics.iter().collect();
    let mut printer = Printer { several: topics.len() > 1, pretty: flags.pretty, place: 0, key: 0, width: width(context) };
    let mut last = v1::TailProgress::default();
    let mut begun = false;
    loop {
        let message = tokio::select! {
            message = stream.message() => message.map_err(|status| ended(&status, begun, last.sent))?,
            _ = tokio::signal::ctrl_c() => {
                tell(context, &last);
                return if flags.follow { Ok(Code::Done) } else { Err(cut("stopped", last.sent)) };
            }
        };
        let Some(message) = message else { break };
        begun = true;
        for partition in &message.partitions {
            note_start(context, flags, partition);
        }
        print(context, &mut printer, &message.records)?;
        if let Some(progress) = message.progress {
            note_changes(context, &last, &progress);
            if !flags.follow && message.records.is_empty() && !progress.finished {
                context.progress_line(&format!("{} read, {} found", progress.read, progress.sent));
            }
            last = progress;
        }
    }
    context.progress_over();
    tell(context, &last);
    if last.finished { Ok(Code::Done) } else { Err(cut("the sidecar ended before the end of the topic", last.sent)) }
}

/// What a sidecar's refusal, or its end, means.
fn ended(status: &tonic::Status, begun: bool, sent: u64) -> Failure {
    match client::cut(status, begun, "") {
        Failure::Said { code: Code::Unknown, message, .. } => cut(&message, sent),
        other => other,
    }
}

fn cut(message: &str, sent: u64) -> Failure {
    Failure::Said {
        code: Code::Unknown,
        message: format!("{message}: {} printed, not all", count(sent, "record")),
        hint: "--from goes on at an offset or a time".to_owned(),
    }
}

/// Says where a partition begins, if not where it was asked for.
fn note_start(context: &Context, flags: &Tail, partition: &v1::TailedPartition) {
    let v1::TailedPartition { topic, partition: number, from, end, low } = partition;
    let Some(TailFrom::Offset(offset)) = flags.from.as_ref() else { return };
    if *offset >= 0 && offset < low {
        context.note(&format!("{topic}/{number}: offset {offset} does not exist any more: it begins at {from}"));
    } else if offset > end {
        context.note(&format!("{topic}/{number}: offset {offset} does not exist yet: the end is {end}"));
    }
}

fn note_changes(context: &Context, before: &v1::TailProgress, now: &v1::TailProgress) {
    if now.expired > before.expired {
        context.note(&format!("{} deleted by the broker before they were read", count(now.expired - before.expired, "offset")));
    }
    match (before.trouble.as_str(), now.trouble.as_str()) {
        (before, now) if before == now => {}
        (_, "") => context.note("the broker is back"),
        (_, trouble) => context.note(&format!("waiting: {trouble}")),
    }
}

/// What was read, at the end.
fn tell(context: &Context, progress: &v1::TailProgress) {
    context.progress_over();
    let filtered = progress.read - (progress.sent + progress.failed).min(progress.read);
    let mut text = count(progress.sent, "record");
    if filtered > 0 {
        text += &format!(", {filtered} filtered out");
    }
    if progress.failed > 0 {
        text += &format!(", {} not judged: the filter failed on {}", progress.failed, progress.failure);
    }
    context.note(&text);
}

/// How wide lines may be; `None`: as they are.
fn width(context: &Context) -> Option<usize> {
    if !matches!(context.form, None | Some(Form::Table)) || !std::io::stdout().is_terminal() {
        return None;
    }
    let columns = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let asked = || rustix::termios::tcgetwinsize(std::io::stdout()).ok().map(|size| usize::from(size.ws_col));
    columns.or_else(asked).filter(|columns| *columns > 0)
}

fn print(context: &Context, printer: &mut Printer, records: &[v1::TailedRecord]) -> Result<(), Failure> {
    let mut out = String::new();
    let nowhere = v1::Position::default();
    for v1::TailedRecord { position, record } in records {
        let (position, Some(record)) = (position.as_ref().unwrap_or(&nowhere), record) else { continue };
        match context.form {
            Some(Form::Json) => {
                out += &record::write(position, record);
                out.push('\n');
            }
            Some(Form::Yaml) => {
                let value: serde_json::Value = serde_json::from_str(&record::write(position, record))
                    .map_err(|error| Failure::new(format!("a record cannot be written: {error}"), ""))?;
                context.print("---\n")?;
                context.print_document(Form::Yaml, &value)?;
            }
            None | Some(Form::Table) => {
                out += &printer.line(position, record);
                out.push('\n');
            }
        }
    }
    if out.is_empty() {
        return Ok(());
    }
    context.progress_over();
    context.print(&out)
}

/// Lays records out in lines. Columns grow as wider cells come: nothing is known of what follows.
struct Printer {
    /// Several topics are read.
    several: bool,
    pretty: bool,
    place: usize,
    key: usize,
    width: Option<usize>,
}

impl Printer {
    fn line(&mut self, position: &v1::Position, record: &v1::Record) -> String {
        let place = match self.several {
            true => format!("{}/{}/{}", position.topic, position.partition, position.offset),
            false => format!("{}/{}", position.partition, position.offset),
        };
        let key = match record.key.as_deref() {
            None => "-".to_owned(),
            Some(key) => shown(record::decode(Some("text/plain"), key), key.len()),
        };
        self.place = self.place.max(place.chars().count());
        self.key = self.key.max(wide(&key).min(KEY));
        let head =
            format!("{place:<0$}  {1}  {key}{2}", self.place, time(record.timestamp_ms), " ".repeat(self.key.saturating_sub(wide(&key))));
        let decoded = record.value.as_deref().map(|value| (record::decode(record::content_type(record), value), value.len()));
        let value = match decoded {
            None => "(null)".to_owned(),
            Some((Decoded::Json(json), _)) if self.pretty => return format!("{head}\n{}", whole(&record::pretty(json))),
            Some((Decoded::Text(text), _)) if self.pretty => return format!("{head}\n{}", whole(text)),
            Some((Decoded::Json(json), length)) => shown(Decoded::Text(&record::compact(json)), length),
            Some((decoded, length)) => shown(decoded, length),
        };
        let line = format!("{head}  {value}");
        match self.width {
            Some(width) => fit(&line, width),
            None => line,
        }
    }
}

/// Bytes on one line that drives no terminal.
fn shown(decoded: Decoded<'_>, length: usize) -> String {
    match decoded {
        Decoded::Json(text) | Decoded::Text(text) => text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect(),
        Decoded::Binary => format!("({} of binary data; -o json shows them)", count(length as u64, "byte")),
    }
}

/// Text of several lines that drives no terminal.
fn whole(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { ' ' } else { c }).collect()
}

/// A time to the millisecond, always as long.
fn time(milliseconds: Option<i64>) -> String {
    let Some(milliseconds) = milliseconds.and_then(|time| u64::try_from(time).ok()) else { return format!("{:24}", "-") };
    match std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_millis(milliseconds)) {
        // What is beyond the year 9999 cannot be printed.
        Some(time) if milliseconds < 253_402_300_800_000 => humantime::format_rfc3339_millis(time).to_string(),
        _ => format!("{milliseconds:24}"),
    }
}

/// How many columns of a terminal a character takes.
fn columns(c: char) -> usize {
    match u32::from(c) {
        0x0300..=0x036f | 0x200b..=0x200f | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f
        | 0x2e80..=0x303e
        | 0x3041..=0xa4cf
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe30..=0xfe6f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x1f300..=0x1f64f
        | 0x1f900..=0x1f9ff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

fn wide(text: &str) -> usize {
    text.chars().map(columns).sum()
}

/// A line that is no wider; what was cut ends with `…`.
fn fit(line: &str, width: usize) -> String {
    if wide(line) <= width {
        return line.to_owned();
    }
    let (mut out, mut used) = (String::new(), 1);
    for c in line.chars() {
        used += columns(c);
        if used > width {
            break;
        }
        out.push(c);
    }
    out.push('…');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: Option<&str>, value: Option<&[u8]>) -> v1::Record {
        v1::Record {
            key: key.map(|key| key.to_owned().into()),
            value: value.map(|value| value.to_vec().into()),
            timestamp_ms: Some(1_795_255_200_123),
            ..v1::Record::default()
        }
    }

    fn lines(printer: &mut Printer, records: &[v1::Record]) -> Vec<String> {
        let place = |index: usize| v1::Position { topic: "orders".into(), partition: 0, offset: 9 + i64::try_from(index).unwrap() };
        records.iter().enumerate().map(|(index, record)| printer.line(&place(index), record)).collect()
    }

    #[test]
    fn a_record_is_a_line() {
        let mut printer = Printer { several: false, pretty: false, place: 0, key: 0, width: None };
        let records = [
            record(Some("order-1"), Some(b"{ \"n\": 1 }")),
            record(None, None),
            record(Some("k"), Some(b"two\nlines\x1b[2J")),
            record(Some("k"), Some(b"\xff\xfe")),
        ];
        assert_eq!(
            lines(&mut printer, &records),
            [
                "0/9  2026-11-21T10:00:00.123Z  order-1  {\"n\":1}",
                "0/10  2026-11-21T10:00:00.123Z  -        (null)",
                "0/11  2026-11-21T10:00:00.123Z  k        two lines [2J",
                "0/12  2026-11-21T10:00:00.123Z  k        (2 bytes of binary data; -o json shows them)",
            ]
        );
    }

    #[test]
    fn lines_fit_a_terminal_and_pretty_ones_are_whole() {
        let mut printer = Printer { several: true, pretty: false, place: 0, key: 0, width: Some(60) };
        let found = lines(&mut printer, &[record(Some("k"), Some("가나다라마바사아자차카타파하".as_bytes()))]);
        assert_eq!(found, ["orders/0/9  2026-11-21T10:00:00.123Z  k  가나다라마바사아자…"]);
        assert!(wide(&found[0]) <= 60);
        let mut printer = Printer { several: false, pretty: true, place: 0, key: 0, width: Some(20) };
        assert_eq!(lines(&mut printer, &[record(None, Some(b"{\"n\":1}"))]), ["0/9  2026-11-21T10:00:00.123Z  -\n{\n  \"n\": 1\n}"]);
        assert_eq!(time(Some(i64::MAX)).trim(), i64::MAX.to_string());
    }
}
