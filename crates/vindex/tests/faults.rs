//! What goes wrong around an extraction, and what is said then.

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::{
    OPTIONS, chain, checkpoint_dir, copy_dir, copy_of, extracted, flip, listing, overwrite, run,
    run_plan,
};
use vindex::{
    Checkpoint, Error, ExtractOptions, LocalDir, Origin, PlannedTensor, Progress, Recipe, Source,
    SourceError, SourceFile, Transform, Values, Vindex, extract, plan, verify,
};

/// Overwrites the bf16 value number `i` of a tensor in a checkpoint.
fn poison(dir: &Path, tensor: &str, i: u64, bf16: u16) -> String {
    let checkpoint = Checkpoint::open(&LocalDir::open(dir).unwrap()).unwrap();
    let place = checkpoint.tensor(tensor).unwrap();
    overwrite(
        &dir.join(&place.file),
        place.offset_bytes + 2 * i,
        &bf16.to_le_bytes(),
    );
    place.file.clone()
}

const NAN: u16 = 0x7fc0;
const INFINITY: u16 = 0x7f80;
const MINUS_INFINITY: u16 = 0xff80;

/// NaN and infinity stop an extraction with the file, the tensor and their number; parts before it are kept, and
/// the run that allows them continues after those.
#[test]
fn nonfinite_weights_are_counted_and_refused_unless_allowed() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = copy_of("llama3", tmp.path());
    let out = tmp.path().join("out");
    let bad = "model.layers.1.mlp.up_proj.weight";
    let bad_file = poison(&dir, bad, 0, NAN);
    poison(&dir, bad, 77, INFINITY);
    poison(&dir, bad, 65535, MINUS_INFINITY);
    let source = LocalDir::open(&dir).unwrap();

    let (result, told) = run(&source, Recipe::Q4k, &out, &OPTIONS);
    let error = result.unwrap_err();
    let Error::NonFinite {
        file,
        tensor,
        count,
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!((file, tensor.as_str(), *count), (&bad_file, bad, 3));
    let n_done = told
        .iter()
        .filter(|p| matches!(p, Progress::PartDone { .. }))
        .count();
    assert_eq!(n_done, 5, "the parts before the bad one are finished");
    assert!(matches!(
        Vindex::open(&out).unwrap_err(),
        Error::NotAVindex { .. }
    ));
    assert!(
        !listing(&out).iter().any(|name| name.ends_with(".partial")),
        "{:?}",
        listing(&out)
    );

    let options = ExtractOptions {
        allow_nonfinite: true,
        ..OPTIONS
    };
    let (id, told) = run(&source, Recipe::Q4k, &out, &options);
    let kept = told
        .iter()
        .filter(|p| matches!(p, Progress::PartKept { .. }))
        .count();
    assert_eq!(kept, n_done);
    let expected = Progress::NonFinite {
        file: bad_file,
        tensor: bad.to_owned(),
        count: 3,
    };
    assert_eq!(
        told.iter()
            .filter(|p| matches!(p, Progress::NonFinite { .. }))
            .collect::<Vec<_>>(),
        [&expected]
    );
    assert_eq!(verify(&out, &|_| ()).unwrap().id, id.unwrap());
}

/// Reads as the directory does, until the line is cut.
struct Cut<'a> {
    source: LocalDir,
    reads_left: AtomicUsize,
    failed: &'a Mutex<Vec<String>>,
}

impl Source for Cut<'_> {
    fn files(&self) -> Result<Vec<SourceFile>, SourceError> {
        self.source.files()
    }

    fn read_at(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        if self
            .reads_left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
            .is_err()
        {
            self.failed.lock().unwrap().push(path.to_owned());
            return Err("connection reset".into());
        }
        self.source.read_at(path, offset_bytes, buf)
    }

    fn origin(&self) -> Origin {
        self.source.origin()
    }

    fn fingerprint(&self) -> Result<String, SourceError> {
        self.source.fingerprint()
    }
}

/// A source that fails is told with file and tensor, at whichever read it happens; the next run goes on.
#[test]
fn a_cut_connection_names_file_and_tensor_and_loses_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let expected = extracted("qwen3", Recipe::Q8_0, &tmp.path().join("whole"));
    let plan = plan(
        &LocalDir::open(&checkpoint_dir("qwen3")).unwrap(),
        Recipe::Q8_0,
    )
    .unwrap();
    let mut n_kept_most = 0;
    for n_reads in [0, 2, 3, 9, 14, 20, 24] {
        let out = tmp.path().join(n_reads.to_string());
        let failed = Mutex::new(Vec::new());
        let source = LocalDir::open(&checkpoint_dir("qwen3")).unwrap();
        let cut = Cut {
            source,
            reads_left: AtomicUsize::new(n_reads),
            failed: &failed,
        };
        let error = run_plan(&cut, &plan, &out, &OPTIONS).0.unwrap_err();
        let text = chain(&error);
        assert!(
            text.contains("model.safetensors") && text.ends_with(": connection reset"),
            "{text}"
        );
        if n_reads >= 2 {
            assert!(
                matches!(&error, Error::Values { tensor, .. } if tensor.ends_with(".weight")),
                "{text}"
            );
        }
        assert!(!failed.lock().unwrap().is_empty());
        cut.reads_left.store(usize::MAX, Ordering::SeqCst);
        let (id, told) = run_plan(&cut, &plan, &out, &OPTIONS);
        assert_eq!(id.unwrap(), expected);
        n_kept_most = n_kept_most.max(
            told.iter()
                .filter(|p| matches!(p, Progress::PartKept { .. }))
                .count(),
        );
    }
    assert!(n_kept_most >= 3, "{n_kept_most}");
}

/// Leaves an extraction of llama3 with `recipe` that was interrupted in its last part.
fn interrupted(recipe: Recipe, tmp: &Path) -> (LocalDir, std::path::PathBuf) {
    let dir = copy_of("llama3", tmp);
    poison(&dir, "model.layers.1.mlp.down_proj.weight", 5, NAN);
    let source = LocalDir::open(&dir).unwrap();
    let out = tmp.join("out");
    run(&source, recipe, &out, &OPTIONS).0.unwrap_err();
    (source, out)
}

const ALLOWED: ExtractOptions = ExtractOptions {
    threads: 2,
    allow_nonfinite: true,
};

/// An interrupted extraction is only continued by the same plan from the same source.
#[test]
fn another_plan_or_source_does_not_continue() {
    let tmp = tempfile::tempdir().unwrap();
    let (source, out) = interrupted(Recipe::Q8_0, tmp.path());
    let before = listing(&out);
    let error = run(&source, Recipe::Q4k, &out, &ALLOWED).0.unwrap_err();
    assert!(
        matches!(&error, Error::OtherPlan { path, .. } if *path == out),
        "{error}"
    );

    // The same checkpoint with other weights: equal names and sizes, a later change.
    let file = tmp.path().join("llama3/model-00001-of-00002.safetensors");
    let later =
        fs::metadata(&file).unwrap().modified().unwrap() + std::time::Duration::from_secs(2);
    File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_modified(later)
        .unwrap();
    let changed = LocalDir::open(&tmp.path().join("llama3")).unwrap();
    let error = run(&changed, Recipe::Q8_0, &out, &ALLOWED).0.unwrap_err();
    assert!(matches!(&error, Error::OtherPlan { .. }), "{error}");
    assert_eq!(listing(&out), before);
}

/// Finished parts are trusted only after their hash is checked.
#[test]
fn a_damaged_part_of_an_interrupted_extraction_is_made_again() {
    let tmp = tempfile::tempdir().unwrap();
    let (source, out) = interrupted(Recipe::Q8_0, tmp.path());
    let parts: Vec<String> = listing(&out)
        .into_iter()
        .filter(|name| name.ends_with(".gguf"))
        .collect();
    assert_eq!(parts.len(), 5);
    flip(&out.join(&parts[1]), 1000);
    fs::remove_file(out.join(&parts[2])).unwrap();
    File::options()
        .write(true)
        .open(out.join(&parts[3]))
        .unwrap()
        .set_len(100)
        .unwrap();
    let (id, told) = run(&source, Recipe::Q8_0, &out, &ALLOWED);
    let kept: Vec<usize> = told
        .iter()
        .filter_map(|p| {
            if let Progress::PartKept { index, .. } = p {
                Some(*index)
            } else {
                None
            }
        })
        .collect();
    assert_eq!(kept, [0, 4]);
    assert_eq!(verify(&out, &|_| ()).unwrap().id, id.unwrap());
    assert!(!out.join("extract.journal").exists());
}

/// A crash may cut the journal anywhere after its first line; whatever is left of it, the result is the same.
#[test]
fn a_journal_that_was_cut_is_continued() {
    let tmp = tempfile::tempdir().unwrap();
    let (source, out) = interrupted(Recipe::F16, tmp.path());
    let expected = run(&source, Recipe::F16, &tmp.path().join("whole"), &ALLOWED)
        .0
        .unwrap();
    let journal = fs::read(out.join("extract.journal")).unwrap();
    let first_line = journal.iter().position(|&b| b == b'\n').unwrap() + 1;
    let mut n_kept = Vec::new();
    for len in (first_line..journal.len())
        .step_by(61)
        .chain([journal.len()])
    {
        let copy = tmp.path().join(len.to_string());
        copy_dir(&out, &copy);
        fs::write(copy.join("extract.journal"), &journal[..len]).unwrap();
        let (id, told) = run(&source, Recipe::F16, &copy, &ALLOWED);
        assert_eq!(id.unwrap(), expected);
        n_kept.push(
            told.iter()
                .filter(|p| matches!(p, Progress::PartKept { .. }))
                .count(),
        );
    }
    assert!(
        n_kept.is_sorted() && n_kept.first() == Some(&0) && n_kept.last() == Some(&5),
        "{n_kept:?}"
    );
}

/// Nothing is written among files that are not ours.
#[test]
fn foreign_files_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let source = LocalDir::open(&checkpoint_dir("qwen2")).unwrap();
    let out = tmp.path().join("mine");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.txt"), "text").unwrap();
    let error = run(&source, Recipe::F16, &out, &OPTIONS).0.unwrap_err();
    assert!(
        matches!(&error, Error::ForeignFile { file, .. } if file == "thesis.txt"),
        "{error}"
    );
    assert_eq!(listing(&out), ["thesis.txt"]);

    // A part without a journal may be anybody's; a journal that is none is not overwritten.
    for (name, text) in [
        ("qwen2-f16-00001-of-00006.gguf", "x"),
        ("extract.journal", "dear diary\n"),
    ] {
        let out = tmp.path().join(name).join("out");
        fs::create_dir_all(&out).unwrap();
        fs::write(out.join(name), text).unwrap();
        let error = run(&source, Recipe::F16, &out, &OPTIONS).0.unwrap_err();
        assert!(
            matches!(&error, Error::ForeignFile { file, .. } if file == name),
            "{error}"
        );
        assert_eq!(listing(&out), [name]);
        assert_eq!(fs::read_to_string(out.join(name)).unwrap(), text);
    }
}

/// A crash may leave a part that no line of the journal names. A run that is then refused leaves the journal too, or
/// the part would be a foreign file ever after.
#[test]
fn a_refusal_keeps_what_a_crash_left() {
    let tmp = tempfile::tempdir().unwrap();
    let (source, out) = interrupted(Recipe::F16, tmp.path());
    let journal = fs::read_to_string(out.join("extract.journal")).unwrap();
    let first_line = journal.lines().next().unwrap().to_owned() + "\n";
    fs::write(out.join("extract.journal"), &first_line).unwrap();
    fs::write(out.join("thesis.txt"), "text").unwrap();
    let before = listing(&out);
    let error = run(&source, Recipe::F16, &out, &ALLOWED).0.unwrap_err();
    assert!(
        matches!(&error, Error::ForeignFile { file, .. } if file == "thesis.txt"),
        "{error}"
    );
    assert_eq!(listing(&out), before);
    fs::remove_file(out.join("thesis.txt")).unwrap();
    let id = run(&source, Recipe::F16, &out, &ALLOWED).0.unwrap();
    assert_eq!(verify(&out, &|_| ()).unwrap().id, id);
}

/// While one extraction writes, another into the same directory is refused and disturbs nothing.
#[test]
fn two_extractions_do_not_collide() {
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("out");
    let source = LocalDir::open(&checkpoint_dir("qwen2")).unwrap();
    let plan = plan(&source, Recipe::Q4k).unwrap();
    let refusals = Mutex::new(Vec::new());
    let id = extract(&source, &plan, &out, &OPTIONS, &|progress| {
        if let Progress::PartDone { .. } = progress {
            let second = extract(&source, &plan, &out, &OPTIONS, &|_| ());
            refusals.lock().unwrap().push(second.unwrap_err());
        }
    });
    let refusals = refusals.into_inner().unwrap();
    assert_eq!(refusals.len(), plan.parts.len());
    assert!(
        refusals
            .iter()
            .all(|error| matches!(error, Error::Locked { .. })),
        "{refusals:?}"
    );
    assert_eq!(verify(&out, &|_| ()).unwrap().id, id.unwrap());
}

/// A killed process may leave the journal beside a finished index; the next run of the same plan tidies up.
#[test]
fn a_journal_left_beside_a_finished_index_is_removed() {
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("out");
    let source = LocalDir::open(&checkpoint_dir("qwen2")).unwrap();
    let plan = plan(&source, Recipe::Q4k).unwrap();
    let journal = Mutex::new(Vec::new());
    let id = extract(&source, &plan, &out, &OPTIONS, &|progress| {
        if let Progress::PartDone { .. } = progress {
            *journal.lock().unwrap() = fs::read(out.join("extract.journal")).unwrap();
        }
    })
    .unwrap();
    fs::write(out.join("extract.journal"), journal.into_inner().unwrap()).unwrap();
    assert_eq!(Vindex::open(&out).unwrap().id(), id);
    let other = run(&source, Recipe::F16, &out, &OPTIONS).0.unwrap_err();
    assert!(matches!(other, Error::OutputExists { .. }), "{other}");
    assert_eq!(run_plan(&source, &plan, &out, &OPTIONS).0.unwrap(), id);
    assert!(!out.join("extract.journal").exists());
}

/// An output that cannot be made is told with its path.
#[test]
fn an_unwritable_output_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    fs::write(tmp.path().join("file"), "").unwrap();
    let out = tmp.path().join("file").join("out");
    let source = LocalDir::open(&checkpoint_dir("qwen2")).unwrap();
    let error = run(&source, Recipe::F16, &out, &OPTIONS).0.unwrap_err();
    assert!(
        matches!(&error, Error::Io { action: "create", path, .. } if *path == out),
        "{error}"
    );
}

/// A plan that is larger than the free space is refused before anything is written. The checkpoint is a sparse file.
#[cfg(unix)]
#[test]
fn a_plan_that_does_not_fit_the_disk_is_refused_at_once() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("huge");
    fs::create_dir(&dir).unwrap();
    let n_rows: u64 = 1 << 31;
    let header = format!(
        "{{\"huge\":{{\"dtype\":\"BF16\",\"shape\":[{n_rows},1024],\"data_offsets\":[0,{}]}}}}",
        n_rows * 2048
    );
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + n_rows * 2048)
        .unwrap();
    let source = LocalDir::open(&dir).unwrap();
    let mut plan = plan(
        &LocalDir::open(&checkpoint_dir("qwen2")).unwrap(),
        Recipe::F32,
    )
    .unwrap();
    plan.origin = source.origin();
    plan.checkpoint = Checkpoint::open(&source).unwrap();
    plan.parts.truncate(2);
    plan.parts[1].tensors = vec![PlannedTensor {
        name: "token_embd.weight".to_owned(),
        ne: vec![1024, n_rows],
        block_type: quant::BlockType::F32,
        values: Values::Checkpoint {
            tensors: vec!["huge".to_owned()],
            transform: Transform::NONE,
        },
    }];
    let out = tmp.path().join("out");
    let error = run_plan(&source, &plan, &out, &OPTIONS).0.unwrap_err();
    let Error::NoSpace {
        needed_bytes,
        available_bytes,
        ..
    } = &error
    else {
        panic!("{error}")
    };
    assert!(
        *needed_bytes > n_rows * 4096 && available_bytes < needed_bytes,
        "{error}"
    );
    assert!(!out.exists(), "nothing is left behind");
}

/// A plan and a source that do not belong together are told before anything is written.
#[test]
fn a_plan_for_another_checkpoint_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("out");
    let llama = LocalDir::open(&checkpoint_dir("llama")).unwrap();
    let gemma3 = LocalDir::open(&checkpoint_dir("gemma3")).unwrap();
    let mut plan = plan(&gemma3, Recipe::F32).unwrap();
    let mut said = Vec::new();
    let error = run_plan(&llama, &plan, &out, &OPTIONS).0.unwrap_err();
    assert!(matches!(&error, Error::OtherSource { .. }), "{error}");
    said.push(error.to_string());
    // The same name, another length.
    plan.origin = llama.origin();
    let error = run_plan(&llama, &plan, &out, &OPTIONS).0.unwrap_err();
    assert!(matches!(&error, Error::OtherSource { .. }), "{error}");
    said.push(error.to_string());
    // The same files, other tensors wanted.
    plan.checkpoint = Checkpoint::open(&llama).unwrap();
    let error = run_plan(&llama, &plan, &out, &OPTIONS).0.unwrap_err();
    assert!(matches!(&error, Error::Plan { .. }), "{error}");
    said.push(error.to_string());
    insta::assert_snapshot!(said.join("\n"), @r"
    the plan was made from another source: gemma3 was planned, llama is given; plan again with this one
    the plan was made from another source: model.safetensors is 2101936 bytes long, 1365704 bytes were planned; plan again with this one
    the plan cannot be executed: token_embd.weight: 1 of shape [512, 256] like model.embed_tokens.weight do not make [96, 512]
    ");
    assert!(!out.exists());
}
