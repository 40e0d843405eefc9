//! `mesh-ctl apply`: applies a routing table to the whole mesh, and waits for it if told so.

use super::{
    Context,
    propose::{self, Canary, Proposal},
};
use crate::{
    client,
    flags::Apply,
    output::{Code, Failure},
};

pub(super) async fn run(context: &Context, flags: &Apply) -> Result<Code, Failure> {
    let text = flags.file.read()?;
    let mut client = client::connect(&context.admin).await?;
    let canary = flags.canary.clone().map(|selector| Canary {
        selector,
        max_dead_letters: flags.max_dead_letters,
        max_refusals: flags.max_refusals,
    });
    let expected = flags.how.expect_generation;
    let proposal = Proposal { expected, canary, ..Proposal::new(flags.file.name(), text, &flags.how) };
    propose::run(context, &mut client, proposal).await
}
