//! The connection to a sidecar's admin listener, and what its errors mean.

use std::{error::Error as _, time::Duration};

use mesh_proto::{
    admin::{AdminAddress, AdminClient, ConnectError, root_cause},
    v1,
};
use mesh_routing::Table;
use tonic::{Code as GrpcCode, ConnectError as ConnectFailed, Request, Status};

use crate::output::{Code, Failure};

/// How long a question may take.
pub(crate) const ASK: Duration = Duration::from_secs(20);
/// How long an apply may take: the sidecar asks the broker many things.
pub(crate) const APPLY: Duration = Duration::from_secs(120);
/// The largest answer, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// A client of `mesh.v1.Control`.
pub(crate) type Client = AdminClient;

/// Connects to a sidecar.
pub(crate) async fn connect(admin: &AdminAddress) -> Result<Client, Failure> {
    let hint = "is mesh-sidecar running there? Its admin address is `listen.admin` in its config (default 127.0.0.1:4501). \
                Another sidecar is chosen with --admin URL or MESH_ADMIN; https:// if it speaks TLS (`listen.tls.admin`)";
    let client = admin.connect().await.map_err(|error| match error {
        ConnectError::Unreachable(cause) => Failure::new(format!("no sidecar answers at {admin}: {cause}"), hint),
        ConnectError::Unusable(problem) => Failure::new(problem, "see --token-file, --ca, --client-cert and --client-key"),
    })?;
    Ok(client.max_decoding_message_size(MAX_ANSWER).max_encoding_message_size(MAX_ANSWER))
}

/// A request with its deadline.
pub(crate) fn request<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// The state of the mesh. `watch`: it will be asked for again and again, so instances are to report more often for a while.
pub(crate) async fn status(client: &mut Client, watch: bool) -> Result<v1::GetStatusResponse, Failure> {
    let asked = client.get_status(request(v1::GetStatusRequest { watch }, ASK)).await;
    asked.map(tonic::Response::into_inner).map_err(|status| refused(&status))
}

/// The table in force; `None` where there is none, or one that this version cannot read.
pub(crate) async fn table(client: &mut Client) -> Result<Option<Table>, Failure> {
    match client.get_table(request(v1::GetTableRequest { generation: None }, ASK)).await {
        Ok(table) => Ok(mesh_routing::parse("the table in force", &table.into_inner().json).ok()),
        Err(status) if status.code() == GrpcCode::NotFound => Ok(None),
        Err(status) => Err(refused(&status)),
    }
}

/// Whether a connection that was there broke: what a sidecar answers has no cause on this side, and one that was not reached was asked nothing.
fn broke(status: &Status) -> bool {
    let mut cause = status.source();
    let some = cause.is_some();
    while let Some(error) = cause {
        if error.is::<ConnectFailed>() {
            return false;
        }
        cause = error.source();
    }
    some
}

/// What it means that a stream failed. `begun`: something may have been changed by then.
pub(crate) fn cut(status: &Status, begun: bool, hint: &str) -> Failure {
    let failure = refused(status);
    match failure {
        Failure::Said { message, .. } if begun && (broke(status) || status.code() == GrpcCode::Unavailable) => {
            Failure::Said { code: Code::Unknown, message, hint: hint.to_owned() }
        }
        other => other,
    }
}

/// What a sidecar's refusal means for us, or that it is gone: what was not begun is an error, of what was nothing is known.
pub(crate) fn refused(status: &Status) -> Failure {
    let message = match status.source() {
        Some(source) => format!("{}: {}", status.message(), root_cause(source)),
        None => status.message().to_owned(),
    };
    let (code, hint) = match status.code() {
        _ if broke(status) => (Code::Unknown, "`mesh-ctl status` tells what is in force"),
        GrpcCode::Aborted => (Code::Conflict, ""),
        GrpcCode::FailedPrecondition | GrpcCode::PermissionDenied => (Code::No, ""),
        GrpcCode::Unauthenticated => (Code::Error, ""),
        GrpcCode::Unknown | GrpcCode::DeadlineExceeded | GrpcCode::Cancelled => (Code::Unknown, "`mesh-ctl status` tells what is in force"),
        GrpcCode::Unavailable => (Code::Error, "`mesh-ctl status` tells what the sidecar waits for"),
        GrpcCode::Unimplemented => {
            (Code::Error, "that is no admin listener of a mesh-sidecar, or it is of another version: see `listen.admin`")
        }
        _ => (Code::Error, ""),
    };
    let message = if message.is_empty() { format!("the listener answers {:?}", status.code()) } else { message };
    Failure::Said { code, message, hint: hint.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use super::*;

    /// A status that was made on this side.
    fn here(code: GrpcCode) -> Status {
        let mut status = Status::new(code, "keep-alive timed out");
        status.set_source(Arc::new(io::Error::from(io::ErrorKind::BrokenPipe)));
        status
    }

    #[test]
    fn what_was_not_begun_is_an_error_and_of_what_was_nothing_is_known() {
        let unreached = Status::from_error(Box::new(ConnectFailed(Box::new(io::Error::from(io::ErrorKind::ConnectionRefused)))));
        assert_eq!((unreached.code(), refused(&unreached).code()), (GrpcCode::Unavailable, Code::Error));
        assert_eq!(refused(&Status::unavailable("the broker is away")).code(), Code::Error, "the sidecar said so");
        for code in [GrpcCode::Unavailable, GrpcCode::Internal, GrpcCode::Unknown] {
            assert_eq!(refused(&here(code)).code(), Code::Unknown, "{code:?}");
        }

        let away = Status::unavailable("the broker is away");
        assert_eq!((cut(&away, false, "").code(), cut(&away, true, "").code()), (Code::Error, Code::Unknown));
        assert_eq!(cut(&Status::failed_precondition("no"), true, "").code(), Code::No, "it says what is");
        let Failure::Said { code, hint, .. } = cut(&here(GrpcCode::Unavailable), true, "again") else { panic!("a failure") };
        assert_eq!((code, &*hint), (Code::Unknown, "again"));
    }
}
