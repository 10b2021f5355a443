//! A cluster, a tenant in it, and where its backups go.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use cofferdam_backup::logical::Backup;
use cofferdam_backup::model::{BackupPolicy, BackupSet, Parallel, RestoreMode, RestorePoint, Restored};
use cofferdam_backup::repository::{Directory, Repository, RepositoryKey};
use cofferdam_backup::restore::Restore;
use cofferdam_backup::{Control, Server};
use cofferdam_tenant::{Secret, Slug};
use cofferdam_testkit::odoo::Estate;
use cofferdam_testkit::postgres::{Cluster, SUPERUSER, binaries};
use tempfile::TempDir;

/// The key of every repository in tests.
pub const KEY: &str = "correct horse battery staple";

/// A cluster with the tenant `acme`, its filestore, and room for its backups.
#[derive(Debug)]
pub struct House {
    /// The server.
    pub cluster: Cluster,
    /// Everything that is on disk.
    pub directory: TempDir,
    /// The tenant.
    pub estate: Estate,
}

impl House {
    /// A tenant with so many partners.
    pub async fn new(partners: u32) -> Self {
        Self::on(Cluster::start().unwrap(), partners).await
    }

    /// A tenant on a server.
    pub async fn on(cluster: Cluster, partners: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let estate = Estate::create(&cluster, "acme", &directory.path().join("filestore"), partners).await.unwrap();
        Self { cluster, directory, estate }
    }

    /// The server, as its superuser.
    pub fn server(&self) -> Server {
        let password = Some(Secret::new(SUPERUSER.1));
        let mut server = Server::new("127.0.0.1", self.cluster.port(), SUPERUSER.0, password);
        server.programs = Some(binaries().unwrap());
        server
    }

    /// Where backups go.
    pub fn repository_path(&self) -> PathBuf {
        self.directory.path().join("repository/acme")
    }

    /// What a backup needs.
    pub fn backup(&self) -> Backup {
        Backup {
            tenant: Slug::parse("acme").unwrap(),
            server: self.server(),
            dump_through: None,
            database: "acme".into(),
            filestore: self.estate.filestore.clone(),
            store: Arc::new(Directory::new(self.repository_path())),
            key: RepositoryKey::new(KEY).unwrap(),
            policy: BackupPolicy::default(),
        }
    }

    /// What a restore needs.
    pub fn restore(&self) -> Restore {
        Restore {
            tenant: Slug::parse("acme").unwrap(),
            server: self.server(),
            database: "acme".into(),
            owner: None,
            filestores: self.directory.path().join("filestore"),
            store: Arc::new(Directory::new(self.repository_path())),
            key: RepositoryKey::new(KEY).unwrap(),
            gateway: None,
            parallel: Parallel::default(),
        }
    }

    /// The repository, opened.
    pub fn repository(&self) -> Repository {
        let store = Arc::new(Directory::new(self.repository_path()));
        Repository::open(Slug::parse("acme").unwrap(), store, &RepositoryKey::new(KEY).unwrap()).unwrap()
    }

    /// Makes a backup.
    pub async fn save(&self) -> BackupSet {
        self.backup().run(&Control::default()).await.unwrap()
    }

    /// Restores a set as a copy.
    pub async fn scratch(&self, set: &BackupSet) -> Restored {
        let point = RestorePoint::Set { id: set.id.clone() };
        self.restore().run(&point, &RestoreMode::Scratch, &Control::default()).await.unwrap()
    }

    /// Adds attachments with the numbers from `from` on.
    pub async fn attach(&self, number: u32, from: u32) {
        let client = self.estate.connect().await.unwrap();
        for i in from..from + number {
            self.estate.attach(&client, format!("attachment {i}").repeat(50).as_bytes()).await.unwrap();
        }
    }

    /// Drops what a restore has made, so that many fit.
    pub async fn drop(&self, restored: &Restored) {
        let admin = self.cluster.admin("postgres").await.unwrap();
        admin.batch_execute(&format!("DROP DATABASE \"{}\"", restored.database)).await.unwrap();
        std::fs::remove_dir_all(restored.filestore.as_ref().unwrap()).unwrap();
    }

    /// What `restic` says of the repository, and whether it is content.
    pub fn restic(&self, arguments: &[&str]) -> (bool, String) {
        let output = Command::new("restic")
            .args(["--no-cache", "-r"])
            .arg(self.repository_path())
            .args(arguments)
            .env("RESTIC_PASSWORD", KEY)
            .output()
            .expect("restic is installed");
        let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
        (output.status.success(), text)
    }

    /// The tenant's databases, under whatever names.
    pub async fn databases(&self) -> Vec<String> {
        let admin = self.cluster.admin("postgres").await.unwrap();
        let query = "SELECT datname::text FROM pg_database WHERE datname LIKE 'acme%' ORDER BY 1";
        admin.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    }

    /// What lies beside the tenant's filestore.
    pub fn filestores(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path().join("filestore")).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// A connection as the tenant's own role.
    pub async fn owner(&self) -> tokio_postgres::Client {
        self.cluster.connect("acme_owner", "odoo", "acme").await.unwrap()
    }

    /// Everything that a tenant could have become, and what restores might have left.
    pub async fn intruders(&self) -> Vec<String> {
        let admin = self.cluster.admin("postgres").await.unwrap();
        let query = "SELECT rolname::text FROM pg_roles WHERE rolname = 'intruder' OR rolname LIKE 'cofferdam\\_load\\_%' \
                     OR (rolname = 'acme_owner' AND (rolsuper OR rolcreaterole))";
        admin.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    }
}

/// A runtime as the programs have it.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Runs what blocks where it may.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}
