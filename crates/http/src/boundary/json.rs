//! Calls and logins in JSON. Read to the end, because the last of two equal keys counts for Odoo; here two are an error.

use std::fmt;
use std::io::{BufReader, Read};

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::{Attempt, Denied, ToldBy};

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

/// The second argument, if it is text or a number: who somebody is.
struct Second(String);

enum First {
    Text(String),
    Other,
}

/// Gives the login that is tried, if the call is one that does.
pub(super) fn check_call(body: impl Read, database: Option<&str>) -> Result<Option<Attempt>, Denied> {
    let call: Call = serde_json::from_reader(BufReader::new(body))
        .map_err(|_| Denied::Unreadable("it is no JSON-RPC call with `service` and `args`, each once"))?;
    if !matches!(call.params.service.as_str(), "common" | "object") {
        return Err(Denied::Service);
    }
    let has_arguments = call.params.args.0.is_some();
    match call.params.args.0 {
        Some(First::Text(name)) if Some(name.as_str()) == database => {}
        None => {}
        Some(_) => return Err(Denied::Database),
    }
    // Whatever is called of `common` with a database tries a password, and each call of an `object` brings one.
    let told_by = if call.params.service == "common" { ToldBy::Json } else { ToldBy::Refusal };
    Ok(has_arguments.then(|| Attempt { login: call.params.args.1.unwrap_or_default(), told_by }))
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
                Ok(Arguments(first, second.map(|second| second.0)))
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
                // No database has a longer name.
                Ok(if text.len() <= LONGEST { First::Text(text.to_owned()) } else { First::Other })
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

/// Bytes of an argument that are kept.
const LONGEST: usize = 256;

impl<'de> Deserialize<'de> for Second {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Second;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an argument")
            }

            fn visit_str<E>(self, text: &str) -> Result<Second, E> {
                Ok(Second(text.chars().take(LONGEST).collect()))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Second, E> {
                Ok(Second(String::new()))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Second, E> {
                Ok(Second(number.to_string()))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Second, E> {
                Ok(Second(number.to_string()))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Second, E> {
                Ok(Second(String::new()))
            }

            fn visit_unit<E>(self) -> Result<Second, E> {
                Ok(Second(String::new()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Second, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Second(String::new()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Second, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Second(String::new()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// A body in JSON on a route that has nothing to do with databases, by its name: it is a remote call all the same if its
/// `params` have a `service`, and then its first argument, or `db`, must be the tenant's.
pub(super) fn check_other(body: impl Read, database: Option<&str>) -> Result<(), Denied> {
    let mut found = Found::default();
    let mut reader = serde_json::Deserializer::from_reader(BufReader::new(body));
    let whole = Seek { depth: 0, database, found: &mut found };
    let read = serde::de::DeserializeSeed::deserialize(whole, &mut reader).and_then(|()| reader.end());
    if read.is_err() {
        return Err(Denied::Unreadable("it is no JSON"));
    }
    if found.foreign_db || found.service && found.foreign_argument {
        return Err(Denied::Database);
    }
    if found.foreign_service { Err(Denied::Service) } else { Ok(()) }
}

/// What there is in any of the `params` of a body, for of two equal keys either may count.
#[derive(Default)]
struct Found {
    service: bool,
    foreign_service: bool,
    foreign_argument: bool,
    foreign_db: bool,
}

/// Looks through a value: the whole at depth 0, `params` at 1, what is in it at 2 and 3.
struct Seek<'a> {
    depth: u8,
    database: Option<&'a str>,
    found: &'a mut Found,
}

impl<'de> serde::de::DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// The keys that count, read without keeping any.
enum Name {
    Params,
    Service,
    Args,
    Db,
    Other,
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl Visitor<'_> for Any {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E>(self, name: &str) -> Result<Name, E> {
                Ok(match name {
                    "params" => Name::Params,
                    "service" => Name::Service,
                    "args" => Name::Args,
                    "db" => Name::Db,
                    _ => Name::Other,
                })
            }
        }
        deserializer.deserialize_str(Any)
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (database, depth) = (self.database, self.depth);
        while let Some(name) = map.next_key::<Name>()? {
            match (depth, name) {
                (0, Name::Params) => map.next_value_seed(Seek { depth: 1, database, found: &mut *self.found })?,
                (1, Name::Service) => match map.next_value::<Second>()?.0.as_str() {
                    "object" | "common" => self.found.service = true,
                    "db" => (self.found.service, self.found.foreign_service) = (true, true),
                    _ => {}
                },
                (1, Name::Args) => map.next_value_seed(Seek { depth: 2, database, found: &mut *self.found })?,
                (1, Name::Db) => {
                    let name = map.next_value::<Second>()?.0;
                    self.found.foreign_db |= !name.is_empty() && Some(name.as_str()) != database;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        if self.depth == 2
            && let Some(first) = list.next_element::<Second>()?
        {
            self.found.foreign_argument |= Some(first.0.as_str()) != self.database;
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}
