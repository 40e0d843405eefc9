//! Publications that leave in transactions: a parcel is what goes into one.
//!
//! Invariant: one parcel is out at a time, and what was put later leaves in a later one.
//! Invariant: what was taken back is sent again in its order, from the answers that are known.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::{Done, Outbox, Pending, Publication, done};
use crate::{
    broker::{BrokerErrorKind, Outgoing, ProduceError, ProduceErrorKind, TransactionError},
    telemetry::trace::TraceContext,
};

/// Publications in a transaction at most, and the bytes of their answers, about.
const MOST: usize = 2_000;
const MOST_BYTES: usize = 8 << 20;
/// How long the first publication waits for others. While a transaction is under way they gather by themselves.
const LINGER: Duration = Duration::from_millis(5);
/// The pause before what was taken back is sent again.
const PAUSE: Duration = Duration::from_millis(100);
/// So many transactions in a row are taken back before that is called trouble: a rebalance takes back one.
const TROUBLE: u32 = 3;

/// The publications of one transaction.
#[derive(Default)]
pub(crate) struct Parcel(Vec<Pending>);

/// What the outbox knows of its parcels.
pub(super) struct Parcels {
    /// Since when the first publication waits.
    since: Option<Instant>,
    /// How many publications go into one: fewer after one was refused of which it is not known which it was.
    limit: usize,
    /// How many were taken back in a row.
    taken_back: u32,
}

impl Default for Parcels {
    fn default() -> Self {
        Self { since: None, limit: MOST, taken_back: 0 }
    }
}

impl Parcel {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Slot, epoch and offset of each.
    pub(crate) fn places(&self) -> impl Iterator<Item = (u32, u64, i64)> {
        self.0.iter().map(|pending| place(&pending.publication))
    }

    /// The contexts of the spans that processed the records.
    pub(crate) fn contexts(&self) -> impl Iterator<Item = &TraceContext> {
        self.0.iter().filter_map(|pending| pending.publication.context.as_ref())
    }
}

fn place(publication: &Publication) -> (u32, u64, i64) {
    (publication.slot, publication.epoch, publication.offset)
}

impl Outbox {
    /// Notes since when something waits. Called with every turn, also while a parcel is out.
    pub(crate) fn note_waiting(&mut self, now: Instant) {
        match self.queue.is_empty() {
            true => self.parcels.since = None,
            false => {
                self.parcels.since.get_or_insert(now);
            }
        }
    }

    /// When the next parcel leaves, if nothing else happens.
    pub(crate) fn parcel_wake(&self) -> Option<Instant> {
        let wake = match self.again.is_empty() {
            true => self.parcels.since.map(|since| since + LINGER),
            false => self.pause_until,
        };
        wake.map(|wake| self.pause_until.map_or(wake, |pause| pause.max(wake)))
    }

    /// Whether the next parcel may leave: enough waits, or for long enough, or it is urgent.
    pub(crate) fn parcel_due(&self, now: Instant, urgent: bool) -> bool {
        if self.pause_until.is_some_and(|until| now < until) {
            return false;
        }
        let waited = self.parcels.since.is_some_and(|since| now >= since + LINGER);
        !self.again.is_empty() || (!self.queue.is_empty() && (urgent || waited || self.queue.len() >= self.parcels.limit))
    }

    /// Takes the next parcel out of the outbox. What is not `ours` any more is dropped: whoever owns the partition now reads the record again.
    /// Says how many were dropped.
    pub(crate) fn gather(&mut self, ours: impl Fn(u32, u64) -> bool) -> (Parcel, u64) {
        self.pause_until = None;
        for (_, pending) in std::mem::take(&mut self.again).into_iter().rev() {
            self.queue.push_front(pending);
        }
        let (mut parcel, mut bytes, mut dropped) = (Parcel::default(), 0, 0);
        while parcel.0.len() < self.parcels.limit && bytes < MOST_BYTES {
            let Some(pending) = self.queue.pop_front() else { break };
            let size = pending.publication.size();
            if ours(pending.publication.slot, pending.publication.epoch) {
                bytes += size;
                parcel.0.push(pending);
            } else {
                self.count -= 1;
                self.bytes -= size;
                dropped += 1;
            }
        }
        self.parcels.since = None;
        (parcel, dropped)
    }

    /// Puts back what may not leave yet.
    pub(crate) fn defer(&mut self, parcel: &mut Parcel, leaves: impl Fn(u32, i64) -> bool) -> Vec<(u32, u64, i64)> {
        let all = std::mem::take(&mut parcel.0).into_iter();
        let (kept, deferred): (Vec<_>, Vec<_>) = all.partition(|pending| leaves(pending.publication.slot, pending.publication.offset));
        parcel.0 = kept;
        let places = deferred.iter().map(|pending| place(&pending.publication)).collect();
        for pending in deferred.into_iter().rev() {
            self.queue.push_front(pending);
        }
        places
    }

    /// The records of a parcel.
    pub(crate) fn pack(&self, parcel: &mut Parcel) -> Vec<Outgoing> {
        let mut records = Vec::with_capacity(parcel.0.len());
        for pending in &mut parcel.0 {
            pending.acknowledged.clear();
            self.prepare(pending, &mut records);
        }
        records
    }

    /// A parcel is stored.
    pub(crate) fn stored(&mut self, parcel: Parcel) -> Vec<Done> {
        self.parcels.taken_back = 0;
        self.parcels.limit = (self.parcels.limit * 2).min(MOST);
        self.trouble = None;
        let ended = parcel.0.into_iter().map(|pending| {
            self.count -= 1;
            self.bytes -= pending.publication.size();
            done(pending.publication)
        });
        ended.collect()
    }

    /// A parcel was taken back, and nothing of it is stored: it is sent again, but for what is refused.
    pub(crate) fn taken_back(&mut self, parcel: Parcel, error: &TransactionError) {
        let mut refused: HashMap<usize, &ProduceError> = HashMap::new();
        match error {
            TransactionError::Refused(records) => refused.extend(records.iter().map(|(index, error)| (*index, error))),
            // All its records are of one publication: it is refused as a whole.
            TransactionError::Split(error) if parcel.len() == 1 => drop(refused.insert(0, error)),
            TransactionError::Split(_) => self.parcels.limit = parcel.len().div_ceil(2),
            TransactionError::Aborted(error) | TransactionError::Fenced(error) | TransactionError::Lost(error) => {
                self.parcels.taken_back += 1;
                self.pause_until = Some(Instant::now() + PAUSE);
                if self.parcels.taken_back >= TROUBLE {
                    let kind = match error.kind {
                        BrokerErrorKind::UnknownTopic => ProduceErrorKind::UnknownTopic,
                        BrokerErrorKind::Unauthorized => ProduceErrorKind::Unauthorized,
                        _ => ProduceErrorKind::Unavailable,
                    };
                    self.trouble = Some(ProduceError { kind, detail: error.detail.clone() });
                }
            }
        }
        let mut first = 0;
        for mut pending in parcel.0 {
            let failed = (first..first + pending.sent).find_map(|index| refused.get(&index).copied());
            first += pending.sent;
            for mut span in pending.spans.drain(..) {
                span.fail("aborted", || error.to_string());
            }
            match failed {
                Some(error) => self.send_again(pending, Vec::new(), error.clone()),
                None => drop(self.again.insert(pending.sequence, pending)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        broker::{BrokerError, fake::Fake},
        consume::{
            outbox::{End, What, tests::publication},
            test_delivery,
        },
        outcome::Disposition,
        telemetry::trace::Tracer,
    };

    fn outbox(publications: i64) -> Outbox {
        let mut outbox = Outbox::new(Arc::new(Fake::new(&[])), Tracer::disabled(), "fake");
        (0..publications).for_each(|number| outbox.put(publication(number)));
        outbox.note_waiting(Instant::now());
        outbox
    }

    fn offsets(parcel: &Parcel) -> Vec<i64> {
        parcel.places().map(|(_, _, offset)| offset).collect()
    }

    fn packed(outbox: &mut Outbox) -> Parcel {
        let (mut parcel, _) = outbox.gather(|_, _| true);
        outbox.pack(&mut parcel);
        parcel
    }

    fn aborted() -> TransactionError {
        TransactionError::Aborted(BrokerError::new(BrokerErrorKind::Unreachable, "gone"))
    }

    fn too_large() -> ProduceError {
        ProduceError { kind: ProduceErrorKind::TooLarge, detail: "too large".to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_parcel_leaves_by_time_by_number_or_when_it_is_urgent() {
        let outbox = outbox(1);
        assert!(!outbox.parcel_due(Instant::now(), false));
        assert!(outbox.parcel_due(Instant::now(), true));
        assert_eq!(outbox.parcel_wake(), Some(Instant::now() + LINGER));
        assert!(outbox.parcel_due(Instant::now() + LINGER, false));
        assert!(self::outbox(MOST as i64).parcel_due(Instant::now(), false));
        assert!(!self::outbox(0).parcel_due(Instant::now() + LINGER, true));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_taken_back_leaves_again_in_its_order_before_what_came_later() {
        let mut outbox = outbox(3);
        for round in 1..=TROUBLE {
            let parcel = packed(&mut outbox);
            assert_eq!(offsets(&parcel), [0, 1, 2]);
            outbox.taken_back(parcel, &aborted());
            assert!(!outbox.parcel_due(Instant::now(), true), "a pause");
            assert_eq!(outbox.trouble().is_some(), round == TROUBLE);
            tokio::time::advance(PAUSE).await;
            assert!(outbox.parcel_due(Instant::now(), false));
        }
        outbox.put(publication(3));
        let parcel = packed(&mut outbox);
        assert_eq!(offsets(&parcel), [0, 1, 2, 3]);
        assert_eq!(outbox.stored(parcel).iter().map(|done| done.offset).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!((outbox.len(), outbox.bytes, outbox.trouble().is_none()), (0, 0, true));
    }

    #[tokio::test(start_paused = true)]
    async fn of_a_parcel_one_answer_is_refused_and_becomes_a_dead_letter_in_its_place() {
        let mut outbox = outbox(3);
        let parcel = packed(&mut outbox);
        // Each answer goes to two topics: the fourth record is the second one's.
        outbox.taken_back(parcel, &TransactionError::Refused(vec![(3, too_large())]));
        assert!(outbox.parcel_due(Instant::now(), false), "no pause: it is known what is wrong");
        let parcel = packed(&mut outbox);
        let done = outbox.stored(parcel);
        let ends: Vec<_> = done.iter().map(|done| done.end).collect();
        let forwarded = End::Ended(Disposition::Forwarded, "");
        assert_eq!(ends, [forwarded, End::Ended(Disposition::DeadLettered, "reply"), forwarded]);
        assert_eq!((outbox.len(), outbox.bytes), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn when_it_is_not_known_which_is_refused_parcels_shrink_until_it_is() {
        let mut outbox = outbox(8);
        let (mut forwarded, mut letters) = (Vec::new(), Vec::new());
        for _ in 0..20 {
            let parcel = packed(&mut outbox);
            let bad = parcel
                .0
                .iter()
                .any(|pending| pending.publication.delivery.position.offset == 5 && matches!(pending.publication.what, What::Reply { .. }));
            if bad {
                outbox.taken_back(parcel, &TransactionError::Split(too_large()));
                continue;
            }
            for done in outbox.stored(parcel) {
                if done.end == End::Ended(Disposition::Forwarded, "") { &mut forwarded } else { &mut letters }.push(done.offset);
            }
        }
        assert_eq!((forwarded, letters), (vec![0, 1, 2, 3, 4, 6, 7], vec![5]));
        assert_eq!(outbox.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_of_a_partition_that_went_is_dropped_and_what_finds_no_room_waits() {
        let mut outbox = outbox(2);
        let other = super::super::Publication { slot: 1, delivery: test_delivery("", 2), ..publication(2) };
        outbox.put(other);
        let (mut parcel, dropped) = outbox.gather(|slot, _| slot == 0);
        assert_eq!((offsets(&parcel), dropped, outbox.len()), (vec![0, 1], 1, 2));
        assert_eq!(outbox.defer(&mut parcel, |_, offset| offset < 1), [(0, 1, 1)]);
        assert_eq!(offsets(&parcel), [0]);
        outbox.stored(parcel);
        let parcel = packed(&mut outbox);
        assert_eq!(offsets(&parcel), [1]);
        outbox.stored(parcel);
        assert_eq!((outbox.len(), outbox.bytes), (0, 0));
    }
}
