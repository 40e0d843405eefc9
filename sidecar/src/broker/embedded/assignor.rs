//! Who of a group's members reads which partition. Pure.
//!
//! Invariant: every partition that somebody subscribes has exactly one reader, who subscribes its topic.
//! Invariant: a partition moves only if that brings the loads of two members closer, so that a stable group keeps its partitions.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::record::TopicPartition;

/// The topics of each member.
pub(super) type Subscriptions = BTreeMap<u64, BTreeSet<Arc<str>>>;

/// Distributes `partitions` over `members`, and moves as few as possible away from their `owners`.
pub(super) fn assign(
    members: &Subscriptions,
    partitions: &BTreeSet<TopicPartition>,
    owners: &BTreeMap<TopicPartition, u64>,
) -> BTreeMap<TopicPartition, u64> {
    let subscribes = |member: u64, partition: &TopicPartition| members.get(&member).is_some_and(|topics| topics.contains(&partition.topic));
    let mut loads: BTreeMap<u64, usize> = members.keys().map(|member| (*member, 0)).collect();
    let mut target = BTreeMap::new();
    for partition in partitions {
        if let Some(owner) = owners.get(partition).filter(|owner| subscribes(**owner, partition)) {
            *loads.entry(*owner).or_default() += 1;
            target.insert(partition.clone(), *owner);
        }
    }
    for partition in partitions.iter().filter(|partition| !owners.get(*partition).is_some_and(|owner| subscribes(*owner, partition))) {
        let least = loads.iter().filter(|(member, _)| subscribes(**member, partition)).min_by_key(|(member, load)| (**load, **member));
        if let Some(member) = least.map(|(member, _)| *member) {
            *loads.entry(member).or_default() += 1;
            target.insert(partition.clone(), member);
        }
    }
    // From the fullest member that can give one away to the emptiest that takes it. Every move lowers the sum of the squared loads, so
    // this ends.
    let mut by_owner: BTreeMap<u64, BTreeSet<TopicPartition>> = BTreeMap::new();
    for (partition, owner) in &target {
        by_owner.entry(*owner).or_default().insert(partition.clone());
    }
    'moves: loop {
        let mut fullest: Vec<(usize, u64)> = loads.iter().map(|(member, load)| (*load, *member)).collect();
        fullest.sort_unstable_by(|one, other| other.cmp(one));
        for (load, owner) in fullest {
            let takers = by_owner.get(&owner).into_iter().flatten().filter_map(|partition| {
                let least =
                    loads.iter().filter(|(member, _)| subscribes(**member, partition)).min_by_key(|(member, load)| (**load, **member));
                least.filter(|(_, least)| load >= **least + 2).map(|(member, least)| (*least, *member, partition.clone()))
            });
            if let Some((least, member, partition)) = takers.min() {
                loads.insert(owner, load - 1);
                loads.insert(member, least + 1);
                by_owner.entry(owner).or_default().remove(&partition);
                by_owner.entry(member).or_default().insert(partition.clone());
                target.insert(partition, member);
                continue 'moves;
            }
        }
        return target;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn partitions(topic: &str, count: i32) -> BTreeSet<TopicPartition> {
        (0..count).map(|number| TopicPartition::new(topic, number)).collect()
    }

    fn moved(before: &BTreeMap<TopicPartition, u64>, after: &BTreeMap<TopicPartition, u64>) -> usize {
        before.iter().filter(|(partition, owner)| after.get(*partition) != Some(*owner)).count()
    }

    fn members(ids: impl IntoIterator<Item = u64>) -> Subscriptions {
        ids.into_iter().map(|id| (id, BTreeSet::from([Arc::from("t")]))).collect()
    }

    #[test]
    fn only_what_must_move_moves() {
        let all = partitions("t", 12);
        let one = assign(&members([1]), &all, &BTreeMap::new());
        let two = assign(&members([1, 2]), &all, &one);
        assert_eq!(moved(&one, &two), 6);
        let three = assign(&members([1, 2, 3]), &all, &two);
        assert_eq!(moved(&two, &three), 4);
        assert_eq!(moved(&three, &assign(&members([1, 2, 3]), &all, &three)), 0);
        let left = assign(&members([1, 3]), &all, &three);
        assert_eq!(moved(&three, &left), three.values().filter(|owner| **owner == 2).count());
    }

    proptest! {
        #[test]
        fn every_partition_has_a_subscriber(
            topics in prop::collection::vec(1..9i32, 1..4),
            members in prop::collection::btree_map(0..6u64, prop::collection::btree_set(0..4usize, 1..4), 1..6),
            owners in prop::collection::vec(0..8u64, 40),
        ) {
            let name = |index: usize| Arc::<str>::from(format!("t{index}"));
            let all: BTreeSet<_> = topics.iter().enumerate().flat_map(|(topic, count)| partitions(&name(topic), *count)).collect();
            let members: Subscriptions = members.into_iter().map(|(id, topics)| (id, topics.into_iter().map(name).collect())).collect();
            let owners: BTreeMap<_, _> = all.iter().cloned().zip(owners).collect();
            let target = assign(&members, &all, &owners);
            for partition in &all {
                let anybody = members.values().any(|topics| topics.contains(&partition.topic));
                prop_assert_eq!(target.contains_key(partition), anybody);
                if let Some(owner) = target.get(partition) {
                    prop_assert!(members[owner].contains(&partition.topic));
                }
            }
            let load = |member: u64| target.values().filter(|owner| **owner == member).count();
            for (partition, owner) in &target {
                for (other, topics) in &members {
                    prop_assert!(!topics.contains(&partition.topic) || load(*owner) <= load(*other) + 1);
                }
            }
            prop_assert_eq!(moved(&target, &assign(&members, &all, &target)), 0);
        }
    }
}
