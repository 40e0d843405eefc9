//! Routes on the embedded broker in memory, with a paused clock and services that fetch their deliveries: no sockets, no waiting.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
};

use mesh_routing::{compile, parse};
use tokio::task::JoinHandle;

use super::*;
use crate::deliver::desk::Heard;
use crate::{
    broker::{
        ConsumerConfig, Event, NewTopic, Outgoing, StartOffset,
        embedded::{EmbeddedBroker, EmbeddedConfig},
        fake::Fake,
    },
    config::{BrokerConfig, ControlConfig, Limits, Listen, ListenTls, LogFormat, ServiceConfig, TelemetryConfig},
    outcome::{Answer, Delivery, Disposition, Outcome, Reply, ReplyRecord},
    pause::{Pause, Pauses},
    record::{Record, TopicPartition},
    table::TableOrigin,
};

/// A mesh of one service on a broker in memory.
pub(super) struct Mesh {
    pub(super) broker: Arc<EmbeddedBroker>,
    pub(super) board: Board,
    pub(super) metrics: Metrics,
    pub(super) desks: Desks,
    pub(super) table: watch::Sender<Option<Arc<ActiveTable>>>,
    pub(super) ask: crate::command::Commands,
    pub(super) pause: watch::Sender<Arc<Pauses>>,
    pub(super) stop: CancellationToken,
    pub(super) running: JoinHandle<()>,
}

fn config() -> Config {
    let any = "127.0.0.1:0".parse().unwrap();
    Config {
        mesh: "test".into(),
        services: vec![ServiceConfig { name: "worker".into(), app: None, publish: None, subscribe: None, token_file: None }],
        instance: None,
        labels: BTreeMap::new(),
        state: PathBuf::new(),
        broker: BrokerConfig::Embedded { path: PathBuf::new() },
        table: None,
        listen: Listen { api: any, admin: any, probe: any },
        tls: ListenTls::default(),
        control: ControlConfig::default(),
        telemetry: TelemetryConfig { otlp: None, log: "off".to_owned(), log_format: LogFormat::Pretty },
        limits: Limits::default(),
    }
}

pub(super) fn active(routes: &str) -> Option<Arc<ActiveTable>> {
    let text = format!("apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: test }}\nspec:\n  routes:\n{routes}");
    let table = parse("test.yaml", &text).unwrap();
    Some(Arc::new(ActiveTable { generation: 1, applied_ms: 0, origin: TableOrigin::Mesh, compiled: Arc::new(compile(&table).unwrap()) }))
}

pub(super) fn broker() -> Arc<EmbeddedBroker> {
    EmbeddedBroker::in_memory(EmbeddedConfig::new("")).unwrap()
}

impl Mesh {
    pub(super) fn on(broker: Arc<EmbeddedBroker>, routes: &str) -> Self {
        let (table, watch) = watch::channel(active(routes));
        let (ask, commands) = crate::command::channel();
        let (pause, pauses) = watch::channel(Arc::default());
        let (board, desks, stop) = (Board::default(), Desks::default(), CancellationToken::new());
        let metrics = Metrics::new();
        let context = Context {
            config: Arc::new(config()),
            broker: broker.clone(),
            board: board.clone(),
            desks: desks.clone(),
            metrics: metrics.clone(),
            tracer: Tracer::disabled(),
            paused: pauses,
        };
        let running = tokio::spawn(Supervisor::new(context, watch, commands).run(stop.clone()));
        Self { broker, board, metrics, desks, table, ask, pause, stop, running }
    }

    pub(super) async fn desk(&self, route: &str) -> Arc<crate::deliver::desk::Desk> {
        loop {
            match self.desks.get(route) {
                Some(desk) => return desk,
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }

    pub(super) async fn publish(&self, topic: &str, keys: impl IntoIterator<Item = (String, String)>) {
        self.broker.producer().learn_topic(topic, Duration::from_secs(1)).await.unwrap();
        let records = keys.into_iter().map(|(key, value)| Outgoing {
            topic: topic.into(),
            partition: None,
            record: Record { key: Some(key.into()), value: Some(value.into()), ..Record::default() },
        });
        for ack in self.broker.producer().send(records.collect()).await {
            ack.unwrap();
        }
    }

    /// Waits until so many records of a route have their end.
    pub(super) async fn ended(&self, route: &str, count: u64) -> BTreeMap<Disposition, u64> {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(600);
        loop {
            let ends = self
                .board
                .routes()
                .into_iter()
                .find(|status| *status.route == *route)
                .map(|status| status.dispositions)
                .unwrap_or_default();
            if ends.values().sum::<u64>() >= count {
                return ends;
            }
            assert!(tokio::time::Instant::now() < deadline, "{route}: only {ends:?} of {count}; {:?}", self.board.routes());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) async fn end(self) {
        self.stop.cancel();
        self.running.await.unwrap();
    }
}

/// All records of a topic.
pub(super) async fn read(broker: &EmbeddedBroker, topic: &str) -> Vec<Record> {
    let partitions = broker.admin().topics().await.unwrap().get(topic).copied().unwrap_or(0);
    let mut left = 0;
    for partition in 0..partitions {
        let (low, high) = broker.admin().watermarks(&TopicPartition::new(topic, partition)).await.unwrap();
        left += (high - low) as usize;
    }
    let config = ConsumerConfig::reader(vec![topic.into()], StartOffset::Earliest, 1 << 20);
    let mut consumer = broker.consumer(config).unwrap();
    let mut records = Vec::new();
    while records.len() < left {
        if let Event::Records(batch) = consumer.next().await {
            records.extend(batch.records.into_iter().map(|(_, record)| record));
        }
    }
    consumer.close().await;
    records
}

pub(super) fn text(bytes: Option<&bytes::Bytes>) -> String {
    String::from_utf8(bytes.unwrap().to_vec()).unwrap()
}

pub(super) fn reply(status: u16, value: impl Into<bytes::Bytes>) -> Outcome {
    let value = value.into();
    let record = ReplyRecord { value: Some(value.clone()), ..ReplyRecord::default() };
    Outcome::Reply(Reply { status, records: vec![record], body: Some(value), retry_after: None })
}

fn position(delivery: &Delivery) -> (TopicPartition, i64) {
    (delivery.position.partition.clone(), delivery.position.offset)
}

const KEYS: usize = 20;

fn numbered(count: usize) -> impl Iterator<Item = (String, String)> {
    (0..count).map(|n| (format!("k{}", n % KEYS), format!("{n}")))
}

/// Every record ends exactly once and where it should, whatever its service says; replies keep the order of their key; a key is never twice at
/// the service.
#[tokio::test(start_paused = true)]
async fn every_record_has_one_end() {
    const COUNT: usize = 2_000;
    let mesh = Mesh::on(
        broker(),
        "  - { name: work, service: worker, deliver: stream, from: [in], to: [out, copy], concurrency: 16,
              retry: { attempts: 3, initial: 10ms, max: 1s }, ignore_status: [204], breaker: { failures: 1000, open: 1s } }",
    );
    mesh.publish("in", numbered(COUNT)).await;
    let desk = mesh.desk("work").await;
    let service = tokio::spawn(async move {
        let (mut at_once, mut attempts) = (Vec::<Delivery>::new(), HashMap::<_, u32>::new());
        let mut turn = 0usize;
        loop {
            let Some(taken) = desk.take(8, Duration::from_millis(5)).await else { return attempts };
            for delivery in taken {
                assert!(at_once.iter().all(|other| other.record.key != delivery.record.key), "a key is twice at the service");
                *attempts.entry(position(&delivery)).or_default() += 1;
                at_once.push(delivery);
            }
            // Answers come in another order than deliveries.
            turn += 1;
            if at_once.is_empty() {
                continue;
            }
            let delivery = at_once.swap_remove(turn * 7 % at_once.len());
            let number: usize = text(delivery.record.value.as_ref()).parse().unwrap();
            let outcome = match number % 10 {
                0 => reply(204, "ignored though it has a body"),
                1 => Outcome::Ignore,
                2 => Outcome::Reject { reason: "never".to_owned() },
                3 => Outcome::Retry { reason: "not yet".to_owned(), after: None },
                4 if delivery.attempt < 3 => reply(500, "oh"),
                5 => reply(404, "always"),
                6 => reply(200, ""),
                _ => reply(200, format!("{number}")),
            };
            let outcome = match outcome {
                Outcome::Reply(reply) if reply.body.as_ref().is_some_and(bytes::Bytes::is_empty) => {
                    Outcome::Reply(Reply { records: Vec::new(), body: None, ..reply })
                }
                outcome => outcome,
            };
            assert_eq!(desk.answer(vec![Answer { id: delivery.id, outcome }]), [Heard::Taken]);
        }
    });
    let ends = mesh.ended("work", COUNT as u64).await;
    let tenth = COUNT as u64 / 10;
    assert_eq!(
        ends,
        BTreeMap::from([(Disposition::Forwarded, 4 * tenth), (Disposition::Ignored, 3 * tenth), (Disposition::DeadLettered, 3 * tenth)])
    );
    let broker = mesh.broker.clone();
    mesh.end().await;
    let attempts = service.await.unwrap();
    assert_eq!(attempts.len(), COUNT);
    let (out, copy, dead) = (read(&broker, "out").await, read(&broker, "copy").await, read(&broker, "work.dlq").await);
    assert_eq!((out.len(), copy.len(), dead.len()), (COUNT * 4 / 10, COUNT * 4 / 10, COUNT * 3 / 10));
    let mut last: HashMap<String, i64> = HashMap::new();
    let mut ids = BTreeSet::new();
    for record in &out {
        let (key, number) = (text(record.key.as_ref()), text(record.value.as_ref()).parse().unwrap());
        assert!(last.insert(key, number).is_none_or(|before| before < number), "replies of one key are in order");
        assert!(ids.insert(text(record.header("mesh-id"))), "ids differ");
        assert_eq!(record.header_str("mesh-hops"), Some("1"));
        assert!(record.header_str("mesh-cause").unwrap().starts_with("work in/"));
    }
    assert!(copy.iter().all(|record| ids.contains(&text(record.header("mesh-id")))), "a copy has the same id");
    let reasons: BTreeMap<&str, usize> = dead.iter().fold(BTreeMap::new(), |mut reasons, record| {
        *reasons.entry(record.header_str("mesh-dlq-reason").unwrap()).or_default() += 1;
        assert!(record.header_str("mesh-dlq-attempts").is_some_and(|attempts| attempts == "1" || attempts == "3"));
        reasons
    });
    assert_eq!(reasons, BTreeMap::from([("attempts", COUNT / 5), ("status", COUNT / 10)]));
    // Everything is committed.
    for partition in 0..4 {
        let partition = TopicPartition::new("in", partition);
        let (_, high) = broker.admin().watermarks(&partition).await.unwrap();
        let committed = broker.admin().committed("test.work", vec![partition]).await.unwrap();
        assert_eq!(committed[0].as_ref().map_or(0, |commit| commit.offset), high);
    }
}

/// Members come and go under load: nothing is lost, what a commit recorded is not delivered again, first deliveries of a key are in order.
#[tokio::test(start_paused = true)]
async fn members_come_and_go() {
    const COUNT: usize = 3_000;
    const ROUTE: &str = "  - { name: work, service: worker, deliver: stream, from: [in], to: [out], concurrency: 8 }";
    let broker = broker();
    let seen = Arc::new(std::sync::Mutex::new(Vec::<(String, i64)>::new()));
    let serve = |mesh: &Mesh| {
        let (desks, seen, stop) = (mesh.desks.clone(), seen.clone(), mesh.stop.clone());
        tokio::spawn(async move {
            while !stop.is_cancelled() {
                let Some(desk) = desks.get("work") else {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    continue;
                };
                let Some(taken) = desk.take(4, Duration::from_millis(5)).await else { continue };
                tokio::time::sleep(Duration::from_millis(1)).await;
                for delivery in taken {
                    seen.lock().unwrap().push((text(delivery.record.key.as_ref()), text(delivery.record.value.as_ref()).parse().unwrap()));
                    desk.answer(vec![Answer { id: delivery.id, outcome: reply(200, delivery.record.value.clone().unwrap()) }]);
                }
            }
        })
    };
    let first = Mesh::on(broker.clone(), ROUTE);
    first.publish("in", numbered(COUNT)).await;
    serve(&first);
    first.ended("work", 200).await;
    let second = Mesh::on(broker.clone(), ROUTE);
    serve(&second);
    second.ended("work", 200).await;
    let third = Mesh::on(broker.clone(), ROUTE);
    serve(&third);
    while third.board.routes().first().is_none_or(|status| status.partitions == 0) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    first.end().await;
    second.end().await;
    loop {
        let mut left = 0;
        for partition in 0..4 {
            let partition = TopicPartition::new("in", partition);
            let (_, high) = broker.admin().watermarks(&partition).await.unwrap();
            let committed = broker.admin().committed("test.work", vec![partition]).await.unwrap();
            left += high - committed[0].as_ref().map_or(0, |commit| commit.offset);
        }
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    third.end().await;
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    let distinct: BTreeSet<i64> = seen.iter().map(|(_, number)| *number).collect();
    assert_eq!(distinct.len(), COUNT, "nothing is lost");
    assert_eq!(seen.len(), COUNT, "every handover drained in time: nothing is delivered twice");
    let mut last: HashMap<&str, i64> = HashMap::new();
    for (key, number) in seen.iter() {
        assert!(last.insert(key, *number).is_none_or(|before| before < *number), "{key}: in order over members");
    }
    assert_eq!(read(&broker, "out").await.len(), COUNT);
}

/// A crash while one slow record holds the watermark back: what commits recorded above it is not delivered again.
#[tokio::test(start_paused = true)]
async fn after_a_crash_only_what_no_commit_recorded_is_delivered_again() {
    const COUNT: i64 = 500;
    const ROUTE: &str = "  - { name: work, service: worker, deliver: stream, from: [in], to: void, order: none, concurrency: 8 }";
    let broker = broker();
    let topic = NewTopic { name: "in".to_owned(), partitions: Some(1), ..NewTopic::default() };
    broker.admin().create_topics(vec![topic]).await.unwrap();
    let mesh = Mesh::on(broker.clone(), ROUTE);
    mesh.publish("in", numbered(COUNT as usize)).await;
    let desk = mesh.desk("work").await;
    let mut slow = None;
    for _ in 1..COUNT {
        while slow.is_none() {
            slow = desk.take(1, Duration::from_secs(1)).await.unwrap().pop();
        }
        for delivery in desk.take(1, Duration::from_secs(1)).await.unwrap() {
            desk.answer(vec![Answer { id: delivery.id, outcome: Outcome::Ignore }]);
        }
    }
    mesh.ended("work", COUNT as u64 - 1).await;
    let partition = TopicPartition::new("in", 0);
    loop {
        let committed = broker.admin().committed("test.work", vec![partition.clone()]).await.unwrap().remove(0).unwrap();
        assert_eq!(committed.offset, 0);
        if crate::completed::decode(0, &committed.metadata).is_some_and(|ranges| ranges.iter().eq([&(1..COUNT)])) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    mesh.running.abort();
    drop((desk, mesh.running.await));

    let mesh = Mesh::on(broker.clone(), ROUTE);
    let desk = mesh.desk("work").await;
    let again = desk.take(8, Duration::from_secs(60)).await.unwrap();
    assert_eq!(again.iter().map(|delivery| delivery.position.offset).collect::<Vec<_>>(), [0]);
    desk.answer(vec![Answer { id: again[0].id, outcome: Outcome::Ignore }]);
    assert_eq!(mesh.ended("work", 1).await, BTreeMap::from([(Disposition::Ignored, 1)]));
    mesh.stop.cancel();
    mesh.running.await.unwrap();
    let committed = broker.admin().committed("test.work", vec![partition]).await.unwrap().remove(0).unwrap();
    assert_eq!((committed.offset, committed.metadata.as_str()), (COUNT, ""));
}

/// A changed route is swapped in place: what is out keeps its destination, what follows takes the new one, nothing is lost or repeated.
#[tokio::test(start_paused = true)]
async fn a_table_is_swapped_under_load() {
    const COUNT: usize = 600;
    let mesh = Mesh::on(broker(), "  - { name: work, service: worker, deliver: stream, from: [in], to: [old], concurrency: 8 }");
    mesh.publish("in", numbered(COUNT)).await;
    let desk = mesh.desk("work").await;
    let held = desk.take(8, Duration::from_secs(1)).await.unwrap();
    mesh.table.send_replace(active("  - { name: work, service: worker, deliver: stream, from: [in], to: [new], concurrency: 4 }"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(Arc::ptr_eq(&desk, &mesh.desk("work").await), "the loop goes on");
    let out_before = held.len();
    let answers = held.into_iter().map(|delivery| Answer { id: delivery.id, outcome: reply(200, "x") }).collect();
    assert_eq!(desk.answer(answers), vec![Heard::Taken; out_before]);
    let service = tokio::spawn(async move {
        while let Some(taken) = desk.take(100, Duration::from_secs(1)).await {
            assert!(taken.len() <= 4, "the new concurrency");
            desk.answer(taken.into_iter().map(|delivery| Answer { id: delivery.id, outcome: reply(200, "x") }).collect());
        }
    });
    mesh.ended("work", COUNT as u64).await;
    let broker = mesh.broker.clone();
    mesh.end().await;
    service.await.unwrap();
    assert_eq!((read(&broker, "old").await.len(), read(&broker, "new").await.len()), (out_before, COUNT - out_before));
}

/// Whatever else a table changes, a route that is the same goes on with the consumer that it has: there is no rebalance.
#[tokio::test(start_paused = true)]
async fn a_route_that_did_not_change_keeps_its_consumer() {
    let with = |others: &str| format!("  - {{ name: work, service: worker, deliver: stream, from: [in], to: [out] }}\n{others}");
    let mesh = Mesh::on(broker(), &with(""));
    mesh.publish("in", numbered(10)).await;
    let desk = mesh.desk("work").await;
    assert_eq!(desk.take(10, Duration::from_secs(1)).await.map(|taken| taken.len()), Some(10));
    let rebalances = mesh.metrics.route(&"work".into(), &"worker".into()).rebalances.clone();
    let before = rebalances.get();
    assert!(before > 0, "its partitions were assigned once");
    for others in [
        "  - { name: other, service: worker, deliver: stream, from: [in], to: void }",
        "  - { name: other, service: worker, deliver: stream, from: [in], to: void, timeout: 7s }",
        "  - { name: theirs, service: elsewhere, deliver: stream, from: [in], to: void }",
        // Said as it is by default.
        "  - { name: other, service: worker, deliver: stream, from: [other], to: void, timeout: 10s }",
        "",
    ] {
        mesh.table.send_replace(active(&with(others)));
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(Arc::ptr_eq(&desk, &mesh.desk("work").await), "the loop goes on: {others}");
        assert_eq!(rebalances.get(), before, "{others}");
    }
    mesh.end().await;
}

/// A service that is away costs no attempt, however long; status names it.
#[tokio::test(start_paused = true)]
async fn a_service_that_is_away_costs_no_attempt() {
    let mesh = Mesh::on(
        broker(),
        "  - { name: work, service: worker, deliver: stream, from: [in], to: void, retry: { attempts: 1 }, timeout: 1s }",
    );
    mesh.publish("in", numbered(50)).await;
    let desk = mesh.desk("work").await;
    // Nobody is attached.
    tokio::time::sleep(Duration::from_secs(600)).await;
    let status = mesh.board.routes().remove(0);
    assert_eq!(status.state, RouteState::WaitingForService);
    assert!(status.reason.contains("service worker is not attached"), "{}", status.reason);
    assert!(status.dispositions.is_empty() && status.waiting_since_ms > 0);
    // Somebody is, and says that nobody is there (as a push does): still no attempt is counted.
    let _attached = desk.attach();
    for _ in 0..50 {
        for delivery in desk.take(100, Duration::from_secs(5)).await.unwrap() {
            assert_eq!(delivery.attempt, 1);
            desk.answer(vec![Answer {
                id: delivery.id,
                outcome: Outcome::NoService { reason: "connection refused".to_owned(), after: None },
            }]);
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = mesh.board.routes().remove(0);
    assert!(status.reason.contains("service worker is not there: connection refused"), "{status:?}");
    let service = tokio::spawn(async move {
        while let Some(taken) = desk.take(100, Duration::from_secs(1)).await {
            desk.answer(taken.into_iter().map(|delivery| Answer { id: delivery.id, outcome: Outcome::Ignore }).collect());
        }
    });
    assert_eq!(mesh.ended("work", 50).await, BTreeMap::from([(Disposition::Ignored, 50)]));
    mesh.end().await;
    service.await.unwrap();
}

/// A delivery that nobody answers counts an attempt when its lease ends; a late answer is told so.
#[tokio::test(start_paused = true)]
async fn a_lease_ends_and_its_late_answer_is_refused() {
    let mesh = Mesh::on(
        broker(),
        "  - { name: work, service: worker, deliver: pull, from: [in], to: void, timeout: 1s, retry: { attempts: 2, initial: 10ms } }",
    );
    mesh.publish("in", [("k".to_owned(), "v".to_owned())]).await;
    let desk = mesh.desk("work").await;
    let first = desk.take(1, Duration::from_secs(1)).await.unwrap().remove(0);
    let second = desk.take(1, Duration::from_secs(5)).await.unwrap().remove(0);
    assert_eq!((first.attempt, second.attempt), (1, 2));
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(desk.answer(vec![Answer { id: second.id, outcome: Outcome::Ignore }]), [Heard::Late]);
    assert_eq!(mesh.ended("work", 1).await, BTreeMap::from([(Disposition::DeadLettered, 1)]));
    let broker = mesh.broker.clone();
    mesh.end().await;
    let dead = read(&broker, "work.dlq").await;
    assert_eq!(dead[0].header_str("mesh-dlq-detail"), Some("no answer within 1s"));
}

/// Filters and hops decide before the service is called; an expression that fails is a dead letter.
#[tokio::test(start_paused = true)]
async fn filters_and_hops_decide_before_a_call() {
    let mesh = Mesh::on(
        broker(),
        "  - { name: work, service: worker, deliver: stream, from: [in], to: void, filter: 'record.json.go == true', max_hops: 3 }",
    );
    let values = ["{\"go\":true}", "{\"go\":false}", "not json", "{}"];
    mesh.publish("in", values.iter().map(|value| ("k".to_owned(), (*value).to_owned()))).await;
    let far =
        Record { value: Some("{\"go\":true}".into()), headers: vec![crate::record::Header::new("mesh-hops", "3")], ..Record::default() };
    mesh.broker.producer().send(vec![Outgoing { topic: "in".into(), partition: None, record: far }]).await.remove(0).unwrap();
    let desk = mesh.desk("work").await;
    let taken = desk.take(10, Duration::from_secs(1)).await.unwrap();
    assert_eq!(taken.len(), 1);
    desk.answer(vec![Answer { id: taken[0].id, outcome: reply(200, "x") }]);
    let ends = mesh.ended("work", 5).await;
    assert_eq!(ends, BTreeMap::from([(Disposition::Void, 1), (Disposition::Filtered, 1), (Disposition::DeadLettered, 3)]));
    let broker = mesh.broker.clone();
    mesh.end().await;
    let mut reasons: Vec<String> = read(&broker, "work.dlq").await.iter().map(|record| text(record.header("mesh-dlq-reason"))).collect();
    reasons.sort();
    assert_eq!(reasons, ["expression", "expression", "hops"]);
}

/// A partition that is reset waits for what is at the service, is committed without metadata, and goes on from there; others go on all the
/// while. One that takes too long goes on where it was.
#[tokio::test(start_paused = true)]
async fn a_reset_waits_for_the_service_and_moves_one_partition_alone() {
    use crate::command::Reset;
    const ROUTE: &str = "  - { name: work, service: worker, deliver: stream, from: [in], to: void, order: none, concurrency: 100 }";
    let broker = broker();
    let topic = NewTopic { name: "in".to_owned(), partitions: Some(2), ..NewTopic::default() };
    broker.admin().create_topics(vec![topic]).await.unwrap();
    let mesh = Mesh::on(broker.clone(), ROUTE);
    let records = (0..20).map(|n| Outgoing {
        topic: "in".into(),
        partition: Some(n % 2),
        record: Record { value: Some(n.to_string().into()), ..Record::default() },
    });
    for ack in broker.producer().send(records.collect()).await {
        ack.unwrap();
    }
    let desk = mesh.desk("work").await;
    let (one, other) = (TopicPartition::new("in", 0), TopicPartition::new("in", 1));
    let take = async |count: usize| {
        let mut taken = Vec::new();
        while taken.len() < count {
            taken.extend(desk.take(100, Duration::from_secs(1)).await.unwrap());
        }
        taken
    };
    let ignore = |deliveries: &[&Delivery]| desk.answer(deliveries.iter().map(|d| Answer { id: d.id, outcome: Outcome::Ignore }).collect());
    let of = |deliveries: &[Delivery], partition: &TopicPartition| {
        deliveries
            .iter()
            .filter(|delivery| delivery.position.partition == *partition)
            .map(|delivery| delivery.position.offset)
            .collect::<Vec<_>>()
    };

    // Nine of one partition are done, the first hangs at the service: it takes too long, and all goes on as it was.
    let taken = take(20).await;
    let first = taken.iter().find(|delivery| delivery.position == crate::record::Position { partition: one.clone(), offset: 0 }).unwrap();
    ignore(&taken.iter().filter(|delivery| delivery.position != first.position).collect::<Vec<_>>());
    mesh.ended("work", 19).await;
    let answered = mesh.ask.reset("work", vec![(one.clone(), 5)], Duration::from_secs(3)).await;
    assert!(
        matches!(&answered[..], [(partition, Reset::Failed(why))] if *partition == one && why.contains("1 of its records")),
        "{answered:?}"
    );
    let again = take(1).await;
    assert_eq!((of(&again, &one), of(&again, &other)), (vec![0], vec![]), "what was complete above the watermark stays so");
    ignore(&[first]);

    // With the answer in time it is reset, and nothing else is delivered.
    let answer = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        ignore(&[&again[0]]);
    };
    let (answered, ()) =
        tokio::join!(mesh.ask.reset("work", vec![(one.clone(), 7), (TopicPartition::new("no", 0), 0)], Duration::from_secs(3)), answer);
    assert!(answered.contains(&(one.clone(), Reset::Done { from: 10 })), "{answered:?}");
    assert!(answered.contains(&(TopicPartition::new("no", 0), Reset::NotOwner)), "{answered:?}");
    let committed = broker.admin().committed("test.work", vec![one.clone()]).await.unwrap().remove(0).unwrap();
    assert_eq!((committed.offset, committed.metadata.as_str()), (7, ""));
    let again = take(3).await;
    assert_eq!((of(&again, &one), of(&again, &other)), (vec![7, 8, 9], vec![]));
    ignore(&again.iter().collect::<Vec<_>>());
    mesh.ended("work", 23).await;

    assert_eq!(mesh.ask.reset("none", vec![(one.clone(), 0)], Duration::from_secs(3)).await, [(one.clone(), Reset::NotOwner)]);
    let ask = mesh.ask.clone();
    mesh.end().await;
    assert_eq!(ask.reset("work", vec![(one.clone(), 0)], Duration::from_secs(3)).await, [(one.clone(), Reset::NotOwner)]);
    let committed = broker.admin().committed("test.work", vec![one, other]).await.unwrap();
    assert!(committed.iter().flatten().all(|commit| commit.offset == 10), "{committed:?}");
}

const EXACTLY_ONCE: &str =
    "  - { name: work, service: worker, deliver: stream, from: [in], to: [out], concurrency: 16, guarantee: exactly_once }";

/// Answers every delivery of a desk with its value; of three kinds of records one forwards nothing.
fn serve(desk: Arc<crate::deliver::desk::Desk>) -> JoinHandle<()> {
    tokio::spawn(async move {
        while let Some(deliveries) = desk.take(16, Duration::from_secs(3600)).await {
            let answer = |delivery: Delivery| {
                let value = text(delivery.record.value.as_ref());
                let outcome = if value.ends_with('7') { Outcome::Ignore } else { reply(200, value) };
                Answer { id: delivery.id, outcome }
            };
            desk.answer(deliveries.into_iter().map(answer).collect());
        }
    })
}

/// Crashes at any moment: what is stored of the answers is stored once, and what is not is answered again.
#[tokio::test(start_paused = true)]
async fn exactly_once_survives_crashes_at_any_moment() {
    const COUNT: usize = 3_000;
    let broker = broker();
    let publisher = Mesh::on(broker.clone(), EXACTLY_ONCE);
    publisher.publish("in", numbered(COUNT)).await;
    publisher.end().await;
    for crash in 0..40u64 {
        let mesh = Mesh::on(broker.clone(), EXACTLY_ONCE);
        let desk = mesh.desk("work").await;
        let serving = serve(desk);
        tokio::time::sleep(Duration::from_millis(1 + crash * 7 % 23)).await;
        mesh.running.abort();
        serving.abort();
        drop((mesh.running.await, serving.await));
    }
    let mesh = Mesh::on(broker.clone(), EXACTLY_ONCE);
    let serving = serve(mesh.desk("work").await);
    while mesh.board.routes().iter().all(|route| route.lag_records > 0 || route.lag_measured_ms == 0) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    mesh.end().await;
    serving.abort();
    let mut seen: Vec<String> = read(&broker, "out").await.iter().map(|record| text(record.value.as_ref())).collect();
    seen.sort();
    let mut should: Vec<String> = numbered(COUNT).map(|(_, value)| value).filter(|value| !value.ends_with('7')).collect();
    should.sort();
    assert_eq!(seen.len(), should.len());
    assert!(seen == should);
}

/// The broker deletes records before they are processed: the route counts them and goes on, or stands still until somebody decides.
#[tokio::test(start_paused = true)]
async fn a_paused_route_delivers_nothing_and_finishes_what_is_out() {
    let mesh = Mesh::on(broker(), "  - { name: work, service: worker, deliver: stream, from: [in], to: void, concurrency: 4 }");
    let (desk, none) = (mesh.desk("work").await, Duration::from_secs(30));
    let state = async |wanted: RouteState| loop {
        match mesh.board.routes().pop() {
            Some(status) if status.state == wanted => return status,
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let ignored = |taken: Vec<Delivery>| taken.into_iter().map(|delivery| Answer { id: delivery.id, outcome: Outcome::Ignore }).collect();
    mesh.publish("in", (0..10).map(|n| (format!("k{n}"), n.to_string()))).await;
    let out = desk.take(2, none).await.unwrap();
    assert!(!out.is_empty());
    let pause = Pause { by: "ann".to_owned(), since_ms: 0, reason: "migration".to_owned() };
    mesh.pause.send_replace(Arc::new(Pauses::from([("work".to_owned(), pause)])));
    let paused = state(RouteState::Paused).await;
    assert_eq!(paused.reason, "paused by ann: migration; `mesh-ctl resume work` lets it go on");
    // What was handed to the desk before may be fetched; nothing is after it.
    let mut seen = out.len() as u64;
    desk.answer(ignored(out));
    loop {
        let taken = desk.take(100, none).await.unwrap();
        if taken.is_empty() {
            break;
        }
        seen += taken.len() as u64;
        desk.answer(ignored(taken));
    }
    assert!(seen < 10, "{seen} of 10 were delivered");
    mesh.ended("work", seen).await;
    assert_eq!(state(RouteState::Paused).await.in_flight, 0);
    mesh.pause.send_replace(Arc::default());
    while seen < 10 {
        let taken = desk.take(100, none).await.unwrap();
        assert!(!taken.is_empty(), "the route does not go on");
        seen += taken.len() as u64;
        desk.answer(ignored(taken));
    }
    assert_eq!(mesh.ended("work", 10).await, BTreeMap::from([(Disposition::Ignored, 10)]));
    state(RouteState::Running).await;
    mesh.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_gap_is_counted_by_range_and_stops_the_partition_if_the_route_says_so() {
    let route = |on_gap: &str| format!("  - {{ name: work, service: worker, deliver: stream, from: [in], to: void, on_gap: {on_gap} }}");
    let answer = async |mesh: &Mesh, count: usize| {
        let (desk, mut left) = (mesh.desk("work").await, count);
        while left > 0 {
            let taken = desk.take(100, Duration::from_secs(1)).await.unwrap();
            left -= taken.len();
            desk.answer(taken.into_iter().map(|delivery| Answer { id: delivery.id, outcome: Outcome::Ignore }).collect());
        }
    };
    for reset in [false, true] {
        let broker = broker();
        let topic = NewTopic { name: "in".to_owned(), partitions: Some(1), ..NewTopic::default() };
        broker.admin().create_topics(vec![topic]).await.unwrap();
        let mesh = Mesh::on(broker.clone(), &route("stop"));
        mesh.publish("in", numbered(10)).await;
        answer(&mesh, 10).await;
        mesh.ended("work", 10).await;
        mesh.end().await;
        // Nobody reads, 25 records come, and 20 are deleted.
        let gone = Mesh::on(broker.clone(), "  - { name: other, service: worker, deliver: stream, from: [else], to: void }");
        gone.publish("in", numbered(25)).await;
        gone.end().await;
        let partition = TopicPartition::new("in", 0);
        broker.admin().delete_records(vec![(partition.clone(), 30)]).await.unwrap();

        let mesh = Mesh::on(broker.clone(), &route("stop"));
        let state = async |wanted: RouteState| loop {
            match mesh.board.routes().pop() {
                Some(status) if status.state == wanted && status.partitions == 1 => return status,
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        let stopped = state(RouteState::Stopped).await;
        assert!(stopped.reason.contains("in/0") && stopped.reason.contains("offsets 10 to 29"), "{}", stopped.reason);
        let desk = mesh.desk("work").await;
        assert_eq!(desk.take(1, Duration::from_secs(5)).await.unwrap().len(), 0, "it stands still");
        assert_eq!(mesh.ended("work", 0).await, BTreeMap::new());
        let mut wanted = BTreeMap::from([(Disposition::Ignored, 5)]);
        if reset {
            // Somebody decided: what is gone is passed over on purpose.
            mesh.ask.reset("work", vec![(partition, 30)], Duration::from_secs(3)).await;
            answer(&mesh, 5).await;
            assert_eq!(mesh.ended("work", 5).await, wanted);
            assert_eq!(state(RouteState::Running).await.reason, "");
        } else {
            // Told to go on by a change of the table, without a restart.
            mesh.table.send_replace(active(&route("earliest")));
            answer(&mesh, 5).await;
            wanted.insert(Disposition::Expired, 20);
            assert_eq!(mesh.ended("work", 25).await, wanted);
            let running = state(RouteState::Running).await;
            assert!(running.reason.contains("deleted 20 records of in/0"), "{}", running.reason);
        }
        mesh.end().await;
    }
}

/// A consumer that leaves while it joins keeps its group waiting: a route that just began is not started anew before it had time to join, and then for the
/// last of the tables that came meanwhile.
#[tokio::test(start_paused = true)]
async fn tables_that_follow_each_other_closely_start_a_route_anew_once() {
    let of = |order: &str| active(&format!("  - {{ name: work, service: worker, deliver: stream, from: [in], to: void, order: {order} }}"));
    let fake = Fake::new(&["in"]);
    let (table, watch) = watch::channel(of("key"));
    let ((_ask, commands), (_pause, paused)) = (crate::command::channel(), watch::channel(Arc::default()));
    let context = Context {
        config: Arc::new(config()),
        broker: Arc::new(fake.clone()),
        board: Board::default(),
        desks: Desks::default(),
        metrics: Metrics::new(),
        tracer: Tracer::disabled(),
        paused,
    };
    let stop = CancellationToken::new();
    let running = tokio::spawn(Supervisor::new(context, watch, commands).run(stop.clone()));
    let consumers = async |after: Duration| {
        tokio::time::sleep(after).await;
        fake.0.lock().unwrap().consumers.len()
    };
    assert_eq!(consumers(SETTLE / 5).await, 1);
    for order in ["partition", "key", "none"] {
        table.send_replace(of(order));
        assert_eq!(consumers(SETTLE / 5).await, 1, "{order}");
    }
    assert_eq!(consumers(2 * SETTLE).await, 2, "once for all of them");
    table.send_replace(of("partition"));
    assert_eq!(consumers(SETTLE / 5).await, 3, "it has run for a while: at once");
    // There and back: nothing is to be done any more.
    for order in ["key", "partition"] {
        table.send_replace(of(order));
        assert_eq!(consumers(SETTLE / 5).await, 3, "{order}");
    }
    assert_eq!(consumers(2 * SETTLE).await, 3);
    stop.cancel();
    running.await.unwrap();
}
