//! A disk that fills up: a small library that is preloaded into the sidecar (`disk_full.c`) lets writes into the broker's folder fail with `ENOSPC`.
//!
//! A real file system of a few megabytes would need root; a limit of the process (`RLIMIT_FSIZE`) fails with another error.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

/// The disk under a folder.
#[derive(Debug)]
pub struct Disk {
    room: File,
    environment: Vec<(String, String)>,
}

impl Disk {
    /// A disk without a limit, under the folder `of`; its own files lie in `folder`. The folder may be made later.
    ///
    /// # Errors
    /// If there is no C compiler.
    pub async fn new(folder: &Path, of: &Path) -> Result<Self> {
        let (source, library, room) = (folder.join("disk_full.c"), folder.join("disk_full.so"), folder.join("disk_room"));
        std::fs::write(&source, include_str!("disk_full.c"))?;
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).arg("-ldl").stdin(Stdio::null());
        crate::process::run(compile, Vec::new(), std::time::Duration::from_secs(60)).await.context("cc")?.success()?;
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&room)?;
        let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not UTF-8");
        // Descriptors show the path without links.
        let parent = of.parent().context("a folder")?.canonicalize()?;
        let under = parent.join(of.file_name().context("a folder")?);
        let disk = Self {
            room: file,
            environment: vec![
                ("LD_PRELOAD".into(), text(&library)?),
                ("DISK_ROOM".into(), text(&room)?),
                ("DISK_FOLDER".into(), text(&under)?),
            ],
        };
        disk.set(None)?;
        Ok(disk)
    }

    /// What a process needs in its environment to write to this disk.
    pub fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// So many bytes may still be written; `None`: any number.
    ///
    /// # Errors
    /// If the file that says so cannot be written.
    pub fn set(&self, room: Option<u32>) -> Result<()> {
        let room = room.map_or(-1i64, i64::from);
        let written = self.room.write_at(&room.to_ne_bytes(), 0)?;
        ensure!(written == 8, "the disk's room could not be set");
        Ok(())
    }
}
