//! A node and its weight servers, which are killed in the middle of streams.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::node::{self, Node, Options};
use crate::weights::Weights;

fn node(weights: &[&Weights], deadline: &str) -> Node {
    let addresses: Vec<&str> = weights.iter().map(|w| w.address.as_str()).collect();
    let more = ["--ffn", &addresses.join(","), "--ffn-deadline", deadline];
    Node::start(&Options {
        more: more.map(str::to_owned).into(),
        ..Options::default()
    })
}

/// A completion that takes a while, the same each time.
fn long() -> Value {
    json!({"model": "kjv", "prompt": "And God said unto", "max_tokens": 400, "temperature": 0, "ignore_eos": true, "stream": true})
}

/// The text of the events of a stream; an error is one.
fn text(events: impl Iterator<Item = String>) -> Result<String, Value> {
    let mut text = String::new();
    let mut is_done = false;
    for data in events {
        assert!(!is_done, "{data} came after the end");
        if data == "[DONE]" {
            is_done = true;
            continue;
        }
        let chunk: Value = serde_json::from_str(&data).expect("JSON");
        if !chunk["error"].is_null() {
            return Err(chunk);
        }
        text += chunk["choices"][0]["text"].as_str().expect("a text");
    }
    assert!(is_done, "the stream was cut off after {text}");
    Ok(text)
}

/// What a node says that holds all weights itself.
fn unsplit() -> String {
    let node = Node::start(&Options::default());
    text(node::events(node.send("/v1/completions", &long()))).expect("no error")
}

fn is_up(node: &Node, weights: &Weights) -> bool {
    node.metric(&format!("skulk_ffn_up{{peer=\"{}\"", weights.address)) == 1.0
}

#[test]
fn servers_that_are_killed_one_after_the_other_change_no_token() {
    let wanted = unsplit();
    let mut weights = [Weights::start("127.0.0.1:0"), Weights::start("127.0.0.1:0")];
    let node = node(&[&weights[0], &weights[1]], "10s");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let streaming: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut n = 0;
                    while !is_over.load(Ordering::Relaxed) {
                        let told = text(node::events(node.send("/v1/completions", &long())));
                        assert_eq!(told.expect("no error"), wanted);
                        n += 1;
                    }
                    n
                })
            })
            .collect();
        node.wait_for("tokens", || {
            node.metric("vllm:generation_tokens_total") > 100.0
        });
        for i in [0, 1, 0] {
            assert!(weights.iter().all(|weights| is_up(&node, weights)));
            weights[i].kill();
            node.wait_for("its end is noticed", || !is_up(&node, &weights[i]));
            weights[i].start_again();
            node.wait_for("it is back", || is_up(&node, &weights[i]));
        }
        is_over.store(true, Ordering::Relaxed);
        for streaming in streaming {
            assert!(streaming.join().expect("its tokens") > 0);
        }
    });
    assert!(node.metric("skulk_ffn_failures_total") >= 3.0);
    assert_eq!(node.metric("skulk_requests_failed_total"), 0.0);
}

#[test]
fn without_a_replica_a_killed_server_is_one_error_and_the_next_request_is_answered_when_it_is_back()
{
    let wanted = unsplit();
    let mut weights = Weights::start("127.0.0.1:0");
    let node = node(&[&weights], "1s");
    let mut events = node::events(node.send("/v1/completions", &long()));
    let mut begin: Vec<String> = events.by_ref().take(20).collect();
    weights.kill();
    begin.extend(events);
    let errors: Vec<&String> = begin
        .iter()
        .filter(|data| data.contains("\"error\""))
        .collect();
    assert_eq!(
        errors,
        [begin.last().expect("events")],
        "one error, at the end"
    );
    let error = text(begin.clone().into_iter()).expect_err("an error");
    let message = error["error"]["message"].as_str().expect("a message");
    assert!(
        message.contains(&weights.address) && message.contains("layer"),
        "{message}"
    );
    // Whoever asks while it is gone is told so at once.
    let (status, answer) = node.post("/v1/completions", &{
        let mut whole = long();
        whole["stream"] = json!(false);
        whole
    });
    assert!(status >= 500, "{status} {answer}");
    assert!(answer["error"]["message"].is_string(), "{answer}");
    weights.start_again();
    node.wait_for("it is back", || is_up(&node, &weights));
    let told = text(node::events(node.send("/v1/completions", &long())));
    assert_eq!(told.expect("no error"), wanted);
}

#[test]
fn a_node_with_weight_servers_needs_no_weights_of_theirs() {
    let weights = Weights::start("127.0.0.1:0");
    let node = node(&[&weights], "5s");
    assert_eq!(
        text(node::events(node.send("/v1/completions", &long()))).expect("no error"),
        unsplit()
    );
    // Its own maps tell that it has not so much as opened the others' parts.
    #[cfg(target_os = "linux")]
    {
        let parts = node.mapped("gguf");
        let index = std::fs::read_to_string(crate::vindex::with_template().join("index.json"));
        let index: Value = serde_json::from_str(&index.expect("the index")).expect("JSON");
        for part in index["parts"].as_array().expect("parts") {
            let file = part["file"].as_str().expect("a name");
            let is_theirs = part["component"].to_string().contains("feed");
            assert_eq!(
                parts.iter().any(|mapped| mapped == file),
                !is_theirs,
                "{part}"
            );
        }
    }
}
