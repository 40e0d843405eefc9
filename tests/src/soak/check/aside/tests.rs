//! Each check fails where it must, on a line with retry topics.

use super::*;
use crate::soak::{
    check::tests::{Run, place, well_of},
    ledger::Event,
};

fn line() -> Line {
    Line::ALL.into_iter().find(|line| !line.pauses.is_empty()).unwrap()
}

/// A run in which all is well, and a record in the middle of which this many attempts fail.
fn with(fails: u32) -> (Run, Place) {
    let run = well_of(line());
    let named = |ack: &&crate::soak::ledger::Ack| run.line.treatment(ack.name) == Treatment::Fails(fails);
    let place = run.books.acks.iter().skip(200).find(named).unwrap().place;
    (run, place)
}

/// Where a copy of a record is: the topic, and the index there.
fn copy_of(run: &Run, side: usize, place: Place) -> usize {
    let origin = format!("m.a/0/{} 1", place.offset);
    run.contents.sides[side].iter().position(|found| found.header("mesh-origin").as_ref() == Some(&origin)).unwrap()
}

fn set(run: &mut Run, side: usize, index: usize, name: &str, value: &str) {
    let headers = &mut run.contents.sides[side][index].headers;
    headers.iter_mut().find(|header| header.0 == name).unwrap().1 = value.as_bytes().to_vec();
}

/// The next record of the key begins before this attempt of the one before.
fn overtake(run: &mut Run, before: Place, attempt: u32) {
    let is = |event: &Event, place, attempt| event.place == place && event.what == What::Start(attempt);
    let next = place(before.offset + 3);
    let from = run.books.events.iter().position(|event| is(event, next, 1)).unwrap();
    let to = run.books.events.iter().position(|event| is(event, before, attempt)).unwrap();
    let event = run.books.events.remove(from);
    run.books.events.insert(to, event);
    run.samples.clear();
}

/// The commit of a topic never passes its last record.
fn stands_still(run: &mut Run, side: usize) {
    let last = run.contents.sides[side].len() as i64 - 1;
    for committed in run.samples.iter_mut().filter_map(|sample| sample.sides[side].committed.get_mut(&0)) {
        *committed = last.min(*committed);
    }
}

#[test]
fn a_run_with_retry_topics_in_which_all_is_well_passes() {
    let verdict = well_of(line()).check();
    assert_eq!(verdict.violations, []);
    assert_eq!(verdict.forwarded + verdict.ignored + verdict.dead_lettered, 600);
    assert!(verdict.exhausted > 0 && verdict.parked > 0 && verdict.retried > verdict.parked, "{verdict:?}");
}

#[test]
fn check_2_a_record_that_waits_in_the_end() {
    for side in 0..3 {
        let mut run = well_of(line());
        stands_still(&mut run, side);
        assert_eq!(run.fails(), [2], "{side}");
    }
}

#[test]
fn check_2_a_record_that_is_given_up_before_its_last_attempt() {
    let (mut run, place) = with(4);
    run.samples.clear();
    let index = copy_of(&run, 1, place);
    run.contents.sides[1].remove(index);
    assert_eq!(run.fails(), [2, 6]);
    run.books.events.retain(|event| event.place != place || event.what != What::Start(4));
    run.faults = true;
    assert_eq!(run.fails(), [2], "the service may not know of an attempt");
}

#[test]
fn check_2_a_record_whose_attempts_are_used_up_and_that_is_no_dead_letter() {
    let (mut run, place) = with(4);
    run.samples.clear();
    run.contents.dead.retain(|found| found.header("mesh-dlq-offset") != Some(place.offset.to_string()));
    // The next of its key did begin though it is not done.
    assert_eq!((run.fails(), run.check().lost), (vec![2, 3], 1));
}

#[test]
fn check_3_a_record_that_starts_while_an_earlier_one_waits_in_a_retry_topic() {
    for (fails, attempt, faults) in [(2, 3, false), (3, 4, false), (3, 4, true), (4, 4, false), (4, 3, true)] {
        let (mut run, place) = with(fails);
        run.faults = faults;
        overtake(&mut run, place, attempt);
        assert_eq!(run.fails(), [3], "{fails} {attempt} {faults}");
    }
}

#[test]
fn check_3_an_attempt_before_its_pause_is_over() {
    let (mut run, place) = with(2);
    let index = copy_of(&run, 0, place);
    set(&mut run, 0, index, "mesh-retry-at", "10000");
    assert_eq!(run.fails(), [3]);
}

#[test]
fn check_4_a_commit_of_the_source_whose_record_is_not_in_the_retry_topic_yet() {
    let (mut run, place) = with(2);
    let index = copy_of(&run, 0, place) as i64;
    let handed = run.samples.iter_mut().find(|sample| sample.sides[0].ends[&0] == index + 1).unwrap();
    assert_eq!((handed.committed[&0], handed.sides[0].committed[&0]), (place.offset + 1, index));
    handed.sides[0].ends.insert(0, index);
    assert_eq!(run.fails(), [4]);
}

#[test]
fn check_4_a_commit_of_a_retry_topic_whose_record_is_not_done() {
    for (fails, side) in [(2, 0), (4, 1)] {
        let (mut run, place) = with(fails);
        let index = copy_of(&run, side, place) as i64;
        let handed = run.samples.iter_mut().find(|sample| sample.sides[side].ends[&0] == index + 1).unwrap();
        handed.sides[side].committed.insert(0, index + 1);
        assert_eq!(run.fails(), [4]);
    }
}

#[test]
fn check_4_a_parked_record_is_as_good_as_one_in_a_retry_topic() {
    let (mut run, place) = with(2);
    // The next of its key is parked, and committed in the source with all before it, though the service was not given it yet.
    let handed = run.samples.iter().position(|sample| sample.committed[&0] == place.offset + 1).unwrap();
    let (next, side) = (place.offset + 3, 2);
    let parked = run.contents.sides[side].iter().position(|found| found.header("mesh-origin") == Some(format!("m.a/0/{next} 1")));
    let parked = parked.unwrap() as i64;
    let done = run.samples.iter().position(|sample| sample.committed[&0] == next + 1).unwrap();
    run.samples[done - 1].committed.insert(0, next + 1);
    assert!(handed < done - 1);
    run.samples[done - 1].sides[side].committed.insert(0, parked);
    run.samples[..done - 1].iter_mut().for_each(|sample| {
        let committed = sample.sides[side].committed.entry(0).or_default();
        *committed = (*committed).min(parked);
    });
    assert_eq!(run.check().violations, []);
    run.samples[done - 1].sides[side].committed.insert(0, parked + 1);
    assert_eq!(run.fails(), [4]);
}

#[test]
fn check_4_a_commit_of_a_retry_topic_that_goes_back() {
    let mut run = well_of(line());
    let last = run.samples.len() - 2;
    run.samples[last].sides[0].committed.insert(0, 1);
    assert_eq!(run.fails(), [4]);
}

#[test]
fn check_5_attempts_that_are_not_declared() {
    let (mut run, place) = with(2);
    let index = run.books.events.iter().position(|event| event.place == place && event.what == What::Start(3)).unwrap();
    // One that is missing; under faults the service may not know of it.
    let event = run.books.events.remove(index - 1);
    run.samples.clear();
    let start = run.books.events.iter().position(|event| event.place == place && event.what == What::Start(2)).unwrap();
    run.books.events.remove(start);
    assert_eq!(run.fails(), [5]);
    run.faults = true;
    assert_eq!(run.check().violations, []);
    // One too many, whatever happened.
    run.books.events.insert(index - 1, Event { what: What::Start(5), ..event });
    assert_eq!(run.fails(), [5]);
}

#[test]
fn check_5_a_record_that_is_twice_in_a_retry_topic_though_nothing_was_wrong() {
    let (mut run, place) = with(3);
    run.samples.clear();
    let again = run.contents.sides[1][copy_of(&run, 1, place)].clone();
    let offset = run.contents.sides[1].len() as i64;
    run.contents.sides[1].push(crate::mesh::Found { offset, ..again });
    assert_eq!(run.fails(), [5]);
    run.faults = true;
    assert_eq!(run.check().violations, [], "after a crash it may be");
}

#[test]
fn check_6_a_copy_that_is_not_its_record() {
    for (name, value) in [("mesh-origin", "m.a/0/7777 1"), ("mesh-attempt", "x"), ("mesh-id", "another"), ("traceparent", "00-1-1-01")] {
        let (mut run, place) = with(3);
        run.samples.clear();
        run.faults = true;
        // Nobody was given it from there.
        run.books.events.retain(|event| event.place != place || !matches!(event.what, What::Start(3..)));
        let index = copy_of(&run, 0, place);
        set(&mut run, 0, index, name, value);
        assert_eq!(run.fails(), [6], "{name}");
    }
    let (mut run, place) = with(3);
    run.samples.clear();
    let index = copy_of(&run, 0, place);
    run.contents.sides[0][index].value.as_mut().unwrap()[20] ^= 1;
    assert!(run.fails().contains(&6));
}

#[test]
fn check_6_an_attempt_that_no_retry_topic_knows_of() {
    let (mut run, place) = with(3);
    run.samples.clear();
    let index = copy_of(&run, 1, place);
    run.contents.sides[1].remove(index);
    assert_eq!(run.fails(), [6]);
}

#[test]
fn check_9_a_record_that_waits_for_ever_after_tables_were_swapped() {
    let mut run = well_of(line());
    stands_still(&mut run, 0);
    run.swaps = vec![(Duration::ZERO, Duration::from_secs(1))];
    assert_eq!(run.fails(), [2, 9]);
}
