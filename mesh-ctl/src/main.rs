//! `mesh-ctl`: the command line of the event mesh's control plane.
//!
//! It speaks gRPC (`mesh.v1.Control`) to the admin listener of any sidecar of a mesh, never to a broker. `validate`, and `graph` of a
//! file, need no sidecar at all.
//!
//! | command | what it does |
//! |---|---|
//! | `validate -f FILE…` | checks routing tables, offline: all faults at once, `file:line:column` with hints |
//! | `apply -f FILE` | applies a table to the whole mesh; `--dry-run`, `--expect-generation N`, `--sign-key FILE`, `--wait` |
//! | `get` | prints the table in force, ready to be edited and applied again |
//! | `diff` | what differs between files, generations and the table in force |
//! | `history` | the generations that the mesh keeps: who, when, from where, why |
//! | `rollback N` | the content of an earlier generation as a new one |
//! | `keys generate, show` | the keys that sign tables |
//! | `status` | every instance and every route: state, reason, lag, age |
//! | `reset ROUTE --to-…` | lets a route read its sources from elsewhere; a dry run, unless `--execute` |
//! | `release ROUTE` | lets records go on whose attempts are used up |
//! | `pause ROUTE`, `resume ROUTE` | nothing is delivered, until it is resumed |
//! | `dlq list, show, redrive, purge` | dead letters: counted, shown, sent back once, deleted |
//! | `replay` | copies a range of a topic into another, or to one route |
//! | `plan -f FILE` | what a table would do with the last records of its sources |
//! | `explain TOPIC/PARTITION/OFFSET` | what each route did with a record |
//! | `trace ID` | a flow over its hops, from the records alone |
//! | `tail TOPIC…`, `produce TOPIC` | reads topics and follows them; publishes records, from lines and from what `tail -o json` wrote |
//! | `topics list, describe, create, alter, delete` | topics, with their partitions, settings, and the routes that use them |
//! | `lag` | how far routes and other groups are behind, by partition, with Burrow's rules |
//! | `top` | routes and instances with their rates, live |
//! | `doctor` | what is wrong with the mesh, and how to mend it |
//! | `drain [INSTANCE]` | lets a sidecar finish what it does, and ends it; a preview, unless `--execute` |
//! | `completion SHELL`, `man DIR` | completion scripts, manual pages |
//! | `graph` | the routes as a graph, of a file or of the mesh: text, Mermaid, Graphviz |
//!
//! Exit codes: 0 done (`diff`: the same); 1 the answer is no: faults, refused, `diff` differs; 2 an error: usage, files, no sidecar;
//! 3 a conflict: somebody else applied, or another generation is in force than expected; 4 not known, or not complete in time.
//!
//! Invariant: results go to stdout, everything else to stderr; with `-o json` or `yaml` stdout is one document, but where records are read
//! and where it is looked again and again: there it is one JSON object a line.
//! Invariant: colours and progress appear on a terminal only, colours not with `NO_COLOR` either.

mod client;
mod commands;
mod flags;
mod moment;
mod output;
mod picture;
mod rates;
mod record;
mod screen;
mod view;
mod window;

use std::process::ExitCode;

use clap::Parser as _;

use self::{commands::Context, flags::Flags, output::Failure};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    let context = Context::new(&flags);
    match commands::run(&context, flags.command).await {
        Ok(code) => code.into(),
        // Whoever read our output has seen enough (`mesh-ctl get | head`).
        Err(Failure::ClosedPipe) => ExitCode::SUCCESS,
        Err(failure) => {
            context.complain(&failure);
            failure.code().into()
        }
    }
}
