//! The shapes in which data sets keep conversations.

use serde_json::{Map, Value, json};

/// Fields that hold a list of messages.
const LISTS: [&str; 2] = ["messages", "conversations"];
/// Fields of a pair: what is asked, and the answer to it.
const PAIRS: [(&str, &str); 6] = [
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
];
/// Fields that belong to one of the shapes.
const BESIDE: [&str; 3] = ["system", "input", "tools"];

/// A conversation as chat templates want it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Conversation {
    /// Objects with `role` and `content`.
    pub(super) messages: Vec<Value>,
    /// Descriptions of tools.
    pub(super) tools: Option<Value>,
}

/// Whether a field may be a part of a conversation.
pub(super) fn is_part(field: &str) -> bool {
    let pair = |(asked, answer): &(&str, &str)| field == *asked || field == *answer;
    LISTS.contains(&field) || BESIDE.contains(&field) || PAIRS.iter().any(pair)
}

/// The conversation in some fields of an object; `None` when there is none.
///
/// # Errors
/// Which message is not understood, and why.
pub(super) fn of_fields(fields: &Map<String, Value>) -> Result<Option<Conversation>, String> {
    let tools = fields.get("tools").filter(|tools| !tools.is_null()).cloned();
    let text = |field: &str| fields.get(field).and_then(Value::as_str);
    if let Some((field, list)) = LISTS.iter().find_map(|f| Some((*f, fields.get(*f)?))) {
        let mut messages = of_list(field, list)?;
        if let Some(system) = text("system").filter(|system| !system.is_empty()) {
            messages.insert(0, json!({ "role": "system", "content": system }));
        }
        return Ok(Some(Conversation { messages, tools }));
    }
    // Data sets of prompts that are lists of messages hold the answer as a list too.
    let both =
        |(a, b): &(&'static str, &'static str)| Some((*a, fields.get(*a)?, *b, fields.get(*b)?));
    let Some((asked, question, answer, reply)) = PAIRS.iter().find_map(both) else {
        return Ok(None);
    };
    if question.is_array() || reply.is_array() {
        let mut messages = of_side(asked, question, "user")?;
        messages.extend(of_side(answer, reply, "assistant")?);
        return Ok(Some(Conversation { messages, tools }));
    }
    let string = |field: &str, value: &Value| {
        value.as_str().map(str::to_owned).ok_or_else(|| expected(field, "a string", value))
    };
    let mut question = string(asked, question)?;
    if let Some(input) = text("input").filter(|input| !input.is_empty()) {
        question = format!("{question}\n\n{input}");
    }
    let mut messages = Vec::new();
    if let Some(system) = text("system").filter(|system| !system.is_empty()) {
        messages.push(json!({ "role": "system", "content": system }));
    }
    messages.push(json!({ "role": "user", "content": question }));
    messages.push(json!({ "role": "assistant", "content": string(answer, reply)? }));
    Ok(Some(Conversation { messages, tools }))
}

/// One side of a pair: a string, or messages.
fn of_side(field: &str, value: &Value, role: &str) -> Result<Vec<Value>, String> {
    match value {
        Value::String(text) => Ok(vec![json!({ "role": role, "content": text })]),
        _ => of_list(field, value),
    }
}

/// The messages of a list: `role` and `content`, or `from` and `value` as in ShareGPT.
///
/// # Errors
/// Which message is not understood, and why.
pub(super) fn of_list(field: &str, value: &Value) -> Result<Vec<Value>, String> {
    let list = value.as_array().ok_or_else(|| expected(field, "a list of messages", value))?;
    let message = |(i, value): (usize, &Value)| {
        let wrong = |what: &str, found: &Value| expected(&format!("{field}[{i}]"), what, found);
        let object = value.as_object().ok_or_else(|| wrong("an object", value))?;
        if object.get("role").is_some_and(Value::is_string) {
            // As it is: templates know more fields than these two.
            return Ok(value.clone());
        }
        let pair = object.get("from").and_then(Value::as_str).zip(object.get("value"));
        let (from, content) =
            pair.ok_or_else(|| wrong("`role` and `content`, or `from` and `value`", value))?;
        Ok(json!({ "role": role(from), "content": content }))
    };
    list.iter().enumerate().map(message).collect()
}

/// The role that a ShareGPT name stands for.
fn role(from: &str) -> &str {
    match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "model" | "bot" => "assistant",
        "function" | "observation" | "tool" => "tool",
        other => other,
    }
}

/// The contents without a template, with an empty line between two.
pub(super) fn plain(conversation: &Conversation) -> String {
    let content = |message: &Value| match &message["content"] {
        Value::String(text) => text.clone(),
        // Parts of `{"type": "text", "text": …}`; others, images for one, hold no text.
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    };
    conversation.messages.iter().map(content).collect::<Vec<_>>().join("\n\n")
}

fn expected(field: &str, what: &str, found: &Value) -> String {
    format!("`{field}`: expected {what}, found {}", kind(found))
}

/// The type of a value, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Result<Option<Conversation>, String> {
        of_fields(value.as_object().unwrap())
    }

    #[test]
    fn the_shapes_of_data_sets_are_one_conversation() {
        let messages = json!([
            { "role": "user", "content": "a" }, { "role": "assistant", "content": "b" },
        ]);
        for value in [
            json!({ "messages": messages }),
            json!({ "conversations": [
                { "from": "human", "value": "a" }, { "from": "gpt", "value": "b" }] }),
            json!({ "prompt": "a", "response": "b" }),
            json!({ "prompt": "a", "completion": "b" }),
            json!({ "instruction": "a", "input": "", "output": "b" }),
            json!({ "question": "a", "answer": "b" }),
            json!({ "prompt": [messages[0]], "completion": [messages[1]] }),
        ] {
            let found = read(value.clone()).unwrap().unwrap();
            assert_eq!(Value::Array(found.messages.clone()), messages, "{value}");
            assert_eq!(plain(&found), "a\n\nb");
        }
        assert_eq!(read(json!({ "prompt": "a" })).unwrap(), None);
        let full = json!({ "system": "s", "instruction": "a", "input": "i", "output": "b" });
        let found = read(full).unwrap().unwrap();
        assert_eq!(plain(&found), "s\n\na\n\ni\n\nb");
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (value, says) in [
            (json!({ "messages": "a" }), "`messages`: expected a list of messages, found a string"),
            (json!({ "messages": [1] }), "`messages[0]`: expected an object, found a number"),
            (json!({ "conversations": [{ "role": 1 }] }), "`from` and `value`, found an object"),
            (json!({ "prompt": 1, "response": "b" }), "`prompt`: expected a string"),
        ] {
            let error = read(value).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
