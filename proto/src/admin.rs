//! The connection to a sidecar's admin listener: its address, TLS, and the token that is shown there.

use std::{
    error::Error,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_prost::ProstCodec;

use crate::v1::control_client::ControlClient;

/// A message of which nothing matters: the question and the answer of a health check.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
struct Nothing {}

/// How long the connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long the first answer may take.
const ANSWER: Duration = Duration::from_secs(10);

/// How it is noticed that the other end is gone without a word: its machine, or a tunnel to it. What was asked ends with `UNAVAILABLE` then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// After so long without anything from there it is asked whether it lives (an HTTP/2 ping).
    pub interval: Duration,
    /// How long the answer to that may take.
    pub timeout: Duration,
}

impl Default for KeepAlive {
    fn default() -> Self {
        Self { interval: Duration::from_secs(10), timeout: Duration::from_secs(20) }
    }
}

/// A client of `mesh.v1.Control` that shows its token.
pub type AdminClient = ControlClient<InterceptedService<Channel, Bearer>>;

/// How an admin listener is reached.
#[derive(Clone, Debug)]
pub struct AdminAddress {
    /// `http://host:port`, or `https://host:port` where the listener speaks TLS.
    pub url: String,
    /// The file that holds the token; its first line counts.
    pub token_file: Option<PathBuf>,
    /// PEM file with the authorities of the listener's certificate; the system's without it.
    pub ca: Option<PathBuf>,
    /// PEM files with the certificate that is shown, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub enum ConnectError {
    /// A file or the address cannot be used.
    Unusable(String),
    /// Nobody answers, or not as expected.
    Unreachable(String),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unusable(text) | Self::Unreachable(text) => f.write_str(text),
        }
    }
}

impl Error for ConnectError {}

impl AdminAddress {
    /// The address alone: no token, and the system's authorities.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), token_file: None, ca: None, identity: None }
    }

    /// Connects.
    ///
    /// # Errors
    /// See [`ConnectError`]; names the file or the address.
    pub async fn connect(&self) -> Result<AdminClient, ConnectError> {
        self.connect_with(KeepAlive::default()).await
    }

    /// The same with other times after which the other end counts as gone.
    ///
    /// # Errors
    /// See [`ConnectError`]; names the file or the address.
    pub async fn connect_with(&self, alive: KeepAlive) -> Result<AdminClient, ConnectError> {
        let bearer = Bearer(self.token_file.as_deref().map(token).transpose()?);
        let unusable = |error: &dyn Error| ConnectError::Unusable(format!("{self}: {}", root_cause(error)));
        let mut endpoint = Endpoint::from_shared(self.url.clone()).map_err(|error| unusable(&error))?.connect_timeout(CONNECT);
        // Also between questions: the next one finds no dead connection then, and a tunnel keeps one that is used.
        endpoint = endpoint.http2_keep_alive_interval(alive.interval).keep_alive_timeout(alive.timeout).keep_alive_while_idle(true);
        if self.url.starts_with("https:") {
            endpoint = endpoint.tls_config(self.tls()?).map_err(|error| unusable(&error))?;
        }
        let channel = endpoint.connect().await.map_err(|error| ConnectError::Unreachable(root_cause(&error)))?;
        self.check(&channel).await?;
        Ok(ControlClient::with_interceptor(channel, bearer))
    }

    /// A connection alone tells little: a listener of another protocol ends it at the first bytes, and one with TLS 1.3 refuses a client's
    /// certificate, or that there is none, only after the client is done with the handshake. A question that everybody may ask tells, before one
    /// is asked of which it would not be known whether it was done.
    async fn check(&self, channel: &Channel) -> Result<(), ConnectError> {
        let mut health = tonic::client::Grpc::new(channel.clone());
        let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
        let mut question = Request::new(Nothing {});
        question.set_timeout(ANSWER);
        let asked = match health.ready().await {
            Ok(()) => health.unary(question, path, ProstCodec::<Nothing, Nothing>::default()).await,
            Err(error) => Err(Status::from_error(Box::new(error))),
        };
        // What it answers is of no matter.
        let Some(cause) = asked.err().and_then(|status| status.source().map(root_cause)) else { return Ok(()) };
        let maybe = match (self.url.starts_with("https:"), &self.identity) {
            (true, Some(_)) => "maybe the certificate that was shown is refused",
            (true, None) => "maybe it asks for a client's certificate",
            (false, _) => "maybe it speaks TLS (https://), or is no admin listener of a mesh-sidecar (`listen.admin`)",
        };
        Err(ConnectError::Unreachable(format!("there is a connection, and no answer in gRPC ({cause}): {maybe}")))
    }

    fn tls(&self) -> Result<ClientTlsConfig, ConnectError> {
        let mut tls = match &self.ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some((cert, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        Ok(tls)
    }
}

fn read(file: &Path) -> Result<Vec<u8>, ConnectError> {
    std::fs::read(file).map_err(|error| ConnectError::Unusable(format!("cannot read {}: {error}", file.display())))
}

fn token(file: &Path) -> Result<MetadataValue<Ascii>, ConnectError> {
    let text = read(file)?;
    let line = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).find(|line| !line.is_empty());
    let unusable = |problem| ConnectError::Unusable(format!("the token in {} {problem}", file.display()));
    let line = line.ok_or_else(|| unusable("is empty"))?;
    let text = std::str::from_utf8(line).map_err(|_| unusable("is no text"))?;
    let mut value: MetadataValue<Ascii> =
        format!("Bearer {text}").parse().map_err(|_| unusable("has characters that no header may have"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The innermost error: the one that says what the system said.
pub fn root_cause(error: &dyn Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Shows a token with each request.
#[derive(Clone, Debug)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}
