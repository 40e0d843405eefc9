//! One run: a mesh, load, faults, the drain, the checks.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    bounds::{self, Bounds},
    check::{Evidence, Violation, check},
    disk::Disk,
    faults::{Moment, Stagehand},
    fleet::{Fleet, Recipe},
    ground::{Ground, Names},
    ledger::{Gap, Ledger},
    lines::{Line, tables},
    load::Load,
    plan::{Fault, plan},
    report::{LineReport, Rebalance, Report},
    service::Service,
    watch::Watched,
};
use crate::{broker::Broker, kafka::cluster::Cluster, stage::Stage};

/// The faults that can be built into a sidecar (`MESH_MUTATION`).
pub const MUTATIONS: [&str; 5] = ["commit_early", "drop_reply", "swap_two", "forget_epoch", "ack_before_fsync"];

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
    /// What runs beside each other.
    pub lines: Vec<Line>,
    /// The faults.
    pub faults: Vec<Fault>,
    /// Sidecars; one on the embedded broker.
    pub sidecars: usize,
    /// How many sidecars [`Fault::Scale`] goes up to.
    pub scale_to: usize,
    /// Records a second, over all lines.
    pub rate: f64,
    /// Keys, over all lines.
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
            lines: Line::ALL.to_vec(),
            faults,
            sidecars: if kafka { 3 } else { 1 },
            scale_to: 8,
            rate: 400.0,
            keys: 120,
            drain: Duration::from_secs(180),
            // A build without optimisation takes more.
            bounds: Bounds { stall: Duration::from_secs(60), memory: if cfg!(debug_assertions) { 160_000_000 } else { 80_000_000 } },
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

/// A line as it runs.
#[derive(Clone, Debug)]
struct Course {
    line: Line,
    names: Names,
    ledger: Arc<Ledger>,
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
    let partitions = if kafka.is_some() { 8 } else { 4 };
    let course = |line: &Line| Course {
        line: *line,
        names: Names {
            a: stage.topic(&format!("{}.a", line.name)),
            b: stage.topic(&format!("{}.b", line.name)),
            dead: stage.topic(&format!("{}.dlq", line.name)),
            sides: line.sides(&stage.topic(&format!("{}.a", line.name))),
            group: format!("{}.{}", stage.mesh(), line.name),
            partitions,
        },
        ledger: Arc::new(Ledger::new(line.last_attempt())),
    };
    let courses: Vec<Course> = options.lines.iter().map(course).collect();
    let clock = courses.first().context("a run needs a line")?.ledger.clone();
    let ground = match kafka {
        Some(bootstrap) => Ground::Kafka(options.cluster.as_ref().map_or_else(|| bootstrap.to_owned(), |cluster| cluster.direct())),
        None => Ground::Embedded(stage.folder().join("data").join("mesh.db")),
    };
    let service = Service::new(stage.mesh(), courses.iter().map(|course| (course.line, course.ledger.clone())).collect())?;
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
    let tables = tables(&options.lines, partitions);
    fleet.apply(&tables[0]).await?;
    let routes: Vec<&str> = options.lines.iter().map(|line| line.name).collect();
    fleet.take(0).await.1.wait_running(&routes).await?;

    let plan = plan(options.seed, &options.faults, options.length, options.session());
    let count = u32::try_from(courses.len())?;
    let keys = (options.keys / count).max(1);
    let load = |course: &Course| Load {
        run: stage.mesh().to_owned(),
        topic: course.names.a.clone(),
        keys,
        producers: 8.min(keys),
        rate: options.rate / f64::from(count),
        apis: fleet.apis().to_vec(),
    };
    let loads: Vec<(Load, Arc<Ledger>)> = courses.iter().map(|course| (load(course), course.ledger.clone())).collect();
    let hand = Arc::new(Stagehand {
        fleet,
        service,
        cluster: options.cluster.clone(),
        disk,
        clock: clock.clone(),
        scale_to: options.scale_to,
        tables,
        timeline: Mutex::default(),
        swaps: Mutex::default(),
        turns: Default::default(),
        loud: options.loud,
    });

    courses.iter().for_each(|course| course.ledger.begin());
    let (stop_load, stop_all) = (CancellationToken::new(), CancellationToken::new());
    let samples: Vec<_> = courses.iter().map(|course| ground.watch(&course.names, &course.ledger, stop_all.clone())).collect();
    let watching = tokio::spawn(watched.clone().run(stop_all.clone()));
    let mut loading = JoinSet::new();
    for (load, ledger) in loads {
        loading.spawn(load.run(ledger, stop_load.clone()));
    }
    let mut faults = tokio::spawn(hand.clone().play(plan.clone(), stop_load.clone()));
    tokio::select! {
        () = tokio::time::sleep(options.length) => {}
        // None ends before it is told to, unless something is refused for good.
        Some(done) = loading.join_next() => done??,
        Ok(Err(error)) = &mut faults => return Err(error),
    }
    let loaded = clock.now();
    stop_load.cancel();
    while let Some(done) = loading.join_next().await {
        done??;
    }
    if !faults.is_finished() {
        faults.await??;
    }
    let mut violations = Vec::new();
    let deadline = tokio::time::Instant::now() + options.drain;
    for course in &courses {
        if let Err(error) = drained(&ground, &course.names, &course.ledger, deadline).await {
            let offenders = vec![format!("{}: {error:#}", course.line.name)];
            violations.push(Violation { check: 2, what: format!("not done {:?} after the load", options.drain), count: 1, offenders });
        }
    }
    let drained = clock.now().saturating_sub(loaded);
    stop_all.cancel();
    watching.await?;

    let hand = Arc::into_inner(hand).context("a fault is still under way")?;
    violations.extend(hand.fleet.is_at_one(Duration::from_secs(60)).await.map(|offender| Violation {
        check: 9,
        what: "the sidecars do not run the table that was applied last".to_owned(),
        count: 1,
        offenders: vec![offender],
    }));
    hand.fleet.finish().await?;
    drop(hand.service);
    let timeline = hand.timeline.into_inner().unwrap_or_else(PoisonError::into_inner);
    let swaps = hand.swaps.into_inner().unwrap_or_else(PoisonError::into_inner);

    let mut lines = Vec::with_capacity(courses.len());
    let mut gaps = Vec::new();
    for (course, samples) in courses.iter().zip(samples) {
        let mut samples = samples.await?;
        samples.extend(ground.last(&course.names, &course.ledger).await?);
        let contents = ground.read(&course.names).await.with_context(|| format!("reading what {} left", course.line.name))?;
        let books = course.ledger.books();
        let verdict = check(&Evidence {
            run: stage.mesh(),
            line: course.line,
            books: &books,
            began: course.ledger.began(),
            contents: &contents,
            samples: &samples,
            swaps: &swaps,
            faults: !plan.is_empty(),
        });
        gaps.extend(books.gaps.iter().filter(|gap| gap.from < loaded).copied());
        lines.push(LineReport {
            line: course.line,
            verdict,
            unsure: books.unsure,
            longest_stall: books.longest_gap(Duration::ZERO, loaded).map(|gap| (gap.length(), gap.from)),
        });
    }
    let usage = watched.usage();
    let longest = gaps.iter().map(|gap| gap.length()).max();
    violations.extend(bounds::broken(&options.bounds, longest, &usage));
    Ok(Report {
        seed: options.seed,
        broker: match (&options.cluster, kafka) {
            (Some(cluster), _) => format!("kafka, {} brokers", cluster.len()),
            (None, Some(_)) => "kafka".to_owned(),
            (None, None) => "embedded".to_owned(),
        },
        length: options.length,
        rebalances: rebalances(&timeline, &gaps, loaded),
        plan,
        timeline,
        drained,
        usage,
        lines,
        violations,
    })
}

/// Waits until everything in A is committed, and nothing waits in retry or park topics.
async fn drained(ground: &Ground, names: &Names, ledger: &Arc<Ledger>, end: tokio::time::Instant) -> Result<()> {
    loop {
        let left = async {
            let ends = ground.ends(names).await?;
            let now = ground.now(names, ledger).await?;
            let behind = |(partition, end): (&i32, &i64)| (*partition, *end - now.committed.get(partition).copied().unwrap_or(0));
            let left: Vec<_> = ends.iter().map(behind).filter(|(_, left)| *left > 0).collect();
            let waiting = if left.is_empty() { ground.waiting(names, &now).await? } else { 0 };
            anyhow::Ok((left, waiting))
        };
        match left.await {
            Ok((left, 0)) if left.is_empty() => return Ok(()),
            Ok((left, 0)) if tokio::time::Instant::now() > end => anyhow::bail!("records left by partition: {left:?}"),
            Ok((_, waiting)) if tokio::time::Instant::now() > end => anyhow::bail!("{waiting} records are left in retry and park topics"),
            Err(error) if tokio::time::Instant::now() > end => return Err(error),
            // Nothing tells from outside when a group has caught up.
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// The stall of each rebalance: from it to the next one.
fn rebalances(timeline: &[Moment], gaps: &[Gap], end: Duration) -> Vec<Rebalance> {
    let moments: Vec<&Moment> = timeline.iter().filter(|moment| moment.rebalances).collect();
    let until = |index: usize| moments.get(index + 1).map_or(end, |next: &&Moment| next.at);
    let stall = |(index, moment): (usize, &&Moment)| {
        let within = gaps.iter().filter(|gap| gap.to > moment.at && gap.from < until(index).max(moment.at));
        Rebalance { at: moment.at, what: moment.what.clone(), stall: within.map(|gap| gap.length()).max().unwrap_or_default() }
    };
    moments.iter().enumerate().map(stall).collect()
}
