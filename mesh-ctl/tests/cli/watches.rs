//! Looks at the mesh, once and again and again, and what becomes of them when the sidecar has trouble.

use std::{net::SocketAddr, time::Duration};

use mesh_proto::{
    admin::{AdminAddress, KeepAlive},
    v1::{self, control_server::ControlServer},
};
use mesh_sidecar::api::listen;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::{
    TABLE,
    fake::{Bench, Script, in_force, instance, mesh},
};

#[tokio::test]
async fn status_names_what_is_waited_for() {
    use v1::InstanceState::{Nacked, Synced};
    let bench = Bench::new().await;
    let waiting = v1::RouteStatus {
        route: "price".to_owned(),
        service: "pricing".to_owned(),
        state: v1::RouteState::WaitingForService.into(),
        reason: "service pricing at http://127.0.0.1:8080: connection refused".to_owned(),
        partitions: 4,
        lag_records: 1_203,
        lag_seconds: 41.7,
        waiting_since_ms: 1_700_000_100_000 - 125_000,
        ..v1::RouteStatus::default()
    };
    let a = v1::InstanceStatus { routes: vec![waiting], ..instance("a", Synced, 8) };
    let b = v1::InstanceStatus {
        error: "schema 9".to_owned(),
        refused_generation: 8,
        waiting: vec!["broker: away".to_owned()],
        reported_ms: 1_700_000_100_000 - 12_000,
        ..instance("b", Nacked, 7)
    };
    bench.script.set(|state| state.status = vec![mesh(8, vec![a, b])]);
    let said = bench.run(&["status"]).await.ends(0);
    let expected = format!(
        "mesh shop, generation 8, as seen from http://{}\n
INSTANCE  STATE   GENERATION  SERVICES  VERSION  AGE  NOTE
a         SYNCED  8           pricing   0.1.0    0s
b         NACKED  7           pricing   0.1.0    12s  refused generation 8: schema 9; broker: away

ROUTE  SERVICE  INSTANCE  STATE                PARTITIONS  LAG   BEHIND  IN FLIGHT  AGE  REASON
price  pricing  a         WAITING_FOR_SERVICE  4           1203  41s     0          0s   service pricing at http://127.0.0.1:8080: connection refused (for 2m 5s)
",
        bench.address
    );
    assert_eq!(said.out, expected);
    let json = bench.run(&["status", "-o", "json"]).await.ends(0).json();
    assert_eq!(json["instances"][0]["routes"][0]["state"], "WAITING_FOR_SERVICE");
    assert_eq!((&json["instances"][1]["state"], &json["instances"][1]["age_seconds"]), (&"NACKED".into(), &12.0.into()));
    let said = bench.run(&["-o", "yaml", "status"]).await.ends(0);
    assert!(said.out.contains("generation: 8\n"), "{}", said.out);

    // A service without any instance is named, too.
    let more = format!("{TABLE}  - {{ name: bill, service: billing, from: [priced], handler: /b, to: void }}\n");
    bench.script.set(|state| state.table = Some(in_force(&more, 8)));
    let said = bench.run(&["status"]).await.ends(0);
    let row: Vec<_> = said.out.lines().filter(|line| line.contains("NO_INSTANCE")).collect();
    assert!(row.len() == 1 && row[0].starts_with("bill ") && row[0].ends_with("no live instance serves service billing"), "{}", said.out);
    let json = bench.run(&["status", "-o", "json"]).await.ends(0).json();
    assert_eq!(json["unserved"], serde_json::json!([{ "route": "bill", "service": "billing" }]));
}

#[tokio::test]
async fn times_that_no_clock_knows_are_wrong_usage() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    for wrong in [
        &["reset", "price", "--to-earliest", "--timeout", "20000y"][..],
        &["release", "price", "--timeout", "500000000000y"],
        &["pause", "price", "--wait", "--timeout", "2d"],
        &["apply", "-f", "routes.yaml", "--wait", "--timeout", "20000y"],
        &["rollout", "abort", "--wait", "--timeout", "20000y"],
        &["drain", "--execute", "--wait", "20000y"],
        &["top", "--interval", "20000y"],
        &["graph", "--live", "--interval", "2d"],
        &["status", "--watch", "20000y"],
    ] {
        let said = bench.run(wrong).await.ends(2);
        assert!(said.err.contains("is too long: use 24h or less"), "{wrong:?}: {said:?}");
    }
    for wrong in [&["status", "--watch", "0s"][..], &["rollout", "status", "--watch", "0s"], &["lag", "--watch", "499ms"]] {
        let said = bench.run(wrong).await.ends(2);
        assert!(said.err.contains("is too short: use 500ms or more"), "{wrong:?}: {said:?}");
    }
}

#[tokio::test]
async fn each_look_is_a_document_and_trouble_ends_no_watch() {
    let bench = Bench::new().await;
    let lag = v1::GetLagResponse { now_ms: 1, ..v1::GetLagResponse::default() };
    bench.script.set(|state| {
        state.status = vec![mesh(8, vec![instance("a", v1::InstanceState::Synced, 8)])];
        state.lag = Some(lag);
    });
    for command in [&["status"][..], &["rollout", "status"], &["lag"]] {
        let run = async |more: &[&str]| bench.run(&[command, &["--watch", "500ms"], more].concat()).await;
        let said = run(&["--count", "2", "-o", "json"]).await.ends(0);
        let looks: Vec<serde_json::Value> = said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(looks.len() == 2 && looks[0] == looks[1], "{said:?}");
        let said = run(&["--count", "1", "-o", "yaml"]).await.ends(0);
        assert!(said.out.starts_with("---\n"), "{said:?}");
        // Without --watch it is one document for people and programs, as ever.
        bench.run(&[command, &["-o", "json"]].concat()).await.ends(0).json();
    }
    let said = bench.run(&["rollout", "status", "--watch", "500ms", "--count", "2"]).await.ends(0);
    let none = "no rollout: the newest table is meant for all\n";
    assert_eq!(said.out, format!("{none}\n{none}"));
    bench.run(&["status", "--count", "2"]).await.ends(2);

    // The second look fails, and so does the third, once more: that is said once.
    let fails = |fails: &[bool]| {
        bench.script.set(|state| state.fails = fails.iter().copied().collect());
    };
    fails(&[false, true, true, true, true]);
    let said = bench.run(&["status", "--watch", "500ms", "--count", "4", "-o", "json"]).await.ends(0);
    assert_eq!((said.out.lines().count(), &*said.err), (2, "the mesh cannot be looked at now: it starts\n"));
    // In trouble at the end, or from the beginning, it is an error.
    fails(&[false, true, true]);
    let said = bench.run(&["status", "--watch", "500ms", "--count", "2", "-o", "json"]).await.ends(2);
    assert!(said.out.lines().count() == 1 && said.err.starts_with("error: it starts"), "{said:?}");
    fails(&[true]);
    bench.run(&["status", "--watch"]).await.ends(2);
    assert!(bench.script.0.lock().unwrap().watched.iter().any(|watched| *watched), "instances are told that they are watched");
}

#[tokio::test]
async fn what_was_changed_is_told_also_if_the_wait_for_it_fails() {
    use v1::RouteState::{Paused, Running};
    let bench = Bench::new().await;
    let route = |state: v1::RouteState, in_flight| v1::RouteStatus {
        route: "price".into(),
        state: state.into(),
        in_flight,
        ..v1::RouteStatus::default()
    };
    let with = |state, in_flight| {
        mesh(8, vec![v1::InstanceStatus { routes: vec![route(state, in_flight)], ..instance("b", v1::InstanceState::Synced, 8) }])
    };
    bench.script.set(|state| {
        state.pause = Some(v1::PauseResponse { changed: true });
        state.abort = Some(v1::AbortRolloutResponse { generation: 8, stable_generation: 7 });
        state.status = vec![with(Running, 2), with(Paused, 2), with(Paused, 0)];
        state.fails = [true, true, false].into();
    });
    let said = bench.run(&["pause", "price", "--wait"]).await.ends(0);
    assert_eq!((&*said.out, &*said.err), ("route price is paused\n", "the sidecar does not answer: it starts\n"));
    assert!(bench.script.0.lock().unwrap().watched.iter().all(|watched| *watched), "less in flight is reported to who watches only");

    let fails = |fails: usize| {
        bench.script.set(|state| state.fails = vec![true; fails].into());
    };
    fails(1);
    let said = bench.run(&["pause", "price", "--wait", "--timeout", "0s", "-o", "json"]).await.ends(4);
    assert_eq!(said.json(), serde_json::json!({ "route": "price", "paused": true, "changed": true }));
    assert!(said.err.starts_with("error: route price is paused, but it is not known who still delivers: it starts\nhint: "), "{said:?}");
    bench.script.set(|state| state.status = vec![with(Paused, 1)]);
    let said = bench.run(&["pause", "price", "--wait", "--timeout", "0s"]).await.ends(4);
    assert_eq!(said.out, "route price is paused\nstill delivering: b: see `mesh-ctl status`\n");

    fails(1);
    let said = bench.run(&["rollout", "abort", "--wait", "--timeout", "0s"]).await.ends(4);
    assert_eq!(said.out, "aborted: generation 8 is over, all go back to generation 7\n");
    assert!(said.err.contains("generation 8 is aborted, but it is not known who still runs it: it starts"), "{said:?}");
    fails(2);
    bench.script.set(|state| state.status = vec![with(Running, 0), mesh(8, vec![instance("b", v1::InstanceState::Pending, 7)])]);
    let said = bench.run(&["rollout", "abort", "--wait", "-o", "json"]).await.ends(0);
    assert_eq!(said.json(), serde_json::json!({ "generation": 8, "stable_generation": 7, "running": [] }));
}

/// A way to an address that says nothing any more at the word, and closes nothing.
async fn tunnel(to: SocketAddr, silent: CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(to).await.unwrap();
        drop(silent.run_until_cancelled(tokio::io::copy_bidirectional(&mut near, &mut far)).await);
        std::future::pending::<()>().await;
    });
    address
}

#[tokio::test]
async fn a_stream_ends_when_its_sidecar_falls_silent_and_not_before() {
    // Over the listener of a real sidecar: it must not take pings amiss.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = tonic::service::Routes::new(ControlServer::new(Script::default())).into_axum_router();
    let (stop, silent) = (CancellationToken::new(), CancellationToken::new());
    let options = listen::Options::new("admin").drain(Duration::ZERO);
    let server = tokio::spawn(listen::serve_router(listener, router, options, stop.clone()));
    let admin = AdminAddress::new(format!("http://{}", tunnel(address, silent.clone()).await));
    let alive = KeepAlive { interval: Duration::from_millis(20), timeout: Duration::from_millis(300) };
    let mut client = admin.connect_with(alive).await.unwrap();
    let request = v1::TailRequest { topics: vec!["quiet".into()], follow: true, ..v1::TailRequest::default() };
    let mut stream = client.tail(request).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().records.len(), 2);
    // Many pings, and more than their answers may take.
    let quiet = tokio::time::timeout(Duration::from_secs(1), stream.message()).await;
    assert!(quiet.is_err(), "whoever is only quiet is not gone: {quiet:?}");
    silent.cancel();
    let status = tokio::time::timeout(Duration::from_secs(10), stream.message()).await.expect("it hangs").unwrap_err();
    assert!(std::error::Error::source(&status).is_some(), "it was noticed here: {status:?}");
    stop.cancel();
    assert_eq!(server.await.unwrap(), 1, "its end of the connection is there until the drain is over");
}
