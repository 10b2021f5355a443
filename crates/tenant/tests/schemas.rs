//! The committed JSON Schemas are those of the types that read the files.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::PathBuf;

use cofferdam_tenant::{gateway_schema, tenant_schema};

#[test]
fn the_committed_schemas_are_current() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/schemas");
    for (name, schema) in [("cofferdam.schema.json", gateway_schema()), ("tenant.schema.json", tenant_schema())] {
        let path = directory.join(name);
        let text = format!("{}\n", serde_json::to_string_pretty(schema).unwrap());
        if std::env::var_os("UPDATE_SCHEMAS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap();
        assert!(committed == text, "{name} is not current: run `make schemas` and commit the result");
    }
}
