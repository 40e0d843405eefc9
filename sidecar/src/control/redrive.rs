//! Dead letters that are sent back: a copy of each, and the mark that it was sent, in one transaction.
//!
//! For a letter that was cut the record itself is sent, as it lies where it came from.
//!
//! Invariant: a letter is sent back once, however often it is asked for and wherever the asking is cut: its copy and its mark are stored together,
//! and marks are read after every other redrive of the route was fenced.
//! Invariant: what is sent is all of the record: a letter that was cut is refused where its record is gone.
//! Invariant: nothing is redriven to where nobody asked for it: by default a copy reaches the route alone that wrote the letter.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use mesh_proto::v1;
use mesh_routing::Route;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout_at},
};

use super::{
    Control,
    letters::{Chosen, Letter, is_left_behind},
    originals::{Originals, place},
    range::{RangeReader, ranges},
    redriven::{Marks, marks},
    reset::OperationError,
    state::Shared,
    topics::REDRIVEN_TOPIC,
};
use crate::{
    broker::{BrokerErrorKind, Consumer, ConsumerConfig, Event, Outgoing, StartOffset, TransactionError},
    record::{Header, Position, Record, derived_id, header},
};

/// The most letters in one transaction.
const AT_ONCE: usize = 200;
/// The most bytes of letters that wait for one, but for a letter that is larger by itself.
const BYTES: usize = 4 << 20;
/// How long the joining of the redrive's own group may take.
const JOIN: Duration = Duration::from_secs(60);
/// How long a topic may take to be found.
const TOPIC: Duration = Duration::from_secs(10);
/// How often a transaction that was aborted is tried again, and the pause before.
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(500);
/// How many letters, refusals and cut letters are told of.
const SAMPLES: usize = 5;

/// A letter on its way back.
#[derive(Clone, Debug)]
struct Sent {
    position: Position,
    identity: u64,
    copy: Outgoing,
}

/// Where letters go back to.
struct Target<'a> {
    shared: &'a Shared,
    route: &'a Route,
    every_route: bool,
    /// Partition counts of topics that were asked for; `None` does not exist.
    counts: BTreeMap<String, Option<i32>>,
    originals: Originals<'a>,
}

impl Target<'_> {
    /// The topic of a letter's copy, and how many partitions it has; or why there is none.
    async fn topic(&mut self, letter: &Letter) -> Result<(Arc<str>, i32), String> {
        let is_source = self.route.from.iter().any(|source| **source == *letter.topic);
        let topic: Arc<str> = match (letter.topic.as_str(), &self.route.from[..]) {
            ("", [only]) => only.clone(),
            ("", _) => return Err("it does not say which topic its record came from".to_owned()),
            (origin, _) if is_source || self.every_route => origin.into(),
            (origin, _) => {
                let from = self.route.from.join(", ");
                return Err(format!(
                    "its topic {origin} is no source of the route any more ({from}): --every-route sends it there all the same"
                ));
            }
        };
        let count = match self.counts.get(&*topic) {
            Some(count) => *count,
            None => {
                let found = self.shared.broker.admin().topics().await.map_err(|error| error.to_string())?.get(&*topic).copied();
                if found.is_some() {
                    self.shared.broker.producer().learn_topic(&topic, TOPIC).await.map_err(|error| error.to_string())?;
                }
                self.counts.insert(topic.to_string(), found);
                found
            }
        };
        let count = count.ok_or_else(|| format!("its topic {topic} does not exist any more"))?;
        Ok((topic, count))
    }

    /// The copy of a letter; or why there is none.
    async fn copy(&mut self, letter: &Letter, record: Record, position: &Position) -> Result<Result<Outgoing, String>, OperationError> {
        let (topic, count) = match self.topic(letter).await {
            Ok(found) => found,
            Err(why) => return Ok(Err(why)),
        };
        let whole = if letter.cut.is_empty() { Ok(record) } else { self.originals.find(letter, &record).await? };
        let record = match whole {
            Ok(record) => record,
            Err(why) => return Ok(Err(why)),
        };
        let mut headers: Vec<Header> = record.headers.iter().filter(|header| !is_left_behind(&header.name)).cloned().collect();
        headers.retain(|header| header.name != header::MESH_REDRIVEN);
        if !headers.iter().any(|header| header.name == header::MESH_ID) {
            headers.push(Header::new(header::MESH_ID, derived_id(position)));
        }
        headers.push(Header::new(header::MESH_REDRIVEN, position.to_string()));
        if !self.every_route {
            headers.push(Header::new(header::MESH_ONLY_ROUTE, self.route.name.to_string()));
        }
        // To the partition it came from, so that it keeps its place among the records of its key.
        let partition = letter.partition.filter(|partition| (0..count).contains(partition));
        Ok(Ok(Outgoing { topic, partition, record: Record { headers, timestamp_ms: None, ..record } }))
    }
}

impl Control {
    /// Sends dead letters of a route back, or says what would be sent. Tells of its progress; ends when nobody listens any more.
    ///
    /// # Errors
    /// If there is no such route, another redrive of it took over, or the broker fails. What was sent until then is remembered.
    pub async fn redrive(&self, request: v1::RedriveRequest, out: mpsc::Sender<v1::RedriveProgress>) -> Result<(), OperationError> {
        let route = self.route(&request.route).await?;
        let topic = route.dead_letter.clone();
        let mut sender = match request.execute {
            true => Some(Sender::join(&self.0, &route).await?),
            false => None,
        };
        let result = self.redrive_with(&request, &route, &topic, &mut sender, &out).await;
        if let Some(sender) = sender {
            sender.consumer.close().await;
        }
        result
    }

    async fn redrive_with(
        &self,
        request: &v1::RedriveRequest,
        route: &Route,
        topic: &Arc<str>,
        sender: &mut Option<Sender>,
        out: &mpsc::Sender<v1::RedriveProgress>,
    ) -> Result<(), OperationError> {
        let chosen = Chosen::new(request.filter.clone());
        // Every other redrive of this route is fenced by now.
        let marks = Marks::read(&self.0, topic).await?;
        let mut reader = RangeReader::open(&*self.0.broker, ranges(&*self.0.broker.admin(), topic, &chosen.limits()).await?)?;
        let originals = Originals::new(&*self.0.broker);
        let mut target = Target { shared: &self.0, route, every_route: request.every_route, counts: BTreeMap::new(), originals };
        let mut progress = v1::RedriveProgress { topic: topic.to_string(), executed: request.execute, ..v1::RedriveProgress::default() };
        let mut pace = Pace::new(request.rate);
        let most = pace.batch();
        let (mut waiting, mut bytes) = (Vec::new(), 0);
        let limit = if request.limit == 0 { u64::MAX } else { request.limit };
        'all: while let Some(batch) = reader.next().await? {
            for (offset, record) in batch.records {
                let letter = Letter::read(&record);
                if !chosen.has(route, &letter, &record, batch.partition.partition, offset) {
                    continue;
                }
                progress.matched += 1;
                let position = Position { partition: batch.partition.clone(), offset };
                let identity = letter.identity(&record);
                if marks.has(position.partition.partition, offset, identity) {
                    progress.already += 1;
                    continue;
                }
                let sample = (progress.samples.len() < SAMPLES).then(|| letter.message(&record, &position, false));
                match target.copy(&letter, record, &position).await? {
                    Ok(copy) => {
                        progress.samples.extend(sample);
                        tell_cut(&mut progress, &letter, &position);
                        bytes += copy.record.size();
                        waiting.push(Sent { position, identity, copy });
                    }
                    Err(why) => refuse(&mut progress, &position, &why),
                }
                let enough = progress.redriven + waiting.len() as u64 >= limit;
                if enough || waiting.len() >= most || bytes >= BYTES {
                    bytes = 0;
                    self.send(sender, std::mem::take(&mut waiting), &mut progress, &mut pace, out).await?;
                }
                // The broker may have refused some.
                if progress.redriven >= limit {
                    break 'all;
                }
            }
        }
        reader.close().await;
        target.originals.close().await;
        self.send(sender, waiting, &mut progress, &mut pace, out).await?;
        progress.finished = true;
        // Whoever listened may be gone.
        drop(out.send(progress).await);
        Ok(())
    }

    async fn send(
        &self,
        sender: &mut Option<Sender>,
        letters: Vec<Sent>,
        progress: &mut v1::RedriveProgress,
        pace: &mut Pace,
        out: &mpsc::Sender<v1::RedriveProgress>,
    ) -> Result<(), OperationError> {
        let count = letters.len();
        match sender {
            None => progress.redriven += count as u64,
            Some(sender) if count > 0 => {
                sender.send(&self.0.config.mesh, letters, progress).await?;
                pace.sent(count).await;
            }
            Some(_) => {}
        }
        let told = v1::RedriveProgress { samples: Vec::new(), ..progress.clone() };
        match out.send(told).await {
            Ok(()) => Ok(()),
            Err(_) => Err(OperationError::Refused("nobody listens any more".to_owned())),
        }
    }
}

fn refuse(progress: &mut v1::RedriveProgress, position: &Position, why: &str) {
    progress.refused += 1;
    if progress.refusals.len() < SAMPLES {
        progress.refusals.push(format!("{position}: {why}"));
    }
}

/// Notes that in place of a letter that was cut its record goes.
fn tell_cut(progress: &mut v1::RedriveProgress, letter: &Letter, position: &Position) {
    let Some(origin) = place(letter).filter(|_| !letter.cut.is_empty()) else { return };
    progress.cut += 1;
    if progress.cuts.len() < SAMPLES {
        let left_out = if letter.cut == "value" { "its value" } else { "all of it" };
        progress.cuts.push(format!("{position}: {left_out} was left out; the record goes as it lies at {origin}"));
    }
}

/// Keeps a rate of records a second.
pub(super) struct Pace {
    rate: u32,
    begin: Instant,
    sent: u64,
}

impl Pace {
    /// `rate` 0 is no limit.
    pub(super) fn new(rate: u32) -> Self {
        Self { rate, begin: Instant::now(), sent: 0 }
    }

    /// How many may be sent at a time: about a quarter of a second's worth.
    pub(super) fn batch(&self) -> usize {
        if self.rate == 0 { AT_ONCE } else { (self.rate as usize / 4).clamp(1, AT_ONCE) }
    }

    /// Waits until the next may be sent.
    pub(super) async fn sent(&mut self, count: usize) {
        self.sent += count as u64;
        if self.rate > 0 {
            sleep_until(self.begin + Duration::from_secs_f64(self.sent as f64 / f64::from(self.rate))).await;
        }
    }
}

/// The member that sends: one for a route in the whole mesh.
struct Sender {
    consumer: Box<dyn Consumer>,
}

impl Sender {
    /// Joins, and fences every other redrive of the route.
    async fn join(shared: &Shared, route: &Route) -> Result<Self, OperationError> {
        let mut consumer = shared.broker.consumer(ConsumerConfig {
            // Of its own: the identity alone decides between redrives. A group that they shared would take the partitions from one that the
            // identity lets win, and then none would.
            group: Some(format!("{}.redrive.{}", route.group, uuid::Uuid::new_v4().simple())),
            topics: vec![route.dead_letter.clone()],
            instance: None,
            start: StartOffset::Latest,
            buffer_bytes: 64 << 10,
            transactional_id: Some(format!("{}/{}/redrive", shared.config.mesh, route.name)),
        })?;
        let until = Instant::now() + JOIN;
        let mut trouble = None;
        loop {
            match timeout_at(until, consumer.next()).await {
                Ok(Event::Assigned(assigned)) => {
                    assigned.iter().for_each(|assigned| consumer.hold(&assigned.partition));
                    return Ok(Self { consumer });
                }
                Ok(Event::Trouble(error)) => trouble = Some(error),
                Ok(_) => {}
                Err(_) => {
                    consumer.close().await;
                    let why = trouble.map_or_else(|| "the broker gives it no partition".to_owned(), |error| error.to_string());
                    return Err(OperationError::Refused(format!("the redrive could not begin within {} s: {why}", JOIN.as_secs())));
                }
            }
        }
    }

    /// Sends letters with their marks, in one transaction, or in several where the broker refuses some.
    async fn send(&mut self, mesh: &str, letters: Vec<Sent>, progress: &mut v1::RedriveProgress) -> Result<(), OperationError> {
        let mut left = VecDeque::from([letters]);
        let mut tries = 0;
        while let Some(mut letters) = left.pop_front() {
            // A producer that was fenced gives up its partitions, and takes its identity back after a while: by then this redrive has ended.
            while let Some(event) = self.consumer.next().now_or_never() {
                if matches!(event, Event::Revoking(_)) {
                    return Err(taken_over());
                }
            }
            let marked = letters.iter().map(|letter| (&letter.position, letter.identity));
            let records = letters.iter().map(|letter| letter.copy.clone()).chain(marks(mesh, marked)).collect();
            match self.consumer.transact(records, Vec::new()).await {
                Ok(()) => progress.redriven += letters.len() as u64,
                Err(TransactionError::Refused(refused)) => {
                    let refused: BTreeMap<usize, String> = refused.into_iter().map(|(index, error)| (index, error.detail)).collect();
                    let mut index = 0;
                    letters.retain(|letter| {
                        let why = refused.get(&index);
                        index += 1;
                        why.is_none_or(|why| {
                            refuse(progress, &letter.position, why);
                            false
                        })
                    });
                    if refused.keys().all(|refused| *refused >= index) {
                        return Err(OperationError::Refused(format!("{REDRIVEN_TOPIC} takes no records: {:?}", refused.values().next())));
                    }
                    left.extend((!letters.is_empty()).then_some(letters));
                }
                Err(TransactionError::Split(error)) if letters.len() == 1 => {
                    letters.iter().for_each(|letter| refuse(progress, &letter.position, &error.detail));
                }
                Err(TransactionError::Split(_)) => {
                    let second = letters.split_off(letters.len() / 2);
                    left.push_front(second);
                    left.push_front(letters);
                }
                Err(TransactionError::Aborted(error)) if tries < TRIES => {
                    tries += 1;
                    tracing::warn!(%error, "a transaction of a redrive was aborted: trying again");
                    left.push_front(letters);
                    sleep(PAUSE).await;
                }
                Err(TransactionError::Fenced(_)) => return Err(taken_over()),
                Err(TransactionError::Lost(error)) if error.kind == BrokerErrorKind::Fenced => return Err(taken_over()),
                Err(error) => {
                    return Err(OperationError::Unclear(format!("{error}: give the command again; nothing is sent twice")));
                }
            }
        }
        Ok(())
    }
}

fn taken_over() -> OperationError {
    OperationError::Refused(
        "another redrive of this route took over, or the broker ended this one's session; what was sent is remembered".to_owned(),
    )
}
