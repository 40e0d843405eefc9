//! What instances say of themselves in `__mesh.status`, and what follows from it.
//!
//! A record's key is `<mesh>/<instance>`, its value the zstd-compressed protobuf of `InstanceStatus`, and a header says when it was made; a tombstone is
//! a clean exit.
//!
//! Invariant: the answering instance's own status is made on the spot, never read from the topic.
//! Invariant: what is known of others is bounded in number and in age.
//! Invariant: a report is kept as it came, and read when somebody asks: in a mesh of a thousand sidecars each hears a thousand reports of every
//! apply, and mostly nobody asks. While nobody does, those of a large mesh are heard many at once ([`rest`]).

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use mesh_proto::v1;
use mesh_routing::channel::{Member, Selector};
use prost::Message as _;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    rollout,
    snapshot::unzip,
    state::{Backoff, Shared, now_ms, origin_of},
    topics::STATUS_TOPIC,
};
use crate::{
    broker::{BrokerError, Consumer, ConsumerConfig, Event, Outgoing, StartOffset},
    record::{Header, Record, TopicPartition},
    status::{RouteState, RouteStatus},
};

/// How often an instance reports when nothing changes; ± 20 %, so that many do not report at once.
const EVERY: Duration = Duration::from_secs(30);
/// Of each instance of the mesh so much time goes into one round of reports while it is watched: fifty reports a second.
const WATCHED_SHARE: Duration = Duration::from_millis(20);
/// The longest that one look makes the mesh be watched, in milliseconds.
const MAX_WATCH_MS: i64 = 60_000;
/// Of each instance of the mesh so much time is rested before the next reports are heard, while nobody looks.
const REST_SHARE: Duration = Duration::from_millis(1);
/// In a mesh so small that a rest would be shorter there is none.
const SHORTEST_REST: Duration = Duration::from_millis(50);
/// The longest rest: clocks that are told by reports are so much less exact.
const LONGEST_REST: Duration = Duration::from_secs(1);
/// Who looked may look again so soon, in milliseconds.
const LOOKING_MS: i64 = 10_000;
/// How often the board is looked at for changes.
const LOOK: Duration = Duration::from_secs(1);
/// An instance that did not report for so long is lost.
const LOST_AFTER_MS: i64 = 90_000;
/// An instance that did not report for so long is forgotten.
const FORGOTTEN_AFTER_MS: i64 = 60 * 60 * 1_000;
/// Two relapses within this are two processes, and no clock that was set.
const TWINS_MS: i64 = 5 * 60 * 1_000;
/// How many instances are remembered at most.
const MAX_PEERS: usize = 20_000;
/// How long the taking back at exit may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long a report may take to be acknowledged.
const REPORT: Duration = Duration::from_secs(10);
/// The header of a report that says when it was made, and by a process of which age.
const STAMP: &str = "mesh-report";
/// The largest report that is unpacked, in bytes.
const MAX_REPORT: u64 = 16 << 20;

/// What other instances reported last, by instance.
pub(super) type Peers = BTreeMap<String, Peer>;

/// The offsets after the last record, by partition.
type Ends = BTreeMap<TopicPartition, i64>;

/// An instance's last report.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    content: Content,
    /// When it was heard, by this process's clock, which knows nothing of the other's.
    heard_ms: i64,
    /// When the process began that reports, by its clock.
    started_ms: i64,
    /// How much older the last two reports were when they came, by the two clocks, in milliseconds; only of those that were heard as they came.
    behind_ms: [Option<i64>; 2],
    /// When an older process reported again under the name, the last two times; 0: never.
    relapses_ms: [i64; 2],
}

impl Peer {
    fn new(content: Content, stamp: Stamp, live: bool, now: i64) -> Self {
        let heard_ms = if live { now } else { stamp.reported_ms.min(now) };
        // One that comes from a time that is not yet tells of a clock, however old it is.
        let behind = now.saturating_sub(stamp.reported_ms);
        Self {
            content,
            heard_ms,
            started_ms: stamp.started_ms,
            behind_ms: [(live || behind < 0).then_some(behind), None],
            relapses_ms: [0; 2],
        }
    }

    /// The same, knowing what was reported before under its name.
    fn after(mut self, before: Option<&Self>) -> Self {
        if let Some(before) = before {
            self.behind_ms[1] = before.behind_ms[0];
            self.relapses_ms = before.relapses_ms;
            // A process that ends takes its report back; one that was killed says nothing any more.
            if self.started_ms > 0 && self.started_ms < before.started_ms {
                self.relapses_ms = [self.heard_ms, before.relapses_ms[0]];
            }
        }
        self
    }
}

/// A report.
#[derive(Clone, Debug)]
enum Content {
    /// As it came, and not yet read.
    Packed(Bytes),
    /// Read.
    Read(Arc<v1::InstanceStatus>),
}

/// A report that was read, and when it was heard.
type Heard = (Arc<v1::InstanceStatus>, i64);

/// What is needed of every report when it comes: it is a header of its record, too, in which both stand as big-endian numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    /// When it was made, in milliseconds since 1970-01-01 UTC, by the clock of whoever reports.
    reported_ms: i64,
    /// When the process began, in the same way; 0 if that is not known.
    started_ms: i64,
}

impl Stamp {
    fn of(status: &v1::InstanceStatus) -> Self {
        Self { reported_ms: status.reported_ms, started_ms: status.started_ms }
    }

    /// `None` where there is none: older versions wrote none.
    fn read(record: &Record) -> Option<Self> {
        let (reported, started) = record.header(STAMP)?.split_first_chunk::<8>()?;
        Some(Self { reported_ms: i64::from_be_bytes(*reported), started_ms: i64::from_be_bytes(started.try_into().ok()?) })
    }

    fn header(self) -> Header {
        Header::new(STAMP, [self.reported_ms.to_be_bytes(), self.started_ms.to_be_bytes()].concat())
    }
}

/// The state of the mesh.
pub(super) fn mesh(shared: &Shared) -> v1::GetStatusResponse {
    let now = now_ms();
    shared.looked_until_ms.fetch_max(now.saturating_add(LOOKING_MS), Ordering::Relaxed);
    shared.looked.notify_one();
    let head = shared.progress.borrow().head;
    let mut instances: Vec<_> = others(shared)
        .into_iter()
        .map(|(status, heard_ms)| {
            let mut status = Arc::unwrap_or_clone(status);
            judge(shared, &mut status, now.saturating_sub(heard_ms));
            // Its age, by one clock.
            status.reported_ms = heard_ms;
            if status.state() == v1::InstanceState::Lost {
                // Whatever it did then, its partitions are others' by now.
                status.routes.clear();
            }
            status
        })
        .collect();
    instances.push(own(shared));
    instances.sort_by(|a, b| a.instance.cmp(&b.instance));
    let rollout = rollout::status(shared, &instances);
    v1::GetStatusResponse { mesh: shared.config.mesh.to_string(), generation: head, instances, instance: shared.instance.clone(), rollout }
}

/// An instance, as a canary's selector looks at it.
fn member(status: &v1::InstanceStatus) -> Member<'_> {
    Member { instance: &status.instance, services: &status.services, labels: &status.labels }
}

/// Whether a selector chooses an instance, and one that may take a table.
pub(super) fn is_chosen(status: &v1::InstanceStatus, selector: &Selector) -> bool {
    let member = member(status);
    !matches!(status.state(), v1::InstanceState::Lost | v1::InstanceState::Pinned) && selector.chooses(&member)
}

/// Says how an instance stands to the table that it ought to run.
fn judge(shared: &Shared, status: &mut v1::InstanceStatus, age_ms: i64) {
    let member = member(status);
    let (target, over) = shared.log(|log| (log.target(&member), !log.may_run(status.generation, &member)));
    status.target_generation = target;
    let local = shared.local.borrow();
    let digest = local.digests.get(&target).map(String::as_str);
    status.state = derive(status, Target { generation: target, digest, over }, age_ms).into();
}

/// The live instances that report a route, this one among them: those that may own its partitions.
pub(super) fn instances_of(shared: &Shared, route: &str) -> Vec<String> {
    let now = now_ms();
    let others = others(shared).into_iter().filter(|(status, heard_ms)| {
        now.saturating_sub(*heard_ms) <= LOST_AFTER_MS && status.routes.iter().any(|status| status.route == route)
    });
    let mut instances: Vec<String> = others.map(|(status, _)| status.instance.clone()).collect();
    if shared.board.routes().iter().any(|status| *status.route == *route) {
        instances.push(shared.instance.clone());
    }
    instances
}

/// How far the clocks of other instances that report are behind this one, in milliseconds. A report that was held up looks behind: of the last two the
/// one that differs less counts.
pub(super) fn clocks(shared: &Shared) -> Vec<(String, i64)> {
    let now = now_ms();
    let peers = shared.peers.lock().unwrap_or_else(PoisonError::into_inner);
    let live = peers.iter().filter(|(name, peer)| **name != shared.instance && now.saturating_sub(peer.heard_ms) <= LOST_AFTER_MS);
    let behind = live.filter_map(|(name, peer)| {
        let least = peer.behind_ms.iter().flatten().min_by_key(|behind| behind.abs())?;
        Some((name.clone(), *least))
    });
    behind.collect()
}

/// The names under which two processes report in turn.
pub(super) fn twins(shared: &Shared) -> Vec<String> {
    let since = now_ms().saturating_sub(TWINS_MS);
    let peers = shared.peers.lock().unwrap_or_else(PoisonError::into_inner);
    peers.iter().filter(|(_, peer)| peer.relapses_ms.iter().all(|relapse| *relapse > since)).map(|(name, _)| name.clone()).collect()
}

/// Whether another instance is alive: whether it reported lately, or why not. `None`: nobody knows of it.
pub(super) fn liveness(shared: &Shared, instance: &str) -> Option<Result<(), Duration>> {
    let peers = shared.peers.lock().unwrap_or_else(PoisonError::into_inner);
    let silent_ms = now_ms().saturating_sub(peers.get(instance)?.heard_ms);
    drop(peers);
    if silent_ms >= FORGOTTEN_AFTER_MS {
        return None;
    }
    Some(if silent_ms <= LOST_AFTER_MS { Ok(()) } else { Err(Duration::from_millis(silent_ms.unsigned_abs())) })
}

/// What other instances said last, in the order of their names. Reads what was not read yet, outside of the lock, since that can be a thousand
/// reports.
fn others(shared: &Shared) -> Vec<Heard> {
    let now = now_ms();
    let lock = || shared.peers.lock().unwrap_or_else(PoisonError::into_inner);
    let known: Vec<(String, Content, i64)> = {
        let mut peers = lock();
        peers.retain(|_, peer| now.saturating_sub(peer.heard_ms) < FORGOTTEN_AFTER_MS);
        let others = peers.iter().filter(|(instance, _)| **instance != shared.instance);
        others.map(|(instance, peer)| (instance.clone(), peer.content.clone(), peer.heard_ms)).collect()
    };
    let (mut heard, mut read) = (Vec::with_capacity(known.len()), Vec::new());
    for (instance, content, heard_ms) in known {
        match content {
            Content::Read(status) => heard.push((status, heard_ms)),
            Content::Packed(value) => {
                let status = unpack(&value, &instance).map(Arc::new);
                heard.extend(status.clone().map(|status| (status, heard_ms)));
                read.push((instance, value, status));
            }
        }
    }
    if !read.is_empty() {
        let mut peers = lock();
        for (instance, value, status) in read {
            let Some(peer) = peers.get_mut(&instance) else { continue };
            // A newer report may have come meanwhile.
            if !matches!(&peer.content, Content::Packed(known) if known.as_ptr() == value.as_ptr()) {
                continue;
            }
            match status {
                Some(status) => peer.content = Content::Read(status),
                None => drop(peers.remove(&instance)),
            }
        }
    }
    heard
}

/// Reads a report; `None` if it is none, or not that of its key.
fn unpack(value: &[u8], instance: &str) -> Option<v1::InstanceStatus> {
    let unzipped = unzip(value, MAX_REPORT).map_err(|error| error.to_string());
    match unzipped.and_then(|bytes| v1::InstanceStatus::decode(bytes.as_slice()).map_err(|error| error.to_string())) {
        Ok(status) if status.instance == instance => Some(status),
        Ok(_) => {
            tracing::debug!(instance, "a status report names another instance than its key");
            None
        }
        Err(error) => {
            tracing::debug!(instance, error, "a status report cannot be read");
            None
        }
    }
}

/// This instance, now.
fn own(shared: &Shared) -> v1::InstanceStatus {
    let local = shared.local.borrow().clone();
    let refused = local.refused.is_some();
    let head = shared.progress.borrow().head;
    let mut status = v1::InstanceStatus {
        instance: shared.instance.clone(),
        services: shared.config.services.iter().map(|service| service.name.to_string()).collect(),
        state: v1::InstanceState::Unspecified.into(),
        generation: local.generation(),
        digest: local.table.as_ref().map(|table| table.snapshot.digest.clone()).unwrap_or_default(),
        error: local.refused.unwrap_or_default(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        reported_ms: now_ms(),
        routes: shared.board.routes().iter().map(route).collect(),
        waiting: shared.waiting_reasons(),
        origin: local.table.as_ref().map_or(0, |table| origin_of(table.origin).into()),
        started_ms: shared.started_ms,
        refused_generation: if refused { local.target } else { 0 },
        labels: shared.labels.clone(),
        target_generation: 0,
        canary_dead_letters: rollout::dead_letters_since(shared, head),
    };
    judge(shared, &mut status, 0);
    status
}

/// The table that an instance ought to run.
#[derive(Clone, Copy, Debug)]
struct Target<'a> {
    generation: u64,
    /// Its digest, if it is known here.
    digest: Option<&'a str>,
    /// Whether what the instance runs is a canary that is none of its business any more.
    over: bool,
}

/// How an instance stands to the table that it ought to run, from what it says and how long ago it said it.
fn derive(status: &v1::InstanceStatus, target: Target<'_>, age_ms: i64) -> v1::InstanceState {
    use v1::InstanceState as State;
    if age_ms > LOST_AFTER_MS {
        return State::Lost;
    }
    match status.origin() {
        v1::TableOrigin::Pinned => return State::Pinned,
        v1::TableOrigin::Cache => return State::Cached,
        v1::TableOrigin::Mesh | v1::TableOrigin::Unspecified => {}
    }
    // What was refused may have been replaced by now.
    if status.refused_generation >= target.generation && status.refused_generation > 0 && !target.over {
        return State::Nacked;
    }
    match status.generation.cmp(&target.generation) {
        _ if target.over => State::Pending,
        std::cmp::Ordering::Less => State::Pending,
        std::cmp::Ordering::Equal if target.digest.is_none_or(|digest| digest == status.digest) => State::Synced,
        std::cmp::Ordering::Equal | std::cmp::Ordering::Greater => State::Drift,
    }
}

fn route(status: &RouteStatus) -> v1::RouteStatus {
    v1::RouteStatus {
        route: status.route.to_string(),
        service: status.service.to_string(),
        state: match status.state {
            RouteState::Joining => v1::RouteState::Joining,
            RouteState::Running => v1::RouteState::Running,
            RouteState::WaitingForService => v1::RouteState::WaitingForService,
            RouteState::WaitingForBroker => v1::RouteState::WaitingForBroker,
            RouteState::WaitingForTopic => v1::RouteState::WaitingForTopic,
            RouteState::Stopped => v1::RouteState::Stopped,
            RouteState::Paused => v1::RouteState::Paused,
            RouteState::Draining => v1::RouteState::Draining,
        }
        .into(),
        reason: status.reason.clone(),
        partitions: status.partitions,
        lag_records: status.lag_records,
        lag_seconds: status.lag_seconds,
        in_flight: status.in_flight,
        dispositions: status.dispositions.iter().map(|(end, count)| (end.as_str().to_owned(), *count)).collect(),
        waiting_since_ms: status.waiting_since_ms,
        lag_measured_ms: status.lag_measured_ms,
        parked_records: status.parked_records,
        exhausted_records: status.exhausted_records,
        waiting_keys: status.waiting_keys,
        next_retry_ms: status.next_retry_ms,
        breaker_open: status.breaker_open,
    }
}

/// A report without what changes all the time.
fn significant(status: &v1::InstanceStatus) -> v1::InstanceStatus {
    let mut status = status.clone();
    status.reported_ms = 0;
    for route in &mut status.routes {
        (route.lag_records, route.lag_seconds, route.in_flight, route.lag_measured_ms) = (0, 0.0, 0, 0);
        route.dispositions.clear();
    }
    status
}

/// Reports this instance until the token is cancelled, and takes the report back then.
pub(super) async fn publish(shared: Arc<Shared>, stop: CancellationToken) {
    let mut reported = false;
    stop.run_until_cancelled(report_on(&shared, &mut reported)).await;
    if reported && !matches!(timeout(GOODBYE, send(&shared, None)).await, Ok(Ok(()))) {
        tracing::warn!(instance = shared.instance, "the mesh was not told of the exit: it shows this instance as lost after a while");
    }
}

async fn report_on(shared: &Shared, reported: &mut bool) {
    // The reader creates the topic.
    let mut progress = shared.progress.subscribe();
    if progress.wait_for(|progress| progress.caught_up).await.is_err() {
        return;
    }
    let mut ready = shared.ready.subscribe();
    if ready.wait_for(|ready| *ready).await.is_err() {
        return;
    }
    let mut local = shared.local.subscribe();
    let (mut last, mut due, mut watched_due) = (v1::InstanceStatus::default(), Instant::now(), Instant::now());
    loop {
        let status = own(shared);
        let now = significant(&status);
        let watched = is_watched(shared) && Instant::now() >= watched_due;
        if now != last || Instant::now() >= due || watched {
            // Sent or not: it may be there.
            *reported = true;
            match timeout(REPORT, send(shared, Some(&status))).await {
                Ok(Ok(())) => {
                    last = now;
                    due = Instant::now() + jittered(EVERY);
                    watched_due = Instant::now() + watched_every(shared);
                }
                // Tried again at the next look; the broker's health is in the status already.
                Ok(Err(error)) => tracing::debug!(error, "a status report failed"),
                Err(_) => tracing::debug!("a status report was not acknowledged in time"),
            }
        }
        tokio::select! {
            changed = local.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK) => {},
        }
    }
}

/// Whether somebody looks at the state of the mesh again and again.
fn is_watched(shared: &Shared) -> bool {
    shared.watched_until_ms.load(Ordering::Relaxed) > now_ms()
}

/// How often an instance reports that is watched. Every sidecar reads every report, so many instances report less often.
fn watched_every(shared: &Shared) -> Duration {
    let peers = shared.peers.lock().unwrap_or_else(PoisonError::into_inner).len();
    let share = WATCHED_SHARE.saturating_mul(u32::try_from(peers).unwrap_or(u32::MAX));
    // The board is looked at once in a while: a report that is due a moment later would wait for the next look.
    jittered(share.min(EVERY)).max(LOOK - LOOK / 10)
}

/// Notes that the state of the mesh is watched for a while.
pub(super) fn watched(shared: &Shared, for_ms: u64) {
    let until = now_ms().saturating_add(i64::try_from(for_ms).unwrap_or(i64::MAX).min(MAX_WATCH_MS));
    shared.watched_until_ms.fetch_max(until, Ordering::Relaxed);
}

fn jittered(every: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 401;
    every.mul_f64(0.8 + 0.001 * random as f64)
}

async fn send(shared: &Shared, status: Option<&v1::InstanceStatus>) -> Result<(), String> {
    let value = match status {
        Some(status) => Some(zstd::bulk::compress(&status.encode_to_vec(), 1).map_err(|error| error.to_string())?.into()),
        None => None,
    };
    let producer = shared.broker.producer();
    if producer.known_partitions(STATUS_TOPIC).is_none() {
        producer.learn_topic(STATUS_TOPIC, REPORT).await.map_err(|error| error.to_string())?;
    }
    let key = format!("{}/{}", shared.config.mesh, shared.instance);
    let headers = status.map(|status| Stamp::of(status).header()).into_iter().collect();
    let record = Record { key: Some(key.into()), value, headers, timestamp_ms: None };
    let acks = producer.send(vec![Outgoing { topic: STATUS_TOPIC.into(), partition: None, record }]).await;
    acks.into_iter().try_for_each(|ack| ack.map(drop)).map_err(|error| error.to_string())
}

/// Reads what others report until the token is cancelled.
pub(super) async fn read(shared: Arc<Shared>, stop: CancellationToken) {
    let Some((mut consumer, ends)) = stop.run_until_cancelled(begin(&shared)).await else { return };
    stop.run_until_cancelled(follow(&shared, &mut *consumer, &ends)).await;
    consumer.close().await;
}

/// Waits for the broker, and begins to read. Gives the ends of the partitions, too: reports that were there before are as old as they
/// say; later ones are heard as they come.
async fn begin(shared: &Shared) -> (Box<dyn Consumer>, Ends) {
    // The reader of the control topic creates this topic too. This cannot fail: the sender is in `shared`.
    shared.progress.subscribe().wait_for(|progress| progress.caught_up).await.map(drop).unwrap_or_default();
    let mut backoff = Backoff::new();
    loop {
        match try_to_begin(shared).await {
            Ok(begun) => return begun,
            Err(error) => tracing::debug!(%error, "{STATUS_TOPIC} cannot be read yet"),
        }
        backoff.pause().await;
    }
}

async fn try_to_begin(shared: &Shared) -> Result<(Box<dyn Consumer>, Ends), BrokerError> {
    let admin = shared.broker.admin();
    let partitions = admin.topics().await?.get(STATUS_TOPIC).copied().unwrap_or(0);
    let mut ends = Ends::new();
    for partition in (0..partitions).map(|partition| TopicPartition::new(STATUS_TOPIC, partition)) {
        let (_, end) = admin.watermarks(&partition).await?;
        ends.insert(partition, end);
    }
    let config = ConsumerConfig::reader(vec![STATUS_TOPIC.into()], StartOffset::Earliest, 1 << 20);
    Ok((shared.broker.consumer(config)?, ends))
}

async fn follow(shared: &Shared, consumer: &mut dyn Consumer, ends: &Ends) {
    loop {
        match consumer.next().await {
            Event::Records(batch) => {
                let end = ends.get(&batch.partition).copied().unwrap_or(0);
                for (offset, record) in &batch.records {
                    hear(shared, record, *offset >= end);
                }
                rest(shared).await;
            }
            Event::Trouble(error) => tracing::debug!(%error, "{STATUS_TOPIC} is waited for"),
            Event::Assigned(_) | Event::Revoking(_) | Event::Expired { .. } | Event::Recovered => {}
        }
    }
}

/// Lets reports gather: in a large mesh each that is heard by itself wakes all its sidecars. Ends when somebody looks. Cancel-safe.
pub(super) async fn rest(shared: &Shared) {
    let peers = shared.peers.lock().unwrap_or_else(PoisonError::into_inner).len();
    if let Some(rest) = rest_of(peers)
        && shared.looked_until_ms.load(Ordering::Relaxed) < now_ms()
    {
        // Either way the rest is over.
        timeout(rest, shared.looked.notified()).await.unwrap_or_default();
    }
}

fn rest_of(peers: usize) -> Option<Duration> {
    let rest = REST_SHARE.saturating_mul(u32::try_from(peers).unwrap_or(u32::MAX));
    (rest >= SHORTEST_REST).then_some(rest.min(LONGEST_REST))
}

/// Takes a report.
fn hear(shared: &Shared, record: &Record, live: bool) {
    let Some(instance) = record
        .key
        .as_ref()
        .and_then(|key| std::str::from_utf8(key).ok())
        .and_then(|key| key.strip_prefix(&*shared.config.mesh)?.strip_prefix('/'))
        .filter(|instance| !instance.contains('/'))
    else {
        return;
    };
    let unpacked = match &record.value {
        None => None,
        Some(value) => match Stamp::read(record) {
            // A copy: the record is a piece of a whole batch, which is not to be kept for it.
            Some(stamp) => Some((stamp, Content::Packed(Bytes::copy_from_slice(value)))),
            None => match unpack(value, instance) {
                Some(status) => Some((Stamp::of(&status), Content::Read(Arc::new(status)))),
                None => return,
            },
        },
    };
    let now = now_ms();
    let mut peers = shared.peers.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((stamp, content)) = unpacked else {
        peers.remove(instance);
        return;
    };
    let peer = Peer::new(content, stamp, live, now).after(peers.get(instance));
    if let Some(known) = peers.get_mut(instance) {
        *known = peer;
        return;
    }
    if peers.len() >= MAX_PEERS {
        peers.retain(|_, known| now.saturating_sub(known.heard_ms) < FORGOTTEN_AFTER_MS);
    }
    if peers.len() < MAX_PEERS {
        peers.insert(instance.to_owned(), peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(generation: u64, digest: &str) -> v1::InstanceStatus {
        v1::InstanceStatus { generation, digest: digest.to_owned(), origin: v1::TableOrigin::Mesh.into(), ..Default::default() }
    }

    #[test]
    fn states_follow_from_reports() {
        use v1::InstanceState::{Cached, Drift, Lost, Nacked, Pending, Pinned, Synced};
        let target = Target { generation: 7, digest: Some("d7"), over: false };
        let of = |status: &v1::InstanceStatus, age_ms| derive(status, target, age_ms);
        assert_eq!(of(&status(7, "d7"), 0), Synced);
        assert_eq!(of(&status(7, "other"), 0), Drift);
        assert_eq!(of(&status(8, "d8"), 0), Drift);
        assert_eq!(of(&status(6, "d6"), 0), Pending);
        assert_eq!(of(&status(7, "d7"), LOST_AFTER_MS + 1), Lost);
        let refused = |generation| v1::InstanceStatus { refused_generation: generation, ..status(5, "d5") };
        assert_eq!(of(&refused(7), 0), Nacked);
        assert_eq!(of(&refused(6), 0), Pending, "what it refused is not the newest any more");
        let origin = |origin: v1::TableOrigin| v1::InstanceStatus { origin: origin.into(), ..status(7, "d7") };
        assert_eq!(of(&origin(v1::TableOrigin::Cache), 0), Cached);
        assert_eq!(of(&origin(v1::TableOrigin::Pinned), 0), Pinned);
        assert_eq!(of(&origin(v1::TableOrigin::Pinned), LOST_AFTER_MS + 1), Lost);
        assert_eq!(
            derive(&v1::InstanceStatus::default(), Target { generation: 0, digest: None, over: false }, 0),
            Synced,
            "no table anywhere"
        );
        assert_eq!(derive(&status(7, "d7"), Target { digest: None, ..target }, 0), Synced, "the digest is not known here");
        assert_eq!(derive(&status(8, "d8"), Target { over: true, ..target }, 0), Pending, "it goes back from a canary");
    }

    #[test]
    fn what_changes_all_the_time_is_no_news() {
        let route = v1::RouteStatus { route: "r".into(), lag_records: 5, lag_seconds: 1.0, in_flight: 3, ..Default::default() };
        let mut one = v1::InstanceStatus { routes: vec![route], reported_ms: 1, ..status(7, "d7") };
        let before = significant(&one);
        one.reported_ms = 2;
        one.routes[0].lag_records = 900;
        one.routes[0].dispositions.insert("forwarded".into(), 4);
        assert_eq!(significant(&one), before);
        one.routes[0].reason = "service s is away".into();
        assert_ne!(significant(&one), before);
    }

    #[test]
    fn a_stamp_is_read_back() {
        let stamp = Stamp { reported_ms: 1_700_000_000_123, started_ms: -1 };
        let record = |headers| Record { headers, ..Record::default() };
        assert_eq!(Stamp::read(&record(vec![stamp.header()])), Some(stamp));
        assert_eq!(Stamp::read(&record(Vec::new())), None);
        for length in [0, 7, 8, 15, 17] {
            assert_eq!(Stamp::read(&record(vec![Header::new(STAMP, vec![1; length])])), None, "{length}");
        }
    }

    #[test]
    fn a_small_mesh_does_not_rest() {
        assert_eq!([0, 3, 49].map(rest_of), [None; 3]);
        assert_eq!([50, 300, 20_000].map(rest_of), [50, 300, 1_000].map(|ms| Some(Duration::from_millis(ms))));
    }

    #[test]
    fn reports_spread() {
        for _ in 0..100 {
            let every = jittered(EVERY);
            assert!((EVERY.mul_f64(0.8)..=EVERY.mul_f64(1.21)).contains(&every), "{every:?}");
        }
    }
}
