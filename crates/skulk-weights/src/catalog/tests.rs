//! Every rule of the catalog, each with a text that breaks it and the words that say so.

use super::*;

/// An entry that satisfies every rule.
const GOOD: &str = "key: a\nsource_model: o/a\nquant: q4k\ntier: smoke\nslices: [full]\noutput_name: a.vindex\nhf_repo: acme/a\n";

/// A manifest of entries, each `GOOD` with some of its lines replaced; `FIELD:` alone removes the field.
fn manifest(entries: &[&str]) -> String {
    let mut text = String::from("models:\n");
    for changes in entries {
        let name = |line: &str| line.split(':').next().unwrap_or("").to_owned();
        let changed: Vec<String> = changes.lines().map(name).collect();
        let kept = GOOD.lines().filter(|line| !changed.contains(&name(line)));
        let lines: Vec<&str> = kept
            .chain(changes.lines().filter(|line| !line.ends_with(':')))
            .collect();
        text += &format!("- {}\n", lines.join("\n  "));
    }
    text
}

fn load(files: &[(&str, &str)], view: impl Fn(&Path) -> View) -> Result<Catalog, Invalid> {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    Catalog::load(&view(dir.path()), dir.path(), Some(dir.path()))
}

fn load_manifest(text: &str) -> Result<Catalog, Invalid> {
    load(&[("m.yaml", text)], |dir| {
        View::Manifest(dir.join("m.yaml"))
    })
}

fn load_config(config: &str, manifest: &str) -> Result<Catalog, Invalid> {
    load(&[("c.yaml", config), ("op.yaml", manifest)], |dir| {
        View::Config(dir.join("c.yaml"))
    })
}

fn messages(result: Result<Catalog, Invalid>) -> Vec<String> {
    let findings = result.map_or_else(|invalid| invalid.findings, |catalog| catalog.warnings);
    findings
        .into_iter()
        .map(|finding| format!("{}: {}", finding.entry.unwrap_or_default(), finding.message))
        .collect()
}

#[test]
fn each_rule_of_an_entry_has_its_message() {
    for (change, expected) in [
        ("key:", "models[0]: key must be a non-empty string"),
        ("key: ' '", "models[0]: key must be a non-empty string"),
        ("key: yes", "models[0]: key must be a non-empty string"),
        (
            "key: 2024-01-01",
            "models[0]: key must be a non-empty string",
        ),
        ("key: A", "A: key must be lowercase kebab-case"),
        (
            "source_model: [a/b]",
            "a: source_model must be a non-empty string",
        ),
        (
            "source_model: gemma",
            "a: source_model must look like owner/name",
        ),
        (
            "source_model: a/b/c",
            "a: source_model must look like owner/name",
        ),
        (
            "source_model: --help/x",
            "a: source_model must look like owner/name",
        ),
        ("quant:", "a: quant must be a non-empty string"),
        ("quant: q8k", "a: unsupported quant 'q8k'"),
        ("tier: true", "a: tier must be a non-empty string"),
        ("tier: all", "a: unsupported tier 'all'"),
        ("slices:", "a: slices must be a non-empty list"),
        ("slices: []", "a: slices must be a non-empty list"),
        ("slices: full", "a: slices must be a non-empty list"),
        ("slices: [1]", "a: slices must contain only strings"),
        ("slices: [full, b, a]", "a: unsupported slices ['a', 'b']"),
        (
            "slices: [full, expert-server]",
            "a: full must not be combined with other slices",
        ),
        (
            "slices: [full, full]",
            "a: full must not be combined with other slices",
        ),
        (
            "slices: [expert-server, expert-server]",
            "a: duplicate slice 'expert-server' in slices",
        ),
        (
            "output_name: a",
            "a: output_name must be a .vindex basename",
        ),
        (
            "output_name: ../a.vindex",
            "a: output_name must be a .vindex basename",
        ),
        (
            "output_name: {a: 1}",
            "a: output_name must be a non-empty string",
        ),
        ("hf_repo: a/b/c", "a: hf_repo must look like owner/name"),
        ("hf_repo: ../x", "a: hf_repo must look like owner/name"),
        (
            "hf_collection: 7",
            "a: hf_collection must be a non-empty string",
        ),
        (
            "hf_collection: ''",
            "a: hf_collection must be a non-empty string",
        ),
        (
            "hf_collection: a/b/c",
            "a: hf_collection must look like owner/slug",
        ),
        (
            "mtp_source_repo: o/b",
            "a: mtp_source_repo and mtp_sidecar_repo must both be set together or not at all",
        ),
        (
            "mtp_sidecar_repo: acme/b",
            "a: mtp_source_repo and mtp_sidecar_repo must both be set together or not at all",
        ),
        (
            "mtp_source_repo: b\nmtp_sidecar_repo: acme/b",
            "a: mtp_source_repo must look like owner/name",
        ),
        (
            "mtp_source_repo: o/b\nmtp_sidecar_repo: acme/b/c",
            "a: mtp_sidecar_repo must look like owner/name",
        ),
        (
            "mtp_source_repo: o/b\nmtp_sidecar_repo: ACME/b",
            "a: mtp_sidecar_repo owner must be 'acme'",
        ),
        (
            "mtp_source_repo: o/b\nmtp_sidecar_repo: acme/a",
            "a: mtp_sidecar_repo acme/a is also the hf_repo of a",
        ),
        (
            "assistant_model_repo: x",
            "a: assistant_model_repo must look like owner/name",
        ),
        (
            "assistant_model_repo: o/x\nmtp_source_repo: o/b\nmtp_sidecar_repo: acme/b",
            "a: assistant_model_repo and mtp_source_repo are mutually exclusive",
        ),
        (
            "vision_source_repo: true\nvision_sidecar_repo: acme/v",
            "a: vision_source_repo must be a non-empty string",
        ),
        (
            "vision_sidecar_repo: acme/v",
            "a: vision_source_repo and vision_sidecar_repo must both be set together or not at all",
        ),
        (
            "vision_source_repo: o/v\nvision_sidecar_repo: o/v",
            "a: vision_sidecar_repo owner must be 'acme'",
        ),
        (
            "vision_source_repo: o/v\nvision_sidecar_repo: acme/A",
            "a: vision_sidecar_repo acme/A is also the hf_repo of a",
        ),
        (
            "mtp_source_repo: o/b\nmtp_sidecar_repo: acme/s\nvision_source_repo: o/v\nvision_sidecar_repo: acme/s",
            "a: vision_sidecar_repo acme/s is also the mtp_sidecar_repo of a",
        ),
    ] {
        let text = manifest(&[change]);
        let result = load_manifest(&text);
        assert!(result.is_err(), "{change}");
        assert_eq!(messages(result), [expected], "{change}");
    }
}

#[test]
fn what_is_allowed_passes_without_a_word() {
    for change in [
        "key: 7b--x",
        "source_model: owner/模型-é",
        "slices: [expert-server]",
        "tier: moe",
        "hf_collection: other/col",
        "hf_collection: null",
        "assistant_model_repo: o/x\nvision_source_repo: o/v\nvision_sidecar_repo: acme/v",
        "mtp_source_repo: o/b\nmtp_sidecar_repo: acme/b",
    ] {
        assert_eq!(
            messages(load_manifest(&manifest(&[change]))),
            [""; 0],
            "{change}"
        );
    }
}

#[test]
fn what_would_be_ignored_is_told() {
    let catalog = load_manifest(&manifest(&["mtp_sidecar_rep: a/b\nnote: x"])).unwrap();
    let hints: Vec<_> = catalog
        .warnings
        .iter()
        .map(|warning| warning.hint.as_deref().unwrap_or(""))
        .collect();
    assert_eq!(hints[0], "did you mean mtp_sidecar_repo?");
    assert!(hints[1].starts_with("the fields are key, "));
    assert_eq!(
        messages(load_manifest(&manifest(&["tier: moe\ntier: smoke"]))),
        ["a: tier is set twice; the last one counts"]
    );
}

#[test]
fn entries_are_held_against_each_other() {
    let b = "key: b\noutput_name: b.vindex\nhf_repo: acme/b";
    for (change, expected) in [
        (
            "key: a\noutput_name: b.vindex\nhf_repo: acme/b",
            Some("a: duplicate key"),
        ),
        (
            "key: b\noutput_name: A.vindex\nhf_repo: acme/b",
            Some("b: duplicate output_name A.vindex"),
        ),
        (
            "key: b\noutput_name: b.vindex\nhf_repo: Acme/A",
            Some("b: duplicate hf_repo Acme/A"),
        ),
        (b, None),
    ] {
        assert_eq!(
            messages(load_manifest(&manifest(&["", change]))),
            Vec::from_iter(expected),
            "{change}"
        );
    }
    let with = |sidecar: &str| {
        manifest(&[
            "mtp_source_repo: o/one\nmtp_sidecar_repo: acme/s",
            &format!("{b}\n{sidecar}"),
        ])
    };
    for (sidecar, expected) in [
        ("mtp_source_repo: o/one\nmtp_sidecar_repo: acme/s", None),
        (
            "mtp_source_repo: o/two\nmtp_sidecar_repo: acme/s",
            Some("b: mtp_sidecar_repo acme/s is shared with a, whose source differs"),
        ),
        (
            "vision_source_repo: o/v\nvision_sidecar_repo: acme/s",
            Some("b: vision_sidecar_repo acme/s is also the mtp_sidecar_repo of a"),
        ),
        (
            "vision_source_repo: o/v\nvision_sidecar_repo: acme/a",
            Some("b: vision_sidecar_repo acme/a is also the hf_repo of a"),
        ),
    ] {
        assert_eq!(
            messages(load_manifest(&with(sidecar))),
            Vec::from_iter(expected),
            "{sidecar}"
        );
    }
}

#[test]
fn a_file_that_holds_no_models_is_refused() {
    for (text, expected) in [
        ("", ": must contain a top-level mapping"),
        ("- key: a\n", ": must contain a top-level mapping"),
        ("version: 1\n", ": models must be a non-empty list"),
        ("models: []\n", ": models must be a non-empty list"),
        ("models: {key: a}\n", ": models must be a non-empty list"),
        ("models: [x]\n", ": models[0] must be a mapping"),
    ] {
        assert_eq!(messages(load_manifest(text)), [expected], "{text:?}");
    }
    let missing = load(&[], |dir| View::Manifest(dir.join("m.yaml"))).unwrap_err();
    assert!(missing.findings[0].to_string().contains("m.yaml not found"));
}

#[test]
fn each_rule_of_a_config_has_its_message() {
    let source = "path: op.yaml\n  namespace: acme\n  hf_owner: acme";
    for (config, expected) in [
        ("", ": must contain a top-level mapping".to_owned()),
        (
            "catalogs: []\ncatalogues: []\n",
            ": set only one of catalogs or the legacy key catalogues".to_owned(),
        ),
        ("catalogs:\n", ": catalogs must be a list".to_owned()),
        (
            "catalogs: [x]\n",
            ": catalogs[0] must be a mapping".to_owned(),
        ),
        (
            "catalogs: [{}]\n",
            ": catalogs[0] must set exactly one of builtin or path".to_owned(),
        ),
        (
            "catalogs: [{builtin: foxlight, path: op.yaml}]\n",
            ": catalogs[0] must set exactly one of builtin or path".to_owned(),
        ),
        (
            "catalogs: [{builtin: acme}]\n",
            ": catalogs[0]: unsupported builtin catalog: acme".to_owned(),
        ),
        (
            "catalogs: [{builtin: foxlight, namespace: x}]\n",
            ": catalogs[0]: builtin catalogs do not accept overrides".to_owned(),
        ),
        (
            "catalogs: [{builtin: foxlight}, {builtin: foxlight}]\n",
            ": catalogs[1]: duplicate catalog source builtin:foxlight".to_owned(),
        ),
        (
            &format!("catalogs:\n- {source}\n  colour: red\n"),
            ": catalogs[0]: unsupported fields ['colour']".to_owned(),
        ),
        (
            "catalogs: [{path: 5, namespace: a, hf_owner: a}]\n",
            ": catalogs[0].path must be a non-empty string".to_owned(),
        ),
        (
            "catalogs: [{path: op.yaml, hf_owner: a}]\n",
            ": catalogs[0].namespace must be a non-empty string".to_owned(),
        ),
        (
            "catalogs: [{path: op.yaml, namespace: a b, hf_owner: a}]\n",
            ": catalogs[0] namespace must be lowercase kebab/dot-case".to_owned(),
        ),
        (
            &format!("catalogs:\n- {source}\n  hf_collection: x\n"),
            ": catalogs[0].hf_collection must look like owner/slug".to_owned(),
        ),
        (
            &format!("catalogs:\n- {source}\n  hf_collection: b/c\n"),
            ": catalogs[0].hf_collection owner must be 'acme'".to_owned(),
        ),
    ] {
        let found = messages(load_config(config, &manifest(&[""])));
        assert!(found.contains(&expected), "{config:?}: {found:?}");
    }
}

#[test]
fn an_operator_source_keeps_to_its_owner() {
    let config =
        "catalogs: [{path: op.yaml, namespace: acme, hf_owner: acme, hf_collection: acme/c}]\n";
    assert_eq!(
        messages(load_config(config, &manifest(&["hf_repo: ACME/a"]))),
        ["acme/a: hf_repo owner must be 'acme'"]
    );
    assert_eq!(
        messages(load_config(config, &manifest(&["hf_collection: b/c"]))),
        ["acme/a: hf_collection owner must be 'acme'"]
    );
    let catalog = load_config(config, &manifest(&[""])).unwrap();
    assert_eq!(catalog.sources.len(), 2);
    assert_eq!(catalog.entries.len(), 13);
    assert_eq!(
        catalog.get("acme/a").unwrap().hf_collection.as_deref(),
        Some("acme/c")
    );
}

#[test]
fn sources_are_held_against_each_other() {
    let config = |namespace: &str| {
        format!("catalogs: [{{path: op.yaml, namespace: {namespace}, hf_owner: FoxlightAI}}]\n")
    };
    let entry = "hf_repo: FoxlightAI/a";
    let found = messages(load_config(
        &config("foxlight"),
        &manifest(&[&format!("{entry}\nkey: gemma-3-4b-full-q4-k")]),
    ));
    assert_eq!(
        found,
        ["foxlight/gemma-3-4b-full-q4-k: duplicate catalog key"]
    );
    let found = messages(load_config(
        &config("x"),
        &manifest(&[&format!(
            "{entry}\noutput_name: Gemma-3-4b-it-full-q4-k.vindex"
        )]),
    ));
    assert_eq!(
        found,
        ["x/a: duplicate output_name Gemma-3-4b-it-full-q4-k.vindex"]
    );
    let found = messages(load_config(
        &config("x"),
        &manifest(&["hf_repo: FoxlightAI/gemma-3-4b-it-full-q4-k-vindex"]),
    ));
    assert_eq!(
        found,
        ["x/a: duplicate hf_repo FoxlightAI/gemma-3-4b-it-full-q4-k-vindex"]
    );
}

#[test]
fn all_errors_are_found_in_one_run() {
    let text = manifest(&["quant: q2\ntier: big\nslices: []", "key: b\nhf_repo: x"]);
    assert_eq!(
        messages(load_manifest(&text)),
        [
            "a: unsupported quant 'q2'",
            "a: unsupported tier 'big'",
            "a: slices must be a non-empty list",
            "b: duplicate output_name a.vindex",
            "b: hf_repo must look like owner/name",
        ]
    );
}

#[test]
fn the_builtin_catalog_is_valid_and_complete() {
    let catalog = load(&[], |_| View::Default).unwrap();
    assert_eq!(catalog.entries.len(), 12);
    assert!(catalog.warnings.is_empty());
    assert_eq!(catalog.keys(Some(Tier::Moe)).len(), 7);
}

#[test]
fn the_template_is_a_valid_config() {
    let catalog = load(&[("skulk-weights.yaml", config::TEMPLATE)], |dir| {
        View::Config(dir.join("skulk-weights.yaml"))
    })
    .unwrap();
    assert_eq!(catalog.entries.len(), 12);
    assert!(catalog.warnings.is_empty());
}

#[test]
fn a_name_cannot_confuse_the_terminal() {
    let invalid = load_manifest(&manifest(&["key: \"a\\e[2J\\nb\""])).unwrap_err();
    let text = invalid.findings[0].to_string();
    assert!(
        text.contains(r"a\u{1b}[2J\nb: key must be lowercase"),
        "{text}"
    );
}

#[test]
fn of_very_many_findings_the_first_are_kept_and_all_errors_counted() {
    let text = format!(
        "models:\n- {{note: 1}}\n{}",
        "- {key: x, a: 1}\n".repeat(3 * KEPT_MAX)
    );
    let invalid = load_manifest(&text).unwrap_err();
    assert!(invalid.n_errors > 3 * KEPT_MAX);
    assert_eq!(invalid.findings.len(), 2 * KEPT_MAX);
    assert!(
        invalid
            .to_string()
            .ends_with("errors; the first 500 are shown"),
        "{invalid}"
    );
}

#[test]
fn what_a_file_holds_reaches_no_terminal_as_it_is() {
    let text = "models:\n- key: a\n  hf_repo: \"\\e[31m\\u202Eacme\"\n";
    for finding in load_manifest(text).unwrap_err().findings {
        let shown = finding.to_string().replace('\n', "");
        assert!(!shown.contains(crate::name::is_invisible), "{shown:?}");
    }
}
