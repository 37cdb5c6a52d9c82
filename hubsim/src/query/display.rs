//! Queries as text, in a normal form that parses to the same query.

use std::fmt;

use super::{Comparison, Condition, Literal, Operand, Path, Query, Select, Source, Test, grammar};

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SELECT ")?;
        if let Some(top) = self.top {
            write!(f, "TOP {top} ")?;
        }
        write!(f, "{} FROM {}", self.select, self.source)?;
        match &self.condition {
            Some(condition) => write!(f, " WHERE {condition}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |f: &mut fmt::Formatter<'_>, alias: &Option<String>| match alias {
            Some(alias) => write!(f, " AS {}", Name(alias, false)),
            None => Ok(()),
        };
        match self {
            Self::Everything => f.write_str("*"),
            Self::Count(alias) => {
                f.write_str("COUNT()")?;
                named(f, alias)
            }
            Self::Columns(columns) => {
                for (index, (path, alias)) in columns.iter().enumerate() {
                    f.write_str(if index == 0 { "" } else { ", " })?;
                    write!(f, "{path}")?;
                    named(f, alias)?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Devices => "devices",
            Self::Modules => "devices.modules",
            Self::Jobs => "devices.jobs",
        })
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined = |f: &mut fmt::Formatter<'_>, tests: &[Self], word: &str| {
            for (index, test) in tests.iter().enumerate() {
                f.write_str(if index == 0 { "" } else { word })?;
                match test {
                    Self::Any(_) | Self::All(_) => write!(f, "({test})")?,
                    _ => write!(f, "{test}")?,
                }
            }
            Ok(())
        };
        match self {
            Self::Any(tests) => joined(f, tests, " OR "),
            Self::All(tests) => joined(f, tests, " AND "),
            Self::Not(test) => write!(f, "NOT ({test})"),
            Self::Compare(left, comparison, right) => write!(f, "{left} {comparison} {right}"),
            Self::Among { operand, listed, values } => {
                write!(f, "{operand} {} [", if *listed { "IN" } else { "NIN" })?;
                for (index, value) in values.iter().enumerate() {
                    f.write_str(if index == 0 { "" } else { ", " })?;
                    write!(f, "{value}")?;
                }
                f.write_str("]")
            }
            Self::Defined(path) => write!(f, "IS_DEFINED({path})"),
            Self::Holds(operand) => write!(f, "{operand}"),
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Equal => "=",
            Self::NotEqual => "!=",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
        })
    }
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.fmt(f),
            Self::Literal(literal) => literal.fmt(f),
        }
    }
}

impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) => {
                write!(f, "'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
            }
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.0.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { "." })?;
            Name(name, index == 0).fmt(f)?;
        }
        Ok(())
    }
}

/// A property name, in double brackets where it could be read as something else. The flag says
/// whether it begins a path, where keywords are not names.
struct Name<'a>(&'a str, bool);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if grammar::is_plain(self.0) && !(self.1 && grammar::is_keyword(self.0)) {
            f.write_str(self.0)
        } else {
            write!(f, "[[{}]]", self.0)
        }
    }
}
