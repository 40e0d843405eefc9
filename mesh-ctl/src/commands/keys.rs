//! `mesh-ctl keys`: makes and shows the keys that sign routing tables.
//!
//! Invariant: a private key is written to a file that only its owner may read, never over another file, and never printed.

use std::{fs::OpenOptions, io::Write as _, path::Path};

use mesh_routing::sign::{PublicKey, SigningKey};

use super::Context;
use crate::{
    flags::{Form, Keys, KeysGenerate, KeysShow},
    output::{Code, Failure},
    view,
};

pub(super) fn run(context: &Context, flags: &Keys) -> Result<Code, Failure> {
    match flags {
        Keys::Generate(KeysGenerate { out }) => {
            let mut random = [0; 32];
            let drawn = getrandom::fill(&mut random);
            drawn.map_err(|error| Failure::new(format!("the system gives no random numbers: {error}"), ""))?;
            let key = SigningKey::from_random(&random);
            write(out, &key.to_file())?;
            print(context, &key.public(), out)?;
            context.note("keep the file secret; the public key belongs into `control.trusted_keys` of every sidecar's config");
        }
        Keys::Show(KeysShow { file }) => print(context, &read(context, file)?.public(), file)?,
    }
    Ok(Code::Done)
}

/// Writes a file that only its owner may read, and that did not exist.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(path).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::AlreadyExists => "choose another file with --out: a key that is in use must not get lost",
            _ => "choose another file with --out",
        };
        Failure::new(format!("the private key cannot be written to {}: {error}", path.display()), hint)
    })
}

/// Reads a private key.
pub(super) fn read(context: &Context, path: &Path) -> Result<SigningKey, Failure> {
    let failed = |reason: String| {
        let hint = "`mesh-ctl keys generate` makes one; it is chosen with --sign-key or MESH_SIGN_KEY";
        Failure::new(format!("the private key {}: {reason}", path.display()), hint)
    };
    let text = std::fs::read_to_string(path).map_err(|error| failed(format!("cannot be read: {error}")))?;
    let key = SigningKey::from_file(&text).map_err(|error| failed(error.to_string()))?;
    #[cfg(unix)]
    if let Ok(mode) = std::fs::metadata(path).map(|metadata| std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()))
        && mode & 0o077 != 0
    {
        context.note(&format!("{} can be read by others (mode {:04o}): chmod 600", path.display(), mode & 0o7777));
    }
    Ok(key)
}

fn print(context: &Context, public: &PublicKey, file: &Path) -> Result<(), Failure> {
    let key = view::Key { key_id: public.id().to_owned(), public_key: public.to_string(), file: file.display().to_string() };
    match context.form {
        Some(form @ (Form::Json | Form::Yaml)) => context.print_document(form, &key),
        None | Some(Form::Table) if context.quiet => context.print(&format!("{}\n", key.public_key)),
        None | Some(Form::Table) => {
            context.print(&format!("key id       {}\npublic key   {}\nprivate key  {}\n", key.key_id, key.public_key, key.file))
        }
    }
}
