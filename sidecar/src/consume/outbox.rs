//! What a route publishes, in order, until it is acknowledged.
//!
//! Invariant: publications of a lane are stored in the order in which they were put, whatever fails: one is sent when those before it are
//! acknowledged, or together with them. (What was sent behind one that fails later could be stored before it.)
//! Invariant: a record goes to a retry or park topic after the replies and dead letters before it in its lane are acknowledged, not together
//! with them: of one batch the broker may store a part. Who looks there after a crash would run it before them.
//! Invariant: while one is waiting to be sent again, nothing that was put later is sent.
//! Invariant: nothing is dropped: a publication ends by acknowledgement, or as a dead letter if the broker refuses it for good.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque, hash_map::Entry},
    hash::BuildHasherDefault,
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::Instant;

pub(crate) use self::parcel::Parcel;
use super::reply::{self, Cut};
use crate::{
    broker::{Outgoing, ProduceError, ProduceErrorKind, Producer},
    judge::Reason,
    lanes::{Lane, LaneHasher},
    mutation::{self, Mutation},
    outcome::{Delivery, Disposition, Reply},
    record::{Position, now_ms},
    telemetry::trace::{Span, SpanKind, TraceContext, Tracer},
    tiers::{self, Why},
};

mod parcel;

/// Publications that are not acknowledged, at most, and the bytes of their answers: beyond, the route calls its service no more until the
/// broker has caught up.
const ROOM: usize = 4_096;
const ROOM_BYTES: usize = 16 << 20;

/// The pause before a publication is sent again.
const PAUSE: Duration = Duration::from_millis(500);

/// How long a publication waits for others that leave with it, at most, while records wait for the service anyway: broker and librdkafka work by
/// request, and one of a few records costs as much as one of a hundred.
const GATHER: Duration = Duration::from_millis(5);

/// One record's way out of the route.
#[derive(Debug)]
pub(crate) struct Publication {
    /// The partition's slot and epoch: where the offset completes.
    pub(crate) slot: u32,
    pub(crate) epoch: u64,
    /// The lane within which it keeps its place.
    pub(crate) lane: Option<Lane>,
    /// The offset that it completes.
    pub(crate) offset: i64,
    /// The key's hash, for what waits behind it.
    pub(crate) key: u64,
    pub(crate) delivery: Delivery,
    pub(crate) what: What,
    /// The context of the span that processed the record.
    pub(crate) context: Option<TraceContext>,
}

impl Publication {
    fn is_aside(&self) -> bool {
        matches!(self.what, What::Aside { .. })
    }

    /// The bytes that it holds in memory until it is acknowledged.
    fn size(&self) -> usize {
        match &self.what {
            What::Reply { reply, .. } => reply.records.iter().map(|record| record.value.as_ref().map_or(0, bytes::Bytes::len)).sum(),
            What::DeadLetter { .. } | What::Aside { .. } => self.delivery.record.size(),
        }
    }
}

/// What is published.
#[derive(Debug)]
pub(crate) enum What {
    Reply {
        topics: Arc<[Arc<str>]>,
        reply: Reply,
    },
    DeadLetter {
        reason: Reason,
        detail: String,
    },
    /// The record itself, into a retry or park topic of the route.
    Aside {
        topic: Arc<str>,
        attempts: u32,
        why: Why,
    },
}

/// What a publication means for its record, once it is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its disposition, and the reason.
    Ended(Disposition, &'static str),
    /// None: it lies in another topic of the route.
    Aside,
}

/// A publication that is acknowledged.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) slot: u32,
    pub(crate) epoch: u64,
    pub(crate) offset: i64,
    /// The key's hash, and the offset in the source.
    pub(crate) key: u64,
    pub(crate) origin: i64,
    pub(crate) end: End,
    pub(crate) context: Option<TraceContext>,
}

struct Pending {
    sequence: u64,
    publication: Publication,
    /// Which of its records are acknowledged; empty before the first failure.
    acknowledged: Vec<bool>,
    spans: Vec<Span>,
    /// How many records it sent.
    sent: usize,
    /// What was left out of a dead letter, since the broker refused it.
    cut: Cut,
}

/// A batch with what became of its records.
type Sent = (Vec<Pending>, Vec<Result<Position, ProduceError>>);

/// See the module.
pub(crate) struct Outbox {
    producer: Arc<dyn Producer>,
    tracer: Tracer,
    system: &'static str,
    queue: VecDeque<Pending>,
    /// The lanes of what is sent or is to be sent again, with what waits behind it.
    busy: HashMap<Lane, VecDeque<Pending>, BuildHasherDefault<LaneHasher>>,
    sending: FuturesUnordered<BoxFuture<'static, Sent>>,
    /// What has to be sent again, by sequence, and when.
    again: BTreeMap<u64, Pending>,
    pause_until: Option<Instant>,
    /// Until when what is in the queue waits for more.
    gather_until: Option<Instant>,
    trouble: Option<ProduceError>,
    count: usize,
    bytes: usize,
    sequence: u64,
    parcels: parcel::Parcels,
}

impl Outbox {
    pub(crate) fn new(producer: Arc<dyn Producer>, tracer: Tracer, system: &'static str) -> Self {
        Self {
            producer,
            tracer,
            system,
            queue: VecDeque::new(),
            busy: HashMap::default(),
            sending: FuturesUnordered::new(),
            again: BTreeMap::new(),
            pause_until: None,
            gather_until: None,
            trouble: None,
            count: 0,
            bytes: 0,
            sequence: 0,
            parcels: parcel::Parcels::default(),
        }
    }

    /// Publications that are not acknowledged.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Whether more may be put. A bound for whoever dispatches; what is at the service already is taken all the same.
    pub(crate) fn has_room(&self) -> bool {
        self.count < ROOM && self.bytes < ROOM_BYTES
    }

    /// Why publications wait to be sent again.
    pub(crate) fn trouble(&self) -> Option<&ProduceError> {
        self.trouble.as_ref()
    }

    /// When [`Outbox::flush`] has something to do again.
    pub(crate) fn wake(&self) -> Option<Instant> {
        match self.again.is_empty() {
            true => self.gather_until,
            false => self.pause_until.filter(|_| self.sending.is_empty()),
        }
    }

    /// Adds a publication; it leaves with the next flush.
    pub(crate) fn put(&mut self, publication: Publication) {
        self.sequence += 1;
        self.count += 1;
        self.bytes += publication.size();
        let lane = publication.lane.filter(|_| !mutation::is(Mutation::Overtake));
        let pending =
            Pending { sequence: self.sequence, publication, acknowledged: Vec::new(), spans: Vec::new(), sent: 0, cut: Cut::default() };
        match lane.and_then(|lane| self.busy.get_mut(&lane)) {
            Some(behind) => behind.push_back(pending),
            None => self.queue.push_back(pending),
        }
    }

    /// Sends all that may be sent, as one batch. If it is `patient`, what came first waits up to [`GATHER`] for more, unless much waits already.
    pub(crate) fn flush(&mut self, now: Instant, patient: bool) {
        if !self.again.is_empty() {
            // What fails later must go in front of what was put later: first everything comes back.
            if !self.sending.is_empty() || self.pause_until.is_some_and(|until| now < until) {
                return;
            }
            self.pause_until = None;
            let again = std::mem::take(&mut self.again);
            for (_, pending) in again.into_iter().rev() {
                self.queue.push_front(pending);
            }
        }
        if self.queue.is_empty() {
            return;
        }
        let much = self.count >= ROOM / 2 || self.bytes >= ROOM_BYTES / 2;
        if patient && !much && now < *self.gather_until.get_or_insert(now + GATHER) {
            return;
        }
        self.gather_until = None;
        let mut batch = self.sendable();
        if mutation::is(Mutation::SwapReplies) && batch.len() > 1 {
            let last = batch.len() - 1;
            batch.swap(last - 1, last);
        }
        let mut records = Vec::with_capacity(batch.len());
        for pending in &mut batch {
            self.prepare(pending, &mut records);
            if let Some(lane) = pending.publication.lane {
                self.busy.entry(lane).or_default();
            }
        }
        let acks = self.producer.send(records);
        self.sending.push(acks.map(move |results| (batch, results)).boxed());
    }

    /// Takes what may be sent together out of the queue. What has to wait for something of its lane in this batch goes behind it.
    fn sendable(&mut self) -> Vec<Pending> {
        if !self.queue.iter().any(|pending| pending.publication.is_aside()) {
            return self.queue.drain(..).collect();
        }
        let mut batch: Vec<Pending> = Vec::with_capacity(self.queue.len());
        // Of lanes with an end in the batch, what has to wait for that.
        let mut ends: HashMap<Lane, Vec<Pending>, BuildHasherDefault<LaneHasher>> = HashMap::default();
        for pending in self.queue.drain(..) {
            let aside = pending.publication.is_aside();
            match pending.publication.lane.map(|lane| ends.entry(lane)) {
                Some(Entry::Occupied(mut waiting)) if aside || !waiting.get().is_empty() => waiting.get_mut().push(pending),
                Some(Entry::Vacant(end)) if !aside => {
                    end.insert(Vec::new());
                    batch.push(pending);
                }
                _ => batch.push(pending),
            }
        }
        for (lane, waiting) in ends.into_iter().filter(|(_, waiting)| !waiting.is_empty()) {
            let behind = self.busy.entry(lane).or_default();
            // All that is in the queue was put before what is behind a lane.
            waiting.into_iter().rev().for_each(|pending| behind.push_front(pending));
        }
        batch
    }

    /// Makes the records of a publication that are not acknowledged yet.
    fn prepare(&self, pending: &mut Pending, records: &mut Vec<Outgoing>) {
        let publication = &pending.publication;
        let (tracer, system, context) = (&self.tracer, self.system, publication.context.as_ref());
        let spans = &mut pending.spans;
        spans.clear();
        let mut trace = |topic: &Arc<str>| {
            if !tracer.enabled() {
                return context.cloned();
            }
            let mut span = tracer.start(SpanKind::Producer, || format!("send {topic}"), context);
            span.set("messaging.system", || system.into());
            span.set("messaging.operation.type", || "send".into());
            span.set("messaging.operation.name", || "send".into());
            span.set("messaging.destination.name", || topic.clone().into());
            span.set("mesh.route", || publication.delivery.route.name.clone().into());
            let context = span.context().cloned();
            spans.push(span);
            context
        };
        let made = match &publication.what {
            What::Reply { topics, reply } => reply::replies(&publication.delivery, topics, reply, &mut trace),
            What::DeadLetter { reason, detail } => {
                let letter = reply::dead_letter(&publication.delivery, *reason, detail, now_ms(), pending.cut);
                trace(&letter.topic);
                vec![letter]
            }
            What::Aside { topic, attempts, why } => {
                trace(topic);
                let partition = publication.delivery.position.partition.partition;
                let record = tiers::write(&publication.delivery, *attempts, why);
                vec![Outgoing { topic: topic.clone(), partition: Some(partition), record }]
            }
        };
        let before = records.len();
        if pending.acknowledged.is_empty() {
            records.extend(made);
        } else {
            let left = made.into_iter().zip(&pending.acknowledged).filter(|(_, acknowledged)| !**acknowledged);
            records.extend(left.map(|(record, _)| record));
        }
        pending.sent = records.len() - before;
    }

    /// Waits for acknowledgements, and adds what is done to `into`. Pending for ever when nothing is sent. Cancel-safe.
    pub(crate) async fn acknowledged(&mut self, into: &mut Vec<Done>) {
        match self.sending.next().await {
            Some((batch, results)) => {
                self.take(batch, results, into);
                while let Some(Some((batch, results))) = self.sending.next().now_or_never() {
                    self.take(batch, results, into);
                }
            }
            None => std::future::pending().await,
        }
    }

    fn take(&mut self, batch: Vec<Pending>, results: Vec<Result<Position, ProduceError>>, into: &mut Vec<Done>) {
        let mut results = results.into_iter();
        let (mut over, mut failed) = (Vec::new(), HashSet::new());
        for mut pending in batch {
            let lane = pending.publication.lane;
            let mut failure = None;
            let mut outcome = Vec::new();
            for index in 0..pending.sent {
                // A producer that answers too few has lost records: they are sent again.
                let result = results.next().unwrap_or_else(|| {
                    let detail = "the producer did not answer for this record".to_owned();
                    Err(ProduceError { kind: ProduceErrorKind::Fatal, detail })
                });
                let result = match result {
                    Err(error) if error.kind == ProduceErrorKind::TimedOut && mutation::is(Mutation::TrustTimeout) => {
                        Ok(pending.publication.delivery.position.clone())
                    }
                    result => result,
                };
                if let Err(error) = &result
                    && let Some(span) = pending.spans.get_mut(index)
                {
                    span.fail("produce", || error.to_string());
                }
                if result.is_err() && failure.is_none() {
                    // The first one that failed: from here on it matters which.
                    outcome = vec![true; index];
                }
                if let Err(error) = result {
                    outcome.push(false);
                    failure = Some(error);
                } else if failure.is_some() {
                    outcome.push(true);
                }
            }
            pending.spans.clear();
            match failure {
                None => {
                    self.count -= 1;
                    self.bytes -= pending.publication.size();
                    if self.again.is_empty() {
                        self.trouble = None;
                    }
                    over.extend(lane);
                    into.push(done(pending.publication));
                }
                Some(error) => {
                    failed.extend(lane);
                    self.send_again(pending, outcome, error);
                }
            }
        }
        for lane in over.into_iter().filter(|lane| !failed.contains(lane)) {
            self.queue.extend(self.busy.remove(&lane).unwrap_or_default());
        }
    }

    fn send_again(&mut self, mut pending: Pending, outcome: Vec<bool>, error: ProduceError) {
        // A partition that is not known (any more) is waited for, as its topic is.
        let refused = matches!(error.kind, ProduceErrorKind::TooLarge | ProduceErrorKind::Refused);
        if let (true, What::Aside { topic, .. }) = (refused, &pending.publication.what) {
            // It cannot wait where it should: better seen than stuck.
            let detail = format!("it cannot wait in `{topic}`: {}", error.detail);
            pending.publication.what = What::DeadLetter { reason: Reason::Attempts, detail };
            pending.acknowledged.clear();
        } else if refused && matches!(pending.publication.what, What::Reply { .. }) {
            // A copy that is in another topic already stays there; the record itself is not lost.
            self.bytes -= pending.publication.size();
            pending.publication.what = What::DeadLetter { reason: Reason::Reply, detail: error.detail };
            pending.acknowledged.clear();
            self.bytes += pending.publication.size();
        } else if let (true, What::DeadLetter { .. }, Some(cut)) = (refused, &pending.publication.what, pending.cut.more()) {
            tracing::warn!(route = %pending.publication.delivery.route.name, %error, "a dead letter is refused: it is cut");
            pending.cut = cut;
        } else {
            if pending.acknowledged.is_empty() {
                pending.acknowledged = outcome;
            } else {
                let mut outcome = outcome.into_iter();
                for acknowledged in pending.acknowledged.iter_mut().filter(|acknowledged| !**acknowledged) {
                    *acknowledged = outcome.next().unwrap_or(false);
                }
            }
            if self.trouble.as_ref().is_none_or(|known| known.kind != error.kind) {
                tracing::warn!(route = %pending.publication.delivery.route.name, %error, "publishing fails: trying again");
            }
            self.trouble = Some(error);
            self.pause_until = Some(Instant::now() + PAUSE);
        }
        self.again.insert(pending.sequence, pending);
    }
}

fn done(publication: Publication) -> Done {
    let end = match &publication.what {
        What::Reply { .. } => End::Ended(Disposition::Forwarded, ""),
        What::DeadLetter { reason, .. } => End::Ended(Disposition::DeadLettered, reason.as_str()),
        What::Aside { .. } => End::Aside,
    };
    Done {
        slot: publication.slot,
        epoch: publication.epoch,
        offset: publication.offset,
        key: publication.key,
        origin: publication.delivery.position.offset,
        end,
        context: publication.context,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        broker::fake::{Fake, Mode},
        consume::test_delivery,
        outcome::ReplyRecord,
        record::Record,
    };

    fn outbox(fake: &Fake) -> Outbox {
        Outbox::new(Arc::new(fake.clone()), Tracer::disabled(), "fake")
    }

    pub(in crate::consume) fn publication(number: i64) -> Publication {
        let topics: Arc<[Arc<str>]> = ["one".into(), "two".into()].into();
        let record = ReplyRecord { value: Some(number.to_string().into()), ..ReplyRecord::default() };
        let reply = Reply { status: 200, records: vec![record], body: None, retry_after: None };
        Publication {
            slot: 0,
            epoch: 1,
            lane: None,
            offset: number,
            key: 0,
            delivery: test_delivery("", number),
            what: What::Reply { topics, reply },
            context: None,
        }
    }

    fn values(records: &[Record]) -> Vec<String> {
        records.iter().map(|record| String::from_utf8_lossy(record.value.as_deref().unwrap()).into_owned()).collect()
    }

    async fn acknowledged(outbox: &mut Outbox) -> Vec<i64> {
        let mut done = Vec::new();
        let _ = tokio::time::timeout(Duration::from_millis(1), outbox.acknowledged(&mut done)).await;
        done.iter().map(|done| done.offset).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_failed_is_sent_again_in_order_and_only_where_it_failed() {
        let fake = Fake::new(&["one", "two"]);
        let mut outbox = outbox(&fake);
        fake.set(Mode::FailTopic(ProduceErrorKind::Unavailable, "two"));
        outbox.put(publication(0));
        outbox.put(publication(1));
        outbox.flush(Instant::now(), false);
        assert!(acknowledged(&mut outbox).await.is_empty());
        assert_eq!(outbox.trouble().map(|trouble| trouble.kind), Some(ProduceErrorKind::Unavailable));
        // What is put later waits behind what failed.
        fake.set(Mode::Store);
        outbox.put(publication(2));
        outbox.flush(Instant::now(), false);
        assert!(acknowledged(&mut outbox).await.is_empty());
        assert_eq!(outbox.len(), 3);
        tokio::time::advance(PAUSE).await;
        assert!(outbox.wake().is_some_and(|wake| wake <= Instant::now()));
        outbox.flush(Instant::now(), false);
        assert_eq!(acknowledged(&mut outbox).await, [0, 1, 2]);
        assert_eq!((outbox.len(), outbox.trouble().is_none(), outbox.has_room()), (0, true, true));
        assert_eq!(values(&fake.records("one")), ["0", "1", "2"], "what was acknowledged is not sent twice");
        assert_eq!(values(&fake.records("two")), ["0", "1", "2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_patient_gather_for_a_while_and_never_behind_what_is_sent_again() {
        let fake = Fake::new(&["one", "two"]);
        let mut outbox = outbox(&fake);
        outbox.put(publication(0));
        outbox.flush(Instant::now(), true);
        let due = Instant::now() + GATHER;
        assert_eq!((outbox.wake(), fake.records("one").len()), (Some(due), 0));
        tokio::time::advance(GATHER / 2).await;
        outbox.put(publication(1));
        outbox.flush(Instant::now(), true);
        assert_eq!((outbox.wake(), fake.records("one").len()), (Some(due), 0), "the first one decides");
        tokio::time::advance(GATHER / 2).await;
        outbox.flush(Instant::now(), true);
        assert_eq!((outbox.wake(), acknowledged(&mut outbox).await), (None, vec![0, 1]));
        // Who is not patient any more does not wait; nor does much.
        outbox.put(publication(2));
        outbox.flush(Instant::now(), true);
        outbox.flush(Instant::now(), false);
        assert_eq!((outbox.wake(), acknowledged(&mut outbox).await), (None, vec![2]));
        (3..3 + ROOM as i64 / 2).for_each(|number| outbox.put(publication(number)));
        outbox.flush(Instant::now(), true);
        assert_eq!(acknowledged(&mut outbox).await.len(), ROOM / 2);
        // What is sent again has its own pause, and takes along what gathered.
        fake.set(Mode::Fail(ProduceErrorKind::Unavailable));
        outbox.put(publication(-2));
        outbox.flush(Instant::now(), false);
        outbox.put(publication(-1));
        outbox.flush(Instant::now(), true);
        assert!(acknowledged(&mut outbox).await.is_empty());
        fake.set(Mode::Store);
        tokio::time::advance(GATHER).await;
        outbox.flush(Instant::now(), true);
        assert!(outbox.wake().is_some_and(|wake| wake > Instant::now()), "a time that is over would keep the loop busy");
        tokio::time::advance(PAUSE).await;
        outbox.flush(Instant::now(), true);
        assert_eq!(acknowledged(&mut outbox).await, [-2, -1]);
        assert_eq!((outbox.len(), outbox.wake()), (0, None));
    }

    /// A batch fails while the next one of the same lane could be sent: without a lane the second would be stored before the first.
    #[tokio::test(start_paused = true)]
    async fn a_reply_does_not_overtake_one_of_its_lane_that_fails_later() {
        let lane = |key| Some(Lane { slot: 0, key });
        let fake = Fake::new(&["one", "two"]);
        let mut outbox = outbox(&fake);
        fake.set(Mode::Fail(ProduceErrorKind::QueueFull));
        outbox.put(Publication { lane: lane(1), ..publication(0) });
        outbox.flush(Instant::now(), false);
        // The failure is not known yet.
        fake.set(Mode::Store);
        outbox.put(Publication { lane: lane(1), ..publication(1) });
        outbox.put(Publication { lane: lane(2), ..publication(2) });
        outbox.flush(Instant::now(), false);
        assert_eq!(values(&fake.records("one")), ["2"], "another lane goes on");
        assert_eq!(acknowledged(&mut outbox).await, [2]);
        tokio::time::advance(PAUSE).await;
        outbox.flush(Instant::now(), false);
        assert_eq!(acknowledged(&mut outbox).await, [0]);
        outbox.flush(Instant::now(), false);
        assert_eq!(acknowledged(&mut outbox).await, [1]);
        assert_eq!(values(&fake.records("one")), ["2", "0", "1"]);
        assert_eq!((outbox.len(), outbox.busy.len()), (0, 0));
    }

    /// A batch is stored in part: what is aside already would be found before the reply is there.
    #[tokio::test(start_paused = true)]
    async fn a_record_goes_aside_only_after_the_replies_before_it_are_stored() {
        let lane = |key| Some(Lane { slot: 0, key });
        let aside = |number, topic: &str| {
            let what = What::Aside { topic: topic.into(), attempts: 1, why: Why::Behind };
            Publication { lane: lane(1), what, ..publication(number) }
        };
        let fake = Fake::new(&["one", "two", "retry", "park"]);
        let mut outbox = outbox(&fake);
        fake.set(Mode::FailTopic(ProduceErrorKind::Unavailable, "two"));
        outbox.put(Publication { lane: lane(1), ..publication(0) });
        outbox.put(aside(1, "retry"));
        outbox.put(aside(2, "park"));
        outbox.put(Publication { lane: lane(2), ..publication(3) });
        outbox.flush(Instant::now(), false);
        assert!(acknowledged(&mut outbox).await.is_empty());
        outbox.put(aside(4, "park"));
        assert_eq!(values(&fake.records("one")), ["0", "3"], "other lanes go on");
        assert!(fake.records("retry").is_empty() && fake.records("park").is_empty());
        fake.set(Mode::Store);
        tokio::time::advance(PAUSE).await;
        outbox.flush(Instant::now(), false);
        assert_eq!(acknowledged(&mut outbox).await, [0, 3]);
        outbox.flush(Instant::now(), false);
        assert_eq!(acknowledged(&mut outbox).await, [1, 2, 4], "what goes aside goes together");
        assert_eq!((fake.records("retry").len(), fake.records("park").len()), (1, 2));
        assert_eq!((outbox.len(), outbox.busy.len()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_letter_that_the_broker_refuses_is_cut_until_it_fits() {
        let fake = Fake::new(&["work.dlq"]);
        let mut outbox = outbox(&fake);
        let delivery = Delivery {
            record: Arc::new(Record { key: Some("k".into()), value: Some("large".into()), ..Record::default() }),
            ..test_delivery("", 7)
        };
        let what = What::DeadLetter { reason: Reason::Status, detail: "no".to_owned() };
        outbox.put(Publication { delivery, what, ..publication(7) });
        fake.set(Mode::FailTopic(ProduceErrorKind::TooLarge, "work.dlq"));
        outbox.flush(Instant::now(), false);
        assert!(acknowledged(&mut outbox).await.is_empty());
        fake.set(Mode::Store);
        outbox.flush(Instant::now(), false);
        assert_eq!(acknowledged(&mut outbox).await, [7]);
        let letters = fake.records("work.dlq");
        assert_eq!((letters[0].value.as_ref(), letters[0].key.as_deref()), (None, Some(&b"k"[..])));
        assert_eq!((letters[0].header_str("mesh-dlq-cut"), letters[0].header_str("mesh-dlq-reason")), (Some("value"), Some("status")));
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_broker_refuses_for_good_becomes_a_dead_letter() {
        let fake = Fake::new(&["one", "two", "work.dlq"]);
        let mut outbox = outbox(&fake);
        fake.set(Mode::FailTopic(ProduceErrorKind::TooLarge, "two"));
        outbox.put(publication(7));
        outbox.flush(Instant::now(), false);
        assert!(acknowledged(&mut outbox).await.is_empty());
        outbox.flush(Instant::now(), false);
        let mut done = Vec::new();
        outbox.acknowledged(&mut done).await;
        assert_eq!((done[0].end, outbox.len()), (End::Ended(Disposition::DeadLettered, "reply"), 0));
        let letters = fake.records("work.dlq");
        assert_eq!(letters[0].header_str("mesh-dlq-reason"), Some("reply"));
        assert_eq!(letters[0].header_str("mesh-dlq-offset"), Some("7"));
    }
}
