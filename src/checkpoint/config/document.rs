//! `config.json`, kept as text: values are read by key and replaced in place, so that everything
//! else survives byte for byte.

use std::path::Path;

use serde_json::Value;
use serde_json::value::RawValue;

use super::value_spans::{like, member, strict};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::families::{Keys, WITHIN};
use crate::tensor_file::{Members, not_json, open_error};

/// The spellings of the number of routed experts.
pub(crate) const EXPERTS: &[&str] =
    &["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"];
/// The spellings of the number of experts per token.
pub(crate) const TOP_K: &[&str] = &[
    "num_experts_per_tok",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "experts_per_token",
];
/// The spellings of the number of multi-token-prediction layers.
pub(crate) const MTP: &[&str] =
    &["num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers"];
/// Where wrappers keep the config of their language model, or of a part that holds it in turn.
const WRAPPED: [&str; 5] =
    ["text_config", "thinker_config", "llm_config", "language_config", "llm"];

/// A model's `config.json`.
#[derive(Debug, Clone)]
pub struct Config {
    text: String,
    value: Value,
    /// See [`Config::language`].
    language: Value,
}

impl Config {
    /// Reads the file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], or [`ErrorKind::Format`] when it is not a JSON object.
    pub(in crate::checkpoint) fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| open_error("read", path, e));
        text.and_then(Self::parse).in_file(path)
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] when it is not a JSON object.
    pub fn parse(text: String) -> Result<Self> {
        let value: Value = serde_json::from_str(&strict(&text))
            .map_err(|e| not_json("config.json", text.as_bytes(), &e))?;
        if !value.is_object() {
            return Err(Error::malformed("config.json", "not an object"));
        }
        Ok(Self { language: unwrapped(&value), text, value })
    }

    /// The text, exactly as on disk.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The keys of the model, for the tables of the families.
    pub(in crate::checkpoint) fn keys(&self) -> Keys<'_> {
        Keys::of_model(&self.language, &WITHIN)
    }

    /// The config of the language model: the wrapper's keys, hidden by those of the inner object.
    pub(in crate::checkpoint) fn language(&self) -> &Value {
        &self.language
    }

    /// The value of a key of the language model: that of the innermost object that has it. `null`
    /// counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let present = |v: &&Value| !v.is_null();
        let inner = WITHIN.iter().filter_map(|object| self.language.get(object)?.get(key));
        self.language.get(key).into_iter().chain(inner).find(present)
    }

    /// A string at the top of the file; where it is absent, that of the language model.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when it is something else.
    pub(crate) fn outer_string(&self, key: &str) -> Result<Option<&str>> {
        let text = |v| Value::as_str(v).ok_or_else(|| mismatch(key, "a string", v));
        self.outer(key).map(text).transpose()
    }

    /// The value of a key at the top of the file; where it is absent, that of the language model.
    pub(crate) fn outer(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|v| !v.is_null()).or_else(|| self.get(key))
    }

    /// Whether the key stands at the top, not only in the wrapped language model.
    pub(in crate::checkpoint) fn has_top(&self, key: &str) -> bool {
        self.value.get(key).is_some_and(|v| !v.is_null())
    }

    /// A whole number.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when it is something else.
    pub fn integer(&self, key: &str) -> Result<Option<usize>> {
        let whole = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        self.typed(key, "a whole number", whole)
    }

    /// A finite number.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when it is something else.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// `true` or `false`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when it is something else.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when it is something else.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(typed) => Ok(Some(typed)),
            None => Err(mismatch(key, expected, value)),
        }
    }

    /// The number of routed experts, which every spelling present must agree on.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when absent, not a whole number, or contradictory.
    pub fn experts(&self) -> Result<usize> {
        self.alias(EXPERTS)
    }

    /// The number of experts per token, as [`Config::experts`].
    ///
    /// # Errors
    /// As [`Config::experts`].
    pub fn top_k(&self) -> Result<usize> {
        self.alias(TOP_K)
    }

    /// A whole number, or a list of one number for every layer, as HunYuan has them.
    fn count(&self, key: &str) -> Result<Option<usize>> {
        let Some(Value::Array(list)) = self.get(key) else { return self.integer(key) };
        let whole = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let first = list.first().and_then(whole);
        let same = first.filter(|_| list.iter().all(|v| whole(v) == first));
        let expected = "a whole number, the same for every layer";
        same.map(Some).ok_or_else(|| mismatch(key, expected, Value::from(list.clone())))
    }

    fn alias(&self, keys: &[&str]) -> Result<usize> {
        let mut found: Option<usize> = None;
        for key in keys {
            let Some(n) = self.count(key)? else { continue };
            if let Some(before) = found.filter(|before| *before != n) {
                return Err(mismatch(key, &format!("{before}, as its other spelling says"), n));
            }
            found = Some(n);
        }
        found.ok_or_else(|| mismatch(&keys.join(" | "), "a whole number", "nothing"))
    }

    /// The text with the value of each key replaced by JSON text: `everywhere`, that is, at the top
    /// and in the wrapped language model, or at the `top` only. Absent and `null` keys stay so.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] when the text is not an object.
    pub(in crate::checkpoint) fn edited(
        &self,
        everywhere: &[Edit],
        top: &[Edit],
    ) -> Result<String> {
        let mut spans = Vec::new();
        let text = strict(&self.text);
        spans_of(&text, &text, &[everywhere, top].concat(), everywhere, &mut spans)?;
        spans.sort_by_key(|(start, ..)| *start);
        let mut text = String::with_capacity(self.text.len() + 256);
        let mut done = 0;
        for (start, end, new) in spans {
            text.push_str(&self.text[done..start]);
            text.push_str(&new);
            done = end;
        }
        text.push_str(&self.text[done..]);
        Ok(text)
    }

    /// The same without a key, at the top and in the wrapped language model.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] when the text is not an object.
    pub(in crate::checkpoint) fn without(&self, key: &str) -> Result<Self> {
        let mut text = self.text.clone();
        while let Some(span) = member(&text, key)? {
            text.replace_range(span, "");
        }
        Self::parse(text)
    }
}

/// The keys of a wrapper, hidden by those of the language model in it; a wrapper may lie in
/// another.
fn unwrapped(config: &Value) -> Value {
    let mut keys = config.as_object().cloned().unwrap_or_default();
    while let Some(inner) = WRAPPED.iter().find_map(|key| match keys.get(*key) {
        Some(Value::Object(_)) => keys.remove(*key),
        _ => None,
    }) {
        let inner = inner.as_object().cloned().unwrap_or_default();
        keys.extend(inner.into_iter().filter(|(_, value)| !value.is_null()));
    }
    Value::Object(keys)
}

/// Whether an object under this key holds keys of the language model.
pub(super) fn is_nested(key: &str) -> bool {
    WRAPPED.contains(&key) || WITHIN.contains(&key)
}

/// The start, end and replacement of every value of `object`, a slice of `text`, to replace.
fn spans_of(
    text: &str,
    object: &str,
    edits: &[Edit],
    nested: &[Edit],
    found: &mut Vec<(usize, usize, String)>,
) -> Result<()> {
    let members: Members<&RawValue> =
        serde_json::from_str(object).map_err(|e| Error::malformed("config.json", e))?;
    for (key, raw) in members.0 {
        let value = raw.get();
        let start = value.as_ptr() as usize - text.as_ptr() as usize;
        let edit = edits.iter().find(|(name, _)| *name == key);
        if let Some((_, new)) = edit.filter(|_| value != "null") {
            found.push((start, start + value.len(), like(value, new)));
        } else if is_nested(&key) && value.starts_with('{') {
            spans_of(text, value, nested, nested, found)?;
        }
    }
    Ok(())
}

/// A key and the JSON text of its new value.
pub(crate) type Edit = (&'static str, String);

/// A [`ErrorKind::Config`].
pub(crate) fn mismatch(key: &str, expected: &str, found: impl std::fmt::Display) -> Error {
    let (key, expected, found) = (key.into(), expected.into(), found.to_string());
    ErrorKind::Config { key, expected, found }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "{\n \"num_experts\" : 8,  \"odd\":[1.50, 2E3],\n \
        \"text_config\": {\"num_local_experts\":8, \"norm_topk_prob\": true},\n\t\"k\": null }\n";

    fn config(text: &str) -> Config {
        Config::parse(text.into()).unwrap()
    }

    #[test]
    fn edits_replace_every_spelling_and_nothing_else() {
        let edits: Vec<_> = EXPERTS.iter().map(|key| (*key, "6".to_owned())).collect();
        let edited = config(TEXT).edited(&edits, &[]).unwrap();
        let expected = TEXT.replace(": 8", ": 6").replace(":8", ":6");
        assert_eq!(edited, expected);
        assert_eq!(config(TEXT).edited(&[], &edits[2..]).unwrap(), TEXT);
    }

    #[test]
    fn members_are_removed_with_one_comma() {
        let key = "quantization_config";
        let without = |text: &str| config(text).without(key).unwrap().text().to_owned();
        for (text, expected) in [
            (r#"{"quantization_config": {"a": [1]}}"#, "{}"),
            (r#"{ "quantization_config":1 , "b": 2 }"#, r#"{ "b": 2 }"#),
            ("{\"b\": 2,\n  \"quantization_config\" : {\"x\": \"}\"}\n}", "{\"b\": 2\n}"),
            (r#"{"a": 1, "quantization_config": 1, "b": 2}"#, r#"{"a": 1, "b": 2}"#),
            (r#"{"quantization_config": 1, "quantization_config": 2, "b": 3}"#, r#"{"b": 3}"#),
            (r#"{"quantization_config": null}"#, r#"{"quantization_config": null}"#),
            (r#"{"quantization_confi\u0067": 1, "x": ":"}"#, r#"{"x": ":"}"#),
            (
                r#"{"text_config": {"a": 1, "quantization_config": {}}, "quantization_config": 1}"#,
                r#"{"text_config": {"a": 1}}"#,
            ),
        ] {
            assert_eq!(without(text), expected);
        }
        assert_eq!(without(TEXT), TEXT);
    }

    #[test]
    fn a_wrapper_hides_nothing_of_the_language_model() {
        let text = r#"{"model_type": "outer", "tie_word_embeddings": true, "vocab_size": null,
            "thinker_config": {"audio_config": {"num_experts": 3},
            "text_config": {"model_type": "inner", "vocab_size": 64, "num_experts": 8}}}"#;
        let omni = config(text);
        assert_eq!(omni.string("model_type").unwrap(), Some("inner"));
        assert_eq!(omni.outer_string("model_type").unwrap(), Some("outer"));
        assert_eq!(omni.integer("vocab_size").unwrap(), Some(64));
        assert_eq!(omni.flag("tie_word_embeddings").unwrap(), Some(true));
        let edited = omni.edited(&[("num_experts", "4".into())], &[]).unwrap();
        assert_eq!(edited, text.replace(": 8", ": 4"));
    }

    #[test]
    fn values_are_typed_and_found_in_wrappers() {
        let config = config(TEXT);
        assert_eq!(config.experts().unwrap(), 8);
        assert_eq!(config.flag("norm_topk_prob").unwrap(), Some(true));
        assert_eq!(config.integer("k").unwrap(), None);
        let error = config.integer("odd").unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Config { key, .. } if key == "odd"));
        assert!(matches!(config.top_k().unwrap_err().kind(), ErrorKind::Config { .. }));
    }

    #[test]
    fn counts_may_stand_in_a_list_or_in_a_part_of_the_model() {
        let text = r#"{"num_experts": [4,  4], "moe_topk": [2, 2], "ffn_config": {"w": 1}}"#;
        let hunyuan = config(text);
        assert_eq!((hunyuan.experts().unwrap(), hunyuan.top_k().unwrap()), (4, 2));
        let edited = hunyuan.edited(&[("num_experts", "16".to_owned())], &[]).unwrap();
        assert_eq!(edited, text.replace("[4,  4]", "[16,  16]"));
        for bad in ["[4, 5]", "[]", "[4, null]", "[\"4\"]"] {
            let found = config(&format!(r#"{{"num_experts": {bad}}}"#)).experts();
            assert!(matches!(found.unwrap_err().kind(), ErrorKind::Config { .. }), "{bad}");
        }
        let text = r#"{"ffn_config": {"moe_num_experts": 4, "moe_top_k": 1}}"#;
        let dbrx = config(text);
        assert_eq!((dbrx.experts().unwrap(), dbrx.top_k().unwrap()), (4, 1));
        let edited = dbrx.edited(&[("moe_num_experts", "2".to_owned())], &[]).unwrap();
        assert_eq!(edited, text.replace(": 4", ": 2"));
    }

    #[test]
    fn contradictory_spellings_are_refused() {
        let error = config(r#"{"num_experts": 8, "num_local_experts": 4}"#).experts().unwrap_err();
        assert!(error.to_string().contains("expected 8, as its other spelling says, found 4"));
        assert!(Config::parse("[]".into()).is_err());
    }
}
