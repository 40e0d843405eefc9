//! Whether a table may be taken: its signature against the keys that the config trusts.
//!
//! Invariant: without trusted keys every table is taken; with them, none without a good signature by one of them, wherever it comes from:
//! an apply, the log, the copy on disk.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use mesh_proto::v1;
use mesh_routing::sign::{PublicKey, Signed};
use serde::{Deserialize, Serialize};

/// A signature as snapshots carry it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seal {
    /// The name of the key.
    pub(crate) key: String,
    /// The signature, as base64.
    pub(crate) ed25519: String,
}

impl From<&v1::TableSignature> for Seal {
    fn from(signature: &v1::TableSignature) -> Self {
        Self { key: signature.key_id.clone(), ed25519: BASE64_STANDARD.encode(&signature.ed25519) }
    }
}

impl From<&Seal> for v1::TableSignature {
    fn from(seal: &Seal) -> Self {
        // What is no base64 fits nothing: empty says the same.
        Self { key_id: seal.key.clone(), ed25519: BASE64_STANDARD.decode(&seal.ed25519).unwrap_or_default().into() }
    }
}

/// Why a table is not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// It has no signature.
    #[error("it is not signed, and only tables are taken that key {trusted} signed (`control.trusted_keys`): apply it with --sign-key")]
    Unsigned {
        /// The names of the trusted keys.
        trusted: String,
    },
    /// It is signed by a key that is not trusted.
    #[error("it is signed by key {key}, and only tables are taken that key {trusted} signed (`control.trusted_keys`)")]
    Unknown {
        /// The name of the key.
        key: String,
        /// The names of the trusted keys.
        trusted: String,
    },
    /// The signature belongs to something else.
    #[error("its signature, by key {key}, does not fit: it was not made for this table as generation {generation} of mesh {mesh}")]
    Wrong {
        /// The name of the key.
        key: String,
        /// The generation.
        generation: u64,
        /// The mesh.
        mesh: String,
    },
}

/// Checks a signature against the trusted keys; see the invariant.
pub(crate) fn check(trusted: &[PublicKey], signed: &Signed<'_>, seal: Option<&Seal>) -> Result<(), TrustError> {
    if trusted.is_empty() {
        return Ok(());
    }
    let names = || trusted.iter().map(PublicKey::id).collect::<Vec<_>>().join(" or ");
    let Some(seal) = seal else { return Err(TrustError::Unsigned { trusted: names() }) };
    let Some(key) = trusted.iter().find(|key| key.id() == seal.key) else {
        // Whoever wrote it chose the name: it ends up in terminals and logs.
        let key = seal.key.chars().filter(char::is_ascii_alphanumeric).take(32).collect();
        return Err(TrustError::Unknown { key, trusted: names() });
    };
    let signature = BASE64_STANDARD.decode(&seal.ed25519).unwrap_or_default();
    if key.verifies(signed, &signature) {
        return Ok(());
    }
    Err(TrustError::Wrong { key: seal.key.clone(), generation: signed.generation, mesh: signed.mesh.to_owned() })
}

#[cfg(test)]
mod tests {
    use mesh_routing::sign::{STABLE, SigningKey};

    use super::*;

    #[test]
    fn two_keys_are_good_at_once_and_nothing_else_is() {
        let [old, new, foreign] = [1, 2, 3].map(|seed| SigningKey::from_random(&[seed; 32]));
        let place = Signed { mesh: "shop", channel: STABLE, generation: 7, digest: "sha256:0" };
        let seal = |key: &SigningKey| {
            let signature = v1::TableSignature { key_id: key.public().id().to_owned(), ed25519: key.sign(&place).into() };
            Seal::from(&signature)
        };
        let both = [old.public(), new.public()];
        for key in [&old, &new] {
            assert_eq!(check(&both, &place, Some(&seal(key))), Ok(()));
        }
        let of_new = [new.public()];
        assert!(matches!(check(&of_new, &place, Some(&seal(&old))), Err(TrustError::Unknown { key, .. }) if key == old.public().id()));
        assert!(matches!(check(&both, &place, Some(&seal(&foreign))), Err(TrustError::Unknown { .. })));
        let unsigned = check(&both, &place, None).unwrap_err().to_string();
        assert!(unsigned.contains(old.public().id()) && unsigned.contains(new.public().id()), "{unsigned}");
        let later = Signed { generation: 8, ..place };
        assert!(matches!(check(&both, &later, Some(&seal(&old))), Err(TrustError::Wrong { generation: 8, .. })));
        let claimed = Seal { key: old.public().id().to_owned(), ..seal(&foreign) };
        assert!(matches!(check(&both, &place, Some(&claimed)), Err(TrustError::Wrong { .. })));
        let garbage = Seal { ed25519: "no base64".to_owned(), ..seal(&old) };
        assert!(matches!(check(&both, &place, Some(&garbage)), Err(TrustError::Wrong { .. })));
        let odd = Seal { key: "\u{1b}[2Jx".repeat(99), ..seal(&old) };
        let said = check(&both, &place, Some(&odd)).unwrap_err().to_string();
        assert!(!said.contains('\u{1b}') && said.len() < 300, "{said}");
        assert_eq!(check(&[], &place, None), Ok(()), "without keys everything is taken");
        assert_eq!(Seal::from(&v1::TableSignature::from(&seal(&old))), seal(&old));
    }
}
