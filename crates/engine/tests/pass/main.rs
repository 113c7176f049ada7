//! The forward pass against recorded logits of `transformers`, and what must not change a bit of it.

mod bits;
mod cache;
mod collector;
mod experts;
mod goldens;
mod mixers;
mod npz;
mod oracle;
mod states;
mod support;
