//! Typed reads of `config.json`: a key is there and of its type, or the error names it.

use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};

/// An object of the configuration. `null` counts as absent, as it does for the reference classes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keys<'a> {
    object: &'a Value,
    /// Objects within, whose keys count as this one's where it has none of that name.
    within: &'a [&'a str],
    path: &'a str,
}

impl<'a> Keys<'a> {
    /// The top of a configuration.
    pub(crate) fn root(object: &'a Value) -> Self {
        Self { object, within: &[], path: "" }
    }

    /// The keys of the model, or of objects `within` its configuration.
    pub(crate) fn of_model(object: &'a Value, within: &'a [&'a str]) -> Self {
        Self { object, within, path: "" }
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        let inner = self.within.iter().filter_map(|name| self.object.get(name)?.get(key));
        self.object.get(key).into_iter().chain(inner).find(|value| !value.is_null())
    }

    /// The value of a key, `null` too; in an object within rather than at the top.
    pub(crate) fn raw(&self, key: &str) -> Option<&'a Value> {
        let inner = self.within.iter().filter_map(|name| self.object.get(name)?.get(key));
        inner.chain(self.object.get(key)).next()
    }

    /// The object under `key`, if there is one.
    pub(crate) fn inner(&self, key: &'a str) -> Result<Option<Keys<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(object) if object.is_object() => Ok(Some(Keys { object, within: &[], path: key })),
            Some(other) => Err(self.wrong(key, "an object", other)),
        }
    }

    /// The error of a key whose value is not what it should be.
    pub(crate) fn wrong(&self, key: &str, expected: &str, found: impl std::fmt::Display) -> Error {
        let key = if self.path.is_empty() { key.into() } else { format!("{}.{key}", self.path) };
        ErrorKind::Config { key, expected: expected.into(), found: found.to_string() }.into()
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, expected, value))
    }

    fn required<T>(&self, key: &str, expected: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.wrong(key, expected, "nothing"))
    }

    /// A count that may be 0.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>> {
        let convert = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        self.read(key, "a whole number", convert)
    }

    /// A size: a positive whole number.
    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        let expected = "a positive whole number";
        self.required(key, expected, self.optional_size(key)?)
    }

    /// A size that may be absent.
    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        match self.count(key)? {
            Some(0) => Err(self.wrong(key, "a positive whole number", 0)),
            size => Ok(size),
        }
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a finite number", |v| v.as_f64().filter(|x| x.is_finite()))
    }

    /// A finite number that may not be absent.
    pub(crate) fn need_number(&self, key: &str) -> Result<f64> {
        self.required(key, "a finite number", self.number(key)?)
    }

    /// `true` or `false`.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.read(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a string", Value::as_str)
    }

    /// A list of one string for each layer.
    pub(crate) fn per_layer(&self, key: &str, layers: usize) -> Result<Option<Vec<&'a str>>> {
        let names = |v: &'a Value| -> Option<Vec<&str>> {
            v.as_array()?.iter().map(Value::as_str).collect()
        };
        let list = |v: &'a Value| names(v).filter(|list| list.len() == layers);
        self.read(key, "one name per layer", list)
    }

    /// A whole number or a list of them, as `eos_token_id` is written.
    pub(crate) fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let token = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let convert = |v: &'a Value| match v.as_array() {
            Some(list) => list.iter().map(token).collect(),
            None => token(v).map(|t| vec![t]),
        };
        Ok(self.read(key, "a token id or a list of them", convert)?.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errors_name_key_expectation_and_find() {
        let config = json!({"a": "x", "b": null, "c": 0, "r": {"factor": [1]}, "eos": [1, 2]});
        let keys = Keys::root(&config);
        let message = |e: Error| e.to_string();
        assert_eq!(
            message(keys.size("a").unwrap_err()),
            "config key `a`: expected a whole number, found \"x\""
        );
        assert!(message(keys.size("b").unwrap_err()).contains("found nothing"));
        assert!(message(keys.size("c").unwrap_err()).contains("found 0"));
        let inner = keys.inner("r").unwrap().unwrap();
        assert!(message(inner.number("factor").unwrap_err()).contains("`r.factor`"));
        assert_eq!(keys.tokens("eos").unwrap(), [1, 2]);
    }
}
