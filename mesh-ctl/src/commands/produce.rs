//! `mesh-ctl produce`: publishes records, in an operator's name.
//!
//! Invariant: what is in memory is bounded, however long stdin is: some requests wait for their answers, and nothing is read meanwhile.
//! Invariant: lines go out as they come: one is not kept back because the next one takes its time.

use std::{
    io::{self, BufRead as _, BufReader, IsTerminal as _, Read},
    thread,
};

use mesh_proto::v1;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::Context;
use crate::{
    client,
    flags::{Form, Produce},
    output::{Code, Failure, count},
    record,
};

/// The largest value, in bytes: with its frame it fits into a message.
const VALUE: usize = 12 << 20;
/// The longest line, in bytes: a value in base64, and what is around it.
const LINE: usize = VALUE / 3 * 4 + (1 << 20);
/// The records of a request, at most, and about their bytes.
const BATCH: usize = 500;
const BATCH_BYTES: usize = 256 << 10;
/// Requests that wait to be sent.
const WAITING: usize = 2;
/// How many faults `-o json` lists.
const LISTED: usize = 1_000;
/// Problems that every record of a topic shares.
const OF_THE_TOPIC: [&str; 3] = ["unknown-topic", "invalid-topic", "forbidden-topic"];

pub(super) async fn run(context: &Context, flags: &Produce) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let (requests, receiver) = mpsc::channel(WAITING);
    let (faults, mut faulty) = mpsc::channel(WAITING);
    let template = Template::new(flags);
    let one = !flags.lines && !flags.json;
    if let Some(record) = template.given(flags)? {
        // The channel has room for it.
        let _ = requests.send(v1::ProduceRequest { records: vec![record] }).await;
        drop((requests, faults));
    } else {
        if io::stdin().is_terminal() {
            context.note("reading stdin; Ctrl-D ends it");
        }
        let json = flags.json;
        // It may wait for stdin when everything else is over, and ends with the process then: so it is no task, which would be waited for.
        let reader = thread::Builder::new().name("stdin".to_owned()).spawn(move || {
            let feed = Feed { template, requests, faults, batch: Vec::new(), bytes: 0 };
            match one {
                true => feed.whole(&mut io::stdin().lock()),
                false => feed.lines(&mut BufReader::with_capacity(64 << 10, io::stdin()), json),
            }
        });
        reader.map_err(|error| Failure::new(format!("stdin cannot be read: {error}"), ""))?;
    }
    let mut answers = client.produce(ReceiverStream::new(receiver)).await.map_err(|status| client::refused(&status))?.into_inner();
    let mut tally = Tally { one, named: flags.topic.is_some(), ..Tally::default() };
    let (mut answering, mut reading) = (true, true);
    while answering || reading {
        tokio::select! {
            answer = answers.message(), if answering => match answer {
                Ok(Some(response)) => {
                    tally.take(context, response);
                    if let Some(problem) = &tally.of_topic {
                        context.progress_over();
                        return Err(Failure::Said { code: Code::No, message: problem.detail.clone(), hint: topic_hint(problem) });
                    }
                    context.progress_line(&format!("{} stored", tally.stored));
                }
                Ok(None) => answering = false,
                Err(status) => {
                    context.progress_over();
                    return Err(tally.lost(&status));
                }
            },
            fault = faulty.recv(), if reading => match fault {
                Some(Fault::Line(line, why)) => tally.fault(context, line, "bad-record", &why, "", false),
                Some(Fault::Stdin(why)) => {
                    tally.broken = Some(why);
                    reading = false;
                }
                None => reading = false,
            },
            _ = tokio::signal::ctrl_c() => {
                context.progress_over();
                return Err(tally.stopped());
            }
        }
    }
    context.progress_over();
    tally.end(context)
}

fn topic_hint(problem: &v1::Problem) -> String {
    match problem.code.as_str() {
        "unknown-topic" => "`mesh-ctl topics list` shows those that there are, `mesh-ctl topics create` makes one".to_owned(),
        _ => problem.hint.clone(),
    }
}

/// What every record gets that does not say otherwise.
#[derive(Clone, Debug, Default)]
struct Template {
    topic: Option<String>,
    key: Option<String>,
    headers: Vec<v1::Header>,
    content_type: String,
    mesh_id: String,
}

impl Template {
    fn new(flags: &Produce) -> Self {
        let header = |header: &crate::flags::HeaderFlag| v1::Header { name: header.name.clone(), value: Some(header.value.clone().into()) };
        Self {
            topic: flags.topic.clone(),
            key: flags.key.clone(),
            headers: flags.headers.iter().map(header).collect(),
            content_type: flags.content_type.clone().unwrap_or_default(),
            mesh_id: flags.id.clone().unwrap_or_default(),
        }
    }

    /// The record of the flags alone, if stdin is not to be read.
    fn given(&self, flags: &Produce) -> Result<Option<v1::ProducedRecord>, Failure> {
        let value = match &flags.value {
            Some(value) if value.len() > VALUE => return Err(Failure::new(too_large(), "")),
            Some(value) => Some(value.clone().into_bytes()),
            None if flags.tombstone => None,
            None => return Ok(None),
        };
        Ok(Some(self.record(1, value)))
    }

    fn record(&self, number: u64, value: Option<Vec<u8>>) -> v1::ProducedRecord {
        let record = v1::Record {
            key: self.key.clone().map(Into::into),
            value: value.map(Into::into),
            headers: self.headers.clone(),
            content_type: self.content_type.clone(),
            mesh_id: self.mesh_id.clone(),
            timestamp_ms: None,
        };
        v1::ProducedRecord { number, topic: self.topic.clone().unwrap_or_default(), record: Some(record) }
    }

    /// A line of JSON.
    fn read(&self, number: u64, line: &str) -> Result<v1::ProducedRecord, String> {
        let (topic, mut record) = record::read(line)?;
        if record.value.as_ref().is_some_and(|value| value.len() > VALUE) {
            return Err(too_large());
        }
        let topic = self.topic.clone().or(topic).ok_or("it names no `topic`, and the command names none")?;
        if record.key.is_none() {
            record.key = self.key.clone().map(Into::into);
        }
        let missing: Vec<v1::Header> =
            self.headers.iter().filter(|default| !record.headers.iter().any(|given| given.name == default.name)).cloned().collect();
        record.headers.extend(missing);
        if record.content_type.is_empty() && !record.headers.iter().any(|header| header.name == "content-type") {
            record.content_type.clone_from(&self.content_type);
        }
        Ok(v1::ProducedRecord { number, topic, record: Some(record) })
    }
}

fn too_large() -> String {
    format!("the value is larger than the {VALUE} bytes that are taken here")
}

/// What cannot even be sent.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    /// This line is no record.
    Line(u64, String),
    /// Stdin cannot be read any further.
    Stdin(String),
}

/// Reads stdin, on a thread of its own.
struct Feed {
    template: Template,
    requests: mpsc::Sender<v1::ProduceRequest>,
    faults: mpsc::Sender<Fault>,
    batch: Vec<v1::ProducedRecord>,
    bytes: usize,
}

impl Feed {
    /// All of the input is one value.
    fn whole(mut self, input: &mut impl Read) {
        let mut value = Vec::new();
        match input.take(VALUE as u64 + 1).read_to_end(&mut value) {
            Ok(_) if value.len() > VALUE => self.fault(Fault::Line(1, too_large())),
            Ok(_) => {
                let record = self.template.record(1, Some(value));
                self.batch.push(record);
                self.flush()
            }
            Err(error) => self.fault(Fault::Stdin(error.to_string())),
        };
    }

    /// Each line of the input is a record. Ends early when nobody takes them any more.
    fn lines(mut self, input: &mut BufReader<impl Read>, json: bool) {
        let mut line = Vec::new();
        for number in 1.. {
            // Nothing whole is at hand: what was read does not wait for what comes.
            if !input.buffer().contains(&b'\n') && !self.flush() {
                return;
            }
            let goes_on = match next_line(input, &mut line, LINE) {
                Ok(None) => break,
                Ok(Some(Line::TooLong)) => {
                    self.fault(Fault::Line(number, format!("the line is longer than the {LINE} bytes that are taken here")))
                }
                Ok(Some(Line::Whole)) if line.is_empty() => true,
                Ok(Some(Line::Whole)) if json => {
                    let read = std::str::from_utf8(&line).map_err(|_| "it is not UTF-8".to_owned());
                    match read.and_then(|text| self.template.read(number, text)) {
                        Ok(record) => self.push(record, line.len()),
                        Err(why) => self.fault(Fault::Line(number, why)),
                    }
                }
                Ok(Some(Line::Whole)) if line.len() > VALUE => self.fault(Fault::Line(number, too_large())),
                Ok(Some(Line::Whole)) => {
                    let record = self.template.record(number, Some(line.clone()));
                    self.push(record, line.len())
                }
                Err(error) => {
                    // Whether somebody listens does not matter any more.
                    let _ = self.flush() && self.fault(Fault::Stdin(format!("line {number}: {error}")));
                    return;
                }
            };
            if !goes_on {
                return;
            }
        }
        self.flush();
    }

    /// Whether somebody listens.
    fn push(&mut self, record: v1::ProducedRecord, bytes: usize) -> bool {
        self.batch.push(record);
        self.bytes += bytes;
        (self.batch.len() < BATCH && self.bytes < BATCH_BYTES) || self.flush()
    }

    fn flush(&mut self) -> bool {
        self.bytes = 0;
        let records = std::mem::take(&mut self.batch);
        records.is_empty() || self.requests.blocking_send(v1::ProduceRequest { records }).is_ok()
    }

    fn fault(&mut self, fault: Fault) -> bool {
        self.faults.blocking_send(fault).is_ok()
    }
}

/// A line that was read.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// It is in the buffer, without its end.
    Whole,
    /// It was passed over.
    TooLong,
}

/// Reads a line without its end, of any length, and keeps no more of it than the longest that is taken.
fn next_line(input: &mut BufReader<impl Read>, line: &mut Vec<u8>, longest: usize) -> io::Result<Option<Line>> {
    line.clear();
    let (mut begun, mut too_long) = (false, false);
    loop {
        let available = match input.fill_buf() {
            Ok(available) => available,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if available.is_empty() {
            break;
        }
        begun = true;
        let end = available.iter().position(|byte| *byte == b'\n');
        let part = &available[..end.unwrap_or(available.len())];
        if line.len() + part.len() > longest {
            too_long = true;
            line.clear();
        }
        if !too_long {
            line.extend_from_slice(part);
        }
        let used = part.len() + usize::from(end.is_some());
        input.consume(used);
        if end.is_some() {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            break;
        }
    }
    Ok(match (begun, too_long) {
        (false, _) => None,
        (true, true) => Some(Line::TooLong),
        (true, false) => Some(Line::Whole),
    })
}

/// What became of the records.
#[derive(Debug, Default)]
struct Tally {
    /// There is one record, and no line.
    one: bool,
    /// The command names the topic: of all records.
    named: bool,
    stored: u64,
    refused: u64,
    /// Of these it is not known whether they are stored.
    unclear: u64,
    /// The last one that was answered.
    last: u64,
    /// Where the only record is.
    place: Option<(v1::Position, String)>,
    faults: Vec<Value>,
    /// What is wrong with the command's topic: no record can be stored.
    of_topic: Option<v1::Problem>,
    /// Why stdin could not be read to its end.
    broken: Option<String>,
}

impl Tally {
    fn take(&mut self, context: &Context, response: v1::ProduceResponse) {
        for v1::ProducedResult { number, result } in response.results {
            self.last = number;
            let v1::PublishResult { result, mesh_id } = result.unwrap_or_default();
            match result {
                Some(v1::publish_result::Result::Position(position)) => {
                    self.stored += 1;
                    if self.one {
                        self.place = Some((position, mesh_id));
                    }
                }
                Some(v1::publish_result::Result::Problem(problem)) => {
                    let unclear = problem.persisted() == v1::Persisted::Possibly;
                    if self.named && self.stored == 0 && OF_THE_TOPIC.contains(&&*problem.code) {
                        self.of_topic = Some(problem);
                        return;
                    }
                    self.fault(context, number, &problem.code, &problem.detail, &problem.hint, unclear);
                }
                None => self.fault(context, number, "unknown", "the sidecar did not say what became of it", "", true),
            }
        }
    }

    fn fault(&mut self, context: &Context, line: u64, code: &str, detail: &str, hint: &str, unclear: bool) {
        let word = if unclear { "not known to be stored" } else { "refused" };
        if unclear {
            self.unclear += 1;
        } else {
            self.refused += 1;
        }
        context.progress_over();
        let place = if self.one { String::new() } else { format!("line {line}: ") };
        let hint_text = if hint.is_empty() { String::new() } else { format!(" ({hint})") };
        let clean: String = format!("{detail}{hint_text}").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        context.say(&format!("{place}{word}: {code}: {clean}"));
        if self.faults.len() < LISTED {
            self.faults.push(json!({ "line": line, "code": code, "detail": detail, "hint": hint, "unclear": unclear }));
        }
    }

    fn end(self, context: &Context) -> Result<Code, Failure> {
        let Self { stored, refused, unclear, place, faults, broken, .. } = self;
        let mut said = json!({ "stored": stored, "refused": refused, "unclear": unclear, "faults": faults });
        if let (Some((position, mesh_id)), Some(members)) = (&place, said.as_object_mut()) {
            members.insert("topic".to_owned(), json!(position.topic));
            members.insert("partition".to_owned(), json!(position.partition));
            members.insert("offset".to_owned(), json!(position.offset));
            members.insert("mesh_id".to_owned(), json!(mesh_id));
        }
        match (context.form, &place) {
            (Some(form @ (Form::Json | Form::Yaml)), _) => context.print_document(form, &said)?,
            (_, Some((position, mesh_id))) => {
                context.print(&format!("stored {}/{}/{}  {mesh_id}\n", position.topic, position.partition, position.offset))?;
            }
            (_, None) => context.print(&format!("{}\n", summary(stored, refused, unclear)))?,
        }
        if let Some(why) = broken {
            return Err(Failure::new(
                format!("stdin could not be read to its end: {why}"),
                "what was read before is published, as told above",
            ));
        }
        Ok(match (unclear, refused) {
            (0, 0) => Code::Done,
            (0, _) => Code::No,
            _ => Code::Unknown,
        })
    }

    /// The sidecar, or the way to it, is gone.
    fn lost(&self, status: &tonic::Status) -> Failure {
        self.cut(&format!("the sidecar ended: {}", client::refused(status).message()))
    }

    fn stopped(&self) -> Failure {
        self.cut("stopped")
    }

    fn cut(&self, why: &str) -> Failure {
        let after = match self.last {
            0 => "of none it is known".to_owned(),
            last => format!("of those after line {last} it is not known"),
        };
        Failure::Said {
            code: Code::Unknown,
            message: format!("{why}: {}; {after} whether they are stored", summary(self.stored, self.refused, self.unclear)),
            hint: "published again under the same `mesh_id` (--json), a reader can tell a repeat".to_owned(),
        }
    }
}

fn summary(stored: u64, refused: u64, unclear: u64) -> String {
    let mut text = format!("{} stored", count(stored, "record"));
    if refused > 0 {
        text += &format!(", {refused} refused");
    }
    if unclear > 0 {
        text += &format!(", {unclear} not known to be stored");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed() -> (Feed, mpsc::Receiver<v1::ProduceRequest>, mpsc::Receiver<Fault>) {
        let (requests, receiver) = mpsc::channel(100);
        let (faults, faulty) = mpsc::channel(100);
        let template = Template { topic: Some("t".into()), key: Some("k".into()), ..Template::default() };
        (Feed { template, requests, faults, batch: Vec::new(), bytes: 0 }, receiver, faulty)
    }

    fn drain<T>(mut receiver: mpsc::Receiver<T>) -> Vec<T> {
        std::iter::from_fn(|| receiver.blocking_recv()).collect()
    }

    fn values(requests: &[v1::ProduceRequest]) -> Vec<(u64, String)> {
        let value = |record: &v1::ProducedRecord| {
            let value = record.record.clone().unwrap_or_default().value.unwrap_or_default();
            (record.number, String::from_utf8_lossy(&value).into_owned())
        };
        requests.iter().flat_map(|request| request.records.iter().map(value)).collect()
    }

    #[test]
    fn lines_are_records_with_their_numbers() {
        let (feed, receiver, faulty) = feed();
        feed.lines(&mut BufReader::new(&b"one\n\ntwo\r\nlast"[..]), false);
        assert_eq!(values(&drain(receiver)), [(1, "one".into()), (3, "two".into()), (4, "last".into())]);
        assert!(drain(faulty).is_empty());
    }

    #[test]
    fn a_bad_line_is_told_and_the_others_go() {
        let (feed, receiver, faulty) = feed();
        let text = "{\"value\":{\"json\":1}}\nnothing\n{\"topic\":\"u\",\"key\":\"own\",\"value\":\"x\"}\n{\"key\":\"a\"}\n";
        feed.lines(&mut BufReader::new(text.as_bytes()), true);
        let requests = drain(receiver);
        assert_eq!(values(&requests), [(1, "1".into()), (3, "x".into())]);
        let of = |index: usize| requests.iter().flat_map(|request| &request.records).nth(index).unwrap();
        assert_eq!((&*of(0).topic, &*of(1).topic), ("t", "t"), "the command's topic counts");
        let key = |index: usize| of(index).record.as_ref().and_then(|record| record.key.clone()).unwrap();
        assert_eq!((&key(0)[..], &key(1)[..]), (&b"k"[..], &b"own"[..]));
        let faults: Vec<u64> = drain(faulty)
            .iter()
            .map(|fault| match fault {
                Fault::Line(line, _) => *line,
                Fault::Stdin(why) => panic!("{why}"),
            })
            .collect();
        assert_eq!(faults, [2, 4]);
    }

    /// What is read so far goes out before the next read, which may wait.
    #[test]
    fn nothing_is_kept_back() {
        struct Slow<'a>(Vec<&'a [u8]>, &'a std::cell::RefCell<mpsc::Receiver<v1::ProduceRequest>>, Vec<usize>);
        impl Read for Slow<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let mut sent = 0;
                while let Ok(request) = self.1.borrow_mut().try_recv() {
                    sent += request.records.len();
                }
                self.2.push(sent);
                let Some(part) = (!self.0.is_empty()).then(|| self.0.remove(0)) else { return Ok(0) };
                buffer[..part.len()].copy_from_slice(part);
                Ok(part.len())
            }
        }
        let (feed, receiver, _faulty) = feed();
        let receiver = std::cell::RefCell::new(receiver);
        let mut slow = Slow(vec![b"a\nb\nc", b"c\nd\n"], &receiver, Vec::new());
        feed.lines(&mut BufReader::new(&mut slow), false);
        assert_eq!(slow.2[..3], [0, 2, 2], "before each read all whole lines were sent");
    }

    #[test]
    fn a_long_line_is_passed_over_and_not_kept() {
        let text = [&[b'x'; 1000][..], b"\nshort\n", &[b'y'; 50], b"\n"].concat();
        let mut input = BufReader::with_capacity(16, &text[..]);
        let mut line = Vec::new();
        assert_eq!(next_line(&mut input, &mut line, 100).unwrap(), Some(Line::TooLong));
        assert!(line.capacity() < 300, "{}", line.capacity());
        assert_eq!(next_line(&mut input, &mut line, 100).unwrap(), Some(Line::Whole));
        assert_eq!(line, b"short");
        assert_eq!(next_line(&mut input, &mut line, 50).unwrap(), Some(Line::Whole));
        assert_eq!(next_line(&mut input, &mut line, 50).unwrap(), None);
    }
}
