//! Reading rows: which columns, under which condition, in which order.

use std::fmt;

use gearbox_core::{Error, Result, config};
use rusqlite::ToSql;
use rusqlite::types::{ToSqlOutput, Value as SqlValue, ValueRef};
use serde_json::{Value, json};

use super::Store;
use crate::gate::Metric;

/// One value of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// Not known or not measured; also a number that is not defined.
    Null,
    /// A count.
    Integer(i64),
    /// A measured number; may be infinite.
    Real(f64),
    /// A text.
    Text(String),
}

impl Cell {
    /// As JSON; numbers that are not finite become `null`.
    pub fn to_value(&self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Integer(number) => (*number).into(),
            Self::Real(number) => (*number).into(),
            Self::Text(text) => text.as_str().into(),
        }
    }

    /// The number that it is.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Integer(number) => Some(*number as f64),
            Self::Real(number) => Some(*number),
            Self::Null | Self::Text(_) => None,
        }
    }

    /// The count that it is.
    pub fn count(&self) -> Option<u64> {
        match self {
            Self::Integer(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }
}

/// As in a CSV file: nothing for `null`.
impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => Ok(()),
            Self::Integer(number) => number.fmt(f),
            Self::Real(number) => number.fmt(f),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl ToSql for Cell {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Null => ToSqlOutput::Owned(SqlValue::Null),
            Self::Integer(number) => ToSqlOutput::Owned(SqlValue::Integer(*number)),
            Self::Real(number) => ToSqlOutput::Owned(SqlValue::Real(*number)),
            Self::Text(text) => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
        })
    }
}

impl From<ValueRef<'_>> for Cell {
    fn from(value: ValueRef<'_>) -> Self {
        match value {
            ValueRef::Null | ValueRef::Blob(_) => Self::Null,
            ValueRef::Integer(number) => Self::Integer(number),
            ValueRef::Real(number) => Self::Real(number),
            ValueRef::Text(text) => Self::Text(String::from_utf8_lossy(text).into_owned()),
        }
    }
}

impl From<i64> for Cell {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

impl From<u64> for Cell {
    fn from(number: u64) -> Self {
        Self::Integer(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Cell {
    fn from(number: f64) -> Self {
        Self::Real(number)
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl<T: Into<Self>> From<Option<T>> for Cell {
    fn from(cell: Option<T>) -> Self {
        cell.map_or(Self::Null, Into::into)
    }
}

/// What to read of the view `results`, which `docs/RESULTS-STORE.md` describes.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Names of columns; empty for all.
    pub columns: Vec<String>,
    /// An SQL expression over the columns that must be true.
    pub condition: Option<String>,
    /// A column to sort by, descending with a `-` before it. Rows that are equal there, and all without it, come by dump, those that ended
    /// well first, the smallest file first.
    pub order: Option<String>,
    /// Most rows.
    pub limit: Option<usize>,
}

impl Store {
    /// Names of the columns of the view `results`, in order.
    ///
    /// # Errors
    /// What reading reports.
    pub fn columns(&self) -> Result<Vec<String>> {
        let names = || -> rusqlite::Result<Vec<String>> {
            let statement = self.connection.prepare_cached("SELECT * FROM results LIMIT 0")?;
            Ok(statement.column_names().map(str::to_owned).collect())
        };
        self.on(names())
    }

    /// Hands over the rows of a query one by one, in its order.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for a column that does not exist or a condition that is no SQL;
    /// else what `visit` reports.
    pub fn each(&self, query: &Query, mut visit: impl FnMut(Vec<Cell>) -> Result<()>) -> Result<()> {
        let known = self.columns()?;
        let check = |name: &str| {
            let near = || config::near(name, known.iter().map(String::as_str)).join("` or `");
            let is_known = known.iter().any(|column| column == name);
            is_known.then_some(()).ok_or_else(|| {
                let near = near();
                let hint = if near.is_empty() {
                    format!("known are `{}`", known.join("`, `"))
                } else {
                    format!("did you mean `{near}`?")
                };
                Error::invalid_config(format!("no column is called `{name}`, {hint}"))
            })
        };
        query.columns.iter().try_for_each(|name| check(name))?;
        let mut order = String::new();
        if let Some(wanted) = &query.order {
            let (name, direction) = wanted.strip_prefix('-').map_or((wanted.as_str(), "ASC"), |name| (name, "DESC"));
            check(name)?;
            order = format!("{name} {direction} NULLS LAST, ");
        }
        let columns = if query.columns.is_empty() { "*".to_owned() } else { query.columns.join(", ") };
        let condition = query.condition.as_ref().map_or_else(String::new, |condition| format!("WHERE ({condition}\n)"));
        let limit = query.limit.map_or_else(String::new, |limit| format!("LIMIT {limit}"));
        let sql = format!(
            "SELECT {columns} FROM results {condition} ORDER BY {order}dump, state <> 'ok', stored_bytes, key {limit}"
        );
        let wrong = |error: rusqlite::Error| match &query.condition {
            Some(condition) => Error::invalid_config(format!(
                "expected a condition over columns such as `stored_bytes < 1000`, got `{condition}`: {error}"
            )),
            None => super::failed(&self.path, &error),
        };
        let mut statement = self.connection.prepare(&sql).map_err(wrong)?;
        let count = statement.column_count();
        let mut rows = statement.query([]).map_err(wrong)?;
        while let Some(row) = rows.next().map_err(wrong)? {
            let cells = (0..count).map(|idx| self.on(row.get_ref(idx)).map(Cell::from));
            visit(cells.collect::<Result<_>>()?)?;
        }
        Ok(())
    }

    /// The rows and canaries of the store as results of a sweep, as far as [a gate](crate::gate::Candidates::add) looks at them.
    ///
    /// # Errors
    /// What reading reports.
    pub fn to_results(&self) -> Result<Value> {
        let fixed = ["name", "pipeline", "state", "reason"].map(str::to_owned);
        let metrics = Metric::OF_DUMPS.map(|metric| metric.to_string());
        let query = Query { columns: [fixed.as_slice(), &metrics].concat(), ..Query::default() };
        let mut rows = Vec::new();
        self.each(&query, |cells| {
            let [name, Cell::Text(pipeline), state, reason, numbers @ ..] = cells.as_slice() else { return Ok(()) };
            let pipeline: Value = self.parse(pipeline.as_bytes())?;
            let measured = metrics.iter().zip(numbers).filter(|(_, number)| **number != Cell::Null);
            let measured: serde_json::Map<_, _> = measured.map(|(name, number)| (name.clone(), number.to_value())).collect();
            rows.push(json!({
                "name": name.to_value(), "pipeline": pipeline, "state": state.to_value(), "reason": reason.to_value(), "measured": measured,
            }));
            Ok(())
        })?;
        let canaries: Vec<_> = self.all_canaries()?.into_iter().map(|(_, canary)| canary).collect();
        Ok(json!({ "rows": rows, "canaries": canaries }))
    }

    /// All rows of a query.
    ///
    /// # Errors
    /// As [`Store::each`].
    pub fn select(&self, query: &Query) -> Result<Vec<Vec<Cell>>> {
        let mut all = Vec::new();
        self.each(query, |cells| {
            all.push(cells);
            Ok(())
        })?;
        Ok(all)
    }
}
