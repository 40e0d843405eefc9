//! What became of one record: what each route did or would do with it, and what was made of it.
//!
//! Replies, dead letters and copies name the record that they were made of. They are looked for in the topics where the routes of the table in force
//! put them, from the record's time on. Of a record that is under way, the owner of its partition is asked how far it is.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::future::join_all;
use mesh_proto::v1;
use mesh_routing::{Destinations, Route};

use super::{
    super::{
        Control,
        commands::look_up_at,
        owners::Owners,
        range::{Limits, Range, RangeReader, owned},
        reset::OperationError,
        state::now_ms,
    },
    flow::{self, Node},
    scan::{Bound, Keep, Scan, wanted},
};
use crate::{
    command::{Held, RecordStage},
    deliver::grpc,
    record::{Position, Record},
    tiers,
};

/// What is read in search of what was made of a record.
const BOUND: Bound = Bound { offsets: 200_000, bytes: 512 << 20, time: Duration::from_secs(60), keep: Keep::First };
/// What is told of that at most.
const FOUND: usize = 1_000;
/// How long the owner of the record's partition may take to say how far it is, in milliseconds.
const LOOK_UP_MS: u64 = 3_000;
/// The clocks of a publisher, a sidecar and a broker may differ by so much.
const SKEW_MS: i64 = 60_000;

impl Control {
    /// Tells what became of a record.
    ///
    /// # Errors
    /// If there is no such record, no table, or the broker does not answer.
    pub async fn explain(&self, request: v1::ExplainRequest) -> Result<v1::ExplainResponse, OperationError> {
        let at = request.position.ok_or_else(|| OperationError::Invalid("`position` is missing: say which record".to_owned()))?;
        let at = flow::position(&at);
        let table = self.whole().await?;
        let _room = self.room().await?;
        let record = self.read_one(&at).await?;
        let admin = self.0.broker.admin();

        let routes = table.routes_from(&at.partition.topic);
        let mut topics: BTreeSet<Arc<str>> = routes.iter().flat_map(|route| written_by(route)).collect();
        let mut nodes = vec![Node::new(&record, &at, Some(&*table))];
        if nodes.iter().any(|node| node.flow.kind() == v1::FlowKind::DeadLetter)
            && let Some(source) = flow::source_of(&record, &at)
        {
            // Where it is sent back to.
            topics.insert(source.partition.topic);
        }
        let existing = admin.topics().await?;
        let aside: BTreeSet<Arc<str>> = routes.iter().flat_map(|route| asides(route, &at, &existing)).collect();
        let since_ms = record.timestamp_ms.filter(|time| *time >= 0).unwrap_or_default().min(now_ms()).saturating_sub(SKEW_MS).max(0);
        let limits = Limits { since_ms: Some(since_ms), ..Limits::default() };
        // A copy lies in the partition of its source's number.
        let own = Limits { partitions: vec![at.partition.partition], ..limits.clone() };
        let mut ranges = wanted(&*admin, topics, &limits).await?;
        ranges.extend(wanted(&*admin, aside, &own).await?);

        let mut more = false;
        let mut scan = Scan::open(&*self.0.broker, ranges, BOUND)?;
        while let Some(batch) = scan.next().await? {
            for (offset, found) in &batch.records {
                let place = Position { partition: batch.partition.clone(), offset: *offset };
                if place == at || flow::source_of(found, &place).as_ref() != Some(&at) {
                    continue;
                }
                more = nodes.len() > FOUND;
                if !more {
                    nodes.push(Node::new(found, &place, None));
                }
            }
        }
        let scanned = scan.close().await;
        flow::annotate(&*admin, &table, &mut nodes).await?;
        if let Some(node) = nodes.first_mut() {
            let under_way = node.flow.routes.iter_mut().filter(|route| matches!(&*route.disposition, "waiting" | "pending"));
            let asked = under_way.filter(|route| route.verdict == "delivered").map(|route| self.ask_owner(route, &at));
            join_all(asked).await;
        }
        let mut flows = nodes.into_iter().map(|node| node.flow);
        let flow = flows.next();
        Ok(v1::ExplainResponse { record: Some(grpc::record(&record, None, None)), flow, found: flows.collect(), scanned, since_ms, more })
    }

    /// Asks the owner of a record's partition how far it is. Whoever is silent leaves it with what the records tell.
    async fn ask_owner(&self, of: &mut v1::FlowRoute, at: &Position) {
        let route: Arc<str> = of.route.as_str().into();
        let mut owners = Owners::new(&self.0, &route, LOOK_UP_MS);
        while owners.in_time() && owners.ask(|owner, until| look_up_at(&self.0, owner, &route, at, until)) {
            if let Some((instance, Ok(Some(held)))) = owners.next().await {
                return tell(of, instance, held);
            }
        }
    }

    /// The record at a position.
    async fn read_one(&self, at: &Position) -> Result<Record, OperationError> {
        let admin = self.0.broker.admin();
        let topic = &at.partition.topic;
        let Some(partitions) = admin.topics().await?.get(&**topic).copied() else {
            return Err(OperationError::Invalid(format!("there is no topic {topic}")));
        };
        if !(0..partitions).contains(&at.partition.partition) {
            let last = partitions - 1;
            return Err(OperationError::Invalid(format!(
                "topic {topic} has partitions 0 to {last}, there is no partition {}",
                at.partition.partition
            )));
        }
        let (low, high) = admin.watermarks(&at.partition).await?;
        if !(low..high).contains(&at.offset) {
            let what = if low == high { "is empty".to_owned() } else { format!("holds offsets {low} to {}", high - 1) };
            return Err(OperationError::Invalid(format!("there is no record {at}: the partition {what}")));
        }
        let range = Range { partition: at.partition.clone(), from: at.offset, until: at.offset + 1 };
        let mut reader = RangeReader::open(&*self.0.broker, vec![range])?;
        let read = reader.next().await;
        reader.close().await;
        let found = read?.and_then(|batch| batch.records.into_iter().find(|(offset, _)| *offset == at.offset));
        found.map(|(_, record)| owned(&record)).ok_or_else(|| {
            OperationError::Invalid(format!("there is no record {at}: it was compacted away, or the offset is the mark of a transaction"))
        })
    }
}

/// Adds to what the records tell what the owner says.
fn tell(of: &mut v1::FlowRoute, instance: String, held: Held) {
    let Held { stage, attempts, failure, waits_for } = held;
    let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
    let (disposition, what) = match stage {
        RecordStage::Unread => ("pending", "it was not read yet".to_owned()),
        RecordStage::Waiting => ("waiting", "it waits for its turn".to_owned()),
        RecordStage::AtService(time) => ("at_service", format!("it has been at the service for {}", seconds(time))),
        RecordStage::BackingOff(time) => ("retrying", format!("its next attempt is due in {}", seconds(time))),
        RecordStage::Exhausted => ("parked", "it stopped its partition, and waits to be released".to_owned()),
        RecordStage::Publishing => ("publishing", "what was made of it is on its way to the broker".to_owned()),
        RecordStage::Complete => ("done", "it is done, and about to be committed".to_owned()),
    };
    let mut note = format!("at instance {instance}: {what}");
    if attempts > 0 {
        note += &format!("; attempt {attempts} was begun");
    }
    if !failure.is_empty() {
        note += &format!("; the last that failed: {failure}");
    }
    if !waits_for.is_empty() {
        note += &format!("; the route waits: {waits_for}");
    }
    (of.disposition, of.note, of.instance, of.attempts) = (disposition.to_owned(), note, instance, attempts);
}

/// The topics where a route puts what it makes of records: its destinations, and its dead letters.
pub(super) fn written_by(route: &Route) -> Vec<Arc<str>> {
    let all = std::iter::once(&route.to).chain(route.cases.iter().map(|case| &case.to));
    let topics = all.flat_map(|to| match to {
        Destinations::Void => [].iter(),
        Destinations::Topics(topics) => topics.iter(),
    });
    topics.chain(std::iter::once(&route.dead_letter)).cloned().collect()
}

/// The retry and park topics of a route beside a source, those among them that the table no longer has.
fn asides(route: &Route, at: &Position, existing: &std::collections::BTreeMap<String, i32>) -> Vec<Arc<str>> {
    let source = &at.partition.topic;
    let prefix = format!("{}.{source}.", route.name);
    let own = existing.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(&prefix));
    let own = own.filter(|(name, count)| **count > at.partition.partition && tiers::kind(&route.name, source, name).is_some());
    own.map(|(name, _)| Arc::from(name.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::test_delivery;

    #[test]
    fn what_was_made_of_a_record_is_looked_for_where_its_routes_put_it() {
        let route = test_delivery("cases: [{ status: 202, to: [review, out] }, { status: 409, to: void }]", 0).route;
        assert_eq!(written_by(&route).iter().map(|topic| &**topic).collect::<Vec<_>>(), ["out", "review", "out", "work.dlq"]);
        let topics = ["work.in.park", "work.in.retry-1", "work.in.retry-x", "work.inn.retry-1", "work.in.retry-2"];
        let existing = topics.iter().map(|name| ((*name).to_owned(), if name.ends_with('2') { 1 } else { 2 })).collect();
        let of = |place: &str| asides(&route, &Position::parse(place).unwrap(), &existing).join(" ");
        assert_eq!(of("in/0/5"), "work.in.park work.in.retry-1 work.in.retry-2");
        assert_eq!(of("in/1/5"), "work.in.park work.in.retry-1", "it has no such partition");
        assert_eq!(of("other/0/5"), "");
    }
}
