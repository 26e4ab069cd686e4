//! How a command ended, as its exit status.

use std::process::ExitCode;

/// How a command that ran to its end is reported to the caller; errors that stop a command are exit status 2 as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// Everything was done, every check passed: exit status 0.
    Pass,
    /// A check failed: exit status 1.
    Fail,
    /// Part of the input was bad and left out: exit status 2.
    BadInput,
}

impl Status {
    /// [`Status::Pass`] if the condition holds, else [`Status::Fail`].
    pub fn pass_if(condition: bool) -> Self {
        if condition { Self::Pass } else { Self::Fail }
    }

    /// Of two parts of one command, the worse ending.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        self.max(other)
    }
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        match status {
            Status::Pass => Self::SUCCESS,
            Status::Fail => Self::from(1),
            Status::BadInput => Self::from(2),
        }
    }
}
