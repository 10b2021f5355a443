//! The committed JSON Schema is that of the types that read the file.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::PathBuf;

use cofferdam_health::config::health_schema;

#[test]
fn the_committed_schema_is_current() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/schemas/health.schema.json");
    let text = format!("{}\n", serde_json::to_string_pretty(health_schema()).unwrap());
    if std::env::var_os("UPDATE_SCHEMAS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(committed == text, "health.schema.json is not current: run `make schemas` and commit the result");
}
