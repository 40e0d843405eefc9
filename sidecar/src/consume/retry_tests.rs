//! Retry and park topics on the embedded broker in memory, with a paused clock.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use tokio::time::Instant;

use super::{
    tests::{Mesh, active, broker, read, reply, text},
    *,
};
use crate::{
    broker::{NewTopic, Outgoing, embedded::EmbeddedBroker},
    command::{Released, Reset},
    outcome::{Answer, Delivery, Disposition, Outcome},
    parking::Release,
    record::{Header, Record, TopicPartition},
};

/// Creates what the routes need, with so many partitions.
async fn topics(broker: &EmbeddedBroker, routes: &str, partitions: i32) {
    let table = active(routes).unwrap();
    let new = table.compiled.topics.iter().map(|topic| NewTopic {
        name: topic.name.to_string(),
        partitions: Some(partitions),
        ..NewTopic::default()
    });
    broker.admin().create_topics(new.collect()).await.unwrap();
}

fn number(delivery: &Delivery) -> usize {
    text(delivery.record.value.as_ref()).parse().unwrap()
}

/// A generator that a seed decides.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

fn records(count: usize, keys: usize) -> impl Iterator<Item = (String, String)> {
    (0..count).map(move |n| (format!("k{}", n % keys), format!("{n}")))
}

fn failed() -> Outcome {
    Outcome::Retry { reason: "not yet".to_owned(), after: None }
}

/// Waits until nothing is left to do: everything has its end.
async fn settled(mesh: &Mesh, route: &str) {
    let deadline = Instant::now() + Duration::from_secs(3600);
    loop {
        let status = mesh.board.routes().into_iter().find(|status| *status.route == *route);
        if let Some(status) = &status
            && status.lag_records == 0
            && status.lag_measured_ms > 0
            && status.parked_records == 0
            && status.waiting_keys == 0
            && status.next_retry_ms == 0
            && status.in_flight == 0
        {
            return;
        }
        assert!(Instant::now() < deadline, "{status:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What a service saw of each record.
#[derive(Default)]
struct Ledger {
    /// Attempts that were seen, in order.
    attempts: HashMap<usize, Vec<u32>>,
    /// By key: the records in the order in which they had their last word, the first time.
    ended: BTreeMap<usize, Vec<usize>>,
}

impl Ledger {
    /// A delivery: the records of a key before it have had their last word.
    fn delivered(&mut self, number: usize, attempt: u32, keys: usize, in_order: bool) {
        let first = !self.attempts.contains_key(&number);
        if first && in_order && number >= keys {
            let before = number - keys;
            assert!(self.ended.get(&(number % keys)).is_some_and(|ended| ended.contains(&before)), "{number} overtakes {before}");
        }
        self.attempts.entry(number).or_default().push(attempt);
    }

    fn ended(&mut self, number: usize, keys: usize) {
        let ended = self.ended.entry(number % keys).or_default();
        if !ended.contains(&number) {
            ended.push(number);
        }
    }
}

/// Random failures, and crashes at any point: of a key, no record is delivered before the one before it has had its last word; the attempts of a
/// record go on where they were; every record has its end; other keys are not held up.
async fn no_reorder_per_key(seed: u64, order: &str, guarantee: &str) {
    const COUNT: usize = 240;
    const KEYS: usize = 12;
    const ATTEMPTS: u32 = 2;
    let began = Instant::now();
    let mut dice = Dice(seed);
    for _ in 0..8 {
        dice.roll(2);
    }
    let routes = format!(
        "  - {{ name: work, service: worker, deliver: stream, from: [in], to: [out], concurrency: 8, order: {order}, guarantee: {guarantee},
               retry: {{ attempts: {ATTEMPTS}, initial: 10ms, topics: [1s, 5s] }}, breaker: {{ failures: 1000 }} }}"
    );
    let broker = broker();
    topics(&broker, &routes, 2).await;
    // How often a record fails: mostly never; 9 is for ever.
    let fails: Vec<u32> = (0..COUNT).map(|_| [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 9][dice.roll(11) as usize]).collect();
    let in_order = order == "key";
    let mut ledger = Ledger::default();
    let mut mesh = Mesh::on(broker.clone(), &routes);
    mesh.publish("in", records(COUNT, KEYS)).await;
    let mut desk = mesh.desk("work").await;
    let mut crashes = 3;
    let mut held: Vec<Delivery> = Vec::new();
    let mut unanswered = HashSet::new();
    let mut quiet = 0;
    let deadline = Instant::now() + Duration::from_secs(3600);
    while quiet < 40 {
        assert!(Instant::now() < deadline, "{:#?}", mesh.board.routes());
        let taken = desk.take(8, Duration::from_millis(300)).await.unwrap_or_default();
        quiet = if taken.is_empty() && held.is_empty() { quiet + 1 } else { 0 };
        for delivery in taken {
            ledger.delivered(number(&delivery), delivery.attempt, KEYS, in_order);
            held.push(delivery);
        }
        if held.is_empty() {
            continue;
        }
        let delivery = held.swap_remove(dice.roll(held.len() as u64) as usize);
        let record = number(&delivery);
        assert!(delivery.position.partition.topic.as_ref() == "in", "the origin is what a service sees: {}", delivery.position);
        let outcome = if fails[record] >= delivery.attempt { failed() } else { reply(200, record.to_string()) };
        if fails[record] < delivery.attempt || delivery.attempt == ATTEMPTS + 2 {
            ledger.ended(record, KEYS);
        }
        desk.answer(vec![Answer { id: delivery.id, outcome }]);
        if crashes > 0 && dice.roll(60) == 0 {
            crashes -= 1;
            if dice.roll(2) == 0 {
                mesh.running.abort();
                drop(mesh.running.await);
            } else {
                mesh.stop.cancel();
                mesh.running.await.unwrap();
            }
            // What the service had is not answered: that counts as an attempt, if anybody was there to count it.
            for delivery in held.drain(..) {
                unanswered.insert(number(&delivery));
                if delivery.attempt == ATTEMPTS + 2 {
                    ledger.ended(number(&delivery), KEYS);
                }
            }
            mesh = Mesh::on(broker.clone(), &routes);
            desk = mesh.desk("work").await;
        }
    }
    settled(&mesh, "work").await;
    mesh.end().await;
    for (record, fails) in fails.iter().enumerate() {
        let attempts = ledger.attempts.get(&record).unwrap_or_else(|| panic!("{record} was never delivered"));
        let (most, wanted) = (*attempts.iter().max().unwrap(), (fails + 1).min(ATTEMPTS + 2));
        let more = unanswered.contains(&record) && most > wanted;
        assert!(most == wanted || more, "{record}, which fails {fails} times: {attempts:?}");
        // Beyond the attempts in place the count is in the record: it never goes back.
        let beyond = attempts.iter().position(|attempt| *attempt > ATTEMPTS).unwrap_or(attempts.len());
        assert!(attempts[beyond..].is_sorted(), "{record}: {attempts:?}");
    }
    let dead: BTreeSet<usize> = read(&broker, "work.dlq").await.iter().map(|record| text(record.value.as_ref()).parse().unwrap()).collect();
    let never: BTreeSet<usize> = (0..COUNT).filter(|record| fails[*record] == 9).collect();
    assert!(dead.is_superset(&never) && dead.difference(&never).all(|record| unanswered.contains(record)), "{dead:?} instead of {never:?}");
    let forwarded: BTreeSet<usize> = read(&broker, "out").await.iter().map(|record| text(record.value.as_ref()).parse().unwrap()).collect();
    assert_eq!(forwarded.union(&dead).count(), COUNT);
    if guarantee == "exactly_once" {
        assert_eq!(read(&broker, "out").await.len() + read(&broker, "work.dlq").await.len(), COUNT, "each is stored once");
    }
    println!("{:?} for {} deliveries", began.elapsed(), ledger.attempts.values().map(Vec::len).sum::<usize>());
}

#[tokio::test(start_paused = true)]
async fn no_reorder_per_key_with_failures_and_crashes_at_any_point() {
    for seed in 0..12 {
        println!("seed {seed}");
        no_reorder_per_key(seed, "key", "at_least_once").await;
    }
}

#[tokio::test(start_paused = true)]
async fn with_exactly_once_each_is_stored_once_over_retry_topics_and_crashes() {
    for (seed, order) in [(300, "key"), (301, "key"), (302, "key"), (303, "key"), (304, "partition"), (305, "none"), (306, "none")] {
        println!("seed {seed}");
        no_reorder_per_key(seed, order, "exactly_once").await;
    }
}

#[tokio::test(start_paused = true)]
async fn without_an_order_nothing_waits_and_nothing_is_lost() {
    for seed in 100..106 {
        println!("seed {seed}");
        no_reorder_per_key(seed, "none", "at_least_once").await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_whole_partition_is_one_lane() {
    for seed in 200..206 {
        println!("seed {seed}");
        no_reorder_per_key(seed, "partition", "at_least_once").await;
    }
}

/// A mesh with one partition, on the table that these fields make.
async fn one(fields: &str) -> (Mesh, String) {
    let routes = format!("  - {{ name: work, service: worker, deliver: stream, from: [in], to: [out], {fields} }}");
    let broker = broker();
    topics(&broker, &routes, 1).await;
    (Mesh::on(broker, &routes), routes)
}

/// Takes deliveries and answers them until nothing came for a while; gives value and attempt of each, in order.
async fn serve(mesh: &Mesh, outcome: impl Fn(&Delivery) -> Outcome) -> Vec<(usize, u32)> {
    let desk = mesh.desk("work").await;
    let (mut seen, mut quiet) = (Vec::new(), 0);
    while quiet < 30 {
        let taken = desk.take(1, Duration::from_secs(1)).await.unwrap_or_default();
        quiet = if taken.is_empty() { quiet + 1 } else { 0 };
        for delivery in taken {
            seen.push((number(&delivery), delivery.attempt));
            let outcome = outcome(&delivery);
            desk.answer(vec![Answer { id: delivery.id, outcome }]);
        }
    }
    seen
}

fn status(mesh: &Mesh) -> RouteStatus {
    mesh.board.routes().into_iter().find(|status| &*status.route == "work").unwrap()
}

fn only(poison: usize) -> impl Fn(&Delivery) -> Outcome {
    move |delivery| if number(delivery) == poison { failed() } else { reply(200, number(delivery).to_string()) }
}

#[tokio::test(start_paused = true)]
async fn what_is_parked_waits_for_somebody_over_restarts_and_its_key_with_it() {
    let (mesh, routes) = one("retry: { attempts: 2, initial: 10ms, topics: [1s] }, on_exhausted: park").await;
    mesh.publish("in", records(8, 2)).await;
    let seen = serve(&mesh, only(2)).await;
    assert_eq!(seen.iter().filter(|(n, _)| *n == 2).map(|(_, attempt)| *attempt).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(seen.iter().all(|(n, _)| n % 2 == 1 || *n <= 2), "the key waits: {seen:?}");
    let parked = status(&mesh);
    assert_eq!((parked.parked_records, parked.exhausted_records, parked.waiting_keys), (3, 1, 1));
    // Over a crash, and a restart.
    let broker = mesh.broker.clone();
    mesh.running.abort();
    drop(mesh.running.await);
    let mesh = Mesh::on(broker.clone(), &routes);
    mesh.publish("in", [("k0".to_owned(), "8".to_owned())]).await;
    assert_eq!(serve(&mesh, only(2)).await, []);
    assert_eq!(status(&mesh).parked_records, 4);
    assert_eq!(mesh.ask.release("work", Some(Some("k1".into())), Release::Retry, Vec::new()).await.records, 0);
    // Who asks again for what other instances own asks nothing of this partition.
    let elsewhere = mesh.ask.release("work", None, Release::Retry, vec![TopicPartition::new("in", 1)]).await;
    assert_eq!(elsewhere, Released::default());
    let here = mesh.ask.release("work", Some(Some("k0".into())), Release::Retry, vec![TopicPartition::new("in", 0)]).await;
    assert_eq!((here.records, here.partitions), (1, vec![TopicPartition::new("in", 0)]));
    let seen = serve(&mesh, only(99)).await;
    assert_eq!(seen, [(2, 1), (4, 1), (6, 1), (8, 1)], "released, in order, from the first attempt on");
    settled(&mesh, "work").await;
    // Discarded.
    mesh.publish("in", [("k0".to_owned(), "2".to_owned()), ("k0".to_owned(), "10".to_owned())]).await;
    assert_eq!(serve(&mesh, only(2)).await.len(), 3);
    assert_eq!(mesh.ask.release("work", None, Release::Discard, Vec::new()).await.records, 1);
    assert_eq!(serve(&mesh, only(2)).await, [(10, 1)]);
    settled(&mesh, "work").await;
    let dead = read(&broker, "work.dlq").await;
    assert_eq!((dead.len(), dead[0].header_str("mesh-dlq-attempts"), dead[0].header_str("mesh-dlq-topic")), (1, Some("3"), Some("in")));
    assert_eq!(dead[0].header("mesh-origin"), None);
    mesh.end().await;
}

/// Whoever lost the partition and does not know it yet, or has it by now while this one does not know it, parks a record that was not read here: the
/// one before it of its key may lie in a retry topic that was not read either.
#[tokio::test(start_paused = true)]
async fn what_another_owner_parked_waits_until_the_source_was_read_so_far() {
    let (mesh, _) = one("retry: { attempts: 1, topics: [1s] }").await;
    mesh.publish("in", records(2, 1)).await;
    let first = |delivery: &Delivery| if number(delivery) == 0 && delivery.attempt == 1 { failed() } else { reply(200, "") };
    assert_eq!(serve(&mesh, first).await, [(0, 1), (0, 2), (1, 1)], "1 was parked, so the park topic is read");
    let parked = Record {
        key: Some("k0".into()),
        value: Some("3".into()),
        headers: vec![Header::new("mesh-id", "3"), Header::new("mesh-origin", "in/0/3"), Header::new("mesh-attempt", "0")],
        timestamp_ms: None,
    };
    let acks = mesh.broker.producer().send(vec![Outgoing { topic: "work.in.park".into(), partition: Some(0), record: parked }]).await;
    assert!(acks[0].is_ok(), "{acks:?}");
    assert_eq!(serve(&mesh, only(99)).await, []);
    mesh.publish("in", [("k0".to_owned(), "2".to_owned()), ("k0".to_owned(), "3".to_owned())]).await;
    assert_eq!(serve(&mesh, only(99)).await, [(2, 1), (3, 1)]);
    settled(&mesh, "work").await;
    mesh.end().await;
}

/// All of a key's backlog has its turn at once when the record before it is done: of large records only as many are loaded as the route may hold.
#[tokio::test(start_paused = true)]
async fn parked_records_that_come_back_are_bounded_in_bytes_and_told() {
    const COUNT: usize = 100;
    const SIZE: usize = 500 << 10;
    let (mesh, _) = one("concurrency: 4, retry: { attempts: 1, topics: [1h] }").await;
    let held = mesh.metrics.route(&"work".into(), &"worker".into()).queue_bytes.clone();
    let large = |number: usize| ("k".to_owned(), "0".repeat(SIZE) + &number.to_string());
    mesh.publish("in", (0..COUNT).map(large)).await;
    let desk = mesh.desk("work").await;
    let first = desk.take(1, Duration::from_secs(60)).await.unwrap().remove(0);
    desk.answer(vec![Answer { id: first.id, outcome: failed() }]);
    while status(&mesh).parked_records < COUNT as u64 - 1 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (mut most, mut seen) = (0, Vec::new());
    while seen.len() < COUNT {
        let taken = desk.take(4, Duration::from_secs(1)).await.unwrap_or_default();
        // Longer than the board is posted anew, so that all that may be loaded is.
        tokio::time::sleep(Duration::from_secs(2)).await;
        most = held.get().max(most);
        for delivery in taken {
            seen.push((number(&delivery), delivery.attempt));
            desk.answer(vec![Answer { id: delivery.id, outcome: reply(204, "") }]);
        }
    }
    assert_eq!(seen, std::iter::once((0, 2)).chain((1..COUNT).map(|n| (n, 1))).collect::<Vec<_>>(), "each once, in order");
    let (mib, most) = (1 << 20, most as usize);
    assert!(most > 4 * mib && most < 17 * mib, "{most} bytes were in memory, of {}", COUNT * SIZE);
    settled(&mesh, "work").await;
    mesh.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_said_to_be_released_is_so_after_a_crash() {
    let (mesh, routes) = one("retry: { attempts: 1, topics: [1s] }, on_exhausted: park").await;
    mesh.publish("in", records(8, 2)).await;
    serve(&mesh, only(2)).await;
    assert_eq!(status(&mesh).exhausted_records, 1);
    assert_eq!(mesh.ask.release("work", None, Release::Retry, Vec::new()).await.records, 1);
    let broker = mesh.broker.clone();
    mesh.running.abort();
    drop(mesh.running.await);
    let mesh = Mesh::on(broker, &routes);
    assert_eq!(serve(&mesh, only(99)).await, [(2, 1), (4, 1), (6, 1)]);
    settled(&mesh, "work").await;
    mesh.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_table_that_parks_no_more_releases_what_is_parked() {
    let (mesh, routes) = one("retry: { attempts: 1 }, on_exhausted: park").await;
    mesh.publish("in", records(3, 1)).await;
    assert_eq!(serve(&mesh, only(0)).await, [(0, 1)]);
    mesh.table.send_replace(active(&routes.replace(", on_exhausted: park", "")));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(serve(&mesh, only(0)).await, [(0, 1), (1, 1), (2, 1)]);
    settled(&mesh, "work").await;
    assert_eq!(read(&mesh.broker, "work.dlq").await.len(), 1);
    mesh.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_partition_stops_at_an_exhausted_record_until_somebody_or_the_table_lets_it_go_on() {
    let (mesh, routes) = one("retry: { attempts: 2, initial: 10ms }, on_exhausted: stop, concurrency: 1").await;
    mesh.publish("in", records(6, 2)).await;
    let seen = serve(&mesh, only(2)).await;
    assert!(seen.starts_with(&[(0, 1), (1, 1), (2, 1)]) && seen.last() == Some(&(2, 2)), "{seen:?}");
    let stopped = status(&mesh);
    assert_eq!(stopped.state, RouteState::Stopped);
    assert!(stopped.reason.contains("in/0/2") && stopped.reason.contains("not yet"), "{}", stopped.reason);
    assert_eq!(mesh.ask.release("work", None, Release::Retry, Vec::new()).await.records, 1);
    assert_eq!(serve(&mesh, only(2)).await.iter().filter(|(n, _)| *n == 2).count(), 2, "from the first attempt on");
    mesh.table.send_replace(active(&routes.replace("attempts: 2", "attempts: 3")));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(serve(&mesh, only(2)).await.iter().filter(|(n, _)| *n == 2).count(), 3);
    assert_eq!(mesh.ask.release("work", None, Release::Discard, Vec::new()).await.records, 1);
    serve(&mesh, only(2)).await;
    settled(&mesh, "work").await;
    let ends = status(&mesh).dispositions;
    assert_eq!(ends, BTreeMap::from([(Disposition::Forwarded, 5), (Disposition::DeadLettered, 1)]));
    mesh.end().await;
}

/// A record that is at the service while its partition comes to stand still fails, too.
#[tokio::test(start_paused = true)]
async fn where_a_partition_stands_still_a_key_waits_for_its_record_in_a_retry_topic() {
    let (mesh, _) = one("retry: { attempts: 1, topics: [1s] }, on_exhausted: stop").await;
    mesh.publish("in", records(4, 2)).await;
    let desk = mesh.desk("work").await;
    let mut first = desk.take(2, Duration::from_secs(60)).await.unwrap();
    first.sort_by_key(number);
    let [poison, other]: [Delivery; 2] = first.try_into().unwrap();
    desk.answer(vec![Answer { id: poison.id, outcome: failed() }]);
    let again = desk.take(1, Duration::from_secs(60)).await.unwrap().remove(0);
    assert_eq!((number(&again), again.attempt), (0, 2));
    desk.answer(vec![Answer { id: again.id, outcome: failed() }]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(status(&mesh).state, RouteState::Stopped);
    desk.answer(vec![Answer { id: other.id, outcome: failed() }]);
    drop(desk);
    assert_eq!(serve(&mesh, only(99)).await, []);
    assert_eq!(mesh.ask.release("work", None, Release::Retry, Vec::new()).await.records, 1);
    let seen = serve(&mesh, only(99)).await;
    let of_key = |key: usize| seen.iter().copied().filter(|(n, _)| n % 2 == key).collect::<Vec<_>>();
    assert_eq!((of_key(0), of_key(1)), (vec![(0, 1), (2, 1)], vec![(1, 2), (3, 1)]), "{seen:?}");
    settled(&mesh, "work").await;
    mesh.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_reset_delivers_again_all_but_what_is_parked_and_what_is_parked_still_waits() {
    let (mesh, _) = one("retry: { attempts: 1, topics: [5s] }, on_exhausted: park").await;
    mesh.publish("in", records(8, 2)).await;
    serve(&mesh, only(2)).await;
    assert_eq!(status(&mesh).parked_records, 3, "2, and 4 and 6 behind it");
    let reset = mesh.ask.reset("work", vec![(TopicPartition::new("in", 0), 0)], Duration::from_secs(5)).await;
    assert!(matches!(reset[..], [(_, Reset::Done { from: 8 })]), "{reset:?}");
    let seen = serve(&mesh, only(2)).await;
    assert_eq!(seen.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from([(0, 1), (1, 1), (3, 1), (5, 1), (7, 1)]));
    assert_eq!((seen.len(), status(&mesh).parked_records), (5, 3), "{seen:?}");
    assert_eq!(mesh.ask.release("work", None, Release::Retry, Vec::new()).await.records, 1);
    assert_eq!(serve(&mesh, only(99)).await, [(2, 1), (4, 1), (6, 1)]);
    settled(&mesh, "work").await;
    // The same while records are in a retry topic, and their key waits behind them.
    mesh.publish("in", records(4, 1)).await;
    let desk = mesh.desk("work").await;
    let first = desk.take(1, Duration::from_secs(60)).await.unwrap().remove(0);
    desk.answer(vec![Answer { id: first.id, outcome: failed() }]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((status(&mesh).parked_records, status(&mesh).waiting_keys), (3, 1));
    let reset = mesh.ask.reset("work", vec![(TopicPartition::new("in", 0), 8)], Duration::from_secs(5)).await;
    assert!(matches!(reset[..], [(_, Reset::Done { from: 12 })]), "{reset:?}");
    drop(desk);
    assert_eq!(serve(&mesh, only(99)).await, [(0, 2), (1, 1), (2, 1), (3, 1)]);
    settled(&mesh, "work").await;
    mesh.end().await;
}

/// By retention, or by somebody's hand: what waits behind such a record must not wait for ever.
#[tokio::test(start_paused = true)]
async fn records_that_a_broker_deletes_from_a_retry_topic_hold_their_keys_up_no_longer() {
    // More than are in memory while they wait.
    const COUNT: usize = 3_000;
    for order in ["key", "none"] {
        let (mesh, _) =
            one(&format!("order: {order}, retry: {{ attempts: 1, topics: [1h] }}, breaker: {{ failures: 100000 }}, concurrency: 64")).await;
        mesh.publish("in", records(2 * COUNT, COUNT)).await;
        let outcome = |delivery: &Delivery| if number(delivery) < COUNT && delivery.attempt == 1 { failed() } else { reply(204, "") };
        let before = serve(&mesh, outcome).await;
        let followers = |seen: &[(usize, u32)]| seen.iter().filter(|(n, _)| *n >= COUNT).count();
        assert_eq!(followers(&before), if order == "key" { 0 } else { COUNT }, "{order}");
        let retry = TopicPartition::new("work.in.retry-1", 0);
        mesh.broker.admin().delete_records(vec![(retry, COUNT as i64)]).await.unwrap();
        tokio::time::sleep(Duration::from_secs(3_600)).await;
        let after = serve(&mesh, outcome).await;
        settled(&mesh, "work").await;
        let expired = status(&mesh).dispositions.get(&Disposition::Expired).copied().unwrap_or_default() as usize;
        let retried = after.iter().filter(|(n, _)| *n < COUNT).count();
        assert!(expired > 0 && retried + expired == COUNT, "{order}: {retried} were tried again, {expired} are gone");
        assert_eq!(followers(&before) + followers(&after), COUNT, "{order}: each once");
        mesh.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_removed_retry_topic_is_drained() {
    let (mesh, routes) = one("retry: { attempts: 1, topics: [10s, 1h] }").await;
    mesh.publish("in", records(4, 4)).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    let desk = mesh.desk("work").await;
    while Instant::now() < deadline {
        for delivery in desk.take(4, Duration::from_secs(1)).await.unwrap() {
            desk.answer(vec![Answer { id: delivery.id, outcome: failed() }]);
        }
    }
    assert!(status(&mesh).next_retry_ms > 0, "all wait in the second one");
    mesh.table.send_replace(active(&routes.replace(", topics: [10s, 1h]", "")));
    tokio::time::sleep(Duration::from_secs(3_500)).await;
    let seen = serve(&mesh, only(99)).await;
    assert_eq!(seen, []);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let seen = serve(&mesh, only(99)).await;
    assert_eq!(seen.iter().map(|(_, attempt)| *attempt).collect::<Vec<_>>(), [3; 4], "{seen:?}");
    settled(&mesh, "work").await;
    mesh.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_cannot_drain_a_topic_into_its_dlq() {
    const COUNT: usize = 500;
    let (mesh, _) = one("order: none, retry: { attempts: 2, initial: 10ms, topics: [100ms] }, breaker: { failures: 20, open: 1s }").await;
    mesh.publish("in", records(COUNT, COUNT)).await;
    let outage = Instant::now() + Duration::from_secs(600);
    let desk = mesh.desk("work").await;
    while Instant::now() < outage {
        for delivery in desk.take(8, Duration::from_secs(1)).await.unwrap() {
            desk.answer(vec![Answer { id: delivery.id, outcome: reply(500, "down") }]);
        }
    }
    assert_eq!(read(&mesh.broker, "work.dlq").await.len(), 0);
    assert_eq!(status(&mesh).state, RouteState::WaitingForService);
    let seen = serve(&mesh, only(COUNT)).await;
    assert!(seen.iter().all(|(_, attempt)| *attempt <= 3));
    assert_eq!(mesh.ended("work", COUNT as u64).await, BTreeMap::from([(Disposition::Forwarded, COUNT as u64)]));
    mesh.end().await;
}

#[tokio::test(start_paused = true)]
async fn retry_after_chooses_when_and_where_a_record_waits() {
    let (mesh, _) = one("retry: { attempts: 5, initial: 10ms, topics: [10s, 60s] }").await;
    mesh.publish("in", records(2, 2)).await;
    let began = Instant::now();
    let times = std::sync::Mutex::new(Vec::new());
    let seen = serve(&mesh, |delivery| {
        times.lock().unwrap().push((number(delivery), began.elapsed().as_secs()));
        let after = [Duration::from_secs(20), Duration::from_secs(2)][number(delivery)];
        match delivery.attempt {
            1 => Outcome::Retry { reason: "busy".to_owned(), after: Some(after) },
            _ => reply(200, "ok"),
        }
    })
    .await;
    assert_eq!(seen, [(0, 1), (1, 1), (1, 2), (0, 2)]);
    let times = times.into_inner().unwrap();
    assert!((2..5).contains(&times[2].1) && (20..25).contains(&times[3].1), "{times:?}");
    assert_eq!(read(&mesh.broker, "work.in.retry-1").await.len(), 1, "the one that waits for long");
    mesh.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_pushback_that_wants_no_retry_sends_a_record_to_the_next_retry_topic() {
    let (mesh, _) = one("retry: { attempts: 5, initial: 10ms, topics: [10s, 60s] }").await;
    mesh.publish("in", records(1, 1)).await;
    let began = Instant::now();
    let seen = serve(&mesh, |delivery| match delivery.attempt {
        1 => Outcome::Retry { reason: "not here".to_owned(), after: Some(crate::outcome::NOT_HERE) },
        _ => reply(200, format!("{}", began.elapsed().as_secs())),
    })
    .await;
    assert_eq!(seen, [(0, 1), (0, 2)]);
    let waited: u64 = text(read(&mesh.broker, "out").await[0].value.as_ref()).parse().unwrap();
    // The paused clock runs ahead while the broker's threads work.
    assert!((9..60).contains(&waited), "{waited}");
    mesh.end().await;
    // Without retry topics that is its end.
    let (mesh, _) = one("retry: { attempts: 5, initial: 10ms }").await;
    mesh.publish("in", records(1, 1)).await;
    let seen = serve(&mesh, |_| Outcome::Retry { reason: "never".to_owned(), after: Some(crate::outcome::NOT_HERE) }).await;
    assert_eq!((seen.len(), read(&mesh.broker, "work.dlq").await.len()), (1, 1));
    mesh.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_503_that_says_how_long_is_left_alone_for_so_long() {
    let (mesh, _) = one("retry: { attempts: 5, initial: 10ms }").await;
    mesh.publish("in", records(8, 8)).await;
    let calls = std::sync::Mutex::new(Vec::new());
    let began = Instant::now();
    serve(&mesh, |delivery| {
        calls.lock().unwrap().push((began.elapsed().as_secs(), delivery.attempt));
        if began.elapsed() > Duration::from_secs(25) {
            return reply(200, "ok");
        }
        let Outcome::Reply(said) = reply(503, "maintenance") else { unreachable!() };
        Outcome::Reply(crate::outcome::Reply { retry_after: Some(Duration::from_secs(20)), ..said })
    })
    .await;
    let calls = calls.into_inner().unwrap();
    assert!(calls.iter().all(|(_, attempt)| *attempt == 1), "{calls:?}");
    assert!(calls.iter().all(|(at, _)| *at < 2 || *at >= 20), "{calls:?}");
    assert_eq!(mesh.ended("work", 8).await, BTreeMap::from([(Disposition::Forwarded, 8)]));
    mesh.end().await;
}
