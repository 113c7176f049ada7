//! One manifest: a list of models to publish, read from YAML and held to every rule that needs no other entry.
//!
//! Invariant: an [`Entry`] satisfies every rule of its own. Rules that compare entries are in `unique`.

use crate::diagnostic::{At, Report, did_you_mean};
use crate::entry::{Entry, Sidecar, Slice, Source, Tier};
use crate::name;
use crate::yaml::{Mapping, Node, Place, Value};

/// Every field of an entry, in the order of the manifest reference.
pub(crate) const FIELDS: [&str; 13] = [
    "key",
    "source_model",
    "quant",
    "tier",
    "slices",
    "output_name",
    "hf_repo",
    "hf_collection",
    "mtp_source_repo",
    "mtp_sidecar_repo",
    "assistant_model_repo",
    "vision_source_repo",
    "vision_sidecar_repo",
];

const QUANTS: [&str; 1] = ["q4k"];

/// A name of an entry that must be unique, as it stands in the file.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) place: Place,
}

/// An entry as far as it could be read; `entry` is present when nothing was wrong with it.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    /// The file, as messages name it.
    pub(crate) file: String,
    /// The effective key, or `models[i]`.
    pub(crate) who: String,
    /// The effective key.
    pub(crate) key: Option<Named>,
    pub(crate) output_name: Option<Named>,
    pub(crate) hf_repo: Option<Named>,
    pub(crate) mtp: Option<(Named, Named)>,
    pub(crate) vision: Option<(Named, Named)>,
    pub(crate) entry: Option<Entry>,
}

/// Reads the entries of `text`, which belongs to `source`; everything that is wrong goes into `report`.
pub(crate) fn read(source: &Source, text: &str, report: &mut Report) -> Vec<Draft> {
    let file = source.label();
    let Some(top) = report.mapping(&file, text, "models") else {
        return Vec::new();
    };
    let Some(models) = top.get("models") else {
        let hint = match did_you_mean("models", top.fields.iter().map(|field| field.name.as_str()))
        {
            Some(name) => format!("there is a `{name}:`; rename it to `models:`"),
            None => "add `models:` with at least one entry".to_owned(),
        };
        report.file_error(&file, "models must be a non-empty list", hint);
        return Vec::new();
    };
    let items = match &models.value.value {
        Value::List(items) if !items.is_empty() => items,
        _ => {
            let at = At {
                file: &file,
                place: models.place,
                entry: None,
            };
            report.error(
                &at,
                "models must be a non-empty list",
                format!(
                    "it is {}; write one `- key: ...` for each model",
                    empty_or(&models.value)
                ),
            );
            return Vec::new();
        }
    };
    for (name, place) in &top.repeated {
        report.warning(
            &At {
                file: &file,
                place: *place,
                entry: None,
            },
            format!("{name} is set twice; the last one counts"),
            "keep one of them",
        );
    }
    items
        .iter()
        .enumerate()
        .map(|(index, item)| draft(source, &file, index, item, report))
        .collect()
}

fn empty_or(node: &Node) -> &'static str {
    match &node.value {
        Value::List(items) if items.is_empty() => "an empty list",
        _ => node.kind(),
    }
}

fn draft(source: &Source, file: &str, index: usize, item: &Node, report: &mut Report) -> Draft {
    let mut draft = Draft {
        file: file.to_owned(),
        who: format!("models[{index}]"),
        key: None,
        output_name: None,
        hf_repo: None,
        mtp: None,
        vision: None,
        entry: None,
    };
    let Value::Mapping(fields) = &item.value else {
        let at = At {
            file,
            place: item.place,
            entry: None,
        };
        report.error(
            &at,
            format!("models[{index}] must be a mapping"),
            format!(
                "it is {}; write `- key: ...` and the other fields below it",
                item.kind()
            ),
        );
        return draft;
    };
    let n_errors_before = report.n_errors;
    let index_who = draft.who.clone();
    let key = Fields {
        file,
        who: &index_who,
        place: item.place,
        fields,
        report,
    }
    .required("key");
    if let Some(key) = &key {
        draft.who = match &source.namespace {
            Some(namespace) => format!("{namespace}/{}", key.name),
            None => key.name.clone(),
        };
        draft.key = Some(Named {
            name: draft.who.clone(),
            place: key.place,
        });
    }
    let who = draft.who.clone();
    let mut read = Fields {
        file,
        who: &who,
        place: item.place,
        fields,
        report,
    };
    if let Some(key) = &key {
        read.hold(
            key,
            name::is_key(&key.name),
            "key must be lowercase kebab-case",
            "use a-z, 0-9 and -, starting with a letter or digit",
        );
    }
    let source_model = read.source_model();
    let quant = read.quant();
    let tier = read.tier();
    let slices = read.slices();
    draft.output_name = read.output_name();
    draft.hf_repo = read.hf_repo(source);
    let hf_collection = read.collection(source);
    draft.mtp = read.sidecar(
        "mtp_source_repo",
        "mtp_sidecar_repo",
        draft.hf_repo.as_ref(),
    );
    let assistant = read.assistant();
    draft.vision = read.sidecar(
        "vision_source_repo",
        "vision_sidecar_repo",
        draft.hf_repo.as_ref(),
    );
    read.unknown_and_repeated();

    if report.n_errors == n_errors_before {
        draft.entry = (|| {
            let sidecar = |pair: &Option<(Named, Named)>| {
                pair.as_ref().map(|(from, to)| Sidecar {
                    source_repo: from.name.clone(),
                    sidecar_repo: to.name.clone(),
                })
            };
            Some(Entry {
                key: draft.key.as_ref()?.name.clone(),
                source_model: source_model?.name,
                quant: quant?.name,
                tier: tier?,
                slices: slices?,
                output_name: draft.output_name.as_ref()?.name.clone(),
                hf_repo: draft.hf_repo.as_ref()?.name.clone(),
                hf_collection: hf_collection
                    .map(|named| named.name)
                    .or_else(|| source.hf_collection.clone()),
                mtp: sidecar(&draft.mtp),
                assistant_model_repo: assistant.map(|named| named.name),
                vision: sidecar(&draft.vision),
            })
        })();
    }
    draft
}

/// The fields of one entry while they are read.
struct Fields<'a> {
    file: &'a str,
    who: &'a str,
    place: Place,
    fields: &'a Mapping,
    report: &'a mut Report,
}

impl Fields<'_> {
    fn error(&mut self, place: Place, message: impl Into<String>, hint: impl Into<String>) {
        self.report.error(
            &At {
                file: self.file,
                place,
                entry: Some(self.who),
            },
            message,
            hint,
        );
    }

    /// Reports `message` unless `holds`.
    fn hold(&mut self, named: &Named, holds: bool, message: &str, hint: &str) {
        if !holds {
            self.error(named.place, message, hint);
        }
    }

    /// The field's string, when it has one that is not blank; anything else but absence is reported.
    fn string(&mut self, field_name: &str) -> Option<Named> {
        let field = self.fields.get(field_name)?;
        let hint = match &field.value.value {
            Value::String(text) if !text.trim().is_empty() => {
                return Some(Named {
                    name: text.clone(),
                    place: field.value.place,
                });
            }
            Value::String(_) => "it is blank; give it a value".to_owned(),
            Value::Other(text, kind) => format!(
                "an unquoted {text} is {kind} in YAML; write it in quotes if it is meant: '{text}'"
            ),
            _ => format!("it is {}; give it one string", field.value.kind()),
        };
        self.error(
            field.value.place,
            format!("{field_name} must be a non-empty string"),
            hint,
        );
        None
    }

    fn required(&mut self, field_name: &str) -> Option<Named> {
        match self.fields.get(field_name) {
            Some(_) => self.string(field_name),
            None => {
                let unknown = self
                    .fields
                    .fields
                    .iter()
                    .map(|field| field.name.as_str())
                    .filter(|name| !FIELDS.contains(name));
                let hint = match did_you_mean(field_name, unknown) {
                    Some(written) => {
                        format!("there is a `{written}:`; rename it to `{field_name}:`")
                    }
                    None => format!("add `{field_name}: ...` to this entry"),
                };
                self.error(
                    self.place,
                    format!("{field_name} must be a non-empty string"),
                    hint,
                );
                None
            }
        }
    }

    fn optional(&mut self, field_name: &str) -> Option<Named> {
        match self.fields.get(field_name) {
            Some(field) if matches!(field.value.value, Value::Null) => None,
            _ => self.string(field_name),
        }
    }

    fn is_set(&self, field_name: &str) -> bool {
        self.fields
            .get(field_name)
            .is_some_and(|field| !matches!(field.value.value, Value::Null))
    }

    /// Reports a repository whose name does not look like one.
    fn hold_repo(&mut self, field_name: &str, named: &Named) -> bool {
        let holds = name::is_repo(&named.name);
        if !holds {
            self.error(
                named.place,
                format!("{field_name} must look like owner/name"),
                repo_hint(&named.name),
            );
        }
        holds
    }

    fn source_model(&mut self) -> Option<Named> {
        let named = self.required("source_model")?;
        let hint = repo_hint(&named.name);
        self.hold(
            &named,
            name::is_source_model(&named.name),
            "source_model must look like owner/name",
            &hint,
        );
        Some(named)
    }

    fn quant(&mut self) -> Option<Named> {
        let named = self.required("quant")?;
        let hint = one_of(&named.name, &QUANTS);
        self.hold(
            &named,
            QUANTS.contains(&named.name.as_str()),
            &format!("unsupported quant '{}'", named.name),
            &hint,
        );
        Some(named)
    }

    fn tier(&mut self) -> Option<Tier> {
        let named = self.required("tier")?;
        match named.name.as_str() {
            "smoke" => Some(Tier::Smoke),
            "moe" => Some(Tier::Moe),
            other => {
                self.error(
                    named.place,
                    format!("unsupported tier '{other}'"),
                    one_of(other, &["smoke", "moe"]),
                );
                None
            }
        }
    }

    fn slices(&mut self) -> Option<Vec<Slice>> {
        let known = ["full", "expert-server"];
        let Some(field) = self.fields.get("slices") else {
            self.error(
                self.place,
                "slices must be a non-empty list",
                "add `slices: [full]`",
            );
            return None;
        };
        let place = field.value.place;
        let items = match &field.value.value {
            Value::List(items) if !items.is_empty() => items,
            Value::String(text) => {
                self.error(
                    place,
                    "slices must be a non-empty list",
                    format!("write it as a list: [{text}]"),
                );
                return None;
            }
            _ => {
                self.error(
                    place,
                    "slices must be a non-empty list",
                    format!("it is {}; write `slices: [full]`", empty_or(&field.value)),
                );
                return None;
            }
        };
        let mut names = Vec::new();
        for item in items {
            match &item.value {
                Value::String(text) => names.push(text.as_str()),
                _ => {
                    self.error(
                        item.place,
                        "slices must contain only strings",
                        format!("this one is {}", item.kind()),
                    );
                    return None;
                }
            }
        }
        let mut unknown: Vec<String> = names
            .iter()
            .filter(|name| !known.contains(name))
            .map(|name| format!("'{name}'"))
            .collect();
        unknown.sort();
        unknown.dedup();
        if !unknown.is_empty() {
            let first = names
                .iter()
                .find(|name| !known.contains(name))
                .copied()
                .unwrap_or("");
            self.error(
                place,
                format!("unsupported slices [{}]", unknown.join(", ")),
                one_of(first, &known),
            );
            return None;
        }
        if names.contains(&"full") && names.len() > 1 {
            self.error(
                place,
                "full must not be combined with other slices",
                "full is the whole vindex; keep `slices: [full]`, or make a second entry",
            );
            return None;
        }
        if names.len() > 1 {
            self.error(
                place,
                format!("duplicate slice '{}' in slices", names[0]),
                "name it once",
            );
            return None;
        }
        Some(
            names
                .into_iter()
                .map(|name| {
                    if name == "full" {
                        Slice::Full
                    } else {
                        Slice::ExpertServer
                    }
                })
                .collect(),
        )
    }

    fn output_name(&mut self) -> Option<Named> {
        let named = self.required("output_name")?;
        let holds = name::is_output_name(&named.name);
        self.hold(&named, holds, "output_name must be a .vindex basename", "a directory name without a path that ends in .vindex, such as my-model-full-q4-k.vindex");
        Some(named)
    }

    fn hf_repo(&mut self, source: &Source) -> Option<Named> {
        let named = self.required("hf_repo")?;
        if self.hold_repo("hf_repo", &named) {
            self.hold_owner(
                "hf_repo",
                &named,
                source.hf_owner.as_deref(),
                "the source's hf_owner",
            );
        }
        Some(named)
    }

    fn hold_owner(&mut self, field_name: &str, named: &Named, owner: Option<&str>, whose: &str) {
        if let Some(owner) = owner
            && name::owner(&named.name) != owner
        {
            self.error(
                named.place,
                format!("{field_name} owner must be '{owner}'"),
                format!("it is '{}'; {whose} is '{owner}'", name::owner(&named.name)),
            );
        }
    }

    fn collection(&mut self, source: &Source) -> Option<Named> {
        let named = self.optional("hf_collection")?;
        if name::is_repo(&named.name) {
            self.hold_owner(
                "hf_collection",
                &named,
                source.hf_owner.as_deref(),
                "the source's hf_owner",
            );
        } else {
            self.error(
                named.place,
                "hf_collection must look like owner/slug",
                "take what follows /collections/ in the collection's URL",
            );
        }
        Some(named)
    }

    fn sidecar(&mut self, from: &str, to: &str, hf_repo: Option<&Named>) -> Option<(Named, Named)> {
        let (source, target) = (self.optional(from), self.optional(to));
        if self.is_set(from) != self.is_set(to) {
            let (set, unset) = if self.is_set(from) {
                (from, to)
            } else {
                (to, from)
            };
            let place = self.fields.get(set).map_or(self.place, |field| field.place);
            self.error(
                place,
                format!("{from} and {to} must both be set together or not at all"),
                format!("add {unset}, or remove {set}"),
            );
        }
        let source_ok = source
            .as_ref()
            .is_some_and(|named| self.hold_repo(from, named));
        let target_ok = target
            .as_ref()
            .is_some_and(|named| self.hold_repo(to, named));
        let (source, target) = (source?, target?);
        if target_ok && let Some(hf_repo) = hf_repo.filter(|repo| name::is_repo(&repo.name)) {
            self.hold_owner(
                to,
                &target,
                Some(name::owner(&hf_repo.name)),
                "the owner of hf_repo",
            );
        }
        (source_ok && target_ok).then_some((source, target))
    }

    fn assistant(&mut self) -> Option<Named> {
        let named = self.optional("assistant_model_repo")?;
        self.hold_repo("assistant_model_repo", &named);
        if self.is_set("mtp_source_repo") {
            let hint =
                "a model has an MTP sidecar or a companion assistant, never both; remove one";
            self.error(
                named.place,
                "assistant_model_repo and mtp_source_repo are mutually exclusive",
                hint,
            );
        }
        Some(named)
    }

    fn unknown_and_repeated(&mut self) {
        for field in self
            .fields
            .fields
            .iter()
            .filter(|field| !FIELDS.contains(&field.name.as_str()))
        {
            let absent = FIELDS
                .into_iter()
                .filter(|name| self.fields.get(name).is_none());
            let hint = match did_you_mean(&field.name, absent) {
                Some(name) => format!("did you mean {name}?"),
                None => format!("the fields are {}", FIELDS.join(", ")),
            };
            let at = At {
                file: self.file,
                place: field.place,
                entry: Some(self.who),
            };
            self.report.warning(
                &at,
                format!("unknown field '{}' is ignored", field.name),
                hint,
            );
        }
        for (name, place) in &self.fields.repeated {
            let at = At {
                file: self.file,
                place: *place,
                entry: Some(self.who),
            };
            self.report.warning(
                &at,
                format!("{name} is set twice; the last one counts"),
                "keep one of them",
            );
        }
    }
}

fn repo_hint(written: &str) -> String {
    match name::model_id(written) {
        Ok(id) if id != written.trim() && name::is_source_model(&id) => {
            format!("write it without the address: {id}")
        }
        _ => format!(
            "'{written}' is not one owner and one name of letters, digits, '.', '_' and '-'"
        ),
    }
}

fn one_of(written: &str, known: &[&str]) -> String {
    match did_you_mean(written, known.iter().copied()) {
        Some(name) => format!("did you mean {name}?"),
        None => format!("one of: {}", known.join(", ")),
    }
}
