//! Chromium without a window, spoken to by its own protocol.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::{TestkitError, io};

/// Ended when dropped, with everything that it has started.
#[derive(Debug)]
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A browser with one page that is spoken to at a time.
#[derive(Debug)]
pub struct Browser {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: Option<String>,
    last: u64,
    _process: Running,
    _profile: TempDir,
}

impl Browser {
    /// Starts one; `None` where there is no Chromium.
    pub async fn open() -> Result<Option<Self>, TestkitError> {
        let profile = tempfile::tempdir().map_err(io("a profile"))?;
        let process = Command::new("chromium")
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--remote-debugging-port=0", "--disable-background-networking", "--disable-component-update"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut process) = process else { return Ok(None) };
        let stderr = process.stderr.take();
        let process = Running(process);
        let Some(stderr) = stderr else { return Ok(None) };
        let mut lines = BufReader::new(stderr).lines();
        let line = lines.by_ref().map_while(Result::ok).find(|line| line.contains("DevTools listening on "));
        let Some(line) = line else { return Ok(None) };
        std::thread::spawn(move || lines.for_each(drop));
        let url = line.rsplit(' ').next().unwrap_or_default();
        let (socket, _) = tokio_tungstenite::connect_async(url).await.map_err(|e| failed("connecting", &e))?;
        Ok(Some(Self { socket, session: None, last: 0, _process: process, _profile: profile }))
    }

    /// Calls a method of the page, or of the browser as long as there is none.
    pub async fn call(&mut self, method: &str, parameters: Value) -> Result<Value, TestkitError> {
        self.last += 1;
        let mut message = json!({ "id": self.last, "method": method, "params": parameters });
        if let Some(session) = self.session.as_ref().filter(|_| !method.starts_with("Target.")) {
            message["sessionId"] = json!(session);
        }
        self.socket.send(Message::text(message.to_string())).await.map_err(|e| failed(method, &e))?;
        loop {
            let message = self.socket.next().await.ok_or_else(|| failed(method, &"the browser is gone"))?;
            let Message::Text(text) = message.map_err(|e| failed(method, &e))? else { continue };
            let answer: Value = serde_json::from_str(&text).map_err(|e| failed(method, &e))?;
            if answer["id"] == self.last {
                return match answer.get("error") {
                    Some(error) => Err(failed(method, error)),
                    None => Ok(answer["result"].clone()),
                };
            }
        }
    }

    /// Opens an address in a page of its own, which is spoken to from now on.
    pub async fn visit(&mut self, url: &str) -> Result<(), TestkitError> {
        let target = self.call("Target.createTarget", json!({ "url": url })).await?;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session =
            self.call("Target.attachToTarget", attach).await?["sessionId"].as_str().unwrap_or_default().to_owned();
        self.session = Some(session);
        Ok(())
    }

    /// Opens an address in the page that is spoken to.
    pub async fn go(&mut self, url: &str) -> Result<(), TestkitError> {
        self.call("Page.navigate", json!({ "url": url })).await.map(|_| ())
    }

    /// The value of an expression; of a promise, what it ends with.
    pub async fn eval(&mut self, script: &str) -> Result<Value, TestkitError> {
        let parameters = json!({ "expression": script, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", parameters).await?;
        match answer.get("exceptionDetails") {
            Some(exception) => Err(failed(script, exception)),
            None => Ok(answer["result"]["value"].clone()),
        }
    }

    /// Waits until something is so; a page that is just being loaded is asked again.
    pub async fn becomes(&mut self, script: &str, limit: Duration) -> Result<(), TestkitError> {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let last = self.eval(script).await;
            if matches!(last, Ok(Value::Bool(true))) {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                let text = self.eval("document.body.innerText").await.unwrap_or_default();
                return Err(failed(&format!("not so after {limit:?}: {script}: {last:?}"), &text));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// How many pixels the page is wide.
    pub async fn width(&mut self, width: u32) -> Result<(), TestkitError> {
        let metrics = json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", metrics).await.map(|_| ())
    }

    /// Writes what the page looks like to a file (PNG).
    pub async fn screenshot(&mut self, path: &Path) -> Result<(), TestkitError> {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" })).await?;
        let bytes =
            STANDARD.decode(shot["data"].as_str().unwrap_or_default()).map_err(|e| failed("a screenshot", &e))?;
        std::fs::write(path, bytes).map_err(io("a screenshot"))
    }
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> TestkitError {
    TestkitError::Failed { program: format!("chromium: {what}"), output: error.to_string() }
}
