//! Lines: published as they come, and answered while more come.

use tokio::sync::mpsc;

use super::*;

const ORDERS: &str = "/v1/topics/orders/records";
const LINES: (&str, &str) = ("content-type", "application/x-ndjson");

/// The lines of an answer.
fn lines(answer: &Answer) -> Vec<serde_json::Value> {
    answer.body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(|line| serde_json::from_slice(line).unwrap()).collect()
}

#[tokio::test]
async fn lines_are_answered_by_lines_with_their_numbers() {
    let world = World::new().await;
    let keyed = [LINES, ("mesh-key", "k")];
    let answer = world.post(ORDERS, &keyed, "{\"value\":1}\n\n{\"value\":\r\n{\"key\":\"z\",\"value\":\"two\"}").await;
    assert_eq!((answer.status.as_u16(), answer.headers["content-type"].to_str().unwrap()), (207, "application/x-ndjson"));
    let results = lines(&answer);
    let told: Vec<_> = results.iter().map(|result| (result["line"].as_i64().unwrap(), result["status"].as_i64().unwrap())).collect();
    assert_eq!(told, [(1, 200), (3, 400), (4, 200)]);
    assert_eq!((&results[0]["offset"], &results[2]["offset"]), (&0.into(), &1.into()));
    assert!(results[1]["problem"]["detail"].as_str().unwrap().starts_with("line 3, column"), "{}", results[1]);
    let records = world.fake.records("orders");
    assert_eq!((records[0].key.as_deref(), records[1].key.as_deref()), (Some(&b"k"[..]), Some(&b"z"[..])));

    let many: String = (0..2345).map(|number| format!("{{\"value\":{number}}}\n")).collect();
    let answer = world.post(ORDERS, &keyed, many).await;
    assert_eq!(answer.status, 200);
    let results = lines(&answer);
    assert!(
        results.iter().enumerate().all(|(number, result)| result["offset"] == number as i64 + 2 && result["line"] == number as i64 + 1)
    );
    assert_eq!(world.fake.records("orders")[2346].value.as_deref(), Some(&b"2344"[..]));
    assert_eq!(world.post(ORDERS, &keyed, "").await.status, 200);

    let path = "/v1/topics/orders/records?form=value";
    assert_eq!(world.post(path, &[LINES], "{\"log\":1}\n{\"log\":2}\n").await.status, 200);
    assert_eq!(world.fake.records("orders")[2347].value.as_deref(), Some(&b"{\"log\":1}"[..]));
    assert_eq!(world.post(path, &[("content-type", "application/json")], "[{\"log\":3}, 4]").await.status, 200);
    assert_eq!(world.fake.records("orders")[2350].value.as_deref(), Some(&b"4"[..]));
    let answer = world.post(ORDERS, &[LINES], "{\"log\":1}").await;
    assert_eq!(answer.status, 400);
    assert!(lines(&answer)[0]["problem"]["hint"].as_str().unwrap().contains("form=value"));
}

#[tokio::test]
async fn who_asks_for_one_document_gets_one() {
    let world = World::new().await;
    let json = [LINES, ("accept", "application/json")];
    let answer = world.post(ORDERS, &json, "{\"value\":1}\nno\n{\"value\":2}\n").await;
    assert_eq!(answer.status, 207);
    let statuses: Vec<_> = answer.json["results"].as_array().unwrap().iter().map(|result| result["status"].as_i64().unwrap()).collect();
    assert_eq!(statuses, [200, 400, 200]);
    world.post(ORDERS, &json, "{\"log\":1}").await.problem(400, "bad-record");
    world.post("/v1/topics/none/records", &[LINES], "{}").await.problem(404, "unknown-topic");
}

/// A request whose lines are sent one by one while the answer is read.
struct Talk {
    lines: mpsc::Sender<Result<http_body::Frame<Bytes>, io::Error>>,
    response: Response<Incoming>,
    text: String,
}

impl Talk {
    async fn begin(world: &World, headers: &[(&str, &str)]) -> Self {
        let (lines, frames) = mpsc::channel(4);
        let stream = TcpStream::connect(world.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        drop(tokio::spawn(connection));
        let body = http_body_util::StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(frames));
        let mut request = Request::post(ORDERS).header("host", "s").header(LINES.0, LINES.1);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        // The head comes before any line was sent.
        let response = sender.send_request(request.body(body).unwrap()).await.unwrap();
        Self { lines, response, text: String::new() }
    }

    async fn say(&self, text: &'static str) {
        self.lines.send(Ok(http_body::Frame::data(Bytes::from_static(text.as_bytes())))).await.unwrap();
    }

    async fn hear(&mut self) -> serde_json::Value {
        loop {
            if let Some((line, rest)) = self.text.split_once('\n') {
                let line = serde_json::from_str(line).unwrap();
                self.text = rest.to_owned();
                return line;
            }
            let frame = self.response.body_mut().frame().await.expect("the answer ended").unwrap();
            self.text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
    }

    async fn is_over(&mut self) -> bool {
        self.text.is_empty() && self.response.body_mut().frame().await.is_none()
    }
}

#[tokio::test]
async fn each_line_is_answered_before_the_next_is_sent_and_a_bad_one_ends_nothing() {
    let world = World::new().await;
    let mut talk = Talk::begin(&world, &[]).await;
    assert_eq!(
        (talk.response.status().as_u16(), &talk.response.headers()["content-type"]),
        (200, &"application/x-ndjson".parse().unwrap())
    );
    for (said, line, status) in [
        ("{\"value\":1}\n", 1, 200),
        ("\n{\"value\":\n", 3, 400),
        ("{\"value\":2}\n", 4, 200),
        ("{\"value\":3,\"key\":{\"base64\":\"%\"}}\n", 5, 400),
    ] {
        talk.say(said).await;
        let heard = talk.hear().await;
        assert_eq!((&heard["line"], &heard["status"]), (&line.into(), &status.into()), "{heard}");
    }
    // A line in two pieces, and the last one without its end.
    talk.say("{\"val").await;
    talk.say("ue\":4}\n{\"value\":5}").await;
    assert_eq!(talk.hear().await["offset"], 2);
    let (sender, _) = mpsc::channel(1);
    talk.lines = sender;
    assert_eq!(talk.hear().await["line"], 7);
    assert!(talk.is_over().await);
    assert_eq!(world.fake.records("orders").len(), 4);
}

#[tokio::test]
async fn a_line_beyond_the_limit_is_answered_and_the_stream_goes_on() {
    let world = World::new().await;
    let mut talk = Talk::begin(&world, &[]).await;
    static LONG: [u8; 64 * 1024] = [b' '; 64 * 1024];
    talk.say("{\"value\":1}\n{\"value\":").await;
    assert_eq!(talk.hear().await["status"], 200);
    for _ in 0..64 {
        talk.lines.send(Ok(http_body::Frame::data(Bytes::from_static(&LONG)))).await.unwrap();
    }
    talk.say("2}\n{\"value\":3}\n").await;
    let long = talk.hear().await;
    assert_eq!((&long["line"], &long["problem"]["code"]), (&2.into(), &"body-too-large".into()));
    let next = talk.hear().await;
    assert_eq!((&next["line"], &next["status"], &next["offset"]), (&3.into(), &200.into(), &1.into()));
}

/// The connection breaks within a line: that line is not published, though what came of it is a record; all before it are.
#[tokio::test]
async fn a_stream_that_is_cut_publishes_no_half_line() {
    let world = World::new().await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let head = format!("POST {ORDERS}?form=value HTTP/1.1\r\nhost: s\r\ncontent-type: {}\r\ntransfer-encoding: chunked\r\n\r\n", LINES.1);
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(b"4\r\n1\n23\r\n").await.unwrap();
    let (mut heard, mut piece) = (String::new(), [0; 1024]);
    while !heard.contains("\"line\":1,\"status\":200") {
        let read = stream.read(&mut piece).await.unwrap();
        heard.push_str(std::str::from_utf8(&piece[..read]).unwrap());
    }
    drop(stream);
    while !world.counts("mesh_published_records_total", "body-broken") {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.fake.records("orders").len(), 1);
}

#[tokio::test]
async fn a_broker_that_does_not_answer_is_told_line_by_line() {
    let world = World::new().await;
    world.fake.set(Mode::Fail(ProduceErrorKind::QueueFull));
    let mut talk = Talk::begin(&world, &[]).await;
    talk.say("{\"value\":1}\n{\"value\":2}\n").await;
    for line in 1..3 {
        let heard = talk.hear().await;
        assert_eq!((&heard["line"], &heard["status"], &heard["problem"]["code"]), (&line.into(), &429.into(), &"queue-full".into()));
    }
    world.fake.set(Mode::Store);
    talk.say("{\"value\":3}\n").await;
    assert_eq!(talk.hear().await["status"], 200);
}

#[tokio::test]
async fn a_shutdown_ends_a_stream_of_lines_with_a_last_one() {
    let world = World::new().await;
    let mut talk = Talk::begin(&world, &[]).await;
    talk.say("{\"value\":1}\n").await;
    assert_eq!(talk.hear().await["status"], 200);
    world.shutdown.cancel();
    let last = talk.hear().await;
    assert_eq!((&last["line"], &last["problem"]["code"]), (&2.into(), &"draining".into()));
    assert!(talk.is_over().await);
    drop(talk);
    assert_eq!(world.serving.await.unwrap(), 0);
}

/// A client that sends everything before it reads, as most do, is not locked up by its unread answers.
#[tokio::test]
async fn answers_wait_for_a_client_that_reads_last() {
    let world = World::new().await;
    let text: String = (0..60_000).map(|number| format!("{{\"value\":\"number {number}\"}}\n")).collect();
    assert!(text.len() > 1024 * 1024, "beyond what is answered as a whole");
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let head = format!(
        "POST {ORDERS} HTTP/1.1\r\nhost: s\r\nconnection: close\r\ncontent-type: {}\r\ncontent-length: {}\r\n\r\n",
        LINES.1,
        text.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (mut rest, mut lines) = (answer.split_once("\r\n\r\n").unwrap().1, String::new());
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        lines.push_str(&after[..size]);
        rest = &after[size + 2..];
    }
    assert_eq!(lines.matches("\"status\":200,").count(), 60_000);
    assert!(lines.ends_with("\"}\n") && rest.is_empty());
}
