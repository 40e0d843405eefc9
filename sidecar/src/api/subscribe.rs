//! `Mesh.Subscribe`: deliveries of a route, or records of topics, on a gRPC stream; credits and outcomes come back on it.
//!
//! One task per stream. It never waits for room on the stream without reading from it, so that a subscriber that answers before it reads
//! cannot lock up with it.
//!
//! Invariant: no more records are sent than there are credits.
//! Invariant: a stream that ends gives its unanswered deliveries back; those of a topic subscription stay uncommitted.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::Stream;
use mesh_proto::v1::{self, subscribe_request::Request, subscribe_response::Response};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Api, follow, message, problem::ApiError, pull};
use crate::{
    consume::subscription::{Handed, Received, Subscription},
    deliver::{
        desk::{Attachment, Desk, Heard},
        grpc,
    },
    outcome::{Answer, Outcome},
    publish::Caller,
    record::{Position, Record, TopicPartition},
};

/// Messages on their way to the subscriber.
const AHEAD: usize = 4;
/// Records of one message at most.
const MESSAGE_RECORDS: usize = 256;
/// Their bytes, more or less; a larger record goes alone. Below what gRPC clients take by default, 4 MiB.
const MESSAGE_BYTES: usize = 1024 * 1024;
/// The credits of a topic subscription that names none.
const TOPIC_CREDITS: u32 = 64;
/// Credits beyond this are not counted.
const MOST_CREDITS: usize = 1_000_000;
/// Records of a topic subscription with a group that may wait for their outcomes.
const UNANSWERED: usize = 10_000;
/// A wait without end, as far as a desk is concerned.
const LONG: Duration = Duration::from_secs(3600);

type Sender = mpsc::Sender<Result<v1::SubscribeResponse, Status>>;

/// Starts the stream's task, and answers its messages.
pub(super) fn start(
    api: &Api,
    caller: Caller,
    requests: Streaming<v1::SubscribeRequest>,
) -> impl Stream<Item = Result<v1::SubscribeResponse, Status>> + Send + use<> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    let stream = Talk { api: api.clone(), requests, sender, out: VecDeque::new(), credits: 0, draining: false, deaf: false };
    api.inner.tasks.spawn(stream.run(caller));
    ReceiverStream::new(receiver)
}

/// A stream, whatever it carries.
struct Talk {
    api: Api,
    requests: Streaming<v1::SubscribeRequest>,
    sender: Sender,
    /// What waits for room.
    out: VecDeque<v1::SubscribeResponse>,
    credits: usize,
    draining: bool,
    /// The subscriber has said its last.
    deaf: bool,
}

/// Why a stream ends.
enum End {
    /// The subscriber is done, or gone.
    Quiet,
    Error(ApiError),
}

impl From<ApiError> for End {
    fn from(error: ApiError) -> Self {
        Self::Error(error)
    }
}

impl Talk {
    async fn run(mut self, caller: Caller) {
        let Err(end) = self.serve(caller).await;
        if let End::Error(error) = end {
            // A subscriber that is gone reads no error.
            _ = self.sender.send(Err(error.status())).await;
        }
    }

    async fn serve(&mut self, caller: Caller) -> Result<std::convert::Infallible, End> {
        let Some(first) = self.hear().await? else {
            return Err(ApiError::Protocol("the first message of a subscription must be `attach` or `topics`").into());
        };
        match first.request {
            Some(Request::Attach(attach)) => {
                let desk = pull::desk(&self.api, caller, &attach.route, false)?;
                let first = if attach.credits == 0 { desk.concurrency() } else { attach.credits as usize };
                self.begin(&attach.route, desk.group(), first);
                let attached = desk.attach();
                Attached { route: attach.route, desk, unanswered: HashSet::new(), _attached: attached }.serve(self).await
            }
            Some(Request::Topics(topics)) => {
                let subscription = follow::open(&self.api, caller, &topics.topics, &topics.group, &topics.from).await?;
                let first = if topics.credits == 0 { TOPIC_CREDITS } else { topics.credits };
                self.begin("", &topics.group, first as usize);
                Topics::new(subscription, !topics.group.is_empty()).serve(self).await
            }
            _ => Err(ApiError::Protocol("the first message of a subscription must be `attach` or `topics`").into()),
        }
    }

    fn begin(&mut self, route: &str, group: &str, credits: usize) {
        self.credits = credits.min(MOST_CREDITS);
        self.say(Response::Attached(v1::Attached { route: route.to_owned(), group: group.to_owned() }));
    }

    fn say(&mut self, response: Response) {
        self.out.push_back(v1::SubscribeResponse { response: Some(response) });
    }

    /// Says once that no more records come.
    fn drain(&mut self, reason: &str) {
        if !self.draining {
            self.draining = true;
            self.say(Response::Draining(v1::Draining { reason: reason.to_owned() }));
        }
    }

    /// The next message of the subscriber; `None` once, when it has said its last. Cancel-safe.
    async fn hear(&mut self) -> Result<Option<v1::SubscribeRequest>, End> {
        tokio::select! {
            () = self.api.inner.closing.cancelled() => Err(ApiError::Draining.into()),
            () = self.sender.closed() => Err(End::Quiet),
            message = self.requests.message(), if !self.deaf => match message {
                Ok(message) => {
                    self.deaf = message.is_none();
                    Ok(message)
                }
                // The connection broke, or the call was cancelled.
                Err(_) => Err(End::Quiet),
            }
        }
    }

    /// Reads the subscriber's next message while it sends what waits. Cancel-safe.
    async fn turn(&mut self) -> Result<Turn, End> {
        if self.out.is_empty() {
            return self.hear().await.map(Turn::Heard);
        }
        let sender = self.sender.clone();
        tokio::select! {
            heard = self.hear() => heard.map(Turn::Heard),
            room = sender.reserve() => match room {
                Err(_) => Err(End::Quiet),
                Ok(room) => {
                    if let Some(message) = self.out.pop_front() {
                        room.send(Ok(message));
                    }
                    Ok(Turn::Sent)
                }
            }
        }
    }

    /// Takes credits from a message, and gives its outcomes.
    fn outcomes(&mut self, message: v1::SubscribeRequest) -> Result<Vec<v1::Outcome>, End> {
        match message.request {
            Some(Request::Credit(credit)) => {
                self.credits = self.credits.saturating_add(credit.records as usize).min(MOST_CREDITS);
                Ok(Vec::new())
            }
            Some(Request::Outcomes(outcomes)) => Ok(outcomes.outcomes),
            Some(Request::Attach(_) | Request::Topics(_)) => Err(ApiError::Protocol("a stream carries one subscription").into()),
            None => Err(ApiError::Protocol("a message of a subscription says nothing").into()),
        }
    }

    /// Queues records as messages of a bearable size.
    fn deliver(&mut self, route: &str, records: Vec<v1::DeliveredRecord>) {
        self.credits = self.credits.saturating_sub(records.len());
        let (mut part, mut bytes) = (Vec::new(), 0);
        for record in records {
            let size = message::size(&record);
            if !part.is_empty() && bytes + size > MESSAGE_BYTES {
                self.say(Response::Delivery(delivery(route, std::mem::take(&mut part))));
                bytes = 0;
            }
            bytes += size;
            part.push(record);
        }
        if !part.is_empty() {
            self.say(Response::Delivery(delivery(route, part)));
        }
    }

    /// How many records may be sent now.
    fn room(&self) -> usize {
        if self.draining || !self.out.is_empty() { 0 } else { self.credits.min(MESSAGE_RECORDS) }
    }
}

fn delivery(route: &str, records: Vec<v1::DeliveredRecord>) -> v1::Delivery {
    v1::Delivery { route: route.to_owned(), handler: String::new(), records }
}

/// What happened on a stream.
enum Turn {
    Heard(Option<v1::SubscribeRequest>),
    Sent,
}

/// A stream that is attached to a route.
struct Attached {
    route: String,
    desk: Arc<Desk>,
    unanswered: HashSet<u64>,
    _attached: Attachment,
}

impl Attached {
    async fn serve(mut self, talk: &mut Talk) -> Result<std::convert::Infallible, End> {
        let draining = talk.api.inner.draining.clone();
        loop {
            if talk.draining && talk.out.is_empty() && self.unanswered.is_empty() {
                return Err(End::Quiet);
            }
            let (room, active) = (talk.room(), !talk.draining);
            let desk = self.desk.clone();
            tokio::select! {
                turn = talk.turn() => match turn? {
                    Turn::Heard(Some(message)) => {
                        let outcomes = talk.outcomes(message)?;
                        self.answer(outcomes);
                    }
                    // No outcome can come any more.
                    Turn::Heard(None) => return Err(End::Quiet),
                    Turn::Sent => {}
                },
                () = draining.cancelled(), if active => talk.drain("the sidecar drains"),
                taken = desk.take(room, LONG), if room > 0 => match taken {
                    Some(taken) => {
                        self.unanswered.extend(taken.iter().map(|delivery| delivery.id));
                        if let Some(first) = taken.first() {
                            let records = grpc::message(&first.route, &taken).records;
                            talk.deliver(&self.route, records);
                        }
                    }
                    None => talk.drain("the route drains, or is gone"),
                },
            }
        }
    }

    fn answer(&mut self, outcomes: Vec<v1::Outcome>) {
        let answers: Vec<Answer> = outcomes
            .into_iter()
            .map(|said| {
                self.unanswered.remove(&said.delivery_id);
                Answer { id: said.delivery_id, outcome: grpc::outcome(said) }
            })
            .collect();
        let unknown = self.desk.answer(answers).into_iter().filter(|heard| *heard != Heard::Taken).count();
        if unknown > 0 {
            tracing::debug!(route = self.route, unknown, "outcomes for deliveries that do not wait for one: too late, or never made");
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if !self.unanswered.is_empty() {
            self.desk.abandon(self.unanswered.drain().collect());
        }
    }
}

/// A stream that reads topics.
struct Topics {
    subscription: Subscription,
    handed: Handed,
    /// With a group, outcomes are awaited and commits follow them; without one nothing is remembered of what was sent.
    grouped: bool,
    next_id: u64,
    /// What is left of a batch.
    records: VecDeque<(i64, Record)>,
    source: Option<(TopicPartition, u64)>,
    unanswered: HashMap<u64, Sent>,
    progress: HashMap<(TopicPartition, u64), Progress>,
    /// Records to send again, by time.
    again: BTreeMap<(Instant, u64), ()>,
}

/// A record that was sent, and waits for its outcome.
struct Sent {
    source: (TopicPartition, u64),
    offset: i64,
    attempt: u32,
    record: Arc<Record>,
}

/// What was sent of a partition under an assignment, by offset, and whether it is done.
#[derive(Default)]
struct Progress(VecDeque<(i64, bool)>);

impl Progress {
    /// Marks an offset; the next offset to commit, if it moved.
    fn done(&mut self, offset: i64) -> Option<i64> {
        if let Ok(at) = self.0.binary_search_by_key(&offset, |(offset, _)| *offset) {
            self.0[at].1 = true;
        }
        let mut next = None;
        while let Some((offset, true)) = self.0.front() {
            next = Some(offset + 1);
            self.0.pop_front();
        }
        next
    }
}

impl Topics {
    fn new(subscription: Subscription, grouped: bool) -> Self {
        Self {
            handed: subscription.handed(),
            subscription,
            grouped,
            next_id: 1,
            records: VecDeque::new(),
            source: None,
            unanswered: HashMap::new(),
            progress: HashMap::new(),
            again: BTreeMap::new(),
        }
    }

    async fn serve(mut self, talk: &mut Talk) -> Result<std::convert::Infallible, End> {
        let draining = talk.api.inner.draining.clone();
        loop {
            // Nothing can come any more: the last was said, or the last credit is spent and no other can be given.
            let last = (talk.draining && self.unanswered.is_empty()) || (talk.deaf && talk.credits == 0);
            if last && talk.out.is_empty() {
                return Err(End::Quiet);
            }
            let room = talk.room();
            if room > 0 {
                let records = self.take(room);
                if !records.is_empty() {
                    talk.deliver("", records);
                    continue;
                }
            }
            let active = !talk.draining;
            let more = room > 0 && self.records.is_empty() && self.unanswered.len() < UNANSWERED;
            let due = self.again.keys().next().map(|(time, _)| *time);
            tokio::select! {
                turn = talk.turn() => match turn? {
                    Turn::Heard(Some(message)) => {
                        let outcomes = talk.outcomes(message)?;
                        self.answer(outcomes);
                    }
                    // No outcome can come any more; without a group none is needed.
                    Turn::Heard(None) if self.grouped => return Err(End::Quiet),
                    Turn::Heard(None) | Turn::Sent => {}
                },
                () = draining.cancelled(), if active => talk.drain("the sidecar drains"),
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() && room > 0 => {}
                received = self.subscription.next(), if more => match received {
                    Some(Received { epoch, batch }) => {
                        self.source = Some((batch.partition, epoch));
                        self.records = batch.records.into();
                    }
                    None => talk.drain("the subscription ended"),
                },
            }
        }
    }

    /// Up to `room` records to send: those that are due again, then new ones.
    fn take(&mut self, room: usize) -> Vec<v1::DeliveredRecord> {
        let mut out = Vec::new();
        let now = Instant::now();
        while out.len() < room
            && let Some(entry) = self.again.first_entry()
            && entry.key().0 <= now
        {
            let (_, id) = *entry.key();
            entry.remove();
            if let Some(sent) = self.unanswered.get(&id) {
                out.push(message::of_topic(id, &sent.record, &position(&sent.source, sent.offset), sent.attempt));
            }
        }
        let Some(source) = &self.source else { return out };
        while out.len() < room
            && self.unanswered.len() < UNANSWERED
            && let Some((offset, record)) = self.records.pop_front()
        {
            let id = self.next_id;
            self.next_id += 1;
            out.push(message::of_topic(id, &record, &position(source, offset), 1));
            if self.grouped {
                self.progress.entry(source.clone()).or_default().0.push_back((offset, false));
                self.unanswered.insert(id, Sent { source: source.clone(), offset, attempt: 1, record: Arc::new(record) });
            }
        }
        out
    }

    fn answer(&mut self, outcomes: Vec<v1::Outcome>) {
        for said in outcomes {
            let id = said.delivery_id;
            let outcome = grpc::outcome(said);
            if let Outcome::Retry { after, .. } = outcome {
                if let Some(sent) = self.unanswered.get_mut(&id) {
                    sent.attempt = sent.attempt.saturating_add(1);
                    self.again.insert((Instant::now() + after.unwrap_or_default(), id), ());
                }
                continue;
            }
            let Some(Sent { source, offset, .. }) = self.unanswered.remove(&id) else { continue };
            if let Some(progress) = self.progress.get_mut(&source) {
                if let Some(next) = progress.done(offset) {
                    self.handed.up_to(&source.0, source.1, next);
                }
                if progress.0.is_empty() {
                    self.progress.remove(&source);
                }
            }
        }
    }
}

fn position(source: &(TopicPartition, u64), offset: i64) -> Position {
    Position { partition: source.0.clone(), offset }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_no_gap_below_is_committed() {
        let mut progress = Progress([3, 4, 7].map(|offset| (offset, false)).into());
        assert_eq!(progress.done(4), None);
        assert_eq!(progress.done(9), None);
        assert_eq!(progress.done(3), Some(5));
        assert_eq!(progress.done(7), Some(8));
        assert!(progress.0.is_empty());
    }
}
