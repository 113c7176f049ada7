//! Who we are, what a repository is, and making one.
//!
//! Invariant: a repository that exists is never changed here; [`Hub::create_repo`] asks before it creates.

use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::retry::Patience;
use crate::wire::{About, parse};
use crate::{Answer, Commit, Error, Hub, RepoId};

/// Bound on the answers of this module.
const ANSWER_BYTES_MAX: usize = 32 << 20;

/// What a token may do, as its maker chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Read what its owner may read.
    Read,
    /// Write wherever its owner may write.
    Write,
    /// A list of permissions for each owner or repository.
    FineGrained,
    /// A role that we do not know.
    Other(String),
}

/// An organisation that the token's owner belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Org {
    /// Its name.
    pub name: String,
    /// The owner's role in it (`admin`, `write`, `contributor`, `read`), when the Hub says.
    pub role: Option<String>,
}

/// Whether a token may write somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// It may.
    Yes,
    /// It may not.
    No,
    /// The Hub does not say.
    Unknown,
}

/// The owner of a token and what the token may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WhoAmI {
    /// User name.
    pub name: String,
    /// What the token may do; `None` when the Hub does not say.
    pub role: Option<Role>,
    /// Organisations of the user.
    pub orgs: Vec<Org>,
    /// Owners and repositories that a fine-grained token may write to.
    pub writable: Vec<String>,
    /// It may write to repositories of every owner.
    pub writes_everywhere: bool,
}

impl WhoAmI {
    /// Whether this token may write to repositories of `owner`.
    #[must_use]
    pub fn can_write(&self, owner: &str) -> Right {
        match &self.role {
            Some(Role::Read) => Right::No,
            _ if self.writes_everywhere => Right::Yes,
            Some(Role::FineGrained) if self.writable.iter().any(|name| name == owner) => Right::Yes,
            Some(Role::FineGrained) if self.writable.is_empty() => Right::No,
            Some(Role::Write) if self.name == owner => Right::Yes,
            Some(Role::Write) => match self.orgs.iter().find(|org| org.name == owner) {
                Some(Org {
                    role: Some(role), ..
                }) if role == "read" => Right::No,
                Some(Org { role: Some(_), .. }) => Right::Yes,
                Some(Org { role: None, .. }) => Right::Unknown,
                None => Right::No,
            },
            _ => Right::Unknown,
        }
    }
}

/// A repository at one commit.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// The commit that the revision stands for; `None` for an empty repository of some Hubs.
    pub sha: Option<Commit>,
    /// Whether reading the files needs consent.
    pub is_gated: bool,
    /// Words that describe it; among them what it is based on (`base_model:quantized:owner/name`).
    pub tags: Vec<String>,
    /// Front matter of the card; `Null` when it has none.
    pub card_data: Value,
}

/// What [`Hub::create_repo`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// It was made.
    Created,
    /// It was there already and was left as it is.
    Existed,
}

impl Hub {
    /// Whose token this is and what it may do.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] without a valid token; otherwise as every request.
    pub async fn whoami(&self) -> Result<WhoAmI, Error> {
        #[derive(Deserialize)]
        struct Wire {
            name: String,
            #[serde(default)]
            orgs: Vec<OrgWire>,
            #[serde(default)]
            auth: Option<Auth>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct OrgWire {
            name: String,
            role_in_org: Option<String>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Auth {
            access_token: Option<AccessToken>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct AccessToken {
            role: Option<String>,
            #[serde(default)]
            fine_grained: Value,
        }
        let ask = self.wire.get(
            "ask whose token this is",
            self.wire.url(&["api", "whoami-v2"]),
            About::default(),
        );
        let wire: Wire = self.wire.json(&ask, ANSWER_BYTES_MAX).await?;
        let token = wire.auth.and_then(|auth| auth.access_token);
        Ok(WhoAmI {
            name: wire.name,
            role: token
                .as_ref()
                .and_then(|t| t.role.as_deref())
                .map(|role| match role {
                    "read" => Role::Read,
                    "write" => Role::Write,
                    "fineGrained" => Role::FineGrained,
                    other => Role::Other(other.to_owned()),
                }),
            orgs: wire
                .orgs
                .into_iter()
                .map(|org| Org {
                    name: org.name,
                    role: org.role_in_org,
                })
                .collect(),
            writable: token
                .as_ref()
                .map(|t| writable(&t.fine_grained))
                .unwrap_or_default(),
            writes_everywhere: token.is_some_and(|t| may_write(&t.fine_grained, "global")),
        })
    }

    /// A repository at `revision` (a branch, tag or commit; `main` when `None`).
    ///
    /// # Errors
    /// [`Error::RepoNotFound`], [`Error::RevisionNotFound`], [`Error::Gated`]; otherwise as every request.
    pub async fn model_info(
        &self,
        repo: &RepoId,
        revision: Option<&str>,
    ) -> Result<ModelInfo, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Wire {
            sha: Option<String>,
            #[serde(default)]
            gated: Value,
            #[serde(default)]
            tags: Vec<String>,
            #[serde(default)]
            card_data: Value,
        }
        let url = match revision {
            Some(revision) => self.wire.model_url(repo, &["revision", revision]),
            None => self.wire.model_url(repo, &[]),
        };
        let what = format!(
            "look up {repo}{}",
            revision.map(|r| format!("@{r}")).unwrap_or_default()
        );
        let ask = self.wire.get(
            what,
            url,
            About {
                repo: Some(repo),
                revision,
                file: None,
            },
        );
        let wire: Wire = self.wire.json(&ask, ANSWER_BYTES_MAX).await?;
        let sha = match wire.sha.as_deref() {
            None | Some("") => None,
            Some(sha) => Some(sha.parse::<Commit>().map_err(|_| Error::Protocol {
                what: ask.what.clone(),
                detail: format!("{sha:?} is no commit"),
            })?),
        };
        Ok(ModelInfo {
            sha,
            is_gated: matches!(wire.gated, Value::String(_) | Value::Bool(true)),
            tags: wire.tags,
            card_data: wire.card_data,
        })
    }

    /// The commit that `revision` stands for now; a full commit stands for itself if it exists.
    ///
    /// # Errors
    /// As [`Hub::model_info`], [`Error::Gated`] also when the Hub hides the commit for that reason;
    /// [`Error::Protocol`] when it names no commit, or another than asked for.
    pub async fn resolve(&self, repo: &RepoId, revision: Option<&str>) -> Result<Commit, Error> {
        let wrong = |detail: String| Error::Protocol {
            what: format!("resolve a revision of {repo}"),
            detail,
        };
        let info = self.model_info(repo, revision).await?;
        let Some(sha) = info.sha else {
            if info.is_gated {
                let answer = Box::new(Answer {
                    status: 200,
                    url: self.wire.model_url(repo, &[]).into(),
                    message: Some("its commit is not told".to_owned()),
                    request_id: None,
                });
                return Err(Error::Gated {
                    repo: repo.clone(),
                    page: self.page(repo),
                    answer,
                });
            }
            return Err(wrong(
                "it names no commit (an empty repository?)".to_owned(),
            ));
        };
        match revision.map(str::parse::<Commit>) {
            Some(Ok(asked)) if asked != sha => Err(wrong(format!("asked for {asked}, got {sha}"))),
            _ => Ok(sha),
        }
    }

    /// A whole small file of a commit, without listing the repository; `None` when the commit has none of that path.
    ///
    /// # Errors
    /// [`Error::Gated`] and the others of every request; [`Error::Protocol`] when it is longer than `size_bytes_max`.
    pub async fn small_file(
        &self,
        repo: &RepoId,
        commit: &Commit,
        path: &str,
        size_bytes_max: usize,
    ) -> Result<Option<Bytes>, Error> {
        let mut segments = vec![repo.owner(), repo.name(), "resolve", commit.as_str()];
        segments.extend(path.split('/'));
        let about = About {
            repo: Some(repo),
            revision: None,
            file: Some((commit, path)),
        };
        let what = format!("read {path} of {repo}@{commit}");
        let ask = self.wire.get(what, self.wire.url(&segments), about);
        match self.wire.fetch(&ask, size_bytes_max).await {
            Ok((_, bytes)) => Ok(Some(bytes)),
            Err(Error::EntryNotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a repository unless it exists; an existing one is left as it is, whatever `private` says.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] or [`Error::Forbidden`] without the right to create it; otherwise as every request.
    pub async fn create_repo(&self, repo: &RepoId, private: bool) -> Result<Created, Error> {
        match self.model_info(repo, None).await {
            Ok(_) => return Ok(Created::Existed),
            Err(Error::RepoNotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let body = json!({"name": repo.name(), "organization": repo.owner(), "type": "model", "private": private});
        let url = self.wire.url(&["api", "repos", "create"]);
        let mut patience = Patience::new(self.settings());
        loop {
            patience.attempt();
            let ask = self.wire.post_json(
                format!("create {repo}"),
                url.clone(),
                About::default(),
                &body,
            );
            let error = match self.wire.fetch(&ask, ANSWER_BYTES_MAX).await {
                Ok(_) => return Ok(Created::Created),
                Err(error) => error,
            };
            if !matches!(error, Error::Conflict { .. }) {
                return Err(error);
            }
            // 409: somebody made it meanwhile, or the Hub is busy with it.
            match self.model_info(repo, None).await {
                Ok(_) => return Ok(Created::Existed),
                Err(Error::RepoNotFound { .. }) => {}
                Err(other) => return Err(other),
            }
            let wait: Duration = patience.wait(None).ok_or(error)?;
            tokio::time::sleep(wait).await;
        }
    }

    /// Lets the Hub check a model card (front matter and text); returns its warnings.
    ///
    /// # Errors
    /// [`Error::Card`] with every complaint when it would refuse the card.
    pub async fn validate_card(&self, markdown: &str) -> Result<Vec<String>, Error> {
        #[derive(Deserialize)]
        struct Verdict {
            #[serde(default)]
            errors: Vec<Note>,
            #[serde(default)]
            warnings: Vec<Note>,
        }
        #[derive(Deserialize)]
        struct Note {
            message: String,
        }
        let url = self.wire.url(&["api", "validate-yaml"]);
        let body = json!({"content": markdown, "repoType": "model"});
        let ask = self
            .wire
            .post_json("check the model card", url, About::default(), &body);
        let verdict: Verdict = match self.wire.fetch(&ask, ANSWER_BYTES_MAX).await {
            Ok((_, body)) => parse(&ask.what, &body)?,
            Err(Error::Refused { answer, .. }) if answer.status == 400 => {
                return Err(Error::Card {
                    problems: vec![
                        answer
                            .message
                            .unwrap_or_else(|| "no reason given".to_owned()),
                    ],
                });
            }
            Err(error) => return Err(error),
        };
        let texts = |notes: Vec<Note>| {
            notes
                .into_iter()
                .map(|note| note.message)
                .collect::<Vec<_>>()
        };
        if verdict.errors.is_empty() {
            Ok(texts(verdict.warnings))
        } else {
            Err(Error::Card {
                problems: texts(verdict.errors),
            })
        }
    }
}

/// Names in a fine-grained token's scopes that carry a permission to write repositories.
fn writable(fine_grained: &Value) -> Vec<String> {
    let scopes = fine_grained
        .get("scoped")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    scopes
        .filter(|scope| may_write(scope, "permissions"))
        .filter_map(|scope| {
            scope
                .get("entity")?
                .get("name")?
                .as_str()
                .map(str::to_owned)
        })
        .collect()
}

/// Whether the list of permissions at `key` has the one to write repositories.
fn may_write(scope: &Value, key: &str) -> bool {
    let permissions = scope.get(key).and_then(Value::as_array);
    permissions.is_some_and(|list| list.iter().any(|permission| permission == "repo.write"))
}

#[cfg(test)]
mod tests {
    use super::Right::{No, Unknown, Yes};
    use super::*;

    #[test]
    fn a_token_may_write_where_its_role_reaches() {
        let org = |name: &str, role: &str| Org {
            name: name.to_owned(),
            role: Some(role.to_owned()),
        };
        let rights = |role, fine_grained: Value| {
            let me = WhoAmI {
                name: "ann".to_owned(),
                role: Some(role),
                orgs: vec![org("lab", "write"), org("library", "read")],
                writable: writable(&fine_grained),
                writes_everywhere: may_write(&fine_grained, "global"),
            };
            ["ann", "lab", "library", "other"].map(|owner| me.can_write(owner))
        };
        let lab = json!({"scoped": [
            {"entity": {"name": "lab"}, "permissions": ["repo.content.read", "repo.write"]},
            {"entity": {"name": "library"}, "permissions": ["repo.content.read"]},
        ]});
        let everywhere = json!({"global": ["repo.write"], "scoped": []});
        assert_eq!(rights(Role::Write, Value::Null), [Yes, Yes, No, No]);
        assert_eq!(rights(Role::Write, everywhere.clone()), [Yes; 4]);
        assert_eq!(rights(Role::Read, everywhere), [No; 4]);
        assert_eq!(
            rights(Role::FineGrained, lab),
            [Unknown, Yes, Unknown, Unknown]
        );
        assert_eq!(rights(Role::FineGrained, Value::Null), [No; 4]);
    }
}
