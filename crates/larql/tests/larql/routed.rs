//! Every family with experts, held and served by ranges: what a pull of some layers and experts holds, and rows from two
//! servers that are those of one process, with whatever each token visits beside the experts that are chosen for it.

#[path = "../../../vindex/tests/support/goldens.rs"]
mod goldens;

use vindex::{Config, Vindex};

use crate::bench::Bench;
use crate::serve::{answer, local, options};
use crate::served::Served;
use engine::wire::Remote;
use goldens::{Golden, goldens};

/// The families with experts, with their numbers and a published vindex of each.
fn each_routed(check: impl Fn(&Golden, &Bench, &Config)) {
    let mut n_families = 0;
    for golden in goldens() {
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(golden.model.join("config.json")).unwrap())
                .unwrap();
        let text = config.get("text_config").unwrap_or(&config);
        let counts = ["num_experts", "num_local_experts", "n_routed_experts"];
        if !counts.iter().any(|key| text[key].is_u64()) {
            continue;
        }
        n_families += 1;
        let bench = Bench::with_vindex(&golden.model.display().to_string(), "q8_0");
        bench.ok(&[
            "publish",
            "out",
            "--repo",
            "acme/moe",
            "--slices",
            "expert-server",
        ]);
        let config = Vindex::open(&bench.path("out"))
            .unwrap()
            .index()
            .config
            .clone();
        check(&golden, &bench, &config);
    }
    assert!(n_families >= 4);
}

#[test]
fn some_layers_and_experts_are_pulled_by_range() {
    each_routed(|golden, bench, config| {
        let n = config.experts.unwrap().n;
        let last = config.n_layers - 1;
        let layers = format!("{last}..{}", config.n_layers);
        for (start, end) in [(0, n / 2), (n / 2, n)] {
            let (experts, dir) = (format!("{start}..{end}"), format!("some-{start}"));
            bench.ok(&[
                "pull",
                "acme/moe",
                "-o",
                &dir,
                "--layers",
                &layers,
                "--experts",
                &experts,
            ]);
            assert_eq!(
                bench.verified(&dir),
                bench.verified("out"),
                "{}",
                golden.family
            );
            let held = Vindex::open(&bench.path(&dir)).unwrap();
            for expert in 0..n {
                let is_mine = (start..end).contains(&expert);
                assert_eq!(
                    held.holds_expert(last, expert),
                    is_mine,
                    "{}",
                    golden.family
                );
                let name = format!("blk.{last}.ffn_down_exps.weight");
                assert_eq!(
                    held.expert(&name, expert).is_some(),
                    is_mine,
                    "{}",
                    golden.family
                );
            }
            let beside = ["_shexp", ""].map(|kind| format!("blk.{last}.ffn_up{kind}.weight"));
            let all = Vindex::open(&bench.path("out")).unwrap();
            for name in beside.iter().filter(|name| all.tensor(name).is_some()) {
                assert_eq!(
                    held.tensor(name).is_some(),
                    start == 0,
                    "{} {name}",
                    golden.family
                );
            }
        }
    });
}

#[test]
fn two_servers_of_experts_give_the_rows_of_one_process() {
    each_routed(|golden, bench, config| {
        let experts = config.experts.unwrap();
        let serve = |range: String| {
            let args = [
                "acme/moe",
                "--experts",
                &range,
                "--listen",
                "127.0.0.1:0",
                "--cache",
                "cache",
            ];
            Served::start(bench, &args, &[])
        };
        let cut = experts.n / 2;
        let servers = [
            serve(format!("0..{cut}")),
            serve(format!("{cut}..{}", experts.n)),
        ];
        let dir = bench.path("out");
        let peers = servers.each_ref().map(Served::address);
        let remote = Remote::connect(&peers, options(&dir, "")).unwrap();
        let here = local(&dir);
        let hidden = config.hidden as usize;
        for layer in 0..config.n_layers {
            let mut visits = match config.is_routed(layer) {
                true => vec![experts.n - 1, 0],
                false => vec![0],
            };
            // What each token visits beside the chosen ones has the number after theirs.
            if config.is_routed(layer) && (experts.shared.is_some() || experts.dense_branch) {
                visits.push(experts.n);
            }
            let there = answer(&remote, layer, 3, hidden, &visits);
            let expected = answer(&here, layer, 3, hidden, &visits);
            assert_eq!(there, expected, "{} layer {layer}", golden.family);
        }
    });
}
