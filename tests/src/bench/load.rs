//! The load: each generator a process of its own, leaner than what it loads, with as many requests under way as it is told.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use mesh_proto::v1::{
    self, handler_client::HandlerClient, mesh_client::MeshClient, outcome, publish_result, subscribe_request, subscribe_response,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    },
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use super::{
    ground::Filling,
    measure::{Measured, Watch},
    service,
};

/// How many keys there are.
pub const KEYS: u64 = 1_000;

/// The key of a record.
pub fn key(number: u64, keys: u64) -> String {
    format!("k{:03}", number % keys)
}

/// How long a load runs before it is measured, and how long it is measured.
#[derive(Clone, Debug)]
pub struct Span {
    /// Not measured.
    pub warmup: Duration,
    /// Measured.
    pub time: Duration,
    /// Whose processor time.
    pub watch: Watch,
}

/// What the tasks of a load share.
#[derive(Debug, Default)]
struct Shared {
    done: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn count(&self, records: u64) {
        self.done.fetch_add(records, Ordering::Relaxed);
    }
}

/// Lets tasks work, and measures.
async fn measure(span: Span, shared: Arc<Shared>, mut tasks: JoinSet<Result<()>>) -> Result<Measured> {
    let measuring = async {
        tokio::time::sleep(span.warmup).await;
        let running = span.watch.begin(shared.done.load(Ordering::Relaxed))?;
        tokio::time::sleep(span.time).await;
        let measured = running.end(shared.done.load(Ordering::Relaxed));
        shared.stop.store(true, Ordering::Relaxed);
        measured
    };
    let measured = tokio::select! {
        measured = measuring => measured?,
        Some(ended) = tasks.join_next() => {
            ended??;
            bail!("the load ended before it was measured");
        }
    };
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(measured)
}

/// `POST`s over HTTP/1.1 with keep-alive, one request at a time on each connection, written by hand.
///
/// # Errors
/// If one is not answered with 200.
pub async fn http(address: SocketAddr, path: String, connections: usize, ca: Option<PathBuf>, span: Span) -> Result<Measured> {
    let tls = ca.as_deref().map(tls).transpose()?;
    let shared = Arc::new(Shared::default());
    let mut tasks = JoinSet::new();
    for connection in 0..connections {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        match &tls {
            None => tasks.spawn(posts(stream, path.clone(), connection as u64, shared.clone())),
            Some(tls) => {
                let stream = tls.connect(ServerName::try_from("localhost")?, stream).await?;
                tasks.spawn(posts(stream, path.clone(), connection as u64, shared.clone()))
            }
        };
    }
    measure(span, shared, tasks).await
}

/// TLS with this authority.
fn tls(ca: &Path) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca)?)?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()?;
    Ok(TlsConnector::from(Arc::new(config.with_root_certificates(roots).with_no_client_auth())))
}

async fn posts(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: String, mut number: u64, shared: Arc<Shared>) -> Result<()> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\nmesh-key: k",
        service::VALUE
    );
    let key = head.len();
    let mut request = head.into_bytes();
    request.extend_from_slice(b"000\r\n\r\n");
    request.extend_from_slice(&service::value());
    let mut buffer = vec![0; 16 * 1024];
    while shared.goes_on() {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let digits = (number >> 33) % KEYS;
        for (place, power) in [(0, 100), (1, 10), (2, 1)] {
            request[key + place] = b'0' + (digits / power % 10) as u8;
        }
        stream.write_all(&request).await?;
        read_answer(&mut stream, &mut buffer).await?;
        shared.count(1);
    }
    Ok(())
}

/// Reads one answer with a `content-length`, and checks that it is a 200.
async fn read_answer(stream: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    loop {
        let read = stream.read(&mut buffer[filled..]).await?;
        ensure!(read > 0, "the connection was closed");
        filled += read;
        let Some(end) = buffer[..filled].windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = std::str::from_utf8(&buffer[..end])?;
        ensure!(head.get(9..12) == Some("200"), "not stored: {}", String::from_utf8_lossy(&buffer[..filled]));
        let length = head
            .split("\r\n")
            .find_map(|line| line.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("content-length")))
            .context("content-length")?;
        let mut left = (end + 4 + length.1.trim().parse::<usize>()?).saturating_sub(filled);
        while left > 0 {
            let room = left.min(buffer.len());
            let read = stream.read(&mut buffer[..room]).await?;
            ensure!(read > 0, "the connection was closed");
            left -= read;
        }
        return Ok(());
    }
}

/// The bare HTTP hop: the sidecar's client library, with the headers that a push has, one connection a task.
///
/// # Errors
/// If one is not answered with 200.
pub async fn hop(address: SocketAddr, connections: usize, span: Span) -> Result<Measured> {
    let shared = Arc::new(Shared::default());
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let shared = shared.clone();
        tasks.spawn(async move {
            let calls = async {
                let value = Bytes::from(service::value().to_vec());
                while shared.goes_on() {
                    let request = Request::post("/push")
                        .header(header::HOST, "localhost")
                        .header(header::CONTENT_TYPE, "application/json")
                        .header("mesh-topic", "m0123456789.source")
                        .header("mesh-partition", 1)
                        .header("mesh-offset", 123_456)
                        .header("mesh-timestamp", 1_700_000_000_000_u64)
                        .header("mesh-key", "k123")
                        .header("mesh-route", "bench")
                        .header("mesh-attempt", 1)
                        .header("mesh-hops", 0)
                        .header("mesh-id", "0198c0de-0000-7000-8000-000000000000")
                        .body(Full::new(value.clone()))?;
                    let answer = sender.send_request(request).await?;
                    ensure!(answer.status() == 200, "{}", answer.status());
                    answer.into_body().collect().await?;
                    shared.count(1);
                }
                drop(sender);
                anyhow::Ok(())
            };
            // Driven by the task that calls, as the sidecar does.
            let (called, _) = tokio::join!(calls, connection);
            called
        });
    }
    measure(span, shared, tasks).await
}

fn record(number: u64) -> v1::Record {
    v1::Record {
        key: Some(key(number, KEYS).into()),
        value: Some(Bytes::from_static(&[b'x'; service::VALUE])),
        content_type: "application/json".into(),
        ..v1::Record::default()
    }
}

/// Whether a record was stored.
pub(super) fn stored(result: &v1::PublishResult) -> Result<()> {
    match &result.result {
        Some(publish_result::Result::Position(_)) => Ok(()),
        other => bail!("not stored: {other:?}"),
    }
}

/// A client of the API.
pub(super) async fn mesh(url: String) -> Result<MeshClient<tonic::transport::Channel>> {
    Ok(MeshClient::connect(url).await?.max_decoding_message_size(64 << 20).max_encoding_message_size(usize::MAX))
}

/// `Publish` of one record, so many calls at once, on one connection.
///
/// # Errors
/// If one is not stored.
pub async fn unary(url: String, topic: String, calls: usize, span: Span) -> Result<Measured> {
    let client = mesh(url).await?;
    let shared = Arc::new(Shared::default());
    let mut tasks = JoinSet::new();
    for call in 0..calls as u64 {
        let (mut client, topic, shared) = (client.clone(), topic.clone(), shared.clone());
        tasks.spawn(async move {
            let mut number = call;
            while shared.goes_on() {
                number += 7;
                let request = v1::PublishRequest { topic: topic.clone(), records: vec![record(number)] };
                let answer = client.publish(request).await?.into_inner();
                stored(answer.results.first().context("a result")?)?;
                shared.count(1);
            }
            Ok(())
        });
    }
    measure(span, shared, tasks).await
}

/// `PublishStream`: so many requests of so many records under way on one stream.
///
/// # Errors
/// If one is not stored.
pub async fn publish_stream(
    url: String,
    topic: String,
    (window, batch): (usize, u64),
    ca: Option<PathBuf>,
    span: Span,
) -> Result<Measured> {
    let mut client = match ca {
        None => mesh(url).await?,
        Some(ca) => {
            let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(ca)?)).domain_name("localhost");
            let channel = Endpoint::from_shared(url.replacen("http:", "https:", 1))?.tls_config(tls)?.connect().await?;
            MeshClient::new(channel).max_decoding_message_size(64 << 20).max_encoding_message_size(usize::MAX)
        }
    };
    let shared = Arc::new(Shared::default());
    let mut tasks = JoinSet::new();
    let counted = shared.clone();
    tasks.spawn(async move {
        let (requests, outgoing) = mpsc::channel(window);
        let mut sequence = 0;
        let mut request = || {
            let records = (0..batch).map(|at| record(sequence * batch + at)).collect();
            let topic = if sequence == 0 { topic.clone() } else { String::new() };
            sequence += 1;
            v1::PublishStreamRequest { sequence, topic, records }
        };
        for _ in 0..window {
            requests.try_send(request())?;
        }
        let mut answers = client.publish_stream(ReceiverStream::new(outgoing)).await?.into_inner();
        while counted.goes_on() {
            let answer = answers.message().await?.context("the stream ended")?;
            for result in answer.results {
                result.results.iter().try_for_each(stored)?;
                counted.count(result.results.len() as u64);
                requests.send(request()).await?;
            }
        }
        Ok(())
    });
    measure(span, shared, tasks).await
}

/// The bare `HandleStream`: so many deliveries of so many records under way on one stream.
///
/// # Errors
/// If the stream breaks.
pub async fn handle_stream(url: String, window: usize, batch: u64, span: Span) -> Result<Measured> {
    let mut client = HandlerClient::connect(url).await?.max_decoding_message_size(64 << 20);
    let shared = Arc::new(Shared::default());
    let mut tasks = JoinSet::new();
    let counted = shared.clone();
    tasks.spawn(async move {
        let (deliveries, outgoing) = mpsc::channel(window);
        let delivered = |number: u64| v1::DeliveredRecord {
            delivery_id: number,
            record: Some(v1::Record { mesh_id: "0198c0de-0000-7000-8000-000000000000".into(), ..record(number) }),
            position: Some(v1::Position { topic: "m0123456789.source".into(), partition: 1, offset: 123_456 }),
            attempt: 1,
            ..v1::DeliveredRecord::default()
        };
        let mut number = 0;
        let mut delivery = || {
            let records = (0..batch).map(|at| delivered(number + at)).collect();
            number += batch;
            v1::Delivery { route: "bench".into(), handler: "/push".into(), records }
        };
        for _ in 0..window {
            deliveries.try_send(delivery())?;
        }
        let mut answers = client.handle_stream(ReceiverStream::new(outgoing)).await?.into_inner();
        while counted.goes_on() {
            let answer = answers.message().await?.context("the stream ended")?;
            counted.count(answer.outcomes.len() as u64);
            deliveries.send(delivery()).await?;
        }
        Ok(())
    });
    measure(span, shared, tasks).await
}

/// Subscriptions of a topic without a group, each from its beginning, on a connection of its own; one that had all its records begins again.
///
/// # Errors
/// If a stream breaks.
pub async fn subscribers(url: String, topic: String, count: u64, records: u64, span: Span) -> Result<Measured> {
    let shared = Arc::new(Shared::default());
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let (url, topic, shared) = (url.clone(), topic.clone(), shared.clone());
        tasks.spawn(async move {
            while shared.goes_on() {
                subscription(url.clone(), topic.clone(), records, &shared).await?;
            }
            Ok(())
        });
    }
    measure(span, shared, tasks).await
}

async fn subscription(url: String, topic: String, records: u64, shared: &Shared) -> Result<()> {
    const CREDITS: u32 = 1_024;
    let mut client = mesh(url).await?;
    let (requests, outgoing) = mpsc::channel(1024);
    let request = |request| v1::SubscribeRequest { request: Some(request) };
    let topics = v1::TopicSubscription { topics: vec![topic], group: String::new(), from: "earliest".into(), credits: CREDITS };
    requests.send(request(subscribe_request::Request::Topics(topics))).await?;
    let mut responses = client.subscribe(ReceiverStream::new(outgoing)).await?.into_inner();
    let mut left = records;
    while left > 0 && shared.goes_on() {
        let response = responses.message().await?.context("the stream ended")?;
        if let subscribe_response::Response::Delivery(delivery) = response.response.context("a response")? {
            let came = u32::try_from(delivery.records.len())?;
            let done = |record: v1::DeliveredRecord| v1::Outcome {
                delivery_id: record.delivery_id,
                outcome: Some(outcome::Outcome::Ignore(v1::Ignore::default())),
            };
            let outcomes = v1::Outcomes { outcomes: delivery.records.into_iter().map(done).collect() };
            requests.send(request(subscribe_request::Request::Outcomes(outcomes))).await?;
            requests.send(request(subscribe_request::Request::Credit(v1::Credit { records: came }))).await?;
            shared.count(u64::from(came));
            left = left.saturating_sub(u64::from(came));
        }
    }
    Ok(())
}

/// Fills a topic through a publish stream: record i has the key `i mod keys`, and its number in the first 8 bytes of its value.
///
/// # Errors
/// If a record is not stored.
pub async fn fill(url: String, topic: &str, filling: Filling) -> Result<()> {
    let Filling { first, records, size, keys, .. } = filling;
    // A message stays below the API's bound.
    let batch = ((1 << 20) / size).clamp(1, 200);
    let mut client = mesh(url).await?;
    let (requests, outgoing) = mpsc::channel(16);
    let topic = topic.to_owned();
    // The embedded broker takes no more than it can bring to the disk.
    let under_way = Arc::new(Semaphore::new(16));
    let room = under_way.clone();
    let feeding = tokio::spawn(async move {
        let mut value = vec![b'x'; size];
        let end = first + records;
        for begin in (first..end).step_by(batch) {
            room.acquire().await?.forget();
            let numbered = |number: u64| {
                value[..8].copy_from_slice(&number.to_be_bytes());
                v1::Record { key: Some(key(number, keys).into()), value: Some(Bytes::copy_from_slice(&value)), ..record(number) }
            };
            let records = (begin..end.min(begin + batch as u64)).map(numbered).collect();
            requests.send(v1::PublishStreamRequest { sequence: begin, topic: topic.clone(), records }).await?;
        }
        anyhow::Ok(())
    });
    let mut answers = client.publish_stream(ReceiverStream::new(outgoing)).await?.into_inner();
    let mut done = 0;
    while let Some(answer) = answers.message().await? {
        for result in answer.results {
            result.results.iter().try_for_each(stored)?;
            done += result.results.len() as u64;
            under_way.add_permits(1);
        }
    }
    feeding.await??;
    ensure!(done == records, "{done} of {records} records were stored");
    Ok(())
}
