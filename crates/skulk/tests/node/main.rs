//! The real program on a real small model: a node comes up, answers, streams, refuses, is left by its clients, drains.
//!
//! Invariant: every node of a test is killed with it, and every wait has a bound.

mod drafts;
mod hostile;
mod node;
mod split;
mod weights;

use std::time::{Duration, Instant};

use node::{KEY, Node, Options, vindex};
use serde_json::{Value, json};

fn chat(more: Value) -> Value {
    let mut body = json!({
        "model": "kjv", "messages": [{"role": "user", "content": "Who made the heaven?"}], "max_tokens": 8, "temperature": 0,
    });
    for (name, value) in more.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    body
}

#[test]
fn a_whole_answer_and_a_stream_say_the_same() {
    let node = Node::start(&Options::default());
    let (status, whole) = node.post("/v1/chat/completions", &chat(json!({})));
    assert_eq!(status, 200, "{whole}");
    let message = &whole["choices"][0]["message"];
    let text = message["content"].as_str().expect("a text");
    assert!(!text.is_empty());
    assert_eq!(whole["usage"]["completion_tokens"], 8);

    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let events = node.stream("/v1/chat/completions", &chat(options));
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    let chunks: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|data| serde_json::from_str(data).expect("a chunk is JSON"))
        .collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let told: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(told, text);
    let [.., last, usage] = chunks.as_slice() else {
        panic!("two chunks");
    };
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 8);
}

#[test]
fn refusals_are_openais() {
    let node = Node::start(&Options {
        with_key: true,
        ..Options::default()
    });
    let refused = |status: u16, code: &str, body: &Value| {
        let (got, answer) = node.post("/v1/chat/completions", body);
        assert_eq!(got, status, "{answer}");
        assert_eq!(answer["error"]["code"], code, "{answer}");
        let fields: Vec<&String> = answer["error"]
            .as_object()
            .expect("an error")
            .keys()
            .collect();
        assert_eq!(fields, ["message", "type", "param", "code"]);
    };
    refused(404, "model_not_found", &chat(json!({"model": "other"})));
    refused(400, "unknown_parameter", &chat(json!({"colour": "red"})));
    refused(400, "invalid_value", &chat(json!({"temperature": 9})));
    let long = json!([{"role": "user", "content": "word ".repeat(3000)}]);
    refused(
        400,
        "context_length_exceeded",
        &chat(json!({"messages": long})),
    );

    for key in ["", "wrong-key-0", &KEY[1..]] {
        let (status, answer) = node.get_as("/v1/models", key);
        assert_eq!(
            (status, &answer["error"]["code"]),
            (401, &json!("invalid_api_key")),
            "{key}"
        );
    }
    assert_eq!(node.get_as("/v1/models", KEY).0, 200);
    assert_eq!(node.get_as("/health", "").0, 200);
}

#[test]
fn a_client_that_goes_away_cancels() {
    let node = Node::start(&Options::default());
    let endless = json!({"model": "kjv", "prompt": "And God", "max_tokens": 900, "ignore_eos": true, "stream": true});
    // One that has read the beginning of its answer, and one that waits for a whole answer.
    let mut whole = endless.clone();
    whole["stream"] = json!(false);
    for body in [endless, whole] {
        let client = node.send("/v1/completions", &body);
        node.wait_for("a request runs", || {
            node.metric("vllm:num_requests_running") >= 1.0
        });
        drop(client);
        node.wait_for("nothing runs", || {
            node.metric("vllm:num_requests_running") + node.metric("vllm:num_requests_waiting")
                == 0.0
        });
    }
    assert!(
        node.metric("vllm:request_success_total{model_name=\"kjv\",finished_reason=\"abort\"}")
            >= 2.0
    );
}

#[cfg(unix)]
#[test]
fn a_request_to_terminate_lets_answers_finish() {
    let mut node = Node::start(&Options::default());
    let body = json!({"model": "kjv", "prompt": "And God", "max_tokens": 300, "ignore_eos": true, "stream": true});
    let client = node.send("/v1/completions", &body);
    node.wait_for("a request runs", || {
        node.metric("vllm:num_requests_running") >= 1.0
    });
    node.terminate();
    let text = node::read_all(client);
    assert!(text.contains("\"finish_reason\":\"length\""), "{text}");
    assert!(text.contains("data: [DONE]"), "{text}");
    assert!(node.ended(Duration::from_secs(20)).success());
}

#[cfg(unix)]
#[test]
fn a_second_request_to_terminate_ends_answers() {
    let mut node = Node::start(&Options::default());
    let body = json!({"model": "kjv", "prompt": "And God", "max_tokens": 1000, "ignore_eos": true, "stream": true, "n": 8});
    let client = node.send("/v1/completions", &body);
    node.wait_for("a request runs", || {
        node.metric("vllm:num_requests_running") >= 1.0
    });
    node.terminate();
    std::thread::sleep(Duration::from_millis(100));
    let asked = Instant::now();
    node.terminate();
    node.ended(Duration::from_secs(20));
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "it waits for the grace"
    );
    assert!(!node::read_all(client).contains("[DONE]"));
}

#[test]
fn a_model_without_a_template_refuses_chat_until_it_is_given_one() {
    let template = vindex::dir().join("template.jinja");
    let user = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    std::fs::write(&template, user).expect("a template");
    let own = Node::start(&Options {
        recipe_template: false,
        ..Options::default()
    });
    let (status, answer) = own.post("/v1/chat/completions", &chat(json!({})));
    assert_eq!(status, 400, "{answer}");
    assert!(
        answer["error"]["message"]
            .as_str()
            .expect("a message")
            .contains("--chat-template"),
        "{answer}"
    );
    let given = Node::start(&Options {
        recipe_template: false,
        template: Some(template),
        ..Options::default()
    });
    assert_eq!(given.post("/v1/chat/completions", &chat(json!({}))).0, 200);
}

#[test]
fn a_node_that_cannot_serve_says_what_to_do() {
    let said = |arguments: &[&str]| node::fails(arguments);
    let text = said(&["serve", "no/such/dir"]);
    assert!(
        text.contains("cannot open the vindex no/such/dir") && text.contains("hint: "),
        "{text}"
    );
    let dir = vindex::with_template();
    let dir = dir.to_str().expect("a plain path");
    let text = said(&["serve", dir, "--listen", "0.0.0.0:0"]);
    assert!(text.contains("without an API key"), "{text}");
    let text = said(&["serve", dir, "--ffn", "127.0.0.1:9"]);
    assert!(
        text.contains("weight servers cannot be used") && text.contains("larql serve"),
        "{text}"
    );
    let text = said(&["serve", dir, "--api-key-file", dir]);
    assert!(text.contains("cannot read"), "{text}");
}

#[test]
fn a_plan_is_told_as_a_table_and_as_json() {
    let nodes = vindex::dir().join("nodes.yaml");
    let yaml = "nodes:\n- {name: desk, role: attention, memory: 1GB, bandwidth: 20, price_per_hour: 1}\n\
                - {name: shelf, role: ffn, memory: 1GB, bandwidth: 20, link: {round_trip_us: 50, bandwidth: 10}}\n";
    std::fs::write(&nodes, yaml).expect("a file");
    let dir = vindex::with_template();
    let arguments = |json: bool| {
        let mut arguments = vec![
            "plan",
            dir.to_str().expect("a plain path"),
            "--nodes",
            nodes.to_str().expect("a plain path"),
        ];
        if json {
            arguments.push("--json");
        }
        arguments
    };
    let text = node::says(&arguments(false));
    for part in [
        "layers 0..4",
        "attention and cache",
        "tokens/s",
        "for a million tokens",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let plan: Value = serde_json::from_str(&node::says(&arguments(true))).expect("JSON");
    assert_eq!(plan["fits"], true);
    // Four layers wait for at least four round trips of 50 microseconds.
    assert!(
        plan["step"]["round_trips_s"]
            .as_f64()
            .is_some_and(|s| (s - 200e-6).abs() < 1e-9),
        "{plan}"
    );
    std::fs::write(
        &nodes,
        yaml.replace(
            "memory: 1GB, bandwidth: 20, link",
            "memory: 1MB, bandwidth: 20, link",
        ),
    )
    .expect("a file");
    let text = node::fails(&arguments(false));
    assert!(text.contains("does not fit"), "{text}");
}
