//! The encoding of a row: consecutive records of one partition, as one blob.
//!
//! ```text
//! row     = version(1 byte) record*
//! record  = gap timestamp key value headers      gap: offsets that are missing before this record
//! key     = 0 | length+1 bytes                   0: null; values of records and of headers alike
//! headers = count (name-length name value)*
//! ```
//! Integers are LEB128; timestamps are zigzag differences to the record before. A row's base offset and its end stand in columns beside it.
//!
//! Invariant: decoding never panics and never allocates more than the input's size allows, whatever the bytes.
//! Invariant: decoding copies no payload: keys, values and headers are slices of the row.

use bytes::Bytes;
use bytestring::ByteString;

use crate::record::{Header, Record};

const VERSION: u8 = 1;

/// Why a row cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Corrupt {
    #[error("the row ends within a record")]
    Truncated,
    #[error("an integer is longer than 64 bits")]
    Integer,
    #[error("a header's name is not UTF-8")]
    Name,
    #[error("an offset is beyond 63 bits")]
    Offset,
    #[error("the row has version {0}, which this program does not know")]
    Version(u8),
}

/// Collects records into a row.
#[derive(Debug)]
pub(super) struct Encoder {
    buffer: Vec<u8>,
    count: usize,
    last_timestamp: i64,
    pending_gap: u64,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self { buffer: Vec::new(), count: 0, last_timestamp: 0, pending_gap: 0 }
    }

    /// Records in the row.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Bytes in the row.
    pub(super) fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Leaves out `offsets` offsets before the next record.
    pub(super) fn gap(&mut self, offsets: u64) {
        self.pending_gap += offsets;
    }

    /// Appends a record at the next offset.
    pub(super) fn push(&mut self, record: &Record, timestamp: i64) {
        if self.buffer.is_empty() {
            self.buffer.push(VERSION);
        }
        let buffer = &mut self.buffer;
        put_integer(buffer, std::mem::take(&mut self.pending_gap));
        put_integer(buffer, zigzag(timestamp.wrapping_sub(self.last_timestamp)));
        self.last_timestamp = timestamp;
        put_optional(buffer, record.key.as_deref());
        put_optional(buffer, record.value.as_deref());
        put_integer(buffer, record.headers.len() as u64);
        for header in &record.headers {
            put_integer(buffer, header.name.len() as u64);
            buffer.extend_from_slice(header.name.as_bytes());
            put_optional(buffer, header.value.as_deref());
        }
        self.count += 1;
    }

    /// The finished row; the encoder is empty again.
    pub(super) fn finish(&mut self) -> Bytes {
        self.count = 0;
        self.last_timestamp = 0;
        self.pending_gap = 0;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.shrink_to_fit();
        Bytes::from(buffer)
    }
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

fn put_integer(buffer: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        buffer.push((value as u8) | 0x80);
        value >>= 7;
    }
    buffer.push(value as u8);
}

fn put_optional(buffer: &mut Vec<u8>, value: Option<&[u8]>) {
    match value {
        None => buffer.push(0),
        Some(value) => {
            put_integer(buffer, value.len() as u64 + 1);
            buffer.extend_from_slice(value);
        }
    }
}

/// Iterates over the records of a row with their offsets. After an error it ends.
#[derive(Debug)]
pub(super) struct Decoder {
    row: Bytes,
    position: usize,
    next_offset: i64,
    last_timestamp: i64,
}

impl Decoder {
    /// A decoder of the row whose first possible offset is `base`.
    pub(super) fn new(row: Bytes, base: i64) -> Self {
        Self { row, position: 0, next_offset: base, last_timestamp: 0 }
    }

    fn byte(&mut self) -> Result<u8, Corrupt> {
        let byte = *self.row.get(self.position).ok_or(Corrupt::Truncated)?;
        self.position += 1;
        Ok(byte)
    }

    fn integer(&mut self) -> Result<u64, Corrupt> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(Corrupt::Integer);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Corrupt::Integer)
    }

    fn slice(&mut self, length: u64) -> Result<Bytes, Corrupt> {
        let length = usize::try_from(length).map_err(|_| Corrupt::Truncated)?;
        let end = self.position.checked_add(length).filter(|end| *end <= self.row.len()).ok_or(Corrupt::Truncated)?;
        let slice = self.row.slice(self.position..end);
        self.position = end;
        Ok(slice)
    }

    fn optional(&mut self) -> Result<Option<Bytes>, Corrupt> {
        match self.integer()? {
            0 => Ok(None),
            length => self.slice(length - 1).map(Some),
        }
    }

    fn record(&mut self) -> Result<(i64, Record), Corrupt> {
        let gap = i64::try_from(self.integer()?).map_err(|_| Corrupt::Offset)?;
        let offset = self.next_offset.checked_add(gap).ok_or(Corrupt::Offset)?;
        self.next_offset = offset.checked_add(1).ok_or(Corrupt::Offset)?;
        let timestamp = self.last_timestamp.wrapping_add(unzigzag(self.integer()?));
        self.last_timestamp = timestamp;
        let key = self.optional()?;
        let value = self.optional()?;
        let count = self.integer()?;
        // A header takes two bytes at least: what claims more than fits is cut short by `Truncated`, not by the allocator.
        let room = (self.row.len() - self.position) / 2;
        let mut headers = Vec::with_capacity(usize::try_from(count).map_or(room, |count| count.min(room)));
        for _ in 0..count {
            let length = self.integer()?;
            let name = ByteString::try_from(self.slice(length)?).map_err(|_| Corrupt::Name)?;
            headers.push(Header { name, value: self.optional()? });
        }
        Ok((offset, Record { key, value, headers, timestamp_ms: Some(timestamp) }))
    }
}

impl Iterator for Decoder {
    type Item = Result<(i64, Record), Corrupt>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.position >= self.row.len() {
            return None;
        }
        if self.position == 0 {
            let version = self.row[0];
            self.position = 1;
            if version != VERSION {
                self.position = self.row.len();
                return Some(Err(Corrupt::Version(version)));
            }
            return self.next();
        }
        let record = self.record();
        if record.is_err() {
            self.position = self.row.len();
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn optional_bytes(max: usize) -> impl Strategy<Value = Option<Bytes>> {
        prop::option::of(prop::collection::vec(any::<u8>(), 0..max).prop_map(Bytes::from))
    }

    fn records() -> impl Strategy<Value = Vec<(u64, i64, Record)>> {
        let header = (".{0,12}", optional_bytes(20)).prop_map(|(name, value)| Header { name: ByteString::from(name), value });
        let record = (optional_bytes(40), optional_bytes(300), prop::collection::vec(header, 0..5))
            .prop_map(|(key, value, headers)| Record { key, value, headers, timestamp_ms: None });
        prop::collection::vec((prop_oneof![Just(0u64), 0..1_000_000u64], any::<i64>(), record), 0..20)
    }

    proptest! {
        #[test]
        fn decode_undoes_encode(base in 0..i64::MAX / 2, records in records()) {
            let mut encoder = Encoder::new();
            let mut expected = Vec::new();
            let mut offset = base;
            for (gap, timestamp, record) in &records {
                encoder.gap(*gap);
                encoder.push(record, *timestamp);
                offset += gap.cast_signed();
                expected.push((offset, Record { timestamp_ms: Some(*timestamp), ..record.clone() }));
                offset += 1;
            }
            prop_assert_eq!(encoder.count(), records.len());
            let row = encoder.finish();
            let decoded: Result<Vec<_>, _> = Decoder::new(row, base).collect();
            prop_assert_eq!(decoded, Ok(expected));
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400), base in any::<i64>()) {
            let _ = Decoder::new(Bytes::from(bytes.clone()), base).count();
            let mut versioned = vec![VERSION];
            versioned.extend(bytes);
            let _ = Decoder::new(Bytes::from(versioned), base).count();
        }

        #[test]
        fn a_cut_row_is_an_error_or_a_prefix(records in records(), cut in any::<prop::sample::Index>()) {
            let mut encoder = Encoder::new();
            for (_, timestamp, record) in &records {
                encoder.push(record, *timestamp);
            }
            let row = encoder.finish();
            let whole: Vec<_> = Decoder::new(row.clone(), 0).collect();
            let part: Vec<_> = Decoder::new(row.slice(..cut.index(row.len() + 1)), 0).collect();
            let good = part.iter().take_while(|record| record.is_ok()).count();
            prop_assert_eq!(&part[..good], &whole[..good]);
            prop_assert!(part.len() <= good + 1);
        }
    }

    #[test]
    fn records_are_slices_of_the_row() {
        let mut encoder = Encoder::new();
        encoder.push(&Record { value: Some(Bytes::from_static(b"value")), ..Record::default() }, 7);
        let row = encoder.finish();
        let (_, record) = Decoder::new(row.clone(), 0).next().expect("one record").expect("decodes");
        let value = record.value.expect("a value");
        assert!(row.as_ptr_range().contains(&value.as_ptr()));
    }
}
