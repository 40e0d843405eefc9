//! What is printed of tables, to the letter: whoever reads it, or cuts it up, meets what is written here.

use mesh_proto::v1;

use crate::{
    FAULTY, TABLE,
    fake::{Bench, exactly, in_force, instance, mesh},
};

/// A table with everything that a graph shows.
const DRAWN: &str = "\
apiVersion: mesh/v1
kind: RoutingTable
metadata: { mesh: shop }
spec:
  topics: { orders: { partitions: 3 } }
  routes:
  - name: price
    service: pricing
    from: [orders, returns]
    handler: /price
    to: [priced]
    filter: record.json.n > 1
    cases: [{ status: 202, to: [manual] }, { when: 'reply.status == 203', to: void }]
  - { name: mail, service: mailer, from: [priced], handler: /mail, to: void, dead_letter: lost }
";

#[tokio::test]
async fn what_validate_prints() {
    let bench = Bench::new().await;
    bench.file("good.yaml", TABLE);
    bench.file("bad.yaml", FAULTY);
    bench.file("loop.yaml", &format!("{TABLE}  - {{ name: again, service: pricing, from: [priced], handler: /again, to: [orders] }}\n"));
    exactly(
        &bench.run(&["validate", "-f", "good.yaml"]).await,
        0,
        "good.yaml: valid, 1 route, sha256:e0b0ff28fb9166cf5776ec5b2420154f8ebc217511bdceb1679aea024afc5520\n",
        "",
    );
    exactly(
        &bench.run(&["validate", "-f", "bad.yaml"]).await,
        1,
        "\
bad.yaml:6:5: error[missing]: spec.routes[0].service: `service` is missing
  hint: name the service that gets the records
bad.yaml:6:20: error[unknown_field]: spec.routes[0].servise: unknown field `servise`
  hint: did you mean `service`?
bad.yaml:7:5: error[missing]: spec.routes[1].to: `to` is missing
  hint: name the destination topics, or `void` to forward nothing
bad.yaml:7:7: error[duplicate]: spec.routes[1].name: `price` is also the name of spec.routes[0]
  hint: names are unique in a table
bad.yaml:7:45: error[name]: spec.routes[1].from[0]: `__own` begins with `__`
  hint: such topics belong to the broker and the mesh
bad.yaml: not valid, 5 faults
",
        "",
    );
    exactly(
        &bench.run(&["validate", "-f", "loop.yaml"]).await,
        0,
        "\
loop.yaml: warning[loop]: spec.routes[1].to: a loop: again → price → again
  hint: make sure that some answer ends it: an ignored status, a case or a filter
loop.yaml: valid, 2 routes, 1 warning, sha256:69f9bb611a34edd0e55ea60519079b3dc39a258c2f5346e369fa5dc72b96ee0e
",
        "",
    );
    exactly(
        &bench.run(&["validate", "-f", "loop.yaml", "bad.yaml", "-o", "yaml"]).await,
        1,
        r#"- file: loop.yaml
  valid: true
  routes: 2
  digest: sha256:69f9bb611a34edd0e55ea60519079b3dc39a258c2f5346e369fa5dc72b96ee0e
  faults: []
  warnings:
  - file: loop.yaml
    line: 0
    column: 0
    field: spec.routes[1].to
    message: "a loop: again → price → again"
    hint: "make sure that some answer ends it: an ignored status, a case or a filter"
    code: loop
- file: bad.yaml
  valid: false
  routes: 0
  digest: ""
  faults:
  - file: bad.yaml
    line: 6
    column: 5
    field: spec.routes[0].service
    message: "`service` is missing"
    hint: name the service that gets the records
    code: missing
  - file: bad.yaml
    line: 6
    column: 20
    field: spec.routes[0].servise
    message: unknown field `servise`
    hint: did you mean `service`?
    code: unknown_field
  - file: bad.yaml
    line: 7
    column: 5
    field: spec.routes[1].to
    message: "`to` is missing"
    hint: name the destination topics, or `void` to forward nothing
    code: missing
  - file: bad.yaml
    line: 7
    column: 7
    field: spec.routes[1].name
    message: "`price` is also the name of spec.routes[0]"
    hint: names are unique in a table
    code: duplicate
  - file: bad.yaml
    line: 7
    column: 45
    field: spec.routes[1].from[0]
    message: "`__own` begins with `__`"
    hint: such topics belong to the broker and the mesh
    code: name
  warnings: []
"#,
        "",
    );
}

#[tokio::test]
async fn what_graph_draws() {
    let bench = Bench::new().await;
    bench.script.set(|state| state.table = Some(in_force(DRAWN, 7)));
    exactly(
        &bench.run(&["graph"]).await,
        0,
        "\
mesh shop

price (pricing)
  from orders
  from returns
  if   record.json.n > 1
  to   priced
  to   manual  [202]
  to   void  [when reply.status == 203]
  dead price.dlq

mail (mailer)
  from priced
  to   void
  dead lost
",
        "",
    );
    exactly(
        &bench.run(&["graph", "--format", "mermaid"]).await,
        0,
        r#"flowchart LR
  t0[("lost")]
  t1[("manual")]
  t2[("orders")]
  t3[("price.dlq")]
  t4[("priced")]
  t5[("returns")]
  t6[("void")]
  r0["price (pricing)"]
  t2 --> r0
  t5 --> r0
  r0 --> t4
  r0 -->|"202"| t1
  r0 -->|"when reply.status == 203"| t6
  r0 -.-> t3
  r1["mail (mailer)"]
  t4 --> r1
  r1 --> t6
  r1 -.-> t0
"#,
        "",
    );
    exactly(
        &bench.run(&["graph", "--format", "dot"]).await,
        0,
        r#"digraph "shop" {
  rankdir=LR;
  "route price" [shape=box, label="price\npricing"];
  "orders" -> "route price";
  "returns" -> "route price";
  "route price" -> "priced";
  "route price" -> "manual" [label="202"];
  "route price" -> "void" [label="when reply.status == 203"];
  "route price" -> "price.dlq" [style=dashed];
  "route mail" [shape=box, label="mail\nmailer"];
  "priced" -> "route mail";
  "route mail" -> "void";
  "route mail" -> "lost" [style=dashed];
}
"#,
        "",
    );
}

#[tokio::test]
async fn what_get_prints() {
    let bench = Bench::new().await;
    let signature = Some(v1::TableSignature { key_id: "0a1b2c3d4e5f6071".to_owned(), ed25519: vec![0; 64].into() });
    let entry = Some(v1::Generation { applied_by: "ann@desk".to_owned(), signature, ..v1::Generation::default() });
    bench.script.set(|state| state.table = Some(v1::GetTableResponse { entry, ..in_force(DRAWN, 7) }));
    exactly(&bench.run(&["get"]).await, 0, "\
# generation 7, applied 2023-11-14T22:13:20Z by ann@desk, signed by key 0a1b2c3d4e5f6071, sha256:4eae55c3a3ed89cee340e151a0cedc7c6fbd9f216b71a938b3b7b343277feb09
apiVersion: mesh/v1
kind: RoutingTable
metadata:
  mesh: shop
spec:
  topics:
    orders:
      partitions: 3
  routes:
  - name: price
    service: pricing
    from:
    - orders
    - returns
    handler: /price
    to:
    - priced
    cases:
    - status: 202
      to:
      - manual
    - when: reply.status == 203
      to: void
    filter: record.json.n > 1
  - name: mail
    service: mailer
    from:
    - priced
    handler: /mail
    to: void
    dead_letter: lost
", "");
}

#[tokio::test]
async fn what_is_printed_of_tables_that_are_applied() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let response = v1::ApplyResponse {
        generation: 8,
        digest: "sha256:8".to_owned(),
        changed: true,
        changes: vec!["~ routes.price.to: [\"priced\"] → \"void\"".to_owned(), "- routes.mail".to_owned()],
        new_routes: vec![v1::RouteBacklog { route: "price".to_owned(), records: 1 }],
        ..v1::ApplyResponse::default()
    };
    let canary = instance("b", v1::InstanceState::Pending, 6);
    let rollout = v1::Rollout { generation: 7, stable_generation: 6, ..v1::Rollout::default() };
    bench.script.set(|state| {
        state.history = v1::GetHistoryResponse { generation: 7, ..v1::GetHistoryResponse::default() };
        state.table = Some(in_force(TABLE, 5));
        state.apply = Some(Ok(response));
        let instances = vec![v1::InstanceStatus { target_generation: 7, ..canary }];
        state.status = vec![v1::GetStatusResponse { rollout: Some(rollout), ..mesh(7, instances) }];
    });
    exactly(
        &bench.run(&["rollback", "5"]).await,
        0,
        r#"~ routes.price.to: ["priced"] → "void"
- routes.mail
route price begins with 1 existing record
applied generation 8, the content of generation 5 (sha256:8)
"#,
        "",
    );
    exactly(
        &bench.run(&["rollback", "5", "-o", "yaml"]).await,
        0,
        r#"generation: 8
digest: sha256:8
changed: true
dry_run: false
signed_by: null
rollback_to: 5
canary: null
promotes: null
changes:
- "~ routes.price.to: [\"priced\"] → \"void\""
- "- routes.mail"
new_routes:
- route: price
  records: 1
warnings: []
faults: []
"#,
        "",
    );
    exactly(
        &bench.run(&["apply", "-f", "routes.yaml", "--canary", "percent=10,service=pricing"]).await,
        0,
        r#"~ routes.price.to: ["priced"] → "void"
- routes.mail
route price begins with 1 existing record
applied generation 8, a canary for service=pricing percent=10 (sha256:8)
"#,
        "",
    );
    exactly(
        &bench.run(&["apply", "-f", "routes.yaml", "--canary", "percent=10", "-o", "json"]).await,
        0,
        r#"{
  "generation": 8,
  "digest": "sha256:8",
  "changed": true,
  "dry_run": false,
  "signed_by": null,
  "rollback_to": null,
  "canary": "percent=10",
  "promotes": null,
  "changes": [
    "~ routes.price.to: [\"priced\"] → \"void\"",
    "- routes.mail"
  ],
  "new_routes": [
    {
      "route": "price",
      "records": 1
    }
  ],
  "warnings": [],
  "faults": []
}
"#,
        "",
    );
    exactly(
        &bench.run(&["rollout", "promote"]).await,
        0,
        r#"~ routes.price.to: ["priced"] → "void"
- routes.mail
route price begins with 1 existing record
applied generation 8, the canary of generation 7, for all (sha256:8)
"#,
        "not run yet by 1 instance of the canary\n",
    );
    exactly(
        &bench.run(&["rollout", "promote", "-o", "json"]).await,
        0,
        r#"{
  "generation": 8,
  "digest": "sha256:8",
  "changed": true,
  "dry_run": false,
  "signed_by": null,
  "rollback_to": null,
  "canary": null,
  "promotes": 7,
  "changes": [
    "~ routes.price.to: [\"priced\"] → \"void\"",
    "- routes.mail"
  ],
  "new_routes": [
    {
      "route": "price",
      "records": 1
    }
  ],
  "warnings": [],
  "faults": []
}
"#,
        "not run yet by 1 instance of the canary\n",
    );
}
