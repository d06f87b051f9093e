"""Programs of `hf-pretrain` that train nothing: for the text before a run, and for its card after one."""
