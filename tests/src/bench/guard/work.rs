//! Fixed pieces of work in this one process and one thread, for counting instructions.
//!
//! Invariant: the same number of records is the same work: in a fixed order, with fixed keys and values, on a broker in memory that has no
//! thread. What is left to chance are the seeds of hash maps, ids, and how many calls of a socket find how much.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use mesh_sidecar::{
    broker::embedded::{EmbeddedBroker, EmbeddedConfig},
    command,
    config::{self, Config},
    consume::{Context, Supervisor},
    deliver::desk::Desks,
    lanes::{Lane, Lanes},
    outcome::Disposition,
    pause,
    publish::{Caller, Draft, Publisher, TraceHeaders},
    record::Record,
    status::Board,
    table::{ActiveTable, TableOrigin},
    telemetry::{metrics::Metrics, trace::Tracer},
    watermark::Watermark,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::bench::{
    load,
    service::{self, Answer},
};

/// A piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Work {
    /// Lanes and watermarks: records come, run by key with 64 out, and complete.
    Lanes,
    /// The publish path, 64 records at a time, into a broker in memory.
    Publish,
    /// The same, and then a route that pushes each record to an HTTP service in this thread and forwards the answer.
    Route,
}

const SERVICE: &str = "worker";
const TOPIC: &str = "source";
/// Records of a publish.
const BATCH: u64 = 64;
/// Records out at once.
const OUT: usize = 64;

impl Work {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Lanes, Self::Publish, Self::Route];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lanes => "lanes",
            Self::Publish => "publish",
            Self::Route => "route",
        }
    }

    /// How many records of it are counted: enough to be steady, few enough for callgrind.
    pub(super) fn records(self) -> u64 {
        match self {
            Self::Lanes => 20_000,
            Self::Publish => 1_280,
            Self::Route => 640,
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// If a record is lost.
    pub async fn run(self, records: u64) -> Result<()> {
        match self {
            Self::Lanes => lanes(records),
            Self::Publish => publish(&memory()?, &config(None)?, records).await,
            Self::Route => route(records).await,
        }
    }
}

fn lanes(records: u64) -> Result<()> {
    const PARTITIONS: u64 = 4;
    let mut lanes = Lanes::with_start(1);
    let mut marks: Vec<Watermark> = (0..PARTITIONS).map(|_| Watermark::new(1, 0)).collect();
    let mut out = VecDeque::with_capacity(OUT);
    let mut recorded = 0;
    for number in 0..records {
        let (slot, offset) = (number % PARTITIONS, i64::try_from(number / PARTITIONS)?);
        marks[usize::try_from(slot)?].enter(offset, 0, service::VALUE);
        let key = (number % load::KEYS).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        lanes.push(Some(Lane { slot: u32::try_from(slot)?, key }), (slot, offset));
        let last = number + 1 == records;
        while out.len() >= OUT || (last && (lanes.ready() > 0 || !out.is_empty())) || (out.len() < OUT && lanes.ready() > 0) {
            if out.len() < OUT
                && let Some(id) = lanes.next_ready()
            {
                out.push_back(id);
                continue;
            }
            let Some(done) = out.pop_front() else { break };
            let (slot, offset) = lanes.finish(done).context("a job")?;
            marks[usize::try_from(slot)?].complete(1, offset);
        }
        if number % 512 == 0 {
            recorded += marks.iter().map(|mark| mark.snapshot().metadata.len()).sum::<usize>();
        }
    }
    let completed: u64 = marks.iter().map(Watermark::completed).sum();
    ensure!(completed == records, "{completed} of {records} records completed ({recorded} bytes recorded)");
    Ok(())
}

fn memory() -> Result<Arc<EmbeddedBroker>> {
    Ok(EmbeddedBroker::in_memory(EmbeddedConfig::new(""))?)
}

/// The configuration of a sidecar with one service, which may have an app.
fn config(app: Option<u16>) -> Result<Arc<Config>> {
    let service =
        app.map_or_else(|| format!("[{{ name: {SERVICE} }}]"), |port| format!("[{{ name: {SERVICE}, app: 'http://127.0.0.1:{port}' }}]"));
    let fields = [("MESH_MESH", "guard"), ("MESH_SERVICES", service.as_str()), ("MESH_BROKER_EMBEDDED_PATH", "unused")];
    let environment = fields.map(|(name, value)| (name.to_owned(), value.to_owned()));
    Ok(Arc::new(config::load(None, environment.into_iter())?))
}

async fn publish(broker: &Arc<EmbeddedBroker>, config: &Arc<Config>, records: u64) -> Result<()> {
    let publisher = Publisher::new(broker.clone(), config.clone(), Tracer::disabled(), Metrics::new());
    let topic = publisher.topic(Caller::Service(0), TOPIC).await?;
    let value = Bytes::from(vec![b'x'; service::VALUE]);
    let draft = |number: u64| Draft {
        record: Record { key: Some(load::key(number, load::KEYS).into()), value: Some(value.clone()), ..Record::default() },
        content_type: Some(Bytes::from_static(b"application/json")),
        ..Draft::default()
    };
    for begin in (0..records).step_by(usize::try_from(BATCH)?) {
        let drafts = (begin..records.min(begin + BATCH)).map(draft).collect();
        for published in publisher.publish(&topic, drafts, &TraceHeaders::default()).await {
            published.result?;
        }
    }
    Ok(())
}

async fn route(records: u64) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let config = config(Some(listener.local_addr()?.port()))?;
    let serving = tokio::spawn(service::http_on(listener, Answer::Echo, Duration::ZERO));
    let broker = memory()?;
    publish(&broker, &config, records).await?;
    let text = format!(
        "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: guard }}\nspec:\n  routes:\n  - {{ name: work, service: {SERVICE}, from: [{TOPIC}], handler: /push, to: [target] }}\n"
    );
    let compiled = mesh_routing::compile(&mesh_routing::parse("work.yaml", &text)?)?;
    let active = ActiveTable { generation: 1, applied_ms: 0, origin: TableOrigin::Pinned, compiled: Arc::new(compiled) };
    let (_table, watch) = watch::channel(Some(Arc::new(active)));
    let (_commands, commanded) = command::channel();
    let (board, stop) = (Board::default(), CancellationToken::new());
    let context = Context {
        config,
        broker,
        board: board.clone(),
        desks: Desks::default(),
        metrics: Metrics::new(),
        tracer: Tracer::disabled(),
        paused: pause::never(),
    };
    let running = tokio::spawn(Supervisor::new(context, watch, commanded).run(stop.clone()));
    let forwarded = || board.routes().iter().filter_map(|route| route.dispositions.get(&Disposition::Forwarded)).sum::<u64>();
    let all = async {
        while forwarded() < records {
            // The board tells nobody when it changes.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(50), all).await.with_context(|| format!("{} of {records} forwarded", forwarded()))?;
    stop.cancel();
    running.await?;
    serving.abort();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_work_is_done_to_its_end() {
        for work in Work::ALL {
            work.run(200).await.unwrap();
        }
    }
}
