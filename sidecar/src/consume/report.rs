//! What a route tells of itself: the board, and its gauges.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use mesh_routing::Order;
use tokio::time::Instant;

use super::route::{RouteLoop, Slot};
use crate::{
    broker::{Admin, BrokerError, BrokerErrorKind, ProduceErrorKind},
    record::{Position, TopicPartition, now_ms},
    status::{RouteState, RouteStatus},
};

/// How often the board is posted.
const POST: Duration = Duration::from_millis(500);

/// The newest offsets of partitions.
pub(super) struct Measured {
    /// When the broker was asked, in milliseconds since 1970-01-01 UTC.
    at_ms: i64,
    /// The assignment for which it was asked.
    epoch: u64,
    ends: Vec<(u32, i64, Option<End>)>,
    complete: bool,
    /// Of retry and park topics.
    sides: Vec<(u32, i64)>,
}

/// From `from` to `high` there is no record: markers of transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    from: i64,
    high: i64,
}

/// A partition whose lag is measured.
pub(super) struct Asked {
    slot: u32,
    partition: TopicPartition,
    /// What was measured last.
    high: i64,
    end: Option<End>,
    /// Where reading goes on, if all that was read is complete.
    idle: Option<i64>,
}

impl Asked {
    pub(super) fn new(index: u32, slot: &Slot) -> Self {
        let idle = (slot.watermark.incomplete() == 0 && !slot.held).then(|| slot.watermark.next());
        Self { slot: index, partition: slot.partition.clone(), high: slot.high, end: slot.end, idle }
    }

    /// The newest offset + 1, as it was told, and whether it is not a record's but a transaction's marker. That is looked up once, when nothing happens.
    async fn measure(&self, high: Result<i64, BrokerError>, admin: &dyn Admin) -> Result<(i64, Option<End>), BrokerError> {
        let high = high?;
        let Some(from) = self.idle.filter(|from| *from < high && high == self.high) else { return Ok((high, None)) };
        let end = End { from, high };
        if self.end != Some(end) {
            let position = Position { partition: self.partition.clone(), offset: from };
            if admin.readable(vec![position]).await.pop().unwrap_or(Ok(true))? {
                return Ok((high, None));
            }
        }
        Ok((high, Some(end)))
    }
}

/// Asks the broker for the newest offsets of partitions; one that it does not tell is left out.
pub(super) fn watch_lag(
    admin: Arc<dyn Admin>,
    epoch: u64,
    partitions: Vec<Asked>,
    sides: Vec<(u32, TopicPartition)>,
) -> BoxFuture<'static, Measured> {
    async move {
        let (at_ms, asked) = (now_ms(), partitions.len());
        let all = partitions.iter().map(|asked| &asked.partition).chain(sides.iter().map(|(_, partition)| partition)).cloned().collect();
        let mut highs = admin.ends(all).await.into_iter();
        let mut ends = Vec::with_capacity(asked);
        for (asked, high) in partitions.into_iter().zip(highs.by_ref()) {
            match asked.measure(high, &*admin).await {
                Ok((high, end)) => ends.push((asked.slot, high, end)),
                Err(error) => tracing::debug!(partition = %asked.partition, %error, "no watermark for the lag"),
            }
        }
        let complete = ends.len() == asked;
        let told = |((slot, partition), high): ((u32, TopicPartition), Result<i64, BrokerError>)| match high {
            Ok(high) => Some((slot, high)),
            Err(error) => {
                tracing::debug!(%partition, %error, "not known whether something came late into a retry topic");
                None
            }
        };
        let sides = sides.into_iter().zip(highs).filter_map(told).collect();
        Measured { at_ms, epoch, ends, complete, sides }
    }
    .boxed()
}

/// Records behind: those that are read and not complete, and those that were not read yet.
fn behind(slot: &Slot) -> u64 {
    let next = slot.watermark.next();
    let end = match slot.end {
        Some(end) if end.from == next => next,
        _ => slot.high.max(next),
    };
    end.saturating_sub(slot.watermark.offset()).max(0).unsigned_abs()
}

impl RouteLoop {
    pub(super) fn on_lag(&mut self, measured: Measured) {
        self.lag = None;
        for (index, high, end) in measured.ends {
            if let Some(slot) = self.slots.get_mut(index as usize) {
                slot.high = high;
                slot.end = end;
            }
        }
        if measured.complete && measured.epoch == self.epoch {
            self.lag_measured_ms = measured.at_ms;
        }
        measured.sides.into_iter().for_each(|(index, high)| self.came_late(index, high));
    }

    /// Posts with the next turn.
    pub(super) fn post_now(&mut self) {
        self.post_due = Instant::now();
    }

    pub(super) fn post(&mut self, now: Instant) {
        self.post_due = now + POST;
        let (state, reason) = self.state();
        let since = match state {
            RouteState::Running | RouteState::Draining => 0,
            _ if self.posted.state == state && self.posted.waiting_since_ms > 0 => self.posted.waiting_since_ms,
            _ => now_ms(),
        };
        let owned = || self.sources().map(|(_, slot)| slot);
        let all = || self.owned().map(|(_, slot)| slot);
        let lag_records = owned().map(behind).sum();
        let oldest = owned().filter_map(|slot| slot.watermark.oldest_timestamp_ms()).min();
        let lag_seconds = oldest.map_or(0.0, |oldest| now_ms().saturating_sub(oldest).max(0) as f64 / 1e3);
        let (waiting, keys, due) = self.waiting_elsewhere();
        let status = RouteStatus {
            route: self.route.name.clone(),
            service: self.route.service.clone(),
            state,
            reason,
            waiting_since_ms: since,
            partitions: owned().count() as u32,
            lag_records,
            lag_measured_ms: self.lag_measured_ms,
            lag_seconds,
            breaker_open: self.breaker.is_open(),
            in_flight: self.out as u64,
            dispositions: self.dispositions.clone(),
            parked_records: waiting.parked as u64,
            exhausted_records: waiting.kept as u64,
            waiting_keys: if self.route.order == Order::None { 0 } else { keys as u64 },
            next_retry_ms: due.map_or(0, |due| now_ms().saturating_add(i64::try_from(due.as_millis()).unwrap_or(i64::MAX))),
        };
        let metrics = &self.parts.metrics;
        metrics.state(state);
        metrics.concurrency_limit.set(self.concurrency() as u64);
        metrics.partitions.set(status.partitions.into());
        metrics.lag_records.set(lag_records);
        metrics.lag_seconds.set(lag_seconds);
        metrics.parked_records.set(status.parked_records);
        metrics.exhausted_records.set(status.exhausted_records);
        metrics.waiting_keys.set(status.waiting_keys);
        metrics.next_retry_seconds.set(due.unwrap_or_default().as_secs_f64());
        metrics.queue_bytes.set(all().map(|slot| slot.watermark.bytes() as u64).sum());
        let unrecorded = |slot: &Slot| slot.busy as u64 + slot.unrecorded + slot.watermark.completed().saturating_sub(slot.recorded);
        metrics.replay_records.set(all().map(unrecorded).sum::<u64>() + self.backoffs.len() as u64);
        let stalled = owned().filter(|slot| slot.watermark.incomplete() > 0).map(|slot| now.saturating_duration_since(slot.moved)).max();
        metrics.watermark_stall_seconds.set(stalled.unwrap_or_default().as_secs_f64());
        if status != self.posted {
            self.parts.board.post(status.clone());
            self.posted = status;
        }
    }

    /// What the route does, and whom it waits for.
    pub(super) fn state(&self) -> (RouteState, String) {
        if self.draining.is_some() {
            return (RouteState::Draining, String::new());
        }
        if let Some(error) = &self.broker_trouble {
            let state = match error.kind {
                BrokerErrorKind::UnknownTopic => RouteState::WaitingForTopic,
                _ => RouteState::WaitingForBroker,
            };
            return (state, error.to_string());
        }
        if let Some(error) = self.outbox.trouble() {
            let state = match error.kind {
                ProduceErrorKind::UnknownTopic | ProduceErrorKind::UnknownPartition => RouteState::WaitingForTopic,
                _ => RouteState::WaitingForBroker,
            };
            return (state, error.to_string());
        }
        if let Some(error) = self.route.topics().find_map(|topic| self.parts.broker.trouble_of(topic)) {
            return (RouteState::WaitingForBroker, error.to_string());
        }
        if let Some(pause) = &self.paused {
            return (RouteState::Paused, format!("{pause}; `mesh-ctl resume {}` lets it go on", self.route.name));
        }
        let stopped = self.owned().find_map(|(_, slot)| slot.gap.map(|(from, to)| (&slot.partition, from, to)));
        if let Some((partition, from, to)) = stopped {
            let (name, last) = (&self.route.name, to.saturating_sub(1));
            let reason = format!(
                "the broker deleted records of {partition} before they were processed, offsets {from} to {last}, and on_gap is `stop`: reset \
                 the route (mesh-ctl reset {name}), or apply it with `on_gap: earliest`"
            );
            return (RouteState::Stopped, reason);
        }
        if let Some(detail) = &self.sides.trouble {
            return (RouteState::WaitingForTopic, detail.clone());
        }
        if let Some(detail) = self.standing_still() {
            return (RouteState::Stopped, detail);
        }
        let waits = self.service_trouble.clone().or_else(|| self.parts.leaf.unattended());
        match waits {
            Some(reason) => (RouteState::WaitingForService, reason),
            None if self.joined => {
                let told = self.passed_gap.as_ref().filter(|(until, _)| Instant::now() < *until);
                (RouteState::Running, told.map_or_else(|| self.exhausted().unwrap_or_default(), |(_, told)| told.clone()))
            }
            None => (RouteState::Joining, format!("joining group {}", self.route.group)),
        }
    }
}
