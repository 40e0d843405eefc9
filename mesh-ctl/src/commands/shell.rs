//! `mesh-ctl completion` and `mesh-ctl man`: what the flags tell, for shells and for `man`. No sidecar is asked.

use clap::CommandFactory as _;

use super::Context;
use crate::{
    flags::{Completion, Flags, Man},
    output::{Code, Failure, count},
};

/// Prints a completion script.
pub(super) fn completion(context: &Context, flags: &Completion) -> Result<Code, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(flags.shell, &mut Flags::command(), "mesh-ctl", &mut script);
    context.print(&String::from_utf8_lossy(&script))?;
    Ok(Code::Done)
}

/// Writes a page for each command: `mesh-ctl.1`, `mesh-ctl-apply.1`, …
pub(super) fn man(context: &Context, flags: &Man) -> Result<Code, Failure> {
    let folder = &flags.folder;
    let failed = |error: std::io::Error| Failure::new(format!("{} cannot be written: {error}", folder.display()), "");
    std::fs::create_dir_all(folder).map_err(failed)?;
    clap_mangen::generate_to(Flags::command(), folder).map_err(failed)?;
    let pages = std::fs::read_dir(folder).map_err(failed)?.filter_map(Result::ok);
    let pages = pages.filter(|page| page.path().extension().is_some_and(|end| end == "1")).count();
    context.note(&format!(
        "{} in {}: `man -l {}` shows one",
        count(pages as u64, "page"),
        folder.display(),
        folder.join("mesh-ctl.1").display()
    ));
    Ok(Code::Done)
}
