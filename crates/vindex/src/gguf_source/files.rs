//! Which files of a source are a model in GGUF, and what their headers say.
//!
//! Invariant: a header that is accepted is proven. Every tensor begins where its file's alignment says, lies inside its
//! file, has the length that its shape and type say, and shares no byte with another; no name comes twice.

use std::collections::{BTreeMap, BTreeSet};

use crate::checkpoint::{Checkpoint, Dtype, SourceTensor};
use crate::error::Error;
use crate::gguf::{self, Header, Maker, MetaValue, NoHeader};
use crate::source::Files;

/// How much of a file is read first; the tokenizers of today's models take up to twenty times as much.
const FIRST_READ_BYTES: u64 = 256 << 10;
/// Largest header that is read.
const HEADER_BYTES_MAX: u64 = 512 << 20;
/// Most files of a split model.
const SPLITS_MAX: u32 = 65_535;

/// A model's files with their headers.
pub(super) struct Model {
    stem: String,
    /// In order; the first has the metadata.
    files: Vec<String>,
    metadata: Vec<(String, MetaValue)>,
    tensors: BTreeMap<String, Tensor>,
}

/// A tensor of a model.
pub(super) struct Tensor {
    /// Shape, the row length first.
    pub(super) ne: Vec<u64>,
    pub(super) source: SourceTensor,
    pub(super) block_type: quant::BlockType,
}

/// Names of the models of a source: one file each, the first of those that are split.
pub(super) fn models(files: &Files<'_>) -> BTreeMap<String, Vec<String>> {
    let mut models: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in files.paths() {
        if path.ends_with(".gguf") && !is_beside_a_model(path) {
            let name = match Split::of(path) {
                Some(split) => split.file(path, 0),
                None => path.to_owned(),
            };
            models.entry(name).or_default().push(path.to_owned());
        }
    }
    models
}

/// A projector of a multimodal model (`mmproj-…`) or an importance matrix, which are GGUF files without a model.
pub(super) fn is_beside_a_model(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path).to_lowercase();
    name.ends_with(".gguf") && (name.contains("mmproj") || name.contains("imatrix"))
}

/// How many files a model is split into, as the name of each tells.
struct Split {
    count: u32,
}

impl Split {
    /// `<stem>-NNNNN-of-NNNNN.gguf`, counted from 1.
    fn of(path: &str) -> Option<Split> {
        let rest = path.strip_suffix(".gguf")?;
        let (rest, count) = rest.rsplit_once("-of-")?;
        let (_, number) = rest.rsplit_once('-')?;
        let five = |text: &str| {
            let is_number = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u32>().ok().filter(|_| is_number)
        };
        let (number, count) = (five(number)?, five(count)?);
        let is_one_of_them = (1..=count.min(SPLITS_MAX)).contains(&number);
        is_one_of_them.then_some(Split { count })
    }

    /// The name of file `index` of the same model as `path`.
    fn file(&self, path: &str, index: u32) -> String {
        format!("{}-{:05}-of-{:05}.gguf", stem(path), index + 1, self.count)
    }
}

/// The files of the model that `path` is of, in order.
pub(crate) fn files_of(path: &str) -> Vec<String> {
    match Split::of(path) {
        Some(split) => (0..split.count).map(|i| split.file(path, i)).collect(),
        None => vec![path.to_owned()],
    }
}

/// A file's path without what numbers it and without its extension.
pub(crate) fn stem(path: &str) -> &str {
    let rest = path.strip_suffix(".gguf").unwrap_or(path);
    match Split::of(path) {
        Some(_) => &rest[..rest.len() - "-00001-of-00001".len()],
        None => rest,
    }
}

impl Model {
    /// The model that `file` is of, or the only one there is.
    pub(super) fn find(files: &Files<'_>, file: Option<&str>) -> Result<Model, Error> {
        let models = models(files);
        let path = match (file, models.len()) {
            (Some(file), _) if files.size_bytes(file).is_some() => file.to_owned(),
            (Some(file), _) => {
                return Err(Error::MissingFile {
                    file: file.to_owned(),
                    wanted_by: format!(
                        "the extraction (the source's models are {})",
                        models.into_keys().collect::<Vec<_>>().join(", ")
                    ),
                });
            }
            (None, 1) => models.into_keys().next().unwrap_or_default(),
            (None, 0) => {
                return Err(Error::MissingFile {
                    file: "*.gguf".to_owned(),
                    wanted_by: "a source in GGUF".to_owned(),
                });
            }
            (None, _) => {
                return Err(Error::SeveralModels {
                    files: models.into_keys().collect(),
                });
            }
        };
        let paths = files_of(&path);
        if let Some(missing) = paths.iter().find(|p| files.size_bytes(p).is_none()) {
            return Err(Error::MissingFile {
                file: missing.clone(),
                wanted_by: format!("the split model of {path}"),
            });
        }
        Model::read(files, paths)
    }

    fn read(files: &Files<'_>, paths: Vec<String>) -> Result<Model, Error> {
        let mut model = Model {
            stem: stem(&paths[0]).rsplit('/').next().unwrap_or("").to_owned(),
            files: Vec::new(),
            metadata: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let n_files = paths.len();
        let mut n_tensors_said = None;
        for (i, path) in paths.into_iter().enumerate() {
            let header = header(files, &path)?;
            let said = |key: &str| number(&header.metadata, key);
            let (no, count) = (said("split.no"), said("split.count"));
            if (n_files > 1 || count.is_some_and(|n| n > 1))
                && (no, count) != (Some(i as u64), Some(n_files as u64))
            {
                let told = |n: Option<u64>| n.map_or("absent".to_owned(), |n| n.to_string());
                return Err(bad(
                    &path,
                    format!(
                        "it should be file {i} of {n_files} by its name, but split.no is {} and split.count {}; \
                         the files of a split model keep the names they were given",
                        told(no),
                        told(count)
                    ),
                ));
            }
            n_tensors_said = n_tensors_said.or(said("split.tensors.count"));
            let size_bytes = files.size_bytes(&path).unwrap_or(0);
            prove(&path, &header, size_bytes)?;
            for tensor in header.tensors {
                let size_bytes =
                    gguf::size_bytes(tensor.block_type, &tensor.ne).unwrap_or_default();
                let found = Tensor {
                    source: SourceTensor {
                        file: path.clone(),
                        dtype: Dtype::Blocks(tensor.block_type),
                        shape: tensor.ne.iter().rev().copied().collect(),
                        offset_bytes: tensor.offset_bytes,
                        size_bytes,
                    },
                    ne: tensor.ne,
                    block_type: tensor.block_type,
                };
                if let Some(other) = model.tensors.insert(tensor.name.clone(), found) {
                    let reason = format!("tensor {} is also in {}", tensor.name, other.source.file);
                    return Err(bad(&path, reason));
                }
            }
            if i == 0 {
                model.metadata = header.metadata;
            }
            model.files.push(path);
        }
        match n_tensors_said {
            Some(n) if n_files > 1 && n != model.tensors.len() as u64 => Err(bad(
                &model.files[0],
                format!(
                    "it says that the model has {n} tensors, its files have {}",
                    model.tensors.len()
                ),
            )),
            _ => Ok(model),
        }
    }

    /// The name of the files without number and extension.
    pub(super) fn stem(&self) -> &str {
        &self.stem
    }

    /// The first file, which has the metadata.
    pub(super) fn file(&self) -> &str {
        &self.files[0]
    }

    /// Key-values of the first file.
    pub(super) fn metadata(&self) -> &[(String, MetaValue)] {
        &self.metadata
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// All tensors in order of their names.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, t)| (name.as_str(), t))
    }

    /// Where the tensors are.
    pub(super) fn into_checkpoint(self, files: &Files<'_>) -> Checkpoint {
        let tensors = self.tensors.into_iter();
        Checkpoint::new(files, tensors.map(|(name, t)| (name, t.source)).collect())
    }
}

fn number(metadata: &[(String, MetaValue)], key: &str) -> Option<u64> {
    let (_, value) = metadata.iter().find(|(k, _)| k == key)?;
    super::keys::whole(value)
}

/// Reads as much of a file as its header takes: four times as much each time.
fn header(files: &Files<'_>, path: &str) -> Result<Header, Error> {
    let file_bytes = files.size_bytes(path).unwrap_or(0);
    let mut bytes = Vec::new();
    let mut wanted = FIRST_READ_BYTES;
    loop {
        let from = bytes.len();
        bytes.resize(wanted.min(file_bytes) as usize, 0);
        files.read_at(path, from as u64, &mut bytes[from..])?;
        match gguf::header_of(&bytes, file_bytes, Maker::Anybody) {
            Ok(header) => return Ok(header),
            Err(NoHeader::Wrong(reason)) => return Err(bad(path, reason)),
            Err(NoHeader::OtherType(what)) => {
                let what = format!("{path}: {what}; take a file of another quantisation");
                return Err(Error::Unsupported { what });
            }
            Err(NoHeader::More) if wanted >= HEADER_BYTES_MAX => {
                let reason = format!("its header is longer than {HEADER_BYTES_MAX} bytes");
                return Err(bad(path, reason));
            }
            Err(NoHeader::More) => wanted *= 4,
        }
    }
}

/// Proves the places of a file's tensors.
fn prove(path: &str, header: &Header, file_bytes: u64) -> Result<(), Error> {
    let mut keys = BTreeSet::new();
    for (key, _) in &header.metadata {
        if !keys.insert(key) {
            return Err(bad(path, format!("the key {key} comes twice")));
        }
    }
    let mut names = BTreeSet::new();
    let mut places = Vec::with_capacity(header.tensors.len());
    for tensor in &header.tensors {
        let reject = |reason: String| Err(bad(path, format!("tensor {}: {reason}", tensor.name)));
        if tensor.name.is_empty() || tensor.name.chars().any(char::is_control) {
            return reject("its name is empty or not text".to_owned());
        }
        if !names.insert(&tensor.name) {
            return reject("it is there twice".to_owned());
        }
        let size = gguf::size_bytes(tensor.block_type, &tensor.ne);
        let Some(size_bytes) = size.filter(|_| !tensor.ne.contains(&0)) else {
            return reject(format!(
                "its shape {:?} cannot be stored as {}",
                tensor.ne, tensor.block_type
            ));
        };
        let offset = tensor.offset_bytes - header.data_offset_bytes;
        if !offset.is_multiple_of(header.alignment_bytes) {
            return reject(format!(
                "its offset {offset} is no multiple of {}",
                header.alignment_bytes
            ));
        }
        match tensor.offset_bytes.checked_add(size_bytes) {
            Some(end) if end <= file_bytes => places.push((tensor.offset_bytes, end, &tensor.name)),
            _ => {
                return reject(format!(
                    "its {size_bytes} bytes at {} end beyond the file's {file_bytes} (is the file truncated?)",
                    tensor.offset_bytes
                ));
            }
        }
    }
    places.sort_unstable();
    for pair in places.windows(2) {
        let ((_, end, before), (start, _, after)) = (pair[0], pair[1]);
        if start < end {
            let reason =
                format!("tensor {after} begins at {start}, within {before}, which ends at {end}");
            return Err(bad(path, reason));
        }
    }
    Ok(())
}

fn bad(file: &str, reason: String) -> Error {
    Error::Checkpoint {
        file: file.to_owned(),
        reason,
    }
}
