//! One file per command, and what they share.

mod apply;
mod diff;
mod dlq;
mod doctor;
mod drain;
mod explain;
mod get;
mod graph;
mod history;
mod keys;
mod lag;
mod looks;
mod pause;
mod plan;
mod produce;
mod propose;
mod release;
mod replay;
mod reset;
mod rollback;
mod rollout;
mod shell;
mod status;
mod tail;
mod top;
mod topics;
mod trace;
mod validate;
mod wait;

use std::io::{self, IsTerminal as _, Read as _, Write as _};

use mesh_proto::admin::AdminAddress;
use mesh_routing::{RouteFields, Table};
use serde::Serialize;

use crate::{
    client,
    flags::{Command, Flags, Form, Source},
    output::{Code, Failure, Style},
    view,
};

/// What all commands share.
#[derive(Debug)]
pub(crate) struct Context {
    admin: AdminAddress,
    form: Option<Form>,
    quiet: bool,
    /// Whether stdout is a terminal on which what was printed can be taken back.
    screen: bool,
    /// Whether stdout is coloured.
    colours: bool,
    /// Whether stderr is coloured.
    error_colours: bool,
    /// Whether somebody looks at stderr.
    progress: bool,
}

/// Runs a command.
pub(crate) async fn run(context: &Context, command: Command) -> Result<Code, Failure> {
    match command {
        Command::Validate(flags) => validate::run(context, &flags),
        Command::Apply(flags) => apply::run(context, &flags).await,
        Command::Get(flags) => get::run(context, &flags).await,
        Command::Diff(flags) => diff::run(context, &flags).await,
        Command::History(flags) => history::run(context, &flags).await,
        Command::Rollback(flags) => rollback::run(context, &flags).await,
        Command::Rollout(command) => rollout::run(context, &command).await,
        Command::Keys(command) => keys::run(context, &command),
        Command::Status(flags) => status::run(context, &flags).await,
        Command::Graph(flags) => graph::run(context, &flags).await,
        Command::Dlq(command) => dlq::run(context, &command).await,
        Command::Replay(flags) => replay::run(context, &flags).await,
        Command::Reset(flags) => reset::run(context, &flags).await,
        Command::Release(flags) => release::run(context, &flags).await,
        Command::Pause(flags) => pause::pause(context, &flags).await,
        Command::Resume(flags) => pause::resume(context, &flags).await,
        Command::Plan(flags) => plan::run(context, &flags).await,
        Command::Explain(flags) => explain::run(context, &flags).await,
        Command::Trace(flags) => trace::run(context, &flags).await,
        Command::Tail(flags) => tail::run(context, &flags).await,
        Command::Produce(flags) => produce::run(context, &flags).await,
        Command::Topics(command) => topics::run(context, &command).await,
        Command::Lag(flags) => lag::run(context, &flags).await,
        Command::Top(flags) => top::run(context, &flags).await,
        Command::Doctor => doctor::run(context).await,
        Command::Drain(flags) => drain::run(context, &flags).await,
        Command::Completion(flags) => shell::completion(context, &flags),
        Command::Man(flags) => shell::man(context, &flags),
    }
}

impl Context {
    pub(crate) fn new(flags: &Flags) -> Self {
        let clever = std::env::var_os("TERM").is_none_or(|value| value != "dumb");
        let wanted = clever && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self {
            admin: flags.admin_address(),
            form: flags.output,
            quiet: flags.quiet,
            screen: clever && io::stdout().is_terminal(),
            colours: wanted && io::stdout().is_terminal(),
            error_colours: wanted && io::stderr().is_terminal(),
            progress: !flags.quiet && io::stderr().is_terminal(),
        }
    }

    /// Writes a result to stdout.
    fn print(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::ClosedPipe),
            Err(error) => Err(Failure::new(format!("stdout cannot be written: {error}"), "")),
        }
    }

    /// Writes a result as one document.
    fn print_document(&self, form: Form, value: &impl Serialize) -> Result<(), Failure> {
        let text = match form {
            Form::Yaml => serde_saphyr::to_string(value).map_err(|error| error.to_string()),
            Form::Json | Form::Table => serde_json::to_string_pretty(value).map_err(|error| error.to_string()),
        };
        let text = text.map_err(|error| Failure::new(format!("the result cannot be written: {error}"), ""))?;
        self.print(&format!("{}\n", text.trim_end()))
    }

    /// Writes one result of several: a line of JSON, or a document of YAML.
    fn print_next(&self, form: Form, value: &impl Serialize) -> Result<(), Failure> {
        if form == Form::Yaml {
            self.print("---\n")?;
            return self.print_document(form, value);
        }
        let line = serde_json::to_string(value);
        let line = line.map_err(|error| Failure::new(format!("the result cannot be written: {error}"), ""))?;
        self.print(&format!("{line}\n"))
    }

    /// Says something on stderr, unless `--quiet`.
    fn note(&self, text: &str) {
        if !self.quiet {
            self.say(text);
        }
    }

    fn say(&self, text: &str) {
        // Nobody is there to be told when stderr is closed.
        drop(writeln!(io::stderr().lock(), "{text}"));
    }

    /// Shows how far long work is, on a terminal.
    fn progress_line(&self, text: &str) {
        if self.progress {
            // Nobody is there to be told when stderr is closed.
            drop(write!(io::stderr().lock(), "\r\x1b[K{text}"));
        }
    }

    /// Takes the progress away.
    fn progress_over(&self) {
        if self.progress {
            drop(write!(io::stderr().lock(), "\r\x1b[K"));
        }
    }

    /// Says why a command failed.
    pub(crate) fn complain(&self, failure: &Failure) {
        if let Failure::Said { message, hint, .. } = failure {
            self.say(&format!("{} {message}", Style::Bad.paint(self.error_colours, "error:")));
            if !hint.is_empty() {
                self.say(&format!("{} {hint}", Style::Bold.paint(self.error_colours, "hint:")));
            }
        }
    }

    /// Warnings, on stderr.
    fn warn(&self, warnings: &[view::Fault]) {
        for warning in warnings {
            self.note(&fault(warning, "warning", Style::Warn, self.error_colours));
        }
    }
}

/// A fault or a warning as lines: `file:line:column: error[code]: field: message`, and its hint.
fn fault(fault: &view::Fault, kind: &str, style: Style, colours: bool) -> String {
    let view::Fault { file, line, column, field, message, hint, code } = fault;
    let place = if *line > 0 { format!("{file}:{line}:{column}") } else { file.clone() };
    let field = if field.is_empty() { String::new() } else { format!("{field}: ") };
    let mut out = format!("{place}: {}: {field}{message}", style.paint(colours, format!("{kind}[{code}]")));
    if !hint.is_empty() {
        out.push_str(&format!("\n  hint: {hint}"));
    }
    out
}

impl Source {
    /// Its name in messages.
    fn name(&self) -> String {
        match self {
            Self::Stdin => "<stdin>".to_owned(),
            Self::File(path) => path.display().to_string(),
        }
    }

    /// Its text.
    fn read(&self) -> Result<String, Failure> {
        let read = match self {
            Self::Stdin => {
                let mut text = String::new();
                io::stdin().read_to_string(&mut text).map(|_| text)
            }
            Self::File(path) => std::fs::read_to_string(path),
        };
        read.map_err(|error| Failure::new(format!("{} cannot be read: {error}", self.name()), ""))
    }

    /// Its table.
    ///
    /// # Errors
    /// All its faults are said, and the failure counts them.
    fn table(&self, context: &Context) -> Result<Table, Failure> {
        let name = self.name();
        mesh_routing::parse(&name, &self.read()?).map_err(|faults| {
            let found = faults.0.len();
            for found in faults.0 {
                context.say(&fault(&found.into(), "error", Style::Bad, context.error_colours));
            }
            Failure::new(format!("{name} has {}", crate::output::count(found as u64, "fault")), "")
        })
    }
}

/// The table in force, with its place in history; an empty one where the mesh has none yet.
async fn in_force(context: &Context) -> Result<(Table, u64), Failure> {
    let mut client = client::connect(&context.admin).await?;
    let request = client::request(mesh_proto::v1::GetTableRequest { generation: None }, client::ASK);
    match client.get_table(request).await {
        Ok(response) => {
            let response = response.into_inner();
            let table = mesh_routing::parse("the table in force", &response.json).map_err(|faults| {
                Failure::new(
                    format!("the table in force cannot be read by this version of mesh-ctl: {faults}"),
                    "use the version of the sidecars; `mesh-ctl get -o json` prints it as it is",
                )
            })?;
            Ok((table, response.generation))
        }
        Err(status) if status.code() == tonic::Code::NotFound => {
            context.note(status.message());
            Ok((Table { mesh: String::new(), topics: Default::default(), defaults: RouteFields::default(), routes: Vec::new() }, 0))
        }
        Err(status) => Err(client::refused(&status)),
    }
}
