//! Lanes decide which records of a route may be with the handler at the same time. Floor 0.
//!
//! A lane is a queue of which only the head may run: one per key (`order: key`), one per partition (`partition`), none at all (`none`: every
//! record is its own). A record that waits for its next attempt stays the head of its lane, and other lanes go on.
//!
//! Invariant: of one lane, at most one job is handed out, and jobs are handed out in the order in which they were pushed.
//! Invariant: of all jobs that may run, the one that was pushed first is handed out first: what completes stays close to the watermark, so that a
//! crash repeats little.
//! Invariant: a lane outlives its partition's assignment while its head still runs, so that a record that comes back with a new assignment
//! waits for the old delivery.
//! Every operation costs O(log ready), [`Lanes::clear`] aside.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    hash::{BuildHasherDefault, Hasher},
};

/// A lane: the partition's slot within the route, and the hash of the key. Two keys of one hash share a lane, which costs parallelism only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lane {
    /// The partition's slot.
    pub slot: u32,
    /// The key's hash; a fixed one for records without a key and for `order: partition`.
    pub key: u64,
}

/// How many bits of a [`JobId`] say where the job is kept; the others count.
const INDEX_BITS: u32 = 24;

/// Names a job. An id comes again after 2^40 jobs in the same place: never, in practice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(u64);

impl JobId {
    /// As a number.
    pub fn get(self) -> u64 {
        self.0
    }

    /// From [`JobId::get`]. A number that is no job's is harmless: it finds nothing.
    pub fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    fn index(self) -> usize {
        (self.0 & ((1 << INDEX_BITS) - 1)) as usize
    }
}

/// The jobs of a route, by lane.
#[derive(Debug)]
pub struct Lanes<T> {
    jobs: Vec<Option<Job<T>>>,
    free: Vec<u32>,
    /// The last job of each lane that has any.
    tails: HashMap<Lane, JobId, BuildHasherDefault<LaneHasher>>,
    /// What may run, by the order of pushing.
    ready: BinaryHeap<Reverse<(u64, JobId)>>,
    pushed: u64,
    waiting: usize,
}

#[derive(Debug)]
struct Job<T> {
    id: JobId,
    sequence: u64,
    lane: Option<Lane>,
    /// The job behind this one in its lane.
    next: Option<JobId>,
    state: State,
    item: T,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Behind another, or ready.
    Waiting,
    /// Handed out: it runs, or waits for its next attempt.
    Out,
}

impl<T> Default for Lanes<T> {
    fn default() -> Self {
        Self { jobs: Vec::new(), free: Vec::new(), tails: HashMap::default(), ready: BinaryHeap::new(), pushed: 0, waiting: 0 }
    }
}

impl<T> Lanes<T> {
    /// Ids count from `start`: a random one makes an id of an earlier run of the process find nothing.
    pub fn with_start(start: u32) -> Self {
        Self { pushed: u64::from(start), ..Self::default() }
    }

    /// Adds a job at the end of its lane; without a lane it is ready at once.
    pub fn push(&mut self, lane: Option<Lane>, item: T) -> JobId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            (self.jobs.len() - 1) as u32
        });
        self.pushed += 1;
        let id = JobId((self.pushed << INDEX_BITS) | u64::from(index));
        self.jobs[index as usize] = Some(Job { id, sequence: self.pushed, lane, next: None, state: State::Waiting, item });
        self.waiting += 1;
        match lane.and_then(|lane| self.tails.insert(lane, id)) {
            Some(tail) => {
                if let Some(job) = self.job_mut(tail) {
                    job.next = Some(id);
                }
            }
            None => self.ready.push(Reverse((self.pushed, id))),
        }
        id
    }

    /// Hands out the next job that may run.
    pub fn next_ready(&mut self) -> Option<JobId> {
        // A job that was cleared away may still stand in the queue.
        while let Some(Reverse((_, id))) = self.ready.pop() {
            if let Some(job) = self.job_mut(id).filter(|job| job.state == State::Waiting) {
                job.state = State::Out;
                self.waiting -= 1;
                return Some(id);
            }
        }
        None
    }

    /// Takes back a job that was handed out: it is the next of its lane to run.
    pub fn put_back(&mut self, id: JobId) {
        if let Some(job) = self.job_mut(id).filter(|job| job.state == State::Out) {
            job.state = State::Waiting;
            let sequence = job.sequence;
            self.waiting += 1;
            self.ready.push(Reverse((sequence, id)));
        }
    }

    /// Ends a job that was handed out: the lane's next one is ready.
    pub fn finish(&mut self, id: JobId) -> Option<T> {
        self.get(id)?;
        let job = self.jobs[id.index()].take()?;
        self.free.push(id.index() as u32);
        if job.state == State::Waiting {
            self.waiting -= 1;
        }
        match (job.next, job.lane) {
            (Some(next), _) => {
                if let Some(sequence) = self.job_mut(next).map(|job| job.sequence) {
                    self.ready.push(Reverse((sequence, next)));
                }
            }
            (None, Some(lane)) => {
                self.tails.remove(&lane);
            }
            (None, None) => {}
        }
        Some(job.item)
    }

    /// The item of a job.
    pub fn get(&self, id: JobId) -> Option<&T> {
        self.jobs.get(id.index())?.as_ref().filter(|job| job.id == id).map(|job| &job.item)
    }

    /// The lane of a job, if it is in one.
    pub fn lane(&self, id: JobId) -> Option<Lane> {
        self.jobs.get(id.index())?.as_ref().filter(|job| job.id == id)?.lane
    }

    /// The item of a job, to change.
    pub fn get_mut(&mut self, id: JobId) -> Option<&mut T> {
        self.job_mut(id).map(|job| &mut job.item)
    }

    /// Jobs that were not handed out.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether a job may be handed out. May be `true` for a queue that holds only cleared jobs.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Drops the jobs that match and were not handed out; those that are out stay the heads of their lanes. Costs O(jobs).
    pub fn clear(&mut self, mut matches: impl FnMut(&T) -> bool) {
        for index in 0..self.jobs.len() {
            let drop = self.jobs[index].as_ref().is_some_and(|job| job.state == State::Waiting && matches(&job.item));
            if drop {
                self.jobs[index] = None;
                self.free.push(index as u32);
                self.waiting -= 1;
            }
        }
        // What is left of each lane is chained anew, in the order of pushing; what has no lane is ready.
        let mut left: Vec<(u64, JobId)> =
            self.jobs.iter().flatten().filter(|job| job.lane.is_some()).map(|job| (job.sequence, job.id)).collect();
        left.sort_unstable();
        self.tails.clear();
        let free = self.jobs.iter().flatten().filter(|job| job.lane.is_none() && job.state == State::Waiting);
        self.ready = free.map(|job| Reverse((job.sequence, job.id))).collect();
        for (sequence, id) in left {
            let Some(job) = self.job_mut(id) else { continue };
            job.next = None;
            let (Some(lane), waiting) = (job.lane, job.state == State::Waiting) else { continue };
            match self.tails.insert(lane, id) {
                Some(tail) => {
                    if let Some(job) = self.job_mut(tail) {
                        job.next = Some(id);
                    }
                }
                None if waiting => self.ready.push(Reverse((sequence, id))),
                None => {}
            }
        }
    }

    fn job_mut(&mut self, id: JobId) -> Option<&mut Job<T>> {
        self.jobs.get_mut(id.index())?.as_mut().filter(|job| job.id == id)
    }
}

/// Mixes the few words of a [`Lane`]; its key is a hash already.
#[derive(Debug, Default)]
pub struct LaneHasher(u64);

impl Hasher for LaneHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(26) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn lane(key: u64) -> Option<Lane> {
        Some(Lane { slot: 0, key })
    }

    #[test]
    fn a_waiting_retry_blocks_its_own_lane_only() {
        let mut lanes = Lanes::default();
        let first = lanes.push(lane(1), "a1");
        lanes.push(lane(1), "a2");
        let other = lanes.push(lane(2), "b1");
        assert_eq!(lanes.next_ready(), Some(first));
        assert_eq!(lanes.next_ready(), Some(other));
        assert_eq!(lanes.next_ready(), None, "a2 waits behind a1");
        lanes.put_back(first);
        assert_eq!(lanes.next_ready(), Some(first));
        assert_eq!(lanes.finish(first), Some("a1"));
        assert_eq!(lanes.next_ready().and_then(|id| lanes.get(id)), Some(&"a2"));
        assert_eq!(lanes.finish(first), None, "an id is never reused");
    }

    #[test]
    fn a_record_that_comes_back_waits_for_the_delivery_of_the_old_assignment() {
        let mut lanes = Lanes::default();
        let old = lanes.push(lane(1), (1, "old"));
        lanes.push(lane(1), (1, "queued"));
        assert_eq!(lanes.next_ready(), Some(old));
        lanes.clear(|(epoch, _)| *epoch == 1);
        assert_eq!(lanes.waiting(), 0);
        let new = lanes.push(lane(1), (2, "new"));
        assert_eq!(lanes.next_ready(), None);
        lanes.finish(old);
        assert_eq!(lanes.next_ready(), Some(new));
    }

    proptest! {
        /// At most one job of a lane is out, jobs of a lane are handed out in order, nothing is lost.
        #[test]
        fn lanes_keep_order_and_lose_nothing(steps in proptest::collection::vec((0u64..4, any::<prop::sample::Index>(), 0u8..10), 1..300)) {
            let mut lanes: Lanes<(u64, u64)> = Lanes::default();
            let (mut out, mut cleared, mut finished): (Vec<JobId>, BTreeSet<u64>, BTreeMap<u64, Vec<u64>>) = Default::default();
            let mut count = 0u64;
            for (key, pick, action) in steps {
                match action {
                    0..=4 => { count += 1; lanes.push(lane(key), (key, count)); }
                    5..=6 => if let Some(id) = lanes.next_ready() {
                        let (key, _) = lanes.get(id).copied().unwrap();
                        prop_assert!(out.iter().all(|other| lanes.get(*other).unwrap().0 != key), "two of one lane");
                        out.push(id);
                    },
                    7 if !out.is_empty() => {
                        let id = out.swap_remove(pick.index(out.len()));
                        lanes.put_back(id);
                    }
                    8 if !out.is_empty() => {
                        let id = out.swap_remove(pick.index(out.len()));
                        let (key, number) = lanes.finish(id).unwrap();
                        finished.entry(key).or_default().push(number);
                    }
                    9 => lanes.clear(|(of, number)| { let hit = *of == key; if hit { cleared.insert(*number); } hit }),
                    _ => {}
                }
            }
            while !out.is_empty() || lanes.waiting() > 0 {
                out.extend(std::iter::from_fn(|| lanes.next_ready()));
                prop_assert!(!out.is_empty(), "stuck with {} waiting", lanes.waiting());
                let (key, number) = lanes.finish(out.remove(0)).unwrap();
                finished.entry(key).or_default().push(number);
            }
            let ended: usize = finished.values().map(Vec::len).sum();
            prop_assert_eq!(ended + cleared.len(), count as usize);
            for numbers in finished.values() {
                prop_assert!(numbers.is_sorted(), "{:?}", numbers);
            }
            prop_assert!(lanes.tails.is_empty());
        }
    }
}
