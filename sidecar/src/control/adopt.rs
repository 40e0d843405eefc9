//! Takes new tables into force: reads and verifies them, compiles the part that this sidecar runs, all off the async threads, creates its topics, and
//! swaps one pointer. The whole was checked by whoever applied it, and is compiled here only when somebody asks about the routes of others
//! ([`Shared::whole`]).
//!
//! Invariant: a table that cannot be read or compiled changes nothing but the status: the last good one stays.
//! Invariant: a sidecar that starts falls back as one that runs does: to the newest generation that is good, then to its copies on disk, the newest
//! good one first.
//! Invariant: the generation in force here never goes back, but from a canary that was aborted to the newest one that is meant for all.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use bytes::Bytes;
use mesh_routing::{CompiledTable, load_part, load_stored, part_of};
use tokio::{task::spawn_blocking, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    CACHE_AFTER, StartError, cache,
    rollout::{self, Rollout},
    snapshot::{Snapshot, SnapshotError},
    state::{Backoff, Local, Progress, Shared, Taken, now_ms, origin_of},
    topics,
};
use crate::{
    broker::BrokerErrorKind,
    config::Config,
    table::{ActiveTable, TableOrigin},
};

/// A table that the config pins.
#[derive(Debug)]
pub(super) struct Pinned {
    compiled: Arc<CompiledTable>,
    taken: Taken,
}

impl Pinned {
    /// Reads, checks and compiles the file.
    pub(super) async fn load(path: &Path, mesh: &str) -> Result<Self, StartError> {
        let (path, mesh) = (path.to_owned(), mesh.to_owned());
        spawn_blocking(move || {
            let text = std::fs::read_to_string(&path).map_err(|error| StartError::Read { path: path.clone(), error })?;
            let loaded = mesh_routing::load_with_parts(&path.display().to_string(), &text);
            let (table, compiled, parts) = loaded.map_err(|faults| StartError::Faults { path: path.clone(), faults })?;
            if table.mesh != mesh {
                return Err(StartError::Mesh { path, found: table.mesh, expected: mesh });
            }
            let snapshot =
                Snapshot::new(&mesh, 0, now_ms(), "", parts).map_err(|error| StartError::Pack { path, error: error.to_string() })?;
            let taken = Taken { snapshot: Arc::new(snapshot), origin: TableOrigin::Pinned };
            Ok(Self { compiled: Arc::new(compiled), taken })
        })
        .await?
    }
}

/// Puts the pinned table in force, and creates its topics as soon as the broker is there.
pub(super) async fn run_pinned(shared: Arc<Shared>, pinned: Pinned, stop: CancellationToken) {
    stop.run_until_cancelled(async {
        let Pinned { compiled, taken } = pinned;
        let table = compiled.clone();
        let mut ensured = std::pin::pin!(ensure_topics(&shared, &table, 0));
        let in_time = timeout(CACHE_AFTER, &mut ensured).await.is_ok();
        put(&shared, taken, compiled, Verdict::default());
        shared.ready.send_replace(true);
        if !in_time {
            ensured.await;
        }
    })
    .await;
}

/// Follows the log until the token is cancelled.
pub(super) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let copy = load_copy(&shared).await;
    let mut progress = shared.progress.subscribe();
    let caught_up = timeout(CACHE_AFTER, progress.wait_for(|progress| progress.caught_up));
    match stop.run_until_cancelled(caught_up).await {
        None => return,
        Some(Ok(_)) => {}
        Some(Err(_)) => {
            if let Some(copy) = &copy {
                use_copy(&shared, copy, Verdict::default());
                shared.ready.send_replace(true);
            }
        }
    }
    let (mut first, mut stored) = (true, None);
    loop {
        let (judged, over) = {
            let local = shared.local.borrow();
            (local.judged, local.judged_over)
        };
        let is_news = |now: &Progress| first || now.head > judged || (now.head == judged && now.over != over);
        let now = match stop.run_until_cancelled(progress.wait_for(|now| now.caught_up && is_news(now))).await {
            Some(Ok(now)) => *now,
            // Stopped; the sender is never gone, it is in `shared`.
            None | Some(Err(_)) => return,
        };
        let Some(taken) = stop.run_until_cancelled(judge(&shared, now, copy.as_ref())).await else { return };
        let Judged::Done(taken) = taken else { continue };
        first = false;
        if shared.table.borrow().as_ref().is_none_or(|active| active.origin != TableOrigin::Cache) {
            // What was wrong with the copies does not matter any more.
            shared.wait_for(COPY, None);
        }
        shared.ready.send_replace(true);
        // Not cancelled: a stop waits for the milliseconds that the disk takes.
        if let Some(taken) = taken {
            stored = store_copy(&shared, taken, stored).await;
        }
    }
}

/// The subject of what is wrong with the copies on disk.
const COPY: &str = "table copy";

/// A copy on disk, compiled: one that this version cannot run is none.
struct Copy {
    snapshot: Arc<Snapshot>,
    compiled: Arc<CompiledTable>,
}

async fn load_copy(shared: &Shared) -> Option<Copy> {
    let (config, chosen) = (shared.config.clone(), rollout::chosen(shared));
    let load = move || {
        let mut refused = Vec::new();
        for name in [cache::FILE, cache::PREVIOUS].into_iter().chain(cache::OLDER) {
            match load_file(&config, name, &chosen) {
                Ok(None) => {}
                Ok(found) => return (found, refused),
                Err(reason) => refused.push(reason),
            }
        }
        (None, refused)
    };
    let (copy, refused) = spawn_blocking(load).await.unwrap_or_else(|error| (None, vec![error.to_string()]));
    if !refused.is_empty() {
        let instead = match &copy {
            Some(copy) => format!("generation {}, the copy before it, takes its place", copy.snapshot.generation),
            None => "there is no table without the mesh".to_owned(),
        };
        shared.wait_for(COPY, Some(format!("the copy of the routing table on disk is refused, {instead}: {}", refused.join("; "))));
    }
    copy
}

/// Reads and compiles a copy; `None` if there is none. The error is the reason in words, with the file. `chosen` tells whether a channel is meant for
/// this instance: its labels may have changed since.
fn load_file(config: &Config, name: &str, chosen: &impl Fn(&str) -> bool) -> Result<Option<Copy>, String> {
    let loaded = cache::load(&config.state, name, &config.mesh, &config.control.trusted_keys).map_err(|error| error.to_string())?;
    let Some(snapshot) = loaded else { return Ok(None) };
    if !chosen(&snapshot.channel) {
        return Err(format!("{}: it is a {}, which this instance is none of", config.state.join(name).display(), snapshot.channel));
    }
    let snapshot = Arc::new(snapshot);
    let compiled = compile(config, &snapshot).map_err(|reason| format!("{}: {reason}", config.state.join(name).display()))?;
    Ok(Some(Copy { snapshot, compiled: Arc::new(compiled) }))
}

/// Takes the copy on disk into force.
fn use_copy(shared: &Shared, copy: &Copy, verdict: Verdict) {
    tracing::warn!(generation = copy.snapshot.generation, "the routing table comes from the copy on disk");
    let taken = Taken { snapshot: copy.snapshot.clone(), origin: TableOrigin::Cache };
    put(shared, taken, copy.compiled.clone(), verdict);
}

/// What was found about the newest generation.
#[derive(Debug, Default)]
struct Verdict {
    /// How far the log was read.
    judged: Progress,
    /// The generation that this instance ought to run.
    target: u64,
    /// Why that is refused; `None` if it is not.
    refused: Option<String>,
    /// The newest generation, if it is a canary.
    rollout: Option<Arc<Rollout>>,
    /// The digests of the generations that were read.
    digests: Vec<(u64, String)>,
    /// The newest generation that is meant for all: older ones matter to nobody.
    stable: u64,
}

impl Verdict {
    fn say(self, local: &mut Local) {
        (local.judged, local.judged_over, local.target) = (self.judged.head, self.judged.over, self.target);
        (local.refused, local.rollout) = (self.refused, self.rollout);
        local.digests.extend(self.digests);
        local.digests.retain(|generation, _| *generation >= self.stable);
    }
}

/// What is to be copied to the disk.
struct ToStore {
    snapshot: Arc<Snapshot>,
    /// The same, packed.
    record: Bytes,
}

/// How a judgement ended.
enum Judged {
    /// With a verdict, and with what is to be copied to the disk.
    Done(Option<ToStore>),
    /// A newer generation came meanwhile: it is judged next.
    Superseded,
}

/// Takes the newest good generation up to the head into force, of those that this instance may run, if it is newer than what is.
async fn judge(shared: &Shared, now: Progress, copy: Option<&Copy>) -> Judged {
    let head = now.head;
    let active = shared.table.borrow().clone();
    let settled = active.as_ref().is_some_and(|active| active.origin == TableOrigin::Mesh);
    let floor = active.as_ref().map_or_else(|| copy.map_or(0, |copy| copy.snapshot.generation), |active| active.generation);
    let behind = (head < floor).then(|| {
        format!(
            "the mesh's control topic knows generation {head} only, this sidecar had generation {floor} and keeps it: \
             apply the table again"
        )
    });
    shared.wait_for("generation", behind);

    let me = shared.member();
    let (candidates, target, stable) = shared.log(|log| {
        // Under a canary that is over there is no floor.
        let floor = if log.may_run(floor, &me) { floor } else { 0 };
        let newer = |generation: &u64| *generation > floor || (*generation == floor && !settled);
        let candidates = log.generations().skip_while(|generation| *generation > head);
        let candidates: Vec<u64> = candidates.filter(|generation| log.may_run(*generation, &me)).take_while(newer).collect();
        (candidates, log.target(&me), log.stable())
    });
    let mut verdict = Verdict { judged: now, target, stable, rollout: learn(shared, head).await, ..Verdict::default() };
    if let Some(rollout) = &verdict.rollout {
        verdict.digests.push((head, rollout.entry.digest.clone()));
    }
    for generation in candidates {
        match prepare(shared, generation).await {
            Ok((copy, compiled)) => {
                let snapshot = &copy.snapshot;
                verdict.digests.push((generation, snapshot.digest.clone()));
                // What was there for the table before is there.
                let same = active.as_ref().is_some_and(|active| active.compiled.topics == compiled.topics);
                let there = same && settled && !shared.waits_for(TOPICS);
                if !there && !ensure_topics(shared, &compiled, head).await {
                    return Judged::Superseded;
                }
                if verdict.rollout.as_ref().is_some_and(|rollout| rollout.entry.generation == generation) {
                    rollout::begin(shared, generation);
                }
                let taken = Taken { snapshot: snapshot.clone(), origin: TableOrigin::Mesh };
                put(shared, taken, Arc::new(compiled), verdict);
                return Judged::Done(Some(copy));
            }
            Err(reason) => {
                tracing::error!(generation, reason, "the routing table is refused, and the last good one stays in force");
                if generation == target {
                    verdict.refused = Some(reason);
                }
            }
        }
    }
    match copy.filter(|_| active.is_none()) {
        Some(copy) => use_copy(shared, copy, verdict),
        None => shared.local.send_modify(|local| verdict.say(local)),
    }
    Judged::Done(None)
}

/// What is told of the newest generation, if it is a canary. `None` also where its record cannot be read: those that it chooses refuse it then.
async fn learn(shared: &Shared, head: u64) -> Option<Arc<Rollout>> {
    let winner = shared.log(|log| log.winner(head).filter(|winner| winner.is_canary()).cloned())?;
    let config = shared.config.clone();
    let read = spawn_blocking(move || {
        let snapshot = Snapshot::read(&winner, &config.mesh, head).ok()?;
        snapshot.verify(&config.control.trusted_keys).ok()?;
        Some(Arc::new(Rollout::new(&snapshot)))
    });
    read.await.ok().flatten()
}

/// Reads, verifies and compiles a generation. The error is the reason in words.
async fn prepare(shared: &Shared, generation: u64) -> Result<(ToStore, CompiledTable), String> {
    let winner = shared.log(|log| log.winner(generation).cloned()).ok_or("its record was deleted")?;
    let config = shared.config.clone();
    spawn_blocking(move || {
        let snapshot = Snapshot::read(&winner, &config.mesh, generation).map_err(|error| error.to_string())?;
        snapshot.verify(&config.control.trusted_keys).map_err(|error| error.to_string())?;
        let snapshot = Arc::new(snapshot);
        let compiled = compile(&config, &snapshot)?;
        Ok((ToStore { snapshot, record: winner.value }, compiled))
    })
    .await
    .map_err(|error| format!("it could not be compiled: {error}"))?
}

/// Compiles the part that this sidecar runs.
fn compile(config: &Config, snapshot: &Arc<Snapshot>) -> Result<CompiledTable, String> {
    let (name, mesh) = (format!("generation {}", snapshot.generation), &config.mesh);
    let own: BTreeSet<u8> = config.services.iter().map(|service| part_of(&service.name)).collect();
    let compiled = match snapshot.parts(|part| own.contains(&part)) {
        Ok((parts, more)) => {
            let (serves, all) = (|service: &str| config.service(service).is_some(), snapshot.clone());
            load_part(&name, &snapshot.digest, &parts, more, serves, Box::new(move || all.parts(|_| true).ok().map(|(all, _)| all)))
        }
        // What is not plainly a table is told with all its faults.
        Err(SnapshotError::NoTable) => load_stored(&name, &snapshot.table().map_err(|error| error.to_string())?, &snapshot.digest),
        Err(error) => return Err(error.to_string()),
    };
    let compiled = compiled.map_err(|faults| faults.to_string())?;
    if *compiled.mesh != **mesh {
        return Err(format!("the table is of mesh {:?}, and this sidecar belongs to mesh {mesh:?}", compiled.mesh));
    }
    Ok(compiled)
}

/// The subject of topics that are missing.
const TOPICS: &str = "topics";

/// Creates the topics that are missing. Waits for a broker that is away; `false` if a newer generation came meanwhile.
async fn ensure_topics(shared: &Shared, compiled: &CompiledTable, head: u64) -> bool {
    let mut progress = shared.progress.subscribe();
    let mut backoff = Backoff::new();
    loop {
        match topics::ensure(&*shared.broker.admin(), compiled).await {
            Ok(plan) => {
                for differs in plan.differs {
                    tracing::warn!("{differs}");
                }
                shared.wait_for(TOPICS, None);
                return true;
            }
            Err(error) => {
                let passes = error.kind == BrokerErrorKind::Unreachable;
                shared.wait_for(TOPICS, Some(format!("the topics of the routing table cannot be created: {error}")));
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

/// The swap. Whoever sees the verdict sees the table too.
fn put(shared: &Shared, taken: Taken, compiled: Arc<CompiledTable>, verdict: Verdict) {
    let active = shared.table.borrow().clone();
    // The same table again: routes see that nothing changed.
    let compiled = match active {
        Some(active) if active.compiled.digest == compiled.digest => active.compiled.clone(),
        _ => compiled,
    };
    let (Snapshot { generation, applied_ms, digest, .. }, origin) = (&*taken.snapshot, taken.origin);
    let (generation, applied_ms) = (*generation, *applied_ms);
    tracing::info!(generation, digest, origin = origin_of(origin).as_str_name(), "a routing table is in force");
    shared.table.send_replace(Some(Arc::new(ActiveTable { generation, applied_ms, origin, compiled })));
    shared.local.send_modify(|local| {
        local.table = Some(Arc::new(taken));
        verdict.say(local);
    });
}

/// `last` is the copy that was stored before; gives the one that is stored now.
async fn store_copy(shared: &Shared, copy: ToStore, last: Option<cache::Stored>) -> Option<cache::Stored> {
    let config = shared.config.clone();
    let store = move || cache::store(&config.state, &copy.snapshot, &copy.record, &config.control.trusted_keys, last.as_ref());
    let (stored, failed) = match spawn_blocking(store).await {
        Ok(Ok(stored)) => (stored, None),
        Ok(Err(error)) => (None, Some(error.to_string())),
        Err(error) => (None, Some(error.to_string())),
    };
    let reason = failed.map(|error| format!("the copy of the routing table cannot be written, so no start without the broker: {error}"));
    shared.wait_for(COPY, reason);
    stored
}
