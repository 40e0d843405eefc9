//! Who calls: the service's name and its token.

use std::{io, sync::Arc};

use super::{
    problem::ApiError,
    token::{self, Token},
};
use crate::{config::ServiceConfig, publish::Caller};

/// The services that may call, with their tokens.
#[derive(Debug)]
pub(super) struct Callers {
    services: Vec<Service>,
}

#[derive(Debug)]
struct Service {
    name: Arc<str>,
    token: Option<Token>,
}

impl Callers {
    /// Reads the token files.
    ///
    /// # Errors
    /// A file that cannot be read, or that is empty; names it.
    pub(super) fn new(services: &[ServiceConfig]) -> io::Result<Self> {
        let services = services.iter().map(|service| {
            let token = service.token_file.as_ref().map(|file| Token::read("services[].token_file", file)).transpose()?;
            Ok(Service { name: service.name.clone(), token })
        });
        Ok(Self { services: services.collect::<io::Result<_>>()? })
    }

    /// The services' tokens.
    pub(super) fn tokens(&self) -> impl Iterator<Item = &Token> + Clone {
        self.services.iter().filter_map(|service| service.token.as_ref())
    }

    /// The name of a caller; `None` for an anonymous one.
    pub(super) fn name(&self, caller: Caller) -> Option<&Arc<str>> {
        match caller {
            Caller::Service(index) => self.services.get(index).map(|service| &service.name),
            Caller::Anonymous | Caller::Operator => None,
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
            None if self.tokens().next().is_none() => Ok(Caller::Anonymous),
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
}

fn bearer(authorization: Option<&[u8]>) -> Result<Option<&[u8]>, ApiError> {
    let Some(text) = authorization else { return Ok(None) };
    let wrong = || ApiError::Unauthenticated("`authorization` is no bearer token".to_owned());
    token::bearer(text).map(Some).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn service(name: &str, token_file: Option<PathBuf>) -> ServiceConfig {
        ServiceConfig { name: name.into(), app: None, publish: None, subscribe: None, token_file }
    }

    async fn reload(callers: &Callers) {
        for token in callers.tokens() {
            token.reload().await;
        }
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
        reload(&callers).await;
        assert!(callers.identify(Some("a"), Some(b"Bearer s3cret")).is_err());
        assert!(callers.identify(Some("a"), Some(b"Bearer other")).is_ok());
        std::fs::write(&file, "").unwrap();
        reload(&callers).await;
        assert!(callers.identify(Some("a"), Some(b"Bearer other")).is_ok());
        assert!(Callers::new(&[service("a", Some(file))]).is_err());
        let open = Callers::new(&[service("a", None), service("b", None)]).unwrap();
        assert_eq!(open.identify(None, None).unwrap(), Caller::Anonymous);
    }
}
