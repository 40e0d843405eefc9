//! The ground truth: what topics hold and what was committed, read past the sidecars.
//!
//! On Kafka by a client of its own, with `read_committed`. On the embedded broker offsets and ends are read from the store's file, in one
//! transaction, while the sidecar runs; and the records once it has ended, by the broker's own library, since the rows are its own.
//!
//! Invariant: a sample's ends were taken after its commits: what a commit claims to be complete lies below the ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_sidecar::{
    broker::{
        Broker as _, ConsumerConfig, Event, StartOffset,
        embedded::{EmbeddedBroker, EmbeddedConfig},
    },
    record::TopicPartition,
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    message::Headers as _,
};
use rusqlite::{Connection, OpenFlags, OptionalExtension as _};
use tokio_util::sync::CancellationToken;

use super::ledger::Ledger;
use crate::mesh::Found;

/// An offset of each partition.
pub type Offsets = BTreeMap<i32, i64>;

/// The topics and the group of a run.
#[derive(Clone, Debug)]
pub struct Names {
    /// The source.
    pub a: String,
    /// The destination.
    pub b: String,
    /// The dead letters.
    pub dead: String,
    /// Retry topics in their order, then the park topic ([`super::lines::Line::sides`]).
    pub sides: Vec<String>,
    /// The route's group.
    pub group: String,
    /// How many partitions each topic has.
    pub partitions: i32,
}

/// What was committed at a moment, and what was stored by then.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// When, since the begin.
    pub at: Duration,
    /// The committed offset of each partition of A.
    pub committed: Offsets,
    /// The ends of B's partitions, afterwards.
    pub b: Offsets,
    /// The ends of the dead letters' partitions, afterwards.
    pub dead: Offsets,
    /// Retry and park topics, as [`Names::sides`] has them.
    pub sides: Vec<Side>,
    /// How many events the ledger had, afterwards.
    pub events: usize,
}

/// How far the route is in a topic beside its source.
#[derive(Clone, Debug, Default)]
pub struct Side {
    /// The committed offset of each partition.
    pub committed: Offsets,
    /// The ends of its partitions, afterwards.
    pub ends: Offsets,
}

/// What the topics of a line hold, in the order of offsets within a partition.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// The records of A.
    pub a: Vec<Found>,
    /// The records of B.
    pub b: Vec<Found>,
    /// The dead letters.
    pub dead: Vec<Found>,
    /// The records of retry and park topics, as [`Names::sides`] has them.
    pub sides: Vec<Vec<Found>>,
}

/// Where the truth is read.
#[derive(Clone, Debug)]
pub enum Ground {
    /// The brokers' own addresses, past any proxy.
    Kafka(String),
    /// The store's file.
    Embedded(PathBuf),
}

const TIMEOUT: Duration = Duration::from_secs(3);

impl Ground {
    /// Takes samples until it is stopped; those that the broker does not answer are left out.
    pub fn watch(&self, names: &Names, ledger: &Arc<Ledger>, stop: CancellationToken) -> tokio::task::JoinHandle<Vec<Sample>> {
        let (ground, names, ledger) = (self.clone(), names.clone(), ledger.clone());
        tokio::spawn(async move {
            let mut samples = Vec::new();
            let mut client = None;
            let mut every = tokio::time::interval(Duration::from_millis(200));
            every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            while stop.run_until_cancelled(every.tick()).await.is_some() {
                let (ground, names, ledger) = (ground.clone(), names.clone(), ledger.clone());
                let mut kept: Option<Client> = client.take();
                let ask = move || (ground.sample(&names, &ledger, &mut kept), kept);
                // Without an answer the broker is away, or nothing was committed yet: the next one by a new client.
                if let Ok((Ok(sample), kept)) = tokio::task::spawn_blocking(ask).await {
                    samples.push(sample);
                    client = kept;
                }
            }
            samples
        })
    }

    /// What is committed and stored now.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn now(&self, names: &Names, ledger: &Arc<Ledger>) -> Result<Sample> {
        let (ground, names, ledger) = (self.clone(), names.clone(), ledger.clone());
        tokio::task::spawn_blocking(move || ground.sample(&names, &ledger, &mut None)).await?
    }

    fn sample(&self, names: &Names, ledger: &Ledger, client: &mut Option<Client>) -> Result<Sample> {
        match self {
            Self::Kafka(bootstrap) => {
                if client.is_none() {
                    *client = Some(Client::new(bootstrap, &names.group)?);
                }
                let client = client.as_ref().context("a client")?;
                let (committed, sides) = client.committed(names)?;
                let ends = |topic: &String| client.ends(topic, names.partitions);
                let (b, dead) = (ends(&names.b)?, ends(&names.dead)?);
                let side = |(committed, topic): (_, &String)| anyhow::Ok(Side { committed, ends: ends(topic)? });
                let sides = sides.into_iter().zip(&names.sides).map(side).collect::<Result<_>>()?;
                Ok(Sample { at: ledger.now(), committed, b, dead, sides, events: ledger.books().events.len() })
            }
            Self::Embedded(file) => {
                let mut store = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
                store.busy_timeout(TIMEOUT)?;
                let moment = store.transaction()?;
                let committed = stored_offsets(&moment, &names.group, &names.a)?;
                let (b, dead) = (stored_ends(&moment, &names.b)?, stored_ends(&moment, &names.dead)?);
                let side = |topic: &String| {
                    anyhow::Ok(Side { committed: stored_offsets(&moment, &names.group, topic)?, ends: stored_ends(&moment, topic)? })
                };
                let sides = names.sides.iter().map(side).collect::<Result<_>>()?;
                Ok(Sample { at: ledger.now(), committed, b, dead, sides, events: ledger.books().events.len() })
            }
        }
    }

    /// The ends of A.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn ends(&self, names: &Names) -> Result<Offsets> {
        let (ground, names) = (self.clone(), names.clone());
        tokio::task::spawn_blocking(move || match &ground {
            Self::Kafka(bootstrap) => Client::new(bootstrap, &names.group)?.ends(&names.a, names.partitions),
            Self::Embedded(file) => stored_ends(&Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?, &names.a),
        })
        .await?
    }

    /// How many records a moment's commits leave in retry and park topics.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn waiting(&self, names: &Names, sample: &Sample) -> Result<usize> {
        let mut waiting = 0;
        for (topic, side) in names.sides.iter().zip(&sample.sides) {
            let committed = |partition: &i32| side.committed.get(partition).copied().unwrap_or(0);
            let left = side.ends.iter().filter(|(partition, end)| committed(partition) < **end);
            let from: Offsets = left.clone().map(|(partition, _)| (*partition, committed(partition))).collect();
            waiting += match self {
                _ if from.is_empty() => 0,
                Self::Embedded(_) => left.count(),
                // The marks of transactions are no records.
                Self::Kafka(bootstrap) => {
                    let (bootstrap, topic, partitions) = (bootstrap.clone(), topic.clone(), names.partitions);
                    tokio::task::spawn_blocking(move || read_kafka(&bootstrap, &topic, partitions, &from)).await??.len()
                }
            };
        }
        Ok(waiting)
    }

    /// The last sample of a run: the first one that the broker answers.
    ///
    /// # Errors
    /// If it answers none for long.
    pub async fn last(&self, names: &Names, ledger: &Arc<Ledger>) -> Result<Option<Sample>> {
        for _ in 0..10 {
            if let Ok(sample) = self.now(names, ledger).await {
                return Ok(Some(sample));
            }
            // Nothing tells from outside when a broker is back.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        self.now(names, ledger).await.map(Some)
    }

    /// All records of the line's topics. No sidecar may run on the embedded broker's folder any more.
    ///
    /// # Errors
    /// If they cannot be read to their ends.
    pub async fn read(&self, names: &Names) -> Result<Contents> {
        let mut all = Contents { sides: vec![Vec::new(); names.sides.len()], ..Contents::default() };
        let own = [(&names.a, &mut all.a), (&names.b, &mut all.b), (&names.dead, &mut all.dead)];
        let topics = own.into_iter().chain(names.sides.iter().zip(&mut all.sides));
        match self {
            Self::Kafka(bootstrap) => {
                for (topic, found) in topics {
                    let (bootstrap, topic, partitions) = (bootstrap.clone(), topic.clone(), names.partitions);
                    *found = tokio::task::spawn_blocking(move || read_kafka(&bootstrap, &topic, partitions, &from_the_start(partitions)))
                        .await??;
                }
            }
            Self::Embedded(file) => {
                let broker = EmbeddedBroker::open(EmbeddedConfig::new(file.parent().context("the broker's folder")?))?;
                for (topic, found) in topics {
                    *found = read_embedded(&broker, topic, names.partitions).await.with_context(|| format!("reading {topic}"))?;
                }
                broker.close(TIMEOUT).await?;
            }
        }
        Ok(all)
    }
}

async fn read_embedded(broker: &EmbeddedBroker, topic: &str, partitions: i32) -> Result<Vec<Found>> {
    let mut left = BTreeMap::new();
    for partition in 0..partitions {
        let (low, high) = broker.admin().watermarks(&TopicPartition::new(topic, partition)).await?;
        ensure!(low == 0, "partition {partition} begins at {low}");
        if high > 0 {
            left.insert(partition, high);
        }
    }
    let config = ConsumerConfig::reader(vec![topic.into()], StartOffset::Earliest, 4 << 20);
    let mut consumer = broker.consumer(config)?;
    let mut all = Vec::new();
    while !left.is_empty() {
        let event = tokio::time::timeout(Duration::from_secs(30), consumer.next()).await.with_context(|| format!("left: {left:?}"))?;
        let Event::Records(batch) = event else { continue };
        let partition = batch.partition.partition;
        if batch.records.last().is_some_and(|(offset, _)| left.get(&partition).is_some_and(|high| offset + 1 >= *high)) {
            left.remove(&partition);
        }
        let bytes = |bytes: &bytes::Bytes| bytes.to_vec();
        all.extend(batch.records.into_iter().map(|(offset, record)| {
            Found {
                topic: topic.to_owned(),
                partition,
                offset,
                key: record.key.as_ref().map(bytes),
                value: record.value.as_ref().map(bytes),
                headers: record
                    .headers
                    .iter()
                    .map(|header| (header.name.to_string(), header.value.as_ref().map(bytes).unwrap_or_default()))
                    .collect(),
            }
        }));
    }
    consumer.close().await;
    Ok(all)
}

fn stored_offsets(store: &Connection, group: &str, topic: &str) -> Result<Offsets> {
    let mut statement = store.prepare(
        "SELECT partitions.number, offsets.next_offset FROM offsets JOIN partitions ON partitions.id = offsets.partition
         JOIN topics ON topics.id = partitions.topic WHERE offsets.consumer_group = ? AND topics.name = ?",
    )?;
    let rows = statement.query_map([group, topic], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// The ends of a topic's partitions: a row of `batches` has the key `partition × 2^40 + offset of its first record`, and says how many it holds.
fn stored_ends(store: &Connection, topic: &str) -> Result<Offsets> {
    let mut partitions =
        store.prepare("SELECT partitions.id, number, high FROM partitions JOIN topics ON topics.id = partitions.topic WHERE name = ?")?;
    let mut last = store.prepare("SELECT id, span FROM batches WHERE id BETWEEN ? AND ? ORDER BY id DESC LIMIT 1")?;
    let rows = partitions.query_map([topic], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i32>(1)?, row.get::<_, i64>(2)?)))?;
    let mut ends = BTreeMap::new();
    for row in rows {
        let (id, number, high) = row?;
        let newest: Option<(i64, i64)> =
            last.query_row([id << 40, (id << 40) | ((1 << 40) - 1)], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        let end = newest.map_or(0, |(key, span)| (key & ((1 << 40) - 1)) + span);
        ends.insert(number, high.max(end));
    }
    Ok(ends)
}

/// A client of Kafka that never joins a group.
struct Client(BaseConsumer);

impl Client {
    fn new(bootstrap: &str, group: &str) -> Result<Self> {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", bootstrap)
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_uncommitted")
            .set("allow.auto.create.topics", "false")
            .set("reconnect.backoff.max.ms", "500")
            .set("log_level", "0");
        Ok(Self(config.create()?))
    }

    /// What is committed of A, and of the topics beside it: by one request, so that all are of one moment.
    fn committed(&self, names: &Names) -> Result<(Offsets, Vec<Offsets>)> {
        let mut wanted = TopicPartitionList::new();
        for topic in std::iter::once(&names.a).chain(&names.sides) {
            for partition in 0..names.partitions {
                wanted.add_partition(topic, partition);
            }
        }
        let found = self.0.committed_offsets(wanted, TIMEOUT)?;
        let of = |topic: &String| {
            let mut committed = BTreeMap::new();
            for element in found.elements_for_topic(topic) {
                element.error()?;
                if let Offset::Offset(offset) = element.offset() {
                    committed.insert(element.partition(), offset);
                }
            }
            anyhow::Ok(committed)
        };
        Ok((of(&names.a)?, names.sides.iter().map(of).collect::<Result<_>>()?))
    }

    fn ends(&self, topic: &str, partitions: i32) -> Result<Offsets> {
        (0..partitions).map(|partition| Ok((partition, self.0.fetch_watermarks(topic, partition, TIMEOUT)?.1))).collect()
    }
}

fn from_the_start(partitions: i32) -> Offsets {
    (0..partitions).map(|partition| (partition, 0)).collect()
}

/// What a `read_committed` reader sees of a topic's partitions, from these offsets on.
fn read_kafka(bootstrap: &str, topic: &str, partitions: i32, from: &Offsets) -> Result<Vec<Found>> {
    let every = Client::new(bootstrap, "soak-checker")?;
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", bootstrap)
        .set("group.id", "soak-checker")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", "read_committed")
        .set("auto.offset.reset", "error")
        .set("allow.auto.create.topics", "false")
        .set("log_level", "0");
    let committed = Client(config.create()?);
    let deadline = Instant::now() + Duration::from_secs(120);
    // A commit is answered before its partitions are marked, and what a killed process left open ends by its time: until then a reader of committed
    // records ends early.
    while every.ends(topic, partitions)? != committed.ends(topic, partitions)? {
        ensure!(Instant::now() < deadline, "a transaction on {topic} does not end");
        drop(committed.0.poll(Duration::from_millis(100)));
    }
    let Client(consumer) = committed;
    let mut all = TopicPartitionList::new();
    for (partition, offset) in from {
        all.add_partition_offset(topic, *partition, Offset::Offset(*offset))?;
    }
    consumer.assign(&all)?;
    let mut left: BTreeSet<i32> = from.keys().copied().collect();
    let mut records = Vec::new();
    while !left.is_empty() {
        ensure!(Instant::now() < deadline, "{topic} could not be read to its end");
        match consumer.poll(Duration::from_millis(200)) {
            None => {}
            Some(Err(KafkaError::PartitionEOF(partition))) => drop(left.remove(&partition)),
            Some(Err(error)) => return Err(error).with_context(|| format!("reading {topic}")),
            Some(Ok(message)) => records.push(Found {
                topic: topic.to_owned(),
                partition: message.partition(),
                offset: message.offset(),
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().map(<[u8]>::to_vec),
                headers: message.headers().map_or_else(Vec::new, |headers| {
                    headers.iter().map(|header| (header.key.to_owned(), header.value.unwrap_or_default().to_vec())).collect()
                }),
            }),
        }
    }
    Ok(records)
}
