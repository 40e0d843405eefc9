//! The binary against real control planes: two instances over one embedded broker.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test panics on purpose")]

use std::{collections::BTreeMap, net::SocketAddr, path::Path, process::Output, sync::Arc, time::Duration};

use mesh_sidecar::{
    api::admin::{self, AdminService},
    broker::{
        Broker,
        embedded::{EmbeddedBroker, EmbeddedConfig},
    },
    command,
    config::{BrokerConfig, Config, ControlConfig, Limits, Listen, ListenTls, LogFormat, ServiceConfig, TelemetryConfig},
    control::{Control, ControlHandle},
    status::{Board, RouteState, RouteStatus},
};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

fn table(to: &str) -> String {
    format!(
        "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: shop }}\nspec:\n  topics: {{ orders: {{ partitions: 3 }} }}\n  routes:\n  \
         - {{ name: price, service: pricing, from: [orders], handler: /price, to: [{to}] }}\n"
    )
}

struct Instance {
    handle: ControlHandle,
    board: Board,
    admin: SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

impl Instance {
    async fn start(broker: &Arc<EmbeddedBroker>, name: &str, folder: &Path, pinned: Option<&Path>) -> Self {
        let address = ([127, 0, 0, 1], 0).into();
        let config = Config {
            mesh: "shop".into(),
            services: vec![ServiceConfig { name: "pricing".into(), app: None, publish: None, subscribe: None, token_file: None }],
            instance: Some(name.to_owned()),
            labels: BTreeMap::new(),
            state: folder.join(name),
            broker: BrokerConfig::Embedded { path: folder.to_owned() },
            table: pinned.map(Path::to_owned),
            listen: Listen { api: address, admin: address, probe: address },
            tls: ListenTls::default(),
            control: ControlConfig::default(),
            telemetry: TelemetryConfig { otlp: None, log: String::new(), log_format: LogFormat::Json },
            limits: Limits {
                record_bytes: 1 << 20,
                publish_timeout: Duration::from_secs(5),
                drain_timeout: Duration::from_secs(5),
                buffer_bytes: 1 << 20,
            },
        };
        let board = Board::default();
        let (commands, _) = command::channel();
        let handle = Control::start(broker.clone(), Arc::new(config), board.clone(), commands, CancellationToken::new()).await.unwrap();
        let service = AdminService::new(handle.control().clone());
        let router = admin::router(service).await.unwrap();
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let admin = listener.local_addr().unwrap();
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        handle.ready().wait_for(|ready| *ready).await.unwrap();
        Self { handle, board, admin, server }
    }

    async fn stop(self) {
        self.handle.close().await;
        self.server.abort();
    }

    /// Runs `mesh-ctl` against this instance.
    async fn ctl(&self, folder: &Path, arguments: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-ctl"));
        command.arg("--admin").arg(self.admin.to_string()).args(arguments).current_dir(folder).kill_on_drop(true);
        let Output { status, stdout, stderr } = command.output().await.unwrap();
        (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
    }
}

#[tokio::test]
async fn a_day_in_the_life_of_a_mesh() {
    let data = tempfile::tempdir().unwrap();
    let folder = data.path();
    std::fs::write(folder.join("one.yaml"), table("priced")).unwrap();
    std::fs::write(folder.join("two.yaml"), table("priced, audited")).unwrap();
    std::fs::write(folder.join("bad.yaml"), table("__own").replace("service:", "servise:")).unwrap();
    let broker = EmbeddedBroker::open(EmbeddedConfig::new(folder.join("broker"))).unwrap();
    let a = Instance::start(&broker, "a", folder, None).await;
    let b = Instance::start(&broker, "b", folder, None).await;

    let (code, _, err) = a.ctl(folder, &["get"]).await;
    assert!(code == 2 && err.contains("mesh-ctl apply -f"), "{code} {err}");
    let (code, out, err) = a.ctl(folder, &["apply", "-f", "one.yaml", "--wait"]).await;
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("+ topic price.dlq is created with 3 partitions") && out.contains("applied generation 1 (sha256:"), "{out}");
    assert!(err.contains("2 instances run generation 1"), "{err}");

    // Through the other one: the same table, then another one.
    let (code, out, _) = b.ctl(folder, &["diff", "-f", "one.yaml"]).await;
    assert_eq!((code, &*out), (0, ""));
    let (code, out, _) = b.ctl(folder, &["diff", "-f", "two.yaml"]).await;
    assert!(code == 1 && out.contains("routes.price.to"), "{code} {out}");
    let (code, _, err) = b.ctl(folder, &["apply", "-f", "two.yaml", "--expect-generation", "9"]).await;
    assert!(code == 3 && err.contains("generation 9 is expected") && err.contains("generation 1 is"), "{code} {err}");
    let (code, out, err) = b.ctl(folder, &["apply", "-f", "two.yaml", "--expect-generation", "1", "--wait"]).await;
    assert!(code == 0 && out.contains("applied generation 2"), "{code} {out}{err}");
    let (code, _, err) = b.ctl(folder, &["apply", "-f", "bad.yaml"]).await;
    assert!(code == 1 && err.contains("bad.yaml:7:") && err.contains("the last good table stays in force"), "{code} {err}");

    // What `get` prints can be applied again.
    let (code, out, _) = a.ctl(folder, &["get"]).await;
    assert!(code == 0 && out.starts_with("# generation 2, applied "), "{out}");
    std::fs::write(folder.join("got.yaml"), &out).unwrap();
    let (code, out, _) = a.ctl(folder, &["apply", "-f", "got.yaml"]).await;
    assert!(code == 0 && out.starts_with("unchanged: generation 2"), "{out}");
    let (code, out, _) = a.ctl(folder, &["get", "--generation", "1", "-o", "json"]).await;
    assert!(code == 0 && !out.contains("audited") && out.contains("priced"), "{out}");

    // The state of a route at another instance, with its reason.
    b.board.post(RouteStatus {
        route: "price".into(),
        service: "pricing".into(),
        state: RouteState::WaitingForService,
        reason: "service pricing at http://127.0.0.1:8080: connection refused".into(),
        ..RouteStatus::default()
    });
    let status = async {
        loop {
            let (code, out, err) = a.ctl(folder, &["status"]).await;
            assert_eq!(code, 0, "{err}");
            if out.contains("connection refused") {
                return out;
            }
        }
    };
    let out = tokio::time::timeout(Duration::from_secs(20), status).await.unwrap();
    assert!(out.contains("WAITING_FOR_SERVICE") && out.matches("SYNCED").count() == 2, "{out}");

    // A sidecar with a pinned table takes no apply, and holds nobody up.
    let p = Instance::start(&broker, "p", folder, Some(&folder.join("one.yaml"))).await;
    let (code, _, err) = p.ctl(folder, &["apply", "-f", "two.yaml"]).await;
    assert!(code == 1 && err.contains("pins") && err.contains("one.yaml"), "{code} {err}");
    p.stop().await;
    b.stop().await;
    let (code, out, _) = a.ctl(folder, &["apply", "-f", "one.yaml", "--wait"]).await;
    assert!(code == 0 && out.contains("applied generation 3"), "{out}");
    let (_, out, _) = a.ctl(folder, &["status", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["instances"].as_array().map(Vec::len), Some(1), "who left cleanly is off the list: {out}");
    a.stop().await;
    broker.close(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test]
async fn the_admin_listener_tells_its_health() {
    let data = tempfile::tempdir().unwrap();
    let broker = EmbeddedBroker::open(EmbeddedConfig::new(data.path().join("broker"))).unwrap();
    let a = Instance::start(&broker, "a", data.path(), None).await;
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", a.admin)).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest { service: "mesh.v1.Control".to_owned() };
    let answer = health.check(request).await.unwrap().into_inner();
    assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);
    a.stop().await;
    broker.close(Duration::from_secs(5)).await.unwrap();
}
