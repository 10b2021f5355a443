//! Where words, strings, comments and statements begin and end.

pub(super) enum Token<'a> {
    Word(&'a [u8]),
    Semicolon,
    Other(u8),
}

pub(super) struct Lexer<'a> {
    pub(super) rest: &'a [u8],
    /// A construct was met whose extent depends on settings, or whose name is written with escapes.
    pub(super) ambiguous: bool,
}

impl<'a> Lexer<'a> {
    pub(super) fn next(&mut self) -> Option<Token<'a>> {
        loop {
            let (&c, after) = self.rest.split_first()?;
            match c {
                b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c | 0 => self.rest = after,
                b'-' if after.first() == Some(&b'-') => {
                    let end = after.iter().position(|b| *b == b'\n' || *b == b'\r').unwrap_or(after.len());
                    self.rest = &after[end..];
                }
                b'/' if after.first() == Some(&b'*') => self.comment(),
                b'\'' => {
                    self.string(false);
                    return Some(Token::Other(b'\''));
                }
                b'"' => return Some(self.quoted_identifier()),
                b'$' => {
                    if !self.dollar_quote() {
                        self.rest = after;
                    }
                    return Some(Token::Other(b'$'));
                }
                b';' => {
                    self.rest = after;
                    return Some(Token::Semicolon);
                }
                _ if is_word(c) && !c.is_ascii_digit() => return Some(self.word()),
                _ => {
                    self.rest = after;
                    return Some(Token::Other(c));
                }
            }
        }
    }

    fn word(&mut self) -> Token<'a> {
        let end = self.rest.iter().position(|b| !is_word(*b) && *b != b'$').unwrap_or(self.rest.len());
        let (word, after) = self.rest.split_at(end);
        self.rest = after;
        match (word, after.first()) {
            (b"e" | b"E", Some(b'\'')) => {
                self.string(true);
                Token::Other(b'\'')
            }
            (b"u" | b"U", Some(b'&')) if matches!(after.get(1), Some(b'"' | b'\'')) => {
                // Names and strings with Unicode escapes could spell anything.
                self.ambiguous = true;
                Token::Word(word)
            }
            _ => Token::Word(word),
        }
    }

    /// Skips a string; `self.rest` begins with its quote.
    fn string(&mut self, escapes: bool) {
        let mut i = 1;
        while let Some(&c) = self.rest.get(i) {
            match c {
                b'\\' if escapes => i += 1,
                // With standard_conforming_strings off, this quote would not end the string.
                b'\\' if self.rest.get(i + 1) == Some(&b'\'') => self.ambiguous = true,
                b'\'' if self.rest.get(i + 1) == Some(&b'\'') => i += 1,
                b'\'' => break,
                _ => {}
            }
            i += 1;
        }
        self.rest = self.rest.get(i + 1..).unwrap_or_default();
    }

    fn quoted_identifier(&mut self) -> Token<'a> {
        let inner = &self.rest[1..];
        let end = inner.iter().position(|b| *b == b'"').unwrap_or(inner.len());
        self.rest = inner.get(end + 1..).unwrap_or_default();
        Token::Word(&inner[..end])
    }

    fn comment(&mut self) {
        let mut depth = 0usize;
        let mut i = 0;
        while i < self.rest.len() {
            match (self.rest[i], self.rest.get(i + 1)) {
                (b'/', Some(b'*')) => {
                    depth += 1;
                    i += 2;
                }
                (b'*', Some(b'/')) => {
                    depth -= 1;
                    i += 2;
                    if depth == 0 {
                        break;
                    }
                }
                _ => i += 1,
            }
        }
        self.rest = self.rest.get(i..).unwrap_or_default();
    }

    /// Skips `$tag$…$tag$`; false when this dollar begins something else.
    fn dollar_quote(&mut self) -> bool {
        let Some(length) = self.rest[1..].iter().position(|b| *b == b'$') else { return false };
        let tag = &self.rest[..length + 2];
        let name = &tag[1..=length];
        if name.first().is_some_and(u8::is_ascii_digit) || !name.iter().all(|b| is_word(*b)) {
            return false;
        }
        let body = &self.rest[tag.len()..];
        let end = body.windows(tag.len()).position(|w| w == tag).map_or(body.len(), |p| p + tag.len());
        self.rest = &body[end..];
        true
    }
}

pub(super) fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_' || c >= 0x80
}
