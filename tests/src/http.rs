//! A small HTTP client for tests: HTTP/1.1 with kept connections, or h2c, to one address.

use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::TcpStream;

/// A client of one address.
#[derive(Debug)]
pub struct Http {
    address: SocketAddr,
    idle: Mutex<Vec<http1::SendRequest<Full<Bytes>>>>,
}

/// An answer, read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// If it is not JSON; the message carries it.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("{} with no JSON: {}", self.status, self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The answer, if it has this status.
    ///
    /// # Errors
    /// If it has another; the message carries the body.
    pub fn expect(self, status: u16) -> Result<Self> {
        ensure!(self.status == status, "{} where {status} is due: {}", self.status, self.text());
        Ok(self)
    }

    /// Checks that it is a problem (RFC 9457) of this status and code, with all the fields that the API promises, and returns it.
    ///
    /// # Errors
    /// If it is not.
    pub fn problem(self, status: u16, code: &str) -> Result<Value> {
        let answer = self.expect(status)?;
        let kind = answer.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        ensure!(kind.starts_with("application/problem+json"), "a problem comes as {kind:?}");
        let problem = answer.json()?;
        ensure!(problem["code"] == code, "code {} where {code} is due: {problem}", problem["code"]);
        ensure!(problem["status"] == status, "{problem}");
        for field in ["type", "title", "detail", "hint", "retryable", "persisted", "trace_id"] {
            ensure!(problem.get(field).is_some(), "the problem has no {field}: {problem}");
        }
        Ok(problem)
    }
}

impl Http {
    /// A client of this address. Connects when it is used.
    pub fn new(address: SocketAddr) -> Self {
        Self { address, idle: Mutex::default() }
    }

    /// `GET`.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.send(Method::GET, path, &[], Bytes::new()).await
    }

    /// `POST` with headers.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn post(&self, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Result<Answer> {
        self.send(Method::POST, path, headers, body.into()).await
    }

    /// `POST` of JSON.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn post_json(&self, path: &str, body: &Value) -> Result<Answer> {
        self.post(path, &[("content-type", "application/json")], body.to_string()).await
    }

    /// Any request, under 60 s.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Bytes) -> Result<Answer> {
        let mut request = Request::builder().method(method).uri(path).header("host", self.address.to_string());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.call(request.body(Full::new(body))?, Duration::from_secs(60)).await
    }

    /// A request that was built elsewhere, under a deadline.
    ///
    /// # Errors
    /// If no answer comes in time.
    pub async fn call(&self, request: Request<Full<Bytes>>, deadline: Duration) -> Result<Answer> {
        let what = format!("{} http://{}{}", request.method(), self.address, request.uri());
        let exchange = async {
            let mut sender = self.connection().await?;
            let answer = sender.send_request(request).await?;
            let (head, body) = answer.into_parts();
            let body = body.collect().await?.to_bytes();
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
            anyhow::Ok(Answer { status: head.status, headers: head.headers, body })
        };
        tokio::time::timeout(deadline, exchange).await.with_context(|| format!("{what}: no answer in {deadline:?}"))?.context(what)
    }

    /// A `GET` whose answer is read as it comes, on a connection of its own.
    ///
    /// # Errors
    /// If no answer begins.
    pub async fn open(&self, path: &str, accept: &str) -> Result<Lines> {
        let mut sender = self.connect().await?;
        let request = Request::get(path).header("host", self.address.to_string()).header("accept", accept).body(Full::default())?;
        let answer = tokio::time::timeout(Duration::from_secs(30), sender.send_request(request)).await??;
        let (head, body) = answer.into_parts();
        Ok(Lines { status: head.status, headers: head.headers, body, buffer: Vec::new(), _sender: sender })
    }

    /// One request over h2c with prior knowledge, on a connection of its own.
    ///
    /// # Errors
    /// If no answer comes.
    pub async fn send_h2c(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Bytes) -> Result<Answer> {
        let stream = TcpStream::connect(self.address).await?;
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = sender.send_request(request.body(Full::new(body))?).await?;
        let (head, body) = answer.into_parts();
        let body = body.collect().await?.to_bytes();
        driver.abort();
        Ok(Answer { status: head.status, headers: head.headers, body })
    }

    async fn connection(&self) -> Result<http1::SendRequest<Full<Bytes>>> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            match idle {
                Some(mut sender) => {
                    if sender.ready().await.is_ok() {
                        return Ok(sender);
                    }
                }
                None => return self.connect().await,
            }
        }
    }

    async fn connect(&self) -> Result<http1::SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(self.address).await.with_context(|| format!("connect to {}", self.address))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends with its sender; its errors arrive there.
        drop(tokio::spawn(connection));
        Ok(sender)
    }
}

/// An answer that is read line by line as it comes.
#[derive(Debug)]
pub struct Lines {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    body: Incoming,
    buffer: Vec<u8>,
    _sender: http1::SendRequest<Full<Bytes>>,
}

impl Lines {
    /// The next line that is not empty, without its end; `None` at the end of the answer.
    ///
    /// # Errors
    /// If none comes in time, or the connection breaks.
    pub async fn next(&mut self, deadline: Duration) -> Result<Option<String>> {
        let read = async {
            loop {
                if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = self.buffer.drain(..=end).collect();
                    let line = String::from_utf8(line).context("a line that is not UTF-8")?.trim_end().to_owned();
                    if !line.is_empty() {
                        return Ok(Some(line));
                    }
                    continue;
                }
                match self.body.frame().await {
                    Some(frame) => {
                        if let Ok(data) = frame?.into_data() {
                            self.buffer.extend_from_slice(&data);
                        }
                    }
                    None => return Ok(None),
                }
            }
        };
        tokio::time::timeout(deadline, read).await.with_context(|| format!("no line in {deadline:?}"))?
    }

    /// The next object of an NDJSON answer, or the next `data:` of an SSE answer, as JSON.
    ///
    /// # Errors
    /// As [`Lines::next`], and at the end of the answer.
    pub async fn next_json(&mut self, deadline: Duration) -> Result<Value> {
        loop {
            let line = self.next(deadline).await?.context("the answer ended")?;
            if line.starts_with(':') || ["event:", "id:", "retry:"].iter().any(|field| line.starts_with(field)) {
                continue;
            }
            let data = line.strip_prefix("data:").unwrap_or(&line).trim();
            return serde_json::from_str(data).with_context(|| format!("no JSON: {line}"));
        }
    }
}
