//! The whole hop through the mesh's own API, for the embedded broker, whose topics nobody else can read: what `kafka::hop` and
//! `kafka::capacity` do with librdkafka, by `PublishStream` and `Subscribe`.
//!
//! Invariant: what is due is sent when it is due, whatever came back: the queue towards the stream has room for every record of the run.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use mesh_proto::v1::{self, outcome, subscribe_request, subscribe_response};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::Streaming;

use super::{
    load::{self, KEYS, Span},
    measure::{Latency, Measured, histogram},
    service,
};

/// How long nothing may come back.
const SILENCE: Duration = Duration::from_secs(15);

/// A subscription of a topic from its present end on.
struct Reader {
    requests: mpsc::Sender<v1::SubscribeRequest>,
    responses: Streaming<v1::SubscribeResponse>,
}

impl Reader {
    async fn open(url: &str, topic: &str) -> Result<Self> {
        let mut client = load::mesh(url.to_owned()).await?;
        let (requests, outgoing) = mpsc::channel(1024);
        let topics = v1::TopicSubscription { topics: vec![topic.to_owned()], group: String::new(), from: "latest".into(), credits: 4_096 };
        requests.send(v1::SubscribeRequest { request: Some(subscribe_request::Request::Topics(topics)) }).await?;
        let mut responses = client.subscribe(ReceiverStream::new(outgoing)).await?.into_inner();
        let first = responses.message().await?.and_then(|response| response.response);
        ensure!(matches!(first, Some(subscribe_response::Response::Attached(_))), "not attached: {first:?}");
        Ok(Self { requests, responses })
    }

    /// The numbers that come back next; none if nothing does within a second.
    async fn next(&mut self) -> Result<Vec<u64>> {
        let Ok(response) = tokio::time::timeout(Duration::from_secs(1), self.responses.message()).await else { return Ok(Vec::new()) };
        let Some(subscribe_response::Response::Delivery(delivery)) = response?.context("the stream ended")?.response else {
            return Ok(Vec::new());
        };
        let credit = v1::Credit { records: u32::try_from(delivery.records.len())? };
        let (mut numbers, mut outcomes) = (Vec::new(), Vec::new());
        for delivered in delivery.records {
            let value = delivered.record.and_then(|record| record.value).context("a value")?;
            numbers.push(u64::from_be_bytes(*value.first_chunk::<8>().context("a number")?));
            let ignore = outcome::Outcome::Ignore(v1::Ignore::default());
            outcomes.push(v1::Outcome { delivery_id: delivered.delivery_id, outcome: Some(ignore) });
        }
        let outcomes = subscribe_request::Request::Outcomes(v1::Outcomes { outcomes });
        for request in [outcomes, subscribe_request::Request::Credit(credit)] {
            self.requests.send(v1::SubscribeRequest { request: Some(request) }).await?;
        }
        Ok(numbers)
    }
}

/// A publish stream that is fed with numbers: one record for each.
struct Writer {
    numbers: mpsc::Sender<u64>,
    stored: Arc<AtomicU64>,
    reading: JoinHandle<Result<()>>,
}

impl Writer {
    async fn open(url: &str, topic: &str, room: usize) -> Result<Self> {
        let mut client = load::mesh(url.to_owned()).await?;
        let (numbers, outgoing) = mpsc::channel(room);
        let (topic, mut value) = (topic.to_owned(), service::value().to_vec());
        let requests = ReceiverStream::new(outgoing).map(move |number: u64| {
            value[..8].copy_from_slice(&number.to_be_bytes());
            let record = v1::Record {
                key: Some(load::key(number, KEYS).into()),
                value: Some(Bytes::copy_from_slice(&value)),
                ..v1::Record::default()
            };
            v1::PublishStreamRequest { sequence: number, topic: topic.clone(), records: vec![record] }
        });
        let stored = Arc::new(AtomicU64::new(0));
        let counted = stored.clone();
        let reading = tokio::spawn(async move {
            // The answers begin with the first record.
            let mut answers = client.publish_stream(requests).await?.into_inner();
            while let Some(answer) = answers.message().await? {
                for result in answer.results {
                    result.results.iter().try_for_each(load::stored)?;
                    counted.fetch_add(result.results.len() as u64, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        Ok(Self { numbers, stored, reading })
    }

    /// Waits for the last acknowledgement.
    async fn end(self) -> Result<u64> {
        drop(self.numbers);
        self.reading.await??;
        Ok(self.stored.load(Ordering::Relaxed))
    }
}

/// As `kafka::hop`.
///
/// # Errors
/// If a record is not stored, or does not come back.
pub async fn hop(url: &str, to: &str, from: &str, rate: f64, span: Span) -> Result<Measured> {
    let mut reader = Reader::open(url, from).await?;
    let count = ((span.warmup + span.time).as_secs_f64() * rate).ceil() as u64;
    let skipped = (span.warmup.as_secs_f64() * rate).ceil() as u64;
    let interval = Duration::from_secs_f64(1.0 / rate);
    let writer = Writer::open(url, to, usize::try_from(count)?.max(1)).await?;
    let begin = Instant::now() + Duration::from_millis(500);
    let running = span.watch.begin(0)?;
    let numbers = writer.numbers.clone();
    // Tokio's timer knows milliseconds; a thread that sleeps is due to some 50 µs.
    let sending = thread::spawn(move || {
        for number in 0..count {
            let intended = begin + interval.mul_f64(number as f64);
            while let Some(early) = intended.checked_duration_since(Instant::now()) {
                thread::park_timeout(early);
            }
            numbers.blocking_send(number)?;
        }
        anyhow::Ok(())
    });
    let mut histogram = histogram()?;
    let (mut seen, mut last) = (0, Instant::now());
    while seen < count {
        let numbers = reader.next().await?;
        if numbers.is_empty() {
            ensure!(last.elapsed() < SILENCE, "{} of {count} records did not come back", count - seen);
            continue;
        }
        last = Instant::now();
        seen += numbers.len() as u64;
        for number in numbers.into_iter().filter(|number| *number >= skipped) {
            let intended = begin + interval.mul_f64(number as f64);
            histogram.saturating_record(u64::try_from(last.saturating_duration_since(intended).as_nanos())?);
        }
    }
    let mut measured = running.end(seen)?;
    sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    let stored = writer.end().await?;
    ensure!(stored == count, "{stored} of {count} records were stored");
    measured.latency = Some(Latency::of(&histogram));
    Ok(measured)
}

/// As `kafka::capacity`.
///
/// # Errors
/// If the records do not come back.
pub async fn capacity(url: &str, to: &str, from: &str, window: u64, span: Span) -> Result<Measured> {
    let mut reader = Reader::open(url, from).await?;
    let writer = Writer::open(url, to, usize::try_from(window)?.max(1)).await?;
    let (mut sent, mut seen, mut last) = (0, 0, Instant::now());
    let (begin, mut running) = (Instant::now(), None);
    loop {
        while sent < seen + window {
            writer.numbers.send(sent).await?;
            sent += 1;
        }
        let came = reader.next().await?.len() as u64;
        match came {
            0 => ensure!(last.elapsed() < SILENCE, "{} of {sent} records did not come back", sent - seen),
            _ => (seen, last) = (seen + came, Instant::now()),
        }
        let passed = begin.elapsed();
        match running.take() {
            None if passed >= span.warmup => running = Some(span.watch.clone().begin(seen)?),
            Some(running) if passed >= span.warmup + span.time => return running.end(seen),
            other => running = other,
        }
    }
}
