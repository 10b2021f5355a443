//! The house rules that a compiler does not check.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn files() -> Vec<(PathBuf, String)> {
    let output = Command::new("git").args(["ls-files"]).current_dir(root()).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|name| std::fs::read_to_string(root().join(name)).ok().map(|text| (PathBuf::from(name), text)))
        .collect()
}

/// Workspace dependencies of each crate, without those for tests only.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let mut out = BTreeMap::new();
    for entry in std::fs::read_dir(root().join("crates")).unwrap() {
        let directory = entry.unwrap().path();
        let name = directory.file_name().unwrap().to_str().unwrap().to_owned();
        let manifest = std::fs::read_to_string(directory.join("Cargo.toml")).unwrap();
        let section = manifest.split("\n[dependencies]\n").nth(1).unwrap().split("\n[").next().unwrap();
        let ours = section
            .lines()
            .filter_map(|line| line.split(['.', ' ', '=']).next())
            .filter_map(|dependency| match dependency {
                "cofferdam" => Some("cofferdam".to_owned()),
                other => other.strip_prefix("cofferdam-").map(str::to_owned),
            })
            .collect();
        out.insert(name, ours);
    }
    out
}

/// The arrows of ARCHITECTURE.md.
#[test]
fn dependencies_run_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = [
        ("tenant", &[][..]),
        ("fairness", &["tenant"]),
        ("tls", &["tenant"]),
        ("acme", &["tenant", "tls"]),
        ("http", &["acme", "fairness", "processes", "sched", "tenant", "tls"]),
        ("scram", &[]),
        ("sched", &[]),
        ("processes", &["fairness", "sched", "tenant"]),
        ("postgres", &["fairness", "processes", "sched", "scram", "tenant", "tls"]),
        ("admin", &[]),
        ("rows", &["scram", "tenant", "tls"]),
        ("backup", &["rows", "tenant", "tls"]),
        ("health", &["rows", "tenant", "tls"]),
        ("cofferdam", &["admin", "http", "postgres", "fairness", "sched", "tenant"]),
        ("testkit", &[]),
        ("bench", &["fairness", "testkit"]),
        ("cli", &["backup", "bench", "cofferdam", "health", "testkit"]),
    ]
    .into();
    for (name, uses) in dependencies() {
        let allowed = allowed.get(name.as_str()).unwrap_or_else(|| panic!("crate {name} is not on the map"));
        for used in &uses {
            assert!(allowed.contains(&used.as_str()), "{name} must not depend on {used}");
        }
    }
}

#[test]
fn unsafe_is_forbidden_but_where_one_system_call_needs_it() {
    let is_exempt = |path: &Path| path.starts_with("crates/sched") || path == Path::new("tests/repository.rs");
    for (path, text) in files().into_iter().filter(|(path, _)| !is_exempt(path)) {
        let is_code = path.extension().is_some_and(|e| e == "rs");
        assert!(!is_code || !text.contains("unsafe {") && !text.contains("unsafe fn"), "{}", path.display());
        let is_library = path.starts_with("crates") && path.ends_with("src/lib.rs");
        assert!(!is_library || text.contains("#![forbid(unsafe_code)]"), "{} does not forbid it", path.display());
    }
    let (_, sched) = files().into_iter().find(|(path, _)| path == Path::new("crates/sched/src/lib.rs")).unwrap();
    let modules = sched.matches("#![allow(unsafe_code)]").count();
    assert_eq!((modules, sched.matches("unsafe {").count(), sched.matches("// SAFETY: ").count()), (1, 2, 2));
}

#[test]
fn tenant_and_fairness_know_no_runtime_no_socket_and_no_clock() {
    for (path, text) in files() {
        let pure = path.starts_with("crates/tenant/src") || path.starts_with("crates/fairness/src");
        if !pure {
            continue;
        }
        for banned in ["tokio::", "std::net::Tcp", "std::fs::", "std::env::", "Instant::now", "SystemTime::now"] {
            assert!(!text.contains(banned), "{} uses {banned}", path.display());
        }
    }
}

#[test]
fn foreign_types_stay_inside_the_crate_that_wraps_them() {
    for (path, text) in files() {
        let library = path.starts_with("crates") && path.extension().is_some_and(|e| e == "rs");
        if !library || path.components().any(|c| c.as_os_str() == "tests") {
            continue;
        }
        let wrappers: [(&str, &[&str]); 11] = [
            ("pingora", &["crates/http"]),
            ("axum", &["crates/admin"]),
            ("rustic_core", &["crates/backup"]),
            ("aws_sdk_s3", &["crates/backup"]),
            ("object_store", &["crates/backup"]),
            ("redis", &["crates/health"]),
            ("instant_acme", &["crates/acme"]),
            ("reqwest", &["crates/acme", "crates/backup", "crates/health", "crates/http"]),
            ("opentelemetry", &["crates/http"]),
            ("deadpool_postgres", &["crates/health"]),
            (
                "rustls",
                &["crates/acme", "crates/postgres", "crates/http", "crates/tls", "crates/rows", "crates/health"],
            ),
        ];
        // Between the planes and not for anybody else.
        let internal = path.starts_with("crates/tls") || path.starts_with("crates/rows");
        for (foreign, homes) in wrappers {
            let public = text
                .lines()
                .filter(|l| {
                    l.trim_start().starts_with("pub ") && l.contains("fn ") || l.trim_start().starts_with("pub use")
                })
                .any(|l| l.contains(&format!("{foreign}_")) || l.contains(&format!("{foreign}::")));
            assert!(!public || internal, "{} shows a type of {foreign}", path.display());
            let uses = text.contains(&format!("use {foreign}")) || text.contains(&format!("{foreign}_core::"));
            assert!(
                !uses || homes.iter().any(|home| path.starts_with(home)) || path.starts_with("crates/testkit"),
                "{} uses {foreign}",
                path.display()
            );
        }
    }
}

#[test]
fn libraries_neither_print_nor_exit() {
    for (path, text) in files() {
        let library = path.starts_with("crates")
            && !path.starts_with("crates/cli")
            && path.components().any(|c| c.as_os_str() == "src");
        if library {
            for banned in ["println!(", "eprintln!(", "process::exit(", "dbg!("] {
                let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
                assert!(code.into_iter().all(|l| !l.contains(banned)), "{} uses {banned}", path.display());
            }
        }
    }
}

#[test]
fn nothing_names_a_place_on_somebodys_machine_and_no_port_is_fixed() {
    // Built here so that this file does not contain them.
    let places = ["ro", "ho"].map(|p| format!("/{p}{}", if p == "ro" { "ot/" } else { "me/" }));
    for (path, text) in files() {
        for place in &places {
            assert!(!text.contains(place.as_str()), "{} contains {place}", path.display());
        }
    }
}

#[test]
fn every_ban_of_deny_toml_holds_in_the_lock_file() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for banned in ["openssl-sys", "native-tls", "aws-lc-rs"] {
        assert!(!lock.contains(&format!("name = \"{banned}\"\n")), "{banned} is in the tree");
    }
    let foreign: Vec<_> = lock.lines().filter(|l| l.starts_with("source = ") && l.contains("git+")).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}

#[test]
fn documents_link_to_files_that_exist() {
    for (path, text) in files() {
        if path.extension().is_none_or(|e| e != "md") {
            continue;
        }
        let base = root().join(path.parent().unwrap_or(Path::new("")));
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            assert!(base.join(target).exists(), "{} links to {target}, which is not there", path.display());
        }
    }
}
