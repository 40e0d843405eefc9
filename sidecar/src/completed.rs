//! The completed-offset map: the offsets above a partition's watermark that are complete, as the metadata of a commit, so that a restart
//! delivers only what is not done. Floor 0.
//!
//! After Parallel Consumer's `OffsetMapCodecManager`: runs or a bitmap, whichever is shorter. The text is `mesh1:` and base64 of: the kind, the
//! watermark that it belongs to, the data; numbers are LEB128.
//!
//! Invariant: the text has at most 4,096 characters, Kafka's bound; what finds no room is left out from the end, and is delivered again.
//! Invariant: metadata of somebody else, or of another offset (copied by a tool, mirrored to another cluster), is no map.

use std::ops::Range;

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD as BASE64};

/// What a map begins with.
const MAGIC: &str = "mesh1:";
/// The most characters of a commit's metadata.
const CHARACTERS: usize = 4_096;
/// The bytes that fit into them.
const ROOM: usize = (CHARACTERS - MAGIC.len()) / 4 * 3;
const RUNS: u8 = 1;
const BITMAP: u8 = 2;

/// A map, ready for a commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The metadata; empty if nothing above the watermark is complete.
    pub text: String,
    /// Offsets from here on found no room; `i64::MAX` if all did.
    pub end: i64,
}

/// Encodes the complete offsets above `watermark`: ascending ranges that do not touch.
pub fn encode(watermark: i64, ranges: &[Range<i64>]) -> Encoded {
    if ranges.is_empty() {
        return Encoded { text: String::new(), end: i64::MAX };
    }
    let (runs, runs_end) = encode_runs(watermark, ranges);
    let (bitmap, bitmap_end) = encode_bitmap(watermark, ranges);
    // The one that holds more; of two that hold the same, the shorter.
    let (bytes, end) = if (bitmap_end, runs.len()) > (runs_end, bitmap.len()) { (bitmap, bitmap_end) } else { (runs, runs_end) };
    Encoded { text: format!("{MAGIC}{}", BASE64.encode(bytes)), end }
}

fn encode_runs(watermark: i64, ranges: &[Range<i64>]) -> (Vec<u8>, i64) {
    let mut bytes = vec![RUNS];
    put(&mut bytes, watermark.unsigned_abs());
    let mut at = watermark;
    for range in ranges {
        let before = bytes.len();
        put(&mut bytes, range.start.abs_diff(at));
        put(&mut bytes, range.end.abs_diff(range.start));
        if bytes.len() > ROOM {
            bytes.truncate(before);
            return (bytes, range.start);
        }
        at = range.end;
    }
    (bytes, i64::MAX)
}

fn encode_bitmap(watermark: i64, ranges: &[Range<i64>]) -> (Vec<u8>, i64) {
    let mut bytes = vec![BITMAP];
    put(&mut bytes, watermark.unsigned_abs());
    let begin = bytes.len();
    let bits = ((ROOM - begin) * 8) as u64;
    for range in ranges {
        for offset in range.clone() {
            let bit = offset.abs_diff(watermark);
            if bit >= bits {
                return (bytes, offset);
            }
            let byte = begin + (bit / 8) as usize;
            if byte >= bytes.len() {
                bytes.resize(byte + 1, 0);
            }
            bytes[byte] |= 1 << (bit % 8);
        }
    }
    (bytes, i64::MAX)
}

/// The complete offsets above `watermark`, as ascending ranges that do not touch. `None` if the metadata is not a map of this watermark.
pub fn decode(watermark: i64, metadata: &str) -> Option<Vec<Range<i64>>> {
    let text = metadata.strip_prefix(MAGIC).filter(|_| metadata.len() <= CHARACTERS)?;
    let bytes = BASE64.decode(text).ok()?;
    let (&kind, mut data) = bytes.split_first()?;
    if i64::try_from(take(&mut data)?).ok()? != watermark {
        return None;
    }
    let mut ranges: Vec<Range<i64>> = Vec::new();
    match kind {
        RUNS => {
            let mut at = watermark;
            while !data.is_empty() {
                let start = at.checked_add_unsigned(take(&mut data)?)?;
                let end = start.checked_add_unsigned(take(&mut data)?).filter(|end| *end > start)?;
                // Ranges that touch are not ours, nor is a watermark that is complete.
                if start <= at {
                    return None;
                }
                ranges.push(start..end);
                at = end;
            }
        }
        BITMAP => {
            for (index, byte) in data.iter().enumerate() {
                for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                    let offset = watermark.checked_add(index as i64 * 8 + bit)?;
                    match ranges.last_mut().filter(|range| range.end == offset) {
                        Some(range) => range.end += 1,
                        None => ranges.push(offset..offset + 1),
                    }
                }
            }
            if ranges.first().is_some_and(|range| range.start == watermark) {
                return None;
            }
        }
        _ => return None,
    }
    Some(ranges)
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take(data: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = data.split_first()?;
        *data = rest;
        let part = u64::from(byte & 0x7F);
        number |= part.checked_shl(shift).filter(|shifted| shifted >> shift == part)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn ranges(offsets: &BTreeSet<i64>) -> Vec<Range<i64>> {
        let mut ranges: Vec<Range<i64>> = Vec::new();
        for &offset in offsets {
            match ranges.last_mut().filter(|range| range.end == offset) {
                Some(range) => range.end += 1,
                None => ranges.push(offset..offset + 1),
            }
        }
        ranges
    }

    #[test]
    fn foreign_metadata_is_ignored_and_never_panics() {
        let ranges = [9..12, 14..15].to_vec();
        let own = encode(7, &ranges).text;
        assert_eq!(decode(7, &own), Some(ranges.clone()));
        assert_eq!(decode(8, &own), None, "of another offset");
        for foreign in
            ["", "mesh1", "mesh1:", "mesh1:!", "mesh1:AA", "bitset:AAAA", "NoMetadata", "mesh1:AQcA", "mesh1:AQcCAA", "mesh1:AgcB"]
        {
            assert_eq!(decode(7, foreign), None, "{foreign}");
        }
        // A map that was cut says less, and nothing wrong.
        assert!((0..own.len()).all(|end| decode(7, &own[..end]).is_none_or(|found| ranges.starts_with(&found))));
    }

    #[test]
    fn what_finds_no_room_is_left_out_from_the_end() {
        // Every third offset, far more than fit as runs; and runs too far apart for a bitmap.
        for step in [3, 1_000] {
            let offsets: BTreeSet<i64> = (1..40_000).map(|n| 1_000_000 + n * step).collect();
            let encoded = encode(1_000_000, &ranges(&offsets));
            assert!(encoded.text.len() <= CHARACTERS, "{}", encoded.text.len());
            let kept = decode(1_000_000, &encoded.text).unwrap();
            let wanted = ranges(&offsets.range(..encoded.end).copied().collect());
            assert_eq!(kept, wanted);
            assert!(wanted.len() > 1_000, "{}", wanted.len());
        }
    }

    proptest! {
        #[test]
        fn a_map_comes_back_as_it_was(watermark in 0i64..i64::MAX / 2, offsets in proptest::collection::btree_set(1i64..12_000, 0..2_000)) {
            let offsets: BTreeSet<i64> = offsets.iter().map(|offset| watermark + offset).collect();
            let ranges = ranges(&offsets);
            let encoded = encode(watermark, &ranges);
            prop_assert!(encoded.text.len() <= CHARACTERS);
            prop_assert_eq!(encoded.end, i64::MAX, "a partition tracks no more offsets than a bitmap holds");
            if offsets.is_empty() {
                prop_assert_eq!(encoded.text, "");
            } else {
                prop_assert_eq!(decode(watermark, &encoded.text), Some(ranges.clone()));
            }
        }

        #[test]
        fn any_text_is_read_without_harm(text in "mesh1:[A-Za-z0-9+/]{0,60}", watermark in 0i64..1_000) {
            if let Some(ranges) = decode(watermark, &text) {
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                prop_assert!(ranges.first().is_none_or(|range| range.start > watermark));
            }
        }
    }
}
