//! What a user does beyond looking at a page: logging in, and listening for news.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cofferdam_tenant::Secret;
use jiff::Timestamp;
use reqwest::header::{COOKIE, SET_COOKIE};
use serde_json::{Value, json};

use super::http::{client, read, why};
use super::{Probe, graded, seconds};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Logs in as a user made for it, asks who that is, and logs out again.
#[derive(Debug)]
pub struct LoginProbe {
    tenant: String,
    base: reqwest::Url,
    database: String,
    user: String,
    password: Secret,
    interval: Duration,
    client: reqwest::Client,
}

/// It takes so many seconds: a warning. Slow is not gone.
const LIMITS: f64 = 3.0;
/// Each call may take so long: all of them fit into a look, so that whoever was let in is let out again.
const CALL: Duration = Duration::from_secs(9);

impl LoginProbe {
    /// A probe that logs in to `database` at the site that `url` is of. Fails with a word when the URL is none.
    pub fn new(
        tenant: &str,
        url: &str,
        connect: Option<SocketAddr>,
        database: &str,
        user: &str,
        password: Secret,
        interval: Duration,
    ) -> Result<Self, String> {
        let base = reqwest::Url::parse(url).map_err(|e| e.to_string())?;
        let client = client(&base, connect)?;
        let (tenant, database, user) = (tenant.to_owned(), database.to_owned(), user.to_owned());
        Ok(Self { tenant, base, database, user, password, interval, client })
    }

    async fn call(&self, path: &str, params: Value, cookie: Option<&str>) -> Result<(Value, Option<String>), String> {
        let url = self.base.join(path).map_err(|e| e.to_string())?;
        let body = json!({ "jsonrpc": "2.0", "method": "call", "id": 1, "params": params });
        let mut request = self.client.post(url).timeout(CALL).json(&body);
        if let Some(cookie) = cookie {
            request = request.header(COOKIE, cookie);
        }
        let answer = request.send().await.map_err(why)?;
        if !answer.status().is_success() {
            return Err(format!("{path} answers {}", answer.status().as_u16()));
        }
        let session = answer.headers().get_all(SET_COOKIE).iter().find_map(|value| {
            let pair = value.to_str().ok()?.split(';').next()?.trim();
            pair.starts_with("session_id=").then(|| pair.to_owned())
        });
        let body = read(answer).await.map_err(why)?;
        let answer: Value =
            serde_json::from_slice(&body).map_err(|error| format!("{path} answers no JSON: {error}"))?;
        if let Some(error) = answer.get("error") {
            let said = error["data"]["message"].as_str().or(error["message"].as_str()).unwrap_or("an error");
            return Err(format!("{path} says `{said}`"));
        }
        Ok((answer["result"].clone(), session))
    }

    async fn flow(&self) -> Result<(), String> {
        let login = json!({ "db": self.database, "login": self.user, "password": self.password.expose() });
        let (who, session) = self.call("/web/session/authenticate", login, None).await?;
        if !who["uid"].is_number() {
            return Err(format!("{} was not let in", self.user));
        }
        let session = session.ok_or("no session was given")?;
        let asked = self.call("/web/session/get_session_info", json!({}), Some(&session)).await;
        // Whatever came of it: no session is left behind.
        let leave = self.base.join("/web/session/logout").map_err(|e| e.to_string())?;
        let left = self.client.get(leave).timeout(CALL).header(COOKIE, &session).send().await;
        let (me, _) = asked?;
        if me["uid"] != who["uid"] {
            return Err("who has logged in is somebody else afterwards".to_owned());
        }
        let left = left.map_err(|error| format!("logging out: {}", why(error)))?.status();
        if left.is_client_error() || left.is_server_error() {
            return Err(format!("logging out answers {}", left.as_u16()));
        }
        Ok(())
    }
}

#[async_trait]
impl Probe for LoginProbe {
    fn name(&self) -> String {
        format!("login to {}", self.tenant)
    }

    fn kind(&self) -> &'static str {
        "login"
    }

    fn checks(&self) -> Vec<CheckId> {
        vec![self.reachability()]
    }

    fn reachability(&self) -> CheckId {
        CheckId::tenant(&self.tenant, "login")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(30)
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let started = Instant::now();
        let flow = self.flow().await;
        let took = started.elapsed().as_secs_f64();
        let (status, text) = match flow {
            Ok(()) => {
                let text = format!("logging in, asking and logging out take {}", seconds(took));
                (graded(took, LIMITS, f64::INFINITY), text)
            }
            Err(error) => (Status::Fail, format!("nobody can log in: {error}")),
        };
        vec![
            Observation::pass(self.reachability(), Topic::Availability, now, text)
                .with(status)
                .figure(Evidence::new("login_takes", took, "s").warned(LIMITS)),
        ]
    }
}

/// Opens a WebSocket, as every browser does that waits for news.
#[derive(Debug)]
pub struct WebSocketProbe {
    tenant: String,
    url: reqwest::Url,
    origin: String,
    interval: Duration,
    client: reqwest::Client,
}

/// A key, and the answer to it: the example of RFC 6455. It proves that somebody has understood, and hides nothing.
const KEY: (&str, &str) = ("dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");

impl WebSocketProbe {
    /// A probe of `/websocket` at the site that `url` is of. Fails with a word when the URL is none.
    pub fn new(tenant: &str, url: &str, connect: Option<SocketAddr>, interval: Duration) -> Result<Self, String> {
        let base = reqwest::Url::parse(url).map_err(|e| e.to_string())?;
        let client = client(&base, connect)?;
        let url = base.join("/websocket").map_err(|e| e.to_string())?;
        Ok(Self { tenant: tenant.to_owned(), url, origin: base.origin().ascii_serialization(), interval, client })
    }

    async fn open(&self) -> Result<(), String> {
        let request = self.client.get(self.url.clone());
        let request = request.header("connection", "Upgrade").header("upgrade", "websocket");
        let request = request.header("sec-websocket-version", "13").header("sec-websocket-key", KEY.0);
        let answer = request.header("origin", &self.origin).send().await.map_err(why)?;
        let status = answer.status().as_u16();
        if status != 101 {
            return Err(format!("it answers {status} instead of 101: is it led to the evented port?"));
        }
        let accepted = answer.headers().get("sec-websocket-accept").is_some_and(|value| value == KEY.1);
        // Closes when it is dropped.
        answer.upgrade().await.map_err(why)?;
        if accepted { Ok(()) } else { Err("it answers 101 without having understood".to_owned()) }
    }
}

#[async_trait]
impl Probe for WebSocketProbe {
    fn name(&self) -> String {
        format!("websocket of {}", self.tenant)
    }

    fn kind(&self) -> &'static str {
        "websocket"
    }

    fn checks(&self) -> Vec<CheckId> {
        vec![self.reachability()]
    }

    fn reachability(&self) -> CheckId {
        CheckId::tenant(&self.tenant, "websocket")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn waits(&self) -> bool {
        true
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let started = Instant::now();
        let (status, text) = match self.open().await {
            Ok(()) => (Status::Pass, format!("it opens in {}", seconds(started.elapsed().as_secs_f64()))),
            Err(error) => (Status::Fail, format!("no news reaches browsers: {error}")),
        };
        vec![Observation::pass(self.reachability(), Topic::Availability, now, text).with(status)]
    }
}
