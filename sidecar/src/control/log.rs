//! The control log: which record of `__mesh.control` carries the table in force. Pure.
//!
//! A record is a proposal for one generation, under a key of its own: `<mesh>/<generation>/<id>`, or `<mesh>/<generation>/<id>/canary …` for a canary,
//! with whom it chooses. Or it is a mark, of which the last record counts: a route's pause, `<mesh>/pause/<route>`, or the end of a canary,
//! `<mesh>/abort/<generation>`.
//!
//! Invariant: the first record of a generation in log order wins it, whatever its value is. A reader that cannot read the value
//! comes to the same winner as one that can, and refuses the table, not the generation.
//! Invariant: the head is the highest generation that was claimed; it never goes back.
//! Invariant: a canary is open while it is the head and not aborted. All that it does not choose run the newest stable generation, and all do when it
//! is over.
//! Invariant: only generations that are [`KEEP`] or more behind are deleted, and never the newest stable one, so a compacted log has the same head as
//! the whole one.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use mesh_routing::channel::{Channel, Member};
use serde::{Deserialize, Serialize};

use crate::pause::Pauses;

/// How many generations are kept in the log.
pub(crate) const KEEP: u64 = 50;

/// How many beaten or stray keys are remembered for deletion, so that a broken writer cannot fill the memory.
const MAX_LOSERS: usize = 1_024;

/// How many routes can be paused at once: more than a mesh has.
const MAX_PAUSES: usize = 100_000;

/// What the channel of a canary begins with, in a key.
const CANARY: &str = "canary ";

/// The key of a proposal.
pub(crate) fn proposal_key(mesh: &str, generation: u64, id: &str, channel: &Channel) -> String {
    match channel {
        Channel::Stable => format!("{mesh}/{generation}/{id}"),
        Channel::Canary(_) => format!("{mesh}/{generation}/{id}/{channel}"),
    }
}

/// The generation that a key proposes for this mesh, and for whom: `None` for a channel that this version does not understand, which claims its
/// generation all the same. `None` at all for another mesh's record, or a foreign one.
fn parse_key(mesh: &str, key: &[u8]) -> Option<(u64, Option<Channel>)> {
    let rest = std::str::from_utf8(key).ok()?.strip_prefix(mesh)?.strip_prefix('/')?;
    let (generation, id) = rest.split_once('/')?;
    let generation = parse_generation(generation)?;
    let (id, channel) = match id.split_once('/') {
        None => (id, Some(Channel::Stable)),
        Some((id, channel)) if channel.starts_with(CANARY) => (id, channel.parse().ok()),
        Some(_) => return None,
    };
    (!id.is_empty()).then_some((generation, channel))
}

fn parse_generation(text: &str) -> Option<u64> {
    let canonical = text == "0" || !text.starts_with(['0', '+']);
    text.parse::<u64>().ok().filter(|generation| canonical && *generation > 0)
}

/// The key of the end of a canary.
pub(crate) fn abort_key(mesh: &str, generation: u64) -> String {
    format!("{mesh}/abort/{generation}")
}

/// The generation that a key is the end of.
fn parse_abort(mesh: &str, key: &[u8]) -> Option<u64> {
    parse_generation(std::str::from_utf8(key).ok()?.strip_prefix(mesh)?.strip_prefix("/abort/")?)
}

/// That a canary is over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Abort {
    /// Who ended it.
    pub(crate) by: String,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub(crate) at_ms: i64,
    /// Why.
    pub(crate) reason: String,
}

/// The key of a route's pause.
pub(crate) fn pause_key(mesh: &str, route: &str) -> String {
    format!("{mesh}/pause/{route}")
}

/// The route that a key is the pause of.
fn parse_pause<'a>(mesh: &str, key: &'a [u8]) -> Option<&'a str> {
    let route = std::str::from_utf8(key).ok()?.strip_prefix(mesh)?.strip_prefix("/pause/")?;
    (!route.is_empty() && !route.contains('/')).then_some(route)
}

/// A record that won its generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Winner {
    /// Its key.
    pub(crate) key: Bytes,
    /// Its offset.
    pub(crate) offset: i64,
    /// The snapshot, as stored.
    pub(crate) value: Bytes,
    /// For whom it is, by its key; `None` for a channel that this version does not understand.
    pub(crate) channel: Option<Channel>,
}

/// What a record meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// It claimed this generation, which is the newest now.
    Head(u64),
    /// It came too late for this generation.
    Beaten(u64),
    /// It deleted an old record.
    Deleted,
    /// It asked to delete the record in force, which is never done: this is somebody's mistake.
    DeletedHead,
    /// It pauses this route, or lets it go on.
    Pause(String),
    /// It ends the canary of this generation.
    Abort(u64),
    /// It is not of this mesh.
    Foreign,
}

/// The fold over the records of the control topic.
#[derive(Debug)]
pub(crate) struct Log {
    mesh: String,
    next_offset: i64,
    head: u64,
    winners: BTreeMap<u64, Winner>,
    losers: BTreeMap<Bytes, u64>,
    pauses: Arc<Pauses>,
    aborts: BTreeMap<u64, Abort>,
}

impl Log {
    /// An empty log of a mesh.
    pub(crate) fn new(mesh: &str) -> Self {
        Self {
            mesh: mesh.to_owned(),
            next_offset: 0,
            head: 0,
            winners: BTreeMap::new(),
            losers: BTreeMap::new(),
            pauses: Arc::default(),
            aborts: BTreeMap::new(),
        }
    }

    /// Takes the next record. One that was taken before changes nothing, so a reader may begin again; and a topic that was deleted and
    /// created anew, whose offsets begin anew, goes on where the old one ended.
    pub(crate) fn push(&mut self, offset: i64, key: Option<&Bytes>, value: Option<&Bytes>) -> Meaning {
        self.next_offset = offset + 1;
        if let Some(route) = key.and_then(|key| parse_pause(&self.mesh, key)) {
            return self.pause(route, value);
        }
        if let Some(generation) = key.and_then(|key| parse_abort(&self.mesh, key)) {
            return self.abort(offset, generation, value);
        }
        let Some((key, (generation, channel))) = key.and_then(|key| Some((key, parse_key(&self.mesh, key)?))) else {
            return Meaning::Foreign;
        };
        let Some(value) = value else { return self.delete(key, generation) };
        if generation > self.head {
            self.head = generation;
            // Own copies: slices would keep the whole fetched batch alive.
            let winner = Winner { key: Bytes::copy_from_slice(key), offset, value: Bytes::copy_from_slice(value), channel };
            self.winners.insert(generation, winner);
            return Meaning::Head(generation);
        }
        if self.losers.len() < MAX_LOSERS && self.winners.get(&generation).is_none_or(|winner| winner.key != *key) {
            self.losers.insert(Bytes::copy_from_slice(key), generation);
        }
        Meaning::Beaten(generation)
    }

    fn delete(&mut self, key: &Bytes, generation: u64) -> Meaning {
        self.losers.remove(key);
        if self.winners.get(&generation).is_some_and(|winner| winner.key == *key) {
            if generation == self.head || generation == self.stable() {
                return Meaning::DeletedHead;
            }
            self.winners.remove(&generation);
        }
        Meaning::Deleted
    }

    /// The last record of a route says whether it is paused. What cannot be read pauses it all the same: somebody wanted that.
    fn pause(&mut self, route: &str, value: Option<&Bytes>) -> Meaning {
        let pauses = Arc::make_mut(&mut self.pauses);
        match value {
            None => drop(pauses.remove(route)),
            Some(_) if pauses.len() >= MAX_PAUSES && !pauses.contains_key(route) => {}
            Some(value) => drop(pauses.insert(route.to_owned(), serde_json::from_slice(value).unwrap_or_default())),
        }
        Meaning::Pause(route.to_owned())
    }

    /// What cannot be read ends it all the same: somebody wanted that.
    fn abort(&mut self, offset: i64, generation: u64, value: Option<&Bytes>) -> Meaning {
        match value {
            None => drop(self.aborts.remove(&generation)),
            // Of what is no canary, or not any more, nothing is remembered, and nothing counts that was there before it: also for who reads it again.
            Some(_) if !self.winners.get(&generation).is_some_and(|winner| winner.is_canary() && winner.offset < offset) => {}
            Some(value) => drop(self.aborts.insert(generation, serde_json::from_slice(value).unwrap_or_default())),
        }
        Meaning::Abort(generation)
    }

    /// How a canary ended; `None` while it is open, and where a newer generation took its place.
    pub(crate) fn aborted(&self, generation: u64) -> Option<&Abort> {
        self.aborts.get(&generation)
    }

    /// The newest generation that is meant for all; 0 if there is none.
    pub(crate) fn stable(&self) -> u64 {
        self.winners.iter().rev().find(|(_, winner)| !winner.is_canary()).map_or(0, |(generation, _)| *generation)
    }

    /// The canary that is open, if there is one.
    pub(crate) fn canary(&self) -> Option<(u64, &Winner)> {
        let head = self.winners.get(&self.head).filter(|head| head.is_canary() && !self.aborts.contains_key(&self.head))?;
        Some((self.head, head))
    }

    /// Whether a member may run a generation: one that is meant for all, or the open canary, if it is chosen.
    pub(crate) fn may_run(&self, generation: u64, member: &Member<'_>) -> bool {
        match self.winners.get(&generation) {
            Some(winner) if winner.is_canary() => self.canary().is_some_and(|(open, winner)| open == generation && winner.chooses(member)),
            Some(_) | None => true,
        }
    }

    /// The generation that a member ought to run.
    pub(crate) fn target(&self, member: &Member<'_>) -> u64 {
        if self.may_run(self.head, member) { self.head } else { self.stable() }
    }

    /// The routes that are paused.
    pub(crate) fn pauses(&self) -> Arc<Pauses> {
        self.pauses.clone()
    }

    /// Notes that everything below this offset was passed.
    pub(crate) fn passed(&mut self, offset: i64) {
        self.next_offset = self.next_offset.max(offset);
    }

    /// The offset after the last one that was passed.
    pub(crate) fn next_offset(&self) -> i64 {
        self.next_offset
    }

    /// The newest generation; 0 if there is none.
    pub(crate) fn head(&self) -> u64 {
        self.head
    }

    /// The record that won a generation; `None` if there is none, or it was deleted.
    pub(crate) fn winner(&self, generation: u64) -> Option<&Winner> {
        self.winners.get(&generation)
    }

    /// The generations that exist, the newest first.
    pub(crate) fn generations(&self) -> impl Iterator<Item = u64> {
        self.winners.keys().rev().copied()
    }

    /// The keys to delete now: everything of generations that are [`KEEP`] or more behind, the beaten before the winners. The newest that is meant for
    /// all stays, however old it is.
    pub(crate) fn deletable(&self) -> Vec<Bytes> {
        let Some(last) = self.head.checked_sub(KEEP) else { return Vec::new() };
        let stable = self.stable();
        let losers = self.losers.iter().filter(|(_, generation)| **generation <= last).map(|(key, _)| key.clone());
        let aborts = self.aborts.keys().take_while(|generation| **generation <= last);
        let aborts = aborts.map(|generation| Bytes::from(abort_key(&self.mesh, *generation)));
        let winners = self.winners.range(..=last).filter(|(generation, _)| **generation != stable);
        losers.chain(winners.map(|(_, winner)| winner.key.clone())).chain(aborts).collect()
    }
}

impl Winner {
    /// Whether it is not meant for all.
    pub(crate) fn is_canary(&self) -> bool {
        self.channel != Some(Channel::Stable)
    }

    /// Whether it is meant for a member.
    fn chooses(&self, member: &Member<'_>) -> bool {
        match &self.channel {
            Some(Channel::Stable) => true,
            Some(Channel::Canary(selector)) => selector.chooses(member),
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
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
        push(&mut log, 6, "shop/abort/5", Some("{}"));
        push(&mut log, 7, "shop/abort/9", Some("{}"));
        assert_eq!((targets(&log), log.aborted(5), log.aborted(9)), ((5, 5), None, None));
    }

    #[test]
    fn the_newest_stable_generation_stays_however_old_it_is() {
        let mut log = Log::new("shop");
        push(&mut log, 0, "shop/1/w", Some("A"));
        for generation in 2..=KEEP + 5 {
            push(&mut log, generation as i64, &format!("shop/{generation}/w/canary percent=1"), Some("B"));
        }
        push(&mut log, 100, "shop/abort/3", Some("{}"));
        let deletable = log.deletable();
        assert_eq!((deletable.len(), &*deletable[0], &*deletable[4]), (5, &b"shop/2/w/canary percent=1"[..], &b"shop/abort/3"[..]));
        assert_eq!(push(&mut log, 101, "shop/1/w", None), Meaning::DeletedHead);
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

    /// What a writer does next: which one, how stale its view is, and whether it writes garbage or another mesh's record.
    #[derive(Clone, Debug)]
    enum Step {
        Propose { behind: usize, garbage: bool, canary: bool },
        Abort { behind: u64 },
        Clean,
        Other,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        prop::collection::vec(
            prop_oneof![
                8 => (0usize..5, any::<bool>(), any::<bool>())
                    .prop_map(|(behind, garbage, canary)| Step::Propose { behind, garbage, canary }),
                2 => (0u64..3).prop_map(|behind| Step::Abort { behind }),
                1 => Just(Step::Clean),
                1 => Just(Step::Other),
            ],
            1..300,
        )
    }

    /// The log that writers with stale views leave behind: each proposes its own view's head + 1.
    fn written(steps: &[Step]) -> Vec<Stored> {
        let mut records: Vec<Stored> = Vec::new();
        for step in steps {
            let offset = records.len() as i64;
            match step {
                Step::Propose { behind, garbage, canary } => {
                    let seen = fold(&records[..records.len().saturating_sub(*behind)]);
                    let channel = if *canary { "canary percent=50" } else { "stable" };
                    let key = proposal_key("shop", seen.head() + 1, &offset.to_string(), &channel.parse().unwrap());
                    let value = if *garbage { "garbage".to_owned() } else { format!("table {offset}") };
                    records.push((offset, key.into(), Some(value.into())));
                }
                Step::Abort { behind } => {
                    let head = fold(&records).head();
                    records.push((offset, abort_key("shop", head.saturating_sub(*behind).max(1)).into(), Some(Bytes::from_static(b"{}"))));
                }
                Step::Clean => {
                    for key in fold(&records).deletable() {
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn readers_agree_wherever_they_start(steps in steps(), until in 0usize..400, tombstones: bool, pause in 0usize..400) {
            let records = written(&steps);
            let whole = fold(&records);

            // A reader that comes after a compaction.
            let late = fold(&compacted(&records, until, tombstones));
            prop_assert_eq!(late.head(), whole.head());
            prop_assert_eq!(late.winner(late.head()), whole.winner(whole.head()));
            prop_assert_eq!((late.stable(), late.canary()), (whole.stable(), whole.canary()));
            prop_assert_eq!(late.winner(late.stable()), whole.winner(whole.stable()));
            // Within the window that is kept, the history is the same too.
            for generation in whole.head().saturating_sub(KEEP) + 1..=whole.head() {
                prop_assert_eq!(late.winner(generation), whole.winner(generation));
            }

            // A reader that stopped somewhere, and reads from the beginning again after a reconnect.
            let mut again = fold(&records[..pause.min(records.len())]);
            for (offset, key, value) in &records {
                again.push(*offset, Some(key), value.as_ref());
            }
            prop_assert_eq!(again.head(), whole.head());
            prop_assert_eq!(again.winner(again.head()), whole.winner(whole.head()));
            prop_assert_eq!((again.stable(), again.canary()), (whole.stable(), whole.canary()));
        }

        #[test]
        fn generations_only_grow_and_have_one_winner(steps in steps()) {
            let records = written(&steps);
            let mut log = Log::new("shop");
            let (mut head, mut claimed) = (0, BTreeSet::new());
            for (offset, key, value) in &records {
                if let Meaning::Head(generation) = log.push(*offset, Some(key), value.as_ref()) {
                    prop_assert!(claimed.insert(generation));
                }
                prop_assert!(log.head() >= head);
                head = log.head();
            }
        }
    }
}
