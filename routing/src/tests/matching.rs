//! What a route does with records and answers.

use super::*;

fn record(value: &[u8]) -> RecordView<'_> {
    RecordView { topic: "orders", partition: 0, offset: 1, timestamp_ms: 0, key: None, value: Some(value), headers: &NoHeaders }
}

fn reply(status: u16, body: &[u8]) -> ReplyView<'_> {
    ReplyView { status, body: Some(body), headers: &NoHeaders }
}

/// What the example's route decides, as the topics it forwards to.
fn decide(status: u16, body: &str) -> String {
    let compiled = compile(&parse("t", EXAMPLE).unwrap()).unwrap();
    let decision = compiled.routes[0].decide(&record(b"{}"), &reply(status, body.as_bytes()));
    match decision {
        Ok(Decision::Ignored) => "ignored".into(),
        Ok(Decision::NotAccepted) => "not accepted".into(),
        Ok(Decision::Forward(Destinations::Void) | Decision::Case(Destinations::Void)) => "void".into(),
        Ok(Decision::Forward(Destinations::Topics(topics)) | Decision::Case(Destinations::Topics(topics))) => topics.join(","),
        Err(error) => format!("error: {error}"),
    }
}

#[test]
fn the_first_row_that_fits_decides() {
    assert_eq!(decide(200, r#"{"total": 5}"#), "priced-orders");
    assert_eq!(decide(200, r#"{"total": 1001}"#), "fraud-check,priced-orders");
    assert_eq!(decide(202, r#"{"total": 1001}"#), "manual-review");
    assert_eq!(decide(204, ""), "ignored");
    assert_eq!(decide(304, r#"{"total": 1001}"#), "ignored");
    assert_eq!(decide(500, "oops"), "not accepted");
    assert_eq!(decide(404, r#"{"total": 1001}"#), "not accepted");
    let failed = decide(200, "no json");
    assert!(failed.starts_with("error: `reply.json.total > 1000.0`: reply.json.total: it is not JSON"), "{failed}");
}

#[test]
fn a_bad_status_that_is_named_is_a_good_answer() {
    let text = with_routes(
        "  - { name: a, service: s, from: [x], handler: /h, to: void, ignore_status: [404],\n      \
         cases: [ { status: 409, to: [conflicts] }, { status: 500, when: 'record.size == 2', to: void } ] }\n",
    );
    let compiled = compile(&parse("t", &text).unwrap()).unwrap();
    let decide = |status| compiled.routes[0].decide(&record(b"{}"), &reply(status, b"")).unwrap();
    assert!(matches!(decide(409), Decision::Case(Destinations::Topics(_))));
    assert_eq!(decide(500), Decision::Case(&Destinations::Void));
    assert_eq!(decide(404), Decision::Ignored);
    assert_eq!(decide(204), Decision::Forward(&Destinations::Void));
    assert_eq!(decide(503), Decision::NotAccepted);
}

#[test]
fn filters_admit() {
    let compiled = compile(&parse("t", EXAMPLE).unwrap()).unwrap();
    let admits = |value: &str| compiled.routes[0].admits(&record(value.as_bytes()));
    assert_eq!(admits(r#"{"country": "KR"}"#), Ok(true));
    assert_eq!(admits(r#"{"country": "FR"}"#), Ok(false));
    let error = admits("{}").unwrap_err();
    assert_eq!(error.message, "record.json.country: there is no such field");
    assert!(compile(&chain(&[("a", "x", "void")])).unwrap().routes[0].admits(&record(b"")).unwrap());
}

#[test]
fn a_when_without_a_status_is_about_good_answers_unless_it_asks() {
    let of = |when: &str, status| {
        let cases = format!("cases: [ {{ when: '{when}', to: [t] }} ]");
        let text = with_routes(&format!("  - {{ name: a, service: s, from: [x], handler: /h, to: void, {cases} }}\n"));
        let compiled = compile(&parse("t", &text).unwrap()).unwrap();
        let decision = compiled.routes[0].decide(&record(b"{}"), &reply(status, b"error page"));
        decision.map(|decision| matches!(decision, Decision::Case(Destinations::Topics(_)))).map_err(|_| ())
    };
    assert_eq!(of("reply.json.x == 1", 500), Ok(false));
    assert_eq!(of("reply.json.x == 1", 200), Err(()));
    assert_eq!(of("record.size > 0", 503), Ok(false));
    assert_eq!(of("record.size > 0", 200), Ok(true));
    assert_eq!(of("reply.status == 409", 409), Ok(true));
    assert_eq!(of("reply.status == 409 && reply.json.x == 1", 500), Ok(false));
}

#[test]
fn what_the_record_alone_decides_is_foreseen() {
    let foresee = |cases: &str, value: &str| {
        let text = with_routes(&format!("  - {{ name: a, service: s, from: [x], handler: /h, to: [t], cases: [{cases}] }}\n"));
        let compiled = compile(&parse("t", &text).unwrap()).unwrap();
        let foreseen = compiled.routes[0].foresee(&record(value.as_bytes())).map_err(|error| error.message)?;
        let word = |to: &&Destinations| match to {
            Destinations::Void => "void".to_owned(),
            Destinations::Topics(topics) => topics.join("+"),
        };
        let words: Vec<String> = foreseen.destinations.iter().map(word).collect();
        Ok::<_, String>(format!("{}{}", words.join("|"), if foreseen.by_reply { "?" } else { "" }))
    };
    assert_eq!(foresee("", "{}"), Ok("t".to_owned()));
    let by_record = "{ when: 'record.json.n > 1', to: [big] }";
    assert_eq!(foresee(by_record, r#"{"n": 2}"#), Ok("big".to_owned()));
    assert_eq!(foresee(by_record, r#"{"n": 1}"#), Ok("t".to_owned()));
    assert!(foresee(by_record, "{}").unwrap_err().contains("record.json.n"));
    assert_eq!(foresee("{ status: 202, to: void }", "{}"), Ok("void|t?".to_owned()));
    assert_eq!(foresee("{ status: 202, when: 'record.json.n > 1', to: void }", "{}"), Ok("void|t?".to_owned()), "asked of 202 alone");
    assert_eq!(foresee("{ when: 'has(reply.json.x)', to: [y] }, { when: 'record.size > 0', to: [z] }", "{}"), Ok("y|z?".to_owned()));
    for asks in ["reply.status == 200", "reply.size > 1", "has(reply.headers.a)", "reply.text == \"\"", "has(reply.json.a)"] {
        assert_eq!(foresee(&format!("{{ when: '{asks}', to: [y] }}"), "{}"), Ok("y|t?".to_owned()), "{asks}");
    }
}
