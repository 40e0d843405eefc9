//! Signatures of tables: ed25519 over what says which table a mesh has at which place of its history.
//!
//! Invariant: what is signed names its purpose, and gives each part a line of its own: a signature is good for one table of one
//! mesh in one generation, and for nothing else.
//! Invariant: a private key is shown by [`SigningKey::to_file`] alone, and wiped from memory when it is dropped.

use std::{fmt, str::FromStr};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use ed25519_dalek::{Signature, Signer as _, VerifyingKey};
use sha2::{Digest as _, Sha256};

/// The channel of the tables that all sidecars run.
pub const STABLE: &str = "stable";

/// What the text of a public key begins with.
const PUBLIC: &str = "ed25519:";
/// What the text of a private key begins with.
const PRIVATE: &str = "ed25519-private:";

/// What a signature is made over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signed<'a> {
    /// The mesh.
    pub mesh: &'a str,
    /// The text of the [channel](crate::channel::Channel).
    pub channel: &'a str,
    /// The generation that carries the table.
    pub generation: u64,
    /// The table's digest, as [`Table::digest`](crate::Table::digest) gives it.
    pub digest: &'a str,
}

impl Signed<'_> {
    fn message(&self) -> String {
        let Self { mesh, channel, generation, digest } = self;
        format!("mesh/v1 routing table\nmesh {mesh}\nchannel {channel}\ngeneration {generation}\ndigest {digest}\n")
    }
}

/// What is wrong with the text of a key. It never contains the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It is no public key at all.
    #[error("is no public key: one begins with {PUBLIC}")]
    NotPublic,
    /// It is no private key at all.
    #[error("is no private key: one begins with {PRIVATE}")]
    NotPrivate,
    /// It is a private key where a public one belongs.
    #[error("is a private key, where a public one belongs")]
    Private,
    /// It is a public key where a private one belongs.
    #[error("is a public key, where a private one belongs")]
    Public,
    /// What follows the beginning is no key.
    #[error("is not 32 bytes of base64 (with - and _, without =)")]
    Bytes,
    /// No signature could be checked with it.
    #[error("is no key of ed25519 that signatures can be checked with")]
    Weak,
}

/// A key that checks signatures; as text, `ed25519:…`.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    key: VerifyingKey,
    id: String,
}

impl PublicKey {
    fn new(key: VerifyingKey) -> Self {
        let id = Sha256::digest(key.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Self { key, id }
    }

    /// The key's name: 16 characters that follow from it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether this key's owner signed this.
    pub fn verifies(&self, signed: &Signed<'_>, signature: &[u8]) -> bool {
        let signature = Signature::from_slice(signature);
        signature.is_ok_and(|signature| self.key.verify_strict(signed.message().as_bytes(), &signature).is_ok())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PUBLIC}{}", BASE64_URL_SAFE_NO_PAD.encode(self.key.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let text = text.trim();
        if text.contains(PRIVATE) {
            return Err(KeyError::Private);
        }
        let bytes = decode(text.strip_prefix(PUBLIC).ok_or(KeyError::NotPublic)?)?;
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| KeyError::Weak)?;
        if key.is_weak() { Err(KeyError::Weak) } else { Ok(Self::new(key)) }
    }
}

/// A key that signs.
pub struct SigningKey(ed25519_dalek::SigningKey);

impl SigningKey {
    /// The key of 32 random bytes.
    pub fn from_random(bytes: &[u8; 32]) -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(bytes))
    }

    /// Reads what [`SigningKey::to_file`] wrote.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_file(text: &str) -> Result<Self, KeyError> {
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let line = lines.next().filter(|_| lines.next().is_none()).ok_or(KeyError::NotPrivate)?;
        if line.starts_with(PUBLIC) {
            return Err(KeyError::Public);
        }
        Ok(Self::from_random(&decode(line.strip_prefix(PRIVATE).ok_or(KeyError::NotPrivate)?)?))
    }

    /// The text of a file that keeps it: a line that says what it is, and the key.
    pub fn to_file(&self) -> String {
        let public = self.public();
        let key = BASE64_URL_SAFE_NO_PAD.encode(self.0.as_bytes());
        format!("# signs routing tables: keep it secret. Key id {}, public key {public}\n{PRIVATE}{key}\n", public.id())
    }

    /// The key that checks what this one signs.
    pub fn public(&self) -> PublicKey {
        PublicKey::new(self.0.verifying_key())
    }

    /// Signs; 64 bytes.
    pub fn sign(&self, signed: &Signed<'_>) -> Vec<u8> {
        self.0.sign(signed.message().as_bytes()).to_bytes().to_vec()
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public().id())
    }
}

fn decode(text: &str) -> Result<[u8; 32], KeyError> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| KeyError::Bytes)?;
    bytes.try_into().map_err(|_| KeyError::Bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Signed<'_> = Signed { mesh: "shop", channel: STABLE, generation: 7, digest: "sha256:00" };

    #[test]
    fn a_signature_is_good_for_what_was_signed_alone() {
        let (key, other) = (SigningKey::from_random(&[7; 32]), SigningKey::from_random(&[8; 32]));
        let signature = key.sign(&PLACE);
        assert!(key.public().verifies(&PLACE, &signature));
        assert!(!other.public().verifies(&PLACE, &signature));
        for wrong in [
            Signed { mesh: "shop2", ..PLACE },
            Signed { channel: "canary", ..PLACE },
            Signed { generation: 8, ..PLACE },
            Signed { digest: "sha256:01", ..PLACE },
        ] {
            assert!(!key.public().verifies(&wrong, &signature), "{wrong:?}");
        }
        for place in 0..signature.len() {
            let mut forged = signature.clone();
            forged[place] ^= 1;
            assert!(!key.public().verifies(&PLACE, &forged));
        }
        assert!(!key.public().verifies(&PLACE, &signature[..63]) && !key.public().verifies(&PLACE, b""));
    }

    #[test]
    fn keys_survive_the_way_through_text() {
        let key = SigningKey::from_random(&[7; 32]);
        let again = SigningKey::from_file(&key.to_file()).unwrap();
        assert_eq!(again.sign(&PLACE), key.sign(&PLACE));
        let public: PublicKey = key.public().to_string().parse().unwrap();
        assert_eq!(public, key.public());
        assert!(public.id().len() == 16 && key.to_file().contains(public.id()) && key.to_file().contains(&public.to_string()));
        assert_ne!(SigningKey::from_random(&[8; 32]).public().id(), public.id());
    }

    #[test]
    fn what_is_no_key_is_told_apart_and_never_repeated() {
        let key = SigningKey::from_random(&[7; 32]);
        let public = key.public().to_string();
        let private = key.to_file();
        let parse = |text: &str| text.parse::<PublicKey>().unwrap_err();
        assert_eq!(parse(&private), KeyError::Private);
        assert_eq!(parse(private.lines().last().unwrap()), KeyError::Private);
        assert_eq!(parse(""), KeyError::NotPublic);
        assert_eq!(parse("ssh-ed25519 AAAA"), KeyError::NotPublic);
        assert_eq!(parse(&public[..public.len() - 1]), KeyError::Bytes);
        assert_eq!(parse(&format!("{public}=")), KeyError::Bytes);
        // The neutral element of the curve: anybody could sign for it.
        let mut neutral = [0; 32];
        neutral[0] = 1;
        assert_eq!(parse(&format!("{PUBLIC}{}", BASE64_URL_SAFE_NO_PAD.encode(neutral))), KeyError::Weak);

        let read = |text: &str| SigningKey::from_file(text).map(|key| key.public()).unwrap_err();
        assert_eq!(read(&public), KeyError::Public);
        assert_eq!(read(""), KeyError::NotPrivate);
        assert_eq!(read("# nothing but words\n"), KeyError::NotPrivate);
        assert_eq!(read(&format!("{private}{private}")), KeyError::NotPrivate, "two keys");
        assert_eq!(read("ed25519-private:x"), KeyError::Bytes);
        let said = format!("{key:?} {:?}", key.public());
        assert!(!said.contains(private.lines().last().unwrap().strip_prefix(PRIVATE).unwrap()), "{said}");
    }
}
