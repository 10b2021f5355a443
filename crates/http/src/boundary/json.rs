//! Calls and logins in JSON. Read to the end, because the last of two equal keys counts for Odoo; here two are an error.

use std::fmt;
use std::io::{BufReader, Read};

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};

use super::Denied;

#[derive(Deserialize)]
struct Call {
    params: CallParams,
}

#[derive(Deserialize)]
struct CallParams {
    service: String,
    args: Arguments,
}

#[derive(Deserialize)]
struct Login {
    params: LoginParams,
}

#[derive(Deserialize)]
struct LoginParams {
    db: Option<String>,
}

/// What an identity provider sends back: `d` is the database.
#[derive(Deserialize)]
struct OauthState {
    d: Option<String>,
}

/// The first argument of a call; the others may be anything.
struct Arguments(Option<First>);

enum First {
    Text(String),
    Other,
}

pub(super) fn check_call(body: impl Read, database: Option<&str>) -> Result<(), Denied> {
    let call: Call = serde_json::from_reader(BufReader::new(body))
        .map_err(|_| Denied::Unreadable("it is no JSON-RPC call with `service` and `args`, each once"))?;
    if !matches!(call.params.service.as_str(), "common" | "object") {
        return Err(Denied::Service);
    }
    match call.params.args.0 {
        None => Ok(()),
        Some(First::Text(name)) if Some(name.as_str()) == database => Ok(()),
        Some(_) => Err(Denied::Database),
    }
}

pub(super) fn check_login(body: impl Read, database: Option<&str>) -> Result<(), Denied> {
    let login: Login = serde_json::from_reader(BufReader::new(body))
        .map_err(|_| Denied::Unreadable("it is no JSON-RPC call with `db`, once"))?;
    match login.params.db {
        Some(name) if Some(name.as_str()) != database => Err(Denied::Database),
        _ => Ok(()),
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
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Arguments(first))
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
