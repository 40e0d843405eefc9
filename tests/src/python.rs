//! Python with foreign frameworks and clients, in a virtual environment under `target/python`.
//!
//! Invariant: the environment is made once for each content of `requirements.txt`, under a file lock, and is complete or absent.

use std::{
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::sync::OnceCell;

use crate::process::{Output, run};

/// The interpreter of the environment; `None` where there is no Python, after a line that says so.
///
/// # Errors
/// With `CI=true` where there is no Python, or its packages cannot be had.
pub async fn python() -> Result<Option<Python>> {
    static ONCE: OnceCell<std::result::Result<Python, String>> = OnceCell::const_new();
    match ONCE.get_or_init(|| async { make().await.map_err(|error| format!("{error:#}")) }).await {
        Ok(python) => Ok(Some(python.clone())),
        Err(reason) => {
            crate::skip(&format!("no Python ({reason})"))?;
            Ok(None)
        }
    }
}

/// An interpreter that has the packages of `tests/python/requirements.txt`.
#[derive(Clone, Debug)]
pub struct Python {
    interpreter: PathBuf,
}

impl Python {
    /// A command that runs one of the scripts in `tests/python`.
    pub fn command(&self, script: &str) -> Command {
        let mut command = Command::new(&self.interpreter);
        // -B: no compiled files beside the sources.
        command.arg("-B").arg(scripts().join(script));
        command
    }

    /// Runs a script to its end.
    ///
    /// # Errors
    /// If it cannot be started or does not end in time.
    pub async fn run(&self, script: &str, arguments: &[&str], input: Vec<u8>, deadline: Duration) -> Result<Output> {
        let mut command = self.command(script);
        command.args(arguments);
        run(command, input, deadline).await
    }
}

fn scripts() -> PathBuf {
    crate::workspace().join("tests/python")
}

async fn make() -> Result<Python> {
    let requirements = scripts().join("requirements.txt");
    let mut hash = DefaultHasher::new();
    std::fs::read(&requirements)?.hash(&mut hash);
    let folder = crate::workspace().join("target/python");
    std::fs::create_dir_all(&folder)?;
    let environment = folder.join(format!("{:016x}", hash.finish()));
    let python = Python { interpreter: environment.join("bin/python") };
    let done = environment.join("complete");
    let lock = File::create(folder.join("lock"))?;
    let _held = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock)).await??;
    if done.exists() {
        return Ok(python);
    }
    let begin = Instant::now();
    eprintln!("making the Python environment {}", environment.display());
    if environment.exists() {
        std::fs::remove_dir_all(&environment)?;
    }
    let mut command = Command::new("python3");
    command.args(["-m", "venv"]).arg(&environment);
    run(command, Vec::new(), Duration::from_secs(120)).await.context("python3")?.success()?;
    let mut command = Command::new(&python.interpreter);
    command.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "-r"]).arg(&requirements);
    run(command, Vec::new(), Duration::from_secs(600)).await?.success()?;
    File::create(done)?;
    eprintln!("made it in {:.1?}", begin.elapsed());
    Ok(python)
}
