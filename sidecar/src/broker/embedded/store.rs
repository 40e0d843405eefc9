//! The store: one SQLite file in WAL mode. Blocking; only the writer's and the reader's threads call it.
//!
//! A row of `batches` holds consecutive records of one partition. Its key is `partition id × 2^40 + base offset`: in a table with an
//! integer key SQLite keeps rows of up to a page within the page, where a two-column key would spill records of 1 KiB to a page each.
//!
//! Invariant: `upto_ms` is the largest timestamp of the partition up to and including the row, and `appended_ms` never falls: both can be
//! searched by bisection, and no index is needed.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OptionalExtension, params};

use super::{
    codec::Decoder,
    log::{Partition, Row, Topic},
    names::Settings,
};
use crate::{
    broker::{BrokerError, BrokerErrorKind},
    record::TopicPartition,
};

/// Offsets of a partition take this many bits of a row's key.
const OFFSET_BITS: u32 = 40;
/// The version of the schema, in `PRAGMA user_version`.
const SCHEMA: i64 = 1;
/// The file in the broker's folder.
pub(super) const FILE: &str = "mesh.db";

/// How the file is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoreOptions {
    /// The largest size of the file in bytes; `None`: the disk's.
    pub(super) max_bytes: Option<u64>,
    /// Retention of topics that say nothing, in milliseconds.
    pub(super) default_retention_ms: Option<i64>,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Store {
    connection: Connection,
    place: String,
}

/// A row to insert.
#[derive(Debug)]
pub(super) struct NewRow {
    pub(super) row: Row,
    pub(super) upto_ms: i64,
}

/// A topic that was deleted, and whose records are still to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Doomed {
    /// Its number in the store.
    pub(super) topic: i64,
    /// Those of its partitions.
    pub(super) partitions: Vec<i64>,
}

/// What the name of a deleted topic begins with in the store: no topic's name can.
const DOOMED: char = '/';

/// The first row of a partition.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) end: i64,
    pub(super) appended_ms: i64,
    pub(super) bytes: i64,
}

/// A statement failed, and whether what it should store may be stored nevertheless.
#[derive(Debug)]
pub(super) struct WriteError {
    pub(super) error: BrokerError,
    pub(super) maybe_stored: bool,
}

fn key(partition: i64, offset: i64) -> i64 {
    (partition << OFFSET_BITS) | offset.clamp(0, (1 << OFFSET_BITS) - 1)
}

fn offset_of(key: i64) -> i64 {
    key & ((1 << OFFSET_BITS) - 1)
}

impl Store {
    /// Opens the file for writing, or a store in memory, and brings the schema up.
    pub(super) fn open(folder: Option<&Path>, options: StoreOptions) -> Result<Self, BrokerError> {
        let path: Option<PathBuf> = folder.map(|folder| folder.join(FILE));
        let place = path.as_ref().map_or_else(|| "memory".to_owned(), |path| path.display().to_string());
        let opened = match &path {
            Some(path) => Connection::open(path),
            None => Connection::open_in_memory(),
        };
        let connection = opened.map_err(|error| failed(&place, "open", &error))?;
        let store = Self { connection, place };
        store.prepare(options).map_err(|error| store.failed("prepare", &error))?;
        let version: i64 = store
            .connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(|error| store.failed("read the version of", &error))?;
        match version {
            0 => store.create().map_err(|error| store.failed("create the tables of", &error))?,
            SCHEMA => {}
            other => {
                return Err(BrokerError::new(
                    BrokerErrorKind::Config,
                    format!("the store {} has version {other}, this program knows {SCHEMA}: use the program that wrote it", store.place),
                ));
            }
        }
        Ok(store)
    }

    /// Opens a further connection for reading.
    pub(super) fn open_reader(folder: &Path) -> Result<Self, BrokerError> {
        let path = folder.join(FILE);
        let place = path.display().to_string();
        let connection = Connection::open(&path).map_err(|error| failed(&place, "open", &error))?;
        let store = Self { connection, place };
        let prepared = store.connection.busy_timeout(Duration::from_secs(10)).and_then(|()| {
            store.connection.execute_batch("PRAGMA query_only=ON; PRAGMA cache_size=-1024; PRAGMA checkpoint_fullfsync=ON;")
        });
        prepared.map_err(|error| store.failed("prepare", &error))?;
        Ok(store)
    }

    fn prepare(&self, options: StoreOptions) -> rusqlite::Result<()> {
        self.connection.busy_timeout(Duration::from_secs(10))?;
        self.connection.set_prepared_statement_cache_capacity(32);
        // page_size and auto_vacuum have an effect only before the first table; fullfsync only on macOS.
        self.connection.execute_batch(
            "PRAGMA page_size=8192; PRAGMA auto_vacuum=INCREMENTAL; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA fullfsync=ON;
             PRAGMA wal_autocheckpoint=0; PRAGMA journal_size_limit=67108864; PRAGMA cache_size=-2048; PRAGMA temp_store=MEMORY;",
        )?;
        if let Some(bytes) = options.max_bytes {
            let page: u32 = self.connection.pragma_query_value(None, "page_size", |row| row.get(0))?;
            self.connection.execute_batch(&format!("PRAGMA max_page_count={}", (bytes / u64::from(page.max(1))).max(16)))?;
        }
        Ok(())
    }

    fn create(&self) -> rusqlite::Result<()> {
        self.connection.execute_batch(&format!(
            "BEGIN IMMEDIATE;
             CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, config TEXT NOT NULL);
             CREATE TABLE partitions (id INTEGER PRIMARY KEY, topic INTEGER NOT NULL REFERENCES topics, number INTEGER NOT NULL,
                 low INTEGER NOT NULL DEFAULT 0, high INTEGER NOT NULL DEFAULT 0, UNIQUE (topic, number));
             CREATE TABLE batches (id INTEGER PRIMARY KEY, span INTEGER NOT NULL, upto_ms INTEGER NOT NULL,
                 appended_ms INTEGER NOT NULL, data BLOB NOT NULL);
             CREATE TABLE offsets (consumer_group TEXT NOT NULL, partition INTEGER NOT NULL REFERENCES partitions,
                 next_offset INTEGER NOT NULL, metadata TEXT NOT NULL, PRIMARY KEY (consumer_group, partition)) WITHOUT ROWID;
             CREATE TABLE probe (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
             PRAGMA user_version={SCHEMA};
             COMMIT;"
        ))
    }

    /// All topics with their partitions.
    pub(super) fn load(&self, options: StoreOptions) -> Result<Vec<Topic>, BrokerError> {
        self.load_topics(options).map_err(|error| self.failed("read the topics of", &error))?.into_iter().collect()
    }

    fn load_topics(&self, options: StoreOptions) -> rusqlite::Result<Vec<Result<Topic, BrokerError>>> {
        let mut topics = self.connection.prepare("SELECT id, name, config FROM topics")?;
        let mut partitions = self.connection.prepare("SELECT id, number, low, high FROM partitions WHERE topic = ? ORDER BY number")?;
        let mut last =
            self.connection.prepare("SELECT id, span, upto_ms FROM batches WHERE id BETWEEN ? AND ? ORDER BY id DESC LIMIT 1")?;
        let mut loaded = Vec::new();
        let mut rows = topics.query([])?;
        while let Some(row) = rows.next()? {
            let (topic, name, config): (i64, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
            if name.starts_with(DOOMED) {
                continue;
            }
            let name: Arc<str> = name.into();
            let settings = serde_json::from_str::<BTreeMap<String, String>>(&config)
                .map_err(|error| error.to_string())
                .and_then(|config| Settings::parse(&name, &config, options.default_retention_ms).map(|settings| (settings, config)))
                .map_err(|error| BrokerError::new(BrokerErrorKind::Storage, format!("{}: topic '{name}': {error}", self.place)));
            let (settings, config) = match settings {
                Ok(settings) => settings,
                Err(error) => {
                    loaded.push(Err(error));
                    continue;
                }
            };
            let mut found = Vec::new();
            let mut rows = partitions.query([topic])?;
            while let Some(row) = rows.next()? {
                let (id, number, low, high): (i64, i32, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
                let newest = last
                    .query_row([key(id, 0), key(id, i64::MAX)], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
                    .optional()?
                    .map(|(id, span, upto): (i64, i64, i64)| (offset_of(id) + span, upto));
                let (end, upto) = newest.unwrap_or((0, i64::MIN));
                let name = TopicPartition::new(name.clone(), number);
                found.push(Arc::new(Partition::new(id, name, low, high.max(end), upto)));
            }
            loaded.push(Ok(Topic { name, settings, config, partitions: found }));
        }
        Ok(loaded)
    }

    /// Creates a topic; the ids of its partitions.
    pub(super) fn create_topic(&self, name: &str, partitions: i32, config: &BTreeMap<String, String>) -> Result<Vec<i64>, BrokerError> {
        let config = serde_json::to_string(config).map_err(|error| BrokerError::new(BrokerErrorKind::Config, error.to_string()))?;
        let create = || {
            let transaction = self.connection.unchecked_transaction()?;
            transaction.execute("INSERT INTO topics (name, config) VALUES (?, ?)", params![name, config])?;
            let topic = transaction.last_insert_rowid();
            let mut ids = Vec::new();
            let mut insert = transaction.prepare_cached("INSERT INTO partitions (topic, number) VALUES (?, ?)")?;
            for number in 0..partitions {
                insert.execute(params![topic, number])?;
                ids.push(transaction.last_insert_rowid());
            }
            drop(insert);
            transaction.commit()?;
            Ok(ids)
        };
        create().map_err(|error: rusqlite::Error| self.failed(&format!("create topic '{name}' in"), &error))
    }

    /// Changes a topic's settings, and adds partitions of the numbers `from..until`; their ids.
    pub(super) fn alter_topic(
        &self,
        name: &str,
        config: &BTreeMap<String, String>,
        from: i32,
        until: i32,
    ) -> Result<Vec<i64>, BrokerError> {
        let config = serde_json::to_string(config).map_err(|error| BrokerError::new(BrokerErrorKind::Config, error.to_string()))?;
        let altered = self.transaction(|store| {
            let topic: i64 = store.connection.query_row("SELECT id FROM topics WHERE name = ?", [name], |row| row.get(0))?;
            store.connection.execute("UPDATE topics SET config = ? WHERE id = ?", params![config, topic])?;
            let mut insert = store.connection.prepare_cached("INSERT INTO partitions (topic, number) VALUES (?, ?)")?;
            (from..until).map(|number| insert.execute(params![topic, number]).map(|_| store.connection.last_insert_rowid())).collect()
        });
        altered.map_err(|failure| failure.error)
    }

    /// Deletes a topic, and what groups committed there. Its records go later, piece by piece: see [`Store::doomed`].
    pub(super) fn delete_topic(&self, name: &str) -> Result<(), BrokerError> {
        let deleted = self.transaction(|store| {
            let topic: i64 = store.connection.query_row("SELECT id FROM topics WHERE name = ?", [name], |row| row.get(0))?;
            store.connection.execute("DELETE FROM offsets WHERE partition IN (SELECT id FROM partitions WHERE topic = ?)", [topic])?;
            store.connection.execute("UPDATE topics SET name = ? WHERE id = ?", params![format!("{DOOMED}{topic}"), topic]).map(drop)
        });
        deleted.map_err(|failure| failure.error)
    }

    /// The topics that were deleted and are not wholly gone.
    pub(super) fn doomed(&self) -> Result<Vec<Doomed>, BrokerError> {
        let read = || {
            let mut topics = self.connection.prepare("SELECT id FROM topics WHERE substr(name, 1, 1) = ?")?;
            let mut partitions = self.connection.prepare("SELECT id FROM partitions WHERE topic = ?")?;
            let found = topics.query_map([DOOMED.to_string()], |row| row.get::<_, i64>(0))?.collect::<rusqlite::Result<Vec<_>>>()?;
            let of = |topic: i64| {
                let partitions = partitions.query_map([topic], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
                Ok(Doomed { topic, partitions })
            };
            found.into_iter().map(of).collect::<rusqlite::Result<Vec<_>>>()
        };
        read().map_err(|error| self.failed("read the deleted topics of", &error))
    }

    /// Removes the first rows of a partition of a deleted topic, at most `limit`; whether there may be more.
    pub(super) fn purge(&self, partition: i64, limit: i64) -> Result<bool, BrokerError> {
        let purged = self.transaction(|store| {
            store
                .connection
                .prepare_cached("DELETE FROM batches WHERE id IN (SELECT id FROM batches WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?)")?
                .execute(params![key(partition, 0), key(partition, i64::MAX), limit])
        });
        purged.map(|rows| rows as i64 >= limit).map_err(|failure| failure.error)
    }

    /// Forgets a deleted topic whose records are gone. A partition with the largest number stays, for no number may come again: who still
    /// reads the old one would read another.
    pub(super) fn forget(&self, topic: i64) -> Result<(), BrokerError> {
        let forgotten = self.transaction(|store| {
            let connection = &store.connection;
            connection.execute("DELETE FROM offsets WHERE partition IN (SELECT id FROM partitions WHERE topic = ?)", [topic])?;
            connection.execute("DELETE FROM partitions WHERE topic = ? AND id < (SELECT max(id) FROM partitions)", [topic])?;
            connection
                .execute("DELETE FROM topics WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM partitions WHERE topic = ?1)", [topic])
                .map(drop)
        });
        forgotten.map_err(|failure| failure.error)
    }

    /// The bytes of a partition's rows.
    pub(super) fn bytes(&self, partition: i64) -> rusqlite::Result<u64> {
        let sum: i64 = self
            .connection
            .prepare_cached("SELECT coalesce(sum(length(data)), 0) FROM batches WHERE id BETWEEN ? AND ?")?
            .query_row([key(partition, 0), key(partition, i64::MAX)], |row| row.get(0))?;
        Ok(u64::try_from(sum).unwrap_or(0))
    }

    /// All groups that committed something.
    pub(super) fn groups(&self) -> rusqlite::Result<Vec<String>> {
        let mut statement = self.connection.prepare("SELECT DISTINCT consumer_group FROM offsets ORDER BY consumer_group")?;
        statement.query_map([], |row| row.get(0))?.collect()
    }

    /// Runs `work` in one durable transaction.
    pub(super) fn transaction<T>(&self, work: impl FnOnce(&Self) -> rusqlite::Result<T>) -> Result<T, WriteError> {
        let begin = || {
            let transaction = self.connection.unchecked_transaction()?;
            let value = work(self)?;
            Ok((transaction, value))
        };
        let (transaction, value) =
            begin().map_err(|error: rusqlite::Error| WriteError { error: self.failed("write to", &error), maybe_stored: false })?;
        match transaction.commit() {
            Ok(()) => Ok(value),
            Err(error) => {
                // A full disk is noticed before the commit mark is written; after another fault it may be in the log.
                let maybe_stored = error.sqlite_error_code() != Some(ErrorCode::DiskFull);
                if !self.connection.is_autocommit()
                    && let Err(rollback) = self.connection.execute_batch("ROLLBACK")
                {
                    tracing::warn!(store = self.place, error = %rollback, "the rollback of a failed transaction failed too");
                }
                Err(WriteError { error: self.failed("commit to", &error), maybe_stored })
            }
        }
    }

    /// Inserts rows of a partition. Within [`Store::transaction`].
    pub(super) fn insert(&self, partition: i64, rows: &[NewRow], appended_ms: i64) -> rusqlite::Result<()> {
        let mut insert =
            self.connection.prepare_cached("INSERT INTO batches (id, span, upto_ms, appended_ms, data) VALUES (?, ?, ?, ?, ?)")?;
        for NewRow { row, upto_ms } in rows {
            insert.execute(params![key(partition, row.base), row.end - row.base, upto_ms, appended_ms, &row.data[..]])?;
        }
        Ok(())
    }

    /// Sets a group's offset. Within [`Store::transaction`].
    pub(super) fn set_offset(&self, group: &str, partition: i64, offset: i64, metadata: &str) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("INSERT OR REPLACE INTO offsets (consumer_group, partition, next_offset, metadata) VALUES (?, ?, ?, ?)")?
            .execute(params![group, partition, offset, metadata])?;
        Ok(())
    }

    /// A group's offset and metadata.
    pub(super) fn offset(&self, group: &str, partition: i64) -> rusqlite::Result<Option<(i64, String)>> {
        self.connection
            .prepare_cached("SELECT next_offset, metadata FROM offsets WHERE consumer_group = ? AND partition = ?")?
            .query_row(params![group, partition], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()
    }

    /// Rows that hold offsets `from..until`, in order; about `max_bytes`, one at least if there is one.
    pub(super) fn read(&self, partition: i64, from: i64, until: i64, max_bytes: usize) -> rusqlite::Result<Vec<Row>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, span, data FROM batches
             WHERE id >= coalesce((SELECT max(id) FROM batches WHERE id BETWEEN ?1 AND ?2), ?2) AND id < ?3 ORDER BY id",
        )?;
        let mut rows = statement.query(params![key(partition, 0), key(partition, from), key(partition, until)])?;
        let (mut found, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.next()? {
            let (base, span) = (offset_of(row.get(0)?), row.get::<_, i64>(1)?);
            if base + span <= from {
                continue;
            }
            let data = row.get_ref(2)?.as_blob()?;
            bytes += data.len();
            found.push(Row { base, end: base + span, data: bytes::Bytes::copy_from_slice(data) });
            if bytes >= max_bytes {
                break;
            }
        }
        Ok(found)
    }

    /// Whether there is a record in `from..high`. Compaction leaves gaps, also at the end of a row.
    pub(super) fn any_from(&self, partition: i64, from: i64, high: i64) -> rusqlite::Result<bool> {
        let mut from = from;
        while from < high {
            let rows = self.read(partition, from, high, 1)?;
            let Some(end) = rows.last().map(|row| row.end) else { return Ok(false) };
            // A corrupt row is a reader's to report.
            let there = |row: Row| Decoder::new(row.data, row.base).any(|record| record.map_or(true, |(offset, _)| offset >= from));
            if rows.into_iter().any(there) {
                return Ok(true);
            }
            from = end;
        }
        Ok(false)
    }

    /// The first offset in `low..high` whose record is not older than `timestamp_ms`; `high` if there is none.
    pub(super) fn offset_at(&self, partition: i64, low: i64, high: i64, timestamp_ms: i64) -> rusqlite::Result<i64> {
        let mut at_or_after =
            self.connection.prepare_cached("SELECT id, span, upto_ms FROM batches WHERE id BETWEEN ? AND ? ORDER BY id LIMIT 1")?;
        // Invariant of the bisection: rows that begin below `left` are too old, and `best` is the first known row that is not.
        let (mut left, mut right, mut best) = (0, high, None);
        while left < right {
            let middle = left + (right - left) / 2;
            let row = at_or_after
                .query_row([key(partition, middle), key(partition, right - 1)], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
                .optional()?
                .map(|(id, span, upto): (i64, i64, i64)| (offset_of(id), span, upto));
            match row {
                Some((base, span, upto)) if upto < timestamp_ms => left = base + span,
                Some((base, ..)) => {
                    best = Some(base);
                    right = middle;
                }
                None => right = middle,
            }
        }
        let Some(base) = best else { return Ok(high) };
        for row in self.read(partition, base, base + 1, 1)? {
            for record in Decoder::new(row.data, row.base) {
                // A corrupt row is reported by who reads it; here it ends the search.
                let Ok((offset, record)) = record else { break };
                if offset >= low && record.timestamp_ms.is_some_and(|ms| ms >= timestamp_ms) {
                    return Ok(offset);
                }
            }
        }
        Ok(base.max(low))
    }

    /// The first rows of a partition, at most `limit`.
    pub(super) fn heads(&self, partition: i64, limit: i64) -> rusqlite::Result<Vec<Head>> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT id, span, appended_ms, length(data) FROM batches WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?")?;
        let rows = statement.query_map(params![key(partition, 0), key(partition, i64::MAX), limit], |row| {
            Ok(Head { end: offset_of(row.get(0)?) + row.get::<_, i64>(1)?, appended_ms: row.get(2)?, bytes: row.get(3)? })
        })?;
        rows.collect()
    }

    /// Deletes the rows below `low`, and remembers both watermarks. Within [`Store::transaction`].
    pub(super) fn delete_below(&self, partition: i64, low: i64, high: i64) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("DELETE FROM batches WHERE id >= ? AND id < ?")?
            .execute([key(partition, 0), key(partition, low)])?;
        self.connection.prepare_cached("UPDATE partitions SET low = ?, high = ? WHERE id = ?")?.execute([low, high, partition])?;
        Ok(())
    }

    /// Deletes the rows that end at or below `low`, and remembers both watermarks. Within [`Store::transaction`].
    pub(super) fn delete_whole_below(&self, partition: i64, low: i64, high: i64) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("DELETE FROM batches WHERE id >= ?1 AND id < ?2 AND id + span <= ?2")?
            .execute([key(partition, 0), key(partition, low)])?;
        self.connection.prepare_cached("UPDATE partitions SET low = ?, high = ? WHERE id = ?")?.execute([low, high, partition])?;
        Ok(())
    }

    /// Replaces the data of a row, or deletes it. Within [`Store::transaction`].
    pub(super) fn rewrite(&self, partition: i64, base: i64, data: Option<&[u8]>, high: i64) -> rusqlite::Result<()> {
        match data {
            Some(data) => {
                self.connection.prepare_cached("UPDATE batches SET data = ? WHERE id = ?")?.execute(params![data, key(partition, base)])?;
            }
            None => {
                self.connection.prepare_cached("DELETE FROM batches WHERE id = ?")?.execute([key(partition, base)])?;
                // The end of the log must not fall if the last row goes.
                self.connection.prepare_cached("UPDATE partitions SET high = max(high, ?) WHERE id = ?")?.execute([high, partition])?;
            }
        }
        Ok(())
    }

    /// Gives up to `pages` free pages back to the file system; whether there may be more.
    pub(super) fn vacuum(&self, pages: u32) -> rusqlite::Result<bool> {
        let free: u32 = self.connection.pragma_query_value(None, "freelist_count", |row| row.get(0))?;
        if free == 0 {
            return Ok(false);
        }
        let mut statement = self.connection.prepare(&format!("PRAGMA incremental_vacuum({pages})"))?;
        let mut rows = statement.query([])?;
        while rows.next()?.is_some() {}
        Ok(free > pages)
    }

    /// Writes and deletes `bytes` bytes, to see whether the store takes data again.
    pub(super) fn probe(&self, bytes: u32) -> Result<(), WriteError> {
        self.transaction(|store| {
            store.connection.execute("INSERT OR REPLACE INTO probe (id, data) VALUES (1, zeroblob(?))", [bytes.max(1)]).map(drop)
        })?;
        self.transaction(|store| store.connection.execute("DELETE FROM probe", []).map(drop))
    }

    /// Moves what is in the log into the file, without waiting for anybody; whether nothing is left, so that the log begins anew.
    pub(super) fn move_log(&self) -> Result<bool, BrokerError> {
        self.connection
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
                Ok(row.get::<_, i64>(0)? == 0 && row.get::<_, i64>(1)? == row.get::<_, i64>(2)?)
            })
            .map_err(|error| self.failed("checkpoint", &error))
    }

    /// Moves the log into the file and empties it.
    pub(super) fn checkpoint(&self) -> Result<(), BrokerError> {
        self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).map_err(|error| self.failed("checkpoint", &error))
    }

    /// The error of a statement, for people.
    pub(super) fn failed(&self, what: &str, error: &rusqlite::Error) -> BrokerError {
        failed(&self.place, what, error)
    }
}

fn failed(place: &str, what: &str, error: &rusqlite::Error) -> BrokerError {
    let hint = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "; free disk space, or shorten the retention of topics",
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => "; check that the folder is writable",
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => "; restore the folder from a backup, or move it away",
        _ => "",
    };
    BrokerError::new(BrokerErrorKind::Storage, format!("embedded broker: cannot {what} the store {place}: {error}{hint}"))
}
