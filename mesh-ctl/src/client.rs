//! The connection to a sidecar's admin listener, and what its errors mean.

use std::{error::Error as _, time::Duration};

use mesh_proto::{
    admin::{AdminAddress, AdminClient, ConnectError, root_cause},
    v1,
};
use mesh_routing::Table;
use tonic::{Code as GrpcCode, Request, Status};

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

/// What a sidecar's refusal means for us.
pub(crate) fn refused(status: &Status) -> Failure {
    let message = match status.source() {
        Some(source) => format!("{}: {}", status.message(), root_cause(source)),
        None => status.message().to_owned(),
    };
    let (code, hint) = match status.code() {
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
