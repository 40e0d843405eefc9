//! What one test works with: a broker, a mesh of its own, a folder of its own.

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rdkafka::{
    ClientConfig,
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    broker::Broker,
    mesh::{Found, Reader},
    python::Python,
    service::{Scenario, Service},
    sidecar::{Builder, Sidecar},
};

/// A test's broker, mesh and folder. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Stage {
    broker: Broker,
    mesh: Arc<str>,
    folder: Arc<TempDir>,
}

impl Stage {
    /// A stage with a mesh of a new name. The folder is kept if the test fails and `MESH_KEEP=1`.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn new(broker: Broker) -> Result<Self> {
        let mesh = format!("m{}", &uuid::Uuid::new_v4().simple().to_string()[..10]);
        let mut folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
        folder.disable_cleanup(std::env::var("MESH_KEEP").is_ok_and(|value| value == "1"));
        Ok(Self { broker, mesh: mesh.into(), folder: folder.into() })
    }

    /// Runs a test's body on a new stage; if it fails, shows the ends of the logs that it left.
    ///
    /// # Errors
    /// As the body.
    pub async fn run<F: Future<Output = Result<()>>>(broker: Broker, body: impl FnOnce(Self) -> F) -> Result<()> {
        let stage = Self::new(broker)?;
        let result = body(stage.clone()).await;
        if let Err(error) = &result {
            stage.show_logs();
            eprintln!("FAILED: {error:#}");
        }
        result
    }

    fn show_logs(&self) {
        let Ok(entries) = std::fs::read_dir(self.folder.path()) else { return };
        let logs = entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "log"));
        for path in logs {
            let text = std::fs::read(&path).unwrap_or_default();
            let start = text.len().saturating_sub(8_000);
            eprintln!("--- {} ---\n{}", path.display(), String::from_utf8_lossy(&text[start..]));
        }
    }

    /// The broker.
    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    /// Whether the broker is Kafka.
    pub fn is_kafka(&self) -> bool {
        matches!(self.broker, Broker::Kafka(_))
    }

    /// The mesh's name.
    pub fn mesh(&self) -> &str {
        &self.mesh
    }

    /// The folder of this test.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A topic of this test: tests share a Kafka, so every topic carries the mesh's name.
    pub fn topic(&self, name: &str) -> String {
        format!("{}.{name}", self.mesh)
    }

    /// A routing table of this mesh from the lines under `spec`. `%` stands for the prefix of this test's topics: `from: [%orders]`.
    /// Without `defaults`, every route's dead letters go to the topic `%dlq`.
    pub fn table(&self, spec: &str) -> String {
        let mut spec = spec.replace('%', &format!("{}.", self.mesh));
        if !spec.contains("defaults:") {
            // The default `<route>.dlq` would be shared with every test that has a route of this name.
            let defaults = format!("defaults: {{ dead_letter: {}.dlq }}", self.mesh);
            spec = match spec.trim_start().strip_prefix('{') {
                Some(rest) => format!("{{ {defaults}, {rest}"),
                None => {
                    let first = spec.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
                    format!("{}{defaults}\n{}", &first[..first.len() - first.trim_start().len()], spec.trim_matches('\n'))
                }
            };
        }
        let lines = spec.trim_matches('\n');
        // The lines may be indented as a whole, as the test's source has it.
        let indent = lines.lines().filter(|line| !line.trim().is_empty()).map(|line| line.len() - line.trim_start().len()).min();
        let body: String = lines.lines().map(|line| format!("  {}\n", line.get(indent.unwrap_or(0)..).unwrap_or_default())).collect();
        format!("apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: {} }}\nspec:\n{body}", self.mesh)
    }

    /// A file in this test's folder.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder().join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// A sidecar of this mesh. `name` names its files; on the embedded broker all of a stage share the broker's folder, one at a time.
    pub fn sidecar(&self, name: &str) -> Builder {
        Builder::new(self.clone(), name)
    }

    /// Sidecars that serve these services between them, ready: two on Kafka, one on the embedded broker, which is one process.
    ///
    /// # Errors
    /// If one does not start.
    pub async fn sidecars(&self, services: &[(&str, &Service)]) -> Result<Vec<Sidecar>> {
        let count = if self.is_kafka() { 2.min(services.len()) } else { 1 };
        let mut sidecars = Vec::with_capacity(count);
        for number in 0..count {
            let mut builder = self.sidecar(&format!("sidecar{number}"));
            for (name, service) in services.iter().skip(number).step_by(count) {
                builder = builder.service(name, service);
            }
            let mut sidecar = builder.prepare().await?;
            sidecar.spawn()?;
            sidecars.push(sidecar);
        }
        for sidecar in &mut sidecars {
            sidecar.wait_ready().await?;
        }
        Ok(sidecars)
    }

    /// Runs a command of `kafka_client.py`, if this stage is on Kafka.
    ///
    /// # Errors
    /// If it fails, or this stage is not on Kafka.
    pub async fn kafka_client(&self, python: &Python, topic: &str, arguments: &[&str], input: String) -> Result<String> {
        let bootstrap = self.broker.bootstrap().context("this stage is not on Kafka")?;
        let arguments = [arguments, &["--bootstrap", bootstrap, "--topic", topic]].concat();
        python.run("kafka_client.py", &arguments, input.into_bytes(), Duration::from_secs(300)).await?.success()
    }

    /// A FastAPI service.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn fastapi(&self, python: &Python, scenario: Scenario) -> Result<Service> {
        Service::python(python, "service.py", self.folder(), scenario).await
    }

    /// A Flask service.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn flask(&self, python: &Python, scenario: Scenario) -> Result<Service> {
        Service::python(python, "flask_service.py", self.folder(), scenario).await
    }

    /// Appends a record to the first partition of a topic, past the mesh: of the mesh's own topics, too.
    ///
    /// # Errors
    /// If this stage is not on Kafka, or it is not stored.
    pub async fn append(&self, topic: &str, key: &str, value: Vec<u8>) -> Result<()> {
        let bootstrap = self.broker.bootstrap().context("this stage is not on Kafka")?.to_owned();
        let (topic, key) = (topic.to_owned(), key.to_owned());
        let send = move || {
            let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", bootstrap).create()?;
            let record = BaseRecord::to(&topic).partition(0).key(&key).payload(&value);
            producer.send(record).map_err(|(error, _)| error)?;
            Ok(producer.flush(Duration::from_secs(10))?)
        };
        tokio::task::spawn_blocking(send).await?
    }

    /// All records that a topic has now, read by a client that is not the mesh's own where the broker is Kafka (`python` is required
    /// then), and through the sidecar on the embedded broker, until `expected` came and no further one does for a while.
    ///
    /// # Errors
    /// If fewer than `expected` come.
    pub async fn read(&self, sidecar: &Sidecar, python: Option<&Python>, topic: &str, expected: usize) -> Result<Vec<Found>> {
        self.read_with(sidecar, python, topic, expected, &[]).await
    }

    /// The same, of committed records: those of a transaction that is open or was aborted are not seen. (Through a sidecar they never are.)
    ///
    /// # Errors
    /// If fewer than `expected` come.
    pub async fn read_committed(&self, sidecar: &Sidecar, python: Option<&Python>, topic: &str, expected: usize) -> Result<Vec<Found>> {
        self.read_with(sidecar, python, topic, expected, &["--read-committed"]).await
    }

    async fn read_with(
        &self,
        sidecar: &Sidecar,
        python: Option<&Python>,
        topic: &str,
        expected: usize,
        more: &[&str],
    ) -> Result<Vec<Found>> {
        let (Some(bootstrap), Some(python)) = (self.broker.bootstrap(), python) else {
            let mut reader = Reader::open(sidecar.mesh().await?, topic).await?;
            let mut found = reader.take(expected, Duration::from_secs(60)).await?;
            found.extend(reader.until_quiet(Duration::from_millis(700)).await?);
            return Ok(found);
        };
        let arguments = [&["consume", "--bootstrap", bootstrap, "--topic", topic, "--library", "confluent"], more].concat();
        let output = python.run("kafka_client.py", &arguments, Vec::new(), Duration::from_secs(120)).await?.success()?;
        let found: Vec<Found> = output.lines().map(|line| parse_found(topic, line)).collect::<Result<_>>()?;
        anyhow::ensure!(found.len() >= expected, "{topic} has {} records where {expected} are due", found.len());
        Ok(found)
    }
}

fn parse_found(topic: &str, line: &str) -> Result<Found> {
    let value: Value = serde_json::from_str(line)?;
    let bytes = |value: &Value| value.as_str().map(|text| BASE64_STANDARD.decode(text)).transpose();
    let mut headers = Vec::new();
    for header in value["headers"].as_array().context("headers")? {
        headers.push((header[0].as_str().unwrap_or_default().to_owned(), bytes(&header[1])?.unwrap_or_default()));
    }
    Ok(Found {
        topic: topic.to_owned(),
        partition: i32::try_from(value["partition"].as_i64().context("partition")?)?,
        offset: value["offset"].as_i64().context("offset")?,
        key: bytes(&value["key"])?,
        value: bytes(&value["value"])?,
        headers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_made_of_the_lines_under_spec() {
        let stage = Stage::new(Broker::Embedded).unwrap();
        let mesh = stage.mesh();
        let head = format!("apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: {mesh} }}\nspec:\n");
        let block = stage.table("\n      topics: { %a: {} }\n      routes:\n      - { from: [%a],\n          to: void }\n      ");
        let body = format!(
            "  defaults: {{ dead_letter: {mesh}.dlq }}\n  topics: {{ {mesh}.a: {{}} }}\n  routes:\n  - {{ from: [{mesh}.a],\n      to: void }}\n"
        );
        assert_eq!(block.trim_end(), format!("{head}{body}").trim_end());
        assert_eq!(stage.table("{ routes: [] }"), format!("{head}  {{ defaults: {{ dead_letter: {mesh}.dlq }},  routes: [] }}\n"));
        assert_eq!(stage.table("routes: []"), format!("{head}  defaults: {{ dead_letter: {mesh}.dlq }}\n  routes: []\n"));
        assert_eq!(stage.table("defaults: {}\nroutes: []"), format!("{head}  defaults: {{}}\n  routes: []\n"));
    }
}
