//! The probe listener: `/livez`, `/readyz`, `/startupz` and `/metrics`, and nothing else, since it may be reachable from other machines.
//!
//! 200 with `ok`, or 503 with a JSON list of what is missing. `Accept: application/json` makes the good answer JSON too.
//!
//! Invariant: nothing here reads a request's body or changes anything.

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Serialize;

pub use crate::telemetry::health::{Condition, Health, Heartbeat, Missing};
use crate::telemetry::metrics::{self, Metrics};

/// The routes of the probe listener.
pub fn router(health: Health, metrics: Metrics) -> Router {
    let probes = Router::new()
        .route("/livez", get(|State(health): State<Health>, headers: HeaderMap| async move { answer(health.not_alive(), &headers) }))
        .route("/readyz", get(|State(health): State<Health>, headers: HeaderMap| async move { answer(health.not_ready(), &headers) }))
        .route("/startupz", get(|State(health): State<Health>, headers: HeaderMap| async move { answer(health.not_started(), &headers) }))
        .with_state(health);
    Router::new()
        .route("/metrics", get(scrape))
        .with_state(metrics)
        .merge(probes)
        .fallback(|| async { (StatusCode::NOT_FOUND, "not found; here are /livez /readyz /startupz /metrics\n") })
}

#[derive(Serialize)]
struct Body {
    status: &'static str,
    missing: Vec<Missing>,
}

fn answer(missing: Vec<Missing>, headers: &HeaderMap) -> Response {
    // An answer of the past would be a lie.
    let uncached = [(header::CACHE_CONTROL, "no-store")];
    if !missing.is_empty() {
        return (StatusCode::SERVICE_UNAVAILABLE, uncached, Json(Body { status: "unavailable", missing })).into_response();
    }
    if accepts(headers, "application/json") {
        return (uncached, Json(Body { status: "ok", missing })).into_response();
    }
    (uncached, "ok\n").into_response()
}

async fn scrape(State(metrics): State<Metrics>, headers: HeaderMap) -> Response {
    // The text is both; an old scraper does not know the newer name.
    let content_type =
        if accepts(&headers, "application/openmetrics-text") { metrics::CONTENT_TYPE } else { "text/plain; version=0.0.4; charset=utf-8" };
    match metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, content_type)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

fn accepts(headers: &HeaderMap, media_type: &str) -> bool {
    headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).any(|value| value.contains(media_type))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::{body::Body, http::Request};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn call(router: &Router, method: &str, path: &str, accept: &str) -> (StatusCode, String, String) {
        let request = Request::builder().method(method).uri(path).header("accept", accept).body(Body::empty()).unwrap();
        let answer = router.clone().oneshot(request).await.unwrap();
        let content_type = answer.headers().get(header::CONTENT_TYPE).map_or("", |value| value.to_str().unwrap()).to_owned();
        let (status, body) = (answer.status(), answer.into_body().collect().await.unwrap().to_bytes());
        (status, content_type, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn the_probes_tell_what_is_missing() {
        let health = Health::new();
        let router = router(health.clone(), Metrics::new());
        let (status, content_type, body) = call(&router, "GET", "/readyz", "*/*").await;
        assert_eq!((status, content_type.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "application/json"));
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["missing"][1], serde_json::json!({"condition": "table", "reason": "no routing table was loaded yet"}));
        assert_eq!(call(&router, "GET", "/startupz", "*/*").await.0, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(call(&router, "GET", "/livez", "*/*").await.2, "ok\n");

        for condition in [Condition::Started, Condition::Table, Condition::Broker] {
            health.set(condition, Ok(()));
        }
        assert_eq!(call(&router, "GET", "/readyz", "*/*").await.2, "ok\n");
        assert_eq!(call(&router, "GET", "/readyz", "application/json").await.2, r#"{"status":"ok","missing":[]}"#);
        assert_eq!(call(&router, "GET", "/startupz", "*/*").await.0, StatusCode::OK);
        health.set(Condition::Serving, Err("drains".into()));
        assert!(call(&router, "GET", "/readyz", "*/*").await.2.contains("drains"));

        let _still = health.watch("the loop of price", Duration::from_secs(1));
        tokio::time::advance(Duration::from_secs(2)).await;
        let (status, _, body) = call(&router, "GET", "/livez", "*/*").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("the loop of price"), "{body}");
    }

    #[tokio::test]
    async fn serves_metrics_and_nothing_else() {
        let router = router(Health::new(), Metrics::new());
        let (status, content_type, body) = call(&router, "GET", "/metrics", "*/*").await;
        assert_eq!((status, content_type.as_str()), (StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8"));
        assert!(body.contains("mesh_table_generation 0"));
        assert_eq!(call(&router, "GET", "/metrics", "application/openmetrics-text;version=1.0.0").await.1, metrics::CONTENT_TYPE);
        for path in ["/", "/v1/topics/a/records", "/livez/", "/metrics/x", "/debug/pprof"] {
            assert_eq!(call(&router, "GET", path, "*/*").await.0, StatusCode::NOT_FOUND, "{path}");
        }
        for path in ["/livez", "/readyz", "/startupz", "/metrics"] {
            assert_eq!(call(&router, "HEAD", path, "*/*").await.2, "", "{path}");
            for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
                assert_eq!(call(&router, method, path, "*/*").await.0, StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
            }
        }
    }
}
