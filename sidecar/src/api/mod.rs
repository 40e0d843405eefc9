//! What the service calls: HTTP and gRPC on one port. Floor 5.
//!
//! Invariant: a request is answered in the terms of one table ([`problem`]), whatever the protocol.
//! Invariant: what a peer sends is bounded before it is kept: heads, bodies, streams, connections.
//! Invariant: every task is the listener's ([`listen`]) or the API's own tracker's, and has ended when [`Api::serve`] returns.

use std::{convert::Infallible, fmt, io, sync::Arc};

use axum::body::Body;
use futures_util::future::BoxFuture;
use http::{Request, Response, header};
use hyper::body::Incoming;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tower::Service;

use crate::{broker::Broker, config::ServiceConfig, deliver::desk::Desks, publish::Publisher, table::TableWatch};

pub mod admin;
mod auth;
mod batch;
mod fields;
mod follow;
mod grpc;
pub mod guard;
mod lines;
pub mod listen;
mod message;
mod outcomes;
mod paths;
pub mod probe;
pub mod problem;
mod produce;
mod pull;
mod subscribe;
#[cfg(test)]
mod tests;
pub mod tls;
mod token;

/// The API. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    inner: Arc<Inner>,
}

struct Inner {
    publisher: Publisher,
    broker: Arc<dyn Broker>,
    desks: Desks,
    /// Which groups are the routes'.
    table: TableWatch,
    callers: auth::Callers,
    tasks: TaskTracker,
    /// Subscribers are sent away; publishing goes on.
    draining: CancellationToken,
    /// Everything ends.
    closing: CancellationToken,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("publisher", &self.inner.publisher).finish_non_exhaustive()
    }
}

/// Whether the files with the services' tokens can be used.
///
/// # Errors
/// A token file that cannot be read, or that is empty; names it.
pub fn check_tokens(services: &[ServiceConfig]) -> io::Result<()> {
    auth::Callers::new(services).map(drop)
}

impl Api {
    /// The API of the publisher's services. `draining` ends subscriptions and pulls, while publishing goes on until [`Api::serve`] is
    /// told to shut down.
    ///
    /// # Errors
    /// A token file that cannot be read.
    pub fn new(
        publisher: Publisher,
        broker: Arc<dyn Broker>,
        desks: Desks,
        table: TableWatch,
        draining: CancellationToken,
    ) -> io::Result<Self> {
        let callers = auth::Callers::new(&publisher.config().services)?;
        let inner =
            Inner { publisher, broker, desks, table, callers, tasks: TaskTracker::new(), draining, closing: CancellationToken::new() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Serves until `shutdown`, then drains under `limits.drain_timeout`. Returns how many connections had to be cut. Once.
    pub async fn serve(self, listener: impl Into<listen::Listener>, shutdown: CancellationToken) -> usize {
        let drain = self.inner.publisher.config().limits.drain_timeout;
        let (routes, health) = grpc::routes(&self);
        let ended = shutdown.clone();
        let api = self.clone();
        let housekeeping = async move {
            grpc::begin_health(&health).await;
            tokio::select! {
                never = token::keep_fresh(api.inner.callers.tokens()) => match never {},
                () = ended.cancelled() => {}
            }
            api.inner.draining.cancel();
            api.inner.closing.cancel();
            grpc::end_health(health).await;
        };
        let dispatch = Dispatch { api: self.clone(), grpc: routes };
        let options = listen::Options::new("api").drain(drain);
        let (cut, ()) = tokio::join!(listen::serve(listener, dispatch, options, shutdown), housekeeping);
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        cut
    }
}

/// Tells gRPC from HTTP.
#[derive(Clone)]
struct Dispatch {
    api: Api,
    grpc: Routes,
}

impl hyper::service::Service<Request<Incoming>> for Dispatch {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let is_grpc = |value: &http::HeaderValue| value.as_bytes().starts_with(b"application/grpc");
        if request.headers().get(header::CONTENT_TYPE).is_some_and(is_grpc) {
            let mut grpc = self.grpc.clone();
            return Box::pin(async move { Ok(grpc.call(request).await?.map(Body::new)) });
        }
        let api = self.api.clone();
        Box::pin(async move { Ok(paths::answer(&api, request).await) })
    }
}
