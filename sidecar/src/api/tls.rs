//! TLS of a listener: its certificate, and whether clients need one.
//!
//! Invariant: files that cannot be used never take the place of those that can: what was read before stays in force.

use std::{
    convert::Infallible,
    fmt, io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use sha2::{Digest, Sha256};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};

use crate::config::TlsFiles;

/// How often the files are read again.
const RELOAD: Duration = Duration::from_secs(10);

/// The TLS of one listener.
pub struct Tls {
    /// Where its files are named in the config: `listen.tls.api`.
    field: &'static str,
    files: TlsFiles,
    config: ArcSwap<ServerConfig>,
    /// Of the files that were looked at last, whether they could be used or not.
    seen: Mutex<[u8; 32]>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("field", &self.field).field("files", &self.files).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files. `field` is where they are named in the config.
    ///
    /// # Errors
    /// A file that cannot be read, holds no certificate or key, or a key of another certificate; names field and file.
    pub fn load(field: &'static str, files: &TlsFiles) -> io::Result<Self> {
        let read = Read::new(field, files)?;
        let config = ArcSwap::from_pointee(read.config(field, files)?);
        Ok(Self { field, files: files.clone(), config, seen: Mutex::new(read.digest()) })
    }

    /// For the next connection.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.load_full())
    }

    /// Reads the files again and again: a certificate is renewed without a restart. Connections that there are keep theirs.
    pub(super) async fn keep_fresh(self: Arc<Self>) -> Infallible {
        let mut ticks = tokio::time::interval(RELOAD);
        loop {
            ticks.tick().await;
            let tls = self.clone();
            // Keys are checked, which takes a moment, and files may lie on a slow disk.
            if let Err(error) = tokio::task::spawn_blocking(move || tls.reload()).await {
                tracing::error!(field = self.field, %error, "reading the TLS files again failed");
            }
        }
    }

    fn reload(&self) {
        let result = Read::new(self.field, &self.files).and_then(|read| {
            let digest = read.digest();
            if std::mem::replace(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner), digest) != digest {
                self.config.store(Arc::new(read.config(self.field, &self.files)?));
                tracing::info!(field = self.field, "the TLS files have changed: new connections use them");
            }
            Ok(())
        });
        if let Err(error) = result {
            tracing::warn!(%error, "the TLS files that were read before stay in force");
        }
    }
}

/// The files' content.
struct Read {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Read {
    fn new(field: &str, files: &TlsFiles) -> io::Result<Self> {
        let read = |name: &str, file: &Path| {
            std::fs::read(file)
                .map_err(|error| io::Error::new(error.kind(), format!("{field}.{name}: cannot read `{}`: {error}", file.display())))
        };
        let client_ca = files.client_ca.as_deref().map(|file| read("client_ca", file)).transpose()?;
        Ok(Self { cert: read("cert", &files.cert)?, key: read("key", &files.key)?, client_ca })
    }

    fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        for part in [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()].into_iter().flatten() {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        digest.finalize().into()
    }

    fn config(&self, field: &str, files: &TlsFiles) -> io::Result<ServerConfig> {
        let wrong = |name: &str, file: &Path, problem: &dyn fmt::Display| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{field}.{name}: `{}`: {problem}", file.display()))
        };
        let chain = certificates(&self.cert).map_err(|problem| wrong("cert", &files.cert, &problem))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| wrong("key", &files.key, &format!("no private key in PEM form: {error}")))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong("cert", &files.cert, &error))?;
        let builder = match (&self.client_ca, &files.client_ca) {
            (Some(text), Some(file)) => {
                let mut roots = RootCertStore::empty();
                for root in certificates(text).map_err(|problem| wrong("client_ca", file, &problem))? {
                    roots.add(root).map_err(|error| wrong("client_ca", file, &error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .build()
                    .map_err(|error| wrong("client_ca", file, &error))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        // Also where the key is of another certificate.
        let mut config = builder.with_single_cert(chain, key).map_err(|error| wrong("key", &files.key, &error))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(none) if none.is_empty() => Err("no certificate in PEM form".to_owned()),
        Ok(all) => Ok(all),
        Err(error) => Err(format!("no certificate in PEM form: {error}")),
    }
}

/// The names of a client's certificate: the DNS names and URIs of its subjectAltName, and `sha256:` with its fingerprint. In lower case.
pub(super) fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let mut names = Vec::new();
    if let Ok(parsed) = webpki::EndEntityCert::try_from(certificate) {
        names.extend(parsed.valid_dns_names().chain(parsed.valid_uri_names()).map(str::to_lowercase));
    }
    let digest = Sha256::digest(certificate.as_ref());
    names.push(digest.iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}")));
    names
}

#[cfg(test)]
pub(super) mod testing {
    use std::path::{Path, PathBuf};

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use crate::config::TlsFiles;

    /// An authority, and what it signs, as PEM files in a folder.
    pub(in crate::api) struct Authority {
        pub(in crate::api) folder: tempfile::TempDir,
        pub(in crate::api) pem: String,
        issuer: Issuer<'static, KeyPair>,
    }

    impl Authority {
        pub(in crate::api) fn new() -> Self {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            let pem = params.self_signed(&key).unwrap().pem();
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("ca.pem"), &pem).unwrap();
            Self { folder, pem, issuer: Issuer::new(params, key) }
        }

        /// A certificate for a DNS name or an address: `(certificate, key)` as PEM.
        pub(in crate::api) fn sign(&self, name: &str) -> (String, String) {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
        }

        pub(in crate::api) fn path(&self, file: &str) -> PathBuf {
            self.folder.path().join(file)
        }

        /// The files of a listener.
        pub(in crate::api) fn files(&self, mutual: bool) -> TlsFiles {
            let (cert, key) = self.sign("localhost");
            std::fs::write(self.path("tls.crt"), cert).unwrap();
            std::fs::write(self.path("tls.key"), key).unwrap();
            TlsFiles { cert: self.path("tls.crt"), key: self.path("tls.key"), client_ca: mutual.then(|| self.path("ca.pem")) }
        }
    }

    pub(in crate::api) fn write(path: &Path, text: &str) {
        std::fs::write(path, text).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::*, *};

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let authority = Authority::new();
        let good = authority.files(true);
        assert!(Tls::load("listen.tls.api", &good).is_ok());
        let problem = |files: &TlsFiles| Tls::load("listen.tls.api", files).unwrap_err().to_string();
        let missing = authority.path("none");
        assert!(problem(&TlsFiles { cert: missing.clone(), ..good.clone() }).contains("listen.tls.api.cert: cannot read `"));
        assert!(problem(&TlsFiles { client_ca: Some(missing), ..good.clone() }).contains("listen.tls.api.client_ca: cannot read `"));
        assert!(problem(&TlsFiles { cert: good.key.clone(), ..good.clone() }).contains("no certificate in PEM form"));
        assert!(problem(&TlsFiles { key: good.cert.clone(), ..good.clone() }).contains("listen.tls.api.key: `"));
        write(&authority.path("other.key"), &authority.sign("localhost").1);
        let other = problem(&TlsFiles { key: authority.path("other.key"), ..good });
        assert!(other.contains("listen.tls.api.key: `"), "{other}");
    }

    #[test]
    fn changed_files_are_taken_and_broken_ones_are_not() {
        let authority = Authority::new();
        let files = authority.files(false);
        let tls = Tls::load("listen.tls.api", &files).unwrap();
        let first = tls.config.load_full();
        tls.reload();
        assert!(Arc::ptr_eq(&first, &tls.config.load_full()), "nothing has changed");
        write(&files.cert, "");
        tls.reload();
        assert!(Arc::ptr_eq(&first, &tls.config.load_full()), "what cannot be used changes nothing");
        authority.files(false);
        tls.reload();
        assert!(!Arc::ptr_eq(&first, &tls.config.load_full()));
    }

    #[test]
    fn a_certificate_is_known_by_its_names_and_its_fingerprint() {
        let authority = Authority::new();
        let (pem, _) = authority.sign("Board.Shop");
        let names = names(&certificates(pem.as_bytes()).unwrap()[0]);
        assert_eq!(names[0], "board.shop");
        assert!(names[1].len() == 71 && names[1].starts_with("sha256:"), "{names:?}");
    }
}
