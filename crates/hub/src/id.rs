//! Names on the Hub: a repository, a commit, and a repository at a revision.
//!
//! Invariant: a value of these types has passed the Hub's own rules, so it can stand in an address.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// A model repository, `owner/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RepoId {
    owner: String,
    name: String,
}

impl RepoId {
    /// The user or organisation.
    #[must_use]
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// The name below the owner.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for RepoId {
    type Err = Error;

    fn from_str(text: &str) -> Result<RepoId, Error> {
        let wrong = |reason: &'static str| Error::Id {
            text: text.to_owned(),
            reason,
        };
        let (owner, name) = text
            .split_once('/')
            .ok_or_else(|| wrong("a repository is written owner/name"))?;
        for part in [owner, name] {
            if part.is_empty() || part.len() > 96 {
                return Err(wrong("owner and name have 1 to 96 characters each"));
            }
            if !part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            {
                return Err(wrong(
                    "owner and name hold only letters, digits, '-', '_' and '.'",
                ));
            }
            if part.starts_with(['-', '.']) || part.ends_with(['-', '.']) {
                return Err(wrong(
                    "owner and name neither start nor end with '-' or '.'",
                ));
            }
            if part.contains("--") || part.contains("..") {
                return Err(wrong("'--' and '..' are not allowed"));
            }
        }
        if name.ends_with(".git") {
            return Err(wrong("a name does not end with .git"));
        }
        Ok(RepoId {
            owner: owner.to_owned(),
            name: name.to_owned(),
        })
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

/// A repository at a revision if one is named: `owner/name[@revision]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The repository.
    pub repo: RepoId,
    /// A branch, tag or commit.
    pub revision: Option<String>,
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Reference, Error> {
        let (repo, revision) = match text.split_once('@') {
            Some((repo, revision)) => (
                repo,
                Some(revision.to_owned()).filter(|revision| !revision.is_empty()),
            ),
            None => (text, None),
        };
        Ok(Reference {
            repo: repo.parse()?,
            revision,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.repo.fmt(f)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

/// A commit of a repository: 40 lower-case hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Commit(String);

impl Commit {
    /// The 40 hex digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Commit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Commit, Error> {
        if text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(Commit(text.to_owned()))
        } else {
            Err(Error::Id {
                text: text.to_owned(),
                reason: "a commit is 40 lower-case hex digits",
            })
        }
    }
}

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_names_follow_the_rules_of_the_hub() {
        for good in ["a/b", "Qwen/Qwen3-0.6B", "foxlight_ai/x.y-z_1"] {
            assert_eq!(good.parse::<RepoId>().unwrap().to_string(), good);
        }
        for bad in [
            "gpt2", "a/b/c", "/b", "a/", "a/-b", "a/b.", "a/b--c", "a/..", "a/b c", "a/b.git",
            "ä/b",
        ] {
            assert!(bad.parse::<RepoId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_reference_may_name_a_revision() {
        let parse = |text: &str| {
            text.parse::<Reference>()
                .map(|r| (r.repo.to_string(), r.revision))
                .ok()
        };
        assert_eq!(parse("a/b"), Some(("a/b".into(), None)));
        assert_eq!(parse("a/b@v1"), Some(("a/b".into(), Some("v1".into()))));
        assert_eq!(parse("a/b@"), Some(("a/b".into(), None)));
        assert_eq!(parse("a@v1"), None);
    }

    #[test]
    fn a_commit_is_forty_lower_case_hex_digits() {
        assert!(
            "0123456789abcdef0123456789abcdef01234567"
                .parse::<Commit>()
                .is_ok()
        );
        assert!(
            "0123456789ABCDEF0123456789abcdef01234567"
                .parse::<Commit>()
                .is_err()
        );
        assert!("main".parse::<Commit>().is_err());
    }
}
