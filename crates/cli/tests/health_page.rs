//! The page for people, in the browser that people use.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cofferdam_testkit::browser::Browser;
use serde_json::json;

/// How long a page may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// Ended when dropped, with everything that it has started.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// "Usable on a phone; tested in headless Chromium …; colour is never the only signal."
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_is_read_on_a_phone_says_in_words_what_is_wrong_and_follows_what_happens() {
    let Some(mut browser) = Browser::open().await.unwrap() else {
        eprintln!("skipped: there is no Chromium here");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let site = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = site.local_addr().unwrap();
    let config = directory.path().join("health.yaml");
    let text = format!(
        "interval: 1s\ndisks: {{ files: {{ path: . }} }}\nservices: {{ payroll: {{ title: Payroll, tenants: [acme] }} }}\n\
         tenants:\n  acme: {{ page: 'http://{address}/web/login', availability: 99.5 }}\n  \
         a-tenant-with-a-name-that-is-longer-than-most: {{ page: 'http://127.0.0.1:1/' }}\n"
    );
    std::fs::write(&config, text).unwrap();
    // A page that comes, until there is nobody any more.
    let serving = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        loop {
            let (mut tcp, _) = site.accept().await.unwrap();
            let mut request = [0; 4_096];
            let _ = tcp.read(&mut request).await;
            let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await;
        }
    });
    let mut watch = Command::new(env!("CARGO_BIN_EXE_cofferdam"))
        .args(["health", "watch", "--listen", "127.0.0.1:0", "--config"])
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let watch = Running(watch);
    let line = lines.by_ref().map(Result::unwrap).find(|line| line.starts_with("listening on ")).unwrap();
    std::thread::spawn(move || lines.for_each(drop));
    let url = line.trim_start_matches("listening on ").to_owned();

    browser.visit(&url).await.unwrap();
    browser.becomes("document.querySelector('.cards li')?.innerText.includes('✓ pass')", PATIENCE).await.unwrap();
    browser
        .becomes("document.body.innerText.includes('a-tenant-with-a-name-that-is-longer-than-most')", PATIENCE)
        .await
        .unwrap();
    browser.becomes("document.querySelector('.causes')?.innerText.includes('✗ fail')", PATIENCE).await.unwrap();
    for width in [320, 400, 1_200] {
        browser.width(width).await.unwrap();
        let fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth";
        assert_eq!(browser.eval(fits).await.unwrap(), json!(true), "at {width} pixels something sticks out");
        let readable =
            "[...document.querySelectorAll('main *')].every(e => parseFloat(getComputedStyle(e).fontSize) >= 11)";
        assert_eq!(browser.eval(readable).await.unwrap(), json!(true), "at {width} pixels");
    }
    // Every status is a sign and a word: none is told by its colour alone.
    let words = "[...document.querySelectorAll('li.pass, li.warn, li.unknown, li.fail')].every(e => \
                 /[✓!?✗] (pass|warn|unknown|fail)/.test(e.innerText))";
    assert_eq!(browser.eval(words).await.unwrap(), json!(true));
    // Nothing comes from anywhere else.
    let own = "performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))";
    assert_eq!(browser.eval(own).await.unwrap(), json!(true));
    serving.abort();
    browser.becomes("document.querySelector('.cards li')?.innerText.includes('✗ fail')", PATIENCE).await.unwrap();
    assert_eq!(browser.eval("document.title.startsWith('✗')").await.unwrap(), json!(true));
    assert_eq!(browser.eval("document.getElementById('lost').hidden").await.unwrap(), json!(true));
    drop(watch);
    browser.becomes("!document.getElementById('lost').hidden", PATIENCE).await.unwrap();
}
