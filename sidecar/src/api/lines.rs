//! Publishing lines: `POST /v1/topics/{topic}/records` with `application/x-ndjson`. Lines are published as they come, and each is answered by
//! a line, in order, as soon as it is acknowledged, while further ones are read.
//!
//! Invariant: every line has one result, in order, with its number; a bad one keeps no other back, and a cut one is not published.
//! Invariant: what is in memory is bounded, whatever the body's length: a few chunks on their way to the broker, and what the client has not
//! read of its answers. A client that reads nothing is read no further once that is full, and cut off if it stays so.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt as _, future::BoxFuture, stream};
use http::{HeaderValue, Response, StatusCode, header, request::Parts};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::{
    Api,
    batch::{self, Done, Gather},
    fields::Fields,
    follow,
    paths::{self, BODY_PAUSE},
    problem::ApiError,
};
use crate::{
    json,
    publish::{Draft, Topic, TraceHeaders},
};

/// Records of one chunk.
const CHUNK_RECORDS: usize = 500;
/// Chunks that wait for their acknowledgements at once.
const CHUNKS: usize = 8;
/// Answers that the client has not read, in bytes, at most. Large, for clients that send everything before they read: that is 100,000 lines.
const UNREAD: usize = 16 * 1024 * 1024;
/// How long a client may leave them unread once that is full.
const UNREAD_TIME: Duration = Duration::from_secs(30);
/// A body that is known to be no longer is answered when it is done, so that the status tells how it went.
const SHORT: u64 = 1024 * 1024;
const LINES: HeaderValue = HeaderValue::from_static("application/x-ndjson");

/// A request to publish lines.
pub(super) struct Lines {
    api: Api,
    topic: Topic,
    trace: TraceHeaders,
    /// The defaults of every record.
    fields: Fields,
    /// A line is a value, not a record.
    values: bool,
}

impl Lines {
    pub(super) fn new(api: &Api, topic: Topic, fields: Fields, trace: TraceHeaders, values: bool) -> Self {
        Self { api: api.clone(), topic, trace, fields, values }
    }

    /// Publishes the lines of the body.
    pub(super) async fn answer(self, parts: &Parts, mut body: Incoming) -> Response<Body> {
        let trace = self.trace.clone();
        // Only who asks for one document gets one.
        let form = follow::Form::of(&parts.headers, follow::Form::Lines, &[follow::Form::Lines, follow::Form::Json]);
        let document = matches!(form, Ok(follow::Form::Json));
        if document || body.size_hint().upper().is_some_and(|most| most <= SHORT) {
            let mut sink = Sink::Memory(Vec::new());
            let mut run = Run::new(self, if document { batch::MOST_RECORDS } else { usize::MAX });
            run.serve(&mut body, &mut sink).await;
            let Sink::Memory(done) = sink else { return Response::new(Body::empty()) };
            return if document { batch::document(done.into_iter().map(|(_, done)| done).collect(), &trace) } else { short(&done, &trace) };
        }
        let (mine, theirs) = tokio::io::duplex(UNREAD);
        let broken = Arc::new(AtomicBool::new(false));
        let (tasks, sent_broken) = (self.api.inner.tasks.clone(), broken.clone());
        let waits = parts.headers.contains_key(header::EXPECT);
        let (begun, begins) = tokio::sync::oneshot::channel();
        tasks.spawn(async move {
            let mut sink = Sink::Pipe { pipe: mine, begun: Some(begun) };
            if !Run::new(self, usize::MAX).serve(&mut body, &mut sink).await {
                sent_broken.store(true, Ordering::Release);
            }
        });
        if waits {
            // A final status would be taken for an answer to `expect`, before `100 continue` is asked for by reading the body.
            _ = begins.await;
        }
        let frames = stream::unfold(Some((theirs, broken)), |state| async move {
            let (mut pipe, broken) = state?;
            let mut buffer = BytesMut::with_capacity(16 * 1024);
            match pipe.read_buf(&mut buffer).await {
                Ok(0) if broken.load(Ordering::Acquire) => {
                    Some((Err(io::Error::other("the client does not read the answers to its lines")), None))
                }
                Ok(0) => None,
                Ok(_) => Some((Ok(buffer.freeze()), Some((pipe, broken)))),
                Err(error) => Some((Err(error), None)),
            }
        });
        let mut response = Response::new(Body::from_stream(frames));
        response.headers_mut().insert(header::CONTENT_TYPE, LINES);
        response
    }
}

/// The answer to a short body: its status is that of all lines, or 207.
fn short(done: &[(usize, Done)], trace: &TraceHeaders) -> Response<Body> {
    let mut out = Vec::with_capacity(done.len() * 160);
    for (line, done) in done {
        write(&mut out, *line, done, trace);
    }
    let mut statuses = done.iter().map(|(_, done)| done.status());
    let first = statuses.next().unwrap_or(StatusCode::OK);
    let mut response = Response::new(Body::from(out));
    *response.status_mut() = if statuses.all(|status| status == first) { first } else { StatusCode::MULTI_STATUS };
    response.headers_mut().insert(header::CONTENT_TYPE, LINES);
    response
}

fn write(out: &mut Vec<u8>, line: usize, done: &Done, trace: &TraceHeaders) {
    json::put(out, format_args!("{{\"line\":{line},"));
    done.write_members(out, trace);
    out.extend_from_slice(b"}\n");
}

/// Where results go.
enum Sink {
    Memory(Vec<(usize, Done)>),
    Pipe { pipe: DuplexStream, begun: Option<tokio::sync::oneshot::Sender<()>> },
}

impl Sink {
    /// `false` once nobody takes them.
    async fn take(&mut self, results: Vec<(usize, Done)>, trace: &TraceHeaders) -> bool {
        match self {
            Self::Memory(done) => {
                done.extend(results);
                true
            }
            Self::Pipe { pipe, .. } => {
                let mut out = Vec::with_capacity(results.len() * 160);
                for (line, done) in &results {
                    write(&mut out, *line, done, trace);
                }
                matches!(tokio::time::timeout(UNREAD_TIME, pipe.write_all(&out)).await, Ok(Ok(())))
            }
        }
    }

    /// Something of the body was read.
    fn begin(&mut self) {
        if let Self::Pipe { begun, .. } = self
            && let Some(begun) = begun.take()
        {
            // Nobody may wait for it.
            _ = begun.send(());
        }
    }
}

struct Run {
    lines: Lines,
    splitter: Splitter,
    gather: Gather,
    /// The lines of what is gathered.
    numbers: Vec<usize>,
    /// On their way to the broker, the oldest first.
    chunks: VecDeque<BoxFuture<'static, Vec<(usize, Done)>>>,
    /// Records taken, and how many may be.
    taken: usize,
    most: usize,
    /// Nothing is read any more.
    over: bool,
}

impl Run {
    fn new(lines: Lines, most: usize) -> Self {
        // JSON may be larger than what it stands for: base64, escapes, headers.
        let longest = 2 * lines.api.inner.publisher.config().limits.record_bytes + 64 * 1024;
        let splitter = Splitter { kept: BytesMut::new(), ready: Bytes::new(), line: 0, longest, skipping: false, overflow: false };
        Self { lines, splitter, gather: Gather::default(), numbers: Vec::new(), chunks: VecDeque::new(), taken: 0, most, over: false }
    }

    /// Publishes all lines. `false` if the results were not taken.
    async fn serve(&mut self, body: &mut Incoming, sink: &mut Sink) -> bool {
        let closing = self.lines.api.inner.closing.clone();
        let trace = self.lines.trace.clone();
        loop {
            let (may_read, waits) = (!self.over && self.chunks.len() < CHUNKS, !self.chunks.is_empty());
            // Between lines a client may pause as long as it likes.
            let pause = (!self.splitter.is_between()).then_some(BODY_PAUSE);
            tokio::select! {
                biased;
                results = front(&mut self.chunks), if waits => {
                    if !sink.take(results, &trace).await {
                        return false;
                    }
                }
                data = paths::next_data_within(body, pause), if may_read => {
                    sink.begin();
                    self.read(data);
                }
                () = closing.cancelled(), if may_read => self.end(Err(ApiError::Draining)),
                else => return true,
            }
        }
    }

    fn read(&mut self, data: Result<Option<Bytes>, ApiError>) {
        match data {
            Ok(Some(data)) => {
                self.splitter.feed(&data);
                self.take_lines();
            }
            Ok(None) => {
                self.splitter.finish();
                self.take_lines();
                self.end(Ok(()));
            }
            // What was read of a line is none: it is not published.
            Err(error) => self.end(Err(error)),
        }
    }

    fn take_lines(&mut self) {
        while !self.over
            && let Some((line, text)) = self.splitter.next()
        {
            if self.taken == self.most {
                return self.end(Err(ApiError::TooMany { limit: self.most }));
            }
            let read = match text {
                Ok(text) => batch::read_line(&text, line, self.lines.values),
                Err(error) => Err(error),
            };
            self.take(line, read);
            if self.numbers.len() >= CHUNK_RECORDS {
                self.send();
            }
        }
        self.send();
    }

    fn take(&mut self, line: usize, read: Result<Draft, ApiError>) {
        self.taken += 1;
        self.numbers.push(line);
        self.gather.take(read, &self.lines.fields);
    }

    /// What is left is not read; the reason, if there is one, is the last result.
    fn end(&mut self, reason: Result<(), ApiError>) {
        self.over = true;
        if let Err(error) = reason {
            self.take(self.splitter.line + 1, Err(error));
        }
        self.send();
    }

    fn send(&mut self) {
        if self.numbers.is_empty() {
            return;
        }
        let Lines { api, topic, trace, .. } = &self.lines;
        let chunk = std::mem::take(&mut self.gather).send(api, topic, trace);
        let numbers = std::mem::take(&mut self.numbers);
        self.chunks.push_back(async move { numbers.into_iter().zip(chunk.resolve().await).collect() }.boxed());
    }
}

/// What became of the oldest chunk; never, without one. Cancel-safe: the chunk stays where it is.
async fn front(chunks: &mut VecDeque<BoxFuture<'static, Vec<(usize, Done)>>>) -> Vec<(usize, Done)> {
    let results = match chunks.front_mut() {
        Some(front) => front.await,
        None => std::future::pending().await,
    };
    chunks.pop_front();
    results
}

/// Cuts a body into lines.
#[derive(Debug)]
struct Splitter {
    /// The begin of a line.
    kept: BytesMut,
    /// Whole lines.
    ready: Bytes,
    /// The number of the last line that was given out.
    line: usize,
    longest: usize,
    /// Within a line that is too long.
    skipping: bool,
    /// A line that is too long began after those that are ready.
    overflow: bool,
}

impl Splitter {
    /// Whether nothing of a line was read yet.
    fn is_between(&self) -> bool {
        self.kept.is_empty() && !self.skipping
    }

    /// Adds what was read. All lines that were ready must have been taken.
    fn feed(&mut self, mut data: &[u8]) {
        if self.skipping {
            match data.iter().position(|byte| *byte == b'\n') {
                None => return,
                Some(at) => data = &data[at + 1..],
            }
            self.skipping = false;
        }
        let end = data.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| self.kept.len() + at + 1);
        self.kept.extend_from_slice(data);
        self.ready = self.kept.split_to(end).freeze();
        if self.kept.len() > self.longest {
            self.kept.clear();
            (self.skipping, self.overflow) = (true, true);
        }
    }

    /// Nothing follows: what is left is the last line.
    fn finish(&mut self) {
        self.ready = self.kept.split().freeze();
        self.skipping = false;
    }

    /// The next line that is not empty, with its number.
    fn next(&mut self) -> Option<(usize, Result<Bytes, ApiError>)> {
        while !self.ready.is_empty() {
            self.line += 1;
            let text = match self.ready.iter().position(|byte| *byte == b'\n') {
                Some(at) => {
                    let text = self.ready.split_to(at + 1);
                    text.slice(..at)
                }
                None => std::mem::take(&mut self.ready),
            };
            let trimmed = text.trim_ascii();
            if !trimmed.is_empty() {
                return Some((self.line, Ok(text.slice_ref(trimmed))));
            }
        }
        if std::mem::take(&mut self.overflow) {
            self.line += 1;
            return Some((self.line, Err(ApiError::BodyTooLarge { limit: self.longest })));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn splitter(longest: usize) -> Splitter {
        Splitter { kept: BytesMut::new(), ready: Bytes::new(), line: 0, longest, skipping: false, overflow: false }
    }

    fn drain(splitter: &mut Splitter, into: &mut Vec<(usize, String)>) {
        while let Some((line, text)) = splitter.next() {
            into.push((line, text.map_or_else(|_| "too long".to_owned(), |text| String::from_utf8(text.to_vec()).unwrap())));
        }
    }

    /// Wherever the body is cut into pieces, the lines are the same.
    #[test]
    fn lines_are_the_same_however_the_body_is_cut() {
        let body = b"one\n\n  two\r\nsomething that is far too long for a line\nthree\n\xc3\xa9\nlast";
        let wanted = [(1, "one"), (3, "two"), (4, "too long"), (5, "three"), (6, "é"), (7, "last")];
        for size in 1..body.len() {
            let (mut splitter, mut lines) = (splitter(20), Vec::new());
            for piece in body.chunks(size) {
                splitter.feed(piece);
                drain(&mut splitter, &mut lines);
            }
            splitter.finish();
            drain(&mut splitter, &mut lines);
            // In one piece with its end, a long line is whole before it is found to be too long: the record's own limit meets it then.
            let lines: Vec<_> =
                lines.iter().map(|(line, text)| (*line, if text.starts_with("some") { "too long" } else { text })).collect();
            assert_eq!(lines, wanted, "in pieces of {size}");
        }
    }

    #[test]
    fn a_long_line_without_an_end_keeps_nothing() {
        let (mut splitter, mut lines) = (splitter(100), Vec::new());
        for _ in 0..1000 {
            splitter.feed(&[b'x'; 64]);
            drain(&mut splitter, &mut lines);
            assert!(splitter.kept.len() <= 164 && !splitter.is_between());
        }
        splitter.finish();
        drain(&mut splitter, &mut lines);
        assert_eq!(lines, [(1, "too long".to_owned())]);
    }
}
