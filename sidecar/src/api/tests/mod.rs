//! The API over real sockets, on a broker in memory.

use std::{io, net::SocketAddr};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use mesh_proto::v1::{self, mesh_client::MeshClient};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
};
use tonic::transport::Channel;

use super::*;
use crate::{
    broker::{
        Assigned, Event, ProduceErrorKind, StartOffset,
        fake::{Fake, FakeHandle, Mode, config},
    },
    config::Config,
    record::{Batch, Header, Record, TopicPartition},
    table::{ActiveTable, TableWatch},
    telemetry::{
        metrics::Metrics,
        trace::{TraceContext, Tracer},
    },
};

mod desk;
mod follow_http;
mod publish_grpc;
mod publish_http;
mod publish_lines;
mod schema;
mod subscribe_grpc;

struct World {
    fake: Fake,
    address: SocketAddr,
    draining: CancellationToken,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<usize>,
    metrics: Metrics,
}

impl World {
    async fn new() -> Self {
        Self::with(config(&["a"]), Fake::new(&["orders"])).await
    }

    async fn with(config: Config, fake: Fake) -> Self {
        Self::serving(config, fake, Desks::default()).await
    }

    async fn serving(config: Config, fake: Fake, desks: Desks) -> Self {
        Self::in_force(config, fake, desks, None).await
    }

    /// Under a table; publishing is not guarded by it.
    async fn in_force(config: Config, fake: Fake, desks: Desks, table: Option<Arc<ActiveTable>>) -> Self {
        let metrics = Metrics::new();
        let publisher = Publisher::new(Arc::new(fake.clone()), Arc::new(config), Tracer::disabled(), metrics.clone());
        Self::publishing(publisher, fake, desks, metrics, watch::channel(table).1).await
    }

    /// With the table of a sender that it gives back.
    async fn guarded(table: Option<Arc<ActiveTable>>) -> (watch::Sender<Option<Arc<ActiveTable>>>, Self) {
        let (sender, table) = watch::channel(table);
        let (fake, metrics) = (Fake::new(&["orders"]), Metrics::new());
        let publisher =
            Publisher::guarded(Arc::new(fake.clone()), Arc::new(config(&["a"])), Tracer::disabled(), metrics.clone(), table.clone());
        (sender, Self::publishing(publisher, fake, Desks::default(), metrics, table).await)
    }

    async fn publishing(publisher: Publisher, fake: Fake, desks: Desks, metrics: Metrics, table: TableWatch) -> Self {
        let broker: Arc<dyn Broker> = Arc::new(fake.clone());
        let (draining, shutdown) = (CancellationToken::new(), CancellationToken::new());
        let api = Api::new(publisher, broker, desks, table, draining.clone()).unwrap();
        let listener = listen::bind("api", "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(api.serve(listener, shutdown.clone()));
        Self { fake, address, draining, shutdown, serving, metrics }
    }

    async fn client(&self) -> MeshClient<Channel> {
        MeshClient::connect(format!("http://{}", self.address)).await.unwrap()
    }

    /// The consumer that was made last.
    fn consumer(&self) -> FakeHandle {
        self.fake.0.lock().unwrap().consumers.last().unwrap().clone()
    }

    /// Whether a sample of this name, with this among its labels, is above zero.
    fn counts(&self, name: &str, label: &str) -> bool {
        self.metrics.encode().unwrap().lines().any(|line| line.starts_with(name) && line.contains(label) && !line.ends_with(" 0"))
    }

    /// Sends one request on a connection of its own, and answers the head with a body that still streams.
    async fn open(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let driver = tokio::spawn(connection);
        let response = sender.send_request(request).await.unwrap();
        drop(driver);
        response
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        let (parts, body) = self.open(request).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let json = serde_json::from_slice(&body).unwrap_or(serde_json::Value::Null);
        Answer { status: parts.status, headers: parts.headers, body, json }
    }

    async fn post(&self, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Answer {
        let mut request = Request::post(path).header("host", "sidecar");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Full::new(body.into())).unwrap()).await
    }
}

struct Answer {
    status: StatusCode,
    headers: http::HeaderMap,
    body: Bytes,
    json: serde_json::Value,
}

impl Answer {
    /// Checks that it is a problem of this status and code.
    fn problem(&self, status: u16, code: &str) -> &serde_json::Value {
        assert_eq!((self.status.as_u16(), self.json["code"].as_str()), (status, Some(code)), "{:?}", self.body);
        assert_eq!(self.headers["content-type"], "application/problem+json");
        assert_eq!(self.json["status"], status);
        let described: serde_json::Value = serde_json::from_str(include_str!("../openapi.json")).unwrap();
        let codes = described["components"]["schemas"]["Problem"]["properties"]["code"]["enum"].as_array().unwrap();
        assert!(codes.contains(&code.into()), "openapi.json does not describe the code {code}");
        for field in ["type", "title", "detail", "persisted"] {
            assert!(self.json[field].is_string(), "{field}");
        }
        &self.json
    }
}

/// The assignment of partition 0 of `orders`.
fn assigned(position: i64) -> Event {
    Event::Assigned(vec![Assigned { partition: TopicPartition::new("orders", 0), position, metadata: String::new() }])
}

/// Records of it.
fn records(first: i64, values: &[&'static [u8]]) -> Event {
    let records = values.iter().enumerate().map(|(index, value)| {
        let headers = vec![Header::new("mesh-id", format!("id-{}", first + index as i64))];
        (first + index as i64, Record { value: Some(Bytes::from_static(value)), headers, ..Record::default() })
    });
    Event::Records(Batch { partition: TopicPartition::new("orders", 0), records: records.collect() })
}
