//! The operator's config: which catalog sources make up the view.
//!
//! Invariant: the built-in catalog is always in the list, first unless the config gives it another place.

use std::path::{Path, PathBuf};

use crate::diagnostic::{At, Report, did_you_mean};
use crate::entry::{Source, SourceKind};
use crate::name;
use crate::yaml::{Field, Mapping, Node, Value};

/// A config that `catalog init` writes.
pub(crate) const TEMPLATE: &str = include_str!("template.yaml");

const ITEM_FIELDS: [&str; 4] = ["path", "namespace", "hf_owner", "hf_collection"];

/// A source that the view is made of, not yet read.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Builtin,
    /// The file to read and what the config says of it.
    Path(PathBuf, Source),
}

/// The sources that `text`, the config at `path`, lists. `home` is what `~` stands for.
pub(crate) fn read(path: &Path, text: &str, home: Option<&Path>, report: &mut Report) -> Vec<Item> {
    let file = path.display().to_string();
    let Some(top) = report.mapping(&file, text, "catalogs") else {
        return Vec::new();
    };
    for field in top
        .fields
        .iter()
        .filter(|field| !matches!(field.name.as_str(), "catalogs" | "catalogues"))
    {
        if did_you_mean(&field.name, ["catalogs"]).is_some() {
            let at = At {
                file: &file,
                place: field.place,
                entry: None,
            };
            report.warning(
                &at,
                format!("unknown field '{}' is ignored", field.name),
                "did you mean catalogs?",
            );
        }
    }
    let mut items = match (top.get("catalogs"), top.get("catalogues")) {
        (Some(_), Some(legacy)) => {
            let at = At {
                file: &file,
                place: legacy.place,
                entry: None,
            };
            report.error(
                &at,
                "set only one of catalogs or the legacy key catalogues",
                "move the items below catalogs",
            );
            return Vec::new();
        }
        (Some(field), None) | (None, Some(field)) => list(path, &file, field, home, report),
        (None, None) => Vec::new(),
    };
    if !items.iter().any(|item| matches!(item, Item::Builtin)) {
        items.insert(0, Item::Builtin);
    }
    items
}

fn list(
    path: &Path,
    file: &str,
    field: &Field,
    home: Option<&Path>,
    report: &mut Report,
) -> Vec<Item> {
    let Value::List(nodes) = &field.value.value else {
        let at = At {
            file,
            place: field.place,
            entry: None,
        };
        report.error(
            &at,
            "catalogs must be a list",
            format!(
                "it is {}; write `catalogs: []` for none",
                field.value.kind()
            ),
        );
        return Vec::new();
    };
    let mut items: Vec<Item> = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        let who = format!("catalogs[{index}]");
        let item = ItemReader {
            file,
            who: &who,
            node,
            report,
        }
        .read(path, home);
        if matches!(item, Some(Item::Builtin))
            && items.iter().any(|item| matches!(item, Item::Builtin))
        {
            let at = At {
                file,
                place: node.place,
                entry: None,
            };
            report.error(
                &at,
                format!("{who}: duplicate catalog source builtin:foxlight"),
                "list the built-in catalog once",
            );
            continue;
        }
        items.extend(item);
    }
    items
}

struct ItemReader<'a> {
    file: &'a str,
    who: &'a str,
    node: &'a Node,
    report: &'a mut Report,
}

impl ItemReader<'_> {
    fn error(&mut self, node: &Node, message: &str, hint: impl Into<String>) {
        let at = At {
            file: self.file,
            place: node.place,
            entry: None,
        };
        self.report
            .error(&at, format!("{}{message}", self.who), hint);
    }

    fn read(&mut self, config: &Path, home: Option<&Path>) -> Option<Item> {
        let node = self.node;
        let Value::Mapping(fields) = &node.value else {
            self.error(
                node,
                " must be a mapping",
                format!(
                    "it is {}; write `- path: ...` with namespace and hf_owner below it",
                    node.kind()
                ),
            );
            return None;
        };
        match (fields.get("builtin"), fields.get("path")) {
            (Some(builtin), None) => self.builtin(fields, builtin),
            (None, Some(_)) => self.path(fields, config, home),
            _ => {
                self.error(
                    node,
                    " must set exactly one of builtin or path",
                    "`builtin: foxlight`, or `path` with namespace and hf_owner",
                );
                None
            }
        }
    }

    fn builtin(&mut self, fields: &Mapping, builtin: &Field) -> Option<Item> {
        match &builtin.value.value {
            Value::String(name) if name == "foxlight" => {}
            Value::String(name) => {
                self.error(
                    &builtin.value,
                    &format!(": unsupported builtin catalog: {name}"),
                    "the only one is foxlight",
                );
                return None;
            }
            _ => {
                self.error(
                    &builtin.value,
                    ".builtin must be a non-empty string",
                    "write `builtin: foxlight`",
                );
                return None;
            }
        }
        if let Some(other) = fields.fields.iter().find(|field| field.name != "builtin") {
            let message = ": builtin catalogs do not accept overrides";
            self.error(
                &other.value,
                message,
                format!(
                    "remove {}; put entries of your own into a file and list it by path",
                    other.name
                ),
            );
            return None;
        }
        Some(Item::Builtin)
    }

    fn path(&mut self, fields: &Mapping, config: &Path, home: Option<&Path>) -> Option<Item> {
        let unknown: Vec<&Field> = fields
            .fields
            .iter()
            .filter(|field| !ITEM_FIELDS.contains(&field.name.as_str()))
            .collect();
        if let Some(first) = unknown.first() {
            let names: Vec<String> = unknown
                .iter()
                .map(|field| format!("'{}'", field.name))
                .collect();
            let absent = ITEM_FIELDS
                .into_iter()
                .filter(|name| fields.get(name).is_none());
            let hint = match did_you_mean(&first.name, absent) {
                Some(name) => format!("did you mean {name}?"),
                None => format!("the fields are {}", ITEM_FIELDS.join(", ")),
            };
            let place = Node {
                place: first.place,
                value: Value::Null,
            };
            self.error(
                &place,
                &format!(": unsupported fields [{}]", names.join(", ")),
                hint,
            );
        }
        let path = self.string(fields, "path");
        let namespace = self.string(fields, "namespace");
        let hf_owner = self.string(fields, "hf_owner");
        let hf_collection = match fields.get("hf_collection") {
            None => None,
            Some(field) if matches!(field.value.value, Value::Null) => None,
            Some(_) => self.string(fields, "hf_collection"),
        };
        if let Some((namespace, node)) = namespace
            && !name::is_namespace(namespace)
        {
            self.error(
                node,
                " namespace must be lowercase kebab/dot-case",
                "use a-z, 0-9, '.', '_' and '-', starting with a letter or digit",
            );
        }
        if let Some((owner, node)) = hf_owner
            && !name::is_repo(&format!("{owner}/x"))
        {
            self.error(
                node,
                ".hf_owner must be the name of a user or organization",
                "use letters, digits, '.', '_' and '-'",
            );
        }
        if let Some((collection, node)) = hf_collection {
            if !name::is_repo(collection) {
                self.error(
                    node,
                    ".hf_collection must look like owner/slug",
                    "take what follows /collections/ in the collection's URL",
                );
            } else if let Some((owner, _)) = hf_owner
                && name::owner(collection) != owner
            {
                self.error(
                    node,
                    &format!(".hf_collection owner must be '{owner}'"),
                    format!("it is '{}'", name::owner(collection)),
                );
            }
        }
        let path = expand(path?.0, config, home);
        let source = Source {
            kind: SourceKind::Path,
            name: path
                .file_stem()
                .map(|stem| stem.to_string_lossy().into_owned())
                .unwrap_or_default(),
            namespace: Some(namespace?.0.to_owned()),
            hf_owner: Some(hf_owner?.0.to_owned()),
            hf_collection: hf_collection.map(|(slug, _)| slug.to_owned()),
            entries: 0,
            origin: path.display().to_string(),
        };
        Some(Item::Path(path, source))
    }

    fn string<'a>(&mut self, fields: &'a Mapping, name: &str) -> Option<(&'a str, &'a Node)> {
        let node = match fields.get(name) {
            Some(field) => &field.value,
            None => {
                let node = self.node;
                self.error(
                    node,
                    &format!(".{name} must be a non-empty string"),
                    format!("add `{name}: ...`"),
                );
                return None;
            }
        };
        match &node.value {
            Value::String(text) if !text.trim().is_empty() => return Some((text, node)),
            Value::Other(text, kind) => {
                let hint = format!(
                    "an unquoted {text} is {kind} in YAML; write it in quotes if it is meant: '{text}'"
                );
                self.error(node, &format!(".{name} must be a non-empty string"), hint);
            }
            _ => self.error(
                node,
                &format!(".{name} must be a non-empty string"),
                format!(
                    "it is {}",
                    if matches!(node.value, Value::String(_)) {
                        "blank"
                    } else {
                        node.kind()
                    }
                ),
            ),
        }
        None
    }
}

/// `written`, where `~` is the home directory, seen from the config's directory.
fn expand(written: &str, config: &Path, home: Option<&Path>) -> PathBuf {
    let path = crate::scratch::expand_home(Path::new(written), home);
    match config.parent() {
        Some(parent) => parent.join(path),
        None => path,
    }
}
