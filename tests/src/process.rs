//! Processes that end with the test.
//!
//! Invariant: every process is the leader of a group of its own; dropping the handle kills the group.
//! Invariant: if the test run itself is killed, a watchdog process kills the groups that it left.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::{ChildStdin, Command, ExitStatus, Stdio},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// A running process, the leader of its group.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: tokio::process::Child,
    pid: Pid,
    log: PathBuf,
    ended: bool,
}

impl Process {
    /// Starts a command in a group of its own. Its standard error, and its output if that is not piped, are appended to `log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(name: impl Into<String>, mut command: Command, log: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let name = name.into();
        let file = File::options().create(true).append(true).open(log).with_context(|| format!("log {}", log.display()))?;
        command.process_group(0).stderr(Stdio::from(file));
        let child = tokio::process::Command::from(command).kill_on_drop(true).spawn().with_context(|| format!("start {name}"))?;
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed())).context("a process id")?;
        watchdog(&format!("+ {pid}"));
        Ok(Self { name, child, pid, log: log.to_owned(), ended: false })
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Waits for the line `READY <port>` on its standard output, which must be piped.
    ///
    /// # Errors
    /// If it ends, or does not say it in time; with the end of its log.
    pub async fn ready_port(&mut self, deadline: Duration) -> Result<u16> {
        let output = self.child.stdout.take().context("a piped output")?;
        let mut lines = BufReader::new(output).lines();
        let line = tokio::time::timeout(deadline, lines.next_line()).await;
        match line {
            Ok(Ok(Some(line))) if line.starts_with("READY ") => Ok(line["READY ".len()..].trim().parse()?),
            other => bail!("{} did not get ready within {deadline:?} ({other:?})\n{}", self.name, self.log_tail()),
        }
    }

    /// Sends a signal to the process alone.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid, signal).with_context(|| format!("{signal:?} to {}", self.name))
    }

    /// Waits for its end, under a deadline, and checks that it leaves no process behind.
    ///
    /// # Errors
    /// If it does not end in time, or leaves a process behind.
    pub async fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let status = tokio::time::timeout(deadline, self.child.wait())
            .await
            .map_err(|_| anyhow::anyhow!("{} still runs after {deadline:?}\n{}", self.name, self.log_tail()))??;
        let left = test_kill_process_group(self.pid).is_ok();
        self.end();
        ensure!(!left, "{} left a process behind", self.name);
        Ok(status)
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    /// If it ended before.
    pub async fn kill9(&mut self) -> Result<()> {
        ensure!(self.exited().is_none(), "{} had ended by itself\n{}", self.name, self.log_tail());
        self.signal(Signal::KILL)?;
        self.wait(Duration::from_secs(10)).await?;
        Ok(())
    }

    /// Its status, if it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Its resident memory, in bytes.
    ///
    /// # Errors
    /// If it is gone, or this is no Linux.
    pub fn resident_bytes(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? * 1024)
    }

    /// The processor time it used so far, user and system.
    ///
    /// # Errors
    /// If it is gone, or this is no Linux.
    pub fn cpu_time(&self) -> Result<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        let fields: Vec<&str> = text.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).context("stat").and_then(|field| Ok(field.parse::<u64>()?));
        // USER_HZ is 100 on every Linux that Rust supports.
        Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let start = text.len().saturating_sub(12_000);
        format!("--- the end of the log of {} ---\n{}\n---", self.name, String::from_utf8_lossy(&text[start..]))
    }

    fn end(&mut self) {
        if !self.ended {
            self.ended = true;
            // An error means that the group is gone, which is what is wanted.
            let _ = kill_process_group(self.pid, Signal::KILL);
            watchdog(&format!("- {}", self.pid));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        self.end();
    }
}

/// Runs a command to its end, fed with `input`, under a deadline. It is killed with its group when the deadline is over.
///
/// # Errors
/// If it cannot be started or does not end in time. A status other than 0 is no error.
pub async fn run(mut command: Command, input: Vec<u8>, deadline: Duration) -> Result<Output> {
    use std::os::unix::process::CommandExt as _;
    use tokio::io::AsyncWriteExt as _;
    let name = format!("{command:?}");
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = tokio::process::Command::from(command).kill_on_drop(true).spawn().with_context(|| format!("start {name}"))?;
    let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed())).context("a process id")?;
    watchdog(&format!("+ {pid}"));
    let stdin = child.stdin.take();
    let feed = async move {
        if let Some(mut stdin) = stdin {
            // A command that reads nothing closes its end: its status tells.
            let _ = stdin.write_all(&input).await;
        }
    };
    let both = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output = tokio::time::timeout(deadline, both).await;
    let _ = kill_process_group(pid, Signal::KILL);
    watchdog(&format!("- {pid}"));
    let output = output.map_err(|_| anyhow::anyhow!("{name} still ran after {deadline:?}"))??;
    Ok(Output {
        name,
        status: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// What a command said.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command.
    pub name: String,
    /// Its exit code; `None` if a signal ended it.
    pub status: Option<i32>,
    /// Its output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Its output, if it ended with 0.
    ///
    /// # Errors
    /// If it did not.
    pub fn success(self) -> Result<String> {
        ensure!(self.status == Some(0), "{} ended with {:?}\n{}{}", self.name, self.status, self.stdout, self.stderr);
        Ok(self.stdout)
    }

    /// The same, if it ended with this code.
    ///
    /// # Errors
    /// If it did not.
    pub fn ends(self, code: i32) -> Result<Self> {
        ensure!(self.status == Some(code), "not {code}: {self:?}");
        Ok(self)
    }

    /// Its output as JSON, however it ended.
    ///
    /// # Errors
    /// If that is no JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("{self:?}"))
    }
}

/// Tells the watchdog of a group that began (`+ id`) or ended (`- id`). It kills what is left when this process is gone, however it went.
fn watchdog(line: &str) {
    const SCRIPT: &str = r#"
live=" "
while read -r what group; do
  case $what in
    +) live="$live$group " ;;
    -) live="${live%% $group *} ${live#* $group }" ;;
  esac
done
for group in $live; do
  kill -s KILL -- "-$group" 2>/dev/null && echo "LEFT BEHIND: process group $group" >&2
done
exit 0"#;
    static STDIN: Mutex<Option<ChildStdin>> = Mutex::new(None);
    let mut stdin = STDIN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if stdin.is_none() {
        use std::os::unix::process::CommandExt as _;
        let spawned = Command::new("sh").args(["-c", SCRIPT]).process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        match spawned {
            Ok(mut child) => *stdin = child.stdin.take(),
            Err(error) => eprintln!("no watchdog: {error}"),
        }
    }
    if let Some(pipe) = stdin.as_mut()
        && let Err(error) = writeln!(pipe, "{line}")
    {
        eprintln!("the watchdog is gone: {error}");
    }
}
