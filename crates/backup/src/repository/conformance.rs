//! What every [`Store`] must do, as a check that anybody can run against theirs.

use bytes::Bytes;

use super::store::{Object, Store, StoreError};

/// Tries a store in an empty place of its own; says what it did wrong.
///
/// Writes below `conformance/` and removes it again. Takes a few requests and 20 MiB.
pub fn check(store: &dyn Store) -> Result<(), String> {
    let fail = |what: &str, got: &dyn std::fmt::Debug| Err(format!("{}: {what}: {got:?}", store.location()));
    let text = |e: StoreError| e.to_string();

    if !store.list("conformance/").map_err(text)?.is_empty() {
        return fail("the place is not empty", &store.list("conformance/"));
    }
    match store.read("conformance/none") {
        Err(StoreError::Missing { .. }) => {}
        other => return fail("reading what is not there is `Missing`", &other),
    }
    store.remove("conformance/none").map_err(text)?;

    let parts = vec![Bytes::from_static(b"one "), Bytes::new(), Bytes::from_static(b"two")];
    store.write("conformance/a/b", parts).map_err(text)?;
    store.write("conformance/a.c", vec![]).map_err(text)?;
    match store.read("conformance/a/b") {
        Ok(bytes) if bytes == "one two" => {}
        other => return fail("parts are one object", &other),
    }
    match store.read_range("conformance/a/b", 2..5) {
        Ok(bytes) if bytes == "e t" => {}
        other => return fail("a part is these bytes", &other),
    }
    if let Ok(bytes) = store.read_range("conformance/a/b", 4..400) {
        return fail("beyond the end is an error", &bytes);
    }
    let mut listed = store.list("conformance/").map_err(text)?;
    listed.sort();
    let expected = [("conformance/a.c", 0), ("conformance/a/b", 7)];
    if !listed.iter().map(|Object { name, size }| (name.as_str(), *size)).eq(expected) {
        return fail("everything is listed with its size", &listed);
    }
    let under = store.list("conformance/a/").map_err(text)?;
    if under.len() != 1 {
        return fail("a prefix ends where it says", &under);
    }

    store.write("conformance/a/b", vec![Bytes::from_static(b"three")]).map_err(text)?;
    match store.read("conformance/a/b") {
        Ok(bytes) if bytes == "three" => {}
        other => return fail("the last write is read", &other),
    }

    for (content, written) in [("first", true), ("second", false)] {
        match store.write_new("conformance/new", Bytes::from(content)) {
            Ok(done) if done == written => {}
            other => return fail("what is there already is not written anew", &other),
        }
    }
    match store.read("conformance/new") {
        Ok(bytes) if bytes == "first" => {}
        other => return fail("what was there first stays", &other),
    }

    // More than any store takes in one piece without being told to.
    let large: Vec<Bytes> = (0..20_u8).map(|i| Bytes::from(vec![i; 1 << 20])).collect();
    store.write("conformance/large", large.clone()).map_err(text)?;
    let whole = store.read("conformance/large").map_err(text)?;
    if whole != large.concat() {
        return fail("a large object is its bytes", &whole.len());
    }
    let middle = store.read_range("conformance/large", (9 << 20) - 1..(9 << 20) + 1).map_err(text)?;
    if middle != [8, 9][..] {
        return fail("a part of a large object is these bytes", &middle);
    }

    for name in ["conformance/new", "conformance/large", "conformance/a/b", "conformance/a.c"] {
        store.remove(name).map_err(text)?;
        store.remove(name).map_err(text)?;
    }
    if !store.list("conformance/").map_err(text)?.is_empty() {
        return fail("what is removed is gone", &store.list("conformance/"));
    }
    Ok(())
}
