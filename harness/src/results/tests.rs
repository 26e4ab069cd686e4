//! Unit tests of the store, with records of real units.

use std::sync::OnceLock;

use gearbox_core::{Chunking, PipelineSpec, PluginSpec, Registry};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

use super::*;
use crate::dump::{Dump, Selection};
use crate::sweep::{Evaluator, Opened, Outcome, Plan, SweepConfig};

/// Facts of the bundled sample, and the records of three units over it: `store`, `zstd`, and four bits before `zstd`.
fn made() -> &'static (DumpFacts, Vec<Record>) {
    static MADE: OnceLock<(DumpFacts, Vec<Record>)> = OnceLock::new();
    MADE.get_or_init(|| {
        let registry: Registry = gearbox_plugins::registry().unwrap();
        let codec = |id: &str| PipelineSpec::of_codec(PluginSpec::new(id), Chunking::Aggregate).to_value();
        let lossy = json!({ "routes": [{ "transforms": [{ "id": "quant", "bits": 4 }], "codec": { "id": "zstd" } }] });
        let config = SweepConfig { pipelines: vec![codec("store"), codec("zstd"), lossy], ..SweepConfig::default() };
        let opened = Opened::new(Dump::open(crate::sample::find().unwrap(), &Selection::default()).unwrap()).unwrap();
        let opened = vec![opened];
        let plan = Plan::new(&config, &registry).unwrap();
        let mut evaluator = Evaluator::new(&registry).unwrap();
        let scratch = tempdir().unwrap();
        let units = plan.units(&opened).unwrap();
        let records = units.iter().map(|unit| evaluator.evaluate(unit, &opened[0], scratch.path()).unwrap()).collect();
        assert!(scratch.path().read_dir().unwrap().next().is_none(), "nothing is left behind");
        (opened[0].facts.clone(), records)
    })
}

fn records() -> &'static [Record] {
    &made().1
}

/// A store with these records.
fn filled(records: &[Record]) -> (TempDir, Store) {
    let folder = tempdir().unwrap();
    let store = Store::open(&folder.path().join("a.db")).unwrap();
    store.add_dump(&made().0).unwrap();
    for record in records {
        assert!(store.insert(record).unwrap());
    }
    (folder, store)
}

/// The second record with another number and therefore another digest, under the same key.
fn tampered() -> Record {
    let mut record = records()[1].clone();
    record.row.stored_bytes += 1;
    record
}

fn failed(state: &str) -> Record {
    let mut record = records()[1].clone();
    record.row.outcome = Outcome::Failed { state: state.to_owned().into(), reason: "why".into() };
    record
}

#[test]
fn records_are_read_back_and_never_doubled() {
    let (_folder, store) = filled(records());
    for record in records() {
        let key = record.unit.key();
        let read = store.get(&key).unwrap().unwrap();
        assert_eq!((json!(read), read.digest()), (json!(record), record.digest()));
        assert!(!store.insert(record).unwrap());
        assert_eq!(store.resolve(&key[..10]).unwrap(), key);
    }
    assert_eq!(store.len().unwrap(), 3);
    assert!(!store.insert(&tampered()).unwrap(), "what is there stays");
    assert_eq!(store.record(&records()[1].unit.key()).unwrap().digest(), records()[1].digest());
    store.replace(&tampered()).unwrap();
    assert_eq!(store.record(&records()[1].unit.key()).unwrap().digest(), tampered().digest());
    assert_eq!(store.len().unwrap(), 3);
}

#[test]
fn digest_ignores_times_and_names_and_nothing_else() {
    let record = &records()[2];
    let changed = |change: fn(&mut Record)| {
        let mut record = record.clone();
        change(&mut record);
        record.digest()
    };
    let ignored: [fn(&mut Record); 6] = [
        |record| record.row.encode_ns += 1,
        |record| record.row.decode_ns += 1,
        |record| record.row.sequences[0].ns += 1,
        |record| record.row.dump = "elsewhere".into(),
        |record| record.row.pareto = true,
        |record| record.receipt.threads += 1,
    ];
    for change in ignored {
        assert_eq!(changed(change), record.digest());
    }
    let counted: [fn(&mut Record); 5] = [
        |record| record.row.changed_values += 1,
        |record| record.row.ledger[0].bytes += 1,
        |record| record.row.labels.clear(),
        |record| record.row.error.as_mut().unwrap().heads[3].error.mae *= 1.000_001,
        |record| record.row.outcome = Outcome::Unsupported("no".into()),
    ];
    for change in counted {
        assert_ne!(changed(change), record.digest());
    }
}

#[test]
fn only_failures_of_the_machine_give_way() {
    for state in Outcome::TRANSIENT {
        let (_folder, store) = filled(&[failed(state)]);
        assert!(store.insert(&records()[1]).unwrap(), "{state}");
        assert!(store.get(&records()[1].unit.key()).unwrap().unwrap().row.is_ok());
        assert_eq!(store.len().unwrap(), 1);
    }
    for state in ["error", "panicked", "crashed(SIGSEGV)", "mismatch", "wrong-length"] {
        let (_folder, store) = filled(&[failed(state)]);
        assert!(!store.insert(&records()[1]).unwrap(), "{state}");
    }
}

#[test]
fn numbers_that_are_not_finite_are_kept_apart_from_those_that_were_not_measured() {
    let mut record = records()[2].clone();
    record.row.measured.insert(Metric::Nmse, f64::INFINITY);
    record.row.measured.insert(Metric::Cosine, f64::NAN);
    record.row.measured.remove(&Metric::KlP99);
    let (_folder, store) = filled(&[record.clone()]);
    let read = store.record(&record.unit.key()).unwrap().row;
    assert!(read.measured(Metric::Nmse).unwrap().is_infinite() && read.measured(Metric::Cosine).unwrap().is_nan());
    assert_eq!(read.measured(Metric::KlP99), None);
    let query = Query { columns: ["nmse", "cosine", "kl_p99"].map(str::to_owned).into(), ..Query::default() };
    assert_eq!(store.select(&query).unwrap(), [[Cell::Real(f64::INFINITY), Cell::Null, Cell::Null]]);
    let gate: Gate = serde_json::from_str(r#"{ "nmse": { "max": 1e300 } }"#).unwrap();
    let mut candidates = crate::gate::Candidates::default();
    candidates.add(&store.to_results().unwrap()).unwrap();
    assert!(!candidates.judge(&gate)[0].1.passed());
}

#[test]
fn rows_are_selected_by_condition_and_order() {
    let (_folder, store) = filled(records());
    let select = |condition: Option<&str>, order: Option<&str>, limit| {
        let query = Query {
            columns: vec!["stored_bytes".into()],
            condition: condition.map(str::to_owned),
            order: order.map(str::to_owned),
            limit,
        };
        store.select(&query).map(|rows| rows.into_iter().map(|row| row[0].count().unwrap()).collect::<Vec<_>>())
    };
    let mut bytes: Vec<_> = records().iter().map(|record| record.row.stored_bytes).collect();
    bytes.sort_unstable();
    assert_eq!(select(None, None, None).unwrap(), bytes);
    assert_eq!(select(None, None, Some(1)).unwrap(), bytes[..1]);
    assert_eq!(select(Some("changed_values > 0"), None, None).unwrap(), bytes[..1]);
    bytes.reverse();
    assert_eq!(select(None, Some("-stored_bytes"), None).unwrap(), bytes);
    let message = |condition, order| select(condition, order, None).unwrap_err().to_string();
    assert!(message(None, Some("stored_byte")).ends_with("did you mean `stored_bytes`?"));
    assert!(message(Some("nonsense >"), None).starts_with("expected a condition over columns"));
    for injected in ["1); DELETE FROM rows; --", "1) --", "1; DROP TABLE rows"] {
        let _ = select(Some(injected), None, None);
        assert_eq!(store.len().unwrap(), 3);
    }
    // Every metric has a column, under its name.
    let names = store.columns().unwrap();
    assert!(Metric::OF_DUMPS.iter().all(|metric| names.contains(&metric.to_string())), "{names:?}");
}

#[test]
fn what_is_no_store_is_refused_by_name() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("x.db");
    let refused = || {
        let message = Store::read(&path).unwrap_err().to_string();
        assert!(message.contains("x.db"), "{message}");
        message
    };
    assert!(refused().contains("No such file"));
    std::fs::write(&path, "").unwrap();
    assert!(refused().ends_with("expected a results store, got an empty file"));
    std::fs::write(&path, "{ \"rows\": [] }".repeat(100)).unwrap();
    assert!(refused().ends_with("expected a results store, got a file that is no SQLite database"));
    assert!(Store::open(&path).unwrap_err().to_string().contains("no SQLite database"));
    assert!(!is_database(&path));
    std::fs::remove_file(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE rows (key TEXT)").unwrap();
    assert!(refused().ends_with("expected a results store, got another SQLite database"));
    assert!(Store::open(&path).is_err());
    std::fs::remove_file(&path).unwrap();
    let store = Store::open(&path).unwrap();
    store.connection.pragma_update(None, "user_version", VERSION + 1).unwrap();
    drop(store);
    let newer = format!(
        "expected a results store of version up to {VERSION}, got {}, which a newer gearbox wrote",
        VERSION + 1
    );
    assert!(refused().ends_with(&newer));
    assert!(Store::open(&path).unwrap_err().to_string().ends_with(&newer));
    assert!(is_database(&path));
}

/// The tables of version 1, as that version made them, with the columns that the test fills.
const VERSION_1: &str = "
CREATE TABLE dumps (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, path TEXT NOT NULL, location TEXT NOT NULL, json TEXT NOT NULL);
CREATE TABLE pipelines (id INTEGER PRIMARY KEY, json TEXT NOT NULL UNIQUE);
CREATE TABLE receipts (id INTEGER PRIMARY KEY, json TEXT NOT NULL UNIQUE, version TEXT NOT NULL, commit_id TEXT, cpu_features TEXT NOT NULL,
    threads INTEGER NOT NULL);
CREATE TABLE rows (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, digest TEXT NOT NULL, created INTEGER NOT NULL,
    dump INTEGER NOT NULL REFERENCES dumps (id), pipeline INTEGER NOT NULL REFERENCES pipelines (id),
    receipt INTEGER NOT NULL REFERENCES receipts (id), metrics_version INTEGER NOT NULL, name TEXT NOT NULL, chunking TEXT NOT NULL,
    state TEXT NOT NULL, reason TEXT, labels TEXT NOT NULL, original_bytes INTEGER NOT NULL, stored_bytes INTEGER NOT NULL);
CREATE TABLE bodies (row INTEGER PRIMARY KEY REFERENCES rows (id) ON DELETE CASCADE, json TEXT NOT NULL);
PRAGMA user_version = 1;
PRAGMA application_id = 1195530322;
";

#[test]
fn older_version_is_brought_up_to_date_and_keeps_its_rows() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("old.db");
    let (facts, record) = (&made().0, &records()[1]);
    let key = record.unit.key();
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch(VERSION_1).unwrap();
    let put = |sql: &str, values: &[&dyn rusqlite::ToSql]| connection.execute(sql, values).unwrap();
    put("INSERT INTO dumps VALUES (1, ?1, 'p', 'p', ?2)", &[&facts.digest, &to_json(facts)]);
    put("INSERT INTO pipelines VALUES (1, '{}')", &[]);
    put("INSERT INTO receipts VALUES (1, ?1, '0.1.0', NULL, '', 2)", &[&to_json(&record.receipt)]);
    let row = "INSERT INTO rows VALUES (1, ?1, ?2, 0, 1, 1, 1, 1, 'zstd', 'aggregate', 'ok', NULL, '', 10, 5)";
    put(row, &[&key, &record.digest()]);
    put("INSERT INTO bodies VALUES (1, ?1)", &[&to_json(record)]);
    drop(connection);

    let store = Store::read(&path).unwrap();
    assert_eq!(store.marks().unwrap().version, VERSION);
    assert_eq!(json!(store.record(&key).unwrap()), json!(record));
    assert_eq!((store.keys().unwrap(), store.all_canaries().unwrap().len()), (vec![key], 0));
}

#[test]
fn locked_full_and_read_only_stores_say_so_and_stay_whole() {
    let (folder, store) = filled(&records()[..1]);
    let path = folder.path().join("a.db");
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    store.connection.busy_timeout(Duration::from_millis(20)).unwrap();
    let error = store.insert(&records()[1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("locked by another process"), "{error}");
    other.execute_batch("ROLLBACK").unwrap();

    let mut large = records()[1].clone();
    large.row.name = "n".repeat(1 << 16);
    let pages: i64 = store.connection.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    store.connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())).unwrap();
    let error = store.insert(&large).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("no space is left on the disk"), "{error}");

    let reader = Store::read(&path).unwrap();
    let error = reader.insert(&records()[1]).unwrap_err();
    assert!(error.to_string().contains("got one that is read-only"), "{error}");
    let whole: String = reader.connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!((whole.as_str(), reader.len().unwrap()), ("ok", 1));
    store.connection.query_row("PRAGMA max_page_count = 1000000", [], |_| Ok(())).unwrap();
    assert!(store.insert(&records()[1]).unwrap(), "there is room again");
}

#[test]
fn store_of_a_folder_that_takes_no_files_is_read() {
    let (folder, store) = filled(records());
    drop(store);
    let path = folder.path().join("a.db");
    assert!(!journal(&path).exists(), "a closed store is one file");
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let store = Store::connect(&path, Path::new(&immutable(&path)), flags).unwrap();
    assert_eq!(store.len().unwrap(), 3);
}

#[test]
fn unknown_dump_and_damaged_body_are_errors() {
    let folder = tempdir().unwrap();
    let store = Store::open(&folder.path().join("a.db")).unwrap();
    let error = store.insert(&records()[0]).unwrap_err().to_string();
    assert!(error.contains("expected its dump to be added first"), "{error}");
    let (_folder, store) = filled(&records()[..1]);
    store.connection.execute("UPDATE bodies SET zstd = x'7b'", []).unwrap();
    let error = store.get(&records()[0].unit.key()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().starts_with(&format!("row {}: `", records()[0].unit.key())), "{error}");
    let error = store.resolve("zz").unwrap_err().to_string();
    assert!(error.ends_with("no key begins with `zz`"), "{error}");
}

#[test]
fn merged_stores_hold_everything_once_and_name_what_contradicts() {
    let (_a, first) = filled(&records()[..2]);
    let (_b, second) = filled(&[tampered(), records()[2].clone()]);
    let (_whole, whole) = filled(records());
    let folder = tempdir().unwrap();
    let out = Store::open(&folder.path().join("out.db")).unwrap();
    let key = records()[1].unit.key();
    assert_eq!(merge(&first, &out).unwrap(), Merged { added: 2, held: 0, differing: vec![] });
    assert_eq!(merge(&second, &out).unwrap(), Merged { added: 1, held: 1, differing: vec![key.clone()] });
    assert!(diff(&out, &whole).unwrap().is_empty());
    assert_eq!(merge(&whole, &out).unwrap(), Merged { added: 0, held: 3, differing: vec![] });

    let found = diff(&first, &second).unwrap();
    assert_eq!((found.equal, found.only_first.len(), found.only_second.len()), (0, 1, 1));
    assert_eq!((found.differing[0].key.as_str(), found.differing[0].fields.len()), (key.as_str(), 1));
    assert_eq!(found.differing[0].fields[0].pointer, "/stored_bytes");
}

#[test]
fn rubbish_is_removed_and_the_rest_stays() {
    let all = [records()[0].clone(), failed("timed-out"), {
        let mut record = records()[2].clone();
        record.row.outcome = Outcome::Failed { state: "panicked".into(), reason: "why".into() };
        record
    }];
    let (_folder, store) = filled(&all);
    let rows = |rubbish| collect(&store, rubbish, false).unwrap().rows;
    let none = Rubbish::default();
    assert_eq!(collect(&store, none, true).unwrap().rows, 1);
    assert_eq!((store.len().unwrap(), rows(none), store.len().unwrap()), (3, 1, 2));
    assert_eq!((rows(Rubbish { failed: true, ..none }), store.len().unwrap()), (1, 1));
    assert_eq!((rows(Rubbish { stale: true, missing: true, ..none }), store.len().unwrap()), (0, 1));
    store.connection.execute("UPDATE dumps SET location = '/nowhere'", []).unwrap();
    let removed = collect(&store, Rubbish { missing: true, ..none }, false).unwrap();
    assert_eq!((removed.rows, removed.dumps, removed.parts), (1, 1, 2));
    let mut old = records()[0].clone();
    old.receipt.version = "0.0.1".into();
    store.add_dump(&made().0).unwrap();
    store.insert(&old).unwrap();
    assert_eq!((rows(Rubbish { stale: true, ..none }), store.len().unwrap()), (1, 0));
}

#[test]
fn exports_hold_every_row_and_a_gate_reads_them() {
    let (_folder, store) = filled(records());
    let mut csv = Vec::new();
    export_csv(&store, &Query::default(), &mut csv).unwrap();
    let mut reader = csv::Reader::from_reader(csv.as_slice());
    assert_eq!(reader.headers().unwrap().iter().collect::<Vec<_>>(), store.columns().unwrap());
    assert_eq!(reader.records().map(|record| record.unwrap().len()).collect::<Vec<_>>().len(), 3);
    let mut text = Vec::new();
    export_json(&store, &Query { limit: Some(2), ..Query::default() }, &mut text).unwrap();
    let value: Value = serde_json::from_slice(&text).unwrap();
    let rows = value["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    assert!(rows[0]["receipt"]["version"].is_string() && rows[0]["row_key"].is_string());
    let row: Row = serde_json::from_value(rows[0].clone()).unwrap();
    assert!(row.is_ok());
    let mut candidates = crate::gate::Candidates::default();
    candidates.add(&value).unwrap();
    assert_eq!(candidates.judge(&Gate::default()).len(), 2);
}
