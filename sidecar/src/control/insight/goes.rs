//! What a route would do with a record, and how that differs between two tables. Pure.
//!
//! Invariant: a destination that depends on the reply is said to depend on it, unless a stored reply decides it whatever its status was.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use mesh_routing::{Case, Destinations, Route};

use crate::{
    judge::{self, Intake, Reason, Verdict, view},
    outcome::{Delivery, Outcome, Reply, ReplyRecord},
    record::{Position, Record, hops, mesh_id},
};

/// What becomes of a record on a route, up to the call of its service.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fate {
    /// The route does not read it.
    NotRead,
    /// A copy for another route.
    OtherRoute,
    /// The filter does not admit it.
    Filtered,
    /// Dead-lettered without a call.
    DeadLetter { reason: Reason, detail: String },
    /// Delivered; and then.
    Delivered(Goes),
}

/// Where an accepted answer with a body goes, as far as it is known.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Goes {
    /// There: topics, joined by `+`, or `void`.
    To(String),
    /// To one of these, by the reply.
    ByReply(String),
    /// A `when` fails on the record: dead-lettered after the call.
    Fails(String),
}

impl Goes {
    /// The words that it is counted under.
    pub(super) fn word(&self) -> String {
        match self {
            Self::To(topics) => topics.clone(),
            Self::ByReply(choices) => format!("by reply: {choices}"),
            Self::Fails(_) => "dead letter: expression".to_owned(),
        }
    }
}

impl Fate {
    /// What becomes of a record; without a route it is not read.
    pub(super) fn of(route: Option<&Route>, record: &Record, at: &Position) -> Self {
        let topic = &*at.partition.topic;
        let Some(route) = route.filter(|route| route.from.iter().any(|source| **source == *topic)) else { return Self::NotRead };
        match judge::intake(route, record, &at.partition, at.offset, hops(record)) {
            Intake::OtherRoute => Self::OtherRoute,
            Intake::Filtered => Self::Filtered,
            Intake::DeadLetter { reason, detail } => Self::DeadLetter { reason, detail },
            Intake::Deliver => Self::Delivered(goes(route, record, at)),
        }
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::NotRead => "not read".to_owned(),
            Self::OtherRoute => "passed over, for another route".to_owned(),
            Self::Filtered => "filtered".to_owned(),
            Self::DeadLetter { reason, detail } => format!("dead letter: {}: {detail}", reason.as_str()),
            Self::Delivered(Goes::Fails(detail)) => format!("delivered, then dead letter: expression: {detail}"),
            Self::Delivered(goes) => format!("delivered, to {}", goes.word()),
        }
    }
}

fn goes(route: &Route, record: &Record, at: &Position) -> Goes {
    match route.foresee(&view(record, &at.partition, at.offset)) {
        Err(error) => Goes::Fails(error.to_string()),
        Ok(foreseen) => {
            let words: Vec<String> = foreseen.destinations.iter().map(|to| destinations(to)).collect();
            match &words[..] {
                [only] => Goes::To(only.clone()),
                _ if foreseen.by_reply => Goes::ByReply(words.join(" | ")),
                // What is certain is one.
                _ => Goes::To(words.join(" | ")),
            }
        }
    }
}

fn destinations(to: &Destinations) -> String {
    match to {
        Destinations::Void => "void".to_owned(),
        Destinations::Topics(topics) => joined(topics),
    }
}

/// Topics as a word: the order in which they are written means nothing here.
fn joined(topics: &[Arc<str>]) -> String {
    let topics: BTreeSet<&str> = topics.iter().map(|topic| &**topic).collect();
    topics.into_iter().collect::<Vec<_>>().join("+")
}

/// What a proposed table changes for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// Nothing.
    None,
    /// This, in a stable word.
    Changed(&'static str),
    /// It depends on the reply.
    Undecided,
}

/// A destination that is another one.
pub(super) const OTHER_DESTINATION: &str = "other_destination";

/// How a record's fate differs; `old` and `new` are the routes, where they exist.
pub(super) fn difference(old: Option<&Route>, new: Option<&Route>, before: &Fate, after: &Fate) -> Difference {
    use Fate::{DeadLetter, Delivered, Filtered, NotRead, OtherRoute};
    match (before, after) {
        (NotRead | Filtered | OtherRoute, NotRead | Filtered | OtherRoute) => Difference::None,
        (Delivered(before), Delivered(after)) => old.zip(new).map_or(Difference::None, |(old, new)| moved(old, new, before, after)),
        (_, Delivered(_)) => Difference::Changed("newly_delivered"),
        (DeadLetter { .. }, DeadLetter { .. }) => match old.zip(new) {
            Some((old, new)) if old.dead_letter != new.dead_letter => Difference::Changed(OTHER_DESTINATION),
            _ => Difference::None,
        },
        (_, DeadLetter { .. }) => Difference::Changed("newly_dead_lettered"),
        (Delivered(_) | DeadLetter { .. }, Filtered | OtherRoute) => Difference::Changed("newly_filtered"),
        (Delivered(_) | DeadLetter { .. }, NotRead) => Difference::Changed("no_longer_delivered"),
    }
}

fn moved(old: &Route, new: &Route, before: &Goes, after: &Goes) -> Difference {
    if (&old.service, &old.handler, old.deliver) != (&new.service, &new.handler, new.deliver) {
        return Difference::Changed("other_service");
    }
    if old.to == new.to && old.cases == new.cases && old.ignore_status == new.ignore_status {
        return Difference::None;
    }
    // Which statuses are ignored, and which are good though they are not 2xx, is asked of every reply.
    let accepted =
        |route: &Route| (route.ignore_status.clone(), route.cases.iter().filter_map(|case| case.status).collect::<BTreeSet<_>>());
    match (before, after) {
        (Goes::ByReply(_), _) | (_, Goes::ByReply(_)) => Difference::Undecided,
        (Goes::Fails(_), Goes::Fails(_)) => Difference::None,
        (Goes::To(before), Goes::To(after)) if before == after && accepted(old) == accepted(new) => Difference::None,
        (Goes::To(before), Goes::To(after)) if before == after => Difference::Undecided,
        _ => Difference::Changed(OTHER_DESTINATION),
    }
}

/// What is stored of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Stored {
    /// The topics in which its first record was found.
    pub(super) topics: BTreeSet<Arc<str>>,
    /// The value of its first record, once that was found.
    pub(super) value: Option<Option<Bytes>>,
    /// It had several records.
    pub(super) several: bool,
    /// It was there twice with different values: the service was called twice.
    pub(super) differs: bool,
}

impl Stored {
    /// Takes note of a record of the answer.
    pub(super) fn add(&mut self, topic: &Arc<str>, index: u32, value: Option<Bytes>) {
        if index > 0 {
            self.several = true;
            return;
        }
        self.topics.insert(topic.clone());
        match &self.value {
            Some(known) => self.differs |= *known != value,
            None => self.value = Some(value),
        }
    }
}

/// Where an answer that is stored goes by the table in force and by the proposed one. Its status is not stored: what both say must be the same for
/// every status with which the table in force puts it where it was found.
///
/// # Errors
/// Why that is not known.
pub(super) fn replay_reply(
    old: &Arc<Route>,
    new: &Arc<Route>,
    record: &Arc<Record>,
    at: &Position,
    stored: Option<&Stored>,
) -> Result<(String, String), &'static str> {
    let Some((stored, value)) = stored.and_then(|stored| Some((stored, stored.value.as_ref()?))) else {
        return Err("no stored reply was found");
    };
    if stored.several {
        return Err("the reply had several records");
    }
    if stored.differs {
        return Err("the reply was stored twice, with different values");
    }
    let asks = |asks: fn(&mesh_routing::Expression) -> bool| {
        let mut whens = old.cases.iter().chain(&new.cases).filter_map(|case: &Case| case.when.as_ref());
        whens.any(asks)
    };
    if asks(mesh_routing::Expression::asks_for_status) {
        return Err("a `when` asks for reply.status, which is not stored");
    }
    if asks(mesh_routing::Expression::asks_for_reply_headers) {
        return Err("a `when` asks for reply.headers, which are not stored apart from the record's");
    }
    let body = value.clone().filter(|value| !value.is_empty());
    // An empty value is what a case makes of an empty answer.
    let empty = value.as_ref().is_some_and(Bytes::is_empty);
    let records = if empty { Vec::new() } else { vec![ReplyRecord { value: value.clone(), ..ReplyRecord::default() }] };
    let judged = |route: &Arc<Route>, status: u16| {
        let delivery = Delivery {
            id: 0,
            route: route.clone(),
            record: record.clone(),
            position: at.clone(),
            attempt: 1,
            hops: hops(record),
            mesh_id: mesh_id(record, at),
            traceparent: Bytes::new(),
        };
        let reply = Reply { status, records: records.clone(), body: body.clone(), retry_after: None };
        judge::judge(&delivery, Outcome::Reply(reply))
    };
    let found = stored.topics.iter().cloned().collect::<Vec<_>>();
    let mut decided: Option<String> = None;
    for status in statuses(old, new) {
        // Only a status with which it would have been put there may have been its own.
        let Verdict::Forward(topics, _) = judged(old, status) else { continue };
        if joined(&topics) != joined(&found) {
            continue;
        }
        let after = word(judged(new, status));
        match &decided {
            Some(before) if *before != after => return Err("it depends on the reply's status, which is not stored"),
            _ => decided = Some(after),
        }
    }
    decided.map(|after| (joined(&found), after)).ok_or("the stored reply does not lie where the table in force puts it")
}

/// Statuses of which the others behave like one: those that a table names, and one good one that none names.
fn statuses(old: &Route, new: &Route) -> BTreeSet<u16> {
    let of =
        |route: &Route| route.ignore_status.iter().copied().chain(route.cases.iter().filter_map(|case| case.status)).collect::<Vec<_>>();
    let mut statuses: BTreeSet<u16> = of(old).into_iter().chain(of(new)).collect();
    statuses.extend((200..300).find(|status| !statuses.contains(status)));
    statuses
}

fn word(verdict: Verdict) -> String {
    match verdict {
        Verdict::Forward(topics, _) => joined(&topics),
        Verdict::Void => "void".to_owned(),
        Verdict::Ignored { .. } => "ignored".to_owned(),
        Verdict::DeadLetter { reason, .. } => format!("dead letter: {}", reason.as_str()),
        Verdict::Retry { .. } | Verdict::Exhausted { .. } | Verdict::Away { .. } => "not accepted: tried again".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{outcome::test_delivery, record::Header};

    fn route(fields: &str) -> Arc<Route> {
        test_delivery(fields, 0).route
    }

    fn record(value: &'static str) -> Arc<Record> {
        Arc::new(Record { value: Some(value.into()), ..Record::default() })
    }

    fn at() -> Position {
        Position::parse("in/0/7").unwrap()
    }

    fn differs(old: Option<&Arc<Route>>, new: Option<&Arc<Route>>, record: &Record) -> Difference {
        let (old, new) = (old.map(|route| &**route), new.map(|route| &**route));
        difference(old, new, &Fate::of(old, record, &at()), &Fate::of(new, record, &at()))
    }

    #[test]
    fn what_changes_is_named() {
        let (all, kr) = (route(""), route("filter: 'record.json.country == \"KR\"'"));
        let (inside, outside, odd) = (record("{\"country\":\"KR\"}"), record("{\"country\":\"FR\"}"), record("{}"));
        let changed = Difference::Changed;
        assert_eq!(differs(Some(&all), Some(&kr), &inside), Difference::None);
        assert_eq!(differs(Some(&all), Some(&kr), &outside), changed("newly_filtered"));
        assert_eq!(differs(Some(&kr), Some(&all), &outside), changed("newly_delivered"));
        assert_eq!(differs(Some(&all), Some(&kr), &odd), changed("newly_dead_lettered"));
        assert_eq!(differs(Some(&kr), Some(&all), &odd), changed("newly_delivered"));
        assert_eq!(differs(Some(&kr), Some(&kr), &odd), Difference::None);
        assert_eq!(differs(None, Some(&kr), &inside), changed("newly_delivered"));
        assert_eq!(differs(None, Some(&kr), &outside), Difference::None, "nobody reads it, nobody gets it");
        assert_eq!(differs(Some(&all), None, &inside), changed("no_longer_delivered"));
        let copy = Record { headers: vec![Header::new("mesh-only-route", "other")], ..Record::default() };
        assert_eq!(differs(Some(&all), Some(&kr), &copy), Difference::None);
        assert_eq!(
            differs(Some(&kr), Some(&route("filter: 'record.json.country == \"KR\"', dead_letter: d")), &odd),
            changed(OTHER_DESTINATION)
        );
        assert_eq!(differs(Some(&all), Some(&route("timeout: 1s")), &inside), Difference::None);
    }

    #[test]
    fn a_destination_is_decided_by_the_record_or_by_the_reply() {
        let (plain, cased) = (route(""), route("cases: [{ when: 'record.json.n > 1', to: [big] }]"));
        assert_eq!(differs(Some(&plain), Some(&cased), &record("{\"n\":1}")), Difference::None);
        assert_eq!(differs(Some(&plain), Some(&cased), &record("{\"n\":2}")), Difference::Changed(OTHER_DESTINATION));
        assert_eq!(differs(Some(&plain), Some(&cased), &record("{}")), Difference::Changed(OTHER_DESTINATION), "its when fails");
        let by_reply = route("cases: [{ when: 'reply.json.n > 1', to: [big] }]");
        assert_eq!(differs(Some(&plain), Some(&by_reply), &record("{}")), Difference::Undecided);
        assert_eq!(differs(Some(&by_reply), Some(&by_reply), &record("{}")), Difference::None);
        assert_eq!(differs(Some(&plain), Some(&route("ignore_status: [204]")), &record("{}")), Difference::Undecided);
        let Fate::Delivered(goes) = Fate::of(Some(&by_reply), &record("{}"), &at()) else { panic!() };
        assert_eq!(goes.word(), "by reply: big | out");
    }

    #[test]
    fn a_stored_reply_decides_only_what_holds_for_every_status_that_it_may_have_had() {
        let stored = |topics: &[&str], value: Option<&'static str>| {
            let mut stored = Stored::default();
            topics.iter().for_each(|topic| stored.add(&Arc::from(*topic), 0, value.map(Bytes::from)));
            stored
        };
        let source = record("{}");
        let after = |old: &str, new: &str, stored: &Stored| {
            replay_reply(&route(old), &route(new), &source, &at(), Some(stored)).map(|(before, after)| format!("{before} > {after}"))
        };
        let (small, big) = (stored(&["out"], Some("{\"n\":1}")), stored(&["out"], Some("{\"n\":2}")));
        let cases = "cases: [{ when: 'reply.json.n > 1', to: [big] }]";
        assert_eq!(after("", cases, &small), Ok("out > out".to_owned()));
        assert_eq!(after("", cases, &big), Ok("out > big".to_owned()));
        assert_eq!(after("", cases, &stored(&["out"], Some("no JSON"))), Ok("out > dead letter: expression".to_owned()));
        assert_eq!(after("", cases, &stored(&["out"], None)), Ok("out > out".to_owned()), "a tombstone has no body");
        // It lies in `out`, so its status was not 202.
        let by_status = "cases: [{ status: 202, to: [review] }]";
        assert_eq!(after(by_status, "cases: [{ status: 202, to: [other] }]", &small), Ok("out > out".to_owned()));
        assert_eq!(
            after(by_status, "cases: [{ status: 202, to: [other] }]", &stored(&["review"], Some("{}"))),
            Ok("review > other".to_owned())
        );
        assert_eq!(after("", by_status, &small), Err("it depends on the reply's status, which is not stored"));
        assert_eq!(after("", "ignore_status: [200, 204]", &small), Err("it depends on the reply's status, which is not stored"));
        // What is not where the table in force puts it was made by an earlier one.
        assert!(after("", cases, &stored(&["elsewhere"], Some("{}"))).is_err());
        assert!(after("", cases, &stored(&["out", "big"], Some("{}"))).is_err());
        assert!(after("", "cases: [{ when: 'reply.status == 201', to: [big] }]", &small).unwrap_err().contains("reply.status"));
        assert!(after("", "cases: [{ when: 'has(reply.headers.a)', to: [big] }]", &small).unwrap_err().contains("reply.headers"));
        let mut several = small.clone();
        several.add(&Arc::from("out"), 1, None);
        assert!(after("", cases, &several).unwrap_err().contains("several"));
        let mut twice = small.clone();
        twice.add(&Arc::from("out"), 0, Some("{\"n\":2}".into()));
        assert!(after("", cases, &twice).unwrap_err().contains("twice"));
        assert_eq!(replay_reply(&route(""), &route(cases), &source, &at(), None), Err("no stored reply was found"));
    }
}
