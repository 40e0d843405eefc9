//! What findings follow from what was seen. Pure.
//!
//! Invariant: a check that found nothing to say says that it is well, once.

use std::collections::{BTreeMap, BTreeSet};

use mesh_proto::v1::{self, Finding, InstanceState, RouteState, Severity};
use mesh_routing::CompiledTable;

use crate::broker::{BrokerError, BrokerErrorKind, BrokerNode};

/// Clocks that differ by more than this, in milliseconds, deserve a look.
const SKEW_MS: i64 = 2_000;
/// A route that joins its group for longer than this, in milliseconds, deserves a look.
const JOINING_MS: i64 = 60_000;
/// How many names a finding has at most.
const NAMED: usize = 8;
/// How many findings of one kind there are at most.
const FINDINGS: usize = 50;

fn finding(severity: Severity, check: &str, subject: &str, what: impl Into<String>, fix: impl Into<String>) -> Finding {
    let (check, subject) = (check.to_owned(), subject.to_owned());
    Finding { severity: severity.into(), check, subject, what: what.into(), fix: fix.into() }
}

pub(super) fn ok(check: &str, subject: &str, what: impl Into<String>) -> Finding {
    finding(Severity::Ok, check, subject, what, "")
}

pub(super) fn warning(check: &str, subject: &str, what: impl Into<String>, fix: impl Into<String>) -> Finding {
    finding(Severity::Warning, check, subject, what, fix)
}

pub(super) fn error(check: &str, subject: &str, what: impl Into<String>, fix: impl Into<String>) -> Finding {
    finding(Severity::Error, check, subject, what, fix)
}

/// The first names, and how many more there are.
pub(super) fn named<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    let mut names = names.into_iter();
    let mut said = Vec::new();
    for name in names.by_ref().take(NAMED) {
        said.push(name.as_ref().to_owned());
    }
    let more = names.count();
    if more > 0 { format!("{} and {more} more", said.join(", ")) } else { said.join(", ") }
}

/// At most so many findings of a kind; those that are left out are counted.
pub(super) fn bounded(check: &str, mut findings: Vec<Finding>) -> Vec<Finding> {
    if findings.len() > FINDINGS {
        // The worst ones stay.
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        let left_out = findings.split_off(FINDINGS).len();
        findings.push(warning(check, "", format!("{left_out} more findings of this kind are left out"), "mend these, and ask again"));
    }
    findings
}

/// A broker, and why nobody answers at its address, if so.
pub(super) struct Reached {
    pub(super) node: BrokerNode,
    pub(super) failure: Option<String>,
}

/// What the brokers' advertised addresses are worth; `count` is how many there are, of which only the first are asked.
pub(super) fn brokers(reached: &[Reached], count: usize) -> Vec<Finding> {
    let mut findings = Vec::new();
    for Reached { node: BrokerNode { id, host, port }, failure } in reached {
        if let Some(why) = failure {
            let fix = "start that broker; if it runs, its `advertised.listeners` names an address that cannot be reached from here: correct it, or open the way";
            findings.push(error(
                "brokers",
                &format!("broker {id}"),
                format!("it is advertised as {host}:{port}, and does not answer there: {why}"),
                fix,
            ));
        }
    }
    if findings.is_empty() && count > 0 {
        let addresses = named(reached.iter().map(|one| format!("{}:{}", one.node.host, one.node.port)));
        let verb = if count == 1 { "broker answers at its advertised address" } else { "brokers answer at their advertised addresses" };
        findings.push(ok("brokers", "", format!("{count} {verb}: {addresses}")));
    }
    bounded("brokers", findings)
}

/// What the broker refuses, of what was asked for.
pub(super) fn authorization(
    topics: &[(String, Result<(), BrokerError>)],
    groups: &[(String, Result<(), BrokerError>)],
    routes: usize,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (subject, answer) in topics.iter().chain(groups) {
        match answer {
            Err(why) if why.kind == BrokerErrorKind::Unauthorized => {
                let fix = "grant this sidecar's principal DESCRIBE, READ and WRITE on the topics of its routes, and DESCRIBE and READ on their groups (kafka-acls.sh --add)";
                findings.push(error("authorization", subject, format!("the broker refuses it: {why}"), fix));
            }
            // What is missing is told as such.
            Ok(()) | Err(BrokerError { kind: BrokerErrorKind::UnknownTopic, .. }) => {}
            Err(why) => {
                findings.push(warning("authorization", subject, format!("it was not found out: {why}"), "see the findings about brokers"));
            }
        }
    }
    if findings.is_empty() {
        let asked = if groups.len() < routes { format!("{} of {routes} groups", groups.len()) } else { "all groups".to_owned() };
        let what = format!(
            "topics can be described, and what {asked} committed can be read; whether records can be read and written is seen only where it is done: routes say so"
        );
        findings.push(ok("authorization", "", what));
    }
    bounded("authorization", findings)
}

/// Clocks: that of whoever asks (0: unknown), this one, and how far those of other instances are behind this one, in milliseconds.
pub(super) fn clocks(asks_ms: i64, now_ms: i64, others: &[(String, i64)]) -> Vec<Finding> {
    let fix = "synchronise the clocks (NTP, chrony): times of records, retries and resets by time follow them";
    let apart = |behind: i64| {
        let word = if behind > 0 { "behind" } else { "ahead of" };
        format!("{:.1} s {word} this sidecar's", behind.unsigned_abs() as f64 / 1_000.0)
    };
    let mut findings = Vec::new();
    let behind = now_ms.saturating_sub(asks_ms);
    if asks_ms > 0 && behind.abs() > SKEW_MS {
        findings.push(warning("clocks", "mesh-ctl", format!("the clock where mesh-ctl runs is {}", apart(behind)), fix));
    }
    for (instance, behind) in others.iter().filter(|(_, behind)| behind.abs() > SKEW_MS) {
        findings.push(warning("clocks", instance, format!("its clock is {}", apart(*behind)), fix));
    }
    if findings.is_empty() {
        let compared = match (asks_ms > 0, others.len()) {
            (_, 0) => "this sidecar and mesh-ctl agree".to_owned(),
            (true, 1) => "this sidecar, mesh-ctl and another instance agree".to_owned(),
            (true, many) => format!("this sidecar, mesh-ctl and {many} other instances agree"),
            (false, many) => format!("this sidecar and {many} other instances agree"),
        };
        findings.push(ok("clocks", "", format!("{compared} within 2 s; brokers do not tell theirs")));
    }
    bounded("clocks", findings)
}

/// Whether there is a table.
pub(super) fn table(status: &v1::GetStatusResponse, own: &str, here: bool) -> Vec<Finding> {
    let origin = status.instances.iter().find(|instance| instance.instance == own).map(v1::InstanceStatus::origin);
    match (here, status.generation, origin) {
        (false, 0, _) => {
            vec![warning(
                "table",
                "",
                "this sidecar has no routing table: nothing is routed",
                "`mesh-ctl apply -f FILE` gives the mesh one",
            )]
        }
        (false, generation, _) => {
            let what = format!("the mesh has generation {generation}, and this sidecar has no table in force");
            vec![error("table", own, what, "the finding about the instance says why")]
        }
        (true, _, Some(v1::TableOrigin::Pinned)) => vec![ok("table", own, "its config pins a table: `apply` is refused there")],
        (true, generation, _) => vec![ok("table", "", format!("generation {generation} is in force here"))],
    }
}

/// How the instances stand; `twins` are names under which two processes report.
pub(super) fn instances(status: &v1::GetStatusResponse, twins: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for instance in &status.instances {
        let (name, generation) = (instance.instance.as_str(), instance.generation);
        let said = match instance.state() {
            InstanceState::Nacked => Some(error(
                "instances",
                name,
                format!("it refuses generation {} and runs {generation}: {}", instance.refused_generation, instance.error),
                "apply a table that it can run, or update it; the last good table stays in force there",
            )),
            InstanceState::Drift => Some(error(
                "instances",
                name,
                format!("it runs another table under generation {generation}, or one that the mesh's log does not have"),
                "apply the table again: it gets a generation above all that are known",
            )),
            InstanceState::Cached => Some(warning(
                "instances",
                name,
                format!("it runs generation {generation} from its copy on disk: it could not read the mesh's table"),
                "see what it waits for; it takes the newest table when the broker answers",
            )),
            InstanceState::Lost => Some(warning(
                "instances",
                name,
                "it has not reported for 90 s: it was killed, or its broker is away",
                "look at its process; when it is gone for good it is forgotten after an hour",
            )),
            InstanceState::Pending => Some(warning(
                "instances",
                name,
                format!("it runs generation {generation} and has not taken {} yet", status.generation),
                "ask again; if it stays so, see its log",
            )),
            InstanceState::Synced | InstanceState::Pinned | InstanceState::Unspecified => None,
        };
        findings.extend(said);
        // What this sidecar's broker does is told by another check.
        let waiting = instance.waiting.iter().filter(|reason| name != status.instance || !reason.starts_with("broker: "));
        if instance.state() != InstanceState::Lost {
            findings.extend(
                waiting.map(|reason| warning("instances", name, format!("it waits: {reason}"), "the reason names what is missing")),
            );
        }
    }
    for name in twins {
        let what = "two processes report under this name in turn: each takes the partitions and the transactions of the other";
        findings.push(error("instances", name, what, "give each its own `instance`, or none"));
    }
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for instance in status.instances.iter().filter(|instance| instance.state() != InstanceState::Lost) {
        versions.entry(instance.version.as_str()).or_default().push(&instance.instance);
    }
    if versions.len() > 1 {
        let said: Vec<String> = versions.iter().map(|(version, of)| format!("{version} ({})", named(of))).collect();
        let fix = "end the update: a table may use what an older version does not know";
        findings.push(warning("instances", "", format!("they have different versions: {}", said.join("; ")), fix));
    }
    if findings.is_empty() {
        let live = status.instances.len();
        findings.push(ok(
            "instances",
            "",
            if live == 1 { "the one instance is well".to_owned() } else { format!("all {live} instances are well") },
        ));
    }
    bounded("instances", findings)
}

/// What routes do, and which nobody runs.
pub(super) fn routes(status: &v1::GetStatusResponse, table: Option<&CompiledTable>, now_ms: i64) -> Vec<Finding> {
    let live: Vec<&v1::InstanceStatus> = status.instances.iter().filter(|instance| instance.state() != InstanceState::Lost).collect();
    let mut findings = Vec::new();
    let served: BTreeSet<&str> = live.iter().flat_map(|instance| &instance.services).map(String::as_str).collect();
    let mut unserved: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for route in table.iter().flat_map(|table| &table.routes).filter(|route| !served.contains(&*route.service)) {
        unserved.entry(&*route.service).or_default().push(&route.name);
    }
    for (service, routes) in unserved {
        let what = format!("no live instance serves service {service}: the records of {} wait", named(&routes));
        let fix = format!("start a sidecar whose config has `services: [{{ name: {service}, … }}]`");
        findings.push(error("routes", &named(&routes), what, fix));
    }
    // Several instances may say the same of a route.
    let mut said: BTreeMap<(&str, i32), (Vec<&str>, &v1::RouteStatus)> = BTreeMap::new();
    let mut exhausted: BTreeMap<&str, u64> = BTreeMap::new();
    for instance in &live {
        for route in &instance.routes {
            said.entry((route.route.as_str(), route.state)).or_insert_with(|| (Vec::new(), route)).0.push(&instance.instance);
            if route.exhausted_records > 0 {
                *exhausted.entry(route.route.as_str()).or_default() += route.exhausted_records;
            }
        }
    }
    let mut running = BTreeSet::new();
    for ((name, _), (at, route)) in said {
        let since = if route.waiting_since_ms > 0 { now_ms.saturating_sub(route.waiting_since_ms).max(0) } else { 0 };
        findings.extend(route_finding(name, &named(&at), route, since));
        running.insert(name);
    }
    for (route, records) in exhausted {
        let what = format!("the attempts of {records} records are used up; the later ones of their keys wait behind them");
        let fix = format!("`mesh-ctl release {route}` tries them again, `--discard` makes dead letters of them");
        findings.push(warning("routes", route, what, fix));
    }
    if findings.is_empty() {
        let count = running.len();
        findings.push(ok("routes", "", if count == 1 { "the one route runs".to_owned() } else { format!("all {count} routes run") }));
    }
    bounded("routes", findings)
}

/// What a route's state means.
fn route_finding(name: &str, at: &str, route: &v1::RouteStatus, since_ms: i64) -> Option<Finding> {
    let what =
        format!("{} at {at} for {} s: {}", route.state().as_str_name().trim_start_matches("ROUTE_STATE_"), since_ms / 1_000, route.reason);
    match route.state() {
        RouteState::WaitingForService => {
            let service = &route.service;
            let fix = format!(
                "start service {service}, or correct its `app` in the sidecar's config; its records wait, and no attempt is counted"
            );
            Some(error("routes", name, what, fix))
        }
        RouteState::WaitingForBroker => {
            Some(error("routes", name, what, "the reason names the broker or the partition; see the findings about brokers and topics"))
        }
        RouteState::WaitingForTopic => Some(error("routes", name, what, "`mesh-ctl topics create TOPIC`, or correct the table")),
        RouteState::Stopped => {
            let fix = format!(
                "`mesh-ctl release {name}` where attempts are used up; `mesh-ctl reset {name}` past what was deleted before it was read"
            );
            Some(error("routes", name, what, fix))
        }
        RouteState::Paused => Some(warning("routes", name, format!("it is paused: {}", route.reason), format!("`mesh-ctl resume {name}`"))),
        RouteState::Joining if since_ms > JOINING_MS => {
            Some(warning("routes", name, what, "a member of its group may hang: `mesh-ctl lag` tells how many there are"))
        }
        // Of a route that runs it tells what was lost.
        RouteState::Running if !route.reason.is_empty() => Some(warning(
            "routes",
            name,
            route.reason.clone(),
            "keep records longer (`retention`), or make the service faster; `on_gap: stop` waits for you",
        )),
        RouteState::Running | RouteState::Joining | RouteState::Draining | RouteState::Unspecified => None,
    }
}

/// Dead letters, counted.
pub(super) fn letters(counts: &[v1::DeadLetterCount]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for count in counts {
        let waiting = count.letters.saturating_sub(count.redriven);
        if waiting == 0 {
            continue;
        }
        let mut reasons: Vec<_> = count.reasons.iter().collect();
        reasons.sort_by(|one, other| other.1.cmp(one.1).then(one.0.cmp(other.0)));
        let reasons = named(reasons.into_iter().map(|(reason, of)| format!("{reason} {of}")));
        let what = format!("{waiting} dead letters in {} that were not sent back ({reasons})", count.topic);
        let route = &count.route;
        let fix = format!(
            "`mesh-ctl dlq show {route}` tells why; `dlq redrive {route} --execute` sends them back, `dlq purge {route}` deletes them"
        );
        findings.push(warning("dead-letters", route, what, fix));
    }
    if findings.is_empty() {
        findings.push(ok("dead-letters", "", "none wait"));
    }
    bounded("dead-letters", findings)
}

/// So many that they are not read.
pub(super) fn many_letters(records: u64, topics: &BTreeSet<String>) -> Vec<Finding> {
    let what = format!("up to {records} dead letters in {}", named(topics));
    vec![warning("dead-letters", &named(topics), what, "`mesh-ctl dlq list` counts them by reason, and tells which were sent back")]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Severity, subject and a part of what is said, of each finding.
    fn said(findings: &[Finding]) -> Vec<(Severity, &str, &str)> {
        findings.iter().map(|finding| (finding.severity(), finding.subject.as_str(), finding.what.as_str())).collect()
    }

    fn has_fixes(findings: &[Finding]) {
        for finding in findings {
            assert_eq!(finding.severity() == Severity::Ok, finding.fix.is_empty(), "{finding:?}");
        }
    }

    #[test]
    fn names_are_cut() {
        assert_eq!(named(["a", "b"]), "a, b");
        assert_eq!(named((0..10).map(|n| n.to_string())), "0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
        let many = bounded("x", (0..60).map(|n| if n == 59 { error("x", "", "bad", "f") } else { warning("x", "", "w", "f") }).collect());
        assert_eq!((many.len(), many[0].severity()), (51, Severity::Error));
        assert!(many[50].what.starts_with("10 more"), "{:?}", many[50]);
    }

    #[test]
    fn a_broker_that_nobody_reaches_is_named() {
        let node = |id, port| BrokerNode { id, host: "kafka".into(), port };
        let reached = |node, failure: Option<&str>| Reached { node, failure: failure.map(str::to_owned) };
        let well = brokers(&[reached(node(1, 9092), None), reached(node(2, 9093), None)], 2);
        assert_eq!(said(&well), [(Severity::Ok, "", "2 brokers answer at their advertised addresses: kafka:9092, kafka:9093")]);
        let bad = brokers(&[reached(node(1, 9092), None), reached(node(2, 9093), Some("refused"))], 2);
        assert_eq!(said(&bad), [(Severity::Error, "broker 2", "it is advertised as kafka:9093, and does not answer there: refused")]);
        has_fixes(&bad);
        assert!(brokers(&[], 0).is_empty());
    }

    #[test]
    fn what_is_refused_is_told_apart_from_what_is_missing() {
        let answer = |kind| Err(BrokerError::new(kind, "why"));
        let topics = [
            ("topic a".to_owned(), answer(BrokerErrorKind::Unauthorized)),
            ("topic b".to_owned(), answer(BrokerErrorKind::UnknownTopic)),
            ("topic c".to_owned(), answer(BrokerErrorKind::Unreachable)),
        ];
        let found = authorization(&topics, &[("group g".to_owned(), Ok(()))], 1);
        assert_eq!(
            said(&found),
            [(Severity::Error, "topic a", "the broker refuses it: why"), (Severity::Warning, "topic c", "it was not found out: why")]
        );
        has_fixes(&found);
        let well = authorization(&[], &[("group g".to_owned(), Ok(()))], 3);
        assert!(well.len() == 1 && well[0].what.contains("1 of 3 groups") && well[0].severity() == Severity::Ok, "{well:?}");
    }

    #[test]
    fn clocks_that_differ() {
        let others = [("a".to_owned(), 1_999), ("b".to_owned(), -60_000), ("c".to_owned(), 2_500)];
        let found = clocks(96_000, 100_000, &others);
        assert_eq!(
            said(&found),
            [
                (Severity::Warning, "mesh-ctl", "the clock where mesh-ctl runs is 4.0 s behind this sidecar's"),
                (Severity::Warning, "b", "its clock is 60.0 s ahead of this sidecar's"),
                (Severity::Warning, "c", "its clock is 2.5 s behind this sidecar's"),
            ]
        );
        assert_eq!(clocks(0, 100_000, &others[..1])[0].severity(), Severity::Ok, "an unknown clock is not compared");
    }

    fn instance(name: &str, state: InstanceState) -> v1::InstanceStatus {
        let services = vec!["pricing".to_owned()];
        v1::InstanceStatus {
            instance: name.into(),
            state: state.into(),
            services,
            version: "1".into(),
            generation: 4,
            ..Default::default()
        }
    }

    #[test]
    fn instances_that_are_not_well() {
        let own = v1::InstanceStatus {
            waiting: vec!["broker: away".into(), "the table is being read".into()],
            ..instance("a", InstanceState::Synced)
        };
        let instances_of = vec![
            own,
            v1::InstanceStatus { refused_generation: 5, error: "no".into(), ..instance("b", InstanceState::Nacked) },
            v1::InstanceStatus { version: "0".into(), ..instance("c", InstanceState::Lost) },
            v1::InstanceStatus { version: "2".into(), ..instance("d", InstanceState::Drift) },
        ];
        let status = v1::GetStatusResponse { generation: 5, instance: "a".into(), instances: instances_of, ..Default::default() };
        let found = instances(&status, &["e".to_owned()]);
        assert_eq!(
            said(&found),
            [
                (Severity::Warning, "a", "it waits: the table is being read"),
                (Severity::Error, "b", "it refuses generation 5 and runs 4: no"),
                (Severity::Warning, "c", "it has not reported for 90 s: it was killed, or its broker is away"),
                (Severity::Error, "d", "it runs another table under generation 4, or one that the mesh's log does not have"),
                (
                    Severity::Error,
                    "e",
                    "two processes report under this name in turn: each takes the partitions and the transactions of the other"
                ),
                (Severity::Warning, "", "they have different versions: 1 (a, b); 2 (d)"),
            ]
        );
        has_fixes(&found);
        let well = v1::GetStatusResponse { instances: vec![instance("a", InstanceState::Synced)], ..Default::default() };
        assert_eq!(said(&instances(&well, &[])), [(Severity::Ok, "", "the one instance is well")]);
    }

    #[test]
    fn routes_that_do_not_run() {
        let text = "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: { mesh: m }\nspec:\n  routes:\n  - { name: a, service: pricing, from: [in], handler: /a, to: void }\n  \
                    - { name: b, service: mail, from: [in], handler: /b, to: void }\n";
        let table = mesh_routing::compile(&mesh_routing::parse("t", text).unwrap()).unwrap();
        let route = |state: RouteState, reason: &str| v1::RouteStatus {
            route: "a".into(),
            service: "pricing".into(),
            state: state.into(),
            reason: reason.into(),
            waiting_since_ms: 40_000,
            exhausted_records: 2,
            ..Default::default()
        };
        let at = |name: &str, state, route| v1::InstanceStatus { routes: vec![route], ..instance(name, state) };
        let waiting = route(RouteState::WaitingForService, "refused");
        let instances = vec![
            at("x", InstanceState::Synced, waiting.clone()),
            at("y", InstanceState::Synced, waiting),
            at("z", InstanceState::Lost, route(RouteState::Stopped, "gone")),
        ];
        let status = v1::GetStatusResponse { instances, ..Default::default() };
        let found = routes(&status, Some(&table), 100_000);
        assert_eq!(
            said(&found),
            [
                (Severity::Error, "b", "no live instance serves service mail: the records of b wait"),
                (Severity::Error, "a", "WAITING_FOR_SERVICE at x, y for 60 s: refused"),
                (Severity::Warning, "a", "the attempts of 4 records are used up; the later ones of their keys wait behind them"),
            ]
        );
        has_fixes(&found);
        for (state, severity) in [
            (RouteState::Paused, Some(Severity::Warning)),
            (RouteState::Stopped, Some(Severity::Error)),
            (RouteState::WaitingForTopic, Some(Severity::Error)),
            (RouteState::WaitingForBroker, Some(Severity::Error)),
            (RouteState::Draining, None),
            (RouteState::Joining, None),
        ] {
            assert_eq!(route_finding("a", "x", &route(state, "r"), 60_000).map(|found| found.severity()), severity, "{state:?}");
        }
        assert!(route_finding("a", "x", &route(RouteState::Joining, "r"), 60_001).is_some());
        assert!(route_finding("a", "x", &route(RouteState::Running, ""), 0).is_none());
        assert!(route_finding("a", "x", &route(RouteState::Running, "3 records expired"), 0).is_some());
    }

    #[test]
    fn letters_that_were_sent_back_do_not_wait() {
        let count = |route: &str, letters, redriven| v1::DeadLetterCount {
            route: route.into(),
            topic: format!("{route}.dlq"),
            letters,
            redriven,
            reasons: [("status".to_owned(), 3), ("attempts".to_owned(), 9)].into(),
            ..Default::default()
        };
        let found = letters(&[count("a", 12, 2), count("b", 5, 5)]);
        assert_eq!(said(&found), [(Severity::Warning, "a", "10 dead letters in a.dlq that were not sent back (attempts 9, status 3)")]);
        assert_eq!(letters(&[count("b", 5, 5)])[0].severity(), Severity::Ok);
    }

    #[test]
    fn a_table_that_is_not_there() {
        let status = v1::GetStatusResponse::default();
        assert_eq!(table(&status, "a", false)[0].severity(), Severity::Warning);
        let newer = v1::GetStatusResponse { generation: 3, ..Default::default() };
        assert_eq!(table(&newer, "a", false)[0].severity(), Severity::Error);
        assert_eq!(table(&newer, "a", true)[0].severity(), Severity::Ok);
    }
}
