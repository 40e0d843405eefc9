//! Who calls: the service's name and its token.
//!
//! Invariant: tokens are compared as digests in constant time, and never logged.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use sha2::{Digest, Sha256};

use super::problem::ApiError;
use crate::{config::ServiceConfig, publish::Caller};

/// The services that may call, with the digests of their tokens.
#[derive(Debug)]
pub(super) struct Callers {
    services: Vec<Service>,
}

#[derive(Debug)]
struct Service {
    name: Arc<str>,
    token: Option<Token>,
}

#[derive(Debug)]
struct Token {
    file: PathBuf,
    digest: RwLock<[u8; 32]>,
}

impl Callers {
    /// Reads the token files.
    ///
    /// # Errors
    /// A file that cannot be read, or that is empty; names it.
    pub(super) fn new(services: &[ServiceConfig]) -> io::Result<Self> {
        let services = services.iter().map(|service| {
            let token = match &service.token_file {
                None => None,
                Some(file) => {
                    let text = std::fs::read(file).map_err(|error| unreadable(file, &error))?;
                    Some(Token { file: file.clone(), digest: RwLock::new(digest_of_file(file, &text)?) })
                }
            };
            Ok(Service { name: service.name.clone(), token })
        });
        Ok(Self { services: services.collect::<io::Result<_>>()? })
    }

    /// Whether any service has a token.
    pub(super) fn any_token(&self) -> bool {
        self.services.iter().any(|service| service.token.is_some())
    }

    /// The name of a caller; `None` for an anonymous one.
    pub(super) fn name(&self, caller: Caller) -> Option<&Arc<str>> {
        match caller {
            Caller::Service(index) => self.services.get(index).map(|service| &service.name),
            Caller::Anonymous => None,
        }
    }

    /// Who calls, by `mesh-service` and `authorization`. One service is implied; one of several may also be told by its token.
    /// Without any token, one of several services may stay anonymous.
    ///
    /// # Errors
    /// [`ApiError::UnknownService`], [`ApiError::Unauthenticated`] and [`ApiError::Unnamed`].
    pub(super) fn identify(&self, service: Option<&str>, authorization: Option<&[u8]>) -> Result<Caller, ApiError> {
        let named = match service {
            Some(name) => {
                let found = self.services.iter().position(|service| *service.name == *name);
                Some(found.ok_or_else(|| ApiError::UnknownService(crate::record::clip(name)))?)
            }
            None if self.services.len() == 1 => Some(0),
            None => None,
        };
        match named {
            Some(index) => match self.services.get(index).and_then(|service| service.token.as_ref()) {
                None => Ok(Caller::Service(index)),
                Some(token) if bearer(authorization)?.is_some_and(|given| token.is(given)) => Ok(Caller::Service(index)),
                Some(_) => Err(ApiError::Unauthenticated(match authorization {
                    None => "the request has no token".to_owned(),
                    Some(_) => "the request's token is not the service's".to_owned(),
                })),
            },
            None if !self.any_token() => Ok(Caller::Anonymous),
            None => match bearer(authorization)? {
                None => Err(ApiError::Unnamed),
                Some(given) => {
                    let owner = self.services.iter().position(|service| service.token.as_ref().is_some_and(|token| token.is(given)));
                    owner.map(Caller::Service).ok_or_else(|| ApiError::Unauthenticated("the request's token is no service's".to_owned()))
                }
            },
        }
    }

    /// Whether the caller may act for the service: it is it, or it is anonymous.
    pub(super) fn is(&self, caller: Caller, service: &str) -> bool {
        self.name(caller).is_none_or(|name| **name == *service)
    }

    /// Reads the token files again, so that a token can be changed without a restart. What cannot be read stays as it was.
    pub(super) async fn reload(&self) {
        for token in self.services.iter().filter_map(|service| service.token.as_ref()) {
            let read = match tokio::fs::read(&token.file).await {
                Ok(text) => digest_of_file(&token.file, &text),
                Err(error) => Err(unreadable(&token.file, &error)),
            };
            match read {
                Ok(digest) => *token.digest.write().unwrap_or_else(PoisonError::into_inner) = digest,
                Err(error) => tracing::warn!(%error, "the token that was read before stays in force"),
            }
        }
    }
}

impl Token {
    fn is(&self, given: &[u8]) -> bool {
        let digest = self.digest.read().unwrap_or_else(PoisonError::into_inner);
        let given: [u8; 32] = Sha256::digest(given).into();
        // Digests differ everywhere when tokens differ anywhere, and all bytes are looked at.
        digest.iter().zip(given).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
    }
}

fn bearer(authorization: Option<&[u8]>) -> Result<Option<&[u8]>, ApiError> {
    let Some(text) = authorization else { return Ok(None) };
    match text.split_at_checked(7) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => Ok(Some(token.trim_ascii())),
        _ => Err(ApiError::Unauthenticated("`authorization` is no bearer token".to_owned())),
    }
}

fn unreadable(file: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("services[].token_file: cannot read `{}`: {error}", file.display()))
}

fn digest_of_file(file: &Path, text: &[u8]) -> io::Result<[u8; 32]> {
    match text.trim_ascii() {
        [] => Err(io::Error::new(io::ErrorKind::InvalidData, format!("services[].token_file: `{}` is empty", file.display()))),
        token => Ok(Sha256::digest(token).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, token_file: Option<PathBuf>) -> ServiceConfig {
        ServiceConfig { name: name.into(), app: None, publish: None, subscribe: None, token_file }
    }

    #[tokio::test]
    async fn callers_are_told_by_name_and_token() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "s3cret\n").unwrap();
        let callers = Callers::new(&[service("a", Some(file.clone())), service("b", None)]).unwrap();
        assert_eq!(callers.identify(Some("a"), Some(b"Bearer s3cret")).unwrap(), Caller::Service(0));
        assert_eq!(callers.identify(None, Some(b"bearer s3cret")).unwrap(), Caller::Service(0));
        assert_eq!(callers.identify(Some("b"), None).unwrap(), Caller::Service(1));
        assert!(matches!(callers.identify(Some("a"), None), Err(ApiError::Unauthenticated(_))));
        assert!(matches!(callers.identify(Some("a"), Some(b"Bearer s3cre")), Err(ApiError::Unauthenticated(_))));
        assert!(matches!(callers.identify(Some("a"), Some(b"Basic s3cret")), Err(ApiError::Unauthenticated(_))));
        assert!(matches!(callers.identify(None, None), Err(ApiError::Unnamed)));
        assert!(matches!(callers.identify(Some("c"), None), Err(ApiError::UnknownService(_))));
        std::fs::write(&file, "other").unwrap();
        callers.reload().await;
        assert!(callers.identify(Some("a"), Some(b"Bearer s3cret")).is_err());
        assert!(callers.identify(Some("a"), Some(b"Bearer other")).is_ok());
        std::fs::write(&file, "").unwrap();
        callers.reload().await;
        assert!(callers.identify(Some("a"), Some(b"Bearer other")).is_ok());
        assert!(Callers::new(&[service("a", Some(file))]).is_err());
        let open = Callers::new(&[service("a", None), service("b", None)]).unwrap();
        assert_eq!(open.identify(None, None).unwrap(), Caller::Anonymous);
    }
}
