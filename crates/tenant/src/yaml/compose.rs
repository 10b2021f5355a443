//! From YAML text to a tree of nodes that know where they stand.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use granit_parser::{Event, Parser, ScalarStyle};

use super::{Key, Node, Position, Value, quoted};
use crate::diagnostic::Diagnostic;

/// More nodes than this, aliases counted as often as they are used, is not a configuration but an attack.
const MAX_NODES: usize = 200_000;
const MAX_DEPTH: usize = 32;

/// Builds the tree from the parser's events.
pub(super) struct Composer<'a> {
    file: &'a Path,
    events: Parser<'a, granit_parser::StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl<'a> Composer<'a> {
    pub(super) fn new(file: &'a Path, text: &'a str) -> Self {
        Self { file, events: Parser::new_from_str(text), anchors: HashMap::new(), nodes: 0 }
    }

    pub(super) fn document(mut self) -> Result<Node, Diagnostic> {
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
