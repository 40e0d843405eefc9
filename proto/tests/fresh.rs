//! The committed code is what the `.proto` files say. `UPDATE=1 cargo test -p mesh-proto` writes it anew.

use std::{fs, path::Path};

use prost::Message as _;

const FILES: [&str; 7] = ["record", "mesh", "handler", "command", "topics", "doctor", "control"];

#[test]
fn generated_code_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = FILES.map(|name| format!("mesh/v1/{name}.proto"));
    let descriptors = protox::compile(&files, [root.join("proto")]).expect("the .proto files compile");

    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generated");
    fs::create_dir_all(&out).expect("a folder for the output");
    // Comments go to the .proto files' readers: the descriptor set for reflection is smaller without them.
    let mut bare = descriptors.clone();
    bare.file.iter_mut().for_each(|file| file.source_code_info = None);
    fs::write(out.join("mesh.v1.bin"), bare.encode_to_vec()).expect("descriptor set");
    tonic_prost_build::configure().bytes(".").out_dir(&out).compile_fds(descriptors).expect("code generation");

    let committed = root.join("src/generated");
    for name in ["mesh.v1.rs", "mesh.v1.bin"] {
        let fresh = fs::read(out.join(name)).expect("generated file");
        if std::env::var_os("UPDATE").is_some() {
            fs::write(committed.join(name), &fresh).expect("write generated file");
        }
        let stored = fs::read(committed.join(name)).unwrap_or_default();
        assert!(stored == fresh, "src/generated/{name} is stale: run `UPDATE=1 cargo test -p mesh-proto` and commit it");
    }
}

/// Every message, field, enum value, service and method carries a comment: they are the API reference.
#[test]
fn everything_is_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in FILES {
        let text = fs::read_to_string(root.join(format!("proto/mesh/v1/{name}.proto"))).expect("proto file");
        let mut previous = "";
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            let declares = ["message ", "enum ", "service ", "rpc ", "oneof "].iter().any(|word| line.starts_with(word))
                || (line.contains(" = ") && !line.starts_with("syntax") && !line.starts_with("//"));
            assert!(!declares || previous.starts_with("//"), "{name}.proto:{}: `{line}` has no comment", number + 1);
            previous = line;
        }
    }
}
