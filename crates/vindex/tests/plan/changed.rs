//! A checkpoint in memory, made from a family's fixture by changing a file, a number or a header.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::Write as _;
use std::fs;

use serde_json::Value;
use vindex::{Error, Origin, Plan, Recipe, Source, SourceError, SourceFile, plan};

use super::support::checkpoint_dir;

/// The one file of an unsharded checkpoint.
pub(super) const ONE: &str = "model.safetensors";

/// A checkpoint in memory: a family's files, some of them changed.
pub(super) struct Changed {
    pub(super) name: String,
    pub(super) files: BTreeMap<String, Vec<u8>>,
}

impl Changed {
    pub(super) fn family(family: &str) -> Changed {
        let files = fs::read_dir(checkpoint_dir(family)).unwrap().map(|entry| {
            let entry = entry.unwrap();
            (
                entry.file_name().into_string().unwrap(),
                fs::read(entry.path()).unwrap(),
            )
        });
        Changed {
            name: family.to_owned(),
            files: files.collect(),
        }
    }

    /// The llama fixture as a Mistral with a window of eight tokens.
    pub(super) fn mistral() -> Changed {
        Changed::family("llama").json("config.json", |c| {
            c["architectures"] = serde_json::json!(["MistralForCausalLM"]);
            c["sliding_window"] = serde_json::json!(8);
        })
    }

    pub(super) fn without(mut self, file: &str) -> Changed {
        self.files.remove(file).unwrap();
        self
    }

    pub(super) fn with(mut self, file: &str, bytes: impl Into<Vec<u8>>) -> Changed {
        self.files.insert(file.to_owned(), bytes.into());
        self
    }

    pub(super) fn json(self, file: &str, change: impl FnOnce(&mut Value)) -> Changed {
        let mut value: Value = serde_json::from_slice(&self.files[file]).unwrap();
        change(&mut value);
        self.with(file, value.to_string())
    }

    /// Rewrites a header; the data section stays as it is.
    pub(super) fn header(
        self,
        file: &str,
        change: impl FnOnce(&mut serde_json::Map<String, Value>),
    ) -> Changed {
        let bytes = &self.files[file];
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: serde_json::Map<String, Value> =
            serde_json::from_slice(&bytes[8..end]).unwrap();
        change(&mut header);
        let text = Value::Object(header).to_string();
        let mut changed = (text.len() as u64).to_le_bytes().to_vec();
        changed.extend(text.as_bytes());
        changed.extend(&bytes[end..]);
        self.with(file, changed)
    }

    pub(super) fn plan(&self) -> Result<Plan, Error> {
        plan(self, Recipe::Q4k)
    }

    /// The error and its causes, as the operator reads them.
    pub(super) fn error(&self) -> String {
        let error = self.plan().expect_err("the plan should fail");
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(c) = cause {
            write!(text, ": {c}").unwrap();
            cause = c.source();
        }
        text
    }
}

impl Source for Changed {
    fn files(&self) -> Result<Vec<SourceFile>, SourceError> {
        let listed = self.files.iter();
        Ok(listed
            .map(|(path, b)| SourceFile {
                path: path.clone(),
                size_bytes: b.len() as u64,
            })
            .collect())
    }

    fn read_at(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let start = usize::try_from(offset_bytes)?;
        let size_bytes = self.files.get(path).map_or(0, Vec::len);
        assert!(
            buf.len() <= size_bytes,
            "{path}: a buffer of {} bytes for a file of {size_bytes}",
            buf.len()
        );
        let bytes = self
            .files
            .get(path)
            .and_then(|b| b.get(start..start + buf.len()));
        buf.copy_from_slice(
            bytes.ok_or_else(|| format!("{path} ends before byte {}", start + buf.len()))?,
        );
        Ok(())
    }

    fn origin(&self) -> Origin {
        Origin {
            model_name: self.name.clone(),
            ..Origin::default()
        }
    }
}

/// Errors under what was wrong, as a snapshot keeps them.
pub(super) fn told(errors: &[(&str, String)]) -> String {
    let lines = errors.iter();
    lines
        .map(|(what, error)| format!("{what}:\n  {error}\n"))
        .collect()
}
