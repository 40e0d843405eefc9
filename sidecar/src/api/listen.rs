//! One listener: an accept loop that serves HTTP/1.1 (keep-alive) and HTTP/2 with prior knowledge or by TLS, bounds what a peer can hold, and
//! drains.
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
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::tls::{self, Tls};

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

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
    /// Each request carries a [`Peer`].
    pub tell_peer: bool,
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
            tell_peer: false,
        }
    }

    /// The same with another drain deadline.
    #[must_use]
    pub fn drain(mut self, deadline: Duration) -> Self {
        self.drain = deadline;
        self
    }
}

/// A bound listener, and its TLS if it speaks that.
#[derive(Debug)]
pub struct Listener {
    tcp: TcpListener,
    tls: Option<Arc<Tls>>,
}

impl Listener {
    /// A listener that speaks TLS if there is any.
    pub fn new(tcp: TcpListener, tls: Option<Arc<Tls>>) -> Self {
        Self { tcp, tls }
    }
}

impl From<TcpListener> for Listener {
    fn from(tcp: TcpListener) -> Self {
        Self::new(tcp, None)
    }
}

/// Who is at the other end of a connection; an extension of its requests.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// The names of its certificate, in lower case; empty without one.
    pub names: Arc<[String]>,
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
pub async fn serve_router(listener: impl Into<Listener>, router: Router, options: Options, shutdown: CancellationToken) -> usize {
    serve(listener, TowerToHyperService::new(router), options, shutdown).await
}

/// Serves until `shutdown`: then no connection is accepted, idle ones are closed, requests in flight are finished under the deadline
/// [`Options::drain`], and what is left is cut. Returns how many connections were cut.
///
/// Not cancel-safe: a future that is dropped leaves its connections to run until their peers leave. Cancel `shutdown` instead.
pub async fn serve<S>(listener: impl Into<Listener>, service: S, options: Options, shutdown: CancellationToken) -> usize
where
    S: hyper::service::Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let Listener { tcp: listener, tls } = listener.into();
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    let slots = Arc::new(Semaphore::new(options.max_connections));
    let builder = builder(options, Tracked { tasks: tasks.clone(), cut: cut.clone() });
    let accepting = async {
        while let Some((stream, address, slot)) = accept(&listener, &slots, &options, &shutdown).await {
            // Acknowledgements are small and must not wait for a full segment.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(listener = options.name, %error, "no TCP_NODELAY on a connection");
            }
            let acceptor = tls.as_ref().map(|tls| tls.acceptor());
            let seen = Arc::new(AtomicBool::new(false));
            let mut service = Noting { inner: service.clone(), seen, peer: None };
            let (builder, shutdown, cut) = (builder.clone(), shutdown.clone(), cut.clone());
            tasks.spawn(async move {
                let names: Arc<[String]> = Arc::default();
                match acceptor {
                    None => {
                        service.peer = options.tell_peer.then_some(Peer { address, names });
                        connection(stream, &builder, service, options, shutdown, cut).await;
                    }
                    Some(acceptor) => {
                        let handshake = tokio::time::timeout(options.header_timeout.min(HANDSHAKE), acceptor.accept(stream));
                        let stream = tokio::select! {
                            stream = handshake => stream,
                            () = shutdown.cancelled() => return,
                        };
                        match stream {
                            Ok(Ok(stream)) => {
                                let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
                                let names = certificate.map_or(names, |certificate| tls::names(certificate).into());
                                service.peer = options.tell_peer.then_some(Peer { address, names });
                                connection(stream, &builder, service, options, shutdown, cut).await;
                            }
                            // A peer without TLS, or without a certificate where one is asked for: its own matter, and frequent.
                            Ok(Err(error)) => tracing::debug!(listener = options.name, %address, %error, "a TLS handshake failed"),
                            Err(_) => tracing::debug!(listener = options.name, %address, "a TLS handshake took too long"),
                        }
                    }
                }
                drop(slot);
            });
        }
    };
    let fresh = async {
        match &tls {
            Some(tls) => tls.clone().keep_fresh().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = accepting => {}
        never = fresh => match never {},
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
) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
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
            Ok((stream, address)) => return Some((stream, address, slot)),
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
        .max_buf_size((options.max_header_bytes as usize).max(8192));
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

async fn connection<I, S>(
    stream: I,
    builder: &auto::Builder<Tracked>,
    service: Noting<S>,
    options: Options,
    shutdown: CancellationToken,
    cut: CancellationToken,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: hyper::service::Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let seen = service.seen.clone();
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

/// Notes that a request came, and tells it from whom.
#[derive(Clone, Debug)]
struct Noting<S> {
    inner: S,
    seen: Arc<AtomicBool>,
    peer: Option<Peer>,
}

impl<S: hyper::service::Service<Request<Incoming>>> hyper::service::Service<Request<Incoming>> for Noting<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        self.seen.store(true, Ordering::Relaxed);
        if let Some(peer) = &self.peer {
            request.extensions_mut().insert(peer.clone());
        }
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
        let mut bytes = Vec::new();
        // What is no HTTP may end with a reset.
        let _ = stream.read_to_end(&mut bytes).await;
        answer.push_str(&String::from_utf8_lossy(&bytes));
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
    async fn tls_serves_and_tells_who_calls() {
        use std::sync::Arc;

        use tokio_rustls::{
            TlsConnector,
            rustls::{
                ClientConfig, RootCertStore,
                crypto::ring,
                pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
            },
        };

        use crate::api::tls::testing::Authority;

        let authority = Authority::new();
        let tls = Arc::new(Tls::load("listen.tls.test", &authority.files(true)).unwrap());
        let tcp = bind("test", "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = tcp.local_addr().unwrap();
        let who = async |request: axum::extract::Request| {
            let peer = request.extensions().get::<Peer>().cloned().unwrap();
            assert!(peer.address.ip().is_loopback());
            peer.names.first().cloned().unwrap_or_default()
        };
        let mut options = Options::new("test");
        (options.tell_peer, options.header_timeout) = (true, Duration::from_millis(300));
        let shutdown = CancellationToken::new();
        let router = Router::new().route("/", get(who));
        let serving = tokio::spawn(serve_router(Listener::new(tcp, Some(tls)), router, options, shutdown.clone()));

        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
        let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions().unwrap();
        let client = client.with_root_certificates(roots);
        let (cert, key) = authority.sign("board.shop");
        let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let known = client.clone().with_client_auth_cert(vec![cert], key).unwrap();
        let ask = async |config: ClientConfig| -> std::io::Result<String> {
            let stream = TcpStream::connect(address).await?;
            let mut stream = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), stream).await?;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            Ok(answer)
        };
        let answer = ask(known.clone()).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("board.shop"), "{answer}");
        assert!(ask(client.with_no_client_auth()).await.is_err(), "a client without a certificate");
        // Neither one that speaks in clear nor one that says nothing holds a connection for long.
        assert!(!super::tests::ask(address, "/").await.starts_with("HTTP"));
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.read_to_end(&mut Vec::new()).await.unwrap();
        assert!(ask(known).await.is_ok());
        shutdown.cancel();
        assert_eq!(serving.await.unwrap(), 0);
    }

    #[tokio::test]
    async fn an_address_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = bind("api", address).await.unwrap_err().to_string();
        assert!(error.contains("listen.api") && error.contains(&address.to_string()), "{error}");
    }
}
