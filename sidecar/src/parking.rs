//! What of a source partition lies in its retry and park topics, and so which of its records have to wait behind it. Floor 0: pure.
//!
//! A record whose attempts in place are used up goes to a retry topic; with `order: key` or `partition` the later records of its key go to the
//! park topic meanwhile. All are known by their **origin**, the offset in the source partition: the order that a key keeps. Of a parked
//! record only its place is kept here; when its turn comes, the park topic is read again from there.
//!
//! Invariant: a record is free to run only if nothing of its key lies before it in a retry topic, in the park topic, or on its way there.
//! Invariant: of a key, parked records run in the order of their origins, whatever their order in the park topic; and of several that lie elsewhere since
//! commits were lost, none runs before an earlier one, wherever they lie.
//! Invariant: of several copies of a record (after a crash) only the one with the most attempts runs.
//! Every operation costs O(log n), releasing aside.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// See the module. One per source partition and assignment.
#[derive(Debug, Default)]
pub struct Parking {
    keys: HashMap<u64, Key>,
    /// The place in the park topic of the next record of each key that may run.
    wanted: BTreeSet<(i64, u64)>,
    /// Offsets of the park topic below this were seen.
    scanned: i64,
    ready: bool,
    sizes: Sizes,
}

/// What of one key lies elsewhere. By origin.
#[derive(Debug, Default)]
struct Key {
    retrying: BTreeMap<i64, Retrying>,
    /// On their way to the park topic: put, and not seen there yet.
    coming: BTreeSet<i64>,
    parked: BTreeMap<i64, Parked>,
    /// Parked ones that are in their lane.
    loaded: BTreeSet<i64>,
    wanted: Option<i64>,
}

#[derive(Clone, Copy, Debug)]
struct Retrying {
    attempts: u32,
    /// Which retry topic it is in, or on its way to.
    tier: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// On its way to its retry topic.
    Coming,
    /// There.
    Stored,
    /// Records were deleted from there: perhaps it, too.
    Suspect,
    /// It was read from there.
    Seen,
}

#[derive(Clone, Copy, Debug)]
struct Parked {
    offset: i64,
    attempts: u32,
    kept: Kept,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// It waits for its turn.
    No,
    /// Its attempts are used up: it waits for somebody.
    Yes,
    Released(Release),
}

/// What somebody decided about a record whose attempts are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Try it again, from the first attempt on.
    Retry,
    /// To the dead-letter topic.
    Discard,
}

/// What becomes of a record that is read from its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// It may run, behind what is in its lane.
    Free,
    /// It has to be parked: something of its key lies before it.
    Behind,
    /// It lies in a retry or park topic already.
    Known,
}

/// What becomes of a record that is read from the park topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It stays where it is.
    Stays,
    /// Its turn has come.
    Load,
    /// Its attempts were used up, and somebody released it.
    Released(Release),
    /// Another copy counts: this offset is complete.
    Duplicate,
    /// This copy counts: the one at that offset of the park topic is complete.
    Instead(i64),
}

/// What becomes of a record that is read from a retry topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundRetry {
    /// It runs when it is due.
    Take,
    /// The same, in place of a copy that was taken before.
    Replace,
    /// Another copy counts: this offset is complete.
    Duplicate,
}

/// How much lies elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Records of which something is remembered here.
    pub tracked: usize,
    /// Records in the park topic, or on their way there.
    pub parked: usize,
    /// Those of them that wait for somebody to release them.
    pub kept: usize,
    /// Parked ones that are in their lanes.
    pub loaded: usize,
}

impl Key {
    fn sizes(&self) -> Sizes {
        let parked = self.coming.len() + self.parked.len() + self.loaded.len();
        // Of a key only the first record can be exhausted: the others never ran.
        let kept = self.parked.first_key_value().is_some_and(|(_, parked)| parked.kept == Kept::Yes);
        Sizes { tracked: parked + self.retrying.len(), parked, kept: usize::from(kept), loaded: self.loaded.len() }
    }

    fn is_empty(&self) -> bool {
        self.sizes().tracked == 0
    }

    fn knows(&self, origin: i64) -> bool {
        self.retrying.contains_key(&origin)
            || self.coming.contains(&origin)
            || self.parked.contains_key(&origin)
            || self.loaded.contains(&origin)
    }

    /// The place of the record whose turn it is, if there is one.
    fn wants(&self) -> Option<i64> {
        let (origin, parked) = self.parked.first_key_value()?;
        (!self.lies_before(*origin) && parked.kept != Kept::Yes).then_some(parked.offset)
    }

    /// Whether something lies before a record, in a retry or park topic or on its way there. What is in its lane does not count.
    fn lies_before(&self, origin: i64) -> bool {
        let first = [self.retrying.keys().next(), self.coming.first(), self.parked.keys().next()];
        first.into_iter().flatten().any(|first| *first < origin)
    }
}

impl Parking {
    /// Nothing, before the park topic is read from `offset` on. Until [`Parking::set_ready`] no parked record runs.
    pub fn new(offset: i64) -> Self {
        Self { scanned: offset, ..Self::default() }
    }

    /// All retry and park topics were looked through: what is not known here does not exist.
    pub fn set_ready(&mut self) {
        self.ready = true;
    }

    /// Until [`Parking::set_ready`] no parked record runs.
    pub fn set_waiting(&mut self) {
        self.ready = false;
    }

    /// Whether nothing lies elsewhere.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// How much lies elsewhere.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Keys of which something lies elsewhere.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// The offset of the park topic from which on it was not seen yet.
    pub fn scanned(&self) -> i64 {
        self.scanned
    }

    /// The lowest offset of the park topic with a record whose turn it is.
    pub fn wanted(&self) -> Option<i64> {
        self.wanted.first().filter(|_| self.ready).map(|(offset, _)| *offset)
    }

    /// What becomes of a record that is read from its source.
    pub fn meets(&self, key: u64, origin: i64) -> Meeting {
        match self.keys.get(&key) {
            None => Meeting::Free,
            Some(key) if key.knows(origin) => Meeting::Known,
            Some(key) if key.retrying.is_empty() && key.coming.is_empty() && key.parked.is_empty() => Meeting::Free,
            Some(_) => Meeting::Behind,
        }
    }

    /// Whether a record in a retry topic has to wait although it is due: one before it of its key lies elsewhere, too.
    pub fn waits(&self, key: u64, origin: i64) -> bool {
        self.keys.get(&key).is_some_and(|key| key.lies_before(origin))
    }

    /// A record is on its way to a retry topic, after so many attempts.
    pub fn hand_over(&mut self, key: u64, origin: i64, attempts: u32, tier: usize) {
        self.edit(key, |key| {
            key.loaded.remove(&origin);
            key.retrying.insert(origin, Retrying { attempts, tier, state: State::Coming });
        });
    }

    /// What was on its way to a retry topic is there.
    pub fn stored(&mut self, key: u64, origin: i64) {
        if let Some(retrying) = self.keys.get_mut(&key).and_then(|key| key.retrying.get_mut(&origin))
            && retrying.state == State::Coming
        {
            retrying.state = State::Stored;
        }
    }

    /// A record is on its way to the park topic.
    pub fn park(&mut self, key: u64, origin: i64) {
        self.edit(key, |key| {
            key.loaded.remove(&origin);
            key.retrying.remove(&origin);
            key.coming.insert(origin);
        });
    }

    /// A parked record leaves its lane without having run: its place is where it was.
    pub fn unload(&mut self, key: u64, origin: i64, offset: i64, attempts: u32) {
        self.edit(key, |key| {
            if key.loaded.remove(&origin) {
                key.parked.insert(origin, Parked { offset, attempts, kept: Kept::No });
            }
        });
    }

    /// A record is complete, wherever it was.
    pub fn finished(&mut self, key: u64, origin: i64) {
        if self.keys.contains_key(&key) {
            self.edit(key, |key| {
                key.retrying.remove(&origin);
                key.coming.remove(&origin);
                key.parked.remove(&origin);
                key.loaded.remove(&origin);
            });
        }
    }

    /// A record is read from a retry topic for the first time of two, before anything runs. Gives the offset of a copy in the park topic that
    /// is complete by that.
    pub fn index_retry(&mut self, key: u64, origin: i64, attempts: u32, tier: usize) -> Option<i64> {
        self.edit(key, |key| {
            match key.parked.get(&origin) {
                Some(parked) if parked.attempts > attempts => return None,
                _ => {}
            }
            let found = Retrying { attempts, tier, state: State::Stored };
            let known = key.retrying.entry(origin).or_insert(found);
            if known.attempts < attempts {
                *known = found;
            }
            key.parked.remove(&origin).map(|parked| parked.offset)
        })
    }

    /// A record is read from a retry topic.
    pub fn found_retry(&mut self, key: u64, origin: i64, attempts: u32, tier: usize) -> FoundRetry {
        self.edit(key, |key| {
            let elsewhere = key.coming.contains(&origin) || key.loaded.contains(&origin) || key.parked.contains_key(&origin);
            let found = match key.retrying.get(&origin) {
                // It went on from there to the park topic.
                None if elsewhere => return FoundRetry::Duplicate,
                None => FoundRetry::Take,
                Some(known) if known.attempts > attempts => return FoundRetry::Duplicate,
                Some(known) if known.state != State::Seen => FoundRetry::Take,
                Some(known) if known.attempts == attempts => return FoundRetry::Duplicate,
                Some(_) => FoundRetry::Replace,
            };
            key.retrying.insert(origin, Retrying { attempts, tier, state: State::Seen });
            found
        })
    }

    /// Records were deleted from a retry topic unread. Says whether some of those that are waited for may be among them: [`Parking::sweep`] ends
    /// that once the topic was read up to where it ended after this. O(n).
    pub fn suspect(&mut self, tier: usize) -> bool {
        let mut some = false;
        for retrying in self.keys.values_mut().flat_map(|key| key.retrying.values_mut()).filter(|retrying| retrying.tier == tier) {
            if matches!(retrying.state, State::Stored | State::Suspect) {
                retrying.state = State::Suspect;
                some = true;
            }
        }
        some
    }

    /// What was suspected and was not read since is gone: nothing waits for it any more. O(n).
    pub fn sweep(&mut self, tier: usize) {
        let gone = |retrying: &Retrying| retrying.tier == tier && retrying.state == State::Suspect;
        let keys: Vec<u64> = self.keys.iter().filter(|(_, key)| key.retrying.values().any(gone)).map(|(name, _)| *name).collect();
        for key in keys {
            self.edit(key, |key| key.retrying.retain(|_, retrying| !gone(retrying)));
        }
    }

    /// An offset of the park topic was read that is complete.
    pub fn passed(&mut self, offset: i64) {
        self.scanned = self.scanned.max(offset + 1);
    }

    /// A record is read from the park topic, perhaps again. `kept`: its attempts are used up. Without `room` nothing is loaded.
    pub fn found(&mut self, key: u64, origin: i64, offset: i64, attempts: u32, kept: bool, room: bool) -> Found {
        let new = offset >= self.scanned;
        self.scanned = self.scanned.max(offset + 1);
        let ready = self.ready;
        if !new && !self.keys.contains_key(&key) {
            return Found::Stays;
        }
        self.edit(key, |key| {
            let mut instead = None;
            if new {
                key.coming.remove(&origin);
                match key.retrying.get(&origin) {
                    Some(retrying) if retrying.attempts >= attempts => return Found::Duplicate,
                    Some(_) => drop(key.retrying.remove(&origin)),
                    None => {}
                }
                if key.loaded.contains(&origin) {
                    return Found::Duplicate;
                }
                let kept = if kept { Kept::Yes } else { Kept::No };
                match key.parked.get(&origin) {
                    Some(other) if other.attempts >= attempts => return Found::Duplicate,
                    Some(other) => instead = Some(other.offset),
                    None => {}
                }
                key.parked.insert(origin, Parked { offset, attempts, kept });
            }
            if let Some(other) = instead {
                return Found::Instead(other);
            }
            if !ready || !room || key.wants() != Some(offset) {
                return Found::Stays;
            }
            let kept = key.parked.remove(&origin).map_or(Kept::No, |parked| parked.kept);
            key.loaded.insert(origin);
            match kept {
                Kept::Released(release) => Found::Released(release),
                _ => Found::Load,
            }
        })
    }

    /// The broker deleted the park topic below an offset: what was parked there is gone. Gives its offsets.
    pub fn lost(&mut self, below: i64) -> Vec<i64> {
        self.scanned = self.scanned.max(below);
        let keys: Vec<u64> = self.keys.keys().copied().collect();
        let mut lost = Vec::new();
        for key in keys {
            self.edit(key, |key| {
                key.parked.retain(|_, parked| {
                    let gone = parked.offset < below;
                    lost.extend(gone.then_some(parked.offset));
                    !gone
                });
            });
        }
        lost
    }

    /// Releases the records whose attempts are used up, of one key or of all; says where they lie in the park topic.
    pub fn release(&mut self, key: Option<u64>, how: Release) -> Vec<i64> {
        let keys: Vec<u64> = match key {
            Some(key) => self.keys.contains_key(&key).then_some(key).into_iter().collect(),
            None => self.keys.keys().copied().collect(),
        };
        let mut released = Vec::new();
        for key in keys {
            self.edit(key, |key| {
                for parked in key.parked.values_mut().filter(|parked| parked.kept == Kept::Yes) {
                    parked.kept = Kept::Released(how);
                    released.push(parked.offset);
                }
            });
        }
        released
    }

    /// Changes what is known of a key, and keeps the sums right.
    fn edit<R>(&mut self, name: u64, change: impl FnOnce(&mut Key) -> R) -> R {
        let key = self.keys.entry(name).or_default();
        let before = key.sizes();
        let result = change(key);
        let after = key.sizes();
        let wants = key.wants();
        if wants != key.wanted {
            if let Some(offset) = std::mem::replace(&mut key.wanted, wants) {
                self.wanted.remove(&(offset, name));
            }
            self.wanted.extend(wants.map(|offset| (offset, name)));
        }
        if key.is_empty() {
            self.keys.remove(&name);
        }
        let sum = |total: usize, before: usize, after: usize| (total + after).saturating_sub(before);
        let sizes = self.sizes;
        self.sizes = Sizes {
            tracked: sum(sizes.tracked, before.tracked, after.tracked),
            parked: sum(sizes.parked, before.parked, after.parked),
            kept: sum(sizes.kept, before.kept, after.kept),
            loaded: sum(sizes.loaded, before.loaded, after.loaded),
        };
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> Parking {
        let mut parking = Parking::new(0);
        parking.set_ready();
        parking
    }

    #[test]
    fn what_comes_behind_a_record_in_a_retry_topic_waits_for_it() {
        let mut parking = ready();
        assert_eq!(parking.meets(1, 10), Meeting::Free);
        parking.hand_over(1, 10, 3, 1);
        assert_eq!((parking.meets(1, 11), parking.meets(2, 12), parking.meets(1, 10)), (Meeting::Behind, Meeting::Free, Meeting::Known));
        parking.park(1, 11);
        parking.park(1, 13);
        assert_eq!(parking.found(1, 11, 0, 0, false, true), Found::Stays);
        assert_eq!(parking.found_retry(1, 10, 3, 1), FoundRetry::Take);
        parking.finished(1, 10);
        assert_eq!(parking.wanted(), Some(0), "11 is in the park topic, 13 is on its way");
        assert_eq!(parking.found(1, 11, 0, 0, false, false), Found::Stays, "no room");
        assert_eq!(parking.found(1, 11, 0, 0, false, true), Found::Load);
        assert_eq!(parking.meets(1, 14), Meeting::Behind, "13 is not in its lane yet");
        assert_eq!(parking.found(1, 13, 1, 0, false, true), Found::Load);
        assert_eq!(parking.meets(1, 14), Meeting::Free, "the lane keeps the order from here on");
        // 11 fails: 13 leaves the lane, and 14 is parked.
        parking.hand_over(1, 11, 3, 1);
        parking.unload(1, 13, 1, 0);
        parking.park(1, 14);
        assert_eq!(parking.wanted(), None);
        parking.finished(1, 11);
        assert_eq!(parking.wanted(), Some(1));
        assert_eq!(parking.sizes(), Sizes { tracked: 2, parked: 2, ..Sizes::default() });
        assert_eq!(parking.found(1, 13, 1, 0, false, true), Found::Load);
        assert_eq!(parking.found(1, 14, 2, 0, false, true), Found::Load);
        parking.finished(1, 13);
        parking.finished(1, 14);
        assert!(parking.is_empty() && parking.wanted.is_empty() && parking.sizes() == Sizes::default());
    }

    #[test]
    fn a_record_that_was_stored_behind_a_later_one_runs_before_it() {
        let mut parking = ready();
        parking.hand_over(1, 10, 1, 1);
        parking.park(1, 11);
        parking.park(1, 12);
        parking.finished(1, 10);
        // The append of 11 failed, and was made again.
        assert_eq!(parking.found(1, 12, 0, 0, false, true), Found::Stays, "11 is on its way");
        assert_eq!(parking.found(1, 11, 1, 0, false, true), Found::Load);
        assert_eq!(parking.wanted(), Some(0));
        assert_eq!(parking.found(1, 12, 0, 0, false, true), Found::Load);
        // A second copy, of an append that was stored after all.
        assert_eq!(parking.found(1, 12, 2, 0, false, true), Found::Duplicate);
    }

    #[test]
    fn what_was_deleted_from_a_retry_topic_is_waited_for_no_longer() {
        let mut parking = ready();
        for (key, origin, tier) in [(1, 10, 1), (2, 11, 1), (3, 12, 2), (4, 13, 1)] {
            parking.hand_over(key, origin, 1, tier);
            if key < 4 {
                parking.stored(key, origin);
            }
        }
        parking.park(1, 20);
        assert_eq!(parking.found(1, 20, 0, 0, false, true), Found::Stays);
        assert!(parking.suspect(1), "10 or 11 may be gone: 12 is elsewhere, 13 on its way");
        assert_eq!(parking.found_retry(2, 11, 1, 1), FoundRetry::Take);
        parking.stored(4, 13);
        parking.sweep(1);
        assert_eq!((parking.wanted(), parking.keys()), (Some(0), 4), "of 10, 20 is left");
        assert!([(2, 21), (3, 22), (4, 23)].into_iter().all(|(key, origin)| parking.meets(key, origin) == Meeting::Behind));
        assert!(parking.suspect(1) && parking.suspect(2) && !parking.suspect(3));
        parking.sweep(1);
        parking.sweep(2);
        assert_eq!([2, 3, 4].map(|key| parking.meets(key, 30)), [Meeting::Behind, Meeting::Free, Meeting::Free], "11 was read");
    }

    #[test]
    fn of_copies_that_a_crash_left_the_one_with_the_most_attempts_counts() {
        let mut parking = Parking::new(5);
        // Parked, then loaded, then in retry-1, then in retry-2; nothing was committed.
        assert_eq!(parking.found(1, 10, 5, 0, false, true), Found::Stays);
        assert_eq!(parking.index_retry(1, 10, 3, 1), Some(5));
        assert_eq!(parking.index_retry(1, 10, 4, 1), None);
        parking.set_ready();
        assert_eq!(parking.found_retry(1, 10, 3, 1), FoundRetry::Duplicate);
        assert_eq!(parking.found_retry(1, 10, 4, 1), FoundRetry::Take);
        assert_eq!(parking.found_retry(1, 10, 4, 1), FoundRetry::Duplicate);
        assert_eq!(parking.meets(1, 10), Meeting::Known);
        // In retry-1, then kept in the park topic.
        assert_eq!(parking.found(2, 20, 6, 4, true, true), Found::Stays);
        assert_eq!(parking.index_retry(2, 20, 3, 1), None);
        assert_eq!(parking.found_retry(2, 20, 3, 1), FoundRetry::Duplicate);
        // The other way round.
        assert_eq!(parking.index_retry(3, 30, 3, 1), None);
        assert_eq!(parking.found(3, 30, 7, 4, true, true), Found::Stays);
        assert_eq!(parking.found_retry(3, 30, 3, 1), FoundRetry::Duplicate);
        assert_eq!(parking.sizes().kept, 2);
    }

    #[test]
    fn what_ended_before_commits_were_lost_comes_again_in_order() {
        // 10 ended in retry-2 and 11 in the park topic, then 12 failed into retry-1; nothing of it was committed.
        let mut parking = Parking::new(0);
        assert_eq!(parking.index_retry(1, 12, 2, 1), None);
        assert_eq!(parking.index_retry(1, 10, 3, 1), None);
        assert_eq!(parking.found(1, 11, 0, 0, false, true), Found::Stays);
        parking.set_ready();
        assert_eq!((parking.found_retry(1, 12, 2, 1), parking.found_retry(1, 10, 3, 1)), (FoundRetry::Take, FoundRetry::Take));
        assert!(parking.waits(1, 12) && !parking.waits(1, 10) && parking.wanted().is_none());
        parking.finished(1, 10);
        assert_eq!(parking.wanted(), Some(0), "11 is before 12");
        assert!(parking.waits(1, 12));
        assert_eq!(parking.found(1, 11, 0, 0, false, true), Found::Load);
        assert!(!parking.waits(1, 12), "the lane keeps the order from here on");
        parking.finished(1, 11);
        parking.finished(1, 12);
        assert!(parking.is_empty() && !parking.waits(1, 12));
    }

    #[test]
    fn what_is_exhausted_waits_for_somebody_and_its_key_with_it() {
        let mut parking = ready();
        parking.hand_over(1, 10, 3, 1);
        assert_eq!(parking.found_retry(1, 10, 3, 1), FoundRetry::Take);
        parking.park(1, 10);
        parking.park(1, 11);
        assert_eq!(parking.found(1, 10, 0, 4, true, true), Found::Stays);
        assert_eq!(parking.found(1, 11, 1, 0, false, true), Found::Stays);
        assert_eq!((parking.sizes(), parking.wanted()), (Sizes { tracked: 2, parked: 2, kept: 1, loaded: 0 }, None));
        assert!(parking.release(Some(2), Release::Retry).is_empty());
        assert_eq!(parking.release(None, Release::Retry), [0]);
        assert_eq!(parking.wanted(), Some(0));
        assert_eq!(parking.found(1, 10, 0, 4, true, true), Found::Released(Release::Retry));
        parking.hand_over(1, 10, 0, 1);
        assert_eq!(parking.wanted(), None, "11 waits for it still");
        parking.finished(1, 10);
        assert_eq!(parking.found(1, 11, 1, 0, false, true), Found::Load);
    }
}
