//! Records whose attempts are used up, and that are to go on: having it done by the owners of their partitions.
//!
//! Invariant: every partition of the route's sources was looked through by its owner, or is named in the answer.

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use mesh_proto::v1;
use tokio::time::{Instant, sleep_until};

use super::{Control, commands::release_at, report, reset::OperationError};
use crate::record::TopicPartition;

/// How long owners may take where the request does not say.
const WAIT: Duration = Duration::from_secs(30);
/// The longest that they may take.
const LONGEST: Duration = Duration::from_secs(10 * 60);
/// How often it is looked who may own a partition.
const LOOK: Duration = Duration::from_millis(250);

impl Control {
    /// Releases records of a route. Dropping the future gives up; owners that were asked may obey until the request's time is over.
    ///
    /// # Errors
    /// Why nobody was even asked. What was not reached is in the response.
    pub async fn release(&self, request: v1::ReleaseRequest) -> Result<v1::ReleaseResponse, OperationError> {
        let route = self.route(&request.route)?;
        let existing = self.0.broker.admin().topics().await?;
        let partitions = |topic: &std::sync::Arc<str>| {
            let count = existing.get(&**topic).copied().unwrap_or(0);
            let topic = topic.clone();
            (0..count).map(move |partition| TopicPartition { topic: topic.clone(), partition })
        };
        let mut left: BTreeSet<TopicPartition> = route.from.iter().flat_map(partitions).collect();
        let wait = if request.wait_ms == 0 { WAIT } else { Duration::from_millis(request.wait_ms).min(LONGEST) };
        let deadline = Instant::now() + wait;
        let wish = v1::ReleaseRecords { one_key: request.one_key, key: request.key, discard: request.discard };
        let (mut released, mut trouble) = (0, String::new());
        let mut asked = FuturesUnordered::new();
        // Who was asked and has not answered; and who answered just now.
        let (mut silent, mut idle): (BTreeSet<String>, HashSet<String>) = Default::default();
        let mut look = Instant::now();
        while !left.is_empty() && Instant::now() < deadline {
            if Instant::now() >= look {
                look = Instant::now() + LOOK;
                idle.clear();
            }
            for owner in report::instances_of(&self.0, &route.name) {
                if !idle.contains(&owner) && silent.insert(owner.clone()) {
                    asked.push(release_at(&self.0, &owner, &route.name, wish.clone(), deadline));
                }
            }
            tokio::select! {
                Some((owner, answered)) = asked.next(), if !asked.is_empty() => {
                    silent.remove(&owner);
                    idle.insert(owner);
                    match answered {
                        Ok(answer) => {
                            released += answer.records;
                            left.retain(|partition| !answer.partitions.contains(partition));
                        }
                        Err(error) => trouble = error,
                    }
                }
                () = sleep_until(look.min(deadline)) => {}
            }
        }
        let reason = match (left.is_empty(), silent.is_empty()) {
            (true, _) => String::new(),
            (false, false) => {
                let names: Vec<&str> = silent.iter().map(String::as_str).collect();
                format!("no answer within {} s from instance {}: is it alive? See `mesh-ctl status`", wait.as_secs_f64(), names.join(", "))
            }
            (false, true) if !trouble.is_empty() => trouble,
            (false, true) => format!("no running instance owned them within {} s: see `mesh-ctl status`", wait.as_secs_f64()),
        };
        Ok(v1::ReleaseResponse { released, missing: left.iter().map(ToString::to_string).collect(), reason })
    }
}
