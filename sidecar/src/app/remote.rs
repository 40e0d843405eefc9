//! What the command line asks of a sidecar that runs.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use mesh_proto::{admin::AdminAddress, v1::DrainRequest};
use tokio::time::{Instant, sleep};

/// Asks for a drain, and waits until the sidecar has ended.
///
/// # Errors
/// If it cannot be reached, or has not ended in time; says what to do.
pub async fn drain(admin: &AdminAddress, timeout: Duration) -> Result<(), String> {
    let mut client = admin
        .connect()
        .await
        .map_err(|error| format!("no sidecar answers at {admin}: {error}; name its admin port with --admin or MESH_ADMIN"))?;
    client.drain(DrainRequest::default()).await.map_err(|status| format!("{admin} refuses to drain: {}", status.message()))?;
    let deadline = Instant::now() + timeout;
    // The admin port closes when the routes are drained; there is no event to await in another process.
    while admin.connect().await.is_ok() {
        if Instant::now() >= deadline {
            return Err(format!("{admin} has not drained within {timeout:?}: see its log for the service that does not answer"));
        }
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Asks whether a sidecar is ready.
///
/// # Errors
/// If it cannot be reached or is not ready; names what is missing.
pub async fn ready(probe: &str) -> Result<(), String> {
    let authority = probe.trim_start_matches("http://").trim_end_matches('/').replace("0.0.0.0:", "127.0.0.1:");
    let request = http::Request::get("/readyz")
        .header(http::header::HOST, &authority)
        .body(Full::new(Bytes::new()))
        .map_err(|error| error.to_string())?;
    match tokio::time::timeout(Duration::from_secs(3), call(&authority, request)).await {
        Ok(Ok((status, _))) if status.is_success() => Ok(()),
        Ok(Ok((_, body))) => Err(format!("not ready: {}", String::from_utf8_lossy(&body).trim())),
        Ok(Err(error)) => Err(format!("no sidecar answers at {authority}: {error}; name its probe port with --probe")),
        Err(_) => Err(format!("{authority} did not answer within 3 s")),
    }
}

/// Publishes one JSON record over HTTP; gives its place, `topic/partition/offset`.
///
/// # Errors
/// What the API answered.
pub async fn publish(api: std::net::SocketAddr, topic: &str, key: &str, body: String) -> Result<String, String> {
    let request = http::Request::post(format!("/v1/topics/{topic}/records"))
        .header(http::header::HOST, api.to_string())
        .header(http::header::CONTENT_TYPE, "application/json")
        .header("mesh-key", key)
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| error.to_string())?;
    let (status, body) = call(&api.to_string(), request).await?;
    let answer: serde_json::Value = serde_json::from_slice(&body).map_err(|error| format!("{status}: {error}"))?;
    match (answer["topic"].as_str(), answer["partition"].as_i64(), answer["offset"].as_i64()) {
        (Some(topic), Some(partition), Some(offset)) => Ok(format!("{topic}/{partition}/{offset}")),
        _ => Err(format!("publishing to {topic} failed: {status} {}", String::from_utf8_lossy(&body))),
    }
}

/// One request on a connection of its own.
async fn call(authority: &str, request: http::Request<Full<Bytes>>) -> Result<(http::StatusCode, Bytes), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let stream = tokio::net::TcpStream::connect(authority).await.map_err(|error| text(&error))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| text(&error))?;
    let talk = async {
        let response = sender.send_request(request).await.map_err(|error| text(&error))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| text(&error))?.to_bytes();
        Ok((status, body))
    };
    tokio::pin!(connection);
    tokio::pin!(talk);
    tokio::select! {
        answer = &mut talk => answer,
        // The answer may lie in the channel when the connection ends.
        _ = &mut connection => talk.await,
    }
}
