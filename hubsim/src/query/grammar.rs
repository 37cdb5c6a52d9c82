//! The grammar, one function per rule. Every parser eats the white space after what it reads, so a
//! place is always the start of a word.

use serde_json::Number;
use winnow::ascii::{Caseless, dec_uint, digit1, hex_digit1, multispace0};
use winnow::combinator::{
    alt, cut_err, delimited, empty, eof, not, opt, peek, preceded, repeat, separated, terminated,
};
use winnow::error::{ErrMode, ModalResult, ParserError};
use winnow::prelude::*;
use winnow::stream::{Stateful, Stream};
use winnow::token::{any, none_of, one_of, take_until, take_while};

use super::{
    Comparison, Condition, Literal, Operand, Path, Query, QueryError, Select, Source, Test,
};

/// The text that is left, and how many parentheses and `NOT`s are open.
type Input<'i> = Stateful<&'i str, usize>;
type Parsed<T> = ModalResult<T, Expected>;

/// Deeper conditions are refused, so that no query can exhaust the stack.
const DEEPEST: usize = 64;

const SELECTED: &str = "`*`, `COUNT()` or property paths";

const KEYWORDS: [&str; 15] = [
    "SELECT", "TOP", "FROM", "WHERE", "GROUP", "BY", "AS", "AND", "OR", "NOT", "IN", "NIN", "NULL",
    "TRUE", "FALSE",
];

/// What a rule wanted to see where it gave up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expected(&'static str);

impl<I: Stream> ParserError<I> for Expected {
    type Inner = Self;

    fn from_input(_input: &I) -> Self {
        Self("something else")
    }

    fn into_inner(self) -> Result<Self::Inner, Self> {
        Ok(self)
    }
}

/// Reads the whole text by one rule.
pub(super) fn read<T>(
    text: &str,
    rule: impl FnMut(&mut Input<'_>) -> Parsed<T>,
) -> Result<T, QueryError> {
    let input = Stateful { input: text, state: 0 };
    preceded(multispace0, rule).parse(input).map_err(|error| {
        let (before, rest) = text.split_at_checked(error.offset()).unwrap_or((text, ""));
        let found = rest.split_whitespace().next().unwrap_or_default();
        QueryError {
            column: before.chars().count() + 1,
            expected: error.inner().0,
            found: if found.is_empty() {
                "the end".to_owned()
            } else {
                format!("`{}`", found.chars().take(40).collect::<String>())
            },
        }
    })
}

pub(super) fn query(input: &mut Input<'_>) -> Parsed<Query> {
    keyword("SELECT").parse_next(input).map_err(|_| ErrMode::Cut(Expected("`SELECT`")))?;
    let top = opt(preceded(keyword("TOP"), must("a number of rows", word(dec_uint))))
        .parse_next(input)?;
    let select = select(input)?;
    must("`,` or `FROM`", keyword("FROM")).parse_next(input)?;
    let source =
        must("`devices`, `devices.modules` or `devices.jobs`", source).parse_next(input)?;
    let condition = opt(preceded(keyword("WHERE"), any_of)).parse_next(input)?;
    let expected = match condition {
        None => "`WHERE` or the end of the query",
        Some(_) => "`AND`, `OR` or the end of the query",
    };
    must(expected, eof).parse_next(input)?;
    Ok(Query { top, select, source, condition: condition.map(Condition) })
}

pub(super) fn condition(input: &mut Input<'_>) -> Parsed<Condition> {
    let test = any_of(input)?;
    must("`AND`, `OR` or the end of the condition", eof).parse_next(input)?;
    Ok(Condition(test))
}

fn select(input: &mut Input<'_>) -> Parsed<Select> {
    let count = (word(Caseless("COUNT")), sign("("), sign(")"));
    alt((
        sign("*").value(Select::Everything),
        preceded(count, alias).map(Select::Count),
        separated(1.., (must(SELECTED, path), alias), sign(",")).map(Select::Columns),
    ))
    .parse_next(input)
}

fn alias(input: &mut Input<'_>) -> Parsed<Option<String>> {
    opt(preceded(keyword("AS"), must("a name for the column", name))).parse_next(input)
}

fn source(input: &mut Input<'_>) -> Parsed<Source> {
    let part = preceded(
        '.',
        alt((Caseless("modules").value(Source::Modules), Caseless("jobs").value(Source::Jobs))),
    );
    let source = preceded(Caseless("devices"), opt(part));
    let source = word(terminated(source, (not('.'), end_of_word))).parse_next(input)?;
    Ok(source.unwrap_or(Source::Devices))
}

fn any_of(input: &mut Input<'_>) -> Parsed<Test> {
    separated(1.., all_of, keyword("OR")).map(|tests| one_or(tests, Test::Any)).parse_next(input)
}

fn all_of(input: &mut Input<'_>) -> Parsed<Test> {
    separated(1.., cut_err(test), keyword("AND"))
        .map(|tests| one_or(tests, Test::All))
        .parse_next(input)
}

fn one_or(mut tests: Vec<Test>, many: fn(Vec<Test>) -> Test) -> Test {
    match tests.pop() {
        Some(only) if tests.is_empty() => only,
        last => {
            tests.extend(last);
            many(tests)
        }
    }
}

fn test(input: &mut Input<'_>) -> Parsed<Test> {
    if input.state >= DEEPEST {
        return Err(ErrMode::Cut(Expected("at most 64 parentheses and NOTs inside one another")));
    }
    input.state += 1;
    let defined = (word(Caseless("IS_DEFINED")), sign("("));
    let test = expected(
        "a condition",
        alt((
            preceded(keyword("NOT"), cut_err(test)).map(|test| Test::Not(Box::new(test))),
            delimited(sign("("), any_of, must("`AND`, `OR` or `)`", sign(")"))),
            delimited(defined, must("a property path", path), must("`)`", sign(")")))
                .map(Test::Defined),
            comparison,
        )),
    )
    .parse_next(input);
    input.state -= 1;
    test
}

fn comparison(input: &mut Input<'_>) -> Parsed<Test> {
    let left = operand(input)?;
    let among = alt((keyword("IN").value(true), keyword("NIN").value(false)));
    if let Some(listed) = opt(among).parse_next(input)? {
        let values = must("a list of values such as ['a', 'b']", list).parse_next(input)?;
        return Ok(Test::Among { operand: left, listed, values });
    }
    let Some(comparison) = opt(operator).parse_next(input)? else {
        return Ok(Test::Holds(left));
    };
    let right = must("a value or a property path", operand).parse_next(input)?;
    Ok(Test::Compare(left, comparison, right))
}

fn operator(input: &mut Input<'_>) -> Parsed<Comparison> {
    alt((
        sign("=").value(Comparison::Equal),
        alt((sign("!="), sign("<>"))).value(Comparison::NotEqual),
        sign("<=").value(Comparison::LessOrEqual),
        sign("<").value(Comparison::Less),
        sign(">=").value(Comparison::GreaterOrEqual),
        sign(">").value(Comparison::Greater),
    ))
    .parse_next(input)
}

fn list(input: &mut Input<'_>) -> Parsed<Vec<Literal>> {
    let values = || separated(1.., must("a value", literal), sign(","));
    alt((
        delimited(sign("["), values(), must("`,` or `]`", sign("]"))),
        delimited(sign("("), values(), must("`,` or `)`", sign(")"))),
    ))
    .parse_next(input)
}

fn operand(input: &mut Input<'_>) -> Parsed<Operand> {
    alt((literal.map(Operand::Literal), path.map(Operand::Path))).parse_next(input)
}

fn literal(input: &mut Input<'_>) -> Parsed<Literal> {
    alt((
        keyword("NULL").value(Literal::Null),
        keyword("TRUE").value(Literal::Bool(true)),
        keyword("FALSE").value(Literal::Bool(false)),
        number.map(Literal::Number),
        text('\'').map(Literal::Text),
        text('"').map(Literal::Text),
    ))
    .parse_next(input)
}

fn number(input: &mut Input<'_>) -> Parsed<Number> {
    let hexadecimal = preceded(Caseless("0x"), hex_digit1)
        .verify_map(|digits| i64::from_str_radix(digits, 16).ok().map(Number::from));
    let exponent = (one_of(['e', 'E']), opt(one_of(['+', '-'])), digit1);
    let decimal =
        (opt('-'), digit1, opt(('.', digit1)), opt(exponent)).take().verify_map(|digits: &str| {
            match digits.parse::<i64>() {
                Ok(whole) => Some(Number::from(whole)),
                Err(_) => digits.parse().ok().and_then(Number::from_f64),
            }
        });
    // A digit or a minus can begin nothing else, so a bad number is told as one.
    peek(one_of(('0'..='9', '-'))).parse_next(input)?;
    must("a number", word(terminated(alt((hexadecimal, decimal)), end_of_word))).parse_next(input)
}

/// A string in the given quotes, with the escapes `\'`, `\"`, `\\` and `\uXXXX`.
fn text<'i>(quote: char) -> impl Parser<Input<'i>, String, ErrMode<Expected>> {
    let body = repeat(
        0..,
        alt((
            none_of([quote, '\\']),
            preceded(
                '\\',
                must(r#"one of \' \" \\ \uXXXX"#, alt((one_of(['\'', '"', '\\']), unicode))),
            ),
        )),
    );
    word(delimited(quote, body, must("the closing quote", quote)))
}

/// A character beyond 16 bits is written as a pair of surrogates, as in JSON.
fn unicode(input: &mut Input<'_>) -> Parsed<char> {
    let first = unicode_unit(input)?;
    let mut units = vec![first];
    if (0xD800..0xDC00).contains(&first) {
        units.push(preceded('\\', unicode_unit).parse_next(input)?);
    }
    let character = char::decode_utf16(units).next().and_then(Result::ok);
    empty.verify_map(|()| character).parse_next(input)
}

fn unicode_unit(input: &mut Input<'_>) -> Parsed<u16> {
    preceded('u', take_while(4, |c: char| c.is_ascii_hexdigit()))
        .verify_map(|digits| u16::from_str_radix(digits, 16).ok())
        .parse_next(input)
}

fn path(input: &mut Input<'_>) -> Parsed<Path> {
    not(plain.verify(is_keyword)).parse_next(input)?;
    let names = separated(1.., alt((bracketed, plain.map(str::to_owned))), '.');
    let names = expected("a property path", word(names)).parse_next(input)?;
    // A point that no name follows is part of nothing.
    must("a property name after `.`", not('.')).parse_next(input)?;
    Ok(Path(names))
}

fn name(input: &mut Input<'_>) -> Parsed<String> {
    word(alt((bracketed, plain.map(str::to_owned)))).parse_next(input)
}

fn bracketed(input: &mut Input<'_>) -> Parsed<String> {
    delimited("[[", must("a name and `]]`", take_until(1.., "]]")), "]]")
        .map(str::to_owned)
        .parse_next(input)
}

fn plain<'i>(input: &mut Input<'i>) -> Parsed<&'i str> {
    (any.verify(|c| begins_name(*c)), take_while(0.., in_name)).take().parse_next(input)
}

pub(super) fn is_plain(name: &str) -> bool {
    name.starts_with(begins_name) && name.chars().all(in_name)
}

pub(super) fn is_keyword(name: &str) -> bool {
    KEYWORDS.iter().any(|keyword| keyword.eq_ignore_ascii_case(name))
}

fn begins_name(c: char) -> bool {
    in_name(c) && !c.is_numeric()
}

fn in_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '$'
}

fn end_of_word(input: &mut Input<'_>) -> Parsed<()> {
    not(any.verify(|c| in_name(*c))).parse_next(input)
}

fn keyword<'i>(text: &'static str) -> impl Parser<Input<'i>, (), ErrMode<Expected>> {
    word(terminated(Caseless(text), end_of_word)).void()
}

fn sign<'i>(text: &'static str) -> impl Parser<Input<'i>, (), ErrMode<Expected>> {
    word(text).void()
}

fn word<'i, T>(
    parser: impl Parser<Input<'i>, T, ErrMode<Expected>>,
) -> impl Parser<Input<'i>, T, ErrMode<Expected>> {
    terminated(parser, multispace0)
}

/// Names what the parser wants, and lets the error point to where the parser began.
fn expected<'i, T>(
    what: &'static str,
    mut parser: impl Parser<Input<'i>, T, ErrMode<Expected>>,
) -> impl Parser<Input<'i>, T, ErrMode<Expected>> {
    move |input: &mut Input<'i>| {
        let start = input.checkpoint();
        parser.parse_next(input).map_err(|error| match error {
            ErrMode::Backtrack(_) => {
                input.reset(&start);
                ErrMode::Backtrack(Expected(what))
            }
            error => error,
        })
    }
}

/// As [`expected`], where nothing else can stand.
fn must<'i, T>(
    what: &'static str,
    parser: impl Parser<Input<'i>, T, ErrMode<Expected>>,
) -> impl Parser<Input<'i>, T, ErrMode<Expected>> {
    cut_err(expected(what, parser))
}
