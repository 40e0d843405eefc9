//! A table in parts: what it declares, and the routes of its services, those of a service in the part that its name gives.
//!
//! A mesh of a thousand services has a table of ten thousand routes, and each sidecar runs ten of them. Who applies a table checks all of it; a sidecar
//! reads, checks and compiles its part. The digest of a table is one over the digests of its parts, so that a part can be told to be genuine without the
//! others: two levels of a Merkle tree.
//!
//! Invariant: put together, the parts are the text that was taken apart, to the byte.
//! Invariant: a part behaves as the whole does, as far as its own routes go.
//! Invariant: which part a service's routes are in, and what a digest is over, never change: both are in the records of the control topic.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use crate::table;

/// A table, as far as it has to be read to find whose its routes are.
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

impl<'t> Root<'t> {
    fn read(json: &'t str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }

    /// What every route has unless it says otherwise.
    fn defaults(&self) -> Option<Owned<'t>> {
        self.spec.defaults.map_or_else(|| Some(Owned::default()), |defaults| Owned::read(defaults.get()))
    }
}

/// Whose a route is.
#[derive(Default, Deserialize)]
struct Owned<'t> {
    #[serde(borrow, default)]
    name: Option<Cow<'t, str>>,
    #[serde(borrow, default)]
    service: Option<Cow<'t, str>>,
    #[serde(borrow, default)]
    group: Option<Cow<'t, str>>,
}

impl<'t> Owned<'t> {
    fn read(json: &'t str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }
}

/// What stands before and behind the routes of every table; in what it declares there are none between.
const BEFORE: &str = "\"routes\":[";
const BEHIND: &str = "]}}";

/// The number of the part that the routes of a service are in.
pub fn part_of(service: &str) -> u8 {
    let [first, ..]: [u8; 32] = Sha256::digest(service).into();
    first
}

/// The digest of a table, `sha256:…`, from those of its parts: SHA-256 over a line for each.
pub fn digest_of(declared: &str, parts: impl IntoIterator<Item = (u8, [u8; 32])>) -> String {
    let mut lines = String::from("mesh/v1 table\n");
    // Writing into a string cannot fail.
    let _ = writeln!(lines, "declared {}", hex(&part_digest(declared)));
    for (number, digest) in parts {
        let _ = writeln!(lines, "part {number} {}", hex(&digest));
    }
    text_digest(&lines)
}

/// `sha256:…` of a text: what the digest of a table was before it had parts.
pub fn text_digest(text: &str) -> String {
    format!("sha256:{}", hex(&part_digest(text)))
}

/// The digest of the text of a part.
pub fn part_digest(text: &str) -> [u8; 32] {
    Sha256::digest(text).into()
}

fn hex(bytes: &[u8; 32]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// A table in parts, or some of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// What it declares beside routes: its canonical JSON, without routes.
    pub declared: String,
    /// The parts by their numbers, of those that have routes. A line for each route: its place in the table, a space, its canonical JSON.
    pub routes: BTreeMap<u8, String>,
}

impl Parts {
    /// Takes apart what [`Table::to_json`](crate::Table::to_json) gave. `None` if it is not plainly that.
    pub fn split(text: &str) -> Option<Self> {
        let mut root = Root::read(text)?;
        let shared = root.defaults()?.service;
        let mut routes: BTreeMap<u8, String> = BTreeMap::new();
        for (place, route) in std::mem::take(&mut root.spec.routes).into_iter().enumerate() {
            let Owned { name, service, .. } = Owned::read(route.get())?;
            let service = name.and(service.as_deref().or(shared.as_deref()))?;
            let _ = writeln!(routes.entry(part_of(service)).or_default(), "{place} {}", route.get());
        }
        let parts = Self { declared: serde_json::to_string(&root).ok()?, routes };
        // White space, the order of fields and line breaks are those of the canonical form, or it is another text.
        (parts.join()? == text).then_some(parts)
    }

    /// The digest of the table, if all its parts are here.
    pub fn digest(&self) -> String {
        digest_of(&self.declared, self.routes.iter().map(|(number, text)| (*number, part_digest(text))))
    }

    /// The text of the table, if all its parts are here; `None` if a route before another is missing, or these are no parts of a table.
    pub fn join(&self) -> Option<String> {
        let routes = self.lines()?;
        let whole = routes.iter().enumerate().all(|(index, (place, _))| index == *place);
        if whole { self.with(routes.into_iter().map(|(_, route)| route)) } else { None }
    }

    /// The routes with their places, in the order of the table.
    fn lines(&self) -> Option<Vec<(usize, &str)>> {
        let line = |line| -> Option<(usize, &str)> {
            let (place, route) = str::split_once(line, ' ')?;
            Some((place.parse().ok()?, route))
        };
        let mut routes: Vec<_> = self.routes.values().flat_map(|text| text.lines()).map(line).collect::<Option<_>>()?;
        routes.sort_by_key(|(place, _)| *place);
        Some(routes)
    }

    /// The text of a table that has these routes.
    fn with<'t>(&self, routes: impl Iterator<Item = &'t str>) -> Option<String> {
        let before = self.declared.strip_suffix(BEHIND).filter(|before| before.ends_with(BEFORE))?;
        let mut text = String::with_capacity(self.declared.len() + self.routes.values().map(String::len).sum::<usize>());
        text += before;
        for (index, route) in routes.enumerate() {
            if index > 0 {
                text.push(',');
            }
            text += route;
        }
        text += BEHIND;
        Some(text)
    }

    /// The table without the routes of services that `serves` denies, and whether there are some in these parts. `None` if these are no parts of a table.
    pub(crate) fn own(&self, serves: impl Fn(&str) -> bool) -> Option<(String, bool)> {
        let shared = Root::read(&self.declared)?.defaults()?.service;
        let routes = self.lines()?;
        let mut own = Vec::with_capacity(routes.len());
        for (_, route) in &routes {
            let service = Owned::read(route)?.service;
            if serves(service.as_deref().or(shared.as_deref())?) {
                own.push(*route);
            }
        }
        let more = own.len() < routes.len();
        Some((self.with(own.into_iter())?, more))
    }

    /// Which routes the consumer groups belong to.
    pub(crate) fn groups(&self, mesh: &str) -> HashMap<Box<str>, Box<str>> {
        let shared = Root::read(&self.declared).and_then(|root| root.defaults()?.group);
        let routes = self.lines().unwrap_or_default();
        let group = |(_, route): (usize, &str)| {
            let Owned { name, group, .. } = Owned::read(route)?;
            let name = name?;
            let group = table::group(mesh, &name, group.as_deref().or(shared.as_deref()));
            Some((group.into(), name.into()))
        };
        routes.into_iter().filter_map(group).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CompiledTable, Faults, load_part, load_stored, parse};

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
  - { name: again, from: [bills], handler: /again, filter: "record.size\n> 9", to: void }
  - { name: send, service: shipping, from: [bills], handler: /send, to: void, group: senders, retry: { topics: [1s] } }
"#;

    fn parts(text: &str) -> Parts {
        Parts::split(text).unwrap()
    }

    /// The part of one service, of a table whose parts these are.
    fn part(all: &Parts, digest: &str, own: &'static str) -> Result<CompiledTable, Faults> {
        let number = part_of(own);
        let some = Parts { routes: all.routes.clone().into_iter().filter(|(known, _)| *known == number).collect(), ..all.clone() };
        let more = some != *all;
        let rest = all.clone();
        load_part("t", digest, &some, more, |service| service == own, Box::new(|| Some(rest)))
    }

    #[test]
    fn a_part_has_its_own_routes_and_what_is_declared_and_knows_whose_the_other_groups_are() {
        let table = parse("t", TABLE).unwrap();
        let (text, digest, all) = (table.to_json(), table.digest(), table.parts());
        assert_eq!((all.join().unwrap(), all.digest()), (text.clone(), digest.clone()));
        let whole = load_stored("t", &text, &digest).unwrap();
        for own in ["pricing", "billing", "shipping", "nobody"] {
            let part = part(&all, &digest, own).unwrap();
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
        let topics = |part: &CompiledTable| part.topics.iter().map(|topic| topic.name.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(topics(&part(&all, &digest, "shipping").unwrap()), "bills never orders send.bills.park send.bills.retry-1 send.dlq");
        let every = load_part("t", &digest, &all, false, |_| true, Box::new(|| None)).unwrap();
        assert!(every.is_whole() && every.routes == whole.routes);
    }

    /// These are in the control topics of meshes.
    #[test]
    fn parts_and_digests_are_what_they_always_were() {
        assert_eq!(["pricing", "billing", "shipping", ""].map(part_of), [30, 12, 116, 227]);
        let all = parse("t", TABLE).unwrap().parts();
        let numbers: Vec<u8> = all.routes.keys().copied().collect();
        assert_eq!(numbers, [12, 30, 116]);
        assert!(all.routes[&30].starts_with("0 {\"name\":\"price\"") && all.routes[&30].contains("\n2 {\"name\":\"again\""));
        assert_eq!(all.digest(), "sha256:eedd79d3d530a89ffec47aff2afd9ba7d92be847a4e4ba28c7702a3f8afd1f34");
        assert_eq!(digest_of("{}", [(7, part_digest("x"))]), "sha256:1541229319f0415db91d34ebe64dcf6fcc2b3d96fa30571f339ab680775082db");
    }

    #[test]
    fn every_part_counts_in_the_digest_and_a_missing_route_is_seen() {
        let all = parse("t", TABLE).unwrap().parts();
        let mut digests = std::collections::HashSet::from([all.digest()]);
        for changed in [
            Parts { declared: all.declared.replace("shop", "shed"), ..all.clone() },
            Parts { routes: all.routes.iter().map(|(number, text)| (number ^ 1, text.clone())).collect(), ..all.clone() },
            Parts { routes: all.routes.iter().map(|(number, text)| (*number, text.replace("price", "prize"))).collect(), ..all.clone() },
        ] {
            assert!(digests.insert(changed.digest()));
        }
        for number in all.routes.keys() {
            let mut some = all.clone();
            some.routes.remove(number);
            // Of the last route that is missing only the digest tells.
            assert!(digests.insert(some.digest()) && some.join().as_ref() != Some(&all.join().unwrap()));
            assert_eq!(some.join().is_none(), *number != part_of("shipping"));
        }
        let odd = Parts { routes: [(0, "no line\n".to_owned())].into(), ..all.clone() };
        assert!(odd.join().is_none());
        let faults = load_part("t", "d", &odd, true, |_| true, Box::new(|| None)).unwrap_err();
        assert!(faults.to_string().contains("parts of the table"), "{faults}");
    }

    /// What is wrong with a part is told of the whole, where it stands there; what is wrong elsewhere is for those who run it.
    #[test]
    fn faults_of_a_part_are_told_with_their_place_in_the_whole() {
        let text = parse("t", TABLE).unwrap().to_json();
        let wrong = text.replace("\"handler\":\"/send\"", "\"handler\":7");
        assert_ne!(wrong, text);
        let faults = |own: &'static str| part(&parts(&wrong), "d", own).err();
        let found = faults("shipping").unwrap();
        assert_eq!(found.0[0].field, "spec.routes[3].handler");
        assert_eq!(found.0[0].column as usize, 1 + wrong.find(":7").unwrap() + 1);
        assert!(faults("pricing").is_none());
    }

    #[test]
    fn what_is_not_plainly_a_stored_table_is_not_taken_apart() {
        let text = parse("t", TABLE).unwrap().to_json();
        assert!(Parts::split(&text).is_some());
        for (from, to) in [
            ("{\"apiVersion\"", "{\"newer\":1,\"apiVersion\""),
            ("\"spec\":{", "\"spec\":{\"newer\":1,"),
            ("\"name\":\"send\",", ""),
            ("\"service\":\"pricing\",", ""),
            ("\"name\":\"send\"", "\"name\":[]"),
            ("\"name\":\"send\"", "\n\"name\":\"send\""),
            ("\"kind\":", "\"kind\": "),
        ] {
            let changed = text.replace(from, to);
            assert!(changed != text && Parts::split(&changed).is_none(), "{to} in place of {from}");
        }
        assert!([TABLE, "{}", "", "[1]"].into_iter().all(|text| Parts::split(text).is_none()));
    }
}
