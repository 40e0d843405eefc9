//! Commands to the owners of partitions, through `__mesh.commands`: hears and obeys those for this instance, and asks others.
//!
//! A record's key is `<mesh>/<instance>`: whom it is for. The answer goes to the instance that asked, with the id of the command.
//!
//! Invariant: a command is obeyed once: one that comes again, since its answer was lost, gets the known answer.
//! Invariant: a command that is too late is not obeyed: an instance that stood still does nothing that nobody waits for any more.
//! Invariant: what runs, and what is remembered, is bounded.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, Either},
    stream::FuturesUnordered,
};
use mesh_proto::v1::{self, command_record::Content, owner_command::Action};
use prost::Message as _;
use tokio::{sync::oneshot, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    drain, report,
    state::{Backoff, Shared, now_ms},
    topics::COMMANDS_TOPIC,
};
use crate::{
    broker::{BrokerError, Consumer, ConsumerConfig, Event, Outgoing, StartOffset},
    command::{Held, RecordStage, Released, Reset},
    parking::Release,
    record::{Position, Record, TopicPartition},
};

/// How often a command is sent again that nobody answered.
const RESEND: Duration = Duration::from_secs(2);
/// How long a record may take to be acknowledged.
const SEND: Duration = Duration::from_secs(10);
/// How many commands run at a time.
const AT_ONCE: usize = 64;
/// How many answers are remembered.
const REMEMBERED: usize = 1_024;
/// The longest that a command may take, whatever it says.
const LONGEST: Duration = Duration::from_secs(15 * 60);
/// The name of all instances, in a key.
const ALL: &str = "*";
/// For how long the mesh is watched after a look, and how often that is told again, in milliseconds.
const WATCHED_MS: u64 = 15_000;
const WATCH_AGAIN_MS: i64 = 5_000;
/// How long telling it may keep a look waiting.
const WATCH_SEND: Duration = Duration::from_millis(500);
/// How much is fetched ahead, in bytes.
const BUFFER: usize = 1 << 20;

/// What became of partitions at an instance; or why it did nothing at all.
pub(super) type Answered = Result<Vec<(TopicPartition, Reset)>, String>;

/// What a release did at an instance; or why it did nothing at all.
pub(super) type AnsweredRelease = Result<Released, String>;

/// How far a record is at an instance, if it owns its partition; or why it does not say.
pub(super) type AnsweredLookUp = Result<Option<Held>, String>;

/// Commands to other instances that wait for their answer, by id.
#[derive(Debug, Default)]
pub(super) struct Waiting(Mutex<HashMap<String, oneshot::Sender<v1::OwnerAnswer>>>);

impl Waiting {
    fn add(&self, id: &str) -> oneshot::Receiver<v1::OwnerAnswer> {
        let (answer, answered) = oneshot::channel();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned(), answer);
        answered
    }

    fn take(&self, id: &str) -> Option<oneshot::Sender<v1::OwnerAnswer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id)
    }
}

/// Forgets a command when nobody waits for it any more.
struct Forget<'a>(&'a Waiting, String);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        drop(self.0.take(&self.1));
    }
}

/// Tells another instance to do something with what it owns, again and again until it answers. Dropping the future gives up; the instance may
/// obey all the same until `until`.
async fn ask(shared: Arc<Shared>, instance: String, route: Arc<str>, action: Action, until: Instant) -> Result<v1::OwnerAnswer, String> {
    let id = uuid::Uuid::new_v4().simple().to_string();
    let left = i64::try_from(until.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(i64::MAX);
    let command = v1::OwnerCommand { route: route.to_string(), expires_ms: now_ms().saturating_add(left), action: Some(action) };
    let mut answered = shared.waiting_commands.add(&id);
    let _forget = Forget(&shared.waiting_commands, id.clone());
    let record = v1::CommandRecord { id, from: shared.instance.clone(), content: Some(Content::Command(command)) };
    loop {
        match tokio::time::timeout(SEND, send(&shared, &instance, &record)).await {
            Ok(Ok(())) => {}
            // It is sent again; if that never helps, the asker's deadline tells.
            Ok(Err(error)) => tracing::warn!(instance, error, "a command could not be sent: trying again"),
            Err(_) => tracing::warn!(instance, "a command was not acknowledged in time: trying again"),
        }
        match tokio::time::timeout(RESEND, &mut answered).await {
            Ok(Ok(answer)) if answer.error.is_empty() => return Ok(answer),
            Ok(Ok(answer)) => return Err(answer.error),
            Ok(Err(_)) => return Err("the control plane stopped".to_owned()),
            Err(_) => {}
        }
    }
}

/// Tells all instances that somebody watches the state of the mesh: they report more often for a while.
pub(super) async fn watch(shared: &Shared) {
    let now = now_ms();
    let told = shared.watch_told_ms.load(Ordering::Relaxed);
    // Of looks at the same time one tells it.
    let due = now.saturating_sub(told) >= WATCH_AGAIN_MS && shared.broker.health().is_ok();
    if !due || shared.watch_told_ms.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_err() {
        return;
    }
    let id = uuid::Uuid::new_v4().simple().to_string();
    let action = Some(Action::Watch(v1::WatchStatus { for_ms: WATCHED_MS }));
    let expires_ms = now.saturating_add(i64::try_from(WATCHED_MS).unwrap_or(i64::MAX));
    let command = v1::OwnerCommand { route: String::new(), expires_ms, action };
    let record = v1::CommandRecord { id, from: shared.instance.clone(), content: Some(Content::Command(command)) };
    match tokio::time::timeout(WATCH_SEND, send(shared, ALL, &record)).await {
        Ok(Ok(())) => {}
        // Reports come as often as always then.
        Ok(Err(error)) => tracing::debug!(error, "the mesh could not be told that it is watched"),
        Err(_) => tracing::debug!("it was not acknowledged in time that the mesh is watched"),
    }
}

fn read_answer(answer: v1::OwnerAnswer) -> Vec<(TopicPartition, Reset)> {
    let read = |answer: v1::PartitionAnswer| {
        let reset = match answer.result() {
            v1::PartitionResult::Done => Reset::Done { from: answer.from },
            v1::PartitionResult::NotOwner => Reset::NotOwner,
            v1::PartitionResult::Failed | v1::PartitionResult::Unspecified => Reset::Failed(answer.reason),
        };
        (TopicPartition::new(answer.topic, answer.partition), reset)
    };
    answer.partitions.into_iter().map(read).collect()
}

fn write_answer(answered: Vec<(TopicPartition, Reset)>) -> v1::OwnerAnswer {
    let write = |(partition, reset): (TopicPartition, Reset)| {
        let (result, from, reason) = match reset {
            Reset::Done { from } => (v1::PartitionResult::Done, from, String::new()),
            Reset::NotOwner => (v1::PartitionResult::NotOwner, 0, String::new()),
            Reset::Failed(reason) => (v1::PartitionResult::Failed, 0, reason),
        };
        v1::PartitionAnswer { topic: partition.topic.to_string(), partition: partition.partition, result: result.into(), from, reason }
    };
    v1::OwnerAnswer { partitions: answered.into_iter().map(write).collect(), ..v1::OwnerAnswer::default() }
}

fn read_release(answer: v1::OwnerAnswer) -> Released {
    let partitions = answer.partitions.into_iter().map(|at| TopicPartition::new(at.topic, at.partition));
    Released { records: answer.released, partitions: partitions.collect() }
}

fn write_release(released: Released) -> v1::OwnerAnswer {
    let done = |partition: TopicPartition| v1::PartitionAnswer {
        topic: partition.topic.to_string(),
        partition: partition.partition,
        result: v1::PartitionResult::Done.into(),
        ..v1::PartitionAnswer::default()
    };
    let partitions = released.partitions.into_iter().map(done).collect();
    v1::OwnerAnswer { partitions, released: released.records, ..v1::OwnerAnswer::default() }
}

/// Which records are meant, what becomes of them, and on which partitions.
fn read_wish(wish: &v1::ReleaseRecords) -> (Option<Option<Bytes>>, Release, Vec<TopicPartition>) {
    let how = if wish.discard { Release::Discard } else { Release::Retry };
    let only = wish.partitions.iter().map(|at| TopicPartition::new(at.topic.clone(), at.partition));
    (wish.one_key.then(|| wish.key.clone()), how, only.collect())
}

fn read_held(answer: v1::OwnerAnswer) -> Option<Held> {
    let state = answer.record?;
    let time = Duration::from_millis(state.for_ms);
    let stage = match state.stage() {
        v1::RecordStage::Unread => RecordStage::Unread,
        v1::RecordStage::Waiting => RecordStage::Waiting,
        v1::RecordStage::AtService => RecordStage::AtService(time),
        v1::RecordStage::BackingOff => RecordStage::BackingOff(time),
        v1::RecordStage::Exhausted => RecordStage::Exhausted,
        v1::RecordStage::Publishing => RecordStage::Publishing,
        v1::RecordStage::Complete => RecordStage::Complete,
        v1::RecordStage::Unspecified => return None,
    };
    Some(Held { stage, attempts: state.attempts, failure: state.failure, waits_for: state.waits_for })
}

fn write_held(held: Option<Held>) -> v1::OwnerAnswer {
    let write = |Held { stage, attempts, failure, waits_for }: Held| {
        let (stage, time) = match stage {
            RecordStage::Unread => (v1::RecordStage::Unread, Duration::ZERO),
            RecordStage::Waiting => (v1::RecordStage::Waiting, Duration::ZERO),
            RecordStage::AtService(time) => (v1::RecordStage::AtService, time),
            RecordStage::BackingOff(time) => (v1::RecordStage::BackingOff, time),
            RecordStage::Exhausted => (v1::RecordStage::Exhausted, Duration::ZERO),
            RecordStage::Publishing => (v1::RecordStage::Publishing, Duration::ZERO),
            RecordStage::Complete => (v1::RecordStage::Complete, Duration::ZERO),
        };
        let for_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        v1::RecordState { stage: stage.into(), for_ms, attempts, failure, waits_for }
    };
    v1::OwnerAnswer { record: held.map(write), ..v1::OwnerAnswer::default() }
}

async fn send(shared: &Shared, instance: &str, record: &v1::CommandRecord) -> Result<(), String> {
    let producer = shared.broker.producer();
    if producer.known_partitions(COMMANDS_TOPIC).is_none() {
        producer.learn_topic(COMMANDS_TOPIC, SEND).await.map_err(|error| error.to_string())?;
    }
    let key = format!("{}/{instance}", shared.config.mesh);
    let value = Some(Bytes::from(record.encode_to_vec()));
    let record = Record { key: Some(key.into()), value, headers: Vec::new(), timestamp_ms: None };
    let acks = producer.send(vec![Outgoing { topic: COMMANDS_TOPIC.into(), partition: Some(0), record }]).await;
    acks.into_iter().try_for_each(|ack| ack.map(drop)).map_err(|error| error.to_string())
}

/// Hears and obeys until the token is cancelled.
pub(super) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let Some(mut consumer) = stop.run_until_cancelled(begin(&shared)).await else { return };
    stop.run_until_cancelled(Owner::new(shared).follow(&mut *consumer)).await;
    consumer.close().await;
}

async fn begin(shared: &Shared) -> Box<dyn Consumer> {
    // The reader of the control topic creates this topic too. This cannot fail: the sender is in `shared`.
    shared.progress.subscribe().wait_for(|progress| progress.caught_up).await.map(drop).unwrap_or_default();
    let mut backoff = Backoff::new();
    loop {
        match try_to_begin(shared).await {
            Ok(consumer) => return consumer,
            Err(error) => tracing::debug!(%error, "{COMMANDS_TOPIC} cannot be read yet"),
        }
        backoff.pause().await;
    }
}

async fn try_to_begin(shared: &Shared) -> Result<Box<dyn Consumer>, BrokerError> {
    // A topic that comes later is read from its start, so it has to be there.
    super::topics::ensure_own(&*shared.broker.admin()).await?;
    // What was said before this process began is not for it; who asked says it again.
    shared.broker.consumer(ConsumerConfig::reader(vec![COMMANDS_TOPIC.into()], StartOffset::Latest, BUFFER))
}

/// A piece of work: the id and the asker of a command with its answer, or an answer that was sent.
type Work = BoxFuture<'static, Option<(String, String, v1::OwnerAnswer)>>;

/// The side that obeys.
struct Owner {
    shared: Arc<Shared>,
    key: Bytes,
    key_of_all: Bytes,
    /// Commands by id: their answers, or `None` while they run.
    known: HashMap<String, Option<v1::OwnerAnswer>>,
    order: VecDeque<String>,
    work: FuturesUnordered<Work>,
}

impl Owner {
    fn new(shared: Arc<Shared>) -> Self {
        let key = format!("{}/{}", shared.config.mesh, shared.instance).into();
        let key_of_all = format!("{}/{ALL}", shared.config.mesh).into();
        Self { shared, key, key_of_all, known: HashMap::new(), order: VecDeque::new(), work: FuturesUnordered::new() }
    }

    async fn follow(mut self, consumer: &mut dyn Consumer) {
        loop {
            tokio::select! {
                event = consumer.next() => match event {
                    Event::Records(batch) => batch.records.iter().for_each(|(offset, record)| self.hear(*offset, record)),
                    Event::Trouble(error) => tracing::debug!(%error, "{COMMANDS_TOPIC}"),
                    // What expired was too late; without a group there is nothing to give back.
                    Event::Recovered | Event::Expired { .. } | Event::Assigned(_) | Event::Revoking(_) => {}
                },
                Some(done) = self.work.next(), if !self.work.is_empty() => if let Some((id, asker, answer)) = done {
                    if let Some(known) = self.known.get_mut(&id) {
                        *known = Some(answer.clone());
                    }
                    self.answer(id, asker, answer);
                },
            }
        }
    }

    fn hear(&mut self, offset: i64, record: &Record) {
        let for_all = record.key.as_ref() == Some(&self.key_of_all);
        if !for_all && record.key.as_ref() != Some(&self.key) {
            return;
        }
        let decoded = record.value.as_ref().map(|value| v1::CommandRecord::decode(value.clone()));
        let Some(Ok(v1::CommandRecord { id, from, content: Some(content) })) = decoded else {
            return tracing::warn!(
                offset,
                "a record of {COMMANDS_TOPIC} for this instance cannot be read: was it written by a later version?"
            );
        };
        match content {
            // What is for all is never answered, and asks for nothing but to be watched.
            Content::Command(v1::OwnerCommand { action: Some(Action::Watch(watch)), .. }) => report::watched(&self.shared, watch.for_ms),
            _ if for_all => {}
            Content::Answer(answer) => {
                if let Some(waiting) = self.shared.waiting_commands.take(&id) {
                    // Whoever waited may be gone.
                    drop(waiting.send(answer));
                }
            }
            Content::Command(command) => match self.known.get(&id) {
                Some(Some(answer)) => {
                    let answer = answer.clone();
                    self.answer(id, from, answer);
                }
                Some(None) => {}
                None => self.obey(id, from, command),
            },
        }
    }

    fn obey(&mut self, id: String, from: String, command: v1::OwnerCommand) {
        let left = u64::try_from(command.expires_ms.saturating_sub(now_ms())).ok().filter(|left| *left > 0);
        let Some(left) = left else {
            return tracing::info!(from, route = command.route, "a command came too late and is not obeyed");
        };
        let wait = Duration::from_millis(left).min(LONGEST);
        let running = self.known.values().filter(|known| known.is_none()).count();
        let Some(action) = command.action.filter(|_| running < AT_ONCE) else {
            let why = if running < AT_ONCE {
                "it does not know this command: it is of another version"
            } else {
                "it obeys too many commands already: try again"
            };
            let error = format!("instance {}: {why}", self.shared.instance);
            return self.answer(id, from, v1::OwnerAnswer { error, ..v1::OwnerAnswer::default() });
        };
        self.remember(&id);
        let (commands, route) = (self.shared.commands.clone(), command.route);
        let work = match action {
            Action::Reset(reset) => {
                tracing::info!(from, route, partitions = reset.partitions.len(), "a command: reset");
                let at = |at: v1::PartitionOffset| (TopicPartition::new(at.topic, at.partition), at.offset);
                let partitions = reset.partitions.into_iter().map(at).collect();
                async move { Some((id, from, write_answer(commands.reset(&route, partitions, wait).await))) }.boxed()
            }
            Action::Release(wish) => {
                tracing::info!(from, route, "a command: release");
                let (key, how, only) = read_wish(&wish);
                // Later nobody waits for it.
                let work = async move { tokio::time::timeout(wait, commands.release(&route, key, how, only)).await };
                work.map(|released| Some((id, from, write_release(released.unwrap_or_default())))).boxed()
            }
            Action::LookUp(record) => {
                let at = Position { partition: TopicPartition::new(record.topic, record.partition), offset: record.offset };
                async move { Some((id, from, write_held(commands.look_up(&route, at).await))) }.boxed()
            }
            // Heard before it comes here.
            Action::Watch(_) => async { None }.boxed(),
            Action::Drain(_) => {
                tracing::info!(from, "a command: drain");
                let answer = v1::OwnerAnswer { in_flight: drain::in_flight(&self.shared), ..v1::OwnerAnswer::default() };
                self.known.insert(id.clone(), Some(answer.clone()));
                let (sending, shared) = (self.sending(id, from, answer), self.shared.clone());
                // First the answer: a process that has nothing to finish ends at once.
                async move {
                    sending.await;
                    shared.drain.cancel();
                    None
                }
                .boxed()
            }
        };
        self.work.push(work);
    }

    fn remember(&mut self, id: &str) {
        if self.order.len() >= REMEMBERED
            && let Some(old) = self.order.pop_front()
        {
            self.known.remove(&old);
        }
        self.order.push_back(id.to_owned());
        self.known.insert(id.to_owned(), None);
    }

    fn answer(&self, id: String, asker: String, answer: v1::OwnerAnswer) {
        self.work.push(self.sending(id, asker, answer).map(|()| None).boxed());
    }

    fn sending(&self, id: String, asker: String, answer: v1::OwnerAnswer) -> impl Future<Output = ()> + Send + use<> {
        let shared = self.shared.clone();
        let record = v1::CommandRecord { id, from: shared.instance.clone(), content: Some(Content::Answer(answer)) };
        async move {
            // If it is lost, the command comes again.
            match tokio::time::timeout(SEND, send(&shared, &asker, &record)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(asker, error, "the answer to a command could not be sent"),
                Err(_) => tracing::warn!(asker, "the answer to a command was not acknowledged in time"),
            }
        }
    }
}

/// Asks an instance: this one by `here`, another one by `action`, over the mesh. Comes with the instance's name.
fn ask_one<T: Send + 'static>(
    shared: &Arc<Shared>,
    instance: &str,
    route: &Arc<str>,
    until: Instant,
    here: impl Future<Output = T> + Send + 'static,
    action: Action,
    read: fn(v1::OwnerAnswer) -> T,
) -> BoxFuture<'static, (String, Result<T, String>)> {
    let name = instance.to_owned();
    let asked = if *instance == *shared.instance {
        Either::Left(here.map(Ok))
    } else {
        Either::Right(ask(shared.clone(), name.clone(), route.clone(), action, until).map(move |answer| answer.map(read)))
    };
    asked.map(|answered| (name, answered)).boxed()
}

/// A place in a partition, as commands tell it.
pub(super) fn write_place(partition: &TopicPartition, offset: i64) -> v1::PartitionOffset {
    v1::PartitionOffset { topic: partition.topic.to_string(), partition: partition.partition, offset }
}

/// Asks an instance to set offsets of the partitions that it owns.
pub(super) fn reset_at(
    shared: &Arc<Shared>,
    instance: &str,
    route: &Arc<str>,
    partitions: Vec<(TopicPartition, i64)>,
    until: Instant,
) -> BoxFuture<'static, (String, Answered)> {
    let offsets = partitions.iter().map(|(partition, offset)| write_place(partition, *offset)).collect();
    let action = Action::Reset(v1::ResetPartitions { partitions: offsets });
    let (commands, own) = (shared.commands.clone(), route.clone());
    let wait = until.saturating_duration_since(Instant::now());
    ask_one(shared, instance, route, until, async move { commands.reset(&own, partitions, wait).await }, action, read_answer)
}

/// Tells another instance to drain; its answer says what is at its services.
pub(super) async fn drain_at(shared: &Arc<Shared>, instance: &str, until: Instant) -> Result<v1::OwnerAnswer, String> {
    ask(shared.clone(), instance.to_owned(), "".into(), Action::Drain(v1::DrainInstance {}), until).await
}

/// Asks an instance to release the parked records of the partitions that it owns.
pub(super) fn release_at(
    shared: &Arc<Shared>,
    instance: &str,
    route: &Arc<str>,
    wish: v1::ReleaseRecords,
    until: Instant,
) -> BoxFuture<'static, (String, AnsweredRelease)> {
    let (key, how, only) = read_wish(&wish);
    let (commands, own) = (shared.commands.clone(), route.clone());
    ask_one(
        shared,
        instance,
        route,
        until,
        async move { commands.release(&own, key, how, only).await },
        Action::Release(wish),
        read_release,
    )
}

/// Asks an instance how far a record is, if it owns its partition.
pub(super) fn look_up_at(
    shared: &Arc<Shared>,
    instance: &str,
    route: &Arc<str>,
    at: &Position,
    until: Instant,
) -> BoxFuture<'static, (String, AnsweredLookUp)> {
    let record = v1::LookUpRecord { topic: at.partition.topic.to_string(), partition: at.partition.partition, offset: at.offset };
    let (commands, own, at) = (shared.commands.clone(), route.clone(), at.clone());
    ask_one(shared, instance, route, until, async move { commands.look_up(&own, at).await }, Action::LookUp(record), read_held)
}
