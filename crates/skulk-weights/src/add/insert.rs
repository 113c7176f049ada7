//! Puts an entry at the end of a manifest's list of models, as text, so that comments and habits stay.
//!
//! Invariant: every line that was there is there afterwards, in its order. Left out: whether the result is valid.

use crate::yaml::{self, Value};

/// `text` with `entry` (lines of a block mapping, unindented, the first beginning with `- `) as its last model; `None`
/// where the list is not one that text can be added to, such as `models: [{...}]`.
pub(super) fn insert(text: &str, entry: &str) -> Option<String> {
    let node = yaml::parse(text).ok()?;
    let top = match &node.value {
        Value::Null => return Some(format!("{}models:\n{entry}", ended(text))),
        Value::Mapping(top) => top,
        _ => return None,
    };
    let Some(models) = top.get("models") else {
        return Some(format!("{}\nmodels:\n{entry}", ended(text)));
    };
    let Value::List(items) = &models.value.value else {
        return None;
    };
    let first = items.first()?;
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    // The dash stands before the first key, in the column that all items have.
    let line = lines.get(first.place.line.checked_sub(1)?)?;
    let indent = line.find('-').filter(|at| line[..*at].trim().is_empty())?;
    // The list ends where the next key of the top begins, or with the text.
    let next = top
        .fields
        .iter()
        .map(|field| field.place.line)
        .filter(|line| *line > models.place.line)
        .min();
    let mut end = next.map_or(lines.len(), |line| line - 1);
    // Comments and blank lines before the next key are that key's.
    while next.is_some() && end > 0 && is_blank(lines[end - 1]) {
        end -= 1;
    }
    let before: String = lines[..end].concat();
    let after: String = lines[end..].concat();
    let has_gaps = items.len() > 1
        && lines[first.place.line..end]
            .iter()
            .any(|line| line.trim().is_empty());
    let entry: String = entry
        .lines()
        .map(|line| format!("{:indent$}{line}\n", ""))
        .collect();
    let gap = if has_gaps && !before.ends_with("\n\n") {
        "\n"
    } else {
        ""
    };
    Some(format!("{}{gap}{entry}{after}", ended(&before)))
}

fn is_blank(line: &str) -> bool {
    line.trim().is_empty() || line.trim_start().starts_with('#')
}

/// `text` with a line end at its end, if it has any text.
fn ended(text: &str) -> String {
    match text.is_empty() || text.ends_with('\n') {
        true => text.to_owned(),
        false => format!("{text}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_goes_to_the_end_of_the_list() {
        for (text, expected) in [
            ("", "models:\n- key: b\n  x: 1\n"),
            (
                "# mine\nother: 1",
                "# mine\nother: 1\n\nmodels:\n- key: b\n  x: 1\n",
            ),
            (
                "models:\n- key: a # first\n  y: 2",
                "models:\n- key: a # first\n  y: 2\n- key: b\n  x: 1\n",
            ),
            (
                "models:\n  - key: a\n",
                "models:\n  - key: a\n  - key: b\n    x: 1\n",
            ),
            (
                "models:\n- key: a\n\n- key: c\n\n# about z\nz: 1\n",
                "models:\n- key: a\n\n- key: c\n\n- key: b\n  x: 1\n\n# about z\nz: 1\n",
            ),
        ] {
            assert_eq!(
                insert(text, "- key: b\n  x: 1\n").as_deref(),
                Some(expected),
                "{text:?}"
            );
        }
        for text in [
            "models: [{key: a}]\n",
            "models: 1\n",
            "- a\n",
            "models: [\n",
        ] {
            assert_eq!(insert(text, "- key: b\n"), None, "{text:?}");
        }
    }
}
