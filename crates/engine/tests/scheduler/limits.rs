//! What ends a generation, and what is refused.

use std::time::{Duration, Instant};

use engine::{
    EngineError, EngineOptions, Event, FinishReason, GrammarFactory, Request, Sampling, Tokenizer,
};
use serde_json::json;

use super::{Loaded, answer, ask, options, request, sink, submit};

fn kjv() -> Loaded {
    Loaded::new("models/kjv")
}

fn tokenizer(loaded: &Loaded) -> &Tokenizer {
    loaded.parts.tokenizer.as_ref().unwrap()
}

#[test]
fn texts_are_told_as_they_become_certain_and_stop_texts_are_not() {
    let loaded = kjv();
    let engine = loaded.engine(options());
    let tokenizer = tokenizer(&loaded);
    let prompt = tokenizer.encode("In the beginning", true).unwrap();
    let whole = ask(&engine, request(prompt.clone(), 40));
    assert_eq!(whole.end.as_ref().unwrap().0, FinishReason::Length);
    assert_eq!(whole.ids.len(), 40);
    let expected: Vec<u8> = whole
        .ids
        .iter()
        .flat_map(|&id| tokenizer.token_bytes(id))
        .copied()
        .collect();
    assert_eq!(whole.text, String::from_utf8(expected).unwrap());
    // A stop text from the middle of the answer, across tokens.
    let stop: String = whole.text.chars().skip(30).take(7).collect();
    let until = whole.text.find(&stop).unwrap();
    let stopped = ask(
        &engine,
        Request {
            stop: vec!["never said".to_owned(), stop],
            ..request(prompt.clone(), 40)
        },
    );
    assert_eq!(stopped.text, whole.text[..until]);
    assert_eq!(stopped.end.unwrap().0, FinishReason::Stop);
    // One that begins at the very end is held until then.
    let last = whole.text.chars().last().unwrap();
    let held = ask(
        &engine,
        Request {
            stop: vec![format!("{last}{last}{last}")],
            ..request(prompt, 40)
        },
    );
    assert_eq!((held.text, held.ids), (whole.text, whole.ids));
}

#[test]
fn a_token_that_ends_a_text_ends_the_generation_and_is_not_told() {
    let loaded = kjv();
    let engine = loaded.engine(options());
    let eos = tokenizer(&loaded).eos()[0];
    let prompt = loaded.prompt(3, 5);
    // Whatever the model wants to say, it says the end after the bias.
    let forced = |ignore_eos| Request {
        sampling: Sampling {
            logit_bias: vec![(eos, 1000.0)],
            ..Sampling::default()
        },
        ignore_eos,
        ..Request::new(prompt.clone(), 4)
    };
    let ended = ask(&engine, forced(false));
    let (reason, usage) = ended.end.unwrap();
    assert_eq!((ended.ids.len(), reason), (0, FinishReason::Stop));
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (5, 1));
    let went_on = ask(&engine, forced(true));
    assert_eq!(went_on.ids, [eos; 4]);
    assert_eq!(
        (went_on.text.as_str(), went_on.end.unwrap().0),
        ("", FinishReason::Length)
    );
    let shown = ask(
        &engine,
        Request {
            show_special: true,
            ..forced(true)
        },
    );
    assert_eq!(shown.text, "<|endoftext|>".repeat(4));
}

#[test]
fn logprobs_are_told_when_asked_for() {
    let loaded = kjv();
    let engine = loaded.engine(options());
    let asked = Request {
        top_logprobs: Some(3),
        ..request(loaded.prompt(3, 5), 2)
    };
    let (_, events) = submit(&engine, asked);
    let Ok(Event::Token(token)) = events.recv_timeout(super::PATIENCE) else {
        panic!("no token");
    };
    assert_eq!(token.top.len(), 3);
    assert_eq!(
        (token.top[0].id, Some(token.top[0].logprob)),
        (token.id, token.logprob)
    );
    assert!(token.top[0].logprob < 0.0 && token.top[0].logprob >= token.top[1].logprob);
    engine.stop(true);
}

#[test]
fn the_context_ends_a_generation() {
    let loaded = kjv();
    let engine = loaded.engine(EngineOptions {
        context_max: Some(20),
        ..options()
    });
    assert_eq!(engine.context(), 20);
    let got = ask(&engine, request(loaded.prompt(1, 12), 1000));
    assert_eq!(
        (got.ids.len(), got.end.unwrap().0),
        (8, FinishReason::Length)
    );
    // The cache is a limit too, to its last position.
    let engine = loaded.engine(EngineOptions {
        kv_bytes_max: loaded.pages(2),
        ..options()
    });
    assert_eq!(engine.context(), 128);
    let got = ask(&engine, request(loaded.prompt(1, 12), 1000));
    assert_eq!(
        (got.ids.len(), got.end.unwrap().0),
        (116, FinishReason::Length)
    );
}

#[test]
fn answers_follow_a_grammar_and_end_with_it() {
    let loaded = kjv();
    let engine = loaded.engine(options());
    let factory = GrammarFactory::new(tokenizer(&loaded)).unwrap();
    let schema = json!({
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": false,
    });
    for seed in 0..6 {
        let asked = Request {
            grammar: Some(factory.json_schema(&schema).unwrap()),
            sampling: Sampling {
                temperature: if seed == 0 { 0.0 } else { 1.0 },
                seed: Some(seed),
                ..Sampling::default()
            },
            ..Request::new(loaded.prompt(1, 5), 300)
        };
        let got = ask(&engine, asked);
        assert_eq!(got.end.unwrap().0, FinishReason::Stop, "{}", got.text);
        let value: serde_json::Value = serde_json::from_str(&got.text).unwrap();
        assert!(value["a"].as_i64().unwrap() < 100 && value["b"].is_string());
    }
}

#[test]
fn what_cannot_be_generated_is_refused_with_a_reason() {
    let loaded = kjv();
    let engine = loaded.engine(EngineOptions {
        context_max: Some(50),
        ..options()
    });
    let refused = |request: Request| {
        let (sink, events) = sink();
        let error = engine.submit(request, sink).unwrap_err();
        assert!(events.try_recv().is_err());
        error.to_string()
    };
    assert!(refused(request(Vec::new(), 1)).contains("no token"));
    assert!(refused(request(vec![1], 0)).contains("max_tokens"));
    assert!(refused(request(vec![u32::MAX], 1)).contains("token 4294967295"));
    assert!(refused(request(vec![1; 50], 1)).contains("50 tokens"));
    let mut hot = request(vec![1], 1);
    hot.sampling.temperature = -1.0;
    assert!(refused(hot).contains("temperature"));
    let mut long = request(vec![1], 1);
    long.stop = vec!["x".repeat(1 << 20)];
    assert!(refused(long).contains("stop texts"));
    // Without a tokenizer ids go in and out.
    let mut parts = loaded.parts.clone();
    parts.tokenizer = None;
    let bare = engine::Engine::start(parts, options()).unwrap();
    let mut stop = request(vec![1], 1);
    stop.stop = vec!["x".to_owned()];
    let (no_sink, _events) = sink();
    assert!(matches!(
        bare.submit(stop, no_sink),
        Err(EngineError::Invalid(_))
    ));
    let got = ask(&bare, request(vec![1, 2], 3));
    assert_eq!((got.ids.len(), got.text.as_str()), (3, ""));
}

#[test]
fn more_requests_than_may_wait_are_refused_until_some_have_ended() {
    let loaded = kjv();
    let engine = loaded.engine(EngineOptions {
        n_running_max: 1,
        n_waiting_max: 2,
        ..options()
    });
    let streams: Vec<_> = (0..3)
        .map(|i| submit(&engine, request(loaded.prompt(i, 9), 200)))
        .collect();
    let (no_sink, _events) = sink();
    let busy = engine.submit(request(vec![1], 1), no_sink).unwrap_err();
    assert!(matches!(busy, EngineError::Busy { .. }), "{busy}");
    for (ticket, _) in &streams {
        ticket.cancel();
    }
    for (_, events) in &streams {
        answer(events);
    }
    assert_eq!(ask(&engine, request(vec![1], 2)).ids.len(), 2);
}

#[test]
fn a_deadline_ends_what_runs_and_what_waits() {
    let loaded = kjv();
    let engine = loaded.engine(EngineOptions {
        n_running_max: 1,
        ..options()
    });
    let limited = |after: Duration| Request {
        deadline: Some(Instant::now() + after),
        ..request(loaded.prompt(1, 9), 100_000)
    };
    // The context would end it at 1024 tokens; on any machine that takes longer than this.
    let (_, runs) = submit(&engine, limited(Duration::from_millis(50)));
    let (_, waits) = submit(&engine, limited(Duration::ZERO));
    assert!(matches!(
        answer(&waits).end,
        Err(EngineError::Deadline { n_generated: 0 })
    ));
    let ran = answer(&runs);
    match ran.end {
        Err(EngineError::Deadline { n_generated }) => assert_eq!(n_generated, ran.ids.len()),
        other => panic!("{other:?}"),
    }
}
