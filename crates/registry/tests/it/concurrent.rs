//! Several writers at once, at one server and at two over the same folder.

use futures::future::join_all;
use registry::Options;
use serde_json::{Value, json};

use crate::kit::{Hub, file, noise, send};

#[tokio::test(flavor = "multi_thread")]
async fn of_several_commits_on_one_parent_one_wins() {
    let hub = Hub::with_repo(Options::default()).await;
    let parent = hub.head_commit().await;
    let commits = (0..12).map(|i| {
        let hub = &hub;
        let header = json!({"summary": format!("{i}"), "parentCommit": parent});
        async move { hub.commit(header, &[file(&format!("{i}.txt"), b"x")]).await }
    });
    let answers = join_all(commits).await;
    let won: Vec<_> = answers
        .iter()
        .filter(|answer| answer.status == 200)
        .collect();
    assert_eq!(won.len(), 1);
    let head = hub.head_commit().await;
    assert_eq!(won[0].json()["commitOid"], head.as_str());
    for answer in answers.iter().filter(|answer| answer.status != 200) {
        assert_eq!(
            answer.refusal(),
            format!(
                "412  | main is at {head}, not at the expected parent {parent}; read the branch again and repeat the commit"
            )
        );
    }
    assert_eq!(hub.files().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_parent_all_land_even_through_two_servers() {
    let hub = Hub::with_repo(Options::default()).await;
    let second = registry::spawn(hub.dir.path(), Options::default()).unwrap();
    let urls = [hub.running.url().to_owned(), second.url().to_owned()];
    let commits = (0..40).map(|i| {
        let header = json!({"key": "header", "value": {"summary": format!("{i}")}});
        let body = format!(
            "{header}\n{}",
            file(&format!("{i:02}.txt"), format!("{i}").as_bytes())
        );
        send(
            hub.client
                .post(format!("{}/api/models/me/model/commit/main", urls[i % 2]))
                .body(body),
        )
    });
    for answer in join_all(commits).await {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(
        hub.files().await,
        (0..40).map(|i| format!("{i:02}.txt")).collect::<Vec<_>>()
    );
    assert_eq!(
        hub.get("/api/models/me/model/commits/main")
            .await
            .json()
            .as_array()
            .unwrap()
            .len(),
        41
    );
    assert!(hub.unfinished().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_name_is_made_once() {
    let hub = Hub::new(Options::default());
    let body = json!({"name": "x", "organization": "me"});
    let answers = join_all((0..8).map(|_| hub.post("/api/repos/create", &body))).await;
    let mut statuses: Vec<u16> = answers
        .iter()
        .map(|answer| answer.status.as_u16())
        .collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 409, 409, 409, 409, 409, 409, 409]);
    let body = json!({"title": "t", "namespace": "me"});
    let answers = join_all((0..8).map(|_| hub.post("/api/collections", &body))).await;
    assert_eq!(
        answers.iter().filter(|answer| answer.status == 200).count(),
        1
    );
    let slugs: Vec<Value> = answers
        .iter()
        .map(|answer| answer.json()["slug"].clone())
        .collect();
    assert!(slugs.iter().all(|slug| slug == &slugs[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_object_may_come_twice_at_once() {
    let hub = Hub::with_repo(Options::default()).await;
    let content = noise(200_000, 9);
    let offers = join_all((0..6).map(|_| hub.batch(&content, &["basic"]))).await;
    let puts = offers
        .iter()
        .map(|offer| hub.put(&offer["actions"]["upload"]["href"], content.clone()));
    assert!(
        join_all(puts)
            .await
            .iter()
            .all(|answer| answer.status == 200)
    );
    assert_eq!((hub.n_blobs(), hub.unfinished().len()), (1, 0));
}
