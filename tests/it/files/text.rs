//! Text as people have it: every shape of file becomes the same windows, and what was done is
//! recorded.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use mcsmoe::Result;
use mcsmoe::calibrate::text::{
    Conversations, Limits, Select, Separator, SpecialTokens, Text, TextOptions, Vocabulary,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::fixture;

const LIMITS: Limits = Limits { vocab: 2048, longest: 1024, usual: 512 };
/// EOS of the bundled model.
const EOS: u32 = 2;

/// A folder with texts, and one with the tokenizer and the config of the bundled model.
struct Case {
    texts: TempDir,
    model: TempDir,
    options: TextOptions,
}

impl Case {
    fn new() -> Self {
        let model = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            fs::copy(fixture("mixtral-8e").join(name), model.path().join(name)).unwrap();
        }
        Self { texts: tempfile::tempdir().unwrap(), model, options: TextOptions::new(64) }
    }

    fn put(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.texts.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn read(&self, path: &Path) -> Result<Text> {
        Text::read(path, self.model.path(), LIMITS, &self.options)
    }

    fn windows(&self, name: &str, content: impl AsRef<[u8]>) -> Vec<Vec<u32>> {
        let text = self.read(&self.put(name, content)).unwrap();
        text.windows().map(<[u32]>::to_vec).collect()
    }

    fn refused(&self, name: &str, content: impl AsRef<[u8]>, says: &str) {
        let path = self.put(name, content);
        let error = self.read(&path).unwrap_err();
        assert!(error.to_string().contains(says), "{name}: {error}");
        assert_eq!(error.place().file.as_deref(), Some(&*path), "{error}");
    }

    /// Changes a JSON file of the model.
    fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let path = self.model.path().join(name);
        let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        fs::write(path, value.to_string()).unwrap();
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        Vocabulary::open(self.model.path()).unwrap().encode(text).unwrap()
    }
}

fn bundled() -> String {
    fs::read_to_string(fixture("text/calib/legal.txt")).unwrap()
}

/// Documents of about 700 bytes.
fn documents() -> Vec<String> {
    let text = bundled();
    (0..20).map(|i| text[700 * i..700 * (i + 1)].to_owned()).collect()
}

fn lines(values: impl Iterator<Item = Value>) -> String {
    values.map(|value| format!("{value}\n")).collect()
}

#[test]
fn json_in_any_shape_is_the_same_text() {
    let mut case = Case::new();
    let all = documents();
    let object = |text: &String| json!({ "id": 1, "text": text, "more": { "deep": [null] } });
    let expected = case.windows("text.jsonl", lines(all.iter().map(object)));
    assert!(expected.len() > 40 && expected.concat().contains(&EOS));
    let list = Value::Array(all.iter().map(object).collect());
    for (name, content) in [
        ("list.json", list.to_string()),
        ("pretty.json", serde_json::to_string_pretty(&list).unwrap()),
        ("list.jsonl", list.to_string()),
        ("strings.json", json!(all).to_string()),
        ("crlf.jsonl", lines(all.iter().map(object)).replace('\n', "\r\n")),
        ("mark.jsonl", format!("\u{feff}{}", lines(all.iter().map(object)))),
        ("blank.jsonl", format!("\n\n{}\n  \n", lines(all.iter().map(object)))),
        ("both.jsonl", lines(all.iter().map(|t| json!({ "messages": [], "text": t })))),
    ] {
        assert_eq!(case.windows(name, content), expected, "{name}");
    }
    case.options.field = Some("body".into());
    let body = |text: &String| json!({ "text": "not this", "body": text });
    assert_eq!(case.windows("field.jsonl", lines(all.iter().map(body))), expected);
}

#[test]
fn compressed_text_is_the_same_text() {
    let case = Case::new();
    let text = bundled();
    let expected = case.windows("a.txt", &text);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(text.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    assert_eq!(case.windows("a.txt.gz", &gzip), expected);
    case.refused("cut.txt.gz", &gzip[..gzip.len() / 2], "compressed text");
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let zstd = ruzstd::encoding::compress_to_vec(text.as_bytes(), level);
    assert_eq!(case.windows("a.txt.zst", &zstd), expected);
    case.refused("cut.txt.zst", &zstd[..zstd.len() / 2], "");
}

#[test]
fn conversations_are_read_through_the_template_and_it_is_recorded() {
    let mut case = Case::new();
    let all = documents();
    let (asked, answer) = (&all[0][..300], &all[0][300..]);
    let messages = json!({ "messages": [
        { "role": "user", "content": asked }, { "role": "assistant", "content": answer } ] });
    let shapes = [
        messages.clone(),
        json!({ "conversations": [
            { "from": "human", "value": asked }, { "from": "gpt", "value": answer } ] }),
        json!({ "prompt": asked, "response": answer }),
        json!({ "instruction": asked, "input": "", "output": answer }),
    ];
    let content = |shape: &Value| lines(std::iter::repeat_n(shape.clone(), 3));
    case.refused("none.jsonl", content(&messages), "line 1: a conversation, but the model has no");
    case.options.conversations = Conversations::Plain;
    let plain = case.windows("plain.jsonl", content(&messages));
    let text = lines((0..3).map(|_| json!({ "text": format!("{asked}\n\n{answer}") })));
    assert_eq!(plain, case.windows("text.jsonl", text));

    case.options.conversations = Conversations::Template;
    let template = |mark: &str| {
        format!(
            "{{% for m in messages %}}{mark}{{{{ m.role }}}} {{{{ m.content }}}}</s>{{% endfor %}}"
        )
    };
    case.edit("tokenizer_config.json", |config| config["chat_template"] = json!(template("[")));
    let said = |mark: &str| {
        let one = case.encode(&format!("{mark}user {asked}</s>{mark}assistant {answer}</s>"));
        // The template ends with EOS: no other stands between two conversations.
        one.repeat(3).chunks_exact(64).map(<[u32]>::to_vec).collect::<Vec<_>>()
    };
    for (i, shape) in shapes.iter().enumerate() {
        assert_eq!(case.windows(&format!("{i}.jsonl"), content(shape)), said("["), "{shape}");
    }
    let record = |case: &Case| {
        let text = case.read(&case.texts.path().join("0.jsonl")).unwrap();
        text.record().template.clone().unwrap()
    };
    let from_config = record(&case);
    assert_eq!(from_config.file, "tokenizer_config.json");
    fs::write(case.model.path().join("chat_template.jinja"), template("(")).unwrap();
    assert_eq!(case.windows("0.jsonl", content(&messages)), said("("));
    assert_eq!(record(&case).file, "chat_template.jinja");
    assert_ne!(record(&case).sha256, from_config.sha256);
    fs::write(case.model.path().join("chat_template.jinja"), "{{ raise_exception('no') }}")
        .unwrap();
    case.refused("0.jsonl", content(&messages), "line 1: chat template");
}

#[test]
fn what_cannot_be_read_names_the_line_and_what_to_do() {
    let case = Case::new();
    for (name, content, says) in [
        ("content.jsonl", "{\"content\": \"a\"}", "line 1: no field `text`"),
        ("help.jsonl", "{\"text\": \"\"}\n{\"x\": 1}", "line 2: no field `text`"),
        (
            "flag.jsonl",
            "{\"content\": \"a\"}",
            "its fields: `content`; name the one to read with --field",
        ),
        ("number.jsonl", "{\"text\": \"\"}\n\n{\"text\": 5}", "line 3: `text`: expected a string"),
        ("list.jsonl", "{\"text\": [\"a\"]}", "line 1: `text`: expected a string"),
        ("twice.jsonl", "{\"text\": \"a\", \"text\": \"b\"}", "line 1: `text` is there twice"),
        ("bare.jsonl", "5", "line 1: expected an object or a string"),
        ("cut.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b", "line 2"),
        ("prose.json", "It was a dark night", "line 1"),
        ("roles.jsonl", "{\"messages\": [{\"who\": \"a\"}]}", "`messages[0]`: expected `role`"),
        ("surrogate.jsonl", "{\"text\": \"\\ud83d\"}", "line 1"),
        ("empty.jsonl", "", "found 0 tokens"),
        ("empty.txt", "", "found 0 tokens"),
        ("a.parquet", "PAR1", "Parquet"),
        ("a.txt.gz", "\u{1f}", "found 1 tokens"),
    ] {
        case.refused(name, content, says);
    }
    case.refused("utf16.txt", b"\xff\xfea\0", "iconv");
    case.refused("latin1.txt", b"caf\xe9 ", "offset 3");
    case.refused("bytes.jsonl", b"{\"text\": \"caf\xe9 \"}", "");
}

#[test]
fn sources_share_the_windows_alike_or_as_asked() {
    let mut case = Case::new();
    let text = bundled();
    case.put("code.txt", &text[..20_000]);
    case.put("prose/a.txt", &text[20_000..24_000]);
    let shares = |case: &Case| -> Vec<u64> {
        let text = case.read(case.texts.path()).unwrap();
        text.record().sources.iter().map(|source| source.windows).collect()
    };
    for seed in [1, 2, 3] {
        case.options = TextOptions::new(64).select(Select::Tokens(640)).seed(seed);
        assert_eq!(shares(&case), [5, 5]);
        case.options = TextOptions::new(64).select(Select::Tokens(128)).seed(seed);
        assert_eq!(shares(&case), [1, 1]);
    }
    case.options.select = Select::Tokens(640);
    case.options.mix = vec![("code".into(), 0.8), ("prose".into(), 0.2)];
    assert_eq!(shares(&case), [8, 2]);
    case.options.mix = vec![("code".into(), 1.0), ("verse".into(), 1.0)];
    let error = case.read(case.texts.path()).unwrap_err().to_string();
    assert!(error.contains("one of the sources code, prose, found verse"), "{error}");

    case.options = TextOptions::new(64).select(Select::Tokens(65_536));
    let all = case.read(case.texts.path()).unwrap();
    let warnings = all.record().warnings();
    let says = format!("65536 tokens asked for, {} used", all.record().tokens);
    assert!(warnings[0].contains(&says), "{warnings:?}");
}

#[test]
fn special_tokens_are_those_of_the_post_processor_or_as_asked() {
    let mut case = Case::new();
    let text = bundled();
    let plain = case.windows("a.txt", &text);
    case.options.special_tokens = SpecialTokens::Bos;
    let with = case.windows("a.txt", &text);
    assert!(with.iter().all(|window| window.len() == 64 && window[0] == 1 && window[1] != 1));
    assert_eq!(with[0][1..], plain[0][..63]);
    assert_eq!(with[1][1], plain[0][63]);
    case.edit("tokenizer.json", |tokenizer| {
        tokenizer["post_processor"] = json!({ "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } },
                       { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } },
                     { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } });
    });
    case.options.special_tokens = SpecialTokens::Tokenizer;
    assert_eq!(case.windows("a.txt", &text), with);
    let path = case.texts.path().join("a.txt");
    assert_eq!(case.read(&path).unwrap().record().prefix, [1]);
    // A text that has it already does not get it twice.
    assert_eq!(case.windows("b.txt", format!("<s>{text}"))[0], with[0]);
    case.options.special_tokens = SpecialTokens::None;
    assert_eq!(case.windows("a.txt", &text), plain);

    let two = lines([0, 1].iter().map(|_| json!({ "text": &text[..400] })));
    let at = case.encode(&text[..400]).len();
    for (separator, id) in [(Separator::Eos, Some(2)), (Separator::Token("<pad>".into()), Some(0))]
    {
        case.options.separator = separator;
        let found = case.windows("two.jsonl", &two).concat();
        assert_eq!(found.get(at).copied(), id);
    }
    case.options.separator = Separator::None;
    assert_eq!(case.windows("two.jsonl", &two).concat()[at..][..9], case.encode(&text[..400])[..9]);
    case.options.separator = Separator::Token("<none>".into());
    let error = case.read(&case.texts.path().join("two.jsonl")).unwrap_err().to_string();
    assert!(error.contains("`") || error.contains("<none>"), "{error}");
}

#[test]
fn truncation_and_padding_of_the_tokenizer_are_ignored() {
    let case = Case::new();
    let text = bundled();
    let expected = case.windows("a.txt", &text);
    let padding = json!({ "strategy": { "Fixed": 32768 }, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>" });
    let truncation = json!({ "direction": "Right", "max_length": 128,
        "strategy": "LongestFirst", "stride": 0 });
    for (key, value) in [("truncation", truncation), ("padding", padding)] {
        case.edit("tokenizer.json", |tokenizer| tokenizer[key] = value);
        assert_eq!(case.windows("a.txt", &text), expected, "{key}");
    }
}

#[test]
fn a_model_without_tokenizer_json_says_how_to_make_one() {
    let case = Case::new();
    fs::rename(case.model.path().join("tokenizer.json"), case.model.path().join("tokenizer.model"))
        .unwrap();
    let error = case.read(&case.put("a.txt", bundled())).unwrap_err().to_string();
    for says in ["tokenizer.model without tokenizer.json", "save_pretrained", ".safetensors"] {
        assert!(error.contains(says), "{error}");
    }
}
