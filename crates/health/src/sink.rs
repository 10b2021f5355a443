//! Where notices go: a webhook, Alertmanager, e-mail. What cannot be sent is tried again with the next; what is refused is
//! not.

use std::collections::VecDeque;
use std::time::Duration;

use cofferdam_tenant::Secret;
use jiff::Timestamp;
use lettre::address::Envelope;
use lettre::message::Mailbox;
use lettre::message::header::ContentType;
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, CertificateStore, Tls as SmtpTls, TlsParameters};
use lettre::transport::smtp::{SMTP_PORT, SUBMISSION_PORT, SUBMISSIONS_PORT};
use lettre::{AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor};
use serde_json::{Value, json};

use crate::alert::{Notice, Phase};
use crate::config::Encryption;
use crate::model::Subject;
use crate::slo::Urgency;

/// Sends notices.
#[derive(Debug)]
pub struct Sinks {
    client: reqwest::Client,
    sinks: Vec<Sink>,
}

struct Sink {
    way: Way,
    kind: Kind,
    /// What could not be sent yet, oldest first.
    waiting: VecDeque<Notice>,
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink").field("kind", &self.kind).field("waiting", &self.waiting.len()).finish_non_exhaustive()
    }
}

enum Way {
    /// To this address.
    Post(String),
    Mail(Box<Letters>),
}

struct Letters {
    transport: AsyncSmtpTransport<Tokio1Executor>,
    /// Who gets it, of all that it says it is to.
    whom: Envelope,
    from: Mailbox,
    to: Vec<Mailbox>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Webhook,
    Alertmanager,
    Email,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Webhook => "webhook",
            Self::Alertmanager => "Alertmanager",
            Self::Email => "e-mail",
        }
    }
}

/// How notices are sent by e-mail.
#[derive(Debug, Clone)]
pub(crate) struct Email {
    pub(crate) server: String,
    pub(crate) port: Option<u16>,
    pub(crate) encryption: Encryption,
    /// Certificates, as PEM.
    pub(crate) authorities: Option<String>,
    pub(crate) login: Option<(String, Secret)>,
    pub(crate) from: Mailbox,
    pub(crate) to: Vec<Mailbox>,
}

impl Email {
    /// Certificates of authorities; at least one.
    pub(crate) fn authorities(text: &str) -> Result<Certificate, String> {
        cofferdam_tls::certificates("certificate", text).map_err(|e| e.to_string())?;
        Certificate::from_pem(text.as_bytes()).map_err(|e| e.to_string())
    }

    fn tls(&self) -> Result<TlsParameters, String> {
        let mut tls = TlsParameters::builder(self.server.clone());
        if let Some(text) = &self.authorities {
            tls = tls.certificate_store(CertificateStore::None).add_root_certificate(Self::authorities(text)?);
        }
        tls.build().map_err(|e| e.to_string())
    }
}

/// Why something was not sent.
enum Failure {
    /// The next time it may be.
    Later(String),
    /// It never will be: whoever takes it has said no.
    Refused(String),
}

/// More than this is not kept for a sink that does not answer: the oldest go.
const WAITING: usize = 1_000;
const LIMIT: Duration = Duration::from_secs(5);
/// Servers of mail think about whom they talk to.
const LETTER: Duration = Duration::from_secs(20);

impl Sinks {
    /// Sinks for a webhook's address and Alertmanager's, where there are any.
    pub fn new(webhook: Option<&str>, alertmanager: Option<&str>) -> Result<Self, String> {
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(crate::probe::client_config()?)
            .timeout(LIMIT)
            // Whoever follows asks for a page, and takes it for an answer.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| e.to_string())?;
        let sink = |url: &str, kind| Sink { way: Way::Post(url.to_owned()), kind, waiting: VecDeque::new() };
        let webhook = webhook.map(|url| sink(url, Kind::Webhook));
        let alertmanager =
            alertmanager.map(|url| sink(&format!("{}/api/v2/alerts", url.trim_end_matches('/')), Kind::Alertmanager));
        Ok(Self { client, sinks: webhook.into_iter().chain(alertmanager).collect() })
    }

    /// And by e-mail.
    pub(crate) fn and_email(mut self, email: &Email) -> Result<Self, String> {
        let server = &email.server;
        let tls = || email.tls().map_err(|e| format!("{server}: {e}"));
        let (tls, port) = match email.encryption {
            Encryption::Starttls => (SmtpTls::Required(tls()?), SUBMISSION_PORT),
            Encryption::Implicit => (SmtpTls::Wrapper(tls()?), SUBMISSIONS_PORT),
            Encryption::None => (SmtpTls::None, SMTP_PORT),
        };
        let mut builder = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(server)
            .tls(tls)
            .port(email.port.unwrap_or(port))
            .timeout(Some(LIMIT));
        if let Some((user, password)) = &email.login {
            builder = builder.credentials(Credentials::new(user.clone(), password.expose().to_owned()));
        }
        let transport = builder.build();
        // To each on its own: that one is nobody's address any more is no reason to tell nobody.
        for whom in &email.to {
            let whom = Envelope::new(Some(email.from.email.clone()), vec![whom.email.clone()]);
            let whom = whom.map_err(|e| format!("{server}: {e}"))?;
            let (from, to) = (email.from.clone(), email.to.clone());
            let way = Way::Mail(Box::new(Letters { transport: transport.clone(), whom, from, to }));
            self.sinks.push(Sink { way, kind: Kind::Email, waiting: VecDeque::new() });
        }
        Ok(self)
    }

    /// Tells Alertmanager what is still open: what it has not heard of for five minutes is over for it. To be called every
    /// minute.
    pub async fn refresh(&self, open: &[&Notice]) -> Vec<String> {
        let mut problems = Vec::new();
        let body = Value::Array(open.iter().map(|notice| to_alertmanager(notice)).collect());
        for sink in self.sinks.iter().filter(|sink| sink.kind == Kind::Alertmanager && !open.is_empty()) {
            let Way::Post(url) = &sink.way else { continue };
            if let Err(Failure::Later(reason) | Failure::Refused(reason)) = post(&self.client, url, &body).await {
                problems.push(format!("{} does not hear what is still open: {reason}", sink.kind.name()));
            }
        }
        problems
    }

    /// Sends notices, and those that are still waiting, to all sinks at a time. What went wrong, by sink; what was not sent
    /// then waits.
    pub async fn send(&mut self, notices: &[Notice]) -> Vec<String> {
        let client = &self.client;
        let sent = self.sinks.iter_mut().map(|sink| sink.send(client, notices));
        futures_util::future::join_all(sent).await.into_iter().flatten().collect()
    }
}

impl Sink {
    async fn send(&mut self, client: &reqwest::Client, notices: &[Notice]) -> Option<String> {
        let mut problem = None;
        self.waiting.extend(notices.iter().cloned());
        while self.waiting.len() > WAITING {
            self.waiting.pop_front();
        }
        // A few at a time, so that what is too much for somebody is not too much for ever.
        while !self.waiting.is_empty() {
            let some: Vec<&Notice> = self.waiting.iter().take(AT_A_TIME).collect();
            let sent = match &self.way {
                Way::Post(url) => {
                    let body = match self.kind {
                        Kind::Alertmanager => Value::Array(some.iter().map(|n| to_alertmanager(n)).collect()),
                        _ => json!({ "notices": some }),
                    };
                    post(client, url, &body).await
                }
                Way::Mail(letters) => mail(letters, &some).await,
            };
            let number = some.len();
            let name = match &self.way {
                Way::Mail(letters) => {
                    let whom = letters.whom.to().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                    format!("{} to {whom}", self.kind.name())
                }
                Way::Post(_) => self.kind.name().to_owned(),
            };
            match sent {
                Ok(()) => drop(self.waiting.drain(..number)),
                Err(Failure::Refused(reason)) => {
                    self.waiting.drain(..number);
                    problem = Some(format!("{name}: {number} notices were refused, and are lost: {reason}"));
                }
                Err(Failure::Later(reason)) => {
                    let waiting = self.waiting.len();
                    problem = Some(format!("{name}: {waiting} notices were not sent yet: {reason}"));
                    break;
                }
            }
        }
        problem
    }
}

/// So many notices go in one request, or in one letter.
const AT_A_TIME: usize = 50;

async fn post(client: &reqwest::Client, url: &str, body: &Value) -> Result<(), Failure> {
    // Without the address, which may have a token in it.
    let answer = client.post(url).json(body).send().await.map_err(|e| Failure::Later(e.without_url().to_string()))?;
    let status = answer.status();
    let reason = || format!("it answers {}", status.as_u16());
    match status.as_u16() {
        200..=299 => Ok(()),
        300..=399 => Err(Failure::Later(format!(
            "{}: somebody else is to be asked, at an address that is to stand here",
            reason()
        ))),
        // Too early, too much just now, or somebody has yet to let us in.
        401 | 403 | 408 | 425 | 429 => Err(Failure::Later(reason())),
        400..=499 => Err(Failure::Refused(reason())),
        _ => Err(Failure::Later(reason())),
    }
}

async fn mail(letters: &Letters, notices: &[&Notice]) -> Result<(), Failure> {
    let Letters { transport, whom, from, to } = letters;
    let begins = notices.iter().filter(|notice| notice.phase == Phase::Firing).count();
    let first = notices.iter().find(|notice| notice.phase == Phase::Firing).or(notices.first());
    let about = first.map_or(String::new(), |notice| notice.check.to_string());
    let subject = match (begins, notices.len()) {
        (0, 1) => format!("Over: {about}"),
        (1, 1) => format!("Trouble: {about}"),
        (0, all) => format!("{all} troubles are over"),
        (begins, all) => format!("{begins} troubles begin, {} are over, first {about}", all - begins),
    };
    let mut text = String::new();
    for notice in notices {
        let word = if notice.phase == Phase::Firing { "TROUBLE" } else { "over" };
        let since = notice.since.strftime("%Y-%m-%d %H:%M UTC");
        text.push_str(&format!("{word}, since {since}: {}\r\n", notice.summary));
    }
    let mut message = Message::builder().from(from.clone()).subject(subject).header(ContentType::TEXT_PLAIN);
    for one in to {
        message = message.to(one.clone());
    }
    let message = message.body(text).map_err(|e| Failure::Refused(e.to_string()))?;
    // A server that says nothing is given up too: the library only limits how long connecting takes.
    let Ok(sent) = tokio::time::timeout(LETTER, transport.send_raw(whom, &message.formatted())).await else {
        return Err(Failure::Later(format!("no answer within {} s", LETTER.as_secs())));
    };
    match sent {
        Ok(_) => Ok(()),
        // Who we are has to be said otherwise first: somebody may set that right.
        Err(error) if error.status().is_some_and(|code| matches!(u16::from(code), 530 | 534 | 535 | 538)) => {
            Err(Failure::Later(error.to_string()))
        }
        Err(error) if error.is_permanent() => Err(Failure::Refused(error.to_string())),
        Err(error) => {
            let inner = std::error::Error::source(&error).map_or(String::new(), |inner| format!(": {inner}"));
            Err(Failure::Later(format!("{error}{inner}")))
        }
    }
}

/// As `POST /api/v2/alerts` of Alertmanager takes it.
fn to_alertmanager(notice: &Notice) -> Value {
    let (kind, name) = match &notice.check.subject {
        Subject::Tenant(name) => ("tenant", name),
        Subject::Shared(name) => ("shared", name),
    };
    let severity = match notice.urgency {
        Urgency::Page => "page",
        Urgency::Ticket => "ticket",
    };
    let mut alert = json!({
        "labels": {
            "alertname": "CofferdamHealth",
            "key": notice.key,
            kind: name,
            "aspect": notice.check.aspect,
            "topic": notice.topic,
        },
        "annotations": { "summary": notice.summary, "severity": severity, "consequences": notice.consequences.to_string() },
        "startsAt": notice.since.to_string(),
    });
    if notice.phase == Phase::Resolved
        && let Some(alert) = alert.as_object_mut()
    {
        alert.insert("endsAt".to_owned(), json!(Timestamp::now().to_string()));
    }
    alert
}
