//! The producers: each has keys of its own, one record on its way at a time, and goes on until it is acknowledged, at whichever sidecar is there.
//!
//! Invariant: of a key, the next record is sent only after the one before was acknowledged: A has them in order, repetitions aside.
//! Invariant: every attempt has a uuid of its own, so that A shows which attempts were stored.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use http::{Method, Request};
use http_body_util::Full;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    ledger::{Ledger, Place},
    payload::{Name, Payload},
};
use crate::http::{Http, NotConnected};

/// How long a producer waits for an answer before it turns to another sidecar.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is published.
#[derive(Clone, Debug)]
pub struct Load {
    /// The run's name.
    pub run: String,
    /// A.
    pub topic: String,
    /// Keys, over all producers.
    pub keys: u32,
    /// Producers.
    pub producers: u32,
    /// Records a second, over all producers, as long as the mesh keeps up.
    pub rate: f64,
    /// The APIs of the sidecars.
    pub apis: Vec<SocketAddr>,
}

impl Load {
    /// Publishes until it is stopped; whatever is on its way then is tried until it is acknowledged, for a while.
    ///
    /// # Errors
    /// If a record is refused for good that must be taken.
    pub async fn run(self, ledger: Arc<Ledger>, stop: CancellationToken) -> Result<()> {
        let load = Arc::new(self);
        let mut tasks = JoinSet::new();
        for producer in 0..load.producers {
            tasks.spawn(produce(load.clone(), producer, ledger.clone(), stop.clone()));
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(())
    }
}

async fn produce(load: Arc<Load>, producer: u32, ledger: Arc<Ledger>, stop: CancellationToken) -> Result<()> {
    let clients: Vec<Http> = load.apis.iter().map(|api| Http::new(*api).always("mesh-service", "work")).collect();
    let mut at = producer as usize % clients.len().max(1);
    let pause = Duration::from_secs_f64(f64::from(load.producers) / load.rate.max(0.1));
    let mut due = Instant::now();
    for seq in 0.. {
        for key in (producer..load.keys).step_by(load.producers as usize) {
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = stop.cancelled() => return Ok(()),
            }
            // What was missed while the mesh did not answer is not made up for.
            due = (due + pause).max(Instant::now());
            let name = Name { key, seq };
            let mut given_up: Option<Instant> = None;
            while !attempt(&load, &clients[at], producer, name, &ledger).await? {
                at = (at + 1) % clients.len();
                let now = Instant::now();
                match given_up {
                    // At the end a record may stay in doubt.
                    Some(until) if now > until => return Ok(()),
                    None if stop.is_cancelled() => given_up = Some(now + Duration::from_secs(30)),
                    _ => {}
                }
                // Nothing tells from outside when a sidecar is back.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    Ok(())
}

/// Publishes once; whether it was acknowledged.
async fn attempt(load: &Load, client: &Http, producer: u32, name: Name, ledger: &Ledger) -> Result<bool> {
    let uuid = Uuid::new_v4();
    let body = Payload::new(&load.run, producer, name, uuid).bytes();
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("/v1/topics/{}/records", load.topic))
        .header("host", "mesh")
        .header("mesh-service", "work")
        .header("content-type", "application/json")
        .header("mesh-key", name.key_text())
        .header("mesh-id", uuid.to_string())
        .header("traceparent", traceparent(uuid))
        .body(Full::new(body))?;
    let answer = match client.call(request, PATIENCE).await {
        Ok(answer) => answer,
        Err(error) => {
            match error.downcast_ref::<NotConnected>() {
                Some(_) => ledger.refused(uuid),
                None => ledger.unsure(),
            }
            return Ok(false);
        }
    };
    if answer.status == 200 {
        let said = answer.json()?;
        let place = said["partition"].as_i64().zip(said["offset"].as_i64()).with_context(|| format!("no position in {said}"))?;
        ledger.acknowledged(name, producer, uuid, Place { partition: i32::try_from(place.0)?, offset: place.1 });
        return Ok(true);
    }
    let problem = answer.json()?;
    if problem["retryable"] != true {
        bail!("{name} is refused for good: {} {problem}", answer.status);
    }
    if problem["persisted"] == "no" {
        ledger.refused(uuid);
    } else {
        ledger.unsure();
    }
    Ok(false)
}

/// The trace of an attempt: its id is the uuid.
fn traceparent(uuid: Uuid) -> String {
    format!("00-{}-{:016x}-01", uuid.simple(), uuid.as_u128() as u64 | 1)
}

/// The uuid that a trace belongs to.
pub fn traced(traceparent: &str) -> Option<Uuid> {
    Uuid::try_parse(traceparent.split('-').nth(1)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_names_its_attempt() {
        let uuid = Uuid::new_v4();
        assert_eq!(traced(&traceparent(uuid)), Some(uuid));
        assert_eq!(traced("nonsense"), None);
    }

    #[test]
    fn a_payload_survives_the_way() {
        let payload = Payload::new("r", 0, Name { key: 1, seq: 2 }, Uuid::new_v4());
        assert_eq!(Payload::parse(&payload.bytes()).unwrap(), payload);
    }
}
