//! Every tensor of a checkpoint put into its part, by the family's name map, or left out with a reason.
//!
//! Invariant: no tensor of the checkpoint is lost without a word, and each that is used has the shape which the
//! configuration says and a type that we read.

use std::collections::{BTreeMap, BTreeSet};

use quant::BlockType;

use crate::checkpoint::{Checkpoint, Dtype, SourceTensor};
use crate::config::Config;
use crate::config_json::ConfigJson;
use crate::error::Error;
use crate::families::{Family, Need, Place, Row};
use crate::plan::{Component, LeftOut, Order, PlannedPart, PlannedTensor, Values};
use crate::recipe::Recipe;

/// As many missing tensors are listed; a configuration that lies about its layers has no end of them.
const MISSING_MAX: usize = 1_000;

pub(crate) struct Placed {
    pub(crate) parts: Vec<PlannedPart>,
    pub(crate) left_out: Vec<LeftOut>,
}

/// Blocks of the checkpoint that predict further tokens and that the family's name map knows: `mtp.layers.0` and so on.
pub(crate) fn n_nextn(checkpoint: &Checkpoint, family: &Family) -> u32 {
    let is_known = family
        .lines()
        .iter()
        .any(|line| line[0].place == Place::NextN);
    let block = |name: &str| {
        let name = name.strip_prefix("model.").unwrap_or(name);
        let number = name.strip_prefix("mtp.layers.")?.split('.').next()?;
        number.parse::<u32>().ok()
    };
    let blocks: BTreeSet<u32> = checkpoint
        .tensors()
        .filter_map(|(name, _)| block(name))
        .collect();
    // Blocks after one that is missing have no number in the vindex.
    let n = (0..)
        .zip(&blocks)
        .take_while(|(n, block)| n == *block)
        .count();
    if is_known { n as u32 } else { 0 }
}

pub(crate) fn place(
    checkpoint: &Checkpoint,
    json: &ConfigJson,
    family: &Family,
    config: &Config,
    recipe: Recipe,
) -> Result<Placed, Error> {
    let mut found = Found::of(checkpoint)?;
    let n_layers = config.n_layers;
    let part = |component| PlannedPart {
        component,
        tensors: Vec::new(),
    };
    let mut parts = vec![part(Component::Metadata), part(Component::Embeddings)];
    for layer in 0..n_layers {
        parts.push(part(Component::Attention { layer }));
        parts.push(part(Component::FeedForward { layer }));
    }
    for layer in n_layers..n_layers + config.n_nextn {
        parts.push(part(Component::NextN { layer }));
    }
    'lines: for line in family.lines() {
        let layers = match line[0] {
            row if row.place == Place::NextN => n_layers..n_layers + 1,
            row if row.source.contains("{l}") => 0..n_layers + config.n_nextn,
            _ => 0..1,
        };
        for layer in layers {
            let part = match line[0].place {
                Place::Embeddings => 1,
                _ if layer >= n_layers => 2 + n_layers as usize + layer as usize,
                Place::Attention => 2 + 2 * layer as usize,
                Place::FeedForward | Place::NextN => 3 + 2 * layer as usize,
            };
            let Some(row) = found.choose(&line, layer, config) else {
                continue;
            };
            parts[part]
                .tensors
                .extend(found.take(row, layer, family, config, recipe)?);
            if found.missing.len() >= MISSING_MAX {
                break 'lines;
            }
        }
    }
    if !found.missing.is_empty() {
        return Err(Error::MissingTensors {
            tensors: found.missing,
        });
    }
    if let Some(values) = json.rope_factors(config)? {
        let ne = vec![values.len() as u64];
        let name = "rope_freqs.weight".to_owned();
        let block_type = recipe.block_type(&name, &ne);
        parts[1].tensors.push(PlannedTensor {
            name,
            ne,
            block_type,
            values: Values::Computed { values },
        });
    }
    Ok(Placed {
        parts,
        left_out: found.rest(json, family, config)?,
    })
}

/// The checkpoint's tensors under the names of the name maps, and what has been made of them.
struct Found<'a> {
    /// Name in the map, then name in the checkpoint and its tensor.
    tensors: BTreeMap<String, (&'a str, &'a SourceTensor)>,
    used: BTreeSet<String>,
    missing: Vec<String>,
}

impl<'a> Found<'a> {
    fn of(checkpoint: &'a Checkpoint) -> Result<Found<'a>, Error> {
        let mut tensors: BTreeMap<String, (&str, &SourceTensor)> = BTreeMap::new();
        for (name, tensor) in checkpoint.tensors() {
            // A model inside a multimodal one: `language_model.model.…` or `model.language_model.…`.
            let plain = name.replacen("language_model.", "", 1);
            let plain = match plain.strip_prefix("model.mtp.") {
                Some(rest) => format!("mtp.{rest}"),
                None => plain,
            };
            if let Some((other, _)) = tensors.insert(plain, (name, tensor)) {
                let reason = format!("tensors {name} and {other} are two of one name");
                return Err(Error::Checkpoint {
                    file: tensor.file.clone(),
                    reason,
                });
            }
        }
        Ok(Found {
            tensors,
            used: BTreeSet::new(),
            missing: Vec::new(),
        })
    }

    /// Which of the alternatives of a line the checkpoint has in `layer`: the first that is there, or the first that should
    /// be; `None` when none is needed.
    fn choose(&self, line: &[&'static Row], layer: u32, config: &Config) -> Option<&'static Row> {
        let needed = |row: &&Row| row.when.need(config, layer) != Need::No;
        let is_there = |row: &&Row| {
            let name = source(row, layer, config).replace("{e}", "0");
            self.tensors.contains_key(&name)
        };
        let mut rows = line.iter().copied().filter(needed);
        let first = rows.clone().next()?;
        match rows.find(is_there) {
            None if first.when.need(config, layer) == Need::IfThere => None,
            found => Some(found.unwrap_or(first)),
        }
    }

    /// The tensor of one line of the map in one layer; `None` with a note in `missing` when it is not there.
    fn take(
        &mut self,
        row: &Row,
        layer: u32,
        family: &Family,
        config: &Config,
        recipe: Recipe,
    ) -> Result<Option<PlannedTensor>, Error> {
        let shape: Vec<u64> = row.shape.iter().map(|d| d.of(config, layer)).collect();
        let in_layer = source(row, layer, config);
        let n_experts = config
            .experts
            .filter(|_| row.source.contains("{e}"))
            .map(|e| e.n);
        if n_experts.is_some() {
            refuse_stacked(&self.tensors, &in_layer)?;
        }
        let mut sources = Vec::new();
        for expert in 0..n_experts.unwrap_or(1) {
            let plain = in_layer.replace("{e}", &expert.to_string());
            let Some(&(name, tensor)) = self.tensors.get(&plain) else {
                self.missing.push(plain);
                if self.missing.len() >= MISSING_MAX {
                    return Ok(None);
                }
                continue;
            };
            if row.fold.is_packed() {
                check_bytes(name, tensor, &shape)?;
            } else {
                check(name, tensor, &shape)?;
            }
            self.used.insert(plain);
            sources.push(name.to_owned());
        }
        if sources.len() != n_experts.unwrap_or(1) as usize {
            return Ok(None);
        }
        let prefix = if row.source.contains("{l}") || row.place == Place::NextN {
            format!("blk.{layer}.")
        } else {
            String::new()
        };
        let name = prefix + row.target;
        let shape = row.fold.shape(&shape, config);
        let ne: Vec<u64> = shape
            .into_iter()
            .rev()
            .chain(n_experts.map(u64::from))
            .collect();
        let transform = row.fold.transform(family, config);
        if row.fold.is_packed() {
            return self.packed(&in_layer, name, ne, transform.order);
        }
        let block_type = recipe.block_type(&name, &ne);
        Ok(Some(PlannedTensor {
            name,
            ne,
            block_type,
            values: Values::Checkpoint {
                tensors: sources,
                transform,
            },
        }))
    }

    /// A tensor whose blocks are kept: `blocks` was taken already, its scales are beside it.
    fn packed(
        &mut self,
        blocks: &str,
        name: String,
        ne: Vec<u64>,
        order: Order,
    ) -> Result<Option<PlannedTensor>, Error> {
        let plain = blocks.replace("_blocks", "_scales");
        let (Some(&(blocks, of_blocks)), Some(&(scales, of_scales))) =
            (self.tensors.get(blocks), self.tensors.get(&plain))
        else {
            self.missing.push(plain);
            return Ok(None);
        };
        let shape = of_blocks
            .shape
            .split_last()
            .map_or(&[][..], |(_, rest)| rest);
        check_bytes(scales, of_scales, shape)?;
        self.used.insert(plain);
        Ok(Some(PlannedTensor {
            name,
            ne,
            block_type: BlockType::MXFP4,
            values: Values::Packed {
                blocks: blocks.to_owned(),
                scales: scales.to_owned(),
                order,
            },
        }))
    }

    /// What no line of the map took: left out with a reason, or unknown.
    fn rest(
        &self,
        json: &ConfigJson,
        family: &Family,
        config: &Config,
    ) -> Result<Vec<LeftOut>, Error> {
        let nextn = config.n_layers..config.n_layers.saturating_add(json.n_nextn_layers()?);
        let mut left_out = Vec::new();
        let mut unknown = Vec::new();
        for (plain, (name, tensor)) in &self.tensors {
            if self.used.contains(plain) {
                continue;
            }
            let layer = plain
                .strip_prefix("model.layers.")
                .and_then(|r| r.split('.').next()?.parse::<u32>().ok());
            let reason = if plain.ends_with(".rotary_emb.inv_freq") {
                "computed from the configuration"
            } else if plain == "lm_head.weight" && config.tied_embeddings {
                "the output head is the embedding matrix"
            } else if plain.starts_with("mtp.") {
                "multi-token prediction, not part of the model proper"
            } else if layer.is_some_and(|l| nextn.contains(&l)) {
                "a layer of multi-token prediction, not part of the model proper"
            } else if json.has_vision() && is_vision(plain) {
                "the model's vision, not part of its text model"
            } else if json.hears() && is_of(plain, &["audio_tower.", "embed_audio."]) {
                "the model's hearing, not part of its text model"
            } else {
                unknown.push(format!("{}: {name}", tensor.file));
                continue;
            };
            left_out.push(LeftOut {
                tensor: (*name).to_owned(),
                reason: reason.to_owned(),
            });
        }
        if !unknown.is_empty() {
            return Err(Error::UnknownTensors {
                family: family.architecture.to_owned(),
                tensors: unknown,
            });
        }
        Ok(left_out)
    }
}

/// Some tools save the experts of a layer as one tensor (`experts.gate_up_proj`), where the map asks for one each.
fn refuse_stacked(
    tensors: &BTreeMap<String, (&str, &SourceTensor)>,
    in_layer: &str,
) -> Result<(), Error> {
    let Some((layer, _)) = in_layer
        .split_once(".experts.")
        .and_then(|(b, _)| b.rsplit_once('.'))
    else {
        return Ok(());
    };
    for block in ["mlp", "block_sparse_moe"] {
        for stacked in ["gate_up_proj", "gate_up_proj.weight"] {
            if let Some((name, _)) = tensors.get(&format!("{layer}.{block}.experts.{stacked}")) {
                return Err(Error::Unsupported {
                    what: format!(
                        "{name} holds all experts of its layer; save the checkpoint with a tensor for each expert"
                    ),
                });
            }
        }
    }
    Ok(())
}

/// As [`check`], of a tensor of bytes.
fn check_bytes(name: &str, tensor: &SourceTensor, expected: &[u64]) -> Result<(), Error> {
    if tensor.dtype != Dtype::Unread && tensor.dtype.to_string() != "U8" {
        return Err(Error::Dtype {
            file: tensor.file.clone(),
            tensor: name.to_owned(),
            dtype: tensor.dtype.to_string(),
        });
    }
    check_shape(name, tensor, expected)
}

fn check(name: &str, tensor: &SourceTensor, expected: &[u64]) -> Result<(), Error> {
    if tensor.dtype == Dtype::Unread {
        return Ok(());
    }
    if let Dtype::Other(_) = tensor.dtype {
        return Err(Error::Dtype {
            file: tensor.file.clone(),
            tensor: name.to_owned(),
            dtype: tensor.dtype.to_string(),
        });
    }
    check_shape(name, tensor, expected)
}

fn check_shape(name: &str, tensor: &SourceTensor, expected: &[u64]) -> Result<(), Error> {
    if tensor.dtype != Dtype::Unread && tensor.shape != expected {
        return Err(Error::Shape {
            file: tensor.file.clone(),
            tensor: name.to_owned(),
            expected: expected.to_vec(),
            got: tensor.shape.clone(),
        });
    }
    Ok(())
}

fn is_vision(name: &str) -> bool {
    let parts = [
        "vision_tower.",
        "vision_model.",
        "multi_modal_projector.",
        "visual.",
        "embed_vision.",
    ];
    is_of(name, &parts)
}

/// Whether a tensor belongs to one of `parts` of a multimodal model.
fn is_of(name: &str, parts: &[&str]) -> bool {
    let name = name.strip_prefix("model.").unwrap_or(name);
    parts.iter().any(|part| name.starts_with(part))
}

/// The name that the map expects in the checkpoint, for layer `l`.
fn source(row: &Row, l: u32, config: &Config) -> String {
    match l.checked_sub(config.n_layers) {
        Some(n) if row.place != Place::NextN => {
            let block = format!("mtp.layers.{n}.");
            row.source.replace("model.layers.{l}.", &block)
        }
        _ => row.source.replace("{l}", &l.to_string()),
    }
}
