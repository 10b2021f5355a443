//! Backups against a real PostgreSQL, with writers and a collector at work, read back by `restic` too.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cofferdam_backup::interchange::{Identity, Import, export};
use cofferdam_backup::logical::Backup;
use cofferdam_backup::model::{
    BackupPolicy, BackupSet, Consistency, FenceLimits, Immutability, LockAttestation, LockMode, RestoreMode,
    RestorePoint, Restored, SetId,
};
use cofferdam_backup::physical::{BackupKind, PgBackRest, PhysicalEngine, Recovery};
use cofferdam_backup::repository::{Depth, Directory, ObjectLock, Repository, RepositoryKey, S3, S3Options, Store};
use cofferdam_backup::restore::{GatewayConsole, Restore};
use cofferdam_backup::{Control, Error, Server};
use cofferdam_tenant::{HumanDuration, Secret, Slug};
use cofferdam_testkit::odoo::Estate;
use cofferdam_testkit::postgres::{Cluster, ClusterOptions, SUPERUSER, binaries};
use cofferdam_testkit::s3::{self, ObjectStore};
use cofferdam_tests::{Site, SiteOptions};
use tempfile::TempDir;

const KEY: &str = "correct horse battery staple";

struct House {
    cluster: Cluster,
    directory: TempDir,
    estate: Estate,
}

impl House {
    async fn new(partners: u32) -> Self {
        let cluster = Cluster::start().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let estate = Estate::create(&cluster, "acme", &directory.path().join("filestore"), partners).await.unwrap();
        Self { cluster, directory, estate }
    }

    fn server(&self) -> Server {
        let password = Some(Secret::new(SUPERUSER.1));
        let mut server = Server::new("127.0.0.1", self.cluster.port(), SUPERUSER.0, password);
        server.programs = Some(binaries().unwrap());
        server
    }

    fn repository_path(&self) -> std::path::PathBuf {
        self.directory.path().join("repository/acme")
    }

    fn backup(&self) -> Backup {
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

    fn restore(&self) -> Restore {
        Restore {
            tenant: Slug::parse("acme").unwrap(),
            server: self.server(),
            database: "acme".into(),
            owner: None,
            filestores: self.directory.path().join("filestore"),
            store: Arc::new(Directory::new(self.repository_path())),
            key: RepositoryKey::new(KEY).unwrap(),
            gateway: None,
        }
    }

    fn repository(&self) -> Repository {
        let store = Arc::new(Directory::new(self.repository_path()));
        Repository::open(Slug::parse("acme").unwrap(), store, &RepositoryKey::new(KEY).unwrap()).unwrap()
    }

    async fn save(&self) -> BackupSet {
        self.backup().run(&Control::default()).await.unwrap()
    }

    async fn scratch(&self, set: &BackupSet) -> Restored {
        let point = RestorePoint::Set { id: set.id.clone() };
        self.restore().run(&point, &RestoreMode::Scratch, &Control::default()).await.unwrap()
    }

    async fn attach(&self, number: u32, from: u32) {
        let client = self.estate.connect().await.unwrap();
        for i in from..from + number {
            self.estate.attach(&client, format!("attachment {i}").repeat(50).as_bytes()).await.unwrap();
        }
    }

    /// Drops what a restore has made, so that many fit.
    async fn drop(&self, restored: &Restored) {
        let admin = self.cluster.admin("postgres").await.unwrap();
        admin.batch_execute(&format!("DROP DATABASE \"{}\"", restored.database)).await.unwrap();
        std::fs::remove_dir_all(restored.filestore.as_ref().unwrap()).unwrap();
    }

    fn restic(&self, arguments: &[&str]) -> (bool, String) {
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
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn a_tenant_comes_back_as_it_was_and_as_somebody_else() {
    runtime().block_on(async {
        let house = House::new(200).await;
        house.attach(20, 0).await;
        let set = house.save().await;
        assert_eq!(set.consistency, Consistency::Fenced, "{:?}", set.note);
        assert_eq!(set.filestore.files, 20);
        assert_eq!(set.artifact.rows, 20 + 200 + 2_000 + 3 + 3 + 1 + 1 + 2);
        let restored = house.scratch(&set).await;
        assert!(restored.database.starts_with("acme__scratch_"));
        let copy = Estate::existing(&house.cluster, &restored.database, &house.directory.path().join("filestore"));
        assert_eq!(copy.missing(&copy.filestore).await.unwrap(), Vec::<String>::new());

        // The copy is not the original, and does nothing by itself.
        let (original, copied) = (house.estate.connect().await.unwrap(), copy.connect().await.unwrap());
        for key in ["database.uuid", "database.secret"] {
            let query = "SELECT value FROM ir_config_parameter WHERE key = $1";
            let [a, b]: [String; 2] = [
                original.query_one(query, &[&key]).await.unwrap().get(0),
                copied.query_one(query, &[&key]).await.unwrap().get(0),
            ];
            assert_ne!(a, b, "{key}");
        }
        let active = |table: &str| format!("SELECT string_agg(name, ',' ORDER BY name) FROM {table} WHERE active");
        let names: String = copied.query_one(&active("ir_cron"), &[]).await.unwrap().get(0);
        assert_eq!(names, "autovacuum");
        let names: String = copied.query_one(&active("ir_mail_server"), &[]).await.unwrap().get(0);
        assert_eq!(names, "neutralized");
        let waiting = "SELECT count(*) FROM mail_mail WHERE state = 'outgoing'";
        assert_eq!(copied.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0), 0);
        assert_eq!(original.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0), 1);
    });
}

/// `reference`, Backup: "`store_fname` is `xx/sha1`: completeness can be proven", and the fence.
#[test]
fn fifty_backups_under_writers_and_a_collector_miss_no_file_and_odoos_order_does() {
    let rounds: u32 = std::env::var("BACKUPS").ok().and_then(|n| n.parse().ok()).unwrap_or(50);
    runtime().block_on(async {
        let house = House::new(50).await;
        let busy = house.estate.busy(Duration::from_millis(200));
        let mut missed_by_odoo = 0;
        let mut fenced = 0;
        for round in 0..rounds {
            // The baseline, files first, as Odoo and click-odoo-contrib do it.
            if round < 5 {
                let copied = house.directory.path().join(format!("copy-{round}"));
                copy_tree(&house.estate.filestore, &copied);
                let database = format!("odoo_order_{round}");
                dump_and_load(&house, &database);
                let loaded = Estate::existing(&house.cluster, &database, house.directory.path());
                missed_by_odoo += loaded.missing(&copied).await.unwrap().len();
            }
            let set = house.save().await;
            assert!(set.consistency.is_complete(), "round {round}: {set:?}");
            fenced += u32::from(set.consistency == Consistency::Fenced);
            // Every tenth, and every one of the last: restored, each file hashed by the test itself.
            if round % 10 == 9 || round + 5 > rounds {
                let restored = house.scratch(&set).await;
                let copy =
                    Estate::existing(&house.cluster, &restored.database, &house.directory.path().join("filestore"));
                assert_eq!(copy.missing(&copy.filestore).await.unwrap(), Vec::<String>::new(), "round {round}");
                house.drop(&restored).await;
            }
        }
        let (written, collected) =
            (busy.counts.written.load(Ordering::Relaxed), busy.counts.collected.load(Ordering::Relaxed));
        busy.stop().await.unwrap();
        eprintln!(
            "{rounds} backups, {fenced} of them fenced, while {written} files were written and {collected} collected; \
             Odoo's order misses {missed_by_odoo} files in five"
        );
        assert!(collected > 0, "the collector was at work");
        assert!(missed_by_odoo > 0, "the baseline shows what is wrong with it");
        assert!(fenced * 2 > rounds, "most backups were fenced: {fenced} of {rounds}");
        // Every set that there is, restored or not, is whole in the repository.
        let verification = tokio::task::spawn_blocking(move || house.repository().verify(Depth::Everything)).await;
        let verification = verification.unwrap().unwrap();
        assert_eq!(verification.faults, []);
        assert_eq!(verification.sets, u64::from(rounds));
    });
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_tree(&path, &target);
        } else {
            // Deleted meanwhile: just so does it happen to Odoo's.
            let _ = std::fs::copy(&path, &target);
        }
    }
}

fn dump_and_load(house: &House, database: &str) {
    let environment = [
        ("PGHOST", "127.0.0.1".to_owned()),
        ("PGPORT", house.cluster.port().to_string()),
        ("PGUSER", SUPERUSER.0.to_owned()),
        ("PGPASSWORD", SUPERUSER.1.to_owned()),
    ];
    let script = format!("set -e; createdb {database}; pg_dump -Fc acme | pg_restore -d {database}");
    let path = format!("{}:{}", binaries().unwrap().display(), std::env::var("PATH").unwrap());
    let status = Command::new("sh").args(["-c", &script]).envs(environment).env("PATH", path).status().unwrap();
    assert!(status.success());
}

#[test]
fn restic_reads_checks_and_restores_the_same_bytes() {
    runtime().block_on(async {
        let house = House::new(2_000).await;
        house.attach(30, 0).await;
        let first = house.save().await;
        house.attach(5, 100).await;
        let second = house.save().await;
        assert!(second.stored.new_files <= 5 + 4, "what was there is not stored again: {:?}", second.stored);

        let (good, text) = house.restic(&["check", "--read-data"]);
        assert!(good && text.contains("no errors were found"), "{text}");
        let (good, text) = house.restic(&["snapshots"]);
        assert!(good && text.contains("2 snapshots"), "{text}");
        let target = house.directory.path().join("by-restic");
        let (good, text) = house.restic(&["restore", &second.id.0, "--verify", "--target", target.to_str().unwrap()]);
        assert!(good, "{text}");
        let tree = target.join("acme");
        assert_eq!(house.estate.missing(&tree.join("filestore")).await.unwrap(), Vec::<String>::new());
        // The parts of the dump are one dump.
        let mut parts: Vec<_> =
            std::fs::read_dir(tree.join("odoo.dump")).unwrap().flatten().map(|e| e.path()).collect();
        parts.sort();
        let whole: Vec<u8> = parts.iter().flat_map(|p| std::fs::read(p).unwrap()).collect();
        assert_eq!(whole.len() as u64, second.artifact.bytes);
        assert!(whole.starts_with(b"PGDMP"));
        let dump = house.directory.path().join("dump");
        std::fs::write(&dump, whole).unwrap();
        let list = Command::new(binaries().unwrap().join("pg_restore")).arg("--list").arg(&dump).output().unwrap();
        assert!(String::from_utf8_lossy(&list.stdout).contains("account_move_line"));
        assert_ne!(first.id, second.id);
    });
}

#[test]
fn a_flipped_byte_and_a_removed_object_are_found_and_named() {
    runtime().block_on(async {
        let house = House::new(500).await;
        house.attach(10, 0).await;
        let set = house.save().await;
        let pack = largest(&house.repository_path().join("data"));
        let name = pack.file_name().unwrap().to_str().unwrap().to_owned();
        let good = std::fs::read(&pack).unwrap();

        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        std::fs::write(&pack, bad).unwrap();
        let faults = house.repository().verify(Depth::Everything).unwrap().faults;
        assert!(faults.iter().any(|f| f.object.as_ref().is_some_and(|o| o.contains(&name))), "{faults:?}");
        let point = RestorePoint::Set { id: set.id.clone() };
        let error = house.restore().run(&point, &RestoreMode::Scratch, &Control::default()).await.unwrap_err();
        eprintln!("flipped byte: {error}");

        std::fs::remove_file(&pack).unwrap();
        let faults = house.repository().verify(Depth::Structure).unwrap().faults;
        assert!(faults.iter().any(|f| f.problem.contains(&name)), "{faults:?}");
        let error = house.restore().run(&point, &RestoreMode::Scratch, &Control::default()).await.unwrap_err();
        eprintln!("removed object: {error}");
        // Nothing half-loaded stays.
        assert_eq!(databases(&house).await, ["acme"]);

        std::fs::write(&pack, good).unwrap();
        assert_eq!(house.repository().verify(Depth::Everything).unwrap().faults, []);
        house.scratch(&set).await;
    });
}

fn largest(directory: &Path) -> std::path::PathBuf {
    let mut files = Vec::new();
    let mut stack = vec![directory.to_owned()];
    while let Some(next) = stack.pop() {
        for entry in std::fs::read_dir(next).unwrap().flatten() {
            if entry.path().is_dir() {
                stack.push(entry.path());
            } else {
                files.push((entry.metadata().unwrap().len(), entry.path()));
            }
        }
    }
    files.into_iter().max().unwrap().1
}

async fn databases(house: &House) -> Vec<String> {
    let admin = house.cluster.admin("postgres").await.unwrap();
    let query = "SELECT datname::text FROM pg_database WHERE datname LIKE 'acme%' ORDER BY 1";
    admin.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn the_wrong_key_opens_nothing_and_leaves_nothing() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.save().await;
        let mut restore = house.restore();
        restore.key = RepositoryKey::new("another tenant's key").unwrap();
        let error = restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("the key of acme does not open this repository"), "{error}");
        assert_eq!(databases(&house).await, ["acme"]);
        let mut backup = house.backup();
        backup.key = RepositoryKey::new("another tenant's key").unwrap();
        backup.run(&Control::default()).await.unwrap_err();
        assert_eq!(house.repository().sets().unwrap().len(), 1);
    });
}

#[test]
fn files_that_are_not_there_are_said_and_the_set_is_not_called_complete() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(5, 0).await;
        let client = house.estate.connect().await.unwrap();
        let name = house.estate.attach(&client, b"soon gone").await.unwrap();
        std::fs::remove_file(house.estate.filestore.join(&name)).unwrap();
        let other = house.estate.attach(&client, b"soon another").await.unwrap();
        std::fs::write(house.estate.filestore.join(&other), b"other bytes").unwrap();
        let out = house.estate.attach(&client, b"a link").await.unwrap();
        std::fs::remove_file(house.estate.filestore.join(&out)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", house.estate.filestore.join(&out)).unwrap();

        let set = house.save().await;
        assert_eq!(set.consistency, Consistency::Unverified);
        assert_eq!((set.filestore.missing, set.filestore.damaged), (2, 1), "{:?}", set.filestore);
        assert!(set.filestore.examples.iter().any(|e| e.contains(&name)), "{:?}", set.filestore);
        // It counts for nothing, unless somebody asks for it by name.
        let error = house.repository().set_at(&RestorePoint::Latest).unwrap_err();
        assert!(error.to_string().contains("acme has no backup with every file in it"), "{error}");
        house.scratch(&set).await;
    });
}

#[test]
fn a_fence_that_would_hurt_comes_down_and_the_backup_is_verified() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(10, 0).await;
        let mut backup = house.backup();
        backup.policy.fence = FenceLimits {
            enabled: true,
            hold: HumanDuration(Duration::from_secs(60)),
            stall: HumanDuration(Duration::ZERO),
        };
        // Somebody who wants the whole table, and so waits for the fence; everybody else would wait behind.
        let client = house.estate.connect().await.unwrap();
        let waiter = tokio::spawn(async move {
            loop {
                client
                    .batch_execute("BEGIN; LOCK ir_attachment IN ACCESS EXCLUSIVE MODE; COMMIT; SELECT pg_sleep(0.01)")
                    .await
                    .unwrap();
            }
        });
        let events = Arc::new(std::sync::Mutex::new(Vec::new()));
        let seen = Arc::clone(&events);
        let control = Control::new(move |event| seen.lock().unwrap().push(format!("{event:?}")));
        let mut verified = None;
        for _ in 0..20 {
            let set = backup.run(&control).await.unwrap();
            assert!(set.consistency.is_complete());
            if set.consistency == Consistency::Verified {
                verified = Some(set);
                break;
            }
        }
        waiter.abort();
        let set = verified.expect("of twenty backups one meets the waiter");
        assert!(set.note.as_ref().is_some_and(|n| n.contains("no fence to the end")), "{set:?}");
        let off = Backup {
            policy: BackupPolicy {
                fence: FenceLimits { enabled: false, ..FenceLimits::default() },
                ..BackupPolicy::default()
            },
            ..house.backup()
        };
        assert_eq!(off.run(&control).await.unwrap().consistency, Consistency::Verified);
    });
}

#[test]
fn a_backup_that_is_stopped_leaves_no_set_and_no_fence() {
    runtime().block_on(async {
        let house = House::new(20_000).await;
        house.attach(200, 0).await;
        let control = Control::default();
        let stopper = control.clone();
        tokio::spawn(async move {
            while stopper.moved() == 0 {
                tokio::task::yield_now().await;
            }
            stopper.cancel();
        });
        let error = house.backup().run(&control).await.unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        assert_eq!(house.repository().sets().unwrap(), []);
        // Nothing holds the table any more.
        let client = house.estate.connect().await.unwrap();
        client
            .batch_execute("SET lock_timeout = '5s'; BEGIN; LOCK ir_attachment IN ACCESS EXCLUSIVE MODE; COMMIT")
            .await
            .unwrap();
        let set = house.save().await;
        assert_eq!(set.consistency, Consistency::Fenced);
        let (good, text) = house.restic(&["check", "--read-data"]);
        assert!(good, "{text}");
    });
}

#[test]
fn a_new_tenant_has_its_own_name_and_address_and_is_refused_where_one_is() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(3, 0).await;
        house.save().await;
        let mode = |database: &str| RestoreMode::NewTenant {
            database: database.into(),
            base_url: Some("https://beta.example.com".into()),
            keep_integrations: false,
        };
        house.cluster.create_role("beta_owner", "secret").await.unwrap();
        let restore = Restore { owner: Some("beta_owner".into()), ..house.restore() };
        let restored = restore.run(&RestorePoint::Latest, &mode("beta"), &Control::default()).await.unwrap();
        assert_eq!(restored.database, "beta");
        let admin = house.cluster.admin("beta").await.unwrap();
        let url: String = admin
            .query_one("SELECT value FROM ir_config_parameter WHERE key = 'web.base.url'", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(url, "https://beta.example.com");
        // Everything is its owner's, who can use it.
        let owner = house.cluster.connect("beta_owner", "secret", "beta").await.unwrap();
        owner.batch_execute("UPDATE res_partner SET name = name; CREATE TABLE more (id int)").await.unwrap();

        let error = restore.run(&RestorePoint::Latest, &mode("beta"), &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("database beta is there already; nothing was changed"), "{error}");
        let error = restore.run(&RestorePoint::Latest, &mode("../beta"), &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("cannot be the name of a database"), "{error}");
        let missing = RestorePoint::Set { id: SetId("ffff".into()) };
        let error = restore.run(&missing, &mode("gamma"), &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("acme has no backup `ffff`"), "{error}");
    });
}

#[test]
fn a_swap_brings_the_old_state_back_and_a_revert_the_new_one() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(5, 0).await;
        house.save().await;
        let client = house.estate.connect().await.unwrap();
        client.batch_execute("UPDATE res_partner SET name = 'broken'").await.unwrap();
        let late = house.estate.attach(&client, b"made after the backup").await.unwrap();
        let seen: i64 = client.query_one("SELECT last_value FROM base_registry_signaling", &[]).await.unwrap().get(0);
        drop(client);

        let restore = house.restore();
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        let name = "SELECT name FROM res_partner ORDER BY id LIMIT 1";
        let client = house.estate.connect().await.unwrap();
        assert_eq!(client.query_one(name, &[]).await.unwrap().get::<_, String>(0), "Partner 1");
        let now: i64 = client.query_one("SELECT last_value FROM base_registry_signaling", &[]).await.unwrap().get(0);
        assert!(now > seen, "workers notice that what they have cached is not true any more: {seen} {now}");
        drop(client);
        assert_eq!(house.estate.missing(&house.estate.filestore).await.unwrap(), Vec::<String>::new());
        let previous = swapped.previous.unwrap();
        // Nobody connects to what was replaced, not even cron workers that visit every database.
        house.cluster.admin(&previous).await.unwrap_err();

        // The collector takes what only the old state refers to.
        std::fs::remove_file(house.estate.filestore.join(&late)).unwrap();
        let error = restore.revert("acme__before_19700101t000000", &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("is not a database that a swap of acme has left"), "{error}");
        restore.revert(&previous, &Control::default()).await.unwrap();
        let client = house.estate.connect().await.unwrap();
        assert_eq!(client.query_one(name, &[]).await.unwrap().get::<_, String>(0), "broken");
        assert_eq!(house.estate.missing(&house.estate.filestore).await.unwrap(), Vec::<String>::new());

        let left = restore.previous().await.unwrap();
        assert_eq!(left.len(), 1);
        let later = left[0].since + jiff::SignedDuration::from_hours(24 * 8);
        let week = Duration::from_secs(7 * 86_400);
        assert_eq!(restore.drop_previous(week, left[0].since).await.unwrap(), []);
        assert_eq!(restore.drop_previous(week, later).await.unwrap(), left);
        assert_eq!(databases(&house).await, ["acme"]);
    });
}

/// What a tenant has put into its database comes along with it: triggers, checks, indexed expressions. Whoever loads
/// them must be nobody.
#[test]
fn what_a_tenant_has_written_runs_as_nobody_but_its_owner() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(2, 0).await;
        let owner = house.cluster.connect("acme_owner", "odoo", "acme").await.unwrap();
        owner
            .batch_execute(
                r"CREATE SEQUENCE ran; CREATE SEQUENCE ran_as_superuser;
                CREATE FUNCTION intrude() RETURNS boolean LANGUAGE plpgsql AS $$
                DECLARE attempt text;
                BEGIN
                  PERFORM nextval('public.ran');
                  FOREACH attempt IN ARRAY ARRAY['RESET ROLE', 'RESET SESSION AUTHORIZATION', 'SET ROLE postgres',
                      'CREATE ROLE intruder SUPERUSER LOGIN', 'ALTER ROLE acme_owner SUPERUSER'] LOOP
                    BEGIN EXECUTE attempt; EXCEPTION WHEN OTHERS THEN NULL; END;
                  END LOOP;
                  IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
                    PERFORM nextval('public.ran_as_superuser');
                  END IF;
                  RETURN true;
                END $$;
                CREATE FUNCTION intrude_too() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN PERFORM public.intrude(); RETURN coalesce(NEW, OLD); END $$;
                CREATE FUNCTION harmless(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
                BEGIN PERFORM public.intrude(); RETURN $1; END $$;
                CREATE TABLE trap (id int CHECK (public.intrude()));
                INSERT INTO trap VALUES (1);
                CREATE INDEX ON trap (harmless(id));
                CREATE TRIGGER trap BEFORE INSERT OR UPDATE OR DELETE ON ir_config_parameter
                    FOR EACH ROW EXECUTE FUNCTION intrude_too();
                ALTER TABLE ir_config_parameter ENABLE ALWAYS TRIGGER trap",
            )
            .await
            .unwrap();
        let set = house.save().await;
        let swapped =
            house.restore().run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        let scratch = house.scratch(&set).await;
        for database in [&swapped.database, &scratch.database] {
            let client = house.cluster.admin(database).await.unwrap();
            let query = "SELECT (SELECT is_called FROM ran), (SELECT is_called FROM ran_as_superuser)";
            let row = client.query_one(query, &[]).await.unwrap();
            assert!(row.get::<_, bool>(0), "it did run in {database}");
            assert!(!row.get::<_, bool>(1), "and found a superuser to be in {database}");
        }
        let admin = house.cluster.admin("postgres").await.unwrap();
        let query = "SELECT count(*) FROM pg_roles WHERE rolname = 'intruder' OR rolname LIKE 'cofferdam_load_%' \
                     OR (rolname = 'acme_owner' AND rolsuper)";
        assert_eq!(admin.query_one(query, &[]).await.unwrap().get::<_, i64>(0), 0, "nobody has become anything");

        // Whoever would own what is restored must be a role of the tenant's.
        for (owner, expected) in [(SUPERUSER.0, "who may do everything"), ("nobody_here", "there is no role")] {
            let restore = Restore { owner: Some(owner.into()), ..house.restore() };
            let error =
                restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &Control::default()).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        // Reading a table must not run anything either: what only looks like one is refused.
        owner
            .batch_execute(
                "DROP TABLE trap; ALTER TABLE ir_attachment RENAME TO hidden;
                 CREATE VIEW ir_attachment AS SELECT h.* FROM hidden h WHERE intrude()",
            )
            .await
            .unwrap_err();
        let owner = house.cluster.connect("acme_owner", "odoo", "acme").await.unwrap();
        owner
            .batch_execute(
                "ALTER TABLE ir_attachment RENAME TO hidden;
                 CREATE VIEW ir_attachment AS SELECT h.* FROM hidden h WHERE intrude();
                 SELECT setval('ran_as_superuser', 1, false)",
            )
            .await
            .unwrap();
        let error = house.backup().run(&Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("ir_attachment is not a table"), "{error}");
        let query = "SELECT is_called FROM ran_as_superuser";
        assert!(!owner.query_one(query, &[]).await.unwrap().get::<_, bool>(0), "the view was not looked into");
    });
}

#[test]
fn a_swap_takes_over_who_may_connect_and_with_which_settings() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.cluster.create_role("reporting", "secret").await.unwrap();
        let admin = house.cluster.admin("postgres").await.unwrap();
        admin
            .batch_execute(
                "REVOKE ALL ON DATABASE acme FROM PUBLIC; GRANT CONNECT ON DATABASE acme TO reporting;
                 ALTER DATABASE acme CONNECTION LIMIT 20; ALTER DATABASE acme SET statement_timeout = '7min';
                 ALTER DATABASE acme SET search_path = \"$user\", public, \"a, b\";
                 ALTER ROLE reporting IN DATABASE acme SET work_mem = '9MB'",
            )
            .await
            .unwrap();
        let about = async || {
            let query = "SELECT array(SELECT unnest(datacl)::text ORDER BY 1), datconnlimit, datallowconn, \
                         pg_get_userbyid(datdba)::text, (SELECT array_agg(setrole::regrole::text || setconfig::text ORDER BY setrole) \
                         FROM pg_db_role_setting s WHERE s.setdatabase = d.oid) FROM pg_database d WHERE datname = 'acme'";
            let row = admin.query_one(query, &[]).await.unwrap();
            let rights: Vec<String> = row.get(0);
            let settings: Vec<String> = row.get(4);
            (rights, row.get::<_, i32>(1), row.get::<_, bool>(2), row.get::<_, String>(3), settings)
        };
        let before = about().await;
        house.save().await;
        let restore = house.restore();
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        assert_eq!(about().await, before);
        house.cluster.connect("reporting", "secret", "acme").await.unwrap();

        // A way back that cannot be gone leaves everything as it was: here nobody can let transactions wait.
        let previous = swapped.previous.unwrap();
        let nobody = Some(GatewayConsole::new(house.server(), "postgres"));
        let without = Restore { gateway: nobody, ..house.restore() };
        without.revert(&previous, &Control::default()).await.unwrap_err();
        let query = "SELECT datallowconn, pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = $1";
        let row = admin.query_one(query, &[&previous]).await.unwrap();
        assert_eq!((row.get::<_, bool>(0), row.get::<_, String>(1)), (false, "acme_owner".to_owned()));
        assert_eq!(about().await, before);
        restore.revert(&previous, &Control::default()).await.unwrap();
        assert_eq!(about().await, before);
        let scratch = restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &Control::default()).await.unwrap();
        let copy = house.cluster.connect("acme_owner", "odoo", &scratch.database).await.unwrap();
        copy.batch_execute("SELECT 1").await.unwrap();
    });
}

#[test]
fn of_several_who_make_a_repository_at_once_one_does_and_all_can_use_it() {
    let directory = tempfile::tempdir().unwrap();
    let open = |path: &Path| {
        let store = Arc::new(Directory::new(path));
        let (slug, key) = (Slug::parse("acme").unwrap(), RepositoryKey::new(KEY).unwrap());
        Repository::open_or_create(slug, store, &key).map(drop)
    };
    let path = directory.path().join("raced");
    std::thread::scope(|scope| {
        let racers: Vec<_> = (0..4).map(|_| scope.spawn(|| open(&path))).collect();
        for racer in racers {
            racer.join().unwrap().unwrap();
        }
    });
    // A key that somebody has left who died before there was a repository opens nothing and is in nobody's way.
    let other = directory.path().join("other");
    open(&other).unwrap();
    for key in std::fs::read_dir(other.join("keys")).unwrap().flatten() {
        std::fs::copy(key.path(), path.join("keys").join(key.file_name())).unwrap();
    }
    open(&path).unwrap();
    assert!(std::fs::read_dir(path.join("keys")).unwrap().count() >= 2);
}

/// "Odoo's zip format in and out." `reference`, Health and upgrades: "`dump.sql` + `manifest.json` + `filestore/ab/<sha1>`".
#[test]
fn an_estate_leaves_as_odoos_zip_file_and_comes_back_from_one() {
    runtime().block_on(async {
        let house = House::new(50).await;
        let client = house.estate.connect().await.unwrap();
        client
            .batch_execute(
                "CREATE TABLE ir_module_module (id serial, name text, latest_version text, state text);
                 INSERT INTO ir_module_module (name, latest_version, state) VALUES ('base', '17.0.1.3', 'installed'),
                 ('sale', '17.0.1.0', 'installed'), ('crm', NULL, 'uninstalled');
                 CREATE EXTENSION pg_trgm; COMMENT ON TABLE res_partner IS 'it''s; ours';
                 INSERT INTO res_partner (name, note) VALUES (E'tab\\there', E'line\\nline \\\\. end;');
                 CREATE FUNCTION twice(i int) RETURNS int BEGIN ATOMIC SELECT i * 2; END",
            )
            .await
            .unwrap();
        house.attach(6, 0).await;
        house.save().await;
        let before = exact(&client).await;
        let file = house.directory.path().join("acme.zip");
        let repository = Arc::new(house.repository());
        let exported =
            export(&repository, &RestorePoint::Latest, &house.server(), &file, &Control::default()).await.unwrap();
        assert_eq!(exported.files, 6);
        let error = export(&repository, &RestorePoint::Latest, &house.server(), &file, &Control::default()).await;
        assert!(error.unwrap_err().to_string().contains("is there already"));
        // As Python, in which Odoo is written, sees it.
        let script = "import json,sys,zipfile; z=zipfile.ZipFile(sys.argv[1]); assert z.testzip() is None; \
                      m=json.loads(z.read('manifest.json')); print(m['odoo_dump'], m['major_version'], m['version_info'], \
                      sorted(m['modules']), len([n for n in z.namelist() if n.startswith('filestore/')]))";
        let output = Command::new("python3").args(["-c", script]).arg(&file).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.trim(), "1 17.0 [17, 0] ['base', 'sale'] 6", "{}", String::from_utf8_lossy(&output.stderr));

        let import = |database: &str, identity| Import {
            restore: Restore { database: database.into(), owner: Some("acme_owner".into()), ..house.restore() },
            file: file.clone(),
            identity,
        };
        let error = import("acme", Identity::Moved).run(&Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("database acme is there already"), "{error}");
        let moved = import("moved", Identity::Moved).run(&Control::default()).await.unwrap();
        assert_eq!(moved.files, 6);
        let there = house.cluster.connect("acme_owner", "odoo", "moved").await.unwrap();
        assert_eq!(exact(&there).await, before);
        let query = "SELECT twice(21), obj_description('res_partner'::regclass), \
                     (SELECT note FROM res_partner WHERE name LIKE E'tab\\t%')";
        let row = there.query_one(query, &[]).await.unwrap();
        assert_eq!((row.get::<_, i32>(0), row.get::<_, String>(1).as_str()), (42, "it's; ours"));
        assert_eq!(row.get::<_, String>(2), "line\nline \\. end;");
        let uuid = "SELECT value FROM ir_config_parameter WHERE key = 'database.uuid'";
        let original: String = client.query_one(uuid, &[]).await.unwrap().get(0);
        assert_eq!(there.query_one(uuid, &[]).await.unwrap().get::<_, String>(0), original);
        let identity = Identity::Copied { base_url: Some("https://copy.example.com".into()), keep_integrations: false };
        import("copied", identity).run(&Control::default()).await.unwrap();
        let copy = house.cluster.connect("acme_owner", "odoo", "copied").await.unwrap();
        assert_ne!(copy.query_one(uuid, &[]).await.unwrap().get::<_, String>(0), original);
        let active = "SELECT count(*) FROM ir_mail_server WHERE active AND smtp_host <> 'invalid'";
        assert_eq!(copy.query_one(active, &[]).await.unwrap().get::<_, i64>(0), 0);

        // A file from somebody else is nobody's program and nobody's path.
        let hostile = house.directory.path().join("hostile.zip");
        for (sql, name, expected) in [
            ("SELECT 1;\n\\! touch /tmp/cofferdam-was-here\n", "filestore/aa/x", "is a command for psql"),
            ("CREATE ROLE intruder SUPERUSER;\n", "filestore/aa/x", "superuser"),
            ("COPY (SELECT 1) TO PROGRAM 'touch /tmp/cofferdam-was-here';\n", "filestore/aa/x", "external program"),
            ("RESET ROLE; CREATE DATABASE intruder;\n", "filestore/aa/x", "CREATE DATABASE"),
            ("SELECT 'unfinished\n", "filestore/aa/x", "ends inside a statement"),
        ] {
            let script = "import sys,zipfile; z=zipfile.ZipFile(sys.argv[1],'w'); \
                          z.writestr('dump.sql', sys.argv[2]); z.writestr(sys.argv[3], 'x')";
            let made = Command::new("python3").args(["-c", script]).arg(&hostile).args([sql, name]).status().unwrap();
            assert!(made.success());
            let import = Import { file: hostile.clone(), ..import("bad", Identity::Moved) };
            let error = import.run(&Control::default()).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{sql}: {error}");
        }
        let script = "import sys,zipfile; z=zipfile.ZipFile(sys.argv[1],'w'); z.writestr('dump.sql', 'SELECT 1;\\n'); \
                      z.writestr('filestore/../../escaped', 'x'); z.writestr('filestore/ab/good', 'x')";
        assert!(Command::new("python3").args(["-c", script]).arg(&hostile).status().unwrap().success());
        let import = Import { file: hostile, ..import("bad", Identity::Moved) };
        assert_eq!(import.run(&Control::default()).await.unwrap().files, 1);
        assert!(!house.directory.path().join("escaped").exists());
        assert!(!Path::new("/tmp/cofferdam-was-here").exists());
        let query = "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database WHERE datname ~ '^(acme|bad|copied|moved)'";
        let admin = house.cluster.admin("postgres").await.unwrap();
        let all: String = admin.query_one(query, &[]).await.unwrap().get(0);
        assert_eq!(all, "acme bad copied moved", "nothing half-loaded stays");
    });
}

/// "Every request sees old or new, none fails; revert the same."
#[test]
fn a_swap_through_the_gateway_under_load_fails_nobody() {
    runtime().block_on(async {
        let console = "  console:\n    admins: [{ role: chief, password: chief-secret }]\n";
        let site = Site::start_with(SiteOptions { postgres: console.into(), ..SiteOptions::default() }).await;
        let directory = tempfile::tempdir().unwrap();
        let estate = Estate::furnish(&site.cluster, "acme_db", &directory.path().join("filestore"), 50).await.unwrap();
        let admin = estate.connect().await.unwrap();
        admin
            .batch_execute(
                "GRANT ALL ON ALL TABLES IN SCHEMA public TO odoo; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO odoo",
            )
            .await
            .unwrap();
        estate.attach(&admin, b"an attachment").await.unwrap();
        let mut server = Server::new("127.0.0.1", site.cluster.port(), SUPERUSER.0, Some(Secret::new(SUPERUSER.1)));
        server.programs = Some(binaries().unwrap());
        let store = Arc::new(Directory::new(directory.path().join("repository")));
        let through = Server { port: site.address().port(), ..server.clone() };
        let backup = Backup {
            tenant: Slug::parse("acme").unwrap(),
            // The dump waits its turn at the gateway, with a login that the gateway knows.
            dump_through: Some(Server {
                user: "odoo".into(),
                password: Some(Secret::new("odoo-secret")),
                ..through.clone()
            }),
            server: server.clone(),
            database: "acme_db".into(),
            filestore: estate.filestore.clone(),
            store: store.clone(),
            key: RepositoryKey::new(KEY).unwrap(),
            policy: BackupPolicy::default(),
        };
        let set = backup.run(&Control::default()).await.unwrap();
        assert_eq!(set.consistency, Consistency::Fenced);
        admin.batch_execute("UPDATE res_partner SET name = 'new'").await.unwrap();
        drop(admin);

        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (stop, port) = (Arc::clone(&stop), site.address().port());
                tokio::spawn(async move {
                    let client =
                        cofferdam_testkit::postgres::connect(port, "odoo", "odoo-secret", "acme_db").await.unwrap();
                    let mut seen = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
                        let query = "SELECT string_agg(DISTINCT name, ',') FROM res_partner WHERE id < 3";
                        let rows = client.simple_query(query).await.unwrap();
                        let name = rows.iter().find_map(|row| match row {
                            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                            _ => None,
                        });
                        client.batch_execute("COMMIT").await.unwrap();
                        let name = name.unwrap();
                        if seen.last() != Some(&name) {
                            seen.push(name);
                        }
                    }
                    seen
                })
            })
            .collect();
        let restore = Restore {
            tenant: Slug::parse("acme").unwrap(),
            server,
            database: "acme_db".into(),
            owner: None,
            filestores: directory.path().join("filestore"),
            store,
            key: RepositoryKey::new(KEY).unwrap(),
            gateway: Some(GatewayConsole::new(
                Server { user: "chief".into(), password: Some(Secret::new("chief-secret")), ..through },
                "cofferdam",
            )),
        };
        tokio::time::sleep(Duration::from_millis(200)).await;
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let reverted = restore.revert(&swapped.previous.unwrap(), &Control::default()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            // New, then the old state, then new again: never both, never an error.
            assert_eq!(worker.await.unwrap(), ["new", "Partner 1,Partner 2", "new"]);
        }
        eprintln!("paused for {:?} ms and {:?} ms", swapped.paused_ms.unwrap(), reverted.paused_ms.unwrap());
    });
}

fn s3(store: &ObjectStore, bucket: &str, immutability: Option<Immutability>) -> S3 {
    let options = S3Options {
        bucket: bucket.into(),
        prefix: "backups/acme/".into(),
        region: "us-east-1".into(),
        endpoint: Some(store.endpoint()),
        path_style: true,
        access_key: s3::CREDENTIALS.0.into(),
        secret_key: Secret::new(s3::CREDENTIALS.1),
        ca: None,
        immutability,
    };
    S3::new(options, tokio::runtime::Handle::current()).unwrap()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// `reference`, Backup: "Object lock: read mode and date back after every PUT and multipart … extend the retention of
/// everything reachable at each backup."
#[test]
fn objects_in_s3_are_locked_and_a_store_that_forgets_is_found_out() {
    runtime().block_on(async {
        let strict = blocking(|| ObjectStore::strict().unwrap()).await;
        let forgetful = blocking(|| ObjectStore::forgetful().unwrap()).await;
        let (Some(strict), Some(forgetful)) = (strict, forgetful) else {
            eprintln!("skipped: no S3 server is installed here (make install-test)");
            return;
        };
        let period = HumanDuration(Duration::from_secs(3_600));
        let immutability = Immutability { mode: LockMode::Compliance, period };
        let house = House::new(10).await;
        // Larger than is written in one piece, and not to be compressed.
        let client = house.estate.connect().await.unwrap();
        let mut noise = vec![0; 20 << 20];
        fastrand::fill(&mut noise);
        house.estate.attach(&client, &noise).await.unwrap();
        house.attach(5, 0).await;
        for (server, honest) in [(&strict, true), (&forgetful, false)] {
            let plain = s3(server, "plain", None);
            let plain = blocking(move || {
                plain.create_bucket(false).unwrap();
                plain
            })
            .await;
            blocking(move || cofferdam_backup::repository::conformance::check(&plain).unwrap()).await;

            let locked = s3(server, "locked", Some(immutability));
            let locked = Arc::new(
                blocking(move || {
                    locked.create_bucket(true).unwrap();
                    locked
                })
                .await,
            );
            let mut backup = house.backup();
            backup.store = locked.clone();
            let first = backup.run(&Control::default()).await.unwrap();
            if !honest {
                let LockAttestation::NotLocked { reason } = &first.lock else { panic!("{:?}", first.lock) };
                eprintln!("the forgetful store: {reason}");
                continue;
            }
            let LockAttestation::Locked { until, objects, .. } = first.lock else { panic!("{:?}", first.lock) };
            assert!(objects >= 5 && until > jiff::Timestamp::now() + jiff::SignedDuration::from_mins(59));
            house.attach(2, 50).await;
            // A longer period: what the second set shares with the first is locked anew.
            let longer = Immutability { period: HumanDuration(Duration::from_secs(7_200)), ..immutability };
            backup.store = Arc::new(s3(server, "locked", Some(longer)));
            let second = backup.run(&Control::default()).await.unwrap();
            let LockAttestation::Locked { until, .. } = second.lock else { panic!("{:?}", second.lock) };
            assert!(until > jiff::Timestamp::now() + jiff::SignedDuration::from_mins(119));
            let mut restore = house.restore();
            restore.store = backup.store.clone();
            let point = RestorePoint::Set { id: first.id.clone() };
            let restored = restore.run(&point, &RestoreMode::Scratch, &Control::default()).await.unwrap();
            assert_eq!(restored.files, 6);
            // A lock cannot be shortened: the store holds what it has said.
            let name = blocking({
                let store = backup.store.clone();
                move || store.list("data/").unwrap().remove(0).name
            })
            .await;
            let shorter = ObjectLock {
                mode: LockMode::Compliance,
                until: jiff::Timestamp::now() + jiff::SignedDuration::from_mins(1),
            };
            blocking(move || locked.locks().unwrap().extend(&name, shorter).unwrap_err()).await;
        }
    });
}

fn pgbackrest(directory: &Path, cluster: &Cluster) -> PgBackRest {
    let repository = directory.join("physical");
    PgBackRest {
        program: "/usr/bin/pgbackrest".into(),
        stanza: "shared".into(),
        repository: vec![
            format!("--repo1-path={}", repository.display()),
            format!("--log-path={}", repository.display()),
        ],
        cluster: vec![
            format!("--pg1-path={}", cluster.data().display()),
            format!("--pg1-port={}", cluster.port()),
            format!("--pg1-socket-path={}", cluster.socket_directory().display()),
            format!("--pg1-user={}", SUPERUSER.0),
        ],
        backup_options: ["--compress-type=lz4", "--repo1-bundle", "--repo1-retention-full=2", "--archive-timeout=30"]
            .map(str::to_owned)
            .to_vec(),
        locks: repository.join("locks"),
    }
}

/// `reference`, Backup: "One tenant to a point in time … `--type=time --db-include=T` into scratch …
/// `ignore_invalid_pages=on` recovers, and the warnings must be classified."
#[test]
fn one_tenant_goes_back_to_a_second_before_a_mistake_and_its_neighbours_notice_nothing() {
    runtime().block_on(async {
        let directory = tempfile::Builder::new().prefix("cofferdam-pitr-").tempdir().unwrap();
        let physical = directory.path().join("physical");
        std::fs::create_dir_all(physical.join("locks")).unwrap();
        open_to_everybody(directory.path());
        let archive = format!(
            "archive_command = 'pgbackrest --no-config --stanza=shared --repo1-path={0} --pg1-path=\"$(pwd)\" \
             --lock-path={0}/locks --log-path={0} --log-level-file=off --compress-type=lz4 archive-push %p'",
            physical.display()
        );
        // Trust on the socket: pgBackRest connects as the superuser.
        let settings =
            vec!["archive_mode = on".into(), "wal_level = replica".into(), archive, "autovacuum = off".into()];
        let options = ClusterOptions { auth: "trust", settings, ..ClusterOptions::default() };
        let cluster = Cluster::start_with(&options).unwrap();
        let filestores = directory.path().join("filestore");
        let mut estates = Vec::new();
        for name in ["acme", "beta", "core"] {
            estates.push(Estate::create(&cluster, name, &filestores, 300).await.unwrap());
        }
        let [acme, beta, core] = &estates[..] else { unreachable!() };
        let stanza = pgbackrest(directory.path(), &cluster);
        {
            let stanza = stanza.clone();
            blocking(move || {
                stanza.create_stanza().unwrap();
                stanza.backup(BackupKind::Full).unwrap();
            })
            .await;
        }
        let in_beta = beta.connect().await.unwrap();
        let kept = beta.attach(&in_beta, b"written after the backup of the cluster").await.unwrap();
        // Neighbours write, vacuum and drop meanwhile: the log then speaks of pages that are not restored.
        let (in_acme, in_core) = (acme.connect().await.unwrap(), core.connect().await.unwrap());
        for client in [&in_acme, &in_core] {
            client.batch_execute("DELETE FROM account_move_line WHERE id % 2 = 0").await.unwrap();
            client.batch_execute("VACUUM").await.unwrap();
            client.batch_execute("CREATE TABLE more AS SELECT generate_series(1, 2000) i").await.unwrap();
        }
        drop(in_core);
        in_beta.batch_execute("UPDATE res_partner SET note = 'just before'").await.unwrap();
        let before = exact(&in_beta).await;
        let now: f64 =
            in_beta.query_one("SELECT extract(epoch FROM clock_timestamp())::float8", &[]).await.unwrap().get(0);
        let at = jiff::Timestamp::from_microsecond((now * 1e6) as i64).unwrap();
        in_beta.batch_execute("SELECT pg_sleep(1.1)").await.unwrap();
        in_beta.batch_execute("DROP TABLE account_move_line; DELETE FROM ir_attachment").await.unwrap();
        let admin = cluster.admin("postgres").await.unwrap();
        admin.batch_execute("DROP DATABASE core WITH (FORCE)").await.unwrap();
        in_acme.batch_execute("INSERT INTO more SELECT generate_series(1, 100)").await.unwrap();
        let in_acme_before = in_acme.query_one("SELECT count(*) FROM more", &[]).await.unwrap().get::<_, i64>(0);
        admin.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        cofferdam_tests::eventually(async || {
            let query = "SELECT last_archived_time > to_timestamp($1) FROM pg_stat_archiver";
            admin.query_one(query, &[&(now + 1.0)]).await.unwrap().get::<_, Option<bool>>(0) == Some(true)
        })
        .await;
        drop(in_beta);

        let mut server = Server::new("127.0.0.1", cluster.port(), SUPERUSER.0, Some(Secret::new(SUPERUSER.1)));
        server.programs = Some(binaries().unwrap());
        let restore = Restore {
            tenant: Slug::parse("beta").unwrap(),
            server,
            database: "beta".into(),
            owner: None,
            filestores: filestores.clone(),
            store: Arc::new(Directory::new(directory.path().join("logical"))),
            key: RepositoryKey::new(KEY).unwrap(),
            gateway: None,
        };
        let recovery = |at| Recovery {
            engine: Arc::new(stanza.clone()),
            database: "beta".into(),
            at,
            programs: Some(binaries().unwrap()),
            place: None,
        };
        let recovered = recovery(at).run(&Control::default()).await.unwrap();
        eprintln!("{recovered:?}");
        assert!(recovered.foreign_pages > 0, "the log speaks of pages of the neighbours, and they were told apart");
        drop(recovered);
        let restored = restore.to_time(&recovery(at), &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        let in_beta = beta.connect().await.unwrap();
        assert_eq!(exact(&in_beta).await, before, "beta is exactly what it was");
        assert_eq!(restored.files, 1);
        assert_eq!(beta.missing(&beta.filestore).await.unwrap(), Vec::<String>::new(), "{kept}");
        let in_acme_now = in_acme.query_one("SELECT count(*) FROM more", &[]).await.unwrap().get::<_, i64>(0);
        assert_eq!(in_acme_now, in_acme_before, "acme has noticed nothing");

        // In the future, before the first backup, and where a segment is missing: refused before anything is restored.
        let refused = async |at| restore.to_time(&recovery(at), &RestoreMode::Scratch, &Control::default()).await;
        let error = refused(jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1)).await.unwrap_err();
        assert!(error.to_string().contains("the log is archived up to about"), "{error}");
        let error = refused(at - jiff::SignedDuration::from_hours(1)).await.unwrap_err();
        assert!(error.to_string().contains("no backup of the cluster was complete before"), "{error}");
        let window = blocking({
            let stanza = stanza.clone();
            move || stanza.window().unwrap()
        })
        .await;
        assert!(window.contains(at) && window.gaps.is_empty(), "{window:?}");
        let removed = remove_a_segment(&physical, &admin).await;
        let error = refused(jiff::Timestamp::now()).await.unwrap_err();
        assert!(error.to_string().contains(&format!("segment {removed} of the log is missing")), "{error}");
        let window = blocking(move || stanza.window().unwrap()).await;
        assert!(window.gaps.iter().any(|gap| gap.reason.contains(&removed)), "{window:?}");
    });
}

/// Everything in a database that a mistake could change, as one number per table.
async fn exact(client: &tokio_postgres::Client) -> Vec<String> {
    let mut found = Vec::new();
    for table in ["account_move_line", "res_partner", "ir_attachment", "ir_config_parameter"] {
        let query = format!("SELECT count(*) || ' ' || md5(string_agg(t::text, '|' ORDER BY id)) FROM {table} t");
        found.push(client.query_one(&query, &[]).await.unwrap().get(0));
    }
    found
}

/// Removes the newest archived segment but one, after there are two more.
async fn remove_a_segment(repository: &Path, admin: &tokio_postgres::Client) -> String {
    let mut segments = Vec::new();
    for _ in 0..2 {
        admin.batch_execute("SELECT txid_current(); SELECT pg_switch_wal()").await.unwrap();
        let known = segments.len();
        cofferdam_tests::eventually(async || {
            segments.clear();
            let mut stack = vec![repository.join("archive/shared")];
            while let Some(next) = stack.pop() {
                for entry in std::fs::read_dir(next).into_iter().flatten().flatten() {
                    let name = entry.file_name().into_string().unwrap();
                    if entry.path().is_dir() {
                        stack.push(entry.path());
                    } else if name.len() > 60 && name.as_bytes()[24] == b'-' {
                        segments.push((name, entry.path()));
                    }
                }
            }
            segments.sort();
            segments.len() > known.max(1)
        })
        .await;
    }
    let (name, path) = &segments[segments.len() - 2];
    std::fs::remove_file(path).unwrap();
    name[..24].to_owned()
}

/// PostgreSQL and pgBackRest run as another account when the tests run as root.
fn open_to_everybody(directory: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let mut stack = vec![directory.to_owned()];
    while let Some(next) = stack.pop() {
        std::fs::set_permissions(&next, std::fs::Permissions::from_mode(0o777)).unwrap();
        stack.extend(std::fs::read_dir(&next).unwrap().flatten().map(|e| e.path()).filter(|p| p.is_dir()));
    }
}
