//! Every route once: what it answers, and how it refuses.

use registry::{Error, Options, Registry, serve};
use reqwest::Method;
use serde_json::{Value, json};

use crate::kit::{Hub, file, lfs_file, noise, send};

fn with_token() -> Options {
    Options {
        token: Some("secret".to_owned()),
        ..Options::default()
    }
}

#[tokio::test]
async fn repositories_are_made_moved_and_deleted() {
    let hub = Hub::with_repo(Options::default()).await;
    let again = hub
        .post(
            "/api/repos/create",
            &json!({"name": "model", "organization": "me", "private": false}),
        )
        .await;
    assert_eq!(
        again.refusal(),
        "409  | repository models/me/model already exists"
    );
    assert_eq!(again.json()["url"], hub.url("/me/model"));
    let data = hub
        .post(
            "/api/repos/create",
            &json!({"name": "d", "type": "dataset", "visibility": "private"}),
        )
        .await;
    assert_eq!(data.json()["url"], hub.url("/datasets/local/d"));
    assert_eq!(
        hub.get("/api/datasets/local/d").await.json()["private"],
        true
    );
    let moved = json!({"fromRepo": "me/model", "toRepo": "you/other", "type": "model"});
    assert_eq!(hub.post("/api/repos/move", &moved).await.status, 200);
    assert_eq!(
        hub.post("/api/repos/move", &moved).await.refusal(),
        "404 RepoNotFound | Repository not found: models/me/model"
    );
    assert_eq!(
        hub.get("/api/models/you/other").await.json()["id"],
        "you/other"
    );
    let names = |list: Value| {
        list.as_array()
            .unwrap()
            .iter()
            .map(|r| r["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        names(hub.get("/api/models?author=you").await.json()),
        ["you/other"]
    );
    assert!(names(hub.get("/api/models?author=me").await.json()).is_empty());
    let delete = hub
        .request(Method::DELETE, "/api/repos/delete")
        .json(&json!({"name": "other", "organization": "you"}));
    assert_eq!(send(delete.try_clone().unwrap()).await.status, 200);
    assert_eq!(send(delete).await.status, 404);
    let me = hub.get("/api/whoami-v2").await.json();
    assert_eq!(
        me["auth"]["accessToken"]["fineGrained"]["global"],
        json!(["repo.write"])
    );
    let orgs = me["orgs"].clone();
    assert_eq!(
        orgs.as_array()
            .unwrap()
            .iter()
            .map(|org| &org["name"])
            .collect::<Vec<_>>(),
        ["me", "you"]
    );
    assert!(hub.unfinished().is_empty());
}

#[tokio::test]
async fn commits_add_delete_and_keep_the_past() {
    let hub = Hub::with_repo(Options::default()).await;
    let first = hub.commit_file("a/b.txt", b"one").await;
    let object = noise(5000, 1);
    hub.upload(&object).await;
    let lines = [
        lfs_file("m.gguf", &object),
        file("a/c.txt", b"two"),
        json!({"key": "deletedFile", "value": {"path": "a/b.txt"}}),
    ];
    let answer = hub
        .commit(
            json!({"summary": "t", "description": "d", "parentCommit": &first[..7]}),
            &lines,
        )
        .await;
    let second = answer.json()["commitOid"].as_str().unwrap().to_owned();
    assert_eq!(
        answer.json()["commitUrl"],
        hub.url(&format!("/me/model/commit/{second}"))
    );
    assert_eq!(hub.files().await, ["a/c.txt", "m.gguf"]);
    assert_eq!(
        hub.get(&format!("/me/model/resolve/{first}/a/b.txt"))
            .await
            .body,
        b"one"
    );
    let log = hub.get("/api/models/me/model/commits/main").await.json();
    assert_eq!(log[0]["id"], second.as_str());
    assert_eq!(
        (&log[0]["title"], &log[0]["message"]),
        (&json!("t"), &json!("d"))
    );
    assert_eq!(log[1]["id"], first.as_str());
    assert_eq!(log[2]["title"], "initial commit");
    let page = hub.get("/api/models/me/model/commits/main?limit=2").await;
    let next = page
        .header("link")
        .trim_start_matches('<')
        .split('>')
        .next()
        .unwrap()
        .to_owned();
    let rest = send(hub.client.get(next)).await.json();
    assert_eq!(rest.as_array().unwrap().len(), 1);
    let folder = [json!({"key": "deletedFolder", "value": {"path": "a/"}})];
    assert_eq!(
        hub.commit(json!({"summary": "x"}), &folder).await.status,
        200
    );
    assert_eq!(hub.files().await, ["m.gguf"]);
    let head = hub.head_commit().await;
    let gone = hub.commit(json!({"summary": "x"}), &folder).await;
    assert_eq!(
        gone.refusal(),
        format!("404 EntryNotFound | Entry not found: a/ does not exist in commit {head}")
    );
    assert_eq!(hub.head_commit().await, head);
}

#[tokio::test]
async fn files_come_whole_or_in_ranges() {
    let hub = Hub::with_repo(Options::default()).await;
    let object = noise(1_000_000, 2);
    hub.upload(&object).await;
    hub.commit(
        json!({"summary": "x"}),
        &[
            lfs_file("d/m.bin", &object),
            file("t.txt", b"hello\n"),
            file("e", b""),
        ],
    )
    .await;
    let commit = hub.head_commit().await;
    let sha = crate::kit::sha256(&object);
    let head = send(hub.request(Method::HEAD, "/me/model/resolve/main/d/m.bin")).await;
    assert_eq!(head.status, 200);
    assert_eq!(head.header("x-repo-commit"), commit);
    assert_eq!(head.header("etag"), format!("\"{sha}\""));
    assert_eq!(head.header("x-linked-etag"), format!("\"{sha}\""));
    assert_eq!(
        (head.header("x-linked-size"), head.header("content-length")),
        ("1000000", "1000000")
    );
    assert_eq!(head.header("accept-ranges"), "bytes");
    let text = send(hub.request(Method::HEAD, "/me/model/resolve/main/t.txt")).await;
    assert_eq!(
        text.header("etag"),
        "\"ce013625030ba8dba906f756967f9e9ca394464a\""
    );
    assert_eq!(
        (
            text.header("x-linked-etag"),
            text.header("x-linked-size"),
            text.header("content-length")
        ),
        ("", "", "6")
    );
    let before = hub.running.stats().sum("/resolve/");
    let ranged = |range: &'static str| {
        send(
            hub.request(Method::GET, "/me/model/resolve/main/d/m.bin")
                .header("Range", range),
        )
    };
    for (range, start, end) in [
        ("bytes=0-0", 0, 1),
        ("bytes=70000-199999", 70_000, 200_000),
        ("bytes=-7", 999_993, 1_000_000),
    ] {
        let part = ranged(range).await;
        assert_eq!(
            (part.status.as_u16(), &part.body[..]),
            (206, &object[start..end]),
            "{range}"
        );
        assert_eq!(
            part.header("content-range"),
            format!("bytes {start}-{}/1000000", end - 1)
        );
    }
    let sent = hub.running.stats().sum("/resolve/").sent_bytes - before.sent_bytes;
    assert_eq!(sent, 1 + 130_000 + 7);
    let beyond = ranged("bytes=1000000-").await;
    assert_eq!(
        (beyond.status.as_u16(), beyond.header("content-range")),
        (416, "bytes */1000000")
    );
    assert_eq!(ranged("bytes=0-1,5-6").await.body, object);
    let known = hub
        .request(Method::GET, "/me/model/resolve/main/t.txt")
        .header("If-None-Match", text.header("etag"));
    assert_eq!(send(known).await.status, 304);
    let other = hub
        .request(Method::GET, "/me/model/resolve/main/t.txt")
        .header("Range", "bytes=1-")
        .header("If-Range", "\"x\"");
    assert_eq!(send(other).await.body, b"hello\n");
    assert_eq!(hub.get("/me/model/resolve/main/e").await.body, b"");
    let missing = hub.get("/me/model/resolve/main/nowhere").await;
    assert_eq!(
        missing.refusal(),
        format!("404 EntryNotFound | Entry not found: nowhere does not exist in commit {commit}")
    );
    assert_eq!(missing.header("x-repo-commit"), commit);
    assert!(
        hub.get("/me/model/resolve/nope/t.txt")
            .await
            .refusal()
            .starts_with("404 RevisionNotFound | ")
    );
    assert!(
        hub.get("/me/no/resolve/main/t.txt")
            .await
            .refusal()
            .starts_with("404 RepoNotFound | ")
    );
}

#[tokio::test]
async fn trees_and_paths() {
    let hub = Hub::with_repo(Options::default()).await;
    hub.commit(
        json!({"summary": "x"}),
        &[
            file("a/b/c.txt", b"1"),
            file("a/d.txt", b"22"),
            file("e f+ü.txt", b"333"),
        ],
    )
    .await;
    let paths = |list: &Value| {
        list.as_array()
            .unwrap()
            .iter()
            .map(|e| e["path"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let top = hub.get("/api/models/me/model/tree/main").await.json();
    assert_eq!(paths(&top), ["a", "e f+ü.txt"]);
    assert_eq!(
        (&top[0]["type"], &top[1]["size"]),
        (&json!("directory"), &json!(3))
    );
    let all = hub
        .get("/api/models/me/model/tree/main?recursive=true&expand=True")
        .await
        .json();
    assert_eq!(
        paths(&all),
        ["a", "a/b", "a/b/c.txt", "a/d.txt", "e f+ü.txt"]
    );
    assert_eq!(all[2]["lastCommit"]["title"], "x");
    assert_eq!(
        paths(&hub.get("/api/models/me/model/tree/main/a%2Fb").await.json()),
        ["a/b/c.txt"]
    );
    let page = hub
        .get("/api/models/me/model/tree/main?recursive=1&limit=3")
        .await;
    let next = page
        .header("link")
        .trim_start_matches('<')
        .split('>')
        .next()
        .unwrap()
        .to_owned();
    assert_eq!(
        paths(&send(hub.client.get(next)).await.json()),
        ["a/d.txt", "e f+ü.txt"]
    );
    let info = hub
        .post(
            "/api/models/me/model/paths-info/main",
            &json!({"paths": ["e f+ü.txt", "a", "no"]}),
        )
        .await;
    assert_eq!(paths(&info.json()), ["e f+ü.txt", "a"]);
    let form = hub.request(Method::POST, "/api/models/me/model/paths-info/main");
    let form = form.header("content-type", "application/x-www-form-urlencoded");
    let info = send(form.body("paths=a%2Fd.txt&paths=no&expand=true"))
        .await
        .json();
    assert_eq!(
        (paths(&info), &info[0]["lastCommit"]["title"]),
        (vec!["a/d.txt".to_owned()], &json!("x"))
    );
    assert_eq!(
        hub.get("/me/model/resolve/main/e%20f%2B%C3%BC.txt")
            .await
            .body,
        b"333"
    );
}

#[tokio::test]
async fn branches_tags_and_refs() {
    let hub = Hub::with_repo(Options::default()).await;
    let commit = hub.commit_file("a", b"1").await;
    let branch = |name: &str| format!("/api/models/me/model/branch/{name}");
    assert_eq!(hub.post(&branch("x%2Fy"), &json!({})).await.status, 200);
    assert_eq!(
        hub.post(&branch("x%2Fy"), &json!({})).await.refusal(),
        "409  | branch x/y already exists"
    );
    let nowhere = hub
        .post(&branch("z"), &json!({"startingPoint": "nope"}))
        .await;
    assert!(nowhere.refusal().starts_with("404 RevisionNotFound | "));
    assert!(
        hub.post(&branch("a..b"), &json!({}))
            .await
            .refusal()
            .starts_with("400  | branch or tag name: ")
    );
    assert_eq!(
        hub.post(
            &format!("/api/models/me/model/tag/{commit}"),
            &json!({"tag": "v1"})
        )
        .await
        .status,
        200
    );
    assert_eq!(
        hub.post("/api/models/me/model/tag/main", &json!({"tag": "v1"}))
            .await
            .status,
        409
    );
    let refs = hub.get("/api/models/me/model/refs").await.json();
    assert_eq!(
        refs["branches"][1],
        json!({"name": "x/y", "ref": "refs/heads/x/y", "targetCommit": commit})
    );
    assert_eq!(
        refs["tags"],
        json!([{"name": "v1", "ref": "refs/tags/v1", "targetCommit": commit}])
    );
    for revision in [
        "v1",
        "x%2Fy",
        "refs%2Fheads%2Fx%2Fy",
        "refs%2Ftags%2Fv1",
        &commit,
    ] {
        assert_eq!(
            hub.get(&format!("/api/models/me/model/revision/{revision}"))
                .await
                .json()["sha"],
            commit.as_str()
        );
    }
    let delete = async |path: String| {
        send(hub.request(Method::DELETE, &path))
            .await
            .status
            .as_u16()
    };
    assert_eq!(delete(branch("x%2Fy")).await, 200);
    assert_eq!(delete(branch("x%2Fy")).await, 404);
    assert_eq!(delete(branch("main")).await, 403);
    assert_eq!(delete("/api/models/me/model/tag/v1".to_owned()).await, 200);
}

#[tokio::test]
async fn cards_give_data_and_tags() {
    let hub = Hub::with_repo(Options::default()).await;
    hub.commit_file(
        "README.md",
        b"---\nlicense: mit\nbase_model: x/y\nlist: [1, a]\n---\nText",
    )
    .await;
    let info = hub.get("/api/models/me/model").await.json();
    assert_eq!(
        info["cardData"],
        json!({"license": "mit", "base_model": "x/y", "list": [1, "a"]})
    );
    assert_eq!(info["tags"], json!(["base_model:x/y", "license:mit"]));
    let check = async |content: &str| {
        hub.post(
            "/api/validate-yaml",
            &json!({"content": content, "repoType": "model"}),
        )
        .await
    };
    let good = check("---\nlicense: mit\n---\n").await;
    assert_eq!(
        (good.status.as_u16(), good.json()),
        (200, json!({"errors": [], "warnings": []}))
    );
    let bad = check("---\nlicense: [3]\n---\n").await;
    assert_eq!(
        bad.refusal(),
        "400  | Invalid metadata in README.md: \"license\" must be a string or a list of strings"
    );
    assert_eq!(
        bad.json()["errors"][0]["message"],
        "\"license\" must be a string or a list of strings"
    );
    assert_eq!(
        check("no card").await.json()["warnings"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[tokio::test]
async fn collections_are_filed() {
    let hub = Hub::with_repo(Options::default()).await;
    let made = hub
        .post(
            "/api/collections",
            &json!({"title": "My list", "namespace": "me", "private": false}),
        )
        .await
        .json();
    let slug = made["slug"].as_str().unwrap().to_owned();
    assert!(
        slug.starts_with("me/my-list-") && slug.len() == "me/my-list-".len() + 24,
        "{slug}"
    );
    let again = hub
        .post(
            "/api/collections",
            &json!({"title": "My list", "namespace": "me"}),
        )
        .await;
    assert_eq!(
        (again.status.as_u16(), again.json()["slug"].as_str()),
        (409, Some(slug.as_str()))
    );
    let items = format!("/api/collections/{slug}/items");
    let item = json!({"item": {"id": "me/model", "type": "model"}, "note": "n"});
    let full = hub.post(&items, &item).await.json();
    assert_eq!(
        (&full["items"][0]["id"], &full["items"][0]["note"]["text"]),
        (&json!("me/model"), &json!("n"))
    );
    assert_eq!(hub.post(&items, &item).await.status, 409);
    let missing = hub
        .post(&items, &json!({"item": {"id": "me/none", "type": "model"}}))
        .await;
    assert_eq!(
        missing.refusal(),
        "404 RepoNotFound | Repository not found: models/me/none"
    );
    let listed = hub.get("/api/collections?owner=me&limit=1").await.json();
    assert!(listed[0].get("position").is_none() && listed[0]["items"][0]["position"] == 0);
    hub.post(
        "/api/repos/move",
        &json!({"fromRepo": "me/model", "toRepo": "me/moved"}),
    )
    .await;
    assert_eq!(
        hub.get(&format!("/api/collections/{slug}")).await.json()["items"][0]["id"],
        "me/moved"
    );
    send(
        hub.request(Method::DELETE, "/api/repos/delete")
            .json(&json!({"name": "me/moved"})),
    )
    .await;
    assert_eq!(
        hub.get(&format!("/api/collections/{slug}")).await.json()["items"],
        json!([])
    );
    assert_eq!(
        send(hub.request(Method::DELETE, &format!("/api/collections/{slug}")))
            .await
            .status,
        200
    );
    assert_eq!(
        hub.get(&format!("/api/collections/{slug}")).await.status,
        404
    );
}

#[tokio::test]
async fn without_the_token_nothing_is_written_and_nothing_private_is_seen() {
    let hub = Hub::with_repo(with_token()).await;
    hub.post(
        "/api/repos/create",
        &json!({"name": "hidden", "organization": "me", "visibility": "private"}),
    )
    .await;
    hub.commit_file("a.txt", b"a").await;
    assert_eq!(
        hub.anonymous("/me/model/resolve/main/a.txt").await.body,
        b"a"
    );
    let refused = hub.anonymous("/api/models/me/hidden").await;
    assert_eq!(
        refused.refusal(),
        "401 RepoNotFound | Repository not found: models/me/hidden"
    );
    assert_eq!(
        hub.anonymous("/api/models/me/none").await.refusal(),
        "401 RepoNotFound | Repository not found: models/me/none"
    );
    assert_eq!(
        hub.anonymous("/api/models")
            .await
            .json()
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(hub.anonymous("/api/whoami-v2").await.status, 401);
    for wrong in ["Bearer wrong", "Bearer ", "Basic c2VjcmV0", "secret"] {
        let answer = send(
            hub.client
                .get(hub.url("/api/models/me/model"))
                .header("Authorization", wrong),
        )
        .await;
        assert_eq!(
            answer.refusal(),
            "401  | Invalid credentials in Authorization header",
            "{wrong}"
        );
    }
    let writes = [
        (Method::POST, "/api/repos/create"),
        (Method::DELETE, "/api/repos/delete"),
        (Method::POST, "/api/repos/move"),
        (Method::PUT, "/api/models/me/model/settings"),
        (Method::POST, "/api/models/me/model/branch/b"),
        (Method::DELETE, "/api/models/me/model/branch/b"),
        (Method::POST, "/api/models/me/model/tag/main"),
        (Method::DELETE, "/api/models/me/model/tag/t"),
        (Method::POST, "/api/models/me/model/super-squash/main"),
        (Method::POST, "/api/models/me/model/preupload/main"),
        (Method::POST, "/api/models/me/model/commit/main"),
        (Method::POST, "/me/model.git/info/lfs/objects/batch"),
        (Method::POST, "/me/model.git/info/lfs/verify"),
        (Method::POST, "/api/collections"),
        (
            Method::PATCH,
            "/api/collections/me/x-000000000000000000000000",
        ),
        (
            Method::DELETE,
            "/api/collections/me/x-000000000000000000000000",
        ),
        (
            Method::POST,
            "/api/collections/me/x-000000000000000000000000/items",
        ),
        (
            Method::PATCH,
            "/api/collections/me/x-000000000000000000000000/items/1",
        ),
        (
            Method::DELETE,
            "/api/collections/me/x-000000000000000000000000/items/1",
        ),
    ];
    for (method, path) in writes {
        let answer = send(hub.client.request(method, hub.url(path)).body("{}")).await;
        assert_eq!(
            answer.refusal(),
            "401  | Invalid username or password.",
            "{path}"
        );
    }
    let settings = hub
        .request(Method::PUT, "/api/models/me/model/settings")
        .json(&json!({"gated": "manual"}));
    assert_eq!(send(settings).await.status, 200);
    assert!(
        hub.anonymous("/me/model/resolve/main/a.txt")
            .await
            .refusal()
            .starts_with("401 GatedRepo | Access to me/model")
    );
    assert_eq!(
        hub.anonymous("/api/models/me/model").await.json()["gated"],
        "manual"
    );
    assert_eq!(hub.get("/me/model/resolve/main/a.txt").await.body, b"a");
}

#[tokio::test]
async fn beyond_loopback_a_token_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let registry = Registry::open(dir.path()).unwrap();
    let refused = serve(
        registry,
        listener,
        Options::default(),
        std::future::pending(),
    )
    .await
    .unwrap_err();
    assert!(matches!(refused, Error::TokenRequired { .. }));
    assert!(refused.to_string().contains("without a token"));
}

#[tokio::test]
async fn what_is_not_served_says_so() {
    let hub = Hub::with_repo(Options::default()).await;
    let xet = hub.get("/api/models/me/model/xet-write-token/main").await;
    assert_eq!(xet.status, 404);
    assert!(xet.refusal().contains("does not serve"));
    assert_eq!(
        send(hub.request(Method::PUT, "/api/whoami-v2"))
            .await
            .status,
        405
    );
    let pr = hub
        .post(
            "/api/models/me/model/preupload/main?create_pr=1",
            &json!({"files": []}),
        )
        .await;
    assert!(
        pr.refusal()
            .starts_with("400  | this registry has no pull requests")
    );
    assert_eq!(
        hub.get("/api/agent-harnesses").await.json(),
        json!({"standardEnvVars": [], "harnesses": {}})
    );
}

#[tokio::test]
async fn a_folder_is_served_again_after_a_restart() {
    let hub = Hub::with_repo(Options::default()).await;
    let commit = hub.commit_file("a.txt", b"a").await;
    let Hub {
        running,
        dir,
        client,
        ..
    } = hub;
    running.stop();
    let running = registry::spawn(dir.path(), Options::default()).unwrap();
    let answer =
        send(client.get(format!("{}/me/model/resolve/{commit}/a.txt", running.url()))).await;
    assert_eq!(answer.body, b"a");
    std::fs::write(dir.path().join("registry.json"), "{}").unwrap();
    drop(running);
    assert!(matches!(
        Registry::open(dir.path()),
        Err(Error::Corrupt { .. })
    ));
}
