//! The engine from outside: requests in, events out, over extracted vindexes.

mod drafts;
mod failures;
#[path = "../../../vindex/tests/support/goldens.rs"]
mod golden_files;
mod heads;
mod limits;
mod reference;
mod sameness;
mod sidecar;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use engine::{
    Engine, EngineError, EngineOptions, EngineParts, Event, FinishReason, KvCache, KvType, Local,
    Model, Pool, Request, Sink, Ticket, Tokenizer, Usage,
};
use tempfile::TempDir;
use vindex::{ExtractOptions, LocalDir, Recipe, Vindex};

/// Longest wait for an event; the tests fail instead of hanging.
const PATIENCE: Duration = Duration::from_secs(120);

/// A model from the repository, ready for engines.
struct Loaded {
    parts: EngineParts,
    _dir: TempDir,
}

impl Loaded {
    fn new(checkpoint: &str) -> Loaded {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let source = LocalDir::open(&root.join(checkpoint)).unwrap();
        let plan = vindex::plan(&source, Recipe::F32).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let options = ExtractOptions {
            threads: 1,
            allow_nonfinite: false,
        };
        vindex::extract(&source, &plan, dir.path(), &options, &|_| {}).unwrap();
        let vindex = Arc::new(Vindex::open(dir.path()).unwrap());
        let pool = Arc::new(Pool::new(2));
        Loaded {
            parts: EngineParts {
                model: Arc::new(Model::open(Arc::clone(&vindex)).unwrap()),
                ffn: Arc::new(Local::new(Arc::clone(&vindex), Arc::clone(&pool)).unwrap()),
                pool,
                tokenizer: Some(Arc::new(Tokenizer::of(&vindex).unwrap())),
            },
            _dir: dir,
        }
    }

    fn engine(&self, options: EngineOptions) -> Engine {
        Engine::start(self.parts.clone(), options).unwrap()
    }

    /// Bytes of this many pages.
    fn pages(&self, n: u64) -> u64 {
        n * KvCache::bytes_for(self.parts.model.config(), KvType::default(), 1)
    }

    /// Tokens that depend on `seed` alone.
    fn prompt(&self, seed: u32, n: u32) -> Vec<u32> {
        let n_vocab = self.parts.model.config().vocab;
        (0..n)
            .map(|i| (seed * 7919 + i * i * 31 + i * seed * 17) % n_vocab)
            .collect()
    }
}

fn options() -> EngineOptions {
    EngineOptions {
        kv_bytes_max: 64 << 20,
        ..EngineOptions::default()
    }
}

/// A greedy request that goes on to its limit.
fn request(prompt: Vec<u32>, n: usize) -> Request {
    Request {
        ignore_eos: true,
        ..Request::new(prompt, n)
    }
}

/// What became of a request.
#[derive(Debug)]
struct Answer {
    ids: Vec<u32>,
    text: String,
    end: Result<(FinishReason, Usage), EngineError>,
}

fn sink() -> (Sink, Receiver<Event>) {
    let (sender, receiver) = channel();
    let sink = move |event| match sender.send(event) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    (Box::new(sink), receiver)
}

fn submit(engine: &Engine, request: Request) -> (Ticket, Receiver<Event>) {
    let (sink, events) = sink();
    (engine.submit(request, sink).unwrap(), events)
}

/// All events until the channel closes: there is one last event, at the end, and it comes.
fn answer(events: &Receiver<Event>) -> Answer {
    let (mut ids, mut text, mut end) = (Vec::new(), String::new(), None);
    loop {
        match events.recv_timeout(PATIENCE) {
            Ok(_) if end.is_some() => panic!("an event after the last one"),
            Ok(Event::Token(token)) => {
                ids.push(token.id);
                text += &token.text;
            }
            Ok(Event::Finished {
                reason,
                text: rest,
                usage,
            }) => {
                text += &rest;
                end = Some(Ok((reason, usage)));
            }
            Ok(Event::Failed(error)) => end = Some(Err(error)),
            Err(e) => match end {
                Some(end) => return Answer { ids, text, end },
                None => panic!("no last event: {e}"),
            },
        }
    }
}

fn ask(engine: &Engine, request: Request) -> Answer {
    answer(&submit(engine, request).1)
}
