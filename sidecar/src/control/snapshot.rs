//! The form of a record of `__mesh.control`, and of the copy on disk: one whole table with its place in the mesh's history.
//!
//! ```text
//! zstd frame: the envelope, as JSON, with what the table declares beside routes, and length and digest of each part
//! zstd frame: some parts, one after the other (see `mesh_routing::Parts`)
//! zstd frame: …
//! ```
//!
//! So a sidecar unpacks the envelope and the frames in which the routes of its services are, and `zstd -d` shows all. Schema 1, which older versions wrote,
//! has the whole table in the envelope, and a digest over its text.
//!
//! Invariant: the digest is over what the table declares and the digests of its parts; a snapshot whose digest differs is refused, and so is a part.
//! Invariant: what is unpacked is bounded ([`MAX_BYTES`]), whatever a record claims.

use std::io::Read as _;

use base64::{Engine as _, prelude::BASE64_STANDARD_NO_PAD};
use bytes::Bytes;
use mesh_routing::{
    Parts, RouteCounts,
    channel::Channel,
    digest_of, part_digest,
    sign::{PublicKey, STABLE, Signed},
    text_digest,
};
use serde::{Deserialize, Serialize};

use super::{
    log::Winner,
    trust::{self, Seal, TrustError},
};

/// The schema that this version writes.
pub(crate) const SCHEMA: u32 = 2;
/// The schema before it, which it reads, too.
const WHOLE: u32 = 1;
/// The largest snapshot that is unpacked, in bytes.
pub(crate) const MAX_BYTES: u64 = 64 << 20;
/// The compression's level: tables are written seldom and read by everybody.
const LEVEL: i32 = 9;
/// Parts share a frame until it has so many bytes: large enough to compress well (a table of random words takes a fifth more room than in one frame, and half
/// as much again with a frame for each part), small enough to be unpacked for one part.
const FRAME: usize = 64 << 10;

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
    /// What the table declares beside routes.
    #[serde(default)]
    pub(super) declared: String,
    /// The parts that its routes are in, by their numbers.
    #[serde(default)]
    pub(super) parts: Vec<Part>,
    /// Of schema 1 the table's canonical JSON.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) table: String,
    /// The frames with the parts.
    #[serde(skip)]
    pub(super) frames: Bytes,
}

/// A part, as the envelope has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    /// Its number.
    part: u8,
    /// The length of its text.
    bytes: u64,
    /// The digest of its text, as base64.
    sha256: String,
}

impl Part {
    fn of(number: u8, text: &str) -> Self {
        Self { part: number, bytes: text.len() as u64, sha256: BASE64_STANDARD_NO_PAD.encode(part_digest(text)) }
    }

    /// What is no digest is that of nothing.
    fn digest(&self) -> [u8; 32] {
        BASE64_STANDARD_NO_PAD.decode(&self.sha256).ok().and_then(|bytes| bytes.try_into().ok()).unwrap_or_default()
    }
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
    #[error("the snapshot has schema {0}, and this version reads schema {WHOLE} and {SCHEMA} only: update this sidecar")]
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
    /// A part is not what the envelope says of it.
    #[error("part {0} of the snapshot is not what its envelope says")]
    Part(u8),
    /// Its parts are not those of a table.
    #[error("the snapshot has no parts of a table that this version understands: update this sidecar")]
    NoTable,
}

impl Snapshot {
    /// A snapshot of a table. CPU-heavy for large ones.
    ///
    /// # Errors
    /// The compressor's.
    pub(crate) fn new(mesh: &str, generation: u64, applied_ms: i64, writer: &str, table: Parts) -> Result<Self, SnapshotError> {
        let parts: Vec<Part> = table.routes.iter().map(|(number, text)| Part::of(*number, text)).collect();
        let digest = digest_of(&table.declared, parts.iter().map(|part| (part.part, part.digest())));
        let (mut frames, mut frame) = (Vec::new(), String::new());
        let last = table.routes.len();
        for (index, text) in (1..).zip(table.routes.values()) {
            frame += text;
            if frame.len() >= FRAME || index == last {
                frames.extend_from_slice(&zstd::bulk::compress(frame.as_bytes(), LEVEL)?);
                frame.clear();
            }
        }
        Ok(Self {
            schema: SCHEMA,
            mesh: mesh.to_owned(),
            channel: STABLE.to_owned(),
            generation,
            digest,
            applied_ms,
            writer: writer.to_owned(),
            signature: None,
            about: About::default(),
            parts,
            declared: table.declared,
            table: String::new(),
            frames: frames.into(),
        })
    }

    /// The record's value. The envelope is compressed in one piece: a compressor that does not know the size sets up its tables for megabytes, and the
    /// allocator keeps them for every thread that ever made one.
    pub(crate) fn pack(&self) -> Result<Bytes, SnapshotError> {
        let mut record = zstd::bulk::compress(&serde_json::to_vec(self)?, LEVEL)?;
        record.extend_from_slice(&self.frames);
        Ok(record.into())
    }

    /// Reads a record's value: the envelope, with its schema and digest; the parts are left as they are. CPU-heavy for large tables of schema 1.
    pub(crate) fn unpack(value: &Bytes) -> Result<Self, SnapshotError> {
        let (envelope, _, frames) = split_frame(value)?;
        let json = unzip(&envelope, MAX_BYTES)?;
        if json.len() as u64 > MAX_BYTES {
            return Err(SnapshotError::TooLarge);
        }
        Ok(Self { frames, ..Self::from_json(&json)? })
    }

    /// Reads the envelope's JSON, and checks its schema and digest.
    pub(crate) fn from_json(json: &[u8]) -> Result<Self, SnapshotError> {
        // In another schema the rest may look different, and that is what has to be said then.
        #[derive(Deserialize)]
        struct Probe {
            schema: u32,
        }
        let known = |schema| matches!(schema, WHOLE | SCHEMA);
        let snapshot: Self = serde_json::from_slice(json).map_err(|error| match serde_json::from_slice::<Probe>(json) {
            Ok(Probe { schema }) if !known(schema) => SnapshotError::Schema(schema),
            Ok(_) | Err(_) => error.into(),
        })?;
        if !known(snapshot.schema) {
            return Err(SnapshotError::Schema(snapshot.schema));
        }
        if snapshot.channel.parse::<Channel>().is_err() {
            return Err(SnapshotError::Channel(snapshot.channel));
        }
        let digest = match snapshot.schema {
            WHOLE => text_digest(&snapshot.table),
            _ => snapshot.digest_of_parts()?,
        };
        snapshot.expect("digest", &snapshot.digest, &digest)?;
        Ok(snapshot)
    }

    fn digest_of_parts(&self) -> Result<String, SnapshotError> {
        let (mut bytes, mut last) = (self.declared.len() as u64, None);
        for part in &self.parts {
            // One order, so that one table has one digest.
            if last.replace(part.part) >= Some(part.part) {
                return Err(SnapshotError::Part(part.part));
            }
            bytes = bytes.saturating_add(part.bytes);
        }
        if bytes > MAX_BYTES {
            return Err(SnapshotError::TooLarge);
        }
        Ok(digest_of(&self.declared, self.parts.iter().map(|part| (part.part, part.digest()))))
    }

    /// The digest of its table as this version makes it, whatever the schema.
    ///
    /// # Errors
    /// If it is no table that is understood here.
    pub(crate) fn table_digest(&self) -> Result<String, SnapshotError> {
        match self.schema {
            WHOLE => Parts::split(&self.table).map(|parts| parts.digest()).ok_or(SnapshotError::NoTable),
            _ => Ok(self.digest.clone()),
        }
    }

    /// The table's canonical JSON. CPU-heavy for large tables.
    ///
    /// # Errors
    /// If a part is not what it ought to be.
    pub(crate) fn table(&self) -> Result<String, SnapshotError> {
        match self.schema {
            WHOLE => Ok(self.table.clone()),
            _ => self.parts(|_| true)?.0.join().ok_or(SnapshotError::NoTable),
        }
    }

    /// The table's parts that are wanted, and whether there are more. CPU-heavy for large tables of schema 1.
    ///
    /// # Errors
    /// If one of them is not what it ought to be.
    pub(crate) fn parts(&self, wanted: impl Fn(u8) -> bool) -> Result<(Parts, bool), SnapshotError> {
        if self.schema == WHOLE {
            let mut parts = Parts::split(&self.table).ok_or(SnapshotError::NoTable)?;
            let all = parts.routes.len();
            parts.routes.retain(|number, _| wanted(*number));
            let more = parts.routes.len() < all;
            return Ok((parts, more));
        }
        let mut found = Parts { declared: self.declared.clone(), ..Parts::default() };
        let (mut frames, mut left) = (self.frames.clone(), self.parts.as_slice());
        while let [first, ..] = left {
            let (compressed, text_bytes, rest) = split_frame(&frames)?;
            // The parts that fill it.
            let mut bytes = 0_u64;
            let filling = left.iter().take_while(|part| {
                bytes = bytes.saturating_add(part.bytes);
                bytes <= text_bytes
            });
            let (here, behind) = left.split_at(filling.count());
            if here.iter().map(|part| part.bytes).sum::<u64>() != text_bytes {
                return Err(SnapshotError::Part(first.part));
            }
            if here.iter().any(|part| wanted(part.part)) {
                let text = unzip(&compressed, text_bytes)?;
                let mut text = text.as_slice();
                for part in here {
                    let (own, after) = text.split_at_checked(part.bytes as usize).ok_or(SnapshotError::Part(part.part))?;
                    text = after;
                    if wanted(part.part) {
                        let own = std::str::from_utf8(own).ok().filter(|own| part_digest(own) == part.digest());
                        found.routes.insert(part.part, own.ok_or(SnapshotError::Part(part.part))?.to_owned());
                    }
                }
            }
            (frames, left) = (rest, behind);
        }
        let more = found.routes.len() < self.parts.len();
        Ok((found, more))
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

/// The frame that comes first, how long its content says that it is (the longest that there is if it does not say), and what is behind it.
fn split_frame(value: &Bytes) -> Result<(Bytes, u64, Bytes), SnapshotError> {
    let broken = |what: &str| SnapshotError::Unpack(std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned()));
    let length = zstd::zstd_safe::find_frame_compressed_size(value).map_err(|code| broken(zstd::zstd_safe::get_error_name(code)))?;
    if length > value.len() {
        return Err(broken("it is cut"));
    }
    let content = zstd::zstd_safe::get_frame_content_size(value).map_err(|error| broken(&error.to_string()))?;
    Ok((value.slice(..length), content.unwrap_or(u64::MAX), value.slice(length..)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(services: usize, routes: usize) -> mesh_routing::Table {
        let route = |n: usize| format!("  - {{ name: r{n}, service: s{}, from: [in], handler: /{n}, to: [out-{n}] }}\n", n % services);
        let routes: String = (0..routes).map(route).collect();
        let text = format!("apiVersion: mesh/v1\nkind: RoutingTable\nmetadata: {{ mesh: shop }}\nspec:\n  routes:\n{routes}");
        mesh_routing::parse("t", &text).unwrap()
    }

    fn sample() -> Snapshot {
        Snapshot::new("shop", 7, 1_700_000_000_000, "pricing-0", table(3, 5).parts()).unwrap()
    }

    fn through(snapshot: &Snapshot) -> Result<Snapshot, SnapshotError> {
        Snapshot::unpack(&snapshot.pack().unwrap())
    }

    #[test]
    fn survives_the_way_through_a_record() {
        let snapshot = sample();
        let read = through(&snapshot).unwrap();
        assert_eq!(read, snapshot);
        read.check("shop", 7).unwrap();
        assert!(read.check("shop", 8).unwrap_err().to_string().contains("generation"));
        assert!(read.check("other", 7).unwrap_err().to_string().contains("mesh"));
        assert_eq!((read.table().unwrap(), read.table_digest().unwrap()), (table(3, 5).to_json(), table(3, 5).digest()));
        let empty = mesh_routing::Table { routes: Vec::new(), ..table(1, 1) };
        let stored = through(&Snapshot::new("shop", 1, 0, "w", empty.parts()).unwrap()).unwrap();
        assert_eq!(stored.table().unwrap(), empty.to_json());
    }

    /// Parts lie in several frames, and each can be had without the others.
    #[test]
    fn a_part_is_unpacked_without_the_others() {
        let all = table(300, 8_000).parts();
        let snapshot = through(&Snapshot::new("shop", 7, 0, "w", all.clone()).unwrap()).unwrap();
        assert_eq!(snapshot.parts(|_| true).unwrap(), (all.clone(), false));
        for (number, text) in &all.routes {
            let (part, more) = snapshot.parts(|wanted| wanted == *number).unwrap();
            assert_eq!((part.routes, more), ([(*number, text.clone())].into(), true));
        }
        let (none, more) = snapshot.parts(|_| false).unwrap();
        assert!(none.routes.is_empty() && none.declared == all.declared && more);
        let frames = std::iter::successors(Some(snapshot.frames.clone()), |left| split_frame(left).ok().map(|(.., rest)| rest));
        assert!(frames.count() > 3);

        // What is wrong with one is no matter to who wants another.
        let mut parts = snapshot.parts.clone();
        let wrong = parts[3].part;
        parts[3].sha256 = BASE64_STANDARD_NO_PAD.encode([7; 32]);
        let digest = digest_of(&snapshot.declared, parts.iter().map(|part| (part.part, part.digest())));
        let forged = through(&Snapshot { parts, digest, ..snapshot.clone() }).unwrap();
        assert!(forged.parts(|part| part != wrong).is_ok());
        assert!(matches!(forged.parts(|part| part == wrong), Err(SnapshotError::Part(part)) if part == wrong));
        assert!(matches!(forged.table(), Err(SnapshotError::Part(_))));
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        assert!(matches!(Snapshot::unpack(&Bytes::from_static(b"no zstd")), Err(SnapshotError::Unpack(_))));
        let other = Snapshot { schema: 3, ..sample() };
        assert!(matches!(through(&other), Err(SnapshotError::Schema(3))));
        let unknown = Snapshot { channel: "canary moon=full".into(), ..sample() };
        assert!(matches!(through(&unknown), Err(SnapshotError::Channel(_))));
        let canary = Snapshot { channel: "canary percent=1".into(), ..sample() };
        let canary = through(&canary).unwrap();
        assert!(canary.check_channel(Some(&"canary percent=1".parse().unwrap())).is_ok());
        assert!(canary.check_channel(Some(&Channel::Stable)).unwrap_err().to_string().contains("channel"));
        let forged = Snapshot { declared: "{}".into(), ..sample() };
        assert!(matches!(through(&forged), Err(SnapshotError::Mismatch { field: "digest", .. })));
        let no_table = Snapshot::new("shop", 7, 0, "w", Parts { declared: "{}".into(), ..Parts::default() }).unwrap();
        assert!(matches!(through(&no_table).unwrap().table(), Err(SnapshotError::NoTable)));
    }

    /// Whatever is cut or turned over, nothing is read that was not written.
    #[test]
    fn what_is_damaged_is_refused_or_whole() {
        let (snapshot, packed) = (sample(), sample().pack().unwrap());
        let read = |bytes: Vec<u8>| Snapshot::unpack(&bytes.into()).and_then(|read| Ok((read.table()?, read.generation)));
        let whole = (snapshot.table().unwrap(), snapshot.generation);
        for length in 0..packed.len() {
            assert!(read(packed[..length].to_vec()).is_err(), "{length}");
        }
        let envelope = zstd::zstd_safe::find_frame_compressed_size(&packed).unwrap();
        for place in envelope..packed.len() {
            let mut damaged = packed.to_vec();
            damaged[place] ^= 0x55;
            assert!(read(damaged).ok().is_none_or(|read| read == whole), "{place}");
        }
        for (parts, what) in [
            (snapshot.parts.iter().rev().cloned().collect::<Vec<_>>(), "another order"),
            (snapshot.parts.iter().map(|part| Part { bytes: part.bytes + 1, ..part.clone() }).collect(), "longer"),
            (snapshot.parts.iter().map(|part| Part { bytes: part.bytes - 1, ..part.clone() }).collect(), "shorter"),
            (snapshot.parts.iter().map(|part| Part { bytes: u64::MAX, ..part.clone() }).collect(), "too long"),
            (snapshot.parts[1..].to_vec(), "one less"),
        ] {
            let digest = digest_of(&snapshot.declared, parts.iter().map(|part| (part.part, part.digest())));
            let forged = Snapshot { parts, digest, ..snapshot.clone() };
            assert!(through(&forged).and_then(|read| read.table()).is_err(), "{what}");
        }
    }

    /// As versions before signatures, history and parts wrote it.
    #[test]
    fn reads_what_older_versions_wrote() {
        let Snapshot { mesh, channel, generation, applied_ms, writer, .. } = sample();
        let json = table(3, 5).to_json();
        let old = serde_json::json!({
            "schema": 1, "mesh": mesh, "channel": channel, "generation": generation, "digest": text_digest(&json),
            "applied_ms": applied_ms, "writer": writer, "signature": null, "table": json,
        });
        let read = Snapshot::unpack(&zstd::bulk::compress(old.to_string().as_bytes(), 1).unwrap().into()).unwrap();
        assert_eq!((read.generation, &*read.writer), (generation, &*writer));
        assert_eq!((read.table().unwrap(), read.table_digest().unwrap()), (json, sample().digest));
        let all = table(3, 5).parts();
        assert_eq!(read.parts(|_| true).unwrap(), (all.clone(), false));
        let first = *all.routes.keys().next().unwrap();
        let (part, more) = read.parts(|part| part == first).unwrap();
        assert!(more && part.routes.len() == 1 && part.routes[&first] == all.routes[&first]);
        assert_eq!(through(&read).unwrap(), read, "a copy on disk keeps it as it is");
        let forged = old.to_string().replace("/4", "/5");
        assert!(matches!(Snapshot::from_json(forged.as_bytes()), Err(SnapshotError::Mismatch { field: "digest", .. })));
        let newer = Snapshot { about: About { by: "a".into(), ..About::default() }, ..sample() };
        assert_eq!(through(&newer).unwrap(), newer);
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
        through(&snapshot).unwrap().verify(&trusted).unwrap();
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
        assert!(matches!(Snapshot::unpack(&bomb.into()), Err(SnapshotError::TooLarge)));
    }
}
