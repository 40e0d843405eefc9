//! What findings follow from how topics are. Pure.

use std::collections::BTreeSet;

use mesh_proto::v1::Finding;

use super::super::topics::{COMMANDS_TOPIC, CONTROL_TOPIC, OWN, Plan};
use super::judge::{bounded, error, named, ok, warning};
use crate::broker::{PartitionInfo, TopicInfo};

/// The topics of the table: `found` are those that exist, `plan` has what is missing and different. With one broker, or none that is told,
/// replication is no matter.
pub(super) fn of_table(found: &[TopicInfo], plan: &Plan, brokers: usize) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !plan.create.is_empty() {
        let names = named(plan.create.iter().map(|topic| topic.name.as_str()));
        let fix = "`mesh-ctl topics create TOPIC`, with the partitions that the table declares; without the right to describe a topic it is not seen either";
        findings.push(error("topics", &names, "the table names them, and they do not exist", fix));
    }
    for differs in &plan.differs {
        let (topic, declared, actual) = (&differs.topic, differs.declared, differs.actual);
        let fix = if declared > actual {
            format!("`mesh-ctl topics alter {topic} --partitions {declared}`, once its routes have read everything; or declare {actual}")
        } else {
            format!("declare {actual} partitions: a topic never has fewer again")
        };
        findings.push(warning("topics", topic, format!("it has {actual} partitions, and {declared} are due by the table"), fix));
    }
    findings.extend(durability("topics", found, brokers));
    if findings.is_empty() {
        let how = if brokers > 0 { "all partitions are led, and all replicas in sync" } else { "they are there as it wants them" };
        findings.push(ok("topics", "", format!("{} topics of the table: {how}", found.len())));
    }
    bounded("topics", findings)
}

/// The topics of the control plane; their settings only if the broker tells them.
pub(super) fn own(found: &[TopicInfo], brokers: usize, settings: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, wanted) in OWN {
        let Some(topic) = found.iter().find(|topic| topic.name == name) else {
            let fix = "a sidecar creates it: grant its principal CREATE and DESCRIBE on it, and see its log";
            findings.push(error("own-topics", name, "it does not exist, or may not be described", fix));
            continue;
        };
        if name == CONTROL_TOPIC && topic.partitions.len() != 1 {
            let what = format!("it has {} partitions: which table comes first is not told", topic.partitions.len());
            findings.push(error(
                "own-topics",
                name,
                what,
                "delete it with all sidecars down; the first to start creates it, then apply the table again",
            ));
        }
        if settings {
            findings.extend(policy(topic, wanted));
        }
    }
    findings.extend(durability("own-topics", found, brokers));
    if findings.is_empty() {
        let compacted = if settings { "they are compacted where they must be" } else { "they are there" };
        let led = if brokers > 0 { ", led, and in sync" } else { "" };
        findings.push(ok("own-topics", "", format!("{compacted}{led}")));
    }
    findings
}

/// Whether a topic of the control plane keeps what it must, and loses what it may.
fn policy(topic: &TopicInfo, wanted: &[(&str, &str)]) -> Option<Finding> {
    const NAME: &str = "cleanup.policy";
    let words = |text: &str| text.split(',').map(|word| word.trim().to_owned()).collect::<BTreeSet<String>>();
    let wanted = wanted.iter().find(|(name, _)| *name == NAME).map(|(_, value)| *value)?;
    // Kafka's default.
    let actual = topic.config.get(NAME).map_or("delete", String::as_str);
    if words(actual) == words(wanted) {
        return None;
    }
    let name = topic.name.as_str();
    let fix = format!("kafka-configs.sh --alter --entity-type topics --entity-name {name} --add-config {NAME}=[{wanted}]");
    let loses = words(actual).contains("delete") && !words(wanted).contains("delete");
    Some(match (loses, name == COMMANDS_TOPIC) {
        (true, _) => {
            let what =
                format!("{NAME} is {actual}, and must be {wanted}: what is in it is deleted with time, and then the mesh forgets it");
            error("own-topics", name, what, fix)
        }
        (false, true) => {
            warning("own-topics", name, format!("{NAME} is {actual}, and should be {wanted}: commands are never deleted"), fix)
        }
        (false, false) => {
            let what = format!("{NAME} is {actual}, and should be {wanted}: it grows, and each sidecar that starts reads all of it");
            warning("own-topics", name, what, fix)
        }
    })
}

/// What a broker that goes would do.
fn durability(check: &'static str, found: &[TopicInfo], brokers: usize) -> Vec<Finding> {
    let mut findings = Vec::new();
    let replication = |topic: &TopicInfo| topic.partitions.iter().map(|partition| partition.replicas.len()).min().unwrap_or(0);
    let in_sync = |topic: &TopicInfo| topic.min_in_sync.and_then(|least| usize::try_from(least).ok());
    let mut say = |wrong: &dyn Fn(&TopicInfo) -> bool, is_error: bool, what: &str, fix: &str| {
        let names: Vec<&str> = found.iter().filter(|topic| wrong(topic)).map(|topic| topic.name.as_str()).collect();
        if !names.is_empty() {
            let names = named(names);
            findings.push(if is_error { error(check, &names, what, fix) } else { warning(check, &names, what, fix) });
        }
    };
    let any = |topic: &TopicInfo, wrong: &dyn Fn(&PartitionInfo) -> bool| topic.partitions.iter().any(wrong);
    say(
        &|topic| any(topic, &|partition| partition.leader.is_none()),
        true,
        "nobody leads some of their partitions: nothing can be written or read there",
        "bring a broker back that has a replica: `mesh-ctl topics describe TOPIC` tells which",
    );
    if brokers < 2 {
        return findings;
    }
    // Brokers that are away are not listed among the brokers any more: here they show.
    let lags = |one: &PartitionInfo| one.replicas.iter().copied().filter(|id| !one.in_sync.contains(id)).collect::<Vec<i32>>();
    let behind: BTreeSet<i32> = found.iter().flat_map(|topic| &topic.partitions).flat_map(lags).collect();
    let behind = behind.iter().map(i32::to_string).collect::<Vec<_>>().join(", ");
    let short =
        |topic: &TopicInfo| in_sync(topic).is_some_and(|least| any(topic, &|one| one.leader.is_some() && one.in_sync.len() < least));
    say(
        &short,
        true,
        "fewer replicas are in sync than min.insync.replicas asks for: nothing can be written to those partitions",
        &format!("bring the brokers back that have the other replicas ({behind}), or wait until they have caught up"),
    );
    say(
        &|topic| !short(topic) && any(topic, &|one| one.leader.is_some() && one.in_sync.len() < one.replicas.len()),
        false,
        &format!("some replicas are not in sync, on broker {behind}: away, or behind"),
        "bring it back, or see why it is slow; `mesh-ctl topics describe TOPIC` tells of each partition",
    );
    say(
        &|topic| replication(topic) == 1,
        false,
        "one replica only: a broker that is lost takes their records with it",
        "kafka-reassign-partitions.sh gives them more; `replication` in the table, and default.replication.factor, count for topics that are made later",
    );
    say(
        &|topic| replication(topic) > 1 && in_sync(topic) == Some(1),
        false,
        "min.insync.replicas is 1: a record is acknowledged when it is on one broker alone, and can be lost with it",
        "kafka-configs.sh --alter --entity-type topics --entity-name TOPIC --add-config min.insync.replicas=2, or set it at the brokers",
    );
    say(
        &|topic| replication(topic) > 1 && in_sync(topic).is_some_and(|least| least >= replication(topic)),
        false,
        "min.insync.replicas is the replication factor: one broker that is away keeps everything from being written",
        "set it to one less than the replication factor",
    );
    findings
}

#[cfg(test)]
mod tests {
    use mesh_proto::v1::Severity;

    use super::*;
    use crate::broker::NewTopic;
    use crate::control::topics::Differs;

    fn topic(name: &str, replicas: &[i32], in_sync: &[i32], min_in_sync: Option<u32>) -> TopicInfo {
        let partition = PartitionInfo { leader: in_sync.first().copied(), replicas: replicas.to_vec(), in_sync: in_sync.to_vec() };
        TopicInfo { name: name.into(), partitions: vec![partition], min_in_sync, ..TopicInfo::default() }
    }

    fn said(findings: &[Finding]) -> Vec<(Severity, &str, &str)> {
        let short = |finding: &Finding| finding.what.char_indices().nth(24).map_or(finding.what.len(), |(at, _)| at);
        findings.iter().map(|finding| (finding.severity(), finding.subject.as_str(), &finding.what[..short(finding)])).collect()
    }

    #[test]
    fn topics_that_are_missing_different_or_frail() {
        let plan = Plan {
            create: vec![NewTopic { name: "new".into(), ..NewTopic::default() }],
            differs: vec![
                Differs { topic: "few".into(), declared: 6, actual: 4 },
                Differs { topic: "many".into(), declared: 2, actual: 4 },
            ],
        };
        let found = [
            topic("fine", &[1, 2, 3], &[1, 2, 3], Some(2)),
            topic("one", &[1], &[1], Some(1)),
            topic("frail", &[1, 2, 3], &[1, 2, 3], Some(1)),
            topic("strict", &[1, 2], &[1, 2], Some(2)),
            topic("behind", &[1, 2, 3], &[1, 2], Some(2)),
            topic("short", &[1, 2, 3], &[1], Some(2)),
            topic("headless", &[1, 2, 3], &[], Some(2)),
        ];
        let findings = of_table(&found, &plan, 3);
        assert_eq!(
            said(&findings),
            [
                (Severity::Error, "new", "the table names them, an"),
                (Severity::Warning, "few", "it has 4 partitions, and"),
                (Severity::Warning, "many", "it has 4 partitions, and"),
                (Severity::Error, "headless", "nobody leads some of the"),
                (Severity::Error, "short", "fewer replicas are in sy"),
                (Severity::Warning, "behind", "some replicas are not in"),
                (Severity::Warning, "one", "one replica only: a brok"),
                (Severity::Warning, "frail", "min.insync.replicas is 1"),
                (Severity::Warning, "strict", "min.insync.replicas is t"),
            ]
        );
        assert!(findings[1].fix.contains("alter few --partitions 6") && findings[2].fix.contains("declare 4"), "{findings:?}");
        // On one broker, or in one process, nothing of replicas is said.
        assert_eq!(of_table(&found[1..2], &Plan::default(), 1)[0].severity(), Severity::Ok);
        assert_eq!(of_table(&found[1..2], &Plan::default(), 0)[0].severity(), Severity::Ok);
    }

    #[test]
    fn the_mesh_s_own_topics_keep_what_they_must() {
        let with = |name: &str, policy: Option<&str>| {
            let mut topic = topic(name, &[1], &[1], None);
            topic.config.extend(policy.map(|policy| ("cleanup.policy".to_owned(), policy.to_owned())));
            topic
        };
        let good: Vec<TopicInfo> = OWN
            .iter()
            .map(|(name, config)| with(name, config.iter().find(|(key, _)| *key == "cleanup.policy").map(|(_, policy)| *policy)))
            .collect();
        assert_eq!(own(&good, 1, true)[0].severity(), Severity::Ok);
        let mut bad = good.clone();
        bad[0] = with(CONTROL_TOPIC, None);
        bad[0].partitions.push(PartitionInfo { leader: Some(1), replicas: vec![1], in_sync: vec![1] });
        bad[1].config.insert("cleanup.policy".into(), "compact".into());
        bad[2].config.insert("cleanup.policy".into(), "compact".into());
        bad.pop();
        let findings = own(&bad, 1, true);
        assert_eq!(
            said(&findings),
            [
                (Severity::Error, CONTROL_TOPIC, "it has 2 partitions: whi"),
                (Severity::Error, CONTROL_TOPIC, "cleanup.policy is delete"),
                (Severity::Warning, OWN[1].0, "cleanup.policy is compac"),
                (Severity::Warning, COMMANDS_TOPIC, "cleanup.policy is compac"),
                (Severity::Error, OWN[3].0, "it does not exist, or ma"),
            ]
        );
        assert!(own(&bad, 1, false).iter().all(|finding| !finding.what.contains("cleanup")), "settings that are not told are not judged");
        // The order and the spaces of a list are no matter.
        bad[1].config.insert("cleanup.policy".into(), "delete, compact".into());
        assert!(own(&bad, 1, true).iter().all(|finding| finding.subject != OWN[1].0));
    }
}
