//! Values that match and values that do not, and schemas that are made to do harm.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;

fn schema(value: Value) -> Schema {
    Schema::compile(&SchemaSpec::Json(value)).unwrap_or_else(|refusal| panic!("{}", refusal.message))
}

fn refused(value: Value) -> String {
    Schema::compile(&SchemaSpec::Json(value)).map(|_| String::new()).unwrap_or_else(|refusal| refusal.message)
}

/// The place of the fault of each value; `ok` for none.
#[track_caller]
fn faults(value: Value, cases: &[(&str, &str)]) {
    let schema = schema(value);
    for (text, place) in cases {
        let found = schema.check(text.as_bytes()).map_or_else(|mismatch| mismatch.path, |()| "ok".to_owned());
        assert_eq!(&found, place, "{text}: {:?}", schema.check(text.as_bytes()));
    }
}

#[test]
fn the_first_fault_is_found_at_its_place() {
    let order = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://shop.example/order",
        "type": "object",
        "required": ["id", "items"],
        "additionalProperties": false,
        "properties": {
            "id": { "type": "string", "pattern": "^o-[0-9]+$" },
            "items": { "type": "array", "minItems": 1, "items": { "$ref": "#/$defs/item" } },
            "note~/": { "type": ["string", "null"], "maxLength": 3 }
        },
        "$defs": { "item": { "type": "object", "required": ["price"], "properties": {
            "price": { "type": "number", "exclusiveMinimum": 0, "multipleOf": 0.01 },
            "parts": { "type": "array", "items": { "$ref": "https://shop.example/order#/$defs/item" } }
        } } }
    });
    faults(
        order.clone(),
        &[
            (r#"{"id":"o-1","items":[{"price":19.99}]}"#, "ok"),
            (r#"{"id":"o-1","items":[{"price":1,"parts":[{"price":2,"parts":[]}]}],"note~/":null}"#, "ok"),
            (r#"{"id":"o-1","items":[{"price":1},{"price":0}]}"#, "/items/1/price"),
            (r#"{"id":"o-1","items":[{"price":1.001}]}"#, "/items/0/price"),
            (r#"{"id":"o-1","items":[{"price":1,"parts":[{"price":"2"}]}]}"#, "/items/0/parts/0/price"),
            (r#"{"id":"o-1","items":[{}]}"#, "/items/0"),
            (r#"{"id":"o-1","items":[]}"#, "/items"),
            (r#"{"id":"1","items":[{"price":1}]}"#, "/id"),
            (r#"{"items":[{"price":1}]}"#, ""),
            (r#"{"id":"o-1","items":[{"price":1}],"more":1}"#, "/more"),
            (r#"{"id":"o-1","items":[{"price":1}],"note~/":"éééé"}"#, "/note~0~1"),
            ("[]", ""),
            ("hello", ""),
            ("", ""),
            ("{\"id\":", ""),
            ("\u{0}", ""),
        ],
    );
    let text = schema(order).check(br#"{"id":"o-1","items":[{"price":-1}]}"#).unwrap_err().to_string();
    assert_eq!(text, "/items/0/price is -1, not above 0");
    assert!(schema(json!({})).check(b"\xff").unwrap_err().to_string().starts_with("the value is not JSON: "));
}

#[test]
fn keywords_mean_what_the_standard_says() {
    faults(json!(true), &[("1", "ok")]);
    faults(json!(false), &[("1", "")]);
    faults(json!({ "type": "integer" }), &[("1", "ok"), ("1.0", "ok"), ("1.5", ""), ("1e2", "ok"), ("\"1\"", "")]);
    faults(
        json!({ "enum": [1, "a", null, { "b": [1] }] }),
        &[("1.0", "ok"), ("\"a\"", "ok"), ("{\"b\":[1.0]}", "ok"), ("2", ""), ("false", "")],
    );
    faults(json!({ "const": 9007199254740993_u64 }), &[("9007199254740993", "ok"), ("9007199254740992", "")]);
    faults(
        json!({ "minimum": 2, "maximum": 4, "multipleOf": 2 }),
        &[("2", "ok"), ("4.0", "ok"), ("3", ""), ("1", ""), ("5", ""), ("\"x\"", "ok")],
    );
    faults(
        json!({ "$schema": "http://json-schema.org/draft-04/schema#", "minimum": 2, "exclusiveMinimum": true }),
        &[("2", ""), ("3", "ok")],
    );
    faults(
        json!({ "prefixItems": [{ "type": "string" }], "items": { "type": "number" } }),
        &[("[\"a\",1]", "ok"), ("[1]", "/0"), ("[\"a\",\"b\"]", "/1")],
    );
    faults(json!({ "items": [{ "type": "string" }], "additionalItems": false }), &[("[\"a\"]", "ok"), ("[\"a\",1]", "/1")]);
    faults(json!({ "uniqueItems": true }), &[("[1,2,\"1\"]", "ok"), ("[1,1.0]", ""), ("[{\"a\":1},{\"a\":1}]", "")]);
    faults(json!({ "contains": { "const": 1 }, "maxContains": 2 }), &[("[0,1]", "ok"), ("[0]", ""), ("[1,1,1]", ""), ("{}", "ok")]);
    faults(json!({ "contains": { "const": 1 }, "minContains": 0 }), &[("[]", "ok")]);
    faults(
        json!({ "patternProperties": { "^x": { "type": "number" } }, "additionalProperties": { "type": "string" }, "maxProperties": 2 }),
        &[("{\"x1\":1,\"y\":\"a\"}", "ok"), ("{\"x1\":\"a\"}", "/x1"), ("{\"y\":1}", "/y"), ("{\"a\":\"\",\"b\":\"\",\"c\":\"\"}", "")],
    );
    faults(json!({ "propertyNames": { "maxLength": 2 } }), &[("{\"ab\":1}", "ok"), ("{\"abc\":1}", "")]);
    faults(json!({ "dependentRequired": { "a": ["b"] } }), &[("{\"a\":1,\"b\":1}", "ok"), ("{\"a\":1}", ""), ("{}", "ok")]);
    faults(
        json!({ "dependencies": { "a": { "required": ["b"] }, "c": ["d"] } }),
        &[("{\"a\":1}", ""), ("{\"c\":1}", ""), ("{\"c\":1,\"d\":1}", "ok")],
    );
    faults(json!({ "anyOf": [{ "type": "string" }, { "minimum": 5 }] }), &[("\"a\"", "ok"), ("5", "ok"), ("4", "")]);
    faults(json!({ "oneOf": [{ "type": "number" }, { "minimum": 5 }] }), &[("4", "ok"), ("5", ""), ("\"a\"", "ok")]);
    faults(json!({ "not": { "type": "string" } }), &[("1", "ok"), ("\"a\"", "")]);
    faults(
        json!({ "if": { "properties": { "kind": { "const": "a" } } }, "then": { "required": ["x"] }, "else": { "required": ["y"] } }),
        &[("{\"kind\":\"a\",\"x\":1}", "ok"), ("{\"kind\":\"a\"}", ""), ("{\"kind\":\"b\",\"y\":1}", "ok"), ("{\"kind\":\"b\"}", "")],
    );
    faults(json!({ "$ref": "#named", "$defs": { "a": { "$anchor": "named", "type": "null" } } }), &[("null", "ok"), ("1", "")]);
    faults(
        json!({ "$ref": "#/$defs/a%20b", "type": "object", "$defs": { "a b": { "minProperties": 1 } } }),
        &[("{\"a\":1}", "ok"), ("{}", ""), ("1", "")],
    );
    // `format` says nothing by itself, and what is not known says nothing at all.
    faults(json!({ "format": "email", "x-owner": "us", "$comment": "…" }), &[("\"no mail\"", "ok")]);
}

#[test]
fn what_cannot_be_obeyed_is_refused_by_name() {
    for (value, part) in [
        (json!({ "$ref": "https://elsewhere.example/x.json" }), "another document"),
        (json!({ "$ref": "file:///etc/passwd" }), "another document"),
        (json!({ "$ref": "#/$defs/none" }), "not there"),
        (json!({ "properties": { "a": { "$dynamicRef": "#x" } } }), "/properties/a"),
        (json!({ "unevaluatedProperties": false }), "unevaluatedProperties"),
        (json!({ "$schema": "https://example.com/mine" }), "$schema"),
        (json!({ "type": "text" }), "no type"),
        (json!({ "properties": { "a": 5 } }), "/properties/a"),
        (json!({ "required": true }), "required"),
        (json!({ "pattern": "(?=x)" }), "pattern"),
        (json!({ "pattern": "(" }), "pattern"),
        (json!({ "multipleOf": 0 }), "multipleOf"),
        (json!({ "enum": [] }), "enum"),
        (json!([]), "expected an object"),
        (json!("text"), "expected an object"),
    ] {
        let message = refused(value.clone());
        assert!(message.contains(part), "{value}: {message:?} does not say {part}");
    }
}

/// The validators that others use overflow the stack on the first of these, and never end on the others.
#[test]
fn a_hostile_schema_is_refused_or_gives_up() {
    for value in [
        json!({ "$ref": "#" }),
        json!({ "allOf": [{ "$ref": "#" }] }),
        json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "not": { "$ref": "#/$defs/a" } } } }),
        json!({ "if": true, "then": { "oneOf": [true, { "$ref": "#" }] } }),
    ] {
        assert!(refused(value.clone()).contains("refers to itself"), "{value}");
    }
    // A pattern that would be huge.
    assert!(refused(json!({ "pattern": "((a{1000}){1000}){1000}" })).contains("pattern"));
    let begun = Instant::now();
    // Patterns that others run in exponential time.
    let slow = format!("\"{}!\"", "a".repeat(50_000));
    assert!(schema(json!({ "pattern": "^(a+)+$" })).check(slow.as_bytes()).is_err());
    // 2^40 visits at one place of the value.
    let mut doubling = json!({ "$ref": "#/$defs/d0", "$defs": {} });
    for level in 0..40 {
        let next = json!({ "$ref": format!("#/$defs/d{}", level + 1) });
        doubling["$defs"][format!("d{level}")] = json!({ "allOf": [next.clone(), next] });
    }
    doubling["$defs"]["d40"] = json!({ "type": "number" });
    let mismatch = schema(doubling).check(b"1").unwrap_err();
    assert!(mismatch.reason.contains("more work"), "{mismatch}");
    // Visits that double with each level of the value, and are hidden from the verdict by `not`.
    let tree = json!({ "allOf": [{ "properties": { "x": { "$ref": "#" } } }, { "not": { "required": ["x"], "properties": { "x": { "not": { "$ref": "#" } } } } }] });
    let deep = format!("{}1{}", "{\"x\":".repeat(100), "}".repeat(100));
    assert!(schema(tree).check(deep.as_bytes()).unwrap_err().reason.contains("more work"));
    // A chain of references that is deeper than any stack.
    let mut chain = json!({ "$ref": "#/$defs/c0", "$defs": {} });
    for level in 0..4_000 {
        chain["$defs"][format!("c{level}")] = json!({ "$ref": format!("#/$defs/c{}", level + 1) });
    }
    chain["$defs"]["c4000"] = json!(true);
    assert!(schema(chain).check(b"1").unwrap_err().reason.contains("more work"));
    let many: serde_json::Map<String, Value> = (0..6_000).map(|number| (format!("p{number}"), json!(true))).collect();
    assert!(refused(json!({ "properties": many })).contains("more than"));
    // Values that are deep, or long.
    let recursive = schema(json!({ "items": { "$ref": "#" }, "uniqueItems": true }));
    assert!(recursive.check("[".repeat(100_000).as_bytes()).unwrap_err().reason.contains("not JSON"));
    assert!(recursive.check(format!("{}{}", "[".repeat(120), "]".repeat(120)).as_bytes()).is_ok());
    let long = format!("[{}]", (0..100_000).map(|number| number.to_string()).collect::<Vec<_>>().join(","));
    assert!(recursive.check(long.as_bytes()).is_ok());
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

/// A check must do on the stack of an async worker, deep as it may go, also in a build without optimisation.
#[test]
fn the_deepest_check_fits_a_small_stack() {
    let run = || {
        let tree = schema(json!({ "properties": { "x": { "$ref": "#/$defs/a" } }, "$defs": { "a": { "allOf": [{ "$ref": "#" }] } } }));
        let deep = format!("{}1{}", "{\"x\":".repeat(126), "}".repeat(126));
        tree.check(deep.as_bytes())
    };
    let checked = std::thread::Builder::new().stack_size(1 << 20).spawn(run).unwrap().join().unwrap();
    assert!(checked.is_err_and(|mismatch| mismatch.reason.contains("more work")));
}

/// `shop.Order { string id = 1; repeated Item items = 2; repeated int32 codes = 3; required? no }`, `shop.Item { double price = 1; bytes raw = 2; Order of = 3; }`.
fn shop() -> SchemaSpec {
    use prost_reflect::prost_types::{
        DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
        field_descriptor_proto::{Label, Type},
    };
    let field = |name: &str, number: i32, kind: Type, label: Label, of: Option<&str>| FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        r#type: Some(kind.into()),
        label: Some(label.into()),
        type_name: of.map(str::to_owned),
        ..FieldDescriptorProto::default()
    };
    let message =
        |name: &str, field: Vec<FieldDescriptorProto>| DescriptorProto { name: Some(name.to_owned()), field, ..DescriptorProto::default() };
    let file = FileDescriptorProto {
        name: Some("shop.proto".to_owned()),
        package: Some("shop".to_owned()),
        message_type: vec![
            message(
                "Order",
                vec![
                    field("id", 1, Type::String, Label::Required, None),
                    field("items", 2, Type::Message, Label::Repeated, Some(".shop.Item")),
                    field("codes", 3, Type::Int32, Label::Repeated, None),
                ],
            ),
            message(
                "Item",
                vec![
                    field("price", 1, Type::Double, Label::Optional, None),
                    field("raw", 2, Type::Bytes, Label::Optional, None),
                    field("of", 3, Type::Message, Label::Optional, Some(".shop.Order")),
                ],
            ),
        ],
        ..FileDescriptorProto::default()
    };
    let set = prost_reflect::prost::Message::encode_to_vec(&FileDescriptorSet { file: vec![file] });
    SchemaSpec::Protobuf {
        descriptor: base64::Engine::encode(&base64::engine::general_purpose::STANDARD, set),
        message: "shop.Order".to_owned(),
    }
}

#[test]
fn protobuf_is_walked_to_the_place_of_the_fault() {
    let schema = Schema::compile(&shop()).unwrap_or_else(|refusal| panic!("{}", refusal.message));
    let item = |price: &[u8]| [&[0x12, price.len() as u8][..], price].concat();
    let id: &[u8] = b"\x0a\x03o-1";
    let price: &[u8] = b"\x09\0\0\0\0\0\0\x24\x40";
    for (value, place) in [
        (id.to_vec(), "ok"),
        ([id, &item(price), &item(b"\x12\x01\xff")].concat(), "ok"),
        // Packed and not, and fields that are not known.
        ([id, b"\x1a\x02\x01\x02\x18\x05\xa0\x06\x01\xab\x06\x08\x01\xac\x06"].concat(), "ok"),
        (b"\x0a\x01\xff".to_vec(), "/id"),
        (b"\x08\x01".to_vec(), "/id"),
        (b"\x0a\x09o".to_vec(), "/id"),
        (Vec::new(), ""),
        ([id, &item(price), &item(b"\x0a\x01x")].concat(), "/items/1/price"),
        ([id, &item(b"\x1a\x00")].concat(), "/items/0/of"),
        ([id, b"\x1a\x01\x80"].concat(), "/codes/0"),
        (b"{\"id\":\"o-1\"}".to_vec(), ""),
        (b"hello".to_vec(), ""),
        ([id, b"\xab\x06\x08"].concat(), ""),
        ([id, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"].concat(), ""),
    ] {
        let found = schema.check(&value).map_or_else(|mismatch| mismatch.path, |()| "ok".to_owned());
        assert_eq!(found, place, "{value:x?}: {:?}", schema.check(&value));
    }
    assert_eq!(schema.check(b"").unwrap_err().to_string(), "the value lacks the required field `id`");
    // Nested as deep as a message can be.
    let mut deep = id.to_vec();
    for _ in 0..200 {
        let of = [&[0x1a][..], &varint(deep.len()), &deep].concat();
        deep = [id, &[0x12], &varint(of.len()), &of].concat();
    }
    assert!(schema.check(&deep).unwrap_err().reason.contains("nested"));
    assert!(schema.check(&[id, &b"\xab\x06".repeat(200)].concat()).unwrap_err().reason.contains("nested"));
}

fn varint(mut number: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
    out
}

#[test]
fn a_descriptor_that_is_none_is_refused() {
    let SchemaSpec::Protobuf { descriptor, .. } = shop() else { unreachable!() };
    let with = |descriptor: &str, message: &str| {
        let spec = SchemaSpec::Protobuf { descriptor: descriptor.to_owned(), message: message.to_owned() };
        Schema::compile(&spec).map(|_| String::new()).unwrap_or_else(|refusal| format!("{}; {}", refusal.message, refusal.hint))
    };
    assert!(with("%%", "shop.Order").contains("base64"));
    assert!(with("AAAA", "shop.Order").contains("descriptor"));
    assert!(with(&descriptor, "shop.Other").contains("shop.Item"));
    assert_eq!(with(&descriptor, "shop.Item"), "");
}

/// Whatever bytes come, a check ends and does not panic.
#[test]
fn no_bytes_break_a_check() {
    let schemas = [schema(json!({ "type": "object", "properties": { "a": { "minimum": 1 } } })), Schema::compile(&shop()).ok().unwrap()];
    let mut state = 1_u64;
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..state % 40)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as u8
            })
            .collect();
        state = state.wrapping_add(1);
        for schema in &schemas {
            let _ = schema.check(&bytes);
        }
    }
}
