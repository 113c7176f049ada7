//! Where every byte of a plan's output will be, before a weight is read.
//!
//! Invariant: a file's length and every offset follow from the plan alone.

use crate::error::Error;
use crate::gguf::{self, MetaValue};
use crate::index::{INDEX_FILE, part_file};
use crate::plan::{Plan, PlannedPart};

/// The files that a plan will write.
pub(crate) struct Layout<'a> {
    plan: &'a Plan,
    /// One a part of the plan, in the same order.
    pub(crate) parts: Vec<PartLayout>,
}

/// One file.
pub(crate) struct PartLayout {
    /// Name in the output directory.
    pub(crate) file: String,
    /// Length of the file.
    pub(crate) size_bytes: u64,
    /// Where each tensor begins, from the start of the file.
    pub(crate) offsets_bytes: Vec<u64>,
}

impl<'a> Layout<'a> {
    /// # Errors
    /// [`Error::Plan`] when a tensor's row is no whole number of blocks, its size overflows, or the plan cannot be
    /// numbered as a split GGUF.
    pub(crate) fn new(plan: &'a Plan) -> Result<Layout<'a>, Error> {
        let wrong = |tensor: &str, reason: String| Error::Plan {
            tensor: tensor.to_owned(),
            reason,
        };
        let n_tensors: usize = plan.parts.iter().map(|part| part.tensors.len()).sum();
        if u16::try_from(plan.parts.len()).is_err() || i32::try_from(n_tensors).is_err() {
            return Err(wrong(
                INDEX_FILE,
                format!("{} parts do not fit a split GGUF", plan.parts.len()),
            ));
        }
        let mut total: u64 = 0;
        for part in &plan.parts {
            for tensor in &part.tensors {
                let size = gguf::size_bytes(tensor.block_type, &tensor.ne).and_then(gguf::aligned);
                let sum = size
                    .and_then(|size| total.checked_add(size))
                    .filter(|&sum| sum < 1 << 62);
                total = sum.ok_or_else(|| {
                    wrong(
                        &tensor.name,
                        format!(
                            "its shape {:?} cannot be stored as {}",
                            tensor.ne, tensor.block_type
                        ),
                    )
                })?;
            }
        }
        let mut layout = Layout {
            plan,
            parts: Vec::new(),
        };
        for (i, part) in plan.parts.iter().enumerate() {
            let (_, mut places) = layout.header_and_places(i, part);
            let size_bytes = places.pop().unwrap_or(0);
            let file = part_file(&plan.stem, i, plan.parts.len());
            layout.parts.push(PartLayout {
                file,
                size_bytes,
                offsets_bytes: places,
            });
        }
        Ok(layout)
    }

    /// The bytes of part `i` before its tensor data.
    pub(crate) fn header(&self, i: usize) -> Vec<u8> {
        self.header_and_places(i, &self.plan.parts[i]).0
    }

    fn header_and_places(&self, i: usize, part: &PlannedPart) -> (Vec<u8>, Vec<u64>) {
        let n_tensors: usize = self.plan.parts.iter().map(|part| part.tensors.len()).sum();
        let split = [
            ("split.no", MetaValue::U16(i as u16)),
            ("split.count", MetaValue::U16(self.plan.parts.len() as u16)),
            ("split.tensors.count", MetaValue::I32(n_tensors as i32)),
        ];
        let of_model: &[(String, MetaValue)] = if i == 0 { &self.plan.metadata } else { &[] };
        let of_model = of_model.iter().map(|(key, value)| (key.as_str(), value));
        let metadata: Vec<_> = of_model
            .chain(split.iter().map(|(key, value)| (*key, value)))
            .collect();
        let tensors: Vec<_> = part
            .tensors
            .iter()
            .map(|t| (t.name.as_str(), t.ne.as_slice(), t.block_type))
            .collect();
        gguf::write_header(metadata.into_iter(), &tensors)
    }
}
