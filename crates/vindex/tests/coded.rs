//! Checkpoints whose weights are codes with scales (FP8, MLX): every value that comes out of them, against what others made
//! of them.

mod support;

use std::fs;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};
use support::goldens::coded;
use support::{OPTIONS, chain, copy_dir, fixtures, run_plan};
use vindex::{LocalDir, Order, Plan, Recipe, Values, Vindex, plan};

fn planned(dir: &Path, recipe: Recipe) -> (LocalDir, Plan) {
    let source = LocalDir::open(dir).unwrap();
    let plan = plan(&source, recipe).unwrap();
    (source, plan)
}

/// Rows as the checkpoint has them.
fn in_order(order: &Order, bytes: &[u8], row_bytes: usize) -> Vec<u8> {
    match *order {
        Order::AsIs => bytes.to_vec(),
        Order::InterleaveRope { n_heads } => {
            let head_bytes = bytes.len() / n_heads as usize;
            let mut out = Vec::new();
            for head in bytes.chunks(head_bytes) {
                let rows: Vec<&[u8]> = head.chunks(row_bytes).collect();
                for first in [0, 1] {
                    rows.iter()
                        .skip(first)
                        .step_by(2)
                        .for_each(|row| out.extend(*row));
                }
            }
            out
        }
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn values_are_those_that_others_make_of_the_codes() {
    for golden in coded() {
        let dir = golden.model;
        let expected: Value =
            serde_json::from_slice(&fs::read(dir.join("expected.json")).unwrap()).unwrap();
        let expected = expected["tensors"].as_object().unwrap();
        for (recipe, key) in [(Recipe::F32, "sha256_f32"), (Recipe::Bf16, "sha256_bf16")] {
            let tmp = tempfile::tempdir().unwrap();
            let (source, plan) = planned(&dir, recipe);
            assert!(plan.left_out.is_empty(), "{:?}", plan.left_out);
            run_plan(&source, &plan, tmp.path(), &OPTIONS).0.unwrap();
            let vindex = Vindex::open(tmp.path()).unwrap();
            let mut n_seen = 0;
            for tensor in plan.parts.iter().flat_map(|part| &part.tensors) {
                let Values::Checkpoint { tensors, transform } = &tensor.values else {
                    panic!("{}", tensor.name)
                };
                let [name] = tensors.as_slice() else {
                    panic!("{tensors:?}")
                };
                // Norms stay F32 whatever the recipe.
                if tensor.ne.len() < 2 && recipe != Recipe::F32 {
                    continue;
                }
                let bytes = vindex.tensor(&tensor.name).unwrap().bytes;
                let row_bytes = tensor.block_type.row_bytes(tensor.ne[0] as usize).unwrap();
                let got = hex::encode(Sha256::digest(in_order(&transform.order, bytes, row_bytes)));
                let expected = &expected[name][key];
                assert_eq!(expected, &Value::String(got), "{}: {name}", dir.display());
                n_seen += 1;
            }
            assert!(
                n_seen == expected.len() || recipe == Recipe::Bf16,
                "{n_seen}"
            );
        }
    }
}

#[test]
fn codes_and_scales_that_do_not_fit_are_refused() {
    let told = |kind: &str, change: &dyn Fn(&mut Value)| {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("m");
        copy_dir(&fixtures().join(kind), &dir);
        let config = dir.join("config.json");
        let mut json: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        change(&mut json);
        fs::write(&config, json.to_string()).unwrap();
        let planned = plan(&LocalDir::open(&dir).unwrap(), Recipe::F32);
        chain(&planned.unwrap_err())
    };
    let set = |key: &'static str, value: Value| {
        move |json: &mut Value| {
            json["quantization"][key] = value.clone();
        }
    };
    let told = [
        told("mlx/mixed", &set("bits", 5.into())),
        told("mlx/mixed", &set("bits", 7.into())),
        told("mlx/mixed", &set("group_size", 32.into())),
        told("mlx/mixed", &set("mode", "mxfp4".into())),
        told("mlx/mixed", &|json| {
            json.as_object_mut()
                .unwrap()
                .retain(|key, _| !key.starts_with("quantization"));
        }),
        told("fp8/qwen_style", &|json| {
            json["quantization_config"]["quant_method"] = "gptq".into();
        }),
    ];
    insta::assert_snapshot!(told.join("\n"));
}
