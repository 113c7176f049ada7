//! The machines of a plan: a YAML file of what they are, in the units people buy them by.
//!
//! Invariant: every number that was read is finite, positive and within what exists, so that the formula divides by none
//! that is zero. The file is drawn in `docs/plan.md`.

use serde::Deserialize;

/// A file of nodes is never this long.
const FILE_BYTES_MAX: usize = 1 << 20;
const NODES_MAX: usize = 4096;

/// The machines.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nodes {
    /// How the feed-forward weights are divided.
    #[serde(default)]
    pub split: Split,
    /// Each of them.
    pub nodes: Vec<Node>,
}

/// How the feed-forward weights are divided among weight servers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Each holds some layers, and works while the others wait.
    #[default]
    Layers,
    /// Each holds some experts of every layer, and all work at once.
    Experts,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// For people.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Memory that weights and cache may take.
    #[serde(rename = "memory")]
    pub memory_bytes: Bytes,
    /// What it reads from memory, GB/s.
    #[serde(rename = "bandwidth")]
    pub bandwidth_gb_s: f64,
    /// Holds weights and cache instead of the memory above, where they fit.
    #[serde(default)]
    pub gpu: Option<Gpu>,
    /// What it costs, in any currency.
    #[serde(default)]
    pub price_per_hour: f64,
    /// The way from the attention node to this one; a weight server needs it.
    #[serde(default)]
    pub link: Option<Link>,
}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Attention, the cache, the API; feed-forward too when no machine is there for it.
    Attention,
    /// Feed-forward weights.
    Ffn,
}

/// A GPU.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Its memory.
    #[serde(rename = "memory")]
    pub memory_bytes: Bytes,
    /// What it reads from that, GB/s.
    #[serde(rename = "bandwidth")]
    pub bandwidth_gb_s: f64,
}

/// A network.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// An empty question and its answer, microseconds, with what both ends spend on it.
    pub round_trip_us: f64,
    /// Gbit/s.
    #[serde(rename = "bandwidth")]
    pub bandwidth_gbit_s: f64,
}

/// A size: a number of bytes, or text such as `24 GB` or `16GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Bytes(pub u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

impl TryFrom<Written> for Bytes {
    type Error = String;

    fn try_from(written: Written) -> Result<Bytes, String> {
        match written {
            Written::Number(bytes) => Ok(Bytes(bytes)),
            Written::Text(text) => text.parse(),
        }
    }
}

impl std::str::FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Bytes, String> {
        let no = || format!("{text:?} is no size; write it like 24GB, 16GiB or 1000000");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit: u64 = match &text[digits.len()..] {
            "" | "B" => 1,
            "kB" | "KB" | "K" => 1000,
            "MB" | "M" => 1_000_000,
            "GB" | "G" => 1_000_000_000,
            "TB" | "T" => 1_000_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => return Err(no()),
        };
        let number: f64 = digits.trim().parse().map_err(|_| no())?;
        let bytes = number * unit as f64;
        if !(0.0..=1e18).contains(&bytes) {
            return Err(no());
        }
        Ok(Bytes(bytes as u64))
    }
}

impl Nodes {
    /// Reads a file.
    ///
    /// # Errors
    /// A sentence about what is wrong, and where.
    pub fn parse(text: &str) -> Result<Nodes, String> {
        if text.len() > FILE_BYTES_MAX {
            return Err(format!(
                "it has {} bytes; at most {FILE_BYTES_MAX} are read",
                text.len()
            ));
        }
        let nodes: Nodes = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        nodes.check()?;
        Ok(nodes)
    }

    /// The machine that runs attention.
    pub fn attention(&self) -> Option<&Node> {
        self.nodes.iter().find(|node| node.role == Role::Attention)
    }

    /// The weight servers.
    pub fn servers(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.role == Role::Ffn)
    }

    fn check(&self) -> Result<(), String> {
        if self.nodes.len() > NODES_MAX {
            return Err(format!(
                "{} nodes; at most {NODES_MAX} are planned",
                self.nodes.len()
            ));
        }
        let n_attention = self
            .nodes
            .iter()
            .filter(|node| node.role == Role::Attention)
            .count();
        if n_attention != 1 {
            return Err(format!(
                "{n_attention} nodes have the role attention; one has to, and each further one is a plan of its own"
            ));
        }
        for (i, node) in self.nodes.iter().enumerate() {
            let name = &node.name;
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':');
            if name.is_empty() || name.len() > 100 || !name.chars().all(plain) {
                return Err(format!("the name of node {} is no plain name", i + 1));
            }
            if self.nodes[..i].iter().any(|other| other.name == *name) {
                return Err(format!("two nodes are called {name}"));
            }
            let above_0 = |what: &str, value: f64| match value {
                v if v.is_finite() && v > 0.0 && v < 1e9 => Ok(()),
                v => Err(format!("node {name}: {what} is {v}; it has to be above 0")),
            };
            above_0("bandwidth", node.bandwidth_gb_s)?;
            if let Some(gpu) = node.gpu {
                above_0("the GPU's bandwidth", gpu.bandwidth_gb_s)?;
            }
            if !(0.0..1e9).contains(&node.price_per_hour) {
                return Err(format!(
                    "node {name}: price_per_hour is {}",
                    node.price_per_hour
                ));
            }
            match node.link {
                Some(link) => {
                    above_0("the link's round_trip_us", link.round_trip_us)?;
                    above_0("the link's bandwidth", link.bandwidth_gbit_s)?;
                }
                None if node.role == Role::Ffn => {
                    return Err(format!(
                        "node {name} has no link; a weight server needs one"
                    ));
                }
                None => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "
nodes:
- name: desk
  role: attention
  memory: 32GB
  bandwidth: 60
  gpu: {memory: 24GiB, bandwidth: 900}
  price_per_hour: 0.5
- name: shelf
  role: ffn
  memory: 256GB
  bandwidth: 200
  link: {round_trip_us: 60, bandwidth: 10}
";

    #[test]
    fn a_file_of_nodes() {
        let nodes = Nodes::parse(TWO).expect("valid");
        let desk = nodes.attention().expect("one");
        assert_eq!(desk.gpu.expect("a GPU").memory_bytes, Bytes(24 << 30));
        assert_eq!(
            nodes.servers().next().expect("one").memory_bytes,
            Bytes(256_000_000_000)
        );
        assert_eq!(nodes.split, Split::Layers);
    }

    #[test]
    fn what_cannot_be_is_said() {
        let wrong =
            |from: &str, to: &str| Nodes::parse(&TWO.replace(from, to)).expect_err("refused");
        assert!(wrong("bandwidth: 60", "bandwidth: 0").contains("above 0"));
        assert!(wrong("bandwidth: 200", "bandwidth: .nan").contains("above 0"));
        assert!(wrong("role: ffn", "role: attention").contains("2 nodes"));
        assert!(wrong("name: shelf", "name: desk").contains("two nodes"));
        assert!(wrong("memory: 32GB", "memory: much").contains("no size"));
        assert!(wrong("  link: {round_trip_us: 60, bandwidth: 10}\n", "").contains("no link"));
        assert!(wrong("price_per_hour: 0.5", "colour: red").contains("colour"));
        assert!(Nodes::parse("").is_err());
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("7", 7),
            ("1.5kB", 1500),
            ("2 MB", 2_000_000),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "GB", "-1GB", "1e30GB", "nan", "1 stone"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }
}
