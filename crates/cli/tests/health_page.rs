//! The page for people, in the browser that people use.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_tungstenite::tungstenite::Message;

/// Ended when dropped, with everything that it has started.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Chromium without a window, spoken to by its own protocol.
struct Browser {
    socket: tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>,
    session: Option<String>,
    last: u64,
    _process: Running,
    _profile: TempDir,
}

impl Browser {
    /// None where there is no Chromium.
    async fn open() -> Option<Self> {
        let profile = tempfile::tempdir().unwrap();
        let mut process = Command::new("chromium")
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--remote-debugging-port=0", "--disable-background-networking", "--disable-component-update"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let line = lines.by_ref().map_while(Result::ok).find(|line| line.contains("DevTools listening on "))?;
        std::thread::spawn(move || lines.for_each(drop));
        let (socket, _) = tokio_tungstenite::connect_async(line.rsplit(' ').next().unwrap()).await.unwrap();
        Some(Self { socket, session: None, last: 0, _process: Running(process), _profile: profile })
    }

    async fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last += 1;
        let mut message = json!({ "id": self.last, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.socket.send(Message::text(message.to_string())).await.unwrap();
        loop {
            let Message::Text(text) = self.socket.next().await.unwrap().unwrap() else { continue };
            let answer: Value = serde_json::from_str(&text).unwrap();
            if answer["id"] == self.last {
                assert!(answer.get("error").is_none(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    async fn visit(&mut self, url: &str) {
        let target = self.call("Target.createTarget", json!({ "url": url })).await;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        self.session = Some(self.call("Target.attachToTarget", attach).await["sessionId"].as_str().unwrap().to_owned());
    }

    async fn eval(&mut self, script: &str) -> Value {
        let answer = self.call("Runtime.evaluate", json!({ "expression": script, "returnByValue": true })).await;
        assert!(answer.get("exceptionDetails").is_none(), "{script}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Until something is so, for as long as the page needs to ask twice.
    async fn becomes(&mut self, script: &str) {
        for _ in 0..150 {
            if self.eval(script).await == json!(true) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("not so after 15 s: {script}\n{}", self.eval("document.body.innerText").await);
    }

    async fn width(&mut self, width: u32) {
        let metrics = json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", metrics).await;
    }
}

/// "Usable on a phone; tested in headless Chromium …; colour is never the only signal."
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_is_read_on_a_phone_says_in_words_what_is_wrong_and_follows_what_happens() {
    let Some(mut browser) = Browser::open().await else {
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

    browser.visit(&url).await;
    browser.becomes("document.querySelector('.cards li')?.innerText.includes('✓ pass')").await;
    browser.becomes("document.body.innerText.includes('a-tenant-with-a-name-that-is-longer-than-most')").await;
    browser.becomes("document.querySelector('.causes')?.innerText.includes('✗ fail')").await;
    for width in [320, 400, 1_200] {
        browser.width(width).await;
        let fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth";
        assert_eq!(browser.eval(fits).await, json!(true), "at {width} pixels something sticks out");
        let readable =
            "[...document.querySelectorAll('main *')].every(e => parseFloat(getComputedStyle(e).fontSize) >= 11)";
        assert_eq!(browser.eval(readable).await, json!(true), "at {width} pixels");
    }
    // Every status is a sign and a word: none is told by its colour alone.
    let words = "[...document.querySelectorAll('li.pass, li.warn, li.unknown, li.fail')].every(e => \
                 /[✓!?✗] (pass|warn|unknown|fail)/.test(e.innerText))";
    assert_eq!(browser.eval(words).await, json!(true));
    // Nothing comes from anywhere else.
    let own = "performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))";
    assert_eq!(browser.eval(own).await, json!(true));
    serving.abort();
    browser.becomes("document.querySelector('.cards li')?.innerText.includes('✗ fail')").await;
    assert_eq!(browser.eval("document.title.startsWith('✗')").await, json!(true));
    assert_eq!(browser.eval("document.getElementById('lost').hidden").await, json!(true));
    drop(watch);
    browser.becomes("!document.getElementById('lost').hidden").await;
}
