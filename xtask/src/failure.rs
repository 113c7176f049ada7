//! What a failing weight server does to a generation, with real processes: the first lines of `docs/failure.md`'s table,
//! each repeated many times with the failure at another place in the middle of a generation.
//!
//! Invariant: a round counts as right only when the tokens are those of an unsplit run, or, where nobody could answer,
//! when there is one error within the deadline; and a generation beside it that uses a healthy server has its tokens.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::build::{self, Done};
use crate::fleet::{Ended, Fleet, Node, Server};
use crate::proxy::{self, Cable, Network};

/// Tokens of a generation.
const N_TOKENS: usize = 400;
/// And of one over a slow link, whose every layer takes a round trip.
const N_TOKENS_SLOW: usize = 40;
/// A generation that takes longer hangs: the deadline of a layer, and time to generate.
const HUNG: Duration = Duration::from_secs(40);
/// The deadline of a layer, and time to start and to generate.
const WITHIN: Duration = Duration::from_secs(20);

/// What happens to the server.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// `kill -9`.
    Kill,
    /// `kill -9`, and another process takes its place at once.
    Restart,
    /// `kill -9`, and a server of another vindex takes its place.
    OtherVindex,
    /// `SIGSTOP`.
    Stop,
    /// The proxy lets nothing through.
    Pull,
    /// The network interface loses its carrier.
    Carrier,
    /// 5 ms each way, in bursts of 10 ms.
    Slow,
}

/// A line of the table.
struct Case {
    name: &'static str,
    fault: Fault,
    has_replica: bool,
    /// Whether the tokens come in spite of it.
    survives: bool,
}

const fn case(name: &'static str, fault: Fault, has_replica: bool, survives: bool) -> Case {
    Case {
        name,
        fault,
        has_replica,
        survives,
    }
}

const CASES: [Case; 12] = [
    case("kill -9, replica", Fault::Kill, true, true),
    case("SIGSTOP, replica", Fault::Stop, true, true),
    case("pulled cable (proxy), replica", Fault::Pull, true, true),
    case(
        "pulled cable (ip netns), replica",
        Fault::Carrier,
        true,
        true,
    ),
    case("other vindex, replica", Fault::OtherVindex, true, true),
    case("slow link, 5 ms, bursts", Fault::Slow, false, true),
    case("restart, alone", Fault::Restart, false, true),
    case("kill -9, alone", Fault::Kill, false, false),
    case("SIGSTOP, alone", Fault::Stop, false, false),
    case("pulled cable (proxy), alone", Fault::Pull, false, false),
    case(
        "pulled cable (ip netns), alone",
        Fault::Carrier,
        false,
        false,
    ),
    case("other vindex, alone", Fault::OtherVindex, false, false),
];

/// Runs every case: `rounds` times where the tokens come, a tenth as often (once at least) where each round lasts a
/// whole deadline. Prints the table; an error when a round was wrong.
pub(crate) fn run(rounds: usize, larql: Option<PathBuf>) -> Done {
    let fleet = fleet(larql)?;
    let other = extracted(&fleet.larql, "other", "q8_0")?;
    let (unsplit, _) = fleet.generate(N_TOKENS, &[])?.wait(HUNG)?;
    if !matches!(&unsplit, Ended::Tokens(tokens) if tokens.len() == N_TOKENS) {
        return Err(format!("an unsplit run ended with {unsplit:?}"));
    }
    println!("| case | rounds | same tokens | one error | seconds, median | longest | wrong |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    let mut n_wrong = 0;
    for (i, case) in CASES.iter().enumerate() {
        if case.fault == Fault::Carrier && !Cage::is_possible() {
            println!("| {} | 0: needs root and `ip netns` | | | | | |", case.name);
            continue;
        }
        let rounds = if case.survives {
            rounds
        } else {
            rounds.div_ceil(10)
        };
        let mut seconds = Vec::new();
        let (mut same, mut errors, mut wrong) = (0, 0, Vec::new());
        for round in 0..rounds {
            // Places spread over the generation, others in each case.
            let mut place = 0.15 + 0.7 * ((round * 7 + i * 3) as f64 * 0.618_034).fract();
            // Replicas share the work as it comes; when this one had less than last time, the place was never reached.
            let (ended, spent) = loop {
                match case.round(&fleet, &other, &unsplit, place)? {
                    Some(done) => break done,
                    None => place *= 0.7,
                }
            };
            seconds.push(spent.as_secs_f64());
            match ended {
                Outcome::Same => same += 1,
                Outcome::Error => errors += 1,
                Outcome::Wrong(what) => wrong.push(format!("round {round}, at {place:.2}: {what}")),
            }
        }
        seconds.sort_by(f64::total_cmp);
        let longest = seconds.last().copied().unwrap_or_default();
        let median = seconds.get(seconds.len() / 2).copied().unwrap_or_default();
        let n = wrong.len();
        println!(
            "| {} | {rounds} | {same} | {errors} | {median:.2} | {longest:.2} | {n} |",
            case.name
        );
        wrong.iter().for_each(|what| eprintln!("  wrong: {what}"));
        n_wrong += n;
    }
    if n_wrong > 0 {
        return Err(format!("{n_wrong} rounds were wrong"));
    }
    Ok(())
}

enum Outcome {
    Same,
    Error,
    Wrong(String),
}

impl Case {
    /// One generation with the fault at `place` (0 to 1) of what passes to and from the server in a whole one, and one
    /// beside it that must not notice. Nothing when the generation ended before.
    fn round(
        &self,
        fleet: &Fleet,
        other: &Path,
        unsplit: &Ended,
        place: f64,
    ) -> Done<Option<(Outcome, Duration)>> {
        let cage = match self.fault {
            Fault::Carrier => Some(Cage::new()?),
            _ => None,
        };
        let mut server = match &cage {
            Some(cage) => fleet.serve(&fleet.vindex, &cage.listen(), Some(&cage.name))?,
            None => fleet.serve(&fleet.vindex, "127.0.0.1:0", None)?,
        };
        let replica = fleet.serve(&fleet.vindex, "127.0.0.1:0", None)?;
        let network = match self.fault {
            Fault::Slow => Network {
                delay_ms: 5.0,
                burst_ms: 10.0,
                ..Network::good()
            },
            _ => Network::good(),
        };
        let (address, cable) = proxy::start("127.0.0.1:0", &server.address, network)?;
        let mut servers = vec![address.as_str()];
        if self.has_replica {
            servers.push(&replica.address);
        }
        let place = (bytes(fleet, unsplit, servers.len())? as f64 * place) as u64;
        let beside = fleet.generate(N_TOKENS, &[&replica.address])?;
        let n_tokens = match self.fault {
            Fault::Slow => N_TOKENS_SLOW,
            _ => N_TOKENS,
        };
        let mut node = fleet.generate(n_tokens, &servers)?;
        let mut taken = None;
        if self.fault != Fault::Slow {
            if !wait_for(&cable, place, &mut node)? {
                return Ok(None);
            }
            match self.fault {
                Fault::Kill => server.kill(),
                Fault::Restart => {
                    server.kill();
                    taken = Some(fleet.serve(&fleet.vindex, &server.address, None)?);
                }
                Fault::OtherVindex => {
                    server.kill();
                    taken = Some(fleet.serve(other, &server.address, None)?);
                }
                Fault::Stop => server.signal("STOP")?,
                Fault::Pull => cable.pull(),
                Fault::Carrier => cage.as_ref().map_or(Ok(()), Cage::cut)?,
                Fault::Slow => {}
            }
        }
        let (ended, spent) = node.wait(HUNG)?;
        let (beside, _) = beside.wait(HUNG)?;
        cable.plug();
        if self.fault == Fault::Stop {
            server.signal("CONT")?;
        }
        drop::<(Option<Server>, Option<Cage>)>((taken, cage));
        let outcome = match ended {
            _ if beside != *unsplit => {
                Outcome::Wrong(format!("the generation beside it ended with {beside:?}"))
            }
            ended if ended == unsplit.first(n_tokens) => match self.survives {
                true => Outcome::Same,
                false => {
                    Outcome::Wrong("all tokens came: the fault did not reach the generation".into())
                }
            },
            Ended::Error(message) if !self.survives => {
                let n_errors = message
                    .lines()
                    .filter(|line| line.starts_with("error:"))
                    .count();
                match n_errors {
                    1 if spent <= WITHIN => Outcome::Error,
                    1 => Outcome::Wrong(format!("the error came after {spent:?}")),
                    n => Outcome::Wrong(format!("{n} errors: {message}")),
                }
            }
            ended => Outcome::Wrong(format!("{ended:?}")),
        };
        Ok(Some((outcome, spent)))
    }
}

/// Bytes that pass to and from the first of `n_servers` in a whole generation.
fn bytes(fleet: &Fleet, unsplit: &Ended, n_servers: usize) -> Done<u64> {
    use std::sync::Mutex;
    static KNOWN: Mutex<[Option<u64>; 3]> = Mutex::new([None; 3]);
    if let Some(known) = KNOWN.lock().ok().and_then(|known| known[n_servers]) {
        return Ok(known);
    }
    let servers: Vec<Server> = (0..n_servers)
        .map(|_| fleet.serve(&fleet.vindex, "127.0.0.1:0", None))
        .collect::<Done<_>>()?;
    let (address, cable) = proxy::start("127.0.0.1:0", &servers[0].address, Network::good())?;
    let mut addresses = vec![address.as_str()];
    addresses.extend(servers[1..].iter().map(|server| server.address.as_str()));
    let (ended, _) = fleet.generate(N_TOKENS, &addresses)?.wait(HUNG)?;
    if ended != *unsplit {
        return Err(format!("a split run without a fault ended with {ended:?}"));
    }
    if let Ok(mut known) = KNOWN.lock() {
        known[n_servers] = Some(cable.n_passed());
    }
    Ok(cable.n_passed())
}

/// Waits until so many bytes have passed; false when the generation ended before.
fn wait_for(cable: &Cable, n_bytes: u64, node: &mut Node) -> Done<bool> {
    while cable.n_passed() < n_bytes {
        if node.has_ended()? {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(true)
}

/// A network namespace with one cable to this one, `10.213.77.1` here and `.2` there.
struct Cage {
    name: String,
}

const CAGE: &str = "skulk-xtask";
const CABLE_HERE: &str = "skulk-x0";
const CABLE_THERE: &str = "skulk-x1";

impl Cage {
    /// Whether this user may have one on this system.
    fn is_possible() -> bool {
        Cage::new().is_ok()
    }

    fn new() -> Done<Cage> {
        // What an interrupted run left.
        let _ = Command::new("ip").args(["netns", "del", CAGE]).output();
        ip(&["netns", "add", CAGE])?;
        let cage = Cage {
            name: CAGE.to_owned(),
        };
        ip(&[
            "link",
            "add",
            CABLE_HERE,
            "type",
            "veth",
            "peer",
            "name",
            CABLE_THERE,
            "netns",
            CAGE,
        ])?;
        ip(&["addr", "add", "10.213.77.1/30", "dev", CABLE_HERE])?;
        ip(&["link", "set", CABLE_HERE, "up"])?;
        ip(&[
            "-n",
            CAGE,
            "addr",
            "add",
            "10.213.77.2/30",
            "dev",
            CABLE_THERE,
        ])?;
        ip(&["-n", CAGE, "link", "set", CABLE_THERE, "up"])?;
        ip(&["-n", CAGE, "link", "set", "lo", "up"])?;
        Ok(cage)
    }

    fn listen(&self) -> String {
        "10.213.77.2:7844".to_owned()
    }

    /// Both ends lose their carrier.
    fn cut(&self) -> Done {
        ip(&["-n", CAGE, "link", "set", CABLE_THERE, "down"])
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", CAGE]);
        // It goes with its other end, a moment later.
        let _ = Command::new("ip")
            .args(["link", "del", CABLE_HERE])
            .output();
    }
}

fn ip(arguments: &[&str]) -> Done {
    build::output(Command::new("ip").args(arguments)).map(drop)
}

fn fleet(larql: Option<PathBuf>) -> Done<Fleet> {
    let larql = match larql {
        Some(larql) => larql,
        None => build::programs()?.larql,
    };
    let secret_file = build::workspace("xtask-failure")?.join("secret");
    std::fs::write(
        &secret_file,
        "a secret of the failure check, as long as one should be",
    )
    .map_err(|error| format!("cannot write {}: {error}", secret_file.display()))?;
    Ok(Fleet {
        vindex: extracted(&larql, "vindex", "q4k")?,
        larql,
        secret_file,
    })
}

/// The small trained model of the repository.
fn extracted(larql: &Path, name: &str, recipe: &str) -> Done<PathBuf> {
    let target = build::workspace("xtask-failure")?.join(name);
    let mut command = Command::new(larql);
    command
        .arg("extract")
        .arg(build::root().join("models/kjv"))
        .arg("-o")
        .arg(&target);
    command.args(["--quant", recipe, "--force"]);
    build::output(&mut command)?;
    Ok(target)
}
