//! What the matcher sees of a record and of its reply.
//!
//! Invariant: nothing is copied; the views borrow from whoever holds the record.

/// The headers of a record or of a reply.
pub trait HeaderSource: Send + Sync {
    /// The value of a header; the last one when the name is repeated.
    fn get(&self, name: &str) -> Option<&[u8]>;

    /// Calls `each` with the name and the value of every header, in their order.
    fn for_each(&self, each: &mut dyn FnMut(&str, &[u8]));
}

/// No headers.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHeaders;

impl HeaderSource for NoHeaders {
    fn get(&self, _name: &str) -> Option<&[u8]> {
        None
    }

    fn for_each(&self, _each: &mut dyn FnMut(&str, &[u8])) {}
}

impl<N, V> HeaderSource for &[(N, V)]
where
    N: AsRef<str> + Send + Sync,
    V: AsRef<[u8]> + Send + Sync,
{
    fn get(&self, name: &str) -> Option<&[u8]> {
        let found = self.iter().rev().find(|(other, _)| other.as_ref() == name);
        found.map(|(_, value)| value.as_ref())
    }

    fn for_each(&self, each: &mut dyn FnMut(&str, &[u8])) {
        for (name, value) in *self {
            each(name.as_ref(), value.as_ref());
        }
    }
}

impl<N, V> HeaderSource for Vec<(N, V)>
where
    N: AsRef<str> + Send + Sync,
    V: AsRef<[u8]> + Send + Sync,
{
    fn get(&self, name: &str) -> Option<&[u8]> {
        let found = self.iter().rev().find(|(other, _)| other.as_ref() == name);
        found.map(|(_, value)| value.as_ref())
    }

    fn for_each(&self, each: &mut dyn FnMut(&str, &[u8])) {
        self.as_slice().for_each(each);
    }
}

/// A record, as expressions see it.
#[derive(Clone, Copy)]
pub struct RecordView<'a> {
    /// The topic that it was read from.
    pub topic: &'a str,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its time, in milliseconds since 1970-01-01 UTC.
    pub timestamp_ms: i64,
    /// Its key.
    pub key: Option<&'a [u8]>,
    /// Its value; `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    /// Its headers.
    pub headers: &'a dyn HeaderSource,
}

/// An answer of the service, as expressions see it.
#[derive(Clone, Copy)]
pub struct ReplyView<'a> {
    /// The status.
    pub status: u16,
    /// The body.
    pub body: Option<&'a [u8]>,
    /// The headers.
    pub headers: &'a dyn HeaderSource,
}
