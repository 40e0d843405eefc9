//! From the raw tree to the validated configuration: every field is read, every fault is kept.

use std::{collections::BTreeMap, path::PathBuf};

use mesh_routing::channel::is_word;
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use super::{
    BrokerConfig, Config, ConfigErrors, Fault, Limits, LogFormat, Place, ServiceConfig, TelemetryConfig,
    fault::did_you_mean,
    print::is_secret,
    source::{self, Entry, Node, SERVICE_FIELDS, Value},
    values::{app, duration, http_address, name, path, shown, size, topic},
};

/// Reads text and environment; the text has the name of its file.
pub(super) fn read(text: Option<(&str, &str)>, env: impl Iterator<Item = (String, String)>) -> Result<Config, ConfigErrors> {
    let mut reader = Reader { faults: Vec::new(), whole: Place::Nowhere };
    let mut root = Node { place: Place::Nowhere, value: Value::Map(Vec::new()) };
    if let Some((file, text)) = text {
        let place = |line, column| Place::File { file: file.to_owned(), line, column };
        reader.whole = Place::File { file: file.to_owned(), line: 0, column: 0 };
        match source::parse(text, &place) {
            Ok(node) => root = node,
            // Nothing else can be said about a file that cannot be read.
            Err(fault) => return Err(ConfigErrors { faults: vec![*fault] }),
        }
        if matches!(root.value, Value::Null) {
            root.value = Value::Map(Vec::new());
        }
    }
    source::overlay(&mut root, env, &mut reader.faults);
    let config = reader.config(root, text.is_some());
    match config {
        Some(config) if reader.faults.is_empty() => Ok(config),
        _ => {
            let mut faults = reader.faults;
            faults.sort_by(|a, b| a.place.cmp(&b.place));
            Err(ConfigErrors { faults })
        }
    }
}

pub(super) struct Reader {
    faults: Vec<Fault>,
    /// Where something that is missing would be.
    whole: Place,
}

/// The fields of a map that were not read yet.
pub(super) struct Fields {
    pub(super) path: String,
    pub(super) place: Place,
    pub(super) entries: Vec<Entry>,
}

impl Fields {
    pub(super) fn take(&mut self, name: &str) -> Option<(String, Node)> {
        let at = self.entries.iter().position(|entry| entry.name == name)?;
        let node = self.entries.remove(at).node;
        if matches!(node.value, Value::Null) { None } else { Some((join(&self.path, name), node)) }
    }
}

pub(super) fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

impl Reader {
    pub(super) fn fault(&mut self, place: &Place, field: &str, value: Option<&str>, problem: impl Into<String>, hint: impl Into<String>) {
        self.faults.push(Fault {
            place: place.clone(),
            field: field.to_owned(),
            value: value.map(str::to_owned),
            problem: problem.into(),
            hint: hint.into(),
        });
    }

    /// The fields of a map; reports the unknown and the repeated ones.
    pub(super) fn fields(&mut self, path: &str, node: Node, known: &[&str]) -> Option<Fields> {
        let Value::Map(entries) = node.value else {
            self.fault(&node.place, path, None, "must be a map of fields", format!("the fields are {}", known.join(", ")));
            return None;
        };
        let mut fields = Fields { path: path.to_owned(), place: node.place, entries: Vec::new() };
        for entry in entries {
            let name = join(path, &entry.name);
            if !known.contains(&entry.name.as_str()) {
                self.fault(&entry.place, &name, None, "is no field", did_you_mean(&entry.name, known.iter().copied()));
            } else if fields.entries.iter().any(|other| other.name == entry.name) {
                self.fault(&entry.place, &name, None, "is set twice", "remove one of the two");
            } else {
                fields.entries.push(entry);
            }
        }
        Some(fields)
    }

    pub(super) fn text(&mut self, path: &str, node: &Node) -> Option<String> {
        match &node.value {
            Value::Scalar { text, exact: true } => Some(text.clone()),
            Value::Scalar { text, exact: false } => {
                self.fault(&node.place, path, Some(text), "is read as a number, and may have lost digits", "put it in quotes");
                None
            }
            Value::Null | Value::List(_) | Value::Map(_) => {
                self.fault(&node.place, path, None, "must be text", "give a single value");
                None
            }
        }
    }

    /// A field that is text and that a function understands; the function gives problem and hint.
    pub(super) fn parsed<T>(
        &mut self,
        field: Option<(String, Node)>,
        parse: impl FnOnce(&str) -> Result<T, (String, String)>,
    ) -> Option<T> {
        let (path, node) = field?;
        let text = self.text(&path, &node)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err((problem, hint)) => {
                self.fault(&node.place, &path, Some(&shown(&text)), problem, hint);
                None
            }
        }
    }

    fn config(&mut self, root: Node, from_file: bool) -> Option<Config> {
        const KNOWN: [&str; 13] = [
            "apiVersion",
            "kind",
            "mesh",
            "services",
            "instance",
            "labels",
            "state",
            "broker",
            "table",
            "listen",
            "control",
            "telemetry",
            "limits",
        ];
        let mut fields = self.fields("", root, &KNOWN)?;
        self.head(&mut fields, from_file);
        let mesh = match fields.take("mesh") {
            Some(field) => self.parsed(Some(field), name),
            None => self.missing("mesh", "name the mesh, as in mesh: shop"),
        };
        let services = match fields.take("services") {
            Some((path, node)) => self.services(&path, node),
            None => self.missing("services", "name at least one, as in services: [{name: pricing, app: \"http://127.0.0.1:8080\"}]"),
        };
        let instance = self.parsed(fields.take("instance"), name);
        let labels = fields.take("labels").map(|(path, node)| self.labels(&path, node)).unwrap_or_default();
        let state = self.parsed(fields.take("state"), path).unwrap_or_else(|| PathBuf::from("./mesh-state"));
        let broker = match fields.take("broker") {
            Some((path, node)) => self.broker(&path, node),
            None => self.missing("broker", "choose embedded: {path: ./mesh-data} or kafka: {bootstrap.servers: \"…\"}"),
        };
        let table = fields.take("table").and_then(|(at, node)| {
            let mut fields = self.fields(&at, node, &["file"])?;
            self.parsed(fields.take("file"), path)
        });
        let control = self.control(fields.take("control"));
        let (listen, tls) = self.listen(fields.take("listen"), services.as_deref().unwrap_or_default(), &control);
        let telemetry = self.telemetry(fields.take("telemetry"));
        let limits = self.limits(fields.take("limits"));
        Some(Config {
            mesh: mesh?.into(),
            services: services?,
            instance,
            labels,
            state,
            broker: broker?,
            table,
            listen,
            tls,
            control,
            telemetry,
            limits,
        })
    }

    fn missing<T>(&mut self, field: &str, hint: &str) -> Option<T> {
        let place = self.whole.clone();
        self.fault(&place, field, None, "is missing", hint);
        None
    }

    /// What kind of file it is; without a file there is nothing to tell apart.
    fn head(&mut self, fields: &mut Fields, from_file: bool) {
        for (field, expected) in [("apiVersion", "mesh/v1"), ("kind", "Sidecar")] {
            match fields.take(field) {
                None if from_file => {
                    self.missing::<()>(field, &format!("begin the file with {field}: {expected}"));
                }
                None => {}
                taken => {
                    self.parsed(taken, |text| {
                        let problem = || (format!("is not {expected}"), "is this another kind of file?".to_owned());
                        if text == expected { Ok(()) } else { Err(problem()) }
                    });
                }
            }
        }
    }

    fn services(&mut self, path: &str, node: Node) -> Option<Vec<ServiceConfig>> {
        let items = match node.value {
            Value::List(items) if !items.is_empty() => items,
            _ => {
                self.fault(&node.place, path, None, "must be a list of services, and not an empty one", "as in [{name: pricing}]");
                return None;
            }
        };
        let mut services: Vec<ServiceConfig> = Vec::new();
        for (index, item) in items.into_iter().enumerate() {
            let place = item.place.clone();
            let path = format!("{path}[{index}]");
            let Some(service) = self.service(&path, item) else { continue };
            if services.iter().any(|other| other.name == service.name) {
                self.fault(&place, &join(&path, "name"), Some(&service.name), "names two services", "give each its own name");
            }
            services.push(service);
        }
        Some(services)
    }

    fn service(&mut self, at: &str, node: Node) -> Option<ServiceConfig> {
        let mut fields = self.fields(at, node, &SERVICE_FIELDS)?;
        let app = self.parsed(fields.take("app"), app);
        let publish = fields.take("publish").and_then(|(path, node)| self.topics(&path, node));
        let subscribe = fields.take("subscribe").and_then(|(path, node)| self.topics(&path, node));
        let token_file = self.parsed(fields.take("token_file"), path);
        let Some(field) = fields.take("name") else {
            self.fault(&fields.place, &join(at, "name"), None, "is missing", "give the service's name in the routing table");
            return None;
        };
        let name = self.parsed(Some(field), name)?;
        Some(ServiceConfig { name: name.into(), app, publish, subscribe, token_file })
    }

    fn labels(&mut self, path: &str, node: Node) -> BTreeMap<String, String> {
        let Value::Map(entries) = node.value else {
            self.fault(&node.place, path, None, "must be a map of names and values", "as in {zone: a}");
            return BTreeMap::new();
        };
        let mut labels = BTreeMap::new();
        for entry in entries {
            let field = join(path, &entry.name);
            let hint = "1 to 200 of a-z A-Z 0-9 . _ -";
            if !is_word(&entry.name) {
                self.fault(&entry.place, &field, None, "is no name of a label", hint);
                continue;
            }
            let word =
                |text: &str| if is_word(text) { Ok(text.to_owned()) } else { Err(("is no value of a label".to_owned(), hint.to_owned())) };
            let Some(value) = self.parsed(Some((field.clone(), entry.node)), word) else { continue };
            if labels.insert(entry.name, value).is_some() {
                self.fault(&entry.place, &field, None, "is set twice", "remove one of the two");
            }
        }
        labels
    }

    fn topics(&mut self, path: &str, node: Node) -> Option<Vec<String>> {
        let Value::List(items) = node.value else {
            self.fault(
                &node.place,
                path,
                None,
                "must be a list of topics",
                "as in [orders]; [] allows none, and without the field all are allowed",
            );
            return None;
        };
        let mut topics = Vec::new();
        for (index, item) in items.into_iter().enumerate() {
            let path = format!("{path}[{index}]");
            let place = item.place.clone();
            let Some(topic) = self.parsed(Some((path.clone(), item)), topic) else { continue };
            if topics.contains(&topic) {
                self.fault(&place, &path, Some(&topic), "is named twice", "remove one of the two");
            }
            topics.push(topic);
        }
        Some(topics)
    }

    fn broker(&mut self, path: &str, node: Node) -> Option<BrokerConfig> {
        let place = node.place.clone();
        let mut fields = self.fields(path, node, &["embedded", "kafka"])?;
        // `embedded:` alone means its defaults.
        let present = |fields: &Fields, name: &str| fields.entries.iter().any(|entry| entry.name == name);
        match (present(&fields, "embedded"), present(&fields, "kafka")) {
            (true, false) => self.embedded(fields.take("embedded")),
            (false, true) => match fields.take("kafka") {
                Some((path, node)) => self.kafka(&path, node),
                None => {
                    self.fault(&place, &join(path, "kafka"), None, "is empty", "give bootstrap.servers: \"host:9092\"");
                    None
                }
            },
            (both, _) => {
                let problem = if both { "has both embedded and kafka" } else { "names no broker" };
                self.fault(&place, path, None, problem, "choose one: embedded: {path: ./mesh-data} or kafka: {bootstrap.servers: \"…\"}");
                None
            }
        }
    }

    fn embedded(&mut self, field: Option<(String, Node)>) -> Option<BrokerConfig> {
        let default = || PathBuf::from("./mesh-data");
        let Some((at, node)) = field else { return Some(BrokerConfig::Embedded { path: default() }) };
        let mut fields = self.fields(&at, node, &["path"])?;
        Some(BrokerConfig::Embedded { path: self.parsed(fields.take("path"), path).unwrap_or_else(default) })
    }

    /// The keys are librdkafka's; what they mean is checked there.
    fn kafka(&mut self, path: &str, node: Node) -> Option<BrokerConfig> {
        let place = node.place.clone();
        let Value::Map(entries) = node.value else {
            self.fault(&place, path, None, "must be a map of librdkafka's settings", "as in {bootstrap.servers: \"host:9092\"}");
            return None;
        };
        let mut settings = BTreeMap::new();
        for entry in entries {
            let field = join(path, &entry.name);
            match &entry.node.value {
                Value::Scalar { text, exact: true } => {
                    if settings.insert(entry.name.clone(), text.clone()).is_some() {
                        self.fault(&entry.place, &field, None, "is set twice", "remove one of the two");
                    }
                }
                Value::Scalar { text, exact: false } => {
                    let value = (!is_secret(&entry.name)).then_some(text.as_str());
                    self.fault(&entry.node.place, &field, value, "is read as a number, and may have lost digits", "put it in quotes");
                }
                Value::Map(_) => {
                    let hint = format!("write the names with dots, as in {}.…: value", entry.name);
                    self.fault(&entry.node.place, &field, None, "must be a single value", hint);
                }
                Value::Null | Value::List(_) => {
                    self.fault(&entry.node.place, &field, None, "must be a single value", "write a list as librdkafka wants it: a,b");
                }
            }
        }
        if !settings.contains_key("bootstrap.servers") && !settings.contains_key("metadata.broker.list") {
            self.fault(&place, &join(path, "bootstrap.servers"), None, "is missing", "give host:port of the brokers, with commas between");
        }
        Some(BrokerConfig::Kafka(settings))
    }

    fn telemetry(&mut self, field: Option<(String, Node)>) -> TelemetryConfig {
        let mut telemetry = TelemetryConfig { otlp: None, log: "info".into(), log_format: LogFormat::Json };
        let Some((path, node)) = field else { return telemetry };
        let Some(mut fields) = self.fields(&path, node, &["otlp", "log", "log_format"]) else { return telemetry };
        telemetry.otlp = self.parsed(fields.take("otlp"), |text| http_address(text, "http", "http://127.0.0.1:4317"));
        let filter = |text: &str| {
            // A word alone would be taken for a target, and silence all others.
            let odd = text.split(',').map(str::trim).find(|part| !part.contains(['=', '[']) && part.parse::<LevelFilter>().is_err());
            let problem = match (odd, EnvFilter::builder().parse(text)) {
                (Some(odd), _) => format!("is no filter: `{odd}` is no level"),
                (None, Err(cause)) => format!("is no filter: {cause}"),
                (None, Ok(_)) => return Ok(text.to_owned()),
            };
            Err((problem, "give a level (off, error, warn, info, debug, trace), or as in info,mesh_sidecar=debug".into()))
        };
        if let Some(log) = self.parsed(fields.take("log"), filter) {
            telemetry.log = log;
        }
        let format = |text: &str| match text {
            "json" => Ok(LogFormat::Json),
            "pretty" => Ok(LogFormat::Pretty),
            _ => Err(("is no form of logs".to_owned(), did_you_mean(text, ["json", "pretty"].into_iter()))),
        };
        if let Some(format) = self.parsed(fields.take("log_format"), format) {
            telemetry.log_format = format;
        }
        telemetry
    }

    fn limits(&mut self, field: Option<(String, Node)>) -> Limits {
        let mut limits = Limits::default();
        let Some((path, node)) = field else { return limits };
        let known = ["record_size", "publish_timeout", "drain_timeout", "buffer"];
        let Some(mut fields) = self.fields(&path, node, &known) else { return limits };
        let place = fields.place.clone();
        if let Some(bytes) = self.parsed(fields.take("record_size"), |text| size(text, 1 << 10, 100 << 20)) {
            limits.record_bytes = bytes;
        }
        if let Some(duration) = self.parsed(fields.take("publish_timeout"), |text| duration(text, 1, 3_600_000)) {
            limits.publish_timeout = duration;
        }
        if let Some(duration) = self.parsed(fields.take("drain_timeout"), |text| duration(text, 0, 3_600_000)) {
            limits.drain_timeout = duration;
        }
        match self.parsed(fields.take("buffer"), |text| size(text, 64 << 10, 1 << 30)) {
            Some(bytes) if bytes < limits.record_bytes => {
                let problem = format!("does not hold one record of {path}.record_size, {} bytes", limits.record_bytes);
                self.fault(&place, &join(&path, "buffer"), Some(&bytes.to_string()), problem, "make it at least as large");
            }
            Some(bytes) => limits.buffer_bytes = bytes,
            None => limits.buffer_bytes = limits.buffer_bytes.max(limits.record_bytes),
        }
        limits
    }
}
