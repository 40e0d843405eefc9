//! `mesh-ctl rollback`: brings the content of an earlier generation back, as a new generation.
//!
//! Invariant: it is applied onto the generation that was in force when it began, or not at all.

use mesh_proto::v1;
use mesh_routing::sign::{STABLE, Signed};

use super::{
    Context, keys,
    propose::{self, Proposal},
};
use crate::{
    client,
    flags::Rollback,
    output::{Code, Failure},
};

pub(super) async fn run(context: &Context, flags: &Rollback) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let request = client::request(v1::GetHistoryRequest { limit: 1 }, client::ASK);
    let history = client.get_history(request).await.map_err(|status| client::refused(&status))?.into_inner();
    let request = client::request(v1::GetTableRequest { generation: Some(flags.generation) }, client::ASK);
    let old = client.get_table(request).await.map_err(|status| match client::refused(&status) {
        Failure::Said { code, message, .. } if status.code() == tonic::Code::NotFound => {
            Failure::Said { code, message, hint: "`mesh-ctl history` lists the generations that there are".to_owned() }
        }
        failure => failure,
    })?;
    let old = old.into_inner();
    if let Some(file) = &flags.how.sign_key {
        let key = keys::read(context, file)?.public();
        let known = mesh_routing::parse("the generation", &old.json).is_ok_and(|table| {
            let digest = table.digest();
            let place = Signed { mesh: &table.mesh, channel: STABLE, generation: flags.generation, digest: &digest };
            let signature = old.entry.as_ref().and_then(|entry| entry.signature.as_ref());
            signature.is_some_and(|signature| key.verifies(&place, &signature.ed25519))
        });
        if !known {
            // A sidecar that lies would have it signed.
            context.note(&format!(
                "generation {} was not signed by this key: what is signed now is what the sidecar at {} says it was; look at the changes",
                flags.generation, context.admin
            ));
        }
    }
    let expected = Some(flags.how.expect_generation.unwrap_or(history.generation));
    let name = format!("generation {}", flags.generation);
    let proposal = Proposal { name, text: old.json, expected, rollback_to: Some(flags.generation), how: &flags.how };
    propose::run(context, &mut client, proposal).await
}
