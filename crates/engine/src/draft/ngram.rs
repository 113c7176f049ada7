//! Guesses from the text itself: if its last tokens occurred before, what came after them then may come again
//! (Saxena 2023, "Prompt lookup decoding").
//!
//! Invariant: a function of the tokens alone. Left out: texts of others.

/// Tokens that have to be the same at least.
const MATCH_MIN: usize = 2;
/// More in common make a guess no better.
pub(crate) const MATCH_MAX: usize = 8;
/// How far back is looked; a look takes time in proportion.
const WINDOW: usize = 16 << 10;

/// What came after the longest end of `tokens` that occurred before, the latest such place, and how many tokens were the
/// same there. Looks at each token of the window once, and back from each that is the last one.
pub(crate) fn repeated(tokens: &[u32]) -> Option<(&[u32], usize)> {
    let window = &tokens[tokens.len().saturating_sub(WINDOW)..];
    let (last, before) = window.split_last()?;
    let (mut best, mut place) = (MATCH_MIN - 1, None);
    for end in (1..=before.len()).rev() {
        if before[end - 1] != *last {
            continue;
        }
        let same = window[..end].iter().rev().zip(window.iter().rev());
        let n = same.take(MATCH_MAX).take_while(|(a, b)| a == b).count();
        if n > best {
            (best, place) = (n, Some(end));
            if n == MATCH_MAX {
                break;
            }
        }
    }
    place.map(|end| (&window[end..], best))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_then_the_latest_place_is_taken() {
        assert_eq!(repeated(&[]), None);
        assert_eq!(repeated(&[7]), None);
        assert_eq!(repeated(&[1, 2, 3, 2]), None, "one token is too little");
        assert_eq!(repeated(&[1, 2, 3, 1, 2]), Some((&[3, 1, 2][..], 2)));
        let text = [1, 2, 3, 9, 2, 3, 8, 2, 3];
        assert_eq!(repeated(&text), Some((&[8, 2, 3][..], 2)));
        let text = [1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3];
        assert_eq!(repeated(&text).unwrap().1, 3);
        assert_eq!(repeated(&text).unwrap().0[0], 9);
        assert_eq!(
            repeated(&[5; 20]),
            Some((&[5][..], MATCH_MAX)),
            "a text that repeats one token"
        );
    }

    #[test]
    fn it_looks_no_further_than_its_window() {
        let mut text = vec![1, 2, 3];
        text.extend((0..WINDOW as u32).map(|i| 10 + i));
        text.extend([1, 2]);
        assert_eq!(repeated(&text), None);
    }
}
