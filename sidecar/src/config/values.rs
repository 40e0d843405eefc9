//! Single values: from text to what it means, or a problem and a hint.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use http::Uri;

use super::AppAddress;

/// An address without its user and password.
pub(super) fn shown(text: &str) -> String {
    match text.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?.1))) {
        Some((scheme, host)) => format!("{scheme}://…@{host}"),
        None => text.to_owned(),
    }
}

/// Problem and hint.
type Bad = (String, String);

fn bad<T>(problem: impl Into<String>, hint: impl Into<String>) -> Result<T, Bad> {
    Err((problem.into(), hint.into()))
}

/// The name of a mesh, a service or an instance: it becomes part of the names of groups and topics.
pub(super) fn name(text: &str) -> Result<String, Bad> {
    let fits = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let begins = text.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if begins && text.len() <= 100 && text.bytes().all(fits) {
        return Ok(text.to_owned());
    }
    bad("is no name", "use at most 100 of a-z A-Z 0-9 . _ -, and begin with a letter or a digit")
}

pub(super) fn topic(text: &str) -> Result<String, Bad> {
    let fits = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    match text {
        "void" => bad("is the word for no topic", "leave it out: nothing is published to void"),
        "" | "." | ".." => bad("is no name of a topic", "use at most 249 of a-z A-Z 0-9 . _ -"),
        _ if text.len() > 249 || !text.bytes().all(fits) => {
            bad("is no name of a topic", "use at most 249 of a-z A-Z 0-9 . _ -; patterns are not allowed")
        }
        _ if text.starts_with("__") => bad("belongs to the mesh itself, or to Kafka", "name a topic that does not begin with __"),
        _ => Ok(text.to_owned()),
    }
}

pub(super) fn path(text: &str) -> Result<PathBuf, Bad> {
    if text.is_empty() || text.contains('\0') {
        return bad("is no path", "give the path of a file or a folder");
    }
    Ok(PathBuf::from(text))
}

pub(super) fn socket(text: &str) -> Result<SocketAddr, Bad> {
    let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
    match numeric.as_deref().unwrap_or(text).parse() {
        Ok(address) => Ok(address),
        Err(_) => bad("is no address to listen on", "give an IP address and a port, as in 127.0.0.1:4500"),
    }
}

/// `scheme://host:port` and nothing behind it.
pub(super) fn http_address(text: &str, scheme: &str, example: &str) -> Result<String, Bad> {
    let hint = format!("as in {example}");
    let Ok(uri) = text.parse::<Uri>() else { return bad("is no address", hint) };
    match uri.scheme_str() {
        Some(given) if given == scheme => {}
        Some("https") => return bad("asks for TLS, which is not built in here", format!("give a plain address on this machine, {hint}")),
        _ => return bad(format!("does not begin with {scheme}://"), hint),
    }
    let Some(authority) = uri.authority() else { return bad("names no host", hint) };
    if authority.as_str().contains('@') {
        return bad("contains a user", "leave the user and the password out: they would be written to logs");
    }
    let port = match authority.as_str().rsplit_once(':') {
        Some((_, port)) if !authority.as_str().ends_with(']') => port.parse::<u16>().is_ok_and(|port| port > 0),
        _ => true,
    };
    if authority.host().is_empty() || !port {
        return bad("names no host and port", hint);
    }
    if uri.query().is_some() || !matches!(uri.path(), "" | "/") || text.contains('#') {
        return bad(
            "has something behind host and port",
            format!("the path comes from the routing table (`handler`); give the address alone, {hint}"),
        );
    }
    Ok(format!("{scheme}://{authority}"))
}

pub(super) fn app(text: &str) -> Result<AppAddress, Bad> {
    const EXAMPLE: &str = "http://127.0.0.1:8080";
    if let Some(rest) = text.strip_prefix("unix:") {
        let path = rest.strip_prefix("//").unwrap_or(rest);
        if !path.starts_with('/') || path.contains('\0') || path.len() > 100 {
            return bad("is no path of a socket", "give an absolute path of at most 100 bytes, as in unix:/run/pricing.sock");
        }
        return Ok(AppAddress::Unix(PathBuf::from(path)));
    }
    match text.split_once("://").map(|(scheme, _)| scheme) {
        Some("h2c") => http_address(text, "h2c", EXAMPLE).map(AppAddress::H2c),
        Some("grpc") => http_address(text, "grpc", EXAMPLE).map(AppAddress::Grpc),
        Some("http" | "https") => http_address(text, "http", EXAMPLE).map(AppAddress::Http),
        _ => bad("is no address of a service", format!("begin with http:// h2c:// grpc:// or unix:, as in {EXAMPLE}")),
    }
}

/// A number of bytes: `1048576`, `1MiB`, `1MB`.
pub(super) fn size(text: &str, least: usize, most: usize) -> Result<usize, Bad> {
    const UNITS: [(&str, usize); 8] = [
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
        ("GB", 1_000_000_000),
        ("MB", 1_000_000),
        ("kB", 1000),
        ("KB", 1000),
        ("B", 1),
    ];
    let (number, unit) = UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit))).unwrap_or((text, 1));
    let Some(bytes) = number.trim().parse::<usize>().ok().and_then(|number| number.checked_mul(unit)) else {
        return bad("is no number of bytes", "as in 1MiB, 512KiB or 1048576");
    };
    if (least..=most).contains(&bytes) { Ok(bytes) } else { bad("is out of range", format!("give {least} to {most} bytes")) }
}

/// A duration: `30s`, `1m 30s`, `500ms`.
pub(super) fn duration(text: &str, least_ms: u64, most_ms: u64) -> Result<Duration, Bad> {
    let (least, most) = (Duration::from_millis(least_ms), Duration::from_millis(most_ms));
    match humantime::parse_duration(text) {
        Ok(duration) if (least..=most).contains(&duration) => Ok(duration),
        Ok(_) => bad("is out of range", format!("give {} to {}", humantime::format_duration(least), humantime::format_duration(most))),
        Err(_) => bad("is no duration", "give a number and a unit, as in 500ms, 30s or 1m 30s"),
    }
}
