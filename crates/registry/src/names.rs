//! Names that come from outside: repositories, refs, paths, hashes.
//!
//! Invariant: a value of a type of this file is safe as one path component of the registry's own files (or, for a path
//! inside a repository, is never used as one). Nothing here touches the disk.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Error;

/// What a repository holds; the first part of its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Model,
    Dataset,
    Space,
}

impl Kind {
    pub(crate) const ALL: [Kind; 3] = [Kind::Model, Kind::Dataset, Kind::Space];

    /// As in JSON: `model`.
    pub(crate) fn singular(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Dataset => "dataset",
            Kind::Space => "space",
        }
    }

    /// As in the API's paths: `models`.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
            Kind::Space => "spaces",
        }
    }

    /// What stands before the repository's name in its web address.
    pub(crate) fn web_prefix(self) -> &'static str {
        match self {
            Kind::Model => "",
            Kind::Dataset => "datasets/",
            Kind::Space => "spaces/",
        }
    }

    pub(crate) fn from_plural(text: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.plural() == text)
    }

    pub(crate) fn from_singular(text: &str) -> Result<Kind, Error> {
        Kind::ALL
            .into_iter()
            .find(|kind| kind.singular() == text)
            .ok_or_else(|| Error::invalid("type", "must be model, dataset or space"))
    }
}

/// The address of a repository.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RepoId {
    pub(crate) kind: Kind,
    pub(crate) owner: String,
    pub(crate) name: String,
}

impl RepoId {
    pub(crate) fn new(kind: Kind, owner: &str, name: &str) -> Result<RepoId, Error> {
        check_name("owner", owner)?;
        check_name("repository name", name)?;
        if owner.len() + 1 + name.len() > 96 {
            return Err(Error::invalid(
                "repository name",
                "owner/name is at most 96 characters",
            ));
        }
        Ok(RepoId {
            kind,
            owner: owner.to_owned(),
            name: name.to_owned(),
        })
    }

    /// From `owner/name`.
    pub(crate) fn parse(kind: Kind, text: &str) -> Result<RepoId, Error> {
        match text.split_once('/') {
            Some((owner, name)) => RepoId::new(kind, owner, name),
            None => Err(Error::invalid("repository name", "must be owner/name")),
        }
    }

    /// `owner/name`.
    pub(crate) fn full_name(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind.plural(), self.owner, self.name)
    }
}

/// The Hub's rule for owners and names: letters, digits, `-`, `_`, `.`; neither end is `-` or `.`; no `--`, no `..`, no
/// `.git` at the end.
pub(crate) fn check_name(what: &str, text: &str) -> Result<(), Error> {
    let edge = |c: Option<char>| matches!(c, None | Some('-' | '.'));
    let fine = text.len() <= 96
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && !edge(text.chars().next())
        && !edge(text.chars().next_back())
        && !text.contains("--")
        && !text.contains("..")
        && !text.ends_with(".git");
    if fine {
        return Ok(());
    }
    Err(Error::invalid(
        what,
        "must be letters, digits, '-', '_' or '.', at most 96, not begin or end with '-' or '.', \
         hold no '--' or '..', and not end with '.git'",
    ))
}

/// A branch's or tag's name: what `git check-ref-format` allows, in a smaller alphabet.
pub(crate) fn check_ref_name(text: &str) -> Result<(), Error> {
    let part_is_fine = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && !part.ends_with('.')
            && !part.ends_with(".lock")
    };
    // As the name of a file, each '/' takes three bytes.
    let fine = text.len() + 2 * text.matches('/').count() <= 250
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '+'))
        && !text.starts_with('-')
        && !text.contains("..")
        && text.split('/').all(part_is_fine)
        && !is_commit(text);
    if fine {
        return Ok(());
    }
    Err(Error::invalid(
        "branch or tag name",
        "must be letters, digits, '-', '_', '.', '+' or '/', at most 250, no empty part, no '..', not a commit id",
    ))
}

/// A path inside a repository: relative, `/` between its parts, none of them empty, `.`, `..` or `.git`.
pub(crate) fn check_path(text: &str) -> Result<(), Error> {
    let part_is_fine = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && !part.eq_ignore_ascii_case(".git")
            && part.len() <= 255
    };
    let fine = text.len() <= 1024
        && !text.chars().any(|c| c.is_control() || c == '\\')
        && text.split('/').all(part_is_fine);
    if fine {
        return Ok(());
    }
    let shown: String = text.chars().filter(|c| !c.is_control()).take(80).collect();
    Err(Error::invalid(
        format!("path in repository '{shown}'"),
        "must be relative, at most 1024 bytes, without empty parts, '.', '..', '.git', '\\' or control characters",
    ))
}

/// 40 lower-case hex digits.
pub(crate) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

/// 64 lower-case hex digits.
pub(crate) fn is_sha256(text: &str) -> bool {
    is_hex(text, 64)
}

/// Exactly `len` lower-case hex digits.
pub(crate) fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// `n` random bytes from the operating system, in hex.
pub(crate) fn random_hex<const N: usize>() -> String {
    hex::encode(random::<N>())
}

/// `n` random bytes from the operating system.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system has random numbers");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_names() {
        for good in ["a/b", "Foxlight-AI/gemma-3.1_270m-vindex", "0/x"] {
            assert!(RepoId::parse(Kind::Model, good).is_ok(), "{good}");
        }
        let long = format!("a/{}", "b".repeat(95));
        for bad in [
            "a", "a/", "/b", "a/b/c", "../b", "a/..", "a/b.git", "a/-b", "a/b-", "a/b--c", "a/b c",
            "a/ü", "a/b\0", &long,
        ] {
            assert!(RepoId::parse(Kind::Model, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_and_refs() {
        for good in ["a", "a/b.txt", "ü/日本", ".gitattributes", "a b", "..a"] {
            assert!(check_path(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "/a",
            "a/",
            "a//b",
            "../a",
            "a/../b",
            "./a",
            ".git/config",
            "a\\b",
            "a\nb",
            "a/.GIT/b",
        ] {
            assert!(check_path(bad).is_err(), "{bad}");
        }
        for good in ["main", "v1.0", "feature/x", "a+b"] {
            assert!(check_ref_name(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "/",
            "a/",
            "a..b",
            ".a",
            "a.lock",
            "-a",
            "a b",
            "0123456789012345678901234567890123456789",
            "a%2f",
            &["a"; 90].join("/"),
        ] {
            assert!(check_ref_name(bad).is_err(), "{bad}");
        }
    }
}
