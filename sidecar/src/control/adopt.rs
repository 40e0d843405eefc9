//! Takes new tables into force: reads, verifies and compiles them off the async threads, creates their topics, swaps one pointer.
//!
//! Invariant: a table that cannot be read or compiled changes nothing but the status: the last good one stays.
//! Invariant: a sidecar that starts falls back as one that runs does: to the newest generation that is good, then to its copy on disk.
//! Invariant: the generation in force here never goes back.

use std::{path::Path, sync::Arc};

use mesh_proto::v1;
use mesh_routing::CompiledTable;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::{
    CACHE_AFTER, StartError, cache,
    snapshot::Snapshot,
    state::{Backoff, Local, Shared, now_ms, origin_of},
    topics,
};
use crate::{
    broker::BrokerErrorKind,
    table::{ActiveTable, TableOrigin},
};

/// A table that the config pins.
#[derive(Debug)]
pub(super) struct Pinned {
    compiled: Arc<CompiledTable>,
    response: v1::GetTableResponse,
}

impl Pinned {
    /// Reads, checks and compiles the file.
    pub(super) async fn load(path: &Path, mesh: &str) -> Result<Self, StartError> {
        let (path, mesh) = (path.to_owned(), mesh.to_owned());
        spawn_blocking(move || {
            let text = std::fs::read_to_string(&path).map_err(|error| StartError::Read { path: path.clone(), error })?;
            let checked = mesh_routing::parse(&path.display().to_string(), &text)
                .and_then(|table| Ok((mesh_routing::compile(&table)?, table)))
                .map_err(|faults| StartError::Faults { path: path.clone(), faults });
            let (compiled, table) = checked?;
            if table.mesh != mesh {
                return Err(StartError::Mesh { path, found: table.mesh, expected: mesh });
            }
            let response = v1::GetTableResponse {
                generation: 0,
                digest: compiled.digest.to_string(),
                json: table.to_json(),
                applied_ms: now_ms(),
                origin: v1::TableOrigin::Pinned.into(),
            };
            Ok(Self { compiled: Arc::new(compiled), response })
        })
        .await?
    }
}

/// Puts the pinned table in force, and creates its topics as soon as the broker is there.
pub(super) async fn run_pinned(shared: Arc<Shared>, pinned: Pinned, stop: CancellationToken) {
    stop.run_until_cancelled(async {
        let Pinned { compiled, response } = pinned;
        let table = compiled.clone();
        let mut ensured = std::pin::pin!(ensure_topics(&shared, &table, 0));
        let in_time = tokio::time::timeout(CACHE_AFTER, &mut ensured).await.is_ok();
        put(&shared, response, TableOrigin::Pinned, compiled);
        shared.ready.send_replace(true);
        if !in_time {
            ensured.await;
        }
    })
    .await;
}

/// Follows the log until the token is cancelled.
pub(super) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    stop.run_until_cancelled(async {
        let copy = load_copy(&shared).await;
        let mut progress = shared.progress.subscribe();
        let read = tokio::time::timeout(CACHE_AFTER, progress.wait_for(|progress| progress.caught_up)).await.is_ok();
        if !read && let Some(copy) = &copy {
            use_copy(&shared, copy).await;
        }
        // Fails only when the sender is gone, and the sender is in `shared`.
        while progress.wait_for(|progress| progress.caught_up).await.is_ok() {
            let head = progress.borrow_and_update().head;
            if head > shared.local.borrow().judged || !*shared.ready.borrow() {
                judge(&shared, head, copy.as_ref()).await;
                shared.ready.send_replace(true);
            }
            if progress.changed().await.is_err() {
                return;
            }
        }
    })
    .await;
}

async fn load_copy(shared: &Shared) -> Option<Snapshot> {
    let (state, mesh) = (shared.config.state.clone(), shared.config.mesh.clone());
    match spawn_blocking(move || cache::load(&state, &mesh)).await {
        Ok(Ok(copy)) => copy,
        Ok(Err(error)) => {
            tracing::warn!(%error, "the copy of the routing table on disk is refused: a start without the broker has no table");
            None
        }
        Err(error) => {
            tracing::error!(%error, "the copy of the routing table on disk could not be read");
            None
        }
    }
}

/// Takes the copy on disk into force.
async fn use_copy(shared: &Shared, copy: &Snapshot) {
    let snapshot = copy.clone();
    let mesh = shared.config.mesh.clone();
    match spawn_blocking(move || compile(&mesh, &snapshot).map(|compiled| (snapshot, compiled))).await {
        Ok(Ok((snapshot, compiled))) => {
            tracing::warn!(generation = snapshot.generation, "the routing table comes from the copy on disk");
            put(shared, Local::response(&snapshot, TableOrigin::Cache), TableOrigin::Cache, Arc::new(compiled));
            shared.ready.send_replace(true);
        }
        Ok(Err(reason)) => tracing::error!(generation = copy.generation, reason, "the copy of the routing table on disk is refused"),
        Err(error) => tracing::error!(%error, "the copy of the routing table on disk could not be compiled"),
    }
}

/// Takes the newest good generation up to `head` into force, if it is newer than what is.
async fn judge(shared: &Shared, head: u64, copy: Option<&Snapshot>) {
    let active = shared.table.borrow().clone();
    let settled = active.as_ref().is_some_and(|active| active.origin == TableOrigin::Mesh);
    let floor = active.as_ref().map_or_else(|| copy.map_or(0, |copy| copy.generation), |active| active.generation);
    let candidates: Vec<u64> = shared.log(|log| {
        let newer = |generation: &u64| *generation > floor || (*generation == floor && !settled);
        log.generations().skip_while(|generation| *generation > head).take_while(newer).collect()
    });
    shared.wait_for(
        "generation",
        (head < floor).then(|| {
            format!(
                "the mesh's control topic knows generation {head} only, this sidecar had generation {floor} and keeps it: \
                 apply the table again"
            )
        }),
    );

    let (mut refused, mut head_digest) = (None, None);
    for generation in candidates {
        match prepare(shared, generation).await {
            Ok((snapshot, compiled)) => {
                if generation == head {
                    head_digest = Some(snapshot.digest.clone());
                }
                if !ensure_topics(shared, &compiled, head).await {
                    // A newer one came meanwhile: it is judged next.
                    return;
                }
                put(shared, Local::response(&snapshot, TableOrigin::Mesh), TableOrigin::Mesh, Arc::new(compiled));
                store_copy(shared, snapshot).await;
                break;
            }
            Err(reason) => {
                tracing::error!(generation, reason, "the routing table is refused, and the last good one stays in force");
                if generation == head {
                    refused = Some(reason);
                }
            }
        }
    }
    shared.local.send_modify(|local| {
        local.judged = head;
        local.refused = refused;
        local.head_digest = head_digest;
    });
    if shared.table.borrow().is_none()
        && let Some(copy) = copy
    {
        use_copy(shared, copy).await;
    }
}

/// Reads, verifies and compiles a generation. The error is the reason in words.
async fn prepare(shared: &Shared, generation: u64) -> Result<(Snapshot, CompiledTable), String> {
    let winner = shared.log(|log| log.winner(generation).cloned()).ok_or("its record was deleted")?;
    let mesh = shared.config.mesh.clone();
    spawn_blocking(move || {
        let snapshot = Snapshot::unpack(&winner.value).map_err(|error| error.to_string())?;
        snapshot.check(&mesh, generation).map_err(|error| error.to_string())?;
        let compiled = compile(&mesh, &snapshot)?;
        Ok((snapshot, compiled))
    })
    .await
    .map_err(|error| format!("it could not be compiled: {error}"))?
}

fn compile(mesh: &str, snapshot: &Snapshot) -> Result<CompiledTable, String> {
    let name = format!("generation {}", snapshot.generation);
    let table = mesh_routing::parse(&name, &snapshot.table).map_err(|faults| faults.to_string())?;
    if table.mesh != mesh {
        return Err(format!("the table is of mesh {:?}, and this sidecar belongs to mesh {mesh:?}", table.mesh));
    }
    mesh_routing::compile(&table).map_err(|faults| faults.to_string())
}

/// Creates the topics that are missing. Waits for a broker that is away; `false` if a newer generation came meanwhile.
async fn ensure_topics(shared: &Shared, compiled: &CompiledTable, head: u64) -> bool {
    const SUBJECT: &str = "topics";
    let mut progress = shared.progress.subscribe();
    let mut backoff = Backoff::new();
    loop {
        match topics::ensure(&*shared.broker.admin(), compiled).await {
            Ok(plan) => {
                for differs in plan.differs {
                    tracing::warn!("{differs}");
                }
                shared.wait_for(SUBJECT, None);
                return true;
            }
            Err(error) => {
                let passes = error.kind == BrokerErrorKind::Unreachable;
                shared.wait_for(SUBJECT, Some(format!("the topics of the routing table cannot be created: {error}")));
                if !passes {
                    // The routes whose topics are missing wait for them, and name them; the others need not.
                    return true;
                }
            }
        }
        let moved = async { progress.wait_for(|progress| head > 0 && progress.head > head).await.is_ok() };
        tokio::select! {
            () = backoff.pause() => {},
            _ = moved => return false,
        }
    }
}

/// The swap.
fn put(shared: &Shared, response: v1::GetTableResponse, origin: TableOrigin, compiled: Arc<CompiledTable>) {
    let active = shared.table.borrow().clone();
    // The same table again: routes see that nothing changed.
    let compiled = match active {
        Some(active) if active.compiled.digest == compiled.digest => active.compiled.clone(),
        _ => compiled,
    };
    let (generation, applied_ms) = (response.generation, response.applied_ms);
    tracing::info!(generation, digest = response.digest, origin = origin_of(origin).as_str_name(), "a routing table is in force");
    shared.local.send_modify(|local| local.table = Some(Arc::new(response)));
    shared.table.send_replace(Some(Arc::new(ActiveTable { generation, applied_ms, origin, compiled })));
}

async fn store_copy(shared: &Shared, snapshot: Snapshot) {
    let state = shared.config.state.clone();
    let failed = match spawn_blocking(move || cache::store(&state, &snapshot)).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(error) => Some(error.to_string()),
    };
    let reason = failed.map(|error| format!("the copy of the routing table cannot be written, so no start without the broker: {error}"));
    shared.wait_for("table copy", reason);
}
