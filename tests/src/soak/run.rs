//! One run: a mesh, load, faults, the drain, the checks.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio_util::sync::CancellationToken;

use super::{
    check::{Bounds, Evidence, Violation, check},
    disk::Disk,
    faults::{Moment, Stagehand},
    fleet::{Fleet, Recipe},
    ground::{Ground, Names},
    ledger::{Books, Ledger},
    load::Load,
    plan::{Fault, plan},
    report::{Rebalance, Report},
    service::Service,
    watch::{Usage, Watched},
};
use crate::{broker::Broker, kafka::cluster::Cluster, stage::Stage};

/// The route's attempts: a failure of this number is the last.
const ATTEMPTS: u32 = 10;

/// What a route promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Guarantee {
    /// Nothing is lost; what was in flight at a crash comes twice.
    #[default]
    AtLeastOnce,
    /// A `read_committed` reader sees each reply once.
    ExactlyOnce,
}

impl Guarantee {
    fn as_str(self) -> &'static str {
        match self {
            Self::AtLeastOnce => "at_least_once",
            Self::ExactlyOnce => "exactly_once",
        }
    }
}

/// What is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The seed of the faults.
    pub seed: u64,
    /// How long the load goes on.
    pub length: Duration,
    /// The broker.
    pub broker: Broker,
    /// Brokers of the run's own, behind proxies; `broker` must name them.
    pub cluster: Option<Arc<Cluster>>,
    /// A fault that is built into the sidecars (`MESH_MUTATION`).
    pub mutation: Option<String>,
    /// The route's guarantee.
    pub guarantee: Guarantee,
    /// The faults.
    pub faults: Vec<Fault>,
    /// Sidecars; one on the embedded broker.
    pub sidecars: usize,
    /// How many sidecars [`Fault::Scale`] goes up to.
    pub scale_to: usize,
    /// Records a second.
    pub rate: f64,
    /// Keys.
    pub keys: u32,
    /// The longest wait for the work to end after the load.
    pub drain: Duration,
    /// What check 8 allows.
    pub bounds: Bounds,
    /// Says what happens as it happens.
    pub loud: bool,
}

impl Options {
    /// A run of this length with every fault that the broker knows.
    pub fn new(broker: Broker, seed: u64, length: Duration) -> Self {
        let kafka = broker.bootstrap().is_some();
        let faults = <Fault as clap::ValueEnum>::value_variants().iter().copied().filter(|fault| fault.is_of(kafka, 0)).collect();
        Self {
            seed,
            length,
            broker,
            cluster: None,
            mutation: None,
            guarantee: Guarantee::default(),
            faults,
            sidecars: if kafka { 3 } else { 1 },
            scale_to: 8,
            rate: 400.0,
            keys: 96,
            drain: Duration::from_secs(180),
            // A build without optimisation takes more.
            bounds: Bounds { stall: Duration::from_secs(60), memory: if cfg!(debug_assertions) { 160 << 20 } else { 80 << 20 } },
            loud: false,
        }
    }

    /// The same on brokers of the run's own.
    pub fn on(cluster: Cluster, seed: u64, length: Duration) -> Self {
        let mut options = Self::new(Broker::Kafka(cluster.bootstrap()), seed, length);
        let count = cluster.len();
        options.faults = <Fault as clap::ValueEnum>::value_variants().iter().copied().filter(|fault| fault.is_of(true, count)).collect();
        options.cluster = Some(Arc::new(cluster));
        options
    }

    /// How long a group waits for a member that says nothing. A short run has no time for the sidecar's own 10 s.
    fn session(&self) -> Duration {
        Duration::from_secs(if self.length < Duration::from_secs(150) { 6 } else { 10 })
    }
}

/// The tables: the one that is in force mostly, and others for swaps. All of them treat the records of A alike.
fn tables(options: &Options, partitions: i32) -> Vec<String> {
    let guarantee = options.guarantee.as_str();
    let table = |fields: &str, more: &str| {
        format!(
            "topics: {{ %a: {{ partitions: {partitions} }}, %b: {{ partitions: {partitions} }}, %dlq: {{ partitions: {partitions} }}, %idle: {{ partitions: 1 }} }}
routes:
- name: work
  service: work
  from: [%a]
  handler: /work
  to: [%b]
  timeout: 4s
  guarantee: {guarantee}
  retry: {{ attempts: {ATTEMPTS}, initial: 50ms, max: 1s }}
  breaker: {{ failures: 20, open: 1s }}
  {fields}
{more}"
        )
    };
    vec![
        table("concurrency: 64", ""),
        // Taken in place.
        table("concurrency: 16", ""),
        // A route more.
        table("concurrency: 64", "- { name: idle, service: work, from: [%idle], handler: /idle, to: void }"),
        // Drained, and started anew.
        table("order: partition", ""),
    ]
}

/// Runs, and tells what was found.
///
/// # Errors
/// If the run itself does not work: something does not start, or ends that should not. A promise that is broken is no error but in the report.
pub async fn run(options: Options) -> Result<Report> {
    let stage = Stage::new(options.broker.clone())?;
    let result = run_on(&options, stage.clone()).await;
    if result.is_err() && options.loud {
        eprintln!("the folder of the run: {}", stage.folder().display());
    }
    result
}

async fn run_on(options: &Options, stage: Stage) -> Result<Report> {
    let kafka = options.broker.bootstrap();
    let names = Names {
        a: stage.topic("a"),
        b: stage.topic("b"),
        dead: stage.topic("dlq"),
        group: format!("{}.work", stage.mesh()),
        partitions: if kafka.is_some() { 8 } else { 4 },
    };
    let ground = match kafka {
        Some(bootstrap) => Ground::Kafka(options.cluster.as_ref().map_or_else(|| bootstrap.to_owned(), |cluster| cluster.direct())),
        None => Ground::Embedded(stage.folder().join("data").join("mesh.db")),
    };
    let ledger = Arc::new(Ledger::new(ATTEMPTS));
    let service = Service::new(stage.mesh(), ledger.clone())?;
    service.up().await?;

    let mut environment = Vec::new();
    if kafka.is_some() {
        environment.push(("MESH_BROKER_KAFKA_SESSION_TIMEOUT_MS".to_owned(), options.session().as_millis().to_string()));
    }
    let disk = match options.faults.contains(&Fault::DiskFull) {
        true => Some(Disk::new(stage.folder(), &stage.folder().join("data")).await?),
        false => None,
    };
    environment.extend(disk.iter().flat_map(|disk| disk.environment().to_vec()));
    let recipe = Recipe { app: service.url(), environment, mutation: options.mutation.clone() };
    let watched = Watched::default();
    let count = if kafka.is_some() { options.sidecars.max(1) } else { 1 };
    let fleet = Fleet::start(stage.clone(), recipe, count, watched.clone()).await?;
    let tables = tables(options, names.partitions);
    fleet.apply(&tables[0]).await?;
    fleet.take(0).await.1.wait_running(&["work"]).await?;

    let plan = plan(options.seed, &options.faults, options.length, options.session());
    let load = Load {
        run: stage.mesh().to_owned(),
        topic: names.a.clone(),
        keys: options.keys,
        producers: 8.min(options.keys),
        rate: options.rate,
        apis: fleet.apis().to_vec(),
    };
    let hand = Arc::new(Stagehand {
        fleet,
        service,
        cluster: options.cluster.clone(),
        disk,
        ledger: ledger.clone(),
        scale_to: options.scale_to,
        tables,
        timeline: Mutex::default(),
        loud: options.loud,
    });

    ledger.begin();
    let (stop_load, stop_all) = (CancellationToken::new(), CancellationToken::new());
    let samples = ground.watch(&names, &ledger, stop_all.clone());
    let watching = tokio::spawn(watched.clone().run(stop_all.clone()));
    let mut loading = tokio::spawn(load.run(ledger.clone(), stop_load.clone()));
    let mut faults = tokio::spawn(hand.clone().play(plan.clone(), stop_load.clone()));
    let mut failed = None;
    tokio::select! {
        () = tokio::time::sleep(options.length) => {}
        done = &mut loading => failed = Some(done),
        Ok(Err(error)) = &mut faults => return Err(error),
    }
    let loaded = ledger.now();
    stop_load.cancel();
    match failed {
        Some(done) => done??,
        None => loading.await??,
    }
    if !faults.is_finished() {
        faults.await??;
    }
    let mut violations = Vec::new();
    let drained = match drained(&ground, &names, &ledger, options.drain).await {
        Ok(()) => ledger.now().saturating_sub(loaded),
        Err(error) => {
            let (what, offenders) = (format!("not done {:?} after the load", options.drain), vec![format!("{error:#}")]);
            violations.push(Violation { check: 2, what, count: 1, offenders });
            options.drain
        }
    };
    stop_all.cancel();
    watching.await?;
    let mut samples = samples.await?;
    samples.push(ground.now(&names, &ledger).await?);

    let hand = Arc::into_inner(hand).context("a fault is still under way")?;
    hand.fleet.finish().await?;
    drop(hand.service);
    let [a, b, dead] = ground.read(&names, [&names.a, &names.b, &names.dead]).await?;
    let timeline = hand.timeline.into_inner().unwrap_or_else(PoisonError::into_inner);

    let books = ledger.books();
    let mut verdict = check(&Evidence {
        run: stage.mesh(),
        route: "work",
        books: &books,
        a: &a,
        b: &b,
        dead: &dead,
        samples: &samples,
        exactly_once: options.guarantee == Guarantee::ExactlyOnce,
        faults: !plan.is_empty(),
    });
    verdict.violations.extend(violations);
    let longest = books.longest_gap(Duration::ZERO, loaded);
    let usage = watched.usage();
    verdict.violations.extend(over_bounds(&options.bounds, longest.map(super::ledger::Gap::length), &usage));
    Ok(Report {
        seed: options.seed,
        broker: match (&options.cluster, kafka) {
            (Some(cluster), _) => format!("kafka, {} brokers", cluster.len()),
            (None, Some(_)) => "kafka".to_owned(),
            (None, None) => "embedded".to_owned(),
        },
        guarantee: options.guarantee.as_str(),
        length: options.length,
        rebalances: rebalances(&timeline, &books, loaded),
        plan,
        timeline,
        unsure: books.unsure,
        longest_stall: longest.map(|gap| (gap.length(), gap.from)),
        drained,
        usage,
        verdict,
    })
}

/// Waits until everything in A is committed.
async fn drained(ground: &Ground, names: &Names, ledger: &Arc<Ledger>, deadline: Duration) -> Result<()> {
    let end = tokio::time::Instant::now() + deadline;
    loop {
        let left = async {
            let ends = ground.ends(names).await?;
            let committed = ground.now(names, ledger).await?.committed;
            let behind = |(partition, end): (&i32, &i64)| (*partition, *end - committed.get(partition).copied().unwrap_or(0));
            anyhow::Ok(ends.iter().map(behind).filter(|(_, left)| *left > 0).collect::<Vec<_>>())
        };
        match left.await {
            Ok(left) if left.is_empty() => return Ok(()),
            Ok(left) if tokio::time::Instant::now() > end => anyhow::bail!("records left by partition: {left:?}"),
            Err(error) if tokio::time::Instant::now() > end => return Err(error),
            // Nothing tells from outside when a group has caught up.
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

fn rebalances(timeline: &[Moment], books: &Books, end: Duration) -> Vec<Rebalance> {
    let moments: Vec<&Moment> = timeline.iter().filter(|moment| moment.rebalances).collect();
    let until = |index: usize| moments.get(index + 1).map_or(end, |next: &&Moment| next.at);
    let stall = |(index, moment): (usize, &&Moment)| {
        let gap = books.longest_gap(moment.at, until(index).max(moment.at));
        Rebalance { at: moment.at, what: moment.what.clone(), stall: gap.map_or(Duration::ZERO, super::ledger::Gap::length) }
    };
    moments.iter().enumerate().map(stall).collect()
}

/// Check 8.
fn over_bounds(bounds: &Bounds, stall: Option<Duration>, usage: &std::collections::BTreeMap<String, Usage>) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut add = |what: &str, offenders: Vec<String>| {
        if !offenders.is_empty() {
            violations.push(Violation { check: 8, what: what.to_owned(), count: offenders.len(), offenders });
        }
    };
    let stood = stall.filter(|stall| *stall > bounds.stall).map(|stall| format!("{stall:.1?} where {:?} are allowed", bounds.stall));
    add("a partition with work stood still", stood.into_iter().collect());
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let heavy = usage.iter().filter(|(_, usage)| usage.peak_bytes > bounds.memory);
    add(
        "a sidecar took too much memory",
        heavy
            .map(|(name, usage)| format!("{name}: {:.1} MiB where {:.0} are allowed", mib(usage.peak_bytes), mib(bounds.memory)))
            .collect(),
    );
    let leaking = usage.iter().filter(|(_, usage)| usage.halves.1 > usage.halves.0 + usage.halves.0 / 2 + 32);
    add("descriptors grow", leaking.map(|(name, usage)| format!("{name}: from {} to {}", usage.halves.0, usage.halves.1)).collect());
    violations
}
