//! YAML with positions, decoded through serde so that *every* error is found, not only the first.
//!
//! serde stops at its first error. So decoding runs again: the fault is noted with its position, the node it was
//! found in is blotted out, and the document is decoded once more, until nothing new turns up. The cost is paid only
//! by documents that are wrong. Missing fields are found by walking the type's JSON Schema instead, because serde
//! would name only the first.

mod compose;
mod decode;
mod reader;

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::diagnostic::Diagnostic;
use compose::Composer;
use decode::{FaultKind, NodeDeserializer};
pub use reader::Reader;

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
        Composer::new(file, text).document()
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

    /// What it is, without what it says.
    fn kind(&self) -> String {
        match &self.value {
            Value::Scalar { .. } if !self.is_null() => "a value (not shown here)".to_owned(),
            _ => self.describe(),
        }
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
