//! What `-o json` and `-o yaml` print: stable names, words instead of numbers.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, UNIX_EPOCH},
};

use mesh_proto::v1;
use serde::Serialize;

/// A fault, or a warning.
#[derive(Debug, Serialize)]
pub(crate) struct Fault {
    pub(crate) file: String,
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) field: String,
    pub(crate) message: String,
    pub(crate) hint: String,
    pub(crate) code: String,
}

impl From<v1::Fault> for Fault {
    fn from(fault: v1::Fault) -> Self {
        let v1::Fault { file, line, column, field, message, hint, code } = fault;
        Self { file, line, column, field, message, hint, code }
    }
}

impl From<mesh_routing::Fault> for Fault {
    fn from(fault: mesh_routing::Fault) -> Self {
        let mesh_routing::Fault { file, line, column, field, message, hint, code } = fault;
        Self { file, line, column, field, message, hint, code: code.to_owned() }
    }
}

/// A file that was checked.
#[derive(Debug, Serialize)]
pub(crate) struct Validated {
    pub(crate) file: String,
    pub(crate) valid: bool,
    pub(crate) routes: usize,
    pub(crate) digest: String,
    pub(crate) faults: Vec<Fault>,
    pub(crate) warnings: Vec<Fault>,
}

/// What apply did.
#[derive(Debug, Serialize)]
pub(crate) struct Applied {
    pub(crate) generation: u64,
    pub(crate) digest: String,
    pub(crate) changed: bool,
    pub(crate) dry_run: bool,
    /// The name of the key that signed it.
    pub(crate) signed_by: Option<String>,
    /// The generation whose content it is, in a rollback.
    pub(crate) rollback_to: Option<u64>,
    /// Who runs it before all do.
    pub(crate) canary: Option<String>,
    /// The canary that it is, for all.
    pub(crate) promotes: Option<u64>,
    pub(crate) changes: Vec<String>,
    pub(crate) new_routes: Vec<Backlog>,
    pub(crate) warnings: Vec<Fault>,
    pub(crate) faults: Vec<Fault>,
}

/// What a new route begins with.
#[derive(Debug, Serialize)]
pub(crate) struct Backlog {
    pub(crate) route: String,
    pub(crate) records: u64,
}

impl Applied {
    pub(crate) fn new(response: v1::ApplyResponse, dry_run: bool) -> Self {
        let backlog = |new: v1::RouteBacklog| Backlog { route: new.route, records: new.records };
        Self {
            generation: response.generation,
            digest: response.digest,
            changed: response.changed,
            dry_run,
            signed_by: None,
            rollback_to: None,
            canary: None,
            promotes: None,
            changes: response.changes,
            new_routes: response.new_routes.into_iter().map(backlog).collect(),
            warnings: response.warnings.into_iter().map(Fault::from).collect(),
            faults: response.faults.into_iter().map(Fault::from).collect(),
        }
    }
}

/// A key that signs tables: its public part.
#[derive(Debug, Serialize)]
pub(crate) struct Key {
    pub(crate) key_id: String,
    pub(crate) public_key: String,
    /// The file of the private key.
    pub(crate) file: String,
}

/// The generations that the mesh keeps.
#[derive(Debug, Serialize)]
pub(crate) struct History {
    pub(crate) mesh: String,
    /// What the next apply builds on.
    pub(crate) generation: u64,
    pub(crate) generations: Vec<Generation>,
}

/// A generation of the history.
#[derive(Debug, Serialize)]
pub(crate) struct Generation {
    pub(crate) generation: u64,
    /// Whether the sidecar that answers runs it.
    pub(crate) in_force: bool,
    pub(crate) digest: String,
    pub(crate) applied: String,
    pub(crate) applied_by: String,
    pub(crate) source: String,
    /// The instance through which it was applied.
    pub(crate) instance: String,
    pub(crate) message: String,
    pub(crate) rollback_to: Option<u64>,
    pub(crate) routes: Option<RouteCounts>,
    pub(crate) signed_by: Option<String>,
    pub(crate) refused: String,
    /// Who runs it before all do.
    pub(crate) canary: Option<String>,
    /// How that was ended.
    pub(crate) aborted: Option<String>,
    /// The canary that it is, for all.
    pub(crate) promotes: Option<u64>,
}

/// How many routes differ from the generation before.
#[derive(Debug, Serialize)]
pub(crate) struct RouteCounts {
    pub(crate) added: u64,
    pub(crate) changed: u64,
    pub(crate) removed: u64,
}

impl History {
    pub(crate) fn new(response: v1::GetHistoryResponse) -> Self {
        let in_force = response.in_force;
        let generation = |entry: v1::Generation| Generation {
            generation: entry.generation,
            in_force: entry.generation == in_force,
            digest: entry.digest,
            applied: time(entry.applied_ms),
            applied_by: entry.applied_by,
            source: entry.source,
            instance: entry.instance,
            message: entry.message,
            rollback_to: Some(entry.rollback_to).filter(|generation| *generation > 0),
            routes: entry.routes.map(|v1::RouteCounts { added, changed, removed }| RouteCounts { added, changed, removed }),
            signed_by: entry.signature.map(|signature| signature.key_id),
            refused: entry.refused,
            canary: Some(entry.canary).filter(|selector| !selector.is_empty()),
            aborted: Some(entry.aborted).filter(|aborted| !aborted.is_empty()),
            promotes: Some(entry.promotes).filter(|generation| *generation > 0),
        };
        let generations = response.generations.into_iter().map(generation).collect();
        Self { mesh: response.mesh, generation: response.generation, generations }
    }
}

/// The state of the mesh.
#[derive(Debug, Serialize)]
pub(crate) struct Mesh {
    pub(crate) mesh: String,
    pub(crate) generation: u64,
    /// The newest generation, if it is a canary.
    pub(crate) rollout: Option<Rollout>,
    pub(crate) instances: Vec<Instance>,
    /// Routes of the table in force whose service has no live instance: nobody delivers their records.
    pub(crate) unserved: Vec<Unserved>,
}

/// A canary.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Rollout {
    /// `OPEN` or `ABORTED`.
    pub(crate) state: &'static str,
    pub(crate) generation: u64,
    /// What the others run.
    pub(crate) stable_generation: u64,
    /// Who runs it.
    pub(crate) selector: String,
    pub(crate) dead_letters: u64,
    pub(crate) max_dead_letters: u64,
    pub(crate) refusals: u64,
    pub(crate) max_refusals: u64,
    pub(crate) applied: String,
    pub(crate) applied_by: String,
    pub(crate) message: String,
    /// How it was ended.
    pub(crate) aborted: Option<String>,
}

impl From<v1::Rollout> for Rollout {
    fn from(rollout: v1::Rollout) -> Self {
        let entry = rollout.entry.unwrap_or_default();
        let v1::Canary { selector, max_dead_letters, max_refusals } = rollout.canary.unwrap_or_default();
        Self {
            state: if entry.aborted.is_empty() { "OPEN" } else { "ABORTED" },
            generation: rollout.generation,
            stable_generation: rollout.stable_generation,
            selector,
            dead_letters: rollout.dead_letters,
            max_dead_letters,
            refusals: rollout.refusals,
            max_refusals,
            applied: time(entry.applied_ms),
            applied_by: entry.applied_by,
            message: entry.message,
            aborted: Some(entry.aborted).filter(|aborted| !aborted.is_empty()),
        }
    }
}

/// A route that nobody serves.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Unserved {
    pub(crate) route: String,
    pub(crate) service: String,
}

/// The state of an instance.
#[derive(Debug, Serialize)]
pub(crate) struct Instance {
    pub(crate) instance: String,
    pub(crate) services: Vec<String>,
    pub(crate) state: &'static str,
    pub(crate) generation: u64,
    pub(crate) digest: String,
    pub(crate) origin: &'static str,
    pub(crate) error: String,
    pub(crate) refused_generation: u64,
    /// What it ought to run; 0 if the sidecar that answers does not tell.
    pub(crate) target_generation: u64,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) canary_dead_letters: u64,
    pub(crate) waiting: Vec<String>,
    pub(crate) version: String,
    pub(crate) reported: String,
    pub(crate) age_seconds: f64,
    pub(crate) routes: Vec<Route>,
}

/// The state of a route.
#[derive(Debug, Serialize)]
pub(crate) struct Route {
    pub(crate) route: String,
    pub(crate) service: String,
    pub(crate) state: &'static str,
    pub(crate) reason: String,
    pub(crate) waiting_seconds: f64,
    pub(crate) partitions: u32,
    pub(crate) lag_records: u64,
    pub(crate) lag_seconds: f64,
    pub(crate) in_flight: u64,
    pub(crate) breaker_open: bool,
    pub(crate) dispositions: BTreeMap<String, u64>,
}

impl Mesh {
    pub(crate) fn new(response: v1::GetStatusResponse, table: Option<&mesh_routing::Table>) -> Self {
        let live = response.instances.iter().filter(|instance| instance.state() != v1::InstanceState::Lost);
        let served: HashSet<&str> = live.flat_map(|instance| &instance.services).map(String::as_str).collect();
        let routes = table
            .into_iter()
            .flat_map(|table| table.routes.iter().map(|route| (route.name.clone(), table.resolved(route).service.unwrap_or_default())));
        let unserved = routes.filter(|(_, service)| !served.contains(service.as_str()));
        let unserved = unserved.map(|(route, service)| Unserved { route, service }).collect();
        // The instance that answers reported just now: its clock is the one that ages are told by, not ours.
        let now = response.instances.iter().map(|instance| instance.reported_ms).max().unwrap_or(0);
        let since = |then: i64| now.saturating_sub(then).max(0) as f64 / 1_000.0;
        let route = |route: v1::RouteStatus| Route {
            state: word(route.state().as_str_name(), "ROUTE_STATE_"),
            waiting_seconds: if route.waiting_since_ms > 0 { since(route.waiting_since_ms) } else { 0.0 },
            route: route.route,
            service: route.service,
            reason: route.reason,
            partitions: route.partitions,
            lag_records: route.lag_records,
            lag_seconds: route.lag_seconds,
            in_flight: route.in_flight,
            breaker_open: route.breaker_open,
            dispositions: route.dispositions.into_iter().collect(),
        };
        let instance = |instance: v1::InstanceStatus| Instance {
            state: word(instance.state().as_str_name(), "INSTANCE_STATE_"),
            origin: word(instance.origin().as_str_name(), "TABLE_ORIGIN_"),
            age_seconds: since(instance.reported_ms),
            reported: time(instance.reported_ms),
            instance: instance.instance,
            services: instance.services,
            generation: instance.generation,
            digest: instance.digest,
            error: instance.error,
            refused_generation: instance.refused_generation,
            target_generation: instance.target_generation,
            labels: instance.labels.into_iter().collect(),
            canary_dead_letters: instance.canary_dead_letters,
            waiting: instance.waiting,
            version: instance.version,
            routes: instance.routes.into_iter().map(route).collect(),
        };
        let instances = response.instances.into_iter().map(instance).collect();
        let rollout = response.rollout.map(Rollout::from);
        Self { mesh: response.mesh, generation: response.generation, rollout, instances, unserved }
    }
}

/// An enum's word without its prefix; `UNKNOWN` for what this version does not know.
pub(crate) fn word(name: &'static str, prefix: &str) -> &'static str {
    match name.strip_prefix(prefix) {
        None | Some("UNSPECIFIED") => "UNKNOWN",
        Some(word) => word,
    }
}

/// A time as RFC 3339, to the second.
pub(crate) fn time(milliseconds: i64) -> String {
    let since = Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0));
    let time = UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH);
    humantime::format_rfc3339_seconds(time).to_string()
}
