//! What operators do to routes, topics and sidecars.

use mesh_proto::v1;

use crate::fake::{Bench, Said, exactly, instance, mesh};

#[tokio::test]
async fn an_absent_sidecar_and_wrong_flags_come_with_hints() {
    let bench = Bench::new().await;
    let said = bench.run_with(&["status"], "http://127.0.0.1:1", "").await.ends(2);
    assert!(said.err.starts_with("error: no sidecar answers at http://127.0.0.1:1: Connection refused"), "{}", said.err);
    assert!(said.err.contains("hint: ") && said.err.contains("MESH_ADMIN") && said.err.contains("listen.admin"), "{}", said.err);

    let said = bench.run(&["--admin", "ftp://x:1", "status"]).await.ends(2);
    assert!(said.err.contains("http://HOST:PORT"), "{}", said.err);
    // The flag is stronger than the environment, and needs no scheme.
    bench.script.set(|state| state.status = vec![mesh(0, vec![instance("a", v1::InstanceState::Synced, 0)])]);
    let said = bench.run_with(&["status", "--admin", &bench.address.to_string()], "http://127.0.0.1:1", "").await.ends(0);
    assert!(said.out.contains("no table applied yet"), "{}", said.out);
    bench.script.set(|state| state.status = vec![mesh(0, vec![instance("a", v1::InstanceState::Cached, 3)])]);
    let said = bench.run(&["status"]).await.ends(0);
    assert!(said.out.contains("its table is not known there yet"), "{}", said.out);

    let said = bench.run(&["--help"]).await.ends(0);
    assert!(said.out.contains("Exit codes:") && said.out.contains("MESH_ADMIN"), "{}", said.out);
}

#[tokio::test]
async fn release_says_how_many_and_who_was_not_reached() {
    let bench = Bench::new().await;
    let said = bench.run(&["release", "price", "--key", "k"]).await.ends(0);
    assert_eq!(said.out, "route price: 1 record released, to be tried again\n");
    let said = bench.run(&["release", "price", "--discard"]).await.ends(4);
    assert_eq!(said.out, "route price: 2 records sent to the dead letters\nnot reached: orders/1: nobody answers\n");
    let json = bench.run(&["release", "price", "--no-key", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["released"], &json["discarded"]), (&1.into(), &false.into()));
    // No time is little time, and not the usual one.
    bench.run(&["release", "price", "--timeout", "0s"]).await.ends(0);
    let waits: Vec<u64> = bench.script.0.lock().unwrap().released.iter().map(|asked| asked.wait_ms).collect();
    assert_eq!(waits, [30_000, 30_000, 30_000, 1]);
}

#[tokio::test]
async fn reset_says_what_it_would_do_and_what_it_did() {
    let bench = Bench::new().await;
    let partition = |number, from, to, again, skipped| v1::PartitionReset {
        topic: "orders".to_owned(),
        partition: number,
        from,
        to,
        high: 20,
        again,
        skipped,
        ..v1::PartitionReset::default()
    };
    let planned = v1::ResetResponse {
        route: "price".to_owned(),
        group: "shop.price".to_owned(),
        partitions: vec![partition(0, Some(12), 2, 10, 0), partition(1, None, 2, 0, 0)],
        executed: false,
    };
    bench.script.set(|state| state.reset = Some(Ok(planned.clone())));
    let said = bench.run(&["reset", "price", "--to-datetime", "2026-11-21 10:00"]).await.ends(0);
    assert_eq!(
        said.out,
        "route price, group shop.price: dry run, nothing is changed\ntime 2026-11-21T10:00:00Z (UTC, since no zone was named)\n\n\
         TOPIC   PARTITION  FROM  TO  OLDEST  END  AGAIN  SKIPPED  NOTE\norders  0          12    2   0       20   10     0\n\
         orders  1          -     2   0       20   0      0\n\n10 records would be delivered again, 0 records would be skipped\n"
    );
    let asked = bench.script.0.lock().unwrap().resets.pop().unwrap();
    assert_eq!((asked.to, asked.execute, asked.wait_ms), (Some(v1::reset_request::To::TimeMs(1_795_255_200_000)), false, 30_000));
    let json = bench.run(&["reset", "price", "--to-earliest", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["partitions"][0]["again"], &json["partitions"][1]["from"]), (&10.into(), &serde_json::Value::Null));

    // Nothing is reset before the copy of the offsets is written.
    bench.run(&["reset", "price", "--shift-by", "-5", "--backup", "/nowhere/file", "--execute"]).await.ends(2);
    assert!(bench.script.0.lock().unwrap().resets.drain(..).all(|asked| !asked.execute));

    for (change, code, said) in [
        (v1::PartitionReset { refused: "the range is 0 to 20".to_owned(), ..v1::PartitionReset::default() }, 1, "the range is 0 to 20"),
        (
            v1::PartitionReset { failed: "no answer from b".to_owned(), unclear: true, ..v1::PartitionReset::default() },
            4,
            "no answer from b",
        ),
        (v1::PartitionReset { failed: "busy".to_owned(), ..v1::PartitionReset::default() }, 1, "busy"),
    ] {
        let response = v1::ResetResponse { partitions: vec![change], executed: true, ..planned.clone() };
        bench.script.set(|state| state.reset = Some(Ok(response)));
        let output = bench.run(&["reset", "price", "--to-offset", "0=1,1=2", "--execute"]).await.ends(code);
        assert!(output.err.contains(said), "{}", output.err);
    }
    let asked = bench.script.0.lock().unwrap().resets.pop().unwrap();
    assert!(asked.execute && matches!(asked.to, Some(v1::reset_request::To::Offsets(offsets)) if offsets.offsets.len() == 2));
}

#[tokio::test]
async fn topics_are_columns_and_what_is_refused_has_its_code() {
    let bench = Bench::new().await;
    let said = bench.run(&["topics", "list"]).await.ends(0);
    assert_eq!(
        said.out,
        "TOPIC   PARTITIONS  REPLICATION  RECORDS  SIZE     USED BY\norders  12          3            48211    -        price from\n\
         other   1           0            -        2.0 KiB\n"
    );
    assert!(said.err.contains("1 topic"), "{said:?}");
    let said = bench.run(&["topics", "describe", "order"]).await.ends(2);
    assert!(said.err.contains("did you mean orders?"), "{said:?}");
    bench.run(&["topics", "create", "orders"]).await.ends(1);
    let said = bench.run(&["topics", "alter", "orders", "--partitions", "24"]).await.ends(0);
    assert_eq!((&*said.out, said.err.trim()), ("~ orders: partitions: 12 → 24\n", "warning: keys move"));
    bench.run(&["topics", "alter", "orders"]).await.ends(2);
    let said = bench.run(&["topics", "delete", "a", "b"]).await.ends(0);
    assert!(said.out.ends_with("preview: nothing is deleted; --execute does it, for good\n"), "{said:?}");
    let said = bench.run(&["topics", "delete", "a", "b", "--execute"]).await.ends(0);
    assert!(said.out.ends_with("2 topics deleted\n"), "{said:?}");
    bench.run(&["lag", "nobody"]).await.ends(2);
    bench.run(&["lag", "--count", "3"]).await.ends(2);
}

#[tokio::test]
async fn shells_and_man_know_every_command() {
    let bench = Bench::new().await;
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let said = bench.run(&["completion", shell]).await.ends(0);
        assert!(["tail", "produce", "redrive", "describe"].iter().all(|command| said.out.contains(command)), "{shell}");
    }
    bench.run(&["completion", "dos"]).await.ends(2);
    bench.run(&["man", "pages/man1"]).await.ends(0);
    for page in ["mesh-ctl.1", "mesh-ctl-tail.1", "mesh-ctl-topics-alter.1"] {
        let text = std::fs::read_to_string(bench.folder.path().join("pages/man1").join(page)).unwrap();
        assert!(text.contains(".TH"), "{page}");
    }
}

#[tokio::test]
async fn a_drain_is_shown_then_done_and_waited_for() {
    let bench = Bench::new().await;
    let route = |partitions| v1::RouteStatus {
        route: "price".into(),
        service: "pricing".into(),
        state: v1::RouteState::Running.into(),
        partitions,
        ..v1::RouteStatus::default()
    };
    let with = |name: &str| v1::InstanceStatus { routes: vec![route(2)], ..instance(name, v1::InstanceState::Synced, 1) };
    let status = |names: &[&str]| v1::GetStatusResponse { instance: "a".into(), ..mesh(1, names.iter().map(|name| with(name)).collect()) };
    bench.script.set(|state| state.status = vec![status(&["a", "b", "silent"])]);

    let said = bench.run(&["drain", "b"]).await.ends(0);
    assert_eq!(
        said.out,
        "instance b: 0 deliveries at its services\nROUTE  SERVICE  PARTITIONS  LAG  IN FLIGHT  TAKEN OVER BY\n\
         price  pricing  2           0    0          a, silent\npreview: nothing is drained; --execute does it\n"
    );
    assert!(bench.script.0.lock().unwrap().drained.is_empty(), "a preview asks for nothing");
    let said = bench.run(&["drain", "c", "--execute"]).await.ends(2);
    assert!(said.err.contains("there is no instance c in mesh shop") && said.err.contains("there are: a, b, silent"), "{said:?}");
    bench.run(&["drain", "silent", "--execute"]).await.ends(4);
    bench.run(&["drain", "b", "--no-wait", "--wait", "1s"]).await.ends(2);

    // It is done when it has left the list; until then it drains.
    bench.script.set(|state| state.status = vec![status(&["a", "b"]), status(&["a", "b"]), status(&["a"])]);
    let said = bench.run(&["drain", "b", "--execute", "-o", "json"]).await.ends(0).json();
    assert_eq!((&said["executed"], &said["ended"], &said["in_flight"]), (&true.into(), &true.into(), &2.into()));
    assert_eq!(said["routes"][0]["others"], serde_json::json!(["a"]));
    bench.script.set(|state| state.status = vec![status(&["a", "b"])]);
    let said = bench.run(&["drain", "b", "--execute", "--wait", "300ms"]).await.ends(4);
    assert!(said.err.contains("b has not ended within"), "{said:?}");
    let said = bench.run(&["drain", "--execute", "--no-wait"]).await.ends(0);
    assert_eq!(said.out, "instance a drains: 2 deliveries at its services when it began\n");
    assert_eq!(bench.script.0.lock().unwrap().drained.last().unwrap().instance, "a", "without a name it is the one that answers");
}

#[tokio::test]
async fn the_doctor_ends_with_one_when_something_does_not_work() {
    let bench = Bench::new().await;
    let finding = |severity: v1::Severity| v1::Finding {
        severity: severity.into(),
        check: "routes".into(),
        subject: "price".into(),
        what: "it waits".into(),
        fix: "start it".into(),
    };
    let findings = |all: &[v1::Severity]| v1::DiagnoseResponse {
        mesh: "shop".into(),
        instance: "a".into(),
        findings: all.iter().map(|severity| finding(*severity)).collect(),
    };
    bench.script.set(|state| state.findings = findings(&[v1::Severity::Warning, v1::Severity::Ok]));
    let said = bench.run(&["doctor"]).await.ends(0);
    assert!(said.out.ends_with("\n0 errors, 1 warning\n") && said.err.is_empty(), "{said:?}");
    bench.script.set(|state| state.findings = findings(&[v1::Severity::Error]));
    let said = bench.run(&["doctor", "-o", "json"]).await.ends(1).json();
    assert_eq!(
        (&said["errors"], &said["findings"][0]["severity"], &said["findings"][0]["fix"]),
        (&1.into(), &"error".into(), &"start it".into())
    );
    assert_eq!(bench.run(&["-q", "doctor"]).await.ends(1).out.lines().count(), 2);
}

#[tokio::test]
async fn what_is_printed_of_topics_that_are_made_and_deleted() {
    let bench = Bench::new().await;
    exactly(&bench.run(&["topics", "create", "fresh", "--partitions", "3"]).await, 0, "created fresh with 3 partitions\n", "");
    exactly(
        &bench.run(&["topics", "create", "fresh", "-o", "yaml"]).await,
        0,
        "\
created: true
partitions: 1
topic: fresh
",
        "",
    );
    exactly(&bench.run(&["topics", "create", "orders"]).await, 1, "", "error: topic orders exists, with 12 partitions\n");
    exactly(
        &bench.run(&["topics", "delete", "a", "b"]).await,
        0,
        "\
TOPIC  PARTITIONS  REPLICATION  RECORDS  SIZE  USED BY
a      1           0            -        -
b      1           0            -        -
preview: nothing is deleted; --execute does it, for good
",
        "",
    );
    exactly(
        &bench.run(&["topics", "delete", "a", "--execute"]).await,
        0,
        "\
TOPIC  PARTITIONS  REPLICATION  RECORDS  SIZE  USED BY
a      1           0            -        -
1 topic deleted
",
        "",
    );
    exactly(
        &bench.run(&["topics", "delete", "a", "-o", "json"]).await,
        0,
        r#"{
  "executed": false,
  "topics": [
    {
      "bytes": null,
      "partitions": 1,
      "records": null,
      "replication": 0,
      "topic": "a",
      "uses": []
    }
  ]
}
"#,
        "",
    );
}

#[tokio::test]
async fn what_a_reset_that_was_carried_out_prints() {
    let bench = Bench::new().await;
    let partition = |number, by: &str, failed: &str| v1::PartitionReset {
        topic: "orders".to_owned(),
        partition: number,
        from: Some(12),
        to: 2,
        high: 20,
        again: 10,
        done_by: by.to_owned(),
        failed: failed.to_owned(),
        ..v1::PartitionReset::default()
    };
    let done = v1::ResetResponse {
        route: "price".to_owned(),
        group: "shop.price".to_owned(),
        partitions: vec![partition(0, "a", ""), partition(1, "b", "")],
        executed: true,
    };
    bench.script.set(|state| state.reset = Some(Ok(done.clone())));
    let reset = ["reset", "price", "--to-datetime", "2026-11-21T10:00:00Z", "--execute"];
    exactly(
        &bench.run(&reset).await,
        0,
        "\
route price, group shop.price: reset
time 2026-11-21T10:00:00Z (UTC, from the zone that was named)

TOPIC   PARTITION  FROM  TO  OLDEST  END  AGAIN  SKIPPED  NOTE
orders  0          12    2   0       20   10     0        done by a
orders  1          12    2   0       20   10     0        done by b

20 records delivered again, 0 records skipped
",
        "",
    );
    exactly(
        &bench.run(&[&reset[..], &["-o", "json"]].concat()).await,
        0,
        r#"{
  "route": "price",
  "group": "shop.price",
  "executed": true,
  "time": "2026-11-21T10:00:00Z (UTC, from the zone that was named)",
  "partitions": [
    {
      "topic": "orders",
      "partition": 0,
      "from": 12,
      "to": 2,
      "low": 0,
      "high": 20,
      "again": 10,
      "skipped": 0,
      "refused": "",
      "done_by": "a",
      "failed": "",
      "unclear": false
    },
    {
      "topic": "orders",
      "partition": 1,
      "from": 12,
      "to": 2,
      "low": 0,
      "high": 20,
      "again": 10,
      "skipped": 0,
      "refused": "",
      "done_by": "b",
      "failed": "",
      "unclear": false
    }
  ]
}
"#,
        "",
    );
    // One of two failed.
    let half = v1::ResetResponse { partitions: vec![partition(0, "a", ""), partition(1, "", "no answer from b")], ..done };
    bench.script.set(|state| state.reset = Some(Ok(half)));
    exactly(
        &bench.run(&reset).await,
        1,
        "\
route price, group shop.price: reset
time 2026-11-21T10:00:00Z (UTC, from the zone that was named)

TOPIC   PARTITION  FROM  TO  OLDEST  END  AGAIN  SKIPPED  NOTE
orders  0          12    2   0       20   10     0        done by a
orders  1          12    2   0       20   10     0        FAILED: no answer from b

10 records delivered again, 0 records skipped
",
        "\
error: 1 partition not reset: orders/1: no answer from b
hint: the others are; the same command may be given again, --timeout gives more time
",
    );
}

#[tokio::test]
async fn what_keys_generate_prints() {
    let bench = Bench::new().await;
    let said = bench.run(&["keys", "generate", "--out", "mesh.key"]).await;
    // A key is another one each time: its name and its text are put for what is drawn.
    let words: Vec<&str> = said.out.split_whitespace().collect();
    let [.., id, _, _, public, _, _, _] = words[..] else { panic!("{said:?}") };
    assert!(id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{said:?}");
    let out = said.out.replace(public, "PUBLIC").replace(id, "ID");
    exactly(
        &Said { out, ..said },
        0,
        "\
key id       ID
public key   PUBLIC
private key  mesh.key
",
        "keep the file secret; the public key belongs into `control.trusted_keys` of every sidecar's config\n",
    );
}
