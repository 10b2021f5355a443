//! What is kept of static files, and what is sent from a filestore.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cofferdam::Gateway;
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::{HttpClient, Response};
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use cofferdam_testkit::s3::{CREDENTIALS, ObjectStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const ACME: &str = "acme.example.com";
const BOLT: &str = "bolt.example.com";

struct House {
    odoo: MiniOdoo,
    gateway: Gateway,
    directory: TenantDirectory,
    main: String,
}

async fn house(http: &str, pool: &str) -> House {
    let databases: HashMap<_, _> = ["acme", "bolt"].map(|t| (format!("{t}.example.com"), format!("{t}_db"))).into();
    let odoo = MiniOdoo::start(OdooOptions { workers: 8, databases, ..OdooOptions::default() }).await.unwrap();
    let main = format!(
        "http:\n  listen: ['127.0.0.1:0']\n{http}admin:\n  listen: '127.0.0.1:0'\npools:\n  odoo:\n    servers: [{{ address: '{}' }}]\n    \
         slots: 8\n{pool}plans:\n  standard: {{}}\n",
        odoo.http()
    );
    let directory = TenantDirectory::new(&main).unwrap();
    for t in ["acme", "bolt"] {
        let text = format!(
            "tenant: {t}\nhosts: [{t}.example.com]\ndatabase: {t}_db\nplacement: {{ pool: odoo }}\nplan: standard\n"
        );
        directory.tenant(t, &text).unwrap();
    }
    let gateway = Gateway::builder().config_file(directory.path()).start().await.unwrap();
    House { odoo, gateway, directory, main }
}

async fn ask(address: SocketAddr, method: &str, host: &str, path: &str, headers: &[(&str, &str)]) -> Response {
    HttpClient::connect(address).await.unwrap().request(method, host, path, headers, &[]).await.unwrap()
}

impl House {
    async fn get(&self, host: &str, path: &str, headers: &[(&str, &str)]) -> Response {
        ask(self.gateway.http_addresses()[0], "GET", host, path, headers).await
    }

    fn usage(&self) -> cofferdam_http::CacheUsage {
        self.gateway.http_plane().unwrap().usage().cache
    }
}

/// The rules of the table of routes: static files and hashed assets are kept, without the cookie; pages never.
#[tokio::test]
async fn a_file_is_fetched_once_and_a_cookie_never_comes_with_it() {
    let house = house("", "").await;
    for path in ["/web/static/src/a.js?lines=10", "/web/assets/1a2b3c4/web.min.css"] {
        let before = house.odoo.requests();
        let first = house.get(ACME, path, &[]).await;
        let again = house.get(ACME, path, &[]).await;
        assert_eq!((first.status, &first.body, first.header("set-cookie")), (200, &again.body, None), "{path}");
        assert_eq!((again.header("set-cookie"), again.header("age")), (None, Some("0")), "{path}");
        assert_eq!(again.header("cache-control"), first.header("cache-control"));
        assert_eq!(house.odoo.requests(), before + 1, "{path}");
        let head = ask(house.gateway.http_addresses()[0], "HEAD", ACME, path, &[]).await;
        assert_eq!(head.header("content-length"), Some(first.body.len().to_string().as_str()));
        assert_eq!(house.odoo.requests(), before + 1, "{path}");
        // Another tenant's is another file.
        house.get(BOLT, path, &[]).await;
        assert_eq!(house.odoo.requests(), before + 2, "{path}");
    }
    let usage = house.usage();
    assert_eq!((usage.hits, usage.misses), (4, 4));
    for path in ["/web/assets/any/web.min.css", "/web/webclient/load_menus/1a2b", "/web"] {
        let before = house.odoo.requests();
        house.get(ACME, path, &[]).await;
        house.get(ACME, path, &[]).await;
        assert_eq!(house.odoo.requests(), before + 2, "{path}");
    }
}

#[tokio::test]
async fn conditions_and_ranges_are_answered_from_what_is_kept() {
    let house = house("", "").await;
    let path = "/web/static/a.js?lines=100";
    let whole = house.get(ACME, path, &[("Range", "bytes=0-4")]).await;
    assert_eq!(whole.status, 200, "the first is fetched whole");
    let before = house.odoo.requests();
    let part = house.get(ACME, path, &[("Range", "bytes=3-9")]).await;
    assert_eq!((part.status, &part.body[..]), (206, &whole.body[3..10]));
    assert_eq!(part.header("content-range"), Some(format!("bytes 3-9/{}", whole.body.len()).as_str()));
    let beyond = house.get(ACME, path, &[("Range", "bytes=100000-")]).await;
    assert_eq!((beyond.status, beyond.body.len()), (416, 0));
    let known = house.get(ACME, path, &[("If-None-Match", whole.header("etag").unwrap())]).await;
    assert_eq!((known.status, known.body.len()), (304, 0));
    assert_eq!(house.odoo.requests(), before);
}

/// An origin that gives these answers one after the other, each on a connection of its own.
async fn origin(answers: Vec<&'static str>) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, asked) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            count.fetch_add(1, Ordering::SeqCst);
            stream.write_all(answer.replace('\n', "\r\n").as_bytes()).await.unwrap();
        }
    });
    (address, asked)
}

/// RFC 9111, 3.2, 4.2.3 and 4.3.4: an answer that was kept elsewhere is as old as it says, and who confirms it may say
/// something else of it, for how long it is good included.
#[tokio::test]
async fn who_confirms_what_is_kept_has_the_last_word_on_its_head() {
    const BODY: &str = "\nContent-Length: 5\nETag: \"1\"\n\nhello";
    let first = format!("HTTP/1.1 200 OK\nX-Made: first\nCache-Control: public, max-age=60\nAge: 59{BODY}");
    let last = format!("HTTP/1.1 200 OK\nX-Made: last\nCache-Control: public, max-age=60{BODY}");
    let (address, asked) = origin(vec![
        first.leak(),
        "HTTP/1.1 304 Not Modified\nETag: \"1\"\nX-Made: second\nCache-Control: public, max-age=1\nContent-Length: 99\n\n",
        "HTTP/1.1 304 Not Modified\nETag: \"1\"\nX-Made: third\nCache-Control: private\n\n",
        last.leak(),
    ])
    .await;
    let house = house("", "").await;
    let main = house.main.replace(&house.odoo.http().to_string(), &address.to_string());
    house.directory.main(&main).unwrap();
    house.gateway.reload().await.unwrap();
    let get = async || {
        let answer = house.get(ACME, "/web/static/a.js", &[]).await;
        let of = |name| answer.header(name).map(str::to_owned);
        assert_eq!((answer.status, answer.text().as_str(), of("content-length").as_deref()), (200, "hello", Some("5")));
        (of("x-made").unwrap(), of("age"), asked.load(Ordering::SeqCst))
    };
    let age = |seconds: &str| Some(seconds.to_owned());
    assert_eq!(get().await, ("first".into(), age("59"), 1));
    assert_eq!(get().await, ("first".into(), age("59"), 1));
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(get().await, ("second".into(), age("0"), 2));
    assert_eq!(get().await, ("second".into(), age("0"), 2));
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(get().await, ("third".into(), age("0"), 3));
    assert_eq!(get().await, ("last".into(), None, 4), "what is private was not kept");
}

/// RFC 9111, 3.1 and 4.4: what `Connection` names was for the gateway alone, and what was kept is not right any more when
/// something has been changed there.
#[tokio::test]
async fn what_was_meant_for_one_hop_is_not_kept_and_a_change_makes_it_old() {
    const FILE: &str = "HTTP/1.1 200 OK\nCache-Control: public, max-age=600\nConnection: close, x-hop\nX-Hop: secret\nContent-Length: 5\n\nhello";
    let (address, asked) =
        origin(vec![FILE, "HTTP/1.1 404 Not Found\nContent-Length: 0\n\n", "HTTP/1.1 204 No Content\n\n", FILE]).await;
    let house = house("", "").await;
    let main = house.main.replace(&house.odoo.http().to_string(), &address.to_string());
    house.directory.main(&main).unwrap();
    house.gateway.reload().await.unwrap();
    let path = "/web/static/a.js";
    let get = async || {
        let answer = house.get(ACME, path, &[]).await;
        assert_eq!((answer.status, answer.header("x-hop")), (200, None));
        asked.load(Ordering::SeqCst)
    };
    let post = async || ask(house.gateway.http_addresses()[0], "POST", ACME, path, &[]).await.status;
    assert_eq!((get().await, get().await), (1, 1));
    assert_eq!((post().await, get().await), (404, 2), "nothing was changed");
    assert_eq!((post().await, get().await), (204, 4));
}

#[tokio::test]
async fn what_is_old_is_asked_about_and_what_is_purged_is_fetched() {
    let house = house("", "").await;
    let path = "/web/static/a.js?age=1";
    let first = house.get(ACME, path, &[]).await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let before = house.odoo.requests();
    let confirmed = house.get(ACME, path, &[]).await;
    assert_eq!((confirmed.status, &confirmed.body), (200, &first.body));
    assert_eq!((house.odoo.requests(), house.usage().confirmed), (before + 1, 1));
    house.get(ACME, path, &[]).await;
    assert_eq!(house.odoo.requests(), before + 1, "it is fresh again");

    let admin = house.gateway.admin_address().unwrap();
    let purge =
        async |what: &str| ask(admin, "POST", "localhost", &format!("/api/v1/cache/purge{what}"), &[]).await.status;
    for (what, status, fetched) in [
        ("?tenant=bolt", 204, 0),
        ("?path=/sale/", 204, 0),
        ("?tenant=nobody", 404, 0),
        ("?tenant=acme&path=/web/static/", 204, 1),
        ("", 204, 1),
    ] {
        let path = "/web/static/b.js";
        house.get(ACME, path, &[]).await;
        let before = house.odoo.requests();
        assert_eq!(purge(what).await, status, "{what}");
        house.get(ACME, path, &[]).await;
        assert_eq!(house.odoo.requests(), before + fetched, "{what}");
    }
    // Another release has other files.
    house.get(ACME, "/web/static/b.js", &[]).await;
    let before = house.odoo.requests();
    house.directory.main(&house.main.replace("    slots: 8\n", "    slots: 8\n    release: '19.0-2'\n")).unwrap();
    house.gateway.reload().await.unwrap();
    house.get(ACME, "/web/static/b.js", &[]).await;
    assert_eq!(house.odoo.requests(), before + 1);
    let metrics = ask(admin, "GET", "localhost", "/metrics", &[]).await.text();
    assert!(metrics.contains("cofferdam_http_cache_requests_total{result=\"confirmed\"} 1"), "{metrics}");
    assert!(metrics.contains("cofferdam_http_server_up{pool=\"odoo\""), "{metrics}");
}

#[tokio::test]
async fn many_who_want_the_same_cost_one_request() {
    let house = house("", "").await;
    let address = house.gateway.http_addresses()[0];
    let all: Vec<_> = (0..20)
        .map(|_| {
            tokio::spawn(async move { ask(address, "GET", ACME, "/web/static/slow.js?ms=400&lines=5", &[]).await })
        })
        .collect();
    for one in all {
        assert_eq!(one.await.unwrap().status, 200);
    }
    assert_eq!(house.odoo.requests(), 1);
}

#[tokio::test]
async fn answers_are_compressed_for_who_takes_it() {
    let house = house("  compression: 5\n", "").await;
    let curl = async |coding: &str, path: &str| {
        let url = format!("http://{}{path}", house.gateway.http_addresses()[0]);
        let mut command = tokio::process::Command::new("curl");
        command.args(["-sS", "--max-time", "20", "-D", "-", "-H", "Host: acme.example.com", "--compressed"]);
        command.args(["-H", &format!("Accept-Encoding: {coding}"), &url]);
        String::from_utf8_lossy(&command.output().await.unwrap().stdout).to_ascii_lowercase()
    };
    let plain = house.get(ACME, "/web/static/a.js?lines=2000", &[]).await;
    for coding in ["gzip", "br", "zstd"] {
        // Kept, and compressed once, beside the requests.
        cofferdam_tests::eventually(|| async {
            curl(coding, "/web/static/a.js?lines=2000").await.contains(&format!("content-encoding: {coding}\r\n"))
        })
        .await;
        let kept = curl(coding, "/web/static/a.js?lines=2000").await;
        assert!(kept.contains(&format!("content-encoding: {coding}\r\n")), "{kept:.300}");
        assert!(
            kept.ends_with(&plain.text().to_ascii_lowercase()) && kept.contains("etag: w/\"1700000000.0-42\""),
            "{kept:.300}"
        );
        // As it comes.
        let page = curl(coding, "/testkit/echo").await;
        assert!(page.contains(&format!("content-encoding: {coding}\r\n")), "{page}");
        assert!(page.contains("database: acme_db") && page.contains("vary: accept-encoding"), "{page}");
    }
    let plain = curl("identity", "/testkit/echo").await;
    assert!(!plain.contains("content-encoding") && plain.contains("database: acme_db"), "{plain}");
    let binary = curl("gzip", "/web/content/100000").await;
    assert!(!binary.contains("content-encoding: gzip"), "{binary:.300}");
}

/// The rule "X-Sendfile: honour it only below the tenant's own database, canonicalised; strip both headers".
#[tokio::test]
async fn odoo_has_its_files_sent_from_the_tenants_own_filestore_and_from_nowhere_else() {
    let house = house("", "    filestore: filestore\n").await;
    let filestore = house.directory.path().parent().unwrap().join("filestore");
    let hash = "ab0123456789abcdef0123456789abcdef012345";
    for database in ["acme_db", "bolt_db"] {
        let directory = filestore.join(database).join("ab");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(hash), format!("of {database} ").repeat(50_000)).unwrap();
    }
    let link = filestore.join("acme_db/ab").join(hash.replace("012345", "012346"));
    std::os::unix::fs::symlink(filestore.join("bolt_db/ab").join(hash), link).unwrap();
    let path = |file: &str| format!("/testkit/sendfile?file={file}");
    let own = path(&format!("acme_db/ab/{hash}"));
    let whole = house.get(ACME, &own, &[]).await;
    assert_eq!((whole.status, whole.body.len()), (200, 11 * 50_000));
    assert!(whole.text().starts_with("of acme_db of acme_db"));
    assert_eq!(whole.header("cache-control"), Some("private, no-cache"));
    assert!(whole.header("x-accel-redirect").is_none() && whole.header("x-sendfile").is_none(), "{:?}", whole.headers);
    let part = house.get(ACME, &own, &[("Range", "bytes=-8")]).await;
    assert_eq!((part.status, part.text()), (206, "acme_db ".to_owned()));
    let known = house.get(ACME, &own, &[("If-None-Match", "\"of-the-file\"")]).await;
    assert_eq!(known.status, 304);
    let gate = house.gateway.http_plane().unwrap().gates().get("odoo").unwrap();
    cofferdam_tests::eventually(|| async { gate.usage().running == 0 }).await;
    for (file, status) in [
        (format!("bolt_db/ab/{hash}"), 502),
        (format!("acme_db/../bolt_db/ab/{hash}"), 502),
        (format!("bolt_db/ab/../../acme_db/ab/{hash}"), 502),
        ("../../../etc/passwd".to_owned(), 502),
        (format!("acme_db/ab/{}", hash.replace("012345", "012346")), 502),
        (format!("acme_db/ab/{}", hash.replace("012345", "012347")), 404),
    ] {
        let refused = house.get(ACME, &path(&file), &[]).await;
        assert_eq!(refused.status, status, "{file}: {}", refused.text());
        assert!(!refused.text().contains("bolt"), "{}", refused.text());
    }
}

/// The same from a bucket, of a real server; and it is gone when that is.
#[tokio::test]
async fn the_filestore_may_be_in_a_bucket() {
    let Some(store) = tokio::task::spawn_blocking(|| ObjectStore::strict().unwrap()).await.unwrap() else {
        eprintln!("skipped: no S3 server is installed");
        return;
    };
    let keys = [("access_key", CREDENTIALS.0), ("secret_key", CREDENTIALS.1)];
    let keys = keys.map(|(name, value)| format!("      {name}: {value}\n")).concat();
    let bucket = format!(
        "    filestore_bucket:\n      bucket: files\n      prefix: 'a prefix/'\n      endpoint: '{}'\n{keys}",
        store.endpoint()
    );
    let hash = "ab0123456789abcdef0123456789abcdef012345";
    let put = async |name: &str, content: Vec<u8>| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let output = tokio::process::Command::new("curl")
            .args(["-sS", "--fail-with-body", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user"])
            .arg(format!("{}:{}", CREDENTIALS.0, CREDENTIALS.1))
            .arg("-T")
            .arg(file.path())
            .arg(format!("{}/files{name}", store.endpoint()))
            .output()
            .await
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    };
    put("", Vec::new()).await;
    for database in ["acme_db", "bolt_db"] {
        put(&format!("/a%20prefix/{database}/ab/{hash}"), format!("of {database} ").repeat(500_000).into_bytes()).await;
    }
    put(&format!("/a%20prefix/acme_db/ab/{}", hash.replace("012345", "012346")), Vec::new()).await;
    let house = house("", &bucket).await;
    let path = |file: &str| format!("/testkit/sendfile?file={file}");
    let own = path(&format!("acme_db/ab/{hash}"));
    let whole = house.get(ACME, &own, &[]).await;
    assert_eq!((whole.status, whole.body.len()), (200, 11 * 500_000));
    assert!(whole.body == b"of acme_db ".repeat(500_000), "not the bytes that were put there");
    for (range, status, text) in
        [("bytes=-8", 206, "acme_db "), ("bytes=4999996-5000005", 206, "f acme_db "), ("bytes=9999999-", 416, "")]
    {
        let part = house.get(ACME, &own, &[("Range", range)]).await;
        assert_eq!((part.status, part.text().as_str()), (status, text), "{range}");
    }
    assert_eq!(house.get(ACME, &own, &[("If-None-Match", "\"of-the-file\"")]).await.status, 304);
    let head = ask(house.gateway.http_addresses()[0], "HEAD", ACME, &own, &[]).await;
    assert_eq!((head.status, head.header("content-length")), (200, Some("5500000")));
    for (file, status) in [
        (format!("acme_db/ab/{}", hash.replace("012345", "012346")), 200),
        (format!("acme_db/ab/{}", hash.replace("012345", "012347")), 404),
        (format!("bolt_db/ab/{hash}"), 502),
        (format!("acme_db/../bolt_db/ab/{hash}"), 502),
    ] {
        let answer = house.get(ACME, &path(&file), &[]).await;
        assert_eq!(answer.status, status, "{file}: {}", answer.text());
        assert!(!answer.text().contains("bolt"), "{}", answer.text());
    }
    // A reader that stays away in the middle holds neither the worker nor others up.
    let mut slow = HttpClient::connect(house.gateway.http_addresses()[0]).await.unwrap();
    slow.send(format!("GET {own} HTTP/1.1\r\nHost: {ACME}\r\n\r\n").as_bytes()).await.unwrap();
    let gate = house.gateway.http_plane().unwrap().gates().get("odoo").unwrap();
    cofferdam_tests::eventually(|| async { gate.usage().running == 0 }).await;
    assert_eq!(house.get(ACME, &own, &[("Range", "bytes=0-1")]).await.text(), "of");
    let read = slow.response(false).await.unwrap();
    assert!(read.body == whole.body, "{} bytes", read.body.len());

    drop(store);
    let gone = house.get(ACME, &own, &[]).await;
    assert_eq!(gone.status, 502, "{}", gone.text());
    assert!(!gone.text().contains("Signature") && !gone.text().contains("files"), "{}", gone.text());
}

#[tokio::test]
async fn what_cannot_be_kept_does_not_make_anybody_wait_in_turn() {
    let house = house("", "").await;
    let address = house.gateway.http_addresses()[0];
    let all: Vec<_> = (0..6)
        .map(|_| {
            tokio::spawn(async move { ask(address, "GET", ACME, "/web/static/x.js?ms=300&age=0", &[]).await.status })
        })
        .collect();
    for one in all {
        assert_eq!(one.await.unwrap(), 200);
    }
    // The first was asked alone; all others at once, when it was clear that its answer cannot be kept.
    assert!(house.odoo.most_busy() >= 4, "{} at once", house.odoo.most_busy());
    assert_eq!(house.odoo.requests(), 6);
}

#[tokio::test]
async fn a_purge_means_what_is_being_fetched_too() {
    let house = house("", "").await;
    let (address, admin) = (house.gateway.http_addresses()[0], house.gateway.admin_address().unwrap());
    let path = "/web/static/slow.js?ms=600";
    let fetching = tokio::spawn(async move { ask(address, "GET", ACME, path, &[]).await.status });
    cofferdam_tests::eventually(|| async { house.odoo.busy() == 1 }).await;
    assert_eq!(ask(admin, "POST", "localhost", "/api/v1/cache/purge", &[]).await.status, 204);
    assert_eq!(fetching.await.unwrap(), 200);
    let before = house.odoo.requests();
    house.get(ACME, path, &[]).await;
    assert_eq!(house.odoo.requests(), before + 1, "what was asked for before the purge was kept");
}

#[tokio::test]
async fn half_a_file_is_not_kept_and_one_tenant_does_not_take_all_the_room() {
    let house = house("  cache: { memory: 64KiB }\n", "").await;
    // An answer without a length ends with its connection, and so does a worker that is killed.
    for _ in 0..2 {
        let before = house.odoo.requests();
        house.get(ACME, "/web/static/a.js?streamed=1", &[]).await;
        assert_eq!(house.odoo.requests(), before + 1);
    }
    house.get(BOLT, "/web/static/own.js", &[]).await;
    for n in 0..200 {
        house.get(ACME, &format!("/web/static/a.js?lines=100&x={n}"), &[]).await;
    }
    let before = house.odoo.requests();
    house.get(BOLT, "/web/static/own.js", &[]).await;
    assert_eq!(house.odoo.requests(), before, "what bolt had is gone");
}
