//! Recorded prompts of `transformers`, and what a hostile template may not do.

use super::*;

use std::path::Path;

use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
struct Recorded {
    now: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    messages: Vec<Json>,
    tools: Option<Vec<Json>>,
    add_generation_prompt: bool,
    bos_token: String,
    eos_token: String,
    kwargs: Map<String, Json>,
    output: Option<String>,
    error: Option<RecordedError>,
}

#[derive(Deserialize)]
struct RecordedError {
    message: String,
}

/// The recorded clock, 2025-01-15 12:34:56.
const CLOCK: i64 = 1_736_944_496;

#[test]
fn recorded_conversations_become_the_recorded_prompts() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/chat");
    let recorded = std::fs::read_to_string(dir.join("chat.json")).unwrap();
    let recorded: Recorded = serde_json::from_str(&recorded).unwrap();
    assert_eq!(recorded.now, Civil::at(CLOCK).format("%FT%T"));
    assert_eq!(recorded.cases.len(), 24);
    for case in recorded.cases {
        let source = std::fs::read_to_string(dir.join("templates").join(&case.template)).unwrap();
        let template = ChatTemplate::new(&source, &case.bos_token, &case.eos_token).unwrap();
        let rendered = template.render(&Conversation {
            messages: &case.messages,
            tools: case.tools.as_deref(),
            documents: None,
            add_generation_prompt: case.add_generation_prompt,
            kwargs: &case.kwargs,
            now_seconds: CLOCK,
        });
        let what = format!("{} {}", case.template, case.conversation);
        match (rendered, case.output, case.error) {
            (Ok(text), Some(expected), None) => assert_eq!(text, expected, "{what}"),
            (Err(ChatError::Refused(said)), None, Some(expected)) => {
                assert_eq!(said, expected.message, "{what}");
            }
            (rendered, ..) => panic!("{what}: {rendered:?}"),
        }
    }
}

fn render(source: &str, kwargs: Json) -> Result<String, ChatError> {
    let Json::Object(kwargs) = kwargs else {
        panic!("kwargs are an object");
    };
    ChatTemplate::new(source, "<s>", "</s>")?.render(&Conversation {
        messages: &[json!({"role": "user", "content": "Hi"})],
        tools: None,
        documents: None,
        add_generation_prompt: true,
        kwargs: &kwargs,
        now_seconds: CLOCK,
    })
}

#[test]
fn what_transformers_adds_to_jinja_is_there() {
    let rendered = |source: &str| render(source, json!({"x": true, "s": "a b"})).unwrap();
    assert_eq!(
        rendered("{{ x }} {{ none }} {{ missing }} {{ [1, 'a'] }}"),
        "True None  [1, 'a']"
    );
    assert_eq!(
        rendered("{{ tools is none }}{{ documents is none }}"),
        "TrueTrue"
    );
    assert_eq!(rendered("{{ bos_token }}{{ eos_token }}"), "<s></s>");
    assert_eq!(rendered("{{ strftime_now('%d %b %Y') }}"), "15 Jan 2025");
    assert_eq!(rendered("{{ s.split(' ')[-1] }}{{ s.upper() }}"), "bA B");
    assert_eq!(
        rendered(
            "{% for m in messages %}\n  {% generation %}\n{{ m.content }}!\n  {% endgeneration %}\n{% endfor %}"
        ),
        "Hi!\n"
    );
    assert_eq!(
        rendered("a\n  {%- generation -%}\n b {%- endgeneration +%}\nc"),
        "ab\nc"
    );
    assert_eq!(
        rendered(
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        ),
        "013"
    );
    assert_eq!(
        rendered(
            "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"
        ),
        "3"
    );
    assert_eq!(
        rendered("{{ messages[0].content is string }}{{ messages[0] is mapping }}"),
        "TrueTrue"
    );
    assert_eq!(
        rendered("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"),
        "role=user;content=Hi;"
    );
}

#[test]
fn what_newer_templates_ask_of_jinja_is_there() {
    let rendered = |source: &str| render(source, json!({})).unwrap();
    // A macro that is there before the one it calls.
    assert_eq!(
        rendered(
            "{% macro a(x) %}{{ b(x, quotes=False) }}{% endmacro %}\
             {% macro b(x, quotes=True) %}{{ '<' + x + '>' if quotes else x }}{% endmacro %}{{ a('k') }}{{ b('k') }}"
        ),
        "k<k>"
    );
    // One that calls itself, on whatever a tool's schema holds.
    assert_eq!(
        rendered(
            "{% macro d(x) %}{% if x is mapping %}{ {%- for k, v in x | dictsort %}{{ k }}:{{ d(v) }}\
             {{ ',' if not loop.last }}{% endfor -%} }{% elif x is boolean %}{{ 'yes' if x else 'no' }}\
             {% elif x is string %}\"{{ x }}\"{% elif x is sequence %}[{% for i in x %}{{ d(i) }}\
             {% if not loop.last %},{% endif %}{% endfor %}]{% else %}{{ x }}{% endif %}{% endmacro %}\
             {{ d({'b': [1, 'a'], 'a': {'z': true}}) }}"
        ),
        r#"{a:{z:yes},b:[1,"a"]}"#
    );
    assert_eq!(
        rendered("{% for k, v in {'B': 1, 'a': 2} | dictsort %}{{ k }}{% endfor %}"),
        "aB"
    );
    assert_eq!(
        rendered("{{ ['string', 'null'] | map('upper') | list }}"),
        "['STRING', 'NULL']"
    );
    assert_eq!(
        rendered("{{ 'response' in {'response': 1} }}{{ messages[1:] }}"),
        "True[]"
    );
    assert_eq!(
        rendered(
            "{% if not flag | default(false) %}off{% endif %}{{ 'a' + missing | default('b') + 'c' }}"
        ),
        "offabc"
    );
    assert_eq!(
        rendered(
            "{% set v = {'type': 'string'} %}{{ v['type'] | upper == 'STRING' }}{{ 'n' if v['nullable'] else '-' }}"
        ),
        "True-"
    );
    assert_eq!(
        rendered(
            "{% set ns = namespace(r='') %}{% for part in 'x<b>y<e> z'.split('<e>') %}\
             {% set ns.r = ns.r + part.split('<b>')[0] %}{% endfor %}{{ ns.r | trim }}"
        ),
        "x z"
    );
}

#[test]
fn templates_that_are_broken_or_hostile_fail_with_a_reason() {
    assert!(matches!(
        render("{% if %}", json!({})),
        Err(ChatError::Template(_))
    ));
    assert!(matches!(
        render("{{ missing.field }}", json!({})),
        Err(ChatError::Failed(_))
    ));
    assert!(matches!(
        render("{% include 'x' %}", json!({})),
        Err(ChatError::Failed(_))
    ));
    let endless =
        "{% for i in range(100000) %}{% for j in range(100000) %}{{ j }}{% endfor %}{% endfor %}";
    assert!(matches!(
        render(endless, json!({})),
        Err(ChatError::Failed(_))
    ));
    let deep = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert!(matches!(render(deep, json!({})), Err(ChatError::Failed(_))));
    let refused = render(
        "{% macro f() %}{{ raise_exception('no ' ~ 1) }}{% endmacro %}{{ f() }}",
        json!({}),
    );
    assert!(matches!(refused, Err(ChatError::Refused(said)) if said == "no 1"));
}
