//! What the Hub tells about a model that is to be added: which model it is a quantization of, how it is packed, whether
//! it has experts, heads, a vision tower, a companion assistant.
//!
//! Invariant: a question that the Hub refuses to answer is a failure, never "it has none". Small files only: tags,
//! `config.json`, the index, and the header of a checkpoint in a single file.

use std::sync::Arc;

use hub::{Hub, ModelInfo, RepoId};
use serde_json::Value;
use terminal::{Failure, tell};

use crate::mtp::heads;
use crate::mtp::source;
use crate::mtp::spelling::{Spelling, language_field};
use crate::vision::is_of_tower;

const CONFIG_FILE: &str = "config.json";
const INDEX_FILE: &str = "model.safetensors.index.json";
const FILE_BYTES_MAX: usize = 64 << 20;
/// Longest chain of quantizations of quantizations.
const N_HOPS_MAX: usize = 5;
/// Families with experts whose configuration or tags may not count them.
const MOE_FAMILIES: [&str; 8] = [
    "moe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "kimi_k2",
    "minimax",
    "llama4",
];
/// Fields of `config.json` that count experts.
const EXPERT_COUNTS: [&str; 6] = [
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "num_routed_experts",
    "num_experts_per_tok",
];

/// What was found.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Detected {
    /// The model that was asked for.
    pub(crate) model: String,
    /// The model that it is a quantization of, at the end of the chain; itself where it is none.
    pub(crate) root: String,
    pub(crate) quant: &'static str,
    pub(crate) is_moe: bool,
    pub(crate) heads: Option<HeadsAt>,
    pub(crate) assistant: Option<String>,
    /// The repository with the vision weights that the model leaves out.
    pub(crate) vision: Option<String>,
    pub(crate) notes: Vec<String>,
}

/// Where heads are.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct HeadsAt {
    pub(crate) repo: String,
    pub(crate) n_tensors: usize,
}

/// Asks the Hub about `model`.
pub(crate) async fn detect(model: &str, hub: &Hub) -> Result<Detected, Failure> {
    tell(format_args!("fetching metadata for {model}..."));
    let own = Looked::at(model, hub).await?;
    let root = root(&own, hub).await?;
    let quant = quant(model, &own);
    let mut detected = Detected {
        model: model.to_owned(),
        root: root.id.clone(),
        quant,
        is_moe: own.is_moe() || root.is_moe(),
        heads: None,
        assistant: None,
        vision: None,
        notes: Vec::new(),
    };
    if quant != "q4k" {
        return Ok(detected);
    }
    // The base of a fine-tune has heads of its own, which were not tuned with this model.
    let mut sources = vec![root.id.clone()];
    sources.extend(root.base().filter(|base| *base != root.id));
    for id in &sources {
        tell(format_args!("checking {id} for MTP heads..."));
        let looked = match id == &root.id {
            true => root.clone(),
            false => match Looked::if_any(id, hub).await? {
                Some(looked) => looked,
                None => continue,
            },
        };
        if let Some(n_tensors) = looked.n_heads(hub, &mut detected.notes).await? {
            detected.heads = Some(HeadsAt {
                repo: id.clone(),
                n_tensors,
            });
            break;
        }
    }
    if detected.heads.is_none() {
        detected.assistant = assistant(&own, &root, hub).await?;
    }
    let has_tower = |looked: &Looked| looked.index_names().any(is_of_tower);
    if root.id != own.id
        && own.index_names().next().is_some()
        && !has_tower(&own)
        && has_tower(&root)
    {
        detected.vision = Some(root.id.clone());
    }
    Ok(detected)
}

/// What was read of one repository.
#[derive(Debug, Clone)]
struct Looked {
    id: String,
    repo: RepoId,
    info: ModelInfo,
    config: Value,
    index: Value,
}

impl Looked {
    async fn at(id: &str, hub: &Hub) -> Result<Looked, Failure> {
        match Looked::if_any(id, hub).await? {
            Some(looked) => Ok(looked),
            None => Err(Failure::new(format!(
                "there is no model {id}, or none that this token may see"
            ))
            .hint("check the name; set HF_TOKEN if the repository is private or gated")),
        }
    }

    /// `None` when there is no such repository.
    async fn if_any(id: &str, hub: &Hub) -> Result<Option<Looked>, Failure> {
        let unread = |what: &str, error: hub::Error| {
            let failure = Failure::new(format!("cannot read {what}")).cause(error);
            failure.hint("check HF_TOKEN, and that the terms of a gated repository were accepted")
        };
        let repo: RepoId = id.parse().map_err(|error| unread(id, error))?;
        let info = match hub.model_info(&repo, None).await {
            Ok(info) => info,
            Err(hub::Error::RepoNotFound { .. }) => return Ok(None),
            Err(error) => return Err(unread(id, error)),
        };
        let mut looked = Looked {
            id: id.to_owned(),
            repo,
            info,
            config: Value::Null,
            index: Value::Null,
        };
        let Some(commit) = looked.info.sha.clone() else {
            return Ok(Some(looked));
        };
        for (file, value) in [
            (CONFIG_FILE, &mut looked.config),
            (INDEX_FILE, &mut looked.index),
        ] {
            let read = hub
                .small_file(&looked.repo, &commit, file, FILE_BYTES_MAX)
                .await;
            match read.map_err(|error| unread(&format!("{file} of {id}"), error))? {
                None => {}
                Some(bytes) => {
                    *value = serde_json::from_slice(&bytes)
                        .map_err(Failure::of(format!("{file} of {id} is no JSON")))?;
                }
            }
        }
        Ok(Some(looked))
    }

    fn tags(&self) -> impl Iterator<Item = &str> {
        self.info.tags.iter().map(String::as_str)
    }

    /// The model that this one is tagged as a quantization of.
    fn quantized_from(&self) -> Option<&str> {
        self.tags()
            .find_map(|tag| tag.strip_prefix("base_model:quantized:"))
    }

    /// The model that this one is based on in a way that no tag tells: not a fine-tune, adapter or merge of it.
    fn base(&self) -> Option<String> {
        let related = |id: &str| {
            let is_of = |relation: &str| {
                self.tags()
                    .any(|tag| tag == format!("base_model:{relation}:{id}"))
            };
            ["finetune", "adapter", "merge"].into_iter().any(is_of)
        };
        let plain = self
            .tags()
            .filter_map(|tag| tag.strip_prefix("base_model:"));
        let mut plain = plain.filter(|id| !id.contains(':') && id.contains('/') && !related(id));
        plain.next().map(str::to_owned)
    }

    fn is_moe(&self) -> bool {
        let counted = |name: &str| {
            language_field(&self.config, name)
                .and_then(Value::as_u64)
                .is_some_and(|n| n > 1)
        };
        let model_type = language_field(&self.config, "model_type").and_then(Value::as_str);
        let of_family = |text: &str| {
            let text = text.to_lowercase();
            MOE_FAMILIES.iter().any(|family| {
                text == *family
                    || text.starts_with(&format!("{family}_"))
                    || text.ends_with(&format!("_{family}"))
            })
        };
        EXPERT_COUNTS.iter().any(|name| counted(name))
            || model_type.is_some_and(of_family)
            || self.tags().any(of_family)
    }

    fn index_names(&self) -> impl Iterator<Item = &str> + Clone {
        self.index
            .get("weight_map")
            .and_then(Value::as_object)
            .into_iter()
            .flat_map(|map| map.keys())
            .map(String::as_str)
    }

    /// How many head tensors it has; `None` when it has none.
    async fn n_heads(&self, hub: &Hub, notes: &mut Vec<String>) -> Result<Option<usize>, Failure> {
        if let Some(spelling) = Spelling::of(self.index_names(), &self.config) {
            return Ok(Some(
                self.index_names()
                    .filter(|name| spelling.rename(name).is_some())
                    .count(),
            ));
        }
        if !self.index.is_null() || self.info.sha.is_none() {
            return Ok(None);
        }
        // No index: a checkpoint in a single file has its names in its header.
        let opened = source::open_repo(&self.repo, hub).await?;
        let files = Arc::clone(&opened.files);
        let found = tokio::task::spawn_blocking(move || {
            let names = heads::names(&*files)?;
            names.n_in_headers(&*files)
        });
        let found = found
            .await
            .map_err(Failure::of("cannot read the headers"))??;
        if let Some((n_files, _)) = found {
            let what = if n_files == 1 {
                "a single file".to_owned()
            } else {
                format!("{n_files} files")
            };
            notes.push(format!(
                "{} is {what} without an index: its header was read",
                self.id
            ));
        }
        Ok(found.map(|(_, n)| n).filter(|n| *n > 0))
    }
}

/// The end of the chain of quantizations; a link that cannot be read is the end.
async fn root(own: &Looked, hub: &Hub) -> Result<Looked, Failure> {
    let mut at = own.clone();
    for _ in 0..N_HOPS_MAX {
        let Some(next) = at.quantized_from().map(str::to_owned) else {
            break;
        };
        match Looked::if_any(&next, hub).await? {
            Some(looked) => at = looked,
            None => break,
        }
    }
    Ok(at)
}

/// `q8k` for a model that is packed in 8 bits, by its configuration or, as a whole word, its name or tags.
fn quant(model: &str, own: &Looked) -> &'static str {
    let bits = ["quantization", "quantization_config"]
        .iter()
        .find_map(|name| own.config.get(*name)?.get("bits")?.as_u64());
    match bits {
        Some(8) => return "q8k",
        Some(_) => return "q4k",
        None => {}
    }
    let is_8_bit = |text: &str| {
        let text = text.to_lowercase();
        let mut words = text.split(|c: char| !c.is_ascii_alphanumeric());
        text.contains("8-bit") || words.any(|word| matches!(word, "8bit" | "q8" | "int8"))
    };
    let name = model.rsplit('/').next().unwrap_or(model);
    // A base that is packed in 8 bits says nothing about this model.
    let mut tags = own.tags().filter(|tag| !tag.starts_with("base_model:"));
    if is_8_bit(name) || tags.any(is_8_bit) {
        "q8k"
    } else {
        "q4k"
    }
}

/// The first `X-assistant` that is there, of the model, of what it was quantized from or is based on, and of the root.
async fn assistant(own: &Looked, root: &Looked, hub: &Hub) -> Result<Option<String>, Failure> {
    tell("checking for a companion assistant...");
    let mut models = vec![own.id.clone()];
    models.extend(
        own.quantized_from()
            .map(str::to_owned)
            .or_else(|| own.base()),
    );
    models.push(root.id.clone());
    models.dedup();
    for model in models {
        let id = format!("{model}-assistant");
        let asked = async { hub.model_info(&id.parse()?, None).await };
        match asked.await {
            Ok(_) => return Ok(Some(id)),
            Err(hub::Error::RepoNotFound { .. }) => {}
            Err(error) => {
                return Err(Failure::new(format!(
                    "could not check for the companion assistant {id}"
                ))
                .cause(error));
            }
        }
    }
    Ok(None)
}
