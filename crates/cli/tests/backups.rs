//! `cofferdam backup`, `restore` and `drill` as an operator uses them, and as a power cut leaves them.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use cofferdam_testkit::odoo::Estate;
use cofferdam_testkit::postgres::{Cluster, ClusterOptions, SUPERUSER, binaries};
use tempfile::TempDir;

struct House {
    cluster: Cluster,
    directory: TempDir,
    estate: Estate,
}

impl House {
    async fn new(partners: u32) -> Self {
        Self::on(Cluster::start().unwrap(), partners).await
    }

    async fn on(cluster: Cluster, partners: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let estate = Estate::create(&cluster, "acme", &directory.path().join("filestore"), partners).await.unwrap();
        let house = Self { cluster, directory, estate };
        house.write("keys/acme.key", "correct horse battery staple\n");
        house.write("password", SUPERUSER.1);
        house.write("signing.key", &"07".repeat(32));
        house.write(
            "backup.yaml",
            &format!(
                "repository:\n  directory: 'repository/{{tenant}}'\n  key: {{ file: 'keys/{{tenant}}.key' }}\n\
                 servers:\n  main: {{ host: 127.0.0.1, port: {}, user: {}, password_file: password, programs: {} }}\n\
                 filestores: filestore\ndrills: {{ reports: reports, signing_key_file: signing.key, \
                 check_command: [sh, -c, 'ls $COFFERDAM_FILESTORE/$COFFERDAM_DATABASE | wc -l; {}/psql -Atc \"SELECT count(*) FROM res_partner\"'] }}\ntenants:\n  acme: {{}}\n",
                house.cluster.port(),
                SUPERUSER.0,
                binaries().unwrap().display(),
                binaries().unwrap().display()
            ),
        );
        house
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
        command.args(arguments).arg("--config").arg(self.path().join("backup.yaml")).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn good(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {out}{err}");
        out.into_owned()
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.good(&[arguments, &["--json"]].concat())).unwrap()
    }

    async fn attach(&self, number: u32) {
        let client = self.estate.connect().await.unwrap();
        for i in 0..number {
            self.estate.attach(&client, format!("attachment {i}").repeat(3_000).as_bytes()).await.unwrap();
        }
    }
}

fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_saves_looks_drills_swaps_and_goes_back() {
    let house = House::new(100).await;
    house.attach(4).await;
    assert!(house.good(&["backup", "list"]).contains("everything"), "nothing is saved yet");
    let sets = house.json(&["backup", "now"]);
    let id = sets[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(sets[0]["consistency"], "fenced");
    assert!(house.good(&["backup", "list", "acme"]).contains(&id[..8]));
    assert!(house.good(&["backup", "show", "acme"]).contains(&id));
    assert!(house.good(&["backup", "verify", "--read-data"]).contains("acme: whole, 1 backups"));

    let reports = house.json(&["drill", "run"]);
    let report = &reports[0]["report"];
    assert_eq!(report["passed"], true, "{report}");
    let states: Vec<_> = report["checks"].as_array().unwrap().iter().map(|c| c["state"].as_str().unwrap()).collect();
    assert!(states.iter().all(|state| *state == "pass"), "{report}");
    let file = std::fs::read_dir(house.path().join("reports"))
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "json"))
        .unwrap();
    let public = reports[0]["signature"]["public_key"].as_str().unwrap();
    let file_name = file.to_str().unwrap();
    assert!(house.good(&["drill", "report", file_name, "--public-key", public]).contains("unchanged since"));
    let forged = std::fs::read_to_string(&file).unwrap().replace("\"rpo_ms\": ", "\"rpo_ms\": 1");
    std::fs::write(&file, forged).unwrap();
    let output = house.run(&["drill", "report", file_name, "--public-key", public]);
    assert!(!output.status.success() && error_of(&output).contains("not signed by that key"), "{output:?}");

    let client = house.estate.connect().await.unwrap();
    client.batch_execute("DELETE FROM account_move_line").await.unwrap();
    drop(client);
    // Without somebody to agree nothing happens.
    let output = house.run(&["restore", "swap", "acme"]);
    assert!(!output.status.success() && error_of(&output).contains("say --yes"), "{output:?}");
    assert!(error_of(&output).contains("rename acme away"), "the plan is shown: {output:?}");
    house.good(&["restore", "swap", "acme", "--yes"]);
    let count = async || {
        let client = house.estate.connect().await.unwrap();
        client.query_one("SELECT count(*) FROM account_move_line", &[]).await.unwrap().get::<_, i64>(0)
    };
    assert_eq!(count().await, 1_000);
    house.good(&["restore", "revert", "acme", "--yes"]);
    assert_eq!(count().await, 0);

    // What is held stays, whoever asks.
    house.good(&["backup", "hold", "acme", &id[..8], "--reason", "case 7", "--by", "counsel"]);
    let output = house.run(&["backup", "forget", "acme", &id[..8], "--yes"]);
    assert!(error_of(&output).contains("is under a legal hold (case 7, by counsel)"), "{output:?}");
    house.good(&["backup", "release", "acme", &id[..8]]);
    house.good(&["backup", "forget", "acme", &id[..8], "--yes"]);
    assert_eq!(house.good(&["backup", "list", "acme"]).trim(), "no backups");
    house.good(&["backup", "prune"]);
    // A run by schedule makes the first backup at once.
    assert!(house.good(&["backup", "run", "--once"]).contains("acme: backup"));
    // A drill that is due is run by schedule too, once there is something to try. A sixth field in front counts seconds.
    let config = std::fs::read_to_string(house.path().join("backup.yaml")).unwrap();
    let schedule = "drills: { schedule: { cron: '*/2 * * * * *', jitter: 0s },";
    house.write("backup.yaml", &config.replace("drills: {", schedule));
    std::fs::remove_dir_all(house.path().join("reports")).unwrap();
    let textfile = house.path().join("backup.prom");
    let mut runner = house.command(&["backup", "run", "--textfile", textfile.to_str().unwrap()]);
    let mut runner = runner.stdout(Stdio::piped()).spawn().unwrap();
    let metrics = || std::fs::read_to_string(&textfile).unwrap_or_default();
    let told = |name: &str| metrics().lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
    for _ in 0..600 {
        if told("cofferdam_drill_passed{tenant=\"acme\"}").is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(told("cofferdam_drill_passed{tenant=\"acme\"}"), Some(1.0), "{}", metrics());
    // Nobody has written since the backup: nothing would be lost, although it is some seconds old.
    assert_eq!(told("cofferdam_backup_rpo_seconds{tenant=\"acme\"}"), Some(0.0), "{}", metrics());
    assert!(std::fs::read_dir(house.path().join("reports")).unwrap().count() >= 2);
    Command::new("kill").arg(runner.id().to_string()).status().unwrap();
    assert!(runner.wait().unwrap().success());
}

/// One tenant, to a second before a mistake, out of the backup of a whole server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_brings_one_tenant_back_to_a_point_in_time() {
    let directory = tempfile::Builder::new().prefix("cofferdam-pitr-").tempdir().unwrap();
    let repository = directory.path().join("physical");
    std::fs::create_dir_all(repository.join("locks")).unwrap();
    // The server is not run by root.
    for path in [directory.path(), &repository, &repository.join("locks")] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    }
    let own = format!(
        "--no-config --stanza=shared --repo1-path={0} --lock-path={0}/locks --log-path={0} --log-level-file=off",
        repository.display()
    );
    let settings = vec![
        "archive_mode = on".into(),
        "wal_level = replica".into(),
        format!("archive_command = 'pgbackrest {own} --pg1-path=\"$(pwd)\" archive-push %p'"),
    ];
    let cluster =
        Cluster::start_with(&ClusterOptions { auth: "trust", settings, ..ClusterOptions::default() }).unwrap();
    let house = House::on(cluster, 50).await;
    let config = std::fs::read_to_string(house.path().join("backup.yaml")).unwrap();
    let physical = format!(
        ", pgbackrest: {{ stanza: shared, repository: ['--repo1-path={0}', '--log-path={0}'] }} }}\nfilestores",
        repository.display()
    );
    house.write("backup.yaml", &config.replace(" }\nfilestores", &physical));
    let pgbackrest = |command: &[&str]| {
        // As whoever the server runs as: it owns its files.
        let mut program = Command::new("su");
        let cluster = format!(
            "--pg1-path={} --pg1-port={} --pg1-socket-path={} --pg1-user={}",
            house.cluster.data().display(),
            house.cluster.port(),
            house.cluster.socket_directory().display(),
            SUPERUSER.0
        );
        let line = format!("pgbackrest {own} {cluster} {}", command.join(" "));
        let root = std::fs::metadata("/proc/self").map(|data| std::os::unix::fs::MetadataExt::uid(&data)).unwrap() == 0;
        if root {
            program.args(["postgres", "-s", "/bin/sh", "-c", &line]);
        } else {
            program = Command::new("sh");
            program.args(["-c", &line]);
        }
        let output = program.output().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
    };
    pgbackrest(&["stanza-create"]);
    pgbackrest(&["--type=full", "--repo1-retention-full=2", "--archive-timeout=30", "--start-fast", "backup"]);
    let client = house.estate.connect().await.unwrap();
    client.batch_execute("UPDATE res_partner SET name = 'right'").await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
    let at: String = client.query_one(now, &[]).await.unwrap().get(0);
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    client.batch_execute("UPDATE res_partner SET name = 'wrong'").await.unwrap();
    client.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    let admin = house.cluster.admin("postgres").await.unwrap();
    for _ in 0..300 {
        let archived = "SELECT last_archived_time > $1::text::timestamptz FROM pg_stat_archiver";
        if admin.query_one(archived, &[&at]).await.unwrap().get::<_, Option<bool>>(0) == Some(true) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(client);
    let output = house.run(&["restore", "pitr", "acme", "--at", "2020-01-01T00:00:00Z", "--swap", "--yes"]);
    assert!(!output.status.success() && error_of(&output).contains("nothing was changed"), "{output:?}");
    let output = house.run(&["restore", "pitr", "acme", "--at", &at, "--swap"]);
    assert!(!output.status.success() && error_of(&output).contains("say --yes"), "{output:?}");
    let restored = house.json(&["restore", "pitr", "acme", "--at", &at, "--swap", "--yes"]);
    let name = async || {
        let client = house.estate.connect().await.unwrap();
        client.query_one("SELECT max(name) FROM res_partner", &[]).await.unwrap().get::<_, String>(0)
    };
    assert_eq!(name().await, "right", "{restored}");
    house.good(&["restore", "revert", "acme", "--yes"]);
    assert_eq!(name().await, "wrong");
}

#[tokio::test]
async fn what_is_wrong_is_said_and_changes_nothing() {
    let house = House::new(1).await;
    let output = house.run(&["backup", "now", "acne"]);
    assert!(
        error_of(&output).contains("there is no tenant `acne` in the configuration; there are: acme"),
        "{output:?}"
    );
    house.write("keys/acme.key", "short");
    let output = house.run(&["backup", "now"]);
    assert!(error_of(&output).contains("found 5 characters, expected at least 16"), "{output:?}");
    assert!(!house.path().join("repository").exists());
    let output = house.run(&["backup", "verify"]);
    assert!(!output.status.success(), "{output:?}");
    let good = std::fs::read_to_string(house.path().join("backup.yaml")).unwrap();
    house.write("backup.yaml", &good.replace("filestores:", "filestore:"));
    let output = house.run(&["backup", "check"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(error_of(&output).contains("filestore"), "{output:?}");
}

/// `KILLS=100` for as many as are promised.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_killed_anywhere_leaves_nothing_that_looks_whole() {
    let kills: u32 = std::env::var("KILLS").map_or(30, |n| n.parse().unwrap());
    let house = House::new(3_000).await;
    house.attach(60).await;
    house.good(&["backup", "now", "--quiet"]);
    let client = house.estate.connect().await.unwrap();
    client.batch_execute("SET lock_timeout = '5s'").await.unwrap();
    let longest = {
        let started = std::time::Instant::now();
        house.good(&["backup", "now", "--quiet"]);
        started.elapsed()
    };
    let mut survived = 0;
    for round in 0..kills {
        // Something new to store, so that every phase has something to do.
        house.estate.attach(&client, format!("round {round}").repeat(100_000).as_bytes()).await.unwrap();
        client.batch_execute("UPDATE res_partner SET note = md5(random()::text)").await.unwrap();
        let mut child =
            house.command(&["backup", "now", "--quiet"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        tokio::time::sleep(Duration::from_secs_f64(longest.as_secs_f64() * fastrand::f64() * 1.1)).await;
        let ended = child.try_wait().unwrap();
        survived += u32::from(ended.is_some_and(|status| status.success()));
        child.kill().unwrap();
        child.wait().unwrap();
        // No fence is left: the whole table can be had.
        client.batch_execute("BEGIN; LOCK ir_attachment IN ACCESS EXCLUSIVE MODE; COMMIT").await.unwrap();
    }
    let sets = house.json(&["backup", "list", "acme"]);
    let sets = sets.as_array().unwrap();
    eprintln!("{kills} backups killed, {survived} of them had ended before, {} sets in all", sets.len());
    assert!(sets.len() as u32 >= 2 + survived);
    assert!(sets.iter().all(|set| set["consistency"] == "fenced"));
    house.good(&["backup", "verify", "--read-data"]);
    // The next run works, and what is restored is what there is.
    house.good(&["backup", "now", "--quiet"]);
    let restored = house.json(&["restore", "scratch", "acme", "--quiet"]);
    let copy =
        Estate::existing(&house.cluster, restored["database"].as_str().unwrap(), &house.path().join("filestore"));
    assert_eq!(
        copy.missing(&PathBuf::from(restored["filestore"].as_str().unwrap())).await.unwrap(),
        Vec::<String>::new()
    );
}
