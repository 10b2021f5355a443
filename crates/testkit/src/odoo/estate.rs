//! One tenant's estate: a database with the tables that matter to backups, and a filestore, both kept busy as Odoo does.
//!
//! Attachments are written as `ir.attachment` does it: first the file under the SHA-1 of its content, then the row;
//! a row that goes leaves its file on a checklist, and the collector deletes what is on the list and referred to by
//! nobody, while it holds `ir_attachment` in `SHARE` mode.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use sha1::{Digest, Sha1};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::postgres::{Cluster, SUPERUSER, connect};
use crate::{TestkitError, io as failed};

/// A database and the directory of its files.
#[derive(Debug, Clone)]
pub struct Estate {
    port: u16,
    /// The database.
    pub database: String,
    /// Its files, `<filestores>/<database>`.
    pub filestore: PathBuf,
}

const TABLES: &str = "
CREATE TABLE ir_attachment (id serial PRIMARY KEY, name text, res_model text, res_id int, store_fname text,
    checksum varchar(40), file_size int, mimetype text, create_date timestamp DEFAULT now());
CREATE INDEX ON ir_attachment (store_fname);
CREATE TABLE ir_config_parameter (id serial PRIMARY KEY, key text UNIQUE NOT NULL, value text NOT NULL);
CREATE TABLE ir_model_data (id serial PRIMARY KEY, name text, model text, res_id int);
CREATE TABLE ir_cron (id serial PRIMARY KEY, name text, active bool NOT NULL DEFAULT true);
CREATE TABLE ir_mail_server (id serial PRIMARY KEY, name text NOT NULL, smtp_host text, smtp_port int,
    smtp_encryption text, smtp_authentication text, active bool, sequence int);
CREATE TABLE mail_mail (id serial PRIMARY KEY, state text);
CREATE TABLE res_partner (id serial PRIMARY KEY, name text NOT NULL, note text);
CREATE TABLE account_move_line (id serial PRIMARY KEY, partner_id int REFERENCES res_partner, name text, debit numeric,
    credit numeric);
CREATE INDEX ON account_move_line (partner_id);
CREATE SEQUENCE base_registry_signaling;
CREATE SEQUENCE base_cache_signaling_default;
SELECT nextval('base_registry_signaling'), nextval('base_cache_signaling_default');
INSERT INTO ir_config_parameter (key, value) VALUES ('database.uuid', gen_random_uuid()::text),
    ('database.secret', gen_random_uuid()::text), ('web.base.url', 'https://acme.example.com');
INSERT INTO ir_cron (name) VALUES ('autovacuum'), ('send mail'), ('fetch bank statements');
INSERT INTO ir_model_data (name, model, res_id) VALUES ('autovacuum_job', 'ir.cron', 1);
INSERT INTO ir_mail_server (name, smtp_host, active) VALUES ('production', 'smtp.example.com', true);
INSERT INTO mail_mail (state) VALUES ('outgoing'), ('sent');
";

impl Estate {
    /// Creates the database and the role `<database>_owner` for it, with as many partners and ten times as many ledger lines, and an empty filestore.
    pub async fn create(
        cluster: &Cluster,
        database: &str,
        filestores: &Path,
        partners: u32,
    ) -> Result<Self, TestkitError> {
        let owner = format!("{database}_owner");
        cluster.create_role(&owner, "odoo").await?;
        cluster.create_database(database, &owner).await?;
        Self::furnish(cluster, database, filestores, partners).await
    }

    /// The same in a database that is there and empty.
    pub async fn furnish(
        cluster: &Cluster,
        database: &str,
        filestores: &Path,
        partners: u32,
    ) -> Result<Self, TestkitError> {
        let filestore = filestores.join(database);
        fs::create_dir_all(filestore.join("checklist")).map_err(failed("filestore"))?;
        let estate = Self { port: cluster.port(), database: database.to_owned(), filestore };
        let client = estate.connect().await?;
        let owner = "SELECT quote_ident(pg_get_userbyid(datdba)) FROM pg_database WHERE datname = current_database()";
        let owner: String = client.query_one(owner, &[]).await?.get(0);
        client.batch_execute(&format!("SET ROLE {owner}; {TABLES}")).await?;
        client
            .batch_execute(&format!(
                "INSERT INTO res_partner (name, note) SELECT 'Partner ' || i, md5(i::text) FROM generate_series(1, {partners}) i;
                 INSERT INTO account_move_line (partner_id, name, debit, credit)
                 SELECT 1 + i % {partners}, 'INV/' || i, i % 1000, 0 FROM generate_series(1, {partners} * 10) i"
            ))
            .await?;
        Ok(estate)
    }

    /// An estate whose database is there already.
    pub fn existing(cluster: &Cluster, database: &str, filestores: &Path) -> Self {
        Self { port: cluster.port(), database: database.to_owned(), filestore: filestores.join(database) }
    }

    /// A superuser's connection to the database.
    pub async fn connect(&self) -> Result<Client, TestkitError> {
        connect(self.port, SUPERUSER.0, SUPERUSER.1, &self.database).await
    }

    /// Adds an attachment: its file, then its row. The answer is its `store_fname`.
    ///
    /// The table is in use from the beginning of the transaction, as it is in Odoo once a request has written anything:
    /// a collector that ran between file and row would take the file.
    pub async fn attach(&self, client: &Client, content: &[u8]) -> Result<String, TestkitError> {
        let sha1 = hex(&Sha1::digest(content));
        let name = format!("{}/{sha1}", &sha1[..2]);
        let path = self.filestore.join(&name);
        client.batch_execute("BEGIN; LOCK ir_attachment IN ROW EXCLUSIVE MODE").await?;
        let write = || -> io::Result<()> {
            fs::create_dir_all(path.parent().unwrap_or(&self.filestore))?;
            if !path.exists() {
                fs::write(&path, content)?;
            }
            // Odoo: until the transaction is committed, the file may turn out not to be needed.
            self.mark(&name)
        };
        write().map_err(failed("attachment"))?;
        client
            .execute(
                "INSERT INTO ir_attachment (name, store_fname, checksum, file_size, mimetype) \
                 VALUES ('a.pdf', $1, $2, $3, 'application/pdf')",
                &[&name, &sha1, &i32::try_from(content.len()).unwrap_or(i32::MAX)],
            )
            .await?;
        client.batch_execute("COMMIT").await?;
        Ok(name)
    }

    /// Deletes the oldest attachment, whose file is then for the collector.
    pub async fn detach_oldest(&self, client: &Client) -> Result<(), TestkitError> {
        let row = client
            .query_opt(
                "DELETE FROM ir_attachment WHERE id = (SELECT min(id) FROM ir_attachment) RETURNING store_fname",
                &[],
            )
            .await?;
        if let Some(row) = row {
            self.mark(row.get(0)).map_err(failed("checklist"))?;
        }
        Ok(())
    }

    /// Deletes the files on the checklist that nobody refers to; how many. Gives up, as Odoo does, when the table is in
    /// use for longer than `patience`.
    pub async fn collect(&self, client: &Client, patience: Duration) -> Result<u64, TestkitError> {
        let lock = format!(
            "BEGIN; SET LOCAL lock_timeout = {}; LOCK ir_attachment IN SHARE MODE",
            patience.as_millis().max(1)
        );
        if client.batch_execute(&lock).await.is_err() {
            client.batch_execute("ROLLBACK").await?;
            return Ok(0);
        }
        let mut listed = Vec::new();
        for directory in fs::read_dir(self.filestore.join("checklist")).into_iter().flatten().flatten() {
            for entry in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
                listed.push(format!(
                    "{}/{}",
                    directory.file_name().to_string_lossy(),
                    entry.file_name().to_string_lossy()
                ));
            }
        }
        let query = "SELECT store_fname FROM ir_attachment WHERE store_fname = ANY($1)";
        let used: std::collections::HashSet<String> =
            client.query(query, &[&listed]).await?.iter().map(|row| row.get(0)).collect();
        let mut collected = 0;
        for name in listed {
            if !used.contains(&name) && fs::remove_file(self.filestore.join(&name)).is_ok() {
                collected += 1;
            }
            let _ = fs::remove_file(self.filestore.join("checklist").join(&name));
        }
        client.batch_execute("COMMIT").await?;
        Ok(collected)
    }

    /// Keeps the estate busy until the answer is stopped: attachments come and go, and the collector runs.
    pub fn busy(&self, patience: Duration) -> Busy {
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(Counts::default());
        let writer = {
            let (estate, stop, counts) = (self.clone(), Arc::clone(&stop), Arc::clone(&counts));
            tokio::spawn(async move {
                let client = estate.connect().await?;
                let mut kept = 0_u32;
                let mut number = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    let content = format!("{number} of {} {}", estate.database, std::process::id()).repeat(40);
                    estate.attach(&client, content.as_bytes()).await?;
                    counts.written.fetch_add(1, Ordering::Relaxed);
                    kept += 1;
                    if kept > 40 {
                        estate.detach_oldest(&client).await?;
                        kept -= 1;
                    }
                    // Faster than any Odoo, and it leaves room for what is tested.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Ok(())
            })
        };
        let collector = {
            let (estate, stop, counts) = (self.clone(), Arc::clone(&stop), Arc::clone(&counts));
            tokio::spawn(async move {
                let client = estate.connect().await?;
                while !stop.load(Ordering::Relaxed) {
                    let collected = estate.collect(&client, patience).await?;
                    counts.collected.fetch_add(collected, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Ok(())
            })
        };
        Busy { stop, counts, tasks: [writer, collector] }
    }

    /// The files that a database refers to and that are not below a directory with the right hash.
    pub async fn missing(&self, filestore: &Path) -> Result<Vec<String>, TestkitError> {
        let client = self.connect().await?;
        let rows = client.query("SELECT DISTINCT store_fname FROM ir_attachment", &[]).await?;
        Ok(rows
            .iter()
            .map(|row| row.get::<_, String>(0))
            .filter(|name| {
                let sha1 = name.rsplit('/').next().unwrap_or_default();
                fs::read(filestore.join(name)).map_or(true, |bytes| hex(&Sha1::digest(&bytes)) != sha1)
            })
            .collect())
    }

    fn mark(&self, name: &str) -> io::Result<()> {
        let path = self.filestore.join("checklist").join(name);
        fs::create_dir_all(path.parent().unwrap_or(&self.filestore))?;
        fs::write(path, "")
    }
}

/// How much has happened.
#[derive(Debug, Default)]
pub struct Counts {
    /// Attachments written.
    pub written: AtomicU64,
    /// Files that the collector has deleted.
    pub collected: AtomicU64,
}

/// A writer and a collector at work.
#[derive(Debug)]
pub struct Busy {
    stop: Arc<AtomicBool>,
    /// How much has happened so far.
    pub counts: Arc<Counts>,
    tasks: [JoinHandle<Result<(), TestkitError>>; 2],
}

impl Busy {
    /// Stops both, and says so if one of them had failed.
    pub async fn stop(self) -> Result<(), TestkitError> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            match task.await {
                Ok(outcome) => outcome?,
                Err(error) => {
                    return Err(TestkitError::Failed { program: "estate".into(), output: error.to_string() });
                }
            }
        }
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
