//! A vindex that is there to be read: its index, and its tensors as mapped bytes.
//!
//! Invariant: opening reads `index.json` and the lengths of the parts, no weight; each part of the recorded slice is
//! there with the recorded length, so that a view never leaves its file. Whether the bytes are the right ones is asked
//! of `verify.rs`.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use quant::BlockType;
use serde::de::DeserializeOwned;

use crate::error::{Error, Wrong, WrongPart};
use crate::gguf::{self, MetaValue};
use crate::index::{INDEX_FILE, Index, Tensor, VindexId, read_bounded};
use crate::provenance::{PROVENANCE_FILE, Provenance};
use crate::slice::{Recorded, SLICE_FILE, Slice};

/// An index of the largest models known (61 layers of 256 experts) takes about 4 MB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_SMALL_FILE_BYTES: u64 = 64 << 10;

/// An open vindex.
#[derive(Debug)]
pub struct Vindex {
    dir: PathBuf,
    id: VindexId,
    index_json: Vec<u8>,
    index: Index,
    slice: Slice,
    provenance: Option<Provenance>,
    /// One a part of the index; `None` where the slice has not the part.
    maps: Vec<Option<Mmap>>,
    by_name: HashMap<String, usize>,
}

/// One tensor in mapped memory.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Shape, the row length first.
    pub ne: &'a [u64],
    /// How rows are stored.
    pub block_type: BlockType,
    /// All rows, one after another; begins at a multiple of 32 bytes.
    pub bytes: &'a [u8],
}

impl Vindex {
    /// Opens the vindex in `dir` for the slice that its `slice.json` records.
    ///
    /// # Errors
    /// [`Error::NotAVindex`] when there is no `index.json`, [`Error::Index`] when it or a file beside it is not
    /// well-formed, [`Error::Damaged`] when parts are missing or have another length, [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Vindex, Error> {
        let (index_json, index) = read_index(dir)?;
        let slice = read_slice(dir)?;
        let provenance = read_json(&dir.join(PROVENANCE_FILE))?;
        let mut maps = Vec::new();
        let mut wrong = Vec::new();
        for (i, part) in index.parts.iter().enumerate() {
            if !slice.holds(part.component) {
                maps.push(None);
                continue;
            }
            let path = dir.join(&part.file);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    wrong.push(WrongPart {
                        file: part.file.clone(),
                        what: Wrong::Missing,
                        tensors: names(&index, i),
                    });
                    continue;
                }
                Err(e) => return Err(Error::io("open", &path)(e)),
            };
            let got = file.metadata().map_err(Error::io("read", &path))?.len();
            if got != part.size_bytes {
                let what = Wrong::Size {
                    expected: part.size_bytes,
                    got,
                };
                wrong.push(WrongPart {
                    file: part.file.clone(),
                    what,
                    tensors: names(&index, i),
                });
                continue;
            }
            maps.push(Some(map(&file, &path)?));
        }
        if !wrong.is_empty() {
            return Err(Error::Damaged {
                path: dir.to_owned(),
                wrong,
            });
        }
        let by_name = index
            .tensors
            .iter()
            .enumerate()
            .map(|(i, tensor)| (tensor.name.clone(), i))
            .collect();
        let id = VindexId::of(&index_json);
        Ok(Vindex {
            dir: dir.to_owned(),
            id,
            index_json,
            index,
            slice,
            provenance,
            maps,
            by_name,
        })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The identity of the content, the same for every slice of it.
    pub fn id(&self) -> VindexId {
        self.id
    }

    /// What the whole vindex holds.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The bytes of `index.json`.
    pub fn index_json(&self) -> &[u8] {
        &self.index_json
    }

    /// What this directory holds of it.
    pub fn slice(&self) -> Slice {
        self.slice
    }

    /// Where it came from, if that is recorded.
    pub fn provenance(&self) -> Option<&Provenance> {
        self.provenance.as_ref()
    }

    /// The tensor called `name`; `None` when the vindex has no such tensor or this slice has not its part.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let Tensor {
            ne,
            block_type,
            part,
            offset_bytes,
            size_bytes,
            ..
        } = &self.index.tensors[*self.by_name.get(name)?];
        let map = self.maps[*part as usize].as_ref()?;
        // In bounds: the index was checked against the part's size, and the part's size against the file's.
        let start = *offset_bytes as usize;
        let bytes = &map[start..start + *size_bytes as usize];
        Some(TensorView {
            ne,
            block_type: *block_type,
            bytes,
        })
    }

    /// Key-values of the first part: what the model is, its tokenizer and its chat template. Every slice has that part.
    /// Reads the whole header, so that a caller who needs several keys keeps it.
    ///
    /// # Errors
    /// [`Error::Index`] when the part is no GGUF file.
    pub fn metadata(&self) -> Result<Vec<(String, MetaValue)>, Error> {
        let bytes = self.part_bytes(0).unwrap_or_default();
        match gguf::read_header(bytes) {
            Ok(header) => Ok(header.metadata),
            Err(reason) => Err(Error::Index {
                path: self.dir.join(&self.index.parts[0].file),
                reason: reason.to_string(),
            }),
        }
    }

    /// The mapped bytes of a part; `None` when this slice has it not.
    pub(crate) fn part_bytes(&self, part: usize) -> Option<&[u8]> {
        self.maps.get(part)?.as_deref()
    }
}

/// Text and content of `dir/index.json`.
pub(crate) fn read_index(dir: &Path) -> Result<(Vec<u8>, Index), Error> {
    let path = dir.join(INDEX_FILE);
    let text = read_bounded(&path, MAX_INDEX_BYTES)?.ok_or_else(|| Error::NotAVindex {
        path: dir.to_owned(),
    })?;
    let index = Index::from_json(&text).map_err(|reason| Error::Index { path, reason })?;
    Ok((text, index))
}

/// What `dir/slice.json` records.
pub(crate) fn read_slice(dir: &Path) -> Result<Slice, Error> {
    let path = dir.join(SLICE_FILE);
    match read_json::<Recorded>(&path)? {
        Some(recorded) => Ok(recorded.slice),
        None => Err(Error::Index {
            path,
            reason:
                "there is no such file, so it is unknown which slice this is; pull or extract again"
                    .to_owned(),
        }),
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let Some(text) = read_bounded(path, MAX_SMALL_FILE_BYTES)? else {
        return Ok(None);
    };
    let value = serde_json::from_slice(&text);
    value.map(Some).map_err(|e| Error::Index {
        path: path.to_owned(),
        reason: e.to_string(),
    })
}

/// Maps a whole file for reading.
pub(crate) fn map(file: &File, path: &Path) -> Result<Mmap, Error> {
    // SAFETY: the bytes are only ever read, and any value of them is a valid u8. Parts are written beside and renamed,
    // never changed in place; whoever truncates one under a running process ends it with SIGBUS, as with every map.
    unsafe { Mmap::map(file) }.map_err(Error::io("map", path))
}

/// Names of the tensors in part `part`.
pub(crate) fn names(index: &Index, part: usize) -> Vec<String> {
    index
        .tensors
        .iter()
        .filter(|tensor| tensor.part as usize == part)
        .map(|tensor| tensor.name.clone())
        .collect()
}
