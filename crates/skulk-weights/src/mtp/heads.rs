//! Which tensors of a checkpoint are heads, where their bytes and those of their scales are, and what their bytes mean.
//!
//! Two steps, so that little is asked for nothing: [`names`] reads `config.json` and the index, which usually tell
//! whether there are heads; [`Heads::read`] reads the headers of the shards that hold some. Invariant: of weights, only
//! headers are read here. Every head tensor has one [`Codec`], or the whole is refused by the name of the tensor.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use quant::{BlockType, Narrow};
use serde_json::Value;
use terminal::Failure;
use vindex::{Dtype, Grid, Source, SourceTensor, safetensors_header};

use crate::mtp::spelling::{Spelling, language_field};

const CONFIG_FILE: &str = "config.json";
const INDEX_FILE: &str = "model.safetensors.index.json";
const INDEX_SUFFIX: &str = ".safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";
const CONFIG_BYTES_MAX: u64 = 16 << 20;
const INDEX_BYTES_MAX: u64 = 256 << 20;

/// What the small files of a checkpoint say.
pub(crate) struct Names {
    pub(crate) config: Value,
    sizes: BTreeMap<String, u64>,
    /// Tensors and their shards; empty without an index.
    weight_map: BTreeMap<String, String>,
    index_file: Option<String>,
}

/// The head tensors of a checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct Heads {
    pub(crate) spelling: Spelling,
    /// In order of their names in the sidecar.
    pub(crate) tensors: Vec<HeadTensor>,
}

/// One tensor of a head.
#[derive(Debug, Clone)]
pub(crate) struct HeadTensor {
    /// Its name in the sidecar.
    pub(crate) name: String,
    /// Its name in the checkpoint.
    pub(crate) original: String,
    /// Shape of its values, slowest dimension first.
    pub(crate) shape: Vec<u64>,
    pub(crate) source: SourceTensor,
    pub(crate) codec: Codec,
}

/// What the bytes of a tensor become.
#[derive(Debug, Clone)]
pub(crate) enum Codec {
    /// Copied as they are: BF16, or F32 that is kept.
    Copy,
    /// Floats of this type, rounded to BF16.
    Float(BlockType),
    /// Codes times their scales, rounded to BF16.
    Scaled {
        narrow: Narrow,
        grid: Grid,
        scale: Box<Scale>,
    },
}

/// The scales of a quantised tensor.
#[derive(Debug, Clone)]
pub(crate) struct Scale {
    /// Name in the checkpoint.
    pub(crate) original: String,
    pub(crate) source: SourceTensor,
    pub(crate) kind: ScaleKind,
    /// A number for the whole tensor that each scale is multiplied with, or divided by.
    pub(crate) global: Option<(SourceTensor, bool)>,
}

/// What a scale's bytes mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScaleKind {
    Float(BlockType),
    Narrow(Narrow),
}

impl HeadTensor {
    /// How many values it has.
    pub(crate) fn n_values(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes that must be read for it: its own and those of its scales.
    pub(crate) fn read_bytes(&self) -> u64 {
        let scales = match &self.codec {
            Codec::Scaled { scale, .. } => {
                scale.source.size_bytes + scale.global.as_ref().map_or(0, |(g, _)| g.size_bytes)
            }
            _ => 0,
        };
        self.source.size_bytes + scales
    }

    /// Whether it stays F32 in the sidecar.
    pub(crate) fn is_f32(&self) -> bool {
        matches!(self.codec, Codec::Copy) && self.source.dtype == Dtype::F32
    }
}

/// Reads `config.json` and the index of `source`.
pub(crate) fn names(source: &dyn Source) -> Result<Names, Failure> {
    let files = source
        .files()
        .map_err(|error| unreadable("the list of files", error))?;
    let sizes: BTreeMap<String, u64> = files
        .into_iter()
        .map(|file| (file.path, file.size_bytes))
        .collect();
    let mut names = Names {
        config: Value::Null,
        sizes,
        weight_map: BTreeMap::new(),
        index_file: None,
    };
    if let Some(config) = names.json(source, CONFIG_FILE, CONFIG_BYTES_MAX)? {
        names.config = config;
    }
    let is_index = |path: &&String| path.ends_with(INDEX_SUFFIX) && !path.contains('/');
    names.index_file = match names.sizes.contains_key(INDEX_FILE) {
        true => Some(INDEX_FILE.to_owned()),
        false => names.sizes.keys().find(is_index).cloned(),
    };
    if let Some(file) = names.index_file.clone() {
        let index = names
            .json(source, &file, INDEX_BYTES_MAX)?
            .unwrap_or_default();
        let map = index.get("weight_map").and_then(Value::as_object);
        let Some(map) = map else {
            return Err(Failure::new(format!("{file} has no weight_map")));
        };
        for (name, shard) in map {
            let Some(shard) = shard.as_str() else {
                return Err(Failure::new(format!(
                    "{file} names no file for the tensor {name}"
                )));
            };
            names.weight_map.insert(name.clone(), shard.to_owned());
        }
    }
    Ok(names)
}

impl Names {
    /// How the index alone spells heads; `None` when it names none, or there is no index.
    pub(crate) fn spelling(&self) -> Option<Spelling> {
        Spelling::of(self.weight_map.keys().map(String::as_str), &self.config)
    }

    /// How many head tensors the index names, where none of their shards is there to be read.
    pub(crate) fn n_unreadable(&self) -> Option<usize> {
        let spelling = self.spelling()?;
        let shards = self.shards(Some(&spelling));
        let named = self.weight_map.keys();
        (!shards.iter().any(|shard| self.sizes.contains_key(shard)))
            .then(|| named.filter(|name| spelling.rename(name).is_some()).count())
    }

    /// Of a checkpoint without an index: how many files it has, and how many head tensors their headers list; `None`
    /// when it has no weights.
    pub(crate) fn n_in_headers(
        &self,
        source: &dyn Source,
    ) -> Result<Option<(usize, usize)>, Failure> {
        let mut headers = Headers {
            source,
            names: self,
            tensors: HashMap::new(),
            read: BTreeSet::new(),
        };
        let shards = self.shards(None);
        for shard in &shards {
            headers.read(shard)?;
        }
        let found = headers.tensors.keys().map(String::as_str);
        let n_heads = match Spelling::of(found.clone(), &self.config) {
            Some(spelling) => found.filter(|name| spelling.rename(name).is_some()).count(),
            None => 0,
        };
        Ok((!shards.is_empty()).then_some((shards.len(), n_heads)))
    }

    /// The files in which heads may be: those that the index names for some, else what no index accounts for.
    fn shards(&self, spelling: Option<&Spelling>) -> BTreeSet<String> {
        if let Some(spelling) = spelling {
            let of_heads = self
                .weight_map
                .iter()
                .filter(|(name, _)| spelling.rename(name).is_some());
            return of_heads.map(|(_, shard)| shard.clone()).collect();
        }
        if self.index_file.is_none() && self.sizes.contains_key(SINGLE_FILE) {
            return BTreeSet::from([SINGLE_FILE.to_owned()]);
        }
        let indexed: BTreeSet<&String> = self.weight_map.values().collect();
        self.sizes
            .keys()
            .filter(|path| path.ends_with(".safetensors") && !path.contains('/'))
            .filter(|path| !indexed.contains(path))
            .cloned()
            .collect()
    }

    fn json(
        &self,
        source: &dyn Source,
        file: &str,
        bytes_max: u64,
    ) -> Result<Option<Value>, Failure> {
        let Some(&size_bytes) = self.sizes.get(file) else {
            return Ok(None);
        };
        if size_bytes > bytes_max {
            return Err(Failure::new(format!(
                "{file} has {size_bytes} bytes, at most {bytes_max} are read"
            )));
        }
        let mut bytes = vec![0; size_bytes as usize];
        source
            .read_at(file, 0, &mut bytes)
            .map_err(|error| unreadable(file, error))?;
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(Failure::of(format!("{file} is no JSON")))
    }
}

impl Heads {
    /// Reads the headers of the shards that hold heads. `keep_f32` keeps router biases that are F32. `None` when the
    /// checkpoint has no heads.
    pub(crate) fn read(
        source: &dyn Source,
        names: &Names,
        keep_f32: bool,
    ) -> Result<Option<Heads>, Failure> {
        let indexed = names.spelling();
        let mut headers = Headers {
            source,
            names,
            tensors: HashMap::new(),
            read: BTreeSet::new(),
        };
        for shard in names.shards(indexed.as_ref()) {
            headers.read(&shard)?;
        }
        let found = headers.tensors.keys().map(String::as_str);
        let Some(spelling) = indexed.or_else(|| Spelling::of(found, &names.config)) else {
            return Ok(None);
        };
        for name in names
            .weight_map
            .keys()
            .filter(|name| spelling.rename(name).is_some())
        {
            if !headers.tensors.contains_key(name) {
                let (index, shard) = (
                    names.index_file.as_deref().unwrap_or(INDEX_FILE),
                    &names.weight_map[name],
                );
                return Err(Failure::new(format!(
                    "{index} names {shard} for the tensor {name}, which is not in it"
                )));
            }
        }
        let mut originals: Vec<String> = headers
            .tensors
            .keys()
            .filter(|name| spelling.rename(name).is_some())
            .cloned()
            .collect();
        originals.sort();
        let tile = tile(&names.config);
        let mut companions = BTreeSet::new();
        let mut codecs = Vec::with_capacity(originals.len());
        for original in originals {
            let found = headers.codec(&original, tile, keep_f32, &mut companions);
            codecs.push((original, found));
        }
        let mut tensors = Vec::with_capacity(codecs.len());
        for (original, found) in codecs {
            if companions.contains(&original) {
                continue;
            }
            let (codec, shape) = found?;
            tensors.push(HeadTensor {
                name: spelling
                    .rename(&original)
                    .unwrap_or_else(|| original.clone()),
                source: headers.tensors[&original].clone(),
                original,
                shape,
                codec,
            });
        }
        // Two spellings of one name (`mtp.a`, `model.mtp.a`): both stay as they are.
        let mut n_of: HashMap<String, usize> = HashMap::new();
        for tensor in &tensors {
            *n_of.entry(tensor.name.clone()).or_default() += 1;
        }
        for tensor in &mut tensors {
            if n_of[&tensor.name] > 1 {
                tensor.name.clone_from(&tensor.original);
            }
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((!tensors.is_empty()).then_some(Heads { spelling, tensors }))
    }
}

/// The headers that were read, and what is in them.
struct Headers<'a> {
    source: &'a dyn Source,
    names: &'a Names,
    tensors: HashMap<String, SourceTensor>,
    read: BTreeSet<String>,
}

impl Headers<'_> {
    fn read(&mut self, shard: &str) -> Result<(), Failure> {
        if !self.read.insert(shard.to_owned()) {
            return Ok(());
        }
        let Some(&size_bytes) = self.names.sizes.get(shard) else {
            let index = self.names.index_file.as_deref().unwrap_or(INDEX_FILE);
            return Err(Failure::new(format!(
                "{index} names the file {shard}, which is not there"
            )));
        };
        let header = safetensors_header(self.source, shard, size_bytes)
            .map_err(Failure::of(format!("cannot read the header of {shard}")))?;
        for (name, tensor) in header {
            if let Some(other) = self.tensors.get(&name) {
                return Err(Failure::new(format!(
                    "the tensor {name} is in {} and in {shard}",
                    other.file
                )));
            }
            self.tensors.insert(name, tensor);
        }
        Ok(())
    }

    /// The tensor of that name, wherever the index has it.
    fn find(&mut self, name: &str) -> Result<Option<SourceTensor>, Failure> {
        if let Some(tensor) = self.tensors.get(name) {
            return Ok(Some(tensor.clone()));
        }
        let Some(shard) = self.names.weight_map.get(name).cloned() else {
            return Ok(None);
        };
        self.read(&shard)?;
        Ok(self.tensors.get(name).cloned())
    }

    /// The codec of a tensor and the shape of its values; adds the tensors that are part of this one to `companions`.
    fn codec(
        &mut self,
        name: &str,
        tile: Option<[u64; 2]>,
        keep_f32: bool,
        companions: &mut BTreeSet<String>,
    ) -> Result<(Codec, Vec<u64>), Failure> {
        let tensor = self.tensors[name].clone();
        let shape = tensor.shape.clone();
        let narrow = match tensor.dtype {
            Dtype::BF16 => return Ok((Codec::Copy, shape)),
            Dtype::F32 if keep_f32 && is_router_bias(name) => return Ok((Codec::Copy, shape)),
            Dtype::F32 => return Ok((Codec::Float(BlockType::F32), shape)),
            Dtype::F16 => return Ok((Codec::Float(BlockType::F16), shape)),
            Dtype::Other(_) | Dtype::Unread | Dtype::Blocks(_) | Dtype::Coded => {
                match tensor.dtype.to_string().as_str() {
                    "F8_E4M3" => Narrow::E4M3,
                    "F8_E5M2" => Narrow::E5M2,
                    "F4" | "U8" => Narrow::E2M1,
                    "I8" => Narrow::I8,
                    other => return Err(unsupported(name, other)),
                }
            }
        };
        let dtype = tensor.dtype.to_string();
        let is_pairs = dtype == "U8";
        let Some((scale_name, scale)) = self.scale_of(name)? else {
            if is_pairs {
                return Err(unsupported(name, &dtype));
            }
            return Err(Failure::new(format!(
                "the tensor {name} is {dtype} and has no scale tensor"
            ))
            .hint("its scale would be named weight_scale_inv, weight_scale or scale"));
        };
        let scale_dtype = scale.dtype.to_string();
        let global = self.global_scale_of(name, companions)?;
        // A row of bytes that hold two values each has one scale for 16 bytes, or fewer.
        let fp4_scale = matches!(scale_dtype.as_str(), "F8_E8M0" | "U8")
            || (scale_dtype == "F8_E4M3" && global.is_some());
        let is_fp4 = match dtype.as_str() {
            "F4" => true,
            "U8" => fp4_scale,
            "I8" => scale_dtype == "F8_E8M0" && packs_pairs(&tensor.shape, &scale.shape),
            _ => false,
        };
        if is_pairs && !is_fp4 {
            return Err(unsupported(name, &dtype));
        }
        let (narrow, shape) = match (is_fp4, dtype.as_str()) {
            (false, _) => (narrow, shape),
            (true, "F4") => (Narrow::E2M1, shape),
            (true, _) => (Narrow::E2M1, unpacked(name, shape, &scale.shape)),
        };
        let kind = match scale_dtype.as_str() {
            "F32" => ScaleKind::Float(BlockType::F32),
            "F16" => ScaleKind::Float(BlockType::F16),
            "BF16" => ScaleKind::Float(BlockType::BF16),
            "F8_E8M0" => ScaleKind::Narrow(Narrow::E8M0),
            "U8" if is_fp4 => ScaleKind::Narrow(Narrow::E8M0),
            "F8_E4M3" if is_fp4 => ScaleKind::Narrow(Narrow::E4M3),
            other => {
                return Err(Failure::new(format!(
                    "the scale {scale_name} of {name} has the type {other}, which is no type of scales here"
                )));
            }
        };
        if let Some(stem) = stem(name) {
            for zero in [".weight_zero_point", ".zero_point", ".zeros", ".qzeros"] {
                if self.find(&format!("{stem}{zero}"))?.is_some() {
                    return Err(Failure::new(format!(
                        "the tensor {name} has zero points ({stem}{zero}), which are not read"
                    )));
                }
            }
            for other in [
                ".input_scale",
                ".input_global_scale",
                ".activation_scale",
                ".weight_shape",
            ] {
                companions.insert(format!("{stem}{other}"));
            }
        }
        companions.insert(scale_name.clone());
        if shape.contains(&0) {
            return Ok((Codec::Copy, shape));
        }
        let Some(grid) = Grid::of(&shape, &scale.shape, tile) else {
            return Err(Failure::new(format!(
                "the scale {scale_name} of shape {:?} does not spread over {name}, whose values have the shape {shape:?}",
                scale.shape
            )));
        };
        if narrow == Narrow::E2M1
            && (!grid.cols.is_multiple_of(2)
                || (grid.scale_cols > 1 && !grid.block_cols.is_multiple_of(2)))
        {
            return Err(Failure::new(format!(
                "the scale {scale_name} splits a byte of {name}"
            )));
        }
        let scale = Box::new(Scale {
            original: scale_name,
            source: scale,
            kind,
            global,
        });
        Ok((
            Codec::Scaled {
                narrow,
                grid,
                scale,
            },
            shape,
        ))
    }

    fn scale_of(&mut self, name: &str) -> Result<Option<(String, SourceTensor)>, Failure> {
        let mut candidates = vec![format!("{name}_scale_inv"), format!("{name}_scale")];
        if let Some(stem) = stem(name) {
            for ending in [
                ".weight_scale_inv",
                ".weight_scale",
                ".scale",
                ".scale_inv",
                ".scales",
            ] {
                candidates.push(format!("{stem}{ending}"));
            }
        }
        if let Some(stem) = name.strip_suffix("_blocks") {
            candidates.push(format!("{stem}_scales"));
        }
        for candidate in candidates {
            if candidate != name
                && let Some(tensor) = self.find(&candidate)?
            {
                return Ok(Some((candidate, tensor)));
            }
        }
        Ok(None)
    }

    /// One number for the whole tensor: ModelOpt's `weight_scale_2` multiplies, compressed-tensors'
    /// `weight_global_scale` divides.
    fn global_scale_of(
        &mut self,
        name: &str,
        companions: &mut BTreeSet<String>,
    ) -> Result<Option<(SourceTensor, bool)>, Failure> {
        let Some(stem) = stem(name) else {
            return Ok(None);
        };
        for (ending, divides) in [(".weight_scale_2", false), (".weight_global_scale", true)] {
            let global = format!("{stem}{ending}");
            let Some(tensor) = self.find(&global)? else {
                continue;
            };
            if tensor.dtype != Dtype::F32 || tensor.size_bytes != 4 {
                return Err(Failure::new(format!(
                    "the scale {global} of {name} is {} {:?}, not one F32",
                    tensor.dtype, tensor.shape
                )));
            }
            companions.insert(global);
            return Ok(Some((tensor, divides)));
        }
        Ok(None)
    }
}

/// The name of the module that a weight belongs to.
fn stem(name: &str) -> Option<&str> {
    name.strip_suffix(".weight")
        .or_else(|| name.strip_suffix(".weight_packed"))
}

fn is_router_bias(name: &str) -> bool {
    [
        "e_score_correction_bias",
        ".gate.bias",
        ".router.bias",
        ".expert_bias",
    ]
    .iter()
    .any(|ending| name.ends_with(ending))
}

/// Whether signed bytes are pairs of 4-bit codes: one power of two for each 16 bytes of a row.
fn packs_pairs(bytes: &[u64], scales: &[u64]) -> bool {
    match (bytes, scales) {
        ([above @ .., n_bytes], [scales_above @ .., n_scales]) => {
            !above.is_empty() && above == scales_above && *n_scales > 0 && *n_bytes == 16 * n_scales
        }
        _ => false,
    }
}

/// The shape of the values in bytes that hold two each; `_blocks` have a dimension for each scale's 16 bytes.
fn unpacked(name: &str, mut shape: Vec<u64>, scales: &[u64]) -> Vec<u64> {
    if name.ends_with("_blocks") && shape.len() == scales.len() + 1 {
        let bytes = shape.pop().unwrap_or(1);
        if let Some(last) = shape.last_mut() {
            *last = last.saturating_mul(bytes);
        }
    }
    if let Some(last) = shape.last_mut() {
        *last = last.saturating_mul(2);
    }
    shape
}

/// `weight_block_size` of the configuration.
fn tile(config: &Value) -> Option<[u64; 2]> {
    let sides = language_field(config, "quantization_config")?
        .get("weight_block_size")?
        .as_array()?;
    match sides.as_slice() {
        [rows, cols] => Some([rows.as_u64()?, cols.as_u64()?]),
        _ => None,
    }
}

fn unsupported(name: &str, dtype: &str) -> Failure {
    Failure::new(format!(
        "the head tensor {name} has the type {dtype}, which cannot be converted"
    ))
    .hint("supported are BF16, F16, F32, F8_E4M3, F8_E5M2 and I8 with scales, and packed FP4")
}

fn unreadable(what: &str, error: vindex::SourceError) -> Failure {
    Failure::new(format!("cannot read {what}: {error}"))
}
