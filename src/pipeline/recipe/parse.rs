//! Recipe files as one table of values, whatever they are written in.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::Result;
use crate::pipeline::recipe::invalid;

/// Keys and values.
pub(crate) type Table = Map<String, Value>;

pub(crate) fn toml(text: &str) -> Result<Table> {
    toml::from_str(text).map_err(|e| invalid(&e)).and_then(table)
}

pub(crate) fn yaml(text: &str) -> Result<Table> {
    serde_yaml_ng::from_str(text).map_err(|e| invalid(&e)).and_then(table)
}

pub(crate) fn json(text: &str) -> Result<Table> {
    serde_json::from_str(text).map_err(|e| invalid(&e)).and_then(table)
}

fn table(Unique(value): Unique) -> Result<Table> {
    match value {
        Value::Object(table) => Ok(table),
        _ => Err(invalid(&"a recipe is a table of keys")),
    }
}

/// A value in which no key occurs twice: `serde_json` would take the last one and say nothing.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_any(UniqueKeys).map(Self)
    }
}

struct UniqueKeys;

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value of a recipe")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let finite = || E::custom(format!("{value} where a finite number is expected"));
        Number::from_f64(value).map(Value::Number).ok_or_else(finite)
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut table = Map::new();
        while let Some((key, Unique(value))) = entries.next_entry::<String, _>()? {
            if table.contains_key(&key) {
                return Err(A::Error::custom(format!("`{key}` is given twice")));
            }
            table.insert(key, value);
        }
        Ok(Value::Object(table))
    }
}
