//! What is committed.

use super::super::{
    sides::{Commits, is_done},
    world::Life,
};
use super::{Checked, Ledger, above};
use crate::broker::Commit;

impl Ledger {
    /// A commit is about to be made.
    pub(in crate::consume::sim) fn committing(&mut self, life: &Life, commits: &[Commit]) -> Checked {
        let mut after = self.commits_made.clone();
        for commit in commits {
            after.insert(commit.partition.clone(), (commit.offset, above(commit)));
        }
        for commit in commits {
            self.commits += 1;
            let partition = &commit.partition;
            let what = format!("{life} commits {partition} at {}", commit.offset);
            let source = self.source_of(partition);
            let owner = self.owner(life);
            if !owner.has.contains_key(&source) && !owner.leaving.contains(&source) {
                return Err(format!("{what}, which it does not have"));
            }
            if source != *partition {
                // What was copied behind its back is not known to who stood still: its commit is to be refused, see `committed`.
                if !self.is_superseded(life, &source) {
                    self.committing_beside(&what, commit, &after)?;
                }
                continue;
            }
            if commit.offset > self.high(partition) {
                return Err(format!("{what}, beyond the end"));
            }
            let checked = self.checked.get(partition).copied().unwrap_or(0);
            let records = &self.sources[partition];
            for offset in checked..commit.offset {
                if !self.complete(partition, offset, &records[offset as usize]) && !self.waits_elsewhere(&after, partition, offset) {
                    return Err(format!("{what}, but {offset} is not complete: {:?}", records[offset as usize]));
                }
            }
            for offset in above(commit) {
                let complete = records.get(offset as usize).is_some_and(|source| self.complete(partition, offset, source));
                if !complete && !self.waits_elsewhere(&after, partition, offset) {
                    return Err(format!("{what} and records {offset}, which is not complete: {:?}", records.get(offset as usize)));
                }
            }
            self.checked.insert(partition.clone(), checked.max(commit.offset));
        }
        Ok(())
    }

    /// Of a retry or park topic: what is done there has its end, or waits elsewhere.
    fn committing_beside(&self, what: &str, commit: &Commit, after: &Commits) -> Checked {
        let partition = &commit.partition;
        if commit.offset > self.sides.end(partition) {
            return Err(format!("{what}, beyond the end"));
        }
        let from = self.commits_made.get(partition).map_or(0, |made| made.0);
        for offset in (from..commit.offset).chain(above(commit)) {
            let Some(waiting) = self.sides.get(partition, offset) else { return Err(format!("{what} and {offset}, which is not there")) };
            let (of, origin) = (&waiting.of, waiting.origin);
            let complete = self.source(of, origin).is_some_and(|source| self.complete(of, origin, source));
            if !complete && is_done(after, of, origin) && !self.waits_elsewhere(after, of, origin) {
                return Err(format!("{what}, but {offset} has no end, and is nowhere else: {waiting:?}"));
            }
        }
        Ok(())
    }

    /// A commit was made.
    pub(in crate::consume::sim) fn committed(&mut self, life: &Life, commits: &[Commit]) -> Checked {
        for commit in commits {
            let source = self.source_of(&commit.partition);
            // One that hears late of an assignment that is over already leaves soon.
            let has = |who| self.owners.get(who).is_some_and(|owner| owner.has.contains_key(&source));
            if source != commit.partition && self.is_superseded(life, &source) && self.newest.get(&source).is_some_and(has) {
                return Err(format!("{life} commits {} at {}, which another one has by now", commit.partition, commit.offset));
            }
            self.known(vec![commit.clone()]).map_err(|wrong| format!("{life}: {wrong}"))?;
            if let Some(holding) = self.owner(life).has.get_mut(&commit.partition) {
                holding.committed = commit.offset;
            }
        }
        Ok(())
    }
}
