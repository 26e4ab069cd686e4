//! Training the codecs of a pipeline on the keys and values of a text.

use gearbox_core::{Chunk, Context, DType, Pipeline, Result, ResultExt, Role, Sample, Shape};

use crate::cache::chunk_tokens;
use crate::element::narrow;
use crate::{CacheOptions, LayerStep, Model, Step};

impl Model {
    /// Trains the codecs of a pipeline that learn a model, on what a sample text leaves in a cache of this element type.
    ///
    /// The trained models are part of the pipeline, and counted in the ledger of every cache that uses it. Built-in codecs that were
    /// not trained use tables per chunk. Samples come without earlier tokens and without the keys of the same tokens.
    ///
    /// # Errors
    /// As [`Model::forward`], and what the codecs report.
    pub fn train(&self, pipeline: &mut Pipeline, dtype: DType, ids: &[u32]) -> Result<()> {
        let tokens = chunk_tokens(pipeline);
        let config = self.config();
        let mut samples: Vec<(usize, Sample<'static>)> = Vec::new();
        let mut collect = |step: LayerStep<'_>| {
            let sides = Role::ALL.into_iter().zip([step.key, step.value]);
            for (role, values) in sides {
                let coder = pipeline.live_coder(step.layer, role)?;
                let mut bytes = Vec::new();
                narrow(dtype, values, &mut bytes)?;
                let chunk = Chunk::new(Shape::new(step.tokens, config.kv_heads, config.head_dim), dtype, &bytes)?;
                let tokens = ids.get(step.first_token as usize..).and_then(|ids| ids.get(..step.tokens));
                let cx =
                    Context { tokens, rope: Some(&config.rope), ..Context::new(step.layer, role, step.first_token) };
                samples.extend(coder.lanes(chunk, &cx).context(|| role.to_string())?.into_iter().map(|lane| {
                    let bytes = lane.bytes.into_owned().into();
                    (lane.slot, Sample { spec: lane.spec, bytes, layer: step.layer, role })
                }));
            }
            Ok(())
        };
        // A block is a chunk, so that lanes are cut as a cache cuts them.
        let options = CacheOptions { dtype, block: tokens, ..CacheOptions::default() };
        self.forward(&mut self.cache(&options)?, ids, Step::silent().probe(&mut collect))?;
        let samples = &samples;
        pipeline.train(&|slot| {
            let used = samples.iter().filter(move |(held, _)| *held == slot);
            Box::new(used.map(|(_, sample)| Sample {
                spec: sample.spec.clone(),
                bytes: (&*sample.bytes).into(),
                layer: sample.layer,
                role: sample.role,
            }))
        })
    }
}
