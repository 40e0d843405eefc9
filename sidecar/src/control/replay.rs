//! Copies a range of a topic: into another topic, or back into its own for one route alone.
//!
//! Invariant: it reads what was there when it began, so it ends, also where it copies a topic into itself.
//! Invariant: a copy keeps key, value, headers, time and `mesh-id`, and says where it came from.

use std::{sync::Arc, time::Duration};

use mesh_proto::v1;
use mesh_routing::{RecordView, Route};
use tokio::{sync::mpsc, time::timeout};

use super::{
    Control,
    letters::is_left_behind,
    range::{Limits, RangeReader, ranges},
    redrive::Pace,
    reset::OperationError,
};
use crate::{
    broker::{Outgoing, ProduceErrorKind},
    record::{Header, Position, Record, derived_id, header},
};

/// How long records may take to be acknowledged.
const SEND: Duration = Duration::from_secs(60);
/// How long a topic may take to be found.
const TOPIC: Duration = Duration::from_secs(10);
/// The pause before records are sent again that found the producer's queue full.
const PAUSE: Duration = Duration::from_millis(50);

/// Where copies go.
struct Target {
    topic: Arc<str>,
    /// The only route that takes them.
    route: Option<Arc<Route>>,
    partitions: i32,
}

impl Control {
    /// Copies a range, or says what would be copied. Tells of its progress; ends when nobody listens any more.
    ///
    /// # Errors
    /// If the request is wrong, or the broker fails. What was copied until then stays.
    pub async fn replay(&self, request: v1::ReplayRequest, out: mpsc::Sender<v1::ReplayProgress>) -> Result<(), OperationError> {
        let filter = match request.filter.as_str() {
            "" => None,
            text => Some(filter(text.to_owned()).await?),
        };
        let target = self.target(&request).await?;
        let limits = Limits {
            partitions: request.partitions.clone(),
            from_offset: request.from_offset,
            until_offset: request.until_offset,
            since_ms: request.since_ms,
            until_ms: request.until_ms,
        };
        let ranges = ranges(&*self.0.broker.admin(), &request.topic, &limits).await?;
        let in_range = ranges.iter().map(|range| u64::try_from(range.until - range.from).unwrap_or(0)).sum();
        let mut progress =
            v1::ReplayProgress { to: target.topic.to_string(), in_range, executed: request.execute, ..v1::ReplayProgress::default() };
        let mut reader = RangeReader::open(&*self.0.broker, ranges)?;
        let mut pace = Pace::new(request.rate);
        while let Some(batch) = reader.next().await? {
            for part in batch.records.chunks(pace.batch()) {
                let mut copies = Vec::with_capacity(part.len());
                for (offset, record) in part {
                    progress.read += 1;
                    let position = Position { partition: batch.partition.clone(), offset: *offset };
                    match filter.as_ref().map_or(Ok(true), |filter| filter.admits(&view(record, &position))) {
                        Ok(true) => copies.push(copy(&target, record, &position)),
                        Ok(false) => progress.filtered += 1,
                        Err(error) => {
                            progress.failed += 1;
                            if progress.failure.is_empty() {
                                progress.failure = format!("{position}: {error}");
                            }
                        }
                    }
                }
                let count = copies.len();
                if request.execute {
                    self.append(copies).await?;
                    pace.sent(count).await;
                }
                progress.copied += count as u64;
            }
            if out.send(progress.clone()).await.is_err() {
                break;
            }
        }
        reader.close().await;
        progress.finished = true;
        // Whoever listened may be gone.
        drop(out.send(progress).await);
        Ok(())
    }

    async fn target(&self, request: &v1::ReplayRequest) -> Result<Target, OperationError> {
        let invalid = |detail: String| Err(OperationError::Invalid(detail));
        let (topic, route): (Arc<str>, _) = match (request.to_topic.as_str(), request.to_route.as_str()) {
            ("", "") => return invalid("say where to: --to TOPIC or --route ROUTE".to_owned()),
            (topic, "") if topic.starts_with("__") => return invalid(format!("topic {topic} is the broker's or the mesh's own")),
            (topic, "") if topic == request.topic => {
                return invalid(format!(
                    "copies of {topic} in itself would reach every route that reads it: `reset` delivers again what is there, --route reaches one route alone"
                ));
            }
            (topic, "") => (topic.into(), None),
            ("", name) => {
                let route = self.route(name).await?;
                match (route.from.iter().find(|source| ***source == *request.topic), &route.from[..]) {
                    (Some(source), _) | (None, [source]) => (source.clone(), Some(route)),
                    (None, from) => {
                        return invalid(format!("route {name} reads {}: {} is none of them", from.join(", "), request.topic));
                    }
                }
            }
            _ => return invalid("--to and --route exclude each other".to_owned()),
        };
        // Nothing is ever sent to a topic that is not known: it would be created.
        let existing = self.0.broker.admin().topics().await?;
        let Some(partitions) = existing.get(&*topic).copied() else {
            return invalid(format!("there is no topic {topic}: declare it in the routing table, or create it"));
        };
        self.0.broker.producer().learn_topic(&topic, TOPIC).await.map_err(|error| OperationError::Refused(error.to_string()))?;
        Ok(Target { topic, route, partitions })
    }

    /// Appends records, in order.
    async fn append(&self, mut records: Vec<Outgoing>) -> Result<(), OperationError> {
        let producer = self.0.broker.producer();
        while !records.is_empty() {
            let acks = timeout(SEND, producer.send(records.clone())).await.map_err(|_| {
                OperationError::Unclear(format!(
                    "no acknowledgement within {} s: some of the last {} records may be stored",
                    SEND.as_secs(),
                    records.len()
                ))
            })?;
            let mut again = Vec::new();
            for (record, ack) in records.into_iter().zip(acks) {
                match ack {
                    Ok(_) => {}
                    Err(error) if error.kind == ProduceErrorKind::QueueFull => again.push(record),
                    Err(error) => {
                        return Err(OperationError::Refused(format!("the broker refuses a copy: {error}; what was copied before stays")));
                    }
                }
            }
            records = again;
            if !records.is_empty() {
                tokio::time::sleep(PAUSE).await;
            }
        }
        Ok(())
    }
}

/// Compiles a filter, as that of a route. What comes back is a route that has it.
pub(super) async fn filter(text: String) -> Result<Arc<Route>, OperationError> {
    let compiled = tokio::task::spawn_blocking(move || {
        let route =
            serde_json::json!({ "name": "filter", "service": "filter", "from": ["any"], "handler": "/", "to": "void", "filter": text });
        let table = serde_json::json!({
            "apiVersion": "mesh/v1", "kind": "RoutingTable", "metadata": { "mesh": "filter" }, "spec": { "routes": [route] }
        });
        mesh_routing::load("--filter", &table.to_string()).map(|(_, compiled)| compiled)
    });
    let compiled = compiled.await.map_err(|error| OperationError::Refused(error.to_string()))?;
    let compiled = compiled.map_err(|faults| {
        let faults: Vec<String> = faults
            .0
            .into_iter()
            .map(|fault| if fault.hint.is_empty() { fault.message } else { format!("{} ({})", fault.message, fault.hint) })
            .collect();
        OperationError::Invalid(format!("--filter: {}", faults.join("; ")))
    })?;
    compiled.route("filter").cloned().ok_or_else(|| OperationError::Refused("the filter was not compiled".to_owned()))
}

/// A record as expressions see it.
pub(super) fn view<'a>(record: &'a Record, position: &'a Position) -> RecordView<'a> {
    RecordView {
        topic: &position.partition.topic,
        partition: position.partition.partition,
        offset: position.offset,
        timestamp_ms: record.timestamp_ms.unwrap_or_default(),
        key: record.key.as_deref(),
        value: record.value.as_deref(),
        headers: record,
    }
}

fn copy(target: &Target, record: &Record, position: &Position) -> Outgoing {
    let managed = |name: &str| (is_left_behind(name) && !name.starts_with(header::DLQ_PREFIX)) || name == header::MESH_REPLAYED;
    let mut headers: Vec<Header> = record.headers.iter().filter(|header| !managed(&header.name)).cloned().collect();
    if record.header(header::MESH_ID).is_none() {
        headers.push(Header::new(header::MESH_ID, derived_id(position)));
    }
    headers.push(Header::new(header::MESH_REPLAYED, position.to_string()));
    if let Some(route) = &target.route {
        headers.push(Header::new(header::MESH_ONLY_ROUTE, route.name.to_string()));
    }
    // In its own topic a record keeps its partition, elsewhere its key finds it one.
    let own = target.topic == position.partition.topic;
    let partition = own.then_some(position.partition.partition).filter(|partition| *partition < target.partitions);
    Outgoing { topic: target.topic.clone(), partition, record: Record { headers, ..record.clone() } }
}
