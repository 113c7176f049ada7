//! Texts that end a generation, wherever the tokens divide them.
//!
//! Invariant: what comes out does not depend on how the text came in. It ends before the first stop text that is
//! complete (of several that end at the same place, the longest), and nothing that may be the beginning of one is told
//! before it is certain that it is not.

/// Looks for stop texts in a text that comes in pieces.
#[derive(Clone, Debug)]
pub struct Stops {
    stops: Vec<String>,
    /// The end of the text so far, which is the beginning of a stop text; shorter than the longest of them.
    held: String,
}

/// What is certain after a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Text to tell.
    pub text: String,
    /// A stop text was found; the text ends here and the rest of the piece is dropped.
    pub stopped: bool,
}

impl Stops {
    /// For these texts; empty ones stop nothing.
    pub fn new(stops: &[String]) -> Stops {
        Stops {
            stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(),
            held: String::new(),
        }
    }

    /// Goes on with `piece`. Takes time in the product of the piece's length and the stop texts' together.
    pub fn push(&mut self, piece: &str) -> Passed {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        if let Some(start) = self.first_match(&text) {
            text.truncate(start);
            return Passed {
                text,
                stopped: true,
            };
        }
        let n_held = self.stops.iter().map(|stop| n_begun(&text, stop)).max();
        self.held = text.split_off(text.len() - n_held.unwrap_or(0));
        Passed {
            text,
            stopped: false,
        }
    }

    /// What was held back, when there is no more text.
    pub fn finish(self) -> String {
        self.held
    }

    /// Where the match that ends first begins.
    fn first_match(&self, text: &str) -> Option<usize> {
        let found = self.stops.iter().filter_map(|stop| {
            let start = text.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        found.min().map(|(_, start)| start)
    }
}

/// Length of the longest end of `text` that is a beginning of `stop`, and not all of it.
fn n_begun(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    (1..=longest)
        .rev()
        .find(|&n| stop.starts_with(&text[text.len() - n..]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn told(stops: &[&str], pieces: &[&str]) -> Vec<String> {
        let stops: Vec<String> = stops.iter().map(|&s| s.to_owned()).collect();
        let mut stops = Stops::new(&stops);
        let mut told = Vec::new();
        for piece in pieces {
            let passed = stops.push(piece);
            told.push(passed.text);
            if passed.stopped {
                told.push("STOP".to_owned());
                return told;
            }
        }
        told.push(stops.finish());
        told
    }

    #[test]
    fn a_stop_text_across_pieces_is_held_and_found() {
        assert_eq!(
            told(&["\n\nEnd"], &["a\n", "\nE", "nd of"]),
            ["a", "", "", "STOP"]
        );
        assert_eq!(
            told(&["\n\nEnd"], &["a\n", "\nE", "r"]),
            ["a", "", "\n\nEr", ""]
        );
        assert_eq!(told(&["xyz"], &["xy"]), ["", "xy"]);
        assert_eq!(told(&["", "b"], &["abc"]), ["a", "STOP"]);
        assert_eq!(told(&["aab"], &["aaab"]), ["a", "STOP"]);
        assert_eq!(told(&["ü"], &["für"]), ["f", "STOP"]);
    }

    #[test]
    fn of_several_the_one_that_is_complete_first_wins_and_then_the_longest() {
        assert_eq!(told(&["abcd", "c"], &["abcd"]), ["ab", "STOP"]);
        assert_eq!(told(&["c", "bc"], &["abc"]), ["a", "STOP"]);
    }

    /// The definition, character by character.
    fn naive(stops: &[String], text: &str) -> (String, bool) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let ended = stops
                .iter()
                .filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str()));
            if let Some(len) = ended.map(String::len).max() {
                return (text[..end - len].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn pieces_are_as_the_whole(
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,5}", 0..8),
        ) {
            let whole: String = pieces.concat();
            let expected = naive(&stops, &whole);
            let mut state = Stops::new(&stops);
            let (mut text, mut stopped, mut n_seen) = (String::new(), false, 0);
            for piece in &pieces {
                let passed = state.push(piece);
                n_seen += piece.len();
                text += &passed.text;
                // Nothing is told that the whole has not, and nothing is held that no stop text begins with.
                prop_assert!(expected.0.starts_with(&text));
                if passed.stopped {
                    stopped = true;
                    break;
                }
                let held = &whole[text.len()..n_seen];
                prop_assert!(held.is_empty() || stops.iter().any(|s| s.starts_with(held) && s != held));
            }
            if !stopped {
                text += &state.finish();
            }
            prop_assert_eq!((text, stopped), expected);
        }
    }
}
