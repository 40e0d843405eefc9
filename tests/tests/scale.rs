//! A simulated mesh: many sidecars' control planes in one process, on one broker. Its large form is a row of the benchmark (`mesh-scale`).
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics on purpose")]

use mesh_proto::v1::InstanceState;
use mesh_tests::bench::scale::{Mesh, table};

const SIDECARS: usize = 20;
const ROUTES: usize = 200;

/// Twenty sidecars, one that refuses every table, and one that comes late: three tables reach all that take them, and a route that did not change is the
/// same as before to the sidecar that runs it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_reach_all_of_a_mesh() {
    let mut mesh = Mesh::new(None).unwrap();
    mesh.start(SIDECARS).await.unwrap();
    mesh.start_refusing().await.unwrap();
    mesh.ready().await.unwrap();
    let services = SIDECARS + 2;
    let text = |mesh: &Mesh, version| table(mesh.name(), services, ROUTES, version);
    let of_last = (0..ROUTES).filter(|route| route % services == services - 1).count();
    let of_refusing = (0..ROUTES).filter(|route| route % services == SIDECARS).count();
    let run = ROUTES - of_refusing - of_last;

    let first = mesh.apply(&text(&mesh, 1)).await.unwrap();
    assert_eq!((first.generation, first.untouched, first.touched), (1, 0, run));
    let second = mesh.apply(&text(&mesh, 2)).await.unwrap();
    assert_eq!((second.generation, second.untouched, second.touched), (2, run - 2, 2), "every hundredth route is another");
    assert_eq!(second.in_force.len(), SIDECARS);
    // Everybody read the snapshot once, wrote at least one report, and read those of all.
    let traffic = second.traffic;
    let all = mesh.sidecars() as u64;
    assert_eq!(traffic.control_read, traffic.control_written * all, "{traffic:?}");
    assert!(traffic.reports_written >= all && traffic.reports_read == traffic.reports_written * all, "{traffic:?}");

    mesh.start(1).await.unwrap();
    mesh.ready().await.unwrap();
    let third = mesh.apply(&text(&mesh, 3)).await.unwrap();
    assert_eq!((third.generation, third.in_force.len()), (3, SIDECARS + 1));
    assert_eq!((third.untouched, third.touched), (run + of_last - 2, 2), "the late one had the second table");
    for (number, active) in mesh.tables().into_iter().enumerate() {
        let Some(active) = active else {
            assert_eq!(number, SIDECARS, "only the one that refuses has none");
            continue;
        };
        assert_eq!((active.generation, &*active.compiled.digest), (3, &*third.digest), "sidecar {number}");
    }
    assert_eq!((mesh.in_state(InstanceState::Synced, 3), mesh.in_state(InstanceState::Nacked, 3)), (SIDECARS + 1, 1));
    mesh.look().unwrap();
    mesh.end().await.unwrap();
}
