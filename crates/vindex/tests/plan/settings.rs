//! What `config.json` says and what it leaves unsaid: settings in the plan's numbers and keys, or a refusal.

use serde_json::{Value, json};
use vindex::{MetaValue, Plan, RopeScaling};

use super::changed::{Changed, ONE, told};

fn with(family: &str, change: impl FnOnce(&mut Value)) -> Changed {
    Changed::family(family).json("config.json", change)
}

fn without(family: &str, key: &str) -> Changed {
    with(family, |c| {
        c.as_object_mut().unwrap().shift_remove(key).unwrap();
    })
}

fn window(plan: &Plan) -> Option<u32> {
    let window = plan.config.attention.sliding_window.as_ref();
    window.map(|w| w.n_tokens)
}

fn value<'a>(plan: &'a Plan, key: &str) -> Option<&'a MetaValue> {
    plan.metadata
        .iter()
        .find(|(k, _)| k == key)
        .map(|(_, value)| value)
}

/// Where the file is silent, the configuration class of `transformers` speaks; null may mean none.
#[test]
fn silence_is_the_default_of_the_family_and_null_is_none() {
    let told = Changed::mistral().plan().unwrap();
    assert_eq!(window(&told), Some(8));
    let lacking = |changed: Changed, key: &str| {
        changed.json("config.json", |c| {
            c.as_object_mut().unwrap().shift_remove(key).unwrap();
        })
    };
    let silent = lacking(Changed::mistral(), "sliding_window")
        .plan()
        .unwrap();
    assert_eq!(window(&silent), Some(4096));
    let null = Changed::mistral().json("config.json", |c| c["sliding_window"] = Value::Null);
    assert_eq!(window(&null.plan().unwrap()), None);

    // Eight heads of keys are too many for this checkpoint; as many as heads of queries are told by null.
    let error = without("mixtral", "num_key_value_heads").error();
    assert!(error.contains("num_key_value_heads: 8"), "{error}");
    let error = with("mixtral", |c| c["num_key_value_heads"] = Value::Null).error();
    assert!(error.contains("says [256, 256]"), "{error}");
    let error = without("llama", "num_key_value_heads").error();
    assert!(error.contains("says [256, 256]"), "{error}");

    for (changed, context) in [
        (Changed::family("llama"), 2048),
        (Changed::mistral(), 131_072),
        (Changed::family("qwen2"), 32_768),
    ] {
        let plan = lacking(changed, "max_position_embeddings").plan().unwrap();
        assert_eq!(plan.config.context, context);
    }
    let sliding = with("qwen2", |c| {
        c["use_sliding_window"] = json!(true);
        c.as_object_mut().unwrap().shift_remove("max_window_layers");
    });
    assert_eq!(window(&sliding.plan().unwrap()), None, "layers 28 and up");
}

#[test]
fn yarn_is_written_as_it_is_told() {
    let yarn = |parameters: Value| with("qwen2", |c| c["rope_scaling"] = parameters);
    let short = yarn(json!({"rope_type": null, "type": "yarn", "factor": 4.0}));
    let short = short.plan().unwrap();
    let scaling = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 32_768,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        fractional: false,
    };
    assert_eq!(short.config.rope.scaling, Some(scaling));
    let key = |name: &str| format!("qwen2.rope.scaling.{name}");
    assert_eq!(
        value(&short, &key("original_context_length")),
        Some(&MetaValue::U32(32_768))
    );
    assert_eq!(value(&short, &key("yarn_beta_fast")), None);
    assert_eq!(value(&short, &key("yarn_beta_slow")), None);
    let long = yarn(json!({"type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 2}));
    let long = long.plan().unwrap();
    assert_eq!(
        value(&long, &key("yarn_beta_fast")),
        Some(&MetaValue::F32(32.0))
    );
    assert_eq!(
        value(&long, &key("yarn_beta_slow")),
        Some(&MetaValue::F32(2.0))
    );
}

/// What `_compute_yarn_parameters` of `transformers` makes of the two scales and of whole pairs.
#[test]
fn yarn_scales_by_both_numbers_or_by_none() {
    let yarn = |parameters: Value| {
        let plan = with("qwen2", |c| {
            c["rope_scaling"] = json!({"type": "yarn", "factor": 4.0});
            for (key, value) in parameters.as_object().unwrap() {
                c["rope_scaling"][key] = value.clone();
            }
        });
        match plan.plan().unwrap().config.rope.scaling {
            Some(RopeScaling::Yarn {
                attention_factor,
                fractional,
                ..
            }) => (attention_factor, fractional),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(yarn(json!({"mscale": 0.7})), (None, false));
    assert_eq!(
        yarn(json!({"mscale": 0, "mscale_all_dim": 0})),
        (None, false)
    );
    let ratio = (0.07 * 4f64.ln() + 1.0) / (0.1 * 4f64.ln() + 1.0);
    let both = json!({"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": true});
    assert_eq!(yarn(both), (Some(ratio as f32), false));
    let told =
        json!({"mscale": 0.7, "mscale_all_dim": 1.0, "attention_factor": 1.5, "truncate": false});
    assert_eq!(yarn(told), (Some(1.5), true));
}

/// The number of experts has two names; a window of qwen3_moe is for all layers or for none.
#[test]
fn experts_are_counted_under_either_name() {
    for (family, old, new) in [
        ("qwen3_moe", "num_experts", "num_local_experts"),
        ("mixtral", "num_local_experts", "num_experts"),
    ] {
        let renamed = with(family, |c| {
            let n = c.as_object_mut().unwrap().shift_remove(old).unwrap();
            c[new] = n;
        });
        let told = Changed::family(family).plan().unwrap();
        let renamed = renamed.plan().unwrap();
        assert_eq!(renamed.config, told.config);
        assert_eq!(renamed.metadata, told.metadata);
    }
    let sliding = with("qwen3_moe", |c| {
        c["use_sliding_window"] = json!(true);
        c["sliding_window"] = json!(16);
    });
    assert_eq!(window(&sliding.plan().unwrap()), Some(16));
}

/// The converter writes the width of an expert whenever the file has one of its own.
#[test]
fn the_width_of_an_expert_is_written_even_where_it_is_that_of_a_dense_layer() {
    let plan = with("qwen3_moe", |c| c["intermediate_size"] = json!(256));
    let plan = plan.plan().unwrap();
    assert_eq!(plan.config.ffn, plan.config.experts.unwrap().ffn);
    assert_eq!(
        value(&plan, "qwen3moe.expert_feed_forward_length"),
        Some(&MetaValue::U32(256))
    );
    let plan = Changed::family("mixtral").plan().unwrap();
    assert_eq!(value(&plan, "llama.expert_feed_forward_length"), None);
}

#[test]
fn what_the_forward_pass_cannot_follow_is_refused() {
    let yarn = |key: &str, value: Value| {
        with("qwen2", |c| {
            c["rope_scaling"] = json!({"type": "yarn", "factor": 4.0, key: value});
        })
    };
    let errors = [
        (
            "yarn of no context",
            yarn("original_max_position_embeddings", json!(0.5)).error(),
        ),
        (
            "rotation of a part of a head",
            with("qwen3", |c| {
                c["rope_parameters"] = json!({"rope_theta": 1e6, "partial_rotary_factor": 0.5});
            })
            .error(),
        ),
        (
            "scaling where the window slides",
            with("gemma3", |c| {
                c["rope_parameters"] = json!({
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                });
            })
            .error(),
        ),
        (
            "attention in both directions",
            with("gemma3", |c| c["use_bidirectional_attention"] = json!(true)).error(),
        ),
        (
            "no causal mask",
            with("qwen2", |c| c["is_causal"] = json!(false)).error(),
        ),
        (
            "a vocabulary beyond bounds",
            with("llama", |c| c["vocab_size"] = json!(5_000_000)).error(),
        ),
        (
            "experts in one tensor",
            Changed::family("mixtral")
                .header(ONE, |h| {
                    let w1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight";
                    let tensor = h.shift_remove(w1).unwrap();
                    h.insert("model.layers.0.mlp.experts.gate_up_proj".to_owned(), tensor);
                })
                .error(),
        ),
    ];
    insta::assert_snapshot!(told(&errors));
}
