//! Each check fails where it must.

use std::time::UNIX_EPOCH;

use super::super::{
    ledger::{Ack, What},
    lines::Order,
    payload::Payload,
};
use super::*;
use crate::soak::{ground::Side, ledger::Event};

/// A run of three keys in one partition, in which all is well, as it can be taken apart.
pub(super) struct Run {
    pub(super) books: Books,
    pub(super) contents: Contents,
    pub(super) samples: Vec<Sample>,
    pub(super) line: Line,
    pub(super) swaps: Vec<(Duration, Duration)>,
    pub(super) faults: bool,
}

pub(super) fn place(offset: i64) -> Place {
    Place { partition: 0, offset }
}

fn uuid(name: Name) -> Uuid {
    Uuid::from_u128(u128::from(name.key) << 64 | u128::from(name.seq) << 8 | 7)
}

fn found(offset: i64, name: Name, headers: &[(&str, String)]) -> Found {
    Found {
        topic: "t".into(),
        partition: 0,
        offset,
        key: Some(name.key_text().into_bytes()),
        value: Some(Payload::new("run", 1, name, uuid(name)).bytes().to_vec()),
        headers: headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone().into_bytes())).collect(),
    }
}

fn reply(line: Line, offset: i64, source: i64, name: Name) -> Found {
    let headers = [
        ("mesh-cause", format!("{} m.a/0/{source} 0", line.name)),
        ("mesh-id", format!("id-{source}")),
        ("traceparent", format!("00-{}-0000000000000001-01", uuid(name).simple())),
    ];
    found(offset, name, &headers)
}

fn letter(offset: i64, source: i64, name: Name, reason: &str) -> Found {
    let headers = [
        ("mesh-dlq-partition", "0".to_owned()),
        ("mesh-dlq-offset", source.to_string()),
        ("mesh-dlq-reason", reason.to_owned()),
        ("mesh-id", format!("dead-{source}")),
    ];
    found(offset, name, &headers)
}

/// A copy in a retry or park topic, after so many attempts.
fn copy(offset: i64, source: i64, name: Name, attempts: u32, due_ms: Option<u128>) -> Found {
    let mut headers = vec![
        ("mesh-id", uuid(name).to_string()),
        ("traceparent", format!("00-{}-0000000000000001-01", uuid(name).simple())),
        ("mesh-origin", format!("m.a/0/{source} 1")),
        ("mesh-attempt", attempts.to_string()),
    ];
    headers.extend(due_ms.map(|due| ("mesh-retry-at", due.to_string())));
    found(offset, name, &headers)
}

fn well() -> Run {
    well_of(Line::ALL[0])
}

pub(super) fn well_of(line: Line) -> Run {
    let mut run = Run {
        books: Books::default(),
        contents: Contents { sides: vec![Vec::new(); line.sides("m.a").len()], ..Contents::default() },
        samples: Vec::new(),
        line,
        swaps: Vec::new(),
        faults: false,
    };
    for offset in 0..600 {
        let name = Name { key: (offset % 3) as u32, seq: (offset / 3) as u32 };
        let at = Duration::from_millis(offset as u64);
        run.contents.a.push(found(offset, name, &[]));
        run.books.acks.push(Ack { name, producer: 1, uuid: uuid(name), place: place(offset), at });
        let treatment = line.treatment(name);
        let failures = if let Treatment::Fails(first) = treatment { first.min(line.last_attempt()) } else { 0 };
        for attempt in 1..=line.last_attempt().min(failures + 1) {
            if attempt > line.attempts {
                run.puts_aside(offset, name, attempt, at);
            }
            let mut event = |what| run.books.events.push(Event { at, place: place(offset), name, uuid: uuid(name), what });
            event(What::Start(attempt));
            event(What::End(match treatment {
                _ if attempt <= failures => Answer::Fail,
                Treatment::Poison => Answer::Reject,
                Treatment::Ignore => Answer::Ignore,
                Treatment::Reply | Treatment::Slips | Treatment::Fails(_) => Answer::Reply,
            }));
        }
        let reason = if failures == line.last_attempt() { Some("attempts") } else { (treatment == Treatment::Poison).then_some("status") };
        match reason {
            Some(reason) => run.contents.dead.push(letter(run.contents.dead.len() as i64, offset, name, reason)),
            None if treatment == Treatment::Ignore => {}
            None => run.contents.b.push(reply(line, run.contents.b.len() as i64, offset, name)),
        }
        run.sample(offset + 1, None);
    }
    run
}

impl Run {
    /// A record goes to the retry topic before this attempt, the next of its key to the park topic; then the source's commit passes it.
    fn puts_aside(&mut self, offset: i64, name: Name, attempt: u32, at: Duration) {
        let (tier, park) = ((attempt - self.line.attempts - 1) as usize, self.line.pauses.len());
        let [retries, parked] = [tier, park].map(|side| self.contents.sides[side].len() as i64);
        self.contents.sides[tier].push(copy(retries, offset, name, attempt - 1, Some(at.as_millis())));
        if tier == 0 && offset + 3 < 600 {
            let next = Name { seq: name.seq + 1, ..name };
            self.contents.sides[park].push(copy(parked, offset + 3, next, 0, None));
        }
        self.sample(offset + 1, Some(tier));
    }

    /// `waiting`: in this topic the last record waits.
    fn sample(&mut self, committed: i64, waiting: Option<usize>) {
        let one = |end: usize| BTreeMap::from([(0, end as i64)]);
        // Of the park topic, what is done in the source's order; of a retry topic, all but what waits there now.
        let origin = |found: &Found| found.header("mesh-origin")?.split(['/', ' ']).nth(2)?.parse().ok();
        let done = |found: &&Found| origin(found).is_some_and(|origin: i64| origin < committed);
        let sides = (0..).zip(&self.contents.sides).map(|(side, found)| Side {
            committed: one(found.iter().take_while(done).count() - usize::from(waiting == Some(side))),
            ends: one(found.len()),
        });
        self.samples.push(Sample {
            at: Duration::ZERO,
            committed: BTreeMap::from([(0, committed)]),
            b: one(self.contents.b.len()),
            dead: one(self.contents.dead.len()),
            sides: sides.collect(),
            events: self.books.events.len(),
        });
    }

    pub(super) fn check(&self) -> Verdict {
        check(&Evidence {
            run: "run",
            line: self.line,
            books: &self.books,
            began: UNIX_EPOCH,
            contents: &self.contents,
            samples: &self.samples,
            swaps: &self.swaps,
            faults: self.faults,
        })
    }

    /// The numbers of the checks that fail.
    pub(super) fn fails(&self) -> Vec<u8> {
        let mut checks: Vec<u8> = self.check().violations.iter().map(|violation| violation.check).collect();
        checks.dedup();
        checks
    }

    /// The index in B, and the source, of a record that was forwarded and whose next in B is of another key.
    fn forwarded(&self) -> (usize, Place) {
        let place = Facts::cause(&self.contents.b[10], "work").unwrap();
        (10, place)
    }
}

#[test]
fn a_run_in_which_all_is_well_passes() {
    let verdict = well().check();
    assert_eq!(verdict.violations, []);
    assert_eq!((verdict.acknowledged, verdict.stored, verdict.processed, verdict.lost), (600, 600, 600, 0));
    assert_eq!(verdict.forwarded + verdict.ignored + verdict.dead_lettered, 600);
    assert!(verdict.ignored > 0 && verdict.dead_lettered > 0);
}

#[test]
fn check_1_an_acknowledged_record_that_is_not_in_a() {
    let mut run = well();
    run.contents.a.pop();
    let verdict = run.check();
    assert!(verdict.violations.iter().any(|violation| violation.check == 1 && violation.what == NOT_IN_A), "{verdict:?}");
    assert_eq!(verdict.lost, 1);
}

#[test]
fn check_1_without_an_offset_a_record_may_be_anywhere_in_its_partition() {
    let mut run = well();
    run.books.acks[7].place.offset = -1;
    assert_eq!(run.check().violations, []);
    run.books.acks[7].place.partition = 1;
    assert_eq!(run.fails(), [1]);
    let mut run = well();
    run.books.acks[599].place.offset = -1;
    run.contents.a.pop();
    assert!(run.check().violations.iter().any(|violation| violation.what == NOT_IN_A));
}

#[test]
fn check_1_a_record_that_is_changed_in_a() {
    let mut run = well();
    let value = run.contents.a[7].value.as_mut().unwrap();
    let end = value.len() - 3;
    value[end] ^= 1;
    assert!(run.fails().contains(&1));
}

#[test]
fn check_1_a_gap_in_a_key() {
    let mut run = well();
    // Nobody saw it acknowledged, yet its producer went on to the next.
    run.books.acks.remove(0);
    run.books.events.retain(|event| event.place != place(0));
    run.contents.a.remove(0);
    run.contents.b.retain(|found| Facts::cause(found, "work") != Some(place(0)));
    assert!(run.check().violations.iter().any(|violation| violation.what == GAP_IN_A));
}

#[test]
fn check_2_a_record_without_a_disposition() {
    let mut run = well();
    run.samples.clear();
    let (index, place) = run.forwarded();
    run.contents.b.remove(index);
    assert_eq!((run.fails(), run.check().lost), (vec![2], 1));
    assert!(run.check().violations[0].offenders[0].contains(&place.to_string()));
}

#[test]
fn check_2_a_rejected_record_that_is_no_dead_letter() {
    let mut run = well();
    run.samples.clear();
    run.contents.dead.pop();
    assert_eq!(run.fails(), [2]);
}

#[test]
fn check_3_a_record_that_starts_before_the_one_before_is_done() {
    let mut run = well();
    let index = run.books.events.iter().position(|event| event.place == place(9) && event.what == What::Start(1)).unwrap();
    let event = run.books.events.remove(index);
    let before = run.books.events.iter().position(|event| event.place == place(6) && event.what == What::Start(1)).unwrap();
    run.books.events.insert(before + 1, event);
    run.samples.clear();
    assert_eq!(run.fails(), [3]);
    assert_eq!(run.check().reordered, 1);
}

#[test]
fn check_3_replies_of_a_key_in_another_order() {
    let mut run = well();
    run.samples.clear();
    let of_key: Vec<usize> = (0..run.contents.b.len()).filter(|index| run.contents.b[*index].key_text() == "k0").collect();
    let (one, other) = (of_key[3], of_key[4]);
    run.contents.b.swap(one, other);
    let (first, second) = (run.contents.b[one].offset, run.contents.b[other].offset);
    (run.contents.b[one].offset, run.contents.b[other].offset) = (second, first);
    assert_eq!(run.fails(), [3]);
}

#[test]
fn check_3_a_dead_letter_that_comes_again_keeps_its_place() {
    let line = *Line::ALL.iter().find(|line| line.guarantee == Guarantee::AtLeastOnce && !line.pauses.is_empty()).unwrap();
    let mut run = Run { faults: true, ..well_of(line) };
    let letter = run.contents.dead.iter().find(|letter| letter.header("mesh-dlq-reason").as_deref() == Some("attempts")).unwrap();
    let source: i64 = letter.header("mesh-dlq-offset").unwrap().parse().unwrap();
    let name = Name { key: (source % 3) as u32, seq: (source / 3) as u32 };
    let event = |what| Event { at: Duration::from_secs(1), place: place(source), name, uuid: uuid(name), what };
    run.books.events.extend([event(What::Start(line.last_attempt())), event(What::End(Answer::Reply))]);
    run.contents.b.push(reply(line, run.contents.b.len() as i64, source, name));
    assert_eq!(run.fails(), [0_u8; 0]);
    // One that was not given up before it was replied to has no such excuse.
    let given_up = |event: &Event| event.place == place(source) && event.what == What::End(Answer::Fail);
    run.books.events.retain(|event| !given_up(event));
    assert_eq!(run.fails(), [3]);
}

#[test]
fn check_4_a_commit_beyond_what_is_complete() {
    let mut run = well();
    run.samples[100].committed.insert(0, 110);
    assert_eq!(run.fails(), [4]);
}

#[test]
fn check_4_a_commit_that_goes_back() {
    let mut run = well();
    run.samples[100].committed.insert(0, 90);
    assert_eq!(run.fails(), [4]);
}

#[test]
fn check_5_a_duplicate_without_a_fault_or_with_exactly_once() {
    let mut run = well();
    let (_, place) = run.forwarded();
    let name = run.books.acks[usize::try_from(place.offset).unwrap()].name;
    run.contents.b.push(reply(run.line, run.contents.b.len() as i64, place.offset, name));
    assert_eq!(run.fails(), [5]);
    assert_eq!(run.check().duplicates, 1);
    run.faults = true;
    assert!(run.fails().is_empty(), "at least once: it is counted");
    run.line.guarantee = Guarantee::ExactlyOnce;
    assert_eq!(run.fails(), [5]);
}

#[test]
fn check_5_a_duplicate_that_nobody_could_recognise() {
    let mut run = well();
    run.faults = true;
    let (index, place) = run.forwarded();
    let name = run.books.acks[usize::try_from(place.offset).unwrap()].name;
    run.contents.b.push(Found {
        headers: run.contents.b[index + 1].headers.clone(),
        ..reply(run.line, run.contents.b.len() as i64, place.offset, name)
    });
    let last = run.contents.b.len() - 1;
    run.contents.b[last].headers[0].1 = format!("work m.a/0/{} 0", place.offset).into_bytes();
    run.contents.b[last].headers[2] = run.contents.b[index].headers[2].clone();
    assert_eq!(run.fails(), [5]);
}

#[test]
fn check_6_a_reply_with_another_cause_or_trace_or_that_nobody_gave() {
    let mut run = well();
    run.samples.clear();
    let (index, place) = run.forwarded();
    let clean = run.contents.b[index].clone();
    run.contents.b[index].headers[2].1 = b"00-00000000000000000000000000000001-0000000000000001-01".to_vec();
    assert_eq!(run.fails(), [6]);
    run.contents.b[index].headers[0].1 = b"other m.a/0/1 0".to_vec();
    assert_eq!(run.fails(), [2, 6]);
    run.contents.b[index] = clean;
    run.books.events.retain(|event| event.place != place);
    assert!(run.fails().contains(&6));
}

#[test]
fn check_7_what_was_refused_for_good_appears() {
    let mut run = well();
    let name = run.books.acks[5].name;
    run.books.refused.insert(uuid(name));
    assert_eq!(run.fails(), [7]);
}

#[test]
fn check_3_with_order_partition_a_record_waits_for_those_of_other_keys() {
    let mut run = well();
    run.line.order = Order::Partition;
    assert_eq!(run.check().violations, []);
    let index = run.books.events.iter().position(|event| event.place == place(10) && event.what == What::Start(1)).unwrap();
    let event = run.books.events.remove(index);
    let before = run.books.events.iter().position(|event| event.place == place(9) && event.what == What::Start(1)).unwrap();
    run.books.events.insert(before, event);
    run.samples.clear();
    assert_eq!(run.fails(), [3]);
    run.line.order = Order::Key;
    assert_eq!(run.check().violations, [], "they are of different keys");
    run.line.order = Order::None;
    assert_eq!(run.check().violations, []);
}

#[test]
fn check_9_a_record_that_is_lost_while_tables_are_swapped() {
    let mut run = well();
    run.samples.clear();
    let (index, place) = run.forwarded();
    run.contents.b.remove(index);
    let at = run.books.acks[usize::try_from(place.offset).unwrap()].at;
    run.swaps = vec![(at + Duration::from_millis(1), at + Duration::from_secs(1))];
    assert_eq!(run.fails(), [2], "it was published before");
    run.swaps.push((at, at));
    assert_eq!(run.fails(), [2, 9]);
}
