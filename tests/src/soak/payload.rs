//! What the records say: who made them, which they are, and a checksum.
//!
//! A record is named by its key and its number within the key ([`Name`]); each attempt to publish it carries a `uuid` of its own, so that an attempt that
//! was refused for good can be told from the one that was acknowledged. The same uuid is the trace's id.

use std::fmt;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A record's name over all attempts to publish it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// The key.
    pub key: u32,
    /// The number within the key, from 0, without gaps.
    pub seq: u32,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "k{}#{}", self.key, self.seq)
    }
}

/// What the service does with a record, each time: follows from its name, so that the checker knows it, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Answered with a record for B.
    Reply,
    /// The first so many attempts fail (500); then as `Reply`.
    Fails(u32),
    /// As `Reply`, but where records fail more often.
    Slips,
    /// Answered with 204: nothing is forwarded.
    Ignore,
    /// Answered with 400: a dead letter.
    Poison,
}

impl Name {
    /// How the service treats the record, if its line makes nothing else of it.
    pub fn treatment(self) -> Treatment {
        match (u64::from(self.key) << 32 | u64::from(self.seq)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56 {
            0..=4 => Treatment::Poison,
            5..=12 => Treatment::Ignore,
            13..=20 => Treatment::Fails(1),
            21..=28 => Treatment::Slips,
            _ => Treatment::Reply,
        }
    }

    /// How long the service takes, in milliseconds: mostly nothing, sometimes long.
    pub fn delay_ms(self) -> u64 {
        let hash = (u64::from(self.seq) << 32 | u64::from(self.key)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 48;
        match hash % 1000 {
            0..=1 => 2_500,
            2..=9 => 200 + hash % 300,
            10..=300 => hash % 20,
            _ => 0,
        }
    }

    /// The record's key as it is published.
    pub fn key_text(self) -> String {
        format!("k{}", self.key)
    }
}

/// A record's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    /// The run.
    pub run: String,
    /// Which producer.
    pub producer: u32,
    /// The key.
    pub key: String,
    /// The number within the key.
    pub seq: u32,
    /// The attempt.
    #[serde(with = "as_text")]
    pub uuid: Uuid,
    /// Over all of the above.
    pub crc: u32,
    /// Makes it as long as it should be.
    pub pad: String,
}

/// A uuid as text.
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};
    use uuid::Uuid;

    pub(super) fn serialize<S: Serializer>(uuid: &Uuid, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(uuid)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Uuid, D::Error> {
        let text = <&str>::deserialize(from)?;
        Uuid::try_parse(text).map_err(D::Error::custom)
    }
}

impl Payload {
    /// The value of an attempt.
    pub fn new(run: &str, producer: u32, name: Name, uuid: Uuid) -> Self {
        let mut payload = Self {
            run: run.to_owned(),
            producer,
            key: name.key_text(),
            seq: name.seq,
            uuid,
            crc: 0,
            pad: "x".repeat(100 + (name.seq as usize * 7) % 200),
        };
        payload.crc = payload.sum();
        payload
    }

    fn sum(&self) -> u32 {
        crc32(format!("{} {} {} {} {} {}", self.run, self.producer, self.key, self.seq, self.uuid, self.pad).as_bytes())
    }

    /// As bytes.
    pub fn bytes(&self) -> Bytes {
        serde_json::to_vec(self).unwrap_or_default().into()
    }

    /// Reads a value, and checks that it is what was made.
    ///
    /// # Errors
    /// If it is not.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let payload: Self = serde_json::from_slice(bytes)?;
        ensure!(payload.crc == payload.sum(), "the checksum of {} {} is wrong", payload.key, payload.seq);
        Ok(payload)
    }

    /// Its name.
    ///
    /// # Errors
    /// If its key is none of this run's.
    pub fn name(&self) -> Result<Name> {
        let key = self.key.strip_prefix('k').and_then(|key| key.parse().ok()).with_context(|| format!("the key {:?}", self.key))?;
        Ok(Name { key, seq: self.seq })
    }
}

/// The CRC-32 of Ethernet and zip.
pub fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn a_changed_value_is_noticed() {
        let payload = Payload::new("run", 1, Name { key: 3, seq: 4 }, Uuid::from_u128(5));
        let bytes = payload.bytes();
        assert_eq!(Payload::parse(&bytes).unwrap().name().unwrap(), Name { key: 3, seq: 4 });
        let text = String::from_utf8(bytes.to_vec()).unwrap().replace("xxx", "xyx");
        assert!(Payload::parse(text.as_bytes()).is_err());
    }

    #[test]
    fn every_treatment_occurs() {
        let of = |treatment| (0..2_000).filter(|seq| Name { key: 1, seq: *seq }.treatment() == treatment).count();
        for treatment in [Treatment::Fails(1), Treatment::Slips, Treatment::Ignore, Treatment::Poison] {
            assert!((10..200).contains(&of(treatment)), "{treatment:?}: {}", of(treatment));
        }
    }
}
