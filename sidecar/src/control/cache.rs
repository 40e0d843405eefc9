//! The copy of the table on disk, for a start without a broker.
//!
//! Invariant: the file is whole or absent: a temporary file is synced, then renamed over it.
//! Invariant: a file that is corrupt, or of another mesh, is refused with its reason, never half used.
//!
//! All functions block on the disk: call them off the async threads.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use super::snapshot::{Snapshot, SnapshotError};

/// The file's name within the state folder.
pub(crate) const FILE: &str = "table.json";

/// Why the copy cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    /// The disk.
    #[error("{path}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The content.
    #[error("{path}: {error}", path = path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: SnapshotError,
    },
}

/// Writes the copy.
pub(crate) fn store(state: &Path, snapshot: &Snapshot) -> Result<(), CacheError> {
    let path = state.join(FILE);
    let write = || -> io::Result<()> {
        fs::create_dir_all(state)?;
        let temporary = state.join(format!("{FILE}.{}.tmp", std::process::id()));
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(snapshot)?)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        // The rename is durable only once the folder is.
        File::open(state)?.sync_all()
    };
    write().map_err(|error| CacheError::Io { path: path.clone(), error })
}

/// Reads the copy; `None` if there is none.
pub(crate) fn load(state: &Path, mesh: &str) -> Result<Option<Snapshot>, CacheError> {
    let path = state.join(FILE);
    let json = match fs::read(&path) {
        Ok(json) => json,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CacheError::Io { path, error }),
    };
    let checked = Snapshot::from_json(&json).and_then(|snapshot| {
        snapshot.check(mesh, snapshot.generation)?;
        Ok(snapshot)
    });
    checked.map(Some).map_err(|error| CacheError::Refused { path, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_back_replaced_and_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("a/b");
        assert!(load(&state, "shop").unwrap().is_none());
        let first = Snapshot::new("shop", 1, 5, "w", "{}".into());
        store(&state, &first).unwrap();
        assert_eq!(load(&state, "shop").unwrap(), Some(first));
        let second = Snapshot::new("shop", 2, 6, "w", "{\"a\":1}".into());
        store(&state, &second).unwrap();
        assert_eq!(load(&state, "shop").unwrap(), Some(second));
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1, "no temporary file is left");

        assert!(load(&state, "other").unwrap_err().to_string().contains("mesh"));
        let path = state.join(FILE);
        let json = fs::read(&path).unwrap();
        fs::write(&path, &json[..json.len() / 2]).unwrap();
        let error = load(&state, "shop").unwrap_err();
        assert!(error.to_string().contains("table.json"), "{error}");
    }
}
