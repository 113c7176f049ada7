//! The program as an operator sees it: real runs against a real registry over real HTTP, what they print, what they
//! leave on disk, and what others can see when they are killed.

mod bench;
mod calibrate;
mod compute;
mod drafts;
mod extract;
mod hostile;
mod publish;
mod pull;
mod routed;
mod serve;
mod served;
