//! The YAML at the top of a model card.

use serde_yaml_ng::{Mapping, Value};

const FENCE: &str = "---\n";

/// The YAML of a card, if there is any, and the text below it.
pub(super) fn split(card: &str) -> (Mapping, &str) {
    let found = card.strip_prefix(FENCE).and_then(|rest| {
        let end = rest.find("\n---\n")?;
        let front: Mapping = serde_yaml_ng::from_str(&rest[..end]).ok()?;
        Some((front, &rest[end + 1 + FENCE.len()..]))
    });
    found.unwrap_or_else(|| (Mapping::new(), card))
}

/// `kept` with what only `own` has; lists are joined.
pub(super) fn join(mut kept: Mapping, own: Mapping) -> Mapping {
    for (key, value) in own {
        match (kept.get_mut(&key), value) {
            (Some(Value::Sequence(there)), Value::Sequence(more)) => {
                for item in more {
                    if !there.contains(&item) {
                        there.push(item);
                    }
                }
            }
            (Some(_), _) => {}
            (None, value) => drop(kept.insert(key, value)),
        }
    }
    kept
}

/// The YAML and the text below it in one.
pub(super) fn write(front: &Mapping, text: &str) -> String {
    match serde_yaml_ng::to_string(front) {
        Ok(yaml) if !front.is_empty() => format!("{FENCE}{yaml}{FENCE}{text}"),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test fails by panicking.
    use super::*;

    #[test]
    fn front_matter_is_split_joined_and_written() {
        let (kept, text) = split("---\nlicense: mit\ntags:\n- a\n---\n\n# Title\n");
        assert_eq!((kept.len(), text), (2, "\n# Title\n"));
        let own = serde_yaml_ng::from_str("license: other\ntags: [a, b]\nnew: 1\n").unwrap();
        let joined = join(kept, own);
        let written = write(&joined, text);
        assert_eq!(written, "---\nlicense: mit\ntags:\n- a\n- b\nnew: 1\n---\n\n# Title\n");
        assert_eq!(split(&written), (joined, text));
        for other in ["# No front\n", "---\nnever closed", "---\n: [\n---\nx", ""] {
            assert_eq!(split(other), (Mapping::new(), other));
        }
    }
}
