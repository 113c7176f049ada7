//! The metadata of a model in GGUF, read by key.
//!
//! Invariant: a key of the architecture that nobody asked for is an error in the end: it may change what the model
//! computes. Keys that are known to change nothing are listed.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use super::files::Model;
use crate::error::Error;
use crate::families::Family;
use crate::gguf::{MetaArray, MetaValue};

/// Keys after the architecture that change nothing in the pass of a text.
const HARMLESS: [&str; 7] = [
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "interleave_moe_layer_step",
    "attention.group_norm_groups",
    "pooling_type",
    "embedding_length_out",
];
/// Beginnings of keys about parts of the model that see or hear.
const OTHER_SENSES: [&str; 3] = ["vision.", "mm.", "audio."];

/// Key-values by key.
pub(super) struct Keys<'a> {
    file: &'a str,
    architecture: &'a str,
    values: BTreeMap<&'a str, &'a MetaValue>,
    asked: RefCell<BTreeSet<String>>,
    is_routed: bool,
}

impl<'a> Keys<'a> {
    pub(super) fn of(model: &'a Model) -> Result<Keys<'a>, Error> {
        let values: BTreeMap<&str, &MetaValue> = model
            .metadata()
            .iter()
            .map(|(key, value)| (key.as_str(), value))
            .collect();
        let mut keys = Keys {
            file: model.file(),
            architecture: "",
            values,
            asked: RefCell::default(),
            is_routed: false,
        };
        keys.architecture = match keys.values.get("general.architecture") {
            Some(MetaValue::String(text)) => text,
            _ => return Err(keys.wrong("general.architecture", "a text is expected there")),
        };
        keys.is_routed = keys.u32("expert_count")?.is_some_and(|n| n > 0);
        Ok(keys)
    }

    pub(super) fn architecture(&self) -> &str {
        self.architecture
    }

    pub(super) fn is_routed(&self) -> bool {
        self.is_routed
    }

    /// The row of the table that is for this model.
    pub(super) fn family(&self) -> Result<&'static Family, Error> {
        let family = Family::of_architecture(self.architecture, self.is_routed);
        family.ok_or_else(|| Error::UnknownArchitecture {
            architecture: self.architecture.chars().take(80).collect(),
            known: Family::architectures(),
        })
    }

    /// A value by its whole key.
    pub(super) fn value(&self, key: &str) -> Option<&'a MetaValue> {
        self.values.get(key).copied()
    }

    /// A value by its key after the architecture.
    pub(super) fn own(&self, key: &str) -> Option<&'a MetaValue> {
        let whole = format!("{}.{key}", self.architecture);
        let value = self.values.get(whole.as_str()).copied();
        self.asked.borrow_mut().insert(whole);
        value
    }

    /// A whole number that is there.
    pub(super) fn count(&self, key: &str, max: u32) -> Result<u32, Error> {
        match self.u32(key)? {
            Some(n) if (1..=max).contains(&n) => Ok(n),
            Some(n) => Err(self.wrong_own(key, format!("{n} is not between 1 and {max}"))),
            None => Err(self.wrong_own(key, "it is missing")),
        }
    }

    /// A whole number; of an array with one a layer, the one that all agree on.
    pub(super) fn u32(&self, key: &str) -> Result<Option<u32>, Error> {
        let Some(value) = self.own(key) else {
            return Ok(None);
        };
        let each = each_whole(value).unwrap_or_default();
        match each.split_first() {
            Some((first, rest)) if rest.iter().all(|n| n == first) => Ok(Some(*first)),
            Some(_) => Err(Error::Unsupported {
                what: format!("{} differs from layer to layer", self.whole(key)),
            }),
            None => Err(self.wrong_own(
                key,
                format!("a number below 2^32 is expected, not {}", short(value)),
            )),
        }
    }

    /// One whole number a layer: those of an array, or one for all of `n_layers`.
    pub(super) fn each(&self, key: &str, n_layers: u32) -> Result<Option<Vec<u32>>, Error> {
        let Some(value) = self.own(key) else {
            return Ok(None);
        };
        match (value, each_whole(value)) {
            (MetaValue::Array(_), Some(each)) if each.len() == n_layers as usize => Ok(Some(each)),
            (MetaValue::Array(_), Some(each)) => {
                Err(self.wrong_own(key, format!("{} numbers for {n_layers} layers", each.len())))
            }
            (_, Some(one)) if one.len() == 1 => Ok(Some(vec![one[0]; n_layers as usize])),
            _ => Err(self.wrong_own(
                key,
                format!("whole numbers are expected, not {}", short(value)),
            )),
        }
    }

    /// A finite number above 0.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f32>, Error> {
        let Some(value) = self.own(key) else {
            return Ok(None);
        };
        let n = match value {
            MetaValue::F32(n) => Some(*n),
            MetaValue::F64(n) => Some(*n as f32),
            other => whole(other).map(|n| n as f32),
        };
        match n.filter(|n| *n > 0.0 && n.is_finite()) {
            Some(n) => Ok(Some(n)),
            None => Err(self.wrong_own(
                key,
                format!("a positive number is expected, not {}", short(value)),
            )),
        }
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.own(key) {
            None => Ok(None),
            Some(MetaValue::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => {
                Err(self.wrong_own(key, format!("a bool is expected, not {}", short(other))))
            }
        }
    }

    /// A text by its key after the architecture.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.own(key) {
            None => Ok(None),
            Some(MetaValue::String(text)) => Ok(Some(text)),
            Some(other) => {
                Err(self.wrong_own(key, format!("a text is expected, not {}", short(other))))
            }
        }
    }

    /// A token by its whole key; one beyond the vocabulary is none.
    pub(super) fn token(&self, key: &str, n_vocab: u32) -> Option<u32> {
        let id = self.value(key).and_then(whole)?;
        u32::try_from(id).ok().filter(|&id| id < n_vocab)
    }

    /// Refuses what nobody asked for.
    pub(super) fn refuse_the_rest(&self) -> Result<(), Error> {
        let prefix = format!("{}.", self.architecture);
        let asked = self.asked.borrow();
        let is_unknown = |key: &&&str| {
            key.strip_prefix(&prefix).is_some_and(|own| {
                !HARMLESS.contains(&own)
                    && !OTHER_SENSES.iter().any(|sense| own.starts_with(sense))
                    && !asked.contains(**key)
            })
        };
        match self.values.keys().find(is_unknown) {
            None => Ok(()),
            Some(key) => Err(Error::Unsupported {
                what: format!(
                    "{key} is {}, which is not known here",
                    short(self.values[key])
                ),
            }),
        }
    }

    pub(super) fn whole(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// An error about a key after the architecture.
    pub(super) fn wrong_own(&self, key: &str, reason: impl Into<String>) -> Error {
        self.wrong(&self.whole(key), reason)
    }

    pub(super) fn wrong(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::Metadata {
            file: self.file.to_owned(),
            key: key.to_owned(),
            reason: reason.into(),
        }
    }
}

/// A whole number of any width.
pub(super) fn whole(value: &MetaValue) -> Option<u64> {
    match *value {
        MetaValue::U8(n) => Some(n.into()),
        MetaValue::U16(n) => Some(n.into()),
        MetaValue::U32(n) => Some(n.into()),
        MetaValue::U64(n) => Some(n),
        MetaValue::I8(n) => u64::try_from(n).ok(),
        MetaValue::I16(n) => u64::try_from(n).ok(),
        MetaValue::I32(n) => u64::try_from(n).ok(),
        MetaValue::I64(n) => u64::try_from(n).ok(),
        _ => None,
    }
}

/// A whole number, or those of an array.
fn each_whole(value: &MetaValue) -> Option<Vec<u32>> {
    let narrow = |n: Option<u64>| n.and_then(|n| u32::try_from(n).ok());
    match value {
        MetaValue::Array(MetaArray::U32s(each)) => Some(each.clone()),
        MetaValue::Array(MetaArray::I32s(each)) => {
            each.iter().map(|&n| u32::try_from(n).ok()).collect()
        }
        MetaValue::Array(MetaArray::U64s(each)) => {
            each.iter().map(|&n| u32::try_from(n).ok()).collect()
        }
        MetaValue::Array(MetaArray::Bools(each)) => Some(each.iter().map(|&b| b.into()).collect()),
        one => narrow(whole(one)).map(|n| vec![n]),
    }
}

fn short(value: &MetaValue) -> String {
    match value {
        MetaValue::Array(array) => format!("an array of {}", array.len()),
        other => format!("{other:?}").chars().take(60).collect(),
    }
}
