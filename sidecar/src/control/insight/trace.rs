//! Follows a flow over its hops: records name what they were made of, and carry their trace and their `mesh-id`.
//!
//! Two readings: the first notes of each record who it is and what it was made of ([`Link`]), since a reply may be read before its source; the second
//! reads the records that turned out to belong together.
//!
//! Invariant: of a record that is read the first time no more than its links is kept, and the records of a flow are at most [`MOST`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use mesh_proto::v1;

use super::{
    super::{
        Control,
        range::{Limits, Range},
        reset::OperationError,
    },
    flow::{self, Node},
    scan::{Bound, Keep, Scan, wanted},
};
use crate::record::{Position, Record, TopicPartition, mesh_id};

/// What is read of the topics of the table.
const BOUND: Bound = Bound { offsets: 200_000, bytes: 1 << 30, time: Duration::from_secs(90), keep: Keep::Last };
/// The most records of a flow that are told.
const MOST: usize = 1_000;
/// The longest id.
const LONGEST: usize = 1_024;

impl Control {
    /// Follows a flow.
    ///
    /// # Errors
    /// If the id can be none, there is no table, or the broker does not answer.
    pub async fn trace(&self, request: v1::TraceRequest) -> Result<v1::TraceResponse, OperationError> {
        let id = request.id.trim();
        if id.is_empty() || id.len() > LONGEST {
            return Err(OperationError::Invalid("`id` is to be a trace id (32 hexadecimal digits) or a mesh-id".to_owned()));
        }
        let table = self.whole().await?;
        let _room = self.room().await?;
        let admin = self.0.broker.admin();
        let topics = table.topic_names().iter().map(|topic| topic.name.clone()).collect();
        let limits = Limits { since_ms: Some(request.since_ms), ..Limits::default() };
        let ranges = wanted(&*admin, topics, &limits).await?;

        let mut links = Links::new(id);
        let mut scan = Scan::open(&*self.0.broker, ranges, BOUND)?;
        while let Some(batch) = scan.next().await? {
            for (offset, record) in &batch.records {
                links.add(record, &Position { partition: batch.partition.clone(), offset: *offset });
            }
            tokio::task::yield_now().await;
        }
        let scanned = scan.close().await;
        let (found, more) = links.flow(MOST);

        let mut nodes = Vec::with_capacity(found.len());
        let mut scan = Scan::open(&*self.0.broker, around(&found), BOUND)?;
        while let Some(batch) = scan.next().await? {
            for (offset, record) in &batch.records {
                let at = Position { partition: batch.partition.clone(), offset: *offset };
                if found.contains(&at) {
                    nodes.push(Node::new(record, &at, Some(&*table)));
                }
            }
        }
        scan.close().await;
        flow::annotate(&*admin, &table, &mut nodes).await?;
        let records = ordered(nodes);
        let traces: BTreeSet<&str> = records.iter().map(|record| &*record.trace_id).filter(|trace| !trace.is_empty()).collect();
        let traces = traces.into_iter().map(str::to_owned).collect();
        Ok(v1::TraceResponse { records, more, scanned, traces })
    }
}

/// The least range of each partition that has all of these records.
fn around(found: &BTreeSet<Position>) -> Vec<Range> {
    let mut ranges: BTreeMap<&TopicPartition, (i64, i64)> = BTreeMap::new();
    for at in found {
        let (from, until) = ranges.entry(&at.partition).or_insert((at.offset, at.offset + 1));
        (*from, *until) = ((*from).min(at.offset), (*until).max(at.offset + 1));
    }
    ranges.into_iter().map(|(partition, (from, until))| Range { partition: partition.clone(), from, until }).collect()
}

/// Who a record is, and what it was made of. Partitions are numbers.
#[derive(Clone, Copy, Debug)]
struct Link {
    at: (u32, i64),
    source: Option<(u32, i64)>,
    /// The hash of its `mesh-id`.
    id: u64,
    /// Whether it has the id that is asked for.
    asked: bool,
}

/// What is known of the records that were read.
struct Links {
    wanted: String,
    hasher: RandomState,
    partitions: HashMap<TopicPartition, u32>,
    links: Vec<Link>,
}

impl Links {
    fn new(wanted: &str) -> Self {
        Self { wanted: wanted.to_owned(), hasher: RandomState::new(), partitions: HashMap::new(), links: Vec::new() }
    }

    fn partition(&mut self, partition: &TopicPartition) -> u32 {
        if let Some(known) = self.partitions.get(partition) {
            return *known;
        }
        let next = u32::try_from(self.partitions.len()).unwrap_or(u32::MAX);
        self.partitions.insert(partition.clone(), next);
        next
    }

    fn add(&mut self, record: &Record, at: &Position) {
        let id = mesh_id(record, at);
        let of_trace = || flow::trace_of(record).is_some_and(|trace| trace.trace_id_text().eq_ignore_ascii_case(&self.wanted));
        let asked = *id == *self.wanted.as_bytes() || of_trace();
        let source = flow::source_of(record, at).map(|source| (self.partition(&source.partition), source.offset));
        let link = Link { at: (self.partition(&at.partition), at.offset), source, id: self.hasher.hash_one(&*id), asked };
        self.links.push(link);
    }

    /// The records that belong to what is asked for: by its id or trace, and whatever these were made of, or was made of them, or is a copy of
    /// them, and so on. At most so many; and whether there are more.
    fn flow(self, most: usize) -> (BTreeSet<Position>, bool) {
        let Self { partitions, links, .. } = self;
        let index = |of: fn(&Link) -> Option<u128>| {
            let mut sorted: Vec<(u128, u32)> =
                links.iter().enumerate().filter_map(|(number, link)| Some((of(link)?, u32::try_from(number).ok()?))).collect();
            sorted.sort_unstable();
            sorted
        };
        let (places, sources, ids) =
            (index(|link| Some(key(link.at))), index(|link| link.source.map(key)), index(|link| Some(link.id.into())));
        let mut seen = vec![false; links.len()];
        let mut open: Vec<u32> = Vec::new();
        let (mut count, mut more) = (0, false);
        let mut reach = |number: u32, open: &mut Vec<u32>| {
            let Some(seen) = seen.get_mut(number as usize).filter(|seen| !**seen) else { return };
            if count == most {
                more = true;
                return;
            }
            *seen = true;
            count += 1;
            open.push(number);
        };
        for (number, _) in links.iter().enumerate().filter(|(_, link)| link.asked) {
            reach(u32::try_from(number).unwrap_or(u32::MAX), &mut open);
        }
        while let Some(number) = open.pop() {
            let Some(link) = links.get(number as usize) else { continue };
            let made_of = link.source.map(|source| numbers(&places, key(source))).unwrap_or_default();
            for near in made_of.iter().chain(numbers(&sources, key(link.at))).chain(numbers(&ids, link.id.into())) {
                reach(near.1, &mut open);
            }
        }
        let names: HashMap<u32, TopicPartition> = partitions.into_iter().map(|(name, number)| (number, name)).collect();
        let found = links.iter().zip(&seen).filter(|(_, seen)| **seen).filter_map(|(link, _)| {
            let (partition, offset) = link.at;
            Some(Position { partition: names.get(&partition)?.clone(), offset })
        });
        (found.collect(), more)
    }
}

fn key((partition, offset): (u32, i64)) -> u128 {
    u128::from(partition) << 64 | u128::from(offset.cast_unsigned())
}

/// The entries of a key.
fn numbers(sorted: &[(u128, u32)], key: u128) -> &[(u128, u32)] {
    let from = sorted.partition_point(|(other, _)| *other < key);
    let until = sorted.partition_point(|(other, _)| *other <= key);
    sorted.get(from..until).unwrap_or_default()
}

/// The records of a flow, each after the one that it was made of, and those of one source by time.
fn ordered(nodes: Vec<Node>) -> Vec<v1::FlowRecord> {
    let mut flows: Vec<(Position, Option<v1::FlowRecord>)> = nodes.into_iter().map(|node| (node.at, Some(node.flow))).collect();
    flows.sort_by(|(a, a_flow), (b, b_flow)| {
        let time = |flow: &Option<v1::FlowRecord>| flow.as_ref().map_or(0, |flow| flow.timestamp_ms);
        (time(a_flow), a).cmp(&(time(b_flow), b))
    });
    let here: BTreeMap<Position, usize> = flows.iter().enumerate().map(|(number, (at, _))| (at.clone(), number)).collect();
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); flows.len()];
    let mut roots = Vec::new();
    for (number, (_, flow)) in flows.iter().enumerate() {
        let source = flow.as_ref().and_then(|flow| flow.source.as_ref()).map(flow::position);
        match source.and_then(|source| here.get(&source)).and_then(|source| children.get_mut(*source)) {
            Some(of) => of.push(number),
            None => roots.push(number),
        }
    }
    // Headers can be forged: records that name each other in a circle have no root.
    roots.extend(0..flows.len());
    let mut told = Vec::with_capacity(flows.len());
    for root in roots {
        let mut open = vec![root];
        while let Some(number) = open.pop() {
            let Some(flow) = flows.get_mut(number).and_then(|(_, flow)| flow.take()) else { continue };
            told.push(flow);
            open.extend(children.get(number).into_iter().flatten().rev());
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Header;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn record(headers: &[(&'static str, &str)], time: i64) -> Record {
        let headers = headers.iter().map(|(name, value)| Header::new(name, (*value).to_owned())).collect();
        Record { headers, timestamp_ms: Some(time), ..Record::default() }
    }

    fn at(text: &str) -> Position {
        Position::parse(text).unwrap()
    }

    /// A chain of two routes with a dead letter that was sent back, and a stranger, in an order in which nothing comes after what it was made of.
    fn records() -> Vec<(&'static str, Record)> {
        let trace = format!("00-{TRACE}-00f067aa0ba902b7-01");
        vec![
            ("stored/0/0", record(&[("mesh-id", "c"), ("mesh-cause", "store priced/1/8 0")], 6)),
            ("priced/1/8", record(&[("mesh-id", "b"), ("mesh-redriven", "store.dlq/0/3")], 5)),
            (
                "store.dlq/0/3",
                record(
                    &[
                        ("mesh-id", "b"),
                        ("mesh-cause", "price orders/0/5 0"),
                        ("mesh-dlq-reason", "status"),
                        ("mesh-dlq-route", "store"),
                        ("mesh-dlq-topic", "priced"),
                        ("mesh-dlq-partition", "1"),
                        ("mesh-dlq-offset", "2"),
                    ],
                    4,
                ),
            ),
            ("priced/1/2", record(&[("mesh-id", "b"), ("mesh-cause", "price orders/0/5 0")], 3)),
            ("orders/0/6", record(&[("mesh-id", "z")], 2)),
            ("orders/0/5", record(&[("mesh-id", "a"), ("traceparent", &trace)], 1)),
        ]
    }

    fn found(id: &str, most: usize) -> (Vec<String>, bool) {
        let mut links = Links::new(id);
        records().iter().for_each(|(place, record)| links.add(record, &at(place)));
        let (found, more) = links.flow(most);
        (found.iter().map(ToString::to_string).collect(), more)
    }

    #[test]
    fn a_flow_is_found_from_any_of_its_records() {
        let all = ["orders/0/5", "priced/1/2", "priced/1/8", "store.dlq/0/3", "stored/0/0"];
        for id in ["a", "b", "c", TRACE, &TRACE.to_uppercase()] {
            assert_eq!(found(id, 10), (all.map(str::to_owned).to_vec(), false), "{id}");
        }
        assert_eq!(found("z", 10), (vec!["orders/0/6".to_owned()], false));
        assert_eq!(found("nobody", 10), (Vec::new(), false));
        let (some, more) = found("b", 2);
        assert!(some.len() == 2 && more, "{some:?}");
    }

    #[test]
    fn records_stand_behind_what_they_were_made_of() {
        let nodes = records().into_iter().map(|(place, record)| Node::new(&record, &at(place), None)).collect();
        let places: Vec<String> =
            ordered(nodes).iter().map(|flow| flow.position.as_ref().map(flow::position).unwrap().to_string()).collect();
        assert_eq!(places, ["orders/0/5", "priced/1/2", "store.dlq/0/3", "priced/1/8", "stored/0/0", "orders/0/6"]);
        // Who names each other in a circle is told all the same.
        let circle = [("a/0/0", "x b/0/0 0"), ("b/0/0", "x a/0/0 0")];
        let nodes: Vec<Node> =
            circle.iter().map(|(place, cause)| Node::new(&record(&[("mesh-cause", *cause)], 1), &at(place), None)).collect();
        assert_eq!(ordered(nodes).len(), 2);
    }

    #[test]
    fn what_is_read_again_is_no_more_than_what_is_around() {
        let found = ["a/0/9", "a/0/3", "b/1/4"].map(at).into();
        let said: Vec<_> = around(&found).into_iter().map(|range| (range.partition.to_string(), range.from, range.until)).collect();
        assert_eq!(said, [("a/0".to_owned(), 3, 10), ("b/1".to_owned(), 4, 5)]);
    }
}
