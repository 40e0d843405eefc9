//! What listens: one port for all protocols, probes, the API's own description, who may do what.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use http::Method;
use mesh_tests::{
    broker::Broker,
    http::Http,
    mesh::{json_record, publish},
    process::run,
    python::python,
    service::{Scenario, Service},
    sidecar::{Sidecar, binaries},
    stage::Stage,
};
use serde_json::{Value, json};
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

const MINUTE: Duration = Duration::from_secs(60);

async fn embedded<F: Future<Output = Result<()>>>(body: impl FnOnce(Stage) -> F) -> Result<()> {
    Stage::run(Broker::Embedded, body).await
}

#[tokio::test]
async fn openapi_json_validates_and_names_every_path() -> Result<()> {
    let Some(python) = python().await? else { return Ok(()) };
    embedded(async |stage| {
        let sidecar = stage.sidecar("sidecar").start().await?;
        let document = sidecar.http().get("/openapi.json").await?.expect(200)?;
        let said = python.run("openapi_check.py", &[], document.body.to_vec(), MINUTE).await?.success()?;
        for path in ["/v1/topics/{topic}/records", "/v1/routes/{route}/records", "/v1/routes/{route}/outcomes"] {
            ensure!(said.contains(path), "{path} is missing: {said}");
        }
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn one_port_serves_http_1_http_2_and_grpc_with_health_and_reflection() -> Result<()> {
    embedded(async |stage| {
        let sidecar = stage.sidecar("sidecar").start().await?;
        let topic = stage.topic("t");
        let path = format!("/v1/topics/{topic}/records");
        sidecar.http().post(&path, &[("mesh-key", "a")], "over HTTP/1.1").await?.expect(200)?;
        sidecar.client().send_h2c(Method::POST, &path, &[("mesh-key", "a")], "over h2c".into()).await?.expect(200)?;
        publish(sidecar.mesh().await?, &topic, vec![json_record("a", &json!("over gRPC"))]).await?;
        let found = stage.read(&sidecar, None, &topic, 3).await?;
        let texts: Vec<String> = found.iter().map(mesh_tests::mesh::Found::text).collect();
        ensure!(texts == ["over HTTP/1.1", "over h2c", "\"over gRPC\""], "{texts:?}");

        let unknown = sidecar.http().get("/v1/nothing").await?;
        unknown.problem(404, "unknown-path")?;
        let method = sidecar.http().send(Method::DELETE, &path, &[], bytes::Bytes::new()).await?;
        ensure!(method.status == 405, "{}", method.status);

        let channel = Endpoint::from_shared(format!("http://{}", sidecar.api_address()))?.connect().await?;
        let mut health = HealthClient::new(channel.clone());
        for service in ["", "mesh.v1.Mesh"] {
            let answer = health.check(HealthCheckRequest { service: service.into() }).await?.into_inner();
            ensure!(answer.status() == ServingStatus::Serving, "{service:?}: {answer:?}");
        }
        ensure!(reflects(channel).await?.contains(&"mesh.v1.Mesh".to_owned()));
        let admin = Endpoint::from_shared(format!("http://{}", sidecar.admin_address()))?.connect().await?;
        ensure!(reflects(admin).await?.contains(&"mesh.v1.Control".to_owned()));
        sidecar.finish().await
    })
    .await
}

async fn reflects(channel: tonic::transport::Channel) -> Result<Vec<String>> {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
        server_reflection_response::MessageResponse,
    };
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(MessageRequest::ListServices(String::new())) };
    let mut answers = ServerReflectionClient::new(channel).server_reflection_info(tokio_stream::once(request)).await?.into_inner();
    match answers.message().await?.context("an answer")?.message_response {
        Some(MessageResponse::ListServicesResponse(list)) => Ok(list.service.into_iter().map(|service| service.name).collect()),
        other => anyhow::bail!("{other:?}"),
    }
}

#[tokio::test]
async fn grpc_errors_have_the_status_that_http_has() -> Result<()> {
    embedded(async |stage| {
        let sidecar = stage.sidecar("sidecar").start().await?;
        let refused = |topic: &str| {
            let request = mesh_proto::v1::PublishRequest { topic: topic.to_owned(), records: vec![json_record("a", &json!(1))] };
            let sidecar = &sidecar;
            async move { anyhow::Ok(sidecar.mesh().await?.publish(request).await.err().map(|status| status.code())) }
        };
        ensure!(refused("a/b").await? == Some(Code::InvalidArgument));
        ensure!(refused("__mesh.control").await? == Some(Code::PermissionDenied));
        ensure!(refused("void").await? == Some(Code::InvalidArgument));
        ensure!(refused(&stage.topic("fine")).await?.is_none());
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn the_probe_port_serves_probes_and_metrics_and_nothing_else() -> Result<()> {
    embedded(async |stage| {
        let service = Service::native(Scenario::new()).await?;
        let sidecar = stage.sidecar("sidecar").service("work", &service).start().await?;
        sidecar.apply("routes: [{ name: work, service: work, from: [%in], handler: /work, to: void }]").await?;
        sidecar.publish(&stage.topic("in"), None, "text/plain", "x").await?;
        service.wait(1, MINUTE).await?;
        for path in ["/livez", "/readyz", "/startupz"] {
            sidecar.probes().get(path).await?.expect(200)?;
        }
        for path in ["/", "/v1/topics/t/records", "/openapi.json", "/metrics/x", "/debug"] {
            sidecar.probes().get(path).await?.expect(404)?;
        }
        let metrics = sidecar.probes().get("/metrics").await?.expect(200)?;
        let kind = metrics.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        ensure!(kind.contains("openmetrics") || kind.starts_with("text/plain"), "{kind}");
        let text = metrics.text();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let value = line.rsplit(' ').next().unwrap_or_default();
            ensure!(value.parse::<f64>().is_ok(), "no sample: {line}");
        }
        ensure!(text.contains("work"), "no metric of the route:\n{text}");
        // gRPC of the other listeners is not here.
        let answer = sidecar.probes().post("/mesh.v1.Control/GetStatus", &[("content-type", "application/grpc")], "").await?;
        ensure!(answer.status == 404 || answer.status == 405, "{}", answer.status);
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn callers_name_themselves_show_their_token_and_keep_to_their_topics() -> Result<()> {
    embedded(async |stage| {
        let token = stage.file("token", "secret-token\n")?;
        let sidecar = stage
            .sidecar("sidecar")
            .service_config(json!({ "name": "open" }))
            .service_config(json!({ "name": "closed", "publish": [stage.topic("mine")], "subscribe": [], "token_file": token }))
            .start()
            .await?;
        let post = async |headers: &[(&str, &str)], topic: &str| {
            Http::new(sidecar.api_address()).post(&format!("/v1/topics/{}/records", stage.topic(topic)), headers, "x").await
        };
        post(&[("mesh-service", "open")], "any").await?.expect(200)?;
        post(&[], "any").await?.problem(400, "unnamed-service")?;
        post(&[("mesh-service", "nobody")], "any").await?.problem(400, "unknown-service")?;
        post(&[("mesh-service", "closed")], "mine").await?.problem(401, "unauthenticated")?;
        let wrong = [("mesh-service", "closed"), ("authorization", "Bearer wrong")];
        post(&wrong, "mine").await?.problem(401, "unauthenticated")?;
        let right = [("mesh-service", "closed"), ("authorization", "Bearer secret-token")];
        post(&right, "mine").await?.expect(200)?;
        post(&right, "theirs").await?.problem(403, "forbidden-topic")?;
        let shown = sidecar.log_text();
        ensure!(!shown.contains("secret-token"), "the token is in the log");
        sidecar.finish().await
    })
    .await
}

#[tokio::test]
async fn ndjson_and_a_batch_publish_in_order_and_can_be_read_back() -> Result<()> {
    embedded(async |stage| {
        let sidecar = stage.sidecar("sidecar").start().await?;
        let path = format!("/v1/topics/{}/records", stage.topic("t"));
        let record = |number: u32| json!({ "key": "same", "value": { "json": { "n": number } } });
        let lines: String = (0..50).map(|number| format!("{}\n", record(number))).collect();
        sidecar.http().post(&path, &[("content-type", "application/x-ndjson")], lines).await?.expect(200)?;
        let batch = json!({ "records": (50..100).map(record).collect::<Vec<Value>>() });
        let kind = [("content-type", "application/vnd.mesh.records+json")];
        let answer = sidecar.http().post(&path, &kind, batch.to_string()).await?.expect(200)?.json()?;
        ensure!(answer["results"].as_array().is_some_and(|results| results.len() == 50), "{answer}");
        let found = stage.read(&sidecar, None, &stage.topic("t"), 100).await?;
        let numbers: Vec<i64> = found.iter().filter_map(|found| found.json()["n"].as_i64()).collect();
        ensure!(numbers == (0..100).collect::<Vec<i64>>(), "{numbers:?}");
        sidecar.finish().await
    })
    .await
}

async fn sidecar_command(sidecar: &Sidecar, arguments: &[&str]) -> Result<mesh_tests::process::Output> {
    let mut command = Command::new(binaries().await?.join("mesh-sidecar"));
    command.args(arguments).arg("--config").arg(sidecar.config_file());
    run(command, Vec::new(), MINUTE).await
}

#[tokio::test]
async fn config_check_print_and_healthcheck_tell_by_their_exit_codes() -> Result<()> {
    embedded(async |stage| {
        let sidecar = stage.sidecar("sidecar").prepare().await?;
        sidecar_command(&sidecar, &["config", "check"]).await?.success()?;
        let shown = sidecar_command(&sidecar, &["config", "print"]).await?.success()?;
        ensure!(shown.contains(stage.mesh()) && shown.contains(&sidecar.api_address().to_string()), "{shown}");
        ensure!(sidecar_command(&sidecar, &["healthcheck"]).await?.status != Some(0), "nothing runs yet");

        let mut sidecar = sidecar;
        sidecar.start().await?;
        sidecar_command(&sidecar, &["healthcheck"]).await?.success()?;
        sidecar.finish().await?;

        // All faults at once; a listener that others can reach wants TLS or a token.
        let bad = stage.file("bad.yaml", "{ apiVersion: mesh/v1, kind: Sidecar, mesh: m, services: [{ name: a, app: 'ftp://x' }], colour: red, listen: { api: '0.0.0.0:0' } }")?;
        let mut command = Command::new(binaries().await?.join("mesh-sidecar"));
        command.args(["config", "check", "--config"]).arg(&bad);
        let said = run(command, Vec::new(), MINUTE).await?;
        let text = format!("{}{}", said.stdout, said.stderr);
        ensure!(said.status != Some(0), "{text}");
        for part in ["colour", "ftp", "0.0.0.0", "broker"] {
            ensure!(text.contains(part), "`{part}` is not named:\n{text}");
        }

        // What librdkafka would refuse at the start is refused here already.
        for (key, value) in [("acks", "1"), ("no.such.key", "1"), ("fetch.wait.max.ms", "soon"), ("group.id", "mine")] {
            let text = format!(
                "{{ apiVersion: mesh/v1, kind: Sidecar, mesh: m, services: [{{ name: a }}], broker: {{ kafka: {{ bootstrap.servers: 'x:1', {key}: '{value}' }} }} }}"
            );
            let bad = stage.file("kafka.yaml", &text)?;
            let mut command = Command::new(binaries().await?.join("mesh-sidecar"));
            command.args(["config", "check", "--config"]).arg(&bad);
            let said = run(command, Vec::new(), MINUTE).await?;
            ensure!(said.status == Some(2) && said.stderr.contains(key), "{key}: {said:?}");
        }

        // So are files that are not there, and brokers that are not named.
        for (fields, named) in [
            ("services: [{ name: a, token_file: /no/token }], broker: { embedded: { path: x } }", "/no/token"),
            ("services: [{ name: a }], broker: { embedded: { path: x } }, table: { file: /no/table.yaml }", "/no/table.yaml"),
            ("services: [{ name: a }], broker: { kafka: { bootstrap.servers: '' } }", "bootstrap.servers"),
        ] {
            let bad = stage.file("files.yaml", &format!("{{ apiVersion: mesh/v1, kind: Sidecar, mesh: m, {fields} }}"))?;
            let mut command = Command::new(binaries().await?.join("mesh-sidecar"));
            command.args(["config", "check", "--config"]).arg(&bad);
            let said = run(command, Vec::new(), MINUTE).await?;
            ensure!(said.status == Some(2) && said.stderr.contains(named), "{named}: {said:?}");
        }
        Ok(())
    })
    .await
}

/// The first thing that anybody tries.
#[tokio::test]
async fn the_demo_runs_once_and_ends_with_0() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(binaries().await?.join("mesh-sidecar"));
    command.args(["demo", "--once"]).current_dir(folder.path());
    let said = run(command, Vec::new(), MINUTE).await?.success()?;
    ensure!(!said.is_empty());
    Ok(())
}
