//! What every `FeedForward` must do, asked of one in this process and of servers over TCP and Unix sockets.

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use engine::wire::{Address, Identity, Remote, RemoteOptions, RowType};
use engine::{FeedForward, FfnError, Visit};

use crate::oracle::{
    Oracle, Running, ask, bits, connect, model, model_with_one_beside, rows, tcp, unix, visits,
    visits_of,
};

/// Rows of a prompt's batch.
const PREFILL: usize = 300;

/// The suite: `ffn` must give, bit for bit, what `oracle` gives, and the same for a row beside others and alone.
pub(crate) fn conforms(
    ffn: &dyn FeedForward,
    oracle: &dyn FeedForward,
    model: Identity,
    n_used: u32,
) {
    conforms_with_dense(ffn, oracle, model, n_used, 0);
}

/// The same for a model whose first layers are dense.
pub(crate) fn conforms_with_dense(
    ffn: &dyn FeedForward,
    oracle: &dyn FeedForward,
    model: Identity,
    n_used: u32,
    n_dense: u32,
) {
    let hidden = model.hidden;
    for layer in 0..model.n_layers {
        for n_rows in (1..=16).chain([PREFILL]) {
            let rows = rows(n_rows, hidden, u64::from(layer) << 32 | n_rows as u64);
            let visits = visits_of(&model, layer < n_dense, n_rows, n_used);
            let got = ask(ffn, layer, &rows, &visits, hidden).expect("an answer");
            let wanted = ask(oracle, layer, &rows, &visits, hidden).expect("an answer");
            assert!(bits(&got) == bits(&wanted), "layer {layer}, {n_rows} rows");
            let last = visits.len() - 1;
            let row = &rows[visits[last].row as usize * hidden as usize..][..hidden as usize];
            let alone = [Visit {
                row: 0,
                expert: visits[last].expert,
            }];
            let alone = ask(ffn, layer, row, &alone, hidden).expect("an answer");
            let beside = &got[last * hidden as usize..];
            assert!(bits(&alone) == bits(beside), "layer {layer}, {n_rows} rows");
        }
    }
    // Some rows go nowhere, some visit one expert only, some rows are asked for twice.
    let rows = rows(5, hidden, 9);
    let last = model.n_experts + model.n_beside - 1;
    let layer = n_dense;
    let uneven: Vec<Visit> = [(1, 0), (1, last), (3, last), (3, last), (4, 0)]
        .map(|(row, expert)| Visit { row, expert })
        .into();
    let wanted = ask(oracle, layer, &rows, &uneven, hidden).expect("an answer");
    assert_eq!(
        bits(&ask(ffn, layer, &rows, &uneven, hidden).expect("an answer")),
        bits(&wanted)
    );
    assert_eq!(
        ask(ffn, 0, &rows, &[], hidden).expect("an answer"),
        [0.0; 0]
    );
}

/// What no `FeedForward` may take.
pub(crate) fn refuses(ffn: &dyn FeedForward, model: Identity) {
    let hidden = model.hidden as usize;
    let rows = rows(2, model.hidden, 1);
    let ask = |layer, rows: &[f32], visit: Visit, n_out: usize| {
        let batch = engine::Batch {
            rows,
            visits: &[visit],
        };
        ffn.forward(layer, batch, &mut vec![0.0; n_out])
            .expect_err("it must be refused")
    };
    let first = Visit { row: 0, expert: 0 };
    for error in [
        ask(model.n_layers, &rows, first, hidden),
        ask(0, &rows[1..], first, hidden),
        ask(0, &rows, Visit { row: 2, expert: 0 }, hidden),
        ask(
            0,
            &rows,
            Visit {
                row: 0,
                expert: model.n_experts + model.n_beside,
            },
            hidden,
        ),
        ask(0, &rows, first, hidden - 1),
    ] {
        assert!(matches!(error, FfnError::Invalid(_)), "{error}");
    }
}

fn split(
    model: Identity,
    parts: &[(Range<u32>, Range<u32>)],
    at: impl Fn(usize) -> Address,
) -> Vec<Running> {
    parts
        .iter()
        .enumerate()
        .map(|(i, (layers, experts))| {
            let part = Oracle {
                layers: layers.clone(),
                experts: experts.clone(),
                ..Oracle::whole(model)
            };
            Running::of(part, &at(i))
        })
        .collect()
}

fn everywhere(model: Identity, n_used: u32, parts: &[(Range<u32>, Range<u32>)]) {
    let oracle = Oracle::whole(model);
    let folder = tempfile::tempdir().expect("a folder");
    for is_unix in [false, true] {
        let at = |i: usize| {
            if is_unix {
                unix(&folder, &format!("{i}.sock"))
            } else {
                tcp()
            }
        };
        let servers = split(model, parts, at);
        let remote = connect(&servers, model);
        conforms(&remote, &oracle, model, n_used);
        refuses(&remote, model);
        let stats = remote.stats();
        for peer in &stats.peers {
            assert!(
                peer.is_up && peer.failures == 0 && peer.round_trips > 0,
                "{peer:?}"
            );
        }
    }
}

#[test]
fn one_server_of_a_dense_model() {
    everywhere(model(96, 3, 1), 1, &[(0..3, 0..1)]);
}

#[test]
fn one_server_of_experts() {
    everywhere(model(64, 2, 8), 3, &[(0..2, 0..8)]);
}

#[test]
fn two_servers_by_layers() {
    everywhere(model(96, 3, 1), 1, &[(0..1, 0..1), (1..3, 0..1)]);
}

#[test]
fn two_servers_by_experts() {
    everywhere(model(64, 2, 8), 3, &[(0..2, 0..5), (0..2, 5..8)]);
}

#[test]
fn four_servers_by_experts_and_by_layers() {
    everywhere(
        model(64, 2, 8),
        3,
        &[(0..2, 0..2), (0..2, 2..4), (0..2, 4..6), (0..2, 6..8)],
    );
    everywhere(
        model(64, 4, 8),
        2,
        &[(0..2, 0..4), (0..2, 4..8), (2..4, 0..4), (2..4, 4..8)],
    );
}

#[test]
fn what_is_beside_the_experts_lives_with_the_first() {
    let model = model_with_one_beside(64, 2, 8);
    everywhere(model, 3, &[(0..2, 0..8)]);
    everywhere(model, 3, &[(0..2, 0..5), (0..2, 5..8)]);
    everywhere(model, 3, &[(0..2, 1..8), (0..2, 0..1)]);
    everywhere(
        model,
        3,
        &[(0..2, 0..6), (0..2, 2..8), (0..1, 0..8), (1..2, 0..3)],
    );
    everywhere(model_with_one_beside(64, 1, 1), 1, &[(0..1, 0..1)]);
}

#[test]
fn replicas_and_overlaps() {
    everywhere(model(64, 2, 8), 3, &[(0..2, 0..8), (0..2, 0..8)]);
    everywhere(
        model(64, 2, 8),
        3,
        &[(0..2, 0..6), (0..2, 2..8), (0..1, 0..8), (1..2, 0..3)],
    );
}

#[test]
fn rows_wider_than_a_frame_of_the_smallest_server() {
    let model = model(8192, 1, 1);
    let oracle = Oracle::whole(model);
    let mut options = crate::oracle::options(&oracle);
    options.limits.frame_bytes = 3 * 8192 * 4;
    let server = Running::start(Arc::new(Oracle::whole(model)), options, &tcp());
    assert_eq!(server.server.max_rows(), 3);
    let servers = [server];
    let remote = connect(&servers, model);
    conforms(&remote, &oracle, model, 1);
}

#[test]
fn the_suite_holds_in_this_process_too() {
    let model = model(64, 2, 8);
    conforms(&Oracle::whole(model), &Oracle::whole(model), model, 3);
}

#[test]
fn many_callers_at_once_get_their_own_rows() {
    let model = model(256, 2, 4);
    let servers = split(model, &[(0..2, 0..2), (0..2, 2..4), (0..2, 0..4)], |_| {
        tcp()
    });
    let remote = connect(&servers, model);
    let oracle = Oracle::whole(model);
    thread::scope(|scope| {
        for caller in 0..12 {
            let (remote, oracle) = (&remote, &oracle);
            scope.spawn(move || {
                for turn in 0..60 {
                    let n_rows = 1 + (caller + turn) % 9;
                    let rows = rows(n_rows, model.hidden, (caller * 1000 + turn) as u64);
                    let visits = visits(n_rows, 2, model.n_experts);
                    let layer = (turn % 2) as u32;
                    let got = ask(remote, layer, &rows, &visits, model.hidden).expect("an answer");
                    let wanted =
                        ask(oracle, layer, &rows, &visits, model.hidden).expect("an answer");
                    assert_eq!(bits(&got), bits(&wanted), "caller {caller}, turn {turn}");
                }
            });
        }
    });
}

#[test]
fn halves_on_the_wire_are_rounded_once_each_way() {
    let model = model(128, 1, 2);
    let server = Running::of(Oracle::whole(model), &tcp());
    let rows = rows(4, model.hidden, 5);
    let visits = visits(4, 2, 2);
    let through = |row_type: RowType, rows: &[f32]| -> Vec<f32> {
        rows.iter()
            .map(|value| match row_type {
                RowType::F32 => *value,
                RowType::F16 => half::f16::from_f32(*value).to_f32(),
                RowType::Bf16 => half::bf16::from_f32(*value).to_f32(),
            })
            .collect()
    };
    for wire in [RowType::F32, RowType::F16, RowType::Bf16] {
        let options = RemoteOptions {
            wire,
            ..RemoteOptions::new(model)
        };
        let remote =
            Remote::connect(std::slice::from_ref(&server.address), options).expect("a server");
        let got = ask(&remote, 0, &rows, &visits, model.hidden).expect("an answer");
        let there = through(wire, &rows);
        let computed =
            ask(&Oracle::whole(model), 0, &there, &visits, model.hidden).expect("an answer");
        assert_eq!(bits(&got), bits(&through(wire, &computed)), "{wire}");
    }
    let options = RemoteOptions {
        wire: RowType::F16,
        ..RemoteOptions::new(model)
    };
    let remote = Remote::connect(std::slice::from_ref(&server.address), options).expect("a server");
    let one = [Visit { row: 0, expert: 0 }];
    let large = vec![1e5; 128];
    let here = ask(&remote, 0, &large, &one, 128).expect_err("the row does not fit");
    assert!(here.to_string().contains("does not fit f16"), "{here}");
    // 65504 fits f16 and what the layer makes of it does not.
    let there =
        ask(&remote, 0, &vec![65504.0; 128], &one, 128).expect_err("the result does not fit");
    assert!(there.to_string().contains("does not fit f16"), "{there}");
    assert!(remote.stats().peers[0].is_up);
}
