//! Expressions: what they see, what is refused, and that nothing hostile does harm.

use super::*;
use crate::record::NoHeaders;
use std::time::{Duration, Instant};

fn one(text: &str, roots: Roots) -> Result<Expression, Refusal> {
    let source = Source { path: "x".into(), text: text.into(), roots };
    compile_all(vec![source]).remove(0).1
}

fn refused(text: &str) -> String {
    let started = Instant::now();
    let refusal = one(text, Roots::RecordAndReply).expect_err(&text.chars().take(60).collect::<String>());
    assert!(started.elapsed() < Duration::from_secs(5), "{text}");
    refusal.message
}

fn record(value: &str, then: impl FnOnce(&RecordView<'_>)) {
    let headers = [("region", b"eu".as_slice()), ("bin", &[0xff])];
    then(&RecordView {
        topic: "orders",
        partition: 3,
        offset: 42,
        timestamp_ms: 1_700_000_000_000,
        key: Some(b"k1"),
        value: Some(value.as_bytes()),
        headers: &headers.as_slice(),
    });
}

/// Evaluates on a thread with a small stack, as a worker's may be.
fn eval(text: &str, value: &str) -> Result<bool, String> {
    let expression = one(text, Roots::RecordAndReply).unwrap_or_else(|r| panic!("{text}: {r:?}"));
    let value = value.to_owned();
    let work = move || {
        let mut out = Ok(false);
        record(&value, |record| {
            let reply = ReplyView { status: 201, body: Some(br#"{"total": 1500, "ok": true}"#), headers: &NoHeaders };
            out = expression.evaluate(record, Some(&reply)).map_err(|e| e.message);
        });
        out
    };
    let thread = std::thread::Builder::new().stack_size(1 << 20).spawn(work);
    thread.unwrap().join().unwrap()
}

#[test]
fn fields_of_record_and_reply() {
    let json = r#"{"country":"KR","total":12.5,"n":7,"big":18446744073709551615,"items":[{"p":1},{"p":20}],
        "a":{"b":{"c":null}},"order-id":"x","empty":[]}"#;
    for text in [
        "record.topic == 'orders' && record.partition == 3 && record.offset == 42",
        "record.key == 'k1'",
        "record.json.country == \"KR\"",
        "record.json.total > 12 && record.json.total < 13.0 && record.json.n == 7",
        "record.json.n + 1 == 8",
        "record.json.big > 1",
        "record.json['order-id'] == 'x'",
        "record.json.a.b.c == null",
        "has(record.json.country) && !has(record.json.nothing)",
        "has(record.json.a.b) && !has(record.json.a.x)",
        "'order-id' in record.json && has(record.json['a'].b)",
        "size(record.json.items) == 2 && record.json.items[1].p == 20",
        "record.json.items.exists(i, i.p > 10) && !record.json.items.all(i, i.p > 10)",
        "record.json.items.exists_one(i, i.p == 1)",
        "record.json.items.map(i, i.p) == [1, 20]",
        "size(record.json.items.filter(i, i.p > 10)) == 1",
        "record.json.items.filter(i, i.p > 10).exists(i, i.p == 20)",
        "record.json.items.exists(i, has(i.p) && i.p in [19, 20])",
        "record.json.empty.all(i, false)",
        "record.headers.region == 'eu' && record.headers['region'].startsWith('e')",
        "'region' in record.headers && !('x' in record.headers)",
        "has(record.headers.region) && !has(record.headers.x)",
        "record.headers.bin == b'\\xff'",
        "record.text.contains('KR') && record.size > 10",
        "record.json.country.matches('^K[A-Z]$')",
        "matches(record.topic, 'ord')",
        "record.timestamp > timestamp('2023-01-01T00:00:00Z')",
        "record.timestamp.getFullYear() == 2023",
        "reply.status == 201 && reply.json.total > 1000.0",
        "reply.json.total > 1000",
        "has(reply.json.ok) && reply.json.ok",
        "reply.size > 0 && reply.text.endsWith('}')",
        "record.json.country in ['KR', 'JP'] ? true : false",
        "{'KR': 1, 'JP': 2}[record.json.country] == 1",
        "type(record.json.n) == int",
        "string(record.json.n) == '7'",
        "record.json.n - 1 == 6 && -record.json.n == -7",
        "record.json.missing == 1 || true",
        "!(record.json.missing == 1 && false)",
    ] {
        assert_eq!(eval(text, json), Ok(true), "{text}");
    }
}

#[test]
fn a_record_that_does_not_fit_is_an_error() {
    let fails = |text: &str, value: &str| eval(text, value).expect_err(text);
    assert_eq!(fails("record.json.x == 1", "{}"), "record.json.x: there is no such field");
    assert!(fails("record.json.x == 1", "no json").contains("record.json.x: it is not JSON"));
    assert!(fails("has(record.json.x)", "{\"x\": 1").contains("not JSON"));
    assert!(fails("has(record.json.x)", "{} {}").contains("not JSON"));
    assert!(fails("record.json.x == 1", "").contains("empty"));
    assert!(fails("record.json.x", "{\"x\": 1}").contains("neither true nor false"));
    assert!(fails("record.headers.x == 'a'", "").contains("no such header"));
    assert!(fails("record.json.x > 'a'", "{\"x\": 1}").len() < 300);
    let long = format!("{{\"x\": \"{}\"}}", "é".repeat(10_000));
    assert!(fails("record.json.x > 1", &long).len() < 300);
}

#[test]
fn the_last_of_repeated_members_counts() {
    assert_eq!(eval("record.json.a == 2", r#"{"a":1,"a":2}"#), Ok(true));
    assert!(eval("record.json.a.b == 1", r#"{"a":{"b":1},"a":3}"#).is_err());
}

#[test]
fn a_dot_in_a_key_is_no_path() {
    assert_eq!(eval("record.json['a.b'] == 1 && record.json.a.b == 2", r#"{"a.b":1,"a":{"b":2}}"#), Ok(true));
    assert_eq!(eval("has(record.json.nothing.below)", "{}"), Ok(false));
}

#[test]
fn no_code_hides_in_what_looks_like_text() {
    let deep = "(".repeat(900);
    for text in [
        format!("'\\q{deep}' == 'a'"),
        format!("rr'\\' '{deep}' == 'a'"),
        format!("rb'\\' '{deep}' == 'a'"),
        format!("'a\r{deep}' == 'a'"),
        format!("'\\x4{deep}' == 'a'"),
        format!("'\\400{deep}' == 'a'"),
        format!("b'\\u12{deep}' == b'a'"),
        format!("\"\"\"\\q{deep}\"\"\" == 'a'"),
    ] {
        refused(&text);
    }
    for text in [
        "r'\\d' == '\\\\d'",
        "'\\x41\\u0042\\103' == 'ABC'",
        "\"\"\"a\nb'\"\"\" == 'a\\nb\\''",
        "br'\\' == b'\\\\'",
        "'((((((((((((((((' != ''",
    ] {
        assert_eq!(eval(text, ""), Ok(true), "{text}");
    }
    refused(&format!("{} == ''", ["record.text"; 8].join(" + ")));
}

#[test]
fn json_is_read_only_when_it_is_needed() {
    assert_eq!(eval("record.topic == 'other' && record.json.x == 1", "no json"), Ok(false));
}

#[test]
fn unknown_names_are_refused_with_a_hint() {
    let hint = |text, roots| one(text, roots).expect_err(text);
    let both = Roots::RecordAndReply;
    assert_eq!(hint("recrod.json.x == 1", both).hint, "did you mean `record`?");
    assert_eq!(hint("record.jsn.x == 1", both).hint, "did you mean `record.json`?");
    assert_eq!(hint("reply.stats == 1", both).hint, "did you mean `reply.status`?");
    assert!(hint("reply.status == 1", Roots::Record).message.contains("cannot see `reply`"));
    assert!(hint("record.json.all(r, reply.status == 1)", Roots::Record).message.contains("reply"));
    for text in [
        "record == record",
        "record.topic.x == 1",
        "record.headers.a.b == 1",
        "x",
        "record.foo",
        "record[record.key] == 1",
        "has(record.topic)",
        "has(record.offset)",
        "foo(record.key)",
        "record.json.x.foo()",
        "size()",
        "size(1, 2)",
        "record.timestamp.getHours('+01:00') == 1",
        "optional.of(1).hasValue()",
        "record.?json",
        "Foo{a: 1}.a == 1",
        "1",
        "'a'",
        "[true]",
        "1 + 1",
        "size(record.text)",
        "",
        "  ",
        "record.json.x ==",
        "record.json.x == 1 // yes",
        "record.json.x = 1",
        "[1].exists(record, record == 1)",
        "'a",
        "(1 == 1",
        "1 == 1)",
        "(]",
        "`a` == 1",
        "record.json.@x == 1",
        "@0 == 1",
        "@result == 1",
        "x.y.z == 1",
        "true && foo",
        "google.protobuf.Timestamp == 1",
    ] {
        refused(text);
    }
}

#[test]
fn hostile_expressions_are_refused_without_harm() {
    refused(&vec!["1"; 2001].join("+"));
    refused(&format!("{} > 1", vec!["1"; 500].join("+")));
    refused(&format!("{}1{} == 1", "(".repeat(480), ")".repeat(480)));
    refused(&"(".repeat(1024));
    refused(&"[".repeat(1024));
    refused(&"{".repeat(1024));
    refused(&format!("{}true", "!".repeat(1000)));
    refused(&format!("{}1 == 1", "-".repeat(1000)));
    refused(&format!("{}1 == 1", "- ".repeat(500)));
    refused(&format!("{}true", "true ? true : ".repeat(70)));
    refused(&format!("{}true{}", "true ? ".repeat(70), " : true".repeat(70)));
    refused(&vec!["true"; 128].join("&&"));
    refused(&vec!["true"; 128].join("||"));
    refused(&format!("record.json{} == 1", ".a".repeat(500)));
    refused(&format!("record.json{} == 1", "[0]".repeat(300)));
    refused(&format!("record.json{} == 1", ".f()".repeat(200)));
    refused(&vec!["[1]"; 300].join("=="));
    refused("record.text.matches('(a{1000}){1000}{1000}')");
    refused("record.text.matches('\\\\w{5000}')");
    refused("record.text.matches(record.json.p)");
    refused("record.text.matches('(')");
    refused("record.text.matches('a' + 'b')");
    refused(&format!("record.text.matches('{}a{}')", "(".repeat(400), ")".repeat(400)));
    refused("[1].map(a, [1].map(b, [1].map(c, [1].map(d, [1].map(e, [1].map(f, [1].map(g, g))))))) == []");
    refused("record.json.all(a, record.json.all(b, a == b))");
    refused("[1,2].map(i, [i,i]).map(i, [i,i]).map(i, [i,i]) == []");
    refused("['a'].map(i, i + i) == []");
    refused("record.json.map(i, record.text + record.text) == []");
    refused("record.json.map(i, [i, i]) == []");
    refused("record.json.map(i, {'a': i}) == []");
    refused("\u{0}");
    refused("é == 1");
}

#[test]
fn what_passes_the_guard_evaluates_on_a_small_stack() {
    let deep = |open: &str, close: &str, n| format!("{}true{}", open.repeat(n), close.repeat(n));
    for text in [
        deep("(", ")", 10),
        vec!["true"; 90].join("&&"),
        ["false", "true"].repeat(30).join("||"),
        format!("{} == 17", vec!["1"; 17].join("+")),
        format!("!(has(record.json{}))", ".a".repeat(20)),
        format!("{}true", "true ? true : ".repeat(4)),
        format!("{}1 == 1", "[".repeat(6) + &"]".repeat(6) + " == 2 || "),
        format!("{}[1].all(i, {}i == 1{}){}", "(true && ".repeat(5), "(true && ".repeat(4), ")".repeat(4), ")".repeat(5)),
        "!!!!true".into(),
    ] {
        let result = eval(&text, "{\"a\": {}}");
        assert!(matches!(result, Ok(true)) || text.contains(".a"), "{text}: {result:?}");
    }
}

#[test]
fn evaluation_ends_on_large_records() {
    let large = format!("{{\"a\": [{}0]}}", "1,".repeat(500_000));
    let started = Instant::now();
    let result = eval("record.json.a.all(i, i in record.json.a)", &large);
    assert!(result.unwrap_err().contains("too long"));
    assert_eq!(eval("size(record.json.a.map(i, i + 1)) == 500001", &large), Ok(true));
    assert_eq!(eval("record.json.a.exists(i, i == 5)", &large), Ok(false));
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
}

#[test]
fn deep_json_is_no_danger() {
    let deep = |n: usize| format!("{{\"a\": {}{}}}", "[".repeat(n), "]".repeat(n));
    assert_eq!(eval("record.json == record.json", &deep(100)), Ok(true));
    assert_eq!(eval("record.json.a[0] != 1", &deep(100)), Ok(true));
    assert!(eval("record.json.a == 1", &deep(100_000)).unwrap_err().contains("not JSON"));
    // What nobody refers to is skipped, however deep.
    assert!(eval("has(record.json.b)", &deep(100_000)).is_ok());
}

mod soup {
    //! Generated expressions: whatever passes the guard neither breaks the parser nor the evaluation.

    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const WORDS: [&str; 96] = [
        "record",
        ".",
        "json",
        "reply",
        "text",
        "headers",
        "key",
        "size",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        "?",
        "+",
        "-",
        "*",
        "/",
        "%",
        "!",
        "&&",
        "||",
        "==",
        "!=",
        "<",
        "<=",
        ">",
        ">=",
        " in ",
        "true",
        "false",
        "null",
        "0",
        "1",
        "-1",
        "2u",
        "1.5",
        "1e308",
        "0x7fffffffffffffff",
        "9223372036854775807",
        "-9223372036854775808",
        "18446744073709551615u",
        "'a'",
        "\"b\"",
        "b'c'",
        "r'\\d'",
        "'''x'''",
        "''",
        "'\\n'",
        "'\\u00e9'",
        "'\\x'",
        "'\\777'",
        "has",
        "all",
        "exists",
        "exists_one",
        "map",
        "filter",
        "size",
        "contains",
        "startsWith",
        "endsWith",
        "matches",
        "int",
        "uint",
        "double",
        "string",
        "bool",
        "bytes",
        "type",
        "timestamp",
        "duration",
        "getFullYear",
        "getHours",
        "'1h'",
        "'2020-01-01T00:00:00Z'",
        "'-9999999999h'",
        "i",
        "record.json.a",
        "record.json.items",
        "reply.status",
        "record.key",
        "has(record.json.a)",
        ".map(i, i)",
        ".all(i, i == 1)",
        ".exists(i, i > 0)",
        ".filter(i, true)",
        "@",
        "`",
        "é",
        " ",
        "google.protobuf.Timestamp{}",
        "for",
    ];

    /// Values and operators, so that many of the texts are expressions.
    fn expression() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            proptest::sample::select(WORDS[32..55].to_vec()).prop_map(str::to_owned),
            proptest::sample::select(WORDS[81..86].to_vec()).prop_map(str::to_owned),
            any::<i64>().prop_map(|n| n.to_string()),
            any::<f64>().prop_map(|n| n.to_string()),
            Just("timestamp('2020-01-01T00:00:00Z')".to_owned()),
            Just("timestamp('9999-12-31T23:59:59.999999999Z')".to_owned()),
            Just("timestamp('0001-01-01T00:00:00Z')".to_owned()),
            Just("duration('2562047h')".to_owned()),
            Just("duration('-2562047h')".to_owned()),
            "[0-9.]{1,20}[hmsun]{1,2}".prop_map(|text| format!("duration('{text}')")),
            "\\PC{0,12}".prop_map(|text| format!("timestamp({text:?})")),
        ];
        let operators = ["+", "-", "*", "/", "%", "&&", "||", "==", "!=", "<", "<=", ">", ">=", " in "];
        let calls: Vec<&'static str> = WORDS[61..77].to_vec();
        leaf.prop_recursive(4, 24, 3, move |inner| {
            let binary = (inner.clone(), proptest::sample::select(operators.to_vec()), inner.clone());
            let call = (proptest::sample::select(calls.clone()), inner.clone());
            prop_oneof![
                binary.prop_map(|(a, op, b)| format!("({a}{op}{b})")),
                call.prop_map(|(name, a)| format!("{name}({a})")),
                (inner.clone(), proptest::sample::select(calls.clone())).prop_map(|(a, name)| format!("{a}.{name}()")),
                (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("[{a}, {b}]")),
                (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("{{{a}: {b}}}[{a}]")),
                (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("{a}[{b}]")),
                (inner.clone(), inner.clone(), inner.clone()).prop_map(|(a, b, c)| format!("({a} ? {b} : {c})")),
                inner.clone().prop_map(|a| format!("-({a})")),
                inner.clone().prop_map(|a| format!("!({a})")),
                (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("[{a}].map(i, {b})")),
                (inner.clone(), inner).prop_map(|(a, b)| format!("[{a}, 1].all(i, i == {b})")),
            ]
        })
    }

    fn harmless(text: &str) {
        match one(text, Roots::RecordAndReply) {
            Err(refusal) => assert!(!refusal.message.contains("could not be compiled"), "{text}"),
            Ok(expression) => record(r#"{"a": -9223372036854775808, "items": [1, 2.5, "x", null, {"a": []}]}"#, |record| {
                let body: &[u8] = br#"{"total": 1e308}"#;
                let reply = ReplyView { status: 200, body: Some(body), headers: &NoHeaders };
                let _ = expression.evaluate(record, Some(&reply));
            }),
        }
    }

    proptest! {
        #[test]
        fn words_do_no_harm(words in vec(proptest::sample::select(WORDS.to_vec()), 0..60)) {
            harmless(&words.concat());
        }

        #[test]
        fn characters_do_no_harm(text in "\\PC{0,60}") {
            harmless(&text);
            harmless(&format!("record.text == {text}"));
        }

        #[test]
        fn expressions_do_no_harm(text in expression()) {
            harmless(&text);
            harmless(&format!("{text} == {text}"));
        }
    }
}
