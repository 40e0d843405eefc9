//! What the service is called with, and what it says.

use std::sync::Arc;

use mesh_routing::{Order, Route};

use super::super::{service::Said, sides::is_done, world::Life};
use super::{Checked, End, Ledger, Out, Trust, end, lane_key};
use crate::{outcome::Delivery, record::now_ms};

impl Ledger {
    /// The service is called.
    pub(in crate::consume::sim) fn delivered(&mut self, life: &Life, delivery: &Delivery, call: u64) -> Checked {
        self.deliveries += 1;
        let (partition, offset) = (&delivery.position.partition, delivery.position.offset);
        let what = format!("{life} delivers {partition}/{offset}");
        let source = self.source(partition, offset).ok_or_else(|| format!("{what}, which was never published"))?;
        if source.hidden || self.untouched(source).is_some() {
            return Err(format!("{what}, which is not to be delivered"));
        }
        let (key, first) = (lane_key(source), source.deliveries == 0);
        let records = &self.sources[partition];
        let low = self.lows.get(partition).copied().unwrap_or(0);
        // Whoever stood still while another one got the partition goes on with the copies that it read, though they are committed by now.
        let late = self.is_superseded(life, partition);
        let copies = || self.sides.copies(partition, offset);
        let read = || copies().filter(|(place, _)| late || !is_done(&self.commits_made, &place.partition, place.offset));
        let (anew, waits) = (self.begins_anew(source), read().next().is_some());
        let twice = self.plan.routes[0].order == Order::None && copies().next().is_some();
        let owner = self.owners.get(&(life.process, life.number)).ok_or_else(|| format!("{what} without an assignment"))?;
        let with = |offset: i64| owner.out.values().any(|out| out.call == call && out.partition == *partition && out.offset == offset);
        if first {
            let before = records.iter().enumerate().take(offset as usize).skip(low as usize);
            for (earlier, other) in before.filter(|(_, other)| self.plan.same_lane(key, lane_key(other))) {
                let open = other.ends.is_empty() && !other.hidden && !other.expired && self.untouched(other).is_none();
                if open && !with(earlier as i64) {
                    return Err(format!("{what} for the first time, before {earlier} of its lane has its end"));
                }
            }
        }
        let same = |out: &Out| {
            let other = records.get(out.offset as usize).and_then(lane_key);
            out.partition == *partition && self.plan.same_lane(key, other) && (out.call != call || (out.offset >= offset && !waits))
        };
        if let Some(other) = owner.out.values().find(|out| same(out)) {
            return Err(format!("{what} while {} of its lane is at the service", other.offset));
        }
        let holding = owner.has.get(partition).ok_or_else(|| format!("{what}, but does not have the partition"))?;
        // A copy in a retry or park topic may be one too many: whoever wrote it did not learn that it was stored.
        if !waits && !twice && (offset < holding.position || offset < holding.committed || holding.complete.contains(&offset)) {
            return Err(format!("{what}, which is committed as complete ({holding:?})"));
        }
        if !waits && !twice && holding.ended.contains(&offset) {
            return Err(format!("{what}, which has its end already"));
        }
        // Also of what lies in retry and park topics since commits were lost, nothing overtakes what was before it; but for what a former owner put
        // there late, since nobody knew of it, and for a second copy, of a record whose acknowledgement was lost. What is read from its source again
        // may come while a later one is tried again. A batch may be answered as done behind the record that failed.
        let one_by_one = self.plan.routes.iter().all(|route| route.batch.is_none());
        let again = copies().filter(|(_, copy)| copy.attempts + 1 == delivery.attempt).nth(1).is_some();
        let overtaken = holding.reached.iter().find(|(lane, later)| **later > offset && self.plan.same_lane(key, **lane));
        if let Some((_, later)) =
            overtaken.filter(|_| one_by_one && offset < holding.position && !anew && !late && !read().any(|(_, copy)| copy.stale) && !again)
        {
            return Err(format!("{what} after {later} of its lane"));
        }
        let attempt = holding.failed.get(&offset).copied().unwrap_or(0) + 1;
        let unsure = owner.trust.as_ref().is_some_and(|trust| trust.unsure);
        let written = || read().map(|(_, waiting)| waiting.attempts + 1);
        // Without an order a record may run from two places at once, after a crash.
        let unordered = twice;
        let made = owner.failures.get(&(partition.clone(), offset)).into_iter().flatten().map(|failure| failure.0 + 1);
        let most = written().chain([attempt]).chain(made.filter(|_| twice)).max().unwrap_or(attempt);
        let lower = unsure || unordered || anew;
        if attempt != delivery.attempt && !written().any(|next| next == delivery.attempt) && !(lower && delivery.attempt <= most) {
            return Err(format!("{what} as attempt {} instead of {attempt}", delivery.attempt));
        }
        let counted = holding.counted.get(&offset).copied().unwrap_or(0);
        // What a former owner put there late begins where that one stood.
        let stale = || read().any(|(_, copy)| copy.stale && copy.attempts + 1 == delivery.attempt);
        if delivery.attempt <= counted && !anew && !stale() {
            return Err(format!("{what} as attempt {}, but {counted} attempts were written down", delivery.attempt));
        }
        if delivery.attempt > self.plan.attempts().1 {
            return Err(format!("{what} as attempt {}", delivery.attempt));
        }
        let due =
            self.sides.copies(partition, offset).filter(|(_, copy)| copy.attempts + 1 == delivery.attempt).filter_map(|(_, c)| c.due_ms);
        if let Some(due) = due.min().filter(|due| *due > now_ms() && self.plan.is_calm()) {
            return Err(format!("{what} {} ms too early", due - now_ms()));
        }
        if delivery.record.value.as_deref() != Some(source.planned.value.as_bytes()) {
            return Err(format!("{what} with another value: {:?}", delivery.record.value));
        }
        let at_once = |route: &Arc<Route>| route.concurrency * route.batch.map_or(1, |batch| batch.max);
        let most = self.plan.routes.iter().map(at_once).max().unwrap_or(0);
        if owner.out.len() >= most {
            return Err(format!("{what}: more than {most} are at the service"));
        }
        let assignment = holding.assignment;
        let owner = self.owner(life);
        if let Some(holding) = owner.has.get_mut(partition) {
            let reached = holding.reached.entry(key).or_insert(offset);
            *reached = offset.max(*reached);
        }
        owner.deliveries += 1;
        owner.out.insert(delivery.id, Out { partition: partition.clone(), offset, assignment, call });
        if let Some(source) = self.sources.get_mut(partition).and_then(|records| records.get_mut(offset as usize)) {
            source.deliveries += 1;
        }
        Ok(())
    }

    /// The service says something.
    pub(in crate::consume::sim) fn answered(&mut self, life: &Life, delivery: &Delivery, said: &Said) -> Checked {
        let (partition, offset) = (&delivery.position.partition, delivery.position.offset);
        let mut end = end(&delivery.route, self.plan.in_play(), delivery.attempt, said);
        let trust = Trust::new(&self.plan);
        let used_up = said.fails() && delivery.attempt >= self.plan.attempts().0;
        let lane = match self.plan.routes[0].order {
            Order::Key => Some(self.source(partition, offset).and_then(lane_key)),
            Order::Partition => Some(None),
            Order::None => None,
        };
        let gives_up = said.fails()
            && (delivery.attempt >= delivery.route.retry.attempts
                || said.wish().zip(delivery.route.retry_topics.first()).is_some_and(|(wish, first)| wish >= *first));
        let discarding = self.discarded_ms == Some(now_ms());
        let owner = self.owner(life);
        let Some(Out { assignment, call, .. }) = owner.out.remove(&delivery.id) else {
            return Err(format!("{life} is answered {partition}/{offset}, which is not at the service"));
        };
        let lane = lane.map(|key| (call, partition.clone(), key));
        let before = lane.as_ref().and_then(|lane| owner.behind.get(lane)).copied();
        if before == Some(true) {
            // One before it in its lane failed in the same call.
            return Ok(());
        }
        if said.fails() {
            let wish = said.wish().map_or(0, |wish| wish.as_millis() as i64);
            owner.failures.entry((partition.clone(), offset)).or_default().push((delivery.attempt, now_ms(), wish));
        }
        let trust = owner.trust.get_or_insert(trust);
        let holding = owner.has.get_mut(partition).filter(|holding| holding.assignment == assignment);
        let exhausted = end == Some(End::Dead("attempts"));
        let spends = gives_up && (holding.is_some() || owner.leaving.contains(partition));
        let counts = trust.counts(said, owner.first.entry((assignment, offset)).or_default(), spends);
        let unsure = trust.unsure;
        if !counts && !unsure && exhausted {
            end = None;
        }
        if counts && gives_up && !unsure {
            // It comes back as another one.
            owner.first.remove(&(assignment, offset));
        }
        let holding = owner.has.get_mut(partition).filter(|holding| holding.assignment == assignment);
        if let Some(lane) = lane {
            match end {
                None => drop(owner.behind.insert(lane, true)),
                Some(_) if exhausted && unsure => drop(owner.behind.insert(lane, false)),
                Some(_) => {}
            }
        }
        if let Some(holding) = holding {
            match (&end, said) {
                (Some(_), _) if exhausted && unsure => drop(holding.failed.insert(offset, delivery.attempt)),
                (Some(_), _) if before == Some(false) => {}
                (Some(_), _) => drop(holding.ended.insert(offset)),
                (None, Said::Away) => {}
                (None, _) if !counts && !unsure => {}
                (None, _) => drop(holding.failed.insert(offset, delivery.attempt)),
            }
        }
        if let Some(source) = self.sources.get_mut(partition).and_then(|records| records.get_mut(offset as usize)) {
            source.exhausted |= used_up;
            // In the same breath somebody discards what waits: either may come first.
            if used_up && discarding {
                source.ends.push(End::Dead("attempts"));
            }
        }
        if let (Some(end), Some(source)) = (end, self.sources.get_mut(partition).and_then(|records| records.get_mut(offset as usize))) {
            source.ends.push(end);
        }
        Ok(())
    }
}
