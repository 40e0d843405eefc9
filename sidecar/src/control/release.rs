//! Records whose attempts are used up, and that are to go on: having it done by the owners of their partitions.
//!
//! Invariant: every partition of the route's sources was looked through by its owner, or is named in the answer.
//! Invariant: none is looked through again: what fails anew while other owners are waited for is not released again and again.

use std::collections::BTreeSet;

use mesh_proto::v1;

use super::{
    Control,
    commands::{release_at, write_place},
    owners::Owners,
    reset::OperationError,
};
use crate::record::TopicPartition;

impl Control {
    /// Releases records of a route. Dropping the future gives up; owners that were asked may obey until the request's time is over.
    ///
    /// # Errors
    /// Why nobody was even asked. What was not reached is in the response.
    pub async fn release(&self, request: v1::ReleaseRequest) -> Result<v1::ReleaseResponse, OperationError> {
        let route = self.route(&request.route).await?;
        let existing = self.0.broker.admin().topics().await?;
        let partitions = |topic: &std::sync::Arc<str>| {
            let count = existing.get(&**topic).copied().unwrap_or(0);
            let topic = topic.clone();
            (0..count).map(move |partition| TopicPartition { topic: topic.clone(), partition })
        };
        let mut left: BTreeSet<TopicPartition> = route.from.iter().flat_map(partitions).collect();
        let wish = |left: &BTreeSet<TopicPartition>| {
            let partitions = left.iter().map(|partition| write_place(partition, 0)).collect();
            v1::ReleaseRecords { one_key: request.one_key, key: request.key.clone(), discard: request.discard, partitions }
        };
        let (mut released, mut trouble) = (0, String::new());
        let mut owners = Owners::new(&self.0, &route.name, request.wait_ms);
        while !left.is_empty() && owners.in_time() {
            owners.ask(|owner, until| release_at(&self.0, owner, &route.name, wish(&left), until));
            match owners.next().await {
                Some((_, Ok(answer))) => {
                    released += answer.records;
                    left.retain(|partition| !answer.partitions.contains(partition));
                }
                Some((_, Err(error))) => trouble = error,
                None => {}
            }
        }
        let unowned = || match trouble.is_empty() {
            true => format!("no running instance owned them within {} s: see `mesh-ctl status`", owners.wait().as_secs_f64()),
            false => trouble.clone(),
        };
        let reason = if left.is_empty() { String::new() } else { owners.silence("").unwrap_or_else(unowned) };
        Ok(v1::ReleaseResponse { released, missing: left.iter().map(ToString::to_string).collect(), reason })
    }
}
