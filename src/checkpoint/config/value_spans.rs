//! Where values stand in the text of a `config.json`, and what new ones look like there.

use std::borrow::Cow;
use std::ops::Range;

use serde_json::value::RawValue;

use crate::error::{Error, Result};
use crate::tensor_file::Members;

/// The span of a member of the object that `text` is, or of the language model in it, with the
/// comma that goes with it; none where the value is `null`.
pub(crate) fn member(text: &str, key: &str) -> Result<Option<Range<usize>>> {
    let text = &*strict(text);
    fn find(text: &str, object: &str, key: &str) -> Result<Option<(usize, usize)>> {
        let members: Members<&RawValue> =
            serde_json::from_str(object).map_err(|e| Error::malformed("config.json", e))?;
        for (name, raw) in members.0 {
            let value = raw.get();
            let start = value.as_ptr() as usize - text.as_ptr() as usize;
            if name == key && value != "null" {
                return Ok(Some((start, start + value.len())));
            }
            if super::document::is_nested(&name) && value.starts_with('{') {
                let found = find(text, value, key)?;
                if found.is_some() {
                    return Ok(found);
                }
            }
        }
        Ok(None)
    }
    let Some((value, end)) = find(text, text, key)? else { return Ok(None) };
    // Behind the value's colon stands the key, whose quotes are the only ones in its spelling.
    let before = text[..value].trim_end().trim_end_matches(':').trim_end();
    let name = before.strip_suffix('"').and_then(|b| b.rfind('"')).unwrap_or(value);
    let comma = text[..name].trim_end();
    if comma.ends_with(',') {
        return Ok(Some(comma.len() - 1..end));
    }
    let after = text[end..].trim_start();
    let next = after.strip_prefix(',').map_or(end, |rest| text.len() - rest.trim_start().len());
    Ok(Some(name..next))
}

/// The text with Python's `Infinity` and `NaN`, which JSON does not have, as strings of the same
/// length, so that places in it are places in the original.
pub(super) fn strict(text: &str) -> Cow<'_, str> {
    const PYTHON: [(&str, &str); 3] =
        [("-Infinity", "\"-inf\"   "), ("Infinity", "\"inf\"   "), ("NaN", "\"\" ")];
    if !PYTHON.iter().any(|(word, _)| text.contains(word)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut quoted) = (text, false);
    while let Some(c) = rest.chars().next() {
        let word = PYTHON.iter().find(|(word, _)| !quoted && rest.starts_with(word));
        let taken = match (word, c) {
            (Some((word, new)), _) => {
                out.push_str(new);
                rest = &rest[word.len()..];
                continue;
            }
            // An escape never ends a string.
            (None, '\\') if quoted => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, '"') => {
                quoted = !quoted;
                1
            }
            (None, c) => c.len_utf8(),
        };
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    Cow::Owned(out)
}

/// The text of a new value; in a list, for each of its numbers.
pub(crate) fn like(value: &str, new: &str) -> String {
    let number = |c: char| c.is_ascii_digit();
    if !value.starts_with('[') || !new.chars().all(number) {
        return new.to_owned();
    }
    let (mut text, mut rest) = (String::new(), value);
    while let Some(at) = rest.find(number) {
        text.push_str(&rest[..at]);
        text.push_str(new);
        rest = rest[at..].trim_start_matches(number);
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_python_become_strings_of_their_length() {
        let text = r#"{"a": [0.0, Infinity], "b\"NaN": NaN, "c": -Infinity, "NaN": 1}"#;
        let strict = strict(text);
        assert_eq!(strict.len(), text.len());
        let value: serde_json::Value = serde_json::from_str(&strict).unwrap();
        assert_eq!((&value["a"][1], &value["c"]), (&"inf".into(), &"-inf".into()));
        assert_eq!((&value["b\"NaN"], &value["NaN"]), (&"".into(), &1.into()));
    }
}
