//! Reads the sources and holds them to the rules of the house: floors, purity, documentation, nothing unfinished.
//!
//! Invariant: only the standard library, and no build of anything it reads: it also runs where the rest does not compile.
//! Invariant: each rule has a test that it can fail.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The floors of `sidecar/src`, from the bottom. A module imports from floors below its own, or from its own floor; on floor 4 not even that.
const FLOORS: [&[&str]; 7] = [
    &[
        "record",
        "json",
        "outcome",
        "judge",
        "tiers",
        "completed",
        "watermark",
        "lanes",
        "mutation",
        "parking",
        "pause",
        "status",
        "table",
        "command",
    ],
    &["config", "telemetry"],
    &["broker"],
    &["deliver"],
    &["consume", "publish", "control"],
    &["api"],
    &["app", "main", "lib"],
];

/// The floor whose modules do not know each other.
const APART: usize = 4;

/// What `routing/src` must not name: it has no I/O, no async and no clock.
const IMPURE: [&[&str]; 4] = [&["tokio"], &["std", "fs"], &["std", "net"], &["std", "time", "SystemTime"]];

/// What is not finished. Split, so that this file does not contain it.
const UNFINISHED: [&str; 3] = [concat!("to", "do!("), concat!("unimpl", "emented!("), concat!("#[ig", "nore")];

#[test]
fn modules_import_only_from_floors_below() {
    let src = root().join("sidecar/src");
    let mut faults = Vec::new();
    for file in files(&src).unwrap() {
        let relative = file.strip_prefix(&src).unwrap().to_path_buf();
        if relative.extension().is_some_and(|extension| extension == "rs") {
            faults.extend(climbs(&relative, &fs::read_to_string(&file).unwrap()));
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn routing_is_pure() {
    let mut faults = Vec::new();
    for file in files(&root().join("routing/src")).unwrap() {
        faults.extend(impure(&file, &fs::read_to_string(&file).unwrap()));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn nothing_is_unfinished() {
    let mut faults = Vec::new();
    for file in files(&root()).unwrap() {
        faults.extend(unfinished(&file, &fs::read(&file).unwrap()));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// `cargo run -- demo`, the README's first command, names no binary: of several, cargo must know which one.
#[test]
fn cargo_run_knows_which_binary() {
    let manifest = fs::read_to_string(root().join("sidecar/Cargo.toml")).unwrap();
    assert_eq!(default_run(&manifest), Some("mesh-sidecar"));
}

#[test]
fn public_modules_say_what_they_are_for() {
    let mut faults = Vec::new();
    for file in files(&root()).unwrap().into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "rs")) {
        for name in public_modules(&fs::read_to_string(&file).unwrap()) {
            let stem = file.file_stem().unwrap().to_string_lossy().into_owned();
            let folder = file.parent().unwrap();
            let folder = if matches!(stem.as_str(), "mod" | "lib" | "main") { folder.to_path_buf() } else { folder.join(stem) };
            let candidates = [folder.join(format!("{name}.rs")), folder.join(&name).join("mod.rs")];
            let Some(module) = candidates.iter().find(|path| path.exists()) else {
                faults.push(format!("{}: there is no file of `pub mod {name}`", file.display()));
                continue;
            };
            if !fs::read_to_string(module).unwrap().starts_with("//!") {
                faults.push(format!("{}: is public and does not begin with //! and what it is for", module.display()));
            }
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// The table of pitfalls in RELIABILITY.md names tests that exist.
#[test]
fn tests_that_the_documents_name_exist() {
    let text = fs::read_to_string(root().join("RELIABILITY.md")).unwrap();
    let sources: String = files(&root())
        .unwrap()
        .into_iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "rs"))
        .map(|file| fs::read_to_string(file).unwrap())
        .collect();
    let table = text.split("named after it").nth(1).unwrap().split("\n## ").next().unwrap();
    let names: Vec<&str> = table.split('`').skip(1).step_by(2).filter(|name| name.contains('_')).collect();
    assert!(names.len() > 20, "the table was not found: {names:?}");
    let missing: Vec<&&str> =
        names.iter().filter(|name| !sources.contains(&format!("fn {name}(")) && !sources.contains(&format!("on_both!({name},"))).collect();
    assert!(missing.is_empty(), "named in RELIABILITY.md, and no test: {missing:#?}");
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All files below a folder, in order, but for what is built, hidden folders of tools, and links.
fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let kind = entry.file_type()?;
        if kind.is_dir() && !matches!(name.as_str(), "target" | "node_modules" | ".git") {
            found.extend(files(&entry.path())?);
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The imports of a file of `sidecar/src` that go where they must not.
fn climbs(file: &Path, source: &str) -> Vec<String> {
    let module = modules_of(file);
    let name = module.first().cloned().unwrap_or_else(|| file.file_stem().unwrap_or_default().to_string_lossy().into_owned());
    let Some(floor) = floor(&name) else {
        return vec![format!(
            "{}: the module {name} is on no floor; give it one in tests/tests/tidy.rs and in sidecar/src/lib.rs",
            file.display()
        )];
    };
    let mut faults = Vec::new();
    for Import { line, path } in imports(source, &module) {
        let fault = match path.first() {
            None => "imports everything of the crate".to_owned(),
            Some(target) if *target == name => continue,
            Some(target) => match self::floor(target) {
                None => format!("imports {target}, which is on no floor"),
                Some(other) if other > floor => format!("on floor {floor} imports {target} of floor {other}, above it"),
                Some(other) if other == floor && floor == APART => format!("imports {target}, beside it on floor {floor}"),
                Some(_) => continue,
            },
        };
        faults.push(format!("{}:{line}: {name} {fault}", file.display()));
    }
    faults
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

/// The module that a file is: `deliver/push.rs` is `deliver`, `push`. The roots of crates are none.
fn modules_of(file: &Path) -> Vec<String> {
    let mut module: Vec<String> = file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if matches!(module.last().map(String::as_str), Some("mod")) || matches!(module.as_slice(), [one] if one == "lib" || one == "main") {
        module.pop();
    }
    module
}

fn impure(file: &Path, source: &str) -> Vec<String> {
    let tokens = tokens(source);
    let mut faults: Vec<String> = Vec::new();
    for (line, path) in paths(&tokens) {
        if let Some(what) = IMPURE.iter().find(|impure| path.iter().map(String::as_str).take(impure.len()).eq(impure.iter().copied())) {
            faults.push(format!("{}:{line}: names {}", file.display(), what.join("::")));
        }
    }
    // By whatever path it came.
    let clocks = tokens.iter().filter(|(_, token)| matches!(token, Token::Word(word) if word == "SystemTime"));
    faults.extend(clocks.map(|(line, _)| format!("{}:{line}: reads the clock", file.display())));
    faults
}

fn unfinished(file: &Path, content: &[u8]) -> Vec<String> {
    let mut faults = Vec::new();
    for (number, line) in content.split(|byte| *byte == b'\n').enumerate() {
        for word in UNFINISHED {
            if line.windows(word.len()).any(|part| part == word.as_bytes()) {
                faults.push(format!("{}:{}: contains {word}", file.display(), number + 1));
            }
        }
    }
    faults
}

/// The names after `pub mod` that have a file of their own.
fn public_modules(source: &str) -> Vec<String> {
    let tokens = tokens(source);
    let mut names = Vec::new();
    for window in tokens.windows(4) {
        if let [(_, Token::Word(first)), (_, Token::Word(second)), (_, Token::Word(name)), (_, Token::Mark(';'))] = window
            && first == "pub"
            && second == "mod"
        {
            names.push(name.clone());
        }
    }
    names
}

/// A path into the crate, from its root.
#[derive(Debug, PartialEq)]
struct Import {
    line: usize,
    path: Vec<String>,
}

/// The paths that begin with `crate`, `self` or `super`, seen from the crate's root; `module` is the file's own.
fn imports(source: &str, module: &[String]) -> Vec<Import> {
    let tokens = tokens(source);
    let mut imports = Vec::new();
    // The inline modules around a token, with the depth of their braces.
    let mut inside: Vec<(String, usize)> = Vec::new();
    let mut depth = 0;
    let mut at = 0;
    while let Some((line, token)) = tokens.get(at) {
        match token {
            Token::Mark('{') => {
                depth += 1;
                if let [(_, Token::Word(keyword)), (_, Token::Word(name))] = &tokens[at.saturating_sub(2)..at]
                    && keyword == "mod"
                {
                    inside.push((name.clone(), depth));
                }
            }
            Token::Mark('}') => {
                inside.retain(|(_, of)| *of != depth);
                depth = depth.saturating_sub(1);
            }
            Token::Word(word) if matches!(word.as_str(), "crate" | "super") && begins_path(&tokens, at) => {
                let mut found = Vec::new();
                at = read_path(&tokens, at, Vec::new(), &mut found);
                for path in found {
                    let mut from: Vec<String> = module.iter().cloned().chain(inside.iter().map(|(name, _)| name.clone())).collect();
                    let mut rest = path.as_slice();
                    while let [first, others @ ..] = rest {
                        match first.as_str() {
                            "crate" => from.clear(),
                            "super" => {
                                from.pop();
                            }
                            _ => break,
                        }
                        rest = others;
                    }
                    from.extend(rest.iter().filter(|part| *part != "*").cloned());
                    imports.push(Import { line: *line, path: from });
                }
                continue;
            }
            Token::Word(_) | Token::Mark(_) => {}
        }
        at += 1;
    }
    imports
}

/// All paths of a source, groups spread out.
fn paths(tokens: &[(usize, Token)]) -> Vec<(usize, Vec<String>)> {
    let mut all = Vec::new();
    let mut at = 0;
    while let Some((line, token)) = tokens.get(at) {
        if matches!(token, Token::Word(_)) && begins_path(tokens, at) {
            let mut found = Vec::new();
            at = read_path(tokens, at, Vec::new(), &mut found);
            all.extend(found.into_iter().map(|path| (*line, path)));
        } else {
            at += 1;
        }
    }
    all
}

/// Whether a path begins here: with `::` behind the word, and none before it but a leading one.
fn begins_path(tokens: &[(usize, Token)], at: usize) -> bool {
    let before = at.checked_sub(1).and_then(|before| tokens.get(before));
    let after = tokens.get(at + 1);
    matches!(after, Some((_, Token::Mark(':')))) && matches!(tokens.get(at + 2), Some((_, Token::Mark(':')))) && {
        let inner = matches!(before, Some((_, Token::Mark(':'))))
            && at
                .checked_sub(3)
                .and_then(|word| tokens.get(word))
                .is_some_and(|(_, token)| matches!(token, Token::Word(_) | Token::Mark('>')));
        !inner
    }
}

/// Reads a path, or a tree of paths, that begins at a word; returns where it ends.
fn read_path(tokens: &[(usize, Token)], mut at: usize, mut prefix: Vec<String>, found: &mut Vec<Vec<String>>) -> usize {
    let mark = |at: usize, mark: char| matches!(tokens.get(at), Some((_, Token::Mark(c))) if *c == mark);
    loop {
        match tokens.get(at) {
            Some((_, Token::Word(word))) => {
                prefix.push(word.clone());
                at += 1;
            }
            Some((_, Token::Mark('*'))) => {
                prefix.push("*".into());
                found.push(prefix);
                return at + 1;
            }
            Some((_, Token::Mark('{'))) => {
                at += 1;
                while at < tokens.len() && !mark(at, '}') {
                    if matches!(tokens.get(at), Some((_, Token::Word(_) | Token::Mark('*' | '{')))) {
                        at = read_path(tokens, at, prefix.clone(), found);
                    }
                    // What is left of `a as b`, and the comma.
                    while at < tokens.len() && !mark(at, ',') && !mark(at, '}') {
                        at += 1;
                    }
                    at += usize::from(mark(at, ','));
                }
                return at + 1;
            }
            _ => {
                found.push(prefix);
                return at;
            }
        }
        if mark(at, ':') && mark(at + 1, ':') {
            at += 2;
        } else {
            found.push(prefix);
            return at;
        }
    }
}

#[derive(Debug, PartialEq)]
enum Token {
    /// A word or a number.
    Word(String),
    /// Any other character. The content of strings and comments is left out.
    Mark(char),
}

/// The tokens of a source, each with its line.
fn tokens(source: &str) -> Vec<(usize, Token)> {
    let chars: Vec<char> = source.chars().collect();
    let peek = |at: usize| chars.get(at).copied().unwrap_or('\0');
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < chars.len() {
        let begin = at;
        let token_line = line;
        match (peek(at), peek(at + 1)) {
            ('/', '/') => at = find(&chars, at, |at| peek(at) == '\n'),
            ('/', '*') => at = end_of_comment(&chars, at),
            ('"', _) => at = end_of_string(&chars, at),
            // A character, or a lifetime.
            ('\'', '\\') => at = find(&chars, at + 3, |at| peek(at) == '\'') + 1,
            ('\'', _) if peek(at + 2) == '\'' => at += 3,
            (c, _) if word(c) => {
                at = find(&chars, at, |at| !word(peek(at)));
                let text: String = chars[begin..at].iter().collect();
                let hashes = find(&chars, at, |at| peek(at) != '#') - at;
                if matches!(text.as_str(), "r" | "br" | "cr") && peek(at + hashes) == '"' {
                    let end = |at: usize| peek(at) == '"' && (1..=hashes).all(|n| peek(at + n) == '#');
                    at = find(&chars, at + hashes + 1, end) + 1 + hashes;
                } else if text == "r" && hashes == 1 {
                    // A raw word: the word follows.
                    at += 1;
                } else {
                    tokens.push((token_line, Token::Word(text)));
                }
            }
            (c, _) => {
                at += 1;
                if !c.is_whitespace() {
                    tokens.push((token_line, Token::Mark(c)));
                }
            }
        }
        at = at.min(chars.len());
        line += chars[begin..at].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

/// The first place that fits, or the end.
fn find(chars: &[char], mut at: usize, fits: impl Fn(usize) -> bool) -> usize {
    while at < chars.len() && !fits(at) {
        at += 1;
    }
    at
}

fn end_of_comment(chars: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at < chars.len() {
        match chars[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn end_of_string(chars: &[char], mut at: usize) -> usize {
    at += 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// The binary that a manifest chooses.
fn default_run(manifest: &str) -> Option<&str> {
    manifest.lines().find_map(|line| line.strip_prefix("default-run = \"")?.strip_suffix('"'))
}

mod can_fail {
    use super::*;

    #[test]
    fn sees_that_no_binary_is_chosen() {
        assert_eq!(default_run("[package]\nname = \"a\"\n[[bin]]\nname = \"b\"\n"), None);
        assert_eq!(default_run("[package]\ndefault-run = \"b\"\n"), Some("b"));
    }

    fn climbs_of(file: &str, source: &str) -> Vec<String> {
        climbs(Path::new(file), source)
    }

    #[test]
    fn sees_what_goes_up_or_sideways() {
        for (file, source, expected) in [
            ("record.rs", "use crate::broker::Broker;", "record.rs:1: record on floor 0 imports broker of floor 2, above it"),
            (
                "broker/kafka.rs",
                "\n\nuse crate::{record::Record, deliver::{desk::Desk}};",
                "broker/kafka.rs:3: broker on floor 2 imports deliver of floor 3",
            ),
            ("consume/mod.rs", "use crate::{config, publish};", "consume/mod.rs:1: consume imports publish, beside it on floor 4"),
            (
                "control/mod.rs",
                "fn f() { crate::consume::g::<crate::record::Record>() }",
                "control/mod.rs:1: control imports consume, beside it",
            ),
            ("deliver/push.rs", "use super::super::api;", "deliver/push.rs:1: deliver on floor 3 imports api of floor 5"),
            ("deliver/push.rs", "mod tests { use super::super::super::app::App; }", "deliver/push.rs:1: deliver on floor 3 imports app"),
            ("deliver.rs", "use super::api;", "deliver.rs:1: deliver on floor 3 imports api"),
            ("config/mod.rs", "use crate::*;", "config/mod.rs:1: config imports everything"),
            ("config/mod.rs", "use crate::helpers::x;", "config/mod.rs:1: config imports helpers, which is on no floor"),
            ("config/mod.rs", "#[cfg(test)] mod tests { use crate::{self as me, app as b}; }", "config/mod.rs:1: config"),
            ("helpers.rs", "", "helpers.rs: the module helpers is on no floor"),
            ("helpers/mod.rs", "", "helpers/mod.rs: the module helpers is on no floor"),
        ] {
            let faults = climbs_of(file, source);
            assert!(faults.iter().any(|fault| fault.starts_with(expected)), "{file} {source}: {faults:?}");
        }
    }

    #[test]
    fn lets_pass_what_is_right() {
        for (file, source) in [
            ("consume/mod.rs", "use crate::{broker::*, consume::inner, deliver, record::{self, Record}};"),
            ("consume/inner.rs", "use super::Thing; mod tests { use super::*; use super::super::Other; }"),
            (
                "record.rs",
                "pub(crate) fn f() {} // use crate::broker::Broker\n/* crate::app /* nested */ crate::app */ const A: &str = \"crate::app::x\";",
            ),
            (
                "record.rs",
                "const A: &str = r#\"crate::app \" crate::app\"#; const B: char = '\"'; const C: char = '\\''; fn f<'a>(_: &'a str) {}",
            ),
            ("main.rs", "use mesh_sidecar::app::App;"),
            ("lib.rs", "pub mod app;"),
            ("app/mod.rs", "use crate::{api, consume, control};"),
            ("telemetry/logs.rs", "use crate::config::LogFormat;"),
        ] {
            assert_eq!(climbs_of(file, source), Vec::<String>::new(), "{file} {source}");
        }
    }

    #[test]
    fn sees_what_is_impure() {
        for source in [
            "use tokio::sync::watch;",
            "use std::{fmt, fs};",
            "use std::{fs::File, io};",
            "fn f() { ::std::net::TcpStream::connect(a) }",
            "use std::{time::{Duration, SystemTime}};",
            "use std::time; fn f() { time::SystemTime::now(); }",
        ] {
            assert!(!impure(Path::new("a.rs"), source).is_empty(), "{source}");
        }
        let pure = "use std::{fmt, time::Duration}; // tokio::spawn\nconst A: &str = \"std::fs\"; fn netting() { my::tokio::x() }";
        assert_eq!(impure(Path::new("a.rs"), pure), Vec::<String>::new());
    }

    #[test]
    fn sees_what_is_unfinished() {
        for word in UNFINISHED {
            let line = format!("fine\nfn f() {{ {word}");
            assert_eq!(unfinished(Path::new("a.rs"), line.as_bytes()), [format!("a.rs:2: contains {word}")]);
        }
        assert!(unfinished(Path::new("a.rs"), b"to do, unimplemented, ignored").is_empty());
    }

    #[test]
    fn sees_public_modules() {
        assert_eq!(public_modules("pub mod a;\nmod b; pub mod c { } pub(crate) mod d; // pub mod e;\npub mod f;"), ["a", "f"]);
    }
}
