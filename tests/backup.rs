//! Backups against a real PostgreSQL, with writers and a collector at work, read back by `restic` too.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cofferdam_backup::drill::Drill;
use cofferdam_backup::logical::Backup;
use cofferdam_backup::model::{
    BackupPolicy, CheckState, Consistency, FenceLimits, Immutability, LockAttestation, LockMode, Parallel,
    RestoreDrill, RestoreMode, RestorePoint,
};
use cofferdam_backup::repository::{
    AzureOptions, Cloud, Depth, Directory, GoogleOptions, ObjectLock, Repository, RepositoryKey, S3, S3Options, Store,
};
use cofferdam_backup::restore::Restore;
use cofferdam_backup::{Control, Error, Server};
use cofferdam_health::probe::{ClusterLimits, ClusterProbe, Database, Tls, conformance};
use cofferdam_tenant::{HumanDuration, Secret, ServerTls, Slug, TlsMode};
use cofferdam_testkit::odoo::Estate;
use cofferdam_testkit::postgres::{Cluster, ClusterOptions, SUPERUSER, binaries};
use cofferdam_testkit::s3::{self, ObjectStore};
use cofferdam_tests::house::{House, KEY, blocking, runtime};

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
            // Every one restored, each file hashed by the test itself.
            let restored = house.scratch(&set).await;
            let copy = Estate::existing(&house.cluster, &restored.database, &house.directory.path().join("filestore"));
            assert_eq!(copy.missing(&copy.filestore).await.unwrap(), Vec::<String>::new(), "round {round}");
            house.drop(&restored).await;
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
        drill_names(&house, &name).await;

        std::fs::remove_file(&pack).unwrap();
        let faults = house.repository().verify(Depth::Structure).unwrap().faults;
        assert!(faults.iter().any(|f| f.problem.contains(&name)), "{faults:?}");
        let error = house.restore().run(&point, &RestoreMode::Scratch, &Control::default()).await.unwrap_err();
        eprintln!("removed object: {error}");
        drill_names(&house, &name).await;
        // Nothing half-loaded stays.
        assert_eq!(house.databases().await, ["acme"]);

        std::fs::write(&pack, good).unwrap();
        assert_eq!(house.repository().verify(Depth::Everything).unwrap().faults, []);
        house.scratch(&set).await;
    });
}

/// A drill fails, and says which object of the repository is to blame.
async fn drill_names(house: &House, object: &str) {
    let Restore { tenant, store, key, .. } = house.restore();
    let drill = Drill {
        request: RestoreDrill {
            tenant,
            point: RestorePoint::Latest,
            check_command: Vec::new(),
            check_limit: HumanDuration(Duration::from_secs(60)),
        },
        objective: BackupPolicy::default().objective,
        store,
        key,
        programs: Some(binaries().unwrap()),
        place: None,
        parallel: Parallel::default(),
    };
    let report = drill.run(&Control::default()).await.unwrap();
    assert!(!report.passed, "{report:?}");
    let blamed = report.checks.iter().find(|check| check.name == "every object is what it was").unwrap();
    assert!(blamed.state == CheckState::Fail && blamed.detail.contains(object), "{blamed:?}");
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

#[test]
fn the_wrong_key_opens_nothing_and_leaves_nothing() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.save().await;
        let mut restore = house.restore();
        restore.key = RepositoryKey::new("another tenant's key").unwrap();
        let error = restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("the key of acme does not open this repository"), "{error}");
        assert_eq!(house.databases().await, ["acme"]);
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

/// Whoever connects later is seen too, and whoever has been connected for long has not waited for that long.
#[test]
fn whoever_waits_for_the_fence_is_seen_when_it_waits_and_waits_no_longer_than_it_may() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(3, 0).await;
        let mut backup = house.backup();
        backup.policy.fence.stall = HumanDuration(Duration::from_secs(1));
        for connected_before in [false, true] {
            let lock = "SET lock_timeout = '20s'; BEGIN; LOCK ir_attachment IN ACCESS EXCLUSIVE MODE; COMMIT";
            let before = house.estate.connect().await.unwrap();
            before.batch_execute("SELECT 1").await.unwrap();
            tokio::time::sleep(Duration::from_secs(4)).await;
            let (ready, begun) = tokio::sync::oneshot::channel();
            let ready = std::sync::Mutex::new(Some(ready));
            // Files take long to copy.
            let control = Control::new(move |event| {
                if format!("{event:?}").contains("reading database and files")
                    && let Some(ready) = ready.lock().unwrap().take()
                {
                    ready.send(()).unwrap();
                    // On the task's own thread, which is what takes long.
                    std::thread::park_timeout(Duration::from_secs(8));
                }
            });
            let wait = async {
                begun.await.unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
                let client = if connected_before { before } else { house.estate.connect().await.unwrap() };
                let started = std::time::Instant::now();
                client.batch_execute(lock).await.unwrap();
                started.elapsed()
            };
            let saving = backup.clone();
            let saving = tokio::spawn(async move { saving.run(&control).await });
            let waited = wait.await;
            let set = saving.await.unwrap().unwrap();
            assert!(waited < Duration::from_secs(5), "{waited:?}");
            let stall = Duration::from_millis(set.phases.stall_ms);
            assert!(
                (Duration::from_secs(1)..waited.max(Duration::from_secs(2))).contains(&stall),
                "{stall:?} of {waited:?}"
            );
        }
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

/// Nothing can be locked there, nor written.
#[test]
fn a_standby_is_saved_too_and_what_it_does_not_tell_is_told() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(5, 0).await;
        let owner = house.owner().await;
        owner
            .batch_execute("CREATE SEQUENCE used; SELECT nextval('used'); CREATE SEQUENCE unused START 7")
            .await
            .unwrap();
        let (house, standby) = blocking(move || {
            let standby = house.cluster.standby().unwrap();
            (house, standby)
        })
        .await;
        let server = Server { port: standby.port(), ..house.server() };
        let set = Backup { server, ..house.backup() }.run(&Control::default()).await.unwrap();
        assert_eq!(set.consistency, Consistency::Verified);
        let note = set.note.clone().unwrap();
        assert!(note.contains("where 1 sequences begin") && note.contains("unused"), "{note}");
        let scratch = house.scratch(&set).await;
        let client = house.cluster.admin(&scratch.database).await.unwrap();
        let row = client.query_one("SELECT nextval('used'), nextval('unused')", &[]).await.unwrap();
        assert_eq!((row.get::<_, i64>(0) > 1, row.get::<_, i64>(1)), (true, 7));
        assert_eq!(set.artifact.changes, None, "it counts only what it writes itself, which is nothing");

        // One that has stopped to follow has what it had, and a set of it is of then.
        let client = standby.admin("postgres").await.unwrap();
        client.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
        owner.batch_execute("CREATE TABLE late (id int)").await.unwrap();
        tokio::time::sleep(Duration::from_secs(4)).await;
        let server = Server { port: standby.port(), ..house.server() };
        let before = jiff::Timestamp::now();
        let set = Backup { server, ..house.backup() }.run(&Control::default()).await.unwrap();
        assert!(before.duration_since(set.taken_at).as_secs() >= 3, "{} is not {before}", set.taken_at);
        // What is due next is reckoned from when it was made, or it would be made again and again.
        assert!(set.began_at() >= before && set.began_at() <= set.finished_at, "{} is not {before}", set.began_at());
        let note = set.note.clone().unwrap();
        assert!(note.contains("the server follows another, and was "), "{note}");
        let scratch = house.scratch(&set).await;
        let client = house.cluster.admin(&scratch.database).await.unwrap();
        assert!(client.query_one("SELECT to_regclass('late') IS NULL", &[]).await.unwrap().get::<_, bool>(0));
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

/// Servers on other machines: encrypted, and checked as libpq checks them.
#[test]
fn connections_are_encrypted_and_the_server_is_checked_where_that_is_asked_for() {
    runtime().block_on(async {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let options =
            ClusterOptions { tls: Some((certificate.pem(), key.serialize_pem())), ..ClusterOptions::default() };
        let house = House::on(Cluster::start_with(&options).unwrap(), 5).await;
        house.attach(2, 0).await;
        let write = |name: &str, pem: &str| {
            let path = house.directory.path().join(name);
            std::fs::write(&path, pem).unwrap();
            path
        };
        let ours = write("ours.pem", &certificate.pem());
        let other = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
        let theirs = write("theirs.pem", &other.cert.pem());
        let tls = |ca_file: &Path| ServerTls { mode: TlsMode::VerifyFull, ca_file: Some(ca_file.to_owned()) };
        let with = |ca_file: &Path| Server { tls: tls(ca_file), ..house.server() };
        // Ours and that of PostgreSQL's programs.
        let backup = Backup { server: with(&ours), ..house.backup() };
        backup.run(&Control::default()).await.unwrap();
        let restore = Restore { server: with(&ours), ..house.restore() };
        restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &Control::default()).await.unwrap();
        let backup = Backup { server: with(&theirs), ..house.backup() };
        let error = backup.run(&Control::default()).await.unwrap_err().to_string();
        assert!(error.contains("certificate"), "{error}");
        let backup = Backup { dump_through: Some(with(&theirs)), ..house.backup() };
        let error = backup.run(&Control::default()).await.unwrap_err().to_string();
        assert!(error.contains("certificate verify failed"), "{error}");
        // Whoever only looks.
        let look = async |ca_file: &Path| {
            let server = Database {
                host: "127.0.0.1".into(),
                port: house.cluster.port(),
                user: SUPERUSER.0.into(),
                password: Some(Secret::new(SUPERUSER.1)),
                tls: Tls::read(&tls(ca_file)).unwrap(),
                database: "postgres".into(),
            };
            let probe = ClusterProbe::new("main", &server, ClusterLimits::default(), Duration::from_secs(30));
            conformance::check(&probe, ca_file == ours).await.unwrap();
        };
        look(&ours).await;
        look(&theirs).await;
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

/// Microsoft's emulator keeps its promises; Google has none that can be run here, so that its store is only tried where one is given:
/// `GOOGLE_BUCKET`, with `GOOGLE_SERVICE_ACCOUNT` (a file) and `GOOGLE_ENDPOINT` if it has them.
#[test]
fn containers_of_azure_and_buckets_of_google_keep_repositories() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(5, 0).await;
        let mut noise = vec![0; 20 << 20];
        fastrand::fill(&mut noise);
        house.estate.attach(&house.estate.connect().await.unwrap(), &noise).await.unwrap();
        let mut stores: Vec<Arc<dyn Store>> = Vec::new();
        let azure = blocking(|| ObjectStore::azure("backups").unwrap()).await;
        match &azure {
            Some(azure) => {
                let options = AzureOptions {
                    account: s3::ACCOUNT.0.into(),
                    container: "backups".into(),
                    // As it may be written for S3: a directory all the same.
                    prefix: "/odoo/acme".into(),
                    endpoint: Some(format!("{}/{}", azure.endpoint(), s3::ACCOUNT.0)),
                    access_key: Some(Secret::new(s3::ACCOUNT.1)),
                    ca: None,
                };
                let handle = tokio::runtime::Handle::current();
                stores.push(Arc::new(Cloud::azure(&options, handle.clone()).unwrap()));
                let wrong = AzureOptions { access_key: Some(Secret::new("d3Jvbmc=")), ..options.clone() };
                let wrong = Cloud::azure(&wrong, handle.clone()).unwrap();
                let error = blocking(move || wrong.list("").unwrap_err().to_string()).await;
                assert!(error.contains("azure://account/backups/odoo/acme/: list") && error.contains("403"), "{error}");
                let text = AzureOptions { ca: Some("no certificate".into()), ..options };
                let error = Cloud::azure(&text, handle).unwrap_err().to_string();
                assert!(error.contains("read the certificate authority of"), "{error}");
            }
            None => eprintln!("skipped: Azure's emulator is not installed here (make install-test)"),
        }
        match std::env::var("GOOGLE_BUCKET") {
            Ok(bucket) => {
                let account = std::env::var("GOOGLE_SERVICE_ACCOUNT").ok();
                let options = GoogleOptions {
                    bucket,
                    prefix: format!("cofferdam-test-{}/acme/", fastrand::u32(..)),
                    endpoint: std::env::var("GOOGLE_ENDPOINT").ok(),
                    service_account: account.map(|file| Secret::new(std::fs::read_to_string(file).unwrap())),
                    ca: None,
                };
                stores.push(Arc::new(Cloud::google(&options, tokio::runtime::Handle::current()).unwrap()));
            }
            Err(_) => eprintln!("skipped: no GOOGLE_BUCKET is given"),
        }
        for store in stores {
            let checked = Arc::clone(&store);
            blocking(move || cofferdam_backup::repository::conformance::check(&*checked).unwrap()).await;
            let mut backup = house.backup();
            backup.store = Arc::clone(&store);
            let set = backup.run(&Control::default()).await.unwrap();
            assert_eq!(set.lock, LockAttestation::NotAsked);
            backup.run(&Control::default()).await.unwrap();
            let restore = Restore { store, ..house.restore() };
            let point = RestorePoint::Set { id: set.id };
            let restored = restore.run(&point, &RestoreMode::Scratch, &Control::default()).await.unwrap();
            assert_eq!(restored.files, 6);
            house.drop(&restored).await;
        }
    });
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
