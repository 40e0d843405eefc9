//! Load that knows what was acknowledged.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use mesh_proto::v1::{PublishStreamRequest, Record, publish_result};
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{http::Http, oracle::Oracle, sidecar::Sidecar};

/// How records are published.
#[derive(Clone, Debug)]
pub struct Load {
    /// The topic.
    pub topic: String,
    /// How many records.
    pub records: usize,
    /// Over how many keys: record i has the key `k<i mod keys>` and the number `i / keys`.
    pub keys: usize,
    /// About how many bytes a value has.
    pub size: usize,
    /// How many HTTP connections; each has keys of its own, and one request at a time.
    pub connections: usize,
}

impl Load {
    /// Publishes all by HTTP, one record a request. Every record must be acknowledged at once.
    ///
    /// # Errors
    /// If one is not.
    pub async fn http(&self, sidecar: &Sidecar) -> Result<Oracle> {
        self.http_keys(sidecar, 0..self.keys, None).await.map(|done| done.0)
    }

    /// Publishes by HTTP until all are acknowledged or the token is cancelled, and tries again what failed: for runs with faults. Says how
    /// many requests were repeated, which may have been stored twice.
    ///
    /// # Errors
    /// If the sidecar refuses a record for good.
    pub async fn http_stubborn(&self, sidecar: &Sidecar, stop: CancellationToken) -> Result<(Oracle, usize)> {
        self.http_keys(sidecar, 0..self.keys, Some(stop)).await
    }

    /// Publishes the even keys by HTTP and the odd ones by one gRPC stream.
    ///
    /// # Errors
    /// If one record is not acknowledged.
    pub async fn http_and_grpc(&self, sidecar: &Sidecar) -> Result<Oracle> {
        let (http, grpc) = tokio::join!(
            self.http_keys(sidecar, (0..self.keys).step_by(2), None),
            self.stream_keys(sidecar, (1..self.keys).step_by(2).collect())
        );
        let (mut oracle, _) = http?;
        oracle.merge(grpc?);
        ensure!(oracle.len() == self.records, "{} of {} records were acknowledged", oracle.len(), self.records);
        Ok(oracle)
    }

    async fn http_keys(
        &self,
        sidecar: &Sidecar,
        keys: impl Iterator<Item = usize>,
        stubborn: Option<CancellationToken>,
    ) -> Result<(Oracle, usize)> {
        let mut shares: Vec<Vec<usize>> = vec![Vec::new(); self.connections];
        for (at, key) in keys.enumerate() {
            shares[at % self.connections].push(key);
        }
        let load = Arc::new(self.clone());
        let mut tasks = JoinSet::new();
        for share in shares {
            tasks.spawn(connection(load.clone(), sidecar.api_address(), share, stubborn.clone()));
        }
        let (mut oracle, mut repeated) = (Oracle::default(), 0);
        while let Some(done) = tasks.join_next().await {
            let (part, count) = done??;
            oracle.merge(part);
            repeated += count;
        }
        Ok((oracle, repeated))
    }

    async fn stream_keys(&self, sidecar: &Sidecar, keys: Vec<usize>) -> Result<Oracle> {
        const BATCH: usize = 50;
        let plan: Vec<(usize, usize)> =
            (0..self.rounds()).flat_map(|number| keys.iter().map(move |key| (*key, number))).filter(|at| self.has(*at)).collect();
        let plan: Arc<[(usize, usize)]> = plan.into();
        let (requests, outgoing) = mpsc::channel(8);
        let (load, planned) = (self.clone(), plan.clone());
        let feeder = tokio::spawn(async move {
            for (sequence, part) in planned.chunks(BATCH).enumerate() {
                let records = part.iter().map(|(key, number)| load.record(*key, *number)).collect();
                let topic = if sequence == 0 { load.topic.clone() } else { String::new() };
                if requests.send(PublishStreamRequest { sequence: sequence as u64, topic, records }).await.is_err() {
                    break;
                }
            }
        });
        let mut answers = sidecar.mesh().await?.publish_stream(ReceiverStream::new(outgoing)).await?.into_inner();
        let (mut oracle, mut expected) = (Oracle::default(), 0);
        while let Some(answer) = answers.message().await? {
            for result in answer.results {
                ensure!(result.sequence == expected, "sequence {} was answered where {expected} was due", result.sequence);
                let part = plan.chunks(BATCH).nth(usize::try_from(expected)?).context("an answer to no request")?;
                expected += 1;
                ensure!(result.results.len() == part.len(), "{} results for {} records", result.results.len(), part.len());
                for (one, (key, number)) in result.results.into_iter().zip(part) {
                    match one.result {
                        Some(publish_result::Result::Position(_)) => oracle.acknowledge(&format!("k{key}"), *number as i64),
                        other => bail!("not stored: {other:?}"),
                    }
                }
            }
        }
        feeder.await?;
        Ok(oracle)
    }

    fn rounds(&self) -> usize {
        self.records.div_ceil(self.keys)
    }

    fn has(&self, (key, number): (usize, usize)) -> bool {
        number * self.keys + key < self.records
    }

    fn value(&self, key: usize, number: usize) -> Bytes {
        let head = format!(r#"{{"k":"k{key}","n":{number},"pad":""#);
        let pad = self.size.saturating_sub(head.len() + 2);
        Bytes::from(format!("{head}{}\"}}", "x".repeat(pad)))
    }

    fn record(&self, key: usize, number: usize) -> Record {
        Record {
            key: Some(format!("k{key}").into()),
            value: Some(self.value(key, number)),
            content_type: "application/json".into(),
            ..Record::default()
        }
    }
}

/// One connection's share: key by key in order, one request at a time.
async fn connection(
    load: Arc<Load>,
    address: std::net::SocketAddr,
    keys: Vec<usize>,
    stubborn: Option<CancellationToken>,
) -> Result<(Oracle, usize)> {
    let client = Http::new(address);
    let path = format!("/v1/topics/{}/records", load.topic);
    let (mut oracle, mut repeated) = (Oracle::default(), 0);
    for number in 0..load.rounds() {
        for key in keys.iter().copied().filter(|key| load.has((*key, number))) {
            let value = load.value(key, number);
            loop {
                let request = Request::post(&path)
                    .header("host", address.to_string())
                    .header("content-type", "application/json")
                    .header("mesh-key", format!("k{key}"))
                    .header("mesh-id", format!("{}-k{key}-{number}", load.topic))
                    .body(Full::new(value.clone()))?;
                let name = format!("k{key}");
                let answer = client.call(request, Duration::from_secs(30)).await;
                match (answer, &stubborn) {
                    (Ok(answer), _) if answer.status == 200 => {
                        oracle.acknowledge(&name, number as i64);
                        break;
                    }
                    (Ok(answer), None) => bail!("record {name} {number}: {} {}", answer.status, answer.text()),
                    (Ok(answer), Some(_)) if !retryable(&answer.json()?) => {
                        bail!("record {name} {number} is refused for good: {} {}", answer.status, answer.text())
                    }
                    (Err(error), None) => return Err(error),
                    (_, Some(stop)) => {
                        repeated += 1;
                        if stop.is_cancelled() {
                            oracle.perhaps(&name, number as i64);
                            return Ok((oracle, repeated));
                        }
                        // The sidecar is being started again: there is no event to await from outside.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }
            if stubborn.as_ref().is_some_and(CancellationToken::is_cancelled) {
                return Ok((oracle, repeated));
            }
        }
    }
    Ok((oracle, repeated))
}

fn retryable(problem: &Value) -> bool {
    problem["retryable"].as_bool().unwrap_or(false)
}
