//! Which database a request gets, as Odoo chooses it: with every way around the host that Odoo leaves open.
//!
//! Sessions of all databases lie together, as in one `data_dir`. Remote calls take the database from their body and ask no
//! `dbfilter`. What is secret in a database is one sentence, [`secret`]: whoever reads another's has got through.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use super::server::{Answer, Request, State, text};

/// Every database has this user.
pub const USER: (&str, &str) = ("admin", "admin-secret");

/// What only somebody with access to a database can read.
pub fn secret(database: &str) -> String {
    format!("the secret of {database}")
}

/// The sessions of all databases.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<HashMap<String, Session>>);

#[derive(Debug, Clone, Default)]
struct Session {
    database: Option<String>,
    is_logged_in: bool,
}

impl Sessions {
    fn get(&self, id: &str) -> Option<Session> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// A session under a new id; the old one is gone, as after a login or a logout.
    fn rotate(&self, old: Option<&str>, session: Session) -> String {
        let part = || RandomState::new().hash_one("session");
        let id = format!("{:016x}{:016x}{:08x}", part(), part(), part() as u32);
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = old {
            sessions.remove(old);
        }
        sessions.insert(id.clone(), session);
        id
    }
}

fn set_cookie(id: &str) -> String {
    format!("session_id={id}; Expires=Thu, 01 Jan 2099 00:00:00 GMT; Max-Age=604800; HttpOnly; Path=/")
}

/// The session's id: in Odoo 16 from the query, or from a header, before the cookie.
fn session_id(request: &Request) -> Option<String> {
    let given = request.query.get("session_id").map(String::as_str).or(request.header("x-openerp-session-id"));
    let cookies = request.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("cookie"));
    let cookie = cookies
        .flat_map(|(_, value)| value.split(';'))
        .filter_map(|pair| pair.split_once('='))
        .find(|(name, _)| name.trim() == "session_id");
    given.or(cookie.map(|(_, value)| value.trim())).map(str::to_owned)
}

/// The host that Odoo believes to be asked for: ProxyFix takes the last value of X-Forwarded-Host.
pub(super) fn host(request: &Request) -> &str {
    let host = request.header("x-forwarded-host").and_then(|h| h.rsplit(',').next()).or(request.header("host"));
    let host = host.unwrap_or_default().trim();
    let host = host.split(':').next().unwrap_or_default();
    host.strip_prefix("www.").unwrap_or(host)
}

/// The database of a request: its session's, that of the header `X-Odoo-Database`, or the host's.
pub(super) fn database(state: &State, request: &Request) -> Option<String> {
    let of_host = state.options.databases.get(host(request));
    let accepted = |name: &String| {
        state.options.databases.values().any(|known| known == name)
            && (!state.options.dbfilter || of_host.is_none_or(|of_host| of_host == name))
    };
    let session = session_id(request).and_then(|id| state.sessions.get(&id));
    let of_session = session.and_then(|s| s.database).filter(&accepted);
    let of_header = request.header("x-odoo-database").map(str::to_owned).filter(accepted);
    of_session.or(of_header).or_else(|| of_host.cloned())
}

fn form(text: &[u8]) -> HashMap<String, String> {
    form_urlencoded::parse(text).map(|(name, value)| (name.into_owned(), value.into_owned())).collect()
}

/// The answer of a route that has to do with databases and sessions; `None` for every other route.
pub(super) fn respond(state: &State, request: &Request) -> Option<Answer> {
    let path = match request.path.trim_end_matches('/') {
        "" => "/",
        path => path,
    };
    match path {
        "/jsonrpc" => Some(answer_json(&call_json(state, &request.body))),
        "/web/session/authenticate" => Some(authenticate(state, request)),
        "/web/session/get_session_info" => {
            let session = session_id(request).and_then(|id| state.sessions.get(&id)).unwrap_or_default();
            let known = session.database.filter(|_| session.is_logged_in);
            let answer = known.map_or_else(
                || json!({ "jsonrpc": "2.0", "error": { "code": 100, "message": "Odoo Session Expired" } }),
                |name| json!({ "jsonrpc": "2.0", "result": { "uid": 2, "db": name } }),
            );
            Some(answer_json(&answer))
        }
        "/web/session/logout" => {
            let old = session_id(request);
            let id = state.sessions.rotate(old.as_deref(), Session::default());
            Some(text(303, "text/html", "").with("Location", "/").with("Set-Cookie", set_cookie(&id)))
        }
        "/web/login" => Some(login(state, request)),
        "/odoo" => Some(home(state, request)),
        "/web/database/list" | "/web/database/manager" => Some(answer_json(&json!(databases(state)))),
        p => p.strip_prefix("/xmlrpc/").map(|service| {
            let service = service.strip_prefix("2/").unwrap_or(service);
            let arguments = xml_arguments(&String::from_utf8_lossy(&request.body));
            let value = call(state, service, arguments.first().map(String::as_str));
            let value = value.unwrap_or_else(|fault| format!("fault: {fault}"));
            let xml =
                format!("<methodResponse><params><param><value>{value}</value></param></params></methodResponse>");
            text(200, "text/xml", xml)
        }),
    }
}

fn answer_json(value: &Value) -> Answer {
    text(200, "application/json", value.to_string())
}

fn databases(state: &State) -> Vec<&String> {
    let mut all: Vec<_> = state.options.databases.values().collect();
    all.sort();
    all.dedup();
    all
}

/// A service and the first argument of a call to it.
fn call(state: &State, service: &str, first: Option<&str>) -> Result<String, String> {
    match (service, first) {
        ("db", _) => Ok(format!("{:?}", databases(state))),
        ("common", None) => Ok("18.0".into()),
        ("common" | "object", Some(name)) if databases(state).iter().any(|known| *known == name) => Ok(secret(name)),
        ("common" | "object", Some(_)) => Err("database does not exist".into()),
        _ => Err("no such service".into()),
    }
}

fn call_json(state: &State, body: &[u8]) -> Value {
    // The last of two equal keys counts, as for Python.
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return json!({ "error": "bad request" }) };
    let service = body["params"]["service"].as_str().unwrap_or_default();
    match call(state, service, body["params"]["args"][0].as_str()) {
        Ok(result) => json!({ "jsonrpc": "2.0", "id": body["id"], "result": result }),
        Err(error) => json!({ "jsonrpc": "2.0", "id": body["id"], "error": error }),
    }
}

/// The arguments as `xmlrpc.client` collects them: whatever `</value>` or a typed element ends, wherever it stands.
fn xml_arguments(document: &str) -> Vec<String> {
    let (mut found, mut data, mut in_value) = (Vec::new(), String::new(), false);
    let mut rest = document;
    while let Some(open) = rest.find('<') {
        data.push_str(&rest[..open]);
        let Some(close) = rest[open..].find('>') else { break };
        let tag = &rest[open + 1..open + close];
        rest = &rest[open + close + 1..];
        match tag.rsplit(':').next().unwrap_or_default() {
            "/string" | "/int" | "/i4" | "/boolean" => {
                found.push(std::mem::take(&mut data));
                in_value = false;
            }
            "/value" => {
                if in_value {
                    found.push(std::mem::take(&mut data));
                }
                in_value = false;
            }
            other if other.starts_with(['/', '?', '!']) => {}
            other => {
                data.clear();
                in_value = other == "value";
            }
        }
    }
    found
}

fn authenticate(state: &State, request: &Request) -> Answer {
    let Ok(body) = serde_json::from_slice::<Value>(&request.body) else {
        return text(400, "text/plain", "bad request");
    };
    let params = &body["params"];
    let name = params["db"].as_str().unwrap_or_default().to_owned();
    let right = (params["login"].as_str(), params["password"].as_str()) == (Some(USER.0), Some(USER.1));
    if !right || !databases(state).contains(&&name) {
        return answer_json(&json!({ "jsonrpc": "2.0", "error": { "code": 200, "message": "Access Denied" } }));
    }
    let result = json!({ "jsonrpc": "2.0", "result": { "uid": 2, "db": name, "note": secret(&name) } });
    let id =
        state.sessions.rotate(session_id(request).as_deref(), Session { database: Some(name), is_logged_in: true });
    answer_json(&result).with("Set-Cookie", set_cookie(&id))
}

/// `ensure_db`: the database that a page is asked for, in its query or its form, becomes the session's.
fn ensured(state: &State, request: &Request) -> Option<String> {
    let form = form(&request.body);
    let asked = form.get("db").or(request.query.get("db")).filter(|name| databases(state).contains(name));
    let of_host = state.options.databases.get(host(request));
    let asked = asked.filter(|name| !state.options.dbfilter || of_host.is_none_or(|of_host| of_host == *name));
    asked.cloned().or_else(|| database(state, request))
}

fn login(state: &State, request: &Request) -> Answer {
    let Some(database) = ensured(state, request) else {
        return text(303, "text/html", "").with("Location", "/web/database/selector");
    };
    let form = form(&request.body);
    let given = (form.get("login").map(String::as_str), form.get("password").map(String::as_str));
    let old = session_id(request);
    if given == (Some(USER.0), Some(USER.1)) {
        let id = state.sessions.rotate(old.as_deref(), Session { database: Some(database), is_logged_in: true });
        return text(303, "text/html", "").with("Location", "/odoo").with("Set-Cookie", set_cookie(&id));
    }
    let wrong =
        if form.contains_key("login") { "<p class=\"alert alert-danger\">Wrong login/password</p>" } else { "" };
    text(200, "text/html", format!("<form>{wrong}log in to {database}</form>"))
}

fn home(state: &State, request: &Request) -> Answer {
    let database = ensured(state, request);
    let session = session_id(request).and_then(|id| state.sessions.get(&id)).unwrap_or_default();
    match database {
        Some(database) if session.is_logged_in && session.database.as_ref() == Some(&database) => {
            text(200, "text/html", format!("<h1>{}</h1>", secret(&database)))
        }
        _ => text(303, "text/html", "").with("Location", "/web/login"),
    }
}
