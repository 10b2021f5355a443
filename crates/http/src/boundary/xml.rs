//! Calls in XML.
//!
//! Python's `xmlrpc.client` does not look where in the document a value stands: whatever ends with `</value>` first is the
//! first argument. So the beginning of a call has to have exactly the usual form up to the end of its first argument, and
//! nothing that could add a value, or text to one, may come before.

use std::borrow::Cow;
use std::io::Read;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::Denied;

/// The first argument must end within so many bytes: what comes before it is short.
const MOST_READ: u64 = 64 << 10;

const FORM: Denied = Denied::Unreadable("it is no XML-RPC call in its plain form");

/// Gives the login that is tried, if the call is one that does.
pub(super) fn check_call(body: impl Read, database: Option<&str>) -> Result<Option<String>, Denied> {
    let mut text = Vec::new();
    body.take(MOST_READ + 1).read_to_end(&mut text).map_err(|_| FORM)?;
    let whole = text.len() as u64 <= MOST_READ;
    text.truncate(MOST_READ as usize);
    let beginning = beginning(&text, whole)?;
    match beginning.first {
        Some(name) if Some(name.as_str()) != database => Err(Denied::Database),
        // The name of the method can be said again further on, so every call with a database counts.
        Some(_) => Ok(Some(beginning.second.unwrap_or_default())),
        None => Ok(None),
    }
}

/// A body on a route that has nothing to do with databases, by its name: it may be a call all the same.
pub(super) fn check_other(body: impl Read, database: Option<&str>) -> Result<(), Denied> {
    let mut text = Vec::new();
    body.take(MOST_READ).read_to_end(&mut text).map_err(|_| FORM)?;
    let has = |words: &[u8]| text.windows(words.len()).any(|w| w == words);
    if has(b"methodCall") || has(b"m\0e\0t\0h\0o\0d\0C\0a\0l\0l") {
        return check_call(&text[..], database).map(|_| ());
    }
    Ok(())
}

/// The beginning of a call.
struct Beginning {
    /// The text of the first argument; `None` when the call has no arguments at all.
    first: Option<String>,
    /// The text of the second, if it has the plain form too.
    second: Option<String>,
}

fn beginning(text: &[u8], whole: bool) -> Result<Beginning, Denied> {
    let mut call = Call { reader: Reader::from_reader(text), text, ahead: None, ascii_only: false };
    if let Event::Decl(declaration) = call.peek()? {
        let encoding = declaration.encoding().transpose().map_err(|_| FORM)?;
        let encoding = encoding.unwrap_or(Cow::Borrowed(b"utf-8")).to_ascii_lowercase();
        // What PHP and Perl send by themselves agrees with UTF-8 in ASCII.
        call.ascii_only = matches!(encoding.as_slice(), b"us-ascii" | b"iso-8859-1");
        if !call.ascii_only && encoding != b"utf-8" {
            return Err(Denied::Unreadable("its encoding is not UTF-8"));
        }
        call.ahead = None;
    }
    call.open(b"methodCall")?;
    call.open(b"methodName")?;
    call.text()?;
    call.close(b"methodName")?;
    if !call.open_unless_empty(b"params", b"methodCall")? {
        call.nothing_more(whole)?;
        return Ok(Beginning { first: None, second: None });
    }
    if !call.open_unless_empty(b"param", b"params")? {
        call.close(b"methodCall")?;
        call.nothing_more(whole)?;
        return Ok(Beginning { first: None, second: None });
    }
    let first = Some(argument(&mut call)?);
    let mut second = || {
        call.close(b"param").ok()?;
        call.open(b"param").ok()?;
        argument(&mut call).ok()
    };
    Ok(Beginning { first, second: second() })
}

/// The text of an argument.
fn argument(call: &mut Call<'_>) -> Result<String, Denied> {
    call.open(b"value")?;
    let name = match call.next()? {
        // `<value>text</value>`, or space before a typed value, which Python forgets as soon as a tag opens.
        Event::Text(name) => {
            let name = call.plain(&name)?;
            match call.next()? {
                Event::End(tag) if tag.name().as_ref() == b"value" => return Ok(name),
                Event::Start(tag) if name.trim().is_empty() && is(&tag, b"string") => call.text()?,
                _ => return Err(FORM),
            }
        }
        Event::Start(tag) if is(&tag, b"string") => call.text()?,
        Event::End(tag) if tag.name().as_ref() == b"value" => return Ok(String::new()),
        // An argument of another type cannot be a database's name.
        Event::Start(_) => return Err(Denied::Database),
        _ => return Err(FORM),
    };
    call.close(b"string")?;
    call.close(b"value")?;
    Ok(name)
}

struct Call<'a> {
    reader: Reader<&'a [u8]>,
    text: &'a [u8],
    ahead: Option<Event<'a>>,
    /// Whether only ASCII is certain to mean what it says.
    ascii_only: bool,
}

impl<'a> Call<'a> {
    fn next(&mut self) -> Result<Event<'a>, Denied> {
        match self.ahead.take() {
            Some(event) => Ok(event),
            None => self.reader.read_event().map_err(|_| FORM),
        }
    }

    fn peek(&mut self) -> Result<&Event<'a>, Denied> {
        let event = self.next()?;
        Ok(self.ahead.insert(event))
    }

    /// The next event that is no space.
    fn significant(&mut self) -> Result<Event<'a>, Denied> {
        loop {
            match self.next()? {
                Event::Text(text) if text.iter().all(u8::is_ascii_whitespace) => {}
                event => return Ok(event),
            }
        }
    }

    fn open(&mut self, name: &[u8]) -> Result<(), Denied> {
        match self.significant()? {
            Event::Start(tag) if is(&tag, name) => Ok(()),
            _ => Err(FORM),
        }
    }

    /// Opens an element; false when its parent has ended instead, without any.
    fn open_unless_empty(&mut self, name: &[u8], parent: &[u8]) -> Result<bool, Denied> {
        match self.significant()? {
            Event::Start(tag) if is(&tag, name) => Ok(true),
            Event::Empty(tag) if is(&tag, name) && name == b"params" => {
                self.close(parent)?;
                Ok(false)
            }
            Event::End(tag) if tag.name().as_ref() == parent => Ok(false),
            _ => Err(FORM),
        }
    }

    fn close(&mut self, name: &[u8]) -> Result<(), Denied> {
        match self.significant()? {
            Event::End(tag) if tag.name().as_ref() == name => Ok(()),
            _ => Err(FORM),
        }
    }

    /// The text of an element, up to its end, which is left to be read.
    fn text(&mut self) -> Result<String, Denied> {
        match self.next()? {
            Event::Text(text) => self.plain(&text),
            event @ Event::End(_) => {
                self.ahead = Some(event);
                Ok(String::new())
            }
            _ => Err(FORM),
        }
    }

    fn plain(&self, text: &[u8]) -> Result<String, Denied> {
        let text = std::str::from_utf8(text).map_err(|_| FORM)?;
        if self.ascii_only && !text.is_ascii() { Err(FORM) } else { Ok(text.to_owned()) }
    }

    fn nothing_more(&mut self, whole: bool) -> Result<(), Denied> {
        let rest = usize::try_from(self.reader.buffer_position()).ok().and_then(|at| self.text.get(at..));
        let nothing = whole && rest.is_some_and(|rest| rest.iter().all(u8::is_ascii_whitespace));
        if nothing { Ok(()) } else { Err(FORM) }
    }
}

/// A tag with this name and nothing else in it.
fn is(tag: &BytesStart<'_>, name: &[u8]) -> bool {
    tag.name().as_ref() == name && tag.attributes_raw().iter().all(u8::is_ascii_whitespace)
}
