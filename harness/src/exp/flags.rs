//! Experiments called by experiments, with the flags of their command lines.

use std::ffi::OsString;

use clap::{Args, Parser};
use gearbox_core::{Error, Result};

/// The flags of an experiment as the command line reads them.
///
/// # Errors
/// What is wrong with them.
pub(super) fn parse<A: Args>(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Result<A, clap::Error> {
    #[derive(Parser)]
    struct Line<A: Args> {
        #[command(flatten)]
        args: A,
    }
    let arguments = arguments.into_iter().map(Into::into);
    Line::<A>::try_parse_from([OsString::from("exp")].into_iter().chain(arguments)).map(|line| line.args)
}

/// Flags under way.
#[derive(Debug, Default)]
pub(super) struct Flags(Vec<OsString>);

impl Flags {
    /// Adds a flag with a value; one word, so that a value may begin with a dash.
    pub fn value(mut self, name: &str, value: impl Into<OsString>) -> Self {
        let mut flag = OsString::from(format!("--{name}="));
        flag.push(value.into());
        self.0.push(flag);
        self
    }

    /// Adds a flag with each of these values.
    pub fn values(self, name: &str, values: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        values.into_iter().fold(self, |flags, value| flags.value(name, value))
    }

    /// Adds a flag if it is set.
    pub fn switch(mut self, name: &str, is_set: bool) -> Self {
        self.0.extend(is_set.then(|| format!("--{name}").into()));
        self
    }

    /// Reads them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) with what the experiment says of them.
    pub fn parse<A: Args>(self) -> Result<A> {
        parse(self.0).map_err(|error| {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            Error::invalid_config(line.strip_prefix("error: ").unwrap_or(line))
        })
    }
}
