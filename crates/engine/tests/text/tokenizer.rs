//! The recorded ids of `fixtures/tokenize`, made with the `tokenizers` library by transformers' authors' own files.

use engine::Tokenizer;
use serde::Deserialize;

#[path = "../../../vindex/tests/support/goldens.rs"]
mod goldens;

use super::extracted;
use goldens::goldens;

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    ids_with_special: Vec<u32>,
    decoded: String,
}

#[test]
fn ids_and_texts_are_the_recorded_ones_in_every_family() {
    for golden in goldens() {
        let family = &golden.family;
        let (_dir, vindex) = extracted(golden.model.to_str().unwrap());
        let tokenizer = Tokenizer::of(&vindex).unwrap();
        let cases = std::fs::read_to_string(&golden.tokenize).unwrap();
        let cases: Vec<Case> = serde_json::from_str(&cases).unwrap();
        assert!(cases.len() > 5);
        let adds = cases.iter().any(|case| case.ids != case.ids_with_special);
        for case in cases {
            let encode = |add_special| tokenizer.encode(&case.text, add_special).unwrap();
            assert_eq!(encode(false), case.ids, "{family}: {:?}", case.text);
            assert_eq!(
                encode(true),
                case.ids_with_special,
                "{family}: {:?}",
                case.text
            );
            assert_eq!(tokenizer.decode(&case.ids, false), case.decoded, "{family}");
        }
        assert_eq!(tokenizer.n_vocab(), 512);
        assert!(!tokenizer.eos().is_empty(), "{family}");
        let bos = tokenizer.bos().filter(|_| adds);
        if let Some(bos) = bos {
            assert_eq!(tokenizer.encode("a", true).unwrap()[0], bos, "{family}");
        }
    }
}

#[test]
fn the_trained_model_has_its_chat_template_and_decodes_what_it_encodes() {
    let (_dir, vindex) = extracted("models/kjv");
    let tokenizer = Tokenizer::of(&vindex).unwrap();
    assert!(tokenizer.templates()["default"].contains("messages"));
    let text = "In the beginning God created the heaven and the earth.\n";
    let ids = tokenizer.encode(text, true).unwrap();
    assert_eq!(tokenizer.decode(&ids, true), text);
    let end = tokenizer.token_id("<|endoftext|>").unwrap();
    assert!(tokenizer.is_special(end));
    assert_eq!(tokenizer.token_bytes(end), b"<|endoftext|>");
    assert_eq!(tokenizer.decode(&[end], true), "");
    assert_eq!(tokenizer.decode(&[end, u32::MAX], false), "<|endoftext|>");
}
