//! Tokens in files.
//!
//! Invariant: tokens are kept and compared as digests, in constant time, and never logged.

use std::{
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock},
    time::Duration,
};

use sha2::{Digest, Sha256};

/// How often token files are read again.
const RELOAD: Duration = Duration::from_secs(10);
/// The most tokens in one file: while one takes the place of another, both are valid.
const MOST: usize = 16;

/// The tokens of one file. Each line is one; empty lines are passed over.
#[derive(Debug)]
pub(super) struct Token {
    /// Where the file is named in the config.
    field: &'static str,
    file: PathBuf,
    digests: RwLock<Vec<[u8; 32]>>,
}

impl Token {
    /// Reads a file.
    ///
    /// # Errors
    /// A file that cannot be read, or that holds no token or too many; names it.
    pub(super) fn read(field: &'static str, file: &Path) -> io::Result<Self> {
        let text = std::fs::read(file).map_err(|error| unreadable(field, file, &error))?;
        Ok(Self { field, file: file.to_owned(), digests: RwLock::new(digests(field, file, &text)?) })
    }

    /// Reads the file again, so that a token can be changed without a restart. What cannot be read stays as it was.
    pub(super) async fn reload(&self) {
        let read = match tokio::fs::read(&self.file).await {
            Ok(text) => digests(self.field, &self.file, &text),
            Err(error) => Err(unreadable(self.field, &self.file, &error)),
        };
        match read {
            Ok(digests) => *self.digests.write().unwrap_or_else(PoisonError::into_inner) = digests,
            Err(error) => tracing::warn!(%error, "the token that was read before stays in force"),
        }
    }

    /// Whether it is one of them.
    pub(super) fn is(&self, given: &[u8]) -> bool {
        let given: [u8; 32] = Sha256::digest(given).into();
        // Digests differ everywhere when tokens differ anywhere, and all bytes of all are looked at.
        let same = |digest: &[u8; 32]| digest.iter().zip(given).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0;
        let digests = self.digests.read().unwrap_or_else(PoisonError::into_inner);
        digests.iter().fold(false, |found, digest| found | same(digest))
    }
}

/// Reads the files of tokens again and again.
pub(super) async fn keep_fresh<'a>(tokens: impl Iterator<Item = &'a Token> + Clone) -> Infallible {
    let mut ticks = tokio::time::interval(RELOAD);
    loop {
        ticks.tick().await;
        for token in tokens.clone() {
            token.reload().await;
        }
    }
}

/// The token in a value of `authorization`; `None` if that is no bearer token.
pub(super) fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = authorization.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

fn unreadable(field: &str, file: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{field}: cannot read `{}`: {error}", file.display()))
}

fn digests(field: &str, file: &Path, text: &[u8]) -> io::Result<Vec<[u8; 32]>> {
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let digests: Vec<[u8; 32]> = lines.map(|line| Sha256::digest(line).into()).collect();
    let wrong = |problem: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{field}: `{}` {problem}", file.display()));
    match digests.len() {
        0 => Err(wrong("is empty")),
        count if count > MOST => Err(wrong(&format!("has {count} lines, and each is a token: at most {MOST} may be valid at once"))),
        _ => Ok(digests),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_tokens_are_valid_while_one_takes_the_place_of_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "old\n").unwrap();
        let token = Token::read("control.tokens[].file", &file).unwrap();
        assert!(token.is(b"old") && !token.is(b"new") && !token.is(b"") && !token.is(b"ol"));
        std::fs::write(&file, "new\r\n\nold\n").unwrap();
        token.reload().await;
        assert!(token.is(b"old") && token.is(b"new"));
        std::fs::write(&file, "new").unwrap();
        token.reload().await;
        assert!(!token.is(b"old") && token.is(b"new"));
        std::fs::remove_file(&file).unwrap();
        token.reload().await;
        assert!(token.is(b"new"), "what was read before stays in force");
        std::fs::write(&file, "\n \n").unwrap();
        let error = Token::read("control.tokens[].file", &file).unwrap_err().to_string();
        assert!(error.contains("control.tokens[].file: `") && error.ends_with("is empty"), "{error}");
        std::fs::write(&file, "x\n".repeat(17)).unwrap();
        assert!(Token::read("f", &file).unwrap_err().to_string().contains("17 lines"));
    }

    #[test]
    fn only_a_bearer_token_is_one() {
        assert_eq!(bearer(b"Bearer  a "), Some(&b"a"[..]));
        assert_eq!(bearer(b"bearer a"), Some(&b"a"[..]));
        assert_eq!(bearer(b"Basic a"), None);
        assert_eq!(bearer(b"Bear"), None);
    }
}
