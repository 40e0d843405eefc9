//! What goes to the handler, and what its answers do.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use super::{
    outbox::What,
    route::{Behind, RouteLoop, parent},
};
use crate::{
    deliver::{
        breaker::{self, Allowance, Change},
        limit::Limit,
        retry,
    },
    judge::{self, Verdict},
    lanes::JobId,
    mutation::{self, Mutation},
    outcome::{Answer, Delivery, Disposition},
    telemetry::{
        metrics::BreakerState,
        trace::{Span, SpanKind, TraceContext, Tracer},
    },
};
use tokio::time::Instant;

/// The pause of a record that found nobody there: the first one, doubled each time, and the longest.
const AWAY: Duration = Duration::from_millis(50);
const LONGEST_AWAY: Duration = Duration::from_secs(1);

impl RouteLoop {
    pub(super) fn dispatch(&mut self, now: Instant) {
        if let Some(batch) = self.route.batch {
            return self.dispatch_batches(batch, self.concurrency(), now);
        }
        let room = self.concurrency().min(self.parts.leaf.room());
        while self.out < room && self.outbox.has_room() {
            match self.breaker.allowance(now) {
                Allowance::Free => {}
                Allowance::Probe if self.out == 0 => {}
                Allowance::Probe | Allowance::Wait(_) => return,
            }
            let Some(id) = self.lanes.next_ready() else { return };
            if self.stands_still(id) {
                continue;
            }
            if let Some(delivery) = self.prepare(id, None, now) {
                self.calls += 1;
                self.parts.leaf.dispatch(delivery);
            }
        }
    }

    /// How many calls may be out now.
    pub(super) fn concurrency(&self) -> usize {
        self.limit.as_ref().map_or(self.route.concurrency, Limit::get)
    }

    /// Makes the delivery of a job that was handed out.
    pub(super) fn prepare(&mut self, id: JobId, call: Option<u64>, now: Instant) -> Option<Delivery> {
        let job = self.lanes.get_mut(id)?;
        (job.out, job.call) = (Some(now), call);
        job.delivery.id = id.get();
        if !Arc::ptr_eq(&job.delivery.route, &self.route) {
            job.delivery.route = self.route.clone();
        }
        let parent = parent(&job.delivery.record);
        if self.parts.tracer.enabled() {
            let span = process_span(&self.parts.tracer, self.parts.broker.system(), &job.delivery, parent.as_ref());
            job.delivery.traceparent = span.context().map(TraceContext::traceparent).unwrap_or_default();
            job.span = Some(span);
        } else if let Some(parent) = parent {
            job.delivery.traceparent = parent.traceparent();
        }
        let (slot, epoch, delivery) = (job.slot, job.epoch, job.delivery.clone());
        self.slot_busy(slot, epoch, 1);
        self.out += 1;
        self.parts.metrics.in_flight.inc();
        Some(delivery)
    }

    pub(super) fn on_answer(&mut self, answer: Answer) {
        let id = JobId::from_raw(answer.id);
        // The answers of a batch come in its order: one that is not the head of its lane is behind a failure.
        let usable = self.lanes.is_head(id);
        let Some(job) = self.lanes.get_mut(id) else { return };
        let Some(since) = job.out.take() else { return };
        let now = Instant::now();
        self.out -= 1;
        self.parts.metrics.in_flight.dec();
        self.parts.metrics.delivered(&answer.outcome, now - since);
        let call = job.call.take();
        if (!usable || job.behind != Behind::Nothing) && !mutation::is(Mutation::UseBehind) {
            if let Some(mut span) = job.span.take() {
                span.set("mesh.outcome", || "behind_failure".into());
            }
            let (slot, epoch) = (job.slot, job.epoch);
            self.slot_busy(slot, epoch, -1);
            if let Some(call) = call {
                self.note_call(call, None, now);
            }
            return self.behind_failure(id);
        }
        let (index, epoch, attempt) = (job.slot, job.epoch, job.delivery.attempt);
        let verdict = judge::judge(&job.delivery, answer.outcome);
        let its_own = service_note(&verdict).0 == breaker::Verdict::Failed && self.blame.is_the_records(&mut job.failed);
        let mut span = job.span.take();
        let context = match &span {
            Some(span) => span.context().cloned(),
            None => parent(&job.delivery.record),
        };
        if let Some(span) = &mut span {
            note(span, &verdict);
        }
        self.slot_busy(index, epoch, -1);
        let (note, reason) = service_note(&verdict);
        // A probe that fails says nothing of its record, and nor do those that were out when the breaker opened.
        let counted = its_own || !self.breaker.is_open();
        if note == breaker::Verdict::Good {
            self.blame.good();
            self.budget.earn(u32::try_from(self.route.tiers()).unwrap_or(u32::MAX).saturating_add(1));
        }
        match call {
            Some(call) => self.note_call(call, Some((note, reason.map(str::to_owned))).filter(|_| !its_own), now),
            None => {
                self.note_limit(note, since, now);
                self.calls -= 1;
                if !its_own {
                    self.note_service(note, reason, now);
                }
            }
        }
        let slot = &self.slots[index as usize];
        if (slot.watermark.epoch() != epoch || !slot.owned) && !mutation::is(Mutation::ForgetEpoch) {
            // The partition is somebody else's by now, who reads the record again.
            self.parts.metrics.late_acknowledgements.inc();
            self.lanes.finish(id);
            return;
        }
        let what = match verdict {
            Verdict::Away { after, reason } => {
                let after = after.unwrap_or_default().min(retry::LONGEST_WISH);
                self.breaker.rest(now + after);
                if slot.revoking || self.draining.is_some() {
                    self.drop_failed(id);
                } else if let Some(job) = self.lanes.get_mut(id) {
                    // It steps aside for a moment: the next one to try the service is another record, if there is one. So a record that alone is
                    // answered "nobody there" holds up its own lane only.
                    let pause = AWAY * (1 << job.away.min(5));
                    job.away = job.away.saturating_add(1);
                    job.failure = reason;
                    self.backoffs.push(Reverse((now + pause.min(LONGEST_AWAY).max(after), id)));
                }
                return;
            }
            Verdict::Retry { .. } | Verdict::Exhausted { .. } if !counted => {
                if slot.revoking || self.draining.is_some() {
                    self.drop_failed(id);
                } else {
                    self.wait_for_service(id, now);
                }
                return;
            }
            Verdict::Exhausted { reason, after } => return self.give_up(id, reason, after, context, now),
            Verdict::Retry { reason, after } => {
                if self.asks_for_long(after) {
                    return self.give_up(id, reason, after, context, now);
                }
                if slot.revoking || self.draining.is_some() {
                    // A wait is not worth holding up the others: whoever reads the record next tries again. Where there are retry topics, it goes
                    // on with the attempts that were made.
                    if self.survives(index) {
                        let pause = retry::pause(&self.route.retry, attempt, after, id.get());
                        self.hand_over(id, 1, pause, attempt, context, now);
                    } else {
                        self.drop_failed(id);
                    }
                    return;
                }
                let pause = retry::pause(&self.route.retry, attempt, after, id.get());
                tracing::debug!(route = %self.route.name, attempt, reason, ?pause, "delivery failed");
                if let Some(job) = self.lanes.get_mut(id) {
                    job.delivery.attempt = attempt.saturating_add(u32::from(!mutation::is(Mutation::ForgetAttempt)));
                    job.failure = reason;
                }
                self.backoffs.push(Reverse((now + pause, id)));
                return;
            }
            Verdict::Void => return self.finish_and_end(id, Disposition::Void, "", context),
            Verdict::Ignored { empty } => {
                let reason = if empty { "empty" } else { "status" };
                return self.finish_and_end(id, Disposition::Ignored, reason, context);
            }
            Verdict::Forward(..) if mutation::is(Mutation::DropReply) && id.get().is_multiple_of(5) => {
                return self.finish_and_end(id, Disposition::Forwarded, "", context);
            }
            Verdict::Forward(topics, reply) => What::Reply { topics, reply },
            Verdict::DeadLetter { reason, detail } => What::DeadLetter { reason, detail },
        };
        // The lane is free at the outcome: the outbox keeps the order.
        if let Some(job) = self.lanes.finish(id) {
            if mutation::is(Mutation::CommitEarly) {
                self.complete(index, epoch, job.offset, Disposition::Forwarded, "");
            }
            self.publish(job, what, context);
        }
    }

    /// Ends a record that publishes nothing.
    fn finish_and_end(&mut self, id: JobId, disposition: Disposition, reason: &'static str, context: Option<TraceContext>) {
        if let Some(job) = self.lanes.finish(id) {
            self.keep_context(context);
            if self.complete(job.slot, job.epoch, job.offset, disposition, reason) {
                self.settle(job.slot, job.key, job.delivery.position.offset);
            }
        }
    }

    /// What a call tells of how many the service can do. One that found no service tells nothing.
    pub(super) fn note_limit(&mut self, note: breaker::Verdict, began: Instant, now: Instant) {
        if let Some(limit) = self.limit.as_mut().filter(|_| note != breaker::Verdict::Away) {
            limit.answered(began, now, self.calls, note == breaker::Verdict::Failed);
        }
    }

    /// What a call tells of the service: the breaker, and who is waited for.
    pub(super) fn note_service(&mut self, note: breaker::Verdict, reason: Option<&str>, now: Instant) {
        let (route, service) = (&self.route.name, &self.route.service);
        match self.breaker.note(note, now) {
            Change::None => return,
            Change::Opened => {
                let reason = reason.unwrap_or_default();
                let trouble = match note {
                    breaker::Verdict::Away => format!("service {service} is not there: {reason}"),
                    _ => format!("service {service} keeps failing: {reason}"),
                };
                return self.opened(trouble);
            }
            Change::Closed => {
                tracing::info!(%route, %service, "the service is back");
                self.parts.metrics.breaker(BreakerState::Closed);
                self.service_trouble = None;
            }
        }
        self.post_now();
    }

    /// Opens the breaker: the service fails too often to give its records up.
    pub(super) fn trip(&mut self, now: Instant, reason: &str) {
        if self.breaker.trip(now) == Change::Opened {
            self.opened(format!("service {} fails more often than not: {reason}", self.route.service));
        }
    }

    fn opened(&mut self, trouble: String) {
        tracing::warn!(route = %self.route.name, service = %self.route.service, "{trouble}: waiting, no attempt is counted");
        self.parts.metrics.breaker(BreakerState::Open);
        self.service_trouble = Some(trouble);
        self.post_now();
    }
}

/// The span of one delivery, by OpenTelemetry's messaging conventions.
fn process_span(tracer: &Tracer, system: &'static str, delivery: &Delivery, parent: Option<&TraceContext>) -> Span {
    let (route, position) = (&delivery.route, &delivery.position);
    let mut span = tracer.start(SpanKind::Consumer, || format!("process {}", position.partition.topic), parent);
    if let Some(parent) = parent {
        span.link(parent);
    }
    span.set("messaging.system", || system.into());
    span.set("messaging.operation.type", || "process".into());
    span.set("messaging.operation.name", || "process".into());
    span.set("messaging.destination.name", || position.partition.topic.clone().into());
    span.set("messaging.destination.partition.id", || position.partition.partition.to_string().into());
    span.set("messaging.kafka.offset", || position.offset.into());
    span.set("messaging.consumer.group.name", || route.group.clone().into());
    span.set("messaging.message.id", || String::from_utf8_lossy(&delivery.mesh_id).into_owned().into());
    span.set("mesh.route", || route.name.clone().into());
    span.set("mesh.service", || route.service.clone().into());
    span.set("mesh.attempt", || i64::from(delivery.attempt).into());
    span
}

/// What a verdict tells of the service, and why it is no better.
fn service_note(verdict: &Verdict) -> (breaker::Verdict, Option<&str>) {
    match verdict {
        Verdict::Away { reason, .. } => (breaker::Verdict::Away, Some(reason)),
        Verdict::Retry { reason, .. } | Verdict::Exhausted { reason, .. } => (breaker::Verdict::Failed, Some(reason)),
        _ => (breaker::Verdict::Good, None),
    }
}

/// Writes down what became of a delivery.
fn note(span: &mut Span, verdict: &Verdict) {
    let disposition = match verdict {
        Verdict::Forward(..) => Disposition::Forwarded.as_str(),
        Verdict::Void => Disposition::Void.as_str(),
        Verdict::Ignored { .. } => Disposition::Ignored.as_str(),
        Verdict::Retry { reason, .. } | Verdict::Exhausted { reason, .. } => {
            span.fail("retry", || reason.clone());
            "retry"
        }
        Verdict::DeadLetter { reason, detail } => {
            span.fail(reason.as_str(), || detail.clone());
            Disposition::DeadLettered.as_str()
        }
        Verdict::Away { reason, .. } => {
            span.fail("no_service", || reason.clone());
            "no_service"
        }
    };
    span.set("mesh.outcome", || disposition.into());
}
