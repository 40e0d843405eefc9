//! Dead letters that go back, on the embedded broker: those that were cut, a limit, a topic that is made anew.

use std::collections::BTreeMap;

use tokio::sync::mpsc;

use super::{super::range, *};
use crate::{
    broker::{
        Broker, NewTopic, Outgoing,
        embedded::{EmbeddedBroker, EmbeddedConfig},
    },
    record::{Header, Position, TopicPartition, derived_id},
};

const LETTERS: &str = "work.dlq";

struct Ground {
    broker: Arc<EmbeddedBroker>,
    handle: ControlHandle,
    _folder: tempfile::TempDir,
}

impl Ground {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let broker = EmbeddedBroker::open(EmbeddedConfig::new(folder.path())).unwrap();
        let (commands, _) = crate::command::channel();
        let config = config("a", folder.path(), None);
        let handle = Control::start(broker.clone(), config, Board::default(), commands, CancellationToken::new()).await.unwrap();
        let ground = Self { broker, handle, _folder: folder };
        timeout(SOON, ground.handle.ready().wait_for(|ready| *ready)).await.unwrap().unwrap();
        ground.create("in").await;
        ground.create(LETTERS).await;
        let table = table(&[("work", "in", "out")]);
        ground.handle.control().apply("routes.yaml", &table, ApplyOptions::default()).await.unwrap();
        ground
    }

    async fn create(&self, topic: &str) {
        let topic = NewTopic { name: topic.to_owned(), partitions: Some(1), replication: None, config: BTreeMap::new() };
        self.broker.admin().create_topics(vec![topic]).await.unwrap();
    }

    async fn put(&self, topic: &str, record: Record) {
        let out = Outgoing { topic: topic.into(), partition: Some(0), record };
        self.broker.producer().send(vec![out]).await.remove(0).unwrap();
    }

    async fn records(&self, topic: &str) -> Vec<Record> {
        let ranges = range::ranges(&*self.broker.admin(), topic, &range::Limits::default()).await.unwrap();
        let mut reader = range::RangeReader::open(&*self.broker, ranges).unwrap();
        let mut found = Vec::new();
        while let Some(batch) = reader.next().await.unwrap() {
            found.extend(batch.records.into_iter().map(|(_, record)| record));
        }
        reader.close().await;
        found
    }

    /// What a redrive says in the end.
    async fn redrive(&self, limit: u64, execute: bool) -> v1::RedriveProgress {
        let (out, mut progress) = mpsc::channel(1_000);
        let request = v1::RedriveRequest { route: "work".into(), limit, execute, ..v1::RedriveRequest::default() };
        timeout(SOON, self.handle.control().redrive(request, out)).await.expect("in time").unwrap();
        let mut last = None;
        while let Some(progress) = progress.recv().await {
            last = Some(progress);
        }
        last.filter(|last| last.finished).unwrap()
    }
}

fn record(id: &str, key: &str, value: Option<&str>) -> Record {
    let headers = if id.is_empty() { Vec::new() } else { vec![Header::new("mesh-id", id.to_owned()), Header::new("mine", "x")] };
    Record { key: Some(key.to_owned().into()), value: value.map(|value| value.to_owned().into()), headers, timestamp_ms: None }
}

/// The letter of a record of `in`.
fn letter(record: Record, offset: i64, cut: Option<&'static str>) -> Record {
    let mut letter = record;
    for (name, value) in [("mesh-dlq-route", "work"), ("mesh-dlq-reason", "status"), ("mesh-dlq-topic", "in"), ("mesh-dlq-partition", "0")]
    {
        letter.headers.push(Header::new(name, value));
    }
    letter.headers.push(Header::new("mesh-dlq-offset", offset.to_string()));
    if let Some(word) = cut {
        letter.headers.push(Header::new("mesh-dlq-cut", word));
        letter.value = None;
    }
    letter
}

fn counts(progress: &v1::RedriveProgress) -> (u64, u64, u64, u64) {
    (progress.matched, progress.redriven, progress.already, progress.refused)
}

#[tokio::test]
async fn of_a_letter_that_was_cut_the_record_goes_back_or_nothing() {
    let ground = Ground::start().await;
    for record in [record("a", "k0", Some("A")), record("", "k1", Some("B")), record("c", "k2", Some("C")), record("d", "k3", None)] {
        ground.put("in", record).await;
    }
    let second = Position { partition: TopicPartition::new("in", 0), offset: 1 };
    let id = String::from_utf8(derived_id(&second).to_vec()).unwrap();
    let bare = Record { key: None, headers: vec![Header::new("mesh-id", id.clone())], ..Record::default() };
    let nowhere =
        Record { headers: vec![Header::new("mesh-dlq-reason", "status"), Header::new("mesh-dlq-cut", "value")], ..Record::default() };
    let nowhere = Record { headers: [nowhere.headers, vec![Header::new("mesh-dlq-route", "work")]].concat(), ..nowhere };
    for letter in [
        letter(record("a", "k0", None), 0, Some("value")),
        letter(bare, 1, Some("record")),
        letter(record("c", "other", None), 2, Some("value")),
        letter(record("e", "k2", None), 2, Some("value")),
        letter(record("f", "k4", None), 9, Some("value")),
        // This one had no value.
        letter(record("d", "k3", None), 3, None),
        nowhere,
    ] {
        ground.put(LETTERS, letter).await;
    }
    let preview = ground.redrive(0, false).await;
    assert_eq!((counts(&preview), preview.cut), ((7, 3, 0, 4), 2), "{preview:#?}");
    assert_eq!(
        preview.cuts,
        [
            "work.dlq/0/0: its value was left out; the record goes as it lies at in/0/0",
            "work.dlq/0/1: all of it was left out; the record goes as it lies at in/0/1"
        ]
    );
    assert_eq!(
        preview.refusals,
        [
            "work.dlq/0/2: it was cut, and its record is gone from in/0/2: another one lies there",
            "work.dlq/0/3: it was cut, and its record is gone from in/0/2: another one lies there",
            "work.dlq/0/4: it was cut, and its record is gone from in/0/9",
            "work.dlq/0/6: it was cut, and does not say where its record lies"
        ]
    );
    assert_eq!(preview.samples.iter().map(|letter| &*letter.cut).collect::<Vec<_>>(), ["value", "record", ""]);
    assert_eq!(ground.records("in").await.len(), 4, "a preview sends nothing");

    // The first record ages out.
    ground.broker.admin().delete_records(vec![(TopicPartition::new("in", 0), 1)]).await.unwrap();
    let done = ground.redrive(0, true).await;
    assert_eq!((counts(&done), done.cut), ((7, 2, 0, 5), 1), "{done:#?}");
    assert_eq!(done.refusals[0], "work.dlq/0/0: it was cut, and its record is gone from in/0/0");
    let copies = ground.records("in").await.split_off(3);
    assert_eq!(copies.len(), 2);
    assert_eq!((copies[0].key.as_deref(), copies[0].value.as_deref()), (Some(&b"k1"[..]), Some(&b"B"[..])));
    assert_eq!((copies[0].header_str("mesh-id"), copies[0].header_str("mesh-redriven")), (Some(&*id), Some("work.dlq/0/1")));
    assert_eq!((copies[1].key.as_deref(), copies[1].value.as_deref(), copies[1].header_str("mine")), (Some(&b"k3"[..]), None, Some("x")));
    assert!(copies.iter().flat_map(|copy| &copy.headers).all(|header| !header.name.starts_with("mesh-dlq-")));
    assert_eq!(counts(&ground.redrive(0, true).await), (7, 0, 2, 5), "what was refused is no letter that was sent");
}

#[tokio::test]
async fn a_limit_counts_what_is_sent_alone() {
    let ground = Ground::start().await;
    for number in 0..6 {
        let cut = (number == 1).then_some("value");
        ground.put(LETTERS, letter(record(&format!("id{number}"), "k", Some("v")), 9, cut)).await;
    }
    assert_eq!(counts(&ground.redrive(2, false).await), (3, 2, 0, 1));
    assert_eq!(counts(&ground.redrive(2, true).await), (3, 2, 0, 1));
    assert_eq!(counts(&ground.redrive(2, false).await), (5, 2, 2, 1));
    assert_eq!(counts(&ground.redrive(2, true).await), (5, 2, 2, 1));
    assert_eq!(counts(&ground.redrive(2, true).await), (6, 1, 4, 1));
    assert_eq!(counts(&ground.redrive(2, true).await), (6, 0, 5, 1));
    assert_eq!(ground.records("in").await.len(), 5);
}

#[tokio::test]
async fn marks_do_not_count_for_the_letters_of_a_topic_that_is_made_anew() {
    let ground = Ground::start().await;
    let letters = async |time: &'static str| {
        for id in ["a", "b"] {
            let mut letter = letter(record(id, "k", Some("v")), 9, None);
            letter.headers.push(Header::new("mesh-dlq-time", time));
            ground.put(LETTERS, letter).await;
        }
    };
    letters("1").await;
    assert_eq!(counts(&ground.redrive(0, true).await), (2, 2, 0, 0));
    assert_eq!(counts(&ground.redrive(0, true).await), (2, 0, 2, 0));
    ground.broker.admin().delete_topics(vec![LETTERS.to_owned()]).await.unwrap();
    ground.create(LETTERS).await;
    // The same records died again.
    letters("2").await;
    assert_eq!(counts(&ground.redrive(0, true).await), (2, 2, 0, 0));
    assert_eq!(counts(&ground.redrive(0, true).await), (2, 0, 2, 0));
    // A mark that does not say which letter it was.
    letters("3").await;
    let mark = Record { key: Some(format!("shop/{LETTERS}/0/old").into()), value: Some("2".into()), ..Record::default() };
    ground.put(super::super::topics::REDRIVEN_TOPIC, mark).await;
    assert_eq!(counts(&ground.redrive(0, false).await), (4, 1, 3, 0));
    let listed = ground.handle.control().list_dead_letters("work").await.unwrap();
    assert_eq!((listed.counts[0].letters, listed.counts[0].redriven), (4, 3));
}
