use super::*;

const ORDERS: &str = "/v1/topics/orders/records";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[tokio::test]
async fn one_record_is_published_with_all_its_fields() {
    let world = World::new().await;
    let headers = [
        ("content-type", "text/plain"),
        ("mesh-key", "a%20key"),
        ("mesh-id", "id-\"1\""),
        ("mesh-header-x", "y"),
        ("mesh-timestamp", "1234"),
        ("baggage", "a=b"),
    ];
    let answer = world.post(ORDERS, &headers, "hello").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, r#"{"topic":"orders","partition":0,"offset":0,"mesh_id":"id-\"1\""}"#);
    let record = &world.fake.records("orders")[0];
    assert_eq!(record.key.as_deref(), Some(&b"a key"[..]));
    assert_eq!(record.value.as_deref(), Some(&b"hello"[..]));
    assert_eq!(record.timestamp_ms, Some(1234));
    for (name, value) in [("content-type", "text/plain"), ("mesh-id", "id-\"1\""), ("x", "y"), ("baggage", "a=b")] {
        assert_eq!(record.header_str(name), Some(value), "{name}");
    }
    assert_eq!(record.header("traceparent"), None);
}

#[tokio::test]
async fn an_identity_is_made_and_curl_needs_no_type() {
    let world = World::new().await;
    let answer = world.post(ORDERS, &[("content-type", "application/x-www-form-urlencoded")], "{}").await;
    let record = &world.fake.records("orders")[0];
    assert_eq!(record.header_str("mesh-id"), answer.json["mesh_id"].as_str());
    assert_eq!(uuid::Uuid::parse_str(answer.json["mesh_id"].as_str().unwrap()).unwrap().get_version_num(), 7);
    assert_eq!(record.headers.len(), 1);
}

#[tokio::test]
async fn contexts_pass_and_malformed_ones_are_absent() {
    let world = World::new().await;
    assert_eq!(world.post(ORDERS, &[("traceparent", "00-nonsense-01"), ("tracestate", "a=b")], "1").await.status, 200);
    assert_eq!(world.post(ORDERS, &[("traceparent", PARENT), ("tracestate", "a=b")], "1").await.status, 200);
    let records = world.fake.records("orders");
    assert_eq!((records[0].header("traceparent"), records[0].header("tracestate")), (None, None));
    if TraceContext::parse(PARENT.as_bytes(), None).is_some() {
        assert_eq!((records[1].header_str("traceparent"), records[1].header_str("tracestate")), (Some(PARENT), Some("a=b")));
        let answer = world.post("/v1/topics/none/records", &[("traceparent", PARENT)], "1").await;
        assert_eq!(answer.problem(404, "unknown-topic")["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    }
}

#[tokio::test]
async fn tombstones_are_explicit() {
    let world = World::new().await;
    world.post(ORDERS, &[], "").await.problem(400, "no-body");
    world.post(ORDERS, &[("mesh-tombstone", "true")], "x").await.problem(400, "tombstone-with-body");
    assert_eq!(world.post(ORDERS, &[("mesh-tombstone", "true"), ("mesh-key", "k")], "").await.status, 200);
    assert_eq!(world.fake.records("orders")[0].value, None);
}

#[tokio::test]
async fn topics_are_checked() {
    let mut config = config(&["a"]);
    config.services[0].publish = Some(vec!["orders".to_owned()]);
    let world = World::with(config, Fake::new(&["orders", "other"])).await;
    for (topic, status, code) in [
        ("a%2Fb", 400, "invalid-topic"),
        ("%ff", 400, "invalid-topic"),
        ("void", 400, "invalid-topic"),
        ("__mesh.control", 403, "forbidden-topic"),
        ("other", 403, "forbidden-topic"),
    ] {
        world.post(&format!("/v1/topics/{topic}/records"), &[], "x").await.problem(status, code);
    }
    assert_eq!(world.post("/v1/topics/order%73/records", &[], "x").await.status, 200);
}

#[tokio::test]
async fn unknown_topics_are_asked_for() {
    let fake = Fake::new(&[]);
    fake.0.lock().unwrap().unlearned.push("late".to_owned());
    let world = World::with(config(&["a"]), fake).await;
    assert_eq!(world.post("/v1/topics/late/records", &[], "x").await.status, 200);
    let answer = world.post("/v1/topics/none/records", &[], "x").await;
    assert!(answer.problem(404, "unknown-topic")["hint"].as_str().unwrap().contains("routing table"));
    world.fake.0.lock().unwrap().learn = ProduceErrorKind::TimedOut;
    assert_eq!(world.post("/v1/topics/none/records", &[], "x").await.problem(503, "broker-unavailable")["persisted"], "no");
}

#[tokio::test]
async fn failures_of_the_broker_have_their_statuses() {
    let world = World::new().await;
    for (kind, status, code, persisted, retry_after) in [
        (ProduceErrorKind::QueueFull, 429, "queue-full", "no", true),
        (ProduceErrorKind::Unavailable, 503, "broker-unavailable", "no", true),
        (ProduceErrorKind::TimedOut, 504, "publish-timeout", "possibly", false),
        (ProduceErrorKind::Fatal, 503, "producer-failed", "possibly", true),
        (ProduceErrorKind::TooLarge, 413, "record-too-large", "no", false),
        (ProduceErrorKind::Unauthorized, 403, "broker-forbids", "no", false),
        (ProduceErrorKind::Refused, 422, "broker-refuses", "no", false),
        (ProduceErrorKind::UnknownTopic, 404, "unknown-topic", "no", false),
    ] {
        world.fake.set(Mode::Fail(kind));
        let answer = world.post(ORDERS, &[], "x").await;
        assert_eq!(answer.problem(status, code)["persisted"], persisted);
        assert_eq!(answer.headers.contains_key("retry-after"), retry_after, "{code}");
    }
    world.fake.set(Mode::Silent);
    assert_eq!(world.post(ORDERS, &[], "x").await.problem(504, "publish-timeout")["persisted"], "possibly");
    world.fake.set(Mode::Store);
    world.fake.0.lock().unwrap().health = Some("no broker at 1.2.3.4:9092".to_owned());
    let answer = world.post(ORDERS, &[], "x").await;
    assert!(answer.problem(503, "broker-unavailable")["detail"].as_str().unwrap().contains("1.2.3.4"));
    assert_eq!(answer.json["retryable"], true);
}

#[tokio::test]
async fn bad_requests_are_named() {
    let world = World::new().await;
    let post = |headers: &'static [(&'static str, &'static str)], body: &'static str| world.post(ORDERS, headers, body);
    assert!(post(&[("mesh-header-x", "\u{ff}")], "x").await.status == 200);
    let request = Request::post(ORDERS).header("host", "s").header("mesh-header-x", http::HeaderValue::from_bytes(b"\xff\xfe").unwrap());
    let answer = world.send(request.body(Full::new(Bytes::from("x"))).unwrap()).await;
    assert!(answer.problem(400, "invalid-header")["detail"].as_str().unwrap().contains("mesh-header-x"));
    post(&[("origin", "http://evil.example")], "x").await.problem(403, "cross-origin");
    post(&[("mesh-hops", "1")], "x").await.problem(400, "invalid-header");
    post(&[("mesh-header-mesh-hops", "1")], "x").await.problem(400, "invalid-header");
    post(&[("mesh-timestamp", "-1")], "x").await.problem(400, "invalid-field");
    post(&[("content-type", "nonsense")], "x").await.problem(415, "unsupported-media-type");
    post(&[("content-type", "multipart/form-data; boundary=x")], "x").await.problem(415, "unsupported-media-type");
    post(&[("content-type", "application/vnd.mesh.other+json")], "x").await.problem(415, "unsupported-media-type");
    post(&[("content-encoding", "gzip")], "x").await.problem(415, "unsupported-media-type");
    world.post("/v1/topics/orders/records?key=a", &[], "x").await.problem(400, "bad-parameter");
    world.post("/v1/topics/orders", &[], "x").await.problem(404, "unknown-path");
    let answer = world.send(Request::delete(ORDERS).header("host", "s").body(Full::default()).unwrap()).await;
    answer.problem(405, "method-not-allowed");
    assert!(answer.headers["allow"].to_str().unwrap().contains("POST"));
}

#[tokio::test]
async fn large_bodies_are_refused_and_the_answer_arrives() {
    let world = World::new().await;
    world.post(ORDERS, &[], vec![b'x'; 20 * 1024 * 1024]).await.problem(413, "body-too-large");
    // The value fits, and its headers do not.
    world.post(ORDERS, &[("mesh-key", "key")], vec![b'x'; 1024 * 1024]).await.problem(413, "record-too-large");
    // Without a length.
    let stream = TcpStream::connect(world.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let frames = (0..20).map(|_| Ok::<_, Infallible>(http_body::Frame::data(Bytes::from(vec![b'x'; 1024 * 1024]))));
    let body = http_body_util::StreamBody::new(futures_util::stream::iter(frames));
    let response = sender.send_request(Request::post(ORDERS).header("host", "s").body(body).unwrap()).await.unwrap();
    assert_eq!(response.status(), 413);
    drop(driver);
}

#[tokio::test]
async fn several_services_name_themselves() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("t"), "s3cret").unwrap();
    let mut strict = config(&["a", "b"]);
    strict.services[0].token_file = Some(folder.path().join("t"));
    let world = World::with(strict, Fake::new(&["orders"])).await;
    world.post(ORDERS, &[], "x").await.problem(400, "unnamed-service");
    world.post(ORDERS, &[("mesh-service", "c")], "x").await.problem(400, "unknown-service");
    let answer = world.post(ORDERS, &[("mesh-service", "a")], "x").await;
    answer.problem(401, "unauthenticated");
    assert_eq!(answer.headers["www-authenticate"], "Bearer");
    assert_eq!(world.post(ORDERS, &[("mesh-service", "b")], "x").await.status, 200);
    assert_eq!(world.post(ORDERS, &[("authorization", "Bearer s3cret")], "x").await.status, 200);
    let open = World::with(config(&["a", "b"]), Fake::new(&["orders"])).await;
    assert_eq!(open.post(ORDERS, &[], "x").await.status, 200);
}

#[tokio::test]
async fn batches_are_answered_per_record() {
    let world = World::new().await;
    let batch = [("content-type", "application/vnd.mesh.records+json")];
    let body = r#"{"records":[{"key":"k","value":{"a":1}},{"value":{"base64":"%"}},{"value":null,"headers":{"h":"1"}}]}"#;
    let answer = world.post(ORDERS, &batch, body).await;
    assert_eq!(answer.status, 207, "{:?}", answer.body);
    assert_eq!(answer.json["results"][0]["offset"], 0);
    assert_eq!(answer.json["results"][1]["problem"]["code"], "bad-record");
    assert!(answer.json["results"][1]["problem"]["detail"].as_str().unwrap().contains("record 1"));
    assert_eq!(answer.json["results"][2]["offset"], 1);
    let records = world.fake.records("orders");
    assert_eq!(records[0].value.as_deref(), Some(&br#"{"a":1}"#[..]));
    assert_eq!((&records[1].value, records[1].header_str("h")), (&None, Some("1")));

    assert_eq!(world.post(ORDERS, &batch, r#"{"records":[{"value":1},{"value":"x"}]}"#).await.status, 200);
    assert_eq!(world.post(ORDERS, &batch, r#"{"records":[]}"#).await.status, 200);
    let answer = world.post(ORDERS, &batch, r#"{"records":[{},{"value":1,"headers":7}]}"#).await;
    assert_eq!(answer.problem(400, "bad-record")["results"].as_array().unwrap().len(), 2);
    let answer = world.post(ORDERS, &batch, "{\"records\":[{\"value\":1},\n{\"value\":}]}").await;
    let detail = answer.problem(400, "bad-json")["detail"].as_str().unwrap();
    assert!(detail.contains("line 2, column 10") && detail.contains("record 1"), "{detail}");
    assert_eq!(world.fake.records("orders").len(), 4);
    world.post(ORDERS, &[batch[0], ("mesh-id", "one")], "{}").await.problem(400, "invalid-header");
    world.post(ORDERS, &batch, vec![b' '; 5 * 1024 * 1024]).await.problem(413, "body-too-large");
    world.fake.set(Mode::Fail(ProduceErrorKind::QueueFull));
    let answer = world.post(ORDERS, &batch, r#"{"records":[{"value":1},{"value":2}]}"#).await;
    answer.problem(429, "queue-full");
    assert!(answer.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn a_shutdown_finishes_what_is_in_flight() {
    let world = World::new().await;
    world.fake.set(Mode::Silent);
    let request = Request::post(ORDERS).header("host", "s").body(Full::new(Bytes::from("x"))).unwrap();
    let (answer, ()) = tokio::join!(world.send(request), async {
        // The request is inside once it is counted.
        while world.fake.0.lock().unwrap().sends == 0 {
            tokio::task::yield_now().await;
        }
        world.shutdown.cancel();
    });
    answer.problem(504, "publish-timeout");
    assert_eq!(world.serving.await.unwrap(), 0);
}
