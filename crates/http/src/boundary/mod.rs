//! Which database a request names, in its query or in its body, and whether that is its own tenant's.
//!
//! Odoo chooses the database of a page by host, but some of its entry points take the name from the request and ask no
//! `dbfilter`: the remote calls `/jsonrpc` and `/xmlrpc`, the login, `?db=`. On a shared server that is a way into every
//! other tenant. So the gateway reads these requests as Odoo would, and lets none through that names anything else than
//! the tenant's own database, or that it cannot read with certainty.
//!
//! Pure: text in, a verdict out. The rules are those of the table of routes in Odoo 16 to 19.

mod json;
mod xml;

use std::io::Read;

/// Bytes of a form that are read; the forms of the pages concerned are short.
const MOST_FORM: u64 = 1 << 20;

/// How a request's body can name a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// `/jsonrpc`: the first argument of the call.
    JsonRpc,
    /// `/xmlrpc/<service>` and `/xmlrpc/2/<service>`: the first argument of the call.
    XmlRpc,
    /// `/web/session/authenticate`: `params.db`.
    Login,
    /// A page that may be asked with a form: its field `db`.
    Form,
    /// Any other route: a tenant can give the others another name, so a remote call is known by its form alone.
    Other,
}

/// Somebody tries to log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The login that is tried, as it was sent; empty when the request names none.
    pub login: String,
    /// How the answer says whether it was right.
    pub told_by: ToldBy,
}

/// How Odoo says whether a login was right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToldBy {
    /// By a redirect to somewhere else than the form; which comes again otherwise.
    Redirect,
    /// Not at all: what is asked for must only not be asked for too often.
    Nothing,
    /// By `result` in JSON.
    Json,
    /// By a value in XML.
    Xml,
    /// By a refusal in JSON or XML: a call that brings its password, and means something else.
    Refusal,
}

impl ToldBy {
    /// Whether an answer says that the login was right; `None` when it says neither. `location` is where it sends the client,
    /// and `body` may be its beginning only.
    pub fn verdict(self, status: u16, location: Option<&str>, body: &[u8]) -> Option<bool> {
        match self {
            Self::Nothing => None,
            Self::Redirect => match status {
                200 => Some(false),
                // Back to the form: its session was over, and nothing was tried.
                300..400 => (!location.is_some_and(|to| to.split('?').next().unwrap_or(to).ends_with("/web/login")))
                    .then_some(true),
                // A form without its token, a server that is busy.
                _ => None,
            },
            _ if status != 200 => None,
            Self::Json => json::verdict(body),
            Self::Refusal => {
                let refused = [&b"AccessDenied"[..], b"Access Denied"]
                    .iter()
                    .any(|words| body.windows(words.len()).any(|w| w == *words));
                Some(!refused)
            }
            Self::Xml => {
                let has = |words: &[u8]| body.windows(words.len()).any(|w| w == words);
                let wrong = has(b"<boolean>0</boolean>") || has(b"<fault>");
                has(b"<methodResponse").then_some(!wrong)
            }
        }
    }
}

/// Why a request is not let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Denied {
    /// It names another database, or the tenant has none.
    #[error("the request names a database that is not this site's")]
    Database,
    /// It calls a service that administers the whole server.
    #[error("only the services `common` and `object` can be called here")]
    Service,
    /// It brings a session in its query, where Odoo 16 takes it from.
    #[error("a session cannot be given in the query")]
    Session,
    /// What it says cannot be told with certainty.
    #[error("the request cannot be read: {0}")]
    Unreadable(&'static str),
    /// The body is of a kind that is not read here.
    #[error("this page takes no body of that type")]
    MediaType,
}

/// Pages that call Odoo's `ensure_db`, which takes `db` from a form too.
const PAGES: [&str; 9] = [
    "/web",
    "/odoo",
    "/web/login",
    "/web/signup",
    "/web/reset_password",
    "/web/session",
    "/web/become",
    "/scoped_app",
    "/pos",
];

/// How the body of a request for a path can name a database; an error when the path itself names a service that
/// administers the server. `path` decoded, without a query and without a slash at its end.
pub fn carrier(path: &str) -> Result<Carrier, Denied> {
    let carrier = carrier_of(path).or_else(|| carrier_of(without_language(path)?));
    if carrier == Some(Carrier::XmlRpc) && !matches!(xml_service(path), Some("common" | "object")) {
        return Err(Denied::Service);
    }
    Ok(carrier.unwrap_or(Carrier::Other))
}

fn carrier_of(path: &str) -> Option<Carrier> {
    let below = |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if path == "/jsonrpc" {
        Some(Carrier::JsonRpc)
    } else if below("/xmlrpc") {
        Some(Carrier::XmlRpc)
    } else if path == "/web/session/authenticate" {
        Some(Carrier::Login)
    } else if PAGES.contains(&path)
        || ["/odoo", "/scoped_app", "/pos", "/auth_oauth", "/auth_saml", "/web/login"].iter().any(|p| below(p))
    {
        Some(Carrier::Form)
    } else {
        None
    }
}

/// The path behind its first segment, which may be a language: `/fr/web/login`. A tenant can call its languages what it likes.
pub(crate) fn without_language(path: &str) -> Option<&str> {
    let (segment, _) = path.strip_prefix('/')?.split_once('/')?;
    Some(&path[segment.len() + 1..])
}

/// Whether the query of a request names the tenant's database or none, and no session.
///
/// `query` is what follows the question mark, as it was sent.
pub fn check_query(path: &str, query: &[u8], database: Option<&str>) -> Result<(), Denied> {
    // Nothing of interest has another first letter, encoded or not.
    if !query.split(|b| *b == b'&').any(|pair| matches!(pair.first(), Some(b'd' | b's' | b'R' | b'p' | b'%'))) {
        return Ok(());
    }
    check_pairs(path, query, database)
}

fn check_pairs(path: &str, text: &[u8], database: Option<&str>) -> Result<(), Denied> {
    pairs(path, text, database, true).map(|_| ())
}

/// Whether a path is one by whose form somebody proves or claims to be somebody.
fn claims(path: &str) -> bool {
    let claims = |path: &str| CLAIMS.contains(&path);
    claims(path) || without_language(path).is_some_and(claims)
}

/// Checks the pairs of a query or a form, and gives the login that is among them.
fn pairs(path: &str, text: &[u8], database: Option<&str>, is_query: bool) -> Result<Option<String>, Denied> {
    let mut login = None;
    for (name, value) in form_urlencoded::parse(text) {
        match name.as_ref() {
            "password" if is_query && claims(path) => return Err(Denied::Unreadable("a password belongs in its body")),
            "login" if login.is_some() => return Err(Denied::Unreadable("it names a login twice")),
            "login" => login = Some(value.into_owned()),
            "db" if !value.is_empty() && Some(value.as_ref()) != database => return Err(Denied::Database),
            "session_id" if is_session(&value) => return Err(Denied::Session),
            "state" | "RelayState" if (path.contains("/auth_oauth") || path.contains("/auth_saml")) => {
                json::check_oauth_state(&value, database)?;
            }
            _ => {}
        }
    }
    Ok(login)
}

/// Forms by which somebody proves or claims to be somebody.
const CLAIMS: [&str; 4] = ["/web/login", "/web/login/totp", "/web/reset_password", "/web/signup"];

/// Whether a body names the tenant's database, or none.
///
/// `content_type` is the header's value. The body is read as far as it must be, which for JSON is to its end. Gives the
/// login that the request tries, if it is one that does.
pub fn check_body(
    carrier: Carrier,
    path: &str,
    content_type: Option<&str>,
    body: impl Read,
    database: Option<&str>,
) -> Result<Option<Attempt>, Denied> {
    let content_type = content_type.unwrap_or_default();
    match carrier {
        Carrier::JsonRpc => {
            understood(content_type)?;
            json::check_call(body, database)
        }
        Carrier::Login => {
            understood(content_type)?;
            let login = json::check_login(body, database)?;
            Ok(Some(Attempt { login, told_by: ToldBy::Json }))
        }
        Carrier::XmlRpc => {
            understood(content_type)?;
            let login = xml::check_call(body, database)?;
            let told_by = if path.ends_with("/object") { ToldBy::Refusal } else { ToldBy::Xml };
            Ok(login.map(|login| Attempt { login, told_by }))
        }
        Carrier::Other => {
            match media_type(content_type) {
                "application/json" | "application/json-rpc" => json::check_other(body, database)?,
                // A form is read as a form, and then there is no call left to be read.
                "application/x-www-form-urlencoded" | "multipart/form-data" => {}
                _ => xml::check_other(body, database)?,
            }
            Ok(None)
        }
        Carrier::Form => match media_type(content_type) {
            "application/x-www-form-urlencoded" => {
                understood(content_type)?;
                let mut text = Vec::new();
                let read = body.take(MOST_FORM + 1).read_to_end(&mut text);
                if read.is_err() || text.len() as u64 > MOST_FORM {
                    return Err(Denied::Unreadable("its form is too long"));
                }
                let login = pairs(path, &text, database, false)?;
                // What is tried there has nothing to do with a login in the form.
                let (login, told_by) = if path.ends_with("/totp") {
                    (" second factor".to_owned(), ToldBy::Redirect)
                } else if path.ends_with("/web/login") {
                    (login.unwrap_or_default(), ToldBy::Redirect)
                } else {
                    (" new password".to_owned(), ToldBy::Nothing)
                };
                Ok(claims(path).then_some(Attempt { login, told_by }))
            }
            "" | "application/json" | "text/plain" => Ok(None),
            // Servers take more for a form than what is spelt like one.
            _ => Err(Denied::MediaType),
        },
    }
}

/// The service of a call by XML: the last segment of its path.
fn xml_service(path: &str) -> Option<&str> {
    let path = if path.starts_with("/xmlrpc/") { path } else { without_language(path)? };
    let rest = path.strip_prefix("/xmlrpc/")?;
    Some(rest.strip_prefix("2/").unwrap_or(rest))
}

/// The media type, if it is one of those that are known here, in any case.
fn media_type(content_type: &str) -> &str {
    const KNOWN: [&str; 5] = [
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/json",
        "application/json-rpc",
        "text/plain",
    ];
    let kind = content_type.split(';').next().unwrap_or_default().trim_matches([' ', '\t']);
    KNOWN.into_iter().find(|known| kind.eq_ignore_ascii_case(known)).unwrap_or(kind)
}

/// Whether something is a session's id, as any version of Odoo makes them.
fn is_session(text: &str) -> bool {
    let id = text.trim_end();
    id.len() >= 40 && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

/// Text in another encoding would be read in another way than ours.
fn understood(content_type: &str) -> Result<(), Denied> {
    for parameter in content_type.split(';').skip(1) {
        let Some((name, value)) = parameter.split_once('=') else { continue };
        let value = value.trim().trim_matches('"');
        if name.trim().eq_ignore_ascii_case("charset")
            && !["utf-8", "utf8", "us-ascii"].iter().any(|known| value.eq_ignore_ascii_case(known))
        {
            return Err(Denied::Unreadable("its charset is not UTF-8"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
