//! Rates of routes, from the counters in states of the mesh that were asked for one after the other.
//!
//! An instance reports by itself, so what it did is divided by the time between its own two last reports.
//!
//! Invariant: no rate is negative: a process that was started again counts from its start.
//! Invariant: what left the mesh is forgotten.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use mesh_proto::v1::{self, InstanceState, RouteState};
use mesh_routing::Table;
use serde::Serialize;

/// Records by how they ended.
type Ends<T> = BTreeMap<String, T>;

/// How long instances that have not reported twice are waited for, once it was watched as long as it was asked for, and how often it is looked.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);
pub(crate) const AGAIN: Duration = Duration::from_millis(200);
/// The shortest time between two reports from which a rate is taken.
const LEAST: Duration = Duration::from_millis(200);

/// What instances did lately.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    instances: HashMap<String, Instance>,
}

/// What an instance reported last, and what followed from that.
#[derive(Debug, Default)]
struct Instance {
    started_ms: i64,
    reported_ms: i64,
    counts: HashMap<String, Ends<u64>>,
    /// Records a second; empty until two reports are known.
    rates: HashMap<String, Ends<f64>>,
}

impl Rates {
    /// Takes a state of the mesh.
    pub(crate) fn take(&mut self, mesh: &v1::GetStatusResponse) {
        let live = |instance: &&v1::InstanceStatus| instance.state() != InstanceState::Lost;
        let mut before = std::mem::take(&mut self.instances);
        for status in mesh.instances.iter().filter(live) {
            let old = before.remove(&status.instance);
            self.instances.insert(status.instance.clone(), Instance::after(old, status));
        }
    }

    /// Whether some live instance that runs routes has not reported twice yet.
    pub(crate) fn lack(&self, mesh: &v1::GetStatusResponse) -> bool {
        let live = mesh.instances.iter().filter(|instance| instance.state() != InstanceState::Lost && !instance.routes.is_empty());
        let mut known = live.map(|instance| self.instances.get(&instance.instance).is_some_and(|known| !known.rates.is_empty()));
        known.any(|known| !known)
    }

    /// Records a second by their end, of a route at an instance; `None` until that is known.
    fn of(&self, instance: &str, route: &str) -> Option<&Ends<f64>> {
        self.instances.get(instance)?.rates.get(route)
    }
}

impl Instance {
    fn after(old: Option<Self>, status: &v1::InstanceStatus) -> Self {
        let counts: HashMap<String, Ends<u64>> = status
            .routes
            .iter()
            .map(|route| (route.route.clone(), route.dispositions.iter().map(|(end, count)| (end.clone(), *count)).collect()))
            .collect();
        let mut new =
            Self { started_ms: status.started_ms, reported_ms: status.reported_ms, counts: HashMap::new(), rates: HashMap::new() };
        let Some(old) = old else { return Self { counts, ..new } };
        let again = old.started_ms != new.started_ms;
        // A process that is new counts from its start.
        let since = if again { new.started_ms.max(old.reported_ms) } else { old.reported_ms };
        let seconds = new.reported_ms.saturating_sub(since) as f64 / 1_000.0;
        if seconds < LEAST.as_secs_f64() && !again {
            // The same report, or one too near to tell anything.
            return old;
        }
        if seconds >= LEAST.as_secs_f64() {
            for (route, ends) in &counts {
                let past = if again { None } else { old.counts.get(route) };
                let rate = |(end, count): (&String, &u64)| {
                    let before = past.and_then(|past| past.get(end)).copied().unwrap_or(0);
                    // A route that was taken off the table and came back counts anew.
                    let done = if *count >= before { count - before } else { *count };
                    (end.clone(), done as f64 / seconds)
                };
                new.rates.insert(route.clone(), ends.iter().map(rate).collect());
            }
        }
        Self { counts, ..new }
    }
}

/// A route in the whole mesh.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Flow {
    pub(crate) route: String,
    pub(crate) service: String,
    /// The worst of its states.
    pub(crate) state: &'static str,
    /// Why it waits.
    pub(crate) reason: String,
    /// Whether its breaker is open at one of them.
    pub(crate) breaker_open: bool,
    /// The live instances that run it.
    pub(crate) instances: u32,
    pub(crate) partitions: u32,
    /// Records a second that it was done with, however; absent: not known yet.
    pub(crate) rate: Option<f64>,
    /// The same, by how they ended.
    pub(crate) rates: Ends<f64>,
    pub(crate) lag_records: u64,
    pub(crate) lag_seconds: f64,
    pub(crate) in_flight: u64,
    pub(crate) parked_records: u64,
    /// Those of them whose attempts are used up.
    pub(crate) exhausted_records: u64,
    /// Records by how they ended, since each instance began.
    pub(crate) dispositions: Ends<u64>,
}

impl Flow {
    /// Records a second that ended so; `None`: not known yet.
    pub(crate) fn rate_of(&self, end: &str) -> Option<f64> {
        self.rate.map(|_| self.rates.get(end).copied().unwrap_or(0.0))
    }

    /// Records that ended so.
    pub(crate) fn ended(&self, end: &str) -> u64 {
        self.dispositions.get(end).copied().unwrap_or(0)
    }

    /// Whether somebody should look.
    pub(crate) fn is_bad(&self) -> bool {
        badness(self.state) >= BAD
    }
}

/// From here on somebody should look.
const BAD: u8 = 4;

/// The worse, the higher.
fn badness(state: &str) -> u8 {
    match state {
        "NO_INSTANCE" => 8,
        "STOPPED" => 7,
        "WAITING_FOR_TOPIC" => 6,
        "WAITING_FOR_BROKER" => 5,
        "WAITING_FOR_SERVICE" => 4,
        "PAUSED" => 3,
        "DRAINING" => 2,
        "JOINING" => 1,
        _ => 0,
    }
}

fn word(state: RouteState) -> &'static str {
    match state {
        RouteState::Unspecified => "UNKNOWN",
        RouteState::Running => "RUNNING",
        RouteState::Joining => "JOINING",
        RouteState::WaitingForService => "WAITING_FOR_SERVICE",
        RouteState::WaitingForBroker => "WAITING_FOR_BROKER",
        RouteState::Draining => "DRAINING",
        RouteState::WaitingForTopic => "WAITING_FOR_TOPIC",
        RouteState::Stopped => "STOPPED",
        RouteState::Paused => "PAUSED",
    }
}

/// The routes of the mesh by name: those that instances run, and of the table those that nobody does.
pub(crate) fn flows(mesh: &v1::GetStatusResponse, table: Option<&Table>, rates: &Rates) -> Vec<Flow> {
    let mut flows: BTreeMap<&str, Flow> = BTreeMap::new();
    for instance in mesh.instances.iter().filter(|instance| instance.state() != InstanceState::Lost) {
        for route in &instance.routes {
            let flow = flows.entry(&route.route).or_insert_with(|| Flow {
                route: route.route.clone(),
                service: route.service.clone(),
                state: "",
                ..Flow::default()
            });
            let state = word(route.state());
            if flow.state.is_empty() || badness(state) > badness(flow.state) {
                (flow.state, flow.reason) = (state, route.reason.clone());
            } else if flow.reason.is_empty() && state == flow.state {
                flow.reason.clone_from(&route.reason);
            }
            flow.breaker_open |= route.breaker_open;
            flow.instances += 1;
            flow.partitions += route.partitions;
            flow.lag_records += route.lag_records;
            flow.lag_seconds = flow.lag_seconds.max(route.lag_seconds);
            flow.in_flight += route.in_flight;
            flow.parked_records += route.parked_records;
            flow.exhausted_records += route.exhausted_records;
            for (end, count) in &route.dispositions {
                *flow.dispositions.entry(end.clone()).or_default() += count;
            }
            if let Some(known) = rates.of(&instance.instance, &route.route) {
                for (end, rate) in known {
                    *flow.rates.entry(end.clone()).or_default() += rate;
                }
                *flow.rate.get_or_insert(0.0) += known.values().sum::<f64>();
            }
        }
    }
    let live = mesh.instances.iter().filter(|instance| instance.state() != InstanceState::Lost);
    let served: HashSet<&str> = live.flat_map(|instance| &instance.services).map(String::as_str).collect();
    for route in table.into_iter().flat_map(|table| &table.routes) {
        let service = table.and_then(|table| table.resolved(route).service).unwrap_or_default();
        if !served.contains(service.as_str()) {
            flows.entry(&route.name).or_insert_with(|| Flow {
                route: route.name.clone(),
                reason: format!("no live instance serves service {service}"),
                service,
                state: "NO_INSTANCE",
                ..Flow::default()
            });
        }
    }
    flows.into_values().collect()
}

/// A rate in few characters: `0`, `0.3`, `12.5`, `480`, `12.5k`, `3.1M`; `-` where it is not known.
pub(crate) fn rate(rate: Option<f64>) -> String {
    match rate {
        None => "-".to_owned(),
        Some(rate) if rate < 0.05 => if rate > 0.0 { "<0.1" } else { "0" }.to_owned(),
        Some(rate) if rate < 99.95 => format!("{rate:.1}"),
        Some(rate) if rate < 9_999.5 => format!("{rate:.0}"),
        Some(rate) if rate < 999_950.0 => format!("{:.1}k", rate / 1e3),
        Some(rate) => format!("{:.1}M", rate / 1e6),
    }
}

/// A count in few characters: `9999`, `12.3k`, `4.5M`.
pub(crate) fn short(count: u64) -> String {
    let thousands = count as f64 / 1e3;
    match count {
        0..10_000 => count.to_string(),
        10_000..1_000_000 => format!("{thousands:.1}k"),
        1_000_000..1_000_000_000 => format!("{:.1}M", thousands / 1e3),
        _ => format!("{:.1}G", thousands / 1e6),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An instance that has run one route, since `started`, up to `reported`, both in seconds.
    pub(crate) fn report(name: &str, started: i64, reported: i64, forwarded: u64, dead: u64) -> v1::InstanceStatus {
        let route = v1::RouteStatus {
            route: "price".into(),
            service: "pricing".into(),
            state: RouteState::Running.into(),
            partitions: 2,
            lag_records: 40,
            lag_seconds: 3.0,
            in_flight: 1,
            dispositions: [("forwarded".to_owned(), forwarded), ("dead_lettered".to_owned(), dead)].into(),
            ..v1::RouteStatus::default()
        };
        v1::InstanceStatus {
            instance: name.into(),
            services: vec!["pricing".into()],
            state: InstanceState::Synced.into(),
            generation: 3,
            version: "0.1.0".into(),
            started_ms: started * 1_000,
            reported_ms: reported * 1_000,
            routes: vec![route],
            ..v1::InstanceStatus::default()
        }
    }

    pub(crate) fn mesh(instances: Vec<v1::InstanceStatus>) -> v1::GetStatusResponse {
        v1::GetStatusResponse { mesh: "shop".into(), generation: 3, instance: "a".into(), instances, rollout: None }
    }

    fn forwarded(rates: &Rates, mesh: &v1::GetStatusResponse) -> String {
        rate(flows(mesh, None, rates).pop().and_then(|flow| flow.rate_of("forwarded")))
    }

    #[test]
    fn what_each_instance_did_between_its_reports_is_added_up() {
        let mut rates = Rates::default();
        let first = mesh(vec![report("a", 1, 100, 1_000, 0), report("b", 1, 80, 500, 7)]);
        rates.take(&first);
        assert_eq!(forwarded(&rates, &first), "-", "one look tells no rate");
        // `a` is asked itself; `b` reports by itself, and has not yet.
        let second = mesh(vec![report("a", 1, 102, 1_020, 0), report("b", 1, 80, 500, 7)]);
        rates.take(&second);
        assert_eq!(forwarded(&rates, &second), "10.0");
        assert!(rates.lack(&second), "of `b` nothing is known yet");
        let third = mesh(vec![report("a", 1, 104, 1_060, 0), report("b", 1, 110, 620, 10)]);
        rates.take(&third);
        assert!(!rates.lack(&third));
        let flow = flows(&third, None, &rates).pop().unwrap();
        let told = ["forwarded", "dead_lettered", "void"].map(|end| rate(flow.rate_of(end)));
        assert_eq!(told, ["24.0", "0.1", "0"]);
        assert_eq!((rate(flow.rate).as_str(), flow.partitions, flow.lag_records, flow.in_flight), ("24.1", 4, 80, 2));
        assert_eq!((flow.ended("forwarded"), flow.ended("dead_lettered"), flow.instances), (1_680, 10, 2));
    }

    #[test]
    fn a_process_that_was_started_again_counts_from_its_start() {
        let mut rates = Rates::default();
        rates.take(&mesh(vec![report("a", 1, 100, 1_000, 0)]));
        rates.take(&mesh(vec![report("a", 1, 110, 1_100, 0)]));
        let again = mesh(vec![report("a", 115, 120, 50, 0)]);
        rates.take(&again);
        assert_eq!(forwarded(&rates, &again), "10.0");
        // Also where it does not tell when it began.
        let unknown = mesh(vec![report("a", 115, 121, 20, 0)]);
        rates.take(&unknown);
        assert_eq!(forwarded(&rates, &unknown), "20.0");
        // It went, and is a stranger when it comes back.
        rates.take(&mesh(Vec::new()));
        let stranger = mesh(vec![report("a", 115, 130, 900, 0)]);
        rates.take(&stranger);
        assert_eq!(forwarded(&rates, &stranger), "-");
    }

    #[test]
    fn the_worst_state_of_a_route_is_told_and_who_is_missing() {
        let text = "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: { mesh: shop }\nspec:\n  routes:\n  - { name: mail, service: mailer, from: [in], handler: /m, to: void }\n  \
                    - { name: price, service: pricing, from: [in], handler: /p, to: void }\n";
        let table = mesh_routing::parse("t", text).unwrap();
        let mut waiting = report("b", 1, 100, 0, 0);
        waiting.routes[0].state = RouteState::WaitingForService.into();
        waiting.routes[0].reason = "refused".into();
        let mut lost = report("c", 1, 1, 9, 9);
        lost.state = InstanceState::Lost.into();
        let found = flows(&mesh(vec![report("a", 1, 100, 0, 0), waiting, lost]), Some(&table), &Rates::default());
        let said: Vec<_> = found.iter().map(|flow| (flow.route.as_str(), flow.state, flow.reason.as_str(), flow.instances)).collect();
        assert_eq!(
            said,
            [("mail", "NO_INSTANCE", "no live instance serves service mailer", 0), ("price", "WAITING_FOR_SERVICE", "refused", 2)]
        );
        assert!(found.iter().all(Flow::is_bad));
    }

    #[test]
    fn numbers_are_short() {
        let said: Vec<String> = [0.0, 0.01, 0.3, 12.54, 480.4, 12_480.0, 3.1e6].into_iter().map(|one| rate(Some(one))).collect();
        assert_eq!(said, ["0", "<0.1", "0.3", "12.5", "480", "12.5k", "3.1M"]);
        assert_eq!(rate(None), "-");
        assert_eq!([short(9_999), short(12_345), short(4_500_000), short(7_100_000_000)], ["9999", "12.3k", "4.5M", "7.1G"]);
    }
}
