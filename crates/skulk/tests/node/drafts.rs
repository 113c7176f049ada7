//! `--draft`: what a node with guesses tells, and what becomes of one that cannot have them.

use std::process::Stdio;

use serde_json::{Value, json};

use super::node::{Node, Options, skulk, vindex};

fn guessing(more: &[&str]) -> Node {
    Node::start(&Options {
        more: more.iter().map(|word| (*word).to_owned()).collect(),
        ..Options::default()
    })
}

fn completion(node: &Node) -> Value {
    let body = json!({
        "model": "kjv", "prompt": "And God said unto him, And God said unto him, And", "max_tokens": 60, "temperature": 0,
        "ignore_eos": true, "n": 2,
    });
    let (status, answer) = node.post("/v1/completions", &body);
    assert_eq!(status, 200, "{answer}");
    answer
}

#[test]
fn guesses_are_counted_and_change_no_text() {
    let plain = completion(&guessing(&[]));
    let details = &plain["usage"]["completion_tokens_details"];
    let none = json!({"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0});
    assert_eq!(*details, none);
    // The model itself guesses all tokens of a greedy answer.
    let itself = format!("model={}", vindex::with_template().display());
    for (draft, all_are_right) in [("ngram", false), (itself.as_str(), true)] {
        let node = guessing(&["--draft", draft, "--draft-depth", "4"]);
        let got = completion(&node);
        assert_eq!(got["choices"], plain["choices"], "{draft}");
        let details = &got["usage"]["completion_tokens_details"];
        let number = |name: &str| details[name].as_f64().expect("a number");
        let accepted = number("accepted_prediction_tokens");
        let rejected = number("rejected_prediction_tokens");
        assert!(
            accepted > 0.0 && (!all_are_right || rejected == 0.0),
            "{details}"
        );
        let told = |name: &str| node.metric(&format!("vllm:spec_decode_num_{name}"));
        node.wait_for("the last step is counted", || {
            told("draft_tokens_total") == accepted + rejected
        });
        assert_eq!(told("accepted_tokens_total"), accepted);
        assert_eq!(told("accepted_tokens_per_pos_total"), accepted);
        assert!(told("drafts_total") >= accepted / 4.0);
    }
}

#[test]
fn a_node_without_the_guesses_that_it_was_told_to_make_comes_up_only_if_it_may() {
    let absent = ["--draft", "mtp=absent.safetensors"];
    let refused = skulk()
        .args(["serve", "--listen", "127.0.0.1:0"])
        .arg(vindex::with_template())
        .args(absent)
        .stdout(Stdio::null())
        .output()
        .expect("skulk runs");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("absent.safetensors"),
        "{said}"
    );
    assert!(said.contains("--draft-optional"), "{said}");
    let node = guessing(&[&absent[..], &["--draft-optional"]].concat());
    let answer = completion(&node);
    let details = &answer["usage"]["completion_tokens_details"];
    assert_eq!(details["accepted_prediction_tokens"], 0);
}
