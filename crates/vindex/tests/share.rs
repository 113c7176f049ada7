//! A directory that holds a range of layers or experts: what opens, what can be read, what `verify` says of damage, and
//! which ranges there cannot be.

mod support;

use std::fs::{self, File};
use std::path::Path;

use support::{extracted, flip, overwrite};
use vindex::{
    Component, Error, Hold, INDEX_FILE, Index, Recipe, SLICE_FILE, Share, Slice, Span, Vindex,
    Wrong, expert_bytes, part_header, verify,
};

fn span(start: u32, end: u32) -> Option<Span> {
    Some(Span::new(start, end).unwrap())
}

/// Makes `to` hold exactly `share` of the vindex in `from`, as a pull does: sparse files under a range of experts.
fn write_share(from: &Path, share: Share, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let index_json = fs::read(from.join(INDEX_FILE)).unwrap();
    let index = Index::from_json(&index_json).unwrap();
    for (i, part) in index.parts.iter().enumerate() {
        let (source, target) = (from.join(&part.file), to.join(&part.file));
        match share.of_part(&index, i) {
            Hold::Nothing => {}
            Hold::Whole => drop(fs::copy(source, target).unwrap()),
            Hold::Experts(span) => {
                let bytes = fs::read(source).unwrap();
                File::create(&target)
                    .unwrap()
                    .set_len(part.size_bytes)
                    .unwrap();
                overwrite(&target, 0, &part_header(&index, i).unwrap());
                for expert in expert_bytes(&index, i, span) {
                    let (start, end) = (expert.range.start as usize, expert.range.end as usize);
                    overwrite(&target, expert.range.start, &bytes[start..end]);
                }
            }
        }
    }
    fs::write(to.join(SLICE_FILE), share.to_json()).unwrap();
    fs::write(to.join(INDEX_FILE), index_json).unwrap();
}

/// The header of every part but the first is determined by the index, for every family: it need not be fetched.
#[test]
fn headers_follow_from_the_index() {
    for golden in support::goldens::goldens() {
        let tmp = tempfile::tempdir().unwrap();
        support::extracted_from(&golden.model, Recipe::Q4k, tmp.path());
        let index = Vindex::open(tmp.path()).unwrap().index().clone();
        assert_eq!(part_header(&index, 0), None);
        for (i, part) in index.parts.iter().enumerate().skip(1) {
            let bytes = fs::read(tmp.path().join(&part.file)).unwrap();
            let header = part_header(&index, i).unwrap();
            assert!(bytes.starts_with(&header), "{}", part.file);
            assert!(vindex::read_header(&header).is_ok());
        }
    }
}

#[test]
fn a_range_of_experts_opens_and_shows_these_experts_only() {
    let tmp = tempfile::tempdir().unwrap();
    let (full, some) = (tmp.path().join("full"), tmp.path().join("some"));
    let id = extracted("mixtral", Recipe::Q4k, &full);
    let all = Vindex::open(&full).unwrap();
    let share = Share::of_experts(all.index(), None, span(1, 3)).unwrap();
    write_share(&full, share, &some);

    let held = Vindex::open(&some).unwrap();
    assert_eq!(
        (held.id(), held.share(), held.slice()),
        (id, share, Slice::ExpertServer)
    );
    for name in [
        "blk.0.ffn_gate_exps.weight",
        "blk.0.ffn_up_exps.weight",
        "blk.0.ffn_down_exps.weight",
    ] {
        assert!(held.tensor(name).is_none());
        let stacked = all.tensor(name).unwrap();
        for k in 0..6 {
            let (here, there) = (held.expert(name, k), all.expert(name, k));
            assert_eq!(here.is_some(), (1..3).contains(&k), "{name} {k}");
            assert_eq!(there.is_some(), k < 4, "{name} {k}");
            let Some(there) = there else { continue };
            let size = stacked.bytes.len() / 4;
            assert_eq!(there.bytes, &stacked.bytes[k as usize * size..][..size]);
            assert_eq!(there.ne, &stacked.ne[..2]);
            assert!(here.is_none_or(|here| here.bytes == there.bytes && here.ne == there.ne));
        }
    }
    assert!(held.expert("blk.0.attn_q.weight", 0).is_none());
    assert!(
        all.expert("blk.0.attn_q.weight", 0).is_some()
            && all.expert("blk.0.attn_q.weight", 1).is_none()
    );
    let holds =
        |vindex: &Vindex| -> Vec<u32> { (0..6).filter(|&k| vindex.holds_expert(0, k)).collect() };
    assert_eq!((holds(&held), holds(&all)), (vec![1, 2], vec![0, 1, 2, 3]));
    assert!(!held.holds_expert(1, 1), "there is one layer");

    let verified = verify(&some, &|_| ()).unwrap();
    assert_eq!(
        (verified.id, verified.share, verified.n_parts),
        (id, share, 2)
    );
    let experts: u64 = expert_bytes(all.index(), 3, span(1, 3).unwrap())
        .iter()
        .map(|expert| expert.range.end - expert.range.start)
        .sum();
    assert_eq!(verified.bytes, all.index().parts[0].size_bytes + experts);
    assert_eq!(verified.bytes, share.size_bytes(all.index()));
}

/// Whatever lies beside the experts (a shared expert, a dense branch, a dense layer) goes with expert 0, and with no other
/// share; every family, every way to cut its experts in two.
#[test]
fn what_lies_beside_experts_is_held_with_the_first() {
    let mut n_families = 0;
    for golden in support::goldens::goldens() {
        let tmp = tempfile::tempdir().unwrap();
        let full = tmp.path().join("full");
        let id = support::extracted_from(&golden.model, Recipe::Q4k, &full);
        let all = Vindex::open(&full).unwrap();
        let Some(experts) = all.index().config.experts else {
            continue;
        };
        n_families += 1;
        let whole = Share::from(Slice::ExpertServer);
        for cut in 1..experts.n {
            let mut held = Vec::new();
            for (start, end) in [(0, cut), (cut, experts.n)] {
                let share = Share::of_experts(all.index(), None, span(start, end)).unwrap();
                let dir = tmp.path().join(format!("{start}-{end}"));
                write_share(&full, share, &dir);
                let verified = verify(&dir, &|_| ()).unwrap();
                assert_eq!((verified.id, verified.share), (id, share));
                assert_eq!(verified.bytes, share.size_bytes(all.index()));
                held.push((share, Vindex::open(&dir).unwrap()));
            }
            for tensor in &all.index().tensors {
                let part = tensor.part as usize;
                let component = all.index().parts[part].component;
                if !matches!(component, Component::FeedForward { .. }) {
                    continue;
                }
                let name = &tensor.name;
                let n = tensor.experts.as_ref().map_or(1, Vec::len) as u32;
                for expert in 0..n {
                    let there = all.expert(name, expert).unwrap();
                    for (share, here) in &held {
                        let is_mine = share.experts.unwrap().has(expert);
                        let here = here.expert(name, expert);
                        assert_eq!(here.is_some(), is_mine, "{name} {expert} in {share}");
                        assert!(here.is_none_or(|here| here.bytes == there.bytes));
                    }
                }
                if n == 1 && tensor.experts.is_none() {
                    assert!(held[0].1.tensor(name).is_some() && held[1].1.tensor(name).is_none());
                }
            }
            // Nothing is held twice but the first part, and no header counts.
            let sizes: u64 = held.iter().map(|(s, _)| s.size_bytes(all.index())).sum();
            let first = all.index().parts[0].size_bytes;
            assert!(
                sizes <= whole.size_bytes(all.index()) + first,
                "{}",
                golden.family
            );
        }
    }
    assert!(n_families >= 2);
}

#[cfg(unix)]
#[test]
fn the_other_experts_take_no_room() {
    use std::os::unix::fs::MetadataExt;
    let tmp = tempfile::tempdir().unwrap();
    let (full, some) = (tmp.path().join("full"), tmp.path().join("some"));
    extracted("mixtral", Recipe::F32, &full);
    let index = Vindex::open(&full).unwrap().index().clone();
    write_share(
        &full,
        Share::of_experts(&index, None, span(3, 4)).unwrap(),
        &some,
    );
    let blocks = |dir: &Path| {
        fs::metadata(dir.join(&index.parts[3].file))
            .unwrap()
            .blocks()
    };
    assert!(
        blocks(&some) * 2 < blocks(&full),
        "{} of {}",
        blocks(&some),
        blocks(&full)
    );
}

#[test]
fn a_range_of_layers_is_fewer_parts() {
    let tmp = tempfile::tempdir().unwrap();
    let (full, some) = (tmp.path().join("full"), tmp.path().join("some"));
    let id = extracted("llama", Recipe::Q4k, &full);
    let index = Vindex::open(&full).unwrap().index().clone();
    let share = Share::of_experts(&index, span(1, 2), None).unwrap();
    write_share(&full, share, &some);
    let held = Vindex::open(&some).unwrap();
    assert_eq!(held.share(), share);
    assert!(
        held.tensor("blk.0.ffn_up.weight").is_none()
            && held.tensor("blk.1.ffn_up.weight").is_some()
    );
    assert!(
        held.expert("blk.1.ffn_up.weight", 0).is_some()
            && held.expert("blk.1.ffn_up.weight", 1).is_none()
    );
    assert!(!held.holds_expert(0, 0) && held.holds_expert(1, 0) && !held.holds_expert(1, 1));
    let verified = verify(&some, &|_| ()).unwrap();
    assert_eq!(
        (verified.id, verified.share, verified.n_parts),
        (id, share, 2)
    );
    let error = vindex::slice_files(&held, Slice::ExpertServer).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("complete for the slice expert-server of layers 1..2, not for expert-server"),
        "{error}"
    );
}

#[test]
fn a_part_of_what_is_there_opens_by_itself() {
    let tmp = tempfile::tempdir().unwrap();
    extracted("llama", Recipe::Q4k, tmp.path());
    let attention = Vindex::open_as(tmp.path(), |_, _| Ok(Slice::Attention.into())).unwrap();
    assert!(
        attention.tensor("blk.0.attn_q.weight").is_some()
            && attention.tensor("token_embd.weight").is_some()
    );
    assert!(attention.tensor("blk.0.ffn_up.weight").is_none() && !attention.holds_expert(0, 0));
    // What is not opened is not asked for.
    for part in [2, 3, 4] {
        fs::remove_file(
            tmp.path()
                .join(format!("llama-q4k-{part:05}-of-00006.gguf")),
        )
        .unwrap();
    }
    assert!(Vindex::open(tmp.path()).is_err());
    let served = |layers| {
        Vindex::open_as(tmp.path(), |index, _| {
            Share::of_experts(index, layers, None)
        })
    };
    assert_eq!(served(span(1, 2)).unwrap().share().layers, span(1, 2));
    let error = served(None).unwrap_err().to_string();
    assert!(
        error.contains("00004") && !error.contains("00003"),
        "{error}"
    );
    let error = served(span(1, 3)).unwrap_err().to_string();
    assert!(
        error.contains("layers 1..3 are not all in the model, which has layers 0..2"),
        "{error}"
    );

    fs::write(
        tmp.path().join(SLICE_FILE),
        "{\"slice\":\"expert-server\",\"layers\":[1,2]}\n",
    )
    .unwrap();
    let error = served(span(0, 2)).unwrap_err().to_string();
    assert!(
        error
            .contains("complete for the slice expert-server of layers 1..2, not for expert-server"),
        "{error}"
    );
}

/// The same damage as to a whole part, within and outside of what is held.
#[test]
fn damage_is_told_by_expert_and_holes_do_not_matter() {
    let tmp = tempfile::tempdir().unwrap();
    let (full, some) = (tmp.path().join("full"), tmp.path().join("some"));
    extracted("mixtral", Recipe::Q4k, &full);
    let index = Vindex::open(&full).unwrap().index().clone();
    write_share(
        &full,
        Share::of_experts(&index, None, span(1, 3)).unwrap(),
        &some,
    );
    let path = some.join(&index.parts[3].file);
    let places = expert_bytes(&index, 3, span(0, 4).unwrap());
    let wrong = || {
        let error = verify(&some, &|_| ()).unwrap_err();
        let Error::Damaged { mut wrong, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(wrong.len(), 1);
        wrong.remove(0)
    };
    for expert in &places {
        for at in [expert.range.start, expert.range.end - 1] {
            flip(&path, at);
            if (1..3).contains(&expert.expert) {
                let wrong = wrong();
                assert_eq!(wrong.what, Wrong::Experts);
                assert_eq!(
                    wrong.tensors,
                    [format!("{}[{}]", expert.tensor, expert.expert)]
                );
            } else {
                verify(&some, &|_| ()).unwrap();
            }
            flip(&path, at);
        }
    }
    for at in [0, 24, 100, part_header(&index, 3).unwrap().len() as u64 - 1] {
        flip(&path, at);
        let wrong = wrong();
        assert!(matches!(wrong.what, Wrong::Header(_)), "{wrong}");
        assert_eq!(wrong.tensors.len(), 3);
        flip(&path, at);
    }
    verify(&some, &|_| ()).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1000)
        .unwrap();
    assert!(
        wrong()
            .tensors
            .iter()
            .all(|name| name.ends_with("[1]") || name.ends_with("[2]"))
    );
    assert!(matches!(Vindex::open(&some), Err(Error::Damaged { .. })));
}

#[test]
fn ranges_outside_the_model_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let (dense, routed) = (tmp.path().join("dense"), tmp.path().join("routed"));
    extracted("llama", Recipe::Q4k, &dense);
    extracted("mixtral", Recipe::Q4k, &routed);
    let index = |dir: &Path| Vindex::open(dir).unwrap().index().clone();
    let (dense, routed) = (index(&dense), index(&routed));
    let why =
        |index: &Index, layers, experts| Share::of_experts(index, layers, experts).unwrap_err();
    assert_eq!(
        why(&dense, span(0, 3), None),
        "layers 0..3 are not all in the model, which has layers 0..2"
    );
    assert_eq!(
        why(&dense, None, span(0, 2)),
        "experts 0..2: the model is dense, it has no experts"
    );
    assert_eq!(
        why(&routed, None, span(4, 5)),
        "experts 4..5 are not all in the model, which has experts 0..4"
    );
    // All is no restriction, and is recorded as none.
    let all = Share::of_experts(&routed, span(0, 1), span(0, 4)).unwrap();
    assert_eq!(all, Slice::ExpertServer.into());
    assert_eq!(
        Share::of_experts(&dense, span(0, 2), span(0, 1)).unwrap(),
        all
    );

    for text in [
        "{\"slice\":\"full\",\"layers\":[0,1]}",
        "{\"slice\":\"attention\",\"experts\":[0,1]}",
        "{\"slice\":\"expert-server\",\"layers\":[0,9]}",
        "{\"slice\":\"expert-server\",\"experts\":[2,2]}",
        "{\"slice\":\"expert-server\",\"rows\":[0,1]}",
    ] {
        fs::write(tmp.path().join("routed").join(SLICE_FILE), text).unwrap();
        for error in [
            Vindex::open(&tmp.path().join("routed")).unwrap_err(),
            verify(&tmp.path().join("routed"), &|_| ()).unwrap_err(),
        ] {
            let error = error.to_string();
            assert!(error.contains(SLICE_FILE), "{text}: {error}");
        }
    }
}
