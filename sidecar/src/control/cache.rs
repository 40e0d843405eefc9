//! The copies of the table on disk, for a start without a broker: the newest, and the one before it.
//!
//! Invariant: a file is whole or absent: a temporary file is synced, then renamed over it.
//! Invariant: a file that is corrupt, of another mesh, of another schema or not signed as the config wants is refused with its reason,
//! never half used; and it never takes the place of the copy before it.
//!
//! All functions block on the disk: call them off the async threads.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use mesh_routing::sign::PublicKey;

use super::snapshot::{Snapshot, SnapshotError};
use crate::pause::Pauses;

/// The newest copy's name within the state folder.
pub(crate) const FILE: &str = "table.zst";
/// The name of the copy before it.
pub(crate) const PREVIOUS: &str = "table.previous.zst";
/// The names of the copies of an older version, the newest first: it wrote the envelope as it is. They are removed when there is another.
pub(crate) const OLDER: [&str; 2] = ["table.json", "table.previous.json"];

/// Why a copy cannot be used.
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

/// The file of the pauses, beside it.
pub(crate) const PAUSES: &str = "pauses.json";

/// A copy that this process wrote: how to tell that nobody changed it since.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    generation: u64,
    length: u64,
    modified: SystemTime,
}

impl Stored {
    /// `None` where the system cannot tell.
    fn of(state: &Path, generation: u64) -> Option<Self> {
        let found = fs::metadata(state.join(FILE)).ok()?;
        Some(Self { generation, length: found.len(), modified: found.modified().ok()? })
    }
}

/// Writes the newest copy: the record of its snapshot, as it is. The one that was there is kept as the copy before it, if it is good: it is read for that,
/// unless it is the one that this process wrote `last`.
pub(crate) fn store(
    state: &Path,
    snapshot: &Snapshot,
    record: &[u8],
    trusted: &[PublicKey],
    last: Option<&Stored>,
) -> Result<Option<Stored>, CacheError> {
    let untouched = last.filter(|last| Stored::of(state, last.generation).as_ref() == Some(*last)).map(|last| last.generation);
    let read = || load(state, FILE, &snapshot.mesh, trusted).ok().flatten().map(|old| old.generation);
    let kept = untouched.or_else(read).is_some_and(|old| old < snapshot.generation);
    write(state, FILE, record, kept.then_some(PREVIOUS))?;
    for older in OLDER.map(|name| state.join(name)) {
        match fs::remove_file(&older) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(CacheError::Io { path: older, error }),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(Stored::of(state, snapshot.generation))
}

/// Writes the pauses.
pub(crate) fn store_pauses(state: &Path, pauses: &Pauses) -> Result<(), CacheError> {
    let json = serde_json::to_vec(pauses).map_err(|error| CacheError::Io { path: state.join(PAUSES), error: error.into() })?;
    write(state, PAUSES, &json, None)
}

/// Reads the pauses; none if there is no file.
///
/// # Errors
/// The disk's, or what is wrong with the content, in words.
pub(crate) fn load_pauses(state: &Path) -> Result<Pauses, String> {
    let path = state.join(PAUSES);
    match fs::read(&path) {
        Ok(json) => serde_json::from_slice(&json).map_err(|error| format!("{}: {error}", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Pauses::new()),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// Writes a file, whole or not at all; the one that was there gets another name, if it is to be kept.
fn write(state: &Path, name: &str, content: &[u8], keep: Option<&str>) -> Result<(), CacheError> {
    let path = state.join(name);
    let write = || -> io::Result<()> {
        fs::create_dir_all(state)?;
        let temporary = state.join(format!("{name}.{}.tmp", std::process::id()));
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        if let Some(keep) = keep {
            // Should the next step never come, this copy is still found.
            fs::rename(&path, state.join(keep))?;
        }
        fs::rename(&temporary, &path)?;
        // The renames are durable only once the folder is.
        File::open(state)?.sync_all()
    };
    write().map_err(|error| CacheError::Io { path: path.clone(), error })
}

/// Reads a copy, [`FILE`], [`PREVIOUS`] or one of [`OLDER`]; `None` if there is none.
pub(crate) fn load(state: &Path, name: &str, mesh: &str, trusted: &[PublicKey]) -> Result<Option<Snapshot>, CacheError> {
    let path = state.join(name);
    let copy = match fs::read(&path) {
        Ok(copy) => copy,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CacheError::Io { path, error }),
    };
    let read = if OLDER.contains(&name) { Snapshot::from_json(&copy) } else { Snapshot::unpack(&copy.into()) };
    let checked = read.and_then(|snapshot| {
        snapshot.check(mesh, snapshot.generation)?;
        snapshot.verify(trusted)?;
        Ok(snapshot)
    });
    checked.map(Some).map_err(|error| CacheError::Refused { path, error })
}

#[cfg(test)]
mod tests {
    use mesh_routing::sign::SigningKey;

    use super::*;

    fn snapshot(generation: u64) -> Snapshot {
        Snapshot::new("shop", generation, 5, "w", mesh_routing::Parts::default()).unwrap()
    }

    fn store(state: &Path, snapshot: &Snapshot, last: Option<&Stored>) -> Option<Stored> {
        super::store(state, snapshot, &snapshot.pack().unwrap(), &[], last).unwrap()
    }

    #[test]
    fn is_read_back_replaced_and_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("a/b");
        let load = |name: &str, mesh: &str| load(&state, name, mesh, &[]);
        assert!(load(FILE, "shop").unwrap().is_none() && load(PREVIOUS, "shop").unwrap().is_none());
        let first = snapshot(1);
        store(&state, &first, None);
        assert_eq!(load(FILE, "shop").unwrap(), Some(first.clone()));
        let second = snapshot(2);
        store(&state, &second, None);
        store(&state, &second, None);
        assert_eq!(load(FILE, "shop").unwrap(), Some(second.clone()));
        assert_eq!(load(PREVIOUS, "shop").unwrap(), Some(first.clone()), "the same again does not push it out");
        assert_eq!(fs::read_dir(&state).unwrap().count(), 2, "no temporary file is left");

        assert!(load(FILE, "other").unwrap_err().to_string().contains("mesh"));
        let unsigned = super::load(&state, FILE, "shop", &[SigningKey::from_random(&[1; 32]).public()]).unwrap_err();
        assert!(unsigned.to_string().contains("table.zst: it is not signed"), "{unsigned}");
        let path = state.join(FILE);
        let copy = fs::read(&path).unwrap();
        fs::write(&path, &copy[..copy.len() / 2]).unwrap();
        let error = load(FILE, "shop").unwrap_err();
        assert!(error.to_string().contains("table.zst"), "{error}");

        // What is not good is replaced, and the good copy before it stays.
        let third = snapshot(3);
        store(&state, &third, None);
        assert_eq!((load(FILE, "shop").unwrap(), load(PREVIOUS, "shop").unwrap()), (Some(third), Some(first.clone())));

        // What this process wrote itself is not read again, unless somebody changed it.
        let fourth = snapshot(4);
        let stored = store(&state, &fourth, None);
        let fifth = snapshot(5);
        let stored = store(&state, &fifth, stored.as_ref());
        assert_eq!(load(PREVIOUS, "shop").unwrap(), Some(fourth.clone()));
        fs::write(&path, "cut").unwrap();
        let sixth = snapshot(6);
        store(&state, &sixth, stored.as_ref());
        assert_eq!((load(FILE, "shop").unwrap(), load(PREVIOUS, "shop").unwrap()), (Some(sixth), Some(fourth)));
    }

    /// An older version wrote the envelope as it is, under another name.
    #[test]
    fn older_copies_are_read_until_there_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path();
        for (name, generation) in OLDER.into_iter().zip([3, 2]) {
            fs::write(state.join(name), serde_json::to_vec(&snapshot(generation)).unwrap()).unwrap();
            assert_eq!(load(state, name, "shop", &[]).unwrap().unwrap().generation, generation);
        }
        store(state, &snapshot(4), None);
        assert!(OLDER.into_iter().all(|name| load(state, name, "shop", &[]).unwrap().is_none()));
        assert_eq!(load(state, FILE, "shop", &[]).unwrap(), Some(snapshot(4)));
    }
}
