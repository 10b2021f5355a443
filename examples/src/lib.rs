//! The examples live beside this file; run one with `cargo run -p cofferdam-examples --example embed_http`.
