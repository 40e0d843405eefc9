//! The demo's services: ordinary HTTP servers, one endpoint each. None of them knows a broker, a topic that is not its own, or another service.

use std::{io, time::Instant};

use axum::{
    Json, Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet};

/// One call of a service, as it happened.
#[derive(Debug)]
pub(super) struct Hop {
    pub(super) at: Instant,
    pub(super) service: &'static str,
    pub(super) topic: String,
    pub(super) order: String,
    pub(super) status: StatusCode,
    /// What the service says of it, for people.
    pub(super) said: String,
}

/// What a service says: the status, the answer, and a word for people.
type Said = Result<(StatusCode, Value, String), String>;
type Handle = fn(&Value) -> Said;

/// A service: its name in the routing table, its path, and what it does with a body.
struct Service {
    name: &'static str,
    path: &'static str,
    handle: Handle,
}

const SERVICES: [Service; 5] = [
    Service { name: "pricing", path: "/price", handle: price },
    Service { name: "fraud", path: "/check", handle: check },
    Service { name: "shipping", path: "/ship", handle: ship },
    Service { name: "packing", path: "/pack", handle: pack },
    Service { name: "archive", path: "/keep", handle: keep },
];

/// Starts all services on free loopback ports; they live as long as the set. Gives their names and addresses.
///
/// # Errors
/// If a port cannot be bound.
pub(super) async fn start(hops: mpsc::Sender<Hop>) -> io::Result<(JoinSet<io::Result<()>>, Vec<(&'static str, String)>)> {
    let (mut tasks, mut addresses) = (JoinSet::new(), Vec::new());
    for Service { name, path, handle } in SERVICES {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        addresses.push((name, format!("http://{}", listener.local_addr()?)));
        let state = (name, handle, hops.clone());
        let router = Router::new().route(path, post(serve)).with_state(state);
        tasks.spawn(async move { axum::serve(listener, router).await });
    }
    Ok((tasks, addresses))
}

async fn serve(
    State((service, handle, hops)): State<(&'static str, Handle, mpsc::Sender<Hop>)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("?").to_owned();
    let result = serde_json::from_slice::<Value>(&body).map_err(|error| error.to_string()).and_then(|body| handle(&body));
    let (status, answer, said) = result.unwrap_or_else(|error| (StatusCode::BAD_REQUEST, json!({ "error": error }), error.clone()));
    let hop = Hop { at: Instant::now(), service, topic: text("mesh-topic"), order: text("mesh-key"), status, said };
    // The service waits for the one who prints: a demo that is too fast to read would be none. Nobody prints at the end.
    let _ = hops.send(hop).await;
    match status {
        StatusCode::NO_CONTENT => status.into_response(),
        _ => (status, Json(answer)).into_response(),
    }
}

fn number(body: &Value, field: &str) -> Result<u64, String> {
    body.get(field).and_then(Value::as_u64).ok_or_else(|| format!("{field}: a whole number is missing"))
}

/// Adds the total.
fn price(order: &Value) -> Said {
    let total = number(order, "quantity")?.checked_mul(number(order, "price")?).ok_or("quantity: too large")?;
    let mut priced = order.clone();
    priced["total"] = total.into();
    Ok((StatusCode::OK, priced, format!("total {total}")))
}

/// The `if`: 204 says that nothing is to be forwarded.
fn check(order: &Value) -> Said {
    const LIMIT: u64 = 1_000;
    let total = number(order, "total")?;
    if total <= LIMIT {
        return Ok((StatusCode::NO_CONTENT, Value::Null, format!("{total} is fine: nothing to review")));
    }
    Ok((StatusCode::OK, json!({ "review": order, "because": format!("total {total} > {LIMIT}") }), format!("{total} is much: to review")))
}

/// One parcel with as many items left to pack as were ordered.
fn ship(order: &Value) -> Said {
    let left = number(order, "quantity")?;
    Ok((StatusCode::OK, json!({ "item": order["item"], "left": left }), format!("a parcel for {left}")))
}

/// The `for`: each round packs one item, until 204 ends it.
fn pack(parcel: &Value) -> Said {
    let Some(left) = number(parcel, "left")?.checked_sub(1) else {
        return Ok((StatusCode::NO_CONTENT, Value::Null, "packed: the round is over".to_owned()));
    };
    let mut parcel = parcel.clone();
    parcel["left"] = left.into();
    Ok((StatusCode::OK, parcel, format!("one more packed, {left} left")))
}

/// The end: what it answers is ignored.
fn keep(_: &Value) -> Said {
    Ok((StatusCode::OK, json!({ "kept": true }), "kept".to_owned()))
}
