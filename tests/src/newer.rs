//! What a sidecar of a newer version does to a mesh of this one: it takes tables into the control log that this version cannot compile.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use anyhow::{Context as _, Result, ensure};
use axum::{
    Router,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
    routing::post,
};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body_util::{BodyExt as _, Full};
use mesh_proto::v1::{ApplyRequest, ApplyResponse, Canary, GetStatusRequest, control_client::ControlClient};
use prost::Message as _;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{
    Status,
    client::GrpcService as _,
    transport::{Channel, Endpoint},
};

use crate::{sidecar::Sidecar, stage::Stage};

/// A name that no expression of this version knows.
pub const NAME: &str = "record.jsn";

/// Appends a table to the control log, packed as a sidecar packs it, whatever is in it. Its digest is returned.
///
/// # Errors
/// If the stage is not on Kafka, or the record is not stored.
pub async fn append(stage: &Stage, generation: u64, canary: Option<&Canary>, table: &str) -> Result<String> {
    let hash: String = Sha256::digest(table).iter().map(|byte| format!("{byte:02x}")).collect();
    let digest = format!("sha256:{hash}");
    let applied_ms = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_millis() as i64;
    let channel = canary.map_or_else(|| "stable".to_owned(), |canary| format!("canary {}", canary.selector));
    let limits = canary.map(|canary| json!({ "dead_letters": canary.max_dead_letters, "refusals": canary.max_refusals }));
    let envelope = json!({
        "schema": 1,
        "mesh": stage.mesh(),
        "channel": channel,
        "generation": generation,
        "digest": digest,
        "applied_ms": applied_ms,
        "writer": "newer-0",
        "signature": null,
        "about": {
            "by": "ann@desk",
            "source": "newer.yaml",
            "message": "",
            "limits": limits.unwrap_or_else(|| json!({})),
            "mood": "a field of a newer version",
        },
        "table": table,
    });
    let value = zstd::bulk::compress(&serde_json::to_vec(&envelope)?, 3)?;
    let mut key = format!("{}/{generation}/{}", stage.mesh(), uuid::Uuid::new_v4().simple());
    if canary.is_some() {
        key += &format!("/{channel}");
    }
    stage.append("__mesh.control", &key, value).await?;
    Ok(digest)
}

/// The admin listener of a sidecar of a newer version, as `mesh-ctl` sees it: it applies a table by whose expressions `record.json` has the name
/// [`NAME`]. All else is answered by a real sidecar.
#[derive(Debug)]
pub struct Newer {
    address: SocketAddr,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Behind {
    stage: Stage,
    real: Channel,
}

impl Newer {
    /// Listens in front of a sidecar.
    ///
    /// # Errors
    /// If it cannot listen, or the sidecar cannot be reached.
    pub async fn start(stage: &Stage, sidecar: &Sidecar) -> Result<Self> {
        let real = Endpoint::from_shared(format!("http://{}", sidecar.admin_address()))?.connect().await?;
        let behind = Arc::new(Behind { stage: stage.clone(), real });
        let routes = Router::new().route("/mesh.v1.Control/Apply", post(apply)).fallback(pass).with_state(behind);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                eprintln!("the newer sidecar ended: {error}");
            }
        });
        Ok(Self { address, task })
    }

    /// What `--admin` takes.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Newer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Hands a call on, as it is.
async fn pass(State(behind): State<Arc<Behind>>, request: Request) -> Response {
    let mut real = behind.real.clone();
    let request = request.map(tonic::body::Body::new);
    let answer = match std::future::poll_fn(|context| real.poll_ready(context)).await {
        Ok(()) => real.call(request).await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(answer) => answer.map(axum::body::Body::new),
        Err(error) => Status::unavailable(error.to_string()).into_http(),
    }
}

async fn apply(State(behind): State<Arc<Behind>>, request: Request) -> Response {
    match applied(&behind, request).await {
        Ok(response) => {
            let mut frame = BytesMut::new();
            frame.put_u8(0);
            frame.put_u32(response.encoded_len() as u32);
            frame.extend_from_slice(&response.encode_to_vec());
            let trailers = HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
            let body = Full::new(frame.freeze()).with_trailers(async move { Some(Ok(trailers)) });
            ([("content-type", "application/grpc")], axum::body::Body::new(body)).into_response()
        }
        Err(error) => Status::internal(format!("{error:#}")).into_http(),
    }
}

async fn applied(behind: &Behind, request: Request) -> Result<ApplyResponse> {
    let body = request.into_body().collect().await?.to_bytes();
    let message = body.get(5..).map(Bytes::copy_from_slice).context("a frame")?;
    let ApplyRequest { table, canary, signature, .. } = ApplyRequest::decode(message)?;
    ensure!(signature.is_none(), "it passes no signature on");
    let table = table.context("a table")?;
    let parsed = mesh_routing::parse(&table.file, &table.text).map_err(|faults| anyhow::anyhow!("{faults}"))?;
    let status = ControlClient::new(behind.real.clone()).get_status(GetStatusRequest::default()).await?.into_inner();
    let generation = status.generation + 1;
    let digest = append(&behind.stage, generation, canary.as_ref(), &parsed.to_json().replace("record.json", NAME)).await?;
    Ok(ApplyResponse { generation, digest, changed: true, ..ApplyResponse::default() })
}
