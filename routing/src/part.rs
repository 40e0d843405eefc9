//! The part of a stored table that one sidecar runs: the routes of its services, and all that the table declares of topics.
//!
//! A mesh of a thousand services has a table of ten thousand routes, and each sidecar runs ten of them. Who applies a table checks all of it; a sidecar
//! reads and compiles its part, and remembers of the others which consumer groups are theirs.
//!
//! Invariant: a part behaves as the whole does, as far as its own routes go. Whatever is not plainly a stored table is not taken apart.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A table, as far as it has to be read to find whose its routes are. With a field that is not known here it is left whole: that is to be told.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Root<'t> {
    #[serde(borrow)]
    api_version: &'t RawValue,
    #[serde(borrow)]
    kind: &'t RawValue,
    #[serde(borrow)]
    metadata: &'t RawValue,
    #[serde(borrow)]
    spec: Spec<'t>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Spec<'t> {
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    topics: Option<&'t RawValue>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    defaults: Option<&'t RawValue>,
    #[serde(borrow)]
    routes: Vec<&'t RawValue>,
}

/// Whose a route is.
#[derive(Deserialize)]
struct Owned<'t> {
    #[serde(borrow, default)]
    name: Option<Cow<'t, str>>,
    #[serde(borrow, default)]
    service: Option<Cow<'t, str>>,
    #[serde(borrow, default)]
    group: Option<Cow<'t, str>>,
}

/// The routes of a table that other sidecars run.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere {
    /// Those with the group that every route has unless it names one.
    names: HashSet<Box<str>>,
    /// The others, by group.
    groups: HashMap<Box<str>, Box<str>>,
}

impl Elsewhere {
    pub(crate) fn is_empty(&self) -> bool {
        self.names.is_empty() && self.groups.is_empty()
    }

    /// The route that has a group.
    pub(crate) fn route_of_group(&self, mesh: &str, group: &str) -> Option<&str> {
        let named = || group.strip_prefix(mesh)?.strip_prefix('.').and_then(|name| self.names.get(name));
        self.groups.get(group).or_else(named).map(|name| &**name)
    }
}

/// A table without the routes of others.
pub(crate) struct Part {
    /// Its JSON.
    pub(crate) text: String,
    /// What is left out.
    pub(crate) elsewhere: Elsewhere,
}

/// Leaves out the routes of services that `serves` denies. `None` if there are none, or the text is not plainly a table.
pub(crate) fn split(text: &str, serves: impl Fn(&str) -> bool) -> Option<Part> {
    let mut root: Root<'_> = serde_json::from_str(text).ok()?;
    let defaults: Option<Owned<'_>> = root.spec.defaults.map(|defaults| serde_json::from_str(defaults.get())).transpose().ok()?;
    let shared = match &defaults {
        Some(Owned { group: Some(_), .. }) => return None,
        Some(defaults) => defaults.service.as_deref(),
        None => None,
    };
    let (mut own, mut elsewhere) = (Vec::new(), Elsewhere::default());
    for route in &root.spec.routes {
        let Owned { name, service, group } = serde_json::from_str(route.get()).ok()?;
        let (name, service) = (name?, service.as_deref().or(shared)?);
        if serves(service) {
            own.push(*route);
            continue;
        }
        let name: Box<str> = name.into();
        match group {
            Some(group) => drop(elsewhere.groups.insert(group.into(), name)),
            None => drop(elsewhere.names.insert(name)),
        }
    }
    root.spec.routes = own;
    if elsewhere.is_empty() { None } else { Some(Part { text: serde_json::to_string(&root).ok()?, elsewhere }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{load_part, load_stored, parse};

    const TABLE: &str = r#"
apiVersion: mesh/v1
kind: RoutingTable
metadata: { mesh: shop }
spec:
  topics:
    orders: { partitions: 6, schema: { json: { type: object } } }
    never: { partitions: 2 }
  defaults: { service: pricing, timeout: 3s, filter: "record.size > 0" }
  routes:
  - { name: price, from: [orders], handler: /price, to: [priced] }
  - { name: bill, service: billing, from: [priced], handler: /bill, to: [bills], cases: [{ status: 202, to: [orders] }] }
  - { name: send, service: shipping, from: [bills], handler: /send, to: void, group: senders, retry: { topics: [1s] } }
"#;

    fn stored(yaml: &str) -> (String, String) {
        let table = parse("t", yaml).unwrap();
        (table.to_json(), table.digest())
    }

    #[test]
    fn a_part_has_its_own_routes_and_what_is_declared_and_knows_whose_the_other_groups_are() {
        let (text, digest) = stored(TABLE);
        let whole = load_stored("t", &text, &digest).unwrap();
        for own in ["pricing", "billing", "shipping", "nobody"] {
            let part = load_part("t", &text, &digest, |service| service == own).unwrap();
            assert!(!part.is_whole() && whole.is_whole());
            assert_eq!((&part.mesh, &part.digest), (&whole.mesh, &whole.digest));
            assert_eq!(part.routes, whole.routes_of(own), "{own}");
            for topic in ["orders", "never"] {
                assert_eq!(part.topic(topic), whole.topic(topic), "{own}: {topic}");
                assert_eq!(part.schema(topic).is_some(), topic == "orders");
            }
            for (group, route) in [("shop.price", "price"), ("shop.bill", "bill"), ("senders", "send")] {
                assert_eq!((part.route_of_group(group), whole.route_of_group(group)), (Some(route), Some(route)), "{own}");
            }
            for group in ["shop.send", "price", "shopprice", "shop.", ""] {
                assert_eq!((part.route_of_group(group), whole.route_of_group(group)), (None, None), "{own}: {group}");
            }
        }
        let topics = |part: &crate::CompiledTable| part.topics.iter().map(|topic| topic.name.to_string()).collect::<Vec<_>>().join(" ");
        let of_shipping = load_part("t", &text, &digest, |service| service == "shipping").unwrap();
        assert_eq!(topics(&of_shipping), "bills never orders send.bills.park send.bills.retry-1 send.dlq");
        let all = load_part("t", &text, &digest, |_| true).unwrap();
        assert!(all.is_whole() && all.routes == whole.routes);
    }

    /// What is wrong with a part is told of the whole, where it stands there; what is wrong elsewhere is for those who run it.
    #[test]
    fn faults_of_a_part_are_told_with_their_place_in_the_whole() {
        let (text, digest) = stored(TABLE);
        let wrong = text.replace("\"handler\":\"/send\"", "\"handler\":7");
        assert_ne!(wrong, text);
        let faults = |own: &'static str| load_part("t", &wrong, &digest, |service| service == own).err();
        let found = faults("shipping").unwrap();
        assert_eq!(found.0[0].field, "spec.routes[2].handler");
        assert_eq!(found.0[0].column as usize, 1 + wrong.find(":7").unwrap() + 1);
        assert!(faults("pricing").is_none());
    }

    #[test]
    fn what_is_not_plainly_a_stored_table_is_not_taken_apart() {
        let (text, _) = stored(TABLE);
        let split = |text: &str| split(text, |service| service == "pricing").is_some();
        assert!(split(&text));
        for (from, to) in [
            ("{\"apiVersion\"", "{\"newer\":1,\"apiVersion\""),
            ("\"spec\":{", "\"spec\":{\"newer\":1,"),
            ("\"name\":\"send\",", ""),
            ("\"service\":\"pricing\",", ""),
            ("\"defaults\":{", "\"defaults\":{\"group\":\"one\","),
            ("\"name\":\"send\"", "\"name\":[]"),
        ] {
            let changed = text.replace(from, to);
            assert!(changed != text && !split(&changed), "{to} in place of {from}");
        }
        assert!(!split(TABLE) && !split("{}") && !split("") && !split("[1]"));
    }
}
