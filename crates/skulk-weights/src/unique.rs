//! What must be unique among the entries of all sources, and which repository may serve which purpose.
//!
//! Invariant: names are compared without case, as file systems and the Hub do. A message names the other place.

use std::collections::HashMap;

use crate::diagnostic::{At, Report};
use crate::manifest::{Draft, Named};

/// Reports every name that an earlier entry already has.
pub(crate) fn check(drafts: &[Draft], report: &mut Report) {
    names(
        drafts,
        report,
        |draft| draft.key.as_ref(),
        |_, other_file| {
            if other_file {
                "duplicate catalog key".to_owned()
            } else {
                "duplicate key".to_owned()
            }
        },
    );
    names(
        drafts,
        report,
        |draft| draft.output_name.as_ref(),
        |name, _| format!("duplicate output_name {name}"),
    );
    names(
        drafts,
        report,
        |draft| draft.hf_repo.as_ref(),
        |name, _| format!("duplicate hf_repo {name}"),
    );
    sidecars(drafts, report);
}

fn names(
    drafts: &[Draft],
    report: &mut Report,
    get: impl Fn(&Draft) -> Option<&Named>,
    message: impl Fn(&str, bool) -> String,
) {
    let mut first: HashMap<String, (&Draft, &Named)> = HashMap::new();
    for draft in drafts {
        let Some(named) = get(draft) else { continue };
        let folded = named.name.to_lowercase();
        let Some((other, other_named)) = first.get(&folded) else {
            first.insert(folded, (draft, named));
            continue;
        };
        let at = At {
            file: &draft.file,
            place: named.place,
            entry: Some(&draft.who),
        };
        let place = format!("{}:{}", other.file, other_named.place.line);
        let hint = if other_named.name == named.name {
            format!("first used by {} at {place}", other.who)
        } else {
            format!(
                "{} at {place} has {}, which differs only in case",
                other.who, other_named.name
            )
        };
        report.error(&at, message(&named.name, other.file != draft.file), hint);
    }
}

/// What a repository receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content<'a> {
    Vindex,
    /// Heads taken from that source.
    Mtp(&'a str),
    /// The vision weights of that source.
    Vision(&'a str),
}

impl Content<'_> {
    fn field(self) -> &'static str {
        match self {
            Content::Vindex => "hf_repo",
            Content::Mtp(_) => "mtp_sidecar_repo",
            Content::Vision(_) => "vision_sidecar_repo",
        }
    }
}

/// A repository receives one thing: publishing one sidecar must not overwrite or delete another artifact.
fn sidecars(drafts: &[Draft], report: &mut Report) {
    let mut first: HashMap<String, (&Draft, Content<'_>)> = HashMap::new();
    for draft in drafts {
        let vindex = draft.hf_repo.iter().map(|named| (named, Content::Vindex));
        let mtp = draft
            .mtp
            .iter()
            .map(|(from, to)| (to, Content::Mtp(&from.name)));
        let vision = draft
            .vision
            .iter()
            .map(|(from, to)| (to, Content::Vision(&from.name)));
        for (named, content) in vindex.chain(mtp).chain(vision) {
            let folded = named.name.to_lowercase();
            let Some((other, other_content)) = first.get(&folded).copied() else {
                first.insert(folded, (draft, content));
                continue;
            };
            if other_content == content {
                continue;
            }
            let at = At {
                file: &draft.file,
                place: named.place,
                entry: Some(&draft.who),
            };
            let (message, hint) = match (content, other_content) {
                (Content::Mtp(mine), Content::Mtp(theirs)) | (Content::Vision(mine), Content::Vision(theirs)) => (
                    format!("{} {} is shared with {}, whose source differs", content.field(), named.name, other.who),
                    format!("one holds weights of {mine}, the other of {theirs}; give each source its own sidecar repository"),
                ),
                _ => (
                    format!("{} {} is also the {} of {}", content.field(), named.name, other_content.field(), other.who),
                    "publishing one would overwrite the other; give each artifact its own repository".to_owned(),
                ),
            };
            report.error(&at, message, hint);
        }
    }
}
