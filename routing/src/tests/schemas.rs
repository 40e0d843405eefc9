//! Schemas of topics, in whole tables.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::fault::code;

fn table(topics: &str) -> String {
    format!(
        "apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: shop }}\nspec:\n  topics:\n{topics}\n  routes:\n  - {{ name: r, service: s, from: [in], handler: /, to: [out, plain], cases: [{{ status: 202, to: [odd] }}] }}\n"
    )
}

const OUT: &str = "    out:
      partitions: 4
      schema:
        json:
          type: object
          required: [id, 'yes']
          properties:
            id: { type: string, const: '5', description: \"a: b # c\\nnext\" }
            n: { multipleOf: 0.01, maximum: 18446744073709551615, minimum: -1e300 }
            'yes': { enum: [true, null, yes, 1.5, '1.5', '', 0x10] }";

#[test]
fn a_schema_survives_printing_and_reading() {
    let read = parse("t", &table(OUT)).unwrap();
    let Some(SchemaSpec::Json(value)) = &read.topics["out"].schema else { panic!() };
    assert_eq!(value["properties"]["yes"]["enum"], json!([true, null, "yes", 1.5, "1.5", "", "0x10"]));
    assert_eq!(value["properties"]["n"]["maximum"], json!(u64::MAX));
    assert_eq!(value["properties"]["id"]["description"], "a: b # c\nnext");
    for text in [read.to_json(), read.to_yaml()] {
        let again = parse("t", &text).unwrap_or_else(|faults| panic!("{faults}\n{text}"));
        assert_eq!(again, read, "{text}");
        assert_eq!(again.digest(), read.digest());
    }
    // As the text of a JSON document, it is the same schema.
    let text = format!("    out: {{ partitions: 4, schema: {{ json: '{}' }} }}", value.to_string().replace('\'', "''"));
    assert_eq!(parse("t", &table(&text)).unwrap(), read);
}

#[test]
fn an_answer_is_checked_for_all_its_topics_and_a_change_of_schema_is_a_change_of_the_route() {
    let compiled = |topics: &str| compile(&parse("t", &table(topics)).unwrap()).unwrap();
    let table = compiled("    out: { schema: { json: { type: object } } }\n    odd: { schema: { json: { type: number } } }");
    let route = &table.routes[0];
    let topics = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect::<Vec<Arc<str>>>();
    let check = |names: &[&str], values: &[Option<&[u8]>]| {
        route.check_values(&topics(names), values.iter().copied()).map_err(|(topic, index, _)| format!("{topic} {index}"))
    };
    assert_eq!(check(&["out", "plain"], &[Some(b"{}"), None, Some(b"{}")]), Ok(()));
    assert_eq!(check(&["plain", "out"], &[Some(b"{}"), Some(b"no JSON")]), Err("out 1".to_owned()));
    assert_eq!(check(&["plain"], &[Some(b"no JSON")]), Ok(()));
    assert_eq!(check(&["odd"], &[Some(b"{}")]), Err("odd 0".to_owned()));
    assert!(table.schema("out").is_some() && table.schema("plain").is_none());
    assert!(**route != *compiled("    out: { schema: { json: { type: array } } }").routes[0]);
    assert!(*compiled("    out: { schema: { json: {} } }").routes[0] == *compiled("    out: { schema: { json: {} } }").routes[0]);
}

#[test]
fn a_schema_that_cannot_be_used_is_a_fault_at_its_place() {
    let faults = |topics: &str| -> Vec<(String, &'static str)> {
        let Err(Faults(list)) = parse("t", &table(topics)) else { return Vec::new() };
        list.into_iter()
            .inspect(|fault| assert!(fault.line > 0 && !fault.message.is_empty(), "{fault:?}"))
            .map(|f| (f.field, f.code))
            .collect()
    };
    let one = |topics: &str, field: &str, code: &'static str| assert_eq!(faults(topics), [(field.to_owned(), code)], "{topics:.200}");
    let place = "spec.topics.out.schema";
    one("    out: { schema: { json: { type: text } } }", place, code::SCHEMA);
    one("    out: { schema: { json: { $ref: '#' } } }", place, code::SCHEMA);
    one("    out: { schema: { json: { $ref: 'https://x.example/y' } } }", place, code::SCHEMA);
    one("    out: { schema: { json: '{' } }", "spec.topics.out.schema.json", code::VALUE);
    one("    out: { schema: {} }", place, code::VALUE);
    one("    out: { schema: { json: {}, protobuf: { descriptor: '', message: m } } }", place, code::VALUE);
    one("    out: { schema: { avro: {} } }", "spec.topics.out.schema.avro", code::UNKNOWN_FIELD);
    one("    out: { schema: { protobuf: { message: m } } }", "spec.topics.out.schema.protobuf.descriptor", code::MISSING);
    one("    out: { schema: { protobuf: { descriptor: '%', message: m } } }", place, code::SCHEMA);
    one("    r.dlq: { schema: { json: {} } }", "spec.routes[0].dead_letter", code::CONFLICT);
    let large = |name: &str, bytes: usize| format!("    {name}: {{ schema: {{ json: {{ description: {} }} }} }}", "x".repeat(bytes));
    one(&large("out", 200 << 10), place, code::LIMIT);
    let many: Vec<String> = (0..6).map(|number| large(&format!("t{number}"), 100 << 10)).collect();
    one(&many.join("\n"), "spec.topics.t5.schema", code::LIMIT);
    let mut deep = "true".to_owned();
    for _ in 0..200 {
        deep = format!("{{ items: {deep} }}");
    }
    assert!(
        faults(&format!("    out: {{ schema: {{ json: {deep} }} }}")).iter().any(|(_, code)| *code == code::LIMIT || *code == code::SYNTAX)
    );
    let fine = (0..20).fold("true".to_owned(), |inner, _| format!("{{ properties: {{ a: {inner} }} }}"));
    assert_eq!(faults(&format!("    out: {{ schema: {{ json: {fine} }} }}")), []);
}
