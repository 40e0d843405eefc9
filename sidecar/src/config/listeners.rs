//! The listeners: where they listen, what speaks TLS, and who may use the admin listener.

use std::{net::SocketAddr, path::PathBuf};

use mesh_routing::sign::PublicKey;

use super::{
    AdminCertificate, AdminToken, ControlConfig, Listen, ListenTls, Role, ServiceConfig, TlsFiles,
    read::{Fields, Reader, join},
    source::{Node, Value},
    values::{name, path, socket},
};

impl Reader {
    /// The addresses, and the TLS of those that have it.
    pub(super) fn listen(
        &mut self,
        field: Option<(String, Node)>,
        services: &[ServiceConfig],
        control: &ControlConfig,
    ) -> (Listen, ListenTls) {
        let default = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let mut listen = Listen { api: default(4500), admin: default(4501), probe: default(4502) };
        let Some((path, node)) = field else { return (listen, ListenTls::default()) };
        let Some(mut fields) = self.fields(&path, node, &["api", "admin", "probe", "tls"]) else { return (listen, ListenTls::default()) };
        let tls = self.tls(fields.take("tls"));
        let mut taken: Vec<(&str, SocketAddr)> = Vec::new();
        for (name, address) in [("api", &mut listen.api), ("admin", &mut listen.admin), ("probe", &mut listen.probe)] {
            let field = fields.take(name);
            let place = field.as_ref().map_or_else(|| fields.place.clone(), |(_, node)| node.place.clone());
            if let Some(given) = self.parsed(field, socket) {
                *address = given;
            }
            let (at, text) = (join(&path, name), address.to_string());
            if !address.ip().is_loopback()
                && let Some((problem, hint)) = open_to_all(name, services, control, &tls)
            {
                self.fault(&place, &at, Some(&text), problem, hint);
            }
            let clashes = |other: &SocketAddr| {
                let overlap = other.ip() == address.ip() || other.ip().is_unspecified() || address.ip().is_unspecified();
                address.port() != 0 && other.port() == address.port() && overlap
            };
            if let Some((other, _)) = taken.iter().find(|(_, other)| clashes(other)) {
                self.fault(&place, &at, Some(&text), format!("is also the address of {path}.{other}"), "give each listener its own port");
            }
            taken.push((name, *address));
        }
        (listen, tls)
    }

    fn tls(&mut self, field: Option<(String, Node)>) -> ListenTls {
        let Some((at, node)) = field else { return ListenTls::default() };
        let Some(mut fields) = self.fields(&at, node, &["api", "admin"]) else { return ListenTls::default() };
        ListenTls { api: self.tls_files(fields.take("api")), admin: self.tls_files(fields.take("admin")) }
    }

    fn tls_files(&mut self, field: Option<(String, Node)>) -> Option<TlsFiles> {
        let (at, node) = field?;
        let mut fields = self.fields(&at, node, &["cert", "key", "client_ca"])?;
        let cert = self.needed_file(&mut fields, "cert", "give the PEM file with the listener's certificate chain");
        let key = self.needed_file(&mut fields, "key", "give the PEM file with the certificate's private key");
        let client_ca = self.parsed(fields.take("client_ca"), path);
        Some(TlsFiles { cert: cert?, key: key?, client_ca })
    }

    fn needed_file(&mut self, fields: &mut Fields, field: &str, hint: &str) -> Option<PathBuf> {
        match fields.take(field) {
            Some(given) => self.parsed(Some(given), path),
            None => {
                let (place, at) = (fields.place.clone(), join(&fields.path, field));
                self.fault(&place, &at, None, "is missing", hint);
                None
            }
        }
    }

    /// Who may use the admin listener.
    pub(super) fn control(&mut self, field: Option<(String, Node)>) -> ControlConfig {
        let Some((at, node)) = field else { return ControlConfig::default() };
        let Some(mut fields) = self.fields(&at, node, &["trusted_keys", "tokens", "certificates"]) else { return ControlConfig::default() };
        let mut control = ControlConfig::default();
        // Not `take`: a list that somebody emptied would let everything in.
        if let Some(entry) = fields.entries.iter().position(|entry| entry.name == "trusted_keys").map(|at| fields.entries.remove(at)) {
            control.trusted_keys = self.keys(&join(&at, &entry.name), entry.node);
        }
        for (at, mut fields) in self.entries(fields.take("tokens"), &["name", "file", "role"]) {
            let file = self.needed_file(&mut fields, "file", "give the file that holds the token");
            if let (Some(name), Some(file), Some(role)) = (self.named(&mut fields, name), file, self.role(&mut fields)) {
                if control.tokens.iter().any(|other| other.name == name) {
                    self.fault(&fields.place, &join(&at, "name"), Some(&name), "names two tokens", "give each its own name");
                }
                control.tokens.push(AdminToken { name, file, role });
            }
        }
        for (at, mut fields) in self.entries(fields.take("certificates"), &["name", "role"]) {
            if let (Some(name), Some(role)) = (self.named(&mut fields, certificate_name), self.role(&mut fields)) {
                if control.certificates.iter().any(|other| other.name == name) {
                    self.fault(&fields.place, &join(&at, "name"), Some(&name), "is named twice", "remove one of the two");
                }
                control.certificates.push(AdminCertificate { name, role });
            }
        }
        control
    }

    fn keys(&mut self, path: &str, node: Node) -> Vec<PublicKey> {
        let mut keys = Vec::new();
        let items = match node.value {
            Value::List(items) if !items.is_empty() => items,
            _ => {
                let hint = "as in [\"ed25519:…\"]; without the field no table needs a signature";
                self.fault(&node.place, path, None, "must be a list of public keys, and not an empty one", hint);
                return keys;
            }
        };
        for (index, item) in items.into_iter().enumerate() {
            let path = format!("{path}[{index}]");
            let Some(text) = self.text(&path, &item) else { continue };
            match text.parse::<PublicKey>() {
                Ok(key) if keys.contains(&key) => self.fault(&item.place, &path, Some(&text), "is named twice", "remove one of the two"),
                Ok(key) => keys.push(key),
                // The value is not shown: it may be a private key.
                Err(error) => {
                    self.fault(&item.place, &path, None, error.to_string(), "give the public key that `mesh-ctl keys generate` printed");
                }
            }
        }
        keys
    }

    /// The maps of a list, each with its path.
    fn entries(&mut self, field: Option<(String, Node)>, known: &[&str]) -> Vec<(String, Fields)> {
        let Some((at, node)) = field else { return Vec::new() };
        let Value::List(items) = node.value else {
            self.fault(&node.place, &at, None, "must be a list", format!("as in [{{{}: …}}]", known.join(": …, ")));
            return Vec::new();
        };
        let entry = |(index, item)| {
            let at = format!("{at}[{index}]");
            self.fields(&at, item, known).map(|fields| (at, fields))
        };
        items.into_iter().enumerate().filter_map(entry).collect()
    }

    fn named(&mut self, fields: &mut Fields, check: impl FnOnce(&str) -> Result<String, (String, String)>) -> Option<String> {
        match fields.take("name") {
            Some(field) => self.parsed(Some(field), check),
            None => {
                let (place, at) = (fields.place.clone(), join(&fields.path, "name"));
                self.fault(&place, &at, None, "is missing", "name it: the name stands in the audit record");
                None
            }
        }
    }

    fn role(&mut self, fields: &mut Fields) -> Option<Role> {
        let Some(field) = fields.take("role") else {
            let (place, at) = (fields.place.clone(), join(&fields.path, "role"));
            self.fault(&place, &at, None, "is missing", "give read or write");
            return None;
        };
        self.parsed(Some(field), |text| match text {
            "read" => Ok(Role::Read),
            "write" => Ok(Role::Write),
            _ => Err(("is no role".to_owned(), "give read or write".to_owned())),
        })
    }
}

/// Why a listener may not be reached from other machines, and what to do.
fn open_to_all(
    listener: &str,
    services: &[ServiceConfig],
    control: &ControlConfig,
    tls: &ListenTls,
) -> Option<(&'static str, &'static str)> {
    let tokens = !services.is_empty() && services.iter().all(|service| service.token_file.is_some());
    let certificates = tls.admin.as_ref().is_some_and(|files| files.client_ca.is_some());
    match listener {
        "api" if !tokens && tls.api.is_none() => Some((
            "is reachable from other machines, and asks callers for no token",
            "bind 127.0.0.1, or give every service a token_file, or give listen.tls.api a cert and a key",
        )),
        "admin" if control.tokens.is_empty() && !certificates => Some((
            "is reachable from other machines, and whoever reaches it rewires the mesh",
            "bind 127.0.0.1 and reach it through a tunnel (kubectl port-forward, ssh -L), or give control.tokens, or give listen.tls.admin a client_ca",
        )),
        _ => None,
    }
}

/// A DNS name, a URI (`spiffe://…`), or `sha256:` and 64 hexadecimal digits.
fn certificate_name(text: &str) -> Result<String, (String, String)> {
    let hex = |digits: &str| digits.len() == 64 && digits.bytes().all(|c| c.is_ascii_hexdigit());
    if text.strip_prefix("sha256:").is_some_and(|digits| !hex(digits)) {
        return Err(("is no fingerprint".to_owned(), "write sha256: and the 64 hexadecimal digits of the certificate's digest".to_owned()));
    }
    if text.is_empty() || text.len() > 253 || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err((
            "is no name in a certificate".to_owned(),
            "give a DNS name or a URI of its subjectAltName, or sha256:<fingerprint>".to_owned(),
        ));
    }
    Ok(text.to_lowercase())
}
