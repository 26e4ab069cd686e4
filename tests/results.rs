//! Results stores: sweeps that go on after a kill, shards, replays, and what the commands say.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use gearbox::dump::{Dump, Selection};
use gearbox::results::Store;
use gearbox::sweep::{Evaluator, Opened, Plan, SweepConfig, Unit};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::run::{c_library, gearbox, json as json_of, root, run, sample, stderr, stdout, text};

/// A folder with a sweep of some settings of `zstd`, one lossy pipeline and one that is not legal.
fn sweep_in(levels: &[u32]) -> (TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let config = json!({
        "dumps": [sample().canonicalize().unwrap()],
        "pipelines": [
            { "routes": [{ "codec": { "id": "zstd", "level": { "sweep": levels } } }], "chunking": { "mode": "aggregate" } },
            { "routes": [{ "transforms": [{ "id": "quant", "bits": 4 }], "codec": { "id": "zstd" } }] },
            { "routes": [{ "evict": { "id": "window" }, "codec": { "id": "store" } }] },
        ],
    });
    let path = folder.path().join("sweep.json");
    std::fs::write(&path, config.to_string()).unwrap();
    (folder, path)
}

/// Runs a sweep into a store.
fn sweep(config: &Path, store: &Path, more: &[&str]) -> Value {
    json_of(&[&["sweep", text(config), "--results", text(store)], more].concat())
}

fn diff(first: &Path, second: &Path, status: i32) -> String {
    String::from_utf8(run(&["results", "diff", text(first), text(second)], status).stdout).unwrap()
}

#[test]
fn sweep_reads_what_it_computed_before_and_ends_the_same() {
    let (folder, config) = sweep_in(&[1, 3]);
    let store = folder.path().join("a.db");
    let mut first = sweep(&config, &store, &[]);
    assert_eq!(first["resumed"]["computed"], 4);
    let mut again = sweep(&config, &store, &[]);
    assert_eq!((&again["resumed"]["computed"], &again["resumed"]["read"]), (&json!(0), &json!(4)));
    // Even times are those of the store, so rows, verdicts, canaries and the Pareto front are the same to the last digit.
    for sweep in [&mut first, &mut again] {
        sweep.as_object_mut().unwrap().remove("resumed");
    }
    assert_eq!(first, again);
    assert!(first["rows"][0]["pareto"].is_boolean() && first["rows"][0]["verdict"].is_object());

    let (_other, wider) = sweep_in(&[1, 3, 5]);
    let sweep_of = sweep(&wider, &store, &[]);
    assert_eq!((&sweep_of["resumed"]["computed"], &sweep_of["resumed"]["read"]), (&json!(1), &json!(4)));
    assert_eq!(sweep(&config, &store, &["--rerun"])["resumed"]["computed"], 4);
    assert_eq!(Store::read(&store).unwrap().len().unwrap(), 5, "nothing is doubled");
    let summary = stdout(&["sweep", text(&config), "--results", text(&store)]);
    assert!(summary.contains("0 units computed, 4 read"), "{summary}");
    assert!(
        stderr(&["sweep", "--results", text(&store), "--keep-containers", "--out", "x"], 2).contains("cannot be used")
    );
}

/// Starts a sweep and kills it when the store holds so many rows.
fn kill_at(config: &Path, store: &Path, rows: usize) {
    let program = gearbox();
    let mut command = std::process::Command::new(program.get_program());
    let arguments = ["sweep", text(config), "--results", text(store)];
    let mut child: Child =
        command.args(arguments).current_dir(root()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    let held = || store.exists().then(|| Store::read(store).ok()?.len().ok()).flatten().unwrap_or_default();
    while held() < rows && child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_mins(2), "{} rows", held());
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn killed_sweep_goes_on_and_ends_like_an_undisturbed_one() {
    let levels: Vec<u32> = (1..=12).collect();
    let (folder, config) = sweep_in(&levels);
    let (killed, whole) = (folder.path().join("killed.db"), folder.path().join("whole.db"));
    // Twice: while canaries and the first units run, and in the middle.
    kill_at(&config, &killed, 0);
    kill_at(&config, &killed, 5);
    let held = Store::read(&killed).unwrap().len().unwrap();
    assert!((5..14).contains(&held), "{held} rows were there when it was killed");
    let end = sweep(&config, &killed, &[]);
    assert_eq!((&end["resumed"]["read"], &end["resumed"]["computed"]), (&json!(held), &json!(14 - held)));
    sweep(&config, &whole, &[]);
    assert!(diff(&killed, &whole, 0).contains("14 rows are equal, 0 differ"));
}

/// Whether this process may mount a file system that only it sees.
fn may_mount() -> bool {
    let tried = std::process::Command::new("unshare").args(["-m", "true"]).stderr(Stdio::null()).status();
    let may = tried.is_ok_and(|status| status.success());
    if !may {
        eprintln!("skipped: this user may not mount a file system");
    }
    may
}

#[test]
fn sweep_on_a_full_disk_says_so_and_goes_on_when_there_is_room() {
    if !may_mount() {
        return;
    }
    let levels: Vec<u32> = (1..=12).collect();
    let (folder, config) = sweep_in(&levels);
    let (disk, whole) = (folder.path().join("disk"), folder.path().join("whole.db"));
    std::fs::create_dir(&disk).unwrap();
    // The store fits, its journal does not; later both do.
    let script = "mount -t tmpfs -o size=200k none \"$1\" && { \"$2\" sweep \"$3\" --results \"$1/a.db\"; echo \"status $?\"; } &&
        mount -o remount,size=20m \"$1\" && \"$2\" sweep \"$3\" --results \"$1/a.db\" && cp \"$1/a.db\" \"$3.db\"";
    let program = gearbox();
    let output = std::process::Command::new("unshare")
        .args(["-m", "sh", "-c", script, "-", text(&disk), program.get_program().to_str().unwrap(), text(&config)])
        .current_dir(root())
        .output()
        .unwrap();
    let [out, told] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{out}\n{told}");
    let [full, end] = out.split("status 2\n").collect::<Vec<_>>()[..] else { panic!("{out}\n{told}") };
    let reason = "a.db`: no space is left on the disk; what was stored before is intact";
    assert!(full.is_empty() && told.contains(reason), "{out}\n{told}");
    let read = (1..14).find(|read| end.contains(&format!("{} units computed, {read} read", 14 - read)));
    assert!(read.is_some(), "{end}");
    sweep(&config, &whole, &[]);
    assert!(diff(&whole, &config.with_extension("json.db"), 0).contains("14 rows are equal, 0 differ"));
}

#[test]
fn two_processes_share_one_store() {
    let (folder, config) = sweep_in(&[1, 2, 3, 4, 5]);
    let (both, whole) = (folder.path().join("both.db"), folder.path().join("whole.db"));
    let start = || {
        let mut command = std::process::Command::new(gearbox().get_program());
        let arguments = ["sweep", text(&config), "--results", text(&both), "--json"];
        command.args(arguments).current_dir(root()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let processes = [start(), start()];
    let mut computed = 0;
    for process in processes {
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success());
        let sweep: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(sweep["rows"].as_array().unwrap().len(), 7);
        computed += sweep["resumed"]["computed"].as_u64().unwrap();
    }
    assert!((7..=14).contains(&computed), "{computed}");
    sweep(&config, &whole, &[]);
    assert!(diff(&both, &whole, 0).contains("7 rows are equal, 0 differ"));
}

#[test]
fn shards_put_together_are_the_whole_sweep() {
    let (folder, config) = sweep_in(&[1, 3, 5, 7]);
    let path = |name: &str| folder.path().join(name);
    let mut rows = 0;
    for shard in ["1/2", "2/2"] {
        let store = path(&format!("part-{}.db", &shard[..1]));
        let part = sweep(&config, &store, &["--shard", shard]);
        assert_eq!((&part["resumed"]["shard"], &part["gate_required"]), (&json!(shard), &json!(false)));
        rows += part["rows"].as_array().unwrap().len();
        let again = sweep(&config, &store, &["--shard", shard]);
        assert_eq!(again["resumed"]["computed"], 0);
    }
    assert_eq!(rows, 6);
    let (first, second, all, whole) = (path("part-1.db"), path("part-2.db"), path("all.db"), path("whole.db"));
    let merge = ["results", "merge", text(&first), text(&second), "--out", text(&all)];
    assert!(stdout(&merge).contains("6 rows in"));
    assert!(stderr(&merge, 2).contains("exists already; --overwrite replaces it"));
    stdout(&[merge.as_slice(), &["--overwrite"]].concat());
    sweep(&config, &whole, &[]);
    diff(&all, &whole, 0);
    let text_of = diff(&first, &whole, 1);
    assert!(text_of.contains("3 only in the second"), "{text_of}");
    // The merged store is what the whole sweep would have left: it computes nothing.
    assert_eq!(sweep(&config, &all, &[])["resumed"]["computed"], 0);

    let limits = path("gate.json");
    std::fs::write(&limits, r#"{ "ratio": { "min": 3 }, "worst_head_cosine": { "min": 0.99 } }"#).unwrap();
    let verdict = stdout(&["gate", text(&all), "--config", text(&limits)]);
    assert!(verdict.contains("quant") && verdict.ends_with("PASS\n"), "{verdict}");
    std::fs::write(&limits, r#"{ "ratio": { "min": 99 } }"#).unwrap();
    run(&["gate", text(&all), "--config", text(&limits)], 1);
}

#[test]
fn units_that_were_sent_elsewhere_come_home_as_rows() {
    let (folder, config) = sweep_in(&[1, 3]);
    let registry = gearbox_plugins::registry().unwrap();
    let config = SweepConfig::read(&config).unwrap();
    let open = || Opened::new(Dump::open(&config.dumps[0], &Selection::default()).unwrap()).unwrap();
    let dumps = vec![open()];
    let units = Plan::new(&config, &registry).unwrap().units(&dumps).unwrap();
    let sent: Vec<String> = units.iter().map(|unit| serde_json::to_string(unit).unwrap()).collect();

    // Elsewhere: another copy of the dump, opened again.
    let (there, mut evaluator) = (open(), Evaluator::new(&registry).unwrap());
    let scratch = tempdir().unwrap();
    let records: Vec<String> = sent
        .iter()
        .map(|text| {
            let unit: Unit = serde_json::from_str(text).unwrap();
            serde_json::to_string(&evaluator.evaluate(&unit, &there, scratch.path()).unwrap()).unwrap()
        })
        .collect();
    let mut other = units[0].clone();
    other.digest = "0".repeat(32);
    let error = evaluator.evaluate(&other, &there, scratch.path()).unwrap_err().to_string();
    assert!(error.contains("digest of the dump"), "{error}");

    // At home, where each may arrive twice.
    let path = folder.path().join("a.db");
    let store = Store::open(&path).unwrap();
    store.add_dump(&dumps[0].facts).unwrap();
    for text in records.iter().chain(&records) {
        store.insert(&serde_json::from_str(text).unwrap()).unwrap();
    }
    assert_eq!(store.len().unwrap(), units.len());
    drop(store);
    let resumed = &sweep(&folder.path().join("sweep.json"), &path, &[])["resumed"];
    assert_eq!(resumed["computed"], 0, "{resumed}");
}

#[test]
fn search_computes_no_setting_twice() {
    let folder = tempdir().unwrap();
    let (config, store) = (folder.path().join("search.json"), folder.path().join("a.db"));
    let quant = json!({ "id": "quant", "bits": { "sweep": [2, 4, 6, 8] } });
    let search = json!({
        "pipelines": [{ "routes": [{ "transforms": [quant], "codec": { "id": "zstd" } }] }],
        "search": { "minimise": "bytes", "subject_to": { "worst_head_cosine": { "min": 0.99 } } },
    });
    std::fs::write(&config, search.to_string()).unwrap();
    let first = sweep(&config, &store, &[]);
    let again = sweep(&config, &store, &[]);
    assert!(first["resumed"]["computed"].as_u64().unwrap() > 1);
    assert_eq!((&again["resumed"]["computed"], &again["found"]), (&json!(0), &first["found"]));
    let message = stderr(&["sweep", text(&config), "--results", text(&store), "--shard", "1/2"], 2);
    assert!(message.contains("`/search`: expected none in a sweep that is cut into shards"), "{message}");
    assert!(stderr(&["sweep", "--results", text(&store), "--shard", "3/2"], 2).contains("I from 1 to N"));
}

/// Copies a folder.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn rows_are_replayed_and_what_differs_is_named() {
    let folder = tempdir().unwrap();
    let (dump, moved, store) = (folder.path().join("dump"), folder.path().join("moved"), folder.path().join("a.db"));
    copy(&sample(), &dump);
    let all = ["sweep", "--dump", text(&dump), "--pipeline", "zstd", "--pipeline", "gear", "--results", text(&store)];
    stdout(&all);
    let replay = |more: &[&str], status| {
        let output = run(&[&["results", "replay", "--results", text(&store)], more].concat(), status);
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    assert!(replay(&["--sample", "9"], 0).contains("2 of 2 rows"));
    let sampled = |seed| json_of(&["results", "replay", "--results", text(&store), "--sample", "1", "--seed", seed]);
    assert_eq!(sampled("7")["rows"][0]["key"], sampled("7")["rows"][0]["key"]);

    std::fs::rename(&dump, &moved).unwrap();
    let key = Store::read(&store).unwrap().keys().unwrap().remove(0);
    assert!(replay(&[&key[..8]], 2).contains("is not there any more; name where it lies now with --dump"));
    assert!(replay(&[&key[..8], "--dump", text(&moved)], 0).contains("1 of 1 rows"));

    let tensors = moved.join("demo_prompt_512_1.safetensors");
    let mut bytes = std::fs::read(&tensors).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&tensors, bytes).unwrap();
    let changed = replay(&[&key, "--dump", text(&moved)], 1);
    assert!(changed.contains("DIFFERS") && changed.contains("digest of the dump"), "{changed}");
    assert!(replay(&["zz"], 2).contains("no key begins with `zz`"));
}

#[test]
fn rows_of_loaded_plugins_are_replayed_with_their_library() {
    let folder = tempdir().unwrap();
    let [library, other, store] = ["libdemo.so", "libother.so", "a.db"].map(|name| folder.path().join(name));
    c_library("plugins/examples/c-demo/demo.c", &[], &library);
    c_library("plugins/examples/c-demo/demo.c", &["-g"], &other);
    stdout(&["sweep", "--plugin", text(&library), "--pipeline", "plane-runs", "--results", text(&store)]);
    let replay = |more: &[&str], status| {
        let arguments = [&["results", "replay", "--sample", "1", "--results", text(&store)], more].concat();
        String::from_utf8(run(&arguments, status).stdout).unwrap()
    };
    assert!(replay(&["--plugin", text(&library)], 0).contains("1 of 1 rows"));
    let missing = replay(&[], 1);
    let state = "  `/state`: \"ok\" and \"error\"\n  plugin `plane-runs`: expected format 1 in the library";
    assert!(missing.contains(state) && missing.contains("), got none"), "{missing}");
    let another = replay(&["--plugin", text(&other)], 1);
    assert!(another.contains("DIFFERS") && another.contains("got format 1 in the library `libother.so`"), "{another}");
}

#[test]
fn commands_show_list_and_export_what_was_stored() {
    let (folder, config) = sweep_in(&[1]);
    let store = folder.path().join("a.db");
    sweep(&config, &store, &[]);
    let with = |command: &[&str]| stdout(&[&["results"], command, &["--results", text(&store)]].concat());
    let list = with(&["list"]);
    assert!(list.contains("3 of 3 rows") && list.contains("unsupported"), "{list}");
    let rows = json_of(&["results", "list", "--results", text(&store), "--where", "state = 'ok'", "--sort", "-ratio"]);
    let rows = rows.as_array().unwrap();
    assert!(rows.len() == 2 && rows[0]["ratio"].as_f64() > rows[1]["ratio"].as_f64(), "{rows:?}");
    let names = with(&["list", "--columns", "name,state", "--limit", "1"]);
    assert!(names.starts_with("| name"), "{names}");
    let key = rows[0]["key"].as_str().unwrap();
    let shown = with(&["show", &key[..6]]);
    assert!(shown.contains("worst_head_cosine") && shown.contains("payload") && shown.contains("receipt"), "{shown}");
    let csv = with(&["export", "--format", "csv"]);
    assert_eq!(csv.lines().count(), 4);
    let out = folder.path().join("rows.json");
    with(&["export", "--format", "json", "--out", text(&out)]);
    let export: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert_eq!((export["rows"].as_array().unwrap().len(), export["canaries"].as_array().unwrap().len()), (3, 2));
    assert!(with(&["gc", "--dry-run"]).contains("would remove 0 rows"));

    let missing = folder.path().join("none.db");
    for command in ["list", "gc", "replay"] {
        let mut arguments = vec!["results", command, "--results", text(&missing)];
        arguments.extend((command == "replay").then_some(["--sample", "1"]).into_iter().flatten());
        assert!(stderr(&arguments, 2).contains("none.db"));
        assert!(!missing.exists(), "nothing is made by looking");
    }
    assert!(stderr(&["results", "list", "--results", text(&config)], 2).contains("no SQLite database"));
    assert!(
        stderr(&["results", "list", "--results", text(&store), "--sort", "rati"], 2).contains("did you mean `ratio`")
    );
}
