//! W3C trace context: what names a span across processes.
//!
//! Invariant: no input, however broken, is an error or a panic: a malformed `traceparent` means that a new trace begins.
//! Invariant: what is written is version 00, whatever version was read.

use bytes::Bytes;

/// The length of a `traceparent` of version 00.
const LEN: usize = 55;
/// The flags that are known: `sampled`, and `random` of level 2. Others are cleared when a context is passed on.
const KNOWN_FLAGS: u8 = 0b11;
/// A `tracestate` beyond this is dropped: W3C asks for at least 512 bytes.
const STATE_MAX: usize = 4096;
/// The number of members a `tracestate` may have.
const STATE_MEMBERS: usize = 32;

/// A W3C trace context, as it travels in headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The span that is the parent of what follows.
    pub span_id: [u8; 8],
    /// The flags; bit 0 is `sampled`.
    pub flags: u8,
    /// The `tracestate`, as it came.
    pub state: Option<Bytes>,
}

impl TraceContext {
    /// Reads a `traceparent`; `None` if it is malformed (then a new trace begins, as W3C says). A malformed `tracestate` is dropped alone.
    pub fn parse(traceparent: &[u8], tracestate: Option<&Bytes>) -> Option<Self> {
        let (head, rest) = traceparent.split_at_checked(LEN)?;
        let [version] = unhex(head.get(..2)?)?;
        // Version ff is forbidden; 00 ends here; a later one may go on, after another dash.
        if version == 0xff || (version == 0 && !rest.is_empty()) || rest.first().is_some_and(|next| *next != b'-') {
            return None;
        }
        if [2, 35, 52].iter().any(|dash| head.get(*dash) != Some(&b'-')) {
            return None;
        }
        let trace_id: [u8; 16] = unhex(head.get(3..35)?)?;
        let span_id: [u8; 8] = unhex(head.get(36..52)?)?;
        let [flags] = unhex(head.get(53..55)?)?;
        if trace_id == [0; 16] || span_id == [0; 8] {
            return None;
        }
        Some(Self { trace_id, span_id, flags: flags & KNOWN_FLAGS, state: tracestate.filter(|state| state_is_valid(state)).cloned() })
    }

    /// The `traceparent` that names this context: 55 characters.
    pub fn traceparent(&self) -> Bytes {
        let mut text = [b'-'; LEN];
        hex(&[0], &mut text[..2]);
        hex(&self.trace_id, &mut text[3..35]);
        hex(&self.span_id, &mut text[36..52]);
        hex(&[self.flags & KNOWN_FLAGS], &mut text[53..]);
        Bytes::copy_from_slice(&text)
    }

    /// Whether the trace is recorded.
    pub fn sampled(&self) -> bool {
        self.flags & 1 == 1
    }

    /// The trace's id in lower-case hexadecimal: 32 characters, for logs and errors.
    pub fn trace_id_text(&self) -> String {
        let mut text = [0; 32];
        hex(&self.trace_id, &mut text);
        text.iter().map(|digit| char::from(*digit)).collect()
    }
}

/// Reads lower-case hexadecimal of exactly the array's length.
fn unhex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Writes bytes in lower-case hexadecimal; `text` is twice as long.
fn hex(bytes: &[u8], text: &mut [u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (byte, pair) in bytes.iter().zip(text.chunks_exact_mut(2)) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
}

/// Whether a `tracestate` may be passed on: a list of `key=value`, of characters that a header can carry.
fn state_is_valid(state: &[u8]) -> bool {
    let key = |c: &u8| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'*' | b'/' | b'@');
    let value = |c: &u8| matches!(c, b' '..=b'~') && !matches!(c, b',' | b'=');
    let member = |text: &[u8]| match text.iter().position(|c| *c == b'=') {
        Some(at) => {
            let (k, v) = (&text[..at], &text[at + 1..]);
            !k.is_empty() && k.len() <= 256 && k.iter().all(key) && !v.is_empty() && v.len() <= 256 && v.iter().all(value)
        }
        None => false,
    };
    let mut members = 0;
    state.len() <= STATE_MAX
        && state.split(|c| *c == b',').map(<[u8]>::trim_ascii).filter(|text| !text.is_empty()).all(|text| {
            members += 1;
            members <= STATE_MEMBERS && member(text)
        })
        && members > 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn parse(text: &str) -> Option<TraceContext> {
        TraceContext::parse(text.as_bytes(), None)
    }

    #[test]
    fn reads_and_writes_the_example_of_the_specification() {
        let context = parse(GOOD).unwrap();
        assert_eq!(context.trace_id_text(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.span_id, [0x00, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7]);
        assert!(context.sampled());
        assert_eq!(context.traceparent(), GOOD);
    }

    #[test]
    fn refuses_what_is_malformed() {
        for bad in [
            "",
            "00",
            "hello",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 ",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "0-04bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01x",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(TraceContext::parse(&[0xff; 55], None), None);
    }

    #[test]
    fn tolerates_later_versions_and_writes_version_00() {
        for good in [
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-says",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-fd",
        ] {
            assert_eq!(parse(good).unwrap().traceparent(), GOOD, "{good}");
        }
    }

    #[test]
    fn drops_a_malformed_state_alone() {
        let with = |state: &[u8]| TraceContext::parse(GOOD.as_bytes(), Some(&Bytes::copy_from_slice(state))).unwrap().state;
        for good in ["a=1", "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7", "t@v=x y , b=2", "a=1,,b=2"] {
            assert_eq!(with(good.as_bytes()).unwrap(), good, "{good}");
        }
        for bad in ["", "a", "a=", "=1", "A=1", "a=1;b=2\n", "a=b=c", "a=\u{e9}"] {
            assert_eq!(with(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(with(&[0xff, b'=', b'1']), None);
        assert_eq!(with(vec!["a=1"; 33].join(",").as_bytes()), None);
        assert_eq!(with(format!("a={}", "x".repeat(5000)).as_bytes()), None);
    }

    proptest! {
        #[test]
        fn never_panics(parent in proptest::collection::vec(any::<u8>(), 0..80), state in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = TraceContext::parse(&parent, Some(&Bytes::from(state)));
        }

        #[test]
        fn near_misses_never_panic(at in 0_usize..55, byte in any::<u8>()) {
            let mut text = GOOD.as_bytes().to_vec();
            text[at] = byte;
            if let Some(context) = TraceContext::parse(&text, None) {
                prop_assert_eq!(TraceContext::parse(&context.traceparent(), None), Some(context));
            }
        }

        #[test]
        fn what_is_written_is_read(trace_id in any::<[u8; 16]>(), span_id in any::<[u8; 8]>(), flags in 0_u8..4) {
            prop_assume!(trace_id != [0; 16] && span_id != [0; 8]);
            let context = TraceContext { trace_id, span_id, flags, state: None };
            prop_assert_eq!(TraceContext::parse(&context.traceparent(), None), Some(context));
        }
    }
}
