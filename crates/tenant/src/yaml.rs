//! YAML with positions, decoded through serde so that *every* error is found, not only the first.
//!
//! serde stops at its first error. So decoding runs again: the fault is noted with its position, the node it was
//! found in is blotted out, and the document is decoded once more, until nothing new turns up. The cost is paid only
//! by documents that are wrong. Missing fields are found by walking the type's JSON Schema instead, because serde
//! would name only the first.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use granit_parser::{Event, Parser, ScalarStyle};
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Visitor};
use serde_json::Value as Json;

use crate::diagnostic::{Diagnostic, closest};

/// More nodes than this, aliases counted as often as they are used, is not a configuration but an attack.
const MAX_NODES: usize = 200_000;
const MAX_DEPTH: usize = 32;

/// A position in a document: line and column, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

/// A YAML node and where it stands.
#[derive(Debug, Clone)]
pub struct Node {
    /// Where the node begins.
    pub at: Position,
    value: Value,
}

#[derive(Debug, Clone)]
enum Value {
    Scalar {
        text: String,
        plain: bool,
    },
    Sequence(Vec<Node>),
    Mapping(Vec<(Key, Node)>),
    /// Had a fault that has been reported; skipped from then on.
    Blotted,
}

#[derive(Debug, Clone)]
struct Key {
    at: Position,
    text: String,
}

impl Node {
    /// Parses one document. An empty document is an empty mapping.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Diagnostic> {
        Composer { file, events: Parser::new_from_str(text), anchors: HashMap::new(), nodes: 0 }.document()
    }

    /// Decodes into `T`, pushing everything that is wrong to `faults`; `None` if anything was.
    ///
    /// `schema` is the JSON Schema of `T`, from which missing fields are found.
    pub fn decode<T: DeserializeOwned>(&self, file: &Path, schema: &Json, faults: &mut Vec<Diagnostic>) -> Option<T> {
        let before = faults.len();
        let mut root = self.clone();
        let mut whole = true;
        let mut missing = None;
        loop {
            match T::deserialize(NodeDeserializer(&root)) {
                Ok(value) if whole => return Some(value),
                Ok(_) => break,
                Err(fault) => {
                    whole = false;
                    let path = fault.path();
                    if fault.kind == FaultKind::Missing {
                        missing.get_or_insert_with(|| fault.into_diagnostic(file, &root, &path));
                    } else {
                        faults.push(fault.into_diagnostic(file, &root, &path));
                    }
                    if !root.blot(&path) {
                        break;
                    }
                }
            }
        }
        self.missing_fields(file, schema, schema, &mut Vec::new(), faults);
        if faults.len() == before {
            // The schema should have told; what serde said is the next best.
            faults.extend(missing);
        }
        None
    }

    /// Where the node at a path of keys stands: of the deepest one that exists.
    pub fn locate(&self, path: &[&str]) -> Position {
        let mut node = self;
        let mut at = self.at;
        for step in path {
            let next = match &node.value {
                Value::Mapping(entries) => entries.iter().find(|(k, _)| k.text == *step).map(|(_, n)| n),
                Value::Sequence(items) => step.parse::<usize>().ok().and_then(|i| items.get(i)),
                _ => None,
            };
            let Some(next) = next else { return at };
            at = next.at;
            node = next;
        }
        at
    }

    fn missing_fields(
        &self,
        file: &Path,
        schema: &Json,
        root: &Json,
        path: &mut Vec<Segment>,
        faults: &mut Vec<Diagnostic>,
    ) {
        let schema = resolve(schema, root);
        match &self.value {
            Value::Mapping(entries) => {
                let properties = schema.get("properties").and_then(Json::as_object);
                for required in schema.get("required").and_then(Json::as_array).into_iter().flatten() {
                    let Some(name) = required.as_str() else { continue };
                    if entries.iter().any(|(k, _)| k.text == name) {
                        continue;
                    }
                    path.push(Segment::Key(name.to_owned()));
                    let what = properties
                        .and_then(|p| p.get(name))
                        .and_then(|s| resolve(s, root).get("description"))
                        .and_then(Json::as_str)
                        .map_or_else(|| "this field".to_owned(), |d| d.lines().next().unwrap_or(d).to_owned());
                    faults.push(self.fault(file, path, "nothing", &format!("the required field `{name}`: {what}")));
                    path.pop();
                }
                for (key, node) in entries {
                    let inner = properties
                        .and_then(|p| p.get(&key.text))
                        .or_else(|| schema.get("additionalProperties").filter(|s| s.is_object()))
                        // A map whose keys have a pattern of their own.
                        .or_else(|| schema.get("patternProperties")?.as_object()?.values().next());
                    if let Some(inner) = inner {
                        path.push(Segment::Key(key.text.clone()));
                        node.missing_fields(file, inner, root, path, faults);
                        path.pop();
                    }
                }
            }
            Value::Sequence(items) => {
                if let Some(inner) = schema.get("items") {
                    for (i, node) in items.iter().enumerate() {
                        path.push(Segment::Index(i));
                        node.missing_fields(file, inner, root, path, faults);
                        path.pop();
                    }
                }
            }
            _ => {}
        }
    }

    fn fault(&self, file: &Path, path: &[Segment], found: &str, expected: &str) -> Diagnostic {
        Diagnostic {
            file: file.to_owned(),
            line: self.at.line,
            column: self.at.column,
            field: dotted(path),
            found: found.to_owned(),
            expected: expected.to_owned(),
        }
    }

    /// Blots out the node at `path`; false when that is the root, after which there is nothing left to decode.
    fn blot(&mut self, path: &[Segment]) -> bool {
        if path.is_empty() {
            return false;
        }
        let mut node = self;
        for segment in path {
            let next = match (&mut node.value, segment) {
                (Value::Mapping(entries), Segment::Key(key)) => {
                    entries.iter_mut().find(|(k, n)| k.text == *key && !n.is_blotted()).map(|(_, n)| n)
                }
                (Value::Sequence(items), Segment::Index(i)) => items.get_mut(*i),
                _ => None,
            };
            let Some(next) = next else { return false };
            node = next;
        }
        node.value = Value::Blotted;
        true
    }

    fn is_blotted(&self) -> bool {
        matches!(self.value, Value::Blotted)
    }

    fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null"))
    }

    fn describe(&self) -> String {
        match &self.value {
            Value::Scalar { text, .. } if self.is_null() && text.is_empty() => "nothing".to_owned(),
            Value::Scalar { text, .. } => quoted(text),
            Value::Sequence(items) => format!("a list of {}", items.len()),
            Value::Mapping(_) => "a mapping".to_owned(),
            Value::Blotted => "a value with an error".to_owned(),
        }
    }
}

fn resolve<'a>(schema: &'a Json, root: &'a Json) -> &'a Json {
    if let Some(reference) = schema.get("$ref").and_then(Json::as_str) {
        return root.pointer(reference.trim_start_matches('#')).unwrap_or(schema);
    }
    // `Option<T>` of a referenced type is written as anyOf [T, null].
    if let Some(options) = schema.get("anyOf").and_then(Json::as_array)
        && let Some(first) = options.iter().find(|o| o.get("$ref").is_some())
    {
        return resolve(first, root);
    }
    schema
}

fn quoted(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut short: String = text.chars().take(SHOWN).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().count() > SHOWN {
        short.push('…');
    }
    format!("`{short}`")
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Key(String),
    Index(usize),
}

fn dotted(path: &[Segment]) -> String {
    let mut out = String::new();
    for segment in path {
        match segment {
            Segment::Key(key) => {
                if !out.is_empty() {
                    out.push('.');
                }
                out.push_str(key);
            }
            Segment::Index(i) => out.push_str(&format!("[{i}]")),
        }
    }
    out
}

/// Builds the tree from the parser's events.
struct Composer<'a> {
    file: &'a Path,
    events: Parser<'a, granit_parser::StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl Composer<'_> {
    fn document(mut self) -> Result<Node, Diagnostic> {
        let mut root = None;
        while let Some((event, at)) = self.next()? {
            match event {
                Event::DocumentStart(..) if root.is_some() => {
                    return Err(self.error(at, "a second document", "one document per file"));
                }
                Event::StreamStart
                | Event::StreamEnd
                | Event::DocumentStart(..)
                | Event::DocumentEnd
                | Event::Comment(..) => {}
                event => root = Some(self.node(event, at, 0)?),
            }
        }
        let empty = |at| Node { at, value: Value::Mapping(Vec::new()) };
        Ok(match root {
            Some(node) if node.is_null() => empty(node.at),
            Some(node) => node,
            None => empty(Position { line: 1, column: 1 }),
        })
    }

    fn node(&mut self, event: Event<'_>, at: Position, depth: usize) -> Result<Node, Diagnostic> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(self.error(at, &format!("more than {MAX_NODES} values"), "a smaller document"));
        }
        if depth > MAX_DEPTH {
            return Err(self.error(at, &format!("nesting deeper than {MAX_DEPTH}"), "a flatter document"));
        }
        let (anchor, value) = match event {
            Event::Scalar(text, style, anchor, _) => {
                (anchor, Value::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain })
            }
            Event::SequenceStart(_, anchor, _) => (anchor, self.sequence(depth)?),
            Event::MappingStart(_, anchor, _) => (anchor, self.mapping(depth)?),
            Event::Alias(id) => {
                let Some(target) = self.anchors.get(&id).cloned() else {
                    return Err(self.error(
                        at,
                        "an alias to an anchor that contains it",
                        "an alias to an earlier value",
                    ));
                };
                self.nodes += target.size();
                // The alias' own place is where a reader would look for it.
                return Ok(Node { at, value: target.value });
            }
            _ => return Err(self.error(at, "something that is not a value", "a scalar, a list or a mapping")),
        };
        let node = Node { at, value };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn sequence(&mut self, depth: usize) -> Result<Value, Diagnostic> {
        let mut items = Vec::new();
        while let Some((event, at)) = self.next()? {
            match event {
                Event::SequenceEnd => break,
                Event::Comment(..) => {}
                event => items.push(self.node(event, at, depth + 1)?),
            }
        }
        Ok(Value::Sequence(items))
    }

    fn mapping(&mut self, depth: usize) -> Result<Value, Diagnostic> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        while let Some((event, at)) = self.next()? {
            let key = match event {
                Event::MappingEnd => break,
                Event::Comment(..) => continue,
                Event::Scalar(text, ..) => Key { at, text: text.into_owned() },
                _ => return Err(self.error(at, "a list or mapping as a key", "a plain key such as `hosts:`")),
            };
            if let Some((first, _)) = entries.iter().find(|(k, _)| k.text == key.text) {
                let found = format!("the key {} again (first on line {})", quoted(&key.text), first.at.line);
                return Err(self.error(at, &found, "each key once"));
            }
            let value = loop {
                match self.next()? {
                    Some((Event::Comment(..), _)) => {}
                    Some((event, at)) => break self.node(event, at, depth + 1)?,
                    None => return Err(self.error(at, "the end of the file", "a value")),
                }
            };
            entries.push((key, value));
        }
        Ok(Value::Mapping(entries))
    }

    fn next(&mut self) -> Result<Option<(Event<'static>, Position)>, Diagnostic> {
        match self.events.next() {
            None => Ok(None),
            Some(Ok((event, span))) => {
                let at = Position { line: span.start.line().max(1), column: span.start.col() + 1 };
                Ok(Some((into_static(event), at)))
            }
            Some(Err(error)) => {
                let at = Position { line: error.marker().line().max(1), column: error.marker().col() + 1 };
                Err(self.error(at, &format!("text that is not YAML ({})", error.info()), "valid YAML"))
            }
        }
    }

    fn error(&self, at: Position, found: &str, expected: &str) -> Diagnostic {
        Diagnostic {
            file: self.file.to_owned(),
            line: at.line,
            column: at.column,
            field: String::new(),
            found: found.to_owned(),
            expected: expected.to_owned(),
        }
    }
}

fn into_static(event: Event<'_>) -> Event<'static> {
    match event {
        Event::Scalar(text, style, anchor, _) => Event::Scalar(Cow::Owned(text.into_owned()), style, anchor, None),
        Event::SequenceStart(style, anchor, _) => Event::SequenceStart(style, anchor, None),
        Event::MappingStart(style, anchor, _) => Event::MappingStart(style, anchor, None),
        Event::SequenceEnd => Event::SequenceEnd,
        Event::MappingEnd => Event::MappingEnd,
        Event::Alias(id) => Event::Alias(id),
        Event::DocumentStart(explicit, version) => Event::DocumentStart(explicit, version),
        Event::DocumentEnd => Event::DocumentEnd,
        Event::StreamStart => Event::StreamStart,
        Event::StreamEnd => Event::StreamEnd,
        Event::Comment(_, placement) => Event::Comment(Cow::Borrowed(""), placement),
        _ => Event::Comment(Cow::Borrowed(""), granit_parser::Placement::Above),
    }
}

impl Node {
    fn size(&self) -> usize {
        match &self.value {
            Value::Sequence(items) => 1 + items.iter().map(Node::size).sum::<usize>(),
            Value::Mapping(entries) => 1 + entries.iter().map(|(_, n)| n.size()).sum::<usize>(),
            _ => 1,
        }
    }
}

/// What serde had to say, with the path at which it said it.
#[derive(Debug)]
struct Fault {
    kind: FaultKind,
    found: Option<String>,
    expected: String,
    /// Innermost segment first: it grows while the error travels outwards.
    reversed: Vec<Segment>,
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum FaultKind {
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

    fn path(&self) -> Vec<Segment> {
        self.reversed.iter().rev().cloned().collect()
    }

    fn into_diagnostic(self, file: &Path, root: &Node, path: &[Segment]) -> Diagnostic {
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
            found: self.found.unwrap_or_else(|| node.describe()),
            expected: self.expected,
        }
    }
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
struct NodeDeserializer<'a>(&'a Node);

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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use schemars::JsonSchema;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Outer {
        name: String,
        count: u16,
        inner: Option<Inner>,
        #[serde(default)]
        list: Vec<u8>,
    }

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        flag: bool,
        other: String,
    }

    fn faults(text: &str) -> Vec<String> {
        let file = Path::new("f.yaml");
        let schema = serde_json::to_value(schemars::schema_for!(Outer)).unwrap();
        let node = match Node::parse(file, text) {
            Ok(node) => node,
            Err(d) => return vec![d.to_string()],
        };
        let mut out = Vec::new();
        let value: Option<Outer> = node.decode(file, &schema, &mut out);
        assert_eq!(value.is_some(), out.is_empty());
        out.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_error_of_a_document_is_reported_with_its_place() {
        let found = faults("count: many\nlist: [1, two, 300]\ninner:\n  flag: maybe\n  flagg: true\n");
        let all = found.join("\n");
        assert_eq!(found.len(), 7, "{all}");
        assert!(all.contains("f.yaml:1:8: count: found `many`"), "{all}");
        assert!(all.contains("f.yaml:2:11: list[1]: found `two`"), "{all}");
        assert!(all.contains("f.yaml:2:16: list[2]: found `300`"), "{all}");
        assert!(all.contains("f.yaml:4:9: inner.flag: found `maybe`, expected `true` or `false`"), "{all}");
        assert!(all.contains("f.yaml:5:3: inner.flagg: found the unknown field `flagg`"), "{all}");
        assert!(all.contains("the required field `name`"), "{all}");
        assert!(all.contains("the required field `other`"), "{all}");
    }

    #[test]
    fn aliases_work_and_cannot_explode() {
        assert!(faults("name: &n x\ncount: 1\ninner: {flag: true, other: *n}\n").is_empty());
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..9 {
            let list = vec![format!("*a{}", i - 1); 10].join(",");
            bomb.push_str(&format!("a{i}: &a{i} [{list}]\n"));
        }
        assert!(faults(&bomb)[0].contains("more than"));
    }

    #[test]
    fn duplicate_keys_and_second_documents_are_refused() {
        assert!(faults("name: a\nname: b\n")[0].contains("first on line 1"));
        assert!(faults("name: a\n---\nname: b\n")[0].contains("second document"));
        assert!(faults("name: [a\n")[0].contains("not YAML"));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "[ a-z0-9:\\-\\[\\]{},&*!|>'\"#\\n\\t]{0,80}") {
            let _ = faults(&text);
        }
    }
}
