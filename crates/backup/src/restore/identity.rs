//! A copy must not act as the original: a new identity, and nothing that reaches out.
//!
//! Everything happens in one transaction, in a database that nobody but the restore can connect to: there is no moment at
//! which a worker could see the copy with the original's mail servers and jobs. What is switched off is what the modules of Odoo's community edition
//! switch off when a database is neutralized, as far as their tables are there.

use tokio_postgres::Client;

use super::loader::Loader;
use crate::Error;
use crate::server::{Server, literal};
use cofferdam_rows::{self as rows, Read};

/// Makes a copy somebody else: new `database.uuid` and secret, its own address, and unless told otherwise, neutralized.
///
/// As the copy's owner: what the tenant has hung on its tables runs along.
pub(super) async fn make_new(
    loader: &Loader,
    database: &str,
    base_url: Option<&str>,
    keep_integrations: bool,
) -> Result<(), Error> {
    let client = loader.connect(database).await?;
    let failed = |e: &tokio_postgres::Error| loader.server.failed(database, e);
    let present = Columns::read(&client).await.map_err(|e| failed(&e))?;
    if !present.has("ir_config_parameter", "value") {
        // Not Odoo's: there is nothing that it would be known by.
        return Ok(());
    }
    let mut statements = vec!["BEGIN".to_owned()];
    let mut parameter = |key: &str, value: String| {
        statements.push(format!("DELETE FROM ir_config_parameter WHERE key = {}", literal(key)));
        statements.push(format!("INSERT INTO ir_config_parameter (key, value) VALUES ({}, {value})", literal(key)));
    };
    parameter("database.uuid", "gen_random_uuid()::text".to_owned());
    parameter("database.secret", "gen_random_uuid()::text".to_owned());
    parameter("database.create_date", "to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')".to_owned());
    if let Some(url) = base_url {
        parameter("web.base.url", literal(url));
        parameter("web.base.url.freeze", literal("True"));
        parameter("report.url", literal(url));
    }
    if !keep_integrations {
        parameter("database.is_neutralized", literal("true"));
        statements.push(
            "DELETE FROM ir_config_parameter WHERE key IN ('database.enterprise_code', 'mail.catchall.domain', \
             'odoo_ocn.project_id', 'ocn.uuid')"
                .to_owned(),
        );
        statements.extend(NEUTRALIZE.iter().filter(|(t, c, _)| present.has(t, c)).map(|(_, _, s)| (*s).to_owned()));
    }
    statements.push("COMMIT".to_owned());
    client.batch_execute(&statements.join(";\n")).await.map_err(|e| failed(&e))
}

/// Looks whether a copy has become somebody else: what the tenant has hung on its tables can have undone it.
pub(super) async fn verify(
    server: &Server,
    database: &str,
    old_uuid: Option<&str>,
    keep_integrations: bool,
) -> Result<(), Error> {
    let client = server.connect_to_tenant(database).await?;
    let failed = |e: &tokio_postgres::Error| server.failed(database, e);
    let not = |what: &str| {
        let reason = format!("{what}: something in it has undone what makes a copy somebody else");
        Err(Error::Mismatch { what: format!("the copy {database}"), reason })
    };
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.map_err(|e| failed(&e))?;
    let (mut uuid, mut neutralized) = (None, false);
    let parameters = rows::each(&client, "public.ir_config_parameter", &["key", "value"], |row| match row {
        [Some(key), value] if key == "database.uuid" => uuid = value.as_deref().map(str::to_owned),
        [Some(key), Some(value)] if key == "database.is_neutralized" => neutralized = value == "true",
        _ => {}
    });
    match parameters.await.map_err(|e| failed(&e))? {
        // Not Odoo's.
        Read::Nothing => return Ok(()),
        Read::Odd => return not("its parameters cannot be read"),
        Read::Rows(()) => {}
    }
    if uuid.is_none() || uuid.as_deref() == old_uuid {
        return not("it has the database.uuid of the original");
    }
    if keep_integrations {
        return Ok(());
    }
    if !neutralized {
        return not("it does not say that it is neutralized");
    }
    for (table, columns, what) in ACTIVE {
        let mut active = 0;
        let name = format!("public.{table}");
        let read = rows::each(&client, &name, columns, |row| {
            let state = row.first().and_then(|state| state.as_deref()).unwrap_or_default();
            let leads_nowhere = row.get(1).is_some_and(|host| host.as_deref() == Some("invalid"));
            active += u32::from(HARMFUL.contains(&state) && !leads_nowhere);
        });
        let read = read.await.map_err(|e| failed(&e))?;
        // Odoo's own cleaning goes on: one job of them all.
        if active > u32::from(*table == "ir_cron") {
            return not(&format!("{active} {what}"));
        }
        // That a column is not there is another version's way; that it is something odd is not.
        if read == Read::Odd && has_all(&client, table, columns).await.map_err(|e| failed(&e))? {
            return not(&format!("{table} cannot be read"));
        }
    }
    Ok(())
}

async fn has_all(client: &Client, table: &str, columns: &[&str]) -> Result<bool, tokio_postgres::Error> {
    let query = "SELECT count(*) = cardinality($2::text[]) FROM pg_attribute a WHERE a.attrelid = to_regclass($1) \
                 AND a.attname = ANY($2) AND NOT a.attisdropped";
    Ok(client.query_one(query, &[&format!("public.{table}"), &columns]).await?.get(0))
}

/// What must not go on in a copy: a table, its columns, and what it would be.
const ACTIVE: &[(&str, &[&str], &str)] = &[
    ("ir_cron", &["active"], "scheduled jobs are active"),
    ("ir_mail_server", &["active", "smtp_host"], "mail servers are active"),
    ("fetchmail_server", &["active"], "servers to fetch mail from are active"),
    ("mail_mail", &["state"], "mails wait to be sent"),
    ("payment_provider", &["state"], "payment providers are enabled"),
    ("payment_acquirer", &["state"], "payment providers are enabled"),
    ("queue_job", &["state"], "jobs wait"),
];
/// States in which something is done; `t` is true.
const HARMFUL: [&str; 7] = ["t", "outgoing", "enabled", "test", "pending", "enqueued", "started"];

/// Table and column that must be there, and what is done then.
const NEUTRALIZE: &[(&str, &str, &str)] = &[
    (
        "ir_cron",
        "active",
        "UPDATE ir_cron SET active = false WHERE id NOT IN (SELECT res_id FROM ir_model_data \
         WHERE model = 'ir.cron' AND name = 'autovacuum_job')",
    ),
    ("ir_mail_server", "active", "UPDATE ir_mail_server SET active = false"),
    (
        "ir_mail_server",
        "smtp_host",
        "INSERT INTO ir_mail_server (name, smtp_host, smtp_port, smtp_encryption, smtp_authentication, active, sequence) \
         VALUES ('neutralized', 'invalid', 1025, 'none', 'login', true, 0)",
    ),
    ("fetchmail_server", "active", "UPDATE fetchmail_server SET active = false"),
    ("mail_mail", "state", "UPDATE mail_mail SET state = 'cancel' WHERE state IN ('outgoing', 'exception')"),
    ("mail_template", "mail_server_id", "UPDATE mail_template SET mail_server_id = NULL"),
    (
        "queue_job",
        "state",
        "UPDATE queue_job SET state = 'cancelled' WHERE state IN ('pending', 'enqueued', 'started')",
    ),
    ("payment_provider", "state", "UPDATE payment_provider SET state = 'disabled' WHERE state <> 'disabled'"),
    ("payment_acquirer", "state", "UPDATE payment_acquirer SET state = 'disabled' WHERE state <> 'disabled'"),
    ("iap_account", "account_token", "UPDATE iap_account SET account_token = gen_random_uuid()::text"),
    ("ir_act_server", "webhook_url", "UPDATE ir_act_server SET webhook_url = 'neutralized' WHERE state = 'webhook'"),
    ("delivery_carrier", "prod_environment", "UPDATE delivery_carrier SET prod_environment = false"),
    ("auth_oauth_provider", "enabled", "UPDATE auth_oauth_provider SET enabled = false"),
    ("account_online_link", "client_id", "UPDATE account_online_link SET client_id = 'neutralized'"),
    ("res_users", "google_calendar_token", "UPDATE res_users SET google_calendar_token = NULL"),
    ("res_users", "microsoft_calendar_token", "UPDATE res_users SET microsoft_calendar_token = NULL"),
    ("mail_push_device", "endpoint", "DELETE FROM mail_push_device"),
    ("website", "domain", "UPDATE website SET domain = NULL"),
    ("website", "cdn_activated", "UPDATE website SET cdn_activated = false"),
];

struct Columns(std::collections::HashSet<(String, String)>);

impl Columns {
    async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let query = "SELECT c.relname::text, a.attname::text FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid \
                     WHERE c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped \
                     AND c.relnamespace = to_regnamespace('public')";
        let rows = client.query(query, &[]).await?;
        Ok(Self(rows.iter().map(|row| (row.get(0), row.get(1))).collect()))
    }

    fn has(&self, table: &str, column: &str) -> bool {
        self.0.contains(&(table.to_owned(), column.to_owned()))
    }
}
