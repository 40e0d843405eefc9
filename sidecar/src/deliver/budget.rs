//! The retry budget of a route: how many records may be given up to retry topics, the park topic or dead letters; and whose a failure is. Pure.
//!
//! Each that is given up since its attempts are used up costs one; each that the service processes earns what one record may cost on its way
//! through all retry topics to its end. So a service that fails most of the time moves a topic nowhere: without credit the route waits, and
//! tries one record at a time. After uForwarder.
//!
//! A record that fails again, though others went well since it failed first, is at fault itself: that says nothing of the service. All other
//! failures may be the service's.
//!
//! Invariant: of any run of records more come to an end by that than were processed by the credit at most.

/// What is saved up at most, of good days.
const SAVED: u32 = 1_000;

/// Whether a failure is its record's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blame {
    /// How many records the service processed.
    goods: u64,
}

impl Blame {
    /// The service processed a record.
    pub fn good(&mut self) {
        self.goods += 1;
    }

    /// A record failed: whether others went well since it did so `first`, which is remembered with it.
    pub fn is_the_records(&self, first: &mut Option<u64>) -> bool {
        *first.get_or_insert(self.goods) < self.goods
    }
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    credit: u32,
}

impl Budget {
    /// A budget of so many, before the service processed anything.
    pub fn new(first: u32) -> Self {
        Self { credit: first }
    }

    /// The service processed a record, on a route where one may be given up so often.
    pub fn earn(&mut self, steps: u32) {
        self.credit = self.credit.max(self.credit.saturating_add(steps).min(SAVED));
    }

    /// How many may be given up now.
    pub fn credit(&self) -> u32 {
        self.credit
    }

    /// Gives a record up, if there is credit.
    pub fn spend(&mut self) -> bool {
        let some = self.credit > 0;
        self.credit = self.credit.saturating_sub(1);
        some
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_cannot_drain_a_topic_into_its_dlq() {
        let mut budget = Budget::new(20);
        assert_eq!((0..1_000_000).filter(|_| budget.spend()).count(), 20);
        budget.earn(1);
        assert!(budget.spend() && !budget.spend());
        (0..100_000).for_each(|_| budget.earn(1));
        assert_eq!((0..1_000_000).filter(|_| budget.spend()).count(), SAVED as usize);
    }

    #[test]
    fn half_of_all_records_may_be_poison() {
        let mut budget = Budget::new(1);
        for _ in 0..1_000 {
            assert!(budget.spend());
            budget.earn(1);
        }
    }

    #[test]
    fn a_record_that_fails_while_others_go_well_is_at_fault_itself() {
        let (mut blame, mut one, mut other) = (Blame::default(), None, None);
        assert!(!blame.is_the_records(&mut one), "the first time");
        assert!(!blame.is_the_records(&mut one), "nothing else went well since");
        blame.good();
        assert!(blame.is_the_records(&mut one));
        assert!(!blame.is_the_records(&mut other));
    }
}
