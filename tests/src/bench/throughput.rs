//! Throughput: backlogs that are pushed, and publishing.

use std::path::Path;

use anyhow::Result;

use super::{
    ground::{Bench, Count, Filling, ROUTE, SERVICE, flow},
    kafka,
    measure::{Measured, Watch},
    role,
    rows::{Kind, Row},
};
use crate::{certificates::Authority, process::Process, stage::Stage};

/// Deliveries that are out at once: HTTP, and gRPC, whose messages carry up to 32.
const CONCURRENCY: [u32; 2] = [64, 1024];
const CONNECTIONS: usize = 64;
/// Requests under way on a publish stream, and records in each.
const WINDOW: usize = 64;
const BATCH: u64 = 64;

impl Bench {
    pub(super) async fn push(&self, row: &mut Row) -> Result<()> {
        let stage = Stage::new(self.broker.clone())?;
        let (source, records) = (stage.topic("source"), self.effort.records);
        self.fill(&stage, &source, Filling::of(records)).await?;
        for round in 0..self.effort.rounds {
            let http = row.kind == Kind::PushHttp;
            let role: &[&str] = if http { &["service-http", "echo"] } else { &["service-grpc"] };
            let (service, port) = role::serve(stage.folder(), role).await?;
            let watch = Watch::default().with("service", service.id());
            let (name, run) = if http {
                let arguments = ["load-hop", &format!("127.0.0.1:{port}"), &CONNECTIONS.to_string()];
                ("bare HTTP hop", role::measure(&arguments, self.effort.warmup, self.effort.seconds, &watch).await?)
            } else {
                let arguments = ["load-handle", &format!("http://127.0.0.1:{port}"), "32", "32"];
                ("bare tonic stream", role::measure(&arguments, self.effort.warmup, self.effort.seconds, &watch).await?)
            };
            row.floor(name, run);
            if let Some((handle, topics)) = &self.kafka {
                let target = stage.topic(&format!("pipe{round}"));
                topics.create(&target, kafka::PARTITIONS).await?;
                let (pipe, _) = role::serve(stage.folder(), &["pipe", handle.bootstrap(), &source, &target]).await?;
                let count = Count::Topic(topics.clone(), target.clone(), kafka::PARTITIONS);
                row.floor("consume → produce", flow(count, records, self.watch().with("load", pipe.id())).await?);
                drop(pipe);
                topics.delete(&[&target]).await?;
            }
            row.mesh.push(self.push_round(row.kind, &stage, round, (service, port)).await?);
        }
        self.delete(&[&source]).await
    }

    /// Both guarantees in turn, on one backlog.
    pub(super) async fn once(&self, row: &mut Row) -> Result<()> {
        let stage = Stage::new(self.broker.clone())?;
        let source = stage.topic("source");
        self.fill(&stage, &source, Filling::of(self.effort.records)).await?;
        let (http, plain) = match row.kind {
            Kind::OnceHttp => (true, Kind::PushHttp),
            _ => (false, Kind::PushStream),
        };
        let role: &[&str] = if http { &["service-http", "echo"] } else { &["service-grpc"] };
        for round in 0..self.effort.rounds {
            let measured = self.push_round(plain, &stage, 2 * round, role::serve(stage.folder(), role).await?).await?;
            row.floor("at_least_once", measured);
            row.mesh.push(self.push_round(row.kind, &stage, 2 * round + 1, role::serve(stage.folder(), role).await?).await?);
        }
        self.delete(&[&source]).await
    }

    pub(super) async fn push_round(&self, kind: Kind, stage: &Stage, round: usize, (service, port): (Process, u16)) -> Result<Measured> {
        let name = format!("target{round}");
        let target = stage.topic(&name);
        self.create(&target).await?;
        let builder = self.sidecar(stage, &format!("sidecar{round}"));
        let (builder, deliver, concurrency) = match kind {
            Kind::PushHttp | Kind::OnceHttp => (builder.app(SERVICE, &format!("http://127.0.0.1:{port}")), "push", CONCURRENCY[0]),
            Kind::PushStream | Kind::OnceStream => (builder.app(SERVICE, &format!("grpc://127.0.0.1:{port}")), "push", CONCURRENCY[1]),
            _ => (builder.client(SERVICE), "stream", CONCURRENCY[1]),
        };
        let once = matches!(kind, Kind::OnceHttp | Kind::OnceStream);
        let guarantee = if once { "exactly_once" } else { "at_least_once" };
        let handler = if deliver == "push" { "  handler: /push\n" } else { "" };
        let table = format!(
            "topics: {{ {target}: {{ partitions: 4 }} }}\nroutes:\n- name: {ROUTE}\n  service: {SERVICE}\n  from: [%source]\n  deliver: {deliver}\n{handler}  to: [{target}]\n  group: {target}\n  concurrency: {concurrency}\n  guarantee: {guarantee}\n"
        );
        let mut sidecar = builder.pinned(&table).start().await?;
        let watch = self.watch().with("sidecar", sidecar.process()?.id());
        let (watch, _subscriber) = if kind == Kind::Subscribe {
            let url = format!("http://{}", sidecar.api_address());
            let (subscriber, _) = role::serve(stage.folder(), &["subscriber", &url, ROUTE, &concurrency.to_string()]).await?;
            (watch.with("service", subscriber.id()), Some(subscriber))
        } else {
            (watch.with("service", service.id()), None)
        };
        let count = match &self.kafka {
            // The markers of transactions have offsets too.
            Some((_, topics)) if !once => Count::Topic(topics.clone(), target.clone(), kafka::PARTITIONS),
            _ => Count::Forwarded(&sidecar),
        };
        let measured = flow(count, self.effort.records, watch).await?;
        sidecar.finish().await?;
        self.delete(&[&target]).await?;
        Ok(measured)
    }

    pub(super) async fn publish(&self, row: &mut Row) -> Result<()> {
        let stage = Stage::new(self.broker.clone())?;
        let (kind, warmup, seconds) = (row.kind, self.effort.warmup, self.effort.seconds);
        for round in 0..self.effort.rounds {
            let topic = stage.topic(&format!("publish{round}"));
            self.create(&topic).await?;
            let role: &[&str] = match kind {
                Kind::PublishHttp => &["service-http", "position", "--threads", "2"],
                _ => &["service-grpc", "--threads", "2"],
            };
            let librdkafka = kind == Kind::PublishStream && self.kafka.is_some();
            if !librdkafka {
                let (floor, port) = role::serve(stage.folder(), role).await?;
                let watch = Watch::default().with("service", floor.id());
                let arguments = publish_arguments(kind, &format!("127.0.0.1:{port}"), &topic, None);
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                let name = match kind {
                    Kind::PublishHttp => "bare hyper server",
                    Kind::PublishUnary => "bare tonic unary",
                    _ => "bare tonic stream",
                };
                row.floor(name, role::measure(&arguments, warmup, seconds, &watch).await?);
            }
            if let (true, Some((handle, _))) = (librdkafka, &self.kafka) {
                let arguments = ["produce", handle.bootstrap(), &topic];
                row.floor("librdkafka alone", role::measure(&arguments, warmup, seconds, &self.watch()).await?);
            }
            row.mesh.push(self.publish_round(kind, &stage, &format!("round{round}"), None).await?);
            self.delete(&[&topic]).await?;
        }
        Ok(())
    }
    /// Publishes to a sidecar of its own; over TLS with an authority.
    pub(super) async fn publish_round(&self, kind: Kind, stage: &Stage, name: &str, authority: Option<&Authority>) -> Result<Measured> {
        let topic = stage.topic(name);
        self.create(&topic).await?;
        let table = format!("topics: {{ {topic}: {{ partitions: 4 }} }}\nroutes: []\n");
        let mut builder = self.sidecar(stage, name).client("client").pinned(&table);
        if let Some(authority) = authority {
            let (cert, key) = authority.sign("localhost")?;
            builder = builder.env("MESH_LISTEN_TLS_API", &format!("{{ cert: {cert:?}, key: {key:?} }}"));
        }
        let mut sidecar = builder.start().await?;
        let watch = self.watch().with("sidecar", sidecar.process()?.id());
        let ca = authority.map(Authority::file);
        let arguments = publish_arguments(kind, &sidecar.api_address().to_string(), &topic, ca.as_deref());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let measured = role::measure(&arguments, self.effort.warmup, self.effort.seconds, &watch).await?;
        sidecar.finish().await?;
        self.delete(&[&topic]).await?;
        Ok(measured)
    }
}

/// What the load of a row is told.
fn publish_arguments(kind: Kind, address: &str, topic: &str, ca: Option<&Path>) -> Vec<String> {
    let (url, path) = (format!("http://{address}"), format!("/v1/topics/{topic}/records"));
    let mut arguments: Vec<String> = match kind {
        Kind::PublishHttp => vec!["load-http".to_owned(), address.to_owned(), path, CONNECTIONS.to_string()],
        Kind::PublishUnary => vec!["load-unary".to_owned(), url, topic.to_owned(), CONNECTIONS.to_string()],
        _ => vec!["load-stream".to_owned(), url, topic.to_owned(), WINDOW.to_string(), BATCH.to_string()],
    };
    arguments.extend(ca.map(|file| format!("--ca={}", file.display())));
    arguments
}
