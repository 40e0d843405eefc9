//! `mesh-ctl apply`: applies a routing table to the whole mesh, and waits for it if told so.

use super::{
    Context,
    propose::{self, Proposal},
};
use crate::{
    client,
    flags::Apply,
    output::{Code, Failure},
};

pub(super) async fn run(context: &Context, flags: &Apply) -> Result<Code, Failure> {
    let text = flags.file.read()?;
    let mut client = client::connect(&context.admin).await?;
    let expected = flags.how.expect_generation;
    let proposal = Proposal { name: flags.file.name(), text, expected, rollback_to: None, how: &flags.how };
    propose::run(context, &mut client, proposal).await
}
