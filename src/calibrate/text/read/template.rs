//! The chat template of a model, which turns conversations into the text that it was trained on.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind as JinjaKind};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::conversation::{Conversation, plain};
use super::malformed;
use crate::calibrate::text::options::Conversations;
use crate::calibrate::text::record::TemplateRecord;
use crate::error::{Error, Locate, Result};

const FILE: &str = "chat_template.jinja";
const OLD_FILE: &str = "chat_template.json";
const CONFIG: &str = "tokenizer_config.json";
/// The day that templates are told, so that the same text gives the same tokens every day.
const DATE: [(&str, &str); 9] = [
    ("%d", "01"),
    ("%b", "Jan"),
    ("%B", "January"),
    ("%Y", "2025"),
    ("%m", "01"),
    ("%H", "12"),
    ("%M", "00"),
    ("%S", "00"),
    ("%A", "Wednesday"),
];

/// What turns conversations into text.
pub(in crate::calibrate::text) struct Template {
    kind: Kind,
    /// Special tokens by name (`bos_token`), as templates ask for them.
    tokens: Map<String, Value>,
    used: std::cell::Cell<bool>,
}

enum Kind {
    Jinja {
        environment: Box<Environment<'static>>,
        file: PathBuf,
        sha256: String,
    },
    /// A template that cannot be parsed: only a text with conversations needs it.
    Broken(String),
    Plain,
    /// The model has none.
    None,
}

impl Template {
    /// The template that is asked for. A model's own is the file `chat_template.jinja`, which wins
    /// over `chat_template` in `tokenizer_config.json`, as in `transformers`.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io), [`Format`](crate::ErrorKind::Format) for a file of JSON that
    /// cannot be parsed. A template that cannot be parsed is an error when it is needed.
    pub(in crate::calibrate::text) fn open(model: &Path, choice: &Conversations) -> Result<Self> {
        let config = object(&model.join(CONFIG))?;
        let found = match choice {
            Conversations::Plain => None,
            Conversations::File(file) => Some((text(file)?, file.clone())),
            Conversations::Template => own(model, &config)?,
        };
        let kind = match (found, choice) {
            (Some((text, file)), _) => compile(&text, &file)
                .unwrap_or_else(|e| Kind::Broken(format!("chat template {}: {e}", file.display()))),
            (None, Conversations::Plain) => Kind::Plain,
            (None, _) => Kind::None,
        };
        let token = |(name, value): (&String, &Value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            name.ends_with("_token").then(|| (name.clone(), Value::from(text)))
        };
        let tokens = config.iter().filter_map(token).collect();
        Ok(Self { kind, tokens, used: false.into() })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// Why there is none: no template, or what the template says.
    pub(super) fn render(&self, conversation: &Conversation) -> Result<String, String> {
        let Kind::Jinja { environment, file, .. } = &self.kind else {
            return match self.kind {
                Kind::Plain => Ok(plain(conversation)),
                Kind::Broken(ref reason) => Err(reason.clone()),
                _ => Err(format!(
                    "a conversation, but the model has no chat template: put {FILE} into its \
                     folder, or give one with --chat-template FILE; --chat-template plain joins \
                     the contents without one"
                )),
            };
        };
        self.used.set(true);
        let mut given = self.tokens.clone();
        given.insert("messages".into(), Value::Array(conversation.messages.clone()));
        given.insert("add_generation_prompt".into(), false.into());
        given.insert("tools".into(), conversation.tools.clone().unwrap_or_default());
        let rendered = environment.get_template("chat").and_then(|chat| chat.render(Serde(&given)));
        rendered.map_err(|e| format!("chat template {}: {e:#}", file.display()))
    }

    /// The template, if a conversation was read by it.
    pub(in crate::calibrate::text) fn record(&self) -> Option<TemplateRecord> {
        let Kind::Jinja { file, sha256, .. } = &self.kind else { return None };
        let file = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.used.get().then(|| TemplateRecord { file, sha256: sha256.clone() })
    }
}

/// The template in a model's folder, and the file that holds it.
fn own(model: &Path, config: &Map<String, Value>) -> Result<Option<(String, PathBuf)>> {
    let file = model.join(FILE);
    if file.exists() {
        return Ok(Some((text(&file)?, file)));
    }
    let old = model.join(OLD_FILE);
    let found = [(old.clone(), object(&old)?), (model.join(CONFIG), config.clone())];
    Ok(found.into_iter().find_map(|(file, object)| {
        let text = match object.get("chat_template")? {
            Value::String(text) => text.clone(),
            // Several by name.
            Value::Array(named) => {
                let default = named.iter().find(|one| one["name"] == "default");
                default.or(named.first())?["template"].as_str()?.to_owned()
            }
            _ => return None,
        };
        Some((text, file))
    }))
}

fn compile(text: &str, file: &Path) -> Result<Kind, String> {
    let sha256 = Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect();
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| e.to_string())?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |reason: String| -> Result<String, _> {
        Err(minijinja::Error::new(JinjaKind::InvalidOperation, reason))
    });
    environment.add_function("strftime_now", |format: String| {
        DATE.iter().fold(format, |text, (code, value)| text.replace(code, value))
    });
    environment.add_filter("tojson", to_json);
    // A mark of `transformers` around what an assistant says; it changes no text.
    let text = without_marks(text);
    environment.add_template_owned("chat", text).map_err(|e| e.to_string())?;
    Ok(Kind::Jinja { environment: Box::new(environment), file: file.to_owned(), sha256 })
}

/// The template without `{% generation %}` and `{% endgeneration %}`, which Jinja does not know.
fn without_marks(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let end = start + length + 2;
        let word =
            rest[start + 2..end - 2].trim_matches(|c: char| "-+".contains(c) || c.is_whitespace());
        out += &rest[..start];
        if matches!(word, "generation" | "endgeneration") {
            // A statement without effect keeps the mark's handling of white space.
            let (before, after) = (&rest[start..start + 3], &rest[end - 3..end]);
            out += if before.ends_with('-') { "{%- " } else { "{% " };
            out += "set _ = 0";
            out += if after.starts_with('-') { " -%}" } else { " %}" };
        } else {
            out += &rest[start..end];
        }
        rest = &rest[end..];
    }
    out + rest
}

/// JSON as Python's `json.dumps` writes it, without the escapes for HTML of `minijinja`'s own.
fn to_json(value: &minijinja::Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<minijinja::Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let invalid =
        |e: serde_json::Error| minijinja::Error::new(JinjaKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let spaces = " ".repeat(width);
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            let mut writer = serde_json::Serializer::with_formatter(&mut out, pretty);
            serde::Serialize::serialize(value, &mut writer)
        }
        None => {
            let mut writer = serde_json::Serializer::with_formatter(&mut out, Spaced);
            serde::Serialize::serialize(value, &mut writer)
        }
    };
    written.map_err(invalid)?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// A space behind commas and colons.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn text(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).map_err(|e| Error::io("read chat template", e)).in_file(file)
}

/// A JSON object in a file; empty when there is no file.
fn object(file: &Path) -> Result<Map<String, Value>> {
    if !file.exists() {
        return Ok(Map::new());
    }
    let text = text(file)?;
    serde_json::from_str(&text).map_err(|e| malformed("JSON", e.to_string())).in_file(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(template: &str, messages: Value) -> Result<String, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), template).unwrap();
        let config = json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" } });
        std::fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
        let template = Template::open(dir.path(), &Conversations::Template).unwrap();
        let messages = messages.as_array().unwrap().clone();
        template.render(&Conversation { messages, tools: None })
    }

    #[test]
    fn templates_are_rendered_as_transformers_does() {
        let said = json!([{ "role": "user", "content": " hi <b>é " }]);
        for (template, expected) in [
            (
                "{{ bos_token }}{% for m in messages %}\n[{{ m['role'] }}] {{ m.content.strip() }}\
              {{ eos_token }}\n{% endfor %}\n",
                "<s>[user] hi <b>é</s>\n",
            ),
            (
                "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}\
              {%- set ns.n = ns.n + 1 -%}\
              {%- generation -%}{{ m.content[1:3] + '' }}{%- endgeneration -%}{%- endfor -%}\
              {{ ns.n }}",
                "hi1",
            ),
            ("{{ messages | tojson }}", r#"[{"role": "user", "content": " hi <b>é "}]"#),
            (
                "{% for m in messages %}{% if m.content.startswith(' hi') %}{% break %}{% endif %}x\
              {% endfor %}{{ strftime_now('%d %b %Y') }}",
                "01 Jan 2025",
            ),
            (
                "{% if tools is none %}none{% endif %}{{ messages[0].content.split('<')[0] }}",
                "none hi ",
            ),
        ] {
            assert_eq!(render(template, said.clone()).unwrap(), expected, "{template}");
        }
        let error = render("{{ raise_exception('roles must alternate') }}", said).unwrap_err();
        assert!(error.contains("roles must alternate") && error.contains(FILE), "{error}");
    }

    #[test]
    fn the_file_wins_over_the_config_and_none_is_an_error_that_helps() {
        let dir = tempfile::tempdir().unwrap();
        let said = Conversation { messages: vec![json!({ "content": "c" })], tools: None };
        let open = |choice: &Conversations| Template::open(dir.path(), choice).unwrap();
        let error = open(&Conversations::Template).render(&said).unwrap_err();
        assert!(error.contains("--chat-template plain"), "{error}");
        assert_eq!(open(&Conversations::Plain).render(&said).unwrap(), "c");
        let named = json!({ "chat_template": [
            { "name": "tool_use", "template": "t" },
            { "name": "default", "template": "config" }] });
        std::fs::write(dir.path().join(CONFIG), named.to_string()).unwrap();
        assert_eq!(open(&Conversations::Template).render(&said).unwrap(), "config");
        std::fs::write(dir.path().join(FILE), "file").unwrap();
        let own = open(&Conversations::Template);
        assert_eq!(own.record(), None);
        assert_eq!(own.render(&said).unwrap(), "file");
        assert_eq!(own.record().unwrap().file, FILE);
        std::fs::write(dir.path().join(FILE), "{% for %}").unwrap();
        let error = open(&Conversations::Template).render(&said).unwrap_err();
        assert!(error.contains(FILE) && error.contains("syntax"), "{error}");
    }
}
