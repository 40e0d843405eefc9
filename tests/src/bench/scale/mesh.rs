//! A mesh of many sidecars in one process: the whole control plane of each, on one broker, without routes, services and listeners.
//!
//! Invariant: the sidecars share the broker, the runtime and what a process has of its own (the allocator, the expressions that were compiled last),
//! and nothing else: each has its tasks, its readers, its compiled table and its copy on disk.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, future::join_all, stream::FuturesUnordered};
use mesh_proto::v1::{GetStatusResponse, InstanceState};
use mesh_routing::sign::{PublicKey, SigningKey};
use mesh_sidecar::{
    broker::{
        Broker,
        embedded::{EmbeddedBroker, EmbeddedConfig},
        kafka::{KafkaBroker, KafkaOptions},
    },
    command, config,
    control::{ApplyOptions, Control, ControlHandle},
    status::Board,
    table::ActiveTable,
};
use tokio_util::sync::CancellationToken;

use super::counted::{Counted, Counts, Traffic};

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(600);
/// How often the asked sidecar is asked for the state of the mesh.
const LOOK: Duration = Duration::from_millis(50);
/// So long nobody reads a report: then all were read.
const QUIET: Duration = Duration::from_millis(500);

/// Where the mesh lives.
enum Ground {
    /// In this process.
    Embedded(Arc<EmbeddedBroker>),
    /// On a Kafka at this address; each sidecar has clients of its own.
    Kafka(String),
}

/// A simulated sidecar.
struct Simulated {
    name: String,
    handle: ControlHandle,
    counts: Arc<Counts>,
    /// Its own broker, if it does not share one.
    broker: Option<Arc<KafkaBroker>>,
    /// It trusts a key that nobody signs with, so it refuses every table.
    refuses: bool,
}

/// The mesh.
pub struct Mesh {
    ground: Ground,
    name: String,
    sidecars: Vec<Simulated>,
    folder: tempfile::TempDir,
}

/// What became of a table that was applied.
#[derive(Clone, Debug)]
pub struct Spread {
    /// Its generation.
    pub generation: u64,
    /// Its digest.
    pub digest: String,
    /// From the call of `apply` to its answer.
    pub accepted: Duration,
    /// From the call until it was in force at each sidecar that takes it, ascending.
    pub in_force: Vec<Duration>,
    /// From the call until the asked sidecar says that all are in sync, but for those that refuse.
    pub synced: Duration,
    /// What all read and wrote, until every report was read by everybody.
    pub traffic: Traffic,
    /// Routes of the sidecars' own services that they leave alone, since the new table has them as they are.
    pub untouched: usize,
    /// Routes of the sidecars' own services that they change, start or stop.
    pub touched: usize,
}

impl Mesh {
    /// An empty mesh: on the Kafka at this address, or on an embedded broker of its own.
    ///
    /// # Errors
    /// If the broker cannot be opened.
    pub fn new(kafka: Option<&str>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let ground = match kafka {
            Some(bootstrap) => Ground::Kafka(bootstrap.to_owned()),
            None => {
                let settings = EmbeddedConfig { default_partitions: 1, ..EmbeddedConfig::new(folder.path().join("broker")) };
                Ground::Embedded(EmbeddedBroker::open(settings)?)
            }
        };
        let name = format!("scale-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        Ok(Self { ground, name, sidecars: Vec::new(), folder })
    }

    /// The mesh's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts further sidecars, each of a service of its own: `svc-0`, `svc-1`, … by the order of their starts. Does not wait for them.
    ///
    /// # Errors
    /// If one cannot be started.
    pub async fn start(&mut self, sidecars: usize) -> Result<()> {
        for _ in 0..sidecars {
            self.start_one(Vec::new()).await?;
        }
        Ok(())
    }

    /// Starts one that refuses every table: it trusts a key that nobody has.
    ///
    /// # Errors
    /// If it cannot be started.
    pub async fn start_refusing(&mut self) -> Result<()> {
        self.start_one(vec![SigningKey::from_random(&[7; 32]).public()]).await
    }

    async fn start_one(&mut self, trusted: Vec<PublicKey>) -> Result<()> {
        let number = self.sidecars.len();
        let name = format!("sidecar-{number}");
        let config = config_of(&self.name, &name, number, self.folder.path())?;
        let refuses = !trusted.is_empty();
        let config = config::Config { control: config::ControlConfig { trusted_keys: trusted, ..config.control }, ..config };
        let (broker, own): (Arc<dyn Broker>, _) = match &self.ground {
            Ground::Embedded(broker) => (broker.clone(), None),
            Ground::Kafka(bootstrap) => {
                let keys = BTreeMap::from([("bootstrap.servers".to_owned(), bootstrap.clone())]);
                let broker = KafkaBroker::open(keys, KafkaOptions::default())?;
                (broker.clone(), Some(broker))
            }
        };
        let counts = Arc::new(Counts::default());
        let counted = Arc::new(Counted { broker, counts: counts.clone() });
        let (commands, _) = command::channel();
        let handle = Control::start(counted, Arc::new(config), Board::default(), commands, CancellationToken::new()).await?;
        self.sidecars.push(Simulated { name, handle, counts, broker: own, refuses });
        Ok(())
    }

    /// How many sidecars there are.
    pub fn sidecars(&self) -> usize {
        self.sidecars.len()
    }

    /// Waits until all know the state of the mesh.
    ///
    /// # Errors
    /// If one does not in time.
    pub async fn ready(&self) -> Result<()> {
        let ready = self.sidecars.iter().map(|sidecar| async move {
            let mut ready = sidecar.handle.ready();
            ready.wait_for(|ready| *ready).await.map(drop).with_context(|| sidecar.name.clone())
        });
        let all = tokio::time::timeout(DEADLINE, join_all(ready)).await.context("the mesh is not ready in time")?;
        all.into_iter().collect()
    }

    /// What all read and wrote so far.
    pub fn traffic(&self) -> Traffic {
        self.sidecars.iter().map(|sidecar| sidecar.counts.now()).sum()
    }

    /// The table in force at each sidecar, in the order of their starts.
    pub fn tables(&self) -> Vec<Option<Arc<ActiveTable>>> {
        self.sidecars.iter().map(|sidecar| sidecar.handle.table().borrow().clone()).collect()
    }

    /// How many sidecars are in this state, as the first one sees it.
    pub fn in_state(&self, state: InstanceState, generation: u64) -> usize {
        self.sidecars.first().map_or(0, |asked| count(&asked.handle.control().status(), state, generation))
    }

    /// How long the second sidecar, whom nobody else asks, takes to say what all reported last.
    ///
    /// # Errors
    /// If there is none, or it does not know them all.
    pub fn look(&self) -> Result<Duration> {
        let asked = self.sidecars.get(1).context("there is no second sidecar")?;
        let begin = Instant::now();
        let instances = asked.handle.control().status().instances.len();
        let took = begin.elapsed();
        ensure!(instances == self.sidecars.len(), "{} knows {instances} of {} sidecars", asked.name, self.sidecars.len());
        Ok(took)
    }

    /// Applies a table at the first sidecar, and follows it until every sidecar has it, and every report of that was read by everybody.
    ///
    /// # Errors
    /// If it is refused, or does not reach all in time.
    pub async fn apply(&self, text: &str) -> Result<Spread> {
        let asked = self.sidecars.first().context("no sidecar")?;
        let (traffic, before) = (self.traffic(), self.tables());
        let old = before.iter().flatten().map(|table| table.generation).max().unwrap_or(0);
        let begin = Instant::now();
        let mut taking: FuturesUnordered<_> = self
            .sidecars
            .iter()
            .filter(|sidecar| !sidecar.refuses)
            .map(|sidecar| async move {
                let mut table = sidecar.handle.table();
                let newer = table.wait_for(|table| table.as_ref().is_some_and(|table| table.generation > old)).await;
                newer.map(|_| begin.elapsed())
            })
            .collect();
        let all_take = async {
            let mut in_force = Vec::new();
            while let Some(took) = taking.next().await {
                in_force.push(took?);
            }
            anyhow::Ok(in_force)
        };
        let refusing = self.sidecars.iter().filter(|sidecar| sidecar.refuses).count();
        let all_say = async {
            let applied = asked.handle.control().apply("scale.yaml", text, ApplyOptions::default()).await?;
            ensure!(applied.changed, "the table is that of generation {}", applied.generation);
            let accepted = begin.elapsed();
            loop {
                let status = asked.handle.control().status();
                let synced = count(&status, InstanceState::Synced, applied.generation);
                let nacked = count(&status, InstanceState::Nacked, applied.generation);
                if synced + nacked == self.sidecars.len() && nacked == refusing {
                    return Ok((applied, accepted, begin.elapsed()));
                }
                // Reports of others have no event of their own; `mesh-ctl apply --wait` asks again and again, too.
                tokio::time::sleep(LOOK).await;
            }
        };
        let both = async { tokio::try_join!(all_take, all_say) };
        let both = tokio::time::timeout(DEADLINE, both).await;
        let (in_force, (applied, accepted, synced)) = both.context("the table does not reach all in time")??;
        self.quiet().await?;
        let (mut untouched, mut touched) = (0, 0);
        for (number, (old, new)) in before.iter().zip(self.tables()).enumerate() {
            let (same, other) = compare(&service(number), old.as_deref(), new.as_deref());
            (untouched, touched) = (untouched + same, touched + other);
        }
        let (generation, digest) = (applied.generation, applied.digest);
        Ok(Spread { generation, digest, accepted, in_force, synced, traffic: self.traffic().since(traffic), untouched, touched })
    }

    /// Waits until nobody reads a report any more.
    async fn quiet(&self) -> Result<()> {
        let quiet = async {
            let mut before = self.traffic().reports_read;
            loop {
                tokio::time::sleep(QUIET).await;
                let now = self.traffic().reports_read;
                if now == before {
                    return;
                }
                before = now;
            }
        };
        tokio::time::timeout(DEADLINE, quiet).await.context("reports do not come to an end")
    }

    /// Ends all.
    ///
    /// # Errors
    /// If a broker does not close.
    pub async fn end(self) -> Result<()> {
        let Self { ground, sidecars, folder, .. } = self;
        let mut brokers = Vec::new();
        let closing = sidecars.into_iter().map(|Simulated { handle, broker, .. }| {
            brokers.extend(broker);
            handle.close()
        });
        join_all(closing).await;
        for broker in brokers {
            broker.close(Duration::from_secs(10)).await?;
        }
        if let Ground::Embedded(broker) = ground {
            broker.close(Duration::from_secs(30)).await?;
        }
        Ok(folder.close()?)
    }
}

/// How many are in this state, with regard to this generation.
fn count(status: &GetStatusResponse, state: InstanceState, generation: u64) -> usize {
    let in_state = status.instances.iter().filter(|instance| instance.state() == state);
    in_state.filter(|instance| instance.generation.max(instance.refused_generation) == generation).count()
}

/// The service of a sidecar.
fn service(number: usize) -> String {
    format!("svc-{number}")
}

fn config_of(mesh: &str, name: &str, number: usize, folder: &Path) -> Result<config::Config> {
    let state = folder.join(name).display().to_string();
    let services = format!("[{{ name: {} }}]", service(number));
    let fields = [
        ("MESH_MESH", mesh),
        ("MESH_SERVICES", services.as_str()),
        ("MESH_INSTANCE", name),
        ("MESH_STATE", state.as_str()),
        ("MESH_BROKER_EMBEDDED_PATH", "unused"),
    ];
    Ok(config::load(None, fields.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter())?)
}

/// How many routes of a service are the same in both tables, and how many are not, by what the sidecar itself compares.
fn compare(service: &str, old: Option<&ActiveTable>, new: Option<&ActiveTable>) -> (usize, usize) {
    let of = |table: Option<&ActiveTable>| table.map(|table| table.compiled.routes_of(service).to_vec()).unwrap_or_default();
    let (old, new) = (of(old), of(new));
    let same = new.iter().filter(|route| old.iter().any(|known| known == *route)).count();
    let gone = old.iter().filter(|known| new.iter().all(|route| route.name != known.name)).count();
    (same, new.len() - same + gone)
}

/// A table of so many routes over so many services, as somebody writes it. Each version has another timeout in every hundredth route.
pub fn table(mesh: &str, services: usize, routes: usize, version: usize) -> String {
    let mut text = format!("apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: {mesh} }}\nspec:\n  routes:\n");
    let services = services.max(1);
    for number in 0..routes {
        let (service, next, kind) = (number % services, (number + 1) % services, number % 500);
        let timeout = if number % 100 == 0 { 5_000 + version } else { 5_000 };
        // Writing into a string cannot fail.
        let _ = writeln!(
            text,
            "  - {{ name: route-{number}, service: svc-{service}, from: [in-{service}], handler: /handle/{number}, to: [in-{next}], \
             cases: [{{ status: 202, to: [review-{service}] }}], filter: 'record.json.kind == \"k{kind}\"', \
             retry: {{ attempts: 5, initial: 100ms, max: 30s }}, timeout: {timeout}ms, concurrency: 32, dead_letter: svc-{service}.dlq }}"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_changes_every_hundredth_route() {
        let compiled = |version| {
            let (_, compiled) = mesh_routing::load("t", &table("m", 10, 200, version)).unwrap();
            ActiveTable { generation: 1, applied_ms: 0, origin: mesh_sidecar::table::TableOrigin::Mesh, compiled: Arc::new(compiled) }
        };
        let (one, two) = (compiled(1), compiled(2));
        assert_eq!(compare("svc-0", Some(&one), Some(&two)), (18, 2));
        assert_eq!(compare("svc-1", Some(&one), Some(&two)), (20, 0));
        assert_eq!(compare("svc-1", None, Some(&two)), (0, 20));
        assert_eq!(compare("svc-1", Some(&one), None), (0, 20));
    }
}
