//! Records: what would become of them, what did, and dead letters.

use mesh_proto::v1;
use tonic::Status;

use crate::{TABLE, fake::Bench};

#[tokio::test]
async fn plan_tells_by_its_code_whether_anything_would_change() {
    let bench = Bench::new().await;
    bench.file("routes.yaml", TABLE);
    let route = |change: v1::RouteChange, changed| v1::RoutePlan {
        route: "price".to_owned(),
        change: change.into(),
        changed,
        ..Default::default()
    };
    let planned = |route| {
        let result = v1::PlanResult { generation: 3, routes: vec![route], ..Default::default() };
        vec![
            v1::PlanProgress { read: 1, in_range: 2, ..Default::default() },
            v1::PlanProgress { finished: true, result: Some(result), ..Default::default() },
        ]
    };
    bench.script.set(|state| state.plan = planned(route(v1::RouteChange::Changed, 0)));
    let said = bench.run(&["plan", "-f", "routes.yaml", "--records", "7", "--route", "price"]).await.ends(0);
    assert!(said.out.contains("beside generation 3") && said.err.is_empty(), "{said:?}");
    let asked = bench.script.0.lock().unwrap().planned.pop().unwrap();
    assert_eq!((asked.last_records, asked.since_ms, &*asked.route, asked.samples), (7, None, "price", 5));
    assert_eq!(asked.table.unwrap().file, "routes.yaml");
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64;
    bench.run(&["plan", "-f", "routes.yaml"]).await.ends(0);
    let since = bench.script.0.lock().unwrap().planned.pop().unwrap().since_ms.unwrap();
    assert!((before - 600_000 - since).abs() < 60_000, "ten minutes, where nothing is said");

    bench.script.set(|state| state.plan = planned(route(v1::RouteChange::Changed, 1)));
    let json = bench.run(&["plan", "-f", "routes.yaml", "-o", "json"]).await.ends(1).json();
    assert_eq!((&json["changes"], &json["routes"][0]["change"], &json["generation"]), (&true.into(), &"changed".into(), &3.into()));
    bench.script.set(|state| state.plan = planned(route(v1::RouteChange::Removed, 0)));
    bench.run(&["plan", "-f", "routes.yaml"]).await.ends(1);

    let fault = v1::Fault {
        file: "routes.yaml".to_owned(),
        line: 6,
        column: 5,
        message: "no".to_owned(),
        code: "value".to_owned(),
        ..Default::default()
    };
    bench.script.set(|state| state.plan = vec![v1::PlanProgress { finished: true, faults: vec![fault], ..Default::default() }]);
    let said = bench.run(&["plan", "-f", "routes.yaml"]).await.ends(1);
    assert!(
        said.out.is_empty() && said.err.contains("routes.yaml:6:5: error[value]: no") && said.err.contains("nothing was read"),
        "{said:?}"
    );
    // A sidecar that goes away has not planned.
    bench.script.set(|state| state.plan = Vec::new());
    bench.run(&["plan", "-f", "routes.yaml"]).await.ends(2);
    bench.run(&["plan", "-f", "routes.yaml", "--last", "1h", "--records", "3"]).await.ends(2);
    bench.run(&["plan", "-f", "absent.yaml"]).await.ends(2);
}

#[tokio::test]
async fn explain_and_trace_show_what_was_found() {
    let bench = Bench::new().await;
    let said = bench.run(&["explain", "nope/0/1"]).await.ends(2);
    assert!(said.err.contains("there is no topic nope"), "{said:?}");
    bench.run(&["explain", "orders/1"]).await.ends(2);
    let at = |topic: &str, offset| Some(v1::Position { topic: topic.to_owned(), partition: 1, offset });
    let flow =
        v1::FlowRecord { position: at("orders", 5), mesh_id: "a".to_owned(), kind: v1::FlowKind::Published.into(), ..Default::default() };
    let reply = v1::FlowRecord {
        position: at("priced", 2),
        source: at("orders", 5),
        kind: v1::FlowKind::Reply.into(),
        route: "price".to_owned(),
        ..Default::default()
    };
    let explained = v1::ExplainResponse { flow: Some(flow.clone()), found: vec![reply.clone()], ..Default::default() };
    bench.script.set(|state| state.explained = Some(explained));
    let said = bench.run(&["explain", "orders/1/5"]).await.ends(0);
    assert!(said.out.starts_with("orders/1/5  published") && said.out.contains("priced/1/2  reply of price"), "{said:?}");
    let json = bench.run(&["explain", "orders/1/5", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["record"]["mesh_id"], &json["record"]["made"][0]["route"]), (&"a".into(), &"price".into()));

    let said = bench.run(&["trace", "a"]).await.ends(1);
    assert!(said.out.is_empty() && said.err.contains("no such record"), "{said:?}");
    bench.script.set(|state| state.flow = v1::TraceResponse { records: vec![flow, reply], ..Default::default() });
    let said = bench.run(&["trace", "a", "--last", "2h"]).await.ends(0);
    assert!(said.out.starts_with("orders/1/5  published") && said.out.contains("\n└─ priced/1/2  reply of price"), "{said:?}");
    let json = bench.run(&["trace", "a", "--from", "2026-11-21", "-o", "json"]).await.ends(0).json();
    assert_eq!((&json["records"], &json["flow"][0]["made"][0]["topic"]), (&2.into(), &"priced".into()));
    let asked: Vec<i64> = bench.script.0.lock().unwrap().traced.iter().map(|asked| asked.since_ms).collect();
    assert!(asked[1] < asked[0] && asked[2] == 1_795_219_200_000, "{asked:?}");
    bench.run(&["trace"]).await.ends(2);
}

#[tokio::test]
async fn records_are_lines_and_a_cut_is_told() {
    let bench = Bench::new().await;
    let said = bench.run(&["tail", "orders", "--from", "3"]).await.ends(0);
    assert_eq!(said.out, "0/5  2026-11-21T10:00:00.000Z  -  {\"n\":1}\n0/6  2026-11-21T10:00:00.000Z  -  text\n");
    assert!(
        said.err.contains("offset 3 does not exist any more: it begins at 5") && said.err.contains("2 records, 1 filtered out"),
        "{said:?}"
    );
    let said = bench.run(&["tail", "orders", "-o", "json", "-q"]).await.ends(0);
    assert_eq!(
        said.out.lines().next().unwrap(),
        "{\"topic\":\"orders\",\"partition\":0,\"offset\":5,\"timestamp\":1795255200000,\"key\":null,\"value\":{\"json\":{ \"n\": 1 }},\"headers\":[]}"
    );
    assert_eq!(said.err, "");
    let said = bench.run(&["tail", "orders", "-f", "-o", "yaml"]).await.ends(4);
    assert!(said.out.contains("---\n") && said.err.contains("the sidecar shuts down: 2 records printed"), "{said:?}");
    for wrong in [&["tail"][..], &["tail", "a", "--from", "soon"], &["tail", "a", "--limit", "0"], &["tail", "a", "--partition", "-1"]] {
        bench.run(wrong).await.ends(2);
    }
}

#[tokio::test]
async fn what_became_of_published_records_is_told() {
    let bench = Bench::new().await;
    let admin = format!("http://{}", bench.address);
    let said = bench.run(&["produce", "orders", "--value", "x"]).await.ends(0);
    assert_eq!(said.out, "stored orders/1/7  id\n");
    let said = bench.run_with(&["produce", "orders"], &admin, "all of it").await.ends(0);
    assert_eq!(said.out, "stored orders/1/7  id\n");
    let said = bench.run_with(&["produce", "orders", "--lines"], &admin, "a\n\nmaybe\nb\n").await.ends(4);
    assert_eq!(
        (&*said.out, said.err.trim()),
        ("2 records stored, 1 not known to be stored\n", "line 3: not known to be stored: publish-timeout: no answer")
    );
    let said = bench.run_with(&["produce", "--json"], &admin, "{\"topic\":\"a\",\"value\":1}\n{\"value\":2}\n").await.ends(1);
    assert!(
        said.out == "1 record stored, 1 refused\n" && said.err.contains("line 2: refused: bad-record: it names no `topic`"),
        "{said:?}"
    );
    let said = bench.run_with(&["produce", "orders", "--lines"], &admin, "a\ngo\n").await.ends(4);
    assert!(said.err.contains("gone") && said.err.contains("whether they are stored"), "{said:?}");
    let said = bench.run_with(&["produce", "orders", "--lines", "-o", "json"], &admin, "").await.ends(0);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&said.out).unwrap()["stored"], 0);
    for wrong in [
        &["produce", "--value", "x"][..],
        &["produce", "a", "--value", "x", "--tombstone"],
        &["produce", "a", "--value", "x", "--header", "x"],
    ] {
        bench.run(wrong).await.ends(2);
    }
}

#[tokio::test]
async fn dead_letters_are_counted_shown_sent_back_and_deleted() {
    let bench = Bench::new().await;
    for wrong in [&["dlq", "list"][..], &["dlq", "show", "price"], &["dlq", "redrive", "price"], &["dlq", "purge", "price", "--all"]] {
        let said = bench.run(wrong).await.ends(2);
        assert!(said.err.contains("there is no such route"), "{said:?}");
    }
    let count = |route: &str, letters, redriven| v1::DeadLetterCount {
        route: route.into(),
        topic: format!("{route}.dlq"),
        letters,
        redriven,
        reasons: if letters > 0 { [("status".to_owned(), 1), ("attempts".to_owned(), letters - 1)].into() } else { Default::default() },
        oldest_ms: 1_795_255_201_000,
        newest_ms: 1_795_255_452_000,
    };
    let letter = v1::DeadLetter {
        record: Some(v1::Record {
            key: Some("order-1".into()),
            value: Some("{\"n\":1}".into()),
            headers: vec![v1::Header { name: "source".into(), value: Some("web".into()) }],
            content_type: "application/json".into(),
            mesh_id: "id-1".into(),
            ..v1::Record::default()
        }),
        position: Some(v1::Position { topic: "price.dlq".into(), partition: 3, offset: 1042 }),
        writer: "price".into(),
        route: "price".into(),
        reason: "attempts".into(),
        detail: "503:\nbusy".into(),
        attempts: 10,
        topic: "orders".into(),
        partition: Some(3),
        offset: Some(7),
        timestamp_ms: Some(1_795_255_200_000),
        time_ms: 1_795_255_201_000,
        redriven: false,
        cut: String::new(),
    };
    let binary = v1::DeadLetter {
        record: Some(v1::Record { value: Some(vec![0xff, 0].into()), ..v1::Record::default() }),
        position: Some(v1::Position { topic: "price.dlq".into(), partition: 0, offset: 1 }),
        attempts: 0,
        partition: None,
        offset: None,
        redriven: true,
        ..letter.clone()
    };
    bench.script.set(|state| {
        state.counts = Some(v1::ListDeadLettersResponse { counts: vec![count("mail", 0, 0), count("price", 40, 2)], complete: false });
        state.letters = Some(vec![letter.clone(), binary]);
    });

    let said = bench.run(&["dlq", "list"]).await.ends(0);
    assert_eq!(
        said.out,
        "ROUTE  TOPIC      LETTERS  REDRIVEN  OLDEST                NEWEST                REASONS\n\
         mail   mail.dlq   0        0         -                     -\n\
         price  price.dlq  40       2         2026-11-21T10:00:01Z  2026-11-21T10:04:12Z  attempts 39, status 1\n"
    );
    assert_eq!(said.err, "there are more: only the first million was counted\n");
    let json = bench.run(&["dlq", "list", "-o", "json"]).await.ends(0).json();
    let price = serde_json::json!({
        "route": "price", "topic": "price.dlq", "letters": 40, "redriven": 2, "reasons": { "attempts": 39, "status": 1 },
        "oldest_ms": 1_795_255_201_000_i64, "newest_ms": 1_795_255_452_000_i64,
    });
    assert_eq!((&json[1], &json[0]["oldest_ms"]), (&price, &serde_json::Value::Null));

    let shown = "3/1042  2026-11-21T10:00:01Z\n  reason  attempts after 10 attempts: 503: busy\n  origin  orders/3/7\n  id      id-1\n  \
                          key     order-1\n  value   {\"n\":1}\n";
    let said = bench.run(&["dlq", "show", "price"]).await.ends(0);
    assert_eq!(
        said.out,
        format!(
            "{shown}0/1  2026-11-21T10:00:01Z, redriven already\n  reason  attempts: 503: busy\n  origin  orders/?/?\n  id      \n  \
             key     -\n  value   (2 bytes of binary data; -o json shows them)\n"
        )
    );
    assert_eq!(said.err, "2 letters shown\n");
    let said = bench.run(&["dlq", "show", "price", "-o", "json"]).await.ends(0);
    let lines: Vec<serde_json::Value> = said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let first = serde_json::json!({
        "place": { "topic": "price.dlq", "partition": 3, "offset": 1042 },
        "writer": "price", "route": "price", "reason": "attempts", "detail": "503:\nbusy", "attempts": 10, "time_ms": 1_795_255_201_000_i64,
        "redriven": false, "cut": null,
        "origin": { "topic": "orders", "partition": 3, "offset": 7, "timestamp_ms": 1_795_255_200_000_i64 },
        "mesh_id": "id-1", "content_type": "application/json", "key": "order-1", "value": "{\"n\":1}",
        "headers": [{ "name": "source", "value": "web" }],
    });
    assert_eq!((lines.len(), &lines[0], &lines[1]["value_base64"]), (2, &first, &"/wA=".into()));

    let progress = v1::RedriveProgress {
        topic: "price.dlq".into(),
        matched: 3,
        redriven: 1,
        already: 1,
        refused: 0,
        samples: vec![letter],
        finished: true,
        ..v1::RedriveProgress::default()
    };
    bench.script.set(|state| state.redrive = Some(vec![Ok(progress.clone())]));
    let said = bench.run(&["dlq", "redrive", "price"]).await.ends(0);
    assert_eq!(
        said.out,
        format!(
            "price.dlq: 3 letters meant, 1 would be sent back to price, 1 sent back before, 0 refused\n{shown}\
             preview: nothing is sent; --execute does it\n"
        )
    );
    let done = v1::RedriveProgress {
        executed: true,
        refused: 1,
        refusals: vec!["0/1: its topic is gone".into()],
        samples: Vec::new(),
        ..progress.clone()
    };
    let going = v1::RedriveProgress { finished: false, ..done.clone() };
    bench.script.set(|state| state.redrive = Some(vec![Ok(going.clone()), Ok(done)]));
    let said = bench.run(&["dlq", "redrive", "price", "--every-route", "--execute"]).await.ends(1);
    assert_eq!(
        said.out,
        "price.dlq: 3 letters meant, 1 sent back to every route of their topic, 1 sent back before, 1 refused\nrefused: 0/1: its topic is gone\n"
    );
    let json = bench.run(&["dlq", "redrive", "price", "--execute", "-o", "json"]).await.ends(1).json();
    let expected = serde_json::json!({
        "topic": "price.dlq", "matched": 3, "redriven": 1, "already": 1, "refused": 1, "refusals": ["0/1: its topic is gone"],
        "executed": true, "samples": [], "cut": 0, "cuts": [],
    });
    assert_eq!(json, expected);
    // What was not begun is an error, of what was begun not all is known.
    let away = || Err(Status::unavailable("the broker is away"));
    for (told, arguments, code) in [
        (vec![away()], &["--execute"][..], 2),
        (vec![Ok(going.clone()), away()], &["--execute"], 4),
        (vec![Ok(going.clone()), away()], &[], 2),
        (vec![Ok(going)], &["--execute"], 4),
    ] {
        bench.script.set(|state| state.redrive = Some(told));
        let said = bench.run(&[&["dlq", "redrive", "price"], arguments].concat()).await.ends(code);
        assert!(said.out.is_empty() && said.err.starts_with("error: the "), "{said:?}");
    }

    let partitions =
        vec![v1::PurgedPartition { partition: 0, from: 2, until: 12 }, v1::PurgedPartition { partition: 3, from: 0, until: 5 }];
    let purged = v1::PurgeDeadLettersResponse { topic: "price.dlq".into(), partitions, shared_with: vec!["mail".into()], executed: false };
    bench.script.set(|state| state.purge = Some(purged));
    let table = "TOPIC      PARTITION  FROM  UNTIL\nprice.dlq  0          2     12\nprice.dlq  3          0     5\n\
                 the dead letters of mail lie there too\n";
    let said = bench.run(&["dlq", "purge", "price", "--all"]).await.ends(0);
    assert_eq!(said.out, format!("{table}preview: 15 offsets would be deleted, for good; --execute does it\n"));
    let said = bench.run(&["dlq", "purge", "price", "--all", "--shared", "--execute"]).await.ends(0);
    assert_eq!(said.out, format!("{table}15 offsets are deleted\n"));
    let json = bench.run(&["dlq", "purge", "price", "--all", "-o", "json"]).await.ends(0).json();
    let expected = serde_json::json!({
        "topic": "price.dlq", "partitions": [{ "partition": 0, "from": 2, "until": 12 }, { "partition": 3, "from": 0, "until": 5 }],
        "offsets": 15, "shared_with": ["mail"], "executed": false,
    });
    assert_eq!(json, expected);
}

#[tokio::test]
async fn a_replay_is_counted_then_done() {
    let bench = Bench::new().await;
    let replay = ["replay", "--from", "orders", "--to", "orders-test"];
    bench.run(&replay).await.ends(2);
    let progress = v1::ReplayProgress {
        to: "orders-test".into(),
        in_range: 12,
        read: 10,
        copied: 6,
        filtered: 3,
        failed: 1,
        failure: "orders/0/4: no such key".into(),
        executed: false,
        finished: true,
    };
    bench.script.set(|state| state.replay = Some(vec![Ok(progress.clone())]));
    let said = bench.run(&replay).await.ends(0);
    assert_eq!(
        said.out,
        "10 records read, 6 would be copied into orders-test, 3 filtered out, 1 not judged\nthe filter failed on orders/0/4: no such key\n\
         preview: nothing is copied; --execute does it\n"
    );
    let json = bench.run(&[&replay[..], &["-o", "json"]].concat()).await.ends(0).json();
    let expected = serde_json::json!({
        "to": "orders-test", "in_range": 12, "read": 10, "copied": 6, "filtered": 3, "failed": 1, "failure": "orders/0/4: no such key",
        "executed": false,
    });
    assert_eq!(json, expected);

    let execute = [&replay[..], &["--execute"]].concat();
    let going = v1::ReplayProgress { finished: false, executed: true, ..progress.clone() };
    let done = v1::ReplayProgress { failed: 0, failure: String::new(), finished: true, ..going.clone() };
    bench.script.set(|state| state.replay = Some(vec![Ok(going.clone()), Ok(done)]));
    assert_eq!(bench.run(&execute).await.ends(0).out, "10 records read, 6 copied into orders-test, 3 filtered out, 0 not judged\n");
    let away = || Err(Status::unavailable("the broker is away"));
    for (told, code, why) in [
        (vec![away()], 2, "the broker is away"),
        (vec![Ok(going.clone()), away()], 4, "the broker is away"),
        (vec![Ok(going)], 4, "the sidecar ended after 6 copies"),
    ] {
        bench.script.set(|state| state.replay = Some(told));
        let said = bench.run(&execute).await.ends(code);
        assert!(said.out.is_empty() && said.err.starts_with(&format!("error: {why}")), "{said:?}");
    }
}
