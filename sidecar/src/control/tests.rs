//! The control plane over a broker in memory: several instances, rivals, refusals, restarts, absences.

mod part;
mod redrive;
mod report;
mod rollout;
mod signed;

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use mesh_proto::v1::{self, InstanceState};
use mesh_routing::channel::Channel;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{
    ApplyError, ApplyOptions, Control, ControlHandle, StartError, cache, log::proposal_key, snapshot::Snapshot, testing::Memory,
    topics::CONTROL_TOPIC,
};
use crate::{
    config::{BrokerConfig, Config, ControlConfig, Limits, Listen, ListenTls, LogFormat, ServiceConfig, TelemetryConfig},
    record::Record,
    status::{Board, RouteState, RouteStatus},
    table::TableOrigin,
};

const SOON: Duration = Duration::from_secs(20);

fn config(instance: &str, state: &Path, table: Option<&Path>) -> Arc<Config> {
    let address = ([127, 0, 0, 1], 0).into();
    Arc::new(Config {
        mesh: "shop".into(),
        services: vec![ServiceConfig { name: "pricing".into(), app: None, publish: None, subscribe: None, token_file: None }],
        instance: (!instance.is_empty()).then(|| instance.to_owned()),
        labels: BTreeMap::new(),
        state: state.to_owned(),
        broker: BrokerConfig::Embedded { path: state.to_owned() },
        table: table.map(Path::to_owned),
        control: ControlConfig::default(),
        listen: Listen { api: address, admin: address, probe: address },
        tls: ListenTls::default(),
        telemetry: TelemetryConfig { otlp: None, log: String::new(), log_format: LogFormat::Json },
        limits: Limits {
            record_bytes: 1 << 20,
            publish_timeout: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(5),
            buffer_bytes: 1 << 20,
        },
    })
}

struct Instance {
    handle: ControlHandle,
    board: Board,
    state: tempfile::TempDir,
}

async fn start(broker: &Memory, name: &str) -> Instance {
    start_in(broker, name, tempfile::tempdir().unwrap()).await
}

async fn start_in(broker: &Memory, name: &str, state: tempfile::TempDir) -> Instance {
    start_with(broker, name, state, |_| {}).await
}

/// With a config that differs.
async fn start_with(broker: &Memory, name: &str, state: tempfile::TempDir, change: impl FnOnce(&mut Config)) -> Instance {
    let board = Board::default();
    let (commands, _) = crate::command::channel();
    let mut config = Arc::unwrap_or_clone(config(name, state.path(), None));
    change(&mut config);
    let config = Arc::new(config);
    let handle = Control::start(Arc::new(broker.clone()), config, board.clone(), commands, CancellationToken::new()).await.unwrap();
    Instance { handle, board, state }
}

impl Instance {
    fn control(&self) -> &Control {
        self.handle.control()
    }

    async fn ready(&self) {
        timeout(SOON, self.handle.ready().wait_for(|ready| *ready)).await.expect("ready in time").unwrap();
    }

    async fn generation(&self, generation: u64) {
        let mut table = self.handle.table();
        let found = table.wait_for(|table| table.as_ref().is_some_and(|table| table.generation == generation));
        timeout(SOON, found).await.expect("the generation in time").unwrap();
    }

    /// Waits for a state of the mesh, as this instance sees it.
    async fn status(&self, what: &str, holds: impl Fn(&v1::GetStatusResponse) -> bool) -> v1::GetStatusResponse {
        let (mut table, mut progress) = (self.handle.table(), self.control().0.progress.subscribe());
        let looked = timeout(SOON, async {
            loop {
                let status = self.control().status();
                if holds(&status) {
                    return status;
                }
                // Reports of others have no event of their own.
                let _ = tokio::select! {
                    changed = table.changed() => changed,
                    changed = progress.changed() => changed,
                    () = tokio::time::sleep(Duration::from_millis(10)) => Ok(()),
                };
            }
        });
        looked.await.unwrap_or_else(|_| panic!("{what} does not come: {:#?}", self.control().status()))
    }

    async fn apply(&self, text: &str) -> Result<super::Applied, ApplyError> {
        self.control().apply("routes.yaml", text, ApplyOptions::default()).await
    }
}

fn state_of(status: &v1::GetStatusResponse, instance: &str) -> InstanceState {
    status.instances.iter().find(|found| found.instance == instance).map_or(InstanceState::Unspecified, |found| found.state())
}

fn table(routes: &[(&str, &str, &str)]) -> String {
    let mut text = "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: { mesh: shop }\nspec:\n  routes:\n".to_owned();
    for (name, from, to) in routes {
        text += &format!("  - {{ name: {name}, service: pricing, from: [{from}], handler: /h, to: [{to}] }}\n");
    }
    text
}

fn one(to: &str) -> String {
    table(&[("price", "orders", to)])
}

fn last(broker: &Memory) -> Record {
    broker.records(CONTROL_TOPIC).pop().unwrap()
}

#[tokio::test]
async fn a_table_reaches_all_instances() {
    let broker = Memory::new(true);
    let (a, b) = (start(&broker, "a").await, start(&broker, "b").await);
    a.ready().await;
    b.ready().await;
    assert!(a.control().get_table(None).await.unwrap().is_none());
    assert_eq!(a.control().waiting(), None);

    let applied = a.apply(&one("priced")).await.unwrap();
    assert_eq!((applied.generation, applied.changed), (1, true));
    assert_eq!(a.handle.table().borrow().as_ref().map(|table| table.generation), Some(1), "the answer comes after the swap here");
    b.generation(1).await;
    let table = b.control().get_table(None).await.unwrap().unwrap();
    assert_eq!((&table.digest, table.origin()), (&applied.digest, v1::TableOrigin::Mesh));

    // Each sees both in sync, and routes with their reasons.
    b.board.post(RouteStatus {
        route: "price".into(),
        service: "pricing".into(),
        state: RouteState::WaitingForService,
        reason: "service pricing at 127.0.0.1:8080 refuses connections".into(),
        lag_records: 7,
        ..RouteStatus::default()
    });
    for instance in [&a, &b] {
        let status = instance
            .status("two synced instances and a reason", |status| {
                state_of(status, "a") == InstanceState::Synced
                    && state_of(status, "b") == InstanceState::Synced
                    && status.instances.iter().flat_map(|instance| &instance.routes).any(|route| route.reason.contains("pricing"))
            })
            .await;
        assert_eq!((status.generation, &*status.mesh), (1, "shop"));
    }

    // The same table again, formatted in another way, changes nothing.
    let again = b.apply(&one("priced").replace("{ name: price,", "{   name:   price,")).await.unwrap();
    assert_eq!((again.generation, again.changed, &again.digest), (1, false, &applied.digest));
    assert!(again.changes.is_empty() && again.new_routes.is_empty(), "{again:?}");

    // A clean exit takes the instance off the list.
    b.handle.close().await;
    a.status("b is gone", |status| status.instances.len() == 1).await;
}

#[tokio::test]
async fn of_rivals_exactly_one_wins_each_generation() {
    let broker = Memory::new(true);
    let (a, b) = (start(&broker, "a").await, start(&broker, "b").await);
    a.ready().await;
    b.ready().await;
    let mut losses = 0;
    for round in 0..20 {
        let (left, right) = (one(&format!("left-{round}")), one(&format!("right-{round}")));
        let before = a.control().status().generation.max(b.control().status().generation);
        let (left, right) = tokio::join!(a.apply(&left), b.apply(&right));
        let mut won = Vec::new();
        for (result, rival) in [(left, "b"), (right, "a")] {
            match result {
                Ok(applied) => won.push(applied.generation),
                Err(ApplyError::Lost { generation, winner, changes }) => {
                    assert_eq!(generation, before + 1);
                    assert!(changes.len() == 1 && changes[0].contains("routes.price"), "{changes:?}");
                    assert_eq!(winner, format!("instance {rival}, from \"routes.yaml\""));
                    losses += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
        won.sort_unstable();
        assert!(won == [before + 1] || won == [before + 1, before + 2], "{won:?} after {before}");
        let newest = *won.last().unwrap();
        a.generation(newest).await;
        b.generation(newest).await;
        let digests = [&a, &b].map(|instance| instance.handle.table().borrow().as_ref().unwrap().compiled.digest.clone());
        assert_eq!(digests[0], digests[1]);
    }
    assert!(losses > 0, "the rivals never met: this test proves nothing");
}

#[tokio::test]
async fn a_refused_table_leaves_the_last_good_one() {
    let broker = Memory::new(true);
    let a = start(&broker, "a").await;
    a.ready().await;
    a.apply(&one("priced")).await.unwrap();

    // A table with faults never gets into the log.
    let faults = match a.apply(&one("__forbidden").replace("handler: /h", "handel: /h")).await {
        Err(ApplyError::Faults(faults)) => faults.0,
        other => panic!("{other:?}"),
    };
    assert!(faults.len() >= 2 && faults.iter().all(|fault| fault.file == "routes.yaml" && fault.line > 0), "{faults:#?}");
    let other_mesh = a.apply(&one("priced").replace("mesh: shop", "mesh: other")).await.unwrap_err();
    assert!(other_mesh.to_string().contains("metadata.mesh") && other_mesh.to_string().contains("shop"), "{other_mesh}");
    assert_eq!(broker.records(CONTROL_TOPIC).len(), 1);

    // What others write can be anything.
    broker.append(CONTROL_TOPIC, 0, "shop/2/x", Some(b"garbage"));
    let newer = Snapshot { schema: 9, ..Snapshot::new("shop", 3, 0, "x", mesh_routing::Parts::default()).unwrap() };
    broker.append(CONTROL_TOPIC, 0, "shop/3/x", Some(&newer.pack().unwrap()));
    broker.append(CONTROL_TOPIC, 0, "other/9/x", Some(b"of another mesh"));
    let status = a.status("NACKED", |status| status.generation == 3 && state_of(status, "a") == InstanceState::Nacked).await;
    let mine = &status.instances[0];
    assert_eq!((mine.generation, mine.refused_generation), (1, 3));
    assert!(mine.error.contains("schema 9") && mine.error.contains("update"), "{}", mine.error);

    // A restart comes to the same: the newest good generation.
    let b = start(&broker, "b").await;
    b.generation(1).await;
    a.status("b NACKED", |status| state_of(status, "b") == InstanceState::Nacked).await;

    // And the next good one heals it.
    let healed = b.apply(&one("priced-2")).await.unwrap();
    assert_eq!(healed.generation, 4);
    a.generation(4).await;
    let status = a.status("SYNCED", |status| state_of(status, "b") == InstanceState::Synced).await;
    assert_eq!(state_of(&status, "a"), InstanceState::Synced);
    assert!(status.instances.iter().all(|instance| instance.error.is_empty()));
}

#[tokio::test]
async fn expectations_and_dry_runs() {
    let broker = Memory::new(true);
    broker.create("orders", 2);
    let a = start(&broker, "a").await;
    a.ready().await;
    a.apply(&one("priced")).await.unwrap();
    for record in ["1", "2", "3"] {
        broker.append("orders", 1, record, Some(b"x"));
    }
    let text = table(&[("price", "orders", "priced"), ("bill", "orders", "billed"), ("known", "orders", "known-out")])
        .replace("spec:", "spec:\n  topics: { orders: { partitions: 6 }, billed: { partitions: 3, replication: 2, retention: 7d } }");
    let dry = ApplyOptions { dry_run: true, ..ApplyOptions::default() };
    let before = broker.created().len();
    let result = a.control().apply("routes.yaml", &text, dry).await.unwrap();
    assert_eq!((result.generation, result.changed), (1, false));
    assert_eq!((broker.created().len(), broker.records(CONTROL_TOPIC).len()), (before, 1), "a dry run leaves no trace");
    assert!(result.changes.iter().any(|line| line.contains("topic billed would be created with 3 partitions")), "{:#?}", result.changes);
    let warning = result.warnings.iter().find(|warning| warning.code == "topic_differs").expect("a warning of the count");
    assert!(warning.message.contains("2 partitions") && warning.message.contains('6') && warning.file == "routes.yaml", "{warning:?}");

    let expect = |generation| ApplyOptions { expected_generation: Some(generation), ..ApplyOptions::default() };
    let error = a.control().apply("routes.yaml", &text, expect(7)).await.unwrap_err();
    assert!(matches!(error, ApplyError::Expected { expected: 7, actual: 1, .. }), "{error}");
    let applied = a.control().apply("routes.yaml", &text, expect(1)).await.unwrap();
    assert_eq!((applied.generation, applied.changed), (2, true));
    let backlogs: Vec<_> = applied.new_routes.iter().map(|new| (&*new.route, new.records)).collect();
    assert_eq!(backlogs, [("bill", 3), ("known", 2)], "all of orders; and what the group of an old route has left");
    let created = broker.created();
    let find = |name: &str| created.iter().find(|topic| topic.name == name).unwrap_or_else(|| panic!("{name}: {created:#?}"));
    assert_eq!((find("billed").partitions, find("billed").replication), (Some(3), Some(2)));
    assert_eq!(find("billed").config["retention.ms"], (7 * 24 * 3600 * 1000_u64).to_string());
    assert_eq!(find("bill.dlq").partitions, Some(2), "a dead letter topic follows its source");
    assert!(created.iter().all(|topic| topic.name != "orders"), "what exists is left alone");
    assert_eq!(find(CONTROL_TOPIC).config["cleanup.policy"], "compact");
}

#[tokio::test]
async fn old_generations_are_deleted_and_history_is_readable() {
    let broker = Memory::new(true);
    let a = start(&broker, "a").await;
    a.ready().await;
    for round in 1..=52 {
        assert_eq!(a.apply(&one(&format!("out-{round}"))).await.unwrap().generation, round);
    }
    let old = a.control().get_table(Some(10)).await.unwrap().unwrap();
    assert!(old.json.contains("out-10") && old.generation == 10);
    assert!(a.control().get_table(Some(1)).await.unwrap().is_none());
    assert!(a.control().get_table(Some(99)).await.unwrap().is_none());
    assert!(last(&broker).value.is_some(), "the log ends with the record in force, which compaction keeps");
    let deleted = broker.records(CONTROL_TOPIC).into_iter().filter(|record| record.value.is_none());
    let keys: Vec<_> = deleted.map(|record| String::from_utf8(record.key.unwrap().to_vec()).unwrap()).collect();
    assert!(keys.len() == 1 && keys[0].starts_with(&proposal_key("shop", 1, "", &Channel::Stable)), "{keys:?}");
}

#[tokio::test(start_paused = true)]
async fn a_start_without_broker_runs_the_copy_and_goes_on_trying() {
    let broker = Memory::new(true);
    let a = start(&broker, "a").await;
    a.ready().await;
    a.apply(&one("priced")).await.unwrap();
    let Instance { handle, state, .. } = a;
    handle.close().await;

    broker.set_there(false);
    let a = start_in(&broker, "a", state).await;
    assert!(a.control().waiting().is_some());
    a.ready().await;
    let active = a.handle.table().borrow().clone().unwrap();
    assert_eq!((active.generation, active.origin), (1, TableOrigin::Cache));
    let status = a.control().status();
    assert_eq!(state_of(&status, "a"), InstanceState::Cached);
    assert!(status.instances[0].waiting.iter().any(|reason| reason.contains("memory:1 refuses connections")), "{status:#?}");
    let error = a.apply(&one("other")).await.unwrap_err();
    assert!(matches!(error, ApplyError::NotReady(_)) && error.to_string().contains("memory:1"), "{error}");

    broker.set_there(true);
    let status = a.status("SYNCED", |status| state_of(status, "a") == InstanceState::Synced).await;
    assert!(status.instances[0].waiting.is_empty(), "{status:#?}");
    let now = a.handle.table().borrow().clone().unwrap();
    assert_eq!((now.generation, now.origin), (1, TableOrigin::Mesh));
    assert!(Arc::ptr_eq(&now.compiled, &active.compiled), "the same table is the same pointer");
}

#[tokio::test(start_paused = true)]
async fn a_start_without_broker_and_copy_waits_visibly() {
    let broker = Memory::new(false);
    let state = tempfile::tempdir().unwrap();
    std::fs::write(state.path().join(cache::FILE), "{ \"schema\": 1, \"mesh\": ").unwrap();
    let a = start_in(&broker, "", state).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!*a.handle.ready().borrow());
    assert!(a.control().waiting().unwrap().contains("memory:1"));
    assert!(a.control().instance().starts_with("pricing-"));
    broker.set_there(true);
    a.ready().await;
    a.apply(&one("priced")).await.unwrap();
}

#[tokio::test]
async fn a_lost_control_topic_leaves_the_last_good_table() {
    let broker = Memory::new(true);
    let a = start(&broker, "a").await;
    a.ready().await;
    a.apply(&one("priced")).await.unwrap();
    a.apply(&one("priced-2")).await.unwrap();
    let Instance { handle, state, .. } = a;
    handle.close().await;

    let broker = Memory::new(true);
    let a = start_in(&broker, "a", state).await;
    a.generation(2).await;
    let status = a.status("CACHED", |status| state_of(status, "a") == InstanceState::Cached).await;
    assert!(status.instances[0].waiting.iter().any(|reason| reason.contains("apply the table again")), "{status:#?}");
    let applied = a.apply(&one("priced-2")).await.unwrap();
    assert_eq!((applied.generation, applied.changed), (3, true), "generations only grow");
    let status = a.status("SYNCED", |status| state_of(status, "a") == InstanceState::Synced).await;
    assert!(status.instances[0].waiting.is_empty(), "{status:#?}");
}

#[tokio::test]
async fn a_control_topic_that_is_deleted_under_way_is_made_anew() {
    let broker = Memory::new(true);
    let (a, b) = (start(&broker, "a").await, start(&broker, "b").await);
    a.ready().await;
    b.ready().await;
    a.apply(&one("priced")).await.unwrap();
    a.apply(&one("priced-2")).await.unwrap();
    b.generation(2).await;
    broker.delete(CONTROL_TOPIC);
    // Both readers see that it is gone.
    tokio::task::yield_now().await;
    assert_eq!(a.handle.table().borrow().as_ref().unwrap().generation, 2);
    assert_eq!(b.apply(&one("priced-3")).await.unwrap().generation, 3);
    a.generation(3).await;
    let late = start(&broker, "late").await;
    late.generation(3).await;
}

#[tokio::test]
async fn a_pinned_table() {
    let broker = Memory::new(true);
    let state = tempfile::tempdir().unwrap();
    let file = state.path().join("routes.yaml");
    let begin = || {
        let config = config("p", state.path(), Some(&file));
        Control::start(Arc::new(broker.clone()), config, Board::default(), crate::command::channel().0, CancellationToken::new())
    };
    assert!(matches!(begin().await, Err(StartError::Read { .. })));
    std::fs::write(&file, one("__no").replace("service: pricing", "servise: x")).unwrap();
    let error = begin().await.unwrap_err();
    assert!(matches!(&error, StartError::Faults { faults, .. } if faults.0.len() >= 2), "{error}");
    assert!(error.to_string().contains("routes.yaml:"), "{error}");
    std::fs::write(&file, one("priced").replace("mesh: shop", "mesh: other")).unwrap();
    assert!(matches!(begin().await, Err(StartError::Mesh { .. })));

    std::fs::write(&file, one("priced")).unwrap();
    let handle = begin().await.unwrap();
    let pinned = Instance { handle, board: Board::default(), state: tempfile::tempdir().unwrap() };
    pinned.ready().await;
    let active = pinned.handle.table().borrow().clone().unwrap();
    assert_eq!((active.generation, active.origin), (0, TableOrigin::Pinned));
    assert!(broker.created().iter().any(|topic| topic.name == "price.dlq"));
    let error = pinned.apply(&one("priced-2")).await.unwrap_err();
    assert!(matches!(error, ApplyError::Pinned { .. }) && error.to_string().contains("routes.yaml"), "{error}");

    // It sees the mesh go on without it.
    let a = start(&broker, "a").await;
    a.ready().await;
    a.apply(&one("other")).await.unwrap();
    let status = pinned.status("a SYNCED", |status| state_of(status, "a") == InstanceState::Synced).await;
    assert_eq!((state_of(&status, "p"), status.generation), (InstanceState::Pinned, 1));
    assert_eq!(pinned.handle.table().borrow().as_ref().unwrap().generation, 0);
}

#[tokio::test(start_paused = true)]
async fn a_control_topic_with_several_partitions_is_named() {
    let broker = Memory::new(true);
    broker.create(CONTROL_TOPIC, 4);
    let a = start(&broker, "a").await;
    a.status("the reason", |status| status.instances[0].waiting.iter().any(|reason| reason.contains("has 4 partitions"))).await;
    assert!(!*a.handle.ready().borrow());
}

#[tokio::test]
async fn reports_of_others_are_judged() {
    use prost::Message as _;

    use super::{state::now_ms, topics::STATUS_TOPIC};

    let broker = Memory::new(true);
    let report = |instance: &str, age_ms: i64| {
        let route = v1::RouteStatus { route: "work".to_owned(), partitions: 4, ..Default::default() };
        let reported_ms = now_ms() - age_ms;
        let status = v1::InstanceStatus { instance: instance.to_owned(), reported_ms, routes: vec![route], ..Default::default() };
        zstd::encode_all(status.encode_to_vec().as_slice(), 1).unwrap()
    };
    broker.create(STATUS_TOPIC, 1);
    // From before: as old as they say.
    broker.append(STATUS_TOPIC, 0, "shop/fresh", Some(&report("fresh", 10_000)));
    broker.append(STATUS_TOPIC, 0, "shop/lost", Some(&report("lost", 100_000)));
    broker.append(STATUS_TOPIC, 0, "shop/forgotten", Some(&report("forgotten", 25 * 3_600_000)));
    broker.append(STATUS_TOPIC, 0, "shop/left", Some(&report("left", 10_000)));
    broker.append(STATUS_TOPIC, 0, "shop/left", None);
    // Not reports of this mesh, or no reports at all.
    broker.append(STATUS_TOPIC, 0, "other/x", Some(&report("x", 0)));
    broker.append(STATUS_TOPIC, 0, "shop/a/x", Some(&report("x", 0)));
    broker.append(STATUS_TOPIC, 0, "shop/forger", Some(&report("fresh", 0)));
    broker.append(STATUS_TOPIC, 0, "shop/garbage", Some(b"garbage"));
    let a = start(&broker, "a").await;
    a.ready().await;
    // Live, from a clock that is an hour behind: it is there all the same.
    broker.append(STATUS_TOPIC, 0, "shop/skewed", Some(&report("skewed", 3_600_000)));
    let status = a.status("the last report", |status| state_of(status, "skewed") != InstanceState::Unspecified).await;
    let seen: Vec<_> = status.instances.iter().map(|instance| (&*instance.instance, instance.state())).collect();
    let synced = InstanceState::Synced;
    assert_eq!(seen, [("a", synced), ("fresh", synced), ("lost", InstanceState::Lost), ("skewed", synced)]);
    let with_routes = status.instances.iter().filter(|instance| !instance.routes.is_empty()).map(|instance| &*instance.instance);
    assert_eq!(with_routes.collect::<Vec<_>>(), ["fresh", "skewed"], "one that is lost does nothing that is known");
}

#[tokio::test(start_paused = true)]
async fn an_instance_reports_again_and_again() {
    use super::topics::STATUS_TOPIC;

    let broker = Memory::new(true);
    let a = start(&broker, "a").await;
    a.ready().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let first = broker.records(STATUS_TOPIC).len();
    tokio::time::sleep(Duration::from_secs(300)).await;
    let reports = broker.records(STATUS_TOPIC).len() - first;
    assert!((8..=13).contains(&reports), "{reports} reports in 300 s");
    a.board.post(RouteStatus { route: "price".into(), reason: "service pricing is away".into(), ..RouteStatus::default() });
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(broker.records(STATUS_TOPIC).len() - first, reports + 1, "a change is reported at once");
    a.handle.close().await;
    let last = broker.records(STATUS_TOPIC).pop().unwrap();
    assert_eq!((last.key.as_deref(), last.value), (Some(&b"shop/a"[..]), None));
}

/// The same over the embedded broker: two instances in one process, and a restart of everything.
#[tokio::test]
async fn over_the_embedded_broker() {
    use crate::broker::{
        Broker as _,
        embedded::{EmbeddedBroker, EmbeddedConfig},
    };

    let data = tempfile::tempdir().unwrap();
    let begin = |broker: Arc<EmbeddedBroker>, name: &'static str| async move {
        let (state, board) = (tempfile::tempdir().unwrap(), Board::default());
        let config = config(name, state.path(), None);
        let handle = Control::start(broker, config, board.clone(), crate::command::channel().0, CancellationToken::new()).await.unwrap();
        Instance { handle, board, state }
    };
    let broker = EmbeddedBroker::open(EmbeddedConfig::new(data.path())).unwrap();
    let (a, b) = (begin(broker.clone(), "a").await, begin(broker.clone(), "b").await);
    a.ready().await;
    b.ready().await;
    let text = table(&[("price", "orders", "priced")]).replace("spec:", "spec:\n  topics: { orders: { partitions: 6, retention: 1h } }");
    assert_eq!(a.apply(&text).await.unwrap().generation, 1);
    b.generation(1).await;
    let topics = broker.admin().topics().await.unwrap();
    assert_eq!((topics["orders"], topics["price.dlq"], topics[CONTROL_TOPIC]), (6, 6, 1), "{topics:?}");
    for round in 2..=8 {
        let (left, right) = (one(&format!("left-{round}")), one(&format!("right-{round}")));
        let (left, right) = tokio::join!(a.apply(&left), b.apply(&right));
        assert!(left.is_ok() || right.is_ok(), "{left:?} {right:?}");
        let newest = left.iter().chain(&right).map(|applied| applied.generation).max().unwrap();
        a.generation(newest).await;
        b.generation(newest).await;
    }
    let newest = a.handle.table().borrow().as_ref().unwrap().generation;
    a.status("b is in sync", |status| state_of(status, "b") == InstanceState::Synced).await;
    a.handle.close().await;
    b.handle.close().await;
    broker.close(Duration::from_secs(5)).await.unwrap();
    drop(broker);

    let broker = EmbeddedBroker::open(EmbeddedConfig::new(data.path())).unwrap();
    let c = begin(broker.clone(), "c").await;
    c.generation(newest).await;
    let status = c.status("SYNCED", |status| state_of(status, "c") == InstanceState::Synced).await;
    assert_eq!(status.instances.len(), 1, "the others left cleanly: {status:#?}");
    c.handle.close().await;
    broker.close(Duration::from_secs(5)).await.unwrap();
}

/// A command reaches its instance through the topic, is obeyed once however often it comes, and its answer comes back.
#[tokio::test(start_paused = true)]
async fn a_command_that_comes_again_gets_the_known_answer() {
    use mesh_proto::v1::{command_record::Content, owner_command::Action};
    use prost::Message as _;

    use super::{state::now_ms, topics::COMMANDS_TOPIC};
    use crate::{command, record::TopicPartition};
    let broker = Memory::new(true);
    let state = tempfile::tempdir().unwrap();
    let (commands, mut obeyed) = command::channel();
    let config = config("b", state.path(), None);
    let handle = Control::start(Arc::new(broker.clone()), config, Board::default(), commands, CancellationToken::new()).await.unwrap();
    timeout(SOON, handle.ready().wait_for(|ready| *ready)).await.unwrap().unwrap();
    let command = |id: &str, expires_ms| {
        let reset = v1::ResetPartitions { partitions: vec![v1::PartitionOffset { topic: "in".to_owned(), partition: 3, offset: 7 }] };
        let command = v1::OwnerCommand { route: "price".to_owned(), expires_ms, action: Some(Action::Reset(reset)) };
        v1::CommandRecord { id: id.to_owned(), from: "a".to_owned(), content: Some(Content::Command(command)) }.encode_to_vec()
    };
    let answers = || -> Vec<v1::CommandRecord> {
        let to_a = broker.records(COMMANDS_TOPIC).into_iter().filter(|record| record.key.as_deref() == Some(b"shop/a"));
        to_a.map(|record| v1::CommandRecord::decode(record.value.unwrap()).unwrap()).collect()
    };
    let soon = now_ms() + 600_000;
    broker.append(COMMANDS_TOPIC, 0, "shop/b", Some(b"no command"));
    broker.append(COMMANDS_TOPIC, 0, "shop/c", Some(&command("for another", soon)));
    broker.append(COMMANDS_TOPIC, 0, "shop/b", Some(&command("too late", now_ms() - 1)));
    broker.append(COMMANDS_TOPIC, 0, "shop/b", Some(&command("one", soon)));
    broker.append(COMMANDS_TOPIC, 0, "shop/b", Some(&command("one", soon)));
    let heard = timeout(SOON, obeyed.recv()).await.expect("a command").unwrap();
    let partition = TopicPartition::new("in", 3);
    let command::Task::Reset { partitions, answer, .. } = heard.task else { panic!() };
    assert_eq!((&*heard.route, &partitions), ("price", &vec![(partition.clone(), 7)]));
    answer.send(vec![(partition, command::Reset::Done { from: 4 })]).unwrap();
    let wait = async |count: usize| {
        while answers().len() < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(SOON, wait(1)).await.expect("an answer");
    // Its answer was lost, so it is asked again.
    broker.append(COMMANDS_TOPIC, 0, "shop/b", Some(&command("one", soon)));
    timeout(SOON, wait(2)).await.expect("the known answer");
    for answer in answers() {
        assert_eq!((answer.id.as_str(), answer.from.as_str()), ("one", "b"));
        let Some(Content::Answer(answer)) = answer.content else { panic!("{answer:?}") };
        assert_eq!((answer.partitions[0].result(), answer.partitions[0].from), (v1::PartitionResult::Done, 4));
    }
    assert!(obeyed.try_recv().is_err(), "obeyed twice, or one that was too late");
    handle.close().await;
}
