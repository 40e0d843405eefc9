//! The effective configuration as YAML.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use super::{BrokerConfig, Config, ControlConfig, ListenTls, LogFormat, ServiceConfig};

/// What stands for a secret.
const REDACTED: &str = "(redacted)";

/// Whether a setting of librdkafka may hold a secret. Rather one too many.
pub(super) fn is_secret(key: &str) -> bool {
    let key = key.to_lowercase();
    let public = matches!(key.as_str(), "sasl.mechanism" | "sasl.mechanisms");
    let parts = ["password", "secret", "token", "assertion", ".key", "_key"];
    !public && (key.starts_with("sasl.") || parts.iter().any(|part| key.contains(part)))
}

/// The effective configuration as YAML that [`load`](super::load) reads again. Secrets are redacted.
pub fn print(config: &Config) -> String {
    let mut out = String::from("apiVersion: mesh/v1\nkind: Sidecar\n");
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!("mesh: {}", quote(&config.mesh)));
    line("services:".into());
    for service in &config.services {
        line(format!("- name: {}", quote(&service.name)));
        service_fields(service).into_iter().for_each(&mut line);
    }
    if let Some(instance) = &config.instance {
        line(format!("instance: {}", quote(instance)));
    }
    if !config.labels.is_empty() {
        let labels = config.labels.iter().map(|(name, value)| format!("{}: {}", quote(name), quote(value)));
        line(format!("labels: {{ {} }}", labels.collect::<Vec<_>>().join(", ")));
    }
    line(format!("state: {}", quote(&config.state.to_string_lossy())));
    line("broker:".into());
    match &config.broker {
        BrokerConfig::Embedded { path } => line(format!("  embedded:\n    path: {}", quote(&path.to_string_lossy()))),
        BrokerConfig::Kafka(settings) => line(kafka(settings)),
    }
    if let Some(file) = &config.table {
        line(format!("table:\n  file: {}", quote(&file.to_string_lossy())));
    }
    let listen = &config.listen;
    line(format!("listen:\n  api: \"{}\"\n  admin: \"{}\"\n  probe: \"{}\"", listen.api, listen.admin, listen.probe));
    tls_lines(&config.tls).into_iter().for_each(&mut line);
    control_lines(&config.control).into_iter().for_each(&mut line);
    line("telemetry:".into());
    let telemetry = &config.telemetry;
    if let Some(otlp) = &telemetry.otlp {
        line(format!("  otlp: {}", quote(otlp)));
    }
    let format = match telemetry.log_format {
        LogFormat::Json => "json",
        LogFormat::Pretty => "pretty",
    };
    line(format!("  log: {}\n  log_format: {format}", quote(&telemetry.log)));
    let limits = &config.limits;
    line(format!("limits:\n  record_size: {}\n  publish_timeout: {}", size(limits.record_bytes), duration(limits.publish_timeout)));
    line(format!("  drain_timeout: {}\n  buffer: {}", duration(limits.drain_timeout), size(limits.buffer_bytes)));
    out
}

fn tls_lines(tls: &ListenTls) -> Vec<String> {
    let mut lines = Vec::new();
    for (listener, files) in [("api", &tls.api), ("admin", &tls.admin)] {
        let Some(files) = files else { continue };
        if lines.is_empty() {
            lines.push("  tls:".to_owned());
        }
        let files = [("cert", Some(&files.cert)), ("key", Some(&files.key)), ("client_ca", files.client_ca.as_ref())];
        let field = |(name, file): (&str, Option<&std::path::PathBuf>)| Some(format!("{name}: {}", quote(&file?.to_string_lossy())));
        lines.push(format!("    {listener}: {{ {} }}", files.into_iter().filter_map(field).collect::<Vec<_>>().join(", ")));
    }
    lines
}

fn control_lines(control: &ControlConfig) -> Vec<String> {
    let mut lines = Vec::new();
    if *control != ControlConfig::default() {
        lines.push("control:".to_owned());
    }
    if !control.trusted_keys.is_empty() {
        let keys: Vec<String> = control.trusted_keys.iter().map(|key| quote(&key.to_string())).collect();
        lines.push(format!("  trusted_keys: [{}]", keys.join(", ")));
    }
    if !control.tokens.is_empty() {
        lines.push("  tokens:".to_owned());
    }
    for token in &control.tokens {
        let file = quote(&token.file.to_string_lossy());
        lines.push(format!("  - {{ name: {}, file: {file}, role: {} }}", quote(&token.name), token.role));
    }
    if !control.certificates.is_empty() {
        lines.push("  certificates:".to_owned());
    }
    for certificate in &control.certificates {
        lines.push(format!("  - {{ name: {}, role: {} }}", quote(&certificate.name), certificate.role));
    }
    lines
}

fn service_fields(service: &ServiceConfig) -> Vec<String> {
    let topics = |topics: &[String]| format!("[{}]", topics.iter().map(|topic| quote(topic)).collect::<Vec<_>>().join(", "));
    let mut lines = Vec::new();
    if let Some(app) = &service.app {
        lines.push(format!("  app: {}", quote(&app.to_string())));
    }
    if let Some(publish) = &service.publish {
        lines.push(format!("  publish: {}", topics(publish)));
    }
    if let Some(subscribe) = &service.subscribe {
        lines.push(format!("  subscribe: {}", topics(subscribe)));
    }
    if let Some(file) = &service.token_file {
        lines.push(format!("  token_file: {}", quote(&file.to_string_lossy())));
    }
    lines
}

/// Settings of librdkafka without their secrets.
pub(super) fn redacted(settings: &BTreeMap<String, String>) -> BTreeMap<&str, &str> {
    settings.iter().map(|(key, value)| (key.as_str(), if is_secret(key) { REDACTED } else { value })).collect()
}

fn kafka(settings: &BTreeMap<String, String>) -> String {
    let mut text = String::from("  kafka:");
    for (key, value) in redacted(settings) {
        // Writing to a string does not fail.
        let _ = write!(text, "\n    {}: {}", quote(key), quote(value));
    }
    text
}

/// Text as YAML: as it is where that is safe, else as a JSON string, which is YAML too.
fn quote(text: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    let begins = text.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || matches!(c, '/'));
    let word = matches!(text.to_lowercase().as_str(), "true" | "false" | "yes" | "no" | "on" | "off" | "y" | "n" | "null");
    if begins && !word && text.chars().all(safe) {
        return text.to_owned();
    }
    // What JSON leaves as it is and YAML does not read: further control characters, and other ends of lines.
    let escape = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}');
    let mut quoted = String::with_capacity(text.len() + 2);
    for c in serde_json::Value::from(text).to_string().chars() {
        if escape(c) {
            quoted.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            quoted.push(c);
        }
    }
    quoted
}

fn size(bytes: usize) -> String {
    match bytes {
        _ if bytes > 0 && bytes.is_multiple_of(1 << 20) => format!("{}MiB", bytes >> 20),
        _ if bytes > 0 && bytes.is_multiple_of(1 << 10) => format!("{}KiB", bytes >> 10),
        _ => bytes.to_string(),
    }
}

fn duration(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}
