//! Where values stand in the text of a `config.json`, and what new ones look like there.

use std::ops::Range;

use serde_json::value::RawValue;

use crate::error::{Error, Result};
use crate::families::WITHIN;
use crate::tensor_file::Members;

/// The span of a member of the object that `text` is, or of the language model in it, with the
/// comma that goes with it; none where the value is `null`.
pub(crate) fn member(text: &str, key: &str) -> Result<Option<Range<usize>>> {
    fn find(text: &str, object: &str, key: &str) -> Result<Option<(usize, usize)>> {
        let members: Members<&RawValue> =
            serde_json::from_str(object).map_err(|e| Error::malformed("config.json", e))?;
        for (name, raw) in members.0 {
            let value = raw.get();
            let start = value.as_ptr() as usize - text.as_ptr() as usize;
            if name == key && value != "null" {
                return Ok(Some((start, start + value.len())));
            }
            if WITHIN.contains(&&*name) && value.starts_with('{') {
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
