//! Checks a table, and proposes it to the mesh.
//!
//! Invariant: nothing is proposed that this sidecar could not run itself, or that it does not trust.
//! Invariant: the answer is what the log says. A proposal whose acknowledgement is lost is looked for in the log, not sent again; and what was true
//! when it was made counts for nothing where the log says otherwise.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_proto::v1;
use mesh_routing::{
    CompiledTable, Fault, Faults, Parts, RouteFields, Table,
    channel::{Channel, Selector},
    count_routes,
    sign::Signed,
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, timeout, timeout_at},
    try_join,
};

use super::{
    Control, history,
    log::{Fate, Winner, promotion_id, proposal_key},
    report, rollout,
    snapshot::{About, Limits, Snapshot},
    state::now_ms,
    topics::{self, CONTROL_TOPIC, Plan, RouteBacklog},
    trust::{self, Seal, TrustError},
};
use crate::{
    broker::{BrokerError, BrokerErrorKind, NewTopic, Outgoing, ProduceError, ProduceErrorKind},
    record::{Record, TopicPartition},
};

/// How long an apply waits for the control topic to be read to its end.
const CATCH_UP: Duration = Duration::from_secs(8);
/// How long each question to the broker may take.
const BROKER: Duration = Duration::from_secs(15);
/// How long the creation of all topics may take.
const CREATION: Duration = Duration::from_secs(45);
/// How long the counting of backlogs may take: it is a courtesy.
const COUNTING: Duration = Duration::from_secs(10);
/// How long the proposal may take to come back from the log.
const READ_BACK: Duration = Duration::from_secs(30);
/// How long the answer waits for this sidecar itself to take the table into force.
const ADOPTION: Duration = Duration::from_secs(5);

/// How to apply.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ApplyOptions {
    /// Apply only if this generation is in force.
    pub expected_generation: Option<u64>,
    /// Check everything, and apply nothing.
    pub dry_run: bool,
    /// The signature, made for the next generation after the one that is in force.
    pub signature: Option<v1::TableSignature>,
    /// Who applies it, as they say.
    pub applied_by: String,
    /// Why, in their words.
    pub message: String,
    /// The generation whose content it is, in a rollback.
    pub rollback_to: Option<u64>,
    /// Only some instances run it at first.
    pub canary: Option<CanaryOptions>,
    /// The open canary whose table this is: all run it from now on.
    pub promotes: Option<u64>,
}

/// Who runs a table before all do, and when that is ended.
#[derive(Clone, Debug, PartialEq)]
pub struct CanaryOptions {
    /// Who.
    pub selector: Selector,
    /// The dead letters that its instances may have together since they took it; one more aborts it.
    pub max_dead_letters: u64,
    /// The instances that may refuse it; one more aborts it.
    pub max_refusals: u64,
}

/// A table without faults.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// Its digest.
    pub digest: String,
    /// What deserves a look.
    pub warnings: Vec<Fault>,
}

/// What apply did.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The generation that carries the table; in a dry run the one in force.
    pub generation: u64,
    /// The table's digest.
    pub digest: String,
    /// Whether there is a new generation.
    pub changed: bool,
    /// What deserves a look.
    pub warnings: Vec<Fault>,
    /// What the routes that are new will begin with.
    pub new_routes: Vec<RouteBacklog>,
    /// The changes from the table that was in force, one a line; then the topics that were missing.
    pub changes: Vec<String>,
}

/// Why a table was not applied. The last good one stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The table has faults.
    #[error("the table has faults:\n{0}")]
    Faults(#[from] Faults),
    /// This sidecar's config pins its table.
    #[error(
        "this sidecar runs the table that its config pins ({path}) and takes part in no apply: \
         change that file and restart, or remove `table.file` from its config", path = path.display()
    )]
    Pinned {
        /// The file.
        path: PathBuf,
    },
    /// Another generation is in force.
    #[error(
        "generation {expected} is expected to be in force, but generation {actual} is{}: look at it (`get`, `diff`) and apply again{}",
        by(winner),
        listed(changes)
    )]
    Expected {
        /// What the caller expects.
        expected: u64,
        /// What is in force.
        actual: u64,
        /// Who applied that, and why, in words; empty if that is not known.
        winner: String,
        /// What it changed from what was expected, one a line; not all of it if it is much.
        changes: Vec<String>,
    },
    /// Somebody else applied at the same time, and came first.
    #[error(
        "generation {generation} was applied by {winner} at the same time, and came first: look at it (`get`, `diff`) and apply again{}",
        listed(changes)
    )]
    Lost {
        /// The generation that both proposed.
        generation: u64,
        /// Who applied the other one, through which instance, and why, in words.
        winner: String,
        /// What it changed, one a line; not all of it if it is much.
        changes: Vec<String>,
    },
    /// A canary is open.
    #[error(
        "generation {generation} is being rolled out to {selector}: end that first, with `mesh-ctl rollout promote` or `mesh-ctl rollout abort`"
    )]
    Open {
        /// Its generation.
        generation: u64,
        /// Who runs it.
        selector: String,
    },
    /// What is to be promoted is no open canary, or another table.
    #[error("generation {generation} cannot be promoted: {problem}")]
    NotOpen {
        /// The generation.
        generation: u64,
        /// Why not.
        problem: String,
    },
    /// The canary that it promotes was aborted before it came to the log.
    #[error("nothing was promoted: the rollout was aborted meanwhile: generation {generation} was {how}")]
    Ended {
        /// The canary.
        generation: u64,
        /// By whom, when and why, in words.
        how: String,
    },
    /// It is not signed as this sidecar's config wants it.
    #[error("the table is refused: {0}")]
    Untrusted(#[from] TrustError),
    /// The control topic cannot be read, so what is in force is not known.
    #[error("the state of the mesh cannot be read: {0}")]
    NotReady(String),
    /// The broker failed before anything was proposed.
    #[error("nothing was applied: {0}")]
    Broker(#[from] BrokerError),
    /// The broker refused the proposal.
    #[error("the broker refused the table: {0}")]
    Refused(ProduceError),
    /// No answer came in time: the table may be in force, or come in force later.
    #[error("it is not known whether generation {generation} was applied: {detail}. Look with `get` or `status` before trying again")]
    Unclear {
        /// The generation.
        generation: u64,
        /// What happened.
        detail: String,
    },
    /// A fault of this program.
    #[error("internal error: {0}")]
    Internal(String),
}

/// A table, checked and compiled.
pub(super) struct Candidate {
    table: Table,
    pub(super) compiled: CompiledTable,
    parts: Parts,
    warnings: Vec<Fault>,
}

/// The table in force in the mesh: the newest that is meant for all.
struct InForce {
    /// The generation that the next one follows: its own, or that of a canary since; 0: there is none.
    generation: u64,
    /// Its generation.
    stable: u64,
    /// The canary that is open.
    canary: Option<Winner>,
    /// How the newest generation ended, if it is a canary that was aborted.
    aborted: Option<String>,
    /// Its digest, if its record can be read and is trusted.
    digest: Option<String>,
    /// The name of the key that signed it.
    signed_by: Option<String>,
    table: Option<Table>,
}

impl Control {
    /// Checks a table.
    ///
    /// # Errors
    /// [`ApplyError::Faults`] with all its faults.
    pub async fn validate(&self, file: &str, text: &str) -> Result<Checked, ApplyError> {
        let candidate = self.check(file, text).await?;
        Ok(Checked { digest: candidate.compiled.digest.to_string(), warnings: candidate.warnings })
    }

    /// Applies a table to the whole mesh: creates its topics, proposes it as the next generation, and reads back who won. Returns once
    /// this sidecar runs it, or after a few seconds more.
    ///
    /// When the future is dropped, the proposal may have been made: the log says so.
    ///
    /// # Errors
    /// See [`ApplyError`]; in every case but [`ApplyError::Unclear`] nothing was applied.
    pub async fn apply(&self, file: &str, text: &str, options: ApplyOptions) -> Result<Applied, ApplyError> {
        if let Some(path) = &self.0.config.table {
            return Err(ApplyError::Pinned { path: path.clone() });
        }
        let _one_at_a_time = self.0.applying.acquire().await.map_err(|error| ApplyError::Internal(error.to_string()))?;
        let in_force = async {
            self.catch_up().await?;
            self.in_force().await
        };
        // Faults are told at once, whatever the broker does.
        let (mut candidate, in_force) = try_join!(self.check(file, text), in_force)?;
        // Where a canary was aborted, the one before it is in force.
        let expected = |generation: u64| generation == in_force.generation || (in_force.aborted.is_some() && generation == in_force.stable);
        if let Some(expected) = options.expected_generation.filter(|generation| !expected(*generation)) {
            return Err(self.unexpected(expected, in_force).await);
        }
        self.check_rollout(&in_force, &options, &candidate).await?;
        let channel = options.canary.as_ref().map_or(Channel::Stable, |canary| Channel::Canary(canary.selector.clone()));
        let digest = candidate.compiled.digest.to_string();
        let key = options.signature.as_ref().map(|signature| signature.key_id.clone());
        // The same table signed by another key is news: so are keys rotated.
        let signed_anew = key.is_some() && key != in_force.signed_by;
        let differs = in_force.digest.as_deref() != Some(&*digest);
        let changed = differs || signed_anew;
        let next = in_force.generation.checked_add(1).ok_or_else(|| ApplyError::Internal("no generation is left".into()))?;
        let seal = options.signature.as_ref().map(Seal::from);
        if changed {
            let channel = channel.to_string();
            let signed = Signed { mesh: &self.0.config.mesh, channel: &channel, generation: next, digest: &digest };
            match trust::check(&self.0.config.control.trusted_keys, &signed, seal.as_ref()) {
                Ok(()) => {}
                // Whoever has no key may still see what would be done.
                Err(error @ TrustError::Unsigned { .. }) if options.dry_run => {
                    candidate.warnings.push(Fault { message: format!("it would be refused: {error}"), ..fault(file, "", "unsigned") })
                }
                Err(error) => return Err(error.into()),
            }
        }

        let admin = self.0.broker.admin();
        let existing = within(BROKER, "the topics", admin.topics()).await?;
        let plan = topics::plan(&candidate.compiled, &existing);
        warn_of_topics(file, &plan, &mut candidate.warnings);
        let mut changes = self.changes(&in_force, &candidate);
        if let Some(key) = key.filter(|_| signed_anew) {
            let before =
                in_force.signed_by.as_deref().map_or_else(|| "nobody".to_owned(), |key| format!("key {}", history::clean(key, 32)));
            changes.push(format!("~ signed by {before} → key {key}"));
        }
        changes.extend(plan.create.iter().map(|topic| created(topic, options.dry_run)));
        let new_routes = if differs { self.backlogs(file, &existing, &in_force, &mut candidate).await } else { Vec::new() };

        if let Channel::Canary(selector) = &channel {
            let chosen = report::mesh(&self.0).instances.iter().any(|instance| report::is_chosen(instance, selector));
            if !chosen {
                candidate.warnings.push(Fault {
                    message: format!("no instance is chosen by {selector}: nobody runs this table until one is, or it is promoted"),
                    hint: "`mesh-ctl status -o json` has the services and labels of all instances".into(),
                    ..fault(file, "", "canary_chooses_nobody")
                });
            }
        }

        let mut generation = in_force.stable;
        if !options.dry_run {
            within(CREATION, "the creation of topics", topics::create(&*admin, &plan.create)).await?;
            if changed {
                generation = next;
                let counts = in_force.table.as_ref().map(|before| count_routes(before, &candidate.table));
                let about = About {
                    by: options.applied_by,
                    source: file.to_owned(),
                    message: options.message,
                    rollback_to: options.rollback_to,
                    routes: counts
                        .or_else(|| Some(count_routes(&self.empty_table(), &candidate.table)).filter(|_| in_force.generation == 0)),
                    limits: options.canary.as_ref().map_or_else(Limits::default, |canary| Limits {
                        dead_letters: canary.max_dead_letters,
                        refusals: canary.max_refusals,
                    }),
                    promotes: options.promotes,
                };
                let (mesh, writer, parts) = (self.0.config.mesh.clone(), self.0.instance.clone(), candidate.parts);
                let (text, about) = (channel.to_string(), about.bounded());
                let pack = move || {
                    let snapshot = Snapshot::new(&mesh, generation, now_ms(), &writer, parts)?;
                    Snapshot { signature: seal, about, channel: text, ..snapshot }.pack()
                };
                let packed = spawn_blocking(pack).await.map_err(|error| ApplyError::Internal(error.to_string()))?;
                let value = packed.map_err(|error| ApplyError::Internal(error.to_string()))?;
                self.propose(generation, &channel, value, options.promotes.is_some(), in_force.table).await?;
                let mut local = self.0.local.subscribe();
                // Not waiting longer is no error: status tells how far each instance is.
                timeout(ADOPTION, local.wait_for(|local| local.judged >= generation)).await.map(drop).unwrap_or_default();
            }
        }
        let changed = changed && !options.dry_run;
        Ok(Applied { generation, digest, changed, warnings: candidate.warnings, new_routes, changes })
    }

    pub(super) async fn check(&self, file: &str, text: &str) -> Result<Candidate, ApplyError> {
        let (file, text, mesh) = (file.to_owned(), text.to_owned(), self.0.config.mesh.clone());
        spawn_blocking(move || {
            let (table, compiled, parts) = mesh_routing::load_with_parts(&file, &text)?;
            if table.mesh != *mesh {
                return Err(Faults(vec![Fault {
                    message: format!("the table is of mesh {:?}, and this sidecar belongs to mesh {mesh:?}", table.mesh),
                    hint: "correct the name, or talk to a sidecar of the other mesh (--admin)".into(),
                    ..fault(&file, "metadata.mesh", mesh_routing::fault::code::CONFLICT)
                }])
                .into());
            }
            let mut warnings = table.warnings();
            for warning in &mut warnings {
                warning.file.clone_from(&file);
            }
            Ok(Candidate { table, compiled, parts, warnings })
        })
        .await
        .map_err(|error| ApplyError::Internal(error.to_string()))?
    }

    /// Waits until the log was read as far as it reaches now.
    pub(super) async fn catch_up(&self) -> Result<(), ApplyError> {
        let not_ready = || {
            let reasons = self.0.waiting_reasons().join("; ");
            ApplyError::NotReady(if reasons.is_empty() { format!("{CONTROL_TOPIC} was not read to its end in time") } else { reasons })
        };
        let mut progress = self.0.progress.subscribe();
        let wait = timeout(CATCH_UP, progress.wait_for(|progress| progress.caught_up)).await;
        if !wait.is_ok_and(|progress| progress.is_ok()) {
            return Err(not_ready());
        }
        // Somebody may have deleted it since.
        within(BROKER, "the control topic", topics::ensure_own(&*self.0.broker.admin())).await?;
        let partition = TopicPartition::new(CONTROL_TOPIC, 0);
        let (_, end) = within(BROKER, "the end of the control topic", self.0.broker.admin().watermarks(&partition)).await?;
        let wait = timeout(CATCH_UP, progress.wait_for(|progress| progress.next_offset >= end)).await;
        if wait.is_ok_and(|progress| progress.is_ok()) { Ok(()) } else { Err(not_ready()) }
    }

    /// Whether the canary that is open, or that none is, allows what is asked for.
    async fn check_rollout(&self, in_force: &InForce, options: &ApplyOptions, candidate: &Candidate) -> Result<(), ApplyError> {
        match (options.promotes, &in_force.canary) {
            (None, None) => Ok(()),
            (None, Some(open)) => {
                let selector = open.channel.as_ref().map_or_else(|| "instances of a newer version".to_owned(), Channel::to_string);
                Err(ApplyError::Open { generation: in_force.generation, selector })
            }
            (Some(generation), None) => {
                let problem = match &in_force.aborted {
                    Some(aborted) if generation == in_force.generation => format!("it was {aborted}"),
                    Some(_) | None => "it is no canary that is open".to_owned(),
                };
                Err(ApplyError::NotOpen { generation, problem })
            }
            (Some(generation), Some(_)) if generation != in_force.generation => {
                Err(ApplyError::NotOpen { generation, problem: format!("generation {} is the canary that is open", in_force.generation) })
            }
            (Some(generation), Some(open)) => {
                let value = open.value.clone();
                let read = spawn_blocking(move || Snapshot::unpack(&value)?.table_digest()).await;
                let problem = match read.map_err(|error| ApplyError::Internal(error.to_string()))? {
                    Ok(digest) if digest == *candidate.compiled.digest => return Ok(()),
                    Ok(_) => "the table is another one than the canary's".to_owned(),
                    Err(error) => error.to_string(),
                };
                Err(ApplyError::NotOpen { generation, problem })
            }
        }
    }

    async fn in_force(&self) -> Result<InForce, ApplyError> {
        let (head, in_log, winner, canary, aborted) = self.0.log(|log| {
            let aborted = log.aborted(log.head()).map(rollout::said);
            let canary = log.canary().map(|(_, canary)| canary.clone());
            (log.head(), log.stable(), log.winner(log.stable()).cloned(), canary, aborted)
        });
        let local = self.0.local.borrow().table.clone();
        // A copy on disk may be ahead of a control topic that was lost: generations grow all the same.
        let ahead = local.as_ref().map_or(0, |here| here.snapshot.generation).max(head) > head;
        // Where the mesh's cannot be read, the last good one here stands for it; a canary does not.
        let local = local.filter(|here| ahead || here.snapshot.generation <= in_log);
        let generation = local.as_ref().map_or(0, |here| here.snapshot.generation).max(head);
        let stable = if ahead { generation } else { in_log };
        let config = self.0.config.clone();
        spawn_blocking(move || {
            let snapshot = winner.filter(|_| !ahead).and_then(|winner| Snapshot::read(&winner, &config.mesh, stable).ok());
            let snapshot = snapshot.filter(|snapshot| snapshot.verify(&config.control.trusted_keys).is_ok());
            let digest = snapshot.as_ref().and_then(|snapshot| snapshot.table_digest().ok());
            let signed_by = snapshot.as_ref().and_then(|snapshot| Some(snapshot.signature.as_ref()?.key.clone()));
            let read = |snapshot: &Snapshot| mesh_routing::parse("the table in force", &snapshot.table().ok()?).ok();
            let table = snapshot.as_ref().and_then(read).or_else(|| read(&local?.snapshot));
            InForce { generation, stable, canary, aborted, digest, signed_by, table }
        })
        .await
        .map_err(|error| ApplyError::Internal(error.to_string()))
    }

    fn changes(&self, in_force: &InForce, candidate: &Candidate) -> Vec<String> {
        let none = self.empty_table();
        let changes = mesh_routing::diff(in_force.table.as_ref().unwrap_or(&none), &candidate.table);
        changes.iter().map(ToString::to_string).collect()
    }

    /// What a mesh has before its first table.
    fn empty_table(&self) -> Table {
        Table { mesh: self.0.config.mesh.to_string(), topics: BTreeMap::new(), defaults: RouteFields::default(), routes: Vec::new() }
    }

    /// Another generation is in force than expected: who applied it, and what it changed.
    async fn unexpected(&self, expected: u64, in_force: InForce) -> ApplyError {
        let actual = in_force.generation;
        let (winner, base) = self.0.log(|log| (log.winner(actual).cloned(), log.winner(expected).cloned()));
        let base = base.filter(|_| expected < actual);
        let read = spawn_blocking(move || {
            let snapshot = winner.and_then(|winner| Snapshot::unpack(&winner.value).ok());
            let winner = snapshot.map(|snapshot| history::who(&snapshot)).unwrap_or_default();
            let base = base.and_then(|base| Snapshot::unpack(&base.value).ok());
            let base = base.and_then(|base| mesh_routing::parse("the table that was expected", &base.table().ok()?).ok());
            (winner, history::changed_lines(base.as_ref(), in_force.table.as_ref()))
        });
        // Without them the conflict is still one.
        let (winner, changes) = read.await.unwrap_or_default();
        ApplyError::Expected { expected, actual, winner, changes }
    }

    /// Somebody else's proposal won: who made it, and what it changed.
    async fn lost(&self, generation: u64, winner: Winner, before: Option<Table>) -> ApplyError {
        let none = self.empty_table();
        let read = spawn_blocking(move || {
            let snapshot = Snapshot::unpack(&winner.value).ok()?;
            let after = snapshot.table().ok().and_then(|table| mesh_routing::parse("the winner's table", &table).ok());
            let before = before.or_else(|| Some(none).filter(|_| generation == 1));
            Some((history::who(&snapshot), history::changed_lines(before.as_ref(), after.as_ref())))
        });
        let (winner, changes) = read.await.ok().flatten().unwrap_or_else(|| ("somebody".to_owned(), Vec::new()));
        ApplyError::Lost { generation, winner, changes }
    }

    async fn backlogs(
        &self,
        file: &str,
        existing: &BTreeMap<String, i32>,
        in_force: &InForce,
        candidate: &mut Candidate,
    ) -> Vec<RouteBacklog> {
        let admin = self.0.broker.admin();
        let before = in_force.table.as_ref();
        let groups = before.iter().flat_map(|table| table.routes.iter().map(|route| table.group_of(route).into_owned())).collect();
        let counting = topics::backlogs(&*admin, existing, &groups, &candidate.compiled);
        let detail = match timeout(COUNTING, counting).await {
            Ok(Ok(backlogs)) => return backlogs,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("the broker did not answer within {} s", COUNTING.as_secs()),
        };
        candidate.warnings.push(Fault {
            message: format!("how many records the new routes begin with could not be counted: {detail}"),
            hint: "`start: latest` skips what exists".into(),
            ..fault(file, "spec.routes", "backlog_unknown")
        });
        Vec::new()
    }

    /// Appends the proposal, and waits for the log to say who won.
    async fn propose(
        &self,
        generation: u64,
        channel: &Channel,
        snapshot: Bytes,
        promotes: bool,
        before: Option<Table>,
    ) -> Result<(), ApplyError> {
        let deadline = Instant::now() + READ_BACK;
        let unclear = |detail: &str| ApplyError::Unclear { generation, detail: detail.to_owned() };
        let id = uuid::Uuid::new_v4().simple().to_string();
        // Its canary may end before it comes to the log.
        let id = if promotes { promotion_id(&id) } else { id };
        let key = proposal_key(&self.0.config.mesh, generation, &id, channel);

        let producer = self.0.broker.producer();
        producer.learn_topic(CONTROL_TOPIC, BROKER).await.map_err(ApplyError::Refused)?;
        // What is old is deleted before the proposal, so that the log ends with a record that compaction keeps.
        let topic: Arc<str> = CONTROL_TOPIC.into();
        let outgoing = |key: Bytes, value| Outgoing {
            topic: topic.clone(),
            partition: Some(0),
            record: Record { key: Some(key), value, headers: Vec::new(), timestamp_ms: None },
        };
        let mut records: Vec<Outgoing> = self.0.log(|log| log.deletable()).into_iter().map(|key| outgoing(key, None)).collect();
        records.push(outgoing(key.clone().into(), Some(snapshot)));
        let mut progress = self.0.progress.subscribe();
        let mut acks = producer.send(records);
        let mut acked = false;
        loop {
            match self.0.log(|log| log.fate(generation, key.as_bytes())) {
                Fate::Open => {}
                Fate::Won => return Ok(()),
                Fate::Beaten(winner) => return Err(self.lost(generation, winner, before).await),
                Fate::Ended(abort) => {
                    return Err(ApplyError::Ended { generation: generation.saturating_sub(1), how: rollout::said(&abort) });
                }
            }
            tokio::select! {
                results = &mut acks, if !acked => {
                    acked = true;
                    match results.into_iter().next_back() {
                        Some(Err(error)) if !possibly_stored(error.kind) => return Err(ApplyError::Refused(error)),
                        Some(Err(error)) => tracing::warn!(generation, %error, "no acknowledgement for a proposal: the log will tell"),
                        Some(Ok(_)) | None => {},
                    }
                },
                changed = timeout_at(deadline, progress.changed()) => match changed {
                    Ok(Ok(())) => {},
                    Ok(Err(_)) => return Err(unclear("the control plane stopped")),
                    Err(_) => return Err(unclear("the broker did not give the record back in time")),
                },
            }
        }
    }
}

/// Who applied what is in force, in a sentence.
fn by(winner: &str) -> String {
    if winner.is_empty() { String::new() } else { format!(", applied by {winner}") }
}

/// What somebody else changed, below a sentence.
fn listed(changes: &[String]) -> String {
    changes.iter().map(|change| format!("\n  {change}")).collect()
}

/// Whether a record that was not acknowledged may be stored.
pub(super) fn possibly_stored(kind: ProduceErrorKind) -> bool {
    matches!(kind, ProduceErrorKind::TimedOut | ProduceErrorKind::Fatal)
}

/// Asks the broker, within a deadline.
async fn within<T>(deadline: Duration, what: &str, question: impl Future<Output = Result<T, BrokerError>>) -> Result<T, BrokerError> {
    timeout(deadline, question).await.unwrap_or_else(|_| {
        let detail = format!("the broker did not answer within {} s ({what})", deadline.as_secs());
        Err(BrokerError::new(BrokerErrorKind::Unreachable, detail))
    })
}

fn fault(file: &str, field: impl Into<String>, code: &'static str) -> Fault {
    Fault { file: file.to_owned(), line: 0, column: 0, field: field.into(), message: String::new(), hint: String::new(), code }
}

fn warn_of_topics(file: &str, plan: &Plan, warnings: &mut Vec<Fault>) {
    warnings.extend(plan.differs.iter().map(|differs| Fault {
        message: differs.to_string(),
        hint: "correct the table, or change the topic with the broker's own tools".into(),
        ..fault(file, format!("spec.topics.{}.partitions", differs.topic), "topic_differs")
    }));
}

fn created(topic: &NewTopic, dry_run: bool) -> String {
    let partitions = match topic.partitions {
        Some(1) => "1 partition".to_owned(),
        Some(count) => format!("{count} partitions"),
        None => "the broker's default number of partitions".to_owned(),
    };
    let verb = if dry_run { "would be created" } else { "is created" };
    format!("+ topic {} {verb} with {partitions}", topic.name)
}
