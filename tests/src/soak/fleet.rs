//! The sidecars of a run.
//!
//! Invariant: whoever does something to a sidecar holds its lock for as long as it lasts, so that two faults never strike one at once.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use mesh_proto::v1::{GetStatusResponse, InstanceState};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::watch::Watched;
use crate::{sidecar::Sidecar, stage::Stage};

/// One sidecar, shared.
pub type Shared = Arc<Mutex<Sidecar>>;

/// How a sidecar of the fleet is made.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// The service's address.
    pub app: String,
    /// Variables of the environment.
    pub environment: Vec<(String, String)>,
    /// A fault that is built into the sidecars.
    pub mutation: Option<String>,
}

/// The sidecars that take publishes and serve the route.
#[derive(Debug)]
pub struct Fleet {
    stage: Stage,
    recipe: Recipe,
    sidecars: Vec<Shared>,
    apis: Vec<SocketAddr>,
    watched: Watched,
}

impl Fleet {
    /// Starts so many, each ready. Every second one is a static member, if the broker knows such.
    ///
    /// # Errors
    /// If one does not start.
    pub async fn start(stage: Stage, recipe: Recipe, count: usize, watched: Watched) -> Result<Self> {
        let mut fleet = Self { stage, recipe, sidecars: Vec::new(), apis: Vec::new(), watched };
        for number in 0..count {
            let sidecar = fleet.another(number, number % 2 == 1).await?;
            fleet.apis.push(sidecar.api_address());
            fleet.sidecars.push(Arc::new(Mutex::new(sidecar)));
        }
        Ok(fleet)
    }

    /// Starts one more that is not of the fleet.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn another(&self, number: usize, instance: bool) -> Result<Sidecar> {
        let name = format!("s{number}");
        let mut builder = self.stage.sidecar(&name).app("work", &self.recipe.app);
        for (variable, value) in &self.recipe.environment {
            builder = builder.env(variable, value);
        }
        if let Some(mutation) = &self.recipe.mutation {
            builder = builder.mutation(mutation);
        }
        if instance {
            builder = builder.instance(&name);
        }
        let mut sidecar = builder.start().await?;
        self.watched.add(&name, sidecar.process()?.id());
        Ok(sidecar)
    }

    /// The APIs of all.
    pub fn apis(&self) -> &[SocketAddr] {
        &self.apis
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sidecars.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sidecars.is_empty()
    }

    /// One of them, once nobody else does something to it; with its number.
    pub async fn take(&self, target: usize) -> (usize, OwnedMutexGuard<Sidecar>) {
        let number = target % self.sidecars.len().max(1);
        (number, self.sidecars[number].clone().lock_owned().await)
    }

    /// One to which nothing is done now.
    pub fn any(&self) -> Option<OwnedMutexGuard<Sidecar>> {
        self.sidecars.iter().find_map(|sidecar| sidecar.clone().try_lock_owned().ok())
    }

    /// Starts a sidecar of the fleet again, and waits until it is ready. One that ends since the disk is full is started again and again, as whoever
    /// looks after processes does.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn restart(&self, number: usize, sidecar: &mut Sidecar) -> Result<()> {
        let end = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            sidecar.spawn()?;
            self.watched.add(&format!("s{number}"), sidecar.process()?.id());
            let Err(error) = sidecar.wait_ready().await else { return Ok(()) };
            let full = sidecar.log_text().lines().last().is_some_and(|line| line.contains("cannot prepare the store"));
            if !full || tokio::time::Instant::now() > end {
                return Err(error.context(format!("s{number} after a fault")));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Applies a table by whichever sidecar is there.
    ///
    /// # Errors
    /// If none takes it.
    pub async fn apply(&self, spec: &str) -> Result<()> {
        let sidecar = self.any().context("no sidecar is free")?;
        sidecar.apply(spec).await.map(drop)
    }

    /// Waits until all run the newest table; `None` when they do, else what stands in the way.
    pub async fn is_at_one(&self, deadline: Duration) -> Option<String> {
        let count = self.sidecars.len();
        let one = |status: &GetStatusResponse| {
            let synced = status.instances.iter().filter(|instance| instance.state() == InstanceState::Synced);
            let generations: BTreeSet<(u64, &str)> = synced.clone().map(|instance| (instance.generation, &*instance.digest)).collect();
            status.instances.len() == count && synced.count() == count && generations.len() == 1
        };
        let Some(sidecar) = self.any() else { return Some("no sidecar is free".to_owned()) };
        sidecar.wait_status("all on the newest table", deadline, one).await.err().map(|error| format!("{error:#}"))
    }

    /// Ends all in good order.
    ///
    /// # Errors
    /// If one does not end, or not with 0.
    pub async fn finish(self) -> Result<()> {
        for sidecar in self.sidecars {
            let sidecar = Arc::into_inner(sidecar).context("a sidecar is in use")?.into_inner();
            sidecar.finish().await?;
        }
        Ok(())
    }
}
