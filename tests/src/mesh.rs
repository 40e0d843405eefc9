//! The mesh's own gRPC API in the hands of a test.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_proto::v1::{
    self, Credit, PublishRequest, Record, SubscribeRequest, TopicSubscription, mesh_client::MeshClient, publish_result, subscribe_request,
    subscribe_response,
};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use crate::sidecar::Sidecar;

/// A record as it was found in a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
    /// The key.
    pub key: Option<Vec<u8>>,
    /// The value; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// The headers, in order.
    pub headers: Vec<(String, Vec<u8>)>,
}

impl Found {
    /// The value of the last header of this name, as text.
    pub fn header(&self, name: &str) -> Option<String> {
        self.headers.iter().rev().find(|header| header.0 == name).map(|header| String::from_utf8_lossy(&header.1).into_owned())
    }

    /// The value as JSON; null if it is none.
    pub fn json(&self) -> Value {
        self.value.as_deref().and_then(|value| serde_json::from_slice(value).ok()).unwrap_or_default()
    }

    /// The value as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(self.value.as_deref().unwrap_or_default()).into_owned()
    }

    /// The key as text.
    pub fn key_text(&self) -> String {
        String::from_utf8_lossy(self.key.as_deref().unwrap_or_default()).into_owned()
    }
}

/// Reads a topic from its start through a subscription without a group.
#[derive(Debug)]
pub struct Reader {
    topic: String,
    requests: mpsc::Sender<SubscribeRequest>,
    responses: Streaming<v1::SubscribeResponse>,
    pending: std::collections::VecDeque<Found>,
}

impl Reader {
    /// Begins to read.
    ///
    /// # Errors
    /// If the sidecar refuses.
    pub async fn open(sidecar: &Sidecar, topic: &str) -> Result<Self> {
        let subscription =
            TopicSubscription { topics: vec![topic.to_owned()], group: String::new(), from: "earliest".into(), credits: 1000 };
        let (requests, responses) = subscribe(&mut sidecar.mesh().await?, subscribe_request::Request::Topics(subscription)).await?;
        Ok(Self { topic: topic.to_owned(), requests, responses, pending: std::collections::VecDeque::new() })
    }

    /// The next record.
    ///
    /// # Errors
    /// If none comes in time, or the stream ends.
    pub async fn next(&mut self, deadline: Duration) -> Result<Found> {
        let read = async {
            loop {
                if let Some(found) = self.pending.pop_front() {
                    return Ok(found);
                }
                let response = self.responses.message().await?.context("the subscription ended")?;
                let Some(subscribe_response::Response::Delivery(delivery)) = response.response else { continue };
                let records = u32::try_from(delivery.records.len())?;
                self.pending.extend(delivery.records.into_iter().map(found));
                let credit = subscribe_request::Request::Credit(Credit { records });
                self.requests.send(SubscribeRequest { request: Some(credit) }).await.context("the subscription ended")?;
            }
        };
        tokio::time::timeout(deadline, read).await.with_context(|| format!("no record of {} in {deadline:?}", self.topic))?
    }

    /// The next `count` records.
    ///
    /// # Errors
    /// If they do not come in time.
    pub async fn take(&mut self, count: usize, deadline: Duration) -> Result<Vec<Found>> {
        let end = tokio::time::Instant::now() + deadline;
        let mut all = Vec::with_capacity(count);
        while all.len() < count {
            let left = end.saturating_duration_since(tokio::time::Instant::now());
            let next = self.next(left).await;
            all.push(next.with_context(|| format!("{} of {count} records of {} in {deadline:?}", all.len(), self.topic))?);
        }
        Ok(all)
    }

    /// What comes until nothing comes for this long: shows that nothing comes that should not.
    ///
    /// # Errors
    /// If the stream ends.
    pub async fn until_quiet(&mut self, quiet: Duration) -> Result<Vec<Found>> {
        let mut all = Vec::new();
        loop {
            match tokio::time::timeout(quiet, self.next(Duration::from_secs(3600))).await {
                Ok(found) => all.push(found?),
                Err(_) => return Ok(all),
            }
        }
    }
}

/// Opens a subscription with its first message.
///
/// # Errors
/// If the sidecar refuses.
pub async fn subscribe(
    client: &mut MeshClient<Channel>,
    first: subscribe_request::Request,
) -> Result<(mpsc::Sender<SubscribeRequest>, Streaming<v1::SubscribeResponse>)> {
    let (requests, outgoing) = mpsc::channel(64);
    requests.send(SubscribeRequest { request: Some(first) }).await?;
    let responses = client.subscribe(ReceiverStream::new(outgoing)).await?.into_inner();
    Ok((requests, responses))
}

/// A delivered record as it was found.
pub fn found(delivered: v1::DeliveredRecord) -> Found {
    let record = delivered.record.unwrap_or_default();
    let position = delivered.position.unwrap_or_default();
    let mut headers: Vec<(String, Vec<u8>)> =
        record.headers.into_iter().map(|header| (header.name, header.value.unwrap_or_default().to_vec())).collect();
    // The typed fields of a delivery stand for these headers.
    for (name, value) in [
        ("content-type", record.content_type),
        ("mesh-id", record.mesh_id),
        ("traceparent", delivered.traceparent),
        ("tracestate", delivered.tracestate),
        ("baggage", delivered.baggage),
    ] {
        if !value.is_empty() && !headers.iter().any(|header| header.0 == name) {
            headers.push((name.to_owned(), value.into_bytes()));
        }
    }
    if !headers.iter().any(|header| header.0 == "mesh-hops") {
        headers.push(("mesh-hops".to_owned(), delivered.hops.to_string().into_bytes()));
    }
    Found {
        topic: position.topic,
        partition: position.partition,
        offset: position.offset,
        key: record.key.map(|key| key.to_vec()),
        value: record.value.map(|value| value.to_vec()),
        headers,
    }
}

/// A record with a key and a JSON value.
pub fn json_record(key: &str, value: &Value) -> Record {
    Record {
        key: Some(key.as_bytes().to_vec().into()),
        value: Some(value.to_string().into_bytes().into()),
        content_type: "application/json".into(),
        ..Record::default()
    }
}

/// Publishes records by one unary call and returns where they are stored.
///
/// # Errors
/// If one of them is not stored.
pub async fn publish(sidecar: &Sidecar, topic: &str, records: Vec<Record>) -> Result<Vec<v1::Position>> {
    let count = records.len();
    let request = PublishRequest { topic: topic.to_owned(), records };
    let response = sidecar.mesh().await?.publish(request).await?.into_inner();
    ensure!(response.results.len() == count, "{} results for {count} records", response.results.len());
    let mut positions = Vec::with_capacity(count);
    for result in response.results {
        match result.result {
            Some(publish_result::Result::Position(position)) => positions.push(position),
            other => bail!("not stored: {other:?}"),
        }
    }
    Ok(positions)
}
