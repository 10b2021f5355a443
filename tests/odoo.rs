//! A real, running Odoo behind both planes, in the browser that people use. It is started by whoever runs this:
//!
//! ```text
//! ODOO_HTTP=127.0.0.1:8069 ODOO_GEVENT=127.0.0.1:8072   where its workers and its gevent process listen
//! ODOO_DATABASE=acme_db                                 with `web`, `mail` and `contacts` in it
//! ODOO_HOST=acme.localhost                              a host that its dbfilter leads there
//! ODOO_LOGIN=admin:admin                                somebody who may do everything
//! ODOO_POSTGRES=127.0.0.1:5432                          the server …
//! ODOO_POSTGRES_LISTEN=127.0.0.1:6432                   … and where its `db_port` points to: this listens there
//! ODOO_POSTGRES_LOGIN=odoo:secret                       its `db_user` and `db_password`
//! ODOO_FILESTORE=/var/lib/odoo/filestore                with `x_sendfile`
//! ODOO_OTHER=bolt.localhost:bolt_db                     another tenant of the same servers
//! ODOO_SCREENSHOTS=/tmp/shots                           where pictures go
//! ```
//!
//! The first three are needed, `proxy_mode` is taken for granted, and without the others the parts that they are for are left out.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use cofferdam::{Gateway, Runtimes};
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::browser::Browser;
use cofferdam_testkit::load::HttpClient;
use serde_json::{Value, json};

/// An Odoo that has just started makes its assets first.
const PATIENCE: Duration = Duration::from_secs(60);

fn given(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

struct House {
    gateway: Gateway,
    _directory: TenantDirectory,
    host: String,
    database: String,
    login: (String, String),
    other: Option<(String, String)>,
    has_sendfile: bool,
    screenshots: Option<PathBuf>,
}

impl House {
    async fn open() -> Option<Self> {
        let (Some(http), Some(gevent), Some(database)) =
            (given("ODOO_HTTP"), given("ODOO_GEVENT"), given("ODOO_DATABASE"))
        else {
            eprintln!("skipped: no real Odoo is given by ODOO_HTTP, ODOO_GEVENT and ODOO_DATABASE");
            return None;
        };
        let pair = |text: String| text.split_once(':').map(|(a, b)| (a.to_owned(), b.to_owned()));
        let host = given("ODOO_HOST").unwrap_or_else(|| "localhost".to_owned());
        let other = given("ODOO_OTHER").and_then(pair);
        let filestore = given("ODOO_FILESTORE");
        let postgres = given("ODOO_POSTGRES").zip(given("ODOO_POSTGRES_LISTEN"));
        let (role, password) = given("ODOO_POSTGRES_LOGIN").and_then(pair).unwrap_or_default();
        let mut main = format!(
            "http:\n  listen: ['127.0.0.1:0']\n  session_key: a key of this test alone\n\
             pools:\n  odoo:\n    servers: [{{ address: '{http}', gevent: '{gevent}' }}]\n    slots: 2\n"
        );
        if let Some(filestore) = &filestore {
            main += &format!("    filestore: '{filestore}'\n");
        }
        let mut placement = "pool: odoo";
        if let Some((server, listen)) = &postgres {
            placement = "pool: odoo, cluster: pg";
            main += &format!(
                "    login: {{ role: '{role}', password: '{password}' }}\n    maintenance: pg\n\
                 postgres: {{ listen: ['{listen}'] }}\nclusters: {{ pg: {{ address: '{server}', slots: 8 }} }}\n"
            );
        } else {
            eprintln!("through the HTTP plane alone: neither ODOO_POSTGRES nor ODOO_POSTGRES_LISTEN is given");
        }
        main += "plans: { standard: {} }\n";
        let directory = TenantDirectory::new(&main).unwrap();
        let tenants = [Some((host.clone(), database.clone())), other.clone()];
        for (n, (host, database)) in tenants.into_iter().flatten().enumerate() {
            let text = format!(
                "tenant: t{n}\nhosts: ['{host}']\ndatabase: {database}\nplacement: {{ {placement} }}\nplan: standard\n"
            );
            directory.tenant(&format!("t{n}"), &text).unwrap();
        }
        let gateway =
            Gateway::builder().config_file(directory.path()).runtimes(Runtimes::PerCore(1)).start().await.unwrap();
        Some(Self {
            gateway,
            _directory: directory,
            host,
            database,
            login: given("ODOO_LOGIN").and_then(pair).unwrap_or_else(|| ("admin".to_owned(), "admin".to_owned())),
            other,
            has_sendfile: filestore.is_some(),
            screenshots: given("ODOO_SCREENSHOTS").map(PathBuf::from),
        })
    }

    fn address(&self) -> SocketAddr {
        self.gateway.http_addresses()[0]
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}:{}{path}", self.host, self.address().port())
    }

    async fn picture(&self, browser: &mut Browser, name: &str) {
        if let Some(directory) = &self.screenshots {
            std::fs::create_dir_all(directory).unwrap();
            browser.screenshot(&directory.join(format!("{name}.png"))).await.unwrap();
        }
    }
}

/// Logs in as a person does.
async fn log_in(house: &House, browser: &mut Browser) {
    browser.visit(&house.url("/web/login")).await.unwrap();
    browser.width(1_280).await.unwrap();
    browser.becomes("document.querySelector('.oe_login_form input[name=login]') !== null", PATIENCE).await.unwrap();
    house.picture(browser, "1-login").await;
    let (login, password) = &house.login;
    let fill = format!(
        "(() => {{ const form = document.querySelector('.oe_login_form'); form.login.value = {}; form.password.value = {}; form.submit(); }})()",
        json!(login),
        json!(password)
    );
    browser.eval(&fill).await.unwrap();
    browser.becomes("document.querySelector('.o_main_navbar') !== null", PATIENCE).await.unwrap();
}

/// A call as the web client makes them.
async fn rpc(browser: &mut Browser, model: &str, method: &str, args: Value, kwargs: Value) -> Value {
    let call = json!({ "jsonrpc": "2.0", "method": "call", "params": { "model": model, "method": method, "args": args, "kwargs": kwargs } });
    let script = format!(
        "fetch('/web/dataset/call_kw/{model}/{method}', {{ method: 'POST', headers: {{ 'Content-Type': 'application/json' }}, \
         body: JSON.stringify({call}) }}).then(answer => answer.json())"
    );
    let answer = browser.eval(&script).await.unwrap();
    assert!(answer.get("error").is_none(), "{model}.{method}: {answer}");
    answer["result"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_odoo_works_behind_both_planes_and_is_asked_for_no_other_tenants_database() {
    let Some(house) = House::open().await else { return };
    stays_at_home(&house).await;
    works(&house).await;
    house.gateway.drain();
    house.gateway.wait().await;
}

/// A list, a form, a file, and what others say meanwhile.
async fn works(house: &House) {
    let Some(mut browser) = Browser::open().await.unwrap() else {
        eprintln!("skipped: there is no Chromium here");
        return;
    };
    log_in(house, &mut browser).await;
    house.picture(&mut browser, "2-home").await;

    // A list, and a form that is saved.
    let name = format!("Somebody {}", std::process::id());
    browser.go(&house.url("/web#action=contacts.action_contacts&view_type=list&model=res.partner")).await.unwrap();
    browser.becomes("document.querySelectorAll('.o_list_view .o_data_row').length > 0", PATIENCE).await.unwrap();
    house.picture(&mut browser, "3-list").await;
    browser.eval("document.querySelector('.o_list_button_add').click()").await.unwrap();
    let field = "document.querySelector('.o_form_view .o_field_widget[name=name] :is(input, textarea)')";
    browser.becomes(&format!("{field} !== null"), PATIENCE).await.unwrap();
    let fill = format!(
        "(() => {{ const field = {field}; field.focus(); field.value = {}; \
         for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, {{ bubbles: true }})); }})()",
        json!(name)
    );
    browser.eval(&fill).await.unwrap();
    browser.eval("document.querySelector('.o_form_button_save').click()").await.unwrap();
    let saved = format!("document.querySelector('.o_breadcrumb')?.innerText.includes({})", json!(name));
    browser.becomes(&saved, PATIENCE).await.unwrap();
    house.picture(&mut browser, "4-form").await;
    let found = rpc(&mut browser, "res.partner", "search", json!([[["name", "=", name]]]), json!({})).await;
    let partner = found[0].as_i64().expect("the form was not saved");

    // A file up, and down again: by the worker's answer or by the gateway.
    let upload = format!(
        "(async () => {{ const bytes = new Uint8Array(300000).map((_, i) => (i * 7919) >> 3); \
         const form = new FormData(); form.append('model', 'res.partner'); form.append('id', {partner}); \
         form.append('csrf_token', odoo.csrf_token); form.append('ufile', new Blob([bytes]), 'a file.bin'); \
         const up = await fetch('/web/binary/upload_attachment', {{ method: 'POST', body: form }}); return up.status }})()"
    );
    assert_eq!(browser.eval(&upload).await.unwrap(), json!(200));
    let of_partner = json!([[["res_model", "=", "res.partner"], ["res_id", "=", partner]]]);
    let attachment = rpc(&mut browser, "ir.attachment", "search", of_partner, json!({})).await[0].clone();
    let download = format!(
        "(async () => {{ const url = '/web/content/{attachment}?download=true'; const down = await fetch(url); \
         const bytes = new Uint8Array(await down.arrayBuffer()); \
         const part = await fetch(url, {{ headers: {{ Range: 'bytes=1000-1999' }} }}); \
         const some = new Uint8Array(await part.arrayBuffer()); \
         return [down.status, bytes.length, bytes.every((byte, i) => byte === (((i * 7919) >> 3) & 255)), \
                 down.headers.get('content-disposition'), part.status, some.length, some[0] === bytes[1000]] }})()"
    );
    let got = browser.eval(&download).await.unwrap();
    assert_eq!((&got[0], &got[1], &got[2]), (&json!(200), &json!(300_000), &json!(true)), "{got}");
    assert!(got[3].as_str().is_some_and(|disposition| disposition.contains("file.bin")), "{got}");
    if house.has_sendfile {
        // Odoo sends no parts of what it wants sent by somebody else.
        assert_eq!((&got[4], &got[5], &got[6]), (&json!(206), &json!(1_000), &json!(true)), "{got}");
    }

    // What is said is heard: over the page's WebSocket, and the database's notifications.
    let channels = rpc(&mut browser, "discuss.channel", "search", json!([[["name", "=", "general"]]]), json!({})).await;
    let channel = channels[0].as_i64().expect("there is no channel `general`");
    browser
        .visit(&house.url(&format!("/web#action=mail.action_discuss&active_id=discuss.channel_{channel}")))
        .await
        .unwrap();
    browser.width(1_280).await.unwrap();
    browser
        .becomes("document.querySelector('.o-mail-Thread, .o-mail-Discuss-content') !== null", PATIENCE)
        .await
        .unwrap();
    house.picture(&mut browser, "5-discuss").await;
    let said = format!("heard {}", std::process::id());
    let heard = format!("document.body.innerText.includes({})", json!(said));
    // Its process for WebSockets waits for 50 s when the database was away, and hears nothing of what is said meanwhile.
    for attempt in 0.. {
        assert!(attempt < 30, "nothing was heard in a minute and a half");
        // Past the page's own code, which shows what its WebSocket tells it.
        let message = json!({ "body": said, "message_type": "comment", "subtype_xmlid": "mail.mt_comment" });
        rpc(&mut browser, "discuss.channel", "message_post", json!([[channel]]), message).await;
        if browser.becomes(&heard, Duration::from_secs(3)).await.is_ok() {
            break;
        }
    }
    house.picture(&mut browser, "6-bus").await;
}

/// Odoo's leaks between databases, as `reference/odoo.md` lists them, tried on a real one.
async fn stays_at_home(house: &House) {
    let Some((other_host, other)) = house.other.clone() else {
        eprintln!("skipped: no other tenant is given by ODOO_OTHER");
        return;
    };
    let (login, password) = house.login.clone();
    let address = house.address();
    // Each on a connection of its own: what is refused before it is read ends its connection.
    let ask = async |method: &str, host: &str, path: &str, headers: &[(&str, &str)], body: &[u8]| {
        HttpClient::connect(address).await.unwrap().request(method, host, path, headers, body).await.unwrap()
    };
    let json_headers = [("Content-Type", "application/json")];
    let authenticate = |database: &str| {
        json!({ "jsonrpc": "2.0", "params": { "db": database, "login": login, "password": password } }).to_string()
    };
    let own =
        ask("POST", &house.host, "/web/session/authenticate", &json_headers, authenticate(&house.database).as_bytes())
            .await;
    assert_eq!(own.status, 200);
    assert!(own.text().contains("\"uid\""), "{}", own.text());
    let cookie = own.header("set-cookie").expect("a session").split(';').next().unwrap().to_owned();

    // The session is good at its own host, and at no other.
    let info = br#"{"jsonrpc":"2.0","params":{}}"#;
    let with_cookie = [json_headers[0], ("Cookie", cookie.as_str())];
    let here = ask("POST", &house.host, "/web/session/get_session_info", &with_cookie, info).await;
    assert!(here.text().contains(&format!("\"db\": \"{}\"", house.database)), "{}", here.text());
    let there = ask("POST", &other_host, "/web/session/get_session_info", &with_cookie, info).await;
    assert!(!there.text().contains(&house.database) && there.text().contains("error"), "{}", there.text());

    let call = |service: &str, method: &str, args: Value| {
        json!({ "jsonrpc": "2.0", "method": "call", "params": { "service": service, "method": method, "args": args } })
            .to_string()
    };
    let xml = format!(
        "<?xml version=\"1.0\"?><methodCall><methodName>login</methodName><params><param><value><string>{other}</string></value></param>\
         <param><value><string>{login}</string></value></param><param><value><string>{password}</string></value></param></params></methodCall>"
    );
    let tries: Vec<(&str, &str, &str, String)> = vec![
        ("POST", "/web/session/authenticate", "application/json", authenticate(&other)),
        ("POST", "/jsonrpc", "application/json", call("common", "login", json!([other, login, password]))),
        ("POST", "/jsonrpc", "application/json", call("db", "list", json!([]))),
        ("POST", "/jsonrpc", "application/json", call("db", "server_version", json!([]))),
        ("POST", "/xmlrpc/2/common", "text/xml", xml.clone()),
        ("POST", "/xmlrpc/common", "text/xml", xml),
        ("GET", "/web/database/manager", "text/html", String::new()),
        ("GET", "/web/database/selector", "text/html", String::new()),
        ("POST", "/web/database/list", "application/json", "{}".to_owned()),
    ];
    for (method, path, kind, body) in &tries {
        let headers = [("Content-Type", *kind)];
        let answer = ask(method, &house.host, path, &headers, body.as_bytes()).await;
        assert!([403, 404].contains(&answer.status), "{path}: {} {}", answer.status, answer.text());
        assert!(!answer.text().contains(&other), "{path}: {}", answer.text());
    }
    let named = ask("GET", &house.host, &format!("/web?db={other}"), &[], b"").await;
    assert_eq!(named.status, 403, "{}", named.text());
    // The same calls for the own database are answered.
    let login = call("common", "login", json!([house.database, login, password]));
    let answer = ask("POST", &house.host, "/jsonrpc", &json_headers, login.as_bytes()).await;
    assert!(answer.status == 200 && answer.text().contains("\"result\""), "{}", answer.text());
}
