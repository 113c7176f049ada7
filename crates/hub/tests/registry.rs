//! The client against the registry: from an empty folder to files read back.

use std::path::Path;

use hub::{
    Addition, CommitRequest, Content, Created, Downloaded, Error, Filed, Hub, RepoId, Right, Role,
    Settings, Token,
};
use registry::{Options, Running};

const TOKEN: &str = "hf_registry_token";
/// A name that means something else unless each part of it is encoded.
const ODD: &str = "d #1?/50% ä+b&c=%2F;~.txt";

fn registry(root: &Path) -> Running {
    let options = Options {
        token: Some(TOKEN.to_owned()),
        user: "ann".to_owned(),
        multipart_threshold_bytes: 2 << 20,
        part_bytes: 1 << 20,
        ..Options::default()
    };
    registry::spawn(root, options).unwrap()
}

fn client(running: &Running, token: &str) -> Hub {
    let settings = Settings {
        endpoint: running.url().to_owned(),
        token: Token::new(token),
        chunk_bytes: 600_000,
        ..Settings::default()
    };
    Hub::new(settings).unwrap()
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn addition(path: &str, content: Content, size_bytes: usize) -> Addition {
    Addition {
        path: path.to_owned(),
        content,
        sha256: None,
        size_bytes: size_bytes as u64,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_made_filled_filed_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let running = registry(&dir.path().join("registry"));
    let hub = client(&running, TOKEN);
    let repo: RepoId = "lab/model".parse().unwrap();

    let me = hub.whoami().await.unwrap();
    assert_eq!((me.name.as_str(), &me.role), ("ann", &Some(Role::Write)));
    assert_eq!(me.can_write("lab"), Right::Yes);

    assert!(matches!(
        hub.model_info(&repo, None).await,
        Err(Error::RepoNotFound { .. })
    ));
    assert_eq!(
        hub.create_repo(&repo, false).await.unwrap(),
        Created::Created
    );
    assert_eq!(
        hub.create_repo(&repo, true).await.unwrap(),
        Created::Existed
    );

    // One object in one piece, one in parts, one small file, one card.
    let (basic, parts) = (bytes(1_500_000), bytes(3_300_000));
    let mut additions = Vec::new();
    for (path, bytes) in [("basic.gguf", &basic), ("parts.gguf", &parts)] {
        let local = dir.path().join(path);
        std::fs::write(&local, bytes).unwrap();
        additions.push(addition(path, Content::File(local), bytes.len()));
    }
    let card = "---\nlicense: mit\ntags:\n- vindex\n---\n# Model\n";
    hub.validate_card(card).await.unwrap();
    additions.push(addition(
        "README.md",
        Content::Bytes(card.into()),
        card.len(),
    ));
    additions.push(addition(ODD, Content::Bytes(b"odd".to_vec()), 3));
    additions.push(addition("d/index.json", Content::Bytes(b"{}".to_vec()), 2));
    let mut request = CommitRequest {
        summary: "Publish".to_owned(),
        additions,
        deletions: Vec::new(),
    };
    let report = hub.commit(&repo, &request, &|_| ()).await.unwrap();
    assert_eq!(report.uploaded.len(), 5);
    let commit = report.commit.clone().unwrap();

    let info = hub.model_info(&repo, None).await.unwrap();
    assert_eq!(info.sha, Some(commit.clone()));
    assert_eq!(info.card_data["license"], "mit");

    // The same again changes and sends nothing; without a file, only that one goes.
    let sent = running.stats().sum("PUT ").received_bytes;
    let again = hub.commit(&repo, &request, &|_| ()).await.unwrap();
    assert_eq!(
        (again.commit, again.uploaded.len(), again.skipped.len()),
        (None, 0, 5)
    );
    assert_eq!(running.stats().sum("PUT ").received_bytes, sent);
    request
        .deletions
        .push(request.additions.pop().unwrap().path);
    let second = hub.commit(&repo, &request, &|_| ()).await.unwrap();
    assert_eq!((second.deleted.len(), second.skipped.len()), (1, 4));
    assert_ne!(second.commit.unwrap(), commit);

    // The first commit is still what it was.
    let snapshot = hub.snapshot(&repo, Some(commit.as_str())).await.unwrap();
    assert_eq!(snapshot.read_file("d/index.json", 100).await.unwrap(), "{}");
    assert_eq!(snapshot.read_file(ODD, 100).await.unwrap(), "odd");
    assert_eq!(
        snapshot
            .read_range("parts.gguf", 1_000_000..2_100_000)
            .await
            .unwrap(),
        parts[1_000_000..2_100_000]
    );
    for (path, bytes) in [("basic.gguf", &basic), ("parts.gguf", &parts)] {
        let target = dir.path().join(format!("{path}.back"));
        let done = snapshot.download(path, &target, &|_| ()).await.unwrap();
        assert_eq!(
            done,
            Downloaded::Fetched {
                bytes: bytes.len() as u64
            }
        );
        assert!(std::fs::read(&target).unwrap() == *bytes);
    }

    let made = hub
        .create_collection("lab", "Weights", Some("All of them"), false)
        .await
        .unwrap();
    assert_eq!(
        hub.add_to_collection(&made.slug, &repo, None)
            .await
            .unwrap(),
        Filed::Added
    );
    assert_eq!(
        hub.add_to_collection(&made.slug, &repo, None)
            .await
            .unwrap(),
        Filed::AlreadyThere
    );
    assert_eq!(
        hub.collection(&made.slug).await.unwrap().items,
        ["lab/model"]
    );
    let listed = hub.collections("lab").await.unwrap();
    assert_eq!(
        listed.iter().map(|c| c.title.as_str()).collect::<Vec<_>>(),
        ["Weights"]
    );
    assert!(hub.collections("nobody").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_wrong_token_is_told_from_a_missing_repository() {
    let dir = tempfile::tempdir().unwrap();
    let running = registry(dir.path());
    let repo: RepoId = "lab/model".parse().unwrap();
    let error = client(&running, "hf_wrong").whoami().await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    let error = client(&running, "hf_wrong")
        .create_repo(&repo, false)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    let error = client(&running, TOKEN)
        .snapshot(&repo, None)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::RepoNotFound { .. }), "{error}");
    client(&running, TOKEN)
        .create_repo(&repo, true)
        .await
        .unwrap();
    let error = client(&running, TOKEN)
        .snapshot(&repo, Some("v9"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::RevisionNotFound { .. }), "{error}");
    let error = client(&running, "")
        .snapshot(&repo, None)
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::RepoNotFound { .. } | Error::Unauthorized { .. }
        ),
        "{error}"
    );
}
