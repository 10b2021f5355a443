//! The trace that a request belongs to (W3C Trace Context): continued, or begun here.

use http::HeaderMap;

/// The header.
pub(crate) const TRACEPARENT: &str = "traceparent";

/// A trace, and whether it is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trace {
    /// 32 hexadecimal digits.
    pub(crate) id: String,
    /// Whose span this one is in: 16 hexadecimal digits.
    pub(crate) parent: Option<String>,
    flags: u8,
}

/// The flag of a trace that is recorded.
const RECORDED: u8 = 1;

impl Trace {
    /// The trace that the client continues, if it names one in the form of the standard; a new one otherwise. `run` and the
    /// request's id make a number that no other trace has.
    pub(crate) fn of(headers: &HeaderMap, run: u64, request_id: &str) -> Self {
        let mut given = headers.get_all(TRACEPARENT).iter();
        let continued = match (given.next(), given.next()) {
            (Some(one), None) => one.to_str().ok().and_then(parse),
            _ => None,
        };
        continued.unwrap_or_else(|| Self { id: format!("{run:016x}{request_id}"), parent: None, flags: 0 })
    }

    /// Whether whoever came before records it.
    pub(crate) fn is_recorded(&self) -> bool {
        self.flags & RECORDED != 0
    }

    /// It is recorded here, which the next shall know.
    pub(crate) fn record(&mut self) {
        self.flags |= RECORDED;
    }

    /// The trace's number.
    pub(crate) fn number(&self) -> u128 {
        u128::from_str_radix(&self.id, 16).unwrap_or(0)
    }

    /// What the server is told: the request is a span of its own, by its id.
    pub(crate) fn header(&self, request_id: &str) -> String {
        format!("00-{}-{request_id}-{:02x}", self.id, self.flags)
    }
}

fn parse(text: &str) -> Option<Trace> {
    let mut parts = text.trim().split('-');
    let (version, id, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |s: &str, n| s.len() == n && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let some = |s: &str| s.bytes().any(|b| b != b'0');
    // A later version may have more to say; the first has not.
    let complete = version != "00" || parts.next().is_none();
    (hex(version, 2)
        && version != "ff"
        && hex(id, 32)
        && some(id)
        && hex(parent, 16)
        && some(parent)
        && hex(flags, 2)
        && complete)
        .then(|| Trace {
            id: id.to_owned(),
            parent: Some(parent.to_owned()),
            flags: u8::from_str_radix(flags, 16).unwrap_or(0),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_goes_on_and_what_is_none_is_begun_anew() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(TRACEPARENT, text.parse().unwrap());
            Trace::of(&headers, 1, "00000000000000aa").header("00000000000000aa")
        };
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(of(&format!("00-{id}-00f067aa0ba902b7-01")), format!("00-{id}-00000000000000aa-01"));
        assert_eq!(of(&format!("cc-{id}-00f067aa0ba902b7-01-more")), format!("00-{id}-00000000000000aa-01"));
        let anew = "00-000000000000000100000000000000aa-00000000000000aa-00";
        for bad in [
            "",
            &format!("ff-{id}-00f067aa0ba902b7-01"),
            &format!("00-{id}-00f067aa0ba902b7-01-more"),
            &format!("00-{id}-0000000000000000-01"),
            &format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            &format!("00-{}-00f067aa0ba902b7-01", id.to_uppercase()),
        ] {
            assert_eq!(of(bad), anew, "{bad}");
        }
    }
}
