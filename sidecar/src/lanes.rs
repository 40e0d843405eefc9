//! Lanes decide which records of a route may be with the handler at the same time. Floor 0.
//!
//! A lane is a queue of which only the head may run: one per key (`order: key`), one per partition (`partition`), none at all (`none`: every
//! record is its own). A record that waits for its next attempt stays the head of its lane, and other lanes go on. For a batch a lane gives a
//! run: its head, and then, in order, the jobs behind it ([`Lanes::follow`]).
//!
//! Invariant: of one lane, at most one job is handed out, or a run of them for one batch, which begins at the head. Jobs are handed out in the
//! order in which they were pushed.
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
    /// The batch that is being gathered.
    batch: u64,
}

#[derive(Debug)]
struct Job<T> {
    id: JobId,
    sequence: u64,
    lane: Option<Lane>,
    /// The job behind this one in its lane.
    next: Option<JobId>,
    /// Whether nothing is before it in its lane.
    head: bool,
    /// The batch in which it may run although it is not the head; 0 is none.
    follows: u64,
    /// The batch in which the job behind it may run.
    followed: u64,
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
        Self { jobs: Vec::new(), free: Vec::new(), tails: HashMap::default(), ready: BinaryHeap::new(), pushed: 0, waiting: 0, batch: 1 }
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
        let tail = lane.and_then(|lane| self.tails.insert(lane, id));
        let (head, batch) = (tail.is_none(), self.batch);
        let mut follows = 0;
        if let Some(tail) = tail.and_then(|tail| self.job_mut(tail)) {
            tail.next = Some(id);
            if tail.followed == batch && tail.state == State::Out {
                follows = batch;
            }
        }
        let job = Job { id, sequence: self.pushed, lane, next: None, head, follows, followed: 0, state: State::Waiting, item };
        self.jobs[index as usize] = Some(job);
        self.waiting += 1;
        if head || follows > 0 {
            self.ready.push(Reverse((self.pushed, id)));
        }
        id
    }

    /// Hands out the next job that may run.
    pub fn next_ready(&mut self) -> Option<JobId> {
        let batch = self.batch;
        // A job that was cleared away, or that could have gone with an earlier batch, may still stand in the queue.
        while let Some(Reverse((_, id))) = self.ready.pop() {
            if let Some(job) = self.job_mut(id).filter(|job| job.state == State::Waiting && (job.head || job.follows == batch)) {
                job.state = State::Out;
                self.waiting -= 1;
                return Some(id);
            }
        }
        None
    }

    /// Lets the job behind one that was handed out for this batch go with the same batch, now or when it is pushed.
    pub fn follow(&mut self, id: JobId) {
        let batch = self.batch;
        let Some(job) = self.job_mut(id).filter(|job| job.state == State::Out && job.lane.is_some()) else { return };
        job.followed = batch;
        let Some(next) = job.next else { return };
        if let Some(job) = self.job_mut(next).filter(|job| job.state == State::Waiting) {
            job.follows = batch;
            let sequence = job.sequence;
            self.ready.push(Reverse((sequence, next)));
        }
    }

    /// Ends the batch: what is handed out from now on belongs to the next one.
    pub fn end_batch(&mut self) {
        self.batch += 1;
    }

    /// Whether nothing is before the job in its lane.
    pub fn is_head(&self, id: JobId) -> bool {
        self.job(id).is_some_and(|job| job.head)
    }

    /// The job behind this one in its lane, if it is handed out too: they went in one batch.
    pub fn behind(&self, id: JobId) -> Option<JobId> {
        let next = self.job(id)?.next?;
        self.job(next).filter(|job| job.state == State::Out).map(|job| job.id)
    }

    /// Takes back a job that was handed out: it is the next of its lane to run, once nothing is before it.
    pub fn put_back(&mut self, id: JobId) {
        if let Some(job) = self.job_mut(id).filter(|job| job.state == State::Out) {
            job.state = State::Waiting;
            let (head, sequence) = (job.head, job.sequence);
            self.waiting += 1;
            if head {
                self.ready.push(Reverse((sequence, id)));
            }
        }
    }

    /// Ends the head of a lane: the one behind it is the head, and ready unless it is handed out already.
    pub fn finish(&mut self, id: JobId) -> Option<T> {
        self.get(id)?;
        let job = self.jobs[id.index()].take()?;
        self.free.push(id.index() as u32);
        if job.state == State::Waiting {
            self.waiting -= 1;
        }
        match (job.next, job.lane) {
            (Some(next), _) => {
                if let Some(job) = self.job_mut(next) {
                    job.head = true;
                    if job.state == State::Waiting {
                        let sequence = job.sequence;
                        self.ready.push(Reverse((sequence, next)));
                    }
                }
            }
            (None, Some(lane)) => {
                self.tails.remove(&lane);
            }
            (None, None) => {}
        }
        Some(job.item)
    }

    /// Takes away what waits behind a job in its lane, in order. What is handed out stays.
    pub fn take_behind(&mut self, id: JobId) -> Vec<T> {
        let mut taken = Vec::new();
        let Some(job) = self.job(id) else { return taken };
        let lane = job.lane;
        let (mut last, mut next) = (id, job.next);
        while let Some(behind) = next {
            let Some(job) = self.jobs.get_mut(behind.index()).filter(|job| job.as_ref().is_some_and(|job| job.id == behind)) else { break };
            if job.as_ref().is_some_and(|job| job.state == State::Out) {
                next = job.as_ref().and_then(|job| job.next);
                self.link(last, Some(behind));
                last = behind;
            } else if let Some(job) = job.take() {
                self.free.push(behind.index() as u32);
                self.waiting -= 1;
                next = job.next;
                taken.push(job.item);
            }
        }
        self.link(last, None);
        if let Some(lane) = lane {
            self.tails.insert(lane, last);
        }
        taken
    }

    fn link(&mut self, id: JobId, next: Option<JobId>) {
        if let Some(job) = self.job_mut(id) {
            job.next = next;
        }
    }

    /// The item of a job.
    pub fn get(&self, id: JobId) -> Option<&T> {
        self.job(id).map(|job| &job.item)
    }

    /// A job whose item matches, if there is one. Costs O(jobs).
    pub fn find(&self, mut matches: impl FnMut(&T) -> bool) -> Option<(JobId, &T)> {
        self.jobs.iter().flatten().find(|job| matches(&job.item)).map(|job| (job.id, &job.item))
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

    /// How many jobs may be handed out. Cleared ones may still be counted.
    pub fn ready(&self) -> usize {
        self.ready.len()
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
            (job.next, job.head) = (None, true);
            let (Some(lane), waiting) = (job.lane, job.state == State::Waiting) else { continue };
            match self.tails.insert(lane, id) {
                Some(tail) => {
                    if let Some(job) = self.job_mut(tail) {
                        job.next = Some(id);
                    }
                    if let Some(job) = self.job_mut(id) {
                        job.head = false;
                    }
                }
                None if waiting => self.ready.push(Reverse((sequence, id))),
                None => {}
            }
        }
        // What could go with the batch that is being gathered goes with the next one.
        self.batch += 1;
    }

    fn job(&self, id: JobId) -> Option<&Job<T>> {
        self.jobs.get(id.index())?.as_ref().filter(|job| job.id == id)
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

    fn gather(lanes: &mut Lanes<&'static str>, most: usize) -> Vec<&'static str> {
        let ids: Vec<JobId> = std::iter::from_fn(|| lanes.next_ready().inspect(|id| lanes.follow(*id))).take(most).collect();
        lanes.end_batch();
        ids.iter().filter_map(|id| lanes.get(*id).copied()).collect()
    }

    #[test]
    fn a_batch_takes_runs_of_lanes_and_the_next_one_waits_for_their_ends() {
        let mut lanes = Lanes::default();
        let ids: Vec<JobId> = [(1, "a1"), (1, "a2"), (2, "b1"), (1, "a3"), (2, "b2")].map(|(key, item)| lanes.push(lane(key), item)).into();
        assert_eq!(gather(&mut lanes, 3), ["a1", "a2", "b1"], "the oldest first");
        assert_eq!(gather(&mut lanes, 3), [""; 0], "what is behind a batch waits for it");
        // a1 failed: a2 is behind it again.
        lanes.put_back(ids[1]);
        assert_eq!(gather(&mut lanes, 3), [""; 0]);
        assert_eq!(lanes.finish(ids[2]), Some("b1"));
        assert_eq!(gather(&mut lanes, 3), ["b2"]);
        lanes.put_back(ids[0]);
        assert_eq!(gather(&mut lanes, 2), ["a1", "a2"]);
        assert_eq!((lanes.behind(ids[0]), lanes.behind(ids[1]), lanes.is_head(ids[1])), (Some(ids[1]), None, false));
        lanes.finish(ids[0]);
        assert!(lanes.is_head(ids[1]));
        lanes.finish(ids[1]);
        assert_eq!(gather(&mut lanes, 2), ["a3"]);
    }

    #[test]
    fn what_is_pushed_while_a_batch_gathers_goes_with_it() {
        let mut lanes = Lanes::default();
        let first = lanes.push(lane(1), "a1");
        assert_eq!(lanes.next_ready(), Some(first));
        lanes.follow(first);
        let second = lanes.push(lane(1), "a2");
        assert_eq!(lanes.next_ready(), Some(second));
        lanes.end_batch();
        lanes.push(lane(1), "a3");
        assert_eq!(lanes.next_ready(), None);
        // One that is not followed travels as the last of its lane.
        let retried = lanes.push(lane(2), "b1");
        lanes.push(lane(2), "b2");
        assert_eq!((lanes.next_ready(), lanes.next_ready()), (Some(retried), None));
    }

    #[test]
    fn what_is_at_the_service_behind_a_job_is_not_taken_away() {
        let mut lanes = Lanes::default();
        let ids: Vec<JobId> = [(1, "a1"), (1, "a2"), (1, "a3"), (1, "a4")].map(|(key, item)| lanes.push(lane(key), item)).into();
        assert_eq!(gather(&mut lanes, 3), ["a1", "a2", "a3"]);
        // The answer of a2 came, behind a failure of a1.
        lanes.put_back(ids[1]);
        assert_eq!(lanes.take_behind(ids[0]), ["a2", "a4"]);
        assert_eq!(lanes.behind(ids[0]), Some(ids[2]));
        lanes.push(lane(1), "a5");
        lanes.finish(ids[0]);
        assert_eq!(gather(&mut lanes, 3), [""; 0], "a5 waits for a3");
        lanes.finish(ids[2]);
        assert_eq!(gather(&mut lanes, 3), ["a5"]);
    }

    #[test]
    fn what_waits_behind_a_job_can_be_taken_away() {
        let mut lanes = Lanes::default();
        let head = lanes.push(lane(1), "a1");
        lanes.push(lane(2), "b1");
        lanes.push(lane(1), "a2");
        lanes.push(lane(1), "a3");
        assert_eq!(lanes.next_ready(), Some(head));
        assert_eq!(lanes.take_behind(head), ["a2", "a3"]);
        assert_eq!((lanes.take_behind(head).len(), lanes.waiting()), (0, 1));
        lanes.push(lane(1), "a4");
        assert_eq!(lanes.finish(head), Some("a1"));
        let left: Vec<_> = std::iter::from_fn(|| lanes.next_ready().and_then(|id| lanes.finish(id))).collect();
        assert_eq!(left, ["b1", "a4"]);
        assert!(lanes.tails.is_empty() && lanes.waiting() == 0);
    }

    proptest! {
        /// Whatever fails, is put back or cleared: of a lane only a run is out, for one batch, and it ends in order.
        #[test]
        fn batches_keep_order_and_lose_nothing(steps in proptest::collection::vec((0u64..4, 1usize..6, 0u8..8), 1..200)) {
            let mut lanes: Lanes<(u64, u64)> = Lanes::default();
            let (mut batches, mut backoff): (Vec<Vec<JobId>>, Vec<JobId>) = Default::default();
            let (mut cleared, mut finished): (BTreeSet<u64>, BTreeMap<u64, Vec<u64>>) = Default::default();
            let mut count = 0u64;
            let mut drain = vec![];
            let ending = (0..4_000u32).map(|turn| (0, 5, 9 + (turn % 2) as u8));
            for (key, number, action) in steps.into_iter().chain(ending) {
                match action {
                    0..=2 => for _ in 0..number { count += 1; lanes.push(lane(key), (key, count)); },
                    3..=4 | 9 if batches.len() < 3 => {
                        let mut batch = Vec::new();
                        while batch.len() < number && let Some(id) = lanes.next_ready() {
                            lanes.follow(id);
                            batch.push(id);
                        }
                        lanes.end_batch();
                        for other in batches.iter().flatten().chain(&backoff) {
                            let key = |id: &JobId| lanes.get(*id).unwrap().0;
                            prop_assert!(batch.iter().all(|id| key(id) != key(other)), "two batches of one lane");
                        }
                        if !batch.is_empty() { batches.push(batch); }
                    }
                    7 => lanes.clear(|(of, number)| { let hit = *of == key; if hit { cleared.insert(*number); } hit }),
                    _ => {
                        drain.clear();
                        drain.append(&mut backoff);
                        drain.drain(..).for_each(|id| lanes.put_back(id));
                        if !batches.is_empty() {
                            for (place, id) in batches.remove(0).into_iter().enumerate() {
                                // A batch's answers come in its order: one that is not the head is behind a failure.
                                if !lanes.is_head(id) {
                                    lanes.put_back(id);
                                } else if action < 9 && place + 1 == number {
                                    backoff.push(id);
                                } else {
                                    let (key, number) = lanes.finish(id).unwrap();
                                    finished.entry(key).or_default().push(number);
                                }
                            }
                        }
                    }
                }
            }
            prop_assert_eq!(lanes.waiting(), 0);
            let ended: usize = finished.values().map(Vec::len).sum();
            prop_assert_eq!(ended + cleared.len(), count as usize);
            for numbers in finished.values() {
                prop_assert!(numbers.is_sorted(), "{:?}", numbers);
            }
            prop_assert!(lanes.tails.is_empty());
        }

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
