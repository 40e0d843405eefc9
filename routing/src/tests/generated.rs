//! Generated tables and texts: what holds of all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn topic() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9-][a-zA-Z0-9._-]{0,12}".prop_filter("reserved", |name| name != "void")
}

/// Names that YAML might take for something else.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z][a-z0-9._-]{0,10}",
        Just("null".to_owned()),
        Just("true".to_owned()),
        Just("1e3".to_owned()),
        Just("0x1f".to_owned()),
        Just("12".to_owned()),
        Just("yes".to_owned()),
        Just("1_000".to_owned()),
        Just("-a".to_owned()),
        Just(".5".to_owned()),
    ]
}

fn duration(most: u64) -> impl Strategy<Value = Duration> {
    (1..most).prop_map(Duration::from_millis)
}

fn topics() -> impl Strategy<Value = Vec<String>> {
    btree_set(topic(), 1..4).prop_map(|set| set.into_iter().collect())
}

fn to() -> impl Strategy<Value = To> {
    prop_oneof![Just(To::Void), topics().prop_map(To::Topics)]
}

fn case() -> impl Strategy<Value = CaseSpec> {
    let when = "reply\\.text == '[a-z #:%{}\\[\\]éß€]{0,12}'";
    (100u16..600, option::of(when), to()).prop_map(|(status, when, to)| CaseSpec { status: Some(status), when, to })
}

prop_compose! {
    fn retry()(
        attempts in option::of(1u32..), initial in option::of(duration(1_000)),
        max in option::of(1_000u64..86_400_000), multiplier in option::of((64u32..64_000).prop_map(|n| f64::from(n) / 64.0)),
        topics in option::of(vec(duration(86_400_000), 0..8)),
    ) -> RetrySpec {
        RetrySpec { attempts, initial, max: max.map(Duration::from_millis), multiplier, topics }
    }
}

prop_compose! {
    fn some_fields()(
        filter in option::of("record\\.text != \"[a-z #:'\\n\\téß€-]{0,12}\""),
        ignore_status in option::of(btree_set(100u16..600, 0..4)),
        start in option::of(prop_oneof![
            Just(Start::Earliest), Just(Start::Latest), Just(Start::Applied),
            (-62_000_000_000_000i64..250_000_000_000_000).prop_map(Start::At),
        ]),
        order in option::of(prop_oneof![Just(Order::Key), Just(Order::Partition), Just(Order::None)]),
        content_type in option::of("[a-z]{1,5}/[a-z.+-]{1,8}(; ?[a-z]=\"?[0-9 ]?\"?)?"),
        concurrency in option::of(1u32..=10_000),
        timeout in option::of(duration(86_400_000)),
        retry in option::of(retry().boxed()),
        on_exhausted in option::of(prop_oneof![Just(OnExhausted::DeadLetter), Just(OnExhausted::Park), Just(OnExhausted::Stop)]),
        breaker in option::of((option::of(1u32..), option::of(duration(86_400_000)))),
        forward in option::of(prop_oneof![
            Just(ForwardSpec::All), Just(ForwardSpec::None),
            btree_set("\\PC{1,8}", 0..3).prop_map(|set| ForwardSpec::Only(set.into_iter().collect())),
        ]),
    ) -> RouteFields {
        RouteFields {
            filter, ignore_status, start, order, content_type, timeout, retry, on_exhausted,
            concurrency: concurrency.map(ConcurrencySpec::Fixed),
            breaker: breaker.map(|(failures, open)| BreakerSpec { failures, open }),
            forward_headers: forward,
            ..RouteFields::default()
        }
    }
}

prop_compose! {
    fn route()(
        // Boxed: the trees of values are large, and a test's stack is small.
        fields in some_fields().boxed(), service in name(), from in topics(), to in to(),
        cases in option::of(vec(case(), 0..3)), push in any::<bool>(),
        handler in "/[a-z/~%!?=.-]{0,12}", max_hops in option::of(any::<u32>()),
        adaptive in option::of((option::of(1u32..=64), option::of(64u32..=10_000))),
        batch in option::of((option::of(1u32..=10_000), option::of(duration(60_000)))),
    ) -> RouteFields {
        RouteFields {
            service: Some(service),
            from: Some(from),
            to: Some(to),
            cases,
            deliver: if push { None } else { Some(Deliver::Stream) },
            handler: push.then_some(handler),
            guarantee: push.then_some(Guarantee::AtLeastOnce),
            concurrency: match adaptive {
                Some((min, max)) if push => Some(ConcurrencySpec::Adaptive { min, max }),
                _ => fields.concurrency,
            },
            on_gap: push.then_some(OnGap::Stop),
            batch: batch.filter(|_| push).map(|(max, wait)| BatchSpec { max, wait }),
            max_hops,
            ..fields
        }
    }
}

prop_compose! {
    fn spec()(
        partitions in option::of(1u32..=100_000), replication in option::of(1u16..=32_767),
        retention in option::of(1_000u64..4_000_000_000_000 / 2),
    ) -> TopicSpec {
        TopicSpec { partitions, replication, retention: retention.map(Duration::from_millis), schema: None }
    }
}

prop_compose! {
    fn table()(
        mesh in name(), topics in btree_map(topic(), spec(), 0..3), defaults in some_fields(),
        routes in btree_map(name(), route(), 0..4),
    ) -> Table {
        let routes: BTreeMap<String, RouteFields> = routes;
        let routes = routes.into_iter().map(|(name, fields)| RouteSpec { name, fields }).collect();
        Table { mesh, topics, defaults, routes }
    }
}

/// Whether the rules over several fields hold, which the generator does not know.
fn sound(table: &Table) -> bool {
    crate::check::check(table).faults.is_empty()
}

/// JSON with the members of every object in another order, and some air.
fn shuffled(value: &Value, seed: usize) -> String {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            let by = seed % members.len().max(1);
            members.rotate_left(by);
            if seed.is_multiple_of(2) {
                members.reverse();
            }
            let show = |(key, value): (&String, &Value)| format!("{}:\n {}", Value::from(key.as_str()), shuffled(value, seed / 2 + 7));
            let members: Vec<String> = members.into_iter().map(show).collect();
            format!("{{ {} }}", members.join(" ,"))
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(|item| shuffled(item, seed + 1)).collect();
            format!("[{}]", items.join(", "))
        }
        other => other.to_string(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn print_and_parse_is_identity(table in table().prop_filter("unsound", sound)) {
        let json = table.to_json();
        prop_assert_eq!(&parse("t", &json).map_err(|f| format!("{f}\n{json}")).unwrap(), &table);
        let yaml = table.to_yaml();
        prop_assert_eq!(&parse("t", &yaml).map_err(|f| format!("{f}\n{yaml}")).unwrap(), &table);
    }

    #[test]
    fn the_digest_does_not_see_formatting(table in table().prop_filter("unsound", sound), seed in any::<usize>()) {
        let value: Value = serde_json::from_str(&table.to_json()).unwrap();
        let text = shuffled(&value, seed);
        let read = parse("t", &text).map_err(|f| format!("{f}\n{text}")).unwrap();
        prop_assert_eq!(read.digest(), table.digest());
        prop_assert!(diff(&read, &table).is_empty());
    }

    #[test]
    fn what_is_sound_compiles(table in table().prop_filter("unsound", sound)) {
        let compiled = compile(&table).unwrap();
        prop_assert_eq!(compiled.routes.len(), table.routes.len());
        for format in [GraphFormat::Text, GraphFormat::Mermaid, GraphFormat::Dot] {
            prop_assert!(!graph(&table, format).is_empty());
        }
        let _ = table.warnings();
    }

    #[test]
    fn differences_are_none_or_real(a in table(), b in table()) {
        prop_assert_eq!(diff(&a, &b).is_empty(), a == b);
        prop_assert!(diff(&a, &a).is_empty());
    }

    #[test]
    fn no_text_does_harm(text in "\\PC*", bytes in vec(any::<u8>(), 0..200)) {
        let _ = parse("t", &text);
        let _ = parse("t", &String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn no_damage_to_a_table_does_harm(at in 0..EXAMPLE.len(), cut in 0usize..20, put in "[\\PC\\n\\t]{0,6}") {
        let (mut from, mut to) = (at, (at + cut).min(EXAMPLE.len()));
        while !EXAMPLE.is_char_boundary(from) { from -= 1; }
        while !EXAMPLE.is_char_boundary(to) { to += 1; }
        let text = format!("{}{put}{}", &EXAMPLE[..from], &EXAMPLE[to..]);
        if let Ok(table) = parse("t", &text) {
            prop_assert_eq!(&parse("t", &table.to_yaml()).unwrap(), &table);
            prop_assert!(compile(&table).is_ok());
        }
    }
}

#[test]
fn ten_thousand_routes_are_read_soon() {
    let mut text = String::from(r#"{"apiVersion":"mesh/v1","kind":"RoutingTable","metadata":{"mesh":"big"},"spec":{"routes":["#);
    for i in 0..10_000 {
        let comma = if i == 0 { "" } else { "," };
        text.push_str(&format!(
            r#"{comma}{{"name":"route-{i}","service":"service-{}","from":["topic-{i}"],"handler":"/handle","to":["topic-{}"],"cases":[{{"status":202,"to":["review-{i}"]}}],"filter":"record.json.kind == \"k{}\"","retry":{{"attempts":5,"initial":"100ms","max":"30s"}},"timeout":"5s","concurrency":32}}"#,
            i / 10, i + 1, i % 500,
        ));
    }
    text.push_str("]}}");
    let started = Instant::now();
    let table = parse("big", &text).unwrap();
    let parsed = started.elapsed();
    let compiled = compile(&table).unwrap();
    assert_eq!(compiled.routes.len(), 10_000);
    assert!(loops(&table).is_empty());
    println!("{} bytes: parsed in {parsed:?}, with compiling {:?}", text.len(), started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(60));
    let names: BTreeSet<&str> = compiled.topic_names().iter().map(|topic| &*topic.name).collect();
    assert_eq!(names.len(), 10_001 + 10_000 + 10_000);
}

/// Texts that are hard on parsers: each is answered in time linear in its length.
fn hostile(bytes: usize) -> Vec<(String, String)> {
    let fill = |unit: &str| unit.repeat(bytes / unit.len());
    let units = [
        "a",
        "\"",
        "'",
        "a ",
        "- ",
        "-\n",
        "- a\n",
        "[",
        "[]",
        "[],",
        "{",
        "{a",
        "{a: ",
        "a,",
        "?",
        "? ",
        "? a\n",
        ":",
        ": ",
        "::",
        "#",
        "# a\n",
        "!",
        "!a ",
        "&",
        "&a ",
        "*",
        "*a ",
        "%",
        "%a\n",
        "|",
        "|\n ",
        ">\n\n",
        "---\n",
        "...\n",
        "\n",
        "\t",
        "\r",
        " ",
        "\u{feff}",
        "é",
        "\u{0}",
        "\\",
        "\"\\u00e9",
        "a: b\n",
        "a:\n",
        "@",
        "`",
        "<<: ",
        "\"a\":",
        "\"a\":1,",
        "1,",
        "a\n\n",
        "\"a\n",
        "'a\n ",
    ];
    let mut out: Vec<(String, String)> = units.iter().map(|unit| (format!("{unit:?}"), fill(unit))).collect();
    for open in ["[", "{", "\"", "a: ", "- ", "[\""] {
        for unit in ["a", "a,", "\n", " ", "a: b,", "\"a\": 1,", "[],", "a\n", "\\n"] {
            out.push((format!("{open:?} {unit:?}"), format!("{open}{}", fill(unit))));
        }
    }
    let keys: String = (0..bytes / 12).map(|i| format!("k{i}: 1\n")).collect();
    out.push(("unknown keys".into(), keys.clone()));
    out.push(("unknown fields".into(), format!("metadata:\n{}", keys.replace('k', " k"))));
    out.push(("topics".into(), format!("spec:\n topics:\n{}", keys.replace('k', "  k"))));
    out.push(("bad routes".into(), format!("spec:\n routes:\n{}", fill(" - name\n"))));
    out.push(("empty routes".into(), format!("spec:\n routes:\n{}", fill(" - {}\n"))));
    out.push(("from".into(), with_routes(&format!(" - {{ name: a, from: [{}] }}", fill("a, ")))));
    out.push(("expressions".into(), with_routes(&fill(" - { filter: 'a == 1' }\n"))));
    out
}

#[test]
fn hostile_texts_are_answered_soon() {
    let bytes = std::env::var("HOSTILE_BYTES").ok().and_then(|n| n.parse().ok()).unwrap_or(64 << 10);
    for (name, text) in hostile(bytes) {
        let started = Instant::now();
        assert!(parse("t", &text).is_err(), "{name}");
        let took = started.elapsed();
        if took > Duration::from_millis(500) {
            println!("{name}: {} bytes took {took:?}", text.len());
        }
        assert!(took < Duration::from_secs(20), "{name}: {took:?}");
    }
}
