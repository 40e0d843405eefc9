//! What a proposed table would do with the last records of its sources, beside the table in force.
//!
//! Up to the call of a service a route's behaviour follows from the record alone, and is foretold as the data path would decide it. Where an answer
//! goes may depend on the answer: then the replies that are stored are judged by both tables, as far as they tell.
//!
//! Invariant: records that wait for their stored reply are bounded ([`KEPT`]), and so are the replies; what finds no room stays undecided.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use mesh_proto::v1::{self, RouteChange};
use mesh_routing::{CompiledTable, Route, Schema};
use tokio::sync::mpsc;

use super::{
    super::{
        Control,
        range::{Limits, Range, owned},
        reset::OperationError,
        state::{Shared, now_ms},
    },
    explain::written_by,
    flow,
    goes::{Difference, Fate, Goes, OTHER_DESTINATION, Stored, difference, replay_reply},
    scan::{Bound, Keep, Scan, wanted},
};
use crate::{
    deliver::grpc,
    record::{Batch, Cause, Position, Record},
};

/// Where nothing is said: the records of so long.
const LAST_MS: i64 = 600_000;
/// What is read of the sources, and of destinations in search of replies.
const BOUND: Bound = Bound { offsets: 200_000, bytes: 1 << 30, time: Duration::from_secs(600), keep: Keep::Last };
/// The bytes of records that are kept until their stored replies are found, and of those replies.
const KEPT: usize = 16 << 20;
/// Records that are judged before others get their turn.
const AT_ONCE: usize = 256;
/// Samples of a route, unless the request says how many, and at most.
const SAMPLES: usize = 5;
const MOST_SAMPLES: usize = 100;
/// The clocks of a publisher, a sidecar and a broker may differ by so much.
const SKEW_MS: i64 = 60_000;

/// A route of either table.
struct Compared {
    old: Option<Arc<Route>>,
    new: Option<Arc<Route>>,
    plan: v1::RoutePlan,
    /// Why records are undecided, and how many.
    why: BTreeMap<&'static str, u64>,
    /// Samples of undecided records, for when there is room.
    unsure: Vec<v1::PlanSample>,
}

/// A record of which the stored reply has to tell where it would go.
struct Waiting {
    record: Arc<Record>,
    before: Goes,
    after: Goes,
}

/// Both tables, and what is found out.
struct Plan {
    compared: Vec<Compared>,
    by_topic: HashMap<Arc<str>, Vec<usize>>,
    waiting: HashMap<(usize, Position), Waiting>,
    kept: usize,
    samples: usize,
    /// Schemas of sources that the proposed table changes.
    schemas: BTreeMap<Arc<str>, (Schema, v1::SchemaPlan)>,
    read: u64,
}

impl Control {
    /// Runs records through a table beside the one in force. Tells of its progress; ends when nobody listens any more.
    ///
    /// # Errors
    /// If the table has faults, there is no such route, or the broker does not answer.
    pub async fn plan(&self, request: v1::PlanRequest, out: mpsc::Sender<v1::PlanProgress>) -> Result<(), OperationError> {
        let source = request.table.unwrap_or_default();
        let candidate = self.check(&source.file, &source.text).await.map_err(|error| OperationError::Invalid(error.to_string()))?;
        let generation = self.0.table.borrow().as_ref().map_or(0, |table| table.generation);
        let old = self.0.whole().await?;
        let samples = if request.samples == 0 { SAMPLES } else { (request.samples as usize).min(MOST_SAMPLES) };
        let _room = self.room().await?;
        let mut plan = Plan::new(old.as_deref(), &candidate.compiled, &request.route, samples)?;
        let since_ms = match (request.since_ms, request.last_records) {
            (None, 0) => Some(now_ms().saturating_sub(LAST_MS)),
            (since, _) => since,
        };
        let mut ranges = wanted(&*self.0.broker.admin(), plan.topics(), &Limits { since_ms, ..Limits::default() }).await?;
        if request.last_records > 0 {
            let last = i64::try_from(request.last_records).unwrap_or(i64::MAX);
            ranges.iter_mut().for_each(|range| range.from = range.from.max(range.until.saturating_sub(last)));
        }

        let mut scan = Scan::open(&*self.0.broker, ranges, BOUND)?;
        let in_range = scan.offsets();
        while let Some(batch) = scan.next().await? {
            plan.take(batch).await;
            let progress = v1::PlanProgress { read: plan.read, in_range, ..v1::PlanProgress::default() };
            if out.send(progress).await.is_err() {
                scan.close().await;
                return Ok(());
            }
        }
        let sources = scan.close().await;
        let replies = plan.ask_replies(&self.0).await?;
        let read = plan.read;
        let result =
            v1::PlanResult { generation, digest: candidate.compiled.digest.to_string(), sources, replies, since_ms, ..plan.result() };
        let last = v1::PlanProgress { read, in_range, finished: true, faults: Vec::new(), result: Some(result) };
        // Whoever listened may be gone.
        drop(out.send(last).await);
        Ok(())
    }
}

impl Plan {
    /// All routes of both tables, or one: those of the proposed one, then those that it does not have any more.
    fn new(old: Option<&CompiledTable>, new: &CompiledTable, only: &str, samples: usize) -> Result<Self, OperationError> {
        let gone = old.into_iter().flat_map(|old| &old.routes).filter(|route| new.route(&route.name).is_none());
        let names = new.routes.iter().chain(gone).map(|route| &route.name).filter(|name| only.is_empty() || *only == ***name);
        let mut compared = Vec::new();
        let mut by_topic: HashMap<Arc<str>, Vec<usize>> = HashMap::new();
        for name in names {
            let (old, new) = (old.and_then(|old| old.route(name)).cloned(), new.route(name).cloned());
            let change = match (&old, &new) {
                (Some(old), Some(new)) if old == new => RouteChange::Same,
                (Some(_), Some(_)) => RouteChange::Changed,
                (None, _) => RouteChange::Added,
                (Some(_), None) => RouteChange::Removed,
            };
            let topics: BTreeSet<Arc<str>> = old.iter().chain(&new).flat_map(|route| route.from.iter().cloned()).collect();
            for topic in topics {
                by_topic.entry(topic).or_default().push(compared.len());
            }
            let plan = v1::RoutePlan {
                route: name.to_string(),
                change: change.into(),
                before: Some(v1::PlanCounts::default()),
                after: Some(v1::PlanCounts::default()),
                ..v1::RoutePlan::default()
            };
            compared.push(Compared { old, new, plan, why: BTreeMap::new(), unsure: Vec::new() });
        }
        if compared.is_empty() && !only.is_empty() {
            let known: Vec<&str> = new.routes.iter().map(|route| &*route.name).collect();
            let known = known.join(", ");
            return Err(OperationError::Invalid(format!("neither table has a route {only}; the proposed one has: {known}")));
        }
        let differs = by_topic.keys().filter_map(|topic| {
            let schema = new.schema(topic)?;
            let same = old.and_then(|old| old.schema(topic)).is_some_and(|old| old == schema);
            let plan = v1::SchemaPlan { topic: topic.to_string(), ..v1::SchemaPlan::default() };
            (!same).then(|| (topic.clone(), (schema.clone(), plan)))
        });
        let schemas = differs.collect();
        Ok(Self { compared, by_topic, waiting: HashMap::new(), kept: 0, samples, schemas, read: 0 })
    }

    /// The sources.
    fn topics(&self) -> BTreeSet<Arc<str>> {
        self.by_topic.keys().cloned().collect()
    }

    async fn take(&mut self, batch: Batch) {
        for part in batch.records.chunks(AT_ONCE) {
            for (offset, record) in part {
                self.judge(record, &Position { partition: batch.partition.clone(), offset: *offset });
            }
            tokio::task::yield_now().await;
        }
    }

    fn judge(&mut self, record: &Record, at: &Position) {
        self.read += 1;
        if let Some((schema, plan)) = self.schemas.get_mut(&at.partition.topic)
            && let Some(value) = &record.value
        {
            plan.checked += 1;
            if let Err(mismatch) = schema.check(value) {
                plan.mismatched += 1;
                if plan.first.is_empty() {
                    plan.first = format!("{at}: {mismatch}");
                }
            }
        }
        let routes = self.by_topic.get(&at.partition.topic).map_or(&[][..], Vec::as_slice);
        let mut copy: Option<Arc<Record>> = None;
        for index in routes {
            let Some(compared) = self.compared.get_mut(*index) else { continue };
            let (old, new) = (compared.old.as_deref(), compared.new.as_deref());
            let before = Fate::of(old, record, at);
            // What is the same is asked once.
            let same = compared.plan.change() == RouteChange::Same;
            let after = if same { before.clone() } else { Fate::of(new, record, at) };
            count(compared.plan.before.get_or_insert_default(), &before);
            count(compared.plan.after.get_or_insert_default(), &after);
            if same {
                continue;
            }
            match difference(old, new, &before, &after) {
                Difference::None => {}
                Difference::Changed(word) => {
                    let sample = || sample(at, record, word, before.describe(), after.describe());
                    compared.changed(word, self.samples, sample);
                }
                Difference::Undecided => {
                    compared.plan.undecided += 1;
                    if compared.unsure.len() < self.samples {
                        compared.unsure.push(sample(at, record, "undecided", before.describe(), after.describe()));
                    }
                    let (Fate::Delivered(before), Fate::Delivered(after)) = (before, after) else { continue };
                    if self.kept + record.size() > KEPT {
                        *compared.why.entry("there were more records than are kept for it").or_default() += 1;
                        continue;
                    }
                    self.kept += record.size();
                    let record = copy.get_or_insert_with(|| Arc::new(owned(record))).clone();
                    self.waiting.insert((*index, at.clone()), Waiting { record, before, after });
                }
            }
        }
    }

    /// Lets stored replies decide what depends on them. Says what was read for that.
    async fn ask_replies(&mut self, shared: &Shared) -> Result<Vec<v1::Scanned>, OperationError> {
        let routes: BTreeSet<usize> = self.waiting.keys().map(|(index, _)| *index).collect();
        let of = |index: &usize| self.compared.get(*index).and_then(|compared| compared.old.as_deref());
        let topics: BTreeSet<Arc<str>> = routes.iter().filter_map(of).flat_map(replies_of).collect();
        if topics.is_empty() {
            return Ok(Vec::new());
        }
        let times = self.waiting.values().filter_map(|waiting| waiting.record.timestamp_ms);
        let since_ms = Some(times.min().unwrap_or_default().min(now_ms()).saturating_sub(SKEW_MS).max(0));
        let ranges: Vec<Range> = wanted(&*shared.broker.admin(), topics, &Limits { since_ms, ..Limits::default() }).await?;
        let mut scan = Scan::open(&*shared.broker, ranges, Bound { keep: Keep::First, ..BOUND })?;
        let by_name: HashMap<String, usize> =
            routes.iter().filter_map(|index| Some((self.compared.get(*index)?.plan.route.clone(), *index))).collect();
        let mut stored: HashMap<(usize, Position), Stored> = HashMap::new();
        let mut room = KEPT;
        while let Some(batch) = scan.next().await? {
            for (_, record) in &batch.records {
                let Some(cause) = Cause::of(record) else { continue };
                let Some(index) = by_name.get(&cause.route) else { continue };
                let place = (*index, cause.source);
                let size = record.value.as_ref().map_or(0, Bytes::len);
                if self.waiting.contains_key(&place) && size <= room {
                    room -= size;
                    let value = record.value.as_deref().map(Bytes::copy_from_slice);
                    stored.entry(place).or_default().add(&batch.partition.topic, cause.index, value);
                }
            }
            tokio::task::yield_now().await;
        }
        let scanned = scan.close().await;
        let cut: BTreeSet<&str> = scanned.iter().filter(|topic| topic.left_out > 0).map(|topic| &*topic.topic).collect();
        self.decide(&stored, &cut).await;
        Ok(scanned)
    }

    /// Decides what waits, by stored replies. Of topics in `cut` not all was read.
    async fn decide(&mut self, stored: &HashMap<(usize, Position), Stored>, cut: &BTreeSet<&str>) {
        let mut waiting: Vec<_> = std::mem::take(&mut self.waiting).into_iter().collect();
        waiting.sort_by(|((a_route, a), _), ((b_route, b), _)| (a_route, a).cmp(&(b_route, b)));
        for (number, (place, Waiting { record, before, after })) in waiting.into_iter().enumerate() {
            if number % AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
            let (index, at) = &place;
            let Some(compared) = self.compared.get_mut(*index) else { continue };
            let (Some(old), Some(new)) = (compared.old.clone(), compared.new.clone()) else { continue };
            let all = !replies_of(&old).iter().any(|topic| cut.contains(&**topic));
            let decided = match all {
                true => replay_reply(&old, &new, &record, at, stored.get(&place)),
                false => Err("not all of its destinations were read"),
            };
            match decided {
                Err(why) => *compared.why.entry(why).or_default() += 1,
                Ok((was, becomes)) => {
                    compared.plan.undecided -= 1;
                    compared.plan.by_stored_reply += 1;
                    let at_it = |sample: &v1::PlanSample| sample.position.as_ref().map(flow::position).is_some_and(|place| place == *at);
                    compared.unsure.retain(|sample| !at_it(sample));
                    recount(compared.plan.before.get_or_insert_default(), &before, &was);
                    recount(compared.plan.after.get_or_insert_default(), &after, &becomes);
                    if was != becomes {
                        let told = |word: &str| format!("delivered, to {word} by its stored reply");
                        let sample = || sample(at, &record, OTHER_DESTINATION, told(&was), told(&becomes));
                        compared.changed(OTHER_DESTINATION, self.samples, sample);
                    }
                }
            }
        }
    }

    fn result(self) -> v1::PlanResult {
        let samples = self.samples;
        let routes = self.compared.into_iter().map(|compared| {
            let Compared { mut plan, why, unsure, .. } = compared;
            let room = samples.saturating_sub(plan.samples.len());
            plan.samples.extend(unsure.into_iter().take(room));
            plan.undecided_why = why.into_iter().map(|(why, count)| format!("{why}: {count}")).collect::<Vec<_>>().join("; ");
            plan
        });
        let schemas = self.schemas.into_values().map(|(_, plan)| plan).collect();
        v1::PlanResult { routes: routes.collect(), schemas, ..v1::PlanResult::default() }
    }
}

/// Where a route puts replies.
fn replies_of(route: &Route) -> Vec<Arc<str>> {
    // All but its dead letters, which come last.
    let mut topics = written_by(route);
    topics.pop();
    topics
}

impl Compared {
    fn changed(&mut self, word: &str, samples: usize, sample: impl FnOnce() -> v1::PlanSample) {
        self.plan.changed += 1;
        *self.plan.changes.entry(word.to_owned()).or_default() += 1;
        if self.plan.samples.len() < samples {
            self.plan.samples.push(sample());
        }
    }
}

fn sample(at: &Position, record: &Record, change: &str, before: String, after: String) -> v1::PlanSample {
    let key = record.key.as_deref().map(flow::short);
    v1::PlanSample { position: Some(grpc::position(at)), key, change: change.to_owned(), before, after }
}

fn count(counts: &mut v1::PlanCounts, fate: &Fate) {
    counts.read += u64::from(*fate != Fate::NotRead);
    match fate {
        Fate::NotRead => {}
        Fate::OtherRoute => counts.other_route += 1,
        Fate::Filtered => counts.filtered += 1,
        Fate::DeadLetter { reason, .. } => *counts.dead_letters.entry(reason.as_str().to_owned()).or_default() += 1,
        Fate::Delivered(goes) => {
            counts.delivered += 1;
            *counts.destinations.entry(goes.word()).or_default() += 1;
        }
    }
}

/// A destination that is known now.
fn recount(counts: &mut v1::PlanCounts, counted: &Goes, known: &str) {
    let word = counted.word();
    if let Some(count) = counts.destinations.get_mut(&word) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.destinations.remove(&word);
        }
    }
    *counts.destinations.entry(known.to_owned()).or_default() += 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::TopicPartition;

    fn table(routes: &str) -> CompiledTable {
        let text = format!(
            "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: m }}\nspec:\n  \
             topics: {{ orders: {{ schema: {{ json: {{ type: object }} }} }} }}\n  routes:\n{routes}"
        );
        mesh_routing::parse("t", &text).and_then(|table| mesh_routing::compile(&table)).unwrap()
    }

    fn one(fields: &str) -> CompiledTable {
        table(&format!("  - {{ name: price, service: s, from: [orders], handler: /p, to: [priced]{fields} }}\n"))
    }

    fn feed(plan: &mut Plan, values: &[&'static str]) {
        for (offset, value) in values.iter().enumerate() {
            let record = Record { key: Some("k".into()), value: Some((*value).into()), timestamp_ms: Some(7), ..Record::default() };
            plan.judge(&record, &at(offset as i64));
        }
    }

    fn at(offset: i64) -> Position {
        Position { partition: TopicPartition::new("orders", 0), offset }
    }

    #[test]
    fn records_are_counted_by_what_changes() {
        let (old, new) = (one(""), one(", filter: 'record.json.n > 1'"));
        let mut plan = Plan::new(Some(&old), &new, "", 2).unwrap();
        feed(&mut plan, &["{\"n\":1}", "{\"n\":2}", "{\"n\":1}", "{\"n\":0}", "[]"]);
        assert!(plan.schemas.is_empty(), "both have the same schema");
        let result = plan.result();
        let [price] = &result.routes[..] else { panic!("{result:?}") };
        assert_eq!((price.change(), price.changed, price.undecided), (RouteChange::Changed, 4, 0));
        assert_eq!(price.changes, [("newly_filtered".to_owned(), 3), ("newly_dead_lettered".to_owned(), 1)].into());
        let (before, after) = (price.before.clone().unwrap(), price.after.clone().unwrap());
        assert_eq!((before.read, before.delivered, before.destinations["priced"]), (5, 5, 5));
        assert_eq!((after.read, after.delivered, after.filtered, after.dead_letters["expression"]), (5, 1, 3, 1));
        assert_eq!(price.samples.len(), 2);
        assert_eq!(
            (&*price.samples[0].change, &*price.samples[0].before, &*price.samples[0].after),
            ("newly_filtered", "delivered, to priced", "filtered")
        );
    }

    #[test]
    fn routes_that_come_and_go_and_schemas_that_are_new() {
        let plain = "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: { mesh: m }\nspec:\n  routes:\n  - { name: old, service: s, from: [orders], handler: /p, to: void }\n";
        let old = mesh_routing::parse("t", plain).and_then(|table| mesh_routing::compile(&table)).unwrap();
        let new = one("");
        let mut plan = Plan::new(Some(&old), &new, "", 5).unwrap();
        feed(&mut plan, &["{}", "[]"]);
        let result = plan.result();
        let said: Vec<_> = result.routes.iter().map(|route| (&*route.route, route.change(), route.changes.clone())).collect();
        let changes = |word: &str| HashMap::from([(word.to_owned(), 2)]);
        assert_eq!(
            said,
            [("price", RouteChange::Added, changes("newly_delivered")), ("old", RouteChange::Removed, changes("no_longer_delivered"))]
        );
        assert_eq!((result.schemas[0].checked, result.schemas[0].mismatched), (2, 1));
        assert!(result.schemas[0].first.starts_with("orders/0/1: "), "{}", result.schemas[0].first);
        // No table in force yet, and one route alone.
        assert_eq!(Plan::new(None, &new, "price", 5).unwrap().compared.len(), 1);
        assert!(Plan::new(Some(&old), &new, "nobody", 5).is_err());
    }

    #[tokio::test]
    async fn stored_replies_decide_where_they_can() {
        let (old, new) = (one(""), one(", cases: [{ when: 'reply.json.n > 1', to: [big] }]"));
        let mut plan = Plan::new(Some(&old), &new, "", 5).unwrap();
        feed(&mut plan, &["{}", "{}", "{}"]);
        assert_eq!((plan.waiting.len(), plan.compared[0].plan.undecided), (3, 3));
        let reply = |value: &'static str| {
            let mut stored = Stored::default();
            stored.add(&Arc::from("priced"), 0, Some(value.into()));
            stored
        };
        let stored = [((0, at(0)), reply("{\"n\":1}")), ((0, at(1)), reply("{\"n\":2}"))].into();
        plan.decide(&stored, &BTreeSet::new()).await;
        let result = plan.result();
        let price = &result.routes[0];
        assert_eq!((price.changed, price.undecided, price.by_stored_reply), (1, 1, 2));
        assert_eq!(price.undecided_why, "no stored reply was found: 1");
        let after = price.after.clone().unwrap().destinations;
        assert_eq!(after, [("priced".to_owned(), 1), ("big".to_owned(), 1), ("by reply: big | priced".to_owned(), 1)].into());
        let said: Vec<_> = price.samples.iter().map(|sample| (sample.position.as_ref().unwrap().offset, &*sample.change)).collect();
        assert_eq!(said, [(1, OTHER_DESTINATION), (2, "undecided")]);

        // Of a topic that was not read to its end a reply may be missing.
        let mut plan = Plan::new(Some(&old), &new, "", 5).unwrap();
        feed(&mut plan, &["{}"]);
        plan.decide(&stored, &["priced"].into()).await;
        assert_eq!(plan.result().routes[0].undecided, 1);
    }

    #[test]
    fn a_route_that_is_the_same_changes_nothing() {
        let (old, new) =
            (one(", cases: [{ when: 'reply.json.n > 1', to: [big] }]"), one(", cases: [{ when: 'reply.json.n > 1', to: [big] }]"));
        let mut plan = Plan::new(Some(&old), &new, "", 5).unwrap();
        feed(&mut plan, &["{}"]);
        assert!(plan.waiting.is_empty());
        let result = plan.result();
        assert_eq!((result.routes[0].change(), result.routes[0].changed, result.routes[0].undecided), (RouteChange::Same, 0, 0));
    }
}
