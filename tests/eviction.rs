//! Eviction policies over real dumps: what they keep, and what attention makes of it.

use gearbox::dump::{Dump, Selection};
use gearbox::evict::{Replay, ReplayOptions, replay};
use gearbox_core::{AnyEntry, Kind};
use serde_json::{Value, json};

use crate::run::{json, shared, stderr, text};

const IDS: [&str; 6] = ["h2o", "none", "random", "snapkv", "tova", "window"];

fn replayed(id: &str, settings: &Value, name: &str) -> Option<Replay> {
    let path = shared()?.join("data/dumps/fp16").join(name);
    let registry = gearbox_plugins::registry().unwrap();
    let policy = registry.eviction(id).unwrap().build(settings).unwrap();
    let dump = Dump::open(&path, &Selection::default()).unwrap();
    Some(replay(id, &*policy, &[dump], ReplayOptions { step: 128 }).unwrap())
}

#[test]
fn policies_are_registered() {
    let registry = gearbox_plugins::registry().unwrap();
    let ids: Vec<_> = registry.entries().filter(|entry| entry.kind() == Kind::Eviction).map(AnyEntry::id).collect();
    assert_eq!(ids, IDS);
}

#[test]
fn without_eviction_attention_is_exact() {
    let Some(found) = replayed("none", &json!({}), "demo_prompt_512_1") else { return };
    assert_eq!((found.all.cut, found.kept_fraction), (0, 1.0));
    assert_eq!((found.all.kept_mass, found.all.output_error, found.all.read_ratio), (1.0, 0.0, 1.0));
    assert!(found.all.queries > 0 && found.all.undefined == 0);
}

/// At the same number of tokens, what attention looked at is worth more than what chance picks.
#[test]
fn scores_are_better_than_chance_on_a_long_prompt() {
    for ratio in [2.0, 4.0] {
        let settings = json!({ "target_ratio": ratio, "recent_fraction": 0.25 });
        let Some(random) = replayed("random", &settings, "demo_prompt_2048_1") else { return };
        for id in ["h2o", "snapkv"] {
            let Some(found) = replayed(id, &settings, "demo_prompt_2048_1") else { return };
            let kept = |replay: &Replay| replay.layers.iter().map(|row| (row.kept, row.peak)).collect::<Vec<_>>();
            assert_eq!(kept(&found), kept(&random), "the same budget");
            assert_eq!(found.all.cut, random.all.cut);
            let (error, chance) = (found.all.output_error, random.all.output_error);
            assert!(error < chance, "{id}, ratio {ratio}: {error} and by chance {chance}");
            assert!(found.all.kept_mass > random.all.kept_mass);
        }
        let seen = random.layers[0].tokens;
        assert!(random.layers.iter().all(|row| row.kept as f64 * ratio <= seen as f64));
    }
}

#[test]
fn command_decides_as_the_reference() {
    let policy = json!({
        "id": "h2o", "mode": "reference", "block_tokens": 32, "sinks": 16, "recent_tokens": 96, "target_ratio": 3.5,
    });
    let found = json(&["evict", "--policy", &policy.to_string(), "--tokens", "384"]);
    let expected = json!({ "floor": 128, "target": 110, "q": 128, "dominated": true, "kept": 384 });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(found[key], *value, "{key}");
    }
    assert_eq!(found["policy"]["ema"], 0.9);
    let folder = tempfile::tempdir().unwrap();
    let scores = folder.path().join("scores.json");
    std::fs::write(&scores, "[0.1, 0.2, 0.9, 0.2, 0.3, 0.1]").unwrap();
    let policy =
        json!({ "id": "h2o", "budget_tokens": 3, "sinks": 1, "recent_tokens": 1, "min_tokens": 1 }).to_string();
    let arguments = ["evict", "--policy", &policy, "--tokens", "6", "--scores", text(&scores)];
    assert_eq!(json(&arguments)["heads"], json!([[0, 2, 5]]));
    let arguments = ["evict", "--policy", &policy, "--tokens", "7", "--scores", text(&scores)];
    assert!(stderr(&arguments, 2).contains("expected 7 scores, got 6"));
}

#[test]
fn command_replays_a_dump() {
    let Some(shared) = shared() else { return };
    let dump = shared.join("data/dumps/fp16/demo_prompt_512_1");
    let arguments = ["evict", "--policy", "window", "--dump", text(&dump)];
    let found = json(&arguments);
    assert_eq!(found["policy"]["id"], "window");
    assert_eq!(found["layers"].as_array().unwrap().len(), 6);
    assert_eq!(found["heads"].as_array().unwrap().len(), 24);
    assert_eq!(found["worst"]["output_error"], {
        let errors = found["heads"].as_array().unwrap().iter().map(|head| head["output_error"].as_f64().unwrap());
        json!(errors.fold(0.0, f64::max))
    });
}

#[test]
fn budgets_that_cannot_be_met_are_refused_with_what_can() {
    let refused =
        stderr(&["evict", "--policy", r#"{"id": "h2o", "sinks": 64, "min_tokens": 300}"#, "--tokens", "9"], 2);
    assert!(refused.contains("achievable is a ratio of 2.3438"), "{refused}");
}
