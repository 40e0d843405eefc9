//! Tables: checked, applied, compared, drawn, signed.

use mesh_proto::v1;
use tonic::Status;

use crate::{
    FAULTY, TABLE,
    fake::{Bench, in_force, instance, mesh},
};

#[tokio::test]
async fn validate_needs_no_sidecar_and_reports_everything() {
    let bench = Bench::new().await;
    bench.file("good.yaml", TABLE);
    bench.file("bad.yaml", FAULTY);
    let nobody = "http://127.0.0.1:1";
    let said = bench.run_with(&["validate", "-f", "good.yaml"], nobody, "").await.ends(0);
    assert!(said.out.starts_with("good.yaml: valid, 1 route, sha256:"), "{}", said.out);

    let said = bench.run_with(&["validate", "-f", "good.yaml", "bad.yaml"], nobody, "").await.ends(1);
    let faults: Vec<_> = said.out.lines().filter(|line| line.starts_with("bad.yaml:")).collect();
    assert!(faults.len() >= 4, "three faults and a verdict at least: {}", said.out);
    assert!(faults.iter().any(|line| line.starts_with("bad.yaml:6:") && line.contains("error[unknown_field]")), "{}", said.out);
    assert!(said.out.contains("\n  hint: "), "{}", said.out);
    assert!(faults.last().unwrap().contains("not valid, "), "{}", said.out);

    let said = bench.run_with(&["validate", "-q", "-f", "-"], nobody, TABLE).await.ends(0);
    assert_eq!(said.out, "");
    let said = bench.run_with(&["validate", "-f", "-", "-o", "json"], nobody, FAULTY).await.ends(1);
    let json = said.json();
    assert_eq!((&json[0]["file"], &json[0]["valid"]), (&"<stdin>".into(), &false.into()));
    assert!(json[0]["faults"][0]["line"].as_u64().unwrap() > 0);

    let said = bench.run_with(&["validate", "-f", "absent.yaml"], nobody, "").await.ends(2);
    assert!(said.err.contains("absent.yaml cannot be read"), "{}", said.err);
    bench.run(&["validate"]).await.ends(2);
}

#[tokio::test]
async fn apply_says_what_it_did() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let response = v1::ApplyResponse {
        generation: 8,
        digest: "sha256:8".to_owned(),
        changed: true,
        changes: vec!["+ routes.price: {}".to_owned(), "~ defaults.timeout: \"1s\" → \"2s\"".to_owned()],
        new_routes: vec![v1::RouteBacklog { route: "price".to_owned(), records: 1_203 }],
        warnings: vec![v1::Fault {
            file: "routes.yaml".to_owned(),
            message: "a loop".to_owned(),
            code: "loop".to_owned(),
            ..v1::Fault::default()
        }],
        ..v1::ApplyResponse::default()
    };
    bench.script.set(|state| state.apply = Some(Ok(response.clone())));
    let said = bench.run(&["apply", "-f", "routes.yaml", "--expect-generation", "7"]).await.ends(0);
    assert_eq!(
        said.out,
        "+ routes.price: {}\n~ defaults.timeout: \"1s\" → \"2s\"\nroute price begins with 1203 existing records\n\
         applied generation 8 (sha256:8)\n"
    );
    assert_eq!(said.err, "routes.yaml: warning[loop]: a loop\n");
    let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
    assert_eq!((asked.expected_generation, asked.dry_run), (Some(7), false));
    let table = asked.table.unwrap();
    assert_eq!((&*table.file, &*table.text), ("routes.yaml", TABLE));

    let said = bench.run(&["-q", "apply", "-f", "routes.yaml"]).await.ends(0);
    assert_eq!((&*said.out, &*said.err), ("applied generation 8 (sha256:8)\n", ""));
    let json = bench.run(&["apply", "-f", "routes.yaml", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["generation"], &json["new_routes"][0]["records"]), (&8.into(), &1_203.into()));

    bench.script.set(|state| state.apply = Some(Ok(v1::ApplyResponse { changed: false, ..response.clone() })));
    let said = bench.run(&["apply", "-f", "routes.yaml", "--dry-run"]).await.ends(0);
    assert!(said.out.contains("would begin") && said.out.contains("dry run: nothing was applied"), "{}", said.out);
    bench.script.set(|state| {
        state.apply = Some(Ok(v1::ApplyResponse { changes: Vec::new(), new_routes: Vec::new(), ..state.apply.clone().unwrap().unwrap() }));
    });
    let said = bench.run(&["apply", "-f", "routes.yaml"]).await.ends(0);
    assert_eq!(said.out, "unchanged: generation 8 is this table already (sha256:8)\n");
}

#[tokio::test]
async fn apply_refused() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let fault = v1::Fault {
        file: "routes.yaml".to_owned(),
        line: 6,
        column: 5,
        field: "spec.routes[0].to".to_owned(),
        message: "is missing".to_owned(),
        hint: "name topics, or `void`".to_owned(),
        code: "missing".to_owned(),
    };
    bench.script.set(|state| state.apply = Some(Ok(v1::ApplyResponse { faults: vec![fault], ..v1::ApplyResponse::default() })));
    let said = bench.run(&["apply", "-f", "routes.yaml", "--wait"]).await.ends(1);
    assert_eq!(said.out, "");
    assert_eq!(
        said.err,
        "routes.yaml:6:5: error[missing]: spec.routes[0].to: is missing\n  hint: name topics, or `void`\n\
         error: routes.yaml has 1 fault: nothing was applied, and the last good table stays in force\n"
    );
    let said = bench.run(&["apply", "-f", "routes.yaml", "-o", "json"]).await.ends(1);
    assert_eq!(said.json()["faults"][0]["line"], 6);

    for (status, code) in [
        (Status::aborted("generation 8 was applied by instance b at the same time"), 3),
        (Status::failed_precondition("this sidecar runs the table that its config pins"), 1),
        (Status::unavailable("the broker is away"), 2),
        (Status::unknown("it is not known whether generation 8 was applied"), 4),
    ] {
        let message = status.message().to_owned();
        bench.script.set(|state| state.apply = Some(Err(status)));
        let said = bench.run(&["apply", "-f", "routes.yaml"]).await.ends(code);
        assert!(said.err.starts_with(&format!("error: {message}")), "{}", said.err);
    }
}

#[tokio::test]
async fn apply_waits_for_the_mesh() {
    use v1::InstanceState::{Lost, Nacked, Pending, Pinned, Synced};
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let applied = v1::ApplyResponse { generation: 8, digest: "sha256:8".to_owned(), changed: true, ..v1::ApplyResponse::default() };
    let others = || [instance("gone", Lost, 3), instance("own", Pinned, 0)];
    let with = |instances: Vec<v1::InstanceStatus>| mesh(8, instances.into_iter().chain(others()).collect());
    bench.script.set(|state| {
        state.apply = Some(Ok(applied));
        state.status = vec![
            with(vec![instance("a", Synced, 8), instance("b", Pending, 7)]),
            // An old refusal is no refusal of this one.
            with(vec![instance("a", Synced, 8), v1::InstanceStatus { refused_generation: 7, ..instance("b", Nacked, 6) }]),
            with(vec![instance("a", Synced, 8), instance("b", Synced, 8)]),
        ];
    });
    let said = bench.run(&["apply", "-f", "routes.yaml", "--wait"]).await.ends(0);
    assert!(said.err.contains("2 instances run generation 8"), "{}", said.err);
    let told: Vec<_> = said.err.lines().take(7).collect();
    let expected =
        ["SYNCED   1 of 2: a", "PENDING  1 of 2: b", "LOST     1: gone", "PINNED   1: own", "SYNCED   2 of 2: a, b", "PENDING  0"];
    assert_eq!(told[..6], expected, "a line for each state, when it changes");
    assert!(said.err.contains("gone was not waited for: LOST") && said.err.contains("own was not waited for: PINNED"), "{}", said.err);
    assert_eq!(bench.script.0.lock().unwrap().status.len(), 1, "it looked until all were there");

    let nacked = v1::InstanceStatus { error: "schema 9".to_owned(), refused_generation: 8, ..instance("b", Nacked, 7) };
    bench.script.set(|state| state.status = vec![with(vec![instance("a", Synced, 8), nacked])]);
    let said = bench.run(&["apply", "-f", "routes.yaml", "--wait"]).await.ends(1);
    assert!(said.err.contains("1 instance refused generation 8") && said.err.contains("b: schema 9"), "{}", said.err);

    bench.script.set(|state| state.status = vec![with(vec![instance("a", Synced, 8), instance("b", Pending, 7)])]);
    let said = bench.run(&["apply", "-f", "routes.yaml", "--wait", "--timeout", "0s"]).await.ends(4);
    assert!(said.err.contains("do not run it yet: b"), "{}", said.err);
    bench.run(&["apply", "-f", "routes.yaml", "--wait", "--dry-run"]).await.ends(2);
}

#[tokio::test]
async fn get_gives_what_apply_takes() {
    let bench = Bench::new().await;
    let said = bench.run(&["get"]).await.ends(2);
    assert!(said.err.contains("no routing table yet"), "{}", said.err);

    bench.script.set(|state| state.table = Some(in_force(TABLE, 7)));
    let said = bench.run(&["get"]).await.ends(0);
    assert!(said.out.starts_with("# generation 7, applied 2023-11-14T22:13:20Z, sha256:"), "{}", said.out);
    for form in ["yaml", "json"] {
        let said = bench.run(&["get", "-o", form]).await.ends(0);
        let again = mesh_routing::parse("again", &said.out).unwrap();
        assert_eq!(again.digest(), in_force(TABLE, 7).digest);
    }
    let said = bench.run(&["get", "-q", "-o", "table"]).await.ends(0);
    assert_eq!(said.out, "ROUTE  SERVICE  FROM    TO\nprice  pricing  orders  priced\n");
}

#[tokio::test]
async fn diff_tells_by_its_exit_code() {
    let bench = Bench::new().await;
    bench.script.set(|state| state.table = Some(in_force(TABLE, 7)));
    bench.file("same.yaml", &TABLE.replace("{ name: price,", "{   name: price,"));
    bench.file("other.yaml", &TABLE.replace("[priced]", "void"));
    bench.file("bad.yaml", FAULTY);
    let said = bench.run(&["diff", "-f", "same.yaml"]).await.ends(0);
    assert_eq!((&*said.out, &*said.err), ("", "no difference from generation 7\n"));
    let said = bench.run(&["diff", "-f", "other.yaml"]).await.ends(1);
    assert_eq!(said.out, "~ routes.price.to: [\"priced\"] → \"void\"\n");
    let json = bench.run(&["diff", "-f", "other.yaml", "-o", "json"]).await.ends(1).json();
    assert_eq!((&json[0]["path"], &json[0]["new"]), (&"routes.price.to".into(), &"void".into()));
    let said = bench.run(&["diff", "--from", "same.yaml", "--to", "other.yaml"]).await.ends(1);
    assert_eq!((&*said.out, &*said.err), ("~ routes.price.to: [\"priced\"] → \"void\"\n", "1 difference from same.yaml\n"));
    let said = bench.run(&["diff", "--generation", "7"]).await.ends(0);
    assert_eq!((&*said.out, &*said.err), ("", "no difference from generation 7 to generation 7\n"));
    for wrong in [&["diff"][..], &["diff", "-f", "same.yaml", "--to", "3"], &["diff", "--generation", "3", "--from", "4"]] {
        bench.run(wrong).await.ends(2);
    }
    let said = bench.run(&["diff", "-f", "bad.yaml"]).await.ends(2);
    assert!(said.err.contains("bad.yaml:6:") && said.err.contains("error: bad.yaml has "), "{}", said.err);

    bench.script.set(|state| state.table = None);
    let said = bench.run(&["diff", "-f", "same.yaml"]).await.ends(1);
    assert!(said.out.starts_with("+ routes.price: ") && said.out.lines().count() == 1, "{}", said.out);
}

#[tokio::test]
async fn history_tells_who_when_and_why() {
    let bench = Bench::new().await;
    bench.script.set(|state| state.history = v1::GetHistoryResponse { mesh: "shop".to_owned(), ..v1::GetHistoryResponse::default() });
    assert_eq!(bench.run(&["history"]).await.ends(0).out, "mesh shop, no table applied yet\n");

    let entry = |generation: u64| v1::Generation {
        generation,
        digest: format!("sha256:{:064}", generation),
        applied_ms: 1_700_000_000_000,
        applied_by: "ann@desk".to_owned(),
        source: "routes.yaml".to_owned(),
        instance: "a".to_owned(),
        routes: Some(v1::RouteCounts { added: 3, changed: 2, removed: 1 }),
        ..v1::Generation::default()
    };
    let signature = Some(v1::TableSignature { key_id: "0a1b2c3d4e5f6071".to_owned(), ed25519: vec![0; 64].into() });
    let generations = vec![
        v1::Generation { refused: "it is not signed".to_owned(), ..entry(9) },
        v1::Generation { rollback_to: 6, signature, message: "too\nmuch".to_owned(), ..entry(8) },
        v1::Generation { generation: 7, refused: "garbage".to_owned(), ..v1::Generation::default() },
        v1::Generation { routes: None, applied_by: String::new(), source: String::new(), ..entry(6) },
    ];
    bench.script.set(|state| state.history = v1::GetHistoryResponse { mesh: "shop".to_owned(), generation: 9, in_force: 8, generations });
    let said = bench.run(&["history"]).await.ends(0);
    let expected = format!(
        "mesh shop, generation 9, as seen from http://{}\n
GENERATION  STATE     APPLIED               BY        FROM           THROUGH  ROUTES    SIGNED BY         DIGEST               MESSAGE
9           REFUSED   2023-11-14T22:13:20Z  ann@desk  routes.yaml    a        +3 ~2 -1  -                 sha256:000000000000
8           IN FORCE  2023-11-14T22:13:20Z  ann@desk  rollback to 6  a        +3 ~2 -1  0a1b2c3d4e5f6071  sha256:000000000000  too much
7           REFUSED   -                     -         -              -        -         -                 -
6           -         2023-11-14T22:13:20Z  -         -              a        -         -                 sha256:000000000000
",
        bench.address
    );
    assert_eq!(said.out, expected);
    assert_eq!(said.err, "generation 9 is refused by this sidecar: it is not signed\ngeneration 7 is refused by this sidecar: garbage\n");
    let json = bench.run(&["history", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["generations"][1]["rollback_to"], &json["generations"][1]["in_force"]), (&6.into(), &true.into()));
    assert_eq!(json["generations"][0]["routes"], serde_json::json!({ "added": 3, "changed": 2, "removed": 1 }));
    assert_eq!(bench.run(&["-q", "history", "--limit", "1"]).await.ends(0).out.lines().count(), 2);
}

#[tokio::test]
async fn a_table_is_signed_for_the_generation_that_it_becomes() {
    use mesh_routing::sign::{PublicKey, STABLE, Signed};
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    bench.file("bad.yaml", FAULTY);
    let made = bench.run(&["keys", "generate", "--out", "mesh.key", "-o", "json"]).await.ends(0).json();
    let key: PublicKey = made["public_key"].as_str().unwrap().parse().unwrap();
    assert_eq!(bench.run(&["-q", "keys", "show", "mesh.key"]).await.ends(0).out, format!("{key}\n"));
    let said = bench.run(&["keys", "generate"]).await.ends(2);
    assert!(said.err.contains("mesh.key") && said.err.contains("must not get lost"), "{}", said.err);
    let said = bench.run(&["keys", "generate", "--out", "other.key"]).await.ends(0);
    assert!(said.out.starts_with("key id       ") && said.out.ends_with("private key  other.key\n"), "{}", said.out);
    let private = std::fs::read_to_string(bench.folder.path().join("other.key")).unwrap();
    assert!(!said.out.contains(private.lines().last().unwrap()), "a private key is never printed");

    let response = v1::ApplyResponse { generation: 8, changed: true, ..v1::ApplyResponse::default() };
    let table = mesh_routing::parse("t", TABLE).unwrap();
    let digest = table.digest();
    bench.script.set(|state| {
        state.history = v1::GetHistoryResponse { generation: 7, ..v1::GetHistoryResponse::default() };
        state.apply = Some(Ok(response));
        state.table = Some(in_force(TABLE, 5));
    });
    for (arguments, base, old) in [
        (&["apply", "-f", "routes.yaml", "--sign-key", "mesh.key", "-m", "why"][..], 7, 0),
        (&["apply", "-f", "routes.yaml", "--sign-key", "mesh.key", "--expect-generation", "3"], 3, 0),
        (&["rollback", "5", "--sign-key", "mesh.key"], 7, 5),
    ] {
        let said = bench.run(arguments).await.ends(0);
        let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
        let signature = asked.signature.unwrap();
        let place = Signed { mesh: "shop", channel: STABLE, generation: base + 1, digest: &digest };
        assert!(signature.key_id == key.id() && key.verifies(&place, &signature.ed25519), "{arguments:?}");
        assert_eq!((asked.expected_generation, asked.rollback_to), (Some(base), old), "what is signed for {base} builds on it alone");
        assert_eq!(asked.message, if arguments.contains(&"why") { "why" } else { "" });
        assert_eq!(said.err.contains("generation 5 was not signed by this key"), old > 0, "{}", said.err);
    }
    // Without a key nothing is signed, and a rollback still builds on what it saw.
    bench.run(&["rollback", "5"]).await.ends(0);
    let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
    assert_eq!((asked.signature, asked.expected_generation), (None, Some(7)));

    let said = bench.run(&["apply", "-f", "bad.yaml", "--sign-key", "mesh.key"]).await.ends(1);
    assert!(said.err.contains("bad.yaml:6:") && said.err.contains("nothing was applied"), "{}", said.err);
    for (file, why) in [("routes.yaml", "is no private key"), ("absent.key", "cannot be read")] {
        let said = bench.run(&["apply", "-f", "routes.yaml", "--sign-key", file]).await.ends(2);
        assert!(said.err.contains(why), "{}", said.err);
    }
    assert!(bench.script.0.lock().unwrap().applied.is_empty(), "nothing of these was proposed");
}

#[tokio::test]
async fn a_canary_is_signed_for_those_that_it_chooses_and_promoted_as_it_is() {
    use mesh_routing::sign::{PublicKey, Signed};
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let made = bench.run(&["keys", "generate", "--out", "mesh.key", "-o", "json"]).await.ends(0).json();
    let key: PublicKey = made["public_key"].as_str().unwrap().parse().unwrap();
    let digest = mesh_routing::parse("t", TABLE).unwrap().digest();
    let rollout = v1::Rollout { generation: 7, stable_generation: 6, ..v1::Rollout::default() };
    bench.script.set(|state| {
        state.history = v1::GetHistoryResponse { generation: 7, ..v1::GetHistoryResponse::default() };
        state.apply = Some(Ok(v1::ApplyResponse { generation: 8, changed: true, ..v1::ApplyResponse::default() }));
        state.table = Some(in_force(TABLE, 7));
        state.status = vec![v1::GetStatusResponse { rollout: Some(rollout), ..mesh(7, Vec::new()) }];
    });
    let canary = ["--canary", "percent=10,service=pricing", "--max-dead-letters", "5", "--max-refusals", "1"];
    let said = bench.run(&[&["apply", "-f", "routes.yaml", "--sign-key", "mesh.key"][..], &canary].concat()).await.ends(0);
    assert!(said.out.contains("applied generation 8, a canary for service=pricing percent=10"), "{}", said.out);
    let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
    let told = asked.canary.unwrap();
    assert_eq!((&*told.selector, told.max_dead_letters, told.max_refusals), ("service=pricing percent=10", 5, 1));
    let place = Signed { mesh: "shop", channel: "canary service=pricing percent=10", generation: 8, digest: &digest };
    assert!(key.verifies(&place, &asked.signature.unwrap().ed25519));

    let said = bench.run(&["rollout", "promote", "--sign-key", "mesh.key"]).await.ends(0);
    assert!(said.out.contains("applied generation 8, the canary of generation 7, for all"), "{}", said.out);
    let asked = bench.script.0.lock().unwrap().applied.pop().unwrap();
    assert_eq!((asked.promotes, asked.expected_generation, asked.canary), (7, Some(7), None));
    let place = Signed { mesh: "shop", channel: "stable", generation: 8, digest: &digest };
    assert!(key.verifies(&place, &asked.signature.unwrap().ed25519));
    bench.run(&["rollout", "promote", "--generation", "6"]).await.ends(3);
    bench.run(&["rollout", "abort"]).await.ends(1);
    let said = bench.run(&["rollout", "abort", "--generation", "6"]).await.ends(3);
    assert!(said.err.contains("generation 6 is not the canary: generation 7 is"), "{said:?}");
    bench.run(&["rollout", "abort", "--generation", "7"]).await.ends(1);
    let said = bench.run(&["apply", "-f", "routes.yaml", "--canary", "zone=a"]).await.ends(2);
    assert!(said.err.contains("which is none of service=NAME"), "{}", said.err);
}

#[tokio::test]
async fn graph_of_a_file_and_of_the_mesh() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let file = bench.run_with(&["graph", "-f", "routes.yaml"], "http://127.0.0.1:1", "").await.ends(0);
    assert!(file.out.contains("orders") && file.out.contains("price"), "{}", file.out);
    bench.script.set(|state| state.table = Some(in_force(TABLE, 7)));
    assert_eq!(bench.run(&["graph"]).await.ends(0).out, file.out);
    let mermaid = bench.run(&["graph", "--format", "mermaid"]).await.ends(0);
    assert!(mermaid.out.contains("flowchart") || mermaid.out.contains("graph "), "{}", mermaid.out);
    let dot = bench.run(&["graph", "--format", "dot"]).await.ends(0);
    assert!(dot.out.contains("digraph"), "{}", dot.out);

    // As data: the edges, of the mesh and of a file.
    bench.file(
        "cases.yaml",
        &TABLE.replace("to: [priced] }", "to: [priced], cases: [{ status: 202, when: 'true', to: void }], filter: 'true' }"),
    );
    let json = bench.run(&["graph", "-o", "json"]).await.ends(0).json();
    let plain = serde_json::json!({
        "route": "price", "service": "pricing", "from": ["orders"], "to": ["priced"], "cases": [], "otherwise": ["priced"],
        "dead_letter": "price.dlq",
    });
    assert_eq!(json, serde_json::json!({ "mesh": "shop", "generation": 7, "routes": [plain] }));
    let said = bench.run_with(&["graph", "-f", "cases.yaml", "-o", "yaml"], "http://127.0.0.1:1", "").await.ends(0);
    assert_eq!(
        said.out,
        "mesh: shop\ngeneration: 0\nroutes:\n- route: price\n  service: pricing\n  from:\n  - orders\n  filter: \"true\"\n  to:\n  - priced\n  - void\n  \
         cases:\n  - status: 202\n    when: \"true\"\n    to:\n    - void\n  otherwise:\n  - priced\n  dead_letter: price.dlq\n"
    );
}
