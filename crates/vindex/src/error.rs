//! Everything that can go wrong between a checkpoint and a vindex: a variant for each thing that a caller
//! can do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::share::Share;
use crate::source::SourceError;

/// Why an operation on a checkpoint or a vindex failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused. The cause tells which limit or right.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was being done, such as `write`.
        action: &'static str,
        /// To which file or directory.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The checkpoint could not be read.
    #[error("cannot read {file} of the source")]
    Source {
        /// Path inside the source.
        file: String,
        /// What the source says.
        #[source]
        source: SourceError,
    },
    /// A file that the checkpoint needs is not there.
    #[error(
        "{file} is missing; {wanted_by} needs it: download the checkpoint again, all of its files"
    )]
    MissingFile {
        /// Path inside the source.
        file: String,
        /// What names or needs the file.
        wanted_by: String,
    },
    /// A file of the checkpoint is damaged: it says something that cannot be.
    #[error("{file}: {reason}; the file is damaged, download it again")]
    Checkpoint {
        /// Path inside the source.
        file: String,
        /// What was expected and what is there.
        reason: String,
    },
    /// `config.json` lacks a number or has one that cannot be.
    #[error("config.json: {key}: {reason}; take the config.json that belongs to the weights")]
    Config {
        /// Key of the file, with `.` between levels.
        key: String,
        /// What was expected and what is there.
        reason: String,
    },
    /// GGUF metadata lacks a key or has one that cannot be.
    #[error("{file}: {key}: {reason}")]
    Metadata {
        /// Path inside the source.
        file: String,
        /// The key.
        key: String,
        /// What was expected and what is there.
        reason: String,
    },
    /// The source has several models in GGUF.
    #[error("the source has {} models in GGUF: {}; name one of them", files.len(), files.join(", "))]
    SeveralModels {
        /// A file of each, the first where a model has several.
        files: Vec<String>,
    },
    /// No row of the table of families is for this model.
    #[error("no family is known for {architecture}; known are {}", known.join(", "))]
    UnknownArchitecture {
        /// First of `architectures` in `config.json`.
        architecture: String,
        /// What the table has.
        known: Vec<&'static str>,
    },
    /// The model asks for something that the vindex or the forward pass cannot say yet.
    #[error("this model cannot be extracted: {what}")]
    Unsupported {
        /// The setting and its value.
        what: String,
    },
    /// The checkpoint has tensors that the family's table does not know.
    #[error(
        "the family {family} has no place for {} of the checkpoint's tensors: {}; \
         this is another kind of model than its configuration says",
        tensors.len(), Some8(tensors)
    )]
    UnknownTensors {
        /// GGUF architecture.
        family: String,
        /// Each as `file: name`.
        tensors: Vec<String>,
    },
    /// The checkpoint lacks tensors that the model needs.
    #[error(
        "the checkpoint lacks {} of the tensors that its configuration asks for: {}; download it again, all of its files",
        tensors.len(), Some8(tensors)
    )]
    MissingTensors {
        /// Names in the checkpoint.
        tensors: Vec<String>,
    },
    /// A tensor's shape is not what `config.json` says.
    #[error(
        "{file}: tensor {tensor} has shape {got:?}, its configuration says {expected:?}; they do not belong together"
    )]
    Shape {
        /// Path inside the source.
        file: String,
        /// Name in the checkpoint.
        tensor: String,
        /// From the configuration, slowest dimension first.
        expected: Vec<u64>,
        /// From the header.
        got: Vec<u64>,
    },
    /// A needed tensor is stored in a type that we do not read.
    #[error(
        "{file}: tensor {tensor} is stored as {dtype}; F32, F16 and BF16 are read: take the unquantised checkpoint"
    )]
    Dtype {
        /// Path inside the source.
        file: String,
        /// Name in the checkpoint.
        tensor: String,
        /// Its type there.
        dtype: String,
    },
    /// The tokenizer cannot be written as GGUF metadata.
    #[error("{file}: {reason}")]
    Tokenizer {
        /// Path inside the source.
        file: String,
        /// What is wrong or not supported.
        reason: String,
    },
    /// The values of a tensor could not be read from the checkpoint.
    #[error("cannot read tensor {tensor} from {file} of the source")]
    Values {
        /// Path inside the source.
        file: String,
        /// Name in the checkpoint.
        tensor: String,
        /// What the source says.
        #[source]
        source: SourceError,
    },
    /// The directory has an `index.json`: there is a finished vindex in it.
    #[error("{} already holds a finished vindex; remove it or name another output directory", path.display())]
    OutputExists {
        /// The output directory.
        path: PathBuf,
    },
    /// The directory holds the beginning of another extraction.
    #[error(
        "{} holds an interrupted extraction of another plan (digest {got}, this plan's is {expected}); \
         remove the directory or name another",
        path.display()
    )]
    OtherPlan {
        /// The output directory.
        path: PathBuf,
        /// Digest of the plan to execute.
        expected: String,
        /// Digest in the journal.
        got: String,
    },
    /// The directory holds files which no extraction of ours put there.
    #[error("{} holds {file}, which is not part of this extraction; choose an empty or new directory", path.display())]
    ForeignFile {
        /// The output directory.
        path: PathBuf,
        /// Name of the first such file.
        file: String,
    },
    /// Another process is extracting into the directory.
    #[error("another extraction is writing to {}; wait for it or name another directory", path.display())]
    Locked {
        /// The output directory.
        path: PathBuf,
    },
    /// The file system has not enough room for what the plan will write.
    #[error(
        "{} needs {needed_bytes} bytes and the file system has {available_bytes} free; \
         free some space or name a directory elsewhere",
        path.display()
    )]
    NoSpace {
        /// The output directory.
        path: PathBuf,
        /// What is still to be written.
        needed_bytes: u64,
        /// What an unprivileged process may still write there.
        available_bytes: u64,
    },
    /// Weights hold NaN or infinity, or would become infinite in the type that they are stored in.
    #[error(
        "{file}: tensor {tensor} holds {count} values that are NaN, infinite or too large for the type they are \
         stored in; the checkpoint is damaged, or take a wider recipe, or allow non-finite values"
    )]
    NonFinite {
        /// File of the checkpoint.
        file: String,
        /// Tensor of the checkpoint.
        tensor: String,
        /// How many values.
        count: u64,
    },
    /// A plan that cannot be executed, whoever made it.
    #[error("the plan cannot be executed: {tensor}: {reason}")]
    Plan {
        /// Tensor of the vindex, or `index.json` when it cannot be described.
        tensor: String,
        /// What does not fit.
        reason: String,
    },
    /// The plan was made from another source than the one given with it.
    #[error("the plan was made from another source: {reason}; plan again with this one")]
    OtherSource {
        /// What differs.
        reason: String,
    },
    /// A file of statistics is none, or is damaged.
    #[error("{} is no importance matrix: {reason}", path.display())]
    Imatrix {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Statistics that cannot weigh the errors of this plan's blocks.
    #[error("the statistics are of no use here: {reason}; collect them with this model")]
    Calibration {
        /// What does not fit.
        reason: String,
    },
    /// The directory has no `index.json`.
    #[error("{} is not a vindex: {}", path.display(), if path.is_dir() {
        "it has no index.json (an extraction that did not finish leaves none)"
    } else {
        "there is no such directory"
    })]
    NotAVindex {
        /// The directory.
        path: PathBuf,
    },
    /// `index.json`, `slice.json` or `provenance.json` says something that cannot be.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Parts of the recorded slice are missing or are not what the index says.
    #[error("{} is damaged: {}", path.display(), Listed(wrong))]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// Every wrong part.
        wrong: Vec<WrongPart>,
    },
    /// The directory does not hold what is asked for.
    #[error("{} is complete for the slice {has}, not for {wanted}; pull the rest first", path.display())]
    ShareNotHere {
        /// The directory.
        path: PathBuf,
        /// What its `slice.json` records.
        has: Share,
        /// What was asked for.
        wanted: Share,
    },
    /// No such share of this vindex can be.
    #[error("{} cannot be held so: {reason}", path.display())]
    NoShare {
        /// The directory.
        path: PathBuf,
        /// What cannot be.
        reason: String,
    },
}

impl Error {
    /// For `map_err`: an [`Error::Io`] that says what was being done to which path.
    pub(crate) fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Error + 'a {
        move |source| Error::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// A part which is not what the index says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongPart {
    /// Name of the file.
    pub file: String,
    /// What is wrong with it.
    pub what: Wrong,
    /// Tensors that are damaged by it, in file order; `name[3]` for expert 3 of a stacked tensor.
    pub tensors: Vec<String>,
}

/// What is wrong with a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// There is no such file.
    Missing,
    /// It is there and cannot be read.
    Unreadable(String),
    /// It has another length.
    Size {
        /// In the index.
        expected: u64,
        /// On disk.
        got: u64,
    },
    /// Its bytes changed.
    Sha256 {
        /// In the index, hex.
        expected: String,
        /// On disk, hex.
        got: String,
    },
    /// It is held by a range of experts, and the bytes of some of them changed.
    Experts,
    /// Its bytes are those of the index, and its header says something else than the index.
    Header(String),
}

impl fmt::Display for WrongPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file)?;
        match &self.what {
            Wrong::Missing => f.write_str("missing")?,
            Wrong::Unreadable(why) => write!(f, "cannot be read ({why})")?,
            Wrong::Size { expected, got } => write!(f, "{got} bytes, expected {expected}")?,
            Wrong::Sha256 { expected, got } => write!(f, "sha256 {got}, expected {expected}")?,
            Wrong::Experts => f.write_str("the sha256 of some experts is not that of the index")?,
            Wrong::Header(why) => write!(f, "its header disagrees with the index ({why})")?,
        }
        match self.tensors.as_slice() {
            [] => Ok(()),
            [one] => write!(f, "; damaged tensor: {one}"),
            [first, .., last] if self.tensors.len() > 8 => {
                write!(
                    f,
                    "; damaged tensors: {first} to {last} ({} in all)",
                    self.tensors.len()
                )
            }
            some => write!(f, "; damaged tensors: {}", some.join(", ")),
        }
    }
}

/// The first eight of a list, and how many more there are.
struct Some8<'a>(&'a [String]);

impl fmt::Display for Some8<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            &self
                .0
                .iter()
                .take(8)
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", "),
        )?;
        match self.0.len() {
            0..=8 => Ok(()),
            n => write!(f, " and {} more", n - 8),
        }
    }
}

struct Listed<'a>(&'a [WrongPart]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [one] = self.0 {
            return write!(f, "{one}; pull or extract it again");
        }
        write!(
            f,
            "{} parts are wrong; pull or extract them again",
            self.0.len()
        )?;
        for part in self.0 {
            write!(f, "\n  {part}")?;
        }
        Ok(())
    }
}
