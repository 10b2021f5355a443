//! Odoo as a browser sees it: the login page, or any other, within its time.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;

use super::{Probe, graded, seconds};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Fetches a page of a tenant's.
#[derive(Debug, Clone)]
pub struct HttpProbe {
    /// Whose.
    pub tenant: String,
    /// The page, such as `https://acme.example.com/web/login`.
    pub url: String,
    /// The address to connect to, where that is not the page's own: a gateway, or a server behind it.
    pub connect: Option<std::net::SocketAddr>,
    /// What must be in it; a page that says something else is not the page.
    pub expect: Option<String>,
    /// It comes in so many seconds: a warning, a failure.
    pub limits: (f64, f64),
    /// How often to look.
    pub interval: Duration,
    client: reqwest::Client,
}

/// More of a page is not read.
const LONGEST: usize = 1 << 20;

/// Whoever visits a site: each look is a visitor of its own.
pub(super) fn client(url: &reqwest::Url, connect: Option<std::net::SocketAddr>) -> Result<reqwest::Client, String> {
    let host = url.host_str().ok_or("it names no host")?.to_owned();
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(super::client_config()?)
        .redirect(reqwest::redirect::Policy::none())
        .pool_max_idle_per_host(0)
        .no_proxy()
        .user_agent("cofferdam-health");
    if let Some(connect) = connect {
        builder = builder.resolve(&host, connect);
    }
    builder.build().map_err(|e| e.to_string())
}

/// Why something was not fetched, without its address, which may have something secret in it.
pub(super) fn why(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

impl HttpProbe {
    /// A probe. Fails with a word when the URL is none.
    pub fn new(
        tenant: &str,
        url: &str,
        connect: Option<std::net::SocketAddr>,
        expect: Option<String>,
        limits: (f64, f64),
        interval: Duration,
    ) -> Result<Self, String> {
        let client = client(&reqwest::Url::parse(url).map_err(|e| e.to_string())?, connect)?;
        let (tenant, url) = (tenant.to_owned(), url.to_owned());
        Ok(Self { tenant, url, connect, expect, limits, interval, client })
    }

    /// The address without what may be secret in it.
    fn shown(&self) -> String {
        let Ok(url) = reqwest::Url::parse(&self.url) else { return "the page".to_owned() };
        format!("{}{}", url.host_str().unwrap_or_default(), url.path())
    }

    async fn fetch(&self) -> Result<(u16, String), reqwest::Error> {
        let response = self.client.get(&self.url).send().await?;
        let status = response.status().as_u16();
        let body = read(response).await?;
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}

/// What somebody answers, up to a bound.
pub(super) async fn read(mut response: reqwest::Response) -> Result<Vec<u8>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        let room = LONGEST - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if body.len() == LONGEST {
            break;
        }
    }
    Ok(body)
}

#[async_trait]
impl Probe for HttpProbe {
    fn name(&self) -> String {
        format!("page of {}", self.tenant)
    }

    fn kind(&self) -> &'static str {
        "page"
    }

    fn checks(&self) -> Vec<CheckId> {
        vec![CheckId::tenant(&self.tenant, "page"), CheckId::tenant(&self.tenant, "page latency")]
    }

    fn reachability(&self) -> CheckId {
        CheckId::tenant(&self.tenant, "page")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(15)
    }

    fn waits(&self) -> bool {
        true
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let started = Instant::now();
        let page = |status, text: String| {
            Observation::pass(self.reachability(), Topic::Availability, now, text).with(status).took(started.elapsed())
        };
        let (status, body) = match self.fetch().await {
            Ok(answer) => answer,
            Err(error) => return vec![page(Status::Fail, format!("no page: {}", why(error)))],
        };
        let took = started.elapsed().as_secs_f64();
        // To log in, Odoo may send a visitor elsewhere.
        if !(200..400).contains(&status) {
            return vec![page(Status::Fail, format!("{} answers {status} instead of a page", self.shown()))];
        }
        if let Some(expected) = self.expect.as_ref().filter(|expected| !body.contains(expected.as_str())) {
            return vec![page(Status::Fail, format!("the page does not say `{expected}`: it is another's, or broken"))];
        }
        let (warn, fail) = self.limits;
        let speed = format!("the page takes {}, {} is expected", seconds(took), seconds(warn));
        vec![
            page(Status::Pass, format!("{} answers {status}", self.shown())),
            Observation::pass(CheckId::tenant(&self.tenant, "page latency"), Topic::Latency, now, speed)
                .with(graded(took, warn, fail))
                .figure(Evidence::new("page_takes", took, "s").warned(warn).limited(fail)),
        ]
    }
}
