//! Whole tables: what is read, what is refused, what comes out.

mod generated;
mod matching;
mod refused;
mod schemas;

use super::*;

/// The table of the documentation, without what is not built yet.
pub(crate) const EXAMPLE: &str = r#"
apiVersion: mesh/v1
kind: RoutingTable
metadata: { mesh: shop }
spec:
  topics:
    orders: { partitions: 12, replication: 3, retention: 7d }
  defaults: { timeout: 10s }
  routes:
  - name: price-orders
    service: pricing
    from: [orders]
    deliver: push
    handler: /price
    to: [priced-orders]
    cases:
    - { status: 202, to: [manual-review] }
    - { when: 'reply.json.total > 1000.0', to: [fraud-check, priced-orders] }
    filter: 'record.json.country == "KR"'
    ignore_status: [204, 205, 304]
    start: earliest
    group: shop.price-orders
    order: key
    content_type: application/json
    concurrency: 64
    timeout: 5s
    retry: { attempts: 10, initial: 100ms, max: 30s, multiplier: 2.0 }
    dead_letter: price-orders.dlq
    breaker: { failures: 20, open: 10s }
    forward_headers: all
    guarantee: at_least_once
    on_gap: stop
    batch: { max: 100, wait: 5ms }
    max_hops: 1000
"#;

/// A table of these routes.
pub(crate) fn with_routes(routes: &str) -> String {
    format!("apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: shop }}\nspec:\n  routes:\n{routes}")
}

/// A table of routes with a name, sources and destinations.
pub(crate) fn chain(routes: &[(&str, &str, &str)]) -> Table {
    let line =
        |(name, from, to): &(&str, &str, &str)| format!("  - {{ name: {name}, service: s, from: [{from}], handler: /, to: {to} }}\n");
    let lines: String = routes.iter().map(line).collect();
    parse("t", &with_routes(&lines)).unwrap()
}

#[test]
fn the_example_is_read_and_compiled() {
    let table = parse("routes.yaml", EXAMPLE).unwrap();
    let compiled = compile(&table).unwrap();
    let route = compiled.route("price-orders").unwrap();
    assert_eq!(route.timeout.as_secs(), 5);
    assert_eq!(&*route.group, "shop.price-orders");
    assert_eq!(route.cases.len(), 2);
    assert_eq!(compiled.routes_from("orders").len(), 1);
    assert_eq!(compiled.routes_of("pricing").len(), 1);
    assert!(compiled.routes_from("none").is_empty() && compiled.route("none").is_none());
    let names: Vec<&str> = compiled.topic_names().iter().map(|topic| &*topic.name).collect();
    let expected = ["fraud-check", "manual-review", "orders", "price-orders.dlq", "priced-orders"];
    assert_eq!(names, expected);
    let dead = compiled.topic("price-orders.dlq").unwrap();
    assert!(!dead.declared && &*dead.dead_letter_of[0] == "orders");
    assert_eq!(compiled.topic("orders").unwrap().spec.partitions, Some(12));
}

#[test]
fn retry_and_park_topics_follow_each_source() {
    let text = with_routes(
        "  - { name: a, service: s, from: [x, y], handler: /h, to: void, retry: { topics: [10m, 1h] } }\n  - { name: b, service: s, from: [z], handler: /h, to: void, on_exhausted: park }\n",
    );
    let compiled = compile(&parse("t", &text).unwrap()).unwrap();
    let follow =
        |topic: &Topic| topic.follows.as_ref().map(|source| format!("{} {source} {:?}", topic.name, topic.pause.map(|p| p.as_secs())));
    let followers: Vec<String> = compiled.topic_names().iter().filter_map(follow).collect();
    assert_eq!(
        followers,
        [
            "a.x.park x None",
            "a.x.retry-1 x Some(600)",
            "a.x.retry-2 x Some(3600)",
            "a.y.park y None",
            "a.y.retry-1 y Some(600)",
            "a.y.retry-2 y Some(3600)",
            "b.z.park z None",
            "b.z.retry-1 z Some(0)",
        ]
    );
    assert!(compiled.topic("a.y.park").is_some(), "sorted by name");
    let plain = compiled.route("b").unwrap();
    assert_eq!((plain.tiers(), plain.on_exhausted), (1, OnExhausted::Park));
}

#[test]
fn defaults_of_the_language_and_of_the_table() {
    let text = with_routes("  - { name: a, service: s, from: [x], handler: /h, to: void }\n")
        .replace("  routes:", "  defaults: { retry: { attempts: 3 }, filter: 'record.size > 0' }\n  routes:");
    let compiled = compile(&parse("t", &text).unwrap()).unwrap();
    let route = &compiled.routes[0];
    assert_eq!(route.to, Destinations::Void);
    assert_eq!((route.retry.attempts, route.retry.max.as_secs()), (3, 30));
    assert_eq!(route.ignore_status, [204, 205, 304]);
    assert_eq!((&*route.group, &*route.dead_letter), ("shop.a", "a.dlq"));
    assert_eq!((route.concurrency, route.adaptive, route.max_hops, route.batch), (64, None, 1000, None));
    assert_eq!(route.filter.as_ref().map(Expression::source), Some("record.size > 0"));
    assert_eq!(route.retry.pause(1).as_millis(), 100);
    assert_eq!(route.retry.pause(4).as_millis(), 800);
    assert_eq!(route.retry.pause(u32::MAX).as_secs(), 30);
}

#[test]
fn concurrency_may_be_adaptive() {
    for (text, adaptive, most) in [
        ("8", None, 8),
        ("adaptive", Some(1), 1000),
        ("{ adaptive: {} }", Some(1), 1000),
        ("{ adaptive: { min: 2, max: 50 } }", Some(2), 50),
        ("{ adaptive: { min: 2000 } }", Some(2000), 2000),
    ] {
        let text = with_routes(&format!("  - {{ name: a, service: s, from: [x], handler: /h, to: void, concurrency: {text} }}\n"));
        let table = parse("t", &text).unwrap();
        let route = &compile(&table).unwrap().routes[0];
        assert_eq!((route.adaptive, route.concurrency), (adaptive, most), "{text}");
        assert_eq!(parse("t", &table.to_json()).unwrap(), table, "{text}");
    }
    let pull = with_routes("  - { name: a, service: s, from: [x], to: void, deliver: pull, concurrency: adaptive, batch: {} }\n");
    let faults = parse("t", &pull).unwrap_err().to_string();
    assert!(faults.contains("spec.routes[0].concurrency") && faults.contains("spec.routes[0].batch"), "{faults}");
}

#[test]
fn an_unchanged_route_is_equal_over_tables() {
    let old = compile(&parse("t", EXAMPLE).unwrap()).unwrap();
    let text = EXAMPLE.to_owned() + "  - { name: b, service: s, from: [x], handler: /h, to: void }\n";
    let new = compile(&parse("t", &text).unwrap()).unwrap();
    assert_eq!(old.route("price-orders"), new.route("price-orders"));
    let text = EXAMPLE.replace("timeout: 5s", "timeout: 6s");
    let new = compile(&parse("t", &text).unwrap()).unwrap();
    assert_ne!(old.route("price-orders"), new.route("price-orders"));
}

#[test]
fn yaml_and_json_are_one() {
    let table = parse("t", EXAMPLE).unwrap();
    assert_eq!(parse("t", &table.to_json()).unwrap(), table);
    assert_eq!(parse("t", &table.to_yaml()).unwrap(), table);
    assert!(table.digest().starts_with("sha256:") && table.digest().len() == 71);
    let other = EXAMPLE.replace("timeout: 5s", "timeout: 5000ms");
    assert_eq!(parse("t", &other).unwrap().digest(), table.digest());
    let pretty: serde_json::Value = serde_json::from_str(&table.to_json()).unwrap();
    let pretty = serde_json::to_string_pretty(&pretty).unwrap();
    assert_eq!(parse("t", &pretty).unwrap().digest(), table.digest());
}

#[test]
fn loops_are_found_and_shown() {
    let table =
        chain(&[("c", "t3", "[t1, out]"), ("a", "t1", "[t2]"), ("b", "t2", "[t3]"), ("self", "t9", "[t9]"), ("line", "out", "[end]")]);
    assert_eq!(loops(&table), [vec!["a", "b", "c"], vec!["self"]]);
    let warnings = table.warnings();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].message.contains("a → b → c → a"), "{}", warnings[0]);
    assert_eq!(warnings[0].field, "spec.routes[1].to");
    for format in [GraphFormat::Text, GraphFormat::Mermaid, GraphFormat::Dot] {
        assert_eq!(graph(&table, format), graph(&table.clone(), format));
    }
    assert!(graph(&table, GraphFormat::Text).contains("loop: self → self"));
    assert!(graph(&table, GraphFormat::Dot).contains("\"route a\" -> \"t2\";"));
    assert!(graph(&table, GraphFormat::Mermaid).starts_with("flowchart LR\n"));
}

#[test]
fn notes_stand_at_the_edges() {
    let table = chain(&[("a", "in", "[out]"), ("b", "out", "[x, y]")]);
    let note = Notes { route: "r\"".into(), from: "1/s".into(), to: "2/s".into(), void: "3/s".into(), dead: "4/s".into() };
    let notes = AllNotes::from([("a".to_owned(), note.clone()), ("b".to_owned(), note), ("gone".to_owned(), Notes::default())]);
    let text = graph_with(&table, GraphFormat::Text, &notes);
    assert!(text.contains("  from in  [1/s]\n  to   out  [2/s]\n  dead a.dlq  [4/s]"), "{text}");
    assert!(text.contains("  to   x  [2/s]\n  to   y  [2/s]"), "each of both gets all: {text}");
    let dot = graph_with(&table, GraphFormat::Dot, &notes);
    assert!(dot.contains("\\nr\\\"\"") && dot.contains("\"in\" -> \"route a\" [label=\"1/s\"];"), "{dot}");
    let mermaid = graph_with(&table, GraphFormat::Mermaid, &notes);
    assert!(mermaid.contains("-->|\"1/s\"| r0") && mermaid.contains("-.->|\"4/s\"|"), "{mermaid}");
}

#[test]
fn no_loop_where_there_is_none() {
    let table = chain(&[("a", "t1", "[t2, t3]"), ("b", "t2", "[t3]"), ("c", "t1", "[t3]"), ("d", "t3", "void")]);
    assert!(loops(&table).is_empty() && table.warnings().is_empty());
}

#[test]
fn a_case_that_nothing_reaches_is_warned_of() {
    let text = EXAMPLE.replace("status: 202", "status: 204");
    let (_, warnings) = parse_with_warnings("t.yaml", &text).unwrap();
    assert_eq!(warnings[0].field, "spec.routes[0].cases[0].status");
    assert_eq!((warnings[0].file.as_str(), warnings[0].line), ("t.yaml", 17));
}

#[test]
fn differences_name_fields() {
    let old = parse("t", EXAMPLE).unwrap();
    assert!(diff(&old, &old).is_empty());
    let text = EXAMPLE
        .replace("timeout: 5s", "timeout: 6s")
        .replace("    max_hops: 1000\n", "")
        .replace("    orders: {", "    more.topics: {}\n    orders: {")
        + "  - { name: b, service: s, from: [x], handler: /h, to: void }\n";
    let lines: Vec<String> = diff(&old, &parse("t", &text).unwrap()).iter().map(Change::to_string).collect();
    assert_eq!(lines[0], "+ topics[\"more.topics\"]: {}");
    assert!(lines[1].starts_with("+ routes.b: {"));
    assert_eq!(lines[2], "- routes.price-orders.max_hops: 1000");
    assert_eq!(lines[3], "~ routes.price-orders.timeout: \"5s\" → \"6s\"");
    assert_eq!(lines.len(), 4);
    let ab = chain(&[("a", "x", "void"), ("b", "y", "void")]);
    let ba = chain(&[("b", "y", "void"), ("a", "x", "void")]);
    assert_eq!(diff(&ab, &ba)[0].path, "routes");
}

#[test]
fn routes_that_differ_are_counted_with_their_defaults() {
    let counts = |added, changed, removed| RouteCounts { added, changed, removed };
    let table = |routes: &[(&str, &str, &str)]| chain(routes);
    let old = table(&[("a", "x", "void"), ("b", "y", "void"), ("c", "z", "void")]);
    assert_eq!(count_routes(&old, &old), counts(0, 0, 0));
    let new = table(&[("d", "x", "void"), ("b", "y", "[other]"), ("c", "z", "void")]);
    assert_eq!(count_routes(&old, &new), counts(1, 1, 1));
    let reordered = table(&[("c", "z", "void"), ("a", "x", "void"), ("b", "y", "void")]);
    assert_eq!(count_routes(&old, &reordered), counts(0, 0, 0), "their order is no matter of any route");
    // A default changes every route that does not say otherwise.
    let mut defaults = old.clone();
    defaults.defaults.max_hops = Some(7);
    defaults.routes[0].fields.max_hops = Some(7);
    let mut before = old.clone();
    before.routes[0].fields.max_hops = Some(7);
    assert_eq!(count_routes(&before, &defaults), counts(0, 2, 0));
}
