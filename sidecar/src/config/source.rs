//! The raw configuration: the file's YAML as a tree that knows where each value was written, with the environment laid over it.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Spanned};

use super::fault::{Fault, Place, did_you_mean};

/// What the names of the variables begin with.
pub(super) const PREFIX: &str = "MESH_";

/// Variables that begin so and belong to somebody else: `mesh-ctl`, and the command line's own.
const FOREIGN: [&str; 8] =
    ["MESH_ADMIN", "MESH_CA", "MESH_CLIENT_CERT", "MESH_CLIENT_KEY", "MESH_CONFIG", "MESH_OUTPUT", "MESH_SIGN_KEY", "MESH_TOKEN_FILE"];

/// A value and where it was written.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    Null,
    /// Text, a number or a boolean. `exact` is false where the text may differ from what was written: `1.10` is read as a number.
    Scalar {
        text: String,
        exact: bool,
    },
    List(Vec<Node>),
    /// In the order of the file; names may repeat.
    Map(Vec<Entry>),
}

/// A field of a map.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) node: Node,
}

impl Node {
    pub(super) fn scalar(place: Place, text: impl Into<String>) -> Self {
        Self { place, value: Value::Scalar { text: text.into(), exact: true } }
    }

    fn map(place: Place) -> Self {
        Self { place, value: Value::Map(Vec::new()) }
    }
}

/// Reads YAML (or JSON, which is YAML). `at` makes a place of a line and a column.
pub(super) fn parse(text: &str, at: &dyn Fn(u64, u64) -> Place) -> Result<Node, Box<Fault>> {
    let options = serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Spanned<Raw>>(text, options) {
        Ok(raw) => Ok(raw_node(raw, at)),
        Err(error) => {
            let (line, column) = error.location().map_or((0, 0), |location| (location.line(), location.column()));
            Err(Box::new(Fault {
                place: at(line, column),
                field: String::new(),
                value: None,
                problem: format!("not readable as YAML: {}", error.without_snippet()),
                hint: String::new(),
            }))
        }
    }
}

fn raw_node(raw: Spanned<Raw>, at: &dyn Fn(u64, u64) -> Place) -> Node {
    let place = at(raw.referenced.line(), raw.referenced.column());
    let value = match raw.value {
        Raw::Null => Value::Null,
        Raw::Scalar { text, exact } => Value::Scalar { text, exact },
        Raw::List(items) => Value::List(items.into_iter().map(|item| raw_node(item, at)).collect()),
        Raw::Map(entries) => Value::Map(
            entries
                .into_iter()
                .map(|(name, node)| Entry {
                    place: at(name.referenced.line(), name.referenced.column()),
                    name: name.value,
                    node: raw_node(node, at),
                })
                .collect(),
        ),
    };
    Node { place, value }
}

/// YAML as it is.
enum Raw {
    Null,
    Scalar { text: String, exact: bool },
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<String>, Spanned<Raw>)>),
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

fn exact<E>(text: impl ToString) -> Result<Raw, E> {
    Ok(Raw::Scalar { text: text.to_string(), exact: true })
}

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Raw, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Raw, E> {
        exact(value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Raw, E> {
        exact(value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Raw, E> {
        exact(value)
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Raw, E> {
        exact(value)
    }

    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Raw, E> {
        exact(value)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Scalar { text: value.to_string(), exact: false })
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Raw, E> {
        exact(text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Raw, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Raw::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Raw::Map(entries))
    }
}

/// The fields that the environment can set, by their paths. A path that has fields of its own takes YAML.
const FIELDS: [&[&str]; 37] = [
    &["mesh"],
    &["services"],
    &["instance"],
    &["labels"],
    &["state"],
    &["broker"],
    &["broker", "embedded"],
    &["broker", "embedded", "path"],
    &["broker", "kafka"],
    &["table"],
    &["table", "file"],
    &["listen"],
    &["listen", "api"],
    &["listen", "admin"],
    &["listen", "probe"],
    &["listen", "tls"],
    &["listen", "tls", "api"],
    &["listen", "tls", "api", "cert"],
    &["listen", "tls", "api", "key"],
    &["listen", "tls", "api", "client_ca"],
    &["listen", "tls", "admin"],
    &["listen", "tls", "admin", "cert"],
    &["listen", "tls", "admin", "key"],
    &["listen", "tls", "admin", "client_ca"],
    &["control"],
    &["control", "trusted_keys"],
    &["control", "tokens"],
    &["control", "certificates"],
    &["telemetry"],
    &["telemetry", "otlp"],
    &["telemetry", "log"],
    &["telemetry", "log_format"],
    &["limits"],
    &["limits", "record_size"],
    &["limits", "publish_timeout"],
    &["limits", "drain_timeout"],
    &["limits", "buffer"],
];

/// The fields of a service.
pub(super) const SERVICE_FIELDS: [&str; 5] = ["name", "app", "publish", "subscribe", "token_file"];

/// The name of the variable that sets a field.
fn variable(path: &[&str]) -> String {
    format!("{PREFIX}{}", path.join("_").to_uppercase())
}

/// Lays the environment over the tree. A variable that is empty counts as not set.
pub(super) fn overlay(root: &mut Node, env: impl Iterator<Item = (String, String)>, faults: &mut Vec<Fault>) {
    let mut variables: Vec<(String, String)> =
        env.filter(|(name, value)| name.starts_with(PREFIX) && !value.is_empty() && !is_foreign(name, value)).collect();
    // A whole before its parts, and list items in their order.
    variables.sort_by_cached_key(|(name, _)| name.split('_').map(|word| (word.parse::<usize>().ok(), word.to_owned())).collect::<Vec<_>>());
    for (name, value) in variables {
        let place = Place::Env(name.clone());
        if let Some(path) = FIELDS.iter().find(|path| variable(path) == name) {
            match read(path, &value, &place) {
                Ok(node) => set(root, path, node, &place),
                Err(fault) => faults.push(*fault),
            }
        } else if let Some(key) = name.strip_prefix("MESH_BROKER_KAFKA_").filter(|key| !key.is_empty()) {
            let key = key.to_lowercase().replace('_', ".");
            set(root, &["broker", "kafka", &key], Node::scalar(place.clone(), value), &place);
        } else if let Some((index, field)) = service_field(&name) {
            if let Err(problem) = set_service(root, index, field, list_or_scalar(field, &value, &place), &place) {
                faults.push(Fault {
                    place,
                    field: "services".into(),
                    value: None,
                    problem,
                    hint: "number them from 0, without gaps".into(),
                });
            }
        } else {
            let mut known: Vec<String> = FIELDS.iter().map(|path| variable(path)).collect();
            known.extend(SERVICE_FIELDS.iter().map(|field| format!("MESH_SERVICES_0_{}", field.to_uppercase())));
            known.push("MESH_BROKER_KAFKA_<KEY>".into());
            let hint = did_you_mean(&name, known.iter().map(String::as_str));
            faults.push(Fault { place, field: String::new(), value: None, problem: "sets no field".into(), hint });
        }
    }
}

/// Variables that are not ours: other tools', and those that Kubernetes makes for a Service whose name begins with `mesh`.
fn is_foreign(name: &str, value: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    let of_port = |name: &str| {
        let name = ["_PROTO", "_PORT", "_ADDR"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        let port = ["_TCP", "_UDP", "_SCTP"].iter().find_map(|end| name.strip_suffix(end));
        port.and_then(|port| port.rsplit_once("PORT_")).is_some_and(|(_, number)| digits(number))
    };
    FOREIGN.contains(&name)
        || (cfg!(feature = "mutations") && name == "MESH_MUTATION")
        || name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || (name.ends_with("_PORT") && value.contains("://"))
        || of_port(name)
}

fn service_field(name: &str) -> Option<(usize, &'static str)> {
    let (index, field) = name.strip_prefix("MESH_SERVICES_")?.split_once('_')?;
    let field = SERVICE_FIELDS.iter().find(|known| known.to_uppercase() == field)?;
    Some((index.parse().ok()?, field))
}

/// Reads a variable: YAML where the field has fields of its own, a list of names where it is one, else plain text.
fn read(path: &[&str], value: &str, place: &Place) -> Result<Node, Box<Fault>> {
    match path {
        ["services" | "labels" | "broker" | "table" | "listen" | "control" | "telemetry" | "limits"]
        | ["broker", "embedded" | "kafka"]
        | ["listen", "tls"]
        | ["listen", "tls", "api" | "admin"]
        | ["control", "tokens" | "certificates"] => parse(value, &|_, _| place.clone()),
        [.., field] => Ok(list_or_scalar(field, value, place)),
        [] => Ok(Node::scalar(place.clone(), value)),
    }
}

/// A list of names: `a,b`, or YAML.
fn list_or_scalar(field: &str, value: &str, place: &Place) -> Node {
    if !matches!(field, "publish" | "subscribe" | "trusted_keys") {
        return Node::scalar(place.clone(), value);
    }
    if value.trim_start().starts_with('[')
        && let Ok(node) = parse(value, &|_, _| place.clone())
    {
        return node;
    }
    let items = value.split(',').map(str::trim).filter(|item| !item.is_empty());
    Node { place: place.clone(), value: Value::List(items.map(|item| Node::scalar(place.clone(), item)).collect()) }
}

/// Sets a field, and makes the maps on the way to it. The environment's choice of broker replaces the file's.
fn set(root: &mut Node, path: &[&str], node: Node, place: &Place) {
    let Some((first, rest)) = path.split_first() else {
        *root = node;
        return;
    };
    if !matches!(root.value, Value::Map(_)) {
        *root = Node::map(place.clone());
    }
    if let Value::Map(entries) = &mut root.value {
        if matches!(*first, "embedded" | "kafka") {
            root.place = place.clone();
            entries.retain(|entry| entry.name == *first || matches!(entry.place, Place::Env(_)));
        }
        let at = entries.iter().position(|entry| entry.name == *first).unwrap_or_else(|| {
            entries.push(Entry { name: (*first).to_owned(), place: place.clone(), node: Node::map(place.clone()) });
            entries.len() - 1
        });
        if let Some(entry) = entries.get_mut(at) {
            entry.place = place.clone();
            set(&mut entry.node, rest, node, place);
        }
    }
}

fn set_service(root: &mut Node, index: usize, field: &str, node: Node, place: &Place) -> Result<(), String> {
    let present = match &root.value {
        Value::Map(entries) => entries.iter().any(|entry| entry.name == "services" && matches!(entry.node.value, Value::List(_))),
        _ => false,
    };
    if !present {
        set(root, &["services"], Node { place: place.clone(), value: Value::List(Vec::new()) }, place);
    }
    let Value::Map(entries) = &mut root.value else { return Ok(()) };
    for entry in entries.iter_mut().filter(|entry| entry.name == "services") {
        if let Value::List(services) = &mut entry.node.value {
            if index > services.len() {
                return Err(format!("there is no service {} before service {index}", services.len()));
            }
            if index == services.len() {
                services.push(Node::map(place.clone()));
            }
            if let Some(service) = services.get_mut(index) {
                set(service, &[field], node, place);
            }
            return Ok(());
        }
    }
    Ok(())
}
