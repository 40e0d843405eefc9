//! Connections to a service: TCP or a Unix socket, HTTP/1.1 or HTTP/2 with prior knowledge.
//!
//! The address comes from local configuration only. Names are resolved at each connect, so a service that moves is found.

use std::{future::Future, io, path::PathBuf, pin::Pin, task::Poll};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    body::Body,
    client::conn::{http1, http2},
    rt::{Read, Write},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::task::TaskTracker;

/// Where a service listens.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    Tcp(String),
    Unix(PathBuf),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(authority) => f.write_str(authority),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What hyper needs of a socket.
pub(crate) trait Io: Read + Write + Send + Unpin {}
impl<T: Read + Write + Send + Unpin> Io for T {}

impl Target {
    pub(crate) async fn connect(&self) -> io::Result<Box<dyn Io>> {
        match self {
            Self::Tcp(authority) => {
                let stream = TcpStream::connect(authority.as_str()).await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(TokioIo::new(stream)))
            }
            Self::Unix(path) => Ok(Box::new(TokioIo::new(UnixStream::connect(path).await?))),
        }
    }
}

type Connection = Pin<Box<http1::Connection<Box<dyn Io>, Full<Bytes>>>>;

/// An HTTP/1.1 connection that is driven by whoever uses it: no task of its own, no hand-over between tasks.
pub(crate) struct Http1 {
    pub(crate) sender: http1::SendRequest<Full<Bytes>>,
    connection: Option<Connection>,
}

impl Http1 {
    pub(crate) async fn connect(target: &Target) -> Result<Self, String> {
        let io = target.connect().await.map_err(|error| error.to_string())?;
        let (sender, connection) = http1::Builder::new().handshake(io).await.map_err(|error| error.to_string())?;
        Ok(Self { sender, connection: Some(Box::pin(connection)) })
    }

    /// Resolves when the peer closed the connection. Cancel-safe.
    pub(crate) async fn closed(&mut self) {
        std::future::poll_fn(|cx| match &mut self.connection {
            Some(connection) => {
                let ended = connection.as_mut().poll(cx).is_ready();
                if ended {
                    self.connection = None;
                }
                if ended { Poll::Ready(()) } else { Poll::Pending }
            }
            None => Poll::Ready(()),
        })
        .await;
    }

    /// Whether the connection can carry a request, after looking whether the peer closed it meanwhile.
    pub(crate) fn usable(&mut self) -> bool {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        if let Some(connection) = &mut self.connection
            && connection.as_mut().poll(&mut cx).is_ready()
        {
            self.connection = None;
        }
        self.connection.is_some() && self.sender.is_ready()
    }
}

/// Drives the connection while `work` runs.
pub(crate) async fn drive<F: Future>(connection: &mut Option<Connection>, work: F) -> F::Output {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(done);
        }
        if let Some(driven) = connection {
            if driven.as_mut().poll(cx).is_ready() {
                *connection = None;
            }
            // What the connection brought is taken in the same turn.
            return work.as_mut().poll(cx);
        }
        Poll::Pending
    })
    .await
}

impl Http1 {
    /// The sender and the connection apart, for [`drive`].
    pub(crate) fn parts(&mut self) -> (&mut http1::SendRequest<Full<Bytes>>, &mut Option<Connection>) {
        (&mut self.sender, &mut self.connection)
    }
}

/// An HTTP/2 connection; its task belongs to `tasks` and ends when the last sender is dropped.
pub(crate) async fn http2(target: &Target, tasks: &TaskTracker) -> Result<http2::SendRequest<Full<Bytes>>, String> {
    let io = target.connect().await.map_err(|error| error.to_string())?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(std::time::Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .handshake(io)
        .await
        .map_err(|error| error.to_string())?;
    tasks.spawn(async move {
        // A failure of the connection reaches every request on it; here there is nobody else to tell.
        if let Err(error) = connection.await {
            tracing::debug!(%error, "HTTP/2 connection to the service ended");
        }
    });
    Ok(sender)
}

/// Reads a body of at most `limit` bytes; `None` if it is longer.
pub(crate) async fn read_body<B>(mut body: B, limit: usize) -> Result<Option<Bytes>, B::Error>
where
    B: Body<Data = Bytes> + Unpin,
{
    use http_body_util::BodyExt as _;
    let mut first = Bytes::new();
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if first.len() + rest.len() + data.len() > limit {
            return Ok(None);
        }
        // Most answers are one frame.
        if first.is_empty() && rest.is_empty() {
            first = data;
        } else {
            if rest.is_empty() {
                rest.extend_from_slice(&std::mem::take(&mut first));
            }
            rest.extend_from_slice(&data);
        }
    }
    Ok(Some(if rest.is_empty() { detached(first) } else { rest.into() }))
}

/// A payload without the rest of the buffer into which it was read. A piece of that buffer would keep all of it, mostly 8 KiB, as long as the answer
/// is kept, and the next read would need a new one.
fn detached(read: Bytes) -> Bytes {
    /// From here on a copy costs more than it saves.
    const LARGE: usize = 4096;
    if read.len() < LARGE { Bytes::copy_from_slice(&read) } else { read }
}
