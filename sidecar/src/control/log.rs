//! The control log: which record of `__mesh.control` carries the table in force. Pure.
//!
//! A record is a proposal for one generation, under a key of its own: `<mesh>/<generation>/<id>`, or `<mesh>/<generation>/<id>/canary …` for a canary,
//! with whom it chooses. The id of a promotion begins with `promotes-`: its canary is the generation before it. The end of a canary has a key of its own,
//! too, `<mesh>/abort/<generation>/<id>`, so that compaction keeps the first of several; older versions wrote it without the id. A route's pause is a
//! mark, `<mesh>/pause/<route>`, of which the last record counts.
//!
//! Invariant: the first record of a generation in log order wins it, whatever its value is. A reader that cannot read the value
//! comes to the same winner as one that can, and refuses the table, not the generation.
//! Invariant: the head is the highest generation that was claimed; it never goes back.
//! Invariant: a canary is open while it is the head and not aborted. All that it does not choose run the newest stable generation, and all do when it
//! is over.
//! Invariant: of a canary's end and any newer generation the first in log order counts. An end that is read when its canary is not open counts for
//! nothing, and a promotion that is read when its canary has ended claims nothing: the next proposal has its generation.
//! Invariant: only generations that are [`KEEP`] or more behind are deleted, and never the newest stable one, so a compacted log has the same head as
//! the whole one. What lost goes first, and an ended canary last, with its end: no reader sees the one without what it lost by.

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

/// What the id of a promotion begins with, in a key: older versions see an id like any other.
const PROMOTES: &str = "promotes-";

/// The id of a proposal that promotes the generation before it.
pub(crate) fn promotion_id(id: &str) -> String {
    format!("{PROMOTES}{id}")
}

/// The key of a proposal.
pub(crate) fn proposal_key(mesh: &str, generation: u64, id: &str, channel: &Channel) -> String {
    match channel {
        Channel::Stable => format!("{mesh}/{generation}/{id}"),
        Channel::Canary(_) => format!("{mesh}/{generation}/{id}/{channel}"),
    }
}

/// What a key proposes.
struct Proposal {
    generation: u64,
    /// For whom: `None` for a channel that this version does not understand, which claims its generation all the same.
    channel: Option<Channel>,
    /// Whether it promotes the generation before it.
    promotes: bool,
}

/// What a key proposes for this mesh. `None` for another mesh's record, or a foreign one.
fn parse_key(mesh: &str, key: &[u8]) -> Option<Proposal> {
    let rest = std::str::from_utf8(key).ok()?.strip_prefix(mesh)?.strip_prefix('/')?;
    let (generation, id) = rest.split_once('/')?;
    let generation = parse_generation(generation)?;
    let (id, channel) = match id.split_once('/') {
        None => (id, Some(Channel::Stable)),
        Some((id, channel)) if channel.starts_with(CANARY) => (id, channel.parse().ok()),
        Some(_) => return None,
    };
    (!id.is_empty()).then(|| Proposal { generation, channel, promotes: id.starts_with(PROMOTES) })
}

fn parse_generation(text: &str) -> Option<u64> {
    let canonical = text == "0" || !text.starts_with(['0', '+']);
    text.parse::<u64>().ok().filter(|generation| canonical && *generation > 0)
}

/// The key of the end of a canary.
pub(crate) fn abort_key(mesh: &str, generation: u64, id: &str) -> String {
    format!("{mesh}/abort/{generation}/{id}")
}

/// The generation that a key is the end of.
fn parse_abort(mesh: &str, key: &[u8]) -> Option<u64> {
    let rest = std::str::from_utf8(key).ok()?.strip_prefix(mesh)?.strip_prefix("/abort/")?;
    match rest.split_once('/') {
        None => parse_generation(rest),
        Some((generation, id)) => parse_generation(generation).filter(|_| !id.is_empty() && !id.contains('/')),
    }
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
    /// It came too late for this generation, or after the end of the canary that it promotes.
    Beaten(u64),
    /// It deleted an old record.
    Deleted,
    /// It asked to delete the record in force, which is never done: this is somebody's mistake.
    DeletedHead,
    /// It pauses this route, or lets it go on.
    Pause(String),
    /// It ends the canary of this generation.
    Abort(u64),
    /// It would, but that one is not open: it counts for nothing.
    LateAbort(u64),
    /// It is not of this mesh.
    Foreign,
}

/// What became of a proposal. Once it is known, it does not change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Not known: it was not read yet.
    Open,
    /// Its generation is its own.
    Won,
    /// This one came first.
    Beaten(Winner),
    /// The canary that it promotes ended before it.
    Ended(Abort),
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
    /// The end of each canary that has one, with its key.
    aborts: BTreeMap<u64, (Bytes, Abort)>,
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
        if let Some((key, generation)) = key.and_then(|key| Some((key, parse_abort(&self.mesh, key)?))) {
            return self.abort(offset, key, generation, value);
        }
        let Some((key, proposal)) = key.and_then(|key| Some((key, parse_key(&self.mesh, key)?))) else {
            return Meaning::Foreign;
        };
        let Some(value) = value else { return self.delete(key, proposal.generation) };
        let ended = self.end_before(&proposal).is_some();
        let Proposal { generation, channel, promotes: _ } = proposal;
        if generation > self.head && !ended {
            self.head = generation;
            // Own copies: slices would keep the whole fetched batch alive.
            let winner = Winner { key: Bytes::copy_from_slice(key), offset, value: Bytes::copy_from_slice(value), channel };
            self.winners.insert(generation, winner);
            return Meaning::Head(generation);
        }
        if self.winners.get(&generation).is_none_or(|winner| winner.key != *key) {
            self.lose(key, generation);
        }
        Meaning::Beaten(generation)
    }

    /// Remembers a record that counts for nothing, to delete it.
    fn lose(&mut self, key: &Bytes, generation: u64) {
        if self.losers.len() < MAX_LOSERS {
            self.losers.insert(Bytes::copy_from_slice(key), generation);
        }
    }

    /// How the canary that a proposal promotes ended.
    fn end_before(&self, proposal: &Proposal) -> Option<&Abort> {
        self.aborted(proposal.generation.checked_sub(1).filter(|_| proposal.promotes)?)
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

    /// The first end of a canary that is read while it is open ends it. What cannot be read ends it all the same: somebody wanted that.
    fn abort(&mut self, offset: i64, key: &Bytes, generation: u64, value: Option<&Bytes>) -> Meaning {
        let known = self.aborts.get(&generation).is_some_and(|(known, _)| known == key);
        let Some(value) = value else {
            self.losers.remove(key);
            if known {
                self.aborts.remove(&generation);
            }
            return Meaning::Deleted;
        };
        // What lies before its canary counts for nothing, also for who reads it again.
        if self.canary().is_some_and(|(open, winner)| open == generation && winner.offset < offset) {
            self.aborts.insert(generation, (Bytes::copy_from_slice(key), serde_json::from_slice(value).unwrap_or_default()));
            return Meaning::Abort(generation);
        }
        if !known && generation <= self.head {
            self.lose(key, generation);
        }
        Meaning::LateAbort(generation)
    }

    /// How a canary ended; `None` while it is open, and where a newer generation took its place.
    pub(crate) fn aborted(&self, generation: u64) -> Option<&Abort> {
        self.aborts.get(&generation).map(|(_, abort)| abort)
    }

    /// What became of a proposal with this key for this generation.
    pub(crate) fn fate(&self, generation: u64, key: &[u8]) -> Fate {
        let winner = self.winners.get(&generation);
        if winner.is_some_and(|winner| winner.key == key) {
            return Fate::Won;
        }
        // Nothing newer was there when its canary ended, so wherever it lies, it lies behind that.
        if let Some(abort) = parse_key(&self.mesh, key).and_then(|proposal| self.end_before(&proposal)) {
            return Fate::Ended(abort.clone());
        }
        winner.map_or(Fate::Open, |winner| Fate::Beaten(winner.clone()))
    }

    /// The generation that followed another one.
    pub(crate) fn after(&self, generation: u64) -> Option<u64> {
        self.winners.keys().find(|known| **known > generation).copied()
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

    /// The keys to delete now: everything of generations that are [`KEEP`] or more behind, the beaten before the winners, and those before the ends of
    /// canaries. The newest that is meant for all stays, however old it is.
    pub(crate) fn deletable(&self) -> Vec<Bytes> {
        let Some(last) = self.head.checked_sub(KEEP) else { return Vec::new() };
        let stable = self.stable();
        let losers = self.losers.iter().filter(|(_, generation)| **generation <= last).map(|(key, _)| key.clone());
        // A canary that ended stays one generation longer, with its end: as long as a promotion that came too late for it.
        let stays = |generation: u64| generation == stable || (generation == last && self.aborts.contains_key(&generation));
        let winners = self.winners.range(..=last).filter(|(generation, _)| !stays(**generation));
        let aborts = self.aborts.range(..last).map(|(_, (key, _))| key.clone());
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
mod tests;
