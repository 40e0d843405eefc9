//! The control log: who wins, what ends, what is deleted, and that all readers agree.

use std::collections::{BTreeSet, HashMap};

use proptest::prelude::*;

use super::*;

fn push(log: &mut Log, offset: i64, key: &str, value: Option<&'static str>) -> Meaning {
    log.push(offset, Some(&Bytes::copy_from_slice(key.as_bytes())), value.map(|v| Bytes::from_static(v.as_bytes())).as_ref())
}

#[test]
fn the_first_record_of_a_generation_wins() {
    let mut log = Log::new("shop");
    assert_eq!(push(&mut log, 0, "shop/1/a", Some("A")), Meaning::Head(1));
    assert_eq!(push(&mut log, 1, "shop/1/b", Some("B")), Meaning::Beaten(1));
    assert_eq!(push(&mut log, 2, "shop/2/b", Some("B")), Meaning::Head(2));
    assert_eq!(push(&mut log, 3, "shop/1/c", Some("C")), Meaning::Beaten(1));
    assert_eq!(log.head(), 2);
    assert_eq!(log.winner(1).map(|winner| winner.value.clone()), Some(Bytes::from_static(b"A")));
    assert_eq!(log.next_offset(), 4);
}

#[test]
fn a_topic_that_was_created_anew_goes_on() {
    let mut log = Log::new("shop");
    push(&mut log, 0, "shop/1/a", Some("A"));
    push(&mut log, 1, "shop/2/a", Some("B"));
    assert_eq!(push(&mut log, 0, "shop/3/a", Some("C")), Meaning::Head(3));
    assert_eq!((log.head(), log.next_offset()), (3, 1));
}

#[test]
fn other_meshes_and_foreign_keys_are_ignored() {
    let mut log = Log::new("shop");
    for (offset, key) in
        ["shop2/1/a", "shop/x/1/a", "shop/1", "shop/1/", "shop/01/a", "shop/+1/a", "shop/0/a", "shop/7/8/a", "", "shop/-1/a"]
            .iter()
            .chain(&["shop/abort/1/", "shop/abort/x", "shop/abort/x/1", "shop/abort/1/a/b", "shop2/abort/1/a"])
            .enumerate()
    {
        assert_eq!(push(&mut log, offset as i64, key, Some("A")), Meaning::Foreign, "{key}");
    }
    assert_eq!(log.push(20, None, Some(&Bytes::new())), Meaning::Foreign);
    assert_eq!(log.push(21, Some(&Bytes::from_static(b"\xff/1/a")), None), Meaning::Foreign);
    assert_eq!(log.head(), 0);
}

#[test]
fn the_last_word_on_a_pause_counts() {
    let mut log = Log::new("shop");
    let pause = r#"{"by":"ann","sinceMs":5,"reason":"migration"}"#;
    assert_eq!(push(&mut log, 0, "shop/pause/work", Some(pause)), Meaning::Pause("work".to_owned()));
    assert_eq!(log.pauses()["work"].to_string(), "paused by ann at 1970-01-01T00:00:00Z: migration");
    push(&mut log, 1, "shop/pause/other", Some("what is that"));
    assert_eq!(log.pauses()["other"].to_string(), "paused");
    let seen = log.pauses();
    push(&mut log, 2, "shop/pause/work", None);
    assert_eq!(log.pauses().keys().collect::<Vec<_>>(), ["other"]);
    assert_eq!(seen.len(), 2, "what somebody looks at stays");
    assert_eq!(push(&mut log, 3, "other/pause/work", Some(pause)), Meaning::Foreign);
    assert_eq!(push(&mut log, 4, "shop/pause/a/b", Some(pause)), Meaning::Foreign);
    assert_eq!((log.head(), log.next_offset()), (0, 5));
}

#[test]
fn the_record_in_force_is_never_deleted() {
    let mut log = Log::new("shop");
    push(&mut log, 0, "shop/1/a", Some("A"));
    assert_eq!(push(&mut log, 1, "shop/1/a", None), Meaning::DeletedHead);
    assert!(log.winner(1).is_some());
    push(&mut log, 2, "shop/2/a", Some("A"));
    assert_eq!(push(&mut log, 3, "shop/1/a", None), Meaning::Deleted);
    assert!(log.winner(1).is_none());
}

fn member<'a>(instance: &'a str, labels: &'a HashMap<String, String>) -> Member<'a> {
    Member { instance, services: &[], labels }
}

#[test]
fn a_canary_is_run_by_those_that_it_chooses_until_it_is_over() {
    let none = HashMap::new();
    let (a, b) = (member("a", &none), member("b", &none));
    let mut log = Log::new("shop");
    let targets = |log: &Log| (log.target(&a), log.target(&b));
    push(&mut log, 0, "shop/1/x", Some("A"));
    assert_eq!(push(&mut log, 1, "shop/2/x/canary instance=a", Some("B")), Meaning::Head(2));
    assert_eq!((targets(&log), log.canary().map(|(open, _)| open), log.stable()), ((2, 1), Some(2), 1));
    assert_eq!(push(&mut log, 2, "shop/abort/2", Some(r#"{"by":"ann","reason":"no"}"#)), Meaning::Abort(2));
    assert_eq!((targets(&log), log.canary().is_some(), log.head()), ((1, 1), false, 2));
    assert_eq!(log.aborted(2).map(|abort| abort.reason.as_str()), Some("no"));
    push(&mut log, 3, "shop/3/x/canary instance=b", Some("C"));
    assert_eq!(targets(&log), (1, 3));
    assert!(!log.may_run(2, &a) && log.may_run(1, &a) && !log.may_run(3, &a));
    // One that this version does not understand claims its generation, and nobody here runs it.
    push(&mut log, 4, "shop/4/x/canary moon=full", Some("D"));
    assert_eq!((targets(&log), log.head(), log.canary().map(|(open, _)| open)), ((1, 1), 4, Some(4)));
    push(&mut log, 5, "shop/5/x", Some("E"));
    assert_eq!((targets(&log), log.canary().is_some(), log.stable()), ((5, 5), false, 5));
    // What is no canary cannot be ended.
    assert_eq!(push(&mut log, 6, "shop/abort/5/x", Some("{}")), Meaning::LateAbort(5));
    assert_eq!(push(&mut log, 7, "shop/abort/9/x", Some("{}")), Meaning::LateAbort(9));
    assert_eq!((targets(&log), log.aborted(5), log.aborted(9)), ((5, 5), None, None));
}

const CANARY_KEY: &str = "shop/2/x/canary instance=a";

/// A log with a canary that is open.
fn with_canary() -> Log {
    let mut log = Log::new("shop");
    push(&mut log, 0, "shop/1/x", Some("A"));
    assert_eq!(push(&mut log, 1, CANARY_KEY, Some("B")), Meaning::Head(2));
    log
}

#[test]
fn a_promotion_behind_the_end_of_its_canary_claims_nothing() {
    let mut log = with_canary();
    assert_eq!(log.fate(3, b"shop/3/promotes-p"), Fate::Open);
    assert_eq!(push(&mut log, 2, "shop/abort/2/a", Some(r#"{"by":"ann","reason":"no"}"#)), Meaning::Abort(2));
    let ended = Fate::Ended(Abort { by: "ann".into(), reason: "no".into(), ..Abort::default() });
    assert_eq!(log.fate(3, b"shop/3/promotes-p"), ended, "known before it is read");
    assert_eq!(push(&mut log, 3, "shop/3/promotes-p", Some("B")), Meaning::Beaten(3));
    assert_eq!((log.head(), log.stable(), log.canary(), log.after(2), log.winner(3)), (2, 1, None, None, None));
    // Another end says nothing new.
    assert_eq!(push(&mut log, 4, "shop/abort/2/b", Some(r#"{"by":"bob"}"#)), Meaning::LateAbort(2));
    assert_eq!(log.aborted(2).map(|abort| abort.by.as_str()), Some("ann"));
    // Its generation is free for what promotes nothing.
    assert_eq!(log.fate(3, b"shop/3/y"), Fate::Open);
    assert_eq!(push(&mut log, 5, "shop/3/y", Some("C")), Meaning::Head(3));
    assert_eq!((log.fate(3, b"shop/3/y"), log.fate(3, b"shop/3/promotes-p")), (Fate::Won, ended));
    assert_eq!(log.fate(3, b"shop/3/z"), Fate::Beaten(log.winner(3).unwrap().clone()));
    assert_eq!((log.head(), log.stable()), (3, 3));
}

#[test]
fn an_end_behind_the_promotion_of_its_canary_counts_for_nothing() {
    for newer in ["shop/3/promotes-p", "shop/3/y", "shop/3/y/canary instance=b"] {
        let mut log = with_canary();
        assert_eq!(push(&mut log, 2, newer, Some("B")), Meaning::Head(3));
        assert_eq!(push(&mut log, 3, "shop/abort/2/a", Some("{}")), Meaning::LateAbort(2), "{newer}");
        assert_eq!((log.head(), log.aborted(2), log.after(2), log.fate(3, newer.as_bytes())), (3, None, Some(3), Fate::Won));
        // Nor for who reads that again.
        assert_eq!(push(&mut log, 1, CANARY_KEY, Some("B")), Meaning::Beaten(2));
        push(&mut log, 2, newer, Some("B"));
        assert_eq!(push(&mut log, 3, "shop/abort/2/a", Some("{}")), Meaning::LateAbort(2));
        assert_eq!((log.head(), log.aborted(2)), (3, None));
        // A promotion of what is over comes too late as any other.
        assert_eq!(push(&mut log, 4, "shop/3/promotes-q", Some("B")), Meaning::Beaten(3));
        assert!(matches!(log.fate(3, b"shop/3/promotes-q"), Fate::Beaten(_)));
    }
}

/// Two instances of a canary can end it at the same moment.
#[test]
fn compaction_keeps_the_first_end_of_a_canary() {
    let stored = |key: &str| (Bytes::copy_from_slice(key.as_bytes()), Some(Bytes::from_static(b"{}")));
    let keys = ["shop/1/x", CANARY_KEY, "shop/abort/2/a", "shop/3/promotes-p", "shop/abort/2/b"];
    let records: Vec<Stored> = keys.iter().zip(0..).map(|(key, offset)| (offset, stored(key).0, stored(key).1)).collect();
    let late = fold(&compacted(&records, records.len(), false));
    assert_eq!((late.head(), late.stable(), late.aborted(2).is_some()), (2, 1, true));
}

/// As versions wrote it before a promotion and an end had keys that say so.
#[test]
fn reads_what_older_versions_wrote() {
    let mut log = with_canary();
    assert_eq!(push(&mut log, 2, "shop/abort/2", Some(r#"{"by":"ann"}"#)), Meaning::Abort(2));
    assert_eq!(push(&mut log, 3, "shop/abort/2", Some(r#"{"by":"bob"}"#)), Meaning::LateAbort(2));
    assert_eq!(log.aborted(2).map(|abort| abort.by.as_str()), Some("ann"));
    assert_eq!(push(&mut log, 4, "shop/3/9f", Some("B")), Meaning::Head(3), "what it promotes is told in its value alone");
    for generation in 4..=KEEP + 3 {
        push(&mut log, generation as i64 + 10, &format!("shop/{generation}/w"), Some("A"));
    }
    assert_eq!(log.deletable().last(), Some(&Bytes::from_static(b"shop/abort/2")));
    assert_eq!(push(&mut log, 100, "shop/abort/2", None), Meaning::Deleted);
    assert_eq!(log.aborted(2), None);
}

#[test]
fn an_end_is_deleted_after_what_lost_by_it() {
    let mut log = with_canary();
    push(&mut log, 2, "shop/abort/2/a", Some("{}"));
    push(&mut log, 3, "shop/abort/2/b", Some("{}"));
    push(&mut log, 4, "shop/3/promotes-p", Some("B"));
    for generation in 3..=KEEP + 2 {
        push(&mut log, generation as i64 + 10, &format!("shop/{generation}/w"), Some("A"));
    }
    let texts = |keys: Vec<Bytes>| keys.iter().map(|key| String::from_utf8_lossy(key).into_owned()).collect::<Vec<_>>();
    assert_eq!(texts(log.deletable()), ["shop/abort/2/b", "shop/1/x"]);
    push(&mut log, 100, &format!("shop/{}/w", KEEP + 3), Some("A"));
    let expected = ["shop/3/promotes-p", "shop/abort/2/b", "shop/1/x", CANARY_KEY, "shop/3/w", "shop/abort/2/a"];
    assert_eq!(texts(log.deletable()), expected);
}

#[test]
fn the_newest_stable_generation_stays_however_old_it_is() {
    let mut log = Log::new("shop");
    push(&mut log, 0, "shop/1/w", Some("A"));
    for generation in 2..=KEEP + 5 {
        push(&mut log, 10 * generation as i64, &format!("shop/{generation}/w/canary percent=1"), Some("B"));
        if generation == 3 {
            push(&mut log, 31, "shop/abort/3/x", Some("{}"));
        }
    }
    let deletable = log.deletable();
    assert_eq!((deletable.len(), &*deletable[0], &*deletable[4]), (5, &b"shop/2/w/canary percent=1"[..], &b"shop/abort/3/x"[..]));
    assert_eq!(push(&mut log, 1_000, "shop/1/w", None), Meaning::DeletedHead);
    assert_eq!(log.stable(), 1);
}

#[test]
fn old_generations_are_deletable_losers_first() {
    let mut log = Log::new("shop");
    push(&mut log, 0, "shop/1/w", Some("A"));
    push(&mut log, 1, "shop/1/l", Some("A"));
    for generation in 2..=KEEP {
        push(&mut log, generation as i64, &format!("shop/{generation}/w"), Some("A"));
    }
    assert!(log.deletable().is_empty());
    push(&mut log, 100, &format!("shop/{}/w", KEEP + 1), Some("A"));
    assert_eq!(log.deletable(), [Bytes::from_static(b"shop/1/l"), Bytes::from_static(b"shop/1/w")]);
}

type Stored = (i64, Bytes, Option<Bytes>);

fn fold(records: &[Stored]) -> Log {
    let mut log = Log::new("shop");
    for (offset, key, value) in records {
        log.push(*offset, Some(key), value.as_ref());
    }
    log
}

/// What a proposal is.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Stable,
    Canary,
    Promotion,
}

/// What a writer does next: how many records behind the end its view ends, what it writes, and whether that is garbage or another mesh's record.
#[derive(Clone, Debug)]
enum Step {
    Propose { behind: usize, garbage: bool, kind: Kind },
    Abort { behind: usize, before: u64 },
    Clean { behind: usize },
    Other,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop_oneof![2 => Just(Kind::Stable), 3 => Just(Kind::Canary), 3 => Just(Kind::Promotion)];
    prop::collection::vec(
        prop_oneof![
            8 => (0usize..5, any::<bool>(), kind).prop_map(|(behind, garbage, kind)| Step::Propose { behind, garbage, kind }),
            3 => (0usize..5, prop_oneof![3 => Just(0), 1 => 0u64..3]).prop_map(|(behind, before)| Step::Abort { behind, before }),
            1 => (0usize..5).prop_map(|behind| Step::Clean { behind }),
            1 => Just(Step::Other),
        ],
        1..300,
    )
}

/// The log that writers with stale views leave behind: each proposes its own view's head + 1. Older ones do not mark promotions, and write each end
/// of a canary under the same key.
fn written(steps: &[Step], older: bool) -> Vec<Stored> {
    let mut records: Vec<Stored> = Vec::new();
    for step in steps {
        let offset = records.len() as i64;
        let seen = |behind: usize| fold(&records[..records.len().saturating_sub(behind)]);
        match step {
            Step::Propose { behind, garbage, kind } => {
                let (id, channel) = match kind {
                    Kind::Stable => (offset.to_string(), "stable"),
                    Kind::Canary => (offset.to_string(), "canary percent=50"),
                    Kind::Promotion if older => (offset.to_string(), "stable"),
                    Kind::Promotion => (promotion_id(&offset.to_string()), "stable"),
                };
                let key = proposal_key("shop", seen(*behind).head() + 1, &id, &channel.parse().unwrap());
                let value = if *garbage { "garbage".to_owned() } else { format!("table {offset}") };
                records.push((offset, key.into(), Some(value.into())));
            }
            Step::Abort { behind, before } => {
                let generation = seen(*behind).head().saturating_sub(*before).max(1);
                let key = if older { format!("shop/abort/{generation}") } else { abort_key("shop", generation, &offset.to_string()) };
                records.push((offset, key.into(), Some(Bytes::from_static(b"{}"))));
            }
            Step::Clean { behind } => {
                for key in seen(*behind).deletable() {
                    records.push((records.len() as i64, key, None));
                }
            }
            Step::Other => records.push((offset, Bytes::from_static(b"other/99999/x"), Some(Bytes::from_static(b"x")))),
        }
    }
    records
}

/// What the broker's compaction leaves: of each key the last record up to `until`, and possibly no tombstone.
fn compacted(records: &[Stored], until: usize, tombstones: bool) -> Vec<Stored> {
    let (old, new) = records.split_at(until.min(records.len()));
    let last: BTreeMap<&Bytes, i64> = old.iter().map(|(offset, key, _)| (key, *offset)).collect();
    let kept = old.iter().filter(|(offset, key, value)| last[key] == *offset && (tombstones || value.is_some()));
    kept.chain(new).cloned().collect()
}

/// That two readers know the same of what is in force, and of the history that is kept.
fn same(one: &Log, other: &Log, ends: bool) -> Result<(), TestCaseError> {
    prop_assert_eq!(one.head(), other.head());
    prop_assert_eq!((one.stable(), one.canary()), (other.stable(), other.canary()));
    prop_assert_eq!(one.winner(one.stable()), other.winner(other.stable()));
    for generation in one.head().saturating_sub(KEEP) + 1..=one.head() {
        prop_assert_eq!(one.winner(generation), other.winner(generation));
        if ends {
            prop_assert_eq!(one.aborted(generation), other.aborted(generation));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn readers_agree_wherever_they_start(
        steps in steps(), older: bool, until in 0usize..400, tombstones: bool, pause in 0usize..400
    ) {
        let records = written(&steps, older);
        let whole = fold(&records);
        // A reader that comes after a compaction. Of an older version's marks compaction keeps the last, which can be behind a newer generation.
        let remaining = compacted(&records, until, tombstones);
        same(&fold(&remaining), &whole, !older)?;

        // Readers that stopped somewhere, and read from the beginning again after a reconnect: before a compaction, and after one.
        for rest in [&records, &remaining] {
            let mut again = fold(&records[..pause.min(records.len())]);
            for (offset, key, value) in rest {
                again.push(*offset, Some(key), value.as_ref());
            }
            same(&again, &whole, !older)?;
        }
    }

    #[test]
    fn generations_only_grow_and_have_one_winner(steps in steps(), older: bool) {
        let mut log = Log::new("shop");
        let (mut head, mut claimed) = (0, BTreeSet::new());
        for (offset, key, value) in &written(&steps, older) {
            if let Meaning::Head(generation) = log.push(*offset, Some(key), value.as_ref()) {
                prop_assert!(claimed.insert(generation));
            }
            prop_assert!(log.head() >= head);
            head = log.head();
        }
    }

    /// What a writer is told when its record was read is what all find, whatever comes later; and a canary is promoted or aborted, never both.
    #[test]
    fn what_became_of_a_proposal_never_changes(steps in steps()) {
        let records = written(&steps, false);
        let mut log = Log::new("shop");
        let mut told: Vec<(u64, &Bytes, Fate)> = Vec::new();
        for (offset, key, value) in &records {
            let proposal = parse_key("shop", key).filter(|_| value.is_some());
            let before = proposal.as_ref().map(|proposal| log.fate(proposal.generation, key));
            let meaning = log.push(*offset, Some(key), value.as_ref());
            if let (Some(Proposal { generation, promotes, .. }), Some(before)) = (proposal, before) {
                let fate = log.fate(generation, key);
                prop_assert!(fate != Fate::Open && (before == Fate::Open || before == fate), "{:?} {:?}", before, fate);
                prop_assert_eq!(fate == Fate::Won, meaning == Meaning::Head(generation));
                prop_assert!(promotes || !matches!(fate, Fate::Ended(_)));
                told.push((generation, key, fate));
            }
        }
        for (generation, key, fate) in told {
            // What is older may be deleted.
            if generation + KEEP > log.head() {
                prop_assert_eq!(&log.fate(generation, key), &fate);
            }
            if fate == Fate::Won && parse_key("shop", key).is_some_and(|proposal| proposal.promotes) {
                prop_assert_eq!(log.aborted(generation - 1), None);
            }
        }
    }
}
