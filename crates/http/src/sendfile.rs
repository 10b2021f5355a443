//! Files that Odoo wants sent instead of reading them itself (`--x-sendfile`): the worker is free at once, and the gateway
//! sends what lies in the filestore.
//!
//! Odoo says where the file is, in a header. It is believed for one thing only: which file below the tenant's own database,
//! in the form that a filestore has. Everything else is refused, and no link is followed.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use http::header::HeaderMap;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::local::Content;

/// The headers by which a server asks for it; Odoo sets both.
pub(crate) const HEADERS: [&str; 2] = ["x-accel-redirect", "x-sendfile"];

/// The file that an answer asks for, below a filestore: `<database>/<two digits>/<sha1>`. An error when it asks for another.
pub(crate) fn asked_for(headers: &HeaderMap, database: Option<&str>) -> Option<Result<String, ()>> {
    let value = HEADERS.iter().find_map(|name| headers.get(*name))?;
    let path = value.to_str().unwrap_or_default();
    Some(own_file(path, database).ok_or(()))
}

fn own_file(path: &str, database: Option<&str>) -> Option<String> {
    let mut parts = path.rsplit('/');
    let (name, directory, of) = (parts.next()?, parts.next()?, parts.next()?);
    let hex = |s: &str, n| s.len() == n && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let filestore = parts.next()? == "filestore" && !path.split('/').any(|part| matches!(part, "." | ".."));
    let right = filestore && Some(of) == database && hex(name, 40) && hex(directory, 2) && name.starts_with(directory);
    right.then(|| format!("{of}/{directory}/{name}"))
}

/// Opens a file below a directory, and nothing that a link leads to.
pub(crate) async fn open(directory: &Path, file: String) -> io::Result<Content> {
    let directory = directory.to_owned();
    let open = move || {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&directory, flags | OFlags::DIRECTORY, Mode::empty())?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let file = File::from(rustix::fs::openat2(&root, file, flags | OFlags::NONBLOCK, Mode::empty(), resolve)?);
        let about = file.metadata()?;
        if !about.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"));
        }
        Ok(Content::File(Arc::new(file), about.len()))
    };
    tokio::task::spawn_blocking(open).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "ab0123456789abcdef0123456789abcdef012345";

    #[test]
    fn only_files_of_the_own_filestore_can_be_asked_for() {
        let ask = |path: &str| own_file(path, Some("acme_db"));
        for good in [
            format!("/web/filestore/acme_db/ab/{HASH}"),
            format!("/var/lib/odoo/.local/share/Odoo/filestore/acme_db/ab/{HASH}"),
        ] {
            assert_eq!(ask(&good), Some(format!("acme_db/ab/{HASH}")));
        }
        for bad in [
            format!("/web/filestore/bolt_db/ab/{HASH}"),
            format!("/web/filestore/bolt_db/../acme_db/ab/{HASH}"),
            format!("/web/filestore/acme_db/../bolt_db/ab/{HASH}"),
            format!("/web/filestore/acme_db/cd/{HASH}"),
            format!("/web/filestore/acme_db/ab/{}", HASH.to_uppercase()),
            format!("/web/other/acme_db/ab/{HASH}"),
            format!("acme_db/ab/{HASH}"),
            "/web/filestore/acme_db/ab/..".to_owned(),
            "/etc/passwd".to_owned(),
            String::new(),
        ] {
            assert_eq!(ask(&bad), None, "{bad}");
        }
        assert_eq!(own_file(&format!("/web/filestore/acme_db/ab/{HASH}"), None), None);
    }

    #[tokio::test]
    async fn a_link_is_not_followed_and_a_directory_is_no_file() {
        let filestore = tempfile::tempdir().unwrap();
        let here = filestore.path();
        std::fs::create_dir_all(here.join("acme_db/ab")).unwrap();
        std::fs::create_dir_all(here.join("bolt_db/ab")).unwrap();
        std::fs::write(here.join("bolt_db/ab/secret"), "of bolt").unwrap();
        std::fs::write(here.join("acme_db/ab/own"), "of acme").unwrap();
        std::os::unix::fs::symlink(here.join("bolt_db/ab/secret"), here.join("acme_db/ab/link")).unwrap();
        std::os::unix::fs::symlink(here.join("bolt_db"), here.join("chem_db")).unwrap();
        let open = async |file: &str| open(here, file.to_owned()).await.map(|content| content.len());
        assert_eq!(open("acme_db/ab/own").await.unwrap(), 7);
        for bad in ["acme_db/ab/link", "chem_db/ab/secret", "acme_db/ab", "acme_db/ab/none", "../x", "/etc/passwd"] {
            assert!(open(bad).await.is_err(), "{bad}");
        }
    }
}
