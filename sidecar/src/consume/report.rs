//! What a route tells of itself: the board, and its gauges.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::time::Instant;

use super::route::{RouteLoop, Slot};
use crate::{
    broker::{Admin, BrokerErrorKind, ProduceErrorKind},
    record::{TopicPartition, now_ms},
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
    highs: Vec<(u32, i64)>,
    complete: bool,
}

/// Asks the broker for the newest offsets of partitions; one that it does not tell is left out.
pub(super) fn watch_lag(admin: Arc<dyn Admin>, epoch: u64, partitions: Vec<(u32, TopicPartition)>) -> BoxFuture<'static, Measured> {
    async move {
        let (at_ms, asked) = (now_ms(), partitions.len());
        let mut highs = Vec::with_capacity(asked);
        for (slot, partition) in partitions {
            match admin.watermarks(&partition).await {
                Ok((_, high)) => highs.push((slot, high)),
                Err(error) => tracing::debug!(%partition, %error, "no watermark for the lag"),
            }
        }
        let complete = highs.len() == asked;
        Measured { at_ms, epoch, highs, complete }
    }
    .boxed()
}

impl RouteLoop {
    pub(super) fn on_lag(&mut self, measured: Measured) {
        self.lag = None;
        for (index, high) in measured.highs {
            if let Some(slot) = self.slots.get_mut(index as usize) {
                slot.high = high;
            }
        }
        if measured.complete && measured.epoch == self.epoch {
            self.lag_measured_ms = measured.at_ms;
        }
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
        let owned = || self.slots.iter().filter(|slot| slot.owned);
        let lag_records =
            owned().map(|slot| slot.high.max(slot.watermark.next()).saturating_sub(slot.watermark.offset()).max(0).unsigned_abs()).sum();
        let oldest = owned().filter_map(|slot| slot.watermark.oldest_timestamp_ms()).min();
        let lag_seconds = oldest.map_or(0.0, |oldest| now_ms().saturating_sub(oldest).max(0) as f64 / 1e3);
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
            in_flight: self.out as u64,
            dispositions: self.dispositions.clone(),
        };
        let metrics = &self.parts.metrics;
        metrics.state(state);
        metrics.partitions.set(status.partitions.into());
        metrics.lag_records.set(lag_records);
        metrics.lag_seconds.set(lag_seconds);
        metrics.queue_bytes.set(owned().map(|slot| slot.watermark.bytes() as u64).sum());
        let unrecorded = |slot: &Slot| slot.busy as u64 + slot.unrecorded + slot.watermark.completed().saturating_sub(slot.recorded);
        metrics.replay_records.set(owned().map(unrecorded).sum::<u64>() + self.backoffs.len() as u64);
        let stalled = owned().filter(|slot| slot.watermark.incomplete() > 0).map(|slot| now.saturating_duration_since(slot.moved)).max();
        metrics.watermark_stall_seconds.set(stalled.unwrap_or_default().as_secs_f64());
        if status != self.posted {
            self.parts.board.post(status.clone());
            self.posted = status;
        }
    }

    /// What the route does, and whom it waits for.
    fn state(&self) -> (RouteState, String) {
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
                ProduceErrorKind::UnknownTopic => RouteState::WaitingForTopic,
                _ => RouteState::WaitingForBroker,
            };
            return (state, error.to_string());
        }
        let waits = self.service_trouble.clone().or_else(|| self.parts.leaf.unattended());
        match waits {
            Some(reason) => (RouteState::WaitingForService, reason),
            None if self.joined => (RouteState::Running, String::new()),
            None => (RouteState::Joining, format!("joining group {}", self.route.group)),
        }
    }
}
