//! `run`: goes on from a prompt, as text on the terminal or as tokens for whoever compares.
//!
//! Invariant: without a temperature the tokens are the likeliest ones, so that the same vindex and prompt always give
//! the same. No chat template: a prompt is taken as it stands.

use std::ops::ControlFlow;
use std::sync::mpsc::channel;
use std::time::Instant;

use engine::{
    Decoder, DraftChoice, Drafts, Engine, EngineOptions, EngineStats, Event, Request, Sampler,
    Sampling, Tokenizer,
};
use terminal::{Failure, write};

use crate::cli::Run;
use crate::context::Context;
use crate::pass::{CHUNK, Pass};

/// Generates and tells.
pub(crate) fn run(args: &Run, context: &Context) -> Result<(), Failure> {
    let mut pass = Pass::open(&args.dir, &args.computing, context)?;
    let tokenizer = match args.prompt.is_empty() && args.ids.is_some() && context.output.json {
        true => None,
        false => Some(
            Tokenizer::of(pass.model().vindex()).map_err(Failure::of(format!(
                "cannot read the tokenizer of {}",
                args.dir.display()
            )))?,
        ),
    };
    let prompt = match (&args.ids, &tokenizer) {
        (Some(ids), _) => ids.clone(),
        (None, Some(tokenizer)) => tokenizer
            .encode(&args.prompt.join(" "), true)
            .map_err(Failure::of("cannot encode the prompt"))?,
        (None, None) => Vec::new(),
    };
    if prompt.is_empty() {
        return Err(Failure::new("the prompt has no tokens")
            .hint("give a text, or tokens as --ids 1,45,100"));
    }
    let config = pass.model().config();
    let n_room = (config.context as usize).saturating_sub(prompt.len());
    let n_tokens_max = args.max_tokens.min(n_room);
    if n_tokens_max == 0 {
        return Err(Failure::new(format!(
            "{} tokens of prompt leave no room in the model's context of {}",
            prompt.len(),
            config.context
        )));
    }
    let ends = match args.ignore_eos {
        true => Vec::new(),
        false => config.eos.clone(),
    };
    let sampling = sampling(args);
    sampling
        .check(config.vocab as usize)
        .map_err(Failure::new)?;
    let seed = args.seed.unwrap_or(0);
    let mut decoder = Decoder::continuing(true);
    let mut ids: Vec<u32> = Vec::new();
    let begun = Instant::now();
    let mut first_token_s = 0.0;
    let mut is_stopped = false;
    // Tells a token; true when it is the last.
    let mut tell = |id: u32| -> Result<bool, Failure> {
        if ids.is_empty() {
            first_token_s = begun.elapsed().as_secs_f64();
        }
        is_stopped = ends.contains(&id);
        ids.push(id);
        if let (Some(tokenizer), false) = (&tokenizer, context.output.json) {
            write(&decoder.push(tokenizer, id))?;
        }
        Ok(is_stopped || ids.len() >= n_tokens_max)
    };
    let guesses = if matches!(args.draft, DraftChoice::None) {
        let mut sampler = Sampler::new(&sampling, &prompt, seed);
        let mut sequence = pass.sequence(prompt.len() + n_tokens_max);
        let mut next = prompt.clone();
        loop {
            let logits = pass.append(&mut sequence, &next)?;
            let id = sampler.choose(logits).ok_or_else(|| {
                Failure::new("the model gives no token a probability")
                    .hint("verify the vindex: larql verify")
            })?;
            sampler.accept(id);
            next = vec![id];
            if tell(id)? {
                break None;
            }
        }
    } else {
        let request = Request {
            sampling: Sampling {
                seed: Some(seed),
                ..sampling
            },
            ignore_eos: true,
            ..Request::new(prompt.clone(), n_tokens_max)
        };
        Some(with_guesses(&pass, request, args, &mut tell)?)
    };
    let decode_s = begun.elapsed().as_secs_f64() - first_token_s;
    if !context.output.json {
        write(&(decoder.finish() + "\n"))?;
    }
    let per_second = |n: usize, seconds: f64| {
        if seconds > 0.0 {
            n as f64 / seconds
        } else {
            0.0
        }
    };
    context.output.value(&serde_json::json!({
        "ids": ids,
        "text": tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&ids, true)),
        "prompt_ids": prompt,
        "finish_reason": if is_stopped { "stop" } else { "length" },
        "timings": {
            "first_token_s": first_token_s,
            "decode_s": decode_s,
            "prefill_tok_s": per_second(prompt.len(), first_token_s),
            "decode_tok_s": per_second(ids.len() - 1, decode_s),
        },
        "guesses": guesses.map(|stats| serde_json::json!({
            "steps": stats.n_drafts, "tokens": stats.n_drafted, "accepted": stats.n_accepted,
            "seconds": stats.in_drafts.as_secs_f64(),
        })),
        "bytes_per_token": {
            "attention_weights": pass.model().attention_bytes(),
            "feed_forward_weights": pass.model().feed_forward_bytes(),
        },
    }))
}

/// Generates with an engine, which checks several guesses in a step.
fn with_guesses(
    pass: &Pass,
    request: Request,
    args: &Run,
    tell: &mut impl FnMut(u32) -> Result<bool, Failure>,
) -> Result<EngineStats, Failure> {
    let model = pass.model();
    let drafts = Drafts::open(&args.draft, model, &pass.parts.pool)
        .map_err(Failure::of("tokens cannot be guessed as --draft says"))?;
    let options = EngineOptions {
        kv_type: pass.kv,
        // Pages are taken as one text needs them.
        kv_bytes_max: 1 << 40,
        n_running_max: 1,
        prefill_chunk: CHUNK,
        reuse_prefixes: false,
        drafts,
        draft_depth: args.draft_depth.map(usize::from),
        ..EngineOptions::default()
    };
    let cannot = "cannot compute the next token";
    let engine = Engine::start(pass.parts.clone(), options).map_err(Failure::of(cannot))?;
    let (sender, events) = channel();
    let sink = move |event| match sender.send(event) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    engine
        .submit(request, Box::new(sink))
        .map_err(Failure::of(cannot))?;
    for event in events {
        match event {
            Event::Token(token) if tell(token.id)? => break,
            Event::Token(_) => {}
            Event::Finished { .. } => break,
            Event::Failed(error) => return Err(Failure::new(cannot).cause(error)),
        }
    }
    engine.stop(false);
    Ok(engine.stats())
}

fn sampling(args: &Run) -> Sampling {
    let greedy = Sampling::default();
    Sampling {
        temperature: if args.greedy { 0.0 } else { args.temperature },
        top_k: args.top_k.unwrap_or(greedy.top_k),
        top_p: args.top_p.unwrap_or(greedy.top_p),
        seed: args.seed,
        ..greedy
    }
}
