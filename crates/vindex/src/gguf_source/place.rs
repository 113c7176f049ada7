//! Every tensor of a model in GGUF put into its part, by the names in the table of families.
//!
//! Invariant: no tensor is lost without a word, each has the shape that the metadata says, and the order within a part is
//! that of the table, so that a vindex does not depend on how the source was split or sorted.

use std::collections::BTreeSet;

use super::files::{Model, Tensor};
use crate::config::{Config, RopeScaling};
use crate::error::Error;
use crate::families::{Family, Need, Place, Row};
use crate::placement::Placed;
use crate::plan::{Component, LeftOut, PlannedPart, PlannedTensor, Values};

/// As many missing tensors are listed.
const MISSING_MAX: usize = 1_000;

pub(super) fn place(model: &Model, family: &Family, config: &Config) -> Result<Placed, Error> {
    let n_layers = config.n_layers;
    let mut parts = vec![part(Component::Metadata), part(Component::Embeddings)];
    for layer in 0..n_layers {
        parts.push(part(Component::Attention { layer }));
        parts.push(part(Component::FeedForward { layer }));
    }
    for layer in n_layers..n_layers + config.n_nextn {
        parts.push(part(Component::NextN { layer }));
    }
    let mut used = BTreeSet::new();
    let mut missing = Vec::new();
    'lines: for line in family.lines() {
        let first = line[0];
        let layers = match first.source.contains("{l}") {
            _ if first.place == Place::NextN => n_layers..n_layers + 1,
            true => 0..n_layers + config.n_nextn,
            false => 0..1,
        };
        for layer in layers {
            let needs = line
                .iter()
                .filter(|row| row.when.need(config, layer) != Need::No);
            let rows: Vec<&Row> = needs.copied().collect();
            let Some(row) = rows.first() else {
                continue;
            };
            let name = match row.source.contains("{l}") || row.place == Place::NextN {
                true => format!("blk.{layer}.{}", row.target),
                false => row.target.to_owned(),
            };
            let Some(tensor) = model.tensor(&name) else {
                if row.when.need(config, layer) == Need::Yes {
                    missing.push(name);
                }
                if missing.len() >= MISSING_MAX {
                    break 'lines;
                }
                continue;
            };
            check(&name, tensor, &rows, layer, config)?;
            let part = match row.place {
                Place::Embeddings => 1,
                _ if layer >= n_layers => 2 + n_layers as usize + layer as usize,
                Place::Attention => 2 + 2 * layer as usize,
                Place::FeedForward | Place::NextN => 3 + 2 * layer as usize,
            };
            parts[part].tensors.push(kept(&name, tensor));
            used.insert(name);
        }
    }
    if !missing.is_empty() {
        return Err(Error::MissingTensors { tensors: missing });
    }
    let factors = "rope_freqs.weight";
    if let (Some(RopeScaling::FrequencyFactors), Some(tensor)) =
        (config.rope.scaling, model.tensor(factors))
    {
        check_shape(factors, tensor, vec![u64::from(config.rope.n_dims / 2)])?;
        parts[1].tensors.push(kept(factors, tensor));
        used.insert(factors.to_owned());
    }
    Ok(Placed {
        parts,
        left_out: rest(model, &used, config)?,
    })
}

fn part(component: Component) -> PlannedPart {
    PlannedPart {
        component,
        tensors: Vec::new(),
    }
}

fn kept(name: &str, tensor: &Tensor) -> PlannedTensor {
    PlannedTensor {
        name: name.to_owned(),
        ne: tensor.ne.clone(),
        block_type: tensor.block_type,
        values: Values::Kept {
            tensor: name.to_owned(),
        },
    }
}

/// Holds a tensor to the shape that its lines give it.
fn check(
    name: &str,
    tensor: &Tensor,
    rows: &[&Row],
    layer: u32,
    config: &Config,
) -> Result<(), Error> {
    let shape_of = |row: &&Row| {
        let shape: Vec<u64> = row.shape.iter().map(|d| d.of(config, layer)).collect();
        let n_experts = config.experts.filter(|_| row.source.contains("{e}"));
        let stacked = n_experts.map(|e| u64::from(e.n)).into_iter();
        stacked
            .chain(row.fold.shape(&shape, config))
            .collect::<Vec<u64>>()
    };
    // Alternatives differ in the checkpoint and give the same tensor.
    check_shape(name, tensor, rows.first().map(shape_of).unwrap_or_default())
}

/// `expected`: slowest dimension first.
fn check_shape(name: &str, tensor: &Tensor, expected: Vec<u64>) -> Result<(), Error> {
    if tensor.source.shape != expected {
        return Err(Error::Shape {
            file: tensor.source.file.clone(),
            tensor: name.to_owned(),
            expected,
            got: tensor.source.shape.clone(),
        });
    }
    Ok(())
}

/// What no line of the map took: left out with a reason, or unknown.
fn rest(model: &Model, used: &BTreeSet<String>, config: &Config) -> Result<Vec<LeftOut>, Error> {
    let mut left_out = Vec::new();
    let mut unknown = Vec::new();
    for (name, tensor) in model.tensors().filter(|(name, _)| !used.contains(*name)) {
        let sees = ["v.", "mm.", "a."]
            .iter()
            .any(|part| name.starts_with(part));
        let is_expert_apart = name
            .strip_prefix("blk.")
            .and_then(|rest| {
                rest.split_once(".ffn_")?
                    .1
                    .split('.')
                    .nth(1)?
                    .parse::<u32>()
                    .ok()
            })
            .is_some();
        if sees {
            left_out.push(LeftOut {
                tensor: name.to_owned(),
                reason: "the model's vision, not part of its text model".to_owned(),
            });
        } else if is_expert_apart {
            return Err(Error::Unsupported {
                what: format!(
                    "{name} is one expert in a tensor of its own, as older files have them; take a newer conversion"
                ),
            });
        } else {
            unknown.push(format!("{}: {name}", tensor.source.file));
        }
    }
    if unknown.is_empty() {
        return Ok(left_out);
    }
    Err(Error::UnknownTensors {
        family: config.architecture.clone(),
        tensors: unknown,
    })
}
