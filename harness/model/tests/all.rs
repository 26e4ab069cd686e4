//! The model against its goldens, and the cache against the model.

mod cache;
mod folders;
mod golden;
mod run;
