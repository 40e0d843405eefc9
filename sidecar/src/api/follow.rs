//! `GET /v1/topics/{topic}/records`: reads a topic without a route, as server-sent events or as lines of JSON.
//!
//! Without a group the `id` of an event says where to go on in every partition, so that a client that comes back with `last-event-id` (an
//! `EventSource` does by itself) misses nothing and gets nothing twice.
//!
//! Invariant: with a group, an offset is committed only after the connection took the bytes of its record.
//! Invariant: a client that reads slowly holds its own consumer and nothing else; one that leaves ends it.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Response, header, request::Parts};
use tokio::{task::spawn_blocking, time::Instant};

use super::{Api, paths, problem::ApiError};
use crate::{
    broker::{ConsumerConfig, StartOffset},
    consume::subscription::{Handed, Received, Subscription},
    json,
    publish::{Caller, Use, check_allowed, check_name},
    record::{Position, Record, TopicPartition},
};

/// How much is written at once; a larger record goes alone.
pub(super) const CHUNK: usize = 64 * 1024;
/// How often a silent stream of events shows that it lives.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);
const KEEP_ALIVE_COMMENT: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// The header by which a client of server-sent events says what it saw last.
pub(super) const LAST_EVENT_ID: &str = "last-event-id";
/// With more partitions than this an event's id stands after each piece of [`CHUNK`] bytes, not at each event: it names them all.
const ID_EACH: usize = 64;

/// `last-event-id`, if there is one.
///
/// # Errors
/// [`ApiError::Header`] if it is no text.
pub(super) fn last_event_id(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    Ok(super::fields::optional(headers, LAST_EVENT_ID)?.filter(|id| !id.is_empty()))
}

/// Where to go on: `partition:offset,…`, as an event's id says it.
fn read_positions(text: &str) -> Option<BTreeMap<i32, i64>> {
    let mut positions = BTreeMap::new();
    for pair in text.split(',') {
        let (partition, offset) = pair.split_once(':')?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(partition) || !digits(offset) || positions.insert(partition.parse().ok()?, offset.parse().ok()?).is_some() {
            return None;
        }
    }
    Some(positions)
}

/// How records are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// One JSON document.
    Json,
    /// A record a line.
    Lines,
    /// Server-sent events.
    Events,
}

impl Form {
    /// By `accept`, with a default for a caller that names none.
    ///
    /// # Errors
    /// [`ApiError::NotAcceptable`].
    pub(super) fn of(headers: &HeaderMap, default: Self, served: &[Self]) -> Result<Self, ApiError> {
        let mut named = String::new();
        for value in headers.get_all(header::ACCEPT) {
            let text = String::from_utf8_lossy(value.as_bytes());
            for part in text.split(',') {
                let form = match part.split(';').next().unwrap_or_default().trim() {
                    "*/*" | "application/*" | "" => return Ok(default),
                    "text/event-stream" | "text/*" => Self::Events,
                    "application/x-ndjson" | "application/ndjson" | "application/jsonl" => Self::Lines,
                    "application/json" => Self::Json,
                    _ => continue,
                };
                if served.contains(&form) {
                    return Ok(form);
                }
            }
            named.push_str(&text);
        }
        if headers.contains_key(header::ACCEPT) { Err(ApiError::NotAcceptable(crate::record::clip(&named))) } else { Ok(default) }
    }

    pub(super) fn content_type(self) -> HeaderValue {
        match self {
            Self::Json => paths::JSON,
            Self::Lines => HeaderValue::from_static("application/x-ndjson"),
            Self::Events => HeaderValue::from_static("text/event-stream"),
        }
    }

    /// Appends a record; `id` is the event's, and `more` adds members before the record's own.
    pub(super) fn write(
        self,
        out: &mut Vec<u8>,
        id: std::fmt::Arguments<'_>,
        position: &Position,
        record: &Record,
        more: impl FnOnce(&mut Vec<u8>),
    ) {
        if self == Self::Events {
            json::put(out, format_args!("id: {id}\n"));
        }
        self.write_data(out, position, record, more);
    }

    /// The same without an id.
    fn write_data(self, out: &mut Vec<u8>, position: &Position, record: &Record, more: impl FnOnce(&mut Vec<u8>)) {
        if self == Self::Events {
            out.extend_from_slice(b"data: ");
        }
        out.push(b'{');
        more(out);
        json::write_members(out, position, record);
        out.extend_from_slice(match self {
            Self::Json => b"}",
            Self::Lines => b"}\n",
            Self::Events => b"}\n\n",
        });
    }

    /// What a stream ends with when the sidecar drains.
    pub(super) fn farewell(self) -> Option<Bytes> {
        (self == Self::Events).then(|| Bytes::from_static(b"event: draining\ndata: {}\n\n"))
    }
}

/// A streaming answer.
pub(super) fn streaming(form: Form, frames: impl stream::Stream<Item = Result<Bytes, Infallible>> + Send + 'static) -> Response<Body> {
    let mut response = Response::new(Body::from_stream(frames));
    response.headers_mut().insert(header::CONTENT_TYPE, form.content_type());
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The parameters of a query, decoded; each name at most once.
pub(super) fn query(parts: &Parts, known: &[&'static str]) -> Result<Vec<(&'static str, String)>, ApiError> {
    let mut found: Vec<(&'static str, String)> = Vec::new();
    for pair in parts.uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let Some(name) = known.iter().find(|known| **known == name) else {
            let reason = format!("names `{}`; known here: {}", crate::record::clip(name), known.join(", "));
            return Err(ApiError::Query { name: "query", reason });
        };
        if found.iter().any(|(other, _)| other == name) {
            return Err(ApiError::Query { name, reason: "stands twice".to_owned() });
        }
        // A `+` is a plus: times have offsets.
        let value = percent_encoding::percent_decode_str(value).decode_utf8();
        let value = value.map_err(|_| ApiError::Query { name, reason: "is not UTF-8 once decoded".to_owned() })?;
        found.push((name, value.into_owned()));
    }
    Ok(found)
}

/// Checks a subscription and opens it. An empty group is none; an empty start is the latest record without a group, and the earliest with one.
pub(super) async fn open(api: &Api, caller: Caller, topics: &[String], group: &str, from: &str) -> Result<Subscription, ApiError> {
    let publisher = &api.inner.publisher;
    let config = publisher.config();
    if api.inner.draining.is_cancelled() {
        return Err(ApiError::Draining);
    }
    if topics.is_empty() {
        return Err(ApiError::Query { name: "topics", reason: "names no topic".to_owned() });
    }
    if group.len() > 255 || group.chars().any(char::is_control) {
        return Err(ApiError::Query { name: "group", reason: "must have at most 255 characters and no control character".to_owned() });
    }
    let table = api.inner.table.borrow().clone();
    if let (Some(table), false) = (table, group.is_empty()) {
        // The names of ten thousand routes may have to be read for it.
        let asked = group.to_owned();
        let route = spawn_blocking(move || table.compiled.route_of_group(&asked).map(str::to_owned)).await;
        // What was begun is not run once the process ends.
        let Ok(route) = route else { return Err(ApiError::Draining) };
        if let Some(route) = route {
            return Err(ApiError::RouteGroup { group: group.to_owned(), route });
        }
    }
    if group.starts_with("__") {
        return Err(ApiError::Query { name: "group", reason: "must not begin with `__`".to_owned() });
    }
    let start = match from {
        "" if group.is_empty() => StartOffset::Latest,
        "" | "earliest" => StartOffset::Earliest,
        "latest" => StartOffset::Latest,
        text => match (text.parse::<jiff::Timestamp>(), read_positions(text), topics) {
            (Ok(time), ..) => StartOffset::At(time.as_millisecond()),
            (_, Some(positions), [topic]) if group.is_empty() => {
                let topic: Arc<str> = topic.as_str().into();
                let each = positions.into_iter().map(|(number, offset)| (TopicPartition::new(topic.clone(), number), offset));
                StartOffset::Each(Arc::new(each.collect()))
            }
            (_, Some(_), _) => {
                let reason = "names offsets, which is for reading one topic without a group: a group goes on where it committed".to_owned();
                return Err(ApiError::Query { name: "from", reason });
            }
            (Err(error), ..) => {
                let reason = format!(
                    "is `{}`: use `earliest`, `latest`, a time such as 2025-01-31T12:00:00Z, or the id of an event ({error})",
                    crate::record::clip(text)
                );
                return Err(ApiError::Query { name: "from", reason });
            }
        },
    };
    for topic in topics {
        check_name(topic)?;
        check_allowed(&config.services, caller, topic, Use::Subscribe)?;
        publisher.exists(topic).await?;
    }
    let consumer = ConsumerConfig {
        group: (!group.is_empty()).then(|| group.to_owned()),
        topics: topics.iter().map(|topic| topic.as_str().into()).collect(),
        // Static membership is the routes': the same name in another group would be another member.
        instance: None,
        start,
        // There may be hundreds of them, each with a client of the broker of its own.
        buffer_bytes: (config.limits.buffer_bytes / 4).max(config.limits.record_bytes),
        transactional_id: None,
    };
    Ok(Subscription::open(&api.inner.broker, consumer, &api.inner.tasks)?)
}

/// Answers the request.
pub(super) async fn get(api: &Api, topic: &str, parts: &Parts) -> Result<Response<Body>, ApiError> {
    let caller = paths::caller(api, &parts.headers)?;
    let form = Form::of(&parts.headers, Form::Lines, &[Form::Lines, Form::Events])?;
    let (mut group, mut from) = (String::new(), String::new());
    for (name, value) in query(parts, &["group", "from"])? {
        match name {
            "group" if value.is_empty() => return Err(ApiError::Query { name, reason: "is empty".to_owned() }),
            "group" => group = value,
            _ => from = value,
        }
    }
    // A group goes on where it committed, whatever the client saw.
    if group.is_empty()
        && let Some(last) = last_event_id(&parts.headers)?
    {
        if read_positions(last).is_none() {
            let reason = "is no `id` of an event of this topic; leave it out to begin by `from`";
            return Err(ApiError::Header { name: LAST_EVENT_ID.to_owned(), reason });
        }
        last.clone_into(&mut from);
    }
    let subscription = open(api, caller, &[topic.to_owned()], &group, &from).await?;
    let follow = Follow {
        handed: subscription.handed(),
        subscription,
        form,
        places: (form == Form::Events && group.is_empty()).then(Places::default),
        draining: api.inner.draining.clone(),
        records: VecDeque::new(),
        source: None,
        given: None,
        began: false,
        over: false,
    };
    Ok(streaming(form, stream::unfold(follow, |mut follow| async { follow.frame().await.map(|frame| (Ok(frame), follow)) })))
}

/// Where a reader is in every partition: the next offset, and the assignment that it belongs to.
#[derive(Debug, Default)]
struct Places(BTreeMap<i32, (u64, i64)>);

impl Places {
    /// Takes in where partitions begin. One that was assigned anew begins anew.
    fn begin(&mut self, starts: Vec<(TopicPartition, u64, i64)>) {
        for (partition, epoch, start) in starts {
            let place = self.0.entry(partition.partition).or_insert((epoch, start));
            if place.0 != epoch {
                *place = (epoch, start);
            }
        }
    }

    fn pass(&mut self, partition: i32, epoch: u64, next: i64) {
        self.0.insert(partition, (epoch, next));
    }

    fn each(&self) -> bool {
        self.0.len() <= ID_EACH
    }
}

/// As an event's id.
impl std::fmt::Display for Places {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, (partition, (_, next))) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma}{partition}:{next}")?;
        }
        Ok(())
    }
}

struct Follow {
    subscription: Subscription,
    handed: Handed,
    form: Form,
    /// For events without a group.
    places: Option<Places>,
    draining: tokio_util::sync::CancellationToken,
    /// What is left of a batch.
    records: VecDeque<(i64, Record)>,
    /// The partition and the assignment of that batch.
    source: Option<(TopicPartition, u64)>,
    /// The next offset after the bytes that the connection was given.
    given: Option<i64>,
    began: bool,
    over: bool,
}

impl Follow {
    /// The next bytes; `None` at the end.
    async fn frame(&mut self) -> Option<Bytes> {
        // The connection asks for more once it has taken what it was given.
        if let (Some(next), Some((partition, epoch))) = (self.given.take(), &self.source) {
            self.handed.up_to(partition, *epoch, next);
        }
        if self.over {
            return None;
        }
        if !self.began {
            self.began = true;
            if self.form == Form::Events {
                return Some(Bytes::from_static(b": subscribed\nretry: 1000\n\n"));
            }
        }
        let alive = Instant::now() + KEEP_ALIVE;
        while self.records.is_empty() {
            tokio::select! {
                biased;
                () = self.draining.cancelled() => {
                    self.over = true;
                    return self.form.farewell();
                }
                received = self.subscription.next_or_moved() => match received.ok()? {
                    Some(received) => self.receive(received),
                    // An event without data changes the client's last id and nothing else: one that leaves before the first record knows
                    // where it was, too.
                    None => {
                        let starts = self.subscription.starts();
                        if let Some(places) = &mut self.places {
                            places.begin(starts);
                            return Some(format!("id: {places}\n\n").into());
                        }
                    }
                },
                () = tokio::time::sleep_until(alive), if self.form == Form::Events => return Some(KEEP_ALIVE_COMMENT),
            }
        }
        Some(self.write())
    }

    fn receive(&mut self, Received { epoch, batch }: Received) {
        self.source = Some((batch.partition, epoch));
        self.records = batch.records.into();
    }

    fn write(&mut self) -> Bytes {
        let mut out = Vec::with_capacity(4096);
        let Some((partition, epoch)) = self.source.clone() else { return Bytes::new() };
        let position = |offset| Position { partition: partition.clone(), offset };
        while out.len() < CHUNK
            && let Some((offset, record)) = self.records.pop_front()
        {
            let at = position(offset);
            match &mut self.places {
                None => self.form.write(&mut out, format_args!("{at}"), &at, &record, |_| {}),
                Some(places) => {
                    places.pass(partition.partition, epoch, offset + 1);
                    match places.each() {
                        true => self.form.write(&mut out, format_args!("{places}"), &at, &record, |_| {}),
                        false => self.form.write_data(&mut out, &at, &record, |_| {}),
                    }
                }
            }
            self.given = Some(offset + 1);
        }
        if let Some(places) = self.places.as_ref().filter(|places| !places.each()) {
            json::put(&mut out, format_args!("id: {places}\n\n"));
        }
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_as_they_are_written() {
        let mut places = Places::default();
        let start = |number, epoch, offset| (TopicPartition::new("t", number), epoch, offset);
        places.begin(vec![start(2, 1, 0), start(0, 2, 7)]);
        places.pass(2, 1, 5);
        places.begin(vec![start(2, 1, 0), start(0, 3, 9), start(1, 4, 3)]);
        assert_eq!(places.to_string(), "0:9,1:3,2:5", "an assignment that goes on keeps its place, a new one begins anew");
        assert_eq!(read_positions(&places.to_string()), Some([(0, 9), (1, 3), (2, 5)].into()));
        for bad in ["", "0", "0:", ":1", "0:1,", "0:-1", "-1:0", "+1:0", "0:1,0:2", "orders/0/4", "0:99999999999999999999", "4294967296:1"]
        {
            assert_eq!(read_positions(bad), None, "{bad}");
        }
    }
}
