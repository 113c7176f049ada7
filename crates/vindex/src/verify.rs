//! Whether a directory holds what it says: every byte of the recorded share is hashed and every header read.
//!
//! Invariant: all wrong parts are found and told, not only the first.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::path::Path;

use rayon::prelude::*;

use crate::error::{Error, Wrong, WrongPart};
use crate::extract::Progress;
use crate::gguf::{self, MetaValue};
use crate::index::{Index, VindexId, hash_range};
use crate::open::{map, names, read_index, read_share};
use crate::share::{ExpertBytes, Hold, Share, Span, expert_bytes, part_header};

/// What was found to be intact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The identity of the content.
    pub id: VindexId,
    /// What of it the directory holds.
    pub share: Share,
    /// Parts of which it holds something.
    pub n_parts: usize,
    /// What it holds of them, together.
    pub bytes: u64,
}

/// Hashes all that the recorded share of `dir` should hold, and compares with the index: length, sha256, the hash of each
/// expert, and each part's own header. Reads every byte that is held, on all cores.
///
/// # Errors
/// [`Error::Damaged`] with every wrong part; [`Error::NotAVindex`], [`Error::Index`] and [`Error::Io`] as
/// [`crate::Vindex::open`].
pub fn verify(dir: &Path, progress: &(dyn Fn(Progress) + Sync)) -> Result<Verified, Error> {
    let (index_json, index) = read_index(dir)?;
    let share = read_share(dir, &index)?;
    let holds = (0..index.parts.len()).map(|i| (i, share.of_part(&index, i)));
    let parts: Vec<(usize, Hold)> = holds.filter(|(_, hold)| *hold != Hold::Nothing).collect();
    let bytes = share.size_bytes(&index);
    progress(Progress::Started {
        n_parts: parts.len(),
        bytes_total: bytes,
    });
    let wrong: Vec<WrongPart> = parts
        .par_iter()
        .enumerate()
        .filter_map(
            |(nth, &(i, hold))| match verify_part(dir, &index, i, hold, progress) {
                Ok(()) => {
                    let (file, size_bytes) =
                        (index.parts[i].file.clone(), index.parts[i].size_bytes);
                    progress(Progress::PartDone {
                        index: nth,
                        n_parts: parts.len(),
                        file,
                        size_bytes,
                    });
                    None
                }
                Err((what, tensors)) => Some(WrongPart {
                    file: index.parts[i].file.clone(),
                    what,
                    tensors,
                }),
            },
        )
        .collect();
    if !wrong.is_empty() {
        return Err(Error::Damaged {
            path: dir.to_owned(),
            wrong,
        });
    }
    Ok(Verified {
        id: VindexId::of(&index_json),
        share,
        n_parts: parts.len(),
        bytes,
    })
}

/// What is wrong with what is held of part `i`, and the tensors that it damages.
fn verify_part(
    dir: &Path,
    index: &Index,
    i: usize,
    hold: Hold,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(), (Wrong, Vec<String>)> {
    let part = &index.parts[i];
    let path = dir.join(&part.file);
    let unreadable = |e: std::io::Error| (Wrong::Unreadable(e.to_string()), names(index, i));
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Err((Wrong::Missing, names(index, i))),
        Err(e) => return Err(unreadable(e)),
    };
    let got = file.metadata().map_err(unreadable)?.len();
    if got != part.size_bytes {
        return Err((
            Wrong::Size {
                expected: part.size_bytes,
                got,
            },
            damaged(&file, index, i, hold),
        ));
    }
    if let Hold::Experts(span) = hold {
        return verify_experts(&file, index, i, span, progress);
    }
    let got = hash_range(&file, 0, part.size_bytes, &|n| progress(Progress::Bytes(n)))
        .map_err(unreadable)?;
    if got != part.sha256 {
        return Err((
            Wrong::Sha256 {
                expected: part.sha256.clone(),
                got,
            },
            damaged(&file, index, i, hold),
        ));
    }
    let bytes =
        map(&file, &path).map_err(|e| (Wrong::Unreadable(e.to_string()), names(index, i)))?;
    let header = gguf::read_header(&bytes).and_then(|header| compare(&header, index, i));
    header.map_err(|why| (Wrong::Header(why), names(index, i)))?;
    let experts = damaged_experts(&file, index, i, ALL, &|_| ());
    if !experts.is_empty() {
        return Err((
            Wrong::Header("the index has other hashes for experts".to_owned()),
            experts,
        ));
    }
    Ok(())
}

/// Of a part that is held by a range of experts: its header, which the index determines, and each expert.
fn verify_experts(
    file: &File,
    index: &Index,
    i: usize,
    span: Span,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(), (Wrong, Vec<String>)> {
    let damaged = damaged_experts(file, index, i, span, &|n| progress(Progress::Bytes(n)));
    if !damaged.is_empty() {
        return Err((Wrong::Experts, damaged));
    }
    let expected = part_header(index, i).unwrap_or_default();
    let mut got = vec![0; expected.len()];
    let mut file = file;
    let read = file.rewind().and_then(|()| file.read_exact(&mut got));
    if let Err(e) = read {
        return Err((Wrong::Unreadable(e.to_string()), names(index, i)));
    }
    if got != expected {
        let why = "it is not the one that the index determines".to_owned();
        return Err((Wrong::Header(why), names(index, i)));
    }
    Ok(())
}

/// All experts, in a part that is held whole.
const ALL: Span = match Span::new(0, u32::MAX) {
    Some(span) => span,
    None => unreachable!(),
};

/// Tensors of a part that is known to be damaged. Stacked experts have hashes of their own and are told one by one; a
/// tensor without may be damaged and therefore counts.
fn damaged(file: &File, index: &Index, i: usize, hold: Hold) -> Vec<String> {
    let tensors = index
        .tensors
        .iter()
        .filter(|tensor| tensor.part as usize == i)
        .filter(|tensor| tensor.experts.is_none() && tensor.sha256.is_none());
    let span = match hold {
        Hold::Experts(span) => span,
        Hold::Whole | Hold::Nothing => ALL,
    };
    tensors
        .map(|tensor| tensor.name.clone())
        .chain(damaged_experts(file, index, i, span, &|_| ()))
        .collect()
}

/// `name[expert]` of each expert in `span` whose bytes are not there or not those of the index.
fn damaged_experts(
    file: &File,
    index: &Index,
    i: usize,
    span: Span,
    progress: &dyn Fn(u64),
) -> Vec<String> {
    let is_stacked = |name: &str| {
        let mut tensors = index.tensors.iter();
        tensors.any(|tensor| tensor.name == name && tensor.experts.is_some())
    };
    let is_damaged = |expert: &ExpertBytes<'_>| {
        let n_bytes = expert.range.end - expert.range.start;
        let got = hash_range(file, expert.range.start, n_bytes, progress);
        got.ok().as_deref() != Some(expert.sha256)
    };
    expert_bytes(index, i, span)
        .into_iter()
        .filter(is_damaged)
        .map(|expert| match is_stacked(expert.tensor) {
            true => format!("{}[{}]", expert.tensor, expert.expert),
            false => expert.tensor.to_owned(),
        })
        .collect()
}

/// Whether a part's own header says what the index says of it.
fn compare(header: &gguf::Header, index: &Index, i: usize) -> Result<(), String> {
    let split = [
        ("split.no", MetaValue::U16(i as u16)),
        ("split.count", MetaValue::U16(index.parts.len() as u16)),
        (
            "split.tensors.count",
            MetaValue::I32(index.tensors.len() as i32),
        ),
    ];
    for (key, expected) in split {
        let got = header
            .metadata
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, value)| value);
        if got != Some(&expected) {
            return Err(format!("{key} is {got:?}, expected {expected:?}"));
        }
    }
    let expected: Vec<_> = index
        .tensors
        .iter()
        .filter(|tensor| tensor.part as usize == i)
        .collect();
    if header.tensors.len() != expected.len() {
        return Err(format!(
            "{} tensors, expected {}",
            header.tensors.len(),
            expected.len()
        ));
    }
    for (got, expected) in header.tensors.iter().zip(expected) {
        let same = got.name == expected.name
            && got.ne == expected.ne
            && got.block_type == expected.block_type
            && got.offset_bytes == expected.offset_bytes;
        if !same {
            return Err(format!(
                "tensor {} {} {:?} at {}, expected {} {} {:?} at {}",
                got.name,
                got.block_type,
                got.ne,
                got.offset_bytes,
                expected.name,
                expected.block_type,
                expected.ne,
                expected.offset_bytes
            ));
        }
    }
    Ok(())
}
