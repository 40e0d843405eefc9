use mesh_routing::sign::SigningKey;
use proptest::{collection, option, prelude::*};

use super::*;

const EXAMPLE: &str = r#"
apiVersion: mesh/v1
kind: Sidecar
mesh: shop
services:                                   # one in a pod; several on a laptop
- { name: pricing, app: "http://127.0.0.1:8080",
    publish: [orders], subscribe: [], token_file: /run/token }
- { name: stock, app: "unix:/run/stock.sock" }
instance: pricing-0
state: ./mesh-state
broker: { embedded: { path: ./mesh-data } } # or kafka
table: { file: routes.yaml }
listen: { api: 127.0.0.1:4500, admin: 127.0.0.1:4501, probe: 127.0.0.1:4502 }
telemetry: { otlp: "http://127.0.0.1:4317" }
"#;

const SMALL: &str =
    "apiVersion: mesh/v1\nkind: Sidecar\nmesh: shop\nservices: [{name: pricing}]\nbroker: {kafka: {bootstrap.servers: \"a:9092\"}}\n";

fn load_text(text: &str, env: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    read::read(Some(("sidecar.yaml", text)), env)
}

/// All faults of a text, one a line.
fn faults(text: &str, env: &[(&str, &str)]) -> Vec<String> {
    load_text(text, env).unwrap_err().faults.iter().map(ToString::to_string).collect()
}

/// The fault of the small file with a further line.
fn fault(line: &str) -> String {
    let [fault] = faults(&format!("{SMALL}{line}\n"), &[]).try_into().unwrap();
    fault
}

#[test]
fn a_word_that_is_no_level_is_no_filter() {
    for (filter, good) in
        [("info", true), ("off", true), ("info,mesh_sidecar=debug", true), ("[span]=debug", true), ("garbage", false), ("info,loud", false)]
    {
        let text = format!(
            "{{ apiVersion: mesh/v1, kind: Sidecar, mesh: m, services: [{{ name: a }}], broker: {{ embedded: {{ path: x }} }}, telemetry: {{ log: '{filter}' }} }}"
        );
        assert_eq!(load_text(&text, &[]).is_ok(), good, "{filter}");
    }
}

#[test]
fn reads_the_example() {
    let config = load_text(EXAMPLE, &[]).unwrap();
    let pricing = config.service("pricing").unwrap();
    assert_eq!(pricing.app, Some(AppAddress::Http("http://127.0.0.1:8080".into())));
    assert_eq!((pricing.publish.as_deref(), pricing.subscribe.as_deref()), (Some(&["orders".to_owned()][..]), Some(&[][..])));
    assert_eq!(config.service("stock").unwrap().app, Some(AppAddress::Unix("/run/stock.sock".into())));
    assert_eq!(config.broker, BrokerConfig::Embedded { path: "./mesh-data".into() });
    assert_eq!(config.table, Some("routes.yaml".into()));
    assert_eq!(config.telemetry.otlp.as_deref(), Some("http://127.0.0.1:4317"));
    assert_eq!((config.mesh.as_ref(), config.instance.as_deref()), ("shop", Some("pricing-0")));
}

#[test]
fn has_defaults() {
    let config = load_text(SMALL, &[]).unwrap();
    assert_eq!(config.listen.api, "127.0.0.1:4500".parse().unwrap());
    assert_eq!((config.listen.admin.port(), config.listen.probe.port()), (4501, 4502));
    assert_eq!(config.telemetry, TelemetryConfig { otlp: None, log: "info".into(), log_format: LogFormat::Json });
    assert_eq!((config.limits.record_bytes, config.limits.publish_timeout), (1 << 20, Duration::from_secs(30)));
    assert_eq!(config.state, PathBuf::from("./mesh-state"));
    assert_eq!((config.table, config.instance, &config.services[0].app), (None, None, &None));
    let embedded = load_text(&SMALL.replace("{kafka: {bootstrap.servers: \"a:9092\"}}", "{embedded: }"), &[]).unwrap();
    assert_eq!(embedded.broker, BrokerConfig::Embedded { path: "./mesh-data".into() });
}

#[test]
fn json_is_read_too() {
    let json = r#"{"apiVersion":"mesh/v1","kind":"Sidecar","mesh":"shop","services":[{"name":"a"}],"broker":{"kafka":{"bootstrap.servers":"b:1","linger.ms":5,"socket.keepalive.enable":true}}}"#;
    let BrokerConfig::Kafka(settings) = load_text(json, &[]).unwrap().broker else { panic!() };
    assert_eq!((settings["linger.ms"].as_str(), settings["socket.keepalive.enable"].as_str()), ("5", "true"));
}

#[test]
fn tells_all_faults_at_once_with_their_places() {
    let text = "\
apiVersion: mesh/v1
kind: Sidecar
mash: shop
services:
- name: pricing
  app: https://127.0.0.1:8080
  publish: [a, a, void, __mesh.control, 'b c']
- name: pricing
- app: ftp://x
- 7
broker: { kafka: {} }
listen: { api: 0.0.0.0:4500, admin: 192.168.0.1:4501, probe: nowhere }
telemetry: { otlp: 'http://u:secret@c:4317', log: 'a=b=c', log_format: xml, colour: yes }
limits: { record_size: 1, publish_timeout: 5, buffer: 1TB }
";
    let faults = faults(text, &[]);
    let expected = [
        "sidecar.yaml: mesh: is missing; name the mesh, as in mesh: shop",
        "sidecar.yaml:3:1: mash: is no field; did you mean mesh?",
        "sidecar.yaml:6:8: services[0].app: \"https://127.0.0.1:8080\" asks for TLS",
        "sidecar.yaml:7:16: services[0].publish[1]: \"a\" is named twice",
        "sidecar.yaml:7:19: services[0].publish[2]: \"void\" is the word for no topic",
        "sidecar.yaml:7:25: services[0].publish[3]: \"__mesh.control\" belongs to the mesh",
        "sidecar.yaml:7:41: services[0].publish[4]: \"b c\" is no name of a topic",
        "sidecar.yaml:8:3: services[1].name: \"pricing\" names two services",
        "sidecar.yaml:9:3: services[2].name: is missing",
        "sidecar.yaml:9:8: services[2].app: \"ftp://x\" is no address of a service",
        "sidecar.yaml:10:3: services[3]: must be a map of fields",
        "sidecar.yaml:11:18: broker.kafka.bootstrap.servers: is missing",
        "sidecar.yaml:12:16: listen.api: \"0.0.0.0:4500\" is reachable from other machines",
        "sidecar.yaml:12:37: listen.admin: \"192.168.0.1:4501\" is reachable from other machines",
        "sidecar.yaml:12:62: listen.probe: \"nowhere\" is no address to listen on",
        "sidecar.yaml:13:20: telemetry.otlp: \"http://…@c:4317\" contains a user",
        "sidecar.yaml:13:51: telemetry.log: \"a=b=c\" is no filter",
        "sidecar.yaml:13:72: telemetry.log_format: \"xml\" is no form of logs",
        "sidecar.yaml:13:77: telemetry.colour: is no field",
        "sidecar.yaml:14:24: limits.record_size: \"1\" is out of range",
        "sidecar.yaml:14:44: limits.publish_timeout: \"5\" is no duration",
        "sidecar.yaml:14:55: limits.buffer: \"1TB\" is no number of bytes",
    ];
    for (fault, expected) in faults.iter().zip(expected) {
        assert!(fault.starts_with(expected), "{fault}\n  should begin with\n{expected}");
    }
    assert_eq!(faults.len(), expected.len(), "{faults:#?}");
    assert!(!faults.join("").contains("secret"));
}

#[test]
fn another_file_and_an_unreadable_one_are_refused() {
    assert_eq!(faults("", &[]).len(), 5);
    assert!(faults(&SMALL.replace("Sidecar", "RoutingTable"), &[])[0].contains("\"RoutingTable\" is not Sidecar"));
    assert!(faults("a: [", &[])[0].contains("not readable as YAML"));
    assert!(faults("just text", &[])[0].contains("must be a map"));
    let error = load(Some(Path::new("/there/is/none.yaml")), std::iter::empty()).unwrap_err();
    assert!(error.to_string().contains("/there/is/none.yaml: cannot be read"), "{error}");
}

#[test]
fn a_hostile_file_is_refused() {
    for hostile in [
        "[".repeat(100_000),
        "{a: ".repeat(100_000),
        format!("mesh: {}{}", "[".repeat(1_000), "]".repeat(1_000)),
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\ne: [*d, *d]\n".to_owned(),
        "<<: *nothing".to_owned(),
        "\u{feff}\0".to_owned(),
    ] {
        assert!(!faults(&hostile, &[]).is_empty());
    }
}

#[test]
fn refuses_what_is_ambiguous() {
    assert!(fault("mesh: other").contains("6:1: mesh: is set twice"));
    assert!(fault("instance: 1.10").contains("put it in quotes"));
    assert!(fault("instance: [a]").contains("must be text"));
    assert!(fault("labels: [a]").contains("must be a map of names and values"));
    assert!(fault("labels: {zone: a/b}").contains("labels.zone: \"a/b\" is no value of a label"));
    assert!(fault("labels: {\"a b\": c}").contains("is no name of a label"));
    assert!(fault("listen: {probe: '[::1]:4500', admin: '[::1]:4500'}").contains("is also the address of listen.admin"));
    let both = SMALL.replace("{kafka:", "{embedded: {path: x}, kafka:");
    assert!(faults(&both, &[])[0].contains("has both embedded and kafka"));
    let nested = SMALL.replace("bootstrap.servers: \"a:9092\"", "bootstrap: {servers: a}");
    assert!(faults(&nested, &[]).iter().any(|fault| fault.contains("write the names with dots, as in bootstrap.…")));
}

fn key(seed: u8) -> PublicKey {
    SigningKey::from_random(&[seed; 32]).public()
}

#[test]
fn trusted_keys_are_checked_and_never_emptied_by_accident() {
    let (one, two) = (key(1), key(2));
    let config = load_text(&format!("{SMALL}control: {{trusted_keys: [{one}, \"{two}\"]}}\n"), &[]).unwrap();
    assert_eq!(config.control.trusted_keys, [one.clone(), two.clone()]);
    assert!(load_text(SMALL, &[]).unwrap().control.trusted_keys.is_empty());
    let both = format!("{one}, {two}");
    let config = load_text(&format!("{SMALL}control: {{trusted_keys: [{two}]}}\n"), &[("MESH_CONTROL_TRUSTED_KEYS", &both)]).unwrap();
    assert_eq!(config.control.trusted_keys, [one.clone(), two.clone()]);

    assert!(
        fault("control: {trusted_keys: []}").contains("6:25: control.trusted_keys: must be a list of public keys, and not an empty one")
    );
    assert!(fault("control: {trusted_keys: }").contains("not an empty one"));
    assert!(fault(&format!("control: {{trusted_keys: {one}}}")).contains("must be a list"));
    assert!(fault(&format!("control: {{trusted_keys: [{one}, {one}]}}")).contains("control.trusted_keys[1]: \"ed25519:"));
    assert!(fault("control: {trusted_keys: [rsa]}").contains("is no public key: one begins with ed25519:"));
    assert!(fault("control: {trusted_key: [rsa]}").contains("did you mean trusted_keys?"));
    let private = SigningKey::from_random(&[3; 32]).to_file();
    let private = private.lines().last().unwrap();
    let fault = fault(&format!("control: {{trusted_keys: [{private}]}}"));
    assert!(fault.contains("is a private key") && !fault.contains(private), "{fault}");
}

#[test]
fn listeners_are_closed_to_others() {
    let open = |listen: &str| load_text(&format!("{SMALL}listen: {listen}\n"), &[]);
    assert!(open("{probe: '0.0.0.0:4502'}").is_ok());
    assert!(open("{api: '[::1]:4500', admin: 'localhost:0', probe: 'localhost:0'}").is_ok());
    assert!(open("{api: '0.0.0.0:4500'}").unwrap_err().to_string().contains("token_file"));
    assert!(open("{admin: '0.0.0.0:4501'}").is_err());
    assert!(open("{admin: '127.0.0.1:4500'}").unwrap_err().to_string().contains("is also the address of listen.api"));
    let tokens = SMALL.replace("{name: pricing}", "{name: pricing, token_file: /run/token}");
    let listen = |listen: &str| load_text(&format!("{tokens}listen: {listen}\n"), &[]);
    assert!(listen("{api: '0.0.0.0:4500'}").is_ok());
    assert!(listen("{admin: '0.0.0.0:4501'}").is_err(), "a service's token does not open the mesh's control");
    let one = tokens.replace("}]", "}, {name: stock}]");
    assert!(load_text(&format!("{one}listen: {{api: '0.0.0.0:4500'}}\n"), &[]).is_err(), "every service needs its token");
}

#[test]
fn a_listener_with_tls_or_its_own_tokens_may_be_open() {
    let with = |more: &str| load_text(&format!("{SMALL}{more}\n"), &[]);
    let problem = |more: &str| with(more).unwrap_err().to_string();
    let config = with("listen: {api: '0.0.0.0:4500', tls: {api: {cert: /c, key: /k}}}").unwrap();
    assert_eq!(config.tls.api, Some(TlsFiles { cert: "/c".into(), key: "/k".into(), client_ca: None }));
    assert!(
        problem("listen: {admin: '0.0.0.0:4501', tls: {admin: {cert: /c, key: /k}}}").contains("client_ca"),
        "TLS alone lets everybody in"
    );
    assert!(with("listen: {admin: '0.0.0.0:4501', tls: {admin: {cert: /c, key: /k, client_ca: /ca}}}").is_ok());
    let tokens = "control: {tokens: [{name: ci, file: /t, role: write}, {name: board, file: /u, role: read}]}";
    let config = with(&format!("listen: {{admin: '0.0.0.0:4501'}}\n{tokens}")).unwrap();
    assert_eq!(config.control.tokens[1], AdminToken { name: "board".into(), file: "/u".into(), role: Role::Read });
    assert!(problem("listen: {tls: {api: {cert: /c}}}").contains("listen.tls.api.key: is missing"));
    assert!(problem("listen: {tls: {probe: {cert: /c}}}").contains("listen.tls.probe: is no field"));
    assert!(problem("control: {tokens: [{name: ci, file: /t}]}").contains("control.tokens[0].role: is missing; give read or write"));
    assert!(problem("control: {tokens: [{name: ci, file: /t, role: admin}]}").contains("\"admin\" is no role"));
    assert!(problem("control: {tokens: [{file: /t, role: read}]}").contains("control.tokens[0].name: is missing"));
    assert!(problem("control: {tokens: [{name: a, file: /t, role: read}, {name: a, file: /u, role: read}]}").contains("names two tokens"));
    assert!(problem("control: {certificates: [{name: 'sha256:ab', role: read}]}").contains("is no fingerprint"));
    assert!(problem("control: {tokens: x}").contains("control.tokens: must be a list"));
    let env = [
        ("MESH_LISTEN_TLS_ADMIN_CERT", "/c"),
        ("MESH_LISTEN_TLS_ADMIN_KEY", "/k"),
        ("MESH_CONTROL_TOKENS", "[{name: a, file: /t, role: read}]"),
    ];
    let config = load_text(SMALL, &env).unwrap();
    assert_eq!(config.tls.admin.unwrap().key, Path::new("/k"));
    assert_eq!(config.control.tokens.len(), 1);
}

#[test]
fn addresses_of_services_hold_no_surprises() {
    let app = |app: &str| load_text(&SMALL.replace("{name: pricing}", &format!("{{name: pricing, app: '{app}'}}")), &[]);
    for (text, good) in [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
        ("http://localhost", "http://localhost"),
        ("h2c://[::1]:8080", "h2c://[::1]:8080"),
        ("grpc://pricing:50051", "grpc://pricing:50051"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
        ("unix:///run/a.sock", "unix:/run/a.sock"),
    ] {
        assert_eq!(app(text).unwrap().services[0].app.as_ref().unwrap().to_string(), good);
    }
    for bad in [
        "127.0.0.1:8080",
        "http://",
        "http://user:secret@127.0.0.1:8080",
        "http://127.0.0.1:8080/price",
        "http://127.0.0.1:8080?x=1",
        "http://127.0.0.1:8080#x",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:",
        "http://127.0.0.1:0",
        "https://127.0.0.1:8443",
        "HTTP://a b",
        "unix:run/a.sock",
        "unix:",
        "file:///etc/passwd",
    ] {
        let error = app(bad).unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn the_environment_comes_over_the_file() {
    let config = load_text(
        EXAMPLE,
        &[
            ("MESH_MESH", "other"),
            ("MESH_INSTANCE", ""),
            ("MESH_BROKER_KAFKA_BOOTSTRAP_SERVERS", "k:9092"),
            ("MESH_BROKER_KAFKA_SASL_PASSWORD", "hunter2"),
            ("MESH_TABLE_FILE", "/etc/routes.yaml"),
            ("MESH_LISTEN_API", "127.0.0.1:7000"),
            ("MESH_TELEMETRY_LOG", "debug"),
            ("MESH_TELEMETRY_LOG_FORMAT", "pretty"),
            ("MESH_LIMITS_RECORD_SIZE", "2MiB"),
            ("MESH_LIMITS_DRAIN_TIMEOUT", "1m 30s"),
            ("MESH_SERVICES_0_APP", "grpc://127.0.0.1:9000"),
            ("MESH_SERVICES_0_PUBLISH", "orders, returns"),
            ("MESH_SERVICES_2_NAME", "mail"),
            ("MESH_SERVICES_2_SUBSCRIBE", "[sent]"),
            ("MESH_ADMIN", "http://127.0.0.1:4501"),
            ("MESH_SIDECAR_SERVICE_HOST", "10.0.0.1"),
            ("MESH_SIDECAR_SERVICE_PORT_ADMIN", "4501"),
            ("MESH_SIDECAR_PORT", "tcp://10.0.0.1:4500"),
            ("MESH_SIDECAR_PORT_4500_TCP_ADDR", "10.0.0.1"),
            ("PATH", "/bin"),
        ],
    )
    .unwrap();
    assert_eq!((config.mesh.as_ref(), config.instance.as_deref()), ("other", Some("pricing-0")), "what is empty counts as not set");
    let BrokerConfig::Kafka(settings) = &config.broker else { panic!("the file's broker is replaced") };
    assert_eq!((settings["bootstrap.servers"].as_str(), settings["sasl.password"].as_str()), ("k:9092", "hunter2"));
    assert!(!format!("{config:?}").contains("hunter2") && !print(&config).contains("hunter2"));
    assert_eq!((config.table.as_deref(), config.listen.api.port()), (Some(Path::new("/etc/routes.yaml")), 7000));
    assert_eq!((config.telemetry.log.as_str(), config.telemetry.log_format), ("debug", LogFormat::Pretty));
    assert_eq!(config.telemetry.otlp.as_deref(), Some("http://127.0.0.1:4317"), "what is not set is kept");
    assert_eq!((config.limits.record_bytes, config.limits.drain_timeout), (2 << 20, Duration::from_secs(90)));
    assert_eq!(config.services[0].app, Some(AppAddress::Grpc("grpc://127.0.0.1:9000".into())));
    assert_eq!(config.services[0].publish.as_deref().unwrap(), ["orders", "returns"]);
    assert_eq!((config.services[2].name.as_ref(), config.services[2].subscribe.as_deref().unwrap()), ("mail", &["sent".to_owned()][..]));
}

#[test]
fn the_environment_is_enough() {
    let env = [
        ("MESH_MESH", "shop"),
        ("MESH_SERVICES", "[{name: pricing, app: 'http://127.0.0.1:8080'}, {name: stock}]"),
        ("MESH_BROKER_EMBEDDED_PATH", "/data"),
        ("MESH_LISTEN", "{api: '127.0.0.1:1'}"),
    ];
    let config = load(None, env.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()))).unwrap();
    assert_eq!((config.services.len(), config.listen.api.port()), (2, 1));
    assert_eq!(config.broker, BrokerConfig::Embedded { path: "/data".into() });
    let error = load(None, std::iter::empty()).unwrap_err().to_string();
    assert!(error.contains("configuration: mesh: is missing"), "{error}");
}

#[test]
fn faults_of_the_environment_name_the_variable() {
    let faults = faults(
        SMALL,
        &[
            ("MESH_LISTEN_APIS", "127.0.0.1:1"),
            ("MESH_INSTANZ", "a"),
            ("MESH_LIMITS_BUFFER", "much"),
            ("MESH_SERVICES_3_NAME", "x"),
            ("MESH_TELEMETRY", "{log: [}"),
            ("MESH_BROKER_EMBEDDED_PATH", "x"),
            ("MESH_BROKER_KAFKA_LINGER_MS", "5"),
        ],
    );
    for expected in [
        "environment variable MESH_LISTEN_APIS: sets no field; did you mean MESH_LISTEN_API?",
        "environment variable MESH_INSTANZ: sets no field; did you mean MESH_INSTANCE?",
        "environment variable MESH_LIMITS_BUFFER: limits.buffer: \"much\" is no number of bytes",
        "environment variable MESH_SERVICES_3_NAME: services: there is no service 1 before service 3",
        "environment variable MESH_TELEMETRY: not readable as YAML",
        "environment variable MESH_BROKER_KAFKA_LINGER_MS: broker: has both embedded and kafka",
    ] {
        assert!(faults.iter().any(|fault| fault.starts_with(expected)), "{expected}\n{faults:#?}");
    }
    assert_eq!(faults.len(), 6, "{faults:#?}");
}

#[test]
fn secrets_are_redacted() {
    let secrets =
        ["sasl.password", "sasl.username", "ssl.key.pem", "ssl.key.password", "sasl.oauthbearer.client.secret", "ssl.keystore.password"];
    let lines: String = secrets.iter().map(|key| format!(", {key}: hush")).collect();
    let config = load_text(&SMALL.replace("\"a:9092\"", &format!("\"a:9092\", sasl.mechanism: PLAIN{lines}")), &[]).unwrap();
    let printed = print(&config);
    assert!(!printed.contains("hush") && printed.contains("sasl.mechanism: PLAIN"), "{printed}");
    assert!(load_text(&printed, &[]).is_ok(), "{printed}");
}

fn addresses() -> impl Strategy<Value = AppAddress> {
    prop_oneof![
        "[a-z][a-z0-9]{0,9}:[1-9][0-9]{0,3}".prop_map(|at| AppAddress::Http(format!("http://{at}"))),
        "[a-z][a-z0-9]{0,9}".prop_map(|at| AppAddress::H2c(format!("h2c://{at}"))),
        "10[.]0[.]0[.][1-9]:[1-9][0-9]{0,3}".prop_map(|at| AppAddress::Grpc(format!("grpc://{at}"))),
        "/[ -~é]{1,40}".prop_map(|path| AppAddress::Unix(path.into())).prop_filter("two slashes", |a| !a.to_string().contains("//")),
    ]
}

fn topics() -> impl Strategy<Value = Vec<String>> {
    let topic = "[a-zA-Z0-9._-]{1,20}".prop_filter("a name", |t| !t.starts_with("__") && !matches!(t.as_str(), "." | ".." | "void"));
    collection::btree_set(topic, 0..4).prop_map(|topics| topics.into_iter().collect())
}

fn paths() -> impl Strategy<Value = PathBuf> {
    "[ -~é\t]{1,30}".prop_map(PathBuf::from)
}

fn services() -> impl Strategy<Value = Vec<ServiceConfig>> {
    let name = "[a-zA-Z0-9][a-zA-Z0-9._-]{0,12}";
    let rest = (option::of(addresses()), option::of(topics()), option::of(topics()), option::of(paths()));
    collection::btree_map(name, rest, 1..4).prop_map(|services| {
        let service = |(name, (app, publish, subscribe, token_file)): (String, _)| ServiceConfig {
            name: name.into(),
            app,
            publish,
            subscribe,
            token_file,
        };
        services.into_iter().map(service).collect()
    })
}

fn brokers() -> impl Strategy<Value = BrokerConfig> {
    let setting = ("[a-z]{1,8}([.][a-z]{1,8}){0,3}", prop_oneof!["[ -~é\n]{0,30}", "[^\\x00]{0,10}"]);
    let settings = collection::vec(setting, 0..5).prop_map(|settings| {
        let mut settings: BTreeMap<String, String> = settings.into_iter().filter(|(key, _)| !print::is_secret(key)).collect();
        settings.insert("bootstrap.servers".into(), "a:9092,b:9092".into());
        BrokerConfig::Kafka(settings)
    });
    prop_oneof![paths().prop_map(|path| BrokerConfig::Embedded { path }), settings]
}

fn tls() -> impl Strategy<Value = ListenTls> {
    let files = || (paths(), paths(), option::of(paths())).prop_map(|(cert, key, client_ca)| TlsFiles { cert, key, client_ca });
    (option::of(files()), option::of(files())).prop_map(|(api, admin)| ListenTls { api, admin })
}

fn control() -> impl Strategy<Value = ControlConfig> {
    let role = || prop_oneof![Just(Role::Read), Just(Role::Write)];
    let tokens = collection::btree_map("[a-z][a-z0-9.-]{0,9}", (paths(), role()), 0..3);
    let certificates = collection::btree_map(prop_oneof!["[a-z][a-z0-9.-]{0,20}", "spiffe://[a-z]{1,9}/[a-z]{1,9}"], role(), 0..3);
    (tokens, certificates).prop_map(|(tokens, certificates)| ControlConfig {
        tokens: tokens.into_iter().map(|(name, (file, role))| AdminToken { name, file, role }).collect(),
        certificates: certificates.into_iter().map(|(name, role)| AdminCertificate { name, role }).collect(),
        ..ControlConfig::default()
    })
}

prop_compose! {
    fn configs()(
        mesh in "[a-zA-Z0-9][a-zA-Z0-9._-]{0,20}",
        services in services(),
        instance in option::of("[a-zA-Z0-9][a-zA-Z0-9._-]{0,20}"),
        labels in collection::btree_map("[a-zA-Z0-9._-]{1,9}", "[a-zA-Z0-9._-]{1,9}", 0..3),
        state in paths(),
        broker in brokers(),
        table in option::of(paths()),
        keys in collection::btree_set(any::<u8>(), 0..3),
        ports in (1_u16..20_000, 20_000_u16..40_000, 40_000_u16..60_000),
        otlp in option::of("[a-z]{1,9}:[1-9][0-9]{0,3}"),
        log in prop_oneof![Just("info"), Just("warn,mesh_sidecar=debug"), Just("off")],
        pretty in any::<bool>(),
        record_bytes in 1_usize << 10..100 << 20,
        publish_ms in 1_u64..3_600_000,
        drain_ms in 0_u64..3_600_000,
        buffer_bytes in 100_usize << 20..1 << 30,
        (tls, control) in (tls(), control()),
    ) -> Config {
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Config {
            mesh: mesh.into(),
            services,
            instance,
            labels,
            state,
            broker,
            table,
            listen: Listen { api: local(ports.0), admin: local(ports.1), probe: SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 0], ports.2)) },
            tls,
            control: ControlConfig { trusted_keys: keys.into_iter().map(key).collect(), ..control },
            telemetry: TelemetryConfig {
                otlp: otlp.map(|at| format!("http://{at}")),
                log: log.into(),
                log_format: if pretty { LogFormat::Pretty } else { LogFormat::Json },
            },
            limits: Limits {
                record_bytes,
                publish_timeout: Duration::from_millis(publish_ms),
                drain_timeout: Duration::from_millis(drain_ms),
                buffer_bytes,
            },
        }
    }
}

proptest! {
    #[test]
    fn what_is_printed_is_read(config in configs()) {
        let printed = print(&config);
        let read = load_text(&printed, &[]);
        prop_assert_eq!(read, Ok(config), "{}", printed);
    }

    #[test]
    fn no_text_panics(text in "[ -~\n]{0,200}", env in collection::vec(("MESH_[A-Z0-9_]{0,30}", "[ -~]{0,30}"), 0..4)) {
        let _ = read::read(Some(("f", &text)), env.into_iter());
    }

    #[test]
    fn no_change_of_the_example_panics(at in 0..EXAMPLE.len(), with in "[ -~\n]{0,3}") {
        prop_assume!(EXAMPLE.is_char_boundary(at));
        let mut text = EXAMPLE.to_owned();
        text.replace_range(at..=at, &with);
        let _ = load_text(&text, &[]);
    }
}
