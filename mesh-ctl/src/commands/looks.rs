//! Looks at the mesh, once or again and again: how `status`, `rollout status` and `lag` show it, and how `pause` and `rollout abort` wait.
//!
//! Invariant: once something was shown, or a change was made, a sidecar that does not answer ends nothing: that is said, and it goes on.

use std::time::{Duration, Instant};

use mesh_proto::v1;

use serde::Serialize;

use super::Context;
use crate::{
    client::{self, Client},
    flags::Form,
    output::{Code, Failure},
};

/// How often it is looked while something is waited for.
const LOOK: Duration = Duration::from_millis(250);
/// How long such a look may take at least, however little time is left.
const LOOK_TIME: Duration = Duration::from_secs(5);

/// Waits until a change that was made has come to all instances; gives those that are left when the time is over, and an error only if it is not
/// known then who that is: what a sidecar that is away for a while cannot tell, it tells later.
pub(super) async fn until_nobody(
    context: &Context,
    client: &mut Client,
    limit: Duration,
    mut left: impl FnMut(&v1::GetStatusResponse) -> Vec<String>,
) -> Result<Vec<String>, Failure> {
    let begin = Instant::now();
    let mut trouble = String::new();
    loop {
        let time = limit.saturating_sub(begin.elapsed()).clamp(LOOK_TIME, client::ASK);
        // Watched: instances do not say by themselves that they have less to do.
        let looked = client.get_status(client::request(v1::GetStatusRequest { watch: true }, time)).await;
        let late = begin.elapsed() >= limit;
        match looked.map(tonic::Response::into_inner) {
            Ok(mesh) => {
                let left = left(&mesh);
                if left.is_empty() || late {
                    return Ok(left);
                }
            }
            Err(status) => {
                let failure = client::refused(&status);
                let why = failure.message();
                if late {
                    return Err(Failure::new(why, "ask another sidecar: `mesh-ctl status --admin URL`"));
                }
                if trouble != why {
                    context.note(&format!("the sidecar does not answer: {why}"));
                    why.clone_into(&mut trouble);
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// How often it is looked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Looks {
    /// The time between two looks; `None`: it is looked once.
    pub(super) every: Option<Duration>,
    /// It ends after so many.
    pub(super) count: Option<u64>,
}

impl Looks {
    /// Looks, and shows what was seen; the second argument of `show` says whether something was shown before.
    pub(super) async fn run<T>(
        self,
        context: &Context,
        mut look: impl AsyncFnMut(&mut Client) -> Result<T, Failure>,
        mut show: impl FnMut(&T, bool) -> Result<(), Failure>,
    ) -> Result<Code, Failure> {
        let mut client = client::connect(&context.admin).await?;
        let (mut looks, mut shown, mut trouble) = (0, false, None);
        loop {
            let mut seen = look(&mut client).await;
            if seen.is_err() && shown {
                // The address may lead elsewhere by now.
                seen = match client::connect(&context.admin).await {
                    Ok(again) => {
                        client = again;
                        look(&mut client).await
                    }
                    Err(failure) => Err(failure),
                };
            }
            looks += 1;
            let last = self.every.is_none() || self.count.is_some_and(|most| looks >= most);
            match seen {
                Ok(seen) => {
                    show(&seen, shown)?;
                    (shown, trouble) = (true, None);
                }
                Err(failure) if !shown || last => return Err(failure),
                Err(failure) => {
                    let why = failure.message().to_owned();
                    if trouble.as_ref() != Some(&why) {
                        context.note(&format!("the mesh cannot be looked at now: {why}"));
                    }
                    trouble = Some(why);
                }
            }
            match self.every {
                Some(every) if !last => tokio::time::sleep(every).await,
                _ => return Ok(Code::Done),
            }
        }
    }

    /// Prints one look. Of several each is a line of JSON or a document of YAML; a table takes the place of the last one on a terminal, else it
    /// stands below it.
    pub(super) fn print(
        self,
        context: &Context,
        again: bool,
        value: &impl Serialize,
        table: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        match (context.form, self.every) {
            (Some(form @ (Form::Json | Form::Yaml)), None) => context.print_document(form, value),
            (Some(form @ (Form::Json | Form::Yaml)), Some(_)) => context.print_next(form, value),
            (None | Some(Form::Table), every) => {
                // Whoever wants no colours wants no scrolling either.
                let before = match (every, context.screen) {
                    (Some(_), true) => "\x1b[H\x1b[2J",
                    _ if again => "\n",
                    _ => "",
                };
                context.print(&format!("{before}{}", table()))
            }
        }
    }
}
