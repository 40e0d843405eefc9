//! What makes things go wrong, at the times of the plan, and keeps the timeline of what really happened.
//!
//! Invariant: a fault waits until an earlier one of its kind is over, and what it struck works again: a broker that takes long to start is never one of two.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::process::Signal;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    disk::Disk,
    fleet::Fleet,
    ledger::Ledger,
    plan::{Fault, Kind, Step},
    service::{Mood, Service},
};
use crate::{kafka::cluster::Cluster, proxy::Network};

/// How long brokers may take until all have everything again.
const IN_SYNC: Duration = Duration::from_secs(60);

/// A line of the timeline.
#[derive(Clone, Debug, Serialize)]
pub struct Moment {
    /// When, since the begin of the ledger.
    pub at: Duration,
    /// What happened.
    pub what: String,
    /// Whether partitions change hands from here on.
    pub rebalances: bool,
}

/// Strikes.
#[derive(Debug)]
pub struct Stagehand {
    /// The sidecars.
    pub fleet: Fleet,
    /// The service.
    pub service: Service,
    /// The brokers, if they are the run's own.
    pub cluster: Option<Arc<Cluster>>,
    /// The embedded broker's disk.
    pub disk: Option<Disk>,
    /// For the time.
    pub clock: Arc<Ledger>,
    /// How many sidecars [`Fault::Scale`] goes up to.
    pub scale_to: usize,
    /// The tables that [`Fault::Swap`] puts in force, one after the other; the first is the one that stays.
    pub tables: Vec<String>,
    /// What happened.
    pub timeline: Mutex<Vec<Moment>>,
    /// From when to when tables were swapped.
    pub swaps: Mutex<Vec<(Duration, Duration)>>,
    /// Held by the fault that strikes this kind of thing.
    pub turns: [tokio::sync::Mutex<()>; Kind::COUNT],
    /// Says each line as it happens.
    pub loud: bool,
}

impl Stagehand {
    fn note(&self, rebalances: bool, what: impl Into<String>) {
        let moment = Moment { at: self.clock.now(), what: what.into(), rebalances };
        if self.loud {
            eprintln!("{:>8.1} s  {}", moment.at.as_secs_f64(), moment.what);
        }
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner).push(moment);
    }

    /// Carries out a plan; its times count from now. A fault under way when it is stopped is brought to its end.
    ///
    /// # Errors
    /// If something cannot be undone: a sidecar that does not start again, or one that had ended by itself.
    pub async fn play(self: Arc<Self>, plan: Vec<Step>, stop: CancellationToken) -> Result<()> {
        let begin = tokio::time::Instant::now();
        let mut under_way = JoinSet::new();
        for step in plan {
            let wait = tokio::time::sleep_until(begin + step.at);
            tokio::select! {
                () = wait => drop(under_way.spawn(self.clone().take_turn(step, stop.clone()))),
                () = stop.cancelled() => break,
                Some(done) = under_way.join_next(), if !under_way.is_empty() => {
                    done??;
                    // The step was not begun yet.
                    if stop.run_until_cancelled(tokio::time::sleep_until(begin + step.at)).await.is_none() {
                        break;
                    }
                    under_way.spawn(self.clone().take_turn(step, stop.clone()));
                }
            }
        }
        while let Some(done) = under_way.join_next().await {
            done??;
        }
        Ok(())
    }

    async fn take_turn(self: Arc<Self>, step: Step, stop: CancellationToken) -> Result<()> {
        let turn = &self.turns[step.fault.kind() as usize];
        // What waits at the end of the load is left out.
        let Some(_turn) = stop.run_until_cancelled(turn.lock()).await else { return Ok(()) };
        self.strike(step).await
    }

    async fn strike(&self, step: Step) -> Result<()> {
        let Step { fault, target, lasts, .. } = step;
        match fault {
            Fault::SidecarKill => {
                let (number, mut sidecar) = self.fleet.take(target).await;
                sidecar.kill9().await?;
                self.note(true, format!("s{number} is killed, for {:.1} s", lasts.as_secs_f64()));
                tokio::time::sleep(lasts).await;
                self.fleet.restart(number, &mut sidecar).await?;
                self.note(true, format!("s{number} is back"));
            }
            Fault::SidecarTerm => {
                let (number, mut sidecar) = self.fleet.take(target).await;
                self.note(true, format!("s{number} is told to end, for {:.1} s", lasts.as_secs_f64()));
                let status = sidecar.sigterm(Duration::from_secs(60)).await?;
                anyhow::ensure!(status.success(), "s{number} ended with {status} after SIGTERM");
                tokio::time::sleep(lasts).await;
                self.fleet.restart(number, &mut sidecar).await?;
                self.note(true, format!("s{number} is back"));
            }
            Fault::SidecarStop => {
                let (number, mut sidecar) = self.fleet.take(target).await;
                sidecar.process()?.signal(Signal::STOP)?;
                self.note(true, format!("s{number} is stopped, for {:.1} s", lasts.as_secs_f64()));
                tokio::time::sleep(lasts).await;
                sidecar.process()?.signal(Signal::CONT)?;
                self.note(true, format!("s{number} goes on, a zombie"));
            }
            Fault::ServiceKill => {
                self.service.down().await;
                self.note(false, format!("the service is gone, for {:.1} s", lasts.as_secs_f64()));
                tokio::time::sleep(lasts).await;
                self.service.up().await?;
                self.note(false, "the service is back");
            }
            Fault::ServiceHang => self.mood(Mood::Hangs, "hangs", lasts).await,
            Fault::ServiceStorm => self.mood(Mood::Storms, "answers 5xx", lasts).await,
            Fault::ServiceSlow => self.mood(Mood::Slow, "is slow", lasts).await,
            Fault::BrokerKill | Fault::BrokerTerm => {
                let cluster = self.cluster()?;
                let (number, kill) = (1 + target % cluster.len(), fault == Fault::BrokerKill);
                let how = if kill { "killed" } else { "told to end" };
                self.note(false, format!("broker {number} is {how}, for {:.1} s", lasts.as_secs_f64()));
                cluster.stop(target, kill).await?;
                tokio::time::sleep(lasts).await;
                cluster.start_again(target).await?;
                self.note(false, format!("broker {number} is back"));
                cluster.wait_in_sync(IN_SYNC).await?;
            }
            Fault::BrokerFreeze => {
                let cluster = self.cluster()?;
                let number = 1 + target % cluster.len();
                cluster.freeze(target, true)?;
                self.note(false, format!("broker {number} is frozen, for {:.1} s", lasts.as_secs_f64()));
                tokio::time::sleep(lasts).await;
                cluster.freeze(target, false)?;
                self.note(false, format!("broker {number} goes on"));
                cluster.wait_in_sync(IN_SYNC).await?;
            }
            Fault::Cut => {
                for _ in 0..3 {
                    (0..self.cluster()?.len()).for_each(|broker| self.cluster.iter().for_each(|cluster| cluster.proxy(broker).cut()));
                    self.note(false, "all connections to the brokers are cut");
                    tokio::time::sleep(lasts / 3).await;
                }
            }
            Fault::Blackhole => {
                let proxy = self.cluster()?.proxy(target);
                proxy.set(Network::Silent);
                let number = 1 + target % self.cluster()?.len();
                self.note(false, format!("nothing comes through to broker {number}, for {:.1} s", lasts.as_secs_f64()));
                tokio::time::sleep(lasts).await;
                proxy.set(Network::Well);
                self.note(false, format!("the way to broker {number} is open"));
                self.cluster()?.wait_in_sync(IN_SYNC).await?;
            }
            Fault::Latency => {
                self.cluster()?.set_all(Network::Slow(Duration::from_millis(50)));
                self.note(false, format!("the way to the brokers is slow, for {:.1} s", lasts.as_secs_f64()));
                tokio::time::sleep(lasts).await;
                self.cluster()?.set_all(Network::Well);
                self.note(false, "the way to the brokers is fast");
            }
            Fault::DiskFull => {
                let disk = self.disk.as_ref().context("a disk that fills up")?;
                let room = target as u32 * 1_777;
                disk.set(Some(room))?;
                self.note(false, format!("the disk has {room} bytes left, for {:.1} s", lasts.as_secs_f64()));
                tokio::time::sleep(lasts).await;
                disk.set(None)?;
                self.note(false, "the disk has room");
            }
            Fault::Swap => self.swap(lasts).await?,
            Fault::Scale => self.scale(lasts).await?,
        }
        Ok(())
    }

    fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_deref().context("brokers of the run's own")
    }

    async fn mood(&self, mood: Mood, what: &str, lasts: Duration) {
        self.service.mood(mood);
        self.note(false, format!("the service {what}, for {:.1} s", lasts.as_secs_f64()));
        tokio::time::sleep(lasts).await;
        self.service.mood(Mood::Well);
        self.note(false, "the service is well");
    }

    async fn swap(&self, lasts: Duration) -> Result<()> {
        let (begin, end) = (self.clock.now(), tokio::time::Instant::now() + lasts);
        let mut swaps = 0;
        while tokio::time::Instant::now() < end {
            let number = 1 + swaps % self.tables.len().saturating_sub(1).max(1);
            swaps += 1;
            self.apply(number).await?;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        self.apply(0).await?;
        self.swaps.lock().unwrap_or_else(PoisonError::into_inner).push((begin, self.clock.now()));
        self.note(false, format!("{} tables were put in force", swaps + 1));
        Ok(())
    }

    /// Applies a table; a broker or a sidecar that is away just now is waited for.
    async fn apply(&self, number: usize) -> Result<()> {
        let table = self.tables.get(number).context("a table")?;
        let until = tokio::time::Instant::now() + Duration::from_secs(90);
        loop {
            match self.fleet.apply(table).await {
                Ok(()) => return Ok(()),
                Err(error) if tokio::time::Instant::now() > until => return Err(error).context("a table was not taken for 90 s"),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }

    async fn scale(&self, lasts: Duration) -> Result<()> {
        let count = self.fleet.len();
        let steps = self.scale_to.saturating_sub(count);
        let pace = lasts / (2 * u32::try_from(steps.max(1))? + 1);
        let mut more = Vec::with_capacity(steps);
        for number in count..self.scale_to {
            self.note(true, format!("s{number} joins: {} sidecars", number + 1));
            more.push((number, self.fleet.another(number, false).await?));
            tokio::time::sleep(pace).await;
        }
        tokio::time::sleep(pace).await;
        while let Some((number, sidecar)) = more.pop() {
            self.note(true, format!("s{number} leaves: {number} sidecars"));
            sidecar.finish().await?;
            tokio::time::sleep(pace).await;
        }
        Ok(())
    }
}
