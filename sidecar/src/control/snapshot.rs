//! The form of a record of `__mesh.control`, and of the copy on disk: one whole table with its place in the mesh's history.
//!
//! Invariant: the digest is over the table's text as it is stored; a snapshot whose digest differs is refused.
//! Invariant: what is unpacked is bounded ([`MAX_BYTES`]), whatever a record claims.

use std::io::Read as _;

use bytes::Bytes;
use mesh_routing::{
    RouteCounts,
    channel::Channel,
    sign::{PublicKey, STABLE, Signed},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    log::Winner,
    trust::{self, Seal, TrustError},
};

/// The schema that this version writes, and the only one that it reads.
pub(crate) const SCHEMA: u32 = 1;
/// The largest snapshot that is unpacked, in bytes.
pub(crate) const MAX_BYTES: u64 = 64 << 20;
/// The compression's level: tables are written seldom and read by everybody.
const LEVEL: i32 = 9;

/// A table with its place in the mesh's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    /// The form of what follows.
    pub(crate) schema: u32,
    /// The mesh.
    pub(crate) mesh: String,
    /// Who runs it: the text of a [`Channel`].
    pub(crate) channel: String,
    /// The generation, from 1.
    pub(crate) generation: u64,
    /// The table's digest, `sha256:…`.
    pub(crate) digest: String,
    /// When it was applied, in milliseconds since 1970-01-01 UTC.
    pub(crate) applied_ms: i64,
    /// The instance that wrote it.
    pub(crate) writer: String,
    /// The signature, over mesh, channel, generation and digest.
    #[serde(default)]
    pub(crate) signature: Option<Seal>,
    /// What is told of it in the history.
    #[serde(default)]
    pub(crate) about: About,
    /// The table's canonical JSON, as text, so that the digest holds whatever a reader makes of it.
    pub(crate) table: String,
}

/// What is told of a generation in the history. Said by whoever applied it, and not signed. Older versions wrote nothing of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct About {
    /// Who applied it.
    pub(crate) by: String,
    /// The file that it came from.
    pub(crate) source: String,
    /// Why.
    pub(crate) message: String,
    /// The generation whose content it is, in a rollback.
    pub(crate) rollback_to: Option<u64>,
    /// How many routes differ from the generation before.
    pub(crate) routes: Option<RouteCounts>,
    /// When a canary is aborted.
    pub(crate) limits: Limits,
    /// The canary that it promotes.
    pub(crate) promotes: Option<u64>,
}

/// What the instances of a canary may report before it is aborted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Limits {
    /// Dead letters, of all of them, since they took it.
    pub(crate) dead_letters: u64,
    /// Instances that refuse it.
    pub(crate) refusals: u64,
}

/// Why a snapshot is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    /// It cannot be unpacked.
    #[error("the snapshot cannot be unpacked: {0}")]
    Unpack(#[from] std::io::Error),
    /// It is beyond the limit.
    #[error("the snapshot is larger than {MAX_BYTES} bytes unpacked")]
    TooLarge,
    /// It is not what a snapshot looks like.
    #[error("the snapshot is not a JSON envelope of schema {SCHEMA}: {0}")]
    Json(#[from] serde_json::Error),
    /// Written by another version.
    #[error("the snapshot has schema {0}, and this version reads schema {SCHEMA} only: update this sidecar")]
    Schema(u32),
    /// A channel that this version does not know.
    #[error("the snapshot is for channel {0:?}, which this version does not know: update this sidecar")]
    Channel(String),
    /// Not signed by a key that is trusted here.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The envelope contradicts its place.
    #[error("the snapshot says {field} {found:?} where {expected:?} is expected")]
    Mismatch {
        /// The field.
        field: &'static str,
        /// What it says.
        found: String,
        /// What it ought to say.
        expected: String,
    },
}

impl Snapshot {
    /// A snapshot of a canonical table.
    pub(crate) fn new(mesh: &str, generation: u64, applied_ms: i64, writer: &str, table: String) -> Self {
        Self {
            schema: SCHEMA,
            mesh: mesh.to_owned(),
            channel: STABLE.to_owned(),
            generation,
            digest: digest(&table),
            applied_ms,
            writer: writer.to_owned(),
            signature: None,
            about: About::default(),
            table,
        }
    }

    /// The record's value. In one piece: a compressor that does not know the size sets up its tables for megabytes, and the allocator
    /// keeps them for every thread that ever made one.
    pub(crate) fn pack(&self) -> Result<Bytes, SnapshotError> {
        Ok(zstd::bulk::compress(&serde_json::to_vec(self)?, LEVEL)?.into())
    }

    /// Reads a record's value. CPU-heavy for large tables.
    pub(crate) fn unpack(value: &[u8]) -> Result<Self, SnapshotError> {
        let json = unzip(value, MAX_BYTES)?;
        if json.len() as u64 > MAX_BYTES {
            return Err(SnapshotError::TooLarge);
        }
        Self::from_json(&json)
    }

    /// Reads the envelope's JSON, and checks its schema and digest.
    pub(crate) fn from_json(json: &[u8]) -> Result<Self, SnapshotError> {
        // In another schema the rest may look different, and that is what has to be said then.
        #[derive(Deserialize)]
        struct Probe {
            schema: u32,
        }
        let snapshot: Self = serde_json::from_slice(json).map_err(|error| match serde_json::from_slice::<Probe>(json) {
            Ok(Probe { schema }) if schema != SCHEMA => SnapshotError::Schema(schema),
            Ok(_) | Err(_) => error.into(),
        })?;
        if snapshot.schema != SCHEMA {
            return Err(SnapshotError::Schema(snapshot.schema));
        }
        if snapshot.channel.parse::<Channel>().is_err() {
            return Err(SnapshotError::Channel(snapshot.channel));
        }
        snapshot.expect("digest", &snapshot.digest, &digest(&snapshot.table))?;
        Ok(snapshot)
    }

    /// Checks that the envelope belongs where it was found.
    pub(crate) fn check(&self, mesh: &str, generation: u64) -> Result<(), SnapshotError> {
        self.expect("mesh", &self.mesh, mesh)?;
        self.expect("generation", &self.generation.to_string(), &generation.to_string())
    }

    /// Reads a record of the log, and checks that it belongs there: all but the signature. CPU-heavy for large tables.
    pub(crate) fn read(winner: &Winner, mesh: &str, generation: u64) -> Result<Self, SnapshotError> {
        let snapshot = Self::unpack(&winner.value)?;
        snapshot.check(mesh, generation)?;
        snapshot.check_channel(winner.channel.as_ref())?;
        Ok(snapshot)
    }

    /// Checks that it is for those for whom its key in the log says that it is.
    fn check_channel(&self, channel: Option<&Channel>) -> Result<(), SnapshotError> {
        self.expect("channel", &self.channel, &channel.map(Channel::to_string).unwrap_or_default())
    }

    /// Checks the signature, if keys are trusted here. [`Snapshot::check`] comes first: what is signed is what it claims.
    pub(crate) fn verify(&self, trusted: &[PublicKey]) -> Result<(), SnapshotError> {
        let signed = Signed { mesh: &self.mesh, channel: &self.channel, generation: self.generation, digest: &self.digest };
        Ok(trust::check(trusted, &signed, self.signature.as_ref())?)
    }

    fn expect(&self, field: &'static str, found: &str, expected: &str) -> Result<(), SnapshotError> {
        if found == expected {
            return Ok(());
        }
        Err(SnapshotError::Mismatch { field, found: found.to_owned(), expected: expected.to_owned() })
    }
}

/// Decompresses at most `limit` bytes and one more, which tells that there are more.
pub(super) fn unzip(value: &[u8], limit: u64) -> std::io::Result<Vec<u8>> {
    match zstd::zstd_safe::get_frame_content_size(value) {
        // What says how long it is needs neither a window of its own nor a buffer that grows.
        Ok(Some(length)) if length <= limit => zstd::bulk::decompress(value, usize::try_from(length).unwrap_or(usize::MAX)),
        Ok(_) | Err(_) => {
            let mut bytes = Vec::new();
            zstd::Decoder::with_buffer(value)?.take(limit + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        }
    }
}

/// `sha256:<hex>` of a canonical table.
fn digest(table: &str) -> String {
    let mut out = String::from("sha256:");
    for byte in Sha256::digest(table) {
        out.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or_default());
        out.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or_default());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Snapshot {
        Snapshot::new("shop", 7, 1_700_000_000_000, "pricing-0", r#"{"routes":[]}"#.into())
    }

    #[test]
    fn survives_the_way_through_a_record() {
        let snapshot = sample();
        let read = Snapshot::unpack(&snapshot.pack().unwrap()).unwrap();
        assert_eq!(read, snapshot);
        read.check("shop", 7).unwrap();
        assert!(read.check("shop", 8).unwrap_err().to_string().contains("generation"));
        assert!(read.check("other", 7).unwrap_err().to_string().contains("mesh"));
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        assert!(matches!(Snapshot::unpack(b"no zstd"), Err(SnapshotError::Unpack(_))));
        let other = Snapshot { schema: 2, ..sample() };
        assert!(matches!(Snapshot::unpack(&other.pack().unwrap()), Err(SnapshotError::Schema(2))));
        let unknown = Snapshot { channel: "canary moon=full".into(), ..sample() };
        assert!(matches!(Snapshot::unpack(&unknown.pack().unwrap()), Err(SnapshotError::Channel(_))));
        let canary = Snapshot { channel: "canary percent=1".into(), ..sample() };
        let canary = Snapshot::unpack(&canary.pack().unwrap()).unwrap();
        assert!(canary.check_channel(Some(&"canary percent=1".parse().unwrap())).is_ok());
        assert!(canary.check_channel(Some(&Channel::Stable)).unwrap_err().to_string().contains("channel"));
        let forged = Snapshot { table: "{}".into(), ..sample() };
        assert!(matches!(Snapshot::unpack(&forged.pack().unwrap()), Err(SnapshotError::Mismatch { field: "digest", .. })));
        let truncated = sample().pack().unwrap();
        assert!(Snapshot::unpack(&truncated[..truncated.len() - 3]).is_err());
    }

    /// As versions before signatures and history wrote it.
    #[test]
    fn reads_what_older_versions_wrote() {
        let Snapshot { schema, mesh, channel, generation, digest, applied_ms, writer, table, .. } = sample();
        let old = serde_json::json!({
            "schema": schema, "mesh": mesh, "channel": channel, "generation": generation, "digest": digest,
            "applied_ms": applied_ms, "writer": writer, "signature": null, "table": table,
        });
        assert_eq!(Snapshot::from_json(old.to_string().as_bytes()).unwrap(), sample());
        let newer = Snapshot { about: About { by: "a".into(), ..About::default() }, ..sample() };
        assert_eq!(Snapshot::unpack(&newer.pack().unwrap()).unwrap(), newer);
    }

    #[test]
    fn a_signature_is_checked_against_the_place() {
        use mesh_routing::sign::SigningKey;
        let key = SigningKey::from_random(&[1; 32]);
        let trusted = [key.public()];
        let mut snapshot = sample();
        snapshot.verify(&[]).unwrap();
        assert!(matches!(snapshot.verify(&trusted), Err(SnapshotError::Trust(TrustError::Unsigned { .. }))));
        let signed = Signed { mesh: "shop", channel: STABLE, generation: 7, digest: &snapshot.digest };
        let signature = mesh_proto::v1::TableSignature { key_id: key.public().id().to_owned(), ed25519: key.sign(&signed).into() };
        snapshot.signature = Some(Seal::from(&signature));
        Snapshot::unpack(&snapshot.pack().unwrap()).unwrap().verify(&trusted).unwrap();
        snapshot.generation = 8;
        assert!(matches!(snapshot.verify(&trusted), Err(SnapshotError::Trust(TrustError::Wrong { .. }))));
    }

    /// A frame that says how long it is has no window of its own: neither end sets one up for megabytes.
    #[test]
    fn a_small_table_takes_little_memory_to_pack() {
        const SINGLE_SEGMENT: u8 = 1 << 5;
        assert_ne!(sample().pack().unwrap()[4] & SINGLE_SEGMENT, 0);
    }

    #[test]
    fn refuses_a_bomb() {
        let bomb = zstd::encode_all(std::io::repeat(b' ').take(MAX_BYTES + 10), 1).unwrap();
        assert!(bomb.len() < 100_000);
        assert!(matches!(Snapshot::unpack(&bomb), Err(SnapshotError::TooLarge)));
    }
}
