//! Who may use the admin listener, and for what.
//!
//! Invariant: what is not known to look only needs the role `write`.
//! Invariant: each request that may change something leaves an audit record: a line of the log with the target `audit`.
//! Invariant: without tokens and certificates in the config, everybody who reaches the listener may do everything: so it is bound to loopback
//! then, or asks for clients' certificates.

use std::{io, sync::Arc};

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http::{HeaderMap, header};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::{
    listen::{self, Listener, Peer},
    token::{self, Token},
};
use crate::config::{AdminCertificate, ControlConfig, Role};

/// What only looks, of `mesh.v1.Control`.
const LOOKS: [&str; 14] = [
    "Validate",
    "GetTable",
    "GetHistory",
    "GetStatus",
    "ListDeadLetters",
    "ReadDeadLetters",
    "Tail",
    "ListTopics",
    "DescribeTopics",
    "GetLag",
    "Plan",
    "Explain",
    "Trace",
    "Diagnose",
];

/// Who asks; an extension of the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// The token's name in the config, a name of the client's certificate, or `anonymous`.
    pub name: Arc<str>,
    /// What it may do.
    pub role: Role,
}

/// Whoever shows neither token nor certificate where none is asked for.
const ANONYMOUS: &str = "anonymous";

impl Principal {
    /// The name of whoever is known to ask; else what the request says of itself.
    pub fn of<T>(request: &tonic::Request<T>, claimed: &str) -> String {
        match request.extensions().get::<Self>() {
            Some(who) if who.is_known() => who.name.to_string(),
            _ => claimed.to_owned(),
        }
    }

    /// Whether it is known who that is.
    fn is_known(&self) -> bool {
        &*self.name != ANONYMOUS
    }
}

/// Who may use the admin listener.
#[derive(Debug)]
pub struct Guard {
    tokens: Vec<(Principal, Token)>,
    certificates: Vec<AdminCertificate>,
}

impl Guard {
    /// Reads the token files.
    ///
    /// # Errors
    /// A token file that cannot be read, or that is empty; names it.
    pub fn new(config: &ControlConfig) -> io::Result<Self> {
        let token = |token: &crate::config::AdminToken| {
            let principal = Principal { name: token.name.as_str().into(), role: token.role };
            Ok((principal, Token::read("control.tokens[].file", &token.file)?))
        };
        let tokens = config.tokens.iter().map(token).collect::<io::Result<_>>()?;
        Ok(Self { tokens, certificates: config.certificates.clone() })
    }

    /// Serves a router to those who may use it, until `shutdown`; else as [`listen::serve_router`].
    pub async fn serve(self: Arc<Self>, listener: Listener, router: axum::Router, shutdown: CancellationToken) -> usize {
        let router = router.layer(axum::middleware::from_fn_with_state(self.clone(), check));
        let options = listen::Options { tell_peer: true, ..listen::Options::new("admin") };
        tokio::select! {
            cut = listen::serve_router(listener, router, options, shutdown) => cut,
            never = token::keep_fresh(self.tokens.iter().map(|(_, token)| token)) => match never {},
        }
    }

    /// Who asks.
    fn identify(&self, headers: &HeaderMap, names: &[String]) -> Result<Principal, Status> {
        if self.tokens.is_empty() && self.certificates.is_empty() {
            let name = names.first().map_or(ANONYMOUS, String::as_str).into();
            return Ok(Principal { name, role: Role::Write });
        }
        if let (Some(given), false) = (headers.get(header::AUTHORIZATION), self.tokens.is_empty()) {
            let given = token::bearer(given.as_bytes());
            let given = given.ok_or_else(|| Status::unauthenticated("`authorization` is no bearer token"))?;
            let known = self.tokens.iter().find(|(_, token)| token.is(given));
            return known.map(|(principal, _)| principal.clone()).ok_or_else(|| {
                Status::unauthenticated("the token is none of control.tokens: give the right one with --token-file or MESH_TOKEN_FILE")
            });
        }
        if let Some(listed) = self.certificates.iter().find(|listed| names.contains(&listed.name)) {
            return Ok(Principal { name: listed.name.as_str().into(), role: listed.role });
        }
        Err(Status::unauthenticated(match (self.tokens.is_empty(), names.first()) {
            (false, _) => "a token is needed: give --token-file or MESH_TOKEN_FILE (control.tokens in the sidecar's config)".to_owned(),
            (true, Some(name)) => format!("the certificate of {name} is none of control.certificates in the sidecar's config"),
            (true, None) => {
                "a client's certificate is needed: give --client-cert and --client-key (listen.tls.admin.client_ca in the sidecar's config)"
                    .to_owned()
            }
        }))
    }
}

/// What a path needs; `None` for what everybody may ask.
fn needed(path: &str) -> Option<Role> {
    match path.strip_prefix('/').and_then(|path| path.split_once('/')) {
        // An orchestrator's probe has no token.
        Some(("grpc.health.v1.Health", _)) => None,
        Some(("grpc.reflection.v1.ServerReflection", _)) => Some(Role::Read),
        Some(("mesh.v1.Control", method)) if LOOKS.contains(&method) => Some(Role::Read),
        _ => Some(Role::Write),
    }
}

async fn check(State(guard): State<Arc<Guard>>, mut request: Request, next: Next) -> Response {
    let Some(needed) = needed(request.uri().path()) else { return next.run(request).await };
    let peer = request.extensions().get::<Peer>();
    let address = peer.map(|peer| peer.address);
    let who = guard.identify(request.headers(), peer.map_or(&[], |peer| &peer.names));
    let asked = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
    let who = match who {
        Ok(who) if who.role >= needed => who,
        refused => {
            let (name, status) = match refused {
                Ok(who) => {
                    let detail =
                        format!("{asked} needs the role write, and {} has {}: see control in the sidecar's config", who.name, who.role);
                    (who.name, Status::permission_denied(detail))
                }
                Err(status) => ("unknown".into(), status),
            };
            tracing::warn!(target: "audit", who = &*name, from = address.map(tracing::field::display), asked, refused = status.message(), "refused");
            return status.into_http::<Body>();
        }
    };
    let name = who.name.clone();
    request.extensions_mut().insert(who);
    let response = next.run(request).await;
    if needed == Role::Write {
        // A status in the head is an error; what is said of a success in the end is the answer's own matter.
        let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
        tracing::info!(target: "audit", who = &*name, from = address.map(tracing::field::display), asked, code = ?code, "answered");
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AdminToken;

    fn authorization(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        headers
    }

    #[test]
    fn a_token_or_a_certificate_gives_a_role() {
        let folder = tempfile::tempdir().unwrap();
        let token = |name: &str, role| {
            let file = folder.path().join(name);
            std::fs::write(&file, format!("secret-{name}\n")).unwrap();
            AdminToken { name: name.to_owned(), file, role }
        };
        let listed = AdminCertificate { name: "board.shop".to_owned(), role: Role::Read };
        let both = ControlConfig {
            tokens: vec![token("ci", Role::Write), token("board", Role::Read)],
            certificates: vec![listed.clone()],
            ..ControlConfig::default()
        };
        let guard = Guard::new(&both).unwrap();
        let role = |value: &str, names: &[String]| guard.identify(&authorization(value), names).map(|who| (who.name.to_string(), who.role));
        let board = ["x".to_owned(), "board.shop".to_owned()];
        assert_eq!(role("Bearer secret-ci", &[]).unwrap(), ("ci".to_owned(), Role::Write));
        assert_eq!(role("Bearer secret-board", &board).unwrap(), ("board".to_owned(), Role::Read));
        for wrong in ["Bearer secret", "Bearer ", "Basic secret-ci", "secret-ci"] {
            assert_eq!(role(wrong, &board).unwrap_err().code(), Code::Unauthenticated, "{wrong}");
        }
        let who = guard.identify(&HeaderMap::new(), &board).unwrap();
        assert_eq!((&*who.name, who.role), ("board.shop", Role::Read));
        assert!(guard.identify(&HeaderMap::new(), &["other".to_owned()]).unwrap_err().message().contains("--token-file"));

        let guard = Guard::new(&ControlConfig { certificates: vec![listed], ..ControlConfig::default() }).unwrap();
        assert!(guard.identify(&HeaderMap::new(), &[]).unwrap_err().message().contains("--client-cert"));
        assert!(guard.identify(&authorization("Bearer x"), &["other".to_owned()]).unwrap_err().message().contains("certificate of other"));

        let open = Guard::new(&ControlConfig::default()).unwrap();
        assert_eq!(open.identify(&HeaderMap::new(), &[]).unwrap().role, Role::Write);
        assert_eq!(&*open.identify(&HeaderMap::new(), &board).unwrap().name, "x");
        let missing =
            ControlConfig { tokens: vec![AdminToken { name: "a".into(), file: folder.path().join("none"), role: Role::Read }], ..both };
        assert!(Guard::new(&missing).unwrap_err().to_string().contains("control.tokens[].file: cannot read"));
    }

    /// A new question needs `write` until somebody says that it only looks; what is said to look must exist.
    #[test]
    fn what_only_looks_exists() {
        let set = <prost_types::FileDescriptorSet as prost::Message>::decode(mesh_proto::FILE_DESCRIPTOR_SET).unwrap();
        let services = set.file.iter().flat_map(|file| &file.service).filter(|service| service.name() == "Control");
        let methods: Vec<&str> = services.flat_map(|service| service.method.iter().map(|method| method.name())).collect();
        for look in LOOKS {
            assert!(methods.contains(&look), "{look} is none of {methods:?}");
        }
        assert_eq!(needed("/mesh.v1.Control/Apply"), Some(Role::Write));
        assert_eq!(needed("/mesh.v1.Control/GetStatus"), Some(Role::Read));
        assert_eq!(needed("/mesh.v1.Control/GetStatus/"), Some(Role::Write));
        assert_eq!(needed("/other"), Some(Role::Write));
        assert_eq!(needed("/grpc.health.v1.Health/Check"), None);
    }
}
