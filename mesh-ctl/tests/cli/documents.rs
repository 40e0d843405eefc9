//! The documents of `-o json`, each as a whole: programs read every field of them.

use mesh_proto::v1;
use serde_json::json;

use crate::{
    TABLE,
    fake::{Bench, in_force, instance, mesh},
};

#[tokio::test]
async fn of_the_mesh_and_its_history() {
    let bench = Bench::new().await;
    let waiting = v1::RouteStatus {
        route: "price".to_owned(),
        service: "pricing".to_owned(),
        state: v1::RouteState::WaitingForService.into(),
        reason: "connection refused".to_owned(),
        partitions: 4,
        lag_records: 1_203,
        lag_seconds: 41.5,
        in_flight: 2,
        breaker_open: true,
        dispositions: [("void".to_owned(), 7), ("dead_lettered".to_owned(), 1)].into(),
        waiting_since_ms: 1_700_000_100_000 - 125_000,
        ..v1::RouteStatus::default()
    };
    let one = v1::InstanceStatus {
        routes: vec![waiting],
        labels: [("zone".to_owned(), "eu-1".to_owned())].into(),
        target_generation: 8,
        canary_dead_letters: 2,
        ..instance("a", v1::InstanceState::Synced, 8)
    };
    let two = v1::InstanceStatus {
        error: "schema 9".to_owned(),
        refused_generation: 8,
        waiting: vec!["broker: away".to_owned()],
        reported_ms: 1_700_000_100_000 - 12_000,
        origin: v1::TableOrigin::Cache.into(),
        ..instance("b", v1::InstanceState::Nacked, 7)
    };
    let entry = v1::Generation {
        generation: 8,
        digest: "sha256:8".to_owned(),
        applied_ms: 1_700_000_000_000,
        applied_by: "ann@desk".to_owned(),
        source: "routes.yaml".to_owned(),
        instance: "a".to_owned(),
        message: "cheaper".to_owned(),
        canary: "service=pricing percent=10".to_owned(),
        routes: Some(v1::RouteCounts { added: 3, changed: 2, removed: 1 }),
        ..v1::Generation::default()
    };
    let rollout = v1::Rollout {
        generation: 8,
        stable_generation: 7,
        canary: Some(v1::Canary { selector: entry.canary.clone(), max_dead_letters: 5, max_refusals: 1 }),
        dead_letters: 2,
        refusals: 1,
        entry: Some(entry.clone()),
    };
    let more = format!("{TABLE}  - {{ name: bill, service: billing, from: [priced], handler: /b, to: void }}\n");
    bench.script.set(|state| {
        state.status = vec![v1::GetStatusResponse { rollout: Some(rollout), ..mesh(8, vec![one, two]) }];
        state.table = Some(in_force(&more, 8));
    });
    let expected = json!({
        "mesh": "shop",
        "generation": 8,
        "rollout": {
            "state": "OPEN", "generation": 8, "stable_generation": 7, "selector": "service=pricing percent=10",
            "dead_letters": 2, "max_dead_letters": 5, "refusals": 1, "max_refusals": 1,
            "applied": "2023-11-14T22:13:20Z", "applied_by": "ann@desk", "message": "cheaper", "aborted": null,
        },
        "instances": [
            {
                "instance": "a", "services": ["pricing"], "state": "SYNCED", "generation": 8, "digest": "sha256:1", "origin": "MESH",
                "error": "", "refused_generation": 0, "target_generation": 8, "labels": { "zone": "eu-1" }, "canary_dead_letters": 2,
                "waiting": [], "version": "0.1.0", "reported": "2023-11-14T22:15:00Z", "age_seconds": 0.0,
                "routes": [{
                    "route": "price", "service": "pricing", "state": "WAITING_FOR_SERVICE", "reason": "connection refused",
                    "waiting_seconds": 125.0, "partitions": 4, "lag_records": 1_203, "lag_seconds": 41.5, "in_flight": 2,
                    "breaker_open": true, "dispositions": { "dead_lettered": 1, "void": 7 },
                }],
            },
            {
                "instance": "b", "services": ["pricing"], "state": "NACKED", "generation": 7, "digest": "sha256:1", "origin": "CACHE",
                "error": "schema 9", "refused_generation": 8, "target_generation": 0, "labels": {}, "canary_dead_letters": 0,
                "waiting": ["broker: away"], "version": "0.1.0", "reported": "2023-11-14T22:14:48Z", "age_seconds": 12.0, "routes": [],
            },
        ],
        "unserved": [{ "route": "bill", "service": "billing" }],
    });
    assert_eq!(bench.run(&["status", "-o", "json"]).await.ends(0).json(), expected);

    let signature = Some(v1::TableSignature { key_id: "0a1b2c3d4e5f6071".to_owned(), ed25519: vec![0; 64].into() });
    let bare = v1::Generation { canary: String::new(), message: String::new(), routes: None, ..entry.clone() };
    let generations = vec![
        v1::Generation { generation: 9, promotes: 8, signature, ..bare.clone() },
        v1::Generation { aborted: "aborted by ann: no".to_owned(), ..entry },
        v1::Generation { generation: 7, rollback_to: 5, refused: "it is not signed".to_owned(), ..bare },
    ];
    bench.script.set(|state| state.history = v1::GetHistoryResponse { mesh: "shop".to_owned(), generation: 9, in_force: 9, generations });
    let of = |generation: u64, more: serde_json::Value| {
        let mut all = json!({
            "generation": generation, "in_force": false, "digest": "sha256:8", "applied": "2023-11-14T22:13:20Z",
            "applied_by": "ann@desk", "source": "routes.yaml", "instance": "a", "message": "", "rollback_to": null, "routes": null,
            "signed_by": null, "refused": "", "canary": null, "aborted": null, "promotes": null,
        });
        for (name, value) in more.as_object().unwrap() {
            assert!(all[name] != *value && all.get(name).is_some(), "{name}");
            all[name] = value.clone();
        }
        all
    };
    let canary = json!({
        "message": "cheaper", "routes": { "added": 3, "changed": 2, "removed": 1 }, "canary": "service=pricing percent=10",
        "aborted": "aborted by ann: no",
    });
    let expected = json!({ "mesh": "shop", "generation": 9, "generations": [
        of(9, json!({ "in_force": true, "promotes": 8, "signed_by": "0a1b2c3d4e5f6071" })),
        of(8, canary),
        of(7, json!({ "rollback_to": 5, "refused": "it is not signed" })),
    ] });
    assert_eq!(bench.run(&["history", "-o", "json"]).await.ends(0).json(), expected);
}

#[tokio::test]
async fn of_plans_and_differences() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", &TABLE.replace("[priced]", "void"));
    let counts = |delivered, filtered, to: &str| v1::PlanCounts {
        read: 12,
        delivered,
        filtered,
        other_route: 1,
        dead_letters: [("schema".to_owned(), 2)].into(),
        destinations: [(to.to_owned(), delivered)].into(),
    };
    let sample = v1::PlanSample {
        position: Some(v1::Position { topic: "orders".to_owned(), partition: 2, offset: 17 }),
        key: Some(vec![0xff, 0].into()),
        change: "newly_filtered".to_owned(),
        before: "delivered, to priced".to_owned(),
        after: "filtered".to_owned(),
    };
    let route = v1::RoutePlan {
        route: "price".to_owned(),
        change: v1::RouteChange::Changed.into(),
        before: Some(counts(9, 0, "priced")),
        after: Some(counts(5, 4, "void")),
        changed: 4,
        changes: [("newly_filtered".to_owned(), 4)].into(),
        undecided: 1,
        by_stored_reply: 3,
        samples: vec![sample],
        undecided_why: "no reply is stored".to_owned(),
    };
    let scanned = |topic: &str, left_out, which: &str| v1::Scanned {
        topic: topic.to_owned(),
        partitions: 3,
        records: 12,
        left_out,
        which: which.to_owned(),
    };
    let result = v1::PlanResult {
        generation: 7,
        digest: "sha256:9".to_owned(),
        routes: vec![route],
        sources: vec![scanned("orders", 5, "2/3-7")],
        replies: vec![scanned("priced", 0, "")],
        schemas: vec![v1::SchemaPlan { topic: "priced".to_owned(), checked: 8, mismatched: 1, first: "priced/0/3: no price".to_owned() }],
        since_ms: Some(1_700_000_000_000),
    };
    bench.script.set(|state| {
        state.plan = vec![v1::PlanProgress { finished: true, result: Some(result), ..v1::PlanProgress::default() }];
        state.table = Some(in_force(TABLE, 7));
    });
    let scanned = |topic: &str, left_out: u64, which: &str| json!({ "topic": topic, "partitions": 3, "records": 12, "left_out": left_out, "left_out_offsets": which });
    let expected = json!({
        "generation": 7, "digest": "sha256:9", "changes": true, "since": "2023-11-14T22:13:20Z",
        "routes": [{
            "route": "price", "change": "changed",
            "before": { "read": 12, "delivered": 9, "filtered": 0, "other_route": 1, "dead_letters": { "schema": 2 }, "destinations": { "priced": 9 } },
            "after": { "read": 12, "delivered": 5, "filtered": 4, "other_route": 1, "dead_letters": { "schema": 2 }, "destinations": { "void": 5 } },
            "changed": 4, "changed_by": { "newly_filtered": 4 }, "undecided": 1, "undecided_why": "no reply is stored", "by_stored_reply": 3,
            "samples": [{
                "topic": "orders", "partition": 2, "offset": 17, "key": null, "key_base64": "/wA=", "change": "newly_filtered",
                "before": "delivered, to priced", "after": "filtered",
            }],
        }],
        "schemas": [{ "topic": "priced", "checked": 8, "mismatched": 1, "first": "priced/0/3: no price" }],
        "sources": [scanned("orders", 5, "2/3-7")],
        "replies": [scanned("priced", 0, "")],
        "faults": [],
    });
    assert_eq!(bench.run(&["plan", "-f", "routes.yaml", "-o", "json"]).await.ends(1).json(), expected);

    let more = format!("{TABLE}  - {{ name: bill, service: billing, from: [priced], handler: /b, to: void }}\n");
    bench.file("more.yaml", &more.replace("to: [priced]", "to: void"));
    let bill = json!({ "name": "bill", "service": "billing", "from": ["priced"], "handler": "/b", "to": "void" });
    let there = json!([
        { "kind": "added", "path": "routes.bill", "new": bill },
        { "kind": "changed", "path": "routes.price.to", "old": ["priced"], "new": "void" },
    ]);
    assert_eq!(bench.run(&["diff", "-f", "more.yaml", "-o", "json"]).await.ends(1).json(), there);
    let back = json!([
        { "kind": "removed", "path": "routes.bill", "old": bill },
        { "kind": "changed", "path": "routes.price.to", "old": "void", "new": ["priced"] },
    ]);
    assert_eq!(bench.run(&["diff", "--from", "more.yaml", "-o", "json"]).await.ends(1).json(), back);
}

#[tokio::test]
async fn of_a_record_and_its_flow() {
    let bench = Bench::new().await;
    let at = |topic: &str, offset| Some(v1::Position { topic: topic.to_owned(), partition: 1, offset });
    let route = v1::FlowRoute {
        route: "price".to_owned(),
        service: "pricing".to_owned(),
        group: "shop.price".to_owned(),
        verdict: "delivered".to_owned(),
        detail: "no filter".to_owned(),
        progress: v1::FlowProgress::Waiting.into(),
        committed: Some(5),
        disposition: "retrying".to_owned(),
        note: "attempt 2 is due".to_owned(),
        instance: "a".to_owned(),
        attempts: 2,
    };
    let published = v1::FlowRecord {
        position: at("orders", 5),
        timestamp_ms: 1_700_000_000_000,
        kind: v1::FlowKind::Published.into(),
        mesh_id: "id-1".to_owned(),
        trace_id: "4bf92f3577b34da6a3ce929d0e0e4736".to_owned(),
        key: Some("k1".into()),
        routes: vec![route, v1::FlowRoute { route: "mail".to_owned(), ..v1::FlowRoute::default() }],
        ..v1::FlowRecord::default()
    };
    let retry = v1::FlowRecord {
        position: at("price.orders.retry-1", 2),
        timestamp_ms: 1_700_000_001_000,
        source: at("orders", 5),
        kind: v1::FlowKind::Retry.into(),
        route: "price".to_owned(),
        mesh_id: "id-1".to_owned(),
        hops: 1,
        attempts: 2,
        reason: "status".to_owned(),
        detail: "503: busy".to_owned(),
        due_ms: 1_700_000_060_000,
        progress: v1::FlowProgress::Waiting.into(),
        ..v1::FlowRecord::default()
    };
    let scanned = v1::Scanned { topic: "priced".to_owned(), partitions: 3, records: 12, left_out: 0, which: String::new() };
    let header = |name: &str, value: &'static [u8]| v1::Header { name: name.to_owned(), value: Some(value.into()) };
    let record = v1::Record {
        value: Some("{\"n\":1}".into()),
        headers: vec![header("source", b"web"), header("raw", b"\xff")],
        content_type: "application/json".to_owned(),
        ..v1::Record::default()
    };
    let explained = v1::ExplainResponse {
        record: Some(record),
        flow: Some(published.clone()),
        found: vec![retry.clone()],
        scanned: vec![scanned.clone()],
        since_ms: 1_700_000_000_000,
        more: true,
    };
    let flow = v1::TraceResponse {
        records: vec![published, retry],
        more: false,
        scanned: vec![scanned],
        traces: vec!["4bf92f3577b34da6a3ce929d0e0e4736".to_owned()],
    };
    bench.script.set(|state| {
        state.explained = Some(explained);
        state.flow = flow;
    });
    let retry = json!({
        "topic": "price.orders.retry-1", "partition": 1, "offset": 2, "time": "2023-11-14T22:13:21Z", "timestamp_ms": 1_700_000_001_000_u64,
        "kind": "retry", "route": "price", "source": "orders/1/5", "index": null, "mesh_id": "id-1", "trace_id": null, "hops": 1,
        "key": null, "key_base64": null, "attempts": 2, "reason": "status", "detail": "503: busy", "due": "2023-11-14T22:14:20Z",
        "progress": "waiting", "routes": [], "made": [],
    });
    let record = json!({
        "topic": "orders", "partition": 1, "offset": 5, "time": "2023-11-14T22:13:20Z", "timestamp_ms": 1_700_000_000_000_u64,
        "kind": "published", "route": null, "source": null, "index": null, "mesh_id": "id-1",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "hops": 0, "key": "k1", "key_base64": null, "attempts": 0, "reason": null,
        "detail": null, "due": null, "progress": null,
        "routes": [
            {
                "route": "price", "service": "pricing", "group": "shop.price", "verdict": "delivered", "detail": "no filter",
                "progress": "waiting", "committed": 5, "disposition": "retrying", "note": "attempt 2 is due", "instance": "a", "attempts": 2,
            },
            {
                "route": "mail", "service": "", "group": "", "verdict": "", "detail": "", "progress": null, "committed": null,
                "disposition": "", "note": "",
            },
        ],
        "made": [retry],
    });
    let scanned = json!([{ "topic": "priced", "partitions": 3, "records": 12, "left_out": 0, "left_out_offsets": "" }]);
    let expected = json!({
        "record": record, "content_type": "application/json", "value": "{\"n\":1}",
        "headers": [{ "name": "source", "value": "web" }, { "name": "raw", "value_base64": "/w==" }],
        "more": true, "since": "2023-11-14T22:13:20Z", "scanned": scanned,
    });
    assert_eq!(bench.run(&["explain", "orders/1/5", "-o", "json"]).await.ends(0).json(), expected);
    let expected = json!({
        "id": "id-1", "records": 2, "more": false, "flow": [record], "traces": ["4bf92f3577b34da6a3ce929d0e0e4736"],
        "since": "2023-11-14T22:13:20Z", "scanned": scanned,
    });
    let said = bench.run(&["trace", "id-1", "--from", "2023-11-14T22:13:20Z", "-o", "json"]).await.ends(0);
    assert_eq!(said.json(), expected);
}

#[tokio::test]
async fn of_lags_and_findings() {
    let bench = Bench::new().await;
    let partition = |partition, committed: Option<i64>, lag, first_unread_ms| v1::PartitionLag {
        topic: "orders".to_owned(),
        partition,
        committed,
        low: 0,
        end: 10,
        lag,
        first_unread_ms,
    };
    let groups = vec![
        v1::GroupLag {
            group: "shop.price".to_owned(),
            route: "price".to_owned(),
            members: Some(2),
            partitions: vec![partition(0, Some(7), 3, Some(1_000)), partition(1, Some(10), 0, None)],
        },
        v1::GroupLag { group: "connect".to_owned(), route: String::new(), members: None, partitions: vec![partition(0, None, 10, None)] },
    ];
    let lag = v1::GetLagResponse { groups, now_ms: 66_000, left_out: "1 group".to_owned() };
    let finding = |severity: v1::Severity, fix: &str| v1::Finding {
        severity: severity.into(),
        check: "routes".to_owned(),
        subject: "price".to_owned(),
        what: "it waits".to_owned(),
        fix: fix.to_owned(),
    };
    let all = [(v1::Severity::Ok, ""), (v1::Severity::Warning, "look at it"), (v1::Severity::Error, "start it")];
    let findings = all.map(|(severity, fix)| finding(severity, fix)).to_vec();
    bench.script.set(|state| {
        state.lag = Some(lag);
        state.findings = v1::DiagnoseResponse { mesh: "shop".to_owned(), instance: "a".to_owned(), findings };
    });
    let said = bench.run(&["lag", "-o", "json"]).await.ends(0);
    let expected = json!({
        "groups": [
            {
                "group": "shop.price", "route": "price", "members": 2, "state": "LAG", "lag_records": 3, "lag_seconds": 65.0,
                "partitions": [
                    {
                        "topic": "orders", "partition": 0, "committed": 7, "low": 0, "end": 10, "lag_records": 3, "lag_seconds": 65.0,
                        "state": "LAG",
                    },
                    {
                        "topic": "orders", "partition": 1, "committed": 10, "low": 0, "end": 10, "lag_records": 0, "lag_seconds": 0.0,
                        "state": "OK",
                    },
                ],
            },
            {
                "group": "connect", "route": null, "members": null, "state": "LAG", "lag_records": 10, "lag_seconds": 0.0,
                "partitions": [{
                    "topic": "orders", "partition": 0, "committed": null, "low": 0, "end": 10, "lag_records": 10, "lag_seconds": null,
                    "state": "LAG",
                }],
            },
        ],
        "lag_records": 13, "lag_seconds": 65.0, "left_out": "1 group",
    });
    assert_eq!((said.json(), &*said.err), (expected, "left out: 1 group\n"));

    let finding =
        |severity: &str, fix: &str| json!({ "severity": severity, "check": "routes", "subject": "price", "what": "it waits", "fix": fix });
    let expected = json!({
        "mesh": "shop", "instance": "a", "errors": 1, "warnings": 1,
        "findings": [finding("ok", ""), finding("warning", "look at it"), finding("error", "start it")],
    });
    assert_eq!(bench.run(&["doctor", "-o", "json"]).await.ends(1).json(), expected);
}
