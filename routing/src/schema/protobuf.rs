//! Checks that a value is an encoded protobuf message: it walks the wire format by the message's descriptor, and builds nothing.
//!
//! What does not match: what is no wire format, a field whose wire type is not that of its declaration, a string that is not UTF-8, a required
//! field (proto2) that is absent. Fields that the message does not know pass, as protobuf wants it: a newer sender may have them.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost_reflect::{Cardinality, DescriptorPool, FieldDescriptor, Kind, MessageDescriptor};

use super::{Mismatch, clip, push};
use crate::expression::Refusal;

/// How deep messages may be nested: what protobuf's libraries allow.
const DEPTH: usize = 100;
/// The most messages of a descriptor set.
const MAX_MESSAGES: usize = 5_000;

/// A message that values must be.
pub(super) struct Message(MessageDescriptor);

/// Finds the message in the descriptor set.
pub(super) fn compile(descriptor: &str, message: &str) -> Result<Message, Refusal> {
    let refuse = |message: String, hint: &str| Err(Refusal { message, hint: hint.to_owned() });
    let hint = "make it by `protoc --include_imports --descriptor_set_out=set.bin …` and `base64 -w0 set.bin`";
    let compact: String = descriptor.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    let Ok(bytes) = STANDARD.decode(compact) else { return refuse("the descriptor is not base64".to_owned(), hint) };
    let pool = match DescriptorPool::decode(bytes.as_slice()) {
        Ok(pool) => pool,
        Err(error) => return refuse(format!("the descriptor is no set of protobuf files that can be used: {error}"), hint),
    };
    if pool.all_messages().len() > MAX_MESSAGES {
        return refuse(format!("the descriptor has more than {MAX_MESSAGES} messages"), "leave out files that the message does not need");
    }
    match pool.get_message_by_name(message) {
        Some(found) => Ok(Message(found)),
        None => {
            let names: Vec<String> = pool.all_messages().map(|message| message.full_name().to_owned()).take(20).collect();
            refuse(format!("the descriptor has no message `{}`", clip(message)), &format!("it has: {}", clip_list(&names)))
        }
    }
}

fn clip_list(names: &[String]) -> String {
    let mut out = names.join(", ");
    if out.len() > 300 {
        out = out.chars().take(300).collect::<String>() + "…";
    }
    out
}

/// Checks a value.
pub(super) fn check(message: &Message, value: &[u8]) -> Result<(), Mismatch> {
    let mut walk = Walk { bytes: value, path: String::new() };
    let end = value.len();
    walk.message(&message.0, 0, end, 0, None).map(|_| ())
}

struct Walk<'v> {
    bytes: &'v [u8],
    path: String,
}

/// The types of the wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wire {
    Varint,
    Fixed64,
    Bytes,
    Begin,
    End,
    Fixed32,
}

impl Walk<'_> {
    fn fault<T>(&self, reason: impl Into<String>) -> Result<T, Mismatch> {
        Err(Mismatch { path: self.path.clone(), reason: reason.into() })
    }

    fn varint(&self, at: &mut usize, end: usize) -> Result<u64, Mismatch> {
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            if *at >= end {
                return self.fault("ends within a number");
            }
            let byte = self.bytes[*at];
            *at += 1;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        self.fault("has a number of more than 64 bits")
    }

    /// The next `length` bytes.
    fn skip(&self, at: &mut usize, end: usize, length: u64) -> Result<(usize, usize), Mismatch> {
        match usize::try_from(length).ok().and_then(|length| at.checked_add(length)).filter(|to| *to <= end) {
            Some(to) => {
                let from = std::mem::replace(at, to);
                Ok((from, to))
            }
            None => self.fault("ends within a field"),
        }
    }

    /// Walks a message, or a group until its end. Returns where it ended.
    fn message(
        &mut self,
        message: &MessageDescriptor,
        mut at: usize,
        end: usize,
        depth: usize,
        group: Option<u32>,
    ) -> Result<usize, Mismatch> {
        if depth > DEPTH {
            return self.fault(format!("is nested more than {DEPTH} deep"));
        }
        let mut seen: BTreeMap<u32, usize> = BTreeMap::new();
        let mut closed = group.is_none();
        while at < end {
            let (number, wire) = self.tag(&mut at, end)?;
            if wire == Wire::End {
                if group != Some(number) {
                    return self.fault("has the end of a group that did not begin");
                }
                closed = true;
                break;
            }
            let field = message.get_field(number);
            let count = seen.entry(number).or_default();
            let index = *count;
            *count += 1;
            match field {
                Some(field) => {
                    let length = self.path.len();
                    push(&mut self.path, field.name());
                    if field.is_list() {
                        push(&mut self.path, &index.to_string());
                    }
                    self.field(&field, wire, &mut at, end, depth)?;
                    self.path.truncate(length);
                }
                None => self.unknown(number, wire, &mut at, end, depth)?,
            }
        }
        if !closed {
            return self.fault("ends within a group");
        }
        // Only proto2 has required fields.
        let required = |field: &FieldDescriptor| field.cardinality() == Cardinality::Required;
        if let Some(missing) = message.fields().find(|field| required(field) && !seen.contains_key(&field.number())) {
            return self.fault(format!("lacks the required field `{}`", missing.name()));
        }
        Ok(at)
    }

    fn tag(&self, at: &mut usize, end: usize) -> Result<(u32, Wire), Mismatch> {
        let tag = self.varint(at, end)?;
        let number = u32::try_from(tag >> 3).ok().filter(|number| (1..=0x1fff_ffff).contains(number));
        let wire = match tag & 7 {
            0 => Some(Wire::Varint),
            1 => Some(Wire::Fixed64),
            2 => Some(Wire::Bytes),
            3 => Some(Wire::Begin),
            4 => Some(Wire::End),
            5 => Some(Wire::Fixed32),
            _ => None,
        };
        match (number, wire) {
            (Some(number), Some(wire)) => Ok((number, wire)),
            _ => self.fault("is not the wire format of protobuf"),
        }
    }

    fn field(&mut self, field: &FieldDescriptor, wire: Wire, at: &mut usize, end: usize, depth: usize) -> Result<(), Mismatch> {
        let kind = field.kind();
        let natural = match &kind {
            Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => Wire::Fixed64,
            Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => Wire::Fixed32,
            Kind::String | Kind::Bytes => Wire::Bytes,
            Kind::Message(_) if field.is_group() => Wire::Begin,
            Kind::Message(_) => Wire::Bytes,
            _ => Wire::Varint,
        };
        let scalar = !matches!(kind, Kind::String | Kind::Bytes | Kind::Message(_));
        if wire == Wire::Bytes && field.is_list() && scalar {
            // Packed, whether it is declared so or not.
            let length = self.varint(at, end)?;
            let (mut from, to) = self.skip(at, end, length)?;
            while from < to {
                self.scalar(natural, &mut from, to)?;
            }
            return Ok(());
        }
        if wire != natural {
            return self.fault(format!("has wire type {wire:?}, which is not that of its type, {kind:?}"));
        }
        match (wire, &kind) {
            (Wire::Begin, Kind::Message(message)) => *at = self.message(message, *at, end, depth + 1, Some(field.number()))?,
            (Wire::Bytes, kind) => {
                let length = self.varint(at, end)?;
                let (from, to) = self.skip(at, end, length)?;
                match kind {
                    Kind::Message(message) => {
                        self.message(message, from, to, depth + 1, None)?;
                    }
                    Kind::String if std::str::from_utf8(&self.bytes[from..to]).is_err() => return self.fault("is not UTF-8"),
                    _ => {}
                }
            }
            (wire, _) => self.scalar(wire, at, end)?,
        }
        Ok(())
    }

    fn scalar(&self, wire: Wire, at: &mut usize, end: usize) -> Result<(), Mismatch> {
        match wire {
            Wire::Fixed64 => self.skip(at, end, 8).map(drop),
            Wire::Fixed32 => self.skip(at, end, 4).map(drop),
            _ => self.varint(at, end).map(drop),
        }
    }

    /// Passes over a field that the message does not know.
    fn unknown(&self, number: u32, wire: Wire, at: &mut usize, end: usize, depth: usize) -> Result<(), Mismatch> {
        match wire {
            Wire::Varint | Wire::Fixed64 | Wire::Fixed32 => self.scalar(wire, at, end),
            Wire::Bytes => {
                let length = self.varint(at, end)?;
                self.skip(at, end, length).map(drop)
            }
            Wire::Begin => {
                // Groups within groups, by a list of those that are open.
                let mut open = vec![number];
                while let Some(innermost) = open.last().copied() {
                    if open.len() + depth > DEPTH {
                        return self.fault(format!("is nested more than {DEPTH} deep"));
                    }
                    if *at >= end {
                        return self.fault("ends within a group");
                    }
                    match self.tag(at, end)? {
                        (number, Wire::Begin) => open.push(number),
                        (number, Wire::End) if number == innermost => {
                            open.pop();
                        }
                        (_, Wire::End) => return self.fault("has the end of a group that did not begin"),
                        (number, wire) => self.unknown(number, wire, at, end, depth)?,
                    }
                }
                Ok(())
            }
            Wire::End => self.fault("has the end of a group that did not begin"),
        }
    }
}
