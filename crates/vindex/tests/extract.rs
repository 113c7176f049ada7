//! From a checkpoint to a vindex: the bytes, against llama.cpp's converter and against ourselves.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;

use sha2::{Digest, Sha256};
use support::goldens::goldens;
use support::{OPTIONS, checkpoint_dir, copy_dir, extracted, listing, run};
use vindex::{
    Checkpoint, Component, Error, ExtractOptions, Index, LocalDir, MetaValue, Origin, Progress,
    Recipe, Slice, SliceContent, Source, SourceError, SourceFile, Vindex, VindexId, dump,
    read_header, slice_files, slice_files_of_index, verify,
};

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// Every tensor of every family has the name, the shape and, as f32, the bytes that llama.cpp's converter gives it.
#[test]
fn tensors_are_those_of_llama_cpps_converter() {
    for golden in goldens() {
        let tmp = tempfile::tempdir().unwrap();
        let out = tmp.path().join("out");
        let source = LocalDir::open(&golden.model).unwrap();
        run(&source, Recipe::F32, &out, &OPTIONS).0.unwrap();
        let vindex = Vindex::open(&out).unwrap();
        let converted: serde_json::Value =
            serde_json::from_slice(&fs::read(&golden.gguf).unwrap()).unwrap();
        let expected: BTreeMap<&str, String> = converted["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| {
                // Blocks that are kept as they are have a hash of their bytes.
                let sha256 = t.get("sha256_raw").unwrap_or(&t["sha256_f32"]);
                let text = format!("{} {} {}", t["type"], t["ne"], sha256);
                (t["name"].as_str().unwrap(), text)
            })
            .collect();
        let got: BTreeMap<&str, String> = vindex
            .index()
            .tensors
            .iter()
            .map(|t| {
                let view = vindex.tensor(&t.name).unwrap();
                let (ne, sha256) = (serde_json::json!(view.ne), sha256(view.bytes));
                let text = format!("{:?} {ne} {sha256:?}", view.block_type.name());
                (t.name.as_str(), text)
            })
            .collect();
        assert_eq!(got, expected, "{}", golden.family);
    }
}

/// Files and identity depend on neither the number of threads nor the run.
#[test]
fn bytes_do_not_depend_on_threads() {
    for family in ["mixtral", "gemma3", "llama3"] {
        for recipe in [Recipe::Q4k, Recipe::Bf16] {
            let mut first: Option<(VindexId, BTreeMap<String, String>)> = None;
            for threads in [1, 2, 5] {
                let tmp = tempfile::tempdir().unwrap();
                let out = tmp.path().join("out");
                let source = LocalDir::open(&checkpoint_dir(family)).unwrap();
                let options = ExtractOptions {
                    threads,
                    allow_nonfinite: false,
                };
                let id = run(&source, recipe, &out, &options).0.unwrap();
                let names = listing(&out)
                    .into_iter()
                    .filter(|name| name != "provenance.json");
                let files = names
                    .map(|name| (name.clone(), sha256(&fs::read(out.join(name)).unwrap())))
                    .collect();
                match &first {
                    None => first = Some((id, files)),
                    Some(first) => assert_eq!(
                        &(id, files),
                        first,
                        "{family} {recipe} with {threads} threads"
                    ),
                }
            }
        }
    }
}

/// What the directory holds, as text: the whole of `index.json` and the dump of one vindex.
#[test]
fn a_vindex_as_text() {
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("out");
    let id = extracted("mixtral", Recipe::Bf16, &out);
    let index = fs::read_to_string(out.join("index.json")).unwrap();
    insta::assert_snapshot!("mixtral-bf16-index", index);
    assert_eq!(id.to_string(), sha256(index.as_bytes()));
    assert_eq!(
        fs::read_to_string(out.join("slice.json")).unwrap(),
        "{\"slice\":\"full\"}\n"
    );

    let mut text = Vec::new();
    dump(&Vindex::open(&out).unwrap(), &mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    let without_time: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("source "))
        .collect();
    insta::assert_snapshot!("mixtral-bf16-dump", without_time.join("\n"));
}

/// Each part is a GGUF file of its own, cut as llama.cpp cuts one.
#[test]
fn parts_are_split_gguf() {
    let tmp = tempfile::tempdir().unwrap();
    extracted("qwen3_moe", Recipe::Q4k, tmp.path());
    let vindex = Vindex::open(tmp.path()).unwrap();
    let index = vindex.index();
    let n_parts = index.parts.len();
    for (i, part) in index.parts.iter().enumerate() {
        assert_eq!(
            part.file,
            format!("{}-{:05}-of-{n_parts:05}.gguf", index.stem, i + 1)
        );
        let bytes = fs::read(tmp.path().join(&part.file)).unwrap();
        assert_eq!(
            (bytes.len() as u64, sha256(&bytes)),
            (part.size_bytes, part.sha256.clone())
        );
        let header = read_header(&bytes).unwrap();
        let split: Vec<_> = header
            .metadata
            .iter()
            .filter(|(key, _)| key.starts_with("split."))
            .cloned()
            .collect();
        let expected = [
            ("split.no".to_owned(), MetaValue::U16(i as u16)),
            ("split.count".to_owned(), MetaValue::U16(n_parts as u16)),
            (
                "split.tensors.count".to_owned(),
                MetaValue::I32(index.tensors.len() as i32),
            ),
        ];
        assert_eq!(split, expected);
        assert_eq!(
            header.metadata.len() > 3,
            i == 0,
            "only the first part has metadata of the model"
        );
        assert_eq!(
            header.tensors.is_empty(),
            i == 0,
            "only the first part has no tensor"
        );
        // Tensors lie one after another at multiples of 32 bytes, zeros between them and to the end.
        let mut at = header.data_offset_bytes;
        for tensor in index
            .tensors
            .iter()
            .filter(|tensor| tensor.part as usize == i)
        {
            assert_eq!(tensor.offset_bytes, at, "{}", tensor.name);
            let end = at + tensor.size_bytes;
            at = end.next_multiple_of(32);
            assert!(
                bytes[end as usize..at as usize].iter().all(|&b| b == 0),
                "padding after {}",
                tensor.name
            );
        }
        assert_eq!(at, part.size_bytes);
    }
}

/// A stacked tensor has one hash for each expert, of the bytes a range request would fetch.
#[test]
fn experts_have_hashes() {
    let tmp = tempfile::tempdir().unwrap();
    extracted("mixtral", Recipe::Q4k, tmp.path());
    let vindex = Vindex::open(tmp.path()).unwrap();
    let stacked: Vec<_> = vindex
        .index()
        .tensors
        .iter()
        .filter(|t| t.experts.is_some())
        .collect();
    assert_eq!(stacked.len(), 3);
    for tensor in stacked {
        let bytes = vindex.tensor(&tensor.name).unwrap().bytes;
        let got: Vec<String> = bytes.chunks(bytes.len() / 4).map(sha256).collect();
        assert_eq!(tensor.experts.as_ref(), Some(&got), "{}", tensor.name);
    }
}

/// What lies beside experts has a hash of its own, so that it can be fetched with the first of them; nothing else has.
#[test]
fn what_lies_beside_experts_has_a_hash() {
    for golden in goldens() {
        let tmp = tempfile::tempdir().unwrap();
        support::extracted_from(&golden.model, Recipe::Q8_0, tmp.path());
        let vindex = Vindex::open(tmp.path()).unwrap();
        let index = vindex.index();
        for tensor in &index.tensors {
            let component = index.parts[tensor.part as usize].component;
            let in_part = || index.tensors.iter().filter(|t| t.part == tensor.part);
            let is_beside = matches!(component, Component::FeedForward { .. })
                && in_part().any(|t| t.experts.is_some())
                && tensor.experts.is_none();
            let view = vindex.tensor(&tensor.name).unwrap();
            let expected = is_beside.then(|| sha256(view.bytes));
            assert_eq!(tensor.sha256, expected, "{} {}", golden.family, tensor.name);
        }
    }
}

/// What is planned to be written is written, part by part and slice by slice.
#[test]
fn sizes_are_as_planned() {
    for golden in goldens() {
        let tmp = tempfile::tempdir().unwrap();
        let out = tmp.path().join("out");
        let source = LocalDir::open(&golden.model).unwrap();
        let planned = vindex::plan(&source, Recipe::Q4k).unwrap().sizes().unwrap();
        support::extracted_from(&golden.model, Recipe::Q4k, &out);
        let written = Vindex::open(&out).unwrap().index().sizes();
        assert_eq!(planned, written, "{}", golden.family);
        assert!(written.slices[0].size_bytes > written.slices[1].size_bytes);
    }
}

/// The recipes, by the types and sizes they give.
#[test]
fn recipes_decide_the_types() {
    let mut text = String::new();
    for recipe in Recipe::ALL {
        let tmp = tempfile::tempdir().unwrap();
        extracted("gemma3", recipe, tmp.path());
        let vindex = Vindex::open(tmp.path()).unwrap();
        let mut types: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
        for tensor in &vindex.index().tensors {
            let (n, bytes) = types.entry(tensor.block_type.name()).or_default();
            *n += 1;
            *bytes += tensor.size_bytes;
        }
        text += &format!("{recipe}: {types:?}\n");
    }
    insta::assert_snapshot!(text.trim_end(), @r#"
    f32: {"F32": (80, 2714496)}
    bf16: {"BF16": (43, 1351680), "F32": (37, 11136)}
    f16: {"F16": (43, 1351680), "F32": (37, 11136)}
    q8_0: {"F32": (37, 11136), "Q8_0": (43, 718080)}
    q4k: {"F32": (37, 11136), "Q6_K": (6, 120960), "Q8_0": (37, 561408)}
    "#);
}

/// What is told on the way adds up to what was announced.
#[test]
fn progress_adds_up() {
    let tmp = tempfile::tempdir().unwrap();
    let source = LocalDir::open(&checkpoint_dir("llama")).unwrap();
    let (id, told) = run(&source, Recipe::Q8_0, tmp.path(), &OPTIONS);
    let id = id.unwrap();
    let Some(Progress::Started {
        n_parts,
        bytes_total,
    }) = told.first()
    else {
        panic!("{told:?}")
    };
    let bytes: u64 = told
        .iter()
        .map(|p| if let Progress::Bytes(n) = p { *n } else { 0 })
        .sum();
    assert_eq!(bytes, *bytes_total);
    assert_eq!(
        told.iter()
            .filter(|p| matches!(p, Progress::PartDone { .. }))
            .count(),
        *n_parts
    );
    let verified = verify(tmp.path(), &|_| ()).unwrap();
    assert_eq!(
        (verified.id, verified.n_parts, verified.bytes),
        (id, *n_parts, *bytes_total)
    );
}

/// Notes what is read of the weights.
struct Noted {
    source: LocalDir,
    ranges: Mutex<Vec<(String, u64, u64)>>,
}

impl Source for Noted {
    fn files(&self) -> Result<Vec<SourceFile>, SourceError> {
        self.source.files()
    }

    fn read_at(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        if path.ends_with(".safetensors") {
            let range = (path.to_owned(), offset_bytes, buf.len() as u64);
            self.ranges.lock().unwrap().push(range);
        }
        self.source.read_at(path, offset_bytes, buf)
    }

    fn origin(&self) -> Origin {
        self.source.origin()
    }
}

/// From planning to the last part, a header costs two reads, a needed byte is read once, another never.
#[test]
fn only_what_is_needed_is_read() {
    let kjv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/kjv");
    let source = LocalDir::open(&kjv).unwrap();
    let source = Noted {
        source,
        ranges: Mutex::new(Vec::new()),
    };
    let tmp = tempfile::tempdir().unwrap();
    run(&source, Recipe::Q4k, tmp.path(), &OPTIONS).0.unwrap();
    let mut ranges = source.ranges.into_inner().unwrap();
    ranges.sort();
    for pair in ranges.windows(2) {
        let [(file, offset, len), (next_file, next_offset, _)] = pair else {
            unreachable!()
        };
        assert!(
            file != next_file || offset + len <= *next_offset,
            "{pair:?} overlap"
        );
    }
    let checkpoint = Checkpoint::open(&source.source).unwrap();
    let (mut needed, mut others) = (0, 0);
    for (name, tensor) in checkpoint.tensors() {
        let sum = if name.starts_with("mtp.") {
            &mut others
        } else {
            &mut needed
        };
        *sum += tensor.size_bytes;
    }
    assert!(
        others > 0,
        "the checkpoint has tensors that the vindex does not hold"
    );
    let headers: Vec<_> = ranges
        .iter()
        .filter(|(_, offset, _)| *offset <= 8)
        .collect();
    assert_eq!(headers.len(), 2 * 2, "two shards, two reads each");
    let of_headers: u64 = headers.iter().map(|(_, _, len)| len).sum();
    let all: u64 = ranges.iter().map(|(_, _, len)| len).sum();
    assert_eq!(all, of_headers + needed);
}

/// A finished directory is never extracted into, whatever the plan; no file in it changes.
#[test]
fn a_finished_vindex_is_refused_as_output() {
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("out");
    extracted("llama", Recipe::Q8_0, &out);
    let before = listing(&out);
    let source = LocalDir::open(&checkpoint_dir("llama")).unwrap();
    for recipe in [Recipe::Q8_0, Recipe::F16] {
        let error = run(&source, recipe, &out, &OPTIONS).0.unwrap_err();
        assert!(
            matches!(&error, Error::OutputExists { path } if *path == out),
            "{error}"
        );
    }
    assert_eq!(listing(&out), before);
}

/// Copies the files of a slice elsewhere, as a publication and a pull do.
fn write_slice(vindex: &Vindex, slice: Slice, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in slice_files(vindex, slice).unwrap() {
        let bytes = match file.content {
            SliceContent::Path(path) => fs::read(path).unwrap(),
            SliceContent::Bytes(bytes) => bytes,
        };
        assert_eq!(
            (bytes.len() as u64, sha256(&bytes)),
            (file.size_bytes, file.sha256),
            "{}",
            file.name
        );
        fs::write(to.join(file.name), bytes).unwrap();
    }
}

/// A slice is a directory of its own: the same identity, fewer parts.
#[test]
fn a_slice_opens_and_verifies_by_itself() {
    let tmp = tempfile::tempdir().unwrap();
    let (full, served) = (tmp.path().join("full"), tmp.path().join("served"));
    let id = extracted("mixtral", Recipe::Q4k, &full);
    let vindex = Vindex::open(&full).unwrap();
    write_slice(&vindex, Slice::ExpertServer, &served);

    let slice = Vindex::open(&served).unwrap();
    assert_eq!((slice.id(), slice.slice()), (id, Slice::ExpertServer));
    assert!(slice.tensor("blk.0.attn_q.weight").is_none());
    let (here, there) = (
        slice.tensor("blk.0.ffn_up_exps.weight"),
        vindex.tensor("blk.0.ffn_up_exps.weight"),
    );
    assert_eq!(here.unwrap().bytes, there.unwrap().bytes);
    let verified = verify(&served, &|_| ()).unwrap();
    assert_eq!(
        (verified.id, verified.share, verified.n_parts),
        (id, Slice::ExpertServer.into(), 2)
    );

    let names: Vec<String> = slice_files(&slice, Slice::ExpertServer)
        .unwrap()
        .into_iter()
        .map(|f| f.name)
        .collect();
    insta::assert_snapshot!(names.join("\n"), @r"
    mixtral-q4k-00001-of-00004.gguf
    mixtral-q4k-00004-of-00004.gguf
    provenance.json
    slice.json
    index.json
    ");
    let error = slice_files(&slice, Slice::Full).unwrap_err();
    let Error::ShareNotHere { has, wanted, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(
        (*has, *wanted),
        (Slice::ExpertServer.into(), Slice::Full.into())
    );
}

/// From `index.json` alone it is known which parts a slice needs.
#[test]
fn an_index_tells_the_parts_of_a_slice() {
    let tmp = tempfile::tempdir().unwrap();
    extracted("llama", Recipe::Q4k, tmp.path());
    let index = Index::from_json(&fs::read(tmp.path().join("index.json")).unwrap()).unwrap();
    let numbers = |slice| -> Vec<usize> {
        let parts = slice_files_of_index(&index, slice);
        parts
            .iter()
            .map(|part| index.parts.iter().position(|p| p == *part).unwrap() + 1)
            .collect()
    };
    assert_eq!(numbers(Slice::Full), [1, 2, 3, 4, 5, 6]);
    assert_eq!(numbers(Slice::ExpertServer), [1, 4, 6]);
    assert_eq!(numbers(Slice::Attention), [1, 2, 3, 5]);
}

/// The same weights in another directory are the same vindex, and a model's name is part of it.
#[test]
fn identity_is_content() {
    let tmp = tempfile::tempdir().unwrap();
    let here = tmp.path().join("elsewhere/llama");
    copy_dir(&checkpoint_dir("llama"), &here);
    let id = |dir: &Path, out: &str| {
        let source = LocalDir::open(dir).unwrap();
        run(&source, Recipe::Q4k, &tmp.path().join(out), &OPTIONS)
            .0
            .unwrap()
    };
    assert_eq!(id(&here, "a"), id(&checkpoint_dir("llama"), "b"));
    let renamed = tmp.path().join("other-name");
    copy_dir(&here, &renamed);
    assert_ne!(id(&renamed, "c"), id(&here, "d"));
}
