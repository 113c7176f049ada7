//! Models of a family that are unlike its golden: other settings, tensors that are not there, forms that are refused.

use serde_json::{Value, json};
use vindex::{Component, MetaValue, Order, Plan, RopeKind, RopeScaling, Transform, Values};

use super::changed::{Changed, ONE, told};
use super::tensors;

fn with(family: &str, change: impl FnOnce(&mut Value)) -> Changed {
    Changed::family(family).json("config.json", change)
}

fn names(plan: &Plan) -> Vec<&str> {
    tensors(plan).map(|t| t.name.as_str()).collect()
}

fn transform(plan: &Plan, name: &str) -> Transform {
    match &tensors(plan).find(|t| t.name == name).unwrap().values {
        Values::Checkpoint { transform, .. } => transform.clone(),
        other => panic!("{other:?}"),
    }
}

/// A checkpoint of zeros with these tensors, and a tokenizer of 512 tokens.
fn made(config: &Value, shapes: &[(String, Vec<u64>)]) -> Changed {
    made_beside("qwen3", config, shapes)
}

/// The same with the tokenizer of `family`.
fn made_beside(family: &str, config: &Value, shapes: &[(String, Vec<u64>)]) -> Changed {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (name, shape) in shapes {
        let end = at + 2 * shape.iter().product::<u64>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]});
        header.insert(name.clone(), entry);
        at = end;
    }
    let text = Value::Object(header).to_string();
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes.resize(bytes.len() + at as usize, 0);
    let mut made = Changed::family(family)
        .with("config.json", config.to_string())
        .with(ONE, bytes);
    made.name = "made".to_owned();
    made
}

#[test]
fn qwen3_5_with_one_matrix_for_tokens_and_without_blocks_that_predict() {
    let tied = with("qwen3_5", |c| {
        c["tie_word_embeddings"] = json!(true);
        c["text_config"]["tie_word_embeddings"] = json!(true);
    });
    let plan = tied.plan().unwrap();
    assert!(plan.config.tied_embeddings && !names(&plan).contains(&"output.weight"));
    assert!(plan.left_out.iter().any(|l| l.tensor == "lm_head.weight"));
    assert_eq!(plan.config.n_nextn, 1);
    let last = plan.parts.last().unwrap();
    assert_eq!(last.component, Component::NextN { layer: 3 });
    assert!(last.tensors.iter().all(|t| t.name.starts_with("blk.3.")));

    // As a checkpoint whose writer dropped them; the configuration still counts one.
    let without = Changed::family("qwen3_5").header(ONE, |h| {
        *h = std::mem::take(h)
            .into_iter()
            .map(|(name, tensor)| (name.replace("mtp.", "model.visual."), tensor))
            .collect();
    });
    let plan = without.plan().unwrap();
    assert_eq!(plan.config.n_nextn, 0);
    assert!(!names(&plan).iter().any(|name| name.starts_with("blk.3.")));
    let key = ("qwen35.block_count".to_owned(), MetaValue::U32(3));
    assert!(plan.metadata.contains(&key));
    assert!(!plan.metadata.iter().any(|(key, _)| key.contains("nextn")));
}

#[test]
fn layers_of_qwen3_5_follow_from_an_interval_where_there_is_no_list() {
    let silent = with("qwen3_5", |c| {
        let text = c["text_config"].as_object_mut().unwrap();
        text.shift_remove("layer_types").unwrap();
    });
    let told = Changed::family("qwen3_5").plan().unwrap();
    assert_eq!(silent.plan().unwrap().config, told.config);
    let net = told.config.delta_net.unwrap();
    assert_eq!(net.layers, [true, true, false]);
    assert!(net.tiled && !net.fused_ba && told.config.attention.output_gate);
    assert_eq!(told.config.rope.n_dims, 16);
}

#[test]
fn what_new_families_cannot_follow_is_refused() {
    let errors = [
        (
            "attention without gates",
            with("qwen3_5", |c| {
                c["text_config"]["attn_output_gate"] = json!(false)
            })
            .error(),
        ),
        (
            "a layer of another kind",
            with("qwen3_5", |c| {
                c["text_config"]["layer_types"][0] = json!("sliding_attention")
            })
            .error(),
        ),
        (
            "heads that do not divide",
            with("qwen3_5", |c| {
                c["text_config"]["linear_num_key_heads"] = json!(3)
            })
            .error(),
        ),
        (
            "tokens that see later ones",
            with("gemma4_moe", |c| {
                c["text_config"]["use_bidirectional_attention"] = json!("all")
            })
            .error(),
        ),
        (
            "a last layer that slides",
            with("gemma4_moe", |c| {
                c["text_config"]["layer_types"][1] = json!("sliding_attention")
            })
            .error(),
        ),
        (
            "rope of another kind",
            with("gemma4_moe", |c| {
                c["text_config"]["rope_parameters"]["full_attention"]["rope_type"] =
                    json!("default")
            })
            .error(),
        ),
        (
            "keys of no layer",
            with("gemma4_moe", |c| {
                c["text_config"]["num_kv_shared_layers"] = json!(1)
            })
            .error(),
        ),
        (
            "keys of no layer at all",
            with("gemma4_moe", |c| {
                c["text_config"]["num_kv_shared_layers"] = json!(2)
            })
            .error(),
        ),
        (
            "per-layer embeddings of other tokens",
            with("gemma4_moe", |c| {
                c["text_config"]["hidden_size_per_layer_input"] = json!(32);
                c["text_config"]["vocab_size_per_layer_input"] = json!(256);
            })
            .error(),
        ),
        (
            "another limit of gates",
            with("gpt_oss", |c| c["swiglu_limit"] = json!(6.0)).error(),
        ),
        (
            "another quantisation",
            with("gpt_oss", |c| {
                c["quantization_config"]["quant_method"] = json!("awq")
            })
            .error(),
        ),
        (
            "scales of another shape",
            Changed::family("gpt_oss")
                .header(ONE, |h| {
                    h["model.layers.0.mlp.experts.down_proj_scales"]["shape"] = json!([4, 8, 256]);
                })
                .error(),
        ),
        (
            "blocks without scales",
            Changed::family("gpt_oss")
                .header(ONE, |h| {
                    let scales = h
                        .shift_remove("model.layers.0.mlp.experts.down_proj_scales")
                        .unwrap();
                    h.insert("model.layers.0.mlp.experts.something".to_owned(), scales);
                })
                .error(),
        ),
        ("dense layers among routed ones", made(&json!({
            "architectures": ["Qwen3_5MoeForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}), &[("x".to_owned(), vec![1])]).error()),
        (
            "an older DeepSeek",
            deepseek(|c| c["architectures"] = json!(["DeepseekV2ForCausalLM"])).error(),
        ),
        (
            "a plain choice of experts",
            deepseek(|c| c["topk_method"] = json!("greedy")).error(),
        ),
        (
            "another kind of router",
            deepseek(|c| c["scoring_func"] = json!("softmax")).error(),
        ),
        (
            "each second layer routed",
            deepseek(|c| c["moe_layer_freq"] = json!(2)).error(),
        ),
        (
            "biases",
            deepseek(|c| c["attention_bias"] = json!(true)).error(),
        ),
        (
            "groups that do not divide",
            deepseek(|c| c["n_group"] = json!(3)).error(),
        ),
        (
            "more experts than groups have",
            deepseek(|c| c["topk_group"] = json!(1)).error(),
        ),
    ];
    insta::assert_snapshot!(told(&errors));
}

/// A small DeepSeek-V3 as its configuration says after `change`.
fn deepseek(change: impl FnOnce(&mut Value)) -> Changed {
    let mut config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "silu", "vocab_size": 512, "rms_norm_eps": 1e-6,
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 48, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "max_position_embeddings": 4096,
        "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
        "n_shared_experts": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": true, "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64}});
    change(&mut config);
    let number = |key: &str| config[key].as_u64();
    let (hidden, heads) = (64, 2);
    let mut shapes: Vec<(String, Vec<u64>)> = Vec::new();
    let mut add = |name: String, shape: &[u64]| shapes.push((name, shape.to_vec()));
    add("model.embed_tokens.weight".to_owned(), &[512, hidden]);
    add("model.norm.weight".to_owned(), &[hidden]);
    add("lm_head.weight".to_owned(), &[512, hidden]);
    for l in 0..2 {
        let name = |rest: &str| format!("model.layers.{l}.{rest}.weight");
        add(name("input_layernorm"), &[hidden]);
        add(name("post_attention_layernorm"), &[hidden]);
        match number("q_lora_rank") {
            Some(rank) => {
                add(name("self_attn.q_a_proj"), &[rank, hidden]);
                add(name("self_attn.q_a_layernorm"), &[rank]);
                add(name("self_attn.q_b_proj"), &[heads * 24, rank]);
            }
            None => add(name("self_attn.q_proj"), &[heads * 24, hidden]),
        }
        add(name("self_attn.kv_a_proj_with_mqa"), &[32 + 8, hidden]);
        add(name("self_attn.kv_a_layernorm"), &[32]);
        add(name("self_attn.kv_b_proj"), &[heads * (16 + 24), 32]);
        add(name("self_attn.o_proj"), &[hidden, heads * 24]);
        let mut feed_forward = |prefix: &str, ffn: u64| {
            add(name(&format!("{prefix}.gate_proj")), &[ffn, hidden]);
            add(name(&format!("{prefix}.up_proj")), &[ffn, hidden]);
            add(name(&format!("{prefix}.down_proj")), &[hidden, ffn]);
        };
        if l < number("first_k_dense_replace").unwrap() {
            feed_forward("mlp", 96);
            continue;
        }
        (0..8).for_each(|e| feed_forward(&format!("mlp.experts.{e}"), 32));
        if let Some(n) = number("n_shared_experts") {
            feed_forward("mlp.shared_experts", 32 * n);
        }
        add(name("mlp.gate"), &[8, hidden]);
        let bias = format!("model.layers.{l}.mlp.gate.e_score_correction_bias");
        add(bias, &[8]);
    }
    made(&config, &shapes)
}

#[test]
fn deepseek_with_and_without_what_its_golden_has() {
    let plan = deepseek(|_| ()).plan().unwrap();
    let (a, experts) = (&plan.config.attention, plan.config.experts.unwrap());
    assert_eq!((a.n_kv_heads, a.key_length, a.value_length), (1, 40, 32));
    let mscale = 0.1 * 40f64.ln() + 1.0;
    assert_eq!(a.scale, (mscale * mscale / 24f64.sqrt()) as f32);
    assert_eq!(experts.shared.unwrap().ffn, 64);
    assert!(experts.normalise && experts.choice_bias && experts.groups.is_some());
    let keys = Order::Transposed {
        n_blocks: 2,
        n_rows: 16,
    };
    assert_eq!(
        transform(&plan, "blk.0.attn_k_b.weight"),
        Transform::order(keys)
    );
    let shape = |name: &str| tensors(&plan).find(|t| t.name == name).unwrap().ne.clone();
    assert_eq!(shape("blk.1.attn_k_b.weight"), [16, 32, 2]);
    assert_eq!(shape("blk.1.attn_v_b.weight"), [32, 24, 2]);
    let factor = |plan: &Plan| match plan.config.rope.scaling {
        Some(RopeScaling::Yarn {
            attention_factor, ..
        }) => attention_factor,
        other => panic!("{other:?}"),
    };
    assert_eq!(factor(&plan), Some(1.0), "both scales are the same");

    let plain = deepseek(|c| c["q_lora_rank"] = Value::Null).plan().unwrap();
    assert_eq!(plain.config.attention.latent.unwrap().q_rank, None);
    assert!(names(&plain).contains(&"blk.0.attn_q.weight"));
    assert!(!names(&plain).contains(&"blk.0.attn_q_a.weight"));

    let other = deepseek(|c| {
        c["n_group"] = json!(1);
        c["topk_group"] = json!(1);
        c["norm_topk_prob"] = json!(false);
        c["rope_scaling"] = Value::Null;
        c["rope_interleave"] = json!(false);
        c["n_shared_experts"] = Value::Null;
        c["first_k_dense_replace"] = json!(0);
    });
    let other = other.plan().unwrap().config;
    let experts = other.experts.unwrap();
    assert!(!experts.normalise && experts.groups.is_none() && experts.shared.is_none());
    assert_eq!(experts.n_leading_dense, 0);
    assert_eq!(
        (other.rope.scaling, other.rope.kind),
        (None, RopeKind::Neox)
    );
    assert_eq!(other.attention.scale, (1.0 / 24f64.sqrt()) as f32);
}

/// Whoever saves such a model may leave out keys and values that no layer uses; they are kept where they are there.
#[test]
fn layers_of_gemma4_that_share_keys_may_have_some_to_spare() {
    let config = json!({
        "architectures": ["Gemma4ForCausalLM"], "vocab_size": 512, "num_hidden_layers": 4, "hidden_size": 64,
        "intermediate_size": 96, "use_double_wide_mlp": true, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8, "max_position_embeddings": 4096, "tie_word_embeddings": true,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}});
    let shapes = |spare: bool| {
        let mut shapes: Vec<(String, Vec<u64>)> = vec![
            (
                "model.language_model.embed_tokens.weight".to_owned(),
                vec![512, 64],
            ),
            ("model.language_model.norm.weight".to_owned(), vec![64]),
        ];
        for l in 0..4 {
            let head = if l % 2 == 0 { 16 } else { 32 };
            let ffn = if l < 2 { 96 } else { 192 };
            let mut add = |name: &str, shape: &[u64]| {
                let name = format!("model.language_model.layers.{l}.{name}");
                shapes.push((name, shape.to_vec()));
            };
            for norm in [
                "input",
                "post_attention",
                "pre_feedforward",
                "post_feedforward",
            ] {
                add(&format!("{norm}_layernorm.weight"), &[64]);
            }
            add("layer_scalar", &[1]);
            add("self_attn.q_proj.weight", &[2 * head, 64]);
            add("self_attn.q_norm.weight", &[head]);
            add("self_attn.o_proj.weight", &[64, 2 * head]);
            if l < 2 || spare {
                add("self_attn.k_proj.weight", &[head, 64]);
                add("self_attn.v_proj.weight", &[head, 64]);
                add("self_attn.k_norm.weight", &[head]);
            }
            add("mlp.gate_proj.weight", &[ffn, 64]);
            add("mlp.up_proj.weight", &[ffn, 64]);
            add("mlp.down_proj.weight", &[64, ffn]);
        }
        shapes
    };
    let plan = |spare| {
        let made = made_beside("gemma4_moe", &config, &shapes(spare));
        made.without("generation_config.json").plan().unwrap()
    };
    let (with, without) = (plan(true), plan(false));
    assert_eq!(with.config, without.config);
    assert!(names(&with).contains(&"blk.3.attn_k.weight"));
    assert!(
        !names(&without)
            .iter()
            .any(|name| name.starts_with("blk.3.attn_k"))
    );
    assert!(names(&without).contains(&"blk.1.attn_v.weight"));
    let config = &without.config;
    assert_eq!((config.kv_layer(2), config.kv_layer(3)), (Some(0), Some(1)));
    assert_eq!(config.ffn_layers, [96, 96, 192, 192]);
    assert!(config.layer_embeddings.is_none() && config.experts.is_none());
    assert_eq!(config.heads(0).key_length, 16);
    assert_eq!(config.heads(1).key_length, 32);
    let factors = tensors(&with)
        .find(|t| t.name == "rope_freqs.weight")
        .unwrap();
    let Values::Computed { values } = &factors.values else {
        panic!("{factors:?}")
    };
    assert_eq!(
        (values.len(), values[7], values[8]),
        (16, 1.0, 1e30),
        "half of the pairs turn"
    );
}

/// gpt-oss as it is fine-tuned: in BF16, each expert's matrix on its side.
#[test]
fn gpt_oss_without_blocks_has_its_experts_turned() {
    let config = json!({
        "architectures": ["GptOssForCausalLM"], "vocab_size": 512, "num_hidden_layers": 1, "hidden_size": 64,
        "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "num_local_experts": 4, "experts_per_token": 2, "sliding_window": 8, "max_position_embeddings": 4096});
    let layer = |rest: &str| format!("model.layers.0.{rest}");
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![512, 64]),
        ("model.norm.weight".to_owned(), vec![64]),
        ("lm_head.weight".to_owned(), vec![512, 64]),
        (layer("input_layernorm.weight"), vec![64]),
        (layer("post_attention_layernorm.weight"), vec![64]),
        (layer("self_attn.sinks"), vec![2]),
        (layer("mlp.router.weight"), vec![4, 64]),
        (layer("mlp.router.bias"), vec![4]),
        (layer("mlp.experts.gate_up_proj"), vec![4, 64, 64]),
        (layer("mlp.experts.gate_up_proj_bias"), vec![4, 64]),
        (layer("mlp.experts.down_proj"), vec![4, 32, 64]),
        (layer("mlp.experts.down_proj_bias"), vec![4, 64]),
    ];
    for (name, n) in [("q", 64), ("k", 32), ("v", 32), ("o", 64)] {
        shapes.push((layer(&format!("self_attn.{name}_proj.weight")), vec![n, 64]));
        shapes.push((layer(&format!("self_attn.{name}_proj.bias")), vec![n]));
    }
    let plan = made(&config, &shapes).plan().unwrap();
    let up = Order::TransposedAlternate {
        n_blocks: 4,
        first: 1,
    };
    assert_eq!(
        transform(&plan, "blk.0.ffn_up_exps.weight"),
        Transform::order(up)
    );
    let find = |name: &str| tensors(&plan).find(|t| t.name == name).unwrap();
    assert_eq!(find("blk.0.ffn_up_exps.weight").ne, [64, 32, 4]);
    assert_eq!(find("blk.0.ffn_down_exps.weight").ne, [32, 64, 4]);
    assert_eq!(find("blk.0.ffn_down_exps.weight").block_type.name(), "Q8_0");
    let a = &plan.config.attention;
    assert!(
        a.sinks && a.qkv_bias && a.output_bias,
        "the class has biases unless told otherwise"
    );
    assert!(matches!(
        plan.config.rope.scaling,
        Some(RopeScaling::Yarn {
            fractional: true,
            ..
        })
    ));
    let kind = ("general.file_type".to_owned(), MetaValue::U32(15));
    assert!(plan.metadata.contains(&kind));
    let packed = Changed::family("gpt_oss").plan().unwrap();
    let kind = ("general.file_type".to_owned(), MetaValue::U32(38));
    assert!(packed.metadata.contains(&kind));
}

/// The stacked experts of a family under the names that MLX gives them.
#[test]
fn experts_of_mlx_are_stacked_already() {
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 512, "num_hidden_layers": 1, "hidden_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "norm_topk_prob": true, "max_position_embeddings": 4096});
    let layer = |rest: &str| format!("model.layers.0.{rest}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_owned(), vec![512, 64]),
        ("model.norm.weight".to_owned(), vec![64]),
        ("lm_head.weight".to_owned(), vec![512, 64]),
        (layer("input_layernorm"), vec![64]),
        (layer("post_attention_layernorm"), vec![64]),
        (layer("self_attn.q_proj"), vec![64, 64]),
        (layer("self_attn.k_proj"), vec![32, 64]),
        (layer("self_attn.v_proj"), vec![32, 64]),
        (layer("self_attn.o_proj"), vec![64, 64]),
        (layer("self_attn.q_norm"), vec![32]),
        (layer("self_attn.k_norm"), vec![32]),
        (layer("mlp.gate"), vec![4, 64]),
        (layer("mlp.switch_mlp.gate_proj"), vec![4, 32, 64]),
        (layer("mlp.switch_mlp.up_proj"), vec![4, 32, 64]),
        (layer("mlp.switch_mlp.down_proj"), vec![4, 64, 32]),
    ];
    let plan = made(&config, &shapes).plan().unwrap();
    let down = tensors(&plan).find(|t| t.name == "blk.0.ffn_down_exps.weight");
    assert_eq!(down.unwrap().ne, [32, 64, 4]);
    assert_eq!(plan.config.ffn, 0, "no layer is dense");
}

/// The configurations of the catalog's new entries, real numbers and all, are read whole.
#[test]
fn configurations_of_the_catalog_are_understood() {
    let catalog = super::support::fixtures().join("catalog");
    let mut n = 0;
    for entry in std::fs::read_dir(catalog).unwrap() {
        let path = entry.unwrap().path().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        // How weights are stored is another matter.
        for key in ["quantization", "quantization_config"] {
            config.as_object_mut().unwrap().shift_remove(key);
        }
        // All numbers are understood where only tensors are missing.
        let error = made(&config, &[("x".to_owned(), vec![1])]).error();
        assert!(
            error.contains("embed_tokens.weight"),
            "{}: {error}",
            path.display()
        );
        n += 1;
    }
    assert!(n >= 9);
}
