use super::*;

/// A streaming answer that is read piece by piece.
struct Reading {
    response: Response<Incoming>,
    text: String,
}

impl Reading {
    async fn open(world: &World, path: &str, accept: Option<&str>) -> Self {
        Self::with(world, path, accept.map(|accept| ("accept", accept)).as_slice()).await
    }

    async fn with(world: &World, path: &str, headers: &[(&str, &str)]) -> Self {
        let mut request = Request::get(path).header("host", "s");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Self { response: world.open(request.body(Full::default()).unwrap()).await, text: String::new() }
    }

    /// Reads until the text ends so.
    async fn until(&mut self, end: &str) -> &str {
        while !self.text.ends_with(end) {
            let frame = self.response.body_mut().frame().await.expect("the stream ended").unwrap();
            self.text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
        &self.text
    }

    async fn rest(mut self) -> String {
        while let Some(frame) = self.response.body_mut().frame().await {
            self.text.push_str(std::str::from_utf8(frame.unwrap().data_ref().unwrap()).unwrap());
        }
        self.text
    }
}

#[tokio::test]
async fn events_and_lines_have_their_forms() {
    let world = World::new().await;
    let mut events = Reading::open(&world, "/v1/topics/orders/records?from=earliest", Some("text/event-stream")).await;
    assert_eq!(events.response.headers()["content-type"], "text/event-stream");
    let consumer = world.consumer();
    assert_eq!((&consumer.config.group, consumer.config.start), (&None, StartOffset::Earliest));
    consumer.events.send(assigned(4)).await.unwrap();
    consumer.events.send(records(4, &[b"{\"a\":\n1}", b"\xff", b"text"])).await.unwrap();
    let text = events
        .until(
            "\"orders\",\"partition\":0,\"offset\":6,\"key\":null,\"value\":{\"text\":\"text\"},\"mesh_id\":\"id-6\",\"headers\":[]}\n\n",
        )
        .await;
    assert!(text.starts_with(": subscribed\nretry: 1000\n\nid: 0:4\n\nid: 0:5\ndata: {\"topic\":\"orders\","), "{text}");
    assert!(text.contains("\"value\":{\"json\":{\"a\": 1}}") && text.contains("\"value\":{\"base64\":\"/w==\"}"), "{text}");

    let mut lines = Reading::open(&world, "/v1/topics/orders/records", None).await;
    assert_eq!(lines.response.headers()["content-type"], "application/x-ndjson");
    let consumer = world.consumer();
    assert_eq!(consumer.config.start, StartOffset::Latest);
    consumer.events.send(assigned(0)).await.unwrap();
    consumer.events.send(records(0, &[b"1", b"\"two\""])).await.unwrap();
    let text = lines.until("\"headers\":[]}\n").await.to_owned();
    // What is read can be published.
    let answer = world.post("/v1/topics/orders/records", &[("content-type", "application/x-ndjson")], text).await;
    assert_eq!(answer.status, 200);
    let stored = world.fake.records("orders");
    assert_eq!(stored[0].value.as_deref(), Some(&b"1"[..]));
    assert_eq!(stored[0].header_str("mesh-id"), Some("id-0"));
}

/// Partitions 0 and 2.
fn two(first: i64, second: i64) -> Event {
    let one = |number, position| Assigned { partition: TopicPartition::new("orders", number), position, metadata: String::new() };
    Event::Assigned(vec![one(0, first), one(2, second)])
}

/// An id of one partition alone would make the others begin anew.
#[tokio::test]
async fn an_events_id_says_where_to_go_on_in_every_partition() {
    let world = World::new().await;
    let mut events = Reading::open(&world, "/v1/topics/orders/records", Some("text/event-stream")).await;
    let consumer = world.consumer();
    consumer.events.send(two(7, 9)).await.unwrap();
    // Before any record: who leaves now misses nothing either.
    assert!(events.until("id: 0:7,2:9\n\n").await.starts_with(": subscribed"));
    consumer.events.send(records(7, &[b"1", b"2"])).await.unwrap();
    let text = events.until("\"value\":{\"json\":2},\"mesh_id\":\"id-8\",\"headers\":[]}\n\n").await;
    assert!(text.contains("id: 0:8,2:9\ndata: {") && text.contains("id: 0:9,2:9\ndata: {"), "{text}");

    let path = "/v1/topics/orders/records?from=earliest";
    let _again = Reading::with(&world, path, &[("accept", "text/event-stream"), ("last-event-id", "0:9,2:9")]).await;
    let each = [(TopicPartition::new("orders", 0), 9), (TopicPartition::new("orders", 2), 9)];
    assert_eq!(world.consumer().config.start, StartOffset::Each(Arc::new(each.into())), "it wins over `from`");
    // Lines have no ids; who counts for himself says so by `from`.
    let _lines = Reading::open(&world, "/v1/topics/orders/records?from=0:3", None).await;
    assert_eq!(world.consumer().config.start, StartOffset::Each(Arc::new([(TopicPartition::new("orders", 0), 3)].into())));
    // A group goes on where it committed.
    let headers = [("accept", "text/event-stream"), ("last-event-id", "orders/0/4")];
    let _grouped = Reading::with(&world, "/v1/topics/orders/records?group=g", &headers).await;
    assert_eq!(world.consumer().config.start, StartOffset::Earliest);
    let bad = |path: &'static str, id: &'static str| {
        let request = Request::get(path).header("host", "s").header("accept", "text/event-stream").header("last-event-id", id);
        world.send(request.body(Full::default()).unwrap())
    };
    bad("/v1/topics/orders/records", "orders/0/4").await.problem(400, "invalid-header");
    bad("/v1/topics/orders/records?group=g&from=0:1", "").await.problem(400, "bad-parameter");
}

#[tokio::test]
async fn a_topic_of_many_partitions_has_its_long_ids_once_a_piece() {
    let world = World::new().await;
    let mut events = Reading::open(&world, "/v1/topics/orders/records", Some("text/event-stream")).await;
    let consumer = world.consumer();
    let one = |number| Assigned { partition: TopicPartition::new("orders", number), position: 0, metadata: String::new() };
    consumer.events.send(Event::Assigned((0..100).map(one).collect())).await.unwrap();
    events.until("99:0\n\n").await;
    consumer.events.send(records(0, &[b"1", b"2", b"3"])).await.unwrap();
    while events.text.matches("id: 0:").count() < 2 {
        let frame = events.response.body_mut().frame().await.expect("the stream ended").unwrap();
        events.text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
    }
    assert_eq!((events.text.matches("data: ").count(), events.text.contains("id: 0:3,1:0,")), (3, true), "{}", events.text);
}

#[tokio::test]
async fn a_group_commits_what_the_connection_took() {
    let world = World::new().await;
    let mut lines = Reading::open(&world, "/v1/topics/orders/records?group=g", Some("application/x-ndjson")).await;
    let mut consumer = world.consumer();
    assert_eq!((consumer.config.group.as_deref(), consumer.config.start), (Some("g"), StartOffset::Earliest));
    consumer.events.send(assigned(7)).await.unwrap();
    consumer.events.send(records(7, &[b"1", b"2"])).await.unwrap();
    lines.until("\"offset\":8,\"key\":null,\"value\":{\"json\":2},\"mesh_id\":\"id-8\",\"headers\":[]}\n").await;
    consumer.commits.wait_for(|commits| commits.last().is_some_and(|commit| commit.offset == 9)).await.unwrap();
    // The client goes, and so does the consumer.
    drop(lines);
    consumer.closed.wait_for(|closed| *closed).await.unwrap();
}

#[tokio::test]
async fn a_slow_client_holds_its_consumer() {
    let world = World::new().await;
    static LARGE: [u8; 100_000] = [b'x'; 100_000];
    let lines = Reading::open(&world, "/v1/topics/orders/records?group=g", None).await;
    let mut consumer = world.consumer();
    consumer.events.send(assigned(0)).await.unwrap();
    // Nobody reads: the sockets fill, then the bounded queues, then the partition is held.
    let mut next = 0;
    while consumer.held.borrow().is_empty() {
        if let Ok(room) = consumer.events.try_reserve() {
            room.send(records(next, &[&LARGE]));
            next += 1;
        } else {
            tokio::task::yield_now().await;
        }
        assert!(next < 500, "nothing held back {next} records");
    }
    assert!(consumer.commits.borrow().last().is_none_or(|commit| commit.offset < next));
    drop(lines);
    consumer.closed.wait_for(|closed| *closed).await.unwrap();
}

#[tokio::test]
async fn a_drain_ends_the_streams() {
    let world = World::new().await;
    let events = Reading::open(&world, "/v1/topics/orders/records", Some("text/event-stream")).await;
    let lines = Reading::open(&world, "/v1/topics/orders/records", None).await;
    world.draining.cancel();
    assert_eq!(events.rest().await, ": subscribed\nretry: 1000\n\nevent: draining\ndata: {}\n\n");
    assert_eq!(lines.rest().await, "");
    // Publishing goes on.
    assert_eq!(world.post("/v1/topics/orders/records", &[], "x").await.status, 200);
    let answer = world.send(Request::get("/v1/topics/orders/records").header("host", "s").body(Full::default()).unwrap()).await;
    answer.problem(503, "draining");
    world.shutdown.cancel();
    assert_eq!(world.serving.await.unwrap(), 0);
}

#[tokio::test]
async fn bad_subscriptions_are_named() {
    let mut config = config(&["a"]);
    config.services[0].subscribe = Some(vec!["orders".to_owned(), "none".to_owned()]);
    let world = World::with(config, Fake::new(&["orders", "other"])).await;
    let get = |path: &'static str, accept: &'static str| {
        world.send(Request::get(path).header("host", "s").header("accept", accept).body(Full::default()).unwrap())
    };
    get("/v1/topics/orders/records", "application/json").await.problem(406, "not-acceptable");
    get("/v1/topics/other/records", "*/*").await.problem(403, "forbidden-topic");
    get("/v1/topics/__x/records", "*/*").await.problem(403, "forbidden-topic");
    get("/v1/topics/none/records", "*/*").await.problem(404, "unknown-topic");
    get("/v1/topics/orders/records?from=yesterday", "*/*").await.problem(400, "bad-parameter");
    get("/v1/topics/orders/records?group=", "*/*").await.problem(400, "bad-parameter");
    get("/v1/topics/orders/records?groop=a", "*/*").await.problem(400, "bad-parameter");
    get("/v1/routes/none/records", "*/*").await.problem(404, "unknown-route");
    get("/v1/routes/none/outcomes", "*/*").await.problem(405, "method-not-allowed");
    let document = get("/openapi.json", "*/*").await;
    assert_eq!((document.status.as_u16(), document.headers["content-type"].to_str().unwrap()), (200, "application/json"));
}
