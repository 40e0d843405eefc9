//! What is wrong with the mesh, and how to mend it: `mesh-ctl doctor`.
//!
//! The checks run at the same time, each with a deadline of its own; what they found is judged by pure functions (`judge`, `judge_topics`).
//!
//! Invariant: looking changes nothing: no group is joined, nothing is written or created.
//! Invariant: it ends: a check that is not done in time says so, and a broker that is away is a finding.

mod judge;
mod judge_topics;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use mesh_proto::v1::{self, Finding};
use mesh_routing::CompiledTable;
use tokio::{net::TcpStream, time::timeout};

use self::judge::{Reached, error, ok, warning};
use super::{
    Control, report,
    state::{Shared, now_ms},
    topics::OWN,
};
use crate::{
    broker::{Admin, BrokerError, BrokerErrorKind, TopicInfo},
    record::TopicPartition,
};

/// How long a check may take. The longest question to a broker takes 10 s.
const DEADLINE: Duration = Duration::from_secs(15);
/// How long a broker may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// How many brokers are connected to, at most and at once.
const BROKERS: usize = 200;
const CONNECTIONS: usize = 16;
/// How many of the topics that nobody lists are asked for one by one, and how many groups.
const ASKED_TOPICS: usize = 50;
const ASKED_GROUPS: usize = 20;
/// How many are asked at once.
const QUESTIONS: usize = 4;
/// With more records than this in all dead-letter topics those that were sent back are not told apart.
const COUNTED_LETTERS: u64 = 100_000;

impl Control {
    /// Looks for what is wrong. Takes some seconds at most where the broker answers, and 30 s where it does not.
    pub async fn diagnose(&self, request: v1::DiagnoseRequest) -> v1::DiagnoseResponse {
        let shared = &self.0;
        let now = now_ms();
        let status = report::mesh(shared);
        let (table, unread) = match shared.whole().await {
            Ok(table) => (table, None),
            Err(why) => {
                let own = shared.table.borrow().as_ref().map(|table| table.compiled.clone());
                let hint = "bring all sidecars to one version; what else is found here is about the routes of its own services";
                (own, Some(warning("table", &shared.instance, why.to_string(), hint)))
            }
        };
        let mut findings = self.broker_findings(table.as_deref()).await;
        findings.extend(unread);
        findings.extend(judge::clocks(request.now_ms, now, &report::clocks(shared)));
        findings.extend(judge::table(&status, &shared.instance, table.is_some()));
        findings.extend(judge::instances(&status, &report::twins(shared)));
        findings.extend(judge::routes(&status, table.as_deref(), now));
        v1::DiagnoseResponse { mesh: shared.config.mesh.to_string(), instance: shared.instance.clone(), findings }
    }

    /// What takes the broker.
    async fn broker_findings(&self, table: Option<&CompiledTable>) -> Vec<Finding> {
        let shared = &self.0;
        let admin = shared.broker.admin();
        let (brokers, existing) = tokio::join!(brokers(shared, &*admin), timeout(DEADLINE, admin.topics()));
        let (cluster, mut findings) = brokers;
        let existing = match existing {
            Ok(Ok(existing)) => existing,
            Ok(Err(why)) => {
                findings.push(error("brokers", shared.broker.system(), why.to_string(), BROKER_AWAY));
                return findings;
            }
            Err(_) => {
                let what = format!("the broker did not list its topics within {} s", DEADLINE.as_secs());
                findings.push(error("brokers", shared.broker.system(), what, BROKER_AWAY));
                return findings;
            }
        };
        let checks = tokio::join!(
            in_time("topics", topics(&*admin, table, &existing, cluster)),
            in_time("own-topics", own_topics(&*admin, &existing, cluster)),
            in_time("authorization", authorization(&*admin, table, &existing, cluster)),
            in_time("dead-letters", self.dead_letters(table, &existing)),
        );
        findings.extend([checks.2, checks.0, checks.1, checks.3].concat());
        findings
    }

    /// Dead letters that nobody has decided about.
    async fn dead_letters(&self, table: Option<&CompiledTable>, existing: &BTreeMap<String, i32>) -> Vec<Finding> {
        let admin = self.0.broker.admin();
        let topics: BTreeSet<&Arc<str>> = table.iter().flat_map(|table| &table.routes).map(|route| &route.dead_letter).collect();
        let partitions: Vec<TopicPartition> = topics
            .into_iter()
            .flat_map(|topic| {
                let count = existing.get(&**topic).copied().unwrap_or(0);
                (0..count).map(move |partition| TopicPartition { topic: topic.clone(), partition })
            })
            .collect();
        let marks = match admin.all_watermarks(partitions.clone()).await {
            Ok(marks) => marks,
            Err(why) => {
                return vec![warning(
                    "dead-letters",
                    "",
                    format!("they could not be counted: {why}"),
                    "see the findings about brokers and topics",
                )];
            }
        };
        let offsets: u64 = marks.iter().map(|(low, high)| u64::try_from(high - low).unwrap_or(0)).sum();
        if offsets > COUNTED_LETTERS {
            let full = partitions.iter().zip(marks).filter(|(_, (low, high))| high > low).map(|(partition, _)| partition.topic.to_string());
            return judge::many_letters(offsets, &full.collect());
        }
        if offsets == 0 {
            return judge::letters(&[]);
        }
        match self.list_dead_letters("").await {
            Ok(listed) => judge::letters(&listed.counts),
            Err(why) => {
                vec![warning("dead-letters", "", format!("they could not be read: {why}"), "see the findings about brokers and topics")]
            }
        }
    }
}

/// What to do about a broker that does not answer.
const BROKER_AWAY: &str = "start it, or correct `broker` in the sidecar's config; `mesh-ctl status` says what waits for it";

/// A check, within its time.
async fn in_time(check: &'static str, work: impl Future<Output = Vec<Finding>>) -> Vec<Finding> {
    timeout(DEADLINE, work).await.unwrap_or_else(|_| {
        let what = format!("it was not found out within {} s", DEADLINE.as_secs());
        vec![warning(check, "", what, "see the findings about brokers; then ask again")]
    })
}

/// Whether each broker answers at the address that it tells clients; and how many there are.
async fn brokers(shared: &Shared, admin: &dyn Admin) -> (usize, Vec<Finding>) {
    let mut findings = Vec::new();
    // Its own answer may come from what it knows: what the clients met lately counts as well.
    if let Err(why) = shared.broker.health() {
        findings.push(error("brokers", shared.broker.system(), why.to_string(), BROKER_AWAY));
    }
    let nodes = match timeout(DEADLINE, admin.brokers()).await {
        Ok(Ok(nodes)) => nodes,
        Ok(Err(why)) => {
            if findings.is_empty() {
                findings.push(error("brokers", shared.broker.system(), why.to_string(), BROKER_AWAY));
            }
            return (0, findings);
        }
        Err(_) => {
            let what = format!("no broker told which there are within {} s", DEADLINE.as_secs());
            findings.push(error("brokers", shared.broker.system(), what, BROKER_AWAY));
            return (0, findings);
        }
    };
    let count = nodes.len();
    let connecting = nodes.into_iter().take(BROKERS).map(|node| async move {
        let connected = timeout(CONNECT, TcpStream::connect((node.host.as_str(), node.port))).await;
        let failure = match connected {
            Ok(Ok(_)) => None,
            Ok(Err(why)) => Some(why.to_string()),
            Err(_) => Some(format!("no answer within {} s", CONNECT.as_secs())),
        };
        Reached { node, failure }
    });
    let reached: Vec<Reached> = stream::iter(connecting).buffered(CONNECTIONS).collect().await;
    let well = findings.is_empty();
    let judged = judge::brokers(&reached, count);
    findings.extend(judged.into_iter().filter(|finding| well || finding.severity() != v1::Severity::Ok));
    if count == 0 && findings.is_empty() {
        findings.push(ok("brokers", shared.broker.system(), "the broker is in this process, and answers"));
    }
    (count, findings)
}

/// Topics as they are; their settings, too, if the broker tells them. Else why not.
async fn described(admin: &dyn Admin, names: Vec<String>) -> Result<(Vec<TopicInfo>, Option<BrokerError>), BrokerError> {
    match admin.describe_topics(names.clone(), true).await {
        Ok(found) => Ok((found, None)),
        Err(why) if why.kind == BrokerErrorKind::Unauthorized => Ok((admin.describe_topics(names, false).await?, Some(why))),
        Err(why) => Err(why),
    }
}

fn not_described(check: &'static str, why: &BrokerError) -> Finding {
    warning(check, "", format!("the topics could not be described: {why}"), "see the findings about brokers and authorization")
}

fn no_settings(check: &'static str, why: &BrokerError) -> Finding {
    warning(check, "", format!("settings were not looked at: {why}"), "grant this sidecar's principal DESCRIBE_CONFIGS on the topics")
}

/// The topics of the table.
async fn topics(admin: &dyn Admin, table: Option<&CompiledTable>, existing: &BTreeMap<String, i32>, brokers: usize) -> Vec<Finding> {
    let Some(table) = table else { return Vec::new() };
    let names: Vec<String> = table.topics.iter().map(|topic| topic.name.to_string()).filter(|name| existing.contains_key(name)).collect();
    match described(admin, names).await {
        Ok((found, unsettled)) => {
            let plan = super::topics::plan(table, existing);
            let mut findings = judge_topics::of_table(&found, &plan, brokers);
            findings.extend(unsettled.iter().map(|why| no_settings("topics", why)));
            findings
        }
        Err(why) => vec![not_described("topics", &why)],
    }
}

/// The topics of the control plane.
async fn own_topics(admin: &dyn Admin, existing: &BTreeMap<String, i32>, brokers: usize) -> Vec<Finding> {
    let names: Vec<String> = OWN.iter().map(|(name, _)| (*name).to_owned()).filter(|name| existing.contains_key(name)).collect();
    match described(admin, names).await {
        Ok((found, unsettled)) => {
            let mut findings = judge_topics::own(&found, brokers, unsettled.is_none());
            findings.extend(unsettled.iter().map(|why| no_settings("own-topics", why)));
            findings
        }
        Err(why) => vec![not_described("own-topics", &why)],
    }
}

/// What the broker refuses: topics of the table that it does not list, and the groups of routes.
async fn authorization(admin: &dyn Admin, table: Option<&CompiledTable>, existing: &BTreeMap<String, i32>, brokers: usize) -> Vec<Finding> {
    // A broker in this process refuses nothing.
    let Some(table) = table.filter(|_| brokers > 0) else { return Vec::new() };
    // A topic that may not be described is left out of the list, as if it were not there.
    let hidden = table.topics.iter().map(|topic| topic.name.to_string()).filter(|name| !existing.contains_key(name)).take(ASKED_TOPICS);
    let asked: Vec<_> =
        hidden.map(|topic| async move { (format!("topic {topic}"), admin.offsets_at(&topic, 0).await.map(drop)) }).collect();
    let topics: Vec<(String, Result<(), BrokerError>)> = stream::iter(asked).buffered(QUESTIONS).collect().await;
    let groups = table.routes.iter().filter_map(|route| {
        let source = route.from.iter().find(|source| existing.contains_key(&***source))?;
        Some((route.group.clone(), TopicPartition { topic: source.clone(), partition: 0 }))
    });
    let asked: Vec<_> = groups
        .take(ASKED_GROUPS)
        .map(|(group, partition)| async move { (format!("group {group}"), admin.committed(&group, vec![partition]).await.map(drop)) })
        .collect();
    let groups: Vec<(String, Result<(), BrokerError>)> = stream::iter(asked).buffered(QUESTIONS).collect().await;
    judge::authorization(&topics, &groups, table.routes.len())
}
