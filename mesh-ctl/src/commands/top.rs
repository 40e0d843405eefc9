//! `mesh-ctl top`: routes and instances with their rates, live. The full screen on a terminal, else tables one after the other.

use std::time::{Duration, Instant, SystemTime};

use mesh_proto::v1;
use mesh_routing::Table;
use serde::Serialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::Context;
use crate::{
    client::{self, Client},
    flags::{Form, Top},
    output::{Code, Failure, age},
    picture::{Look, View, draw, plain},
    rates::{AGAIN, Flow, PATIENCE, Rates, flows},
    screen::{Key, Screen},
    view,
};

/// What `-o json` and `-o yaml` print at each look.
#[derive(Debug, Serialize)]
struct Said<'a> {
    time: String,
    mesh: &'a str,
    generation: u64,
    routes: &'a [Flow],
    instances: Vec<Instance<'a>>,
}

#[derive(Debug, Serialize)]
struct Instance<'a> {
    instance: &'a str,
    state: &'static str,
    generation: u64,
    routes: usize,
    reported: String,
    error: &'a str,
    waiting: &'a [String],
}

pub(super) async fn run(context: &Context, flags: &Top) -> Result<Code, Failure> {
    let mut client = client::connect(&context.admin).await?;
    let first = look(&mut client).await?;
    let looks = if flags.once { Some(1) } else { flags.count };
    let tables = matches!(context.form, None | Some(Form::Table));
    if tables && looks.is_none() && Screen::is_there() {
        return live(context, flags, client, first).await;
    }
    let mut rates = Rates::default();
    rates.take(&first.mesh);
    let mut shown = 0;
    let until = Instant::now() + flags.interval + PATIENCE;
    loop {
        tokio::time::sleep(flags.interval).await;
        let mut now = look(&mut client).await?;
        rates.take(&now.mesh);
        while shown == 0 && rates.lack(&now.mesh) && Instant::now() < until {
            tokio::time::sleep(AGAIN).await;
            now = look(&mut client).await?;
            rates.take(&now.mesh);
        }
        let mut found = flows(&now.mesh, now.table.as_ref(), &rates);
        flags.sort.apply(&mut found);
        say(context, flags, &now.mesh, &found, shown > 0)?;
        shown += 1;
        if looks.is_some_and(|most| shown >= most) {
            return Ok(Code::Done);
        }
    }
}

/// The mesh, with the table in force; none where there is none, or one that this version cannot read.
struct Seen {
    mesh: v1::GetStatusResponse,
    table: Option<Table>,
}

async fn look(client: &mut Client) -> Result<Seen, Failure> {
    let mesh = client::status(client, true).await?;
    Ok(Seen { mesh, table: client::table(client).await? })
}

fn say(context: &Context, flags: &Top, mesh: &v1::GetStatusResponse, found: &[Flow], again: bool) -> Result<(), Failure> {
    let instance = |one: &'_ v1::InstanceStatus| view::word(one.state().as_str_name(), "INSTANCE_STATE_");
    let said = || Said {
        time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        mesh: &mesh.mesh,
        generation: mesh.generation,
        routes: found,
        instances: mesh
            .instances
            .iter()
            .map(|one| Instance {
                instance: &one.instance,
                state: instance(one),
                generation: one.generation,
                routes: one.routes.len(),
                reported: view::time(one.reported_ms),
                error: &one.error,
                waiting: &one.waiting,
            })
            .collect(),
    };
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_next(form, &said()),
        None | Some(Form::Table) => {
            let view = View { mesh, flows: found, every: flags.interval, stale: "" };
            let gap = if again { "\n" } else { "" };
            context.print(&format!("{gap}{}", plain(&view, context.colours)))
        }
    }
}

/// What the screen shows.
struct Shown {
    seen: Seen,
    flows: Vec<Flow>,
    rates: Rates,
    look: Look,
    /// Since when nobody answers, and why.
    trouble: Option<(Instant, String)>,
}

impl Shown {
    fn take(&mut self, looked: Result<Seen, Failure>) {
        match looked {
            Ok(seen) => {
                // What comes while it is held counts for the rates.
                self.rates.take(&seen.mesh);
                self.trouble = None;
                if !self.look.held {
                    self.seen = seen;
                    self.sort();
                }
            }
            Err(failure) => {
                let why = failure.message().to_owned();
                let since = self.trouble.take().map_or_else(Instant::now, |(since, _)| since);
                self.trouble = Some((since, why));
            }
        }
    }

    fn sort(&mut self) {
        self.flows = flows(&self.seen.mesh, self.seen.table.as_ref(), &self.rates);
        self.look.sort.apply(&mut self.flows);
        self.look.marked = self.look.marked.min(self.flows.len().saturating_sub(1));
    }

    /// Obeys a key. False: it is over.
    fn obey(&mut self, key: Key) -> bool {
        let last = self.flows.len().saturating_sub(1);
        let page = Screen::size().1 / 2;
        match key {
            // Ctrl-C and Ctrl-D are keys here.
            Key::Char('q' | 'Q' | '\x03' | '\x04') => return false,
            Key::Up | Key::Char('k') => self.look.marked = self.look.marked.saturating_sub(1),
            Key::Down | Key::Char('j') => self.look.marked = (self.look.marked + 1).min(last),
            Key::PageUp => self.look.marked = self.look.marked.saturating_sub(page),
            Key::PageDown => self.look.marked = (self.look.marked + page).min(last),
            Key::Home | Key::Char('g') => self.look.marked = 0,
            Key::End | Key::Char('G') => self.look.marked = last,
            Key::Char('s') => {
                self.look.sort = self.look.sort.next();
                self.look.sort.apply(&mut self.flows);
            }
            Key::Char('p' | ' ') => self.look.held = !self.look.held,
            Key::Char(_) => {}
        }
        true
    }

    fn draw(&self, screen: &Screen, flags: &Top, colours: bool) -> std::io::Result<()> {
        let stale = match &self.trouble {
            Some((since, why)) => format!("no answer for {}: {why}", age(since.elapsed())),
            None => String::new(),
        };
        let view = View { mesh: &self.seen.mesh, flows: &self.flows, every: flags.interval, stale: &stale };
        let (width, height) = Screen::size();
        screen.draw(&draw(&view, self.look, width, height, colours))
    }
}

/// The full screen, until a key or a signal ends it.
async fn live(context: &Context, flags: &Top, client: Client, first: Seen) -> Result<Code, Failure> {
    let unusable = |error: std::io::Error| Failure::new(format!("the terminal cannot be used: {error}"), "--once prints a table");
    let mut terminate = signal(SignalKind::terminate()).map_err(unusable)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(unusable)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(unusable)?;
    let mut resized = signal(SignalKind::window_change()).map_err(unusable)?;
    let mut shown = Shown {
        seen: first,
        flows: Vec::new(),
        rates: Rates::default(),
        look: Look { sort: flags.sort, ..Look::default() },
        trouble: None,
    };
    shown.rates.take(&shown.seen.mesh);
    shown.sort();
    // One that waits to be shown is enough.
    let (out, mut looks) = mpsc::channel(1);
    let looking = tokio::spawn(look_again(context.admin.clone(), client, flags.interval, out));
    let (screen, mut keys) = Screen::take().map_err(unusable)?;
    let ended = loop {
        if let Err(error) = shown.draw(&screen, flags, context.colours) {
            break Err(unusable(error));
        }
        tokio::select! {
            looked = looks.recv() => match looked {
                Some(looked) => shown.take(looked),
                None => break Err(Failure::new("the state of the mesh is not looked at any more", "")),
            },
            key = keys.recv() => match key {
                Some(key) => if !shown.obey(key) { break Ok(Code::Done) },
                None => break Ok(Code::Done),
            },
            _ = resized.recv() => {}
            _ = terminate.recv() => break Ok(Code::Done),
            _ = hangup.recv() => break Ok(Code::Done),
            _ = interrupt.recv() => break Ok(Code::Done),
        }
    };
    looking.abort();
    // It was aborted: nothing is lost.
    drop(looking.await);
    drop(screen);
    ended
}

/// Looks again and again, also when nobody answers for a while, until nobody listens.
async fn look_again(admin: mesh_proto::admin::AdminAddress, mut client: Client, every: Duration, out: mpsc::Sender<Result<Seen, Failure>>) {
    loop {
        tokio::time::sleep(every).await;
        let mut looked = look(&mut client).await;
        if looked.is_err() {
            // The address may lead elsewhere by now, or the certificate be new.
            looked = match client::connect(&admin).await {
                Ok(again) => {
                    client = again;
                    look(&mut client).await
                }
                Err(failure) => Err(failure),
            };
        }
        if out.send(looked).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        picture::Sort,
        rates::tests::{mesh, report},
    };

    fn shown() -> Shown {
        let mut one = report("a", 1, 100, 1_000, 0);
        one.routes.push(v1::RouteStatus { route: "audit".into(), ..one.routes[0].clone() });
        let seen = Seen { mesh: mesh(vec![one]), table: None };
        let mut shown = Shown { seen, flows: Vec::new(), rates: Rates::default(), look: Look::default(), trouble: None };
        shown.rates.take(&shown.seen.mesh);
        shown.sort();
        shown
    }

    #[test]
    fn keys_move_sort_hold_and_quit() {
        let mut shown = shown();
        for (key, marked) in [(Key::Down, 1), (Key::Char('j'), 1), (Key::Up, 0), (Key::Char('k'), 0), (Key::Char('G'), 1), (Key::Home, 0)] {
            assert!(shown.obey(key));
            assert_eq!(shown.look.marked, marked, "{key:?}");
        }
        assert!(shown.obey(Key::Char('s')) && shown.look.sort == Sort::Name);
        assert!(shown.obey(Key::Char('p')) && shown.look.held);
        assert!(!shown.obey(Key::Char('q')) && !shown.obey(Key::Char('\x03')));
    }

    #[test]
    fn what_is_held_stays_and_trouble_is_told_since_it_began() {
        let mut shown = shown();
        shown.obey(Key::Char('p'));
        shown.take(Ok(Seen { mesh: mesh(Vec::new()), table: None }));
        assert_eq!(shown.flows.len(), 2, "it is held");
        shown.obey(Key::Char('p'));
        shown.take(Err(Failure::new("refused", "")));
        let since = shown.trouble.as_ref().map(|(since, _)| *since);
        shown.take(Err(Failure::new("refused again", "")));
        assert_eq!(shown.trouble.as_ref().map(|(since, why)| (*since, why.as_str())), since.map(|since| (since, "refused again")));
        shown.take(Ok(Seen { mesh: mesh(Vec::new()), table: None }));
        assert!(shown.trouble.is_none() && shown.flows.is_empty());
    }
}
