//! Embeds the PostgreSQL plane alone: a fair pooler for the databases of one server.
//!
//! `PGPASSWORD=… cargo run -p cofferdam-examples --example embed_postgres -- 127.0.0.1:5432 role database`

use std::sync::Arc;

use cofferdam::tenant::{Secrets, Source, SourceSet};
use cofferdam::{Gateway, SystemSecrets};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().init();
    let mut arguments = std::env::args().skip(1);
    let (Some(server), Some(role), Some(database)) = (arguments.next(), arguments.next(), arguments.next()) else {
        return Err("usage: embed_postgres HOST:PORT ROLE DATABASE, with PGPASSWORD set".into());
    };
    let sources = SourceSet {
        main: Source::new(
            "embedded",
            format!(
                "postgres: {{ listen: ['127.0.0.1:0'] }}
clusters: {{ pg: {{ address: '{server}', slots: 4 }} }}
plans: {{ standard: {{ postgres: {{ limit: 3, max_wait: 10s }} }} }}"
            ),
        ),
        tenants: vec![Source::new(
            "tenant",
            format!(
                "{{ tenant: mine, database: {database}, placement: {{ cluster: pg }}, plan: standard,
   login: {{ role: {role}, password_env: PGPASSWORD }} }}"
            ),
        )],
    };
    // Secrets come from where the program keeps them: here from the environment.
    let secrets: Arc<dyn Secrets + Send + Sync> = Arc::new(SystemSecrets::beside(".".as_ref()));
    let gateway = Gateway::builder().sources(sources).secrets(secrets).start().await?;
    println!("psql -h 127.0.0.1 -p {} -U {role} {database}", gateway.postgres_addresses()[0].port());
    tokio::signal::ctrl_c().await?;
    gateway.drain();
    gateway.wait().await;
    Ok(())
}
