//! JSON objects in which order and repetition of keys matter.

use std::marker::PhantomData;
use std::path::Path;
use std::{fmt, fs};

use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};

use super::explain::{not_json, open_error};
use crate::error::{Locate, Result};

/// The members of a JSON object in file order, repeated keys kept.
pub(crate) struct Members<T>(pub(crate) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Members<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Collect<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Collect<T> {
            type Value = Members<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Members<T>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect(PhantomData))
    }
}

/// The value in a JSON file.
///
/// # Errors
/// [`ErrorKind::Io`] of the `operation`, [`ErrorKind::Format`] of the `format`, with the file.
pub(crate) fn read_json<T: DeserializeOwned>(
    path: &Path,
    operation: &'static str,
    format: &'static str,
) -> Result<T> {
    let text = fs::read_to_string(path).map_err(|e| open_error(operation, path, e));
    let parse = |text: String| {
        serde_json::from_str(&text).map_err(|e| not_json(format, text.as_bytes(), &e))
    };
    text.and_then(parse).in_file(path)
}
