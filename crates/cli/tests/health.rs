//! `cofferdam health` as an operator uses it.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use cofferdam_testkit::postgres::{Cluster, SUPERUSER};
use tempfile::TempDir;

struct House {
    cluster: Cluster,
    directory: TempDir,
}

impl House {
    async fn new() -> Self {
        let cluster = Cluster::start().unwrap();
        let admin = cluster.admin("postgres").await.unwrap();
        let watcher = "CREATE ROLE watcher LOGIN PASSWORD 'watcher-secret'";
        admin.batch_execute(watcher).await.unwrap();
        for name in ["acme", "beta"] {
            cluster.create_database(name, SUPERUSER.0).await.unwrap();
            let client = cluster.admin(name).await.unwrap();
            let tables = "CREATE TABLE ir_module_module (id serial, name text, state text); \
                          INSERT INTO ir_module_module (name, state) VALUES ('base', 'installed'); \
                          CREATE TABLE ir_cron (id serial, cron_name text, active bool, nextcall timestamp); \
                          GRANT SELECT ON ir_module_module, ir_cron TO watcher";
            client.batch_execute(tables).await.unwrap();
        }
        let house = Self { cluster, directory: tempfile::tempdir().unwrap() };
        house.write("password", SUPERUSER.1);
        house.write("watcher", "watcher-secret");
        house.write(
            "health.yaml",
            &format!(
                "interval: 1s\nclusters:\n  main: {{ host: 127.0.0.1, port: {}, user: {}, password_file: password, tenant_user: watcher, \
                 tenant_password_file: watcher }}\n\
                 tenants:\n  acme: {{ calendar: de }}\n  beta: {{}}\n\
                 calendars: {{ de: {{ time_zone: Europe/Berlin, holidays: {{ country: DE }}, events: [{{ name: close, \
                 kind: month_end_close, business_days: -3, effects: {{ latency: 2.0 }} }}] }} }}\n\
                 services: {{ payroll: {{ title: Payroll, tenants: [acme] }} }}\nnotices: {{ after: 0s }}\n",
                house.cluster.port(),
                SUPERUSER.0
            ),
        );
        house
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path().join(name), text).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
        command.args(arguments).arg("--config").arg(self.path().join("health.yaml")).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> (Output, String) {
        let output = self.command(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output, text)
    }
}

fn get(address: &str, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// "`/api/v1/health` … a page on the admin listener."
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_shows_health_and_who_waits_to_those_with_its_token() {
    let house = House::new().await;
    house.write(
        "cofferdam.yaml",
        "http: { listen: ['127.0.0.1:0'] }\nadmin: { listen: '127.0.0.1:0', token_file: token }\n\
         pools: { odoo: { servers: [{ address: '127.0.0.1:1' }], slots: 4 } }\nplans: { standard: {} }\ntenants: tenants\n",
    );
    house.write("token", "a-token-of-this-test");
    std::fs::create_dir(house.path().join("tenants")).unwrap();
    house.write(
        "tenants/acme.yaml",
        "tenant: acme\nhosts: [acme.example.com]\nplacement: { pool: odoo }\nplan: standard\n",
    );
    let mut serve = Command::new(env!("CARGO_BIN_EXE_cofferdam"))
        .args(["serve", "--log-format", "json", "--config"])
        .arg(house.path().join("cofferdam.yaml"))
        .arg("--health")
        .arg(house.path().join("health.yaml"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(serve.stderr.take().unwrap()).lines();
    let line = lines.by_ref().map(Result::unwrap).find(|line| line.contains("\"admin\"")).unwrap();
    let at = line.find("127.0.0.1:").unwrap();
    let address = line[at..].split('"').next().unwrap().to_owned();
    assert!(get(&address, "/").starts_with("HTTP/1.1 401") && get(&address, "/").contains("Basic realm"));
    assert!(get(&address, "/api/v1/health").starts_with("HTTP/1.1 401"));
    let allowed = |path: &str| {
        let output = Command::new("curl")
            .args(["-s", "-u", "me:a-token-of-this-test"])
            .arg(format!("http://{address}{path}"))
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for _ in 0..200 {
        if allowed("/api/v1/tenants/acme/health").contains("\"status\":\"pass\"") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let page = allowed("/");
    assert!(page.contains("Who works and who waits") && page.contains("✓ pass"), "{page}");
    house.write("beside.yaml", &format!("gateways: {{ edge: {{ admin: 'http://{address}', token_file: token }} }}\n"));
    let check = |file: &str| {
        let mut check = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
        let output =
            check.args(["health", "check", "--all", "--config"]).arg(house.path().join(file)).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, text) = check("beside.yaml");
    assert!(code == Some(0) && text.contains("nobody waits at 1 gates") && text.contains("welcomes traffic"), "{text}");
    house.write("wrong.yaml", &format!("gateways: {{ edge: {{ admin: 'http://{address}' }} }}\n"));
    let (code, text) = check("wrong.yaml");
    assert!(code == Some(0) && text.contains("401: is the token right?"), "{text}");
    assert!(allowed("/metrics").contains("cofferdam_health_status{kind=\"tenant\",subject=\"acme\""));
    Command::new("kill").arg(serve.id().to_string()).status().unwrap();
    let last: Vec<String> = lines.map(Result::unwrap).collect();
    assert!(serve.wait().unwrap().success(), "{last:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_checks_asks_why_watches_and_writes_rules() {
    let mut house = House::new().await;
    let (output, text) = house.run(&["health", "check"]);
    assert!(output.status.success() && text.contains("✓ pass") && text.contains("Payroll"), "{text}");
    assert!(text.contains("22 of 22 checks pass"), "{text}");
    let (_, text) = house.run(&["health", "explain", "acme"]);
    assert_eq!(text.trim(), "acme is well: 7 checks pass");

    let (output, text) = house.run(&["health", "history", "acme"]);
    assert!(!output.status.success() && text.contains("nothing is kept"), "{text}");
    house.cluster.create_database("kept", SUPERUSER.0).await.unwrap();
    let config = std::fs::read_to_string(house.path().join("health.yaml")).unwrap();
    house.write("health.yaml", &(config + "history: { cluster: main, database: kept }\n"));
    let (output, text) = house.run(&["health", "history", "--since", "1y"]);
    assert!(!output.status.success() && text.contains("such as `36h`"), "{text}");
    assert_eq!(house.run(&["health", "history"]).1, "nothing has changed\n");
    let textfile = house.path().join("health.prom");
    let mut watch =
        house.command(&["health", "watch", "--textfile", textfile.to_str().unwrap(), "--listen", "127.0.0.1:0"]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "watching 2 tenants");
    let listening = lines.next().unwrap().unwrap();
    let address = listening.strip_prefix("listening on http://").unwrap().trim_end_matches('/').to_owned();
    let admin = house.cluster.admin("postgres").await.unwrap();
    // Not before it was once seen to be well.
    for _ in 0..200 {
        let text = std::fs::read_to_string(&textfile).unwrap_or_default();
        if text.contains(
            "cofferdam_health_status{kind=\"tenant\",subject=\"acme\",aspect=\"database\",topic=\"latency\"} 0",
        ) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    admin.batch_execute("DROP DATABASE acme WITH (FORCE)").await.unwrap();
    let line = lines.next().unwrap().unwrap();
    assert!(line.contains("TROUBLE [Page] tenant acme: database: database acme does not answer"), "{line}");
    // And is kept.
    let mut kept = String::new();
    for _ in 0..100 {
        kept = house.run(&["health", "history", "acme"]).1;
        if kept.contains("pass → fail") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert!(kept.contains("tenant acme: database") && kept.contains("pass → fail"), "{kept}");
    let metrics = std::fs::read_to_string(&textfile).unwrap();
    for expected in [
        "cofferdam_health_cause{kind=\"tenant\",subject=\"acme\",aspect=\"database\",topic=\"availability\"} 1",
        "cofferdam_health_service_status{service=\"payroll\"} 3",
        "business_calendar_latency_factor{tenant=\"acme\"} ",
        "cofferdam_health_looks_total{tenant=\"beta\",objective=\"availability\",result=\"good\"} ",
    ] {
        assert!(metrics.contains(expected), "{expected}\n{metrics}");
    }
    let page = get(&address, "/");
    assert!(page.contains("content-security-policy: default-src 'none'") && page.contains("✗ fail"), "{page}");
    assert!(page.contains("<h3>Payroll</h3>") && page.contains("What is really wrong"), "{page}");
    let acme = get(&address, "/api/v1/tenants/acme/health");
    assert!(acme.starts_with("HTTP/1.1 503") && acme.contains("application/health+json"), "{acme}");
    assert!(get(&address, "/api/v1/tenants/beta/health").starts_with("HTTP/1.1 200"));
    assert!(get(&address, "/api/v1/tenants/nobody/health").starts_with("HTTP/1.1 404"));
    assert!(get(&address, "/api/v1/services").contains("\"status\":\"fail\""));
    let (output, text) = house.run(&["health", "explain", "acme"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("most likely because of tenant acme: database") && text.contains("→"), "{text}");
    house.cluster.kill();
    // What was the tenant's own trouble is now a consequence, and is not told as over.
    let line = lines.next().unwrap().unwrap();
    assert!(line.contains("TROUBLE [Page] cluster main: reachable: it does not answer"), "{line}");
    Command::new("kill").arg(watch.id().to_string()).status().unwrap();
    assert!(watch.wait().unwrap().success());
    let (output, text) = house.run(&["health", "check", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let answer: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(answer["checks"]["tenant beta: database"]["status"], "fail");
    assert_eq!(answer["checks"]["tenant beta: database"]["because_of"]["aspect"], "reachable");

    let directory = house.path().join("rules");
    let (output, text) = house.run(&["health", "rules", "--directory", directory.to_str().unwrap()]);
    assert!(output.status.success() && text.lines().count() == 5, "{text}");
    let dashboard = std::fs::read(directory.join("cofferdam-services.json")).unwrap();
    assert!(serde_json::from_slice::<serde_json::Value>(&dashboard).unwrap()["panels"].is_array());

    house.write("health.yaml", "tenants: { acme: { cluster: nowhere } }\nintervall: 3s\n");
    let (output, text) = house.run(&["health", "check"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text.contains("health.yaml:2") && text.contains("intervall"), "{text}");
}

/// Whoever adds a tenant does not start the watch anew; and what is wrong in the file changes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_follows_its_file_and_goes_on_as_before_where_that_is_wrong() {
    let house = House::new().await;
    let mut watch = house
        .command(&["health", "watch", "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut problems = BufReader::new(watch.stderr.take().unwrap()).lines().map(Result::unwrap);
    let address = lines.find_map(|line| line.strip_prefix("listening on http://").map(str::to_owned)).unwrap();
    let address = address.trim_end_matches('/');
    let of = |tenant: &str| get(address, &format!("/api/v1/tenants/{tenant}/health"));
    let until = async |tenant: &str, said: &str| {
        for _ in 0..300 {
            if of(tenant).contains(said) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("{tenant}: {}", of(tenant));
    };
    until("acme", "\"status\":\"pass\"").await;
    assert!(of("gamma").starts_with("HTTP/1.1 404"));
    let first = std::fs::read_to_string(house.path().join("health.yaml")).unwrap();
    house.write("health.yaml", &first.replace("  beta: {}\n", "  gamma: { database: beta }\n"));
    assert!(lines.any(|line| line == "read again: watching 2 tenants"));
    until("gamma", "\"status\":\"pass\"").await;
    assert!(of("beta").starts_with("HTTP/1.1 404"));
    // What was believed of the others is believed still: nobody begins anew.
    assert!(of("acme").contains("\"status\":\"pass\""));
    house.write("health.yaml", &first.replace("interval: 1s", "interval: never"));
    let told = problems.find(|line| line.contains("nothing has changed")).unwrap();
    assert!(told.contains("health.yaml:1:"), "{told}");
    assert!(of("gamma").contains("\"status\":\"pass\""));
    house.write("health.yaml", &first);
    assert!(lines.any(|line| line == "read again: watching 2 tenants"));
    until("beta", "\"status\":\"pass\"").await;
    Command::new("kill").arg(watch.id().to_string()).status().unwrap();
    assert!(watch.wait().unwrap().success());
}
