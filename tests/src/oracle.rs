//! The judge: every acknowledged record is found exactly where it should be, in order per key, and duplicates are counted.
//!
//! A record's identity is what its value says, `{"k": key, "n": number}`, and not what the mesh wrote beside it, so that the judge depends
//! on nothing that it judges. `n` grows by one within a key.
//!
//! Invariant: a judge that cannot fail is worth nothing: each check has a mutation in the unit tests under which it fails.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::{mesh::Found, service::Entry};

/// A record's identity.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// The key.
    pub key: String,
    /// The number within the key.
    pub number: i64,
}

impl Identity {
    /// The identity that a value states.
    ///
    /// # Errors
    /// If it states none.
    pub fn of(value: &Value) -> Result<Self> {
        match (value["k"].as_str(), value["n"].as_i64()) {
            (Some(key), Some(number)) => Ok(Self { key: key.to_owned(), number }),
            _ => anyhow::bail!("no identity in {value}"),
        }
    }
}

/// One sighting of a record: a delivery, or a record in a topic.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// Whose.
    pub identity: Identity,
    /// The `mesh-id` that it carried.
    pub mesh_id: String,
    /// Where: the partition within whose records order counts.
    pub place: String,
}

/// The sightings in a topic's records. Partitions may be mixed; within one they must be in the order of offsets.
///
/// # Errors
/// If a value states no identity.
pub fn sightings(found: &[Found]) -> Result<Vec<Sighting>> {
    found
        .iter()
        .map(|found| {
            Ok(Sighting {
                identity: Identity::of(&found.json())?,
                mesh_id: found.header("mesh-id").unwrap_or_default(),
                place: format!("{}/{}", found.topic, found.partition),
            })
        })
        .collect()
}

/// The sightings in a service's ledger, which must keep bodies.
///
/// # Errors
/// If a body states no identity.
pub fn deliveries(ledger: &[Entry]) -> Result<Vec<Sighting>> {
    ledger
        .iter()
        .map(|entry| {
            let place = format!("{}/{}", entry.topic, entry.partition);
            Ok(Sighting { identity: Identity::of(&entry.json())?, mesh_id: entry.id.clone(), place })
        })
        .collect()
}

/// What was acknowledged, and so must be found.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    acknowledged: BTreeSet<Identity>,
    possible: BTreeSet<Identity>,
}

impl Oracle {
    /// A record was acknowledged.
    pub fn acknowledge(&mut self, key: &str, number: i64) {
        self.acknowledged.insert(Identity { key: key.to_owned(), number });
    }

    /// A record was sent and not acknowledged: it may be found or not.
    pub fn perhaps(&mut self, key: &str, number: i64) {
        self.possible.insert(Identity { key: key.to_owned(), number });
    }

    /// With what another saw acknowledged.
    pub fn merge(&mut self, other: Self) {
        self.acknowledged.extend(other.acknowledged);
        self.possible.extend(other.possible);
    }

    /// How many were acknowledged.
    pub fn len(&self) -> usize {
        self.acknowledged.len()
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.acknowledged.is_empty()
    }

    /// Those of the acknowledged that fulfil a condition: what must be found at one of several destinations.
    #[must_use]
    pub fn only(&self, condition: impl Fn(&Identity) -> bool) -> Self {
        let keep = |all: &BTreeSet<Identity>| all.iter().filter(|one| condition(one)).cloned().collect();
        Self { acknowledged: keep(&self.acknowledged), possible: keep(&self.possible) }
    }

    /// Judges all sightings at one destination.
    pub fn judge(&self, sightings: &[Sighting]) -> Verdict {
        let mut verdict = Verdict { sightings: sightings.len(), ..Verdict::default() };
        let mut seen: HashMap<&Identity, (&str, &str)> = HashMap::new();
        let mut last: BTreeMap<&str, i64> = BTreeMap::new();
        let mut homes: BTreeMap<&str, &str> = BTreeMap::new();
        for sighting in sightings {
            let identity = &sighting.identity;
            if !self.acknowledged.contains(identity) && !self.possible.contains(identity) {
                verdict.unknown.push(format!("{identity:?}"));
            }
            if let Some((mesh_id, _)) = seen.insert(identity, (&sighting.mesh_id, &sighting.place)) {
                verdict.duplicates += 1;
                if mesh_id != sighting.mesh_id {
                    verdict.unlike.push(format!("{identity:?}: {mesh_id} and {}", sighting.mesh_id));
                }
                continue;
            }
            let before = last.insert(&identity.key, identity.number);
            if before.is_some_and(|before| before >= identity.number) {
                verdict.disorder.push(format!("{identity:?} after {before:?}"));
            }
            let home = homes.entry(&identity.key).or_insert(&sighting.place);
            if *home != sighting.place {
                verdict.disorder.push(format!("{identity:?} is in {} and its key in {home}", sighting.place));
            }
        }
        verdict.lost = self.acknowledged.iter().filter(|identity| !seen.contains_key(identity)).map(|one| format!("{one:?}")).collect();
        verdict
    }
}

/// What the judge found.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// How many sightings there were.
    pub sightings: usize,
    /// Acknowledged and not found.
    pub lost: Vec<String>,
    /// Found and never sent.
    pub unknown: Vec<String>,
    /// Sightings beyond the first of each record.
    pub duplicates: usize,
    /// First sightings out of their key's order, or in two partitions.
    pub disorder: Vec<String>,
    /// Duplicates that carry another `mesh-id`: nobody could drop them.
    pub unlike: Vec<String>,
}

impl Verdict {
    /// Nothing lost, nothing invented, order per key, duplicates with one id, and no more of them than this.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn at_most(&self, duplicates: usize) -> Result<()> {
        let some = |list: &[String]| list.iter().take(5).cloned().collect::<Vec<_>>();
        ensure!(self.lost.is_empty(), "{} records are lost: {:?} …", self.lost.len(), some(&self.lost));
        ensure!(self.unknown.is_empty(), "{} records were never sent: {:?} …", self.unknown.len(), some(&self.unknown));
        ensure!(self.disorder.is_empty(), "{} times out of order: {:?} …", self.disorder.len(), some(&self.disorder));
        ensure!(self.unlike.is_empty(), "{} duplicates with another mesh-id: {:?} …", self.unlike.len(), some(&self.unlike));
        ensure!(self.duplicates <= duplicates, "{} duplicates where at most {duplicates} are allowed", self.duplicates);
        Ok(())
    }

    /// As [`Verdict::at_most`] with no duplicate at all.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn exactly_once(&self) -> Result<()> {
        self.at_most(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean() -> (Oracle, Vec<Sighting>) {
        let mut oracle = Oracle::default();
        let mut sightings = Vec::new();
        for number in 0..5 {
            for key in ["a", "b"] {
                oracle.acknowledge(key, number);
                let identity = Identity { key: key.to_owned(), number };
                sightings.push(Sighting { identity, mesh_id: format!("{key}{number}"), place: format!("t/{key}") });
            }
        }
        (oracle, sightings)
    }

    #[test]
    fn a_clean_run_passes() {
        let (oracle, sightings) = clean();
        oracle.judge(&sightings).exactly_once().unwrap();
    }

    #[test]
    fn a_lost_record_fails() {
        let (oracle, mut sightings) = clean();
        sightings.remove(3);
        assert!(oracle.judge(&sightings).at_most(9).unwrap_err().to_string().contains("lost"));
    }

    #[test]
    fn a_swapped_pair_fails() {
        let (oracle, mut sightings) = clean();
        sightings.swap(0, 2);
        assert!(oracle.judge(&sightings).at_most(9).unwrap_err().to_string().contains("order"));
    }

    #[test]
    fn a_duplicate_is_counted_and_its_order_is_not_judged() {
        let (oracle, mut sightings) = clean();
        sightings.push(sightings[0].clone());
        assert!(oracle.judge(&sightings).exactly_once().is_err());
        oracle.judge(&sightings).at_most(1).unwrap();
    }

    #[test]
    fn a_duplicate_with_another_id_fails() {
        let (oracle, mut sightings) = clean();
        sightings.push(Sighting { mesh_id: "other".into(), ..sightings[0].clone() });
        assert!(oracle.judge(&sightings).at_most(1).unwrap_err().to_string().contains("mesh-id"));
    }

    #[test]
    fn an_invented_record_fails() {
        let (oracle, mut sightings) = clean();
        sightings.push(Sighting { identity: Identity { key: "a".into(), number: 9 }, ..sightings[0].clone() });
        assert!(oracle.judge(&sightings).at_most(9).unwrap_err().to_string().contains("never sent"));
    }

    #[test]
    fn a_key_in_two_partitions_fails() {
        let (oracle, mut sightings) = clean();
        sightings[4].place = "t/other".into();
        assert!(oracle.judge(&sightings).at_most(9).unwrap_err().to_string().contains("order"));
    }

    #[test]
    fn an_unacknowledged_record_may_be_found_or_not() {
        let (mut oracle, mut sightings) = clean();
        oracle.perhaps("a", 5);
        oracle.judge(&sightings).exactly_once().unwrap();
        sightings.push(Sighting { identity: Identity { key: "a".into(), number: 5 }, mesh_id: "a5".into(), place: "t/a".into() });
        oracle.judge(&sightings).exactly_once().unwrap();
    }
}
