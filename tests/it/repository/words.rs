//! Names of the crate: field words only, and no public type name twice.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Words of this project alone that were replaced by the field's: no item, module or file in `src`
/// has one of these names. The list only grows.
const REPLACED: &[&str] = &[
    "ALONE",
    "Aside",
    "CHOOSING",
    "Chain",
    "Course",
    "FAINT",
    "FEW",
    "FOUND",
    "Factorise",
    "Fate",
    "Given",
    "Held",
    "Items",
    "Jury",
    "LEAST",
    "Lesson",
    "Loops",
    "MANY",
    "Neurons",
    "Once",
    "Outline",
    "Paper",
    "Pupil",
    "Ran",
    "Room",
    "SLOW",
    "SURE",
    "Seen",
    "Student",
    "Subject",
    "Tap",
    "Thinned",
    "WIDE",
    "WORTH",
    "Watch",
    "Way",
    "aside",
    "bare",
    "behind",
    "beside",
    "bookmark",
    "cellar",
    "course",
    "doors",
    "doubt",
    "frame_of",
    "ground",
    "hand_on",
    "house",
    "judging",
    "jury",
    "lesson",
    "line_up",
    "look",
    "miss",
    "offer",
    "once",
    "paper",
    "pupil",
    "roof",
    "rooms",
    "seen",
    "sink",
    "slope",
    "stand_ins",
    "strangers",
    "student",
    "tap",
    "tell",
    "tells",
    "thinned",
    "told",
    "work",
];

/// Public names that two modules still share. The list only shrinks.
const PUBLIC_TWICE: &[&str] = &["Choice", "FileRecord", "Mlp", "Observer", "Score"];

/// An item of a source file: whether it is `pub`, its keyword, its name.
struct Item {
    public: bool,
    keyword: &'static str,
    name: String,
}

const KEYWORDS: [&str; 9] =
    ["const", "enum", "fn", "mod", "static", "struct", "trait", "type", "union"];

/// The items that a source file defines, one a line.
fn items(text: &str) -> Vec<Item> {
    let mut found = Vec::new();
    for line in text.lines() {
        let line = line.trim_start();
        let (public, rest) = match line.strip_prefix("pub") {
            Some(rest) if rest.starts_with('(') => (false, rest.split_once(')').unwrap().1),
            Some(rest) => (rest.starts_with(' '), rest),
            None => (false, line),
        };
        let mut words = rest.split_whitespace().skip_while(|w| ["async", "unsafe"].contains(w));
        let keyword = words.next().and_then(|w| KEYWORDS.iter().find(|k| **k == w));
        let Some((keyword, mut name)) = keyword.zip(words.next()) else { continue };
        if *keyword == "const" && name == "fn" {
            name = words.next().unwrap_or_default();
        }
        let end = name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len());
        found.push(Item { public, keyword, name: name[..end].to_owned() });
    }
    found
}

/// Every source file with its items.
fn sources() -> Vec<(PathBuf, Vec<Item>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut found) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let of = items(&fs::read_to_string(&path).unwrap());
                found.push((path.strip_prefix(&root).unwrap().to_owned(), of));
            }
        }
    }
    assert!(found.len() > 100, "the scan found only {} files", found.len());
    found
}

#[test]
fn the_scan_finds_items() {
    let text = "pub struct A<'a> {\n    pub(crate) fn b(&self) {}\npub const fn c() {}\n\
                unsafe fn d() {}\npub(super) type E = u8;\n// fn not() {}\nlet f = 1;";
    let found: Vec<_> = items(text).into_iter().map(|i| (i.public, i.keyword, i.name)).collect();
    let expected = [
        (true, "struct", "A"),
        (false, "fn", "b"),
        (true, "const", "c"),
        (false, "fn", "d"),
        (false, "type", "E"),
    ];
    assert_eq!(found, expected.map(|(public, keyword, name)| (public, keyword, name.to_owned())));
}

#[test]
fn replaced_words_do_not_come_back() {
    let mut found = Vec::new();
    for (file, items) in sources() {
        let parts = file.with_extension("");
        let parts = parts.components().map(|part| part.as_os_str().to_str().unwrap().to_owned());
        let names = items.into_iter().map(|item| item.name);
        for name in parts.chain(names) {
            if REPLACED.contains(&&*name) {
                found.push(format!("{}: {name}", file.display()));
            }
        }
    }
    assert!(found.is_empty(), "docs/GLOSSARY.md has the standard words:\n{}", found.join("\n"));
}

#[test]
fn no_public_type_has_the_name_of_another() {
    let mut places: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for (file, items) in sources() {
        let types = ["enum", "struct", "trait", "union"];
        for item in items.into_iter().filter(|i| i.public && types.contains(&i.keyword)) {
            places.entry(item.name).or_default().push(file.clone());
        }
    }
    let twice = |(name, files): &(&String, &Vec<PathBuf>)| {
        files.len() > 1 && !PUBLIC_TWICE.contains(&name.as_str())
    };
    let found: Vec<_> = places.iter().filter(twice).collect();
    assert!(found.is_empty(), "{found:#?}");
}
