//! Settings that several policies share.

/// Makes the settings of a policy with a budget: those that all of them share, and its own before them.
macro_rules! budget_settings {
    ($(#[$about:meta])* $name:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$meta])* pub $field: $type,)*
            /// Tokens seen ÷ tokens kept, at least; 3 unless `budget_tokens` is given instead.
            #[schemars(range(min = 1.0, max = 1e6))]
            pub target_ratio: Option<f64>,
            /// Tokens that are kept at most, however many were seen.
            #[schemars(range(min = 1))]
            pub budget_tokens: Option<u32>,
            /// First tokens of the sequence that stay; a part of the budget.
            pub sinks: Option<u32>,
            /// Nothing is evicted while fewer tokens were seen; as many as sinks need where the budget is a ratio, at least 64.
            pub min_tokens: Option<u32>,
            /// Tokens that are evicted beyond what the budget demands, so that it happens less often.
            pub margin_tokens: Option<u32>,
            /// Layers that evict; all others keep all tokens.
            pub layers: Option<gearbox_core::LayerRange>,
            /// How the budget is spread over the layers that evict.
            pub layer_budgets: Option<$crate::budget::LayerBudgets>,
        }

        impl $name {
            /// What the budget is made of, with recent tokens as given.
            fn wishes(&self, recent: $crate::budget::Recent) -> $crate::budget::Wishes {
                $crate::budget::Wishes {
                    target_ratio: self.target_ratio,
                    budget_tokens: self.budget_tokens,
                    sinks: self.sinks,
                    recent,
                    min_tokens: self.min_tokens,
                    margin_tokens: self.margin_tokens,
                    layers: self.layers,
                    layer_budgets: self.layer_budgets.clone(),
                }
            }

            /// Fills in what was left out.
            fn resolve(&mut self, budget: &$crate::budget::Budget) {
                let wishes = budget.wishes();
                self.target_ratio = wishes.target_ratio;
                self.budget_tokens = wishes.budget_tokens;
                self.sinks = wishes.sinks;
                self.min_tokens = wishes.min_tokens;
                self.margin_tokens = wishes.margin_tokens;
                self.layers = wishes.layers;
                self.layer_budgets = wishes.layer_budgets;
            }
        }
    };
}

/// The same for a policy that chooses between tokens which are neither sinks nor recent.
macro_rules! choosing_settings {
    ($(#[$about:meta])* $name:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* }) => {
        $crate::settings::budget_settings! {
            $(#[$about])*
            $name {
                $($(#[$meta])* $field: $type,)*
                /// Last tokens that stay, as a part of the budget.
                #[schemars(range(min = 0.0, max = 1.0))]
                recent_fraction: Option<f64>,
                /// Last tokens that stay; a part of the budget.
                recent_tokens: Option<u32>,
            }
        }

        impl $name {
            /// The budget, with these defaults; fills in what was left out.
            fn budget(&mut self, sinks: u32, recent: f64) -> gearbox_core::Result<$crate::budget::Budget> {
                if self.recent_tokens.is_none() {
                    self.recent_fraction.get_or_insert(recent);
                }
                self.sinks.get_or_insert(sinks);
                let recent = $crate::budget::Recent::new(self.recent_fraction, self.recent_tokens)?;
                let budget = $crate::budget::Budget::new(self.wishes(recent))?;
                self.resolve(&budget);
                Ok(budget)
            }
        }
    };
}

/// Implements the trait of a policy that is a `config` and a `budget`, whose scorer is made from both.
macro_rules! budget_policy {
    ($name:ident, $scorer:expr) => {
        gearbox_core::register_eviction!($name);

        impl gearbox_core::EvictionPolicy for $name {
            fn capabilities(&self) -> gearbox_core::Capabilities {
                let elems = gearbox_core::ElemSet::FLOATS;
                gearbox_core::Capabilities { streaming: true, ..gearbox_core::Capabilities::new(elems) }
            }

            fn config(&self) -> serde_json::Value {
                serde_json::json!(self.config)
            }

            fn retention(&self, geometry: &gearbox_core::CacheGeometry, seen: u64) -> gearbox_core::Retention {
                self.budget.retention(geometry, seen)
            }

            fn session(
                &self,
                geometry: &gearbox_core::CacheGeometry,
            ) -> gearbox_core::Result<Box<dyn gearbox_core::EvictionSession>> {
                let scorer: fn(&Self, &gearbox_core::CacheGeometry) -> _ = $scorer;
                $crate::select::session(&self.budget, geometry, scorer(self, geometry))
            }
        }
    };
}

pub(crate) use {budget_policy, budget_settings, choosing_settings};
