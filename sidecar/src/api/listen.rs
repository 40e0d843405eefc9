//! One listener: an accept loop that serves HTTP/1.1 (keep-alive) and HTTP/2 with prior knowledge, bounds what a peer can hold, and drains.
//! Serves any [`axum::Router`] ([`serve_router`]) or bare hyper service ([`serve`]): the API, the admin listener and the probes.
//!
//! Invariant: every connection, and every HTTP/2 stream, is a task that [`serve`] owns; when it returns, none is left.
//! Invariant: a failed accept never ends the listener.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The bounds of a listener.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The listener's name in logs: `api`, `admin`, `probe`.
    pub name: &'static str,
    /// Connections served at once; further ones wait in the kernel's backlog.
    pub max_connections: usize,
    /// How long a peer may take for its first request and for the head of each request on HTTP/1.1. It ends idle keep-alive connections too.
    pub header_timeout: Duration,
    /// The largest head of a request, in bytes.
    pub max_header_bytes: u32,
    /// HTTP/2 streams at once on a connection.
    pub max_streams: u32,
    /// How long requests in flight may go on after the shutdown began; what is left then is cut.
    pub drain: Duration,
}

impl Options {
    /// The defaults of a listener.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            max_connections: 10_000,
            header_timeout: Duration::from_secs(75),
            max_header_bytes: 64 * 1024,
            max_streams: 1024,
            drain: Duration::from_secs(10),
        }
    }

    /// The same with another drain deadline.
    #[must_use]
    pub fn drain(mut self, deadline: Duration) -> Self {
        self.drain = deadline;
        self
    }
}

/// Binds a listener.
///
/// # Errors
/// The system's, with the listener's name, the address and what to do in the text.
pub async fn bind(name: &str, address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let hint =
            if error.kind() == io::ErrorKind::AddrInUse { "; another process listens there: change the port, or stop it" } else { "" };
        io::Error::new(error.kind(), format!("listen.{name}: cannot listen on {address}: {error}{hint}"))
    })
}

/// Serves a router until `shutdown`, then drains. Returns how many connections had to be cut at the deadline. See [`serve`].
pub async fn serve_router(listener: TcpListener, router: Router, options: Options, shutdown: CancellationToken) -> usize {
    serve(listener, TowerToHyperService::new(router), options, shutdown).await
}

/// Serves until `shutdown`: then no connection is accepted, idle ones are closed, requests in flight are finished under the deadline
/// [`Options::drain`], and what is left is cut. Returns how many connections were cut.
///
/// Not cancel-safe: a future that is dropped leaves its connections to run until their peers leave. Cancel `shutdown` instead.
pub async fn serve<S>(listener: TcpListener, service: S, options: Options, shutdown: CancellationToken) -> usize
where
    S: hyper::service::Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    let slots = Arc::new(Semaphore::new(options.max_connections));
    let builder = builder(options, Tracked { tasks: tasks.clone(), cut: cut.clone() });
    while let Some((stream, slot)) = accept(&listener, &slots, &options, &shutdown).await {
        // Acknowledgements are small and must not wait for a full segment.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(listener = options.name, %error, "no TCP_NODELAY on a connection");
        }
        let seen = Arc::new(AtomicBool::new(false));
        let service = Noting { inner: service.clone(), seen: seen.clone() };
        let (builder, shutdown, cut) = (builder.clone(), shutdown.clone(), cut.clone());
        tasks.spawn(async move {
            connection(stream, &builder, service, &seen, options, shutdown, cut).await;
            drop(slot);
        });
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(options.drain, tasks.wait()).await.is_ok() {
        return 0;
    }
    let left = options.max_connections - slots.available_permits();
    tracing::warn!(listener = options.name, connections = left, deadline = ?options.drain, "requests still run at the drain deadline: cut");
    cut.cancel();
    tasks.wait().await;
    left
}

/// The next connection with its slot; `None` once the shutdown began.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
    options: &Options,
    shutdown: &CancellationToken,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let slot = tokio::select! {
        biased;
        () = shutdown.cancelled() => return None,
        slot = slots.clone().acquire_owned() => slot.ok()?,
    };
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => return None,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => return Some((stream, slot)),
            // The peer's matter: it went away before it was accepted.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {}
            Err(error) => {
                // Out of descriptors, mostly: it passes when connections end, so wait instead of spinning.
                tracing::warn!(listener = options.name, %error, "cannot accept a connection; trying again");
                tokio::select! {
                    () = shutdown.cancelled() => return None,
                    () = tokio::time::sleep(Duration::from_millis(100)) => {}
                }
            }
        }
    }
}

fn builder(options: Options, executor: Tracked) -> auto::Builder<Tracked> {
    let mut builder = auto::Builder::new(executor);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_timeout)
        .max_buf_size((options.max_header_bytes as usize).max(8192))
        .max_headers(256);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(options.max_streams)
        .max_header_list_size(options.max_header_bytes)
        .initial_stream_window_size(1024 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .keep_alive_interval(Duration::from_secs(60))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

async fn connection<S>(
    stream: TcpStream,
    builder: &auto::Builder<Tracked>,
    service: Noting<S>,
    seen: &AtomicBool,
    options: Options,
    shutdown: CancellationToken,
    cut: CancellationToken,
) where
    S: hyper::service::Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    // hyper's own timeout begins with the first byte; this one covers a peer that sends none.
    let silent = tokio::time::sleep(options.header_timeout);
    tokio::pin!(silent);
    let (mut draining, mut watching) = (false, true);
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    // A peer that resets, times out or speaks no HTTP: its own matter, and frequent.
                    tracing::debug!(listener = options.name, error, "a connection ended with an error");
                }
                return;
            }
            () = shutdown.cancelled(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            () = silent.as_mut(), if watching => {
                if !seen.load(Ordering::Relaxed) {
                    return;
                }
                watching = false;
            }
            () = cut.cancelled() => return,
        }
    }
}

/// Runs the tasks of HTTP/2 streams under the listener's tracker, and ends them with it.
#[derive(Clone, Debug)]
struct Tracked {
    tasks: TaskTracker,
    cut: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for Tracked
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        let cut = self.cut.clone();
        self.tasks.spawn(async move { cut.run_until_cancelled(future).await });
    }
}

/// Notes that a request came.
#[derive(Clone, Debug)]
struct Noting<S> {
    inner: S,
    seen: Arc<AtomicBool>,
}

impl<S: hyper::service::Service<Request<Incoming>>> hyper::service::Service<Request<Incoming>> for Noting<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.seen.store(true, Ordering::Relaxed);
        self.inner.call(request)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::Notify,
    };

    use super::*;

    async fn start(router: Router, options: Options) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<usize>) {
        let listener = bind("test", "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(serve_router(listener, router, options, shutdown.clone()));
        (address, shutdown, serving)
    }

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_request_in_flight_is_finished_by_the_drain() {
        let (entered, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (inside, wait) = (entered.clone(), go.clone());
        let slow = move || async move {
            inside.notify_one();
            wait.notified().await;
            "done"
        };
        let (address, shutdown, serving) = start(Router::new().route("/slow", get(slow)), Options::new("test")).await;
        let answer = tokio::spawn(async move { ask(address, "/slow").await });
        entered.notified().await;
        shutdown.cancel();
        go.notify_one();
        assert!(answer.await.unwrap().ends_with("done"));
        assert_eq!(serving.await.unwrap(), 0);
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn what_does_not_end_is_cut_at_the_deadline() {
        let entered = Arc::new(Notify::new());
        let inside = entered.clone();
        let stuck = move || async move {
            inside.notify_one();
            std::future::pending::<&'static str>().await
        };
        let options = Options::new("test").drain(Duration::from_millis(20));
        let (address, shutdown, serving) = start(Router::new().route("/stuck", get(stuck)), options).await;
        let answer = tokio::spawn(async move { ask(address, "/stuck").await });
        entered.notified().await;
        shutdown.cancel();
        assert_eq!(serving.await.unwrap(), 1);
        assert_eq!(answer.await.unwrap(), "");
    }

    #[tokio::test]
    async fn a_silent_peer_and_a_slow_head_are_closed() {
        let mut options = Options::new("test");
        options.header_timeout = Duration::from_millis(30);
        let (address, shutdown, serving) = start(Router::new(), options).await;
        for sent in ["", "GET / HTTP/1.1\r\nhost"] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(sent.as_bytes()).await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
        }
        shutdown.cancel();
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn an_address_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = bind("api", address).await.unwrap_err().to_string();
        assert!(error.contains("listen.api") && error.contains(&address.to_string()), "{error}");
    }
}
