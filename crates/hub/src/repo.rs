//! Who we are, what a repository is, and making one.
//!
//! Invariant: a repository that exists is never changed here; [`Hub::create_repo`] asks before it creates.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::retry::Patience;
use crate::wire::{About, parse};
use crate::{Commit, Error, Hub, RepoId};

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
    /// The name that the token was given.
    pub token_name: Option<String>,
    /// What the token may do; `None` when the Hub does not say.
    pub role: Option<Role>,
    /// Organisations of the user.
    pub orgs: Vec<Org>,
    /// Owners and repositories that a fine-grained token may write to.
    pub writable: Vec<String>,
}

impl WhoAmI {
    /// Whether this token may write to repositories of `owner`.
    #[must_use]
    pub fn can_write(&self, owner: &str) -> Right {
        match &self.role {
            Some(Role::Read) => Right::No,
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

/// How a repository is gated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Not at all.
    Open,
    /// Accept the terms and read on.
    Automatic,
    /// Accept the terms and wait for the owner.
    Manual,
}

/// A repository at one commit.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// Its name, as the Hub writes it.
    pub id: String,
    /// The commit that the revision stands for; `None` for an empty repository of some Hubs.
    pub sha: Option<Commit>,
    /// Visible to its owners only.
    pub private: bool,
    /// Whether reading needs consent.
    pub gated: Gate,
    /// Tags, those derived from the card included.
    pub tags: Vec<String>,
    /// Front matter of the card; `Null` when it has none.
    pub card_data: Value,
    /// `library_name`, as the Hub understands it.
    pub library: Option<String>,
    /// Paths of all files.
    pub siblings: Vec<String>,
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
            display_name: Option<String>,
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
            token_name: token.as_ref().and_then(|t| t.display_name.clone()),
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
            writable: token.map(|t| writable(&t.fine_grained)).unwrap_or_default(),
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
            id: String,
            sha: Option<String>,
            #[serde(default)]
            private: bool,
            #[serde(default)]
            gated: Value,
            #[serde(default)]
            tags: Vec<String>,
            #[serde(default)]
            card_data: Value,
            #[serde(rename = "library_name")]
            library: Option<String>,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
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
            id: wire.id,
            sha,
            private: wire.private,
            gated: match &wire.gated {
                Value::String(text) if text == "manual" => Gate::Manual,
                Value::String(_) | Value::Bool(true) => Gate::Automatic,
                _ => Gate::Open,
            },
            tags: wire.tags,
            card_data: wire.card_data,
            library: wire.library,
            siblings: wire.siblings.into_iter().map(|s| s.rfilename).collect(),
        })
    }

    /// The commit that `revision` stands for now; a full commit stands for itself if it exists.
    ///
    /// # Errors
    /// As [`Hub::model_info`]; [`Error::Protocol`] when the Hub names no commit, or another than asked for.
    pub async fn resolve(&self, repo: &RepoId, revision: Option<&str>) -> Result<Commit, Error> {
        let wrong = |detail: String| Error::Protocol {
            what: format!("resolve a revision of {repo}"),
            detail,
        };
        let info = self.model_info(repo, revision).await?;
        let sha = info
            .sha
            .ok_or_else(|| wrong("it names no commit (an empty repository?)".to_owned()))?;
        match revision.map(str::parse::<Commit>) {
            Some(Ok(asked)) if asked != sha => Err(wrong(format!("asked for {asked}, got {sha}"))),
            _ => Ok(sha),
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
        .filter(|scope| {
            let permissions = scope
                .get("permissions")
                .and_then(Value::as_array)
                .into_iter()
                .flatten();
            permissions
                .filter_map(Value::as_str)
                .any(|p| p == "repo.write")
        })
        .filter_map(|scope| {
            scope
                .get("entity")?
                .get("name")?
                .as_str()
                .map(str::to_owned)
        })
        .collect()
}
