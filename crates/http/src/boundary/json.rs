//! Calls and logins in JSON. Read to the end, because the last of two equal keys counts for Odoo; here two are an error.

use std::fmt;
use std::io::{BufReader, Read};

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::Value;

use super::Denied;

#[derive(Deserialize)]
struct Call {
    params: CallParams,
}

#[derive(Deserialize)]
struct CallParams {
    service: String,
    method: Option<String>,
    args: Arguments,
}

#[derive(Deserialize)]
struct Login {
    params: LoginParams,
}

#[derive(Deserialize)]
struct LoginParams {
    db: Option<String>,
    login: Option<String>,
}

/// An answer to a login.
#[derive(Deserialize)]
struct Answer {
    result: Option<Value>,
    error: Option<IgnoredAny>,
}

/// What an identity provider sends back: `d` is the database.
#[derive(Deserialize)]
struct OauthState {
    d: Option<String>,
}

/// The first two arguments of a call; the others may be anything.
struct Arguments(Option<First>, Option<String>);

/// The second argument, if it is text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Second {
    Text(String),
    Other(IgnoredAny),
}

enum First {
    Text(String),
    Other,
}

/// Gives the login that is tried, if the call is one that does.
pub(super) fn check_call(body: impl Read, database: Option<&str>) -> Result<Option<String>, Denied> {
    let call: Call = serde_json::from_reader(BufReader::new(body))
        .map_err(|_| Denied::Unreadable("it is no JSON-RPC call with `service` and `args`, each once"))?;
    if !matches!(call.params.service.as_str(), "common" | "object") {
        return Err(Denied::Service);
    }
    match call.params.args.0 {
        Some(First::Text(name)) if Some(name.as_str()) == database => {}
        None => {}
        Some(_) => return Err(Denied::Database),
    }
    let logs_in = call.params.service == "common" && call.params.method.as_deref().is_some_and(is_login);
    Ok(call.params.args.1.filter(|_| logs_in))
}

/// Whether a method of the service `common` tries a password.
pub(super) fn is_login(method: &str) -> bool {
    matches!(method, "login" | "authenticate")
}

/// Whether an answer in JSON says that a login was right.
pub(super) fn verdict(body: &[u8]) -> Option<bool> {
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let uid = match &answer.result {
        Some(Value::Object(result)) => result.get("uid").cloned().unwrap_or(Value::Bool(true)),
        Some(other) => other.clone(),
        None => Value::Null,
    };
    Some(answer.error.is_none() && !matches!(uid, Value::Null | Value::Bool(false)))
}

/// Gives the login that is tried.
pub(super) fn check_login(body: impl Read, database: Option<&str>) -> Result<String, Denied> {
    let login: Login = serde_json::from_reader(BufReader::new(body))
        .map_err(|_| Denied::Unreadable("it is no JSON-RPC call with `db`, once"))?;
    match login.params.db {
        Some(name) if Some(name.as_str()) != database => Err(Denied::Database),
        _ => Ok(login.params.login.unwrap_or_default()),
    }
}

pub(super) fn check_oauth_state(text: &str, database: Option<&str>) -> Result<(), Denied> {
    let state: OauthState =
        serde_json::from_str(text).map_err(|_| Denied::Unreadable("its `state` is no JSON with `d` once"))?;
    match state.d {
        Some(name) if Some(name.as_str()) != database => Err(Denied::Database),
        _ => Ok(()),
    }
}

impl<'de> Deserialize<'de> for Arguments {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Arguments;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of arguments")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Arguments, A::Error> {
                let first = list.next_element()?;
                let second = if first.is_some() { list.next_element::<Second>()? } else { None };
                while list.next_element::<IgnoredAny>()?.is_some() {}
                let second = match second {
                    Some(Second::Text(text)) => Some(text),
                    Some(Second::Other(IgnoredAny)) | None => None,
                };
                Ok(Arguments(first, second))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

impl<'de> Deserialize<'de> for First {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl Visitor<'_> for Any {
            type Value = First;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an argument")
            }

            fn visit_str<E>(self, text: &str) -> Result<First, E> {
                Ok(First::Text(text.to_owned()))
            }

            fn visit_bool<E>(self, _: bool) -> Result<First, E> {
                Ok(First::Other)
            }

            fn visit_i64<E>(self, _: i64) -> Result<First, E> {
                Ok(First::Other)
            }

            fn visit_u64<E>(self, _: u64) -> Result<First, E> {
                Ok(First::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<First, E> {
                Ok(First::Other)
            }

            fn visit_unit<E>(self) -> Result<First, E> {
                Ok(First::Other)
            }
        }
        // A list or an object in this place is no argument that Odoo would take for a database; it is unreadable.
        deserializer.deserialize_any(Any)
    }
}
