//! What a failing weight server does to a generation, with real processes: the first lines of `docs/failure.md`'s table,
//! each repeated many times with the failure at another place in the middle of a generation.
//!
//! Invariant: a round counts as right only when the tokens are those of an unsplit run, or, where nobody could answer,
//! when there is one error within the deadline; and a generation beside it that uses a healthy server has its tokens.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::build::{self, Done};
use crate::fleet::{Ended, Fleet, Node, Server};
use crate::proxy::{self, Cable, Network};

/// Tokens of a generation.
const N_TOKENS: usize = 400;
/// And of one over a slow link, whose every layer takes a round trip.
const N_TOKENS_SLOW: usize = 40;
/// Of a layer, where the tokens come.
const DEADLINE: Duration = Duration::from_secs(10);
/// Of a layer, where every round lasts it out.
const DEADLINE_IN_VAIN: Duration = Duration::from_secs(1);
/// An error that comes later after the fault did not come within the deadline, however busy this machine is.
const LATE: Duration = Duration::from_secs(10);
/// A fault so early in a generation reaches it.
const PLACE_MIN: f64 = 0.05;
/// A generation that takes longer hangs.
const HUNG: Duration = Duration::from_secs(40);

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
    /// The proxy changes every byte.
    Garble,
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

const CASES: [Case; 16] = [
    case("`kill -9`, replica", Fault::Kill, true, true),
    case("`kill -9`, alone", Fault::Kill, false, false),
    case("`SIGSTOP`, replica", Fault::Stop, true, true),
    case("`SIGSTOP`, alone", Fault::Stop, false, false),
    case(
        "cut cable (`ip netns`), replica",
        Fault::Carrier,
        true,
        true,
    ),
    case(
        "cut cable (`ip netns`), alone",
        Fault::Carrier,
        false,
        false,
    ),
    case("stalling proxy, replica", Fault::Pull, true, true),
    case("stalling proxy, alone", Fault::Pull, false, false),
    case("garbage, replica", Fault::Garble, true, true),
    case("garbage, alone", Fault::Garble, false, false),
    case(
        "restart with another vindex, replica",
        Fault::OtherVindex,
        true,
        true,
    ),
    case(
        "restart with another vindex, alone",
        Fault::OtherVindex,
        false,
        false,
    ),
    case("restart, replica", Fault::Restart, true, true),
    case("restart, alone", Fault::Restart, false, true),
    case(
        "slow link (5 ms, bursts of 10 ms), replica",
        Fault::Slow,
        true,
        true,
    ),
    case(
        "slow link (5 ms, bursts of 10 ms), alone",
        Fault::Slow,
        false,
        true,
    ),
];

/// Runs every case whose name has `only` in it `rounds` times. Prints the table, with the seconds from the fault to the
/// end of the generation; an error when a round was wrong.
pub(crate) fn run(rounds: usize, only: &str, larql: Option<PathBuf>) -> Done {
    let fleet = fleet(larql)?;
    let other = extracted(&fleet.larql, "other", "q8_0")?;
    let unsplit = fleet.generate(N_TOKENS, &[], DEADLINE)?.wait(HUNG)?;
    if !matches!(&unsplit, Ended::Tokens(tokens) if tokens.len() == N_TOKENS) {
        return Err(format!("an unsplit run ended with {unsplit:?}"));
    }
    let replica = fleet.serve(&fleet.vindex, "127.0.0.1:0", None)?;
    std::thread::spawn(watch_stillness);
    println!(
        "| the server's … | rounds | same tokens | one error | wrong | seconds, median | longest |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|");
    let mut n_wrong = 0;
    let cases = CASES.iter().enumerate();
    for (i, case) in cases.filter(|(_, case)| case.name.contains(only)) {
        if case.fault == Fault::Carrier && !Cage::is_possible() {
            println!("| {} | 0: needs root and `ip netns` | | | | | |", case.name);
            continue;
        }
        let mut seconds = Vec::new();
        let (mut same, mut errors, mut wrong) = (0, 0, Vec::new());
        for round in 0..rounds {
            // Places spread over the generation, others in each case.
            let mut place = 0.15 + 0.7 * ((round * 7 + i * 3) as f64 * 0.618_034).fract();
            // Replicas share the work as it comes; when this one had less than last time, the place was never reached.
            let (ended, spent) = loop {
                STOOD_STILL_MS.store(0, Ordering::Relaxed);
                let done = case.round(&fleet, &replica, &other, &unsplit, place)?;
                let still = stood_still_ms();
                match done {
                    // Nobody's clock says anything about such a round.
                    _ if still > STILL_MS_MAX => {
                        eprintln!("  once more: all of it stood still for {still} ms");
                    }
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
            "| {} | {rounds} | {same} | {errors} | {n} | {median:.2} | {longest:.2} |",
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

/// The longest time in which this process did not get to run, in milliseconds: others' work on this machine, or
/// somebody who stops everything for a while.
static STOOD_STILL_MS: AtomicU64 = AtomicU64::new(0);
static N_TICKS: AtomicU64 = AtomicU64::new(0);
const STILL_MS_MAX: u64 = 1000;

fn watch_stillness() {
    loop {
        let before = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
        STOOD_STILL_MS.fetch_max(before.elapsed().as_millis() as u64, Ordering::Relaxed);
        N_TICKS.fetch_add(1, Ordering::Release);
    }
}

/// Since it was set to zero, up to here: the tick that is under way has to end, because it may be the long one.
fn stood_still_ms() -> u64 {
    let n_ticks = N_TICKS.load(Ordering::Acquire);
    while N_TICKS.load(Ordering::Acquire) == n_ticks {
        std::thread::sleep(Duration::from_millis(1));
    }
    STOOD_STILL_MS.load(Ordering::Relaxed)
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
        replica: &Server,
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
        let n_bytes = (bytes(fleet, unsplit, servers.len())? as f64 * place) as u64;
        let beside = fleet.generate(N_TOKENS, &[&replica.address], DEADLINE)?;
        let n_tokens = match self.fault {
            Fault::Slow => N_TOKENS_SLOW,
            _ => N_TOKENS,
        };
        let deadline = match self.survives {
            true => DEADLINE,
            false => DEADLINE_IN_VAIN,
        };
        let mut node = fleet.generate(n_tokens, &servers, deadline)?;
        let mut taken = None;
        let mut struck = Instant::now();
        if self.fault != Fault::Slow {
            if !wait_for(&cable, n_bytes, &mut node)? {
                return Ok(None);
            }
            struck = Instant::now();
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
                Fault::Stop => server.signal(Signal::STOP)?,
                Fault::Pull => cable.pull(),
                Fault::Garble => cable.garble(),
                Fault::Carrier => cage.as_ref().map_or(Ok(()), Cage::cut)?,
                Fault::Slow => {}
            }
        }
        let ended = node.wait(HUNG)?;
        let spent = struck.elapsed();
        let beside = beside.wait(HUNG)?;
        cable.plug();
        if self.fault == Fault::Stop {
            server.signal(Signal::CONT)?;
        }
        drop::<(Option<Server>, Option<Cage>)>((taken, cage));
        let outcome = match ended {
            _ if beside != *unsplit => {
                Outcome::Wrong(format!("the generation beside it ended with {beside:?}"))
            }
            ended if ended == unsplit.first(n_tokens) => match self.survives {
                true => Outcome::Same,
                // It ended in the moment of the fault.
                false if place > PLACE_MIN => return Ok(None),
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
                    1 if spent <= LATE => Outcome::Error,
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
    let ended = fleet.generate(N_TOKENS, &addresses, DEADLINE)?.wait(HUNG)?;
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
