//! Who may use the listeners: tokens, roles, TLS and clients' certificates.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_proto::v1::{PublishRequest, Record};
use mesh_tests::{
    broker::Broker,
    certificates::Authority,
    process::run,
    sidecar::{Sidecar, binaries, mesh_client},
    stage::Stage,
};
use serde_json::Value;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

const MINUTE: Duration = Duration::from_secs(60);

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is text")
}

/// The audit record: the lines of the log with that target.
fn audit(sidecar: &Sidecar) -> Vec<Value> {
    let lines = sidecar.log_text();
    lines.lines().filter_map(|line| serde_json::from_str(line).ok()).filter(|line: &Value| line["target"] == "audit").collect()
}

fn has(audit: &[Value], who: &str, asked: &str, message: &str) -> bool {
    audit.iter().any(|line| line["who"] == who && line["asked"] == asked && line["message"] == message)
}

/// What the audit record says of tables that were applied: by whom, as which generation, with which digest.
fn applied(audit: &[Value]) -> Vec<(String, u64, String)> {
    let text = |line: &Value, field: &str| line[field].as_str().unwrap_or_default().to_owned();
    let lines = audit.iter().filter(|line| line["asked"] == "Apply" && line["message"] == "a routing table was applied");
    lines.map(|line| (text(line, "who"), line["generation"].as_u64().unwrap_or_default(), text(line, "digest"))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_allows_to_look_or_to_change() -> Result<()> {
    Stage::run(Broker::Embedded, async |stage| {
        let (write, read) = (stage.file("write", "to-change\n")?, stage.file("read", "to-look\n")?);
        let other = stage.file("other", "nobody's\n")?;
        let tokens = format!("[{{name: deploy, file: {write:?}, role: write}}, {{name: board, file: {read:?}, role: read}}]");
        let sidecar = stage.sidecar("sidecar").env("MESH_CONTROL_TOKENS", &tokens).start().await?;
        let table = stage.file("table.yaml", &stage.table("{ topics: { %t: { partitions: 1 } }, routes: [] }"))?;
        let apply = ["apply", "-f", text(&table)?];
        let with = |file| -> Result<[&str; 2]> { Ok(["--token-file", text(file)?]) };

        let none = sidecar.ctl(&["status"]).await?;
        ensure!(none.status == Some(2) && none.stderr.contains("a token is needed: give --token-file"), "{none:?}");
        let wrong = sidecar.ctl(&[&["status"][..], &with(&other)?].concat()).await?;
        ensure!(wrong.status == Some(2) && wrong.stderr.contains("none of control.tokens"), "{wrong:?}");
        sidecar.ctl(&[&["status"][..], &with(&read)?].concat()).await?.success()?;
        let refused = sidecar.ctl(&[&apply[..], &with(&read)?].concat()).await?;
        ensure!(refused.status == Some(1) && refused.stderr.contains("Apply needs the role write, and board has read"), "{refused:?}");
        // By the environment; a flag goes before it. One that is applied already is not applied again.
        let by_variable = [("MESH_TOKEN_FILE", text(&read)?)];
        sidecar.ctl_env(&["status"], &by_variable).await?.success()?;
        ensure!(sidecar.ctl_env(&apply, &by_variable).await?.ends(1)?.stderr.contains("board has read"));
        let said = sidecar.ctl_env(&[&apply[..], &with(&write)?, &["-o", "json"]].concat(), &by_variable).await?.ends(0)?.json()?;
        sidecar.ctl(&[&apply[..], &with(&write)?].concat()).await?.success()?;
        let audit = audit(&sidecar);
        let digest = said["digest"].as_str().context("a digest")?.to_owned();
        ensure!(digest.starts_with("sha256:") && applied(&audit) == [("deploy".to_owned(), 1, digest)], "{said}\n{audit:#?}");
        ensure!(has(&audit, "deploy", "Apply", "answered") && has(&audit, "board", "Apply", "refused"), "{audit:#?}");
        ensure!(has(&audit, "unknown", "GetStatus", "refused"), "{audit:#?}");
        ensure!(!sidecar.log_text().contains("to-change"), "a token in the log");

        // While one takes the place of another both are valid; the file is read again by itself.
        let new = stage.file("new", "changed\n")?;
        std::fs::write(&write, "changed\nto-change\n")?;
        let old = stage.file("old", "to-change\n")?;
        let until = tokio::time::Instant::now() + MINUTE;
        while sidecar.ctl(&[&["status"][..], &with(&new)?].concat()).await?.status != Some(0) {
            ensure!(tokio::time::Instant::now() < until, "a token that was added is not taken");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        sidecar.ctl(&[&["status"][..], &with(&old)?].concat()).await?.success()?;

        let mut drain = Command::new(binaries().await?.join("mesh-sidecar"));
        drain.args(["drain", "--admin", &format!("http://{}", sidecar.admin_address())]);
        let refused = run(drain, Vec::new(), MINUTE).await?;
        ensure!(refused.status == Some(1) && refused.stderr.contains("a token is needed"), "{refused:?}");
        let mut drain = Command::new(binaries().await?.join("mesh-sidecar"));
        drain.args(["drain", "--admin", &format!("http://{}", sidecar.admin_address())]).args(with(&new)?);
        run(drain, Vec::new(), MINUTE).await?.success()?;
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listeners_speak_tls_and_ask_for_certificates() -> Result<()> {
    Stage::run(Broker::Embedded, async |stage| {
        let authority = Authority::new(stage.folder())?;
        let (cert, key) = authority.sign("localhost")?;
        let (deploy, board) = (authority.sign("deploy.shop")?, authority.sign("board.shop")?);
        let ca = authority.file();
        let sidecar = stage
            .sidecar("sidecar")
            .env("MESH_LISTEN_TLS_API", &format!("{{cert: {cert:?}, key: {key:?}}}"))
            .env("MESH_LISTEN_TLS_ADMIN", &format!("{{cert: {cert:?}, key: {key:?}, client_ca: {ca:?}}}"))
            .env("MESH_CONTROL_CERTIFICATES", "[{name: deploy.shop, role: write}, {name: board.shop, role: read}]")
            .start()
            .await?;
        let admin = format!("https://localhost:{}", sidecar.admin_address().port());
        let table = stage.file("table.yaml", &stage.table("{ topics: { %t: { partitions: 1 } }, routes: [] }"))?;
        let tls = |identity: Option<&(std::path::PathBuf, std::path::PathBuf)>| -> Result<Vec<String>> {
            let mut arguments = vec!["--admin".to_owned(), admin.clone(), "--ca".to_owned(), text(&ca)?.to_owned()];
            if let Some((cert, key)) = identity {
                arguments.extend(["--client-cert", text(cert)?, "--client-key", text(key)?].map(str::to_owned));
            }
            Ok(arguments)
        };
        let ctl = async |identity: Option<&_>, arguments: &[&str]| {
            let connection = tls(identity)?;
            sidecar.ctl(&[arguments, &connection.iter().map(String::as_str).collect::<Vec<_>>()].concat()).await
        };
        let apply = ["apply", "-f", text(&table)?];
        ctl(Some(&deploy), &apply).await?.success()?;
        let digest = ctl(Some(&board), &["status", "-o", "json"]).await?.ends(0)?.json()?["instances"][0]["digest"].clone();
        let digest = digest.as_str().context("a digest")?.to_owned();
        ensure!(applied(&audit(&sidecar)) == [("deploy.shop".to_owned(), 1, digest)], "{:#?}", audit(&sidecar));
        // By the environment.
        let shown = [("MESH_ADMIN", admin.as_str()), ("MESH_CA", text(&ca)?)];
        let by_variable = [shown[0], shown[1], ("MESH_CLIENT_CERT", text(&board.0)?), ("MESH_CLIENT_KEY", text(&board.1)?)];
        sidecar.ctl_env(&["status"], &by_variable).await?.success()?;
        ensure!(sidecar.ctl_env(&apply, &by_variable).await?.ends(1)?.stderr.contains("board.shop has read"));
        sidecar.ctl_env(&["status"], &shown).await?.ends(2)?;
        let half = sidecar.ctl_env(&["status"], &by_variable[..3]).await?.ends(2)?;
        ensure!(half.stderr.contains("--client-key"), "{half:?}");
        let refused = ctl(Some(&board), &apply).await?;
        ensure!(refused.status == Some(1) && refused.stderr.contains("board.shop has read"), "{refused:?}");
        for (what, output, says) in [
            ("no certificate", ctl(None, &["status"]).await?, "maybe it asks for a client's certificate"),
            ("in clear", sidecar.ctl(&["status"]).await?, "maybe it speaks TLS (https://)"),
            ("an unknown authority", sidecar.ctl(&["status", "--admin", &admin]).await?, "no sidecar answers at https://localhost"),
        ] {
            ensure!(output.status == Some(2) && output.stderr.contains(says), "{what}: {output:?}");
        }
        ensure!(has(&audit(&sidecar), "deploy.shop", "Apply", "answered"), "{:#?}", audit(&sidecar));

        // The API: TLS without clients' certificates, HTTP/2 by ALPN.
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(&ca)?));
        let api = format!("https://localhost:{}", sidecar.api_address().port());
        let channel = Endpoint::from_shared(api)?.tls_config(tls)?.connect().await?;
        let record = Record { value: Some(b"{}".to_vec().into()), ..Record::default() };
        let request = PublishRequest { topic: stage.topic("t"), records: vec![record] };
        let answer = mesh_client(channel, "client")?.publish(request).await?.into_inner();
        ensure!(answer.results.len() == 1, "{answer:?}");
        ensure!(sidecar.http().get("/openapi.json").await.is_err(), "the API answers in clear");
        sidecar.finish().await
    })
    .await
}
