//! What becomes of a record before its service is called, and what an outcome means for it: the table of design §6, the first row that fits
//! decides. Floor 0.
//!
//! Invariant: whoever foretells or explains what a route does asks here, as the route's loop does.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_routing::{Decision, Destinations, HeaderSource, NoHeaders, RecordView, ReplyView, Route};

use crate::{
    outcome::{Delivery, NOT_HERE, Outcome, Reply, ReplyRecord},
    record::{Record, TopicPartition, header},
};

/// What is to be done with a record after a delivery.
#[derive(Debug, PartialEq)]
pub(crate) enum Verdict {
    /// Publish the reply there.
    Forward(Arc<[Arc<str>]>, Reply),
    /// Done: the route forwards nothing.
    Void,
    /// Done: this answer forwards nothing; because it is empty, or by its status.
    Ignored { empty: bool },
    /// Try again; counts an attempt.
    Retry { reason: String, after: Option<Duration> },
    /// The same, and the attempts in place are used up.
    Exhausted { reason: String, after: Option<Duration> },
    /// To the dead-letter topic.
    DeadLetter { reason: Reason, detail: String },
    /// Nobody was there: try again, and count nothing.
    Away { reason: String, after: Option<Duration> },
}

/// The reason of a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The attempts are used up.
    Attempts,
    /// A permanent status, a rejection, or an answer beyond the size limit.
    Status,
    /// A `filter` or `when` failed on this record.
    Expression,
    /// It went through more routes than `max_hops`.
    Hops,
    /// The broker refuses its reply for good.
    Reply,
    /// Its reply does not match the schema of a destination.
    Schema,
}

impl Reason {
    /// The word in `mesh-dlq-reason` and in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Attempts => "attempts",
            Self::Status => "status",
            Self::Expression => "expression",
            Self::Hops => "hops",
            Self::Reply => "reply",
            Self::Schema => "schema",
        }
    }
}

/// What becomes of a record before its service is called.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Intake {
    /// It is delivered.
    Deliver,
    /// It is a copy for another route, redriven or replayed: passed over.
    OtherRoute,
    /// The route's filter does not admit it.
    Filtered,
    /// To the dead-letter topic.
    DeadLetter { reason: Reason, detail: String },
}

/// Judges a record that was read: `hops` is how many routes it went through.
#[inline]
pub(crate) fn intake(route: &Route, record: &Record, partition: &TopicPartition, offset: i64, hops: u32) -> Intake {
    if record.header(header::MESH_ONLY_ROUTE).is_some_and(|only| **only != *route.name.as_bytes()) {
        return Intake::OtherRoute;
    }
    if route.filter.is_some() {
        match route.admits(&view(record, partition, offset)) {
            Ok(true) => {}
            Ok(false) => return Intake::Filtered,
            Err(error) => return Intake::DeadLetter { reason: Reason::Expression, detail: error.to_string() },
        }
    }
    if route.max_hops > 0 && hops >= route.max_hops {
        let detail = format!("it went through {hops} routes; the route's max_hops is {}", route.max_hops);
        return Intake::DeadLetter { reason: Reason::Hops, detail };
    }
    Intake::Deliver
}

/// Judges what a handler said to a delivery.
pub(crate) fn judge(delivery: &Delivery, outcome: Outcome) -> Verdict {
    let route = &*delivery.route;
    match outcome {
        Outcome::Reply(reply) => judge_reply(route, delivery, reply),
        Outcome::Ignore => Verdict::Ignored { empty: false },
        Outcome::Retry { reason, after: Some(NOT_HERE) } => Verdict::Exhausted { reason, after: None },
        Outcome::Retry { reason, after } => retry(route, delivery.attempt, reason, after),
        Outcome::Reject { reason } => Verdict::DeadLetter { reason: Reason::Status, detail: reason },
        Outcome::NoService { reason, after } => Verdict::Away { reason, after },
    }
}

fn judge_reply(route: &Route, delivery: &Delivery, reply: Reply) -> Verdict {
    let position = &delivery.position;
    let record = view(&delivery.record, &position.partition, position.offset);
    let headers = reply.records.first().map_or(&NoHeaders as &dyn HeaderSource, |record| record);
    let said = ReplyView { status: reply.status, body: reply.body.as_deref(), headers };
    match route.decide(&record, &said) {
        Ok(Decision::Ignored) => Verdict::Ignored { empty: false },
        Ok(Decision::Forward(Destinations::Void) | Decision::Case(Destinations::Void)) => Verdict::Void,
        Ok(Decision::Case(Destinations::Topics(topics))) if reply.records.is_empty() && reply.body.is_none() => {
            // The case stands before the row of empty answers: that it came is what is told.
            let empty = ReplyRecord { value: Some(Bytes::new()), ..ReplyRecord::default() };
            forward(route, topics, Reply { records: vec![empty], ..reply })
        }
        Ok(Decision::Forward(Destinations::Topics(topics)) | Decision::Case(Destinations::Topics(topics))) => match reply.records.len() {
            0 => Verdict::Ignored { empty: true },
            _ => forward(route, topics, reply),
        },
        Ok(Decision::NotAccepted) => not_accepted(route, delivery.attempt, &reply),
        Err(error) => Verdict::DeadLetter { reason: Reason::Expression, detail: error.to_string() },
    }
}

/// Forwards an answer that all of its topics take.
fn forward(route: &Route, topics: &Arc<[Arc<str>]>, reply: Reply) -> Verdict {
    match schema_fault(route, topics, &reply) {
        None => Verdict::Forward(topics.clone(), reply),
        Some(detail) => Verdict::DeadLetter { reason: Reason::Schema, detail },
    }
}

/// Why an answer does not match the schema of a topic that it goes to. All are asked before anything is published.
fn schema_fault(route: &Route, topics: &[Arc<str>], reply: &Reply) -> Option<String> {
    let values = reply.records.iter().map(|record| record.value.as_deref());
    let (topic, index, mismatch) = route.check_values(topics, values).err()?;
    let which = if reply.records.len() > 1 { format!("record {index} of the answer") } else { "the answer".to_owned() };
    Some(format!("{which} does not match the schema of `{topic}`: {mismatch}"))
}

fn not_accepted(route: &Route, attempt: u32, reply: &Reply) -> Verdict {
    let reason = format!("the service answered {}{}", reply.status, excerpt(reply));
    match reply.status {
        503 => Verdict::Away { reason, after: reply.retry_after },
        404 | 408 | 425 | 429 | 500..=599 => retry(route, attempt, reason, reply.retry_after),
        _ => Verdict::DeadLetter { reason: Reason::Status, detail: reason },
    }
}

fn retry(route: &Route, attempt: u32, reason: String, after: Option<Duration>) -> Verdict {
    if attempt >= route.retry.attempts {
        return Verdict::Exhausted { reason, after };
    }
    Verdict::Retry { reason, after }
}

/// The beginning of the answer, for people.
fn excerpt(reply: &Reply) -> String {
    const LENGTH: usize = 200;
    let body = reply.body.as_deref().unwrap_or_default();
    let text = String::from_utf8_lossy(&body[..body.len().min(LENGTH)]);
    let text = text.trim();
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// A record as expressions see it.
pub(crate) fn view<'a>(record: &'a Record, partition: &'a TopicPartition, offset: i64) -> RecordView<'a> {
    RecordView {
        topic: &partition.topic,
        partition: partition.partition,
        offset,
        timestamp_ms: record.timestamp_ms.unwrap_or_default(),
        key: record.key.as_deref(),
        value: record.value.as_deref(),
        headers: record,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{outcome::test_delivery, record::Header};

    fn answer(status: u16, body: &'static str) -> Outcome {
        let body = Some(Bytes::from(body)).filter(|body| !body.is_empty());
        let records = body.iter().map(|value| ReplyRecord { value: Some(value.clone()), ..ReplyRecord::default() }).collect();
        Outcome::Reply(Reply { status, records, body, retry_after: Some(Duration::from_secs(3)) })
    }

    /// What it comes to, in a word: destinations, or the verdict's name.
    fn word(verdict: Verdict) -> String {
        match verdict {
            Verdict::Forward(topics, _) => topics.join("+"),
            Verdict::Void => "void".to_owned(),
            Verdict::Ignored { empty: true } => "empty".to_owned(),
            Verdict::Ignored { empty: false } => "ignored".to_owned(),
            Verdict::Retry { after, .. } => format!("retry {}", after.map_or(0, |after| after.as_secs())),
            Verdict::Exhausted { after, .. } => format!("exhausted {}", after.map_or(0, |after| after.as_secs())),
            Verdict::DeadLetter { reason, .. } => format!("dead {}", reason.as_str()),
            Verdict::Away { after, .. } => format!("away {}", after.map_or(0, |after| after.as_secs())),
        }
    }

    #[test]
    fn the_first_row_of_the_table_that_fits_decides() {
        let route = "ignore_status: [204, 418], cases: [{ status: 202, to: [review] }, { status: 409, to: void }, { when: 'reply.json.n > 1', to: [big] }]";
        for (status, body, first, last) in [
            (200, "{\"n\":1}", "out", "out"),
            (201, "{\"n\":2}", "big", "big"),
            (200, "", "empty", "empty"),
            (200, "not json", "dead expression", "dead expression"),
            (202, "not json", "review", "review"),
            (202, "", "review", "review"),
            (204, "", "ignored", "ignored"),
            (418, "a body all the same", "ignored", "ignored"),
            (409, "x", "void", "void"),
            (301, "x", "dead status", "dead status"),
            (400, "x", "dead status", "dead status"),
            (410, "", "dead status", "dead status"),
            (404, "x", "retry 3", "exhausted 3"),
            (408, "x", "retry 3", "exhausted 3"),
            (425, "x", "retry 3", "exhausted 3"),
            (429, "x", "retry 3", "exhausted 3"),
            (500, "<html>", "retry 3", "exhausted 3"),
            (504, "x", "retry 3", "exhausted 3"),
            (503, "x", "away 3", "away 3"),
        ] {
            for (attempt, wanted) in [(1, first), (10, last)] {
                let delivery = Delivery { attempt, ..test_delivery(route, 0) };
                assert_eq!(word(judge(&delivery, answer(status, body))), wanted, "{status} {body:?}, attempt {attempt}");
            }
        }
    }

    /// Two destinations, of which the second takes objects only.
    #[test]
    fn an_answer_that_one_of_its_topics_does_not_take_goes_to_none() {
        let text = "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: { mesh: m }\nspec:\n  topics: { b: { schema: { json: { type: object } } } }\n  routes:\n  - { name: work, service: worker, from: [in], handler: /work, to: [a, b], cases: [{ status: 202, to: [a] }] }\n";
        let table = mesh_routing::parse("t", text).and_then(|table| mesh_routing::compile(&table)).unwrap();
        let delivery = Delivery { route: table.routes[0].clone(), ..test_delivery("", 0) };
        assert_eq!(word(judge(&delivery, answer(200, "{}"))), "a+b");
        assert_eq!(word(judge(&delivery, answer(202, "[]"))), "a");
        assert_eq!(word(judge(&delivery, answer(200, ""))), "empty");
        for (body, place) in [("[]", "the value is a list"), ("not json", "the value is not JSON"), ("\u{0}", "the value is not JSON")] {
            let Verdict::DeadLetter { reason: Reason::Schema, detail } = judge(&delivery, answer(200, body)) else { panic!() };
            assert!(detail.starts_with(&format!("the answer does not match the schema of `b`: {place}")), "{detail}");
        }
        let record = |value: Option<&'static str>| ReplyRecord { value: value.map(Bytes::from), ..ReplyRecord::default() };
        let reply = |records| Outcome::Reply(Reply { status: 200, records, body: None, retry_after: None });
        // A null value passes.
        assert_eq!(word(judge(&delivery, reply(vec![record(Some("{}")), record(None)]))), "a+b");
        let Verdict::DeadLetter { detail, .. } = judge(&delivery, reply(vec![record(Some("{}")), record(Some("1"))])) else { panic!() };
        assert!(detail.starts_with("record 1 of the answer"), "{detail}");
    }

    #[test]
    fn what_becomes_of_a_record_before_its_service_is_called() {
        let delivery = test_delivery("filter: 'record.json.n > 1', max_hops: 3", 0);
        let word = |value: &'static str, only: Option<&'static str>, hops: u32| {
            let headers = only.map(|only| Header::new(header::MESH_ONLY_ROUTE, only)).into_iter().collect();
            let record = Record { value: Some(value.into()), headers, ..Record::default() };
            match intake(&delivery.route, &record, &delivery.position.partition, 0, hops) {
                Intake::Deliver => "deliver",
                Intake::OtherRoute => "other route",
                Intake::Filtered => "filtered",
                Intake::DeadLetter { reason, detail } => {
                    assert!(!detail.is_empty());
                    reason.as_str()
                }
            }
        };
        assert_eq!(word("{\"n\":2}", None, 2), "deliver");
        assert_eq!(word("{\"n\":2}", Some("work"), 2), "deliver");
        assert_eq!(word("no JSON", Some("other"), 9), "other route", "its filter is not asked");
        assert_eq!(word("{\"n\":1}", None, 9), "filtered", "what is filtered has no hops too many");
        assert_eq!(word("no JSON", None, 9), "expression");
        assert_eq!(word("{\"n\":2}", None, 3), "hops");
    }

    #[test]
    fn outcomes_that_are_no_answers() {
        let delivery = test_delivery("", 0);
        let reason = || "why".to_owned();
        assert_eq!(word(judge(&delivery, Outcome::Ignore)), "ignored");
        assert_eq!(word(judge(&delivery, Outcome::Retry { reason: reason(), after: None })), "retry 0");
        assert_eq!(word(judge(&delivery, Outcome::Retry { reason: reason(), after: Some(NOT_HERE) })), "exhausted 0");
        assert_eq!(word(judge(&delivery, Outcome::Reject { reason: reason() })), "dead status");
        assert_eq!(word(judge(&delivery, Outcome::NoService { reason: reason(), after: None })), "away 0");
        let last = Delivery { attempt: 10, ..delivery };
        assert_eq!(word(judge(&last, Outcome::Retry { reason: reason(), after: None })), "exhausted 0");
        assert_eq!(
            word(judge(&last, Outcome::NoService { reason: reason(), after: None })),
            "away 0",
            "no attempt is counted, however often"
        );
    }
}
