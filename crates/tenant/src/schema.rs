//! The JSON Schemas of the two kinds of file, made from the types that read them.

use std::sync::OnceLock;

use serde_json::Value;

use crate::config::{GatewayConfig, TenantFile};

/// The JSON Schema of `cofferdam.yaml`.
pub fn gateway_schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schemars::schema_for!(GatewayConfig).to_value())
}

/// The JSON Schema of a tenant's file.
pub fn tenant_schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schemars::schema_for!(TenantFile).to_value())
}
