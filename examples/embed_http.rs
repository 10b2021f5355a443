//! Embeds the HTTP plane alone: the program's own runtime, its own socket, its configuration as text.
//!
//! `cargo run -p cofferdam-examples --example embed_http -- 127.0.0.1:8069`

use std::net::TcpListener;

use cofferdam::Gateway;
use cofferdam::tenant::{Source, SourceSet};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().init();
    let odoo = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8069".to_owned());
    let sources = SourceSet {
        main: Source::new(
            "embedded",
            format!(
                "http: {{ listen: ['127.0.0.1:0'] }}
pools: {{ odoo: {{ servers: [{{ address: '{odoo}' }}], slots: 6 }} }}
plans: {{ standard: {{ http: {{ limit: 4 }} }} }}"
            ),
        ),
        tenants: vec![Source::new(
            "acme",
            "{ tenant: acme, hosts: [localhost], database: acme, placement: { pool: odoo }, plan: standard }",
        )],
    };
    // The socket is the program's own: bound before privileges were dropped, handed over by systemd, …
    let socket = TcpListener::bind("127.0.0.1:0")?;
    println!("http://localhost:{} goes to {odoo}; Ctrl-C drains and ends", socket.local_addr()?.port());
    let gateway = Gateway::builder().sources(sources).http_listener(socket).start().await?;
    tokio::signal::ctrl_c().await?;
    gateway.drain();
    let report = gateway.wait().await;
    println!("drained, complete: {}", report.complete);
    Ok(())
}
