//! `mesh-ctl rollback`: brings the content of an earlier generation back, as a new generation.
//!
//! Invariant: it is applied onto the generation that was in force when it began, or not at all.

use mesh_proto::v1;
use mesh_routing::{
    channel::Channel,
    sign::{PublicKey, Signed},
};

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
        note_unknown(context, &keys::read(context, file)?.public(), &old);
    }
    let expected = Some(flags.how.expect_generation.unwrap_or(history.generation));
    let name = format!("generation {}", flags.generation);
    let proposal = Proposal { expected, rollback_to: Some(flags.generation), ..Proposal::new(name, old.json, &flags.how) };
    propose::run(context, &mut client, proposal).await
}

/// Says so if an earlier table that is to be signed was not signed by this key: a sidecar that lies would have it signed.
pub(super) fn note_unknown(context: &Context, key: &PublicKey, old: &v1::GetTableResponse) {
    let entry = old.entry.clone().unwrap_or_default();
    let known = mesh_routing::parse("the generation", &old.json).is_ok_and(|table| {
        let channel = match entry.canary.parse() {
            Ok(selector) => Channel::Canary(selector),
            Err(_) => Channel::Stable,
        };
        let (digest, channel) = (table.digest(), channel.to_string());
        let place = Signed { mesh: &table.mesh, channel: &channel, generation: old.generation, digest: &digest };
        entry.signature.as_ref().is_some_and(|signature| key.verifies(&place, &signature.ed25519))
    });
    if !known {
        context.note(&format!(
            "generation {} was not signed by this key: what is signed now is what the sidecar at {} says it was; look at the changes",
            old.generation, context.admin
        ));
    }
}
