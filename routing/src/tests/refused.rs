//! Tables with faults: all are reported, each at its place.

use super::*;
use crate::fault::code;

/// The faults of a text as `line field code`.
fn faults(text: &str) -> Vec<(u32, String, &'static str)> {
    let Faults(list) = parse("t.yaml", text).unwrap_err();
    list.into_iter().map(|f| (f.line, f.field, f.code)).collect()
}

/// The faults of a route with these fields in place of the usual ones, without its path.
fn route_faults(fields: &str) -> Vec<(String, &'static str)> {
    let usual = [("name", "r"), ("service", "s"), ("from", "[in]"), ("handler", "/h"), ("to", "[out]")];
    let mut text = String::new();
    for (key, value) in usual {
        if !fields.starts_with(&format!("{key}:")) {
            text.push_str(&format!("{key}: {value}, "));
        }
    }
    let text = with_routes(&format!("  - {{ {text} {fields} }}\n"));
    match parse("t", &text) {
        Ok(_) => Vec::new(),
        Err(Faults(list)) => {
            let short = |field: &str| field.trim_start_matches("spec.routes[0]").trim_start_matches('.').to_owned();
            list.iter().map(|f| (short(&f.field), f.code)).collect()
        }
    }
}

#[track_caller]
fn one(fields: &str, field: &str, code: &str) {
    assert_eq!(route_faults(fields), [(field.to_owned(), code)], "{fields}");
}

#[test]
fn each_field_is_checked() {
    one("name: ''", "name", code::NAME);
    one("name: 'a b'", "name", code::NAME);
    one("name: 5", "name", code::TYPE);
    one("service: 'a/b'", "service", code::NAME);
    one("from: in", "from", code::TYPE);
    one("from: []", "from", code::VALUE);
    one("from: [void]", "from[0]", code::NAME);
    one("from: void", "from", code::TYPE);
    one("from: [a, a]", "from[1]", code::DUPLICATE);
    one("from: ['a b']", "from[0]", code::NAME);
    one("from: [__x]", "from[0]", code::NAME);
    one("from: [5]", "from[0]", code::TYPE);
    one("to: out", "to", code::TYPE);
    one("to: []", "to", code::VALUE);
    one("to:", "to", code::TYPE);
    one("to: [a, void]", "to[1]", code::NAME);
    one("to: [.]", "to[0]", code::NAME);
    one("deliver: psuh", "deliver", code::VALUE);
    one("handler: http://x/y", "handler", code::VALUE);
    one("handler: //x/y", "handler", code::VALUE);
    one("handler: price", "handler", code::VALUE);
    one("handler: '/a b'", "handler", code::VALUE);
    one("handler: '/a#b'", "handler", code::VALUE);
    one("order: keys", "order", code::VALUE);
    one("start: ealiest", "start", code::VALUE);
    one("start: 2026-01-01", "start", code::VALUE);
    one("group: ''", "group", code::NAME);
    one("content_type: json", "content_type", code::VALUE);
    one("concurrency: 0", "concurrency", code::VALUE);
    one("concurrency: 10001", "concurrency", code::VALUE);
    one("concurrency: -1", "concurrency", code::TYPE);
    one("concurrency: '5'", "concurrency", code::TYPE);
    one("concurrency: 1.5", "concurrency", code::TYPE);
    one("concurrency: adaptiv", "concurrency", code::TYPE);
    one("concurrency: { adaptive: 5 }", "concurrency.adaptive", code::TYPE);
    one("concurrency: { adaptive: { min: 0 } }", "concurrency", code::VALUE);
    one("concurrency: { adaptive: { min: 9, max: 8 } }", "concurrency", code::CONFLICT);
    one("timeout: 5", "timeout", code::VALUE);
    one("timeout: 0s", "timeout", code::VALUE);
    one("timeout: 2d", "timeout", code::VALUE);
    one("timeout: [5s]", "timeout", code::TYPE);
    one("retry: 3", "retry", code::TYPE);
    one("retry: { attempts: 0 }", "retry.attempts", code::VALUE);
    one("retry: { multiplier: 0.5 }", "retry.multiplier", code::VALUE);
    one("retry: { multiplier: -1 }", "retry.multiplier", code::VALUE);
    one("retry: { multiplier: .nan }", "retry.multiplier", code::TYPE);
    one("retry: { initial: 10s, max: 1s }", "retry", code::CONFLICT);
    one("retry: { topics: 10m }", "retry.topics", code::TYPE);
    one("retry: { topics: [10] }", "retry.topics[0]", code::VALUE);
    one("retry: { topics: [0s] }", "retry.topics[0]", code::VALUE);
    one("retry: { topics: [1s, 31d] }", "retry.topics[1]", code::VALUE);
    one("retry: { topics: [1s, 1s, 1s, 1s, 1s, 1s, 1s, 1s, 1s] }", "retry.topics", code::LIMIT);
    one("on_exhausted: drop", "on_exhausted", code::VALUE);
    one("guarantee: twice", "guarantee", code::VALUE);
    one("on_gap: latest", "on_gap", code::VALUE);
    one("batch: 100", "batch", code::TYPE);
    one("batch: { max: 0 }", "batch.max", code::VALUE);
    one("batch: { max: 10001 }", "batch.max", code::VALUE);
    one("batch: { wait: 2m }", "batch.wait", code::VALUE);
    one("batch: { size: 5 }", "batch.size", code::UNKNOWN_FIELD);
    one("breaker: { failures: 0 }", "breaker.failures", code::VALUE);
    one("breaker: { open: 0s }", "breaker.open", code::VALUE);
    one("dead_letter: in", "dead_letter", code::CONFLICT);
    one("dead_letter: __x", "dead_letter", code::NAME);
    one("dead_letter: void", "dead_letter", code::NAME);
    one("forward_headers: some", "forward_headers", code::TYPE);
    one("forward_headers: [a, a]", "forward_headers[1]", code::DUPLICATE);
    one("max_hops: -1", "max_hops", code::TYPE);
    one("ignore_status: [99]", "ignore_status", code::VALUE);
    one("ignore_status: 204", "ignore_status", code::TYPE);
    one("cases: [ { to: void } ]", "cases[0]", code::MISSING);
    one("cases: [ { status: 202 } ]", "cases[0].to", code::MISSING);
    one("cases: [ { status: 600, to: void } ]", "cases[0].status", code::VALUE);
    one("cases: [ { when: 'x', to: void } ]", "cases[0].when", code::EXPRESSION);
    one("cases: [ 5 ]", "cases[0]", code::TYPE);
    one("filter: 'reply.status == 1'", "filter", code::EXPRESSION);
    one("filter: true", "filter", code::TYPE);
    one("to: [in], ignore_status: []", "to", code::ENDLESS);
    one("colour: red", "colour", code::UNKNOWN_FIELD);
}

#[test]
fn routes_as_a_whole_are_checked() {
    let of =
        |routes: &str| -> Vec<(String, &str)> { faults(&with_routes(routes)).into_iter().map(|(_, field, code)| (field, code)).collect() };
    let at = |field: &str, code| vec![(format!("spec.routes[0].{field}"), code)];
    let missing = of("  - { name: a, from: [x], handler: /h, to: void }\n");
    assert_eq!(missing, at("service", code::MISSING));
    assert_eq!(of("  - { name: a, service: s, handler: /h, to: void }\n"), at("from", code::MISSING));
    assert_eq!(of("  - { name: a, service: s, from: [x], handler: /h }\n"), at("to", code::MISSING));
    assert_eq!(of("  - { name: a, service: s, from: [x], to: void }\n"), at("handler", code::MISSING));
    let pull = of("  - { name: a, service: s, from: [x], to: void, deliver: pull, handler: /h }\n");
    assert_eq!(pull, at("handler", code::CONFLICT));
    let route = "service: s, from: [x], handler: /h, to: void";
    let twice = of(&format!("  - {{ name: a, {route} }}\n  - {{ name: a, {route} }}\n"));
    assert_eq!(twice, [("spec.routes[1].name".to_owned(), code::DUPLICATE)]);
    let group = of(&format!("  - {{ name: a, {route} }}\n  - {{ name: b, group: shop.a, {route} }}\n"));
    assert_eq!(group, [("spec.routes[1].group".to_owned(), code::CONFLICT)]);
    let retry = "service: s, handler: /h, to: void, retry: { topics: [1s] }";
    let own = of(&format!("  - {{ name: a, from: [b.c], {retry} }}\n  - {{ name: a.b, from: [c], {retry} }}\n"));
    assert_eq!(own, vec![("spec.routes[1].retry".to_owned(), code::CONFLICT); 2]);
    let read = of(
        "  - { name: a, from: [x], service: s, handler: /h, to: void, on_exhausted: park }\n  - { name: b, from: [a.x.park], service: s, handler: /h, to: void }\n",
    );
    assert_eq!(read, at("retry", code::CONFLICT), "nobody else reads or writes a park topic");
    let long = of(&format!("  - {{ name: a, from: [{}], {retry} }}\n", "x".repeat(245)));
    assert_eq!(long, at("retry", code::NAME));
    let good = "  - { name: a, service: s, from: [x], to: [x], deliver: pull }\n";
    assert!(parse("t", &with_routes(good)).is_ok());
}

#[test]
fn the_head_is_checked() {
    let codes = |text: &str| -> Vec<String> { faults(text).into_iter().map(|f| format!("{} {}", f.1, f.2)).collect() };
    assert_eq!(codes("{}"), ["apiVersion missing", "kind missing", "metadata missing", "spec missing"]);
    assert_eq!(codes("[]"), [" type"]);
    assert_eq!(codes("hello"), [" type"]);
    let wrong = EXAMPLE.replace("mesh/v1", "mesh/v2").replace("RoutingTable", "Table");
    assert_eq!(codes(&wrong), ["apiVersion value", "kind value"]);
    assert_eq!(codes(&EXAMPLE.replace("mesh: shop", "mesh: ''")), ["metadata.mesh name"]);
    let topic = EXAMPLE.replace("partitions: 12", "partitions: 0").replace("    orders:", "    a/b:");
    assert_eq!(codes(&topic), ["spec.topics[\"a/b\"] name", "spec.topics[\"a/b\"].partitions value"]);
    let twice = EXAMPLE.replace("    handler: /price\n", "    handler: /price\n    handler: /other\n");
    assert_eq!(faults(&twice), [(15, "spec.routes[0].handler".to_owned(), code::DUPLICATE)]);
}

#[test]
fn all_faults_of_a_text_are_reported_at_their_places() {
    let text = "\
apiVersion: mesh/v1
kind: RoutingTable
metadata: { mesh: shop, owner: me }
spec:
  topics: { a: { partitions: many } }
  defaults: { concurency: 5, timeout: 0s }
  routes:
  - name: one
    service: s
    from: [in, __in]
    handler: /h
  - name: one
    servce: s
    from: [in]
    handler: http://x
    to: [out, out]
    filter: 'record.jsn.x == 1'
    batch: { max: many }
  - 5
";
    let expected: Vec<(u32, &str, &str)> = vec![
        (3, "metadata.owner", code::UNKNOWN_FIELD),
        (5, "spec.topics.a.partitions", code::TYPE),
        (6, "spec.defaults.concurency", code::UNKNOWN_FIELD),
        (6, "spec.defaults.timeout", code::VALUE),
        (8, "spec.routes[0].to", code::MISSING),
        (10, "spec.routes[0].from[1]", code::NAME),
        (12, "spec.routes[1].name", code::DUPLICATE),
        (12, "spec.routes[1].service", code::MISSING),
        (13, "spec.routes[1].servce", code::UNKNOWN_FIELD),
        (15, "spec.routes[1].handler", code::VALUE),
        (16, "spec.routes[1].to[1]", code::DUPLICATE),
        (17, "spec.routes[1].filter", code::EXPRESSION),
        (18, "spec.routes[1].batch.max", code::TYPE),
        (19, "spec.routes[2]", code::TYPE),
    ];
    let found = faults(text);
    let found: Vec<(u32, &str, &str)> = found.iter().map(|(l, f, c)| (*l, f.as_str(), *c)).collect();
    assert_eq!(found, expected);
    let shown = parse("t.yaml", text).unwrap_err().to_string();
    assert!(shown.contains("t.yaml:13:5: spec.routes[1].servce: unknown field `servce` (did you mean `service`?)"), "{shown}");
    assert_eq!(shown.lines().count(), 14);
}

#[test]
fn a_million_faults_are_cut() {
    let lines: String = (0..5_000).map(|i| format!("  - {{ name: r{i}, x: 1 }}\n")).collect();
    assert_eq!(faults(&with_routes(&lines)).len(), 1_001);
}
