//! A serde deserializer over the tree that knows where each fault was found.

use std::fmt;
use std::path::Path;

use serde::de::{self, DeserializeSeed, IntoDeserializer, Visitor};

use super::{Key, Node, Segment, Value, dotted, quoted};
use crate::diagnostic::{Diagnostic, closest};

/// What serde had to say, with the path at which it said it.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) kind: FaultKind,
    found: Option<String>,
    expected: String,
    /// Innermost segment first: it grows while the error travels outwards.
    reversed: Vec<Segment>,
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(super) enum FaultKind {
    Value,
    UnknownField,
    Missing,
}

impl Fault {
    fn new(kind: FaultKind, found: Option<String>, expected: impl Into<String>) -> Self {
        Self { kind, found, expected: expected.into(), reversed: Vec::new() }
    }

    fn within(mut self, segment: Segment) -> Self {
        self.reversed.push(segment);
        self
    }

    pub(super) fn path(&self) -> Vec<Segment> {
        self.reversed.iter().rev().cloned().collect()
    }

    pub(super) fn into_diagnostic(self, file: &Path, root: &Node, path: &[Segment]) -> Diagnostic {
        let mut node = root;
        let mut key_at = None;
        for segment in path {
            match (&node.value, segment) {
                (Value::Mapping(entries), Segment::Key(key)) => {
                    if let Some((k, n)) = entries.iter().find(|(k, _)| k.text == *key) {
                        key_at = Some(k.at);
                        node = n;
                    }
                }
                (Value::Sequence(items), Segment::Index(i)) => node = items.get(*i).unwrap_or(node),
                _ => {}
            }
        }
        let at = if self.kind == FaultKind::UnknownField { key_at.unwrap_or(node.at) } else { node.at };
        Diagnostic {
            file: file.to_owned(),
            line: at.line,
            column: at.column,
            field: dotted(path),
            found: self.found.unwrap_or_else(|| if may_be_secret(path) { node.kind() } else { node.describe() }),
            expected: self.expected,
        }
    }
}

/// What stands where logins and tokens do is not repeated in messages.
fn may_be_secret(path: &[Segment]) -> bool {
    path.iter().any(|s| matches!(s, Segment::Key(k) if matches!(k.as_str(), "login" | "admin" | "password" | "token")))
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected {}", self.expected)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(FaultKind::Value, None, message.to_string())
    }
    fn invalid_type(_: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new(FaultKind::Value, None, expected.to_string())
    }
    fn invalid_value(_: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new(FaultKind::Value, None, expected.to_string())
    }
    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::new(FaultKind::Value, None, crate::diagnostic::one_of("one of", variant, expected.iter().copied()))
    }
    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let mut text = if expected.is_empty() {
            "no fields here".to_owned()
        } else {
            format!("one of the fields `{}`", expected.join("`, `"))
        };
        if let Some(near) = closest(field, expected.iter().copied()) {
            text.push_str(&format!(" (did you mean `{near}`?)"));
        }
        Self::new(FaultKind::UnknownField, Some(format!("the unknown field {}", quoted(field))), text)
    }
    fn missing_field(field: &'static str) -> Self {
        Self::new(FaultKind::Missing, None, field)
    }
}

#[derive(Clone, Copy)]
pub(super) struct NodeDeserializer<'a>(pub(super) &'a Node);

impl NodeDeserializer<'_> {
    fn wrong(expected: &dyn fmt::Display) -> Fault {
        Fault::new(FaultKind::Value, None, expected.to_string())
    }

    fn number<T: std::str::FromStr>(self, what: &str) -> Result<T, Fault> {
        match &self.0.value {
            Value::Scalar { text, plain: true } => text.replace('_', "").parse().map_err(|_| Self::wrong(&what)),
            _ => Err(Self::wrong(&what)),
        }
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty, $what:literal;)*) => {
        $(fn $method<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
            visitor.$visit(self.number::<$type>($what)?)
        })*
    };
}

impl<'a> de::Deserializer<'a> for NodeDeserializer<'a> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.value {
            _ if self.0.is_null() => visitor.visit_unit(),
            Value::Scalar { text, .. } => visitor.visit_borrowed_str(text),
            Value::Sequence(_) => self.deserialize_seq(visitor),
            Value::Mapping(_) => self.deserialize_map(visitor),
            Value::Blotted => Err(Self::wrong(&"a value")),
        }
    }

    fn deserialize_bool<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Scalar { text, plain: true } if text == "true" => visitor.visit_bool(true),
            Value::Scalar { text, plain: true } if text == "false" => visitor.visit_bool(false),
            _ => Err(Self::wrong(&"`true` or `false`")),
        }
    }

    numbers! {
        deserialize_u8 visit_u8 u8, "a whole number from 0 to 255";
        deserialize_u16 visit_u16 u16, "a whole number from 0 to 65535";
        deserialize_u32 visit_u32 u32, "a whole number from 0 to 4294967295";
        deserialize_u64 visit_u64 u64, "a whole number from 0 up";
        deserialize_i8 visit_i8 i8, "a whole number from -128 to 127";
        deserialize_i16 visit_i16 i16, "a whole number from -32768 to 32767";
        deserialize_i32 visit_i32 i32, "a whole number";
        deserialize_i64 visit_i64 i64, "a whole number";
        deserialize_f32 visit_f32 f32, "a number";
        deserialize_f64 visit_f64 f64, "a number";
    }

    fn deserialize_str<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Scalar { text, .. } if !self.0.is_null() => visitor.visit_borrowed_str(text),
            _ => {
                // Let the visitor say what it wanted: it knows more than "a string".
                Err(Self::wrong(&Expecting(&visitor)))
            }
        }
    }

    fn deserialize_string<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_unit<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.0.is_null() { visitor.visit_unit() } else { Err(Self::wrong(&"nothing")) }
    }

    fn deserialize_newtype_struct<V: Visitor<'a>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Sequence(items) => visitor.visit_seq(Items { items, next: 0 }),
            _ => Err(Self::wrong(&"a list such as `[a, b]`")),
        }
    }

    fn deserialize_map<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Mapping(entries) => visitor.visit_map(Entries { entries, next: 0 }),
            // `plans: { standard: }` reads as a mapping with nothing in it.
            _ if self.0.is_null() => visitor.visit_map(Entries { entries: &[], next: 0 }),
            _ => Err(Self::wrong(&"a mapping (`key: value`)")),
        }
    }

    fn deserialize_struct<V: Visitor<'a>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'a>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.0.value {
            Value::Scalar { text, .. } => {
                visitor.visit_enum(IntoDeserializer::<Fault>::into_deserializer(text.as_str()))
            }
            _ => Err(Self::wrong(&format!("one of `{}`", variants.join("`, `")))),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        <V: Visitor<'a>>
        i128 u128 char bytes byte_buf unit_struct tuple tuple_struct identifier
    }
}

struct Expecting<'v, V>(&'v V);

impl<'a, V: Visitor<'a>> fmt::Display for Expecting<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }
}

struct Items<'a> {
    items: &'a [Node],
    next: usize,
}

impl<'a> de::SeqAccess<'a> for Items<'a> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'a>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        while let Some(node) = self.items.get(self.next) {
            let index = self.next;
            self.next += 1;
            if !node.is_blotted() {
                return seed.deserialize(NodeDeserializer(node)).map(Some).map_err(|f| f.within(Segment::Index(index)));
            }
        }
        Ok(None)
    }
}

struct Entries<'a> {
    entries: &'a [(Key, Node)],
    next: usize,
}

impl<'a> de::MapAccess<'a> for Entries<'a> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'a>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        while let Some((key, node)) = self.entries.get(self.next) {
            if node.is_blotted() {
                self.next += 1;
                continue;
            }
            let text: de::value::BorrowedStrDeserializer<'a, Fault> =
                de::value::BorrowedStrDeserializer::new(&key.text);
            return seed.deserialize(text).map(Some).map_err(|mut fault| {
                if fault.kind == FaultKind::Value {
                    fault.found = Some(format!("the key {}", quoted(&key.text)));
                    fault.kind = FaultKind::UnknownField;
                }
                fault.within(Segment::Key(key.text.clone()))
            });
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'a>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let Some((key, node)) = self.entries.get(self.next) else {
            return Err(NodeDeserializer::wrong(&"a value"));
        };
        self.next += 1;
        seed.deserialize(NodeDeserializer(node)).map_err(|f| f.within(Segment::Key(key.text.clone())))
    }
}
