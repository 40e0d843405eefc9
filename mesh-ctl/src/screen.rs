//! The terminal as a whole: drawn full, keys read one by one, and given back as it was.
//!
//! Invariant: whatever ends the process in an orderly way (the end of a command, a signal that is awaited, a panic), the terminal is as it was before.
//! Invariant: a line that is drawn is never wider than the terminal: the caller cuts it.

use std::{
    io::{self, IsTerminal as _, Write as _},
    sync::{
        Arc, Mutex, Once, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use rustix::termios::{OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// A character.
    Char(char),
    /// An arrow.
    Up,
    /// An arrow.
    Down,
    /// A page up.
    PageUp,
    /// A page down.
    PageDown,
    /// To the first line.
    Home,
    /// To the last line.
    End,
}

/// How the terminal was, while it is ours.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);
/// A panic gives it back, too.
static PANIC: Once = Once::new();

/// Keys that wait to be looked at.
const KEYS: usize = 32;

/// The terminal, while it is ours.
#[derive(Debug)]
pub(crate) struct Screen {
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Screen {
    /// Whether somebody looks at stdout, and types into stdin.
    pub(crate) fn is_there() -> bool {
        io::stdout().is_terminal() && io::stdin().is_terminal() && std::env::var_os("TERM").is_none_or(|value| value != "dumb")
    }

    /// Takes the terminal. The keys come by the channel.
    ///
    /// # Errors
    /// If it is no terminal, or cannot be set.
    pub(crate) fn take() -> io::Result<(Self, mpsc::Receiver<Key>)> {
        PANIC.call_once(|| {
            let others = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                give_back();
                others(info);
            }));
        });
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // A read ends after a tenth of a second without a key: so the reader hears that it is over.
        raw.special_codes[SpecialCodeIndex::VMIN] = 0;
        raw.special_codes[SpecialCodeIndex::VTIME] = 1;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let (keys, pressed) = mpsc::channel(KEYS);
        let stop = Arc::new(AtomicBool::new(false));
        let mut screen = Self { stop: stop.clone(), reader: None };
        // From here on its drop gives the terminal back.
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        // Another buffer, no cursor, no line that wraps.
        write("\x1b[?1049h\x1b[?25l\x1b[?7l")?;
        screen.reader = Some(std::thread::Builder::new().name("keys".to_owned()).spawn(move || read(&stop, &keys))?);
        Ok((screen, pressed))
    }

    /// How many columns and lines there are.
    pub(crate) fn size() -> (usize, usize) {
        match tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
            _ => (80, 24),
        }
    }

    /// Draws lines from the top, in place of what was there.
    ///
    /// # Errors
    /// If the terminal is gone.
    pub(crate) fn draw(&self, lines: &[String]) -> io::Result<()> {
        let mut out = String::new();
        for (row, line) in lines.iter().enumerate() {
            out += &format!("\x1b[{};1H\x1b[2K{line}", row + 1);
        }
        // What is below.
        out += &format!("\x1b[{};1H", lines.len() + 1);
        if lines.len() < Self::size().1 {
            out += "\x1b[J";
        }
        write(&out)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            // It panics only where reading does, and there is nothing left to do about that.
            drop(reader.join());
        }
        give_back();
    }
}

/// Sets the terminal as it was. Does nothing when it is not ours.
fn give_back() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // A terminal that is gone needs nothing.
        let _ = write("\x1b[?7h\x1b[?25h\x1b[?1049l");
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Reads keys until it is over. What nobody has looked at for long is dropped.
fn read(stop: &AtomicBool, keys: &mpsc::Sender<Key>) {
    let mut buffer = [0_u8; 64];
    let mut left: Vec<u8> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        match rustix::io::read(io::stdin(), &mut buffer) {
            // Nothing was typed, so what looked like the beginning of a sequence was a key of its own.
            Ok(0) => left.clear(),
            Ok(read) => {
                left.extend_from_slice(&buffer[..read]);
                let (found, used) = parse(&left);
                left.drain(..used);
                for key in found {
                    let _ = keys.try_send(key);
                }
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            // The terminal is gone: the channel's end tells.
            Err(_) => return,
        }
    }
}

/// The keys in what was typed, and how many bytes were understood or are no key.
fn parse(typed: &[u8]) -> (Vec<Key>, usize) {
    const SEQUENCES: [(&[u8], Key); 12] = [
        (b"\x1b[A", Key::Up),
        (b"\x1b[B", Key::Down),
        (b"\x1bOA", Key::Up),
        (b"\x1bOB", Key::Down),
        (b"\x1b[5~", Key::PageUp),
        (b"\x1b[6~", Key::PageDown),
        (b"\x1b[H", Key::Home),
        (b"\x1b[F", Key::End),
        (b"\x1bOH", Key::Home),
        (b"\x1bOF", Key::End),
        (b"\x1b[1~", Key::Home),
        (b"\x1b[4~", Key::End),
    ];
    let (mut keys, mut at) = (Vec::new(), 0);
    while let Some(rest) = typed.get(at..).filter(|rest| !rest.is_empty()) {
        if let Some((sequence, key)) = SEQUENCES.iter().find(|(sequence, _)| rest.starts_with(sequence)) {
            keys.push(*key);
            at += sequence.len();
        } else if SEQUENCES.iter().any(|(sequence, _)| sequence.starts_with(rest)) {
            // The rest of it comes.
            break;
        } else if rest[0] == 0x1b {
            // A key that means nothing here: all of its sequence is passed over.
            let end = rest.iter().skip(1).position(|byte| byte.is_ascii_alphabetic() || *byte == b'~');
            at += end.map_or(rest.len(), |end| end + 2);
        } else {
            if rest[0].is_ascii() {
                keys.push(Key::Char(char::from(rest[0])));
            }
            at += 1;
        }
    }
    (keys, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_told_apart() {
        assert_eq!(parse(b"jq\x1b[A\x1bOB"), (vec![Key::Char('j'), Key::Char('q'), Key::Up, Key::Down], 8));
        assert_eq!(parse(b"s\x1b["), (vec![Key::Char('s')], 1), "the rest of an arrow is waited for");
        assert_eq!(parse(b"\x1b[15~x\x1b[6~"), (vec![Key::Char('x'), Key::PageDown], 10));
        assert_eq!(parse("ä\x03".as_bytes()), (vec![Key::Char('\x03')], 3));
        assert_eq!(parse(b""), (Vec::new(), 0));
    }
}
