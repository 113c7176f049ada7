//! Reads arrays out of an `.npz`: a zip file of `.npy` files, deflated or stored.

use std::collections::HashMap;
use std::path::Path;

/// Arrays by name, each with its shape.
pub(crate) struct Npz(HashMap<String, Vec<u8>>);

impl Npz {
    pub(crate) fn open(path: &Path) -> Npz {
        let zip = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let u16_at = |at: usize| u16::from_le_bytes(zip[at..at + 2].try_into().unwrap()) as usize;
        let u32_at = |at: usize| u32::from_le_bytes(zip[at..at + 4].try_into().unwrap()) as usize;
        // The end of the central directory, which has no comment here.
        let end = zip.len() - 22;
        assert_eq!(u32_at(end), 0x0605_4b50, "an end of central directory");
        let mut entries = HashMap::new();
        let mut at = u32_at(end + 16);
        for _ in 0..u16_at(end + 10) {
            assert_eq!(u32_at(at), 0x0201_4b50, "an entry of the central directory");
            let (method, packed_len, local) = (u16_at(at + 10), u32_at(at + 20), u32_at(at + 42));
            let name_len = u16_at(at + 28);
            let name = String::from_utf8(zip[at + 46..at + 46 + name_len].to_vec()).unwrap();
            let data = local + 30 + u16_at(local + 26) + u16_at(local + 28);
            let packed = &zip[data..data + packed_len];
            let npy = match method {
                0 => packed.to_vec(),
                8 => miniz_oxide::inflate::decompress_to_vec(packed).unwrap(),
                other => panic!("{name} is packed by method {other}"),
            };
            entries.insert(name.trim_end_matches(".npy").to_owned(), npy);
            at += 46 + name_len + u16_at(at + 30) + u16_at(at + 32);
        }
        Npz(entries)
    }

    /// The values of an array of 32-bit floats.
    pub(crate) fn f32s(&self, name: &str) -> Vec<f32> {
        let values = self.values(name, "<f4");
        values
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    }

    /// The values of an array of tokens, stored as 64-bit integers.
    pub(crate) fn tokens(&self, name: &str) -> Vec<u32> {
        let values = self.values(name, "<i8");
        values
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b) as u32)
            .collect()
    }

    fn values(&self, name: &str, descr: &str) -> &[u8] {
        let npy = self
            .0
            .get(name)
            .unwrap_or_else(|| panic!("no array {name}"));
        assert_eq!(&npy[..8], b"\x93NUMPY\x01\x00");
        let header_len = u16::from_le_bytes([npy[8], npy[9]]) as usize;
        let header = std::str::from_utf8(&npy[10..10 + header_len]).unwrap();
        assert!(
            header.contains(&format!("'descr': '{descr}'")),
            "{name}: {header}"
        );
        assert!(
            header.contains("'fortran_order': False"),
            "{name}: {header}"
        );
        &npy[10 + header_len..]
    }
}
