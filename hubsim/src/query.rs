//! The hub's query language, as far as device twins need it.
//!
//! `SELECT [TOP n] * | path [AS name], ... | COUNT() [AS name] FROM devices [WHERE condition]`,
//! with `AND`, `OR`, `NOT`, `= != <> < <= > >=`, `IN [..]`, `NIN [..]`, `IS_DEFINED(path)` and
//! parentheses. A query runs over whole service-side twins, each a [`serde_json::Value`].
//!
//! Rules that surprise, from the hub's own description of the language: everything but `true` counts
//! as false, so `NOT` of a comparison with a missing property is true, while the comparison itself
//! is false whatever its operator; values compare only with values of their own kind; objects and
//! arrays never compare. Keywords have no case, property names have one.
//!
//! Source: Microsoft, "IoT Hub query language for device and module twins, jobs, and message
//! routing". Not here: arithmetic, `GROUP BY` and aggregates other than `COUNT()`.

mod display;
mod grammar;

use std::cmp::Ordering;
use std::str::FromStr;

use serde_json::{Map, Number, Value};

/// A query that has been understood and can be run any number of times.
///
/// [`Display`](std::fmt::Display) writes it in a normal form that parses to the same query.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    top: Option<usize>,
    select: Select,
    source: Source,
    condition: Option<Condition>,
}

/// The collection that a query reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// `FROM devices`: one document per device twin.
    Devices,
    /// `FROM devices.modules`: one document per module twin.
    Modules,
    /// `FROM devices.jobs`: one document per device and job.
    Jobs,
}

/// What stands after `WHERE`; alone, it is a job's `queryCondition` or a configuration's
/// `targetCondition`.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition(Test);

/// A text that is not a query, with the place where it stops being one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("column {column}: expected {expected}, found {found}")]
pub struct QueryError {
    /// Where, in characters from 1; one past the end if the text is too short.
    pub column: usize,
    /// What could have stood there.
    pub expected: &'static str,
    /// What stands there: the start of the text from that place on, in backquotes.
    pub found: String,
}

#[derive(Debug, Clone, PartialEq)]
enum Select {
    Everything,
    Columns(Vec<(Path, Option<String>)>),
    Count(Option<String>),
}

#[derive(Debug, Clone, PartialEq)]
enum Test {
    Any(Vec<Test>),
    All(Vec<Test>),
    Not(Box<Test>),
    Compare(Operand, Comparison, Operand),
    Among { operand: Operand, listed: bool, values: Vec<Literal> },
    Defined(Path),
    Holds(Operand),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Debug, Clone, PartialEq)]
enum Operand {
    Path(Path),
    Literal(Literal),
}

#[derive(Debug, Clone, PartialEq)]
enum Literal {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
}

/// Property names from the document's root; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Path(Vec<String>);

impl Query {
    /// Reads a query.
    ///
    /// # Errors
    /// [`QueryError`] for the first place that does not fit the language.
    pub fn parse(text: &str) -> Result<Self, QueryError> {
        grammar::read(text, grammar::query)
    }

    /// The collection to run this query over.
    #[must_use]
    pub fn source(&self) -> Source {
        self.source
    }

    /// The kind of the result's items, as the response header `x-ms-item-type` names it: whole
    /// documents have a kind, projections and counts are `Raw`.
    #[must_use]
    pub fn item_type(&self) -> &'static str {
        match (&self.select, self.source) {
            (Select::Everything, Source::Devices | Source::Modules) => "Twin",
            (Select::Everything, Source::Jobs) => "DeviceJob",
            _ => "Raw",
        }
    }

    /// Whether the `WHERE` part holds for one document; true without such a part.
    #[must_use]
    pub fn matches(&self, document: &Value) -> bool {
        self.condition.as_ref().is_none_or(|condition| condition.matches(document))
    }

    /// Runs the query: filters, cuts to `TOP`, and makes the result's items, in the order given.
    #[must_use]
    pub fn run<'a>(&self, documents: impl IntoIterator<Item = &'a Value>) -> Vec<Value> {
        let found = documents.into_iter().filter(|document| self.matches(document));
        let limit = self.top.unwrap_or(usize::MAX);
        match &self.select {
            Select::Everything => found.take(limit).cloned().collect(),
            Select::Columns(columns) => {
                found.take(limit).map(|document| project(columns, document)).collect()
            }
            Select::Count(alias) => {
                let name = alias.as_deref().unwrap_or("$1");
                let row = Map::from_iter([(name.to_owned(), Value::from(found.count()))]);
                [Value::Object(row)].into_iter().take(limit).collect()
            }
        }
    }
}

impl Condition {
    /// Reads a condition, the text that may stand after `WHERE`.
    ///
    /// # Errors
    /// [`QueryError`] for the first place that does not fit the language.
    pub fn parse(text: &str) -> Result<Self, QueryError> {
        grammar::read(text, grammar::condition)
    }

    /// Whether the condition holds for one document.
    #[must_use]
    pub fn matches(&self, document: &Value) -> bool {
        self.0.holds(document)
    }
}

/// A missing property leaves its column out, as the hub does.
fn project(columns: &[(Path, Option<String>)], document: &Value) -> Value {
    let row = columns.iter().filter_map(|(path, alias)| {
        let name = alias.as_ref().or(path.0.last())?;
        Some((name.clone(), path.find(document)?.clone()))
    });
    Value::Object(row.collect())
}

impl Test {
    fn holds(&self, document: &Value) -> bool {
        match self {
            Self::Any(tests) => tests.iter().any(|test| test.holds(document)),
            Self::All(tests) => tests.iter().all(|test| test.holds(document)),
            Self::Not(test) => !test.holds(document),
            Self::Compare(left, comparison, right) => {
                match (left.value(document), right.value(document)) {
                    (Some(left), Some(right)) => comparison.holds(left.order(&right)),
                    _ => false,
                }
            }
            Self::Among { operand, listed, values } => {
                operand.value(document).is_some_and(|found| {
                    let equal = |value: &Literal| {
                        found.order(&value.scalar()) == Order::Is(Ordering::Equal)
                    };
                    values.iter().any(equal) == *listed
                })
            }
            Self::Defined(path) => path.find(document).is_some(),
            Self::Holds(operand) => matches!(operand.value(document), Some(Scalar::Bool(true))),
        }
    }
}

impl Comparison {
    fn holds(self, order: Order) -> bool {
        match (self, order) {
            (_, Order::OtherKind) => false,
            (Self::Equal, order) => order == Order::Is(Ordering::Equal),
            (Self::NotEqual, order) => order != Order::Is(Ordering::Equal),
            (_, Order::None) => false,
            (Self::Less, Order::Is(order)) => order.is_lt(),
            (Self::LessOrEqual, Order::Is(order)) => order.is_le(),
            (Self::Greater, Order::Is(order)) => order.is_gt(),
            (Self::GreaterOrEqual, Order::Is(order)) => order.is_ge(),
        }
    }
}

/// A value that can be compared, borrowed from the document or the query.
enum Scalar<'a> {
    Null,
    Bool(bool),
    Number(&'a Number),
    Text(&'a str),
}

/// How two values stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Is(Ordering),
    /// Same kind, different, and none is before the other.
    None,
    OtherKind,
}

impl Scalar<'_> {
    fn order(&self, other: &Self) -> Order {
        match (self, other) {
            (Self::Null, Self::Null) => Order::Is(Ordering::Equal),
            (Self::Bool(a), Self::Bool(b)) if a == b => Order::Is(Ordering::Equal),
            (Self::Bool(_), Self::Bool(_)) => Order::None,
            (Self::Number(a), Self::Number(b)) => {
                let whole = a.as_i64().zip(b.as_i64()).map(|(a, b)| a.cmp(&b));
                let real = || a.as_f64().zip(b.as_f64()).and_then(|(a, b)| a.partial_cmp(&b));
                whole.or_else(real).map_or(Order::None, Order::Is)
            }
            (Self::Text(a), Self::Text(b)) => Order::Is(a.cmp(b)),
            _ => Order::OtherKind,
        }
    }
}

impl Operand {
    /// `None` for a missing property, an object or an array.
    fn value<'a>(&'a self, document: &'a Value) -> Option<Scalar<'a>> {
        match self {
            Self::Literal(literal) => Some(literal.scalar()),
            Self::Path(path) => match path.find(document)? {
                Value::Null => Some(Scalar::Null),
                Value::Bool(value) => Some(Scalar::Bool(*value)),
                Value::Number(value) => Some(Scalar::Number(value)),
                Value::String(value) => Some(Scalar::Text(value)),
                Value::Array(_) | Value::Object(_) => None,
            },
        }
    }
}

impl Literal {
    fn scalar(&self) -> Scalar<'_> {
        match self {
            Self::Null => Scalar::Null,
            Self::Bool(value) => Scalar::Bool(*value),
            Self::Number(value) => Scalar::Number(value),
            Self::Text(value) => Scalar::Text(value),
        }
    }
}

impl Path {
    /// A path may begin with its collection (`devices.jobs.jobId`); no document has such a member.
    fn find<'a>(&self, document: &'a Value) -> Option<&'a Value> {
        let names = match self.0.as_slice() {
            [devices, part, rest @ ..] if devices == "devices" && !rest.is_empty() => {
                match part.as_str() {
                    "jobs" | "modules" => rest,
                    _ => self.0.get(1..)?,
                }
            }
            [devices, rest @ ..] if devices == "devices" && !rest.is_empty() => rest,
            names => names,
        };
        names.iter().try_fold(document, |value, name| value.as_object()?.get(name))
    }
}

impl FromStr for Query {
    type Err = QueryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl FromStr for Condition {
    type Err = QueryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}
