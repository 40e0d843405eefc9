//! The one table that maps what can go wrong at the API to HTTP (RFC 9457), to gRPC, and to `mesh.v1.Problem`.
//!
//! Invariant: a `code` is stable, and means one thing in both protocols.

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use mesh_proto::v1;
use prost::Message;
use tonic::Code;

use crate::{
    broker::{BrokerError, BrokerErrorKind},
    publish::PublishError,
    telemetry::trace::TraceContext,
};

/// The media type of an error's body.
pub(super) const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

/// What can go wrong with a request.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ApiError {
    /// A record was not published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The broker could not do something else.
    #[error("{0}")]
    Broker(BrokerError),
    /// No such path.
    #[error("there is no `{0}`")]
    UnknownPath(String),
    /// The path has other methods.
    #[error("`{path}` does not take {method}; it takes {allow}")]
    Method {
        /// The path.
        path: String,
        /// The method that was used.
        method: String,
        /// The methods that it has.
        allow: &'static str,
    },
    /// JSON that cannot be read.
    #[error("{0}")]
    Json(String),
    /// A record of a batch that has not the form of one.
    #[error("{0}")]
    Form(String),
    /// A request without a body.
    #[error("the request has no body")]
    NoBody,
    /// A tombstone with a body.
    #[error("the request has a body, and `mesh-tombstone: true`, which publishes none")]
    TombstoneWithBody,
    /// A request header, or metadata, that cannot be understood.
    #[error("the header `{name}` {reason}")]
    Header {
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A query parameter, or a field of a subscription, that cannot be understood.
    #[error("`{name}` {reason}")]
    Query {
        /// Its name.
        name: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A media type or an encoding that is not taken here.
    #[error("{0}")]
    MediaType(String),
    /// No form of the answer that the caller accepts.
    #[error("`accept: {0}` names no form that is served here")]
    NotAcceptable(String),
    /// A body beyond the limit.
    #[error("the body is larger than the {limit} bytes that are taken here")]
    BodyTooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// More records in one request than are taken.
    #[error("the request has more than {limit} records")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The body did not arrive in time.
    #[error("the rest of the body did not arrive in time")]
    BodyTimeout,
    /// The body broke off.
    #[error("the body broke off: {0}")]
    BodyBroken(String),
    /// The token is missing or wrong.
    #[error("{0}")]
    Unauthenticated(String),
    /// A browser's page asks.
    #[error("the request comes from a web page (it has the header `origin`)")]
    CrossOrigin,
    /// Several services, and the caller named none.
    #[error("several services are configured here and the request names none")]
    Unnamed,
    /// A service that is not configured.
    #[error("no service `{0}` is configured here")]
    UnknownService(String),
    /// No such route at this sidecar.
    #[error("no route `{route}` with `deliver: {mode}` runs here")]
    UnknownRoute {
        /// The route.
        route: String,
        /// What was asked for: `stream` or `pull`.
        mode: &'static str,
    },
    /// The route belongs to another service.
    #[error("the route `{route}` belongs to the service `{owner}`, not to `{caller}`")]
    ForeignRoute {
        /// The route.
        route: String,
        /// Its service.
        owner: String,
        /// The caller.
        caller: String,
    },
    /// The route is delivered in another way.
    #[error("the route `{route}` has `deliver: {has}`, not `{wants}`")]
    WrongMode {
        /// The route.
        route: String,
        /// Its mode.
        has: &'static str,
        /// The mode that was asked for.
        wants: &'static str,
    },
    /// A reader that names a route's group: it would take records from the route.
    #[error("the group `{group}` is that of the route `{route}`: a reader in it would take records from the route")]
    RouteGroup {
        /// The group.
        group: String,
        /// The route.
        route: String,
    },
    /// A delivery that is not known, or not any more.
    #[error("the delivery {0} is not waiting for an answer: it was answered before, or it never was")]
    UnknownDelivery(u64),
    /// An answer that comes too late.
    #[error(
        "the lease of the delivery {0} ended before this outcome came, so it changes nothing: the record is delivered again under another id"
    )]
    LeaseEnded(u64),
    /// A stream that says things in the wrong order.
    #[error("{0}")]
    Protocol(&'static str),
    /// The sidecar drains.
    #[error("the sidecar drains")]
    Draining,
}

impl From<BrokerError> for ApiError {
    fn from(error: BrokerError) -> Self {
        Self::Broker(error)
    }
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) code: &'static str,
    pub(super) status: StatusCode,
    pub(super) grpc: Code,
    pub(super) title: &'static str,
    pub(super) retryable: bool,
    pub(super) persisted: v1::Persisted,
    pub(super) hint: &'static str,
}

impl ApiError {
    /// The table.
    pub(super) fn row(&self) -> Row {
        use StatusCode as S;
        use v1::Persisted::{No, Possibly};
        let row = |code, status, grpc, title, hint| Row { code, status, grpc, title, retryable: false, persisted: No, hint };
        let again = |row: Row| Row { retryable: true, ..row };
        match self {
            Self::Publish(error) => {
                let row = |status, grpc, title, hint| row(error.code(), status, grpc, title, hint);
                match error {
                    PublishError::InvalidTopic { .. } => row(
                        S::BAD_REQUEST,
                        Code::InvalidArgument,
                        "Not a topic name",
                        "Use letters, digits, `.`, `_` and `-`, 249 at most.",
                    ),
                    PublishError::Void => row(
                        S::BAD_REQUEST,
                        Code::InvalidArgument,
                        "Not a topic name",
                        "`void` stands in a route's `to` only; publish to a real topic.",
                    ),
                    PublishError::ReservedTopic { .. } => {
                        row(S::FORBIDDEN, Code::PermissionDenied, "Not your topic", "Use a topic whose name does not begin with `__`.")
                    }
                    PublishError::Forbidden { .. } => row(
                        S::FORBIDDEN,
                        Code::PermissionDenied,
                        "Not your topic",
                        "Add the topic to the service's allow-list in the sidecar's config, or use one that is listed there.",
                    ),
                    PublishError::Unnamed => {
                        row(S::BAD_REQUEST, Code::InvalidArgument, "Which service?", "Name your service in the header `mesh-service`.")
                    }
                    PublishError::UnknownTopic { .. } => row(
                        S::NOT_FOUND,
                        Code::NotFound,
                        "No such topic",
                        "Check the spelling, create the topic, or declare it in the routing table (`spec.topics`), which creates it.",
                    ),
                    PublishError::InvalidHeader { .. } => row(
                        S::BAD_REQUEST,
                        Code::InvalidArgument,
                        "Not a header to publish",
                        "Rename the header. Of the mesh's own, a publisher sets only its id and its key, by their fields.",
                    ),
                    PublishError::InvalidField { .. } => row(S::BAD_REQUEST, Code::InvalidArgument, "Not a record to publish", ""),
                    PublishError::Schema { .. } => row(
                        S::UNPROCESSABLE_ENTITY,
                        Code::InvalidArgument,
                        "Not what the topic takes",
                        "Correct the value at `path`, or the topic's `schema` in the routing table. Nothing was stored.",
                    ),
                    PublishError::TooLarge { .. } => row(
                        S::PAYLOAD_TOO_LARGE,
                        Code::InvalidArgument,
                        "Too large",
                        "Publish a smaller record, or raise `limits.record_size` and the broker's own limit.",
                    ),
                    PublishError::QueueFull { .. } => again(row(
                        S::TOO_MANY_REQUESTS,
                        Code::ResourceExhausted,
                        "Slow down",
                        "Send fewer records at once, and try again after a pause.",
                    )),
                    PublishError::Unavailable { .. } => {
                        again(row(S::SERVICE_UNAVAILABLE, Code::Unavailable, "The broker is away", "Try again; nothing was stored."))
                    }
                    PublishError::TimedOut { .. } => Row {
                        persisted: Possibly,
                        ..again(row(
                            S::GATEWAY_TIMEOUT,
                            Code::DeadlineExceeded,
                            "No acknowledgement in time",
                            "The record may be stored, now or soon. Publish it again under the same `mesh-id`, so that a reader can tell.",
                        ))
                    },
                    PublishError::Unauthorized { .. } => row(
                        S::FORBIDDEN,
                        Code::PermissionDenied,
                        "The broker forbids it",
                        "Grant the sidecar's principal the right to write this topic.",
                    ),
                    PublishError::Refused { .. } => row(
                        S::UNPROCESSABLE_ENTITY,
                        Code::InvalidArgument,
                        "The broker refuses the record",
                        "Look at the topic's own settings.",
                    ),
                    PublishError::Broken { .. } => Row {
                        persisted: Possibly,
                        ..again(row(
                            S::SERVICE_UNAVAILABLE,
                            Code::Unavailable,
                            "The producer is being rebuilt",
                            "The record may be stored. Publish it again under the same `mesh-id`, so that a reader can tell.",
                        ))
                    },
                }
            }
            Self::Broker(error) => match error.kind {
                BrokerErrorKind::UnknownTopic => row("unknown-topic", S::NOT_FOUND, Code::NotFound, "No such topic", "Check the spelling."),
                BrokerErrorKind::Unauthorized => row(
                    "broker-forbids",
                    S::FORBIDDEN,
                    Code::PermissionDenied,
                    "The broker forbids it",
                    "Grant the sidecar's principal the right to read the topic and the group.",
                ),
                BrokerErrorKind::Fenced => again(row("fenced", S::CONFLICT, Code::Aborted, "Another member took over", "Subscribe again.")),
                BrokerErrorKind::Config => row(
                    "broker-config",
                    S::INTERNAL_SERVER_ERROR,
                    Code::Internal,
                    "The broker's config cannot work",
                    "Correct `broker` in the sidecar's config.",
                ),
                BrokerErrorKind::Unreachable | BrokerErrorKind::Storage | BrokerErrorKind::Other => {
                    again(row("broker-unavailable", S::SERVICE_UNAVAILABLE, Code::Unavailable, "The broker is away", "Try again."))
                }
            },
            Self::RouteGroup { .. } => row(
                "group-of-route",
                S::FORBIDDEN,
                Code::PermissionDenied,
                "Not your group",
                "Name a group of your own, or read without one.",
            ),
            Self::UnknownPath(_) => row("unknown-path", S::NOT_FOUND, Code::Unimplemented, "No such path", "See /openapi.json."),
            Self::Method { .. } => {
                row("method-not-allowed", S::METHOD_NOT_ALLOWED, Code::Unimplemented, "Wrong method", "See /openapi.json.")
            }
            Self::Json(_) => row(
                "bad-json",
                S::BAD_REQUEST,
                Code::InvalidArgument,
                "Not JSON",
                "Nothing of this was published; correct it and send it again.",
            ),
            Self::Form(_) => row(
                "bad-record",
                S::BAD_REQUEST,
                Code::InvalidArgument,
                "Not a record",
                "A record is {\"key\":…,\"value\":…,\"headers\":[{\"name\":…,\"value\":…}]}; see /openapi.json. To publish lines as they are, use ?form=value.",
            ),
            Self::NoBody => row(
                "no-body",
                S::BAD_REQUEST,
                Code::InvalidArgument,
                "No body",
                "Send the record's value as the body; to publish a null value, send `mesh-tombstone: true`.",
            ),
            Self::TombstoneWithBody => {
                row("tombstone-with-body", S::BAD_REQUEST, Code::InvalidArgument, "A tombstone has no body", "Leave one of the two out.")
            }
            Self::Header { .. } => row(
                "invalid-header",
                S::BAD_REQUEST,
                Code::InvalidArgument,
                "Not a header to take",
                "Keys and ids that are not plain text: `mesh-key-base64`. Headers that HTTP cannot carry: `mesh-headers`. See /openapi.json.",
            ),
            Self::Query { .. } => {
                row("bad-parameter", S::BAD_REQUEST, Code::InvalidArgument, "Not a parameter to take", "See /openapi.json.")
            }
            Self::MediaType(_) => row(
                "unsupported-media-type",
                S::UNSUPPORTED_MEDIA_TYPE,
                Code::InvalidArgument,
                "Not a media type to take",
                "One record: its own type. Several: application/vnd.mesh.records+json or application/x-ndjson. No content-encoding.",
            ),
            Self::NotAcceptable(_) => row(
                "not-acceptable",
                S::NOT_ACCEPTABLE,
                Code::InvalidArgument,
                "No such form of an answer",
                "Ask for application/json, application/x-ndjson or text/event-stream.",
            ),
            Self::BodyTooLarge { .. } => row(
                "body-too-large",
                S::PAYLOAD_TOO_LARGE,
                Code::InvalidArgument,
                "Too large",
                "Send fewer records in a request, publish smaller ones, or raise `limits.record_size`.",
            ),
            Self::TooMany { .. } => {
                row("too-many-records", S::PAYLOAD_TOO_LARGE, Code::InvalidArgument, "Too many records", "Split the request.")
            }
            Self::BodyTimeout => {
                again(row("body-timeout", S::REQUEST_TIMEOUT, Code::DeadlineExceeded, "The body is late", "Send it again."))
            }
            Self::BodyBroken(_) => again(row("body-broken", S::BAD_REQUEST, Code::InvalidArgument, "The body broke off", "Send it again.")),
            Self::Unauthenticated(_) => row(
                "unauthenticated",
                S::UNAUTHORIZED,
                Code::Unauthenticated,
                "No valid token",
                "Send `authorization: Bearer …` with the content of the file that `services[].token_file` names.",
            ),
            Self::CrossOrigin => row(
                "cross-origin",
                S::FORBIDDEN,
                Code::PermissionDenied,
                "Not for web pages",
                "Call the sidecar from the service, not from a browser; or send the service's token.",
            ),
            Self::Unnamed => row(
                "unnamed-service",
                S::BAD_REQUEST,
                Code::InvalidArgument,
                "Which service?",
                "Name your service in the header `mesh-service`.",
            ),
            Self::UnknownService(_) => row(
                "unknown-service",
                S::BAD_REQUEST,
                Code::InvalidArgument,
                "No such service",
                "`mesh-service` must be one of `services[].name` in the sidecar's config.",
            ),
            Self::UnknownRoute { .. } => again(row(
                "unknown-route",
                S::NOT_FOUND,
                Code::NotFound,
                "No such route here",
                "Check the name and the routing table in force (`mesh-ctl get`); a route that was just applied takes a moment.",
            )),
            Self::ForeignRoute { .. } => row(
                "foreign-route",
                S::FORBIDDEN,
                Code::PermissionDenied,
                "Not your route",
                "Correct `mesh-service`, or the route's `service`.",
            ),
            Self::WrongMode { .. } => row(
                "wrong-delivery",
                S::CONFLICT,
                Code::FailedPrecondition,
                "Delivered in another way",
                "Correct the route's `deliver` in the routing table, or use the way that it names.",
            ),
            Self::UnknownDelivery(_) => row(
                "unknown-delivery",
                S::NOT_FOUND,
                Code::NotFound,
                "Not waiting for an answer",
                "Answer each delivery once, by the `id` that came with it, to the sidecar that it came from.",
            ),
            Self::LeaseEnded(_) => row(
                "lease-ended",
                S::GONE,
                Code::FailedPrecondition,
                "Too late",
                "Answer within `lease_ms`, which is the route's `timeout`; raise that, or take fewer records at once.",
            ),
            Self::Protocol(_) => {
                row("protocol", S::BAD_REQUEST, Code::InvalidArgument, "Not expected now", "See `SubscribeRequest` in mesh.proto.")
            }
            Self::Draining => {
                again(row("draining", S::SERVICE_UNAVAILABLE, Code::Unavailable, "The sidecar drains", "Try again after its restart."))
            }
        }
    }

    /// The answer over HTTP.
    pub(super) fn response(&self, traceparent: Option<&Bytes>) -> Response<Body> {
        self.response_with(traceparent, None)
    }

    /// The answer over HTTP, with what became of each record beside the problem.
    pub(super) fn response_with(&self, traceparent: Option<&Bytes>, results: Option<&[u8]>) -> Response<Body> {
        let row = self.row();
        let mut body = self.json(traceparent);
        if let Some(results) = results {
            body.pop();
            body.extend_from_slice(b",\"results\":");
            body.extend_from_slice(results);
            body.push(b'}');
        }
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = row.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, PROBLEM_JSON);
        if matches!(row.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        match self {
            Self::Method { allow, .. } => {
                headers.insert(header::ALLOW, HeaderValue::from_static(allow));
            }
            Self::Unauthenticated(_) => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }

    /// The RFC 9457 object.
    pub(super) fn json(&self, traceparent: Option<&Bytes>) -> Vec<u8> {
        let row = self.row();
        let mut problem = serde_json::json!({
            "type": format!("urn:mesh:problem:{}", row.code),
            "title": row.title,
            "status": row.status.as_u16(),
            "detail": self.to_string(),
            "code": row.code,
            "retryable": row.retryable,
            "persisted": persisted_word(row.persisted),
        });
        if !row.hint.is_empty() {
            problem["hint"] = row.hint.into();
        }
        if let Some(path) = self.path() {
            problem["path"] = path.into();
        }
        // A request outside of any trace gets an id of its own, which the log tells too.
        let trace_id = match traceparent.and_then(|text| TraceContext::parse(text, None)) {
            Some(context) => context.trace_id_text(),
            None => uuid::Uuid::new_v4().simple().to_string(),
        };
        tracing::debug!(trace_id, code = row.code, error = %self, "a request is refused");
        problem["trace_id"] = trace_id.into();
        problem.to_string().into_bytes()
    }

    /// The answer to a record over gRPC.
    pub(super) fn proto(&self) -> v1::Problem {
        let row = self.row();
        v1::Problem {
            code: row.code.to_owned(),
            detail: self.to_string(),
            hint: row.hint.to_owned(),
            retryable: row.retryable,
            persisted: row.persisted.into(),
            path: self.path().unwrap_or_default().to_owned(),
        }
    }

    /// Where in the value the fault is, as a JSON pointer; `None` if the value is not what is wrong.
    fn path(&self) -> Option<&str> {
        match self {
            Self::Publish(PublishError::Schema { mismatch, .. }) => Some(mismatch.path.as_str()),
            _ => None,
        }
    }

    /// The answer to a call over gRPC: the problem travels in the rich error model (`google.rpc.Status.details`).
    pub(super) fn status(&self) -> tonic::Status {
        let (row, message) = (self.row(), self.to_string());
        let problem = prost_types::Any { type_url: "type.googleapis.com/mesh.v1.Problem".to_owned(), value: self.proto().encode_to_vec() };
        let rich = RichStatus { code: row.grpc as i32, message: message.clone(), details: vec![problem] };
        tonic::Status::with_details(row.grpc, message, rich.encode_to_vec().into())
    }
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RichStatus {
    #[prost(int32, tag = "1")]
    pub(super) code: i32,
    #[prost(string, tag = "2")]
    pub(super) message: String,
    #[prost(message, repeated, tag = "3")]
    pub(super) details: Vec<prost_types::Any>,
}

fn persisted_word(persisted: v1::Persisted) -> &'static str {
    match persisted {
        v1::Persisted::Possibly => "possibly",
        v1::Persisted::Yes => "yes",
        v1::Persisted::No | v1::Persisted::Unspecified => "no",
    }
}
