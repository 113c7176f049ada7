//! A vindex that is there to be read: its index, and its tensors as mapped bytes.
//!
//! Invariant: opening reads `index.json` and the lengths of the parts, no weight; each part of what is opened is there
//! with the recorded length, so that a view never leaves its file, and a view is only ever of what is held, so that no
//! hole of a file is taken for weights. Whether the bytes are the right ones is asked of `verify.rs`.

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
use crate::plan::Component;
use crate::provenance::{PROVENANCE_FILE, Provenance};
use crate::share::{Hold, Share, Span};
use crate::slice::{SLICE_FILE, Slice};

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
    share: Share,
    provenance: Option<Provenance>,
    /// One a part of the index; `None` where the share has nothing of the part.
    maps: Vec<Option<Mmap>>,
    /// One a part of the index: what the share holds of it.
    holds: Vec<Hold>,
    by_name: HashMap<String, usize>,
}

/// One tensor in mapped memory.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Shape, the row length first.
    pub ne: &'a [u64],
    /// How rows are stored.
    pub block_type: BlockType,
    /// All rows, one after another; a tensor begins at a multiple of 32 bytes, an expert of one where the expert before
    /// it ends.
    pub bytes: &'a [u8],
}

impl Vindex {
    /// Opens the vindex in `dir` for all that its `slice.json` records.
    ///
    /// # Errors
    /// [`Error::NotAVindex`] when there is no `index.json`, [`Error::Index`] when it or a file beside it is not
    /// well-formed, [`Error::Damaged`] when parts are missing or have another length, [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Vindex, Error> {
        Vindex::open_as(dir, |_, recorded| Ok(recorded))
    }

    /// Opens of the vindex in `dir` what `choose` makes of its index and of what `slice.json` records; the other parts
    /// are not touched, and need not be there.
    ///
    /// # Errors
    /// As [`Vindex::open`]; [`Error::ShareNotHere`] when more is chosen than is recorded, [`Error::NoShare`] with the
    /// sentence of `choose`.
    pub fn open_as(
        dir: &Path,
        choose: impl FnOnce(&Index, Share) -> Result<Share, String>,
    ) -> Result<Vindex, Error> {
        let (index_json, index) = read_index(dir)?;
        let recorded = read_share(dir, &index)?;
        let no_share = |reason| Error::NoShare {
            path: dir.to_owned(),
            reason,
        };
        let share = choose(&index, recorded).map_err(no_share)?;
        share.check(&index).map_err(no_share)?;
        must_cover(dir, &recorded, &share)?;
        let provenance = read_json(&dir.join(PROVENANCE_FILE))?;
        let mut maps = Vec::new();
        let mut wrong = Vec::new();
        let n_parts = index.parts.len();
        let holds: Vec<Hold> = (0..n_parts).map(|i| share.of_part(&index, i)).collect();
        for (i, part) in index.parts.iter().enumerate() {
            if holds[i] == Hold::Nothing {
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
            share,
            provenance,
            maps,
            holds,
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

    /// The role that it was opened for.
    pub fn slice(&self) -> Slice {
        self.share.slice
    }

    /// What of it was opened.
    pub fn share(&self) -> Share {
        self.share
    }

    /// Whether feed-forward rows of this expert of this layer can be computed; a dense layer has expert 0.
    pub fn holds_expert(&self, layer: u32, expert: u32) -> bool {
        let Share {
            slice,
            layers,
            experts,
        } = self.share;
        let n_experts = self.index.config.experts.map_or(1, |experts| experts.n);
        let within =
            |span: Option<Span>, n: u32, k: u32| k < n && span.is_none_or(|span| span.has(k));
        slice.holds(Component::FeedForward { layer })
            && within(layers, self.index.config.n_layers, layer)
            && within(experts, n_experts, expert)
    }

    /// Where it came from, if that is recorded.
    pub fn provenance(&self) -> Option<&Provenance> {
        self.provenance.as_ref()
    }

    /// The tensor called `name`; `None` when the vindex has no such tensor or not all of it is held here.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (tensor, map) = self.held(name)?;
        match self.holds[tensor.part as usize] {
            Hold::Whole => Some(view(tensor, map, &tensor.ne, 0, tensor.size_bytes)),
            Hold::Experts(span) if tensor.sha256.is_some() && span.has(0) => {
                Some(view(tensor, map, &tensor.ne, 0, tensor.size_bytes))
            }
            Hold::Experts(_) | Hold::Nothing => None,
        }
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

    /// Expert `expert` of the stacked tensor `name`, as a matrix of its own; expert 0 of a tensor that is not stacked is
    /// that tensor. `None` when there is no such tensor or expert, or it is not held here.
    pub fn expert(&self, name: &str, expert: u32) -> Option<TensorView<'_>> {
        let (tensor, map) = self.held(name)?;
        let hold = self.holds[tensor.part as usize];
        let n = match &tensor.experts {
            None if expert == 0 => return self.tensor(name),
            None => return None,
            Some(hashes) => hashes.len() as u64,
        };
        let is_held = match hold {
            Hold::Nothing => false,
            Hold::Whole => u64::from(expert) < n,
            Hold::Experts(span) => u64::from(expert) < n && span.has(expert),
        };
        let size_bytes = tensor.size_bytes / n;
        let ne = &tensor.ne[..tensor.ne.len() - 1];
        is_held.then(|| view(tensor, map, ne, u64::from(expert) * size_bytes, size_bytes))
    }

    /// Whether everything of `share` is open here.
    pub(crate) fn must_hold(&self, share: &Share) -> Result<(), Error> {
        must_cover(&self.dir, &self.share, share)
    }

    fn held(&self, name: &str) -> Option<(&Tensor, &Mmap)> {
        let tensor = &self.index.tensors[*self.by_name.get(name)?];
        Some((tensor, self.maps[tensor.part as usize].as_ref()?))
    }

    /// The mapped bytes of a part; `None` when nothing of it is held here.
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

/// What `dir/slice.json` records of a vindex with this index.
pub(crate) fn read_share(dir: &Path, index: &Index) -> Result<Share, Error> {
    let path = dir.join(SLICE_FILE);
    let Some(share) = read_json::<Share>(&path)? else {
        return Err(Error::Index {
            path,
            reason:
                "there is no such file, so it is unknown which slice this is; pull or extract again"
                    .to_owned(),
        });
    };
    match share.check(index) {
        Ok(()) => Ok(share),
        Err(reason) => Err(Error::Index { path, reason }),
    }
}

fn must_cover(dir: &Path, has: &Share, wanted: &Share) -> Result<(), Error> {
    if has.covers(wanted) {
        return Ok(());
    }
    Err(Error::ShareNotHere {
        path: dir.to_owned(),
        has: *has,
        wanted: *wanted,
    })
}

/// Some bytes of a tensor's. In bounds: the index was checked against the part's size, and that against the file's.
fn view<'a>(
    tensor: &'a Tensor,
    map: &'a Mmap,
    ne: &'a [u64],
    from: u64,
    size_bytes: u64,
) -> TensorView<'a> {
    let start = (tensor.offset_bytes + from) as usize;
    TensorView {
        ne,
        block_type: tensor.block_type,
        bytes: &map[start..start + size_bytes as usize],
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
